/* The software core behind the thread loop: one native thread runs all vCPUs of a VM (soft_vm_run()), or each has its own
 * (soft_vcpu_run()).
 *
 * Who may touch the VM: soft.h allows most calls only while no thread executes guest code. `guest` is held by the
 * engine while it does, and given up around every access that may wait for the loop, so that the loop can read a parked vCPU's state
 * while others run: enter() takes it, making the engine leave guest code first.
 *
 * An access that waits for the loop is put off (soft_vcpu_defer()), so that the other vCPUs of the VM go on. Where there is
 * no other, and with the virtual clock (where what the others do meanwhile would depend on timing), the thread waits in it.
 *
 * A vCPU with a thread of its own waits in its accesses, outside of the guest; enter() then makes all threads leave guest code.
 */
#define _GNU_SOURCE
#include "native/loop.h"
#include "soft/hostclock.h"
#include "soft/run/entropy.h"
#include "soft/soft.h"

#include <assert.h>
#include <errno.h>
#include <linux/kvm.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    TSC_KHZ = 1000000,
    QUANTUM = 50000,       /* instructions a turn: under 1 ms also where the core is slow */
};

struct backend {
    struct soft_vm *soft;
    struct lv_vm *vm;
    pthread_mutex_t guest;
    _Atomic uint32_t wanted;      /* threads waiting in enter() */
    struct soft_entropy entropy;
    pthread_mutex_t entropy_lock;
    bool parallel;                /* each vCPU has an engine of its own */
    /* Every vCPU halted for good. Set before the last look at the guest, so that who raises an interrupt either is seen
     * by that look or sees this. */
    _Atomic bool idle;
    _Atomic int accessing;        /* the vCPU that waits inside an access, or -1 */
    bool defers;                  /* accesses are put off */
    struct soft_stats told;       /* the last that stats() gave */
    struct soft_native_stats told_native;
    bool halt_told;               /* Halt was reported at this number of instructions */
    uint64_t halt_instructions;
};

static struct backend *of(struct lv_vm *vm) { return vm->core; }

/* ---- who is in the guest ---- */

static void enter(struct backend *b)
{
    if (b->parallel) {
        soft_vm_stop_all(b->soft);
        return;
    }
    atomic_fetch_add(&b->wanted, 1);
    if (pthread_mutex_trylock(&b->guest)) {
        soft_vm_wake(b->soft);
        pthread_mutex_lock(&b->guest);
    }
    atomic_fetch_sub(&b->wanted, 1);
}

/* enter(), unless the engine does not leave guest code soon: it may wait in a page fault for memory of another host. */
static bool enter_soon(struct backend *b)
{
    struct timespec until;
    if (b->parallel)
        return soft_vm_try_stop_all(b->soft, 5000000);
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 5000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    atomic_fetch_add(&b->wanted, 1);
    int busy = pthread_mutex_trylock(&b->guest);
    if (busy) {
        soft_vm_wake(b->soft);
        busy = pthread_mutex_timedlock(&b->guest, &until);
    }
    atomic_fetch_sub(&b->wanted, 1);
    return !busy;
}

/* As enter(), to read state: interrupts that were sent while all vCPUs were parked belong to it. */
static void enter_to_read(struct backend *b)
{
    enter(b);
    if (!b->parallel && atomic_load(&b->accessing) < 0)
        soft_vm_settle(b->soft);
}

static void leave(struct backend *b)
{
    if (b->parallel)
        soft_vm_go(b->soft);
    else
        pthread_mutex_unlock(&b->guest);
}

/* The engine's way back in: others first, since a mutex is not fair. */
static void enter_guest(struct backend *b)
{
    while (atomic_load(&b->wanted))
        sched_yield();
    pthread_mutex_lock(&b->guest);
}

/* Something that could wake a halted VM. */
static void happened(struct lv_vm *vm)
{
    if (!atomic_load(&of(vm)->idle))
        return;
    for (uint32_t i = 0; i < vm->engine_count; i++)
        lv_engine_wake(vm->engines[i]);
}

/* ---- what the core asks for, on the engine's thread ---- */

