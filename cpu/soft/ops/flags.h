/* Lazy arithmetic flags.
 *
 * lf[0]: the last result, sign-extended from its operand size: ZF, SF and PF are read from it.
 * lf[1]: bit 63 is CF, bit 63 xor bit 62 is OF (the carries out of the two highest bits, moved to the top).
 * lf[2]: bit 3 is AF; bit 63 inverts SF and bits 8-15 are xored into the byte that PF is computed from, for flag
 *        combinations that no result has.
 * Flags that the manuals leave undefined are set as AMD's Zen processors do (measured; see exec_shift.c, exec_misc.c).
 */
#ifndef SOFT_FLAGS_H
#define SOFT_FLAGS_H

#include "soft/cpu.h"

static inline bool flag_cf(const struct soft_vcpu *c) { return c->lf[1] >> 63; }
static inline bool flag_of(const struct soft_vcpu *c) { return (c->lf[1] ^ (c->lf[1] << 1)) >> 63; }
static inline bool flag_zf(const struct soft_vcpu *c) { return c->lf[0] == 0; }
static inline bool flag_sf(const struct soft_vcpu *c) { return (c->lf[0] ^ c->lf[2]) >> 63; }
static inline bool flag_pf(const struct soft_vcpu *c)
{
    return !__builtin_parity((unsigned)((c->lf[0] ^ (c->lf[2] >> 8)) & 0xFF));
}
static inline bool flag_af(const struct soft_vcpu *c) { return (c->lf[2] >> 3) & 1; }

static inline uint32_t flags_arith(const struct soft_vcpu *c)
{
    return (flag_cf(c) ? F_CF : 0) | (flag_pf(c) ? F_PF : 0) | (flag_af(c) ? F_AF : 0) | (flag_zf(c) ? F_ZF : 0) |
           (flag_sf(c) ? F_SF : 0) | (flag_of(c) ? F_OF : 0);
}

static inline void flags_set_arith(struct soft_vcpu *c, uint32_t f)
{
    uint64_t cf = f & F_CF ? 1 : 0, of = f & F_OF ? 1 : 0;
    bool zf = f & F_ZF, pf = f & F_PF;
    c->lf[0] = !zf;
    c->lf[1] = cf << 63 | (cf ^ of) << 62;
    c->lf[2] = (f & F_AF ? 8 : 0) | (f & F_SF ? 1ull << 63 : 0) | (pf != zf ? 0x100 : 0);
}

/* Set CF and OF, keeping the others. */
static inline void flags_set_co(struct soft_vcpu *c, uint64_t cf, uint64_t of)
{
    c->lf[1] = cf << 63 | (cf ^ of) << 62;
}

/* size: in bytes. */
static inline int64_t sign_extend(uint64_t v, unsigned size)
{
    unsigned shift = 64 - size * 8;
    return (int64_t)(v << shift) >> shift;
}

/* ZF, SF and PF of a result of `size` bytes, and CF; OF and AF clear. */
static inline void flags_set_result(struct soft_vcpu *c, uint64_t r, unsigned size, bool cf)
{
    c->lf[0] = (uint64_t)sign_extend(r, size);
    flags_set_co(c, cf, false);
    c->lf[2] = 0;
}

/* The whole of RFLAGS. */
static inline uint32_t soft_flags(const struct soft_vcpu *c)
{
    return (c->rflags & ~F_ARITH) | 2 | flags_arith(c);
}

static inline void soft_set_flags(struct soft_vcpu *c, uint32_t f)
{
    c->rflags = (f & ~F_ARITH) | 2;
    flags_set_arith(c, f);
}

/* Condition codes 0-15 as in Jcc. */
static inline bool flags_condition(const struct soft_vcpu *c, unsigned cc)
{
    bool r;
    switch (cc >> 1) {
    case 0: r = flag_of(c); break;
    case 1: r = flag_cf(c); break;
    case 2: r = flag_zf(c); break;
    case 3: r = flag_cf(c) || flag_zf(c); break;
    case 4: r = flag_sf(c); break;
    case 5: r = flag_pf(c); break;
    case 6: r = flag_sf(c) != flag_of(c); break;
    default: r = flag_zf(c) || flag_sf(c) != flag_of(c); break;
    }
    return r != (cc & 1);
}

#endif
