/* Exceptions as signals: what the processor reports for each, single steps, and breakpoints that a tracer sets. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "work.h"

static sigjmp_buf back;
static uint64_t digest, of_vendor; /* what both vendors' manuals define; everything */
enum { CONDITIONS = 0x4700 /* C0 to C3: undefined after most instructions */ };

static void on_trap(int signal_number, siginfo_t *info, void *context)
{
    const ucontext_t *u = context;
    __builtin_ia32_writeeflags_u64(__builtin_ia32_readeflags_u64() & ~0x40000ull); /* AC is the interrupted code's */
    digest = mix(digest, (uint64_t)signal_number);
    digest = mix(digest, (uint64_t)info->si_code);
    digest = mix(digest, (uint64_t)u->uc_mcontext.gregs[REG_TRAPNO]);
    digest = mix(digest, (uint64_t)u->uc_mcontext.gregs[REG_ERR] & 0xFFFF);
    digest = mix(digest, u->uc_mcontext.fpregs->mxcsr);
    digest = mix(digest, u->uc_mcontext.fpregs->swd & ~(unsigned)CONDITIONS);
    of_vendor = mix(of_vendor, u->uc_mcontext.fpregs->swd);
    siglongjmp(back, 1);
}

static void handle(int signal_number, void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_NODEFER };
    sigemptyset(&action.sa_mask);
    MUST(sigaction(signal_number, &action, NULL));
}

#define EACH_TRAP(X)                                                                                                  \
    X("xorl %%ecx, %%ecx; movl $5, %%eax; cltd; divl %%ecx")                        /* #DE by zero */                 \
    X("movl $0x80000000, %%eax; cltd; movl $-1, %%ecx; idivl %%ecx")                /* #DE by overflow */             \
    X("ud2")                                                                                                          \
    X("int3")                                                                                                         \
    X("hlt")                                                                        /* #GP: privileged */             \
    X("cli")                                                                                                          \
    X("inb $0x80, %%al")                                                                                              \
    X("movq %%cr3, %%rax")                                                                                            \
    X("movl $0x10, %%ecx; rdmsr")                                                                                     \
    X("movl $0x1234, %%eax; movl %%eax, %%ds")                                      /* #GP: beyond the table */       \
    X("movq $0x4000000000000000, %%rax; movl (%%rax), %%eax")                       /* not canonical: #GP */          \
    X("pushq %%rbp; movq $0x4000000000000000, %%rbp; movl (%%rbp), %%eax")          /* not canonical: #SS */          \
    X("movaps 1(%%rsp), %%xmm0")                                                    /* not aligned: #GP */            \
    X("fninit; pushq $0x37B; fldcw (%%rsp); fld1; fldz; fdivrp; fwait")             /* x87 #Z */                      \
    X("fninit; pushq $0x37E; fldcw (%%rsp); fldz; fldz; fdivrp; fwait")             /* x87 #IA */                     \
    X("fninit; pushq $0x37E; fldcw (%%rsp); fstp %%st(3); fwait")                   /* x87 #IS */                     \
    X("fninit; pushq $0x35F; fldcw (%%rsp); fldpi; fstps (%%rsp); fwait")           /* x87 #P */                      \
    X("fninit; pushq $0x377; fldcw (%%rsp); fld1; pushq $0x3FFF; fildl (%%rsp); fscale; fxch; fscale;"                \
      "fmul %%st; fstpl (%%rsp); fwait")                                            /* x87 #O */                      \
    X("pushq $0x1D80; ldmxcsr (%%rsp); pxor %%xmm0, %%xmm0; pcmpeqd %%xmm1, %%xmm1; psrld $25, %%xmm1;"               \
      "pslld $23, %%xmm1; divps %%xmm0, %%xmm1")                                    /* SSE #Z */                      \
    X("pushq $0x1F00; ldmxcsr (%%rsp); pxor %%xmm0, %%xmm0; divps %%xmm0, %%xmm0")  /* SSE #I */                      \
    X("pushq $0x0F80; ldmxcsr (%%rsp); pushq $3; cvtsi2sdl (%%rsp), %%xmm0; sqrtsd %%xmm0, %%xmm0") /* SSE #P */

/* Each exception once. The assembler's part may leave anything in the registers it names and on the stack below. */
static uint64_t each(uint64_t seed)
{
    digest = of_vendor = seed;
#define ONE(code)                                                                                                     \
    if (!sigsetjmp(back, 1)) {                                                                                        \
        __asm__ volatile("subq $256, %%rsp; andq $-16, %%rsp; " code                                                  \
                         : : : "rax", "rcx", "rdx", "xmm0", "xmm1", "memory", "cc");                                  \
        fail("no trap: " code);                                                                                       \
    }
    EACH_TRAP(ONE)
#undef ONE
    __asm__ volatile("fninit");
    return digest;
}

/* A misaligned access with EFLAGS.AC set: #AC, BUS_ADRALN. */
static uint64_t alignment(uint64_t seed)
{
    digest = seed;
    for (volatile unsigned i = 0; i < 8; i++)
        if (!sigsetjmp(back, 1))
            __asm__ volatile("subq $256, %%rsp; pushfq; orq $0x40000, (%%rsp); popfq;"
                             "movq %0, %%rcx; addq %%rsp, %%rcx; andq $-8, %%rcx; addq %0, %%rcx; movl (%%rcx), %%eax;"
                             "pushfq; andq $~0x40000, (%%rsp); popfq; addq $256, %%rsp"
                             : : "r"((uint64_t)i) : "rax", "rcx", "memory", "cc");
    return digest;
}

