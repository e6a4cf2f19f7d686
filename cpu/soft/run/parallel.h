/* What parallel.c (threads of vCPUs) and shared.c (the memory they share) have in common. */
#ifndef SOFT_PARALLEL_H
#define SOFT_PARALLEL_H

#include "soft/system/system.h"

struct soft_parallel {
    pthread_mutex_t stop; /* held from soft_vm_stop_all() to soft_vm_go() */
    pthread_mutex_t code; /* code_pages and granules of the slots change together */
    uint32_t stops;       /* atomic: threads that have or want all vCPUs outside */
    uint32_t lives;       /* atomic: counts vCPUs that came back from a sleep for good */
    uint32_t seq, waiters;/* futex: something that a thread waits for here may have happened */
};

/* Something changed that a thread may wait for. */
void soft_parallel_changed(struct soft_parallel *p);
/* To be called until what the caller waits for is there: `*turn` counts from 0. */
void soft_wait_for_change(struct soft_parallel *p, unsigned *turn, bool (*done)(void *what), void *what);
bool soft_is_outside(void *vcpu);
/* The vCPU that this thread ran last, or NULL. */
extern __thread const struct soft_vcpu *soft_of_this_thread;

/* What others ask of this vCPU. [its thread, inside or alone] The first does what can be done in the middle of an
 * instruction; what is left is done at its block's end. */
void soft_serve_protections(struct soft_vcpu *c);
void soft_serve(struct soft_vcpu *c);

#endif
