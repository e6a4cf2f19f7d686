/* Micro-op handlers: two-operand arithmetic and logic, INC, DEC, NEG, NOT, on registers, immediates and memory. */
#include "soft/mmu/access.h"
#include "soft/interp/exec.h"

#define SET_FLAGS(bits, r, carries)                                                                                    \
    (c->lf[0] = (uint64_t)(int64_t)(SINT(bits))(r), c->lf[1] = (uint64_t)(UINT(bits))(carries) << (64 - (bits)),       \
     c->lf[2] = (carries) & 8)

#define DO_ADD(bits) r = (UINT(bits))(a + b)
#define DO_ADC(bits) r = (UINT(bits))(a + b + flag_cf(c))
#define DO_SUB(bits) r = (UINT(bits))(a - b)
#define DO_SBB(bits) r = (UINT(bits))(a - b - flag_cf(c))
#define DO_AND(bits) r = a & b
#define DO_OR(bits) r = a | b
#define DO_XOR(bits) r = a ^ b
#define FLAGS_ADD(bits) SET_FLAGS(bits, r, (UINT(bits))((a & b) | ((a | b) & ~r)))
#define FLAGS_SUB(bits) SET_FLAGS(bits, r, (UINT(bits))((~a & b) | ((~a | b) & r)))
#define FLAGS_LOGIC(bits) (c->lf[0] = (uint64_t)(int64_t)(SINT(bits))r, c->lf[1] = 0, c->lf[2] = 0)
#define FLAGS_NONE(bits) (void)r

/* r0 op= memory */
#define ALU_RM(name, bits, DO, FLAGS, KEEP, EA)                                                                        \
    LOAD_HANDLER(name, bits, EA, {                                                                              \
        UINT(bits) a = REG##bits(u->r0);                                                                               \
        UINT(bits) b = m;                                                                                              \
        UINT(bits) r;                                                                                                  \
        DO(bits);                                                                                                      \
        FLAGS(bits);                                                                                                   \
        KEEP(bits, u->r0, r);                                                                                          \
    })

