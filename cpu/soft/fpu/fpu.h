/* x87, MMX and SSE to SSE4.2 of the software core: state, and a table of operations.
 *
 * The decoder looks an opcode up with fpu_lookup_vector() or fpu_lookup_x87() and emits one generic micro-op that
 * computes addresses and checks alignment, reads the memory operand into a buffer, calls `fn`, and writes
 * registers or memory back. Nothing here touches guest memory or raises: an operation returns 0 or an exception to raise.
 */
#ifndef SOFT_FPU_H
#define SOFT_FPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

union xmm {
    uint8_t b[16];
    uint16_t w[8];
    uint32_t d[4];
    uint64_t q[2];
    float f[4];
    double lf[2];
} __attribute__((aligned(16)));

struct x87_reg {
    uint64_t mantissa;
    uint16_t exponent; /* with the sign in bit 15 */
} __attribute__((aligned(16)));

struct fpu {
    struct x87_reg st[8]; /* physical registers R0-R7; ST(i) is st[(top + i) & 7]; MMi is st[i].mantissa */
    uint16_t cw, sw;      /* sw holds TOP in bits 11-13 */
    uint8_t tag;          /* abridged: bit i set when Ri is not empty */
    uint16_t fop;         /* low 11 bits of the last x87 opcode */
    uint16_t fcs, fds;
    uint64_t fip, fdp;
    uint32_t mxcsr;       /* without the flags that the host's MXCSR still holds: read it with fpu_mxcsr() */
    bool mxcsr_lazy;      /* the host's MXCSR collects this vCPU's exception flags */
    bool x87_ready;       /* cw is 37F, nothing is pending, and the host's x87 has no flag that sw has not */
    union xmm xmm[16];
    union xmm high[16];   /* upper halves of YMM registers */
};

static inline uint32_t fpu_host_mxcsr(void)
{
    uint32_t v;
    __asm__ volatile("stmxcsr %0" : "=m"(v));
    return v;
}
static inline uint32_t fpu_mxcsr(const struct fpu *f)
{
    return f->mxcsr | (f->mxcsr_lazy ? fpu_host_mxcsr() & 0x3F : 0);
}
/* While a vCPU runs, SSE exception flags gather in the host's MXCSR. Before the thread does anything else that may
 * use floating point (another vCPU, a callback, returning to the caller) they are taken over. */
static inline void fpu_collect(struct fpu *f)
{
    f->mxcsr = fpu_mxcsr(f);
    f->mxcsr_lazy = false;
    f->x87_ready = false;
}

enum fpu_fault {
    FPU_OK = 0,
    FPU_XM = 1,      /* SIMD exception: #XM, or #UD if CR4.OSXMMEXCPT is clear */
    FPU_NO_STORE = 2 /* X87_STORE only: an unmasked x87 exception is now pending; memory is not written, no commit */
};

/* CPUID bits that a guest without them must see as #UD. Those up to SSE4.2 every guest has. */
enum vec_feature { VEC_BASE, VEC_SSE3, VEC_SSSE3, VEC_SSE41, VEC_SSE42, VEC_AVX, VEC_AVX2, VEC_FMA, VEC_F16C, VEC_AES, VEC_PCLMUL, VEC_SHA,
                   VEC_VAES, VEC_VPCLMUL, VEC_FEATURES };

/* How a vector operation takes its operands. reg is ModRM.reg, rm is ModRM.rm. */
enum vec_form {
    VEC_NONE,         /* no such instruction: #UD */
    VEC_XMM_XMMM,     /* dst = xmm[reg]; src = xmm[rm] or memory of mem_size (upper bytes of src read as zero) */
    VEC_STORE,        /* dst = xmm[rm] or memory of mem_size; src = xmm[reg] (moves to r/m) */
    VEC_MM_MMM,       /* the same with MMX registers (64-bit values in q[0]); enters MMX mode */
    VEC_MM_STORE,
    VEC_XMM_GPR,      /* dst = xmm[reg]; src.q[0] = r/m32 or, with REX.W, r/m64 (or mem_size bytes of memory) */
    VEC_GPR_STORE,    /* r/m32/64 = dst.q[0] after fn; src = xmm[reg] (MOVD/MOVQ r/m, xmm; PEXTRx); dst is scratch.
                         A register is written as 32 bits (zero-extended), or 64 with REX.W, whatever mem_size is */
    VEC_GPR_XMMM,     /* gpr[reg] (32, or 64 with REX.W) = dst.q[0] after fn; src = xmm[rm] or memory; dst is scratch */
    VEC_MM_GPR, VEC_GPR_STORE_MM, VEC_GPR_MM, /* as above, with MMX registers (rm is MMX for VEC_GPR_MM) */
    VEC_XMM_MMM,      /* dst = xmm[reg]; src = mm[rm] or memory (CVTPI2PS, MOVQ2DQ) */
    VEC_MM_XMMM,      /* dst = mm[reg]; src = xmm[rm] or memory (CVTPS2PI, MOVDQ2Q) */
    VEC_XMM_IMM,      /* group 12-14 shifts: dst = xmm[rm], count = imm8; ModRM.reg selects (see fpu_lookup_vector) */
    VEC_MM_IMM,
    VEC_FLAGS,        /* COMISS, UCOMISS, PTEST, PCMPxSTRx: fn sets *flags (CF PF AF ZF SF OF bits of RFLAGS) */
    VEC_FLAGS_GPR,    /* PCMPxSTRI: flags, and ECX = dst.q[0] after fn; dst is a scratch copy of xmm[reg]. PCMPxSTRM are
                         VEC_FLAGS: fn writes ctx->fpu->xmm[0] itself */
    VEC_MASKMOV,      /* MASKMOVDQU: data xmm[reg], mask xmm[rm]; byte stores to DS:rDI where the mask byte has bit 7; no fn */
    VEC_MM_MASKMOV,   /* MASKMOVQ: the same with 8-byte MMX registers */
    VEC_EMMS,         /* fn(ctx, NULL, NULL) */
};

