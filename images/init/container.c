/* The system around a program of a container image, which brings no init: on the kernel's command line `container`.
 *
 * overlay=tmpfs[,OPTIONS] or overlay=DEVICE (an ext4 file system): what root= names stays as it is, below a writable layer
 * there. Init remains what it is, process 1 and the agent, whatever the image holds: it mounts what programs expect (/dev,
 * /proc, /sys, /dev/shm, /sys/fs/cgroup), writes /etc/hostname, hosts and resolv.conf, brings the network up and reaps
 * children. The power button sends stop_signal=N (15) to every program and waits for their ends. */
#include "sys.h"

enum { STOP_MS = 10000, LAST_WORDS_MS = 100 };

static const char *word(const char *from, char *to, size_t size)
{
    size_t n = 0;
    for (; *from && *from != ','; from++)
        if (n < size - 1) to[n++] = *from;
    to[n] = 0;
    return *from ? from + 1 : from;
}

/* Put a writable layer over what is mounted at /newroot. 0, and it was said why, if that cannot be done. */
int add_overlay(void)
{
    char where[256], device[64];
    if (!argument("overlay", where, sizeof where)) return 1;
    const char *options = word(where, device, sizeof device);
    int in_memory = text_equal(device, "tmpfs");
    SYS(__NR_mkdir, "/lower", 0755);
    SYS(__NR_mkdir, "/upper", 0755);
    long error = SYS(__NR_mount, "/newroot", "/lower", 0, MS_MOVE, 0);
    for (int i = 0; error >= 0 && i < 500; i++, pause_ms(20)) {
        error = SYS(__NR_mount, device, "/upper", in_memory ? "tmpfs" : "ext4", 0, *options ? options : NULL);
        if (error != -ENOENT) break;
        error = 0; /* the device is not there yet */
    }
    uint64_t status[18] = {0}; /* struct stat: mode, uid and gid are 32 bits each, from byte 24 */
    uint32_t mode, owner[2];
    SYS(__NR_stat, "/lower", status);
    memcpy(&mode, (char *)status + 24, 4);
    memcpy(owner, (char *)status + 28, 8);
    SYS(__NR_mkdir, "/upper/data", 0755);
    SYS(__NR_mkdir, "/upper/work", 0755);
    SYS(__NR_chown, "/upper/data", owner[0], owner[1]);
    SYS(__NR_chmod, "/upper/data", mode & 07777);
    load_file_system("overlay");
    /* index: what has several names keeps them when it is written; redirect_dir: directories of below can be renamed */
    if (error >= 0)
        error = SYS(__NR_mount, "overlay", "/newroot", "overlay", 0,
                    "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work,index=on,redirect_dir=on");
    if (error >= 0) return 1;
    say("init: cannot make the root file system writable: overlay=");
    say(where);
    say(error == -ENODEV ? ": the kernel knows no such file system\n" : ": the mount fails\n");
    return 0;
}

void replace_file(const char *path, const char *text)
{
    enum { O_CREAT = 0x40, O_EXCL = 0x80 };
    SYS(__NR_unlink, path);
    long fd = SYS(__NR_open, path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0) return;
    SYS(__NR_write, fd, text, text_length(text));
    SYS(__NR_close, fd);
}

static void set_name(void)
{
    char name[65] = "container", text[256], *to = text;
    argument("hostname", name, sizeof name);
    SYS(__NR_sethostname, name, text_length(name));
    static const char *const parts[] = {"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t", NULL, "\n"};
    for (int i = 0; i < 3; i++)
        for (const char *p = parts[i] ? parts[i] : name; *p; p++) *to++ = *p;
    *to = 0;
    SYS(__NR_mkdir, "/etc", 0755);
    replace_file("/etc/hosts", text);
    to = text;
    for (const char *p = name; *p; p++) *to++ = *p;
    *to++ = '\n', *to = 0;
    replace_file("/etc/hostname", text);
}

static void configure_card(const char *name)
{
    if (name[0] == 'e') configure_network(name);
}

