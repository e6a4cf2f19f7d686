/* The thread loop: what lies between an execution core's native threads and the Python loop thread.
 *
 * Knows nothing of Python (module.c does) and nothing of how a core executes. A core offers `struct lv_ops`; the
 * loop starts one native thread per *engine* and calls ops->run() on it. An engine runs one vCPU (KVM, scripted), or
 * all vCPUs of a VM when vm->shared_engine (software core, unless they run in parallel).
 *
 * On its thread the core calls lv_access() for every port and memory-mapped access that it cannot answer itself, and
 * lv_park() (or lv_post_exit()) for every other exit. Posted writes, shadow reads and ioeventfds are done on the spot;
 * everything else waits for the loop.
 *
 * vCPU states:   PARKED --resume--> RUNNING --exit--> QUEUED --take--> PARKED      (a fresh vCPU is PARKED)
 *
 * Threads: [engine] only on the engine's thread; [loop] only on the thread that owns the VM; [any] anywhere.
 * Functions that can fail return 0 (or a size) or -errno.
 */
#ifndef LV_LOOP_H
#define LV_LOOP_H

#include "native/answerer.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { LV_MAX_VCPUS = 64, LV_MAX_SLOTS = 64, LV_EXIT_DATA = 16, LV_INSN_MAX = 15 };
enum lv_space { LV_PORT = 0, LV_MMIO = 1 };
enum lv_vcpu_state { LV_PARKED, LV_RUNNING, LV_QUEUED };

/* In the order of the classes of cpu/exits.py. */
enum lv_exit_kind {
    LV_PORT_IN, LV_PORT_OUT, LV_MMIO_READ, LV_MMIO_WRITE, LV_HALT, LV_SHUTDOWN, LV_SYSTEM_EVENT, LV_FAIL_ENTRY,
    LV_INTERNAL_ERROR, LV_DEBUG, LV_INTERRUPTED, LV_EXIT_KINDS
};

struct lv_exit {
    uint32_t kind;      /* enum lv_exit_kind */
    uint32_t size;      /* accesses: 1, 2, 4, 8 bytes */
    uint64_t address;   /* accesses: port or guest-physical address; DEBUG: the point, or what was touched (linear) */
    uint64_t value;     /* writes: the value */
    uint64_t rip;       /* INTERNAL_ERROR, DEBUG */
    uint64_t code;      /* SYSTEM_EVENT kind; FAIL_ENTRY reason; INTERNAL_ERROR suberror; DEBUG dr6 */
    uint32_t extra;     /* FAIL_ENTRY cpu; DEBUG exception */
    uint32_t ndata;     /* SYSTEM_EVENT, INTERNAL_ERROR: words in data */
    uint64_t data[LV_EXIT_DATA];
    uint8_t insn_size;  /* INTERNAL_ERROR: bytes in insn */
    uint8_t insn[LV_INSN_MAX];
};

struct lv_access {
    uint64_t address;   /* port or guest-physical address */
    uint64_t value;     /* for a write, the upper bytes zero */
    uint8_t size;       /* 1, 2, 4, 8 */
    uint8_t space;      /* enum lv_space */
    bool write;
};

/* State blobs in the layouts of linux/kvm.h; the first nine are in the order of enum soft_state. */
enum lv_state_kind {
    LV_STATE_REGS, LV_STATE_SREGS, LV_STATE_XSAVE, LV_STATE_XCRS, LV_STATE_MSRS, LV_STATE_LAPIC, LV_STATE_EVENTS,
    LV_STATE_DEBUGREGS, LV_STATE_MP,
    LV_STATE_EXTRA, /* what only this core has of a vCPU; may be empty */
    LV_VCPU_STATES,
    LV_STATE_PIC_MASTER = 16, LV_STATE_PIC_SLAVE, LV_STATE_IOAPIC, LV_STATE_PIT, LV_STATE_CLOCK,
    LV_STATE_CORE, /* what only this core has of a VM; may be empty */
    LV_STATE_TSC,  /* uint64_t: kHz of the guests' TSC; 0: unknown */
};

