/* The module virtio._ring, and its Ring: a virtqueue for Python. memory.c, chain.c, pyimage.c and blk.c have the other objects. */
#include "fence.h"
#include "flows.h"
#include "limits.h"
#include "module.h"

#include <string.h>

PyObject *guest_error, *state_error;

static void ring_dealloc(RingObject *self)
{
    ring_free(&self->ring);
    Py_XDECREF(self->memory);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"memory", "size", "desc", "driver", "device", "features", NULL};
    MemoryObject *memory;
    unsigned size;
    unsigned long long desc, driver, device, features = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!IKKK|K", names, &memory_type, &memory, &size, &desc, &driver,
                                     &device, &features))
        return NULL;
    RingObject *self = (RingObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    const char *error = NULL;
    if (ring_init(&self->ring, &memory->memory, size, desc, driver, device, features, &error)) {
        Py_DECREF(self);
        PyErr_SetString(guest_error, error);
        return NULL;
    }
    self->memory = (MemoryObject *)Py_NewRef((PyObject *)memory);
    if (ring_notify_area(self)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

PyObject *ring_raise(RingObject *self)
{
    PyErr_SetString(guest_error, self->ring.error ? self->ring.error : "the ring is broken");
    return NULL;
}

int ring_notify_area(RingObject *self)
{
    if (!self->ring.used_dirty)
        return 0;
    self->ring.used_dirty = false;
    if (!self->memory->written)
        return 0;
    if (self->ring.packed && memory_notify(self->memory, self->ring.desc_gpa, self->ring.desc_size))
        return -1;
    return memory_notify(self->memory, self->ring.device_gpa, self->ring.device_size);
}

static bool ring_open(RingObject *self)
{
    if (self->closed)
        PyErr_SetString(state_error, "the queue was reset");
    return !self->closed;
}

/* A new reference, or NULL: with an exception, or without one if nothing is available. */
static PyObject *pop_one(RingObject *self)
{
    struct chain chain;
    int got = ring_pop(&self->ring, &chain);
    if (got < 0)
        return ring_raise(self);
    if (!got)
        return NULL;
    ChainObject *result = (ChainObject *)chain_type.tp_alloc(&chain_type, 0);
    if (!result)
        return NULL;
    size_t bytes = (chain.readable + chain.writable) * sizeof *chain.segments;
    result->chain = chain;
    result->chain.segments = PyMem_Malloc(bytes ? bytes : 1);
    result->ring = (RingObject *)Py_NewRef((PyObject *)self);
    if (!result->chain.segments) {
        Py_DECREF(result);
        return PyErr_NoMemory();
    }
    memcpy(result->chain.segments, chain.segments, bytes);
    return (PyObject *)result;
}

static PyObject *ring_py_pop(RingObject *self, PyObject *Py_UNUSED(unused))
{
    if (!ring_open(self))
        return NULL;
    PyObject *chain = pop_one(self);
    if (chain || PyErr_Occurred())
        return chain;
    Py_RETURN_NONE;
}

static PyObject *ring_py_pop_batch(RingObject *self, PyObject *limit)
{
    long most = PyLong_AsLong(limit);
    if (PyErr_Occurred() || !ring_open(self))
        return NULL;
    PyObject *list = PyList_New(0);
    while (list && most-- > 0) {
        PyObject *chain = pop_one(self);
        if (!chain)
            break;
        int failed = PyList_Append(list, chain);
        Py_DECREF(chain);
        if (failed)
            Py_CLEAR(list);
    }
    if (PyErr_Occurred()) /* what was popped before the malformed chain is abandoned with the ring */
        Py_CLEAR(list);
    return list;
}

static int chain_notify(RingObject *self, const ChainObject *chain, uint64_t length)
{
    return segments_notify(self->memory, chain->chain.segments + chain->chain.readable, chain->chain.writable,
                           chain->exposed ? chain->chain.writable_length : length);
}

static PyObject *ring_py_push(RingObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count < 1 || count > 2 || !PyObject_TypeCheck(args[0], &chain_type)) {
        PyErr_SetString(PyExc_TypeError, "push(chain, written=None)");
        return NULL;
    }
    ChainObject *chain = (ChainObject *)args[0];
    uint64_t length = chain->written;
    if (count > 1 && args[1] != Py_None) {
        length = PyLong_AsUnsignedLongLong(args[1]);
        if (PyErr_Occurred())
            return NULL;
    }
    if (!ring_open(self) || !chain_usable(chain))
        return NULL;
    if (chain->ring != self || length > chain->chain.writable_length) {
        PyErr_SetString(PyExc_ValueError, chain->ring != self ? "the chain is another ring's" : "written is too large");
        return NULL;
    }
    chain->returned = true;
    if (chain_notify(self, chain, length))
        return NULL;
    ring_push(&self->ring, chain->chain.order, chain->chain.id, chain->chain.slots, (uint32_t)length);
    Py_RETURN_NONE;
}

static PyObject *ring_py_push_batch(RingObject *self, PyObject *chains)
{
    PyObject *list = PySequence_Fast(chains, "push_batch([(chain, written), ...])");
    if (!list)
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(list);
    struct pending *pending = PyMem_Calloc((size_t)count + 1, sizeof *pending);
    PyObject *result = NULL;
    if (!pending) {
        PyErr_NoMemory();
        goto done;
    }
    if (!ring_open(self))
        goto done;
    for (Py_ssize_t i = 0; i < count; i++) {
        ChainObject *chain;
        unsigned long long length;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(list, i), "O!K", &chain_type, &chain, &length) ||
            !chain_usable(chain))
            goto done;
        if (chain->ring != self || length > chain->chain.writable_length) {
            PyErr_SetString(PyExc_ValueError, "the chain is another ring's, or written is too large");
            goto done;
        }
        chain->returned = true;
        if (chain_notify(self, chain, length))
            goto done;
        pending[i] = (struct pending){chain->chain.order, (uint32_t)length, chain->chain.id, chain->chain.slots, false};
    }
    ring_push_batch(&self->ring, pending, (uint32_t)count);
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(pending);
    Py_DECREF(list);
    return result;
}

