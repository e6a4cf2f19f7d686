/* The thread loop: the queue to the Python loop, waiting for its answers, the alarm. access.c has the table of posted,
 * shadow and ioeventfd addresses, irqfd.c the interrupts that the loop serves, life.c what is made and given back.
 *
 * Waking the loop: an eventfd inside an epoll descriptor (the one that the Python loop watches). Posted writes are moderated as
 * network interrupts are: the first wakes the loop at once; when takes bring few of them each, the loop arms a timer
 * and further ones do not signal until it fires (or the queue is half full), so a slow stream costs its vCPU no system
 * call (tests.bench exits: posted).
 */
#define _GNU_SOURCE
#include "native/loop_internal.h"
#include "soft/hostclock.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    QUEUE_FIRST = 64,        /* events that a new queue holds */
    QUEUE_LIMIT = 16384,     /* posted events in flight; then the writer waits */
    SPIN_MIN_NS = 2000,
    MODERATION_NS = 100000,  /* how long posted writes may gather before the loop looks */
    MODERATION_MAX_NS = 800000, /* the same for a stream that does not end */
    MODERATION_BURST = 8,    /* a take with this many was worth waking for */
    MODERATION_AFTER = 2,    /* takes with fewer in a row, then the stream is moderated */
};

_Atomic int lv_spinners;
_Atomic int lv_spinners_max = -1; /* processors of this process but one: the loop needs one to answer on */

uint64_t lv_clock(void) { return soft_host_now(); }

