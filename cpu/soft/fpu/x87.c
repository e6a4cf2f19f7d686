/* x87 instructions by the host's own x87: AMD64 APM volume 5.
 *
 * The exact path loads the guest's whole x87 environment into the host (FRSTOR), runs the instruction from a table of
 * stubs, and takes the environment back with FNSAVE, which neither waits nor faults: tags, stack faults, condition codes,
 * precision control and the response to unmasked exceptions are then the hardware's. The frequent instructions have short
 * paths in x87_fast.c, taken when nothing special can happen.
 *
 * Guest exceptions never reach the host: an unmasked one stays pending in the status word until FNSAVE has cleared it.
 */
#include <string.h>

#include "soft/fpu/x87.h"

/* FNSAVE's 32-bit protected-mode layout. */
struct image {
    uint32_t cw, sw, tw, fip, fcs_fop, fdp, fds;
    uint8_t st[8][10];
} __attribute__((packed));
_Static_assert(sizeof(struct image) == 108, "layout of FNSAVE");
_Static_assert(sizeof(struct image) <= sizeof(((struct x87_context *)0)->scratch), "a store keeps an image in scratch");

/* #define HERE __attribute__((visibility("hidden")))
HERE uint64_t fpu_x87_native(void *memory, struct image *image, const void *stub, uint64_t rflags): the RFLAGS after it.
 * fpu_x87_register_stubs: D8 C0 to DF FF, fpu_x87_memory_stubs: D8 /0 to DF /7 with (%rdi); four bytes each. */
asm(".text\n"
    ".local fpu_x87_native, fpu_x87_register_stubs, fpu_x87_memory_stubs\n"
    ".type fpu_x87_native, @function\n"
    "fpu_x87_native:\n"
    "    pushq %rbx\n"
    "    movq %rsi, %rbx\n"
    "    frstor (%rbx)\n"
    "    pushq %rcx\n"
    "    popfq\n"
    "    call *%rdx\n"
    "    pushfq\n"
    "    popq %rax\n"
    "    fnsave (%rbx)\n"
    "    popq %rbx\n"
    "    ret\n"
    ".size fpu_x87_native, .-fpu_x87_native\n"
    ".balign 16\n"
    "fpu_x87_register_stubs:\n"
    ".set fpu_opcode, 0xD8\n"
    ".rept 8\n"
    ".set fpu_modrm, 0xC0\n"
    ".rept 64\n"
    ".byte fpu_opcode, fpu_modrm, 0xC3, 0x90\n"
    ".set fpu_modrm, fpu_modrm + 1\n"
    ".endr\n"
    ".set fpu_opcode, fpu_opcode + 1\n"
    ".endr\n"
    "fpu_x87_memory_stubs:\n"
    ".set fpu_opcode, 0xD8\n"
    ".rept 8\n"
    ".set fpu_modrm, 0x07\n"
    ".rept 8\n"
    ".byte fpu_opcode, fpu_modrm, 0xC3, 0x90\n"
    ".set fpu_modrm, fpu_modrm + 8\n"
    ".endr\n"
    ".set fpu_opcode, fpu_opcode + 1\n"
    ".endr\n");
#define HERE __attribute__((visibility("hidden")))
HERE uint64_t fpu_x87_native(void *memory, struct image *image, const void *stub, uint64_t rflags);
HERE extern const uint8_t fpu_x87_register_stubs[8][64][4], fpu_x87_memory_stubs[8][8][4];

enum { FLAGS_ALWAYS = 0x202, FLAGS_X87 = 0x45 /* CF PF ZF */, EXCEPTIONS = 0x3F };

static void load_image(const struct fpu *f, struct image *im)
{
    unsigned top = f->sw >> 11 & 7;
    uint32_t tw = 0;
    for (unsigned i = 0; i < 8; i++)
        tw |= (f->tag >> i & 1 ? 0u : 3u) << 2 * i;
    /* Unmasked exceptions that are pending already (CR0.NE clear) must not fault here. */
    *im = (struct image){.cw = 0xFFFF0000u | f->cw | (fpu_pending(f) ? EXCEPTIONS : 0), .sw = f->sw, .tw = tw};
    for (unsigned i = 0; i < 8; i++)
        memcpy(im->st[i], &f->st[(top + i) & 7], 10);
}