/* Single steps: every instruction of a small loop is seen at its place. Both vendors: but for the repetitions of a string
 * (SDM 3B 18.3.1.4), what comes after CPUID (a hypervisor's work on some hosts), and undefined flags: AF after XOR, OF after
 * ROL, SF, ZF, AF and PF after MUL. RF is the one vendor's between two repetitions.
 */
static volatile uint64_t steps, step_digest, last_step;

extern const uint8_t stepped_begin[], stepped_cpuid[], stepped_rdtsc[], stepped_product[], stepped_end[];

enum { AF_OF_RF = 0x10810, SF_ZF_PF = 0xC4 };

static void on_step(int signal_number, siginfo_t *info, void *context)
{
    (void)signal_number;
    const greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint64_t at = (uint64_t)regs[REG_RIP] - (uint64_t)stepped_begin;
    if (at >= (uint64_t)(stepped_end - stepped_begin))
        return;
    of_vendor = mix(mix(of_vendor, at), (uint64_t)regs[REG_EFL]);
    const uint8_t *place = stepped_begin + at;
    if (place == stepped_cpuid || place == stepped_rdtsc || at == last_step)
        return;
    steps++;
    last_step = at;
    step_digest = mix(mix(step_digest, at), (uint64_t)info->si_code);
    step_digest = mix(step_digest, (uint64_t)regs[REG_EFL] & ~(uint64_t)(AF_OF_RF | (place == stepped_product ? SF_ZF_PF : 0)));
}

static uint64_t single_steps(uint64_t seed)
{
    uint64_t result = seed, count = 8 + seed % 9;
    steps = 0;
    last_step = ~0ull;
    step_digest = of_vendor = seed;
    handle(SIGTRAP, on_step);
    __asm__ volatile("subq $128, %%rsp; xorl %%eax, %%eax; pushfq; orq $0x100, (%%rsp); popfq\n"
                     "stepped_begin: 1: lea (%0,%0,2), %0; xorq $0x55, %0; pushq %0; rolq $3, (%%rsp); popq %0\n"
                     "movl $2, %%ecx; lea -16(%%rsp), %%rdi; cld; rep stosq\n"
                     "xorl %%eax, %%eax; cpuid; stepped_cpuid: rdtsc; stepped_rdtsc: movq %0, %%rax; mulq %0; stepped_product: addq %%rax, %0; movl $0, %%eax;"
                     "decq %1; jnz 1b\n"
                     "pushfq; andq $~0x100, (%%rsp); popfq; nop\n"
                     "stepped_end: addq $128, %%rsp"
                     : "+r"(result), "+r"(count) : : "rax", "rbx", "rcx", "rdx", "rdi", "memory", "cc");
    return mix(mix(step_digest, steps), result);
}

/* A traced child: breakpoints on execution and on data by debug registers, then single steps through a system call. */
static volatile uint64_t watched[4];

static __attribute__((noinline)) void touch(uint64_t n)
{
    watched[1] = n;
    watched[2] += watched[1];
    __asm__ volatile("" : : : "memory");
}

static void set_debug(pid_t pid, unsigned index, uint64_t value)
{
    MUST(ptrace(PTRACE_POKEUSER, pid, offsetof(struct user, u_debugreg) + index * 8, value));
}

static uint64_t traced(uint64_t seed)
{
    int status;
    uint64_t result = seed;
    pid_t pid = (pid_t)MUST(fork());
    if (!pid) {
        MUST(ptrace(PTRACE_TRACEME, 0, 0, 0));
        raise(SIGSTOP);
        for (unsigned i = 0; i < 6; i++)
            touch(seed + i);
        raise(SIGSTOP);
        getppid();
        _exit(17);
    }
    MUST(waitpid(pid, &status, 0));
    set_debug(pid, 0, (uint64_t)touch);
    set_debug(pid, 1, (uint64_t)&watched[2]);
    set_debug(pid, 7, 0x5 | 0xDull << 20); /* DR0: execution; DR1: writing of 8 bytes, then reading too */
    for (unsigned stops = 0; stops < 64; stops++) {
        struct user_regs_struct regs;
        MUST(ptrace(PTRACE_CONT, pid, 0, 0));
        MUST(waitpid(pid, &status, 0));
        result = mix(result, (uint64_t)status);
        if (!WIFSTOPPED(status) || WSTOPSIG(status) == SIGSTOP)
            break;
        uint64_t dr6 = (uint64_t)ptrace(PTRACE_PEEKUSER, pid, offsetof(struct user, u_debugreg) + 6 * 8, 0);
        set_debug(pid, 6, 0);
        MUST(ptrace(PTRACE_GETREGS, pid, 0, &regs));
        result = mix(result, dr6 & 0xF);
        result = mix(result, regs.rip == (uint64_t)touch);
        result = mix(result, regs.rip - (uint64_t)touch);
    }
    set_debug(pid, 7, 0);
    for (unsigned i = 0; i < 2000; i++) {
        MUST(ptrace(PTRACE_SINGLESTEP, pid, 0, 0));
        MUST(waitpid(pid, &status, 0));
        if (!WIFSTOPPED(status))
            break;
    }
    return mix(result, (uint64_t)status);
}

void work_traps(uint64_t seed)
{
    static const int numbers[] = { SIGFPE, SIGILL, SIGTRAP, SIGSEGV, SIGBUS };
    for (size_t i = 0; i < LENGTH(numbers); i++)
        handle(numbers[i], on_trap);
    report("traps", "each", each(seed));
    report_of_vendor("traps", "each", of_vendor);
    report("traps", "alignment", alignment(seed));
    report("traps", "steps", single_steps(seed));
    report_of_vendor("traps", "steps", of_vendor);
    report("traps", "traced", traced(seed));
}
