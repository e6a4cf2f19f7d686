/* Makes instructions: for a slot of the opcode maps a random form (register, memory with every kind of addressing,
 * prefixes, immediates) on registers and memory filled with edge values. */
#include <string.h>

#include "form.h"

enum { PREFIX_NONE, PREFIX_66, PREFIX_F3, PREFIX_F2 };


/* ---- values ---- */
static const uint64_t integers[] = {
    0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000,
    0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x100000000, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000,
    0x8000000000000001, 0xFFFFFFFFFFFFFFFE, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF80000000, 0xFFFFFFFFFFFF8000,
    0xFFFFFFFFFFFFFF80, 0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0x0123456789ABCDEF, 0x09, 0x10, 0x99, 0x9A, 0x1F, 0xF0,
};
static const uint32_t singles[] = {
    0, 0x80000000, 0x3F800000, 0xBF800000, 0x40000000, 0x3F000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF,
    0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001, 0xFFBFFFFF, 0x4F000000, 0x4EFFFFFF, 0xCF000000, 0x3FC00000,
    0x40200000, 0x4B7FFFFF, 0x33800000, 0x5F000000, 0xDF000000, 0x3EAAAAAB, 0x00400000, 0x20000000, 0x1F800000,
};
static const uint64_t doubles[] = {
    0, 0x8000000000000000, 0x3FF0000000000000, 0xBFF0000000000000, 0x4000000000000000, 0x3FE0000000000000, 1, 0x800FFFFFFFFFFFFF,
    0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000,
    0xFFF8000000012345, 0x7FF0000000000001, 0xFFF7FFFFFFFFFFFF, 0x41DFFFFFFFC00000, 0x41E0000000000000, 0xC1E0000000200000,
    0x43E0000000000000, 0xC3E0000000000000, 0x43DFFFFFFFFFFFFF, 0x3FF8000000000000, 0x4004000000000000, 0x47EFFFFFE0000000,
    0x380FFFFFC0000000, 0x36A0000000000000, 0x47F0000000000000, 0x3FD5555555555555, 0x3CA0000000000000, 0x4330000000000001,
};
static const struct { uint64_t mantissa; uint16_t exponent; } extendeds[] = {
    {0, 0}, {0, 0x8000}, {0x8000000000000000, 0x3FFF}, {0x8000000000000000, 0xBFFF}, {0x8000000000000000, 0x4000},
    {0x8000000000000000, 0x3FFE}, {0xC90FDAA22168C235, 0x4000}, {0xB504F333F9DE6484, 0x3FFF}, {1, 0}, {0x7FFFFFFFFFFFFFFF, 0x8000},
    {0x8000000000000000, 0} /* pseudo-denormal */, {0x8000000000000000, 1}, {0xFFFFFFFFFFFFFFFF, 0x7FFE},
    {0x8000000000000000, 0x7FFF}, {0x8000000000000000, 0xFFFF}, {0xC000000000000000, 0x7FFF}, {0xC000000000000000, 0xFFFF},
    {0x8000000000000001, 0x7FFF}, {0xA000000000000000, 0xFFFF}, {0xFFFFFFFFFFFFFFFF, 0x7FFF},
    {0x4000000000000000, 0x3FFF} /* unnormal */, {0, 0x7FFF} /* pseudo-infinity */, {1, 0x7FFF} /* pseudo-NaN */,
    {0xFFFE000000000000, 0x400D}, {0x8000000000000000, 0x400E}, {0xFFFFFFFF00000000, 0x401D}, {0x8000000000000000, 0x401E},
    {0x8000000000000000, 0xC03E}, {0xFFFFFFFFFFFFFFFE, 0x403D}, {0x8000000000000000, 0x403E}, {0xFFFFFF8000000000, 0x407E},
    {0xFFFFFFFFFFFFF800, 0x43FE}, {0x8000000000000000, 0x3C00}, {0x8000000000000000, 0x3F6A}, {0xDE0B6B3A763FFFF0, 0x403A},
    {0xC000000000000000, 0x3FFF}, {0xA000000000000000, 0x4000}, {0xFFFFFFFFFFFFFFFF, 0x3FFE}, {0x8000000000000000, 0x403F},
    {0x9A209A84FBCFF799, 0x3FFE}, {0x8000000000000000, 0x3FBF}, {0xC90FDAA22168C235, 0x3FFE},
};
#define PICK(r, a) ((a)[rng_below(r, sizeof(a) / sizeof((a)[0]))])

