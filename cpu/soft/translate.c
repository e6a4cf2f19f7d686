/* Host code for hot blocks.
 *
 * A run of micro-ops that are known here becomes one piece of host code that the run's first micro-op has as its `fn`;
 * the others of the block keep their handlers. Within a run guest registers live in host registers. Whatever is out of
 * the ordinary (a TLB miss, an unknown successor) writes them back and goes on in the interpreter with the micro-op
 * concerned, so this file knows nothing of faults, devices or modes; a block that is invalid is so for both.
 *
 * Host registers: RDI vCPU, RDX the block's address, RAX, RCX and RSI scratch, ten others hold guest registers. Callee-
 * saved ones are saved once, by host_enter(). If the host allows no memory that is both writable and executable there
 * are no translations.
 */
#include <string.h>
#include <sys/mman.h>

#include "soft/access.h"
#include "soft/exec.h"
#include "soft/translate.h"

enum { H_RAX, H_RCX, H_RDX, H_RBX, H_RSP, H_RBP, H_RSI, H_RDI };
enum { GUESTS = 20, CODE_SIZE = 32 << 20, RUN_MAX = 24 << 10, STUBS = 256 };
#define FIELD(f) ((int32_t)offsetof(struct soft_vcpu, f))
/* Handlers that call instead of jumping, as sanitizers make them, rely on callee-saved registers. */
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__ || !defined __OPTIMIZE__
static const uint8_t pool[] = {8, 9, 10, 11};
#else
static const uint8_t pool[] = {H_RBX, H_RBP, 8, 9, 10, 11, 12, 13, 14, 15};
#endif

/* ---- what a handler does ---- */

enum kind { K_NONE, K_ALU_RR, K_ALU_RI, K_ALU_RM, K_ALU_MR, K_ALU_MI, K_UNARY_R, K_SHIFT, K_IMUL, K_IMUL_I, K_MOV_RR, K_MOV_RI,
            K_LOAD, K_LOAD_RIP, K_STORE, K_STORE_RIP, K_STORE_I, K_MOVZX, K_MOVSX, K_MOVZX_M, K_MOVSX_M, K_LEA, K_LEA_RIP,
            K_PUSH, K_PUSH_I, K_POP, K_CMOV, K_SETCC, K_BSWAP, K_EA, K_NOP,
            K_JMP, K_FALL, K_JCC, K_FUSED_RR, K_FUSED_RI, K_CALL, K_RET };
struct meaning {
    uop_fn fn;
    uint8_t kind, op, size, form; /* size: log2 (movsx: destination), op: operation, condition or source size */
    bool flags;
};
enum { MEANINGS = 4096 };
static struct meaning meanings[MEANINGS];

static unsigned meaning_hash(uop_fn fn) { return (unsigned)((uintptr_t)fn * 0x9E3779B97F4A7C15ull >> 52); }
static void know(uop_fn fn, enum kind kind, unsigned op, unsigned size, unsigned form, bool flags)
{
    if (!fn)
        return;
    unsigned i = meaning_hash(fn);
    while (meanings[i].fn && meanings[i].fn != fn)
        i = (i + 1) % MEANINGS;
    if (!meanings[i].fn)
        meanings[i] = (struct meaning){fn, (uint8_t)kind, (uint8_t)op, (uint8_t)size, (uint8_t)form, flags};
}
static const struct meaning *meaning(uop_fn fn)
{
    unsigned i = meaning_hash(fn);
    while (meanings[i].fn && meanings[i].fn != fn)
        i = (i + 1) % MEANINGS;
    return &meanings[i];
}
static void learn(void)
{
    for (unsigned op = 0; op < ALU_OPS; op++)
        for (unsigned s = 0; s < 4; s++)
            for (unsigned nf = 0; nf < 2; nf++) {
                if (op == ALU_ADC || op == ALU_SBB)
                    continue;
                know(alu_rr[op][s][nf], K_ALU_RR, op, s, 0, !nf);
                know(alu_ri[op][s][nf], K_ALU_RI, op, s, 0, !nf);
                for (unsigned f = 0; f < 2; f++) {
                    know(alu_rm[op][s][nf][f], K_ALU_RM, op, s, f, !nf);
                    know(alu_mr[op][s][nf][f], K_ALU_MR, op, s, f, !nf);
                    know(alu_mi[op][s][nf][f], K_ALU_MI, op, s, f, !nf);
                }
            }
    for (unsigned op = 0; op < UN_OPS; op++)
        for (unsigned s = 0; s < 4; s++)
            for (unsigned nf = 0; nf < 2; nf++)
                know(unary_r[op][s][nf], K_UNARY_R, op, s, 0, !nf && op != UN_NOT);
    for (unsigned op = 0; op < SH_OPS; op++)
        for (unsigned s = 0; s < 4; s++)
            if (op != SH_RCL && op != SH_RCR) {
                know(shift_ri[op][s][1], K_SHIFT, op, s, 0, false);
            }
    for (unsigned s = 0; s < 4; s++) {
        know(imul_rr[s], K_IMUL, 0, s, 0, true);
        know(imul_rri[s], K_IMUL_I, 0, s, 0, true);
        know(mov_rr[s], K_MOV_RR, 0, s, 0, false);
        know(mov_ri[s], K_MOV_RI, 0, s, 0, false);
        know(load_rip[s], K_LOAD_RIP, 0, s, 0, false);
        know(store_rip[s], K_STORE_RIP, 0, s, 0, false);
        for (unsigned f = 0; f < 2; f++) {
            know(load_r[s][f], K_LOAD, 0, s, f, false);
            know(store_r[s][f], K_STORE, 0, s, f, false);
            know(store_i[s][f], K_STORE_I, 0, s, f, false);
            know(lea_r[s][f], K_LEA, 0, s, f, false);
        }
        for (unsigned from = 0; from < 3; from++) {
            know(movsx_rr[from][s], K_MOVSX, from, s, 0, false);
            for (unsigned f = 0; f < 2; f++)
                know(movsx_rm[from][s][f], K_MOVSX_M, from, s, f, false);
        }
        for (unsigned cc = 0; cc < 16; cc++) {
            know(cmov_rr[cc][s], K_CMOV, cc, s, 0, false);
            for (unsigned op = 0; op < FUSE_OPS; op++) {
                know(fused_rr[op][cc][s], K_FUSED_RR, op << 4 | cc, s, 0, true);
                know(fused_ri[op][cc][s], K_FUSED_RI, op << 4 | cc, s, 0, true);
            }
        }
    }
    for (unsigned from = 0; from < 3; from++) {
        know(movzx_rr[from], K_MOVZX, from, 3, 0, false);
        for (unsigned f = 0; f < 2; f++)
            know(movzx_rm[from][f], K_MOVZX_M, from, 3, f, false);
    }
    for (unsigned cc = 0; cc < 16; cc++) {
        know(setcc_r[cc], K_SETCC, cc, 0, 0, false);
        know(jcc_rel[cc], K_JCC, cc, 0, 0, false);
    }
    know(lea_rip, K_LEA_RIP, 0, 3, 0, false);
    know(push64_r, K_PUSH, 0, 3, 0, false);
    know(push64_i, K_PUSH_I, 0, 3, 0, false);
    know(pop64_r, K_POP, 0, 3, 0, false);
    know(bswap32, K_BSWAP, 0, 2, 0, false);
    know(bswap64, K_BSWAP, 0, 3, 0, false);
    know(ea_bd, K_EA, 0, 3, 0, false);
    know(ea_bi, K_EA, 0, 3, 1, false);
    know(ea_rip, K_EA, 1, 3, 0, false);
    know(nop, K_NOP, 0, 0, 0, false);
    know(jmp_rel, K_JMP, 0, 0, 0, false);
    know(jmp_fall, K_FALL, 0, 0, 0, false);
    know(call_rel, K_CALL, 0, 0, 0, false);
    know(ret64, K_RET, 0, 0, 0, false);
}

