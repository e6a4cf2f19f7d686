/* Hypercalls as KVM has them (Documentation/virt/kvm/x86/hypercalls.rst): KVM_HC_SEND_IPI, which CPUID announces, and no other;
 * none at CPL 3. */
.include "apic.inc"
.macro HYPERCALL number, low, high, first, icr
    mov eax, \number
    mov ebx, \low
    mov ecx, \high
    mov edx, \first
    mov esi, \icr
    vmmcall
    call hex64
    PUTC64 10
.endm
test_apic:
    mov dword ptr [COUNT], 0
    SAY "announced\n"
    mov eax, 0x40000001
    cpuid
    bt eax, 11
    YES c
    SAY "to ourselves: one took it\n"
    HYPERCALL 10, 1, 0, 0, 0x50
    SAY "to ourselves and one that is not there\n"
    WAIT 1
    cli
    HYPERCALL 10, 3, 0, 0, 0x50
    SAY "to nobody\n"
    HYPERCALL 10, -1, -1, -1, 0x50
    HYPERCALL 10, 2, 1, 0, 0x50
    SAY "with a shorthand, and logical: EINVAL\n"
    HYPERCALL 10, 1, 0, 0, 0x40050
    HYPERCALL 10, 1, 0, 0, 0x850
    SAY "another call: ENOSYS\n"
    HYPERCALL 1234, 1, 0, 0, 0x50
    SAY "at CPL 3: EPERM\n"
    USER user
    mov rax, rbx
    call hex64
    PUTC64 10
    WAIT 2
    cmp dword ptr [COUNT], 2
    YES e
    SAY "end\n"
    EXIT 0
user:
    mov eax, 10
    mov ebx, 1
    xor ecx, ecx
    xor edx, edx
    mov esi, 0x50
    vmmcall
    mov rbx, rax
    int 0x80
