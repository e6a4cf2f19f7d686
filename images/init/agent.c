/* The guest agent: runs programs for the host over vsock. One connection is one program; each has a process of its own.
 *
 * Version 3 of the protocol. The agent listens on port 1024, and says so, and which version it speaks, by connecting once
 * to the host's port 1024 + version. Frames, both ways: type (1 byte), length (4, little-endian), payload.
 *   host to guest: 5 START  flags (4), rows (2), columns (2), argc (4), envc (4), with LIMITED bytes of memory (8), bytes
 *                           that the root file system may hold more (8), processes (4), zero (4), then zero-terminated
 *                           strings: working directory (empty: the user's home), user (empty: the agent's own; else
 *                           USER[:GROUP], names or numbers), argc arguments, envc NAME=value
 *                  6 PART   what follows in further PART frames and then in START: for a START beyond MAX_FRAME
 *                  2 STDIN bytes; empty: end of file    3 SIGNAL number (1)    4 RESIZE rows (2), columns (2)
 *   guest to host: 0x81 STDOUT  0x82 STDERR  0x83 EXIT kind (1: 0 exited, 1 killed), code (1)  0x84 ERROR text
 *                  0x85 CREDIT bytes (4) of STDIN that were taken, since the last CREDIT
 *                  0x86 USAGE  microseconds of CPU (8), KiB of memory at most (8): before EXIT, the program's own and those
 *                              of its children that it waited for, as getrusage(2) has them
 *                  0x87 STARTED process (4): with NUMBERED, before anything else
 *                  0x88 USED   with LIMITED, before USAGE: microseconds of CPU, bytes read from disks, bytes written to them,
 *                              bytes that the root file system holds more, the limit that was hit (8 each; 0 none,
 *                              1 memory, 2 processes, 3 disk), of all that the program started (limits.c)
 * Flags: 1 TERMINAL; 2 TOOL: the words are for tools.c; 4 NUMBERED; 8 LIMITED: a control group of its own, which SIGKILL
 * ends, and the end of the connection before EXIT; 16 KEPT: the end of the connection ends nothing, and the next one to port
 * KEPT_PORT + the program's process goes on with it: nothing of STDIN may be sent there before CREDIT says so.
 * The host has at most WINDOW bytes of STDIN on their way, so signals and sizes are never stuck behind input that the
 * program does not read. A connection that begins with RESIZE is about the console's terminal, and ends with that. One that
 * begins with 7 IDENTITY tells a copy of a machine who it is, and is answered by EXIT: nanoseconds since 1970 (8), 64 random
 * bytes, then two texts with their lengths (1) before them, host name and machine id (either may be empty), and a number
 * (1) of pairs of network addresses (6 each), the old and the new one.
 * Programs start when the system is set up (/etc/rc has ended, and with it DHCP), but at most SETTLE_MS after the agent.
 *
 * EXIT comes as soon as the program itself has ended, after everything that it wrote. What it left behind runs on; what
 * that writes later is read and thrown away (on a terminal: the terminal hangs up). The end of the connection before EXIT
 * kills the program's process group. After EXIT input is discarded until the host closes.
 *
 * A process that served a small program waits for another connection, which the agent hands it, for forking costs a third
 * of running a program; a few wait so, and a large stream ends its process, which gives its memory back. */
#include "sys.h"
#include "limits.h"

