/* Instruction helpers: stack, branches, far transfers, segment registers, interrupts and flags, in every mode.
 * The common forms of 64-bit mode have handlers of their own in exec_mem.c and exec_branch.c. */
#include "soft/mmu/access.h"
#include "soft/ops/helpers.h"

/* ---- stack ---- */

static uint64_t stack_mask(const struct soft_vcpu *c)
{
    return c->code64 ? UINT64_MAX : SEG_DB(&c->seg[SEG_SS]) ? UINT32_MAX : 0xFFFF;
}
static void set_sp(struct soft_vcpu *c, uint64_t sp)
{
    uint64_t mask = stack_mask(c);
    if (mask == 0xFFFF)
        SET16(RSP * 8, sp);
    else
        c->gpr[RSP] = sp & mask;
}
/* Linear address of the stack's byte at offset sp (masked), for an access of size bytes. */
static uint64_t stack_linear(struct soft_vcpu *c, uint64_t sp, unsigned size, bool write)
{
    sp &= stack_mask(c);
    c->access_ss = 1;
    return c->code64 ? sp : soft_seg_check(c, SEG_SS, sp, size, write);
}
static void stack_put(struct soft_vcpu *c, uint64_t sp, unsigned size, uint64_t v)
{
    store(c, stack_linear(c, sp, size, true), size, v);
}
static uint64_t stack_get(struct soft_vcpu *c, uint64_t sp, unsigned size)
{
    return load(c, stack_linear(c, sp, size, false), size);
}
static void push(struct soft_vcpu *c, unsigned size, uint64_t v)
{
    uint64_t sp = c->gpr[RSP] - size;
    stack_put(c, sp, size, v);
    set_sp(c, sp);
}

HELPER(h_push_r) { push(c, u->size, get_reg(c, u->r1, u->size)); }
HELPER(h_push_i) { push(c, u->size, (uint64_t)(int64_t)u->disp); }
HELPER(h_push_seg) { push(c, u->size, c->seg[u->aux].selector); }
HELPER(h_pop_r)
{
    uint64_t sp = c->gpr[RSP], v = stack_get(c, sp, u->size);
    set_sp(c, sp + u->size);
    set_reg(c, u->r0, u->size, v);
}
HELPER(h_pop_m)
{
    uint64_t sp = c->gpr[RSP], v = stack_get(c, sp, u->size);
    c->access_ss = u->seg == SEG_SS;
    store(c, c->tmp[0], u->size, v);
    set_sp(c, sp + u->size);
}
HELPER(h_pop_seg)
{
    uint64_t sp = c->gpr[RSP];
    uint16_t selector = (uint16_t)stack_get(c, sp, u->size);
    uint64_t next = next_rip(c, u);
    /* The new SP is in the size of the old stack segment. */
    uint64_t mask = stack_mask(c);
    soft_load_seg(c, u->aux, selector);
    if (mask == 0xFFFF)
        SET16(RSP * 8, sp + u->size);
    else
        c->gpr[RSP] = (sp + u->size) & mask;
    c->rip = next;
    if (u->aux == SEG_SS)
        soft_cast_shadow(c, 2);
}
/* Not all or nothing: what is written before a fault is written, RSP stays. */
HELPER(h_pusha)
{
    uint64_t sp = c->gpr[RSP];
    for (unsigned i = 0; i < 8; i++)
        stack_put(c, sp - (i + 1) * u->size, u->size, c->gpr[i]);
    set_sp(c, sp - 8 * u->size);
}
HELPER(h_popa)
{
    /* A fault in between leaves the registers loaded so far, as in hardware; doing it again repeats them. */
    uint64_t sp = c->gpr[RSP];
    for (unsigned i = 0; i < 8; i++) {
        uint64_t v = stack_get(c, sp + i * u->size, u->size);
        if (7 - i != RSP)
            set_reg(c, (7 - i) * 8, u->size, v);
    }
    set_sp(c, sp + 8 * u->size);
}
/* With a 16-bit stack and a 32-bit operand the frame pointer is ESP whole, its upper half unchanged: APM vol. 3, ENTER,
 * "temp_RBP = RSP" and "RBP.v = temp_RBP". The display is read through BP. */
HELPER(h_enter)
{
    unsigned size = u->size, level = u->aux;
    uint64_t sp = c->gpr[RSP], bp = c->gpr[RBP], mask = stack_mask(c);
    sp -= size;
    stack_put(c, sp, size, bp);
    uint64_t frame = mask == 0xFFFF ? (c->gpr[RSP] & ~mask) | (sp & mask) : sp & mask;
    if (level) {
        for (unsigned i = 1; i < level; i++) {
            bp -= size;
            uint64_t v = stack_get(c, bp, size);
            sp -= size;
            stack_put(c, sp, size, v);
        }
        sp -= size;
        stack_put(c, sp, size, frame);
    }
    sp -= (uint16_t)u->disp;
    soft_probe_write(c, stack_linear(c, sp, size, true), size);
    set_sp(c, sp);
    set_reg(c, RBP * 8, size, frame);
}
HELPER(h_leave)
{
    uint64_t sp = c->gpr[RBP] & stack_mask(c), v = stack_get(c, sp, u->size);
    set_sp(c, sp + u->size);
    set_reg(c, RBP * 8, u->size, v);
}

