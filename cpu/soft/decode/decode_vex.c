/* Decoder: instructions with a VEX prefix (Intel SDM 2A 2.3; AMD64 APM 4 1.2). */
#include "soft/decode/decode.h"

/* VEX.mmmmm */
enum { VEX_0F = 1, VEX_0F38 = 2, VEX_0F3A = 3 };

/* Those of general registers, as the table of operations has them. */
static const struct row {
    uint16_t op;
    uint8_t map, prefix, opcode;
    int8_t group;
    uint8_t feature, flags;
} rows[] = {
#define VEX_INSTRUCTION(name, map, prefix, opcode, group, feature, flags, ...)                                          \
    {OP_##name, map, prefix, opcode, group, FEATURE_##feature, flags},
#include "soft/ops/table.h"
};

bool dec_has(const struct dec *d, enum vec_feature feature)
{
    static const uint8_t features[VEC_FEATURES] = {
        [VEC_AVX] = FEATURE_AVX, [VEC_AVX2] = FEATURE_AVX2, [VEC_FMA] = FEATURE_FMA, [VEC_F16C] = FEATURE_F16C, [VEC_AES] = FEATURE_AES,
        [VEC_PCLMUL] = FEATURE_PCLMUL, [VEC_SHA] = FEATURE_SHA, [VEC_VAES] = FEATURE_VAES, [VEC_VPCLMUL] = FEATURE_VPCLMUL};
    _Static_assert(FEATURE_ALWAYS == 0, "what is not in the table everybody has");
    return d->mode & MODE_FEATURE(features[feature]);
}

static void vex_check(struct dec *d, bool vectors)
{
    if (d->fpu_checked >> (3 + vectors) & 1)
        return;
    d->fpu_checked |= (uint8_t)(8 << vectors);
    emit(d, OP_vex_available)->aux = vectors;
}

static bool decode_general(struct dec *d, unsigned map, unsigned vvvv, bool l)
{
    if (map == VEX_0F)
        return false;
    if (d->pos >= d->available) {
        d->missing = true;
        return true;
    }
    unsigned prefix = d->p66 ? 0x66 : d->rep, group = d->bytes[d->pos] >> 3 & 7, escape = map == VEX_0F38 ? 0x38 : 0x3A;
    const struct row *r = rows, *end = rows + sizeof rows / sizeof rows[0];
    while (r < end && !(r->map == escape && r->opcode == d->opcode && r->prefix == prefix &&
                        (r->group < 0 || r->group == (int)group) && (d->mode & MODE_FEATURE(r->feature))))
        r++;
    if (r == end || l || (escape == 0x3A && vvvv)) /* those of 0F 3A have no register in VEX.vvvv */
        return false;
    dec_modrm(d);
    uint8_t imm = escape == 0x3A ? dec_u8(d) : 0;
    if (!d->c64)
        vex_check(d, false);
    unsigned v = source_rm(d, d->opsize);
    struct uop *u = emit_flags(d, r->op, OP_NONE, r->flags, r->flags, 0);
    u->r0 = (uint8_t)((r->group < 0 ? d->reg : vvvv) * 8);
    u->r1 = (uint8_t)v;
    u->base = (uint8_t)(vvvv * 8);
    u->imm = imm;
    return true;
}

/* A gather's address has an index of vectors. No two of its three registers may be one. */
static void decode_gather(struct dec *d, const struct avx_op *op, unsigned vvvv, bool l)
{
    unsigned displacement = d->mod == 1 ? 1 : d->mod == 2 || d->ea_base == OFF_ZERO ? 4 : 0;
    uint8_t sib = d->bytes[d->pos - 1 - displacement];
    unsigned index = (sib >> 3 & 7) | (d->rex & 2) << 2;
    if ((d->modrm & 7) != 4 || index == d->reg || index == vvvv || vvvv == d->reg) {
        d->bad = true;
        return;
    }
    struct uop *u = emit_pure(d, OP_lea_mask); /* base + displacement, into tmp[0] */
    u->imm = d->adsize == 8 ? UINT64_MAX : UINT32_MAX;
    u->r0 = OFF_T0;
    u->base = d->ea_base;
    u->disp = d->ea_disp;
    u->size = 8;
    u = emit_helper(d, h_avx_move);
    u->r0 = d->reg;
    u->r1 = (uint8_t)index;
    u->base = (uint8_t)vvvv;
    u->scale = l;
    u = emit(d, OP_nop);
    u->ptr = op;
    u->base = (uint8_t)d->adsize;
    u->scale = sib >> 6;
}

/* One of those that have handlers of their own. */
static bool decode_fast(struct dec *d, const struct avx_op *op, unsigned vvvv, bool l, uint8_t imm, unsigned size)
{
    bool computes = (op->form == AVX_R_VM || op->form == AVX_R_M) && op->imm != AVX_IS4;
    struct uop *u;
    if (op->form == AVX_ZERO && !l && d->c64) {
        emit_pure(d, OP_avx_zero_upper);
        return true;
    }
    if (!d->mem && (computes || (op->form == AVX_G_M && op->when == AVX_REG_ONLY))) {
        u = (op->real == AVX_NO_FLOAT ? emit_pure : emit)(d, computes ? OP_avx_rr : OP_avx_mask);
        u->r1 = d->rm;
        u->base = (uint8_t)vvvv;
        u->scale = l && op->l != AVX_LIG;
        u->aux = imm;
    } else if (d->mem && (size == 16 || size == 32) && op->mem == AVX_FULL &&
               (computes || op->form == AVX_LOAD || op->form == AVX_STORE)) {
        int form = address_form(d, size, op->form == AVX_STORE);
        u = emit(d, computes                 ? OP_FORMED(avx_rm, 0, form)
                    : op->form == AVX_LOAD ? OP_FORMED(avx_load, 0, form)
                                           : OP_FORMED(avx_store, 0, form));
        operand(d, u);
        u->r1 = (uint8_t)vvvv;
        u->aux = computes ? imm : op->aligned ? (uint8_t)(size - 1) : 0;
        u->size = (uint8_t)size;
    } else {
        return false;
    }
    u->r0 = d->reg;
    u->ptr = op;
    return true;
}

static bool decode_vector_vex(struct dec *d, unsigned map, unsigned vvvv, bool l, bool wide)
{
    if (!dec_has(d, VEC_AVX))
        return false;
    bool no_modrm = map == VEX_0F && d->opcode == 0x77;
    if (!no_modrm && d->pos >= d->available) {
        d->missing = true;
        return true;
    }
    unsigned prefix = d->p66 ? 1 : d->rep == 0xF3 ? 2 : d->rep == 0xF2 ? 3 : 0;
    const struct avx_op *op = avx_lookup(map, prefix, d->opcode, wide, l, no_modrm ? 0 : d->bytes[d->pos], d->c64);
    if (!op || !dec_has(d, (enum vec_feature)op->feature[l && op->l != AVX_LIG]))
        return false;
    if (!no_modrm)
        dec_modrm(d);
    if (vvvv && !avx_uses_vvvv(op, !d->mem))
        return false;
    uint8_t imm = op->imm != AVX_NO_IMM ? dec_u8(d) : 0;
    vex_check(d, true);
    unsigned size = no_modrm ? 0 : avx_memory_size(op, l);
    if (decode_fast(d, op, vvvv, l, imm, size))
        return true;
    struct uop *u;
    switch (op->form) {
    case AVX_GATHER: decode_gather(d, op, vvvv, l); return true;
    case AVX_LDMXCSR: case AVX_STMXCSR:
        emit_address(d, 4, op->form == AVX_STMXCSR);
        if (op->form == AVX_STMXCSR)
            emit_helper_store(d, h_stmxcsr);
        else
            emit_helper(d, h_ldmxcsr);
        return true;
    case AVX_MASKMOV:
        u = emit_helper_store(d, h_vector);
        u->r0 = d->reg;
        u->r1 = d->rm;
        u->base = (uint8_t)d->adsize;
        u->seg = (uint8_t)(d->seg >= 0 ? d->seg : SEG_DS);
        emit(d, OP_nop)->ptr = fpu_lookup_vector(VEC_MAP_0F, 0xF7, VEC_66, 0xC0);
        return true;
    case AVX_MASK_LOAD: case AVX_MASK_STORE: size = l ? 32 : 16; break;
    default: break;
    }
    bool store = op->form == AVX_STORE || op->form == AVX_STORE_SCALAR || op->form == AVX_STORE_LOW || op->form == AVX_STORE_HIGH ||
                 op->form == AVX_TO_GPR || op->form == AVX_STORE_8 || op->form == AVX_EXTRACT || op->form == AVX_EXTRACT_128 ||
                 op->form == AVX_MASK_STORE || op->form == AVX_M_R;
    if (d->mem)
        emit_address(d, size, store);
    u = (d->mem && store ? emit_helper_store : emit_helper)(d, op->form < AVX_OF_STUBS ? h_avx_stub : h_avx_move);
    if (avx_repeats(op, d->mem))
        u->op = d->mem && store ? OP_avx_other_store : OP_avx_other;
    struct uop_meta *m = &d->meta[d->out->count - 1];
    m->effects = op->form == AVX_FLAGS || op->form == AVX_STRINGS ? FLAGS_ALL : 0;
    m->kills = m->effects;
    m->reads = 0;
    u->r0 = d->reg;
    u->r1 = d->rm;
    u->base = (uint8_t)vvvv;
    u->index = d->mem;
    u->scale = l && op->l != AVX_LIG;
    u->aux = imm;
    u->size = (uint8_t)size;
    u = emit(d, OP_nop);
    u->ptr = op;
    u->size = (uint8_t)d->opsize;
    return true;
}

bool decode_vex(struct dec *d)
{
    if (d->pos >= d->available) {
        d->missing = true;
        return true;
    }
    if (!d->c64 && d->bytes[d->pos] < 0xC0)
        return false; /* LES, LDS */
    /* "Any VEX-encoded instruction with a LOCK, 66H, F2H, F3H or REX prefix preceding VEX will #UD." (2.3.2, 2.3.3) */
    bool bad = d->lock || d->p66 || d->rep || d->rex;
    uint8_t first = dec_u8(d), last = d->opcode == 0xC4 ? dec_u8(d) : first;
    static const uint8_t rep[4] = {0, 0, 0xF3, 0xF2};
    bool wide = d->opcode == 0xC4 && last & 0x80;
    unsigned map = d->opcode == 0xC4 ? first & 31 : VEX_0F, vvvv = ~(last >> 3) & 15;
    d->rex = (uint8_t)(0x40 | wide << 3 | (~first >> 5 & 4) | (d->opcode == 0xC4 ? ~first >> 5 & 3 : 0));
    if (!d->c64) { /* eight registers, so the highest bit of each number says nothing */
        d->rex &= 0x48;
        vvvv &= 7;
    }
    d->opsize = wide && d->c64 ? 8 : 4;
    d->p66 = (last & 3) == 1;
    d->rep = rep[last & 3];
    d->opcode = dec_u8(d);
    bool l = last & 4;
    if (bad || !(decode_general(d, map, vvvv, l) || decode_vector_vex(d, map, vvvv, l, wide)))
        d->bad = true;
    return true;
}
