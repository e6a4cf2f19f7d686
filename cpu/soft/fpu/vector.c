/* The opcode maps of MMX and SSE: a dense index of the rows that vec_*.c declare. */
#pragma GCC target("sse4.2")
#include <stdlib.h>

#include "soft/fpu/vec.h"

static const struct vec_op *by_opcode[3][4][2][256]; /* map, prefix, memory or register form, opcode */
static const struct vec_op *by_group[3][4][8];       /* opcode - 0x71, prefix, ModRM.reg */

static const struct vec_op *operations[FPU_VECTOR_OPS];
static unsigned operation_count;

static void add(struct vec_row *rows, size_t count)
{
    for (struct vec_row *r = rows; r < rows + count; r++) {
        if (operation_count == FPU_VECTOR_OPS - 1)
            abort();
        r->op.id = (uint16_t)operation_count;
        operations[operation_count++] = &r->op;
        if (r->group >= 0)
            by_group[r->opcode - 0x71][r->prefix][r->group] = &r->op;
        for (unsigned reg = 0; reg < 2 && r->group < 0; reg++)
            if (r->when == WHEN_ANY || (r->when == WHEN_REG) == (reg == 1))
                by_opcode[r->map][r->prefix][reg][r->opcode] = &r->op;
    }
}

__attribute__((constructor(FPU_VECTOR_PRIORITY))) static void make_index(void)
{
    add(vec_move_rows, vec_move_count);
    add(vec_int_rows, vec_int_count);
    add(vec_float_rows, vec_float_count);
    add(vec_text_rows, vec_text_count);
    add(vec_crypto_rows, vec_crypto_count);
}

const struct vec_op *fpu_lookup_vector(enum vec_map map, uint8_t opcode, enum vec_prefix prefix, uint8_t modrm)
{
    bool reg = modrm >= 0xC0;
    if (map == VEC_MAP_0F && opcode >= 0x71 && opcode <= 0x73)
        return reg ? by_group[opcode - 0x71][prefix][modrm >> 3 & 7] : NULL;
    return by_opcode[map][prefix][reg][opcode];
}

const struct vec_op *fpu_vector_operation(unsigned id) { return id < FPU_VECTOR_OPS ? operations[id] : NULL; }
