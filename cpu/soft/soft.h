/* The software core's public C interface: an x86-64 virtual machine as a library.
 *
 * Knows nothing of Python and nothing of devices outside the core (the caller's access callback answers
 * port and memory-mapped accesses). One thread at a time may be inside soft_vm_run(); the functions marked
 * [any] may be called from any thread at any moment; all others only while no thread is inside soft_vm_run(),
 * or from inside a callback of it.
 */
#ifndef SOFT_SOFT_H
#define SOFT_SOFT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct soft_vm;

enum { SOFT_MAX_VCPUS = 16, SOFT_MAX_SLOTS = 64, SOFT_GSI_COUNT = 24 };

/* A port or memory-mapped access that no memory slot and no in-core device answers. The callback runs on the
 * thread inside soft_vm_run() and may block; for a read it returns the value (little-endian, upper bytes ignored).
 * While it blocks, the vCPU's registers may be read, and rip is that of the accessing instruction. */
struct soft_access {
    uint64_t address; /* port number, or guest-physical address */
    uint64_t value;   /* for a write */
    uint8_t size;     /* 1, 2, 4 or 8 bytes */
    bool port;
    bool write;
    bool retry; /* the access that soft_vcpu_defer() put off: what the callback returns now is its result */
    uint8_t vcpu;
};

struct soft_host {
    void *ctx;
    uint64_t (*access)(void *ctx, const struct soft_access *access);
    /* The entropy for RDRAND and RDSEED. */
    void (*random)(void *ctx, void *buffer, size_t size);
    /* The page of guest memory at gpa is (about to be) written by a vCPU: told once a page after each set of
     * SOFT_STATE_SREGS, at least. May be NULL. */
    void (*written)(void *ctx, uint64_t gpa);
    /* EOI of a level-triggered GSI (for resampling irqfds); may be NULL. */
    void (*eoi)(void *ctx, uint32_t gsi);
    /* On the thread that runs the vCPU: between two turns, before it sleeps or gives its processor away, and at times besides;
     * may be NULL. */
    void (*between)(void *ctx, uint32_t vcpu);
};

struct soft_config {
    uint32_t vcpus;           /* 1 to SOFT_MAX_VCPUS; APIC id = index */
    bool virtual_clock;       /* instructions retired at virtual_ips; HLT skips to the next event */
    uint64_t virtual_ips;     /* instructions a second of virtual time, e.g. 1000000000 */
    uint64_t epoch_ns;        /* wall clock (CLOCK_REALTIME, ns) at time 0, for kvmclock's wall clock */
    uint64_t tsc_khz;         /* rate of the guest's TSC */
    uint32_t quantum;         /* instructions a vCPU runs before the next has its turn, e.g. 100000 */
    bool parallel;            /* each vCPU has a thread of its own, which calls soft_vcpu_run(); not with the virtual clock */
    bool no_pit;              /* no 8254 and no port 0x61 */
    bool no_irqchip;          /* the interrupt controllers are elsewhere: accesses to them go to the callback */
};

enum soft_stop {
    SOFT_STOP_WAKE,     /* soft_vm_wake() was called; all vCPUs are between instructions */
    SOFT_STOP_SHUTDOWN, /* triple fault of *vcpu */
    SOFT_STOP_HALTED,   /* (soft_vcpu_run(): told to each thread once) every vCPU is in HLT with interrupts off or waits for SIPI: nothing can wake the VM
                           but an NMI, an INIT or the caller */
    SOFT_STOP_ALARM,    /* the alarm of soft_vm_set_alarm() is due */
    SOFT_STOP_DEBUG,    /* a breakpoint or single step that the caller asked for with soft_vcpu_set_debug() */
    SOFT_STOP_ERROR,    /* the core cannot go on (out of host memory): a host fault */
};

struct soft_vm *soft_vm_create(const struct soft_config *config, const struct soft_host *host);
void soft_vm_destroy(struct soft_vm *vm);
/* In a forked child, whose parent has the threads: makes soft_vm_destroy(), and nothing else, possible. */
void soft_vm_forked(struct soft_vm *vm);

/* Map [gpa, gpa+size) to host memory. size 0 removes the slot. 0, or -EINVAL, -EEXIST (overlap). */
int soft_vm_set_slot(struct soft_vm *vm, uint32_t slot, uint64_t gpa, uint64_t size, void *host, bool readonly,
                     bool log_dirty);
/* One bit a 4 KiB page, written since the last call (by vCPUs); cleared by the call. */
int soft_vm_dirty_log(struct soft_vm *vm, uint32_t slot, uint8_t *bitmap, size_t bitmap_size);
/* [any] The caller wrote guest memory (DMA): any translated code there is dropped before the next block runs. */
void soft_vm_memory_written(struct soft_vm *vm, uint64_t gpa, uint64_t size);

