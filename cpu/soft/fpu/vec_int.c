/* MMX and SSE integer operations: AMD64 APM volumes 4 and 5. None of them looks at MXCSR.
 *
 * An MMX operation uses the SSE function on the low quadword where lanes do not meet; the rest (packing, horizontal,
 * interleaving from the high half) have functions of their own, named mm_.
 */
#pragma GCC target("sse4.2")
#include "soft/fpu/vec.h"

/* dst = dst op src by one host instruction. */
#define LANES(n)                                                                                                       \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i d = vec_load(dst), s = vec_load(src);                                                                  \
        asm(#n " %1, %0" : "+x"(d) : "x"(s));                                                                          \
        vec_store(dst, d);                                                                                             \
        return FPU_OK;                                                                                                 \
    }

LANES(paddb) LANES(paddw) LANES(paddd) LANES(paddq) LANES(paddsb) LANES(paddsw) LANES(paddusb) LANES(paddusw)
LANES(psubb) LANES(psubw) LANES(psubd) LANES(psubq) LANES(psubsb) LANES(psubsw) LANES(psubusb) LANES(psubusw)
LANES(pcmpeqb) LANES(pcmpeqw) LANES(pcmpeqd) LANES(pcmpeqq) LANES(pcmpgtb) LANES(pcmpgtw) LANES(pcmpgtd) LANES(pcmpgtq)
LANES(pand) LANES(pandn) LANES(por) LANES(pxor)
LANES(pmullw) LANES(pmulhw) LANES(pmulhuw) LANES(pmuludq) LANES(pmuldq) LANES(pmulld) LANES(pmulhrsw)
LANES(pmaddwd) LANES(pmaddubsw) LANES(psadbw) LANES(pavgb) LANES(pavgw)
LANES(pminub) LANES(pmaxub) LANES(pminsw) LANES(pmaxsw) LANES(pminsb) LANES(pminsd) LANES(pminuw) LANES(pminud)
LANES(pmaxsb) LANES(pmaxsd) LANES(pmaxuw) LANES(pmaxud)
LANES(psignb) LANES(psignw) LANES(psignd)
LANES(psrlw) LANES(psrld) LANES(psrlq) LANES(psraw) LANES(psrad) LANES(psllw) LANES(pslld) LANES(psllq)
LANES(packsswb) LANES(packssdw) LANES(packuswb) LANES(packusdw)
LANES(phaddw) LANES(phaddd) LANES(phaddsw) LANES(phsubw) LANES(phsubd) LANES(phsubsw)
LANES(punpcklbw) LANES(punpcklwd) LANES(punpckldq) LANES(punpcklqdq)
LANES(punpckhbw) LANES(punpckhwd) LANES(punpckhdq) LANES(punpckhqdq)
LANES(pshufb)

/* dst = op src. */
#define UNARY(n)                                                                                                       \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i d, s = vec_load(src);                                                                                  \
        asm(#n " %1, %0" : "=x"(d) : "x"(s));                                                                          \
        vec_store(dst, d);                                                                                             \
        return FPU_OK;                                                                                                 \
    }

UNARY(pabsb) UNARY(pabsw) UNARY(pabsd) UNARY(phminposuw)
UNARY(pmovsxbw) UNARY(pmovsxbd) UNARY(pmovsxbq) UNARY(pmovsxwd) UNARY(pmovsxwq) UNARY(pmovsxdq)
UNARY(pmovzxbw) UNARY(pmovzxbd) UNARY(pmovzxbq) UNARY(pmovzxwd) UNARY(pmovzxwq) UNARY(pmovzxdq)

