/* The guest agent: runs programs for the host over vsock. One connection is one program; each has a process of its own.
 *
 * It listens on port 1024, and says so by connecting once to the host's port 1025. Frames, both ways: type (1 byte),
 * length (4, little-endian), payload.
 *   host to guest: 1 EXEC  flags (1: bit 0 terminal), rows (2), columns (2), argc (2), envc (2), then zero-terminated
 *                          strings: working directory (empty: /root), argc arguments, envc NAME=value
 *                  2 STDIN bytes; empty: end of file    3 SIGNAL number (1)    4 RESIZE rows (2), columns (2)
 *   guest to host: 0x81 STDOUT  0x82 STDERR  0x83 EXIT kind (1: 0 exited, 1 killed), code (1)  0x84 ERROR text
 * A connection that begins with RESIZE is about the console's terminal, and ends with that.
 * Programs start when the system is set up (/etc/rc has ended, and with it DHCP), but at most SETTLE_MS after the agent.
 * The end of the connection kills the program's process group. After EXIT input is discarded until the host closes. */
#include "sys.h"

enum { AF_VSOCK = 40, SOCK_STREAM = 1, ANY = -1, HOST_CID = 2, AGENT_PORT = 1024, READY_PORT = 1025 };
enum { EXEC = 1, STDIN = 2, SIGNAL = 3, RESIZE = 4, STDOUT = 0x81, STDERR = 0x82, EXIT = 0x83, ERROR = 0x84 };
enum { MAX_FRAME = 65536, MAX_STRINGS = 1024, SETTLE_MS = 2000 };
enum { TIOCSCTTY = 0x540e, TIOCGWINSZ = 0x5413, TIOCSWINSZ = 0x5414, TIOCSPTLCK = 0x40045431, TIOCGPTN = (int)0x80045430 };
struct sockaddr_vm { uint16_t family, reserved; uint32_t port, cid; uint8_t flags, zero[3]; };

/* The other end of this pipe is closed when the system is set up; -1: it is. */
static int settled_pipe = -1;
static long settle_deadline;

static int read_all(int fd, void *to, size_t n)
{
    for (size_t done = 0; done < n;) {
        long got = SYS(__NR_read, fd, (char *)to + done, n - done);
        if (got == -EINTR) continue;
        if (got <= 0) return 0;
        done += (size_t)got;
    }
    return 1;
}
static int write_all(int fd, const void *from, size_t n)
{
    for (size_t done = 0; done < n;) {
        long put = SYS(__NR_write, fd, (const char *)from + done, n - done);
        if (put == -EINTR) continue;
        if (put <= 0) return 0;
        done += (size_t)put;
    }
    return 1;
}
static int send_frame(int fd, uint8_t type, const void *payload, uint32_t length)
{
    uint8_t head[5] = {type, (uint8_t)length, (uint8_t)(length >> 8), (uint8_t)(length >> 16), (uint8_t)(length >> 24)};
    return write_all(fd, head, 5) && write_all(fd, payload, length);
}
/* The payload's length, or -1 at the end of the connection. */
static long receive_frame(int fd, uint8_t *type, uint8_t *payload)
{
    uint8_t head[5];
    if (!read_all(fd, head, 5)) return -1;
    uint32_t length = head[1] | (uint32_t)head[2] << 8 | (uint32_t)head[3] << 16 | (uint32_t)head[4] << 24;
    *type = head[0];
    if (length > MAX_FRAME || !read_all(fd, payload, length)) return -1;
    return length;
}
static void refuse(int fd, const char *why)
{
    send_frame(fd, ERROR, why, (uint32_t)text_length(why));
    SYS(__NR_exit_group, 1);
}
static unsigned half(const uint8_t *p) { return p[0] | (unsigned)p[1] << 8; }

