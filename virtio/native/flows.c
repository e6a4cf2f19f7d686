/* virtio._ring.Flows. */
#include "flows.h"

#include <string.h>

enum { FIN = 1, SYN = 2, RST = 4, ACK = 16, TCP = 6, ETHERNET = 14, REPLIES_MAX = 256 };

/* What a frame says of its connection. */
struct look {
    struct flow flow; /* seen from the guest */
    uint8_t flags;
    uint32_t seq, ack, length; /* length: as sequence numbers count it */
};

static uint32_t load32(const uint8_t *p) { return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]; }
static uint16_t load16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static void store32(uint8_t *p, uint32_t v) { p[0] = (uint8_t)(v >> 24), p[1] = (uint8_t)(v >> 16), p[2] = (uint8_t)(v >> 8), p[3] = (uint8_t)v; }
static void store16(uint8_t *p, uint16_t v) { p[0] = (uint8_t)(v >> 8), p[1] = (uint8_t)v; }

/* Whether it is a whole TCP header that is understood. */
static bool look(const uint8_t *frame, size_t length, bool outgoing, struct look *found)
{
    if (length < ETHERNET + 20)
        return false;
    const uint8_t *ip = frame + ETHERNET, *tcp, *source, *target;
    size_t have = length - ETHERNET, size, total, address;
    uint16_t type = load16(frame + 12);
    uint8_t version = ip[0] >> 4;
    if (type == 0x0800 && version == 4) {
        size = (size_t)(ip[0] & 15) * 4;
        total = load16(ip + 2);
        if (size < 20 || ip[9] != TCP || (load16(ip + 6) & 0x3FFF))
            return false;
        source = ip + 12, target = ip + 16, address = 4;
    } else if (type == 0x86DD && version == 6 && have >= 40) {
        size = 40;
        total = 40u + load16(ip + 4);
        if (ip[6] != TCP)
            return false;
        source = ip + 8, target = ip + 24, address = 16;
    } else {
        return false;
    }
    if (have < size + 20 || total < size + 20)
        return false;
    tcp = ip + size;
    size_t header = (size_t)(tcp[12] >> 4) * 4;
    if (header < 20 || total < size + header)
        return false;
    memset(found, 0, sizeof *found);
    found->flags = tcp[13];
    found->seq = load32(tcp + 4);
    found->ack = load32(tcp + 8);
    found->length = (uint32_t)(total - size - header) + !!(tcp[13] & SYN) + !!(tcp[13] & FIN);
    struct flow *f = &found->flow;
    memcpy(outgoing ? f->peer_mac : f->guest_mac, frame, 6);
    memcpy(outgoing ? f->guest_mac : f->peer_mac, frame + 6, 6);
    memcpy(outgoing ? f->guest : f->peer, source, address);
    memcpy(outgoing ? f->peer : f->guest, target, address);
    memcpy(outgoing ? f->guest_port : f->peer_port, tcp, 2);
    memcpy(outgoing ? f->peer_port : f->guest_port, tcp + 2, 2);
    f->version[1] = version;
    return true;
}

/* Of one connection: the hardware addresses may change. */
static bool same(const struct flow *a, const struct flow *b)
{
    enum { FROM = offsetof(struct flow, guest) };
    return !memcmp((const char *)a + FROM, (const char *)b + FROM, sizeof *a - FROM);
}

static struct flow_entry *set_of(FlowsObject *self, const struct flow *flow)
{
    uint64_t hash = 0xCBF29CE484222325; /* FNV-1a */
    const uint8_t *bytes = (const uint8_t *)flow;
    for (size_t i = offsetof(struct flow, guest); i < sizeof *flow; i++)
        hash = (hash ^ bytes[i]) * 0x100000001B3;
    return self->entries + (hash >> 32) % FLOW_SETS * FLOW_WAYS;
}

static struct flow_entry *find(FlowsObject *self, const struct flow *flow)
{
    struct flow_entry *set = self->entries ? set_of(self, flow) : NULL;
    for (unsigned i = 0; set && i < FLOW_WAYS; i++)
        if (set[i].used && same(&set[i].flow, flow))
            return &set[i];
    return NULL;
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
    if (!entry) { /* the oldest, of those that are closing if there is one */
        entry = &set[0];
        for (unsigned i = 1; i < FLOW_WAYS; i++)
            if (set[i].closing > entry->closing || (set[i].closing == entry->closing && set[i].seen < entry->seen))
                entry = &set[i];
        self->evicted |= !entry->closing;
    }
    *entry = (struct flow_entry){*flow, true, false, 0, self->made++};
    return 0;
}