static uint64_t any_integer(struct rng *r)
{
    switch (rng_below(r, 4)) {
    case 0: return rng_next(r);
    case 1: return rng_next(r) >> rng_below(r, 64);
    default: return PICK(r, integers);
    }
}

static void any_extended(struct rng *r, uint8_t *to)
{
    uint64_t mantissa;
    uint16_t exponent;
    if (rng_below(r, 3)) {
        unsigned i = rng_below(r, sizeof extendeds / sizeof extendeds[0]);
        mantissa = extendeds[i].mantissa;
        exponent = extendeds[i].exponent;
        if (rng_one_in(r, 8))
            exponent ^= 0x8000;
    } else {
        mantissa = rng_next(r) | 1ull << 63;
        exponent = (uint16_t)((0x3FFF - 40 + rng_below(r, 80)) | (rng_below(r, 2) << 15));
        if (rng_one_in(r, 6))
            exponent = (uint16_t)rng_next(r);
    }
    memcpy(to, &mantissa, 8);
    memcpy(to + 8, &exponent, 2);
}

void any_operand(struct rng *r, uint8_t *to)
{
    uint64_t q;
    uint32_t d;
    switch (rng_below(r, 7)) {
    case 0:
        for (unsigned i = 0; i < 16; i += 4) {
            d = rng_below(r, 3) ? PICK(r, singles) : (uint32_t)rng_next(r);
            memcpy(to + i, &d, 4);
        }
        break;
    case 1:
        for (unsigned i = 0; i < 16; i += 4) { /* moderate: 2^-32 to 2^32 */
            d = (uint32_t)(95 + rng_below(r, 64)) << 23 | (uint32_t)(rng_next(r) & 0x807FFFFF);
            memcpy(to + i, &d, 4);
        }
        break;
    case 2:
        for (unsigned i = 0; i < 16; i += 8) {
            q = rng_below(r, 3) ? PICK(r, doubles) : rng_next(r);
            memcpy(to + i, &q, 8);
        }
        break;
    case 3:
        for (unsigned i = 0; i < 16; i += 8) {
            q = (uint64_t)(990 + rng_below(r, 66)) << 52 | (rng_next(r) & 0x800FFFFFFFFFFFFF);
            memcpy(to + i, &q, 8);
        }
        break;
    case 4:
        any_extended(r, to);
        memset(to + 10, 0, 6);
        if (rng_one_in(r, 3)) /* packed decimal */
            for (unsigned i = 0; i < 10; i++)
                to[i] = (uint8_t)(i == 9 ? rng_below(r, 2) << 7 : rng_below(r, 10) << 4 | rng_below(r, 10));
        break;
    case 5:
        for (unsigned i = 0; i < 16; i++) /* text, for the string comparisons */
            to[i] = rng_one_in(r, 7) ? 0 : (uint8_t)("abcABC09"[rng_below(r, 8)]);
        break;
    default:
        for (unsigned i = 0; i < 16; i += 8) {
            q = any_integer(r);
            memcpy(to + i, &q, 8);
        }
    }
}

void fill_memory(struct rng *r, struct memory *memory)
{
    for (unsigned i = 0; i < DATA_SIZE; i += 16)
        any_operand(r, memory->data + i);
    for (unsigned i = 0; i < STACK_SIZE; i += 8) {
        uint64_t q = any_integer(r) & ~(uint64_t)0x54100; /* a POPF must not set TF, NT, RF, AC */
        memcpy(memory->stack + i, &q, 8);
    }
}

