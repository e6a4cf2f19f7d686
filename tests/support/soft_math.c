/* The software core's floating point (cpu/soft/fpu), as a program.
 *
 * `soft_math x87` reads lines of hexadecimal numbers "MODRM CONTROL ST1-MANTISSA ST1-EXPONENT ST0-MANTISSA ST0-EXPONENT",
 * runs D9 MODRM on them, and prints "STATUS" and mantissa and exponent of ST(0) and ST(1) of each.
 * `soft_math vector` reads "OPCODE OPERAND", runs F3 0F OPCODE, and prints the 32-bit result.
 * `soft_math errors` prints the greatest relative errors of RCPSS and RSQRTSS over all mantissas.
 * `soft_math digests` prints "NAME DIGEST" for groups of operations: of all that they do to chosen operands.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "soft/fpu/fpu.h"

static uint32_t scalar(uint8_t opcode, uint32_t operand)
{
    union xmm to = {.q = {0, 0}}, from = {.q = {0, 0}};
    struct vec_context context = {.fpu = NULL};
    from.d[0] = operand;
    fpu_lookup_vector(VEC_MAP_0F, opcode, VEC_F3, 0xC1)->fn(&context, &to, &from);
    return to.d[0];
}

static double error_of(uint8_t opcode)
{
    double worst = 0;
    for (uint32_t bits = 0x3F800000; bits < 0x40800000; bits++) { /* 1 to 4 */
        float x, y;
        uint32_t result = scalar(opcode, bits);
        memcpy(&x, &bits, 4);
        memcpy(&y, &result, 4);
        double exact = opcode == 0x53 ? 1 / (double)x : 1 / sqrt((double)x);
        worst = fmax(worst, fabs((double)y / exact - 1));
    }
    return worst;
}

/* ---- digests ---- */

static uint64_t state;