/* `direction`: 1 from the guest, 2 to it. 0, or -1 with an exception. */
static int note(FlowsObject *self, const struct look *seen, uint8_t direction)
{
    if ((seen->flags & (SYN | ACK | RST)) == SYN)
        return add(self, &seen->flow);
    if (!(seen->flags & (RST | FIN)))
        return 0;
    struct flow_entry *entry = find(self, &seen->flow);
    if (!entry)
        return 0;
    if (seen->flags & RST)
        entry->used = false;
    else
        entry->closing = (entry->fins |= direction) == 3;
    return 0;
}

static uint32_t sum(const uint8_t *bytes, size_t length, uint32_t total) /* RFC 1071; of an even number of bytes */
{
    for (size_t i = 0; i < length; i += 2)
        total += load16(bytes + i);
    return total;
}
static uint16_t folded(uint32_t total)
{
    total = (total >> 16) + (total & 0xFFFF);
    return (uint16_t)~(total + (total >> 16));
}

/* A segment without data from the peer to the guest, as a frame. */
static PyObject *segment(const struct flow *flow, uint8_t flags, uint32_t seq, uint32_t ack)
{
    uint8_t frame[FLOW_ANSWER] = {0}, *ip = frame + ETHERNET;
    bool v4 = flow->version[1] == 4;
    size_t size = v4 ? 20 : 40, address = v4 ? 4 : 16;
    uint8_t *tcp = ip + size;
    memcpy(frame, flow->guest_mac, 6);
    memcpy(frame + 6, flow->peer_mac, 6);
    store16(frame + 12, v4 ? 0x0800 : 0x86DD);
    if (v4) {
        ip[0] = 0x45;
        store16(ip + 2, 40);
        ip[6] = 0x40; /* not to be fragmented */
        ip[8] = 64;
        ip[9] = TCP;
    } else {
        ip[0] = 0x60;
        store16(ip + 4, 20);
        ip[6] = TCP;
        ip[7] = 64;
    }
    memcpy(ip + (v4 ? 12 : 8), flow->peer, address);
    memcpy(ip + (v4 ? 16 : 24), flow->guest, address);
    if (v4)
        store16(ip + 10, folded(sum(ip, 20, 0)));
    memcpy(tcp, flow->peer_port, 2);
    memcpy(tcp + 2, flow->guest_port, 2);
    store32(tcp + 4, seq);
    store32(tcp + 8, ack);
    tcp[12] = 5 << 4;
    tcp[13] = flags;
    store16(tcp + 16, folded(sum(tcp, 20, sum(ip + (v4 ? 12 : 8), 2 * address, TCP + 20))));
    return PyBytes_FromStringAndSize((const char *)frame, (Py_ssize_t)(ETHERNET + size + 20));
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
    struct look seen;
    if (!look(head, length, true, &seen))
        return 0;
    bool begins = (seen.flags & (SYN | ACK | RST)) == SYN;
    if (!self->answers || begins || self->evicted || find(self, &seen.flow))
        return note(self, &seen, 1);
    /* RFC 9293, 3.10.7.1: "An incoming segment containing a RST is discarded. An incoming segment not containing a RST
     * causes a RST to be sent in response." "If the ACK bit is off, sequence number zero is used,
     * <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>. If the ACK bit is on, <SEQ=SEG.ACK><CTL=RST>." */
    if (seen.flags & RST || PyList_GET_SIZE(self->replies) >= REPLIES_MAX)
        return 1;
    PyObject *reply = seen.flags & ACK ? segment(&seen.flow, RST, seen.ack, 0)
                                       : segment(&seen.flow, RST | ACK, 0, seen.seq + seen.length);
    int failed = !reply || PyList_Append(self->replies, reply);
    Py_XDECREF(reply);
    return failed ? -1 : 1;
}

int flows_incoming(FlowsObject *self, const uint8_t *head, size_t length)
{
    struct look seen;
    return look(head, length, false, &seen) ? note(self, &seen, 2) : 0;
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
    PyObject *empty = PyList_New(0), *found = self->replies;
    if (!empty)
        return NULL;
    self->replies = empty;
    return found;
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
        PyObject *probe = segment(&flow, ACK, 0, 0);
        if (!probe || PyList_Append(self->replies, probe))
            Py_CLEAR(saved);
        Py_XDECREF(probe);
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
