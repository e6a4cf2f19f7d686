/* virtio._ring.Fence. */
#include "fence.h"
#include "replies.h"

#include <string.h>

enum { PROTOCOL_ICMP = 1, PROTOCOL_UDP = 17, PROTOCOL_ICMPV6 = 58, PORT_DNS = 53, PORT_DHCP = 67,
       ECHO_REPLY = 0, ECHO_REQUEST_6 = 128, ECHO_REPLY_6 = 129 };

/* What the first bytes of a frame of `length` bytes in all say. */
enum reading { OTHER, FLOW, OPENS };

/* FLOW: a plain packet, and `key` is its connection. OPENS: the same, and its sender begins it. OTHER: all else. */
static enum reading look(const FenceObject *self, const uint8_t *head, size_t have, size_t length, bool outgoing,
                      struct fence_key *key)
{
    if (have < ETHERNET + 20 || (outgoing && memcmp(head + 6, self->mac, 6)))
        return OTHER;
    const uint8_t *ip = head + ETHERNET, *body, *peer;
    size_t start, end, address;
    uint16_t type = load16(head + 12);
    if (type == ETHERTYPE_IPV4) {
        if (ip[0] != 0x45 || load16(ip + 6) & 0x3FFF)
            return OTHER;
        if (outgoing && (!self->addressed || memcmp(ip + 12, self->address, 4)))
            return OTHER;
        start = 20, end = load16(ip + 2), address = 4;
        peer = outgoing ? ip + 16 : ip + 12;
    } else if (type == ETHERTYPE_IPV6 && have >= ETHERNET + 40) {
        if (ip[0] >> 4 != 6)
            return OTHER;
        start = 40, end = 40u + load16(ip + 4), address = 16;
        peer = outgoing ? ip + 24 : ip + 8;
    } else {
        return OTHER;
    }
    if (end < start || end > length - ETHERNET)
        return OTHER;
    size_t size = end - start, seen = have - ETHERNET - start;
    if (seen > size)
        seen = size;
    body = ip + start;
    memset(key, 0, sizeof *key);
    memcpy(key->peer, peer, address);
    key->version = address == 4 ? 4 : 6;
    key->protocol = address == 4 ? ip[9] : ip[6];
    if (key->protocol == PROTOCOL_TCP ? seen >= 20 : key->protocol == PROTOCOL_UDP && seen >= 8) {
        memcpy(key->peer_port, body + (outgoing ? 2 : 0), 2);
        memcpy(key->guest_port, body + (outgoing ? 0 : 2), 2);
        if (key->protocol == PROTOCOL_UDP)
            return load16(key->peer_port) == (outgoing ? PORT_DNS : PORT_DHCP) ? OTHER : FLOW;
        return (body[13] & (TCP_SYN | TCP_ACK)) == TCP_SYN ? OPENS : FLOW;
    }
    if (key->version == 4 && key->protocol == PROTOCOL_ICMP && seen >= 4)
        return outgoing || body[0] == ECHO_REPLY ? FLOW : OTHER;
    if (key->version == 6 && key->protocol == PROTOCOL_ICMPV6 && seen >= 4)
        return body[0] == (outgoing ? ECHO_REQUEST_6 : ECHO_REPLY_6) ? FLOW : OTHER;
    return OTHER;
}

static struct fence_entry *set_of(const FenceObject *self, const struct fence_key *key)
{
    return self->entries + tcp_hash((const uint8_t *)key, sizeof *key) % FENCE_SETS * FENCE_WAYS;
}

/* The connection's place, be its verdict void or not. */
static struct fence_entry *place_of(const FenceObject *self, const struct fence_key *key)
{
    struct fence_entry *set = self->entries ? set_of(self, key) : NULL;
    for (unsigned i = 0; set && i < FENCE_WAYS; i++)
        if (set[i].epoch && !memcmp(&set[i].key, key, sizeof *key))
            return &set[i];
    return NULL;
}

/* The verdict that stands, for a frame that needs it now. */
static struct fence_entry *find(FenceObject *self, const struct fence_key *key)
{
    struct fence_entry *entry = place_of(self, key);
    if (!entry || entry->epoch != self->epoch)
        return NULL;
    entry->used = ++self->uses;
    return entry;
}

