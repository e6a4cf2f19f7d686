/* Exceptions, interrupt delivery and IRET. Intel SDM vol. 3 chapter 6, vol. 2 INT and IRET.
 *
 * soft_raise() jumps to the run loop, which calls soft_deliver_pending_fault(). A fault while delivering comes back the
 * same way with c->in_exception set, and becomes #DF or a triple fault there. Task gates raise #GP (no task switching).
 */
#include "soft/system/system.h"

void soft_raise(struct soft_vcpu *c, uint8_t vector)
{
    c->fault_vector = vector;
    c->fault_has_error = false;
    c->fault_error = 0;
    _longjmp(c->fault, JUMP_FAULT);
}

void soft_raise_error(struct soft_vcpu *c, uint8_t vector, uint32_t error)
{
    c->fault_vector = vector;
    c->fault_has_error = true;
    c->fault_error = error;
    _longjmp(c->fault, JUMP_FAULT);
}

void soft_raise_pf(struct soft_vcpu *c, uint64_t linear, uint32_t error)
{
    c->cr2 = linear;
    soft_raise_error(c, VEC_PF, error);
}

void soft_leave(struct soft_vcpu *c)
{
    c->budget--; /* the instruction that leaves is retired */
    _longjmp(c->fault, JUMP_LEAVE);
}

void soft_triple_fault(struct soft_vcpu *c) { _longjmp(c->fault, JUMP_TRIPLE); }

static bool contributory(uint8_t vector)
{
    return vector == VEC_DE || (vector >= VEC_TS && vector <= VEC_GP);
}

void soft_deliver_pending_fault(struct soft_vcpu *c)
{
    uint8_t vector = c->fault_vector;
    bool has_error = c->fault_has_error;
    uint32_t error = c->fault_error;
    if (c->in_exception) { /* SDM vol. 3 table 6-5 */
        uint8_t first = c->exception_vector;
        bool second = contributory(vector) || vector == VEC_PF;
        if (first == VEC_DF && second)
            soft_triple_fault(c);
        if ((contributory(first) && contributory(vector)) || (first == VEC_PF && second)) {
            vector = VEC_DF;
            has_error = true;
            error = 0;
        }
    }
    soft_deliver(c, vector, EVENT_EXCEPTION, has_error, error);
}

/* ---- delivery ---- */

struct delivery {
    uint8_t vector;
    enum soft_event kind;
    bool has_error;
    uint32_t error;
    uint64_t rip;   /* to push */
    uint32_t flags; /* to push */
};

static uint32_t ext_bit(enum soft_event kind)
{
    return kind == EVENT_SOFTWARE || kind == EVENT_INT3 ? 0 : 1;
}

static bool checks_gate_dpl(enum soft_event kind) { return kind == EVENT_SOFTWARE || kind == EVENT_INT3; }

static void deliver_real(struct soft_vcpu *c, const struct delivery *d)
{
    uint32_t offset = d->vector * 4u;
    if (offset + 3 > c->idtr.limit)
        soft_raise_error(c, VEC_GP, d->vector * 8u + 2);
    uint32_t entry = (uint32_t)soft_sys_load(c, c->idtr.base + offset, 4);
    struct stack s;
    stack_init(&s, c, &c->seg[SEG_SS], c->gpr[RSP], 0xFFFF, 0, 0);
    stack_push(&s, 2, d->flags);
    stack_push(&s, 2, c->seg[SEG_CS].selector);
    stack_push(&s, 2, d->rip);
    stack_commit_rsp(&s);
    c->rflags &= ~(F_IF | F_TF | F_AC | F_RF);
    soft_real_seg(c, SEG_CS, (uint16_t)(entry >> 16), false);
    c->rip = entry & 0xFFFF;
    soft_mode_changed(c);
}