static void fill_fx(struct rng *r, uint8_t *fx)
{
    static const uint16_t controls[] = {0x37F, 0x37F, 0x37F, 0x27F, 0x07F, 0xF7F, 0xB7F, 0x77F, 0xC7F, 0x340, 0x37E, 0x37B, 0x35F, 0x33F};
    memset(fx, 0, 512);
    uint16_t cw = PICK(r, controls), sw = (uint16_t)(rng_next(r) & 0x7F00);
    if (rng_one_in(r, 16))
        cw = (uint16_t)((rng_next(r) & 0x1F3F) | 0x40);
    if (rng_one_in(r, 3))
        sw |= (uint16_t)(rng_next(r) & cw & 0x3F); /* flags of masked exceptions */
    if (rng_one_in(r, 40))
        sw |= (uint16_t)(rng_next(r) & 0x3F);
    if (rng_one_in(r, 6))
        sw |= 0x40;
    if (sw & ~cw & 0x3F)
        sw |= 0x8080;
    memcpy(fx, &cw, 2);
    memcpy(fx + 2, &sw, 2);
    fx[4] = rng_below(r, 3) ? 0xFF : (uint8_t)rng_next(r);
    if (rng_one_in(r, 3))
        fx[4] &= (uint8_t)~(1u << (((sw >> 11) + 7) & 7)); /* room for a push */
    uint32_t mxcsr = 0x1F80;
    switch (rng_below(r, 4)) {
    case 0: mxcsr |= (uint32_t)(rng_next(r) & 0xE07F); break;
    case 1: mxcsr = (uint32_t)(rng_next(r) & 0xFFFF); break;
    default: mxcsr |= (uint32_t)(rng_next(r) & 0x3F); break;
    }
    memcpy(fx + 24, &mxcsr, 4);
    bool mmx = rng_one_in(r, 3);
    for (unsigned i = 0; i < 8; i++) {
        if (mmx) {
            uint64_t q = any_integer(r);
            memcpy(fx + 32 + 16 * i, &q, 8);
            memset(fx + 40 + 16 * i, 0xFF, 2);
        } else {
            any_extended(r, fx + 32 + 16 * i);
        }
    }
    for (unsigned i = 0; i < 16; i++)
        any_operand(r, fx + 160 + 16 * i);
}

/* ---- encoding ---- */
bool insn_has_modrm(unsigned map, unsigned opcode, bool mode32)
{
    if (map == MAP_0F38 || map == MAP_0F3A)
        return true;
    if (map == MAP_0F) {
        unsigned row = opcode >> 4;
        if (row == 8 || (opcode >= 0xC8 && opcode <= 0xCF) || row == 3 || opcode == 0x77)
            return false;
        if (opcode >= 0x04 && opcode <= 0x0C)
            return false;
        if (opcode == 0x0E || opcode == 0xA0 || opcode == 0xA1 || opcode == 0xA2 || opcode == 0xA8 || opcode == 0xA9 || opcode == 0xAA)
            return false;
        return true;
    }
    if (opcode < 0x40)
        return (opcode & 7) < 4;
    if (opcode >= 0x80 && opcode <= 0x8F)
        return true;
    if (opcode >= 0xD0 && opcode <= 0xDF)
        return opcode < 0xD4 || opcode >= 0xD8;
    return opcode == 0x63 || opcode == 0x69 || opcode == 0x6B || opcode == 0xC0 || opcode == 0xC1 || opcode == 0xC6 || opcode == 0xC7 ||
           opcode == 0xF6 || opcode == 0xF7 || opcode == 0xFE || opcode == 0xFF || (mode32 && (opcode == 0x62 || opcode == 0xC4 || opcode == 0xC5));
}

