/* Hostile programs for a guest whose user code runs natively: they know where a runner's own pages are and which calls it has
 * (cpu/soft/direct/layout.h). Each attack runs in a child, which must end; afterwards the parent must still compute and call its kernel
 * rightly. Prints a line for each attack and "done"; with a name only that one. Static, x86-64 Linux. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "soft/direct/layout.h"

enum { PAGE = 4096, HOSTILE_MS = 200, HONEST_MS = 60000, GATE_BYTES = 0x130 /* gate.S, rounded up */ };
#define FRAME ((volatile uint8_t *)RUNNER_FRAME)

static uint64_t seed = 88172645463325252u;
static uint64_t any(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

/* A system call with the runner's magic number and with r8 of one's own. */
static long special(long number, long a, long b, long c, long e)
{
    register uint64_t r10 __asm__("r10") = RUNNER_MAGIC;
    register long r8 __asm__("r8") = e;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
    return result;
}
static void stop(void) { special(RUNNER_STOP, 0, 0, 0, RUNNER_FRAME); }

/* struct rt_sigframe's parts: offsets in Linux's x86-64 ABI. */
enum { F_STACK = 24, F_STACK_FLAGS = 32, F_STACK_SIZE = 40, F_REGISTERS = 48, F_RSP = 168, F_RIP = 176, F_FLAGS = 184, F_CS = 192,
       F_SS = 198, F_BLOCKED = 304, F_SIGNAL = 312, F_CODE = 320, F_ADDRESS = 328, F_BYTES = 1024 };
static _Alignas(64) uint8_t made[F_BYTES], stack[65536];
static void set(unsigned offset, uint64_t value) { memcpy(made + offset, &value, 8); }
static void make_frame(void (*to)(void))
{
    memset(made, 0, sizeof made);
    set(F_RSP, (uint64_t)(stack + sizeof stack - 8));
    set(F_RIP, (uint64_t)to);
    set(F_FLAGS, 0x202);
    set(F_CS, 0x33 | 0x2Bull << 48);
}
static void return_by_frame(void)
{
    __asm__ volatile("mov %0, %%rsp; movabs %1, %%r10; mov $15, %%eax; syscall"
                     : : "r"(made + 8), "i"(RUNNER_MAGIC) : "memory");
    __builtin_unreachable();
}

static void spin(void)
{
    for (;;)
        __asm__ volatile("");
}
static void fault_and_call(void)
{
    for (unsigned i = 0; i < 8; i++) {
        syscall(SYS_getppid);
        *(volatile uint8_t *)mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) = 1;
    }
    _exit(0);
}

/* ---- the attacks ---- */

static void forge_stops(unsigned n)
{
    while (n--)
        stop();
}

static void forge_frames(unsigned n)
{
    for (unsigned round = 0; round < 200 + n; round++) {
        for (unsigned i = 0; i < RUNNER_FRAME_BYTES; i++)
            FRAME[i] = (uint8_t)(round & 1 ? any() : 0xFF);
        stop();
    }
}

/* In each place a frame can have, claims about an address of the kernel, of nothing, and of ours. */
static void claim(unsigned n)
{
    static const uint64_t addresses[] = {0xFFFFFFFF81000000, 0x8000000000000000, RUNNER_GATE, RUNNER_COMMANDS, 0, 0x10000000};
    for (unsigned at = RUNNER_STACK_OFFSET; at + 512 < RUNNER_FRAME_BYTES; at += 8) {
        make_frame(n & 8 ? (void (*)(void))addresses[at / 8 % 6] : fault_and_call);
        set(F_SIGNAL, (unsigned)(n & 1 ? SIGSEGV : SIGSYS));
        set(F_CODE, 1 + (n >> 1 & 1));
        set(F_ADDRESS, addresses[n % 6]);
        for (unsigned i = 0; i < 512; i++)
            FRAME[at + i] = made[i];
    }
    special(RUNNER_STOP, n & 4 ? (long)any() : 0, 0, (long)any(), RUNNER_FRAME);
}

static void jump(unsigned offset)
{
    __asm__ volatile("mov %0, %%rax; movabs %1, %%rbx; mov %%rbx, %%r14; mov %%rbx, %%rdi; mov $1, %%r12; mov $9, %%ebp; jmp *%%rax"
                     : : "r"(RUNNER_GATE + (uint64_t)offset), "i"(RUNNER_FRAME) : "memory");
}

