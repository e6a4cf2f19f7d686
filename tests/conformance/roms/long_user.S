/* What CPL 3 may do (UMIP, TSD, FSGSBASE, AC), SYSCALL and SYSRET into 64-bit and compatibility mode, SWAPGS, FPU
 * availability (TS, EM, OSFXSR), XSAVE enabling, global pages, PCID, INVPCID, 1 GiB pages. */
.include "long.inc"
.macro CR4SET bits
    mov rax, cr4
    or rax, \bits
    mov cr4, rax
.endm
.macro CR4CLEAR bits
    mov rax, cr4
    and rax, ~(\bits)
    mov cr4, rax
.endm
.macro CR0SET bits
    mov rax, cr0
    or rax, \bits
    mov cr0, rax
.endm
.macro CR0CLEAR bits
    mov rax, cr0
    and eax, ~(\bits)
    mov cr0, rax
.endm
test_long:
    SAY "UMIP\n"
    USER u_sgdt
    USER u_smsw
    CR4SET 0x800
    USER u_sgdt
    USER u_sidt
    USER u_sldt
    USER u_str
    USER u_smsw
    TRY "smsw eax"
    CR4CLEAR 0x800
    SAY "TSD\n"
    USER u_rdtsc
    CR4SET 4
    USER u_rdtsc
    TRY "rdtsc"
    CR4CLEAR 4
    SAY "FSGSBASE\n"
    TRY "rdfsbase rax"
    USER u_wrgsbase
    CR4SET 0x10000
    USER u_wrgsbase
    TRY "mov rbx, 0x8000000000000000; wrfsbase rbx"
    TRY "mov rbx, 0x7FFF00000000; wrfsbase rbx; rdfsbase rax; call hex64; rdgsbase rax; call hex64"
    SAY "privileged at CPL 3\n"
    USER u_invlpg
    USER u_wbinvd
    USER u_clts
    USER u_lmsw
    USER u_lgdt
    USER u_ltr
    USER u_swapgs
    USER u_wrmsr
    USER u_xsetbv
    USER u_invpcid
    USER u_mov_dr
    USER u_sysret
    USER u_stac
    SAY "AC\n"
    CR0SET 0x40000
    USER u_ac
    USER u_ac_off
    USER u_ac_store
    CR0CLEAR 0x40000
    USER u_ac
    SAY "SYSCALL\n"
    TRY "mov ecx, 0xC0000080; rdmsr; and eax, ~1; wrmsr; syscall"
    mov ecx, 0xC0000080
    rdmsr
    or eax, 1
    wrmsr
    mov ecx, 0xC0000081
    xor eax, eax
    mov edx, 0x00200018     /* SYSRET: CS 0x30 and SS 0x28 with RPL 3; SYSCALL: CS 0x18 */
    wrmsr
    mov ecx, 0xC0000082
    lea rax, [rip + syscall_entry]
    xor edx, edx
    wrmsr
    mov ecx, 0xC0000083
    lea rax, [rip + syscall_compat]
    wrmsr
    mov ecx, 0xC0000084
    mov eax, 0x4700
    wrmsr
    mov rax, 0x00CFF3000000FFFF /* 0x28: data, for SYSRET's SS; 0x30: 64-bit code */
    mov [GDT + 0x28], rax
    mov rax, 0x00AFFB000000FFFF
    mov [GDT + 0x30], rax
    mov rax, 0x00CFFB000000FFFF /* 0x20: 32-bit code, for SYSRET to compatibility mode */
    mov [GDT + 0x20], rax
    mov [RESUME_SP], rsp
    lea rax, [rip + 1f]
    mov [RESUME], rax
    lea rcx, [rip + u_syscall]
    mov r11d, 0x602
    mov rsp, USTACK
    sysretq
1:  mov [RESUME_SP], rsp
    lea rax, [rip + 1f]
    mov [RESUME], rax
    lea rcx, [rip + u_syscall32]
    mov r11d, 2
    sysretd
