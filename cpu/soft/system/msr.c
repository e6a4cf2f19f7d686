/* Model-specific registers. Intel SDM vol. 4; AMD64 APM vol. 2 appendix A; KVM's paravirtual MSRs
 * (Documentation/virt/kvm/x86/msr.rst). Unknown ones raise #GP(0), which operating systems handle.
 */
#include "soft/system/msr.h"
#include "soft/system/system.h"

#define EFER_AUTOIBRS (1u << 21)
#define EFER_ALLOWED (EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_AUTOIBRS)

static bool memory_types_valid(uint64_t value)
{
    for (unsigned i = 0; i < 8; i++) {
        unsigned type = (unsigned)(value >> (i * 8)) & 0xFF;
        if (type > 7 || type == 2 || type == 3)
            return false;
    }
    return true;
}

static uint64_t *fixed_mtrr(struct soft_vcpu *c, uint32_t index)
{
    static const uint32_t numbers[11] = { 0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F };
    for (unsigned i = 0; i < 11; i++)
        if (numbers[i] == index)
            return &c->mtrr_fixed[i];
    return NULL;
}

/* MSRs that are plain storage; canonical: the value must be a canonical address. */
static uint64_t *plain(struct soft_vcpu *c, uint32_t index, bool *canonical)
{
    *canonical = false;
    switch (index) {
    case MSR_STAR: return &c->star;
    case MSR_FMASK: return &c->fmask;
    case MSR_SYSENTER_CS: return &c->sysenter_cs;
    case MSR_MCG_STATUS: return &c->mcg_status;
    case MSR_SPEC_CTRL: return &c->spec_ctrl;
    case MSR_TSC_AUX: return &c->tsc_aux;
    default: break;
    }
    *canonical = true;
    switch (index) {
    case MSR_LSTAR: return &c->lstar;
    case MSR_CSTAR: return &c->cstar;
    case MSR_FS_BASE: return &c->seg[SEG_FS].base;
    case MSR_GS_BASE: return &c->seg[SEG_GS].base;
    case MSR_KERNEL_GS_BASE: return &c->kernel_gs_base;
    case MSR_SYSENTER_ESP: return &c->sysenter_esp;
    case MSR_SYSENTER_EIP: return &c->sysenter_eip;
    default: return NULL;
    }
}

static bool apic_msr(uint32_t index)
{
    return index == MSR_APIC_BASE || index == MSR_TSC_DEADLINE || (index >= 0x800 && index <= 0x8FF);
}

