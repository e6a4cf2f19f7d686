/* Far jumps, calls and returns, also through call gates. Intel SDM vol. 3, 5.8.
 *
 * Every function checks first and changes registers last, so that a fault leaves the instruction restartable.
 * Hardware task switching is not implemented: a far transfer to a TSS or task gate raises #GP(selector).
 */
#include "soft/system/system.h"

static uint64_t operand_mask(unsigned op_size) { return op_size == 8 ? ~0ull : op_size == 4 ? 0xFFFFFFFFull : 0xFFFFull; }

/* The offset must lie in the code segment that `d` describes. */
static void check_target(struct soft_vcpu *c, const struct descriptor *d, uint64_t offset)
{
    struct soft_seg seg;
    soft_seg_from_descriptor(&seg, 0, d);
    if (c->long_mode && (seg.attr & ATTR_L)) {
        if (!soft_canonical(offset))
            soft_raise_error(c, VEC_GP, 0);
    } else if (offset > seg.limit) {
        soft_raise_error(c, VEC_GP, 0);
    }
}

static void code_descriptor(struct soft_vcpu *c, uint16_t selector, struct descriptor *d)
{
    uint32_t error = selector_error(selector);
    if (!error)
        soft_raise_error(c, VEC_GP, 0);
    if (!soft_fetch_descriptor(c, selector, false, d))
        soft_raise_error(c, VEC_GP, error);
}

/* Code segment checks of a direct far JMP or CALL. */
static void check_direct(struct soft_vcpu *c, uint16_t selector, const struct descriptor *d)
{
    uint32_t error = selector_error(selector);
    unsigned dpl = descriptor_dpl(d);
    bool ok = descriptor_type(d) & TYPE_EXPAND_DOWN ? dpl <= c->cpl : dpl == c->cpl && (selector & 3) <= c->cpl;
    if (c->long_mode && (d->raw >> 53 & 1) && (d->raw >> 54 & 1))
        ok = false;
    if (!ok)
        soft_raise_error(c, VEC_GP, error);
    if (!descriptor_present(d))
        soft_raise_error(c, VEC_NP_, error);
}

struct gate {
    uint16_t selector;
    uint64_t offset;
    unsigned size, parameters;
};

/* Read and check a call gate, whose first half is `d`. */
static struct gate call_gate(struct soft_vcpu *c, uint16_t selector, struct descriptor *d)
{
    uint32_t error = selector_error(selector);
    unsigned type = descriptor_type(d), dpl = descriptor_dpl(d);
    if (type != SYS_CALL && (c->long_mode || type != SYS_CALL16))
        soft_raise_error(c, VEC_GP, error);
    if (dpl < c->cpl || (selector & 3) > dpl)
        soft_raise_error(c, VEC_GP, error);
    if (!descriptor_present(d))
        soft_raise_error(c, VEC_NP_, error);
    if (c->long_mode && (!soft_fetch_descriptor(c, selector, true, d) || (d->high >> 40 & 0x1F)))
        soft_raise_error(c, VEC_GP, error);
    struct gate g = { .selector = (uint16_t)(d->raw >> 16), .offset = d->raw & 0xFFFF, .size = 2 };
    g.parameters = c->long_mode ? 0 : (unsigned)(d->raw >> 32) & 31;
    if (type == SYS_CALL) {
        g.offset |= (d->raw >> 48) << 16;
        g.size = 4;
    }
    if (c->long_mode) {
        g.offset |= (d->high & 0xFFFFFFFF) << 32;
        g.size = 8;
    }
    return g;
}

/* The code segment a call gate leads to: present, code, not less privileged than CPL. */
static void gate_target(struct soft_vcpu *c, const struct gate *g, struct descriptor *d)
{
    uint32_t error = selector_error(g->selector);
    code_descriptor(c, g->selector, d);
    if (!descriptor_s(d) || !(descriptor_type(d) & TYPE_CODE) || descriptor_dpl(d) > c->cpl
        || (c->long_mode && (d->raw >> 53 & 3) != 1))
        soft_raise_error(c, VEC_GP, error);
    if (!descriptor_present(d))
        soft_raise_error(c, VEC_NP_, error);
}

static bool real_transfer(struct soft_vcpu *c) { return !soft_protected(c); }

static void real_jump(struct soft_vcpu *c, uint16_t selector, uint64_t offset)
{
    soft_real_seg(c, SEG_CS, selector, (c->rflags & F_VM) != 0);
    c->rip = offset;
}

