/* See form.h. Intel SDM 2A 2.1 and 2.2 (prefixes, ModRM, SIB), appendix A (opcode maps). */
#include <string.h>

#include "form.h"

struct form form_of(const uint8_t *bytes, bool mode32)
{
    struct form x = {.mode32 = mode32};
    unsigned n = 0;
    for (bool more = true; more;) {
        switch (bytes[n]) {
        case 0x66: x.p66 = true; break;
        case 0x67: x.p67 = true; break;
        case 0xF0: x.lock = true; break;
        case 0xF2: x.f2 = true, x.f3 = false; break;
        case 0xF3: x.f3 = true, x.f2 = false; break;
        case 0x26: case 0x2E: case 0x36: case 0x3E: case 0x64: case 0x65: break;
        default: more = false;
        }
        n += more;
    }
    x.prefixes = n;
    if (!mode32 && (bytes[n] & 0xF0) == 0x40)
        x.rex = bytes[n++];
    x.map = MAP_ONE;
    if ((bytes[n] == 0xC4 || bytes[n] == 0xC5) && (!mode32 || bytes[n + 1] >= 0xC0)) {
        bool three = bytes[n] == 0xC4;
        uint8_t first = bytes[n + 1], last = bytes[n + 1 + three];
        x.vex = true;
        x.map = three ? first & 3 : MAP_0F;
        x.rex = (uint8_t)(0x40 | (three && last & 0x80 ? 8 : 0) | (~first >> 5 & 4) | (three ? ~first >> 5 & 3 : 0));
        if (mode32)
            x.rex &= 0x48;
        x.l = last & 4;
        x.vvvv = ~(last >> 3) & (mode32 ? 7 : 15);
        x.p66 = (last & 3) == 1;
        x.f3 = (last & 3) == 2;
        x.f2 = (last & 3) == 3;
        n += 2 + three;
    } else if (bytes[n] == 0x0F) {
        x.map = bytes[n + 1] == 0x38 ? MAP_0F38 : bytes[n + 1] == 0x3A ? MAP_0F3A : MAP_0F;
        n += x.map == MAP_0F ? 1 : 2;
    }
    x.opcode = bytes[n++];
    x.has_modrm = insn_has_modrm(x.map, x.opcode, mode32);
    x.rm = (x.opcode & 7) | (x.rex & 1u) << 3;
    if (x.has_modrm) {
        x.modrm = bytes[n++];
        x.reg = (x.modrm >> 3 & 7) | (x.rex & 4u) << 1;
        x.rm = (x.modrm & 7) | (x.rex & 1u) << 3;
        unsigned mod = x.modrm >> 6;
        bool control = x.map == MAP_0F && x.opcode >= 0x20 && x.opcode <= 0x23; /* MOV CR and DR have no memory form */
        if (mod != 3 && !control) {
            bool sib = (x.modrm & 7) == 4;
            unsigned base = sib ? bytes[n] & 7 : x.modrm & 7;
            n += sib + (mod == 1 ? 1 : mod == 2 || base == 5 ? 4 : 0);
        }
    }
    x.imm8 = bytes[n];
    x.length = n + insn_immediate_bytes(x.map, x.opcode, x.modrm, x.p66, x.rex >> 3 & 1, x.p67, mode32);
    bool byte = x.map == MAP_ONE ? !(x.opcode & 1) && (x.opcode < 0x40 || x.opcode >= 0x80) && (x.opcode & 0xF0) != 0x90
                                 : x.map == MAP_0F && (x.opcode == 0xB0 || x.opcode == 0xC0);
    if (x.map == MAP_ONE && (x.opcode == 0xC8 || (x.opcode >= 0xB8 && x.opcode <= 0xBF) || x.opcode == 0x8E || x.opcode == 0x8C))
        byte = false;
    if (x.vex)
        byte = false;
    x.size = byte ? 1 : x.rex & 8 && !(x.vex && mode32) ? 8 : x.p66 && !x.vex ? 2 : 4;
    return x;
}

uint64_t form_address(const struct form *x, const uint8_t *bytes, const struct cpu_state *s, uint64_t rip)
{
    const uint8_t *p = bytes + x->prefixes + 1;
    if (x->vex)
        p += bytes[x->prefixes] == 0xC4 ? 4 : 3;
    else
        p += (x->rex != 0) + (x->map == MAP_ONE ? 1 : x->map == MAP_0F ? 2 : 3);
    unsigned mod = x->modrm >> 6, base = x->modrm & 7;
    uint64_t at = 0;
    bool no_base = mod == 0 && base == 5;
    if (base == 4) {
        uint8_t sib = *p++;
        unsigned index = (sib >> 3 & 7) | (x->rex & 2u) << 2;
        base = sib & 7;
        no_base = mod == 0 && base == 5;
        if (index != 4)
            at += s->gpr[index] << (sib >> 6);
        if (!no_base)
            at += s->gpr[base | (x->rex & 1u) << 3];
    } else if (no_base && !x->mode32) {
        at = rip + x->length;
    } else if (!no_base) {
        at = s->gpr[base | (x->rex & 1u) << 3];
    }
    int32_t disp = 0;
    if (mod == 1)
        disp = (int8_t)*p;
    else if (mod == 2 || no_base)
        memcpy(&disp, p, 4);
    at += (uint64_t)(int64_t)disp;
    return x->mode32 || x->p67 ? (uint32_t)at : at;
}

