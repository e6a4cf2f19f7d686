/* Decoder: the two- and three-byte opcode maps (0F, 0F 38, 0F 3A). */
#include "soft/decode/decode.h"

void emit_fpu_check(struct dec *d, unsigned kind)
{
    /* CR0 and CR4 do not change inside a block. */
    if (d->fpu_checked >> kind & 1)
        return;
    d->fpu_checked |= (uint8_t)(1u << kind);
    emit(d, OP_fpu_available)->aux = (uint8_t)kind;
}

static unsigned flags_of_condition(unsigned cc)
{
    switch (cc >> 1) {
    case 1: return FLAG_C;
    case 3: return FLAGS_ALL;
    case 0: case 6: case 7: return FLAGS_ALL; /* OF is kept with CF */
    default: return FLAGS_REST;
    }
}

/* One of the frequent instructions that have handlers of their own (exec_vec.c). */
static bool decode_vector_fast(struct dec *d, const struct vec_op *op, uint8_t imm, unsigned size, bool store)
{
    bool wide = d->rex & 8;
    if (!op_handler(OP_OF(vec_fast, op->id, 0, 0, d->mem ? 2 : wide)))
        return false;
    unsigned form = d->mem ? 2 + (unsigned)address_form(d, size, store) : wide;
    struct uop *u = emit(d, OP_OF(vec_fast, op->id, 0, 0, form));
    if (d->mem)
        operand(d, u);
    u->r0 = d->reg;
    u->r1 = d->rm;
    switch (op->form) {
    case VEC_STORE:
        u->r0 = d->rm;
        u->r1 = d->reg;
        break;
    case VEC_XMM_GPR: u->r1 = (uint8_t)(d->rm * 8); break;
    case VEC_GPR_XMMM: u->r0 = (uint8_t)(d->reg * 8); break;
    case VEC_GPR_STORE:
        u->r0 = (uint8_t)(d->rm * 8);
        u->r1 = d->reg;
        break;
    case VEC_XMM_IMM: u->r0 = d->rm; break;
    case VEC_FLAGS: d->meta[d->out->count - 1].effects = d->meta[d->out->count - 1].kills = FLAGS_ALL; break;
    default: break;
    }
    u->aux = op->has_imm ? imm : wide;
    u->size = (uint8_t)size;
    u->ptr = op;
    return true;
}

bool decode_vector(struct dec *d, unsigned map, uint8_t opcode)
{
    enum vec_prefix prefix = d->rep == 0xF3 ? VEC_F3 : d->rep == 0xF2 ? VEC_F2 : d->p66 ? VEC_66 : VEC_NP;
    bool emms = map == VEC_MAP_0F && opcode == 0x77; /* alone has no ModRM */
    if (!emms && d->pos >= d->available) {
        d->missing = true;
        return true;
    }
    const struct vec_op *op = fpu_lookup_vector((enum vec_map)map, opcode, prefix, emms ? 0 : d->bytes[d->pos]);
    if (!op)
        return false;
    if (op->form == VEC_NONE || !dec_has(d, (enum vec_feature)op->feature)) {
        d->bad = true;
        return true;
    }
    bool mmx = false, store = false;
    switch (op->form) {
    case VEC_MM_STORE: mmx = store = true; break;
    case VEC_GPR_STORE_MM: mmx = store = true; break;
    case VEC_MM_MMM: case VEC_MM_GPR: case VEC_GPR_MM: case VEC_XMM_MMM: case VEC_MM_XMMM: case VEC_MM_IMM: case VEC_EMMS:
    case VEC_MM_MASKMOV:
        mmx = true;
        break;
    case VEC_STORE: case VEC_GPR_STORE: store = true; break;
    default: break;
    }
    struct uop *u;
    if (op->form == VEC_EMMS) {
        emit_fpu_check(d, 1);
        u = emit_helper(d, h_vector);
        u->scale = true;
        emit(d, OP_nop)->ptr = op;
        return true;
    }
    dec_modrm(d);
    if (d->mem ? op->mem_size == 255 : op->mem_only) {
        d->bad = true;
        return true;
    }
    uint8_t imm = op->has_imm || op->form == VEC_XMM_IMM || op->form == VEC_MM_IMM ? dec_u8(d) : 0;
    unsigned size = op->mem_size ? op->mem_size : d->rex & 8 ? 8 : 4;
    emit_fpu_check(d, mmx);
    if (!mmx && decode_vector_fast(d, op, imm, size, store))
        return true;
    if (d->mem)
        emit_address(d, size, store);
    if (op->form == VEC_XMM_XMMM && !d->mem) {
        u = emit(d, op->copy ? OP_vec_copy : OP_vec_rr);
        if (!op->copy)
            d->meta[d->out->count - 1].reads = FLAGS_ALL;
    } else {
        u = emit_helper_store(d, h_vector);
    }
    if (op->form == VEC_FLAGS || op->form == VEC_FLAGS_GPR) {
        struct uop_meta *m = &d->meta[d->out->count - 1];
        m->kills = FLAGS_ALL;
        m->reads = 0;
    }
    u->r0 = d->reg;
    u->r1 = d->rm;
    u->base = (uint8_t)d->adsize;
    u->index = d->mem;
    u->aux = d->rex & 8;
    u->scale = mmx && !(op->form == VEC_XMM_MMM && d->mem);
    u->disp = imm;
    u->size = (uint8_t)size;
    if (op->form == VEC_MASKMOV || op->form == VEC_MM_MASKMOV)
        u->seg = (uint8_t)(d->seg >= 0 ? d->seg : SEG_DS);
    emit(d, OP_nop)->ptr = op;
    if (u->op == OP_vec_rr || u->op == OP_vec_copy)
        d->out->count--, u->ptr = op;
    return true;
}

