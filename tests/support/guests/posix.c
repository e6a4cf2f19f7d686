/* What system calls on files do in one directory: posix DIRECTORY. Run as root; the directory is empty.
 * Over 600 lines, because it is one static program for guests, and a section for each family of calls.
 *
 * Each line printed is one call: its label, and what came of it: an error's name or "ok", and what a program would see
 * then. A run through a share and one on the host's own directory print the same lines, so the host's file system is
 * the oracle; nothing is printed that two runs on one file system would not have in common (no inode number, no time
 * of now). POSIX.1-2017 has the errors, Linux' manual pages the flags that POSIX does not know.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define OTHER 65534
#define COUNT(array) (sizeof(array) / sizeof *(array))
#define SAY(label, call) (errno = 0, say(label, (long)(call)))

static const char *section = "";
static int top, here;
/* Descriptors of the directory of the run, and of the section's. */

static const char *outcome(long result)
{
    return result < 0 ? strerrorname_np(errno) ?: "?" : "ok";
}

static void text(const char *label, const char *form, ...)
{
    va_list more;
    printf("%s/%s: ", section, label);
    va_start(more, form);
    vprintf(form, more);
    va_end(more);
    putchar('\n');
}

static long say(const char *label, long result)
{
    text(label, "%s", outcome(result));
    return result;
}

/* Begin a section in an empty directory of its own. */
static void begin(const char *name)
{
    section = name;
    umask(022);
    if (fchdir(top) || mkdir(name, 0755) || chdir(name) || dup2(open(".", O_RDONLY | O_DIRECTORY), 501) < 0)
        SAY("begin", -1);
    here = 501;
}

/* Close what a part of a section has left open. */
static void close_all(void)
{
    for (int file = 3; file < 300; file++)
        close(file);
}

/* What lstat tells, as far as it is the same everywhere. */
static void look(const char *label, const char *path)
{
    struct stat found;
    if (lstat(path, &found))
        text(label, "%s", outcome(-1));
    else
        text(label, "mode %o links %d owner %d:%d size %lld", found.st_mode, S_ISDIR(found.st_mode) ? 0 : (int)found.st_nlink,
             (int)found.st_uid, (int)found.st_gid, S_ISDIR(found.st_mode) ? 0 : (long long)found.st_size);
}

static void put(const char *path, const char *content)
{
    int file = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0644);
    if (file < 0 || write(file, content, strlen(content)) < 0)
        SAY("put", -1);
    close(file);
}

static void show(const char *label, const char *path)
{
    char data[80] = "";
    int file = open(path, O_RDONLY);
    long size = file < 0 ? -1 : read(file, data, sizeof data - 1);
    text(label, "%s %ld %s", outcome(size), size, data);
    close(file);
}

/* Become somebody, or root again. */
static void be(int who)
{
    if (setresuid(0, 0, 0) || setgroups(0, NULL) || setresgid(who, who, 0) || setresuid(who, who, 0))
        SAY("be", -1);
}

static int rename2(const char *from, const char *to, unsigned flags)
{
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, flags);
}

