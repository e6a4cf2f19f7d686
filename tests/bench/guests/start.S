/* Entry of the compute guests: PVH (32-bit, no paging) to long mode; identity map of 1 GiB in 2 MiB pages, and the same
 * memory from 64 MiB on, in 4 KiB pages, at 1 GiB (32 MiB of it), for the memory loop through the TLB. */
    .intel_syntax noprefix
    .pushsection .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long start
    .popsection

    .code32
    .globl start
start:
    cld
    mov esp, offset stack_end
    mov edi, offset tables
    xor eax, eax
    mov ecx, (20 * 4096) / 4
    rep stosd
    mov dword ptr [pml4], offset pdpt + 3
    mov dword ptr [pdpt], offset pd0 + 3
    mov dword ptr [pdpt + 8], offset pd1 + 3
    mov edi, offset pd0
    mov eax, 0x83
    mov ecx, 512
1:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 1b
    mov edi, offset pd1
    mov eax, offset pts + 3
    mov ecx, 16
2:  mov [edi], eax
    add eax, 4096
    add edi, 8
    dec ecx
    jnz 2b
    mov edi, offset pts
    mov eax, 0x4000003
    mov ecx, 512 * 16
3:  mov [edi], eax
    add eax, 4096
    add edi, 8
    dec ecx
    jnz 3b
    mov eax, cr4
    or eax, 0x620 /* PAE, OSFXSR, OSXMMEXCPT */
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea
    .long long_mode
    .word 8
    .code64
long_mode:
    fninit
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    call run
    mov eax, 0
    mov dx, 0xf4
    out dx, eax
4:  hlt
    jmp 4b

    .section .data
    .balign 8
gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer: .word 23
    .quad gdt

    .section .bss
    .balign 4096
tables:
pml4: .skip 4096
pdpt: .skip 4096
pd0: .skip 4096
pd1: .skip 4096
pts: .skip 16 * 4096
    .skip 16384
stack_end:
    .section .note.GNU-stack, "", @progbits