static long futex(_Atomic uint32_t *word, int op, uint32_t value)
{
    return syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

void lv_engine_wake(struct lv_engine *engine)
{
    atomic_fetch_add(&engine->seq, 1);
    if (atomic_load(&engine->sleeping))
        futex(&engine->seq, FUTEX_WAKE, INT_MAX);
}

void lv_engine_wait(struct lv_engine *engine, uint32_t seq)
{
    lv_tell_put_off(engine);
    atomic_store(&engine->sleeping, 1);
    if (atomic_load(&engine->seq) == seq && !lv_closing(engine->vm)) {
        lv_count(engine->vm, LV_STAT_SLEEP);
        futex(&engine->seq, FUTEX_WAIT, seq);
    }
    atomic_store(&engine->sleeping, 0);
}

/* ---- the queue ---- */

void lv_signal(struct lv_vm *vm)
{
    uint64_t one = 1;
    while (write(vm->event_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* Append under the lock. The queue has room by construction: posted events are limited, and there is at most one exit,
 * barrier and alarm a vCPU. False only when memory ran out. */
static bool append(struct lv_vm *vm, const struct lv_event *event)
{
    struct lv_queue *q = &vm->fill;
    if (q->count == q->room) {
        uint32_t room = q->room ? q->room * 2 : QUEUE_FIRST;
        struct lv_event *grown = realloc(q->events, room * sizeof *grown);
        if (!grown)
            return false;
        q->events = grown;
        q->room = room;
    }
    q->events[q->count++] = *event;
    return true;
}

/* Wait until the loop has taken a queue that was full. */
static void wait_for_room(struct lv_engine *engine)
{
    struct lv_vm *vm = engine->vm;
    lv_count(vm, LV_STAT_POSTED_WAIT);
    for (;;) {
        uint32_t seq = atomic_load(&engine->seq);
        lv_lock(vm);
        bool full = vm->fill.count >= QUEUE_LIMIT;
        if (full)
            vm->room_waiters++;
        pthread_mutex_unlock(&vm->lock);
        if (!full || lv_closing(vm))
            return;
        if (engine->count > 1)
            lv_park_kicked(engine);
        lv_engine_wait(engine, seq);
    }
}

void lv_wait_handled(struct lv_engine *engine, uint64_t taken)
{
    /* The take() after the push hands the event out; the one after that shows that the loop is done with it and with
     * the descriptors that were readable in the same turn. */
    struct lv_vm *vm = engine->vm;
    for (;;) {
        uint32_t seq = atomic_load(&engine->seq);
        lv_lock(vm);
        bool done = vm->take_seq >= taken + 2 || lv_closing(vm);
        if (done)
            vm->barriers--;
        pthread_mutex_unlock(&vm->lock);
        if (done)
            return;
        if (engine->count > 1)
            lv_park_kicked(engine);
        lv_engine_wait(engine, seq);
    }
}

void lv_push_locked(struct lv_engine *engine, const struct lv_event *event)
{
    struct lv_vm *vm = engine->vm;
    bool waits = vm->config.virtual_clock && event->kind != LV_EVENT_EXIT;
    bool posted = event->kind == LV_EVENT_POSTED;
    if (posted) {
        while (vm->fill.count >= QUEUE_LIMIT && !lv_closing(vm)) {
            pthread_mutex_unlock(&vm->lock);
            wait_for_room(engine);
            lv_lock(vm);
        }
    }
    append(vm, event);
    uint64_t taken = vm->take_seq;
    if (waits)
        vm->barriers++;
    if (posted)
        vm->posted_ns = lv_clock();
    bool quiet = posted && !waits && vm->moderated && vm->fill.count < QUEUE_LIMIT / 2;
    bool signal = !quiet && !vm->signalled;
    if (signal)
        vm->signalled = true;
    pthread_mutex_unlock(&vm->lock);
    if (signal)
        lv_signal(vm);
    if (waits)
        lv_wait_handled(engine, taken);
}

static void arm(struct lv_vm *vm, uint64_t when)
{
    if (when == vm->timer_ns)
        return;
    struct itimerspec t = {0};
    if (when != UINT64_MAX) {
        uint64_t at = when ? when : 1; /* zero would disarm */
        t.it_value.tv_sec = (time_t)(at / 1000000000u);
        t.it_value.tv_nsec = (long)(at % 1000000000u);
    }
    timerfd_settime(vm->timer_fd, TFD_TIMER_ABSTIME, &t, NULL);
    vm->timer_ns = when;
}

/* Whether posted writes are to signal from now on; under the lock, `taken` is what this take found. */
static void moderate(struct lv_vm *vm, const struct lv_queue *taken, bool timer_fired, uint64_t now)
{
    uint32_t posted = 0;
    for (uint32_t i = 0; i < taken->count && posted < MODERATION_BURST; i++)
        posted += taken->events[i].kind == LV_EVENT_POSTED;
    if (vm->config.virtual_clock)
        return;
    if (!vm->moderated) {
        if (!posted)
            return;
        vm->sparse_takes = posted < MODERATION_BURST ? vm->sparse_takes + 1 : 0;
        if (vm->sparse_takes < MODERATION_AFTER)
            return;
        now = now ? now : lv_clock();
        vm->moderation_window = MODERATION_NS;
    } else {
        vm->posted_since_timer |= posted != 0;
        if (!timer_fired || now < vm->moderation_ns)
            return;
        /* A guest that has fallen silent may wait for what its last write does: then let the next one signal. */
        uint64_t at = lv_clock();
        bool silent = (at - vm->posted_ns) * 3 > at - (vm->moderation_ns - vm->moderation_window);
        if (!vm->posted_since_timer || silent) {
            vm->moderated = false;
            vm->moderation_ns = UINT64_MAX;
            vm->sparse_takes = 0;
            return;
        }
        if (vm->moderation_window < MODERATION_MAX_NS)
            vm->moderation_window *= 2;
    }
    vm->moderated = true;
    vm->posted_since_timer = false;
    vm->moderation_ns = now + vm->moderation_window;
}

const struct lv_event *lv_vm_take(struct lv_vm *vm, uint32_t *count)
{
    uint64_t ignored, now = 0;
    bool timer_fired = false;
    /* Always read: an engine sets `signalled` before it writes, so the write may still be on its way. */
    (void)!read(vm->event_fd, &ignored, sizeof ignored);
    if (vm->timer_ns != UINT64_MAX && (now = lv_clock()) >= vm->timer_ns) {
        (void)!read(vm->timer_fd, &ignored, sizeof ignored);
        vm->timer_ns = UINT64_MAX;
        timer_fired = true;
    }
    if (vm->irqfds)
        lv_irqfds_serve(vm);

    lv_lock(vm);
    vm->drain.count = 0;
    struct lv_queue taken = vm->fill;
    vm->fill = vm->drain;
    vm->drain = taken;
    vm->take_seq++;
    vm->signalled = false;
    bool wake = vm->barriers || vm->room_waiters;
    vm->room_waiters = 0;
    /* An engine waits for the loop to come again: make sure that it does. */
    bool again = vm->barriers != 0;
    if (again)
        vm->signalled = true;
    moderate(vm, &taken, timer_fired, now);
    bool alarm = vm->alarm_ns != UINT64_MAX && timer_fired && now >= vm->alarm_ns;
    if (alarm) {
        struct lv_event event = {.kind = LV_EVENT_ALARM};
        struct lv_queue fill = vm->fill; /* append to the drained queue, after what came before */
        vm->fill = vm->drain;
        append(vm, &event);
        vm->drain = vm->fill;
        vm->fill = fill;
        vm->alarm_ns = UINT64_MAX;
    }
    uint64_t next = vm->alarm_ns < vm->moderation_ns ? vm->alarm_ns : vm->moderation_ns;
    pthread_mutex_unlock(&vm->lock);

    arm(vm, next);
    if (again)
        lv_signal(vm);
    if (wake)
        for (uint32_t i = 0; i < vm->engine_count; i++)
            lv_engine_wake(vm->engines[i]);
    vm->exits_taken = false;
    for (uint32_t i = 0; i < vm->drain.count; i++) {
        if (vm->drain.events[i].kind == LV_EVENT_EXIT) {
            atomic_store(&vm->vcpus[vm->drain.events[i].vcpu]->state, LV_PARKED);
            vm->exits_taken = true;
        }
    }
    /* Adaptive, as wait_for_answer() is. */
    if (vm->exits_taken && vm->linger_ns < LV_LINGER_MAX_NS &&
        lv_clock() - vm->lingered_ns < LV_LINGER_MAX_NS + LV_LINGER_MAX_NS / 2)
        vm->linger_ns = LV_LINGER_MAX_NS;
    *count = vm->drain.count;
    return vm->drain.events;
}

/* A vCPU that was answered often exits again at once (a driver that probes a device), and a thread that sleeps in epoll
 * then costs a wake-up across processors, which is more than the exit itself. */
void lv_vm_linger(struct lv_vm *vm)
{
    if (!vm->exits_taken || vm->config.virtual_clock || lv_spinners_max < 1)
        return;
    uint64_t begin = vm->lingered_ns = lv_clock(), end = begin + vm->linger_ns;
    if (vm->linger_ns < SPIN_MIN_NS || atomic_load_explicit(&lv_spinners, memory_order_relaxed))
        return; /* a thread that spins waits for an answer, perhaps of this loop */
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&vm->signalled, memory_order_acquire) || lv_closing(vm))
                return;
            __builtin_ia32_pause();
        }
    } while (lv_clock() < end);
    vm->linger_ns /= 2;
}

