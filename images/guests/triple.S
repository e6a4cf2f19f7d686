/* Triple fault: an exception without a descriptor table. */
#include "guest.h"
    .code32
    .globl start
start:
    lidt [empty]
    ud2
PVH_ENTRY start
    .section .rodata
empty: .quad 0