void soft_far_jump(struct soft_vcpu *c, uint16_t selector, uint64_t offset, unsigned op_size)
{
    offset &= operand_mask(op_size);
    if (real_transfer(c)) {
        if (offset > c->seg[SEG_CS].limit)
            soft_raise_error(c, VEC_GP, 0);
        real_jump(c, selector, offset);
        return;
    }
    struct descriptor d;
    code_descriptor(c, selector, &d);
    if (descriptor_s(&d) && (descriptor_type(&d) & TYPE_CODE)) {
        check_direct(c, selector, &d);
    } else if (!descriptor_s(&d)) {
        struct gate g = call_gate(c, selector, &d);
        gate_target(c, &g, &d);
        if (!(descriptor_type(&d) & TYPE_EXPAND_DOWN) && descriptor_dpl(&d) != c->cpl)
            soft_raise_error(c, VEC_GP, selector_error(g.selector));
        selector = g.selector;
        offset = g.offset;
    } else {
        soft_raise_error(c, VEC_GP, selector_error(selector));
    }
    check_target(c, &d, offset);
    soft_set_accessed(c, &d);
    soft_set_cs(c, selector, c->cpl, &d);
    c->rip = offset;
}

static void call_inner(struct soft_vcpu *c, const struct gate *g, struct descriptor *cs, uint64_t next_rip)
{
    unsigned cpl = descriptor_dpl(cs);
    struct descriptor ss_descriptor = { 0 };
    struct soft_seg ss;
    struct stack s;
    uint32_t parameters[32] = { 0 };
    uint16_t old_ss = c->seg[SEG_SS].selector;
    if (c->long_mode) {
        uint64_t rsp = soft_tss_rsp(c, cpl, 0);
        soft_null_seg(&ss, (uint16_t)cpl);
        stack_init(&s, c, &ss, rsp, ~0ull, cpl, 0);
    } else {
        uint16_t selector;
        uint32_t esp;
        soft_tss_stack(c, cpl, 0, &selector, &esp);
        soft_inner_ss(c, selector, cpl, 0, &ss, &ss_descriptor);
        struct stack old;
        stack_init(&old, c, &c->seg[SEG_SS], c->gpr[RSP], soft_stack_mask(c, &c->seg[SEG_SS]), c->cpl, 0);
        for (unsigned i = 0; i < g->parameters; i++)
            parameters[i] = (uint32_t)stack_peek(&old, g->size, i * g->size);
        stack_init(&s, c, &ss, esp, SEG_DB(&ss) ? 0xFFFFFFFFull : 0xFFFFull, cpl, selector_error(selector));
    }
    check_target(c, cs, g->offset);
    stack_push(&s, g->size, old_ss);
    stack_push(&s, g->size, c->gpr[RSP]);
    for (unsigned i = g->parameters; i-- > 0;)
        stack_push(&s, g->size, parameters[i & 31]);
    stack_push(&s, g->size, c->seg[SEG_CS].selector);
    stack_push(&s, g->size, next_rip);
    if (!c->long_mode)
        soft_set_accessed(c, &ss_descriptor);
    soft_set_accessed(c, cs);
    c->seg[SEG_SS] = ss;
    soft_set_cs(c, g->selector, cpl, cs);
    stack_commit_rsp(&s);
    c->rip = g->offset;
}

void soft_far_call(struct soft_vcpu *c, uint16_t selector, uint64_t offset, unsigned op_size, uint64_t next_rip)
{
    struct stack s;
    stack_init(&s, c, &c->seg[SEG_SS], c->gpr[RSP], soft_stack_mask(c, &c->seg[SEG_SS]), c->cpl, 0);
    offset &= operand_mask(op_size);
    if (real_transfer(c)) {
        if (offset > c->seg[SEG_CS].limit)
            soft_raise_error(c, VEC_GP, 0);
        stack_push(&s, op_size, c->seg[SEG_CS].selector);
        stack_push(&s, op_size, next_rip);
        stack_commit_rsp(&s);
        real_jump(c, selector, offset);
        return;
    }
    struct descriptor d;
    code_descriptor(c, selector, &d);
    if (descriptor_s(&d) && (descriptor_type(&d) & TYPE_CODE)) {
        check_direct(c, selector, &d);
    } else if (!descriptor_s(&d)) {
        struct gate g = call_gate(c, selector, &d);
        gate_target(c, &g, &d);
        if (!(descriptor_type(&d) & TYPE_EXPAND_DOWN) && descriptor_dpl(&d) < c->cpl) {
            call_inner(c, &g, &d, next_rip);
            return;
        }
        selector = g.selector;
        offset = g.offset;
        op_size = g.size;
    } else {
        soft_raise_error(c, VEC_GP, selector_error(selector));
    }
    check_target(c, &d, offset);
    stack_push(&s, op_size, c->seg[SEG_CS].selector);
    stack_push(&s, op_size, next_rip);
    soft_set_accessed(c, &d);
    soft_set_cs(c, selector, c->cpl, &d);
    stack_commit_rsp(&s);
    c->rip = offset;
}

