/* Decoder: the one-byte opcode map (Intel SDM vol. 2, appendix A), but for arithmetic and branches. */
#include "soft/decode/decode.h"

static void mov_reg_imm(struct dec *d, unsigned size, unsigned reg, uint64_t imm)
{
    struct uop *u = emit_pure(d, OP_SIZED(mov_ri, LOG2(size)));
    u->r0 = (uint8_t)reg;
    u->imm = imm;
}

static void push_imm(struct dec *d, int64_t imm)
{
    if (d->stack_size == 8) {
        struct uop *u = emit(d, OP_push64_i);
        u->imm = (uint64_t)imm;
        u->seg = SEG_SS;
    } else {
        struct uop *u = emit_helper_store(d, h_push_i);
        u->size = (uint8_t)d->stack_size;
        u->disp = (int32_t)imm;
    }
}

static void push_reg(struct dec *d, unsigned reg)
{
    struct uop *u;
    if (d->stack_size == 8) {
        u = emit(d, OP_push64_r);
        u->seg = SEG_SS;
    } else {
        u = emit_helper_store(d, h_push_r);
        u->size = (uint8_t)d->stack_size;
    }
    u->r1 = (uint8_t)reg;
}

static void pop_reg(struct dec *d, unsigned reg)
{
    struct uop *u;
    if (d->stack_size == 8) {
        u = emit(d, OP_pop64_r);
        u->seg = SEG_SS;
    } else {
        u = emit_helper(d, h_pop_r);
        u->size = (uint8_t)d->stack_size;
    }
    u->r0 = (uint8_t)reg;
}

void decode_push_seg(struct dec *d, unsigned seg)
{
    struct uop *u = emit_helper_store(d, h_push_seg);
    u->aux = (uint8_t)seg;
    u->size = (uint8_t)d->stack_size;
}
void decode_pop_seg(struct dec *d, unsigned seg)
{
    struct uop *u = seg == SEG_SS ? emit_helper_end(d, h_pop_seg) : emit_helper(d, h_pop_seg);
    u->aux = (uint8_t)seg;
    u->size = (uint8_t)d->stack_size;
}

static void string_op(struct dec *d, unsigned op, unsigned size)
{
    struct uop *u = op == STR_LODS || op == STR_SCAS || op == STR_CMPS || op == STR_OUTS ? emit_helper(d, h_string)
                                                                                         : emit_helper_store(d, h_string);
    u->size = (uint8_t)size;
    u->aux = (uint8_t)op;
    u->r0 = d->rep == 0xF3 ? 1 : d->rep == 0xF2 ? 2 : 0;
    u->base = (uint8_t)d->adsize;
    u->seg = (uint8_t)(d->seg >= 0 ? d->seg : SEG_DS);
    /* A repeated one may stop half-way, so it ends the block. */
    if (d->rep || op == STR_INS || op == STR_OUTS) {
        u->op = OP_call_helper_end;
        d->end = true;
        u->r1 = 1;
    }
}

static void group5(struct dec *d)
{
    switch (d->reg & 7) {
    case 0: decode_inc_dec(d, UN_INC, d->opsize); return;
    case 1: decode_inc_dec(d, UN_DEC, d->opsize); return;
    case 2: case 4: decode_branch_rm(d, (d->reg & 7) == 2); return;
    case 3: case 5:
        if (!d->mem) {
            d->bad = true;
            return;
        }
        emit_address(d, d->opsize + 2, false);
        emit_helper_end(d, (d->reg & 7) == 3 ? h_call_far_m : h_jmp_far_m);
        return;
    case 6:
        push_reg(d, source_rm(d, d->stack_size));
        return;
    default: d->bad = true;
    }
}