static uint64_t on_access(void *ctx, const struct soft_access *a)
{
    struct backend *b = ctx;
    struct lv_access access = {.address = a->address, .value = a->value, .size = a->size,
                               .space = a->port ? LV_PORT : LV_MMIO, .write = a->write};
    if (a->size < 8)
        access.value &= (1ull << (8 * a->size)) - 1;
    struct lv_vcpu *vcpu = b->vm->vcpus[a->vcpu];
    uint64_t value;
    if (b->parallel) {
        soft_vcpu_outside(b->soft, a->vcpu);
        value = lv_access(vcpu, &access);
        soft_vcpu_inside(b->soft, a->vcpu);
        if (atomic_load(&vcpu->kicked))
            soft_vm_wake_now(b->soft, a->vcpu);
        return value;
    }
    if (a->retry) {
        vcpu->unfinished = false;
        if (atomic_load(&vcpu->kicked))
            soft_vm_wake_now(b->soft, a->vcpu); /* it could not park for that kick before this access was complete */
        return vcpu->answer;
    }
    b->accessing = a->vcpu;
    leave(b);
    if (!b->defers) {
        value = lv_access(vcpu, &access);
        if (atomic_load(&vcpu->kicked))
            soft_vm_wake_now(b->soft, a->vcpu);
    } else if (!lv_try_access(vcpu, &access, &value)) {
        if (soft_vcpu_defer(b->soft, a->vcpu)) {
            struct lv_exit exit = lv_access_exit(&access);
            b->accessing = -1; /* from here on resume() unparks it */
            vcpu->unfinished = true;
            lv_post_exit(vcpu, &exit);
        } else {
            value = lv_access(vcpu, &access);
        }
    }
    enter_guest(b);
    b->accessing = -1;
    return value;
}

static void on_random(void *ctx, void *buffer, size_t size)
{
    struct backend *b = ctx;
    pthread_mutex_lock(&b->entropy_lock);
    soft_entropy_fill(&b->entropy, buffer, size);
    pthread_mutex_unlock(&b->entropy_lock);
}

static void on_eoi(void *ctx, uint32_t gsi) { lv_eoi(((struct backend *)ctx)->vm, gsi); }

static void on_between(void *ctx, uint32_t vcpu)
{
    struct backend *b = ctx;
    struct lv_engine *engine = b->vm->shared_engine ? b->vm->engines[0] : b->vm->vcpus[vcpu]->engine;
    if (!lv_has_put_off(engine))
        return;
    if (b->parallel)
        soft_vcpu_outside(b->soft, vcpu);
    else
        leave(b);
    lv_tell_put_off(engine);
    if (b->parallel)
        soft_vcpu_inside(b->soft, vcpu);
    else
        enter_guest(b);
}

/* ---- the engine ---- */

static void post(struct lv_engine *engine, uint32_t index, struct lv_exit exit)
{
    soft_vcpu_park(of(engine->vm)->soft, index, true);
    lv_post_exit(engine->vm->vcpus[index], &exit);
}

static struct lv_exit debug_exit(struct backend *b, uint32_t index)
{
    struct lv_exit exit = {.kind = LV_DEBUG, .extra = 1 /* #DB */};
    struct kvm_regs regs = {0};
    soft_vcpu_get(b->soft, index, SOFT_STATE_REGS, &regs, sizeof regs);
    exit.rip = regs.rip;
    switch (soft_vcpu_debug_reason(b->soft, index, &exit.address)) {
    case SOFT_DEBUG_STEP: exit.code = LV_DR6_STEP, exit.address = 0; break;
    case SOFT_DEBUG_INT3: exit.extra = 3 /* #BP */, exit.address = 0; break;
    case SOFT_DEBUG_EXECUTE: case SOFT_DEBUG_WATCH: exit.code = 1; break;
    }
    return exit;
}

/* All vCPUs halted with interrupts off, or wait for SIPI. Tell it once, of each, then sleep until something happens that
 * might wake one. `running`: of the engine's vCPUs. */