unsigned insn_immediate_bytes(unsigned map, unsigned opcode, unsigned modrm, bool operand16, bool rex_w, bool address32, bool mode32)
{
    unsigned z = operand16 && !rex_w ? 2 : 4;
    if (map == MAP_0F3A)
        return 1;
    if (map == MAP_0F) {
        if (opcode >= 0x80 && opcode <= 0x8F)
            return operand16 ? 2 : 4;
        return (opcode >= 0x70 && opcode <= 0x73) || opcode == 0xA4 || opcode == 0xAC || opcode == 0xBA || opcode == 0xC2 ||
               (opcode >= 0xC4 && opcode <= 0xC6) || opcode == 0x0F;
    }
    if (map != MAP_ONE)
        return 0;
    if (opcode < 0x40)
        return (opcode & 7) == 4 ? 1 : (opcode & 7) == 5 ? z : 0;
    if (opcode == 0x68 || opcode == 0x69 || opcode == 0x81 || opcode == 0xA9 || opcode == 0xC7)
        return z;
    if (opcode == 0xE8 || opcode == 0xE9)
        return operand16 ? 2 : 4;
    if (opcode >= 0xB8 && opcode <= 0xBF)
        return rex_w ? 8 : z;
    if (opcode >= 0xA0 && opcode <= 0xA3)
        return mode32 ? (address32 ? 2 : 4) : address32 ? 4 : 8;
    if (opcode == 0xF6)
        return (modrm >> 3 & 7) < 2;
    if (opcode == 0xF7)
        return (modrm >> 3 & 7) < 2 ? z : 0;
    if (opcode == 0xC8)
        return 3;
    if (opcode == 0xC2)
        return 2;
    return opcode == 0x6A || opcode == 0x6B || (opcode >= 0x70 && opcode <= 0x7F) || opcode == 0x80 || opcode == 0x82 || opcode == 0x83 ||
           opcode == 0xA8 || (opcode >= 0xB0 && opcode <= 0xB7) || opcode == 0xC0 || opcode == 0xC1 || opcode == 0xC6 || opcode == 0xD4 ||
           opcode == 0xD5 || (opcode >= 0xE0 && opcode <= 0xE7) || opcode == 0xEB;
}

static bool excluded(unsigned map, unsigned opcode, unsigned prefix, unsigned modrm, bool mode32)
{
    unsigned reg = modrm >> 3 & 7;
    bool memory = modrm < 0xC0;
    switch (map) {
    case MAP_ONE:
        switch (opcode) {
        case 0x0F: case 0x26: case 0x2E: case 0x36: case 0x3E: case 0x64: case 0x65: case 0x66: case 0x67: case 0xF0: case 0xF2: case 0xF3:
            return true; /* prefixes */
        case 0x62: case 0xC4: case 0xC5:
            return !mode32 || !memory || opcode != 0x62; /* VEX and EVEX; LES and LDS with arbitrary selectors */
        case 0x9A: case 0xEA:
            return mode32; /* far transfers */
        case 0xCA: case 0xCB: case 0xCC: case 0xCD: case 0xCE: case 0xCF: case 0xF1:
            return true; /* far returns and software interrupts */
        case 0x8E: case 0x07: case 0x17: case 0x1F:
            return true; /* segment registers: the host's GDT is not ours */
        case 0xFF:
            return reg == 3 || reg == 5;
        case 0x63:
            return false;
        default:
            return !mode32 && opcode >= 0x40 && opcode <= 0x4F; /* REX */
        }
    case MAP_0F:
        switch (opcode) {
        case 0x00: case 0x01: case 0x02: case 0x03: /* descriptor tables */
        case 0x05: case 0x07: case 0x34: case 0x35: /* system calls */
        case 0x31: case 0x33: case 0xA2: /* time, performance counters, CPUID */
        case 0x38: case 0x3A: /* escapes */
        case 0xA1: case 0xA9: case 0xB2: case 0xB4: case 0xB5: /* segment registers */
            return true;
        case 0xA0: case 0xA8:
            return false;
        case 0x2B:
            return prefix == PREFIX_F3 || prefix == PREFIX_F2; /* SSE4a */
        case 0x78: case 0x79:
            return true; /* SSE4a */
        case 0xAE:
            return !((prefix == PREFIX_NONE && memory && reg < 7) || (prefix == PREFIX_NONE && !memory && reg >= 5));
        case 0xB8:
            return prefix == PREFIX_NONE || prefix == PREFIX_66; /* JMPE: #UD, but with ModRM or not? */
        case 0xBC: case 0xBD:
            return prefix == PREFIX_F3 && !(opcode == 0xBD ? __builtin_cpu_supports("lzcnt") : __builtin_cpu_supports("bmi"));
        case 0xC7:
            return !memory; /* RDRAND, RDPID */
        case 0x1E:
            return prefix == PREFIX_F3; /* shadow stacks */
        default:
            return false;
        }
    case MAP_0F38:
        if (opcode >= 0xCE && opcode <= 0xCF)
            return true; /* GFNI */
        if (opcode >= 0xD8 && opcode <= 0xDA)
            return true;
        return opcode >= 0xF5; /* ADX, MOVDIRI, shadow stacks... */
    default:
        return opcode == 0xCE || opcode == 0xCF || opcode == 0xF0;
    }
}

