/* The x87 instructions whose results the manuals leave open in part, with results of our own, so that they are the same on
 * every host: FSIN, FCOS, FSINCOS, FPTAN, FPATAN, F2XM1, FYL2X, FYL2XP1; FPREM and FPREM1 that come only part of the way; FBLD
 * of digits that are none.
 *
 * Transcendental results are the 64-bit ones next to the exact values, rounded as the control word says (APM 1, 6.4.5.1
 * and SDM 1, 8.3.10 ask for an error below one unit in the last place). Angles are reduced by a pi of 66 bits, as
 * processors do (SDM 1, 8.3.8). Operands that are zero, infinite, NaN or beyond the range have results that the manuals
 * define: those go the ordinary way (x87.c), but for FPATAN's multiples of pi / 4.
 */
#include "soft/fpu/wide.h"
#include "soft/fpu/x87.h"

enum { BIAS = 16383, EXPONENT = 0x7FFF, WRAP = 24576 /* of results of unmasked overflow and underflow */ };
enum { NEAREST, DOWN, UP, CHOP };

static unsigned slot(const struct fpu *f, unsigned i) { return ((f->sw >> 11) + i) & 7; }
static bool valid(const struct fpu *f, unsigned i) { return f->tag >> slot(f, i) & 1; }
static struct x87_reg *st(struct fpu *f, unsigned i) { return &f->st[slot(f, i)]; }

/* Finite, not zero, of a supported format. */
static bool is_ordinary(const struct x87_reg *r)
{
    unsigned exponent = r->exponent & EXPONENT;
    return r->mantissa && exponent != EXPONENT && (exponent == 0 || r->mantissa >> 63);
}
static bool is_denormal(const struct x87_reg *r) { return (r->exponent & EXPONENT) == 0; }

static struct wide value_of(const struct x87_reg *r)
{
    int exponent = r->exponent & EXPONENT;
    return wide_integer(r->exponent >> 15, r->mantissa, (exponent ? exponent : 1) - BIAS - 63);
}

/* The upper 64 bits, rounded: 65 bits if that carries. */
static uint128 rounded(uint128 m, bool minus, unsigned mode)
{
    uint64_t rest = (uint64_t)m, kept = (uint64_t)(m >> 64);
    bool more = mode == NEAREST ? rest > 1ull << 63 || (rest == 1ull << 63 && (kept & 1)) : rest && mode == (minus ? DOWN : UP);
    return (uint128)kept + more;
}

/* A result, not zero, as a register holds it; its flags and C1 (its magnitude was rounded up) go to the status word. */
static struct x87_reg result_of(struct fpu *f, struct wide v)
{
    unsigned mode = f->cw >> 10 & 3, flags = X87_PE;
    int exponent = v.exp + BIAS;
    uint128 m = rounded(v.m, v.minus, mode);
    bool carried = m >> 64;
    if (exponent + carried <= 0) {
        flags |= X87_UE;
        if (f->cw & X87_UE) {
            int shift = 1 - exponent;
            uint128 lost = shift < 128 ? v.m & (((uint128)1 << shift) - 1) : v.m;
            v.m = (shift < 128 ? v.m >> shift : 0) | (lost != 0);
            m = rounded(v.m, v.minus, mode);
            exponent = (int)(m >> 63); /* the greatest denormal may have become normal */
            carried = false;
        } else {
            exponent += WRAP;
        }
    } else if (exponent + carried >= EXPONENT) {
        flags |= X87_OE;
        if (f->cw & X87_OE) {
            bool infinite = mode == NEAREST || mode == (v.minus ? DOWN : UP);
            f->sw = (uint16_t)((f->sw & ~X87_C1) | (infinite ? X87_C1 : 0) | flags);
            return (struct x87_reg){infinite ? 1ull << 63 : UINT64_MAX, (uint16_t)((EXPONENT - !infinite) | v.minus << 15)};
        }
        exponent -= WRAP;
    }
    bool up = (uint64_t)m != (uint64_t)(v.m >> 64);
    f->sw = (uint16_t)((f->sw & ~X87_C1) | (up ? X87_C1 : 0) | flags);
    exponent += carried;
    return (struct x87_reg){carried ? 1ull << 63 : (uint64_t)m, (uint16_t)(exponent | v.minus << 15)};
}

static void pop(struct fpu *f)
{
    f->tag &= (uint8_t)~(1u << slot(f, 0));
    f->sw = (uint16_t)((f->sw & ~0x3800) | slot(f, 1) << 11);
}
static struct x87_reg *push(struct fpu *f)
{
    f->sw = (uint16_t)((f->sw & ~0x3800) | slot(f, 7) << 11);
    f->tag |= (uint8_t)(1u << slot(f, 0));
    return st(f, 0);
}

/* ---- angles ---- */

