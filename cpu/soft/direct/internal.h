/* What the files of direct execution share. */
#ifndef SOFT_DIRECT_INTERNAL_H
#define SOFT_DIRECT_INTERNAL_H

#include <pthread.h>
#include <sched.h>
#include <sys/types.h>

#include "soft/direct/direct.h"
#include "soft/direct/layout.h"
#include "soft/system/system.h"

/* Runners: of a vCPU at most; of all vCPUs, as far as each has the least. Each is two processes. */
enum { RUNNERS = 8, RUNNERS_ALL = 16, RUNNERS_LEAST = 2 };
enum { REGION_PAGES = 512, REGION_HASH = 256 };
/* A host allows a process vm.max_map_count mappings, 65,530 unless it was changed. And what a runner has mapped costs memory here
 * and in the host's page tables: some 10 KiB a region. */
enum { MAX_MAPPED = 60000, MAX_REGIONS = 4096 };

enum { PAGE_R = 1, PAGE_W = 2, PAGE_X = 4, PAGE_LOST = 8 /* with PAGE_X: it was written since it was looked at */ };

/* What a runner has mapped in 2 MiB of the guest's linear addresses. */
struct region {
    struct region *next;  /* of the same hash */
    uint64_t base;
    uint32_t count;       /* pages mapped; */
    uint32_t executable;  /* those with PAGE_X */
    bool stale;           /* check against the page tables before it is used */
    uint64_t page[REGION_PAGES]; /* guest-physical address | PAGE_*; 0: not mapped */
    uint8_t in_core[REGION_PAGES]; /* how long code of a page stays in the core, in powers of two */
};

enum { GUARDS = RUNNER_BREAKPOINTS };
enum {
    PAYS_NS = 4000,      /* a native stretch of this length is worth its stop */
    CREDIT_NS = 2000000, /* what an address space may lose at first, while its pages are mapped, and at most */
    STOP_FLOORS = 3,     /* a stop costs so many times what it takes of the guest half's processor time */
    GAIN = 8,            /* so much of the core's time does 1 ns of native execution save */
};
/* A breakpoint of a page: guard.c. */
struct guard {
    uint64_t page;     /* its linear address; 0: unused */
    uint64_t address;
    uint64_t since_ns; /* of runner.used_ns */
    uint64_t armed;    /* where the host's event stops it; 0: nowhere */
    int fd;            /* the event's descriptor and one; 0: none */
};

/* The frame that Linux for x86-64 puts on the stack for a signal (its user-space ABI), as far as it is used here. */
struct signal_frame {
    uint64_t restorer;
    uint64_t context, link, stack;
    int32_t stack_flags, unused;
    uint64_t stack_bytes;
    uint64_t gpr[16]; /* R8 to R15, RDI, RSI, RBP, RBX, RDX, RAX, RCX, RSP */
    uint64_t rip, flags;
    uint16_t cs, gs, fs, ss;
    uint64_t error, trap, old_blocked, cr2;
    uint64_t state;   /* the address of an XSAVE area */
    uint64_t reserved[8];
    uint64_t blocked; /* signals */
    struct {
        int32_t signal, error, code, unused;
        uint64_t address; /* si_addr, or si_call_addr */
    } info;
};
_Static_assert(offsetof(struct signal_frame, info) == 312, "as Linux has it");
/* Of the XSAVE area: the kernel's own bytes (struct _fpx_sw_bytes of its user-space ABI), the header, what there is at least, and
 * with AVX; behind it stands STATE_END (FP_XSTATE_MAGIC2), without which a frame has no more than x87 and SSE. */
enum { STATE_SOFTWARE = 464, STATE_FEATURES = 472, STATE_SIZE = 480, STATE_HEADER = 512, STATE_LEAST = 576, STATE_AVX = 832,
       STATE_END = 0x46505845, STATE_HAS_AVX = 4 /* component 2 (SDM 1, 13.1) */ };

/* What a stop tells: copied once from the frame that the host's kernel made and from the arguments of the stop call. */
struct stop {
    struct signal_frame frame;
    uint64_t fs_base, gs_base;
    uint16_t ds, es, fs, gs;
    uint64_t entered; /* where the stretch began */
};

