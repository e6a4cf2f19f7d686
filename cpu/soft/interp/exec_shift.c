/* Micro-op handlers: shifts, rotates, double shifts, multiplication and division on registers.
 *
 * Undefined flags follow AMD processors (family 19h): AF is set by shifts, OF is computed as for a count of 1 from the
 * last step, MUL and IMUL leave SF, ZF, AF and PF unchanged, DIV and IDIV set AF, clear SF, ZF and PF and leave CF and OF.
 */
#include "soft/mmu/access.h"
#include "soft/interp/exec.h"

/* Result flags of a shift: SF, ZF and PF from r, CF and OF given, AF set. */
#define SHIFT_FLAGS(bits, r, cf, of)                                                                                   \
    do {                                                                                                               \
        uint64_t cf_ = (cf), of_ = (of);                                                                               \
        c->lf[0] = (uint64_t)(int64_t)(SINT(bits))(r);                                                                 \
        flags_set_co(c, cf_, of_);                                                                                     \
        c->lf[2] = 8;                                                                                                  \
    } while (0)
#define TOP(bits, r) ((uint64_t)(r) >> ((bits) - 1) & 1)

/* n is 1 to 31 (63); for 8 and 16 bits it may exceed the width. */
#define DO_SHL(bits)                                                                                                   \
    r = (bits) < 32 && n >= (bits) ? 0 : (UINT(bits))(a << n);                                                         \
    cf = (bits) < 32 && n > (bits) ? 0 : (uint64_t)a >> ((bits) - n) & 1;                                              \
    of = TOP(bits, r) ^ cf
#define DO_SHR(bits)                                                                                                   \
    r = (bits) < 32 && n >= (bits) ? 0 : (UINT(bits))(a >> n);                                                         \
    cf = (bits) < 32 && n > (bits) ? 0 : (uint64_t)a >> (n - 1) & 1;                                                   \
    of = TOP(bits, r) ^ TOP(bits, r << 1 & (UINT(bits))-1)
#define DO_SAR(bits)                                                                                                   \
    r = (UINT(bits))((SINT(bits))a >> ((bits) < 32 && n >= (bits) ? (bits) - 1 : n));                                  \
    cf = (uint64_t)((int64_t)(SINT(bits))a >> (n - 1)) & 1;                                                            \
    of = 0

#define SHIFT_SIZE(name, bits, DO)                                                                                     \
    static HANDLER(ri_##name##bits)                                                                                    \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), r;                                                                            \
        unsigned n = (unsigned)u->imm;                                                                                 \
        uint64_t cf, of;                                                                                               \
        DO(bits);                                                                                                      \
        SHIFT_FLAGS(bits, r, cf, of);                                                                                  \
        SET##bits(u->r0, r);                                                                                           \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(ri_##name##bits##_nf)                                                                               \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), r;                                                                            \
        unsigned n = (unsigned)u->imm;                                                                                 \
        uint64_t cf, of;                                                                                               \
        DO(bits);                                                                                                      \
        (void)cf, (void)of;                                                                                            \
        SET##bits(u->r0, r);                                                                                           \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(rc_##name##bits)                                                                                    \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), r;                                                                            \
        unsigned n = REG8(RCX * 8) & ((bits) == 64 ? 63 : 31);                                                         \
        uint64_t cf, of;                                                                                               \
        if (n == 0) {                                                                                                  \
            SET##bits(u->r0, a);                                                                                       \
            NEXT;                                                                                                      \
        }                                                                                                              \
        DO(bits);                                                                                                      \
        SHIFT_FLAGS(bits, r, cf, of);                                                                                  \
        SET##bits(u->r0, r);                                                                                           \
        NEXT;                                                                                                          \
    }
#define SHIFT(name, DO) SHIFT_SIZE(name, 8, DO) SHIFT_SIZE(name, 16, DO) SHIFT_SIZE(name, 32, DO) SHIFT_SIZE(name, 64, DO)

SHIFT(shl, DO_SHL)
SHIFT(shr, DO_SHR)
SHIFT(sar, DO_SAR)

/* Rotates change CF and OF only; n is not 0 (but may be a multiple of the width). */
#define DO_ROL(bits)                                                                                                   \
    unsigned k = n & ((bits) - 1);                                                                                     \
    r = (UINT(bits))(a << k | a >> (((bits) - k) & ((bits) - 1)));                                                     \
    cf = r & 1;                                                                                                        \
    of = cf ^ TOP(bits, r)
#define DO_ROR(bits)                                                                                                   \
    unsigned k = n & ((bits) - 1);                                                                                     \
    r = (UINT(bits))(a >> k | a << (((bits) - k) & ((bits) - 1)));                                                     \
    cf = TOP(bits, r);                                                                                                 \
    of = cf ^ (r >> ((bits) - 2) & 1)
