/* Emitters: host code of one micro-op, the translator's column of the table of operations (ops/table.h).
 *
 * False: this one is not translated (its registers, its immediate); nothing was emitted that matters. A block's end sets
 * g->ended. The state after it is to the last byte that after the handler, which goes on in its place when a TLB misses
 * (gen_tlb()), so nothing may be changed before an emitter's last access.
 */
#ifndef SOFT_EMITTERS_H
#define SOFT_EMITTERS_H

#include "soft/jit/translate_gen.h"

#define EMITTER(name)                                                                                                   \
    bool emit_##name(__attribute__((unused)) struct gen *g, __attribute__((unused)) const struct uop *u,                \
                     __attribute__((unused)) struct variant v)

#define OPERATION(name, operators, sizes, flags, forms, emitter) EMITTER(emitter);
#include "soft/ops/table.h"

typedef bool (*emitter)(struct gen *g, const struct uop *u, struct variant v);
emitter op_emitter(unsigned op); /* NULL: handlers alone do that */

/* A whole register, not AH... and not the zero. */
static inline bool ok_reg(unsigned offset) { return (offset & 7) == 0 && offset != OFF_ZERO; }
/* The immediate, sign-extended from its operand size (log2 of bytes). */
static inline int64_t imm_of(const struct uop *u, unsigned size)
{
    return size == 0 ? (int8_t)u->imm : size == 1 ? (int16_t)u->imm : size == 2 ? (int32_t)u->imm : (int64_t)u->imm;
}
/* The flags of a fused comparison, all stored (emit_branch.c). */
void emit_compare_flags(struct gen *g, const struct uop *u, unsigned op);

#endif
