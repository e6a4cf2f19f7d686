/* Arithmetic flags in host code: where the guest's are kept, and how they go from one place to another.
 *
 * Up to three places hold them at once: the host's own flags (g->in_host), a word in the vCPU that LAHF and SETO made
 * (g->in_word), and the lazy flags that handlers know (g->in_lazy). An operation leaves them in the host's flags alone.
 * Before those are lost they go to the word, by three instructions; only handlers need the lazy ones. Where the way to them
 * is cold (a stub) a function makes them of the word. AF is the host's, or (g->af) known when translating: logic and shifts
 * leave it undefined on the host. In the word it is right.
 *
 * Most blocks read no flags of others, but may fault before they set their own. They have two entries: where the flags are
 * lazy (uop.fn; the word then gets a mark that says so), and where they are in the word, if it has not that mark
 * (block.word_fn, behind the storing of the mark). Every block ends with such a way, unless it knows more of its successor.
 */
#include "soft/mmu/access.h"
#include "soft/jit/emitters.h"
#include "soft/jit/translate.h"

/* The word: LAHF's byte above, OF below. */
enum { WORD_OF = 1, WORD_SHIFT = 8, WORD_IS_LAZY = 0xFFFF };

static void make_lazy(struct soft_vcpu *c)
{
    unsigned word = c->host_flags;
    if (word != WORD_IS_LAZY)
        flags_set_arith(c, (word >> WORD_SHIFT & (F_CF | F_PF | F_AF | F_ZF | F_SF)) | (word & WORD_OF ? F_OF : 0));
}
void host_flags_resume(struct soft_vcpu *c, struct uop *u, uint64_t rip, uop_fn next)
{
    make_lazy(c);
    return next(c, u, rip);
}
void host_flags_leave(struct soft_vcpu *c) { make_lazy(c); }
void host_flags_enter(struct soft_vcpu *c, struct uop *u, uint64_t rip)
{
    make_lazy(c);
    return u->fn(c, u, rip);
}

/* Whether a block reads flags of those before it, as host code does; all else takes what is in the word. */
static enum flags_entry entry_of(struct block *b)
{
    const uint16_t *ops = block_ops(b);
    if (!b->flags_in)
        return ENTRY_DEAD;
    if (!op_emitter(ops[0]))
        return ENTRY_LAZY;
    for (unsigned i = 0; i < b->count; i++) {
        const struct uop *u = &b->code[i];
        struct variant v = op_variant(ops[i]);
        if ((b->linked && i + 1u == b->count) || !op_emitter(ops[i]))
            return ENTRY_WORD;
        switch (op_family(ops[i])) {
        case FAMILY_alu_rr: case FAMILY_alu_ri: case FAMILY_alu_rm: case FAMILY_alu_mr: case FAMILY_alu_mi:
            return v.op == ALU_ADC || v.op == ALU_SBB ? ENTRY_LAZY : ENTRY_WORD;
        case FAMILY_unary_r: case FAMILY_unary_m:
            if (v.op == UN_NEG)
                return ENTRY_WORD;
            if (v.op != UN_NOT && v.flags && !u->aux)
                return ENTRY_LAZY;
            break;
        case FAMILY_shift_ri: return v.flags && v.op < SH_SHL ? ENTRY_LAZY : ENTRY_WORD;
        case FAMILY_fused_rr: case FAMILY_fused_ri: case FAMILY_cmpxchg_m: case FAMILY_shift_rc: return ENTRY_WORD;
        case FAMILY_imul_rr: case FAMILY_imul_rri: case FAMILY_lzcnt:
        case FAMILY_jcc_rel: case FAMILY_cmov_rr: case FAMILY_setcc_r: return ENTRY_LAZY;
        default: break;
        }
    }
    return ENTRY_WORD;
}
enum flags_entry gen_flags_entry(struct block *b)
{
    if (!b)
        return ENTRY_WORD;
    if (b->flags_entry == ENTRY_UNKNOWN)
        b->flags_entry = (uint8_t)entry_of(b);
    return (enum flags_entry)b->flags_entry;
}

void gen_new_flags(struct gen *g, enum af af)
{
    g->in_host = true;
    g->in_word = g->in_lazy = g->result_lazy = g->unknown = false;
    g->af = (uint8_t)af;
}
void gen_no_flags(struct gen *g)
{
    g->in_host = g->in_word = g->unknown = false;
    g->in_lazy = true;
}