static void step_into(unsigned offset)
{
    signal(SIGTRAP, SIG_IGN);
    __asm__ volatile("pushf; orl $0x100, (%%rsp); popf" : : : "memory", "cc");
    jump(offset);
}

/* All signals blocked, for good: nothing but its end can stop it. */
static void deaf(unsigned n)
{
    make_frame(n ? fault_and_call : spin);
    set(F_BLOCKED, ~0ul);
    return_by_frame();
}

static void move_stack(unsigned n)
{
    static const uint64_t places[] = {0, RUNNER_GATE, RUNNER_COMMANDS, 0x7000000000, (uint64_t)-PAGE, 8};
    make_frame(fault_and_call);
    set(F_STACK, n < 6 ? places[n] : (uint64_t)stack);
    set(F_STACK_SIZE, n & 8 ? 64 : 32768);
    set(F_STACK_FLAGS, n & 1 ? 1u << 31 : n & 16 ? 2 : 0);
    return_by_frame();
}

static void random_frames(unsigned n)
{
    make_frame(fault_and_call);
    for (unsigned i = 0; i < 4 + n; i++)
        set((unsigned)(any() % (F_ADDRESS / 8)) * 8, any() >> (any() & 63));
    return_by_frame();
}

static void odd_segments(unsigned n)
{
    static const uint16_t code[] = {0x23, 0x33, 0x10, 0, 0xFFFF, 0x2B, 7, 0x3B};
    make_frame(fault_and_call);
    set(F_CS, code[n & 7] | (uint64_t)code[n >> 3 & 7] << 48);
    return_by_frame();
}

static void calls(unsigned n)
{
    static const uint32_t other[] = {0, 0x40000000, 0x80000000};
    for (unsigned number = 335; number < 1100; number++)
        if (number != 435 && number != RUNNER_STOP) /* clone3() copies the child */
            special((long)(number | other[n % 3]), (long)RUNNER_FRAME, (long)RUNNER_COMMANDS, 7, (long)RUNNER_GATE);
    register uint64_t r10 __asm__("r10") = RUNNER_MAGIC;
    uint64_t id = 20;
    __asm__ volatile("int $0x80" : "+a"(id) : "r"(r10) : "memory");
    _exit(id != (uint64_t)getpid());
}

static void overwrite(unsigned n)
{
    double sum = 0;
    for (unsigned i = 1; i < 3000; i++) { /* honest but for that: its results must be right */
        FRAME[any() % RUNNER_FRAME_BYTES] = (uint8_t)any();
        if (i % 512 == n)
            for (unsigned k = 0; k < RUNNER_FRAME_BYTES; k++)
                FRAME[k] = (uint8_t)(n + k);
        sum += 1.0 / i;
        if (syscall(SYS_getpid) <= 0)
            _exit(1);
    }
    _exit(!(sum > 8.58 && sum < 8.59));
}

/* Stand in a stop that is no handler's while the program ends: the core believes the claim that it called exit(). Whoever gets the
 * runner next must not go on here, with these registers. */
