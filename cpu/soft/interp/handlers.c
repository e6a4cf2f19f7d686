/* The interpreter's column of the table of operations: the handler of each row, and those of the rows that are
 * instructions. */
#include "soft/mmu/access.h"
#include "soft/interp/exec.h"
#include "soft/ops/operations.h"

#define RESULT(value) set_reg(c, u->r0, u->size, value)
#define INSTRUCTION(name, map, prefix, opcode, feature, flags, emitter, ...)                                            \
    HANDLER(name)                                                                                               \
    {                                                                                                                  \
        uint64_t v = get_reg(c, u->r1, u->size);                                                                       \
        __VA_ARGS__                                                                                                    \
        NEXT;                                                                                                          \
    }
#define VEX_INSTRUCTION(name, map, prefix, opcode, group, feature, flags, ...)                                          \
    HANDLER(name)                                                                                                      \
    {                                                                                                                  \
        uint64_t v = get_reg(c, u->r1, u->size), w UNUSED = get_reg(c, u->base, u->size);                              \
        __VA_ARGS__                                                                                                    \
        NEXT;                                                                                                          \
    }
#define UNUSED __attribute__((unused))
#include "soft/ops/table.h"

static const struct {
    uop_fn one;           /* of a family of one */
    const uop_fn *of;     /* of others */
    uint16_t first;
} families[FAMILIES] = {
#define OPERATION(name, operators, sizes, flags, forms, emitter) {NULL, (const uop_fn *)name, OP_##name},
#define SINGLE(name, emitter) {name, NULL, OP_##name},
#include "soft/ops/table.h"
};

uop_fn op_handler(unsigned op)
{
    if (op == OP_NONE)
        return NULL;
    unsigned n = op_family(op);
    return families[n].one ? families[n].one : families[n].of[op - families[n].first];
}
