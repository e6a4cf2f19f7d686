/* Loops: several blocks of a page as one piece of host code, between which guest registers stay in host registers.
 *
 * The block that gets hot is the head. It is made as any other, entered with all registers in memory; on the way to a block
 * of the loop (the head again, in the end) registers stay where they are, and the block is made as it is entered then. A
 * later way to the same block brings registers to where that one expects them. RDX stays the head's address.
 *
 * The host code reads no links: they change only when blocks of the page are made or die, which this thread does itself, and
 * not while it is in host code. Every way back looks for attention; ways forward charge the budget alone.
 */
#include "soft/jit/emitters.h"
#include "soft/jit/translate.h"

enum { WARM = (SOFT_HOT + 1) / 2 }; /* entries of a block that goes into a loop */

/* The successor that a block may be joined with, or NULL. */
static struct block *joined(const struct block *head, const struct uop *to)
{
    struct block *b = gen_block_of(to);
    return b && b->mode == head->mode && b->entered >= WARM && !b->host2 && !b->stops ? b : NULL;
}
static bool whole(struct block *b)
{
    const uint16_t *ops = block_ops(b);
    for (unsigned i = 0; i + 1u < b->count; i++)
        if (!op_emitter(ops[i]))
            return false;
    return b->linked;
}
static int find(const struct gen *g, const struct block *b)
{
    for (unsigned i = 0; i < g->loop_count; i++)
        if (g->loop[i] == b)
            return (int)i;
    return -1;
}

void gen_find_loop(struct gen *g, struct block *head)
{
    bool back[LABELS] = {0}, more = true;
    struct block *next[LABELS][2];
    g->loop_count = g->label_count = g->jump_count = 0;
    if (head->in_loop || head->host2 || !whole(head))
        return;
    g->loop[g->loop_count++] = head;
    for (unsigned i = 0; i < g->loop_count; i++) {
        struct uop_links *l = block_links(g->loop[i]);
        for (unsigned k = 0; k < 2; k++) {
            struct block *b = next[i][k] = joined(head, k ? l->taken : l->next);
            if (b && find(g, b) < 0 && g->loop_count < LABELS / 2 && whole(b))
                g->loop[g->loop_count++] = b;
        }
    }
    while (more) { /* those from which the head is reached */
        more = false;
        for (unsigned i = 0; i < g->loop_count; i++)
            for (unsigned k = 0; k < 2 && !back[i]; k++) {
                int to = next[i][k] ? find(g, next[i][k]) : -1;
                if (to == 0 || (to > 0 && back[to]))
                    back[i] = more = true;
            }
    }
    unsigned kept = 0, count = g->loop_count;
    for (unsigned i = 0; i < count; i++)
        if (back[0] && back[i])
            g->loop[kept++] = g->loop[i];
    g->loop_count = kept;
    for (unsigned i = 1; i < kept; i++)
        g->loop[i]->in_loop = true; /* no loop of its own when it gets hot: whoever enters it comes to the head */
}

static bool holds_any(const struct gen *g)
{
    if (g->r.vectors)
        return true;
    for (unsigned h = 0; h < 16; h++)
        if (g->r.holds[h] >= 0)
            return true;
    return false;
}
static int find_label(const struct gen *g, const struct block *b)
{
    for (unsigned i = holds_any(g) ? 1 : 0; i < g->label_count; i++) /* the first expects all in memory */
        if (g->labels[i].block == b)
            return (int)i;
    return -1;
}
bool gen_in_loop(const struct gen *g, const struct uop *to)
{
    if (!to || !g->loop_count || find(g, gen_block_of(to)) < 0 || g->jump_count == JUMPS)
        return false;
    return find_label(g, gen_block_of(to)) >= 0 ||
           (g->label_count < LABELS && g->stub_count < STUBS / 2 && g->p - g->start < RUN_MAX / 2);
}

