/* See wide.h. Power series for small arguments, to which the others are reduced. */
#include "soft/fpu/wide.h"

#define WORDS(high, low) ((uint128)(high) << 64 | (low))

static const struct wide ln2 = {false, -1, WORDS(0xB17217F7D1CF79AB, 0xC9E3B39803F2F6AF)},
                         two_over_ln2 = {false, 1, WORDS(0xB8AA3B295C17F0BB, 0xBE87FED0691D3E89)},
                         pi = {false, 1, WORDS(0xC90FDAA22168C234, 0xC4C6628B80DC1CD1)},
                         half_pi = {false, 0, WORDS(0xC90FDAA22168C234, 0xC4C6628B80DC1CD1)},
                         one = {false, 0, (uint128)1 << 127}, two = {false, 1, (uint128)1 << 127},
                         root2 = {false, 0, WORDS(0xB504F333F9DE6484, 0x597D89B3754ABE9F)};

/* atan(i / 16) */
static const struct wide arctangents[17] = {
    {false, 0, 0},
    {false, -5, WORDS(0xFFAADDB967EF4E36, 0xCB2792DC0E2E0D51)}, {false, -4, WORDS(0xFEADD4D5617B6E32, 0xC897989F3E888EF8)},
    {false, -3, WORDS(0xBDCBDA5E72D81134, 0x7B0B4F881C9C7488)}, {false, -3, WORDS(0xFADBAFC96406EB15, 0x6DC79EF5F7A217E6)},
    {false, -2, WORDS(0x9B13B9B83F5E5E69, 0xC5ABB498D27AF328)}, {false, -2, WORDS(0xB7B0CA0F26F78473, 0x8AA32122DCFE4483)},
    {false, -2, WORDS(0xD327761E611FE5B6, 0x427C95E9001E7136)}, {false, -2, WORDS(0xED63382B0DDA7B45, 0x6FE445ECBC3A8D03)},
    {false, -1, WORDS(0x832BF4A6D9867E2A, 0x4B6A09CB61A515C1)}, {false, -1, WORDS(0x8F005D5EF7F59F9B, 0x5C835E1665C43748)},
    {false, -1, WORDS(0x9A2F80E671BDDA20, 0x4226F8E2204FF3BD)}, {false, -1, WORDS(0xA4BC7D1934F70924, 0x19A87F2A457DAC9F)},
    {false, -1, WORDS(0xAEAC4C38B4D8C080, 0x14725E2F3E52070A)}, {false, -1, WORDS(0xB8053E2BC2319E73, 0xCB2DA55210A4443D)},
    {false, -1, WORDS(0xC0CE85B8AC526640, 0x89DD62C46E92FA25)}, {false, -1, WORDS(0xC90FDAA22168C234, 0xC4C6628B80DC1CD1)},
};
enum { PRECISION = 128 };

static unsigned leading_zeros(uint128 m)
{
    uint64_t high = (uint64_t)(m >> 64);
    return high ? (unsigned)__builtin_clzll(high) : 64 + (unsigned)__builtin_clzll((uint64_t)m);
}

static struct wide normal(bool minus, int32_t exp, uint128 m)
{
    if (!m)
        return (struct wide){minus, 0, 0};
    unsigned n = leading_zeros(m);
    return (struct wide){minus, exp - (int32_t)n, m << n};
}

struct wide wide_integer(bool minus, uint128 n, int32_t scale) { return normal(minus, scale + 127, n); }

/* The high half of a product of 128 by 128 bits, cut below its lowest bit. */
static uint128 high_product(uint128 a, uint128 b)
{
    uint64_t ah = (uint64_t)(a >> 64), al = (uint64_t)a, bh = (uint64_t)(b >> 64), bl = (uint64_t)b;
    uint128 cross1 = (uint128)ah * bl, cross2 = (uint128)al * bh, low = (uint128)al * bl >> 64;
    uint128 middle = low + (uint64_t)cross1 + (uint64_t)cross2;
    return (uint128)ah * bh + (cross1 >> 64) + (cross2 >> 64) + (middle >> 64);
}

struct wide wide_multiply(struct wide a, struct wide b)
{
    return normal(a.minus != b.minus, a.exp + b.exp + 1, high_product(a.m, b.m));
}

/* The next 64 bits of rest / divisor, for rest < divisor and bit 127 of the divisor set (Knuth, 4.3.1 algorithm D). */
static uint64_t next_digit(uint128 *rest, uint128 divisor)
{
    uint64_t high = (uint64_t)(divisor >> 64), low = (uint64_t)divisor, top = (uint64_t)(*rest >> 64);
    uint64_t digit = top >= high ? UINT64_MAX : (uint64_t)(*rest / high);
    uint128 left = *rest - (uint128)digit * high;
    while (!(left >> 64) && (uint128)digit * low > left << 64) {
        digit--;
        left += high;
    }
    *rest = (left << 64) - (uint128)digit * low;
    return digit;
}

struct wide wide_divide(struct wide a, struct wide b)
{
    if (!a.m)
        return a;
    bool above = a.m >= b.m;
    uint128 rest = above ? a.m - b.m : a.m;
    uint64_t first = next_digit(&rest, b.m), second = next_digit(&rest, b.m);
    uint128 fraction = WORDS(first, second);
    return (struct wide){a.minus != b.minus, a.exp - b.exp - !above, above ? fraction >> 1 | (uint128)1 << 127 : fraction};
}

bool wide_less(struct wide a, struct wide b)
{
    return !a.m || !b.m ? b.m != 0 : a.exp != b.exp ? a.exp < b.exp : a.m < b.m;
}

