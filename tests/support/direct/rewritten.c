/* A guest program whose code is rewritten behind its back: by its kernel, by a device, by itself through another mapping. Each
 * time the page has just been executed as it was, and what comes into it asks what processor this is, which must be the
 * guest's. `rewritten DISK FILE`: both begin with the page `rewritten image` writes. Static, x86-64 Linux. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PAGE = 4096, ROUNDS = 6, OFTEN = 500 };

/* A loop, then what is asked for in place of NOPs; RAX. */
static const uint8_t before[] = {0x53, 0xB9, 100, 0, 0, 0, 0xFF, 0xC9, 0x75, 0xFC, 0x31, 0xC9}; /* push rbx; loop; xor ecx, ecx */
static const uint8_t after[] = {0x48, 0xC1, 0xE3, 32, 0x48, 0x09, 0xD8, 0x5B, 0xC3};            /* shl rbx, 32; or rax, rbx; pop rbx; ret */
enum { QUESTION = sizeof before, QUESTION_BYTES = 10 };
static const uint8_t plain[QUESTION_BYTES] = {0xB8, 7, 0, 0, 0, 0x31, 0xDB, 0x90, 0x90, 0x90};
/* CPUID of leaf 80000002h, part of the processor's name; XGETBV of XCR0. */
static const uint8_t questions[][QUESTION_BYTES] = {
    {0xB8, 2, 0, 0, 0x80, 0x0F, 0xA2, 0x90, 0x90, 0x90},
    {0x0F, 0x01, 0xD0, 0x31, 0xDB, 0x90, 0x90, 0x90, 0x90, 0x90},
};
enum { QUESTIONS = sizeof questions / sizeof questions[0] };

static void make(uint8_t *page, const uint8_t *question)
{
    memset(page, 0xC3, PAGE);
    memcpy(page, before, sizeof before);
    memcpy(page + QUESTION, question, QUESTION_BYTES);
    memcpy(page + QUESTION + QUESTION_BYTES, after, sizeof after);
}

static uint64_t call(const uint8_t *p) { return ((uint64_t (*)(void))(uintptr_t)p)(); }

static void check(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static int disk, file;
static uint8_t *run, *writable, *mixed; /* one page of memory executable and writable at two addresses; one with both rights */
static int memory;                      /* the first */

/* Ways to bring a page with a question to where `plain` has been running; they return what to call. */
static const uint8_t *by_store(const uint8_t *page, int n)
{
    (void)n;
    memcpy(writable + QUESTION, page + QUESTION, QUESTION_BYTES);
    return run;
}
static const uint8_t *by_read(const uint8_t *page, int n)
{
    (void)n;
    int ends[2];
    check(pipe(ends) == 0 && write(ends[1], page, PAGE) == PAGE, "pipe");
    check(read(ends[0], writable, PAGE) == PAGE, "read");
    close(ends[0]);
    close(ends[1]);
    return run;
}
static const uint8_t *by_write(const uint8_t *page, int n)
{
    (void)n;
    check(pwrite(memory, page, PAGE, 0) == PAGE, "write");
    return run;
}
static const uint8_t *by_debugger(const uint8_t *page, int n)
{
    (void)n;
    struct iovec from = {(void *)(uintptr_t)page, PAGE}, to = {mixed, PAGE};
    check(process_vm_writev(getpid(), &from, 1, &to, 1, 0) == PAGE, "process_vm_writev");
    return mixed;
}
static const uint8_t *by_disk(const uint8_t *page, int n)
{
    (void)page;
    check(pread(disk, writable, PAGE, (off_t)n * PAGE) == PAGE, "disk");
    return run;
}
static const uint8_t *by_disk_in_place(const uint8_t *page, int n)
{
    (void)page;
    check(pread(disk, mixed, PAGE, (off_t)n * PAGE) == PAGE, "disk");
    return mixed;
}
static const uint8_t *by_share(const uint8_t *page, int n)
{
    (void)page;
    check(pread(file, writable, PAGE, (off_t)n * PAGE) == PAGE, "share");
    return run;
}

static const struct { const char *name; const uint8_t *(*rewrite)(const uint8_t *page, int n); } ways[] = {
    {"store", by_store}, {"read", by_read}, {"write", by_write}, {"debugger", by_debugger},
    {"disk", by_disk}, {"disk, in place", by_disk_in_place}, {"share", by_share}};

static int image(void)
{
    static uint8_t page[PAGE];
    for (int n = 0; n < QUESTIONS; n++) {
        make(page, questions[n]);
        check(fwrite(page, PAGE, 1, stdout) == 1, "image");
    }
    return 0;
}

/* At addresses that were not used before: nothing is known of them. */
static void map(void)
{
    check((memory = memfd_create("code", 0)) >= 0 && ftruncate(memory, PAGE) == 0, "memfd");
    writable = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    run = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, memory, 0);
    mixed = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(writable != MAP_FAILED && run != MAP_FAILED && mixed != MAP_FAILED, "mmap");
}

/* Not the last function: those of libc behind that share its page, and some have to be executed in the core. */
__attribute__((noinline)) static void rewrite(unsigned way, int n)
{
    static _Alignas(4096) uint8_t page[PAGE];
    map();
    make(writable, plain);
    make(mixed, plain);
    uint64_t sum = 0;
    for (int i = 0; i < OFTEN; i++)
        sum += call(run) + call(mixed);
    make(page, questions[n]);
    const uint8_t *p = ways[way].rewrite(page, n);
    uint64_t answers[3];
    for (int i = 0; i < 3; i++)
        answers[i] = call(p);
    printf("%s %d: %lx %lx %lx after %lx\n", ways[way].name, n, answers[0], answers[1], answers[2], sum);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 2 && !strcmp(argv[1], "image"))
        return image();
    check(argc == 3, "rewritten DISK FILE");
    check((disk = open(argv[1], O_RDONLY | O_DIRECT)) >= 0, argv[1]);
    check((file = open(argv[2], O_RDONLY | O_DIRECT)) >= 0, argv[2]);
    for (unsigned way = 0; way < sizeof ways / sizeof ways[0]; way++)
        for (int round = 0; round < ROUNDS; round++)
            rewrite(way, round % QUESTIONS);
    puts("done");
    return 0;
}
