/* Host code of arithmetic, logic, shifts and multiplication. */
#include "soft/jit/emitters.h"

/* Host opcodes of ALU operations, r <- r op r/m form. */
static const uint8_t alu_opcode[ALU_OPS] = {0x03, 0x0B, 0x13, 0x1B, 0x23, 0x2B, 0x33, 0x3B, 0x85};
static const uint8_t alu_group[ALU_OPS] = {0, 1, 2, 3, 4, 5, 6, 7, 4};
static bool logic(unsigned op) { return op == ALU_AND || op == ALU_OR || op == ALU_XOR || op == ALU_TEST; }
static bool modifies(unsigned op) { return op != ALU_CMP && op != ALU_TEST; }
static bool reads_carry(unsigned op) { return op == ALU_ADC || op == ALU_SBB; }

static int64_t imm_of(const struct uop *u, unsigned size)
{
    return size == 0 ? (int8_t)u->imm : size == 1 ? (int16_t)u->imm : size == 2 ? (int32_t)u->imm : (int64_t)u->imm;
}

static void set_flags(struct gen *g, unsigned op, unsigned size, unsigned h)
{
    if (logic(op)) {
        gen_logic_flags(g, size, h);
    } else {
        gen_result_flags(g, size, h);
        g->pending = true;
    }
    g->host_flags = true;
    g->pending_keep_cf = false;
}

/* r <- r op r/m, or the same on a copy for what only sets flags: the host opcode and group to use. */
static unsigned opcode(unsigned op) { return op == ALU_CMP ? 0x2B : op == ALU_TEST ? 0x23 : alu_opcode[op]; }
static unsigned group(unsigned op) { return op == ALU_CMP ? 5 : alu_group[op]; }
static unsigned destination(struct gen *g, unsigned op, unsigned a)
{
    if (modifies(op)) {
        g->dirty[a] = true;
        return a;
    }
    gen_op_rr(g, 3, 0x8B, H_RAX, a);
    return H_RAX;
}

