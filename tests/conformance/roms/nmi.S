/* When NMIs are taken: SDM vol. 3, 6.7.1 ("until the next IRET instruction") and 6.8.3. */
.include "apic.inc"
.set SELF_NMI, 0x44400
.set IOAPIC, 0xFEC00000
test_apic:
    GATE 2, on_nmi
    GATE 6, on_ud
    mov byte ptr [IDT + 2 * 16 + 4], 0      /* on the stack that is in use */
    mov eax, 0xFEC0009F                     /* and the IOAPIC's page */
    mov [0x14000 + 0x1F6 * 8], rax
    SAY "with interrupts off\n"
    cli
    LW 0x300, SELF_NMI
    jmp 1f
1:  nop
    SAY "two, the second while the first is handled: after its IRET\n"
    mov r15d, 1
    LW 0x300, SELF_NMI
    jmp 1f
1:  nop
    SAY "three in one: the second and the third are one\n"
    mov r15d, 2
    LW 0x300, SELF_NMI
    jmp 1f
1:  nop
    SAY "an exception's IRET lets the next one in, within the handler\n"
    mov r15d, 3
    LW 0x300, SELF_NMI
    jmp 1f
1:  nop
    SAY "HLT with interrupts off\n"
    xor r15d, r15d
    mov ebx, IOAPIC
    mov dword ptr [rbx], 0x15               /* pin 2, where the PIT is */
    mov dword ptr [rbx + 0x10], 0
    mov dword ptr [rbx], 0x14
    mov dword ptr [rbx + 0x10], 0x400       /* NMI, edge */
    mov al, 0x30
    out 0x43, al
    mov al, 0xA9
    out 0x40, al
    mov al, 0x04
    out 0x40, al
    hlt
    SAY "after HLT\n"
    SAY "end\n"
    EXIT 0
on_nmi:
    SAY "nmi in\n"
    mov eax, r15d
    xor r15d, r15d
    cmp eax, 1
    je 1f
    cmp eax, 2
    je 2f
    cmp eax, 3
    je 3f
    jmp 4f
2:  LW 0x300, SELF_NMI
1:  LW 0x300, SELF_NMI
    jmp 4f
3:  LW 0x300, SELF_NMI
    jmp 5f
5:  ud2
    nop
4:  jmp 6f
6:  SAY "nmi out\n"
    iretq
on_ud:
    SAY "ud\n"
    add qword ptr [rsp], 2
    iretq
