/* The table's rows of x87, MMX, SSE and their state images. See vendors.h, vendors.c. */
#include <string.h>

#include "vendors.h"

enum {
    FX_SW = 2, FX_TAG = 4, FX_RESERVED = 5, FX_POINTERS = 6, FX_ST = 32, FX_MXCSR = 24, FX_MXCSR_MASK = 28, FX_XMM8 = 288, FX_END = 416,
    FX_FOP = 6, FX_FIP = 8, FX_FDP = 16, FX_AVAILABLE = 464, XSAVE_BV = 512, XSAVE_YMM_HIGH = 576,
    C0 = 0x100, C1 = 0x200, C2 = 0x400, C3 = 0x4000, CC = C0 | C1 | C2 | C3, ES_AND_B = 0x8080, PE = 0x20,
};

static uint16_t sw_of(const struct cpu_state *s) { return (uint16_t)(s->fx[FX_SW] | s->fx[FX_SW + 1] << 8); }
static void free_sw(struct freedom *f, unsigned mask)
{
    f->fx[FX_SW] |= (uint8_t)mask;
    f->fx[FX_SW + 1] |= (uint8_t)(mask >> 8);
}

/* ---- which instruction it is ---- */

static bool is_control(const struct form *x)
{
    const struct x87_op *op = form_x87(x) ? fpu_lookup_x87(x->opcode, x->modrm) : NULL;
    return op && !op->pointers;
}
/* FXSAVE, FXRSTOR, XSAVE, XRSTOR, XSAVEOPT, XSAVEC... with a 512-byte legacy region at the operand. */
static bool is_state_image(const struct form *x)
{
    unsigned g = form_group(x);
    return x->map == MAP_0F && form_memory(x) && ((x->opcode == 0xAE && (g < 2 || g > 3) && g != 7) || (x->opcode == 0xC7 && g >= 3 && g <= 5));
}
static bool is_xsave(const struct form *x) { return is_state_image(x) && (x->opcode == 0xC7 || form_group(x) >= 4); }
static bool is_environment_store(const struct form *x)
{
    return form_x87(x) && form_memory(x) && ((x->opcode == 0xD9 && form_group(x) == 6) || (x->opcode == 0xDD && form_group(x) == 6));
}
static bool loads_status(const struct form *x)
{
    unsigned g = form_group(x);
    return (form_x87(x) && form_memory(x) && (x->opcode == 0xD9 || x->opcode == 0xDD) && g == 4) ||
           (is_state_image(x) && ((x->opcode == 0xAE && (g == 1 || g == 5)) || (x->opcode == 0xC7 && g == 3)));
}
/* FSIN, FCOS, FSINCOS, FPTAN, FPATAN, F2XM1, FYL2X, FYL2XP1. */
static bool is_transcendental(const struct form *x)
{
    return x->opcode == 0xD9 && x->map == MAP_ONE &&
           ((x->modrm >= 0xF0 && x->modrm <= 0xF3) || x->modrm == 0xF9 || x->modrm == 0xFB || x->modrm >= 0xFE);
}

/* The condition codes that both manuals define after an x87 instruction. */
static unsigned defined_codes(const struct form *x)
{
    unsigned g = form_group(x), n = x->opcode & 7;
    if (form_memory(x)) {
        if (n == 1 || n == 5) {
            if (g == 4)
                return CC;
            if (n == 1 && g > 4) /* FLDCW, FNSTENV, FNSTCW */
                return 0;
            return n == 5 && g == 6 ? CC : n == 5 && g == 7 ? 0 : C1;
        }
        return !(n & 1) && (g == 2 || g == 3) ? C0 | C2 | C3 : C1;
    }
    switch (x->opcode) {
    case 0xD8: return g == 2 || g == 3 ? C0 | C2 | C3 : C1;
    case 0xD9:
        if (x->modrm == 0xD0 || g == 3)
            return 0; /* FNOP, an alias */
        if (x->modrm == 0xE4)
            return C0 | C2 | C3;
        if (x->modrm == 0xE5)
            return CC;
        if (x->modrm == 0xF5 || x->modrm == 0xF8) /* FPREM1, FPREM */
            return CC;
        if (x->modrm == 0xF2 || x->modrm == 0xFB || x->modrm >= 0xFE)
            return C2;
        return is_transcendental(x) ? 0 : C1;
    case 0xDA: case 0xDD: return x->modrm == 0xE9 || (x->opcode == 0xDD && (g == 4 || g == 5)) ? C0 | C2 | C3 : x->opcode == 0xDD && g == 2 ? C1 : x->opcode == 0xDD && g == 3 ? C1 : 0;
    case 0xDB: return x->modrm == 0xE3 ? CC : 0;
    case 0xDC: return g == 2 || g == 3 ? 0 : C1;
    case 0xDE: return x->modrm == 0xD9 ? C0 | C2 | C3 : g == 2 || g == 3 ? 0 : C1;
    default: return 0;
    }
}

/* ---- rows ---- */

static void mxcsr_mask_free(const struct event *e, struct freedom *f)
{
    memset(f->fx + FX_MXCSR_MASK, 0xFF, 4);
    if (is_state_image(&e->form))
        free_memory(f, e->insn->ea, FX_MXCSR_MASK, 4);
    if (e->host->fx[FX_MXCSR + 2] & 2) /* the host runs in that mode */
        f->everything = true;
}
static void underflow_free(const struct event *e, struct freedom *f)
{
    if (!e->insn->program && e->host->vector == 19 && (e->in->fx[FX_MXCSR + 1] & 12) != 12)
        f->fx[FX_MXCSR] |= 0x30;
}
static void dot_product_free(const struct event *e, struct freedom *f)
{
    if (e->host->vector == 19 && e->form.map == MAP_0F3A && (e->form.opcode & 0xFE) == 0x40)
        f->fx[FX_MXCSR] = 0xFF;
}
static void simd_flags_free(const struct event *e, struct freedom *f)
{
    if (either(e, 19)) {
        f->fx[FX_MXCSR] |= 0x3F;
        if (form_mmx(&e->form)) {
            free_sw(f, 0x3800);
            f->fx[FX_TAG] = 0xFF;
            memset(f->fx + FX_ST, 0xFF, 128); /* by TOP */
        }
        if (e->form.map == MAP_0F3A && (e->form.opcode & 0xFE) == 0x40)
            f->everything = true;
    }
}

static void pointers_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    bool raised = form_x87(x) && !is_control(x) && (sw_of(e->host) & ES_AND_B) && !(sw_of(e->in) & ES_AND_B) && !e->insn->program;
    memset(f->fx + FX_POINTERS, 0xFF, 18);
    if (raised && !is_fault(e->host)) {
        memset(f->fx + FX_FOP, 0, 2);
        memset(f->fx + FX_FIP, 0, 8);
        if (form_memory(x))
            memset(f->fx + FX_FDP, 0, 8);
    }
    if (is_state_image(x))
        free_memory(f, e->insn->ea, FX_POINTERS, 18);
    if (is_environment_store(x)) {
        if (x->p66 && !(x->rex & 8))
            free_memory(f, e->insn->ea, 6, 8);
        else
            free_memory(f, e->insn->ea, 12, 16);
    }
}
static void intel_pointers(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)memory;
    if (!form_x87(&e->form) || is_control(&e->form) || is_fault(out))
        return;
    uint64_t ip = CODE_BASE + e->insn->offset;
    memcpy(out->fx + FX_FIP, &ip, 8);
    if (!(sw_of(out) & ES_AND_B)) { /* FOP and FDP only of exceptions */
        memset(out->fx + FX_FOP, 0, 2);
        memset(out->fx + FX_FDP, 0, 8);
    } else if (!form_memory(&e->form)) {
        uint64_t any = rng_next(r);
        memcpy(out->fx + FX_FDP, &any, 8);
    }
}

static void reserved_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    f->fx[FX_RESERVED] = 0xFF;
    for (unsigned i = 0; i < 8; i++)
        memset(f->fx + FX_ST + 16 * i + 10, 0xFF, 6);
    f->fx[0] |= 0xC0; /* the control word's bits 6, 7, 13 to 15 */
    f->fx[1] |= 0xE0;
    if (is_state_image(x)) {
        free_memory(f, e->insn->ea, FX_RESERVED, 1);
        for (unsigned i = 0; i < 8; i++)
            free_memory(f, e->insn->ea, FX_ST + 16 * i + 10, 6);
        free_memory(f, e->insn->ea, FX_END, FX_AVAILABLE - FX_END);
        if (x->mode32)
            free_memory(f, e->insn->ea, FX_XMM8, FX_END - FX_XMM8);
    }
    if (is_environment_store(x) && !(x->p66 && !(x->rex & 8)))
        for (unsigned i = 2; i < 12; i += 4)
            free_memory(f, e->insn->ea, i, 2);
}

static void conditions_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    if (e->insn->program)
        free_sw(f, CC);
    else if (form_x87(x) && !is_fault(e->host)) {
        unsigned defined = defined_codes(x);
        if (x->opcode == 0xD9 && (x->modrm == 0xF5 || x->modrm == 0xF8) && (sw_of(e->host) & C2))
            defined = C2;
        free_sw(f, CC & ~defined);
    } else if (x->map == MAP_ONE && x->opcode == 0x9B) {
        free_sw(f, CC);
    }
}

static void status_load_free(const struct event *e, struct freedom *f)
{
    if (loads_status(&e->form))
        free_sw(f, ES_AND_B);
}

static void initial_free(const struct event *e, struct freedom *f)
{
    static const uint8_t zeros[256];
    const struct form *x = &e->form;
    const uint8_t *fx = e->in->fx;
    if (!is_xsave(x) || form_group(x) == 5)
        return;
    bool optimised = x->opcode == 0xC7 || form_group(x) == 6;
    bool x87 = fx[0] == 0x7F && fx[1] == 3 && !memcmp(fx + FX_SW, zeros, 3) && !memcmp(fx + FX_ST, zeros, 128);
    bool sse = !memcmp(fx + 160, zeros, x->mode32 ? 128 : 256), avx = !memcmp(e->in->high, zeros, x->mode32 ? 128 : 256);
    if (x87 || sse || avx)
        free_memory(f, e->insn->ea, XSAVE_BV, 1);
    if (x87 && optimised) {
        free_memory(f, e->insn->ea, 0, 24);
        free_memory(f, e->insn->ea, FX_ST, 128);
    }
    if (sse && optimised)
        free_memory(f, e->insn->ea, 160, 256);
    if (avx && optimised)
        free_memory(f, e->insn->ea, XSAVE_YMM_HIGH, 256);
    if (sse && x->opcode == 0xC7)
        free_memory(f, e->insn->ea, FX_MXCSR, 4);
}

static void mask_move_free(const struct event *e, struct freedom *f)
{
    if (e->form.map == MAP_0F && e->form.opcode == 0xF7 && any_fault(e) && !either(e, 6))
        f->everything = true;
}
static bool converts_memory(const struct form *x)
{
    return x->map == MAP_0F && x->opcode == 0x2A && !x->f2 && !x->f3 && form_memory(x);
}
static void conversion_free(const struct event *e, struct freedom *f)
{
    if (!converts_memory(&e->form))
        return;
    free_sw(f, 0x3800);
    f->fx[FX_TAG] = 0xFF;
    memset(f->fx + FX_ST, 0xFF, 128); /* by TOP */
    if (either(e, 16))
        f->everything = true;
}
static void intel_conversion(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)memory, (void)r;
    if (!converts_memory(&e->form) || is_fault(out))
        return;
    if (sw_of(out) & ES_AND_B) {
        out->vector = 16;
        out->rip = CODE_BASE + e->insn->offset;
    } else {
        out->fx[FX_SW + 1] &= 0xC7;
        out->fx[FX_TAG] = 0xFF;
    }
}
static void alias_free(const struct event *e, struct freedom *f)
{
    f->everything |= form_x87_alias(&e->form);
}

