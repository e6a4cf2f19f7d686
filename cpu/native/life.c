/* The life of VMs, vCPUs and engine threads: made, resumed, kicked, stopped, given back. */
#define _GNU_SOURCE
#include "native/loop_internal.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum {
#ifdef __SANITIZE_ADDRESS__
    STACK_SIZE = 64 << 20,   /* instrumented code has fewer tail calls: handlers of the software core nest for a turn */
#else
    STACK_SIZE = 1 << 20,
#endif
};

uint32_t lv_generation;

static void forked(void)
{
    lv_generation++;
    lv_spinners = 0; /* the parent's threads do not exist in the child */
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forked); }

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
    if (!engine->vm->shared_engine) /* its name tells users of tools such as top which vCPU it runs */
        snprintf(name, sizeof name, "vcpu%u", engine->vcpus[0]->index);
    pthread_setname_np(engine->thread, name);
    engine->started = true;
    return 0;
}

int lv_vcpu_resume(struct lv_vcpu *vcpu, uint64_t answer, bool park)
{
    if (atomic_load(&vcpu->state) != LV_PARKED || lv_closing(vcpu->vm) || lv_forked(vcpu->vm))
        return -EBUSY;
    vcpu->answer = answer;
    if (vcpu->has_exit && vcpu->exit.size < 8)
        vcpu->answer &= (1ull << (8 * vcpu->exit.size)) - 1;
    lv_remember_answer(vcpu, vcpu->answer);
    vcpu->has_exit = true; /* the vCPU will not be fresh any more when it parks */
    vcpu->wants_value = false;
    if (park) {
        /* Before the thread may go on, so that it finds the mark at the end of the instruction that it is in. */
        atomic_store(&vcpu->kicked, 1);
        vcpu->vm->ops->kick(vcpu);
    }
    atomic_store_explicit(&vcpu->state, LV_RUNNING, memory_order_release);
    if (vcpu->vm->ops->hold)
        vcpu->vm->ops->hold(vcpu, false);
    lv_engine_wake(vcpu->engine);
    int error = engine_start(vcpu->engine); /* last: the thread runs at once */
    if (error) {
        atomic_store(&vcpu->state, LV_PARKED);
        atomic_store(&vcpu->kicked, 0);
    }
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
    if (lv_closing(vcpu->vm) || lv_forked(vcpu->vm))
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
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    if (lv_spinners_max < 0) {
        cpu_set_t allowed;
        lv_spinners_max = sched_getaffinity(0, sizeof allowed, &allowed) ? 0 : CPU_COUNT(&allowed) - 1;
    }
    vm->ops = ops;
    vm->config = *config;
    vm->start_ns = lv_clock();
    vm->generation = lv_generation;
    vm->alarm_ns = vm->timer_ns = vm->moderation_ns = UINT64_MAX;
    vm->linger_ns = LV_LINGER_MAX_NS;
    pthread_mutex_init(&vm->lock, NULL);
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
    if (vm->shared_engine && vm->engine_count)
        engine = vm->engines[0];
    else if ((engine = calloc(1, sizeof *engine)))
        engine->spin_ns = LV_SPIN_MAX_NS;
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
    if (lv_forked(vm))
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
    if (lv_forked(vm)) {
        pthread_mutex_init(&vm->lock, NULL); /* whoever held it is not here to give it up */
        if (vm->ops && vm->ops->forked)
            vm->ops->forked(vm);
    }
    for (uint32_t i = 0; i < LV_MAX_VCPUS; i++) {
        if (vm->vcpus[i] && vm->ops && vm->ops->vcpu_destroy)
            vm->ops->vcpu_destroy(vm->vcpus[i]);
        free(vm->vcpus[i]);
    }
    lv_irqfds_free(vm);
    if (vm->ops)
        vm->ops->vm_destroy(vm);
    for (uint32_t i = 0; i < vm->engine_count; i++)
        free(vm->engines[i]);
    lv_table_free(vm);
    free(vm->fill.events);
    free(vm->drain.events);
    if (vm->event_fd >= 0)
        close(vm->event_fd);
    if (vm->timer_fd >= 0)
        close(vm->timer_fd);
    if (vm->poll_fd >= 0)
        close(vm->poll_fd);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}
