/* Decoder: arithmetic of the one-byte opcode map (Intel SDM vol. 2, appendix A). */
#include "soft/decode/decode.h"

static struct uop *emit_alu(struct dec *d, unsigned op, unsigned with, unsigned without)
{
    unsigned reads = op == ALU_ADC || op == ALU_SBB ? FLAG_C : 0;
    struct uop *u = emit_flags(d, with, without, FLAGS_ALL, FLAGS_ALL, reads);
    d->meta[d->out->count - 1].mark = true;
    d->meta[d->out->count - 1].pure = !d->mem;
    return u;
}

static void note_fusable(struct dec *d, unsigned op, bool imm)
{
    if (op < ALU_CMP)
        return;
    struct uop_meta *m = &d->meta[d->out->count - 1];
    m->fuse = (uint8_t)(1 + (op == ALU_TEST ? FUSE_TEST : FUSE_CMP));
    m->fuse_imm = imm;
}

/* LOCK: memory op= register, or the immediate `imm` if reg is negative. */
static void locked_alu(struct dec *d, unsigned op, unsigned size, int reg, int64_t imm)
{
    d->lock_ok = true;
    emit_address(d, size, true);
    struct uop *u = emit_helper_store(d, h_lock_alu);
    u->aux = (uint8_t)op;
    u->size = (uint8_t)size;
    u->index = reg < 0;
    u->r1 = (uint8_t)(reg < 0 ? 0 : reg);
    u->disp = (int32_t)imm;
}
static void locked_unary(struct dec *d, unsigned op, unsigned size)
{
    d->lock_ok = true;
    emit_address(d, size, true);
    struct uop *u = emit_helper_store(d, h_lock_unary);
    u->aux = (uint8_t)op;
    u->size = (uint8_t)size;
}

/* r/m op= register */
void decode_alu_rm_reg(struct dec *d, unsigned op, unsigned size)
{
    unsigned s = LOG2(size), reg = reg_off(d, d->reg, size);
    struct uop *u;
    if (!d->mem) {
        u = emit_alu(d, op, OP_OF(alu_rr, op, s, 0, 0), OP_OF(alu_rr, op, s, 1, 0));
        u->r0 = (uint8_t)reg_off(d, d->rm, size);
        u->size = (uint8_t)size;
        u->r1 = (uint8_t)reg;
        note_fusable(d, op, false);
        return;
    }
    if (d->lock && op < ALU_CMP) {
        locked_alu(d, op, size, (int)reg, 0);
        return;
    }
    int form = address_form(d, size, op < ALU_CMP);
    u = emit_alu(d, op, OP_OF(alu_mr, op, s, 0, form), OP_OF(alu_mr, op, s, 1, form));
    operand(d, u);
    u->r1 = (uint8_t)reg;
}

/* register op= r/m */
void decode_alu_reg_rm(struct dec *d, unsigned op, unsigned size)
{
    unsigned s = LOG2(size), reg = reg_off(d, d->reg, size);
    struct uop *u;
    if (!d->mem) {
        u = emit_alu(d, op, OP_OF(alu_rr, op, s, 0, 0), OP_OF(alu_rr, op, s, 1, 0));
        u->r0 = (uint8_t)reg;
        u->size = (uint8_t)size;
        u->r1 = (uint8_t)reg_off(d, d->rm, size);
        note_fusable(d, op, false);
        return;
    }
    int form = address_form(d, size, false);
    u = emit_alu(d, op, OP_OF(alu_rm, op, s, 0, form), OP_OF(alu_rm, op, s, 1, form));
    operand(d, u);
    u->r0 = (uint8_t)reg;
}

void decode_alu_reg_imm(struct dec *d, unsigned op, unsigned size, unsigned reg, int64_t imm)
{
    unsigned s = LOG2(size);
    struct uop *u = emit_alu(d, op, OP_OF(alu_ri, op, s, 0, 0), OP_OF(alu_ri, op, s, 1, 0));
    u->r0 = (uint8_t)reg;
    u->size = (uint8_t)size;
    u->imm = (uint64_t)imm;
    note_fusable(d, op, true);
}

void decode_alu_rm_imm(struct dec *d, unsigned op, unsigned size, int64_t imm)
{
    if (!d->mem) {
        decode_alu_reg_imm(d, op, size, reg_off(d, d->rm, size), imm);
        return;
    }
    unsigned s = LOG2(size);
    if (d->lock && op < ALU_CMP) {
        locked_alu(d, op, size, -1, imm);
        return;
    }
    int form = address_form(d, size, op < ALU_CMP);
    struct uop *u = emit_alu(d, op, OP_OF(alu_mi, op, s, 0, form), OP_OF(alu_mi, op, s, 1, form));
    operand(d, u);
    u->imm = (uint64_t)imm;
}

