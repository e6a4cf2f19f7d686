/* The FPU's operations without the decoder: operands are fetched and results written as fpu.h demands of an executor. */
#include <string.h>

#include "oracle.h"
#include "soft/fpu/fpu.h"

enum { F_STATUS = 0x8D5 };

static uint8_t *pointer(struct memory *memory, uint64_t ea, unsigned size, bool write)
{
    if (ea >= DATA_BASE && ea + size <= DATA_BASE + (write ? DATA_WRITABLE : DATA_SIZE))
        return memory->data + (ea - DATA_BASE);
    return NULL;
}

static void finish(struct cpu_state *s, const struct insn *insn, uint32_t vector)
{
    s->vector = vector;
    s->error = 0;
    s->cr2 = 0;
    s->rip = CODE_BASE + insn->offset + (vector == 3 ? insn->length + 1 : 0);
}

static bool run_vector(const struct insn *insn, const struct vec_op *op, struct cpu_state *s, struct memory *memory, struct fpu *f)
{
    bool reg_form = insn->modrm >= 0xC0, w = insn->rex >> 3 & 1, mmx_writes = false;
    unsigned reg = (insn->modrm >> 3 & 7) | (insn->rex & 4) << 1, rm = (insn->modrm & 7) | (insn->rex & 1) << 3;
    unsigned size = op->mem_size ? op->mem_size : w ? 8 : 4;
    struct vec_context ctx = {.fpu = f, .rax = s->gpr[0], .rdx = s->gpr[2], .imm = insn->imm, .rex_w = w};
    union xmm src = {.q = {0, 0}}, dst = {.q = {0, 0}};
    bool store = op->form == VEC_STORE || op->form == VEC_GPR_STORE || op->form == VEC_MM_STORE || op->form == VEC_GPR_STORE_MM;
    bool mmx = op->form == VEC_MM_MMM || op->form == VEC_MM_STORE || op->form == VEC_MM_GPR || op->form == VEC_GPR_STORE_MM ||
               op->form == VEC_GPR_MM || op->form == VEC_MM_XMMM || op->form == VEC_MM_IMM || (op->form == VEC_XMM_MMM && reg_form);
    uint8_t *mem = NULL;
    if (op->form == VEC_MASKMOV || op->form == VEC_MM_MASKMOV)
        return false;
    if (!reg_form && op->form != VEC_EMMS) {
        mem = pointer(memory, insn->ea, size, store);
        if (!mem || (op->aligned && insn->ea & 15))
            return false;
        if (!store)
            memcpy(&src, mem, size);
    }
    if ((mmx || op->form == VEC_EMMS) && fpu_pending(f)) {
        finish(s, insn, 16);
        return true;
    }
    switch (op->form) {
    case VEC_XMM_XMMM: case VEC_FLAGS: case VEC_FLAGS_GPR: case VEC_GPR_XMMM:
        if (reg_form)
            src = f->xmm[rm];
        dst = f->xmm[reg];
        break;
    case VEC_STORE:
        src = f->xmm[reg];
        if (reg_form)
            dst = f->xmm[rm];
        break;
    case VEC_MM_MMM: case VEC_XMM_MMM: case VEC_GPR_MM:
        if (reg_form)
            src.q[0] = f->st[rm & 7].mantissa;
        if (op->form == VEC_XMM_MMM)
            dst = f->xmm[reg];
        else
            dst.q[0] = f->st[reg & 7].mantissa;
        break;
    case VEC_MM_STORE: case VEC_GPR_STORE_MM: src.q[0] = f->st[reg & 7].mantissa; break;
    case VEC_MM_XMMM:
        if (reg_form)
            src = f->xmm[rm];
        break;
    case VEC_XMM_GPR: case VEC_MM_GPR:
        if (reg_form)
            src.q[0] = w ? s->gpr[rm] : (uint32_t)s->gpr[rm];
        if (op->form == VEC_XMM_GPR)
            dst = f->xmm[reg];
        else
            dst.q[0] = f->st[reg & 7].mantissa;
        break;
    case VEC_GPR_STORE: src = f->xmm[reg]; break;
    case VEC_XMM_IMM: dst = f->xmm[rm]; break;
    case VEC_MM_IMM: dst.q[0] = f->st[rm & 7].mantissa; break;
    default: break;
    }
    if (mmx)
        fpu_enter_mmx(f);
    int fault = op->fn(&ctx, &dst, &src);
    if (fault) {
        finish(s, insn, 19);
        return true;
    }
    if (mem && store) {
        memcpy(mem, &dst, size);
    } else {
        switch (op->form) {
        case VEC_XMM_XMMM: case VEC_XMM_GPR: case VEC_XMM_MMM: f->xmm[reg] = dst; break;
        case VEC_STORE: case VEC_XMM_IMM: f->xmm[rm] = dst; break;
        case VEC_MM_MMM: case VEC_MM_GPR: case VEC_MM_XMMM: fpu_write_mmx(f, reg, dst.q[0]); break;
        case VEC_MM_STORE: case VEC_MM_IMM: fpu_write_mmx(f, rm, dst.q[0]); break;
        case VEC_GPR_STORE: case VEC_GPR_STORE_MM: s->gpr[rm] = w ? dst.q[0] : dst.d[0]; break;
        case VEC_GPR_XMMM: case VEC_GPR_MM: s->gpr[reg] = w ? dst.q[0] : dst.d[0]; break;
        case VEC_FLAGS_GPR: s->gpr[1] = dst.d[0]; break;
        default: break;
        }
    }
    (void)mmx_writes;
    if (op->form == VEC_FLAGS || op->form == VEC_FLAGS_GPR)
        s->rflags = (s->rflags & ~(uint64_t)F_STATUS) | ctx.flags;
    finish(s, insn, 3);
    return true;
}

