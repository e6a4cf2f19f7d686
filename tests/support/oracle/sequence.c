/* Short programs: integer and SSE instructions in a row, jumps over single ones, and a loop around them all. Where
 * generate.c tests instructions one by one, these test what the decoder makes of them together: flags that nobody
 * reads, comparisons fused with jumps, blocks that are linked and run again.
 */
#include <string.h>

#include "vendors.h"

struct program {
    struct rng *r;
    struct insn *insn;
    bool mode32, x87, common;
    unsigned vex; /* one in so many instructions is another; 0: none has VEX */
    unsigned undefined; /* common: status flags that some vendor's manual leaves undefined here */
};

/* General registers that programs change. RSP, the data pointer (R14 or ESI) and the loop counter (R15 or EBP) they do not. */
static const uint8_t registers64[] = {0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13}, registers32[] = {0, 1, 2, 3, 7};

static unsigned any_register(struct program *p)
{
    return p->mode32 ? registers32[rng_below(p->r, sizeof registers32)] : registers64[rng_below(p->r, sizeof registers64)];
}

static void put(struct program *p, unsigned byte) { p->insn->bytes[p->insn->length++] = (uint8_t)byte; }

static void put_immediate(struct program *p, unsigned size)
{
    static const uint32_t edges[] = {0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF};
    uint32_t v = rng_below(p->r, 2) ? (uint32_t)rng_next(p->r) : edges[rng_below(p->r, sizeof edges / sizeof edges[0])];
    for (unsigned i = 0; i < size; i++)
        put(p, v >> 8 * i & 0xFF);
}

/* How an instruction of a program is encoded. */
enum { BYTE = 1 /* may not take a 66 prefix or REX.W to mean another size */, NO_MEMORY = 2, LONG_MAP = 4, NO_REGISTER = 8 };

/* Prefixes, opcode, ModRM (and address) with `reg` (or a random register if it is -1). Returns the immediate size of Iz. */
static unsigned encode(struct program *p, unsigned opcode, int reg, unsigned how, unsigned mandatory)
{
    bool memory = (!(how & NO_MEMORY) && rng_one_in(p->r, 3)) || (how & NO_REGISTER), p66 = !mandatory && rng_one_in(p->r, 5), w = !p->mode32 && rng_below(p->r, 2);
    unsigned r = reg >= 0 ? (unsigned)reg : any_register(p), rm = memory ? (p->mode32 ? 6 : 14) : any_register(p);
    if (mandatory)
        put(p, mandatory);
    if (p66)
        put(p, 0x66);
    unsigned rex = (w ? 8 : 0) | (r & 8 ? 4 : 0) | (rm & 8 ? 1 : 0);
    if (!p->mode32 && (rex || rng_one_in(p->r, 4)))
        put(p, 0x40 | rex);
    if (how & LONG_MAP)
        put(p, 0x0F);
    put(p, opcode);
    if (memory) {
        put(p, 0x40 | (r & 7) << 3 | (rm & 7));
        put(p, rng_below(p->r, 8) * 8 + (rng_one_in(p->r, 4) ? rng_below(p->r, 8) : 0));
    } else {
        put(p, 0xC0 | (r & 7) << 3 | (rm & 7));
    }
    return p66 && !w ? 2 : 4;
}

static void sse_memory(struct program *p)
{
    static const uint8_t opcodes[] = {0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x51, 0x54, 0x57, 0x58, 0x59, 0x5A, 0x5B, 0x5C,
                                      0x5D, 0x5E, 0x5F, 0x6F, 0x7E, 0x7F, 0xD6, 0xE6, 0xEF, 0xFE, 0xC6, 0x70, 0x14};
    unsigned opcode = opcodes[rng_below(p->r, sizeof opcodes)], prefix = (unsigned[]){0, 0x66, 0xF2, 0xF3}[rng_below(p->r, 4)];
    bool scalar = opcode == 0x10 || opcode == 0x11 || opcode == 0x51 || (opcode >= 0x58 && opcode <= 0x5F && opcode != 0x5B);
    if (prefix == 0xF2 && !scalar && opcode != 0x12 && opcode != 0xE6)
        prefix = 0x66;
    if (prefix == 0xF3 && !scalar && opcode != 0x12 && opcode != 0x16 && opcode != 0x6F && opcode != 0x7F && opcode != 0x7E)
        prefix = 0x66;
    if (!prefix && (opcode >= 0x6F || opcode == 0x51) && opcode != 0xC6)
        prefix = 0x66; /* not MMX */
    if (prefix)
        put(p, prefix);
    if (!p->mode32)
        put(p, 0x41 | (rng_below(p->r, 2) ? 4 : 0)); /* REX.B for R14 */
    put(p, 0x0F);
    put(p, opcode);
    put(p, 0x40 | rng_below(p->r, 8) << 3 | 6);
    put(p, rng_below(p->r, 7) * 16);
    if (opcode == 0xC6 || opcode == 0x70)
        put(p, (unsigned)rng_next(p->r) & 0xFF);
}

/* Any x87 instruction that is not #UD. */
static void x87(struct program *p)
{
    static const uint64_t registers[8] = {
        0xFFFFFFFFFFFFFFFF, 0x35F07F330001FFFF /* no transcendental ones: the last bit */, 0x00000200FFFFFFFF, 0x00FFFF0CFFFFFFFF,
        0xFFFFFFFFFFFFFFFF, 0x0000FFFFFFFFFFFF, 0xFFFFFFFF02FFFFFF, 0x00FFFF0100000000};
    static const uint8_t memory[8] = {0xFF, 0xFD, 0xFF, 0xAF, 0xFF, 0xDF, 0xFF, 0xFF};
    unsigned opcode, n;
    if (rng_below(p->r, 2)) {
        do
            opcode = rng_below(p->r, 8), n = rng_below(p->r, 64);
        while (!(registers[opcode] >> n & 1));
        put(p, 0xD8 + opcode);
        put(p, 0xC0 + n);
        return;
    }
    do
        opcode = rng_below(p->r, 8), n = rng_below(p->r, 8);
    while (!(memory[opcode] >> n & 1) || (n >= 4 && (opcode == 1 || opcode == 5) && rng_below(p->r, 8)));
    if (!p->mode32)
        put(p, 0x41);
    put(p, 0xD8 + opcode);
    put(p, 0x40 | n << 3 | 6);
    put(p, rng_below(p->r, 8) * 16);
}

