/* Host code for hot blocks.
 *
 * A run of micro-ops that are known here becomes one piece of host code that the run's first micro-op has as its `fn`;
 * the others of the block keep their handlers. Within a run guest registers live in host registers. Whatever is out of
 * the ordinary (a TLB miss, an unknown successor) writes them back and goes on in the interpreter with the micro-op
 * concerned, so this file knows nothing of faults, devices or modes; a block that is invalid is so for both.
 *
 * Callee-saved host registers are saved once, by host_enter(). Without memory for code (translate_memory.c)
 * there are no translations. emit_*.c say what a micro-op becomes, with what translate_gen.c
 * makes.
 */
#include <string.h>

#include "soft/jit/emitters.h"
#include "soft/jit/translate.h"
#include "soft/jit/translate_memory.h"

/* ---- the translator's column ---- */

EMITTER(none) { return false; }

static const emitter emitters[FAMILIES] = {
#define OPERATION(name, operators, sizes, flags, forms, emitter) emit_##emitter,
#include "soft/ops/table.h"
};
emitter op_emitter(unsigned op)
{
    emitter e = emitters[op_family(op)];
    return e == emit_none ? NULL : e;
}

/* ---- blocks ---- */

/* The block's address in RDX, micro-op in RSI, on with its handler. flags: as in a stub. */
static void to_handler(struct gen *g, struct block *k, unsigned uop, bool flags)
{
    gen_mov_imm64(g, H_RSI, (uint64_t)(uintptr_t)&k->code[uop]);
    gen_mov_imm64(g, flags ? H_RCX : H_RAX, (uint64_t)(uintptr_t)op_handler(block_ops(k)[uop]));
    if (g->bias)
        gen_add_rip(g, H_RDX, 0);
    if (flags)
        gen_mov_imm64(g, H_RAX, (uint64_t)(uintptr_t)host_flags_resume);
    gen_b1(g, 0xFF), gen_b1(g, 0xE0); /* jmp rax */
}
/* YMM registers go to memory by a function, one for each set of them, since stubs are many. */
struct writer {
    uint8_t *at;
    uint16_t dirty;
};
enum { WRITERS = 16 };
static uint8_t *vector_writer(struct gen *g, struct writer writers[WRITERS], unsigned *count, uint16_t dirty)
{
    for (unsigned i = 0; i < *count; i++)
        if (writers[i].dirty == dirty)
            return writers[i].at;
    uint8_t *at = g->p;
    gen_vectors_store(g, dirty);
    gen_vectors_leave(g);
    gen_b1(g, 0xC3);
    if (*count < WRITERS)
        writers[(*count)++] = (struct writer){at, dirty};
    return at;
}
/* What stubs end with stands once for several of them, since it is as long as all else in them. */
struct tail {
    uint8_t *at; /* NULL: none yet */
    const struct block *block;
};
struct tails {
    struct tail handlers[2], leave[2]; /* by `flags` of their stubs */
};
/* To what was made before. */
static void jump_back(struct gen *g, const uint8_t *to)
{
    ptrdiff_t distance = to - g->p - 2;
    if (distance == (int8_t)distance) {
        gen_b1(g, 0xEB), gen_b1(g, (uint8_t)distance);
    } else {
        gen_b1(g, 0xE9);
        gen_b4(g, (uint32_t)(distance - 3));
    }
}
/* On with the handler that a micro-op has as its `fn`: all but the first of a run. */
static void stub_to_handler(struct gen *g, const struct stub *s, unsigned from, struct tails *tails)
{
    struct tail *t = &tails->handlers[s->flags];
    if (s->uop == 0 || (s->block == g->head && s->uop == from)) {
        to_handler(g, s->block, s->uop, s->flags);
        return;
    }
    gen_b1(g, 0xB8 | H_RCX), gen_b4(g, s->uop * (uint32_t)sizeof(struct uop)); /* mov ecx */
    if (t->at && t->block == s->block) {
        jump_back(g, t->at);
        return;
    }
    *t = (struct tail){g->p, s->block};
    gen_mov_imm64(g, H_RSI, (uint64_t)(uintptr_t)s->block->code);
    gen_op_rr(g, 3, 0x03, H_RSI, H_RCX);
    if (g->bias)
        gen_add_rip(g, H_RDX, 0);
    if (s->flags) {
        gen_mov_imm64(g, H_RAX, (uint64_t)(uintptr_t)host_flags_enter);
        gen_b1(g, 0xFF), gen_b1(g, 0xE0); /* jmp rax */
    } else {
        gen_b1(g, 0xFF), gen_b1(g, 0x26); /* jmp [rsi] */
    }
}
/* Out of host code: the next instruction's address is in RAX. */
static void stub_leave(struct gen *g, const struct stub *s, struct tails *tails)
{
    struct tail *t = &tails->leave[s->flags];
    if (t->at) {
        jump_back(g, t->at);
        return;
    }
    t->at = g->p;
    gen_op_rm(g, 3, 0x89, H_RAX, H_RDI, FIELD(rip));
    if (s->flags) {
        gen_mov_imm64(g, H_RAX, (uint64_t)(uintptr_t)host_flags_leave);
        gen_b1(g, 0xFF), gen_b1(g, 0xE0);
    } else {
        gen_b1(g, 0xC3);
    }
}
/* Whether two stubs are the same code, as those of a budget and of attention are. */
static bool same(const struct stub *a, const struct stub *b)
{
    return a->leave && b->leave && a->block == b->block && a->uop == b->uop && a->delta == b->delta && a->fused == b->fused &&
           a->flags == b->flags && a->vectors == b->vectors && a->vectors_dirty == b->vectors_dirty &&
           a->dirty_count == b->dirty_count && !memcmp(a->dirty, b->dirty, a->dirty_count * sizeof a->dirty[0]);
}
static void emit_stubs(struct gen *g, unsigned from)
{
    struct writer writers[WRITERS];
    struct tails tails = {0};
    unsigned writer_count = 0;
    const uint8_t *last = g->p;
    for (unsigned i = 0; i < g->stub_count && !g->failed; i++) {
        const struct stub *s = &g->stubs[i];
        bool again = i && same(s, s - 1);
        const uint8_t *writer = s->vectors && !again ? vector_writer(g, writers, &writer_count, s->vectors_dirty) : NULL;
        if (!again)
            last = g->p;
        uint32_t distance = (uint32_t)(last - (g->start + s->at + 4));
        memcpy(g->start + s->at, &distance, 4);
        if (again)
            continue;
        g->bias = s->bias;
        if (writer) {
            gen_b1(g, 0xE8); /* call */
            gen_b4(g, (uint32_t)(writer - g->p - 4));
        }
        for (unsigned k = 0; k < s->dirty_count; k++)
            gen_op_rm(g, 3, 0x89, s->dirty[k].host, H_RDI, s->dirty[k].guest * 8);
        if (!s->leave) {
            stub_to_handler(g, s, from, &tails);
            continue;
        }
        if (s->fused) {
            /* Take the operands from where registers were just written back to. */
            gen_forget(g);
            g->pinned = 0;
            emit_compare_flags(g, &s->block->code[s->uop], block_ops(s->block)[s->uop]);
        }
        gen_add_rip(g, H_RAX, s->delta);
        stub_leave(g, s, &tails);
    }
}