bool soft_msr_read(struct soft_vcpu *c, uint32_t index, uint64_t *value)
{
    bool canonical;
    const uint64_t *storage = plain(c, index, &canonical);
    if (!storage)
        storage = fixed_mtrr(c, index);
    if (storage) {
        *value = *storage;
        return true;
    }
    if (apic_msr(index)) {
        bool ok = irqchip_msr_read(c->vm->irqchip, c->index, index, value, soft_now(c->vm));
        soft_irqchip_touched(c);
        return ok;
    }
    if (index >= MSR_MTRR_PHYS0 && index < MSR_MTRR_PHYS0 + 16) {
        *value = c->mtrr_phys[index - MSR_MTRR_PHYS0];
        return true;
    }
    switch (index) {
    case MSR_EFER: *value = c->efer; return true;
    case MSR_PAT: *value = c->pat; return true;
    case MSR_TSC: *value = soft_tsc_at(c, soft_now(c->vm)); return true;
    case MSR_TSC_ADJUST: *value = c->tsc_adjust; return true;
    case MSR_MISC_ENABLE: *value = c->misc_enable; return true;
    case MSR_MTRR_CAP: *value = 0x508; return true; /* 8 variable ranges, fixed ranges, WC */
    case MSR_MTRR_DEF: *value = c->mtrr_def; return true;
    case MSR_PATCH_LEVEL: *value = 0x0A10113E; return true;
    case MSR_HWCR: *value = 1u << 24; return true;   /* TSC counts at the P0 frequency */
    case MSR_DE_CFG: *value = 1u << 1; return true;  /* LFENCE serializes */
    case MSR_KVM_SYSTEM_TIME_OLD:
    case MSR_KVM_SYSTEM_TIME: *value = c->kvm_system_time; return true;
    case MSR_KVM_WALL_CLOCK_OLD:
    case MSR_KVM_WALL_CLOCK: *value = c->kvm_wall_clock; return true;
    case MSR_KVM_ASYNC_PF: *value = c->kvm_async_pf; return true;
    case MSR_KVM_STEAL_TIME: *value = c->kvm_steal_time; return true;
    case MSR_KVM_PV_EOI: *value = c->kvm_pv_eoi; return true;
    /* Read as zero, as where there is nothing to report. */
    case MSR_P5_MC_ADDR:
    case MSR_P5_MC_TYPE:
    case MSR_PERF_STATUS:
    case MSR_PERF_CTL:
    case MSR_LAST_BRANCH_FROM ... MSR_LAST_EXCEPTION_TO:
    case MSR_TSEG_ADDR:
    case MSR_TSEG_MASK:
    case MSR_VM_HSAVE_PA:
    case MSR_TW_CFG:
    case MSR_EX_CFG:
    case MSR_PLATFORM_ID:
    case MSR_EBL_CR_POWERON:
    case MSR_MCG_CAP:
    case MSR_DEBUGCTL:
    case MSR_SYSCFG:
    case MSR_NB_CFG:
    case MSR_INT_PENDING:
    case MSR_MMIO_CONF_BASE:
    case MSR_VM_CR:
    case MSR_LS_CFG:
    case MSR_IC_CFG:
    case MSR_DC_CFG:
    case MSR_BU_CFG2:
    case MSR_SMI_COUNT:
    case MSR_OSVW_LENGTH:
    case MSR_OSVW_STATUS:
    case MSR_XSS:
    case MSR_K7_EVNTSEL0 ... MSR_K7_PERFCTR3: /* counters that count nothing: Linux finds that out and uses none */
        *value = 0;
        return true;
    default:
        return false;
    }
}

static bool write_efer(struct soft_vcpu *c, uint64_t value)
{
    if (value & ~(uint64_t)EFER_ALLOWED)
        return false;
    value = (value & ~(uint64_t)EFER_LMA) | (c->efer & EFER_LMA);
    if (((value ^ c->efer) & EFER_LME) && (c->cr0 & CR0_PG))
        return false;
    bool flush = ((value ^ c->efer) & EFER_NXE) != 0;
    c->efer = (uint32_t)value;
    if (flush)
        soft_tlb_flush(c, true);
    soft_mode_changed(c);
    return true;
}

static bool write_mtrr(struct soft_vcpu *c, uint32_t index, uint64_t value)
{
    uint64_t *fixed = fixed_mtrr(c, index);
    if (fixed) {
        if (!memory_types_valid(value))
            return false;
        *fixed = value;
        return true;
    }
    unsigned type = value & 0xFF;
    if (index == MSR_MTRR_DEF) {
        if (value & ~0xCFFull || type > 6 || type == 2 || type == 3)
            return false;
        c->mtrr_def = value;
        return true;
    }
    bool mask = index & 1;
    if (value & ~c->phys_mask || (value & (mask ? 0x7FF : 0xF00)) || (!mask && (type > 6 || type == 2 || type == 3)))
        return false;
    c->mtrr_phys[index - MSR_MTRR_PHYS0] = value;
    return true;
}

