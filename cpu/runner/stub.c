/* The program that becomes a runner: two processes with one address space, in which guest code is executed natively.
 *
 * The *guest half* executes guest code. It has no descriptor, and a seccomp filter that allows it two calls: to stop, in which
 * it stands until the core answers, and to return from a signal. Everything else, as every fault, is a signal whose handler,
 * in the gate, stops.
 * The *mapper* changes the address space. It executes only the few instructions of gate.S, in a page that nobody can
 * write; takes its commands from a page that is read-only in this address space; keeps everything in registers; and its
 * filter allows the calls that it is for: mapping the one descriptor that is guest memory, waiting for a turn, and answering the
 * guest half's stop.
 *
 * What this file does happens before any guest code is there. It ends with the guest half stopped and the mapper waiting in the
 * gate; the core then has the mapper unmap everything else, this program included. No libc: there must be nothing left to attack.
 */
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/hw_breakpoint.h>
#include <linux/landlock.h>
#include <linux/perf_event.h>
#include <linux/prctl.h>
#include <linux/resource.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/close_range.h>
#include <asm/prctl.h>
#include <asm/unistd.h>
#include <stddef.h>
#include <stdint.h>

#include "soft/direct/layout.h"

enum { PROT_READ = 1, PROT_WRITE = 2, PROT_EXEC = 4, MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_FIXED = 16, MAP_ANONYMOUS = 32,
       MAP_POPULATE = 0x8000, PAGE = 4096, KILL = 9, SIGNALS = 64, SIG_STOP = 19 };
enum { SOCKET = 1, RIGHTS = 1 };
#define HANDLER_FLAGS 0x0C000004ul /* SA_ONSTACK, SA_RESTORER (no signal returns so), SA_SIGINFO */

extern const char gate_begin[], gate_end[], gate_mapper[], gate_handler[];

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

/* Of the guest half: a stop, and a return from a signal, both with the magic number; all else becomes SIGSYS, the guest's calls
 * among it. The numbers and arguments decide, not where the call is: guest code can jump into the gate. A forged stop stops,
 * and a forged return sets what guest code can set by itself, or ends in its next signal killing it. */
enum { TRAP = 10 };
static const struct sock_filter guest_filter[] = {
    [0] = LOAD(FIELD(arch)),
    [1] = SAME(1, AUDIT_ARCH_X86_64, 2, TRAP),
    [2] = LOAD(LOW(3)),
    [3] = SAME(3, RUNNER_MAGIC_LOW, 4, TRAP),
    [4] = LOAD(HIGH(3)),
    [5] = SAME(5, RUNNER_MAGIC_HIGH, 6, TRAP),
    [6] = LOAD(FIELD(nr)),
    [7] = SAME(7, RUNNER_STOP, 11, 8),
    [8] = SAME(8, RUNNER_RETURN, 9, TRAP),
    [9] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    [TRAP] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
    [11] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
};

/* Of the mapper: munmap(), mprotect() to what is no new kind of right, mmap() of the one descriptor at a fixed address, FUTEX_WAIT
 * and FUTEX_WAKE, and the one ioctl(). Which addresses is the core's affair, whose commands these are. */
