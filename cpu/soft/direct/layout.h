/* What the core and the programs of cpu/runner/ agree on: where our own two pages stand in a runner's address space, what
 * is in them, and which descriptors the runner begins with. */
#ifndef SOFT_DIRECT_LAYOUT_H
#define SOFT_DIRECT_LAYOUT_H

#include <stdint.h>

/* Our pages. A guest program that maps something here is executed in the core. The host's Linux gives programs addresses
 * below RUNNER_END. */
#define RUNNER_GATE 0x6A0000000000ull
#define RUNNER_COMMANDS (RUNNER_GATE + 0x1000)
#define RUNNER_OWN_END (RUNNER_GATE + 0x2000)
#define RUNNER_END 0x7FFFFFFFF000ull
#define RUNNER_LOWEST 0x10000ull /* vm.mmap_min_addr: nothing below is mapped for a runner */

enum { RUNNER_MEMORY_FD = 3, RUNNER_COMMANDS_FD = 4 };

/* A system call of the mapper: mmap(), munmap() or mprotect() with its six arguments. */
struct runner_command {
    uint64_t number, arguments[6];
};
enum { RUNNER_MAX_COMMANDS = 72 };
/* The page of commands: the runner sees it read-only. */
struct runner_page {
    uint64_t count;
    struct runner_command commands[RUNNER_MAX_COMMANDS];
};
_Static_assert(sizeof(struct runner_page) <= 4096, "one page");

/* What a mapper's RBX holds when it stops for the first time is the process id of the other half; what RCX holds then: */
enum { RUNNER_CPUID_FAULTS = 1, RUNNER_LANDLOCK = 2, RUNNER_NO_TSC = 4 };

#endif