/* ---- the code being made ---- */

struct stub {
    uint32_t at;               /* of the rel32 that jumps here */
    uint16_t uop;
    uint16_t dirty_count;
    uint8_t leave;             /* not back to the interpreter, but out: c->rip = RDX + delta */
    uint8_t fused;             /* leave: first do the comparison's flags */
    int64_t delta;
    struct { uint8_t guest, host; } dirty[10];
};
struct gen {
    uint8_t *start, *p, *end;
    struct uop *code;          /* the block's micro-ops */
    unsigned uop;
    int8_t where[GUESTS];      /* host register of a guest register, or -1 */
    int8_t holds[16];          /* guest register in a host register, or -1 */
    bool dirty[16];
    uint16_t pinned;
    uint32_t age[16], clock;
    bool host_flags;           /* the host's flags are the guest's */
    bool pending;              /* CF, OF and AF of them are not stored yet */
    bool pending_keep_cf;      /* INC, DEC: CF is the stored one */
    bool failed;
    struct stub stubs[STUBS];
    unsigned stub_count;
};

static void b1(struct gen *g, unsigned v)
{
    if (g->p < g->end)
        *g->p++ = (uint8_t)v;
    else
        g->failed = true;
}
static void b4(struct gen *g, uint32_t v)
{
    for (unsigned i = 0; i < 4; i++)
        b1(g, v >> (8 * i));
}
static void b8(struct gen *g, uint64_t v)
{
    b4(g, (uint32_t)v);
    b4(g, (uint32_t)(v >> 32));
}
/* size: log2. Opcodes are those of the word forms; a byte form is one less. */
static void prefix(struct gen *g, unsigned size, unsigned reg, unsigned index, unsigned base)
{
    if (size == 1)
        b1(g, 0x66);
    b1(g, 0x40u | (size == 3) << 3 | reg >> 3 << 2 | index >> 3 << 1 | base >> 3);
}
static void op_rr(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned rm)
{
    prefix(g, size, reg, 0, rm);
    b1(g, size == 0 ? opcode & ~1u : opcode);
    b1(g, 0xC0 | (reg & 7) << 3 | (rm & 7));
}
static void memory(struct gen *g, unsigned reg, unsigned base, int32_t disp)
{
    bool sib = (base & 7) == 4;
    if (disp == (int8_t)disp) {
        b1(g, 0x40 | (reg & 7) << 3 | (base & 7));
        if (sib)
            b1(g, 0x24);
        b1(g, (uint8_t)disp);
    } else {
        b1(g, 0x80 | (reg & 7) << 3 | (base & 7));
        if (sib)
            b1(g, 0x24);
        b4(g, (uint32_t)disp);
    }
}
static void op_rm(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned base, int32_t disp)
{
    prefix(g, size, reg, 0, base);
    b1(g, size == 0 ? opcode & ~1u : opcode);
    memory(g, reg, base, disp);
}
static void op_0f_rr(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned rm)
{
    prefix(g, size, reg, 0, rm);
    b1(g, 0x0F);
    b1(g, opcode);
    b1(g, 0xC0 | (reg & 7) << 3 | (rm & 7));
}
static void mov_imm64(struct gen *g, unsigned reg, uint64_t v)
{
    if (v <= UINT32_MAX) {
        prefix(g, 2, 0, 0, reg);
        b1(g, 0xB8 | (reg & 7));
        b4(g, (uint32_t)v);
    } else if (v == (uint64_t)(int64_t)(int32_t)v) {
        prefix(g, 3, 0, 0, reg);
        b1(g, 0xC7);
        b1(g, 0xC0 | (reg & 7));
        b4(g, (uint32_t)v);
    } else {
        prefix(g, 3, 0, 0, reg);
        b1(g, 0xB8 | (reg & 7));
        b8(g, v);
    }
}
/* op r/m, imm of group 1 (80, 81, 83) */
static void op_imm(struct gen *g, unsigned size, unsigned op, unsigned rm, int64_t imm)
{
    prefix(g, size, 0, 0, rm);
    if (size == 0) {
        b1(g, 0x80);
        b1(g, 0xC0 | op << 3 | (rm & 7));
        b1(g, (uint8_t)imm);
    } else if (imm == (int8_t)imm) {
        b1(g, 0x83);
        b1(g, 0xC0 | op << 3 | (rm & 7));
        b1(g, (uint8_t)imm);
    } else {
        b1(g, 0x81);
        b1(g, 0xC0 | op << 3 | (rm & 7));
        if (size == 1) {
            b1(g, (uint8_t)imm);
            b1(g, (uint8_t)(imm >> 8));
        } else {
            b4(g, (uint32_t)imm);
        }
    }
}
static void store_zero(struct gen *g, int32_t field)
{
    prefix(g, 3, 0, 0, H_RDI);
    b1(g, 0xC7);
    memory(g, 0, H_RDI, field);
    b4(g, 0);
}
static void movsx64(struct gen *g, unsigned size, unsigned to, unsigned from)
{
    if (size == 3)
        op_rr(g, 3, 0x8B, to, from);
    else if (size == 2)
        op_rr(g, 3, 0x63, to, from);
    else
        op_0f_rr(g, 3, size ? 0xBF : 0xBE, to, from);
}

