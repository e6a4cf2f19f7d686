/* System calls and the few string functions that init.c and agent.c need, without a C library, so that one static
 * binary of a few KiB runs in any x86-64 Linux guest. */
#ifndef GUEST_SYS_H
#define GUEST_SYS_H


#include <asm/unistd.h>
#include <stddef.h>
#include <stdint.h>

static inline long sys6(long n, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}
#define SYS(n, ...) SYS_PICK(__VA_ARGS__, SYS_6, SYS_5, SYS_4, SYS_3, SYS_2, SYS_1, 0)(n, __VA_ARGS__)
#define SYS_PICK(a, b, c, d, e, f, name, ...) name
#define SYS_1(n, a) sys6(n, (long)(a), 0, 0, 0, 0, 0)
#define SYS_2(n, a, b) sys6(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define SYS_3(n, a, b, c) sys6(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define SYS_4(n, a, b, c, d) sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define SYS_5(n, a, b, c, d, e) sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define SYS_6(n, a, b, c, d, e, f) sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

enum { O_RDONLY = 0, O_WRONLY = 1, O_RDWR = 2, O_NOCTTY = 0x100, O_NONBLOCK = 0x800, O_CLOEXEC = 0x80000 };
enum { SIGINT = 2, SIGKILL = 9, SIGUSR1 = 10, SIGUSR2 = 12, SIGPIPE = 13, SIGTERM = 15, SIGCHLD = 17, SIG_SETMASK = 2 };
enum { POLLIN = 1, POLLOUT = 4, POLLERR = 8, POLLHUP = 16 };
enum { F_SETFD = 2, F_SETFL = 4, FD_CLOEXEC = 1 };
enum { ENOENT = 2, EINTR = 4, EAGAIN = 11, EEXIST = 17 };
struct pollfd { int fd; short events, revents; };

static inline size_t text_length(const char *s) { size_t n = 0; while (s[n]) n++; return n; }
static inline int text_equal(const char *a, const char *b) { while (*a && *a == *b) a++, b++; return *a == *b; }
static inline const char *text_after(const char *s, const char *prefix)
{
    while (*prefix) if (*s++ != *prefix++) return NULL;
    return s;
}
static inline void say(const char *s) { SYS(__NR_write, 2, s, text_length(s)); }
static inline long open_file(const char *path, int flags) { return SYS(__NR_open, path, flags, 0); }
/* At most size-1 bytes of a file, terminated; its length or a negative errno. */
static inline long read_file(const char *path, char *to, size_t size)
{
    long fd = open_file(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fd;
    size_t n = 0;
    while (n < size - 1) {
        long got = SYS(__NR_read, fd, to + n, size - 1 - n);
        if (got <= 0) break;
        n += (size_t)got;
    }
    SYS(__NR_close, fd);
    to[n] = 0;
    return (long)n;
}
static inline void pause_ms(long ms)
{
    long time[2] = {ms / 1000, ms % 1000 * 1000000};
    SYS(__NR_nanosleep, time, 0);
}
/* Milliseconds of CLOCK_MONOTONIC. */
static inline long now_ms(void)
{
    long time[2] = {0, 0};
    SYS(__NR_clock_gettime, 1, time);
    return time[0] * 1000 + time[1] / 1000000;
}
/* Block (or, with 0, unblock) the signals of `mask`: bit n-1 is signal n. */
static inline void signal_mask(uint64_t mask) { SYS(__NR_rt_sigprocmask, SIG_SETMASK, &mask, 0, 8); }

void *memcpy(void *to, const void *from, size_t n);
void agent(int settled) __attribute__((noreturn));
void serve(int link) __attribute__((noreturn));
extern char **guest_environment;
#endif
