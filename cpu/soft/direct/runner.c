/* The processes of a runner: made from cpu/runner/'s program, traced by the thread that made them, ended with it. */
#define _GNU_SOURCE
#include "soft/direct/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/ptrace.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, HIGH_FD = 64 };
enum { OPTION_SYSGOOD = 1, OPTION_EXITKILL = 0x100000 };

static long trace(long request, pid_t pid, uint64_t address, const void *data)
{
    return syscall(SYS_ptrace, request, pid, address, data);
}

static int wait_for(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, __WALL) < 0)
        if (errno != EINTR)
            return -1;
    return status;
}

static int stop_signal(int status) { return status >= 0 && WIFSTOPPED(status) ? WSTOPSIG(status) : 0; }

/* Wait until it stops with `wanted`; other signals are none of its business. */
static bool wait_stop(pid_t pid, int wanted)
{
    for (unsigned i = 0; i < 100; i++) {
        int status = wait_for(pid), got = stop_signal(status);
        if (got == wanted)
            return true;
        if (!got || got == SIGILL || got == SIGSEGV || trace(PTRACE_CONT, pid, 0, NULL) < 0)
            return false;
    }
    return false;
}

/* Become the stub. The parent's memory is shared until then, so nothing but system calls. */
static _Noreturn void become(const char *path, int memory_fd, int commands_fd)
{
    char *const arguments[] = {(char *)"loopvisor-runner", NULL}, *const environment[] = {NULL};
    int memory = fcntl(memory_fd, F_DUPFD, HIGH_FD), commands = fcntl(commands_fd, F_DUPFD, HIGH_FD);
    if (memory >= 0 && commands >= 0 && dup2(memory, RUNNER_MEMORY_FD) >= 0 && dup2(commands, RUNNER_COMMANDS_FD) >= 0) {
        close(0), close(1), close(2);
        syscall(SYS_close_range, RUNNER_COMMANDS_FD + 1, ~0u, 0);
        execve(path, arguments, environment);
    }
    _exit(127);
}

static int commands_page(struct runner *r)
{
    int fd = (int)syscall(SYS_memfd_create, "runner-commands", 1 /* MFD_CLOEXEC */);
    if (fd < 0)
        return -errno;
    void *page = ftruncate(fd, PAGE) < 0 ? MAP_FAILED : mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) {
        int error = errno;
        close(fd);
        return -error;
    }
    r->commands = page;
    return fd;
}

static int begin(struct direct_vm *direct, struct runner *r, const char **why)
{
    struct user_regs_struct regs;
    if (!wait_stop(r->mapper, SIGTRAP)) {
        *why = "the runner's program did not start";
        return -EIO;
    }
    *why = "ptrace";
    if (trace(PTRACE_SETOPTIONS, r->mapper, 0, (void *)(long)(OPTION_EXITKILL | OPTION_SYSGOOD)) < 0 ||
        trace(PTRACE_GETREGS, r->mapper, 0, &regs) < 0)
        return -errno;
    r->guest = (pid_t)regs.rbx;
    if (!wait_stop(r->guest, SIGSTOP) ||
        trace(PTRACE_SETOPTIONS, r->guest, 0, (void *)(long)(OPTION_EXITKILL | OPTION_SYSGOOD)) < 0 ||
        trace(PTRACE_CONT, r->guest, 0, NULL) < 0 || !wait_stop(r->guest, SIGTRAP) ||
        trace(PTRACE_GETREGS, r->guest, 0, &regs) < 0)
        return -EIO;
    direct->cpuid_faults = regs.rcx & RUNNER_CPUID_FAULTS;
    *why = "RDTSC cannot be made to fault";
    if (!(regs.rcx & RUNNER_NO_TSC))
        return -ENOTSUP;
    r->regs = regs;
    r->regs.orig_rax = (unsigned long long)-1;
    *why = "the runner's memory cannot be emptied";
    return pages_drop_all(r) ? 0 : -EIO;
}

/* The process that becomes a runner, or -errno. */
static __attribute__((noinline)) pid_t start(const char *program, int memory_fd, int commands_fd)
{
    pid_t pid = vfork();
    if (!pid)
        become(program, memory_fd, commands_fd);
    return pid < 0 ? -errno : pid;
}

int runner_open(struct direct_vm *direct, struct runner *r, const char **why)
{
    memset(r, 0, sizeof *r);
    r->cpu = -1;
    *why = "memory";
    int fd = commands_page(r);
    if (fd < 0)
        return fd;
    *why = "vfork";
    pid_t pid = start(direct->stub, direct->memory_fd, fd);
    close(fd);
    r->mapper = pid < 0 ? 0 : pid;
    int result = pid < 0 ? pid : begin(direct, r, why);
    if (result < 0)
        runner_close(r);
    return result;
}

void runner_close(struct runner *r)
{
    pid_t pids[] = {r->guest, r->mapper};
    for (unsigned i = 0; i < 2; i++)
        if (pids[i] > 0)
            kill(pids[i], SIGKILL);
    for (unsigned i = 0; i < 2; i++)
        if (pids[i] > 0)
            for (;;) {
                int status = wait_for(pids[i]);
                if (status < 0 || WIFEXITED(status) || WIFSIGNALED(status))
                    break;
            }
    if (r->commands)
        munmap(r->commands, PAGE);
    pages_forget(r);
    memset(r, 0, sizeof *r);
}

bool runner_command(struct runner *r, uint32_t count)
{
    if (!count)
        return true;
    r->commands->count = count;
    bool done = trace(PTRACE_CONT, r->mapper, 0, NULL) == 0 && wait_stop(r->mapper, SIGTRAP);
    memset(r->commands, 0, sizeof(uint64_t) + count * sizeof r->commands->commands[0]);
    return done;
}

int runner_resume(struct runner *r)
{
    if (trace(PTRACE_SYSEMU, r->guest, 0, NULL) < 0)
        return -1;
    return wait_for(r->guest);
}

/* While stops follow each other quickly, the thread and the runner share a processor: to wake a process on another one takes
 * several times as long as a stop. */
void runner_bind(struct direct_vcpu *d, struct runner *r)
{
    int cpu = sched_getcpu();
    if (cpu < 0 || cpu >= CPU_SETSIZE)
        return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (d->bound < 0) {
        if (sched_getaffinity(0, sizeof d->own_affinity, &d->own_affinity) < 0 || sched_setaffinity(0, sizeof one, &one) < 0)
            return;
        d->bound = cpu;
        d->bound_ns = soft_host_now();
    }
    if (r->cpu != cpu && sched_setaffinity(r->guest, sizeof one, &one) == 0 &&
        sched_setaffinity(r->mapper, sizeof one, &one) == 0)
        r->cpu = cpu;
}

void runner_unbind(struct direct_vcpu *d)
{
    if (d->bound >= 0)
        sched_setaffinity(0, sizeof d->own_affinity, &d->own_affinity);
    d->bound = -1;
    struct runner *r = d->current;
    if (r && r->cpu >= 0 && sched_setaffinity(r->guest, sizeof d->own_affinity, &d->own_affinity) == 0)
        r->cpu = -1;
}

void runner_quiet(void)
{
    struct sigaction action;
    if (sigaction(SIGCHLD, NULL, &action) == 0 && action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN &&
        !(action.sa_flags & SA_NOCLDSTOP)) {
        action.sa_flags |= SA_NOCLDSTOP;
        sigaction(SIGCHLD, &action, NULL);
    }
}
