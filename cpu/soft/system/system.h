/* What the system half of the software core (mmu, memory, segment, interrupt, system, state, vm) shares inside. */
#ifndef SOFT_SYSTEM_H
#define SOFT_SYSTEM_H

#include <string.h>

#include "soft/cpu.h"
#include "soft/hostclock.h"
#include "soft/ops/flags.h"

enum { PHYS_BITS = 48, LINEAR_BITS = 48 };
#define PHYS_MASK ((1ull << PHYS_BITS) - 1)
#define PAGE_BYTES 4096ull
#define PAGE_MASK (~(PAGE_BYTES - 1))

/* Page-fault error code (SDM vol. 3, 4.7). */
enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_RSVD = 8, PF_I = 16 };

/* setjmp values of c->fault. */
enum { JUMP_FAULT = 1, JUMP_LEAVE, JUMP_TRIPLE, JUMP_DEBUG, JUMP_RETRY /* abandoned, see defer.c */ };
void soft_drop_deferred(struct soft_vcpu *c); /* defer.c: the instruction ended without the access that was put off */

/* Descriptor attributes, as struct soft_seg keeps them. */
enum { ATTR_S = 1 << 4, ATTR_P = 1 << 7, ATTR_L = 1 << 13, ATTR_DB = 1 << 14, ATTR_G = 1 << 15 };
enum { TYPE_ACCESSED = 1, TYPE_WRITABLE = 2 /* code: readable */, TYPE_EXPAND_DOWN = 4 /* code: conforming */, TYPE_CODE = 8 };
enum { SYS_TSS16 = 1, SYS_LDT = 2, SYS_TSS16_BUSY = 3, SYS_CALL16 = 4, SYS_TASK = 5, SYS_INT16 = 6, SYS_TRAP16 = 7,
       SYS_TSS = 9, SYS_TSS_BUSY = 11, SYS_CALL = 12, SYS_INT = 14, SYS_TRAP = 15 };

#define DR6_FIXED 0xFFFF0FF0u
#define DR6_BS (1u << 14)
#define DR6_BD (1u << 13)
#define DR7_GD (1u << 13)

void soft_rouse(struct soft_vcpu *c); /* parallel.c: end its sleep */
/* The vCPU leaves guest code at its next look at `attention`, or its runner is stopped; a sleeping vCPU is not woken. */
static inline void soft_attend_awake(struct soft_vcpu *c)
{
    __atomic_store_n(&c->attention, 1, __ATOMIC_SEQ_CST);
    if (SOFT_UNLIKELY(c->direct != NULL))
        soft_direct_kick(c);
}
/* The same, and a sleeping vCPU wakes. */
static inline void soft_attend(struct soft_vcpu *c)
{
    soft_attend_awake(c);
    if (SOFT_UNLIKELY(__atomic_load_n(&c->asleep, __ATOMIC_SEQ_CST)))
        soft_rouse(c);
}

struct soft_slot *soft_find_slot(struct soft_vm *vm, uint64_t gpa);
static inline void soft_set_dirty(struct soft_slot *slot, uint64_t page)
{
    uint8_t bit = (uint8_t)(1u << (page & 7));
    if (!(__atomic_load_n(&slot->dirty[page >> 3], __ATOMIC_RELAXED) & bit))
        __atomic_fetch_or(&slot->dirty[page >> 3], bit, __ATOMIC_RELAXED);
}
void soft_slots_free(struct soft_vm *vm); /* what belongs to them; no thread is left */
/* From now on it is known of each page who may write to it and who executes it. 0, -ENOMEM. */
int soft_slots_know_users(struct soft_vm *vm);
/* As soft_mmu_lookup(), with another view. */
uint8_t *soft_mmu_lookup_as(struct soft_vcpu *c, uint64_t linear, enum soft_kind kind, enum soft_view view, uint64_t *gpa);
/* Load the four PDPTEs of PAE paging; false: a reserved bit is set (#GP). */
bool soft_load_pdptes(struct soft_vcpu *c, uint64_t cr3, bool restoring);
/* As they were saved; an entry that the processor would not have loaded becomes 0. */
void soft_set_pdptes(struct soft_vcpu *c, const uint64_t *entries);
/* Recompute what the data breakpoints watch (after DR7, DR0-3 or the caller's breakpoints changed). */
void soft_watch_changed(struct soft_vcpu *c);