void soft_drop_inner_segments(struct soft_vcpu *c, unsigned cpl)
{
    static const unsigned data[] = { SEG_ES, SEG_DS, SEG_FS, SEG_GS };
    for (unsigned i = 0; i < 4; i++) {
        struct soft_seg *s = &c->seg[data[i]];
        bool conforming = (s->attr & (TYPE_CODE | TYPE_EXPAND_DOWN)) == (TYPE_CODE | TYPE_EXPAND_DOWN);
        if (!SEG_P(s) || SEG_DPL(s) >= cpl || conforming)
            continue;
        uint64_t base = s->base;
        soft_null_seg(s, 0);
        if (c->long_mode)
            s->base = base; /* it is no load of a null selector: 64-bit code still uses the bases of FS and GS */
    }
}

void soft_return_cs(struct soft_vcpu *c, uint16_t selector, struct descriptor *d)
{
    uint32_t error = selector_error(selector);
    unsigned rpl = selector & 3;
    code_descriptor(c, selector, d);
    unsigned type = descriptor_type(d);
    bool ok = descriptor_s(d) && (type & TYPE_CODE) && rpl >= c->cpl
              && (type & TYPE_EXPAND_DOWN ? descriptor_dpl(d) <= rpl : descriptor_dpl(d) == rpl);
    if (c->long_mode && (d->raw >> 53 & 3) == 3)
        ok = false;
    if (!ok)
        soft_raise_error(c, VEC_GP, error);
    if (!descriptor_present(d))
        soft_raise_error(c, VEC_NP_, error);
}

void soft_return_ss(struct soft_vcpu *c, uint16_t selector, unsigned cpl, const struct descriptor *cs, struct soft_seg *seg)
{
    uint32_t error = selector_error(selector);
    struct descriptor d;
    if (!error) {
        if (!(c->long_mode && (cs->raw >> 53 & 1) && cpl != 3 && (selector & 3) == cpl))
            soft_raise_error(c, VEC_GP, 0);
        soft_null_seg(seg, selector);
        return;
    }
    if (!soft_fetch_descriptor(c, selector, false, &d) || (selector & 3) != cpl || descriptor_dpl(&d) != cpl
        || !descriptor_s(&d) || (descriptor_type(&d) & (TYPE_CODE | TYPE_WRITABLE)) != TYPE_WRITABLE)
        soft_raise_error(c, VEC_GP, error);
    if (!descriptor_present(&d))
        soft_raise_error(c, VEC_SS, error);
    soft_set_accessed(c, &d);
    soft_seg_from_descriptor(seg, selector, &d);
}

void soft_far_return(struct soft_vcpu *c, unsigned op_size, uint16_t pop_bytes)
{
    struct stack s;
    stack_init(&s, c, &c->seg[SEG_SS], c->gpr[RSP], soft_stack_mask(c, &c->seg[SEG_SS]), c->cpl, 0);
    uint64_t rip = stack_pop(&s, op_size);
    uint16_t selector = (uint16_t)stack_pop(&s, op_size);
    if (real_transfer(c)) {
        if (rip > c->seg[SEG_CS].limit)
            soft_raise_error(c, VEC_GP, 0);
        s.rsp += pop_bytes;
        stack_commit_rsp(&s);
        real_jump(c, selector, rip);
        return;
    }
    struct descriptor cs;
    soft_return_cs(c, selector, &cs);
    unsigned cpl = selector & 3;
    s.rsp += pop_bytes;
    if (cpl == c->cpl) {
        check_target(c, &cs, rip);
        soft_set_accessed(c, &cs);
        soft_set_cs(c, selector, cpl, &cs);
        stack_commit_rsp(&s);
        c->rip = rip;
        return;
    }
    uint64_t rsp = stack_pop(&s, op_size);
    uint16_t ss_selector = (uint16_t)stack_pop(&s, op_size);
    struct soft_seg ss;
    soft_return_ss(c, ss_selector, cpl, &cs, &ss);
    check_target(c, &cs, rip);
    soft_set_accessed(c, &cs);
    soft_set_cs(c, selector, cpl, &cs);
    c->seg[SEG_SS] = ss;
    uint64_t mask = soft_stack_mask(c, &ss);
    rsp += pop_bytes;
    c->gpr[RSP] = mask == 0xFFFF ? (c->gpr[RSP] & ~0xFFFFull) | (rsp & 0xFFFF) : rsp & mask;
    soft_drop_inner_segments(c, cpl);
    c->rip = rip;
}
