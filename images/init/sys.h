/* System calls and the few string functions that init and agent need, without a C library, so that one static binary of a
 * few KiB runs in any x86-64 Linux guest. */
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
enum { F_SETFD = 2, F_SETFL = 4, FD_CLOEXEC = 1, F_SETPIPE_SZ = 1031 };
enum { ENOENT = 2, EINTR = 4, E2BIG = 7, ENOEXEC = 8, EAGAIN = 11, ENOMEM = 12, EACCES = 13, EEXIST = 17, ENODEV = 19 };
enum { PROT_READ = 1, PROT_WRITE = 2, MAP_PRIVATE = 2, MAP_ANONYMOUS = 0x20, MAP_NORESERVE = 0x4000, SEEK_END = 2 };
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

/* Memory of zeroes that takes none until it is touched; NULL if there is none to be had. */
static inline void *new_memory(size_t size)
{
    long at = SYS(__NR_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at < 0 && at > -4096 ? NULL : (void *)at;
}
/* Decimal digits at `p`, up to `end`, as a number below 2^32; where they end goes to *after. -1: there are none. */
static inline long parse_number(const char *p, const char *end, const char **after)
{
    long value = -1;
    for (; p < end && *p >= '0' && *p <= '9'; p++) {
        value = (value < 0 ? 0 : value) * 10 + (*p - '0');
        if (value > 0xffffffffl) return -1;
    }
    if (after) *after = p;
    return value;
}

void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
int memcmp(const void *a, const void *b, size_t n);
enum { MS_RDONLY = 1, MS_REMOUNT = 32, MS_MOVE = 8192 };
/* cmdline.c: the value of NAME= on the kernel command line, into `to` (of several the last); 0 if it is not there. */
int argument(const char *name, char *to, size_t size);
/* cmdline.c: which of these words stands last on the kernel command line; `otherwise` if none is there. */
int last_of(const char *const names[], int otherwise);
/* root.c: mount what root= names at /newroot; 0, and it was said why, if that cannot be done. */
int mount_root(const char *root);
/* The shares that the command line names, below a root without a slash at its end. */
void mount_shares(const char *root);
/* The share number `at` of the command line: its tag and the place in the guest. */
int share_argument(int at, char *tag, size_t tag_size, char *place, size_t place_size);
/* init.c: load the module of a file system, if the initramfs has one. */
void load_file_system(const char *type);
/* init.c: mount a file system without a device; the loopback interface; power buttons for poll(), and whether one was pressed;
 * the end of everything. */
enum { POWER_OFF = 0x4321fedc, RESTART = 0x01234567, HALT = (int)0xcdef0123 };
void mount_at(const char *type, const char *path, const char *options);
void loopback_up(void);
/* init.c: put text, or a number's digits, at `to`, with a zero behind: the place of that zero. */
char *append(char *to, const char *text);
char *append_number(char *to, uint64_t number);
/* init.c: call `look` with the name of each entry of a directory, "." and ".." as well. */
void each_entry(const char *path, void (*look)(const char *name));
/* init.c: block the signals that tell process 1 something; a descriptor that they are read from. */
int open_signals(void);
int open_buttons(struct pollfd *to, int most);
int power_key(int fd);
void leave(int how);
/* container.c */
int add_overlay(void);
void run_container(void) __attribute__((noreturn));
void replace_file(const char *path, const char *text);
/* dhcp.c: 1: the card of this name has an address. */
int configure_network(const char *device);
/* agent.c */
void agent(int settled) __attribute__((noreturn));
void serve(int link) __attribute__((noreturn));
/* identity.c: 0: the payload is not of the right form. */
int take_identity(const uint8_t *payload, uint32_t length);
/* program.c: in the child, become the program, or with `is_tool` one of tools.c. Ends with 126 or 127 if that fails. */
void become(const char *directory, const char *user, char **arguments, char **given, int terminal, int is_tool)
    __attribute__((noreturn));
/* program.c: the name that passwd(5) or group(5) has for a number, or its digits. */
void name_of_id(const char *file, uint32_t id, char *to, size_t size);
/* tools.c: do what these words say, and end. */
void run_tool(char **words) __attribute__((noreturn));
/* limits.c: bytes of the file system that holds `path`, and bytes that are free. */
void file_system_size(const char *path, uint64_t *size, uint64_t *available);
extern char **guest_environment;
#endif