/* The error code of a fault that names a selector. */
static inline uint32_t selector_error(uint16_t selector) { return selector & 0xFFFCu; }

/* segment.c: a descriptor. */
struct descriptor {
    uint64_t raw, high; /* high: bytes 8-15 of a 16-byte system descriptor */
    uint64_t linear;    /* where it stands */
};
/* false: outside its table (the caller raises with the selector as error code). */
bool soft_fetch_descriptor(struct soft_vcpu *c, uint16_t selector, bool wide, struct descriptor *d);
void soft_seg_from_descriptor(struct soft_seg *seg, uint16_t selector, const struct descriptor *d);
void soft_set_accessed(struct soft_vcpu *c, struct descriptor *d);
static inline unsigned descriptor_dpl(const struct descriptor *d) { return (d->raw >> 45) & 3; }
static inline unsigned descriptor_type(const struct descriptor *d) { return (d->raw >> 40) & 15; }
static inline bool descriptor_s(const struct descriptor *d) { return (d->raw >> 44) & 1; }
static inline bool descriptor_present(const struct descriptor *d) { return (d->raw >> 47) & 1; }
/* SS:rSP for privilege level `cpl` from the TSS (not in long mode); raises #TS with `ext`. */
void soft_tss_stack(struct soft_vcpu *c, unsigned cpl, uint32_t ext, uint16_t *ss, uint32_t *esp);
/* CS and SS of a far return or IRET; raise #GP, #NP, #SS. */
void soft_return_cs(struct soft_vcpu *c, uint16_t selector, struct descriptor *d);
void soft_return_ss(struct soft_vcpu *c, uint16_t selector, unsigned cpl, const struct descriptor *cs, struct soft_seg *seg);
/* RSPn (index 0-2) or ISTn (index 3 + n, n from 1) of the 64-bit TSS. */
uint64_t soft_tss_rsp(struct soft_vcpu *c, unsigned index, uint32_t ext);
/* Check and read the descriptor of a new inner stack's SS; raises #TS, #SS. */
void soft_inner_ss(struct soft_vcpu *c, uint16_t selector, unsigned cpl, uint32_t ext, struct soft_seg *seg, struct descriptor *d);
/* A real-mode or VM86 segment. */
void soft_real_seg(struct soft_vcpu *c, unsigned seg, uint16_t selector, bool vm86);
/* Null or drop data segments that the outer level may not use. */
void soft_drop_inner_segments(struct soft_vcpu *c, unsigned cpl);
void soft_null_seg(struct soft_seg *seg, uint16_t selector);
/* CS for a transfer to CPL `cpl`, from a checked descriptor. */
void soft_set_cs(struct soft_vcpu *c, uint16_t selector, unsigned cpl, const struct descriptor *d);
/* The value with which rSP is updated: 16, 32 or 64 bits wide by SS.B and mode. */
uint64_t soft_stack_mask(const struct soft_vcpu *c, const struct soft_seg *ss);

/* A stack being pushed on or popped from before the registers are committed. */
struct stack {
    struct soft_vcpu *c;
    struct soft_seg ss;
    uint64_t rsp, mask;
    enum soft_view view;
    uint32_t error; /* of the #SS for a limit violation */
};
/* mask: by how much of rSP it moves (see soft_stack_mask()); cpl: with whose rights. */
void stack_init(struct stack *s, struct soft_vcpu *c, const struct soft_seg *ss, uint64_t rsp, uint64_t mask, unsigned cpl,
                uint32_t error);
void stack_push(struct stack *s, unsigned size, uint64_t value);
uint64_t stack_pop(struct stack *s, unsigned size);
uint64_t stack_peek(struct stack *s, unsigned size, unsigned offset);
void stack_commit_rsp(const struct stack *s); /* writes rSP under the mask */
uint64_t soft_load_as(struct soft_vcpu *c, uint64_t linear, unsigned size, enum soft_view view);
void soft_store_as(struct soft_vcpu *c, uint64_t linear, unsigned size, uint64_t value, enum soft_view view);

/* interrupt.c */
void soft_deliver_pending_fault(struct soft_vcpu *c);

/* debug.c: one instruction with TF, breakpoints or the caller's debugging active. */
bool soft_stepping(const struct soft_vcpu *c);
void soft_watch_port(struct soft_vcpu *c, uint16_t port, unsigned size); /* record port breakpoints (CR4.DE) */
bool soft_step_begin(struct soft_vcpu *c); /* false: stop, the caller has a breakpoint here; may raise #DB */
bool soft_step_end(struct soft_vcpu *c);   /* false: stop for the caller; may deliver #DB */

/* breakpoint.c: whether the caller has to be told now, between instructions; *reason is set then. */
bool soft_caller_stops(struct soft_vcpu *c);
/* An event was delivered at `rip`. */
void soft_caller_event(struct soft_vcpu *c, uint8_t vector, uint64_t rip);
void soft_caller_free(struct soft_vcpu *c);

/* clock.c: TSC of `c` at a time of the VM's clock and back, kvmclock pages; instructions left until a time. */
int64_t soft_budget_until(const struct soft_vcpu *c, uint64_t now, uint64_t deadline);
/* Real clock: a turn used up so many instructions of its budget in so many ns. */
void soft_pace(struct soft_vcpu *c, uint64_t ns, uint64_t instructions);
/* Set the clock; before: what it said when the timers were last looked at. */
void soft_set_now(struct soft_vm *vm, uint64_t before, uint64_t now);
uint64_t soft_tsc_at(const struct soft_vcpu *c, uint64_t now);
uint64_t soft_tsc_to_ns(const struct soft_vcpu *c, uint64_t tsc);
void soft_kvmclock_update(struct soft_vcpu *c);
/* After a restore: publish only what memory does not have already, so that it stays the same to the last bit. */
void soft_kvmclock_restore(struct soft_vcpu *c, uint64_t msr);
void soft_wall_clock_restore(struct soft_vcpu *c, uint64_t msr);
/* Guests' TSCs tick at this rate from now on, and go on from where they are. -EINVAL: no rate that a TSC has. */
int soft_set_tsc_khz(struct soft_vm *vm, uint64_t khz);
void soft_wall_clock_write(struct soft_vcpu *c);

/* events.c: what other threads ask for. */
struct vm_events *soft_events_create(void);
void soft_events_destroy(struct vm_events *events);
void soft_events_forked(struct vm_events *events); /* soft_vm_forked() */
bool soft_events_pending(const struct soft_vm *vm);
bool soft_events_apply(struct soft_vm *vm); /* true: soft_vm_wake() was called */
void soft_events_apply_line(struct soft_vm *vm, uint32_t gsi); /* only what was sent for one GSI */
void soft_events_wait(struct soft_vm *vm, uint64_t deadline); /* sleep until an event or deadline (VM time; UINT64_MAX: none) */
uint64_t soft_alarm(struct soft_vm *vm);
void soft_events_set_levels(struct soft_vm *vm, uint32_t levels); /* of the GSIs, as restored */
void soft_events_lock(struct soft_vm *vm);
void soft_events_unlock(struct soft_vm *vm);

/* parallel.c, shared.c */
int soft_parallel_create(struct soft_vm *vm); /* 0, or -ENOMEM */
void soft_parallel_destroy(struct soft_vm *vm);
/* The vCPU's thread has to leave guest code for more than what is pending. */
bool soft_parallel_called(const struct soft_vcpu *c);
void soft_lives_again(struct soft_vcpu *c); /* it sleeps no longer for good, perhaps */
/* Pages were written by soft_shared_written() without a vCPU: give those that may execute them natively the time to stop. [any] */
void soft_shared_settle(struct soft_vm *vm);

/* cpuid.c */
void soft_default_cpuid(struct soft_vcpu *c);

#endif
