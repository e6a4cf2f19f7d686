/* Direct execution of a VM is switched on and off here, and whether this host can is found out. */
#define _GNU_SOURCE
#include "soft/direct/internal.h"

#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE_SLICE = 500, FLOOR_NS = 4000 };

static bool is_amd(void)
{
    unsigned most, b = 0, c = 0, d = 0;
    return __get_cpuid(0, &most, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
}

/* Intel APX Architecture Specification, 3.1.4.1. */
static bool has_apx(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (d >> 21 & 1);
}

static void free_direct(struct soft_vm *vm)
{
    struct direct_vm *direct = vm->direct;
    if (!direct)
        return;
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        struct direct_vcpu *d = vm->vcpus[i] ? vm->vcpus[i]->direct : NULL;
        for (unsigned n = 0; d && n < RUNNERS; n++)
            pages_forget(&d->runner[n]);
        free(d);
        if (vm->vcpus[i])
            vm->vcpus[i]->direct = NULL;
    }
    if (direct->memory_fd >= 0)
        close(direct->memory_fd);
    free(direct->writable);
    free(direct);
    vm->direct = NULL;
}

/* No thread is inside soft_vm_run(). Any thread of this process may end runners, not only the one that made them. */
static void close_runners(struct soft_vm *vm)
{
    kick_settle(vm->direct);
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        struct direct_vcpu *d = vm->vcpus[i]->direct;
        for (unsigned n = 0; d && n < RUNNERS; n++)
            if (d->runner[n].mapper)
                runner_close(&d->runner[n]);
        if (d)
            d->current = NULL;
    }
}

void soft_direct_destroy(struct soft_vm *vm)
{
    if (!vm->direct)
        return;
    kick_end(vm->direct);
    close_runners(vm);
    free_direct(vm);
}

void soft_direct_forked(struct soft_vm *vm)
{
    /* The processes, the thread and the lock's owners are the parent's. The descriptor is this process's own copy. */
    if (!vm->direct)
        return;
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        for (unsigned n = 0; vm->vcpus[i]->direct && n < RUNNERS; n++)
            runner_forget(&vm->vcpus[i]->direct->runner[n]);
    vm->direct->kicker_started = false;
    free_direct(vm);
}

int soft_vm_set_direct(struct soft_vm *vm, const struct soft_direct_memory *memory, uint32_t count, int fd, const char *program,
                       bool always)
{
    if (vm->direct) {
        if (count || fd >= 0)
            return -EBUSY;
        __atomic_store_n(&vm->direct->off, true, __ATOMIC_RELAXED);
        close_runners(vm);
        return 0;
    }
    if (fd < 0)
        return 0;
    if (vm->config.virtual_clock || (vm->config.vcpus > 1 && !vm->parallel) || !count || count > 4 || strlen(program) >= sizeof vm->direct->stub)
        return -EINVAL;
    struct direct_vm *direct = calloc(1, sizeof *direct);
    if (!direct)
        return -ENOMEM;
    vm->direct = direct;
    direct->memory_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    direct->sleeps_until = 0;
    direct->always = always;
    direct->runners = RUNNERS_ALL / vm->config.vcpus;
    if (direct->runners > RUNNERS)
        direct->runners = RUNNERS;
    if (direct->runners < RUNNERS_LEAST)
        direct->runners = RUNNERS_LEAST;
    direct->sysenter = !is_amd();
    direct->rex2 = has_apx();
    direct->page_slice = PAGE_SLICE;
    strcpy(direct->stub, program);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&direct->lock, NULL);
    pthread_cond_init(&direct->cond, &attributes);
    pthread_condattr_destroy(&attributes);
    uint64_t end = 0;
    for (uint32_t i = 0; i < count; i++) {
        direct->ranges[i] = (struct direct_range){memory[i].host, memory[i].size, memory[i].offset};
        end = memory[i].offset + memory[i].size > end ? memory[i].offset + memory[i].size : end;
    }
    direct->range_count = count;
    direct->writable = calloc((end >> 15) + 1, 1);
    bool ok = direct->memory_fd >= 0 && direct->writable;
    for (uint32_t i = 0; ok && i < vm->config.vcpus; i++) {
        struct direct_vcpu *d = calloc(1, sizeof *d);
        if ((ok = d != NULL)) {
            d->bound = -1;
            d->floor_ns[false] = FLOOR_NS;
            d->floor_ns[true] = 2 * FLOOR_NS;
            d->deadline = d->kicked = UINT64_MAX;
            vm->vcpus[i]->direct = d;
        }
    }
    ok = ok && soft_slots_know_users(vm) == 0;
    if (!ok)
        free_direct(vm);
    return ok ? 0 : -ENOMEM;
}

int soft_direct_probe(const char *program, char *why, size_t size)
{
    struct direct_vm *direct = calloc(1, sizeof *direct);
    struct runner *r = calloc(1, sizeof *r);
    const char *step = "memory";
    int result = -ENOMEM;
    if (direct && r && strlen(program) < sizeof direct->stub) {
        strcpy(direct->stub, program);
        direct->memory_fd = memfd_create("runner-probe", MFD_CLOEXEC);
        result = direct->memory_fd < 0 ? -errno : runner_open(direct, r, true, &step);
        if (result >= 0) {
            result = (direct->cpuid_faults ? SOFT_DIRECT_CPUID_FAULTS : 0) | (guard_any(r) ? SOFT_DIRECT_BREAKPOINTS : 0);
            runner_close(r);
        }
        if (direct->memory_fd >= 0)
            close(direct->memory_fd);
    }
    if (result < 0)
        snprintf(why, size, "%s: %s", step, strerror(-result));
    free(direct);
    free(r);
    return result;
}

void soft_direct_stats(const struct soft_vm *vm, struct soft_native_stats *stats)
{
    memset(stats, 0, sizeof *stats);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        for (unsigned n = 0; vm->vcpus[i]->direct && n < sizeof *stats / sizeof(uint64_t); n++)
            ((uint64_t *)stats)[n] += ((const uint64_t *)&vm->vcpus[i]->direct->counts)[n];
}