static bool empty(const struct fpu *f, unsigned i) { return !(f->tag >> (((f->sw >> 11) + i) & 7) & 1); }

/* The condition codes that the instruction defines (APM 5). The others stay as they were, as on AMD's processors (FFREE
 * clears C1): a host may do something else. opcode: 0 to 7 for D8 to DF. */
static unsigned defined_codes(struct fpu *f, unsigned opcode, uint8_t modrm)
{
    unsigned group = modrm >> 3 & 7, comparison = empty(f, 0) || empty(f, modrm & 7) ? X87_C1 : 0; /* stack underflow */
    if (modrm < 0xC0)
        return !(opcode & 1) && (group == 2 || group == 3) ? X87_CC : X87_C1;
    switch (opcode) {
    case 0: case 4: case 6: return group == 2 || group == 3 ? X87_CC : X87_C1;
    case 1:
        switch (modrm) {
        case 0xE4: case 0xE5: case 0xF5: case 0xF8: return X87_CC; /* FTST, FXAM, FPREM1, FPREM */
        case 0xF2: case 0xFB: case 0xFE: case 0xFF: return X87_C1 | X87_C2; /* FPTAN, FSINCOS, FSIN, FCOS */
        default: return X87_C1;
        }
    case 2: return modrm == 0xE9 ? X87_CC : comparison;
    case 3: return comparison;
    case 5:
        if (group)
            return group < 4 ? X87_C1 : X87_CC;
        f->sw &= (uint16_t)~X87_C1;
        return 0;
    default:
        if (group)
            return group > 3 ? comparison : X87_C1;
        f->sw &= (uint16_t)~X87_C1;
        return 0;
    }
}

static void take_image(struct fpu *f, const struct image *im, unsigned codes)
{
    f->sw = (uint16_t)((im->sw & ~(X87_CC & ~codes)) | (f->sw & X87_CC & ~codes));
    fpu_summarise(f);
    unsigned top = f->sw >> 11 & 7;
    f->tag = 0;
    for (unsigned i = 0; i < 8; i++) {
        if ((im->tw >> 2 * i & 3) != 3)
            f->tag |= (uint8_t)(1u << i);
        memcpy(&f->st[(top + i) & 7], im->st[i], 10);
    }
}

/* Aliases, which not every manual has, become the documented instruction that AMD's processors do for them, so that a host
 * of any vendor does the same. DF C0 (FFREEP) and D9 D8 have no such one and are done without the host (x87_fast.c). */
static unsigned documented(unsigned opcode, uint8_t *modrm)
{
    unsigned i = *modrm & 7;
    switch (opcode << 3 | (*modrm >> 3 & 7)) {
    case 7 << 3 | 2: case 7 << 3 | 3: /* FSTP */
        *modrm = (uint8_t)(0xD8 | i);
        return 5;
    case 5 << 3 | 1: case 7 << 3 | 1: /* FXCH */
        *modrm = (uint8_t)(0xC8 | i);
        return 1;
    case 6 << 3 | 2: /* FCOMP */
        *modrm = (uint8_t)(0xD8 | i);
        return 0;
    case 4 << 3 | 2: case 4 << 3 | 3: /* FCOM, FCOMP */
        return 0;
    default:
        return opcode;
    }
}

int fpu_x87_register(struct x87_context *ctx, unsigned opcode)
{
    opcode = documented(opcode, &ctx->modrm);
    if (fpu_x87_fast_register(ctx, opcode) || fpu_x87_math_register(ctx, opcode))
        return FPU_OK;
    struct image im;
    load_image(ctx->fpu, &im);
    uint64_t flags = fpu_x87_native(NULL, &im, fpu_x87_register_stubs[opcode][ctx->modrm & 63],
                                    FLAGS_ALWAYS | (ctx->flags & FLAGS_X87));
    ctx->flags = (uint32_t)flags & FLAGS_X87;
    take_image(ctx->fpu, &im, defined_codes(ctx->fpu, opcode, ctx->modrm));
    return FPU_OK;
}

