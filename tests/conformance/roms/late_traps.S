/* Traps that end HLT ("a debug exception [...] will resume execution", SDM vol. 2, HLT), with interrupts off, and those that
 * MOV SS puts off until the next instruction, which is itself a trap: one #DB with ICEBP's, before INT's handler. */
.include "long.inc"
test_long:
    GATE 1, on_db
    GATE 3, on_bp
    SAY "HLT\n"
    push 0x102
    popfq
    hlt
    nop
    push 2
    popfq
    SAY "MOV SS with a watchpoint, and ICEBP\n"
    mov dword ptr [0x20100], DATA
    mov eax, 0x20100
    mov dr1, rax
    mov eax, (2 << 2) | 0x400 | (0xF << 20) /* DR1: read or write, 4 bytes */
    mov dr7, rax
    mov ss, [0x20100]
    .byte 0xF1
    nop
    SAY "and INT 1\n"
    mov ss, [0x20100]
    int 1
    nop
    SAY "and INT3\n"
    mov ss, [0x20100]
    int3
    nop
    xor eax, eax
    mov dr7, rax

    SAY "end\n"
    EXIT 0

on_bp:
    push rax
    PUTC64 'b'
    jmp 2f
on_db:                      /* rip, cs, rflags, rsp, ss */
    push rax
    PUTC64 '#'
2:  mov rax, [rsp + 16]
    call hex16_64
    PUTC64 ':'
    mov rax, [rsp + 8]
    call hex32_64
    PUTC64 ' '
    mov rax, dr6
    call hex32_64
    PUTC64 ' '
    mov rax, [rsp + 24]
    and eax, ~0x108D5
    call hex32_64
    PUTC64 10
    mov eax, 0xFFFF0FF0
    mov dr6, rax
    pop rax
    iretq