/* D9 D8 moves whatever the processor still holds in an empty register; the core moves what FXSAVE shows of it. */
static void fstp1_free(const struct event *e, struct freedom *f)
{
    unsigned top = sw_of(e->in) >> 11 & 7, i = e->form.modrm & 7;
    if (!form_x87(&e->form) || form_memory(&e->form) || e->form.opcode != 0xD9 || form_group(&e->form) != 3 || (e->in->fx[FX_TAG] >> top & 1))
        return;
    unsigned to = (i - 1) & 7; /* behind the pop */
    for (unsigned n = 0; n < 10; n++)
        f->fx[32 + 16 * to + n] = 0xFF;
}

/* ---- results that are the core's own ---- */

static void register_of(const struct cpu_state *s, unsigned i, uint64_t *mantissa, unsigned *exponent)
{
    uint16_t e;
    memcpy(mantissa, s->fx + FX_ST + 16 * i, 8);
    memcpy(&e, s->fx + FX_ST + 16 * i + 8, 2);
    *exponent = e & 0x7FFF ? e : e + 1u; /* denormals have the least exponent */
}
/* Within two units in the last place, also across a power of two. */
static bool is_near(const struct event *e, unsigned i)
{
    uint64_t a, b;
    unsigned ae, be;
    register_of(e->host, i, &a, &ae);
    register_of(e->core, i, &b, &be);
    if (ae == be)
        return (a > b ? a - b : b - a) <= 2;
    uint64_t low = ae < be ? a : b, high = ae < be ? b : a;
    return (ae < be ? be - ae : ae - be) == 1 && low >= UINT64_MAX - 1 && high <= (1ull << 63) + 1;
}
static void transcendental_free(const struct event *e, struct freedom *f)
{
    if (!is_transcendental(&e->form) || is_fault(e->host) || e->insn->program)
        return;
    free_sw(f, C1);
    for (unsigned i = 0; i < 2; i++)
        if (is_near(e, i))
            memset(f->fx + FX_ST + 16 * i, 0xFF, 10);
}
static bool is_partial(const struct event *e)
{
    return e->form.opcode == 0xD9 && e->form.map == MAP_ONE && (e->form.modrm == 0xF5 || e->form.modrm == 0xF8) && (sw_of(e->host) & C2);
}
static bool has_wrong_digits(const struct event *e)
{
    uint64_t at = e->insn->ea - DATA_BASE;
    if (!form_x87(&e->form) || e->form.opcode != 0xDF || !form_memory(&e->form) || form_group(&e->form) != 4 || at > DATA_SIZE - 10)
        return false;
    for (unsigned i = 0; i < 9; i++)
        if ((e->before->data[at + i] & 15) > 9 || e->before->data[at + i] >> 4 > 9)
            return true;
    return false;
}
static void undefined_result_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    if (e->insn->program || is_fault(e->core))
        return;
    if (is_transcendental(x)) {
        free_sw(f, PE);
        if (!(e->in->fx[0] & PE)) /* an exception that one of them may raise */
            f->everything = true;
        uint64_t mantissa;
        unsigned exponent;
        register_of(e->in, 0, &mantissa, &exponent);
        exponent &= 0x7FFF;
        if ((x->modrm == 0xF0 && exponent >= 0x3FFF) || (x->modrm == 0xF9 && exponent >= 0x3FFD))
            f->everything = true;
        if ((x->modrm == 0xF2 || x->modrm == 0xFB || x->modrm >= 0xFE) && exponent >= 0x3FFF) /* angles that are reduced */
            memset(f->fx + FX_ST, 0xFF, 10), memset(f->fx + FX_ST + 16, 0xFF, 10);
    }
    if (is_partial(e) || has_wrong_digits(e))
        memset(f->fx + FX_ST, 0xFF, 10);
    if (is_partial(e))
        free_sw(f, CC & ~C2);
}
/* RCPPS, RSQRTPS and their scalars: both sides within 1.5 * 2^-12 of the exact value, or equal. */
static void approximation_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    if (x->map != MAP_0F || (x->opcode != 0x52 && x->opcode != 0x53) || is_fault(e->host))
        return;
    for (unsigned i = 0; i < (x->f3 ? 1u : x->vex && x->l ? 8u : 4u); i++) {
        unsigned at = 160 + 16 * x->reg + 4 * i, high = 16 * x->reg + 4 * (i - 4);
        const uint8_t *host = i < 4 ? e->host->fx + at : (const uint8_t *)e->host->high + high;
        const uint8_t *core = i < 4 ? e->core->fx + at : (const uint8_t *)e->core->high + high;
        uint8_t *mask = i < 4 ? f->fx + at : f->high + high;
        uint32_t a, b;
        memcpy(&a, host, 4);
        memcpy(&b, core, 4);
        bool number = (a & 0x7F800000) != 0x7F800000 && (b & 0x7F800000) != 0x7F800000 && (a & 0x7FFFFFFF) && (b & 0x7FFFFFFF);
        if (number && (a > b ? a - b : b - a) <= 3 * (1 << 12))
            memset(mask, 0xFF, 4);
        if (((a | b) & 0x7FFFFFFF) <= 0x00801000) /* next to the denormals, which are 0 */
            memset(mask, 0xFF, 4);
    }
}

