/* Host code for hot blocks.
 *
 * A run of micro-ops that are known here becomes one piece of host code that the run's first micro-op has as its `fn`;
 * the others of the block keep their handlers. Within a run guest registers live in host registers. Whatever is out of
 * the ordinary (a TLB miss, an unknown successor) writes them back and goes on in the interpreter with the micro-op
 * concerned, so this file knows nothing of faults, devices or modes; a block that is invalid is so for both.
 *
 * Callee-saved host registers are saved once, by host_enter(). Without memory for code (translate_memory.c)
 * there are no translations. translate_gen.c makes the code, translate_ops.c says what a handler does.
 * (Longer than most files for the one switch over all kinds of micro-ops.)
 */
#include <string.h>

#include "soft/mmu/access.h"
#include "soft/interp/exec.h"
#include "soft/jit/translate.h"
#include "soft/jit/translate_gen.h"
#include "soft/jit/translate_memory.h"
#include "soft/jit/translate_ops.h"

enum { RUN_MAX = 24 << 10 };

/* ---- micro-ops ---- */

/* A whole register, not AH... and not the zero. */
static bool ok_reg(unsigned offset) { return (offset & 7) == 0 && offset != OFF_ZERO; }

/* The comparison of a fused micro-op: host flags, and nothing else changed. */
static void compare_op(struct gen *g, const struct uop *u, const struct meaning *m)
{
    bool test = m->op >> 4 == FUSE_TEST;
    unsigned a = gen_reg_of(g, u->r0, true);
    if (m->kind == K_FUSED_RR) {
        gen_op_rr(g, m->size, test ? 0x85 : 0x3B, test ? gen_reg_of(g, u->r1, true) : a, test ? a : gen_reg_of(g, u->r1, true));
    } else if (test) {
        gen_prefix(g, m->size, 0, 0, a);
        gen_b1(g, m->size ? 0xF7 : 0xF6);
        gen_b1(g, 0xC0 | (a & 7));
        if (m->size == 0)
            gen_b1(g, (uint8_t)u->imm);
        else if (m->size == 1)
            gen_b1(g, (uint8_t)u->imm), gen_b1(g, (uint8_t)(u->imm >> 8));
        else
            gen_b4(g, (uint32_t)u->imm);
    } else {
        gen_op_imm(g, m->size, 7, a, m->size == 1 ? (int16_t)u->imm : m->size == 2 ? (int32_t)u->imm : (int64_t)u->imm);
    }
}
/* All its flags, stored. */
static void compare_flags(struct gen *g, const struct uop *u, const struct meaning *m)
{
    unsigned a = gen_reg_of(g, u->r0, true);
    bool test = m->op >> 4 == FUSE_TEST;
    gen_op_rr(g, 3, 0x8B, H_RAX, a);
    if (m->kind == K_FUSED_RR) {
        gen_op_rr(g, m->size, test ? 0x23 : 0x2B, H_RAX, gen_reg_of(g, u->r1, true));
    } else {
        gen_op_imm(g, m->size, test ? 4 : 5, H_RAX, m->size == 1 ? (int16_t)u->imm : m->size == 2 ? (int32_t)u->imm : (int64_t)u->imm);
    }
    if (test) {
        gen_logic_flags(g, m->size, H_RAX);
    } else {
        gen_result_flags(g, m->size, H_RAX);
        gen_store_carries(g, false);
    }
}

/* Host opcodes of ALU operations, r <- r op r/m form. */
static const uint8_t alu_opcode[ALU_OPS] = {0x03, 0x0B, 0x13, 0x1B, 0x23, 0x2B, 0x33, 0x3B, 0x85};
static const uint8_t alu_group[ALU_OPS] = {0, 1, 2, 3, 4, 5, 6, 7, 4};
static bool logic(unsigned op) { return op == ALU_AND || op == ALU_OR || op == ALU_XOR || op == ALU_TEST; }
static bool modifies(unsigned op) { return op != ALU_CMP && op != ALU_TEST; }

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