static void group6(struct dec *d)
{
    static const helper_fn reg[6] = {h_sldt, h_str, h_lldt, h_ltr, h_verr, h_verw};
    unsigned n = d->reg & 7;
    struct uop *u;
    if (n > 5) {
        d->bad = true;
        return;
    }
    if (n < 2) {
        if (d->mem) {
            emit_address(d, 2, true);
            emit_helper_store(d, n ? h_str_m : h_sldt_m);
        } else {
            u = emit_helper(d, reg[n]);
            u->r0 = (uint8_t)(d->rm * 8);
        }
        return;
    }
    unsigned r = source_rm(d, 2);
    u = emit_helper(d, reg[n]);
    if (n >= 4)
        d->meta[d->out->count - 1].reads = FLAGS_ALL;
    u->r1 = (uint8_t)r;
}

static void group7(struct dec *d)
{
    unsigned n = d->reg & 7;
    struct uop *u;
    if (d->mem) {
        switch (n) {
        case 0: case 1:
            emit_address(d, d->c64 ? 10 : 6, true);
            emit_helper_store(d, n ? h_sidt : h_sgdt);
            return;
        case 2: case 3:
            emit_address(d, d->c64 ? 10 : 6, false);
            u = emit_helper_end(d, n == 2 ? h_lgdt : h_lidt);
            return;
        case 4:
            emit_address(d, 2, true);
            emit_helper_store(d, h_smsw_m);
            return;
        case 6: {
            unsigned r = source_rm(d, 2);
            emit_helper_end(d, h_lmsw)->r1 = (uint8_t)r;
            return;
        }
        case 7:
            /* No access, so no limit check; the linear address is what counts. */
            emit_address(d, 1, false);
            emit_helper_end(d, h_invlpg);
            return;
        default: d->bad = true; return;
        }
    }
    switch (d->modrm) {
    case 0xC1: case 0xD9: emit_helper_end(d, h_vmcall); return;
    case 0xC8: u = emit_helper(d, h_monitor); u->base = (uint8_t)d->adsize; u->seg = (uint8_t)(d->seg >= 0 ? d->seg : SEG_DS); return;
    case 0xC9: emit_helper_end(d, h_mwait); return;
    case 0xCA: emit_helper_end(d, h_clac); return;
    case 0xCB: emit_helper_end(d, h_stac); return;
    case 0xD0: emit_helper(d, h_xgetbv); return;
    case 0xD1: emit_helper_end(d, h_xsetbv); return;
    case 0xF8:
        if (!d->c64)
            break;
        emit_helper(d, h_swapgs);
        return;
    case 0xF9: emit_helper_end(d, h_rdtscp); return;
    default:
        if (n == 4) {
            emit_helper(d, h_smsw)->r0 = (uint8_t)(d->rm * 8);
            return;
        }
        if (n == 6) {
            emit_helper_end(d, h_lmsw)->r1 = (uint8_t)(d->rm * 8);
            return;
        }
    }
    d->bad = true;
}

