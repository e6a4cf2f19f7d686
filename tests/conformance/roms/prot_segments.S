/* Segmentation in 32-bit protected mode: limits, types, far transfers, gates, inner stacks, IRET, VM86, I/O bitmap. */
.include "prot.inc"
.set SMALL, 0x58    /* data, base 0x20000, limit 0xFFF */
.set DOWN, 0x60     /* expand-down, limit 0xFFF, B */
.set DOWN16, 0x68   /* expand-down, limit 0xFFF, 16 bits */
.set RODATA, 0x70
.set EXECONLY, 0x78
.set CONFORM, 0x80
.set NOTHERE, 0x88
.set GATE0, 0x90    /* call gate to CODE32, DPL 3, 2 parameters */
.set GATE16, 0x98   /* 16-bit call gate */
.set GATECONF, 0xA0
.set INNERDATA, 0xA8
.set SMALLSTACK, 0xB0 /* DPL 1 stack, limit 0x1F, base 0x30000 */
.set LDTD, 0xB8
.set CODESMALL, 0xC0
.set CODE1, 0xC8
.set DATA1, 0xD0
.set RODATA1, 0xD8
.set NOTHERE1, 0xE0
.set GATE1, 0xE8
test_prot:
    DESCRIPTOR SMALL, 0x00000FFF, 0x00409302
    DESCRIPTOR DOWN, 0x00000FFF, 0x00409702
    DESCRIPTOR DOWN16, 0x00000FFF, 0x00009702
    DESCRIPTOR RODATA, 0x0000FFFF, 0x00CF9100
    DESCRIPTOR EXECONLY, 0x0000FFFF, 0x00CF9900
    DESCRIPTOR CONFORM, 0x0000FFFF, 0x00CF9F00
    DESCRIPTOR NOTHERE, 0x0000FFFF, 0x00CF1300
    DESCRIPTOR SMALLSTACK, 0x0000001F, 0x0040B303
    DESCRIPTOR CODE1, 0x0000FFFF, 0x00CFBB00
    DESCRIPTOR DATA1, 0x0000FFFF, 0x00CFB300
    DESCRIPTOR RODATA1, 0x0000FFFF, 0x00CFB100
    DESCRIPTOR NOTHERE1, 0x0000FFFF, 0x00CF3300
    mov eax, offset gate_ring1
    mov edx, eax
    and eax, 0xFFFF
    or eax, (CODE1 | 1) << 16
    and edx, 0xFFFF0000
    or edx, 0xEC00
    mov [GDT + GATE1], eax
    mov [GDT + GATE1 + 4], edx
    DESCRIPTOR LDTD, 0x2800001F, 0x00008200
    DESCRIPTOR CODESMALL, 0x000000FF, 0x00409B0F
    mov eax, offset gate_target
    mov edx, eax
    and eax, 0xFFFF
    or eax, CODE32 << 16
    and edx, 0xFFFF0000
    or edx, 0xEC02
    mov [GDT + GATE0], eax
    mov [GDT + GATE0 + 4], edx
    DESCRIPTOR GATE16, CODE16 << 16 | 0x8000, 0x0000E402
    mov eax, offset gate_conf
    and eax, 0xFFFF
    or eax, CONFORM << 16
    mov [GDT + GATECONF], eax
    mov [GDT + GATECONF + 4], edx
    mov byte ptr [GDT + GATECONF + 4], 0

    SAY32 "limits\n"
    mov eax, SMALL
    mov es, eax
    TRY "mov al, es:[0xFFF]"
    TRY "mov ax, es:[0xFFF]"
    TRY "mov eax, es:[0xFFD]"
    TRY "mov eax, es:[0xFFC]"
    mov eax, DOWN
    mov es, eax
    TRY "mov al, es:[0xFFF]"
    mov eax, DOWN
    mov es, eax
    TRY "mov al, es:[0x1000]"
    mov eax, DOWN16
    mov es, eax
    TRY "mov al, es:[0xFFFF]"
    mov eax, DOWN16
    mov es, eax
    TRY "mov ax, es:[0xFFFF]"
    mov eax, DOWN16
    mov es, eax
    TRY "mov al, es:[0x10000]"
    SAY32 "types\n"
    mov eax, RODATA
    mov es, eax
    TRY "mov al, es:[0]"
    mov eax, RODATA
    mov es, eax
    TRY "mov es:[0], al"
    TRY "mov al, cs:[0xF0000]"
    TRY "mov cs:[0x20000], al"
    TRY "mov eax, EXECONLY; mov es, eax"
    TRY "xor eax, eax; mov es, eax; mov al, es:[0]"
    TRY "xor eax, eax; mov ss, eax"
    TRY "mov eax, NOTHERE; mov ds, eax"
    TRY "mov eax, NOTHERE; mov ss, eax"
    TRY "mov eax, RODATA; mov ss, eax"
    TRY "mov eax, UDATA; mov ss, eax"
    TRY "mov eax, 0x400; mov ds, eax"
    TRY "mov eax, 0x14; mov ds, eax"
    TRY "push DATA; pop es"
    TRY "les eax, [small_pointer]; mov eax, es; call hex32"
    SAY32 "ldt and tr\n"
    mov dword ptr [0x2800], 0x0000FFFF
    mov dword ptr [0x2804], 0x00CF9300
    TRY "mov eax, 4; mov ds, eax"
    TRY "mov eax, DATA; lldt ax"
    TRY "mov eax, LDTD; lldt ax"
    TRY "mov eax, 4; mov es, eax"
    TRY "mov eax, 0x24; mov es, eax"
    TRY "mov eax, LDTD | 4; lldt ax"
    TRY "mov eax, TR; ltr ax"
    TRY "xor eax, eax; lldt ax"
    SAY32 "far jumps\n"
    TRY "ljmp 0, 0"
    TRY "ljmp 0x10, 0"
    TRY "ljmp 0x88, 0"
    TRY "ljmp 0x400, 0"
    TRY "ljmp 0x30, 0"
    TRY "ljmp 0x33, 0"
    TRY "ljmp 0xC0, 0x100"
    TRY "ljmp 0x48, 0"
    TRY "ljmp CONFORM, offset 1f; 1: mov eax, cs; call hex32; ljmp CODE32, offset 2f; 2:"
    SAY32 "call gates\n"
    TRY "push 0x11; push 0x22; lcall GATE0, 0; pop eax; pop eax"
    TRY "lcall GATECONF, 0"
    TRY "lcall GATE0 | 3, 0"
    USER user_gate
    USER user_gateconf
    mov word ptr [TSS + 16], SMALLSTACK | 1
    mov dword ptr [TSS + 12], 0x10
    USER user_gate1         /* stack too small: #SS */
    mov dword ptr [TSS + 12], IST1
    mov word ptr [TSS + 16], 0
    USER user_gate1         /* null SS: #TS */
    mov word ptr [TSS + 16], UDATA
    USER user_gate1
    mov word ptr [TSS + 16], RODATA1 | 1
    USER user_gate1
    mov word ptr [TSS + 16], NOTHERE1 | 1
    USER user_gate1
    mov word ptr [TSS + 16], 0x401
    USER user_gate1
    mov word ptr [TSS + 16], DATA1 | 1
    USER user_gate1
    SAY32 "returns\n"
    TRY "push 0; push 0; retf"
    TRY "push DATA; push 0; retf"
    TRY "push UCODE32; push 0; retf"
    TRY "push UDATA; push USTACK; push UCODE32; push offset user_int80; retf"
    TRY "push UDATA; push USTACK; push 2; push UCODE32 & ~3; push offset user_int80; iretd"
    TRY "push 0; push USTACK; push 2; push UCODE32; push offset user_int80; iretd"
    TRY "push DATA; push USTACK; push 2; push UCODE32; push offset user_int80; iretd"
    SAY32 "data segments of inner levels are nulled\n"
    USER user_ds, DATA
    USER user_ds, CONFORM
    SAY32 "user\n"
    USER user_cli
    USER user_int21
    USER user_int80
    USER user_in
    mov byte ptr [TSS + 0x68 + 0xE9 / 8], 0
    USER user_in
    mov byte ptr [TSS + 0x68 + 0xE9 / 8 + 1], 0xFF
    USER user_in_word
    mov dword ptr [TSS + 0x68 + 0x60 / 8], 0
    USER user_in60
    mov byte ptr [TSS + 0x68 + 0x60 / 8], 1
    USER user_in60
    USER user_ltr
    USER user_popf
    SAY32 "vm86\n"
    mov dword ptr [0x20000], 0x80CD9090
    mov dword ptr [RESUME_SP], esp
    mov dword ptr [RESUME], offset 1f
    push 0x4444             /* gs fs ds es ss esp eflags cs eip */
    push 0x3333
    push 0x2222
    push 0x1111
    push 0x1000
    push 0xFFF0
    push 0x23002
    push 0x2000
    push 0
    iretd
