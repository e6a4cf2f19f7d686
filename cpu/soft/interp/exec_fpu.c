/* Execution of x87, MMX and SSE instructions: operands and faults here, the operations in fpu/. */
#include "soft/mmu/access.h"
#include "soft/interp/exec.h"
#include "soft/ops/helpers.h"

HELPER(h_fpu_check)
{
    if (u->aux == 2) {
        if (c->cr0 & (CR0_EM | CR0_TS))
            soft_raise(c, VEC_NM);
        return;
    }
    if ((c->cr0 & CR0_EM) || (u->aux == 0 && !(c->cr4 & CR4_OSFXSR)))
        soft_raise(c, VEC_UD);
    if (c->cr0 & CR0_TS)
        soft_raise(c, VEC_NM);
}
static void check_pending(struct soft_vcpu *c)
{
    if (SOFT_UNLIKELY(fpu_pending(&c->fpu)) && (c->cr0 & CR0_NE))
        soft_raise(c, VEC_MF);
}
HELPER(h_fwait)
{
    if ((c->cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS))
        soft_raise(c, VEC_NM);
    check_pending(c);
}

static void mask_move(struct soft_vcpu *c, const struct uop *u, const uint8_t *data, const uint8_t *mask, unsigned size)
{
    uint64_t offset = c->gpr[RDI];
    if (u->base < 8)
        offset &= u->base == 4 ? UINT32_MAX : 0xFFFF;
    uint64_t at;
    if (c->code64)
        at = offset + (u->seg >= SEG_FS ? c->seg[u->seg].base : 0);
    else
        at = soft_seg_check(c, u->seg, offset, size, true);
    /* All of it, whatever the mask, in pieces of eight bytes, as AMD processors do. */
    soft_check_alignment(c, at, 8);
    soft_probe_write(c, at, 1);
    if (((at + size - 1) ^ at) >> 12)
        soft_probe_write(c, (at | 0xFFF) + 1, 1);
    for (unsigned i = 0; i < size; i++)
        if (mask[i] & 0x80)
            store(c, at + i, 1, data[i]);
}

