/* Single step, hardware breakpoints, ICEBP, RF, MOV SS shadow, in long mode. */
.include "long.inc"
/* Here #DB (and #BP) return to the instruction after printing DR6. */
test_long:
    GATE 1, on_db
    SAY "single step\n"
    push 0x102
    popfq
step0:
    nop
    xor eax, eax
    mov ecx, 3
    rep stosb
    pushfq
    pop rax
    and eax, ~0x100
    push rax
    popfq
    nop
    SAY "step over syscall-like: int\n"
    GATE 0x40, on_int40
    push 0x102
    popfq
    int 0x40
    nop
    push 2
    popfq
    SAY "mov ss\n"
    mov ecx, DATA
    push 0x102
    popfq
    mov ss, ecx
    nop
    nop
    push 2
    popfq
    SAY "execute\n"
    lea rax, [rip + bp0]
    mov dr0, rax
    mov eax, 0x402
    mov dr7, rax
    nop
bp0:
    nop
    nop
    xor eax, eax
    mov dr7, rax
    SAY "write and access\n"
    mov eax, 0x20100
    mov dr1, rax
    mov eax, 0x20200
    mov dr2, rax
    mov eax, 0x0FD00428     /* DR1: write, 4 bytes; DR2: read or write, 4 bytes */
    mov eax, (1 << 3) | (2 << 4) | 0x400 | (0xD << 20) | (0xF << 24)
    mov dr7, rax
    mov ebx, 0x20100
w1: mov al, [rbx]
w2: mov [rbx], al
w3: mov [rbx + 3], al
w4: mov [rbx + 4], al
w5: mov [rbx - 4], rax
w6: mov al, [rbx + 0x100]
w7: mov [rbx + 0x103], al
w8: push qword ptr [rbx + 0xFC]
    pop rax
    xor eax, eax
    mov dr7, rax
    SAY "general detect\n"
    mov eax, 0x2400
    mov dr7, rax
    nop
gd: mov rax, dr7
    mov rax, dr7
    call hex32_64
    PUTC64 10
    SAY "dr4 with and without DE\n"
    TRY "mov rax, dr4"
    mov rax, cr4
    or eax, 8
    mov cr4, rax
    TRY "mov rax, dr4"
    SAY "ports\n"
    mov eax, 0x80
    mov dr3, rax
    mov eax, 0x400 | (2 << 6) | (2 << 28)   /* DR3: I/O, 1 byte */
    mov dr7, rax
    out 0x80, al
    out 0x81, al
    out 0x7F, ax
    in al, 0x80
    mov edx, 0x80
    mov ecx, 2
    mov esi, 0x20100
    rep outsb
    xor eax, eax
    mov dr7, rax
    out 0x80, al
    SAY "data of MOV SS\n"
    mov dword ptr [0x20100], DATA
    mov eax, (2 << 2) | 0x400 | (0xF << 20) /* DR1: read or write, 4 bytes */
    mov dr7, rax
    mov ss, [0x20100]
    nop
    nop
    xor eax, eax
    mov dr7, rax
    SAY "end\n"
    EXIT 0
on_int40:
    push rax
    mov rax, [rsp + 24]
    call hex32_64
    PUTC64 10
    pop rax
    iretq
on_db:                      /* rip, cs, rflags, rsp, ss */
    push rax
    PUTC64 '#'
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
    mov rax, dr7
    test eax, 3
    jz 1f
    or dword ptr [rsp + 24], 0x10000 /* RF */
1:  pop rax
    iretq