/* Every call that takes a path, at one path. What was made is removed. */
static void every_call(const char *what, const char *path)
{
    struct timespec times[2] = {{.tv_sec = 1}, {.tv_sec = 2}};
    struct stat found;
    char label[64], data[16];
    put("spare", "spare");
#define AT(name, call) (snprintf(label, sizeof label, "%s %s", what, name), SAY(label, call))
    AT("lstat", lstat(path, &found));
    AT("stat", stat(path, &found));
    AT("access", access(path, R_OK));
    AT("chmod", chmod(path, 0600));
    AT("chown", chown(path, 1, 2));
    AT("lchown", lchown(path, 1, 2));
    AT("truncate", truncate(path, 3));
    AT("utimensat", utimensat(AT_FDCWD, path, times, 0));
    AT("utimensat link", utimensat(AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW));
    AT("readlink", readlink(path, data, sizeof data));
    AT("setxattr", setxattr(path, "user.a", "1", 1, 0));
    AT("getxattr", getxattr(path, "user.a", data, sizeof data));
    AT("chdir", chdir(path));
    if (fchdir(here))
        SAY("back", -1);
    AT("opendir", open(path, O_RDONLY | O_DIRECTORY));
    AT("open", open(path, O_RDONLY | O_NONBLOCK));
    AT("open write", open(path, O_WRONLY | O_NONBLOCK));
    AT("open nofollow", open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
    AT("create", open(path, O_RDWR | O_CREAT | O_NONBLOCK, 0644));
    AT("create new", open(path, O_RDWR | O_CREAT | O_EXCL, 0644));
    AT("mkdir", mkdir(path, 0755));
    AT("mkfifo", mkfifo(path, 0644));
    AT("symlink", symlink("to", path));
    AT("link to", link("spare", path));
    AT("link from", link(path, "linked"));
    AT("unlink", unlink("linked"));
    AT("rename to self", rename(path, path));
    AT("rename from", rename(path, "renamed"));
    AT("rename back", rename("renamed", path));
    AT("rename to", rename("spare", path));
    AT("rmdir", rmdir(path));
    AT("unlink", unlink(path));
    AT("unlink again", unlink(path));
    AT("rmdir again", rmdir(path));
#undef AT
    unlink("spare");
    close_all();
}

static void names(void)
{
    static char name[400], path[6000];
    struct {
        int length;
        const char *what;
    } lengths[] = {{254, "name of 254"}, {255, "name of 255"}, {256, "name of 256"}};
    begin("names");
    for (size_t each = 0; each < COUNT(lengths); each++) {
        memset(name, 'n', sizeof name);
        name[lengths[each].length] = 0;
        every_call(lengths[each].what, name);
    }
    for (int length = 4094; length < 4098; length++) {
        memset(path, '/', sizeof path);
        path[0] = '.';
        strcpy(path + length - 4, "file");
        char what[40];
        snprintf(what, sizeof what, "path of %d", length);
        every_call(what, path);
    }
    put("file", "content");
    mkdir("dir", 0755);
    symlink("loop2", "loop1");
    symlink("loop1", "loop2");
    symlink("nowhere", "dangling");
    symlink("dir", "todir");
    static const char *paths[] = {"file/x", "file/", "none/x", "none/", "loop1", "loop1/x", "", "dir/.", "dir/..",
                                  "dir/none", "todir/new", "todir/", "dangling", "dangling/", "odd \n\t\377\376 name"};
    for (size_t each = 0; each < COUNT(paths); each++) {
        put("file", "content");
        mkdir("dir", 0755);
        every_call(paths[each], paths[each]);
        if (access("todir", F_OK))
            symlink("dir", "todir");
        symlink("nowhere", "dangling");
    }
    memset(path, 0, sizeof path);
    for (int depth = 0; depth < 45; depth++) {  /* a chain of links is followed 40 times */
        snprintf(name, sizeof name, "chain%d", depth);
        snprintf(path, sizeof path, "chain%d", depth + 1);
        symlink(depth == 44 ? "dir" : path, name);
    }
    SAY("45 links", access("chain0", F_OK));
    SAY("40 links", access("chain5", F_OK));
    SAY("39 links", access("chain6", F_OK));
}

static const char *kinds[] = {"none", "file", "empty", "full", "fifo", "link", "dangling", "socket"};

static void make(const char *kind, const char *path)
{
    char inner[80];
    snprintf(inner, sizeof inner, "%s/inner", path);
    if (!strcmp(kind, "file"))
        put(path, kind);
    else if (!strcmp(kind, "empty") || !strcmp(kind, "full"))
        mkdir(path, 0755);
    else if (!strcmp(kind, "fifo"))
        mkfifo(path, 0644);
    else if (!strcmp(kind, "link"))
        symlink(".", path);
    else if (!strcmp(kind, "dangling"))
        symlink("nowhere", path);
    else if (!strcmp(kind, "socket"))
        mknod(path, S_IFSOCK | 0644, 0);
    if (!strcmp(kind, "full"))
        put(inner, "inner");
}

static void clear(const char *path)
{
    char inner[80];
    for (int which = 0; which < 3; which++) {
        snprintf(inner, sizeof inner, "%s/%s", path, which == 2 ? "a" : which ? "to" : "inner");
        rmdir(inner);
        unlink(inner);
    }
    rmdir(path);
    unlink(path);
}

static void renames(void)
{
    struct {
        unsigned flags;
        const char *what;
    } ways[] = {{0, "rename"}, {RENAME_NOREPLACE, "noreplace"}, {RENAME_EXCHANGE, "exchange"},
                {RENAME_EXCHANGE | RENAME_NOREPLACE, "both"}, {64, "unknown"}};
    char label[120];
    begin("rename");
    for (size_t way = 0; way < COUNT(ways); way++)
        for (size_t from = 0; from < COUNT(kinds); from++)
            for (size_t to = 0; to < COUNT(kinds); to++) {
                make(kinds[from], "from");
                make(kinds[to], "to");
                snprintf(label, sizeof label, "%s %s over %s", ways[way].what, kinds[from], kinds[to]);
                SAY(label, rename2("from", "to", ways[way].flags));
                look(label, "from");
                look(label, "to");
                clear("from");
                clear("to");
            }
    mkdir("a", 0755);
    mkdir("a/b", 0755);
    mkdir("a/b/c", 0755);
    SAY("into itself", rename("a", "a/b/c/d"));
    SAY("to itself's child", rename("a/b", "a/b/c"));
    SAY("over parent", rename("a/b/c", "a"));
    SAY("exchange with child", rename2("a", "a/b", RENAME_EXCHANGE));
    SAY("dot", rename(".", "dot"));
    SAY("dot dot", rename("a/..", "dot"));
    put("one", "1");
    link("one", "two");
    SAY("links of one file", rename("one", "two"));
    look("links of one file, first", "one");
    look("links of one file, second", "two");
    SAY("a directory elsewhere", rename("a/b/c", "moved"));
    SAY("its parent", access("moved/../one", F_OK));
    SAY("slash", rename("moved/", "again/"));
    SAY("file slash", rename("one", "slash/"));
    int file = open("two", O_RDWR);
    put("over", "over");
    SAY("over an open file", rename("over", "two"));
    struct stat found;
    fstat(file, &found);
    text("the open file", "links %d", (int)found.st_nlink);
    show("what stands there", "two");
    close(file);
}

static void making(void)
{
    char label[80];
    begin("make");
    for (size_t kind = 0; kind < COUNT(kinds); kind++) {
        make(kinds[kind], "it");
        every_call(kinds[kind], "it");
        clear("it");
    }
    static const mode_t masks[] = {0, 022, 077, 0777};
    for (size_t mask = 0; mask < COUNT(masks); mask++)
        for (int sort = 0; sort < 5; sort++) {
            umask(masks[mask]);
            snprintf(label, sizeof label, "mask %o sort %d", masks[mask], sort);
            SAY(label, sort == 0   ? mkdir("new", 07777)
                       : sort == 1 ? close(open("new", O_CREAT | O_RDONLY, 07777))
                       : sort == 2 ? mkfifo("new", 07777)
                       : sort == 3 ? mknod("new", S_IFREG | 06755, 0)
                                   : mknod("new", S_IFSOCK | 0777, 0));
            look(label, "new");
            clear("new");
        }
    umask(022);
    SAY("a node of no sort", mknod("odd", 0x3000 | 0644, 0));
    SAY("a directory by mknod", mknod("odd", S_IFDIR | 0755, 0));
    SAY("a character device", mknod("device", S_IFCHR | 0644, makedev(1, 3)));
    SAY("an empty link", symlink("", "empty"));
    static char target[5000];
    for (int length = 4094; length < 4097; length++) {
        memset(target, 't', sizeof target);
        target[length] = 0;
        snprintf(label, sizeof label, "link to %d bytes", length);
        SAY(label, symlink(target, "long"));
        look(label, "long");
        text(label, "read %ld", (long)readlink("long", target, sizeof target));
        unlink("long");
    }
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "bound"};
    int server = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    SAY("bind", bind(server, (struct sockaddr *)&address, sizeof address));
    SAY("listen", listen(server, 1));
    look("bound", "bound");
    SAY("connect", connect(client, (struct sockaddr *)&address, sizeof address));
    SAY("open a socket", open("bound", O_RDWR));
    close(server);
    close(client);
    put("first", "1");
    SAY("link", link("first", "second"));
    SAY("link again", link("first", "second"));
    look("links", "first");
    SAY("unlink one", unlink("first"));
    look("links left", "second");
    mkdir("folder", 0755);
    SAY("link a directory", link("folder", "linked"));
    symlink("second", "soft");
    SAY("link a link", linkat(AT_FDCWD, "soft", AT_FDCWD, "hardsoft", 0));
    look("a link's link", "hardsoft");
    SAY("link through a link", linkat(AT_FDCWD, "soft", AT_FDCWD, "through", AT_SYMLINK_FOLLOW));
    look("through", "through");
    SAY("unlink a directory", unlink("folder"));
    SAY("rmdir dot", rmdir("folder/."));
    SAY("rmdir dot dot", rmdir("folder/.."));
}

