/* The thread loop: states of vCPUs, the queue to the Python loop, waiting, engine threads, alarm, served irqfds.
 * access.c has the table of posted, shadow and ioeventfd addresses.
 *
 * Waking the loop: an eventfd inside an epoll descriptor (the one that the Python loop watches). Posted writes are moderated as
 * network interrupts are: the first wakes the loop at once; when takes bring few of them each, the loop arms a timer
 * and further ones do not signal until it fires (or the queue is half full), so a slow stream costs its vCPU no system
 * call (tests.bench exits: posted).
 */
#define _GNU_SOURCE
#include "native/loop_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    QUEUE_FIRST = 64,        /* events that a new queue holds */
    QUEUE_LIMIT = 16384,     /* posted events in flight; then the writer waits */
    SPIN_MAX_NS = 40000,     /* tests.bench exits: beyond this a sleeping thread costs less than it delays */
    SPIN_MIN_NS = 2000,
    MODERATION_NS = 100000,  /* how long posted writes may gather before the loop looks */
    MODERATION_MAX_NS = 800000, /* the same for a stream that does not end */
    MODERATION_BURST = 8,    /* a take with this many was worth waking for */
    MODERATION_AFTER = 2,    /* takes with fewer in a row, then the stream is moderated */
#ifdef __SANITIZE_ADDRESS__
    STACK_SIZE = 64 << 20,   /* the compiler makes fewer sibling calls then: the software core's handlers nest for a turn */
#else
    STACK_SIZE = 1 << 20,
#endif
    POLL_BATCH = 16,
};

struct lv_irqfd {
    struct lv_irqfd *next;
    int user_fd, fd, resample_fd; /* fd and resample_fd are our duplicates; resample_fd -1: edge */
    uint32_t gsi;
    bool asserted;
};

static _Atomic int spinners;   /* threads spinning now, over all VMs */
static int spinners_max = -1;  /* processors but one: the loop needs one to answer on */

uint64_t lv_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

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
        pthread_mutex_lock(&vm->lock);
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
        pthread_mutex_lock(&vm->lock);
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
            pthread_mutex_lock(&vm->lock);
        }
    }
    append(vm, event);
    uint64_t taken = vm->take_seq;
    if (waits)
        vm->barriers++;
    if (posted)
        vm->posted_tsc = __builtin_ia32_rdtsc();
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

static void serve_irqfd(struct lv_vm *vm, struct lv_irqfd *irqfd)
{
    uint64_t count;
    if (read(irqfd->fd, &count, sizeof count) != sizeof count)
        return;
    for (uint32_t i = 0; i < vm->route_count; i++) {
        if (vm->routes[i].gsi == irqfd->gsi) {
            vm->ops->signal_msi(vm, vm->routes[i].address, vm->routes[i].data);
            return;
        }
    }
    if (irqfd->gsi >= 24)
        return; /* an MSI GSI without a route: the message has nowhere to go */
    if (irqfd->resample_fd >= 0) {
        pthread_mutex_lock(&vm->lock);
        irqfd->asserted = true;
        pthread_mutex_unlock(&vm->lock);
        vm->ops->set_irq(vm, irqfd->gsi, true);
    } else {
        vm->ops->set_irq(vm, irqfd->gsi, true);
        vm->ops->set_irq(vm, irqfd->gsi, false);
    }
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
        uint64_t tsc = __builtin_ia32_rdtsc();
        bool silent = (tsc - vm->posted_tsc) * 3 > tsc - vm->moderation_tsc;
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
    vm->moderation_tsc = __builtin_ia32_rdtsc();
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
    if (vm->irqfds) {
        struct epoll_event ready[POLL_BATCH];
        int n = epoll_wait(vm->poll_fd, ready, POLL_BATCH, 0);
        for (int i = 0; i < n; i++)
            if (ready[i].data.ptr)
                serve_irqfd(vm, ready[i].data.ptr);
    }

    pthread_mutex_lock(&vm->lock);
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
    for (uint32_t i = 0; i < vm->drain.count; i++)
        if (vm->drain.events[i].kind == LV_EVENT_EXIT)
            atomic_store(&vm->vcpus[vm->drain.events[i].vcpu]->state, LV_PARKED);
    *count = vm->drain.count;
    return vm->drain.events;
}

/* ---- exits ---- */

void lv_post_exit(struct lv_vcpu *vcpu, const struct lv_exit *exit)
{
    struct lv_vm *vm = vcpu->vm;
    struct lv_event event = {.kind = LV_EVENT_EXIT, .vcpu = (uint8_t)vcpu->index};
    vcpu->exit = *exit;
    vcpu->wants_value = exit->kind == LV_PORT_IN || exit->kind == LV_MMIO_READ;
    lv_count(vm, exit->kind);
    pthread_mutex_lock(&vm->lock);
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
    if (atomic_fetch_add(&spinners, 1) < spinners_max) {
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
    atomic_fetch_sub(&spinners, 1);
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
    if (lv_clock() - begin < SPIN_MAX_NS + SPIN_MAX_NS / 2)
        engine->spin_ns = SPIN_MAX_NS;
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
    pthread_mutex_lock(&engine->vm->lock);
    lv_push_locked(engine, &event);
}

void lv_eoi(struct lv_vm *vm, uint32_t gsi)
{
    bool lower = false;
    pthread_mutex_lock(&vm->lock);
    for (struct lv_irqfd *i = vm->irqfds; i; i = i->next)
        if (i->gsi == gsi && i->asserted) {
            i->asserted = false;
            lower = true;
        }
    pthread_mutex_unlock(&vm->lock);
    if (!lower)
        return;
    /* Lower first: the owner may raise it again as soon as it hears of the acknowledgement. */
    vm->ops->set_irq(vm, gsi, false);
    pthread_mutex_lock(&vm->lock);
    for (struct lv_irqfd *i = vm->irqfds; i; i = i->next)
        if (i->gsi == gsi && i->resample_fd >= 0) {
            uint64_t one = 1;
            (void)!write(i->resample_fd, &one, sizeof one);
        }
    pthread_mutex_unlock(&vm->lock);
}

/* ---- interrupts and time ---- */

int lv_irqfd(struct lv_vm *vm, int fd, uint32_t gsi, int resample_fd, bool add)
{
    if (vm->ops->irqfd)
        return vm->ops->irqfd(vm, fd, gsi, resample_fd, add);
    struct lv_irqfd **link = &vm->irqfds;
    while (*link && !((*link)->user_fd == fd && (*link)->gsi == gsi))
        link = &(*link)->next;
    if (!add) {
        struct lv_irqfd *gone = *link;
        if (!gone)
            return -ENOENT;
        epoll_ctl(vm->poll_fd, EPOLL_CTL_DEL, gone->fd, NULL);
        pthread_mutex_lock(&vm->lock);
        *link = gone->next;
        pthread_mutex_unlock(&vm->lock);
        close(gone->fd);
        if (gone->resample_fd >= 0)
            close(gone->resample_fd);
        free(gone);
        return 0;
    }
    if (*link)
        return -EEXIST;
    struct lv_irqfd *made = calloc(1, sizeof *made);
    if (!made)
        return -ENOMEM;
    made->user_fd = fd;
    made->gsi = gsi;
    made->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    made->resample_fd = resample_fd < 0 ? -1 : fcntl(resample_fd, F_DUPFD_CLOEXEC, 3);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = made};
    if (made->fd < 0 || (resample_fd >= 0 && made->resample_fd < 0) ||
        epoll_ctl(vm->poll_fd, EPOLL_CTL_ADD, made->fd, &event) < 0) {
        int error = -errno;
        if (made->fd >= 0)
            close(made->fd);
        if (made->resample_fd >= 0)
            close(made->resample_fd);
        free(made);
        return error;
    }
    pthread_mutex_lock(&vm->lock);
    made->next = vm->irqfds;
    vm->irqfds = made;
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

int lv_set_routes(struct lv_vm *vm, const struct lv_route *routes, uint32_t count)
{
    if (vm->ops->set_routes)
        return vm->ops->set_routes(vm, routes, count);
    struct lv_route *copy = malloc(count ? count * sizeof *copy : 1);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, routes, count * sizeof *copy);
    free(vm->routes);
    vm->routes = copy;
    vm->route_count = count;
    return 0;
}

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
    uint64_t at = deadline_ns > UINT64_MAX / 2 ? UINT64_MAX : deadline_ns + vm->start_ns;
    pthread_mutex_lock(&vm->lock);
    vm->alarm_ns = at;
    uint64_t next = at < vm->moderation_ns ? at : vm->moderation_ns;
    pthread_mutex_unlock(&vm->lock);
    arm(vm, next);
    return 0;
}

