/* What stays of a runner: one page, read and executed by both halves, written by none. stub.c copies it to RUNNER_GATE, so it
 * knows no address but those of layout.h. Guest code can jump to any byte of it: what follows a stop believes no register. */
#include "soft/direct/layout.h"

	.section .rodata
	.globl gate_begin, gate_end, gate_handler, gate_mapper

gate_begin:
	ud2 /* RUNNER_REST */
	.balign 16
/* The guest half's handler of all signals, with all signals blocked, on a stack in the frame's pages. It stands in the system
 * call until the core answers it, having told what no signal frame holds: the bases and selectors of the data segments. */
gate_handler:
	rdfsbase %rdi
	rdgsbase %rsi
	mov %gs, %edx
	mov %fs, %eax
	shl $16, %rdx
	or %rax, %rdx
	mov %es, %eax
	shl $16, %rdx
	or %rax, %rdx
	mov %ds, %eax
	shl $16, %rdx
	or %rax, %rdx
	mov %rsp, %r8
	movabs $RUNNER_MAGIC, %r10
	mov $RUNNER_STOP, %eax
	syscall
/* The core answered: return by the frame that it has filled in. */
	movabs $RUNNER_COMMANDS, %rbx
	mov PAGE_STACK(%rbx), %rsp
	xor %eax, %eax
	test %rdx, %rdx
	jz 1f
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %fs
	mov %eax, %gs
1:	mov PAGE_FS(%rbx), %rax
	wrfsbase %rax
	mov PAGE_GS(%rbx), %rax
	wrgsbase %rax
	pushq PAGE_FLAGS(%rbx)
	popfq
	lea 8(%rsp), %rsp
	movabs $RUNNER_MAGIC, %r10
	mov $RUNNER_RETURN, %eax
	syscall
	ud2

/* The mapper waits for a turn and carries out its commands, with everything in registers. If one fails, the mapper ends. */
gate_mapper:
	movabs $RUNNER_COMMANDS, %r14
	xor %ebp, %ebp
2:	mov $202, %eax /* futex(turn, FUTEX_WAIT, the last turn, no timeout) */
	mov %r14, %rdi
	xor %esi, %esi
	mov %ebp, %edx
	xor %r10d, %r10d
	syscall
	mov (%r14), %eax
	cmp %ebp, %eax
	je 2b
	mov %eax, %ebp
	mov PAGE_COUNT(%r14), %r12
	lea PAGE_LIST(%r14), %rbx
3:	test %r12, %r12
	jz 4f
	mov (%rbx), %rax
	mov 8(%rbx), %rdi
	mov 16(%rbx), %rsi
	mov 24(%rbx), %rdx
	mov 32(%rbx), %r10
	mov 40(%rbx), %r8
	mov 48(%rbx), %r9
	syscall
	cmp $-4095, %rax
	jae 6f
	add $56, %rbx
	dec %r12
	jmp 3b
4:	cmpl $0, PAGE_RESUME(%r14)
	je 5f
	mov $16, %eax /* ioctl(): the guest half goes on */
	mov $RUNNER_LISTENER_FD, %edi
	mov $RUNNER_ANSWER, %esi
	lea PAGE_ANSWER(%r14), %rdx
	syscall
	jmp 2b
5:	movabs $RUNNER_FRAME, %rdi
	mov %ebp, (%rdi)
	mov $202, %eax /* futex(done, FUTEX_WAKE, 1) */
	mov $1, %esi
	mov $1, %edx
	syscall
	jmp 2b
6:	ud2
gate_end:
	.section .note.GNU-stack, "", @progbits
