/* Exceptions, error codes, segment loads, gates and paging in 64-bit mode. */
.include "long.inc"
test_long:
    SAY "simple\n"
    TRY "xor ecx, ecx; div ecx"
    TRY "ud2"
    TRY "int3"
    TRY "int 0x21"
    TRY "int 0x80"
    mov rbx, 0x8000000000000000
    TRY "mov al, [rbx]"
    mov rbx, 0x00007FFFFFFFFFFD
    TRY "mov eax, [rbx]"
    SAY "page faults\n"
    /* page 0x150: not present; 0x151 read-only; 0x152 NX; 0x153 reserved bit; 0x154 user */
    mov qword ptr [PT + 0x150 * 8], 0x150006
    mov qword ptr [PT + 0x151 * 8], 0x151005
    mov rax, 0x8000000000152007
    mov [PT + 0x152 * 8], rax
    mov rax, 0x0008000000153007
    mov [PT + 0x153 * 8], rax
    mov qword ptr [PT + 0x155 * 8], 0x155003
    mov byte ptr [0x152000], 0xC3
    mov byte ptr [0x154000], 0xC3
    mov byte ptr [0x155000], 0xC3
    mov rax, cr3
    mov cr3, rax
    mov ebx, 0x150010
    TRY "mov al, [rbx]"
    TRY "mov [rbx], al"
    TRY "call rbx"
    mov ebx, 0x151010
    TRY "mov al, [rbx]"
    TRY "mov [rbx], al"
    mov ebx, 0x152000
    TRY "mov al, [rbx]"
    TRY "call rbx"
    mov ebx, 0x153000
    TRY "mov al, [rbx]"
    TRY "mov [rbx], al"
    mov ebx, 0x150FFE
    TRY "mov [rbx], rax"
    mov ebx, 0x14FFFE
    TRY "mov [rbx], rax"
    mov rax, 0x1000000000
    TRY "mov al, [rax]"
    SAY "WP off\n"
    mov rax, cr0
    btr rax, 16
    mov cr0, rax
    mov ebx, 0x151010
    TRY "mov [rbx], al"
    mov rax, cr0
    bts rax, 16
    mov cr0, rax
    SAY "accessed and dirty\n"
    mov qword ptr [PT + 0x160 * 8], 0x160007
    mov qword ptr [PT + 0x161 * 8], 0x161007
    invlpg [0x160000]
    invlpg [0x161000]
    mov al, [0x160000]
    mov [0x161000], al
    mov eax, [PT + 0x160 * 8]
    call hex32_64
    PUTC64 ' '
    mov eax, [PT + 0x161 * 8]
    call hex32_64
    PUTC64 ' '
    mov [0x160000], al
    mov eax, [PT + 0x160 * 8]
    call hex32_64
    PUTC64 10
    SAY "user\n"
    USER user_div
    USER user_cli
    USER user_int21
    USER user_int80
    USER user_int3
    USER user_in
    USER user_super_read
    USER user_super_write
    USER user_nx
    USER user_super_exec
    USER user_rdmsr
    USER user_hlt
    USER user_cr
    USER user_noncanonical
    USER user_popf
    SAY "SMEP and SMAP\n"
    mov qword ptr [PT + 0x1FF * 8], 0 /* the user code stays user; the ROM and stacks become supervisor pages below */
    mov ecx, 512
    xor edi, edi
