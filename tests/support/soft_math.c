/* The software core's own mathematics (cpu/soft/fpu/x87_math.c, vec_approx.c), as a program.
 *
 * `soft_math x87` reads lines of hexadecimal numbers "MODRM CONTROL ST1-MANTISSA ST1-EXPONENT ST0-MANTISSA ST0-EXPONENT",
 * runs D9 MODRM on them, and prints "STATUS" and mantissa and exponent of ST(0) and ST(1) of each.
 * `soft_math vector` reads "OPCODE OPERAND", runs F3 0F OPCODE, and prints the 32-bit result.
 * `soft_math errors` prints the greatest relative errors of RCPSS and RSQRTSS over all mantissas.
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
