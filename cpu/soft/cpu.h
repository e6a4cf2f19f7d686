/* State of a vCPU of the software core, and the functions its files offer each other.
 *
 * Folders: decode (bytes to micro-ops), ops (what micro-ops are and can do: the table of operations, lazy flags), interp
 * (their handlers, instruction helpers), jit (host code for hot blocks), mmu (slots, page walk, TLBs, slow loads and
 * stores, dirty log), system (segments, far transfers, exceptions, interrupt delivery, control, debug and model-specific
 * registers, CPUID), run (block cache, code by linear address, scheduler, clock, events from other threads, state in KVM's
 * layouts, public interface), fpu, irqchip.
 *
 * Faults: soft_raise() and what calls it do not return: they longjmp to the run loop. A handler must therefore
 * not have changed architectural state before its last access that can fault, and must have stored c->rip
 * (the address of the instruction itself) before any call that can raise or can reach the access callback.
 */
#ifndef SOFT_CPU_H
#define SOFT_CPU_H

#include <pthread.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>

#include "soft/fpu/avx.h"
#include "soft/fpu/fpu.h"
#include "soft/irqchip/irqchip.h"
#include "soft/soft.h"

#define SOFT_LIKELY(x) __builtin_expect(!!(x), 1)
#define SOFT_UNLIKELY(x) __builtin_expect(!!(x), 0)

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };
enum { SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS, SEG_COUNT };

#define F_CF 0x1u
#define F_PF 0x4u
#define F_AF 0x10u
#define F_ZF 0x40u
#define F_SF 0x80u
#define F_TF 0x100u
#define F_IF 0x200u
#define F_DF 0x400u
#define F_OF 0x800u
#define F_IOPL 0x3000u
#define F_NT 0x4000u
#define F_RF 0x10000u
#define F_VM 0x20000u
#define F_AC 0x40000u
#define F_VIF 0x80000u
#define F_VIP 0x100000u
#define F_ID 0x200000u
#define F_ARITH (F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF)

enum { VEC_DE = 0, VEC_DB = 1, VEC_NMI = 2, VEC_BP = 3, VEC_OF = 4, VEC_BR = 5, VEC_UD = 6, VEC_NM = 7, VEC_DF = 8,
       VEC_TS = 10, VEC_NP_ = 11, VEC_SS = 12, VEC_GP = 13, VEC_PF = 14, VEC_MF = 16, VEC_AC = 17, VEC_XM_ = 19 };

#define CR0_PE (1ull << 0)
#define CR0_MP (1ull << 1)
#define CR0_EM (1ull << 2)
#define CR0_TS (1ull << 3)
#define CR0_NE (1ull << 5)
#define CR0_WP (1ull << 16)
#define CR0_AM (1ull << 18)
#define CR0_PG (1ull << 31)
#define CR4_VME (1u << 0)
#define CR4_PVI (1u << 1)
#define CR4_TSD (1u << 2)
#define CR4_DE (1u << 3)
#define CR4_PSE (1u << 4)
#define CR4_PAE (1u << 5)
#define CR4_MCE (1u << 6)
#define CR4_PGE (1u << 7)
#define CR4_OSFXSR (1u << 9)
#define CR4_OSXMMEXCPT (1u << 10)
#define CR4_UMIP (1u << 11)
#define CR4_FSGSBASE (1u << 16)
#define CR4_PCIDE (1u << 17)
#define CR4_OSXSAVE (1u << 18)
#define CR4_SMEP (1u << 20)
#define CR4_SMAP (1u << 21)
#define EFER_SCE (1u << 0)
#define EFER_LME (1u << 8)
#define EFER_LMA (1u << 10)
#define EFER_NXE (1u << 11)

/* A segment register's hidden part. attr is bits 40-55 of the descriptor: type 0-3, S 4, DPL 5-6, P 7, (limit 8-11),
 * AVL 12, L 13, D/B 14, G 15. limit is in bytes (granularity applied). A null selector has P clear ("unusable"). */
struct soft_seg {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint16_t attr;
};
#define SEG_TYPE(s) ((s)->attr & 15)
#define SEG_S(s) (((s)->attr >> 4) & 1)
#define SEG_DPL(s) (((s)->attr >> 5) & 3)
#define SEG_P(s) (((s)->attr >> 7) & 1)
#define SEG_L(s) (((s)->attr >> 13) & 1)
#define SEG_DB(s) (((s)->attr >> 14) & 1)

/* Software TLB: direct-mapped on the linear page number; one table for each kind of access and each view of memory.
 * A hit: entry.tag == (linear page address); host pointer = linear + addend. tag is 1 (never a page address) when empty.
 * A page that is not plain RAM for this access (MMIO, read-only, or holding translated code when writing, or dirty
 * logging not yet satisfied) is never installed, so it always takes the slow path. */
enum { TLB_BITS = 10, TLB_SIZE = 1 << TLB_BITS };
enum soft_kind { ACCESS_READ, ACCESS_WRITE, ACCESS_EXEC, ACCESS_KINDS };
enum soft_view { VIEW_SUPERVISOR, VIEW_USER, VIEW_SUPERVISOR_AC /* SMAP on and EFLAGS.AC set */, VIEW_COUNT };
struct soft_tlb_entry {
    uint64_t tag;
    uint64_t addend;
};
struct soft_tlb {
    struct soft_tlb_entry e[ACCESS_KINDS][TLB_SIZE];
};

