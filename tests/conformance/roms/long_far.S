/* Far transfers that long mode refuses, and in which order it looks.
 *
 * SDM vol. 2B, RET, in IA-32e mode, in this order: "IF return code segment descriptor has L-bit = 1 and D-bit = 1 THEN
 * #GP(selector)", ..., "IF return code segment descriptor is not present THEN #NP(selector)".
 * SDM vol. 2A, CALL and JMP, with IA32_EFER.LMA = 1: "IF segment type is not a conforming or nonconforming code segment or
 * call gate THEN #GP(segment selector)"; whether a code segment has L and D comes before whether it is present.
 * SDM vol. 3A, "Task Management in 64-bit Mode": "The processor issues a general-protection exception (#GP) if the following is
 * attempted in 64-bit mode: control transfer to a TSS or a task gate using JMP, CALL, INTn, or interrupt; an IRET with
 * EFLAGS.NT (nested task) set to 1". An error code of the IDT: index, IDT, and EXT unless INT n was it (6.13).
 */
.include "long.inc"
.set LD_ABSENT, 0x60
.set L_ABSENT, 0x68
.set LD_PRESENT, 0x70
.set FREE_TSS, 0x80
.set TASK_GATE, 0x90
.set TASK_GATE_ABSENT, 0x98
.set POINTER, VARS + 0x80
.macro DESCRIPTOR selector, value
    mov rax, \value
    mov [GDT + \selector], rax
.endm
.macro BACK selector
    TRY "lea rax, [rip + 9901f]; push \selector; push rax; .byte 0x48, 0xCB; 9901:"
.endm
.macro FAR selector
    mov dword ptr [POINTER], offset test_long
    mov word ptr [POINTER + 4], \selector
    TRY "call fword ptr [POINTER]"
    TRY "jmp fword ptr [POINTER]"
.endm
test_long:
    DESCRIPTOR LD_ABSENT, 0x006F1B000000FFFF
    DESCRIPTOR L_ABSENT, 0x002F1B000000FFFF
    DESCRIPTOR LD_PRESENT, 0x006F9B000000FFFF
    DESCRIPTOR FREE_TSS, 0x0000890030000067
    DESCRIPTOR FREE_TSS + 8, 0
    DESCRIPTOR TASK_GATE, 0x0000850000800000
    DESCRIPTOR TASK_GATE_ABSENT, 0x0000050000800000
    SAY "retf: L and D, absent; L alone, absent; L and D\n"
    BACK LD_ABSENT
    BACK L_ABSENT
    BACK LD_PRESENT
    SAY "call, jmp: L and D, absent; L alone, absent\n"
    FAR LD_ABSENT
    FAR L_ABSENT
    SAY "call, jmp: TSS, busy TSS, task gate, absent task gate\n"
    FAR FREE_TSS
    FAR TR
    FAR TASK_GATE
    FAR TASK_GATE_ABSENT
    SAY "gates of the IDT: INT n, a fault, an absent one\n"
    mov dword ptr [IDT + 0x60 * 16], FREE_TSS << 16
    mov word ptr [IDT + 0x60 * 16 + 4], 0x8500
    TRY "int 0x60"
    mov word ptr [IDT + 0x60 * 16 + 4], 0x0500
    TRY "int 0x60"
    mov byte ptr [IDT + 6 * 16 + 5], 0x85
    TRY "ud2"
    mov byte ptr [IDT + 6 * 16 + 5], 0x8E
    SAY "iret with NT\n"
    TRY "pushfq; or dword ptr [rsp], 0x4000; popfq; iretq"
    EXIT 0