static void one_instruction(struct program *p)
{
    static const uint8_t sse[] = {0x14, 0x15, 0x54, 0x57, 0x60, 0x63, 0x6C, 0x6D, 0x74, 0x76, 0xD4, 0xDB, 0xEB, 0xEF, 0xFA, 0xFC, 0xFE, 0x6F, 0x58, 0x59, 0x5C, 0xF4};
    struct rng *r = p->r;
    unsigned n;
    switch (rng_below(r, p->x87 ? 72 : 36)) {
    case 0: case 1: case 2: case 3: case 4: /* ALU, both directions and sizes */
        encode(p, rng_below(r, 8) << 3 | rng_below(r, 4), -1, 0, 0);
        break;
    case 5: encode(p, 0x83, (int)rng_below(r, 8), 0, 0); put_immediate(p, 1); break;
    case 6: encode(p, 0x80, (int)rng_below(r, 8), 0, 0); put_immediate(p, 1); break;
    case 7: n = encode(p, 0x81, (int)rng_below(r, 8), 0, 0); put_immediate(p, n); break;
    case 8: encode(p, 0x84 + rng_below(r, 2), -1, 0, 0); break; /* TEST */
    case 9: encode(p, 0xC0 + rng_below(r, 2), (int)rng_below(r, 8), 0, 0); put_immediate(p, 1); break;
    case 10: encode(p, 0xD0 + rng_below(r, 4), (int)rng_below(r, 8), 0, 0); break;
    case 11: encode(p, 0xFE + rng_below(r, 2), (int)rng_below(r, 2), 0, 0); break; /* INC, DEC */
    case 12: encode(p, 0xF6 + rng_below(r, 2), (int)(2 + rng_below(r, 4)), 0, 0); break; /* NOT, NEG, MUL, IMUL */
    case 13: case 14: encode(p, 0x90 + rng_below(r, 16), 0, LONG_MAP, 0); break; /* SETcc */
    case 15: case 16: encode(p, 0x40 + rng_below(r, 16), -1, LONG_MAP, 0); break; /* CMOVcc */
    case 17: encode(p, (unsigned[]){0xA3, 0xAB, 0xB3, 0xBB}[rng_below(r, 4)], -1, LONG_MAP | NO_MEMORY, 0); break; /* BT... */
    case 18: encode(p, 0xBA, (int)(4 + rng_below(r, 4)), LONG_MAP, 0); put_immediate(p, 1); break;
    case 19: encode(p, (unsigned[]){0xA4, 0xAC}[rng_below(r, 2)], -1, LONG_MAP, 0); put_immediate(p, 1); break; /* SHLD, SHRD */
    case 20: encode(p, (unsigned[]){0xAF, 0xBC, 0xBD, 0xB6, 0xB7, 0xBE, 0xBF, 0xC0, 0xC1, 0xB0, 0xB1}[rng_below(r, 11)], -1, LONG_MAP, 0); break;
    case 21: encode(p, 0x86 + rng_below(r, 6), -1, 0, 0); break; /* XCHG, MOV */
    case 22: encode(p, 0x8D, -1, NO_REGISTER, 0); break; /* LEA */
    case 23: put(p, (unsigned[]){0x98, 0x99, 0x9F, 0x9E, 0xF5, 0xF8, 0xF9}[rng_below(r, 7)]); break; /* CBW, CWD, LAHF, SAHF, CMC, CLC, STC */
    case 24: /* PUSHF and POP, so that the flags are kept */
        put(p, 0x9C);
        put(p, 0x58 + rng_below(r, 4));
        break;
    case 25: put(p, 0x50 + rng_below(r, 4)); put(p, 0x58 + rng_below(r, 4)); break;
    case 26: case 27: /* SSE, on registers */
        n = rng_below(r, sizeof sse);
        put(p, 0x66);
        put(p, 0x0F);
        put(p, sse[n]);
        put(p, 0xC0 | rng_below(r, 64));
        break;
    case 28: case 29: case 30: /* SSE arithmetic and moves; mostly memory, aligned */
        sse_memory(p);
        break;
    case 31: /* shifts, and the shuffles of the three prefixes */
        if (rng_below(r, 2)) {
            put(p, 0x66), put(p, 0x0F), put(p, 0x71 + rng_below(r, 3)), put(p, 0xD0 | rng_below(r, 2) << 5 | rng_below(r, 8));
        } else {
            put(p, (unsigned[]){0x66, 0xF2, 0xF3}[rng_below(r, 3)]), put(p, 0x0F), put(p, 0x70), put(p, 0xC0 | rng_below(r, 64));
        }
        put(p, (unsigned)rng_next(r) & 0xFF);
        break;
    case 32: /* COMISS, UCOMISD... and a use of their flags */
        if (rng_below(r, 2))
            put(p, 0x66);
        put(p, 0x0F), put(p, 0x2E + rng_below(r, 2)), put(p, 0xC0 | rng_below(r, 64));
        encode(p, 0x90 + rng_below(r, 16), 0, LONG_MAP, 0);
        break;
    case 33: /* MOVD, CVTSI2SD, CVTTSD2SI, PMOVMSKB */
        encode(p, (unsigned[]){0x2A, 0x2C, 0x2D}[rng_below(r, 3)], -1, LONG_MAP | NO_MEMORY, rng_below(r, 2) ? 0xF2 : 0xF3);
        break;
    case 34: encode(p, (unsigned[]){0x6E, 0x7E, 0xD7}[rng_below(r, 3)], -1, LONG_MAP | NO_MEMORY, 0x66); break;
    case 35: encode(p, rng_below(r, 2) && __builtin_cpu_supports("lzcnt") ? 0xBD : 0xB8, -1, LONG_MAP, 0xF3); break; /* LZCNT, POPCNT */
    case 36 ... 71: x87(p); break;
    default: /* IMUL with an immediate */
        encode(p, 0x6B, -1, 0, 0);
        put_immediate(p, 1);
    }
}

/* Looks at what was put since `start`. In a program for every vendor a comparison comes before what reads undefined flags.
 * False: something that does not belong there, and all since `start` is taken back. */
static bool settle(struct program *p, unsigned start)
{
    struct insn *insn = p->insn;
    if (!p->common)
        return true;
    unsigned before = p->undefined;
    for (unsigned at = start; at < insn->length;) {
        struct form x = form_of(insn->bytes + at, p->mode32);
        if (vendors_unfit_for_programs(&x)) {
            insn->length = start;
            p->undefined = before;
            return false;
        }
        if (form_reads(&x) & p->undefined) {
            memmove(insn->bytes + at + 2, insn->bytes + at, insn->length - at);
            insn->bytes[at] = 0x39; /* CMP */
            insn->bytes[at + 1] = (uint8_t)(0xC0 | rng_below(p->r, 64));
            insn->length += 2;
            at += 2;
            p->undefined = 0;
        }
        p->undefined = (p->undefined & ~form_writes(&x)) | vendors_undefined_flags(&x, vendors_shift_count(&x, NULL));
        at += x.length;
    }
    return true;
}

