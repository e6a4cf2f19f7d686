/* Several vCPUs of a VM at once: each is run by a thread of its own (soft_vcpu_run()).
 *
 * A vCPU's registers, TLBs, blocks and host code are its thread's alone. Guest memory is shared; shared.c knows who may write
 * to a page and who has code of it. The interrupt controllers have a lock. Slots, the clock and the caller's debugging change
 * only while no thread is *inside*: soft_vm_stop_all() waits until all are outside, between instructions, asleep, or in an
 * access callback.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "soft/run/parallel.h"
#include "soft/run/turn.h"

enum {
    SPINS = 200,          /* looks at what another thread does at once mostly, before sleeping */
    PAUSES = 32,          /* PAUSEs in a row, until the processor goes to another thread */
    PAUSES_SLEEP = 1024,  /* the same, until this one sleeps */
    PAUSES_APART = 64,    /* instructions between two in a row */
    PAUSE_SLEEP_NS = 50000,
};

int soft_parallel_create(struct soft_vm *vm)
{
    struct soft_parallel *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    pthread_mutex_init(&p->stop, NULL);
    pthread_mutex_init(&p->code, NULL);
    p->lives = 1;
    vm->parallel = p;
    return 0;
}

void soft_parallel_destroy(struct soft_vm *vm)
{
    free(vm->parallel); /* in a forked child its locks may be held by threads that are not here */
}

/* ---- waiting ---- */

static void futex_wait(uint32_t *word, uint32_t value, uint64_t ns)
{
    struct timespec t = { .tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000) };
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, ns == UINT64_MAX ? NULL : &t, NULL, 0);
}
static void futex_wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }

void soft_rouse(struct soft_vcpu *c) { futex_wake(&c->attention); }

void soft_parallel_changed(struct soft_parallel *p)
{
    if (!__atomic_load_n(&p->waiters, __ATOMIC_SEQ_CST))
        return;
    __atomic_add_fetch(&p->seq, 1, __ATOMIC_SEQ_CST);
    futex_wake(&p->seq);
}

void soft_wait_for_change(struct soft_parallel *p, unsigned *turn, bool (*done)(void *what), void *what)
{
    if (++*turn < SPINS) {
        __builtin_ia32_pause();
        return;
    }
    __atomic_add_fetch(&p->waiters, 1, __ATOMIC_SEQ_CST);
    uint32_t seq = __atomic_load_n(&p->seq, __ATOMIC_SEQ_CST);
    if (!done(what))
        futex_wait(&p->seq, seq, UINT64_MAX);
    __atomic_sub_fetch(&p->waiters, 1, __ATOMIC_SEQ_CST);
}

/* ---- inside and outside ---- */

bool soft_is_outside(void *vcpu) { return !__atomic_load_n(&((struct soft_vcpu *)vcpu)->own.inside, __ATOMIC_SEQ_CST); }
static bool no_stops(void *what) { return !__atomic_load_n(&((struct soft_parallel *)what)->stops, __ATOMIC_SEQ_CST); }

static void come_inside(struct soft_vcpu *c)
{
    struct soft_parallel *p = c->vm->parallel;
    for (unsigned turn = 0;;) {
        __atomic_store_n(&c->own.inside, 1, __ATOMIC_SEQ_CST);
        if (no_stops(p))
            break;
        __atomic_store_n(&c->own.inside, 0, __ATOMIC_SEQ_CST);
        soft_parallel_changed(p);
        soft_wait_for_change(p, &turn, no_stops, p);
    }
    soft_serve_protections(c);
}

static void go_outside(struct soft_vcpu *c)
{
    __atomic_store_n(&c->own.inside, 0, __ATOMIC_SEQ_CST);
    soft_parallel_changed(c->vm->parallel);
}

void soft_vcpu_outside(struct soft_vm *vm, uint32_t vcpu) { go_outside(vm->vcpus[vcpu]); }
void soft_vcpu_inside(struct soft_vm *vm, uint32_t vcpu) { come_inside(vm->vcpus[vcpu]); }

