/* vmm._native.Pager and serve_pages(): pager.h and serve.h for Python. */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "pager.h"
#include "serve.h"

typedef struct {
    PyObject_HEAD
    struct pager *pager;
    Py_buffer *buffers; /* a region's memory and its bitmap, by turns */
    uint32_t count;
} PagerObject;

static void release(Py_buffer *buffers, uint32_t count)
{
    for (uint32_t i = 0; buffers && i < 2 * count; i++)
        if (buffers[i].obj)
            PyBuffer_Release(&buffers[i]);
    PyMem_Free(buffers);
}

/* [(memory, bitmap), ...] as buffers: NULL with an exception. */
static Py_buffer *take_regions(PyObject *regions, uint32_t *count, bool writable)
{
    PyObject *list = PySequence_Fast(regions, "[(memory, bitmap), ...]");
    if (!list)
        return NULL;
    Py_ssize_t length = PySequence_Fast_GET_SIZE(list);
    Py_buffer *buffers = length && length <= 64 ? PyMem_Calloc((size_t)length * 2, sizeof *buffers) : NULL;
    if (!buffers)
        PyErr_SetString(PyExc_ValueError, "1 to 64 regions");
    for (Py_ssize_t i = 0; buffers && i < length; i++) {
        PyObject *memory, *bitmap;
        Py_buffer *b = &buffers[2 * i];
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(list, i), "OO", &memory, &bitmap) ||
            PyObject_GetBuffer(memory, &b[0], writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) ||
            PyObject_GetBuffer(bitmap, &b[1], PyBUF_WRITABLE)) {
            release(buffers, (uint32_t)length);
            buffers = NULL;
            break;
        }
        uint64_t pages = (uint64_t)b[0].len / PAGE, words = (pages + 63) / 64;
        bool fits = pages && pages < 0x7FFFFFFF && !(b[0].len % PAGE) && (uint64_t)b[1].len >= words * 8 &&
                    !((uintptr_t)b[1].buf % 8) && !((uintptr_t)b[0].buf % (writable ? PAGE : 1));
        /* Bits beyond the memory would be waited for for ever. */
        if (fits && pages % 64)
            fits = !(((uint64_t *)b[1].buf)[words - 1] >> pages % 64);
        if (!fits) {
            PyErr_SetString(PyExc_ValueError, "the buffers do not fit each other");
            release(buffers, (uint32_t)length);
            buffers = NULL;
        }
    }
    *count = (uint32_t)length;
    Py_DECREF(list);
    return buffers;
}

