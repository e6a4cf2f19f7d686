/* TCP connections that went through a network card, and what becomes of them when the other end forgets them.
 *
 * User networking keeps connections in a process of the host. A machine that goes on from a snapshot, or as a copy, has a
 * new such process, which knows none of the guest's connections and answers nothing. So the card keeps the addresses of
 * connections, and afterwards answers for the end that is gone: RFC 9293, 3.10.7.1 says what a segment for no connection
 * is answered with. What is not plainly TCP over IP (VLAN tags, fragments, extension headers) is left alone.
 */
#ifndef VIRTIO_FLOWS_H
#define VIRTIO_FLOWS_H

#include "module.h" /* first: it includes Python.h */
#include "tcp.h"

enum { FLOW_SETS = 512, FLOW_WAYS = 8 };

struct flow_entry {
    struct flow flow;
    bool used, closing; /* closing: both ends have sent a FIN */
    uint8_t fins;
    uint64_t seen;      /* when a segment of it passed last, counted in uses; the least gives way */
};

typedef struct {
    PyObject_HEAD
    struct flow_entry *entries; /* FLOW_SETS * FLOW_WAYS; NULL until there is one */
    uint64_t uses;
    bool answers;  /* the other end is new: segments of connections that are not known are answered with a reset */
    bool evicted;  /* a connection was forgotten for want of room: what is not known may be alive */
    PyObject *replies; /* list of bytes: frames for the guest */
} FlowsObject;

extern PyTypeObject flows_type;

/* The first bytes of a frame that the guest sends. True: it goes nowhere, and an answer stands in `replies`.
 * -1: an exception is set. */
int flows_outgoing(FlowsObject *flows, const uint8_t *head, size_t length);
/* The same of a frame for the guest. */
int flows_incoming(FlowsObject *flows, const uint8_t *head, size_t length);
/* What is given as a Flows object or None, in `*to`, which held a reference to another or NULL. 0, or -1 with TypeError. */
int flows_replace(FlowsObject **to, PyObject *given);

#endif
