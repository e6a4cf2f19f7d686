/* Guest memory that several vCPUs share, each on a thread of its own, or one vCPU and its runners: what is known of it by page,
 * who has translated code of it (slot->code_pages, granules), who may write to it through a TLB entry or a runner (writers), and
 * whose runners may execute it (executors); and the inbox by which a vCPU's thread hears what others ask of it.
 *
 * Code that another vCPU writes (Intel SDM vol. 3, 9.1.3): before a vCPU reads bytes to translate them, it marks their page,
 * and every other vCPU that may have a TLB entry to write to it gives that up at its next block's end, which the translator
 * waits for. From then on each write there takes the slow path and afterwards looks who has code of these 64 bytes: that vCPU
 * finds a note in its inbox, and its attention set, before any later store of the writer can be seen. Bytes are
 * compared once more after the mark of their 64 bytes was set, so that either the writer sees that or the translator what
 * was written.
 *
 * Code that runs natively needs none of this to be as the architecture says: it is the host's processor that executes it. But what
 * a runner may execute was looked at before (direct/scan.c), and that has to stay true. So such pages are marked as well, and
 * who wrote to one goes on only when no runner can execute it any more, until it is looked at anew.
 */
#include <time.h>

#include "soft/run/parallel.h"

/* ---- the inbox ---- */

static void post(struct soft_vcpu *to)
{
    __atomic_store_n(&to->own.inbox.pending, 1, __ATOMIC_SEQ_CST);
    soft_attend_awake(to);
}

static void post_range(struct soft_vcpu *to, uint64_t gpa, uint64_t size)
{
    struct soft_inbox *box = &to->own.inbox;
    pthread_mutex_lock(&box->lock);
    uint32_t last = box->range_count;
    if (last && box->ranges[last - 1].gpa == gpa && box->ranges[last - 1].size == size) {
        /* it is told already */
    } else if (box->range_count < INBOX_RANGES) {
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
        soft_parallel_changed(c->vm->parallel);
}

static void clear_executor(struct soft_vcpu *c, uint64_t gpa)
{
    struct soft_slot *slot = soft_find_slot(c->vm, gpa);
    if (slot)
        __atomic_fetch_and(&slot->executors[(gpa - slot->gpa) >> 12], (uint16_t)~(1u << c->index), __ATOMIC_SEQ_CST);
}

/* The lock is held. Marks that are left behind cost the next writer a question. */
static void stop_executing(struct soft_vcpu *c)
{
    struct soft_inbox *box = &c->own.inbox;
    uint32_t count = __atomic_load_n(&box->executed_count, __ATOMIC_SEQ_CST);
    if (!count)
        return;
    for (uint32_t i = 0; i < count && i < INBOX_EXECUTED; i++) {
        if (c->direct)
            soft_direct_code_written(c, box->executed[i]);
        clear_executor(c, box->executed[i]);
    }
    if (count > INBOX_EXECUTED && c->direct)
        soft_direct_code_written(c, PAGE_ALL);
    __atomic_store_n(&box->executed_count, 0, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&box->executed_served, 1, __ATOMIC_SEQ_CST);
    soft_parallel_changed(c->vm->parallel);
}

void soft_serve_protections(struct soft_vcpu *c)
{
    struct soft_inbox *box = &c->own.inbox;
    if (!__atomic_load_n(&box->pending, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&box->lock);
    protect_asked(c);
    stop_executing(c);
    if (!box->range_count && !box->flush)
        __atomic_store_n(&box->pending, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&box->lock);
}

void soft_serve(struct soft_vcpu *c)
{
    struct soft_inbox *box = &c->own.inbox;
    if (!__atomic_load_n(&box->pending, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&box->lock);
    protect_asked(c);
    stop_executing(c);
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
    return soft_is_outside(r->of) || !__atomic_load_n(&r->of->own.inbox.protect[r->by->index], __ATOMIC_SEQ_CST);
}

/* Or somebody waits for the one that waits. */
static bool protected_or_asked(void *what)
{
    const struct request *r = what;
    const struct soft_inbox *own = &r->by->own.inbox;
    if (__atomic_load_n(&own->executed_count, __ATOMIC_SEQ_CST))
        return true;
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
    soft_parallel_changed(of->vm->parallel); /* it may itself wait in protect_page() */
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
            soft_serve_protections(c);
            soft_wait_for_change(p, &turn, protected_or_asked, &r);
        }
    }
    __atomic_fetch_and(&slot->writers[page], (uint16_t)~writers, __ATOMIC_SEQ_CST);
}

/* ---- who executes a page natively ---- */

struct question {
    struct soft_vcpu *of, *by;
    uint32_t served;
};

static bool is_stopped(const struct question *q)
{
    return soft_is_outside(q->of) || __atomic_load_n(&q->of->own.inbox.executed_served, __ATOMIC_SEQ_CST) != q->served;
}

/* Or somebody waits for the one that waits. */
static bool stopped_or_asked(void *what)
{
    const struct question *q = what;
    return __atomic_load_n(&q->by->own.inbox.executed_count, __ATOMIC_SEQ_CST) || is_stopped(q);
}

/* How often it had stopped before this was asked. */
static uint32_t ask_to_stop(struct soft_vcpu *of, struct soft_slot *slot, uint64_t page)
{
    struct soft_inbox *box = &of->own.inbox;
    uint64_t gpa = slot->gpa + (page << 12);
    pthread_mutex_lock(&box->lock);
    uint32_t count = __atomic_load_n(&box->executed_count, __ATOMIC_SEQ_CST), served = box->executed_served, i = 0;
    while (i < count && i < INBOX_EXECUTED && box->executed[i] != gpa)
        i++;
    if (i == count && i < INBOX_EXECUTED)
        box->executed[i] = gpa;
    if (i == count)
        __atomic_store_n(&box->executed_count, count + 1, __ATOMIC_SEQ_CST);
    post(of);
    /* It asks its inbox before it executes anything, so the mark is not needed, and later writers need not ask. */
    if (soft_is_outside(of))
        clear_executor(of, gpa);
    pthread_mutex_unlock(&box->lock);
    soft_parallel_changed(of->vm->parallel); /* it may itself wait here or in protect_page() */
    return served;
}

/* Whoever may execute the page natively does so no more before it was looked at again. What others ask of the caller meanwhile is
 * done if it concerns runners, for the instruction under way may go on by its TLB's entries. */
static void stop_executors(struct soft_vm *vm, struct soft_vcpu *by, struct soft_slot *slot, uint64_t page, uint16_t who)
{
    struct soft_parallel *p = vm->parallel;
    uint32_t served[SOFT_MAX_VCPUS];
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        if ((who >> i & 1) && vm->vcpus[i] != by)
            served[i] = ask_to_stop(vm->vcpus[i], slot, page);
    if (!by)
        return;
    if (who >> by->index & 1) {
        if (by->direct)
            soft_direct_code_written(by, slot->gpa + (page << 12));
        clear_executor(by, slot->gpa + (page << 12));
    }
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        if (!(who >> i & 1) || i == by->index)
            continue;
        struct question q = { vm->vcpus[i], by, served[i] };
        for (unsigned turn = 0; !is_stopped(&q);) {
            pthread_mutex_lock(&by->own.inbox.lock);
            stop_executing(by);
            pthread_mutex_unlock(&by->own.inbox.lock);
            soft_wait_for_change(p, &turn, stopped_or_asked, &q);
        }
    }
}

