/* Segment registers, descriptors, stacks. Intel SDM vol. 3 chapters 3 and 5.
 *
 * Every function checks first and changes registers last, so that a fault leaves the instruction restartable.
 */
#include "soft/system/system.h"

bool soft_fetch_descriptor(struct soft_vcpu *c, uint16_t selector, bool wide, struct descriptor *d)
{
    uint64_t base = c->gdtr.base;
    uint32_t limit = c->gdtr.limit;
    if (selector & 4) {
        if (!SEG_P(&c->ldtr))
            return false;
        base = c->ldtr.base;
        limit = c->ldtr.limit;
    }
    uint32_t offset = selector & 0xFFF8u;
    if (offset + (wide ? 15 : 7) > limit)
        return false;
    d->linear = base + offset;
    d->raw = soft_sys_load(c, d->linear, 8);
    d->high = wide ? soft_sys_load(c, d->linear + 8, 8) : 0;
    return true;
}

void soft_seg_from_descriptor(struct soft_seg *seg, uint16_t selector, const struct descriptor *d)
{
    uint64_t raw = d->raw;
    seg->selector = selector;
    seg->attr = (uint16_t)(raw >> 40);
    seg->base = ((raw >> 16) & 0xFFFFFF) | ((raw >> 56) & 0xFF) << 24 | (d->high & 0xFFFFFFFF) << 32;
    seg->limit = (uint32_t)((raw & 0xFFFF) | ((raw >> 32) & 0xF0000));
    if (seg->attr & ATTR_G)
        seg->limit = seg->limit << 12 | 0xFFF;
}

void soft_set_accessed(struct soft_vcpu *c, struct descriptor *d)
{
    if (!(d->raw & 1ull << 40)) {
        d->raw |= 1ull << 40;
        soft_sys_store(c, d->linear + 5, 1, d->raw >> 40);
    }
}

void soft_null_seg(struct soft_seg *seg, uint16_t selector)
{
    *seg = (struct soft_seg){ .selector = selector }; /* AMD: a null selector clears base and limit */
}

void soft_real_seg(struct soft_vcpu *c, unsigned seg, uint16_t selector, bool vm86)
{
    struct soft_seg *s = &c->seg[seg];
    s->selector = selector;
    s->base = (uint32_t)selector << 4;
    if (vm86) {
        s->limit = 0xFFFF;
        s->attr = 0xF3;
    } else if (!SEG_P(s)) {
        s->limit = 0xFFFF;
        s->attr = 0x93;
    }
}

void soft_set_cs(struct soft_vcpu *c, uint16_t selector, unsigned cpl, const struct descriptor *d)
{
    soft_seg_from_descriptor(&c->seg[SEG_CS], (uint16_t)((selector & ~3u) | cpl), d);
    c->cpl = (uint8_t)cpl;
    soft_mode_changed(c);
}

/* ---- data accesses ---- */

static bool seg_allows(const struct soft_seg *s, uint64_t offset, unsigned size)
{
    uint64_t last = offset + size - 1;
    if ((s->attr & (TYPE_CODE | TYPE_EXPAND_DOWN)) == TYPE_EXPAND_DOWN && SEG_S(s))
        return offset > s->limit && last <= (SEG_DB(s) ? 0xFFFFFFFFull : 0xFFFFull);
    return last <= s->limit;
}

uint64_t soft_seg_check(struct soft_vcpu *c, unsigned seg, uint64_t offset, unsigned size, bool write)
{
    const struct soft_seg *s = &c->seg[seg];
    if (c->code64)
        return seg >= SEG_FS ? s->base + offset : offset;
    bool allowed = seg_allows(s, offset, size);
    if (soft_protected(c)) {
        allowed &= SEG_P(s);
        if (write)
            allowed &= (s->attr & (TYPE_CODE | TYPE_WRITABLE)) == TYPE_WRITABLE;
        else
            allowed &= (s->attr & (TYPE_CODE | TYPE_WRITABLE)) != TYPE_CODE;
    }
    if (!allowed)
        soft_raise_error(c, seg == SEG_SS ? VEC_SS : VEC_GP, 0);
    return (uint32_t)(s->base + offset);
}

