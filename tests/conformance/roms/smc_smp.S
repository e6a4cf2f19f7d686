/* Code that another processor changes, 200 times each: the first processor runs (long mode) what the second writes
 * (32-bit protected mode), then the second runs what the first writes through another linear address; within a page and
 * across two. Each writes to the page before the other runs from it, so that it has a translation that must be given up.
 */
.include "long.inc"
.set REQUEST, 0x4F00        /* the round; high byte: what to do */
.set DONE, 0x4F04
.set RESULT, 0x4F08
.set HERE, 0x60000          /* code, in one page */
.set ACROSS, 0x62FFD        /* its immediate lies in both pages */
.set ALIAS, 0x110000        /* linear, of physical 0x60000 to 0x63FFF */
.set WRITE, 0x01000000
.set WRITE_ACROSS, 0x02000000
.set RUN, 0x03000000
.set RUN_ACROSS, 0x04000000
.macro ASK what             /* R15D: the round */
    mov eax, r15d
    or eax, \what
    mov [REQUEST], eax
9904:
    pause
    cmp [DONE], eax
    jne 9904b
.endm
.macro ROUNDS name, code
    SAY "\name"
    mov r15d, 1
    xor r14d, r14d          /* wrong results */
9905:
    \code
    cmp eax, r15d
    je 9906f
    inc r14d
9906:
    inc r15d
    cmp r15d, 201
    jne 9905b
    mov eax, r14d
    call hex32_64
    PUTC64 10
.endm
test_long:
    mov edi, 0x14000
    xor eax, eax
    mov ecx, 1024
    rep stosd
    mov qword ptr [PDPT + 24], 0x14007
    mov eax, 0xFEE0009F
    mov [0x14000 + 0x1F7 * 8], rax
    mov ebp, 0xFEE00000
    mov qword ptr [PT + 0x110 * 8], 0x60007
    mov qword ptr [PT + 0x111 * 8], 0x61007
    mov qword ptr [PT + 0x112 * 8], 0x62007
    mov qword ptr [PT + 0x113 * 8], 0x63007
    mov rax, cr3
    mov cr3, rax
    mov dword ptr [REQUEST], 0
    mov dword ptr [DONE], 0
    lea rsi, [rip + ap]
    mov edi, 0x30000
    mov ecx, ap_end - ap
    rep movsb
    /* mov eax, imm32; ret: the same in both modes */
    mov byte ptr [HERE], 0xB8
    mov byte ptr [HERE + 5], 0xC3
    mov byte ptr [ACROSS], 0xB8
    mov byte ptr [ACROSS + 5], 0xC3
    mov dword ptr [rbp + 0xF0], 0x1FF
    mov dword ptr [rbp + 0x300], 0xC4500 /* INIT, all but self */
    mov ecx, 100000
1:  loop 1b
    mov dword ptr [rbp + 0x300], 0xC4630 /* SIPI */
    mov r8d, HERE
    mov r9d, ACROSS
    ROUNDS "runs what the other writes ", "ASK WRITE; call r8; call r8"
    ROUNDS "across a page ", "ASK WRITE_ACROSS; call r9; call r9"
    ROUNDS "writes what the other runs ", "mov [ALIAS + 1], r15d; ASK RUN; mov eax, [RESULT]"
    ROUNDS "across a page ", "mov [ALIAS + 0x2FFE], r15w; mov word ptr [ALIAS + 0x3000], 0; ASK RUN_ACROSS; mov eax, [RESULT]"
    SAY "end\n"
    EXIT 0
.code16
ap:
    cli
    mov ax, 0x3000
    mov ds, ax
    data32 lgdt [ap_gdt - ap]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    data32 ljmp CODE32, 0x30000 + (ap32 - ap)
ap_gdt:
    .word GDT_LIMIT
    .long GDT
.code32
ap32:
    mov ax, DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, 0x7C00
    mov esi, HERE
    mov edi, ACROSS
    xor ebx, ebx            /* the last request */
1:  pause
    mov edx, [REQUEST]
    cmp edx, ebx
    je 1b
    mov ebx, edx
    mov eax, edx
    and eax, 0xFFFFFF
    shr edx, 24
    cmp dl, 2
    je 3f
    ja 4f
    mov [HERE + 1], eax
    jmp 9f
3:  mov [ACROSS + 1], ax    /* the bytes of both pages apart */
    shr eax, 16
    mov [ACROSS + 3], ax
    jmp 9f
4:  cmp dl, 3
    jne 5f
    call esi
    mov [RESULT], eax
    jmp 9f
5:  call edi
    mov [RESULT], eax
9:  mov [DONE], ebx
    jmp 1b
ap_end:
.code64
