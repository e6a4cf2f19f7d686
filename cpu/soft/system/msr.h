/* Numbers of the model-specific registers that the software core has, and their accessors for the state interface. */
#ifndef SOFT_MSR_H
#define SOFT_MSR_H

#include <stdbool.h>
#include <stdint.h>

enum {
    MSR_P5_MC_ADDR = 0,
    MSR_P5_MC_TYPE = 1,
    MSR_TSC = 0x10,
    MSR_KVM_WALL_CLOCK_OLD = 0x11,
    MSR_KVM_SYSTEM_TIME_OLD = 0x12,
    MSR_PLATFORM_ID = 0x17,
    MSR_APIC_BASE = 0x1B,
    MSR_EBL_CR_POWERON = 0x2A,
    MSR_SMI_COUNT = 0x34,
    MSR_TSC_ADJUST = 0x3B,
    MSR_SPEC_CTRL = 0x48,
    MSR_PRED_CMD = 0x49,
    MSR_UCODE_WRITE = 0x79,
    MSR_PATCH_LEVEL = 0x8B,
    MSR_MTRR_CAP = 0xFE,
    MSR_SYSENTER_CS = 0x174,
    MSR_SYSENTER_ESP = 0x175,
    MSR_SYSENTER_EIP = 0x176,
    MSR_MCG_CAP = 0x179,
    MSR_MCG_STATUS = 0x17A,
    MSR_PERF_STATUS = 0x198,
    MSR_PERF_CTL = 0x199,
    MSR_MISC_ENABLE = 0x1A0,
    MSR_DEBUGCTL = 0x1D9,
    MSR_LAST_BRANCH_FROM = 0x1DB,
    MSR_LAST_EXCEPTION_TO = 0x1DE,
    MSR_MTRR_PHYS0 = 0x200,
    MSR_PAT = 0x277,
    MSR_MTRR_DEF = 0x2FF,
    MSR_TSC_DEADLINE = 0x6E0,
    MSR_XSS = 0xDA0,
    MSR_KVM_WALL_CLOCK = 0x4B564D00,
    MSR_KVM_SYSTEM_TIME = 0x4B564D01,
    MSR_KVM_ASYNC_PF = 0x4B564D02,
    MSR_KVM_STEAL_TIME = 0x4B564D03,
    MSR_KVM_PV_EOI = 0x4B564D04,
};
#define MSR_EFER 0xC0000080u
#define MSR_STAR 0xC0000081u
#define MSR_LSTAR 0xC0000082u
#define MSR_CSTAR 0xC0000083u
#define MSR_FMASK 0xC0000084u
#define MSR_FS_BASE 0xC0000100u
#define MSR_GS_BASE 0xC0000101u
#define MSR_KERNEL_GS_BASE 0xC0000102u
#define MSR_TSC_AUX 0xC0000103u
#define MSR_K7_EVNTSEL0 0xC0010000u
#define MSR_K7_PERFCTR3 0xC0010007u
#define MSR_SYSCFG 0xC0010010u
#define MSR_HWCR 0xC0010015u
#define MSR_NB_CFG 0xC001001Fu
#define MSR_PATCH_LOADER 0xC0010020u
#define MSR_INT_PENDING 0xC0010055u
#define MSR_MMIO_CONF_BASE 0xC0010058u
#define MSR_TSEG_ADDR 0xC0010112u
#define MSR_TSEG_MASK 0xC0010113u
#define MSR_VM_CR 0xC0010114u
#define MSR_VM_HSAVE_PA 0xC0010117u
#define MSR_OSVW_LENGTH 0xC0010140u
#define MSR_OSVW_STATUS 0xC0010141u
#define MSR_LS_CFG 0xC0011020u
#define MSR_IC_CFG 0xC0011021u
#define MSR_DC_CFG 0xC0011022u
#define MSR_TW_CFG 0xC0011023u
#define MSR_DE_CFG 0xC0011029u
#define MSR_BU_CFG2 0xC001102Au
#define MSR_EX_CFG 0xC001102Cu

struct soft_vcpu;
/* Without privilege checks; false: no such MSR, or a value it does not take. */
bool soft_msr_read(struct soft_vcpu *c, uint32_t index, uint64_t *value);
bool soft_msr_write(struct soft_vcpu *c, uint32_t index, uint64_t value);
/* As the VMM sets it when it restores a state: TSC and TSC_ADJUST do not move each other, the APIC base may change mode. */
bool soft_msr_restore(struct soft_vcpu *c, uint32_t index, uint64_t value);

#endif