/* What the VMM debugs a vCPU with; cpu/debug.py packs it, and has what each means. */
enum lv_point_kind { LV_POINT_EXECUTE, LV_POINT_WRITE, LV_POINT_READ, LV_POINT_ACCESS };
struct lv_point {
    uint64_t address; /* linear */
    uint32_t length;
    uint32_t kind;    /* enum lv_point_kind */
};
enum { LV_DEBUG_STEP = 1, LV_DEBUG_FROZEN = 2, LV_DEBUG_HOLD_INTERRUPTS = 4, LV_DEBUG_INT3 = 8, LV_DEBUG_GIVE_INT3 = 16 };
struct lv_debug {
    uint32_t flags, count;
    struct lv_point points[];
};
enum { LV_MAX_POINTS = 1024 };
/* DEBUG exits: `code` is what DR6 would say of the VMM's own debugging (hardware points in the order that they were given). */
enum { LV_DR6_STEP = 1 << 14 };

/* What a core that keeps a trace knows of a vCPU's past: struct soft_trace_entry. */
struct lv_trace_entry {
    uint64_t address, instructions;
    uint32_t count, kind;
};

/* An exit that was: an access, or what parked a vCPU. */
struct lv_past_exit {
    uint64_t ns;       /* CLOCK_MONOTONIC when it happened last; ON_THE_SPOT: to within some milliseconds */
    uint64_t address, value;
    uint32_t repeats;  /* how often it happened in a row */
    uint8_t kind;      /* enum lv_exit_kind */
    uint8_t size;
    uint8_t done;      /* enum lv_past_done */
    uint8_t unused;
};
enum lv_past_done { LV_PAST_WAITS, LV_PAST_ANSWERED, LV_PAST_ON_THE_SPOT };
enum { LV_PAST_EXITS = 64 };

struct lv_config {
    uint32_t vcpus;
    bool virtual_clock;
    uint64_t virtual_ips;
    uint64_t epoch_ns;   /* CLOCK_REALTIME at time 0 */
    bool seeded;
    uint64_t seed;
    int system_fd;       /* KVM: /dev/kvm; others -1 */
    bool pit;            /* an 8254 at 0x40 to 0x43, and port 0x61 */
    bool parallel;       /* software core: each vCPU has a thread of its own, with the real clock */
    bool finish;         /* KVM: the software core finishes what the host's KVM gives up */
};

struct lv_route {
    uint32_t gsi, data;
    uint64_t address;
};

struct lv_stat {
    const char *name;
    uint64_t value;
};

struct lv_vm;
struct lv_vcpu;
struct lv_engine;
struct kvm_cpuid_entry2;

/* Guest memory that a descriptor holds; struct soft_direct_memory. */
struct lv_direct_memory {
    void *host;
    uint64_t size, offset;
};

/* What a core implements. [loop] where not said; NULL is allowed where said. */
struct lv_ops {
    const char *name;
    int (*vm_create)(struct lv_vm *vm);      /* sets vm->core, and vm->shared_engine if so; vm->config is filled */
    void (*vm_destroy)(struct lv_vm *vm);    /* all engine threads have ended */
    /* In a forked child, before vm_destroy: the threads are not here, and locks are as they left them. May be NULL. */
    void (*forked)(struct lv_vm *vm);
    int (*vcpu_create)(struct lv_vcpu *vcpu);   /* may be NULL; sets vcpu->core */
    void (*vcpu_destroy)(struct lv_vcpu *vcpu); /* may be NULL */
    /* [engine] Run the engine's RUNNING vCPUs until lv_closing(). */
    void (*run)(struct lv_engine *engine);
    /* [any] The vCPU's `kicked` was set, or the VM is closing: make the core leave guest mode and look. Sticky. */
    void (*kick)(struct lv_vcpu *vcpu);
    /* [any] Shared engines: the vCPU left (true) or entered RUNNING; the core must not (may) run it. NULL otherwise.
     * Called by the loop: before lv_park_kicked() queues Interrupted, and when resume() has answered. */
    void (*hold)(struct lv_vcpu *vcpu, bool held);

