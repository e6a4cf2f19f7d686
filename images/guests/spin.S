/* Endless loop without exits. */
#include "guest.h"
    .code32
    .globl start
start:
1:  inc eax
    jmp 1b
PVH_ENTRY start
