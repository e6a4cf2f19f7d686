/* Single step and breakpoints: the guest's own (TF, DR0-7), and the ends of the caller's steps (breakpoint.c).
 * Intel SDM vol. 3 chapter 17.
 *
 * While any is active the run loop executes instruction by instruction: soft_step_begin(), soft_step(), soft_step_end().
 */
#include "soft/system/system.h"

bool soft_stepping(const struct soft_vcpu *c)
{
    return (c->rflags & F_TF) || (c->dr[7] & 0xFF) || c->caller.step || c->caller.retry;
}

/* Which enabled instruction breakpoints of a set of debug registers lie at the next instruction. */
static unsigned instruction_hits(const struct soft_vcpu *c, const uint64_t *dr)
{
    uint64_t linear = c->code64 ? c->rip : (uint32_t)(c->seg[SEG_CS].base + c->rip);
    unsigned hits = 0;
    for (unsigned i = 0; i < 4; i++)
        if ((dr[7] >> (i * 2) & 3) && !(dr[7] >> (16 + i * 4) & 3) && dr[i] == linear)
            hits |= 1u << i;
    return hits;
}

void soft_watch_port(struct soft_vcpu *c, uint16_t port, unsigned size)
{
    if (!(c->cr4 & CR4_DE))
        return;
    for (unsigned i = 0; i < 4; i++) {
        unsigned control = (unsigned)(c->dr[7] >> (16 + i * 4)) & 15, length = (control >> 2) + 1;
        uint64_t start = c->dr[i] & ~(uint64_t)(length - 1);
        if ((c->dr[7] >> (i * 2) & 3) && (control & 3) == 2 && port < start + length && start < (uint64_t)port + size)
            c->data_hits |= (uint8_t)(1u << i);
    }
}

bool soft_step_begin(struct soft_vcpu *c)
{
    bool passed = c->caller.retry && c->caller.retry_rip == c->rip;
    c->caller.retry = false;
    if (!passed && !c->caller.step && soft_breakpoint_here(c, c->rip))
        return false;
    if (!(c->rflags & F_RF) && (c->dr[7] & 0xFF)) {
        unsigned hits = instruction_hits(c, c->dr);
        if (hits) {
            c->dr[6] = (c->dr[6] & ~15ull) | hits;
            c->rflags |= F_RF; /* pushed, so that the handler's IRET gets past the instruction */
            soft_raise(c, VEC_DB);
        }
    }
    c->step_flags = c->rflags;
    c->rflags &= ~F_RF;
    c->data_hits = 0;
    c->trap_taken = false;
    c->shadow = 0;
    c->in_step = true;
    return true;
}

bool soft_step_end(struct soft_vcpu *c)
{
    c->in_step = false;
    bool trap = false;
    if ((c->step_flags & F_TF) && !c->trap_taken && c->shadow != 2) { /* not after MOV SS */
        c->dr[6] |= DR6_BS;
        trap = true;
    }
    c->replay.allowed = false; /* a #DB that is delivered now makes accesses of its own */
    unsigned hits = c->data_hits | c->held_hits;
    c->data_hits = c->held_hits = 0;
    if (hits && c->shadow == 2) { /* the stack pointer comes first: SDM vol. 3, 6.8.3 */
        c->held_hits = (uint8_t)hits;
    } else if (hits) {
        c->dr[6] = (c->dr[6] & ~15ull) | hits;
        trap = true;
    }
    if (trap) {
        if (c->activity == ACT_HALTED || c->activity == ACT_MWAIT)
            c->activity = ACT_RUNNING; /* SDM vol. 2, HLT: "a debug exception [...] will resume execution" */
        soft_deliver(c, VEC_DB, EVENT_EXCEPTION, false, 0);
    }
    if (c->caller.step)
        c->caller.stepped = true;
    return !soft_caller_stops(c);
}
