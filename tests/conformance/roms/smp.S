/* INIT and SIPI: every other processor starts in real mode at 0x30000, counts itself, and halts; then NMIs wake them. */
.include "long.inc"
.set COUNT, 0x4F00
.set WOKEN, 0x4F04
.set READY, 0x4F08
test_long:
    mov edi, 0x14000
    xor eax, eax
    mov ecx, 1024
    rep stosd
    mov qword ptr [PDPT + 24], 0x14007
    mov eax, 0xFEE0009F
    mov [0x14000 + 0x1F7 * 8], rax
    mov ebp, 0xFEE00000
    mov dword ptr [COUNT], 0
    mov dword ptr [WOKEN], 0
    mov dword ptr [READY], 0
    lea rsi, [rip + ap]
    mov edi, 0x30000
    mov ecx, ap_end - ap
    rep movsb
    mov dword ptr [8], 0x30000000 + (ap_nmi - ap) /* real-mode vector 2 */
    mov dword ptr [rbp + 0xF0], 0x1FF
    mov dword ptr [rbp + 0x300], 0xC4500 /* INIT, all but self */
    mov ecx, 100000
1:  loop 1b
    mov dword ptr [rbp + 0x300], 0xC4630 /* SIPI */
    mov ecx, 100000000
1:  pause
    cmp dword ptr [COUNT], 3
    je 2f
    loop 1b
2:  mov eax, [COUNT]
    call hex32_64
    PUTC64 10
1:  cmp dword ptr [READY], 3
    jne 1b
    mov ecx, 100000
1:  loop 1b
    mov dword ptr [rbp + 0x300], 0xC4400 /* NMI */
    mov ecx, 100000000
1:  pause
    cmp dword ptr [WOKEN], 3
    je 2f
    loop 1b
2:  mov eax, [WOKEN]
    call hex32_64
    PUTC64 10
    EXIT 0
.code16
ap:
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7C00
    lock inc dword ptr [COUNT]
1:  mov eax, [COUNT]
    cmp eax, 3
    jne 1b
    /* one after the other: a stack each is not worth it */
    lock inc dword ptr [READY]
2:  hlt
    jmp 2b
ap_nmi:
    lock inc dword ptr [WOKEN]
3:  hlt
    jmp 3b
ap_end:
.code64
