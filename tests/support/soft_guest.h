/* What the programs share that run 64-bit guests on vCPUs at the same time: a host without devices, and a vCPU's first state. */
#ifndef TESTS_SOFT_GUEST_H
#define TESTS_SOFT_GUEST_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <string.h>

#include "soft/soft.h"

static uint64_t no_device(void *ctx, const struct soft_access *access)
{
    (void)ctx, (void)access;
    return ~0ull;
}

static void same_bytes(void *ctx, void *buffer, size_t size)
{
    (void)ctx;
    memset(buffer, 7, size);
}

static const struct soft_host NO_DEVICES = { .access = no_device, .random = same_bytes };

/* The vCPU begins in 64-bit mode at CPL 0 with flat segments: code's selector is 8, data's 16. False: its state was refused. */
static bool begin_64bit(struct soft_vm *vm, uint32_t index, const struct kvm_regs *r, uint64_t tables, struct kvm_dtable gdt,
                        struct kvm_dtable idt)
{
    const struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
    const struct kvm_segment data = { .limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
    const struct kvm_mp_state mp = { KVM_MP_STATE_RUNNABLE };
    struct kvm_sregs s;
    if (soft_vcpu_get(vm, index, SOFT_STATE_SREGS, &s, sizeof s))
        return false;
    s.cs = code;
    s.ds = s.es = s.ss = s.fs = s.gs = data;
    s.gdt = gdt;
    s.idt = idt;
    s.cr0 = 0x80000033;
    s.cr3 = tables;
    s.cr4 = 0x220; /* PAE, OSFXSR */
    s.efer = 0x500;
    return !soft_vcpu_set(vm, index, SOFT_STATE_SREGS, &s, sizeof s) && !soft_vcpu_set(vm, index, SOFT_STATE_REGS, r, sizeof *r) &&
           !soft_vcpu_set(vm, index, SOFT_STATE_MP, &mp, sizeof mp);
}

/* After that: it is a program for 64-bit Linux, as far as segments, control registers and RFLAGS go, at CPL 3. SYSCALL goes to
 * `entry`. */
static inline bool go_to_user(struct soft_vm *vm, uint32_t index, uint64_t entry)
{
    const struct kvm_segment code = { .limit = ~0u, .selector = 0x33, .type = 11, .dpl = 3, .present = 1, .s = 1, .l = 1, .g = 1 };
    const struct kvm_segment data = { .limit = ~0u, .selector = 0x2B, .type = 3, .dpl = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
    const struct kvm_segment null = { .unusable = 1 };
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[2];
    } msrs = { { .nmsrs = 2 }, { { .index = 0xC0000081, .data = 0x23ull << 48 | 0x10ull << 32 }, { .index = 0xC0000082, .data = entry } } };
    struct kvm_sregs s;
    struct kvm_regs r;
    if (soft_vcpu_get(vm, index, SOFT_STATE_SREGS, &s, sizeof s) || soft_vcpu_get(vm, index, SOFT_STATE_REGS, &r, sizeof r))
        return false;
    s.cs = code;
    s.ss = data;
    s.ds = s.es = s.fs = s.gs = null;
    s.cr0 |= 0x20;  /* NE */
    s.cr4 |= 0x400; /* OSXMMEXCPT */
    s.efer |= 1;    /* SCE */
    r.rflags = 0x202;
    return !soft_vcpu_set(vm, index, SOFT_STATE_SREGS, &s, sizeof s) && !soft_vcpu_set(vm, index, SOFT_STATE_REGS, &r, sizeof r) &&
           !soft_vcpu_set(vm, index, SOFT_STATE_MSRS, &msrs, sizeof msrs);
}

#endif
