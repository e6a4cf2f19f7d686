/* Requests of BlockEngine that wait for tokens (limits.h). Loop thread.
 *
 * Reads and writes wait apart, for each may have limits of its own. In each direction the queues take turns, a request
 * each, and nobody passes by whom tokens that all share are missing for: so large requests are not starved by small ones.
 */
#ifndef VIRTIO_BLK_GATE_H
#define VIRTIO_BLK_GATE_H

#include "blk.h"
#include "limits.h"

/* The requests of one queue in one direction. */
struct lane {
    struct lane *next;
    RingObject *ring; /* not a reference: its requests hold it */
    struct jobs jobs;
};

struct gate {
    LimitsObject *limits; /* NULL: none */
    struct {
        struct lane *first, *last; /* in the order of their turns */
    } sides[2];                    /* reads, everything else */
    unsigned waiting;              /* requests */
    unsigned turn;                 /* the side whose turn it is when both could pass */
};

/* Whether requests have to go through the gate. */
static inline bool gate_closed(const struct gate *gate)
{
    return gate->waiting || (gate->limits && gate->limits->active);
}

/* Take a request. False: there is no memory. */
bool gate_add(struct gate *gate, struct request *request);
/* The next request that may pass, its tokens taken; NULL: none may now. With `open` it passes without enough tokens. */
struct request *gate_take(struct gate *gate, int64_t now, bool open);
/* How long until gate_take() has something, ns; -1: nothing waits. */
int64_t gate_wait(struct gate *gate, int64_t now);
/* Every request that waits. */
void gate_empty(struct gate *gate, struct jobs *dropped);

#endif
