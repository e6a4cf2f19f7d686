/* 64-bit mode, CPL 3 with IOPL 3: the line is written by unprivileged code. */
#include "guest.h"
    .code32
    .globl start
start:
    LONG_MODE main
main:
    push 0x1b
    push offset user_stack_top
    push 0x3002
    push 0x23
    push offset user
    iretq
user:
    mov eax, cs
    and eax, 3
    cmp eax, 3
    jne 1f
    mov esi, offset text
    call puts
    RESET
1:  mov al, 1
    out EXIT_PORT, al
2:  jmp 2b
DEFINE_PUTS
PVH_ENTRY start
    .section .rodata
text: .asciz "Hello from user mode!\n"
    .bss
    .balign 16
    .skip 0x1000
user_stack_top:
