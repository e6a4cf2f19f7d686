/* Instructions that the host's KVM gives up (KVM_EXIT_INTERNAL_ERROR, suberror EMULATION): the software core executes each
 * on the same vCPU's state and memory, and KVM goes on behind it.
 *
 * A helper VM of the software core with one vCPU, made when it is first needed, maps the slots that KVM maps. It keeps
 * nothing from one instruction to the next: state comes from KVM, and what changed goes back. Meanwhile no other vCPU of the VM is
 * in guest mode, since the core's locked accesses are atomic only among vCPUs on one thread; they run on while an access waits for
 * the loop. Exceptions are delivered by the core, so KVM has no event to inject; what was pending there stays.
 *
 * The interrupt controllers are KVM's. The LAPIC's page is read and written through KVM's own state of it, and IPIs are sent as
 * messages. An instruction that reaches the IOAPIC, the 8259s or the PIT, or ends a level-triggered interrupt, is not
 * finished: no call of KVM makes such an access.
 */
#define _GNU_SOURCE
#include "kvm/kvm_core.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "soft/soft.h"

enum { APIC_ENABLED = 1 << 11, APIC_X2 = 1 << 10, APIC_TPR = 0x80, APIC_EOI = 0xB0, APIC_ICR = 0x300, APIC_ICR2 = 0x310, IOAPIC_BASE = 0xFEC00000 };
enum { MSR_TSC = 0x10, UD = 6 };
enum { SAMPLE = 64 /* of so many instructions one is kept to be named: its bytes cost system calls */ };
enum { XSTATE_BV = 512, YMM_HIGH = 576, YMM_HIGH_BYTES = 256, LEGACY_STATE = 416 /* x87, MXCSR, XMM; the rest of 512 bytes is software's */ };

/* What an instruction may read or write beside what is in the other structures. The TSC is only read. */
static const uint32_t msr_indices[] = {MSR_TSC, 0x174, 0x175, 0x176, 0x277, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084,
                                       0xC0000102, 0xC0000103};
enum { MSR_COUNT = sizeof msr_indices / sizeof msr_indices[0] };
struct msr_set {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[MSR_COUNT];
};
struct state {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_vcpu_events events;
    struct kvm_debugregs debug;
    struct kvm_xcrs xcrs;
    struct kvm_mp_state mp;
    struct msr_set msrs;
    uint8_t xsave[4096];
};

struct kvm_finish {
    struct lv_vcpu *vcpu;
    struct soft_vm *soft;
    struct kvm_slot slots[LV_MAX_SLOTS]; /* as the helper has them */
    uint64_t apic_base;
    bool refused; /* it made an access that only KVM could answer */
    struct state kvm, before, after; /* as KVM has it; as the helper has it before and after the instruction */
};

/* ---- alone ---- */

void lv_kvm_alone(struct lv_vcpu *vcpu)
{
    struct kvm_core_vm *vm = vcpu->vm->core;
    /* Who waits for the lock is out of guest mode; who holds it is kicked until it gives it up. */
    while (pthread_rwlock_trywrlock(&vm->guest_mode)) {
        for (uint32_t i = 0; i < vcpu->vm->config.vcpus; i++)
            if (vcpu->vm->vcpus[i] && vcpu->vm->vcpus[i] != vcpu)
                lv_kvm_ops.kick(vcpu->vm->vcpus[i]);
        struct timespec soon;
        clock_gettime(CLOCK_REALTIME, &soon);
        soon.tv_nsec += 1000000;
        if (soon.tv_nsec >= 1000000000)
            soon.tv_sec++, soon.tv_nsec -= 1000000000;
        if (!pthread_rwlock_timedwrlock(&vm->guest_mode, &soon))
            return;
    }
}
void lv_kvm_together(struct lv_vcpu *vcpu) { pthread_rwlock_unlock(&((struct kvm_core_vm *)vcpu->vm->core)->guest_mode); }

/* ---- the LAPIC's page ---- */

static bool set_msr(struct kvm_finish *f, uint32_t index, uint64_t value)
{
    struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = {.head.nmsrs = 1, .entry = {.index = index, .data = value}};
    return call(vcpu_fd(f->vcpu), KVM_SET_MSRS, &one) == 1;
}