enum { FUTEX = 17, ANSWER = 21, PROTECTION = 25, REFUSE = 29, ALLOW = 30 };
static const struct sock_filter mapping[] = {
    [0] = LOAD(FIELD(arch)),
    [1] = SAME(1, AUDIT_ARCH_X86_64, 2, REFUSE),
    [2] = LOAD(FIELD(nr)),
    [3] = SAME(3, __NR_futex, FUTEX, 4),
    [4] = SAME(4, __NR_munmap, ALLOW, 5),
    [5] = SAME(5, __NR_ioctl, ANSWER, 6),
    [6] = SAME(6, __NR_mprotect, PROTECTION, 7),
    [7] = SAME(7, __NR_mmap, 8, REFUSE),
    [8] = LOAD(LOW(4)),
    [9] = SAME(9, RUNNER_MEMORY_FD, 10, REFUSE),
    [10] = LOAD(HIGH(4)),
    [11] = SAME(11, 0, 12, REFUSE),
    [12] = LOAD(LOW(3)),
    [13] = BPF_STMT(BPF_ALU | BPF_AND | BPF_K, ~(uint32_t)MAP_POPULATE),
    [14] = SAME(14, MAP_SHARED | MAP_FIXED, 15, REFUSE),
    [15] = LOAD(HIGH(3)),
    [16] = SAME(16, 0, PROTECTION, REFUSE),
    [FUTEX] = LOAD(HIGH(1)),
    [18] = SAME(18, 0, 19, REFUSE),
    [19] = LOAD(LOW(1)),
    [20] = BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, FUTEX_WAKE, REFUSE - 21, ALLOW - 21),
    [ANSWER] = LOAD(LOW(0)),
    [22] = SAME(22, RUNNER_LISTENER_FD, 23, REFUSE),
    [23] = LOAD(LOW(1)),
    [24] = SAME(24, RUNNER_ANSWER, ALLOW, REFUSE),
    [PROTECTION] = LOAD(LOW(2)),
    [26] = BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, ~(uint32_t)(PROT_READ | PROT_WRITE | PROT_EXEC), REFUSE - 27, 0),
    [27] = LOAD(HIGH(2)),
    [28] = SAME(28, 0, ALLOW, REFUSE),
    [REFUSE] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    [ALLOW] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
};

static long filter(const struct sock_filter *lines, unsigned count, long flags)
{
    const struct sock_fprog program = {.len = (unsigned short)count, .filter = (struct sock_filter *)lines};
    return CALL(__NR_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program, 0);
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

static long in_gate(const char *line) { return RUNNER_GATE + (line - gate_begin); }

static long flags;
static int listener;      /* the guest half's, in the descriptor table that it still shares; or -errno */
static uint32_t listening; /* it is known, and these are, which are as many as the host gave: */
static int breakpoints[RUNNER_BREAKPOINTS];
static unsigned breakpoint_count;
static char stack[4096] __attribute__((aligned(16)));

/* All signals end in the gate. */
static void handle_signals(void)
{
    const struct { uint64_t handler, flags, restorer, blocked; } action = {
        (uint64_t)in_gate(gate_handler), HANDLER_FLAGS, (uint64_t)in_gate(gate_handler), ~0ull};
    const struct { uint64_t base; int32_t flags; uint64_t size; } alternate = {
        RUNNER_STACK, RUNNER_STACK_FLAGS, RUNNER_STACK_BYTES};
    for (long i = 1; i <= SIGNALS; i++)
        if (i != KILL && i != SIG_STOP && CALL(__NR_rt_sigaction, i, &action, 0, 8) < 0)
            fail(10);
    if (CALL(__NR_sigaltstack, &alternate, 0, 0, 0) < 0)
        fail(11);
}

/* Execution breakpoints of this process, for the core to set (cpu/soft/direct/guard.c). A process may have its own, where others
 * may not give them to it. All or none; none of them stops anything before the core says where. */
static void open_breakpoints(void)
{
    const struct perf_event_attr attributes = RUNNER_BREAKPOINT(RUNNER_FRAME, 1);
    unsigned *n = &breakpoint_count;
    while (*n < RUNNER_BREAKPOINTS && (breakpoints[*n] = (int)call(__NR_perf_event_open, (long)&attributes, 0, -1, -1, 0, 0)) >= 0)
        ++*n;
    while (*n && *n < RUNNER_BREAKPOINTS)
        CALL(__NR_close, breakpoints[--*n], 0, 0, 0);
}

__attribute__((used)) void guest_half(void)
{
    CALL(__NR_prctl, PR_SET_PDEATHSIG, KILL, 0, 0);
    handle_signals();
    if (((const volatile struct runner_page *)RUNNER_COMMANDS)->count)
        open_breakpoints();
    long fd = filter(guest_filter, sizeof guest_filter / sizeof guest_filter[0],
                     SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV);
    listener = (int)fd;
    __atomic_store_n(&listening, 1, __ATOMIC_SEQ_CST);
    /* The only stop that is carried out: this process gets a table of descriptors of its own with none in it. */
    call(RUNNER_STOP, 0, ~0u, CLOSE_RANGE_UNSHARE, (long)RUNNER_MAGIC, 0, 0);
    __asm__ volatile("int3");
    __builtin_trap();
}

/* Clone the guest half: another process with this memory and, at first, these descriptors, whose parent is this one's. It begins
 * on a stack of its own. */
static long clone_guest_half(void)
{
    long how = CLONE_VM | CLONE_PARENT | CLONE_FILES, pid;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "call guest_half\n\t"
                     "ud2\n"
                     "1:"
                     : "=a"(pid)
                     : "a"((long)__NR_clone), "D"(how), "S"(stack + sizeof stack), "d"(0L)
                     : "rcx", "r11", "memory");
    return pid;
}