/* pi / 2 = HALF_PI 2^-65, of the 66-bit pi. */
#define HALF_PI ((uint128)3 << 64 | 0x243F6A8885A308D3)

/* x less the nearest multiple of pi / 2; how many of those it was, modulo 4. |x| < 2^63 */
static struct wide reduce(struct wide x, unsigned *quadrant)
{
    *quadrant = 0;
    if (x.exp < -1) /* below pi / 4 */
        return x;
    uint128 rest = x.m >> 64; /* x = rest 2^(exp - 63) = rest 2^(exp + 2) 2^-65 */
    unsigned quotient = 0;
    for (int i = 0; i < x.exp + 2; i++) {
        rest <<= 1;
        quotient <<= 1;
        if (rest >= HALF_PI) {
            rest -= HALF_PI;
            quotient |= 1;
        }
    }
    bool minus = x.minus;
    if (rest > HALF_PI >> 1) {
        rest = HALF_PI - rest;
        minus = !minus;
        quotient++;
    }
    *quadrant = (x.minus ? 0u - quotient : quotient) & 3;
    return wide_integer(minus, rest, -65);
}

static struct wide sine(struct wide rest, unsigned quadrant)
{
    struct wide v = quadrant & 1 ? wide_cos(rest) : wide_sin(rest);
    v.minus ^= quadrant >> 1 & 1;
    return v;
}

static bool angle(struct fpu *f, uint8_t modrm)
{
    struct x87_reg *r = st(f, 0);
    bool pushes = modrm == 0xF2 || modrm == 0xFB;
    unsigned quadrant;
    if (!valid(f, 0) || !is_ordinary(r) || (r->exponent & EXPONENT) >= BIAS + 63 || (pushes && valid(f, 7)))
        return false;
    f->sw = (uint16_t)((f->sw & ~(X87_C1 | X87_C2)) | (is_denormal(r) ? X87_DE : 0));
    if (f->sw & ~f->cw & X87_DE)
        return true;
    struct wide rest = reduce(value_of(r), &quadrant), second;
    switch (modrm) {
    case 0xFE: *r = result_of(f, sine(rest, quadrant)); break;
    case 0xFF: *r = result_of(f, sine(rest, quadrant + 1)); break;
    case 0xFB:
        second = sine(rest, quadrant + 1);
        *r = result_of(f, sine(rest, quadrant));
        r = push(f);
        *r = result_of(f, second);
        break;
    default:
        second = wide_tan(rest);
        *r = result_of(f, quadrant & 1 ? wide_minus(wide_divide(wide_integer(false, 1, 0), second)) : second);
        *push(f) = (struct x87_reg){1ull << 63, BIAS};
    }
    return true;
}

/* ---- powers and logarithms ---- */

static bool power(struct fpu *f)
{
    struct x87_reg *r = st(f, 0);
    if (!valid(f, 0) || !is_ordinary(r))
        return false;
    f->sw = (uint16_t)((f->sw & ~X87_C1) | (is_denormal(r) ? X87_DE : 0));
    if (f->sw & ~f->cw & X87_DE)
        return true;
    struct wide x = value_of(r);
    /* Beyond 1 the result is undefined: AMD's processors leave the operand. */
    bool within = x.exp < 0 || (x.exp == 0 && x.m << 1 == 0);
    *r = result_of(f, within ? wide_exp2_minus_1(x) : x);
    return true;
}

static bool is_zero(const struct x87_reg *r) { return !r->mantissa && !(r->exponent & EXPONENT); }
static bool is_infinite(const struct x87_reg *r) { return (r->exponent & EXPONENT) == EXPONENT && r->mantissa == 1ull << 63; }

/* FPATAN's results for zeros and infinities that are multiples of pi / 4 (SDM 2A FPATAN, table 3-30). */
static bool special_angle(struct fpu *f, const struct x87_reg *x, struct x87_reg *y)
{
    bool minus = x->exponent >> 15, finite_x = is_ordinary(x) || is_zero(x), finite_y = is_ordinary(y) || is_zero(y);
    unsigned quarters;
    if ((!finite_x && !is_infinite(x)) || (!finite_y && !is_infinite(y)) || (is_ordinary(x) && is_ordinary(y)))
        return false;
    if (is_infinite(y))
        quarters = !is_infinite(x) ? 2 : minus ? 3 : 1;
    else if (is_zero(x) && !is_zero(y))
        quarters = 2;
    else if (minus)
        quarters = 4;
    else
        return false; /* zero */
    bool denormal = (is_ordinary(x) && is_denormal(x)) || (is_ordinary(y) && is_denormal(y));
    f->sw = (uint16_t)((f->sw & ~X87_C1) | (denormal ? X87_DE : 0));
    if (f->sw & ~f->cw & X87_DE)
        return true;
    struct wide v = wide_quarters_of_pi(quarters);
    v.minus = y->exponent >> 15;
    *y = result_of(f, v);
    pop(f);
    return true;
}

