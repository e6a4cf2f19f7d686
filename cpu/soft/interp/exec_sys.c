/* Instruction helpers: system instructions. Most of the work is in system.c and segment.c; here are operands and
 * privilege checks of those that have no function of their own there. */
#include <errno.h>
#include <linux/kvm_para.h>

#include "soft/mmu/access.h"
#include "soft/ops/helpers.h"

static void need_cpl0(struct soft_vcpu *c)
{
    if (c->cpl)
        soft_raise_error(c, VEC_GP, 0);
}
static void need_protected(struct soft_vcpu *c)
{
    if (!soft_protected(c))
        soft_raise(c, VEC_UD);
}
static void umip(struct soft_vcpu *c)
{
    if ((c->cr4 & CR4_UMIP) && c->cpl)
        soft_raise_error(c, VEC_GP, 0);
}

HELPER(h_in)
{
    uint16_t port = u->disp < 0 ? REG16(RDX * 8) : (uint16_t)u->disp;
    uint64_t next = next_rip(c, u);
    soft_check_io(c, port, u->size);
    set_reg(c, RAX * 8, u->size, soft_port_read(c, port, u->size));
    c->rip = next;
}
HELPER(h_out)
{
    uint16_t port = u->disp < 0 ? REG16(RDX * 8) : (uint16_t)u->disp;
    uint64_t next = next_rip(c, u);
    soft_check_io(c, port, u->size);
    soft_port_write(c, port, u->size, (uint32_t)get_reg(c, RAX * 8, u->size));
    c->rip = next;
}
HELPER(h_hlt)
{
    uint64_t next = next_rip(c, u);
    soft_hlt(c, next);
    c->rip = next;
}
HELPER(h_pause)
{
    c->rip = next_rip(c, u);
    soft_pause(c);
}
HELPER(h_monitor)
{
    need_cpl0(c);
    uint64_t offset = c->gpr[RAX];
    if (u->base < 8)
        offset &= u->base == 4 ? UINT32_MAX : 0xFFFF;
    load(c, c->code64 ? offset + (u->seg >= SEG_FS ? c->seg[u->seg].base : 0) : soft_seg_check(c, u->seg, offset, 1, false), 1);
}
HELPER(h_mwait)
{
    need_cpl0(c);
    c->rip = next_rip(c, u);
    soft_mwait(c);
}

HELPER(h_mov_from_cr)
{
    if (u->aux == 1 || (u->aux > 4 && u->aux != 8))
        soft_raise(c, VEC_UD);
    need_cpl0(c);
    set_reg(c, u->r0, u->size, soft_read_cr(c, u->aux));
}
HELPER(h_mov_to_cr)
{
    if (u->aux == 1 || (u->aux > 4 && u->aux != 8))
        soft_raise(c, VEC_UD);
    need_cpl0(c);
    uint64_t next = next_rip(c, u);
    soft_write_cr(c, u->aux, get_reg(c, u->r0, u->size));
    c->rip = next;
}
HELPER(h_mov_from_dr)
{
    if (u->aux > 7)
        soft_raise(c, VEC_UD);
    need_cpl0(c);
    set_reg(c, u->r0, u->size, soft_read_dr(c, u->aux));
}
HELPER(h_mov_to_dr)
{
    if (u->aux > 7)
        soft_raise(c, VEC_UD);
    need_cpl0(c);
    uint64_t next = next_rip(c, u);
    soft_write_dr(c, u->aux, get_reg(c, u->r0, u->size));
    c->rip = next;
}
HELPER(h_clts)
{
    need_cpl0(c);
    uint64_t next = next_rip(c, u);
    c->cr0 &= ~CR0_TS;
    c->rip = next;
}
HELPER(h_lmsw)
{
    need_cpl0(c);
    uint64_t next = next_rip(c, u);
    soft_lmsw(c, REG16(u->r1));
    c->rip = next;
}
HELPER(h_smsw) { umip(c); set_reg(c, u->r0, u->size, c->cr0); }
HELPER(h_smsw_m) { umip(c); store(c, c->tmp[0], 2, c->cr0); }