/* Through the carry, bit by bit: k is at most the width. */
#define DO_RCL(bits)                                                                                                   \
    cf = flag_cf(c);                                                                                                   \
    r = a;                                                                                                             \
    for (unsigned k = (bits) < 32 ? n % ((bits) + 1) : n; k; k--) {                                                    \
        uint64_t out = TOP(bits, r);                                                                                   \
        r = (UINT(bits))(r << 1 | cf);                                                                                 \
        cf = out;                                                                                                      \
    }                                                                                                                  \
    of = cf ^ TOP(bits, r)
#define DO_RCR(bits)                                                                                                   \
    cf = flag_cf(c);                                                                                                   \
    r = a;                                                                                                             \
    for (unsigned k = (bits) < 32 ? n % ((bits) + 1) : n; k; k--) {                                                    \
        uint64_t out = r & 1;                                                                                          \
        r = (UINT(bits))(r >> 1 | cf << ((bits) - 1));                                                                 \
        cf = out;                                                                                                      \
    }                                                                                                                  \
    of = TOP(bits, r) ^ (r >> ((bits) - 2) & 1)

#define ROTATE_SIZE(name, bits, DO)                                                                                    \
    static HANDLER(ri_##name##bits)                                                                                    \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), r;                                                                            \
        unsigned n = (unsigned)u->imm;                                                                                 \
        uint64_t cf, of;                                                                                               \
        DO(bits);                                                                                                      \
        flags_set_co(c, cf, of);                                                                                       \
        SET##bits(u->r0, r);                                                                                           \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(ri_##name##bits##_nf)                                                                               \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), r;                                                                            \
        unsigned n = (unsigned)u->imm;                                                                                 \
        uint64_t cf, of;                                                                                               \
        DO(bits);                                                                                                      \
        (void)of, (void)cf;                                                                                            \
        SET##bits(u->r0, r);                                                                                           \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(rc_##name##bits)                                                                                    \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), r;                                                                            \
        unsigned n = REG8(RCX * 8) & ((bits) == 64 ? 63 : 31);                                                         \
        uint64_t cf, of;                                                                                               \
        if (n == 0) {                                                                                                  \
            SET##bits(u->r0, a);                                                                                       \
            NEXT;                                                                                                      \
        }                                                                                                              \
        DO(bits);                                                                                                      \
        flags_set_co(c, cf, of);                                                                                       \
        SET##bits(u->r0, r);                                                                                           \
        NEXT;                                                                                                          \
    }
#define ROTATE(name, DO) ROTATE_SIZE(name, 8, DO) ROTATE_SIZE(name, 16, DO) ROTATE_SIZE(name, 32, DO) ROTATE_SIZE(name, 64, DO)

ROTATE(rol, DO_ROL)
ROTATE(ror, DO_ROR)
ROTATE(rcl, DO_RCL)
ROTATE(rcr, DO_RCR)

#define RI(name) {{ri_##name##8, ri_##name##8_nf}, {ri_##name##16, ri_##name##16_nf}, {ri_##name##32, ri_##name##32_nf}, {ri_##name##64, ri_##name##64_nf}}
#define RC(name) {rc_##name##8, rc_##name##16, rc_##name##32, rc_##name##64}
const uop_fn shift_ri[SH_OPS][4][2] = {RI(rol), RI(ror), RI(rcl), RI(rcr), RI(shl), RI(shr), RI(shl), RI(sar)};
const uop_fn shift_rc[SH_OPS][4] = {RC(rol), RC(ror), RC(rcl), RC(rcr), RC(shl), RC(shr), RC(shl), RC(sar)};

/* SHLD and SHRD. A 16-bit count above 16 goes on with the source again (CF is then 0). */
static inline void double_shift(struct soft_vcpu *c, const struct uop *u, unsigned n, bool left)
{
    unsigned bits = u->size * 8u;
    n &= bits == 64 ? 63 : 31;
    uint64_t a = get_reg(c, u->r0, u->size), b = get_reg(c, u->r1, u->size), r, cf, of;
    if (n == 0) {
        set_reg(c, u->r0, u->size, a);
        return;
    }
    if (bits == 64) {
        r = left ? a << n | b >> (64 - n) : a >> n | b << (64 - n);
    } else if (bits == 32) {
        r = (uint32_t)(left ? a << n | b >> (32 - n) : a >> n | b << (32 - n));
    } else {
        uint64_t wide = left ? a << 32 | b << 16 | b : b << 32 | b << 16 | a;
        r = (uint16_t)(left ? wide >> (32 - n) : wide >> n);
    }
    cf = n > bits ? 0 : left ? a >> (bits - n) & 1 : a >> (n - 1) & 1;
    of = left ? cf ^ (n >= bits ? 0 : a << n >> (bits - 1) & 1) : ((r >> (bits - 1)) ^ (r >> (bits - 2))) & 1;
    c->lf[0] = bits == 64 ? r : bits == 32 ? (uint64_t)(int64_t)(int32_t)r : (uint64_t)(int64_t)(int16_t)r;
    flags_set_co(c, cf, of);
    c->lf[2] = 8;
    set_reg(c, u->r0, u->size, r);
}
HANDLER(shld_ri) { double_shift(c, u, (unsigned)u->imm, true); NEXT; }
HANDLER(shld_rc) { double_shift(c, u, REG8(RCX * 8), true); NEXT; }
HANDLER(shrd_ri) { double_shift(c, u, (unsigned)u->imm, false); NEXT; }
HANDLER(shrd_rc) { double_shift(c, u, REG8(RCX * 8), false); NEXT; }