/* r0: ModRM.reg, r1: ModRM.rm, index: memory operand, aux: REX.W, scale: MMX, disp: imm8; the next micro-op's ptr. */
HELPER(h_vector)
{
    const struct vec_op *op = u[1].ptr;
    struct fpu *f = &c->fpu;
    struct vec_context ctx = {.fpu = f, .rax = c->gpr[RAX], .rdx = c->gpr[RDX], .imm = (uint8_t)u->disp, .rex_w = u->aux};
    union xmm dst = {.q = {0, 0}}, src = {.q = {0, 0}};
    unsigned reg = u->r0, rm = u->r1, size = u->size, wide = u->aux ? 8 : 4;
    bool mem = u->index;
    uint64_t at = c->tmp[0];
    int fault = FPU_OK;

    if (u->scale)
        check_pending(c);
    if (mem && op->aligned && size == 16 && (at & 15))
        soft_raise_error(c, VEC_GP, 0);
    switch (op->form) {
    case VEC_XMM_XMMM:
        if (mem)
            load_any(c, at, &src, size);
        fault = op->fn(&ctx, &f->xmm[reg], mem ? &src : &f->xmm[rm]);
        break;
    case VEC_STORE:
        if (!mem) {
            fault = op->fn(&ctx, &f->xmm[rm], &f->xmm[reg]);
            break;
        }
        if (!op->dst_write_only)
            load_any(c, at, &dst, size);
        fault = op->fn(&ctx, &dst, &f->xmm[reg]);
        if (!fault)
            store_any(c, at, &dst, size);
        break;
    case VEC_XMM_GPR:
        if (mem)
            load_any(c, at, &src, size);
        else
            src.q[0] = get_reg(c, rm * 8, wide);
        fault = op->fn(&ctx, &f->xmm[reg], &src);
        break;
    case VEC_GPR_STORE:
    case VEC_GPR_STORE_MM:
        if (op->form == VEC_GPR_STORE)
            src = f->xmm[reg];
        else
            src.q[0] = f->st[reg & 7].mantissa;
        fault = op->fn(&ctx, &dst, &src);
        if (fault)
            break;
        if (mem)
            store_any(c, at, &dst, size);
        else
            set_reg(c, rm * 8, wide, dst.q[0]);
        if (op->form == VEC_GPR_STORE_MM)
            fpu_enter_mmx(f);
        break;
    case VEC_GPR_XMMM:
        if (mem)
            load_any(c, at, &src, size);
        fault = op->fn(&ctx, &dst, mem ? &src : &f->xmm[rm]);
        if (!fault)
            set_reg(c, reg * 8, wide, dst.q[0]);
        break;
    case VEC_GPR_MM:
        src.q[0] = f->st[rm & 7].mantissa;
        fault = op->fn(&ctx, &dst, &src);
        if (fault)
            break;
        fpu_enter_mmx(f);
        set_reg(c, reg * 8, wide, dst.q[0]);
        break;
    case VEC_MM_MMM:
    case VEC_MM_GPR:
    case VEC_MM_XMMM:
        if (mem)
            load_any(c, at, &src, size);
        else if (op->form == VEC_MM_MMM)
            src.q[0] = f->st[rm & 7].mantissa;
        else if (op->form == VEC_MM_GPR)
            src.q[0] = get_reg(c, rm * 8, wide);
        else
            src = f->xmm[rm];
        dst.q[0] = f->st[reg & 7].mantissa;
        fpu_enter_mmx(f); /* also if #XM follows */
        fault = op->fn(&ctx, &dst, &src);
        if (!fault)
            fpu_write_mmx(f, reg, dst.q[0]);
        break;
    case VEC_MM_STORE:
        src.q[0] = f->st[reg & 7].mantissa;
        if (mem && !op->dst_write_only)
            load_any(c, at, &dst, size);
        else if (!mem)
            dst.q[0] = f->st[rm & 7].mantissa;
        fault = op->fn(&ctx, &dst, &src);
        if (fault)
            break;
        if (mem)
            store_any(c, at, &dst, size);
        fpu_enter_mmx(f);
        if (!mem)
            fpu_write_mmx(f, rm, dst.q[0]);
        break;
    case VEC_XMM_MMM:
        if (mem)
            load_any(c, at, &src, size);
        else
            src.q[0] = f->st[rm & 7].mantissa;
        if (!mem)
            fpu_enter_mmx(f);
        fault = op->fn(&ctx, &f->xmm[reg], &src);
        break;
    case VEC_XMM_IMM:
        fault = op->fn(&ctx, &f->xmm[rm], NULL);
        break;
    case VEC_MM_IMM:
        dst.q[0] = f->st[rm & 7].mantissa;
        fault = op->fn(&ctx, &dst, NULL);
        fpu_enter_mmx(f);
        fpu_write_mmx(f, rm, dst.q[0]);
        break;
    case VEC_FLAGS:
    case VEC_FLAGS_GPR:
        if (mem)
            load_any(c, at, &src, size);
        dst = f->xmm[reg];
        fault = op->fn(&ctx, &dst, mem ? &src : &f->xmm[rm]);
        if (fault)
            break;
        flags_set_arith(c, ctx.flags);
        if (op->form == VEC_FLAGS_GPR)
            SET32(RCX * 8, dst.q[0]);
        break;
    case VEC_MASKMOV:
        mask_move(c, u, f->xmm[reg].b, f->xmm[rm].b, 16);
        break;
    case VEC_MM_MASKMOV:
        fpu_enter_mmx(f);
        mask_move(c, u, (const uint8_t *)&f->st[reg & 7].mantissa, (const uint8_t *)&f->st[rm & 7].mantissa, 8);
        break;
    case VEC_EMMS:
        fault = op->fn(&ctx, NULL, NULL);
        break;
    default: soft_raise(c, VEC_UD);
    }
    if (SOFT_UNLIKELY(fault != FPU_OK))
        raise_simd(c);
}

/* ---- the common ones, without the detour ---- */

