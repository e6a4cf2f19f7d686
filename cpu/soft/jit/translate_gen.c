/* Making host code: see translate_gen.h. */
#include <string.h>

#include "soft/mmu/access.h"
#include "soft/jit/translate_gen.h"

/* Handlers that call instead of jumping, as sanitizers make them, rely on callee-saved registers. */
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__ || !defined __OPTIMIZE__
static const uint8_t pool[] = {8, 9, 10, 11};
#else
static const uint8_t pool[] = {H_RBX, H_RBP, 8, 9, 10, 11, 12, 13, 14, 15};
#endif

static void b8(struct gen *g, uint64_t v)
{
    gen_b4(g, (uint32_t)v);
    gen_b4(g, (uint32_t)(v >> 32));
}
/* byte: a register is one of a byte, which without REX may be another. */
static void prefix(struct gen *g, unsigned size, unsigned reg, unsigned index, unsigned base, bool byte)
{
    unsigned rex = (unsigned)(size == 3) << 3 | reg >> 3 << 2 | index >> 3 << 1 | base >> 3;
    if (size == 1)
        gen_b1(g, 0x66);
    if (rex || byte)
        gen_b1(g, 0x40u | rex);
}
/* size: log2. Opcodes are those of the word forms; a byte form is one less. */
void gen_prefix(struct gen *g, unsigned size, unsigned reg, unsigned index, unsigned base)
{
    prefix(g, size, reg, index, base, size == 0);
}
void gen_op_rr(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned rm)
{
    gen_prefix(g, size, reg, 0, rm);
    gen_b1(g, size == 0 ? opcode & ~1u : opcode);
    gen_b1(g, 0xC0 | (reg & 7) << 3 | (rm & 7));
}
void gen_memory(struct gen *g, unsigned reg, unsigned base, int32_t disp)
{
    bool sib = (base & 7) == 4;
    if (disp == 0 && (base & 7) != 5) {
        gen_b1(g, (reg & 7) << 3 | (base & 7));
        if (sib)
            gen_b1(g, 0x24);
    } else if (disp == (int8_t)disp) {
        gen_b1(g, 0x40 | (reg & 7) << 3 | (base & 7));
        if (sib)
            gen_b1(g, 0x24);
        gen_b1(g, (uint8_t)disp);
    } else {
        gen_b1(g, 0x80 | (reg & 7) << 3 | (base & 7));
        if (sib)
            gen_b1(g, 0x24);
        gen_b4(g, (uint32_t)disp);
    }
}
void gen_op_rm(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned base, int32_t disp)
{
    gen_prefix(g, size, reg, 0, base);
    gen_b1(g, size == 0 ? opcode & ~1u : opcode);
    gen_memory(g, reg, base, disp);
}
void gen_op_0f_rr(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned rm)
{
    prefix(g, size, reg, 0, rm, opcode == 0xB6 || opcode == 0xBE); /* MOVZX and MOVSX of bytes */
    gen_b1(g, 0x0F);
    gen_b1(g, opcode);
    gen_b1(g, 0xC0 | (reg & 7) << 3 | (rm & 7));
}
void gen_mov_imm64(struct gen *g, unsigned reg, uint64_t v)
{
    if (v <= UINT32_MAX) {
        gen_prefix(g, 2, 0, 0, reg);
        gen_b1(g, 0xB8 | (reg & 7));
        gen_b4(g, (uint32_t)v);
    } else if (v == (uint64_t)(int64_t)(int32_t)v) {
        gen_prefix(g, 3, 0, 0, reg);
        gen_b1(g, 0xC7);
        gen_b1(g, 0xC0 | (reg & 7));
        gen_b4(g, (uint32_t)v);
    } else {
        gen_prefix(g, 3, 0, 0, reg);
        gen_b1(g, 0xB8 | (reg & 7));
        b8(g, v);
    }
}
/* op r/m, imm of group 1 (80, 81, 83) */
void gen_op_imm(struct gen *g, unsigned size, unsigned op, unsigned rm, int64_t imm)
{
    gen_prefix(g, size, 0, 0, rm);
    if (size == 0) {
        gen_b1(g, 0x80);
        gen_b1(g, 0xC0 | op << 3 | (rm & 7));
        gen_b1(g, (uint8_t)imm);
    } else if (imm == (int8_t)imm) {
        gen_b1(g, 0x83);
        gen_b1(g, 0xC0 | op << 3 | (rm & 7));
        gen_b1(g, (uint8_t)imm);
    } else {
        gen_b1(g, 0x81);
        gen_b1(g, 0xC0 | op << 3 | (rm & 7));
        if (size == 1) {
            gen_b1(g, (uint8_t)imm);
            gen_b1(g, (uint8_t)(imm >> 8));
        } else {
            gen_b4(g, (uint32_t)imm);
        }
    }
}
void gen_movsx64(struct gen *g, unsigned size, unsigned to, unsigned from)
{
    if (size == 3)
        gen_op_rr(g, 3, 0x8B, to, from);
    else if (size == 2)
        gen_op_rr(g, 3, 0x63, to, from);
    else
        gen_op_0f_rr(g, 3, size ? 0xBF : 0xBE, to, from);
}

