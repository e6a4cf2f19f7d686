/* CMPXCHG8B and CMPXCHG16B: what they do with and without LOCK (exec_lock.c, exec_misc.c). */
#ifndef SOFT_CMPXCHG_H
#define SOFT_CMPXCHG_H

#include "soft/mmu/access.h"
#include "soft/ops/uop.h"

static inline void set_zf_only(struct soft_vcpu *c, bool zf)
{
    uint32_t f = flags_arith(c) & ~F_ZF;
    flags_set_arith(c, zf ? f | F_ZF : f);
}

static inline uint64_t edx_eax(const struct soft_vcpu *c) { return (uint64_t)REG32(RDX * 8) << 32 | REG32(RAX * 8); }
static inline uint64_t ecx_ebx(const struct soft_vcpu *c) { return (uint64_t)REG32(RCX * 8) << 32 | REG32(RBX * 8); }

/* Memory held `old`, and EDX:EAX was `expected`. */
static inline void end_cmpxchg8b(struct soft_vcpu *c, uint64_t expected, uint64_t old)
{
    set_zf_only(c, old == expected);
    if (old != expected) {
        SET32(RAX * 8, old);
        SET32(RDX * 8, old >> 32);
    }
}

/* Compare 16 bytes and write them, not as one access. Whether they were equal; what memory held. */
static inline bool compare_pair(struct soft_vcpu *c, uint64_t at, uint64_t *low, uint64_t *high)
{
    *low = load(c, at, 8);
    *high = load(c, at + 8, 8);
    bool equal = *low == c->gpr[RAX] && *high == c->gpr[RDX];
    store(c, at, 8, equal ? c->gpr[RBX] : *low);
    store(c, at + 8, 8, equal ? c->gpr[RCX] : *high);
    return equal;
}

static inline void end_cmpxchg16b(struct soft_vcpu *c, bool equal, uint64_t low, uint64_t high)
{
    set_zf_only(c, equal);
    if (!equal) {
        c->gpr[RAX] = low;
        c->gpr[RDX] = high;
    }
}

#endif