struct soft_slot {
    uint64_t gpa, size;
    uint8_t *host;
    bool readonly, log_dirty;
    uint8_t *dirty;      /* bitmap, when log_dirty */
    uint16_t *code_pages; /* for each page: bit i: vm->caches[i] has translated code of it */
    uint64_t *granules;   /* shared.c, else NULL: for each page, bit i: there is code in the i-th 64 bytes */
    /* shared.c, with threads of their own or direct execution, else NULL: for each page, */
    uint16_t *writers;    /* bit i: vCPU i may have a TLB entry to write to it, or a runner may; */
    uint16_t *executors;  /* bit i: a runner of vCPU i may execute it as it was looked at */
};

enum soft_activity { ACT_RUNNING, ACT_HALTED, ACT_WAIT_SIPI, ACT_MWAIT };

/* mmu.c's own: which entries were filled, so that a flush touches only those ([1]: of global pages), and which 4 MiB
 * and 1 GiB regions (hashed) had entries from large pages, so that INVLPG can drop all of them. */
enum { TLB_LIST = 1536, TLB_VICTIMS = 8, TLB_ENTRIES = VIEW_COUNT * ACCESS_KINDS * TLB_SIZE };
struct soft_victim {
    struct soft_tlb_entry entry;
    bool global;
};
struct soft_mmu {
    uint32_t used[2]; /* > TLB_LIST: the list overflowed, clear everything */
    uint16_t list[2][TLB_LIST];
    uint64_t listed[2][TLB_ENTRIES / 64]; /* bit n: entry n is in list[] */
    /* What was last replaced, so that two pages that share an entry do not need a walk at every turn. */
    struct soft_victim victims[VIEW_COUNT][ACCESS_KINDS][TLB_VICTIMS];
    uint8_t next_victim;
    bool have_victims;
    uint64_t large4m[16], large1g[4];
    uint64_t watched[4]; /* pages with data breakpoints (page address | 1), never installed */
    bool watching;
    uint64_t pdpte[4];   /* PAE: loaded with CR3 */
};

struct uop; /* uop.h */
struct soft_vm;

/* jump.c's own: translated code by linear address, a direct-mapped table for each of 64-bit supervisor, 64-bit user and
 * other modes; which entries were filled since the last flush; and a filter of the linear pages among them. [1]: the first
 * table's, which outlive a change of CR3 as their global pages do; [0]: the others'. */
enum { JUMP_SIZE = 16384, JUMP_TABLES = 3 };
struct soft_jump {
    uint64_t linear;
    struct uop *code;
};
struct soft_jumps {
    uint32_t used[2]; /* > JUMP_SIZE: the list overflowed */
    uint32_t mode;    /* MODE_* that the entries of the third table are for */
    bool local;       /* 64-bit supervisor code of a page that is not global is among them */
    uint64_t pages[2][64];
    uint16_t list[2][JUMP_SIZE];
    struct soft_jump table[JUMP_TABLES][JUMP_SIZE];
};

/* Results of the accesses that the instruction under way has made (defer.c). `key` tells one run of an instruction, or
 * one iteration of a repeated one, from the next: instructions retired, RIP, RCX, RSI, RDI. */
enum { SOFT_REPLAY = 128 };
struct soft_replay {
    uint64_t key[5];
    uint32_t count, next;
    bool allowed;   /* accesses now are an instruction's, not those of event delivery */
    bool deferring; /* soft_vcpu_defer() was called in the callback under way */
    bool retry;     /* the access after the last of `results` is due again */
    uint64_t results[SOFT_REPLAY];
};

/* breakpoint.c's own: what the caller debugs this vCPU with, and the trace. */
struct soft_caller {
    bool step, frozen, hold_interrupts, int3;
    bool active;             /* `step`, or a trace: event delivery has to tell */
    bool stepped;            /* an instruction or event delivery ended since the last stop */
    bool retry;              /* the instruction at retry_rip touches what is watched: step it */
    bool touched;            /* what is watched was touched, at `address` */
    uint8_t reason;          /* enum soft_debug_reason */
    uint64_t address, retry_rip;
    struct soft_point *points; /* those of execution first, by address */
    uint32_t executes, count;
    struct soft_trace_entry *trace;
    uint32_t trace_size;
    uint64_t trace_count;    /* entries ever made */
};