/* The gate's code segment, checked; its DPL decides about the stack. */
static void gate_code(struct soft_vcpu *c, uint16_t selector, uint32_t ext, struct descriptor *cs)
{
    uint32_t error = (selector & 0xFFFCu) | ext;
    if (!(selector & 0xFFFCu))
        soft_raise_error(c, VEC_GP, ext);
    if (!soft_fetch_descriptor(c, selector, false, cs) || !descriptor_s(cs) || !(descriptor_type(cs) & TYPE_CODE)
        || descriptor_dpl(cs) > c->cpl || (c->long_mode && (cs->raw >> 53 & 3) != 1))
        soft_raise_error(c, VEC_GP, error);
    if (!descriptor_present(cs))
        soft_raise_error(c, VEC_NP_, error);
}

static void enter_handler(struct soft_vcpu *c, bool interrupt_gate)
{
    c->rflags &= ~(F_TF | F_NT | F_RF | F_VM | (interrupt_gate ? F_IF : 0));
}

static void deliver_long(struct soft_vcpu *c, const struct delivery *d)
{
    uint32_t ext = ext_bit(d->kind), error = d->vector * 8u + 2 + ext;
    if (d->vector * 16u + 15 > c->idtr.limit)
        soft_raise_error(c, VEC_GP, error);
    uint64_t low = soft_sys_load(c, c->idtr.base + d->vector * 16u, 8);
    uint64_t high = soft_sys_load(c, c->idtr.base + d->vector * 16u + 8, 8);
    unsigned type = (low >> 40) & 31, dpl = (low >> 45) & 3, ist = (low >> 32) & 7;
    if ((type != SYS_INT && type != SYS_TRAP) || (checks_gate_dpl(d->kind) && dpl < c->cpl))
        soft_raise_error(c, VEC_GP, error);
    if (!(low >> 47 & 1))
        soft_raise_error(c, VEC_NP_, error);
    uint16_t selector = (uint16_t)(low >> 16);
    uint64_t target = (low & 0xFFFF) | (low >> 48) << 16 | high << 32;
    struct descriptor cs;
    gate_code(c, selector, ext, &cs);
    unsigned cpl = descriptor_type(&cs) & TYPE_EXPAND_DOWN ? c->cpl : descriptor_dpl(&cs);
    if (!soft_canonical(target))
        soft_raise_error(c, VEC_GP, ext);

    uint64_t rsp = c->gpr[RSP];
    struct soft_seg ss = c->seg[SEG_SS];
    if (ist)
        rsp = soft_tss_rsp(c, 3 + ist, ext);
    else if (cpl != c->cpl)
        rsp = soft_tss_rsp(c, cpl, ext);
    if (cpl != c->cpl)
        soft_null_seg(&ss, (uint16_t)cpl);
    struct stack s;
    stack_init(&s, c, &ss, rsp & ~15ull, ~0ull, cpl, ext);
    stack_push(&s, 8, c->seg[SEG_SS].selector);
    stack_push(&s, 8, c->gpr[RSP]);
    stack_push(&s, 8, d->flags);
    stack_push(&s, 8, c->seg[SEG_CS].selector);
    stack_push(&s, 8, d->rip);
    if (d->has_error)
        stack_push(&s, 8, d->error);
    soft_set_accessed(c, &cs);
    c->seg[SEG_SS] = ss;
    c->gpr[RSP] = s.rsp;
    enter_handler(c, type == SYS_INT);
    soft_set_cs(c, selector, cpl, &cs);
    c->rip = target;
}