/* 0, or -1 with an exception. */
static int keep(FenceObject *self, const struct fence_key *key, uint8_t verdict)
{
    if (!self->entries && !(self->entries = PyMem_Calloc(FENCE_SETS * FENCE_WAYS, sizeof *self->entries))) {
        PyErr_NoMemory();
        return -1;
    }
    struct fence_entry *set = set_of(self, key), *entry = place_of(self, key);
    if (!entry) {
        entry = set;
        for (unsigned i = 1; i < FENCE_WAYS; i++)
            if (set[i].used < entry->used)
                entry = &set[i];
    }
    *entry = (struct fence_entry){*key, verdict, self->epoch, ++self->uses};
    return 0;
}

/* Python's verdict on the frame, which this takes. -1: an exception is set. */
static int ask(FenceObject *self, PyObject *frame, bool outgoing, enum reading kind, const struct fence_key *key)
{
    if (!frame)
        return -1;
    self->questions++;
    PyObject *judge = Py_XNewRef(self->judge); /* closed meanwhile, it still ends its answer */
    PyObject *answer = judge ? PyObject_CallFunctionObjArgs(judge, frame, outgoing ? Py_True : Py_False, NULL)
                             : PyLong_FromLong(REFUSE);
    Py_XDECREF(judge);
    Py_DECREF(frame);
    long verdict = answer ? PyLong_AsLong(answer) : -1;
    Py_XDECREF(answer);
    if (PyErr_Occurred())
        return -1;
    bool kept = verdict & KEEP;
    verdict &= ~KEEP;
    if (verdict < REFUSE || verdict > TAKEN) {
        PyErr_SetString(PyExc_ValueError, "no verdict");
        return -1;
    }
    if (kept && kind != OTHER && verdict != TAKEN && keep(self, key, (uint8_t)verdict))
        return -1;
    return (int)verdict;
}

static int reply(FenceObject *self, const uint8_t *frame, size_t length)
{
    return replies_full(self->replies) ? 0 : replies_add(self->replies, frame, length);
}

/* The frame in `iov`, but its beginning as it was judged. */
static PyObject *whole(const uint8_t *head, size_t have, const struct iovec *iov, size_t count, size_t length)
{
    PyObject *frame = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (!frame)
        return NULL;
    char *to = PyBytes_AS_STRING(frame);
    size_t at = 0;
    for (size_t i = 0; i < count && at < length; i++) {
        size_t part = iov[i].iov_len < length - at ? iov[i].iov_len : length - at;
        memcpy(to + at, iov[i].iov_base, part);
        at += part;
    }
    memset(to + at, 0, length - at);
    memcpy(to, head, have);
    return frame;
}

