/* MMX and SSE moves, insertions and extractions: AMD64 APM volumes 4 and 5. */
#pragma GCC target("sse4.2")
#include "soft/fpu/vec.h"

static int vec_copy(VEC_ARGS)
{
    vec_store(dst, vec_load(src));
    return FPU_OK;
}

/* dst.low doubleword / quadword = src's, the rest kept. */
static int vec_merge4(VEC_ARGS)
{
    dst->d[0] = src->d[0];
    return FPU_OK;
}

static int vec_merge8(VEC_ARGS)
{
    dst->q[0] = src->q[0];
    return FPU_OK;
}

/* The low quadword, zero-extended. */
static int vec_low8(VEC_ARGS)
{
    vec_store(dst, _mm_move_epi64(vec_load(src)));
    return FPU_OK;
}


/* MOVD and MOVQ between general registers and XMM or MMX. */
static int vec_movd(VEC_ARGS)
{
    vec_store(dst, _mm_cvtsi64_si128((long long)(ctx->rex_w ? src->q[0] : src->d[0])));
    return FPU_OK;
}

static int vec_movhlps(VEC_ARGS)
{
    dst->q[0] = src->q[1];
    return FPU_OK;
}

static int vec_movlhps(VEC_ARGS)
{
    dst->q[1] = src->q[0];
    return FPU_OK;
}

/* MOVHPS m64, xmm. */
static int vec_movhps_store(VEC_ARGS)
{
    dst->q[0] = src->q[1];
    return FPU_OK;
}

static int vec_movsldup(VEC_ARGS)
{
    vec_store(dst, _mm_shuffle_epi32(vec_load(src), 0xA0));
    return FPU_OK;
}

static int vec_movshdup(VEC_ARGS)
{
    vec_store(dst, _mm_shuffle_epi32(vec_load(src), 0xF5));
    return FPU_OK;
}

static int vec_movddup(VEC_ARGS)
{
    vec_store(dst, _mm_shuffle_epi32(vec_load(src), 0x44));
    return FPU_OK;
}

static int vec_movmskps(VEC_ARGS)
{
    dst->q[0] = (uint32_t)_mm_movemask_ps(_mm_castsi128_ps(vec_load(src)));
    return FPU_OK;
}

static int vec_movmskpd(VEC_ARGS)
{
    dst->q[0] = (uint32_t)_mm_movemask_pd(_mm_castsi128_pd(vec_load(src)));
    return FPU_OK;
}

static int vec_pinsrb(VEC_ARGS)
{
    dst->b[ctx->imm & 15] = src->b[0];
    return FPU_OK;
}

static int vec_pinsrw(VEC_ARGS)
{
    dst->w[ctx->imm & 7] = src->w[0];
    return FPU_OK;
}

static int vec_mm_pinsrw(VEC_ARGS)
{
    dst->w[ctx->imm & 3] = src->w[0];
    return FPU_OK;
}

static int vec_pinsrd(VEC_ARGS)
{
    if (ctx->rex_w)
        dst->q[ctx->imm & 1] = src->q[0];
    else
        dst->d[ctx->imm & 3] = src->d[0];
    return FPU_OK;
}

static int vec_pextrb(VEC_ARGS)
{
    dst->q[0] = src->b[ctx->imm & 15];
    return FPU_OK;
}

static int vec_pextrw(VEC_ARGS)
{
    dst->q[0] = src->w[ctx->imm & 7];
    return FPU_OK;
}

static int vec_mm_pextrw(VEC_ARGS)
{
    dst->q[0] = src->w[ctx->imm & 3];
    return FPU_OK;
}

static int vec_pextrd(VEC_ARGS)
{
    dst->q[0] = ctx->rex_w ? src->q[ctx->imm & 1] : src->d[ctx->imm & 3];
    return FPU_OK;
}

static int vec_extractps(VEC_ARGS)
{
    dst->q[0] = src->d[ctx->imm & 3];
    return FPU_OK;
}

/* INSERTPS: the immediate's bits 6-7 pick the source element (a memory operand has only one), 4-5 the
 * destination's, 0-3 elements to clear. */
static void insertps(union xmm *dst, uint32_t value, uint8_t imm)
{
    union xmm r = *dst;
    r.d[imm >> 4 & 3] = value;
    for (unsigned i = 0; i < 4; i++)
        if (imm >> i & 1)
            r.d[i] = 0;
    *dst = r;
}

static int vec_insertps(VEC_ARGS)
{
    insertps(dst, src->d[ctx->imm >> 6], ctx->imm);
    return FPU_OK;
}

static int vec_insertps_m32(VEC_ARGS)
{
    insertps(dst, src->d[0], ctx->imm);
    return FPU_OK;
}

static int vec_emms(VEC_ARGS)
{
    ctx->fpu->sw &= (uint16_t)~0x3800;
    ctx->fpu->tag = 0;
    return FPU_OK;
}

