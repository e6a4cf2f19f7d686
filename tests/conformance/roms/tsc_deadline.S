/* The local APIC's timer with TSC deadlines: SDM vol. 3, 11.5.4.1. */
.include "apic.inc"
.set DEADLINE, 0x6E0
.macro SHOWDEADLINE         /* ZF: no deadline */
    mov ecx, DEADLINE
    rdmsr
    or eax, edx
.endm
.macro ARM delta            /* so many cycles from now on */
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rcx, \delta
    add rax, rcx
    mov rdx, rax
    shr rdx, 32
    mov ecx, DEADLINE
    wrmsr
.endm
test_apic:
    mov dword ptr [COUNT], 0
    SAY "in another mode: ignored, and reads 0\n"
    LW 0x320, 0x50
    ARM 1000
    SHOWDEADLINE
    YES z
    LW 0x320, 0x40050
    mfence
    SAY "armed: reads back; then one interrupt, and 0\n"
    ARM 200000000
    SHOWDEADLINE
    YES nz
    ARM 1000000
    WAIT 1
    SHOWDEADLINE
    YES z
    SAY "in the past: at once\n"
    MSRW DEADLINE, 1
    WAIT 2
    SAY "the initial count is ignored, and the current one 0\n"
    LW 0x380, 1000
    cmp dword ptr [rbp + 0x380], 0
    YES e
    cmp dword ptr [rbp + 0x390], 0
    YES e
    SAY "0 disarms\n"
    cli
    ARM 200000000000
    MSRW DEADLINE, 0
    SHOWDEADLINE
    YES z
    SAY "a change of mode disarms, both ways\n"
    ARM 200000000000
    LW 0x320, 0x50
    LW 0x320, 0x40050
    SHOWDEADLINE
    YES z
    LW 0x320, 0x50
    LW 0x380, 400000000
    LW 0x320, 0x40050
    LW 0x320, 0x50
    cmp dword ptr [rbp + 0x390], 0
    YES e
    SAY "end\n"
    EXIT 0
