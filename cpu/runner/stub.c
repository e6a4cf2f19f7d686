/* The program that becomes a runner: two processes with one address space, in which guest code is executed natively.
 *
 * The *guest half* executes guest code. It has no descriptor, a seccomp filter that allows no system call at all, and a
 * tracer (the core's thread) that sees every system call, fault and signal before anything comes of it.
 * The *mapper* changes the address space. It executes only the few instructions of gate.S, in a page that nobody can
 * write; takes its commands from a page that is read-only in this address space; keeps everything in registers; and its
 * filter allows the three calls that it is for, on the one descriptor that it has.
 *
 * What this file does happens before any guest code is there. It ends with both halves stopped in the gate; the core then
 * has the mapper unmap everything else, this program included. No libc: there must be nothing left to attack.
 */
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/prctl.h>
#include <linux/resource.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <asm/prctl.h>
#include <asm/unistd.h>
#include <stddef.h>
#include <stdint.h>

#include "soft/direct/layout.h"

enum { PROT_READ = 1, PROT_WRITE = 2, PROT_EXEC = 4, MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_FIXED = 16, MAP_ANONYMOUS = 32,
       MAP_POPULATE = 0x8000, PAGE = 4096, TRACE_ME = 0, KILL = 9 };

extern const char gate_begin[], gate_end[], gate_mapper[], gate_guest[];

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}
#define CALL(number, a, b, c, d) call(number, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

static void fail(int step)
{
    CALL(__NR_exit_group, step, 0, 0, 0);
    __builtin_trap();
}


#define LOAD(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (offset))
#define FIELD(name) offsetof(struct seccomp_data, name)
#define LOW(n) (offsetof(struct seccomp_data, args) + 8 * (n))
#define HIGH(n) (LOW(n) + 4)
/* At line `at` of a filter: if the accumulator is `value`, go on at line `yes`, else at `no`. */
#define SAME(at, value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), (yes) - (at) - 1, (no) - (at) - 1)

/* Of the guest half: every call is a trap, which the tracer sees as SIGSYS (and most it sees before, as a stop). */
static const struct sock_filter nothing[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP)};

/* Of the mapper: munmap(), mprotect() to what is no new kind of right, and mmap() of the one descriptor at a fixed address. Which
 * addresses is the core's affair, whose commands these are. */
enum { PROTECTION = 15, REFUSE = 19, ALLOW = 20 };
static const struct sock_filter mapping[] = {
    [0] = LOAD(FIELD(arch)),
    [1] = SAME(1, AUDIT_ARCH_X86_64, 2, REFUSE),
    [2] = LOAD(FIELD(nr)),
    [3] = SAME(3, __NR_munmap, ALLOW, 4),
    [4] = SAME(4, __NR_mprotect, PROTECTION, 5),
    [5] = SAME(5, __NR_mmap, 6, REFUSE),
    [6] = LOAD(LOW(4)),
    [7] = SAME(7, RUNNER_MEMORY_FD, 8, REFUSE),
    [8] = LOAD(HIGH(4)),
    [9] = SAME(9, 0, 10, REFUSE),
    [10] = LOAD(LOW(3)),
    [11] = BPF_STMT(BPF_ALU | BPF_AND | BPF_K, ~(uint32_t)MAP_POPULATE),
    [12] = SAME(12, MAP_SHARED | MAP_FIXED, 13, REFUSE),
    [13] = LOAD(HIGH(3)),
    [14] = SAME(14, 0, PROTECTION, REFUSE),
    [PROTECTION] = LOAD(LOW(2)),
    [16] = BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, ~(uint32_t)(PROT_READ | PROT_WRITE | PROT_EXEC), REFUSE - 17, 0),
    [17] = LOAD(HIGH(2)),
    [18] = SAME(18, 0, ALLOW, REFUSE),
    [REFUSE] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    [ALLOW] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
};

static void filter(const struct sock_filter *lines, unsigned count, int step)
{
    const struct sock_fprog program = {.len = (unsigned short)count, .filter = (struct sock_filter *)lines};
    if (CALL(__NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program, 0) < 0)
        fail(step);
}