static bool run_x87(const struct insn *insn, const struct x87_op *op, struct cpu_state *s, struct memory *memory, struct fpu *f)
{
    uint8_t buffer[128] = {0};
    struct x87_context ctx = {.fpu = f, .flags = (uint32_t)s->rflags, .modrm = insn->modrm, .operand16 = insn->operand16 && !(insn->rex & 8),
                              .protected_mode = true, .mem = buffer};
    bool store = op->form == X87_STORE || (op->form == X87_ENV && op->store_env), has_memory = insn->modrm < 0xC0;
    unsigned size = op->form == X87_ENV ? fpu_env_size(insn->opcode, insn->operand16 && !(insn->rex & 8)) : op->mem_size;
    uint8_t *mem = NULL;
    if (!op->control && fpu_pending(f)) {
        finish(s, insn, 16);
        return true;
    }
    if (has_memory) {
        mem = pointer(memory, insn->ea, size, store);
        if (!mem)
            return false;
        if (!store)
            memcpy(buffer, mem, size);
    }
    int result = op->fn(&ctx);
    if (result == FPU_OK && store && has_memory) {
        memcpy(mem, buffer, size);
        if (op->commit)
            op->commit(&ctx);
    }
    if (op->form == X87_AX)
        memcpy(&s->gpr[0], buffer, 2);
    if (op->form == X87_FLAGS)
        s->rflags = (s->rflags & ~(uint64_t)F_STATUS) | ctx.flags;
    if (op->pointers)
        fpu_set_pointers(f, insn->opcode, insn->modrm, 0x33, CODE_BASE + insn->offset, has_memory, 0, insn->ea);
    finish(s, insn, 3);
    return true;
}

bool direct_run(const struct insn *insn, struct cpu_state *s, struct memory *memory)
{
    enum { TF_AND_AC = 0x40100 };
    if (!insn->has_modrm || insn->other_prefixes || insn->mode32 || (s->rflags & TF_AND_AC))
        return false;
    struct fpu f;
    fpu_reset(&f);
    bool done;
    if (!fpu_fxrstor(&f, s->fx, true, true))
        return false;
    if (insn->map == MAP_ONE) {
        if ((insn->opcode & 0xF8) != 0xD8)
            return false;
        const struct x87_op *op = fpu_lookup_x87(insn->opcode, insn->modrm);
        if (!op)
            return false;
        done = run_x87(insn, op, s, memory, &f);
    } else {
        const struct vec_op *op = fpu_lookup_vector((enum vec_map)(insn->map - MAP_0F), insn->opcode,
                                                    (enum vec_prefix)insn->prefix, insn->modrm);
        if (!op)
            return false;
        done = run_vector(insn, op, s, memory, &f);
    }
    fpu_fxsave(&f, s->fx, true, true);
    return done;
}