static void halted(struct lv_engine *engine, uint32_t seq, uint32_t running)
{
    struct backend *b = of(engine->vm);
    uint64_t instructions = soft_vm_instructions(b->soft);
    if (!atomic_exchange(&b->idle, true))
        return; /* look again */
    if (running == engine->count && !(b->halt_told && b->halt_instructions == instructions)) {
        b->halt_told = true;
        b->halt_instructions = instructions;
        for (uint32_t i = 0; i < engine->count; i++)
            post(engine, engine->vcpus[i]->index, (struct lv_exit){.kind = LV_HALT});
        return;
    }
    lv_engine_wait(engine, seq);
}

static void run_one(struct lv_engine *engine);

static void run(struct lv_engine *engine)
{
    struct lv_vm *vm = engine->vm;
    struct backend *b = of(vm);
    engine->puts_off = !vm->config.virtual_clock; /* there the loop is waited for */
    if (b->parallel) {
        run_one(engine);
        return;
    }
    while (!lv_closing(vm)) {
        uint32_t seq = atomic_load(&engine->seq), index = 0;
        for (uint32_t i = 0; i < engine->count; i++)
            if (engine->vcpus[i]->unfinished)
                engine->vcpus[i]->unfinished = soft_vcpu_deferred(b->soft, engine->vcpus[i]->index);
        uint32_t running = lv_park_kicked(engine);
        /* With the virtual clock time stands still while any vCPU is parked: how far the others get would be chance. */
        if (!running || (vm->config.virtual_clock && running < engine->count)) {
            lv_engine_wait(engine, seq);
            continue;
        }
        enter_guest(b);
        enum soft_stop stop = soft_vm_run(b->soft, &index);
        struct lv_exit debug = {0};
        if (stop == SOFT_STOP_DEBUG)
            debug = debug_exit(b, index);
        leave(b);
        if (stop != SOFT_STOP_HALTED)
            atomic_store(&b->idle, false);
        switch (stop) {
        case SOFT_STOP_WAKE:
            break;
        case SOFT_STOP_ALARM:
            lv_alarm_due(engine);
            break;
        case SOFT_STOP_HALTED:
            halted(engine, seq, running);
            break;
        case SOFT_STOP_SHUTDOWN:
            post(engine, index, (struct lv_exit){.kind = LV_SHUTDOWN});
            break;
        case SOFT_STOP_DEBUG:
            post(engine, index, debug);
            break;
        case SOFT_STOP_ERROR: /* a host fault; KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON is the nearest */
            post(engine, index, (struct lv_exit){.kind = LV_INTERNAL_ERROR, .code = 4});
            break;
        }
    }
}

/* The engine of a vCPU that has one for itself. */
static void run_one(struct lv_engine *engine)
{
    struct lv_vcpu *vcpu = engine->vcpus[0];
    struct backend *b = of(engine->vm);
    while (!lv_closing(engine->vm)) {
        uint32_t seq = atomic_load(&engine->seq);
        if (!lv_park_kicked(engine)) {
            lv_engine_wait(engine, seq);
            continue;
        }
        struct lv_exit exit = {0};
        switch (soft_vcpu_run(b->soft, vcpu->index)) {
        case SOFT_STOP_WAKE: case SOFT_STOP_ALARM:
            continue;
        case SOFT_STOP_HALTED:
            exit = (struct lv_exit){.kind = LV_HALT};
            break;
        case SOFT_STOP_SHUTDOWN:
            exit = (struct lv_exit){.kind = LV_SHUTDOWN};
            break;
        case SOFT_STOP_DEBUG:
            exit = debug_exit(b, vcpu->index);
            break;
        case SOFT_STOP_ERROR:
            exit = (struct lv_exit){.kind = LV_INTERNAL_ERROR, .code = 4};
            break;
        }
        lv_park(vcpu, &exit);
    }
}

static void kick(struct lv_vcpu *vcpu)
{
    struct backend *b = of(vcpu->vm);
    if (b->parallel)
        soft_vcpu_wake(b->soft, vcpu->index);
    else
        soft_vm_wake(b->soft);
}

