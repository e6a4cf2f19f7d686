/* State of vCPUs and the VM in the layouts of the KVM API (linux/kvm.h; Documentation/virt/kvm/api.rst).
 *
 * What is set may come from a file: sizes are checked, and combinations that the processor cannot be in are refused.
 */
#include <errno.h>
#include <linux/kvm.h>

#include "soft/system/msr.h"
#include "soft/system/system.h"

/* ---- registers ---- */

static const uint8_t gpr_order[16] = { RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8, R9, R10, R11, R12, R13, R14, R15 };
_Static_assert(sizeof(struct kvm_regs) == 18 * 8, "rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8-r15, rip, rflags");

static void get_regs(struct soft_vcpu *c, struct kvm_regs *regs)
{
    uint64_t words[18];
    for (unsigned i = 0; i < 16; i++)
        words[i] = c->gpr[gpr_order[i]];
    words[16] = c->rip;
    words[17] = soft_flags(c);
    memcpy(regs, words, sizeof *regs);
}

static void set_regs(struct soft_vcpu *c, const struct kvm_regs *regs)
{
    uint64_t words[18];
    uint8_t shadow = soft_shadow(c);
    memcpy(words, regs, sizeof words);
    for (unsigned i = 0; i < 16; i++)
        c->gpr[gpr_order[i]] = words[i];
    c->rip = words[16];
    soft_cast_shadow(c, shadow); /* as in KVM it is no part of these registers */
    bool was_vm86 = soft_flags(c) & F_VM && c->cr0 & CR0_PE;
    soft_set_flags(c, ((uint32_t)words[17] & 0x3F7FD5) | 2);
    if (c->rflags & F_VM && c->cr0 & CR0_PE)
        c->cpl = 3;
    else if (was_vm86)
        c->cpl = SEG_DPL(&c->seg[SEG_SS]);
    c->caller.retry = false;
    soft_mode_changed(c);
    soft_attend(c);
}

static struct kvm_segment get_segment(const struct soft_seg *s)
{
    return (struct kvm_segment){ .base = s->base, .limit = s->limit, .selector = s->selector, .type = SEG_TYPE(s),
                                 .present = SEG_P(s), .dpl = SEG_DPL(s), .db = SEG_DB(s), .s = SEG_S(s), .l = SEG_L(s),
                                 .g = s->attr >> 15 & 1, .avl = s->attr >> 12 & 1, .unusable = !SEG_P(s) };
}

static struct soft_seg set_segment(const struct kvm_segment *k)
{
    unsigned attr = (k->type & 15u) | (k->s & 1u) << 4 | (k->dpl & 3u) << 5 | (k->present & 1u) << 7 | (k->avl & 1u) << 12
                    | (k->l & 1u) << 13 | (k->db & 1u) << 14 | (k->g & 1u) << 15;
    if (k->unusable)
        attr &= ~(unsigned)ATTR_P;
    return (struct soft_seg){ .base = k->base, .limit = k->limit, .selector = k->selector, .attr = (uint16_t)attr };
}

static void get_sregs(struct soft_vcpu *c, struct kvm_sregs *s)
{
    memset(s, 0, sizeof *s);
    s->cs = get_segment(&c->seg[SEG_CS]);
    s->ds = get_segment(&c->seg[SEG_DS]);
    s->es = get_segment(&c->seg[SEG_ES]);
    s->fs = get_segment(&c->seg[SEG_FS]);
    s->gs = get_segment(&c->seg[SEG_GS]);
    s->ss = get_segment(&c->seg[SEG_SS]);
    if (c->cr0 & CR0_PE)
        s->ss.dpl = c->cpl; /* a null SS has no DPL of its own; KVM keeps CPL there */
    s->tr = get_segment(&c->tr);
    s->ldt = get_segment(&c->ldtr);
    s->gdt.base = c->gdtr.base;
    s->gdt.limit = c->gdtr.limit;
    s->idt.base = c->idtr.base;
    s->idt.limit = c->idtr.limit;
    s->cr0 = c->cr0;
    s->cr2 = c->cr2;
    s->cr3 = c->cr3;
    s->cr4 = c->cr4;
    s->cr8 = irqchip_get_tpr(c->vm->irqchip, c->index) >> 4;
    s->efer = c->efer;
    uint64_t apic_base = 0;
    soft_msr_read(c, MSR_APIC_BASE, &apic_base);
    s->apic_base = apic_base;
    if (c->pending_valid && c->pending_kind == EVENT_HARDWARE)
        s->interrupt_bitmap[c->pending_vector / 64] |= 1ull << (c->pending_vector % 64);
}

