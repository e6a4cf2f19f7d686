/* virtio._ring.Image: a struct image for Python. Descriptors belong to who opened them and outlive the image. */
#include "module.h" /* first: it includes Python.h */

#include <errno.h>

#include "qcow2_move.h"
#include "qcow2_open.h"
#include "qcow2_pack.h"

enum { SECTOR = 512, EXTENTS_MAX = 4096 };

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
    static char *names[] = {"fd", "length", "align", "read_only", "guarded", NULL};
    int fd, read_only = 0, guarded = 0;
    unsigned long long length;
    unsigned align = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iK|Ip$p", names, &fd, &length, &align, &read_only, &guarded))
        return NULL;
    ImageObject *self = image_new(type, NULL);
    return self ? finished(self, raw_open(fd, length, align, read_only, guarded)) : NULL;
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

static bool get_ranges(PyObject *list, struct drop *ranges, unsigned *count)
{
    PyObject *items = list ? PySequence_Fast(list, "ranges are pairs") : NULL;
    bool good = !list || (items && PySequence_Fast_GET_SIZE(items) < RANGES_MAX - 4);
    for (Py_ssize_t i = 0; items && good && i < PySequence_Fast_GET_SIZE(items); i++) {
        unsigned long long first, clusters;
        good = PyArg_ParseTuple(PySequence_Fast_GET_ITEM(items, i), "KK", &first, &clusters);
        if (good)
            ranges[(*count)++] = (struct drop){first, clusters};
    }
    Py_XDECREF(items);
    if (!good && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "too many ranges");
    return good;
}

static PyObject *image_qcow2(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "data_fd", "version", "cluster_bits", "refcount_order", "length", "l1_offset", "l1_entries",
                            "reftable_offset", "reftable_clusters", "read_only", "extended", "external", "external_raw",
                            "compression", "align", "backing", "ranges", "cache_bytes", NULL};
    struct qcow2_options options = {.cache_bytes = 32 << 20};
    unsigned long long length, l1_offset, l1_entries, reftable_offset, reftable_clusters, cache_bytes = 32 << 20;
    int read_only = 0, extended = 0, external = 0, external_raw = 0;
    PyObject *backing = Py_None, *ranges = NULL;
    struct drop list[RANGES_MAX];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiiIIKKKKK|$ppppiIOOK", names, &options.fd, &options.data_fd,
                                     &options.version, &options.cluster_bits, &options.refcount_order, &length, &l1_offset,
                                     &l1_entries, &reftable_offset, &reftable_clusters, &read_only, &extended, &external,
                                     &external_raw, &options.compression, &options.align, &backing, &ranges, &cache_bytes) ||
        !get_ranges(ranges, list, &options.range_count))
        return NULL;
    if (backing != Py_None && (!PyObject_TypeCheck(backing, &image_type) || !image_open((ImageObject *)backing))) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "backing is an Image or None");
        return NULL;
    }
    options.ranges = list;
    options.length = length;
    options.l1_offset = l1_offset;
    options.l1_entries = l1_entries;
    options.reftable_offset = reftable_offset;
    options.reftable_clusters = reftable_clusters;
    options.read_only = read_only;
    options.extended = extended;
    options.external = external;
    options.external_raw = external_raw;
    options.cache_bytes = cache_bytes;
    options.backing = backing == Py_None ? NULL : ((ImageObject *)backing)->image;
    ImageObject *self = image_new(type, backing == Py_None ? NULL : backing);
    if (!self)
        return NULL;
    int error;
    const char *problem;
    Py_BEGIN_ALLOW_THREADS
    self->image = qcow2_open(&options, &error, &problem);
    Py_END_ALLOW_THREADS
    if (self->image)
        return (PyObject *)self;
    Py_DECREF(self);
    if (problem)
        return PyErr_Format(PyExc_ValueError, "%s", problem);
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *image_py_close(ImageObject *self, PyObject *Py_UNUSED(unused))
{
    if (!self->closed && self->image->ops->flush) {
        int error;
        self->closed = true;
        Py_BEGIN_ALLOW_THREADS
        /* Once more for what the first time gave back. */
        error = self->image->read_only ? 0 : self->image->ops->flush(self->image);
        if (!error && self->image->flat < 0 && !self->image->read_only)
            error = self->image->ops->flush(self->image);
        Py_END_ALLOW_THREADS
        self->image->read_only = true; /* its descriptors may become other files' */
        if (error) {
            errno = error;
            return PyErr_SetFromErrno(PyExc_OSError);
        }
    }
    Py_RETURN_NONE;
}

static PyObject *unpacker;

/* Decompress by Python; called by threads that do not hold the interpreter's lock. */
static int unpack_by_python(int type, const void *data, size_t length, void *to, size_t size)
{
    int error = EIO;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *made = PyObject_CallFunction(unpacker, "iy#n", type, (const char *)data, (Py_ssize_t)length, (Py_ssize_t)size);
    if (made && PyBytes_Check(made) && (size_t)PyBytes_GET_SIZE(made) == size) {
        memcpy(to, PyBytes_AS_STRING(made), size);
        error = 0;
    }
    Py_XDECREF(made);
    PyErr_Clear();
    PyGILState_Release(state);
    return error;
}

static PyObject *image_set_unpacker(PyObject *Py_UNUSED(type), PyObject *callable)
{
    Py_XSETREF(unpacker, Py_NewRef(callable));
    image_unpack_elsewhere = unpack_by_python;
    Py_RETURN_NONE;
}