    /* size 0 removes the slot. */
    int (*set_slot)(struct lv_vm *vm, uint32_t slot, uint64_t gpa, uint64_t size, void *host, bool readonly, bool log_dirty);
    int (*dirty_log)(struct lv_vm *vm, uint32_t slot, uint8_t *bitmap, size_t size); /* size: a multiple of 8 */
    void (*memory_written)(struct lv_vm *vm, uint64_t gpa, uint64_t size); /* [any], may be NULL */

    int (*set_irq)(struct lv_vm *vm, uint32_t gsi, bool level);             /* [any] */
    int (*signal_msi)(struct lv_vm *vm, uint64_t address, uint32_t data);   /* [any] */
    /* NULL: the loop keeps the routes and serves irqfds itself from take(), with set_irq and signal_msi. */
    int (*set_routes)(struct lv_vm *vm, const struct lv_route *routes, uint32_t count);
    int (*irqfd)(struct lv_vm *vm, int fd, uint32_t gsi, int resample_fd, bool add);
    /* NULL: lv_access() serves ioeventfds from its table. */
    int (*ioeventfd)(struct lv_vm *vm, int fd, uint8_t space, uint64_t address, uint32_t size, bool has_match,
                     uint64_t match, bool add);

    /* ns since the VM's start [any]; NULL: CLOCK_MONOTONIC since creation. */
    uint64_t (*now)(struct lv_vm *vm);
    /* Have lv_alarm_due() called at deadline_ns (UINT64_MAX: never). NULL or -ENOSYS: the loop uses a timer descriptor. */
    int (*set_alarm)(struct lv_vm *vm, uint64_t deadline_ns);

    /* The vCPU is PARKED. get returns the number of bytes filled; MSRS: data holds struct kvm_msrs with nmsrs indices
     * on entry, and both get and set return the number of MSRs done instead. */
    int (*get_vcpu)(struct lv_vcpu *vcpu, enum lv_state_kind kind, void *data, size_t size);
    int (*set_vcpu)(struct lv_vcpu *vcpu, enum lv_state_kind kind, const void *data, size_t size);
    int (*get_vm)(struct lv_vm *vm, enum lv_state_kind kind, void *data, size_t size);
    int (*set_vm)(struct lv_vm *vm, enum lv_state_kind kind, const void *data, size_t size);
    /* The vCPU is PARKED: have the guest's watchdogs told that it stood still. May be NULL. */
    int (*stood_still)(struct lv_vcpu *vcpu);
    int (*set_cpuid)(struct lv_vcpu *vcpu, const struct kvm_cpuid_entry2 *entries, uint32_t count);
    int (*set_debug)(struct lv_vcpu *vcpu, const struct lv_debug *debug); /* count is at most LV_MAX_POINTS; may be NULL */
    int (*translate)(struct lv_vcpu *vcpu, uint64_t linear, uint64_t *gpa); /* -EFAULT: not mapped; may be NULL */
    /* [loop] Keep the last `entries` of what each vCPU executes (0: none); copy them, returning how many. May be NULL. */
    int (*set_trace)(struct lv_vm *vm, uint32_t entries);
    uint32_t (*trace)(struct lv_vm *vm, uint32_t vcpu, struct lv_trace_entry *out, uint32_t max);
    int (*nmi)(struct lv_vcpu *vcpu);
    /* Without a VM, any may be NULL (KVM: Python asks /dev/kvm). Both return how many they wrote, at most max. */
    uint32_t (*supported_cpuid)(struct kvm_cpuid_entry2 *entries, uint32_t max);
    uint32_t (*msr_list)(uint32_t *indices, uint32_t max); /* the MSRs worth saving */
    /* Let guest programs run natively over memory that `fd` holds; with fd -1 no longer, while all vCPUs are parked. May be NULL. */
    int (*set_direct)(struct lv_vm *vm, const struct lv_direct_memory *memory, uint32_t count, int fd, const char *program,
                      bool always);
    /* The core's own counters; returns how many were written (at most max). May be NULL. */
    uint32_t (*stats)(struct lv_vm *vm, struct lv_stat *stats, uint32_t max);
    /* One of the last instructions of those that stats() counts as finished: up to LV_INSN_MAX bytes, how many. May be NULL. */
    uint32_t (*last_finished)(struct lv_vm *vm, uint8_t *bytes);
};

