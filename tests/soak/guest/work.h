/* What the soak's workload shares: a generator of numbers, a digest, and one function for each part.
 *
 * Every part is a function of its seed alone: no address, no pid and no time may reach a digest. It prints lines
 * "part.check digest", which must be the same on the host and in the guest, whoever made the host's processor: what only one
 * vendor's processors do (undefined flags, the order of faults) goes to lines "part.check@VENDOR digest", which are compared
 * when guest and host have the same vendor. tests/support/oracle/vendors.c has the clauses.
 */
#ifndef WORK_H
#define WORK_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

struct random {
    uint64_t state;
};

static inline uint64_t next(struct random *r) /* splitmix64 */
{
    uint64_t z = r->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static inline uint64_t mix(uint64_t digest, uint64_t value)
{
    digest = (digest ^ value) * 0x9E3779B97F4A7C15u;
    return digest ^ digest >> 29;
}

uint64_t mix_bytes(uint64_t digest, const void *data, size_t size);
void report(const char *part, const char *check, uint64_t digest);
void report_of_vendor(const char *part, const char *check, uint64_t digest);
_Noreturn void fail(const char *what);

/* A call that must not fail. */
#define MUST(call) (__extension__({ long must_ = (long)(call); if (must_ == -1) fail(#call); must_; }))

void work_forks(uint64_t seed);
void work_leaf(uint64_t seed);
void work_signals(uint64_t seed);
void work_traps(uint64_t seed);
void work_threads(uint64_t seed);
void work_floating(uint64_t seed);
void work_vector(uint64_t seed);
void work_code(uint64_t seed);
void work_data(uint64_t seed, uint64_t size);

#endif
