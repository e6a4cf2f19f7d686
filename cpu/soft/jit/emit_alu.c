/* Host code of arithmetic, logic, shifts and multiplication. */
#include "soft/jit/emitters.h"

/* Host opcodes of ALU operations, r <- r op r/m form. */
static const uint8_t alu_opcode[ALU_OPS] = {0x03, 0x0B, 0x13, 0x1B, 0x23, 0x2B, 0x33, 0x3B, 0x85};
static const uint8_t alu_group[ALU_OPS] = {0, 1, 2, 3, 4, 5, 6, 7, 4};
static bool logic(unsigned op) { return op == ALU_AND || op == ALU_OR || op == ALU_XOR || op == ALU_TEST; }
static bool modifies(unsigned op) { return op != ALU_CMP && op != ALU_TEST; }
static bool reads_carry(unsigned op) { return op == ALU_ADC || op == ALU_SBB; }

/* Whether flags that micro-op g->uop sets may be wanted as lazy ones, in the hot path: by a handler, or at the block's end.
 * A guess: without it they are made lazy by more instructions. */
static bool wanted_lazy(const struct gen *g)
{
    for (unsigned i = g->uop + 1; i < g->count; i++) {
        const struct uop *u = &g->code[i];
        struct variant v = op_variant(g->ops[i]);
        struct uop *taken = NULL, *next = NULL;
        switch (op_family(g->ops[i])) {
        case FAMILY_alu_rr: case FAMILY_alu_ri: case FAMILY_alu_rm: case FAMILY_alu_mr: case FAMILY_alu_mi:
            if (v.flags && !u->aux)
                return false;
            break;
        case FAMILY_unary_r:
            if (v.op != UN_NOT && v.flags && !u->aux)
                return false;
            break;
        case FAMILY_shift_ri:
            if (v.op >= SH_SHL && v.flags)
                return false;
            break;
        case FAMILY_fused_rr: case FAMILY_fused_ri: case FAMILY_cmpxchg_m: return false;
        case FAMILY_jcc_rel: next = LINKS((struct uop *)u)->next; /* fall through */
        case FAMILY_jmp_rel: case FAMILY_call_rel: taken = LINKS((struct uop *)u)->taken;
            return gen_flags_entry(gen_block_of(next)) == ENTRY_LAZY || gen_flags_entry(gen_block_of(taken)) == ENTRY_LAZY;
        case FAMILY_jmp_fall: next = LINKS((struct uop *)u)->next;
            return gen_flags_entry(gen_block_of(next)) == ENTRY_LAZY;
        case FAMILY_ret64: case FAMILY_jmp_r: case FAMILY_call_r: return false;
        default:
            if (!op_emitter(g->ops[i]))
                return true;
        }
    }
    return true;
}
/* The host's flags are those of an operation with its result in a register. Uses RAX. */
static void set_flags(struct gen *g, enum af af, unsigned size, unsigned h)
{
    gen_new_flags(g, af);
    if (!wanted_lazy(g))
        return;
    gen_result_flags(g, size, h);
    g->result_lazy = true;
    if (af == AF_CLEAR) { /* of logic: there is no CF and no OF */
        gen_store_field(g, FIELD(lf[1]), 0);
        gen_store_field(g, FIELD(lf[2]), 0);
        g->in_lazy = true;
    }
}
static void alu_flags(struct gen *g, bool wanted, struct variant v, unsigned h)
{
    if (wanted)
        set_flags(g, logic(v.op) ? AF_CLEAR : AF_HOST, v.size, h);
    else
        gen_no_flags(g);
}

/* r <- r op r/m, or the same on a copy for what only sets flags: the host opcode and group to use. */
static unsigned opcode(unsigned op) { return op == ALU_CMP ? 0x2B : op == ALU_TEST ? 0x23 : alu_opcode[op]; }
static unsigned group(unsigned op) { return op == ALU_CMP ? 5 : alu_group[op]; }
static unsigned destination(struct gen *g, unsigned op, unsigned a)
{
    if (modifies(op)) {
        g->r.dirty[a] = true;
        return a;
    }
    gen_op_rr(g, 3, 0x8B, H_RAX, a);
    return H_RAX;
}

