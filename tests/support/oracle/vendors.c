/* The table's integer rows, and the table as a whole. See vendors.h.
 *
 * Clauses: Intel SDM (325462, volumes 1, 2A to 2D, 3A), AMD64 APM (24592, 24593, 24594, 26568, 26569: volumes 1 to 5).
 */
#include <cpuid.h>
#include <stdio.h>
#include <string.h>

#include "vendors.h"

/* ---- which instruction it is ---- */

static bool is_one(const struct form *x, unsigned low, unsigned high)
{
    return x->map == MAP_ONE && x->opcode >= low && x->opcode <= high;
}
static bool is_0f(const struct form *x, unsigned opcode) { return x->map == MAP_0F && x->opcode == opcode && !x->vex; }
static bool is_logic(const struct form *x)
{
    unsigned op = x->map == MAP_ONE && x->opcode < 0x40 && (x->opcode & 7) < 6 ? x->opcode >> 3u
                  : is_one(x, 0x80, 0x83)                                       ? form_group(x)
                                                                                : 0;
    return op == 1 || op == 4 || op == 6 || is_one(x, 0x84, 0x85) || is_one(x, 0xA8, 0xA9) || (is_one(x, 0xF6, 0xF7) && form_group(x) < 2);
}
static bool is_shift(const struct form *x) { return is_one(x, 0xC0, 0xC1) || is_one(x, 0xD0, 0xD3); }
static bool is_double_shift(const struct form *x)
{
    return x->map == MAP_0F && (x->opcode == 0xA4 || x->opcode == 0xA5 || x->opcode == 0xAC || x->opcode == 0xAD);
}
static bool is_multiplication(const struct form *x)
{
    return (is_one(x, 0xF6, 0xF7) && (form_group(x) == 4 || form_group(x) == 5)) || is_one(x, 0x69, 0x69) || is_one(x, 0x6B, 0x6B) || is_0f(x, 0xAF);
}
static bool is_bit_test(const struct form *x)
{
    return x->map == MAP_0F && (x->opcode == 0xA3 || x->opcode == 0xAB || x->opcode == 0xB3 || x->opcode == 0xBB || x->opcode == 0xBA);
}
static bool is_near_branch(const struct form *x)
{
    return is_one(x, 0x70, 0x7F) || is_one(x, 0xE0, 0xE3) || is_one(x, 0xE8, 0xE9) || is_one(x, 0xEB, 0xEB) || is_one(x, 0xC2, 0xC3) ||
           (x->map == MAP_0F && (x->opcode & 0xF0) == 0x80) || (is_one(x, 0xFF, 0xFF) && (form_group(x) == 2 || form_group(x) == 4));
}
static bool is_segment_push(const struct form *x)
{
    return (x->mode32 && x->map == MAP_ONE && (x->opcode == 0x06 || x->opcode == 0x0E || x->opcode == 0x16 || x->opcode == 0x1E)) ||
           is_0f(x, 0xA0) || is_0f(x, 0xA8);
}
/* Instructions of several accesses to memory, or of one in pieces. */
static bool has_pieces(const struct form *x)
{
    return (form_string(x) && (x->f2 || x->f3)) || is_one(x, 0x60, 0x62) || is_one(x, 0xA4, 0xA7) || is_one(x, 0xC8, 0xC8) || is_one(x, 0x8F, 0x8F) ||
           (is_one(x, 0xFF, 0xFF) && (form_group(x) == 2 || form_group(x) == 6)) || (form_x87(x) && form_memory(x)) || is_0f(x, 0xAE) ||
           is_0f(x, 0xC7) || is_0f(x, 0xF7);
}

int vendors_shift_count(const struct form *x, const struct cpu_state *in)
{
    bool by_cl = is_one(x, 0xD2, 0xD3) || is_0f(x, 0xA5) || is_0f(x, 0xAD), by_one = is_one(x, 0xD0, 0xD1);
    return by_cl && !in ? -1 : (int)((by_cl ? in->gpr[1] : by_one ? 1u : x->imm8) & (x->size == 8 ? 63 : 31));
}

/* ---- flags ---- */