/* ---- flags ---- */

static bool vm86(const struct soft_vcpu *c) { return c->rflags & F_VM; }
static unsigned iopl(const struct soft_vcpu *c) { return (c->rflags & F_IOPL) >> 12; }

HELPER(h_pushf)
{
    if (vm86(c) && iopl(c) < 3)
        soft_raise_error(c, VEC_GP, 0);
    push(c, u->size, soft_flags(c) & ~(F_VM | F_RF));
}
HELPER(h_popf)
{
    if (vm86(c) && iopl(c) < 3)
        soft_raise_error(c, VEC_GP, 0);
    uint64_t sp = c->gpr[RSP];
    uint32_t v = (uint32_t)stack_get(c, sp, u->size), old = soft_flags(c);
    uint32_t mask = F_ARITH | F_TF | F_DF | F_NT | F_AC | F_ID;
    if (c->cpl == 0)
        mask |= F_IOPL;
    if (c->cpl <= iopl(c))
        mask |= F_IF;
    if (u->size == 2)
        mask &= 0xFFFF;
    set_sp(c, sp + u->size);
    soft_set_flags(c, ((old & ~mask) | (v & mask)) & ~F_RF);
    c->rip = next_rip(c, u);
    if ((old ^ c->rflags) & F_AC)
        soft_mode_changed(c);
    soft_system_flags_changed(c);
}
HELPER(h_clc) { flags_set_co(c, 0, flag_of(c)); }
HELPER(h_stc) { flags_set_co(c, 1, flag_of(c)); }
HELPER(h_cmc) { flags_set_co(c, !flag_cf(c), flag_of(c)); }
HELPER(h_cld) { c->rflags &= ~F_DF; }
HELPER(h_std) { c->rflags |= F_DF; }
static void check_if_access(struct soft_vcpu *c)
{
    if ((c->cr0 & CR0_PE) && (vm86(c) ? iopl(c) < 3 : c->cpl > iopl(c)))
        soft_raise_error(c, VEC_GP, 0);
}
HELPER(h_cli)
{
    check_if_access(c);
    c->rflags &= ~F_IF;
}
HELPER(h_sti)
{
    check_if_access(c);
    c->rip = next_rip(c, u);
    if (!(c->rflags & F_IF)) {
        c->rflags |= F_IF;
        soft_cast_shadow(c, 1);
    }
    soft_system_flags_changed(c);
}
HELPER(h_lahf) { REG8(RAX * 8 + 1) = (uint8_t)((flags_arith(c) & 0xD5) | 2); }
HELPER(h_sahf)
{
    flags_set_arith(c, (REG8(RAX * 8 + 1) & 0xD5u) | (flag_of(c) ? F_OF : 0));
}

/* ---- near branches ---- */

static void branch(struct soft_vcpu *c, unsigned size, uint64_t target)
{
    if (size == 2)
        target &= 0xFFFF;
    if (!c->code64)
        target &= UINT32_MAX;
    if (c->code64 ? !soft_canonical(target) : target > c->seg[SEG_CS].limit)
        soft_raise_error(c, VEC_GP, 0);
    c->rip = target;
}
HELPER(h_fall) { c->rip = next_rip(c, u); }
HELPER(h_jmp_rel) { branch(c, u->size, next_rip(c, u) + (uint64_t)(int64_t)u->disp); }
HELPER(h_jcc_rel)
{
    if (flags_condition(c, u->aux))
        h_jmp_rel(c, u);
    else
        c->rip = next_rip(c, u);
}
static void call(struct soft_vcpu *c, struct uop *u, uint64_t target)
{
    uint64_t at = c->rip, next = next_rip(c, u), sp = c->gpr[RSP];
    branch(c, u->size, target);
    target = c->rip;
    c->rip = at;
    stack_put(c, sp - u->size, u->size, next);
    set_sp(c, sp - u->size);
    c->rip = target;
}
HELPER(h_call_rel) { call(c, u, next_rip(c, u) + (uint64_t)(int64_t)u->disp); }
HELPER(h_jmp_r) { branch(c, u->size, get_reg(c, u->r1, u->size)); }
HELPER(h_call_r) { call(c, u, get_reg(c, u->r1, u->size)); }
HELPER(h_ret)
{
    uint64_t sp = c->gpr[RSP], target = stack_get(c, sp, u->size);
    branch(c, u->size, target);
    set_sp(c, sp + u->size + (uint32_t)u->disp);
}
HELPER(h_loop)
{
    uint64_t mask = u->base == 8 ? UINT64_MAX : u->base == 4 ? UINT32_MAX : 0xFFFF, count = c->gpr[RCX];
    bool taken;
    if (u->aux == 3) {
        taken = (count & mask) == 0;
    } else {
        count--;
        taken = (count & mask) != 0 && (u->aux == 2 || flag_zf(c) == (u->aux == 1));
    }
    if (taken)
        branch(c, u->size, next_rip(c, u) + (uint64_t)(int64_t)u->disp);
    else
        c->rip = next_rip(c, u);
    if (u->aux != 3)
        set_reg(c, RCX * 8, u->base, count);
}

/* ---- far transfers, interrupts ---- */

static uint16_t far_selector(const struct uop *u) { return (uint16_t)(u->r0 | u->r1 << 8); }

HELPER(h_jmp_far) { soft_far_jump(c, far_selector(u), (uint32_t)u->disp, u->size); }
HELPER(h_call_far) { soft_far_call(c, far_selector(u), (uint32_t)u->disp, u->size, next_rip(c, u)); }
HELPER(h_jmp_far_m)
{
    uint64_t offset = load(c, c->tmp[0], u->size);
    soft_far_jump(c, (uint16_t)load(c, c->tmp[0] + u->size, 2), offset, u->size);
}
HELPER(h_call_far_m)
{
    uint64_t offset = load(c, c->tmp[0], u->size);
    soft_far_call(c, (uint16_t)load(c, c->tmp[0] + u->size, 2), offset, u->size, next_rip(c, u));
}
HELPER(h_ret_far) { soft_far_return(c, u->size, (uint16_t)u->disp); }
HELPER(h_iret) { soft_iret(c, u->size); }
HELPER(h_int3) { soft_software_interrupt(c, VEC_BP, EVENT_INT3, next_rip(c, u)); }
HELPER(h_int) { soft_software_interrupt(c, u->aux, EVENT_SOFTWARE, next_rip(c, u)); }
HELPER(h_icebp) { soft_software_interrupt(c, VEC_DB, EVENT_ICEBP, next_rip(c, u)); }
HELPER(h_into)
{
    if (flag_of(c))
        soft_software_interrupt(c, VEC_OF, EVENT_INT3, next_rip(c, u));
    else
        c->rip = next_rip(c, u);
}
HELPER(h_ud) { soft_raise(c, VEC_UD); }
HELPER(h_gp) { soft_raise_error(c, VEC_GP, 0); }

/* ---- segment registers ---- */

static void load_segment(struct soft_vcpu *c, struct uop *u, uint16_t selector)
{
    uint64_t next = next_rip(c, u);
    soft_load_seg(c, u->aux, selector);
    c->rip = next;
    if (u->aux == SEG_SS)
        soft_cast_shadow(c, 2);
}
HELPER(h_mov_to_seg) { load_segment(c, u, REG16(u->r0)); }
HELPER(h_mov_to_seg_m) { load_segment(c, u, (uint16_t)load(c, c->tmp[0], 2)); }
HELPER(h_mov_from_seg) { set_reg(c, u->r0, u->size, c->seg[u->aux].selector); }
HELPER(h_mov_from_seg_m) { store(c, c->tmp[0], 2, c->seg[u->aux].selector); }
HELPER(h_load_far)
{
    uint64_t offset = load(c, c->tmp[0], u->size), next = next_rip(c, u);
    soft_load_seg(c, u->aux, (uint16_t)load(c, c->tmp[0] + u->size, 2));
    set_reg(c, u->r0, u->size, offset);
    c->rip = next;
}
HELPER(h_bound)
{
    unsigned size = u->size;
    int64_t low = (int64_t)load(c, c->tmp[0], size), high = (int64_t)load(c, c->tmp[0] + size, size);
    int64_t i = (int64_t)get_reg(c, u->r0, size);
    if (size == 2 ? (int16_t)i < (int16_t)low || (int16_t)i > (int16_t)high
                  : (int32_t)i < (int32_t)low || (int32_t)i > (int32_t)high)
        soft_raise(c, VEC_BR);
}
static bool arpl(struct soft_vcpu *c, uint16_t *a, uint16_t b)
{
    bool adjust = (*a & 3) < (b & 3);
    if (adjust)
        *a = (uint16_t)((*a & ~3) | (b & 3));
    uint32_t f = flags_arith(c) & ~F_ZF;
    flags_set_arith(c, adjust ? f | F_ZF : f);
    return adjust;
}
HELPER(h_arpl_r)
{
    if (!soft_protected(c))
        soft_raise(c, VEC_UD);
    uint16_t a = REG16(u->r0);
    if (arpl(c, &a, REG16(u->r1)))
        REG16(u->r0) = a;
}
HELPER(h_arpl_m)
{
    if (!soft_protected(c))
        soft_raise(c, VEC_UD);
    /* Memory is written, and checked for that, only when RPL changes. */
    uint16_t a = (uint16_t)load(c, c->tmp[0], 2);
    if ((a & 3) < (REG16(u->r1) & 3)) {
        soft_seg_check(c, u->seg, (uint32_t)(c->tmp[0] - c->seg[u->seg].base), 2, true);
        soft_probe_write(c, c->tmp[0], 2);
    }
    if (arpl(c, &a, REG16(u->r1)))
        store(c, c->tmp[0], 2, a);
}
