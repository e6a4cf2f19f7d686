/* 64-bit mode, CPL 0: 64-bit arithmetic, then its line. */
#include "guest.h"
    .code32
    .globl start
start:
    LONG_MODE main
main:
    movabs rax, 0x123456789abcdef0
    mov rcx, rax
    rol rcx, 32
    xor rcx, rax
    movabs rax, 0x88888888 * 0x100000001
    cmp rcx, rax
    jne 1f
    mov esi, offset text
    call puts
    RESET
1:  mov al, 1
    out EXIT_PORT, al
    hlt
DEFINE_PUTS
PVH_ENTRY start
    .section .rodata
text: .asciz "Hello from long mode!\n"
