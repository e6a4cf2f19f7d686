/* Several vCPUs of a VM at once: each is run by a thread of its own (soft_vcpu_run()).
 *
 * A vCPU's registers, TLBs, blocks and host code are its thread's alone. Guest memory is shared, and what is known of it by
 * page: who has translated code of it (slot->code_pages, granules) and who may write to it through a TLB entry (writers). The
 * interrupt controllers have a lock. Slots, the clock and the caller's debugging change only while no thread is *inside*:
 * soft_vm_stop_all() waits until all are outside, between instructions, asleep, or in an access callback.
 *
 * Code that another vCPU writes (Intel SDM vol. 3, 9.1.3): before a vCPU reads bytes to translate them, it marks their page,
 * and every other vCPU that may have a TLB entry to write to it gives that up at its next block's end, which the translator
 * waits for. From then on each write there takes the slow path and afterwards looks who has code of these 64 bytes: that vCPU
 * finds a note in its inbox, and its attention set, before any later store of the writer can be seen. Bytes are
 * compared once more after the mark of their 64 bytes was set, so that either the writer sees that or the translator what
 * was written.
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

#include "soft/run/turn.h"

enum {
    SPINS = 200,          /* looks at what another thread does at once mostly, before sleeping */
    PAUSES = 32,          /* PAUSEs in a row, until the processor goes to another thread */
    PAUSES_SLEEP = 1024,  /* the same, until this one sleeps */
    PAUSES_APART = 64,    /* instructions between two in a row */
    PAUSE_SLEEP_NS = 50000,
};