int fence_outgoing(FenceObject *self, uint8_t head[FLOW_HEAD], size_t have, const struct iovec *iov, size_t count,
                   size_t *length)
{
    struct fence_key key;
    enum reading kind = look(self, head, have, *length, true, &key);
    struct fence_entry *entry = kind == OTHER ? NULL : find(self, &key);
    if (entry && kind == OPENS && entry->verdict == PASS)
        entry = NULL; /* it may stand for a connection that the other end began, and this is another */
    int verdict = entry ? entry->verdict : ask(self, whole(head, have, iov, count, *length), true, kind, &key);
    if (entry)
        self->refused += verdict == REFUSE;
    if (verdict != CUT)
        return verdict;
    struct segment_seen seen;
    if (!tcp_look(head, have, true, &seen) || (seen.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
        return REFUSE;
    uint8_t answer[FLOW_ANSWER];
    if (!(seen.flags & TCP_RST) && reply(self, answer, tcp_reset_sender(answer, &seen, true)))
        return -1;
    *length = tcp_reset_receiver(head, &seen, true);
    return CUT;
}

int fence_incoming(FenceObject *self, const uint8_t *frame, size_t length, uint8_t answer[FLOW_ANSWER], size_t *size)
{
    struct fence_key key;
    enum reading kind = look(self, frame, length, length, false, &key);
    bool lease = kind == OTHER && length >= ETHERNET + 28 && load16(frame + 12) == ETHERTYPE_IPV4 &&
                 frame[ETHERNET + 9] == PROTOCOL_UDP;
    if (kind == OTHER && !lease)
        return PASS;
    struct fence_entry *entry = kind == FLOW ? find(self, &key) : NULL;
    int verdict;
    if (entry)
        verdict = entry->verdict;
    else
        verdict = ask(self, PyBytes_FromStringAndSize((const char *)frame, (Py_ssize_t)length), false, kind, &key);
    if (entry)
        self->refused += verdict == REFUSE;
    if (verdict != CUT)
        return verdict == TAKEN ? REFUSE : verdict;
    struct segment_seen seen;
    if (!tcp_look(frame, length, false, &seen) || seen.flags & TCP_RST)
        return PASS; /* the other end is done with it anyway */
    if (reply(self, answer, tcp_reset_receiver(answer, &seen, false)))
        return -1;
    *size = tcp_reset_sender(answer, &seen, false);
    return CUT;
}

int fence_replace(FenceObject **to, PyObject *given)
{
    if (given != Py_None && !PyObject_TypeCheck(given, &fence_type)) {
        PyErr_SetString(PyExc_TypeError, "Fence or None");
        return -1;
    }
    Py_XSETREF(*to, given == Py_None ? NULL : (FenceObject *)Py_NewRef(given));
    return 0;
}

static PyObject *fence_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"mac", "judge", NULL};
    Py_buffer mac;
    PyObject *judge;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*O", names, &mac, &judge))
        return NULL;
    FenceObject *self = NULL;
    if (mac.len != 6)
        PyErr_SetString(PyExc_ValueError, "a hardware address has 6 bytes");
    else if ((self = (FenceObject *)type->tp_alloc(type, 0))) {
        memcpy(self->mac, mac.buf, 6);
        self->epoch = 1;
        self->judge = Py_NewRef(judge);
        if (!(self->replies = PyList_New(0)))
            Py_CLEAR(self);
    }
    PyBuffer_Release(&mac);
    return (PyObject *)self;
}

static int fence_traverse(FenceObject *self, visitproc visit, void *arg)
{
    Py_VISIT(self->judge);
    Py_VISIT(self->replies);
    return 0;
}

static int fence_clear(FenceObject *self)
{
    Py_CLEAR(self->judge);
    return 0;
}

static void fence_dealloc(FenceObject *self)
{
    PyObject_GC_UnTrack(self);
    fence_clear(self);
    Py_CLEAR(self->replies);
    PyMem_Free(self->entries);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *py_outgoing(FenceObject *self, PyObject *args)
{
    Py_buffer frame;
    if (!PyArg_ParseTuple(args, "y*", &frame))
        return NULL;
    uint8_t head[FLOW_HEAD];
    size_t length = (size_t)frame.len, have = length < FLOW_HEAD ? length : FLOW_HEAD;
    memcpy(head, frame.buf, have);
    struct iovec iov = {frame.buf, length};
    int verdict = fence_outgoing(self, head, have, &iov, 1, &length);
    PyObject *answer = NULL;
    if (verdict == PASS)
        answer = PyBytes_FromStringAndSize(frame.buf, frame.len);
    else if (verdict == CUT)
        answer = PyBytes_FromStringAndSize((const char *)head, (Py_ssize_t)length);
    PyBuffer_Release(&frame);
    if (verdict < 0 || answer)
        return answer;
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_incoming(FenceObject *self, PyObject *args)
{
    Py_buffer frame;
    if (!PyArg_ParseTuple(args, "y*", &frame))
        return NULL;
    uint8_t answer[FLOW_ANSWER];
    size_t size = 0;
    int verdict = fence_incoming(self, frame.buf, (size_t)frame.len, answer, &size);
    PyBuffer_Release(&frame);
    if (verdict < 0)
        return NULL;
    return Py_BuildValue("(Ny#)", PyBool_FromLong(verdict == PASS), answer, (Py_ssize_t)size);
}

static PyObject *py_address(FenceObject *self, PyObject *args)
{
    Py_buffer address;
    if (!PyArg_ParseTuple(args, "y*", &address))
        return NULL;
    bool fits = address.len == 4;
    if (fits)
        memcpy(self->address, address.buf, 4);
    PyBuffer_Release(&address);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "an IPv4 address has 4 bytes");
        return NULL;
    }
    self->addressed = true;
    Py_RETURN_NONE;
}

