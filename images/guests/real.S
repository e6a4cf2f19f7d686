/* Real mode, as a boot sector at 0000:7C00. */
    .intel_syntax noprefix
    .code16
    .globl start
start:
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    cld
    mov si, offset text
1:  lodsb
    test al, al
    jz 2f
    mov dx, 0x3f8
    out dx, al
    jmp 1b
2:  mov al, 0xfe
    out 0x64, al
3:  hlt
    jmp 3b
text: .asciz "Hello from real mode!\n"
    .org 510
    .word 0xaa55
