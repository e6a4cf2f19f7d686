/* Writes the number on the command line (default 21) to the exit port: status (v << 1) | 1. */
#include "guest.h"
    .code32
    .globl start
start:
    CMDLINE_NUMBER 21
    out EXIT_PORT, al
1:  hlt
    jmp 1b
PVH_ENTRY start