/* The interrupt command register (SDM 3A 11.6.1), as messages: KVM delivers those while vCPUs run, as it does its own. */
static bool send_ipi(struct kvm_finish *f, uint32_t high, uint32_t low)
{
    const struct lv_vm *vm = f->vcpu->vm;
    uint32_t mode = low >> 8 & 7, shorthand = low >> 18 & 3, own = f->vcpu->index, data = low & 0xC7FF;
    if (mode == 5 && !(low & 1 << 14)) /* INIT level de-assert */
        return true;
    uint32_t address = 0xFEE00000u | (low & 1 << 11 ? 4u : 0) | (mode == 1 ? 8u : 0);
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        if (shorthand < 2 && i)
            break;
        if (shorthand >= 2 && (!vm->vcpus[i] || (shorthand == 3 && i == own)))
            continue;
        uint32_t to = shorthand == 0 ? high >> 24 : shorthand == 1 ? own : i;
        struct kvm_msi msi = {.address_lo = (shorthand ? 0xFEE00000u : address) | to << 12, .data = data};
        if (call(vm_fd(vm), KVM_SIGNAL_MSI, &msi) < 0)
            return false;
    }
    return true;
}

/* End of the interrupt in service with the highest priority; a level-triggered one ends in the IOAPIC, too. */
static bool end_interrupt(struct kvm_lapic_state *state)
{
    for (unsigned vector = 255; vector >= 16; vector--) {
        uint8_t bit = (uint8_t)(1u << (vector & 7)), at = (uint8_t)((vector >> 3 & 3) | (vector >> 5) << 4);
        if (!((uint8_t)state->regs[0x100 + at] & bit))
            continue;
        state->regs[0x100 + at] = (char)((uint8_t)state->regs[0x100 + at] & ~bit);
        return !((uint8_t)state->regs[0x180 + at] & bit);
    }
    return true;
}

static bool lapic(struct kvm_finish *f, uint32_t offset, bool write, uint32_t *value)
{
    struct kvm_lapic_state state;
    if ((offset & 15) || offset >= sizeof state.regs || call(vcpu_fd(f->vcpu), KVM_GET_LAPIC, &state) < 0)
        return false;
    if (!write) {
        memcpy(value, state.regs + offset, sizeof *value);
        return true;
    }
    uint32_t high;
    switch (offset) {
    case APIC_TPR:
        f->kvm.sregs.cr8 = *value >> 4 & 15;
        return call(vcpu_fd(f->vcpu), KVM_SET_SREGS, &f->kvm.sregs) >= 0;
    case APIC_ICR:
        memcpy(&high, state.regs + APIC_ICR2, sizeof high);
        return send_ipi(f, high, *value);
    case APIC_EOI:
        if (!end_interrupt(&state))
            return false;
        break;
    default:
        memcpy(state.regs + offset, value, sizeof *value);
        break;
    }
    return call(vcpu_fd(f->vcpu), KVM_SET_LAPIC, &state) >= 0;
}

/* ---- callbacks of the helper ---- */

static bool in_kernel(const struct kvm_finish *f, const struct soft_access *a)
{
    if (!a->port)
        return a->address - IOAPIC_BASE < 0x1000;
    return (a->address & ~0x81ull) == 0x20 || (a->address & ~1ull) == 0x4D0 ||
           (f->vcpu->vm->config.pit && ((a->address & ~3ull) == 0x40 || a->address == 0x61));
}

static uint64_t on_access(void *ctx, const struct soft_access *a)
{
    struct kvm_finish *f = ctx;
    if (!a->port && (f->apic_base & APIC_ENABLED) && !(f->apic_base & APIC_X2) && (a->address ^ f->apic_base) < 0x1000) {
        uint32_t value = (uint32_t)a->value;
        f->refused |= a->size != 4 || !lapic(f, a->address & 0xFFF, a->write, &value);
        return value;
    }
    if (in_kernel(f, a)) {
        f->refused = true;
        return ~0ull;
    }
    struct lv_access access = {.address = a->address, .value = a->value, .size = a->size,
                               .space = a->port ? LV_PORT : LV_MMIO, .write = a->write};
    lv_kvm_together(f->vcpu);
    uint64_t value = lv_access(f->vcpu, &access);
    lv_kvm_alone(f->vcpu);
    return value;
}

static void on_random(void *ctx, void *buffer, size_t size)
{
    (void)ctx;
    if (getrandom(buffer, size, 0) != (ssize_t)size)
        abort(); /* up to 256 bytes never fail once the host has started */
}

/* A page that KVM does not see being written: into the log that lv_kvm_ops.dirty_log() adds to KVM's. */
static void on_written(void *ctx, uint64_t gpa)
{
    struct kvm_finish *f = ctx;
    struct kvm_core_vm *vm = f->vcpu->vm->core;
    pthread_mutex_lock(&vm->lock);
    for (int i = 0; i < LV_MAX_SLOTS; i++) {
        struct kvm_slot *s = &vm->slots[i];
        if (s->written && gpa - s->gpa < s->size)
            s->written[(gpa - s->gpa) >> 15] |= (uint8_t)(1u << ((gpa - s->gpa) >> 12 & 7));
    }
    pthread_mutex_unlock(&vm->lock);
}

