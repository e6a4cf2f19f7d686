/* virtio._ring.Memory: guest memory as regions of buffers, and who is told that a device wrote there. */
#include "module.h"

static int memory_clear(MemoryObject *self)
{
    for (size_t i = 0; i < self->memory.count; i++) {
        Py_CLEAR(self->objects[i]);
        PyBuffer_Release(&self->buffers[i]);
        if (self->missing[i].obj)
            PyBuffer_Release(&self->missing[i]);
    }
    self->memory.count = 0;
    self->memory.incomplete = false;
    PyMem_Free(self->memory.regions);
    PyMem_Free(self->buffers);
    PyMem_Free(self->objects);
    PyMem_Free(self->missing);
    self->memory.regions = NULL;
    self->missing = NULL;
    self->buffers = NULL;
    self->objects = NULL;
    Py_CLEAR(self->written);
    Py_CLEAR(self->written_ranges);
    Py_CLEAR(self->want);
    return 0;
}

static void memory_dealloc(MemoryObject *self)
{
    memory_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static void want_pages(void *context, uint64_t gpa, uint64_t length)
{
    MemoryObject *self = context;
    PyObject *result = PyObject_CallFunction(self->want, "KK", (unsigned long long)gpa, (unsigned long long)length);
    if (!result)
        PyErr_WriteUnraisable(self->want);
    Py_XDECREF(result);
}

/* The bitmaps of pages that are missing, one a region. 0, or -1 with an exception. */
static int take_missing(MemoryObject *self, PyObject *bitmaps, PyObject *want)
{
    PyObject *list = PySequence_Fast(bitmaps, "missing must be a sequence of bitmaps");
    if (!list)
        return -1;
    bool ok = PySequence_Fast_GET_SIZE(list) == (Py_ssize_t)self->memory.count;
    for (size_t i = 0; ok && i < self->memory.count; i++) {
        struct region *region = &self->memory.regions[i];
        ok = !PyObject_GetBuffer(PySequence_Fast_GET_ITEM(list, (Py_ssize_t)i), &self->missing[i], PyBUF_SIMPLE) &&
             (uint64_t)self->missing[i].len >= (region->size / 4096 + 63) / 64 * 8 &&
             !((uintptr_t)self->missing[i].buf % 8);
        if (ok)
            region->missing = self->missing[i].buf;
    }
    Py_DECREF(list);
    if (!ok) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "the bitmaps do not fit the regions");
        return -1;
    }
    self->memory.incomplete = true;
    self->memory.want = want_pages;
    self->memory.context = self;
    self->want = Py_NewRef(want);
    return 0;
}

static int memory_init(MemoryObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"regions", "written", "written_ranges", "missing", "want", NULL};
    PyObject *regions, *written = Py_None, *written_ranges = Py_None, *missing = Py_None, *want = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOOO", names, &regions, &written, &written_ranges, &missing, &want))
        return -1;
    PyObject *list = PySequence_Fast(regions, "regions must be a sequence of (gpa, buffer)");
    if (!list)
        return -1;
    memory_clear(self);
    Py_ssize_t count = PySequence_Fast_GET_SIZE(list);
    self->memory.regions = PyMem_Calloc((size_t)count + 1, sizeof *self->memory.regions);
    self->buffers = PyMem_Calloc((size_t)count + 1, sizeof *self->buffers);
    self->objects = PyMem_Calloc((size_t)count + 1, sizeof *self->objects);
    self->missing = PyMem_Calloc((size_t)count + 1, sizeof *self->missing);
    if (!self->memory.regions || !self->buffers || !self->objects || !self->missing) {
        Py_DECREF(list);
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        unsigned long long gpa;
        PyObject *buffer;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(list, i), "KO", &gpa, &buffer))
            goto failed;
        if (PyObject_GetBuffer(buffer, &self->buffers[i], PyBUF_WRITABLE))
            goto failed;
        PyObject *view = PyMemoryView_FromObject(buffer);
        self->objects[i] = view ? PyObject_CallMethod(view, "cast", "s", "B") : NULL;
        Py_XDECREF(view);
        if (!self->objects[i]) {
            PyBuffer_Release(&self->buffers[i]);
            goto failed;
        }
        self->memory.regions[i] = (struct region){gpa, (uint64_t)self->buffers[i].len, self->buffers[i].buf, NULL};
        self->memory.count++;
    }
    Py_DECREF(list);
    if (written != Py_None)
        self->written = Py_NewRef(written);
    if (written_ranges != Py_None)
        self->written_ranges = Py_NewRef(written_ranges);
    if (missing != Py_None)
        return take_missing(self, missing, want);
    return 0;
