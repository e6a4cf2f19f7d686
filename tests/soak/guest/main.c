/* The soak's workload: `work PART SEED` prints digests of what a part computed, `work data SEED BYTES` writes text. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "work.h"

uint64_t mix_bytes(uint64_t digest, const void *data, size_t size)
{
    const uint8_t *bytes = data;
    for (size_t i = 0; i < size; i++)
        digest = mix(digest, bytes[i]);
    return digest;
}

void report(const char *part, const char *check, uint64_t digest)
{
    printf("%s.%s %016llx\n", part, check, (unsigned long long)digest);
    fflush(stdout);
}

void report_of_vendor(const char *part, const char *check, uint64_t digest)
{
    uint32_t name[4] = { 0 }, highest;
    char text[64];
    __cpuid(0, highest, name[0], name[2], name[1]);
    snprintf(text, sizeof text, "%s@%.12s", check, (const char *)name);
    report(part, text, digest);
}

_Noreturn void fail(const char *what)
{
    printf("FAILED %s: %s\n", what, strerror(errno));
    fflush(stdout);
    _exit(1);
}

/* Lines of words and numbers, which compress as text does. */
void work_data(uint64_t seed, uint64_t size)
{
    static const char *const words[] = { "vector", "page", "ring", "clock", "queue", "gate", "segment", "descriptor",
                                         "interrupt", "exit", "slot", "table" };
    struct random r = { seed };
    uint64_t written = 0;
    while (written < size) {
        uint64_t n = next(&r);
        const char *one = words[(n >> 8) % LENGTH(words)], *two = words[(n >> 16) % LENGTH(words)];
        int length = n % 5 == 0 ? printf("%llu %s\n", (unsigned long long)(n >> 20), one)
                                : printf("%s %s %u\n", one, two, (unsigned)(n >> 52));
        written += (uint64_t)length;
    }
}

static const struct {
    const char *name;
    void (*function)(uint64_t seed);
} parts[] = {
    { "forks", work_forks },   { "leaf", work_leaf },         { "signals", work_signals }, { "traps", work_traps },
    { "threads", work_threads }, { "floating", work_floating }, { "vector", work_vector },   { "code", work_code },
};

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "work PART SEED | work data SEED BYTES\n");
        return 2;
    }
    uint64_t seed = strtoull(argv[2], NULL, 0);
    if (!strcmp(argv[1], "data")) {
        work_data(seed, argc > 3 ? strtoull(argv[3], NULL, 0) : 4096);
        return 0;
    }
    for (size_t i = 0; i < LENGTH(parts); i++)
        if (!strcmp(argv[1], parts[i].name)) {
            parts[i].function(seed);
            return 0;
        }
    fprintf(stderr, "work: no part named %s\n", argv[1]);
    return 2;
}