static int open_terminal(int *other)
{
    long master = open_file("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    int unlock = 0, number = 0;
    if (master < 0) return -1;
    SYS(__NR_ioctl, master, TIOCSPTLCK, &unlock);
    SYS(__NR_ioctl, master, TIOCGPTN, &number);
    char path[32] = "/dev/pts/", digits[12];
    int n = 0, at = 9;
    do digits[n++] = (char)('0' + number % 10); while ((number /= 10) > 0);
    while (n) path[at++] = digits[--n];
    path[at] = 0;
    long slave = open_file(path, O_RDWR | O_NOCTTY);
    if (slave < 0) return -1;
    *other = (int)slave;
    return (int)master;
}
static void set_size(int fd, unsigned rows, unsigned columns)
{
    uint16_t size[4] = {(uint16_t)rows, (uint16_t)columns, 0, 0};
    SYS(__NR_ioctl, fd, TIOCSWINSZ, size);
}

static void wait_settled(void)
{
    struct pollfd pipe = {settled_pipe, 0, 0};
    long left;
    while (!pipe.revents && (left = settle_deadline - now_ms()) > 0) SYS(__NR_poll, &pipe, 1, left);
}

/* Each console has a shell. It may not be there yet (the driver of hvc0 learns of its port late), and a terminal that
 * nobody has open forgets its size: so look again until a shell must have it, and keep it open. A size that is there is
 * a newer one. */
static void resize_consoles(int link, unsigned rows, unsigned columns)
{
    SYS(__NR_close, link);
    for (int i = 0; i < 50; i++, pause_ms(200)) {
        char active[256] = "", path[64] = "/dev/";
        read_file("/sys/class/tty/console/active", active, sizeof active);
        for (char *p = active; *p > ' ';) {
            size_t n = 5;
            uint16_t size[4] = {0};
            while (*p > ' ' && n < sizeof path - 1) path[n++] = *p++;
            path[n] = 0;
            while (*p && *p <= ' ') p++;
            long console = open_file(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
            if (console < 0) continue;
            SYS(__NR_ioctl, console, TIOCGWINSZ, size);
            if (!i || !(size[0] | size[1])) set_size((int)console, rows, columns);
            else SYS(__NR_close, console);
        }
    }
    SYS(__NR_exit_group, 0);
}

/* In the child: become the program. Looks a bare name up in PATH. */
static void become(int link, const char *directory, char **arguments, char **environment)
{
    const char *name = arguments[0], *path = "/usr/sbin:/usr/bin:/sbin:/bin";
    signal_mask(0);
    if (SYS(__NR_chdir, *directory ? directory : "/root") < 0 && *directory) {
        say("agent: no such directory\n");
        SYS(__NR_exit_group, 126);
    }
    (void)link;
    int slash = 0;
    for (const char *p = name; *p; p++) slash |= *p == '/';
    for (char **e = environment; *e; e++) {
        const char *value = text_after(*e, "PATH=");
        if (value) path = value;
    }
    long error = -ENOENT;
    if (slash) error = SYS(__NR_execve, name, arguments, environment);
    while (!slash && *path) {
        char full[4096];
        size_t n = 0, length = text_length(name);
        while (*path && *path != ':' && n < sizeof full - 2) full[n++] = *path++;
        while (*path && *path != ':') path++;
        if (*path) path++;
        full[n++] = '/';
        if (n + length >= sizeof full) continue;
        memcpy(full + n, name, length + 1);
        long now = SYS(__NR_execve, full, arguments, environment);
        if (now != -ENOENT) error = now;
    }
    say("agent: ");
    say(name);
    say(error == -ENOENT ? ": not found\n" : ": cannot be run\n");
    SYS(__NR_exit_group, error == -ENOENT ? 127 : 126);
}

void serve(int link)
{
    static uint8_t frame[MAX_FRAME + 1];
    static char *strings[2 * MAX_STRINGS + 80];
    uint8_t type = 0;
    long length = receive_frame(link, &type, frame);
    if (length < 0) SYS(__NR_exit_group, 0);
    if (type == RESIZE && length == 4) resize_consoles(link, half(frame), half(frame + 2));
    if (type != EXEC || length < 9) refuse(link, "expected EXEC");
    frame[length] = 0;
    unsigned flags = frame[0], rows = half(frame + 1), columns = half(frame + 3);
    unsigned argc = half(frame + 5), envc = half(frame + 7);
    if (!argc || argc > MAX_STRINGS || envc > MAX_STRINGS) refuse(link, "too many arguments, or none");
    const char *directory = (char *)frame + 9;
    char *p = (char *)frame + 9, *end = (char *)frame + length;
    char **arguments = strings, **environment = strings + argc + 1;
    for (unsigned i = 0; i < 1 + argc + envc; i++) {
        if (p >= end) refuse(link, "EXEC is too short");
        if (i >= 1 + argc) environment[i - 1 - argc] = p;
        else if (i >= 1) arguments[i - 1] = p;
        p += text_length(p) + 1;
    }
    char **rest = environment + envc;
    for (char **e = guest_environment; *e; e++) *rest++ = *e;

    if (settled_pipe >= 0) wait_settled();
    int in[2] = {-1, -1}, out[2] = {-1, -1}, error[2] = {-1, -1}, slave = -1, master = -1;
    if (flags & 1) {
        master = open_terminal(&slave);
        if (master < 0) refuse(link, "no terminal to be had");
        set_size(master, rows, columns);
    } else if (SYS(__NR_pipe2, in, O_CLOEXEC) < 0 || SYS(__NR_pipe2, out, O_CLOEXEC) < 0 ||
               SYS(__NR_pipe2, error, O_CLOEXEC) < 0) {
        refuse(link, "no pipe to be had");
    }
    uint64_t mask = 1ull << (SIGCHLD - 1) | 1ull << (SIGPIPE - 1);
    signal_mask(mask);
    int signals = (int)SYS(__NR_signalfd4, -1, &mask, 8, O_CLOEXEC | O_NONBLOCK);
    long child = SYS(__NR_fork, 0);
    if (child == 0) {
        SYS(__NR_setsid, 0);
        if (slave >= 0) SYS(__NR_ioctl, slave, TIOCSCTTY, 1);
        SYS(__NR_dup2, slave >= 0 ? slave : in[0], 0);
        SYS(__NR_dup2, slave >= 0 ? slave : out[1], 1);
        SYS(__NR_dup2, slave >= 0 ? slave : error[1], 2);
        if (slave > 2) SYS(__NR_close, slave);
        become(link, directory, arguments, environment);
    }
    if (child < 0) refuse(link, "no process to be had");
    if (slave >= 0) SYS(__NR_close, slave);
    else {
        SYS(__NR_close, in[0]);
        SYS(__NR_close, out[1]);
        SYS(__NR_close, error[1]);
    }
    int input = master >= 0 ? master : in[1];
    if (input >= 0) SYS(__NR_fcntl, input, F_SETFL, (master >= 0 ? O_RDWR : O_WRONLY) | O_NONBLOCK);

    /* One frame of input at a time is held back when the program does not read; the link then waits. */
    static uint8_t held[MAX_FRAME + 1];
    long held_length = 0, held_at = 0, close_input = 0;
    int status = 0, exited = 0;
    struct pollfd fds[5];
    for (;;) {
        int output = master >= 0 ? master : out[0];
        if (exited && output < 0 && error[0] < 0) break;
        fds[0] = (struct pollfd){held_length || close_input ? -1 : link, POLLIN, 0};
        fds[1] = (struct pollfd){output, POLLIN, 0};
        fds[2] = (struct pollfd){error[0], POLLIN, 0};
        fds[3] = (struct pollfd){signals, POLLIN, 0};
        fds[4] = (struct pollfd){held_length ? input : -1, POLLOUT, 0};
        if (SYS(__NR_poll, fds, 5, -1) < 0) continue;
        if (fds[3].revents) {
            uint32_t information[32];
            while (SYS(__NR_read, signals, information, sizeof information) > 0);
            if (SYS(__NR_wait4, child, &status, 1 /* WNOHANG */, 0) == child) exited = 1;
        }
        static uint8_t data[32768];
        for (int i = 1; i <= 2; i++) {
            if (!fds[i].revents) continue;
            long got = SYS(__NR_read, fds[i].fd, data, sizeof data);
            if (got == -EINTR || got == -EAGAIN) continue;
            if (got > 0) {
                if (!send_frame(link, i == 1 ? STDOUT : STDERR, data, (uint32_t)got)) goto gone;
                continue;
            }
            SYS(__NR_close, fds[i].fd);
            if (i == 2) error[0] = -1;
            else if (master >= 0) master = input = -1, held_length = 0;
            else out[0] = -1;
        }
        if (fds[4].revents && held_length) {
            long put = SYS(__NR_write, input, held + held_at, held_length - held_at);
            if (put > 0) held_at += put;
            if ((put < 0 && put != -EAGAIN && put != -EINTR) || held_at == held_length) held_length = held_at = 0;
        }
        if (fds[0].revents) {
            length = receive_frame(link, &type, frame);
            if (length < 0) goto gone;
            if (type == STDIN && length == 0) {
                if (master >= 0) {
                    held[0] = 4;
                    held_length = 1;
                } else if (input >= 0) {
                    SYS(__NR_close, input);
                    input = -1;
                }
            } else if (type == STDIN && input >= 0) {
                memcpy(held, frame, (size_t)length);
                held_length = length;
                held_at = 0;
            } else if (type == SIGNAL && length == 1 && !exited) {
                SYS(__NR_kill, -child, frame[0]);
            } else if (type == RESIZE && length == 4 && master >= 0) {
                set_size(master, half(frame), half(frame + 2));
            }
        }
    }
    uint8_t outcome[2] = {(status & 127) != 0, (uint8_t)((status & 127) ? status & 127 : status >> 8)};
    send_frame(link, EXIT, outcome, 2);
    /* Closing with input unread would reset the connection and take the frames that the host has not read yet along. */
    for (long got = 1; got > 0 || got == -EINTR;) got = SYS(__NR_read, link, frame, MAX_FRAME);
    SYS(__NR_exit_group, 0);
gone:
    SYS(__NR_kill, -child, SIGKILL);
    SYS(__NR_exit_group, 0);
    __builtin_unreachable();
}

void agent(int settled)
{
    settled_pipe = settled;
    settle_deadline = now_ms() + SETTLE_MS;
    if (settled >= 0) SYS(__NR_fcntl, settled, F_SETFD, FD_CLOEXEC);
    uint64_t ignore[4] = {1 /* SIG_IGN */, 0, 0, 0};
    SYS(__NR_rt_sigaction, SIGPIPE, ignore, 0, 8);
    SYS(__NR_rt_sigaction, SIGCHLD, ignore, 0, 8);
    int listener = (int)SYS(__NR_socket, AF_VSOCK, SOCK_STREAM | O_CLOEXEC, 0);
    struct sockaddr_vm address = {AF_VSOCK, 0, AGENT_PORT, (uint32_t)ANY, 0, {0}};
    if (listener < 0 || SYS(__NR_bind, listener, &address, sizeof address) < 0 || SYS(__NR_listen, listener, 64) < 0)
        SYS(__NR_exit_group, 0);
    int ready = (int)SYS(__NR_socket, AF_VSOCK, SOCK_STREAM | O_CLOEXEC, 0);
    address.port = READY_PORT;
    address.cid = HOST_CID;
    if (ready >= 0) {
        if (SYS(__NR_connect, ready, &address, sizeof address) == 0) write_all(ready, "ready\n", 6);
        SYS(__NR_close, ready);
    }
    for (;;) {
        int link = (int)SYS(__NR_accept4, listener, 0, 0, O_CLOEXEC);
        if (link < 0) {
            if (link != -EINTR) pause_ms(10);
            continue;
        }
        if (SYS(__NR_fork, 0) == 0) {
            uint64_t standard[4] = {0, 0, 0, 0};
            SYS(__NR_rt_sigaction, SIGCHLD, standard, 0, 8);
            SYS(__NR_rt_sigaction, SIGPIPE, standard, 0, 8);
            SYS(__NR_close, listener);
            serve(link);
        }
        SYS(__NR_close, link);
    }
}