HANDLER(vec_copy)
{
    c->fpu.xmm[u->r0] = c->fpu.xmm[u->r1];
    NEXT;
}
/* The context's address escapes: it must not be a local of a handler, which has to end in a tail call. */
static __attribute__((noinline)) bool vec_call_rr(struct soft_vcpu *c, const struct uop *u)
{
    const struct vec_op *op = u->ptr;
    struct vec_context ctx = {.fpu = &c->fpu, .rax = c->gpr[RAX], .rdx = c->gpr[RDX], .imm = (uint8_t)u->disp, .rex_w = u->aux};
    return op->fn(&ctx, &c->fpu.xmm[u->r0], &c->fpu.xmm[u->r1]) != FPU_OK;
}
HANDLER(vec_rr)
{
    if (SOFT_UNLIKELY(vec_call_rr(c, u))) {
        SYNC();
        raise_simd(c);
    }
    NEXT;
}

/* ---- x87 ---- r0: opcode, r1: ModRM, size: of the memory operand, aux: 16-bit operand size, base: memory operand */

static inline void set_pointers(struct soft_vcpu *c, const struct uop *u, uint64_t at)
{
    fpu_set_pointers(&c->fpu, u->r0, u->r1, c->seg[SEG_CS].selector, c->rip, u->base, c->seg[u->seg].selector,
                     u->base ? at - (!c->code64 || u->seg >= SEG_FS ? c->seg[u->seg].base : 0) : 0);
}
static __attribute__((noinline)) void x87_exact(struct soft_vcpu *c, struct uop *u)
{
    const struct x87_op *op = u[1].ptr;
    struct fpu *f = &c->fpu;
    uint8_t mem[112];
    struct x87_context ctx; /* not initialised as a whole: scratch is large */
    ctx.fpu = f;
    ctx.modrm = u->r1;
    ctx.operand16 = u->aux;
    ctx.protected_mode = soft_protected(c);
    ctx.mem = mem;
    ctx.flags = op->form == X87_CMOV ? flags_arith(c) : 0;
    uint64_t at = c->tmp[0];
    if (!op->control)
        check_pending(c);
    int result = FPU_OK;
    switch (op->form) {
    case X87_LOAD:
        load_any(c, at, mem, u->size);
        result = op->fn(&ctx);
        break;
    case X87_STORE:
        if ((f->cw & 0x3F) != 0x3F) /* an unmasked exception comes after #PF, but changes state at once */
            soft_probe_write(c, at, u->size);
        result = op->fn(&ctx);
        if (result == FPU_OK)
            store_any(c, at, mem, u->size);
        if (result == FPU_OK && op->commit)
            op->commit(&ctx);
        break;
    case X87_ENV:
        if (!op->store_env)
            load_any(c, at, mem, u->size);
        result = op->fn(&ctx);
        if (op->store_env) {
            store_any(c, at, mem, u->size);
            if (op->commit)
                op->commit(&ctx);
        }
        break;
    case X87_AX:
        op->fn(&ctx);
        SET16(RAX * 8, mem[0] | mem[1] << 8);
        break;
    case X87_FLAGS:
        op->fn(&ctx);
        flags_set_arith(c, ctx.flags);
        break;
    default: op->fn(&ctx); break;
    }
    if (op->pointers)
        set_pointers(c, u, at);
}
/* What is frequent, in place, where its memory operand is RAM and nothing is pending. */
HELPER(h_x87)
{
    const struct x87_op *op = u[1].ptr;
    struct x87_context ctx; /* not initialised as a whole: scratch is large */
    uint64_t at = c->tmp[0];
    bool done = false;
    ctx.fpu = &c->fpu;
    ctx.modrm = u->r1;
    if (SOFT_LIKELY(op->pointers && !fpu_pending(&c->fpu))) {
        switch (op->form) {
        case X87_REG: done = fpu_x87_fast_register(&ctx, u->r0 & 7); break;
        case X87_FLAGS:
            if ((done = fpu_x87_fast_register(&ctx, u->r0 & 7)))
                flags_set_arith(c, ctx.flags);
            break;
        case X87_LOAD: done = tlb_hit(c, at, u->size, ACCESS_READ, &ctx.mem) && fpu_x87_fast_load(&ctx, u->r0 & 7); break;
        case X87_STORE:
            if ((done = tlb_hit(c, at, u->size, ACCESS_WRITE, &ctx.mem) && fpu_x87_fast_store(&ctx, u->r0 & 7)))
                fpu_x87_fast_commit(&ctx);
            break;
        default: break;
        }
    }
    if (SOFT_LIKELY(done))
        set_pointers(c, u, at);
    else
        x87_exact(c, u);
}