/* Micro-ops of a block that are known, from one on, up to its end or the first that is not; which that is. */
static unsigned emit_run(struct gen *g, struct block *k, int64_t bias, unsigned from)
{
    unsigned i = from, last = k->linked ? k->count - 1u : k->count;
    g->block = k;
    g->bias = bias;
    g->code = k->code;
    g->ops = block_ops(k);
    g->count = last;
    g->from_start = from == 0;
    g->ended = false;
    gen_no_flags(g);
    gen_windows_forget(g);
    if (from == 0 && gen_flags_entry(k) == ENTRY_WORD) {
        g->in_word = g->unknown = true;
        g->in_lazy = false;
    }
    while (i < last && !g->ended) {
        emitter emit = op_emitter(g->ops[i]);
        g->uop = i;
        g->pinned = 0;
        if (!emit || !emit(g, &k->code[i], op_variant(g->ops[i])))
            break;
        gen_windows_follow(g, &k->code[i], g->ops[i]);
        i++;
    }
    if (!g->ended) {
        bool unknown = g->unknown;
        if (!unknown)
            gen_settle(g);
        gen_write_back(g);
        to_handler(g, k, i, unknown);
    }
    return i;
}

/* Write from a piece's next byte on. */
static uint8_t *begin_in(struct gen *g, const struct host_code *code, const struct host_piece *piece)
{
    size_t most = piece->end - piece->at;
    g->p = code->base + piece->at;
    g->end = g->p + (most < RUN_MAX ? most : RUN_MAX);
    return g->p;
}