static uint64_t next(void) /* splitmix64 */
{
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

static uint64_t mix(uint64_t digest, const void *data, size_t size)
{
    for (size_t i = 0; i < size; i++)
        digest = (digest ^ ((const uint8_t *)data)[i]) * 0x100000001B3;
    return digest;
}

/* Numbers of middle size; one in four is zero, denormal, infinite or NaN. Unsupported formats are none of them. */
static struct x87_reg any_register(void)
{
    uint64_t n = next(), mantissa = next() | 1ull << 63;
    uint16_t sign = (uint16_t)(n << 15);
    switch (n >> 8 & 31) {
    case 0: return (struct x87_reg){0, sign};
    case 1: return (struct x87_reg){mantissa >> (1 + (n >> 16 & 31)), sign};
    case 2: return (struct x87_reg){1ull << 63, sign | 0x7FFF};
    case 3: return (struct x87_reg){mantissa | 1ull << 62, sign | 0x7FFF};
    case 4: return (struct x87_reg){(mantissa & ~(1ull << 62)) | 1, sign | 0x7FFF};
    case 5: case 6: return (struct x87_reg){mantissa, (uint16_t)(n >> 16 & 0xFFFF) % 0x7FFF | sign};
    default: return (struct x87_reg){mantissa & ~0ull << (n >> 24 & 63), (uint16_t)(16383 - 40 + (n >> 16 & 0x7F) % 80) | sign};
    }
}

static uint32_t any_single(void)
{
    static const uint32_t special[] = {0, 0x80000000, 1, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00123, 0xFF800456};
    uint64_t n = next();
    return n >> 32 & 3 ? ((uint32_t)n & 0x807FFFFF) | (uint32_t)(100 + (n >> 40 & 63)) << 23 : n >> 36 & 3 ? special[(n >> 40) % 10] : (uint32_t)n;
}
static uint64_t any_double(void)
{
    static const uint64_t special[] = {0, 1ull << 63, 1, 0x800FFFFFFFFFFFFF, 0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000,
                                       0xFFF0000000000000, 0x7FF8000000000123, 0xFFF0000000000456, 0x41DFFFFFFFC00000, 0x43E0000000000000};
    uint64_t n = next(), m = next();
    return n & 3 ? (m & 0x800FFFFFFFFFFFFF) | (uint64_t)(1000 + (n >> 8 & 63)) << 52 : n >> 4 & 3 ? special[(n >> 8) % 12] : m;
}
static union xmm any_operand(void)
{
    union xmm v;
    unsigned kind = (unsigned)next() % 3;
    for (unsigned i = 0; i < 4; i++)
        v.d[i] = any_single();
    for (unsigned i = 0; i < 2 && kind; i++)
        v.q[i] = kind == 1 ? any_double() : next();
    return v;
}

static uint64_t of_x87(const struct x87_op *op, uint8_t modrm)
{
    uint64_t digest = 0xCBF29CE484222325;
    for (unsigned n = 0; n < 60; n++) {
        struct fpu f;
        uint8_t memory[128] = {0};
        struct x87_context context = {.fpu = &f, .flags = (uint32_t)next() & 0x45, .modrm = modrm, .protected_mode = true, .mem = memory};
        fpu_reset(&f);
        f.cw = fpu_control_word((uint16_t)(0x37F | (n & 1 ? next() & 0xC00 : 0)));
        f.sw = (uint16_t)(next() & 0x7F00);
        f.tag = n & 3 ? 0xFF & ~(1u << (((f.sw >> 11) + 7) & 7)) : (uint8_t)next();
        for (unsigned i = 0; i < 8; i++)
            f.st[i] = any_register();
        struct x87_reg r = any_register();
        uint64_t value = op->mem_size == 8 ? any_double() : op->mem_size == 4 ? any_single() : next();
        if (op->mem_size == 10)
            memcpy(memory, &r, 10);
        else
            memcpy(memory, &value, 8);
        int result = op->fn(&context);
        if (result == FPU_OK && op->commit)
            op->commit(&context);
        fpu_collect(&f);
        digest = mix(mix(mix(digest, &f.sw, 2), &f.tag, 1), memory, op->mem_size);
        digest = mix(digest, &context.flags, 4);
        for (unsigned i = 0; i < 8; i++)
            digest = mix(digest, &f.st[i], 10);
    }
    return digest;
}

static uint64_t of_vector(const struct vec_op *op)
{
    uint64_t digest = 0xCBF29CE484222325;
    for (unsigned n = 0; n < 60; n++) {
        struct fpu f;
        union xmm to = any_operand(), from = any_operand();
        fpu_reset(&f);
        f.xmm[0] = any_operand();
        uint32_t control = 0x1F80 | (n & 1 ? (uint32_t)next() & 0xE040 : 0);
        fpu_load_mxcsr(&f, control);
        struct vec_context context = {.fpu = &f, .rax = next() % 20, .rdx = next() % 20, .imm = (uint8_t)next(), .rex_w = n & 2};
        op->fn(&context, &to, &from);
        fpu_collect(&f);
        bool mmx = op->form == VEC_MM_MMM || op->form == VEC_MM_STORE || op->form == VEC_MM_GPR || op->form == VEC_MM_XMMM || op->form == VEC_MM_IMM;
        digest = mix(mix(mix(mix(digest, &to, mmx ? 8 : 16), &f.xmm[0], 16), &f.mxcsr, 4), &context.flags, 4);
    }
    return digest;
}

/* A second encoding, which no manual has. */
static bool is_alias(unsigned opcode, unsigned modrm)
{
    unsigned group = modrm >> 3 & 7;
    return modrm >= 0xC0 && ((opcode == 0xD9 && group == 3) || (opcode == 0xDC && (group == 2 || group == 3)) || (opcode == 0xDD && group == 1) ||
                             (opcode == 0xDE && group == 2) || (opcode == 0xDF && group < 4) || (opcode == 0xDB && group == 4));
}

static void digests(void)
{
    for (unsigned opcode = 0xD8; opcode <= 0xDF; opcode++) {
        uint64_t digest = 0;
        for (unsigned modrm = 0; modrm < 256; modrm += modrm < 0xC0 ? 8 : 1) {
            const struct x87_op *op = modrm < 0x40 || modrm >= 0xC0 ? fpu_lookup_x87((uint8_t)opcode, (uint8_t)modrm) : NULL;
            if (!op || op->form == X87_ENV || is_alias(opcode, modrm))
                continue;
            state = opcode << 8 | modrm;
            uint64_t one = of_x87(op, (uint8_t)modrm);
            digest = mix(digest, &one, 8);
        }
        printf("x87-%02x %016" PRIx64 "\n", opcode, digest);
    }
    const struct vec_op *op;
    uint64_t digest = 0;
    for (unsigned id = 0; (op = fpu_vector_operation(id)); id++) {
        if (op->feature > VEC_SSE42) /* the host computes it, where it can */
            continue;
        if (op->form == VEC_MASKMOV || op->form == VEC_MM_MASKMOV || op->form == VEC_EMMS)
            continue;
        state = mix(0, op->name, strlen(op->name));
        uint64_t one = of_vector(op);
        digest += one; /* in any order */
    }
    printf("vector %016" PRIx64 "\n", digest);
}

int main(int argc, char **argv)
{
    unsigned modrm, control;
    uint64_t m[2];
    unsigned e[2];
    uint32_t operand;
    if (argc == 2 && strcmp(argv[1], "errors") == 0) {
        printf("%.9g %.9g\n", error_of(0x53), error_of(0x52));
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "digests") == 0)
        digests();
    while (argc == 2 && strcmp(argv[1], "vector") == 0 && scanf("%x %" SCNx32, &modrm, &operand) == 2)
        printf("%08" PRIx32 "\n", scalar((uint8_t)modrm, operand));
    while (argc == 2 && strcmp(argv[1], "x87") == 0 &&
           scanf("%x %x %" SCNx64 " %x %" SCNx64 " %x", &modrm, &control, &m[1], &e[1], &m[0], &e[0]) == 6) {
        struct fpu f;
        struct x87_context context = {.fpu = &f, .modrm = (uint8_t)modrm};
        fpu_reset(&f);
        f.cw = fpu_control_word((uint16_t)control);
        f.sw = 6 << 11;
        f.tag = 0xC0;
        for (unsigned i = 0; i < 2; i++)
            f.st[6 + i] = (struct x87_reg){m[i], (uint16_t)e[i]};
        fpu_lookup_x87(0xD9, (uint8_t)modrm)->fn(&context);
        unsigned top = f.sw >> 11 & 7;
        printf("%04x", f.sw);
        for (unsigned i = 0; i < 2; i++)
            printf(" %016" PRIx64 " %04x", f.st[(top + i) & 7].mantissa, f.st[(top + i) & 7].exponent);
        printf("\n");
    }
    return 0;
}