/* ---- exits ---- */

void lv_post_exit(struct lv_vcpu *vcpu, const struct lv_exit *exit)
{
    struct lv_vm *vm = vcpu->vm;
    struct lv_event event = {.kind = LV_EVENT_EXIT, .vcpu = (uint8_t)vcpu->index};
    lv_tell_put_off(vcpu->engine); /* doorbells that were rung before come first */
    vcpu->exit = *exit;
    vcpu->wants_value = exit->kind == LV_PORT_IN || exit->kind == LV_MMIO_READ;
    lv_count(vm, exit->kind);
    if (exit->kind != LV_INTERRUPTED)
        lv_remember(vcpu, (uint8_t)exit->kind, (uint8_t)exit->size, exit->kind <= LV_MMIO_WRITE ? exit->address : exit->rip,
                    exit->kind <= LV_MMIO_WRITE ? exit->value : exit->code, LV_PAST_WAITS);
    lv_lock(vm);
    atomic_store(&vcpu->state, LV_QUEUED);
    lv_push_locked(vcpu->engine, &event);
}

uint32_t lv_park_kicked(struct lv_engine *engine)
{
    static const struct lv_exit interrupted = {.kind = LV_INTERRUPTED};
    uint32_t running = 0;
    for (uint32_t i = 0; i < engine->count; i++) {
        struct lv_vcpu *vcpu = engine->vcpus[i];
        if (!lv_running(vcpu) || vcpu == engine->waiting) /* one in an access is not between instructions */
            continue;
        if (!vcpu->unfinished && atomic_exchange(&vcpu->kicked, 0)) {
            if (engine->vm->ops->hold)
                engine->vm->ops->hold(vcpu, true);
            lv_post_exit(vcpu, &interrupted);
        } else {
            running++;
        }
    }
    return running;
}