static void deliver_legacy(struct soft_vcpu *c, const struct delivery *d)
{
    uint32_t ext = ext_bit(d->kind), error = d->vector * 8u + 2 + ext;
    if (d->vector * 8u + 7 > c->idtr.limit)
        soft_raise_error(c, VEC_GP, error);
    uint64_t gate = soft_sys_load(c, c->idtr.base + d->vector * 8u, 8);
    unsigned type = (gate >> 40) & 31, dpl = (gate >> 45) & 3;
    if ((type != SYS_INT && type != SYS_TRAP && type != SYS_INT16 && type != SYS_TRAP16)
        || (checks_gate_dpl(d->kind) && dpl < c->cpl))
        soft_raise_error(c, VEC_GP, error);
    if (!(gate >> 47 & 1))
        soft_raise_error(c, VEC_NP_, error);
    unsigned size = type & 8 ? 4 : 2;
    uint16_t selector = (uint16_t)(gate >> 16);
    uint32_t target = (uint32_t)(gate & 0xFFFF) | (size == 4 ? (uint32_t)(gate >> 48) << 16 : 0);
    struct descriptor cs, ss_descriptor = { 0 };
    gate_code(c, selector, ext, &cs);
    bool vm86 = (c->rflags & F_VM) != 0;
    unsigned cpl = descriptor_type(&cs) & TYPE_EXPAND_DOWN ? c->cpl : descriptor_dpl(&cs);
    if (vm86 && cpl != 0)
        soft_raise_error(c, VEC_GP, (selector & 0xFFFCu) | ext);

    struct soft_seg ss = c->seg[SEG_SS], code;
    uint64_t rsp = c->gpr[RSP];
    uint32_t ss_error = ext;
    if (cpl != c->cpl) {
        uint16_t ss_selector;
        uint32_t esp;
        soft_tss_stack(c, cpl, ext, &ss_selector, &esp);
        soft_inner_ss(c, ss_selector, cpl, ext, &ss, &ss_descriptor);
        rsp = esp;
        ss_error |= ss_selector & 0xFFFCu;
    }
    soft_seg_from_descriptor(&code, selector, &cs);
    if (target > code.limit)
        soft_raise_error(c, VEC_GP, ext);
    struct stack s;
    stack_init(&s, c, &ss, rsp, SEG_DB(&ss) ? 0xFFFFFFFFull : 0xFFFFull, cpl, ss_error);
    if (cpl != c->cpl) {
        if (vm86) {
            stack_push(&s, size, c->seg[SEG_GS].selector);
            stack_push(&s, size, c->seg[SEG_FS].selector);
            stack_push(&s, size, c->seg[SEG_DS].selector);
            stack_push(&s, size, c->seg[SEG_ES].selector);
        }
        stack_push(&s, size, c->seg[SEG_SS].selector);
        stack_push(&s, size, c->gpr[RSP]);
    }
    stack_push(&s, size, d->flags);
    stack_push(&s, size, c->seg[SEG_CS].selector);
    stack_push(&s, size, d->rip);
    if (d->has_error)
        stack_push(&s, size, d->error);
    soft_set_accessed(c, &cs);
    if (cpl != c->cpl)
        soft_set_accessed(c, &ss_descriptor);
    if (vm86) {
        static const unsigned data[] = { SEG_GS, SEG_FS, SEG_DS, SEG_ES };
        for (unsigned i = 0; i < 4; i++)
            soft_null_seg(&c->seg[data[i]], 0);
    }
    c->seg[SEG_SS] = ss;
    enter_handler(c, !(type & 1));
    soft_set_cs(c, selector, cpl, &cs);
    stack_commit_rsp(&s);
    c->rip = target;
}

static void deliver(struct soft_vcpu *c, const struct delivery *d)
{
    if (!(c->cr0 & CR0_PE))
        deliver_real(c, d);
    else if (c->long_mode)
        deliver_long(c, d);
    else
        deliver_legacy(c, d);
}

