/* For tests: a library to preload that records what a process does to one file.
 *
 * WRITELOG_FILE names the file, by the end of its path; WRITELOG_OUT is where the record goes: of each call 4 numbers of 64
 * bits (kind, offset, length, 0) and the bytes of a write. lv_mark(n) puts a mark of the program's own there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, BARRIER = 2, PUNCH = 3, ZERO = 4, TRUNCATE = 5, MARK = 6 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int out = -1;

static void put(const void *data, size_t length)
{
    static ssize_t (*real)(int, const void *, size_t);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "write");
    for (const char *at = data; length;) {
        ssize_t done = real(out, at, length);
        if (done <= 0)
            abort();
        at += done;
        length -= (size_t)done;
    }
}

static int is_ours(int fd)
{
    char link[64], path[4096];
    const char *want = getenv("WRITELOG_FILE"), *to = getenv("WRITELOG_OUT");
    if (!want || !to)
        return 0;
    if (out < 0)
        out = open(to, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    size_t end = strlen(want);
    return (size_t)length >= end && !strcmp(path + length - end, want);
}

static void record(uint64_t kind, uint64_t offset, uint64_t length, const struct iovec *iov, int count)
{
    uint64_t head[4] = {kind, offset, length, 0};
    put(head, sizeof head);
    for (int i = 0; i < count && length; i++) {
        size_t part = iov[i].iov_len < length ? iov[i].iov_len : length;
        put(iov[i].iov_base, part);
        length -= part;
    }
}

void lv_mark(uint64_t number)
{
    is_ours(0);
    pthread_mutex_lock(&lock);
    record(MARK, number, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    static ssize_t (*real)(int, const struct iovec *, int, off_t, int);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pwritev2");
    if (!is_ours(fd))
        return real(fd, iov, count, offset, flags);
    pthread_mutex_lock(&lock);
    ssize_t done = real(fd, iov, count, offset, flags);
    if (done > 0)
        record(WRITE, (uint64_t)offset, (uint64_t)done, iov, count);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pwrite");
    if (!is_ours(fd))
        return real(fd, data, length, offset);
    pthread_mutex_lock(&lock);
    ssize_t done = real(fd, data, length, offset);
    struct iovec iov = {(void *)data, length};
    if (done > 0)
        record(WRITE, (uint64_t)offset, (uint64_t)done, &iov, 1);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset)
{
    return pwrite(fd, data, length, offset);
}

int fdatasync(int fd)
{
    static int (*real)(int);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "fdatasync");
    if (!is_ours(fd))
        return real(fd);
    pthread_mutex_lock(&lock);
    record(BARRIER, 0, 0, NULL, 0); /* the disk's own: what the record says is replayed, nothing has to reach this disk */
    pthread_mutex_unlock(&lock);
    return 0;
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    static int (*real)(int, int, off_t, off_t);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "fallocate");
    if (!is_ours(fd))
        return real(fd, mode, offset, length);
    pthread_mutex_lock(&lock);
    int result = real(fd, mode, offset, length);
    if (!result)
        record(mode & 2 ? PUNCH : ZERO, (uint64_t)offset, (uint64_t)length, NULL, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

int fallocate64(int fd, int mode, off_t offset, off_t length)
{
    return fallocate(fd, mode, offset, length);
}

int ftruncate(int fd, off_t length)
{
    static int (*real)(int, off_t);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "ftruncate");
    if (!is_ours(fd))
        return real(fd, length);
    pthread_mutex_lock(&lock);
    int result = real(fd, length);
    if (!result)
        record(TRUNCATE, (uint64_t)length, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

int ftruncate64(int fd, off_t length)
{
    return ftruncate(fd, length);
}