/* ---- guest registers ---- */

static void save(struct gen *g, unsigned h)
{
    op_rm(g, 3, 0x89, h, H_RDI, g->holds[h] * 8);
    g->dirty[h] = false;
}
static unsigned take(struct gen *g)
{
    int best = -1;
    for (unsigned i = 0; i < sizeof pool; i++) {
        unsigned h = pool[i];
        if (g->holds[h] < 0)
            return h;
        if (!(g->pinned >> h & 1) && (best < 0 || g->age[h] < g->age[best]))
            best = (int)h;
    }
    if (g->dirty[best])
        save(g, (unsigned)best);
    g->where[(unsigned)g->holds[best]] = -1;
    g->holds[best] = -1;
    return (unsigned)best;
}
/* The host register of a guest register; loaded unless it is about to be overwritten entirely. */
static unsigned reg_of(struct gen *g, unsigned offset, bool load)
{
    unsigned guest = offset >> 3;
    int h = g->where[guest];
    if (h < 0) {
        h = (int)take(g);
        g->where[guest] = (int8_t)h;
        g->holds[h] = (int8_t)guest;
        g->dirty[h] = false;
        if (load)
            op_rm(g, 3, 0x8B, (unsigned)h, H_RDI, (int32_t)guest * 8);
    }
    g->pinned |= (uint16_t)(1u << h);
    g->age[h] = ++g->clock;
    return (unsigned)h;
}
static void write_back(struct gen *g)
{
    for (unsigned i = 0; i < sizeof pool; i++)
        if (g->holds[pool[i]] >= 0 && g->dirty[pool[i]])
            save(g, pool[i]);
}
static void forget(struct gen *g)
{
    memset(g->where, -1, sizeof g->where);
    memset(g->holds, -1, sizeof g->holds);
    memset(g->dirty, 0, sizeof g->dirty);
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
    s->uop = (uint16_t)g->uop;
    for (unsigned i = 0; i < sizeof pool; i++) {
        unsigned h = pool[i];
        if (g->holds[h] >= 0 && g->dirty[h]) {
            s->dirty[s->dirty_count].guest = (uint8_t)g->holds[h];
            s->dirty[s->dirty_count++].host = (uint8_t)h;
        }
    }
    return s;
}
/* jcc to a stub */
static struct stub *jump_to_stub(struct gen *g, unsigned cc)
{
    b1(g, 0x0F);
    b1(g, 0x80 | cc);
    struct stub *s = new_stub(g);
    s->at = (uint32_t)(g->p - g->start);
    b4(g, 0);
    return s;
}

/* ---- flags ---- */

/* lf[0] from the result in a register; keeps the host's flags. */
static void result_flags(struct gen *g, unsigned size, unsigned h)
{
    if (size == 3) {
        op_rm(g, 3, 0x89, h, H_RDI, FIELD(lf[0]));
    } else {
        movsx64(g, size, H_RAX, h);
        op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[0]));
    }
}
/* CF, OF and AF from the host's flags. Uses RAX, RCX, RSI. */
static void store_carries(struct gen *g, bool keep_cf)
{
    b1(g, 0x9F);                                    /* lahf */
    b1(g, 0x0F), b1(g, 0x90), b1(g, 0xC1);          /* seto cl */
    if (keep_cf) {
        op_rm(g, 3, 0x8B, H_RSI, H_RDI, FIELD(lf[1]));
        prefix(g, 3, 0, 0, H_RSI), b1(g, 0xC1), b1(g, 0xFE), b1(g, 63); /* sar rsi, 63 */
    } else {
        op_rr(g, 3, 0x1B, H_RSI, H_RSI);            /* sbb rsi, rsi */
    }
    b1(g, 0x0F), b1(g, 0xB6), b1(g, 0xC9);          /* movzx ecx, cl */
    prefix(g, 3, 0, 0, H_RCX), b1(g, 0xC1), b1(g, 0xE1), b1(g, 62); /* shl rcx, 62 */
    op_rr(g, 3, 0x33, H_RCX, H_RSI);
    op_rm(g, 3, 0x89, H_RCX, H_RDI, FIELD(lf[1]));
    b1(g, 0x0F), b1(g, 0xB6), b1(g, 0xC4);          /* movzx eax, ah */
    b1(g, 0xD1), b1(g, 0xE8);                       /* shr eax, 1: AF to bit 3 */
    op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[2]));
}
/* Before host flags are lost. */
static void settle(struct gen *g)
{
    if (g->pending)
        store_carries(g, g->pending_keep_cf);
    g->pending = g->host_flags = false;
}
static void logic_flags(struct gen *g, unsigned size, unsigned h)
{
    result_flags(g, size, h);
    store_zero(g, FIELD(lf[1]));
    store_zero(g, FIELD(lf[2]));
}

/* ---- memory ---- */

static bool ok_reg(unsigned offset) { return (offset & 7) == 0 && offset != OFF_ZERO; }