int fpu_x87_load(struct x87_context *ctx, unsigned opcode)
{
    if (fpu_x87_fast_load(ctx, opcode) || fpu_x87_math_load(ctx, opcode))
        return FPU_OK;
    struct image im;
    load_image(ctx->fpu, &im);
    fpu_x87_native(ctx->mem, &im, fpu_x87_memory_stubs[opcode][ctx->modrm >> 3 & 7], FLAGS_ALWAYS);
    take_image(ctx->fpu, &im, defined_codes(ctx->fpu, opcode, ctx->modrm));
    return FPU_OK;
}

int fpu_x87_store(struct x87_context *ctx, unsigned opcode)
{
    if (fpu_x87_fast_store(ctx, opcode))
        return FPU_OK;
    struct image im;
    load_image(ctx->fpu, &im);
    fpu_x87_native(ctx->mem, &im, fpu_x87_memory_stubs[opcode][ctx->modrm >> 3 & 7], FLAGS_ALWAYS);
    /* Every unmasked exception but precision leaves the destination as it was. */
    if (im.sw & ~im.cw & (EXCEPTIONS & ~X87_PE)) {
        take_image(ctx->fpu, &im, X87_C1);
        return FPU_NO_STORE;
    }
    memcpy(ctx->scratch, &im, sizeof im);
    return FPU_OK;
}

void fpu_x87_store_commit(struct x87_context *ctx)
{
    if (fpu_x87_fast_commit(ctx))
        return;
    struct image im;
    memcpy(&im, ctx->scratch, sizeof im);
    take_image(ctx->fpu, &im, X87_C1);
}

/* --- control instructions --- */
static int fnop(struct x87_context *ctx)
{
    (void)ctx;
    return FPU_OK;
}

static int fninit(struct x87_context *ctx)
{
    fpu_init(ctx->fpu);
    return FPU_OK;
}

static int fnclex(struct x87_context *ctx)
{
    ctx->fpu->sw &= 0x7F00;
    ctx->fpu->x87_ready = false;
    return FPU_OK;
}

static int fldcw(struct x87_context *ctx)
{
    uint16_t cw;
    memcpy(&cw, ctx->mem, 2);
    ctx->fpu->cw = fpu_control_word(cw);
    fpu_summarise(ctx->fpu);
    return FPU_OK;
}

static int fnstcw(struct x87_context *ctx)
{
    memcpy(ctx->mem, &ctx->fpu->cw, 2);
    return FPU_OK;
}

static int fnstsw(struct x87_context *ctx)
{
    memcpy(ctx->mem, &ctx->fpu->sw, 2);
    return FPU_OK;
}

/* The full tag word: 0 valid, 1 zero, 2 special, 3 empty. */
static uint16_t full_tags(const struct fpu *f)
{
    unsigned tw = 0;
    for (unsigned i = 0; i < 8; i++) {
        unsigned exponent = f->st[i].exponent & 0x7FFF, tag = 0;
        uint64_t mantissa = f->st[i].mantissa;
        if (!(f->tag >> i & 1))
            tag = 3;
        else if (exponent == 0 && mantissa == 0)
            tag = 1;
        else if (exponent == 0 || exponent == 0x7FFF || !(mantissa >> 63))
            tag = 2;
        tw |= tag << 2 * i;
    }
    return (uint16_t)tw;
}

static void put16(uint8_t *mem, unsigned offset, uint64_t value)
{
    uint16_t v = (uint16_t)value;
    memcpy(mem + offset, &v, 2);
}

/* A word in a doubleword whose other half is reserved: ones. */
static void put_padded(uint8_t *mem, unsigned offset, uint64_t value)
{
    put16(mem, offset, value);
    put16(mem, offset + 2, 0xFFFF);
}

