/* Windows: several accesses of a block to one small piece of memory, with one look-up in the TLB.
 *
 * The pushes of a function, its pops, the fields of a structure are accesses at constant distances from a register whose
 * value stays, or changes by constants. The first of them looks up the whole piece, from the lowest to the highest byte that
 * the following ones touch, which must be in one page; the host pointer to it then stays in a host register, and the others
 * need no more than that. If the piece crosses a page, or is not in the TLB, the handler of the first access goes on, as ever.
 *
 * TLB entries are taken away only between blocks and by handlers, so a pointer is good until its block's host code is left.
 * A write's entry serves reads as well, for what may be written may be read.
 */
#include "soft/jit/emitters.h"

enum { WINDOW_MOST = 64 /* bytes: few enough to be in one page nearly always */, FAR = 1 << 20, ANY = ~0u };

struct access {
    unsigned guest; /* of the register that the address is formed with */
    int32_t disp;
    uint32_t size;
    bool write;
};
#define BIT(offset) (1u << ((offset) >> 3))

static bool writes_alu(unsigned op) { return op != ALU_CMP && op != ALU_TEST; }

/* Whether a micro-op accesses memory at a constant distance from a register. */
static bool access_of(const struct uop *u, unsigned op, struct access *a)
{
    struct variant v = op_variant(op);
    unsigned size = v.size, form = v.form, base = u->base;
    int32_t disp = u->disp;
    bool write = false;
    switch (op_family(op)) {
    case FAMILY_load_r: case FAMILY_alu_rm: break;
    case FAMILY_movzx_rm: case FAMILY_movsx_rm: size = v.op; break;
    case FAMILY_store_r: case FAMILY_store_i: case FAMILY_unary_m: write = true; break;
    case FAMILY_alu_mr: case FAMILY_alu_mi: write = writes_alu(v.op); break;
    case FAMILY_rmw_load: case FAMILY_rmw_store: case FAMILY_cmpxchg_m:
        write = true, size = (unsigned)__builtin_ctz(u->size), form = 0, base = OFF_T0, disp = 0;
        break;
    case FAMILY_push64_r: case FAMILY_push64_i: case FAMILY_call_rel: case FAMILY_call_r:
        write = true, size = 3, form = 0, base = RSP * 8, disp = -8;
        break;
    case FAMILY_pop64_r: case FAMILY_ret64: size = 3, form = 0, base = RSP * 8, disp = 0; break;
    default: return false;
    }
    if ((form && u->index != OFF_ZERO) || base == OFF_ZERO || disp >= FAR || disp <= -FAR)
        return false;
    *a = (struct access){base >> 3, disp, 1u << size, write};
    return true;
}

/* The guest registers that a micro-op may change, a bit each. */
static unsigned changed_by(const struct uop *u, unsigned op)
{
    struct variant v = op_variant(op);
    switch (op_family(op)) {
    case FAMILY_store_r: case FAMILY_store_i: case FAMILY_store_rip: case FAMILY_unary_m: case FAMILY_alu_mr: case FAMILY_alu_mi:
    case FAMILY_rmw_store: case FAMILY_nop: return 0;
    case FAMILY_alu_rr: case FAMILY_alu_ri: case FAMILY_alu_rm: return writes_alu(v.op) ? BIT(u->r0) : 0;
    case FAMILY_load_r: case FAMILY_load_rip: case FAMILY_movzx_rm: case FAMILY_movsx_rm: case FAMILY_movzx_rr:
    case FAMILY_movsx_rr: case FAMILY_mov_rr: case FAMILY_mov_ri: case FAMILY_lea_r: case FAMILY_lea_rip: case FAMILY_unary_r:
    case FAMILY_shift_ri: case FAMILY_shift_rc: case FAMILY_imul_rr: case FAMILY_imul_rri: case FAMILY_cmov_rr:
    case FAMILY_setcc_r: case FAMILY_bswap32: case FAMILY_bswap64: return BIT(u->r0);
    case FAMILY_ea_bd: case FAMILY_ea_bi: case FAMILY_ea_rip: case FAMILY_ea_seg: case FAMILY_ea_abs: case FAMILY_ea_a64_rip:
        return BIT(OFF_T0);
    case FAMILY_rmw_load: return BIT(OFF_T1);
    case FAMILY_push64_r: case FAMILY_push64_i: return BIT(RSP * 8);
    case FAMILY_pop64_r: return BIT(RSP * 8) | BIT(u->r0);
    case FAMILY_xchg_rr: return BIT(u->r0) | BIT(u->r1);
    case FAMILY_cdqe: case FAMILY_cmpxchg_m: return BIT(RAX * 8);
    case FAMILY_cdq: case FAMILY_cqo: return BIT(RDX * 8);
    default: return ANY;
    }
}

