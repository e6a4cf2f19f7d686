/* Execution of vector instructions with a VEX prefix (fpu/avx.h): operands and faults; and what only moves data.
 *
 * A result of 128 bits clears the upper half of its register, which instructions without VEX keep.
 */
#include "soft/interp/exec.h"
#include "soft/mmu/access.h"
#include "soft/ops/helpers.h"

/* The micro-op: r0 ModRM.reg, r1 ModRM.rm, base VEX.vvvv, index: memory operand at tmp[0], scale VEX.L, aux the immediate, size of
 * the memory operand; the next one: ptr the operation, size of a general register. */
#define OPERATION_OF(u) ((const struct avx_op *)(u)[1].ptr)

/* The operand "register or memory", with zeros above what memory has. */
static void get_rm(struct soft_vcpu *c, const struct uop *u, union ymm *to)
{
    if (!u->index) {
        avx_get(&c->fpu, u->r1, to);
        return;
    }
    memset(to, 0, sizeof *to);
    load_any(c, c->tmp[0], to, u->size);
}

HELPER(h_avx_stub)
{
    const struct avx_op *op = OPERATION_OF(u);
    struct avx_values v;
    unsigned wide = u[1].size;
    avx_get(&c->fpu, u->r0, &v.reg);
    avx_get(&c->fpu, u->base, &v.vvvv);
    v.gpr_reg = v.gpr_rm = 0;
    switch (op->form) {
    case AVX_R_VG:
        if (u->index)
            load_any(c, c->tmp[0], &v.gpr_rm, u->size);
        else
            v.gpr_rm = get_reg(c, u->r1 * 8u, wide);
        break;
    case AVX_V_M: /* the count comes from a register there */
        avx_get(&c->fpu, u->r1, &v.vvvv);
        memset(&v.rm, 0, sizeof v.rm);
        v.rm.q[0] = u->aux;
        break;
    case AVX_M_R:
        avx_get(&c->fpu, u->r0, &v.rm);
        if (u->index)
            soft_probe_write(c, c->tmp[0], u->size); /* comes before #XM */
        break;
    default:
        get_rm(c, u, &v.rm);
        if (op->imm == AVX_IS4)
            avx_get(&c->fpu, u->aux >> 4 & (c->code64 ? 15 : 7), &v.is4);
    }
    if (avx_compute(&c->fpu, op, u->scale, u->aux, &v))
        raise_simd(c);
    switch (op->form) {
    case AVX_G_M: set_reg(c, u->r0 * 8u, wide, v.gpr_reg); break;
    case AVX_FLAGS: flags_set_arith(c, (uint32_t)v.flags & F_ARITH); break;
    case AVX_V_M: avx_put(&c->fpu, u->base, &v.reg); break;
    case AVX_M_R:
        if (u->index)
            store_any(c, c->tmp[0], &v.reg, u->size);
        else
            avx_put(&c->fpu, u->r1, &v.reg);
        break;
    default: avx_put(&c->fpu, u->r0, &v.reg); break;
    }
}

/* ---- masks and gathers: element by element, and no fault for one that is masked out ---- */

static bool masked_in(const union ymm *mask, unsigned n, unsigned bytes) { return mask->b[n * bytes + bytes - 1] >> 7; }

/* No alignment is checked. */
static void load_element(struct soft_vcpu *c, uint64_t at, uint8_t *to, unsigned bytes)
{
    unsigned piece = c->align_check ? 1 : bytes;
    for (unsigned i = 0; i < bytes; i += piece) {
        uint64_t v = load(c, at + i, piece);
        memcpy(to + i, &v, piece);
    }
}

static void mask_load(struct soft_vcpu *c, const struct uop *u, unsigned bytes)
{
    union ymm mask, to = {.q = {0}};
    avx_get(&c->fpu, u->base, &mask);
    for (unsigned n = 0; n < u->size / bytes; n++)
        if (masked_in(&mask, n, bytes))
            load_element(c, c->tmp[0] + n * bytes, to.b + n * bytes, bytes);
    avx_put(&c->fpu, u->r0, &to);
}
static void mask_store(struct soft_vcpu *c, const struct uop *u, unsigned bytes)
{
    union ymm mask, from;
    avx_get(&c->fpu, u->base, &mask);
    avx_get(&c->fpu, u->r0, &from);
    for (unsigned pass = 0; pass < 2; pass++)
        for (unsigned n = 0; n < u->size / bytes; n++) {
            uint64_t v = 0, at = c->tmp[0] + n * bytes;
            if (!masked_in(&mask, n, bytes))
                continue;
            memcpy(&v, from.b + n * bytes, bytes);
            if (!pass) {
                soft_probe_write(c, at, 1);
                if (((at + bytes - 1) ^ at) >> 12)
                    soft_probe_write(c, (at | 0xFFF) + 1, 1);
            }
            for (unsigned i = 0; pass && i < bytes; i += c->align_check ? 1 : bytes) /* no alignment is checked */
                store(c, at + i, c->align_check ? 1 : bytes, v >> 8 * i);
        }
}