1:  SAY "SWAPGS\n"
    mov ecx, 0xC0000101
    mov eax, 0x1111
    xor edx, edx
    wrmsr
    mov ecx, 0xC0000102
    mov eax, 0x2222
    wrmsr
    swapgs
    mov ecx, 0xC0000101
    rdmsr
    call hex32_64
    mov ecx, 0xC0000102
    rdmsr
    call hex32_64
    PUTC64 10
    SAY "FPU\n"
    CR0SET 8
    TRY "fld1"
    TRY "movaps xmm0, xmm1"
    TRY "paddb mm0, mm1"
    TRY "fwait"
    CR0SET 2
    TRY "fwait"
    clts
    CR0CLEAR 2
    TRY "fld1"
    CR0SET 4
    TRY "fld1"
    TRY "movaps xmm0, xmm1"
    TRY "paddb mm0, mm1"
    CR0CLEAR 4
    CR4CLEAR 0x200
    TRY "movaps xmm0, xmm1"
    TRY "paddb mm0, mm1"
    CR4SET 0x200
    TRY "mov ebx, 0x20001; movaps xmm0, [rbx]"
    TRY "mov ebx, 0x20001; movups xmm0, [rbx]"
    TRY "mov dword ptr [0x20000], 0x10000; ldmxcsr [0x20000]"
    SAY "unmasked\n"
    mov dword ptr [0x20000], 0x1D80 /* divide by zero is not masked */
    ldmxcsr [0x20000]
    TRY "xorps xmm1, xmm1; mov eax, 0x3F800000; movd xmm0, eax; divss xmm0, xmm1"
    CR4CLEAR 0x400
    TRY "divss xmm0, xmm1"
    CR4SET 0x400
    mov dword ptr [0x20000], 0x1F80
    ldmxcsr [0x20000]
    fninit
    mov word ptr [0x20000], 0x37B
    fldcw [0x20000]
    TRY "fld1; fldz; fdivp; fwait"
    fninit
    SAY "XSAVE\n"
    TRY "xor ecx, ecx; xgetbv"
    CR4SET 0x40000
    TRY "xor ecx, ecx; xgetbv; call hex32_64"
    TRY "mov ecx, 1; xor eax, eax; xor edx, edx; xsetbv"
    TRY "xor ecx, ecx; mov eax, 2; xor edx, edx; xsetbv"
    TRY "xor ecx, ecx; mov eax, 3; xor edx, edx; xsetbv"
    TRY "mov ebx, 0x20001; mov eax, 3; xor edx, edx; xsave [rbx]"
    TRY "mov dword ptr [0x20200], 0; mov dword ptr [0x20204], 0x80000000; mov ebx, 0x20000; mov eax, 3; xrstor [rbx]"
    SAY "global pages\n"
    CR4SET 0x80
    mov qword ptr [PT + 0x160 * 8], 0x160107
    mov qword ptr [PT + 0x161 * 8], 0x161007
    mov dword ptr [0x162000], 0x99
    mov dword ptr [0x160000], 0x11
    mov dword ptr [0x161000], 0x22
    mov eax, [0x160000]
    mov eax, [0x161000]
    mov qword ptr [PT + 0x160 * 8], 0x162107
    mov qword ptr [PT + 0x161 * 8], 0x162007
    mov rax, cr3
    mov cr3, rax
    mov eax, [0x161000]
    call hex32_64
    mov eax, [0x160000]
    call hex32_64
    CR4CLEAR 0x80
    mov eax, [0x160000]
    call hex32_64
    PUTC64 10
    SAY "global code\n"
    CR4SET 0x80
    mov dword ptr [0x163000], 0x000011B8    /* mov eax, 0x11; ret */
    mov dword ptr [0x163004], 0x0000C300
    mov dword ptr [0x164000], 0x000022B8
    mov dword ptr [0x164004], 0x0000C300
    mov qword ptr [PT + 0x165 * 8], 0x163107
    mov qword ptr [PT + 0x166 * 8], 0x163007
    mov ebx, 0x165000
    mov ebp, 0x166000
    call rbx
    call hex32_64
    mov rax, cr3
    mov cr3, rax
    mov qword ptr [PT + 0x165 * 8], 0x164107
    call rbx
    call hex32_64
    call rbp
    call hex32_64
    mov qword ptr [PT + 0x166 * 8], 0x164007
    mov rax, cr3
    mov cr3, rax
    call rbp                                /* it is not global: the other page */
    call hex32_64
    call rbx                                /* it is: the page as before, until it is invalidated */
    call hex32_64
    invlpg [0x165000]
    call rbx
    call hex32_64
    mov qword ptr [PT + 0x165 * 8], 0x163107
    CR4CLEAR 0x80
    call rbx
    call hex32_64
    PUTC64 10
    SAY "PCID\n"
    mov rax, cr3
    or rax, 1
    mov cr3, rax
    TRY "mov rax, cr4; or eax, 0x20000; mov cr4, rax"
    mov rax, PML4
    mov cr3, rax
    TRY "mov rax, cr4; or eax, 0x20000; mov cr4, rax"
    mov rax, PML4 + 5
    bts rax, 63
    TRY "mov rax, PML4 + 5; bts rax, 63; mov cr3, rax; mov rax, cr3; call hex64"
    mov qword ptr [PT + 0x161 * 8], 0x161007
    mov qword ptr [0x20000], 5
    mov qword ptr [0x20008], 0x161000
    mov ebx, 0x20000
    TRY "xor eax, eax; invpcid rax, [rbx]; mov eax, [0x161000]; call hex32_64"
    TRY "mov eax, 4; invpcid rax, [rbx]"
    mov qword ptr [0x20000], 0x1005
    TRY "xor eax, eax; invpcid rax, [rbx]"
    mov rax, PML4
    mov cr3, rax
    TRY "mov rax, cr0; btr rax, 31; mov cr0, rax"
    CR4CLEAR 0x20000
    SAY "1 GiB pages\n"
    mov qword ptr [PDPT + 8], 0x83
    mov rax, cr3
    mov cr3, rax
    mov dword ptr [0x161000], 0xABCD
    mov rax, 0x40161000
    mov eax, [rax]
    call hex32_64
    PUTC64 10
    mov qword ptr [PDPT + 8], 0x2083
    invlpg [0x40000000]
    TRY "mov rax, 0x40161000; mov eax, [rax]"
    mov qword ptr [PD + 16], 0x2083
    invlpg [0x400000]
    TRY "mov eax, [0x400000]"
    mov rax, 0x87
    mov [PML4 + 8], rax
    TRY "mov rax, 0x8000000000; mov eax, [rax]"
    SAY "end\n"
    EXIT 0

