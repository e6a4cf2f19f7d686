/* virtio._ring.Fence: a policy's verdicts on the frames of one network card, at the speed of the path in C.
 *
 * What the rules say is decided in Python (virtio/backends/policed.py), once for each connection; here the verdicts stand in a
 * table, and every frame is looked up. A frame passes without a question only if it is wholly understood: a plain TCP, UDP or
 * ICMP packet in IPv4 without options or IPv6 without extension headers, no fragment, of the card's hardware address and the
 * guest's IPv4 address. All else is shown to Python, or refused. The headers that were judged are copies, and the copies are
 * what is sent: a guest that changes them meanwhile changes nothing.
 */
#ifndef VIRTIO_FENCE_H
#define VIRTIO_FENCE_H

#include "module.h" /* first: it includes Python.h */
#include "tcp.h"

#include <sys/uio.h>

enum {
    FENCE_SETS = 1024, FENCE_WAYS = 4,
    FENCE_QUESTIONS = 64, /* that one call of an engine asks at most; a flood of what is new must not keep the loop */
};

enum verdict {
    REFUSE, /* it goes nowhere */
    PASS,
    CUT,    /* a TCP connection that was allowed when it began: both ends get a reset */
    TAKEN,  /* it was answered here */
    KEEP = 4 /* with one of REFUSE, PASS, CUT: the verdict stands for all of this connection */
};

/* Ports and address of the other end in network order; ports 0 without. */
struct fence_key {
    uint8_t peer[16], peer_port[2], guest_port[2], protocol, version;
};

struct fence_entry {
    struct fence_key key;
    uint8_t verdict;
    uint32_t epoch; /* of the Fence when it was judged: an older verdict is void; 0: free */
    uint64_t used;  /* when a frame of it came last, counted in the Fence's uses; the least of a set gives way */
};

typedef struct {
    PyObject_HEAD
    PyObject *judge;             /* judge(frame, outgoing) -> verdict; NULL: closed, and everything is refused */
    PyObject *replies;           /* list of bytes: frames for the guest */
    struct fence_entry *entries; /* FENCE_SETS * FENCE_WAYS; NULL until there is one */
    uint32_t epoch;
    uint8_t mac[6], address[4];
    bool addressed;              /* `address` is the guest's */
    unsigned questions;          /* since fence_begin() */
    uint64_t refused;            /* frames, by verdicts that stood here */
    uint64_t uses;
} FenceObject;

extern PyTypeObject fence_type;

static inline void fence_begin(FenceObject *fence)
{
    if (fence)
        fence->questions = 0;
}

static inline bool fence_tired(const FenceObject *fence)
{
    return fence && fence->questions >= FENCE_QUESTIONS;
}

/* A frame of the guest, `length` bytes in `iov`, whose first `have` were copied to `head`. PASS; REFUSE or TAKEN: it goes
 * nowhere; CUT: `head` holds another frame of `*length` bytes, which is to be sent instead. -1: an exception is set. */
int fence_outgoing(FenceObject *fence, uint8_t head[FLOW_HEAD], size_t have, const struct iovec *iov, size_t count,
                   size_t *length);
/* A frame for the guest. PASS; REFUSE; CUT: `answer` holds a frame of `*size` bytes for the other end. -1: an exception. */
int fence_incoming(FenceObject *fence, const uint8_t *frame, size_t length, uint8_t answer[FLOW_ANSWER], size_t *size);
/* As flows_replace. */
int fence_replace(FenceObject **to, PyObject *given);

#endif