/* ---- stacks ---- */

uint64_t soft_stack_mask(const struct soft_vcpu *c, const struct soft_seg *ss)
{
    return c->code64 ? ~0ull : SEG_DB(ss) ? 0xFFFFFFFFull : 0xFFFFull;
}

void stack_init(struct stack *s, struct soft_vcpu *c, const struct soft_seg *ss, uint64_t rsp, uint64_t mask, unsigned cpl,
                uint32_t error)
{
    *s = (struct stack){ .c = c, .ss = *ss, .rsp = rsp, .mask = mask, .error = error,
                         .view = cpl == 3 ? VIEW_USER : VIEW_SUPERVISOR };
    if (cpl != 3 && c->view == VIEW_SUPERVISOR_AC)
        s->view = VIEW_SUPERVISOR_AC;
}

static uint64_t stack_linear(struct stack *s, uint64_t offset, unsigned size)
{
    if (s->mask == ~0ull) {
        if (!soft_canonical(offset) || !soft_canonical(offset + size - 1))
            soft_raise_error(s->c, VEC_SS, s->error);
        return offset;
    }
    if (!seg_allows(&s->ss, offset, size))
        soft_raise_error(s->c, VEC_SS, s->error);
    return (uint32_t)(s->ss.base + offset);
}

void stack_push(struct stack *s, unsigned size, uint64_t value)
{
    uint64_t offset = (s->rsp - size) & s->mask;
    soft_store_as(s->c, stack_linear(s, offset, size), size, value, s->view);
    s->rsp = (s->rsp & ~s->mask) | offset;
}

uint64_t stack_peek(struct stack *s, unsigned size, unsigned offset)
{
    return soft_load_as(s->c, stack_linear(s, (s->rsp + offset) & s->mask, size), size, s->view);
}

uint64_t stack_pop(struct stack *s, unsigned size)
{
    uint64_t value = stack_peek(s, size, 0);
    s->rsp = (s->rsp & ~s->mask) | ((s->rsp + size) & s->mask);
    return value;
}

void stack_commit_rsp(const struct stack *s)
{
    uint64_t *rsp = &s->c->gpr[RSP];
    *rsp = s->mask == 0xFFFF ? (*rsp & ~0xFFFFull) | (s->rsp & 0xFFFF) : s->rsp & s->mask;
}

void soft_tss_stack(struct soft_vcpu *c, unsigned cpl, uint32_t ext, uint16_t *ss, uint32_t *esp)
{
    bool wide = (SEG_TYPE(&c->tr) & 8) != 0;
    uint32_t offset = wide ? cpl * 8 + 4 : cpl * 4 + 2;
    if (!SEG_P(&c->tr) || offset + (wide ? 7u : 3u) > c->tr.limit)
        soft_raise_error(c, VEC_TS, selector_error(c->tr.selector) | ext);
    *esp = (uint32_t)soft_sys_load(c, c->tr.base + offset, wide ? 4 : 2);
    *ss = (uint16_t)soft_sys_load(c, c->tr.base + offset + (wide ? 4 : 2), 2);
}

uint64_t soft_tss_rsp(struct soft_vcpu *c, unsigned index, uint32_t ext)
{
    uint32_t offset = 4 + index * 8; /* RSP0-2 at 4, 12, 20; IST1-7 from 36: index 4 and up */
    if (!SEG_P(&c->tr) || offset + 7 > c->tr.limit)
        soft_raise_error(c, VEC_TS, selector_error(c->tr.selector) | ext);
    uint64_t rsp = soft_sys_load(c, c->tr.base + offset, 8);
    if (!soft_canonical(rsp))
        soft_raise_error(c, VEC_SS, ext);
    return rsp;
}