/* shared.c's own: what other threads ask of a vCPU's thread, which looks between blocks and as it enters the guest. */
enum { INBOX_RANGES = 64, INBOX_EXECUTED = 32 };
struct soft_inbox {
    pthread_mutex_t lock;
    uint32_t pending;                       /* atomic: anything below */
    const uint8_t *protect[SOFT_MAX_VCPUS]; /* by who asks: forget how to write to this host page; atomic */
    bool protect_all;
    bool flush;                             /* there were more ranges */
    uint32_t range_count;
    struct { uint64_t gpa, size; } ranges[INBOX_RANGES]; /* code bytes that were written */
    uint64_t executed[INBOX_EXECUTED];      /* pages that were written: no runner executes them any more */
    uint32_t executed_count;                /* atomic; INBOX_EXECUTED + 1: there were more, so it is all pages */
    uint32_t executed_served;               /* atomic: counts how often that was done */
};
struct soft_own_thread {
    struct soft_inbox inbox;
    uint32_t inside;   /* atomic: executes, or is about to; others must not touch its state */
    uint32_t wake;     /* atomic: soft_vcpu_run() is to return */
    uint32_t dead;     /* atomic: sleeps, and only an NMI, INIT or SIPI could wake it */
    uint32_t told;     /* atomic: `lives` of the VM at which it reported so */
    bool alone;        /* soft_alone_begin() */
    uint32_t pauses;   /* PAUSEs in a row, the last at this number of instructions */
    uint64_t paused_at;
};

struct soft_vcpu {
    /* --- hot: touched by every handler --- */
    uint64_t gpr[16];
    uint64_t zero;           /* always 0: what an absent base or index register reads as */
    uint64_t tmp[3];         /* micro-op temporaries; tmp[0] is the linear address of a complex memory operand */
    uint64_t rip;            /* outside 64-bit mode: EIP or IP, relative to CS.base */
    uint64_t lf[3];          /* lazy arithmetic flags: representation private to flags.h */
    uint32_t rflags;         /* all other flags (and bit 1); arithmetic bits here are meaningless */
    uint32_t attention;      /* nonzero: leave the block loop (interrupt, event, wake). Written by other threads: atomic */
    int64_t budget;          /* instructions left in this turn: see soft_set_budget(), soft_instructions() */
    uint64_t turn_end;       /* instructions retired + budget */
    int64_t budget_held;     /* block.c: kept back from budget while single instructions are run */
    uint16_t host_flags;     /* host code's own: arithmetic flags as the host has them (jit/translate_flags.c) */
    struct soft_jump *jumps; /* jump.table of the mode */
    const struct soft_tlb *tlb; /* tlbs[view], or an empty one */
    struct soft_seg seg[SEG_COUNT];
    uint8_t cpl;
    uint8_t shadow;          /* 1: of STI (if IF was clear), 2: of MOV SS and POP SS. See soft_cast_shadow() */
    bool long_mode;          /* EFER.LMA */
    bool code64;             /* LMA and CS.L */
    uint8_t view;            /* enum soft_view */
    bool irq_waiting;        /* an interrupt waits for IF: see soft_system_flags_changed() */
    bool align_check;        /* CPL 3, CR0.AM and EFLAGS.AC: every load and store takes the slow path, which checks */
    uint8_t access_ss;       /* the slow access under way goes through SS: non-canonical raises #SS, not #GP */

    struct soft_vm *vm;
    struct block_cache *blocks; /* block.c */
    uint32_t asleep;         /* atomic: its own thread waits, or is about to, until `attention` is set */
    uint32_t index;
    jmp_buf fault;           /* soft_raise() and soft_leave() come here */

    /* --- system --- */
    struct soft_seg ldtr, tr;
    struct { uint64_t base; uint16_t limit; } gdtr, idtr;
    uint64_t cr0, cr2, cr3, cr4, xcr0;
    uint64_t dr[8];
    uint32_t efer;
    uint64_t star, lstar, cstar, fmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip, tsc_aux, pat;
    uint64_t mtrr_def, mtrr_fixed[11], mtrr_phys[16], misc_enable, mcg_status, spec_ctrl;
    uint64_t tsc_offset;     /* guest TSC = vm TSC + offset */
    uint64_t tsc_adjust;
    uint64_t kvm_system_time, kvm_wall_clock, kvm_async_pf, kvm_steal_time, kvm_pv_eoi;
    enum soft_activity activity;
    bool parked;
    bool nmi_pending, nmi_blocked;
    bool in_exception;       /* for #DF and triple fault */
    uint8_t exception_vector;
    bool pending_valid;      /* an exception or interrupt being injected (KVM's vcpu_events) */
    uint8_t pending_vector, pending_kind; /* enum soft_event */
    bool pending_has_error;
    uint32_t pending_error;
    /* what soft_raise() hands to the run loop */
    uint8_t fault_vector;
    bool fault_has_error;
    uint32_t fault_error;
    uint64_t fault_linear;
    uint8_t data_hits;       /* data and port breakpoints (DR0-3) that the current instruction touched */
    uint8_t held_hits;       /* those of a MOV SS or POP SS, for the end of the next instruction */
    bool init_pending, sipi_pending;
    uint8_t sipi_vector;
    uint64_t shadow_rip;     /* the instruction that is in the shadow */
    uint64_t mwait_until;    /* ns; ACT_MWAIT ends then */
    uint64_t turn_limit_ns;  /* the turn under way ends no later: the next timer event */
    uint32_t pace;           /* ns that 1024 instructions took of late: see soft_pace() */
    bool turn_over;          /* end the turn under way: the timers or the turn order need a look */
    bool in_step;            /* soft_step() is under way; step_flags: RFLAGS before it */
    bool trap_taken;         /* the instruction entered a handler by itself (INT n, SYSCALL): no single-step trap */
    uint32_t step_flags;
    struct soft_caller caller; /* breakpoint.c: the caller's debugging */
    struct soft_mmu mmu;
    struct fpu fpu;

