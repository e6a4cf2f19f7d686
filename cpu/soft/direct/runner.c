/* The processes of a runner: made from cpu/runner/'s program, ended with the thread that made them.
 *
 * The guest half stands in a system call that the core has to answer (seccomp's user notification). That the kernel hands
 * the call over is the proof that it stands: guest code can make the same call, but not go on meanwhile.
 */
#define _GNU_SOURCE
#include "soft/direct/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS /* Linux 6.6 */
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#endif
enum { PAGE = 4096, PAGES_BYTES = PAGE + RUNNER_FRAME_BYTES, HIGH_FD = 64, SYNC_WAKE_UP = 1, HAS_FSGSBASE = 2 };
enum { PATIENCE_NS = 100000000 };
_Static_assert(RUNNER_ANSWER == SECCOMP_IOCTL_NOTIF_SEND, "what the mapper is allowed");
_Static_assert(sizeof(struct runner_answer) == sizeof(struct seccomp_notif_resp), "what the mapper sends");

/* ---- stops ---- */

/* Whether this is Linux of at least that version. */
static bool host_is(int major, int minor)
{
    static int release; /* atomic */
    int is = __atomic_load_n(&release, __ATOMIC_RELAXED);
    if (!is) {
        struct utsname host;
        int first = 0, second = 0;
        is = uname(&host) == 0 && sscanf(host.release, "%d.%d", &first, &second) == 2 ? first << 16 | second : 1;
        __atomic_store_n(&release, is, __ATOMIC_RELAXED);
    }
    return is >= (major << 16 | minor);
}

/* Since Linux 6.11 a wait for a stop ends when the process does; before, only poll() tells. */
static bool wait_tells_end(void) { return host_is(6, 11); }

/* Wait until there is a stop to be taken, or it has ended: false. */
static bool poll_stop(struct runner *r)
{
    struct pollfd one = {.fd = r->listener, .events = POLLIN};
    int n;
    while ((n = poll(&one, 1, -1)) < 0 && errno == EINTR)
        ;
    return n > 0 && !(one.revents & (POLLHUP | POLLERR));
}

/* Wait until the guest half stands. */
static bool wait_stop(struct runner *r, struct seccomp_notif *stop)
{
    for (;;) {
        if (!wait_tells_end() && !poll_stop(r))
            return false;
        memset(stop, 0, sizeof *stop);
        if (ioctl(r->listener, SECCOMP_IOCTL_NOTIF_RECV, stop) == 0) {
            r->stopped = stop->id;
            return stop->data.nr == RUNNER_STOP;
        }
        /* ENOENT: guest code made the call itself and left it again for a signal, or it has ended. */
        if (errno != EINTR && !(errno == ENOENT && poll_stop(r)))
            return false;
    }
}

static bool answer(struct runner *r, uint32_t flags)
{
    struct seccomp_notif_resp response = {.id = r->stopped, .flags = flags};
    int result;
    while ((result = ioctl(r->listener, SECCOMP_IOCTL_NOTIF_SEND, &response)) < 0 && errno == EINTR)
        ; /* a signal of this thread's while it waited for the kernel's lock */
    return result == 0;
}

/* ---- the mapper ---- */

static long futex(uint32_t *word, int what, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, what, value, timeout, NULL, 0);
}

bool runner_lives(pid_t pid)
{
    siginfo_t info = {0};
    return waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0;
}

static void give_turn(struct runner *r, uint32_t count, bool resume)
{
    r->page->count = count;
    r->page->resume = resume;
    __atomic_store_n(&r->page->turn, r->page->turn + 1, __ATOMIC_SEQ_CST);
    futex(&r->page->turn, FUTEX_WAKE, 1, NULL);
}

bool runner_command(struct runner *r, uint32_t count)
{
    static const struct timespec patience = {.tv_nsec = PATIENCE_NS};
    r->waiting = 0;
    if (!count)
        return true;
    uint32_t before = r->page->turn;
    __atomic_store_n(&r->frame->done, before, __ATOMIC_SEQ_CST); /* guest code can have written there */
    give_turn(r, count, false);
    while (__atomic_load_n(&r->frame->done, __ATOMIC_SEQ_CST) != r->page->turn)
        if (futex(&r->frame->done, FUTEX_WAIT, before, &patience) < 0 && errno == ETIMEDOUT && !runner_lives(r->mapper))
            return false;
    return true;
}

bool runner_resume(struct runner *r, uint64_t arguments[6])
{
    struct seccomp_notif stop;
    if (r->waiting) { /* the mapper answers when it has done them: a switch of processes fewer */
        r->page->answer = (struct runner_answer){.id = r->stopped};
        give_turn(r, r->waiting, true);
        r->waiting = 0;
    } else if (!answer(r, 0)) {
        return false;
    }
    if (!wait_stop(r, &stop) || stop.data.instruction_pointer != r->stop_ip)
        return false;
    for (unsigned i = 0; i < 6; i++)
        arguments[i] = stop.data.args[i];
    return true;
}

/* ---- begin and end ---- */