EMITTER(alu_rr)
{
    bool flags = v.flags && !u->aux;
    if (reads_carry(v.op))
        return false;
    if (!modifies(v.op) && !flags)
        return true;
    if (!ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    gen_settle(g);
    bool clear = (v.op == ALU_XOR || v.op == ALU_SUB) && u->r0 == u->r1 && v.size >= 2;
    unsigned a = gen_reg_of(g, u->r0, !clear), b = gen_reg_of(g, u->r1, true);
    a = destination(g, v.op, a);
    gen_op_rr(g, v.size, opcode(v.op), a, b);
    if (flags)
        set_flags(g, v.op, v.size, a);
    return true;
}
EMITTER(alu_ri)
{
    bool flags = v.flags && !u->aux;
    int64_t imm = imm_of(u, v.size);
    if (reads_carry(v.op))
        return false;
    if (!modifies(v.op) && !flags)
        return true;
    if (!ok_reg(u->r0) || imm != (int32_t)imm)
        return false;
    gen_settle(g);
    unsigned a = destination(g, v.op, gen_reg_of(g, u->r0, true));
    gen_op_imm(g, v.size, group(v.op), a, imm);
    if (flags)
        set_flags(g, v.op, v.size, a);
    return true;
}
EMITTER(alu_rm)
{
    if (reads_carry(v.op) || !ok_reg(u->r0))
        return false;
    gen_access(g, u, v.form, v.size, ACCESS_READ);
    unsigned a = destination(g, v.op, gen_reg_of(g, u->r0, true));
    gen_op_rm(g, v.size, opcode(v.op), a, H_RSI, 0);
    if (v.flags && !u->aux)
        set_flags(g, v.op, v.size, a);
    return true;
}
EMITTER(alu_mr)
{
    if (reads_carry(v.op) || !ok_reg(u->r1))
        return false;
    gen_access(g, u, v.form, v.size, modifies(v.op) ? ACCESS_WRITE : ACCESS_READ);
    unsigned b = gen_reg_of(g, u->r1, true);
    gen_op_rm(g, v.size, 0x8B, H_RAX, H_RSI, 0);
    gen_op_rr(g, v.size, opcode(v.op), H_RAX, b);
    if (modifies(v.op))
        gen_op_rm(g, v.size, 0x89, H_RAX, H_RSI, 0);
    if (v.flags && !u->aux)
        set_flags(g, v.op, v.size, H_RAX);
    return true;
}
EMITTER(alu_mi)
{
    int64_t imm = imm_of(u, v.size);
    if (reads_carry(v.op) || imm != (int32_t)imm)
        return false;
    gen_access(g, u, v.form, v.size, modifies(v.op) ? ACCESS_WRITE : ACCESS_READ);
    gen_op_rm(g, v.size, 0x8B, H_RAX, H_RSI, 0);
    gen_op_imm(g, v.size, group(v.op), H_RAX, imm);
    if (modifies(v.op))
        gen_op_rm(g, v.size, 0x89, H_RAX, H_RSI, 0);
    if (v.flags && !u->aux)
        set_flags(g, v.op, v.size, H_RAX);
    return true;
}

EMITTER(unary_r)
{
    if (!ok_reg(u->r0))
        return false;
    gen_settle(g);
    unsigned h = gen_reg_of(g, u->r0, true);
    g->dirty[h] = true;
    gen_prefix(g, v.size, 0, 0, h);
    gen_b1(g, v.op >= UN_NEG ? (v.size ? 0xF7 : 0xF6) : v.size ? 0xFF : 0xFE);
    gen_b1(g, 0xC0 | (v.op == UN_INC ? 0 : v.op == UN_DEC ? 1 : v.op == UN_NEG ? 3 : 2) << 3 | (h & 7));
    if (v.op != UN_NOT && v.flags && !u->aux) {
        gen_result_flags(g, v.size, h);
        g->pending = g->host_flags = true;
        g->pending_keep_cf = v.op != UN_NEG;
    }
    return true;
}

/* Without flags only. */
EMITTER(shift_ri)
{
    if (v.flags || v.op == SH_RCL || v.op == SH_RCR || !ok_reg(u->r0) || u->imm >= 8u << v.size)
        return false;
    gen_settle(g);
    unsigned h = gen_reg_of(g, u->r0, true);
    g->dirty[h] = true;
    gen_prefix(g, v.size, 0, 0, h);
    gen_b1(g, v.size ? 0xC1 : 0xC0);
    gen_b1(g, 0xC0u | (v.op == SH_SAL ? SH_SHL : v.op) << 3 | (h & 7));
    gen_b1(g, (uint8_t)u->imm);
    return true;
}

/* CF and OF are equal; the other flags stay what they were. */
static void imul_flags(struct gen *g, const struct uop *u)
{
    if (u->aux)
        return;
    gen_b1(g, 0x0F), gen_b1(g, 0x90), gen_b1(g, 0xC0);  /* seto al */
    gen_b1(g, 0x0F), gen_b1(g, 0xB6), gen_b1(g, 0xC0);  /* movzx eax, al */
    gen_prefix(g, 3, 0, 0, H_RAX), gen_b1(g, 0xC1), gen_b1(g, 0xE0), gen_b1(g, 63);
    gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[1]));
}
EMITTER(imul_rr)
{
    if (!ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    gen_settle(g);
    unsigned from = gen_reg_of(g, u->r1, true), h = gen_reg_of(g, u->r0, true);
    g->dirty[h] = true;
    gen_op_0f_rr(g, v.size, 0xAF, h, from);
    imul_flags(g, u);
    return true;
}
EMITTER(imul_rri)
{
    if (!ok_reg(u->r0) || !ok_reg(u->r1) || v.size == 1 || u->imm != (uint64_t)(int64_t)(int32_t)u->imm)
        return false;
    gen_settle(g);
    unsigned from = gen_reg_of(g, u->r1, true), h = gen_reg_of(g, u->r0, false);
    g->dirty[h] = true;
    gen_op_rr(g, v.size, 0x69, h, from);
    gen_b4(g, (uint32_t)u->imm);
    imul_flags(g, u);
    return true;
}

/* By BSR, which every host has. RCX: the count; RAX: what is stored. */
EMITTER(lzcnt)
{
    unsigned bits = u->size * 8, wide = u->size == 8 ? 3 : 2;
    if (!ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    gen_settle(g);
    unsigned from = gen_reg_of(g, u->r1, true);
    if (u->size == 2) {
        gen_op_0f_rr(g, 2, 0xB7, H_RSI, from); /* movzx */
        from = H_RSI;
    }
    gen_mov_imm64(g, H_RAX, 2 * bits - 1);
    gen_op_0f_rr(g, wide, 0xBD, H_RCX, from);                                         /* bsr */
    gen_op_0f_rr(g, wide, 0x44, H_RCX, H_RAX);                                        /* cmovz */
    gen_op_imm(g, 2, 6, H_RCX, bits - 1);                                             /* xor: bits for a zero source */
    gen_op_rm(g, 3, 0x8B, H_RAX, H_RDI, FIELD(lf[1]));
    gen_op_rr(g, 3, 0x8B, H_RSI, H_RAX);
    gen_op_rr(g, 3, 0x03, H_RSI, H_RSI);
    gen_op_rr(g, 3, 0x33, H_RAX, H_RSI);
    gen_prefix(g, 3, 0, 0, H_RAX), gen_b1(g, 0xC1), gen_b1(g, 0xE8), gen_b1(g, 63);   /* shr: OF */
    gen_op_rr(g, 2, 0x8B, H_RSI, H_RCX);
    gen_prefix(g, 2, 0, 0, H_RSI), gen_b1(g, 0xC1), gen_b1(g, 0xEE), gen_b1(g, (unsigned)__builtin_ctz(bits)); /* shr: CF */
    gen_op_rr(g, 2, 0x33, H_RAX, H_RSI);
    gen_op_rr(g, 2, 0x03, H_RSI, H_RSI);
    gen_op_rr(g, 2, 0x0B, H_RAX, H_RSI);
    gen_prefix(g, 3, 0, 0, H_RAX), gen_b1(g, 0xC1), gen_b1(g, 0xE0), gen_b1(g, 62);   /* shl */
    gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[1]));
    gen_mov_imm64(g, H_RAX, 0);
    gen_op_rr(g, 2, 0x85, H_RCX, H_RCX);                                              /* test */
    gen_b1(g, 0x0F), gen_b1(g, 0x95), gen_b1(g, 0xC0);                                /* setne al */
    gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[0]));
    gen_op_imm(g, 2, 6, H_RAX, 1);
    gen_prefix(g, 2, 0, 0, H_RAX), gen_b1(g, 0xC1), gen_b1(g, 0xE0), gen_b1(g, 8);    /* shl */
    gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[2]));
    unsigned h = gen_reg_of(g, u->r0, u->size == 2);
    g->dirty[h] = true;
    gen_op_rr(g, u->size == 2 ? 1 : 2, 0x8B, h, H_RCX);
    return true;
}