/* ---- guest registers ---- */

static void save(struct gen *g, unsigned h)
{
    gen_op_rm(g, 3, 0x89, h, H_RDI, g->r.holds[h] * 8);
    g->r.dirty[h] = false;
}
static unsigned take(struct gen *g)
{
    int best = -1;
    for (unsigned i = 0; i < sizeof pool; i++) {
        unsigned h = pool[i];
        if (g->r.holds[h] < 0)
            return h;
        if (!(g->pinned >> h & 1) && (best < 0 || g->r.age[h] < g->r.age[best]))
            best = (int)h;
    }
    if (g->r.dirty[best])
        save(g, (unsigned)best);
    g->r.where[(unsigned)g->r.holds[best]] = -1;
    g->r.holds[best] = -1;
    return (unsigned)best;
}
/* The host register of a guest register; loaded unless it is about to be overwritten entirely. */
unsigned gen_reg_of(struct gen *g, unsigned offset, bool load)
{
    unsigned guest = offset >> 3;
    int h = g->r.where[guest];
    if (h < 0) {
        h = (int)take(g);
        g->r.where[guest] = (int8_t)h;
        g->r.holds[h] = (int8_t)guest;
        g->r.dirty[h] = false;
        if (load)
            gen_op_rm(g, 3, 0x8B, (unsigned)h, H_RDI, (int32_t)guest * 8);
    }
    g->pinned |= (uint16_t)(1u << h);
    g->r.age[h] = ++g->clock;
    return (unsigned)h;
}
void gen_write_back(struct gen *g)
{
    for (unsigned i = 0; i < sizeof pool; i++)
        if (g->r.holds[pool[i]] >= 0 && g->r.dirty[pool[i]])
            save(g, pool[i]);
    gen_vectors_store(g, g->r.vectors_dirty);
    if (g->r.vectors)
        gen_vectors_leave(g);
    g->r.vectors = g->r.vectors_dirty = 0;
}
void gen_end_write_back(struct gen *g)
{
    int address = g->r.where[OFF_T0 >> 3];
    if (address >= 0)
        g->r.dirty[address] = false; /* an instruction's own */
    gen_write_back(g);
}
void gen_forget(struct gen *g)
{
    memset(g->r.where, -1, sizeof g->r.where);
    memset(g->r.holds, -1, sizeof g->r.holds);
    memset(g->r.dirty, 0, sizeof g->r.dirty);
    g->r.vectors = g->r.vectors_dirty = 0;
}

/* ---- leaving in the cold ---- */

