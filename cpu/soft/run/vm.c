/* The virtual machine: creation, and the run loop that gives every vCPU its turn on one thread.
 *
 * A turn is at most config.quantum instructions and ends early with PAUSE or HLT. It is interrupted, not ended, by the next
 * timer event, by c->attention and by a return from soft_vm_run(): the vCPU then goes on with the rest of its turn. With the virtual clock a turn's length depends on instructions alone, so a run is a function of
 * its inputs. Faults and other exits from the depth of an instruction come back to the _setjmp() in run_turn().
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "soft/direct/direct.h"
#include "soft/run/turn.h"

enum { MWAIT_NS = 50000 }; /* MWAIT may return at any time; this is when it does if nothing happens */
enum { LONG_REST_NS = 250000000 }; /* a VM that has slept for so long gives memory back: see soft_blocks_rest_long() */

/* ---- what the interrupt controller asks for ---- */

static struct soft_vcpu *vcpu_at(void *ctx, uint32_t index)
{
    struct soft_vm *vm = ctx;
    return index < vm->config.vcpus ? vm->vcpus[index] : NULL;
}

static void on_wake(void *ctx, uint32_t index)
{
    struct soft_vcpu *c = vcpu_at(ctx, index);
    if (c)
        soft_attend(c);
}

static void on_nmi(void *ctx, uint32_t index)
{
    struct soft_vcpu *c = vcpu_at(ctx, index);
    if (c) {
        __atomic_store_n(&c->nmi_pending, true, __ATOMIC_SEQ_CST);
        soft_attend(c);
    }
}

static void on_init(void *ctx, uint32_t index)
{
    struct soft_vcpu *c = vcpu_at(ctx, index);
    if (c) {
        __atomic_store_n(&c->sipi_pending, false, __ATOMIC_SEQ_CST);
        __atomic_store_n(&c->init_pending, true, __ATOMIC_SEQ_CST);
        soft_attend(c);
    }
}

static void on_sipi(void *ctx, uint32_t index, uint8_t vector)
{
    struct soft_vcpu *c = vcpu_at(ctx, index);
    if (c && (__atomic_load_n(&c->activity, __ATOMIC_SEQ_CST) == ACT_WAIT_SIPI
              || __atomic_load_n(&c->init_pending, __ATOMIC_SEQ_CST))) {
        c->sipi_vector = vector;
        __atomic_store_n(&c->sipi_pending, true, __ATOMIC_SEQ_CST);
        soft_attend(c);
    }
}

static void on_eoi(void *ctx, uint32_t gsi)
{
    struct soft_vm *vm = ctx;
    if (!vm->host.eoi)
        return;
    vm->host.eoi(vm->host.ctx, gsi);
    soft_events_apply_line(vm, gsi); /* if it lowered the line, there is no further interrupt */
}

static uint64_t on_tsc(void *ctx, uint32_t index, uint64_t now)
{
    struct soft_vcpu *c = vcpu_at(ctx, index);
    return c ? soft_tsc_at(c, now) : 0;
}

static uint64_t on_tsc_to_ns(void *ctx, uint32_t index, uint64_t tsc)
{
    struct soft_vcpu *c = vcpu_at(ctx, index);
    return c ? soft_tsc_to_ns(c, tsc) : UINT64_MAX;
}

/* ---- creation ---- */