/* Registers where the label expects them. A register that the label takes for changed (dirty) may be unchanged; one that is
 * changed, and that the label takes for unchanged, is written to memory here. */
static void reconcile(struct gen *g, const struct registers *to)
{
    uint16_t pending = 0; /* host registers that get another one's value */
    for (unsigned h = 0; h < 16; h++) {
        int guest = g->r.holds[h];
        if (guest < 0)
            continue;
        int there = to->where[guest];
        if (g->r.dirty[h] && (there < 0 || !to->dirty[there]))
            gen_op_rm(g, 3, 0x89, h, H_RDI, guest * 8);
        if (there >= 0 && there != (int)h)
            pending |= (uint16_t)(1u << there);
    }
    while (pending) {
        bool moved = false;
        for (unsigned h = 0; h < 16; h++) {
            if (!(pending >> h & 1))
                continue;
            int from = g->r.where[(unsigned)to->holds[h]], own = g->r.holds[h];
            /* Not while its own value still has to go elsewhere. */
            if (own >= 0 && to->where[own] >= 0 && pending >> to->where[own] & 1 && to->where[own] != (int)h)
                continue;
            gen_op_rr(g, 3, 0x8B, h, (unsigned)from);
            pending &= (uint16_t)~(1u << h);
            moved = true;
        }
        if (!moved) { /* a ring: exchange two, of which one is right then */
            unsigned h = (unsigned)__builtin_ctz(pending);
            int guest = to->holds[h], other = g->r.holds[h];
            unsigned from = (unsigned)g->r.where[guest];
            gen_op_rr(g, 3, 0x87, h, from);
            g->r.holds[h] = (int8_t)guest, g->r.where[guest] = (int8_t)h;
            g->r.holds[from] = (int8_t)other, g->r.where[other] = (int8_t)from;
            pending &= (uint16_t)~(1u << h);
            if (to->where[other] == (int)from)
                pending &= (uint16_t)~(1u << from);
        }
    }
    for (unsigned h = 0; h < 16; h++)
        if (to->holds[h] >= 0 && g->r.where[to->holds[h]] < 0)
            gen_op_rm(g, 3, 0x8B, h, H_RDI, to->holds[h] * 8);
    gen_vectors_store(g, g->r.vectors_dirty & ~to->vectors_dirty);
    gen_vectors_load(g, to->vectors & ~g->r.vectors);
}

void gen_loop_edge(struct gen *g, const struct uop *u, struct uop *to, int64_t delta, bool fused)
{
    struct block *b = gen_block_of(to);
    int label = find_label(g, b);
    if (label >= 0 && g->labels[label].at)
        gen_due(g, u, delta, fused);
    else
        gen_budget(g, u, delta, fused);
    if (label >= 0) {
        reconcile(g, &g->labels[label].registers);
    } else {
        label = (int)g->label_count++;
        g->labels[label] = (struct label){b, NULL, g->r};
    }
    gen_b1(g, 0xE9);
    g->jumps[g->jump_count].at = g->p;
    g->jumps[g->jump_count++].label = (uint8_t)label;
    gen_b4(g, 0);
}

struct block *gen_loop_next(struct gen *g)
{
    for (unsigned i = g->label_count; i-- > 0;) {
        struct label *l = &g->labels[i];
        if (l->at)
            continue;
        if (!g->failed && g->jump_count && g->jumps[g->jump_count - 1].label == i && g->jumps[g->jump_count - 1].at + 4 == g->p) {
            g->p -= 5; /* it is what comes next */
            g->jump_count--;
        }
        l->at = g->p;
        g->r = l->registers;
        return l->block;
    }
    for (unsigned i = 0; i < g->jump_count && !g->failed; i++) {
        uint32_t distance = (uint32_t)(g->labels[g->jumps[i].label].at - g->jumps[i].at - 4);
        __builtin_memcpy(g->jumps[i].at, &distance, 4);
    }
    return NULL;
}
