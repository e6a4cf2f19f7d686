/* Floating point: x87 in every rounding and precision, SSE with its control bits, the library, text and back. */
#define _GNU_SOURCE
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <string.h>

#include "work.h"

static long double extended(struct random *r) /* any class of number, mostly of middle size */
{
    union {
        long double value;
        struct {
            uint64_t fraction;
            uint16_t exponent;
        };
    } u = { 0 };
    uint64_t n = next(r);
    u.fraction = next(r) | 1ull << 63;
    u.exponent = (uint16_t)(16383 - 40 + n % 80 + (n >> 32 & 0x8000));
    switch (n >> 56 & 31) {
    case 0: u.fraction = 0, u.exponent &= 0x8000; break;
    case 1: u.fraction = 1ull << 63, u.exponent |= 0x7FFF; break;
    case 2: u.fraction |= 3ull << 62, u.exponent |= 0x7FFF; break;
    case 3: u.fraction >>= 1 + n % 63, u.exponent &= 0x8000; break;
    default: break;
    }
    return u.value;
}

#define BINARY(code) "fldt %2; fldt %1; " code "; fnstsw %0; fstpt %1"
/* Until it is complete: how far one step comes is the processor's. */
#define REMAINDER(code) BINARY("1: " code "; fnstsw %%ax; testb $4, %%ah; jnz 1b; fstp %%st(1)")
#define UNARY(code) "fldt %1; " code "; fnstsw %0; fstpt %1"
/* With the condition codes that both vendors' manuals define at the end. */
enum { C1 = 0x200, COMPARISON = 0x4500, ALL_CODES = 0x4700 };
#define EACH_X87(X)                                                                                                   \
    X(BINARY("faddp"), C1) X(BINARY("fsubp"), C1) X(BINARY("fsubrp"), C1) X(BINARY("fmulp"), C1)                      \
    X(BINARY("fdivp"), C1) X(BINARY("fdivrp"), C1)                                                                    \
    X(REMAINDER("fprem"), 0) X(REMAINDER("fprem1"), 0) X(BINARY("fscale; fstp %%st(1)"), 0)                           \
    X("fldt %2; fldt %1; fcom; fnstsw %0; fstp %%st(1); fstpt %1", COMPARISON)                                        \
    X(BINARY("fucomi; fcmovb %%st(1), %%st; fstp %%st(1)"), 0)                                                        \
    X(UNARY("fsqrt"), C1) X(UNARY("frndint"), C1) X(UNARY("fabs"), C1) X(UNARY("fchs"), C1)                           \
    X(UNARY("fxam"), ALL_CODES) X(UNARY("fxtract; faddp"), C1) X("fldt %1; fnstsw %0; fbstp %1", C1)                  \
    X("fldt %1; fistpll %1; fnstsw %0; fildll %1; fstpt %1", C1)                                                      \
    X("fldt %1; fistpl %1; fnstsw %0; fildl %1; fstpt %1", C1)                                                        \
    X("fldt %1; fisttps %1; fnstsw %0; filds %1; fstpt %1", C1)                                                       \
    X("fldt %1; fstpl %1; fnstsw %0; fldl %1; fstpt %1", C1) X("fldt %1; fstps %1; fnstsw %0; flds %1; fstpt %1", C1)

static uint64_t of_vendor; /* with every condition code */

static uint64_t x87(uint64_t seed)
{
    struct random r = { seed };
    uint64_t digest = seed;
    for (unsigned i = 0; i < 40; i++) {
        uint16_t control = (uint16_t)(0x7F | (i % 4) << 10 | (i / 4 % 4 == 1 ? 3 : i / 4 % 4) << 8), status;
#define ONE(code, codes)                                                                                              \
        {                                                                                                             \
            long double a = extended(&r), b = extended(&r);                                                           \
            __asm__ volatile("fninit; fldcw %3; " code "; fninit"                                                     \
                             : "=m"(status), "+m"(a) : "m"(b), "m"(control) : "memory", "ax", "cc");                  \
            digest = mix(mix_bytes(digest, &a, 10), (status & ~(unsigned)ALL_CODES) | (status & (codes)));              \
            of_vendor = mix(of_vendor, status);                                                                       \
        }
        EACH_X87(ONE)
#undef ONE
    }
    return digest;
}

/* The last bits of these are each processor's own: how many are as near to the library's results as they have to be. */
static int is_near(long double a, long double b) { return fabsl(a - b) <= 8 * LDBL_EPSILON * fabsl(b); }

