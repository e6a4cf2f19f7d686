/* Floating point of 128 bits in integer arithmetic, and elementary functions to about 120 of them: the same on every host.
 *
 * For the x87 instructions whose last bits the manuals leave open (x87_math.c). Nothing here is infinite, NaN or rounded
 * as IEEE 754 would: results are cut, and a function's error is below 2^-115 of its result.
 */
#ifndef SOFT_WIDE_H
#define SOFT_WIDE_H

#include <stdbool.h>
#include <stdint.h>

typedef unsigned __int128 uint128;

/* (-1)^minus * m * 2^(exp - 127); bit 127 of m is set, or the value is zero and m is 0. */
struct wide {
    bool minus;
    int32_t exp;
    uint128 m;
};

/* n * 2^scale */
struct wide wide_integer(bool minus, uint128 n, int32_t scale);
struct wide wide_multiply(struct wide a, struct wide b);
struct wide wide_divide(struct wide a, struct wide b); /* b is not 0 */
struct wide wide_add(struct wide a, struct wide b);
static inline struct wide wide_minus(struct wide a) { return (struct wide){!a.minus, a.exp, a.m}; }
bool wide_less(struct wide a, struct wide b); /* |a| < |b| */

struct wide wide_exp2_minus_1(struct wide x); /* |x| <= 1 */
struct wide wide_log2(struct wide x);         /* x > 0 */
struct wide wide_log2_1p(struct wide x);      /* log2(1 + x); x > -1 */
struct wide wide_sin(struct wide x);          /* |x| <= pi/4 */
struct wide wide_cos(struct wide x);
struct wide wide_tan(struct wide x);
struct wide wide_atan2(struct wide y, struct wide x); /* neither is 0 */
struct wide wide_quarters_of_pi(unsigned n);          /* n * pi / 4 */

#endif
