/* Random operations on files beside a model of their bytes: fsx DIRECTORY OPERATIONS SEED.
 *
 * Two files and two descriptors of each (the second opened anew again and again), through which the program reads,
 * writes, maps, cuts, grows, punches, zeroes, copies ranges, syncs and drops caches; what is read must be what the model
 * says, and in the end each file must be the model to the last byte. Prints "fsx: N operations" and ends with 0, or
 * with the operation that went wrong and 1; how far it is, every thousand operations to standard error.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define LARGEST (768 << 10)
#define LONGEST (96 << 10)
#define FILES 2

static struct subject {
    char name[16];
    int first, second;
    size_t size;
    unsigned char model[LARGEST];
} files[FILES];
static unsigned char data[LARGEST];
static uint64_t state;
static long operation;
static const char *doing = "start";

static uint32_t number(uint32_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return below ? (uint32_t)(state >> 16) % below : 0;
}

static void fail(const struct subject *file, const char *what, size_t at)
{
    printf("fsx: operation %ld, %s of %s: %s at %zu of %zu (%s)\n", operation, doing, file->name, what, at, file->size,
           strerror(errno));
    exit(1);
}

static void compare(const struct subject *file, const unsigned char *found, size_t at, size_t length)
{
    for (size_t byte = 0; byte < length; byte++)
        if (found[byte] != file->model[at + byte]) {
            errno = 0;
            fail(file, "another byte", at + byte);
        }
}

/* Bytes behind the end are zeroes when the file grows over them. */
static void resize(struct subject *file, size_t size)
{
    if (size < file->size)
        memset(file->model + size, 0, file->size - size);
    file->size = size;
}

static void whole(struct subject *file)
{
    struct stat status;
    if (fstat(file->first, &status) || (size_t)status.st_size != file->size)
        fail(file, "another size", (size_t)status.st_size);
    if (pread(file->first, data, LARGEST, 0) != (ssize_t)file->size)
        fail(file, "a short read", 0);
    compare(file, data, 0, file->size);
}

static void one(struct subject *file, struct subject *other)
{
    int fd = number(2) ? file->first : file->second;
    size_t at = number(number(4) ? LARGEST : (uint32_t)file->size + 1), length = number(number(4) ? 5000 : LONGEST);
    if (!number(4))
        at &= ~(size_t)4095;
    if (at + length > LARGEST)
        length = LARGEST - at;
    size_t inside = at >= file->size ? 0 : at + length > file->size ? file->size - at : length;
    size_t page = at & 4095;
    unsigned char *map;
    switch (number(16)) {
    case 0: case 1: case 2:
        doing = "read";
        if (pread(fd, data, length, (off_t)at) != (ssize_t)inside)
            fail(file, "a short read", at);
        compare(file, data, at, inside);
        break;
    case 3: case 4: case 5:
        doing = "write";
        for (size_t byte = 0; byte < length; byte++)
            data[byte] = (unsigned char)number(256);
        if (pwrite(fd, data, length, (off_t)at) != (ssize_t)length)
            fail(file, "a short write", at);
        if (length && at + length > file->size)
            resize(file, at + length);
        memcpy(file->model + at, data, length);
        break;
    case 6: case 7:
        doing = "read of a mapping";
        if (!inside)
            break;
        if ((map = mmap(NULL, page + inside, PROT_READ, MAP_SHARED, fd, (off_t)(at - page))) == MAP_FAILED)
            fail(file, "no mapping", at);
        compare(file, map + page, at, inside);
        munmap(map, page + inside);
        break;
    case 8: case 9:
        doing = "write to a mapping";
        if (!inside)
            break;
        if ((map = mmap(NULL, page + inside, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(at - page))) == MAP_FAILED)
            fail(file, "no mapping", at);
        for (size_t byte = 0; byte < inside; byte++)
            map[page + byte] = file->model[at + byte] = (unsigned char)number(256);
        if (number(2) && msync(map, page + inside, MS_SYNC))
            fail(file, "msync", at);
        munmap(map, page + inside);
        break;
    case 10:
        doing = "truncate";
        if (ftruncate(fd, (off_t)at))
            fail(file, "an error", at);
        resize(file, at);
        break;
    case 11:
        doing = "punch";
        if (!length)
            break;
        if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)length) && errno != EOPNOTSUPP)
            fail(file, "an error", at);
        else if (errno != EOPNOTSUPP)
            memset(file->model + at, 0, inside);
        errno = 0;
        break;
    case 12: {
        doing = "zero";
        int keep = (int)number(2);
        if (!length)
            break;
        if (fallocate(fd, FALLOC_FL_ZERO_RANGE | (keep ? FALLOC_FL_KEEP_SIZE : 0), (off_t)at, (off_t)length)) {
            if (errno != EOPNOTSUPP)
                fail(file, "an error", at);
            break;
        }
        memset(file->model + at, 0, inside);
        if (!keep && at + length > file->size)
            resize(file, at + length);
        break;
    }
    case 13: {
        doing = "copy of a range";
        off_t from = (off_t)at, to = number(LARGEST - LONGEST);
        ssize_t got = copy_file_range(fd, &from, other->first, &to, inside, 0);
        if (got < 0)
            fail(file, "an error", at);
        size_t end = (size_t)to;
        if (got && end > other->size)
            resize(other, end);
        memcpy(other->model + end - (size_t)got, file->model + at, (size_t)got);
        break;
    }
    case 14:
        doing = "open again";
        close(file->second);
        if ((file->second = open(file->name, O_RDWR)) < 0)
            fail(file, "an error", 0);
        break;
    case 15:
        doing = "sync";
        if (!number(8) && (number(2) ? fsync(fd) : fdatasync(fd)))
            fail(file, "an error", 0);
        if (number(2))
            posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        if (!number(4))
            whole(file);
        break;
    }
}

int main(int count, char **words)
{
    if (count != 4 || chdir(words[1])) {
        fprintf(stderr, "usage: fsx DIRECTORY OPERATIONS SEED\n");
        return 2;
    }
    state = strtoull(words[3], NULL, 0) * 0x9E3779B97F4A7C15u + 1;
    for (int each = 0; each < FILES; each++) {
        struct subject *file = &files[each];
        snprintf(file->name, sizeof file->name, "fsx%d", each);
        file->first = open(file->name, O_RDWR | O_CREAT | O_TRUNC, 0644);
        file->second = open(file->name, O_RDWR);
        if (file->first < 0 || file->second < 0)
            fail(file, "no file", 0);
    }
    for (long wanted = strtol(words[2], NULL, 0); operation < wanted; operation++) {
        int which = (int)number(FILES);
        if (operation && operation % 1000 == 0)
            fprintf(stderr, "fsx: at %ld\n", operation);
        errno = 0;
        one(&files[which], &files[!which]);
    }
    doing = "end";
    for (int each = 0; each < FILES; each++) {
        posix_fadvise(files[each].first, 0, 0, POSIX_FADV_DONTNEED);
        whole(&files[each]);
    }
    printf("fsx: %ld operations\n", operation);
    return 0;
}