bool soft_msr_write(struct soft_vcpu *c, uint32_t index, uint64_t value)
{
    bool canonical;
    uint64_t *storage = plain(c, index, &canonical);
    if (storage) {
        if (canonical && !soft_canonical(value))
            return false;
        if (index == MSR_TSC_AUX && value >> 32)
            return false;
        if (index == MSR_SPEC_CTRL && value & ~0x407ull)
            return false;
        *storage = index == MSR_FMASK ? (uint32_t)value : value;
        return true;
    }
    if (apic_msr(index)) {
        if (index == MSR_APIC_BASE && value & ~c->phys_mask)
            return false; /* APM vol. 2, 16.3.1: beyond the physical address space is reserved */
        bool ok = irqchip_msr_write(c->vm->irqchip, c->index, index, value, soft_now(c->vm));
        soft_irqchip_touched(c);
        return ok;
    }
    if ((index >= MSR_MTRR_PHYS0 && index < MSR_MTRR_PHYS0 + 16) || index == MSR_MTRR_DEF || fixed_mtrr(c, index))
        return write_mtrr(c, index, value);
    switch (index) {
    case MSR_EFER:
        return write_efer(c, value);
    case MSR_PAT:
        if (!memory_types_valid(value))
            return false;
        c->pat = value;
        return true;
    case MSR_TSC: {
        uint64_t delta = value - soft_tsc_at(c, soft_now(c->vm));
        c->tsc_offset += delta;
        c->tsc_adjust += delta;
        soft_kvmclock_update(c);
        return true;
    }
    case MSR_TSC_ADJUST:
        c->tsc_offset += value - c->tsc_adjust;
        c->tsc_adjust = value;
        soft_kvmclock_update(c);
        return true;
    case MSR_MISC_ENABLE: c->misc_enable = value; return true;
    case MSR_XSS: return !value; /* there are no supervisor components */
    case MSR_PRED_CMD: return !(value & ~0x81ull);
    case MSR_KVM_SYSTEM_TIME_OLD:
    case MSR_KVM_SYSTEM_TIME:
        c->kvm_system_time = value;
        soft_kvmclock_update(c);
        return true;
    case MSR_KVM_WALL_CLOCK_OLD:
    case MSR_KVM_WALL_CLOCK:
        c->kvm_wall_clock = value;
        soft_wall_clock_write(c);
        return true;
    case MSR_KVM_ASYNC_PF: c->kvm_async_pf = value; return true;
    case MSR_KVM_STEAL_TIME: c->kvm_steal_time = value; return true;
    case MSR_KVM_PV_EOI: c->kvm_pv_eoi = value; return true;
    /* Accepted without effect: nothing of this has a counterpart here. */
    case MSR_P5_MC_ADDR:
    case MSR_P5_MC_TYPE:
    case MSR_PERF_CTL:
    case MSR_TW_CFG:
    case MSR_EX_CFG:
    case MSR_EBL_CR_POWERON:
    case MSR_K7_EVNTSEL0 ... MSR_K7_PERFCTR3:
    case MSR_DEBUGCTL:
    case MSR_PATCH_LEVEL:
    case MSR_UCODE_WRITE:
    case MSR_SYSCFG:
    case MSR_HWCR:
    case MSR_NB_CFG:
    case MSR_PATCH_LOADER:
    case MSR_INT_PENDING:
    case MSR_MMIO_CONF_BASE:
    case MSR_VM_CR:
    case MSR_LS_CFG:
    case MSR_IC_CFG:
    case MSR_DC_CFG:
    case MSR_DE_CFG:
    case MSR_BU_CFG2:
        return true;
    default:
        return false;
    }
}

/* vCPUs whose TSCs were read one after the other while the clock ran differ by microseconds: they were equal. */
static uint64_t tsc_offset_near(const struct soft_vcpu *c, uint64_t offset)
{
    uint64_t near = c->vm->config.tsc_khz * 10; /* 10 ms */
    for (uint32_t i = 0; i < c->index; i++)
        if (c->vm->vcpus[i]->tsc_offset - offset + near <= 2 * near)
            return c->vm->vcpus[i]->tsc_offset;
    return offset;
}

