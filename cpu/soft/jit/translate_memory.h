/* Memory for host code: what translate.c fills. */
#ifndef SOFT_TRANSLATE_MEMORY_H
#define SOFT_TRANSLATE_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "soft/jit/translate.h"

enum { HOST_CODE_SIZE = 128 << 20 };
extern const struct soft_supply host_code_supply;
/* Code comes in pieces of memory, those for what runs and those for what rarely does apart: so what runs stands close together. */
enum { HOST_CODE_PIECE = 64 << 10 };
struct host_piece {
    size_t at, end; /* offsets: the next free byte, and behind the last */
};
struct host_code {
    uint8_t *base;       /* where code is written; NULL: there is no memory */
    const uint8_t *runs; /* where it runs: the same memory */
    size_t used, touched;
    size_t ready; /* up to there memory was made ready to be written and run */
    struct host_piece hot, cold;
    bool shares; /* memory, with other VMs (soft_share()) */
};
/* A new piece of memory. False: no room is left. */
bool host_code_next_piece(struct host_code *code, struct host_piece *piece);

#endif
