/* Signals: storms of faults left by siglongjmp, an alternate stack, queued signals in order, timers amid arithmetic. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "work.h"

enum { ALTERNATE = 64 << 10 };

static sigjmp_buf back;
static uint8_t *region; /* five pages: none, read-only, writable, none, none */
static uint64_t storm_digest, of_vendor;
static volatile uint8_t modifies; /* the access that may fault reads and writes: W of its error code is not defined */
static uint8_t *alternate;

static void handle(int signal_number, void (*handler)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags };
    sigemptyset(&action.sa_mask);
    MUST(sigaction(signal_number, &action, NULL));
}

static void on_fault(int signal_number, siginfo_t *info, void *context)
{
    const greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint64_t at = (uint64_t)info->si_addr - (uint64_t)region;
    volatile uint8_t local = 0;
    storm_digest = mix(storm_digest, (uint64_t)signal_number);
    storm_digest = mix(storm_digest, (uint64_t)info->si_code);
    uint64_t error = (uint64_t)regs[REG_ERR] & 0xFF;
    storm_digest = mix(storm_digest, at < 5 * 4096 ? at >> 12 : 0xFFFF);
    storm_digest = mix(storm_digest, modifies && !(error & 1) ? error & ~2u : error);
    of_vendor = mix(mix(of_vendor, at < 5 * 4096 ? at : 0xFFFF), error);
    storm_digest = mix(storm_digest, (uint64_t)regs[REG_TRAPNO]);
    storm_digest = mix(storm_digest, &local > alternate && &local < alternate + ALTERNATE);
    siglongjmp(back, 1);
}

/* Byte by byte: how far a repeated string comes before it faults is not defined. */
static void fill(volatile uint8_t *at, uint8_t value, size_t size)
{
    for (size_t i = 0; i < size; i++)
        at[i] = value;
}

static uint64_t storm(void)
{
    struct random r = { storm_digest };
    for (volatile unsigned i = 0; i < 600; i++) {
        uint64_t n = next(&r);
        volatile uint64_t *at = (void *)(region + n % (5 * 4096 - 8));
        if (sigsetjmp(back, 1))
            continue;
        modifies = (n >> 32 & 7) == 2;
        switch (n >> 32 & 7) {
        case 0: *at = n; break;
        case 1: storm_digest = mix(storm_digest, *at); break;
        case 2: __atomic_fetch_add(at, n, __ATOMIC_SEQ_CST); break;
        case 3: ((void (*)(void))(region + n % (5 * 4096)))(); break;
        case 4: *(volatile uint8_t *)(n | 1ull << 62) = 1; break; /* not canonical */
        case 5: fill(region + 2 * 4096 + n % 4096, (uint8_t)n, 4096 + n % 64); break;
        case 6: storm_digest = mix(storm_digest, *(volatile uint64_t *)(n & 0xFFF)); break; /* null page */
        default: __asm__ volatile("movups %%xmm0, (%0)" : : "r"(at) : "memory"); break;
        }
    }
    return mix_bytes(storm_digest, region + 4096, 2 * 4096);
}

/* Repeated strings that run into a page that is not there: where they stop is the vendor's. */
static uint64_t strings(void)
{
    struct random r = { of_vendor };
    for (volatile unsigned i = 0; i < 60; i++) {
        uint64_t n = next(&r), count = 4096 + n % 64;
        uint8_t *to = region + 2 * 4096 + n % 4096, *from = region + 4096;
        if (sigsetjmp(back, 1))
            continue;
        if (i & 1)
            __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"((int)n) : "memory");
        else
            __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    }
    return mix_bytes(of_vendor, region + 2 * 4096, 4096);
}

/* A stack that overflows, again and again: its handler has another. */
static __attribute__((noinline)) uint64_t deep(uint64_t n)
{
    volatile uint8_t room[512];
    room[n & 511] = (uint8_t)n;
    return n ? deep(n + 1) + room[n & 511] : 0;
}

static uint64_t overflow(uint64_t seed)
{
    storm_digest = seed;
    modifies = 1; /* a compiler may touch the stack so */
    for (volatile unsigned i = 0; i < 4; i++)
        if (!sigsetjmp(back, 1))
            deep(1 + i);
    return storm_digest;
}