/* lf[0] from the result in a register; keeps the host's flags. Uses RAX. */
void gen_result_flags(struct gen *g, unsigned size, unsigned h)
{
    if (size == 3) {
        gen_op_rm(g, 3, 0x89, h, H_RDI, FIELD(lf[0]));
    } else {
        gen_movsx64(g, size, H_RAX, h);
        gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[0]));
    }
}
void gen_store_field(struct gen *g, int32_t field, uint32_t v)
{
    gen_prefix(g, 3, 0, 0, H_RDI);
    gen_b1(g, 0xC7);
    gen_memory(g, 0, H_RDI, field);
    gen_b4(g, v);
}

/* shl or shr h, n */
static void shift(struct gen *g, unsigned size, bool left, unsigned h, unsigned n)
{
    gen_prefix(g, size, 0, 0, h), gen_b1(g, 0xC1), gen_b1(g, 0xC0u | (left ? 4 : 5) << 3 | (h & 7)), gen_b1(g, n);
}
static void seto_al(struct gen *g) { gen_b1(g, 0x0F), gen_b1(g, 0x90), gen_b1(g, 0xC0); }

/* And LAHF's byte to AH. */
void gen_lazy_carries(struct gen *g)
{
    gen_b1(g, 0x9F);                                   /* lahf */
    gen_b1(g, 0x0F), gen_b1(g, 0x90), gen_b1(g, 0xC1); /* seto cl */
    gen_op_rr(g, 3, 0x1B, H_RSI, H_RSI);               /* sbb rsi, rsi */
    gen_b1(g, 0x0F), gen_b1(g, 0xB6), gen_b1(g, 0xC9); /* movzx ecx, cl */
    shift(g, 3, true, H_RCX, 62);
    gen_op_rr(g, 3, 0x33, H_RCX, H_RSI);
    gen_op_rm(g, 3, 0x89, H_RCX, H_RDI, FIELD(lf[1]));
}
/* lf[2] of AF alone, from AH. */
static void store_adjust(struct gen *g, unsigned af)
{
    if (af != AF_HOST) {
        gen_store_field(g, FIELD(lf[2]), af == AF_SET ? 8 : 0);
        return;
    }
    gen_b1(g, 0x0F), gen_b1(g, 0xB6), gen_b1(g, 0xC4); /* movzx eax, ah */
    gen_b1(g, 0xD1), gen_b1(g, 0xE8);                  /* shr eax, 1: AF to bit 3 */
    gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[2]));
}
void gen_compare_flags(struct gen *g, unsigned size, unsigned h)
{
    gen_result_flags(g, size, h);
    gen_lazy_carries(g);
    store_adjust(g, AF_HOST);
}

/* lf[0] and lf[2] from AH, as flags_set_arith() makes them: SF 7, ZF 6, AF 4, PF 2. */
static void store_from_ah(struct gen *g, unsigned af)
{
    gen_b1(g, 0x0F), gen_b1(g, 0xB6), gen_b1(g, 0xC4); /* movzx eax, ah */
    gen_op_rr(g, 2, 0x8B, H_RCX, H_RAX);
    gen_op_imm(g, 2, 6, H_RCX, 0x40);
    gen_op_imm(g, 2, 4, H_RCX, 0x40);                  /* not ZF */
    gen_op_rm(g, 3, 0x89, H_RCX, H_RDI, FIELD(lf[0]));
    gen_op_rr(g, 2, 0x8B, H_RCX, H_RAX);
    shift(g, 2, true, H_RCX, 4);
    gen_op_rr(g, 2, 0x33, H_RCX, H_RAX);
    gen_op_imm(g, 2, 4, H_RCX, 0x40);                  /* PF differs from ZF: bit 8 */
    shift(g, 2, true, H_RCX, 2);
    gen_op_rr(g, 2, 0x8B, H_RSI, H_RAX);
    shift(g, 2, false, H_RSI, 7);
    shift(g, 3, true, H_RSI, 63);
    gen_op_rr(g, 3, 0x0B, H_RCX, H_RSI);               /* SF: bit 63 */
    if (af == AF_HOST) {
        shift(g, 2, false, H_RAX, 1);
        gen_op_imm(g, 2, 4, H_RAX, 8);
        gen_op_rr(g, 3, 0x0B, H_RCX, H_RAX);
    } else if (af == AF_SET) {
        gen_op_imm(g, 3, 1, H_RCX, 8);
    }
    gen_op_rm(g, 3, 0x89, H_RCX, H_RDI, FIELD(lf[2]));
}