static void hold(struct lv_vcpu *vcpu, bool held)
{
    struct backend *b = of(vcpu->vm);
    if (b->parallel)
        return; /* its thread waits until it is RUNNING */
    if (b->accessing == (int)vcpu->index)
        return; /* its thread waits for the answer: waking it by other means would make its turn's end depend on timing */
    soft_vcpu_park(b->soft, vcpu->index, held);
    if (!held)
        soft_vm_wake(b->soft);
}

/* ---- life ---- */

/* The loop's timer descriptor counts from start_ns: keep it where the core's time 0 is. */
static void align_clock(struct lv_vm *vm)
{
    vm->start_ns = soft_host_now() - soft_vm_now(of(vm)->soft);
}

static int vm_create(struct lv_vm *vm)
{
    const struct lv_config *c = &vm->config;
    struct soft_config config = {.vcpus = c->vcpus, .virtual_clock = c->virtual_clock, .virtual_ips = c->virtual_ips,
                                 .epoch_ns = c->epoch_ns, .tsc_khz = TSC_KHZ, .quantum = QUANTUM,
                                 .no_pit = !c->pit,
                                 .parallel = c->parallel && c->vcpus > 1 && !c->virtual_clock};
    if (c->vcpus > SOFT_MAX_VCPUS)
        return -E2BIG;
    struct backend *b = calloc(1, sizeof *b);
    if (!b)
        return -ENOMEM;
    struct soft_host host = {.ctx = b, .access = on_access, .random = on_random, .eoi = on_eoi,
                             .between = on_between};
    b->vm = vm;
    b->accessing = -1;
    b->parallel = config.parallel;
    b->defers = c->vcpus > 1 && !c->virtual_clock;
    b->entropy = (struct soft_entropy){.seeded = c->seeded, .seed = c->seed};
    b->soft = soft_vm_create(&config, &host);
    if (!b->soft) {
        free(b);
        return -ENOMEM;
    }
    pthread_mutex_init(&b->guest, NULL);
    pthread_mutex_init(&b->entropy_lock, NULL);
    vm->shared_engine = !b->parallel;
    for (uint32_t i = 0; !b->parallel && i < c->vcpus; i++)
        soft_vcpu_park(b->soft, i, true); /* until its first resume() */
    vm->core = b;
    align_clock(vm);
    return 0;
}

static void forked(struct lv_vm *vm)
{
    soft_vm_forked(of(vm)->soft);
}

static void vm_destroy(struct lv_vm *vm)
{
    struct backend *b = of(vm);
    soft_vm_destroy(b->soft);
    pthread_mutex_destroy(&b->guest);
    pthread_mutex_destroy(&b->entropy_lock);
    free(b);
}

/* ---- memory ---- */

static int set_slot(struct lv_vm *vm, uint32_t slot, uint64_t gpa, uint64_t size, void *host, bool readonly, bool log_dirty)
{
    struct backend *b = of(vm);
    enter(b);
    int r = soft_vm_set_slot(b->soft, slot, gpa, size, host, readonly, log_dirty);
    leave(b);
    return r;
}

static int dirty_log(struct lv_vm *vm, uint32_t slot, uint8_t *bitmap, size_t size)
{
    struct backend *b = of(vm);
    enter(b);
    int r = soft_vm_dirty_log(b->soft, slot, bitmap, size);
    leave(b);
    return r;
}

static void memory_written(struct lv_vm *vm, uint64_t gpa, uint64_t size) { soft_vm_memory_written(of(vm)->soft, gpa, size); }

/* ---- interrupts and time ---- */

static int set_irq(struct lv_vm *vm, uint32_t gsi, bool level)
{
    if (gsi >= SOFT_GSI_COUNT)
        return -EINVAL;
    soft_vm_set_irq(of(vm)->soft, gsi, level);
    happened(vm);
    return 0;
}

static int signal_msi(struct lv_vm *vm, uint64_t address, uint32_t data)
{
    soft_vm_signal_msi(of(vm)->soft, address, data);
    happened(vm);
    return 0;
}

static int stood_still(struct lv_vcpu *vcpu)
{
    struct backend *b = of(vcpu->vm);
    enter(b);
    soft_vcpu_stood_still(b->soft, vcpu->index);
    leave(b);
    return 0;
}