/* lea to, [address] */
static void lea_address(struct gen *g, const struct uop *u, unsigned form, unsigned to, unsigned size)
{
    bool has_base = u->base != OFF_ZERO, has_index = form && u->index != OFF_ZERO;
    unsigned base = has_base ? reg_of(g, u->base, true) : 0, index = has_index ? reg_of(g, u->index, true) : 0;
    prefix(g, size, to, has_index ? index : 0, base);
    b1(g, 0x8D);
    if (!has_index && has_base) {
        memory(g, to, base, u->disp);
        return;
    }
    b1(g, (has_base ? 0x80 : 0x00) | (to & 7) << 3 | 4);
    b1(g, (unsigned)u->scale << 6 | (has_index ? index & 7 : 4) << 3 | (has_base ? base & 7 : 5));
    b4(g, (uint32_t)u->disp);
}
/* The linear address is in RSI: turn it into a host pointer, or go to the interpreter. Flags are lost. */
static void tlb(struct gen *g, unsigned bytes, enum soft_kind kind)
{
    int32_t table = (int32_t)(kind * sizeof(struct soft_tlb_entry) * TLB_SIZE);
    op_rr(g, 3, 0x8B, H_RAX, H_RSI);
    prefix(g, 3, 0, 0, H_RAX), b1(g, 0xC1), b1(g, 0xE8), b1(g, 8);    /* shr rax, 8 */
    op_imm(g, 2, 4, H_RAX, (TLB_SIZE - 1) << 4);
    op_rm(g, 3, 0x03, H_RAX, H_RDI, FIELD(tlb));
    if (bytes > 1)
        op_rm(g, 3, 0x8D, H_RCX, H_RSI, (int32_t)bytes - 1);
    else
        op_rr(g, 3, 0x8B, H_RCX, H_RSI);
    op_imm(g, 3, 4, H_RCX, -4096);
    op_rm(g, 3, 0x3B, H_RCX, H_RAX, table);
    jump_to_stub(g, 5);
    op_rm(g, 3, 0x03, H_RSI, H_RAX, table + 8);
}
static void access(struct gen *g, const struct uop *u, unsigned form, unsigned size, enum soft_kind kind)
{
    settle(g);
    lea_address(g, u, form, H_RSI, 3);
    tlb(g, 1u << size, kind);
}
static void rip_address(struct gen *g, const struct uop *u, unsigned to)
{
    if (u->imm != (uint64_t)(int64_t)(int32_t)u->imm)
        settle(g);
    if (u->imm == (uint64_t)(int64_t)(int32_t)u->imm) {
        op_rm(g, 3, 0x8D, to, H_RDX, (int32_t)u->imm);
    } else {
        mov_imm64(g, to, u->imm);
        op_rr(g, 3, 0x03, to, H_RDX);
    }
}

/* ---- the ends of a block ---- */

/* Charge the budget, look for attention; out through a stub when due. */
static void due(struct gen *g, const struct uop *u, int64_t delta, bool fused)
{
    prefix(g, 3, 0, 0, H_RDI), b1(g, 0x83), memory(g, 5, H_RDI, FIELD(budget)), b1(g, u->idx + 1u); /* sub */
    struct stub *s = jump_to_stub(g, 14); /* jle */
    s->leave = 1, s->delta = delta, s->fused = fused;
    prefix(g, 2, 0, 0, H_RDI), b1(g, 0x83), memory(g, 7, H_RDI, FIELD(attention)), b1(g, 0); /* cmp */
    s = jump_to_stub(g, 5);
    s->leave = 1, s->delta = delta, s->fused = fused;
}
static void add_rip(struct gen *g, unsigned to, int64_t delta)
{
    if (delta == (int32_t)delta) {
        op_rm(g, 3, 0x8D, to, H_RDX, (int32_t)delta);
    } else {
        mov_imm64(g, to, (uint64_t)delta);
        op_rr(g, 3, 0x03, to, H_RDX);
    }
}
/* The successor's address is in RCX: find it in the jump cache (RAX: entry), else go to the interpreter. */
static void probe(struct gen *g)
{
    op_rr(g, 3, 0x8B, H_RAX, H_RCX);
    prefix(g, 3, 0, 0, H_RAX), b1(g, 0xC1), b1(g, 0xE8), b1(g, 12);
    op_rr(g, 2, 0x33, H_RAX, H_RCX);
    op_imm(g, 2, 4, H_RAX, JUMP_SIZE - 1);
    prefix(g, 3, 0, 0, H_RAX), b1(g, 0xC1), b1(g, 0xE0), b1(g, 4);
    op_rm(g, 3, 0x03, H_RAX, H_RDI, FIELD(jumps));
    op_rm(g, 3, 0x3B, H_RCX, H_RAX, 0);
    jump_to_stub(g, 5);
}
static void jump_rsi(struct gen *g)
{
    b1(g, 0xFF), b1(g, 0x26); /* jmp [rsi] */
}
/* The link itself is read every time: it is cleared when its block is invalidated. */
static void load_link(struct gen *g, struct uop *const *link)
{
    mov_imm64(g, H_RAX, (uint64_t)(uintptr_t)link);
    op_rm(g, 3, 0x8B, H_RSI, H_RAX, 0);
    op_rr(g, 3, 0x85, H_RSI, H_RSI);
    jump_to_stub(g, 4);
}
/* To a fixed successor. Registers are written back and forgotten by the caller's caller (both paths share the state). */
static void go(struct gen *g, const struct uop *u, bool taken, bool fused)
{
    const struct uop_links *l = LINKS((struct uop *)u);
    int64_t delta = taken ? l->delta : u->off + u->len;
    struct uop *to = taken ? l->taken : l->next;
    write_back(g);
    if (to) {
        load_link(g, taken ? &l->taken : &l->next);
        due(g, u, delta, fused);
        add_rip(g, H_RDX, delta);
        jump_rsi(g);
    } else {
        add_rip(g, H_RCX, delta);
        probe(g);
        due(g, u, delta, fused);
        op_rm(g, 3, 0x8B, H_RSI, H_RAX, 8);
        op_rr(g, 3, 0x8B, H_RDX, H_RCX);
        jump_rsi(g);
    }
}
static bool flags_dead_at(const struct uop *to)
{
    return to && !((const struct block *)((const char *)to - offsetof(struct block, code)))->flags_in;
}

/* ---- micro-ops ---- */