failed:
    Py_DECREF(list);
    return -1;
}

int memory_notify(MemoryObject *memory, uint64_t gpa, uint64_t length)
{
    if (!memory->written || !length)
        return 0;
    PyObject *result = PyObject_CallFunction(memory->written, "KK", (unsigned long long)gpa, (unsigned long long)length);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* All of them in one call: (gpa, length) pairs of 64 bits. */
static int ranges_notify(MemoryObject *memory, const struct segment *segments, uint32_t count, uint64_t length)
{
    uint64_t before = 0;
    for (uint32_t i = 0; i < count; before += segments[i++].len)
        if (before >= length)
            count = i;
    PyObject *ranges = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof(uint64_t[2])));
    if (!ranges)
        return -1;
    uint64_t (*pairs)[2] = (uint64_t (*)[2])PyBytes_AS_STRING(ranges);
    for (uint32_t i = 0; i < count; i++) {
        pairs[i][0] = segments[i].gpa;
        pairs[i][1] = length < segments[i].len ? length : segments[i].len;
        length -= pairs[i][1];
    }
    PyObject *result = PyObject_CallOneArg(memory->written_ranges, ranges);
    Py_DECREF(ranges);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

int segments_notify(MemoryObject *memory, const struct segment *segments, uint32_t count, uint64_t length)
{
    if (!memory->written)
        return 0;
    if (memory->written_ranges && count > 1)
        return ranges_notify(memory, segments, count, length);
    for (uint32_t i = 0; i < count && length; i++) {
        uint64_t part = length < segments[i].len ? length : segments[i].len;
        if (memory_notify(memory, segments[i].gpa, part))
            return -1;
        length -= part;
    }
    return 0;
}

PyObject *region_slice(MemoryObject *self, const uint8_t *host, uint64_t size)
{
    for (size_t i = 0; i < self->memory.count; i++) {
        const struct region *region = &self->memory.regions[i];
        if (host < region->host || host >= region->host + region->size)
            continue;
        Py_ssize_t start = host - region->host;
        PyObject *from = PyLong_FromSsize_t(start), *to = PyLong_FromSsize_t(start + (Py_ssize_t)size);
        PyObject *slice = from && to ? PySlice_New(from, to, NULL) : NULL;
        PyObject *result = slice ? PyObject_GetItem(self->objects[i], slice) : NULL;
        Py_XDECREF(slice);
        Py_XDECREF(from);
        Py_XDECREF(to);
        return result;
    }
    PyErr_SetString(guest_error, "address is outside guest memory");
    return NULL;
}

static PyObject *memory_view(MemoryObject *self, PyObject *args)
{
    unsigned long long gpa, length;
    if (!PyArg_ParseTuple(args, "KK", &gpa, &length))
        return NULL;
    uint8_t *host = memory_at(&self->memory, gpa, length);
    if (!host)
        return PyErr_Format(guest_error, "[0x%llx, +0x%llx) is outside guest memory", gpa, length);
    return region_slice(self, host, length);
}

static PyObject *memory_written(MemoryObject *self, PyObject *args)
{
    unsigned long long gpa, length;
    if (!PyArg_ParseTuple(args, "KK", &gpa, &length))
        return NULL;
    if (memory_notify(self, gpa, length))
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef memory_methods[] = {
    {"view", (PyCFunction)memory_view, METH_VARARGS, "view(gpa, length) -> memoryview; GuestError outside memory."},
    {"written", (PyCFunction)memory_written, METH_VARARGS, "written(gpa, length): the device wrote there."},
    {0},
};

PyTypeObject memory_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.Memory",
    .tp_doc = "Memory(regions, written=None, written_ranges=None, missing=None, want=None): guest memory as [(gpa, writable "
              "buffer), ...], exported while this lives. `missing`: a bitmap for each, of pages that are still to come, and "
              "want(gpa, length) has them fetched.",
    .tp_basicsize = sizeof(MemoryObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)memory_init,
    .tp_dealloc = (destructor)memory_dealloc,
    .tp_methods = memory_methods,
};