    struct soft_cpuid_entry { uint32_t function, index, flags, eax, ebx, ecx, edx; } cpuid[128];
    uint32_t cpuid_count;
    struct soft_stats stats;
    uint32_t features;  /* MODE_FEATURE(): those of its CPUID that decide how bytes are decoded */
    uint64_t phys_mask; /* of the physical addresses that the guest's CPUID announces, at most PHYS_BITS */

    struct direct_vcpu *direct; /* NULL: its code never runs natively */
    struct soft_own_thread own;
    struct soft_jumps jump;
    struct soft_replay replay;

    struct soft_tlb tlbs[VIEW_COUNT];
};

struct soft_vm {
    struct soft_config config;
    struct soft_host host;
    struct irqchip *irqchip;
    struct soft_slot slots[SOFT_MAX_SLOTS];
    uint32_t slot_count;
    uint32_t last_slot; /* where the last look-up hit */
    struct soft_vcpu *vcpus[SOFT_MAX_VCPUS];
    uint32_t turn;      /* whose turn it is */
    int64_t turn_left;  /* instructions of its quantum that are left; what interrupts a turn does not end it */
    struct block_cache *caches[SOFT_MAX_VCPUS]; /* block.c: of the vCPUs, which may share one */
    uint32_t cache_count;
    struct soft_parallel *parallel; /* parallel.c; NULL: one thread runs all vCPUs */
    struct vm_events *events;   /* vm.c: what other threads sent (irqs, MSIs, wake, DMA), under its own lock */
    uint64_t virtual_ns_skipped;/* virtual clock: time that HLT skipped */
    uint64_t idle_since;        /* when no vCPU could run any more; UINT64_MAX: one can. One thread for all vCPUs */
    uint64_t start_ns, alarm_ns, tsc_base;
    uint64_t stops[64];         /* breakpoint.c: offsets in pages at which blocks end */
    struct direct_vm *direct;   /* NULL: no direct execution */
};

/* Instructions retired by this vCPU. Exact between instructions and in every call out of a handler (there: without
 * the instruction under way). */
static inline uint64_t soft_instructions(const struct soft_vcpu *c) { return c->turn_end - (uint64_t)(c->budget + c->budget_held); }
/* STI and MOV SS hold interrupts until the instruction behind them is done: while RIP is there, the run loop executes one
 * instruction before it delivers. Nothing has to be done when that instruction is past: a program that jumps back to it is
 * interrupted one instruction later than it could be. */
static inline void soft_cast_shadow(struct soft_vcpu *c, uint8_t shadow)
{
    c->shadow = shadow;
    c->shadow_rip = c->rip;
}
static inline uint8_t soft_shadow(const struct soft_vcpu *c) { return c->rip == c->shadow_rip ? c->shadow : 0; }
/* Start a turn of n instructions (run loop; never change c->budget otherwise). */
static inline void soft_set_budget(struct soft_vcpu *c, int64_t n)
{
    c->turn_end = soft_instructions(c) + (uint64_t)n;
    c->budget_held = 0;
    c->budget = n;
}
/* The turn ends n instructions earlier, for one that took as long as so many. With the virtual clock, time is counted in
 * instructions, and a turn's length is theirs alone. */
static inline void soft_shorten_turn(struct soft_vcpu *c, uint64_t n)
{
    c->turn_end -= n;
    c->budget -= (int64_t)n;
}

/* ---- guest memory ----
 * It has no alignment, and others look at it at the same time: each of these is one access of the host. The host orders them
 * as the guest's processor does (Intel SDM vol. 3, 9.2), being of its kind. */
typedef uint8_t mem8;
typedef uint16_t mem16 __attribute__((aligned(1), may_alias));
typedef uint32_t mem32 __attribute__((aligned(1), may_alias));
typedef uint64_t mem64 __attribute__((aligned(1), may_alias));
#define MEM(bits, p) (*(volatile mem##bits *)(p))
#ifdef __SANITIZE_THREAD__ /* what guests race for is theirs */
#define GUEST_ACCESS __attribute__((noinline, unused, no_sanitize_thread))
#else
#define GUEST_ACCESS inline
#endif
static GUEST_ACCESS uint8_t soft_load8(const uint8_t *p) { return MEM(8, (uintptr_t)p); }
static GUEST_ACCESS uint16_t soft_load16(const uint8_t *p) { return MEM(16, (uintptr_t)p); }
static GUEST_ACCESS uint32_t soft_load32(const uint8_t *p) { return MEM(32, (uintptr_t)p); }
static GUEST_ACCESS uint64_t soft_load64(const uint8_t *p) { return MEM(64, (uintptr_t)p); }
static GUEST_ACCESS void soft_store8(uint8_t *p, uint8_t v) { MEM(8, p) = v; }
static GUEST_ACCESS void soft_store16(uint8_t *p, uint16_t v) { MEM(16, p) = v; }
static GUEST_ACCESS void soft_store32(uint8_t *p, uint32_t v) { MEM(32, p) = v; }
static GUEST_ACCESS void soft_store64(uint8_t *p, uint64_t v) { MEM(64, p) = v; }
static GUEST_ACCESS void soft_load_code(uint8_t *to, const uint8_t *from, unsigned size)
{
    for (; size >= 8; to += 8, from += 8, size -= 8)
        MEM(64, to) = MEM(64, (uintptr_t)from);
    for (; size; to++, from++, size--)
        *to = MEM(8, (uintptr_t)from);
}

/* ---- faults ---- */
__attribute__((noreturn)) void soft_raise(struct soft_vcpu *c, uint8_t vector);                      /* no error code */
__attribute__((noreturn)) void soft_raise_error(struct soft_vcpu *c, uint8_t vector, uint32_t error);
__attribute__((noreturn)) void soft_raise_pf(struct soft_vcpu *c, uint64_t linear, uint32_t error);  /* sets CR2 */
/* Leave the block loop at once without a fault, c->rip being the next instruction to run. The instruction that
 * leaves is retired: soft_leave() takes it off the budget (c->budget--). After a fault it is not. */
__attribute__((noreturn)) void soft_leave(struct soft_vcpu *c);
__attribute__((noreturn)) void soft_triple_fault(struct soft_vcpu *c);

/* ---- mmu.c ----  linear addresses; view as c->view unless said otherwise */
/* Translate, checking rights and setting A/D bits; raises #PF. Installs a TLB entry if the page is plain RAM for this
 * access. Returns the host address of `linear`, or NULL with *gpa set when it is not plain RAM (for ACCESS_EXEC
 * plain RAM includes read-only slots). Probe the TLB first: this is its slow path. */
uint8_t *soft_mmu_lookup(struct soft_vcpu *c, uint64_t linear, enum soft_kind kind, uint64_t *gpa);
/* How many of the `size` bytes from `linear` on (more than 0) are plain RAM in one piece, so far as one large page goes;
 * *host: where. 0: not even the first, as when soft_mmu_lookup() returns NULL; raises #PF for the first byte only. The
 * pages of the answer are in the dirty log as written, with ACCESS_WRITE. Walks the tables unless the page is small. */
uint64_t soft_mmu_run(struct soft_vcpu *c, uint64_t linear, uint64_t size, enum soft_kind kind, uint8_t **host);
/* The slow path of every load and store: any size 1-8, page-crossing, MMIO, code pages, non-canonical (#GP/#SS). */
uint64_t soft_load_slow(struct soft_vcpu *c, uint64_t linear, unsigned size);
void soft_store_slow(struct soft_vcpu *c, uint64_t linear, unsigned size, uint64_t value);
/* Any length up to 4096: reads or writes all or faults before anything is written. */
void soft_load_bytes(struct soft_vcpu *c, uint64_t linear, void *to, unsigned size);
void soft_store_bytes(struct soft_vcpu *c, uint64_t linear, const void *from, unsigned size);
/* #AC, if that is enabled. Every slow access checks for itself; here for what checks before it accesses. */
void soft_check_alignment(struct soft_vcpu *c, uint64_t linear, unsigned size);
/* Raise now if [linear, +size) cannot be written (probe before a multi-part store or read-modify-write). */
void soft_probe_write(struct soft_vcpu *c, uint64_t linear, unsigned size);
/* Begin a locked read-modify-write; raises what its accesses would. True: the caller does it at `host`, by a locked operation
 * of the host. False: the caller does it by loads and stores, and no other vCPU executes meanwhile if all of it is RAM.
 * soft_unlock() follows in both cases. */
struct soft_locked {
    uint8_t *host;          /* NULL: loads and stores */
    struct soft_slot *slot; /* to be told of the write, or NULL */
    uint64_t gpa;
    unsigned size;
};
bool soft_lock(struct soft_vcpu *c, uint64_t linear, unsigned size, struct soft_locked *l);
void soft_unlock(struct soft_vcpu *c, const struct soft_locked *l);
static inline bool soft_one_line(uint64_t at, unsigned size) { return (at & 63) + size <= 64; }
/* Supervisor accesses of the processor itself (descriptor tables, TSS, IDT): as above with CPL 0, no SMAP. */
uint64_t soft_sys_load(struct soft_vcpu *c, uint64_t linear, unsigned size);
void soft_sys_store(struct soft_vcpu *c, uint64_t linear, unsigned size, uint64_t value);
/* Guest-physical. phys: NULL if not in a slot, or (for_write) read-only. Length is within one page. */
uint8_t *soft_phys(struct soft_vm *vm, uint64_t gpa, bool for_write, struct soft_slot **slot);
/* An access that only the caller can answer. If the callback set another RIP (soft_vcpu_set()), this does not return: the
 * vCPU goes on with what was set. */
