/* The 8254 at 100 Hz through the 8259: counts the ticks that the command line asks for (default 50). */
#include "guest.h"
    .code32
    .globl start
start:
    CMDLINE_NUMBER 50
    mov [wanted], eax
    LONG_MODE main
main:
    SET_GATE 0x20, tick
    lidt [idt_pointer]
    mov al, 0x34
    out 0x43, al
    mov al, 11932 & 0xff
    out 0x40, al
    mov al, 11932 >> 8
    out 0x40, al
    PIC_SETUP 0xfe
1:  cli
    mov eax, [ticks]
    cmp eax, [wanted]
    jae 2f
    sti
    hlt
    jmp 1b
2:  mov eax, [wanted]
    call putnum
    mov esi, offset text
    call puts
    RESET
tick:
    push rax
    inc dword ptr [ticks]
    mov al, 0x20
    out 0x20, al
    pop rax
    iretq
DEFINE_PUTS
DEFINE_PUTNUM
DEFINE_IDT
PVH_ENTRY start
    .section .rodata
text: .asciz " ticks\n"
    .data
ticks: .long 0
wanted: .long 0