#define OF_ONE(code, from) (__extension__({ long double v_; __asm__(code : "=t"(v_) : "0"(from)); v_; }))
#define OF_TWO(code, y, x) (__extension__({ long double v_; __asm__(code : "=t"(v_) : "0"(x), "u"(y) : "st(1)"); v_; }))
static uint64_t transcendental(uint64_t seed)
{
    struct random r = { seed };
    uint64_t near = 0;
    for (unsigned i = 0; i < 400; i++) {
        long double x = (long double)(int64_t)next(&r) * 0x1p-63L, y = (long double)(next(&r) >> 1 | 1) * 0x1p-60L;
        near += (uint64_t)is_near(OF_ONE("fsin", x), sinl(x));
        near += (uint64_t)is_near(OF_ONE("fcos", x), cosl(x));
        near += (uint64_t)is_near(OF_ONE("fptan; fstp %%st(0)", x), tanl(x));
        near += (uint64_t)is_near(OF_ONE("f2xm1", x), expm1l(x * logl(2)));
        near += (uint64_t)is_near(OF_TWO("fpatan", y, x), atan2l(y, x));
        near += (uint64_t)is_near(OF_TWO("fyl2x", x, y), x * (logl(y) / logl(2)));
        near += (uint64_t)is_near(OF_TWO("fyl2xp1", y, x * 0.25L), y * (log1pl(x * 0.25L) / logl(2)));
    }
    return near;
}

#define EACH_SSE(X)                                                                                                   \
    X("addpd") X("subpd") X("mulpd") X("divpd") X("sqrtpd") X("minpd") X("maxpd") X("cmplepd") X("addsubpd")          \
    X("haddpd")                                                                                                       \
    X("addps") X("subps") X("mulps") X("divps") X("sqrtps") X("minps") X("maxps") X("cmpneqps") X("hsubps")           \
    X("cvtpd2ps") X("cvtps2pd") X("cvtpd2dq") X("cvttpd2dq") X("cvtps2dq") X("cvttps2dq") X("cvtdq2ps")               \
    X("cvtdq2pd")                                                                                                     \
    X("roundpd $4,") X("roundps $1,") X("dppd $0x31,") X("dpps $0xF3,")                                               \
    X("ucomisd") X("comiss") X("cvtsd2ss") X("cvtss2sd")

static uint64_t sse(uint64_t seed)
{
    struct random r = { seed };
    uint64_t digest = seed;
    for (unsigned i = 0; i < 64; i++) {
        uint32_t mxcsr = 0x1F80 | (i % 4) << 13 | (i & 4 ? 0x40 : 0) | (i & 8 ? 0x8000 : 0), after;
#define ONE(code)                                                                                                     \
        {                                                                                                             \
            double a[2] __attribute__((aligned(16))), b[2] __attribute__((aligned(16)));                              \
            for (unsigned k = 0; k < 2; k++) {                                                                        \
                a[k] = (double)extended(&r);                                                                          \
                b[k] = (double)extended(&r);                                                                          \
                if (i & 16) /* bits of any kind */                                                                    \
                    memcpy(&a[k], &(uint64_t){ next(&r) }, 8);                                                        \
            }                                                                                                         \
            __asm__ volatile("ldmxcsr %3; movapd %1, %%xmm3; " code " %2, %%xmm3; movapd %%xmm3, %1; stmxcsr %0"      \
                             : "=m"(after), "+m"(a) : "m"(b), "m"(mxcsr) : "xmm3", "memory", "cc");                   \
            digest = mix(mix_bytes(digest, a, sizeof a), after);                                                      \
        }
        EACH_SSE(ONE)
#undef ONE
    }
    uint32_t usual = 0x1F80;
    __asm__ volatile("ldmxcsr %0" : : "m"(usual));
    return digest;
}

/* The C library's functions: the caller sets GLIBC_TUNABLES so that both sides take those without FMA. */
static uint64_t library(uint64_t seed)
{
    struct random r = { seed };
    uint64_t digest = seed;
    for (unsigned i = 0; i < 400; i++) {
        double x = (double)(int64_t)next(&r) * 0x1p-58, y = (double)(next(&r) >> 1) * 0x1p-60;
        double values[] = { sin(x), cos(x), tan(x), exp(x), log(y), pow(y, x), atan2(x, y), sinh(x), cbrt(x), erf(x),
                            tgamma(y), hypot(x, y), fmod(x, y), asin(x / 33), log1p(y), floor(x), nearbyint(x) };
        long double wide[] = { sinl(x), cbrtl(y), fmodl(x, y), sqrtl(y) }; /* none by a transcendental instruction */
        digest = mix_bytes(digest, values, sizeof values);
        for (unsigned k = 0; k < LENGTH(wide); k++)
            digest = mix_bytes(digest, &wide[k], 10);
    }
    return digest;
}

static uint64_t text(uint64_t seed)
{
    struct random r = { seed };
    uint64_t digest = seed;
    for (unsigned i = 0; i < 200; i++) {
        char line[400];
        long double wide = extended(&r);
        double narrow = (double)wide;
        int n = snprintf(line, sizeof line, "%.17g %La %.25Lg %.3e", narrow, wide, wide, (double)(float)narrow);
        digest = mix_bytes(digest, line, (size_t)n);
        double again = strtod(line, NULL);
        digest = mix_bytes(digest, &again, 8);
    }
    return digest;
}

void work_floating(uint64_t seed)
{
    of_vendor = seed;
    report("floating", "x87", x87(seed));
    report("floating", "transcendental", transcendental(seed));
    report_of_vendor("floating", "x87", of_vendor);
    report("floating", "sse", sse(seed));
    report("floating", "library", library(seed));
    report("floating", "text", text(seed));
}