/* AMD's take VPERMQ and VPERMPD with W clear, which Intel's do not have. Outside 64-bit mode AMD's do not have VPEXTRQ and VPINSRQ,
 * where Intel's ignore W. AMD's do not check the alignment of SHA's operands. What gathers and masked moves have done before
 * a fault is not the same. */
static void vex_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    bool gather = x->vex && x->map == MAP_0F38 && x->opcode >= 0x90 && x->opcode <= 0x93;
    bool masked = x->vex && x->map == MAP_0F38 && ((x->opcode >= 0x2C && x->opcode <= 0x2F) || x->opcode == 0x8C || x->opcode == 0x8E);
    bool sha = !x->vex && ((x->map == MAP_0F38 && x->opcode >= 0xC8 && x->opcode <= 0xCD) || (x->map == MAP_0F3A && x->opcode == 0xCC));
    if (x->vex && x->map == MAP_0F3A && x->opcode <= 1 && x->l && !(x->rex & 8))
        f->everything = true;
    if (x->vex && x->map == MAP_0F3A && (x->opcode == 0x16 || x->opcode == 0x22) && x->mode32 && (x->rex & 8))
        f->everything = true;
    if (sha && form_memory(x) && either(e, 13))
        f->everything = true;
    if ((gather || masked) && any_fault(e))
        f->detail = true;
}