EMITTER(alu_rr)
{
    bool flags = v.flags && !u->aux;
    if (!modifies(v.op) && !flags)
        return true;
    if (!ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    bool clear = (v.op == ALU_XOR || v.op == ALU_SUB) && u->r0 == u->r1 && v.size >= 2;
    unsigned a = gen_reg_of(g, u->r0, !clear), b = gen_reg_of(g, u->r1, true);
    a = destination(g, v.op, a);
    if (reads_carry(v.op))
        gen_carry_to_host(g);
    gen_op_rr(g, v.size, opcode(v.op), a, b);
    alu_flags(g, flags, v, a);
    return true;
}
EMITTER(alu_ri)
{
    bool flags = v.flags && !u->aux;
    int64_t imm = imm_of(u, v.size);
    if (!modifies(v.op) && !flags)
        return true;
    if (!ok_reg(u->r0) || imm != (int32_t)imm)
        return false;
    unsigned a = destination(g, v.op, gen_reg_of(g, u->r0, true));
    if (reads_carry(v.op))
        gen_carry_to_host(g);
    gen_op_imm(g, v.size, group(v.op), a, imm);
    alu_flags(g, flags, v, a);
    return true;
}
EMITTER(alu_rm)
{
    if (!ok_reg(u->r0))
        return false;
    gen_access(g, u, v.form, v.size, ACCESS_READ);
    unsigned a = destination(g, v.op, gen_reg_of(g, u->r0, true));
    if (reads_carry(v.op))
        gen_carry_to_host(g);
    gen_op_rm(g, v.size, opcode(v.op), a, g->at, g->at_disp);
    alu_flags(g, v.flags && !u->aux, v, a);
    return true;
}
EMITTER(alu_mr)
{
    if (!ok_reg(u->r1))
        return false;
    gen_access(g, u, v.form, v.size, modifies(v.op) ? ACCESS_WRITE : ACCESS_READ);
    unsigned b = gen_reg_of(g, u->r1, true);
    gen_op_rm(g, v.size, 0x8B, H_RAX, g->at, g->at_disp);
    if (reads_carry(v.op))
        gen_carry_to_host(g);
    gen_op_rr(g, v.size, opcode(v.op), H_RAX, b);
    if (modifies(v.op))
        gen_op_rm(g, v.size, 0x89, H_RAX, g->at, g->at_disp);
    alu_flags(g, v.flags && !u->aux, v, H_RAX);
    return true;
}
EMITTER(alu_mi)
{
    int64_t imm = imm_of(u, v.size);
    if (imm != (int32_t)imm)
        return false;
    gen_access(g, u, v.form, v.size, modifies(v.op) ? ACCESS_WRITE : ACCESS_READ);
    gen_op_rm(g, v.size, 0x8B, H_RAX, g->at, g->at_disp);
    if (reads_carry(v.op))
        gen_carry_to_host(g);
    gen_op_imm(g, v.size, group(v.op), H_RAX, imm);
    if (modifies(v.op))
        gen_op_rm(g, v.size, 0x89, H_RAX, g->at, g->at_disp);
    alu_flags(g, v.flags && !u->aux, v, H_RAX);
    return true;
}

/* NOT leaves the host's flags alone, as INC and DEC leave CF. */
static void unary(struct gen *g, struct variant v, unsigned h)
{
    gen_prefix(g, v.size, 0, 0, h);
    gen_b1(g, v.op >= UN_NEG ? (v.size ? 0xF7 : 0xF6) : v.size ? 0xFF : 0xFE);
    gen_b1(g, 0xC0 | (v.op == UN_INC ? 0 : v.op == UN_DEC ? 1 : v.op == UN_NEG ? 3 : 2) << 3 | (h & 7));
}
EMITTER(unary_r)
{
    if (!ok_reg(u->r0))
        return false;
    unsigned h = gen_reg_of(g, u->r0, true);
    bool flags = v.flags && !u->aux;
    g->r.dirty[h] = true;
    if (flags && v.op < UN_NEG)
        gen_carry_to_host(g);
    unary(g, v, h);
    if (flags && v.op != UN_NOT)
        set_flags(g, AF_HOST, v.size, h);
    else if (v.op == UN_NEG)
        gen_no_flags(g);
    return true;
}
EMITTER(unary_m)
{
    gen_access(g, u, v.form, v.size, ACCESS_WRITE);
    gen_op_rm(g, v.size, 0x8B, H_RAX, g->at, g->at_disp);
    if (v.flags && v.op < UN_NEG)
        gen_carry_to_host(g);
    unary(g, v, H_RAX);
    gen_op_rm(g, v.size, 0x89, H_RAX, g->at, g->at_disp);
    if (v.flags && v.op != UN_NOT)
        set_flags(g, AF_HOST, v.size, H_RAX);
    else if (v.op == UN_NEG)
        gen_no_flags(g);
    return true;
}

/* By imm; the last step alone, since the host's OF is defined for a count of one. */
static void shift(struct gen *g, struct variant v, unsigned h, unsigned n, bool flags)
{
    unsigned group = v.op == SH_SAL ? SH_SHL : v.op;
    for (unsigned part = flags && n > 1 ? n - 1 : n; n; n -= part, part = n) {
        gen_prefix(g, v.size, 0, 0, h);
        gen_b1(g, part == 1 ? (v.size ? 0xD1 : 0xD0) : v.size ? 0xC1 : 0xC0);
        gen_b1(g, 0xC0u | group << 3 | (h & 7));
        if (part != 1)
            gen_b1(g, part);
    }
}
EMITTER(shift_ri)
{
    if (v.op == SH_RCL || v.op == SH_RCR || !ok_reg(u->r0) || u->imm >= 8u << v.size)
        return false;
    unsigned h = gen_reg_of(g, u->r0, true);
    bool rotate = v.op < SH_SHL;
    g->r.dirty[h] = true;
    if (v.flags && rotate)
        gen_flags_to_host(g); /* all but CF and OF stay */
    shift(g, v, h, (unsigned)u->imm, v.flags);
    if (!v.flags) {
        gen_no_flags(g);
    } else if (!rotate) {
        set_flags(g, AF_SET, v.size, h);
    } else if (g->in_host) {
        g->in_word = g->in_lazy = false;
    } else {
        gen_lazy_carries(g);
    }
    return true;
}

/* By CL, where nobody wants flags: whether they change depends on the count. */
EMITTER(shift_rc)
{
    if (v.op == SH_RCL || v.op == SH_RCR || !ok_reg(u->r0) || !u->aux)
        return false;
    unsigned group = v.op == SH_SAL ? SH_SHL : v.op, count = gen_reg_of(g, RCX * 8, true), h = gen_reg_of(g, u->r0, true);
    gen_no_flags(g);
    gen_op_rr(g, 2, 0x8B, H_RCX, count);
    g->r.dirty[h] = true;
    gen_prefix(g, v.size, 0, 0, h);
    gen_b1(g, v.size ? 0xD3 : 0xD2);
    gen_b1(g, 0xC0u | group << 3 | (h & 7));
    return true;
}

/* CF and OF are equal; the other flags stay what they were. */
static void imul_flags(struct gen *g, const struct uop *u)
{
    if (u->aux)
        gen_no_flags(g);
    else
        gen_carry_and_overflow(g);
}
EMITTER(imul_rr)
{
    if (!ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    gen_clobber(g);
    unsigned from = gen_reg_of(g, u->r1, true), h = gen_reg_of(g, u->r0, true);
    g->r.dirty[h] = true;
    gen_op_0f_rr(g, v.size, 0xAF, h, from);
    imul_flags(g, u);
    return true;
}
EMITTER(imul_rri)
{
    if (!ok_reg(u->r0) || !ok_reg(u->r1) || v.size == 1 || u->imm != (uint64_t)(int64_t)(int32_t)u->imm)
        return false;
    gen_clobber(g);
    unsigned from = gen_reg_of(g, u->r1, true), h = gen_reg_of(g, u->r0, false);
    g->r.dirty[h] = true;
    gen_op_rr(g, v.size, 0x69, h, from);
    gen_b4(g, (uint32_t)u->imm);
    imul_flags(g, u);
    return true;
}

/* Without LOCK. The host's EAX and AX in RAX, so that the guest's stay what they are if the values are equal. */
EMITTER(cmpxchg_m)
{
    unsigned size = (unsigned)__builtin_ctz(u->size);
    if (!ok_reg(u->r1))
        return false;
    gen_access_tmp(g, u, ACCESS_WRITE);
    unsigned a = gen_reg_of(g, RAX * 8, true), from = gen_reg_of(g, u->r1, true);
    gen_op_rr(g, 3, 0x8B, H_RAX, a);
    gen_prefix(g, size, from, 0, g->at), gen_b1(g, 0x0F), gen_b1(g, size ? 0xB1 : 0xB0), gen_memory(g, from, g->at, g->at_disp);
    if (size == 2) {
        gen_op_rr(g, 2, 0x8B, H_RCX, H_RAX);
        gen_op_0f_rr(g, 3, 0x45, a, H_RCX); /* cmovne */
    } else {
        gen_op_rr(g, 3, 0x8B, a, H_RAX);
    }
    g->r.dirty[a] = true;
    gen_new_flags(g, AF_HOST);
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
    g->r.dirty[h] = true;
    gen_op_rr(g, u->size == 2 ? 1 : 2, 0x8B, h, H_RCX);
    return true;
}
