/* What BlockEngine and FsEngine share of answering on vCPUs' threads (answerer.h): who is at the rings, how the driver is
 * told, and when a thread has slept for a request and is to do less for a while. blk_direct.c, fs_direct.c have the rest. */
#ifndef VIRTIO_ANSWERING_H
#define VIRTIO_ANSWERING_H

#include "module.h"

#include <pthread.h>
#include <sys/resource.h>

#include "answerer.h"

/* First in what an engine has for it, from malloc(); which the last reference frees. */
struct answering {
    uint32_t count;        /* atomic: of references */
    pthread_mutex_t lock;  /* recursive: what Python does in it may come back. The rings, and everything below */
    pthread_cond_t ended;
    bool busy;             /* a vCPU's thread is at it; a second one is not let in */
    uint32_t shy, shyness; /* doorbells that leave to the loop what took long: now, and after the next time */
};

/* One queue as vCPUs' threads see it: first in what an engine has for it. */
struct answering_lane {
    struct lv_answerer answerer; /* first */
    struct answering *answering;
    bool has_message; /* the interrupt that the driver wants of this queue can be sent as: */
    uint64_t address;
    uint32_t data;
};

void answering_open(struct answering *answering); /* one reference */
void answering_put(struct answering *answering);  /* one reference less; nothing is lent and nothing runs */
bool answering_is_idle(struct answering *answering); /* nothing runs */
void answering_wait(struct answering *answering);    /* until nothing runs; without the GIL */
void lane_open(struct answering_lane *lane, struct answering *answering,
               bool (*ring)(struct lv_answerer *, const struct lv_answerer_host *), enum lv_asked asked);

/* vCPU's thread, with the lock: log what was written of the ring itself, and interrupt the driver if it wants to hear of what
 * was pushed. False: the interrupt was masked meanwhile, and the loop has to see to it. */
bool lane_tell(const struct answering_lane *lane, struct ring *ring, const struct lv_answerer_host *host);

/* A vCPU's thread is at a request. */
struct attempt {
    struct rusage before;
    int64_t begin;
};

void attempt_begin(struct attempt *attempt);
/* The thread is shy for `least` doorbells or more if it slept and the request took `slow_ns`. */
void attempt_end(const struct attempt *attempt, struct answering *answering, int64_t slow_ns, uint32_t least);

/* The engines' methods; loop thread. */

bool lane_number(unsigned number, unsigned lanes);   /* whether there is such a lane; false with an exception */
int lane_ring(PyObject *object, void *ring);         /* for O& of PyArg_ParseTuple: a RingObject, or NULL for None */
PyObject *lane_capsule(struct answering_lane *lane); /* for Vm.add_ioeventfd() */
/* (address, data), or None. None, or NULL with an exception. */
PyObject *lane_set_message(struct answering_lane *lane, PyObject *message);

#endif
