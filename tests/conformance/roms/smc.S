/* Self-modifying code: the next instruction, the same page, another page, an alias, across a page boundary, by string
 * instructions, and page tables that move code. Long mode; code stands at 0x100000. */
.include "long.inc"
.macro SHOW
    call hex32_64
    PUTC64 10
.endm
.macro COPY label, end, to
    lea rsi, [rip + \label]
    mov edi, \to
    mov ecx, \end - \label
    rep movsb
.endm
test_long:
    SAY "next instruction\n"
    COPY next, next_end, 0x100000
    mov r8d, 0x100000
    call r8
    SHOW
    call r8
    SHOW
    SAY "loop that patches itself\n"
    COPY loop1, loop1_end, 0x100000
    call r8
    SHOW
    SAY "another page\n"
    COPY ret1, ret1_end, 0x102000
    mov r9d, 0x102000
    xor r10d, r10d
1:  mov [0x102001], r10d
    call r9
    SHOW
    inc r10d
    cmp r10d, 4
    jne 1b
    SAY "alias\n"
    mov qword ptr [PT + 0x110 * 8], 0x102007
    invlpg [0x110000]
    mov dword ptr [0x110001], 0x1234
    call r9
    SHOW
    mov r11d, 0x110000
    call r11
    SHOW
    mov dword ptr [0x102001], 0x5678
    call r11
    SHOW
    SAY "across a page\n"
    COPY ret1, ret1_end, 0x102FFD /* mov eax, imm32: the immediate lies in both pages */
    mov r12d, 0x102FFD
    call r12
    SHOW
    mov byte ptr [0x103000], 0x77
    call r12
    SHOW
    mov byte ptr [0x102FFF], 0x88
    call r12
    SHOW
    mov dword ptr [0x102FFE], 0x01020304
    call r12
    SHOW
    SAY "strings\n"
    COPY ret2, ret1_end, 0x102000
    call r9
    SHOW
    COPY ret1, ret1_end, 0x102000
    call r9
    SHOW
    mov edi, 0x102001
    mov eax, 0x5A
    mov ecx, 4
    rep stosb
    call r9
    SHOW
    COPY stos, stos_end, 0x100000
    mov edi, 0x100000 + (stos_here - stos)
    call r8
    SHOW
    SAY "locked\n"
    COPY ret1, ret1_end, 0x102000
    call r9
    mov dword ptr [0x102001], 1
    lock add dword ptr [0x102001], 0x41
    call r9
    SHOW
    mov eax, 0x99
    xchg [0x102001], eax
    call r9
    SHOW
    SAY "the page moves\n"
    COPY ret1, ret1_end, 0x120000
    COPY ret2, ret2_end, 0x121000
    mov qword ptr [PT + 0x111 * 8], 0x120007
    invlpg [0x111000]
    mov r13d, 0x111000
    call r13
    SHOW
    mov qword ptr [PT + 0x111 * 8], 0x121007
    invlpg [0x111000]
    call r13
    SHOW
    mov qword ptr [PT + 0x111 * 8], 0x120007
    mov rax, cr3
    mov cr3, rax
    call r13
    SHOW
    SAY "the second page moves\n"
    COPY ret1, ret1_end, 0x102FFD
    mov r12d, 0x112FFD                      /* linear 0x112000 and 0x113000 */
    mov qword ptr [PT + 0x112 * 8], 0x102007
    mov qword ptr [PT + 0x113 * 8], 0x120007
    mov dword ptr [0x120000], 0xC30000
    mov dword ptr [0x121000], 0xC34400
    mov byte ptr [0x102FFF], 0x33
    invlpg [0x112000]
    invlpg [0x113000]
    mov byte ptr [0x120000], 0x55
    call r12
    SHOW
    mov qword ptr [PT + 0x113 * 8], 0x121007
    invlpg [0x113000]
    call r12
    SHOW
    mov qword ptr [PT + 0x113 * 8], 0x120007
    invlpg [0x113000]
    call r12
    SHOW
    SAY "the second page moves, the first is global\n"
    mov ecx, 16
