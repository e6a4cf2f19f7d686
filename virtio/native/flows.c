/* virtio._ring.Flows. */
#include "flows.h"
#include "replies.h"

#include <string.h>

/* Of one connection: the hardware addresses may change. */
static bool same(const struct flow *a, const struct flow *b)
{
    enum { FROM = offsetof(struct flow, guest) };
    return !memcmp((const char *)a + FROM, (const char *)b + FROM, sizeof *a - FROM);
}

static struct flow_entry *set_of(FlowsObject *self, const struct flow *flow)
{
    enum { FROM = offsetof(struct flow, guest) };
    return self->entries + tcp_hash((const uint8_t *)flow + FROM, sizeof *flow - FROM) % FLOW_SETS * FLOW_WAYS;
}

static struct flow_entry *find(FlowsObject *self, const struct flow *flow)
{
    struct flow_entry *set = self->entries ? set_of(self, flow) : NULL;
    for (unsigned i = 0; set && i < FLOW_WAYS; i++)
        if (set[i].used && same(&set[i].flow, flow))
            return &set[i];
    return NULL;
}

static struct flow_entry *use(FlowsObject *self, const struct flow *flow)
{
    struct flow_entry *entry = find(self, flow);
    if (entry)
        entry->seen = ++self->uses;
    return entry;
}

/* 0, or -1 with an exception. */
static int add(FlowsObject *self, const struct flow *flow)
{
    if (!self->entries && !(self->entries = PyMem_Calloc(FLOW_SETS * FLOW_WAYS, sizeof *self->entries))) {
        PyErr_NoMemory();
        return -1;
    }
    struct flow_entry *entry = find(self, flow), *set = set_of(self, flow);
    for (unsigned i = 0; !entry && i < FLOW_WAYS; i++)
        if (!set[i].used)
            entry = &set[i];
    if (!entry) { /* the one not used for longest, of those that are closing if there is one */
        entry = &set[0];
        for (unsigned i = 1; i < FLOW_WAYS; i++)
            if (set[i].closing > entry->closing || (set[i].closing == entry->closing && set[i].seen < entry->seen))
                entry = &set[i];
        self->evicted |= !entry->closing;
    }
    *entry = (struct flow_entry){*flow, true, false, 0, ++self->uses};
    return 0;
}

