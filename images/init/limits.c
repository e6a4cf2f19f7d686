/* What one run of a program may use, and what it used: a control group (version 2) of its own, with all that it starts.
 *
 * The memory limit is the kernel's: the group ends as a whole when it cannot be kept. Of more processes than allowed the
 * kernel refuses to make any; the agent sees that, and that the root file system holds more than allowed, within LOOK_MS,
 * and ends the group. Source: Linux, Documentation/admin-guide/cgroup-v2.rst. */
#include "sys.h"
#include "limits.h"

enum { EBUSY = 16 };
#define GROUPS "/sys/fs/cgroup/"

static long write_file(const char *folder, const char *name, const char *text)
{
    char path[128];
    append(append(path, folder), name);
    long fd = open_file(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return fd;
    long put = SYS(__NR_write, fd, text, text_length(text));
    SYS(__NR_close, fd);
    return put;
}

/* The sum of the numbers that stand behind `key` in a file of the group: "key 12" or "key=12". */
static uint64_t sum_of(const char *folder, const char *name, const char *key)
{
    char path[128], text[4096];
    uint64_t sum = 0;
    append(append(path, folder), name);
    if (read_file(path, text, sizeof text) <= 0) return 0;
    for (const char *p = text; *p; p++) {
        const char *after = p == text || p[-1] == ' ' || p[-1] == '\n' ? text_after(p, key) : NULL;
        if (!after || (*after != ' ' && *after != '=')) continue;
        uint64_t value = 0;
        for (after++; *after >= '0' && *after <= '9'; after++) value = value * 10 + (uint64_t)(*after - '0');
        sum += value;
    }
    return sum;
}

void file_system_size(const char *path, uint64_t *size, uint64_t *available)
{
    uint64_t status[15] = {0}; /* struct statfs: type, block size, blocks, free, available */
    SYS(__NR_statfs, path, status);
    *size = status[1] * status[2];
    *available = status[1] * status[3];
}

/* 0: this kernel has no control groups, or not the kinds that are needed. */
int begin_limits(struct account *account, const struct limits *limits)
{
    static unsigned count;
    char text[32];
    if (SYS(__NR_access, GROUPS "cgroup.controllers", 0) < 0) {
        SYS(__NR_mkdir, "/sys/fs/cgroup", 0755);
        if (SYS(__NR_mount, "cgroup2", "/sys/fs/cgroup", "cgroup2", 0, 0) < 0) return 0;
    }
    write_file(GROUPS, "cgroup.subtree_control", "+memory");
    write_file(GROUPS, "cgroup.subtree_control", "+pids");
    write_file(GROUPS, "cgroup.subtree_control", "+io");
    char *p = append(account->folder, GROUPS "run-");
    p = append_number(p, (uint64_t)SYS(__NR_getpid, 0));
    p = append(p, "-");
    p = append_number(p, count++);
    if (SYS(__NR_mkdir, account->folder, 0755) < 0) return 0;
    append(p, "/");
    account->limits = *limits;
    account->hit = NOT_HIT;
    int is_kept = 1;
    if (limits->memory) {
        append_number(text, limits->memory);
        is_kept &= write_file(account->folder, "memory.max", text) > 0;
        write_file(account->folder, "memory.swap.max", "0");
        write_file(account->folder, "memory.oom.group", "1");
    }
    if (limits->processes) {
        append_number(text, limits->processes);
        is_kept &= write_file(account->folder, "pids.max", text) > 0;
    }
    uint64_t size;
    file_system_size("/", &size, &account->available);
    if (!is_kept) end_limits(account);
    return is_kept;
}

void join_limits(const struct account *account) { write_file(account->folder, "cgroup.procs", "0"); }

void kill_limits(const struct account *account) { write_file(account->folder, "cgroup.kill", "1"); }

static uint64_t disk_used(const struct account *account)
{
    uint64_t size, available;
    file_system_size("/", &size, &available);
    return account->available > available ? account->available - available : 0;
}

void look_at_limits(struct account *account)
{
    if (account->hit) return;
    if (account->limits.processes && sum_of(account->folder, "pids.events", "max")) account->hit = HIT_PROCESSES;
    else if (account->limits.disk && disk_used(account) > account->limits.disk) account->hit = HIT_DISK;
    if (account->hit) kill_limits(account);
}

void read_limits(struct account *account, struct used *used)
{
    look_at_limits(account);
    if (!account->hit && account->limits.memory && sum_of(account->folder, "memory.events", "oom_kill"))
        account->hit = HIT_MEMORY;
    used->cpu_us = sum_of(account->folder, "cpu.stat", "usage_usec");
    used->disk_read = sum_of(account->folder, "io.stat", "rbytes");
    used->disk_written = sum_of(account->folder, "io.stat", "wbytes");
    used->disk_used = disk_used(account);
    used->hit = (uint64_t)account->hit;
}

/* A group with processes in it stays, and so do its limits. */
void end_limits(struct account *account)
{
    size_t n = text_length(account->folder);
    account->folder[n - 1] = 0;
    for (int i = 0; SYS(__NR_rmdir, account->folder) == -EBUSY && account->hit && i < 50; i++) pause_ms(2); /* they die */
    account->folder[n - 1] = '/';
}
