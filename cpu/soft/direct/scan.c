/* Which instructions of a page of code must not run natively: those that would show the guest the host's processor and that
 * nothing makes fault. (RDTSC, RDTSCP and RDPRU fault as CR4.TSD is set, RDPMC as CR4.PCE is clear; RDRAND and RDSEED have no
 * state to show. AMD APM vol. 3, Intel SDM vol. 2.)
 *
 * Code has no marks where instructions begin, so this finds every address at which such an instruction *could* begin: that of
 * its 0F byte, and those of the prefixes before it. At most of them none ever does, as the bytes are part of others. guard.c
 * watches these addresses.
 *
 * A page is looked at when it becomes executable, together with the neighbours that are. Whoever writes to it then, the core, a
 * device, or native code through another mapping, is seen, and it is looked at anew before it is executed again (run/shared.c).
 */
#include "soft/direct/internal.h"

enum { AROUND = 14 /* an instruction has 15 bytes at most */, PREFIXES_MAX = 12 };

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

int scan_page(const struct direct_vm *direct, const uint8_t *before, const uint8_t *page, const uint8_t *after,
              int16_t starts[SCAN_MOST])
{
    uint8_t window[AROUND + PAGE_BYTES + AROUND];
    int first = before ? 0 : AROUND, end = AROUND + PAGE_BYTES + (after ? AROUND : 0), count = 0;
    if (before)
        memcpy(window, before + PAGE_BYTES - AROUND, AROUND);
    memcpy(window + AROUND, page, PAGE_BYTES);
    if (after)
        memcpy(window + AROUND + PAGE_BYTES, after, AROUND);
    const uint8_t *at = window + first;
    for (; (at = memchr(at, 0x0F, (size_t)(window + end - at))) != NULL; at++) {
        int opcode = (int)(at - window), length = (int)sees_host(direct, at, end - opcode);
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