/* One native thread. */
struct lv_engine {
    struct lv_vm *vm;
    struct lv_vcpu *vcpus[LV_MAX_VCPUS]; /* those it runs; the first `count` are valid */
    uint32_t count;
    _Atomic uint32_t seq;      /* futex: bumped by every resume, kick, close and take that concerns the engine */
    _Atomic uint32_t sleeping; /* the thread is (about to be) in futex_wait on seq */
    pthread_t thread;
    bool started;
    _Atomic int tid;
    uint32_t spin_ns;          /* adaptive: how long to spin for an answer */
    struct lv_vcpu *waiting;   /* the vCPU whose access or exit the thread is inside: not between instructions */
    bool puts_off;             /* the core calls lv_tell_put_off(), so doorbells may wait for it */
    uint64_t doorbell_ns;      /* how long telling an ioeventfd takes here, on average */
    uint32_t doorbells;        /* those that could have been put off */
    struct lv_entry *put_off;  /* ioeventfds that are to be told; under the lock */
    void *core;                /* the core's own, per engine */
};

struct lv_vcpu {
    struct lv_vm *vm;
    struct lv_engine *engine;
    uint32_t index;
    _Atomic uint32_t state;    /* enum lv_vcpu_state */
    _Atomic uint32_t kicked;   /* an Interrupted exit is owed */
    struct lv_exit exit;       /* valid while QUEUED or PARKED (has_exit) */
    bool has_exit;
    bool unfinished;           /* [engine] inside an instruction, although the thread is not: must not park for a kick */
    bool wants_value;          /* the exit is answered by CompleteRead */
    uint64_t answer;
    struct lv_past_exit past[LV_PAST_EXITS]; /* a ring; [engine], and by resume(); read while PARKED */
    uint64_t past_count;
    void *core;                /* the core's own, per vCPU */
};

enum { LV_STAT_POSTED = LV_EXIT_KINDS, LV_STAT_SHADOW, LV_STAT_IOEVENTFD, LV_STAT_ANSWERED, LV_STAT_PUT_OFF, LV_STAT_POSTED_WAIT,
       LV_STAT_SLEEP, LV_STATS };

struct lv_event {
    uint8_t kind;      /* enum lv_event_kind */
    uint8_t size;      /* POSTED: bytes a value */
    uint8_t notice;    /* POSTED: a read-to-clear shadow was read; no value */
    uint8_t vcpu;      /* EXIT: index */
    int32_t tag;       /* POSTED */
    uint64_t value;    /* POSTED */
};
enum lv_event_kind { LV_EVENT_POSTED, LV_EVENT_EXIT, LV_EVENT_ALARM, LV_EVENT_BARRIER };

struct lv_queue {
    struct lv_event *events;
    uint32_t count, room;
};

struct lv_entry; /* access table entry: posted, shadow or ioeventfd (loop.c) */
struct lv_irqfd; /* an irqfd that the loop serves (loop.c) */

