/* 32-bit protected mode with a GDT of its own: a segment with a base and a limit, read and written through. */
#include "guest.h"
    .code32
    .globl start
start:
    mov esp, offset stack_top
    lgdt [gdt_pointer]
    .att_syntax
    ljmp $0x08, $1f
    .intel_syntax noprefix
1:  mov eax, 0x10
    mov ds, eax
    mov ss, eax
    mov eax, 0x18
    mov es, eax
    mov dword ptr es:[offset cell - 0x100000], 41
    inc dword ptr [cell]
    mov eax, es:[offset cell - 0x100000]
    cmp eax, 42
    jne 2f
    mov eax, 0x10
    mov es, eax
    mov esi, offset text
    call puts
    RESET
2:  mov al, 1
    out EXIT_PORT, al
    hlt
DEFINE_PUTS
PVH_ENTRY start
    .section .rodata
text: .asciz "Hello from protected mode!\n"
    .data
cell: .long 0
    .balign 8
gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x004093100000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt
    .bss
    .balign 16
stack: .skip 0x1000
stack_top:
