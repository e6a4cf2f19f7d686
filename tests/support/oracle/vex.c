/* Makes instructions with a VEX prefix (Intel SDM 2A 2.3), as generate.c does others. */
#include <string.h>

#include "form.h"

static bool has(unsigned map, unsigned opcode, unsigned low, unsigned high, unsigned of)
{
    return map == of && opcode >= low && opcode <= high;
}

/* FMA4 and, with XOP, VPERMIL2PS and VPERMIL2PD, where the host has them: family 15h, and the first Zen without saying so. */
static bool is_fma4(unsigned map, unsigned opcode)
{
    bool host = __builtin_cpu_supports("fma4") || __builtin_cpu_supports("xop") || __builtin_cpu_is("znver1");
    return host && (has(map, opcode, 0x48, 0x49, MAP_0F3A) || has(map, opcode, 0x5C, 0x5F, MAP_0F3A) ||
                    has(map, opcode, 0x68, 0x6F, MAP_0F3A) || has(map, opcode, 0x78, 0x7F, MAP_0F3A));
}

/* Extensions that a host may have and the core does not offer. */
static bool excluded(unsigned map, unsigned opcode)
{
    return map == MAP_ONE || has(map, opcode, 0x41, 0x4B, MAP_0F) || has(map, opcode, 0x90, 0x99, MAP_0F) /* AVX-512 masks */ ||
           has(map, opcode, 0x48, 0x53, MAP_0F38) || has(map, opcode, 0x5C, 0x5F, MAP_0F38) ||
           has(map, opcode, 0x6C, 0x6C, MAP_0F38) || has(map, opcode, 0x72, 0x72, MAP_0F38) /* AMX, VNNI, AVX-NE-CONVERT */ ||
           has(map, opcode, 0xB0, 0xB1, MAP_0F38) || has(map, opcode, 0xB4, 0xB5, MAP_0F38) /* AVX-IFMA */ ||
           has(map, opcode, 0xC8, 0xD3, MAP_0F38) /* GFNI, SHA512, SM3, SM4, VNNI-INT16 */ ||
           has(map, opcode, 0xDA, 0xDA, MAP_0F38) || has(map, opcode, 0xE0, 0xEF, MAP_0F38) /* CMPccXADD */ ||
           has(map, opcode, 0x30, 0x33, MAP_0F3A) /* masks */ || has(map, opcode, 0xCE, 0xDE, MAP_0F3A) || is_fma4(map, opcode);
}

static bool is_gather(unsigned map, unsigned opcode, unsigned prefix)
{
    return map == MAP_0F38 && opcode >= 0x90 && opcode <= 0x93 && prefix == VEC_66;
}

/* The registers of a gather: indices that lead into the data and, now and then, to a page that is not there. */
static void vsib_operand(struct rng *r, struct insn *insn, struct cpu_state *s, unsigned reg, unsigned opcode)
{
    unsigned index = rng_below(r, 8) | (insn->rex & 2u) << 2, base = rng_below(r, 8), scale = rng_below(r, 4), mod = 1 + rng_below(r, 2);
    unsigned offset = mod == 1 ? 1 : 4, bytes = opcode & 1 ? 8 : 4;
    bool astray = rng_one_in(r, 4);
    for (unsigned half = 0; half < 2; half++)
        for (unsigned at = 0; at < 16; at += bytes) {
            uint64_t value = (rng_below(r, astray && rng_one_in(r, 3) ? 0x5000 : 0x1F00) - 0x400) >> scale;
            memcpy((half ? s->high[index] : s->fx + 160 + 16 * index) + at, &value, bytes);
        }
    insn->modrm = (uint8_t)(mod << 6 | reg << 3 | 4);
    insn_put(insn, insn->modrm, 1);
    insn_put(insn, scale << 6 | (index & 7) << 3 | base, 1);
    int32_t disp = mod == 1 ? (int8_t)rng_next(r) : 0x1234;
    s->gpr[base | (insn->rex & 1u) << 3] = DATA_BASE + 0x400 - (uint64_t)(int64_t)disp;
    if (insn->mode32)
        s->gpr[base] &= UINT32_MAX;
    insn_put(insn, (uint32_t)disp, offset);
}