1:  mov dword ptr [RESUME_SP], esp
    mov dword ptr [RESUME], offset 1f
    push 0
    push 0
    push 0
    push 0
    push 0x1000
    push 0xFFF0
    push 0x20002            /* IOPL 0: INT n is #GP */
    push 0x2000
    push 0
    iretd
1:  mov dword ptr [0x20000], 0x90FA9090
    mov dword ptr [RESUME_SP], esp
    mov dword ptr [RESUME], offset 1f
    push 0
    push 0
    push 0
    push 0
    push 0x1000
    push 0xFFF0
    push 0x20002            /* CLI with IOPL 0 */
    push 0x2000
    push 0
    iretd
1:  SAY32 "nested task\n"
    TRY "push 0x4002; popfd; push 2; push CODE32; push offset 1f; iretd; 1:"
    /* Only the address that the bit offset leads to must be in the segment, all of it. Host processors agree. */
    SAY32 "bit strings\n"
    .macro TRY_BITS selector, code
    mov eax, \selector
    mov es, eax
    mov ebx, 0x1000
    TRY "\code"
    .endm
    TRY_BITS SMALL, "mov eax, -32; bts es:[ebx], eax"
    TRY_BITS SMALL, "mov eax, -0x8000; bt es:[ebx], eax"
    TRY_BITS SMALL, "mov eax, 32; btr es:[-4], eax"
    TRY_BITS SMALL, "mov eax, 0x7FFF; bt es:[0], eax"
    TRY_BITS SMALL, "mov ax, -16; btc word ptr es:[ebx], ax"
    TRY_BITS SMALL, "mov eax, 0x8000; bt es:[0], eax"
    TRY_BITS SMALL, "xor eax, eax; btc es:[0xFFD], eax"
    TRY_BITS SMALL, "xor eax, eax; bt word ptr es:[0xFFF], ax"
    TRY_BITS DOWN, "mov eax, 0x8000; bt es:[0], eax"
    TRY_BITS DOWN, "mov eax, -32; bt es:[ebx], eax"
    TRY_BITS RODATA, "mov eax, -32; bt es:[ebx], eax"
    TRY_BITS RODATA, "mov eax, -32; bts es:[ebx], eax"
    SAY32 "end\n"
    EXIT 0