static void store_table(struct soft_vcpu *c, uint64_t base, uint16_t limit)
{
    umip(c);
    uint8_t image[10];
    memcpy(image, &limit, 2);
    memcpy(image + 2, &base, 8);
    soft_store_bytes(c, c->tmp[0], image, c->code64 ? 10 : 6);
}
HELPER(h_sgdt) { store_table(c, c->gdtr.base, c->gdtr.limit); }
HELPER(h_sidt) { store_table(c, c->idtr.base, c->idtr.limit); }
static void load_table(struct soft_vcpu *c, const struct uop *u, uint64_t *base, uint16_t *limit)
{
    need_cpl0(c);
    uint64_t next = next_rip(c, u);
    uint16_t new_limit = (uint16_t)load(c, c->tmp[0], 2);
    uint64_t new_base = load(c, c->tmp[0] + 2, c->code64 ? 8 : 4);
    if (c->code64 && !soft_canonical(new_base))
        soft_raise_error(c, VEC_GP, 0);
    if (!c->code64 && u->size == 2)
        new_base &= 0xFFFFFF;
    *base = new_base;
    *limit = new_limit;
    c->rip = next;
}
HELPER(h_lgdt) { load_table(c, u, &c->gdtr.base, &c->gdtr.limit); }
HELPER(h_lidt) { load_table(c, u, &c->idtr.base, &c->idtr.limit); }
HELPER(h_sldt) { need_protected(c); umip(c); set_reg(c, u->r0, u->size, c->ldtr.selector); }
HELPER(h_str) { need_protected(c); umip(c); set_reg(c, u->r0, u->size, c->tr.selector); }
HELPER(h_sldt_m) { need_protected(c); umip(c); store(c, c->tmp[0], 2, c->ldtr.selector); }
HELPER(h_str_m) { need_protected(c); umip(c); store(c, c->tmp[0], 2, c->tr.selector); }
HELPER(h_lldt) { need_protected(c); need_cpl0(c); soft_load_ldtr(c, REG16(u->r1)); }
HELPER(h_ltr) { need_protected(c); need_cpl0(c); soft_load_tr(c, REG16(u->r1)); }

static void set_zf(struct soft_vcpu *c, bool zf)
{
    uint32_t f = flags_arith(c) & ~F_ZF;
    flags_set_arith(c, zf ? f | F_ZF : f);
}
HELPER(h_verr) { need_protected(c); set_zf(c, soft_verify(c, REG16(u->r1), false)); }
HELPER(h_verw) { need_protected(c); set_zf(c, soft_verify(c, REG16(u->r1), true)); }
HELPER(h_lar)
{
    uint32_t v = 0;
    need_protected(c);
    bool ok = soft_lar(c, REG16(u->r1), &v);
    if (ok)
        set_reg(c, u->r0, u->size, v);
    set_zf(c, ok);
}
HELPER(h_lsl)
{
    uint32_t v = 0;
    need_protected(c);
    bool ok = soft_lsl(c, REG16(u->r1), &v);
    if (ok)
        set_reg(c, u->r0, u->size, v);
    set_zf(c, ok);
}

