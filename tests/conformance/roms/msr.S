/* Model-specific registers that Linux, the BSDs and SeaBIOS touch on a processor of this vendor and family: all can be read,
 * and what they write (the value read, where nothing else is said) is taken. Values after reset, but for what long.inc set.
 */
.include "long.inc"
.set READ, 0
.set WRITE, 1               /* write the value back */
.set SET, 2                 /* write the value that follows, and read it again */
.macro MSR index, what, value=0
    .long \index, \what
    .quad \value
.endm
test_long:
    lea r15, [rip + table]
1:  mov eax, [r15]
    cmp eax, -1
    je 3f
    call hex32_64
    PUTC64 ' '
    TRY "mov ecx, [r15]; rdmsr; shl rdx, 32; or rax, rdx; mov r14, rax; call hex64; PUTC64 32"
    cmp dword ptr [r15 + 4], READ
    je 2f
    cmp dword ptr [r15 + 4], SET
    jne 4f
    mov r14, [r15 + 8]
4:  TRY "mov ecx, [r15]; mov rax, r14; mov rdx, r14; shr rdx, 32; wrmsr"
    cmp dword ptr [r15 + 4], SET
    jne 2f
    TRY "mov ecx, [r15]; rdmsr; shl rdx, 32; or rax, rdx; call hex64; PUTC64 32"
2:  add r15, 16
    jmp 1b
3:  SAY "end\n"
    EXIT 0
    .balign 16
table:
    /* every system */
    MSR 0x1B, WRITE                     /* APIC base */
    MSR 0xC0000080, WRITE               /* EFER */
    MSR 0xC0000081, SET, 0x0023001000000000
    MSR 0xC0000082, SET, 0xFFFFFFFF81000000
    MSR 0xC0000083, SET, 0xFFFFFFFF81000040
    MSR 0xC0000084, SET, 0x47700
    MSR 0xC0000100, SET, 0x7F0000001000
    MSR 0xC0000101, SET, 0xFFFF888000000000
    MSR 0xC0000102, SET, 0x7F0000002000
    MSR 0xC0000103, SET, 5              /* TSC_AUX */
    MSR 0x174, SET, 0x10
    MSR 0x175, SET, 0xFFFFFE0000001000
    MSR 0x176, SET, 0xFFFFFFFF81000080
    MSR 0x277, SET, 0x0407050600070106  /* PAT, as Linux has it */
    MSR 0x3B, WRITE                     /* TSC_ADJUST */
    MSR 0x1B, SET, 0x10000FEE00900      /* APIC base beyond the physical addresses: #GP */
    MSR 0x48, SET, 1                    /* SPEC_CTRL and PRED_CMD: CPUID does not announce them */
    MSR 0x49, SET, 1
    MSR 0xC0010000, WRITE               /* performance counters */
    MSR 0xC0010007, WRITE
    MSR 0x8B, READ                      /* patch level */
    MSR 0xDA0, WRITE                    /* XSS */
    /* MTRRs: SeaBIOS, FreeBSD, Linux */
    MSR 0xFE, READ
    MSR 0x2FF, SET, 0xC06
    MSR 0x250, SET, 0x0606060606060606
    MSR 0x258, WRITE
    MSR 0x259, WRITE
    MSR 0x268, SET, 0x0505050505050505
    MSR 0x269, WRITE
    MSR 0x26A, WRITE
    MSR 0x26B, WRITE
    MSR 0x26C, WRITE
    MSR 0x26D, WRITE
    MSR 0x26E, WRITE
    MSR 0x26F, WRITE
    MSR 0x200, SET, 0xC0000000
    MSR 0x201, SET, 0xFFFFC0000800
    MSR 0x20E, WRITE
    MSR 0x20F, WRITE
    /* x2APIC and timer */
    MSR 0x6E0, WRITE
    /* AMD's: errata, C1E, LFENCE, configuration */
    MSR 0xC0010010, WRITE               /* SYSCFG: Linux, SeaBIOS */
    MSR 0xC0010015, WRITE               /* HWCR: all */
    MSR 0xC001001F, WRITE               /* NB_CFG: FreeBSD, OpenBSD */
    MSR 0xC0010055, WRITE               /* interrupt pending and CMP-halt: FreeBSD, NetBSD, Linux */
    MSR 0xC0010058, WRITE               /* MMIO configuration base: Linux, FreeBSD */
    MSR 0xC0010112, READ                /* TSEG: Linux */
    MSR 0xC0010113, READ
    MSR 0xC0010114, WRITE               /* VM_CR */
    MSR 0xC0010117, READ
    MSR 0xC0010140, READ                /* OSVW */
    MSR 0xC0010141, READ
    MSR 0xC0011020, WRITE               /* LS_CFG: NetBSD, FreeBSD, Linux */
    MSR 0xC0011021, WRITE               /* IC_CFG: NetBSD */
    MSR 0xC0011022, WRITE
    MSR 0xC0011023, WRITE
    MSR 0xC0011029, WRITE               /* DE_CFG: OpenBSD, NetBSD, Linux */
    MSR 0xC001102A, WRITE
    MSR 0xC001102C, WRITE
    /* machine checks, debugging, performance: probed */
    MSR 0, READ
    MSR 1, READ
    MSR 0x17, READ
    MSR 0x2A, READ
    MSR 0x34, READ
    MSR 0x179, READ
    MSR 0x17A, WRITE
    MSR 0x198, READ
    MSR 0x199, WRITE
    MSR 0x1A0, WRITE
    MSR 0x1D9, WRITE
    MSR 0x1DB, READ
    MSR 0x1DE, READ
    /* KVM's */
    MSR 0x4B564D00, WRITE
    MSR 0x4B564D01, WRITE
    MSR 0x4B564D02, WRITE
    MSR 0x4B564D03, WRITE
    MSR 0x4B564D04, WRITE
    /* none */
    MSR 0x12345678, READ
    .long -1