static void call_outside(struct soft_vm *vm)
{
    __atomic_add_fetch(&vm->parallel->stops, 1, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        soft_attend_awake(vm->vcpus[i]);
}
static void call_back(struct soft_parallel *p)
{
    if (!__atomic_sub_fetch(&p->stops, 1, __ATOMIC_SEQ_CST))
        soft_parallel_changed(p);
}

void soft_vm_stop_all(struct soft_vm *vm)
{
    struct soft_parallel *p = vm->parallel;
    call_outside(vm);
    pthread_mutex_lock(&p->stop);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        for (unsigned turn = 0; !soft_is_outside(vm->vcpus[i]);)
            soft_wait_for_change(p, &turn, soft_is_outside, vm->vcpus[i]);
}

bool soft_vm_try_stop_all(struct soft_vm *vm, uint64_t ns)
{
    struct soft_parallel *p = vm->parallel;
    uint64_t end = soft_host_now() + ns;
    bool have, all = false;
    call_outside(vm);
    while (!(have = pthread_mutex_trylock(&p->stop) == 0) && soft_host_now() < end)
        usleep(100);
    while (have && !all) {
        all = true;
        for (uint32_t i = 0; i < vm->config.vcpus; i++)
            all &= soft_is_outside(vm->vcpus[i]);
        if (all)
            return true;
        if (soft_host_now() >= end)
            break;
        usleep(100);
    }
    if (have)
        pthread_mutex_unlock(&p->stop);
    call_back(p);
    return false;
}

void soft_vm_go(struct soft_vm *vm)
{
    struct soft_parallel *p = vm->parallel;
    pthread_mutex_unlock(&p->stop);
    call_back(p);
}

void soft_alone_begin(struct soft_vcpu *c)
{
    if (!c->vm->parallel)
        return;
    go_outside(c);
    soft_vm_stop_all(c->vm);
    c->own.alone = true;
    soft_serve_protections(c);
}

void soft_alone_end(struct soft_vcpu *c)
{
    if (!c->own.alone)
        return;
    c->own.alone = false;
    soft_vm_go(c->vm);
    come_inside(c);
}

static void between(struct soft_vcpu *c)
{
    if (c->vm->host.between)
        c->vm->host.between(c->vm->host.ctx, c->index);
}

/* ---- PAUSE ---- */

/* A lock's owner may not have a processor: whoever spins for it gives way, at last for longer than the scheduler's idea of
 * it. */
void soft_shared_pause(struct soft_vcpu *c)
{
    struct soft_own_thread *own = &c->own;
    uint64_t at = soft_instructions(c);
    own->pauses = at - own->paused_at <= PAUSES_APART ? own->pauses + 1 : 1;
    own->paused_at = at;
    if (own->pauses % PAUSES)
        return;
    between(c);
    go_outside(c);
    if (own->pauses < PAUSES_SLEEP)
        sched_yield();
    else
        futex_wait(&c->attention, 0, PAUSE_SLEEP_NS);
    come_inside(c);
}

/* ---- the run loop of one vCPU ---- */

__thread const struct soft_vcpu *soft_of_this_thread;

void soft_vcpu_wake(struct soft_vm *vm, uint32_t vcpu)
{
    struct soft_vcpu *c = vm->vcpus[vcpu];
    __atomic_store_n(&c->own.wake, 1, __ATOMIC_SEQ_CST);
    soft_attend(c);
}

bool soft_parallel_called(const struct soft_vcpu *c)
{
    return __atomic_load_n(&c->own.wake, __ATOMIC_SEQ_CST) || __atomic_load_n(&c->own.inbox.pending, __ATOMIC_SEQ_CST)
           || __atomic_load_n(&c->vm->parallel->stops, __ATOMIC_SEQ_CST);
}

static bool all_sleep_for_good(struct soft_vm *vm)
{
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        if (!__atomic_load_n(&vm->vcpus[i]->own.dead, __ATOMIC_SEQ_CST))
            return false;
    return !irqchip_may_nmi(vm->irqchip);
}

/* Nothing to execute: sleep until c->attention or a time. GO_ON, or SOFT_STOP_HALTED. Attention was cleared before the caller
 * looked for something to do. */
static int sleep_until(struct soft_vcpu *c, uint64_t now, uint64_t deadline)
{
    struct soft_vm *vm = c->vm;
    struct soft_parallel *p = vm->parallel;
    if (soft_sleeps_for_good(c)) {
        __atomic_store_n(&c->own.dead, 1, __ATOMIC_SEQ_CST);
        uint32_t lives = __atomic_load_n(&p->lives, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&c->own.told, __ATOMIC_SEQ_CST) != lives && all_sleep_for_good(vm)) {
            __atomic_store_n(&c->own.told, lives, __ATOMIC_SEQ_CST);
            for (uint32_t i = 0; i < vm->config.vcpus; i++)
                if (__atomic_load_n(&vm->vcpus[i]->own.told, __ATOMIC_SEQ_CST) != lives)
                    soft_attend(vm->vcpus[i]); /* so that its thread finds the same */
            return SOFT_STOP_HALTED;
        }
    }
    if (c->activity == ACT_MWAIT && c->mwait_until < deadline)
        deadline = c->mwait_until;
    soft_blocks_rest(c->blocks);
    go_outside(c);
    __atomic_store_n(&c->asleep, 1, __ATOMIC_SEQ_CST);
    if (!__atomic_load_n(&c->attention, __ATOMIC_SEQ_CST))
        futex_wait(&c->attention, 0, deadline == UINT64_MAX ? UINT64_MAX : deadline > now ? deadline - now : 0);
    __atomic_store_n(&c->asleep, 0, __ATOMIC_SEQ_CST);
    come_inside(c);
    return GO_ON;
}