HELPER(h_invlpg)
{
    need_cpl0(c);
    uint64_t next = next_rip(c, u);
    soft_invlpg(c, c->tmp[0]);
    c->rip = next;
}
HELPER(h_invpcid)
{
    need_cpl0(c);
    uint64_t next = next_rip(c, u), pcid = load(c, c->tmp[0], 8), linear = load(c, c->tmp[0] + 8, 8);
    soft_invpcid(c, get_reg(c, u->r0, c->code64 ? 8 : 4), pcid, linear);
    c->rip = next;
}
HELPER(h_wbinvd) { need_cpl0(c); }
HELPER(h_swapgs)
{
    need_cpl0(c);
    uint64_t base = c->seg[SEG_GS].base;
    c->seg[SEG_GS].base = c->kernel_gs_base;
    c->kernel_gs_base = base;
}
static void set_ac(struct soft_vcpu *c, const struct uop *u, bool ac)
{
    if (c->cpl || !(c->cr0 & CR0_PE))
        soft_raise(c, VEC_UD);
    uint64_t next = next_rip(c, u);
    c->rflags = ac ? c->rflags | F_AC : c->rflags & ~F_AC;
    soft_mode_changed(c);
    c->rip = next;
}
HELPER(h_clac) { set_ac(c, u, false); }
HELPER(h_stac) { set_ac(c, u, true); }
HELPER(h_syscall) { soft_syscall(c, next_rip(c, u)); }
HELPER(h_sysret) { soft_sysret(c, u->aux); }
HELPER(h_sysenter) { soft_sysenter(c); }
HELPER(h_sysexit) { soft_sysexit(c, u->aux); }
HELPER(h_rdmsr)
{
    need_cpl0(c);
    uint64_t next = next_rip(c, u), v = soft_rdmsr(c, REG32(RCX * 8));
    SET32(RAX * 8, v);
    SET32(RDX * 8, v >> 32);
    c->rip = next;
}
HELPER(h_wrmsr)
{
    need_cpl0(c);
    uint64_t next = next_rip(c, u);
    soft_wrmsr(c, REG32(RCX * 8), (uint64_t)REG32(RDX * 8) << 32 | REG32(RAX * 8));
    c->rip = next;
}
HELPER(h_xgetbv)
{
    if (!(c->cr4 & CR4_OSXSAVE))
        soft_raise(c, VEC_UD);
    uint32_t index = REG32(RCX * 8);
    if (index > 1)
        soft_raise_error(c, VEC_GP, 0);
    uint64_t v = index ? c->xcr0 & fpu_xinuse(&c->fpu) : c->xcr0;
    SET32(RAX * 8, v);
    SET32(RDX * 8, v >> 32);
}
HELPER(h_xsetbv)
{
    if (!(c->cr4 & CR4_OSXSAVE))
        soft_raise(c, VEC_UD);
    need_cpl0(c);
    uint64_t next = next_rip(c, u);
    soft_xsetbv(c, REG32(RCX * 8), (uint64_t)REG32(RDX * 8) << 32 | REG32(RAX * 8));
    c->rip = next;
}
/* A hypercall as KVM answers it (Documentation/virt/kvm/x86/hypercalls.rst): one is offered, and CPL 3 may make none. */
HELPER(h_vmcall)
{
    uint64_t next = next_rip(c, u), mask = c->code64 ? UINT64_MAX : UINT32_MAX;
    if (c->cpl)
        c->gpr[RAX] = (uint64_t)-KVM_EPERM;
    else if ((c->gpr[RAX] & mask) == KVM_HC_SEND_IPI)
        c->gpr[RAX] = (uint64_t)irqchip_multicast(c->vm->irqchip, c->gpr[RBX] & mask, c->gpr[RCX] & mask, c->code64 ? 64 : 32,
                                                  (uint32_t)c->gpr[RDX], (uint32_t)c->gpr[RSI]);
    else
        c->gpr[RAX] = (uint64_t)-KVM_ENOSYS;
    if (!c->code64)
        c->gpr[RAX] &= UINT32_MAX;
    c->rip = next;
}
HELPER(h_clflush) { load(c, c->tmp[0], 1); }
HELPER(h_fsgsbase)
{
    if (!(c->cr4 & CR4_FSGSBASE))
        soft_raise(c, VEC_UD);
    struct soft_seg *s = &c->seg[u->aux & 1 ? SEG_GS : SEG_FS];
    if (u->aux < 2) {
        set_reg(c, u->r0, u->size, s->base);
        return;
    }
    uint64_t base = get_reg(c, u->r0, u->size);
    if (!soft_canonical(base))
        soft_raise_error(c, VEC_GP, 0);
    s->base = base;
}