static struct stub *new_stub(struct gen *g)
{
    if (g->stub_count == STUBS) {
        g->failed = true;
        return &g->stubs[0];
    }
    struct stub *s = &g->stubs[g->stub_count++];
    memset(s, 0, sizeof *s);
    s->block = g->block;
    s->bias = g->bias;
    s->uop = (uint16_t)g->uop;
    s->vectors = g->r.vectors != 0;
    s->vectors_dirty = g->r.vectors_dirty;
    if (!g->in_lazy) {
        s->flags = true;
        g->failed |= !g->in_word;
    }
    for (unsigned i = 0; i < sizeof pool; i++) {
        unsigned h = pool[i];
        if (g->r.holds[h] >= 0 && g->r.dirty[h]) {
            s->dirty[s->dirty_count].guest = (uint8_t)g->r.holds[h];
            s->dirty[s->dirty_count++].host = (uint8_t)h;
        }
    }
    return s;
}
/* jcc to a stub */
static struct stub *jump_to_stub(struct gen *g, unsigned cc)
{
    gen_b1(g, 0x0F);
    gen_b1(g, 0x80 | cc);
    struct stub *s = new_stub(g);
    s->at = (uint32_t)(g->p - g->start);
    gen_b4(g, 0);
    return s;
}
void gen_to_handler(struct gen *g, unsigned cc) { jump_to_stub(g, cc); }
/* jcc to one that leaves host code: the next instruction is at RDX + delta. fused: as in a stub. */
static void leave_if(struct gen *g, unsigned cc, int64_t delta, bool fused)
{
    struct stub *s = jump_to_stub(g, cc);
    s->leave = true, s->delta = delta, s->fused = fused;
}

/* ---- memory ---- */

/* lea to, [address] */
void gen_lea_address(struct gen *g, const struct uop *u, unsigned form, unsigned to, unsigned size)
{
    bool has_base = u->base != OFF_ZERO, has_index = form && u->index != OFF_ZERO;
    unsigned base = has_base ? gen_reg_of(g, u->base, true) : 0, index = has_index ? gen_reg_of(g, u->index, true) : 0;
    if (!has_index && has_base && !u->disp) {
        gen_op_rr(g, size, 0x8B, to, base);
        return;
    }
    gen_prefix(g, size, to, has_index ? index : 0, base);
    gen_b1(g, 0x8D);
    if (!has_index && has_base) {
        gen_memory(g, to, base, u->disp);
        return;
    }
    gen_b1(g, (has_base ? 0x80 : 0x00) | (to & 7) << 3 | 4);
    gen_b1(g, (unsigned)u->scale << 6 | (has_index ? index & 7 : 4) << 3 | (has_base ? base & 7 : 5));
    gen_b4(g, (uint32_t)u->disp);
}
static void and_eax(struct gen *g, uint32_t v) { gen_b1(g, 0x25), gen_b4(g, v); }
void gen_tlb_at(struct gen *g, unsigned h, unsigned bytes, enum soft_kind kind)
{
    int32_t table = (int32_t)(kind * sizeof(struct soft_tlb_entry) * TLB_SIZE);
    gen_op_rr(g, 2, 0x8B, H_RAX, h);
    gen_b1(g, 0xC1), gen_b1(g, 0xE8), gen_b1(g, 8); /* shr eax, 8 */
    and_eax(g, (TLB_SIZE - 1) << 4);
    gen_op_rm(g, 3, 0x03, H_RAX, H_RDI, FIELD(tlb));
    if (bytes > 1)
        gen_op_rm(g, 3, 0x8D, H_RCX, h, (int32_t)bytes - 1);
    else
        gen_op_rr(g, 3, 0x8B, H_RCX, h);
    gen_op_imm(g, 3, 4, H_RCX, -4096);
    gen_op_rm(g, 3, 0x3B, H_RCX, H_RAX, table);
    jump_to_stub(g, 5);
    gen_op_rm(g, 3, 0x03, h, H_RAX, table + 8);
}
void gen_tlb(struct gen *g, unsigned bytes, enum soft_kind kind)
{
    g->at = H_RSI, g->at_disp = 0;
    gen_tlb_at(g, H_RSI, bytes, kind);
}
void gen_access_alone(struct gen *g, const struct uop *u, unsigned form, unsigned size, enum soft_kind kind)
{
    gen_clobber(g);
    gen_lea_address(g, u, form, H_RSI, 3);
    gen_tlb(g, 1u << size, kind);
}
void gen_access(struct gen *g, const struct uop *u, unsigned form, unsigned size, enum soft_kind kind)
{
    if (!gen_window(g, u))
        gen_access_alone(g, u, form, size, kind);
}
void gen_access_tmp(struct gen *g, const struct uop *u, enum soft_kind kind)
{
    if (gen_window(g, u))
        return;
    gen_clobber(g);
    gen_op_rr(g, 3, 0x8B, H_RSI, gen_reg_of(g, OFF_T0, true));
    gen_tlb(g, u->size, kind);
}
void gen_access_stack(struct gen *g, const struct uop *u, int32_t disp, enum soft_kind kind)
{
    if (gen_window(g, u))
        return;
    gen_clobber(g);
    gen_op_rm(g, 3, 0x8D, H_RSI, gen_reg_of(g, RSP * 8, true), disp);
    gen_tlb(g, 8, kind);
}
void gen_rip_address(struct gen *g, const struct uop *u, unsigned to)
{
    int64_t distance = (int64_t)(u->imm + (uint64_t)g->bias);
    if (distance == (int32_t)distance) {
        gen_op_rm(g, 3, 0x8D, to, H_RDX, (int32_t)distance);
    } else {
        gen_clobber(g);
        gen_mov_imm64(g, to, (uint64_t)distance);
        gen_op_rr(g, 3, 0x03, to, H_RDX);
    }
}