enum vec_prefix form_prefix(const struct form *x) { return x->f2 ? VEC_F2 : x->f3 ? VEC_F3 : x->p66 ? VEC_66 : VEC_NP; }

const struct vec_op *form_vector(const struct form *x)
{
    return x->map == MAP_ONE || x->vex ? NULL : fpu_lookup_vector((enum vec_map)(x->map - MAP_0F), x->opcode, form_prefix(x), x->modrm);
}

bool form_mmx(const struct form *x)
{
    const struct vec_op *op = form_vector(x);
    return op && (op->form == VEC_MM_MMM || op->form == VEC_MM_STORE || op->form == VEC_MM_GPR || op->form == VEC_GPR_STORE_MM ||
                  op->form == VEC_GPR_MM || op->form == VEC_MM_XMMM || op->form == VEC_MM_IMM || op->form == VEC_XMM_MMM ||
                  op->form == VEC_MM_MASKMOV || op->form == VEC_EMMS);
}

bool form_x87_alias(const struct form *x)
{
    unsigned g = form_group(x);
    if (!form_x87(x) || form_memory(x))
        return false;
    return (x->opcode == 0xD9 && g == 3) || (x->opcode == 0xDC && (g == 2 || g == 3)) || (x->opcode == 0xDD && g == 1) ||
           (x->opcode == 0xDE && g == 2) || (x->opcode == 0xDF && g < 4) ||
           (x->opcode == 0xDB && g == 4 && x->modrm != 0xE2 && x->modrm != 0xE3);
}

static unsigned condition_reads(unsigned cc)
{
    static const unsigned flags[8] = {F_OF, F_CF, F_ZF, F_CF | F_ZF, F_SF, F_PF, F_SF | F_OF, F_ZF | F_SF | F_OF};
    return flags[cc >> 1 & 7];
}

/* ADD OR ADC SBB AND SUB XOR CMP: ADC and SBB read CF. */
static unsigned arithmetic_reads(unsigned op) { return op == 2 || op == 3 ? F_CF : 0; }

unsigned form_reads(const struct form *x)
{
    unsigned op = x->opcode, g = form_group(x);
    if (x->vex)
        return 0;
    if (x->map == MAP_0F)
        return (op & 0xF0) == 0x40 || (op & 0xF0) == 0x80 || (op & 0xF0) == 0x90 ? condition_reads(op & 15) : 0;
    if (x->map != MAP_ONE)
        return 0;
    if (op < 0x40 && (op & 7) < 6)
        return arithmetic_reads(op >> 3);
    if (op >= 0x80 && op <= 0x83)
        return arithmetic_reads(g);
    if ((op & 0xF0) == 0x70)
        return condition_reads(op & 15);
    if ((op == 0xC0 || op == 0xC1 || (op >= 0xD0 && op <= 0xD3)) && (g == 2 || g == 3))
        return F_CF;
    switch (op) {
    case 0x9C: return F_STATUS;
    case 0x9F: return F_STATUS & ~F_OF;
    case 0xF5: case 0xD6: return F_CF;
    case 0xE0: case 0xE1: return F_ZF;
    case 0xDA: case 0xDB: return !form_memory(x) && g < 4 ? F_CF | F_ZF | F_PF : 0; /* FCMOVcc */
    default: return 0;
    }
}

unsigned form_writes(const struct form *x)
{
    unsigned op = x->opcode, g = form_group(x);
    if (x->vex)
        return x->map == MAP_0F38 && (op == 0xF2 || op == 0xF3 || (op == 0xF5 && !x->f2 && !x->f3) || (op == 0xF7 && !x->p66 && !x->f2 && !x->f3)) ? F_STATUS : 0;
    if (x->map == MAP_0F) {
        switch (op) {
        case 0x2E: case 0x2F: case 0xAF: case 0xB0: case 0xB1: case 0xB8: case 0xBC: case 0xBD: case 0xC0: case 0xC1:
        case 0xA3: case 0xAB: case 0xB3: case 0xBB: case 0xBA: return F_STATUS;
        default: return 0; /* SHLD and SHRD by 0 keep them */
        }
    }
    if (x->map != MAP_ONE)
        return 0;
    if ((op < 0x40 && (op & 7) < 6) || (op >= 0x80 && op <= 0x85) || op == 0xA8 || op == 0xA9 || op == 0x69 || op == 0x6B)
        return F_STATUS;
    switch (op) {
    case 0x9D: return F_STATUS;
    case 0x9E: return F_STATUS & ~F_OF;
    case 0xF5: case 0xF8: case 0xF9: return F_CF;
    case 0xF6: case 0xF7: return g == 2 ? 0 : F_STATUS;
    case 0xFE: case 0xFF: return g < 2 ? F_STATUS & ~F_CF : 0;
    case 0xDB: case 0xDF: return !form_memory(x) && (g == 5 || g == 6) ? F_STATUS : 0; /* FCOMI... */
    default: return !x->mode32 || op < 0x40 || op > 0x4F ? 0 : F_STATUS & ~F_CF;
    }
}
