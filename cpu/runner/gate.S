/* What stays of a runner: one page, read and executed by both halves, written by none. stub.c copies it to RUNNER_GATE, so it
 * knows no address but the page of commands. */
	.section .rodata
	.globl gate_begin, gate_end, gate_guest, gate_mapper

gate_begin:
/* The guest half stops here for the first time; from then on the core sets its registers before it goes on. */
gate_guest:
	int3
	ud2

/* The mapper stops here, and goes on when there are commands. Stopping at int3 again tells that all were done; stopping at ud2
 * that the one which RBX points to failed, with RAX. */
gate_mapper:
	int3
	movabs $0x6A0000001000, %rbx
	mov (%rbx), %r12
	add $8, %rbx
1:	test %r12, %r12
	jz gate_mapper
	mov (%rbx), %rax
	mov 8(%rbx), %rdi
	mov 16(%rbx), %rsi
	mov 24(%rbx), %rdx
	mov 32(%rbx), %r10
	mov 40(%rbx), %r8
	mov 48(%rbx), %r9
	syscall
	cmp $-4095, %rax
	jae 2f
	add $56, %rbx
	dec %r12
	jmp 1b
2:	ud2
gate_end:
	.section .note.GNU-stack, "", @progbits
