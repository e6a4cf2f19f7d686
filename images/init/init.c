/* The guest's first process: mounts, loads modules in order, finds the root file system, starts the agent and a shell.
 *
 * As /init (of the initramfs): /etc/modules names module files, one a line, loaded in that order. A line that begins with
 * a space, "BUS PREFIX", belongs to the module above: it is loaded only if that bus has a device whose modalias begins
 * so, for each costs the kernel a check of its signature; "fs TYPE": only when that file system is mounted. With root=
 * on the kernel command line (root.c) that file system becomes the root and its init runs: init=PROGRAM, else /sbin/init
 * (this program again, or another init); with `container`, container.c instead. Without root=, the initramfs stays the
 * root. As /sbin/init: /etc/rc runs in the background, the agent is started, and a shell on each active console; when the
 * shell of the last one ends, or the power button is pressed, the machine powers off. single, s, S, 1, rescue or emergency
 * among the arguments: no /etc/rc, and one
 * shell. Not as process 1 it is the agent; with the arguments `serve N`, the agent for the connection on descriptor N. */
#include "sys.h"

enum { TIOCSCTTY = 0x540e };

char **guest_environment;
static char *environment[64] = {"HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=linux", "USER=root", 0};

void *memcpy(void *to, const void *from, size_t n)
{
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return result;
}
void *memset(void *to, int value, size_t n)
{
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
    return result;
}
int memcmp(const void *a, const void *b, size_t n)
{
    const unsigned char *left = a, *right = b;
    for (size_t i = 0; i < n; i++)
        if (left[i] != right[i]) return left[i] - right[i];
    return 0;
}

void mount_at(const char *type, const char *path, const char *options)
{
    SYS(__NR_mkdir, path, 0755);
    SYS(__NR_mount, type, path, type, 0, options);
}

/* A moment for the host's timeline: four letters, written at once to port 0x80. Nothing happens on other hosts. */
static void mark(const char *letters)
{
    uint32_t word;
    memcpy(&word, letters, 4);
    if (SYS(__NR_ioperm, 0x80, 4, 1) < 0) return;
    __asm__ volatile("outl %0, $0x80" : : "a"(word));
    SYS(__NR_ioperm, 0x80, 4, 0);
}

char *append(char *to, const char *text)
{
    while (*text) *to++ = *text++;
    *to = 0;
    return to;
}
char *append_number(char *to, uint64_t number)
{
    char digits[24];
    int n = 0;
    do digits[n++] = (char)('0' + number % 10); while ((number /= 10) > 0);
    while (n) *to++ = digits[--n];
    *to = 0;
    return to;
}

/* Is there a device whose modalias begins with `prefix`? If the bus cannot be looked at: yes. */
static int present(const char *bus, const char *prefix)
{
    char path[512], alias[256], entries[4096];
    char *name = append(append(append(path, "/sys/bus/"), bus), "/devices/");
    long fd = open_file(path, O_RDONLY | O_CLOEXEC), length;
    if (fd < 0) return 1;
    int found = 0;
    while (!found && (length = SYS(__NR_getdents64, fd, entries, sizeof entries)) > 0)
        for (long at = 0; !found && at < length;) {
            struct { uint64_t inode; int64_t offset; uint16_t size; uint8_t type; char name[]; } *entry;
            entry = (void *)(entries + at);
            at += entry->size;
            if (text_length(entry->name) > 128) continue;
            append(append(name, entry->name), "/modalias");
            if (read_file(path, alias, sizeof alias) > 0) found = text_after(alias, prefix) != NULL;
        }
    SYS(__NR_close, fd);
    return found;
}