/* ---- life ---- */

static void *engine_main(void *argument)
{
    struct lv_engine *engine = argument;
    atomic_store(&engine->tid, (int)syscall(SYS_gettid));
    engine->vm->ops->run(engine);
    return NULL;
}

static int engine_start(struct lv_engine *engine)
{
    if (engine->started)
        return 0;
    sigset_t all, before;
    pthread_attr_t attr;
    char name[16] = "vcpu";
    sigfillset(&all);
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_SIZE);
    /* The embedding program's signals belong to its own threads. */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&engine->thread, &attr, engine_main, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    if (error)
        return -error;
    pthread_setname_np(engine->thread, name);
    engine->started = true;
    return 0;
}

int lv_vcpu_resume(struct lv_vcpu *vcpu, uint64_t answer)
{
    if (atomic_load(&vcpu->state) != LV_PARKED || lv_closing(vcpu->vm) || vcpu->vm->pid != getpid())
        return -EBUSY;
    vcpu->answer = answer;
    if (vcpu->has_exit && vcpu->exit.size < 8)
        vcpu->answer &= (1ull << (8 * vcpu->exit.size)) - 1;
    vcpu->has_exit = true; /* from now on there has been one before each park */
    vcpu->wants_value = false;
    atomic_store_explicit(&vcpu->state, LV_RUNNING, memory_order_release);
    if (vcpu->vm->ops->hold)
        vcpu->vm->ops->hold(vcpu, false);
    lv_engine_wake(vcpu->engine);
    int error = engine_start(vcpu->engine); /* last: the thread runs at once */
    if (error)
        atomic_store(&vcpu->state, LV_PARKED);
    return error;
}

void lv_vcpu_kick(struct lv_vcpu *vcpu)
{
    /* Mark first, then look: whichever way this races with resume(), the thread sees the mark or gets the kick. */
    atomic_store(&vcpu->kicked, 1);
    if (atomic_load(&vcpu->state) == LV_PARKED) {
        atomic_store(&vcpu->kicked, 0);
        return;
    }
    if (lv_closing(vcpu->vm) || vcpu->vm->pid != getpid())
        return;
    vcpu->vm->ops->kick(vcpu);
    lv_engine_wake(vcpu->engine);
}

struct lv_vm *lv_vm_create(const struct lv_ops *ops, const struct lv_config *config, int *error)
{
    struct lv_vm *vm = calloc(1, sizeof *vm);
    if (!vm) {
        *error = -ENOMEM;
        return NULL;
    }
    if (spinners_max < 0)
        spinners_max = (int)sysconf(_SC_NPROCESSORS_ONLN) - 1;
    vm->ops = ops;
    vm->config = *config;
    vm->start_ns = lv_clock();
    vm->pid = getpid();
    vm->alarm_ns = vm->timer_ns = vm->moderation_ns = UINT64_MAX;
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&vm->lock, &attr);
    pthread_mutexattr_destroy(&attr);
    vm->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    vm->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    vm->poll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    if (vm->event_fd < 0 || vm->timer_fd < 0 || vm->poll_fd < 0 ||
        epoll_ctl(vm->poll_fd, EPOLL_CTL_ADD, vm->event_fd, &event) < 0 ||
        epoll_ctl(vm->poll_fd, EPOLL_CTL_ADD, vm->timer_fd, &event) < 0)
        *error = -errno;
    else
        *error = ops->vm_create(vm);
    if (*error) {
        vm->ops = NULL;
        lv_vm_destroy(vm);
        return NULL;
    }
    return vm;
}