static struct soft_vcpu *create_vcpu(struct soft_vm *vm, uint32_t index)
{
    struct soft_vcpu *c = mmap(NULL, sizeof *c, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (c == MAP_FAILED)
        return NULL;
    c->vm = vm;
    c->index = index;
    c->turn_limit_ns = UINT64_MAX;
    c->mmu.have_victims = true;
    pthread_mutex_init(&c->own.inbox.lock, NULL);
    c->mmu.used[0] = c->mmu.used[1] = TLB_LIST + 1; /* the first flush fills the TLBs with empty entries */
    return c;
}

struct soft_vm *soft_vm_create(const struct soft_config *config, const struct soft_host *host)
{
    if (config->vcpus < 1 || config->vcpus > SOFT_MAX_VCPUS || !host->access || !host->random ||
        (config->parallel && config->virtual_clock))
        return NULL;
    struct soft_vm *vm = calloc(1, sizeof *vm);
    if (!vm)
        return NULL;
    vm->config = *config;
    if (!vm->config.virtual_ips)
        vm->config.virtual_ips = 1000000000;
    if (!vm->config.tsc_khz)
        vm->config.tsc_khz = 1000000;
    if (!vm->config.quantum)
        vm->config.quantum = 100000;
    vm->host = *host;
    vm->alarm_ns = UINT64_MAX;
    vm->idle_since = UINT64_MAX;
    vm->start_ns = soft_host_now();
    const struct irqchip_host chip_host = { .ctx = vm, .threads = config->parallel, .wake = on_wake, .nmi = on_nmi, .init = on_init, .sipi = on_sipi,
                                            .eoi = on_eoi, .tsc = on_tsc, .tsc_to_ns = on_tsc_to_ns };
    bool ok = (vm->events = soft_events_create()) != NULL && (!config->parallel || !soft_parallel_create(vm));
    for (uint32_t i = 0; ok && i < (config->parallel ? config->vcpus : 1); i++) {
        ok = (vm->caches[i] = soft_blocks_create(vm, i)) != NULL;
        vm->cache_count += ok;
    }
    for (uint32_t i = 0; ok && i < config->vcpus; i++) {
        ok = (vm->vcpus[i] = create_vcpu(vm, i)) != NULL;
        if (ok)
            vm->vcpus[i]->blocks = vm->caches[config->parallel ? i : 0];
    }
    ok = ok && (vm->irqchip = irqchip_create(config->vcpus, &chip_host));
    if (!ok) {
        soft_vm_destroy(vm);
        return NULL;
    }
    if (config->no_pit)
        irqchip_without_pit(vm->irqchip);
    for (uint32_t i = 0; i < config->vcpus; i++) {
        soft_reset_vcpu(vm->vcpus[i], false);
        soft_default_cpuid(vm->vcpus[i]);
    }
    return vm;
}

void soft_vm_destroy(struct soft_vm *vm)
{
    if (!vm)
        return;
    soft_direct_destroy(vm);
    if (vm->irqchip)
        irqchip_destroy(vm->irqchip);
    for (uint32_t i = 0; i < vm->cache_count; i++)
        soft_blocks_destroy(vm->caches[i]);
    soft_events_destroy(vm->events);
    for (uint32_t i = 0; i < SOFT_MAX_VCPUS; i++) {
        if (vm->vcpus[i]) {
            soft_caller_free(vm->vcpus[i]);
            munmap(vm->vcpus[i], sizeof *vm->vcpus[i]);
        }
    }
    soft_slots_free(vm);
    soft_parallel_destroy(vm);
    free(vm);
}

void soft_vm_forked(struct soft_vm *vm)
{
    soft_events_forked(vm->events);
    soft_direct_forked(vm);
}

static void add_stats(struct soft_stats *sum, const struct soft_stats *one)
{
    enum { COUNTERS = sizeof *sum / sizeof(uint64_t) };
    for (unsigned i = 0; i < COUNTERS; i++)
        ((uint64_t *)sum)[i] += ((const uint64_t *)one)[i];
}

void soft_vm_stats(struct soft_vm *vm, struct soft_stats *stats)
{
    memset(stats, 0, sizeof *stats);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        add_stats(stats, &vm->vcpus[i]->stats);
    for (uint32_t i = 0; i < vm->cache_count; i++)
        add_stats(stats, soft_blocks_stats(vm->caches[i]));
    stats->instructions = soft_vm_instructions(vm);
}

/* ---- turns ---- */

static uint64_t next_event(struct soft_vm *vm)
{
    uint64_t timer = irqchip_next_event(vm->irqchip), alarm = soft_alarm(vm);
    return timer < alarm ? timer : alarm;
}

void soft_irqchip_touched(struct soft_vcpu *c)
{
    struct irqchip *chip = c->vm->irqchip;
    if ((c->vm->parallel ? irqchip_next_event_of(chip, c->index) : irqchip_next_event(chip)) < c->turn_limit_ns) {
        c->turn_over = true;
        soft_attend(c);
    }
}

bool soft_can_run(struct soft_vcpu *c, uint64_t now)
{
    if (c->parked || c->caller.frozen)
        return false;
    if (c->activity == ACT_RUNNING || __atomic_load_n(&c->init_pending, __ATOMIC_SEQ_CST))
        return true;
    if (c->activity == ACT_WAIT_SIPI)
        return __atomic_load_n(&c->sipi_pending, __ATOMIC_SEQ_CST);
    if ((__atomic_load_n(&c->nmi_pending, __ATOMIC_SEQ_CST) && !c->nmi_blocked) || c->pending_valid)
        return true;
    if (c->activity == ACT_MWAIT && now >= c->mwait_until)
        return true;
    return ((c->rflags & F_IF) || c->activity == ACT_MWAIT) && irqchip_pending(c->vm->irqchip, c->index) >= 0;
}

bool soft_sleeps_for_good(const struct soft_vcpu *c)
{
    return !c->parked && !c->caller.frozen
           && (c->activity == ACT_WAIT_SIPI || (c->activity == ACT_HALTED && !(c->rflags & F_IF)));
}

void soft_pause(struct soft_vcpu *c)
{
    struct soft_vm *vm = c->vm;
    if (vm->parallel) {
        soft_shared_pause(c);
        return;
    }
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        struct soft_vcpu *other = vm->vcpus[i];
        if (other == c || other->parked || other->caller.frozen)
            continue;
        if (other->activity == ACT_RUNNING || __atomic_load_n(&other->attention, __ATOMIC_RELAXED)) {
            c->turn_over = true;
            vm->turn_left = 0;
            soft_leave(c);
        }
    }
}