static void group15(struct dec *d)
{
    static const struct { helper_fn fn; unsigned size; bool store; } table[8] = {
        {h_fxsave, 512, true}, {h_fxrstor, 512, false}, {h_ldmxcsr, 4, false}, {h_stmxcsr, 4, true},
        {h_xsave, 1, true}, {h_xrstor, 1, false}, {h_xsave, 1, true}, {h_clflush, 1, false}};
    unsigned n = d->reg & 7;
    struct uop *u;
    if (!d->mem) {
        if (d->rep == 0xF3 && n < 4 && d->c64) {
            u = emit_helper(d, h_fsgsbase);
            u->r0 = (uint8_t)(d->rm * 8);
            u->aux = (uint8_t)n;
            return;
        }
        if (n >= 5 && !d->rep && !d->p66) {
            emit(d, OP_fence);
            return;
        }
        d->bad = true;
        return;
    }
    if (d->rep || (d->p66 && n < 6)) {
        d->bad = true;
        return;
    }
    if (n == 6 && d->p66)
        n = 7; /* CLWB */
    if (n == 2 || n == 3)
        emit_fpu_check(d, 0);
    /* 512 does not fit a micro-op's size; the segment check is of the first and last byte's neighbourhood. */
    emit_address(d, table[n].size > 128 ? 128 : table[n].size, table[n].store);
    u = table[n].store ? emit_helper_store(d, table[n].fn) : emit_helper(d, table[n].fn);
    u->aux = (uint8_t)((d->rex & 8 ? 1 : 0) | (n == 6 ? XSAVE_OPTIMISED << 1 : 0));
}

static void group9(struct dec *d)
{
    unsigned n = d->reg & 7;
    if (d->mem) {
        if (n == 1) {
            bool wide = d->rex & 8;
            d->lock_ok = true;
            emit_address(d, wide ? 16 : 8, true);
            emit_helper_store(d, d->lock ? wide ? h_lock_cmpxchg16b : h_lock_cmpxchg8b : wide ? h_cmpxchg16b : h_cmpxchg8b);
            return;
        }
        if (n >= 3 && n <= 5 && !d->rep && !d->p66) { /* XRSTORS, XSAVEC, XSAVES */
            emit_address(d, 1, n != 3);
            struct uop *u = n == 3 ? emit_helper(d, h_xrstor) : emit_helper_store(d, h_xsave);
            u->aux = (uint8_t)((d->rex & 8 ? 1 : 0) | XSAVE_COMPACTED << 1 | (n != 4 ? 8 : 0));
            return;
        }
    } else if (n >= 6 && d->rep == 0) {
        struct uop *u = emit_helper(d, h_rdrand);
        d->meta[d->out->count - 1].kills = FLAGS_ALL;
        u->r0 = (uint8_t)(d->rm * 8);
        return;
    }
    d->bad = true;
}

static void bit_test(struct dec *d, unsigned op, bool by_imm)
{
    unsigned size = d->opsize;
    struct uop *u;
    if (by_imm) {
        uint8_t imm = dec_u8(d);
        if (d->lock && d->mem && op) {
            d->lock_ok = true;
            emit_address(d, size, true);
            u = emit_helper_store(d, h_lock_bit);
            u->disp = imm & (int)(size * 8 - 1);
            u->aux = (uint8_t)op;
            return;
        }
        unsigned r = op == 0 ? source_rm(d, size) : rmw_begin(d, size);
        u = emit_flags(d, OP_bt_ri, OP_NONE, FLAG_C, FLAG_C, 0);
        u->r0 = (uint8_t)r;
        u->imm = imm & (size * 8 - 1);
        u->aux = (uint8_t)op;
        if (op)
            rmw_end(d, size);
        return;
    }
    if (d->mem) {
        d->lock_ok = op != 0;
        emit_address(d, 0, op != 0); /* the operand's own address need not be inside its segment, only the bit's */
        u = emit_helper_store(d, h_bt_m);
        u->base = (uint8_t)d->adsize;
        u->scale = d->lock && op;
    } else {
        u = emit_flags(d, OP_bt_rr, OP_NONE, FLAG_C, FLAG_C, 0);
        u->r0 = (uint8_t)(d->rm * 8);
    }
    u->r1 = (uint8_t)(d->reg * 8);
    u->aux = (uint8_t)op;
}

