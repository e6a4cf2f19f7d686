/* Decoder: prefixes, ModRM, operands; emission of micro-ops; dead flags. The opcode maps are in decode_map.c. */
#include <string.h>

#include "soft/decode/decode.h"

uint8_t dec_u8(struct dec *d)
{
    if (d->pos >= d->available) {
        d->missing = true;
        return 0;
    }
    return d->bytes[d->pos++];
}
static uint64_t dec_bytes(struct dec *d, unsigned n)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < n; i++)
        v |= (uint64_t)dec_u8(d) << (8 * i);
    return v;
}
uint16_t dec_u16(struct dec *d) { return (uint16_t)dec_bytes(d, 2); }
uint32_t dec_u32(struct dec *d) { return (uint32_t)dec_bytes(d, 4); }
uint64_t dec_u64(struct dec *d) { return dec_bytes(d, 8); }

/* An immediate of the operand size, at most 32 bits, sign-extended. */
int64_t dec_imm(struct dec *d, unsigned size)
{
    switch (size) {
    case 1: return (int8_t)dec_u8(d);
    case 2: return (int16_t)dec_u16(d);
    default: return (int32_t)dec_u32(d);
    }
}

/* ---- emission ---- */

struct uop *emit(struct dec *d, unsigned op)
{
    struct decoded *o = d->out;
    struct uop *u = &o->uops[o->count];
    memset(u, 0, sizeof *u);
    memset(&d->meta[o->count], 0, sizeof d->meta[0]);
    o->count++;
    u->op = op;
    u->base = u->index = OFF_ZERO;
    u->idx = (uint8_t)d->insn;
    u->off = (uint16_t)d->start;
    u->size = (uint8_t)d->opsize;
    u->seg = SEG_DS;
    return u;
}

struct uop *emit_flags(struct dec *d, unsigned op, unsigned without, unsigned effects, unsigned kills, unsigned reads)
{
    struct uop *u = emit(d, op);
    struct uop_meta *m = &d->meta[d->out->count - 1];
    m->without = (uint16_t)without;
    m->effects = (uint8_t)effects;
    m->kills = (uint8_t)kills;
    m->reads = (uint8_t)reads;
    m->pure = true;
    return u;
}

struct uop *emit_pure(struct dec *d, unsigned op) { return emit_flags(d, op, OP_NONE, 0, 0, 0); }

struct uop *impure(struct dec *d, struct uop *u)
{
    d->meta[d->out->count - 1].pure = false;
    return u;
}

static struct uop *emit_call(struct dec *d, unsigned how, helper_fn helper)
{
    struct uop *u = impure(d, emit_flags(d, how, OP_NONE, FLAGS_ALL, 0, FLAGS_ALL));
    u->ptr = (const void *)helper;
    u->seg = d->mem ? d->ea_seg : SEG_DS;
    return u;
}
struct uop *emit_helper(struct dec *d, helper_fn helper) { return emit_call(d, OP_call_helper, helper); }
struct uop *emit_helper_store(struct dec *d, helper_fn helper) { return emit_call(d, OP_call_helper_store, helper); }
struct uop *emit_helper_end(struct dec *d, helper_fn helper)
{
    d->end = true;
    return emit_call(d, OP_call_helper_end, helper);
}

void emit_links(struct dec *d, int64_t delta)
{
    struct uop *u = emit(d, OP_NONE);
    struct uop_links *l = (struct uop_links *)u;
    memset(l, 0, sizeof *l);
    l->delta = delta;
    d->out->links = (int)d->out->count - 1;
    d->end = true;
}

/* ---- operands ---- */

unsigned reg_off(const struct dec *d, unsigned n, unsigned size)
{
    if (size == 1 && !d->rex && n >= 4)
        return (n - 4) * 8 + 1;
    return n * 8;
}