static PyObject *py_mac(FenceObject *self, PyObject *args)
{
    Py_buffer mac;
    if (!PyArg_ParseTuple(args, "y*", &mac))
        return NULL;
    bool fits = mac.len == 6;
    if (fits)
        memcpy(self->mac, mac.buf, 6);
    PyBuffer_Release(&mac);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "a hardware address has 6 bytes");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_used(FenceObject *self, PyObject *args)
{
    Py_buffer peer;
    unsigned short peer_port, port;
    if (!PyArg_ParseTuple(args, "y*HH", &peer, &peer_port, &port))
        return NULL;
    struct fence_key key = {.protocol = PROTOCOL_TCP, .version = peer.len == 4 ? 4 : 6};
    bool fits = peer.len == 4 || peer.len == 16;
    if (fits)
        memcpy(key.peer, peer.buf, (size_t)peer.len);
    PyBuffer_Release(&peer);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "an address has 4 or 16 bytes");
        return NULL;
    }
    store16(key.peer_port, peer_port);
    store16(key.guest_port, port);
    const struct fence_entry *entry = place_of(self, &key);
    return PyLong_FromUnsignedLongLong(entry ? entry->used : 0);
}

static PyObject *py_forget(FenceObject *self, PyObject *Py_UNUSED(ignored))
{
    if (!++self->epoch) { /* after 2^32 of them old verdicts would be young again */
        self->epoch = 1;
        PyMem_Free(self->entries);
        self->entries = NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_reply(FenceObject *self, PyObject *args)
{
    Py_buffer frame;
    if (!PyArg_ParseTuple(args, "y*", &frame))
        return NULL;
    int failed = reply(self, frame.buf, (size_t)frame.len);
    PyBuffer_Release(&frame);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_replies(FenceObject *self, PyObject *Py_UNUSED(ignored))
{
    return replies_take(&self->replies);
}

static PyObject *py_close(FenceObject *self, PyObject *Py_UNUSED(ignored))
{
    Py_CLEAR(self->judge);
    return py_forget(self, NULL);
}

static PyObject *py_refused(FenceObject *self, void *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLongLong(self->refused);
}

static PyMethodDef fence_methods[] = {
    {"outgoing", (PyCFunction)py_outgoing, METH_VARARGS,
     "outgoing(frame) -> what is to be sent for a frame of the guest: itself, a reset, or None."},
    {"incoming", (PyCFunction)py_incoming, METH_VARARGS,
     "incoming(frame) -> (whether a frame for the guest passes, a frame for the other end or nothing)."},
    {"address", (PyCFunction)py_address, METH_VARARGS, "address(bytes): the guest's IPv4 address."},
    {"mac", (PyCFunction)py_mac, METH_VARARGS, "mac(bytes): the card's hardware address from now on."},
    {"used", (PyCFunction)py_used, METH_VARARGS,
     "used(peer, peer_port, port) -> int: when a frame of this TCP connection came last; greater is later, 0 unknown."},
    {"forget", (PyCFunction)py_forget, METH_NOARGS, "forget(): every connection is judged anew."},
    {"reply", (PyCFunction)py_reply, METH_VARARGS, "reply(frame): a frame for the guest; lost if too many wait."},
    {"replies", (PyCFunction)py_replies, METH_NOARGS, "replies() -> frames for the guest, each told once."},
    {"close", (PyCFunction)py_close, METH_NOARGS, "close(): nobody is asked any more, and everything new is refused."},
    {0},
};

static PyGetSetDef fence_getset[] = {
    {"refused", (getter)py_refused, NULL, "frames that were refused by verdicts that stood here", NULL},
    {0},
};

PyTypeObject fence_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.Fence",
    .tp_doc = "Fence(mac, judge): verdicts on frames. judge(frame, outgoing) -> 0 refuse, 1 pass, 2 cut the connection, 3\n"
              "answered; with 4 in it the verdict stands for this connection until forget().",
    .tp_basicsize = sizeof(FenceObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = fence_new,
    .tp_traverse = (traverseproc)fence_traverse,
    .tp_clear = (inquiry)fence_clear,
    .tp_dealloc = (destructor)fence_dealloc,
    .tp_methods = fence_methods,
    .tp_getset = fence_getset,
};