uint64_t soft_host_access(struct soft_vcpu *c, const struct soft_access *access);
uint64_t soft_phys_load(struct soft_vcpu *c, uint64_t gpa, unsigned size);          /* RAM, in-core MMIO or callback */
void soft_phys_store(struct soft_vcpu *c, uint64_t gpa, unsigned size, uint64_t value);
/* Write guest-physical RAM on the processor's behalf (A/D bits, kvmclock): dirty log and code invalidation done. */
void soft_phys_write(struct soft_vm *vm, uint64_t gpa, const void *from, unsigned size); /* by no vCPU's store */
/* Bytes of one page of a slot were written at soft_phys(), by a vCPU's store or (NULL) by anyone. */
void soft_written(struct soft_vm *vm, struct soft_vcpu *by, struct soft_slot *slot, uint64_t gpa, unsigned size);
void soft_tlb_flush(struct soft_vcpu *c, bool global_too);
/* For another CR3; keep: the guest asked for no flush. */
void soft_tlb_switch(struct soft_vcpu *c, bool keep);
/* Whether code at `linear` is fetched through an entry that outlives a change of CR3. */
bool soft_tlb_executes_global(struct soft_vcpu *c, uint64_t linear);
void soft_tlb_flush_page(struct soft_vcpu *c, uint64_t linear);
void soft_tlb_flush_all_vcpus(struct soft_vm *vm);
/* Every page's next write takes the slow path, so that the dirty log sees it. */
void soft_tlb_flush_writes(struct soft_vm *vm);
/* A page now holds (or no longer holds) translated code: drop write entries for it in every vCPU's TLBs. */
void soft_tlb_protect_page(struct soft_vm *vm, uint64_t gpa);
/* The same of one vCPU. NULL: for all pages. */
void soft_tlb_protect(struct soft_vcpu *c, const uint8_t *host);
/* Recompute c->view, c->tlb, c->long_mode, c->code64 after CPL, AC, CR0/4, EFER or CS changed. */
void soft_mode_changed(struct soft_vcpu *c);

static inline bool soft_canonical(uint64_t a) { return (uint64_t)((int64_t)(a << 16) >> 16) == a; }
static inline bool soft_protected(const struct soft_vcpu *c) { return (c->cr0 & CR0_PE) && !(c->rflags & F_VM); }

/* ---- segment.c ---- */
/* MOV/POP/LxS to a segment register (not CS): checks, loads, sets Accessed. */
void soft_load_seg(struct soft_vcpu *c, unsigned seg, uint16_t selector);
void soft_load_ldtr(struct soft_vcpu *c, uint16_t selector);
void soft_load_tr(struct soft_vcpu *c, uint16_t selector);
/* far.c: op_size is 2, 4 or 8; next_rip is what CALL pushes. They set c->rip, CS, CPL, SS:RSP. */
void soft_far_jump(struct soft_vcpu *c, uint16_t selector, uint64_t offset, unsigned op_size);
void soft_far_call(struct soft_vcpu *c, uint16_t selector, uint64_t offset, unsigned op_size, uint64_t next_rip);
void soft_far_return(struct soft_vcpu *c, unsigned op_size, uint16_t pop_bytes);
/* LAR, LSL, VERR, VERW: true sets ZF and (LAR, LSL) *value. */
bool soft_lar(struct soft_vcpu *c, uint16_t selector, uint32_t *value);
bool soft_lsl(struct soft_vcpu *c, uint16_t selector, uint32_t *value);
bool soft_verify(struct soft_vcpu *c, uint16_t selector, bool write);
/* Limit and type check of a data access outside 64-bit mode; raises #GP(0) or #SS(0). Returns the linear address
 * (truncated to 32 bits outside long mode). */
uint64_t soft_seg_check(struct soft_vcpu *c, unsigned seg, uint64_t offset, unsigned size, bool write);

/* ---- interrupt.c ---- */
/* Call after an instruction changed IF or TF (STI, POPF; IRET and SYSRET do it themselves), and end the block there:
 * it sets c->attention when the run loop has to look (an interrupt waited for IF, or TF is set). AC: soft_mode_changed(). */
static inline void soft_system_flags_changed(struct soft_vcpu *c)
{
    if (SOFT_UNLIKELY((c->rflags & F_TF) || ((c->rflags & F_IF) && c->irq_waiting)))
        __atomic_store_n(&c->attention, 1, __ATOMIC_RELAXED);
}
enum soft_event { EVENT_HARDWARE, EVENT_EXCEPTION, EVENT_SOFTWARE /* INT n */, EVENT_INT3, EVENT_ICEBP, EVENT_NMI };
/* Deliver through the IVT or IDT with #DF and triple fault logic. c->rip: what is pushed (fault: the instruction;
 * software: the next one, given as next_rip for privilege checks that fault back). Called by the run loop only. */
void soft_deliver(struct soft_vcpu *c, uint8_t vector, enum soft_event kind, bool has_error, uint32_t error);
/* INT n / INT3 / INTO / INT1 as an instruction: checks DPL, IOPL in VM86; pushes next_rip. */
void soft_software_interrupt(struct soft_vcpu *c, uint8_t vector, enum soft_event kind, uint64_t next_rip);
void soft_iret(struct soft_vcpu *c, unsigned op_size);

