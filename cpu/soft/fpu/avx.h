/* Instructions of vectors with a VEX prefix: AVX, AVX2, FMA, F16C and what AES, PCLMULQDQ have there. Intel SDM 2A 2.3 and
 * the instructions' pages.
 *
 * A guest has them only where the host has, and most are computed by the host's own instruction, on values that lie in
 * registers: a *stub* is that instruction with fixed operands and a RET, one for each vector length and each immediate. They
 * are part of the program, so they need no memory that is written and executed. What only moves data is C (interp/exec_avx.c).
 */
#ifndef SOFT_AVX_H
#define SOFT_AVX_H

#include "soft/fpu/fpu.h"

union ymm {
    union xmm half[2];
    uint8_t b[32];
    uint16_t w[16];
    uint32_t d[8];
    uint64_t q[4];
} __attribute__((aligned(32)));

/* What a stub works on. */
struct avx_values {
    union ymm reg;    /* ModRM.reg, in and out */
    union ymm vvvv;   /* VEX.vvvv */
    union ymm rm;     /* ModRM.rm, or memory with zeros above */
    union ymm is4;    /* bits 7:4 of the immediate */
    uint64_t gpr_reg; /* ModRM.reg or ModRM.rm, where that is a general register */
    uint64_t gpr_rm;
    uint64_t flags;   /* out: RFLAGS */
};

enum avx_form {
    /* computed by stubs */
    AVX_R_VM,     /* reg = f(vvvv, rm); also of reg itself (FMA) */
    AVX_R_M,      /* reg = f(rm) */
    AVX_G_M,      /* general register = f(rm) */
    AVX_R_VG,     /* reg = f(vvvv, general register or memory) */
    AVX_FLAGS,    /* flags = f(reg, rm) */
    AVX_V_M,      /* vvvv = f(rm, immediate): shifts, by the stub that takes the count from a register */
    AVX_M_R,      /* rm or memory = f(reg) */
    AVX_OF_STUBS,
    /* plain code; see exec_avx.c */
    AVX_LOAD = AVX_OF_STUBS, AVX_STORE, AVX_LOAD_SCALAR, AVX_STORE_SCALAR, AVX_LOAD_LOW, AVX_LOAD_HIGH, AVX_STORE_LOW, AVX_STORE_HIGH,
    AVX_FROM_GPR, AVX_TO_GPR, AVX_LOAD_8, AVX_STORE_8, AVX_EXTRACT, AVX_INSERT, AVX_EXTRACT_PS, AVX_INSERT_PS, AVX_BROADCAST,
    AVX_EXTRACT_128, AVX_INSERT_128, AVX_ZERO, AVX_MASK_LOAD, AVX_MASK_STORE, AVX_GATHER, AVX_MASKMOV, AVX_LDMXCSR, AVX_STMXCSR,
    AVX_SHIFT_BYTES, AVX_LANES, /* each half by an operation of SSE, which need not be the host's (vec_approx.c) */
    AVX_STRINGS,                /* PCMPxSTRx: by the operation of SSE */
};
/* Bytes of memory: these, or of the vector a part. */
enum { AVX_FULL = 64, AVX_HALF, AVX_QUARTER, AVX_EIGHTH, AVX_DUP /* 8, or 32 */ };
/* Vector length: 128 or 256 bits alone, both, or not looked at. */
enum { AVX_L128, AVX_L256, AVX_LBOTH, AVX_LIG };
enum { AVX_WIG = 2 };
enum { AVX_NO_IMM, AVX_IMM, AVX_IS4 };
/* Not floating point, or it is: which results can be denormal, so that an unmasked underflow has to be looked for. */
enum { AVX_NO_FLOAT, AVX_EXACT, AVX_PS, AVX_PD, AVX_SS, AVX_SD, AVX_PH };
enum { AVX_ANY, AVX_REG_ONLY, AVX_MEM_ONLY };

struct avx_op {
    const uint8_t *stub; /* the first; NULL: plain code */
    uint8_t map, prefix, opcode, w, l;
    uint8_t form;        /* enum avx_form */
    uint8_t mem, imm, real, when;
    int8_t group;        /* ModRM.reg, where that is part of the opcode; else -1 */
    bool aligned;        /* a memory operand must be: #GP(0) */
    uint8_t feature[2];  /* enum vec_feature, of 128 and 256 bits */
};

/* The operation, or NULL. prefix: VEX.pp. modrm: 0 where there is none. */
const struct avx_op *avx_lookup(unsigned map, unsigned prefix, uint8_t opcode, bool w, bool l, uint8_t modrm, bool code64);
unsigned avx_memory_size(const struct avx_op *op, bool l);
bool avx_uses_vvvv(const struct avx_op *op, bool reg_form);
/* Whether the guest's instruction is a function of vectors, at most one general register and one operand in memory, which the host's
 * own computes alike. (The approximations of vec_approx.c are not the host's.) */
bool avx_repeats(const struct avx_op *op, bool memory);
/* Computes: true if an unmasked exception was raised. reg is then as it was. */
bool avx_compute(struct fpu *f, const struct avx_op *op, bool l, uint8_t imm, struct avx_values *v);

/* The stub itself, and calls of it that nothing is to be done around: integers, or floating point while flags gather in the
 * host's MXCSR. Registers by the address of their struct fpu.xmm; the result is what a general register gets. */
const uint8_t *avx_stub_of(const struct avx_op *op, bool l, uint8_t imm);
uint64_t avx_call_rr(const uint8_t *stub, union xmm *reg, const union xmm *vvvv, const union xmm *rm);
uint64_t avx_call_rm(const uint8_t *stub, union xmm *reg, const union xmm *vvvv, const void *rm);
uint64_t avx_call_rm16(const uint8_t *stub, union xmm *reg, const union xmm *vvvv, const void *rm);

static inline void avx_get(const struct fpu *f, unsigned n, union ymm *to)
{
    to->half[0] = f->xmm[n];
    to->half[1] = f->high[n];
}
static inline void avx_put(struct fpu *f, unsigned n, const union ymm *from)
{
    f->xmm[n] = from->half[0];
    f->high[n] = from->half[1];
}

#endif