static unsigned logic_flags(const struct form *x, int count)
{
    (void)count;
    return is_logic(x) ? F_AF : 0;
}
static unsigned shift_flags(const struct form *x, int count)
{
    if (!is_shift(x) || count == 0)
        return 0;
    int bits = (int)x->size * 8;
    unsigned of = count != 1 ? F_OF : 0, g = form_group(x);
    if (g < 2)
        return of | (count < 0 || count % bits == 0 ? F_CF : 0);
    return g < 4 ? of : of | F_AF | (g != 7 && (count < 0 || count >= bits) ? F_CF : 0);
}
static unsigned double_shift_flags(const struct form *x, int count)
{
    if (!is_double_shift(x) || count == 0)
        return 0;
    return count < 0 || count > (int)x->size * 8 ? F_STATUS : count == 1 ? F_AF : F_AF | F_OF;
}
static unsigned multiplication_flags(const struct form *x, int count)
{
    (void)count;
    return is_multiplication(x) ? F_SF | F_ZF | F_AF | F_PF : 0;
}
static unsigned division_flags(const struct form *x, int count)
{
    (void)count;
    return is_one(x, 0xF6, 0xF7) && form_group(x) >= 6 ? F_STATUS : 0;
}
static bool is_lzcnt(const struct form *x) { return (is_0f(x, 0xBC) || is_0f(x, 0xBD)) && x->f3; } /* or TZCNT */
static unsigned scan_flags(const struct form *x, int count)
{
    (void)count;
    return is_lzcnt(x) ? F_STATUS & ~(F_ZF | F_CF) : is_0f(x, 0xBC) || is_0f(x, 0xBD) ? F_STATUS & ~F_ZF : 0;
}
/* ANDN, BLSR, BLSMSK, BLSI, BZHI; BEXTR */
static unsigned vex_flags(const struct form *x, int count)
{
    (void)count;
    return !x->vex || !form_writes(x) ? 0 : x->opcode == 0xF7 ? F_SF | F_AF | F_PF : F_AF | F_PF;
}
static unsigned bit_test_flags(const struct form *x, int count)
{
    (void)count;
    return is_bit_test(x) ? F_STATUS & ~F_CF : 0;
}
static unsigned decimal_flags(const struct form *x, int count)
{
    (void)count;
    if (!x->mode32 || x->map != MAP_ONE)
        return 0;
    switch (x->opcode) {
    case 0x27: case 0x2F: return F_OF;
    case 0x37: case 0x3F: return F_OF | F_SF | F_ZF | F_PF;
    case 0xD4: case 0xD5: return F_OF | F_AF | F_CF;
    default: return 0;
    }
}

static void intel_multiplication(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)memory, (void)r;
    if (!is_multiplication(&e->form) || is_fault(out))
        return;
    const struct form *x = &e->form;
    bool rax = x->map == MAP_ONE && x->opcode >= 0xF6;
    uint64_t low = out->gpr[rax ? 0 : x->reg];
    uint64_t sf = low >> (x->size * 8 - 1) & 1;
    out->rflags = (out->rflags & ~(uint64_t)(F_SF | F_ZF | F_AF | F_PF)) | (sf ? F_SF : 0) | (__builtin_parity((unsigned)low & 0xFF) ? 0 : F_PF);
}

/* ---- results ---- */

