/* Native code ends in time: by whoever has something for the vCPU (soft_attend()), and by a thread that knows until when each
 * may run. A signal stops the guest half; that it is SIGUSR1 means nothing. Guest code that has blocked signals by a forged return
 * goes on: the kicker ends the process that uses the processor for longer than an honest one can. */
#include "soft/direct/internal.h"

#include <errno.h>
#include <signal.h>
#include <time.h>

enum { NS = 1000000000, AGAIN_NS = 500000 };
/* An honest process stops within microseconds of its own time, but time that a hypervisor below takes from it counts as its own:
 * so much of it, and so many signals, are needed before it is deaf. */
enum { DEAF_NS = 20000000, DEAF_KICKS = 20 };

/* The lock is held: whoever ends the runner takes it before (kick_settle()). */
static void stop(struct direct_vcpu *d)
{
    pid_t pid = __atomic_load_n(&d->running, __ATOMIC_SEQ_CST);
    if (pid > 0)
        kill(pid, SIGUSR1);
}

uint64_t kick_time(pid_t pid)
{
    struct timespec t = {0};
    clock_gettime((clockid_t)(~(unsigned)pid << 3 | 2), &t);
    return (uint64_t)t.tv_sec * NS + (uint64_t)t.tv_nsec;
}

/* The kicker calls this each time it finds the deadline over. Processor time counts only if the stretch is the same before and
 * after the look at it: otherwise the next one may have begun meanwhile, in another process. */
static void insist(struct direct_vcpu *d)
{
    uint64_t stretch = __atomic_load_n(&d->stretch, __ATOMIC_SEQ_CST);
    pid_t pid = __atomic_load_n(&d->running, __ATOMIC_SEQ_CST);
    if (pid <= 0)
        return;
    uint64_t used = kick_time(pid);
    bool same = __atomic_load_n(&d->stretch, __ATOMIC_SEQ_CST) == stretch;
    if (same && d->kicked != stretch) {
        d->kicked = stretch;
        d->kicked_used = used;
        d->kicks = 0;
    }
    bool deaf = same && used > d->kicked_used + DEAF_NS && d->kicks >= DEAF_KICKS;
    /* A mapper that could not carry out a command has ended and answers no more. */
    deaf |= same && !runner_lives(__atomic_load_n(&d->mapper, __ATOMIC_SEQ_CST));
    d->kicks += same;
    kill(pid, deaf ? SIGKILL : SIGUSR1);
}

bool soft_direct_runs(const struct soft_vcpu *c) { return __atomic_load_n(&c->direct->running, __ATOMIC_SEQ_CST) != 0; }

void soft_direct_kick(struct soft_vcpu *c)
{
    struct direct_vm *direct = c->vm->direct;
    if (!soft_direct_runs(c))
        return;
    pthread_mutex_lock(&direct->lock);
    stop(c->direct);
    pthread_mutex_unlock(&direct->lock);
}

static void *kicker(void *argument)
{
    struct soft_vm *vm = argument;
    struct direct_vm *direct = vm->direct;
    soft_host_take_tsc();
    pthread_mutex_lock(&direct->lock);
    while (!direct->kicker_end) {
        uint64_t now = soft_host_now(), next = UINT64_MAX;
        for (uint32_t i = 0; i < vm->config.vcpus; i++) {
            struct direct_vcpu *d = vm->vcpus[i]->direct;
            uint64_t at = d ? __atomic_load_n(&d->deadline, __ATOMIC_SEQ_CST) : UINT64_MAX;
            if (at <= now) {
                insist(d);
                at = now + AGAIN_NS; /* until it is seen to have stopped */
            }
            next = at < next ? at : next;
        }
        __atomic_store_n(&direct->sleeps_until, next, __ATOMIC_SEQ_CST);
        bool again = false; /* one that was set before it could see how long this thread sleeps */
        for (uint32_t i = 0; i < vm->config.vcpus; i++) {
            struct direct_vcpu *d = vm->vcpus[i]->direct;
            uint64_t at = d ? __atomic_load_n(&d->deadline, __ATOMIC_SEQ_CST) : UINT64_MAX;
            again |= at < next && at > now;
        }
        if (again)
            continue;
        if (next == UINT64_MAX) {
            pthread_cond_wait(&direct->cond, &direct->lock);
        } else {
            struct timespec t = {.tv_sec = (time_t)(next / NS), .tv_nsec = (long)(next % NS)};
            pthread_cond_timedwait(&direct->cond, &direct->lock, &t);
        }
    }
    pthread_mutex_unlock(&direct->lock);
    return NULL;
}

bool kick_start(struct direct_vm *direct, struct soft_vm *vm)
{
    pthread_mutex_lock(&direct->lock);
    if (!direct->kicker_started) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        direct->kicker_started = pthread_create(&direct->kicker, NULL, kicker, vm) == 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    bool started = direct->kicker_started;
    pthread_mutex_unlock(&direct->lock);
    return started;
}

void kick_settle(struct direct_vm *direct)
{
    pthread_mutex_lock(&direct->lock);
    pthread_mutex_unlock(&direct->lock);
}

void kick_end(struct direct_vm *direct)
{
    if (!direct->kicker_started)
        return;
    pthread_mutex_lock(&direct->lock);
    direct->kicker_end = true;
    pthread_cond_signal(&direct->cond);
    pthread_mutex_unlock(&direct->lock);
    pthread_join(direct->kicker, NULL);
    direct->kicker_started = false;
}

/* The guest half is about to run until `deadline`. What asks for attention afterwards stops it; what asked before is seen by the
 * caller, who looks at c->attention next. */
void kick_before(struct soft_vm *vm, struct direct_vcpu *d, const struct runner *r, uint64_t deadline)
{
    struct direct_vm *direct = vm->direct;
    __atomic_store_n(&d->stretch, d->stretch + 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&d->mapper, r->mapper, __ATOMIC_SEQ_CST);
    __atomic_store_n(&d->running, r->guest, __ATOMIC_SEQ_CST);
    __atomic_store_n(&d->deadline, deadline, __ATOMIC_SEQ_CST);
    if (deadline < __atomic_load_n(&direct->sleeps_until, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&direct->lock);
        pthread_cond_signal(&direct->cond);
        pthread_mutex_unlock(&direct->lock);
    }
}

/* It stopped. Who looked at `running` before may still signal it: then it stops once more as it goes on. */
void kick_after(struct direct_vcpu *d)
{
    __atomic_store_n(&d->deadline, UINT64_MAX, __ATOMIC_SEQ_CST);
    __atomic_store_n(&d->running, 0, __ATOMIC_SEQ_CST);
}