static void limit(int what, uint64_t value)
{
    const struct rlimit64 { uint64_t soft, hard; } limits = {value, value};
    CALL(__NR_prlimit64, 0, what, &limits, 0);
}

/* No file may be opened, made or changed any more; which older hosts cannot forbid so. */
static long forbid_files(void)
{
    const struct landlock_ruleset_attr attributes = {.handled_access_fs = (1 << 13) - 1}; /* all of the first version */
    long fd = CALL(__NR_landlock_create_ruleset, &attributes, 8, 0, 0);
    if (fd < 0)
        return 0;
    long r = CALL(__NR_landlock_restrict_self, fd, 0, 0, 0);
    CALL(__NR_close, fd, 0, 0, 0);
    return r < 0 ? 0 : RUNNER_LANDLOCK;
}

/* Go to a line of the gate's code, with what the core reads of the first stop. */
static _Noreturn void enter_gate(const char *line, long rbx, long rcx)
{
    __asm__ volatile("jmp *%0" : : "r"(RUNNER_GATE + (uint64_t)(line - gate_begin)), "b"(rbx), "c"(rcx) : "memory");
    __builtin_unreachable();
}

static long landlock;
static char stack[4096] __attribute__((aligned(16)));

__attribute__((used)) void guest_half(void)
{
    long have = landlock;
    CALL(__NR_prctl, PR_SET_PDEATHSIG, KILL, 0, 0);
    if (CALL(__NR_close_range, 0, ~0u, 0, 0) < 0)
        fail(10);
    if (CALL(__NR_prctl, PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0) == 0)
        have |= RUNNER_NO_TSC;
    if (CALL(__NR_arch_prctl, ARCH_SET_CPUID, 0, 0, 0) == 0)
        have |= RUNNER_CPUID_FAULTS;
    filter(nothing, sizeof nothing / sizeof nothing[0], 11);
    enter_gate(gate_guest, 0, have);
}

/* Clone the guest half: another process with this memory, whose parent and tracer are this one's. It begins on a stack of its own. */
static long clone_guest_half(void)
{
    long flags = CLONE_VM | CLONE_PARENT | CLONE_PTRACE, pid;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "call guest_half\n\t"
                     "ud2\n"
                     "1:"
                     : "=a"(pid)
                     : "a"((long)__NR_clone), "D"(flags), "S"(stack + sizeof stack), "d"(0L)
                     : "rcx", "r11", "memory");
    return pid;
}

__attribute__((used)) void begin(void)
{
    uint64_t no_signal = 0;
    CALL(__NR_prctl, PR_SET_PDEATHSIG, KILL, 0, 0);
    CALL(__NR_setsid, 0, 0, 0, 0);
    CALL(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &no_signal, 0, 8);
    if (CALL(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0) < 0)
        fail(1);
    CALL(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0);
    CALL(__NR_prctl, PR_SET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, PR_SPEC_FORCE_DISABLE, 0);
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_FSIZE, 0);
    limit(RLIMIT_MEMLOCK, 0);
    limit(RLIMIT_MSGQUEUE, 0);
    landlock = forbid_files();

    char *gate = (char *)CALL(__NR_mmap, RUNNER_GATE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS);
    if (gate != (char *)RUNNER_GATE)
        fail(2);
    for (long i = 0; i < gate_end - gate_begin; i++)
        gate[i] = gate_begin[i];
    if (CALL(__NR_mprotect, RUNNER_GATE, PAGE, PROT_READ | PROT_EXEC, 0) < 0)
        fail(3);
    if (call(__NR_mmap, (long)RUNNER_COMMANDS, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, RUNNER_COMMANDS_FD, 0) !=
        (long)RUNNER_COMMANDS)
        fail(4);
    if (CALL(__NR_close, RUNNER_COMMANDS_FD, 0, 0, 0) < 0)
        fail(5);
    if (CALL(__NR_ptrace, TRACE_ME, 0, 0, 0) < 0)
        fail(6);
    long guest = clone_guest_half();
    if (guest < 0)
        fail(7);
    filter(mapping, sizeof mapping / sizeof mapping[0], 8);
    enter_gate(gate_mapper, guest, landlock);
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall begin\n\tud2\n");