void soft_inner_ss(struct soft_vcpu *c, uint16_t selector, unsigned cpl, uint32_t ext, struct soft_seg *seg,
                   struct descriptor *d)
{
    uint32_t error = selector_error(selector) | ext;
    if (!(selector & ~3u))
        soft_raise_error(c, VEC_TS, ext);
    if (!soft_fetch_descriptor(c, selector, false, d) || (selector & 3) != cpl || descriptor_dpl(d) != cpl
        || !descriptor_s(d) || (descriptor_type(d) & (TYPE_CODE | TYPE_WRITABLE)) != TYPE_WRITABLE)
        soft_raise_error(c, VEC_TS, error);
    if (!descriptor_present(d))
        soft_raise_error(c, VEC_SS, error);
    soft_seg_from_descriptor(seg, selector, d);
}

/* ---- segment register loads ---- */

void soft_load_seg(struct soft_vcpu *c, unsigned seg, uint16_t selector)
{
    if (!soft_protected(c)) {
        soft_real_seg(c, seg, selector, (c->rflags & F_VM) != 0);
        return;
    }
    uint32_t error = selector_error(selector);
    struct descriptor d;
    if (!error) {
        if (seg == SEG_SS && !(c->code64 && c->cpl != 3 && (selector & 3) == c->cpl))
            soft_raise_error(c, VEC_GP, 0);
        soft_null_seg(&c->seg[seg], selector);
        return;
    }
    if (!soft_fetch_descriptor(c, selector, false, &d))
        soft_raise_error(c, VEC_GP, error);
    unsigned type = descriptor_type(&d), dpl = descriptor_dpl(&d), rpl = selector & 3;
    bool ok = descriptor_s(&d);
    if (seg == SEG_SS)
        ok &= rpl == c->cpl && dpl == c->cpl && (type & (TYPE_CODE | TYPE_WRITABLE)) == TYPE_WRITABLE;
    else if ((type & (TYPE_CODE | TYPE_EXPAND_DOWN)) == (TYPE_CODE | TYPE_EXPAND_DOWN))
        ok &= (type & TYPE_WRITABLE) != 0;
    else
        ok &= (type & (TYPE_CODE | TYPE_WRITABLE)) != TYPE_CODE && rpl <= dpl && c->cpl <= dpl;
    if (!ok)
        soft_raise_error(c, VEC_GP, error);
    if (!descriptor_present(&d))
        soft_raise_error(c, seg == SEG_SS ? VEC_SS : VEC_NP_, error);
    soft_set_accessed(c, &d);
    soft_seg_from_descriptor(&c->seg[seg], selector, &d);
}

static void system_privilege(struct soft_vcpu *c)
{
    if (!soft_protected(c))
        soft_raise(c, VEC_UD);
    if (c->cpl)
        soft_raise_error(c, VEC_GP, 0);
}

/* LDT and TSS descriptors: 16 bytes in long mode, with a canonical base and a zero type in the second half. */
static void system_descriptor(struct soft_vcpu *c, uint16_t selector, struct descriptor *d)
{
    uint32_t error = selector_error(selector);
    if ((selector & 4) || !soft_fetch_descriptor(c, selector, c->long_mode, d) || descriptor_s(d))
        soft_raise_error(c, VEC_GP, error);
    if (c->long_mode && (d->high >> 40 & 0x1F))
        soft_raise_error(c, VEC_GP, error);
}

static void system_present(struct soft_vcpu *c, const struct soft_seg *seg)
{
    if (!SEG_P(seg))
        soft_raise_error(c, VEC_NP_, selector_error(seg->selector));
    if (c->long_mode && !soft_canonical(seg->base))
        soft_raise_error(c, VEC_GP, selector_error(seg->selector));
}