const struct difference fpu_differences[] = {
    {.name = "undefined results of x87", .what = "F2XM1 beyond 1, FYL2XP1 beyond 1 - sqrt(1/2), FBLD of digits that are none, how far an incomplete FPREM comes; the error of angles above 1; PE of a transcendental instruction with an exact result",
     .intel_source = "SDM 2A F2XM1, FBLD, FPREM, FYL2XP1; SDM 1, 8.3.8 and 8.3.10", .amd_source = "APM 5 F2XM1, FBLD, FPREM, FYL2XP1", .free = undefined_result_free},
    {.name = "x87 pointers", .what = "FIP, FDP, FOP, FCS, FDS unless an exception has just become pending: AMD's save and restore them only with one pending; Intel's always keep FIP, and have FDP and FOP of exceptions alone, FCS and FDS as 0 (CPUID.7.0:EBX[6], [13])",
     .intel_source = "SDM 1, 8.1.8 and 8.1.9; SDM 2A CPUID, FXSAVE", .amd_source = "APM 5 FXRSTOR: \"does not restore the x87 error pointers ... except in the relatively rare cases in which the exception-summary (ES) bit in the x87 status word is set\"", .free = pointers_free, .intel = intel_pointers},
    {.name = "x87 condition codes", .what = "C0 to C3 where a manual says undefined; C1 of comparisons and FCMOV: AMD's keep it after FCOMI, Intel's clear it",
     .intel_source = "SDM 2A F2XM1 to FYL2XP1: FPU Flags Affected; SDM 1 table 8-1", .amd_source = "APM 5: x87 Condition Code", .free = conditions_free},
    {.name = "reserved fields", .what = "of state images and the control word: AMD's clear, Intel's may keep what is in memory", .intel_source = "SDM 2A FXSAVE table 3-43, FSTENV; SDM 1, 8.1.5",
     .amd_source = "APM 2, 11.4.4; APM 1, 6.2.2", .free = reserved_free},
    {.name = "ES and B of a loaded status word", .what = "taken as loaded, or computed from flags and masks", .intel_source = "SDM 2A FLDENV, FRSTOR, FXRSTOR", .amd_source = "APM 5 FLDENV, FRSTOR", .free = status_load_free},
    {.name = "initial state in XSAVE", .what = "whether a component that has its initial value counts as in use", .intel_source = "SDM 1, 13.6", .amd_source = "APM 2, 11.5.2", .free = initial_free},
    {.name = "flags of an unmasked SIMD exception", .what = "the other flags in MXCSR, and whether an MMX conversion has entered MMX mode; the stages of DPPS and DPPD",
     .intel_source = "SDM 1, 11.5.2, 11.5.3", .amd_source = "APM 1, 4.10", .free = simd_flags_free},
    {.name = "MASKMOVQ MASKMOVDQU", .what = "whether bytes that the mask leaves out fault", .intel_source = "SDM 2B MASKMOVDQU: \"implementation dependent\"", .amd_source = "APM 4 MASKMOVDQU", .free = mask_move_free},
    {.name = "VEX.W, SHA, gathers", .what = "VPERMQ and VPERMPD with W clear are #UD (Intel) or the same (AMD); VPEXTRQ and VPINSRQ outside 64-bit mode are VPEXTRD and VPINSRD (Intel) or #UD (AMD); alignment of SHA's operands is not checked by AMD's; what gathers and VMASKMOV have done before a fault",
     .intel_source = "SDM 2B PEXTRQ, PINSRQ: \"VEX.W/EVEX.W in non-64 bit is ignored\"; SDM 2C VPERMQ, VPERMPD, VGATHERDPS, VMASKMOV; SDM 2A table 2-21", .amd_source = "APM 4 VGATHERDPS, VMASKMOVPS; W and alignment: measured on family 1Ah", .free = vex_free},
    {.name = "CVTPI2PS CVTPI2PD from memory", .what = "AMD's stay out of MMX mode", .intel_source = "SDM 2A CVTPI2PS, CVTPI2PD: Description", .amd_source = "APM 4 CVTPI2PS, CVTPI2PD",
     .free = conversion_free, .intel = intel_conversion},
    {.name = "aliases of x87 instructions", .what = "D9 D8, DC D0, DC D8, DD C8, DE D0, DF C0 to DF D8, DB E0, DB E1, DB E4", .intel_source = "SDM 2D table A-7 onwards has none", .amd_source = "APM 5 appendix A", .free = alias_free},
    {.name = "D9 D8 of an empty register", .what = "what it still holds", .always = true, .free = fstp1_free},
    {.name = "transcendental x87 instructions", .what = "the core's are its own (cpu/soft/fpu/x87_math.c); two units in the last place, and C1", .always = true, .free = transcendental_free},
    {.name = "RCPPS RSQRTPS", .what = "the core's are its own (cpu/soft/fpu/vec_approx.c); within the bound of both manuals", .always = true, .free = approximation_free},
    {.name = "MXCSR_MASK", .what = "the host may have misaligned SSE mode, MXCSR bit 17", .always = true, .free = mxcsr_mask_free},
    {.name = "unmasked underflow", .what = "PE and UE in MXCSR are not exact on the software core when #XM is raised: it runs the operation masked", .always = true, .free = underflow_free},
    {.name = "stages of DPPS and DPPD", .what = "flags in MXCSR when #XM is raised, likewise", .always = true, .free = dot_product_free},
    {.name = NULL},
};