void dec_modrm(struct dec *d)
{
    uint8_t m = dec_u8(d);
    d->modrm = m;
    d->mod = m >> 6;
    d->reg = (uint8_t)((m >> 3 & 7) | (d->rex & 4) << 1);
    d->rm = (uint8_t)((m & 7) | (d->rex & 1) << 3);
    d->has_modrm = true;
    d->mem = d->mod != 3;
    if (!d->mem)
        return;
    d->ea_base = d->ea_index = OFF_ZERO;
    d->ea_scale = 0;
    d->ea_disp = 0;
    d->ea_rip = false;
    unsigned seg = SEG_DS;
    if (d->adsize == 2) {
        static const uint8_t base[8] = {RBX, RBX, RBP, RBP, RSI, RDI, RBP, RBX};
        static const uint8_t index[8] = {RSI, RDI, RSI, RDI, 0, 0, 0, 0};
        unsigned rm = m & 7;
        if (rm == 6 && d->mod == 0) {
            d->ea_disp = (int16_t)dec_u16(d);
        } else {
            d->ea_base = (uint8_t)(base[rm] * 8);
            if (rm < 4)
                d->ea_index = (uint8_t)(index[rm] * 8);
            if (base[rm] == RBP)
                seg = SEG_SS;
            if (d->mod == 1)
                d->ea_disp = (int8_t)dec_u8(d);
            else if (d->mod == 2)
                d->ea_disp = (int16_t)dec_u16(d);
        }
    } else {
        unsigned base = d->rm;
        bool has_base = true;
        if ((m & 7) == 4) {
            uint8_t sib = dec_u8(d);
            unsigned index = (sib >> 3 & 7) | (d->rex & 2) << 2;
            base = (sib & 7) | (d->rex & 1) << 3;
            if (index != RSP) {
                d->ea_index = (uint8_t)(index * 8);
                d->ea_scale = sib >> 6;
            }
            if ((sib & 7) == 5 && d->mod == 0)
                has_base = false;
        } else if ((m & 7) == 5 && d->mod == 0) {
            has_base = false;
            d->ea_rip = d->c64;
        }
        if (has_base) {
            d->ea_base = (uint8_t)(base * 8);
            if (base == RSP || base == RBP)
                seg = SEG_SS;
        }
        if (d->mod == 1)
            d->ea_disp = (int8_t)dec_u8(d);
        else if (d->mod == 2 || !has_base)
            d->ea_disp = (int32_t)dec_u32(d);
    }
    d->ea_seg = (uint8_t)(d->seg >= 0 ? d->seg : (int)seg);
}

/* Whether the memory operand is one that handlers compute themselves; form 0 or 1, or -1. */
static int simple_form(const struct dec *d)
{
    if (!d->c64 || d->adsize != 8 || d->ea_rip || d->ea_seg >= SEG_FS)
        return -1;
    return d->ea_index != OFF_ZERO;
}

static void set_address(struct dec *d, struct uop *u)
{
    u->base = d->ea_base;
    u->index = d->ea_index;
    u->scale = d->ea_scale;
    u->disp = d->ea_disp;
    u->seg = d->ea_seg;
}

/* Emit what computes the operand's linear address into tmp[0]. size: bytes that will be accessed. */
void emit_address(struct dec *d, unsigned size, bool write)
{
    bool based = d->ea_seg >= SEG_FS;
    struct uop *u;
    if (!d->c64) {
        u = emit(d, OP_ea_legacy);
        set_address(d, u);
        u->imm = d->adsize == 2 ? 0xFFFF : UINT32_MAX;
        u->size = (uint8_t)size;
        u->aux = write;
    } else if (d->ea_rip) {
        u = emit_pure(d, d->adsize == 4 ? OP_ea_a32_rip : based ? OP_ea_a64_rip : OP_ea_rip);
        u->imm = (uint64_t)(int64_t)d->ea_disp;
        u->seg = d->ea_seg;
        u->aux = based;
        d->rip_fix = (int)d->out->count - 1;
    } else if (d->adsize == 4) {
        u = emit_pure(d, OP_ea_a32);
        set_address(d, u);
        u->aux = based;
    } else {
        u = emit_pure(d, based ? OP_ea_seg : d->ea_index != OFF_ZERO ? OP_ea_bi : OP_ea_bd);
        set_address(d, u);
    }
}