struct lv_vm {
    const struct lv_ops *ops;
    struct lv_config config;
    void *core;                      /* the core's own, per VM */
    bool shared_engine;              /* one engine runs all vCPUs */
    struct lv_engine *engines[LV_MAX_VCPUS];
    struct lv_vcpu *vcpus[LV_MAX_VCPUS];
    uint32_t engine_count;
    uint32_t generation;             /* of forks, when it was made: see lv_forked() */
    _Atomic bool closing;
    uint64_t start_ns;               /* CLOCK_MONOTONIC at the VM's time 0 (modulo 2^64) */

    void *owner;                     /* Python's Vm */
    void (*written)(void *owner, uint64_t gpa, uint64_t size); /* a device wrote there: note it, if that is logged [any] */

    pthread_mutex_t lock;            /* everything below; held for well under a microsecond */
    struct lv_queue fill, drain;     /* engines append to fill; take() swaps (drain: loop thread only) */
    _Atomic bool signalled;          /* event_fd is readable; written under the lock */
    bool moderated;                  /* the timer will make the loop look: posted writes need no signal */
    bool posted_since_timer;
    uint32_t moderation_window;      /* ns from one look to the next; grows while a stream goes on */
    uint32_t sparse_takes;           /* in a row, with few posted writes each */
    uint64_t posted_ns;              /* CLOCK_MONOTONIC of the last posted write */
    uint64_t moderation_ns;          /* absolute CLOCK_MONOTONIC; UINT64_MAX: off */
    uint64_t take_seq;
    uint32_t barriers;               /* engines waiting for the loop to have handled a posted write */
    uint32_t room_waiters;
    struct lv_entry **table;
    _Atomic uint32_t entry_count;

    int poll_fd, event_fd, timer_fd; /* poll_fd watches the others */
    uint64_t alarm_ns, timer_ns;     /* absolute CLOCK_MONOTONIC; UINT64_MAX: off */
    uint64_t lingered_ns;            /* CLOCK_MONOTONIC when the loop last began to linger (loop thread only, as the next) */
    uint32_t linger_ns;              /* adaptive: how long to linger */
    bool exits_taken;                /* by the last take() */
    struct lv_irqfd *irqfds;
    struct lv_route *routes;
    uint32_t route_count;
    uint32_t trace_entries;          /* of set_trace() */
    _Atomic uint64_t stats[LV_STATS];
};

/* ---- for cores, on the engine's thread ---- */

/* One access: the answer of a read (upper bytes zero), 0 for a write. Posted, shadow and ioeventfd accesses return at
 * once (virtual clock: after the loop handled them); others when resume() answered. Returns at once with all ones when the VM
 * is closing. [engine] */
uint64_t lv_access(struct lv_vcpu *vcpu, const struct lv_access *access);
/* For shared engines whose other vCPUs go on meanwhile: true if the access was done on the spot. Else lv_post_exit() of
 * lv_access_exit(); vcpu->answer is the answer once it is RUNNING again, and `unfinished` is set until it was used. [engine] */
bool lv_try_access(struct lv_vcpu *vcpu, const struct lv_access *access, uint64_t *value);
struct lv_exit lv_access_exit(const struct lv_access *access);
/* Queue `exit` and wait until resume() answers it or the VM closes. [engine] */
void lv_park(struct lv_vcpu *vcpu, const struct lv_exit *exit);
/* Shared engines: queue `exit` without waiting; the vCPU is RUNNING again after resume(). The core has held it. [engine] */
void lv_post_exit(struct lv_vcpu *vcpu, const struct lv_exit *exit);
/* Shared engines: every RUNNING vCPU with `kicked` set is held and gets its Interrupted exit. Returns how many of the
 * engine's vCPUs are still RUNNING. [engine] */
uint32_t lv_park_kicked(struct lv_engine *engine);
/* A device wrote there: the logs and the core are told. vm->written is not NULL. [any] */
void lv_memory_written(struct lv_vm *vm, uint64_t gpa, uint64_t size);
/* Tell the ioeventfds whose telling was put off. Called by cores with engine->puts_off between their vCPUs' turns and before the
 * thread sleeps by other means than lv_engine_wait(). [engine] */
