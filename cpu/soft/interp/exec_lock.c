/* Locked operations: each is one atomic step for all vCPUs, and for devices that look at the same memory (Intel SDM vol. 3,
 * 8.1.2). Plain RAM inside a cache line is changed by the host's own locked instructions; what crosses lines is done while
 * every other vCPU stands still, since hosts make a split lock slow or forbid it. An access that the caller answers is a
 * read and then a write, as on any bridge.
 */
#include "soft/interp/cmpxchg.h"
#include "soft/mmu/access.h"
#include "soft/ops/helpers.h"
#include "soft/ops/operations.h"

/* Compare and exchange. False: *old is what was there. */
static inline bool cas(uint8_t *p, unsigned size, uint64_t *old, uint64_t new)
{
    bool done;
#define CAS(bits)                                                                                                      \
    __asm__ volatile("lock cmpxchg %[new], %[memory]"                                                                 \
                     : "=@ccz"(done), [memory] "+m"(*(mem##bits *)p), "+a"(*old)                                      \
                     : [new] "q"((UINT(bits))new)                                                                      \
                     : "memory")
    switch (size) {
    case 1: CAS(8); break;
    case 2: CAS(16); break;
    case 4: CAS(32); break;
    default: CAS(64); break;
    }
    return done;
}
static inline uint64_t exchange(uint8_t *p, unsigned size, uint64_t v)
{
#define EXCHANGE(bits) __asm__ volatile("xchg %0, %1" : "+q"(v_##bits), "+m"(*(mem##bits *)p) : : "memory")
    switch (size) {
    case 1: { uint8_t v_8 = (uint8_t)v; EXCHANGE(8); return v_8; }
    case 2: { uint16_t v_16 = (uint16_t)v; EXCHANGE(16); return v_16; }
    case 4: { uint32_t v_32 = (uint32_t)v; EXCHANGE(32); return v_32; }
    default: { uint64_t v_64 = v; EXCHANGE(64); return v_64; }
    }
}
static inline uint64_t peek(const uint8_t *p, unsigned size)
{
    return size == 1 ? MEM(8, p) : size == 2 ? MEM(16, p) : size == 4 ? MEM(32, p) : MEM(64, p);
}

/* What a locked operation makes of the old value. Those from LOCK_BITS on: bit `b` set, reset, complemented. */
enum { LOCK_UNARY = ALU_OPS, LOCK_BITS = LOCK_UNARY + UN_OPS, LOCK_EXCHANGE = LOCK_BITS + 4 };
static inline uint64_t result(unsigned op, uint64_t a, uint64_t b, bool carry)
{
    switch (op) {
    case ALU_ADD: return a + b;
    case ALU_ADC: return a + b + carry;
    case ALU_SUB: return a - b;
    case ALU_SBB: return a - b - carry;
    case ALU_AND: return a & b;
    case ALU_OR: return a | b;
    case ALU_XOR: return a ^ b;
    case LOCK_UNARY + UN_INC: return a + 1;
    case LOCK_UNARY + UN_DEC: return a - 1;
    case LOCK_UNARY + UN_NEG: return -a;
    case LOCK_UNARY + UN_NOT: return ~a;
    case LOCK_BITS + 1: return a | 1ull << b;
    case LOCK_BITS + 2: return a & ~(1ull << b);
    case LOCK_BITS + 3: return a ^ 1ull << b;
    default: return b;
    }
}

static inline uint64_t update_ram(uint8_t *p, unsigned size, unsigned op, uint64_t b, bool carry)
{
    if (op == LOCK_EXCHANGE)
        return exchange(p, size, b);
    uint64_t old = peek(p, size);
    while (!cas(p, size, &old, result(op, old, b, carry)))
        ;
    return old;
}

/* The old value. */
static uint64_t update(struct soft_vcpu *c, uint64_t at, unsigned size, unsigned op, uint64_t b, bool carry)
{
    struct soft_locked l;
    uint64_t old;
    uint8_t *p;
    if (tlb_hit(c, at, size, ACCESS_WRITE, &p) && soft_one_line(at, size))
        return update_ram(p, size, op, b, carry);
    if (soft_lock(c, at, size, &l)) {
        old = update_ram(l.host, size, op, b, carry);
    } else {
        old = load(c, at, size);
        store(c, at, size, result(op, old, b, carry));
    }
    soft_unlock(c, &l);
    return old;
}

/* Compare with `expected` and exchange. The old value. */
static uint64_t compare_exchange(struct soft_vcpu *c, uint64_t at, unsigned size, uint64_t expected, uint64_t new)
{
    struct soft_locked l;
    uint64_t old = expected;
    uint8_t *p;
    if (tlb_hit(c, at, size, ACCESS_WRITE, &p) && soft_one_line(at, size)) {
        cas(p, size, &old, new);
        return old;
    }
    if (soft_lock(c, at, size, &l)) {
        cas(l.host, size, &old, new);
    } else {
        old = load(c, at, size);
        store(c, at, size, old == expected ? new : old); /* memory is written in both cases */
    }
    soft_unlock(c, &l);
    return old;
}

/* ---- flags ---- */

static void flags_of_sum(struct soft_vcpu *c, uint64_t r, uint64_t carries, unsigned size)
{
    c->lf[0] = (uint64_t)sign_extend(r, size);
    c->lf[1] = carries << (64 - size * 8);
    c->lf[2] = carries & 8;
}
/* INC and DEC keep CF. */
static void keep_carry(struct soft_vcpu *c, uint64_t before)
{
    uint64_t cf = before & 1ull << 63, of = (c->lf[1] ^ c->lf[1] << 1) & 1ull << 63;
    c->lf[1] = cf | (cf ^ of) >> 1;
}

/* ---- the instructions ---- */

static uint64_t operand_of(struct soft_vcpu *c, const struct uop *u)
{
    return u->index ? (uint64_t)(int64_t)u->disp : get_reg(c, u->r1, u->size);
}

HELPER(h_lock_alu)
{
    bool carry = flag_cf(c);
    uint64_t b = operand_of(c, u), a = update(c, c->tmp[0], u->size, u->aux, b, carry), r = result(u->aux, a, b, carry);
    switch (u->aux) {
    case ALU_ADD: case ALU_ADC: flags_of_sum(c, r, (a & b) | ((a | b) & ~r), u->size); break;
    case ALU_SUB: case ALU_SBB: flags_of_sum(c, r, (~a & b) | ((~a | b) & r), u->size); break;
    default: flags_of_sum(c, r, 0, u->size); break;
    }
}
HELPER(h_lock_unary)
{
    unsigned op = LOCK_UNARY + u->aux;
    uint64_t a = update(c, c->tmp[0], u->size, op, 0, false), r = result(op, a, 0, false), before = c->lf[1];
    switch (u->aux) {
    case UN_INC:
        flags_of_sum(c, r, (a & 1) | ((a | 1) & ~r), u->size);
        keep_carry(c, before);
        break;
    case UN_DEC:
        flags_of_sum(c, r, (~a & 1) | ((~a | 1) & r), u->size);
        keep_carry(c, before);
        break;
    case UN_NEG: flags_of_sum(c, r, a | r, u->size); break;
    default: break;
    }
}
HELPER(h_lock_bit)
{
    uint64_t old = update(c, c->tmp[0], u->size, LOCK_BITS + u->aux, (uint64_t)u->disp, false);
    flags_set_co(c, old >> u->disp & 1, flag_of(c));
}
uint64_t soft_locked_bit(struct soft_vcpu *c, uint64_t at, unsigned size, unsigned op, unsigned bit)
{
    return update(c, at, size, LOCK_BITS + op, bit, false);
}
HELPER(h_lock_xadd)
{
    uint64_t b = get_reg(c, u->r1, u->size), a = update(c, c->tmp[0], u->size, ALU_ADD, b, false), r = a + b;
    flags_of_sum(c, r, (a & b) | ((a | b) & ~r), u->size);
    set_reg(c, u->r1, u->size, a);
}
HELPER(h_xchg_m)
{
    set_reg(c, u->r0, u->size, update(c, c->tmp[0], u->size, LOCK_EXCHANGE, get_reg(c, u->r0, u->size), false));
}
HELPER(h_lock_cmpxchg)
{
    uint64_t a = get_reg(c, RAX * 8, u->size);
    uint64_t old = compare_exchange(c, c->tmp[0], u->size, a, get_reg(c, u->r1, u->size));
    flags_compare(c, a, old, u->size);
    if (a != old)
        set_reg(c, RAX * 8, u->size, old);
}
HELPER(h_lock_cmpxchg8b)
{
    uint64_t a = edx_eax(c);
    end_cmpxchg8b(c, a, compare_exchange(c, c->tmp[0], 8, a, ecx_ebx(c)));
}
HELPER(h_lock_cmpxchg16b)
{
    uint64_t at = c->tmp[0], low = c->gpr[RAX], high = c->gpr[RDX];
    struct soft_locked l;
    bool equal;
    if (at & 15)
        soft_raise_error(c, VEC_GP, 0);
    if (soft_lock(c, at, 16, &l)) {
        __asm__ volatile("lock cmpxchg16b %1"
                         : "=@ccz"(equal), "+m"(*(mem8(*)[16])l.host), "+a"(low), "+d"(high)
                         : "b"(c->gpr[RBX]), "c"(c->gpr[RCX])
                         : "memory");
    } else { /* the caller's, or watched by a debugger */
        equal = compare_pair(c, at, &low, &high);
    }
    soft_unlock(c, &l);
    end_cmpxchg16b(c, equal, low, high);
}