/* Run all vCPUs until something of enum soft_stop. */
enum soft_stop soft_vm_run(struct soft_vm *vm, uint32_t *vcpu);
/* [any] Make soft_vm_run() return SOFT_STOP_WAKE within 1 ms. Sticky: if no run is under way, the next returns at once. */
void soft_vm_wake(struct soft_vm *vm);
/* The same from within the access callback of a vCPU, so that no instruction follows the one that makes the access (after a
 * read of MMIO: few, to the end of its block). */
void soft_vm_wake_now(struct soft_vm *vm, uint32_t vcpu);

/* ---- several vCPUs at once (soft_config.parallel) ----
 * Each vCPU is run by its own thread. What says "only while no thread is inside soft_vm_run()" holds between
 * soft_vm_stop_all() and soft_vm_go(), or inside of a callback for the vCPU's own registers. */
/* Run one vCPU until something of enum soft_stop. [its thread] */
enum soft_stop soft_vcpu_run(struct soft_vm *vm, uint32_t vcpu);
/* [any] As soft_vm_wake(), of one vCPU. */
void soft_vcpu_wake(struct soft_vm *vm, uint32_t vcpu);
/* Around what blocks in an access callback, so that others need not wait for this thread. [its thread] */
void soft_vcpu_outside(struct soft_vm *vm, uint32_t vcpu);
void soft_vcpu_inside(struct soft_vm *vm, uint32_t vcpu);
/* Wait until every vCPU is between instructions, or in an access callback, and keep them there: under 1 ms. Not from a callback. */
void soft_vm_stop_all(struct soft_vm *vm);
void soft_vm_go(struct soft_vm *vm);
/* soft_vm_stop_all(), unless that takes longer than so many ns: false, and soft_vm_go() does not follow. */
bool soft_vm_try_stop_all(struct soft_vm *vm, uint64_t ns);

/* Apply what the functions marked [any] sent, so that a state which is read next includes it. Not from a callback. */
void soft_vm_settle(struct soft_vm *vm);
/* From within the access callback: this access is not answered now. What the callback returns is ignored, the vCPU is
 * parked, other vCPUs go on. When it is unparked, the instruction runs again, up to the callback with `retry`. An instruction that
 * no longer makes that access (its code or registers were changed meanwhile) drops it. False: not possible here. */
bool soft_vcpu_defer(struct soft_vm *vm, uint32_t vcpu);
/* Whether a deferred access of the vCPU has not had its retry yet. Not while another thread is inside soft_vm_run(). */
bool soft_vcpu_deferred(const struct soft_vm *vm, uint32_t vcpu);
/* The vCPU stood still while time went on: set PVCLOCK_GUEST_STOPPED in its page of kvmclock, if it has one, so that the
 * guest's watchdogs do not take the gap for a lockup. Not while another thread is inside soft_vm_run(). */
void soft_vcpu_stood_still(struct soft_vm *vm, uint32_t vcpu);
/* A parked vCPU is not run (others are). [any] */
void soft_vcpu_park(struct soft_vm *vm, uint32_t vcpu, bool parked);

/* Execute one instruction of a vCPU that another hypervisor runs: with state and memory as they are now and nothing kept
 * of earlier calls. Events that are pending stay so; what the instruction raises is delivered through the guest's own
 * tables; it has its traps. A repeated string instruction is done to its end, or to a bounded number of repetitions. */
enum soft_finish {
    SOFT_FINISHED,
    SOFT_FINISH_UNKNOWN,  /* this core does not know the instruction either: #UD would follow, and nothing was changed */
    SOFT_FINISH_SHUTDOWN, /* triple fault */
};
enum soft_finish soft_vcpu_finish(struct soft_vm *vm, uint32_t vcpu);

/* Interrupts. [any] */
void soft_vm_set_irq(struct soft_vm *vm, uint32_t gsi, bool level);
void soft_vm_signal_msi(struct soft_vm *vm, uint64_t address, uint32_t data);
void soft_vm_nmi(struct soft_vm *vm, uint32_t vcpu);

/* Time in ns since the VM's start: host monotonic, or virtual. [any] */
uint64_t soft_vm_now(struct soft_vm *vm);
/* Make soft_vm_run() return SOFT_STOP_ALARM once now >= deadline_ns (UINT64_MAX: never). [any] */
void soft_vm_set_alarm(struct soft_vm *vm, uint64_t deadline_ns);
/* Instructions retired by all vCPUs; the hot counters by name are in soft_vm_stats(). */
uint64_t soft_vm_instructions(struct soft_vm *vm);