int lv_vcpu_create(struct lv_vm *vm, uint32_t index)
{
    if (index >= vm->config.vcpus || index >= LV_MAX_VCPUS)
        return -EINVAL;
    if (vm->vcpus[index])
        return -EEXIST;
    struct lv_vcpu *vcpu = calloc(1, sizeof *vcpu);
    struct lv_engine *engine = NULL;
    if (vm->ops->shared_engine && vm->engine_count)
        engine = vm->engines[0];
    else if ((engine = calloc(1, sizeof *engine)))
        engine->spin_ns = SPIN_MAX_NS;
    if (!vcpu || !engine) {
        free(vcpu);
        if (engine && !engine->vm)
            free(engine);
        return -ENOMEM;
    }
    /* A shared engine's thread walks its vCPUs: they must all be there before it starts. */
    int error = engine->started ? -EBUSY : 0;
    vcpu->vm = vm;
    vcpu->index = index;
    vcpu->engine = engine;
    if (!error && vm->ops->vcpu_create)
        error = vm->ops->vcpu_create(vcpu);
    if (error) {
        if (!engine->vm)
            free(engine);
        free(vcpu);
        return error;
    }
    if (!engine->vm) {
        engine->vm = vm;
        vm->engines[vm->engine_count++] = engine;
    }
    engine->vcpus[engine->count++] = vcpu;
    vm->vcpus[index] = vcpu;
    return 0;
}

void lv_vm_stop(struct lv_vm *vm)
{
    atomic_store(&vm->closing, true);
    if (vm->pid != getpid())
        return;
    for (uint32_t i = 0; i < vm->engine_count; i++) {
        struct lv_engine *engine = vm->engines[i];
        if (!engine->started)
            continue;
        for (uint32_t j = 0; j < engine->count; j++)
            vm->ops->kick(engine->vcpus[j]);
        lv_engine_wake(engine);
    }
    for (uint32_t i = 0; i < vm->engine_count; i++) {
        if (vm->engines[i]->started)
            pthread_join(vm->engines[i]->thread, NULL);
        vm->engines[i]->started = false;
    }
}

void lv_vm_destroy(struct lv_vm *vm)
{
    for (uint32_t i = 0; i < LV_MAX_VCPUS; i++) {
        if (vm->vcpus[i] && vm->ops && vm->ops->vcpu_destroy)
            vm->ops->vcpu_destroy(vm->vcpus[i]);
        free(vm->vcpus[i]);
    }
    while (vm->irqfds) {
        struct lv_irqfd *next = vm->irqfds->next;
        close(vm->irqfds->fd);
        if (vm->irqfds->resample_fd >= 0)
            close(vm->irqfds->resample_fd);
        free(vm->irqfds);
        vm->irqfds = next;
    }
    if (vm->ops)
        vm->ops->vm_destroy(vm);
    for (uint32_t i = 0; i < vm->engine_count; i++)
        free(vm->engines[i]);
    lv_table_free(vm);
    free(vm->fill.events);
    free(vm->drain.events);
    free(vm->routes);
    if (vm->event_fd >= 0)
        close(vm->event_fd);
    if (vm->timer_fd >= 0)
        close(vm->timer_fd);
    if (vm->poll_fd >= 0)
        close(vm->poll_fd);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}