small_pointer: .long 0x1234
    .word SMALL
gate_target:
    mov eax, cs
    call hex32
    PUTC ' '
    mov eax, [esp + 8]
    call hex32
    PUTC ' '
    mov eax, [esp + 12]
    call hex32
    PUTC ' '
    test dword ptr [esp + 4], 3
    jz 1f
    mov eax, [esp + 16]
    call hex32
    PUTC ' '
    mov eax, ss
    call hex32
    PUTC 10
    retf 8
1:  PUTC 10
    retf
gate_conf:
    mov eax, cs
    call hex32
    PUTC 10
    retf
user_gate:
    push 0x77
    push 0x88
    lcall GATE0 | 3, 0
    mov eax, esp
    int 0x80
user_gate1:
    lcall GATE1 | 3, 0
    mov eax, ss
    int 0x80
gate_ring1:
    mov eax, cs
    mov ecx, ss
    push ecx
    push eax
    pop eax
    pop eax
    retf
user_gateconf:
    push 0x99
    mov eax, GATECONF
    lcall GATECONF | 3, 0
    int 0x80
user_ds: mov eax, ds
    mov ecx, es
    push eax
    int 0x80
user_cli: cli
user_int21: int 0x21
user_int80: int 0x80
user_in: in al, 0xE9
    int 0x80
user_in_word: in ax, 0xE9
    int 0x80
user_in60: in al, 0x61
    in al, 0x60
    int 0x80
user_ltr: mov eax, TR
    ltr ax
user_popf: push 0x7202
    popfd
    int 0x80