/* XSAVE, XRSTOR, XSAVEOPT, XSAVEC (the ModRM byte is the last but the address): an area by RSI, for x87, SSE and
 * AVX, which is all that the core has. */
static void xsave_operand(struct rng *r, struct insn *insn, struct cpu_state *s, struct memory *memory)
{
    while (insn->bytes[--insn->length] != insn->modrm || insn->bytes[insn->length - 1] != insn->opcode)
        ;
    insn->modrm = (insn->modrm & 0x38) | 6;
    insn->bytes[insn->length++] = insn->modrm;
    insn->ea = DATA_BASE + 0x400 + 64 * rng_below(r, 32); /* up to 832 bytes */
    uint8_t *area = memory->data + (insn->ea - DATA_BASE);
    fill_fx(r, area);
    memset(area + 512, 0, 64);
    unsigned sets = __builtin_cpu_supports("avx2") ? 8 : 4; /* of components */
    area[512] = (uint8_t)rng_below(r, sets);
    for (unsigned i = 0; sets == 8 && i < 16; i++)
        any_operand(r, area + 576 + 16 * i);
    if (rng_one_in(r, 3)) { /* compacted */
        area[520] = (uint8_t)(rng_below(r, 3) ? sets - 1 : rng_below(r, sets));
        area[527] = 0x80;
    }
    if (rng_one_in(r, 10)) /* not components that a processor may have: bits 24 to 55 */
        area[rng_below(r, 8) ? 528 + rng_below(r, 48) : rng_below(r, 2) ? 523 + rng_below(r, 4) : 515 + rng_below(r, 4)] ^=
            (uint8_t)(1 << rng_below(r, 8));
    if (rng_one_in(r, 16))
        insn->ea += rng_below(r, 64);
    s->gpr[6 | (insn->rex & 1) << 3] = insn->ea;
    s->gpr[0] = rng_below(r, sets);
    s->gpr[2] = 0;
    for (unsigned i = 0; sets == 8 && i < 16 && rng_one_in(r, 2); i++)
        any_operand(r, s->high[i]);
}

static bool is_string(unsigned map, unsigned opcode)
{
    return map == MAP_ONE && ((opcode >= 0xA4 && opcode <= 0xA7) || (opcode >= 0xAA && opcode <= 0xAF) || (opcode >= 0x6C && opcode <= 0x6F));
}