/* ---- the helper ---- */

/* The helper has every feature of the core, for so the guest's programs have all of the host's, whatever they are told: CPUID
 * of KVM hides an instruction, and takes none away. Addresses are as wide as the guest was told. */
static bool set_cpuid(struct soft_vm *soft, const struct kvm_core_vcpu *k)
{
    struct kvm_cpuid_entry2 entries[64];
    uint32_t count = soft_supported_cpuid(entries, 64);
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t n = 0; n < k->cpuid_count; n++)
            if (entries[i].function == 0x80000008 && k->cpuid[n].function == 0x80000008)
                entries[i].eax = k->cpuid[n].eax;
    return soft_vcpu_set_cpuid(soft, 0, entries, count) == 0;
}

static struct kvm_finish *helper(struct lv_vcpu *vcpu)
{
    struct kvm_core_vcpu *k = vcpu->core;
    if (k->finish)
        return k->finish;
    struct kvm_finish *f = calloc(1, sizeof *f);
    if (!f)
        return NULL;
    f->vcpu = vcpu;
    int khz = call(k->fd, KVM_GET_TSC_KHZ, NULL);
    const struct soft_config config = {.vcpus = 1, .no_irqchip = true, .tsc_khz = khz > 0 ? (uint64_t)khz : 1000000};
    const struct soft_host host = {.ctx = f, .access = on_access, .random = on_random, .written = on_written};
    f->soft = soft_vm_create(&config, &host);
    if (!f->soft || !set_cpuid(f->soft, k)) {
        soft_vm_destroy(f->soft);
        free(f);
        return NULL;
    }
    return k->finish = f;
}

void lv_kvm_finish_destroy(struct kvm_finish *f)
{
    if (f)
        soft_vm_destroy(f->soft);
    free(f);
}
void lv_kvm_finish_forked(struct kvm_finish *f)
{
    if (f)
        soft_vm_forked(f->soft);
}

static bool same_slots(struct kvm_finish *f)
{
    struct kvm_core_vm *vm = f->vcpu->vm->core;
    int r = 0;
    pthread_mutex_lock(&vm->lock);
    for (unsigned pass = 0; pass < 2; pass++) /* what is gone makes room first */
        for (uint32_t i = 0; i < LV_MAX_SLOTS && r >= 0; i++) {
            struct kvm_slot *have = &f->slots[i], *want = &vm->slots[i];
            if (have->gpa == want->gpa && have->size == want->size && have->host == want->host && have->readonly == want->readonly)
                continue;
            if (pass == 0 && have->size) {
                r = soft_vm_set_slot(f->soft, i, have->gpa, 0, NULL, false, false);
                *have = (struct kvm_slot){0};
            } else if (pass == 1 && want->size) {
                r = soft_vm_set_slot(f->soft, i, want->gpa, want->size, want->host, want->readonly, false);
                *have = *want;
            }
        }
    pthread_mutex_unlock(&vm->lock);
    return r >= 0;
}

/* ---- state there and back ---- */

static bool get_kvm(int fd, struct state *s)
{
    if (call(fd, KVM_GET_VCPU_EVENTS, &s->events) < 0 || call(fd, KVM_GET_REGS, &s->regs) < 0 ||
        call(fd, KVM_GET_SREGS, &s->sregs) < 0 || call(fd, KVM_GET_DEBUGREGS, &s->debug) < 0 ||
        call(fd, KVM_GET_XSAVE, s->xsave) < 0 || call(fd, KVM_GET_XCRS, &s->xcrs) < 0)
        return false;
    /* One after the other: KVM_GET_MSRS stops at the first that this KVM does not have. */
    s->msrs.head.nmsrs = 0;
    for (unsigned i = 0; i < MSR_COUNT; i++) {
        struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = {.head.nmsrs = 1, .entry.index = msr_indices[i]};
        if (call(fd, KVM_GET_MSRS, &one) == 1)
            s->msrs.entries[s->msrs.head.nmsrs++] = one.entry;
    }
    return true;
}

static size_t msrs_size(const struct state *s) { return sizeof s->msrs.head + s->msrs.head.nmsrs * sizeof s->msrs.entries[0]; }