static int set_sregs(struct soft_vcpu *c, const struct kvm_sregs *s)
{
    bool paging = (s->cr0 & CR0_PG) != 0, lma = (s->efer & EFER_LMA) != 0;
    if (s->cr0 >> 32 || s->cr4 >> 32 || s->efer >> 32 || s->cr3 >> 52 || (paging && !(s->cr0 & CR0_PE))
        || lma != (paging && (s->efer & EFER_LME)) || (lma && !(s->cr4 & CR4_PAE)))
        return -EINVAL;
    c->seg[SEG_CS] = set_segment(&s->cs);
    c->seg[SEG_DS] = set_segment(&s->ds);
    c->seg[SEG_ES] = set_segment(&s->es);
    c->seg[SEG_FS] = set_segment(&s->fs);
    c->seg[SEG_GS] = set_segment(&s->gs);
    c->seg[SEG_SS] = set_segment(&s->ss);
    c->tr = set_segment(&s->tr);
    c->ldtr = set_segment(&s->ldt);
    c->gdtr.base = s->gdt.base;
    c->gdtr.limit = s->gdt.limit;
    c->idtr.base = s->idt.base;
    c->idtr.limit = s->idt.limit;
    c->cr0 = s->cr0 | 0x10;
    c->cr2 = s->cr2;
    c->cr3 = s->cr3;
    c->cr4 = s->cr4;
    c->efer = (uint32_t)s->efer;
    c->cpl = !(s->cr0 & CR0_PE) ? 0 : c->rflags & F_VM ? 3 : s->ss.dpl & 3;
    irqchip_restore_msr(c->vm->irqchip, c->index, MSR_APIC_BASE, s->apic_base, soft_now(c->vm));
    irqchip_set_tpr(c->vm->irqchip, c->index, (uint8_t)(s->cr8 << 4));
    if (paging && !lma && (s->cr4 & CR4_PAE))
        soft_load_pdptes(c, s->cr3, true);
    c->pending_valid = false;
    for (unsigned i = 0; i < 256; i++) {
        if (s->interrupt_bitmap[i / 64] >> (i % 64) & 1) {
            c->pending_valid = true;
            c->pending_vector = (uint8_t)i;
            c->pending_kind = EVENT_HARDWARE;
            c->pending_has_error = false;
        }
    }
    soft_mode_changed(c);
    soft_tlb_flush(c, true);
    soft_attend(c);
    return 0;
}

/* ---- FPU ---- */

enum { XSTATE_BV = 512, XCOMP_BV = 520 };

static void get_xsave(struct soft_vcpu *c, uint8_t *area)
{
    memset(area, 0, 4096);
    const struct fpu *f = &c->fpu;
    fpu_xsave(f, area, soft_vcpu_xcr0(c), XSAVE_STANDARD, true, true);
    /* The instruction leaves the pointers out unless an exception is pending. FNSAVE and FNSTENV tell them always. */
    memcpy(area + 6, &f->fop, 2);
    memcpy(area + 8, &f->fip, 8);
    memcpy(area + 16, &f->fdp, 8);
}

static int set_xsave(struct soft_vcpu *c, const uint8_t *from)
{
    uint8_t area[4096] __attribute__((aligned(64)));
    memcpy(area, from, sizeof area);
    area[XSTATE_BV] &= (uint8_t)soft_vcpu_xcr0(c); /* what else another core saved has no place here */
    memset(area + XSTATE_BV + 1, 0, 63);
    return fpu_xrstor(&c->fpu, area, soft_vcpu_xcr0(c), soft_vcpu_xcr0(c), true, true) ? 0 : -EINVAL;
}

static void get_xcrs(struct soft_vcpu *c, struct kvm_xcrs *x)
{
    memset(x, 0, sizeof *x);
    x->nr_xcrs = 1;
    x->xcrs[0].value = c->xcr0;
}