enum { AF_VSOCK = 40, SOCK_STREAM = 1, ANY = -1, HOST_CID = 2, AGENT_PORT = 1024, VERSION = 3, BACKLOG = 1024 };
enum { EXEC_OF_VERSION_1 = 1, STDIN = 2, SIGNAL = 3, RESIZE = 4, START = 5, PART = 6, IDENTITY = 7 };
enum { STDOUT = 0x81, STDERR = 0x82, EXIT = 0x83, ERROR = 0x84, CREDIT = 0x85, USAGE = 0x86, STARTED = 0x87, USED = 0x88 };
enum { TERMINAL = 1, TOOL = 2, NUMBERED = 4, LIMITED = 8, KEPT = 16, KEPT_PORT = 65536, TOOL_FILES = 32 };
enum { HEAD = 5, MAX_FRAME = 65536, MAX_START = (2 << 20) + 65536, PIPE = 256 << 10 };
enum { WINDOW = 256 << 10, RING = WINDOW + 64 /* a terminal's end of file takes a byte that nobody counts */ };
enum { AF_UNIX = 1, MSG_CMSG_CLOEXEC = 0x40000000, SERVERS = 2, SMALL = 256 << 10 };
enum { SETTLE_MS = 2000, TERMINAL_QUIET_MS = 50, TERMINAL_REST = 65536 };
enum { TIOCSCTTY = 0x540e, TIOCGWINSZ = 0x5413, TIOCSWINSZ = 0x5414, TIOCSPTLCK = 0x40045431, TIOCGPTN = (int)0x80045430 };
enum { FIONREAD = 0x541b, MORE_ENVIRONMENT = 80, STANDARD_OUT = 0, STANDARD_ERROR = 1 };
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
static unsigned half(const uint8_t *p) { return p[0] | (unsigned)p[1] << 8; }
static uint32_t word(const uint8_t *p) { return half(p) | (uint32_t)half(p + 2) << 16; }
static void put_head(uint8_t *to, uint8_t type, uint32_t length)
{
    to[0] = type;
    memcpy(to + 1, &length, 4);
}
/* Throw away what comes until the host has closed the connection and what the program left behind has ended. Closing with
 * input unread would reset the connection and take the frames that the host has not read yet along. */
static void discard(int link, const int output[2])
{
    uint8_t data[4096];
    struct pollfd fds[3] = {{link, POLLIN, 0}, {output[0], POLLIN, 0}, {output[1], POLLIN, 0}};
    while (fds[0].fd >= 0 || fds[1].fd >= 0 || fds[2].fd >= 0) {
        if (SYS(__NR_poll, fds, 3, -1) < 0) continue;
        for (int i = 0; i < 3; i++) {
            if (fds[i].fd < 0 || !fds[i].revents) continue;
            long got = SYS(__NR_read, fds[i].fd, data, sizeof data);
            if (got > 0 || got == -EINTR || got == -EAGAIN) continue;
            SYS(__NR_close, fds[i].fd);
            fds[i].fd = -1;
        }
    }
}

__attribute__((noreturn)) static void refuse(int link, const char *why)
{
    static const int no_output[2] = {-1, -1};
    uint8_t head[HEAD];
    put_head(head, ERROR, (uint32_t)text_length(why));
    if (write_all(link, head, HEAD)) write_all(link, why, text_length(why));
    discard(link, no_output);
    SYS(__NR_exit_group, 0);
    __builtin_unreachable();
}