static bool alu(struct gen *g, const struct uop *u, const struct meaning *m)
{
    unsigned op = m->op, size = m->size;
    bool flags = m->flags && !u->aux;
    int64_t imm = imm_of(u, size);
    if (!modifies(op) && !flags && (m->kind == K_ALU_RR || m->kind == K_ALU_RI))
        return true;
    switch (m->kind) {
    case K_ALU_RR: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1))
            return false;
        gen_settle(g);
        bool clear = (op == ALU_XOR || op == ALU_SUB) && u->r0 == u->r1 && size >= 2;
        unsigned a = gen_reg_of(g, u->r0, !clear), b = gen_reg_of(g, u->r1, true);
        if (!modifies(op)) {
            gen_op_rr(g, 3, 0x8B, H_RAX, a);
            a = H_RAX;
        } else {
            g->dirty[a] = true;
        }
        gen_op_rr(g, size, op == ALU_CMP ? 0x2B : op == ALU_TEST ? 0x23 : alu_opcode[op], a, b);
        if (flags)
            set_flags(g, op, size, a);
        return true;
    }
    case K_ALU_RI: {
        if (!ok_reg(u->r0) || imm != (int32_t)imm)
            return false;
        gen_settle(g);
        unsigned a = gen_reg_of(g, u->r0, true);
        if (!modifies(op)) {
            gen_op_rr(g, 3, 0x8B, H_RAX, a);
            a = H_RAX;
        } else {
            g->dirty[a] = true;
        }
        gen_op_imm(g, size, op == ALU_CMP ? 5 : alu_group[op], a, imm);
        if (flags)
            set_flags(g, op, size, a);
        return true;
    }
    case K_ALU_RM: {
        if (!ok_reg(u->r0))
            return false;
        gen_access(g, u, m->form, size, ACCESS_READ);
        unsigned a = gen_reg_of(g, u->r0, true);
        if (!modifies(op)) {
            gen_op_rr(g, 3, 0x8B, H_RAX, a);
            a = H_RAX;
        } else {
            g->dirty[a] = true;
        }
        gen_op_rm(g, size, op == ALU_CMP ? 0x2B : op == ALU_TEST ? 0x23 : alu_opcode[op], a, H_RSI, 0);
        if (flags)
            set_flags(g, op, size, a);
        return true;
    }
    case K_ALU_MR: {
        if (!ok_reg(u->r1))
            return false;
        gen_access(g, u, m->form, size, modifies(op) ? ACCESS_WRITE : ACCESS_READ);
        unsigned b = gen_reg_of(g, u->r1, true);
        gen_op_rm(g, size, 0x8B, H_RAX, H_RSI, 0);
        gen_op_rr(g, size, op == ALU_CMP ? 0x2B : op == ALU_TEST ? 0x23 : alu_opcode[op], H_RAX, b);
        if (modifies(op))
            gen_op_rm(g, size, 0x89, H_RAX, H_RSI, 0);
        if (flags)
            set_flags(g, op, size, H_RAX);
        return true;
    }
    default:
        if (imm != (int32_t)imm)
            return false;
        gen_access(g, u, m->form, size, modifies(op) ? ACCESS_WRITE : ACCESS_READ);
        gen_op_rm(g, size, 0x8B, H_RAX, H_RSI, 0);
        gen_op_imm(g, size, op == ALU_CMP ? 5 : alu_group[op], H_RAX, imm);
        if (modifies(op))
            gen_op_rm(g, size, 0x89, H_RAX, H_RSI, 0);
        if (flags)
            set_flags(g, op, size, H_RAX);
        return true;
    }
}

/* Conditions whose inputs the host's flags have. */
static bool host_condition(const struct gen *g, unsigned cc)
{
    bool carry = (cc >> 1) == 1 || (cc >> 1) == 3;
    return g->host_flags && !(g->pending_keep_cf && carry);
}