/* base: the mask; r1: the index's register; tmp[0]: the other part of the address; the next micro-op's base: address size. An
 * element that was read is in its place, and its mask is clear, also if a later one faults (SDM 2C VGATHERDPS). Of masks of
 * elements that follow a fault only the highest bit counts: as AMD's processors do, they stay as they were. */
static void gather(struct soft_vcpu *c, const struct uop *u, unsigned bytes)
{
    const struct avx_op *op = OPERATION_OF(u);
    struct fpu *f = &c->fpu;
    unsigned index_bytes = op->opcode & 1 ? 8 : 4, most = bytes > index_bytes ? bytes : index_bytes, count = (u->scale ? 32u : 16u) / most;
    union ymm index, to, mask;
    avx_get(f, u->r1, &index);
    avx_get(f, u->r0, &to);
    avx_get(f, u->base, &mask);
    for (unsigned n = 0; n < count; n++) {
        if (masked_in(&mask, n, bytes)) {
            int64_t scaled = index_bytes == 8 ? (int64_t)index.q[n] : (int32_t)index.d[n];
            uint64_t offset = c->tmp[0] + ((uint64_t)scaled << u[1].scale);
            if (u[1].base < 8)
                offset &= UINT32_MAX;
            uint64_t at = c->code64 ? offset + (u->seg >= SEG_FS ? c->seg[u->seg].base : 0) : soft_seg_check(c, u->seg, offset, bytes, false);
            load_element(c, at, to.b + n * bytes, bytes);
        }
        memset(mask.b + n * bytes, 0, bytes);
        avx_put(f, u->r0, &to);
        avx_put(f, u->base, &mask);
    }
    memset(to.b + count * bytes, 0, sizeof to - count * bytes);
    memset(&mask, 0, sizeof mask);
    avx_put(f, u->r0, &to);
    avx_put(f, u->base, &mask);
}

/* ---- the rest ---- */

static void insert_ps(struct soft_vcpu *c, const struct uop *u)
{
    union ymm to, from;
    get_rm(c, u, &from);
    avx_get(&c->fpu, u->base, &to);
    to.d[u->aux >> 4 & 3] = from.d[u->index ? 0 : u->aux >> 6];
    for (unsigned n = 0; n < 4; n++)
        if (u->aux >> n & 1)
            to.d[n] = 0;
    memset(&to.half[1], 0, 16);
    avx_put(&c->fpu, u->r0, &to);
}

static void shift_bytes(struct soft_vcpu *c, const struct uop *u)
{
    union ymm from, to = {.q = {0}};
    unsigned n = u->aux < 16 ? u->aux : 16;
    bool left = OPERATION_OF(u)->group == 7;
    avx_get(&c->fpu, u->r1, &from);
    for (unsigned h = 0; h <= u->scale; h++)
        memcpy(to.half[h].b + (left ? n : 0), from.half[h].b + (left ? 0 : n), 16 - n);
    avx_put(&c->fpu, u->base, &to);
}

static const struct vec_op *sse_of(const struct avx_op *op)
{
    return fpu_lookup_vector(op->map == 1 ? VEC_MAP_0F : VEC_MAP_0F3A, op->opcode, (enum vec_prefix)op->prefix, 0xC0);
}

static void lanes(struct soft_vcpu *c, const struct uop *u)
{
    const struct avx_op *op = OPERATION_OF(u);
    struct vec_context ctx = {.fpu = &c->fpu};
    union ymm from, to = {.q = {0}};
    get_rm(c, u, &from);
    if (op->l == AVX_LIG)
        to.half[0] = c->fpu.xmm[u->base];
    for (unsigned h = 0; h <= (op->l == AVX_LIG ? 0u : u->scale); h++)
        sse_of(op)->fn(&ctx, &to.half[h], &from.half[h]);
    avx_put(&c->fpu, u->r0, &to);
}