/* Become the stub. The parent's memory is shared until then, so nothing but system calls. */
static _Noreturn void become(const char *path, int memory_fd, int pages_fd, int socket_fd)
{
    char *const arguments[] = {(char *)"loopvisor-runner", NULL}, *const environment[] = {NULL};
    int memory = fcntl(memory_fd, F_DUPFD, HIGH_FD), pages = fcntl(pages_fd, F_DUPFD, HIGH_FD),
        socket = fcntl(socket_fd, F_DUPFD, HIGH_FD);
    if (memory >= 0 && pages >= 0 && socket >= 0 && dup2(memory, RUNNER_MEMORY_FD) >= 0 && dup2(pages, RUNNER_PAGES_FD) >= 0 &&
        dup2(socket, RUNNER_SOCKET_FD) >= 0) {
        close(0), close(1), close(2), close(RUNNER_LISTENER_FD);
        syscall(SYS_close_range, RUNNER_SOCKET_FD + 1, ~0u, 0);
        execve(path, arguments, environment);
    }
    _exit(127);
}

/* The page of commands and the frame, which both sides map. */
static int make_pages(struct runner *r)
{
    int fd = (int)syscall(SYS_memfd_create, "runner-pages", 1 /* MFD_CLOEXEC */);
    if (fd < 0)
        return -errno;
    uint8_t *pages = ftruncate(fd, PAGES_BYTES) < 0
                         ? MAP_FAILED
                         : mmap(NULL, PAGES_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (pages == MAP_FAILED) {
        int error = errno;
        close(fd);
        return -error;
    }
    r->page = (struct runner_page *)(void *)pages;
    r->frame = (struct runner_frame *)(void *)(pages + PAGE);
    return fd;
}

/* Earlier ones could let an instruction pass (a signal that was lost, "perf: Fix missing SIGTRAPs"). */
static bool breakpoints_hold(void) { return host_is(6, 1); }

/* What the stub says first, with its listener and breakpoints. */
static int receive_hello(int fd, struct runner *r, struct runner_hello *hello)
{
    enum { MOST = 1 + RUNNER_BREAKPOINTS };
    union {
        char bytes[CMSG_SPACE(MOST * sizeof(int))];
        struct cmsghdr aligned;
    } control = {0};
    struct iovec piece = {hello, sizeof *hello};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n;
    while ((n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
        ;
    if (n != sizeof *hello)
        return -EIO;
    const struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    if (!rights || rights->cmsg_type != SCM_RIGHTS)
        return hello->guest < 0 ? (int)hello->guest : -EIO;
    int fds[MOST];
    size_t bytes = rights->cmsg_len - CMSG_LEN(0);
    memcpy(fds, CMSG_DATA(rights), bytes);
    r->listener = fds[0];
    if (bytes == sizeof fds)
        guard_open(r, fds + 1);
    r->guest = (pid_t)hello->guest;
    return 0;
}

/* Where the host's kernel puts the frames of the guest half's signals, and where their handler stops. No guest code has run yet. */
static bool find_frame(struct runner *r, const struct seccomp_notif *stop)
{
    uint64_t stack = stop->data.args[4] - RUNNER_FRAME;
    struct signal_frame at;
    if (stack > RUNNER_FRAME_BYTES - sizeof at)
        return false;
    memcpy(&at, runner_at(r, (uint32_t)stack), sizeof at);
    uint64_t state = at.state - RUNNER_FRAME;
    if (state > RUNNER_FRAME_BYTES - STATE_LEAST || at.info.signal != SIGTRAP)
        return false;
    r->stack = (uint32_t)stack;
    r->state = (uint32_t)state;
    memcpy(r->made_by_kernel, runner_at(r, r->state) + STATE_SOFTWARE, sizeof r->made_by_kernel);
    memcpy(&r->state_bytes, r->made_by_kernel + (STATE_SIZE - STATE_SOFTWARE), sizeof r->state_bytes);
    uint32_t least = r->made_by_kernel[STATE_FEATURES - STATE_SOFTWARE] & STATE_HAS_AVX ? STATE_AVX : STATE_LEAST;
    r->page->stack = RUNNER_FRAME + stack;
    r->stop_ip = stop->data.instruction_pointer;
    return r->state_bytes >= least && r->state_bytes <= RUNNER_FRAME_BYTES - state - sizeof(uint32_t);
}

static int begin(struct direct_vm *direct, struct runner *r, int fd, const char **why)
{
    struct runner_hello hello;
    struct seccomp_notif stop;
    *why = "the runner's program did not start";
    int result = receive_hello(fd, r, &hello);
    if (result < 0) {
        if (result == -EBUSY)
            *why = "system calls here are handed to another program already (seccomp)";
        else if (result != -EIO)
            *why = "seccomp with user notification (Linux 5.19)";
        return result;
    }
    ioctl(r->listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, (unsigned long)SYNC_WAKE_UP); /* cheaper, where there is such a thing */
    if (!wait_stop(r, &stop) || stop.data.args[2] != 2 /* CLOSE_RANGE_UNSHARE */ || !answer(r, SECCOMP_USER_NOTIF_FLAG_CONTINUE) ||
        !wait_stop(r, &stop))
        return -EIO;
    *why = "signal frames are not as expected";
    if (!find_frame(r, &stop))
        return -EIO;
    direct->cpuid_faults = hello.flags & RUNNER_CPUID_FAULTS;
    *why = "RDTSC cannot be made to fault";
    if (!(hello.flags & RUNNER_NO_TSC))
        return -ENOTSUP;
    /* One that wakes does not interrupt the thread that woke it, and is about to sleep: it would have to be switched to once more. */
    const struct sched_param same = {0};
    sched_setscheduler(r->mapper, SCHED_BATCH, &same);
    sched_setscheduler(r->guest, SCHED_BATCH, &same);
    *why = "the runner's memory cannot be emptied";
    return pages_drop_all(r) ? 0 : -EIO;
}

/* The process that becomes a runner, or -errno. */
static __attribute__((noinline)) pid_t start(const char *program, int memory_fd, int pages_fd, int socket_fd)
{
    pid_t pid = vfork();
    if (!pid)
        become(program, memory_fd, pages_fd, socket_fd);
    return pid < 0 ? -errno : pid;
}

int runner_open(struct direct_vm *direct, struct runner *r, bool breakpoints, const char **why)
{
    memset(r, 0, sizeof *r);
    r->cpu = r->listener = -1;
    *why = "this processor, or host, has no FSGSBASE";
    if (!(getauxval(AT_HWCAP2) & HAS_FSGSBASE))
        return -ENOTSUP;
    *why = "memory";
    int sockets[2], fd = make_pages(r);
    if (fd < 0)
        return fd;
    r->page->count = breakpoints && breakpoints_hold();
    *why = "vfork";
    int result = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) < 0 ? -errno : 0;
    if (result == 0) {
        pid_t pid = start(direct->stub, direct->memory_fd, fd, sockets[1]);
        close(sockets[1]);
        r->mapper = pid < 0 ? 0 : pid;
        result = pid < 0 ? pid : begin(direct, r, sockets[0], why);
        close(sockets[0]);
    }
    close(fd);
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
        while (pids[i] > 0 && waitpid(pids[i], NULL, __WALL) < 0 && errno == EINTR)
            ;
    if (r->listener >= 0)
        close(r->listener);
    guard_close(r);
    if (r->page)
        munmap(r->page, PAGES_BYTES);
    pages_forget(r);
    memset(r, 0, sizeof *r);
    r->listener = -1;
}

void runner_forget(struct runner *r)
{
    if (!r->mapper) /* there is none */
        return;
    if (r->page)
        munmap(r->page, PAGES_BYTES);
    if (r->listener >= 0)
        close(r->listener);
    guard_close(r);
    r->page = NULL;
    r->mapper = r->guest = 0;
}

/* The processor that this thread runs on, or one that no other vCPU is bound to: -1 if there is none. */
static int free_processor(const struct soft_vcpu *c)
{
    const cpu_set_t *may = &c->direct->own_affinity;
    cpu_set_t taken;
    CPU_ZERO(&taken);
    for (uint32_t i = 0; i < c->vm->config.vcpus; i++) {
        int bound = i == c->index ? -1 : __atomic_load_n(&c->vm->vcpus[i]->direct->bound, __ATOMIC_RELAXED);
        if (bound >= 0)
            CPU_SET(bound, &taken);
    }
    int here = sched_getcpu();
    if (here >= 0 && here < CPU_SETSIZE && CPU_ISSET(here, may) && !CPU_ISSET(here, &taken))
        return here;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, may) && !CPU_ISSET(cpu, &taken))
            return cpu;
    return -1;
}