/* Operations that narrow both operands: put the two quadwords side by side, then the low half of the result is it. */
#define MM_JOINED(n)                                                                                                   \
    static int vec_mm_##n(VEC_ARGS)                                                                                    \
    {                                                                                                                  \
        __m128i d = _mm_unpacklo_epi64(vec_load(dst), vec_load(src));                                                  \
        asm(#n " %0, %0" : "+x"(d));                                                                                   \
        vec_store(dst, d);                                                                                             \
        return FPU_OK;                                                                                                 \
    }

MM_JOINED(packsswb) MM_JOINED(packssdw) MM_JOINED(packuswb)
MM_JOINED(phaddw) MM_JOINED(phaddd) MM_JOINED(phaddsw) MM_JOINED(phsubw) MM_JOINED(phsubd) MM_JOINED(phsubsw)

/* Interleaving the high doublewords of quadwords is the high half of interleaving the quadwords. */
#define MM_HIGH(n, low)                                                                                                \
    static int vec_mm_##n(VEC_ARGS)                                                                                    \
    {                                                                                                                  \
        __m128i d = vec_load(dst), s = vec_load(src);                                                                  \
        asm(#low " %1, %0" : "+x"(d) : "x"(s));                                                                        \
        vec_store(dst, _mm_srli_si128(d, 8));                                                                          \
        return FPU_OK;                                                                                                 \
    }

MM_HIGH(punpckhbw, punpcklbw) MM_HIGH(punpckhwd, punpcklwd) MM_HIGH(punpckhdq, punpckldq)

static int vec_mm_pshufb(VEC_ARGS)
{
    __m128i control = _mm_and_si128(vec_load(src), _mm_set1_epi8((char)0x87));
    vec_store(dst, _mm_shuffle_epi8(vec_load(dst), control));
    return FPU_OK;
}

/* --- shuffles and byte shifts whose immediate is data here: by PSHUFB with a control made from tables --- */

/* Control bytes for two doublewords picked by a nibble of the immediate. */
#define PICK_D(n) (0x03020100u + 0x04040404u * (n))
#define PICK_2D(n) (PICK_D((n) & 3) | (uint64_t)PICK_D((n) >> 2) << 32)
#define PICK_W(n) (0x0100u + 0x0202u * (n))
#define PICK_2W(n) (PICK_W((n) & 3) | (uint32_t)PICK_W((n) >> 2) << 16)
#define SIXTEEN(m) {m(0), m(1), m(2), m(3), m(4), m(5), m(6), m(7), m(8), m(9), m(10), m(11), m(12), m(13), m(14), m(15)}
static const uint64_t pick_dwords[16] = SIXTEEN(PICK_2D);
static const uint32_t pick_words[16] = SIXTEEN(PICK_2W);

static inline uint64_t four_words(uint8_t imm) { return pick_words[imm & 15] | (uint64_t)pick_words[imm >> 4] << 32; }

static int vec_pshufd(VEC_ARGS)
{
    __m128i control = _mm_set_epi64x((long long)pick_dwords[ctx->imm >> 4], (long long)pick_dwords[ctx->imm & 15]);
    vec_store(dst, _mm_shuffle_epi8(vec_load(src), control));
    return FPU_OK;
}

static int vec_pshuflw(VEC_ARGS)
{
    __m128i control = _mm_set_epi64x(0x0F0E0D0C0B0A0908, (long long)four_words(ctx->imm));
    vec_store(dst, _mm_shuffle_epi8(vec_load(src), control));
    return FPU_OK;
}

static int vec_pshufhw(VEC_ARGS)
{
    __m128i control = _mm_set_epi64x((long long)(four_words(ctx->imm) + 0x0808080808080808), 0x0706050403020100);
    vec_store(dst, _mm_shuffle_epi8(vec_load(src), control));
    return FPU_OK;
}

static int vec_pshufw(VEC_ARGS)
{
    vec_store(dst, _mm_shuffle_epi8(vec_load(src), _mm_cvtsi64_si128((long long)four_words(ctx->imm))));
    return FPU_OK;
}

static int vec_shufps(VEC_ARGS)
{
    __m128i low = _mm_shuffle_epi8(vec_load(dst), _mm_cvtsi64_si128((long long)pick_dwords[ctx->imm & 15]));
    __m128i high = _mm_shuffle_epi8(vec_load(src), _mm_cvtsi64_si128((long long)pick_dwords[ctx->imm >> 4]));
    vec_store(dst, _mm_unpacklo_epi64(low, high));
    return FPU_OK;
}

static int vec_shufpd(VEC_ARGS)
{
    uint64_t low = dst->q[ctx->imm & 1], high = src->q[ctx->imm >> 1 & 1];
    vec_store(dst, _mm_set_epi64x((long long)high, (long long)low));
    return FPU_OK;
}

/* PSHUFB controls of a window of 16 bytes: reading at 16 + n moves bytes down by n (zeros come in), at 16 - n up. */
static const uint8_t byte_window[16 * 3] = {
    128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
    0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,  11,  12,  13,  14,  15,
    128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
};

static inline __m128i bytes_down(__m128i v, unsigned n)
{
    return _mm_shuffle_epi8(v, _mm_loadu_si128((const __m128i *)(byte_window + 16 + (n > 16 ? 16 : n))));
}

static inline __m128i bytes_up(__m128i v, unsigned n)
{
    return _mm_shuffle_epi8(v, _mm_loadu_si128((const __m128i *)(byte_window + 16 - (n > 16 ? 16 : n))));
}

static int vec_psrldq(VEC_ARGS)
{
    vec_store(dst, bytes_down(vec_load(dst), ctx->imm));
    return FPU_OK;
}

static int vec_pslldq(VEC_ARGS)
{
    vec_store(dst, bytes_up(vec_load(dst), ctx->imm));
    return FPU_OK;
}

static int vec_palignr(VEC_ARGS)
{
    unsigned n = ctx->imm;
    __m128i d = vec_load(dst), s = vec_load(src);
    vec_store(dst, n <= 16 ? _mm_or_si128(bytes_down(s, n), bytes_up(d, 16 - n)) : bytes_down(d, n - 16));
    return FPU_OK;
}

static int vec_mm_palignr(VEC_ARGS)
{
    __m128i joined = _mm_unpacklo_epi64(vec_load(src), vec_load(dst));
    vec_store(dst, bytes_down(joined, ctx->imm));
    return FPU_OK;
}

/* Shifts by an immediate count: as by a register. */
#define SHIFT_IMM(n)                                                                                                   \
    static int vec_##n##_imm(VEC_ARGS)                                                                                 \
    {                                                                                                                  \
        __m128i d = vec_load(dst), count = _mm_cvtsi32_si128(ctx->imm);                                                \
        asm(#n " %1, %0" : "+x"(d) : "x"(count));                                                                      \
        vec_store(dst, d);                                                                                             \
        return FPU_OK;                                                                                                 \
    }

SHIFT_IMM(psrlw) SHIFT_IMM(psrld) SHIFT_IMM(psrlq) SHIFT_IMM(psraw) SHIFT_IMM(psrad)
SHIFT_IMM(psllw) SHIFT_IMM(pslld) SHIFT_IMM(psllq)

/* --- blends: the mask (XMM0, or the immediate) picks src --- */
#define BLENDV(n, function, type, cast, back)                                                                          \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        type d = cast(vec_load(dst)), s = cast(vec_load(src)), m = cast(vec_load(&ctx->fpu->xmm[0]));                  \
        vec_store(dst, back(function(d, s, m)));                                                                       \
        return FPU_OK;                                                                                                 \
    }
#define SAME(x) (x)
BLENDV(pblendvb, _mm_blendv_epi8, __m128i, SAME, SAME)
BLENDV(blendvps, _mm_blendv_ps, __m128, _mm_castsi128_ps, _mm_castps_si128)
BLENDV(blendvpd, _mm_blendv_pd, __m128d, _mm_castsi128_pd, _mm_castpd_si128)

static inline void blend(union xmm *dst, const union xmm *src, __m128i bits, __m128i lanes)
{
    __m128i mask = _mm_cmpeq_epi16(_mm_and_si128(bits, lanes), lanes);
    vec_store(dst, _mm_blendv_epi8(vec_load(dst), vec_load(src), mask));
}

static int vec_pblendw(VEC_ARGS)
{
    blend(dst, src, _mm_set1_epi16(ctx->imm), _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128));
    return FPU_OK;
}

static int vec_blendps(VEC_ARGS)
{
    blend(dst, src, _mm_set1_epi16(ctx->imm), _mm_setr_epi16(1, 1, 2, 2, 4, 4, 8, 8));
    return FPU_OK;
}

static int vec_blendpd(VEC_ARGS)
{
    blend(dst, src, _mm_set1_epi16(ctx->imm), _mm_setr_epi16(1, 1, 1, 1, 2, 2, 2, 2));
    return FPU_OK;
}

/* MPSADBW: bit 2 of the immediate picks the offset in dst, bits 0-1 the doubleword of src. */
static int vec_mpsadbw(VEC_ARGS)
{
    __m128i d = vec_load(dst), s = vec_load(src);
    if (ctx->imm & 4)
        d = _mm_srli_si128(d, 4);
    vec_store(dst, _mm_mpsadbw_epu8(d, bytes_down(s, (ctx->imm & 3) * 4), 0));
    return FPU_OK;
}

/* --- tests and masks --- */
static int vec_ptest(VEC_ARGS)
{
    __m128i d = vec_load(dst), s = vec_load(src);
    ctx->flags = (_mm_testz_si128(d, s) ? 0x40u : 0) | (_mm_testc_si128(d, s) ? 1u : 0);
    return FPU_OK;
}

static int vec_pmovmskb(VEC_ARGS)
{
    dst->q[0] = (uint32_t)_mm_movemask_epi8(vec_load(src));
    return FPU_OK;
}

static int vec_mm_pmovmskb(VEC_ARGS)
{
    dst->q[0] = (uint8_t)_mm_movemask_epi8(vec_load(src));
    return FPU_OK;
}

/* ---- the maps ---- */
#define SSE(map, opcode, n, ...) {map, VEC_66, opcode, WHEN_ANY, -1, OP(n, VEC_XMM_XMMM, 16, .aligned = true, ##__VA_ARGS__)}
#define MMX(map, opcode, n, ...) {map, VEC_NP, opcode, WHEN_ANY, -1, OP(n, VEC_MM_MMM, 8, ##__VA_ARGS__)}
#define BOTH(opcode, n) SSE(VEC_MAP_0F, opcode, n), MMX(VEC_MAP_0F, opcode, n)
#define APART(opcode, n) SSE(VEC_MAP_0F, opcode, n), MMX(VEC_MAP_0F, opcode, mm_##n)
#define SSSE3(opcode, n, m) SSE(VEC_MAP_0F38, opcode, n, .feature = VEC_SSSE3), MMX(VEC_MAP_0F38, opcode, m, .feature = VEC_SSSE3)
#define SSE41(opcode, n, ...) SSE(VEC_MAP_0F38, opcode, n, .feature = VEC_SSE41, ##__VA_ARGS__)
#define EXTEND(opcode, n, size) \
    {VEC_MAP_0F38, VEC_66, opcode, WHEN_ANY, -1, OP(n, VEC_XMM_XMMM, size, .dst_write_only = true, .feature = VEC_SSE41)}
#define GROUP(opcode, reg, n) \
    {VEC_MAP_0F, VEC_66, opcode, WHEN_REG, reg, OP(n##_imm, VEC_XMM_IMM, 255, .has_imm = true)}, \
    {VEC_MAP_0F, VEC_NP, opcode, WHEN_REG, reg, OP(n##_imm, VEC_MM_IMM, 255, .has_imm = true)}
#define IMM3A(opcode, n) SSE(VEC_MAP_0F3A, opcode, n, .has_imm = true, .feature = VEC_SSE41)
#define SHUFFLE(prefix, n) \
    {VEC_MAP_0F, prefix, 0x70, WHEN_ANY, -1, \
     OP(n, VEC_XMM_XMMM, 16, .aligned = true, .has_imm = true, .dst_write_only = true)}

struct vec_row vec_int_rows[] = {
    /* interleaving the low halves reads a doubleword in MMX form */
    SSE(VEC_MAP_0F, 0x60, punpcklbw), {VEC_MAP_0F, VEC_NP, 0x60, WHEN_ANY, -1, OP(punpcklbw, VEC_MM_MMM, 4)},
    SSE(VEC_MAP_0F, 0x61, punpcklwd), {VEC_MAP_0F, VEC_NP, 0x61, WHEN_ANY, -1, OP(punpcklwd, VEC_MM_MMM, 4)},
    SSE(VEC_MAP_0F, 0x62, punpckldq), {VEC_MAP_0F, VEC_NP, 0x62, WHEN_ANY, -1, OP(punpckldq, VEC_MM_MMM, 4)},
    APART(0x63, packsswb), BOTH(0x64, pcmpgtb), BOTH(0x65, pcmpgtw), BOTH(0x66, pcmpgtd), APART(0x67, packuswb),
    APART(0x68, punpckhbw), APART(0x69, punpckhwd), APART(0x6A, punpckhdq), APART(0x6B, packssdw),
    SSE(VEC_MAP_0F, 0x6C, punpcklqdq), SSE(VEC_MAP_0F, 0x6D, punpckhqdq),
    SHUFFLE(VEC_66, pshufd), SHUFFLE(VEC_F3, pshufhw), SHUFFLE(VEC_F2, pshuflw),
    MMX(VEC_MAP_0F, 0x70, pshufw, .has_imm = true, .dst_write_only = true),
    GROUP(0x71, 2, psrlw), GROUP(0x71, 4, psraw), GROUP(0x71, 6, psllw),
    GROUP(0x72, 2, psrld), GROUP(0x72, 4, psrad), GROUP(0x72, 6, pslld),
    GROUP(0x73, 2, psrlq), GROUP(0x73, 6, psllq),
    {VEC_MAP_0F, VEC_66, 0x73, WHEN_REG, 3, OP(psrldq, VEC_XMM_IMM, 255, .has_imm = true)},
    {VEC_MAP_0F, VEC_66, 0x73, WHEN_REG, 7, OP(pslldq, VEC_XMM_IMM, 255, .has_imm = true)},
    BOTH(0x74, pcmpeqb), BOTH(0x75, pcmpeqw), BOTH(0x76, pcmpeqd),
    SSE(VEC_MAP_0F, 0xC6, shufpd, .has_imm = true),
    {VEC_MAP_0F, VEC_NP, 0xC6, WHEN_ANY, -1, OP(shufps, VEC_XMM_XMMM, 16, .aligned = true, .has_imm = true)},
    BOTH(0xD1, psrlw), BOTH(0xD2, psrld), BOTH(0xD3, psrlq), BOTH(0xD4, paddq), BOTH(0xD5, pmullw),
    {VEC_MAP_0F, VEC_66, 0xD7, WHEN_REG, -1, OP(pmovmskb, VEC_GPR_XMMM, 255, .dst_write_only = true)},
    {VEC_MAP_0F, VEC_NP, 0xD7, WHEN_REG, -1, OP(mm_pmovmskb, VEC_GPR_MM, 255, .dst_write_only = true)},
    BOTH(0xD8, psubusb), BOTH(0xD9, psubusw), BOTH(0xDA, pminub), BOTH(0xDB, pand),
    BOTH(0xDC, paddusb), BOTH(0xDD, paddusw), BOTH(0xDE, pmaxub), BOTH(0xDF, pandn),
    BOTH(0xE0, pavgb), BOTH(0xE1, psraw), BOTH(0xE2, psrad), BOTH(0xE3, pavgw), BOTH(0xE4, pmulhuw), BOTH(0xE5, pmulhw),
    BOTH(0xE8, psubsb), BOTH(0xE9, psubsw), BOTH(0xEA, pminsw), BOTH(0xEB, por),
    BOTH(0xEC, paddsb), BOTH(0xED, paddsw), BOTH(0xEE, pmaxsw), BOTH(0xEF, pxor),
    BOTH(0xF1, psllw), BOTH(0xF2, pslld), BOTH(0xF3, psllq), BOTH(0xF4, pmuludq), BOTH(0xF5, pmaddwd), BOTH(0xF6, psadbw),
    BOTH(0xF8, psubb), BOTH(0xF9, psubw), BOTH(0xFA, psubd), BOTH(0xFB, psubq),
    BOTH(0xFC, paddb), BOTH(0xFD, paddw), BOTH(0xFE, paddd),
    /* the bitwise operations on floating-point types */
    {VEC_MAP_0F, VEC_NP, 0x54, WHEN_ANY, -1, OP(pand, VEC_XMM_XMMM, 16, .aligned = true)}, SSE(VEC_MAP_0F, 0x54, pand),
    {VEC_MAP_0F, VEC_NP, 0x55, WHEN_ANY, -1, OP(pandn, VEC_XMM_XMMM, 16, .aligned = true)}, SSE(VEC_MAP_0F, 0x55, pandn),
    {VEC_MAP_0F, VEC_NP, 0x56, WHEN_ANY, -1, OP(por, VEC_XMM_XMMM, 16, .aligned = true)}, SSE(VEC_MAP_0F, 0x56, por),
    {VEC_MAP_0F, VEC_NP, 0x57, WHEN_ANY, -1, OP(pxor, VEC_XMM_XMMM, 16, .aligned = true)}, SSE(VEC_MAP_0F, 0x57, pxor),
    /* UNPCKLPS, UNPCKLPD, UNPCKHPS, UNPCKHPD */
    {VEC_MAP_0F, VEC_NP, 0x14, WHEN_ANY, -1, OP(punpckldq, VEC_XMM_XMMM, 16, .aligned = true)},
    {VEC_MAP_0F, VEC_NP, 0x15, WHEN_ANY, -1, OP(punpckhdq, VEC_XMM_XMMM, 16, .aligned = true)},
    SSE(VEC_MAP_0F, 0x14, punpcklqdq), SSE(VEC_MAP_0F, 0x15, punpckhqdq),

    SSSE3(0x00, pshufb, mm_pshufb), SSSE3(0x01, phaddw, mm_phaddw), SSSE3(0x02, phaddd, mm_phaddd),
    SSSE3(0x03, phaddsw, mm_phaddsw), SSSE3(0x04, pmaddubsw, pmaddubsw), SSSE3(0x05, phsubw, mm_phsubw),
    SSSE3(0x06, phsubd, mm_phsubd), SSSE3(0x07, phsubsw, mm_phsubsw), SSSE3(0x08, psignb, psignb),
    SSSE3(0x09, psignw, psignw), SSSE3(0x0A, psignd, psignd), SSSE3(0x0B, pmulhrsw, pmulhrsw),
    SSSE3(0x1C, pabsb, pabsb), SSSE3(0x1D, pabsw, pabsw), SSSE3(0x1E, pabsd, pabsd),
    SSE41(0x10, pblendvb), SSE41(0x14, blendvps), SSE41(0x15, blendvpd),
    {VEC_MAP_0F38, VEC_66, 0x17, WHEN_ANY, -1, OP(ptest, VEC_FLAGS, 16, .aligned = true, .feature = VEC_SSE41)},
    EXTEND(0x20, pmovsxbw, 8), EXTEND(0x21, pmovsxbd, 4), EXTEND(0x22, pmovsxbq, 2),
    EXTEND(0x23, pmovsxwd, 8), EXTEND(0x24, pmovsxwq, 4), EXTEND(0x25, pmovsxdq, 8),
    EXTEND(0x30, pmovzxbw, 8), EXTEND(0x31, pmovzxbd, 4), EXTEND(0x32, pmovzxbq, 2),
    EXTEND(0x33, pmovzxwd, 8), EXTEND(0x34, pmovzxwq, 4), EXTEND(0x35, pmovzxdq, 8),
    SSE41(0x28, pmuldq), SSE41(0x29, pcmpeqq), SSE41(0x2B, packusdw),
    SSE(VEC_MAP_0F38, 0x37, pcmpgtq, .feature = VEC_SSE42),
    SSE41(0x38, pminsb), SSE41(0x39, pminsd), SSE41(0x3A, pminuw), SSE41(0x3B, pminud),
    SSE41(0x3C, pmaxsb), SSE41(0x3D, pmaxsd), SSE41(0x3E, pmaxuw), SSE41(0x3F, pmaxud),
    SSE41(0x40, pmulld), SSE41(0x41, phminposuw, .dst_write_only = true),

    IMM3A(0x0C, blendps), IMM3A(0x0D, blendpd), IMM3A(0x0E, pblendw), IMM3A(0x42, mpsadbw),
    SSE(VEC_MAP_0F3A, 0x0F, palignr, .has_imm = true, .feature = VEC_SSSE3),
    MMX(VEC_MAP_0F3A, 0x0F, mm_palignr, .has_imm = true, .feature = VEC_SSSE3),
};
const size_t vec_int_count = sizeof vec_int_rows / sizeof vec_int_rows[0];