/* memory op= B */
#define ALU_RMW(name, bits, DO, FLAGS, EA, B)                                                                          \
    static SLOW_HANDLER(name##_slow)                                                                                   \
    {                                                                                                                  \
        uint64_t ea = EA;                                                                                              \
        SYNC();                                                                                                        \
        soft_probe_write(c, ea, (bits) / 8);                                                                           \
        UINT(bits) a = (UINT(bits))soft_load_slow(c, ea, (bits) / 8), b = (UINT(bits))(B), r;                          \
        DO(bits);                                                                                                      \
        soft_store_slow(c, ea, (bits) / 8, r);                                                                         \
        UNSYNC();                                                                                                      \
        FLAGS(bits);                                                                                                   \
        (void)b;                                                                                                       \
        AFTER_SLOW_STORE();                                                                                            \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(name)                                                                                               \
    {                                                                                                                  \
        uint64_t ea = EA;                                                                                              \
        uint8_t *p;                                                                                                    \
        if (!tlb_hit(c, ea, (bits) / 8, ACCESS_WRITE, &p))                                                             \
            return name##_slow(c, u, rip);                                                                             \
        UINT(bits) a = MEM(bits, p), b = (UINT(bits))(B), r;                                                       \
        DO(bits);                                                                                                      \
        MEM(bits, p) = r;                                                                                           \
        FLAGS(bits);                                                                                                   \
        (void)b;                                                                                                       \
        NEXT;                                                                                                          \
    }

/* flags of (memory op B) */
#define ALU_CMPM(name, bits, DO, FLAGS, EA, B)                                                                         \
    LOAD_HANDLER(name, bits, EA, {                                                                              \
        UINT(bits) a = m;                                                                                              \
        UINT(bits) b = (UINT(bits))(B);                                                                                \
        UINT(bits) r;                                                                                                  \
        DO(bits);                                                                                                      \
        FLAGS(bits);                                                                                                   \
    })

#define KEEP_RESULT(bits, offset, r) SET##bits(offset, r)
#define KEEP_NOTHING(bits, offset, r) (void)(r)

#define ALU_REGS(name, bits, DO, FLAGS, KEEP)                                                                          \
    static HANDLER(rr_##name)                                                                                          \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), b = REG##bits(u->r1), r;                                                      \
        DO(bits);                                                                                                      \
        FLAGS(bits);                                                                                                   \
        KEEP(bits, u->r0, r);                                                                                          \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(ri_##name)                                                                                          \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), b = (UINT(bits))u->imm, r;                                                    \
        DO(bits);                                                                                                      \
        FLAGS(bits);                                                                                                   \
        KEEP(bits, u->r0, r);                                                                                          \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    ALU_RM(rm_bd_##name, bits, DO, FLAGS, KEEP, EA_BD)                                                                 \
    ALU_RM(rm_bi_##name, bits, DO, FLAGS, KEEP, EA_BI)

#define ALU_MODIFY(name, bits, DO, FLAGS)                                                                              \
    ALU_REGS(name, bits, DO, FLAGS, KEEP_RESULT)                                                                       \
    ALU_RMW(mr_bd_##name, bits, DO, FLAGS, EA_BD, REG##bits(u->r1))                                                    \
    ALU_RMW(mr_bi_##name, bits, DO, FLAGS, EA_BI, REG##bits(u->r1))                                                    \
    ALU_RMW(mi_bd_##name, bits, DO, FLAGS, EA_BD, u->imm)                                                              \
    ALU_RMW(mi_bi_##name, bits, DO, FLAGS, EA_BI, u->imm)
#define ALU_COMPARE(name, bits, DO, FLAGS)                                                                             \
    ALU_REGS(name, bits, DO, FLAGS, KEEP_NOTHING)                                                                      \
    ALU_CMPM(mr_bd_##name, bits, DO, FLAGS, EA_BD, REG##bits(u->r1))                                                   \
    ALU_CMPM(mr_bi_##name, bits, DO, FLAGS, EA_BI, REG##bits(u->r1))                                                   \
    ALU_CMPM(mi_bd_##name, bits, DO, FLAGS, EA_BD, u->imm)                                                             \
    ALU_CMPM(mi_bi_##name, bits, DO, FLAGS, EA_BI, u->imm)

/* 8 and 16 bits have one variant, which sets flags. */
#define ALU(KIND, name, DO, FLAGS)                                                                                     \
    KIND(name##8, 8, DO, FLAGS)                                                                                        \
    KIND(name##16, 16, DO, FLAGS)                                                                                      \
    KIND(name##32, 32, DO, FLAGS)                                                                                      \
    KIND(name##64, 64, DO, FLAGS)                                                                                      \
    KIND(name##32_nf, 32, DO, FLAGS_NONE)                                                                              \
    KIND(name##64_nf, 64, DO, FLAGS_NONE)

ALU(ALU_MODIFY, add, DO_ADD, FLAGS_ADD)
ALU(ALU_MODIFY, or, DO_OR, FLAGS_LOGIC)
ALU(ALU_MODIFY, adc, DO_ADC, FLAGS_ADD)
ALU(ALU_MODIFY, sbb, DO_SBB, FLAGS_SUB)
ALU(ALU_MODIFY, and, DO_AND, FLAGS_LOGIC)
ALU(ALU_MODIFY, sub, DO_SUB, FLAGS_SUB)
ALU(ALU_MODIFY, xor, DO_XOR, FLAGS_LOGIC)
ALU(ALU_COMPARE, cmp, DO_SUB, FLAGS_SUB)
ALU(ALU_COMPARE, test, DO_AND, FLAGS_LOGIC)

#define ROW(p, name) {{p##name##8, p##name##8}, {p##name##16, p##name##16}, {p##name##32, p##name##32_nf}, {p##name##64, p##name##64_nf}}
#define CELL(p, name) {p##bd_##name, p##bi_##name}
#define ROW_M(p, name)                                                                                                 \
    {{CELL(p, name##8), CELL(p, name##8)}, {CELL(p, name##16), CELL(p, name##16)},                                     \
     {CELL(p, name##32), CELL(p, name##32_nf)}, {CELL(p, name##64), CELL(p, name##64_nf)}}
#define TABLE(R, p)                                                                                                    \
    {R(p, add), R(p, or), R(p, adc), R(p, sbb), R(p, and), R(p, sub), R(p, xor), R(p, cmp), R(p, test)}
const uop_fn alu_rr[ALU_OPS][4][2] = TABLE(ROW, rr_);
const uop_fn alu_ri[ALU_OPS][4][2] = TABLE(ROW, ri_);
const uop_fn alu_rm[ALU_OPS][4][2][2] = TABLE(ROW_M, rm_);
const uop_fn alu_mr[ALU_OPS][4][2][2] = TABLE(ROW_M, mr_);
const uop_fn alu_mi[ALU_OPS][4][2][2] = TABLE(ROW_M, mi_);

/* INC and DEC keep CF: it is put back under the new OF. */
#define KEEP_CF(bits, carries)                                                                                         \
    do {                                                                                                               \
        uint64_t cf_ = c->lf[1] & (1ull << 63);                                                                        \
        SET_FLAGS(bits, r, carries);                                                                                   \
        uint64_t of_ = (c->lf[1] ^ (c->lf[1] << 1)) & (1ull << 63);                                                    \
        c->lf[1] = cf_ | (cf_ ^ of_) >> 1;                                                                             \
    } while (0)
#define DO_INC(bits) r = (UINT(bits))(a + 1)
#define DO_DEC(bits) r = (UINT(bits))(a - 1)
#define DO_NEG(bits) r = (UINT(bits))(0 - a)
#define DO_NOT(bits) r = (UINT(bits))~a
#define FLAGS_INC(bits) KEEP_CF(bits, (UINT(bits))((a & 1) | ((a | 1) & ~r)))
#define FLAGS_DEC(bits) KEEP_CF(bits, (UINT(bits))((~a & 1) | ((~a | 1) & r)))
#define FLAGS_NEG(bits) SET_FLAGS(bits, r, (UINT(bits))(a | r))

#define UNARY_ONE(name, bits, DO, FLAGS)                                                                               \
    static HANDLER(r_##name)                                                                                           \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), r;                                                                            \
        DO(bits);                                                                                                      \
        FLAGS(bits);                                                                                                   \
        SET##bits(u->r0, r);                                                                                           \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    ALU_RMW(m_bd_##name, bits, DO, FLAGS, EA_BD, 0)                                                                    \
    ALU_RMW(m_bi_##name, bits, DO, FLAGS, EA_BI, 0)

ALU(UNARY_ONE, inc, DO_INC, FLAGS_INC)
ALU(UNARY_ONE, dec, DO_DEC, FLAGS_DEC)
ALU(UNARY_ONE, neg, DO_NEG, FLAGS_NEG)
ALU(UNARY_ONE, not, DO_NOT, FLAGS_NONE)

#define UTABLE(R, p) {R(p, inc), R(p, dec), R(p, neg), R(p, not)}
const uop_fn unary_r[UN_OPS][4][2] = UTABLE(ROW, r_);
const uop_fn unary_m[UN_OPS][4][2][2] = UTABLE(ROW_M, m_);