/* Add to *at by how much a micro-op changes a guest register; false: that is unknown. */
static bool follow(const struct uop *u, unsigned op, unsigned guest, int32_t *at)
{
    struct variant v = op_variant(op);
    int64_t change = 0;
    if (!(changed_by(u, op) >> guest & 1))
        return true;
    switch (op_family(op)) {
    case FAMILY_push64_r: case FAMILY_push64_i: change = -8; break;
    case FAMILY_pop64_r:
        if (u->r0 == RSP * 8 || guest != RSP)
            return false;
        change = 8;
        break;
    case FAMILY_alu_ri:
        if (v.size != 3 || (v.op != ALU_ADD && v.op != ALU_SUB) || u->r0 != guest * 8)
            return false;
        change = v.op == ALU_ADD ? imm_of(u, 3) : -imm_of(u, 3);
        break;
    case FAMILY_lea_r:
        if (v.size != 3 || (v.form && u->index != OFF_ZERO) || u->base != guest * 8 || u->r0 != guest * 8)
            return false;
        change = u->disp;
        break;
    default: return false;
    }
    if (change >= FAR || change <= -FAR || *at >= FAR || *at <= -FAR)
        return false;
    *at += (int32_t)change;
    return true;
}

static void forget(struct gen *g, unsigned n)
{
    int h = g->r.where[GUESTS + n];
    if (h >= 0)
        g->r.holds[h] = g->r.where[GUESTS + n] = -1;
}
void gen_windows_forget(struct gen *g)
{
    for (unsigned n = 0; n < WINDOWS; n++)
        forget(g, n);
}
void gen_windows_follow(struct gen *g, const struct uop *u, unsigned op)
{
    for (unsigned n = 0; n < WINDOWS; n++)
        if (g->r.where[GUESTS + n] >= 0 && !follow(u, op, g->windows[n].guest, &g->windows[n].at))
            forget(g, n);
}

/* The operand of an access, if a window has it. */
static bool find(struct gen *g, const struct access *a)
{
    for (unsigned n = 0; n < WINDOWS; n++) {
        const struct window *w = &g->windows[n];
        int32_t from = w->at + a->disp;
        if (g->r.where[GUESTS + n] < 0 || w->guest != a->guest || (a->write && !w->write) || from < w->low ||
            from + (int32_t)a->size > w->high)
            continue;
        g->at = gen_reg_of(g, (GUESTS + n) * 8, false);
        g->at_disp = from - w->low;
        return true;
    }
    return false;
}

/* Whether micro-ops behind the one under way would use its window, and from where to where that goes. */
static bool look_ahead(const struct gen *g, const struct access *first, int32_t *low, int32_t *high)
{
    bool more = false;
    int32_t at = 0;
    *low = first->disp, *high = first->disp + (int32_t)first->size;
    for (unsigned i = g->uop; follow(&g->code[i], g->ops[i], first->guest, &at) && ++i < g->count && op_emitter(g->ops[i]);) {
        struct access a;
        if (!access_of(&g->code[i], g->ops[i], &a) || a.guest != first->guest || (a.write && !first->write))
            continue;
        int32_t from = at + a.disp, to = from + (int32_t)a.size;
        int32_t new_low = from < *low ? from : *low, new_high = to > *high ? to : *high;
        if (new_high - new_low > WINDOW_MOST)
            continue;
        *low = new_low, *high = new_high;
        more = true;
    }
    return more;
}

/* The window that no host register has, or was used longest ago. */
static unsigned choose(const struct gen *g)
{
    unsigned best = 0;
    for (unsigned n = 0; n < WINDOWS; n++) {
        int h = g->r.where[GUESTS + n];
        if (h < 0)
            return n;
        if (g->r.age[h] < g->r.age[g->r.where[GUESTS + best]])
            best = n;
    }
    return best;
}

bool gen_window(struct gen *g, const struct uop *u)
{
    struct access a;
    int32_t low, high;
    if (!access_of(u, g->ops[g->uop], &a))
        return false;
    if (find(g, &a))
        return true;
    if (!look_ahead(g, &a, &low, &high))
        return false;
    unsigned n = choose(g);
    forget(g, n);
    gen_clobber(g);
    unsigned base = gen_reg_of(g, a.guest * 8, true), h = gen_reg_of(g, (GUESTS + n) * 8, false);
    g->windows[n] = (struct window){.guest = (uint8_t)a.guest, .write = a.write, .low = low, .high = high};
    gen_op_rm(g, 3, 0x8D, h, base, low);
    gen_tlb_at(g, h, (unsigned)(high - low), a.write ? ACCESS_WRITE : ACCESS_READ);
    g->at = h;
    g->at_disp = a.disp - low;
    return true;
}