static PyObject *ring_py_undo_pop(RingObject *self, PyObject *argument)
{
    if (!PyObject_TypeCheck(argument, &chain_type)) {
        PyErr_SetString(PyExc_TypeError, "undo_pop(chain)");
        return NULL;
    }
    ChainObject *chain = (ChainObject *)argument;
    if (!ring_open(self) || !chain_usable(chain))
        return NULL;
    if (chain->ring != self || chain->chain.order + 1 != self->ring.popped) {
        PyErr_SetString(PyExc_ValueError, "not the chain popped last");
        return NULL;
    }
    chain->returned = true;
    ring_undo_pop(&self->ring, &chain->chain);
    Py_RETURN_NONE;
}

static PyObject *ring_py_needs_notification(RingObject *self, PyObject *Py_UNUSED(unused))
{
    if (!ring_open(self) || ring_notify_area(self))
        return NULL;
    return PyBool_FromLong(ring_needs_notification(&self->ring));
}

static PyObject *ring_py_enable(RingObject *self, PyObject *Py_UNUSED(unused))
{
    if (!ring_open(self))
        return NULL;
    bool more = ring_enable_notification(&self->ring);
    if (ring_notify_area(self))
        return NULL;
    return PyBool_FromLong(more);
}

static PyObject *ring_py_want_more(RingObject *self, PyObject *Py_UNUSED(unused))
{
    if (!ring_open(self))
        return NULL;
    ring_want_more(&self->ring);
    if (ring_notify_area(self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *ring_py_disable(RingObject *self, PyObject *Py_UNUSED(unused))
{
    if (!ring_open(self))
        return NULL;
    ring_disable_notification(&self->ring);
    if (ring_notify_area(self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *ring_py_has_available(RingObject *self, PyObject *Py_UNUSED(unused))
{
    if (!ring_open(self))
        return NULL;
    return PyBool_FromLong(ring_has_available(&self->ring));
}

static PyObject *ring_py_look_again(RingObject *self, PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(!self->closed && ring_look_again(&self->ring));
}

static PyObject *ring_py_close(RingObject *self, PyObject *Py_UNUSED(unused))
{
    self->closed = true;
    Py_RETURN_NONE;
}

static PyObject *ring_py_save(RingObject *self, PyObject *Py_UNUSED(unused))
{
    struct ring *ring = &self->ring;
    if (ring->in_flight) {
        PyErr_SetString(state_error, "requests are in flight");
        return NULL;
    }
    return Py_BuildValue("{s:I,s:I,s:O,s:O}", "next_avail", (unsigned)ring->next_avail, "next_used",
                         (unsigned)ring->next_used, "avail_wrap", ring->avail_wrap ? Py_True : Py_False, "used_wrap",
                         ring->used_wrap ? Py_True : Py_False);
}

static PyObject *ring_py_restore(RingObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"next_avail", "next_used", "avail_wrap", "used_wrap", NULL};
    unsigned next_avail, next_used;
    int avail_wrap = 1, used_wrap = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "II|pp", names, &next_avail, &next_used, &avail_wrap, &used_wrap))
        return NULL;
    unsigned limit = self->ring.packed ? self->ring.size : 0x10000;
    if (next_avail >= limit || next_used >= limit) {
        PyErr_SetString(PyExc_ValueError, "ring index is out of range");
        return NULL;
    }
    self->ring.next_avail = (uint16_t)next_avail;
    self->ring.next_used = (uint16_t)next_used;
    self->ring.avail_wrap = avail_wrap;
    self->ring.used_wrap = used_wrap;
    Py_RETURN_NONE;
}

static PyObject *ring_number(RingObject *self, void *which)
{
    switch ((intptr_t)which) {
    case 0: return PyLong_FromUnsignedLong(self->ring.size);
    case 1: return PyLong_FromUnsignedLong(self->ring.in_flight);
    case 2: return PyLong_FromUnsignedLong(self->ring.next_avail);
    default: return PyLong_FromUnsignedLong(self->ring.next_used);
    }
}

static PyObject *ring_error(RingObject *self, void *Py_UNUSED(unused))
{
    if (self->ring.error)
        return PyUnicode_FromString(self->ring.error);
    Py_RETURN_NONE;
}

int rings_add(PyObject *rings, RingObject *ring)
{
    int known = ring->closed ? 1 : PySequence_Contains(rings, (PyObject *)ring);
    return known < 0 || (!known && PyList_Append(rings, (PyObject *)ring)) ? -1 : 0;
}

PyObject *rings_to_notify(PyObject *rings)
{
    for (Py_ssize_t i = PyList_GET_SIZE(rings) - 1; i >= 0; i--) {
        RingObject *ring = (RingObject *)PyList_GET_ITEM(rings, i);
        if (ring_notify_area(ring) ||
            (!ring_needs_notification(&ring->ring) && PyList_SetSlice(rings, i, i + 1, NULL))) {
            Py_DECREF(rings);
            return NULL;
        }
    }
    return rings;
}

static PyMethodDef ring_methods[] = {
    {"pop", (PyCFunction)ring_py_pop, METH_NOARGS, "pop() -> Chain or None; GuestError if the ring is malformed."},
    {"pop_batch", (PyCFunction)ring_py_pop_batch, METH_O, "pop_batch(limit) -> list of at most `limit` chains."},
    {"push", (PyCFunction)(void (*)(void))ring_py_push, METH_FASTCALL,
     "push(chain, written=None): return a chain with so many bytes written."},
    {"push_batch", (PyCFunction)ring_py_push_batch, METH_O,
     "push_batch([(chain, written), ...]): return chains so that the driver sees all of them at once."},
    {"undo_pop", (PyCFunction)ring_py_undo_pop, METH_O, "undo_pop(chain): make the chain popped last available again."},
    {"needs_notification", (PyCFunction)ring_py_needs_notification, METH_NOARGS,
     "Whether the driver wants to hear of what was pushed since the last call."},
    {"enable_notification", (PyCFunction)ring_py_enable, METH_NOARGS,
     "Ask for notifications; True: more came meanwhile, so pop again."},
    {"want_more", (PyCFunction)ring_py_want_more, METH_NOARGS,
     "Ask for a notification with the next chain although some are available; then try once more."},
    {"disable_notification", (PyCFunction)ring_py_disable, METH_NOARGS, "Ask for silence."},
    {"has_available", (PyCFunction)ring_py_has_available, METH_NOARGS, "Whether a chain is available."},
    {"look_again", (PyCFunction)ring_py_look_again, METH_NOARGS,
     "Pages that were missing have come: whether the ring waited for some, and is to be popped again."},
    {"close", (PyCFunction)ring_py_close, METH_NOARGS, "Reset: chains in flight can no longer touch guest memory."},
    {"save", (PyCFunction)ring_py_save, METH_NOARGS, "The positions as a dict; StateError while chains are in flight."},
    {"restore", (PyCFunction)(void (*)(void))ring_py_restore, METH_VARARGS | METH_KEYWORDS,
     "restore(next_avail, next_used, avail_wrap=True, used_wrap=True)"},
    {0},
};

static PyGetSetDef ring_getset[] = {
    {"size", (getter)ring_number, NULL, "Queue Size", (void *)0},
    {"in_flight", (getter)ring_number, NULL, "ring slots popped and not pushed", (void *)1},
    {"next_avail", (getter)ring_number, NULL, "position in the available ring", (void *)2},
    {"next_used", (getter)ring_number, NULL, "position in the used ring", (void *)3},
    {"error", (getter)ring_error, NULL, "why the ring is broken, or None", NULL},
    {0},
};

PyTypeObject ring_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.Ring",
    .tp_doc = "Ring(memory, size, desc, driver, device, features=0): one virtqueue, device side; it never signals.",
    .tp_basicsize = sizeof(RingObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = ring_new,
    .tp_dealloc = (destructor)ring_dealloc,
    .tp_methods = ring_methods,
    .tp_getset = ring_getset,
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "virtio._ring",
    .m_doc = "Virtqueues in C, and engines that move a batch of requests in one call.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__ring(void)
{
    PyObject *errors = PyImport_ImportModule("virtio.errors");
    if (!errors)
        return NULL;
    guest_error = PyObject_GetAttrString(errors, "GuestError");
    state_error = PyObject_GetAttrString(errors, "StateError");
    Py_DECREF(errors);
    if (!guest_error || !state_error)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (!module)
        return NULL;
    PyTypeObject *types[] = {&memory_type, &ring_type,  &chain_type,  &image_type,
                             &block_type,  &net_type, &limits_type, &flows_type, &fence_type,
                             &fs_type};
    const char *names[] = {"Memory", "Ring", "Chain", "Image", "BlockEngine", "NetEngine", "Limits", "Flows",
                           "Fence", "FsEngine"};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (PyType_Ready(types[i]) || PyModule_AddObjectRef(module, names[i], (PyObject *)types[i])) {
            Py_DECREF(module);
            return NULL;
        }
    }
    return module;
}