/* Whether this vCPU's runner may not have stopped yet for what was written. */
static bool owes_stop(const struct soft_vm *vm, struct soft_vcpu *c)
{
    if (!vm->parallel)
        return soft_events_pending(vm) && c->direct && soft_direct_runs(c);
    return c != soft_of_this_thread && !soft_is_outside(c) && __atomic_load_n(&c->own.inbox.executed_count, __ATOMIC_SEQ_CST);
}

void soft_shared_settle(struct soft_vm *vm)
{
    enum { SETTLE_NS = 1000000, LOOK_NS = 20000 };
    const struct timespec look = { .tv_nsec = LOOK_NS };
    for (uint64_t end = soft_host_now() + SETTLE_NS; soft_host_now() < end; nanosleep(&look, NULL)) {
        bool waits = false;
        for (uint32_t i = 0; i < vm->config.vcpus; i++)
            waits |= owes_stop(vm, vm->vcpus[i]);
        if (!waits)
            return;
    }
}

void soft_shared_execute(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page)
{
    __atomic_fetch_or(&slot->executors[page], (uint16_t)(1u << c->index), __ATOMIC_SEQ_CST);
    protect_page(c, slot, page);
}

bool soft_shared_others_write(const struct soft_vcpu *c, const struct soft_slot *slot, uint64_t page)
{
    return __atomic_load_n(&slot->writers[page], __ATOMIC_SEQ_CST) & ~(1u << c->index);
}

void soft_shared_give_up(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page)
{
    uint64_t gpa = slot->gpa + (page << 12);
    uint16_t who = __atomic_load_n(&slot->code_pages[page], __ATOMIC_SEQ_CST);
    if (who >> c->index & 1)
        soft_blocks_invalidate(c->blocks, gpa, PAGE_BYTES);
    for (uint32_t i = 0; i < c->vm->config.vcpus; i++)
        if (i != c->index && who >> i & 1) {
            post_range(c->vm->vcpus[i], gpa, PAGE_BYTES);
            soft_attend(c->vm->vcpus[i]); /* one that sleeps does it now, too */
        }
}

/* ---- code that is translated ---- */

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
    if (!vm->parallel)
        by = vm->vcpus[0]; /* the only one, and this is the thread that runs it */
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what was written is there before the look */
    uint16_t executors = __atomic_load_n(&slot->executors[page], __ATOMIC_SEQ_CST);
    if (SOFT_UNLIKELY(executors != 0))
        stop_executors(vm, by, slot, page, executors);
    uint16_t who = __atomic_load_n(&slot->code_pages[page], __ATOMIC_SEQ_CST);
    if (!who)
        return;
    if (slot->granules && !(__atomic_load_n(&slot->granules[page], __ATOMIC_SEQ_CST) & soft_granules(low, high < 0xFFF ? high : 0xFFF)))
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
    return !__atomic_load_n(&slot->code_pages[page], __ATOMIC_SEQ_CST) && !__atomic_load_n(&slot->executors[page], __ATOMIC_SEQ_CST);
}
