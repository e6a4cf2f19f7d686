/* What cpu/soft/direct/scan.c finds in pages. `scan [cpuid] [sysenter] [rex2]`: the host makes CPUID fault, may execute SYSENTER,
 * has REX2. Each line of the input is `BEFORE OFFSET BYTES AFTER`: bytes in hexadecimal at the end of the page before, at an
 * offset (decimal) of the page and at the begin of the page behind it; `-`: that neighbour is not executable, or there are none.
 * The rest is NOPs. A line of the output has the addresses in the order in which they were found, or `many`. */
#include "soft/direct/internal.h"

#include <stdio.h>

static unsigned put(uint8_t *at, const char *text)
{
    unsigned count = 0, byte;
    for (; sscanf(text + 2 * count, "%2x", &byte) == 1; count++)
        at[count] = (uint8_t)byte;
    return count;
}

int main(int argc, char **argv)
{
    static struct direct_vm direct;
    for (int i = 1; i < argc; i++) {
        direct.cpuid_faults |= !strcmp(argv[i], "cpuid");
        direct.sysenter |= !strcmp(argv[i], "sysenter");
        direct.rex2 |= !strcmp(argv[i], "rex2");
    }
    char before[64], bytes[128], after[64];
    unsigned offset;
    while (scanf("%63s %u %127s %63s", before, &offset, bytes, after) == 4) {
        uint8_t pages[3][PAGE_BYTES], end[64];
        int16_t starts[SCAN_MOST];
        memset(pages, 0x90, sizeof pages);
        unsigned count = put(end, before);
        memcpy(pages[0] + PAGE_BYTES - count, end, count);
        put(pages[1] + offset, bytes);
        put(pages[2], after);
        int found = scan_page(&direct, *before == '-' ? NULL : pages[0], pages[1], *after == '-' ? NULL : pages[2], starts);
        printf("%s", found < 0 ? "many" : "");
        for (int i = 0; i < found; i++)
            printf("%s%d", i ? " " : "", starts[i]);
        puts("");
    }
    return 0;
}