/* ---- the ends of a block ---- */

void gen_budget(struct gen *g, const struct uop *u, int64_t delta, bool fused)
{
    gen_prefix(g, 3, 0, 0, H_RDI), gen_b1(g, 0x83), gen_memory(g, 5, H_RDI, FIELD(budget)), gen_b1(g, u->idx + 1u); /* sub */
    leave_if(g, 14, delta, fused); /* jle */
}
/* Charge the budget, look for attention; out through a stub when due. */
void gen_due(struct gen *g, const struct uop *u, int64_t delta, bool fused)
{
    gen_budget(g, u, delta, fused);
    gen_prefix(g, 2, 0, 0, H_RDI), gen_b1(g, 0x83), gen_memory(g, 7, H_RDI, FIELD(attention)), gen_b1(g, 0); /* cmp */
    leave_if(g, 5, delta, fused); /* jne */
}
void gen_add_rip(struct gen *g, unsigned to, int64_t delta)
{
    delta += g->bias;
    if (delta == (int32_t)delta) {
        gen_op_rm(g, 3, 0x8D, to, H_RDX, (int32_t)delta);
    } else {
        gen_mov_imm64(g, to, (uint64_t)delta);
        gen_op_rr(g, 3, 0x03, to, H_RDX);
    }
}
/* RAX: the jump cache's entry for the linear address in a register. */
void gen_jump_entry(struct gen *g, unsigned address)
{
    gen_op_rr(g, 2, 0x8B, H_RAX, address);
    gen_b1(g, 0xC1), gen_b1(g, 0xE8), gen_b1(g, 12); /* shr eax, 12 */
    gen_op_rr(g, 2, 0x33, H_RAX, address);
    and_eax(g, JUMP_SIZE - 1);
    gen_b1(g, 0xC1), gen_b1(g, 0xE0), gen_b1(g, 4);  /* shl eax, 4 */
    gen_op_rm(g, 3, 0x03, H_RAX, H_RDI, FIELD(jumps));
}

