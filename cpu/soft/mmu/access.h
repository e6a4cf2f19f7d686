/* Macros and inline functions that micro-op handlers are written with: registers, memory through the TLB, dispatch. */
#ifndef SOFT_ACCESS_H
#define SOFT_ACCESS_H

#include <string.h>

#include "soft/ops/uop.h"

#define REG8(o) (*(uint8_t *)((char *)c + (o)))
#define REG16(o) (*(uint16_t *)((char *)c + (o)))
#define REG32(o) (*(uint32_t *)((char *)c + (o)))
#define REG64(o) (*(uint64_t *)((char *)c + (o)))
/* Writing 32 bits clears the upper half. */
#define SET8(o, v) (REG8(o) = (uint8_t)(v))
#define SET16(o, v) (REG16(o) = (uint16_t)(v))
#define SET32(o, v) (REG64(o) = (uint32_t)(v))
#define SET64(o, v) (REG64(o) = (uint64_t)(v))
#define UINT(bits) uint##bits##_t
#define SINT(bits) int##bits##_t

/* Effective addresses in 64-bit mode; everything else comes as base OFF_T0. */
#define EA_BD (REG64(u->base) + (uint64_t)(int64_t)u->disp)
#define EA_BI (REG64(u->base) + (REG64(u->index) << u->scale) + (uint64_t)(int64_t)u->disp)

#define NEXT return u[1].fn(c, u + 1, rip)
#define SKIP(n) return u[n].fn(c, u + (n), rip)

/* Make state exact before a call that may raise; UNSYNC after it returned. */
#define SYNC() (c->rip = rip + u->off, c->budget -= u->idx, c->access_ss = u->seg == SEG_SS)
#define UNSYNC() (c->budget += u->idx)

/* Whether a TLB entry allows the access to [a, a+size); *p is then its host address. */
static inline bool tlb_hit(const struct soft_vcpu *c, uint64_t a, unsigned size, enum soft_kind kind, uint8_t **p)
{
    const struct soft_tlb_entry *e = (const struct soft_tlb_entry *)((const char *)c->tlb->e[kind] +
                                                                     ((a >> 8) & ((TLB_SIZE - 1) << 4)));
    *p = (uint8_t *)(uintptr_t)(a + e->addend);
    return SOFT_LIKELY(((a + size - 1) & ~0xFFFull) == e->tag);
}

/* For helpers that have a stack frame anyway. State must be in SYNC. */
static inline uint64_t load(struct soft_vcpu *c, uint64_t a, unsigned size)
{
    uint8_t *p;
    if (!tlb_hit(c, a, size, ACCESS_READ, &p))
        return soft_load_slow(c, a, size);
    switch (size) {
    case 1: return MEM(8, p);
    case 2: return MEM(16, p);
    case 4: return MEM(32, p);
    default: return MEM(64, p);
    }
}
static inline void store(struct soft_vcpu *c, uint64_t a, unsigned size, uint64_t v)
{
    uint8_t *p;
    if (!tlb_hit(c, a, size, ACCESS_WRITE, &p)) {
        soft_store_slow(c, a, size, v);
        return;
    }
    switch (size) {
    case 1: MEM(8, p) = (uint8_t)v; break;
    case 2: MEM(16, p) = (uint16_t)v; break;
    case 4: MEM(32, p) = (uint32_t)v; break;
    default: MEM(64, p) = v; break;
    }
}

/* The same of any number of bytes. */
static inline void load_any(struct soft_vcpu *c, uint64_t at, void *to, unsigned size)
{
    uint8_t *p;
    if (tlb_hit(c, at, size, ACCESS_READ, &p))
        memcpy(to, p, size);
    else
        soft_load_bytes(c, at, to, size);
}
static inline void store_any(struct soft_vcpu *c, uint64_t at, const void *from, unsigned size)
{
    uint8_t *p;
    if (tlb_hit(c, at, size, ACCESS_WRITE, &p))
        memcpy(p, from, size);
    else
        soft_store_bytes(c, at, from, size);
}

static inline uint64_t get_reg(struct soft_vcpu *c, unsigned offset, unsigned size)
{
    switch (size) {
    case 1: return REG8(offset);
    case 2: return REG16(offset);
    case 4: return REG32(offset);
    default: return REG64(offset);
    }
}
static inline void set_reg(struct soft_vcpu *c, unsigned offset, unsigned size, uint64_t v)
{
    switch (size) {
    case 1: SET8(offset, v); break;
    case 2: SET16(offset, v); break;
    case 4: SET32(offset, v); break;
    default: SET64(offset, v); break;
    }
}

/* An unmasked exception of a vector operation. */
static inline _Noreturn void raise_simd(struct soft_vcpu *c) { soft_raise(c, c->cr4 & CR4_OSXMMEXCPT ? VEC_XM_ : VEC_UD); }

