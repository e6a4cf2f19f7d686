/* What the files of the thread loop share; no core includes it. */
#ifndef LV_LOOP_INTERNAL_H
#define LV_LOOP_INTERNAL_H

#include "native/loop.h"

#include <time.h>

enum {
    LV_TABLE_SIZE = 256,
    LV_TABLE_ENTRIES_MAX = 8192,
    LV_LOCK_TRIES = 100, /* some microseconds */
    LV_SPIN_MAX_NS = 40000, /* tests.bench exits: beyond this a sleeping thread costs less than it delays */
    LV_LINGER_MAX_NS = 20000, /* the same for the loop's thread, which others wait for as well */
};

extern _Atomic int lv_spinners;     /* threads spinning now, over all VMs */
extern _Atomic int lv_spinners_max; /* threads that may spin at once, over all VMs; -1: not known yet */

uint64_t lv_clock(void); /* CLOCK_MONOTONIC, ns */

static inline void lv_count(struct lv_vm *vm, uint32_t stat)
{
    atomic_fetch_add_explicit(&vm->stats[stat], 1, memory_order_relaxed);
}

/* Take vm->lock, which is held for less time than a thread needs to fall asleep. Not by an adaptive mutex: that reads the TSC, which
 * the thread may have given up (cpu/soft/hostclock.h). */
static inline void lv_lock(struct lv_vm *vm)
{
    for (int tries = 0; tries < LV_LOCK_TRIES && lv_spinners_max > 0; tries++) {
        if (!pthread_mutex_trylock(&vm->lock))
            return;
        __builtin_ia32_pause();
    }
    pthread_mutex_lock(&vm->lock);
}

/* Keep what happened among the vCPU's last exits. Of an access that is answered on the spot the time is read coarsely, which
 * takes less than the exact time, or the TSC on hosts that are virtual machines. [engine] */
static inline void lv_remember(struct lv_vcpu *vcpu, uint8_t kind, uint8_t size, uint64_t address, uint64_t value, uint8_t done)
{
    struct lv_past_exit *last = &vcpu->past[(vcpu->past_count - 1) % LV_PAST_EXITS];
    uint64_t now;
    if (done == LV_PAST_ON_THE_SPOT) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
        now = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    } else {
        now = lv_clock();
    }
    if (vcpu->past_count && last->kind == kind && last->address == address && last->value == value && last->size == size &&
        last->done == done && done == LV_PAST_ON_THE_SPOT && last->repeats < UINT32_MAX) {
        last->repeats++;
        last->ns = now;
        return;
    }
    vcpu->past[vcpu->past_count++ % LV_PAST_EXITS] = (struct lv_past_exit){
        .ns = now, .address = address, .value = value, .repeats = 1, .kind = kind, .size = size, .done = done};
}
/* The last exit is answered: a read by `value`. [loop] */
static inline void lv_remember_answer(struct lv_vcpu *vcpu, uint64_t value)
{
    struct lv_past_exit *last = &vcpu->past[(vcpu->past_count - 1) % LV_PAST_EXITS];
    if (!vcpu->past_count || last->done != LV_PAST_WAITS)
        return;
    last->done = LV_PAST_ANSWERED;
    if (vcpu->wants_value)
        last->value = value;
}

void lv_signal(struct lv_vm *vm);
/* Queue `event` and wake the loop as needed. Called with vm->lock held; returns with it released; may wait (room in the
 * queue; virtual clock). */
void lv_push_locked(struct lv_engine *engine, const struct lv_event *event);
void lv_wait_handled(struct lv_engine *engine, uint64_t taken);
/* Queue `exit`, wait for resume(), return its value (all ones when closing). */
uint64_t lv_ask(struct lv_vcpu *vcpu, const struct lv_exit *exit, bool may_spin);
void lv_table_free(struct lv_vm *vm);

/* irqfd.c: deliver what the irqfds that the loop serves have been told; at the end, drop them and the routes. */
void lv_irqfds_serve(struct lv_vm *vm);
void lv_irqfds_free(struct lv_vm *vm);

#endif
