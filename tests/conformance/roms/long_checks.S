/* Checks of control registers, MSRs and canonical stack addresses that QEMU does not make. */
.include "long.inc"
test_long:
    mov rbp, 0x8000000000000000
    TRY "mov al, [rbp]"
    SAY "cr and msr\n"
    TRY "mov rax, 0x100000000; mov cr0, rax"
    TRY "mov rax, cr0; and eax, ~1; mov cr0, rax"
    TRY "mov rax, cr4; bts rax, 30; mov cr4, rax"
    TRY "mov rax, cr4; btr rax, 5; mov cr4, rax"
    TRY "mov rax, 0x10; mov cr8, rax"
    TRY "mov ecx, 0xC0000080; rdmsr; bts eax, 1; wrmsr"
    TRY "mov ecx, 0xC0000082; xor eax, eax; mov edx, 0x80000000; wrmsr"
    TRY "mov ecx, 0x277; mov eax, 2; xor edx, edx; wrmsr"
    TRY "mov ecx, 0x12345678; rdmsr"
    TRY "mov rax, 1; shl rax, 32; mov dr7, rax"
    SAY "icebp and null TR\n"
    TRY ".byte 0xF1"
    TRY "xor eax, eax; ltr ax"
    SAY "lfs with REX.W\n"  /* 32 bits of an offset of 32 (APM vol. 3, LFS) */
    mov rax, -1
    mov ebx, 0x20000
    mov dword ptr [rbx], 0x89ABCDEF
    mov dword ptr [rbx + 4], DATA
    .byte 0x48, 0x0F, 0xB4, 0x03 /* lfs rax, [rbx] */
    mov ecx, 16
    call hexn64
    PUTC64 ' '
    mov eax, fs
    call hex32_64
    PUTC64 10
    SAY "lar\n"             /* bits 19:16 are undefined (SDM vol. 2, LAR); AMD's load the limit's */
    mov eax, DATA
    lar eax, eax
    call hex32_64
    PUTC64 10
    EXIT 0
