/* Micro-op handlers: near jumps, calls and returns in 64-bit mode, and comparisons fused with conditional jumps.
 * (Far transfers and everything outside 64-bit mode are helpers: exec_legacy.c.) */
#include "soft/mmu/access.h"
#include "soft/interp/exec.h"

HANDLER(jmp_rel) { GO_TAKEN(); }
HANDLER(jmp_fall) { GO_NEXT(); }
/* Indirect branches whose target is not in the jump cache. A target that is not canonical faults here, before anything
 * has changed, as on AMD's processors. */
static SLOW_HANDLER(jmp_r_slow)
{
    uint64_t target = REG64(u->r1);
    if (!soft_canonical(target)) {
        SYNC();
        soft_raise_error(c, VEC_GP, 0);
    }
    c->budget -= u->idx + 1;
    c->rip = target;
    return block_enter(c, u, rip);
}
HANDLER(jmp_r)
{
    uint64_t target = REG64(u->r1);
    const struct soft_jump *j = &c->jumps[jump_hash(target)];
    if (SOFT_UNLIKELY(j->linear != target))
        return jmp_r_slow(c, u, rip);
    LEAVE_IF_DUE(target);
    u = j->code;
    return u->fn(c, u, target);
}

#define JCC(cc)                                                                                                        \
    static HANDLER(jcc##cc)                                                                                            \
    {                                                                                                                  \
        if (flags_condition(c, cc))                                                                                    \
            GO_TAKEN();                                                                                                \
        GO_NEXT();                                                                                                     \
    }
JCC(0) JCC(1) JCC(2) JCC(3) JCC(4) JCC(5) JCC(6) JCC(7) JCC(8) JCC(9) JCC(10) JCC(11) JCC(12) JCC(13) JCC(14) JCC(15)
const uop_fn jcc_rel[16] = {jcc0, jcc1, jcc2, jcc3, jcc4, jcc5, jcc6, jcc7, jcc8, jcc9, jcc10, jcc11, jcc12, jcc13, jcc14, jcc15};

/* The target is computed before the push, so CALL [RSP] and CALL RSP see the old RSP. */
static SLOW_HANDLER(call_rel_slow)
{
    SYNC();
    c->access_ss = 1;
    soft_store_slow(c, REG64(RSP * 8) - 8, 8, rip + u->off + u->len);
    UNSYNC();
    REG64(RSP * 8) -= 8;
    c->budget -= u->idx + 1;
    c->rip = rip + (uint64_t)LINKS(u)->delta;
    return block_enter(c, u, rip);
}
HANDLER(call_rel)
{
    uint64_t sp = REG64(RSP * 8) - 8;
    uint8_t *p;
    if (!tlb_hit(c, sp, 8, ACCESS_WRITE, &p))
        return call_rel_slow(c, u, rip);
    MEM(64, p) = rip + u->off + u->len;
    REG64(RSP * 8) = sp;
    GO_TAKEN();
}
static SLOW_HANDLER(call_r_slow)
{
    uint64_t target = REG64(u->r1);
    SYNC();
    c->access_ss = 1;
    if (!soft_canonical(target)) {
        soft_probe_write(c, REG64(RSP * 8) - 8, 8); /* the push faults first */
        soft_raise_error(c, VEC_GP, 0);
    }
    store(c, REG64(RSP * 8) - 8, 8, rip + u->off + u->len);
    UNSYNC();
    REG64(RSP * 8) -= 8;
    c->budget -= u->idx + 1;
    c->rip = target;
    return block_enter(c, u, rip);
}
HANDLER(call_r)
{
    uint64_t sp = REG64(RSP * 8) - 8, target = REG64(u->r1);
    const struct soft_jump *j = &c->jumps[jump_hash(target)];
    uint8_t *p;
    if (!tlb_hit(c, sp, 8, ACCESS_WRITE, &p) || SOFT_UNLIKELY(j->linear != target))
        return call_r_slow(c, u, rip);
    MEM(64, p) = rip + u->off + u->len;
    REG64(RSP * 8) = sp;
    LEAVE_IF_DUE(target);
    u = j->code;
    return u->fn(c, u, target);
}
static SLOW_HANDLER(ret64_slow)
{
    SYNC();
    c->access_ss = 1;
    uint64_t target = load(c, REG64(RSP * 8), 8);
    if (!soft_canonical(target))
        soft_raise_error(c, VEC_GP, 0);
    UNSYNC();
    REG64(RSP * 8) += 8 + u->imm;
    c->budget -= u->idx + 1;
    c->rip = target;
    return block_enter(c, u, rip);
}
HANDLER(ret64)
{
    uint64_t sp = REG64(RSP * 8);
    uint8_t *p;
    if (!tlb_hit(c, sp, 8, ACCESS_READ, &p))
        return ret64_slow(c, u, rip);
    uint64_t target = MEM(64, p);
    const struct soft_jump *j = &c->jumps[jump_hash(target)];
    if (SOFT_UNLIKELY(j->linear != target))
        return ret64_slow(c, u, rip);
    REG64(RSP * 8) = sp + 8 + u->imm;
    LEAVE_IF_DUE(target);
    u = j->code;
    return u->fn(c, u, target);
}

/* CMP and TEST with the conditional jump that follows. The operands decide; the flags are stored besides. */
#define CMP_FLAGS(bits)                                                                                                \
    UINT(bits) r = (UINT(bits))(a - b), k = (UINT(bits))((~a & b) | ((~a | b) & r));                                   \
    c->lf[0] = (uint64_t)(int64_t)(SINT(bits))r;                                                                       \
    c->lf[1] = (uint64_t)k << (64 - (bits));                                                                           \
    c->lf[2] = k & 8
#define TEST_FLAGS(bits)                                                                                               \
    c->lf[0] = (uint64_t)(int64_t)(SINT(bits))(a & b);                                                                 \
    c->lf[1] = 0;                                                                                                      \
    c->lf[2] = 0

#define FUSED(name, bits, FLAGS, COND)                                                                                 \
    static HANDLER(rr_##name##bits)                                                                                    \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), b = REG##bits(u->r1);                                                         \
        FLAGS(bits);                                                                                                   \
        if (COND(bits))                                                                                                \
            GO_TAKEN();                                                                                                \
        GO_NEXT();                                                                                                     \
    }                                                                                                                  \
    static HANDLER(ri_##name##bits)                                                                                    \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), b = (UINT(bits))u->imm;                                                       \
        FLAGS(bits);                                                                                                   \
        if (COND(bits))                                                                                                \
            GO_TAKEN();                                                                                                \
        GO_NEXT();                                                                                                     \
    }
#define FUSED_SIZES(name, FLAGS, COND) FUSED(name, 8, FLAGS, COND) FUSED(name, 16, FLAGS, COND) FUSED(name, 32, FLAGS, COND) FUSED(name, 64, FLAGS, COND)

#define C_B(bits) a < b
#define C_AE(bits) a >= b
#define C_E(bits) a == b
#define C_NE(bits) a != b
#define C_BE(bits) a <= b
#define C_A(bits) a > b
#define C_S(bits) (SINT(bits))(a - b) < 0
#define C_NS(bits) (SINT(bits))(a - b) >= 0
#define C_L(bits) (SINT(bits))a < (SINT(bits))b
#define C_GE(bits) (SINT(bits))a >= (SINT(bits))b
#define C_LE(bits) (SINT(bits))a <= (SINT(bits))b
#define C_G(bits) (SINT(bits))a > (SINT(bits))b
#define T_E(bits) (a & b) == 0
#define T_NE(bits) (a & b) != 0
#define T_S(bits) (SINT(bits))(a & b) < 0
#define T_NS(bits) (SINT(bits))(a & b) >= 0
#define T_LE(bits) (SINT(bits))(a & b) <= 0
#define T_G(bits) (SINT(bits))(a & b) > 0
FUSED_SIZES(cmp_b, CMP_FLAGS, C_B)
FUSED_SIZES(cmp_ae, CMP_FLAGS, C_AE)
FUSED_SIZES(cmp_e, CMP_FLAGS, C_E)
FUSED_SIZES(cmp_ne, CMP_FLAGS, C_NE)
FUSED_SIZES(cmp_be, CMP_FLAGS, C_BE)
FUSED_SIZES(cmp_a, CMP_FLAGS, C_A)
FUSED_SIZES(cmp_s, CMP_FLAGS, C_S)
FUSED_SIZES(cmp_ns, CMP_FLAGS, C_NS)
FUSED_SIZES(cmp_l, CMP_FLAGS, C_L)
FUSED_SIZES(cmp_ge, CMP_FLAGS, C_GE)
FUSED_SIZES(cmp_le, CMP_FLAGS, C_LE)
FUSED_SIZES(cmp_g, CMP_FLAGS, C_G)
FUSED_SIZES(test_e, TEST_FLAGS, T_E)
FUSED_SIZES(test_ne, TEST_FLAGS, T_NE)
FUSED_SIZES(test_s, TEST_FLAGS, T_S)
FUSED_SIZES(test_ns, TEST_FLAGS, T_NS)
FUSED_SIZES(test_le, TEST_FLAGS, T_LE)
FUSED_SIZES(test_g, TEST_FLAGS, T_G)

#define F4(name) {name##8, name##16, name##32, name##64}
/* TEST clears OF, so L and S, GE and NS are the same after it. */
#define FUSED_TABLE(p)                                                                                                 \
    {{[2] = F4(p##cmp_b), F4(p##cmp_ae), F4(p##cmp_e), F4(p##cmp_ne), F4(p##cmp_be), F4(p##cmp_a), F4(p##cmp_s),       \
      F4(p##cmp_ns), [12] = F4(p##cmp_l), F4(p##cmp_ge), F4(p##cmp_le), F4(p##cmp_g)},                                 \
     {[4] = F4(p##test_e), F4(p##test_ne), [8] = F4(p##test_s), F4(p##test_ns), [12] = F4(p##test_s), F4(p##test_ns),  \
      F4(p##test_le), F4(p##test_g)}}
const uop_fn fused_rr[FUSE_OPS][16][4] = FUSED_TABLE(rr_);
const uop_fn fused_ri[FUSE_OPS][16][4] = FUSED_TABLE(ri_);