/* An instruction of vectors with a VEX prefix, which neither reads nor sets status flags. */
static void avx(struct program *p)
{
    enum { L0 = 1, L1 = 2, REG = 4, MEM = 8, IMM = 16, W1 = 32, GROUP = 64, VVVV = 128, GPR = 256 };
    static const struct { uint8_t map, pp, first, last; uint16_t how; } some[] = {
        {1, 1, 0x54, 0x59, VVVV}, {1, 0, 0x54, 0x59, VVVV}, {1, 1, 0x5C, 0x5F, VVVV}, {1, 1, 0x14, 0x15, VVVV},
        {1, 1, 0x60, 0x6D, VVVV}, {1, 1, 0x74, 0x76, VVVV}, {1, 1, 0xD1, 0xD5, VVVV}, {1, 1, 0xD8, 0xE5, VVVV},
        {1, 1, 0xE8, 0xEF, VVVV}, {1, 1, 0xF1, 0xF6, VVVV}, {1, 1, 0xF8, 0xFE, VVVV}, {1, 2, 0x6F, 0x6F, 0}, {1, 2, 0x7F, 0x7F, 0},
        {1, 0, 0x10, 0x11, 0}, {1, 1, 0x28, 0x29, 0}, {1, 2, 0x58, 0x5A, VVVV | L0}, {1, 3, 0x58, 0x5A, VVVV | L0},
        {1, 2, 0x10, 0x11, MEM | L0}, {1, 3, 0x10, 0x11, REG | VVVV | L0}, {1, 1, 0x12, 0x13, MEM | L0}, {1, 0, 0x16, 0x16, VVVV | L0},
        {1, 1, 0x70, 0x70, IMM}, {1, 2, 0x70, 0x70, IMM}, {1, 0, 0xC6, 0xC6, IMM | VVVV}, {1, 1, 0x71, 0x73, IMM | GROUP | REG | VVVV},
        {1, 1, 0x6E, 0x6E, GPR | L0}, {1, 1, 0x7E, 0x7E, GPR | L0}, {1, 2, 0x7E, 0x7E, L0}, {1, 1, 0xD6, 0xD6, L0}, {1, 1, 0xD7, 0xD7, GPR | REG},
        {1, 0, 0x5B, 0x5B, 0}, {1, 2, 0xE6, 0xE6, 0}, {1, 0, 0x77, 0x77, L0 | REG}, {2, 1, 0x00, 0x0B, VVVV}, {2, 1, 0x1C, 0x1E, 0},
        {2, 1, 0x20, 0x25, 0}, {2, 1, 0x30, 0x35, 0}, {2, 1, 0x28, 0x29, VVVV}, {2, 1, 0x36, 0x36, VVVV | L1}, {2, 1, 0x37, 0x40, VVVV},
        {2, 1, 0x45, 0x47, VVVV}, {2, 1, 0x45, 0x45, VVVV | W1}, {2, 1, 0x58, 0x59, 0}, {2, 1, 0x5A, 0x5A, MEM | L1}, {2, 1, 0x78, 0x79, 0},
        {2, 1, 0x18, 0x18, 0}, {2, 1, 0x96, 0x9F, VVVV | W1}, {2, 1, 0xA6, 0xAF, VVVV}, {2, 1, 0xB6, 0xBF, VVVV | W1},
        {3, 1, 0x00, 0x01, IMM | L1 | W1}, {3, 1, 0x02, 0x02, IMM | VVVV}, {3, 1, 0x06, 0x06, IMM | VVVV | L1}, {3, 1, 0x0C, 0x0F, IMM | VVVV},
        {3, 1, 0x18, 0x18, IMM | VVVV | L1}, {3, 1, 0x19, 0x19, IMM | L1}, {3, 1, 0x38, 0x38, IMM | VVVV | L1}, {3, 1, 0x39, 0x39, IMM | L1},
        {3, 1, 0x21, 0x21, IMM | VVVV | L0}, {3, 1, 0x46, 0x46, IMM | VVVV | L1}, {3, 1, 0x4A, 0x4C, IMM | VVVV},
    };
    static const uint8_t shifts[3][2] = {{2, 6}, {2, 6}, {3, 7}};
    struct rng *r = p->r;
    unsigned n = rng_below(r, sizeof some / sizeof some[0]), how = some[n].how;
    unsigned opcode = some[n].first + rng_below(r, some[n].last - some[n].first + 1u);
    unsigned map = some[n].map, pp = some[n].pp, count = p->mode32 ? 8 : 16;
    bool memory = how & MEM || (!(how & REG) && rng_one_in(r, 3)), l = how & L1 || (!(how & L0) && rng_below(r, 2));
    bool missing = (map == 2 && ((opcode & 0xEF) == 0x2F || opcode == 0x08 || opcode == 0x3F)) || (map == 1 && opcode == 0xF7);
    if (missing && rng_below(r, 8)) /* of those that are there each goes, and rarely one that may not */
        opcode = map == 2 ? 0x00 : 0xEF;
    unsigned reg = rng_below(r, count), vvvv = how & VVVV ? rng_below(r, count) : 0, rm = memory ? (p->mode32 ? 6 : 14) : rng_below(r, count);
    if (how & GPR && !memory) {
        if (opcode == 0xD7)
            reg = any_register(p);
        else
            rm = any_register(p);
    }
    if (how & GROUP)
        reg = shifts[opcode - 0x71][rng_below(r, 2)];
    if (p->mode32 && how & GPR)
        reg &= 7, rm &= 7;
    put(p, 0xC4);
    put(p, (reg < 8) << 7 | 1 << 6 | (rm < 8) << 5 | map);
    put(p, (how & W1 ? 0x80u : 0u) | (~vvvv & 15) << 3 | (unsigned)l << 2 | pp);
    put(p, opcode);
    if (opcode != 0x77 || map != 1)
        put(p, (memory ? 0x40 : 0xC0) | (reg & 7) << 3 | (rm & 7));
    if (memory)
        put(p, rng_below(r, 7) * 16);
    if (how & IMM)
        put(p, (unsigned)rng_next(r) & 0xFF);
}

