/* Micro-op handlers of the frequent SSE instructions, each with its operation inline: three to five times as fast as the
 * general path through h_vector and a function pointer (workloads scan, chacha and matrix of tests.bench.bench_soft).
 *
 * A handler takes only what is certain: the operand is aligned where it must be and hits the TLB, and for floating
 * point exception flags gather in the host's MXCSR (fpu.h). Everything else goes to slow_r or slow_m.
 *
 * r0: destination, r1: source (XMM registers by number, general ones by offset); aux: the immediate, or REX.W for
 * operations without one; ptr: struct vec_op; size and address of memory operands as in exec.h.
 */
#pragma GCC target("sse4.2")
#include <nmmintrin.h>

#include "soft/mmu/access.h"
#include "soft/interp/exec.h"
#include "soft/ops/helpers.h"

#define VEC_UNUSED __attribute__((unused))
#define XMM(n) (c->fpu.xmm[n])
#define GET(n) _mm_load_si128((const __m128i *)&XMM(n))
#define PUT(n, v) _mm_store_si128((__m128i *)&XMM(n), v)

/* Once in a block, before its first instruction of the kind. */
static SLOW_HANDLER(fpu_unavailable)
{
    SYNC();
    h_fpu_check(c, u);
    UNSYNC();
    NEXT;
}
HANDLER(fpu_available)
{
    if (SOFT_UNLIKELY((c->cr0 & (CR0_EM | CR0_TS)) || (u->aux == 0 && !(c->cr4 & CR4_OSFXSR))))
        return fpu_unavailable(c, u, rip);
    NEXT;
}

/* Instructions with a VEX prefix: not in real and virtual-8086 mode; those of vectors if XCR0 says so, whatever CR0.EM and
 * CR4.OSFXSR (SDM 2A 2.6). Once in a block, too. */
static SLOW_HANDLER(vex_unavailable)
{
    SYNC();
    soft_raise(c, soft_protected(c) && soft_avx_enabled(c) ? VEC_NM : VEC_UD);
}
HANDLER(vex_available)
{
    if (SOFT_UNLIKELY(!soft_protected(c) || (u->aux && (!soft_avx_enabled(c) || (c->cr0 & CR0_TS)))))
        return vex_unavailable(c, u, rip);
    NEXT;
}

/* ---- slow paths: any operation of the fast forms, with all its faults ---- */

/* Not in a handler: addresses of locals escape, and handlers end in tail calls. In SYNC. */
static __attribute__((noinline)) void general(struct soft_vcpu *c, const struct uop *u, bool memory)
{
    const struct vec_op *op = u->ptr;
    struct vec_context ctx = {.fpu = &c->fpu, .rax = c->gpr[RAX], .rdx = c->gpr[RDX], .imm = u->aux,
                              .rex_w = !op->has_imm && u->aux};
    union xmm value = {.q = {0, 0}}, scratch = {.q = {0, 0}};
    const union xmm *src = &value;
    if (memory) {
        uint64_t at = EA_BI;
        if (op->aligned && (at & 15))
            soft_raise_error(c, VEC_GP, 0);
        soft_load_bytes(c, at, &value, u->size);
    } else if (op->form == VEC_XMM_GPR) {
        value.q[0] = u->aux ? REG64(u->r1) : REG32(u->r1);
    } else if (op->form != VEC_XMM_IMM) {
        src = &XMM(u->r1);
    }
    if (op->fn(&ctx, op->form == VEC_GPR_XMMM ? &scratch : &XMM(u->r0), src))
        raise_simd(c);
    if (op->form == VEC_GPR_XMMM)
        REG64(u->r0) = u->aux ? scratch.q[0] : scratch.d[0];
    if (op->form == VEC_FLAGS)
        flags_set_arith(c, ctx.flags);
}
static SLOW_HANDLER(slow_r)
{
    SYNC();
    general(c, u, false);
    UNSYNC();
    NEXT;
}
static SLOW_HANDLER(slow_m)
{
    SYNC();
    general(c, u, true);
    UNSYNC();
    NEXT;
}
static __attribute__((noinline)) void general_store(struct soft_vcpu *c, const struct uop *u)
{
    const struct vec_op *op = u->ptr;
    struct vec_context ctx = {.fpu = &c->fpu};
    union xmm value;
    uint64_t at = EA_BI;
    if (op->aligned && (at & 15))
        soft_raise_error(c, VEC_GP, 0);
    op->fn(&ctx, &value, &XMM(u->r1));
    soft_store_bytes(c, at, &value, u->size);
}
static SLOW_HANDLER(slow_store)
{
    SYNC();
    general_store(c, u);
    UNSYNC();
    AFTER_SLOW_STORE();
    NEXT;
}

