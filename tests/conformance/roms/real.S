/* Real mode: IVT, faults at the 64 KiB limit, divide, BOUND, INTO, stack wrap, unreal mode. */
.include "rom.inc"
.code16
.macro SAY16 text
    push si
    mov si, offset (9900f - 0xF0000)
    call puts16
    pop si
    .pushsection .rodata
9900: .asciz "\text"
    .popsection
.endm
.macro TRY16 code
    mov word ptr [RESUME_SP], sp
    mov word ptr [RESUME], offset (9902f - 0xF0000)
    \code
    SAY16 "ok\n"
9902:
.endm
test_start:
    /* all vectors to printing stubs */
    xor di, di
    mov ax, offset (stubs16 - 0xF0000)
    mov cx, 256
1:  stosw
    mov word ptr [di], 0xF000
    add di, 2
    add ax, 8
    loop 1b
    SAY16 "faults\n"
    TRY16 "xor cx, cx; div cx"
    TRY16 "int3"
    TRY16 "int 0x21"
    TRY16 "ud2"
    TRY16 "mov ax, 0x7FFF; add ax, 1; into"
    TRY16 "mov word ptr [0x4100], 5; mov word ptr [0x4102], 9; mov ax, 4; bound ax, [0x4100]"
    TRY16 "mov bx, 0xFFFF; mov ax, [bx]"
    TRY16 "mov bx, 0xFFFF; mov al, [bx]"
    TRY16 "mov bx, 0xFFFD; mov eax, [bx]"
    TRY16 "mov ebx, 0x10000; mov al, [ebx]"
    TRY16 "mov bp, 0xFFFF; mov ax, [bp]"
    TRY16 "mov eax, 0x80; mov dr7, eax; mov eax, dr7"
    TRY16 "smsw ax; mov eax, cr0"
    TRY16 "sldt ax"
    SAY16 "stack wrap\n"
    mov bp, sp
    xor sp, sp
    push 0x1234
    mov ax, sp
    call hex16
    mov ax, [0xFFFE]
    call hex16
    mov sp, bp
    SAY16 "unreal\n"
    cli
    mov si, offset (gdt_pointer - 0xF0000)
    data32 lgdt cs:[si]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    mov bx, DATA
    mov fs, bx
    and al, 0xFE
    mov cr0, eax
    xor ax, ax
    mov fs, ax
    mov ebx, 0x200000
    mov eax, 0xC0DE5AFE
    TRY16 "mov fs:[ebx], eax; mov eax, fs:[ebx]; call hex32r"
    TRY16 "mov al, [ebx]"
    SAY16 "flags\n"
    push 0x7ED5
    popf
    pushf
    pop ax
    call hex16
    push 0
    popf
    pushf
    pop ax
    call hex16
    pushfd
    pop eax
    xor eax, 0x240000
    push eax
    popfd
    pushfd
    pop eax
    and eax, ~0x200
    call hex32r
    push 2
    popfd
    SAY16 "far\n"
    TRY16 "lcall 0xF000, offset (far_target - 0xF0000)"
    mov dword ptr [0x4300], 0xF0001234
    mov word ptr [0x4300], offset (far_target - 0xF0000)
    TRY16 "lcall [0x4300]"
    TRY16 "pushf; push cs; push offset (9f - 0xF0000); iret; 9:"
    EXIT 0
far_target:
    SAY16 "far target\n"
    retf
.balign 8
stubs16:
.set v, 0
.rept 256
    .balign 8
    push v
    jmp common16
    .set v, v + 1
.endr
common16:                   /* vector, ip, cs, flags */
    push ax
    push bp
    mov bp, sp
    RAW '*'
    mov ax, [bp + 4]
    call hex16
    mov ax, [bp + 8]
    call hex16
    mov ax, [bp + 6]
    call hex16
    mov ax, [bp + 10]
    and ax, ~0x8D5
    call hex16
    RAW 10
    pop bp
    pop ax
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, [RESUME_SP]
    jmp word ptr [RESUME]
hex32r:
    push eax
    shr eax, 16
    call hex16
    pop eax
hex16:
    push cx
    push dx
    mov dx, ax
    mov cx, 4
1:  rol dx, 4
    mov al, dl
    and al, 15
    cmp al, 10
    jb 2f
    add al, 'a' - '0' - 10
2:  add al, '0'
    out 0xE9, al
    loop 1b
    RAW ' '
    pop dx
    pop cx
    ret
puts16:
    push ax
1:  lods al, byte ptr cs:[si]
    test al, al
    jz 2f
    out 0xE9, al
    jmp 1b
2:  pop ax
    ret