struct soft_stats {
    uint64_t instructions, blocks_decoded, blocks_invalidated, tlb_flushes, tlb_fills, exceptions, interrupts,
        halts, accesses, icache_misses;
};
void soft_vm_stats(struct soft_vm *vm, struct soft_stats *stats);

/* ---- direct execution (direct/): 64-bit code of CPL 3 runs natively, in processes that map guest memory ---- */

/* What of guest memory stands where in the descriptor that holds all of it. */
struct soft_direct_memory {
    void *host;
    uint64_t size, offset;
};
/* From now on, for memory that `fd` (which is duplicated) holds and that is mapped shared. `program`: the path of cpu/runner's
 * program. always: also where it does not pay. Once for a VM with the real clock; with fd -1 and count 0 it ends, for
 * good: memory is about to be mapped otherwise. -EINVAL, -EBUSY, -ENOMEM. */
int soft_vm_set_direct(struct soft_vm *vm, const struct soft_direct_memory *memory, uint32_t count, int fd, const char *program,
                       bool always);
/* What this host can for it, as bits; or -errno, and why in a few words. On any thread without a VM. */
enum { SOFT_DIRECT_CPUID_FAULTS = 1, SOFT_DIRECT_BREAKPOINTS = 2 /* a runner may have execution breakpoints */ };
int soft_direct_probe(const char *program, char *why, size_t size);

/* Why native code stopped. */
enum soft_native_stop {
    SOFT_NATIVE_CALL,  /* a system call */
    SOFT_NATIVE_PAGE,  /* a page that the runner has not, or not so */
    SOFT_NATIVE_FAULT, /* another fault, and what is made to fault */
    SOFT_NATIVE_GUARD, /* a breakpoint of ours: an instruction that would see the host */
    SOFT_NATIVE_KICK,  /* an interrupt, a timer, somebody's turn */
    SOFT_NATIVE_STOPS
};
/* Why code of CPL 3 was executed in the core. */
enum soft_native_core {
    SOFT_CORE_IMPOSSIBLE, /* not in this state: 32-bit code, debugging, addresses that are ours */
    SOFT_CORE_YOUNG,      /* its address space has no runner yet */
    SOFT_CORE_TRIAL,      /* it may be about to call the kernel */
    SOFT_CORE_POOR,       /* native stretches of its address space are too short to pay */
    SOFT_CORE_REFUSED,    /* its page may not run natively, or what it touches is no RAM */
    SOFT_CORE_STOP,       /* the instruction that a runner stopped at */
    SOFT_CORE_WHYS
};
struct soft_native_stats {
    uint64_t ns;                       /* of a host processor's time */
    uint64_t stops;
    uint64_t stop[SOFT_NATIVE_STOPS];
    uint64_t core[SOFT_CORE_WHYS];     /* instructions */
    uint64_t pages;                    /* mapped for runners */
    uint64_t commands, batches;        /* calls of mappers, and how often one was asked */
    uint64_t refused;                  /* tries to execute a page natively that may not be */
    uint64_t spaces;                   /* address spaces that got a runner */
};
void soft_direct_stats(const struct soft_vm *vm, struct soft_native_stats *stats);

/* CPUID as the VMM sets it; the layout is struct kvm_cpuid_entry2's. */
struct kvm_cpuid_entry2;
int soft_vcpu_set_cpuid(struct soft_vm *vm, uint32_t vcpu, const struct kvm_cpuid_entry2 *entries, uint32_t count);
/* The components of state (XCR0) that a vCPU of the core can have on this host. */
uint64_t soft_supported_xcr0(void);
/* What the core implements. Returns the number of entries written (at most max). */
uint32_t soft_supported_cpuid(struct kvm_cpuid_entry2 *entries, uint32_t max);

/* State, in the layouts of the KVM API (linux/kvm.h): kind names the structure. Sizes are exact, except XSAVE
 * (4096) and MSRS (struct kvm_msrs with nmsrs entries; get fills the data of the indices given). 0, -EINVAL. */
