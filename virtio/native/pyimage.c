/* virtio._ring.Image: a struct image for Python. Descriptors belong to who opened them and outlive the image. */
#include "module.h"

#include <errno.h>

enum { SECTOR = 512 };

static bool image_open(ImageObject *self)
{
    if (self->closed)
        PyErr_SetString(state_error, "the image is closed");
    return !self->closed;
}

bool image_holds(ImageObject *self, uint64_t length)
{
    if (!image_open(self))
        return false;
    if (!self->dirty.obj || (uint64_t)self->dirty.len * 8 * SECTOR >= length)
        return true;
    PyErr_SetString(PyExc_ValueError, "dirty has fewer bits than there are sectors");
    return false;
}

static ImageObject *image_new(PyTypeObject *type, PyObject *backing)
{
    ImageObject *self = (ImageObject *)type->tp_alloc(type, 0);
    if (self)
        self->backing = Py_XNewRef(backing);
    return self;
}

/* `self` with what a format's open function made; NULL with an exception if that is NULL. */
static PyObject *finished(ImageObject *self, struct image *image)
{
    self->image = image;
    if (image)
        return (PyObject *)self;
    Py_DECREF(self);
    return PyErr_NoMemory();
}

static PyObject *image_raw(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "length", "align", "read_only", NULL};
    int fd, read_only = 0;
    unsigned long long length;
    unsigned align = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iK|Ip", names, &fd, &length, &align, &read_only))
        return NULL;
    ImageObject *self = image_new(type, NULL);
    return self ? finished(self, raw_open(fd, length, align, read_only)) : NULL;
}

static PyObject *image_overlay(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "dirty", "backing", NULL};
    int fd;
    PyObject *dirty;
    ImageObject *backing;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOO!", names, &fd, &dirty, type, &backing) || !image_open(backing))
        return NULL;
    ImageObject *self = image_new(type, (PyObject *)backing);
    if (!self || PyObject_GetBuffer(dirty, &self->dirty, PyBUF_WRITABLE)) {
        Py_XDECREF(self);
        return NULL;
    }
    if (!image_holds(self, backing->image->length)) {
        Py_DECREF(self);
        return NULL;
    }
    return finished(self, overlay_open(fd, self->dirty.buf, backing->image));
}

static void image_dealloc(ImageObject *self)
{
    if (self->image) {
        Py_BEGIN_ALLOW_THREADS
        self->image->ops->close(self->image);
        Py_END_ALLOW_THREADS
    }
    if (self->dirty.obj)
        PyBuffer_Release(&self->dirty);
    Py_XDECREF(self->backing);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static bool in_range(ImageObject *self, uint64_t offset, uint64_t length)
{
    if (!image_open(self))
        return false;
    if (offset <= self->image->length && length <= self->image->length - offset)
        return true;
    PyErr_SetString(PyExc_ValueError, "beyond the end of the image");
    return false;
}

static PyObject *result_of(int error)
{
    if (!error)
        Py_RETURN_NONE;
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *image_py_read(ImageObject *self, PyObject *args)
{
    unsigned long long offset;
    Py_buffer into;
    if (!PyArg_ParseTuple(args, "Kw*", &offset, &into))
        return NULL;
    PyObject *result = NULL;
    if (in_range(self, offset, (uint64_t)into.len)) {
        struct iovec iov = {into.buf, (size_t)into.len};
        int error;
        Py_BEGIN_ALLOW_THREADS
        error = image_read(self->image, &iov, 1, offset, (uint64_t)into.len, NULL);
        Py_END_ALLOW_THREADS
        result = result_of(error);
    }
    PyBuffer_Release(&into);
    return result;
}

static PyObject *image_py_write(ImageObject *self, PyObject *args)
{
    unsigned long long offset;
    Py_buffer data;
    int durable = 0;
    if (!PyArg_ParseTuple(args, "Ky*|p", &offset, &data, &durable))
        return NULL;
    PyObject *result = NULL;
    if (in_range(self, offset, (uint64_t)data.len)) {
        struct iovec iov = {data.buf, (size_t)data.len};
        int error;
        Py_BEGIN_ALLOW_THREADS
        error = self->image->read_only ? EROFS : image_write(self->image, &iov, 1, offset, (uint64_t)data.len, durable, NULL);
        Py_END_ALLOW_THREADS
        result = result_of(error);
    }
    PyBuffer_Release(&data);
    return result;
}

static PyObject *image_py_zero(ImageObject *self, PyObject *args)
{
    unsigned long long offset, length;
    int unmap = 0, error;
    if (!PyArg_ParseTuple(args, "KK|p", &offset, &length, &unmap) || !in_range(self, offset, length))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = self->image->read_only ? EROFS : length ? self->image->ops->zero(self->image, offset, length, unmap, NULL) : 0;
    Py_END_ALLOW_THREADS
    return result_of(error);
}

static PyObject *image_py_discard(ImageObject *self, PyObject *args)
{
    unsigned long long offset, length;
    int error;
    if (!PyArg_ParseTuple(args, "KK", &offset, &length) || !in_range(self, offset, length))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = self->image->read_only ? EROFS : length ? self->image->ops->discard(self->image, offset, length) : 0;
    Py_END_ALLOW_THREADS
    return result_of(error);
}

static PyObject *image_py_flush(ImageObject *self, PyObject *Py_UNUSED(unused))
{
    int error;
    if (!image_open(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = self->image->ops->flush(self->image);
    Py_END_ALLOW_THREADS
    return result_of(error);
}

static PyObject *image_length(ImageObject *self, void *Py_UNUSED(unused))
{
    return image_open(self) ? PyLong_FromUnsignedLongLong(self->image->length) : NULL;
}

static PyMethodDef image_methods[] = {
    {"raw", (PyCFunction)(void (*)(void))image_raw, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     "raw(fd, length, align=0, read_only=False): a file whose bytes are the disk's; align: of memory, in bytes, for O_DIRECT."},
    {"overlay", (PyCFunction)(void (*)(void))image_overlay, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     "overlay(fd, dirty, backing): `backing` is only read, writes go to `fd`; `dirty` has one bit per sector that is there."},
    {"read", (PyCFunction)image_py_read, METH_VARARGS, "read(offset, buffer): fill the buffer. OSError."},
    {"write", (PyCFunction)image_py_write, METH_VARARGS, "write(offset, data, durable=False). OSError."},
    {"zero", (PyCFunction)image_py_zero, METH_VARARGS, "zero(offset, length, unmap=False). OSError."},
    {"discard", (PyCFunction)image_py_discard, METH_VARARGS, "discard(offset, length). OSError."},
    {"flush", (PyCFunction)image_py_flush, METH_NOARGS, "Make what was written durable. OSError."},
    {0},
};

static PyGetSetDef image_getset[] = {
    {"length", (getter)image_length, NULL, "bytes", NULL},
    {0},
};

PyTypeObject image_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.Image",
    .tp_doc = "What the bytes of a disk stand in; made by Image.raw() and the like. Any thread; calls may block, without the "
              "interpreter's lock.",
    .tp_basicsize = sizeof(ImageObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_dealloc = (destructor)image_dealloc,
    .tp_methods = image_methods,
    .tp_getset = image_getset,
};
