/* Guest programs whose output must be the same however they are executed: what user code can define, and what it should not be
 * able to do. `programs NAME` runs one; every line is a fact that the architecture or Linux decides. Static, x86-64 Linux. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define OURS 0x6A0000000000ul /* where a runner has two pages of its own (cpu/soft/direct/layout.h) */
enum { PAGE = 4096 };

static sigjmp_buf back;
static volatile int caught, code;
static volatile uint64_t at, address;

static void handler(int number, siginfo_t *info, void *context)
{
    __asm__ volatile("pushf; andl $~0x40000, (%%rsp); popf" : : : "memory", "cc");
    ucontext_t *u = context;
    caught = number;
    code = info->si_code;
    at = (uint64_t)u->uc_mcontext.gregs[REG_RIP];
    address = (uint64_t)info->si_addr;
    u->uc_mcontext.gregs[REG_EFL] &= ~0x44100ul; /* AC, NT, TF */
    siglongjmp(back, 1);
}

static void catch_all(void)
{
    static char stack[65536];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaltstack(&alternate, NULL);
    static const int faults[] = {SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS};
    for (unsigned i = 0; i < sizeof faults / sizeof faults[0]; i++)
        sigaction(faults[i], &action, NULL);
}

/* What STATEMENT ends with: 0 or a signal. */
#define TRY(what, STATEMENT)                                                                                                 \
    do {                                                                                                                     \
        caught = 0;                                                                                                          \
        if (!sigsetjmp(back, 1)) {                                                                                           \
            STATEMENT;                                                                                                       \
        }                                                                                                                    \
        printf("%s: signal %d\n", what, caught);                                                                             \
    } while (0)

static uint64_t mix(uint64_t h, uint64_t v) { return (h ^ v) * 0x9E3779B97F4A7C15ul + (h >> 29); }

/* ---- what the processor says of itself ---- */

static void identity(void)
{
    static const uint32_t leaves[][2] = {{0, 0}, {1, 0}, {7, 0}, {0xD, 0}, {0xD, 1}, {0x40000000, 0}, {0x80000000, 0},
                                         {0x80000001, 0}, {0x80000002, 0}, {0x80000008, 0}};
    for (unsigned i = 0; i < sizeof leaves / sizeof leaves[0]; i++) {
        uint32_t a = leaves[i][0], b = 0, c = leaves[i][1], d = 0;
        __asm__ volatile("cpuid" : "+a"(a), "+b"(b), "+c"(c), "+d"(d));
        printf("cpuid %x: %x %x %x %x\n", leaves[i][0], a, b, c, d);
    }
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    printf("xcr0 %x %x\n", low, high);
    uint64_t cs = 0, ss = 0, ds = 0, es = 0, fs = 0, gs = 0, limit = 0, ok = 0;
    __asm__ volatile("mov %%cs, %0; mov %%ss, %1; mov %%ds, %2; mov %%es, %3; mov %%fs, %4; mov %%gs, %5"
                     : "=r"(cs), "=r"(ss), "=r"(ds), "=r"(es), "=r"(fs), "=r"(gs));
    printf("selectors %lx %lx %lx %lx %lx %lx\n", cs, ss, ds, es, fs, gs);
    __asm__ volatile("lsl %2, %0; setz %b1" : "=r"(limit), "+r"(ok) : "r"(0x7Bul));
    printf("lsl 7b: %lx %lx cpu %d\n", ok ? limit : 0, ok & 1, sched_getcpu());
    static _Alignas(64) uint8_t area[4096];
    __asm__ volatile("xsavec %0" : "+m"(area) : "a"(~0u), "d"(~0u));
    printf("xcomp_bv %lx\n", *(uint64_t *)(area + 520));
    __asm__ volatile("xrstor %0" : : "m"(area), "a"(~0u), "d"(~0u));
    uint64_t before, after;
    before = __builtin_ia32_rdtsc();
    after = __builtin_ia32_rdtsc();
    printf("tsc goes on: %d\n", after >= before);
    struct timespec t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    clock_gettime(CLOCK_MONOTONIC, &t1);
    printf("time goes on: %d\n", t1.tv_sec > t0.tv_sec || t1.tv_nsec >= t0.tv_nsec);
}

