/* Host code of vector instructions with a VEX prefix: the guest's own instructions again, with memory at RSI.
 *
 * YMMn of the host holds the guest's YMMn through a run, as general registers are held: loaded when an instruction first
 * reads it, written back where the run is left (gen_write_back(), stubs). Its halves stand apart in struct fpu. A loop keeps
 * them from round to round. Floating point is done in place only while the guest's flags gather in the host's MXCSR; in all
 * other cases, and for what is not a function of registers and one operand in memory, the handler goes on.
 */
#include "soft/jit/emitters.h"

enum { MAP_0F = 1, MAP_0F38, MAP_0F3A, PP_NONE = 0, PP_66, PP_F3, AT_RSI = 16, NO_VVVV = 0 };
enum { CC_E = 4, CC_NE = 5 };

/* ---- encoding ---- */

static void vex(struct gen *g, unsigned map, unsigned pp, unsigned w, unsigned l, unsigned reg, unsigned vvvv, unsigned rm)
{
    gen_b1(g, 0xC4);
    gen_b1(g, (reg < 8) << 7 | 1 << 6 | (rm < 8 || rm == AT_RSI) << 5 | map);
    gen_b1(g, w << 7 | (~vvvv & 15) << 3 | l << 2 | pp);
}
/* What half of a guest register is to do with one of the vCPU's memory. */
static void half(struct gen *g, unsigned map, unsigned pp, unsigned l, unsigned opcode, unsigned n, unsigned vvvv, int32_t at)
{
    vex(g, map, pp, 0, l, n, vvvv, H_RDI);
    gen_b1(g, opcode);
    gen_b1(g, 0x80 | (n & 7) << 3 | H_RDI);
    gen_b4(g, (uint32_t)at);
}
static int32_t low_of(unsigned n) { return FIELD(fpu.xmm) + (int32_t)(n * sizeof(union xmm)); }
static int32_t high_of(unsigned n) { return FIELD(fpu.high) + (int32_t)(n * sizeof(union xmm)); }

void gen_vectors_load(struct gen *g, unsigned which)
{
    for (unsigned n = 0; n < 16; n++)
        if (which >> n & 1) {
            half(g, MAP_0F, PP_F3, 0, 0x6F, n, NO_VVVV, low_of(n)); /* vmovdqu */
            half(g, MAP_0F3A, PP_66, 1, 0x38, n, n, high_of(n));    /* vinserti128 */
            gen_b1(g, 1);
        }
}
void gen_vectors_store(struct gen *g, unsigned which)
{
    for (unsigned n = 0; n < 16; n++)
        if (which >> n & 1) {
            half(g, MAP_0F, PP_F3, 0, 0x7F, n, NO_VVVV, low_of(n));
            half(g, MAP_0F3A, PP_66, 1, 0x39, n, NO_VVVV, high_of(n)); /* vextracti128 */
            gen_b1(g, 1);
        }
}
/* Handlers use SSE, which on some processors is slow while upper halves are in use. */
void gen_vectors_leave(struct gen *g) { gen_b1(g, 0xC5), gen_b1(g, 0xF8), gen_b1(g, 0x77); }

/* ---- guest registers ---- */

static void reads(struct gen *g, unsigned n)
{
    if (!(g->r.vectors >> n & 1))
        gen_vectors_load(g, 1u << n);
    g->r.vectors |= (uint16_t)(1u << n);
}
static void writes(struct gen *g, unsigned n)
{
    g->r.vectors |= (uint16_t)(1u << n);
    g->r.vectors_dirty |= (uint16_t)(1u << n);
}

/* On with the handler where flags of floating point do not gather in the host's MXCSR. */
static void check_float(struct gen *g, const struct avx_op *op)
{
    if (op->real == AVX_NO_FLOAT)
        return;
    gen_clobber(g);
    gen_b1(g, 0x80), gen_memory(g, 7, H_RDI, FIELD(fpu.mxcsr_lazy)), gen_b1(g, 0); /* cmp byte, 0 */
    gen_to_handler(g, CC_E);
}
static unsigned w_of(const struct avx_op *op) { return op->w == 1; }