bool generate_vex(struct rng *r, unsigned map, unsigned opcode, unsigned prefix, bool w, bool l, bool mode32, struct insn *insn,
                  struct cpu_state *s, struct memory *memory)
{
    static const uint8_t pp[4] = {[VEC_NP] = 0, [VEC_66] = 1, [VEC_F3] = 2, [VEC_F2] = 3};
    if (excluded(map, opcode))
        return false;
    memset(s, 0, sizeof *s);
    insn_begin(r, insn, map, opcode, prefix, mode32);
    insn->vex = true;
    unsigned form = rng_below(r, 256) | (rng_below(r, 2) ? 0xC0 : 0);
    bool memory_form = form < 0xC0, gather = is_gather(map, opcode, prefix);
    any_registers(r, s, mode32);
    for (unsigned i = 0; i < 16; i++)
        any_operand(r, s->high[i]);
    if (rng_one_in(r, 2)) /* as they are between functions */
        memset(s->high, 0, sizeof s->high);
    if (map == MAP_0F38 && (opcode == 0xF5 || opcode == 0xF7) && rng_below(r, 2)) /* numbers of bits */
        for (unsigned i = 0; i < 16; i++)
            if (i != 4)
                s->gpr[i] = rng_one_in(r, 3) ? s->gpr[i] : rng_next(r) & (mode32 ? 0x5050 : 0x50505050);

    if (rng_one_in(r, 64))
        insn_put(insn, (uint8_t[]){0x66, 0xF2, 0xF3, 0xF0}[rng_below(r, 4)], 1), insn->other_prefixes = true;
    bool address32 = !mode32 && rng_one_in(r, 16);
    if (address32)
        insn_put(insn, 0x67, 1);
    /* R, X and B, inverted; VEX.vvvv inverted too. Where nothing uses that it is 15 mostly. */
    insn->rex = (uint8_t)(0x40 | w << 3 | (mode32 ? 0 : rng_below(r, 8)));
    unsigned vvvv = rng_below(r, 3) ? (unsigned)rng_below(r, mode32 ? 8 : 16) : 0;
    uint8_t last = (uint8_t)((~vvvv & 15) << 3 | l << 2 | pp[prefix]);
    if (map == MAP_0F && !w && !(insn->rex & 3) && rng_below(r, 2)) {
        insn_put(insn, 0xC5, 1);
        insn_put(insn, (insn->rex & 4 ? 0u : 0x80u) | last, 1);
    } else {
        insn_put(insn, 0xC4, 1);
        insn_put(insn, (~insn->rex & 7u) << 5 | map, 1);
        insn_put(insn, (w ? 0x80u : 0u) | last, 1);
    }
    insn_put(insn, opcode, 1);
    insn->ea = any_address(r);
    if (rng_one_in(r, 2))
        insn->ea &= ~31ull;
    unsigned imm = insn_immediate_bytes(map, opcode, form, false, w, address32, mode32);
    if (insn->has_modrm && gather && memory_form) {
        vsib_operand(r, insn, s, form >> 3 & 7, opcode);
    } else if (insn->has_modrm && !memory_form) {
        insn->modrm = (uint8_t)form;
        insn_put(insn, form, 1);
    } else if (insn->has_modrm) {
        if (insn->ea >= DATA_BASE + 64 && insn->ea < DATA_BASE + DATA_WRITABLE - 64)
            for (unsigned at = 0; at < 32; at += 16)
                any_operand(r, memory->data + (insn->ea - DATA_BASE) + at);
        memory_operand(r, insn, s, form >> 3 & 7, address32, imm);
    }
    if (imm) {
        insn->imm = (uint8_t)rng_next(r);
        insn_put(insn, insn->imm, 1);
    }
    /* Not a gather: it is stepped through by elements where one faults (SDM 2C VGATHERDPS). */
    if (rng_one_in(r, 8) && !gather)
        s->rflags |= F_TF;
    return insn->length <= 15;
}
