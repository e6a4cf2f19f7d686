/* What the core and the programs of cpu/runner/ agree on: where our own pages stand in a runner's address space, what is in
 * them, which descriptors the runner begins with, and the two system calls that its guest half has. Also read by gate.S. */
#ifndef SOFT_DIRECT_LAYOUT_H
#define SOFT_DIRECT_LAYOUT_H

/* Our pages: code that nobody can write, what the core tells (read-only in the runner), and the frame. A guest program that
 * maps something here is executed in the core. The host's Linux gives programs addresses below RUNNER_END. */
#define RUNNER_GATE 0x6A0000000000
#define RUNNER_REST RUNNER_GATE /* an instruction that faults: where a guest half goes that has to show that it goes where it should */
#define RUNNER_COMMANDS 0x6A0000001000
#define RUNNER_FRAME 0x6A0000002000
#define RUNNER_OWN_END 0x6A0000008000
#define RUNNER_END 0x7FFFFFFFF000
#define RUNNER_LOWEST 0x10000 /* vm.mmap_min_addr: nothing below is mapped for a runner */

/* The guest half may stop (close_range(), which is never carried out once guest code is there) and return from a signal, each
 * with this in R10, which neither call has a use for: all else that a program calls is the guest's affair. */
#define RUNNER_STOP 436
#define RUNNER_RETURN 15
#define RUNNER_MAGIC_LOW 0x5F1D6B27
#define RUNNER_MAGIC_HIGH 0x71C3A94E
#define RUNNER_MAGIC 0x71C3A94E5F1D6B27

#define RUNNER_LISTENER_FD 5
#define RUNNER_ANSWER 0xC0182101 /* SECCOMP_IOCTL_NOTIF_SEND */

/* Offsets in struct runner_page. */
#define PAGE_RESUME 4
#define PAGE_COUNT 8
#define PAGE_STACK 16
#define PAGE_FLAGS 24
#define PAGE_FS 32
#define PAGE_GS 40
#define PAGE_ANSWER 48
#define PAGE_LIST 72

#ifndef __ASSEMBLER__
#include <stddef.h>
#include <stdint.h>

enum { RUNNER_MEMORY_FD = 3, RUNNER_PAGES_FD = 4, RUNNER_SOCKET_FD = 6 };

/* A system call of the mapper: mmap(), munmap() or mprotect() with its six arguments. */
struct runner_command {
    uint64_t number, arguments[6];
};
enum { RUNNER_MAX_COMMANDS = 71 };
/* What the core tells: the runner sees this page read-only. */
struct runner_page {
    uint32_t turn;   /* a futex: the mapper carries out `list` when it changes */
    uint32_t resume; /* ... and then answers the stop of the guest half by `answer`, instead of telling the core */
    uint64_t count;  /* of commands; as the runner begins: whether it is to have breakpoints */
    uint64_t stack, flags, fs_base, gs_base; /* of the guest half, as it goes on: its frame, and what no frame holds */
    struct runner_answer { /* struct seccomp_notif_resp */
        uint64_t id;
        int64_t value;
        int32_t error;
        uint32_t flags;
    } answer;
    struct runner_command list[RUNNER_MAX_COMMANDS];
};
_Static_assert(sizeof(struct runner_page) <= 4096, "one page");
_Static_assert(offsetof(struct runner_page, resume) == PAGE_RESUME && offsetof(struct runner_page, count) == PAGE_COUNT &&
                   offsetof(struct runner_page, stack) == PAGE_STACK && offsetof(struct runner_page, flags) == PAGE_FLAGS &&
                   offsetof(struct runner_page, fs_base) == PAGE_FS && offsetof(struct runner_page, gs_base) == PAGE_GS &&
                   offsetof(struct runner_page, answer) == PAGE_ANSWER && offsetof(struct runner_page, list) == PAGE_LIST,
               "gate.S goes by these");

/* The pages of the frame: what the mapper tells, and the alternate stack on which the host's kernel puts the guest half's signals. */
enum { RUNNER_FRAME_BYTES = RUNNER_OWN_END - RUNNER_FRAME, RUNNER_STACK_OFFSET = 64,
       RUNNER_STACK_BYTES = RUNNER_FRAME_BYTES - RUNNER_STACK_OFFSET, RUNNER_STACK_FLAGS = INT32_MIN /* SS_AUTODISARM */ };
#define RUNNER_STACK (RUNNER_FRAME + RUNNER_STACK_OFFSET)
struct runner_frame {
    uint32_t done; /* a futex: the turn that the mapper has finished */
    uint8_t rest[RUNNER_FRAME_BYTES - 4];
};

/* What the stub sends with the descriptor on which the guest half's stops arrive, followed by those of its breakpoints, if the host
 * gives any. */
enum { RUNNER_BREAKPOINTS = 4 /* as many as the processor has */ };
/* struct perf_event_attr of one: it stops nothing but this process's own code, by SIGTRAP, before the instruction at `address`. */
#define RUNNER_BREAKPOINT(address, is_disabled)                                                                                   \
    {.type = PERF_TYPE_BREAKPOINT, .size = sizeof(struct perf_event_attr), .sample_period = 1, .bp_type = HW_BREAKPOINT_X,         \
     .bp_addr = (address), .bp_len = sizeof(long), .disabled = (is_disabled), .exclude_kernel = 1, .exclude_hv = 1, .sigtrap = 1,  \
     .remove_on_exec = 1}
struct runner_hello {
    int64_t guest; /* its process id */
    uint64_t flags;
};
enum { RUNNER_CPUID_FAULTS = 1, RUNNER_LANDLOCK = 2, RUNNER_NO_TSC = 4 };
#endif

#endif
