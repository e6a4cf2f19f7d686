/* Interrupt-driven UART echo: every received byte is sent back; Ctrl-D ends. Waits with cli, check, sti, hlt. */
#include "guest.h"
    .code32
    .globl start
start:
    LONG_MODE main
main:
    SET_GATE 0x24, uart
    lidt [idt_pointer]
    PIC_SETUP 0xef
    mov edx, COM1 + 3
    mov al, 3
    out dx, al
    mov edx, COM1 + 2
    mov al, 7
    out dx, al
    mov edx, COM1 + 4
    mov al, 11
    out dx, al
    mov edx, COM1 + 1
    mov al, 1
    out dx, al
    mov esi, offset text
    call puts
1:  cli
    cmp dword ptr [finished], 0
    jne 2f
    sti
    hlt
    jmp 1b
2:  RESET
uart:
    push rax
    push rdx
3:  mov edx, COM1 + 5
    in al, dx
    test al, 1
    jz 5f
    mov edx, COM1
    in al, dx
    cmp al, 4
    je 4f
    out dx, al
    jmp 3b
4:  mov dword ptr [finished], 1
5:  mov edx, COM1 + 2
    in al, dx
    test al, 1
    jz 3b
    mov al, 0x20
    out 0x20, al
    pop rdx
    pop rax
    iretq
DEFINE_PUTS
DEFINE_IDT
PVH_ENTRY start
    .section .rodata
text: .asciz "echo: type, Ctrl-D ends\n"
    .data
finished: .long 0