static void free_upper_half(const struct form *x, struct freedom *f, unsigned reg)
{
    if (!x->mode32 && x->size == 4)
        f->gpr[reg] |= 0xFFFFFFFF00000000;
}
static void shift_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    if (!(is_shift(x) || is_double_shift(x)) || vendors_shift_count(x, e->in) != 0)
        return;
    if (form_memory(x) && any_fault(e)) /* is memory written? */
        f->everything = true;
}
static void double_shift_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    if (!is_double_shift(x) || vendors_shift_count(x, e->in) <= (int)x->size * 8)
        return;
    if (form_memory(x))
        free_memory(f, e->insn->ea, 0, x->size);
    else
        f->gpr[x->rm] |= 0xFFFF;
}
static void scan_free(const struct event *e, struct freedom *f)
{
    if ((is_0f(&e->form, 0xBC) || is_0f(&e->form, 0xBD)) && !is_lzcnt(&e->form) && (e->host->rflags & F_ZF))
        f->gpr[e->form.reg] = ~0ull;
}
static void bit_string_free(const struct event *e, struct freedom *f)
{
    if (is_bit_test(&e->form) && form_memory(&e->form) && any_fault(e))
        f->everything = true;
}
static void cmpxchg_free(const struct event *e, struct freedom *f)
{
    if ((is_0f(&e->form, 0xB0) || is_0f(&e->form, 0xB1))) {
        free_upper_half(&e->form, f, 0);
        if (!form_memory(&e->form))
            free_upper_half(&e->form, f, e->form.rm);
    }
}
static bool is_bswap16(const struct form *x) { return x->map == MAP_0F && x->opcode >= 0xC8 && x->opcode <= 0xCF && x->size == 2; }
static void bswap_free(const struct event *e, struct freedom *f)
{
    if (is_bswap16(&e->form))
        f->gpr[e->form.rm] |= 0xFFFF;
}
static void intel_bswap(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)memory, (void)r;
    if (is_bswap16(&e->form) && !is_fault(out))
        out->gpr[e->form.rm] &= ~0xFFFFull;
}
static void segment_push_free(const struct event *e, struct freedom *f)
{
    if (e->form.mode32 && is_segment_push(&e->form) && e->form.size == 4)
        free_memory(f, e->host->gpr[4], 2, 2);
}
static void intel_segment_push(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)r;
    uint64_t at = out->gpr[4] + 2;
    if (e->form.mode32 && is_segment_push(&e->form) && e->form.size == 4 && !is_fault(out) && at >= STACK_BASE && at + 2 <= STACK_BASE + STACK_SIZE)
        memcpy(memory->stack + (at - STACK_BASE), e->before->stack + (at - STACK_BASE), 2);
}

/* ---- branches and prefixes ---- */

static bool short_branch(const struct form *x) { return !x->mode32 && x->p66 && !(x->rex & 8) && is_near_branch(x); }
static bool repeated_loop(const struct form *x) { return is_one(x, 0xE0, 0xE1) && (x->f2 || x->f3); }

/* Does the instruction again, without these prefixes (a segment override does nothing to it). */
static void without_prefixes(const struct event *e, struct cpu_state *out, struct memory *memory, bool (*drop)(uint8_t))
{
    struct insn other = *e->insn;
    for (unsigned i = 0; i < e->form.prefixes; i++)
        if (drop(other.bytes[i]))
            other.bytes[i] = 0x3E;
    *out = *e->in;
    *memory = *e->before;
    native_run(&other, out, memory);
}
static bool is_66(uint8_t byte) { return byte == 0x66; }
static bool is_repeat(uint8_t byte) { return byte == 0xF2 || byte == 0xF3; }

static void short_branch_free(const struct event *e, struct freedom *f) { f->everything |= short_branch(&e->form); }
static void intel_short_branch(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)r;
    if (short_branch(&e->form))
        without_prefixes(e, out, memory, is_66);
}
static void repeated_loop_free(const struct event *e, struct freedom *f) { f->everything |= repeated_loop(&e->form); }
static void intel_repeated_loop(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)r;
    if (repeated_loop(&e->form) && !short_branch(&e->form))
        without_prefixes(e, out, memory, is_repeat);
}
static void target_free(const struct event *e, struct freedom *f)
{
    if (!e->form.mode32 && is_near_branch(&e->form) && either(e, 13))
        f->everything = true;
}
static void movsxd_free(const struct event *e, struct freedom *f)
{
    if (!e->form.mode32 && is_one(&e->form, 0x63, 0x63) && e->form.size == 2 && any_fault(e))
        f->everything = true;
}
static void reserved_prefix_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    bool repeat = x->f2 || x->f3;
    if (x->vex) /* p66, f2 and f3 are VEX.pp there, a part of the opcode */
        return;
    if (x->map == MAP_ONE) {
        f->everything |= (form_string(x) && x->f2 && (x->opcode & 0xFE) != 0xA6 && (x->opcode & 0xFE) != 0xAE);
        return;
    }
    if (((is_0f(x, 0xB8) || is_0f(x, 0xBD)) && x->f3) || (x->map == MAP_0F38 && (x->opcode & 0xFE) == 0xF0 && !x->f3) || (x->map == MAP_0F38 && x->opcode == 0x82 && x->p66 && !repeat))
        return;
    const struct vec_op *op = form_vector(x);
    if (repeat)
        f->everything |= !op || x->p66;
    else if (x->map != MAP_0F)
        f->everything |= !op;
    else if (x->p66)
        f->everything |= !op && (x->opcode == 0xAE || x->opcode == 0xC7 || x->opcode == 0xC3 || fpu_lookup_vector(VEC_MAP_0F, x->opcode, VEC_NP, x->modrm));
}
static void newer_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    f->everything |= (is_one(x, 0xC6, 0xC7) && x->modrm == 0xF8) || (is_0f(x, 0x0D) && !form_memory(x)) ||
                     (x->mode32 && is_one(x, 0xD6, 0xD6)) || (is_one(x, 0xF6, 0xF7) && form_group(x) == 1);
}

