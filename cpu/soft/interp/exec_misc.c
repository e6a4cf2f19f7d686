/* The micro-ops that call helpers; bit operations, compare-and-exchange, decimal arithmetic, CRC32, CPUID and time. */
#include "soft/mmu/access.h"
#include "soft/interp/cmpxchg.h"
#include "soft/interp/exec.h"
#include "soft/ops/helpers.h"

#define CALL_HELPER(name)                                                                                              \
    HANDLER(name)                                                                                                      \
    {                                                                                                                  \
        SYNC();                                                                                                        \
        ((helper_fn)(uintptr_t)u->ptr)(c, u);                                                                          \
        UNSYNC();                                                                                                      \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    HANDLER(name##_store)                                                                                              \
    {                                                                                                                  \
        SYNC();                                                                                                        \
        ((helper_fn)(uintptr_t)u->ptr)(c, u);                                                                          \
        UNSYNC();                                                                                                      \
        AFTER_SLOW_STORE();                                                                                            \
        NEXT;                                                                                                          \
    }
CALL_HELPER(call_helper) CALL_HELPER(avx_other) /* apart for the translator, which knows the latter */
HANDLER(call_helper_end)
{
    SYNC();
    ((helper_fn)(uintptr_t)u->ptr)(c, u);
    c->budget--;
    if (c->vm->parallel) /* serializing instructions are among them (Intel SDM vol. 3, 9.3) */
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return block_enter(c, u, rip);
}

/* ---- bits ---- */

static inline uint64_t bit_result(uint64_t v, unsigned bit, unsigned op)
{
    uint64_t mask = 1ull << bit;
    return op == 0 ? v : op == 1 ? v | mask : op == 2 ? v & ~mask : v ^ mask;
}
HANDLER(bt_ri)
{
    uint64_t v = get_reg(c, u->r0, u->size);
    flags_set_co(c, v >> u->imm & 1, flag_of(c));
    if (u->aux)
        set_reg(c, u->r0, u->size, bit_result(v, (unsigned)u->imm, u->aux));
    NEXT;
}
HANDLER(bt_rr)
{
    uint64_t v = get_reg(c, u->r0, u->size);
    unsigned bit = REG8(u->r1) & (u->size * 8u - 1);
    flags_set_co(c, v >> bit & 1, flag_of(c));
    if (u->aux)
        set_reg(c, u->r0, u->size, bit_result(v, bit, u->aux));
    NEXT;
}
/* A bit string: the register is a signed bit offset from the operand's address. */
HELPER(h_bt_m)
{
    unsigned size = u->size;
    int64_t index = size == 8 ? (int64_t)REG64(u->r1) : size == 4 ? (int32_t)REG32(u->r1) : (int16_t)REG16(u->r1);
    unsigned bit = (unsigned)index & (size * 8 - 1);
    uint64_t distance = (uint64_t)((index >> (3 + __builtin_ctz(size))) * (int64_t)size);
    uint64_t at = c->tmp[0] + distance;
    uint64_t base = !c->code64 || u->seg >= SEG_FS ? c->seg[u->seg].base : 0;
    if (u->base < 8)
        at = base + ((at - base) & (u->base == 4 ? UINT32_MAX : 0xFFFF));
    if (!c->code64)
        at = soft_seg_check(c, u->seg, at - base, size, u->aux != 0);
    uint64_t v;
    if (u->scale) { /* LOCK */
        v = soft_locked_bit(c, at, size, u->aux, bit);
    } else {
        if (u->aux)
            soft_probe_write(c, at, size);
        v = load(c, at, size);
        if (u->aux)
            store(c, at, size, bit_result(v, bit, u->aux));
    }
    flags_set_co(c, v >> bit & 1, flag_of(c));
}
HELPER(h_crc32)
{
    uint32_t crc = REG32(u->r0);
    uint64_t v = get_reg(c, u->r1, u->size);
    for (unsigned i = 0; i < u->size; i++) {
        crc ^= (uint8_t)(v >> (8 * i));
        for (unsigned k = 0; k < 8; k++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
    }
    SET64(u->r0, crc);
}

/* ---- exchange ---- */

HANDLER(xadd)
{
    uint64_t a = get_reg(c, u->r0, u->size), b = get_reg(c, u->r1, u->size), r = a + b;
    uint64_t carry = (a & b) | ((a | b) & ~r);
    c->lf[0] = (uint64_t)sign_extend(r, u->size);
    c->lf[1] = carry << (64 - u->size * 8);
    c->lf[2] = carry & 8;
    set_reg(c, u->r1, u->size, a);
    set_reg(c, u->r0, u->size, r);
    NEXT;
}
HELPER(h_cmpxchg)
{
    uint64_t old = get_reg(c, u->r0, u->size), a = get_reg(c, RAX * 8, u->size);
    flags_compare(c, a, old, u->size);
    if (a == old)
        set_reg(c, u->r0, u->size, get_reg(c, u->r1, u->size));
    else
        set_reg(c, RAX * 8, u->size, old);
}
HANDLER(cmpxchg_m)
{
    uint64_t at = c->tmp[0];
    uint8_t *p;
    SYNC();
    if (!tlb_hit(c, at, u->size, ACCESS_WRITE, &p))
        soft_probe_write(c, at, u->size);
    uint64_t old = load(c, at, u->size), a = get_reg(c, RAX * 8, u->size);
    /* Memory is written in both cases. */
    store(c, at, u->size, a == old ? get_reg(c, u->r1, u->size) : old);
    flags_compare(c, a, old, u->size);
    if (a != old)
        set_reg(c, RAX * 8, u->size, old);
    UNSYNC();
    AFTER_SLOW_STORE();
    NEXT;
}
HELPER(h_cmpxchg8b)
{
    uint64_t at = c->tmp[0];
    soft_probe_write(c, at, 8);
    uint64_t old = load(c, at, 8), a = edx_eax(c);
    store(c, at, 8, old == a ? ecx_ebx(c) : old);
    end_cmpxchg8b(c, a, old);
}
HELPER(h_cmpxchg16b)
{
    uint64_t at = c->tmp[0], low, high;
    if (at & 15)
        soft_raise_error(c, VEC_GP, 0);
    uint8_t *p;
    if (!tlb_hit(c, at, 16, ACCESS_WRITE, &p))
        soft_probe_write(c, at, 16);
    bool equal = compare_pair(c, at, &low, &high);
    end_cmpxchg16b(c, equal, low, high);
}
HELPER(h_xlat)
{
    uint64_t offset = c->gpr[RBX] + REG8(RAX * 8), at;
    if (u->base < 8)
        offset &= u->base == 4 ? UINT32_MAX : 0xFFFF;
    if (c->code64)
        at = offset + (u->seg >= SEG_FS ? c->seg[u->seg].base : 0);
    else
        at = soft_seg_check(c, u->seg, offset, 1, false);
    SET8(RAX * 8, load(c, at, 1));
}

/* ---- decimal ---- */

static void result_flags(struct soft_vcpu *c, uint8_t r, bool cf, bool af, bool of)
{
    c->lf[0] = (uint64_t)(int64_t)(int8_t)r;
    flags_set_co(c, cf, of);
    c->lf[2] = af ? 8 : 0;
}
static void decimal_adjust(struct soft_vcpu *c, int sign)
{
    uint8_t old = REG8(RAX * 8), by = 0;
    bool cf = false, af = false;
    if ((old & 15) > 9 || flag_af(c)) {
        by = 6;
        cf = sign > 0 ? old > 0xF9 : old < 6;
        af = true;
    }
    if (old > 0x99 || flag_cf(c)) {
        by += 0x60;
        cf = true;
    }
    uint8_t r = (uint8_t)(old + by * sign);
    SET8(RAX * 8, r);
    result_flags(c, r, cf || flag_cf(c), af, (sign > 0 ? (old ^ r) & (by ^ r) : (old ^ by) & (old ^ r)) & 0x80);
}
HELPER(h_daa) { decimal_adjust(c, 1); }
HELPER(h_das) { decimal_adjust(c, -1); }
/* ZF, SF, PF and OF are undefined: Zen has them from the 16-bit addition, before the upper half of AL is cleared. */
static void ascii_adjust(struct soft_vcpu *c, int sign)
{
    bool adjust = (REG8(RAX * 8) & 15) > 9 || flag_af(c);
    uint16_t a = REG16(RAX * 8), by = adjust ? 0x106 : 0, r = (uint16_t)(a + by * sign);
    SET16(RAX * 8, r & 0xFF0F);
    c->lf[0] = (uint64_t)(int64_t)(int16_t)r;
    flags_set_co(c, adjust, (sign > 0 ? (a ^ r) & (by ^ r) : (a ^ by) & (a ^ r)) >> 15 & 1);
    c->lf[2] = adjust ? 8 : 0;
}
HELPER(h_aaa) { ascii_adjust(c, 1); }
HELPER(h_aas) { ascii_adjust(c, -1); }
HELPER(h_aam)
{
    if (u->aux == 0)
        soft_raise(c, VEC_DE);
    uint8_t al = REG8(RAX * 8);
    SET16(RAX * 8, al / u->aux << 8 | al % u->aux);
    result_flags(c, REG8(RAX * 8), false, false, false);
}
HELPER(h_aad)
{
    uint8_t al = REG8(RAX * 8), by = (uint8_t)(REG8(RAX * 8 + 1) * u->aux), r = (uint8_t)(al + by);
    SET16(RAX * 8, r);
    result_flags(c, r, r < al, ((al ^ by ^ r) >> 4) & 1, ((al ^ r) & (by ^ r)) & 0x80);
}
HELPER(h_salc) { SET8(RAX * 8, flag_cf(c) ? 0xFF : 0); }

/* ---- identification, time, chance ---- */

HELPER(h_rdrand)
{
    uint64_t v = 0;
    fpu_collect(&c->fpu);
    c->vm->host.random(c->vm->host.ctx, &v, u->size);
    set_reg(c, u->r0, u->size, v);
    flags_set_arith(c, F_CF);
}
HELPER(h_cpuid)
{
    soft_cpuid(c);
    c->rip = next_rip(c, u);
}
static void check_tsc(struct soft_vcpu *c)
{
    if ((c->cr4 & CR4_TSD) && c->cpl && (c->cr0 & CR0_PE))
        soft_raise_error(c, VEC_GP, 0);
}
HELPER(h_rdtsc)
{
    check_tsc(c);
    uint64_t v = soft_rdtsc(c);
    SET32(RAX * 8, v);
    SET32(RDX * 8, v >> 32);
    c->rip = next_rip(c, u);
}
HELPER(h_rdtscp)
{
    h_rdtsc(c, u);
    SET32(RCX * 8, c->tsc_aux);
}
/* No performance counters are reported. */
HELPER(h_rdpmc) { soft_raise_error(c, VEC_GP, 0); }