/* Spin for the answer: the loop's thread often gives it within 20 us, and sleeping costs about as much again. */
static void spin(struct lv_engine *engine, uint32_t seq)
{
    if (engine->spin_ns < SPIN_MIN_NS)
        return;
    if (atomic_fetch_add(&lv_spinners, 1) < lv_spinners_max) {
        uint64_t end = lv_clock() + engine->spin_ns;
        do {
            for (int i = 0; i < 16; i++) {
                __builtin_ia32_pause();
                if (atomic_load_explicit(&engine->seq, memory_order_acquire) != seq)
                    goto out;
            }
        } while (lv_clock() < end);
    }
out:
    atomic_fetch_sub(&lv_spinners, 1);
}

static void wait_for_answer(struct lv_vcpu *vcpu, uint32_t seq, bool may_spin)
{
    struct lv_engine *engine = vcpu->engine;
    uint64_t begin = may_spin ? lv_clock() : 0;
    while (!lv_running(vcpu) && !lv_closing(vcpu->vm)) {
        if (engine->count > 1)
            lv_park_kicked(engine);
        if (may_spin)
            spin(engine, seq);
        lv_engine_wait(engine, seq);
        seq = atomic_load(&engine->seq);
    }
    if (!may_spin)
        return;
    /* Adaptive: as long as answers come within the limit it pays to spin for them. */
    if (lv_clock() - begin < LV_SPIN_MAX_NS + LV_SPIN_MAX_NS / 2)
        engine->spin_ns = LV_SPIN_MAX_NS;
    else if (engine->spin_ns)
        engine->spin_ns /= 2;
}

uint64_t lv_ask(struct lv_vcpu *vcpu, const struct lv_exit *exit, bool may_spin)
{
    struct lv_engine *engine = vcpu->engine;
    struct lv_vcpu *outer = engine->waiting;
    engine->waiting = vcpu;
    uint32_t seq = atomic_load(&engine->seq);
    lv_post_exit(vcpu, exit);
    wait_for_answer(vcpu, seq, may_spin);
    engine->waiting = outer;
    return lv_running(vcpu) ? vcpu->answer : UINT64_MAX;
}

void lv_park(struct lv_vcpu *vcpu, const struct lv_exit *exit)
{
    lv_ask(vcpu, exit, false);
}

void lv_alarm_due(struct lv_engine *engine)
{
    struct lv_event event = {.kind = LV_EVENT_ALARM};
    lv_lock(engine->vm);
    lv_push_locked(engine, &event);
}

/* ---- time ---- */

uint64_t lv_vm_now(struct lv_vm *vm)
{
    return vm->ops->now ? vm->ops->now(vm) : lv_clock() - vm->start_ns;
}

int lv_vm_set_alarm(struct lv_vm *vm, uint64_t deadline_ns)
{
    if (vm->ops->set_alarm) {
        int r = vm->ops->set_alarm(vm, deadline_ns);
        if (r != -ENOSYS)
            return r;
    }
    /* start_ns may be "before 0": a restored VM's time can be more than this host's. */
    uint64_t now = lv_clock() - vm->start_ns, left = deadline_ns > now ? deadline_ns - now : 0;
    uint64_t at = deadline_ns > UINT64_MAX / 2 ? UINT64_MAX : lv_clock() + left;
    lv_lock(vm);
    vm->alarm_ns = at;
    uint64_t next = at < vm->moderation_ns ? at : vm->moderation_ns;
    pthread_mutex_unlock(&vm->lock);
    arm(vm, next);
    return 0;
}
