/* Ids of operations: what the decoder gives a micro-op. The rows are table.h's. */
#ifndef SOFT_OPERATIONS_H
#define SOFT_OPERATIONS_H

#include "soft/ops/uop.h"

enum { ALU_ADD, ALU_OR, ALU_ADC, ALU_SBB, ALU_AND, ALU_SUB, ALU_XOR, ALU_CMP, ALU_TEST, ALU_OPS };
enum { UN_INC, UN_DEC, UN_NEG, UN_NOT, UN_OPS };
enum { SH_ROL, SH_ROR, SH_RCL, SH_RCR, SH_SHL, SH_SHR, SH_SAL, SH_SAR, SH_OPS };
enum { FUSE_CMP, FUSE_TEST, FUSE_OPS };

/* OP_<name> is the id of a family's first operation. 0 is none. */
enum {
    OP_NONE,
#define OPERATION(name, operators, sizes, flags, forms, emitter)                                                        \
    OP_##name, OP_LAST_##name = OP_##name + (operators) * (sizes) * (flags) * (forms) - 1,
#include "soft/ops/table.h"
    OP_COUNT
};
_Static_assert(OP_COUNT <= UINT16_MAX, "a block keeps ids in 16 bits");

enum {
#define OPERATION(name, operators, sizes, flags, forms, emitter) FAMILY_##name,
#include "soft/ops/table.h"
    FAMILIES
};
enum {
#define OPERATION(name, operators, sizes, flags, forms, emitter)                                                        \
    SIZES_##name = (sizes), FLAGS_##name = (flags), FORMS_##name = (forms),
#include "soft/ops/table.h"
};

/* Features of CPUID that decide how bytes are decoded; the first is everybody's. */
enum {
    FEATURE_ALWAYS,
#define FEATURE(name, leaf, index, register, bit) FEATURE_##name,
#include "soft/ops/table.h"
    FEATURES
};
_Static_assert(FEATURES <= 24, "MODE_FEATURE()");

/* One of a family. An index of a dimension that the family does not have is 0. */
#define OP_OF(name, op, size, dead, form)                                                                               \
    (OP_##name + ((((unsigned)(op) * SIZES_##name + (unsigned)(size)) * FLAGS_##name + (unsigned)(dead)) * FORMS_##name + \
                  (unsigned)(form)))
#define OP_SIZED(name, size) OP_OF(name, 0, size, 0, 0)
#define OP_FORMED(name, size, form) OP_OF(name, 0, size, 0, form)

/* The same, from an id. */
struct variant {
    uint16_t op;
    uint8_t size, form;
    bool flags; /* they are wanted */
};
unsigned op_family(unsigned op);
struct variant op_variant(unsigned op);

/* The interpreter's column (interp/handlers.c); NULL: no such operation. */
uop_fn op_handler(unsigned op);

#endif
