/* What programs ask of the kernel's memory management and of ptrace; also built as an i386 program. Each line is the same on every machine.
 * `kernel NAME` runs one part. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 256 };
static uint32_t mix(uint32_t h, uint32_t v) { return (h ^ v) * 0x9E3779B1u + (h >> 7); }

/* ---- userfaultfd ---- */

static int uffd;
static void *serve(void *start)
{
    static uint8_t page[PAGE] __attribute__((aligned(PAGE)));
    for (unsigned served = 0; served < PAGES; served++) {
        struct uffd_msg message;
        if (read(uffd, &message, sizeof message) != sizeof message || message.event != UFFD_EVENT_PAGEFAULT)
            abort();
        uint64_t at = message.arg.pagefault.address & ~(uint64_t)(PAGE - 1);
        memset(page, (int)((at - (uintptr_t)start) / PAGE * 7), PAGE);
        struct uffdio_copy copy = {.dst = at, .src = (uintptr_t)page, .len = PAGE};
        if (ioctl(uffd, UFFDIO_COPY, &copy) < 0)
            abort();
    }
    return NULL;
}
static void userfault(void)
{
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API};
    uint8_t *p = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register range = {.range = {(uintptr_t)p, PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    pthread_t thread;
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0 || ioctl(uffd, UFFDIO_REGISTER, &range) < 0 || pthread_create(&thread, NULL, serve, p))
        abort();
    uint32_t h = 1;
    for (unsigned i = 0; i < PAGES; i++) {
        uint8_t *at = p + (i * 37 % PAGES) * PAGE + i;
        h = mix(h, *at);
        *at += 1;
        h = mix(h, at[1]);
    }
    pthread_join(thread, NULL);
    for (unsigned i = 0; i < PAGES * PAGE; i += 61)
        h = mix(h, p[i]);
    printf("userfault %x\n", h);
}

/* ---- protection that changes under the accesses ---- */

static sigjmp_buf back;
static volatile int faults;
static void on_fault(int number)
{
    faults += number == SIGSEGV;
    siglongjmp(back, 1);
}
static volatile bool over;
static void *protect(void *p)
{
    for (unsigned i = 0; !over; i++) {
        mprotect(p, 16 * PAGE, i & 1 ? PROT_READ : PROT_READ | PROT_WRITE);
        usleep(50);
    }
    mprotect(p, 16 * PAGE, PROT_READ | PROT_WRITE);
    return NULL;
}
static void protection(void)
{
    static volatile unsigned i, done;
    uint32_t *p = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_t thread;
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    pthread_create(&thread, NULL, protect, p);
    for (i = 0; i < 200000; i++) {
        sigsetjmp(back, 0);
        ((volatile uint32_t *)p)[i * 97 % (16 * PAGE / 4)] += i; /* a store that faults is tried again */
        done++;
    }
    over = true;
    pthread_join(thread, NULL);
    uint32_t h = 0;
    for (unsigned n = 0; n < 16 * PAGE / 4; n++)
        h = mix(h, p[n]);
    printf("protection %x done %u\n", h, done);
}

/* ---- copy on write ---- */

static void copies(void)
{
    uint32_t *p = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (unsigned i = 0; i < PAGES; i++)
        p[i * 1024] = i;
    for (unsigned round = 0; round < 20; round++) {
        pid_t child = fork();
        for (unsigned i = child ? 0 : 1; i < PAGES; i += 2)
            p[i * 1024] = mix(p[i * 1024], round);
        uint32_t h = 0;
        for (unsigned i = 0; i < PAGES; i++)
            h = mix(h, p[i * 1024]);
        if (!child) {
            shared[round] = h;
            _exit(0);
        }
        waitpid(child, NULL, 0);
        printf("copy %u: %x %x\n", round, h, shared[round]);
    }
}

/* ---- ptrace ---- */

static __attribute__((noinline)) void traced_work(volatile unsigned *n)
{
    for (unsigned i = 0; i < 200; i++)
        *n = mix(*n, i);
}
static void tracing(void)
{
    static volatile unsigned n = 1;
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        traced_work(&n);
        raise(SIGUSR1);
        traced_work(&n);
        syscall(SYS_getppid);
        _exit((int)(n & 63));
    }
    int status;
    unsigned steps = 0;
    waitpid(child, &status, 0);
    for (unsigned i = 0; i < 1500; i++) {
        ptrace(PTRACE_SINGLESTEP, child, NULL, NULL);
        waitpid(child, &status, 0);
        steps += WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
    }
    printf("steps %u\n", steps);
    long word = ptrace(PTRACE_PEEKTEXT, child, (void *)traced_work, NULL);
    ptrace(PTRACE_POKETEXT, child, (void *)traced_work, (void *)((word & ~0xFFl) | 0xCC));
    ptrace(PTRACE_CONT, child, NULL, NULL);
    waitpid(child, &status, 0);
    printf("signal %d\n", WSTOPSIG(status));
    ptrace(PTRACE_CONT, child, NULL, NULL);
    waitpid(child, &status, 0);
    struct user_regs_struct registers;
    ptrace(PTRACE_GETREGS, child, NULL, &registers);
#ifdef __x86_64__
    unsigned long at = registers.rip--;
#else
    unsigned long at = (unsigned long)registers.eip--;
#endif
    printf("breakpoint %d\n", at == (unsigned long)traced_work + 1 && WSTOPSIG(status) == SIGTRAP);
    ptrace(PTRACE_POKETEXT, child, (void *)traced_work, (void *)word);
    ptrace(PTRACE_SETREGS, child, NULL, &registers);
    ptrace(PTRACE_POKEDATA, child, (void *)&n, (void *)5l);
    unsigned calls = 0;
    for (;;) {
        ptrace(PTRACE_SYSCALL, child, NULL, NULL);
        waitpid(child, &status, 0);
        if (WIFEXITED(status))
            break;
        calls++;
    }
    printf("calls %u status %d\n", calls, WEXITSTATUS(status));
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); } all[] = {
        {"userfault", userfault}, {"protection", protection}, {"copies", copies}, {"tracing", tracing}};
    for (unsigned i = 0; i < sizeof all / sizeof all[0]; i++)
        if (argc < 2 || !strcmp(argv[1], all[i].name))
            all[i].run();
    puts("done");
    return 0;
}
