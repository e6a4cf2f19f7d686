/* Code that is written while it is used: in place, across pages, through another mapping, by a thread, by read(2). */
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "work.h"

typedef uint64_t (*generated)(uint64_t);

/* A chain of random operations on RAX that begins with RDI's value; returns its length. */
static size_t generate(uint8_t *at, struct random *r)
{
    static const struct {
        uint8_t bytes[8], size;
    } operations[] = {
        { { 0x48, 0x05 }, 2 },             /* add rax, imm32 */
        { { 0x48, 0x35 }, 2 },             /* xor rax, imm32 */
        { { 0x48, 0x69, 0xC0 }, 3 },       /* imul rax, rax, imm32 */
        { { 0x48, 0x2D }, 2 },             /* sub rax, imm32 */
        { { 0x48, 0xC1, 0xC0, 7, 0x05 }, 5 }, /* rol rax, 7; add eax, imm32 */
    };
    size_t n = 0;
    memcpy(at, (uint8_t[]){ 0x48, 0x89, 0xF8 }, 3);
    n += 3;
    for (unsigned i = 0, count = 1 + next(r) % 12; i < count; i++) {
        unsigned k = next(r) % LENGTH(operations);
        uint32_t immediate = (uint32_t)next(r) | 1;
        memcpy(at + n, operations[k].bytes, operations[k].size);
        n += operations[k].size;
        memcpy(at + n, &immediate, 4);
        n += 4;
    }
    at[n++] = 0xC3;
    return n;
}

static uint8_t *code_pages(int fd, int protection)
{
    void *at = mmap(NULL, 3 * 4096, protection, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        fail("mmap");
    return at;
}

/* Written and run through one mapping; every third place lies across a page boundary. */
static uint64_t in_place(uint64_t seed)
{
    uint8_t *at = code_pages(-1, PROT_READ | PROT_WRITE | PROT_EXEC);
    struct random r = { seed };
    uint64_t digest = seed;
    for (unsigned i = 0; i < 400; i++) {
        uint8_t *place = at + (i % 3 ? next(&r) % 8192 : 4096 - 1 - next(&r) % 40);
        size_t size = generate(place, &r);
        for (unsigned k = 0; k < 60; k++)
            digest = mix(digest, ((generated)place)(k));
        memcpy(place + size - 5, &(uint32_t){ (uint32_t)next(&r) }, 4); /* the last immediate alone */
        for (unsigned k = 0; k < 3; k++)
            digest = mix(digest, ((generated)place)(k));
    }
    munmap(at, 3 * 4096);
    return digest;
}

/* What was written at another linear address is fetched after this (SDM 3A 9.1.3). */
static void serialize(void)
{
    uint32_t leaf = 0;
    __asm__ volatile("cpuid" : "+a"(leaf) : : "rbx", "rcx", "rdx", "memory");
}

/* Written through one mapping of a file, run through another; also written by the kernel. */
static uint64_t aliased(uint64_t seed)
{
    int fd = (int)MUST(memfd_create("code", 0)), ends[2];
    MUST(ftruncate(fd, 3 * 4096));
    MUST(pipe(ends));
    uint8_t *writable = code_pages(fd, PROT_READ | PROT_WRITE), *runnable = code_pages(fd, PROT_READ | PROT_EXEC);
    struct random r = { seed };
    uint64_t digest = seed;
    for (unsigned i = 0; i < 300; i++) {
        uint8_t buffer[256];
        size_t at = i % 3 ? next(&r) % 8192 : 4096 - 1 - next(&r) % 40, size = generate(buffer, &r);
        if (i & 1) {
            memcpy(writable + at, buffer, size);
        } else if (i & 2) {
            MUST(pwrite(fd, buffer, size, (off_t)at));
        } else {
            MUST(write(ends[1], buffer, size));
            MUST(read(ends[0], writable + at, size));
        }
        serialize();
        for (unsigned k = 0; k < 60; k++)
            digest = mix(digest, ((generated)(runnable + at))(k));
    }
    munmap(writable, 3 * 4096);
    munmap(runnable, 3 * 4096);
    close(fd);
    close(ends[0]);
    close(ends[1]);
    return digest;
}

/* Written by one thread, run by another, in turn. */
static struct {
    uint8_t *at;
    pthread_barrier_t written, ran;
    uint64_t seed;
} shared;

enum { TURNS = 100 };

static void *writer(void *argument)
{
    struct random r = { shared.seed };
    for (unsigned i = 0; i < TURNS; i++) {
        generate(shared.at + i % 3 * 2000, &r);
        pthread_barrier_wait(&shared.written);
        pthread_barrier_wait(&shared.ran);
    }
    return argument;
}

static uint64_t by_thread(uint64_t seed)
{
    pthread_t thread;
    uint64_t digest = seed;
    shared.at = code_pages(-1, PROT_READ | PROT_WRITE | PROT_EXEC);
    shared.seed = seed;
    pthread_barrier_init(&shared.written, NULL, 2);
    pthread_barrier_init(&shared.ran, NULL, 2);
    if (pthread_create(&thread, NULL, writer, NULL))
        fail("pthread_create");
    for (unsigned i = 0; i < TURNS; i++) {
        pthread_barrier_wait(&shared.written);
        serialize();
        for (unsigned k = 0; k < 60; k++)
            digest = mix(digest, ((generated)(shared.at + i % 3 * 2000))(k));
        pthread_barrier_wait(&shared.ran);
    }
    pthread_join(thread, NULL);
    munmap(shared.at, 3 * 4096);
    return digest;
}

void work_code(uint64_t seed)
{
    report("code", "in_place", in_place(seed));
    report("code", "aliased", aliased(seed));
    report("code", "by_thread", by_thread(seed));
}