/* The network cards, one after another. Each has a name in /sys/class/net. */
static void bring_network_up(void)
{
    each_entry("/sys/class/net", configure_card);
}

/* Send a signal to every program that is not ours: none of the kernel's threads, not init, not the agent. How many. */
static int signal_programs(int number)
{
    uint64_t own[18] = {0}, other[18];
    char entries[4096], path[64];
    int count = 0;
    long fd = open_file("/proc", O_RDONLY | O_CLOEXEC), length;
    if (fd < 0 || SYS(__NR_stat, "/proc/self/exe", own) < 0) return 0;
    while ((length = SYS(__NR_getdents64, fd, entries, sizeof entries)) > 0)
        for (long at = 0; at < length;) {
            struct { uint64_t inode; int64_t offset; uint16_t size; uint8_t type; char name[]; } *entry;
            entry = (void *)(entries + at);
            at += entry->size;
            long pid = parse_number(entry->name, entry->name + text_length(entry->name), NULL);
            if (pid <= 1) continue;
            static const char *const parts[] = {"/proc/", NULL, "/exe"};
            char *to = path;
            for (int i = 0; i < 3; i++)
                for (const char *p = parts[i] ? parts[i] : entry->name; *p && to < path + sizeof path - 1; p++) *to++ = *p;
            *to = 0;
            if (SYS(__NR_stat, path, other) < 0 || (other[0] == own[0] && other[1] == own[1])) continue;
            count++;
            if (number) SYS(__NR_kill, pid, number);
        }
    SYS(__NR_close, fd);
    return count;
}

static void reap(void)
{
    while (SYS(__NR_wait4, -1, 0, 1 /* WNOHANG */, 0) > 0);
}

/* Programs get time to end, and the agent to tell the host how they did. */
static void stop(void)
{
    char text[16] = "15";
    argument("stop_signal", text, sizeof text);
    long number = parse_number(text, text + text_length(text), NULL);
    signal_programs(number > 0 && number < 65 ? (int)number : SIGTERM);
    for (long end = now_ms() + STOP_MS; signal_programs(0) && now_ms() < end; pause_ms(10)) reap();
    signal_programs(SIGKILL);
    pause_ms(LAST_WORDS_MS);
    leave(POWER_OFF);
}

void run_container(void)
{
    guest_environment[4] = NULL; /* behind HOME, PATH, TERM and USER stands what the kernel made of its command line */
    mount_at("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666");
    mount_at("tmpfs", "/dev/shm", "mode=1777");
    mount_at("cgroup2", "/sys/fs/cgroup", "");
    static const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"},
                                           {"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"}};
    for (int i = 0; i < 4; i++) SYS(__NR_symlink, links[i][0], links[i][1]);
    set_name();
    loopback_up();
    struct pollfd fds[11] = {{open_signals(), POLLIN, 0}};
    int settled[2] = {-1, -1};
    SYS(__NR_pipe2, settled, 0);
    if (!SYS(__NR_fork, 0)) {
        signal_mask(0);
        SYS(__NR_close, settled[1]);
        agent(settled[0]);
    }
    if (!SYS(__NR_fork, 0)) {
        signal_mask(0);
        SYS(__NR_close, settled[0]);
        bring_network_up();
        SYS(__NR_exit_group, 0);
    }
    SYS(__NR_close, settled[0]);
    SYS(__NR_close, settled[1]);
    int polled = 1 + open_buttons(fds + 1, 10);
    for (;;) {
        SYS(__NR_poll, fds, polled, -1);
        for (int i = 1; i < polled; i++)
            if (fds[i].revents && power_key(fds[i].fd)) stop();
        if (!fds[0].revents) continue;
        uint32_t information[32];
        SYS(__NR_read, fds[0].fd, information, sizeof information);
        if (information[0] == SIGUSR2) stop();
        if (information[0] == SIGUSR1) leave(HALT);
        if (information[0] == SIGTERM || information[0] == SIGINT) leave(RESTART);
        reap();
    }
}
