/* Memory for host code: what translate.c fills. */
#ifndef SOFT_TRANSLATE_MEMORY_H
#define SOFT_TRANSLATE_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "soft/jit/translate.h"

enum { HOST_CODE_SIZE = 128 << 20 };
extern const struct soft_supply host_code_supply;
struct host_code {
    uint8_t *base;       /* where code is written; NULL: there is no memory */
    const uint8_t *runs; /* where it runs: the same memory */
    size_t used, touched;
    size_t ready; /* up to there memory was made ready to be written and run */
    bool shares; /* memory, with other VMs (soft_share()) */
};
/* `size` more bytes are about to be written. */
void host_code_make_ready(struct host_code *code, size_t size);

#endif
