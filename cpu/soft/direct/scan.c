/* Which instructions of a page of code must not run natively: those that would show the guest the host's processor and that
 * nothing makes fault. (RDTSC, RDTSCP and RDPRU fault as CR4.TSD is set, RDPMC as CR4.PCE is clear; RDRAND and RDSEED have no
 * state to show. AMD APM vol. 3, Intel SDM vol. 2.)
 *
 * Code has no marks where instructions begin, so this finds every address at which such an instruction *could* begin: that of
 * its 0F byte (or the prefix REX2 in its place), and those of the prefixes before it. At most of them none ever does, as the bytes are part of others. guard.c
 * watches these addresses.
 *
 * A page is looked at when it becomes executable, together with the neighbours that are. Whoever writes to it then, the core, a
 * device, or native code through another mapping, is seen, and it is looked at anew before it is executed again (run/shared.c).
 */
#include "soft/direct/internal.h"

enum { AROUND = 14 /* an instruction has 15 bytes at most */, PREFIXES_MAX = 12 };
/* With bit 7 of its second byte the opcode that follows is one behind 0F (Intel APX Architecture Specification, 3.1.1). */
enum { ESCAPE = 0x0F, REX2 = 0xD5, REX2_MAP1 = 0x80 };

/* Bytes 0F, p[1] and perhaps p[2], of which `have` are there: the length of the opcode if it sees the host, else 0. */
static unsigned sees_host(const struct direct_vm *direct, const uint8_t *p, int have)
{
    if (have < 2)
        return 0;
    if (p[1] == 0xA2) /* CPUID */
        return direct->cpuid_faults ? 0 : 2;
    if (p[1] == 0x34) /* SYSENTER: undefined in 64-bit mode on AMD's; Intel's enters the host's kernel, without a way back */
        return direct->sysenter ? 2 : 0;
    if (have < 3)
        return 0;
    unsigned modrm = p[2], reg = modrm >> 3 & 7;
    bool memory = modrm < 0xC0, sees = false;
    switch (p[1]) {
    case 0x01: /* XGETBV; RDPKRU and WRPKRU; VMCALL, VMMCALL and VMFUNC, which a host that is a guest itself answers */
        sees = modrm == 0xD0 || modrm == 0xEE || modrm == 0xEF || modrm == 0xC1 || modrm == 0xD9 || modrm == 0xD4;
        break;
    case 0x02: /* LAR, LSL of a register: the host's descriptors (Linux's getcpu() keeps the processor's number in one). With an
                * operand in memory, as VERR and VERW, they are not looked for: nothing uses them, and their bytes are in one page
                * of thirteen, in constants mostly. */
    case 0x03:
        sees = !memory;
        break;
    case 0xAE: /* FXSAVE and FXRSTOR: the host's MXCSR_MASK; XSAVE, XRSTOR, XSAVEOPT: its components */
        sees = memory && (reg <= 1 || (reg >= 4 && reg <= 6));
        break;
    case 0xC7: /* XRSTORS, XSAVEC, XSAVES; RDPID */
        sees = (memory && reg >= 3 && reg <= 5) || (!memory && reg == 7);
        break;
    }
    return sees ? 3 : 0;
}

static bool is_prefix(uint8_t byte)
{
    switch (byte) {
    case 0x26: case 0x2E: case 0x36: case 0x3E: case 0x64: case 0x65: case 0x66: case 0x67: case 0xF0: case 0xF2: case 0xF3:
        return true;
    default:
        return (byte & 0xF0) == 0x40; /* REX */
    }
}

/* The length of what begins with `escape` at p, without prefixes before it, up to its opcode, if it sees the host, else 0. */
static int length_at(const struct direct_vm *direct, uint8_t escape, const uint8_t *p, int have)
{
    if (escape == ESCAPE)
        return (int)sees_host(direct, p, have);
    int length = have > 1 && (p[1] & REX2_MAP1) ? (int)sees_host(direct, p + 1, have - 1) : 0;
    return length ? length + 1 : 0;
}

/* The same as scan_page(), of a page with its surroundings. Returns the new count, or -1. */
static int add_starts(const struct direct_vm *direct, uint8_t escape, const uint8_t *window, int first, int end, int count,
                      int16_t starts[SCAN_MOST])
{
    const uint8_t *at = window + first;
    for (; (at = memchr(at, escape, (size_t)(window + end - at))) != NULL; at++) {
        int opcode = (int)(at - window), length = length_at(direct, escape, at, end - opcode);
        if (!length || opcode + length <= AROUND)
            continue;
        for (int start = opcode; start >= first && opcode - start <= PREFIXES_MAX; start--) {
            if (start != opcode && !is_prefix(window[start]))
                break;
            if (start >= AROUND + (int)PAGE_BYTES)
                continue;
            if (count == SCAN_MOST)
                return -1;
            starts[count++] = (int16_t)(start - AROUND);
        }
    }
    return count;
}

int scan_page(const struct direct_vm *direct, const uint8_t *before, const uint8_t *page, const uint8_t *after,
              int16_t starts[SCAN_MOST])
{
    uint8_t window[AROUND + PAGE_BYTES + AROUND];
    int first = before ? 0 : AROUND, end = AROUND + PAGE_BYTES + (after ? AROUND : 0), count;
    if (before)
        memcpy(window, before + PAGE_BYTES - AROUND, AROUND);
    memcpy(window + AROUND, page, PAGE_BYTES);
    if (after)
        memcpy(window + AROUND + PAGE_BYTES, after, AROUND);
    count = add_starts(direct, ESCAPE, window, first, end, 0, starts);
    return count >= 0 && direct->rex2 ? add_starts(direct, REX2, window, first, end, count, starts) : count;
}