/* A memory operand's address: mostly inside, also unaligned, across pages, read-only and unmapped. */
uint64_t any_address(struct rng *r)
{
    switch (rng_below(r, 24)) {
    case 0: return DATA_BASE + 0x1000 - 1 - rng_below(r, 16);      /* across two writable pages */
    case 1: return DATA_BASE + DATA_WRITABLE - 1 - rng_below(r, 16); /* into the read-only page */
    case 2: return DATA_BASE + DATA_WRITABLE + rng_below(r, 64) * 16;
    case 3: return DATA_BASE + DATA_SIZE - 1 - rng_below(r, 20);   /* into nothing */
    case 4: return DATA_BASE - 1 - rng_below(r, 16);
    case 5: case 6: case 7: return DATA_BASE + 64 + rng_below(r, 0x1E00);
    default: return DATA_BASE + 64 + 16 * rng_below(r, 0x1E0);
    }
}

void insn_put(struct insn *insn, uint64_t value, unsigned size)
{
    memcpy(insn->bytes + insn->length, &value, size);
    insn->length += size;
}

void memory_operand(struct rng *r, struct insn *insn, struct cpu_state *s, unsigned reg, bool address32, unsigned imm_bytes)
{
    unsigned rex_b = (insn->rex & 1u) << 3, rex_x = (insn->rex & 2u) << 2;
    uint64_t ea = insn->ea, mask = insn->mode32 || address32 ? 0xFFFFFFFF : ~0ull;
    unsigned mod = rng_below(r, 3), rm = rng_below(r, 8);
    if (rm == 5 && mod == 0) {
        insn->modrm = (uint8_t)(reg << 3 | 5);
        insn_put(insn, insn->modrm, 1);
        if (insn->mode32)
            insn_put(insn, ea, 4);
        else
            insn_put(insn, ea - (CODE_BASE + insn->offset + insn->length + 4 + imm_bytes), 4);
        return;
    }
    insn->modrm = (uint8_t)(mod << 6 | reg << 3 | rm);
    insn_put(insn, insn->modrm, 1);
    int32_t disp = mod == 1 ? (int8_t)rng_next(r) : mod == 2 ? (int32_t)(rng_next(r) & 0x3FFFFF) - 0x200000 : 0;
    if (rm != 4) {
        s->gpr[rm | rex_b] = (ea - (uint64_t)(int64_t)disp) & mask;
    } else {
        unsigned scale = rng_below(r, 4), index = rng_below(r, 8), base = rng_below(r, 8);
        uint64_t part = 0;
        if (base == 5 && mod == 0) {
            /* disp32 and an index */
            unsigned i = index | rex_x;
            disp = (int32_t)ea;
            if (i != 4) {
                s->gpr[i] &= 0xFF;
                disp = (int32_t)(ea - (s->gpr[i] << scale));
            }
            insn_put(insn, scale << 6 | index << 3 | base, 1);
            insn_put(insn, (uint32_t)disp, 4);
            return;
        }
        unsigned b = base | rex_b;
        if ((index | rex_x) == b)
            index ^= 1;
        if ((index | rex_x) != 4)
            part = s->gpr[index | rex_x] << scale;
        s->gpr[b] = (ea - part - (uint64_t)(int64_t)disp) & mask;
        insn_put(insn, scale << 6 | index << 3 | base, 1);
    }
    if (mod == 1)
        insn_put(insn, (uint8_t)disp, 1);
    else if (mod == 2)
        insn_put(insn, (uint32_t)disp, 4);
}

void any_registers(struct rng *r, struct cpu_state *s, bool mode32)
{
    for (unsigned i = 0; i < 16; i++)
        s->gpr[i] = any_integer(r);
    s->gpr[4] = STACK_BASE + STACK_SIZE / 2 + 8 * rng_below(r, 64);
    if (rng_one_in(r, 16))
        s->gpr[4] += rng_below(r, 8);
    if (rng_one_in(r, 40))
        s->gpr[4] = STACK_BASE + (rng_below(r, 2) ? STACK_SIZE - rng_below(r, 16) : rng_below(r, 16));
    if (rng_one_in(r, 2))
        s->gpr[5] = STACK_BASE + STACK_SIZE / 2 + 512 + 8 * rng_below(r, 32);
    s->gpr[6] = any_address(r);
    s->gpr[7] = any_address(r);
    if (mode32)
        for (unsigned i = 0; i < 16; i++)
            s->gpr[i] = i < 8 ? (uint32_t)s->gpr[i] : 0;
    s->rflags = 0x202 | (rng_next(r) & F_STATUS) | (rng_one_in(r, 6) ? F_DF : 0);
    fill_fx(r, s->fx);
    if (rng_one_in(r, 8))
        s->rflags |= F_AC; /* alignment is checked */
}

