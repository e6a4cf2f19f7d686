/* Micro-op handlers: moves, loads, stores, address computation, the 64-bit stack, conditional moves, extensions. */
#include "soft/mmu/access.h"
#include "soft/interp/exec.h"

HANDLER(nop) { NEXT; }

/* No later load may pass an earlier store: other vCPUs and devices look at the same memory. */
HANDLER(fence)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    NEXT;
}

#define MOVES(bits)                                                                                                    \
    static HANDLER(mov_rr##bits)                                                                                       \
    {                                                                                                                  \
        SET##bits(u->r0, REG##bits(u->r1));                                                                            \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(mov_ri##bits)                                                                                       \
    {                                                                                                                  \
        SET##bits(u->r0, u->imm);                                                                                      \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(xchg_rr##bits)                                                                                      \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0);                                                                               \
        UINT(bits) b = REG##bits(u->r1);                                                                               \
        SET##bits(u->r0, b);                                                                                           \
        SET##bits(u->r1, a);                                                                                           \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    LOAD_HANDLER(load_bd##bits, bits, EA_BD, SET##bits(u->r0, m))                                                      \
    LOAD_HANDLER(load_bi##bits, bits, EA_BI, SET##bits(u->r0, m))                                                      \
    LOAD_HANDLER(load_rip##bits, bits, rip + u->imm, SET##bits(u->r0, m))                                              \
    STORE_HANDLER(store_bd##bits, bits, EA_BD, REG##bits(u->r1), )                                                     \
    STORE_HANDLER(store_bi##bits, bits, EA_BI, REG##bits(u->r1), )                                                     \
    STORE_HANDLER(store_rip##bits, bits, rip + u->imm, REG##bits(u->r1), )                                             \
    STORE_HANDLER(storei_bd##bits, bits, EA_BD, u->imm, )                                                              \
    STORE_HANDLER(storei_bi##bits, bits, EA_BI, u->imm, )
MOVES(8)
MOVES(16)
MOVES(32)
MOVES(64)

#define BY_SIZE(name) {name##8, name##16, name##32, name##64}
#define BY_SIZE_FORM(name) {{name##_bd8, name##_bi8}, {name##_bd16, name##_bi16}, {name##_bd32, name##_bi32}, {name##_bd64, name##_bi64}}
const uop_fn mov_rr[4] = BY_SIZE(mov_rr), mov_ri[4] = BY_SIZE(mov_ri), xchg_rr[4] = BY_SIZE(xchg_rr);
const uop_fn load_rip[4] = BY_SIZE(load_rip), store_rip[4] = BY_SIZE(store_rip);
const uop_fn load_r[4][2] = BY_SIZE_FORM(load), store_r[4][2] = BY_SIZE_FORM(store), store_i[4][2] = BY_SIZE_FORM(storei);

/* Extensions. Zero extension to 32 bits is one to 64. */
#define EXTEND(name, from, to, TYPE)                                                                                   \
    static HANDLER(name##_rr)                                                                                          \
    {                                                                                                                  \
        UINT(from) m = REG##from(u->r1);                                                                               \
        SET##to(u->r0, (UINT(to))(TYPE)m);                                                                             \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    LOAD_HANDLER(name##_bd, from, EA_BD, SET##to(u->r0, (UINT(to))(TYPE)m))                                            \
    LOAD_HANDLER(name##_bi, from, EA_BI, SET##to(u->r0, (UINT(to))(TYPE)m))
EXTEND(zx8_16, 8, 16, uint8_t)
EXTEND(zx8, 8, 64, uint8_t)
EXTEND(zx16, 16, 64, uint16_t)
EXTEND(zx32, 32, 64, uint32_t)
EXTEND(sx8_16, 8, 16, int8_t)
EXTEND(sx8_32, 8, 32, int8_t)
EXTEND(sx8_64, 8, 64, int8_t)
EXTEND(sx16_32, 16, 32, int16_t)
EXTEND(sx16_64, 16, 64, int16_t)
EXTEND(sx32_64, 32, 64, int32_t)
const uop_fn movzx_rr[3] = {zx8_rr, zx16_rr, zx32_rr};
const uop_fn movzx_rm[3][2] = {{zx8_bd, zx8_bi}, {zx16_bd, zx16_bi}, {zx32_bd, zx32_bi}};
const uop_fn movzx8_16[3] = {zx8_16_rr, zx8_16_bd, zx8_16_bi};
const uop_fn movsx_rr[3][4] = {{0, sx8_16_rr, sx8_32_rr, sx8_64_rr}, {0, 0, sx16_32_rr, sx16_64_rr}, {0, 0, 0, sx32_64_rr}};
const uop_fn movsx_rm[3][4][2] = {{{0, 0}, {sx8_16_bd, sx8_16_bi}, {sx8_32_bd, sx8_32_bi}, {sx8_64_bd, sx8_64_bi}},
                                  {{0, 0}, {0, 0}, {sx16_32_bd, sx16_32_bi}, {sx16_64_bd, sx16_64_bi}},
                                  {{0, 0}, {0, 0}, {0, 0}, {sx32_64_bd, sx32_64_bi}}};

#define LEA(bits)                                                                                                      \
    static HANDLER(lea_bd##bits) { SET##bits(u->r0, EA_BD); NEXT; }                                                    \
    static HANDLER(lea_bi##bits) { SET##bits(u->r0, EA_BI); NEXT; }
LEA(16)
LEA(32)
LEA(64)
const uop_fn lea_r[4][2] = {{0, 0}, {lea_bd16, lea_bi16}, {lea_bd32, lea_bi32}, {lea_bd64, lea_bi64}};
HANDLER(lea_rip)
{
    set_reg(c, u->r0, u->size, rip + u->imm);
    NEXT;
}
HANDLER(lea_mask)
{
    set_reg(c, u->r0, u->size, EA_BI & u->imm);
    NEXT;
}

/* Linear addresses into tmp[0]. */
HANDLER(ea_bd) { c->tmp[0] = EA_BD; NEXT; }
HANDLER(ea_bi) { c->tmp[0] = EA_BI; NEXT; }
HANDLER(ea_rip) { c->tmp[0] = rip + u->imm; NEXT; }
HANDLER(ea_seg) { c->tmp[0] = c->seg[u->seg].base + EA_BI; NEXT; }       /* FS and GS in 64-bit mode */
HANDLER(ea_abs) { c->tmp[0] = (u->aux ? c->seg[u->seg].base : 0) + u->imm; NEXT; } /* 64-bit offset; aux: FS or GS */
HANDLER(ea_a32) { c->tmp[0] = (u->aux ? c->seg[u->seg].base : 0) + (uint32_t)(EA_BI + u->imm); NEXT; }
HANDLER(ea_a32_rip) { c->tmp[0] = (u->aux ? c->seg[u->seg].base : 0) + (uint32_t)(rip + u->imm); NEXT; }
HANDLER(ea_a64_rip) { c->tmp[0] = c->seg[u->seg].base + rip + u->imm; NEXT; }
/* Outside 64-bit mode: offset masked by imm, then limit and rights. aux: it is a write; size: of the access, 0 if that is
 * elsewhere and checks itself. */
HANDLER(ea_legacy)
{
    uint64_t offset = EA_BI & u->imm;
    const struct soft_seg *s = &c->seg[u->seg];
    /* A flat writable data segment, expand-up. */
    if (SOFT_LIKELY(!u->size || (s->limit == UINT32_MAX && (s->attr & 0x9E) == 0x92))) {
        c->tmp[0] = (uint32_t)(s->base + offset);
        NEXT;
    }
    SYNC();
    c->tmp[0] = soft_seg_check(c, u->seg, offset, u->size, u->aux);
    UNSYNC();
    NEXT;
}

/* A read-modify-write of tmp[0] in several micro-ops: probe, load to a temporary, work on that, store. */
HANDLER(rmw_load)
{
    SYNC();
    uint8_t *p;
    if (!tlb_hit(c, c->tmp[0], u->size, ACCESS_WRITE, &p))
        soft_probe_write(c, c->tmp[0], u->size);
    c->tmp[1] = load(c, c->tmp[0], u->size);
    UNSYNC();
    NEXT;
}
HANDLER(rmw_store)
{
    SYNC();
    store(c, c->tmp[0], u->size, c->tmp[1]);
    UNSYNC();
    AFTER_SLOW_STORE();
    NEXT;
}

/* The stack in 64-bit mode. */
STORE_HANDLER(push64_r, 64, REG64(RSP * 8) - 8, REG64(u->r1), REG64(RSP * 8) -= 8)
STORE_HANDLER(push64_i, 64, REG64(RSP * 8) - 8, u->imm, REG64(RSP * 8) -= 8)
LOAD_HANDLER(pop64_r, 64, REG64(RSP * 8), REG64(RSP * 8) += 8; REG64(u->r0) = m)
LOAD_HANDLER(leave64, 64, REG64(RBP * 8), REG64(RSP * 8) = REG64(RBP * 8) + 8; REG64(RBP * 8) = m)

#define CMOV_SIZE(cc, bits)                                                                                            \
    static HANDLER(cmov##cc##_##bits)                                                                                  \
    {                                                                                                                  \
        UINT(bits) a = REG##bits(u->r0), b = REG##bits(u->r1);                                                         \
        SET##bits(u->r0, flags_condition(c, cc) ? b : a);                                                              \
        NEXT;                                                                                                          \
    }
#define CONDITION(cc)                                                                                                  \
    CMOV_SIZE(cc, 16)                                                                                                  \
    CMOV_SIZE(cc, 32)                                                                                                  \
    CMOV_SIZE(cc, 64)                                                                                                  \
    static HANDLER(set##cc)                                                                                            \
    {                                                                                                                  \
        SET8(u->r0, flags_condition(c, cc));                                                                           \
        NEXT;                                                                                                          \
    }
CONDITION(0) CONDITION(1) CONDITION(2) CONDITION(3) CONDITION(4) CONDITION(5) CONDITION(6) CONDITION(7)
CONDITION(8) CONDITION(9) CONDITION(10) CONDITION(11) CONDITION(12) CONDITION(13) CONDITION(14) CONDITION(15)
#define CMOV_ROW(cc) {0, cmov##cc##_16, cmov##cc##_32, cmov##cc##_64}
const uop_fn cmov_rr[16][4] = {CMOV_ROW(0), CMOV_ROW(1), CMOV_ROW(2), CMOV_ROW(3), CMOV_ROW(4), CMOV_ROW(5),
                               CMOV_ROW(6), CMOV_ROW(7), CMOV_ROW(8), CMOV_ROW(9), CMOV_ROW(10), CMOV_ROW(11),
                               CMOV_ROW(12), CMOV_ROW(13), CMOV_ROW(14), CMOV_ROW(15)};
const uop_fn setcc_r[16] = {set0, set1, set2, set3, set4, set5, set6, set7, set8, set9, set10, set11, set12, set13, set14, set15};

HANDLER(bswap32) { SET32(u->r0, __builtin_bswap32(REG32(u->r0))); NEXT; }
HANDLER(bswap64) { SET64(u->r0, __builtin_bswap64(REG64(u->r0))); NEXT; }
/* BSWAP with a 16-bit operand is undefined; processors clear the register's low 16 bits. */
HANDLER(bswap16) { SET16(u->r0, 0); NEXT; }
HANDLER(movbe16) { SET16(u->r0, __builtin_bswap16(REG16(u->r1))); NEXT; }
HANDLER(movbe32) { SET32(u->r0, __builtin_bswap32(REG32(u->r1))); NEXT; }
HANDLER(movbe64) { SET64(u->r0, __builtin_bswap64(REG64(u->r1))); NEXT; }
HANDLER(cbw) { SET16(RAX * 8, (int8_t)REG8(RAX * 8)); NEXT; }
HANDLER(cwde) { SET32(RAX * 8, (int16_t)REG16(RAX * 8)); NEXT; }
HANDLER(cdqe) { SET64(RAX * 8, (int64_t)(int32_t)REG32(RAX * 8)); NEXT; }
HANDLER(cwd) { SET16(RDX * 8, (int16_t)REG16(RAX * 8) >> 15); NEXT; }
HANDLER(cdq) { SET32(RDX * 8, (int32_t)REG32(RAX * 8) >> 31); NEXT; }
HANDLER(cqo) { SET64(RDX * 8, (int64_t)REG64(RAX * 8) >> 63); NEXT; }