/* Flags of a - b. */
static inline void flags_compare(struct soft_vcpu *c, uint64_t a, uint64_t b, unsigned size)
{
    uint64_t r = a - b, borrow = (~a & b) | ((~a | b) & r);
    c->lf[0] = (uint64_t)sign_extend(r, size);
    c->lf[1] = borrow << (64 - size * 8);
    c->lf[2] = borrow & 8;
}
/* A block's end: the instruction is complete and c->rip becomes `target`. */
#define LEAVE_IF_DUE(target)                                                                                           \
    do {                                                                                                               \
        if (SOFT_UNLIKELY((c->budget -= u->idx + 1) <= 0 || __atomic_load_n(&c->attention, __ATOMIC_RELAXED))) {       \
            c->rip = (target);                                                                                         \
            return;                                                                                                    \
        }                                                                                                              \
    } while (0)
#define JUMP_CHARGED(target)                                                                                           \
    do {                                                                                                               \
        uint64_t to_ = (target);                                                                                       \
        unsigned hash_ = jump_hash(to_);                                                                               \
        struct uop *code_ = c->jumps[hash_].code;                                                                      \
        if (SOFT_LIKELY(c->jumps[hash_].linear == to_))                                                                \
            return code_->fn(c, code_, to_);                                                                           \
        c->rip = to_;                                                                                                  \
        return block_enter(c, u, rip);                                                                                 \
    } while (0)
/* To an address that is only known now. */
#define JUMP(target)                                                                                                   \
    do {                                                                                                               \
        uint64_t target_ = (target);                                                                                   \
        LEAVE_IF_DUE(target_);                                                                                         \
        JUMP_CHARGED(target_);                                                                                         \
    } while (0)
/* To a fixed successor: linked if it is in the block's page, else through the jump cache. */
#define GO(which, target)                                                                                              \
    do {                                                                                                               \
        uint64_t target_ = (target);                                                                                   \
        LEAVE_IF_DUE(target_);                                                                                         \
        struct uop *linked_ = LINKS(u)->which;                                                                         \
        if (SOFT_LIKELY(linked_ != NULL))                                                                              \
            return linked_->fn(c, linked_, target_);                                                                   \
        if (((target_ ^ rip) & ~0xFFFull) == 0) {                                                                      \
            c->rip = target_;                                                                                          \
            return block_link_##which(c, u, rip);                                                                      \
        }                                                                                                              \
        JUMP_CHARGED(target_);                                                                                         \
    } while (0)
#define GO_TAKEN() GO(taken, rip + (uint64_t)LINKS(u)->delta)
#define GO_NEXT() GO(next, rip + u->off + u->len)
/* After a store's slow path: leave the block if code was changed by it. */
#define AFTER_SLOW_STORE()                                                                                             \
    do {                                                                                                               \
        if (SOFT_UNLIKELY(block_code_changed(c))) {                                                                    \
            c->rip = rip + u->off + u->len;                                                                            \
            c->budget -= u->idx + 1;                                                                                   \
            return block_enter(c, u, rip);                                                                             \
        }                                                                                                              \
    } while (0)

/* Handlers with one memory access are written twice: the fast one goes to `name`_slow when the TLB misses. */
#define FAST_LOAD(name, bits, EA)                                                                                      \
    uint64_t ea = EA;                                                                                                  \
    uint8_t *p;                                                                                                        \
    if (!tlb_hit(c, ea, (bits) / 8, ACCESS_READ, &p))                                                                  \
        return name##_slow(c, u, rip);                                                                                 \
    UINT(bits) m = MEM(bits, p);
#define SLOW_LOAD(bits, EA)                                                                                            \
    SYNC();                                                                                                            \
    UINT(bits) m = (UINT(bits))soft_load_slow(c, EA, (bits) / 8);                                                      \
    UNSYNC();
/* BODY uses m, the value loaded. */
#define LOAD_HANDLER(name, bits, EA, BODY)                                                                             \
    static SLOW_HANDLER(name##_slow)                                                                                   \
    {                                                                                                                  \
        SLOW_LOAD(bits, EA)                                                                                            \
        BODY;                                                                                                          \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    HANDLER(name)                                                                                                      \
    {                                                                                                                  \
        FAST_LOAD(name, bits, EA)                                                                                      \
        BODY;                                                                                                          \
        NEXT;                                                                                                          \
    }
/* Stores VALUE; AFTER is done once the store has succeeded. */
#define STORE_HANDLER(name, bits, EA, VALUE, AFTER)                                                                    \
    static SLOW_HANDLER(name##_slow)                                                                                   \
    {                                                                                                                  \
        SYNC();                                                                                                        \
        soft_store_slow(c, EA, (bits) / 8, (UINT(bits))(VALUE));                                                       \
        UNSYNC();                                                                                                      \
        AFTER;                                                                                                         \
        AFTER_SLOW_STORE();                                                                                            \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    HANDLER(name)                                                                                                      \
    {                                                                                                                  \
        uint64_t ea = EA;                                                                                              \
        uint8_t *p;                                                                                                    \
        if (!tlb_hit(c, ea, (bits) / 8, ACCESS_WRITE, &p))                                                             \
            return name##_slow(c, u, rip);                                                                             \
        MEM(bits, p) = (UINT(bits))(VALUE);                                                                            \
        AFTER;                                                                                                         \
        NEXT;                                                                                                          \
    }

#endif