static bool to_core(struct soft_vm *soft, const struct state *s)
{
    struct kvm_vcpu_events events = {.flags = KVM_VCPUEVENT_VALID_SHADOW, .interrupt.shadow = s->events.interrupt.shadow,
                                     .nmi.masked = s->events.nmi.masked};
    struct kvm_xcrs xcrs = s->xcrs;
    for (unsigned i = 0; i < xcrs.nr_xcrs && i < KVM_MAX_XCRS; i++)
        xcrs.xcrs[i].value &= soft_supported_xcr0(); /* what the core has; the rest stays where KVM has it */
    struct kvm_mp_state running = {.mp_state = KVM_MP_STATE_RUNNABLE};
    soft_vcpu_set(soft, 0, SOFT_STATE_MSRS, &s->msrs, msrs_size(s)); /* those that it has */
    return soft_vcpu_set(soft, 0, SOFT_STATE_REGS, &s->regs, sizeof s->regs) == 0 &&
           soft_vcpu_set(soft, 0, SOFT_STATE_SREGS, &s->sregs, sizeof s->sregs) == 0 &&
           soft_vcpu_set(soft, 0, SOFT_STATE_XCRS, &xcrs, sizeof xcrs) == 0 &&
           soft_vcpu_set(soft, 0, SOFT_STATE_XSAVE, s->xsave, sizeof s->xsave) == 0 &&
           soft_vcpu_set(soft, 0, SOFT_STATE_DEBUGREGS, &s->debug, sizeof s->debug) == 0 &&
           soft_vcpu_set(soft, 0, SOFT_STATE_MP, &running, sizeof running) == 0 &&
           soft_vcpu_set(soft, 0, SOFT_STATE_EVENTS, &events, sizeof events) == 0;
}

static void from_core(struct soft_vm *soft, struct state *s, const struct msr_set *indices)
{
    soft_vcpu_get(soft, 0, SOFT_STATE_REGS, &s->regs, sizeof s->regs);
    soft_vcpu_get(soft, 0, SOFT_STATE_SREGS, &s->sregs, sizeof s->sregs);
    soft_vcpu_get(soft, 0, SOFT_STATE_XCRS, &s->xcrs, sizeof s->xcrs);
    soft_vcpu_get(soft, 0, SOFT_STATE_XSAVE, s->xsave, sizeof s->xsave);
    soft_vcpu_get(soft, 0, SOFT_STATE_DEBUGREGS, &s->debug, sizeof s->debug);
    soft_vcpu_get(soft, 0, SOFT_STATE_MP, &s->mp, sizeof s->mp);
    soft_vcpu_get(soft, 0, SOFT_STATE_EVENTS, &s->events, sizeof s->events);
    s->msrs = *indices;
    soft_vcpu_get(soft, 0, SOFT_STATE_MSRS, &s->msrs, msrs_size(s));
}