struct vec_context {
    struct fpu *fpu;
    uint64_t rax, rdx;   /* for PCMPESTRx lengths; full registers */
    uint32_t flags;      /* out, for VEC_FLAGS* */
    uint8_t imm;
    bool rex_w;
};

/* fn(ctx, dst, src): dst is read and written. Returns enum fpu_fault; on a fault dst is left unchanged, so dst may be
 * the register itself; dst and src may be the same. With 8-byte operands (MMX) dst->q[1] may be overwritten.
 * Both pointers are 16-byte aligned. src is NULL for VEC_XMM_IMM and VEC_MM_IMM. */
typedef int (*vec_fn)(struct vec_context *ctx, union xmm *dst, const union xmm *src);

struct vec_op {
    vec_fn fn;
    uint8_t form;       /* enum vec_form */
    uint8_t mem_size;   /* bytes of a memory operand: 1, 2, 4, 8, 16; 0: 4, or 8 with REX.W; 255: register only */
    bool has_imm;
    bool aligned;       /* a 16-byte memory operand must be aligned: #GP(0) */
    bool dst_write_only;/* dst need not be read (and for a store: memory is not read) */
    bool mem_only;      /* register form is #UD */
    bool copy;          /* fn only copies 16 bytes of src to dst: the executor may do it inline */
    uint8_t feature;    /* enum vec_feature */
    uint16_t id;        /* for tables of an executor; given when the program starts */
    const char *name;
};
/* By id; NULL after the last. Valid from constructors of a priority above FPU_VECTOR_PRIORITY on. */
enum { FPU_VECTOR_PRIORITY = 200, FPU_VECTOR_OPS = 512 };
const struct vec_op *fpu_vector_operation(unsigned id);

enum vec_map { VEC_MAP_0F, VEC_MAP_0F38, VEC_MAP_0F3A };
enum vec_prefix { VEC_NP, VEC_66, VEC_F3, VEC_F2 };

/* NULL: not a vector instruction (the decoder goes on), modrm decides for groups (0F 71-73) and for the
 * register/memory forms that differ (MOVLPS/MOVHLPS, MOVSS, MOVQ...). */
const struct vec_op *fpu_lookup_vector(enum vec_map map, uint8_t opcode, enum vec_prefix prefix, uint8_t modrm);

/* x87: opcode D8-DF with ModRM. */
enum x87_form {
    X87_NONE,     /* #UD */
    X87_REG,      /* registers only */
    X87_LOAD,     /* memory operand of mem_size bytes is read into `mem` before fn */
    X87_STORE,    /* fn fills `mem`, mem_size bytes are then written; registers are popped after the store succeeded,
                     by `commit` */
    X87_AX,       /* FNSTSW AX: fn fills mem[0..1], which goes to AX */
    X87_FLAGS,    /* FCOMI...: fn sets flags (ZF PF CF) */
    X87_CMOV,     /* FCMOVcc: fn reads flags */
    X87_ENV,      /* FLDENV/FNSTENV/FSAVE/FRSTOR: mem_size depends on operand size: 14/28, 94/108 */
};
struct x87_context {
    struct fpu *fpu;
    uint32_t flags;      /* RFLAGS in for X87_CMOV, out for X87_FLAGS */
    uint8_t modrm;
    bool operand16;      /* 16-bit operand size (REX.W overrides 66), for X87_ENV */
    bool protected_mode; /* for X87_ENV's layout */
    uint8_t *mem;        /* at least 108 bytes */
    uint8_t scratch[128] __attribute__((aligned(16))); /* private to fn and commit */
};
struct x87_op {
    int (*fn)(struct x87_context *ctx);
    void (*commit)(struct x87_context *ctx); /* after a store was written (X87_STORE, X87_ENV); may be NULL */
    uint8_t form;
    uint8_t mem_size;    /* 2, 4, 8, 10 (0 for X87_ENV) */
    bool store_env;      /* for X87_ENV: writes memory */
    bool control;        /* no-wait form: does not check for pending exceptions (FNINIT, FNSTSW, FNSTCW, FNCLEX, FNSTENV, FNSAVE) */
    bool pointers;       /* updates FOP, FCS:FIP and, with a memory operand, FDS:FDP: see fpu_set_pointers() */
    const char *name;
};
const struct x87_op *fpu_lookup_x87(uint8_t opcode, uint8_t modrm);
/* An unmasked exception is pending (SW.ES): with CR0.NE the next waiting instruction raises #MF. */
/* Bytes of the memory operand of an X87_ENV instruction: FLDENV and FNSTENV are D9, FRSTOR and FNSAVE are DD. */
static inline unsigned fpu_env_size(uint8_t opcode, bool operand16)
{
    return (operand16 ? 14u : 28u) + (opcode == 0xDD ? 80u : 0u);
}
/* Short paths: false if they do not apply, and then nothing has changed. */
bool fpu_x87_fast_register(struct x87_context *ctx, unsigned opcode);
bool fpu_x87_fast_load(struct x87_context *ctx, unsigned opcode);
bool fpu_x87_fast_store(struct x87_context *ctx, unsigned opcode);
bool fpu_x87_fast_commit(struct x87_context *ctx);
/* The bits that exist in the control word; bit 6 reads as one. */
static inline uint16_t fpu_control_word(uint16_t value) { return (value & 0x1F3F) | 0x40; }