/* Prepare the memory operand for a handler of [form]: simple addresses stay as they are, others go through tmp[0].
 * Then call operand() on the micro-op. */
int address_form(struct dec *d, unsigned size, bool write)
{
    int form = simple_form(d);
    if (form >= 0) {
        d->op_tmp = false;
        return form;
    }
    emit_address(d, size, write);
    d->op_tmp = true;
    return 0;
}
void operand(struct dec *d, struct uop *u)
{
    if (d->op_tmp) {
        u->base = OFF_T0;
        u->index = OFF_ZERO;
        u->seg = d->ea_seg;
    } else {
        set_address(d, u);
    }
}

/* The offset of the r/m operand as a source: a register, or tmp[1] after a load. size in bytes. */
unsigned source_rm(struct dec *d, unsigned size)
{
    if (!d->mem)
        return reg_off(d, d->rm, size);
    emit_load(d, size, OFF_T1);
    return OFF_T1;
}

void emit_load(struct dec *d, unsigned size, unsigned to)
{
    struct uop *u;
    if (d->c64 && d->ea_rip && d->adsize == 8 && d->ea_seg < SEG_FS) {
        u = emit(d, OP_SIZED(load_rip, LOG2(size)));
        u->imm = (uint64_t)(int64_t)d->ea_disp;
        d->rip_fix = (int)d->out->count - 1;
    } else {
        int form = address_form(d, size, false);
        u = emit(d, OP_FORMED(load_r, LOG2(size), form));
        operand(d, u);
    }
    u->r0 = (uint8_t)to;
}

void emit_store(struct dec *d, unsigned size, unsigned from)
{
    struct uop *u;
    if (d->c64 && d->ea_rip && d->adsize == 8 && d->ea_seg < SEG_FS) {
        u = emit(d, OP_SIZED(store_rip, LOG2(size)));
        u->imm = (uint64_t)(int64_t)d->ea_disp;
        d->rip_fix = (int)d->out->count - 1;
    } else {
        int form = address_form(d, size, true);
        u = emit(d, OP_FORMED(store_r, LOG2(size), form));
        operand(d, u);
    }
    u->r1 = (uint8_t)from;
}

/* r/m as a destination that a register micro-op works on: the register, or tmp[1] between rmw_begin and rmw_end. */
unsigned rmw_begin(struct dec *d, unsigned size)
{
    if (!d->mem)
        return reg_off(d, d->rm, size);
    emit_address(d, size, true);
    struct uop *u = emit(d, OP_rmw_load);
    u->size = (uint8_t)size;
    u->seg = d->ea_seg;
    return OFF_T1;
}
void rmw_end(struct dec *d, unsigned size)
{
    if (!d->mem)
        return;
    struct uop *u = emit(d, OP_rmw_store);
    u->size = (uint8_t)size;
    u->seg = d->ea_seg;
}

/* ---- one instruction ---- */

static void read_prefixes(struct dec *d)
{
    bool p66 = false, p67 = false;
    d->rex = 0;
    d->seg = -1;
    d->lock = false;
    d->rep = 0;
    for (;;) {
        uint8_t b = dec_u8(d);
        if (d->missing || d->pos - d->start > 15)
            break;
        switch (b) {
        case 0x66: p66 = true; break;
        case 0x67: p67 = true; break;
        case 0xF0: d->lock = true; break;
        case 0xF2: case 0xF3: d->rep = b; break;
        case 0x26: case 0x2E: case 0x36: case 0x3E:
            if (!d->c64)
                d->seg = b >> 3 & 3; /* ES, CS, SS, DS */
            break;
        case 0x64: d->seg = SEG_FS; break;
        case 0x65: d->seg = SEG_GS; break;
        default:
            if (d->c64 && (b & 0xF0) == 0x40) {
                d->rex = b;
                continue;
            }
            d->opcode = b;
            goto done;
        }
        d->rex = 0; /* only the last prefix counts as REX */
    }
done:
    d->p66 = p66;
    if (d->c64) {
        d->opsize = d->rex & 8 ? 8 : p66 ? 2 : 4;
        d->adsize = p67 ? 4 : 8;
        d->stack_size = p66 && !(d->rex & 8) ? 2 : 8;
    } else {
        d->opsize = p66 != !!(d->mode & MODE_DB) ? 4 : 2;
        d->adsize = p67 != !!(d->mode & MODE_DB) ? 4 : 2;
        d->stack_size = d->opsize;
    }
}

