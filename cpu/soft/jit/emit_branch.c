/* Host code of conditions and near branches. */
#include <string.h>

#include "soft/jit/emitters.h"

/* Host flags in which *cc holds if the guest's condition does. False: the flags are lazy, and it is not a simple one. */
static bool condition(struct gen *g, unsigned *cc)
{
    if (gen_flags_to_host(g))
        return true;
    switch (*cc) {
    case 4: case 5: /* ZF */
        gen_prefix(g, 3, 0, 0, H_RDI), gen_b1(g, 0x83), gen_memory(g, 7, H_RDI, FIELD(lf[0])), gen_b1(g, 0); /* cmp lf0, 0 */
        return true;
    case 2: case 3: /* CF */
        gen_prefix(g, 3, 0, 0, H_RDI), gen_b1(g, 0x83), gen_memory(g, 7, H_RDI, FIELD(lf[1])), gen_b1(g, 0); /* cmp lf1, 0: sign */
        *cc = *cc == 2 ? 8 : 9;
        return true;
    default: return false;
    }
}

EMITTER(cmov_rr)
{
    unsigned cc = v.op;
    if (!ok_reg(u->r0) || !ok_reg(u->r1))
        return false;
    unsigned from = gen_reg_of(g, u->r1, true), h = gen_reg_of(g, u->r0, true);
    if (!condition(g, &cc))
        return false;
    g->r.dirty[h] = true;
    gen_op_0f_rr(g, v.size, 0x40 | cc, h, from);
    return true;
}
EMITTER(setcc_r)
{
    unsigned cc = v.op;
    if (!ok_reg(u->r0))
        return false;
    unsigned h = gen_reg_of(g, u->r0, true);
    if (!condition(g, &cc))
        return false;
    g->r.dirty[h] = true;
    gen_prefix(g, 0, 0, 0, h), gen_b1(g, 0x0F), gen_b1(g, 0x90 | cc), gen_b1(g, 0xC0 | (h & 7));
    return true;
}

EMITTER(jmp_rel)
{
    gen_flags_for(g, LINKS((struct uop *)u)->taken);
    gen_go(g, u, true, false);
    return g->ended = true;
}
EMITTER(jmp_fall)
{
    gen_flags_for(g, LINKS((struct uop *)u)->next);
    gen_go(g, u, false, false);
    return g->ended = true;
}
/* The address of the next instruction to the stack. */
static void push_next(struct gen *g, const struct uop *u)
{
    unsigned h = gen_reg_of(g, RSP * 8, true);
    gen_access_stack(g, u, -8, ACCESS_WRITE);
    gen_add_rip(g, H_RAX, u->off + u->len);
    gen_op_rm(g, 3, 0x89, H_RAX, g->at, g->at_disp);
    gen_op_imm(g, 3, 5, h, 8);
    g->r.dirty[h] = true;
}
EMITTER(call_rel)
{
    gen_flags_for(g, LINKS((struct uop *)u)->taken);
    if (!LINKS((struct uop *)u)->taken) /* the probe comes before anything is changed */
        gen_probe_fixed(g, LINKS((struct uop *)u)->delta);
    push_next(g, u);
    if (LINKS((struct uop *)u)->taken) {
        gen_go(g, u, true, false);
    } else {
        int64_t delta = LINKS((struct uop *)u)->delta;
        gen_end_write_back(g);
        gen_due(g, u, delta, false);
        gen_add_rip(g, H_RDX, delta);
        gen_jump_fixed(g, delta);
    }
    return g->ended = true;
}
/* The block's end, after gen_probe(): on at the address in RCX, whose entry of the jump cache is in RAX. */
static bool go_to_probed(struct gen *g, const struct uop *u)
{
    gen_end_write_back(g);
    gen_op_rr(g, 3, 0x8B, H_RDX, H_RCX);
    gen_due(g, u, 0, false);
    gen_jump_cached(g);
    return g->ended = true;
}
EMITTER(ret64)
{
    gen_flags_for(g, NULL);
    unsigned h = gen_reg_of(g, RSP * 8, true);
    gen_access_stack(g, u, 0, ACCESS_READ);
    gen_op_rm(g, 3, 0x8B, H_RCX, g->at, g->at_disp);
    gen_probe(g);
    gen_op_imm(g, 3, 0, h, (int64_t)(8 + u->imm));
    g->r.dirty[h] = true;
    return go_to_probed(g, u);
}

EMITTER(jmp_r)
{
    if (!ok_reg(u->r1))
        return false;
    gen_flags_for(g, NULL);
    gen_op_rr(g, 3, 0x8B, H_RCX, gen_reg_of(g, u->r1, true));
    gen_probe(g);
    return go_to_probed(g, u);
}
EMITTER(call_r)
{
    if (!ok_reg(u->r1) || u->r1 == RSP * 8) /* CALL RSP goes to the old one */
        return false;
    gen_flags_for(g, NULL);
    unsigned target = gen_reg_of(g, u->r1, true);
    gen_op_rr(g, 3, 0x8B, H_RCX, target);
    gen_probe(g);
    push_next(g, u);
    gen_op_rr(g, 3, 0x8B, H_RDX, target);
    gen_end_write_back(g);
    gen_due(g, u, 0, false);
    gen_jump_entry(g, H_RDX);
    gen_jump_cached(g);
    return g->ended = true;
}

