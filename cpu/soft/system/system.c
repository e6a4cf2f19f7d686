/* SYSCALL and SYSENTER, I/O permission and port accesses, TSC, HLT, reset. Intel SDM vol. 2 and 3; AMD64 APM vol. 2, 6.1.
 *
 * Where the vendors differ this follows AMD, as CPUID says: SYSCALL works in legacy and compatibility mode, SYSENTER is
 * #UD in long mode, SYSRET does not check that RCX is canonical.
 */
#include "soft/system/system.h"

static void flat_code(struct soft_vcpu *c, uint16_t selector, unsigned cpl, bool wide)
{
    c->seg[SEG_CS] = (struct soft_seg){ .base = 0, .limit = 0xFFFFFFFF, .selector = selector,
                                        .attr = (uint16_t)(0x809B | cpl << 5 | (wide ? ATTR_L : ATTR_DB)) };
    c->cpl = (uint8_t)cpl;
}

static void flat_stack(struct soft_vcpu *c, uint16_t selector, unsigned cpl)
{
    c->seg[SEG_SS] = (struct soft_seg){ .base = 0, .limit = 0xFFFFFFFF, .selector = selector,
                                        .attr = (uint16_t)(0xC093 | cpl << 5) };
}

void soft_syscall(struct soft_vcpu *c, uint64_t next_rip)
{
    if (!(c->efer & EFER_SCE) || !(c->cr0 & CR0_PE))
        soft_raise(c, VEC_UD);
    uint16_t selector = (uint16_t)(c->star >> 32) & 0xFFFC;
    uint32_t flags = soft_flags(c) & ~F_RF;
    c->gpr[RCX] = c->long_mode ? next_rip : (uint32_t)next_rip;
    if (c->long_mode) {
        c->gpr[R11] = flags;
        c->rip = c->code64 ? c->lstar : c->cstar;
        flags &= ~(uint32_t)c->fmask;
    } else {
        c->rip = (uint32_t)c->star;
        flags &= ~(F_IF | F_VM);
    }
    flat_code(c, selector, 0, c->long_mode);
    flat_stack(c, (uint16_t)(selector + 8), 0);
    soft_set_flags(c, flags);
    c->trap_taken = !(flags & F_TF);
    soft_mode_changed(c);
    soft_system_flags_changed(c);
}

/* SYSCALL and SYSRET trap if TF is set at their end: masked by SFMASK the first is no single step of the program's, and
 * the second ends the step of the SYSCALL that it answers, before the program's next instruction. */
static void trap_at_end(struct soft_vcpu *c)
{
    if (!(c->rflags & F_TF)) {
        c->trap_taken = true;
        return;
    }
    c->dr[6] |= DR6_BS;
    soft_deliver(c, VEC_DB, EVENT_EXCEPTION, false, 0);
    c->trap_taken = true;
}

void soft_sysret(struct soft_vcpu *c, bool to64)
{
    if (!(c->efer & EFER_SCE) || !soft_protected(c))
        soft_raise(c, VEC_UD);
    if (c->cpl)
        soft_raise_error(c, VEC_GP, 0);
    uint16_t selector = (uint16_t)(c->star >> 48);
    uint32_t settable = F_ARITH | F_TF | F_IF | F_DF | F_IOPL | F_NT | F_AC | F_VIF | F_VIP | F_ID;
    if (c->long_mode) {
        uint32_t flags = ((uint32_t)c->gpr[R11] & settable) | 2;
        flat_code(c, (uint16_t)((to64 ? selector + 16 : selector) | 3), 3, to64);
        c->rip = to64 ? c->gpr[RCX] : (uint32_t)c->gpr[RCX];
        soft_set_flags(c, flags);
    } else {
        flat_code(c, selector | 3, 3, false);
        c->rip = (uint32_t)c->gpr[RCX];
        soft_set_flags(c, soft_flags(c) | F_IF);
    }
    flat_stack(c, (uint16_t)((selector + 8) | 3), 3);
    soft_mode_changed(c);
    trap_at_end(c);
    soft_system_flags_changed(c);
    if (c->direct)
        soft_direct_returned(c);
}