/* ---- system.c ---- */
uint64_t soft_read_cr(struct soft_vcpu *c, unsigned n);
void soft_write_cr(struct soft_vcpu *c, unsigned n, uint64_t value); /* #GP, #UD; flushes */
void soft_lmsw(struct soft_vcpu *c, uint16_t value);
uint64_t soft_read_dr(struct soft_vcpu *c, unsigned n);
void soft_write_dr(struct soft_vcpu *c, unsigned n, uint64_t value);
uint64_t soft_rdmsr(struct soft_vcpu *c, uint32_t index);
void soft_wrmsr(struct soft_vcpu *c, uint32_t index, uint64_t value);
void soft_cpuid(struct soft_vcpu *c); /* EAX, ECX in; EAX..EDX out */
void soft_syscall(struct soft_vcpu *c, uint64_t next_rip);
void soft_sysret(struct soft_vcpu *c, bool to64);
void soft_sysenter(struct soft_vcpu *c);
void soft_sysexit(struct soft_vcpu *c, bool to64);
void soft_xsetbv(struct soft_vcpu *c, uint32_t index, uint64_t value);
uint64_t soft_vcpu_xcr0(const struct soft_vcpu *c); /* the components that its CPUID has (cpuid.c) */
/* "#GP(0) if XCR0[0] is clear, or XCR0[2] is set and XCR0[1] is not" (SDM 2D, XSETBV), or others. */
static inline bool soft_xcr0_valid(const struct soft_vcpu *c, uint64_t value)
{
    return (value & 1) && !(value & ~soft_vcpu_xcr0(c)) && (value & 6) != 4;
}
/* Whether the guest's kernel lets instructions with a VEX prefix use vectors: SSE and AVX state. */
static inline bool soft_avx_enabled(const struct soft_vcpu *c) { return (c->cr4 & CR4_OSXSAVE) && (c->xcr0 & 6) == 6; }
void soft_invlpg(struct soft_vcpu *c, uint64_t linear);
void soft_invpcid(struct soft_vcpu *c, uint64_t type, uint64_t pcid, uint64_t linear);
uint64_t soft_rdtsc(struct soft_vcpu *c);
/* IN/OUT permission (CPL > IOPL: TSS bitmap); raises #GP(0). Then the access itself, in-core or callback. */
void soft_check_io(struct soft_vcpu *c, uint16_t port, unsigned size);
uint32_t soft_port_read(struct soft_vcpu *c, uint16_t port, unsigned size);
void soft_port_write(struct soft_vcpu *c, uint16_t port, unsigned size, uint32_t value);
void soft_hlt(struct soft_vcpu *c, uint64_t next_rip);   /* #GP unless CPL 0; then leaves the block loop */
void soft_reset_vcpu(struct soft_vcpu *c, bool init);    /* power-up, or INIT (keeps FPU, MSRs as the SDM says) */
uint64_t soft_now(struct soft_vm *vm);                   /* vm.c */
/* TF, breakpoints and the caller's debugging are the run loop's: while one is active it calls soft_step(), never
 * soft_execute(), and raises #DB itself. What activates one (POPF with TF, MOV DR) sets c->attention. */

/* ---- vm.c ---- */
/* PAUSE: c->rip is the next instruction. Ends the turn if another vCPU can run, else returns. */
void soft_pause(struct soft_vcpu *c);
/* MWAIT: c->rip is the next instruction. Leaves the block loop; the vCPU sleeps until an event, or briefly. */
__attribute__((noreturn)) void soft_mwait(struct soft_vcpu *c);
/* An interrupt controller access may have moved the next timer event or changed what is pending: sets c->attention. */
void soft_irqchip_touched(struct soft_vcpu *c);

/* ---- flags.h holds these, inline ---- uint32_t soft_flags(const struct soft_vcpu *) -> full RFLAGS;
 * void soft_set_flags(struct soft_vcpu *, uint32_t) (all bits taken as given). */

/* ---- breakpoint.c ---- */
/* Whether the caller has a breakpoint at c->cs:rip; it is told then. */
bool soft_breakpoint_here(struct soft_vcpu *c, uint64_t rip);
/* The same of code that is entered from another block; if so, does not return. */
void soft_stop_at_breakpoint(struct soft_vcpu *c, uint64_t rip);
/* An access of the caller's watched ranges by an instruction is undone, and stepped; others are noted. */
void soft_watch_caller(struct soft_vcpu *c, uint64_t linear, unsigned size, bool write);
bool soft_page_watched(const struct soft_vcpu *c, uint64_t page);
void soft_trace(struct soft_vcpu *c, unsigned kind, uint64_t rip, uint64_t instructions, uint32_t count);