/* Only what the instruction changed, so that what the two say differently (an unusable segment's type) stays KVM's. */
static bool to_kvm(struct kvm_finish *f, int fd)
{
    const struct state *before = &f->before, *after = &f->after;
    bool ok = true;
    if (memcmp(&before->sregs, &after->sregs, sizeof after->sregs)) {
        struct kvm_sregs s = f->kvm.sregs;
        struct { struct kvm_segment *to; const struct kvm_segment *was, *is; } segments[] = {
#define SEGMENT(n) {&s.n, &before->sregs.n, &after->sregs.n}
            SEGMENT(cs), SEGMENT(ds), SEGMENT(es), SEGMENT(fs), SEGMENT(gs), SEGMENT(ss), SEGMENT(tr), SEGMENT(ldt)};
        for (unsigned i = 0; i < sizeof segments / sizeof segments[0]; i++)
            if (memcmp(segments[i].was, segments[i].is, sizeof *segments[i].is))
                *segments[i].to = *segments[i].is;
        s.gdt = after->sregs.gdt;
        s.idt = after->sregs.idt;
        s.cr0 = after->sregs.cr0;
        s.cr2 = after->sregs.cr2;
        s.cr3 = after->sregs.cr3;
        s.cr4 = after->sregs.cr4;
        s.cr8 = before->sregs.cr8 == after->sregs.cr8 ? s.cr8 : after->sregs.cr8;
        s.efer = after->sregs.efer;
        ok = call(fd, KVM_SET_SREGS, &s) >= 0;
    }
    if (ok && memcmp(&before->xcrs, &after->xcrs, sizeof after->xcrs)) {
        struct kvm_xcrs x = f->kvm.xcrs;
        x.xcrs[0].value = (x.xcrs[0].value & ~soft_supported_xcr0()) | after->xcrs.xcrs[0].value;
        ok = call(fd, KVM_SET_XCRS, &x) >= 0;
    }
    if (ok && memcmp(before->xsave, after->xsave, sizeof after->xsave)) {
        memcpy(f->kvm.xsave, after->xsave, LEGACY_STATE);
        unsigned components = (unsigned)soft_supported_xcr0();
        if (components & 4)
            memcpy(f->kvm.xsave + YMM_HIGH, after->xsave + YMM_HIGH, YMM_HIGH_BYTES);
        f->kvm.xsave[XSTATE_BV] = (uint8_t)((f->kvm.xsave[XSTATE_BV] & ~components) | (after->xsave[XSTATE_BV] & components));
        ok = call(fd, KVM_SET_XSAVE, f->kvm.xsave) >= 0;
    }
    for (unsigned i = 0; ok && i < after->msrs.head.nmsrs; i++)
        if (after->msrs.entries[i].index != MSR_TSC && after->msrs.entries[i].data != before->msrs.entries[i].data)
            ok = set_msr(f, after->msrs.entries[i].index, after->msrs.entries[i].data);
    if (ok && memcmp(&before->debug, &after->debug, sizeof after->debug))
        ok = call(fd, KVM_SET_DEBUGREGS, &after->debug) >= 0;
    if (ok)
        ok = call(fd, KVM_SET_REGS, &after->regs) >= 0;
    /* KVM queued #UD in the instruction's place. */
    struct kvm_vcpu_events events = f->kvm.events;
    memset(&events.exception, 0, sizeof events.exception);
    events.interrupt.shadow = after->events.interrupt.shadow;
    events.nmi.masked = after->events.nmi.masked;
    events.flags = KVM_VCPUEVENT_VALID_SHADOW;
    if (ok)
        ok = call(fd, KVM_SET_VCPU_EVENTS, &events) >= 0;
    if (ok && after->mp.mp_state == KVM_MP_STATE_HALTED)
        ok = call(fd, KVM_SET_MP_STATE, &after->mp) >= 0;
    return ok;
}

/* ---- one instruction ---- */

static void keep_sample(struct kvm_finish *f, const struct lv_exit *instruction)
{
    struct kvm_core_vm *vm = f->vcpu->vm->core;
    uint64_t length = f->after.regs.rip - f->before.regs.rip; /* unless it jumped, or raised an exception */
    pthread_mutex_lock(&vm->lock);
    vm->sample_size = length && length < instruction->insn_size ? (uint8_t)length : instruction->insn_size;
    memcpy(vm->sample, instruction->insn, vm->sample_size);
    pthread_mutex_unlock(&vm->lock);
}

enum lv_finished lv_kvm_finish(struct lv_vcpu *vcpu)
{
    struct kvm_core_vm *vm = vcpu->vm->core;
    struct kvm_core_vcpu *k = vcpu->core;
    struct kvm_finish *f = vcpu->vm->config.finish ? helper(vcpu) : NULL;
    enum lv_finished result = LV_NOT_FINISHED;
    if (!f)
        return result;
    lv_kvm_alone(vcpu);
    const struct kvm_vcpu_events *e = &f->kvm.events;
    bool ready = same_slots(f) && get_kvm(k->fd, &f->kvm) && !e->interrupt.injected && !e->nmi.injected &&
                 (!e->exception.injected || e->exception.nr == UD) && to_core(f->soft, &f->kvm);
    if (ready) {
        struct lv_exit instruction = {.insn_size = 0};
        bool sample = atomic_load_explicit(&vm->finished, memory_order_relaxed) % SAMPLE == 0;
        if (sample)
            lv_kvm_failed_instruction(vcpu, &instruction, f->kvm.sregs.cs.base + f->kvm.regs.rip);
        f->apic_base = f->kvm.sregs.apic_base;
        f->refused = false;
        from_core(f->soft, &f->before, &f->kvm.msrs);
        enum soft_finish how = soft_vcpu_finish(f->soft, 0);
        from_core(f->soft, &f->after, &f->kvm.msrs);
        if (how == SOFT_FINISH_SHUTDOWN)
            result = LV_FINISHED_SHUTDOWN;
        else if (how == SOFT_FINISHED && !f->refused && !lv_closing(vcpu->vm) && to_kvm(f, k->fd))
            result = LV_FINISHED;
        if (sample && result == LV_FINISHED)
            keep_sample(f, &instruction);
    }
    lv_kvm_together(vcpu);
    if (result != LV_NOT_FINISHED)
        atomic_fetch_add_explicit(&vm->finished, 1, memory_order_relaxed);
    return result;
}