/* Opening, with every flag on everything. */
static void opening(void)
{
    struct {
        int flags;
        const char *what;
    } ways[] = {
        {O_RDONLY, "read"}, {O_WRONLY, "write"}, {O_RDWR, "both"}, {O_RDWR | O_TRUNC, "trunc"}, {O_RDONLY | O_TRUNC, "read trunc"},
        {O_WRONLY | O_APPEND, "append"}, {O_RDWR | O_CREAT, "create"}, {O_RDWR | O_CREAT | O_EXCL, "new"},
        {O_RDONLY | O_DIRECTORY, "directory"}, {O_RDWR | O_DIRECTORY, "directory write"}, {O_RDONLY | O_NOFOLLOW, "nofollow"},
        {O_RDWR | O_CREAT | O_NOFOLLOW, "create nofollow"}, {O_PATH, "path"}, {O_PATH | O_NOFOLLOW, "path nofollow"},
        {O_RDWR | O_CREAT | O_TRUNC, "create trunc"}, {O_RDWR | O_SYNC, "sync"}, {O_RDONLY | O_NOATIME, "noatime"},
        {O_WRONLY | O_CREAT | O_APPEND, "create append"}, {3, "neither"},
    };
    char label[80];
    begin("open");
    for (size_t way = 0; way < COUNT(ways); way++)
        for (size_t kind = 0; kind < COUNT(kinds); kind++) {
            make(kinds[kind], "it");
            snprintf(label, sizeof label, "%s %s", ways[way].what, kinds[kind]);
            int file = SAY(label, open("it", ways[way].flags | O_NONBLOCK, 0640));
            look(label, "it");
            if (file >= 0) {
                struct stat found;
                char data[8];
                snprintf(label, sizeof label, "%s %s write", ways[way].what, kinds[kind]);
                SAY(label, write(file, "W", 1));
                snprintf(label, sizeof label, "%s %s read", ways[way].what, kinds[kind]);
                SAY(label, read(file, data, 1));
                snprintf(label, sizeof label, "%s %s fstat", ways[way].what, kinds[kind]);
                fstat(file, &found);
                text(label, "%o %lld", found.st_mode, S_ISDIR(found.st_mode) ? 0 : (long long)found.st_size);
                snprintf(label, sizeof label, "%s %s fchmod", ways[way].what, kinds[kind]);
                SAY(label, fchmod(file, 0600));
                snprintf(label, sizeof label, "%s %s ftruncate", ways[way].what, kinds[kind]);
                SAY(label, ftruncate(file, 2));
                close(file);
            }
            clear("it");
            unlink("nowhere");
        }
}