/* ---- forms ---- */

/* Host addresses of guest memory as operands of inline assembly. */
struct piece4 { uint32_t d; } __attribute__((packed, may_alias));
struct piece8 { uint64_t q; } __attribute__((packed, may_alias));
struct piece16 { uint8_t b[16]; } __attribute__((aligned(16), may_alias));
#define PIECE(bytes, m) (*(const struct piece##bytes *)(m))

/* RESULT: what r0 becomes, from d (r0's value) and m (the operand's host address); ready: a condition. */
#define REGISTER_FORM(name, ready, RESULT)                                                                             \
    static HANDLER(name##_rr)                                                                                          \
    {                                                                                                                  \
        if (SOFT_UNLIKELY(!(ready)))                                                                                   \
            return slow_r(c, u, rip);                                                                                  \
        const void *m = &XMM(u->r1);                                                                                   \
        __m128i d = GET(u->r0);                                                                                        \
        RESULT;                                                                                                        \
        PUT(u->r0, d);                                                                                                 \
        NEXT;                                                                                                          \
    }
#define MEMORY_FORM(name, form, EA, bytes, align, ready, RESULT)                                                       \
    static HANDLER(name##_##form)                                                                                      \
    {                                                                                                                  \
        uint64_t ea = EA;                                                                                              \
        uint8_t *p;                                                                                                    \
        if (SOFT_UNLIKELY(!(ready) || (ea & ((align) - 1))) || !tlb_hit(c, ea, bytes, ACCESS_READ, &p))                \
            return slow_m(c, u, rip);                                                                                  \
        const void *m = p;                                                                                             \
        __m128i d = GET(u->r0);                                                                                        \
        RESULT;                                                                                                        \
        PUT(u->r0, d);                                                                                                 \
        NEXT;                                                                                                          \
    }
#define MEMORY_FORMS(name, bytes, align, ready, RESULT)                                                                \
    MEMORY_FORM(name, bd, EA_BD, bytes, align, ready, RESULT)                                                          \
    MEMORY_FORM(name, bi, EA_BI, bytes, align, ready, RESULT)
#define ALL_FORMS(name, bytes, align, ready, RESULT)                                                                   \
    REGISTER_FORM(name, ready, RESULT)                                                                                 \
    MEMORY_FORMS(name, bytes, align, ready, RESULT)

#define INTEGER(n) ALL_FORMS(n, 16, 16, true, __asm__(#n " %1, %0" : "+x"(d) : "m"(PIECE(16, m))))
INTEGER(paddb) INTEGER(paddw) INTEGER(paddd) INTEGER(paddq) INTEGER(paddusb) INTEGER(paddsw) INTEGER(psubb) INTEGER(psubw)
INTEGER(psubd) INTEGER(psubq) INTEGER(psubusb) INTEGER(psubsw) INTEGER(pand) INTEGER(pandn) INTEGER(por) INTEGER(pxor)
INTEGER(pcmpeqb) INTEGER(pcmpeqw) INTEGER(pcmpeqd) INTEGER(pcmpgtb) INTEGER(pcmpgtw) INTEGER(pcmpgtd)
INTEGER(pminub) INTEGER(pmaxub) INTEGER(pminsw) INTEGER(pmaxsw) INTEGER(pmullw) INTEGER(pmulhw) INTEGER(pmulhuw)
INTEGER(pmuludq) INTEGER(pmaddwd) INTEGER(psadbw) INTEGER(pavgb)
INTEGER(punpcklbw) INTEGER(punpcklwd) INTEGER(punpckldq) INTEGER(punpcklqdq)
INTEGER(punpckhbw) INTEGER(punpckhwd) INTEGER(punpckhdq) INTEGER(punpckhqdq)
INTEGER(packuswb) INTEGER(packsswb) INTEGER(packssdw) INTEGER(pshufb) INTEGER(pmulld) INTEGER(pminud) INTEGER(pmaxud)

/* Floating point: inexact, denormal... flags stay in the host's MXCSR. */
#define LAZY c->fpu.mxcsr_lazy
#define PACKED(n) ALL_FORMS(n, 16, 16, LAZY, __asm__ volatile(#n " %1, %0" : "+x"(d) : "m"(PIECE(16, m))))
#define SCALAR(n, bytes) ALL_FORMS(n, bytes, 1, LAZY, __asm__ volatile(#n " %1, %0" : "+x"(d) : "m"(PIECE(bytes, m))))
#define ARITHMETIC(n) PACKED(n##ps) PACKED(n##pd) SCALAR(n##ss, 4) SCALAR(n##sd, 8)
ARITHMETIC(add) ARITHMETIC(sub) ARITHMETIC(mul) ARITHMETIC(div) ARITHMETIC(min) ARITHMETIC(max) ARITHMETIC(sqrt)
SCALAR(cvtss2sd, 4) SCALAR(cvtsd2ss, 8) SCALAR(cvtdq2pd, 8) SCALAR(cvtps2pd, 8)
PACKED(cvtdq2ps) PACKED(cvttps2dq) PACKED(cvttpd2dq)

/* Shuffles by an immediate: PSHUFB with a control from a table of what each nibble picks. */
#define PICK_D(n) (0x03020100u + 0x04040404u * (n))
#define PICK_2D(n) (PICK_D((n) & 3) | (uint64_t)PICK_D((n) >> 2) << 32)
static const uint64_t pick[16] = {PICK_2D(0), PICK_2D(1), PICK_2D(2), PICK_2D(3), PICK_2D(4), PICK_2D(5), PICK_2D(6), PICK_2D(7),
                                  PICK_2D(8), PICK_2D(9), PICK_2D(10), PICK_2D(11), PICK_2D(12), PICK_2D(13), PICK_2D(14), PICK_2D(15)};
#define PICKED(v, imm) _mm_shuffle_epi8(v, _mm_loadl_epi64((const __m128i *)&pick[imm]))
#define OPERAND _mm_load_si128((const __m128i *)m)
ALL_FORMS(pshufd, 16, 16, true,
          d = _mm_shuffle_epi8(OPERAND, _mm_set_epi64x((long long)pick[u->aux >> 4], (long long)pick[u->aux & 15])))
ALL_FORMS(shufps, 16, 16, true, d = _mm_unpacklo_epi64(PICKED(d, u->aux & 15), PICKED(OPERAND, u->aux >> 4)))

/* Shifts of a register by an immediate. */
#define SHIFT(n)                                                                                                       \
    static HANDLER(n##_rr)                                                                                             \
    {                                                                                                                  \
        __m128i d = GET(u->r0), count = _mm_cvtsi32_si128(u->aux);                                                     \
        __asm__(#n " %1, %0" : "+x"(d) : "x"(count));                                                                  \
        PUT(u->r0, d);                                                                                                 \
        NEXT;                                                                                                          \
    }
SHIFT(psrlw) SHIFT(psrld) SHIFT(psrlq) SHIFT(psraw) SHIFT(psrad) SHIFT(psllw) SHIFT(pslld) SHIFT(psllq)

/* ---- moves ---- */
ALL_FORMS(load16, 16, 1, true, d = _mm_loadu_si128((const __m128i *)m))
MEMORY_FORMS(load16a, 16, 16, true, d = _mm_load_si128((const __m128i *)m))
ALL_FORMS(load8, 8, 1, true, d = _mm_loadl_epi64((const __m128i *)m))
MEMORY_FORMS(load4, 4, 1, true, d = _mm_cvtsi32_si128((int)PIECE(4, m).d))
ALL_FORMS(merge8, 8, 1, true, d = _mm_castpd_si128(_mm_loadl_pd(_mm_castsi128_pd(d), (const double *)m)))
ALL_FORMS(movlhps, 8, 1, true, d = _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(d), (const double *)m)))
REGISTER_FORM(merge4, true, d = _mm_castps_si128(_mm_move_ss(_mm_castsi128_ps(d), _mm_castsi128_ps(OPERAND))))

#define STORE(name, form, EA, bytes, align, TYPE, VALUE)                                                               \
    static HANDLER(name##_##form)                                                                                      \
    {                                                                                                                  \
        uint64_t ea = EA;                                                                                              \
        uint8_t *p;                                                                                                    \
        if (SOFT_UNLIKELY(ea & ((align) - 1)) || !tlb_hit(c, ea, bytes, ACCESS_WRITE, &p))                             \
            return slow_store(c, u, rip);                                                                              \
        const union xmm *x = &XMM(u->r1);                                                                              \
        TYPE v = VALUE;                                                                                                \
        memcpy(p, &v, bytes);                                                                                          \
        NEXT;                                                                                                          \
    }
#define STORES(name, bytes, align, TYPE, VALUE)                                                                        \
    STORE(name, bd, EA_BD, bytes, align, TYPE, VALUE) STORE(name, bi, EA_BI, bytes, align, TYPE, VALUE)
STORES(store16, 16, 1, __m128i, _mm_load_si128((const __m128i *)x))
STORES(store16a, 16, 16, __m128i, _mm_load_si128((const __m128i *)x))
STORES(store8, 8, 1, uint64_t, x->q[0])
STORES(store4, 4, 1, uint32_t, x->d[0])
STORES(store_high, 8, 1, uint64_t, x->q[1])

/* ---- between XMM and general registers ---- */
#define TO_XMM(name, REG, ready, RESULT)                                                                               \
    static HANDLER(name)                                                                                               \
    {                                                                                                                  \
        if (SOFT_UNLIKELY(!(ready)))                                                                                   \
            return slow_r(c, u, rip);                                                                                  \
        __m128i d VEC_UNUSED = GET(u->r0);                                                                             \
        RESULT;                                                                                                        \
        PUT(u->r0, d);                                                                                                 \
        NEXT;                                                                                                          \
    }
TO_XMM(movd_to_xmm, 32, true, d = _mm_cvtsi32_si128((int)REG32(u->r1)))
TO_XMM(movq_to_xmm, 64, true, d = _mm_cvtsi64_si128((long long)REG64(u->r1)))
#define FROM_INTEGER(n)                                                                                                \
    TO_XMM(n##_32, 32, LAZY, __asm__ volatile(#n "l %1, %0" : "+x"(d) : "r"(REG32(u->r1))))                            \
    TO_XMM(n##_64, 64, LAZY, __asm__ volatile(#n "q %1, %0" : "+x"(d) : "r"(REG64(u->r1))))
FROM_INTEGER(cvtsi2sd) FROM_INTEGER(cvtsi2ss)

static HANDLER(movd_from_xmm) { REG64(u->r0) = XMM(u->r1).d[0]; NEXT; }
static HANDLER(movq_from_xmm) { REG64(u->r0) = XMM(u->r1).q[0]; NEXT; }
static HANDLER(pmovmskb_rr) { REG64(u->r0) = (uint32_t)_mm_movemask_epi8(GET(u->r1)); NEXT; }
static HANDLER(movmskpd_rr) { REG64(u->r0) = (uint32_t)_mm_movemask_pd(_mm_castsi128_pd(GET(u->r1))); NEXT; }
static HANDLER(movmskps_rr) { REG64(u->r0) = (uint32_t)_mm_movemask_ps(_mm_castsi128_ps(GET(u->r1))); NEXT; }
#define TO_INTEGER(n)                                                                                                  \
    static HANDLER(n##_32)                                                                                             \
    {                                                                                                                  \
        uint32_t r;                                                                                                    \
        if (SOFT_UNLIKELY(!LAZY))                                                                                      \
            return slow_r(c, u, rip);                                                                                  \
        __asm__ volatile(#n " %1, %0" : "=r"(r) : "x"(GET(u->r1)));                                                    \
        REG64(u->r0) = r;                                                                                              \
        NEXT;                                                                                                          \
    }                                                                                                                  \
    static HANDLER(n##_64)                                                                                             \
    {                                                                                                                  \
        uint64_t r;                                                                                                    \
        if (SOFT_UNLIKELY(!LAZY))                                                                                      \
            return slow_r(c, u, rip);                                                                                  \
        __asm__ volatile(#n " %1, %0" : "=r"(r) : "x"(GET(u->r1)));                                                    \
        REG64(u->r0) = r;                                                                                              \
        NEXT;                                                                                                          \
    }
TO_INTEGER(cvttsd2si) TO_INTEGER(cvttss2si) TO_INTEGER(cvtsd2si) TO_INTEGER(cvtss2si)

/* ---- comparisons: ZF, PF and CF; OF, SF and AF clear ---- */
#define COMPARE(n, bytes)                                                                                              \
    COMPARE_FORM(n, rr, slow_r, LAZY, const void *m = &XMM(u->r1), bytes)                                              \
    COMPARE_FORM(n, bd, slow_m, LAZY && tlb_hit(c, EA_BD, bytes, ACCESS_READ, &p), const void *m = p, bytes)           \
    COMPARE_FORM(n, bi, slow_m, LAZY && tlb_hit(c, EA_BI, bytes, ACCESS_READ, &p), const void *m = p, bytes)
#define COMPARE_FORM(n, form, slow, ready, OPERAND_IS, bytes)                                                          \
    static HANDLER(n##_##form)                                                                                         \
    {                                                                                                                  \
        uint8_t *p VEC_UNUSED;                                                                                         \
        bool carry, zero, parity;                                                                                      \
        if (!(ready))                                                                                                  \
            return slow(c, u, rip);                                                                                    \
        OPERAND_IS;                                                                                                    \
        __asm__ volatile(#n " %4, %3" : "=@ccc"(carry), "=@ccz"(zero), "=@ccp"(parity) : "x"(GET(u->r0)), "m"(PIECE(bytes, m))); \
        c->lf[0] = !zero;                                                                                              \
        c->lf[1] = (uint64_t)carry * (3ull << 62);                                                                     \
        c->lf[2] = parity != zero ? 0x100 : 0;                                                                         \
        NEXT;                                                                                                          \
    }
COMPARE(ucomisd, 8) COMPARE(comisd, 8) COMPARE(ucomiss, 4) COMPARE(comiss, 4)

/* ---- the table, by operation ---- */
struct fast {
    const char *name;
    uop_fn rr[2], memory[2]; /* [REX.W], [form] */
    uint8_t form;            /* enum vec_form, or VEC_NONE: VEC_XMM_XMMM */
};
#define SAME(n) {#n, {n##_rr, n##_rr}, {n##_bd, n##_bi}, VEC_XMM_XMMM}
#define FOUR(n) SAME(n##ps), SAME(n##pd), SAME(n##ss), SAME(n##sd)
#define SHIFTED(n) {#n "_imm", {n##_rr, n##_rr}, {0, 0}, VEC_XMM_IMM}
#define BY_WIDTH(n, kind) {#n, {n##_32, n##_64}, {0, 0}, kind}
#define MASK(n) {#n, {n##_rr, n##_rr}, {0, 0}, VEC_GPR_XMMM}
#define FLAGGED(n) {#n, {n##_rr, n##_rr}, {n##_bd, n##_bi}, VEC_FLAGS}
static const struct fast table[] = {
    SAME(paddb), SAME(paddw), SAME(paddd), SAME(paddq), SAME(paddusb), SAME(paddsw), SAME(psubb), SAME(psubw), SAME(psubd), SAME(psubq),
    SAME(psubusb), SAME(psubsw), SAME(pand), SAME(pandn), SAME(por), SAME(pxor), SAME(pcmpeqb), SAME(pcmpeqw), SAME(pcmpeqd),
    SAME(pcmpgtb), SAME(pcmpgtw), SAME(pcmpgtd), SAME(pminub), SAME(pmaxub), SAME(pminsw), SAME(pmaxsw), SAME(pmullw), SAME(pmulhw),
    SAME(pmulhuw), SAME(pmuludq), SAME(pmaddwd), SAME(psadbw), SAME(pavgb), SAME(punpcklbw), SAME(punpcklwd), SAME(punpckldq),
    SAME(punpcklqdq), SAME(punpckhbw), SAME(punpckhwd), SAME(punpckhdq), SAME(punpckhqdq), SAME(packuswb), SAME(packsswb),
    SAME(packssdw), SAME(pshufb), SAME(pmulld), SAME(pminud), SAME(pmaxud), SAME(pshufd), SAME(shufps),
    FOUR(add), FOUR(sub), FOUR(mul), FOUR(div), FOUR(min), FOUR(max), FOUR(sqrt),
    SAME(cvtss2sd), SAME(cvtsd2ss), SAME(cvtdq2pd), SAME(cvtps2pd), SAME(cvtdq2ps), SAME(cvttps2dq), SAME(cvttpd2dq),
    SHIFTED(psrlw), SHIFTED(psrld), SHIFTED(psrlq), SHIFTED(psraw), SHIFTED(psrad), SHIFTED(psllw), SHIFTED(pslld), SHIFTED(psllq),
    {"low8", {load8_rr, load8_rr}, {load8_bd, load8_bi}, VEC_XMM_XMMM},
    {"merge8", {merge8_rr, merge8_rr}, {merge8_bd, merge8_bi}, VEC_XMM_XMMM},
    {"movlhps", {movlhps_rr, movlhps_rr}, {movlhps_bd, movlhps_bi}, VEC_XMM_XMMM},
    {"merge4", {merge4_rr, merge4_rr}, {0, 0}, VEC_XMM_XMMM},
    {"low8", {0, 0}, {store8_bd, store8_bi}, VEC_STORE},
    {"movhps_store", {0, 0}, {store_high_bd, store_high_bi}, VEC_STORE},
    {"movd", {movd_to_xmm, movq_to_xmm}, {0, 0}, VEC_XMM_GPR},
    {"movd", {movd_from_xmm, movq_from_xmm}, {0, 0}, VEC_GPR_STORE},
    BY_WIDTH(cvtsi2sd, VEC_XMM_GPR), BY_WIDTH(cvtsi2ss, VEC_XMM_GPR),
    BY_WIDTH(cvttsd2si, VEC_GPR_XMMM), BY_WIDTH(cvttss2si, VEC_GPR_XMMM), BY_WIDTH(cvtsd2si, VEC_GPR_XMMM), BY_WIDTH(cvtss2si, VEC_GPR_XMMM),
    MASK(pmovmskb), MASK(movmskpd), MASK(movmskps), FLAGGED(ucomisd), FLAGGED(comisd), FLAGGED(ucomiss), FLAGGED(comiss),
};
/* Plain copies, by size and alignment. */
static const struct fast load_table[4] = {
    {"4", {0, 0}, {load4_bd, load4_bi}, 0}, {"8", {0, 0}, {load8_bd, load8_bi}, 0},
    {"16", {load16_rr, load16_rr}, {load16_bd, load16_bi}, 0}, {"16a", {load16_rr, load16_rr}, {load16a_bd, load16a_bi}, 0}};
static const struct fast store_table[4] = {
    {"4", {0, 0}, {store4_bd, store4_bi}, 0}, {"8", {0, 0}, {store8_bd, store8_bi}, 0},
    {"16", {load16_rr, load16_rr}, {store16_bd, store16_bi}, 0}, {"16a", {load16_rr, load16_rr}, {store16a_bd, store16a_bi}, 0}};

uop_fn vec_fast[FPU_VECTOR_OPS][4]; /* of registers without and with REX.W, of memory by form */

static void enter(unsigned id, const struct fast *f)
{
    vec_fast[id][0] = f->rr[0];
    vec_fast[id][1] = f->rr[1];
    vec_fast[id][2] = f->memory[0];
    vec_fast[id][3] = f->memory[1];
}

/* After vector.c's own constructor. */
__attribute__((constructor(FPU_VECTOR_PRIORITY + 1))) static void index_by_operation(void)
{
    const struct vec_op *op;
    for (unsigned id = 0; (op = fpu_vector_operation(id)) != NULL; id++) {
        if (op->copy && (op->form == VEC_XMM_XMMM || op->form == VEC_STORE)) {
            unsigned n = op->mem_size == 4 ? 0 : op->mem_size == 8 ? 1 : op->aligned ? 3 : 2;
            enter(id, op->form == VEC_STORE ? &store_table[n] : &load_table[n]);
            continue;
        }
        for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
            if (table[i].form == op->form && strcmp(table[i].name, op->name) == 0)
                enter(id, &table[i]);
    }
}
