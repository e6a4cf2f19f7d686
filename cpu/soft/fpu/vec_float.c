/* SSE to SSE4.1 floating point by the host's own instructions, under the guest's MXCSR.
 *
 * In the usual case (all exceptions masked, the control bits those of the host) an operation simply runs, and its flags
 * stay in the host's MXCSR until fpu_collect(): reading MXCSR after each costs four times the operation itself. Else
 * the guest's control bits are loaded with every exception masked, and the flags are compared with the guest's masks.
 */
#pragma GCC target("sse4.2")
#include "soft/fpu/vec.h"

enum {
    MXCSR_IE = 1, MXCSR_DE = 2, MXCSR_ZE = 4, MXCSR_OE = 8, MXCSR_UE = 16, MXCSR_PE = 32,
    MXCSR_FLAGS = 0x3F, MXCSR_MASKS = 0x1F80, MXCSR_UM = 0x800, MXCSR_FTZ = 0x8000,
    MXCSR_CONTROL = 0xFFC0,
};
#define SWITCHED 0x80000000u /* the host's MXCSR was replaced and is to be restored */

static inline void set_mxcsr(uint32_t v) { asm volatile("ldmxcsr %0" : : "m"(v)); }

/* Returns the host's MXCSR with SWITCHED if leave() has work to do, else 0. */
static uint32_t prepare(struct fpu *f)
{
    uint32_t guest = f->mxcsr, host = fpu_host_mxcsr();
    if (((guest ^ host) & MXCSR_CONTROL) == 0 && (guest & MXCSR_MASKS) == MXCSR_MASKS) {
        if (host & MXCSR_FLAGS & ~guest) /* flags of something else */
            set_mxcsr(host & ~(uint32_t)MXCSR_FLAGS);
        f->mxcsr_lazy = true;
        return 0;
    }
    uint32_t run = (guest & MXCSR_CONTROL) | MXCSR_MASKS;
    if (!(guest & MXCSR_UM)) /* an unmasked underflow overrides flush-to-zero */
        run &= ~(uint32_t)MXCSR_FTZ;
    set_mxcsr(run);
    return host | SWITCHED;
}

static inline uint32_t enter(struct fpu *f) { return __builtin_expect(f->mxcsr_lazy, 1) ? 0 : prepare(f); }

/* True if the operation raised an unmasked exception. tiny: the result is denormal, which raises an unmasked underflow
 * even when it is exact. */
static bool finish(struct fpu *f, uint32_t host, bool tiny)
{
    uint32_t flags = fpu_host_mxcsr() & MXCSR_FLAGS, unmasked = ~(f->mxcsr >> 7) & MXCSR_FLAGS;
    set_mxcsr(host & ~SWITCHED);
    if (tiny)
        flags |= MXCSR_UE & unmasked;
    /* Exceptions of the operands come first: what the result would raise is then not known. */
    if (flags & unmasked & (MXCSR_IE | MXCSR_DE | MXCSR_ZE))
        flags &= MXCSR_IE | MXCSR_DE | MXCSR_ZE;
    f->mxcsr |= flags;
    return (flags & unmasked) != 0;
}

static inline bool leave(struct fpu *f, uint32_t host, bool tiny)
{
    return __builtin_expect(host & SWITCHED, 0) && finish(f, host, tiny);
}

uint32_t vec_float_enter(struct fpu *f) { return enter(f); }
bool vec_float_leave(struct fpu *f, uint32_t host, bool tiny) { return leave(f, host, tiny); }

static bool tiny_ps(__m128i v)
{
    union xmm x;
    vec_store(&x, v);
    for (unsigned i = 0; i < 4; i++)
        if ((x.d[i] & 0x7F800000) == 0 && (x.d[i] & 0x7FFFFF) != 0)
            return true;
    return false;
}

static bool tiny_pd(__m128i v)
{
    union xmm x;
    vec_store(&x, v);
    for (unsigned i = 0; i < 2; i++)
        if ((x.q[i] & 0x7FF0000000000000) == 0 && (x.q[i] & 0xFFFFFFFFFFFFF) != 0)
            return true;
    return false;
}

static bool tiny_ss(__m128i v) { return tiny_ps(_mm_cvtsi32_si128(_mm_cvtsi128_si32(v))); }
static bool tiny_sd(__m128i v) { return tiny_pd(_mm_move_epi64(v)); }
static inline bool never(__m128i v VEC_UNUSED) { return false; }

/* dst = dst op src; the upper elements of a scalar operation stay. check: which results may be tiny. */
#define FLOAT_AS(n, text, check)                                                                                       \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i d = vec_load(dst), s = vec_load(src);                                                                  \
        uint32_t host = enter(ctx->fpu);                                                                               \
        asm volatile(text : "+x"(d) : "x"(s));                                                                         \
        if (__builtin_expect(leave(ctx->fpu, host, (host & SWITCHED) && check(d)), 0))                                 \
            return FPU_XM;                                                                                             \
        vec_store(dst, d);                                                                                             \
        return FPU_OK;                                                                                                 \
    }
#define FLOAT(n, check) FLOAT_AS(n, #n " %1, %0", check)
#define ARITHMETIC(n, check) \
    FLOAT(n##ps, tiny_##check##ps) FLOAT(n##pd, tiny_##check##pd) FLOAT(n##ss, tiny_##check##ss) FLOAT(n##sd, tiny_##check##sd)
#define tiny_no_ps never
#define tiny_no_pd never
#define tiny_no_ss never
#define tiny_no_sd never

ARITHMETIC(add, ) ARITHMETIC(sub, ) ARITHMETIC(mul, ) ARITHMETIC(div, )
ARITHMETIC(min, no_) ARITHMETIC(max, no_) ARITHMETIC(sqrt, no_)
FLOAT(addsubps, tiny_ps) FLOAT(addsubpd, tiny_pd) FLOAT(haddps, tiny_ps) FLOAT(haddpd, tiny_pd)
FLOAT(hsubps, tiny_ps) FLOAT(hsubpd, tiny_pd)
FLOAT(cvtss2sd, never) FLOAT(cvtsd2ss, tiny_ss) FLOAT(cvtps2pd, never) FLOAT(cvtpd2ps, tiny_ps)
FLOAT(cvtdq2ps, never) FLOAT(cvtdq2pd, never) FLOAT(cvtps2dq, never) FLOAT(cvttps2dq, never)
FLOAT(cvtpd2dq, never) FLOAT(cvttpd2dq, never)

/* --- between MMX or general registers and XMM --- */
/* CVTPI2PS keeps the upper half of dst. */
static int vec_cvtpi2ps(VEC_ARGS)
{
    __m128i d, s = _mm_move_epi64(vec_load(src));
    uint32_t host = enter(ctx->fpu);
    asm volatile("cvtdq2ps %1, %0" : "=x"(d) : "x"(s));
    if (leave(ctx->fpu, host, false))
        return FPU_XM;
    dst->q[0] = (uint64_t)_mm_cvtsi128_si64(d);
    return FPU_OK;
}

/* Exact, so no flags. */
static int vec_cvtpi2pd(VEC_ARGS)
{
    vec_store(dst, _mm_castpd_si128(_mm_cvtepi32_pd(vec_load(src))));
    return FPU_OK;
}

#define TO_MMX(n, text, narrow)                                                                                        \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i d, s = narrow(vec_load(src));                                                                          \
        uint32_t host = enter(ctx->fpu);                                                                               \
        asm volatile(text " %1, %0" : "=x"(d) : "x"(s));                                                               \
        if (leave(ctx->fpu, host, false))                                                                              \
            return FPU_XM;                                                                                             \
        vec_store(dst, _mm_move_epi64(d));                                                                             \
        return FPU_OK;                                                                                                 \
    }
#define WHOLE(v) (v)
TO_MMX(cvtps2pi, "cvtps2dq", _mm_move_epi64) TO_MMX(cvttps2pi, "cvttps2dq", _mm_move_epi64)
TO_MMX(cvtpd2pi, "cvtpd2dq", WHOLE) TO_MMX(cvttpd2pi, "cvttpd2dq", WHOLE)