void soft_mwait(struct soft_vcpu *c)
{
    c->activity = ACT_MWAIT;
    c->mwait_until = soft_now(c->vm) + MWAIT_NS;
    c->stats.halts++;
    soft_leave(c);
}

static void start_from_sipi(struct soft_vcpu *c)
{
    c->seg[SEG_CS].selector = (uint16_t)(c->sipi_vector << 8);
    c->seg[SEG_CS].base = (uint64_t)c->sipi_vector << 12;
    c->rip = 0;
    c->sipi_pending = false;
    __atomic_store_n(&c->activity, ACT_RUNNING, __ATOMIC_SEQ_CST);
}

/* Run one instruction with everything that can trap around it. GO_ON or SOFT_STOP_DEBUG. */
static int step(struct soft_vcpu *c)
{
    if (!soft_step_begin(c))
        return SOFT_STOP_DEBUG;
    soft_step(c);
    return soft_step_end(c) ? GO_ON : SOFT_STOP_DEBUG;
}

enum { DELIVER_NONE, DELIVER_STEP, DELIVER_IDLE };

/* Deliver what is pending, highest priority first. DELIVER_STEP: an interrupt waits for the shadow of STI or MOV SS
 * to pass. DELIVER_IDLE: the vCPU has nothing to execute. */