/* ---- faults ---- */

static void order_free(const struct event *e, struct freedom *f)
{
    (void)e;
    f->order = true;
    f->cr2 |= 0xFFF;
}
static void pieces_free(const struct event *e, struct freedom *f)
{
    if (has_pieces(&e->form))
        f->detail = true;
    if (e->form.mode32 && is_one(&e->form, 0x63, 0x63) && any_fault(e)) /* ARPL */
        f->everything = true;
}
static void read_write_free(const struct event *e, struct freedom *f)
{
    bool move = is_one(&e->form, 0x88, 0x8B) || is_one(&e->form, 0xA0, 0xA3) || is_one(&e->form, 0xC6, 0xC7) || is_one(&e->form, 0x50, 0x5F);
    if (!(e->host->error & 1) && !move)
        f->error |= 2;
}
static void intel_read_write(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)memory, (void)r; /* the read comes first */
    if (e->form.map == MAP_ONE && (e->form.opcode & 0xFC) == 0x80 && form_group(&e->form) != 7 && out->vector == 14 && !(out->error & 1))
        out->error &= ~2u;
}
static void alignment_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    if (either(e, 17) && (x->map != MAP_ONE || has_pieces(x) || form_string(x) || form_x87(x) || x->lock || is_one(x, 0x86, 0x87)))
        f->everything = true;
}
static void string_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    if (!form_string(x) || !(x->f2 || x->f3))
        return;
    if ((x->mode32 || x->p67 ? (uint32_t)e->in->gpr[1] : e->in->gpr[1]) == 0) {
        if (x->opcode < 0x70) /* are ports checked? */
            f->everything = true;
        if (x->p67)
            f->gpr[1] = f->gpr[6] = f->gpr[7] = 0xFFFFFFFF00000000;
    }
}
static void intel_string(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    (void)memory, (void)r;
    const struct form *x = &e->form;
    if (form_string(x) && (x->f2 || x->f3) && x->p67 && !x->mode32 && !(uint32_t)e->in->gpr[1] && !is_fault(out))
        out->gpr[1] = 0;
}
static void compatibility_free(const struct event *e, struct freedom *f)
{
    if (e->insn->mode32)
        for (unsigned i = 0; i < 8; i++)
            f->gpr[i] |= 0xFFFFFFFF00000000;
}

/* ---- what no host is compared in ---- */

static void pages_free(const struct event *e, struct freedom *f)
{
    const struct form *x = &e->form;
    if (form_x87(x) || (x->map == MAP_ONE && (x->opcode & 0xFE) == 0xA6) || is_0f(x, 0xAE) || is_0f(x, 0xF7))
        f->cr2 |= 0xFFF;
}
static void kernel_address_free(const struct event *e, struct freedom *f)
{
    if (e->host->vector == 14 && e->host->cr2 >> 47)
        f->error = ~0u;
}
static void program_free(const struct event *e, struct freedom *f)
{
    if (e->insn->program && e->host->vector != 3)
        f->flags = ~0ull;
}