/* Real-time signals with values, from a child: all arrive, in the order of their numbers, then of their sending. */
static uint64_t queued(uint64_t seed)
{
    enum { COUNT = 96 };
    sigset_t set, old;
    uint64_t digest = seed;
    int status;
    sigemptyset(&set);
    for (int i = 0; i < 4; i++)
        sigaddset(&set, SIGRTMIN + i);
    MUST(sigprocmask(SIG_BLOCK, &set, &old));
    pid_t parent = getpid(), pid = (pid_t)MUST(fork());
    if (!pid) {
        struct random r = { seed };
        for (unsigned i = 0; i < COUNT; i++) {
            union sigval value = { .sival_int = (int)next(&r) };
            MUST(sigqueue(parent, SIGRTMIN + (int)(next(&r) % 4), value));
        }
        _exit(0);
    }
    MUST(waitpid(pid, &status, 0));
    for (unsigned i = 0; i < COUNT; i++) {
        siginfo_t info;
        int number = (int)MUST(sigwaitinfo(&set, &info));
        digest = mix(mix(digest, (uint64_t)(number - SIGRTMIN)), (uint32_t)info.si_value.sival_int);
    }
    MUST(sigprocmask(SIG_SETMASK, &old, NULL));
    return digest;
}

static volatile sig_atomic_t ticks;

/* A handler that leaves every floating point register other than it was. */
static void on_tick(int signal_number, siginfo_t *info, void *context)
{
    (void)signal_number, (void)info, (void)context;
    uint32_t mxcsr = 0x7F80;
    uint16_t control = 0xC7F;
    __asm__ volatile("fninit; fldcw %0; fldpi; fldl2e; fmul %%st, %%st(1); ldmxcsr %1; pcmpeqd %%xmm0, %%xmm0;"
                     "movdqa %%xmm0, %%xmm5; movdqa %%xmm0, %%xmm15"
                     : : "m"(control), "m"(mxcsr) : "xmm0", "xmm5", "xmm15");
    ticks++;
}

/* Arithmetic in x87 and SSE registers while timers interrupt it: the result is that of no interruption. */
static uint64_t timers(uint64_t seed)
{
    struct itimerval every = { { 0, 1000 }, { 0, 1000 } }, off = { { 0, 0 }, { 0, 0 } };
    struct random r = { seed };
    uint64_t digest = seed;
    ticks = 0;
    handle(SIGALRM, on_tick, 0);
    MUST(setitimer(ITIMER_REAL, &every, NULL));
    for (unsigned i = 0; i < 64 || ticks < 20; i++) {
        long double x = 1.0L + (long double)(next(&r) >> 40) * 0x1p-24L;
        double y = 1.0 + (double)(next(&r) >> 40) * 0x1p-24;
        for (unsigned k = 0; k < 500; k++) {
            x = x * 1.0000001L + 1.0L / x;
            y = y * 1.0000001 + 1.0 / y;
        }
        if (i < 64)
            digest = mix_bytes(mix_bytes(digest, &x, 10), &y, 8);
    }
    MUST(setitimer(ITIMER_REAL, &off, NULL));
    return digest;
}

void work_signals(uint64_t seed)
{
    region = mmap(NULL, 5 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    alternate = mmap(NULL, ALTERNATE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (region == MAP_FAILED || alternate == MAP_FAILED)
        fail("mmap");
    MUST(mprotect(region + 4096, 4096, PROT_READ));
    MUST(mprotect(region + 2 * 4096, 4096, PROT_READ | PROT_WRITE));
    stack_t stack = { .ss_sp = alternate, .ss_size = ALTERNATE };
    MUST(sigaltstack(&stack, NULL));
    handle(SIGSEGV, on_fault, SA_ONSTACK);
    handle(SIGBUS, on_fault, SA_ONSTACK);
    storm_digest = of_vendor = seed;
    report("signals", "storm", storm());
    report_of_vendor("signals", "storm", of_vendor);
    report_of_vendor("signals", "strings", strings());
    report("signals", "overflow", overflow(seed));
    report("signals", "queued", queued(seed));
    report("signals", "timers", timers(seed));
}