/* ---- faults ---- */

/* In a page of its own, without an instruction that the core has to execute. */
__attribute__((noinline, noclone, aligned(4096))) static void trap(int what)
{
    switch (what) {
    case 0: __asm__ volatile(".global trapped_at\ntrapped_at: .byte 0xCD, 3; nop"); break;
    case 1: __asm__ volatile(".byte 0xF1; nop"); break;
    case 2: __asm__ volatile("pushf; orl $0x100, (%%rsp); popf; int3; nop" : : : "memory", "cc"); break;
    case 3: __asm__ volatile("pushf; pushf; orl $0x100, (%%rsp); popf; popf; nop; nop" : : : "memory", "cc"); break;
    default: __asm__ volatile("pushf; orl $0x100, (%%rsp); popf; nop; nop" : : : "memory", "cc");
    }
}
__attribute__((noinline, aligned(4096))) static void traps(void)
{
    static const char *const names[] = {"int 3, two bytes", "int1", "int3 in a step", "end of steps", "step"};
    extern const char trapped_at[];
    for (volatile int i = 0; i < 5; i++) {
        TRY(names[i], trap(i));
        printf("  code %d at %ld\n", code, (long)(at - (uint64_t)trapped_at));
    }
}

static void faults(void)
{
    volatile int zero = 0;
    TRY("divide", printf("%d\n", 1 / zero));
    TRY("ud2", __asm__ volatile("ud2"));
    TRY("int3", __asm__ volatile("int3"));
    traps();
    TRY("int 0x81", __asm__ volatile("int $0x81"));
    TRY("hlt", __asm__ volatile("hlt"));
    TRY("cli", __asm__ volatile("cli"));
    TRY("in", __asm__ volatile("in $0x80, %%al" : : : "rax"));
    TRY("null", *(volatile int *)8 = 1);
    printf("  address %lx code %d\n", address, code);
    TRY("not canonical", *(volatile int *)0x8000000000000000ul = 1);
    TRY("kernel read", zero = *(volatile int *)0xFFFFFFFF81000000ul);
    TRY("kernel jump", ((void (*)(void))0xFFFFFFFF81000000ul)());
    TRY("own pages, write", *(volatile int *)OURS = 1);
    TRY("own commands, write", *(volatile int *)(OURS + PAGE) = 1);
    for (volatile unsigned offset = 0; offset < 96; offset += 7)
        TRY("own pages, jump", ((void (*)(void))(OURS + offset))());
    TRY("aligned SSE", __asm__ volatile("movaps 1(%%rsp), %%xmm0" : : : "xmm0"));
    TRY("mxcsr", {
        uint32_t v = 0xFFFFFFFF;
        __asm__ volatile("ldmxcsr %0" : : "m"(v));
    });
    TRY("simd exception", {
        uint32_t v = 0x1F80 & ~0x200u;
        __asm__ volatile("ldmxcsr %0; divss %1, %%xmm0" : : "m"(v), "x"(0.0f) : "xmm0");
    });
    __asm__ volatile("ldmxcsr %0" : : "m"((uint32_t){0x1F80}));
    TRY("x87 exception", {
        uint16_t v = 0x37B;
        __asm__ volatile("fldcw %0; fldz; fld1; fdivp; fwait" : : "m"(v));
    });
    __asm__ volatile("fninit");
    TRY("single step", __asm__ volatile("pushf; orl $0x100, (%%rsp); popf; nop; nop" : : : "memory", "cc"));
    TRY("alignment check", {
        __asm__ volatile("pushf; orl $0x40000, (%%rsp); popf" : : : "memory", "cc");
        *(volatile int *)(((uintptr_t)&address & ~7ul) + 1) = 0;
    });
    __asm__ volatile("pushf; andl $~0x40000, (%%rsp); popf" : : : "memory", "cc");
    uint64_t flags;
    __asm__ volatile("pushf; orl $0x204000, (%%rsp); popf; pushf; pop %0; pushf; andl $~0x204000, (%%rsp); popf"
                     : "=r"(flags) : : "memory", "cc");
    printf("NT and ID: %lx\n", flags & 0x204000);
    TRY("sysenter", __asm__ volatile("sysenter" : : : "rax", "rcx", "rdx", "memory"));
    TRY("iret to kernel", __asm__ volatile("push $0x18; push %%rsp; pushf; push $0x10; push $0; iretq" : : : "memory"));
    uint64_t id = 20; /* getpid of i386 */
    __asm__ volatile("int $0x80" : "+a"(id) : : "memory");
    printf("int 0x80: %d\n", (int)id == getpid());
    long (*vsyscall_time)(long *) = (long (*)(long *))0xFFFFFFFFFF600400ul;
    volatile long now = 0, then = time(NULL);
    TRY("vsyscall", now = vsyscall_time(NULL));
    printf("  %d\n", caught || (now >= then && now <= then + 5));
}