static int set_xcrs(struct soft_vcpu *c, const struct kvm_xcrs *x)
{
    for (unsigned i = 0; i < x->nr_xcrs && i < KVM_MAX_XCRS; i++) {
        if (x->xcrs[i].xcr != 0)
            continue;
        if (!soft_xcr0_valid(c, x->xcrs[i].value))
            return -EINVAL;
        c->xcr0 = x->xcrs[i].value;
    }
    return 0;
}

/* ---- MSRs ---- */

static int each_msr(struct soft_vcpu *c, struct kvm_msrs *out, const struct kvm_msrs *in, size_t size)
{
    const struct kvm_msrs *msrs = out ? out : in;
    if (size < sizeof *msrs || msrs->nmsrs > (size - sizeof *msrs) / sizeof(struct kvm_msr_entry))
        return -EINVAL;
    int result = 0;
    for (uint32_t i = 0; i < msrs->nmsrs; i++) {
        bool ok;
        if (out) {
            uint64_t value = 0;
            ok = soft_msr_read(c, out->entries[i].index, &value);
            out->entries[i].data = value;
        } else {
            ok = soft_msr_restore(c, in->entries[i].index, in->entries[i].data);
        }
        if (!ok)
            result = -EINVAL;
    }
    return result;
}

/* ---- events ---- */

static void get_events(struct soft_vcpu *c, struct kvm_vcpu_events *e)
{
    memset(e, 0, sizeof *e);
    if (c->pending_valid) {
        switch (c->pending_kind) {
        case EVENT_EXCEPTION:
            e->exception.injected = 1;
            e->exception.nr = c->pending_vector;
            e->exception.has_error_code = c->pending_has_error;
            e->exception.error_code = c->pending_error;
            break;
        case EVENT_NMI:
            e->nmi.injected = 1;
            break;
        default:
            e->interrupt.injected = 1;
            e->interrupt.nr = c->pending_vector;
            e->interrupt.soft = c->pending_kind == EVENT_SOFTWARE;
            break;
        }
    }
    uint8_t shadow = soft_shadow(c);
    e->interrupt.shadow = shadow == 2 ? KVM_X86_SHADOW_INT_MOV_SS : shadow ? KVM_X86_SHADOW_INT_STI : 0;
    e->nmi.pending = c->nmi_pending;
    e->nmi.masked = c->nmi_blocked;
    e->sipi_vector = c->sipi_pending ? c->sipi_vector : 0;
    /* An INIT that the vCPU takes when its turn comes. Without one the flag stays off. */
    e->smi.latched_init = c->init_pending;
    e->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | (c->sipi_pending ? KVM_VCPUEVENT_VALID_SIPI_VECTOR : 0)
               | (c->init_pending ? KVM_VCPUEVENT_VALID_SMM : 0);
}

static void set_events(struct soft_vcpu *c, const struct kvm_vcpu_events *e)
{
    c->pending_valid = e->exception.injected || e->nmi.injected || e->interrupt.injected;
    c->pending_has_error = false;
    c->pending_error = 0;
    if (e->exception.injected) {
        c->pending_kind = EVENT_EXCEPTION;
        c->pending_vector = e->exception.nr & 31;
        c->pending_has_error = e->exception.has_error_code != 0;
        c->pending_error = e->exception.error_code;
    } else if (e->nmi.injected) {
        c->pending_kind = EVENT_NMI;
        c->pending_vector = VEC_NMI;
    } else if (e->interrupt.injected) {
        c->pending_kind = e->interrupt.soft ? EVENT_SOFTWARE : EVENT_HARDWARE;
        c->pending_vector = e->interrupt.nr;
    }
    if (e->flags & KVM_VCPUEVENT_VALID_SHADOW)
        soft_cast_shadow(c, e->interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS ? 2 : e->interrupt.shadow ? 1 : 0);
    if (e->flags & KVM_VCPUEVENT_VALID_NMI_PENDING)
        c->nmi_pending = e->nmi.pending != 0;
    c->nmi_blocked = e->nmi.masked != 0;
    c->init_pending = e->flags & KVM_VCPUEVENT_VALID_SMM && e->smi.latched_init;
    if (e->flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR) {
        c->sipi_vector = (uint8_t)e->sipi_vector;
        c->sipi_pending = c->activity == ACT_WAIT_SIPI;
    }
    soft_attend(c);
}