1:  or dword ptr [PT + 0xF0 * 8 + rcx * 8 - 8], 0x100 /* and so is the code here */
    loop 1b
    or dword ptr [PT + 0x125 * 8], 0x100
    or dword ptr [PT + 0x135 * 8], 0x100
    COPY ret1, ret1_end, 0x125010
    COPY ret2, ret2_end, 0x135010
    mov word ptr [0x102FFD], 0x0EE9         /* JMP to 0x125010 or 0x135010, by its last two bytes */
    mov byte ptr [0x102FFF], 0x20
    mov dword ptr [0x120000], 1
    mov dword ptr [0x121000], 2
    mov qword ptr [PT + 0x112 * 8], 0x102107
    mov rax, cr4
    or eax, 0x80
    mov cr4, rax
    call r12
    SHOW
    mov qword ptr [PT + 0x113 * 8], 0x121007
    mov rax, cr3
    mov cr3, rax
    call r12
    SHOW
    mov rax, cr4
    and eax, ~0x80
    mov cr4, rax
    SAY "a translation that was replaced\n"  /* of a page that is 4 MiB away: both use one entry of a TLB */
    COPY ret1, ret1_end, 0x122000
    mov byte ptr [0x522000], 0
    mov r11d, 0x122000
    call r11
    SHOW
    mov dword ptr [0x122001], 0x77
    call r11
    SHOW
    mov byte ptr [0x522000], 0
    mov dword ptr [0x122001], 0x88
    call r11
    SHOW
    SAY "the end of a block\n"              /* its first and last bytes lie in different 64-byte parts of the page */
    COPY long1, long1_end, 0x122010
    mov r11d, 0x122010
    call r11
    SHOW
    mov byte ptr [0x122010 + (long1_last - long1) + 2], 0x20
    call r11
    SHOW
    SAY "loop over two versions\n"
    COPY ret1, ret1_end, 0x120000
    xor ebx, ebx
    mov ebp, 1000
1:  mov [0x120001], ebp
    call r13
    add ebx, eax
    dec ebp
    jnz 1b
    mov eax, ebx
    SHOW
    SAY "data beside code\n"
    COPY counter, counter_end, 0x100000
    mov ecx, 1000
    call r8
    SHOW
    SAY "strings of several pages, code amid them\n"  /* in a large page; at first nothing else was looked at there */
    COPY ret1, ret1_end, 0x405000
    mov r9d, 0x405000
    call r9
    SHOW
    COPY ret2, ret2_end, 0x605000
    mov esi, 0x604000
    mov edi, 0x404000
    mov ecx, 0x4000 / 8
    rep movsq
    call r9
    SHOW
    mov esi, 0x604800
    mov edi, 0x404800
    mov ecx, 0x3000 / 4
    mov dword ptr [0x605001], 0x44
    rep movsd
    call r9
    SHOW
    mov edi, 0x403FFE
    mov ecx, 0x3000 / 2
    mov eax, 0xC3C3
    rep stosw
    mov eax, 0x66
    call r9
    SHOW
    SAY "code that dies before its call\n"  /* it stands beside the page table entry that its load marks Accessed */
    mov qword ptr [PD + 8 * 8], 0x130007    /* linear 0x1000000 */
    mov qword ptr [0x130808], 0x140007
    COPY dying, dying_end, 0x130810
    mov r9d, 0x130810
    mov ecx, 0x140000
    mov ebp, 100
1:  call r9
    dec ebp
    jnz 1b
    xor ebx, ebx
    mov ecx, 0x1101000
    call r9
    mov eax, ebx
    SHOW
    SAY "end\n"
    EXIT 0

next:                       /* changes the instruction right behind the store */
    mov dword ptr [rip + 1f + 1], 0xCAFE
1:  mov eax, 0x1111
    mov dword ptr [rip + 1b + 1], 0x1111
    ret
next_end:
loop1:
    xor eax, eax
    mov ecx, 5
1:  add eax, 1              /* 83 C0 01: the immediate grows */
    inc byte ptr [rip + 1b + 2]
    loop 1b
    ret
loop1_end:
ret1:
    mov eax, 0x11
    ret
ret1_end:
ret2:
    mov eax, 0x22
    ret
ret2_end:
long1:                      /* 83 C0 01 each */
    xor eax, eax
    .rept 24
    add eax, 1
    .endr
long1_last:
    add eax, 1
    ret
long1_end:
    .byte 0x90
stos:                       /* overwrites what follows with INC EAX (FF C0) by a repeated string instruction */
    xor edx, edx
    mov eax, 0xC0FFC0FF
    mov ecx, 2
    rep stosd
    xor eax, eax
stos_here:
    .rept 8
    nop
    .endr
    ret
stos_end:
counter:
    xor eax, eax
1:  inc dword ptr [rip + 2f]
    mov eax, [rip + 2f]
    loop 1b
    ret
2:  .long 0
counter_end:
dying:
    movups xmm0, [rcx]
    call 1f
    inc ebx
    ret
1:  ret
dying_end:
