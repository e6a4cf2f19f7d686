/* What RDRAND and RDSEED yield: the host's entropy, or a stream that a seed determines. */
#ifndef SOFT_ENTROPY_H
#define SOFT_ENTROPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The whole state: a seeded stream goes on where it was from these words alone. */
struct soft_entropy {
    uint64_t seeded, seed, position; /* position: bytes drawn */
};

void soft_entropy_fill(struct soft_entropy *entropy, void *buffer, size_t size);

#endif