/* ---- debug registers and activity ---- */

static void get_debugregs(struct soft_vcpu *c, struct kvm_debugregs *d)
{
    memset(d, 0, sizeof *d);
    for (unsigned i = 0; i < 4; i++)
        d->db[i] = c->dr[i];
    d->dr6 = c->dr[6];
    d->dr7 = c->dr[7];
}

static void set_debugregs(struct soft_vcpu *c, const struct kvm_debugregs *d)
{
    for (unsigned i = 0; i < 4; i++)
        c->dr[i] = d->db[i];
    c->dr[6] = (d->dr6 & 0xE00F) | DR6_FIXED;
    c->dr[7] = (d->dr7 & 0xFFFF2BFFull) | 0x400;
    soft_watch_changed(c);
    soft_attend(c);
}

static void get_mp_state(struct soft_vcpu *c, struct kvm_mp_state *s)
{
    if (c->init_pending && c->sipi_pending) { /* KVM, too, takes the INIT first, then the SIPI */
        s->mp_state = KVM_MP_STATE_SIPI_RECEIVED;
        return;
    }
    switch (c->activity) {
    case ACT_HALTED: s->mp_state = KVM_MP_STATE_HALTED; break;
    case ACT_WAIT_SIPI: s->mp_state = c->sipi_pending ? KVM_MP_STATE_SIPI_RECEIVED : KVM_MP_STATE_INIT_RECEIVED; break;
    default: s->mp_state = KVM_MP_STATE_RUNNABLE; break;
    }
}

static int set_mp_state(struct soft_vcpu *c, const struct kvm_mp_state *s)
{
    c->sipi_pending = false;
    switch (s->mp_state) {
    case KVM_MP_STATE_RUNNABLE: c->activity = ACT_RUNNING; break;
    case KVM_MP_STATE_HALTED: c->activity = ACT_HALTED; break;
    case KVM_MP_STATE_UNINITIALIZED:
    case KVM_MP_STATE_INIT_RECEIVED: c->activity = ACT_WAIT_SIPI; break;
    case KVM_MP_STATE_SIPI_RECEIVED:
        c->activity = ACT_WAIT_SIPI;
        c->sipi_pending = true;
        break;
    default: return -EINVAL;
    }
    soft_attend(c);
    return 0;
}

/* ---- our own ---- */

/* What the structures of KVM have no place for, so that a run under the virtual clock goes on to the last bit. */
struct extra_state {
    uint64_t mwait_until; /* ns; with EXTRA_MWAIT */
    uint32_t flags;       /* EXTRA_*; bits 8 to 15: data breakpoints held back by MOV SS or POP SS */
    uint16_t fcs, fds;    /* selectors of the last x87 instruction and its operand */
    uint64_t pdpte[4];    /* PAE paging: as they were when CR3 was loaded */
};
enum { EXTRA_MWAIT = 1, EXTRA_PAE = 2, EXTRA_HELD_SHIFT = 8 };
_Static_assert(sizeof(struct extra_state) == SOFT_EXTRA_STATE_SIZE, "announced in soft.h");

static bool pae(const struct soft_vcpu *c) { return c->cr0 & CR0_PG && c->cr4 & CR4_PAE && !c->long_mode; }

static void get_extra(const struct soft_vcpu *c, struct extra_state *s)
{
    memset(s, 0, sizeof *s);
    if (c->activity == ACT_MWAIT) {
        s->flags |= EXTRA_MWAIT;
        s->mwait_until = c->mwait_until;
    }
    s->flags |= (uint32_t)c->held_hits << EXTRA_HELD_SHIFT;
    s->fcs = c->fpu.fcs;
    s->fds = c->fpu.fds;
    if (pae(c)) {
        s->flags |= EXTRA_PAE;
        memcpy(s->pdpte, c->mmu.pdpte, sizeof s->pdpte);
    }
}

