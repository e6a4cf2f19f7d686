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
    SAY "far pointers with REX.W\n" /* an offset of 32 bits; CALL pushes 64 (APM vol. 3, CALL (Far), LFS) */
    lea eax, [rip + 1f]
    mov [0x20000], eax
    mov dword ptr [0x20004], CODE64
    mov word ptr [0x20008], 0
    mov r12, rsp
    mov rax, 0x20000
    .byte 0x48, 0xFF, 0x28  /* jmp */
1:  lea eax, [rip + 2f]
    mov [0x20000], eax
    mov rax, 0x20000
    .byte 0x48, 0xFF, 0x18  /* call */
2:  mov rax, r12
    sub rax, rsp
    mov rsp, r12
    call hex32_64
    PUTC64 10
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