static inline bool fpu_pending(const struct fpu *f) { return (f->sw & 0x80) != 0; }

/* After an x87 instruction with op->pointers has completed (also with FPU_NO_STORE): rip is its own address (of the
 * first prefix), ea the offset of its memory operand. FDS:FDP change only with has_memory. */
static inline void fpu_set_pointers(struct fpu *f, uint8_t opcode, uint8_t modrm, uint16_t cs, uint64_t rip,
                                    bool has_memory, uint16_t ds, uint64_t ea)
{
    f->fop = (uint16_t)((opcode & 7) << 8 | modrm);
    f->fcs = cs;
    f->fip = rip;
    if (has_memory) {
        f->fds = ds;
        f->fdp = ea;
    }
}

/* Every MMX instruction but EMMS, and but VEC_XMM_MMM with a memory operand, does this after its faults have been checked
 * (#UD, #NM, #MF if fpu_pending(), #PF) and before fn is called, also if that then raises #XM: TOP = 0 and all registers
 * valid. */
static inline void fpu_enter_mmx(struct fpu *f)
{
    f->sw &= (uint16_t)~0x3800;
    f->tag = 0xFF;
}
static inline void fpu_write_mmx(struct fpu *f, unsigned i, uint64_t value)
{
    f->st[i & 7].mantissa = value;
    f->st[i & 7].exponent = 0xFFFF;
}

void fpu_init(struct fpu *f);  /* FNINIT */
void fpu_reset(struct fpu *f); /* power-up: FNINIT and MXCSR 0x1F80, registers zero */
/* Unmasked exception flags set ES and B of the status word: after any change of the control or status word. */
static inline void fpu_summarise(struct fpu *f)
{
    f->x87_ready = false;
    if (f->sw & ~f->cw & 0x3F)
        f->sw |= 0x8080;
    else
        f->sw &= 0x7F7F;
}

/* The 512-byte FXSAVE image, of which hardware writes FPU_FXSAVE_SIZE bytes. long_mode: 64-bit FIP/FDP with REX.W, and 16 instead of 8 XMM registers. */
#define FPU_FXSAVE_SIZE(long_mode) ((long_mode) ? 416u : 288u)
void fpu_fxsave(const struct fpu *f, uint8_t image[512], bool rex_w, bool long_mode);
/* false: MXCSR has reserved bits, #GP(0), nothing is changed. */
bool fpu_fxrstor(struct fpu *f, const uint8_t image[512], bool rex_w, bool long_mode);
/* XSAVE area, components x87 (bit 0), SSE (bit 1) and AVX (bit 2) of rfbm. area has at least FPU_XSAVE_SIZE(rfbm) bytes; those
 * that the instruction does not write keep their values, so the caller reads the area first. The compacted format differs
 * in its header alone: AVX is the first component behind the header in both formats. xrstor: any format; XCR0 limits what
 * the header may name; false: #GP(0). */
enum { FPU_XSAVE_LEGACY = 576, FPU_XSAVE_AVX = 832 };
#define FPU_XSAVE_SIZE(rfbm) ((rfbm) & 4 ? FPU_XSAVE_AVX : FPU_XSAVE_LEGACY)
enum fpu_xsave_form { XSAVE_STANDARD, XSAVE_OPTIMISED, XSAVE_COMPACTED };
void fpu_xsave(const struct fpu *f, uint8_t *area, uint64_t rfbm, enum fpu_xsave_form form, bool rex_w, bool long_mode);
bool fpu_xrstor(struct fpu *f, const uint8_t *area, uint64_t rfbm, uint64_t xcr0, bool rex_w, bool long_mode);
bool fpu_xsave_compacted(const uint8_t *area);
bool fpu_load_mxcsr(struct fpu *f, uint32_t mxcsr); /* false: #GP(0) */
uint64_t fpu_xinuse(const struct fpu *f);

#endif