bool soft_msr_restore(struct soft_vcpu *c, uint32_t index, uint64_t value)
{
    if (apic_msr(index))
        return irqchip_restore_msr(c->vm->irqchip, c->index, index, value, soft_now(c->vm));
    if (index == MSR_TSC) {
        uint64_t offset = value - (soft_tsc_at(c, soft_now(c->vm)) - c->tsc_offset);
        c->tsc_offset = c->vm->config.virtual_clock ? offset : tsc_offset_near(c, offset);
        soft_kvmclock_restore(c, c->kvm_system_time);
        return true;
    }
    if (index == MSR_KVM_SYSTEM_TIME || index == MSR_KVM_WALL_CLOCK) {
        (index == MSR_KVM_SYSTEM_TIME ? soft_kvmclock_restore : soft_wall_clock_restore)(c, value);
        return true;
    }
    if (index == MSR_TSC_ADJUST) {
        c->tsc_adjust = value;
        return true;
    }
    return soft_msr_write(c, index, value);
}

static const struct soft_cpuid_entry *leaf(const struct soft_vcpu *c, uint32_t function)
{
    static const struct soft_cpuid_entry none;
    for (uint32_t i = 0; i < c->cpuid_count; i++)
        if (c->cpuid[i].function == function && c->cpuid[i].index == 0)
            return &c->cpuid[i];
    return &none;
}

/* Whether the guest's processor has a register that CPUID announces; those that every processor has are there anyway.
 * (The VMM reaches all of them: soft_msr_read(), soft_msr_restore().) */
static bool announced(const struct soft_vcpu *c, uint32_t index)
{
    switch (index) {
    case MSR_SPEC_CTRL: /* IBRS STIBP SSBD PSFD; as Intel names them */
        return (leaf(c, 0x80000008)->ebx & (1u << 14 | 1u << 15 | 1u << 24 | 1u << 28))
               || (leaf(c, 7)->edx & (1u << 26 | 1u << 27 | 1u << 31));
    case MSR_PRED_CMD: /* IBPB, SBPB */
        return (leaf(c, 0x80000008)->ebx & 1u << 12) || (leaf(c, 7)->edx & 1u << 26)
               || (leaf(c, 0x80000021)->eax & 1u << 27);
    default:
        return true;
    }
}

uint64_t soft_rdmsr(struct soft_vcpu *c, uint32_t index)
{
    uint64_t value = 0;
    if (c->cpl || !announced(c, index) || !soft_msr_read(c, index, &value))
        soft_raise_error(c, VEC_GP, 0);
    return value;
}

void soft_wrmsr(struct soft_vcpu *c, uint32_t index, uint64_t value)
{
    if (c->cpl || !announced(c, index) || !soft_msr_write(c, index, value))
        soft_raise_error(c, VEC_GP, 0);
}

uint32_t soft_msr_list(uint32_t *indices, uint32_t max)
{
    static const uint32_t list[] = {
        MSR_APIC_BASE, MSR_EFER, MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK, MSR_KERNEL_GS_BASE, MSR_SYSENTER_CS,
        MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_PAT, MSR_TSC, MSR_TSC_ADJUST, MSR_TSC_AUX, MSR_MISC_ENABLE, MSR_MCG_STATUS,
        MSR_SPEC_CTRL, MSR_MTRR_DEF, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F,
        0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20A, 0x20B, 0x20C, 0x20D, 0x20E, 0x20F,
        MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME, MSR_KVM_ASYNC_PF, MSR_KVM_STEAL_TIME, MSR_KVM_PV_EOI,
        MSR_TSC_DEADLINE, /* last: it needs TSC and the LAPIC's timer mode */
    };
    uint32_t count = sizeof list / sizeof list[0];
    for (uint32_t i = 0; i < count && i < max; i++)
        indices[i] = list[i];
    return count < max ? count : max;
}
