/* What the host asks of the guest's files and ports, by programs that the agent itself is: an image needs none of its own.
 *
 * A START whose flags say so names one of these instead of a program. It runs as the user asked for, from that user's home
 * directory; its exit status is 0 or an errno. Numbers are little-endian. A path may begin with "~", the user's home.
 *   stat PATH                   an ENTRY
 *   list PATH DEPTH             an ENTRY for everything below, down to DEPTH directories
 *   mkdir PATH                  and what is above it; EEXIST if it is there; an ENTRY
 *   remove PATH                 with all that is in it
 *   rename PATH TO              directories above TO are made; an ENTRY
 *   read PATH                   an ENTRY, then the content
 *   write PATH [NAME=VALUE...]  standard input becomes the content; directories above are made; the extended attributes
 *                               user.NAME are set; an ENTRY
 *   watch PATH RECURSIVE        events: kind (1), then an ENTRY whose path is the one that changed; kind 0 once it watches;
 *                               1 created, 2 written, 3 removed, 4 renamed, 5 attributes changed. An ENTRY of what is gone
 *                               has mode 0
 *   connect PORT                a TCP port of the loopback interface: a byte 1 once it is open, then what comes from there;
 *                               standard input goes there
 *   measure                     bytes of the root file system, free bytes of it (8 each), then /proc/stat's first line and
 *                               /proc/meminfo, each with a zero behind
 * ENTRY: mode (4), mode of what a symbolic link leads to, or 0 (4), user (4), group (4), size (8), nanoseconds of the last
 * modification since 1970 (8), then with a zero behind each: absolute path, link's target, user's name, group's name. */
#include "sys.h"

enum { O_CREAT = 0x40, O_TRUNC = 0x200, O_DIRECTORY = 0x10000, O_NOFOLLOW = 0x20000, AT_REMOVEDIR = 0x200 };
enum { EIO = 5, EROFS = 30, ENOTDIR = 20, EISDIR = 21, EINVAL = 22, ENOSPC = 28, ENAMETOOLONG = 36, EOVERFLOW = 75, ECONNREFUSED = 111 };
enum { S_IFMT = 0170000, S_IFDIR = 0040000, S_IFREG = 0100000, S_IFLNK = 0120000 };
enum { PATH = 4096, DENTS = 1024, MAX_WATCHES = 16384, SMALL_NAME = 256, BUFFER = 65536 };
struct status { uint64_t device, inode, links; uint32_t mode, uid, gid, padding; uint64_t rdev, size, blksize, blocks;
                uint64_t atime[2], mtime[2], ctime[2], unused[3]; };
struct entry { uint64_t inode; int64_t offset; uint16_t size; uint8_t type; char name[]; };

static uint8_t out[BUFFER];
static size_t out_size;

static void flush(void)
{
    for (size_t done = 0; done < out_size;) {
        long put = SYS(__NR_write, 1, out + done, out_size - done);
        if (put == -EINTR) continue;
        if (put <= 0) SYS(__NR_exit_group, EIO);
        done += (size_t)put;
    }
    out_size = 0;
}
static void put(const void *from, size_t n)
{
    for (const uint8_t *p = from; n;) {
        size_t part = sizeof out - out_size < n ? sizeof out - out_size : n;
        memcpy(out + out_size, p, part);
        out_size += part, p += part, n -= part;
        if (out_size == sizeof out) flush();
    }
}
static void put_text(const char *text) { put(text, text_length(text) + 1); }

/* `path` as an absolute one. A negative errno. */
static long absolute(const char *path, char *to)
{
    size_t n = 0;
    if (path[0] == '~' && (path[1] == '/' || !path[1])) path += path[1] ? 2 : 1;
    else if (path[0] == '/') goto copy;
    long got = SYS(__NR_getcwd, to, PATH);
    if (got < 0) return got;
    n = (size_t)got - 1;
    if (*path && n > 1) to[n++] = '/';
copy:;
    size_t length = text_length(path);
    if (n + length >= PATH) return -ENAMETOOLONG;
    memcpy(to + n, path, length + 1);
    return 0;
}