void insn_begin(struct rng *r, struct insn *insn, unsigned map, unsigned opcode, unsigned prefix, bool mode32)
{
    memset(insn, 0, sizeof *insn);
    insn->mode32 = mode32;
    insn->map = (uint8_t)map;
    insn->opcode = (uint8_t)opcode;
    insn->prefix = (uint8_t)prefix;
    insn->has_modrm = insn_has_modrm(map, opcode, mode32);
    insn->offset = rng_one_in(r, 8) ? 0x1000 - 1 - rng_below(r, 12) : 0x800 + rng_below(r, 64);
}

bool generate(struct rng *r, unsigned map, unsigned opcode, unsigned prefix, bool rex_w, bool mode32, int modrm,
              struct insn *insn, struct cpu_state *s, struct memory *memory)
{
    static const uint8_t escapes[] = {0x26, 0x2E, 0x36, 0x3E, 0x65};
    memset(s, 0, sizeof *s);
    insn_begin(r, insn, map, opcode, prefix, mode32);
    unsigned form = modrm >= 0 ? (unsigned)modrm : (unsigned)rng_below(r, 256);
    if (modrm < 0 && rng_below(r, 2))
        form |= 0xC0;
    if (excluded(map, opcode, prefix, form, mode32) || (mode32 && rex_w))
        return false;
    any_registers(r, s, mode32);