void soft_load_ldtr(struct soft_vcpu *c, uint16_t selector)
{
    system_privilege(c);
    if (!selector_error(selector)) {
        soft_null_seg(&c->ldtr, selector);
        return;
    }
    struct descriptor d;
    struct soft_seg seg;
    system_descriptor(c, selector, &d);
    if (descriptor_type(&d) != SYS_LDT)
        soft_raise_error(c, VEC_GP, selector_error(selector));
    soft_seg_from_descriptor(&seg, selector, &d);
    system_present(c, &seg);
    c->ldtr = seg;
}

void soft_load_tr(struct soft_vcpu *c, uint16_t selector)
{
    system_privilege(c);
    if (!selector_error(selector))
        soft_raise_error(c, VEC_GP, 0);
    struct descriptor d;
    struct soft_seg seg;
    system_descriptor(c, selector, &d);
    unsigned type = descriptor_type(&d);
    if (type != SYS_TSS && (c->long_mode || type != SYS_TSS16))
        soft_raise_error(c, VEC_GP, selector_error(selector));
    soft_seg_from_descriptor(&seg, selector, &d);
    system_present(c, &seg);
    seg.attr |= 2; /* busy */
    soft_sys_store(c, d.linear + 5, 1, seg.attr & 0xFF);
    c->tr = seg;
}

/* ---- LAR, LSL, VERR, VERW ---- */

/* A descriptor that these instructions may look at; system types by a bit mask. */
static bool visible(struct soft_vcpu *c, uint16_t selector, uint32_t system_types, struct descriptor *d)
{
    if (!selector_error(selector) || !soft_fetch_descriptor(c, selector, false, d))
        return false;
    unsigned type = descriptor_type(d), dpl = descriptor_dpl(d);
    if (!descriptor_s(d)) {
        if (!(system_types >> type & 1))
            return false;
        if (c->long_mode && !soft_fetch_descriptor(c, selector, true, d))
            return false;
    } else if ((type & (TYPE_CODE | TYPE_EXPAND_DOWN)) == (TYPE_CODE | TYPE_EXPAND_DOWN)) {
        return true;
    }
    return dpl >= c->cpl && dpl >= (selector & 3u);
}

bool soft_lar(struct soft_vcpu *c, uint16_t selector, uint32_t *value)
{
    struct descriptor d;
    uint32_t types = c->long_mode ? 1u << SYS_LDT | 1u << SYS_TSS | 1u << SYS_TSS_BUSY | 1u << SYS_CALL
                                  : 1u << SYS_TSS16 | 1u << SYS_LDT | 1u << SYS_TSS16_BUSY | 1u << SYS_CALL16 | 1u << SYS_TASK
                                        | 1u << SYS_TSS | 1u << SYS_TSS_BUSY | 1u << SYS_CALL;
    if (!visible(c, selector, types, &d))
        return false;
    *value = (uint32_t)(d.raw >> 32) & 0x00FFFF00u; /* bits 19:16 are undefined (SDM vol. 2, LAR); AMD's load the limit's */
    return true;
}

bool soft_lsl(struct soft_vcpu *c, uint16_t selector, uint32_t *value)
{
    struct descriptor d;
    uint32_t types = c->long_mode ? 1u << SYS_LDT | 1u << SYS_TSS | 1u << SYS_TSS_BUSY
                                  : 1u << SYS_TSS16 | 1u << SYS_LDT | 1u << SYS_TSS16_BUSY | 1u << SYS_TSS | 1u << SYS_TSS_BUSY;
    struct soft_seg seg;
    if (!visible(c, selector, types, &d))
        return false;
    soft_seg_from_descriptor(&seg, selector, &d);
    *value = seg.limit;
    return true;
}

bool soft_verify(struct soft_vcpu *c, uint16_t selector, bool write)
{
    struct descriptor d;
    if (!visible(c, selector, 0, &d))
        return false;
    unsigned type = descriptor_type(&d) & (TYPE_CODE | TYPE_WRITABLE);
    return write ? type == TYPE_WRITABLE : type != TYPE_CODE;
}
