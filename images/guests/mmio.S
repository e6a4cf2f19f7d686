/* Reads and writes of 1, 2, 4 and 8 bytes at 0x3E000000 (mapped, no memory there with up to 512 MiB); prints what it read. */
#include "guest.h"
#define TARGET 0x3e000000
    .code32
    .globl start
start:
    LONG_MODE main
main:
    mov ebx, TARGET
    mov byte ptr [rbx], 0x11
    mov word ptr [rbx + 2], 0x2222
    mov dword ptr [rbx + 4], 0x44444444
    movabs rax, 0x8888888877777777
    mov [rbx + 8], rax
    movzx eax, byte ptr [rbx]
    call puthex
    call space
    movzx eax, word ptr [rbx + 2]
    call puthex
    call space
    mov eax, [rbx + 4]
    call puthex
    call space
    mov rax, [rbx + 8]
    mov rbp, rax
    shr rax, 32
    call puthex
    mov eax, ebp
    call puthex
    mov al, 10
    mov edx, COM1
    out dx, al
    RESET
space:
    mov al, ' '
    mov edx, COM1
    out dx, al
    ret
DEFINE_PUTHEX
PVH_ENTRY start