static int open_terminal(int *other)
{
    long master = open_file("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    int unlock = 0, number = 0;
    if (master < 0) return -1;
    SYS(__NR_ioctl, master, TIOCSPTLCK, &unlock);
    SYS(__NR_ioctl, master, TIOCGPTN, &number);
    char path[32];
    append_number(append(path, "/dev/pts/"), (uint64_t)number);
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

__attribute__((noreturn)) static void answer_identity(int link, const uint8_t *payload, uint32_t length)
{
    static const int no_output[2] = {-1, -1};
    uint8_t answer[HEAD + 2] = {0};
    if (!take_identity(payload, length)) refuse(link, "IDENTITY has the wrong length");
    put_head(answer, EXIT, 2);
    write_all(link, answer, sizeof answer);
    discard(link, no_output);
    SYS(__NR_exit_group, 0);
    __builtin_unreachable();
}

/* What START asks for: pointers into the memory that holds the frame. */
struct request {
    unsigned flags, rows, columns;
    const char *directory, *user;
    char **arguments, **environment;
    struct limits limits;
    void *memory[2];
    size_t size[2];
};

/* Read frames up to START, all of it into one piece of memory. Ends the process if it is something else. */
static struct request receive_start(int link)
{
    struct request request = {0};
    size_t length = 0;
    uint8_t head[HEAD] = {PART}, *start = new_memory(MAX_START + 1);
    if (!start) refuse(link, "no memory to be had");
    while (head[0] != START) {
        if (!read_all(link, head, HEAD)) SYS(__NR_exit_group, 0);
        uint32_t more = word(head + 1);
        if (head[0] == EXEC_OF_VERSION_1) refuse(link, "the host speaks version 1 of its protocol, this agent version 3");
        if (head[0] != START && head[0] != PART && !(head[0] == RESIZE && !length && more == 4)
            && !(head[0] == IDENTITY && !length))
            refuse(link, "expected START");
        if (more > MAX_FRAME || length + more > MAX_START) refuse(link, "START is too long");
        if (!read_all(link, start + length, more)) SYS(__NR_exit_group, 0);
        length += more;
        if (head[0] == RESIZE) resize_consoles(link, half(start), half(start + 2));
        if (head[0] == IDENTITY) answer_identity(link, start, more);
    }
    if (length < 16) refuse(link, "START is too short");
    request.flags = word(start);
    request.rows = half(start + 4);
    request.columns = half(start + 6);
    uint32_t argc = word(start + 8), envc = word(start + 12);
    /* Each string takes a byte at least, which bounds the table. */
    if (!argc || argc > length || envc > length) refuse(link, "no arguments, or too many");
    request.size[1] = (argc + envc + MORE_ENVIRONMENT) * sizeof(char *);
    char **strings = new_memory(request.size[1]);
    if (!strings) refuse(link, "no memory to be had");
    request.memory[0] = start;
    request.size[0] = MAX_START + 1;
    request.memory[1] = strings;
    uint8_t *text = start + 16;
    if (request.flags & LIMITED) {
        if (length < 16 + sizeof request.limits) refuse(link, "START is too short");
        memcpy(&request.limits, text, sizeof request.limits);
        text += sizeof request.limits;
    }
    request.directory = (char *)text;
    request.arguments = strings;
    request.environment = strings + argc + 1;
    char *p = (char *)text, *end = (char *)start + length;
    for (uint32_t i = 0; i < 2 + argc + envc; i++) {
        if (p >= end) refuse(link, "START is too short");
        if (i == 1) request.user = p;
        else if (i >= 2 + argc) request.environment[i - 2 - argc] = p;
        else if (i >= 2) request.arguments[i - 2] = p;
        p += text_length(p) + 1; /* the byte behind `end` is zero */
    }
    return request;
}

/* Frames that come in pieces: what is read of the next one. */
struct incoming { uint8_t head[HEAD], small[4]; uint32_t head_got, left, length; };

/* Input that the program has not taken yet, and how many bytes of it the host does not know to be taken. */
struct input { uint8_t bytes[RING]; uint32_t from, count, credit; int fd, ends; };

static void drop_input(struct input *input)
{
    input->credit += input->count;
    input->count = 0;
    if (input->fd >= 0) SYS(__NR_close, input->fd);
    input->fd = -1;
}

/* Write what there is, as far as the program takes it; end its input when that was asked for. */
static void feed(struct input *input, int is_terminal)
{
    while (input->count && input->fd >= 0) {
        uint32_t straight = RING - input->from;
        if (straight > input->count) straight = input->count;
        long put = SYS(__NR_write, input->fd, input->bytes + input->from, straight);
        if (put == -EINTR) continue;
        if (put == -EAGAIN) return;
        if (put < 0) {
            if (is_terminal) input->fd = -1;
            drop_input(input);
            return;
        }
        input->from = (input->from + (uint32_t)put) % RING;
        input->count -= (uint32_t)put;
        input->credit += (uint32_t)put;
    }
    if (!input->count && input->ends && input->fd >= 0) {
        if (!is_terminal) SYS(__NR_close, input->fd);
        input->fd = -1;
    }
}

/* 0: the host breaks the protocol. */
static int store(struct input *input, const uint8_t *from, uint32_t n)
{
    if (n > RING - input->count) return 0;
    if (input->fd < 0 || input->ends) {
        input->credit += n;
        return 1;
    }
    while (n) {
        uint32_t at = (input->from + input->count) % RING, straight = RING - at;
        if (straight > n) straight = n;
        memcpy(input->bytes + at, from, straight);
        input->count += straight;
        from += straight;
        n -= straight;
    }
    return 1;
}

/* The group of the program that this process serves; NULL: it has none. */
static struct account *limited;

/* A whole SIGNAL or RESIZE, or the end of the input. 0: the host breaks the protocol. */
static int command(uint8_t type, uint32_t length, const uint8_t *payload, long child, int master, struct input *input)
{
    if (type == STDIN && length == 0) {
        static const uint8_t end_of_file = 4; /* Ctrl-D, which the terminal's line discipline turns into the end */
        if (master >= 0 && !store(input, &end_of_file, 1)) return 0;
        input->ends = 1;
    } else if (type == SIGNAL && length == 1) {
        if (child > 0) SYS(__NR_kill, -child, payload[0]);
        if (child > 0 && limited && payload[0] == SIGKILL) kill_limits(limited);
    } else if (type == RESIZE && length == 4) {
        if (master >= 0) set_size(master, half(payload), half(payload + 2));
    } else return 0;
    return 1;
}

/* Take what came. 0: the host breaks the protocol. `child`: 0 when it has ended. */
static int take(struct incoming *in, const uint8_t *p, uint32_t n, long child, int master, struct input *input)
{
    for (;;) {
        while (in->head_got < HEAD && n) {
            in->head[in->head_got++] = *p++;
            n--;
            if (in->head_got == HEAD) in->left = in->length = word(in->head + 1);
        }
        if (in->head_got < HEAD) return 1;
        uint32_t part = n < in->left ? n : in->left;
        int is_input = in->head[0] == STDIN && in->length;
        if (in->length > (is_input ? MAX_FRAME : sizeof in->small)) return 0;
        if (is_input && !store(input, p, part)) return 0;
        if (!is_input) memcpy(in->small + in->length - in->left, p, part);
        p += part;
        n -= part;
        in->left -= part;
        if (in->left) return 1;
        if (!is_input && !command(in->head[0], in->length, in->small, child, master, input)) return 0;
        in->head_got = 0;
        if (!n) return 1;
    }
}

/* What a child needs to become the program. */
struct start { const struct request *request; const struct account *account; int standard[3], slave; };

static void run_child(struct start *start)
{
    SYS(__NR_setsid, 0);
    if (start->account) join_limits(start->account);
    if (start->slave >= 0) SYS(__NR_ioctl, start->slave, TIOCSCTTY, 1);
    for (int i = 0; i < 3; i++) SYS(__NR_dup2, start->standard[i], i);
    if (start->slave > 2) SYS(__NR_close, start->slave);
    if (start->request->flags & TOOL) /* what another program's execve would close */
        for (int i = 3; i < TOOL_FILES; i++) SYS(__NR_close, i);
    const struct request *request = start->request;
    become(request->directory, request->user, request->arguments, request->environment, start->slave >= 0,
           (request->flags & TOOL) != 0);
}

/* A child that shares our memory, on a stack of its own, until it becomes another program or ends, while we wait: no page
 * table is copied and no page after it (tests.bench agent). Its process id. */
static long spawn(struct start *start)
{
    enum { CLONE_VM = 0x100, CLONE_VFORK = 0x4000 };
    static uint8_t stack[32768] __attribute__((aligned(16)));
    long child;
    register void *top __asm__("rsi") = stack + sizeof stack;
    register long parent_id __asm__("rdx") = 0, child_id __asm__("r10") = 0, thread __asm__("r8") = 0;
    register void *entry __asm__("r12") = (void *)run_child, *argument __asm__("r13") = start;
    __asm__ volatile("syscall\n test %%rax, %%rax\n jnz 1f\n xor %%ebp, %%ebp\n mov %%r13, %%rdi\n call *%%r12\n ud2\n 1:"
                     : "=a"(child), "+r"(top), "+r"(parent_id), "+r"(child_id), "+r"(thread)
                     : "a"((long)__NR_clone), "D"((long)(CLONE_VM | CLONE_VFORK | SIGCHLD)), "r"(entry), "r"(argument)
                     : "rcx", "r11", "memory");
    return child;
}

/* Start the program: its process id. *input, output: our ends of its standard streams; of a terminal, which is *master,
 * the first two are that. */
static long start_program(int link, const struct request *request, const struct account *account, int *input,
                          int output[2], int *master)
{
    int in[2] = {-1, -1}, out[2] = {-1, -1}, error[2] = {-1, -1}, slave = -1;
    *master = -1;
    if (request->flags & TERMINAL) {
        *master = open_terminal(&slave);
        if (*master < 0) refuse(link, "no terminal to be had");
        set_size(*master, request->rows, request->columns);
    } else {
        if (SYS(__NR_pipe2, in, O_CLOEXEC) < 0 || SYS(__NR_pipe2, out, O_CLOEXEC) < 0 ||
            SYS(__NR_pipe2, error, O_CLOEXEC) < 0)
            refuse(link, "no pipe to be had");
        SYS(__NR_fcntl, in[1], F_SETPIPE_SZ, PIPE); /* fewer switches between the program and us; it may be refused */
        SYS(__NR_fcntl, out[0], F_SETPIPE_SZ, PIPE);
    }
    struct start start = {request, account, {in[0], out[1], error[1]}, slave};
    if (slave >= 0) start.standard[0] = start.standard[1] = start.standard[2] = slave;
    long child = request->flags & TOOL ? SYS(__NR_fork, 0) : spawn(&start);
    if (!child) run_child(&start); /* a tool is this program, and lives in a copy of its memory */
    if (child < 0) refuse(link, "no process to be had");
    SYS(__NR_close, slave >= 0 ? slave : in[0]);
    if (slave < 0) {
        SYS(__NR_close, out[1]);
        SYS(__NR_close, error[1]);
    }
    *input = *master >= 0 ? *master : in[1];
    output[STANDARD_OUT] = *master >= 0 ? *master : out[0];
    output[STANDARD_ERROR] = error[0];
    SYS(__NR_fcntl, *input, F_SETFL, (*master >= 0 ? O_RDWR : O_WRONLY) | O_NONBLOCK);
    return child;
}

/* The connection is gone: wait for another one, to a port that is this program's. -1: there is none to be had. */
static int listen_for_host(long child)
{
    int listener = (int)SYS(__NR_socket, AF_VSOCK, SOCK_STREAM | O_CLOEXEC, 0);
    struct sockaddr_vm address = {AF_VSOCK, 0, (uint32_t)(KEPT_PORT + child), (uint32_t)ANY, 0, {0}};
    if (listener >= 0 && SYS(__NR_bind, listener, &address, sizeof address) >= 0 && SYS(__NR_listen, listener, 1) >= 0)
        return listener;
    if (listener >= 0) SYS(__NR_close, listener);
    return -1;
}

/* One connection from its first frame to its end. 1: this process may serve another, as little as it moved. */
static int serve_one(int link)
{
    static int signals = -1;
    struct request request = receive_start(link);
    if (settled_pipe >= 0) {
        wait_settled();
        SYS(__NR_close, settled_pipe);
        settled_pipe = -1;
    }
    uint64_t mask = 1ull << (SIGCHLD - 1) | 1ull << (SIGPIPE - 1), moved = 0;
    signal_mask(mask);
    if (signals < 0) signals = (int)SYS(__NR_signalfd4, -1, &mask, 8, O_CLOEXEC | O_NONBLOCK);
    int output[2], master, status = 0, exited = 0;
    uint64_t usage[18] = {0}; /* struct rusage: user and system time as seconds and microseconds, then ru_maxrss in KiB */
    static struct input input;
    static struct incoming incoming;
    static uint8_t came[MAX_FRAME + HEAD], going[MAX_FRAME]; /* a frame is one packet of the socket: head and payload */
    uint32_t going_from = 0, going_to = 0;
    long left[2] = {-1, -1}; /* bytes that the program had written when it ended and that we have not read */
    input.from = input.count = input.credit = 0;
    input.ends = 0;
    incoming.head_got = 0;
    static struct account account;
    int is_limited = (request.flags & LIMITED) != 0, is_kept = (request.flags & KEPT) != 0, listener = -1;
    if (is_limited && !begin_limits(&account, &request.limits)) {
        if (request.limits.memory | request.limits.disk | request.limits.processes)
            refuse(link, "the guest's kernel has no such limits");
        is_limited = 0; /* only its use was to be told */
    }
    limited = is_limited ? &account : NULL;
    int looks = is_limited && (request.limits.processes || request.limits.disk);
    const long child = start_program(link, &request, is_limited ? &account : NULL, &input.fd, output, &master);
    if (request.flags & NUMBERED) {
        put_head(going, STARTED, 4);
        memcpy(going + HEAD, &child, 4);
        going_to = HEAD + 4;
    }
    SYS(__NR_fcntl, link, F_SETFL, O_RDWR | O_NONBLOCK);

on:
    for (;;) {
        feed(&input, master >= 0);
        if (link >= 0 && going_from == going_to && input.credit >= WINDOW / 4) {
            put_head(going, CREDIT, 4);
            memcpy(going + HEAD, &input.credit, 4);
            input.credit = 0;
            going_from = 0, going_to = HEAD + 4;
        }
        int is_free = link >= 0 && going_from == going_to;
        if (exited && is_free && (output[0] < 0 || !left[0]) && (output[1] < 0 || !left[1])) break;
        struct pollfd fds[5] = {
            {link >= 0 ? link : listener, (short)(POLLIN | (link < 0 || is_free ? 0 : POLLOUT)), 0},
            {is_free && left[0] ? output[0] : -1, POLLIN, 0},
            {is_free && left[1] ? output[1] : -1, POLLIN, 0},
            {exited ? -1 : signals, POLLIN, 0},
            {input.count ? input.fd : -1, POLLOUT, 0},
        };
        int is_quiet = exited && master >= 0 && is_free;
        long ready = SYS(__NR_poll, fds, 5, is_quiet ? TERMINAL_QUIET_MS : looks && !exited ? LOOK_MS : -1);
        if (ready < 0) continue;
        if (looks && !exited) look_at_limits(&account);
        if (!ready && is_quiet) left[0] = 0; /* a terminal that others hold open says nothing more */
        if (fds[3].revents) {
            uint32_t information[32];
            while (SYS(__NR_read, signals, information, sizeof information) > 0);
            if (SYS(__NR_wait4, child, &status, 1 /* WNOHANG */, usage) == child) {
                exited = 1;
                for (int i = 0; i < 2; i++) {
                    int waiting = 0;
                    if (output[i] >= 0 && SYS(__NR_ioctl, output[i], FIONREAD, &waiting) < 0) waiting = 0;
                    left[i] = master >= 0 && i == 0 ? TERMINAL_REST : waiting;
                }
                continue; /* what the poll said of the outputs may be more than that */
            }
        }
        for (int i = 0; i < 2 && is_free && going_from == going_to; i++) {
            if (!fds[1 + i].revents) continue;
            long most = MAX_FRAME - HEAD;
            if (left[i] >= 0 && left[i] < most) most = left[i];
            long got = SYS(__NR_read, output[i], going + HEAD, most);
            if (got == -EINTR || got == -EAGAIN) continue;
            if (got > 0) {
                put_head(going, i == STANDARD_OUT ? STDOUT : STDERR, (uint32_t)got);
                going_from = 0, going_to = HEAD + (uint32_t)got;
                moved += (uint64_t)got;
                if (left[i] > 0) left[i] -= got;
                continue;
            }
            SYS(__NR_close, output[i]);
            output[i] = -1;
            if (master >= 0) master = input.fd = -1, drop_input(&input);
        }
        if (link < 0) {
            if (!fds[0].revents) continue;
            link = (int)SYS(__NR_accept4, listener, 0, 0, O_CLOEXEC | O_NONBLOCK);
            if (link < 0) continue;
            SYS(__NR_close, listener);
            listener = -1;
            incoming.head_got = 0;
            going_from = 0; /* a frame that was sent in part is sent again */
            input.credit = WINDOW - (input.count < WINDOW ? input.count : WINDOW);
            continue;
        }
        if (going_from < going_to) {
            long put = SYS(__NR_write, link, going + going_from, going_to - going_from);
            if (put > 0) going_from += (uint32_t)put;
            else if (put != -EAGAIN && put != -EINTR) goto gone;
        }
        if (fds[0].revents & ~POLLOUT) {
            long got = SYS(__NR_read, link, came, sizeof came);
            if (got == -EAGAIN || got == -EINTR) continue;
            if (got > 0) moved += (uint64_t)got;
            if (got <= 0 || !take(&incoming, came, (uint32_t)got, exited ? 0 : child, master, &input)) goto gone;
        }
    }
    SYS(__NR_fcntl, link, F_SETFL, O_RDWR);
    if (is_limited) {
        struct used used;
        read_limits(&account, &used);
        end_limits(&account);
        put_head(going, USED, sizeof used);
        memcpy(going + HEAD, &used, sizeof used);
        write_all(link, going, HEAD + sizeof used);
    }
    const uint64_t used[2] = {(usage[0] + usage[2]) * 1000000 + usage[1] + usage[3], usage[4]};
    put_head(going, USAGE, sizeof used);
    memcpy(going + HEAD, used, sizeof used);
    write_all(link, going, HEAD + sizeof used);
    put_head(going, EXIT, 2);
    going[HEAD] = (status & 127) != 0;
    going[HEAD + 1] = (uint8_t)((status & 127) ? status & 127 : status >> 8);
    write_all(link, going, HEAD + 2);
    if (master >= 0) output[STANDARD_OUT] = -1; /* the same descriptor: once it is closed, the terminal hangs up */
    if (master >= 0 || input.fd >= 0) SYS(__NR_close, master >= 0 ? master : input.fd);
    discard(link, output);
    if (is_limited) end_limits(&account);
    int again = moved < SMALL && !is_kept && !*request.user; /* looking a user up leaves files mapped */
    for (int i = 0; i < 2; i++) SYS(__NR_munmap, request.memory[i], request.size[i]);
    return again;
gone:
    SYS(__NR_close, link);
    link = -1;
    if (is_kept && (listener = listen_for_host(child)) >= 0) goto on;
    if (!exited) SYS(__NR_kill, -child, SIGKILL);
    if (is_limited) {
        kill_limits(&account);
        for (int i = 0; i < 100 && !exited; i++, pause_ms(10)) /* a group goes when its last member has been reaped */
            exited = SYS(__NR_wait4, child, &status, 1, usage) == child;
        end_limits(&account);
    }
    SYS(__NR_exit_group, 0);
    __builtin_unreachable();
}

void serve(int link)
{
    serve_one(link);
    SYS(__NR_exit_group, 0);
    __builtin_unreachable();
}

/* Processes that may serve one connection after another. One that waits says so in is_idle, memory that all share; the
 * agent alone takes that back, when it hands a connection over. A process that somebody killed is found by the end of its
 * socket. */
static struct server { int socket; } servers[SERVERS];
static int *is_idle;

struct message {
    struct { void *base; size_t length; } part;
    struct { size_t length; int level, type, descriptor, padding; } control;
    struct { void *name; uint32_t name_length; void *parts; size_t count; void *control; size_t control_length; int flags; }
        header;
    char byte;
};
static void prepare(struct message *message, int descriptor)
{
    enum { SOL_SOCKET = 1, SCM_RIGHTS = 1 };
    memset(message, 0, sizeof *message);
    message->part.base = &message->byte;
    message->part.length = 1;
    message->control.length = sizeof(size_t) + 3 * sizeof(int);
    message->control.level = SOL_SOCKET;
    message->control.type = SCM_RIGHTS;
    message->control.descriptor = descriptor;
    message->header.parts = &message->part;
    message->header.count = 1;
    message->header.control = &message->control;
    message->header.control_length = sizeof message->control;
}

/* Serve `link`, then what the agent hands over on `socket`. */
__attribute__((noreturn)) static void serve_many(int link, int index, int socket)
{
    while (serve_one(link) && index >= 0) {
        struct message message;
        prepare(&message, -1);
        __atomic_store_n(&is_idle[index], 1, __ATOMIC_SEQ_CST);
        long got;
        while ((got = SYS(__NR_recvmsg, socket, &message.header, MSG_CMSG_CLOEXEC)) == -EINTR);
        if (got <= 0 || message.control.descriptor < 0) break;
        link = message.control.descriptor;
    }
    SYS(__NR_exit_group, 0);
    __builtin_unreachable();
}

static void forget(struct server *server)
{
    SYS(__NR_close, server->socket);
    server->socket = -1;
}

/* Give the connection to a process that waits for one. 0: there is none. */
static int hand_over(int link)
{
    struct message message;
    prepare(&message, link);
    for (int i = 0; i < SERVERS; i++) {
        if (servers[i].socket < 0 || !__atomic_exchange_n(&is_idle[i], 0, __ATOMIC_SEQ_CST)) continue;
        if (SYS(__NR_sendmsg, servers[i].socket, &message.header, 0) == 1) return 1;
        forget(&servers[i]);
    }
    return 0;
}

/* Start a process for the connection, which stays for others if there is room for one more of its kind. */
static void start_server(int listener, int link)
{
    int index = -1, ends[2] = {-1, -1};
    for (int i = 0; i < SERVERS && index < 0; i++) {
        struct pollfd end = {servers[i].socket, POLLIN, 0};
        if (servers[i].socket >= 0 && SYS(__NR_poll, &end, 1, 0) > 0) forget(&servers[i]);
        if (servers[i].socket < 0) index = i;
    }
    if (index >= 0 && SYS(__NR_socketpair, AF_UNIX, SOCK_STREAM | O_CLOEXEC, 0, ends) < 0) index = -1;
    if (index >= 0) is_idle[index] = 0;
    if (SYS(__NR_fork, 0) == 0) {
        uint64_t standard[4] = {0, 0, 0, 0};
        SYS(__NR_rt_sigaction, SIGCHLD, standard, 0, 8);
        SYS(__NR_rt_sigaction, SIGPIPE, standard, 0, 8);
        SYS(__NR_close, listener);
        for (int i = 0; i < SERVERS; i++)
            if (servers[i].socket >= 0) SYS(__NR_close, servers[i].socket);
        if (index >= 0) SYS(__NR_close, ends[0]);
        serve_many(link, index, ends[1]);
    }
    if (index < 0) return;
    SYS(__NR_close, ends[1]);
    servers[index].socket = ends[0];
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
    if (listener < 0 || SYS(__NR_bind, listener, &address, sizeof address) < 0 ||
        SYS(__NR_listen, listener, BACKLOG) < 0)
        SYS(__NR_exit_group, 0);
    int ready = (int)SYS(__NR_socket, AF_VSOCK, SOCK_STREAM | O_CLOEXEC, 0);
    address.port = AGENT_PORT + VERSION;
    address.cid = HOST_CID;
    if (ready >= 0) {
        SYS(__NR_connect, ready, &address, sizeof address);
        SYS(__NR_close, ready);
    }
    enum { MAP_SHARED = 1 };
    is_idle = (int *)SYS(__NR_mmap, 0, SERVERS * sizeof *is_idle, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < SERVERS; i++) servers[i].socket = -1;
    for (;;) {
        int link = (int)SYS(__NR_accept4, listener, 0, 0, O_CLOEXEC);
        if (link < 0) {
            if (link != -EINTR) pause_ms(10);
            continue;
        }
        if (!hand_over(link)) start_server(listener, link);
        SYS(__NR_close, link);
    }
}