/* MOV between the accumulator and an absolute offset. */
static void mov_offset(struct dec *d)
{
    unsigned size = width(d);
    uint64_t offset = d->adsize == 8 ? dec_u64(d) : d->adsize == 4 ? dec_u32(d) : dec_u16(d);
    bool is_store = d->opcode & 2;
    d->mem = true;
    d->ea_seg = (uint8_t)(d->seg >= 0 ? d->seg : SEG_DS);
    struct uop *u;
    if (d->c64) {
        u = emit(d, OP_ea_abs);
        u->imm = offset;
        u->aux = d->ea_seg >= SEG_FS;
    } else {
        u = emit(d, OP_ea_legacy);
        u->disp = (int32_t)offset;
        u->imm = UINT32_MAX;
        u->size = (uint8_t)size;
        u->aux = is_store;
    }
    u->seg = d->ea_seg;
    u = emit(d, is_store ? OP_FORMED(store_r, LOG2(size), 0) : OP_FORMED(load_r, LOG2(size), 0));
    u->base = OFF_T0;
    u->seg = d->ea_seg;
    u->r0 = u->r1 = RAX * 8;
}

static void xchg(struct dec *d, unsigned size)
{
    if (d->mem) {
        d->lock_ok = true;
        emit_address(d, size, true);
        struct uop *u = emit_helper_store(d, h_xchg_m);
        u->r0 = (uint8_t)reg_off(d, d->reg, size);
        u->size = (uint8_t)size;
        return;
    }
    struct uop *u = emit_pure(d, OP_SIZED(xchg_rr, LOG2(size)));
    u->r0 = (uint8_t)reg_off(d, d->rm, size);
    u->r1 = (uint8_t)reg_off(d, d->reg, size);
}

static void lea(struct dec *d)
{
    if (!d->mem) {
        d->bad = true;
        return;
    }
    struct uop *u;
    unsigned to = reg_off(d, d->reg, d->opsize);
    if (d->ea_rip && d->adsize == 8) {
        u = emit_pure(d, OP_lea_rip);
        u->imm = (uint64_t)(int64_t)d->ea_disp;
        d->rip_fix = (int)d->out->count - 1;
    } else if (d->ea_rip) {
        emit_address(d, 1, false);
        d->out->uops[d->out->count - 1].aux = 0;
        u = emit_pure(d, OP_SIZED(mov_rr, LOG2(d->opsize)));
        u->r1 = OFF_T0;
    } else {
        if (d->adsize == 8) {
            u = emit_pure(d, OP_FORMED(lea_r, LOG2(d->opsize), d->ea_index != OFF_ZERO));
        } else {
            u = emit_pure(d, OP_lea_mask);
            u->imm = d->adsize == 4 ? UINT32_MAX : 0xFFFF;
        }
        u->base = d->ea_base;
        u->index = d->ea_index;
        u->scale = d->ea_scale;
        u->disp = d->ea_disp;
    }
    u->r0 = (uint8_t)to;
}

static void mov_seg(struct dec *d, bool to_seg)
{
    unsigned seg = d->reg & 7;
    if (seg > SEG_GS || (to_seg && seg == SEG_CS)) {
        d->bad = true;
        return;
    }
    if (d->mem)
        emit_address(d, 2, !to_seg);
    struct uop *u;
    if (to_seg)
        u = (seg == SEG_SS ? emit_helper_end : emit_helper)(d, d->mem ? h_mov_to_seg_m : h_mov_to_seg);
    else
        u = d->mem ? emit_helper_store(d, h_mov_from_seg_m) : emit_helper(d, h_mov_from_seg);
    u->r0 = (uint8_t)(d->rm * 8);
    u->aux = (uint8_t)seg;
}

static void io(struct dec *d, bool out, unsigned size, int port)
{
    struct uop *u = emit_helper_end(d, out ? h_out : h_in);
    u->size = (uint8_t)size;
    u->disp = port;
}

static void simple_end(struct dec *d, helper_fn helper)
{
    emit_helper_end(d, helper)->size = (uint8_t)d->stack_size;
}