static void to_word(struct gen *g)
{
    gen_b1(g, 0x9F); /* lahf */
    seto_al(g);
    if (g->af == AF_CLEAR)
        gen_b1(g, 0x80), gen_b1(g, 0xE4), gen_b1(g, 0xEF); /* and ah, ~10h */
    else if (g->af == AF_SET)
        gen_b1(g, 0x80), gen_b1(g, 0xCC), gen_b1(g, 0x10); /* or ah, 10h */
    gen_op_rm(g, 1, 0x89, H_RAX, H_RDI, FIELD(host_flags));
    g->in_word = true;
}
void gen_clobber(struct gen *g)
{
    if (g->in_host && !g->in_word && !g->in_lazy)
        to_word(g);
    g->in_host = false;
}
void gen_mark_lazy(struct gen *g)
{
    gen_b1(g, 0x66), gen_b1(g, 0xC7), gen_memory(g, 0, H_RDI, FIELD(host_flags)), gen_b1(g, 0xFF), gen_b1(g, 0xFF); /* mov */
}
void gen_flags_for(struct gen *g, const struct uop *to)
{
    switch (gen_flags_entry(gen_block_of(to))) {
    case ENTRY_DEAD: gen_clobber(g); break;
    case ENTRY_LAZY: gen_settle(g); break;
    default:
        if (g->in_host && !g->in_word)
            to_word(g);
        else if (!g->in_word)
            gen_mark_lazy(g);
        g->in_word = true;
        g->in_host = g->in_lazy = false;
    }
}
bool gen_flags_to_host(struct gen *g)
{
    if (g->in_host)
        return true;
    if (!g->in_word)
        return false;
    g->failed |= g->unknown; /* gen_flags_entry() is wrong */
    g->af = AF_HOST;
    gen_prefix(g, 2, H_RAX, 0, H_RDI), gen_b1(g, 0x0F), gen_b1(g, 0xB7), gen_memory(g, H_RAX, H_RDI, FIELD(host_flags)); /* movzx */
    gen_b1(g, 0x04), gen_b1(g, 0x7F); /* add al, 127: OF */
    gen_b1(g, 0x9E);                  /* sahf */
    return g->in_host = true;
}
void gen_settle(struct gen *g)
{
    if (!g->in_lazy && gen_flags_to_host(g)) {
        gen_lazy_carries(g);
        if (g->result_lazy)
            store_adjust(g, g->af);
        else
            store_from_ah(g, g->af);
        g->in_lazy = true;
    }
    g->in_host = g->in_word = g->unknown = false;
}
/* bt [field], bit */
static void bit_to_carry(struct gen *g, unsigned size, int32_t field, unsigned bit)
{
    gen_prefix(g, size, 0, 0, H_RDI), gen_b1(g, 0x0F), gen_b1(g, 0xBA), gen_memory(g, 4, H_RDI, field), gen_b1(g, bit);
}
void gen_carry_to_host(struct gen *g)
{
    if (g->in_host)
        return;
    g->failed |= g->unknown;
    if (g->in_word)
        bit_to_carry(g, 1, FIELD(host_flags), WORD_SHIFT);
    else
        bit_to_carry(g, 3, FIELD(lf[1]), 63);
}
void gen_carry_and_overflow(struct gen *g)
{
    g->failed |= g->unknown;
    seto_al(g);
    if (g->in_word) {
        gen_op_rm(g, 0, 0x8B, H_RCX, H_RDI, FIELD(host_flags) + 1);
        gen_op_rm(g, 0, 0x89, H_RAX, H_RDI, FIELD(host_flags));
        gen_op_imm(g, 0, 4, H_RCX, ~F_CF);
        gen_op_rr(g, 0, 0x0B, H_RCX, H_RAX);
        gen_op_rm(g, 0, 0x89, H_RCX, H_RDI, FIELD(host_flags) + 1);
    }
    if (g->in_lazy) {
        gen_b1(g, 0x0F), gen_b1(g, 0xB6), gen_b1(g, 0xC0); /* movzx eax, al */
        shift(g, 3, true, H_RAX, 63);
        gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(lf[1]));
    }
    g->in_host = false;
}