/* The comparison of a fused micro-op: host flags, and nothing else changed. */
static void compare_op(struct gen *g, const struct uop *u, const struct meaning *m)
{
    bool test = m->op >> 4 == FUSE_TEST;
    unsigned a = reg_of(g, u->r0, true);
    if (m->kind == K_FUSED_RR) {
        op_rr(g, m->size, test ? 0x85 : 0x3B, test ? reg_of(g, u->r1, true) : a, test ? a : reg_of(g, u->r1, true));
    } else if (test) {
        prefix(g, m->size, 0, 0, a);
        b1(g, m->size ? 0xF7 : 0xF6);
        b1(g, 0xC0 | (a & 7));
        if (m->size == 0)
            b1(g, (uint8_t)u->imm);
        else if (m->size == 1)
            b1(g, (uint8_t)u->imm), b1(g, (uint8_t)(u->imm >> 8));
        else
            b4(g, (uint32_t)u->imm);
    } else {
        op_imm(g, m->size, 7, a, m->size == 1 ? (int16_t)u->imm : m->size == 2 ? (int32_t)u->imm : (int64_t)u->imm);
    }
}
/* All its flags, stored. */
static void compare_flags(struct gen *g, const struct uop *u, const struct meaning *m)
{
    unsigned a = reg_of(g, u->r0, true);
    bool test = m->op >> 4 == FUSE_TEST;
    op_rr(g, 3, 0x8B, H_RAX, a);
    if (m->kind == K_FUSED_RR) {
        op_rr(g, m->size, test ? 0x23 : 0x2B, H_RAX, reg_of(g, u->r1, true));
    } else {
        op_imm(g, m->size, test ? 4 : 5, H_RAX, m->size == 1 ? (int16_t)u->imm : m->size == 2 ? (int32_t)u->imm : (int64_t)u->imm);
    }
    if (test) {
        logic_flags(g, m->size, H_RAX);
    } else {
        result_flags(g, m->size, H_RAX);
        store_carries(g, false);
    }
}

/* Host opcodes of ALU operations, r <- r op r/m form. */
static const uint8_t alu_opcode[ALU_OPS] = {0x03, 0x0B, 0x13, 0x1B, 0x23, 0x2B, 0x33, 0x3B, 0x85};
static const uint8_t alu_group[ALU_OPS] = {0, 1, 2, 3, 4, 5, 6, 7, 4};
static bool logic(unsigned op) { return op == ALU_AND || op == ALU_OR || op == ALU_XOR || op == ALU_TEST; }
static bool modifies(unsigned op) { return op != ALU_CMP && op != ALU_TEST; }

static int64_t imm_of(const struct uop *u, unsigned size)
{
    return size == 0 ? (int8_t)u->imm : size == 1 ? (int16_t)u->imm : size == 2 ? (int32_t)u->imm : (int64_t)u->imm;
}

static void set_flags(struct gen *g, unsigned op, unsigned size, unsigned h)
{
    if (logic(op)) {
        logic_flags(g, size, h);
    } else {
        result_flags(g, size, h);
        g->pending = true;
    }
    g->host_flags = true;
    g->pending_keep_cf = false;
}

static bool alu(struct gen *g, const struct uop *u, const struct meaning *m)
{
    unsigned op = m->op, size = m->size;
    bool flags = m->flags && !u->aux;
    int64_t imm = imm_of(u, size);
    if (!modifies(op) && !flags && (m->kind == K_ALU_RR || m->kind == K_ALU_RI))
        return true;
    switch (m->kind) {
    case K_ALU_RR: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1))
            return false;
        settle(g);
        bool clear = (op == ALU_XOR || op == ALU_SUB) && u->r0 == u->r1 && size >= 2;
        unsigned a = reg_of(g, u->r0, !clear), b = reg_of(g, u->r1, true);
        if (!modifies(op)) {
            op_rr(g, 3, 0x8B, H_RAX, a);
            a = H_RAX;
        } else {
            g->dirty[a] = true;
        }
        op_rr(g, size, op == ALU_CMP ? 0x2B : op == ALU_TEST ? 0x23 : alu_opcode[op], a, b);
        if (flags)
            set_flags(g, op, size, a);
        return true;
    }
    case K_ALU_RI: {
        if (!ok_reg(u->r0) || imm != (int32_t)imm)
            return false;
        settle(g);
        unsigned a = reg_of(g, u->r0, true);
        if (!modifies(op)) {
            op_rr(g, 3, 0x8B, H_RAX, a);
            a = H_RAX;
        } else {
            g->dirty[a] = true;
        }
        op_imm(g, size, op == ALU_CMP ? 5 : alu_group[op], a, imm);
        if (flags)
            set_flags(g, op, size, a);
        return true;
    }
    case K_ALU_RM: {
        if (!ok_reg(u->r0))
            return false;
        access(g, u, m->form, size, ACCESS_READ);
        unsigned a = reg_of(g, u->r0, true);
        if (!modifies(op)) {
            op_rr(g, 3, 0x8B, H_RAX, a);
            a = H_RAX;
        } else {
            g->dirty[a] = true;
        }
        op_rm(g, size, op == ALU_CMP ? 0x2B : op == ALU_TEST ? 0x23 : alu_opcode[op], a, H_RSI, 0);
        if (flags)
            set_flags(g, op, size, a);
        return true;
    }
    case K_ALU_MR: {
        if (!ok_reg(u->r1))
            return false;
        access(g, u, m->form, size, modifies(op) ? ACCESS_WRITE : ACCESS_READ);
        unsigned b = reg_of(g, u->r1, true);
        op_rm(g, size, 0x8B, H_RAX, H_RSI, 0);
        op_rr(g, size, op == ALU_CMP ? 0x2B : op == ALU_TEST ? 0x23 : alu_opcode[op], H_RAX, b);
        if (modifies(op))
            op_rm(g, size, 0x89, H_RAX, H_RSI, 0);
        if (flags)
            set_flags(g, op, size, H_RAX);
        return true;
    }
    default:
        if (imm != (int32_t)imm)
            return false;
        access(g, u, m->form, size, modifies(op) ? ACCESS_WRITE : ACCESS_READ);
        op_rm(g, size, 0x8B, H_RAX, H_RSI, 0);
        op_imm(g, size, op == ALU_CMP ? 5 : alu_group[op], H_RAX, imm);
        if (modifies(op))
            op_rm(g, size, 0x89, H_RAX, H_RSI, 0);
        if (flags)
            set_flags(g, op, size, H_RAX);
        return true;
    }
}

/* Conditions whose inputs the host's flags have. */
static bool host_condition(const struct gen *g, unsigned cc)
{
    bool carry = (cc >> 1) == 1 || (cc >> 1) == 3;
    return g->host_flags && !(g->pending_keep_cf && carry);
}

