/* The operations of avx.h: the stubs, their index, and how they are called. */
#pragma GCC target("sse4.2")
#include "soft/fpu/avx.h"
#include "soft/fpu/vec.h"

/* A stub is the instruction with ymm0 (or rax) as ModRM.reg, ymm1 as VEX.vvvv, ymm2 (or rdx) as ModRM.rm, ymm3 as the register
 * in its immediate, and RET, in 8 bytes; 256 of them where there is an immediate. Those of 256 bits follow those of 128. */
__asm__(".pushsection .text\n"
        ".macro avx_stub map, prefix, opcode, w, l, vvvv, modrm, imm\n"
        " .if \\imm == 1\n"
        "  .set avx_imm, 0\n"
        "  .rept 256\n"
        "   .byte 0xC4, 0xE0 + \\map, (\\w & 1) * 128 + (15 - \\vvvv) * 8 + \\l * 4 + \\prefix, \\opcode, \\modrm, avx_imm, 0xC3, 0x90\n"
        "   .set avx_imm, avx_imm + 1\n"
        "  .endr\n"
        " .elseif \\imm == 2\n"
        "  .byte 0xC4, 0xE0 + \\map, (\\w & 1) * 128 + (15 - \\vvvv) * 8 + \\l * 4 + \\prefix, \\opcode, \\modrm, 0x30, 0xC3, 0x90\n"
        " .else\n"
        "  .byte 0xC4, 0xE0 + \\map, (\\w & 1) * 128 + (15 - \\vvvv) * 8 + \\l * 4 + \\prefix, \\opcode, \\modrm, 0xC3, 0x90, 0x90\n"
        " .endif\n"
        ".endm\n"
        ".macro avx_stubs map, prefix, opcode, w, l, form, imm\n"
        " .set avx_vvvv, 0\n"
        " .if \\form == 0 || \\form == 3\n"
        "  .set avx_vvvv, 1\n"
        " .endif\n"
        " .set avx_modrm, 0xC2\n"
        " .if \\form == 6\n" /* the source is ModRM.reg, the result ModRM.rm */
        "  .set avx_modrm, 0xD0\n"
        " .endif\n"
        " .balign 8\n"
        "avx_\\map\\()_\\prefix\\()_\\opcode\\()_\\w\\():\n"
        " .if \\l != 1\n"
        "  avx_stub \\map, \\prefix, \\opcode, \\w, 0, avx_vvvv, avx_modrm, \\imm\n"
        " .endif\n"
        " .if \\l == 1 || \\l == 2\n"
        "  avx_stub \\map, \\prefix, \\opcode, \\w, 1, avx_vvvv, avx_modrm, \\imm\n"
        " .endif\n"
        ".endm\n"
        /* avx_call(stub, values) */
        ".type avx_call, @function\n"
        "avx_call:\n"
        " vmovdqa (%rsi), %ymm0\n"
        " vmovdqa 32(%rsi), %ymm1\n"
        " vmovdqa 64(%rsi), %ymm2\n"
        " vmovdqa 96(%rsi), %ymm3\n"
        " movq 128(%rsi), %rax\n"
        " movq 136(%rsi), %rdx\n"
        " call *%rdi\n"
        " vmovdqa %ymm0, (%rsi)\n"
        " movq %rax, 128(%rsi)\n"
        " pushfq\n"
        " popq 144(%rsi)\n"
        " vzeroupper\n"
        " ret\n"
        ".size avx_call, . - avx_call\n"
        /* avx_call_rr(stub, reg, vvvv, rm): registers by the address of their lower halves; the upper halves lie 256 bytes
         * behind. The result is rax. avx_call_rm: rm is the address of 32 or, avx_call_rm16, of 16 bytes. */
        ".macro avx_begin name\n"
        ".type \\name, @function\n"
        "\\name:\n"
        " vmovdqa (%rsi), %xmm0\n"
        " vinsertf128 $1, 256(%rsi), %ymm0, %ymm0\n"
        " vmovdqa (%rdx), %xmm1\n"
        " vinsertf128 $1, 256(%rdx), %ymm1, %ymm1\n"
        ".endm\n"
        ".macro avx_end name\n"
        " call *%rdi\n"
        " vmovdqa %xmm0, (%rsi)\n"
        " vextractf128 $1, %ymm0, 256(%rsi)\n"
        " vzeroupper\n"
        " ret\n"
        ".size \\name, . - \\name\n"
        ".endm\n"
        "avx_begin avx_call_rr\n vmovdqa (%rcx), %xmm2\n vinsertf128 $1, 256(%rcx), %ymm2, %ymm2\n avx_end avx_call_rr\n"
        "avx_begin avx_call_rm\n vmovdqu (%rcx), %ymm2\n avx_end avx_call_rm\n"
        "avx_begin avx_call_rm16\n vmovdqu (%rcx), %xmm2\n avx_end avx_call_rm16\n"
        ".globl avx_call_rr, avx_call_rm, avx_call_rm16\n"
        ".hidden avx_call_rr, avx_call_rm, avx_call_rm16\n"
        ".popsection");
