/* 16-bit protected mode: a 16-bit stack that wraps, 16- and 32-bit operands and addresses, near and far calls, gates of both
 * sizes, ENTER, LOOP, strings at the end of a segment, 24-bit table bases. Results are collected by FS:EDI and printed.
 */
.include "prot.inc"
.set CODE16X, 0x58  /* base 0xF0000 */
.set DATA16X, 0x60  /* base 0x20000, 64 KiB */
.set STACK16, 0x68  /* base 0x30000, 64 KiB, 16 bits */
.set GATE16C, 0x70  /* 16-bit call gate, one parameter */
.set RESULTS, 0x60000
.macro REC register
    mov fs:[edi], \register
    add edi, 4
.endm
.macro RECW place           /* a word */
    movzx eax, word ptr \place
    REC eax
.endm
test_prot:
    DESCRIPTOR CODE16X, 0x0000FFFF, 0x00009B0F
    DESCRIPTOR DATA16X, 0x0000FFFF, 0x00009302
    DESCRIPTOR STACK16, 0x0000FFFF, 0x00009303
    mov dword ptr [GDT + GATE16C], (offset (far_target - 0xF0000)) + (CODE16X << 16)
    mov dword ptr [GDT + GATE16C + 4], 0x00008401
    mov dword ptr [IDT + 0x50 * 8], (offset (int16_target - 0xF0000)) + (CODE16X << 16)
    mov dword ptr [IDT + 0x50 * 8 + 4], 0x00008600      /* 16-bit interrupt gate */
    mov dword ptr [IDT + 0x51 * 8], (offset (int16_target - 0xF0000)) + (CODE16X << 16)
    mov dword ptr [IDT + 0x51 * 8 + 4], 0x00008700      /* 16-bit trap gate */
    mov eax, offset int32_target
    mov [IDT + 0x52 * 8], ax
    mov word ptr [IDT + 0x52 * 8 + 2], CODE32
    mov word ptr [IDT + 0x52 * 8 + 4], 0x8E00
    shr eax, 16
    mov [IDT + 0x52 * 8 + 6], ax
    mov edi, RESULTS
    mov ebp, esp
    ljmp CODE16X, offset (in16 - 0xF0000)
back:
    mov ax, DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, STACK
    mov esi, RESULTS
1:  mov eax, [esi]
    call hex32
    PUTC 10
    add esi, 4
    cmp esi, edi
    jb 1b
    SAY32 "limits\n"
    mov eax, DATA16X
    mov gs, eax
    TRY "mov eax, gs:[0xFFFD]"
    TRY "mov eax, gs:[0xFFFC]"
    mov eax, STACK16
    mov es, eax
    SAY32 "end\n"
    EXIT 0

.code16
in16:
    mov ax, DATA
    mov fs, ax
    mov ax, DATA16X
    mov ds, ax
    mov es, ax
    mov esp, 0xABCD0000
    mov ax, STACK16
    mov ss, ax
    /* the stack wraps below 0, and the upper half of ESP stays */
    push 0x1234
    REC esp
    RECW ss:[0xFFFE]
    pushd 0x55667788
    REC esp
    popd eax
    REC eax
    pop ax
    REC esp
    pushad
    REC esp
    popad                   /* EDI as well */
    add edi, 4
    pusha
    REC esp
    popa
    add edi, 4
    push ds
    pushd fs
    REC esp
    popd eax
    pop ax
    /* calls */
    call 1f
1:  REC esp
    pop ax
    sub ax, offset (1b - 0xF0000)
    movzx eax, ax
    REC eax
    lcall CODE16X, offset (far_target - 0xF0000)
    push 0x0777
    lcall GATE16C, 0
    pop ax
    data32 call 2f
    jmp 3f
2:  REC esp
    data32 ret
3:  /* frames */
    mov bp, 0xAAAA
    enter 8, 0
    REC esp
    movzx eax, bp
    REC eax
    enter 4, 2
    REC esp
    leave
    leave
    REC esp
    movzx eax, bp
    REC eax
    mov ebp, 0x5678AAA0     /* the upper half of the frame pointer becomes the stack pointer's: APM vol. 3, ENTER */
    mov dword ptr ss:[0xAA9C], 0x1111AAAA
    mov dword ptr ss:[0xAA98], 0x2222BBBB
    data32 enter 8, 3
    REC esp
    REC ebp
    mov eax, [bp]
    REC eax
    mov eax, [bp - 4]
    REC eax
    mov eax, [bp - 8]
    REC eax
    mov eax, [bp - 12]
    REC eax
    data32 leave
    REC esp
    REC ebp
    /* gates */
    int 0x50
    int 0x51
    int 0x52
    sti
    int 0x51
    cli
    /* addresses wrap at 64 KiB; operands and addresses of 32 bits with prefixes */
    mov dword ptr [1], 0x11223344
    mov bx, 0xFFFF
    mov si, 2
    mov eax, [bx + si]
    REC eax
    mov ebx, 1
    xor esi, esi
    mov eax, [ebx + esi * 8]
    REC eax
    mov ecx, 0x10001
4:  loop 4b
    REC ecx
    mov ecx, 0x10000
    jcxz 5f
    xor ecx, ecx
5:  REC ecx
    mov ecx, 2
    addr32 loop 6f
    xor ecx, ecx
6:  REC ecx
    /* strings: SI and DI wrap, the upper halves stay */
    mov byte ptr [0xFFFF], 0x5A
    mov byte ptr [0], 0x6B
    mov esi, 0xCAFEFFFF
    lodsb
    movzx eax, al
    REC eax
    REC esi
    lodsb
    movzx eax, al
    REC eax
    push edi
    mov esi, 0xFFFE
    mov di, 0x100
    mov ecx, 0xBEEF0002
    rep movsw
    mov eax, edi
    pop edi
    movzx eax, ax
    REC eax
    REC esi
    REC ecx
    mov eax, [0x100]
    REC eax
    /* table bases are 24 bits wide with 16-bit operands */
    mov word ptr [0x200], GDT_LIMIT
    mov dword ptr [0x202], 0xFF000000 + GDT
    lgdt [0x200]
    mov dword ptr [0x302], 0xFFFFFFFF
    sgdt [0x300]
    mov eax, [0x302]
    REC eax
    RECW [0x300]
    /* flags and status of 16 bits */
    push 0x0ED5
    popf
    pushf
    pop ax
    movzx eax, ax
    REC eax
    push 2
    popf
    mov eax, 0xFFFF0000
    smsw ax
    REC eax
    mov eax, 0xFFFFFFFF
    mov ax, ss
    REC eax
    mov eax, 0xFFFFFFFF
    mov eax, ss
    REC eax
    data32 ljmp CODE32, offset back

far_target:                 /* 16-bit far frame: IP, CS [, the parameter of the gate] */
    mov bp, sp
    REC esp
    RECW [bp + 2]
    RECW [bp + 4]
    retf
int16_target:               /* IP, CS, FLAGS */
    mov bp, sp
    REC esp
    RECW [bp + 2]
    mov ax, [bp + 4]
    and ax, 0xF72A
    movzx eax, ax
    REC eax
    pushf
    pop ax
    and ax, 0x0300
    movzx eax, ax
    REC eax
    iret
.code32
int32_target:               /* from 16-bit code on a 16-bit stack: EIP, CS, EFLAGS; addresses of the stack are 32 bits wide */
    movzx ebp, sp
    REC esp
    mov eax, ss:[ebp + 4]
    REC eax
    iretd