/* Host code that puts the stored condition into ZF (set: it does not hold); false: not a simple one. */
static bool stored_condition(struct gen *g, unsigned cc, unsigned *host_cc)
{
    switch (cc) {
    case 4: case 5: /* ZF */
        prefix(g, 3, 0, 0, H_RDI), b1(g, 0x83), memory(g, 7, H_RDI, FIELD(lf[0])), b1(g, 0); /* cmp lf0, 0 */
        *host_cc = cc;
        return true;
    case 2: case 3: /* CF */
        prefix(g, 3, 0, 0, H_RDI), b1(g, 0x83), memory(g, 7, H_RDI, FIELD(lf[1])), b1(g, 0); /* cmp lf1, 0: sign */
        *host_cc = cc == 2 ? 8 : 9;
        return true;
    default: return false;
    }
}

/* False: not translated; nothing was emitted that matters. *ended: it was the block's end. */
static bool translate_uop(struct gen *g, const struct uop *u, const struct meaning *m, bool *ended)
{
    unsigned size = m->size, h, cc;
    g->pinned = 0;
    switch (m->kind) {
    case K_NOP: return true;
    case K_ALU_RR: case K_ALU_RI: case K_ALU_RM: case K_ALU_MR: case K_ALU_MI: return alu(g, u, m);
    case K_UNARY_R:
        if (!ok_reg(u->r0))
            return false;
        settle(g);
        h = reg_of(g, u->r0, true);
        g->dirty[h] = true;
        prefix(g, size, 0, 0, h);
        b1(g, m->op >= UN_NEG ? (size ? 0xF7 : 0xF6) : size ? 0xFF : 0xFE);
        b1(g, 0xC0 | (m->op == UN_INC ? 0 : m->op == UN_DEC ? 1 : m->op == UN_NEG ? 3 : 2) << 3 | (h & 7));
        if (m->flags && !u->aux) {
            result_flags(g, size, h);
            g->pending = g->host_flags = true;
            g->pending_keep_cf = m->op != UN_NEG;
        }
        return true;
    case K_SHIFT:
        if (!ok_reg(u->r0) || u->imm >= 8u << size)
            return false;
        settle(g);
        h = reg_of(g, u->r0, true);
        g->dirty[h] = true;
        prefix(g, size, 0, 0, h);
        b1(g, size ? 0xC1 : 0xC0);
        b1(g, 0xC0u | (m->op == SH_SAL ? SH_SHL : m->op) << 3 | (h & 7));
        b1(g, (uint8_t)u->imm);
        return true;
    case K_IMUL: case K_IMUL_I: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1) || (m->kind == K_IMUL_I && (size == 1 || u->imm != (uint64_t)(int64_t)(int32_t)u->imm)))
            return false;
        settle(g);
        unsigned from = reg_of(g, u->r1, true);
        h = reg_of(g, u->r0, m->kind == K_IMUL || size == 1);
        g->dirty[h] = true;
        if (m->kind == K_IMUL) {
            op_0f_rr(g, size, 0xAF, h, from);
        } else {
            op_rr(g, size, 0x69, h, from);
            b4(g, (uint32_t)u->imm);
        }
        if (!u->aux) {
            b1(g, 0x0F), b1(g, 0x90), b1(g, 0xC0);  /* seto al */
            b1(g, 0x0F), b1(g, 0xB6), b1(g, 0xC0);  /* movzx eax, al */
            prefix(g, 3, 0, 0, H_RAX), b1(g, 0xC1), b1(g, 0xE0), b1(g, 63);
            op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[1]));
        }
        return true;
    }
    case K_MOV_RR: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1))
            return false;
        unsigned from = reg_of(g, u->r1, true);
        h = reg_of(g, u->r0, size < 2);
        g->dirty[h] = true;
        op_rr(g, size, 0x8B, h, from);
        return true;
    }
    case K_MOV_RI:
        if (!ok_reg(u->r0) || size < 2)
            return false;
        h = reg_of(g, u->r0, false);
        g->dirty[h] = true;
        mov_imm64(g, h, size == 2 ? (uint32_t)u->imm : u->imm);
        return true;
    case K_LOAD: case K_LOAD_RIP:
        if (!ok_reg(u->r0))
            return false;
        if (m->kind == K_LOAD) {
            access(g, u, m->form, size, ACCESS_READ);
        } else {
            settle(g);
            rip_address(g, u, H_RSI);
            tlb(g, 1u << size, ACCESS_READ);
        }
        h = reg_of(g, u->r0, size < 2);
        g->dirty[h] = true;
        op_rm(g, size, 0x8B, h, H_RSI, 0);
        return true;
    case K_STORE: case K_STORE_RIP:
        if (!ok_reg(u->r1))
            return false;
        if (m->kind == K_STORE) {
            access(g, u, m->form, size, ACCESS_WRITE);
        } else {
            settle(g);
            rip_address(g, u, H_RSI);
            tlb(g, 1u << size, ACCESS_WRITE);
        }
        op_rm(g, size, 0x89, reg_of(g, u->r1, true), H_RSI, 0);
        return true;
    case K_STORE_I:
        access(g, u, m->form, size, ACCESS_WRITE);
        mov_imm64(g, H_RAX, size == 3 ? u->imm : (uint32_t)u->imm);
        op_rm(g, size, 0x89, H_RAX, H_RSI, 0);
        return true;
    case K_MOVZX: case K_MOVSX: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1))
            return false;
        unsigned from = reg_of(g, u->r1, true);
        h = reg_of(g, u->r0, size == 1);
        g->dirty[h] = true;
        if (m->op == 2)
            op_rr(g, m->kind == K_MOVSX ? 3 : 2, m->kind == K_MOVSX ? 0x63 : 0x8B, h, from);
        else
            op_0f_rr(g, size, (m->kind == K_MOVSX ? 0xBEu : 0xB6u) | m->op, h, from);
        return true;
    }
    case K_MOVZX_M: case K_MOVSX_M:
        if (!ok_reg(u->r0))
            return false;
        access(g, u, m->form, m->op, ACCESS_READ);
        h = reg_of(g, u->r0, size == 1);
        g->dirty[h] = true;
        if (m->op == 2) {
            op_rm(g, m->kind == K_MOVSX_M ? 3 : 2, m->kind == K_MOVSX_M ? 0x63 : 0x8B, h, H_RSI, 0);
        } else {
            prefix(g, size, h, 0, H_RSI);
            b1(g, 0x0F);
            b1(g, (m->kind == K_MOVSX_M ? 0xBEu : 0xB6u) | m->op);
            memory(g, h, H_RSI, 0);
        }
        return true;
    case K_LEA:
        if (!ok_reg(u->r0) || size < 2)
            return false;
        lea_address(g, u, m->form, H_RSI, size);
        h = reg_of(g, u->r0, false);
        g->dirty[h] = true;
        op_rr(g, 3, 0x8B, h, H_RSI);
        return true;
    case K_LEA_RIP:
        if (u->size != 8 || !ok_reg(u->r0))
            return false;
        h = reg_of(g, u->r0, false);
        g->dirty[h] = true;
        rip_address(g, u, h);
        return true;
    case K_EA:
        if (m->op)
            rip_address(g, u, H_RSI);
        else
            lea_address(g, u, m->form, H_RSI, 3);
        h = reg_of(g, OFF_T0, false);
        g->dirty[h] = true;
        op_rr(g, 3, 0x8B, h, H_RSI);
        return true;
    case K_PUSH: case K_PUSH_I:
        if (m->kind == K_PUSH && !ok_reg(u->r1))
            return false;
        settle(g);
        h = reg_of(g, RSP * 8, true);
        op_rm(g, 3, 0x8D, H_RSI, h, -8);
        tlb(g, 8, ACCESS_WRITE);
        if (m->kind == K_PUSH) {
            op_rm(g, 3, 0x89, reg_of(g, u->r1, true), H_RSI, 0);
        } else {
            mov_imm64(g, H_RAX, u->imm);
            op_rm(g, 3, 0x89, H_RAX, H_RSI, 0);
        }
        op_imm(g, 3, 5, h, 8);
        g->dirty[h] = true;
        return true;
    case K_POP:
        if (!ok_reg(u->r0))
            return false;
        settle(g);
        h = reg_of(g, RSP * 8, true);
        op_rr(g, 3, 0x8B, H_RSI, h);
        tlb(g, 8, ACCESS_READ);
        op_imm(g, 3, 0, h, 8);
        g->dirty[h] = true;
        h = reg_of(g, u->r0, false);
        g->dirty[h] = true;
        op_rm(g, 3, 0x8B, h, H_RSI, 0);
        return true;
    case K_CMOV: {
        if (!ok_reg(u->r0) || !ok_reg(u->r1))
            return false;
        unsigned from = reg_of(g, u->r1, true);
        h = reg_of(g, u->r0, true);
        if (host_condition(g, m->op)) {
            cc = m->op;
        } else {
            settle(g);
            if (!stored_condition(g, m->op, &cc))
                return false;
        }
        g->dirty[h] = true;
        op_0f_rr(g, size, 0x40 | cc, h, from);
        return true;
    }
    case K_SETCC:
        if (!ok_reg(u->r0))
            return false;
        h = reg_of(g, u->r0, true);
        if (host_condition(g, m->op)) {
            cc = m->op;
        } else {
            settle(g);
            if (!stored_condition(g, m->op, &cc))
                return false;
        }
        g->dirty[h] = true;
        prefix(g, 2, 0, 0, h), b1(g, 0x0F), b1(g, 0x90 | cc), b1(g, 0xC0 | (h & 7));
        return true;
    case K_BSWAP:
        h = reg_of(g, u->r0, true);
        g->dirty[h] = true;
        prefix(g, size, 0, 0, h), b1(g, 0x0F), b1(g, 0xC8 | (h & 7));
        return true;

    case K_JMP: case K_FALL:
        settle(g);
        go(g, u, m->kind == K_JMP, false);
        *ended = true;
        return true;
    case K_CALL:
        settle(g);
        if (!LINKS((struct uop *)u)->taken) { /* the probe comes before anything is changed */
            add_rip(g, H_RCX, LINKS((struct uop *)u)->delta);
            probe(g);
        }
        h = reg_of(g, RSP * 8, true);
        op_rm(g, 3, 0x8D, H_RSI, h, -8);
        tlb(g, 8, ACCESS_WRITE);
        add_rip(g, H_RAX, u->off + u->len);
        op_rm(g, 3, 0x89, H_RAX, H_RSI, 0);
        op_imm(g, 3, 5, h, 8);
        g->dirty[h] = true;
        if (LINKS((struct uop *)u)->taken) {
            go(g, u, true, false);
        } else {
            int64_t delta = LINKS((struct uop *)u)->delta;
            write_back(g);
            due(g, u, delta, false);
            add_rip(g, H_RDX, delta);
            op_rr(g, 3, 0x8B, H_RAX, H_RDX);
            prefix(g, 3, 0, 0, H_RAX), b1(g, 0xC1), b1(g, 0xE8), b1(g, 12);
            op_rr(g, 2, 0x33, H_RAX, H_RDX);
            op_imm(g, 2, 4, H_RAX, JUMP_SIZE - 1);
            prefix(g, 3, 0, 0, H_RAX), b1(g, 0xC1), b1(g, 0xE0), b1(g, 4);
            op_rm(g, 3, 0x03, H_RAX, H_RDI, FIELD(jumps));
            op_rm(g, 3, 0x8B, H_RSI, H_RAX, 8);
            jump_rsi(g);
        }
        *ended = true;
        return true;
    case K_RET:
        settle(g);
        h = reg_of(g, RSP * 8, true);
        op_rr(g, 3, 0x8B, H_RSI, h);
        tlb(g, 8, ACCESS_READ);
        op_rm(g, 3, 0x8B, H_RCX, H_RSI, 0);
        probe(g);
        op_imm(g, 3, 0, h, (int64_t)(8 + u->imm));
        g->dirty[h] = true;
        write_back(g);
        op_rr(g, 3, 0x8B, H_RDX, H_RCX);
        due(g, u, 0, false);
        op_rm(g, 3, 0x8B, H_RSI, H_RAX, 8);
        jump_rsi(g);
        *ended = true;
        return true;
    case K_JCC: case K_FUSED_RR: case K_FUSED_RI: {
        struct uop_links *l = LINKS((struct uop *)u);
        bool fused = m->kind != K_JCC, pending = false, keep_cf = g->pending_keep_cf;
        cc = m->op & 15;
        if (fused) {
            if (!ok_reg(u->r0) || (m->kind == K_FUSED_RR && !ok_reg(u->r1)) ||
                (m->kind == K_FUSED_RI && size == 3 && u->imm != (uint64_t)(int64_t)(int32_t)u->imm))
                return false;
            settle(g);
            /* Both paths start from the same registers. */
            reg_of(g, u->r0, true);
            if (m->kind == K_FUSED_RR)
                reg_of(g, u->r1, true);
            write_back(g);
            compare_op(g, u, m);
        } else if (host_condition(g, cc)) {
            pending = g->pending;
            write_back(g);
            g->pending = g->host_flags = false;
        } else {
            settle(g);
            write_back(g);
            if (!stored_condition(g, cc, &cc))
                return false;
        }
        b1(g, 0x0F), b1(g, 0x80 | cc);
        uint8_t *patch = g->p;
        b4(g, 0);
        for (unsigned taken = 0; taken < 2; taken++) {
            bool dead = fused && flags_dead_at(taken ? l->taken : l->next);
            if (taken && !g->failed) {
                uint32_t distance = (uint32_t)(g->p - patch - 4);
                memcpy(patch, &distance, 4);
            }
            if (pending)
                store_carries(g, keep_cf);
            if (fused && !dead)
                compare_flags(g, u, m);
            go(g, u, taken, dead);
        }
        *ended = true;
        return true;
    }
    default: return false;
    }
}