/* To the core go the descriptor on which the guest half's stops arrive, and those of its breakpoints; the mapper keeps the former, and
 * that of guest memory. */
static void send_listener(long guest)
{
    const struct { long s, ns; } soon = {0, 50000};
    while (!__atomic_load_n(&listening, __ATOMIC_SEQ_CST))
        CALL(__NR_nanosleep, &soon, 0, 0, 0); /* the filter lets the guest half wake nobody */
    int fd = listener;
    struct runner_hello hello = {guest, (uint64_t)flags};
    struct { void *base; uint64_t size; } piece = {&hello, sizeof hello};
    struct { uint64_t size; int32_t level, type, fd[1 + RUNNER_BREAKPOINTS + 1]; } rights = {
        16 + (1 + breakpoint_count) * sizeof(int), SOCKET, RIGHTS, {fd}};
    for (unsigned i = 0; i < breakpoint_count; i++)
        rights.fd[1 + i] = breakpoints[i];
    struct {
        void *name;
        uint64_t name_size;
        void *pieces;
        uint64_t count;
        void *control;
        uint64_t control_size, flags;
    } message = {0, 0, &piece, 1, &rights, (rights.size + 7) & ~7ul, 0};
    if (fd < 0) { /* why: the core tells the user */
        hello.guest = fd;
        message.control = 0;
        message.control_size = 0;
    }
    if (CALL(__NR_sendmsg, RUNNER_SOCKET_FD, &message, 0, 0) < 0 || fd < 0)
        fail(12);
    if (fd != RUNNER_LISTENER_FD && CALL(__NR_dup3, fd, RUNNER_LISTENER_FD, 0, 0) < 0)
        fail(13);
    CALL(__NR_close_range, RUNNER_LISTENER_FD + 1, ~0u, 0, 0);
    CALL(__NR_close_range, 0, RUNNER_MEMORY_FD - 1, 0, 0);
    CALL(__NR_close_range, RUNNER_MEMORY_FD + 1, RUNNER_LISTENER_FD - 1, 0, 0);
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
    /* Of both halves, though only one executes guest code: what differs between them is changed at each switch. */
    if (CALL(__NR_prctl, PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0) == 0)
        flags |= RUNNER_NO_TSC;
    if (CALL(__NR_arch_prctl, ARCH_SET_CPUID, 0, 0, 0) == 0)
        flags |= RUNNER_CPUID_FAULTS;
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_FSIZE, 0);
    limit(RLIMIT_MEMLOCK, 0);
    limit(RLIMIT_MSGQUEUE, 0);
    flags |= forbid_files();

    char *gate = (char *)CALL(__NR_mmap, RUNNER_GATE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS);
    if (gate != (char *)RUNNER_GATE)
        fail(2);
    for (long i = 0; i < gate_end - gate_begin; i++)
        gate[i] = gate_begin[i];
    if (CALL(__NR_mprotect, RUNNER_GATE, PAGE, PROT_READ | PROT_EXEC, 0) < 0)
        fail(3);
    if (call(__NR_mmap, RUNNER_COMMANDS, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, RUNNER_PAGES_FD, 0) != RUNNER_COMMANDS ||
        call(__NR_mmap, RUNNER_FRAME, RUNNER_FRAME_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE,
             RUNNER_PAGES_FD, PAGE) != RUNNER_FRAME)
        fail(4);
    if (CALL(__NR_close, RUNNER_PAGES_FD, 0, 0, 0) < 0)
        fail(5);
    long guest = clone_guest_half();
    if (guest < 0)
        fail(7);
    send_listener(guest);
    if (filter(mapping, sizeof mapping / sizeof mapping[0], 0) < 0)
        fail(8);
    __asm__ volatile("jmp *%0" : : "r"(in_gate(gate_mapper)) : "memory");
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall begin\n\tud2\n");