1:  and qword ptr [PT + rdi], ~4
    add edi, 8
    loop 1b
    mov qword ptr [PT + 0x154 * 8], 0x154007
    mov rax, cr4
    or eax, 0x300000
    mov cr4, rax
    mov ebx, 0x154000
    TRY "call rbx"
    TRY "mov al, [rbx]"
    TRY "mov [rbx], al"
    stac
    TRY "mov al, [rbx]"
    stac
    TRY "mov [rbx], al"
    clac
    mov ebx, 0x155000
    TRY "call rbx"
    mov rax, cr4
    and eax, ~0x300000
    mov cr4, rax
    SAY "descriptors\n"
    call descriptors
    SAY "gates\n"
    mov byte ptr [IDT + 0x30 * 16 + 5], 0x0E /* not present */
    TRY "int 0x30"
    mov byte ptr [IDT + 0x31 * 16 + 5], 0x8C /* call gate type */
    TRY "int 0x31"
    mov word ptr [IDT + 0x32 * 16 + 2], DATA
    TRY "int 0x32"
    mov word ptr [IDT + 0x33 * 16 + 2], CODE32
    TRY "int 0x33"
    mov word ptr [IDT + 0x34 * 16 + 2], 0
    TRY "int 0x34"
    mov word ptr [IDT + 0x35 * 16 + 2], 0x3F8
    TRY "int 0x35"
    mov word ptr [IDT + 0x36 * 16 + 2], 0x7F8
    TRY "int 0x36"
    SAY "double fault\n"
    mov byte ptr [IDT + 14 * 16 + 5], 0x0E
    mov ebx, 0x150000
    TRY "mov al, [rbx]"       /* #PF -> #NP -> #DF */
    mov byte ptr [IDT + 14 * 16 + 5], 0x8E
    mov byte ptr [IDT + 0 * 16 + 5], 0x0E
    TRY "xor ecx, ecx; div ecx" /* #DE -> #NP -> #DF */
    mov byte ptr [IDT + 0 * 16 + 5], 0x8E
    mov byte ptr [IDT + 6 * 16 + 5], 0x0E
    TRY "ud2"                  /* #UD -> #NP: no #DF */
    mov byte ptr [IDT + 6 * 16 + 5], 0x8E
    mov [RESUME_SP], rsp
    lea rax, [rip + 2f]
    mov [RESUME], rax
    mov rsp, 0x150800        /* the handler's pushes fault: #PF -> #PF -> #DF on IST1 */
    ud2
2:  SAY "back\n"
    SAY "syscall\n"
    mov ecx, 0xC0000081
    xor eax, eax
    mov edx, (CODE64 - 8 + 8) | (0x18 << 16)
    mov edx, 0x00180018
    wrmsr
    mov ecx, 0xC0000082
    lea rax, [rip + syscall_entry]
    xor edx, edx
    wrmsr
    mov ecx, 0xC0000084
    mov eax, 0x4700
    wrmsr
    SAY "end\n"
    EXIT 0

syscall_entry:
    SAY "in\n"
    EXIT 1

user_div: xor ecx, ecx
    div ecx
user_cli: cli
    int 0x80
user_int21: int 0x21
user_int80: int 0x80
user_int3: int3
user_in: in al, 0x60
user_super_read: mov al, [0x155000]
    int 0x80
user_super_write: mov [0x155000], al
    int 0x80
user_nx: mov eax, 0x152000
    jmp rax
user_super_exec: mov eax, 0x155000
    jmp rax
user_rdmsr: rdmsr
user_hlt: hlt
user_cr: mov rax, cr0
user_noncanonical: mov rax, 0x8000000000000000
    push rax
    ret
user_popf: push 0x3302      /* IF, TF clear; IOPL and IF must not change */
    popfq
    int 0x80

/* Every descriptor type: loads of DS and SS, LAR, LSL, VERR, VERW. */
descriptors:
    xor r12d, r12d          /* access byte */
1:  mov dword ptr [GDT + FREE_SEL], 0x0000FFFF
    mov dword ptr [GDT + FREE_SEL + 4], 0x00CF0000
    mov [GDT + FREE_SEL + 5], r12b
    mov qword ptr [GDT + FREE_SEL + 8], 0
    xor r13d, r13d          /* RPL 0 and 3 */
2:  mov eax, r12d
    shl rax, 56
    mov ecx, 2
    call hexn64
    PUTC64 ' '
    lea r14d, [r13 + FREE_SEL]
    mov eax, 0xAAAAAAAA
    lar eax, r14d
    setz bl
    jnz 4f
    and eax, 0x00F0FF00     /* bits 19:16 are undefined; long_checks.S */
4:
    call hex32_64
    mov eax, ebx
    call flag
    mov eax, 0xAAAAAAAA
    lsl eax, r14d
    setz bl
    call hex32_64
    mov eax, ebx
    call flag
    verr r14w
    setz al
    call flag
    verw r14w
    setz al
    call flag
    TRY "mov ds, r14d; xor eax, eax; mov ds, eax"
    TRY "mov ss, r14d; mov eax, DATA; mov ss, eax"
    mov al, [GDT + FREE_SEL + 5]
    cmp al, r12b
    je 3f
    SAY "accessed\n"
    mov [GDT + FREE_SEL + 5], r12b
3:  xor r13d, 3
    jnz 2b
    inc r12d
    cmp r12d, 256
    jne 1b
    ret
flag:
    and al, 1
    add al, '0'
    out 0xE9, al
    mov al, ' '
    out 0xE9, al
    ret