/* Host code that puts the stored condition into ZF (set: it does not hold); false: not a simple one. */
static bool stored_condition(struct gen *g, unsigned cc, unsigned *host_cc)
{
    switch (cc) {
    case 4: case 5: /* ZF */
        gen_prefix(g, 3, 0, 0, H_RDI), gen_b1(g, 0x83), gen_memory(g, 7, H_RDI, FIELD(lf[0])), gen_b1(g, 0); /* cmp lf0, 0 */
        *host_cc = cc;
        return true;
    case 2: case 3: /* CF */
        gen_prefix(g, 3, 0, 0, H_RDI), gen_b1(g, 0x83), gen_memory(g, 7, H_RDI, FIELD(lf[1])), gen_b1(g, 0); /* cmp lf1, 0: sign */
        *host_cc = cc == 2 ? 8 : 9;
        return true;
    default: return false;
    }
}

/* False: not translated; nothing was emitted that matters. *ended: it was the block's end. */
static bool translate_uop(struct gen *g, const struct uop *u, const struct meaning *m, bool *ended)
{
    unsigned size = m->size, h, cc;
    g->pinned = 0;
    switch (m->kind) {
    case K_NOP: return true;
    case K_ALU_RR: case K_ALU_RI: case K_ALU_RM: case K_ALU_MR: case K_ALU_MI: return alu(g, u, m);
    case K_UNARY_R:
        if (!ok_reg(u->r0))
            return false;
        gen_settle(g);
        h = gen_reg_of(g, u->r0, true);
        g->dirty[h] = true;
        gen_prefix(g, size, 0, 0, h);
        gen_b1(g, m->op >= UN_NEG ? (size ? 0xF7 : 0xF6) : size ? 0xFF : 0xFE);
        gen_b1(g, 0xC0 | (m->op == UN_INC ? 0 : m->op == UN_DEC ? 1 : m->op == UN_NEG ? 3 : 2) << 3 | (h & 7));
        if (m->flags && !u->aux) {
            gen_result_flags(g, size, h);
            g->pending = g->host_flags = true;
            g->pending_keep_cf = m->op != UN_NEG;
        }
        return true;
    case K_SHIFT:
        if (!ok_reg(u->r0) || u->imm >= 8u << size)
            return false;
        gen_settle(g);
        h = gen_reg_of(g, u->r0, true);
        g->dirty[h] = true;
        gen_prefix(g, size, 0, 0, h);
        gen_b1(g, size ? 0xC1 : 0xC0);
        gen_b1(g, 0xC0u | (m->op == SH_SAL ? SH_SHL : m->op) << 3 | (h & 7));
        gen_b1(g, (uint8_t)u->imm);
        return true;
    case K_IMUL: case K_IMUL_I: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1) || (m->kind == K_IMUL_I && (size == 1 || u->imm != (uint64_t)(int64_t)(int32_t)u->imm)))
            return false;
        gen_settle(g);
        unsigned from = gen_reg_of(g, u->r1, true);
        h = gen_reg_of(g, u->r0, m->kind == K_IMUL || size == 1);
        g->dirty[h] = true;
        if (m->kind == K_IMUL) {
            gen_op_0f_rr(g, size, 0xAF, h, from);
        } else {
            gen_op_rr(g, size, 0x69, h, from);
            gen_b4(g, (uint32_t)u->imm);
        }
        if (!u->aux) {
            gen_b1(g, 0x0F), gen_b1(g, 0x90), gen_b1(g, 0xC0);  /* seto al */
            gen_b1(g, 0x0F), gen_b1(g, 0xB6), gen_b1(g, 0xC0);  /* movzx eax, al */
            gen_prefix(g, 3, 0, 0, H_RAX), gen_b1(g, 0xC1), gen_b1(g, 0xE0), gen_b1(g, 63);
            gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[1]));
        }
        return true;
    }
    case K_MOV_RR: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1))
            return false;
        unsigned from = gen_reg_of(g, u->r1, true);
        h = gen_reg_of(g, u->r0, size < 2);
        g->dirty[h] = true;
        gen_op_rr(g, size, 0x8B, h, from);
        return true;
    }
    case K_MOV_RI:
        if (!ok_reg(u->r0) || size < 2)
            return false;
        h = gen_reg_of(g, u->r0, false);
        g->dirty[h] = true;
        gen_mov_imm64(g, h, size == 2 ? (uint32_t)u->imm : u->imm);
        return true;
    case K_LOAD: case K_LOAD_RIP:
        if (!ok_reg(u->r0))
            return false;
        if (m->kind == K_LOAD) {
            gen_access(g, u, m->form, size, ACCESS_READ);
        } else {
            gen_settle(g);
            gen_rip_address(g, u, H_RSI);
            gen_tlb(g, 1u << size, ACCESS_READ);
        }
        h = gen_reg_of(g, u->r0, size < 2);
        g->dirty[h] = true;
        gen_op_rm(g, size, 0x8B, h, H_RSI, 0);
        return true;
    case K_STORE: case K_STORE_RIP:
        if (!ok_reg(u->r1))
            return false;
        if (m->kind == K_STORE) {
            gen_access(g, u, m->form, size, ACCESS_WRITE);
        } else {
            gen_settle(g);
            gen_rip_address(g, u, H_RSI);
            gen_tlb(g, 1u << size, ACCESS_WRITE);
        }
        gen_op_rm(g, size, 0x89, gen_reg_of(g, u->r1, true), H_RSI, 0);
        return true;
    case K_STORE_I:
        gen_access(g, u, m->form, size, ACCESS_WRITE);
        gen_mov_imm64(g, H_RAX, size == 3 ? u->imm : (uint32_t)u->imm);
        gen_op_rm(g, size, 0x89, H_RAX, H_RSI, 0);
        return true;
    case K_MOVZX: case K_MOVSX: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1))
            return false;
        unsigned from = gen_reg_of(g, u->r1, true);
        h = gen_reg_of(g, u->r0, size == 1);
        g->dirty[h] = true;
        if (m->op == 2)
            gen_op_rr(g, m->kind == K_MOVSX ? 3 : 2, m->kind == K_MOVSX ? 0x63 : 0x8B, h, from);
        else
            gen_op_0f_rr(g, size, (m->kind == K_MOVSX ? 0xBEu : 0xB6u) | m->op, h, from);
        return true;
    }
    case K_MOVZX_M: case K_MOVSX_M:
        if (!ok_reg(u->r0))
            return false;
        gen_access(g, u, m->form, m->op, ACCESS_READ);
        h = gen_reg_of(g, u->r0, size == 1);
        g->dirty[h] = true;
        if (m->op == 2) {
            gen_op_rm(g, m->kind == K_MOVSX_M ? 3 : 2, m->kind == K_MOVSX_M ? 0x63 : 0x8B, h, H_RSI, 0);
        } else {
            gen_prefix(g, size, h, 0, H_RSI);
            gen_b1(g, 0x0F);
            gen_b1(g, (m->kind == K_MOVSX_M ? 0xBEu : 0xB6u) | m->op);
            gen_memory(g, h, H_RSI, 0);
        }
        return true;
    case K_LEA:
        if (!ok_reg(u->r0) || size < 2)
            return false;
        gen_lea_address(g, u, m->form, H_RSI, size);
        h = gen_reg_of(g, u->r0, false);
        g->dirty[h] = true;
        gen_op_rr(g, 3, 0x8B, h, H_RSI);
        return true;
    case K_LEA_RIP:
        if (u->size != 8 || !ok_reg(u->r0))
            return false;
        h = gen_reg_of(g, u->r0, false);
        g->dirty[h] = true;
        gen_rip_address(g, u, h);
        return true;
    case K_EA:
        if (m->op)
            gen_rip_address(g, u, H_RSI);
        else
            gen_lea_address(g, u, m->form, H_RSI, 3);
        h = gen_reg_of(g, OFF_T0, false);
        g->dirty[h] = true;
        gen_op_rr(g, 3, 0x8B, h, H_RSI);
        return true;
    case K_PUSH: case K_PUSH_I:
        if (m->kind == K_PUSH && !ok_reg(u->r1))
            return false;
        gen_settle(g);
        h = gen_reg_of(g, RSP * 8, true);
        gen_op_rm(g, 3, 0x8D, H_RSI, h, -8);
        gen_tlb(g, 8, ACCESS_WRITE);
        if (m->kind == K_PUSH) {
            gen_op_rm(g, 3, 0x89, gen_reg_of(g, u->r1, true), H_RSI, 0);
        } else {
            gen_mov_imm64(g, H_RAX, u->imm);
            gen_op_rm(g, 3, 0x89, H_RAX, H_RSI, 0);
        }
        gen_op_imm(g, 3, 5, h, 8);
        g->dirty[h] = true;
        return true;
    case K_POP:
        if (!ok_reg(u->r0))
            return false;
        gen_settle(g);
        h = gen_reg_of(g, RSP * 8, true);
        gen_op_rr(g, 3, 0x8B, H_RSI, h);
        gen_tlb(g, 8, ACCESS_READ);
        gen_op_imm(g, 3, 0, h, 8);
        g->dirty[h] = true;
        h = gen_reg_of(g, u->r0, false);
        g->dirty[h] = true;
        gen_op_rm(g, 3, 0x8B, h, H_RSI, 0);
        return true;
    case K_CMOV: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1))
            return false;
        unsigned from = gen_reg_of(g, u->r1, true);
        h = gen_reg_of(g, u->r0, true);
        if (host_condition(g, m->op)) {
            cc = m->op;
        } else {
            gen_settle(g);
            if (!stored_condition(g, m->op, &cc))
                return false;
        }
        g->dirty[h] = true;
        gen_op_0f_rr(g, size, 0x40 | cc, h, from);
        return true;
    }
    case K_SETCC:
        if (!ok_reg(u->r0))
            return false;
        h = gen_reg_of(g, u->r0, true);
        if (host_condition(g, m->op)) {
            cc = m->op;
        } else {
            gen_settle(g);
            if (!stored_condition(g, m->op, &cc))
                return false;
        }
        g->dirty[h] = true;
        gen_prefix(g, 2, 0, 0, h), gen_b1(g, 0x0F), gen_b1(g, 0x90 | cc), gen_b1(g, 0xC0 | (h & 7));
        return true;
    case K_BSWAP:
        h = gen_reg_of(g, u->r0, true);
        g->dirty[h] = true;
        gen_prefix(g, size, 0, 0, h), gen_b1(g, 0x0F), gen_b1(g, 0xC8 | (h & 7));
        return true;

    case K_JMP: case K_FALL:
        gen_settle(g);
        gen_go(g, u, m->kind == K_JMP, false);
        *ended = true;
        return true;
    case K_CALL:
        gen_settle(g);
        if (!LINKS((struct uop *)u)->taken) { /* the probe comes before anything is changed */
            gen_add_rip(g, H_RCX, LINKS((struct uop *)u)->delta);
            gen_probe(g);
        }
        h = gen_reg_of(g, RSP * 8, true);
        gen_op_rm(g, 3, 0x8D, H_RSI, h, -8);
        gen_tlb(g, 8, ACCESS_WRITE);
        gen_add_rip(g, H_RAX, u->off + u->len);
        gen_op_rm(g, 3, 0x89, H_RAX, H_RSI, 0);
        gen_op_imm(g, 3, 5, h, 8);
        g->dirty[h] = true;
        if (LINKS((struct uop *)u)->taken) {
            gen_go(g, u, true, false);
        } else {
            int64_t delta = LINKS((struct uop *)u)->delta;
            gen_write_back(g);
            gen_due(g, u, delta, false);
            gen_add_rip(g, H_RDX, delta);
            gen_op_rr(g, 3, 0x8B, H_RAX, H_RDX);
            gen_prefix(g, 3, 0, 0, H_RAX), gen_b1(g, 0xC1), gen_b1(g, 0xE8), gen_b1(g, 12);
            gen_op_rr(g, 2, 0x33, H_RAX, H_RDX);
            gen_op_imm(g, 2, 4, H_RAX, JUMP_SIZE - 1);
            gen_prefix(g, 3, 0, 0, H_RAX), gen_b1(g, 0xC1), gen_b1(g, 0xE0), gen_b1(g, 4);
            gen_op_rm(g, 3, 0x03, H_RAX, H_RDI, FIELD(jumps));
            gen_op_rm(g, 3, 0x8B, H_RSI, H_RAX, 8);
            gen_jump_rsi(g);
        }
        *ended = true;
        return true;
    case K_RET:
        gen_settle(g);
        h = gen_reg_of(g, RSP * 8, true);
        gen_op_rr(g, 3, 0x8B, H_RSI, h);
        gen_tlb(g, 8, ACCESS_READ);
        gen_op_rm(g, 3, 0x8B, H_RCX, H_RSI, 0);
        gen_probe(g);
        gen_op_imm(g, 3, 0, h, (int64_t)(8 + u->imm));
        g->dirty[h] = true;
        gen_write_back(g);
        gen_op_rr(g, 3, 0x8B, H_RDX, H_RCX);
        gen_due(g, u, 0, false);
        gen_op_rm(g, 3, 0x8B, H_RSI, H_RAX, 8);
        gen_jump_rsi(g);
        *ended = true;
        return true;
    case K_JCC: case K_FUSED_RR: case K_FUSED_RI: {
        struct uop_links *l = LINKS((struct uop *)u);
        bool fused = m->kind != K_JCC, pending = false, keep_cf = g->pending_keep_cf;
        cc = m->op & 15;
        if (fused) {
            if (!ok_reg(u->r0) || (m->kind == K_FUSED_RR && !ok_reg(u->r1)) ||
                (m->kind == K_FUSED_RI && size == 3 && u->imm != (uint64_t)(int64_t)(int32_t)u->imm))
                return false;
            gen_settle(g);
            /* Both paths start from the same registers. */
            gen_reg_of(g, u->r0, true);
            if (m->kind == K_FUSED_RR)
                gen_reg_of(g, u->r1, true);
            gen_write_back(g);
            compare_op(g, u, m);
        } else if (host_condition(g, cc)) {
            pending = g->pending;
            gen_write_back(g);
            g->pending = g->host_flags = false;
        } else {
            gen_settle(g);
            gen_write_back(g);
            if (!stored_condition(g, cc, &cc))
                return false;
        }
        gen_b1(g, 0x0F), gen_b1(g, 0x80 | cc);
        uint8_t *patch = g->p;
        gen_b4(g, 0);
        for (unsigned taken = 0; taken < 2; taken++) {
            bool dead = fused && gen_flags_dead_at(taken ? l->taken : l->next);
            if (taken && !g->failed) {
                uint32_t distance = (uint32_t)(g->p - patch - 4);
                memcpy(patch, &distance, 4);
            }
            if (pending)
                gen_store_carries(g, keep_cf);
            if (fused && !dead)
                compare_flags(g, u, m);
            gen_go(g, u, taken, dead);
        }
        *ended = true;
        return true;
    }
    default: return false;
    }
}

static void emit_stubs(struct gen *g, const uop_fn *fns)
{
    for (unsigned i = 0; i < g->stub_count && !g->failed; i++) {
        const struct stub *s = &g->stubs[i];
        uint32_t distance = (uint32_t)(g->p - g->start) - s->at - 4;
        memcpy(g->start + s->at, &distance, 4);
        for (unsigned k = 0; k < s->dirty_count; k++)
            gen_op_rm(g, 3, 0x89, s->dirty[k].host, H_RDI, s->dirty[k].guest * 8);
        if (s->leave) {
            if (s->fused) {
                /* Registers were written back before the comparison: take the operands from there. */
                gen_forget(g);
                g->pinned = 0;
                compare_flags(g, &g->code[s->uop], meaning_of(fns[s->uop]));
            }
            gen_add_rip(g, H_RAX, s->delta);
            gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(rip));
            gen_b1(g, 0xC3);
        } else {
            gen_mov_imm64(g, H_RSI, (uint64_t)(uintptr_t)&g->code[s->uop]);
            gen_mov_imm64(g, H_RAX, (uint64_t)(uintptr_t)fns[s->uop]);
            gen_b1(g, 0xFF), gen_b1(g, 0xE0); /* jmp rax */
        }
    }
}

/* Replace the runs of known micro-ops of a block by host code. True: it did, or there is nothing to do; false: no room. */
bool host_code_translate(struct host_code *code, struct block *k)
{
    static __thread struct gen gen;
    static __thread uop_fn fns[BLOCK_MAX_UOPS + 2];
    struct gen *g = &gen;
    if (!code->base)
        return true;
    unsigned last = k->links ? (unsigned)((struct uop *)k->links - k->code) : k->count;
    for (unsigned i = 0; i < last; i++)
        fns[i] = i ? k->code[i].fn : k->first;
    for (unsigned i = 0; i < last;) {
        if (meaning_of(fns[i])->kind == K_NONE) {
            i++;
            continue;
        }
        if (code->used + RUN_MAX > soft_share(HOST_CODE_SIZE, code->shares))
            return false;
        g->start = g->p = code->base + code->used;
        g->end = g->start + RUN_MAX;
        g->code = k->code;
        g->stub_count = 0;
        g->failed = g->pending = g->host_flags = false;
        g->clock = 0;
        gen_forget(g);
        bool ended = false;
        unsigned from = i;
        while (i < last && !ended) {
            const struct meaning *m = meaning_of(fns[i]);
            g->uop = i;
            if (m->kind == K_NONE || !translate_uop(g, &k->code[i], m, &ended))
                break;
            i++;
        }
        if (!ended) {
            gen_settle(g);
            gen_write_back(g);
            gen_mov_imm64(g, H_RSI, (uint64_t)(uintptr_t)&k->code[i]);
            gen_mov_imm64(g, H_RAX, (uint64_t)(uintptr_t)fns[i]);
            gen_b1(g, 0xFF), gen_b1(g, 0xE0);
        }
        emit_stubs(g, fns);
        if (!g->failed && i > from) {
            k->code[from].fn = (uop_fn)(uintptr_t)(code->runs + (g->start - code->base));
            code->used += ((size_t)(g->p - g->start) + 15) & ~(size_t)15;
        }
        if (i == from)
            i++;
    }
    return true;
}

/* Call u->fn(c, u, rip) with the host's callee-saved registers saved: translations do not preserve them. */
__asm__(".text\n"
        ".globl host_enter\n"
        ".hidden host_enter\n"
        ".type host_enter, @function\n"
        "host_enter:\n"
        "\tpush %rbx\n\tpush %rbp\n\tpush %r12\n\tpush %r13\n\tpush %r14\n\tpush %r15\n\tsub $8, %rsp\n"
        "\tcall *(%rsi)\n"
        "\tadd $8, %rsp\n\tpop %r15\n\tpop %r14\n\tpop %r13\n\tpop %r12\n\tpop %rbp\n\tpop %rbx\n\tret\n"
        ".size host_enter, .-host_enter\n");