/* As root, as the owner, and as somebody else, with every permission. */
static void permissions(void)
{
    static const int modes[] = {0, 0100, 0200, 0300, 0400, 0500, 0700, 05, 06, 07, 0777, 01777, 02777, 04755, 06755};
    struct timespec given[2] = {{.tv_sec = 5}, {.tv_sec = 6}}, now[2] = {{.tv_nsec = UTIME_NOW}, {.tv_nsec = UTIME_NOW}};
    struct timespec omit[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_OMIT}};
    char label[96];
    begin("permission");
    if (chmod(".", 0777))
        SAY("open up", -1);
    for (int owner = 0; owner < 2; owner++)
        for (int who = 0; who < 3; who++)
            for (size_t mode = 0; mode < COUNT(modes); mode++) {
                int user = owner ? OTHER : 1000, actor = who == 0 ? 0 : who == 1 ? OTHER : 1001;
                mkdir("dir", 0755);
                put("dir/file", "content");
                put("dir/second", "content");
                put("file", "content");
                chown("dir/file", user, user);
                chown("dir", user, user);
                chown("file", user, user);
                chmod("dir", modes[mode]);
                chmod("file", modes[mode]);
                be(actor);
#define AS(name, call) (snprintf(label, sizeof label, "%o of %d by %d: %s", modes[mode], user, actor, name), SAY(label, call))
                AS("read", open("file", O_RDONLY));
                AS("write", open("file", O_WRONLY));
                AS("trunc", truncate("file", 5));
                AS("access", access("file", R_OK | W_OK));
                AS("execute", access("file", X_OK));
                AS("list", open("dir", O_RDONLY | O_DIRECTORY));
                AS("stat within", access("dir/file", F_OK));
                AS("create within", open("dir/new", O_CREAT | O_EXCL | O_WRONLY, 0666));
                look(label, "dir/new");
                AS("mkdir within", mkdir("dir/sub", 0777));
                look(label, "dir/sub");
                AS("fifo within", mkfifo("dir/pipe", 0666));
                AS("link within", link("dir/file", "dir/link"));
                AS("rename within", rename("dir/file", "dir/other"));
                AS("rename over", rename("dir/other", "dir/second"));
                AS("unlink within", unlink("dir/second"));
                AS("rmdir within", rmdir("dir/sub"));
                AS("times", utimensat(AT_FDCWD, "file", given, 0));
                AS("now", utimensat(AT_FDCWD, "file", now, 0));
                AS("omit", utimensat(AT_FDCWD, "file", omit, 0));
                AS("write it", write(open("file", O_WRONLY | O_APPEND), "x", 1));
                look(label, "file");
                AS("chmod", chmod("file", 06770));
                look(label, "file");
                AS("chown group", chown("file", -1, actor));
                look(label, "file");
                AS("chown nothing", chown("file", -1, -1));
                look(label, "file");
                AS("chown", chown("file", 1001, 1001));
                AS("xattr", setxattr("file", "user.x", "1", 1, 0));
                AS("get xattr", getxattr("file", "user.x", label, 1));
#undef AS
                be(0);
                close_all();
                static const char *made[] = {"file", "second", "new", "pipe", "link", "other", "sub"};
                for (size_t each = 0; each < COUNT(made); each++) {
                    char path[64];
                    snprintf(path, sizeof path, "dir/%s", made[each]);
                    unlink(path);
                    rmdir(path);
                }
                unlink("file");
                if (rmdir("dir"))
                    SAY("left over", -1);
            }
}

