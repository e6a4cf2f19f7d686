/* Interrupts in long mode: PIT and PIC, HLT, the shadow of STI and MOV SS, LAPIC IPIs to self, CR8, NMI, LAPIC timer. */
.include "long.inc"
.set LAPIC, 0xFEE00000
.macro LW register, value
    mov dword ptr [rbp + \register], \value
.endm
test_long:
    GATE 0x20, on_timer
    GATE 0x50, on_ipi
    GATE 0x61, on_ipi61
    GATE 0x02, on_nmi
    /* the LAPIC's page */
    mov edi, 0x14000
    xor eax, eax
    mov ecx, 1024
    rep stosd
    mov qword ptr [PDPT + 24], 0x14007
    mov eax, 0xFEE0009F
    mov [0x14000 + 0x1F7 * 8], rax
    mov ebp, LAPIC
    LW 0xF0, 0x1FF
    LW 0x350, 0x700         /* LINT0: ExtINT */
    SAY "PIT and HLT\n"
    mov al, 0x11
    out 0x20, al
    out 0xA0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xA1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xA1, al
    mov al, 1
    out 0x21, al
    out 0xA1, al
    mov al, 0xFE
    out 0x21, al
    mov al, 0xFF
    out 0xA1, al
    call arm_pit
    sti
    hlt
    cli
    SAY "after HLT\n"
    SAY "STI\n"
    call pit_pending
    sti
    nop
sti1:
    nop
    cli
    SAY "STI CLI\n"
    call pit_pending
    sti
    cli
    nop
    nop
    SAY "none\n"
    sti
    nop
sti2:
    nop
    cli
    SAY "POPF\n"
    call pit_pending
    push 0x202
    popfq
popf1:
    nop
    cli
    SAY "MOV SS\n"
    call pit_pending
    mov ecx, DATA
    pushfq
    or dword ptr [rsp], 0x200
    sti
    mov ss, ecx
    nop
movss1:
    nop
    cli
    popfq
    cli
    mov al, 0xFF
    out 0x21, al
    SAY "IPI\n"
    LW 0xF0, 0x1FF
    sti
    LW 0x300, 0x44050       /* self, vector 0x50; taken within a few instructions, not at once */
    jmp 1f
1:  nop
    cli
    SAY "masked by IF\n"
    LW 0x300, 0x44050
    LW 0x300, 0x44061
    LW 0x300, 0x44050
    SAY "both pending\n"
    sti
    nop
    nop
    cli
    SAY "CR8\n"
    mov eax, 6
    mov cr8, rax
    sti
    LW 0x300, 0x44061
    LW 0x300, 0x44050
    jmp 1f
1:  SAY "5 is held\n"
    mov eax, 4
    mov cr8, rax
    jmp 1f
1:  xor eax, eax
    mov cr8, rax
    jmp 1f
1:
    cli
    SAY "NMI\n"
    LW 0x300, 0x44400
    jmp 1f
1:  nop
    SAY "LAPIC timer\n"
    LW 0x3E0, 0xB
    LW 0x320, 0x50
    LW 0x380, 100000
    sti
    hlt
    cli
    SAY "periodic\n"
    LW 0x320, 0x20050
    LW 0x380, 30000000
    sti
    hlt
    hlt
    hlt
    cli
    LW 0x380, 0
    SAY "end\n"
    EXIT 0

arm_pit:                    /* one shot, about 1 ms */
    mov al, 0x30
    out 0x43, al
    mov al, 0xA9
    out 0x40, al
    mov al, 0x04
    out 0x40, al
    ret
pit_pending:
    call arm_pit
    mov al, 0x0A
    out 0x20, al
1:  in al, 0x20
    test al, 1
    jz 1b
    ret
on_timer:
    push rax
    SAY "timer "
    mov al, 0x20
    out 0x20, al
    mov rax, [rsp + 8]
    lea rdx, [rip + sti1]
    cmp rax, rdx
    jne 1f
    SAY "at sti1"
1:  lea rdx, [rip + sti2]
    cmp rax, rdx
    jne 1f
    SAY "at sti2"
1:  lea rdx, [rip + popf1]
    cmp rax, rdx
    jne 1f
    SAY "at popf1"
1:  lea rdx, [rip + movss1]
    cmp rax, rdx
    jne 1f
    SAY "at movss1"
1:  PUTC64 10
    pop rax
    iretq
on_ipi:
    SAY "ipi 50\n"
    LW 0xB0, 0
    iretq
on_ipi61:
    SAY "ipi 61\n"
    LW 0xB0, 0
    iretq
on_nmi:
    inc r15d
    SAY "nmi in\n"
    cmp r15d, 1
    jne 1f
    LW 0x300, 0x44400       /* blocked until IRET */
    jmp 2f
2:  nop
1:  SAY "nmi out\n"
    iretq