const struct difference integer_differences[] = {
    {.name = "AND OR XOR TEST", .what = "AF undefined", .intel_source = "SDM 2A AND, 2B OR, 2D TEST, XOR: Flags Affected",
     .amd_source = "APM 3 AND, OR, TEST, XOR: rFLAGS Affected", .flags = logic_flags},
    {.name = "shifts and rotates", .what = "AF undefined; OF undefined unless the count is 1; CF undefined for counts of the width or more (a rotate by a multiple of it); by 0: whether memory is written",
     .intel_source = "SDM 2B SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR: Description, Flags Affected", .amd_source = "APM 3 SAL, SAR, SHR, RCL, RCR, ROL, ROR",
     .flags = shift_flags, .free = shift_free},
    {.name = "SHLD SHRD", .what = "AF undefined; OF undefined unless the count is 1; everything undefined for a count above the width",
     .intel_source = "SDM 2B SHLD, SHRD: Description", .amd_source = "APM 3 SHLD, SHRD", .flags = double_shift_flags, .free = double_shift_free},
    {.name = "MUL IMUL", .what = "SF, ZF, AF, PF undefined: AMD's keep them, Intel's compute SF and PF", .intel_source = "SDM 2A IMUL, 2B MUL: Flags Affected",
     .amd_source = "APM 3 MUL, IMUL: rFLAGS Affected", .flags = multiplication_flags, .intel = intel_multiplication},
    {.name = "DIV IDIV", .what = "all status flags undefined", .intel_source = "SDM 2A DIV, IDIV: Flags Affected", .amd_source = "APM 3 DIV, IDIV", .flags = division_flags},
    {.name = "BSF BSR LZCNT TZCNT", .what = "OF, SF, AF, PF undefined, for BSF and BSR also CF; their destination undefined (Intel) or kept (AMD) when the source is 0",
     .intel_source = "SDM 2A BSF, BSR: Description; LZCNT, TZCNT: Flags Affected", .amd_source = "APM 3 BSF, BSR, LZCNT, TZCNT", .flags = scan_flags, .free = scan_free},
    {.name = "ANDN BLSI BLSMSK BLSR BZHI BEXTR", .what = "AF, PF undefined, for BEXTR also SF",
     .intel_source = "SDM 2A ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI: Flags Affected", .amd_source = "APM 3 ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI", .flags = vex_flags},
    {.name = "BT BTS BTR BTC", .what = "OF, SF, ZF, AF, PF undefined; how much of a bit string in memory is read, and so what faults",
     .intel_source = "SDM 2A BT: Description, Flags Affected", .amd_source = "APM 3 BT, BTC, BTR, BTS", .flags = bit_test_flags, .free = bit_string_free},
    {.name = "DAA DAS AAA AAS AAM AAD", .what = "DAA, DAS: OF; AAA, AAS: OF, SF, ZF, PF; AAM, AAD: OF, AF, CF undefined",
     .intel_source = "SDM 2A AAA to AAS, DAA, DAS: Flags Affected", .amd_source = "APM 3 AAA to AAS, DAA, DAS", .flags = decimal_flags},
    {.name = "CMPXCHG of 32 bits", .what = "whether bits 63:32 of RAX and of a destination register are cleared if it is not written",
     .intel_source = "SDM 2A CMPXCHG: Operation", .amd_source = "APM 1, 3.1.2; APM 3 CMPXCHG", .free = cmpxchg_free},
    {.name = "BSWAP of 16 bits", .what = "undefined: AMD's swap, Intel's clear", .intel_source = "SDM 2A BSWAP: Description", .amd_source = "APM 3 BSWAP",
     .free = bswap_free, .intel = intel_bswap},
    {.name = "PUSH of a segment register, 32 bits", .what = "the upper half is zero, or (Intel) the stack's is kept",
     .intel_source = "SDM 2B PUSH: \"either a zero-extended value is pushed on the stack or the segment selector is written on the stack using a 16-bit move\"",
     .amd_source = "APM 3 PUSH", .free = segment_push_free, .intel = intel_segment_push},
    {.name = "near branches with a 66 prefix in 64-bit mode", .what = "AMD: 16-bit operand size; Intel: the prefix is ignored",
     .intel_source = "SDM 2A CALL, JMP, Jcc; SDM 2D appendix A.2.5 (f64)", .amd_source = "APM 3, 1.2.2 and table B-5", .free = short_branch_free, .intel = intel_short_branch},
    {.name = "LOOPE LOOPNE with F2 or F3", .what = "AMD: the prefix says which of the two it is; Intel: reserved, ignored", .intel_source = "SDM 2A 2.1.1",
     .amd_source = "APM 3, 1.2.6", .free = repeated_loop_free, .intel = intel_repeated_loop},
    {.name = "branches to an address that is not canonical", .what = "whether they fault before or after the branch, and what they have pushed",
     .intel_source = "SDM 2A CALL, JMP, 2B RET: Operation", .amd_source = "APM 3 CALL, JMP, RET", .free = target_free},
    {.name = "MOVSXD with 16-bit operand", .what = "AMD reads four bytes, Intel two: faults", .intel_source = "SDM 2B MOVSX/MOVSXD", .amd_source = "APM 3 MOVSXD", .free = movsxd_free},
    {.name = "reserved prefixes and opcodes", .what = "F2, F3, 66 where they mean nothing; opcodes that one vendor or a newer processor uses",
     .intel_source = "SDM 2A 2.1.1: \"use of repeat prefixes ... is reserved\"; XSAVE: #UD", .amd_source = "APM 3, 1.2.6 and appendix A", .free = reserved_prefix_free},
    {.name = "opcodes of one vendor", .what = "XBEGIN, XABORT; registers as operands of 0F 0D; SALC and TEST /1, which no manual has",
     .intel_source = "SDM 2C XABORT, XBEGIN; PREFETCHW", .amd_source = "APM 3 PREFETCH; appendix A", .free = newer_free},
    {.name = "order of faults", .what = "which of an instruction's faults is reported; CR2 of an access across two pages",
     .intel_source = "SDM 3A 6.9: \"exceptions within each class are implementation-dependent and may vary from processor to processor\"", .amd_source = "APM 2, 8.5", .free = order_free},
    {.name = "accesses in pieces", .what = "what is done before a fault of a repeated string, PUSHA, POPA, ENTER, FXSAVE, XSAVE, x87 and MASKMOV; ARPL writes only what changes (AMD); flags of a repeated comparison that faults",
     .intel_source = "SDM 1, 7.3.9.3; SDM 2B REP: \"the EFLAGS value is restored to the state prior to the execution\"", .amd_source = "APM 3, 1.2.6", .free = pieces_free},
    {.name = "error code of read-modify-write", .what = "W of a page fault on a page that is not present", .intel_source = "SDM 3A 4.7", .amd_source = "APM 2, 8.4.2",
     .free = read_write_free, .intel = intel_read_write},
    {.name = "alignment", .what = "which operands of strings, x87, SSE and state images are checked; locked accesses across a cache line may be #AC (Intel)",
     .intel_source = "SDM 3A table 6-7, 9.1.2.3; FXSAVE: \"may vary with implementation\"", .amd_source = "APM 2, 8.2.18", .free = alignment_free},
    {.name = "repeated strings of count 0", .what = "whether bits 63:32 are cleared with a 67 prefix; whether INS and OUTS check the port",
     .intel_source = "SDM 2B REP; SDM 1, 3.4.1.1", .amd_source = "APM 1, 3.1.2; APM 3, 1.2.6", .free = string_free, .intel = intel_string},
    {.name = "single steps", .what = "soak: RF between the repetitions of a string and how many of them are seen; the step over CPUID where a hypervisor does it. The oracle compares neither RF nor TF",
     .intel_source = "SDM 3B 18.3.1.1, 18.3.1.4; SDM 2B REP", .amd_source = "APM 2, 13.1.4"},
    {.name = "SYSCALL SYSRET SYSENTER SYSEXIT", .what = "AMD's: SYSCALL in legacy and compatibility mode, SYSENTER is #UD in long mode, SYSRET takes any RCX; Intel's: SYSCALL in 64-bit mode alone, SYSENTER everywhere, SYSRET to an address that is not canonical is #GP at CPL 0. Not run beside a host: firmware images of test_soft_roms.py",
     .intel_source = "SDM 2B SYSCALL, SYSENTER, SYSRET", .amd_source = "APM 3 SYSCALL, SYSENTER, SYSRET; APM 2, 6.1"},
    {.name = "null selectors, descriptor tables", .what = "whether a null selector clears base and limit (CPUID.80000021:EAX[6]); LAR and LSL of system descriptors; bits 19:16 of what LAR loads: AMD's have the limit's. Not run beside a host",
     .intel_source = "SDM 2A LAR, LSL", .amd_source = "APM 2, 4.5.1; APM 3 LAR, LSL"},
    {.name = "far pointers in memory", .what = "with REX.W an offset of 32 bits on AMD's, of 64 on Intel's. The core has AMD's in LFS, LGS, LSS, and Intel's in CALL and JMP, for which kvm-unit-tests' `emulator` has it. Not run beside a host",
     .intel_source = "SDM 2A CALL, JMP, LDS/LES/LFS/LGS/LSS", .amd_source = "APM 3 CALL (Far), JMP (Far), LFS"},
    {.name = "TZCNT CPUID", .what = "what the host has and the guest's CPUID does not name. Not run beside a host", .intel_source = "SDM 2A CPUID, 2B TZCNT", .amd_source = "APM 3 TZCNT; appendix E"},
    {.name = "registers outside 64-bit mode", .what = "bits 63:32 undefined", .intel_source = "SDM 1, 3.4.1.1", .amd_source = "APM 1, 3.1.2", .free = compatibility_free},
    {.name = "pages of operands in pieces", .what = "x87, CMPS, FXSAVE and MASKMOV may fault at any piece", .always = true, .free = pages_free},
    {.name = "errors at kernel addresses", .what = "Linux does not tell a process their error code", .always = true, .free = kernel_address_free},
    {.name = "programs that fault", .what = "flags that are overwritten before they are read need not be exact on the software core", .always = true, .free = program_free},
    {.name = NULL},
};