static int nmi(struct lv_vcpu *vcpu)
{
    soft_vm_nmi(of(vcpu->vm)->soft, vcpu->index);
    happened(vcpu->vm);
    return 0;
}

static uint64_t now(struct lv_vm *vm) { return soft_vm_now(of(vm)->soft); }

static int set_alarm(struct lv_vm *vm, uint64_t deadline_ns)
{
    if (!vm->config.virtual_clock)
        return -ENOSYS; /* the loop's timer also fires while every vCPU is parked */
    soft_vm_set_alarm(of(vm)->soft, deadline_ns);
    happened(vm);
    return 0;
}

/* ---- state ---- */

static size_t state_size(enum lv_state_kind kind)
{
    switch (kind) {
    case LV_STATE_REGS: return sizeof(struct kvm_regs);
    case LV_STATE_SREGS: return sizeof(struct kvm_sregs);
    case LV_STATE_XSAVE: return sizeof(struct kvm_xsave);
    case LV_STATE_XCRS: return sizeof(struct kvm_xcrs);
    case LV_STATE_LAPIC: return sizeof(struct kvm_lapic_state);
    case LV_STATE_EVENTS: return sizeof(struct kvm_vcpu_events);
    case LV_STATE_DEBUGREGS: return sizeof(struct kvm_debugregs);
    case LV_STATE_MP: return sizeof(struct kvm_mp_state);
    case LV_STATE_PIC_MASTER: case LV_STATE_PIC_SLAVE: case LV_STATE_IOAPIC: return sizeof(struct kvm_irqchip);
    case LV_STATE_PIT: return sizeof(struct kvm_pit_state2);
    case LV_STATE_CLOCK: return sizeof(struct kvm_clock_data);
    case LV_STATE_EXTRA: return SOFT_EXTRA_STATE_SIZE;
    case LV_STATE_TSC: return sizeof(uint64_t);
    default: return 0;
    }
}

/* As KVM_SET_MSRS: the number done, stopping at the first that is refused. */
static int msrs(struct backend *b, uint32_t index, struct kvm_msrs *data, size_t size, bool set)
{
    struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = {.head.nmsrs = 1};
    if (size < sizeof *data || size < sizeof *data + (size_t)data->nmsrs * sizeof one.entry)
        return -EINVAL;
    for (uint32_t i = 0; i < data->nmsrs; i++) {
        one.entry = data->entries[i];
        int r = set ? soft_vcpu_set(b->soft, index, SOFT_STATE_MSRS, &one, sizeof one)
                    : soft_vcpu_get(b->soft, index, SOFT_STATE_MSRS, &one, sizeof one);
        if (r < 0)
            return (int)i;
        data->entries[i] = one.entry;
    }
    return (int)data->nmsrs;
}

static int get_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, void *data, size_t size)
{
    struct backend *b = of(vcpu->vm);
    size_t exact = state_size(kind);
    int r;
    if (kind != LV_STATE_MSRS && (!exact || size < exact))
        return -EINVAL;
    enter_to_read(b);
    r = kind == LV_STATE_MSRS ? msrs(b, vcpu->index, data, size, false)
                              : soft_vcpu_get(b->soft, vcpu->index, (enum soft_state)kind, data, exact);
    leave(b);
    return r < 0 || kind == LV_STATE_MSRS ? r : (int)exact;
}

static int set_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, const void *data, size_t size)
{
    struct backend *b = of(vcpu->vm);
    size_t exact = state_size(kind);
    int r;
    if (kind == LV_STATE_EXTRA && !size)
        return 0; /* saved by another core */
    if (kind != LV_STATE_MSRS && (!exact || size != exact))
        return -EINVAL;
    enter(b);
    r = kind == LV_STATE_MSRS ? msrs(b, vcpu->index, (void *)data, size, true)
                              : soft_vcpu_set(b->soft, vcpu->index, (enum soft_state)kind, data, exact);
    leave(b);
    return r < 0 || kind == LV_STATE_MSRS ? r : (int)exact;
}