static void settled_instruction(struct program *p)
{
    unsigned start;
    if (p->vex && !rng_one_in(p->r, p->vex)) {
        avx(p);
        return;
    }
    do {
        start = p->insn->length;
        one_instruction(p);
    } while (!settle(p, start));
}

void generate_program(struct rng *r, bool mode32, bool common, bool vex, struct insn *insn, struct cpu_state *state)
{
    struct program p = {.r = r, .insn = insn, .mode32 = mode32, .x87 = rng_one_in(r, 4), .common = common,
                        .vex = !vex ? 0 : rng_one_in(r, 2) ? 4 : 1000 /* loops that are translated as a whole */};
    memset(insn, 0, sizeof *insn);
    memset(state, 0, sizeof *state);
    insn->mode32 = mode32;
    insn->program = true;
    insn->offset = rng_one_in(r, 4) ? 0x1000 - 1 - rng_below(r, 60) : 0x800 + rng_below(r, 64);
    insn->vex = vex;
    any_registers(r, state, mode32);
    for (unsigned i = 0; i < 16 && vex; i++)
        any_operand(r, state->high[i]);
    state->gpr[4] = STACK_BASE + STACK_SIZE / 2 + 8 * rng_below(r, 32);
    state->gpr[mode32 ? 6 : 14] = DATA_BASE + 0x100 + 16 * rng_below(r, 32);
    state->gpr[mode32 ? 5 : 15] = 1 + rng_below(r, vex ? 8 : 4);
    uint32_t mxcsr = 0x1F80; /* no #XM */
    memcpy(state->fx + 24, &mxcsr, 4);
    while (insn->length < 64) {
        if (rng_one_in(r, 3)) { /* Jcc over the next instruction, mostly behind a comparison */
            unsigned start = insn->length;
            if (rng_below(r, 3))
                encode(&p, (unsigned[]){0x39, 0x38, 0x3B, 0x85, 0x84}[rng_below(r, 5)], -1, NO_MEMORY, 0);
            put(&p, 0x70 + rng_below(r, 16));
            put(&p, 0);
            settle(&p, start);
            unsigned at = insn->length - 1, not_taken = p.undefined;
            settled_instruction(&p);
            p.undefined |= not_taken;
            insn->bytes[at] = (uint8_t)(insn->length - at - 1);
        } else {
            settled_instruction(&p);
        }
    }
    if (p.undefined & F_CF) /* which DEC keeps */
        put(&p, 0x39), put(&p, 0xC0);
    /* DEC of the counter, JNZ to the start; in 64-bit mode with R15 */
    if (!mode32)
        put(&p, 0x49), put(&p, 0xFF), put(&p, 0xCF);
    else
        put(&p, 0x4D);
    unsigned back = insn->length + 2;
    put(&p, 0x75);
    put(&p, (uint8_t)-back);
}