void soft_lives_again(struct soft_vcpu *c)
{
    if (!__atomic_load_n(&c->own.dead, __ATOMIC_RELAXED))
        return;
    __atomic_store_n(&c->own.dead, 0, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&c->vm->parallel->lives, 1, __ATOMIC_SEQ_CST);
}

enum soft_stop soft_vcpu_run(struct soft_vm *vm, uint32_t vcpu)
{
    struct soft_vcpu *c = vm->vcpus[vcpu];
    int stop = GO_ON;
    soft_of_this_thread = c;
    come_inside(c);
    while (stop == GO_ON) {
        between(c);
        __atomic_store_n(&c->attention, 0, __ATOMIC_SEQ_CST);
        if (__atomic_exchange_n(&c->own.wake, 0, __ATOMIC_SEQ_CST)) {
            stop = SOFT_STOP_WAKE;
            break;
        }
        if (!no_stops(vm->parallel)) {
            go_outside(c);
            come_inside(c);
        }
        soft_serve(c);
        uint64_t now = soft_now(vm);
        if (irqchip_next_event_of(vm->irqchip, vcpu) <= now)
            irqchip_advance_of(vm->irqchip, vcpu, now);
        uint64_t next = irqchip_next_event_of(vm->irqchip, vcpu);
        if (!soft_can_run(c, now)) {
            stop = sleep_until(c, now, next);
            continue;
        }
        soft_lives_again(c);
        c->turn_limit_ns = next;
        int64_t budget = soft_budget_until(c, now, next);
        soft_set_budget(c, budget);
        stop = soft_run_turn(c);
        soft_pace(c, soft_now(vm) - now, (uint64_t)(budget - c->budget - c->budget_held));
        fpu_collect(&c->fpu);
        c->turn_limit_ns = UINT64_MAX;
    }
    go_outside(c);
    return (enum soft_stop)stop;
}