#define AT(prefix, opcode, when, ...) {VEC_MAP_0F, prefix, opcode, when, -1, __VA_ARGS__}
#define LOAD16(prefix, opcode, ...) \
    AT(prefix, opcode, WHEN_ANY, OP(copy, VEC_XMM_XMMM, 16, .dst_write_only = true, .copy = true, ##__VA_ARGS__))
#define STORE16(prefix, opcode, ...) \
    AT(prefix, opcode, WHEN_ANY, OP(copy, VEC_STORE, 16, .dst_write_only = true, .copy = true, ##__VA_ARGS__))
#define STORE_LOW(prefix, opcode, size, ...) \
    AT(prefix, opcode, WHEN_MEM, OP(copy, VEC_STORE, size, .dst_write_only = true, .copy = true, ##__VA_ARGS__))
#define LOAD_ZX(prefix, opcode, size) \
    AT(prefix, opcode, WHEN_MEM, OP(copy, VEC_XMM_XMMM, size, .dst_write_only = true, .copy = true))
#define AT3A(opcode, when, ...) {VEC_MAP_0F3A, VEC_66, opcode, when, -1, __VA_ARGS__}

struct vec_row vec_move_rows[] = {
    /* MOVUPS, MOVUPD, MOVSS, MOVSD */
    LOAD16(VEC_NP, 0x10), LOAD16(VEC_66, 0x10), LOAD_ZX(VEC_F3, 0x10, 4), LOAD_ZX(VEC_F2, 0x10, 8),
    AT(VEC_F3, 0x10, WHEN_REG, OP(merge4, VEC_XMM_XMMM, 255)), AT(VEC_F2, 0x10, WHEN_REG, OP(merge8, VEC_XMM_XMMM, 255)),
    STORE16(VEC_NP, 0x11), STORE16(VEC_66, 0x11), STORE_LOW(VEC_F3, 0x11, 4), STORE_LOW(VEC_F2, 0x11, 8),
    AT(VEC_F3, 0x11, WHEN_REG, OP(merge4, VEC_STORE, 255)), AT(VEC_F2, 0x11, WHEN_REG, OP(merge8, VEC_STORE, 255)),
    /* MOVLPS, MOVHLPS, MOVLPD, MOVSLDUP, MOVDDUP; MOVHPS, MOVLHPS, MOVHPD, MOVSHDUP */
    AT(VEC_NP, 0x12, WHEN_MEM, OP(merge8, VEC_XMM_XMMM, 8)), AT(VEC_66, 0x12, WHEN_MEM, OP(merge8, VEC_XMM_XMMM, 8, .mem_only = true)),
    AT(VEC_NP, 0x12, WHEN_REG, OP(movhlps, VEC_XMM_XMMM, 255)),
    AT(VEC_F3, 0x12, WHEN_ANY, OP(movsldup, VEC_XMM_XMMM, 16, .aligned = true, .dst_write_only = true, .feature = VEC_SSE3)),
    AT(VEC_F2, 0x12, WHEN_ANY, OP(movddup, VEC_XMM_XMMM, 8, .dst_write_only = true, .feature = VEC_SSE3)),
    STORE_LOW(VEC_NP, 0x13, 8, .mem_only = true), STORE_LOW(VEC_66, 0x13, 8, .mem_only = true),
    AT(VEC_NP, 0x16, WHEN_MEM, OP(movlhps, VEC_XMM_XMMM, 8)), AT(VEC_66, 0x16, WHEN_MEM, OP(movlhps, VEC_XMM_XMMM, 8, .mem_only = true)),
    AT(VEC_NP, 0x16, WHEN_REG, OP(movlhps, VEC_XMM_XMMM, 255)),
    AT(VEC_F3, 0x16, WHEN_ANY, OP(movshdup, VEC_XMM_XMMM, 16, .aligned = true, .dst_write_only = true, .feature = VEC_SSE3)),
    AT(VEC_NP, 0x17, WHEN_MEM, OP(movhps_store, VEC_STORE, 8, .mem_only = true, .dst_write_only = true)),
    AT(VEC_66, 0x17, WHEN_MEM, OP(movhps_store, VEC_STORE, 8, .mem_only = true, .dst_write_only = true)),
    /* MOVAPS, MOVAPD, MOVNTPS, MOVNTPD */
    LOAD16(VEC_NP, 0x28, .aligned = true), LOAD16(VEC_66, 0x28, .aligned = true),
    STORE16(VEC_NP, 0x29, .aligned = true), STORE16(VEC_66, 0x29, .aligned = true),
    STORE_LOW(VEC_NP, 0x2B, 16, .aligned = true, .mem_only = true), STORE_LOW(VEC_66, 0x2B, 16, .aligned = true, .mem_only = true),
    AT(VEC_NP, 0x50, WHEN_REG, OP(movmskps, VEC_GPR_XMMM, 255, .dst_write_only = true)),
    AT(VEC_66, 0x50, WHEN_REG, OP(movmskpd, VEC_GPR_XMMM, 255, .dst_write_only = true)),
    /* MOVD, MOVQ, MOVDQA, MOVDQU */
    AT(VEC_NP, 0x6E, WHEN_ANY, OP(movd, VEC_MM_GPR, 0, .dst_write_only = true)),
    AT(VEC_66, 0x6E, WHEN_ANY, OP(movd, VEC_XMM_GPR, 0, .dst_write_only = true)),
    AT(VEC_NP, 0x6F, WHEN_ANY, OP(low8, VEC_MM_MMM, 8, .dst_write_only = true)),
    LOAD16(VEC_66, 0x6F, .aligned = true), LOAD16(VEC_F3, 0x6F),
    AT(VEC_NP, 0x77, WHEN_ANY, OP(emms, VEC_EMMS, 255)),
    AT(VEC_NP, 0x7E, WHEN_ANY, OP(movd, VEC_GPR_STORE_MM, 0, .dst_write_only = true)),
    AT(VEC_66, 0x7E, WHEN_ANY, OP(movd, VEC_GPR_STORE, 0, .dst_write_only = true)),
    AT(VEC_F3, 0x7E, WHEN_ANY, OP(low8, VEC_XMM_XMMM, 8, .dst_write_only = true)),
    AT(VEC_NP, 0x7F, WHEN_ANY, OP(low8, VEC_MM_STORE, 8, .dst_write_only = true)),
    STORE16(VEC_66, 0x7F, .aligned = true), STORE16(VEC_F3, 0x7F),
    AT(VEC_NP, 0xC4, WHEN_ANY, OP(mm_pinsrw, VEC_MM_GPR, 2, .has_imm = true)),
    AT(VEC_66, 0xC4, WHEN_ANY, OP(pinsrw, VEC_XMM_GPR, 2, .has_imm = true)),
    AT(VEC_NP, 0xC5, WHEN_REG, OP(mm_pextrw, VEC_GPR_MM, 255, .has_imm = true, .dst_write_only = true)),
    AT(VEC_66, 0xC5, WHEN_REG, OP(pextrw, VEC_GPR_XMMM, 255, .has_imm = true, .dst_write_only = true)),
    AT(VEC_66, 0xD6, WHEN_ANY, OP(low8, VEC_STORE, 8, .dst_write_only = true)),
    AT(VEC_F3, 0xD6, WHEN_REG, OP(low8, VEC_XMM_MMM, 255, .dst_write_only = true)),
    AT(VEC_F2, 0xD6, WHEN_REG, OP(low8, VEC_MM_XMMM, 255, .dst_write_only = true)),
    /* MOVNTQ, MOVNTDQ, LDDQU, MASKMOVQ, MASKMOVDQU */
    AT(VEC_NP, 0xE7, WHEN_MEM, OP(low8, VEC_MM_STORE, 8, .mem_only = true, .dst_write_only = true)),
    STORE_LOW(VEC_66, 0xE7, 16, .aligned = true, .mem_only = true),
    AT(VEC_F2, 0xF0, WHEN_MEM, OP(copy, VEC_XMM_XMMM, 16, .mem_only = true, .dst_write_only = true, .copy = true, .feature = VEC_SSE3)),
    AT(VEC_NP, 0xF7, WHEN_REG, {.form = VEC_MM_MASKMOV, .mem_size = 255, .name = "maskmovq"}),
    AT(VEC_66, 0xF7, WHEN_REG, {.form = VEC_MASKMOV, .mem_size = 255, .name = "maskmovdqu"}),
    {VEC_MAP_0F38, VEC_66, 0x2A, WHEN_MEM, -1, /* MOVNTDQA */
     OP(copy, VEC_XMM_XMMM, 16, .aligned = true, .mem_only = true, .dst_write_only = true, .copy = true, .feature = VEC_SSE41)},

    AT3A(0x14, WHEN_ANY, OP(pextrb, VEC_GPR_STORE, 1, .has_imm = true, .dst_write_only = true, .feature = VEC_SSE41)),
    AT3A(0x15, WHEN_ANY, OP(pextrw, VEC_GPR_STORE, 2, .has_imm = true, .dst_write_only = true, .feature = VEC_SSE41)),
    AT3A(0x16, WHEN_ANY, OP(pextrd, VEC_GPR_STORE, 0, .has_imm = true, .dst_write_only = true, .feature = VEC_SSE41)),
    AT3A(0x17, WHEN_ANY, OP(extractps, VEC_GPR_STORE, 4, .has_imm = true, .dst_write_only = true, .feature = VEC_SSE41)),
    AT3A(0x20, WHEN_ANY, OP(pinsrb, VEC_XMM_GPR, 1, .has_imm = true, .feature = VEC_SSE41)),
    AT3A(0x21, WHEN_REG, OP(insertps, VEC_XMM_XMMM, 255, .has_imm = true, .feature = VEC_SSE41)),
    AT3A(0x21, WHEN_MEM, OP(insertps_m32, VEC_XMM_XMMM, 4, .has_imm = true, .feature = VEC_SSE41)),
    AT3A(0x22, WHEN_ANY, OP(pinsrd, VEC_XMM_GPR, 0, .has_imm = true, .feature = VEC_SSE41)),
};
const size_t vec_move_count = sizeof vec_move_rows / sizeof vec_move_rows[0];