static void instruction(struct gen *g, const struct avx_op *op, unsigned l, unsigned reg, unsigned vvvv, unsigned rm, unsigned imm)
{
    vex(g, op->map, op->prefix, w_of(op), l, reg, vvvv, rm);
    gen_b1(g, op->opcode);
    gen_b1(g, rm == AT_RSI ? (reg & 7) << 3 | H_RSI : 0xC0 | (reg & 7) << 3 | (rm & 7));
    if (op->imm != AVX_NO_IMM)
        gen_b1(g, imm);
}
/* Those that compute with ModRM.reg, too: FMA. */
static bool reads_reg(const struct avx_op *op)
{
    return op->map == MAP_0F38 && op->opcode >= 0x90 && op->opcode < 0xC0 && (op->opcode & 15) >= 6;
}
/* To ModRM.reg, of all that the operation reads. */
static void computes(struct gen *g, const struct avx_op *op, unsigned l, unsigned reg, unsigned vvvv, unsigned rm, unsigned imm)
{
    bool second = avx_uses_vvvv(op, rm != AT_RSI);
    if (second)
        reads(g, vvvv);
    if (reads_reg(op))
        reads(g, reg);
    if (rm != AT_RSI)
        reads(g, rm);
    if (op->imm == AVX_IS4)
        reads(g, imm >> 4);
    instruction(g, op, l, reg, second ? vvvv : NO_VVVV, rm, imm);
    writes(g, reg);
}

/* ---- the frequent ones: see the end of interp/exec_avx.c for their operands ---- */

EMITTER(vex_available)
{
    if (!u->aux || !(g->block->mode & MODE_CODE64))
        return false;
    gen_clobber(g);
    gen_b1(g, 0xF7), gen_memory(g, 0, H_RDI, FIELD(cr4)), gen_b4(g, CR4_OSXSAVE); /* test */
    gen_to_handler(g, CC_E);
    gen_op_rm(g, 2, 0x8B, H_RAX, H_RDI, FIELD(xcr0));
    gen_op_imm(g, 2, 4, H_RAX, 6); /* and: SSE and AVX state */
    gen_op_imm(g, 2, 7, H_RAX, 6); /* cmp */
    gen_to_handler(g, CC_NE);
    gen_b1(g, 0xF7), gen_memory(g, 0, H_RDI, FIELD(cr0)), gen_b4(g, CR0_TS);
    gen_to_handler(g, CC_NE);
    return true;
}

EMITTER(avx_rr)
{
    check_float(g, u->ptr);
    computes(g, u->ptr, u->scale, u->r0, u->base, u->r1, u->aux);
    return true;
}
EMITTER(avx_rm)
{
    check_float(g, u->ptr); /* before the access: it uses RAX */
    gen_access_alone(g, u, v.form, u->size == 32 ? 5 : 4, ACCESS_READ);
    computes(g, u->ptr, u->size == 32, u->r0, u->r1, AT_RSI, u->aux);
    return true;
}
/* VPMOVMSKB and its like. */
EMITTER(avx_mask)
{
    const struct avx_op *op = u->ptr;
    reads(g, u->r1);
    unsigned h = gen_reg_of(g, u->r0 * 8u, false);
    g->r.dirty[h] = true;
    instruction(g, op, u->scale, h, NO_VVVV, u->r1, 0);
    return true;
}