/* While stops follow each other quickly, the thread and the runner share a processor: to wake a process on another one takes
 * several times as long as a stop. */
void runner_bind(struct soft_vcpu *c, struct runner *r)
{
    struct direct_vcpu *d = c->direct;
    int cpu = d->bound;
    if (cpu < 0 && (sched_getaffinity(0, sizeof d->own_affinity, &d->own_affinity) < 0 || (cpu = free_processor(c)) < 0))
        return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (d->bound < 0) {
        if (sched_setaffinity(0, sizeof one, &one) < 0)
            return;
        __atomic_store_n(&d->bound, cpu, __ATOMIC_RELAXED);
    }
    if (r->cpu != cpu && sched_setaffinity(r->guest, sizeof one, &one) == 0 &&
        sched_setaffinity(r->mapper, sizeof one, &one) == 0)
        r->cpu = cpu;
}

void runner_unbind(struct direct_vcpu *d)
{
    if (d->bound >= 0)
        sched_setaffinity(0, sizeof d->own_affinity, &d->own_affinity);
    __atomic_store_n(&d->bound, -1, __ATOMIC_RELAXED);
    struct runner *r = d->current;
    if (r && r->cpu >= 0 && sched_setaffinity(r->guest, sizeof d->own_affinity, &d->own_affinity) == 0)
        r->cpu = -1;
}
