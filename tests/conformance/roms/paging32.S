/* Paging outside long mode: two levels with 4 MiB pages, then PAE. Error codes, accessed and dirty bits, reserved bits. */
.include "prot.inc"
.set DIR, 0x20000
.set TAB, 0x21000
.set PDPTS, 0x22000
.set PAED, 0x23000  /* 4 pages */
.set PAET, 0x27000
test_prot:
    SAY32 "two levels\n"
    mov edi, DIR
    xor eax, eax
    mov ecx, 0x8000 / 4
    rep stosd
    mov dword ptr [DIR], TAB + 7
    mov dword ptr [DIR + 4], 0x83       /* 4 MiB page at 4 MiB: physical 0 */
    mov dword ptr [DIR + 8], 0x200083   /* reserved bit 21 */
    mov dword ptr [DIR + 12], TAB + 5   /* read-only directory entry */
    mov edi, TAB
    mov eax, 7
    mov ecx, 1024
1:  stosd
    add eax, 0x1000
    loop 1b
    mov eax, cr4
    or eax, 0x10
    mov cr4, eax
    mov eax, DIR
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80010000
    mov cr0, eax
    mov dword ptr [0x150000], 0x1234
    TRY "mov eax, [0x550000]; call hex32"
    TRY "mov dword ptr [0x550000], 0x77; mov eax, [0x150000]; call hex32"
    mov eax, [DIR + 4]
    call hex32
    PUTC 10
    TRY "mov eax, [0x800000]"
    TRY "mov eax, [0xC00000 + 0x150000]; call hex32"
    TRY "mov dword ptr [0xC00000 + 0x150000], 1"
    TRY "mov eax, [0x1000000]"
    TRY "mov dword ptr [0xFFFFFFFC], 1"
    mov dword ptr [TAB + 0x160 * 4], 0x160000
    mov dword ptr [TAB + 0x161 * 4], 0x161003
    invlpg [0x160000]
    invlpg [0x161000]
    TRY "mov eax, [0x160000]"
    TRY "mov [0x15FFFE], eax"
    TRY "mov eax, [0x161000]; mov eax, [TAB + 0x161 * 4]; call hex32"
    TRY "mov [0x161000], eax; mov eax, [TAB + 0x161 * 4]; call hex32"
    USER u_super
    USER u_write
    USER u_fetch
    mov eax, cr4
    and eax, ~0x10
    mov cr4, eax
    SAY32 "PSE off: the bit is ignored\n"
    mov dword ptr [DIR + 4], TAB + 0x87
    mov eax, cr3
    mov cr3, eax
    TRY "mov eax, [0x550000]; call hex32"
    SAY32 "PAE\n"
    mov eax, cr0
    and eax, 0x7FFFFFFF
    mov cr0, eax
    mov dword ptr [PDPTS], PAED + 1
    mov dword ptr [PDPTS + 8], PAED + 0x1001
    mov dword ptr [PDPTS + 24], PAED + 0x3001
    mov edi, PAED
    mov eax, 0x87
    mov ecx, 512
1:  mov [edi], eax
    add edi, 8
    add eax, 0x200000
    loop 1b
    mov dword ptr [PAED], PAET + 7
    mov edi, PAET
    mov eax, 7
    mov ecx, 512
1:  mov [edi], eax
    add edi, 8
    add eax, 0x1000
    loop 1b
    mov dword ptr [PAED + 0x1000], PAET + 7  /* 1 GiB: the same 2 MiB again */
    mov dword ptr [PAED + 0x1008], 0x2087    /* reserved bit 13 */
    mov dword ptr [PAED + 0x1010], 0x200087
    mov dword ptr [PAED + 0x1014], 0x80000000 /* NX without NXE: reserved */
    mov dword ptr [PAED + 0x1018], 0x87
    mov dword ptr [PAED + 0x101C], 0x10000000 /* reserved bit 60 */
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, PDPTS
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    TRY "mov eax, [0x40150000]; call hex32"
    TRY "mov eax, [0x40200000]"
    TRY "mov eax, [0x40400000]"
    TRY "mov eax, [0x40600000]"
    TRY "mov eax, [0x80000000]"
    TRY "mov eax, [0xC0000000]"
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x800
    wrmsr
    TRY "mov eax, [0x40400000]; call hex32"
    TRY "mov eax, 0x40400000; call eax"
    USER u_nx
    SAY32 "PDPTEs are loaded with CR3\n"
    mov dword ptr [PDPTS + 16], PAED + 0x1001
    mov eax, PDPTS
    mov cr3, eax
    TRY "mov eax, [0x80150000]; call hex32"
    mov dword ptr [PDPTS + 16], PAED + 3 /* reserved bit 1 */
    TRY "mov eax, PDPTS; mov cr3, eax"
    SAY32 "end\n"
    EXIT 0
u_super: mov eax, [0x161000]
u_write: mov dword ptr [0xC00000 + 0x150000], 1
u_fetch: mov eax, 0x161000
    jmp eax
u_nx: mov eax, 0x40400000
    jmp eax