enum soft_state {
    SOFT_STATE_REGS,        /* struct kvm_regs */
    SOFT_STATE_SREGS,       /* struct kvm_sregs */
    SOFT_STATE_XSAVE,       /* struct kvm_xsave, 4096 bytes, standard format */
    SOFT_STATE_XCRS,        /* struct kvm_xcrs */
    SOFT_STATE_MSRS,        /* struct kvm_msrs */
    SOFT_STATE_LAPIC,       /* struct kvm_lapic_state */
    SOFT_STATE_EVENTS,      /* struct kvm_vcpu_events */
    SOFT_STATE_DEBUGREGS,   /* struct kvm_debugregs */
    SOFT_STATE_MP,          /* struct kvm_mp_state */
    SOFT_STATE_EXTRA,       /* our own, SOFT_EXTRA_STATE_SIZE bytes: set it after all others */
};
int soft_vcpu_get(struct soft_vm *vm, uint32_t vcpu, enum soft_state kind, void *data, size_t size);
int soft_vcpu_set(struct soft_vm *vm, uint32_t vcpu, enum soft_state kind, const void *data, size_t size);
/* The MSR indices worth saving; returns their number. */
uint32_t soft_msr_list(uint32_t *indices, uint32_t max);

enum soft_vm_state {
    SOFT_VM_PIC_MASTER, SOFT_VM_PIC_SLAVE, SOFT_VM_IOAPIC, /* struct kvm_irqchip */
    SOFT_VM_PIT,                                           /* struct kvm_pit_state2 */
    SOFT_VM_CLOCK,                                         /* struct kvm_clock_data */
    SOFT_VM_CORE,                                          /* our own: scheduler turn, instruction counts */
    SOFT_VM_TSC,                                           /* uint64_t: kHz of the guests' TSC */
};
enum { SOFT_CORE_STATE_SIZE = 24 + 8 * SOFT_MAX_VCPUS, SOFT_EXTRA_STATE_SIZE = 48 }; /* exact sizes */
int soft_vm_get(struct soft_vm *vm, enum soft_vm_state kind, void *data, size_t size);
int soft_vm_set(struct soft_vm *vm, enum soft_vm_state kind, const void *data, size_t size);

/* ---- debugging, for the caller; the guest's own debug registers and memory are left alone ---- */

enum soft_point_kind { SOFT_POINT_EXECUTE, SOFT_POINT_WRITE, SOFT_POINT_READ, SOFT_POINT_ACCESS };
struct soft_point {
    uint64_t address; /* linear */
    uint32_t length;  /* bytes watched, at most SOFT_POINT_LENGTH; execution: ignored */
    uint32_t kind;    /* enum soft_point_kind */
};
enum { SOFT_MAX_POINTS = 1024, SOFT_POINT_LENGTH = 1 << 20 };
struct soft_debug {
    bool step;            /* stop after an instruction, or when an interrupt or exception was delivered */
    bool frozen;          /* execute nothing, although not parked */
    bool hold_interrupts; /* deliver neither interrupts nor NMIs to a vCPU that does not sleep */
    bool int3;            /* INT3 stops instead of raising #BP */
    uint32_t count;
    const struct soft_point *points;
};
/* Replace what a vCPU is debugged with (all zeroes: nothing any more). SOFT_STOP_DEBUG comes before an instruction that a
 * point of execution stands at (unless it is stepped), and after one that touched what is watched. -EINVAL, -E2BIG, -ENOMEM. */
int soft_vcpu_set_debug(struct soft_vm *vm, uint32_t vcpu, const struct soft_debug *debug);
enum soft_debug_reason { SOFT_DEBUG_STEP, SOFT_DEBUG_EXECUTE, SOFT_DEBUG_WATCH, SOFT_DEBUG_INT3 };
/* Why the vCPU stopped last; *address: the point of execution, or what was touched. */
enum soft_debug_reason soft_vcpu_debug_reason(const struct soft_vm *vm, uint32_t vcpu, uint64_t *address);
/* Where the vCPU's page tables lead: no rights are checked, no bits of the tables change. -EFAULT: nowhere. */
int soft_vcpu_translate(struct soft_vm *vm, uint32_t vcpu, uint64_t linear, uint64_t *gpa);

/* What a vCPU executed: blocks, and what was delivered in between. */
enum { SOFT_TRACE_BLOCK, SOFT_TRACE_STEP, SOFT_TRACE_EVENT };
struct soft_trace_entry {
    uint64_t address;      /* linear, of the first instruction; EVENT: of the one that was interrupted */
    uint64_t instructions; /* that this vCPU had retired before */
    uint32_t count;        /* how often in a row; EVENT: the vector */
    uint32_t kind;
};
/* Keep the last `entries` of each vCPU from now on (0: none, and what was kept is gone). 0, -EINVAL, -ENOMEM. */
int soft_vm_set_trace(struct soft_vm *vm, uint32_t entries);
/* Copy what is kept, the oldest first; returns how many (at most max). */
uint32_t soft_vcpu_trace(const struct soft_vm *vm, uint32_t vcpu, struct soft_trace_entry *out, uint32_t max);

#endif