static int deliver_events(struct soft_vcpu *c)
{
    if (__atomic_load_n(&c->init_pending, __ATOMIC_SEQ_CST)) {
        irqchip_lock(c->vm->irqchip); /* another vCPU's SIPI comes before or after */
        c->init_pending = false;
        bool sipi = c->sipi_pending;
        soft_reset_vcpu(c, true);
        c->sipi_pending = sipi;
        irqchip_reset_lapic(c->vm->irqchip, c->index, true);
        irqchip_unlock(c->vm->irqchip);
    }
    if (c->activity == ACT_WAIT_SIPI) {
        if (!__atomic_load_n(&c->sipi_pending, __ATOMIC_SEQ_CST))
            return DELIVER_IDLE;
        irqchip_lock(c->vm->irqchip);
        start_from_sipi(c);
        irqchip_unlock(c->vm->irqchip);
    }
    if (c->pending_valid) {
        c->pending_valid = false;
        c->activity = ACT_RUNNING;
        soft_deliver(c, c->pending_vector, (enum soft_event)c->pending_kind, c->pending_has_error, c->pending_error);
    }
    bool held = c->caller.hold_interrupts && c->activity == ACT_RUNNING;
    if (__atomic_load_n(&c->nmi_pending, __ATOMIC_SEQ_CST) && !c->nmi_blocked && !held) {
        if (soft_shadow(c)) /* APM vol. 3, STI; SDM vol. 3, 6.8.3: NMIs, too */
            return DELIVER_STEP;
        __atomic_store_n(&c->nmi_pending, false, __ATOMIC_SEQ_CST);
        c->activity = ACT_RUNNING;
        soft_deliver(c, VEC_NMI, EVENT_NMI, false, 0);
    }
    int vector = irqchip_pending(c->vm->irqchip, c->index);
    c->irq_waiting = vector >= 0;
    if (vector >= 0 && c->activity == ACT_MWAIT)
        c->activity = ACT_RUNNING;
    if (vector >= 0 && (c->rflags & F_IF) && !held) {
        if (soft_shadow(c))
            return DELIVER_STEP;
        vector = irqchip_acknowledge(c->vm->irqchip, c->index);
        c->activity = ACT_RUNNING;
        c->irq_waiting = false;
        if (vector >= 0)
            soft_deliver(c, (uint8_t)vector, EVENT_HARDWARE, false, 0);
        c->irq_waiting = irqchip_pending(c->vm->irqchip, c->index) >= 0;
    }
    if (c->activity == ACT_MWAIT && soft_now(c->vm) >= c->mwait_until)
        c->activity = ACT_RUNNING;
    return c->activity == ACT_RUNNING ? DELIVER_NONE : DELIVER_IDLE;
}

int soft_run_turn(struct soft_vcpu *c)
{
    struct soft_vm *vm = c->vm;
    int jump = _setjmp(c->fault);
    c->replay.allowed = false;
    if (jump)
        soft_release_budget(c);
    if (SOFT_UNLIKELY(c->own.alone))
        soft_alone_end(c); /* a fault came before its own */
    switch (jump) {
    case JUMP_FAULT:
        c->in_step = c->caller.touched = false;
        soft_drop_deferred(c);
        c->budget--; /* so that a guest which does nothing but fault cannot keep its turn */
        soft_deliver_pending_fault(c);
        break;
    case JUMP_LEAVE:
        if (c->in_step && !soft_step_end(c))
            return SOFT_STOP_DEBUG;
        break;
    case JUMP_TRIPLE:
        c->in_exception = c->in_step = false;
        return SOFT_STOP_SHUTDOWN;
    case JUMP_DEBUG:
        c->in_step = false;
        return SOFT_STOP_DEBUG;
    case JUMP_RETRY:
        c->in_step = false;
        return GO_ON;
    default:
        c->turn_over = false;
        break;
    }
    while (c->budget > 0 && !c->turn_over && !c->parked) {
        __atomic_store_n(&c->attention, 0, __ATOMIC_SEQ_CST);
        if (vm->parallel ? soft_parallel_called(c) : soft_events_pending(vm))
            break;
        /* The instruction whose access was put off comes first: an interrupt now would make it another run of it. */
        int delivered = c->replay.retry ? DELIVER_STEP : deliver_events(c);
        if (SOFT_UNLIKELY(c->caller.stepped || c->caller.touched) && soft_caller_stops(c))
            return SOFT_STOP_DEBUG;
        if (delivered == DELIVER_IDLE)
            break;
        c->replay.allowed = true;
        if (delivered == DELIVER_STEP || soft_stepping(c)) {
            int stop = step(c);
            if (stop != GO_ON)
                return stop;
            soft_drop_deferred(c);
        } else if (c->direct) {
            soft_direct_execute(c);
        } else {
            soft_execute(c);
        }
        c->replay.allowed = false;
    }
    return GO_ON;
}