static int set_extra(struct soft_vcpu *c, const struct extra_state *s)
{
    if (s->flags >> 16 || s->flags & 0xFF & ~(EXTRA_MWAIT | EXTRA_PAE))
        return -EINVAL;
    if (s->flags & EXTRA_PAE && pae(c))
        soft_set_pdptes(c, s->pdpte);
    if (s->flags & EXTRA_MWAIT && c->activity == ACT_RUNNING) {
        c->activity = ACT_MWAIT;
        c->mwait_until = s->mwait_until;
    }
    c->held_hits = (uint8_t)(s->flags >> EXTRA_HELD_SHIFT);
    c->fpu.fcs = s->fcs;
    c->fpu.fds = s->fds;
    return 0;
}

/* ---- public ---- */

static size_t state_size(enum soft_state kind)
{
    switch (kind) {
    case SOFT_STATE_REGS: return sizeof(struct kvm_regs);
    case SOFT_STATE_SREGS: return sizeof(struct kvm_sregs);
    case SOFT_STATE_XSAVE: return 4096;
    case SOFT_STATE_XCRS: return sizeof(struct kvm_xcrs);
    case SOFT_STATE_LAPIC: return sizeof(struct kvm_lapic_state);
    case SOFT_STATE_EVENTS: return sizeof(struct kvm_vcpu_events);
    case SOFT_STATE_DEBUGREGS: return sizeof(struct kvm_debugregs);
    case SOFT_STATE_MP: return sizeof(struct kvm_mp_state);
    case SOFT_STATE_EXTRA: return sizeof(struct extra_state);
    case SOFT_STATE_MSRS: return 0;
    }
    return 0;
}

int soft_vcpu_get(struct soft_vm *vm, uint32_t vcpu, enum soft_state kind, void *data, size_t size)
{
    if (vcpu >= vm->config.vcpus)
        return -EINVAL;
    struct soft_vcpu *c = vm->vcpus[vcpu];
    if (kind == SOFT_STATE_MSRS)
        return each_msr(c, data, NULL, size);
    if (size != state_size(kind))
        return -EINVAL;
    switch (kind) {
    case SOFT_STATE_REGS: get_regs(c, data); return 0;
    case SOFT_STATE_SREGS: get_sregs(c, data); return 0;
    case SOFT_STATE_XSAVE: get_xsave(c, data); return 0;
    case SOFT_STATE_XCRS: get_xcrs(c, data); return 0;
    case SOFT_STATE_LAPIC: irqchip_get_lapic(vm->irqchip, vcpu, data, soft_now(vm)); return 0;
    case SOFT_STATE_EVENTS: get_events(c, data); return 0;
    case SOFT_STATE_DEBUGREGS: get_debugregs(c, data); return 0;
    case SOFT_STATE_MP: get_mp_state(c, data); return 0;
    case SOFT_STATE_EXTRA: get_extra(c, data); return 0;
    default: return -EINVAL;
    }
}

int soft_vcpu_set(struct soft_vm *vm, uint32_t vcpu, enum soft_state kind, const void *data, size_t size)
{
    if (vcpu >= vm->config.vcpus)
        return -EINVAL;
    struct soft_vcpu *c = vm->vcpus[vcpu];
    soft_lives_again(c);
    if (kind == SOFT_STATE_MSRS)
        return each_msr(c, NULL, data, size);
    if (size != state_size(kind))
        return -EINVAL;
    switch (kind) {
    case SOFT_STATE_REGS: set_regs(c, data); return 0;
    case SOFT_STATE_SREGS: return set_sregs(c, data);
    case SOFT_STATE_XSAVE: return set_xsave(c, data);
    case SOFT_STATE_XCRS: return set_xcrs(c, data);
    case SOFT_STATE_LAPIC:
        irqchip_set_lapic(vm->irqchip, vcpu, data, soft_now(vm));
        soft_attend(c);
        return 0;
    case SOFT_STATE_EVENTS: set_events(c, data); return 0;
    case SOFT_STATE_DEBUGREGS: set_debugregs(c, data); return 0;
    case SOFT_STATE_MP: return set_mp_state(c, data);
    case SOFT_STATE_EXTRA: return set_extra(c, data);
    default: return -EINVAL;
    }
}

struct core_state {
    uint32_t vcpus, turn;
    int64_t turn_left;
    uint64_t now_ns;
    uint64_t instructions[SOFT_MAX_VCPUS];
};
_Static_assert(sizeof(struct core_state) == SOFT_CORE_STATE_SIZE, "announced in soft.h");