/* `direction`: 1 from the guest, 2 to it. 0, or -1 with an exception. */
static int note(FlowsObject *self, const struct segment_seen *seen, uint8_t direction)
{
    if ((seen->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN)
        return add(self, &seen->flow);
    struct flow_entry *entry = use(self, &seen->flow);
    if (!entry || !(seen->flags & (TCP_RST | TCP_FIN)))
        return 0;
    if (seen->flags & TCP_RST)
        entry->used = false;
    else
        entry->closing = (entry->fins |= direction) == 3;
    return 0;
}

int flows_replace(FlowsObject **to, PyObject *given)
{
    if (given != Py_None && !PyObject_TypeCheck(given, &flows_type)) {
        PyErr_SetString(PyExc_TypeError, "Flows or None");
        return -1;
    }
    Py_XSETREF(*to, given == Py_None ? NULL : (FlowsObject *)Py_NewRef(given));
    return 0;
}

int flows_outgoing(FlowsObject *self, const uint8_t *head, size_t length)
{
    struct segment_seen seen;
    if (!tcp_look(head, length, true, &seen))
        return 0;
    bool begins = (seen.flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
    if (!self->answers || begins || self->evicted || find(self, &seen.flow))
        return note(self, &seen, 1);
    /* RFC 9293, 3.10.7.1: "An incoming segment containing a RST is discarded. An incoming segment not containing a RST
     * causes a RST to be sent in response." */
    if (seen.flags & TCP_RST || replies_full(self->replies))
        return 1;
    uint8_t frame[FLOW_ANSWER];
    return replies_add(self->replies, frame, tcp_reset_sender(frame, &seen, true)) ? -1 : 1;
}

int flows_incoming(FlowsObject *self, const uint8_t *head, size_t length)
{
    struct segment_seen seen;
    return tcp_look(head, length, false, &seen) ? note(self, &seen, 2) : 0;
}

static PyObject *flows_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "", names))
        return NULL;
    FlowsObject *self = (FlowsObject *)type->tp_alloc(type, 0);
    if (self && !(self->replies = PyList_New(0)))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void flows_dealloc(FlowsObject *self)
{
    PyMem_Free(self->entries);
    Py_XDECREF(self->replies);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *py_outgoing(FlowsObject *self, PyObject *args)
{
    Py_buffer frame;
    if (!PyArg_ParseTuple(args, "y*", &frame))
        return NULL;
    int result = flows_outgoing(self, frame.buf, (size_t)frame.len);
    PyBuffer_Release(&frame);
    return result < 0 ? NULL : PyBool_FromLong(result);
}

static PyObject *py_incoming(FlowsObject *self, PyObject *args)
{
    Py_buffer frame;
    if (!PyArg_ParseTuple(args, "y*", &frame))
        return NULL;
    int result = flows_incoming(self, frame.buf, (size_t)frame.len);
    PyBuffer_Release(&frame);
    if (result < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_replies(FlowsObject *self, PyObject *Py_UNUSED(ignored))
{
    return replies_take(&self->replies);
}

static int clear(FlowsObject *self)
{
    PyMem_Free(self->entries);
    self->entries = NULL;
    self->answers = self->evicted = false;
    return PyList_SetSlice(self->replies, 0, PyList_GET_SIZE(self->replies), NULL);
}

static PyObject *py_clear(FlowsObject *self, PyObject *Py_UNUSED(ignored))
{
    if (clear(self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_save(FlowsObject *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *found = PyList_New(0);
    for (unsigned i = 0; found && self->entries && i < FLOW_SETS * FLOW_WAYS; i++) {
        if (!self->entries[i].used || self->entries[i].closing)
            continue;
        PyObject *one = PyBytes_FromStringAndSize((const char *)&self->entries[i].flow, sizeof(struct flow));
        if (!one || PyList_Append(found, one))
            Py_CLEAR(found);
        Py_XDECREF(one);
    }
    return found;
}

static PyObject *py_forgotten(FlowsObject *self, PyObject *given)
{
    if (clear(self))
        return NULL;
    PyObject *saved = PySequence_Fast(given, "a sequence of bytes");
    self->answers = true;
    for (Py_ssize_t i = 0; saved && i < PySequence_Fast_GET_SIZE(saved); i++) {
        char *bytes;
        Py_ssize_t length;
        struct flow flow;
        if (PyBytes_AsStringAndSize(PySequence_Fast_GET_ITEM(saved, i), &bytes, &length)) {
            Py_CLEAR(saved);
            break;
        }
        if (length != sizeof flow || (bytes[45] != 4 && bytes[45] != 6) || bytes[44]) {
            PyErr_SetString(PyExc_ValueError, "not the addresses of a connection");
            Py_CLEAR(saved);
            break;
        }
        memcpy(&flow, bytes, sizeof flow);
        uint8_t frame[FLOW_ANSWER];
        if (replies_add(self->replies, frame, tcp_segment(frame, &flow, TCP_ACK, 0, 0)))
            Py_CLEAR(saved);
    }
    if (!saved)
        return NULL;
    Py_DECREF(saved);
    Py_RETURN_NONE;
}

static PyMethodDef flows_methods[] = {
    {"outgoing", (PyCFunction)py_outgoing, METH_VARARGS,
     "outgoing(frame) -> bool: a frame of the guest; True: it was answered here and is not to be sent on."},
    {"incoming", (PyCFunction)py_incoming, METH_VARARGS, "incoming(frame): a frame for the guest."},
    {"replies", (PyCFunction)py_replies, METH_NOARGS, "replies() -> frames for the guest, each told once."},
    {"save", (PyCFunction)py_save, METH_NOARGS, "save() -> list of bytes: the open connections, 50 bytes each."},
    {"forgotten", (PyCFunction)py_forgotten, METH_O,
     "forgotten(saved): the other end knows no connection any more. Those of save() get a segment that makes the guest\n"
     "speak; whatever it says of connections that did not begin since is answered with a reset. ValueError."},
    {"clear", (PyCFunction)py_clear, METH_NOARGS, "clear(): as new."},
    {0},
};

PyTypeObject flows_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.Flows",
    .tp_doc = "Flows(): the TCP connections that go through a network card.",
    .tp_basicsize = sizeof(FlowsObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = flows_new,
    .tp_dealloc = (destructor)flows_dealloc,
    .tp_methods = flows_methods,
};
