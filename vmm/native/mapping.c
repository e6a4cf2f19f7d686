/* vmm._native.Mapping: one piece of host memory at one address, whose parts are anonymous or of files.
 *
 * The address never changes while what lies behind it does, so that who has it (a memory slot, a TLB) need not know.
 */
#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD
    uint8_t *memory;
    size_t size;
    Py_ssize_t exports;
    uint32_t busy; /* calls under way without the interpreter's lock */
} MappingObject;

enum { PROT = PROT_READ | PROT_WRITE };

static PyObject *mapping_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"size", "alignment", NULL};
    unsigned long long size, alignment = LARGE;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K|K:Mapping", names, &size, &alignment))
        return NULL;
    if (!size || size % PAGE || alignment < PAGE || alignment & (alignment - 1) || size > SIZE_MAX - alignment) {
        PyErr_SetString(PyExc_ValueError, "a mapping is whole pages, and its alignment a power of two");
        return NULL;
    }
    MappingObject *self = (MappingObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    /* More than is wanted, of which the ends are given back: large pages need large alignment. */
    size_t room = size + alignment - PAGE;
    uint8_t *memory = mmap(NULL, room, PROT, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    size_t before = (size_t)(-(uintptr_t)memory & (alignment - 1)), after = room - before - size;
    if (before)
        munmap(memory, before);
    if (after)
        munmap(memory + before + size, after);
    self->memory = memory + before;
    self->size = size;
    madvise(self->memory, size, MADV_HUGEPAGE); /* a kernel without them: slower, nothing more */
    madvise(self->memory, size, MADV_DONTDUMP);
    return (PyObject *)self;
}

static void unmap(MappingObject *self)
{
    if (self->memory)
        munmap(self->memory, self->size);
    self->memory = NULL;
}

static void mapping_dealloc(MappingObject *self)
{
    unmap(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int mapping_getbuffer(MappingObject *self, Py_buffer *view, int flags)
{
    if (!self->memory) {
        PyErr_SetString(PyExc_BufferError, "the mapping is closed");
        view->obj = NULL;
        return -1;
    }
    if (PyBuffer_FillInfo(view, (PyObject *)self, self->memory, (Py_ssize_t)self->size, 0, flags))
        return -1;
    self->exports++;
    return 0;
}

static void mapping_releasebuffer(MappingObject *self, Py_buffer *Py_UNUSED(view)) { self->exports--; }

static PyObject *mapping_close(MappingObject *self, PyObject *Py_UNUSED(ignored))
{
    if (self->exports || self->busy) {
        PyErr_SetString(PyExc_BufferError, "the mapping is in use");
        return NULL;
    }
    unmap(self);
    Py_RETURN_NONE;
}

/* [offset, +length) is whole pages inside the mapping. */
static bool inside(const MappingObject *self, unsigned long long offset, unsigned long long length)
{
    if (!self->memory)
        PyErr_SetString(PyExc_ValueError, "the mapping is closed");
    else if (offset % PAGE || length % PAGE || !length || offset > self->size || length > self->size - offset)
        PyErr_SetString(PyExc_ValueError, "not whole pages of the mapping");
    else
        return true;
    return false;
}

static PyObject *none_or_errno(bool ok, int error)
{
    if (ok)
        Py_RETURN_NONE;
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *map_at(MappingObject *self, unsigned long long offset, unsigned long long length, int flags, int fd,
                        unsigned long long file_offset)
{
    int error = 0;
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    void *got = mmap(self->memory + offset, length, PROT, flags | MAP_FIXED, fd, (off_t)file_offset);
    error = got == MAP_FAILED ? errno : 0;
    if (!error)
        madvise(self->memory + offset, length, MADV_DONTDUMP);
    if (!error && (fd < 0 || flags & MAP_SHARED))
        madvise(self->memory + offset, length, MADV_HUGEPAGE);
    Py_END_ALLOW_THREADS
    self->busy--;
    return none_or_errno(!error, error);
}

static PyObject *mapping_map_file(MappingObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"offset", "length", "fd", "file_offset", "shared", "populate", NULL};
    unsigned long long offset, length, file_offset;
    int fd, shared = 0, populate = 0;
    struct stat status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKiK|$pp:map_file", names, &offset, &length, &fd, &file_offset, &shared,
                                     &populate) || !inside(self, offset, length))
        return NULL;
    if (fstat(fd, &status))
        return PyErr_SetFromErrno(PyExc_OSError);
    /* What the file does not have would kill the process at the first touch. Its last page may be short. */
    uint64_t whole = ((uint64_t)status.st_size + PAGE - 1) / PAGE * PAGE;
    if (file_offset % PAGE || file_offset > whole || length > whole - file_offset)
        return PyErr_Format(PyExc_ValueError, "not whole pages of the file, which has %lld bytes", (long long)status.st_size);
    return map_at(self, offset, length, (shared ? MAP_SHARED : MAP_PRIVATE | MAP_NORESERVE) | (populate ? MAP_POPULATE : 0), fd,
                  file_offset);
}

static PyObject *mapping_map_anonymous(MappingObject *self, PyObject *args)
{
    unsigned long long offset, length;
    if (!PyArg_ParseTuple(args, "KK:map_anonymous", &offset, &length) || !inside(self, offset, length))
        return NULL;
    return map_at(self, offset, length, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static PyObject *mapping_advise(MappingObject *self, PyObject *args)
{
    unsigned long long offset, length;
    int advice, error = 0;
    if (!PyArg_ParseTuple(args, "KKi:advise", &offset, &length, &advice) || !inside(self, offset, length))
        return NULL;
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    error = madvise(self->memory + offset, length, advice) ? errno : 0;
    Py_END_ALLOW_THREADS
    self->busy--;
    return none_or_errno(!error, error);
}

static PyObject *mapping_advise_ranges(MappingObject *self, PyObject *args)
{
    Py_buffer ranges;
    int advice;
    if (!PyArg_ParseTuple(args, "y*i:advise_ranges", &ranges, &advice))
        return NULL;
    const uint64_t *pairs = ranges.buf;
    size_t count = (size_t)ranges.len / sizeof *pairs / 2;
    for (size_t i = 0; i < count; i++) {
        if (!inside(self, pairs[2 * i], pairs[2 * i + 1])) {
            PyBuffer_Release(&ranges);
            return NULL;
        }
    }
    unsigned long long taken = 0;
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < count; i++)
        taken += madvise(self->memory + pairs[2 * i], pairs[2 * i + 1], advice) ? 0 : pairs[2 * i + 1];
    Py_END_ALLOW_THREADS
    self->busy--;
    PyBuffer_Release(&ranges);
    return PyLong_FromUnsignedLongLong(taken);
}

/* Linux: Documentation/admin-guide/mm/pagemap.rst. */
#define PRESENT (1ull << 63)
#define SWAPPED (1ull << 62)
#define OF_FILE (1ull << 61) /* a page of a file, or shared anonymous */

static PyObject *mapping_present_pages(MappingObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"private", NULL};
    int private = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$p:present_pages", names, &private))
        return NULL;
    if (!self->memory) {
        PyErr_SetString(PyExc_ValueError, "the mapping is closed");
        return NULL;
    }
    uint64_t pages = self->size / PAGE;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(native_words(pages) * sizeof(uint64_t)));
    uint64_t *bits = PyMem_Calloc(native_words(pages) + 1, sizeof *bits);
    int error = result && bits ? 0 : ENOMEM;
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    int fd = error ? -1 : open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (!error && fd < 0)
        error = errno;
    uint64_t first = (uintptr_t)self->memory / PAGE, entries[4096];
    for (uint64_t at = 0; !error && at < pages;) {
        size_t want = pages - at < sizeof entries / sizeof *entries ? (size_t)(pages - at) : sizeof entries / sizeof *entries;
        ssize_t got = pread(fd, entries, want * sizeof *entries, (off_t)((first + at) * sizeof *entries));
        if (got < (ssize_t)sizeof *entries) {
            error = got < 0 ? errno : EIO;
            break;
        }
        for (size_t i = 0; i < (size_t)got / sizeof *entries; i++, at++)
            if ((entries[i] & (PRESENT | SWAPPED)) && !(private && entries[i] & OF_FILE))
                native_set_bit(bits, at);
    }
    if (fd >= 0)
        close(fd);
    Py_END_ALLOW_THREADS
    self->busy--;
    if (!error)
        memcpy(PyBytes_AS_STRING(result), bits, (size_t)PyBytes_GET_SIZE(result));
    PyMem_Free(bits);
    if (error) {
        Py_XDECREF(result);
        return none_or_errno(false, error);
    }
    return result;
}