/* Sizes, holes, positions and what is left of a file without a name. */
static void contents(void)
{
    static const long long sizes[] = {0, 1, 4095, 4096, 4097, 1 << 20, 1LL << 40, -1, INT64_MAX};
    static char data[9000];
    char label[64];
    struct stat found;
    begin("content");
    for (size_t each = 0; each < COUNT(sizes); each++) {
        put("file", "some content that is cut or grows");
        snprintf(label, sizeof label, "truncate to %lld", sizes[each]);
        SAY(label, truncate("file", sizes[each]));
        look(label, "file");
        show(label, "file");
        int file = open("file", O_RDWR);
        snprintf(label, sizeof label, "ftruncate to %lld", sizes[each]);
        SAY(label, ftruncate(file, sizes[each]));
        fstat(file, &found);
        text(label, "size %lld", (long long)found.st_size);
        close(file);
    }
    put("file", "content");
    int file = open("file", O_RDONLY);
    SAY("ftruncate read-only", ftruncate(file, 1));
    SAY("write read-only", write(file, "x", 1));
    SAY("pread negative", pread(file, data, 1, -1));
    text("pread behind the end", "%ld", (long)pread(file, data, 10, 100));
    close(file);
    SAY("truncate directory", truncate(".", 0));
    file = open("holes", O_CREAT | O_RDWR, 0644);
    memset(data, 'd', sizeof data);
    pwrite(file, data, 4096, 1 << 20);
    pwrite(file, data, 4096, 5 << 20);
    text("data", "%lld", (long long)lseek(file, 0, SEEK_DATA));
    text("hole", "%lld", (long long)lseek(file, 1 << 20, SEEK_HOLE));
    text("data again", "%lld", (long long)lseek(file, (1 << 20) + 4096, SEEK_DATA));
    SAY("data behind the end", lseek(file, 6 << 20, SEEK_DATA));
    SAY("seek negative", lseek(file, -5, SEEK_SET));
    SAY("punch", fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 << 20, 4096));
    text("data after punch", "%lld", (long long)lseek(file, 0, SEEK_DATA));
    SAY("allocate", fallocate(file, 0, 6 << 20, 4096));
    fstat(file, &found);
    text("size", "%lld", (long long)found.st_size);
    SAY("allocate keep", fallocate(file, FALLOC_FL_KEEP_SIZE, 8 << 20, 4096));
    fstat(file, &found);
    text("size kept", "%lld", (long long)found.st_size);
    SAY("zero", fallocate(file, FALLOC_FL_ZERO_RANGE, 5 << 20, 100));
    text("zeroed", "%d %d", pread(file, data, 200, 5 << 20) == 200 && data[0] == 0 && data[99] == 0, data[100]);
    SAY("allocate nothing", fallocate(file, 0, 0, 0));
    SAY("allocate negative", fallocate(file, 0, -1, 10));
    int target = open("copied", O_CREAT | O_RDWR, 0644);
    off_t from = 5 << 20, to = 10;
    text("copy_file_range", "%ld", (long)copy_file_range(file, &from, target, &to, 4096, 0));
    fstat(target, &found);
    text("copied", "%lld", (long long)found.st_size);
    close(target);
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){1 << 20, RLIM_INFINITY});
    SAY("write behind the limit", pwrite(file, "x", 1, 2 << 20));
    text("write over the limit", "%ld", (long)pwrite(file, data, 4096, (1 << 20) - 100));
    SAY("truncate behind the limit", ftruncate(file, 20 << 20));
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY});
    SAY("unlink open", unlink("holes"));
    fstat(file, &found);
    text("links of nothing", "%d", (int)found.st_nlink);
    SAY("write without a name", pwrite(file, "nameless", 8, 0));
    text("read without a name", "%ld %.8s", (long)pread(file, data, 8, 0), data);
    SAY("truncate without a name", ftruncate(file, 4));
    SAY("chmod without a name", fchmod(file, 0600));
    SAY("chown without a name", fchown(file, 1, 1));
    fstat(file, &found);
    text("without a name", "%o %d:%d %lld", found.st_mode, found.st_uid, found.st_gid, (long long)found.st_size);
    SAY("link without a name", linkat(file, "", AT_FDCWD, "back", AT_EMPTY_PATH));
    SAY("sync", fsync(file));
    close(file);
    mkdir("gone", 0755);
    int folder = open("gone", O_RDONLY | O_DIRECTORY);
    SAY("rmdir open", rmdir("gone"));
    SAY("create in nothing", openat(folder, "x", O_CREAT | O_RDWR, 0644));
    SAY("mkdir in nothing", mkdirat(folder, "x", 0755));
    SAY("stat nothing", fstat(folder, &found));
    SAY("chdir nothing", fchdir(folder));
    SAY("where", getcwd(data, sizeof data) ? 0 : -1);
    close(folder);
    if (fchdir(here))
        SAY("back", -1);
    put("mapped", "0123456789");
    file = open("mapped", O_RDWR);
    char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    text("mapped", "%.10s %d", map, map[10]);
    map[3] = 'M';
    text("read what was mapped", "%ld %.10s", (long)pread(file, data, 10, 0), data);
    pwrite(file, "W", 1, 5);
    text("mapped what was written", "%.10s", map);
    SAY("msync", msync(map, 4096, MS_SYNC));
    SAY("grow", ftruncate(file, 5000));
    text("grown", "%d", map[4500]);
    munmap(map, 8192);
    show("after", "mapped");
    file = open("appended", O_CREAT | O_RDWR | O_APPEND, 0644);
    for (int count = 0; count < 3; count++)
        pwrite(file, "abc", 3, 0);
    close(file);
    show("append wins", "appended");
}