static void strings(struct soft_vcpu *c, const struct uop *u)
{
    const struct vec_op *op = sse_of(OPERATION_OF(u));
    struct vec_context ctx = {.fpu = &c->fpu, .rax = c->gpr[RAX], .rdx = c->gpr[RDX], .imm = u->aux, .rex_w = u[1].size == 8};
    union ymm src;
    get_rm(c, u, &src);
    union xmm dst = c->fpu.xmm[u->r0];
    op->fn(&ctx, &dst, &src.half[0]);
    flags_set_arith(c, ctx.flags);
    if (op->form == VEC_FLAGS_GPR)
        SET32(RCX * 8, dst.q[0]);
    else
        memset(&c->fpu.high[0], 0, 16);
}

HELPER(h_avx_move)
{
    const struct avx_op *op = OPERATION_OF(u);
    struct fpu *f = &c->fpu;
    uint64_t at = c->tmp[0], value = 0;
    union ymm v = {.q = {0}}, w;
    unsigned bytes = op->mem;
    switch (op->form) {
    case AVX_LOAD: case AVX_STORE: { /* of registers; avx_load and avx_store are those of memory */
        bool load = op->form == AVX_LOAD;
        avx_get(f, load ? u->r1 : u->r0, &v);
        if (!u->scale)
            memset(&v.half[1], 0, 16);
        avx_put(f, load ? u->r0 : u->r1, &v);
        return;
    }
    case AVX_LOAD_SCALAR:
        if (u->index) {
            load_any(c, at, &v, bytes);
        } else {
            v.half[0] = f->xmm[u->base];
            memcpy(&v, &f->xmm[u->r1], bytes);
        }
        avx_put(f, u->r0, &v);
        return;
    case AVX_STORE_SCALAR:
        if (u->index) {
            store_any(c, at, &f->xmm[u->r0], bytes);
            return;
        }
        v.half[0] = f->xmm[u->base];
        memcpy(&v, &f->xmm[u->r0], bytes);
        avx_put(f, u->r1, &v);
        return;
    case AVX_LOAD_LOW: /* of registers: VMOVHLPS */
        v.q[1] = f->xmm[u->base].q[1];
        if (u->index)
            load_any(c, at, &v, 8);
        else
            v.q[0] = f->xmm[u->r1].q[1];
        avx_put(f, u->r0, &v);
        return;
    case AVX_LOAD_HIGH: /* of registers: VMOVLHPS */
        v.q[0] = f->xmm[u->base].q[0];
        if (u->index)
            load_any(c, at, &v.q[1], 8);
        else
            v.q[1] = f->xmm[u->r1].q[0];
        avx_put(f, u->r0, &v);
        return;
    case AVX_STORE_LOW: store_any(c, at, &f->xmm[u->r0].q[0], 8); return;
    case AVX_STORE_HIGH: store_any(c, at, &f->xmm[u->r0].q[1], 8); return;
    case AVX_FROM_GPR:
        if (u->index)
            load_any(c, at, &v, bytes);
        else
            v.q[0] = get_reg(c, u->r1 * 8u, bytes);
        avx_put(f, u->r0, &v);
        return;
    case AVX_TO_GPR:
        if (u->index)
            store_any(c, at, &f->xmm[u->r0], bytes);
        else
            set_reg(c, u->r1 * 8u, bytes, f->xmm[u->r0].q[0]);
        return;
    case AVX_LOAD_8:
        if (u->index)
            load_any(c, at, &v, 8);
        else
            v.q[0] = f->xmm[u->r1].q[0];
        avx_put(f, u->r0, &v);
        return;
    case AVX_STORE_8:
        v.q[0] = f->xmm[u->r0].q[0];
        if (u->index)
            store_any(c, at, &v, 8);
        else
            avx_put(f, u->r1, &v);
        return;
    case AVX_EXTRACT: { /* VPEXTRW of 0F has its registers the other way round */
        bool other = op->map == 1;
        memcpy(&value, f->xmm[other ? u->r1 : u->r0].b + bytes * (u->aux & (16 / bytes - 1)), bytes);
        if (u->index)
            store_any(c, at, &value, bytes);
        else
            set_reg(c, (other ? u->r0 : u->r1) * 8u, 8, value);
        return;
    }
    case AVX_INSERT:
        if (u->index)
            load_any(c, at, &value, bytes);
        else
            value = c->gpr[u->r1];
        v.half[0] = f->xmm[u->base];
        memcpy(v.b + bytes * (u->aux & (16 / bytes - 1)), &value, bytes);
        avx_put(f, u->r0, &v);
        return;
    case AVX_INSERT_PS: insert_ps(c, u); return;
    case AVX_BROADCAST:
        get_rm(c, u, &w);
        for (unsigned n = 0; n < (u->scale ? 32u : 16u); n += bytes)
            memcpy(v.b + n, &w, bytes);
        avx_put(f, u->r0, &v);
        return;
    case AVX_EXTRACT_128:
        v.half[0] = u->aux & 1 ? f->high[u->r0] : f->xmm[u->r0];
        if (u->index)
            store_any(c, at, &v, 16);
        else
            avx_put(f, u->r1, &v);
        return;
    case AVX_INSERT_128:
        get_rm(c, u, &w);
        avx_get(f, u->base, &v);
        v.half[u->aux & 1] = w.half[0];
        avx_put(f, u->r0, &v);
        return;
    case AVX_ZERO: /* VZEROALL, VZEROUPPER; outside 64-bit mode the first eight */
        memset(f->high, 0, c->code64 ? sizeof f->high : sizeof f->high / 2);
        if (u->scale)
            memset(f->xmm, 0, c->code64 ? sizeof f->xmm : sizeof f->xmm / 2);
        return;
    case AVX_MASK_LOAD: mask_load(c, u, bytes); return;
    case AVX_MASK_STORE: mask_store(c, u, bytes); return;
    case AVX_GATHER: gather(c, u, bytes); return;
    case AVX_SHIFT_BYTES: shift_bytes(c, u); return;
    case AVX_LANES: lanes(c, u); return;
    case AVX_STRINGS: strings(c, u); return;
    default: soft_raise(c, VEC_UD);
    }
}