#define FROM_GPR(n)                                                                                                    \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i d = vec_load(dst);                                                                                     \
        uint32_t host = enter(ctx->fpu);                                                                               \
        if (ctx->rex_w)                                                                                                \
            asm volatile(#n "q %1, %0" : "+x"(d) : "r"(src->q[0]));                                                    \
        else                                                                                                           \
            asm volatile(#n "l %1, %0" : "+x"(d) : "r"(src->d[0]));                                                    \
        if (leave(ctx->fpu, host, false))                                                                              \
            return FPU_XM;                                                                                             \
        vec_store(dst, d);                                                                                             \
        return FPU_OK;                                                                                                 \
    }
FROM_GPR(cvtsi2ss) FROM_GPR(cvtsi2sd)

#define TO_GPR(n)                                                                                                      \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i s = vec_load(src);                                                                                     \
        uint64_t r;                                                                                                    \
        uint32_t r32, host = enter(ctx->fpu);                                                                          \
        if (ctx->rex_w) {                                                                                              \
            asm volatile(#n " %1, %0" : "=r"(r) : "x"(s));                                                             \
        } else {                                                                                                       \
            asm volatile(#n " %1, %0" : "=r"(r32) : "x"(s));                                                           \
            r = r32;                                                                                                   \
        }                                                                                                              \
        if (leave(ctx->fpu, host, false))                                                                              \
            return FPU_XM;                                                                                             \
        dst->q[0] = r;                                                                                                 \
        return FPU_OK;                                                                                                 \
    }
TO_GPR(cvtss2si) TO_GPR(cvttss2si) TO_GPR(cvtsd2si) TO_GPR(cvttsd2si)

/* --- comparisons --- */
#define COMPARE(n)                                                                                                     \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i d = vec_load(dst), s = vec_load(src);                                                                  \
        bool carry, zero, parity;                                                                                      \
        uint32_t host = enter(ctx->fpu);                                                                               \
        asm volatile(#n " %4, %3" : "=@ccc"(carry), "=@ccz"(zero), "=@ccp"(parity) : "x"(d), "x"(s));                  \
        if (leave(ctx->fpu, host, false))                                                                              \
            return FPU_XM;                                                                                             \
        ctx->flags = (carry ? 1u : 0) | (zero ? 0x40u : 0) | (parity ? 4u : 0);                                        \
        return FPU_OK;                                                                                                 \
    }
COMPARE(comiss) COMPARE(comisd) COMPARE(ucomiss) COMPARE(ucomisd)

/* --- operations with an immediate: one host instruction for each value that matters --- */
#define CASE(text, n) case n: asm volatile(text : "+x"(d) : "x"(s), "i"(n)); break;
#define CASES4(text, n) CASE(text, n) CASE(text, n + 1) CASE(text, n + 2) CASE(text, n + 3)
#define CASES8(text, n) CASES4(text, n) CASES4(text, n + 4)
#define CASES16(text, n) CASES8(text, n) CASES8(text, n + 8)
#define CASES64(text, n) CASES16(text, n) CASES16(text, n + 16) CASES16(text, n + 32) CASES16(text, n + 48)
#define CASES256(text, n) CASES64(text, n) CASES64(text, n + 64) CASES64(text, n + 128) CASES64(text, n + 192)
#define WITH_IMM(n, mask, cases, check)                                                                                \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i d = vec_load(dst), s = vec_load(src);                                                                  \
        uint32_t host = enter(ctx->fpu);                                                                               \
        switch (ctx->imm & (mask)) {                                                                                   \
            cases(#n " %2, %1, %0", 0)                                                                                 \
        }                                                                                                              \
        if (__builtin_expect(leave(ctx->fpu, host, (host & SWITCHED) && check(d)), 0))                                 \
            return FPU_XM;                                                                                             \
        vec_store(dst, d);                                                                                             \
        return FPU_OK;                                                                                                 \
    }
WITH_IMM(cmpps, 7, CASES8, never) WITH_IMM(cmppd, 7, CASES8, never)
WITH_IMM(cmpss, 7, CASES8, never) WITH_IMM(cmpsd, 7, CASES8, never)
WITH_IMM(roundps, 15, CASES16, never) WITH_IMM(roundpd, 15, CASES16, never)
WITH_IMM(roundss, 15, CASES16, never) WITH_IMM(roundsd, 15, CASES16, never)
WITH_IMM(dpps, 255, CASES256, tiny_ps) WITH_IMM(dppd, 255, CASES256, tiny_pd)

/* ---- the maps ---- */
#define AT(prefix, opcode, ...) {VEC_MAP_0F, prefix, opcode, WHEN_ANY, -1, __VA_ARGS__}
#define PACKED(prefix, opcode, n, ...) AT(prefix, opcode, OP(n, VEC_XMM_XMMM, 16, .aligned = true, ##__VA_ARGS__))
#define SCALARS(opcode, n) \
    AT(VEC_F3, opcode, OP(n##ss, VEC_XMM_XMMM, 4)), AT(VEC_F2, opcode, OP(n##sd, VEC_XMM_XMMM, 8))
#define FOUR(opcode, n) PACKED(VEC_NP, opcode, n##ps), PACKED(VEC_66, opcode, n##pd), SCALARS(opcode, n)
#define AT3A(opcode, n, size, align) \
    {VEC_MAP_0F3A, VEC_66, opcode, WHEN_ANY, -1, OP(n, VEC_XMM_XMMM, size, .aligned = align, .has_imm = true, .feature = VEC_SSE41)}

struct vec_row vec_float_rows[] = {
    AT(VEC_NP, 0x2A, OP(cvtpi2ps, VEC_XMM_MMM, 8)), AT(VEC_66, 0x2A, OP(cvtpi2pd, VEC_XMM_MMM, 8)),
    AT(VEC_F3, 0x2A, OP(cvtsi2ss, VEC_XMM_GPR, 0)), AT(VEC_F2, 0x2A, OP(cvtsi2sd, VEC_XMM_GPR, 0)),
    AT(VEC_NP, 0x2C, OP(cvttps2pi, VEC_MM_XMMM, 8)), AT(VEC_66, 0x2C, OP(cvttpd2pi, VEC_MM_XMMM, 16, .aligned = true)),
    AT(VEC_F3, 0x2C, OP(cvttss2si, VEC_GPR_XMMM, 4)), AT(VEC_F2, 0x2C, OP(cvttsd2si, VEC_GPR_XMMM, 8)),
    AT(VEC_NP, 0x2D, OP(cvtps2pi, VEC_MM_XMMM, 8)), AT(VEC_66, 0x2D, OP(cvtpd2pi, VEC_MM_XMMM, 16, .aligned = true)),
    AT(VEC_F3, 0x2D, OP(cvtss2si, VEC_GPR_XMMM, 4)), AT(VEC_F2, 0x2D, OP(cvtsd2si, VEC_GPR_XMMM, 8)),
    AT(VEC_NP, 0x2E, OP(ucomiss, VEC_FLAGS, 4)), AT(VEC_66, 0x2E, OP(ucomisd, VEC_FLAGS, 8)),
    AT(VEC_NP, 0x2F, OP(comiss, VEC_FLAGS, 4)), AT(VEC_66, 0x2F, OP(comisd, VEC_FLAGS, 8)),
    FOUR(0x51, sqrt), FOUR(0x58, add), FOUR(0x59, mul), FOUR(0x5C, sub), FOUR(0x5D, min), FOUR(0x5E, div), FOUR(0x5F, max),
    PACKED(VEC_NP, 0x52, rsqrtps), AT(VEC_F3, 0x52, OP(rsqrtss, VEC_XMM_XMMM, 4)),
    PACKED(VEC_NP, 0x53, rcpps), AT(VEC_F3, 0x53, OP(rcpss, VEC_XMM_XMMM, 4)),
    AT(VEC_NP, 0x5A, OP(cvtps2pd, VEC_XMM_XMMM, 8)), PACKED(VEC_66, 0x5A, cvtpd2ps),
    AT(VEC_F3, 0x5A, OP(cvtss2sd, VEC_XMM_XMMM, 4)), AT(VEC_F2, 0x5A, OP(cvtsd2ss, VEC_XMM_XMMM, 8)),
    PACKED(VEC_NP, 0x5B, cvtdq2ps), PACKED(VEC_66, 0x5B, cvtps2dq), PACKED(VEC_F3, 0x5B, cvttps2dq),
    PACKED(VEC_66, 0x7C, haddpd, .feature = VEC_SSE3), PACKED(VEC_F2, 0x7C, haddps, .feature = VEC_SSE3),
    PACKED(VEC_66, 0x7D, hsubpd, .feature = VEC_SSE3), PACKED(VEC_F2, 0x7D, hsubps, .feature = VEC_SSE3),
    PACKED(VEC_NP, 0xC2, cmpps, .has_imm = true), PACKED(VEC_66, 0xC2, cmppd, .has_imm = true),
    AT(VEC_F3, 0xC2, OP(cmpss, VEC_XMM_XMMM, 4, .has_imm = true)), AT(VEC_F2, 0xC2, OP(cmpsd, VEC_XMM_XMMM, 8, .has_imm = true)),
    PACKED(VEC_66, 0xD0, addsubpd, .feature = VEC_SSE3), PACKED(VEC_F2, 0xD0, addsubps, .feature = VEC_SSE3),
    PACKED(VEC_66, 0xE6, cvttpd2dq), PACKED(VEC_F2, 0xE6, cvtpd2dq), AT(VEC_F3, 0xE6, OP(cvtdq2pd, VEC_XMM_XMMM, 8)),
    AT3A(0x08, roundps, 16, true), AT3A(0x09, roundpd, 16, true), AT3A(0x0A, roundss, 4, false), AT3A(0x0B, roundsd, 8, false),
    AT3A(0x40, dpps, 16, true), AT3A(0x41, dppd, 16, true),
};
const size_t vec_float_count = sizeof vec_float_rows / sizeof vec_float_rows[0];