static long long nanoseconds(struct timespec time)
{
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* Which of a file's three times a change moves. */
static void moved(const char *label, const char *path, struct stat *before)
{
    struct stat now;
    lstat(path, &now);
    text(label, "modified %d changed %d", nanoseconds(now.st_mtim) != nanoseconds(before->st_mtim),
         nanoseconds(now.st_ctim) != nanoseconds(before->st_ctim));
    nanosleep(&(struct timespec){.tv_nsec = 12000000}, NULL);
    *before = now;
}

static void times(void)
{
    static const struct timespec given[] = {{0, 0}, {1, 123456789}, {-1, 5}, {1LL << 31, 1}, {1LL << 33, 999999999}, {5, UTIME_OMIT},
                                            {5, 1000000000}, {5, -1}};
    char label[64];
    struct stat before, folder;
    begin("times");
    put("file", "content");
    symlink("file", "link");
    for (size_t each = 0; each < COUNT(given); each++) {
        struct timespec both[2] = {given[each], given[each < 5 ? 4 - each : each]};
        for (int link = 0; link < 2; link++) {
            struct stat found;
            snprintf(label, sizeof label, "%lld.%ld %d", (long long)given[each].tv_sec, given[each].tv_nsec, link);
            SAY(label, utimensat(AT_FDCWD, "link", both, link ? AT_SYMLINK_NOFOLLOW : 0));
            fstatat(AT_FDCWD, "link", &found, link ? AT_SYMLINK_NOFOLLOW : 0);
            if (given[each].tv_nsec < 1000000000 && given[each].tv_nsec >= 0)
                text(label, "%lld %lld", nanoseconds(found.st_atim), nanoseconds(found.st_mtim));
        }
    }
    lstat("file", &before);
    lstat(".", &folder);
    moved("start", "file", &before);
    chmod("file", 0600), moved("chmod", "file", &before);
    chown("file", 3, 3), moved("chown", "file", &before);
    link("file", "hard"), moved("link", "file", &before), moved("link, directory", ".", &folder);
    rename("hard", "harder"), moved("rename", "harder", &before), moved("rename, directory", ".", &folder);
    unlink("harder"), moved("unlink", "file", &before), moved("unlink, directory", ".", &folder);
    truncate("file", 3), moved("truncate", "file", &before);
    truncate("file", 3), moved("truncate to the same", "file", &before);
    int file = open("file", O_RDWR);
    write(file, "x", 1), moved("write", "file", &before);
    ftruncate(file, 3), moved("ftruncate to the same", "file", &before);
    fallocate(file, 0, 0, 9000), moved("allocate", "file", &before);
    fsetxattr(file, "user.a", "1", 1, 0), moved("xattr", "file", &before);
    close(file), moved("close", "file", &before);
    close(open("file", O_RDWR | O_TRUNC)), moved("open trunc", "file", &before);
    mkdir("sub", 0755), moved("mkdir, directory", ".", &folder);
    put("sub/new", ""), moved("create in a subdirectory", ".", &folder);
    lstat("sub", &before), rename("sub/new", "new"), moved("out of", "sub", &before), moved("into", ".", &folder);
    symlink("x", "soft"), moved("symlink, directory", ".", &folder);
    mkfifo("pipe", 0644), moved("fifo, directory", ".", &folder);
    rmdir("sub"), moved("rmdir, directory", ".", &folder);
}

static void directories(void)
{
    char name[32];
    int count = 0, kinds_seen = 0;
    begin("directory");
    for (int number = 0; number < 700; number++) {
        snprintf(name, sizeof name, "file%d", number);
        put(name, "");
    }
    mkdir("folder", 0755);
    symlink("x", "soft");
    mkfifo("pipe", 0644);
    DIR *folder = opendir(".");
    long places[800];
    static char seen[800][32];
    for (struct dirent *entry; (entry = readdir(folder)) && count < 800; count++) {
        strncpy(seen[count], entry->d_name, 31);
        places[count] = telldir(folder);
        kinds_seen |= entry->d_type == DT_REG ? 1 : entry->d_type == DT_DIR ? 2 : entry->d_type == DT_LNK ? 4 : entry->d_type == DT_FIFO ? 8 : 16;
    }
    text("entries", "%d kinds %d", count, kinds_seen);
    int wrong = 0;
    for (int number = 0; number + 1 < count; number += 37) {
        seekdir(folder, places[number]);
        struct dirent *entry = readdir(folder);
        wrong += !entry || strcmp(entry->d_name, seen[number + 1]);
    }
    text("seekdir", "%d wrong", wrong);
    rewinddir(folder);
    /* In the midst of the entries every second file goes: each that stays is told once, whatever is told of the others. */
    static int told[700];
    wrong = count = 0;
    for (struct dirent *entry; (entry = readdir(folder)); count++) {
        int number;
        if (sscanf(entry->d_name, "file%d", &number) == 1)
            told[number]++;
        for (number = 0; count == 100 && number < 700; number += 2) {
            snprintf(name, sizeof name, "file%d", number);
            unlink(name);
        }
    }
    for (int number = 1; number < 700; number += 2)
        wrong += told[number] != 1;
    text("told while others go", "%d wrong", wrong);
    rewinddir(folder);
    for (count = 0; readdir(folder);)
        count++;
    text("left", "%d", count);
    closedir(folder);
    struct stat inner, outer;
    stat("folder/..", &inner);
    stat(".", &outer);
    text("dot dot", "%d", inner.st_ino == outer.st_ino && inner.st_dev == outer.st_dev);
    mkdir("folder/one", 0755);
    SAY("full", rmdir("folder"));
    SAY("inner", rmdir("folder/one"));
    SAY("empty", rmdir("folder"));
}

static void attributes(void)
{
    static char value[70000], list[70000];
    char label[80];
    begin("xattr");
    put("file", "");
    mkdir("dir", 0755);
    mkfifo("pipe", 0644);
    symlink("file", "link");
    static const char *paths[] = {"file", "dir", "pipe"};
    for (size_t each = 0; each < COUNT(paths); each++) {
#define ON(name, call) (snprintf(label, sizeof label, "%s %s", paths[each], name), errno = 0, result = call, text(label, "%s %ld", outcome(result), result))
        long result;
        const char *path = paths[each];
        ON("set", setxattr(path, "user.one", "value", 5, 0));
        ON("create", setxattr(path, "user.one", "value", 5, XATTR_CREATE));
        ON("replace", setxattr(path, "user.one", "other", 5, XATTR_REPLACE));
        ON("replace nothing", setxattr(path, "user.two", "other", 5, XATTR_REPLACE));
        ON("flags", setxattr(path, "user.two", "other", 5, 4));
        ON("get", getxattr(path, "user.one", value, sizeof value));
        ON("size", getxattr(path, "user.one", NULL, 0));
        ON("short", getxattr(path, "user.one", value, 3));
        ON("none", getxattr(path, "user.none", value, 3));
        ON("empty", setxattr(path, "user.empty", "", 0, 0));
        ON("get empty", getxattr(path, "user.empty", value, 3));
        ON("list", listxattr(path, list, sizeof list));
        ON("list size", listxattr(path, NULL, 0));
        ON("list short", listxattr(path, list, 3));
        ON("remove", removexattr(path, "user.one"));
        ON("remove again", removexattr(path, "user.one"));
        ON("no name", setxattr(path, "", "x", 1, 0));
        ON("no space", setxattr(path, "nonsense.x", "x", 1, 0));
        ON("prefix", setxattr(path, "user.", "x", 1, 0));
        ON("too large", setxattr(path, "user.large", value, 65537, 0));
        memset(list, 'n', 300);
        memcpy(list, "user.", 5);
        list[255] = 0;
        ON("long name", setxattr(path, list, "x", 1, 0));
        list[255] = 'n', list[256] = 0;
        ON("too long a name", setxattr(path, list, "x", 1, 0));
#undef ON
    }
    SAY("link", lsetxattr("link", "user.x", "1", 1, 0));
    SAY("link's file", setxattr("link", "user.x", "1", 1, 0));
    text("through the link", "%ld", (long)getxattr("file", "user.x", value, 10));
}

/* A lock that one process holds, as another finds it. */
static void locks(void)
{
    begin("lock");
    put("file", "0123456789");
    int file = open("file", O_RDWR), second = open("file", O_RDWR);
    SAY("flock", flock(file, LOCK_EX));
    SAY("flock again", flock(second, LOCK_EX | LOCK_NB));
    SAY("unlock", flock(file, LOCK_UN));
    SAY("flock then", flock(second, LOCK_SH | LOCK_NB));
    SAY("shared", flock(file, LOCK_SH | LOCK_NB));
    struct flock part = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 2, .l_len = 3};
    SAY("fcntl", fcntl(file, F_SETLK, &part));
    fflush(stdout);
    if (fork() == 0) {
        struct flock wanted = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 4, .l_len = 1};
        SAY("fcntl elsewhere", fcntl(second, F_SETLK, &wanted));
        wanted.l_start = 5;
        SAY("fcntl beside", fcntl(second, F_SETLK, &wanted));
        wanted = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET};
        SAY("who", fcntl(second, F_GETLK, &wanted));
        text("who", "%d %lld %lld %d", wanted.l_type, (long long)wanted.l_start, (long long)wanted.l_len, wanted.l_pid == getppid());
        fflush(stdout);
        _exit(0);
    }
    wait(NULL);
    close(second);  /* any descriptor of the file that is closed gives up the process's locks */
    fflush(stdout);
    if (fork() == 0) {
        second = open("file", O_RDWR);
        struct flock wanted = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        SAY("after close", fcntl(second, F_SETLK, &wanted));
        fflush(stdout);
        _exit(0);
    }
    wait(NULL);
    close(file);
}

int main(int count, char **words)
{
    if (count != 2 || chdir(words[1]) || (top = open(".", O_RDONLY | O_DIRECTORY)) < 0) {
        fprintf(stderr, "usage: posix DIRECTORY\n");
        return 2;
    }
    top = dup2(top, 500);
    names(), making(), renames(), opening(), permissions(), contents(), times(), directories(), attributes(), locks();
    return fflush(stdout) ? 1 : 0;
}