/* ---- 32-bit code by a far return ---- */

static void compatibility(void)
{
    uint8_t *low = mmap((void *)0x10000000, 2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_32BIT, -1, 0);
    /* inc eax (48+ is REX in 64-bit mode), push cs' selector and go back: lret to 33:[esi] */
    static const uint8_t there[] = {0x40, 0x40, 0x40, 0x6A, 0x33, 0x56, 0xCB};
    memcpy(low, there, sizeof there);
    uint64_t result = 7, stack = (uint64_t)low + PAGE + 2048;
    for (int i = 0; i < 3; i++)
        __asm__ volatile("mov %%rsp, %%rbx; mov %1, %%rsp; lea 1f(%%rip), %%rdi; mov %%edi, %%esi\n\t"
                         "push $0x23; push %2; lretq\n1:\n\tmov %%rbx, %%rsp"
                         : "+a"(result) : "r"(stack), "r"((uint64_t)low) : "rbx", "rsi", "rdi", "memory", "cc");
    printf("compatibility mode: %lu\n", result);
}

/* ---- code that changes ---- */

static int call(uint8_t *p) { return ((int (*)(void))p)(); }

static void code_changes(void)
{
    static const uint8_t number[] = {0xB8, 1, 0, 0, 0, 0xC3}; /* mov eax, 1; ret */
    uint8_t *p = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t h = 0;
    memcpy(p, number, sizeof number);
    for (int i = 0; i < 2000; i++) {
        p[1] = (uint8_t)i;
        p[2] = (uint8_t)(i >> 8);
        h = mix(h, (uint64_t)call(p));
    }
    printf("rewritten: %lx\n", h);
    for (int i = 0; i < 300; i++) { /* as a compiler does it: never both rights */
        mprotect(p, PAGE, PROT_READ | PROT_WRITE);
        p[1] = (uint8_t)(i * 3);
        mprotect(p, PAGE, PROT_READ | PROT_EXEC);
        h = mix(h, (uint64_t)call(p));
    }
    printf("protected: %lx\n", h);
    int fd = memfd_create("code", 0);
    if (ftruncate(fd, PAGE))
        abort();
    uint8_t *write = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    uint8_t *run = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    memcpy(write, number, sizeof number);
    for (int i = 0; i < 500; i++) {
        write[1] = (uint8_t)(i * 7);
        h = mix(h, (uint64_t)call(run));
    }
    printf("two mappings: %lx\n", h);
    /* An instruction that the core has to execute, written where code has been running. */
    static const uint8_t cpuid[] = {0x53, 0x31, 0xC0, 0x0F, 0xA2, 0x89, 0xD8, 0x5B, 0xC3};
    call(p + 0);
    mprotect(p, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
    memcpy(p + 64, cpuid, sizeof cpuid);
    printf("cpuid written: %x\n", (unsigned)call(p + 64));
}

/* ---- instructions that hide in others ---- */

enum { HIDING = 12, EDGE = HIDING, PREFIXED = EDGE + 2, MANY = PREFIXED + 2, HIDING_END };

/* Call `often` times what is at `p`, then ask CPUID of leaf 1 at `question`, whose bytes end with a return. It is alone in its page,
 * which so holds nothing that must be watched. */
uint64_t call_and_ask(const uint8_t *p, long often, const uint8_t *question);
__asm__(".balign 4096\n"
        "call_and_ask:\n\t"
        "push %rbx; push %rbp; push %r12; xor %ebp, %ebp; mov %rdx, %r12\n"
        "1:\tcall *%rdi; lea (%rax, %rbp, 2), %rbp; dec %rsi; jnz 1b\n\t"
        "mov $1, %eax; xor %ecx, %ecx; call *%r12\n\t"
        "movzwl %bx, %ebx; add %rbp, %rax; add %rbx, %rax; add %rcx, %rax; add %rdx, %rax\n\t"
        "pop %r12; pop %rbp; pop %rbx; ret\n\t"
        ".balign 4096\n");

/* Everywhere 0F A2 is another instruction's constant, is cut by a page's end, or has prefixes; the code around it is hot. */
static void hidden(void)
{
    static uint8_t constant[] = {0xB8, 0x0F, 0xA2, 0xC3, 0x90, 0xC3}; /* mov eax, 0x90C3A20F; ret */
    static const uint8_t prefixes[] = {0x48, 0x66};
    uint8_t *p = mmap(NULL, HIDING_END * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(p, 0xC3, HIDING_END * PAGE);
    for (unsigned i = 0; i < HIDING; i++)
        for (unsigned n = 0; n <= i % 3; n++)
            memcpy(p + i * PAGE + 100 + 50 * n, constant, sizeof constant);
    p[EDGE * PAGE + PAGE - 1] = 0x0F;
    p[(EDGE + 1) * PAGE] = 0xA2;
    memcpy(p + (PREFIXED + 1) * PAGE - 2, prefixes, sizeof prefixes);
    p[(PREFIXED + 1) * PAGE] = 0x48;
    p[(PREFIXED + 1) * PAGE + 1] = 0x0F;
    p[(PREFIXED + 1) * PAGE + 2] = 0xA2;
    for (unsigned n = 0; n < 9; n++)
        memcpy(p + MANY * PAGE + 50 * n, constant, sizeof constant);
    mprotect(p, HIDING_END * PAGE, PROT_READ | PROT_EXEC);
    uint64_t h = 0;
    for (int round = 0; round < 8; round++)
        for (unsigned i = 0; i < HIDING; i++) {
            h = mix(h, call_and_ask(p + i * PAGE + 100, 30000, p + i * PAGE + 101));
            h = mix(h, call_and_ask(p + i * PAGE + 100, 10, p + i * PAGE + 101 + 50 * (i % 3)));
        }
    printf("constants: %lx\n", h);
    for (int n = 0; n < 200; n++)
        h = mix(h, call_and_ask(p + (EDGE + n % 2) * PAGE + 64, 10, p + EDGE * PAGE + PAGE - 1));
    printf("over an edge: %lx\n", h);
    for (int n = 0; n < 200; n++)
        h = mix(h, call_and_ask(p + PREFIXED * PAGE + 64, 10, p + (PREFIXED + 1) * PAGE - 2 + n % 4));
    printf("prefixed: %lx\n", h);
    for (int n = 0; n < 90; n++)
        h = mix(h, call_and_ask(p + MANY * PAGE + 50 * (n % 9), 100, p + MANY * PAGE + 50 * (n % 9) + 1));
    printf("many: %lx\n", h);
}

/* ---- memory ---- */

static void memory(void)
{
    enum { PAGES = 2400 };
    uint8_t *p = mmap(NULL, PAGES * 2ul * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    madvise(p, PAGES * 2ul * PAGE, MADV_NOHUGEPAGE);
    for (int i = 0; i < PAGES; i++) {
        memset(p + i * 2ul * PAGE, i, PAGE);
        mprotect(p + i * 2ul * PAGE, PAGE, i & 1 ? PROT_READ : PROT_READ | PROT_WRITE);
    }
    volatile uint64_t h = 0;
    for (int i = 0; i < PAGES; i++)
        h = mix(h, p[i * 2ul * PAGE + (unsigned)i % PAGE]);
    printf("pages: %lx\n", h);
    TRY("protected page", p[2 * PAGE] = 1);
    for (int round = 0; round < 12; round++) { /* copy on write, both ways */
        pid_t child = fork();
        if (!child) {
            for (int i = 0; i < 60; i++)
                p[i * 4ul * PAGE] ^= (uint8_t)round;
            _exit(p[0]);
        }
        p[8ul * PAGE] = (uint8_t)round;
        int status;
        waitpid(child, &status, 0);
        h = mix(h, (uint64_t)WEXITSTATUS(status) + p[0] + p[8ul * PAGE]);
    }
    printf("forks: %lx\n", h);
    munmap(p, PAGE);
    TRY("unmapped", h = p[0]);
    uint8_t *again = mmap(p, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    printf("mapped again: %d\n", again[0]);
    for (volatile int i = 0; i < 60; i++) {
        mprotect(again, PAGE, PROT_NONE);
        TRY("no rights", again[1] = 1);
        mprotect(again, PAGE, PROT_READ | PROT_WRITE);
        again[1]++;
    }
    printf("after that: %d\n", again[1]);
}

/* ---- signals ---- */

static volatile sig_atomic_t signals;
static void count(int number) { signals += number == SIGUSR1; }

static void signal_flood(void)
{
    struct sigaction action = {.sa_handler = count};
    sigaction(SIGUSR1, &action, NULL);
    uint64_t h = 0;
    for (int i = 0; i < 3000; i++) {
        double keep = i * 1.5;
        kill(getpid(), SIGUSR1);
        h = mix(h, (uint64_t)(keep * 2));
    }
    printf("signals: %d %lx\n", (int)signals, h);
    struct itimerval often = {{0, 10000}, {0, 10000}};
    struct sigaction ignore = {.sa_handler = count};
    sigaction(SIGALRM, &ignore, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    double sum = 0;
    uint64_t x = 1;
    for (int i = 1; i < 1000000; i++) {
        sum += 1.0 / i;
        x = mix(x, (uint64_t)i);
    }
    setitimer(ITIMER_REAL, &(struct itimerval){0}, NULL);
    printf("under a timer: %.15f %lx\n", sum, x);
    for (int i = 0; i < 2; i++) { /* frames of the program's own making: all bits set, and some */
        fflush(stdout);
        pid_t child = fork();
        if (!child) {
            alarm(5);
            static uint64_t frame[128];
            memset(frame, 0xFF, sizeof frame);
            for (int n = 0; i && n < 128; n++)
                frame[n] = mix((uint64_t)i, (uint64_t)n) & (n & 1 ? 0xFFFF : ~0ul);
            __asm__ volatile("mov %0, %%rsp; mov $15, %%eax; syscall" : : "r"(&frame[16]) : "rax", "rcx", "r11", "memory");
        }
        int status;
        waitpid(child, &status, 0);
        printf("forged frame %d: %d\n", i, WIFSIGNALED(status) ? WTERMSIG(status) : -1);
    }
}

/* ---- every system call ---- */

static void calls(void)
{
    /* Those that end, stop or copy the program, or take what it stands on. */
    static const int skipped[] = {SYS_rt_sigreturn, SYS_pause, SYS_clone, SYS_fork, SYS_vfork, SYS_exit, SYS_rt_sigsuspend,
                                  SYS_sync, SYS_exit_group, SYS_mmap, SYS_brk, SYS_getpid, SYS_gettid, SYS_set_tid_address};
    for (int number = 0; number < 336; number++) {
        bool skip = false;
        for (unsigned i = 0; i < sizeof skipped / sizeof skipped[0]; i++)
            skip |= number == skipped[i];
        if (skip)
            continue;
        register long r10 __asm__("r10") = (long)(OURS + PAGE);
        register long r8 __asm__("r8") = (long)OURS;
        register long r9 __asm__("r9") = 0;
        long result;
        __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(OURS + PAGE), "S"(OURS), "d"(7), "r"(r10), "r"(r8), "r"(r9)
                         : "rcx", "r11", "memory");
        printf("call %d: %ld\n", number, result < 0 ? result : 0);
    }
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); } all[] = {
        {"identity", identity}, {"faults", faults}, {"compatibility", compatibility}, {"code", code_changes},
        {"hidden", hidden},
        {"memory", memory}, {"signals", signal_flood}, {"calls", calls}};
    setvbuf(stdout, NULL, _IOLBF, 0);
    catch_all();
    for (unsigned i = 0; i < sizeof all / sizeof all[0]; i++)
        if (argc > 1 && !strcmp(argv[1], all[i].name)) {
            all[i].run();
            puts("done");
            return 0;
        }
    return 2;
}