    bool both = (prefix == PREFIX_F2 || prefix == PREFIX_F3) && rng_one_in(r, 8), address32 = rng_one_in(r, 16);
    if (mode32)
        address32 = false; /* would be 16-bit addressing */
    insn->operand16 = prefix == PREFIX_66 || both;
    if (insn->operand16)
        insn_put(insn, 0x66, 1);
    if (rng_one_in(r, 12))
        insn_put(insn, PICK(r, escapes), 1);
    if (mode32 && insn->length && insn->bytes[insn->length - 1] == 0x65)
        insn->bytes[insn->length - 1] = 0x3E; /* GS is a null selector */
    /* A store to the code segment by x87 with an exception pending: #GP here, #MF in hardware. */
    if (mode32 && map == MAP_ONE && (opcode & 0xF8) == 0xD8 && insn->length && insn->bytes[insn->length - 1] == 0x2E)
        insn->bytes[insn->length - 1] = 0x3E;
    if (address32)
        insn_put(insn, 0x67, 1);
    /* LOCK MOV CR0 is MOV CR8 on AMD processors, which the core does not offer. */
    if (rng_one_in(r, 24) && !(map == MAP_0F && (opcode & 0xFD) == 0x20)) {
        insn_put(insn, 0xF0, 1);
        insn->other_prefixes = true;
    }
    if (prefix == PREFIX_F3)
        insn_put(insn, 0xF3, 1);
    if (prefix == PREFIX_F2)
        insn_put(insn, 0xF2, 1);
    if (!mode32 && (rex_w || rng_one_in(r, 3))) {
        insn->rex = (uint8_t)(0x40 | rex_w << 3 | rng_below(r, 8));
        insn_put(insn, insn->rex, 1);
    }
    if (map != MAP_ONE)
        insn_put(insn, 0x0F, 1);
    if (map == MAP_0F38)
        insn_put(insn, 0x38, 1);
    if (map == MAP_0F3A)
        insn_put(insn, 0x3A, 1);
    insn_put(insn, opcode, 1);
    if (map == MAP_0F && opcode == 0xAE && form < 0xC0 && (form >> 3 & 7) == 1) {
        /* FXRSTOR: mostly an image that it accepts */
        insn->ea = DATA_BASE + 64 + 16 * rng_below(r, 64);
        fill_fx(r, memory->data + (insn->ea - DATA_BASE));
        if (rng_one_in(r, 8))
            memory->data[insn->ea - DATA_BASE + 27] = 1;
    } else {
        insn->ea = any_address(r);
    }
    unsigned imm = insn_immediate_bytes(map, opcode, form, insn->operand16, rex_w, address32, mode32);
    if (insn->has_modrm) {
        if (form >= 0xC0 || (map == MAP_0F && opcode >= 0x20 && opcode <= 0x23)) {
            insn->modrm = (uint8_t)form;
            insn_put(insn, form, 1);
        } else {
            if (insn->ea >= DATA_BASE + 64 && insn->ea < DATA_BASE + DATA_WRITABLE - 64 && !(map == MAP_0F && opcode == 0xAE))
                any_operand(r, memory->data + (insn->ea - DATA_BASE));
            memory_operand(r, insn, s, form >> 3 & 7, address32, imm);
            if (map == MAP_0F && ((opcode == 0xAE && (form >> 3 & 7) >= 4) || (opcode == 0xC7 && (form >> 3 & 7) >= 3)))
                xsave_operand(r, insn, s, memory);
        }
    }
    if (map == MAP_ONE && opcode >= 0xA0 && opcode <= 0xA3) {
        insn_put(insn, insn->ea, imm);
    } else if (imm) {
        uint64_t value = imm == 1 && rng_below(r, 3) ? rng_next(r) : any_integer(r);
        bool branch = map == MAP_ONE && ((opcode >= 0x70 && opcode <= 0x7F) || (opcode >= 0xE0 && opcode <= 0xE3) || opcode == 0xEB);
        if (branch && (uint8_t)value >= 0xE0) /* not into itself */
            value &= 0x7F;
        if ((map == MAP_ONE && (opcode == 0xE8 || opcode == 0xE9)) || (map == MAP_0F && opcode >= 0x80 && opcode <= 0x8F))
            value = rng_one_in(r, 4) ? (uint64_t)(int64_t)(int32_t)(rng_next(r) | 0x100000) : 0x20 + rng_below(r, 0x300);
        insn->imm = (uint8_t)value;
        for (unsigned i = 0; i < imm; i += 8)
            insn_put(insn, value, imm);
    }
    /* Too long is #GP, undefined is #UD; the core need not know how long an undefined instruction is. */
    if (insn->length > 15 && map != MAP_ONE)
        return false;
    /* Counts that end, and mostly before the end of the data. */
    if (is_string(map, opcode)) {
        s->gpr[1] = rng_one_in(r, 12) ? 0x10000 : rng_below(r, 40);
        if (address32 && rng_one_in(r, 2))
            s->gpr[1] |= 0x100000000;
        if (address32 && rng_one_in(r, 3))
            s->gpr[6] |= 0xABC00000000;
        if (rng_one_in(r, 8))
            s->gpr[7] = s->gpr[6] + rng_below(r, 16) - 8; /* overlapping */
        if (mode32)
            s->gpr[1] = (uint32_t)s->gpr[1], s->gpr[6] = (uint32_t)s->gpr[6], s->gpr[7] = (uint32_t)s->gpr[7];
    }
    if (map == MAP_ONE && opcode >= 0xE0 && opcode <= 0xE3 && rng_below(r, 2))
        s->gpr[1] = rng_below(r, 3) | (mode32 ? 0 : (uint64_t)rng_below(r, 2) << 32);
    if (rng_one_in(r, 8))
        s->rflags |= F_TF; /* a single step */
    if (map == MAP_ONE && opcode == 0xD7)
        s->gpr[3] = (any_address(r) - (uint8_t)s->gpr[0]) & (mode32 ? 0xFFFFFFFF : ~0ull);
    return true;
}
