/* An exception without a usable IDT: triple fault. */
.include "long.inc"
test_long:
    SAY "triple\n"
    mov word ptr [0x20000], 0
    mov qword ptr [0x20002], 0
    lidt [0x20000]
    ud2
    SAY "not reached\n"
    EXIT 0