static void put_entry(const char *path)
{
    struct status status = {0}, target = {0};
    static char link[PATH], owner[SMALL_NAME], group[SMALL_NAME];
    static uint32_t known[2] = {UINT32_MAX, UINT32_MAX};
    link[0] = 0;
    if (SYS(__NR_lstat, path, &status) < 0) status.mode = 0;
    if ((status.mode & S_IFMT) == S_IFLNK) {
        long got = SYS(__NR_readlink, path, link, sizeof link - 1);
        link[got > 0 ? got : 0] = 0;
        if (SYS(__NR_stat, path, &target) < 0) target.mode = 0;
    }
    if (known[0] != status.uid) name_of_id("/etc/passwd", known[0] = status.uid, owner, sizeof owner);
    if (known[1] != status.gid) name_of_id("/etc/group", known[1] = status.gid, group, sizeof group);
    uint32_t words[4] = {status.mode, target.mode, status.uid, status.gid};
    uint64_t longs[2] = {status.size, status.mtime[0] * 1000000000u + status.mtime[1]};
    put(words, sizeof words);
    put(longs, sizeof longs);
    put_text(path);
    put_text(link);
    put_text(owner);
    put_text(group);
}

/* Call `each` for what is in the directory at `path`, whose buffer holds PATH bytes; the name is at its end then. */
static long each_below(char *path, long (*each)(char *path, int is_directory, int level), int level)
{
    char entries[DENTS];
    size_t length = text_length(path);
    long fd = open_file(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC), got, error = 0;
    if (fd < 0) return fd;
    if (length && path[length - 1] == '/') length--;
    while (!error && (got = SYS(__NR_getdents64, fd, entries, sizeof entries)) != 0) {
        if (got < 0) { error = got; break; }
        for (long at = 0; at < got && !error;) {
            struct entry *entry = (void *)(entries + at);
            at += entry->size;
            size_t n = text_length(entry->name);
            if (text_equal(entry->name, ".") || text_equal(entry->name, "..")) continue;
            if (length + n + 2 > PATH) { error = -ENAMETOOLONG; break; }
            path[length] = '/';
            memcpy(path + length + 1, entry->name, n + 1);
            struct status status;
            int is_directory = entry->type == 4;
            if (!entry->type) is_directory = SYS(__NR_lstat, path, &status) >= 0 && (status.mode & S_IFMT) == S_IFDIR;
            error = each(path, is_directory, level);
        }
    }
    path[length ? length : 1] = 0;
    SYS(__NR_close, fd);
    return error;
}

static long list_entry(char *path, int is_directory, int level)
{
    put_entry(path);
    if (!is_directory || level <= 1) return 0;
    long error = each_below(path, list_entry, level - 1);
    return error == -EACCES || error == -ENOENT ? 0 : error; /* what is closed to the user, or went away, is not listed */
}

/* Make the directories above `path`, and with `whole` that itself. */
static long make_directories(char *path, int whole)
{
    long error = 0;
    for (char *p = path + 1;; p++) {
        if (*p && *p != '/') continue;
        if (!*p && !whole) return 0;
        char was = *p;
        *p = 0;
        error = SYS(__NR_mkdir, path, 0777);
        *p = was;
        if (error < 0 && error != -EEXIST && (!was || (error != -EROFS && error != -EACCES))) return error;
        if (!was) return error;
    }
}

static long remove_at(long folder, const char *name)
{
    long error = SYS(__NR_unlinkat, folder, name, 0);
    if (error != -EISDIR && error != -1 /* EPERM: what POSIX says of directories */) return error;
    long fd = SYS(__NR_openat, folder, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
    if (fd < 0) return error == -1 ? error : fd;
    error = 0;
    for (int gone = 1; gone && !error;) { /* again from the start: entries move when others go */
        char entries[DENTS];
        long got;
        gone = 0;
        SYS(__NR_lseek, fd, 0, 0);
        while (!error && (got = SYS(__NR_getdents64, fd, entries, sizeof entries)) > 0)
            for (long at = 0; at < got && !error;) {
                struct entry *entry = (void *)(entries + at);
                at += entry->size;
                if (text_equal(entry->name, ".") || text_equal(entry->name, "..")) continue;
                error = remove_at(fd, entry->name);
                gone = 1;
            }
    }
    SYS(__NR_close, fd);
    return error ? error : SYS(__NR_unlinkat, folder, name, AT_REMOVEDIR);
}

static long copy(long from, long to)
{
    for (;;) {
        long got = SYS(__NR_read, from, out, sizeof out);
        if (got == -EINTR) continue;
        if (got <= 0) return got;
        for (long done = 0; done < got;) {
            long sent = SYS(__NR_write, to, out + done, got - done);
            if (sent == -EINTR) continue;
            if (sent <= 0) return sent ? sent : -EIO;
            done += sent;
        }
    }
}

static long read_tool(const char *path)
{
    struct status status;
    long fd = open_file(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* a named pipe without a writer is empty */
    if (fd < 0) return fd;
    long error = SYS(__NR_fstat, fd, &status);
    if (error < 0) return error;
    if ((status.mode & S_IFMT) == S_IFDIR) return -EISDIR;
    put_entry(path);
    flush();
    error = copy(fd, 1);
    return error == -EAGAIN ? 0 : error;
}

static long write_tool(char *path, char **attributes)
{
    long fd = -ENOENT;
    for (int made = 0; fd == -ENOENT && made < 2; made++) {
        if (made && make_directories(path, 0) < 0) break;
        fd = SYS(__NR_open, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    }
    if (fd < 0) return fd;
    long error = copy(0, fd);
    for (; *attributes && error >= 0; attributes++) {
        char name[SMALL_NAME] = "user.", *value = *attributes;
        size_t n = 5;
        for (; *value && *value != '=' && n < sizeof name - 1; value++) name[n++] = *value;
        if (*value != '=') return -EINVAL;
        name[n] = 0;
        error = SYS(__NR_fsetxattr, fd, name, value + 1, text_length(value + 1), 0);
    }
    if (error >= 0) error = SYS(__NR_close, fd);
    if (error < 0) return error;
    put_entry(path);
    return 0;
}

/* Watching. */

enum { IN_MODIFY = 2, IN_ATTRIB = 4, IN_MOVED_FROM = 0x40, IN_MOVED_TO = 0x80, IN_CREATE = 0x100, IN_DELETE = 0x200,
       IN_DELETE_SELF = 0x400, IN_MOVE_SELF = 0x800, IN_Q_OVERFLOW = 0x4000, IN_IGNORED = 0x8000,
       IN_ONLYDIR = 0x1000000, IN_DONT_FOLLOW = 0x2000000, IN_ISDIR = 0x40000000 };
enum { WATCHED = IN_MODIFY | IN_ATTRIB | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_ONLYDIR };
enum { CREATED = 1, WRITTEN = 2, REMOVED = 3, RENAMED = 4, CHANGED = 5 };
static long notifier;
static char **watched; /* paths by watch descriptor, which begin at 1 */

static void put_event(uint8_t kind, const char *path)
{
    put(&kind, 1);
    put_entry(path);
}

static long watch_below(char *path, int is_directory, int level);

/* Remember which directory has this watch, and watch those in it. */
static long watch_contents(long wd, char *path, int level)
{
    if (!watched[wd]) watched[wd] = new_memory(PATH);
    if (!watched[wd]) return -ENOMEM;
    memcpy(watched[wd], path, text_length(path) + 1);
    long error = each_below(path, watch_below, level);
    return error == -ENOENT || error == -EACCES ? 0 : error;
}

static long watch_below(char *path, int is_directory, int level)
{
    if (level > 1) put_event(CREATED, path); /* it came with a directory that is new */
    if (!is_directory) return 0;
    long wd = SYS(__NR_inotify_add_watch, notifier, path, WATCHED | IN_DONT_FOLLOW);
    if (wd == -ENOENT || wd == -EACCES || wd == -ENOTDIR) return 0;
    if (wd < 0) return wd;
    if (wd >= MAX_WATCHES) return -ENOSPC;
    return watch_contents(wd, path, level);
}

static long watch_event(uint32_t mask, const char *folder, const char *name, int recursive)
{
    static char path[PATH];
    size_t n = text_length(folder), m = text_length(name);
    if (n + m + 2 > sizeof path) return 0;
    memcpy(path, folder, n + 1);
    if (m) {
        if (n > 1) path[n++] = '/';
        memcpy(path + n, name, m + 1);
    }
    if (mask & (IN_CREATE | IN_MOVED_TO)) put_event(CREATED, path);
    if (mask & IN_MODIFY) put_event(WRITTEN, path);
    if (mask & IN_ATTRIB) put_event(CHANGED, path);
    if (mask & IN_MOVED_FROM) put_event(RENAMED, path);
    if (mask & IN_DELETE) put_event(REMOVED, path);
    if (!recursive || !(mask & IN_ISDIR) || !(mask & (IN_CREATE | IN_MOVED_TO))) return 0;
    /* level 1 for the directory, whose event has been sent; 2 for what is found in it */
    long wd = SYS(__NR_inotify_add_watch, notifier, path, WATCHED | IN_DONT_FOLLOW);
    if (wd < 0 || wd >= MAX_WATCHES) return wd == -ENOSPC ? wd : 0;
    return watch_contents(wd, path, 2);
}

static long watch_tool(char *path, int recursive)
{
    static uint8_t events[16384] __attribute__((aligned(8)));
    uint32_t self;
    watched = new_memory(MAX_WATCHES * sizeof *watched);
    notifier = SYS(__NR_inotify_init1, O_CLOEXEC);
    if (notifier < 0) return notifier;
    if (!watched) return -ENOMEM;
    long wd = SYS(__NR_inotify_add_watch, notifier, path, WATCHED | IN_DELETE_SELF | IN_MOVE_SELF);
    if (wd < 0) return wd;
    self = (uint32_t)wd;
    watched[wd] = path;
    long error = recursive ? each_below(path, watch_below, 1) : 0;
    put_event(0, path);
    for (;;) {
        flush();
        if (error < 0) return error;
        long got = SYS(__NR_read, notifier, events, sizeof events);
        if (got == -EINTR) continue;
        if (got <= 0) return got;
        for (long at = 0; at < got && error >= 0;) {
            struct { int32_t wd; uint32_t mask, cookie, length; char name[]; } *event = (void *)(events + at);
            at += 16 + event->length;
            if (event->mask & IN_Q_OVERFLOW) return -EOVERFLOW;
            if (event->wd < 1 || event->wd >= MAX_WATCHES || !watched[event->wd]) continue;
            if ((uint32_t)event->wd == self && event->mask & (IN_DELETE_SELF | IN_MOVE_SELF)) {
                put_event(event->mask & IN_DELETE_SELF ? REMOVED : RENAMED, path);
                flush();
                return 0;
            }
            if (event->mask & IN_IGNORED) continue;
            error = watch_event(event->mask, watched[event->wd], event->length ? event->name : "", recursive);
        }
    }
}

/* Ports. */

static long connect_tool(const char *port)
{
    enum { AF_INET = 2, AF_INET6 = 10, STREAM = 1, SHUT_WR = 1 };
    long number = parse_number(port, port + text_length(port), NULL), error = -ECONNREFUSED, fd = -1;
    if (number < 1 || number > 65535) return -EINVAL;
    uint8_t v4[16] = {AF_INET, 0, (uint8_t)(number >> 8), (uint8_t)number, 127, 0, 0, 1};
    uint8_t v6[28] = {AF_INET6, 0, (uint8_t)(number >> 8), (uint8_t)number, [23] = 1};
    for (int i = 0; i < 2 && error < 0; i++) {
        fd = SYS(__NR_socket, i ? AF_INET6 : AF_INET, STREAM | O_CLOEXEC, 0);
        if (fd < 0) return i ? error : fd;
        error = i ? SYS(__NR_connect, fd, v6, sizeof v6) : SYS(__NR_connect, fd, v4, sizeof v4);
        if (error < 0) SYS(__NR_close, fd);
    }
    if (error < 0) return error;
    put("\1", 1);
    flush();
    struct pollfd fds[2] = {{0, POLLIN, 0}, {(int)fd, POLLIN, 0}};
    for (;;) {
        if (SYS(__NR_poll, fds, 2, -1) < 0) continue;
        for (int i = 0; i < 2; i++) {
            if (!fds[i].revents) continue;
            long got = SYS(__NR_read, fds[i].fd, out, sizeof out);
            if (got == -EINTR || got == -EAGAIN) continue;
            if (got <= 0 && i) return 0;
            if (got <= 0) {
                fds[0].fd = -1;
                SYS(__NR_shutdown, fd, SHUT_WR);
            }
            for (long done = 0; done < got;) {
                long sent = SYS(__NR_write, i ? 1 : fd, out + done, got - done);
                if (sent == -EINTR) continue;
                if (sent <= 0) return 0;
                done += sent;
            }
        }
    }
}

static long measure_tool(void)
{
    static char text[8192];
    uint64_t sizes[2] = {0};
    file_system_size("/", &sizes[0], &sizes[1]);
    put(sizes, sizeof sizes);
    read_file("/proc/stat", text, sizeof text);
    char *end = text;
    while (*end && *end != '\n') end++;
    *end = 0;
    put_text(text);
    text[0] = 0;
    read_file("/proc/meminfo", text, sizeof text);
    put_text(text);
    return 0;
}

static long run(char **words)
{
    static char path[PATH], other[PATH];
    const char *name = words[0];
    int count = 0;
    while (words[count]) count++;
    if (text_equal(name, "measure")) return measure_tool();
    if (count < 2) return -EINVAL;
    if (text_equal(name, "connect")) return connect_tool(words[1]);
    long error = absolute(words[1], path);
    if (error < 0) return error;
    struct status status;
    if (text_equal(name, "stat")) {
        if ((error = SYS(__NR_lstat, path, &status)) < 0) return error;
        put_entry(path);
        return 0;
    }
    if (text_equal(name, "read")) return read_tool(path);
    if (text_equal(name, "write")) return write_tool(path, words + 2);
    if (text_equal(name, "remove")) return remove_at(-100 /* AT_FDCWD */, path);
    if (text_equal(name, "mkdir")) {
        error = make_directories(path, 1);
        if (error == -EEXIST && SYS(__NR_stat, path, &status) >= 0 && (status.mode & S_IFMT) != S_IFDIR) return -ENOTDIR;
        if (error < 0) return error;
        put_entry(path);
        return 0;
    }
    if (count < 3) return -EINVAL;
    if (text_equal(name, "list")) {
        long depth = parse_number(words[2], words[2] + text_length(words[2]), NULL);
        return each_below(path, list_entry, depth < 1 ? 1 : depth > PATH ? PATH : (int)depth);
    }
    if (text_equal(name, "watch")) return watch_tool(path, words[2][0] == '1');
    if (text_equal(name, "rename")) {
        if ((error = absolute(words[2], other)) < 0) return error;
        error = SYS(__NR_rename, path, other);
        if (error == -ENOENT && SYS(__NR_lstat, path, &status) >= 0 && make_directories(other, 0) >= 0)
            error = SYS(__NR_rename, path, other);
        if (error < 0) return error;
        put_entry(other);
        return 0;
    }
    return -EINVAL;
}

void run_tool(char **words)
{
    long error = run(words);
    flush();
    SYS(__NR_exit_group, error < 0 ? -error : 0);
    __builtin_unreachable();
}