_Static_assert(AVX_R_VM == 0 && AVX_R_VG == 3 && AVX_M_R == 6 && AVX_L256 == 1 && AVX_LBOTH == 2 && AVX_IMM == 1 && AVX_IS4 == 2, "as avx_stubs has them");
_Static_assert(offsetof(struct fpu, high) == offsetof(struct fpu, xmm) + 256, "as avx_begin has them");
_Static_assert(offsetof(struct avx_values, gpr_reg) == 128 && offsetof(struct avx_values, flags) == 144, "as avx_call has them");
void avx_call(const uint8_t *stub, struct avx_values *v) __attribute__((visibility("hidden")));

/* The same numbers, as the assembler sees them. */
#define NUMBER_AVX_R_VM 0
#define NUMBER_AVX_R_M 1
#define NUMBER_AVX_G_M 2
#define NUMBER_AVX_R_VG 3
#define NUMBER_AVX_FLAGS 4
#define NUMBER_AVX_M_R 6
#define NUMBER_AVX_L128 0
#define NUMBER_AVX_L256 1
#define NUMBER_AVX_LBOTH 2
#define NUMBER_AVX_LIG 3
#define NUMBER_AVX_WIG 2
#define NUMBER_0 0
#define NUMBER_1 1
#define NUMBER_AVX_NO_IMM 0
#define NUMBER_AVX_IMM 1
#define NUMBER_AVX_IS4 2
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)
#define PASTE(a, b) a##b
#define EMIT(map, prefix, opcode, w, l, form, imm)                                                                     \
    __asm__(".pushsection .text\n avx_stubs " TEXT(map) ", " TEXT(prefix) ", " TEXT(opcode) ", " TEXT(w) ", " TEXT(l) ", " TEXT(form) ", " TEXT(imm) \
            "\n.popsection");