/* Host code for a run of a block, with the loop that the block begins. Returns as emit_run(); *word: the second entry; *hot,
 * *cold: bytes of it, and of its stubs. */
static unsigned make_run(struct gen *g, const struct host_code *code, struct block *k, unsigned from, bool loop, uint8_t **word,
                         size_t *hot, size_t *cold)
{
    struct block *next;
    g->start = begin_in(g, code, &code->hot);
    g->head = k;
    g->runs = (uintptr_t)code->runs;
    g->runs_size = code->used;
    g->runs_start = g->runs + code->hot.at;
    g->stub_count = g->loop_count = g->label_count = g->jump_count = 0;
    g->failed = false;
    g->clock = 0;
    gen_forget(g);
    if (loop)
        gen_find_loop(g, k);
    if (g->loop_count)
        g->labels[g->label_count++] = (struct label){k, NULL, g->r};
    if (from == 0 && gen_flags_entry(k) == ENTRY_WORD)
        gen_mark_lazy(g);
    g->labels[0].at = *word = g->p;
    unsigned end = emit_run(g, k, 0, from);
    while ((next = gen_loop_next(g)))
        emit_run(g, next, next->host - k->host, 0);
    *hot = (size_t)(g->p - g->start);
    const uint8_t *stubs = begin_in(g, code, &code->cold);
    emit_stubs(g, from);
    *cold = (size_t)(g->p - stubs);
    return end;
}

/* Replace the runs of known micro-ops of a block by host code. True: it did, or there is nothing to do; false: no room. */
bool host_code_translate(struct host_code *code, struct block *k, uint64_t linear)
{
    static __thread struct gen gen;
    struct gen *g = &gen;
    if (!code->base)
        return true;
    const uint16_t *ops = block_ops(k);
    unsigned last = k->linked ? k->count - 1u : k->count;
    for (unsigned i = 0; i < last;) {
        if (!op_emitter(ops[i])) {
            i++;
            continue;
        }
        unsigned from = i;
        uint8_t *word;
        g->linear = linear;
        size_t hot, cold;
        for (bool loop = from == 0;;) {
            i = make_run(g, code, k, from, loop, &word, &hot, &cold);
            if (!g->failed)
                break;
            /* Perhaps for want of room: not in a new piece. */
            struct host_piece *small = code->hot.end - code->hot.at < RUN_MAX ? &code->hot
                                       : code->cold.end - code->cold.at < RUN_MAX ? &code->cold : NULL;
            if (small && !host_code_next_piece(code, small))
                return false;
            if (!small && !(loop && g->label_count))
                break;
            loop &= small != NULL;
        }
        if (!g->failed && i > from) {
            k->code[from].fn = (uop_fn)(uintptr_t)(code->runs + (g->start - code->base));
            if (from == 0 && gen_flags_entry(k) != ENTRY_LAZY)
                k->word_fn = (uop_fn)(uintptr_t)(code->runs + (word - code->base));
            code->hot.at += (hot + 15) & ~(size_t)15;
            code->cold.at += cold;
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