static void get_core(struct soft_vm *vm, struct core_state *s)
{
    memset(s, 0, sizeof *s);
    s->vcpus = vm->config.vcpus;
    s->turn = vm->turn;
    s->turn_left = vm->turn_left;
    s->now_ns = soft_now(vm);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        s->instructions[i] = soft_instructions(vm->vcpus[i]);
}

static int set_core(struct soft_vm *vm, const struct core_state *s)
{
    if (s->vcpus != vm->config.vcpus || s->turn >= vm->config.vcpus)
        return -EINVAL;
    uint64_t before = soft_now(vm);
    vm->turn = s->turn;
    vm->turn_left = s->turn_left < (int64_t)vm->config.quantum ? s->turn_left : vm->config.quantum;
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        struct soft_vcpu *c = vm->vcpus[i];
        c->turn_end = s->instructions[i];
        c->budget = c->budget_held = 0;
    }
    soft_set_now(vm, before, s->now_ns);
    return 0;
}

static int irqchip_kind(enum soft_vm_state kind)
{
    switch (kind) {
    case SOFT_VM_PIC_MASTER: return KVM_IRQCHIP_PIC_MASTER;
    case SOFT_VM_PIC_SLAVE: return KVM_IRQCHIP_PIC_SLAVE;
    case SOFT_VM_IOAPIC: return KVM_IRQCHIP_IOAPIC;
    default: return -1;
    }
}

static size_t vm_state_size(enum soft_vm_state kind)
{
    switch (kind) {
    case SOFT_VM_PIT: return sizeof(struct kvm_pit_state2);
    case SOFT_VM_CLOCK: return sizeof(struct kvm_clock_data);
    case SOFT_VM_CORE: return sizeof(struct core_state);
    case SOFT_VM_TSC: return sizeof(uint64_t);
    default: return sizeof(struct kvm_irqchip);
    }
}

int soft_vm_get(struct soft_vm *vm, enum soft_vm_state kind, void *data, size_t size)
{
    if (size != vm_state_size(kind))
        return -EINVAL;
    int chip = irqchip_kind(kind);
    if (chip >= 0) {
        struct kvm_irqchip *state = data;
        memset(state, 0, sizeof *state);
        state->chip_id = (uint32_t)chip;
        return irqchip_get(vm->irqchip, state);
    }
    memset(data, 0, size);
    switch (kind) {
    case SOFT_VM_PIT:
        irqchip_get_pit(vm->irqchip, data, soft_now(vm));
        return 0;
    case SOFT_VM_CLOCK:
        ((struct kvm_clock_data *)data)->clock = soft_now(vm);
        return 0;
    case SOFT_VM_CORE:
        get_core(vm, data);
        return 0;
    case SOFT_VM_TSC:
        memcpy(data, &vm->config.tsc_khz, size);
        return 0;
    default:
        return -EINVAL;
    }
}

int soft_vm_set(struct soft_vm *vm, enum soft_vm_state kind, const void *data, size_t size)
{
    if (size != vm_state_size(kind))
        return -EINVAL;
    int chip = irqchip_kind(kind);
    if (chip >= 0) {
        struct kvm_irqchip state;
        memcpy(&state, data, sizeof state);
        state.chip_id = (uint32_t)chip;
        int result = irqchip_set(vm->irqchip, &state, soft_now(vm));
        soft_events_set_levels(vm, irqchip_levels(vm->irqchip));
        return result;
    }
    switch (kind) {
    case SOFT_VM_PIT:
        irqchip_set_pit(vm->irqchip, data, soft_now(vm));
        return 0;
    case SOFT_VM_CLOCK:
        soft_set_now(vm, soft_now(vm), ((const struct kvm_clock_data *)data)->clock);
        for (uint32_t i = 0; i < vm->config.vcpus; i++)
            soft_kvmclock_restore(vm->vcpus[i], vm->vcpus[i]->kvm_system_time);
        return 0;
    case SOFT_VM_CORE:
        return set_core(vm, data);
    case SOFT_VM_TSC: {
        uint64_t khz;
        memcpy(&khz, data, sizeof khz);
        return soft_set_tsc_khz(vm, khz);
    }
    default:
        return -EINVAL;
    }
}