#define STUB(map, prefix, opcode, w, l, form, mem, imm, real, when, f128, f256)                                        \
    EMIT(map, prefix, opcode, NUMBER_##w, NUMBER_##l, NUMBER_##form, NUMBER_##imm)
#define PLAIN(...)
#include "soft/fpu/avx_table.h"

/* Their addresses. */
#define NAME(map, prefix, opcode, w) NAME2(map, prefix, opcode, w)
#define NAME2(map, prefix, opcode, w) avx_##map##_##prefix##_##opcode##_##w
#define STUB(map, prefix, opcode, w, l, form, mem, imm, real, when, f128, f256)                                        \
    extern const uint8_t NAME(map, prefix, opcode, NUMBER_##w)[] __attribute__((visibility("hidden")));
#define PLAIN(...)
#include "soft/fpu/avx_table.h"

#define STUB(map_, prefix_, opcode_, w_, l_, form_, mem_, imm_, real_, when_, f128, f256)                              \
    {.stub = NAME(map_, prefix_, opcode_, NUMBER_##w_), .map = map_, .prefix = prefix_, .opcode = opcode_, .w = w_, .l = l_, \
     .form = form_, .mem = mem_, .imm = imm_, .real = real_, .when = when_, .group = -1, .feature = {VEC_##f128, VEC_##f256}},
#define PLAIN(map_, prefix_, opcode_, group_, w_, l_, form_, mem_, imm_, aligned_, when_, f128, f256)                   \
    {.map = map_, .prefix = prefix_, .opcode = opcode_, .w = w_, .l = l_, .form = form_, .mem = mem_, .imm = imm_,     \
     .when = when_, .group = group_, .aligned = aligned_, .feature = {VEC_##f128, VEC_##f256}},
static const struct avx_op operations[] = {
#include "soft/fpu/avx_table.h"
};
enum { OPERATIONS = sizeof operations / sizeof operations[0] };
_Static_assert(OPERATIONS < UINT16_MAX, "by_opcode");

static uint16_t by_opcode[4][4][256], following[OPERATIONS]; /* 1 + the number of the first, of the next; 0: none */

__attribute__((constructor)) static void make_index(void)
{
    for (unsigned n = OPERATIONS; n-- > 0;) {
        uint16_t *at = &by_opcode[operations[n].map][operations[n].prefix][operations[n].opcode];
        following[n] = *at;
        *at = (uint16_t)(n + 1);
    }
}

/* Most of those with a general register take W1 for W0 outside 64-bit mode; VPEXTRQ and VPINSRQ are #UD there, as on AMD's processors. */
static bool looks_at_w(const struct avx_op *op, bool code64)
{
    bool general = op->form == AVX_G_M || op->form == AVX_R_VG || op->form == AVX_FROM_GPR || op->form == AVX_TO_GPR;
    bool permute = op->map == 3 && op->opcode <= 1; /* VPERMQ, VPERMPD: AMD's processors take either for W1 */
    return op->w != AVX_WIG && (code64 || !general) && !permute;
}

const struct avx_op *avx_lookup(unsigned map, unsigned prefix, uint8_t opcode, bool w, bool l, uint8_t modrm, bool code64)
{
    if (map > 3)
        return NULL;
    bool reg = modrm >= 0xC0;
    for (unsigned n = by_opcode[map][prefix][opcode]; n; n = following[n - 1]) {
        const struct avx_op *op = &operations[n - 1];
        if ((op->l < AVX_LBOTH && op->l != l) || (op->when == AVX_REG_ONLY && !reg) || (op->when == AVX_MEM_ONLY && reg) ||
            (op->group >= 0 && op->group != (modrm >> 3 & 7)) || (looks_at_w(op, code64) && op->w != w) ||
            (!code64 && op->mem == 8 && (op->form == AVX_EXTRACT || op->form == AVX_INSERT)))
            continue;
        return op; /* of two that differ in W alone the first is without, which is what counts outside 64-bit mode */
    }
    return NULL;
}

unsigned avx_memory_size(const struct avx_op *op, bool l)
{
    unsigned full = l && op->l != AVX_LIG ? 32 : 16;
    switch (op->mem) {
    case AVX_FULL: return full;
    case AVX_HALF: return full / 2;
    case AVX_QUARTER: return full / 4;
    case AVX_EIGHTH: return full / 8;
    case AVX_DUP: return l ? 32 : 8;
    default: return op->mem;
    }
}

bool avx_uses_vvvv(const struct avx_op *op, bool reg_form)
{
    switch (op->form) {
    case AVX_R_VM: case AVX_R_VG: case AVX_V_M: case AVX_SHIFT_BYTES: case AVX_INSERT: case AVX_INSERT_PS: case AVX_INSERT_128:
    case AVX_MASK_LOAD: case AVX_MASK_STORE: case AVX_GATHER: case AVX_LOAD_HIGH: case AVX_LOAD_LOW:
        return true;
    case AVX_LOAD_SCALAR: case AVX_STORE_SCALAR: return reg_form;
    case AVX_LANES: return op->l == AVX_LIG;
    default: return false;
    }
}

bool avx_repeats(const struct avx_op *op, bool memory)
{
    switch (op->form) {
    case AVX_R_VM: case AVX_R_M: case AVX_LOAD_SCALAR: case AVX_STORE_SCALAR: case AVX_LOAD_LOW: case AVX_LOAD_HIGH: case AVX_LOAD_8:
    case AVX_STORE_8: case AVX_FROM_GPR: case AVX_TO_GPR: case AVX_EXTRACT_128: case AVX_INSERT_128: case AVX_INSERT_PS: case AVX_BROADCAST:
        return true;
    case AVX_LOAD: case AVX_STORE: case AVX_V_M: case AVX_SHIFT_BYTES: return !memory; /* of memory: avx_load and avx_store */
    case AVX_STORE_LOW: case AVX_STORE_HIGH: return memory;
    default: return false;
    }
}

static bool tiny(const struct avx_op *op, const union ymm *v)
{
    switch (op->real) {
    case AVX_PS:
        for (unsigned i = 0; i < 8; i++)
            if (!(v->d[i] & 0x7F800000) && (v->d[i] & 0x7FFFFF))
                return true;
        return false;
    case AVX_PD:
        for (unsigned i = 0; i < 4; i++)
            if (!(v->q[i] & 0x7FF0000000000000) && (v->q[i] & 0xFFFFFFFFFFFFF))
                return true;
        return false;
    case AVX_SS: return !(v->d[0] & 0x7F800000) && (v->d[0] & 0x7FFFFF);
    case AVX_SD: return !(v->q[0] & 0x7FF0000000000000) && (v->q[0] & 0xFFFFFFFFFFFFF);
    case AVX_PH:
        for (unsigned i = 0; i < 8; i++)
            if (!(v->w[i] & 0x7C00) && (v->w[i] & 0x3FF))
                return true;
        return false;
    default: return false;
    }
}

const uint8_t *avx_stub_of(const struct avx_op *op, bool l, uint8_t imm)
{
    unsigned each = op->imm == AVX_IMM ? 256 * 8 : 8;
    return op->stub + (l && op->l == AVX_LBOTH ? each : 0) + (op->imm == AVX_IMM ? imm * 8u : 0);
}

bool avx_compute(struct fpu *f, const struct avx_op *op, bool l, uint8_t imm, struct avx_values *v)
{
    bool shift = op->form == AVX_V_M; /* mem: the opcode of the form whose count is a register */
    const uint8_t *stub = avx_stub_of(shift ? &operations[by_opcode[op->map][op->prefix][op->mem] - 1] : op, l, imm);
    if (op->real == AVX_NO_FLOAT) {
        avx_call(stub, v);
        return false;
    }
    uint32_t host = vec_float_enter(f);
    union ymm before = v->reg;
    avx_call(stub, v);
    if (vec_float_leave(f, host, host && tiny(op, &v->reg))) {
        v->reg = before;
        return true;
    }
    return false;
}