static void image_dealloc(ImageObject *self)
{
    if (self->image) {
        self->image->read_only = true; /* what was not flushed is lost: its descriptors may be other files' */
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
    uint64_t whole = (self->image->length + 511) & ~511ull; /* the last sector may be only partly there */
    if (offset <= whole && length <= whole - offset)
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

static PyObject *image_py_map(ImageObject *self, PyObject *args)
{
    unsigned long long offset, length;
    unsigned limit = EXTENTS_MAX;
    if (!PyArg_ParseTuple(args, "KK|I", &offset, &length, &limit) || !in_range(self, offset, length))
        return NULL;
    if (limit > EXTENTS_MAX)
        limit = EXTENTS_MAX;
    struct extent *extents = PyMem_Calloc(limit + 1, sizeof *extents);
    if (!extents)
        return PyErr_NoMemory();
    int error = 0;
    unsigned count = 0;
    struct image *image = self->image;
    Py_BEGIN_ALLOW_THREADS
    while (length && !error && count < limit) {
        struct extent extent, *last = count ? &extents[count - 1] : NULL;
        error = image->ops->locate(image, offset, length, &extent);
        if (error)
            break;
        image_complete(&extent, false);
        offset += extent.length;
        length -= extent.length;
        if (last && last->kind == extent.kind && last->owner == extent.owner && last->hole == extent.hole &&
            (extent.kind != KIND_DATA || last->offset + last->length == extent.offset))
            last->length += extent.length;
        else
            extents[count++] = extent;
    }
    Py_END_ALLOW_THREADS
    PyObject *result = error ? NULL : PyList_New(0);
    for (unsigned i = 0; i < count && result; i++) {
        static const char *const kinds[] = {"data", "zero", "packed"};
        struct extent *extent = &extents[i];
        int depth = 0;
        for (struct image *at = image; at && at != extent->owner; at = at->backing)
            depth++;
        PyObject *item = Py_BuildValue("(Ksik)", (unsigned long long)extent->length, extent->hole ? "hole" : kinds[extent->kind],
                                       depth, (unsigned long)extent->offset);
        if (!item || PyList_Append(result, item))
            Py_CLEAR(result);
        Py_XDECREF(item);
    }
    PyMem_Free(extents);
    return error ? result_of(error) : result;
}

static bool is_qcow2(ImageObject *self)
{
    if (image_open(self) && !strcmp(self->image->ops->name, "qcow2"))
        return true;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "not a qcow2 image");
    return false;
}

static PyObject *image_py_write_packed(ImageObject *self, PyObject *args)
{
    unsigned long long offset;
    Py_buffer data;
    int error;
    if (!is_qcow2(self) || !PyArg_ParseTuple(args, "Ky*", &offset, &data))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = qcow2_write_packed(self->image, offset, data.buf, (uint64_t)data.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return result_of(error);
}

/* A call for a range of a qcow2 image. */
static PyObject *call_range(ImageObject *self, PyObject *args, int (*call)(struct image *, uint64_t, uint64_t))
{
    unsigned long long offset, length;
    int error;
    if (!is_qcow2(self) || !PyArg_ParseTuple(args, "KK", &offset, &length) || !in_range(self, offset, length))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = length ? call(self->image, offset, length) : 0;
    Py_END_ALLOW_THREADS
    return result_of(error);
}

static PyObject *image_py_forget(ImageObject *self, PyObject *args)
{
    return call_range(self, args, qcow2_forget);
}

static PyObject *image_py_populate(ImageObject *self, PyObject *args)
{
    return call_range(self, args, qcow2_populate);
}

static PyObject *image_py_commit(ImageObject *self, PyObject *args)
{
    return call_range(self, args, qcow2_commit);
}

static PyObject *image_length(ImageObject *self, void *Py_UNUSED(unused))
{
    return image_open(self) ? PyLong_FromUnsignedLongLong(self->image->length) : NULL;
}

static PyMethodDef image_methods[] = {
    {"raw", (PyCFunction)(void (*)(void))image_raw, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     "raw(fd, length, align=0, read_only=False, *, guarded=False): a file whose bytes are the disk's; align: of memory, in "
     "bytes, for O_DIRECT; guarded: writes that make it look like a qcow2 image are refused with EPERM."},
    {"overlay", (PyCFunction)(void (*)(void))image_overlay, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     "overlay(fd, dirty, backing): `backing` is only read, writes go to `fd`; `dirty` has one bit per sector that is there."},
    {"qcow2", (PyCFunction)(void (*)(void))image_qcow2, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     "qcow2(fd, data_fd, …): an image whose header was checked; ValueError says in what way its tables make no sense."},
    {"set_unpacker", image_set_unpacker, METH_O | METH_STATIC,
     "set_unpacker(call): call(type, data, size) -> bytes decompresses clusters where the host has no library for it."},
    {"map", (PyCFunction)image_py_map, METH_VARARGS,
     "map(offset, length, limit=4096) -> [(length, 'data' | 'zero' | 'hole' | 'packed', depth in the chain, offset there)]"},
    {"write_packed", (PyCFunction)image_py_write_packed, METH_VARARGS,
     "write_packed(offset, data): one cluster from its compressed bytes, fewer than a cluster."},
    {"forget", (PyCFunction)image_py_forget, METH_VARARGS,
     "forget(offset, length): whole clusters become unallocated, so that the backing image shows through."},
    {"populate", (PyCFunction)image_py_populate, METH_VARARGS,
     "populate(offset, length): copy into the image what it reads from its backing image, while it is used."},
    {"commit", (PyCFunction)image_py_commit, METH_VARARGS,
     "commit(offset, length): move what the image holds into its backing image, which has to be writable, while it is used."},
    {"close", (PyCFunction)image_py_close, METH_NOARGS, "Flush, and take no more calls. OSError."},
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