/* AH, CH, DH or BH. */
static bool high_byte(unsigned offset) { return (offset & 7) == 1; }
/* Its value to AL. Flags are lost. */
static void high_byte_to_al(struct gen *g, unsigned whole)
{
    gen_op_rr(g, 2, 0x8B, H_RAX, whole);
    gen_b1(g, 0xC1), gen_b1(g, 0xE8), gen_b1(g, 8); /* shr eax, 8 */
}
/* The comparison of a fused micro-op: host flags, and nothing else changed but RAX. */
static void compare(struct gen *g, const struct uop *u, struct variant v, bool imm)
{
    bool test = v.op >> 4 == FUSE_TEST;
    unsigned a = gen_reg_of(g, u->r0, true);
    if (high_byte(u->r0)) {
        high_byte_to_al(g, a);
        a = H_RAX;
    }
    if (!imm) {
        gen_op_rr(g, v.size, test ? 0x85 : 0x3B, test ? gen_reg_of(g, u->r1, true) : a, test ? a : gen_reg_of(g, u->r1, true));
    } else if (test) {
        gen_prefix(g, v.size, 0, 0, a);
        gen_b1(g, v.size ? 0xF7 : 0xF6);
        gen_b1(g, 0xC0 | (a & 7));
        if (v.size == 0)
            gen_b1(g, (uint8_t)u->imm);
        else if (v.size == 1)
            gen_b1(g, (uint8_t)u->imm), gen_b1(g, (uint8_t)(u->imm >> 8));
        else
            gen_b4(g, (uint32_t)u->imm);
    } else {
        gen_op_imm(g, v.size, 7, a, imm_of(u, v.size));
    }
}
void emit_compare_flags(struct gen *g, const struct uop *u, unsigned op)
{
    struct variant v = op_variant(op);
    bool imm = op_family(op) == FAMILY_fused_ri;
    unsigned a = gen_reg_of(g, u->r0, true);
    bool test = v.op >> 4 == FUSE_TEST;
    if (high_byte(u->r0))
        high_byte_to_al(g, a);
    else
        gen_op_rr(g, 3, 0x8B, H_RAX, a);
    if (!imm)
        gen_op_rr(g, v.size, test ? 0x23 : 0x2B, H_RAX, gen_reg_of(g, u->r1, true));
    else
        gen_op_imm(g, v.size, test ? 4 : 5, H_RAX, imm_of(u, v.size));
    if (test) {
        gen_result_flags(g, v.size, H_RAX);
        gen_store_field(g, FIELD(lf[1]), 0);
        gen_store_field(g, FIELD(lf[2]), 0);
    } else {
        gen_compare_flags(g, v.size, H_RAX);
    }
    gen_no_flags(g); /* they are lazy */
}

/* Both ways out of a block, after the host's jump on `cc`. fused: flags are the comparison's, not stored yet. */
static bool two_ways(struct gen *g, const struct uop *u, unsigned cc, bool fused)
{
    struct uop_links *l = LINKS((struct uop *)u);
    bool in_host = g->in_host, in_word = g->in_word, in_lazy = g->in_lazy;
    uint8_t af = g->af;
    struct registers registers = g->r;
    gen_b1(g, 0x0F), gen_b1(g, 0x80 | cc);
    uint8_t *patch = g->p;
    gen_b4(g, 0);
    for (unsigned taken = 0; taken < 2; taken++) {
        struct uop *to = taken ? l->taken : l->next;
        enum flags_entry entry = gen_flags_entry(gen_block_of(to));
        if (taken && !g->failed) {
            uint32_t distance = (uint32_t)(g->p - patch - 4);
            memcpy(patch, &distance, 4);
        }
        g->in_host = in_host, g->in_word = in_word, g->in_lazy = in_lazy, g->af = af;
        g->r = registers;
        if (fused && entry == ENTRY_LAZY)
            emit_compare_flags(g, u, g->ops[g->uop]);
        else if (fused && entry == ENTRY_DEAD)
            gen_no_flags(g);
        else
            gen_flags_for(g, to);
        gen_go(g, u, taken, fused && entry == ENTRY_DEAD);
    }
    return g->ended = true;
}
/* Before the host's jump: once for both ways, unless one of them leaves registers where they are. */
static void write_back_both(struct gen *g, const struct uop *u)
{
    struct uop_links *l = LINKS((struct uop *)u);
    if (!gen_in_loop(g, l->taken) && !gen_in_loop(g, l->next))
        gen_end_write_back(g);
}
EMITTER(jcc_rel)
{
    unsigned cc = v.op;
    if (!condition(g, &cc))
        return false;
    write_back_both(g, u);
    return two_ways(g, u, cc, false);
}
static bool fused(struct gen *g, const struct uop *u, struct variant v, bool imm)
{
    if (!(ok_reg(u->r0) || (imm && high_byte(u->r0))) || (!imm && !ok_reg(u->r1)) ||
        (imm && imm_of(u, v.size) != (int32_t)imm_of(u, v.size)))
        return false;
    /* Both paths start from the same registers. */
    gen_reg_of(g, u->r0, true);
    if (!imm)
        gen_reg_of(g, u->r1, true);
    write_back_both(g, u);
    compare(g, u, v, imm);
    gen_new_flags(g, v.op >> 4 == FUSE_TEST ? AF_CLEAR : AF_HOST);
    return two_ways(g, u, v.op & 15, true);
}
EMITTER(fused_rr) { return fused(g, u, v, false); }
EMITTER(fused_ri) { return fused(g, u, v, true); }