/* ---- state ---- */

static void state_check(struct soft_vcpu *c)
{
    if (c->cr0 & CR0_EM)
        soft_raise(c, VEC_UD);
    if (c->cr0 & CR0_TS)
        soft_raise(c, VEC_NM);
    if (c->tmp[0] & 15) {
        soft_check_alignment(c, c->tmp[0], 4); /* AMD processors: #AC, if that is checked, before #GP */
        soft_raise_error(c, VEC_GP, 0);
    }
}
HELPER(h_fxsave)
{
    uint8_t image[512];
    state_check(c);
    /* What is not architectural in the image stays as it is in memory. AMD processors look at its end first. */
    soft_probe_write(c, c->tmp[0] + 511, 1);
    soft_probe_write(c, c->tmp[0], 512);
    soft_load_bytes(c, c->tmp[0], image, 512);
    fpu_fxsave(&c->fpu, image, u->aux & 1, c->code64);
    soft_store_bytes(c, c->tmp[0], image, 464);
}
HELPER(h_fxrstor)
{
    uint8_t image[512];
    state_check(c);
    soft_load_bytes(c, c->tmp[0], image, 512);
    if (!fpu_fxrstor(&c->fpu, image, u->aux & 1, c->code64))
        soft_raise_error(c, VEC_GP, 0);
}
static uint64_t xsave_mask(struct soft_vcpu *c)
{
    if (!(c->cr4 & CR4_OSXSAVE))
        soft_raise(c, VEC_UD);
    if (c->cr0 & CR0_TS)
        soft_raise(c, VEC_NM);
    if (c->tmp[0] & 63)
        soft_raise_error(c, VEC_GP, 0);
    return c->xcr0 & ((uint64_t)REG32(RDX * 8) << 32 | REG32(RAX * 8));
}
/* XSAVES and XRSTORS (aux bit 3): for CPL 0, and the compacted format alone. IA32_XSS names no components here. */
static uint64_t xsaves_mask(struct soft_vcpu *c, const struct uop *u)
{
    uint64_t mask = xsave_mask(c);
    if ((u->aux & 8) && c->cpl)
        soft_raise_error(c, VEC_GP, 0);
    return mask;
}
HELPER(h_xsave)
{
    uint8_t area[FPU_XSAVE_AVX];
    uint64_t mask = xsaves_mask(c, u);
    unsigned size = FPU_XSAVE_SIZE(mask);
    soft_probe_write(c, c->tmp[0], size);
    soft_load_bytes(c, c->tmp[0], area, size);
    fpu_xsave(&c->fpu, area, mask, (enum fpu_xsave_form)(u->aux >> 1 & 3), u->aux & 1, c->code64);
    soft_store_bytes(c, c->tmp[0], area, size);
}
HELPER(h_xrstor)
{
    uint8_t area[FPU_XSAVE_AVX];
    uint64_t mask = xsaves_mask(c, u);
    soft_load_bytes(c, c->tmp[0], area, FPU_XSAVE_SIZE(mask));
    if (((u->aux & 8) && !fpu_xsave_compacted(area)) || !fpu_xrstor(&c->fpu, area, mask, c->xcr0, u->aux & 1, c->code64))
        soft_raise_error(c, VEC_GP, 0);
}
HELPER(h_ldmxcsr)
{
    if (!fpu_load_mxcsr(&c->fpu, (uint32_t)load(c, c->tmp[0], 4)))
        soft_raise_error(c, VEC_GP, 0);
}
HELPER(h_stmxcsr) { store(c, c->tmp[0], 4, fpu_mxcsr(&c->fpu)); }