enum { FX_USED = 416 };   /* of an FXSAVE image: what follows is unused, or the kernel's own */
struct runner {
    pid_t guest, mapper;
    struct runner_page *page;
    struct runner_frame *frame;
    int listener;         /* where stops of the guest half arrive, and are answered */
    uint64_t stopped;     /* the stop that waits for its answer */
    uint64_t stop_ip;     /* the address after the gate's own stop */
    uint32_t stack;       /* where in the frame's pages a signal is put, the same each time; */
    uint32_t state;       /* and the processor's extended state in it, of that many bytes */
    uint32_t state_bytes;
    uint8_t made_by_kernel[48]; /* bytes 464 to 511 of that, as every frame has them */
    uint32_t waiting;     /* commands that are carried out before the guest half goes on */
    bool used;
    uint64_t root, pcid;  /* the address space it is for */
    bool left;            /* unused, but something is mapped */
    uint64_t top;         /* of the page tables when that was last looked at: pages_replaced() */
    bool stale;           /* all regions have to be checked */
    bool some_stale;      /* some have */
    uint32_t protect_seq; /* of struct direct_vcpu, when its writable pages were last checked */
    bool some_lost;       /* a page has PAGE_LOST */
    struct region *regions[REGION_HASH];
    uint32_t mapped;      /* no more mappings than that since it was empty */
    uint32_t region_count;
    uint64_t last_used;
    bool blocked;         /* the guest has a page where ours are, or an LDT */
    uint8_t fx[512] __attribute__((aligned(16))); /* x87 and SSE of the guest half as it stopped last, or will go on */
    struct fpu fpu;       /* what `fx` is in the core */
    bool fp_known;
    bool suspect;         /* its address space may be another one, under the same root */
    int cpu;              /* it is bound to this processor; -1: to none */
    struct guard guards[GUARDS];
    uint64_t refused;     /* instructions that were left to the core, of pages that may not run natively */
    /* Whether it pays: trip.c measures it, decide.c decides. */
    uint64_t used_ns;     /* processor time of the guest half */
    uint64_t stops;
    uint64_t average_ns;  /* of native time until a stop that is neither a page's nor a kick, a moving average */
    uint64_t last_ns;     /* of native time until the last stop */
    int64_t balance_ns;   /* what it may still lose by stops: what it gains is added, up to CREDIT_NS */
    uint64_t core_until;  /* stay in the core until that many instructions are retired */
    uint32_t backoff;
    uint32_t trials;          /* in a row that ended before it went native */
};

/* An address space, as it is in the core. */
struct young {
    uint64_t root;
    int64_t spent;        /* instructions while it was the current one; below 0 while it is left alone */
    uint32_t trials;      /* in a row that ended before it got a runner */
    uint32_t backoff;
    uint64_t top;         /* pages_top() when it had grown, lest another one under its root passes for it */
    uint64_t user;        /* instructions of its program, and returns of the kernel to it, of late */
    uint32_t returns;
};

enum { PENDING = 8, YOUNG = 64 };
struct direct_vcpu {
    struct runner runner[RUNNERS];
    struct runner *current;   /* of c->cr3 when it was last looked for, else NULL */
    uint64_t root;            /* in c->cr3, when it was last written */
    uint64_t counted;         /* instructions until here are in young.spent */
    uint64_t pending[PENDING];/* linear addresses that the guest touched without a mapping */
    uint32_t pending_count;
    const struct runner *pending_for;
    enum soft_native_core slice_why;
    int64_t slice;            /* instructions to execute in the core before it goes native */
    bool returned;            /* the guest's kernel went back to a program */
    struct young young[YOUNG];
    uint64_t use;             /* counts stretches, for runner.last_used */
    uint32_t protect_seq;     /* bumped when pages that are mapped writable must no longer be */
    pid_t thread;             /* who made the runners: they end with that thread */
    pid_t running;            /* atomic: the guest half that executes, or 0 */
    pid_t mapper;             /* atomic: its mapper, set before */
    uint64_t deadline;        /* atomic: CLOCK_MONOTONIC ns at which it has to stop */
    uint64_t stretch;         /* atomic: counts those begun, before `running` tells whose */
    uint64_t kicked, kicked_used; /* kick.c's own: the stretch whose deadline was over last, and kick_time() then */
    uint32_t kicks;           /* ... and how often it was kicked since */
    cpu_set_t own_affinity;   /* of the thread, before it was bound to a processor */
    int bound;                /* atomic: the processor, or -1 */
    uint32_t bound_stops;     /* so many more stops it stays bound, */
    uint64_t bound_until;     /* and until so many instructions are retired */
    /* What a stop costs of the guest half's processor time, of a runner without breakpoints and with them: the lowest tenths of
     * stops without a stretch, since others cost more that find less in the caches. */
    uint64_t floor_ns[2];
    uint64_t quiet_until;     /* until so many instructions are retired, a return to a program is nothing to look at */
    struct soft_native_stats counts;
    enum soft_native_core why; /* user code is in the core, if it is */
    bool in_user;             /* it executes at CPL 3 in the core, */
    uint64_t user_from;       /* since this instruction */
    uint64_t failures;        /* runners that could not be made or went wrong, in a row */
};

struct direct_range {
    uint8_t *host;
    uint64_t size, offset;
};
struct direct_vm {
    int memory_fd;
    struct direct_range ranges[4];
    uint32_t range_count;
    char stub[4096];
    uint32_t page_slice;      /* instructions in the core once a page cannot run natively */
    uint32_t runners;         /* for each vCPU */
    bool off;                 /* atomic: it went wrong too often */
    bool no_guards;           /* the host has no breakpoints to give */
    bool always;              /* `on`: whether or not it pays */
    bool cpuid_faults;        /* CPUID at CPL 3 comes back to the core */
    bool rex2;                /* the processor has APX's prefixes */
    bool sysenter;            /* 64-bit code can execute SYSENTER: any host but AMD's is taken to be as Intel's */
    uint8_t *writable;        /* atomic: a bit a page of memory_fd: it was mapped writable for a runner */
    /* kick.c */
    pthread_t kicker;
    bool kicker_started, kicker_end;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    uint64_t sleeps_until;    /* atomic */
};