static PyObject *raise(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *pager_new_object(PyTypeObject *type, PyObject *args)
{
    PyObject *regions;
    int kernel, error = 0;
    if (!PyArg_ParseTuple(args, "Op:Pager", &regions, &kernel))
        return NULL;
    PagerObject *self = (PagerObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->buffers = take_regions(regions, &self->count, true);
    if (!self->buffers) {
        Py_DECREF(self);
        return NULL;
    }
    struct pager_region at[64];
    for (uint32_t i = 0; i < self->count; i++)
        at[i] = (struct pager_region){self->buffers[2 * i].buf, (uint64_t)self->buffers[2 * i].len / PAGE,
                                      self->buffers[2 * i + 1].buf};
    Py_BEGIN_ALLOW_THREADS
    self->pager = pager_new(at, self->count, kernel, &error);
    Py_END_ALLOW_THREADS
    if (!self->pager) {
        Py_DECREF(self);
        return raise(error);
    }
    return (PyObject *)self;
}

static void end(PagerObject *self)
{
    struct pager *pager = self->pager;
    self->pager = NULL;
    if (pager) {
        Py_BEGIN_ALLOW_THREADS
        pager_free(pager);
        Py_END_ALLOW_THREADS
    }
    Py_buffer *buffers = self->buffers;
    self->buffers = NULL;
    release(buffers, self->count);
}

static void pager_dealloc(PagerObject *self)
{
    end(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static bool is_open(PagerObject *self)
{
    if (!self->pager)
        PyErr_SetString(PyExc_ValueError, "the pager is closed");
    return self->pager;
}

static PyObject *pager_py_attach(PagerObject *self, PyObject *argument)
{
    int fd = PyObject_AsFileDescriptor(argument);
    if (fd < 0 || !is_open(self))
        return NULL;
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    int error = fd < 0 ? errno : pager_attach(self->pager, fd);
    if (error)
        return raise(error);
    Py_RETURN_NONE;
}

#define ORDER(name)                                                               \
    static PyObject *pager_py_##name(PagerObject *self, PyObject *Py_UNUSED(none)) \
    {                                                                             \
        if (!is_open(self))                                                       \
            return NULL;                                                          \
        pager_##name(self->pager);                                                \
        Py_RETURN_NONE;                                                           \
    }
ORDER(detach)
ORDER(commit)

static PyObject *pager_py_want(PagerObject *self, PyObject *args)
{
    unsigned int region;
    unsigned long long first, count;
    if (!PyArg_ParseTuple(args, "IKK:want", &region, &first, &count) || !is_open(self))
        return NULL;
    pager_want(self->pager, region, first, count);
    Py_RETURN_NONE;
}

static PyObject *pager_py_fileno(PagerObject *self, PyObject *Py_UNUSED(none))
{
    return is_open(self) ? PyLong_FromLong(pager_fd(self->pager)) : NULL;
}

static PyObject *pager_py_status(PagerObject *self, PyObject *Py_UNUSED(none))
{
    static const char *names[] = {"live", "broken", "whole", "given up"};
    if (!is_open(self))
        return NULL;
    struct pager_counts counts;
    pager_counts(self->pager, &counts);
    return Py_BuildValue("(ssKKKKKK)", names[pager_state(self->pager)], pager_error(self->pager),
                         (unsigned long long)counts.left, (unsigned long long)counts.faults,
                         (unsigned long long)counts.slowest_ns, (unsigned long long)counts.waited_ns,
                         (unsigned long long)counts.pages, (unsigned long long)counts.zero);
}

static PyObject *pager_py_close(PagerObject *self, PyObject *Py_UNUSED(none))
{
    end(self);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"attach", (PyCFunction)pager_py_attach, METH_O,
     "attach(fd): take pages from this stream socket from now on; OSError if they are not needed any more."},
    {"detach", (PyCFunction)pager_py_detach, METH_NOARGS, "detach(): leave the connection; faults wait for the next."},
    {"commit", (PyCFunction)pager_py_commit, METH_NOARGS,
     "commit(): the memory is needed from now on. Before, the end of the connection gives it up."},
    {"want", (PyCFunction)pager_py_want, METH_VARARGS,
     "want(region, first, count): fetch these pages before others; fileno() is readable when some of them came."},
    {"fileno", (PyCFunction)pager_py_fileno, METH_NOARGS, "An eventfd: pages that were wanted came, or status() changed."},
    {"status", (PyCFunction)pager_py_status, METH_NOARGS,
     "status() -> (live | broken | whole | given up, why, pages missing, faults that waited, slowest ns, ns of all, pages "
     "that came, zero pages that came)."},
    {"close", (PyCFunction)pager_py_close, METH_NOARGS, "End it; what is missing reads as zeroes. Idempotent."},
    {0},
};

PyTypeObject native_pager_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "vmm._native.Pager",
    .tp_doc = "Pager([(memory, bitmap of missing pages), ...], kernel): missing pages of memory are emptied, and come from a "
              "connection as they are touched. `kernel`: touched also by the kernel itself. OSError.",
    .tp_basicsize = sizeof(PagerObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = (newfunc)(void (*)(void))pager_new_object,
    .tp_dealloc = (destructor)pager_dealloc,
    .tp_methods = methods,
};

PyObject *native_can_page(PyObject *Py_UNUSED(module), PyObject *args)
{
    int kernel;
    if (!PyArg_ParseTuple(args, "p:can_page", &kernel))
        return NULL;
    int fd = pager_open(kernel);
    if (fd >= 0)
        close(fd);
    return PyBool_FromLong(fd >= 0);
}

/* serve_pages(fd, wake, [(memory, bitmap), ...], counts) -> how it ended */
PyObject *native_serve_pages(PyObject *Py_UNUSED(module), PyObject *args)
{
    static const char *ends[] = {"done", "stopped", "lost", "damaged", "no memory"};
    int fd, wake;
    PyObject *regions;
    Py_buffer counts;
    uint32_t count;
    if (!PyArg_ParseTuple(args, "iiOw*:serve_pages", &fd, &wake, &regions, &counts))
        return NULL;
    Py_buffer *buffers = NULL;
    if ((size_t)counts.len < sizeof(struct serve_counts) || (uintptr_t)counts.buf % 8)
        PyErr_SetString(PyExc_ValueError, "the counts have eight numbers of 64 bits");
    else
        buffers = take_regions(regions, &count, false);
    if (!buffers) {
        PyBuffer_Release(&counts);
        return NULL;
    }
    struct serve_region at[64];
    for (uint32_t i = 0; i < count; i++)
        at[i] = (struct serve_region){buffers[2 * i].buf, (uint64_t)buffers[2 * i].len / PAGE, buffers[2 * i + 1].buf};
    enum serve_end how;
    Py_BEGIN_ALLOW_THREADS
    how = serve_pages(fd, wake, at, count, counts.buf);
    Py_END_ALLOW_THREADS
    release(buffers, count);
    PyBuffer_Release(&counts);
    return PyUnicode_FromString(ends[how]);
}