/* False: its bytes are not all there. */
static bool decode_one(struct dec *d)
{
    struct decoded *o = d->out;
    unsigned first = o->count;
    int links = o->links;
    d->start = d->pos;
    d->missing = d->bad = d->has_modrm = d->mem = d->lock_ok = false;
    d->rip_fix = -1;
    d->fused = false;
    read_prefixes(d);
    if (!d->missing && d->pos - d->start <= 15)
        decode_opcode(d);
    unsigned len = d->pos - d->start;
    if (len > 15) {
        d->missing = false;
    } else if (d->missing) {
        o->count = first;
        o->links = links;
        return false;
    }
    if (len > 15 || d->bad || (d->lock && !(d->lock_ok && d->mem))) {
        o->count = first;
        o->links = links;
        d->mem = false;
        d->rip_fix = -1;
        emit_helper_end(d, len > 15 ? h_gp : h_ud);
        len = len > 15 ? 15 : len;
    }
    if (d->rip_fix >= 0)
        o->uops[d->rip_fix].imm += d->pos;
    for (unsigned i = d->fused ? first - 1 : first; i < o->count; i++)
        if ((int)i != o->links)
            o->uops[i].len = (uint8_t)len;
    d->insn++;
    return true;
}

static void drop_dead_flags(struct dec *d)
{
    unsigned live = FLAGS_ALL;
    for (unsigned i = d->out->count; i-- > 0;) {
        const struct uop_meta *m = &d->meta[i];
        if (m->without && !(m->effects & live))
            d->out->uops[i].op = m->without;
        if (m->mark && !(m->effects & live))
            d->out->uops[i].aux = 1;
        /* A fault shows the flags as they are before its instruction. */
        live = m->pure ? (live & ~m->kills) | m->reads : FLAGS_ALL;
    }
    d->out->flags_in = live != 0;
}

void decode_block(struct decoded *out, const uint8_t *bytes, unsigned available, unsigned mode, unsigned max_insns)
{
    struct dec dec = {.out = out, .bytes = bytes, .available = available, .mode = mode, .c64 = mode & MODE_CODE64};
    struct dec *d = &dec;
    out->count = 0;
    out->links = -1;
    out->need_more = false;
    bool stopped = false;
    while (!d->end) {
        if (d->insn == max_insns || out->count + INSN_MAX_UOPS + 2 > BLOCK_MAX_UOPS || d->pos == available) {
            stopped = true;
            break;
        }
        unsigned at = d->pos;
        if (!decode_one(d)) {
            d->pos = at;
            stopped = true;
            break;
        }
    }
    out->insns = d->insn;
    out->bytes = d->pos;
    if (d->insn == 0) {
        out->need_more = true;
        return;
    }
    if (stopped) {
        /* Goes on with the next instruction: as if the last one jumped there. */
        const struct uop *last = &out->uops[out->count - 1];
        unsigned off = last->off, len = last->len;
        d->insn--;
        d->mem = false;
        struct uop *u;
        if (d->c64) {
            u = emit(d, OP_jmp_fall);
            emit_links(d, 0);
        } else {
            u = emit_helper_end(d, h_fall);
        }
        u->off = (uint16_t)off;
        u->len = (uint8_t)len;
    }
    drop_dead_flags(d);
}