/* ST(1) and ST(0) to ST(1), and a pop: FYL2X, FYL2XP1, FPATAN. */
static bool of_two(struct fpu *f, uint8_t modrm)
{
    struct x87_reg *a = st(f, 0), *b = st(f, 1);
    if (!valid(f, 0) || !valid(f, 1))
        return false;
    if (!is_ordinary(a) || !is_ordinary(b))
        return modrm == 0xF3 && special_angle(f, a, b);
    struct wide x = value_of(a), y = value_of(b), v;
    bool is_one = x.exp == 0 && x.m << 1 == 0;
    if (modrm == 0xF1 && (x.minus || is_one))
        return false;
    f->sw = (uint16_t)((f->sw & ~X87_C1) | (is_denormal(a) || is_denormal(b) ? X87_DE : 0));
    if (f->sw & ~f->cw & X87_DE)
        return true;
    if (modrm == 0xF3)
        v = wide_atan2(y, x);
    else if (modrm == 0xF1)
        v = wide_multiply(y, wide_log2(x));
    else if (x.minus && x.exp >= 0)
        v = x; /* no logarithm, and undefined: AMD's processors leave the operand */
    else
        v = wide_multiply(y, wide_log2_1p(x));
    *b = result_of(f, v);
    pop(f);
    return true;
}

/* ---- remainders ---- */

/* "N <- an implementation-dependent number between 32 and 63": by so much the difference of the exponents is reduced, if it
 * is 64 or more. On AMD's processors to the next lower multiple of 32, less 32. */
static bool partial_remainder(struct fpu *f)
{
    struct x87_reg *a = st(f, 0), *b = st(f, 1);
    if (!valid(f, 0) || !valid(f, 1) || !is_ordinary(a) || !is_ordinary(b))
        return false;
    struct wide x = value_of(a), y = value_of(b);
    int difference = x.exp - y.exp;
    if (difference < 64)
        return false;
    f->sw = (uint16_t)((f->sw & ~(X87_C1 | X87_C2)) | (is_denormal(b) ? X87_DE : 0));
    if (f->sw & ~f->cw & X87_DE)
        return true;
    f->sw = (uint16_t)((f->sw & ~X87_CC) | X87_C2);
    int n = 32 + difference % 32;
    uint128 divisor = y.m >> 64, rest = (x.m >> 64) % divisor;
    for (int i = 0; i < n; i++) {
        rest <<= 1;
        if (rest >= divisor)
            rest -= divisor;
    }
    if (!rest) {
        *a = (struct x87_reg){0, (uint16_t)(x.minus << 15)};
        return true;
    }
    struct wide v = wide_integer(x.minus, rest, y.exp - 63 + difference - n);
    int exponent = v.exp + BIAS, shift = exponent > 0 ? 0 : 1 - exponent; /* exact, also as a denormal */
    *a = (struct x87_reg){(uint64_t)(v.m >> 64) >> shift, (uint16_t)((exponent > 0 ? exponent : 0) | x.minus << 15)};
    return true;
}

/* ---- decimal ---- */

/* 18 digits of four bits each, whatever they are, and a sign. */
static bool load_decimal(struct x87_context *ctx)
{
    struct fpu *f = ctx->fpu;
    uint64_t value = 0;
    if (fpu_pending(f) || valid(f, 7))
        return false;
    for (unsigned i = 9; i-- > 0;)
        value = value * 100 + (ctx->mem[i] >> 4) * 10u + (ctx->mem[i] & 15);
    uint16_t sign = (uint16_t)((ctx->mem[9] & 0x80) << 8);
    unsigned n = value ? (unsigned)__builtin_clzll(value) : 0;
    *push(f) = value ? (struct x87_reg){value << n, (uint16_t)((BIAS + 63 - n) | sign)} : (struct x87_reg){0, sign};
    f->sw &= (uint16_t)~X87_C1;
    return true;
}

bool fpu_x87_math_load(struct x87_context *ctx, unsigned opcode)
{
    return opcode == 7 && (ctx->modrm >> 3 & 7) == 4 && load_decimal(ctx);
}

bool fpu_x87_math_register(struct x87_context *ctx, unsigned opcode)
{
    struct fpu *f = ctx->fpu;
    bool done;
    if (opcode != 1 || ctx->modrm < 0xF0 || fpu_pending(f))
        return false;
    switch (ctx->modrm) {
    case 0xF0: done = power(f); break;
    case 0xF1: case 0xF3: case 0xF9: done = of_two(f, ctx->modrm); break;
    case 0xF2: case 0xFB: case 0xFE: case 0xFF: done = angle(f, ctx->modrm); break;
    case 0xF5: case 0xF8: done = partial_remainder(f); break;
    default: return false;
    }
    if (done)
        fpu_summarise(f);
    return done;
}
