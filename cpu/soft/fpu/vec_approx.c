/* RCPPS, RCPSS, RSQRTPS, RSQRTSS: approximations of our own, so that they are the same on every host. SDM 2B: the relative
 * error is at most 1.5 * 2^-12; ours is at most 2^-13. They raise nothing and do not depend on MXCSR.
 *
 * A table gives the result's mantissa for the operand's first 12 bits, computed for the middle of what they stand for.
 * Powers of two (of four) have exact results.
 */
#pragma GCC target("sse4.2")
#include "soft/fpu/vec.h"

enum { BITS = 12, ENTRIES = 1 << BITS, SHIFT = 23 - BITS };
#define SIGN 0x80000000u
#define INFINITE 0x7F800000u
#define INDEFINITE 0xFFC00000u

/* Mantissas of 1/x for 1 <= x < 2 (of a result in (1/2, 1]) and of 1/sqrt(x) for 1 <= x < 2, then for 2 <= x < 4. */
static uint32_t reciprocals[ENTRIES], roots[2][ENTRIES];

static uint64_t square_root(uint64_t n)
{
    uint64_t root = 0;
    for (uint64_t bit = 1ull << 31; bit; bit >>= 1)
        if ((root | bit) * (root | bit) <= n)
            root |= bit;
    return root;
}

__attribute__((constructor)) static void make_tables(void)
{
    for (uint32_t i = 0; i < ENTRIES; i++) {
        /* x = (2^13 + 2 i + 1) / 2^13; results as 1.23 bits between 2^23 and 2^24. */
        uint64_t x = (2u << BITS) + 2 * i + 1;
        reciprocals[i] = (uint32_t)((1ull << (24 + BITS + 1)) / x) & 0x7FFFFF;
        for (unsigned half = 0; half < 2; half++) {
            /* 2^24 / sqrt(x 2^half) = sqrt(2^48 2^13 / (x 2^13 2^half)) */
            uint64_t square = ((1ull << 61) / x) >> half;
            roots[half][i] = (uint32_t)square_root(square) & 0x7FFFFF;
        }
    }
}

static uint32_t reciprocal(uint32_t x)
{
    uint32_t sign = x & SIGN, exponent = x >> 23 & 0xFF, index = x >> SHIFT & (ENTRIES - 1);
    if (exponent == 0xFF)
        return x & 0x7FFFFF ? x | 0x400000 : sign;
    if (exponent == 0) /* denormals are zeros */
        return sign | INFINITE;
    /* x = 1.m 2^e: 1/x is in (1/2, 1] 2^-e. Results that would be denormal are zero. */
    bool exact = !(x & 0x7FFFFF);
    int result = 253 - (int)exponent + exact;
    return result <= 0 ? sign : sign | (uint32_t)result << 23 | (exact ? 0 : reciprocals[index]);
}

static uint32_t reciprocal_root(uint32_t x)
{
    uint32_t sign = x & SIGN, exponent = x >> 23 & 0xFF, index = x >> SHIFT & (ENTRIES - 1);
    if (exponent == 0xFF && x & 0x7FFFFF)
        return x | 0x400000;
    if (exponent == 0)
        return sign | INFINITE;
    if (sign)
        return INDEFINITE;
    if (exponent == 0xFF)
        return 0;
    /* x = 1.m 2^e or, for an odd e, 1.m 2 2^(e-1). */
    int e = (int)exponent - 127, half = e & 1;
    bool exact = !half && !(x & 0x7FFFFF);
    int result = 126 - (e - half) / 2 + exact;
    return (uint32_t)result << 23 | (exact ? 0 : roots[half][index]);
}

#define APPROXIMATION(n, compute, elements)                                                                            \
    int vec_##n(VEC_ARGS)                                                                                              \
    {                                                                                                                  \
        for (unsigned i = 0; i < (elements); i++)                                                                      \
            dst->d[i] = compute(src->d[i]);                                                                            \
        return FPU_OK;                                                                                                 \
    }
APPROXIMATION(rcpps, reciprocal, 4)
APPROXIMATION(rcpss, reciprocal, 1)
APPROXIMATION(rsqrtps, reciprocal_root, 4)
APPROXIMATION(rsqrtss, reciprocal_root, 1)