struct soft_parallel {
    pthread_mutex_t stop; /* held from soft_vm_stop_all() to soft_vm_go() */
    pthread_mutex_t code; /* code_pages and granules of the slots change together */
    uint32_t stops;       /* atomic: threads that have or want all vCPUs outside */
    uint32_t lives;       /* atomic: counts vCPUs that came back from a sleep for good */
    uint32_t seq, waiters;/* futex: something that a thread waits for here may have happened */
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

/* Something changed that a thread may wait for. */
static void changed(struct soft_parallel *p)
{
    if (!__atomic_load_n(&p->waiters, __ATOMIC_SEQ_CST))
        return;
    __atomic_add_fetch(&p->seq, 1, __ATOMIC_SEQ_CST);
    futex_wake(&p->seq);
}

/* To be called until what the caller waits for is there: `*turn` counts from 0. */
static void wait_for_change(struct soft_parallel *p, unsigned *turn, bool (*done)(void *what), void *what)
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

static bool is_outside(void *what) { return !__atomic_load_n(&((struct soft_vcpu *)what)->own.inside, __ATOMIC_SEQ_CST); }
static bool no_stops(void *what) { return !__atomic_load_n(&((struct soft_parallel *)what)->stops, __ATOMIC_SEQ_CST); }
static void serve_protections(struct soft_vcpu *c);

static void come_inside(struct soft_vcpu *c)
{
    struct soft_parallel *p = c->vm->parallel;
    for (unsigned turn = 0;;) {
        __atomic_store_n(&c->own.inside, 1, __ATOMIC_SEQ_CST);
        if (no_stops(p))
            break;
        __atomic_store_n(&c->own.inside, 0, __ATOMIC_SEQ_CST);
        changed(p);
        wait_for_change(p, &turn, no_stops, p);
    }
    serve_protections(c);
}

static void go_outside(struct soft_vcpu *c)
{
    __atomic_store_n(&c->own.inside, 0, __ATOMIC_SEQ_CST);
    changed(c->vm->parallel);
}

void soft_vcpu_outside(struct soft_vm *vm, uint32_t vcpu) { go_outside(vm->vcpus[vcpu]); }
void soft_vcpu_inside(struct soft_vm *vm, uint32_t vcpu) { come_inside(vm->vcpus[vcpu]); }

static void call_outside(struct soft_vm *vm)
{
    __atomic_add_fetch(&vm->parallel->stops, 1, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        __atomic_store_n(&vm->vcpus[i]->attention, 1, __ATOMIC_SEQ_CST);
}
static void call_back(struct soft_parallel *p)
{
    if (!__atomic_sub_fetch(&p->stops, 1, __ATOMIC_SEQ_CST))
        changed(p);
}

void soft_vm_stop_all(struct soft_vm *vm)
{
    struct soft_parallel *p = vm->parallel;
    call_outside(vm);
    pthread_mutex_lock(&p->stop);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        for (unsigned turn = 0; !is_outside(vm->vcpus[i]);)
            wait_for_change(p, &turn, is_outside, vm->vcpus[i]);
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
            all &= is_outside(vm->vcpus[i]);
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
    serve_protections(c);
}

void soft_alone_end(struct soft_vcpu *c)
{
    if (!c->own.alone)
        return;
    c->own.alone = false;
    soft_vm_go(c->vm);
    come_inside(c);
}

/* ---- the inbox ---- */

static void post(struct soft_vcpu *to)
{
    __atomic_store_n(&to->own.inbox.pending, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&to->attention, 1, __ATOMIC_SEQ_CST);
}

static void post_range(struct soft_vcpu *to, uint64_t gpa, uint64_t size)
{
    struct soft_inbox *box = &to->own.inbox;
    pthread_mutex_lock(&box->lock);
    if (box->range_count < INBOX_RANGES) {
        box->ranges[box->range_count].gpa = gpa;
        box->ranges[box->range_count++].size = size;
    } else {
        box->flush = true;
    }
    post(to);
    pthread_mutex_unlock(&box->lock);
}

/* The lock is held. */
static void protect_asked(struct soft_vcpu *c)
{
    struct soft_inbox *box = &c->own.inbox;
    bool any = box->protect_all;
    if (box->protect_all)
        soft_tlb_protect(c, NULL);
    box->protect_all = false;
    for (unsigned i = 0; i < SOFT_MAX_VCPUS; i++) {
        const uint8_t *host = box->protect[i];
        if (!host)
            continue;
        soft_tlb_protect(c, host);
        __atomic_store_n(&box->protect[i], NULL, __ATOMIC_SEQ_CST);
        any = true;
    }
    if (any)
        changed(c->vm->parallel);
}

/* What can be done in the middle of an instruction. What is left is done at its block's end. */
static void serve_protections(struct soft_vcpu *c)
{
    struct soft_inbox *box = &c->own.inbox;
    if (!__atomic_load_n(&box->pending, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&box->lock);
    protect_asked(c);
    if (!box->range_count && !box->flush)
        __atomic_store_n(&box->pending, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&box->lock);
}

static void serve(struct soft_vcpu *c)
{
    struct soft_inbox *box = &c->own.inbox;
    if (!__atomic_load_n(&box->pending, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&box->lock);
    protect_asked(c);
    bool flush = box->flush;
    uint32_t count = box->range_count;
    __typeof__(box->ranges) ranges;
    memcpy(ranges, box->ranges, count * sizeof ranges[0]);
    box->range_count = 0;
    box->flush = false;
    __atomic_store_n(&box->pending, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&box->lock);
    if (flush)
        soft_blocks_flush(c->blocks);
    for (uint32_t i = 0; i < count && !flush; i++)
        soft_blocks_invalidate(c->blocks, ranges[i].gpa, ranges[i].size);
}

/* ---- who has code of a page, and who may write to it ---- */

struct request {
    struct soft_vcpu *of, *by;
    const uint8_t *host;
};

static bool is_protected(const struct request *r)
{
    return is_outside(r->of) || !__atomic_load_n(&r->of->own.inbox.protect[r->by->index], __ATOMIC_SEQ_CST);
}

/* Or somebody waits for the one that waits. */
static bool protected_or_asked(void *what)
{
    const struct request *r = what;
    const struct soft_inbox *own = &r->by->own.inbox;
    for (unsigned i = 0; i < SOFT_MAX_VCPUS; i++)
        if (__atomic_load_n(&own->protect[i], __ATOMIC_SEQ_CST))
            return true;
    return is_protected(r);
}

static void ask_to_protect(struct soft_vcpu *of, const struct soft_vcpu *by, const uint8_t *host)
{
    struct soft_inbox *box = &of->own.inbox;
    pthread_mutex_lock(&box->lock);
    if (box->protect[by->index]) /* it was outside, and still is, or was until now */
        box->protect_all = true;
    __atomic_store_n(&box->protect[by->index], host, __ATOMIC_SEQ_CST);
    post(of);
    pthread_mutex_unlock(&box->lock);
    changed(of->vm->parallel); /* it may itself wait in protect_page() */
}

/* Nobody can write to the page unseen any more: its mark is set, so no new TLB entries appear. */
static void protect_page(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page)
{
    struct soft_parallel *p = c->vm->parallel;
    const uint8_t *host = slot->host + (page << 12);
    uint16_t writers = __atomic_load_n(&slot->writers[page], __ATOMIC_SEQ_CST);
    if (!writers)
        return;
    if (writers >> c->index & 1)
        soft_tlb_protect(c, host);
    for (uint32_t i = 0; i < c->vm->config.vcpus; i++)
        if (i != c->index && writers >> i & 1)
            ask_to_protect(c->vm->vcpus[i], c, host);
    for (uint32_t i = 0; i < c->vm->config.vcpus; i++) {
        if (i == c->index || !(writers >> i & 1))
            continue;
        struct request r = { c->vm->vcpus[i], c, host };
        for (unsigned turn = 0; !is_protected(&r);) {
            serve_protections(c);
            wait_for_change(p, &turn, protected_or_asked, &r);
        }
    }
    __atomic_fetch_and(&slot->writers[page], (uint16_t)~writers, __ATOMIC_SEQ_CST);
}

void soft_shared_mark(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page, bool on)
{
    struct soft_parallel *p = c->vm->parallel;
    uint16_t bit = (uint16_t)(1u << c->index);
    if (on && __atomic_load_n(&slot->code_pages[page], __ATOMIC_RELAXED) & bit)
        return;
    pthread_mutex_lock(&p->code);
    if (on)
        __atomic_fetch_or(&slot->code_pages[page], bit, __ATOMIC_SEQ_CST);
    else if (!(__atomic_and_fetch(&slot->code_pages[page], (uint16_t)~bit, __ATOMIC_SEQ_CST)))
        __atomic_store_n(&slot->granules[page], 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&p->code);
    if (on)
        protect_page(c, slot, page);
}

void soft_shared_granules(struct soft_vm *vm, const uint8_t *host, uint64_t granules)
{
    for (uint32_t i = 0; i < vm->slot_count; i++) {
        struct soft_slot *slot = &vm->slots[i];
        if (!slot->size || host < slot->host || (uint64_t)(host - slot->host) >= slot->size)
            continue;
        uint64_t *word = &slot->granules[(uint64_t)(host - slot->host) >> 12];
        if (granules & ~__atomic_load_n(word, __ATOMIC_RELAXED))
            __atomic_fetch_or(word, granules, __ATOMIC_SEQ_CST);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void soft_shared_written(struct soft_vm *vm, struct soft_vcpu *by, struct soft_slot *slot, uint64_t gpa, uint64_t size)
{
    uint64_t page = (gpa - slot->gpa) >> 12;
    unsigned low = (unsigned)(gpa & ~PAGE_MASK), high = low + (unsigned)size - 1;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what was written is there before the look */
    uint16_t who = __atomic_load_n(&slot->code_pages[page], __ATOMIC_SEQ_CST);
    if (!who)
        return;
    if (!(__atomic_load_n(&slot->granules[page], __ATOMIC_SEQ_CST) & soft_granules(low, high < 0xFFF ? high : 0xFFF)))
        return;
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        if (!(who >> i & 1))
            continue;
        if (by && by->index == i)
            soft_blocks_invalidate(by->blocks, gpa, size);
        else
            post_range(vm->vcpus[i], gpa, size);
    }
}

bool soft_shared_may_write(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page)
{
    uint16_t bit = (uint16_t)(1u << c->index);
    /* Before the look: who marks the page sees this, or this sees the mark. */
    if (!(__atomic_load_n(&slot->writers[page], __ATOMIC_SEQ_CST) & bit))
        __atomic_fetch_or(&slot->writers[page], bit, __ATOMIC_SEQ_CST);
    return !__atomic_load_n(&slot->code_pages[page], __ATOMIC_SEQ_CST);
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
        serve(c);
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
