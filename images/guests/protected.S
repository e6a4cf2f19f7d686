/* 32-bit protected mode with a GDT, an IDT and a stack of its own: a software interrupt, then its answer. */
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
    mov es, eax
    mov ss, eax
    mov eax, offset handler
    mov [idt + 0x30 * 8], ax
    mov word ptr [idt + 0x30 * 8 + 2], 0x08
    mov word ptr [idt + 0x30 * 8 + 4], 0x8e00
    shr eax, 16
    mov [idt + 0x30 * 8 + 6], ax
    lidt [idt_pointer]
    mov eax, 41
    int 0x30
    cmp eax, 42
    jne 2f
    mov esi, offset text
    call puts
    RESET
2:  mov al, 1
    out EXIT_PORT, al
    hlt
handler:
    inc eax
    iretd
DEFINE_PUTS
PVH_ENTRY start
    .section .rodata
text: .asciz "Hello from protected mode!\n"
    .data
    .balign 8
gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt
idt_pointer:
    .word 0x3ff
    .long idt
    .bss
    .balign 16
idt: .skip 0x400
stack: .skip 0x1000
stack_top:
