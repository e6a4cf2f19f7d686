/* Host code of moves, addresses, the stack. */
#include "soft/jit/emitters.h"

EMITTER(nop) { return true; }

/* The host register that becomes a guest register's new value; load: a part of the old one stays. */
static unsigned write_reg(struct gen *g, unsigned offset, bool load)
{
    unsigned h = gen_reg_of(g, offset, load);
    g->r.dirty[h] = true;
    return h;
}

EMITTER(mov_rr)
{
    if (!ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    unsigned from = gen_reg_of(g, u->r1, true);
    gen_op_rr(g, v.size, 0x8B, write_reg(g, u->r0, v.size < 2), from);
    return true;
}
EMITTER(mov_ri)
{
    if (!ok_reg(u->r0) || v.size < 2)
        return false;
    gen_mov_imm64(g, write_reg(g, u->r0, false), v.size == 2 ? (uint32_t)u->imm : u->imm);
    return true;
}

static void rip_access(struct gen *g, const struct uop *u, unsigned size, enum soft_kind kind)
{
    gen_clobber(g);
    gen_rip_address(g, u, H_RSI);
    gen_tlb(g, 1u << size, kind);
}
EMITTER(load_r)
{
    if (!ok_reg(u->r0))
        return false;
    gen_access(g, u, v.form, v.size, ACCESS_READ);
    gen_op_rm(g, v.size, 0x8B, write_reg(g, u->r0, v.size < 2), g->at, g->at_disp);
    return true;
}
EMITTER(load_rip)
{
    if (!ok_reg(u->r0))
        return false;
    rip_access(g, u, v.size, ACCESS_READ);
    gen_op_rm(g, v.size, 0x8B, write_reg(g, u->r0, v.size < 2), g->at, g->at_disp);
    return true;
}
EMITTER(store_r)
{
    if (!ok_reg(u->r1))
        return false;
    gen_access(g, u, v.form, v.size, ACCESS_WRITE);
    gen_op_rm(g, v.size, 0x89, gen_reg_of(g, u->r1, true), g->at, g->at_disp);
    return true;
}
EMITTER(store_rip)
{
    if (!ok_reg(u->r1))
        return false;
    rip_access(g, u, v.size, ACCESS_WRITE);
    gen_op_rm(g, v.size, 0x89, gen_reg_of(g, u->r1, true), g->at, g->at_disp);
    return true;
}
EMITTER(store_i)
{
    gen_access(g, u, v.form, v.size, ACCESS_WRITE);
    gen_mov_imm64(g, H_RAX, v.size == 3 ? u->imm : (uint32_t)u->imm);
    gen_op_rm(g, v.size, 0x89, H_RAX, g->at, g->at_disp);
    return true;
}

/* [tmp0] to tmp1, and back. */
EMITTER(rmw_load)
{
    unsigned size = (unsigned)__builtin_ctz(u->size);
    gen_access_tmp(g, u, ACCESS_WRITE);
    unsigned h = write_reg(g, OFF_T1, false);
    if (size >= 2) {
        gen_op_rm(g, size, 0x8B, h, g->at, g->at_disp);
    } else {
        gen_prefix(g, 2, h, 0, g->at);
        gen_b1(g, 0x0F), gen_b1(g, 0xB6u | size), gen_memory(g, h, g->at, g->at_disp); /* movzx */
    }
    return true;
}
EMITTER(rmw_store)
{
    gen_access_tmp(g, u, ACCESS_WRITE);
    gen_op_rm(g, (unsigned)__builtin_ctz(u->size), 0x89, gen_reg_of(g, OFF_T1, true), g->at, g->at_disp);
    return true;
}

/* v.op is the source's size; zero extension is to 64 bits. */
static bool extend_rr(struct gen *g, const struct uop *u, unsigned from_size, unsigned size, bool sign)
{
    if (!ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    unsigned from = gen_reg_of(g, u->r1, true), h = write_reg(g, u->r0, size == 1);
    if (from_size == 2)
        gen_op_rr(g, sign ? 3 : 2, sign ? 0x63 : 0x8B, h, from);
    else
        gen_op_0f_rr(g, size, (sign ? 0xBEu : 0xB6u) | from_size, h, from);
    return true;
}
static bool extend_rm(struct gen *g, const struct uop *u, unsigned form, unsigned from_size, unsigned size, bool sign)
{
    if (!ok_reg(u->r0))
        return false;
    gen_access(g, u, form, from_size, ACCESS_READ);
    unsigned h = write_reg(g, u->r0, size == 1);
    if (from_size == 2) {
        gen_op_rm(g, sign ? 3 : 2, sign ? 0x63 : 0x8B, h, g->at, g->at_disp);
    } else {
        gen_prefix(g, size, h, 0, g->at);
        gen_b1(g, 0x0F);
        gen_b1(g, (sign ? 0xBEu : 0xB6u) | from_size);
        gen_memory(g, h, g->at, g->at_disp);
    }
    return true;
}
EMITTER(movzx_rr) { return extend_rr(g, u, v.op, 3, false); }
EMITTER(movsx_rr) { return extend_rr(g, u, v.op, v.size, true); }
EMITTER(movzx_rm) { return extend_rm(g, u, v.form, v.op, 3, false); }
EMITTER(movsx_rm) { return extend_rm(g, u, v.form, v.op, v.size, true); }

EMITTER(lea_r)
{
    if (!ok_reg(u->r0) || v.size < 2)
        return false;
    if (u->base != OFF_ZERO) /* before a register is taken for the result: it may be the same */
        gen_reg_of(g, u->base, true);
    if (v.form && u->index != OFF_ZERO)
        gen_reg_of(g, u->index, true);
    gen_lea_address(g, u, v.form, write_reg(g, u->r0, false), v.size);
    return true;
}
EMITTER(lea_rip)
{
    if (u->size != 8 || !ok_reg(u->r0))
        return false;
    gen_rip_address(g, u, write_reg(g, u->r0, false));
    return true;
}
static bool address_to_t0(struct gen *g)
{
    gen_op_rr(g, 3, 0x8B, write_reg(g, OFF_T0, false), H_RSI);
    return true;
}
EMITTER(ea_bd)
{
    gen_lea_address(g, u, 0, H_RSI, 3);
    return address_to_t0(g);
}
EMITTER(ea_bi)
{
    gen_lea_address(g, u, 1, H_RSI, 3);
    return address_to_t0(g);
}
EMITTER(ea_rip)
{
    gen_rip_address(g, u, H_RSI);
    return address_to_t0(g);
}

/* RSI: plus the base of a segment. */
static void add_base(struct gen *g, const struct uop *u)
{
    gen_op_rm(g, 3, 0x8B, H_RAX, H_RDI, FIELD(seg) + (int32_t)(u->seg * sizeof(struct soft_seg) + offsetof(struct soft_seg, base)));
    gen_prefix(g, 3, 0, 0, 0), gen_b1(g, 0x8D), gen_b1(g, 0x34), gen_b1(g, 0x06); /* lea rsi, [rsi + rax] */
}
EMITTER(ea_seg)
{
    gen_lea_address(g, u, 1, H_RSI, 3);
    add_base(g, u);
    return address_to_t0(g);
}
EMITTER(ea_a64_rip)
{
    gen_rip_address(g, u, H_RSI);
    add_base(g, u);
    return address_to_t0(g);
}
EMITTER(ea_abs)
{
    gen_mov_imm64(g, H_RSI, u->imm);
    if (u->aux)
        add_base(g, u);
    return address_to_t0(g);
}

/* RSP changes; the host's flags stay. */
static void move_stack(struct gen *g, int32_t by)
{
    unsigned h = gen_reg_of(g, RSP * 8, true);
    gen_op_rm(g, 3, 0x8D, h, h, by);
    g->r.dirty[h] = true;
}
EMITTER(push64_r)
{
    if (!ok_reg(u->r1))
        return false;
    gen_access_stack(g, u, -8, ACCESS_WRITE);
    gen_op_rm(g, 3, 0x89, gen_reg_of(g, u->r1, true), g->at, g->at_disp);
    move_stack(g, -8);
    return true;
}
EMITTER(push64_i)
{
    gen_access_stack(g, u, -8, ACCESS_WRITE);
    gen_mov_imm64(g, H_RAX, u->imm);
    gen_op_rm(g, 3, 0x89, H_RAX, g->at, g->at_disp);
    move_stack(g, -8);
    return true;
}
EMITTER(pop64_r)
{
    if (!ok_reg(u->r0))
        return false;
    gen_access_stack(g, u, 0, ACCESS_READ);
    move_stack(g, 8);
    gen_op_rm(g, 3, 0x8B, write_reg(g, u->r0, false), g->at, g->at_disp);
    return true;
}

static bool swap_bytes(struct gen *g, const struct uop *u, unsigned size)
{
    unsigned h = write_reg(g, u->r0, true);
    gen_prefix(g, size, 0, 0, h), gen_b1(g, 0x0F), gen_b1(g, 0xC8 | (h & 7));
    return true;
}
EMITTER(bswap32) { return swap_bytes(g, u, 2); }
EMITTER(bswap64) { return swap_bytes(g, u, 3); }

EMITTER(xchg_rr)
{
    if (v.size < 2 || !ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    unsigned a = write_reg(g, u->r0, true), b = write_reg(g, u->r1, true);
    gen_op_rr(g, v.size, 0x8B, H_RAX, a);
    gen_op_rr(g, v.size, 0x8B, a, b);
    gen_op_rr(g, v.size, 0x8B, b, H_RAX);
    return true;
}
EMITTER(cdqe)
{
    unsigned h = write_reg(g, RAX * 8, true);
    gen_op_rr(g, 3, 0x63, h, h);
    return true;
}
/* RDX: the sign of RAX. */
static bool sign_to_rdx(struct gen *g, unsigned size)
{
    gen_clobber(g);
    unsigned from = gen_reg_of(g, RAX * 8, true), h = write_reg(g, RDX * 8, false);
    gen_op_rr(g, size, 0x8B, h, from);
    gen_prefix(g, size, 0, 0, h), gen_b1(g, 0xC1), gen_b1(g, 0xF8 | (h & 7)), gen_b1(g, (8u << size) - 1); /* sar */
    return true;
}
EMITTER(cdq) { return sign_to_rdx(g, 2); }
EMITTER(cqo) { return sign_to_rdx(g, 3); }