void soft_sysenter(struct soft_vcpu *c)
{
    if (c->long_mode)
        soft_raise(c, VEC_UD);
    if (!(c->cr0 & CR0_PE) || !(c->sysenter_cs & 0xFFFC))
        soft_raise_error(c, VEC_GP, 0);
    uint16_t selector = (uint16_t)c->sysenter_cs & 0xFFFC;
    flat_code(c, selector, 0, false);
    flat_stack(c, (uint16_t)(selector + 8), 0);
    soft_set_flags(c, soft_flags(c) & ~(F_IF | F_VM | F_RF));
    c->gpr[RSP] = (uint32_t)c->sysenter_esp;
    c->rip = (uint32_t)c->sysenter_eip;
    soft_mode_changed(c);
}

void soft_sysexit(struct soft_vcpu *c, bool to64)
{
    (void)to64;
    if (c->long_mode)
        soft_raise(c, VEC_UD);
    if (!soft_protected(c) || c->cpl || !(c->sysenter_cs & 0xFFFC))
        soft_raise_error(c, VEC_GP, 0);
    uint16_t selector = (uint16_t)c->sysenter_cs & 0xFFFC;
    flat_code(c, (uint16_t)((selector + 16) | 3), 3, false);
    flat_stack(c, (uint16_t)((selector + 24) | 3), 3);
    c->gpr[RSP] = (uint32_t)c->gpr[RCX];
    c->rip = (uint32_t)c->gpr[RDX];
    soft_mode_changed(c);
}

uint64_t soft_rdtsc(struct soft_vcpu *c)
{
    if ((c->cr4 & CR4_TSD) && c->cpl)
        soft_raise_error(c, VEC_GP, 0);
    return soft_tsc_at(c, soft_now(c->vm));
}

/* ---- ports ---- */

void soft_check_io(struct soft_vcpu *c, uint16_t port, unsigned size)
{
    if (!(c->cr0 & CR0_PE) || (!(c->rflags & F_VM) && c->cpl <= (c->rflags & F_IOPL) >> 12))
        return;
    if (SEG_P(&c->tr) && (SEG_TYPE(&c->tr) & 8) && c->tr.limit >= 0x67) {
        uint32_t offset = (uint32_t)soft_sys_load(c, c->tr.base + 0x66, 2) + port / 8u;
        if (offset + 1 <= c->tr.limit) {
            uint32_t bits = (uint32_t)soft_sys_load(c, c->tr.base + offset, 2) >> (port & 7);
            if (!(bits & ((1u << size) - 1)))
                return;
        }
    }
    soft_raise_error(c, VEC_GP, 0);
}

static uint32_t value_mask(unsigned size) { return size == 4 ? 0xFFFFFFFFu : size == 2 ? 0xFFFFu : 0xFFu; }

uint32_t soft_port_read(struct soft_vcpu *c, uint16_t port, unsigned size)
{
    struct soft_vm *vm = c->vm;
    uint64_t value = 0;
    if (SOFT_UNLIKELY(c->dr[7] & 0xFF))
        soft_watch_port(c, port, size);
    if (!vm->config.no_irqchip && irqchip_port_read(vm->irqchip, port, (uint8_t)size, &value, soft_now(vm))) {
        soft_irqchip_touched(c);
    } else {
        struct soft_access access = { .address = port, .size = (uint8_t)size, .port = true, .vcpu = (uint8_t)c->index };
        value = soft_host_access(c, &access);
    }
    return (uint32_t)value & value_mask(size);
}