/* ---- the frequent ones, each a handler of its own ----
 *
 * The micro-op: r0 ModRM.reg, r1 ModRM.rm, base VEX.vvvv, scale VEX.L, aux the immediate, ptr the operation. With a memory operand
 * its address is EA_BD or EA_BI (mmu/access.h), r1 is VEX.vvvv, and size is 32 for VEX.L; aux of moves: which bits of the address
 * must be 0. */

static inline bool is_ready(const struct soft_vcpu *c, const struct avx_op *op) { return op->real == AVX_NO_FLOAT || c->fpu.mxcsr_lazy; }

static __attribute__((noinline)) bool general(struct soft_vcpu *c, unsigned reg, unsigned vvvv, const union ymm *rm, const struct uop *u, bool l)
{
    struct avx_values v = {.rm = *rm};
    avx_get(&c->fpu, reg, &v.reg);
    avx_get(&c->fpu, vvvv, &v.vvvv);
    bool raised = avx_compute(&c->fpu, u->ptr, l, u->aux, &v);
    if (!raised)
        avx_put(&c->fpu, reg, &v.reg);
    return raised;
}
static __attribute__((noinline)) void general_rr(struct soft_vcpu *c, const struct uop *u)
{
    union ymm rm;
    avx_get(&c->fpu, u->r1, &rm);
    if (general(c, u->r0, u->base, &rm, u, u->scale))
        raise_simd(c);
}
static __attribute__((noinline)) void general_rm(struct soft_vcpu *c, const struct uop *u)
{
    union ymm rm = {.q = {0}};
    soft_load_bytes(c, EA_BI, &rm, u->size);
    if (general(c, u->r0, u->r1, &rm, u, u->size == 32))
        raise_simd(c);
}
static SLOW_HANDLER(avx_slow_rr)
{
    SYNC();
    general_rr(c, u);
    UNSYNC();
    NEXT;
}
static SLOW_HANDLER(avx_slow_rm)
{
    SYNC();
    general_rm(c, u);
    UNSYNC();
    NEXT;
}
HANDLER(avx_rr)
{
    const struct avx_op *op = u->ptr;
    if (SOFT_UNLIKELY(!is_ready(c, op)))
        return avx_slow_rr(c, u, rip);
    avx_call_rr(avx_stub_of(op, u->scale, u->aux), &c->fpu.xmm[u->r0], &c->fpu.xmm[u->base], &c->fpu.xmm[u->r1]);
    NEXT;
}
/* VPMOVMSKB, VMOVMSKPS, VMOVMSKPD: into a general register. */
HANDLER(avx_mask)
{
    union xmm *from = &c->fpu.xmm[u->r1]; /* the stub changes no vector register: this is written as it was */
    REG64(u->r0 * 8) = avx_call_rr(avx_stub_of(u->ptr, u->scale, 0), from, from, from);
    NEXT;
}
#define RM(form, EA)                                                                                                   \
    static HANDLER(avx_rm_##form)                                                                                      \
    {                                                                                                                  \
        const struct avx_op *op = u->ptr;                                                                              \
        uint64_t ea = EA;                                                                                              \
        uint8_t *p;                                                                                                    \
        if (SOFT_UNLIKELY(!is_ready(c, op)) || !tlb_hit(c, ea, u->size, ACCESS_READ, &p))                              \
            return avx_slow_rm(c, u, rip);                                                                             \
        const uint8_t *stub = avx_stub_of(op, u->size == 32, u->aux);                                                  \
        if (u->size == 32)                                                                                             \
            avx_call_rm(stub, &c->fpu.xmm[u->r0], &c->fpu.xmm[u->r1], p);                                              \
        else                                                                                                           \
            avx_call_rm16(stub, &c->fpu.xmm[u->r0], &c->fpu.xmm[u->r1], p);                                            \
        NEXT;                                                                                                          \
    }
RM(bd, EA_BD) RM(bi, EA_BI)
const uop_fn avx_rm[2] = {avx_rm_bd, avx_rm_bi};

static __attribute__((noinline)) void general_move(struct soft_vcpu *c, const struct uop *u, bool to_memory)
{
    const struct avx_op *op = u->ptr;
    uint64_t at = EA_BI;
    union ymm v = {.q = {0}};
    if (op->aligned && (at & (u->size - 1u)))
        soft_raise_error(c, VEC_GP, 0);
    if (to_memory) {
        avx_get(&c->fpu, u->r0, &v);
        soft_store_bytes(c, at, &v, u->size);
    } else {
        soft_load_bytes(c, at, &v, u->size);
        avx_put(&c->fpu, u->r0, &v);
    }
}
static SLOW_HANDLER(avx_slow_load)
{
    SYNC();
    general_move(c, u, false);
    UNSYNC();
    NEXT;
}
static SLOW_HANDLER(avx_slow_store)
{
    SYNC();
    general_move(c, u, true);
    UNSYNC();
    AFTER_SLOW_STORE();
    NEXT;
}
#define MOVES(form, EA)                                                                                                \
    static HANDLER(avx_load_##form)                                                                                    \
    {                                                                                                                  \
        uint64_t ea = EA;                                                                                              \
        uint8_t *p;                                                                                                    \
        if (SOFT_UNLIKELY(ea & u->aux) || !tlb_hit(c, ea, u->size, ACCESS_READ, &p))                                  \
            return avx_slow_load(c, u, rip);                                                                           \
        memcpy(&c->fpu.xmm[u->r0], p, 16);                                                                             \
        if (u->size == 32)                                                                                             \
            memcpy(&c->fpu.high[u->r0], p + 16, 16);                                                                   \
        else                                                                                                           \
            memset(&c->fpu.high[u->r0], 0, 16);                                                                        \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(avx_store_##form)                                                                                   \
    {                                                                                                                  \
        uint64_t ea = EA;                                                                                              \
        uint8_t *p;                                                                                                    \
        if (SOFT_UNLIKELY(ea & u->aux) || !tlb_hit(c, ea, u->size, ACCESS_WRITE, &p))                             \
            return avx_slow_store(c, u, rip);                                                                          \
        memcpy(p, &c->fpu.xmm[u->r0], 16);                                                                             \
        if (u->size == 32)                                                                                             \
            memcpy(p + 16, &c->fpu.high[u->r0], 16);                                                                   \
        NEXT;                                                                                                          \
    }
MOVES(bd, EA_BD) MOVES(bi, EA_BI)
const uop_fn avx_load[2] = {avx_load_bd, avx_load_bi}, avx_store[2] = {avx_store_bd, avx_store_bi};

/* VZEROUPPER in 64-bit mode. */
HANDLER(avx_zero_upper)
{
    memset(c->fpu.high, 0, sizeof c->fpu.high);
    NEXT;
}
