/* What the tiny guests share: the PVH entry note, the way to long mode, console output, and the ways to end.
 * Everything is GNU assembler, Intel syntax; the specification is the x86/HVM direct boot ABI (PVH):
 * entry in 32-bit protected mode without paging, EBX = address of struct hvm_start_info. */
.intel_syntax noprefix

#define COM1 0x3f8
#define EXIT_PORT 0xf4

/* ELF note XEN_ELFNOTE_PHYS32_ENTRY (18). */
.macro PVH_ENTRY symbol
    .pushsection .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long \symbol
    .popsection
.endm

/* Reset through the keyboard controller; where there is none, a triple fault ends the machine. */
.macro RESET
    mov al, 0xfe
    out 0x64, al
    mov ecx, 0x4000
91: dec ecx
    jnz 91b
    lidt [no_idt]
    ud2
    .pushsection .rodata
    .ifndef no_idt
no_idt: .quad 0, 0
    .endif
    .popsection
.endm

/* ESI/RSI: a zero-terminated string, to COM1. Uses EAX, EDX. */
.macro DEFINE_PUTS
puts:
    mov edx, COM1
92: movzx eax, byte ptr [esi]
    test eax, eax
    jz 93f
    out dx, al
    inc esi
    jmp 92b
93: ret
.endm

/* EAX: a number, in decimal to COM1. 64-bit code. Uses RAX, RCX, RDX, RDI. */
.macro DEFINE_PUTNUM
putnum:
    lea rdi, [rsp - 64]
    mov byte ptr [rdi], 0
    mov ecx, 10
94: xor edx, edx
    div ecx
    add dl, '0'
    dec rdi
    mov [rdi], dl
    test eax, eax
    jnz 94b
    mov edx, COM1
95: mov al, [rdi]
    test al, al
    jz 96f
    out dx, al
    inc rdi
    jmp 95b
96: ret
.endm

/* EAX: a number, 8 hexadecimal digits to COM1. Uses EAX, ECX, EDX, EDI. */
.macro DEFINE_PUTHEX
puthex:
    mov ecx, 8
    mov edi, eax
97: rol edi, 4
    mov eax, edi
    and eax, 15
    add eax, '0'
    cmp eax, '9'
    jbe 98f
    add eax, 'a' - '9' - 1
98: mov edx, COM1
    out dx, al
    dec ecx
    jnz 97b
    ret
.endm

/* EBX: hvm_start_info. EAX becomes the decimal number on the command line, or `default`. 32-bit code. */
.macro CMDLINE_NUMBER default
    mov esi, [ebx + 24]
    test esi, esi
    jz 82f
80: movzx edx, byte ptr [esi]
    test edx, edx
    jz 82f
    sub edx, '0'
    cmp edx, 9
    jbe 81f
    inc esi
    jmp 80b
82: mov eax, \default
    jmp 84f
81: xor eax, eax
83: movzx edx, byte ptr [esi]
    sub edx, '0'
    cmp edx, 9
    ja 84f
    imul eax, eax, 10
    add eax, edx
    inc esi
    jmp 83b
84:
.endm

/* From the PVH entry to 64-bit code at `target`, CPL 0: the first GiB mapped one to one by 2 MiB pages,
 * accessible from CPL 3 too. Selectors: 0x08 code, 0x10 data, 0x1b data (CPL 3), 0x23 code (CPL 3), 0x28 TSS.
 * EBX is kept. */
.macro LONG_MODE target
    mov esp, offset stack_top
    mov edi, offset pml4
    lea eax, [edi + 0x1007]
    mov [edi], eax
    lea eax, [edi + 0x2007]
    mov [edi + 0x1000], eax
    mov eax, 0x87
    mov ecx, 0
71: mov [edi + 0x2000 + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 512
    jne 71b
    mov cr3, edi
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    mov cr0, eax
    lgdt [gdt_pointer]
    .att_syntax
    ljmp $0x08, $72f
    .intel_syntax noprefix
    .code64
72: mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    jmp \target
    .pushsection .data
    .balign 8
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
gdt_tss:
    .quad 0, 0
gdt_pointer:
    .word . - gdt - 1
    .long gdt
    .long 0
    .popsection
    .pushsection .bss
    .balign 4096
pml4: .skip 0x3000
stack: .skip 0x2000
stack_top:
    .popsection
.endm

/* 64-bit: gate `vector` of `idt` leads to `handler` (below 4 GiB) through an interrupt gate. Uses EAX. */
.macro SET_GATE vector, handler
    mov eax, offset \handler
    mov [idt + \vector * 16], ax
    mov word ptr [idt + \vector * 16 + 2], 0x08
    mov word ptr [idt + \vector * 16 + 4], 0x8e00
    shr eax, 16
    mov [idt + \vector * 16 + 6], ax
.endm

.macro DEFINE_IDT
    .pushsection .bss
    .balign 16
idt: .skip 0x400
    .popsection
    .pushsection .data
idt_pointer:
    .word 0x3ff
    .quad idt
    .popsection
.endm

/* Both 8259s: vectors 0x20 and 0x28, only the lines of `mask` (first controller) open. Uses AL. */
.macro PIC_SETUP mask
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, \mask
    out 0x21, al
    mov al, 0xff
    out 0xa1, al
.endm
