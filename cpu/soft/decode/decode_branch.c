/* Decoder: near branches, and far ones to an immediate address (Intel SDM vol. 2, appendix A). */
#include "soft/decode/decode.h"

/* Near branches of 64-bit mode have a 64-bit operand size; with a 66 prefix and without REX.W, 16 bits, as on AMD
 * processors (Intel's ignore the prefix). Those go through the helpers of the other modes. */
static bool near64(const struct dec *d) { return d->c64 && d->opsize != 2; }

int64_t decode_displacement(struct dec *d, bool byte)
{
    if (byte)
        return (int8_t)dec_u8(d);
    return d->opsize == 2 ? (int16_t)dec_u16(d) : (int32_t)dec_u32(d);
}

void decode_jump_rel(struct dec *d, int64_t rel)
{
    if (near64(d)) {
        emit(d, OP_jmp_rel);
        emit_links(d, d->pos + rel);
    } else {
        emit_helper_end(d, h_jmp_rel)->disp = (int32_t)rel;
    }
}

void decode_jcc(struct dec *d, unsigned cc, int64_t rel)
{
    if (d->missing || d->pos - d->start > 15 || d->lock)
        return;
    if (!near64(d)) {
        struct uop *u = emit_helper_end(d, h_jcc_rel);
        u->disp = (int32_t)rel;
        u->aux = (uint8_t)cc;
        return;
    }
    if (d->insn > 0) {
        struct uop *last = &d->out->uops[d->out->count - 1];
        struct uop_meta *m = &d->meta[d->out->count - 1];
        if (m->fuse && last->idx == d->insn - 1) {
            unsigned both = (m->fuse - 1u) << 4 | cc, size = LOG2(last->size);
            unsigned op = m->fuse_imm ? OP_OF(fused_ri, both, size, 0, 0) : OP_OF(fused_rr, both, size, 0, 0);
            if (op_handler(op)) {
                last->op = op;
                last->idx = (uint8_t)d->insn;
                last->off = (uint16_t)d->start;
                m->without = OP_NONE;
                d->fused = true;
                emit_links(d, d->pos + rel);
                return;
            }
        }
    }
    emit_flags(d, OP_OF(jcc_rel, cc, 0, 0, 0), OP_NONE, 0, 0, FLAGS_ALL);
    emit_links(d, d->pos + rel);
}

void decode_call_rel(struct dec *d, int64_t rel)
{
    if (near64(d)) {
        emit(d, OP_call_rel)->seg = SEG_SS;
        emit_links(d, d->pos + rel);
    } else {
        emit_helper_end(d, h_call_rel)->disp = (int32_t)rel;
    }
}

void decode_ret(struct dec *d, unsigned pop)
{
    if (near64(d)) {
        struct uop *u = emit(d, OP_ret64);
        u->imm = pop;
        u->seg = SEG_SS;
        d->end = true;
    } else {
        emit_helper_end(d, h_ret)->disp = (int32_t)pop;
    }
}

void decode_branch_rm(struct dec *d, bool call)
{
    struct uop *u;
    unsigned size = near64(d) ? 8 : d->opsize, r = source_rm(d, size);
    if (near64(d)) {
        u = emit(d, call ? OP_call_r : OP_jmp_r);
        d->end = true;
        u->seg = SEG_SS;
    } else {
        u = emit_helper_end(d, call ? h_call_r : h_jmp_r);
    }
    u->r1 = (uint8_t)r;
}

void decode_far_immediate(struct dec *d, helper_fn helper)
{
    uint32_t offset = d->opsize == 2 ? dec_u16(d) : dec_u32(d);
    uint16_t selector = dec_u16(d);
    struct uop *u = emit_helper_end(d, helper);
    u->disp = (int32_t)offset;
    u->r0 = (uint8_t)selector;
    u->r1 = (uint8_t)(selector >> 8);
}
