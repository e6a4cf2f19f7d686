/* SSE4.2 string comparisons: PCMPESTRM, PCMPESTRI, PCMPISTRM, PCMPISTRI by the host's own, a case for each immediate. */
#pragma GCC target("sse4.2")
#include "soft/fpu/vec.h"

/* An explicit length counts by its absolute value, saturated to the number of elements; with REX.W it is 64 bits wide. */
static int length(uint64_t reg, bool wide)
{
    int64_t n = wide ? (int64_t)reg : (int32_t)reg;
    return n > 16 || n < -16 ? 16 : (int)n;
}

struct outcome {
    __m128i mask;
    uint32_t index, flags;
};

static inline uint32_t flag_bits(bool c, bool z, bool s, bool o)
{
    return (c ? 1u : 0) | (z ? 0x40u : 0) | (s ? 0x80u : 0) | (o ? 0x800u : 0);
}

#define FLAG_OUTPUTS "=@ccc"(c), "=@ccz"(z), "=@ccs"(sign), "=@cco"(o)
#define CASE(kind, n) case n: kind(n); break;
#define CASES4(kind, n) CASE(kind, n) CASE(kind, n + 1) CASE(kind, n + 2) CASE(kind, n + 3)
#define CASES16(kind, n) CASES4(kind, n) CASES4(kind, n + 4) CASES4(kind, n + 8) CASES4(kind, n + 12)
#define CASES64(kind, n) CASES16(kind, n) CASES16(kind, n + 16) CASES16(kind, n + 32) CASES16(kind, n + 48)
#define CASES128(kind, n) CASES64(kind, n) CASES64(kind, n + 64)

#define ISTRI(n) asm("pcmpistri %7, %6, %5" : FLAG_OUTPUTS, "=c"(r.index) : "x"(d), "x"(s), "i"(n))
#define ESTRI(n) asm("pcmpestri %9, %6, %5" : FLAG_OUTPUTS, "=c"(r.index) : "x"(d), "x"(s), "a"(la), "d"(lb), "i"(n))
#define ISTRM(n) asm("pcmpistrm %7, %6, %5" : FLAG_OUTPUTS, "=Yz"(r.mask) : "x"(d), "x"(s), "i"(n))
#define ESTRM(n) asm("pcmpestrm %9, %6, %5" : FLAG_OUTPUTS, "=Yz"(r.mask) : "x"(d), "x"(s), "a"(la), "d"(lb), "i"(n))

#define TEXT(n, kind)                                                                                                  \
    static struct outcome n(const struct vec_context *ctx, __m128i d, __m128i s)                                       \
    {                                                                                                                  \
        struct outcome r = {.index = 0};                                                                               \
        bool c = false, z = false, sign = false, o = false;                                                            \
        int la VEC_UNUSED = length(ctx->rax, ctx->rex_w), lb VEC_UNUSED = length(ctx->rdx, ctx->rex_w);                \
        switch (ctx->imm & 127) {                                                                                      \
            CASES128(kind, 0)                                                                                          \
        }                                                                                                              \
        r.flags = flag_bits(c, z, sign, o);                                                                            \
        return r;                                                                                                      \
    }
TEXT(pcmpistri, ISTRI) TEXT(pcmpestri, ESTRI) TEXT(pcmpistrm, ISTRM) TEXT(pcmpestrm, ESTRM)

#define INDEX_RESULT(n)                                                                                                \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        struct outcome r = n(ctx, vec_load(dst), vec_load(src));                                                       \
        ctx->flags = r.flags;                                                                                          \
        dst->q[0] = r.index;                                                                                           \
        return FPU_OK;                                                                                                 \
    }
#define MASK_RESULT(n)                                                                                                 \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        struct outcome r = n(ctx, vec_load(dst), vec_load(src));                                                       \
        ctx->flags = r.flags;                                                                                          \
        vec_store(&ctx->fpu->xmm[0], r.mask);                                                                          \
        return FPU_OK;                                                                                                 \
    }
INDEX_RESULT(pcmpistri) INDEX_RESULT(pcmpestri) MASK_RESULT(pcmpistrm) MASK_RESULT(pcmpestrm)

#define ROW(opcode, n, form) \
    {VEC_MAP_0F3A, VEC_66, opcode, WHEN_ANY, -1, OP(n, form, 16, .has_imm = true, .feature = VEC_SSE42)}
struct vec_row vec_text_rows[] = {
    ROW(0x60, pcmpestrm, VEC_FLAGS), ROW(0x61, pcmpestri, VEC_FLAGS_GPR),
    ROW(0x62, pcmpistrm, VEC_FLAGS), ROW(0x63, pcmpistri, VEC_FLAGS_GPR),
};
const size_t vec_text_count = sizeof vec_text_rows / sizeof vec_text_rows[0];
