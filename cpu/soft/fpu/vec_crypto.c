/* AES-NI, PCLMULQDQ and SHA by the host's own instructions: for guests on hosts that have them. Intel SDM 2A to 2C. */
#pragma GCC target("sse4.2,aes,pclmul,sha")
#include <immintrin.h>

#include "soft/fpu/vec.h"

#define OF_TWO(n, result)                                                                                              \
    static int vec_##n(VEC_ARGS)                                                                                       \
    {                                                                                                                  \
        __m128i d VEC_UNUSED = vec_load(dst), s = vec_load(src);                                                       \
        vec_store(dst, result);                                                                                        \
        return FPU_OK;                                                                                                 \
    }
OF_TWO(aesimc, _mm_aesimc_si128(s))
OF_TWO(aesenc, _mm_aesenc_si128(d, s))
OF_TWO(aesenclast, _mm_aesenclast_si128(d, s))
OF_TWO(aesdec, _mm_aesdec_si128(d, s))
OF_TWO(aesdeclast, _mm_aesdeclast_si128(d, s))
OF_TWO(sha1nexte, _mm_sha1nexte_epu32(d, s))
OF_TWO(sha1msg1, _mm_sha1msg1_epu32(d, s))
OF_TWO(sha1msg2, _mm_sha1msg2_epu32(d, s))
OF_TWO(sha256rnds2, _mm_sha256rnds2_epu32(d, s, vec_load(&ctx->fpu->xmm[0])))
OF_TWO(sha256msg1, _mm_sha256msg1_epu32(d, s))
OF_TWO(sha256msg2, _mm_sha256msg2_epu32(d, s))

/* The constant is xored into the two words that are rotated. */
OF_TWO(aeskeygenassist, _mm_xor_si128(_mm_aeskeygenassist_si128(s, 0), _mm_set_epi32(ctx->imm, 0, ctx->imm, 0)))

static int vec_pclmulqdq(VEC_ARGS)
{
    __m128i d = vec_load(dst), s = vec_load(src);
    switch (ctx->imm & 0x11) {
    case 0x00: d = _mm_clmulepi64_si128(d, s, 0x00); break;
    case 0x01: d = _mm_clmulepi64_si128(d, s, 0x01); break;
    case 0x10: d = _mm_clmulepi64_si128(d, s, 0x10); break;
    default: d = _mm_clmulepi64_si128(d, s, 0x11); break;
    }
    vec_store(dst, d);
    return FPU_OK;
}
static int vec_sha1rnds4(VEC_ARGS)
{
    __m128i d = vec_load(dst), s = vec_load(src);
    switch (ctx->imm & 3) {
    case 0: d = _mm_sha1rnds4_epu32(d, s, 0); break;
    case 1: d = _mm_sha1rnds4_epu32(d, s, 1); break;
    case 2: d = _mm_sha1rnds4_epu32(d, s, 2); break;
    default: d = _mm_sha1rnds4_epu32(d, s, 3); break;
    }
    vec_store(dst, d);
    return FPU_OK;
}

#define ROW(map, prefix, opcode, n, ...)                                                                               \
    {VEC_MAP_##map, prefix, opcode, WHEN_ANY, -1, OP(n, VEC_XMM_XMMM, 16, __VA_ARGS__)}
#define ALIGNED(...) ROW(__VA_ARGS__, .aligned = true)
/* AMD's processors do not check the alignment of SHA's operands. */
struct vec_row vec_crypto_rows[] = {
    ALIGNED(0F38, VEC_66, 0xDB, aesimc, .feature = VEC_AES),
    ALIGNED(0F38, VEC_66, 0xDC, aesenc, .feature = VEC_AES),
    ALIGNED(0F38, VEC_66, 0xDD, aesenclast, .feature = VEC_AES),
    ALIGNED(0F38, VEC_66, 0xDE, aesdec, .feature = VEC_AES),
    ALIGNED(0F38, VEC_66, 0xDF, aesdeclast, .feature = VEC_AES),
    ALIGNED(0F3A, VEC_66, 0xDF, aeskeygenassist, .has_imm = true, .feature = VEC_AES),
    ALIGNED(0F3A, VEC_66, 0x44, pclmulqdq, .has_imm = true, .feature = VEC_PCLMUL),
    ROW(0F38, VEC_NP, 0xC8, sha1nexte, .feature = VEC_SHA),
    ROW(0F38, VEC_NP, 0xC9, sha1msg1, .feature = VEC_SHA),
    ROW(0F38, VEC_NP, 0xCA, sha1msg2, .feature = VEC_SHA),
    ROW(0F38, VEC_NP, 0xCB, sha256rnds2, .feature = VEC_SHA),
    ROW(0F38, VEC_NP, 0xCC, sha256msg1, .feature = VEC_SHA),
    ROW(0F38, VEC_NP, 0xCD, sha256msg2, .feature = VEC_SHA),
    ROW(0F3A, VEC_NP, 0xCC, sha1rnds4, .has_imm = true, .feature = VEC_SHA),
};
const size_t vec_crypto_count = sizeof vec_crypto_rows / sizeof vec_crypto_rows[0];