static void x87(struct dec *d)
{
    dec_modrm(d);
    const struct x87_op *op = fpu_lookup_x87(d->opcode, d->modrm);
    if (!op || op->form == X87_NONE) {
        d->bad = true;
        return;
    }
    unsigned size = op->mem_size;
    if (op->form == X87_ENV) {
        bool save = (d->opcode & 4) != 0; /* DD /4, /6: FRSTOR, FNSAVE; D9 /4, /6: FLDENV, FNSTENV */
        size = (d->opsize == 2 ? 14 : 28) + (save ? 80 : 0);
    }
    emit_fpu_check(d, 2);
    if (d->mem && op->form != X87_REG && op->form != X87_AX)
        emit_address(d, size, op->form == X87_STORE || (op->form == X87_ENV && op->store_env));
    struct uop *u = emit_helper_store(d, h_x87);
    u->size = (uint8_t)size;
    u->r0 = d->opcode;
    u->r1 = d->modrm;
    u->aux = d->opsize == 2;
    u->base = d->mem;
    u = emit(d, OP_nop);
    u->ptr = op;
}

void decode_opcode(struct dec *d)
{
    uint8_t b = d->opcode;
    struct uop *u;
    if (b < 0x40 && (b & 7) < 6) {
        unsigned op = b >> 3, size = width(d);
        switch (b & 7) {
        case 0: case 1: dec_modrm(d); decode_alu_rm_reg(d, op, size); return;
        case 2: case 3: dec_modrm(d); decode_alu_reg_rm(d, op, size); return;
        default: decode_alu_reg_imm(d, op, size, RAX * 8, dec_imm(d, size)); return;
        }
    }
    switch (b) {
    case 0x0F: decode_two_byte(d); return;
    case 0x06: case 0x0E: case 0x16: case 0x1E:
        if (d->c64)
            break;
        decode_push_seg(d, b >> 3);
        return;
    case 0x07: case 0x17: case 0x1F:
        if (d->c64)
            break;
        decode_pop_seg(d, b >> 3);
        return;
    case 0x27: case 0x2F: case 0x37: case 0x3F: {
        static const helper_fn table[4] = {h_daa, h_das, h_aaa, h_aas};
        if (d->c64)
            break;
        emit_helper(d, table[(b - 0x27) >> 3]);
        return;
    }
    case 0x40 ... 0x4F:
        u = emit_flags(d, OP_OF(unary_r, b & 8 ? UN_DEC : UN_INC, LOG2(d->opsize), 0, 0), OP_OF(unary_r, b & 8 ? UN_DEC : UN_INC, LOG2(d->opsize), 1, 0),
                       FLAGS_REST, FLAGS_REST, 0);
        u->r0 = (uint8_t)((b & 7) * 8);
        return;
    case 0x50 ... 0x57: push_reg(d, ((b & 7u) | (d->rex & 1u) << 3) * 8); return;
    case 0x58 ... 0x5F: pop_reg(d, ((b & 7u) | (d->rex & 1u) << 3) * 8); return;
    case 0x60: case 0x61:
        if (d->c64)
            break;
        emit_helper_store(d, b == 0x60 ? h_pusha : h_popa);
        return;
    case 0x62:
        if (d->c64)
            break;
        dec_modrm(d);
        if (!d->mem)
            break;
        emit_address(d, d->opsize * 2, false);
        u = emit_helper(d, h_bound);
        u->r0 = (uint8_t)(d->reg * 8);
        return;
    case 0x63:
        dec_modrm(d);
        if (!d->c64) {
            if (d->mem)
                emit_address(d, 2, false);
            u = emit_helper_store(d, d->mem ? h_arpl_m : h_arpl_r);
            u->r0 = (uint8_t)(d->rm * 8);
            u->r1 = (uint8_t)(d->reg * 8);
            return;
        }
        if (d->opsize == 8) {
            if (d->mem) {
                int form = address_form(d, 4, false);
                u = emit(d, OP_OF(movsx_rm, 2, 3, 0, form));
                operand(d, u);
            } else {
                u = emit_pure(d, OP_OF(movsx_rr, 2, 3, 0, 0));
                u->r1 = (uint8_t)(d->rm * 8);
            }
            u->r0 = (uint8_t)(d->reg * 8);
        } else {
            /* MOVSXD without REX.W. AMD processors read four bytes, whatever the operand size. */
            if (d->mem)
                emit_load(d, 4, OFF_T1);
            u = emit_pure(d, OP_SIZED(mov_rr, LOG2(d->opsize)));
            u->r0 = (uint8_t)(d->reg * 8);
            u->r1 = d->mem ? OFF_T1 : (uint8_t)(d->rm * 8);
        }
        return;
    case 0x68: push_imm(d, dec_imm(d, d->opsize == 2 ? 2 : 4)); return;
    case 0x6A: push_imm(d, (int8_t)dec_u8(d)); return;
    case 0x69: case 0x6B: dec_modrm(d); decode_imul3(d, b == 0x6B); return;
    case 0x6C: case 0x6D: string_op(d, STR_INS, b & 1 ? d->opsize == 2 ? 2 : 4 : 1); return;
    case 0x6E: case 0x6F: string_op(d, STR_OUTS, b & 1 ? d->opsize == 2 ? 2 : 4 : 1); return;
    case 0x70 ... 0x7F: {
        int64_t rel = decode_displacement(d, true);
        decode_jcc(d, b & 15, rel);
        return;
    }
    case 0x80: case 0x81: case 0x82: case 0x83: {
        if (b == 0x82 && d->c64)
            break;
        dec_modrm(d);
        unsigned size = width(d);
        /* rip-relative operands are fixed up at the end, so the order of immediate and address does not matter. */
        int64_t imm = b == 0x81 ? dec_imm(d, size) : (int8_t)dec_u8(d);
        decode_alu_rm_imm(d, d->reg & 7, size, imm);
        return;
    }
    case 0x84: case 0x85: dec_modrm(d); decode_alu_rm_reg(d, ALU_TEST, width(d)); return;
    case 0x86: case 0x87: dec_modrm(d); xchg(d, width(d)); return;
    case 0x88: case 0x89: {
        unsigned size = width(d);
        dec_modrm(d);
        if (d->mem) {
            emit_store(d, size, reg_off(d, d->reg, size));
        } else {
            u = emit_pure(d, OP_SIZED(mov_rr, LOG2(size)));
            u->r0 = (uint8_t)reg_off(d, d->rm, size);
            u->r1 = (uint8_t)reg_off(d, d->reg, size);
        }
        return;
    }
    case 0x8A: case 0x8B: {
        unsigned size = width(d);
        dec_modrm(d);
        if (d->mem) {
            emit_load(d, size, reg_off(d, d->reg, size));
        } else {
            u = emit_pure(d, OP_SIZED(mov_rr, LOG2(size)));
            u->r0 = (uint8_t)reg_off(d, d->reg, size);
            u->r1 = (uint8_t)reg_off(d, d->rm, size);
        }
        return;
    }
    case 0x8C: dec_modrm(d); mov_seg(d, false); return;
    case 0x8E: dec_modrm(d); mov_seg(d, true); return;
    case 0x8D: dec_modrm(d); lea(d); return;
    case 0x8F:
        dec_modrm(d);
        if (d->reg & 7)
            break;
        if (!d->mem) {
            pop_reg(d, d->rm * 8u);
            return;
        }
        /* The address is computed after the pop: with RSP as base, it is the new one. */
        if (d->ea_base == RSP * 8)
            d->ea_disp += (int32_t)d->stack_size;
        emit_address(d, d->stack_size, true);
        u = emit_helper_store(d, h_pop_m);
        u->size = (uint8_t)d->stack_size;
        return;
    case 0x90:
        if (!(d->rex & 1)) {
            if (d->rep == 0xF3)
                emit_helper_end(d, h_pause);
            else
                emit_pure(d, OP_nop);
            return;
        }
        /* fall through */
    case 0x91 ... 0x97:
        u = emit_pure(d, OP_SIZED(xchg_rr, LOG2(d->opsize)));
        u->r0 = RAX * 8;
        u->r1 = (uint8_t)(((b & 7u) | (d->rex & 1u) << 3) * 8);
        return;
    case 0x98: emit_pure(d, d->opsize == 8 ? OP_cdqe : d->opsize == 4 ? OP_cwde : OP_cbw); return;
    case 0x99: emit_pure(d, d->opsize == 8 ? OP_cqo : d->opsize == 4 ? OP_cdq : OP_cwd); return;
    case 0x9A:
        if (d->c64)
            break;
        decode_far_immediate(d, h_call_far);
        return;
    case 0x9B: emit_helper(d, h_fwait); return;
    case 0x9C: emit_helper_store(d, h_pushf)->size = (uint8_t)d->stack_size; return;
    case 0x9D: simple_end(d, h_popf); return;
    case 0x9E: emit_helper(d, h_sahf); return;
    case 0x9F: emit_helper(d, h_lahf); return;
    case 0xA0 ... 0xA3: mov_offset(d); return;
    case 0xA4: case 0xA5: string_op(d, STR_MOVS, width(d)); return;
    case 0xA6: case 0xA7: string_op(d, STR_CMPS, width(d)); return;
    case 0xA8: case 0xA9: decode_alu_reg_imm(d, ALU_TEST, width(d), RAX * 8, dec_imm(d, width(d))); return;
    case 0xAA: case 0xAB: string_op(d, STR_STOS, width(d)); return;
    case 0xAC: case 0xAD: string_op(d, STR_LODS, width(d)); return;
    case 0xAE: case 0xAF: string_op(d, STR_SCAS, width(d)); return;
    case 0xB0 ... 0xB7: {
        unsigned reg = reg_off(d, (b & 7u) | (d->rex & 1u) << 3, 1);
        mov_reg_imm(d, 1, reg, dec_u8(d));
        return;
    }
    case 0xB8 ... 0xBF: {
        uint64_t imm = d->opsize == 8 ? dec_u64(d) : d->opsize == 4 ? dec_u32(d) : dec_u16(d);
        mov_reg_imm(d, d->opsize, ((b & 7u) | (d->rex & 1u) << 3) * 8, imm);
        return;
    }
    case 0xC0: case 0xC1: {
        dec_modrm(d);
        int count = dec_u8(d);
        decode_shift(d, width(d), count);
        return;
    }
    case 0xD0: case 0xD1: dec_modrm(d); decode_shift(d, width(d), 1); return;
    case 0xD2: case 0xD3: dec_modrm(d); decode_shift(d, width(d), -1); return;
    case 0xC2: decode_ret(d, dec_u16(d)); return;
    case 0xC3: decode_ret(d, 0); return;
    case 0xC4: case 0xC5:
        if (decode_vex(d))
            return;
        dec_modrm(d);
        if (!d->mem)
            break;
        emit_address(d, d->opsize + 2, false);
        u = emit_helper(d, h_load_far);
        u->r0 = (uint8_t)(d->reg * 8);
        u->aux = b == 0xC4 ? SEG_ES : SEG_DS;
        return;
    case 0xC6: case 0xC7: {
        unsigned size = width(d);
        dec_modrm(d);
        if (d->reg & 7)
            break;
        int64_t imm = dec_imm(d, size);
        if (!d->mem) {
            mov_reg_imm(d, size, reg_off(d, d->rm, size), (uint64_t)imm);
            return;
        }
        int form = address_form(d, size, true);
        u = emit(d, OP_FORMED(store_i, LOG2(size), form));
        operand(d, u);
        u->imm = (uint64_t)imm;
        return;
    }
    case 0xC8: {
        uint16_t frame = dec_u16(d);
        uint8_t level = dec_u8(d);
        u = emit_helper_store(d, h_enter);
        u->disp = frame;
        u->aux = level & 31;
        u->size = (uint8_t)d->stack_size;
        return;
    }
    case 0xC9:
        if (d->stack_size == 8) {
            emit(d, OP_leave64)->seg = SEG_SS;
        } else {
            emit_helper(d, h_leave)->size = (uint8_t)d->stack_size;
        }
        return;
    case 0xCA: case 0xCB: {
        unsigned pop = b == 0xCA ? dec_u16(d) : 0;
        emit_helper_end(d, h_ret_far)->disp = (int32_t)pop;
        return;
    }
    case 0xCC: emit_helper_end(d, h_int3); return;
    case 0xCD: {
        uint8_t vector = dec_u8(d);
        emit_helper_end(d, h_int)->aux = vector;
        return;
    }
    case 0xCE:
        if (d->c64)
            break;
        emit_helper_end(d, h_into);
        return;
    case 0xCF: emit_helper_end(d, h_iret); return;
    case 0xD4: case 0xD5: {
        if (d->c64)
            break;
        uint8_t base = dec_u8(d);
        emit_helper(d, b == 0xD4 ? h_aam : h_aad)->aux = base;
        return;
    }
    case 0xD6:
        if (d->c64)
            break;
        emit_helper(d, h_salc);
        return;
    case 0xD7:
        u = emit_helper(d, h_xlat);
        u->seg = (uint8_t)(d->seg >= 0 ? d->seg : SEG_DS);
        u->base = (uint8_t)d->adsize;
        return;
    case 0xD8 ... 0xDF: x87(d); return;
    case 0xE0 ... 0xE3: {
        int64_t rel = decode_displacement(d, true);
        u = emit_helper_end(d, h_loop);
        u->disp = (int32_t)rel;
        /* A repeat prefix decides whether LOOPNE and LOOPE want ZF clear or set: AMD processors do so. */
        u->aux = b <= 0xE1 && d->rep ? d->rep == 0xF3 : b & 3;
        u->base = (uint8_t)d->adsize;
        return;
    }
    case 0xE4: case 0xE5: io(d, false, b & 1 ? d->opsize == 2 ? 2 : 4 : 1, dec_u8(d)); return;
    case 0xE6: case 0xE7: io(d, true, b & 1 ? d->opsize == 2 ? 2 : 4 : 1, dec_u8(d)); return;
    case 0xEC: case 0xED: io(d, false, b & 1 ? d->opsize == 2 ? 2 : 4 : 1, -1); return;
    case 0xEE: case 0xEF: io(d, true, b & 1 ? d->opsize == 2 ? 2 : 4 : 1, -1); return;
    case 0xE8: decode_call_rel(d, decode_displacement(d, false)); return;
    case 0xE9: decode_jump_rel(d, decode_displacement(d, false)); return;
    case 0xEB: decode_jump_rel(d, decode_displacement(d, true)); return;
    case 0xEA:
        if (d->c64)
            break;
        decode_far_immediate(d, h_jmp_far);
        return;
    case 0xF1: emit_helper_end(d, h_icebp); return;
    case 0xF4: emit_helper_end(d, h_hlt); return;
    case 0xF5: emit_helper(d, h_cmc); return;
    case 0xF6: case 0xF7: dec_modrm(d); decode_group3(d); return;
    case 0xF8: emit_helper(d, h_clc); return;
    case 0xF9: emit_helper(d, h_stc); return;
    case 0xFA: emit_helper(d, h_cli); return;
    case 0xFB: emit_helper_end(d, h_sti); return;
    case 0xFC: emit_helper(d, h_cld); return;
    case 0xFD: emit_helper(d, h_std); return;
    case 0xFE:
        dec_modrm(d);
        if ((d->reg & 7) > 1)
            break;
        decode_inc_dec(d, d->reg & 7 ? UN_DEC : UN_INC, 1);
        return;
    case 0xFF: dec_modrm(d); group5(d); return;
    default: break;
    }
    d->bad = true;
}