static Py_ssize_t mapping_length(MappingObject *self) { return (Py_ssize_t)self->size; }

static PyObject *mapping_address(MappingObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong((uintptr_t)self->memory);
}

static PyMethodDef methods[] = {
    {"map_file", (PyCFunction)(void (*)(void))mapping_map_file, METH_VARARGS | METH_KEYWORDS,
     "map_file(offset, length, fd, file_offset, *, shared=False, populate=False): part of it is the file's from now on; "
     "private: copied when written."},
    {"map_anonymous", (PyCFunction)mapping_map_anonymous, METH_VARARGS, "map_anonymous(offset, length): zeros from now on."},
    {"advise", (PyCFunction)mapping_advise, METH_VARARGS, "advise(offset, length, advice): madvise(2)."},
    {"advise_ranges", (PyCFunction)mapping_advise_ranges, METH_VARARGS,
     "advise_ranges(ranges, advice) -> bytes that it was done for: the same for many, pairs of 64 bits (offset, length)."},
    {"present_pages", (PyCFunction)(void (*)(void))mapping_present_pages, METH_VARARGS | METH_KEYWORDS,
     "present_pages(*, private=False) -> a bitmap: pages that this process has in memory or swapped out; private: only "
     "those that are its own, not a file's."},
    {"close", (PyCFunction)mapping_close, METH_NOARGS, "Unmap. BufferError while it is viewed."},
    {0},
};

static PyGetSetDef getters[] = {
    {"address", (getter)mapping_address, NULL, "Where it stands in this process; 0 when closed.", NULL},
    {0},
};

static PyBufferProcs buffer_procs = {(getbufferproc)mapping_getbuffer, (releasebufferproc)mapping_releasebuffer};
static PySequenceMethods sequence_methods = {.sq_length = (lenfunc)mapping_length};

PyTypeObject native_mapping_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "vmm._native.Mapping",
    .tp_doc = "Mapping(size, alignment=2 MiB): zeros, writable, private; large pages are asked for.",
    .tp_basicsize = sizeof(MappingObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = mapping_new,
    .tp_dealloc = (destructor)mapping_dealloc,
    .tp_methods = methods,
    .tp_getset = getters,
    .tp_as_buffer = &buffer_procs,
    .tp_as_sequence = &sequence_methods,
};
