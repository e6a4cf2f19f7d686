/* Dirties memory: one write to each 4 KiB page from 2 MiB on, as many pages as the command line says (default 256), and
 * prints how many hold what was written. */
#include "guest.h"
    .code32
    .globl start
start:
    CMDLINE_NUMBER 256
    mov [pages], eax
    LONG_MODE main
main:
    mov ecx, [pages]
    mov ebx, 0x200000
1:  mov [rbx], rbx
    add rbx, 0x1000
    dec ecx
    jnz 1b
    mov ecx, [pages]
    mov ebx, 0x200000
    xor eax, eax
2:  cmp [rbx], rbx
    jne 3f
    inc eax
3:  add rbx, 0x1000
    dec ecx
    jnz 2b
    call putnum
    mov esi, offset text
    call puts
    RESET
DEFINE_PUTS
DEFINE_PUTNUM
PVH_ENTRY start
    .section .rodata
text: .asciz " pages dirtied\n"
    .data
pages: .long 0