/* The saved form of LV_STATE_CORE: the entropy, then the core's own part. */
static int get_core(struct backend *b, void *data, size_t size)
{
    size_t own = SOFT_CORE_STATE_SIZE;
    if (size < sizeof b->entropy + own)
        return -EINVAL;
    memcpy(data, &b->entropy, sizeof b->entropy);
    int r = soft_vm_get(b->soft, SOFT_VM_CORE, (uint8_t *)data + sizeof b->entropy, own);
    return r < 0 ? r : (int)(sizeof b->entropy + own);
}

static int set_core(struct backend *b, const void *data, size_t size)
{
    struct soft_entropy entropy;
    if (!size)
        return 0; /* saved by another core: nothing to take over */
    if (size != sizeof entropy + SOFT_CORE_STATE_SIZE)
        return -EINVAL;
    memcpy(&entropy, data, sizeof entropy);
    if (entropy.seeded > 1)
        return -EINVAL;
    int r = soft_vm_set(b->soft, SOFT_VM_CORE, (const uint8_t *)data + sizeof entropy, SOFT_CORE_STATE_SIZE);
    if (r < 0)
        return r;
    b->entropy = entropy;
    return (int)size;
}

static int get_vm(struct lv_vm *vm, enum lv_state_kind kind, void *data, size_t size)
{
    struct backend *b = of(vm);
    size_t exact = state_size(kind);
    int r;
    if (kind != LV_STATE_CORE && (kind < LV_STATE_PIC_MASTER || !exact || size < exact))
        return -EINVAL;
    enter_to_read(b);
    if (kind == LV_STATE_CORE) {
        r = get_core(b, data, size);
    } else {
        r = soft_vm_get(b->soft, (enum soft_vm_state)(kind - LV_STATE_PIC_MASTER), data, exact);
        if (r >= 0)
            r = (int)exact;
    }
    leave(b);
    return r;
}

static int set_vm(struct lv_vm *vm, enum lv_state_kind kind, const void *data, size_t size)
{
    struct backend *b = of(vm);
    size_t exact = state_size(kind);
    int r;
    if (kind != LV_STATE_CORE && (kind < LV_STATE_PIC_MASTER || !exact || size != exact))
        return -EINVAL;
    enter(b);
    if (kind == LV_STATE_CORE) {
        r = set_core(b, data, size);
    } else {
        r = soft_vm_set(b->soft, (enum soft_vm_state)(kind - LV_STATE_PIC_MASTER), data, exact);
        if (r >= 0)
            r = (int)exact;
    }
    if (kind == LV_STATE_CLOCK || kind == LV_STATE_CORE)
        align_clock(vm);
    leave(b);
    return r;
}

static int set_cpuid(struct lv_vcpu *vcpu, const struct kvm_cpuid_entry2 *entries, uint32_t count)
{
    struct backend *b = of(vcpu->vm);
    enter(b);
    int r = soft_vcpu_set_cpuid(b->soft, vcpu->index, entries, count);
    leave(b);
    return r;
}

static int set_debug(struct lv_vcpu *vcpu, const struct lv_debug *debug)
{
    struct backend *b = of(vcpu->vm);
    struct soft_point *points = calloc(debug->count ? debug->count : 1, sizeof *points);
    if (!points)
        return -ENOMEM;
    for (uint32_t i = 0; i < debug->count; i++)
        points[i] = (struct soft_point){debug->points[i].address, debug->points[i].length, debug->points[i].kind};
    struct soft_debug own = {.step = debug->flags & LV_DEBUG_STEP, .frozen = debug->flags & LV_DEBUG_FROZEN,
                             .hold_interrupts = debug->flags & LV_DEBUG_HOLD_INTERRUPTS,
                             .int3 = debug->flags & LV_DEBUG_INT3, .count = debug->count, .points = points};
    enter(b);
    int r = soft_vcpu_set_debug(b->soft, vcpu->index, &own);
    leave(b);
    free(points);
    return r;
}

static int translate(struct lv_vcpu *vcpu, uint64_t linear, uint64_t *gpa)
{
    struct backend *b = of(vcpu->vm);
    enter(b);
    int r = soft_vcpu_translate(b->soft, vcpu->index, linear, gpa);
    leave(b);
    return r;
}

static int set_trace(struct lv_vm *vm, uint32_t entries)
{
    struct backend *b = of(vm);
    enter(b);
    int r = soft_vm_set_trace(b->soft, entries);
    leave(b);
    return r;
}

static uint32_t trace(struct lv_vm *vm, uint32_t vcpu, struct lv_trace_entry *out, uint32_t max)
{
    struct backend *b = of(vm);
    static_assert(sizeof *out == sizeof(struct soft_trace_entry), "the same structure");
    enter(b);
    uint32_t n = soft_vcpu_trace(b->soft, vcpu, (struct soft_trace_entry *)(void *)out, max);
    leave(b);
    return n;
}

static int set_direct(struct lv_vm *vm, const struct lv_direct_memory *memory, uint32_t count, int fd, const char *program,
                      bool always)
{
    struct backend *b = of(vm);
    static_assert(sizeof *memory == sizeof(struct soft_direct_memory), "the same structure");
    enter(b);
    int r = soft_vm_set_direct(b->soft, (const struct soft_direct_memory *)(const void *)memory, count, fd, program, always);
    leave(b);
    return r;
}

static uint32_t stats(struct lv_vm *vm, struct lv_stat *out, uint32_t max)
{
    struct backend *b = of(vm);
    if (enter_soon(b)) {
        soft_vm_stats(b->soft, &b->told);
        soft_direct_stats(b->soft, &b->told_native);
        leave(b);
    }
    const struct soft_stats s = b->told;
    const struct soft_native_stats n = b->told_native;
    const struct lv_stat all[] = {
        {"instructions", s.instructions}, {"blocks-decoded", s.blocks_decoded},
        {"blocks-invalidated", s.blocks_invalidated}, {"tlb-flushes", s.tlb_flushes}, {"tlb-fills", s.tlb_fills},
        {"exceptions", s.exceptions}, {"interrupts", s.interrupts}, {"halts", s.halts}, {"accesses", s.accesses},
        {"icache-misses", s.icache_misses},
        {"native-ns", n.ns}, {"native-stops", n.stops},
        {"native-stops.call", n.stop[SOFT_NATIVE_CALL]}, {"native-stops.page", n.stop[SOFT_NATIVE_PAGE]},
        {"native-stops.fault", n.stop[SOFT_NATIVE_FAULT]}, {"native-stops.guard", n.stop[SOFT_NATIVE_GUARD]},
        {"native-stops.kick", n.stop[SOFT_NATIVE_KICK]}, {"native-pages", n.pages}, {"native-commands", n.commands},
        {"native-batches", n.batches}, {"native-refused", n.refused}, {"native-spaces", n.spaces},
        {"core-user.impossible", n.core[SOFT_CORE_IMPOSSIBLE]}, {"core-user.young", n.core[SOFT_CORE_YOUNG]},
        {"core-user.trial", n.core[SOFT_CORE_TRIAL]}, {"core-user.poor", n.core[SOFT_CORE_POOR]},
        {"core-user.refused", n.core[SOFT_CORE_REFUSED]}, {"core-user.stop", n.core[SOFT_CORE_STOP]},
    };
    uint32_t count = sizeof all / sizeof *all < max ? (uint32_t)(sizeof all / sizeof *all) : max;
    memcpy(out, all, count * sizeof *all);
    return count;
}

const struct lv_ops lv_soft_ops = {
    .name = "soft",
    .vm_create = vm_create, .vm_destroy = vm_destroy, .forked = forked,
    .run = run, .kick = kick, .hold = hold,
    .set_slot = set_slot, .dirty_log = dirty_log, .memory_written = memory_written,
    .set_irq = set_irq, .signal_msi = signal_msi,
    .now = now, .set_alarm = set_alarm,
    .get_vcpu = get_vcpu, .set_vcpu = set_vcpu, .get_vm = get_vm, .set_vm = set_vm,
    .stood_still = stood_still, .set_cpuid = set_cpuid, .set_debug = set_debug, .translate = translate,
    .set_trace = set_trace, .trace = trace, .nmi = nmi, .stats = stats, .set_direct = set_direct,
    .supported_cpuid = soft_supported_cpuid, .msr_list = soft_msr_list,
};