/* runner.c. On the thread that made the runner, but for runner_close() and runner_forget(). A runner that fails is to be closed. */
/* 0, or -errno; *why names the step. breakpoints: it gets them if the host allows it. */
int runner_open(struct direct_vm *direct, struct runner *r, bool breakpoints, const char **why);
void runner_close(struct runner *r);
/* Whether this process of ours has not ended. [any] */
bool runner_lives(pid_t pid);
/* Carry out the first `count` commands in its page, now. False: the runner is of no use any more. */
bool runner_command(struct runner *r, uint32_t count);
/* Let the guest half go on by its frame, after the commands that wait, until it stops in the gate; with the arguments of its stop.
 * False: it is gone, or made a stop of its own, from which it would not go on by a frame. */
bool runner_resume(struct runner *r, uint64_t arguments[6]);
void runner_bind(struct soft_vcpu *c, struct runner *r);
void runner_unbind(struct direct_vcpu *d);
/* In a forked child: it is the parent's. */
void runner_forget(struct runner *r);
/* Where in the frame's pages something stands. */
static inline uint8_t *runner_at(struct runner *r, uint32_t offset) { return (uint8_t *)r->frame + offset; }

/* pages.c */
struct region *region_of(struct runner *r, uint64_t linear);
void pages_forget(struct runner *r);
struct direct_range *range_of(struct direct_vm *direct, const uint8_t *host);
/* Bring what the runner has mapped in line with the guest's page tables, and map what is pending. */
bool pages_prepare(struct soft_vcpu *c, struct runner *r);
/* The tables that the lower half's top-level entries point to, as one number. */
uint64_t pages_top(struct soft_vcpu *c);
/* Whether the address space is another one than before, under the same root: little of what is mapped is there any more. */
bool pages_replaced(struct soft_vcpu *c, struct runner *r);
/* Whether the runner has the page of `linear` mapped with these rights. */
bool pages_have(struct runner *r, uint64_t linear, unsigned rights);
/* A page's bytes were written, or those of any (PAGE_ALL): it is not executed before it was looked at again. */
void pages_lose(struct runner *r, uint64_t gpa);
/* Take everything of it away, for another address space. */
bool pages_drop_all(struct runner *r);

/* scan.c: where instructions of a page could begin that would see the host, as offsets; they may begin in the page before.
 * -1: at more than SCAN_MOST places. before, after: its neighbours, or NULL if they are not executable. */
enum { SCAN_MOST = 4 };
int scan_page(const struct direct_vm *direct, const uint8_t *before, const uint8_t *page, const uint8_t *after,
              int16_t starts[SCAN_MOST]);

/* guard.c */
/* Give a page breakpoints at these offsets. False: there are none for it now. lost: pages that have none any more for that, and must
 * not be executable. */
bool guard_take(struct runner *r, uint64_t page, const int16_t *starts, unsigned count, uint64_t lost[GUARDS], unsigned *lost_count);
/* Set the breakpoints. False: the host has none to give. */
bool guard_set(struct runner *r);
/* This page needs none, or none any more. */
void guard_release(struct runner *r, uint64_t page);
void guard_forget(struct runner *r);
/* These are a new runner's events. */
void guard_open(struct runner *r, const int fds[GUARDS]);
bool guard_any(const struct runner *r);
void guard_close(struct runner *r);

/* trip.c */
enum trip { TRIP_NATIVE /* go on natively */, TRIP_CORE /* the core has to go on */, TRIP_LOST /* the runner is gone */ };
bool trip_possible(const struct soft_vcpu *c);
/* Show that the guest half goes on where it is told, as a handler that the host's kernel has called, and take from its registers what
 * ran in it. Guest code may stop by the gate's own call with single steps or signals on, and another stack for them; whoever ran next would
 * feel that. No page may be mapped that was not while that code ran. False: it has to be ended. */
bool trip_clean(struct runner *r);
enum trip trip_run(struct soft_vcpu *c, struct runner *r);

/* kick.c. kick_start() may be called by several threads. */
bool kick_start(struct direct_vm *direct, struct soft_vm *vm);
void kick_end(struct direct_vm *direct);
/* What a process has used of a processor, in ns: a busy host's waiting does not count. */
uint64_t kick_time(pid_t pid);
void kick_before(struct soft_vm *vm, struct direct_vcpu *d, const struct runner *r, uint64_t deadline);
void kick_after(struct direct_vcpu *d);
/* After kick_after(): nobody signals the process any more, so it may end and its number be another's. */
void kick_settle(struct direct_vm *direct);

#endif