#define IMUL_SIZE(bits, WIDE)                                                                                          \
    static HANDLER(imul_rr##bits)                                                                                      \
    {                                                                                                                  \
        WIDE r = (WIDE)(SINT(bits))REG##bits(u->r0) * (SINT(bits))REG##bits(u->r1);                                    \
        uint64_t over = r != (SINT(bits))r;                                                                            \
        flags_set_co(c, over, over);                                                                                   \
        SET##bits(u->r0, (UINT(bits))r);                                                                               \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(imul_rri##bits)                                                                                     \
    {                                                                                                                  \
        WIDE r = (WIDE)(SINT(bits))REG##bits(u->r1) * (SINT(bits))(u->imm);                                            \
        uint64_t over = r != (SINT(bits))r;                                                                            \
        flags_set_co(c, over, over);                                                                                   \
        SET##bits(u->r0, (UINT(bits))r);                                                                               \
        NEXT;                                                                                                          \
    }
IMUL_SIZE(16, int32_t)
IMUL_SIZE(32, int64_t)
IMUL_SIZE(64, __int128)
const uop_fn imul_rr[4] = {0, imul_rr16, imul_rr32, imul_rr64};
const uop_fn imul_rri[4] = {0, imul_rri16, imul_rri32, imul_rri64};

static HANDLER(mul_r8)
{
    unsigned r = REG8(RAX * 8) * (unsigned)REG8(u->r1);
    flags_set_co(c, r >> 8 != 0, r >> 8 != 0);
    SET16(RAX * 8, r);
    NEXT;
}
static HANDLER(imul_r8)
{
    int r = (int8_t)REG8(RAX * 8) * (int8_t)REG8(u->r1);
    flags_set_co(c, r != (int8_t)r, r != (int8_t)r);
    SET16(RAX * 8, r);
    NEXT;
}
#define MUL_SIZE(bits, UWIDE, SWIDE)                                                                                   \
    static HANDLER(mul_r##bits)                                                                                        \
    {                                                                                                                  \
        UWIDE r = (UWIDE)REG##bits(RAX * 8) * REG##bits(u->r1);                                                        \
        uint64_t over = (UINT(bits))(r >> (bits)) != 0;                                                                \
        flags_set_co(c, over, over);                                                                                   \
        SET##bits(RAX * 8, (UINT(bits))r);                                                                             \
        SET##bits(RDX * 8, (UINT(bits))(r >> (bits)));                                                                 \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(imul_r##bits)                                                                                       \
    {                                                                                                                  \
        SWIDE r = (SWIDE)(SINT(bits))REG##bits(RAX * 8) * (SINT(bits))REG##bits(u->r1);                                \
        uint64_t over = r != (SINT(bits))r;                                                                            \
        flags_set_co(c, over, over);                                                                                   \
        SET##bits(RAX * 8, (UINT(bits))r);                                                                             \
        SET##bits(RDX * 8, (UINT(bits))(r >> (bits)));                                                                 \
        NEXT;                                                                                                          \
    }
MUL_SIZE(16, uint32_t, int32_t)
MUL_SIZE(32, uint64_t, int64_t)
MUL_SIZE(64, unsigned __int128, __int128)
const uop_fn mul_r[4] = {mul_r8, mul_r16, mul_r32, mul_r64};
const uop_fn imul_r[4] = {imul_r8, imul_r16, imul_r32, imul_r64};

static SLOW_HANDLER(divide_error)
{
    SYNC();
    soft_raise(c, VEC_DE);
}
#define DIVIDE_FLAGS() (c->lf[0] = 1, c->lf[2] = 8)
static HANDLER(div_r8)
{
    unsigned d = REG8(u->r1), n = REG16(RAX * 8);
    if (SOFT_UNLIKELY(d == 0 || n / d > 0xFF))
        return divide_error(c, u, rip);
    SET16(RAX * 8, n % d << 8 | n / d);
    DIVIDE_FLAGS();
    NEXT;
}
static HANDLER(idiv_r8)
{
    int d = (int8_t)REG8(u->r1), n = (int16_t)REG16(RAX * 8);
    if (SOFT_UNLIKELY(d == 0 || n / d != (int8_t)(n / d)))
        return divide_error(c, u, rip);
    SET16(RAX * 8, (unsigned)(n % d & 0xFF) << 8 | (unsigned)(n / d & 0xFF));
    DIVIDE_FLAGS();
    NEXT;
}
#define DIV_SIZE(bits, UWIDE, SWIDE)                                                                                   \
    static HANDLER(div_r##bits)                                                                                        \
    {                                                                                                                  \
        UINT(bits) d = REG##bits(u->r1);                                                                               \
        UWIDE n = (UWIDE)REG##bits(RDX * 8) << (bits) | REG##bits(RAX * 8);                                            \
        if (SOFT_UNLIKELY(REG##bits(RDX * 8) >= d))                                                                    \
            return divide_error(c, u, rip);                                                                            \
        SET##bits(RAX * 8, (UINT(bits))(n / d));                                                                       \
        SET##bits(RDX * 8, (UINT(bits))(n % d));                                                                       \
        DIVIDE_FLAGS();                                                                                                \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(idiv_r##bits)                                                                                       \
    {                                                                                                                  \
        SINT(bits) d = (SINT(bits))REG##bits(u->r1);                                                                   \
        UWIDE n = (UWIDE)REG##bits(RDX * 8) << (bits) | REG##bits(RAX * 8);                                            \
        bool minus = (SWIDE)n < 0;                                                                                     \
        UWIDE size = minus ? -n : n;                                                                                   \
        UINT(bits) by = d < 0 ? -(UINT(bits))d : (UINT(bits))d;                                                        \
        if (SOFT_UNLIKELY((size >> (bits)) >= by))                                                                     \
            return divide_error(c, u, rip);                                                                            \
        UINT(bits) q = (UINT(bits))(size / by), rest = (UINT(bits))(size % by);                                        \
        bool q_minus = minus != (d < 0);                                                                               \
        if (SOFT_UNLIKELY(q > (UINT(bits))((UINT(bits))1 << ((bits) - 1)) - !q_minus))                                 \
            return divide_error(c, u, rip);                                                                            \
        SET##bits(RAX * 8, q_minus ? -q : q);                                                                          \
        SET##bits(RDX * 8, minus ? -rest : rest);                                                                      \
        DIVIDE_FLAGS();                                                                                                \
        NEXT;                                                                                                          \
    }
DIV_SIZE(16, uint32_t, int32_t)
DIV_SIZE(32, uint64_t, int64_t)

/* 128 by 64 bits: the host's own instruction, after the overflow check. */
static inline uint64_t div128(uint64_t high, uint64_t low, uint64_t by, uint64_t *rest)
{
    uint64_t q;
    __asm__("divq %4" : "=a"(q), "=d"(*rest) : "a"(low), "d"(high), "r"(by) : "cc");
    return q;
}
static HANDLER(div_r64)
{
    uint64_t d = REG64(u->r1), high = REG64(RDX * 8), rest;
    if (SOFT_UNLIKELY(high >= d))
        return divide_error(c, u, rip);
    uint64_t q = div128(high, REG64(RAX * 8), d, &rest);
    SET64(RAX * 8, q);
    SET64(RDX * 8, rest);
    DIVIDE_FLAGS();
    NEXT;
}
static HANDLER(idiv_r64)
{
    int64_t d = (int64_t)REG64(u->r1);
    unsigned __int128 n = (unsigned __int128)REG64(RDX * 8) << 64 | REG64(RAX * 8);
    bool minus = (int64_t)REG64(RDX * 8) < 0, q_minus = minus != (d < 0);
    unsigned __int128 size = minus ? -n : n;
    uint64_t by = d < 0 ? -(uint64_t)d : (uint64_t)d, rest;
    if (SOFT_UNLIKELY((uint64_t)(size >> 64) >= by))
        return divide_error(c, u, rip);
    uint64_t q = div128((uint64_t)(size >> 64), (uint64_t)size, by, &rest);
    if (SOFT_UNLIKELY(q > (1ull << 63) - !q_minus))
        return divide_error(c, u, rip);
    SET64(RAX * 8, q_minus ? -q : q);
    SET64(RDX * 8, minus ? -rest : rest);
    DIVIDE_FLAGS();
    NEXT;
}
const uop_fn div_r[4] = {div_r8, div_r16, div_r32, div_r64};
const uop_fn idiv_r[4] = {idiv_r8, idiv_r16, idiv_r32, idiv_r64};
