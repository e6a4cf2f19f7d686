/* Single steps where an instruction itself changes TF: SYSCALL and SYSRET trap if TF is set at their end. And the bases of
 * FS and GS across an IRET that nulls their selectors. */
.include "long.inc"
.macro MSR index, low, high=0
    mov ecx, \index
    mov eax, \low
    mov edx, \high
    wrmsr
.endm
.macro BACK label           /* where the gate 0x80 leads */
    mov [RESUME_SP], rsp
    lea rax, [rip + \label]
    mov [RESUME], rax
.endm
test_long:
    GATE 1, on_db
    MSR 0xC0000081, 0, 0x00200058   /* SYSRET: SS 0x28 and CS 0x30; SYSCALL: CS 0x58 and SS 0x60 */
    mov rax, 0x00AF9B000000FFFF     /* 0x58: 64-bit code */
    mov [GDT + 0x58], rax
    mov rax, 0x00CF93000000FFFF     /* 0x60: data */
    mov [GDT + 0x60], rax
    mov rax, 0x00CFFB000000FFFF     /* 0x20: 32-bit code */
    mov [GDT + 0x20], rax
    mov rax, 0x00CFF3000000FFFF     /* 0x28: data */
    mov [GDT + 0x28], rax
    mov rax, 0x00AFFB000000FFFF     /* 0x30: 64-bit code */
    mov [GDT + 0x30], rax
    lea rax, [rip + entry]
    MSR 0xC0000082, eax
    lea rax, [rip + entry]
    MSR 0xC0000083, eax

    SAY "TF is masked\n"
    MSR 0xC0000084, 0x700
    BACK 1f
    lea rcx, [rip + user64]
    mov r11d, 0x102
    mov rsp, USTACK
    sysretq
1:  SAY "from compatibility mode\n"
    BACK 1f
    lea rcx, [rip + user32]
    mov r11d, 0x102
    mov rsp, USTACK
    sysretd
1:  SAY "TF is not masked\n"
    MSR 0xC0000084, 0x600
    BACK 1f
    lea rcx, [rip + user64]
    mov r11d, 0x102
    mov rsp, USTACK
    sysretq
1:  SAY "no TF\n"
    BACK 1f
    lea rcx, [rip + user64]
    mov r11d, 2
    mov rsp, USTACK
    sysretq

1:  SAY "bases\n"
    mov rax, 0x00CFF3000000FFFF     /* UDATA and UCODE64 again */
    mov [GDT + 0x20], rax
    mov rax, 0x00AFFB000000FFFF
    mov [GDT + 0x28], rax
    mov eax, DATA
    mov fs, eax
    mov gs, eax
    MSR 0xC0000100, 0x20200
    MSR 0xC0000101, 0x20300
    mov qword ptr [0x20200], 0x1111
    mov qword ptr [0x20300], 0x2222
    USER u_bases
    call hex64
    PUTC64 ' '
    mov rax, rbx
    call hex64
    PUTC64 ' '
    mov eax, fs
    call hex16_64
    mov eax, gs
    call hex16_64
    PUTC64 10
    SAY "end\n"
    EXIT 0

entry:
    nop
    test rcx, rcx
    push rcx
    lea rax, [rip + user64_syscalled]
    cmp rcx, rax
    pop rcx
    je 1f
    sysretd
1:  sysretq
user64:
    nop
    nop
    syscall
user64_syscalled:
    nop
    int 0x80
u_bases:
    mov rax, fs:[0]
    mov rbx, gs:[0]
    int 0x80
.code32
user32:
    nop
    nop
    syscall
    nop
    int 0x80
.code64
on_db:                      /* rip, cs, rflags, rsp, ss */
    push rax
    PUTC64 '#'
    mov rax, [rsp + 16]
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