const struct difference *vendors_row(unsigned n)
{
    const struct difference *row = integer_differences;
    while (row->name && n)
        row++, n--;
    if (row->name)
        return row;
    for (row = fpu_differences; row->name && n; n--)
        row++;
    return row->name ? row : NULL;
}

unsigned vendors_undefined_flags(const struct form *x, int count)
{
    unsigned flags = 0;
    const struct difference *row;
    for (unsigned n = 0; (row = vendors_row(n)); n++)
        if (row->flags)
            flags |= row->flags(x, count);
    return flags;
}

bool vendors_unfit_for_programs(const struct form *x)
{
    unsigned g = form_group(x);
    if (form_x87(x)) /* conditions and environments, in memory and in AX */
        return form_memory(x) ? (x->opcode == 0xD9 && (g == 4 || g == 6)) || (x->opcode == 0xDD && (g == 4 || g == 6 || g == 7)) ||
                                    (x->opcode == 0xDF && g == 4) /* FBLD */
                              : (x->opcode == 0xD9 && (x->modrm == 0xF5 || x->modrm == 0xF8)) /* FPREM */ || form_x87_alias(x) || (x->opcode == 0xDF && x->modrm == 0xE0);
    return x->map == MAP_0F && (x->opcode == 0xBC || (x->opcode == 0xBD && !x->f3) || x->opcode == 0xB1 || (is_double_shift(x) && x->size == 2));
}

enum rules vendors_host_rules(void)
{
    unsigned a, b, c, d;
    __cpuid(0, a, b, c, d);
    return b == 0x68747541 && d == 0x69746E65 && c == 0x444D4163 ? RULES_AMD : RULES_COMMON;
}

void vendors_print(void)
{
    const struct difference *row;
    printf("| where | what may differ | Intel | AMD |\n|---|---|---|---|\n");
    for (unsigned n = 0; (row = vendors_row(n)); n++)
        if (!row->always)
            printf("| %s | %s | %s | %s |\n", row->name, row->what, row->intel_source, row->amd_source);
}