static void emit_stubs(struct gen *g, const uop_fn *fns)
{
    for (unsigned i = 0; i < g->stub_count && !g->failed; i++) {
        const struct stub *s = &g->stubs[i];
        uint32_t distance = (uint32_t)(g->p - g->start) - s->at - 4;
        memcpy(g->start + s->at, &distance, 4);
        for (unsigned k = 0; k < s->dirty_count; k++)
            op_rm(g, 3, 0x89, s->dirty[k].host, H_RDI, s->dirty[k].guest * 8);
        if (s->leave) {
            if (s->fused) {
                /* Registers were written back before the comparison: take the operands from there. */
                forget(g);
                g->pinned = 0;
                compare_flags(g, &g->code[s->uop], meaning(fns[s->uop]));
            }
            add_rip(g, H_RAX, s->delta);
            op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(rip));
            b1(g, 0xC3);
        } else {
            mov_imm64(g, H_RSI, (uint64_t)(uintptr_t)&g->code[s->uop]);
            mov_imm64(g, H_RAX, (uint64_t)(uintptr_t)fns[s->uop]);
            b1(g, 0xFF), b1(g, 0xE0); /* jmp rax */
        }
    }
}

struct host_code {
    uint8_t *base;
    size_t used;
};

struct host_code *host_code_create(void)
{
    static struct host_code none;
#ifdef __SANITIZE_ADDRESS__
    return &none; /* handlers call each other there, and so need the callee-saved registers */
#endif
    if (!meanings[meaning_hash(nop)].fn)
        learn();
    struct host_code *code = malloc(sizeof *code);
    if (!code)
        return &none;
    code->used = 0;
    code->base = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (code->base == MAP_FAILED) {
        free(code);
        return &none;
    }
    return code;
}
void host_code_destroy(struct host_code *code)
{
    if (code->base) {
        munmap(code->base, CODE_SIZE);
        free(code);
    }
}
void host_code_reset(struct host_code *code) { code->used = 0; }

