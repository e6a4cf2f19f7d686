/* Ids of operations: their families. */
#include "soft/ops/operations.h"

struct family {
    uint16_t first;
    uint8_t sizes, flags, forms;
};
static const struct family families[FAMILIES] = {
#define OPERATION(name, operators, sizes, flags, forms, emitter) {OP_##name, (sizes), (flags), (forms)},
#include "soft/ops/table.h"
};

static const uint8_t family_of[OP_COUNT] = {
#define OPERATION(name, operators, sizes, flags, forms, emitter) [OP_##name ... OP_LAST_##name] = FAMILY_##name,
#include "soft/ops/table.h"
};
_Static_assert(FAMILIES <= UINT8_MAX, "family_of");

unsigned op_family(unsigned op) { return family_of[op]; }

struct variant op_variant(unsigned op)
{
    const struct family *f = &families[family_of[op]];
    unsigned n = op - f->first;
    struct variant v = {.form = (uint8_t)(n % f->forms)};
    n /= f->forms;
    v.flags = n % f->flags == 0;
    n /= f->flags;
    v.size = (uint8_t)(n % f->sizes);
    v.op = (uint16_t)(n / f->sizes);
    return v;
}