static volatile pid_t attacker; /* 0 in all other programs */
static __attribute__((noreturn, used)) void in_another_program(void)
{
    static const char words[] = "IN ANOTHER PROGRAM\n";
    if (!attacker)
        syscall(SYS_write, 1, words, sizeof words - 1);
    _exit(99);
}
extern const char just_called[];
static uint64_t gate_stop(void) /* where the gate's own code stops */
{
    static const uint8_t there[] = {0xB8, RUNNER_STOP & 0xFF, RUNNER_STOP >> 8, 0, 0, 0x0F, 0x05};
    const uint8_t *gate = (const uint8_t *)RUNNER_GATE;
    for (unsigned i = 0; i < GATE_BYTES; i++)
        if (memcmp(gate + i, there, sizeof there) == 0)
            return RUNNER_GATE + i + 5;
    return (uint64_t)just_called;
}
static void leave_standing(unsigned n)
{
    uint64_t at = n & 1 ? gate_stop() : (uint64_t)just_called;
    attacker = getpid();
    if (n & 2) { /* no signal blocked, and the handler's stack here */
        make_frame(fault_and_call);
        set(F_RIP, (uint64_t)&&moved);
        set(F_STACK, (uint64_t)stack);
        set(F_STACK_SIZE, sizeof stack);
        return_by_frame();
    }
moved:
    for (unsigned frame = RUNNER_STACK_OFFSET; frame + 512 < RUNNER_FRAME_BYTES; frame += 8) {
        make_frame(in_another_program);
        set(F_RIP, (uint64_t)just_called + 2);
        set(F_REGISTERS + 13 * 8, SYS_exit);
        set(F_SIGNAL, SIGSYS);
        for (unsigned i = 0; i < 512; i++)
            FRAME[frame + i] = made[i];
    }
    __asm__ volatile("mov %0, %%rcx; lea stack+65528(%%rip), %%rsp; movabs %1, %%r10; mov %2, %%eax; xor %%edx, %%edx\n\t"
                     "test %3, %3; jz 1f; pushf; orl $0x100, (%%rsp); popf\n1:\tjmp *%%rcx\n"
                     "just_called:\tsyscall\n\tjmp in_another_program"
                     : : "r"(at), "i"(RUNNER_MAGIC), "i"(RUNNER_STOP), "r"(n & 4) : "memory");
    __builtin_unreachable();
}
/* Programs after it: each has a runner sooner or later. */
static bool others_are_sound(const sigset_t *child_ends)
{
    bool sound = true;
    for (unsigned i = 0; i < 12; i++) {
        pid_t child = fork();
        if (!child) {
            volatile double sum = 0;
            for (unsigned k = 1; k < 100000; k++)
                sum += 1.0 / k;
            _exit(getppid() > 0 && sum > 12.0901 && sum < 12.0902 ? 7 : 1);
        }
        int status;
        sound &= waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7;
        sigtimedwait(child_ends, NULL, &(struct timespec){0});
    }
    return sound;
}

enum { HOSTILE, HONEST };
static const struct {
    const char *name;
    void (*run)(unsigned);
    unsigned times, step, kind;
} attacks[] = {
    {"forged stops", forge_stops, 3, 50, HOSTILE},
    {"forged frames", forge_frames, 3, 1, HOSTILE},
    {"claims", claim, 16, 1, HOSTILE},
    {"jumps", jump, GATE_BYTES / 3, 3, HOSTILE},
    {"steps", step_into, 24, 13, HOSTILE},
    {"deaf", deaf, 2, 1, HOSTILE},
    {"moved stack", move_stack, 24, 1, HOSTILE},
    {"random frames", random_frames, 30, 1, HOSTILE},
    {"segments", odd_segments, 32, 3, HOSTILE},
    {"calls", calls, 3, 1, HONEST},
    {"overwritten", overwrite, 3, 21, HONEST},
    {"left standing", leave_standing, 8, 1, HOSTILE},
};

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    pid_t self = getpid();
    sigset_t child_ends;
    sigemptyset(&child_ends);
    sigaddset(&child_ends, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child_ends, NULL);
    for (unsigned a = 0; a < sizeof attacks / sizeof attacks[0]; a++) {
        if (argc > 1 && strcmp(argv[1], attacks[a].name) != 0)
            continue;
        unsigned ended = 0;
        for (unsigned i = 0; i < attacks[a].times; i++) {
            pid_t child = fork();
            if (!child) {
                seed += i * 7919 + a;
                attacks[a].run(i * attacks[a].step);
                _exit(0);
            }
            /* Where the core executed it the guest's kernel did what it says, and the child may be deaf to all but this. */
            int status;
            unsigned ms = attacks[a].kind == HONEST ? HONEST_MS : HOSTILE_MS;
            sigtimedwait(&child_ends, NULL, &(struct timespec){ms / 1000, ms % 1000 * 1000000});
            kill(child, SIGKILL);
            ended += waitpid(child, &status, 0) == child && (attacks[a].kind == HOSTILE || (WIFEXITED(status) && !WEXITSTATUS(status)));
        }
        double sum = 0;
        for (unsigned i = 1; i < 100000; i++)
            sum += 1.0 / i;
        printf("%s: %u of %u as expected, %s\n", attacks[a].name, ended, attacks[a].times,
               getpid() == self && sum > 12.0901 && sum < 12.0902 && others_are_sound(&child_ends) ? "sound" : "DAMAGED");
    }
    puts("done");
    return 0;
}