static void put32(uint8_t *mem, unsigned offset, uint64_t value)
{
    uint32_t v = (uint32_t)value;
    memcpy(mem + offset, &v, 4);
}

static uint16_t get16(const uint8_t *mem, unsigned offset)
{
    uint16_t v;
    memcpy(&v, mem + offset, 2);
    return v;
}

static uint32_t get32(const uint8_t *mem, unsigned offset)
{
    uint32_t v;
    memcpy(&v, mem + offset, 4);
    return v;
}

/* The environment in its four formats. Outside protected mode pointers are linear addresses, without selectors. */
static void put_environment(const struct x87_context *ctx)
{
    const struct fpu *f = ctx->fpu;
    uint8_t *m = ctx->mem;
    uint64_t ip = f->fip, dp = f->fdp;
    if (!ctx->protected_mode) {
        ip += (uint64_t)f->fcs << 4;
        dp += (uint64_t)f->fds << 4;
    }
    if (ctx->operand16) {
        put16(m, 0, f->cw);
        put16(m, 2, f->sw);
        put16(m, 4, full_tags(f));
        put16(m, 6, ip);
        put16(m, 10, dp);
        put16(m, 8, ctx->protected_mode ? f->fcs : (ip >> 4 & 0xF000) | f->fop);
        put16(m, 12, ctx->protected_mode ? f->fds : dp >> 4 & 0xF000);
        return;
    }
    put_padded(m, 0, f->cw);
    put_padded(m, 4, f->sw);
    put_padded(m, 8, full_tags(f));
    if (ctx->protected_mode) {
        put32(m, 12, ip);
        put32(m, 16, (uint32_t)f->fop << 16 | f->fcs);
        put32(m, 20, dp);
        put_padded(m, 24, f->fds);
    } else {
        put_padded(m, 12, ip);
        put32(m, 16, (ip >> 4 & 0xFFFF000) | f->fop);
        put_padded(m, 20, dp);
        put32(m, 24, dp >> 4 & 0xFFFF000);
    }
}

static void get_environment(struct x87_context *ctx)
{
    struct fpu *f = ctx->fpu;
    const uint8_t *m = ctx->mem;
    unsigned step = ctx->operand16 ? 2 : 4;
    f->cw = fpu_control_word(get16(m, 0));
    f->sw = get16(m, step);
    uint16_t tw = get16(m, 2 * step);
    f->tag = 0;
    for (unsigned i = 0; i < 8; i++)
        if ((tw >> 2 * i & 3) != 3)
            f->tag |= (uint8_t)(1u << i);
    f->fcs = f->fds = 0;
    if (ctx->operand16) {
        f->fip = get16(m, 6);
        f->fdp = get16(m, 10);
        if (ctx->protected_mode) {
            f->fcs = get16(m, 8);
            f->fds = get16(m, 12);
            f->fop = 0;
        } else {
            f->fop = get16(m, 8) & 0x7FF;
            f->fip |= (uint64_t)(get16(m, 8) & 0xF000) << 4;
            f->fdp |= (uint64_t)(get16(m, 12) & 0xF000) << 4;
        }
    } else if (ctx->protected_mode) {
        f->fip = get32(m, 12);
        f->fcs = get16(m, 16);
        f->fop = get16(m, 18) & 0x7FF;
        f->fdp = get32(m, 20);
        f->fds = get16(m, 24);
    } else {
        f->fip = get16(m, 12) | (uint64_t)(get32(m, 16) & 0xFFFF000) << 4;
        f->fop = get32(m, 16) & 0x7FF;
        f->fdp = get16(m, 20) | (uint64_t)(get32(m, 24) & 0xFFFF000) << 4;
    }
    fpu_summarise(f);
}

static int fldenv(struct x87_context *ctx)
{
    get_environment(ctx);
    return FPU_OK;
}

static int fnstenv(struct x87_context *ctx)
{
    put_environment(ctx);
    return FPU_OK;
}

static void fnstenv_commit(struct x87_context *ctx)
{
    ctx->fpu->cw |= EXCEPTIONS;
    fpu_summarise(ctx->fpu);
}

static int frstor(struct x87_context *ctx)
{
    struct fpu *f = ctx->fpu;
    get_environment(ctx);
    unsigned top = f->sw >> 11 & 7, offset = ctx->operand16 ? 14 : 28;
    for (unsigned i = 0; i < 8; i++)
        memcpy(&f->st[(top + i) & 7], ctx->mem + offset + 10 * i, 10);
    return FPU_OK;
}

static int fnsave(struct x87_context *ctx)
{
    const struct fpu *f = ctx->fpu;
    put_environment(ctx);
    unsigned top = f->sw >> 11 & 7, offset = ctx->operand16 ? 14 : 28;
    for (unsigned i = 0; i < 8; i++)
        memcpy(ctx->mem + offset + 10 * i, &f->st[(top + i) & 7], 10);
    return FPU_OK;
}

static void fnsave_commit(struct x87_context *ctx) { fpu_init(ctx->fpu); }

/* ---- the map ---- */
/* For each opcode functions that know it: the context carries only ModRM. */
#define FOR_OPCODE(n)                                                                                                  \
    static int register_##n(struct x87_context *ctx) { return fpu_x87_register(ctx, n); }                              \
    static int load_##n(struct x87_context *ctx) { return fpu_x87_load(ctx, n); }
#define FOR_STORES(n) static int store_##n(struct x87_context *ctx) { return fpu_x87_store(ctx, n); }
FOR_OPCODE(0) FOR_OPCODE(1) FOR_OPCODE(2) FOR_OPCODE(3) FOR_OPCODE(4) FOR_OPCODE(5) FOR_OPCODE(6) FOR_OPCODE(7)
FOR_STORES(1) FOR_STORES(3) FOR_STORES(5) FOR_STORES(7)

#define LOAD(n, size, text) {.fn = load_##n, .form = X87_LOAD, .mem_size = size, .pointers = true, .name = text}
#define STORE(n, size, text) \
    {.fn = store_##n, .commit = fpu_x87_store_commit, .form = X87_STORE, .mem_size = size, .pointers = true, .name = text}
#define CONTROL(f, kind, size, text) {.fn = f, .form = kind, .mem_size = size, .control = true, .name = text}
#define ARITHMETIC(n, size, t) \
    {LOAD(n, size, "fadd" t), LOAD(n, size, "fmul" t), LOAD(n, size, "fcom" t), LOAD(n, size, "fcomp" t), \
     LOAD(n, size, "fsub" t), LOAD(n, size, "fsubr" t), LOAD(n, size, "fdiv" t), LOAD(n, size, "fdivr" t)}

static const struct x87_op memory_ops[8][8] = {
    ARITHMETIC(0, 4, " m32fp"),
    {LOAD(1, 4, "fld m32fp"), {.form = X87_NONE}, STORE(1, 4, "fst m32fp"), STORE(1, 4, "fstp m32fp"),
     {.fn = fldenv, .form = X87_ENV, .name = "fldenv"}, {.fn = fldcw, .form = X87_LOAD, .mem_size = 2, .name = "fldcw"},
     {.fn = fnstenv, .commit = fnstenv_commit, .form = X87_ENV, .store_env = true, .control = true, .name = "fnstenv"},
     CONTROL(fnstcw, X87_STORE, 2, "fnstcw")},
    ARITHMETIC(2, 4, " m32int"),
    {LOAD(3, 4, "fild m32int"), STORE(3, 4, "fisttp m32int"), STORE(3, 4, "fist m32int"), STORE(3, 4, "fistp m32int"),
     {.form = X87_NONE}, LOAD(3, 10, "fld m80fp"), {.form = X87_NONE}, STORE(3, 10, "fstp m80fp")},
    ARITHMETIC(4, 8, " m64fp"),
    {LOAD(5, 8, "fld m64fp"), STORE(5, 8, "fisttp m64int"), STORE(5, 8, "fst m64fp"), STORE(5, 8, "fstp m64fp"),
     {.fn = frstor, .form = X87_ENV, .name = "frstor"}, {.form = X87_NONE},
     {.fn = fnsave, .commit = fnsave_commit, .form = X87_ENV, .store_env = true, .control = true, .name = "fnsave"},
     CONTROL(fnstsw, X87_STORE, 2, "fnstsw m16")},
    ARITHMETIC(6, 2, " m16int"),
    {LOAD(7, 2, "fild m16int"), STORE(7, 2, "fisttp m16int"), STORE(7, 2, "fist m16int"), STORE(7, 2, "fistp m16int"),
     LOAD(7, 10, "fbld"), LOAD(7, 8, "fild m64int"), STORE(7, 10, "fbstp"), STORE(7, 8, "fistp m64int")},
};

#define REGISTERS(n, text) {.fn = register_##n, .form = X87_REG, .pointers = true, .name = text}
static const struct x87_op register_ops[8] = {
    REGISTERS(0, "d8"), REGISTERS(1, "d9"), REGISTERS(2, "da"), REGISTERS(3, "db"),
    REGISTERS(4, "dc"), REGISTERS(5, "dd"), REGISTERS(6, "de"), REGISTERS(7, "df"),
};
#define OF_FORM(n, kind, text) {.fn = register_##n, .form = kind, .pointers = true, .name = text}
static const struct x87_op fcmov_a = OF_FORM(2, X87_CMOV, "fcmov"), fcmov_b = OF_FORM(3, X87_CMOV, "fcmovn"),
                           fcomi_b = OF_FORM(3, X87_FLAGS, "fcomi"), fcomi_f = OF_FORM(7, X87_FLAGS, "fcomip");
static const struct x87_op op_fnop = {.fn = fnop, .form = X87_REG, .pointers = true, .name = "fnop"},
                           op_fneni = CONTROL(fnop, X87_REG, 0, "fneni"), op_fninit = CONTROL(fninit, X87_REG, 0, "fninit"),
                           op_fnclex = CONTROL(fnclex, X87_REG, 0, "fnclex"),
                           op_fnstsw_ax = CONTROL(fnstsw, X87_AX, 2, "fnstsw ax");

/* Of each opcode, the ModRM bytes C0 to FF that are instructions: a bit for each. The aliases of D9 D8, DC D0, DC D8,
 * DD C8, DE D0, DF C0, DF C8, DF D0 and DF D8 exist, as on every processor with an x87. */
static const uint64_t defined[8] = {
    0xFFFFFFFFFFFFFFFF, 0xFFFF7F33FF01FFFF, 0x00000200FFFFFFFF, 0x00FFFF1FFFFFFFFF,
    0xFFFFFFFFFFFFFFFF, 0x0000FFFFFFFFFFFF, 0xFFFFFFFF02FFFFFF, 0x00FFFF01FFFFFFFF,
};

const struct x87_op *fpu_lookup_x87(uint8_t opcode, uint8_t modrm)
{
    unsigned n = opcode & 7;
    if (modrm < 0xC0)
        return memory_ops[n][modrm >> 3 & 7].form == X87_NONE ? NULL : &memory_ops[n][modrm >> 3 & 7];
    if (!(defined[n] >> (modrm & 63) & 1))
        return NULL;
    if (n == 1 && modrm == 0xD0)
        return &op_fnop;
    if (n == 2 && modrm < 0xE0)
        return &fcmov_a;
    if (n == 3) {
        if (modrm < 0xE0)
            return &fcmov_b;
        if (modrm >= 0xE8)
            return &fcomi_b;
        return modrm == 0xE2 ? &op_fnclex : modrm == 0xE3 ? &op_fninit : &op_fneni;
    }
    if (n == 7 && modrm >= 0xE0)
        return modrm == 0xE0 ? &op_fnstsw_ax : &fcomi_f;
    return &register_ops[n];
}