struct wide wide_add(struct wide a, struct wide b)
{
    if (wide_less(a, b)) {
        struct wide swap = a;
        a = b;
        b = swap;
    }
    if (!b.m)
        return a;
    if (a.exp - b.exp >= PRECISION) /* too small to see, but not for a result that is rounded up or down */
        return a.minus == b.minus ? (struct wide){a.minus, a.exp, a.m | 1} : normal(a.minus, a.exp, a.m - 1);
    uint128 small = b.m >> (a.exp - b.exp);
    if (a.minus != b.minus)
        return normal(a.minus, a.exp, a.m - small);
    uint128 sum = a.m + small;
    if (sum >= small)
        return (struct wide){a.minus, a.exp, sum};
    return (struct wide){a.minus, a.exp + 1, sum >> 1 | (uint128)1 << 127};
}

/* ---- series ---- sums of c[k] x^k for 0 <= x < 1 in fixed point: all are below 1, and 128 bits behind the point. */

enum { TERMS = 36 };
/* 1/(2k+3), 1/(2k+3)!, 1/(2k+2)!, 1/(k+2)! */
static uint128 odd[TERMS], sine[TERMS], cosine[TERMS], exponential[TERMS];

__attribute__((constructor)) static void make_coefficients(void)
{
    uint128 factorial = (uint128)1 << 127; /* 1/2! */
    for (unsigned k = 0; k < TERMS; k++) {
        odd[k] = ~(uint128)0 / (2 * k + 3);
        exponential[k] = factorial;
        factorial /= k + 3;
    }
    for (unsigned k = 0; k < TERMS; k++) {
        cosine[k] = 2 * k < TERMS ? exponential[2 * k] : 0;
        sine[k] = 2 * k + 1 < TERMS ? exponential[2 * k + 1] : 0;
    }
}

/* The series' value for |x|, with alternating signs if that is wanted. */
static struct wide series(const uint128 *c, struct wide x, bool alternating)
{
    int shift = -(x.exp + 1);
    if (!x.m || shift >= PRECISION)
        return wide_integer(false, c[0], -PRECISION);
    uint128 fixed = x.m >> shift, sum = 0;
    unsigned terms = shift ? PRECISION / (unsigned)shift + 1 : TERMS; /* x < 2^-shift */
    for (unsigned k = terms < TERMS ? terms : TERMS; k-- > 0;) {
        uint128 rest = high_product(sum, fixed);
        sum = alternating ? c[k] - rest : c[k] + rest;
    }
    return wide_integer(false, sum, -PRECISION);
}

struct wide wide_exp2_minus_1(struct wide x)
{
    struct wide t = wide_multiply(x, ln2);
    return wide_add(t, wide_multiply(wide_multiply(t, t), series(exponential, t, t.minus)));
}

/* z + z^3/3 + z^5/5..., with alternating signs if that is wanted: artanh, arctan. |z| < 0.18 */
static struct wide odd_series(struct wide z, bool alternating)
{
    struct wide square = wide_multiply(z, z), rest = wide_multiply(wide_multiply(z, square), series(odd, square, alternating));
    return wide_add(z, alternating ? wide_minus(rest) : rest);
}

struct wide wide_log2(struct wide x)
{
    int32_t exp = x.exp;
    x.exp = 0;
    if (wide_less(root2, x)) {
        x.exp = -1;
        exp++;
    }
    struct wide fraction = wide_add(x, wide_minus(one));
    if (fraction.m)
        fraction = wide_multiply(odd_series(wide_divide(fraction, wide_add(x, one)), false), two_over_ln2);
    return wide_add(wide_integer(exp < 0, (uint128)(exp < 0 ? -exp : exp), 0), fraction);
}

struct wide wide_log2_1p(struct wide x)
{
    if (x.exp >= -2) /* |x| >= 1/4 */
        return wide_log2(wide_add(x, one));
    return wide_multiply(odd_series(wide_divide(x, wide_add(x, two)), false), two_over_ln2);
}

struct wide wide_sin(struct wide x)
{
    struct wide square = wide_multiply(x, x);
    return wide_add(x, wide_minus(wide_multiply(wide_multiply(x, square), series(sine, square, true))));
}
struct wide wide_cos(struct wide x)
{
    struct wide square = wide_multiply(x, x);
    return wide_add(one, wide_minus(wide_multiply(square, series(cosine, square, true))));
}
struct wide wide_tan(struct wide x)
{
    if (x.m && x.exp < -60) /* x + x^3 / 3: a quotient would lose the second term */
        return odd_series(x, false);
    return wide_divide(wide_sin(x), wide_cos(x));
}

/* 0 < t <= 1 */
static struct wide arctangent(struct wide t)
{
    unsigned n = t.exp < -5 ? 0 : (unsigned)((t.m >> (127 - 5 - t.exp)) + 1) >> 1; /* 16 t, to nearest */
    if (!n)
        return odd_series(t, true);
    struct wide c = wide_integer(false, n, -4);
    struct wide z = wide_divide(wide_add(t, wide_minus(c)), wide_add(one, wide_multiply(t, c)));
    return wide_add(arctangents[n], odd_series(z, true));
}

struct wide wide_quarters_of_pi(unsigned n)
{
    struct wide quarter = pi;
    quarter.exp -= 2;
    return wide_multiply(quarter, wide_integer(false, n, 0));
}

struct wide wide_atan2(struct wide y, struct wide x)
{
    struct wide a = {false, y.exp, y.m}, b = {false, x.exp, x.m};
    struct wide angle = wide_less(b, a) ? wide_add(half_pi, wide_minus(arctangent(wide_divide(b, a)))) : arctangent(wide_divide(a, b));
    if (x.minus)
        angle = wide_add(pi, wide_minus(angle));
    angle.minus = y.minus;
    return angle;
}
