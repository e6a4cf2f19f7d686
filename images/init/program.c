/* Becoming a program: its user, environment, working directory, and where PATH finds it. In the child of agent.c. */
#include "sys.h"

enum { MAX_GROUPS = 256 };
enum { NOT_RUNNABLE = 126, NOT_FOUND = 127 };

struct user { const char *name; size_t name_length; char home[1024]; long uid, gid, groups; uint32_t group[MAX_GROUPS]; };

__attribute__((noreturn)) static void fail(int status, const char *what, const char *why)
{
    say("agent: ");
    say(what);
    say(": ");
    say(why);
    say("\n");
    SYS(__NR_exit_group, status);
    __builtin_unreachable();
}

/* A whole file in memory, *size its length; NULL if it cannot be read. */
static char *map_file(const char *path, size_t *size)
{
    long fd = open_file(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return NULL;
    long length = SYS(__NR_lseek, fd, 0, SEEK_END);
    long at = length > 0 ? SYS(__NR_mmap, 0, length, PROT_READ, MAP_PRIVATE, fd, 0) : -1;
    SYS(__NR_close, fd);
    *size = (size_t)length;
    return at < 0 && at > -4096 ? NULL : (char *)at;
}

/* The fields of one line of passwd(5) or group(5): field i is from start[i] to start[i + 1] - 1. The next line. */
static const char *fields(const char *p, const char *end, const char *start[8])
{
    int n = 0;
    start[n++] = p;
    for (; p < end && *p != '\n'; p++)
        if (*p == ':' && n < 7) start[n++] = p + 1;
    while (n < 8) start[n++] = p + 1;
    return p < end ? p + 1 : end;
}
static int is_field(const char *const start[8], int i, const char *text, size_t length)
{
    return (size_t)(start[i + 1] - 1 - start[i]) == length && !memcmp(start[i], text, length);
}
static long number_field(const char *const start[8], int i) { return parse_number(start[i], start[i + 1] - 1, NULL); }

/* Is `name` in the comma-separated list from p to end? */
static int listed(const char *p, const char *end, const char *name, size_t length)
{
    while (p < end) {
        const char *word = p;
        while (p < end && *p != ',') p++;
        if ((size_t)(p - word) == length && !memcmp(word, name, length)) return 1;
        p++;
    }
    return 0;
}

/* USER or UID, then perhaps :GROUP or :GID, looked up in /etc/passwd and /etc/group; a number needs no entry there. */
static void find_user(const char *wanted, struct user *user)
{
    const char *end = wanted, *start[8], *group = NULL;
    while (*end && *end != ':') end++;
    if (*end == ':') group = end + 1;
    size_t length = (size_t)(end - wanted), size = 0;
    const char *after, *p;
    long number = parse_number(wanted, end, &after);
    if (after != end) number = -1;
    user->uid = number;
    user->gid = 0;
    user->home[0] = '/';
    const char *file = map_file("/etc/passwd", &size);
    int known = 0;
    for (p = file; p && p < file + size && !known;) {
        p = fields(p, file + size, start);
        long uid = number_field(start, 2), gid = number_field(start, 3);
        known = uid >= 0 && gid >= 0 && (is_field(start, 0, wanted, length) || (number >= 0 && uid == number));
        if (!known) continue;
        user->uid = uid;
        user->gid = gid;
        user->name = start[0];
        user->name_length = (size_t)(start[1] - 1 - start[0]);
        size_t home = (size_t)(start[6] - 1 - start[5]);
        if (home && home < sizeof user->home) memcpy(user->home, start[5], home), user->home[home] = 0;
    }
    if (user->uid < 0) fail(NOT_RUNNABLE, wanted, "no such user in /etc/passwd");
    file = map_file("/etc/group", &size);
    if (group) {
        const char *stop = group + text_length(group);
        user->gid = parse_number(group, stop, &after);
        if (after != stop) user->gid = -1;
        for (p = file; p && p < file + size && user->gid < 0;) {
            p = fields(p, file + size, start);
            if (is_field(start, 0, group, (size_t)(stop - group))) user->gid = number_field(start, 2);
        }
        if (user->gid < 0) fail(NOT_RUNNABLE, group, "no such group in /etc/group");
        return;
    }
    for (p = file; known && p && p < file + size && user->groups < MAX_GROUPS;) {
        p = fields(p, file + size, start);
        long gid = number_field(start, 2);
        if (gid >= 0 && listed(start[3], start[4] - 1, user->name, user->name_length))
            user->group[user->groups++] = (uint32_t)gid;
    }
}

void name_of_id(const char *file, uint32_t id, char *to, size_t size)
{
    size_t length = 0;
    const char *all = map_file(file, &length), *start[8], *p = all;
    append_number(to, id);
    while (p && p < all + length) {
        p = fields(p, all + length, start);
        if (number_field(start, 2) != (long)id || (size_t)(start[1] - 1 - start[0]) >= size) continue;
        size_t n = (size_t)(start[1] - 1 - start[0]);
        if (!n) break;
        memcpy(to, start[0], n);
        to[n] = 0;
        break;
    }
    if (all) SYS(__NR_munmap, all, length);
}

/* Is NAME of `entry` (NAME=value) among `list`? */
static int is_given(char **list, const char *entry)
{
    size_t n = 0;
    while (entry[n] && entry[n] != '=') n++;
    for (; *list; list++)
        if (!memcmp(*list, entry, n) && (*list)[n] == '=') return 1;
    return 0;
}

/* What was given, then the defaults that it does not name. `given` has room behind its end for all of them. */
static void add_defaults(char **given, const struct user *user)
{
    static char home[1040] = "HOME=", name[300] = "USER=";
    char **end = given;
    while (*end) end++;
    if (user) {
        memcpy(home + 5, user->home, text_length(user->home) + 1);
        if (!is_given(given, home)) *end++ = home, *end = NULL;
        if (user->name && user->name_length < sizeof name - 6) {
            memcpy(name + 5, user->name, user->name_length);
            if (!is_given(given, name)) *end++ = name, *end = NULL;
        }
    }
    for (char **e = guest_environment; *e; e++)
        if (!is_given(given, *e)) *end++ = *e, *end = NULL;
}

static const char *value_of(char **environment, const char *name, const char *otherwise)
{
    for (char **e = environment; *e; e++) {
        const char *value = text_after(*e, name);
        if (value) return value;
    }
    return otherwise;
}

/* execve with a bare name looked up in PATH, as execvp does. Returns the reason for which it failed. */
static long execute(char **arguments, char **environment)
{
    const char *name = arguments[0];
    for (const char *p = name; *p; p++)
        if (*p == '/') return SYS(__NR_execve, name, arguments, environment);
    const char *path = value_of(environment, "PATH=", "/usr/sbin:/usr/bin:/sbin:/bin");
    size_t length = text_length(name);
    long error = -ENOENT;
    for (int more = *name != 0; more;) {
        char full[4096];
        size_t n = 0;
        const char *part = path;
        while (*path && *path != ':') path++;
        more = *path != 0;
        size_t part_length = (size_t)(path - part);
        path += more;
        if (part_length + length + 2 > sizeof full) continue;
        memcpy(full, part, part_length);
        n = part_length;
        if (!n) full[n++] = '.'; /* POSIX.1-2017, 8.3: a zero-length prefix is the current directory */
        full[n++] = '/';
        memcpy(full + n, name, length + 1);
        if (SYS(__NR_access, full, 0) == -ENOENT) continue; /* a tenth of what a failing execve costs (tests.bench agent) */
        long now = SYS(__NR_execve, full, arguments, environment);
        if (now != -ENOENT && now != -20 /* ENOTDIR */) error = now;
    }
    return error;
}

static const char *reason(long error)
{
    switch (-error) {
    case ENOENT: return "not found";
    case EACCES: return "permission denied";
    case ENOEXEC: return "not a program: exec format error";
    case E2BIG: return "argument list too long";
    case ENOMEM: return "not enough memory";
    default: return "cannot be run";
    }
}

void become(const char *directory, const char *wanted, char **arguments, char **given, int terminal, int is_tool)
{
    static struct user user;
    signal_mask(0);
    if (*wanted) {
        memset(&user, 0, sizeof user);
        find_user(wanted, &user);
        if (terminal) SYS(__NR_fchown, 0, user.uid, -1);
        if (SYS(__NR_setgroups, user.groups, user.group) < 0 || SYS(__NR_setresgid, user.gid, user.gid, user.gid) < 0 ||
            SYS(__NR_setresuid, user.uid, user.uid, user.uid) < 0)
            fail(NOT_RUNNABLE, wanted, "cannot become this user");
    }
    add_defaults(given, *wanted ? &user : NULL);
    const char *home = *wanted ? user.home : "/root";
    if (SYS(__NR_chdir, *directory ? directory : home) < 0) {
        if (*directory) fail(NOT_RUNNABLE, directory, "no such directory");
        SYS(__NR_chdir, "/");
    }
    if (is_tool) run_tool(arguments);
    long error = execute(arguments, given);
    fail(error == -ENOENT ? NOT_FOUND : NOT_RUNNABLE, arguments[0], reason(error));
}