syscall_entry:
    push rcx
    mov rax, rcx
    lea rbx, [rip + u_syscall]
    sub rax, rbx
    call hex32_64
    mov rax, r11
    and eax, ~0x8D5
    call hex32_64
    pushfq
    pop rax
    and eax, ~0x8D5
    call hex32_64
    mov eax, cs
    call hex16_64
    mov eax, ss
    call hex16_64
    PUTC64 10
    pop rcx
    mov rsp, STACK - 64
    int 0x80
syscall_compat:
    mov rsp, STACK - 64
    SAY "from compatibility mode\n"
    int 0x80

u_sgdt: sgdt [0x20000]
    int 0x80
u_sidt: sidt [0x20000]
    int 0x80
u_sldt: sldt eax
    int 0x80
u_str: str eax
    int 0x80
u_smsw: smsw eax
    int 0x80
u_rdtsc: rdtsc
    int 0x80
u_wrgsbase: mov eax, 0x1234
    wrgsbase rax
    int 0x80
u_invlpg: invlpg [0x20000]
u_wbinvd: wbinvd
u_clts: clts
u_lmsw: lmsw ax
u_lgdt: lgdt [0x20000]
u_ltr: ltr ax
u_swapgs: swapgs
u_wrmsr: wrmsr
u_xsetbv: mov rax, rax
    hlt
u_invpcid: mov ebx, 0x20000
    invpcid rax, [rbx]
u_mov_dr: mov rax, dr0
u_sysret: sysretq
u_stac: stac
u_ac: mov ebx, 0x20000
    push 0x40002
    popfq
    mov eax, [rbx]
    mov eax, [rbx + 1]
    int 0x80
u_ac_store: mov ebx, 0x20000
    push 0x40002
    popfq
    mov [rbx + 2], ax
    mov [rbx + 7], al
    add dword ptr [rbx + 2], 1
    int 0x80
u_ac_off: mov ebx, 0x20000
    mov eax, [rbx + 1]
    int 0x80
u_syscall: syscall
u_syscall32:
    .byte 0x0F, 0x05