/* aux: which bits of the address must be 0. */
static void move_access(struct gen *g, const struct uop *u, unsigned form, enum soft_kind kind)
{
    gen_clobber(g);
    gen_lea_address(g, u, form, H_RSI, 3);
    if (u->aux) {
        gen_b1(g, 0x40), gen_b1(g, 0xF6), gen_b1(g, 0xC0 | H_RSI), gen_b1(g, u->aux); /* test sil, imm8 */
        gen_to_handler(g, CC_NE);
    }
    gen_tlb(g, u->size, kind);
}
EMITTER(avx_load)
{
    move_access(g, u, v.form, ACCESS_READ);
    vex(g, MAP_0F, PP_F3, 0, u->size == 32, u->r0, NO_VVVV, AT_RSI);
    gen_b1(g, 0x6F), gen_b1(g, (u->r0 & 7u) << 3 | H_RSI);
    writes(g, u->r0);
    return true;
}
EMITTER(avx_store)
{
    move_access(g, u, v.form, ACCESS_WRITE);
    reads(g, u->r0);
    vex(g, MAP_0F, PP_F3, 0, u->size == 32, u->r0, NO_VVVV, AT_RSI);
    gen_b1(g, 0x7F), gen_b1(g, (u->r0 & 7u) << 3 | H_RSI);
    return true;
}
/* VZEROUPPER: of the registers that are held by the instruction itself, of all in memory. */
EMITTER(avx_zero_upper)
{
    unsigned spare = 0;
    while (spare < 15 && g->r.vectors >> spare & 1)
        spare++;
    if (g->r.vectors_dirty >> spare & 1)
        gen_vectors_store(g, 1u << spare);
    g->r.vectors &= (uint16_t)~(1u << spare);
    g->r.vectors_dirty &= (uint16_t)~(1u << spare);
    gen_vectors_leave(g);
    vex(g, MAP_0F, PP_66, 0, 0, spare, spare, spare);
    gen_b1(g, 0xEF), gen_b1(g, 0xC0 | (spare & 7) << 3 | (spare & 7)); /* vpxor */
    for (unsigned n = 0; n < 16; n += 2)
        half(g, MAP_0F, PP_F3, 1, 0x7F, spare, NO_VVVV, high_of(n));
    return true;
}

/* ---- the others that avx_repeats() names ----
 *
 * r0 ModRM.reg, r1 ModRM.rm (a vector or a general register), base VEX.vvvv, index: an operand in memory, of `size` bytes at
 * tmp[0]; scale VEX.L, aux the immediate; the next micro-op has the operation and the operand size. */

EMITTER(avx_other)
{
    const struct avx_op *op = u[1].ptr;
    unsigned reg = u->r0, vvvv = u->base, rm = u->index ? AT_RSI : u->r1, l = u->scale, imm = u->aux;
    if (op->imm == AVX_IS4 && !(g->block->mode & MODE_CODE64))
        imm &= 0x70; /* there are eight registers */
    bool scalar = op->form == AVX_LOAD_SCALAR || op->form == AVX_STORE_SCALAR;
    check_float(g, op);
    switch (op->form) {
    case AVX_STORE: case AVX_STORE_SCALAR: case AVX_STORE_LOW: case AVX_STORE_HIGH: case AVX_STORE_8: case AVX_EXTRACT_128:
        if (rm == AT_RSI)
            gen_access_tmp(g, u, ACCESS_WRITE);
        else if (scalar)
            reads(g, vvvv);
        reads(g, reg);
        instruction(g, op, l, reg, scalar && rm != AT_RSI ? vvvv : NO_VVVV, rm, imm);
        if (rm != AT_RSI)
            writes(g, rm);
        return true;
    case AVX_TO_GPR:
        if (rm == AT_RSI)
            gen_access_tmp(g, u, ACCESS_WRITE);
        reads(g, reg);
        if (rm != AT_RSI) {
            rm = gen_reg_of(g, u->r1 * 8u, false);
            g->r.dirty[rm] = true;
        }
        instruction(g, op, l, reg, NO_VVVV, rm, imm);
        return true;
    case AVX_FROM_GPR:
        if (rm == AT_RSI)
            gen_access_tmp(g, u, ACCESS_READ);
        else
            rm = gen_reg_of(g, u->r1 * 8u, true);
        instruction(g, op, l, reg, NO_VVVV, rm, imm);
        writes(g, reg);
        return true;
    case AVX_V_M: case AVX_SHIFT_BYTES: /* ModRM.reg is a part of the opcode */
        reads(g, rm);
        instruction(g, op, l, (unsigned)op->group, vvvv, rm, imm);
        writes(g, vvvv);
        return true;
    default:
        if (rm == AT_RSI)
            gen_access_tmp(g, u, ACCESS_READ);
        computes(g, op, l, reg, vvvv, rm, imm);
        return true;
    }
}