/* ---- direct/: what it has to know. Only where c->direct (vm->direct) is there. ---- */
void soft_direct_flushed(struct soft_vcpu *c);                         /* with soft_tlb_flush() */
void soft_direct_flushed_page(struct soft_vcpu *c, uint64_t linear);   /* with soft_tlb_flush_page() */
void soft_direct_switched(struct soft_vcpu *c, bool keep);             /* CR3 was written; keep: without a flush */
void soft_direct_protect(struct soft_vcpu *c, const uint8_t *host);    /* with soft_tlb_protect() */
void soft_direct_code_written(struct soft_vcpu *c, uint64_t gpa);      /* a page that a runner may execute; PAGE_ALL: any of them */
void soft_direct_returned(struct soft_vcpu *c);                        /* SYSRET or IRET, to a program perhaps */
void soft_direct_mode(struct soft_vcpu *c);                            /* the privilege level may have changed */
void soft_direct_kick(struct soft_vcpu *c);                            /* [any] c->attention was set */
bool soft_direct_runs(const struct soft_vcpu *c);                      /* [any] native code may be executing */

#define PAGE_ALL UINT64_MAX

/* ---- parallel.c, shared.c ---- */
/* A page of a slot gets (or has no longer) blocks of this vCPU. When it returns, writes to the page are told. */
void soft_shared_mark(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page, bool on);
void soft_shared_granules(struct soft_vm *vm, const uint8_t *host, uint64_t granules); /* of a page that is marked */
/* Bytes of one page were written, by a vCPU or (NULL) by anyone: who has code of them is told. */
void soft_shared_written(struct soft_vm *vm, struct soft_vcpu *by, struct soft_slot *slot, uint64_t gpa, uint64_t size);
/* A TLB entry to write to the page is about to be made, or a mapping for a runner: whether it may. */
bool soft_shared_may_write(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page);
/* A runner of this vCPU is about to execute the page. When it returns, writes to the page are told: by
 * soft_direct_code_written(), before the writer goes on. */
void soft_shared_execute(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page);
/* Whether another vCPU may write to the page unseen. */
bool soft_shared_others_write(const struct soft_vcpu *c, const struct soft_slot *slot, uint64_t page);
/* This vCPU goes on writing to a page: all give up what they translated of it. */
void soft_shared_give_up(struct soft_vcpu *c, struct soft_slot *slot, uint64_t page);
/* PAUSE where vCPUs have threads of their own: now and then the processor goes to another thread. */
void soft_shared_pause(struct soft_vcpu *c);
/* Between the two no other vCPU executes (but for a fault, which ends it as well). */
void soft_alone_begin(struct soft_vcpu *c);
void soft_alone_end(struct soft_vcpu *c);

/* ---- block.c / exec.c ---- */
/* The granules of 64 bytes that the bytes from `low` to `high` of a page are in, a bit each. */
static inline uint64_t soft_granules(unsigned low, unsigned high)
{
    return (~0ull << (low >> 6)) & (~0ull >> (63 - (high >> 6)));
}
/* Run until budget is used up or c->attention; returns with c->rip the next instruction. Faults longjmp to c->fault. */
void soft_execute(struct soft_vcpu *c);
/* The same for about `most` instructions of the budget. */
void soft_execute_some(struct soft_vcpu *c, int64_t most);
/* Give back what soft_step() or soft_execute_some() kept of the budget when a fault ended them. */
void soft_release_budget(struct soft_vcpu *c);
/* Run exactly one instruction (one iteration of a repeated string instruction is enough), whatever c->attention and
 * c->budget are; counts it. */
void soft_step(struct soft_vcpu *c);
/* The same, keeping nothing of what was decoded: memory may have been changed since by whom no one tells of. */
void soft_step_unkept(struct soft_vcpu *c);
/* Whether the instruction at c->rip is UD0, UD1 or UD2. */
bool soft_undefined_by_name(struct soft_vcpu *c);
struct block_cache *soft_blocks_create(struct soft_vm *vm, uint32_t index); /* index: in vm->caches */
void soft_blocks_destroy(struct block_cache *blocks);
const struct soft_stats *soft_blocks_stats(const struct block_cache *blocks); /* what it counts itself; others are 0 */
void soft_blocks_invalidate(struct block_cache *blocks, uint64_t gpa, uint64_t size); /* after code bytes changed */
void soft_blocks_flush(struct block_cache *blocks); /* everything */
void soft_blocks_flush_all(struct soft_vm *vm);     /* everything of all vCPUs (slots changed) */
/* At these offsets in every page (a bit each) blocks end, and soft_stop_at_breakpoint() is asked. Flushes. */
void soft_blocks_set_stops(struct soft_vm *vm, const uint64_t stops[64]);
void soft_blocks_rest(struct block_cache *blocks); /* its vCPUs sleep, no block runs: give back what exceeds its share of memory */
/* Whether the VM, whose vCPUs share one cache, has more than it may keep when it has slept for a while; and then: forget
 * all code, and give back its memory. No block runs. */
bool soft_blocks_exceed_rest(const struct block_cache *blocks);
void soft_blocks_rest_long(struct block_cache *blocks);
/* ---- jump.c ---- */
void soft_jump_cache_flush(struct soft_vcpu *c, bool global_too);       /* mmu.c: with every TLB flush */
void soft_jump_cache_flush_page(struct soft_vcpu *c, uint64_t linear);  /* mmu.c: with soft_tlb_flush_page() */
void soft_jump_cache_drop(struct soft_vcpu *c);                         /* empty, and its memory goes back */

#endif