void soft_port_write(struct soft_vcpu *c, uint16_t port, unsigned size, uint32_t value)
{
    struct soft_vm *vm = c->vm;
    value &= value_mask(size);
    if (SOFT_UNLIKELY(c->dr[7] & 0xFF))
        soft_watch_port(c, port, size);
    if (!vm->config.no_irqchip && irqchip_port_write(vm->irqchip, port, (uint8_t)size, value, soft_now(vm))) {
        soft_irqchip_touched(c);
        return;
    }
    struct soft_access access = { .address = port, .value = value, .size = (uint8_t)size, .port = true, .write = true,
                                  .vcpu = (uint8_t)c->index };
    soft_host_access(c, &access);
}

void soft_hlt(struct soft_vcpu *c, uint64_t next_rip)
{
    if (c->cpl)
        soft_raise_error(c, VEC_GP, 0);
    c->rip = next_rip;
    c->activity = ACT_HALTED;
    c->shadow = 0; /* HLT was the instruction that STI protected */
    c->stats.halts++;
    soft_leave(c);
}

/* ---- reset ---- */

/* SDM vol. 3 table 9-1. INIT keeps CD and NW, the FPU, the TSC and the model-specific registers. */
void soft_reset_vcpu(struct soft_vcpu *c, bool init)
{
    uint64_t cr0 = init ? (c->cr0 & 0x60000000) | 0x10 : 0x60000010;
    memset(c->gpr, 0, sizeof c->gpr);
    for (unsigned i = 0; i < SEG_COUNT; i++)
        c->seg[i] = (struct soft_seg){ .base = 0, .limit = 0xFFFF, .selector = 0, .attr = 0x93 };
    c->seg[SEG_CS] = (struct soft_seg){ .base = 0xFFFF0000, .limit = 0xFFFF, .selector = 0xF000, .attr = 0x9B };
    c->ldtr = (struct soft_seg){ .limit = 0xFFFF, .attr = ATTR_P | SYS_LDT };
    c->tr = (struct soft_seg){ .limit = 0xFFFF, .attr = ATTR_P | SYS_TSS_BUSY };
    c->gdtr.base = c->idtr.base = 0;
    c->gdtr.limit = c->idtr.limit = 0xFFFF;
    c->rip = 0xFFF0;
    c->gpr[RDX] = 0x00A10F11;
    soft_set_flags(c, 2);
    c->cpl = 0;
    c->shadow = 0;
    c->cr0 = cr0;
    c->cr2 = c->cr3 = c->cr4 = 0;
    c->efer = 0;
    memset(c->dr, 0, sizeof c->dr);
    c->dr[6] = DR6_FIXED;
    c->dr[7] = 0x400;
    c->in_exception = c->pending_valid = c->nmi_pending = c->nmi_blocked = false;
    c->data_hits = c->held_hits = 0;
    c->irq_waiting = false;
    __atomic_store_n(&c->activity, c->index == 0 ? ACT_RUNNING : ACT_WAIT_SIPI, __ATOMIC_SEQ_CST);
    c->sipi_pending = false;
    if (!init) {
        c->xcr0 = 1;
        c->star = c->lstar = c->cstar = c->fmask = c->kernel_gs_base = 0;
        c->sysenter_cs = c->sysenter_esp = c->sysenter_eip = c->tsc_aux = 0;
        c->pat = 0x0007040600070406ull;
        c->mtrr_def = 0;
        memset(c->mtrr_fixed, 0, sizeof c->mtrr_fixed);
        memset(c->mtrr_phys, 0, sizeof c->mtrr_phys);
        c->misc_enable = 1; /* fast strings */
        c->mcg_status = c->spec_ctrl = 0;
        c->tsc_offset = c->tsc_adjust = 0;
        c->kvm_system_time = c->kvm_wall_clock = c->kvm_async_pf = c->kvm_steal_time = c->kvm_pv_eoi = 0;
        fpu_reset(&c->fpu);
    }
    soft_watch_changed(c);
    soft_mode_changed(c);
    soft_tlb_flush(c, true);
}