void lv_tell_put_off(struct lv_engine *engine);
/* Whether any telling was put off. Answerers may take their time, so a core that holds what other threads wait for gives it up
 * before it calls lv_tell_put_off(). [engine] */
bool lv_has_put_off(const struct lv_engine *engine);
/* Sleep until engine->seq differs from `seq` (read it before looking at the states). [engine] */
void lv_engine_wait(struct lv_engine *engine, uint32_t seq);
/* Make a sleeping engine look again. [any] */
void lv_engine_wake(struct lv_engine *engine);
/* The VM's alarm is due: queue AlarmDue; with the virtual clock wait until the loop handled it. [engine] */
void lv_alarm_due(struct lv_engine *engine);
/* A level-triggered GSI was acknowledged: lower and signal its resampling irqfds (those that the loop serves). [any] */
void lv_eoi(struct lv_vm *vm, uint32_t gsi);
/* Sequentially consistent: a thread publishes that it is there (tid, sleeping) and then looks; lv_vm_stop() does the reverse. */
static inline bool lv_closing(const struct lv_vm *vm) { return atomic_load(&vm->closing); }
static inline bool lv_running(const struct lv_vcpu *vcpu) { return atomic_load_explicit(&vcpu->state, memory_order_acquire) == LV_RUNNING; }

/* ---- for module.c, on the loop's thread ---- */

/* How often fork() made this process out of another. The threads and what their descriptors lead to are the parent's: a
 * child may do nothing with a VM but destroy its copy. */
extern uint32_t lv_generation;
static inline bool lv_forked(const struct lv_vm *vm) { return vm->generation != lv_generation; }

struct lv_vm *lv_vm_create(const struct lv_ops *ops, const struct lv_config *config, int *error);
/* Stop and join every engine thread (none in a forked child). Returns soon after the guests left guest mode. */
void lv_vm_stop(struct lv_vm *vm);
void lv_vm_destroy(struct lv_vm *vm); /* after lv_vm_stop() */
int lv_vcpu_create(struct lv_vm *vm, uint32_t index);
/* With `park` no further instruction is begun: Interrupted follows. -EBUSY: not parked */
int lv_vcpu_resume(struct lv_vcpu *vcpu, uint64_t answer, bool park);
void lv_vcpu_kick(struct lv_vcpu *vcpu); /* [any] */
/* What happened since the last call; valid until the next. */
const struct lv_event *lv_vm_take(struct lv_vm *vm, uint32_t *count);
/* The exits of the last take() are answered: look out for the next for at most some 20 us. */
void lv_vm_linger(struct lv_vm *vm);
uint64_t lv_vm_now(struct lv_vm *vm);                      /* [any] */
int lv_vm_set_alarm(struct lv_vm *vm, uint64_t deadline_ns);
int lv_add_posted(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size, int32_t tag);
int lv_remove_posted(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size);
int lv_add_shadow(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size, int32_t tag);
int lv_remove_shadow(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size);
int lv_shadow_set(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size, uint64_t value, bool has_after, uint64_t after);
int lv_shadow_invalidate(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size);
/* `answerer`: asked first, where the core can; NULL: nobody. */
int lv_ioeventfd(struct lv_vm *vm, int fd, uint8_t space, uint64_t address, uint32_t size, bool has_match, uint64_t match,
                 struct lv_answerer *answerer, bool add);
int lv_irqfd(struct lv_vm *vm, int fd, uint32_t gsi, int resample_fd, bool add);
int lv_set_routes(struct lv_vm *vm, const struct lv_route *routes, uint32_t count);

extern const struct lv_ops lv_kvm_ops;
extern const struct lv_ops lv_scripted_ops;
extern const struct lv_ops lv_soft_ops __attribute__((weak)); /* cpu/soft/run/backend.c */

#endif