static void load_module(const char *path)
{
    long fd = open_file(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    long error = SYS(__NR_finit_module, fd, "", 0);
    SYS(__NR_close, fd);
    /* A device that is not there (ENODEV) and a module that is built in (EEXIST) are no faults. */
    if (error < 0 && error != -EEXIST && error != -ENODEV) {
        say("init: cannot load ");
        say(path);
        say("\n");
    }
}

/* /etc/modules with its lines cut apart. The first letter of a module that was loaded is no slash any more. */
static char modules[16384];
static long modules_length;

/* Load the modules of a file system, or with NULL those that are needed always or whose hardware is there. What no file
 * system may need later gives its memory back. */
static void load_modules(const char *file_system)
{
    for (char *p = modules, *end = modules + modules_length; p < end;) {
        char *path = p, *entry = p + text_length(p) + 1;
        int wanted = !file_system && (entry >= end || *entry != ' '), later = 0;
        for (p = entry; p < end && *p == ' '; p += text_length(p) + 1) {
            const char *own = text_after(p + 1, "fs ");
            later |= own != NULL;
            if (own) wanted |= file_system && text_equal(own, file_system);
            if (own || file_system) continue;
            char bus[64], *prefix = p + 1, *to = bus;
            while (*prefix && *prefix != ' ' && to < bus + sizeof bus - 1) *to++ = *prefix++;
            *to = 0;
            wanted |= present(bus, *prefix ? prefix + 1 : prefix);
        }
        if (*path != '/') continue;
        if (wanted) load_module(path);
        if (wanted || !later) SYS(__NR_unlink, path), *path = '-';
    }
}

void load_file_system(const char *type) { load_modules(type); }

static void read_modules(void)
{
    long length = read_file("/etc/modules", modules, sizeof modules);
    modules_length = length > 0 ? length : 0;
    for (long i = 0; i < modules_length; i++)
        if (modules[i] == '\n') modules[i] = 0;
}

/* The root is mounted: what is left of the initramfs' large files gives its memory back. */
static void forget_files(void)
{
    SYS(__NR_unlink, "/bin/busybox");
    for (char *p = modules; p < modules + modules_length; p += text_length(p) + 1)
        if (*p == '/') SYS(__NR_unlink, p);
}

/* Start a program in a new session, with `tty` (or /dev/null) as its terminal. Its process id. */
static long start(char *const arguments[], const char *tty)
{
    long child = SYS(__NR_fork, 0);
    if (child) return child;
    signal_mask(0);
    SYS(__NR_setsid, 0);
    long fd = open_file(tty ? tty : "/dev/null", O_RDWR);
    if (fd >= 0) {
        if (tty) SYS(__NR_ioctl, fd, TIOCSCTTY, 1);
        for (int i = 0; i < 3; i++) SYS(__NR_dup2, fd, i);
        if (fd > 2) SYS(__NR_close, fd);
    }
    SYS(__NR_chdir, "/root");
    SYS(__NR_execve, arguments[0], arguments, guest_environment);
    SYS(__NR_exit_group, 127);
    __builtin_unreachable();
}

static int listed(const char *word, const char *const words[])
{
    for (; *words; words++)
        if (text_equal(word, *words)) return 1;
    return 0;
}
/* The words by which init(8), and systemd, know that a single user wants to repair the system. */
static int is_rescue(char *const arguments[])
{
    static const char *const words[] = {"single", "s", "S", "1", "rescue", "emergency", NULL};
    for (; *arguments; arguments++)
        if (listed(*arguments, words)) return 1;
    return 0;
}

/* End the machine with status 3, which `vmm run` has for a guest that failed: by the port that ends it, 0xf4, after what
 * was said is out. Elsewhere process 1 ends, as the kernel does without an init: in a panic. */
__attribute__((noreturn)) static void fail_machine(void)
{
    enum { EXIT_PORT = 0xf4, TCSBRK = 0x5409 };
    SYS(__NR_ioctl, 2, TCSBRK, 1);
    if (SYS(__NR_ioperm, EXIT_PORT, 1, 1) >= 0) {
        __asm__ volatile("outb %0, $0xf4" : : "a"((uint8_t)1));
        pause_ms(100);
    }
    SYS(__NR_exit_group, 1);
    __builtin_unreachable();
}

/* There is no way on, and it was said why: a shell, after which it is tried again. Without one, or with panic= on the
 * command line (which says that nobody is there to type), the machine ends. */
static void give_up(char *const arguments[])
{
    static char *shell[] = {"/bin/sh", NULL};
    char panic[16] = "0";
    argument("panic", panic, sizeof panic);
    long there = open_file(shell[0], O_RDONLY | O_CLOEXEC);
    if (there < 0 || (!text_equal(panic, "0") && !is_rescue(arguments))) {
        say(there < 0 ? "init: there is no shell here; the machine ends\n"
                      : "init: the machine ends; for a shell here add: rescue\n");
        fail_machine();
    }
    SYS(__NR_close, there);
    say("init: a shell; exit tries again\n");
    long child = start(shell, "/dev/console"), gone;
    while ((gone = SYS(__NR_wait4, -1, 0, 0, 0)) != child)
        if (gone < 0 && gone != -EINTR) break;
}

static void say_refused(const char *program, long error)
{
    say("init: cannot run ");
    say(program);
    say(error == -ENOENT ? ": it is not in the root file system, or what it needs is not" :
        error == -EACCES ? ": permission denied" : error == -ENOEXEC ? ": no program" : ": it does not work");
    say("\n");
}

/* Mount what root= names and become its init, with the arguments that the kernel gave us: the words that it did not
 * know, and those after " -- ". Returns if the command line has no root=. */
static void switch_root(char **arguments)
{
    char root[300], program[256];
    if (!argument("root", root, sizeof root)) return;
    while (!mount_root(root) || !add_overlay()) give_up(arguments + 1);
    mount_shares("/newroot");
    forget_files();
    SYS(__NR_chdir, "/newroot");
    static const char *const move[][2] = {{"/dev", "dev"}, {"/proc", "proc"}, {"/sys", "sys"}};
    for (int i = 0; i < 3; i++) {
        SYS(__NR_mkdir, move[i][1], 0755);
        SYS(__NR_mount, move[i][0], move[i][1], 0, MS_MOVE, 0);
    }
    SYS(__NR_mount, ".", "/", 0, MS_MOVE, 0);
    SYS(__NR_chroot, ".");
    SYS(__NR_chdir, "/");
    mark("root");
    static const char *const container[] = {"container", NULL};
    if (last_of(container, -1) == 0) run_container();
    for (;; give_up(arguments + 1)) {
        if (argument("init", program, sizeof program)) {
            arguments[0] = program;
            say_refused(program, SYS(__NR_execve, program, arguments, guest_environment));
            continue;
        }
        static char *const usual[] = {"/sbin/init", "/etc/init", "/bin/init", "/bin/sh"}; /* as the kernel has them */
        for (size_t i = 0; i < sizeof usual / sizeof *usual; i++) {
            arguments[0] = usual[i];
            long error = SYS(__NR_execve, usual[i], arguments, guest_environment);
            if (error != -ENOENT) say_refused(usual[i], error);
        }
        say("init: the root file system has no /sbin/init, /etc/init, /bin/init or /bin/sh; init= names another\n");
    }
}

/* The root file system is mounted read-only unless the command line has rw. An ordinary start makes it writable then, as
 * others do by their fstab; with ro on the command line it stays as it is. */
static void make_root_writable(void)
{
    static const char *const modes[] = {"ro", "rw", NULL};
    enum { FLAGS = 10, KEPT = 2 | 4 | 8 | 16 | 1024 | 2048 /* nosuid, nodev, noexec, sync, noatime, nodiratime */ };
    uint64_t status[15] = {0};
    if (last_of(modes, -1) == 0 || SYS(__NR_statfs, "/", status) < 0 || !(status[FLAGS] & MS_RDONLY)) return;
    SYS(__NR_mount, 0, "/", 0, MS_REMOUNT | (status[FLAGS] & KEPT), 0);
}

void loopback_up(void)
{
    struct { char name[16]; short flags; char rest[22]; } request = {"lo", 1 /* IFF_UP */ | 64, {0}};
    long fd = SYS(__NR_socket, 2, 2 | O_CLOEXEC, 0);
    if (fd < 0) return;
    SYS(__NR_ioctl, fd, 0x8914 /* SIOCSIFFLAGS */, &request);
    SYS(__NR_close, fd);
}

void leave(int how)
{
    SYS(__NR_kill, -1, SIGTERM);
    pause_ms(50);
    SYS(__NR_kill, -1, SIGKILL);
    SYS(__NR_sync, 0);
    SYS(__NR_mount, 0, "/", 0, MS_REMOUNT | MS_RDONLY, 0);
    SYS(__NR_sync, 0);
    SYS(__NR_reboot, 0xfee1dead, 672274793, how, 0);
    for (;;) pause_ms(1000);
}

/* The power button's input devices, for poll(); a power key event is (.., type 1, code 116, value 1). */
int open_buttons(struct pollfd *to, int most)
{
    int count = 0;
    char path[] = "/dev/input/event0";
    for (int i = 0; i < 10 && count < most; i++) {
        path[sizeof path - 2] = (char)('0' + i);
        long fd = open_file(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
        if (fd >= 0) to[count++] = (struct pollfd){(int)fd, POLLIN, 0};
    }
    return count;
}

void each_entry(const char *path, void (*look)(const char *name))
{
    char entries[4096];
    long fd = open_file(path, O_RDONLY | O_CLOEXEC), length;
    if (fd < 0) return;
    while ((length = SYS(__NR_getdents64, fd, entries, sizeof entries)) > 0)
        for (long at = 0; at < length;) {
            struct { uint64_t inode; int64_t offset; uint16_t size; uint8_t type; char name[]; } *entry;
            entry = (void *)(entries + at);
            at += entry->size;
            look(entry->name);
        }
    SYS(__NR_close, fd);
}

int open_signals(void)
{
    uint64_t mask = 1ull << (SIGCHLD - 1) | 1ull << (SIGUSR1 - 1) | 1ull << (SIGUSR2 - 1) | 1ull << (SIGTERM - 1) |
                    1ull << (SIGINT - 1);
    signal_mask(mask);
    return (int)SYS(__NR_signalfd4, -1, &mask, 8, O_CLOEXEC);
}

int power_key(int fd)
{
    struct { long time[2]; uint16_t type, code; int value; } event;
    while (SYS(__NR_read, fd, &event, sizeof event) == sizeof event)
        if (event.type == 1 && event.code == 116 && event.value) return 1;
    return 0;
}

static void run_system(char *const arguments[])
{
    int rescue = is_rescue(arguments + 1);
    make_root_writable();
    mount_at("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666");
    mount_at("tmpfs", "/run", "mode=755");
    mount_at("tmpfs", "/tmp", "mode=1777");
    SYS(__NR_symlink, "/proc/self/fd", "/dev/fd");
    char name[65];
    long length = read_file("/etc/hostname", name, sizeof name);
    if (argument("hostname", name, sizeof name)) length = (long)text_length(name);
    while (length > 0 && name[length - 1] <= ' ') length--;
    if (length > 0) SYS(__NR_sethostname, name, length);
    loopback_up();

    struct pollfd fds[11] = {{open_signals(), POLLIN, 0}};

    /* Only /etc/rc and what it starts hold the pipe's other end: when that is closed, /etc/rc has ended. */
    int settled[2] = {-1, -1};
    SYS(__NR_pipe2, settled, 0);
    long helper = SYS(__NR_fork, 0);
    if (!helper) {
        signal_mask(0);
        SYS(__NR_close, settled[1]);
        agent(settled[0]);
    }
    static char *rc[] = {"/bin/sh", "/etc/rc", 0};
    if (!rescue) start(rc, NULL);
    SYS(__NR_close, settled[0]);
    SYS(__NR_close, settled[1]);

    char active[256] = "", path[8][48];
    long shells[8];
    int count = 0;
    read_file("/sys/class/tty/console/active", active, sizeof active);
    for (char *p = active; *p > ' ' && count < 8;) {
        size_t n = text_length("/dev/");
        memcpy(path[count], "/dev/", n);
        while (*p > ' ' && n < sizeof path[0] - 1) path[count][n++] = *p++;
        path[count++][n] = 0;
        while (*p && *p <= ' ') p++;
    }
    if (!count) {
        memcpy(path[0], "/dev/console", 13);
        count = 1;
    }
    if (rescue) {
        memcpy(path[0], "/dev/console", 13);
        count = 1;
        say("init: for a single user: /etc/rc did not run; the end of this shell powers off\n");
    }
    static char *shell[] = {"/bin/sh", "-l", 0};
    for (int i = 0; i < count; i++) shells[i] = start(shell, path[i]);
    int polled = 1 + open_buttons(fds + 1, 10);

    for (;;) {
        SYS(__NR_poll, fds, polled, -1);
        for (int i = 1; i < polled; i++)
            if (fds[i].revents && power_key(fds[i].fd)) leave(POWER_OFF);
        if (!fds[0].revents) continue;
        uint32_t information[32];
        SYS(__NR_read, fds[0].fd, information, sizeof information);
        if (information[0] == SIGUSR2) leave(POWER_OFF);
        if (information[0] == SIGUSR1) leave(HALT);
        if (information[0] == SIGTERM || information[0] == SIGINT) leave(RESTART);
        long gone;
        while ((gone = SYS(__NR_wait4, -1, 0, 1 /* WNOHANG */, 0)) > 0)
            for (int i = 0; i < count; i++)
                if (gone == shells[i]) {
                    if (i == count - 1) leave(POWER_OFF);
                    shells[i] = start(shell, path[i]);
                }
    }
}

__attribute__((noreturn, used)) void guest_main(long *stack)
{
    char **arguments = (char **)(stack + 1);
    char **given = arguments + stack[0] + 1;
    int count = 4;
    for (; *given && count < 63; given++) {
        const char *terminal = text_after(*given, "TERM=");
        if (terminal) environment[2] = *given;
        else if (!text_after(*given, "HOME=") && !text_after(*given, "PATH=") && !text_after(*given, "USER="))
            environment[count++] = *given;
    }
    guest_environment = environment;
    if (stack[0] == 3 && text_equal(arguments[1], "serve")) {
        int link = 0;
        for (const char *digit = arguments[2]; *digit; digit++) link = link * 10 + *digit - '0';
        SYS(__NR_fcntl, link, F_SETFD, FD_CLOEXEC);
        serve(link);
    }
    if (SYS(__NR_getpid, 0) != 1) agent(-1);
    if (text_equal(arguments[0], "/init")) {
        mark("init");
        mount_at("devtmpfs", "/dev", "");
        long fd = open_file("/dev/console", O_RDWR | O_NOCTTY);
        for (int i = 0; fd >= 0 && i < 3; i++) SYS(__NR_dup2, fd, i);
        if (fd > 2) SYS(__NR_close, fd);
        mount_at("proc", "/proc", "");
        mount_at("sysfs", "/sys", "");
        read_modules();
        load_modules(NULL);
        switch_root(arguments);
        mount_shares("");
    }
    run_system(arguments);
    __builtin_unreachable();
}

__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call guest_main\n");
