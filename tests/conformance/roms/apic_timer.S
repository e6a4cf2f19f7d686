/* The local APIC's timer: one-shot, periodic, masked, changes of mode. SDM vol. 3, 11.5.4. */
.include "apic.inc"
.macro CURRENT              /* ZF: the current count is 0 */
    cmp dword ptr [rbp + 0x390], 0
.endm
.macro SPIN count           /* let some time pass */
    mov ecx, \count
9909: dec ecx
    jnz 9909b
.endm
.macro FRESH                /* nothing counts, nothing was counted */
    cli
    LW 0x380, 0
    sti                     /* an interrupt that is pending is taken here */
    nop
    nop
    cli
    mov dword ptr [COUNT], 0
.endm
test_apic:
    LW 0x3E0, 0xB           /* divide by 1 */
    SAY "one-shot: it counts; it ends at 0; one interrupt\n"
    FRESH
    LW 0x320, 0x50
    LW 0x380, 2000000000    /* 2 s: no host is that busy */
    CURRENT
    YES nz
    LW 0x380, 100000
    WAIT 1
    CURRENT
    YES z
    SPIN 300000
    cmp dword ptr [COUNT], 1
    YES e
    SAY "its initial count stays\n"
    cmp dword ptr [rbp + 0x380], 100000
    YES e
    SAY "a change to periodic does not start it again\n"
    LW 0x320, 0x20050
    CURRENT
    YES z
    SAY "periodic: one after the other\n"
    FRESH
    LW 0x380, 100000
    WAIT 3
    SAY "and still\n"
    mov dword ptr [COUNT], 0
    WAIT 1
    SAY "a change to one-shot: it ends\n"
    FRESH
    LW 0x380, 2000000000    /* so that it is far from its end at the change */
    LW 0x320, 0x50
    CURRENT
    YES nz
    LW 0x380, 100000
    WAIT 1
    SPIN 300000
    cmp dword ptr [COUNT], 1
    YES e
    SAY "masked: it counts, and asks for nothing, not even later\n"
    FRESH
    LW 0x320, 0x10050
    LW 0x380, 1000
1:  CURRENT
    jnz 1b
    LW 0x320, 0x50
    cmp dword ptr [rbp + 0x200 + (0x50 / 32) * 16], 0
    YES e
    SAY "0 stops it\n"
    LW 0x380, 2000000000
    LW 0x380, 0
    CURRENT
    YES z
    SAY "pending while the task priority is higher\n"
    FRESH
    mov eax, 5
    mov cr8, rax
    LW 0x380, 1000
1:  CURRENT
    jnz 1b
    sti
    nop
    cmp dword ptr [COUNT], 0
    YES e
    xor eax, eax
    mov cr8, rax
    jmp 1f
1:  cli
    cmp dword ptr [COUNT], 1
    YES e
    SAY "switched off by software: masked, and stays so until written\n"
    LW 0xF0, 0xFF
    mov eax, [rbp + 0x320]
    call hex32_64
    PUTC64 ' '
    LW 0x320, 0x50
    mov eax, [rbp + 0x320]
    call hex32_64
    PUTC64 ' '
    LW 0xF0, 0x1FF
    mov eax, [rbp + 0x320]
    call hex32_64
    PUTC64 10
    SAY "end\n"
    EXIT 0