void soft_deliver(struct soft_vcpu *c, uint8_t vector, enum soft_event kind, bool has_error, uint32_t error)
{
    struct delivery d = { .vector = vector, .kind = kind, .has_error = has_error, .error = error, .rip = c->rip,
                          .flags = soft_flags(c) };
    if (kind == EVENT_EXCEPTION) {
        c->stats.exceptions++;
        c->in_exception = true;
        c->exception_vector = vector;
        /* SDM vol. 3, 18.3.1.1: faults push RF set, so that an instruction breakpoint does not hit again. Traps
         * (#DB, #BP, #OF) do not. */
        if (vector != VEC_DB && vector != VEC_BP && vector != VEC_OF && vector != VEC_DF)
            d.flags |= F_RF;
    } else {
        c->stats.interrupts++;
        c->in_exception = true;
        c->exception_vector = VEC_NMI; /* benign: a fault while delivering it is delivered as such */
    }
    if (!(c->cr0 & CR0_PE))
        d.has_error = false;
    deliver(c, &d);
    c->in_exception = false;
    c->shadow = 0;
    if (kind == EVENT_NMI)
        c->nmi_blocked = true;
    if (SOFT_UNLIKELY(c->caller.active))
        soft_caller_event(c, vector, d.rip);
}

void soft_software_interrupt(struct soft_vcpu *c, uint8_t vector, enum soft_event kind, uint64_t next_rip)
{
    /* VM86 without VME: INT n needs IOPL 3; INT3 and INTO do not. */
    if ((c->rflags & F_VM) && kind == EVENT_SOFTWARE && (c->rflags & F_IOPL) != F_IOPL)
        soft_raise_error(c, VEC_GP, 0);
    if (kind == EVENT_INT3 && vector == VEC_BP && c->caller.int3) {
        c->caller.reason = SOFT_DEBUG_INT3;
        _longjmp(c->fault, JUMP_DEBUG);
    }
    if (kind == EVENT_ICEBP && c->held_hits) { /* what MOV SS put off is one #DB with this one */
        c->dr[6] = (c->dr[6] & ~15ull) | c->held_hits;
        c->held_hits = 0;
    }
    struct delivery d = { .vector = vector, .kind = kind, .rip = next_rip, .flags = soft_flags(c) & ~F_RF };
    c->stats.interrupts++;
    deliver(c, &d);
    c->shadow = 0;
    c->trap_taken = true;
    soft_system_flags_changed(c);
}

/* ---- IRET ---- */

/* Which flags an IRET at `cpl` may change. */
static uint32_t writable_flags(uint32_t rflags, unsigned cpl, unsigned op_size)
{
    uint32_t mask = F_ARITH | F_TF | F_DF | F_NT | F_RF | F_AC | F_ID;
    if (cpl == 0)
        mask |= F_IOPL | F_VIF | F_VIP;
    if (cpl <= (rflags & F_IOPL) >> 12)
        mask |= F_IF;
    return op_size == 2 ? mask & 0xFFFF : mask;
}

static void restore_flags(struct soft_vcpu *c, uint32_t image, uint32_t mask)
{
    soft_set_flags(c, (soft_flags(c) & ~mask) | (image & mask));
}

static void iret_real(struct soft_vcpu *c, unsigned op_size)
{
    bool vm86 = (c->rflags & F_VM) != 0;
    if (vm86 && (c->rflags & F_IOPL) != F_IOPL)
        soft_raise_error(c, VEC_GP, 0);
    struct stack s;
    stack_init(&s, c, &c->seg[SEG_SS], c->gpr[RSP], soft_stack_mask(c, &c->seg[SEG_SS]), c->cpl, 0);
    uint64_t rip = stack_pop(&s, op_size);
    uint16_t selector = (uint16_t)stack_pop(&s, op_size);
    uint32_t flags = (uint32_t)stack_pop(&s, op_size);
    if (rip > c->seg[SEG_CS].limit)
        soft_raise_error(c, VEC_GP, 0);
    stack_commit_rsp(&s);
    uint32_t mask = writable_flags(c->rflags, 0, op_size) & ~(uint32_t)(F_VIF | F_VIP);
    restore_flags(c, flags, vm86 ? mask & ~F_IOPL : mask);
    soft_real_seg(c, SEG_CS, selector, vm86);
    c->rip = rip;
    soft_mode_changed(c);
}