/* The successor's address is in RCX: find it in the jump cache (RAX: entry), else go to the interpreter. */
void gen_probe(struct gen *g)
{
    gen_jump_entry(g, H_RCX);
    gen_op_rm(g, 3, 0x3B, H_RCX, H_RAX, 0);
    jump_to_stub(g, 5);
}
/* To a block, the code of which is at RSI: to its entry for flags in the word, or for lazy ones. */
static void jump_rsi(struct gen *g, bool word)
{
    if (word)
        gen_b1(g, 0xFF), gen_b1(g, 0x66), gen_b1(g, (unsigned)BLOCK_WORD_FN & 0xFF); /* jmp [rsi + disp8] */
    else
        gen_b1(g, 0xFF), gen_b1(g, 0x26); /* jmp [rsi] */
}
void gen_jump_cached(struct gen *g)
{
    gen_op_rm(g, 3, 0x8B, H_RSI, H_RAX, 8);
    jump_rsi(g, true);
}
/* To a linked block. It dies with this one, and then attention is set: no look at the link is due. */
static void jump_linked(struct gen *g, struct uop *to)
{
    struct block *b = gen_block_of(to);
    bool word = gen_flags_entry(b) == ENTRY_WORD;
    uintptr_t entry = (uintptr_t)(word ? b->word_fn : to->fn);
    if (entry - g->runs < g->runs_size) { /* it has host code */
        gen_b1(g, 0xE9);
        gen_b4(g, (uint32_t)(entry - (g->runs_start + (uintptr_t)(g->p - g->start) + 4)));
        return;
    }
    gen_mov_imm64(g, H_RSI, (uint64_t)(uintptr_t)to);
    jump_rsi(g, word);
}
/* Where in the vCPU the jump cache's entry for a fixed address is, if that is known: in the table of 64-bit kernels, as only
 * they run this code. At another address than now it is the wrong one, and the handler goes on. */
static bool fixed_entry(const struct gen *g, int64_t delta, int32_t *at)
{
    uint64_t to = g->linear + (uint64_t)(g->bias + delta);
    *at = FIELD(jump.table) + (int32_t)(jump_hash(to) * sizeof(struct soft_jump));
    return g->linear != 0;
}
void gen_probe_fixed(struct gen *g, int64_t delta)
{
    int32_t at;
    gen_add_rip(g, H_RCX, delta);
    if (!fixed_entry(g, delta, &at)) {
        gen_probe(g);
        return;
    }
    gen_op_rm(g, 3, 0x3B, H_RCX, H_RDI, at);
    jump_to_stub(g, 5);
}
void gen_jump_fixed(struct gen *g, int64_t delta)
{
    int32_t at;
    if (fixed_entry(g, delta, &at)) {
        gen_op_rm(g, 3, 0x8B, H_RSI, H_RDI, at + (int32_t)offsetof(struct soft_jump, code));
        jump_rsi(g, true);
    } else {
        gen_jump_entry(g, H_RDX);
        gen_jump_cached(g);
    }
}
/* To a fixed successor. In a loop registers may stay in host registers; on any other way they are written back first. */
void gen_go(struct gen *g, const struct uop *u, bool taken, bool fused)
{
    const struct uop_links *l = LINKS((struct uop *)u);
    int64_t delta = taken ? l->delta : u->off + u->len;
    struct uop *to = taken ? l->taken : l->next;
    gen_windows_forget(g);
    if (gen_in_loop(g, to)) {
        gen_loop_edge(g, u, to, delta, fused);
        return;
    }
    gen_end_write_back(g);
    if (to) {
        /* Ways back, returns and others of unknown length look for attention. A way on in the page need not: in a run from
         * the block's start no handler has run that could have asked for it. */
        if (g->from_start && delta > (int64_t)u->off)
            gen_budget(g, u, delta, fused);
        else
            gen_due(g, u, delta, fused);
        gen_add_rip(g, H_RDX, delta);
        jump_linked(g, to);
    } else {
        gen_probe_fixed(g, delta);
        gen_due(g, u, delta, fused);
        gen_op_rr(g, 3, 0x8B, H_RDX, H_RCX);
        if (g->linear)
            gen_jump_fixed(g, delta);
        else
            gen_jump_cached(g);
    }
}
