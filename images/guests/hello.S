/* Protected mode: one line, then reset. The guest of the start-up benchmark. */
#include "guest.h"
    .code32
    .globl start
start:
    mov esp, 0x7000
    mov esi, offset text
    call puts
    RESET
DEFINE_PUTS
PVH_ENTRY start
    .section .rodata
text: .asciz "Hello from guest mode!\n"
