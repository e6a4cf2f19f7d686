/* What an instruction is, read off its bytes: prefixes, opcode, operands. Enough for the instructions that generate.c and
 * sequence.c make; EVEX and 16-bit addressing are not among them. */
#ifndef ORACLE_FORM_H
#define ORACLE_FORM_H

#include "oracle.h"
#include "soft/fpu/fpu.h"

enum {
    F_CF = 1, F_PF = 4, F_AF = 0x10, F_ZF = 0x40, F_SF = 0x80, F_TF = 0x100, F_DF = 0x400, F_OF = 0x800, F_AC = 0x40000,
    F_STATUS = F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF,
};

struct form {
    uint8_t map, opcode, modrm, rex, imm8 /* the first byte behind the operands */;
    bool mode32, has_modrm, p66, p67, lock, f2, f3;
    bool vex, l;        /* a VEX prefix; its pp is in p66, f2 and f3, its W, R, X and B are in rex */
    unsigned vvvv;
    unsigned prefixes;  /* bytes before the opcode's escape, REX not counted */
    unsigned size;      /* operand size in bytes: 1 for byte opcodes, else 2, 4 or 8 */
    unsigned reg, rm;   /* with REX */
    unsigned length;
};

struct form form_of(const uint8_t *bytes, bool mode32);

static inline unsigned form_group(const struct form *x) { return x->modrm >> 3 & 7; }
static inline bool form_memory(const struct form *x) { return x->has_modrm && x->modrm < 0xC0; }
static inline bool form_x87(const struct form *x) { return x->map == MAP_ONE && (x->opcode & 0xF8) == 0xD8; }
bool form_x87_alias(const struct form *x); /* a second encoding, which not every manual has */
static inline bool form_string(const struct form *x)
{
    return x->map == MAP_ONE && ((x->opcode >= 0xA4 && x->opcode <= 0xA7) || (x->opcode >= 0xAA && x->opcode <= 0xAF) ||
                                 (x->opcode >= 0x6C && x->opcode <= 0x6F));
}
enum vec_prefix form_prefix(const struct form *x);
/* The MMX or SSE operation, or NULL. */
const struct vec_op *form_vector(const struct form *x);
bool form_mmx(const struct form *x); /* of MMX registers */

/* Status flags that the instruction reads, and those that it gives a defined or undefined value whatever its operands. */
unsigned form_reads(const struct form *x);
unsigned form_writes(const struct form *x);

/* The memory operand's address in that state (EA of ModRM forms); the instruction lies at `rip`. */
uint64_t form_address(const struct form *x, const uint8_t *bytes, const struct cpu_state *s, uint64_t rip);

#endif