static void extend(struct dec *d, bool sign, unsigned from)
{
    unsigned s = LOG2(d->opsize), f = LOG2(from);
    struct uop *u;
    if (s == f) { /* 16 to 16 */
        unsigned r = source_rm(d, from);
        u = emit_pure(d, OP_SIZED(mov_rr, f));
        u->r1 = (uint8_t)r;
        u->r0 = (uint8_t)(d->reg * 8);
        return;
    }
    if (d->mem) {
        int form = address_form(d, from, false);
        u = emit(d, sign ? OP_OF(movsx_rm, f, s, 0, form) : s == 1 ? OP_OF(movzx8_16, 1 + form, 0, 0, 0) : OP_OF(movzx_rm, f, 0, 0, form));
        operand(d, u);
    } else {
        u = emit_pure(d, sign ? OP_OF(movsx_rr, f, s, 0, 0) : s == 1 ? OP_OF(movzx8_16, 0, 0, 0, 0) : OP_OF(movzx_rr, f, 0, 0, 0));
        u->r1 = (uint8_t)reg_off(d, d->rm, from);
    }
    u->r0 = (uint8_t)(d->reg * 8);
}

static void two_operands(struct dec *d, unsigned op, unsigned effects, unsigned kills)
{
    unsigned r = source_rm(d, d->opsize);
    struct uop *u = emit_flags(d, op, OP_NONE, effects, kills, 0);
    u->r0 = (uint8_t)(d->reg * 8);
    u->r1 = (uint8_t)r;
}

