/* virtio._ring.Chain: a descriptor chain that the driver made available, checked and copied once (virtio 1.2, 2.7.5, 2.8.6). */
#include "module.h"

#include <string.h>

static void chain_dealloc(ChainObject *self)
{
    PyMem_Free(self->chain.segments);
    Py_XDECREF(self->ring);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

bool chain_usable(ChainObject *self)
{
    if (!self->ring->closed && !self->returned)
        return true;
    PyErr_SetString(state_error, self->returned ? "the chain was returned to the driver" : "the queue was reset");
    return false;
}

static PyObject *chain_read(ChainObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count > 2) {
        PyErr_SetString(PyExc_TypeError, "read(length=-1, offset=0)");
        return NULL;
    }
    long long length = count > 0 ? PyLong_AsLongLong(args[0]) : -1;
    long long offset = count > 1 ? PyLong_AsLongLong(args[1]) : 0;
    if (PyErr_Occurred() || !chain_usable(self))
        return NULL;
    uint64_t total = self->chain.readable_length;
    uint64_t skip = offset < 0 ? 0 : (uint64_t)offset;
    uint64_t left = skip > total ? 0 : total - skip;
    if (length >= 0 && (uint64_t)length < left)
        left = (uint64_t)length;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)left);
    if (!result)
        return NULL;
    char *to = PyBytes_AS_STRING(result);
    segments_copy(self->chain.segments, self->chain.readable, skip, to, left, true);
    return result;
}

static PyObject *chain_write(ChainObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count < 1 || count > 2) {
        PyErr_SetString(PyExc_TypeError, "write(data, offset=None)");
        return NULL;
    }
    uint64_t skip = self->written;
    if (count > 1 && args[1] != Py_None) {
        skip = PyLong_AsUnsignedLongLong(args[1]);
        if (PyErr_Occurred())
            return NULL;
    }
    Py_buffer data;
    if (!chain_usable(self) || PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE))
        return NULL;
    uint64_t done = segments_copy(self->chain.segments + self->chain.readable, self->chain.writable, skip, data.buf,
                                  (uint64_t)data.len, false);
    PyBuffer_Release(&data);
    if (done && skip + done > self->written)
        self->written = skip + done;
    return PyLong_FromUnsignedLongLong(done);
}

static PyObject *chain_views(ChainObject *self, uint32_t first, uint32_t count)
{
    if (!chain_usable(self))
        return NULL;
    PyObject *list = PyList_New(count);
    for (uint32_t i = 0; list && i < count; i++) {
        struct segment *segment = &self->chain.segments[first + i];
        PyObject *view = region_slice(self->ring->memory, segment->host, segment->len);
        if (!view)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, view);
    }
    return list;
}

static PyObject *chain_readable(ChainObject *self, PyObject *Py_UNUSED(unused))
{
    return chain_views(self, 0, self->chain.readable);
}

static PyObject *chain_writable(ChainObject *self, PyObject *Py_UNUSED(unused))
{
    self->exposed = true;
    return chain_views(self, self->chain.readable, self->chain.writable);
}

static PyObject *chain_segments(ChainObject *self, void *Py_UNUSED(unused))
{
    uint32_t count = self->chain.readable + self->chain.writable;
    PyObject *tuple = PyTuple_New(count);
    for (uint32_t i = 0; tuple && i < count; i++) {
        PyObject *item = Py_BuildValue("(KIO)", (unsigned long long)self->chain.segments[i].gpa,
                                       (unsigned)self->chain.segments[i].len,
                                       i >= self->chain.readable ? Py_True : Py_False);
        if (!item)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

static PyObject *chain_number(ChainObject *self, void *which)
{
    switch ((intptr_t)which) {
    case 0: return PyLong_FromLong(self->chain.id);
    case 1: return PyLong_FromLong(self->chain.slots);
    case 2: return PyLong_FromUnsignedLongLong(self->chain.readable_length);
    case 3: return PyLong_FromUnsignedLongLong(self->chain.writable_length);
    default: return PyLong_FromUnsignedLongLong(self->written);
    }
}

static PyMethodDef chain_methods[] = {
    {"read", (PyCFunction)(void (*)(void))chain_read, METH_FASTCALL,
     "read(length=-1, offset=0) -> bytes of the device-readable part, as many as there are."},
    {"write", (PyCFunction)(void (*)(void))chain_write, METH_FASTCALL,
     "write(data, offset=None) -> bytes stored into the device-writable part, by default after the last ones."},
    {"readable", (PyCFunction)chain_readable, METH_NOARGS, "The device-readable segments as memoryviews."},
    {"writable", (PyCFunction)chain_writable, METH_NOARGS, "The device-writable segments as memoryviews."},
    {0},
};

static PyGetSetDef chain_getset[] = {
    {"id", (getter)chain_number, NULL, "head index (split) or buffer id (packed)", (void *)0},
    {"slots", (getter)chain_number, NULL, "ring slots it takes", (void *)1},
    {"readable_length", (getter)chain_number, NULL, "bytes", (void *)2},
    {"writable_length", (getter)chain_number, NULL, "bytes", (void *)3},
    {"written", (getter)chain_number, NULL, "bytes written so far", (void *)4},
    {"segments", (getter)chain_segments, NULL, "((gpa, length, writable), ...)", NULL},
    {0},
};

PyTypeObject chain_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.Chain",
    .tp_doc = "A descriptor chain that the driver made available: checked, copied once.",
    .tp_basicsize = sizeof(ChainObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)chain_dealloc,
    .tp_methods = chain_methods,
    .tp_getset = chain_getset,
};