static void iret_to_vm86(struct soft_vcpu *c, struct stack *s, uint64_t rip, uint16_t cs, uint32_t flags)
{
    static const unsigned order[] = { SEG_ES, SEG_DS, SEG_FS, SEG_GS };
    uint16_t selectors[4];
    uint32_t esp = (uint32_t)stack_pop(s, 4);
    uint16_t ss = (uint16_t)stack_pop(s, 4);
    for (unsigned i = 0; i < 4; i++)
        selectors[i] = (uint16_t)stack_pop(s, 4);
    if (rip > 0xFFFF)
        soft_raise_error(c, VEC_GP, 0);
    soft_set_flags(c, flags & (F_ARITH | F_TF | F_DF | F_NT | F_RF | F_AC | F_ID | F_IOPL | F_IF | F_VIF | F_VIP | F_VM));
    c->cpl = 3;
    soft_real_seg(c, SEG_CS, cs, true);
    soft_real_seg(c, SEG_SS, ss, true);
    for (unsigned i = 0; i < 4; i++)
        soft_real_seg(c, order[i], selectors[i], true);
    c->gpr[RSP] = esp;
    c->rip = rip;
    soft_mode_changed(c);
}

static void iret_protected(struct soft_vcpu *c, unsigned op_size)
{
    if (c->rflags & F_NT) {
        if (c->long_mode)
            soft_raise_error(c, VEC_GP, 0);
        /* A task return: the back link does not name a task that could be returned to. */
        soft_raise_error(c, VEC_TS, (uint32_t)soft_sys_load(c, c->tr.base, 2) & 0xFFFCu);
    }
    struct stack s;
    stack_init(&s, c, &c->seg[SEG_SS], c->gpr[RSP], soft_stack_mask(c, &c->seg[SEG_SS]), c->cpl, 0);
    uint64_t rip = stack_pop(&s, op_size);
    uint16_t selector = (uint16_t)stack_pop(&s, op_size);
    uint32_t flags = (uint32_t)stack_pop(&s, op_size);
    if (!c->long_mode && op_size == 4 && (flags & F_VM) && c->cpl == 0) {
        iret_to_vm86(c, &s, rip, selector, flags);
        return;
    }
    struct descriptor cs;
    soft_return_cs(c, selector, &cs);
    unsigned cpl = selector & 3, old_cpl = c->cpl;
    struct soft_seg ss = c->seg[SEG_SS], code;
    uint64_t rsp = s.rsp;
    bool pops_stack = cpl != c->cpl || c->code64;
    if (pops_stack) {
        rsp = stack_pop(&s, op_size);
        uint16_t ss_selector = (uint16_t)stack_pop(&s, op_size);
        soft_return_ss(c, ss_selector, cpl, &cs, &ss);
    }
    soft_seg_from_descriptor(&code, selector, &cs);
    bool to64 = c->long_mode && (code.attr & ATTR_L);
    if (to64 ? !soft_canonical(rip) : rip > code.limit)
        soft_raise_error(c, VEC_GP, 0);
    soft_set_accessed(c, &cs);
    restore_flags(c, flags, writable_flags(c->rflags, old_cpl, op_size));
    if (pops_stack) {
        c->seg[SEG_SS] = ss;
        soft_set_cs(c, selector, cpl, &cs);
        uint64_t mask = soft_stack_mask(c, &ss);
        c->gpr[RSP] = mask == 0xFFFF ? (c->gpr[RSP] & ~0xFFFFull) | (rsp & 0xFFFF) : rsp & mask;
        if (cpl != old_cpl)
            soft_drop_inner_segments(c, cpl);
    } else {
        stack_commit_rsp(&s);
        soft_set_cs(c, selector, cpl, &cs);
    }
    c->rip = rip;
}

void soft_iret(struct soft_vcpu *c, unsigned op_size)
{
    c->nmi_blocked = false;
    if (soft_protected(c))
        iret_protected(c, op_size);
    else
        iret_real(c, op_size);
    c->shadow = 0;
    if (c->nmi_pending)
        soft_attend(c);
    soft_system_flags_changed(c);
    if (c->direct)
        soft_direct_returned(c);
}