void decode_shift(struct dec *d, unsigned size, int count) /* count -1: CL */
{
    unsigned op = d->reg & 7, s = LOG2(size);
    if (count >= 0) {
        count &= size == 8 ? 63 : 31;
        if (count == 0) {
            /* Memory is written all the same; 32-bit registers are zero-extended. */
            unsigned r = rmw_begin(d, size);
            struct uop *u = emit_pure(d, OP_SIZED(mov_rr, s));
            u->r0 = u->r1 = (uint8_t)r;
            rmw_end(d, size);
            return;
        }
    }
    unsigned r = rmw_begin(d, size);
    struct uop *u;
    bool rotate = op < SH_SHL, carry = op == SH_RCL || op == SH_RCR;
    if (count >= 0) {
        u = emit_flags(d, OP_OF(shift_ri, op, s, 0, 0), OP_OF(shift_ri, op, s, 1, 0), FLAGS_ALL, rotate ? FLAG_C : FLAGS_ALL, carry ? FLAG_C : 0);
        u->imm = (uint64_t)count;
    } else {
        u = emit_flags(d, OP_OF(shift_rc, op, s, 0, 0), OP_NONE, FLAGS_ALL, 0, carry ? FLAG_C : 0);
        d->meta[d->out->count - 1].mark = true;
    }
    u->r0 = (uint8_t)r;
    rmw_end(d, size);
}

void decode_group3(struct dec *d)
{
    unsigned size = width(d), s = LOG2(size);
    struct uop *u;
    switch (d->reg & 7) {
    case 0: case 1:
        decode_alu_rm_imm(d, ALU_TEST, size, dec_imm(d, size));
        return;
    case 2: case 3: {
        unsigned op = (d->reg & 7) == 2 ? UN_NOT : UN_NEG, effects = op == UN_NEG ? FLAGS_ALL : 0;
        if (d->mem && d->lock) {
            locked_unary(d, op, size);
        } else if (d->mem) {
            int form = address_form(d, size, true);
            u = impure(d, emit_flags(d, OP_OF(unary_m, op, s, 0, form), OP_OF(unary_m, op, s, 1, form), effects, effects, 0));
            operand(d, u);
        } else {
            u = emit_flags(d, OP_OF(unary_r, op, s, 0, 0), OP_OF(unary_r, op, s, 1, 0), effects, effects, 0);
            d->meta[d->out->count - 1].mark = effects != 0;
            u->r0 = (uint8_t)reg_off(d, d->rm, size);
        }
        return;
    }
    default: {
        unsigned op = d->reg & 7, r = source_rm(d, size);
        static const uint16_t table[4] = {OP_mul_r, OP_imul_r, OP_div_r, OP_idiv_r};
        u = emit_flags(d, table[op - 4] + s, OP_NONE, op < 6 ? FLAGS_ALL : FLAGS_REST, op < 6 ? FLAG_C : FLAGS_REST, 0);
        if (op >= 6)
            impure(d, u);
        u->r1 = (uint8_t)r;
        return;
    }
    }
}

void decode_inc_dec(struct dec *d, unsigned op, unsigned size)
{
    unsigned s = LOG2(size);
    struct uop *u;
    if (d->mem && d->lock) {
        locked_unary(d, op, size);
    } else if (d->mem) {
        int form = address_form(d, size, true);
        u = impure(d, emit_flags(d, OP_OF(unary_m, op, s, 0, form), OP_OF(unary_m, op, s, 1, form), FLAGS_REST, FLAGS_REST, 0));
        operand(d, u);
    } else {
        u = emit_flags(d, OP_OF(unary_r, op, s, 0, 0), OP_OF(unary_r, op, s, 1, 0), FLAGS_REST, FLAGS_REST, 0);
        d->meta[d->out->count - 1].mark = true;
        u->r0 = (uint8_t)reg_off(d, d->rm, size);
    }
}

void decode_imul3(struct dec *d, bool byte)
{
    int64_t imm;
    if (d->mem) {
        /* The immediate follows the address, whose micro-ops are emitted first. */
        unsigned r = source_rm(d, d->opsize);
        imm = byte ? (int8_t)dec_u8(d) : dec_imm(d, d->opsize);
        struct uop *u = emit_flags(d, OP_SIZED(imul_rri, LOG2(d->opsize)), OP_NONE, FLAGS_ALL, FLAG_C, 0);
        d->meta[d->out->count - 1].mark = true;
        u->r0 = (uint8_t)(d->reg * 8);
        u->r1 = (uint8_t)r;
        u->imm = (uint64_t)imm;
        return;
    }
    imm = byte ? (int8_t)dec_u8(d) : dec_imm(d, d->opsize);
    struct uop *u = emit_flags(d, OP_SIZED(imul_rri, LOG2(d->opsize)), OP_NONE, FLAGS_ALL, FLAG_C, 0);
    d->meta[d->out->count - 1].mark = true;
    u->r0 = (uint8_t)(d->reg * 8);
    u->r1 = (uint8_t)(d->rm * 8);
    u->imm = (uint64_t)imm;
}