/* The instructions that have a row in the table of operations. */
static const struct row {
    uint16_t op;
    uint8_t map, prefix, opcode, feature, flags;
} rows[] = {
#define INSTRUCTION(name, map, prefix, opcode, feature, flags, emitter, ...)                                            \
    {OP_##name, map, prefix, opcode, FEATURE_##feature, flags},
#include "soft/ops/table.h"
};

/* False: no row has that opcode with these prefixes, or the guest does not have the feature. */
static bool decode_row(struct dec *d, unsigned map, uint8_t opcode)
{
    const struct row *found = NULL;
    for (const struct row *r = rows; r < rows + sizeof rows / sizeof rows[0]; r++)
        if (r->map == map && r->opcode == opcode && (d->mode & MODE_FEATURE(r->feature)) &&
            (r->prefix ? r->prefix == d->rep : !found))
            found = r;
    if (!found)
        return false;
    dec_modrm(d);
    two_operands(d, found->op, FLAGS_ALL, found->flags);
    return true;
}

static void movbe(struct dec *d, bool is_store)
{
    static const uint16_t swap[4] = {0, OP_movbe16, OP_movbe32, OP_movbe64};
    struct uop *u;
    if (is_store) {
        u = emit_pure(d, swap[LOG2(d->opsize)]);
        u->r0 = OFF_T1;
        u->r1 = (uint8_t)(d->reg * 8);
        emit_store(d, d->opsize, OFF_T1);
    } else {
        unsigned r = source_rm(d, d->opsize);
        u = emit_pure(d, swap[LOG2(d->opsize)]);
        u->r0 = (uint8_t)(d->reg * 8);
        u->r1 = (uint8_t)r;
    }
}

static void map_38(struct dec *d)
{
    uint8_t b = dec_u8(d);
    if (b < 0xF0) {
        if (b == 0x82 && d->p66 && !d->rep) {
            dec_modrm(d);
            if (!d->mem) {
                d->bad = true;
                return;
            }
            emit_address(d, 16, false);
            emit_helper_end(d, h_invpcid)->r0 = (uint8_t)(d->reg * 8);
            return;
        }
        if (!decode_vector(d, VEC_MAP_0F38, b))
            d->bad = true;
        return;
    }
    if (b > 0xF1) {
        d->bad = !decode_row(d, 0x38, b);
        return;
    }
    dec_modrm(d);
    if (d->rep == 0xF2) {
        unsigned size = b == 0xF0 ? 1 : d->opsize, r = source_rm(d, size);
        struct uop *u = emit_helper(d, h_crc32);
        d->meta[d->out->count - 1].effects = 0;
        d->meta[d->out->count - 1].reads = 0;
        u->r0 = (uint8_t)(d->reg * 8);
        u->r1 = (uint8_t)r;
        u->size = (uint8_t)size;
        return;
    }
    if (!d->mem || d->rep) {
        d->bad = true;
        return;
    }
    movbe(d, b == 0xF1);
}

void decode_two_byte(struct dec *d)
{
    uint8_t b = dec_u8(d);
    struct uop *u;
    if ((b >= 0x10 && b <= 0x17) || (b >= 0x28 && b <= 0x2F) || (b >= 0x50 && b <= 0x7F) || b == 0xC2 ||
        (b >= 0xC4 && b <= 0xC6) || (b >= 0xD0 && b != 0xFF)) {
        if (!decode_vector(d, VEC_MAP_0F, b))
            d->bad = true;
        return;
    }
    switch (b) {
    case 0x00: dec_modrm(d); group6(d); return;
    case 0x01: dec_modrm(d); group7(d); return;
    case 0x02: case 0x03: {
        dec_modrm(d);
        unsigned r = source_rm(d, 2);
        u = emit_helper(d, b == 2 ? h_lar : h_lsl);
        u->r0 = (uint8_t)(d->reg * 8);
        u->r1 = (uint8_t)r;
        return;
    }
    case 0x05: emit_helper_end(d, h_syscall); return;
    case 0x06: emit_helper_end(d, h_clts); return;
    case 0x07: emit_helper_end(d, h_sysret)->aux = d->rex & 8; return;
    case 0x08: case 0x09: emit_helper(d, h_wbinvd); return;
    case 0x0D: /* PREFETCH, PREFETCHW */
        dec_modrm(d);
        if (!d->mem)
            break;
        emit(d, OP_nop);
        return;
    case 0x18 ... 0x1F: dec_modrm(d); emit_pure(d, OP_nop); return; /* hints: PREFETCHh, ENDBR, NOP */
    case 0x20: case 0x21: case 0x22: case 0x23: {
        static const helper_fn table[4] = {h_mov_from_cr, h_mov_from_dr, h_mov_to_cr, h_mov_to_dr};
        dec_modrm(d);
        d->mem = false;
        u = (b < 0x22 ? emit_helper : emit_helper_end)(d, table[b & 3]);
        u->r0 = (uint8_t)(((d->modrm & 7) | (d->rex & 1) << 3) * 8);
        u->aux = d->reg;
        u->size = d->c64 ? 8 : 4;
        return;
    }
    case 0x30: emit_helper_end(d, h_wrmsr); return;
    case 0x31: emit_helper_end(d, h_rdtsc); return;
    case 0x32: emit_helper_end(d, h_rdmsr); return;
    case 0x33: emit_helper_end(d, h_rdpmc); return;
    case 0x34: emit_helper_end(d, h_sysenter); return;
    case 0x35: emit_helper_end(d, h_sysexit)->aux = d->rex & 8; return;
    case 0x38: map_38(d); return;
    case 0x3A:
        if (!decode_vector(d, VEC_MAP_0F3A, dec_u8(d)))
            d->bad = true;
        return;
    case 0x40 ... 0x4F: {
        dec_modrm(d);
        unsigned r = source_rm(d, d->opsize);
        u = emit_flags(d, OP_OF(cmov_rr, b & 15, LOG2(d->opsize), 0, 0), OP_NONE, 0, 0, flags_of_condition(b & 15));
        u->r0 = (uint8_t)(d->reg * 8);
        u->r1 = (uint8_t)r;
        return;
    }
    case 0x80 ... 0x8F: {
        int64_t rel = decode_displacement(d, false);
        decode_jcc(d, b & 15, rel);
        return;
    }
    case 0x90 ... 0x9F: {
        dec_modrm(d);
        unsigned r = d->mem ? (unsigned)OFF_T1 : reg_off(d, d->rm, 1);
        u = emit_flags(d, OP_OF(setcc_r, b & 15, 0, 0, 0), OP_NONE, 0, 0, flags_of_condition(b & 15));
        u->r0 = (uint8_t)r;
        if (d->mem)
            emit_store(d, 1, OFF_T1);
        return;
    }
    case 0xA0: decode_push_seg(d, SEG_FS); return;
    case 0xA1: decode_pop_seg(d, SEG_FS); return;
    case 0xA8: decode_push_seg(d, SEG_GS); return;
    case 0xA9: decode_pop_seg(d, SEG_GS); return;
    case 0xA2: emit_helper_end(d, h_cpuid); return;
    case 0xA3: dec_modrm(d); bit_test(d, 0, false); return;
    case 0xAB: dec_modrm(d); bit_test(d, 1, false); return;
    case 0xB3: dec_modrm(d); bit_test(d, 2, false); return;
    case 0xBB: dec_modrm(d); bit_test(d, 3, false); return;
    case 0xBA:
        dec_modrm(d);
        if ((d->reg & 7) < 4)
            break;
        bit_test(d, d->reg & 3, true);
        return;
    case 0xA4: case 0xA5: case 0xAC: case 0xAD: {
        dec_modrm(d);
        uint8_t count = b & 1 ? 0 : dec_u8(d);
        unsigned r = rmw_begin(d, d->opsize);
        unsigned op = b & 8 ? b & 1 ? OP_shrd_rc : OP_shrd_ri : b & 1 ? OP_shld_rc : OP_shld_ri;
        u = emit_flags(d, op, OP_NONE, FLAGS_ALL, 0, 0);
        u->r0 = (uint8_t)r;
        u->r1 = (uint8_t)(d->reg * 8);
        u->imm = count;
        rmw_end(d, d->opsize);
        return;
    }
    case 0xAE: dec_modrm(d); group15(d); return;
    case 0xAF: dec_modrm(d); 
        two_operands(d, OP_SIZED(imul_rr, LOG2(d->opsize)), FLAGS_ALL, FLAG_C);
        d->meta[d->out->count - 1].mark = true;
        return;
    case 0xB0: case 0xB1: {
        unsigned size = b & 1 ? d->opsize : 1;
        dec_modrm(d);
        if (d->mem) {
            d->lock_ok = true;
            emit_address(d, size, true);
            if (d->lock) {
                u = emit_helper_store(d, h_lock_cmpxchg);
            } else {
                u = impure(d, emit_flags(d, OP_cmpxchg_m, OP_NONE, FLAGS_ALL, FLAGS_ALL, 0));
                u->seg = d->ea_seg;
            }
        } else {
            u = emit_helper(d, h_cmpxchg);
            u->r0 = (uint8_t)reg_off(d, d->rm, size);
        }
        d->meta[d->out->count - 1].kills = FLAGS_ALL;
        d->meta[d->out->count - 1].reads = 0;
        u->r1 = (uint8_t)reg_off(d, d->reg, size);
        u->size = (uint8_t)size;
        return;
    }
    case 0xB2: case 0xB4: case 0xB5: {
        dec_modrm(d);
        if (!d->mem)
            break;
        if (d->opsize == 8)
            d->opsize = 4; /* AMD's load 32 bits of the register and no more of an offset (APM vol. 3, LFS, LGS, LSS) */
        emit_address(d, d->opsize + 2, false);
        u = (b == 0xB2 ? emit_helper_end : emit_helper)(d, h_load_far);
        u->r0 = (uint8_t)(d->reg * 8);
        u->aux = b == 0xB2 ? SEG_SS : b == 0xB4 ? SEG_FS : SEG_GS;
        return;
    }
    case 0xB6: dec_modrm(d); extend(d, false, 1); return;
    case 0xB7: dec_modrm(d); extend(d, false, 2); return;
    case 0xBE: dec_modrm(d); extend(d, true, 1); return;
    case 0xBF: dec_modrm(d); extend(d, true, 2); return;
    case 0xC0: case 0xC1: {
        unsigned size = b & 1 ? d->opsize : 1;
        dec_modrm(d);
        if (d->lock && d->mem) {
            d->lock_ok = true;
            emit_address(d, size, true);
            u = emit_helper_store(d, h_lock_xadd);
            u->r1 = (uint8_t)reg_off(d, d->reg, size);
            u->size = (uint8_t)size;
            return;
        }
        unsigned r = rmw_begin(d, size);
        /* The register gets the old value only when the store can no longer fault: rmw_begin has probed it. */
        u = emit_flags(d, OP_xadd, OP_NONE, FLAGS_ALL, FLAGS_ALL, 0);
        u->r0 = (uint8_t)r;
        u->r1 = (uint8_t)reg_off(d, d->reg, size);
        u->size = (uint8_t)size;
        rmw_end(d, size);
        return;
    }
    case 0xC3:
        dec_modrm(d);
        if (!d->mem || d->p66 || d->rep)
            break;
        emit_store(d, d->opsize, d->reg * 8u);
        return;
    case 0xC7: dec_modrm(d); group9(d); return;
    case 0xC8 ... 0xCF:
        u = emit_pure(d, d->opsize == 8 ? OP_bswap64 : d->opsize == 4 ? OP_bswap32 : OP_bswap16);
        u->r0 = (uint8_t)(((b & 7) | (d->rex & 1) << 3) * 8);
        return;
    default: break; /* a row of its own, or UD0, UD1, UD2, RSM, FEMMS, INVD's like and everything unknown */
    }
    d->bad = !decode_row(d, 0x0F, b);
}