/* Replace the runs of known micro-ops of a block by host code. True: it did, or there is nothing to do; false: no room. */
bool host_code_translate(struct host_code *code, struct block *k)
{
    static __thread struct gen gen;
    static __thread uop_fn fns[BLOCK_MAX_UOPS + 2];
    struct gen *g = &gen;
    if (!code->base)
        return true;
    unsigned last = k->links ? (unsigned)((struct uop *)k->links - k->code) : k->count;
    for (unsigned i = 0; i < last; i++)
        fns[i] = i ? k->code[i].fn : k->first;
    for (unsigned i = 0; i < last;) {
        if (meaning(fns[i])->kind == K_NONE) {
            i++;
            continue;
        }
        if (CODE_SIZE - code->used < RUN_MAX)
            return false;
        g->start = g->p = code->base + code->used;
        g->end = g->start + RUN_MAX;
        g->code = k->code;
        g->stub_count = 0;
        g->failed = g->pending = g->host_flags = false;
        g->clock = 0;
        forget(g);
        bool ended = false;
        unsigned from = i;
        while (i < last && !ended) {
            const struct meaning *m = meaning(fns[i]);
            g->uop = i;
            if (m->kind == K_NONE || !translate_uop(g, &k->code[i], m, &ended))
                break;
            i++;
        }
        if (!ended) {
            settle(g);
            write_back(g);
            mov_imm64(g, H_RSI, (uint64_t)(uintptr_t)&k->code[i]);
            mov_imm64(g, H_RAX, (uint64_t)(uintptr_t)fns[i]);
            b1(g, 0xFF), b1(g, 0xE0);
        }
        emit_stubs(g, fns);
        if (!g->failed && i > from) {
            k->code[from].fn = (uop_fn)(uintptr_t)g->start;
            code->used += ((size_t)(g->p - g->start) + 15) & ~(size_t)15;
        }
        if (i == from)
            i++;
    }
    return true;
}

/* Call u->fn(c, u, rip) with the host's callee-saved registers saved: translations do not preserve them. */
__asm__(".text\n"
        ".globl host_enter\n"
        ".hidden host_enter\n"
        ".type host_enter, @function\n"
        "host_enter:\n"
        "\tpush %rbx\n\tpush %rbp\n\tpush %r12\n\tpush %r13\n\tpush %r14\n\tpush %r15\n\tsub $8, %rsp\n"
        "\tcall *(%rsi)\n"
        "\tadd $8, %rsp\n\tpop %r15\n\tpop %r14\n\tpop %r13\n\tpop %r12\n\tpop %rbp\n\tpop %rbx\n\tret\n"
        ".size host_enter, .-host_enter\n");
