/* Which pages of code may run natively.
 *
 * Instructions that would show the guest the host's processor, where nothing makes them fault: a page that holds the bytes of
 * one stays in the core. What begins in one page and ends in the next is looked for by its first bytes. Most are no
 * instructions at all but parts of others; that costs speed and nothing else.
 *
 * This is for guests that mean well: one that wants to know the host finds a way (it may write such an instruction into a page
 * that was looked at), and learns what every program of the host may know.
 */
#include "soft/direct/internal.h"

/* The two or three bytes at p[0..2], of which p[0] is 0F. */
static bool sees_host(const uint8_t *p, bool cpuid_faults)
{
    unsigned modrm = p[2], reg = modrm >> 3 & 7;
    bool memory = modrm < 0xC0;
    switch (p[1]) {
    case 0xA2: /* CPUID */
        return !cpuid_faults;
    case 0x01: /* XGETBV; RDPKRU and WRPKRU */
        return modrm == 0xD0 || modrm == 0xEE || modrm == 0xEF;
    case 0x02: /* LAR, LSL of a register: the host's descriptors (Linux's getcpu() keeps the processor's number in one) */
    case 0x03:
        return !memory;
    case 0xAE: /* XSAVE, XRSTOR, XSAVEOPT: the host's components */
        return memory && reg >= 4 && reg <= 6;
    case 0xC7: /* XRSTORS, XSAVEC, XSAVES; RDPID */
        return (memory && reg >= 3 && reg <= 5) || (!memory && reg == 7);
    default:
        return false;
    }
}

bool scan_page(const struct direct_vm *direct, const uint8_t *page)
{
    const uint8_t *at = page, *end = page + PAGE_BYTES - 2;
    while (at < end && (at = memchr(at, 0x0F, (size_t)(end - at)))) {
        if (sees_host(at, direct->cpuid_faults))
            return false;
        at++;
    }
    /* 0F A2 may end the page. */
    return direct->cpuid_faults || page[PAGE_BYTES - 2] != 0x0F || page[PAGE_BYTES - 1] != 0xA2;
}