/* The next vCPU that can run, in turn order; NULL: all sleep. */
static struct soft_vcpu *next_vcpu(struct soft_vm *vm, uint64_t now)
{
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        struct soft_vcpu *c = vm->vcpus[(vm->turn + i) % vm->config.vcpus];
        if (soft_can_run(c, now))
            return c;
    }
    return NULL;
}

/* No vCPU can run: sleep, or skip time. GO_ON, or SOFT_STOP_HALTED. */
static int idle(struct soft_vm *vm, uint64_t now, uint32_t *vcpu)
{
    uint64_t deadline = next_event(vm);
    bool parked = false, all_parked = true, dead = true;
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        const struct soft_vcpu *c = vm->vcpus[i];
        parked |= c->parked || c->caller.frozen;
        all_parked &= c->parked || c->caller.frozen;
        dead &= c->activity == ACT_WAIT_SIPI || (c->activity == ACT_HALTED && !(c->rflags & F_IF));
        if (c->activity == ACT_MWAIT && c->mwait_until < deadline)
            deadline = c->mwait_until;
    }
    if (dead && !parked && !irqchip_may_nmi(vm->irqchip)) {
        for (uint32_t i = vm->config.vcpus; i-- > 0;)
            if (vm->vcpus[i]->activity == ACT_HALTED)
                *vcpu = i;
        return SOFT_STOP_HALTED;
    }
    if (vm->config.virtual_clock && !all_parked && deadline != UINT64_MAX) {
        if (deadline > now)
            vm->virtual_ns_skipped += deadline - now;
        return GO_ON;
    }
    if (all_parked)
        deadline = UINT64_MAX;
    soft_blocks_rest(vm->caches[0]);
    if (vm->idle_since == UINT64_MAX)
        vm->idle_since = now;
    if (soft_blocks_exceed_rest(vm->caches[0])) {
        uint64_t long_after = vm->idle_since + LONG_REST_NS;
        if (now >= long_after)
            soft_blocks_rest_long(vm->caches[0]);
        else if (long_after < deadline)
            deadline = long_after;
    }
    soft_events_wait(vm, deadline);
    return GO_ON;
}

void soft_vm_settle(struct soft_vm *vm)
{
    if (soft_events_pending(vm) && soft_events_apply(vm))
        soft_vm_wake(vm);
}

enum soft_stop soft_vm_run(struct soft_vm *vm, uint32_t *vcpu)
{
    *vcpu = 0;
    for (;;) {
        if (vm->host.between)
            vm->host.between(vm->host.ctx, vm->turn);
        if (soft_events_pending(vm) && soft_events_apply(vm))
            return SOFT_STOP_WAKE;
        uint64_t now = soft_now(vm);
        if (irqchip_next_event(vm->irqchip) <= now)
            irqchip_advance(vm->irqchip, now);
        if (soft_alarm(vm) <= now) {
            soft_vm_set_alarm(vm, UINT64_MAX);
            return SOFT_STOP_ALARM;
        }
        struct soft_vcpu *c = next_vcpu(vm, now);
        if (!c) {
            int stop = idle(vm, now, vcpu);
            if (stop != GO_ON)
                return (enum soft_stop)stop;
            continue;
        }
        vm->idle_since = UINT64_MAX;
        if (c->index != vm->turn || vm->turn_left <= 0) {
            vm->turn = c->index;
            vm->turn_left = vm->config.quantum;
        }
        c->turn_limit_ns = next_event(vm);
        int64_t budget = soft_budget_until(c, now, c->turn_limit_ns);
        if (budget > vm->turn_left)
            budget = vm->turn_left;
        soft_set_budget(c, budget);
        int stop = soft_run_turn(c);
        int64_t used = budget - c->budget - c->budget_held;
        vm->turn_left -= used;
        if (!vm->config.virtual_clock)
            soft_pace(c, soft_now(vm) - now, (uint64_t)used);
        if (vm->turn_left <= 0)
            vm->turn = (c->index + 1) % vm->config.vcpus;
        fpu_collect(&c->fpu);
        c->turn_limit_ns = UINT64_MAX;
        if (stop != GO_ON) {
            *vcpu = c->index;
            return (enum soft_stop)stop;
        }
    }
}
