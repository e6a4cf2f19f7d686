/* Transfers between memory and an image. Everything here may block; nothing knows a format. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* preadv2, fallocate */
#endif
#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BOUNCE = 1 << 20, PAGE = 4096 };

unsigned iov_slice(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t length, struct iovec *out)
{
    unsigned used = 0;
    for (unsigned i = 0; i < count && length; i++) {
        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        uint64_t part = iov[i].iov_len - skip < length ? iov[i].iov_len - skip : length;
        out[used++] = (struct iovec){(char *)iov[i].iov_base + skip, part};
        length -= part;
        skip = 0;
    }
    return used;
}

/* Move `length` bytes between `flat` and the bytes from `skip` on that `iov` names. */
void iov_copy(const struct iovec *iov, unsigned count, uint64_t skip, char *flat, uint64_t length, bool to_flat)
{
    for (unsigned i = 0; i < count && length; i++) {
        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        uint64_t part = iov[i].iov_len - skip < length ? iov[i].iov_len - skip : length;
        char *at = (char *)iov[i].iov_base + skip;
        memcpy(to_flat ? flat : at, to_flat ? at : flat, part);
        flat += part;
        length -= part;
        skip = 0;
    }
}

void iov_zero(const struct iovec *iov, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        memset(iov[i].iov_base, 0, iov[i].iov_len);
}

bool iov_aligned(const struct iovec *iov, unsigned count, uint32_t align)
{
    uintptr_t bits = 0;
    for (unsigned i = 0; i < count && align; i++)
        bits |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
    return !align || !(bits % align);
}

int file_transfer(int fd, bool write, struct iovec *iov, unsigned count, uint64_t offset, uint64_t length, int flags,
                  bool sparse_end)
{
    while (length) {
        ssize_t done = write ? pwritev2(fd, iov, (int)count, (off_t)offset, flags)
                             : preadv2(fd, iov, (int)count, (off_t)offset, flags);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return errno;
        if (!done) {
            if (write || !sparse_end)
                return EIO;
            iov_zero(iov, count);
            return 0;
        }
        length -= (uint64_t)done;
        offset += (uint64_t)done;
        size_t left = (size_t)done;
        while (count && left >= iov->iov_len) {
            left -= iov->iov_len;
            iov++;
            count--;
        }
        if (count) {
            iov->iov_base = (char *)iov->iov_base + left;
            iov->iov_len -= left;
        }
    }
    return 0;
}

bool file_punch(int fd, uint64_t offset, uint64_t length)
{
    return !fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
}

int file_zero(int fd, uint64_t offset, uint64_t length, const bool *abandoned)
{
    static const char zeroes[65536] __attribute__((aligned(4096)));
    if (!fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length))
        return 0;
    while (length && !image_abandoned(abandoned)) {
        ssize_t done = pwrite(fd, zeroes, length < sizeof zeroes ? length : sizeof zeroes, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done ? errno : EIO;
        offset += (uint64_t)done;
        length -= (uint64_t)done;
    }
    return 0;
}

bool image_map_backing(struct image *image, uint64_t offset, uint64_t length, struct extent *extent)
{
    struct image *backing = image->backing;
    if (!backing || offset >= backing->length) {
        *extent = (struct extent){.kind = KIND_ZERO, .hole = true, .fd = -1, .length = length, .owner = image, .guest = offset};
        return true;
    }
    if (length > backing->length - offset)
        length = backing->length - offset;
    return backing->ops->map(backing, offset, length, FOR_READING, extent);
}

int image_locate_backing(struct image *image, uint64_t offset, uint64_t length, struct extent *extent)
{
    struct image *backing = image->backing;
    if (!backing || offset >= backing->length)
        return !image_map_backing(image, offset, length, extent);
    if (length > backing->length - offset)
        length = backing->length - offset;
    return backing->ops->locate(backing, offset, length, extent);
}

static void *bounce_new(uint64_t length)
{
    void *bounce;
    return posix_memalign(&bounce, PAGE, length < BOUNCE ? (length + PAGE - 1) / PAGE * PAGE : BOUNCE) ? NULL : bounce;
}

/* O_DIRECT wants aligned memory; a guest need not: then the bytes take one more step. */
static int bounced(const struct extent *extent, bool write, const struct iovec *iov, unsigned count, int flags,
                   const bool *abandoned)
{
    char *bounce = bounce_new(extent->length);
    int error = bounce ? 0 : ENOMEM;
    for (uint64_t done = 0; done < extent->length && !error && !image_abandoned(abandoned); done += BOUNCE) {
        uint64_t part = extent->length - done < BOUNCE ? extent->length - done : BOUNCE;
        struct iovec one = {bounce, part};
        if (write)
            iov_copy(iov, count, done, bounce, part, true);
        error = file_transfer(extent->fd, write, &one, 1, extent->offset + done, part, flags, extent->sparse_end);
        if (!write && !error)
            iov_copy(iov, count, done, bounce, part, false);
    }
    free(bounce);
    return error;
}

static int move_extent(const struct extent *extent, bool write, struct iovec *iov, unsigned count, int flags,
                       const bool *abandoned)
{
    if (!iov_aligned(iov, count, extent->align))
        return bounced(extent, write, iov, count, flags, abandoned);
    return file_transfer(extent->fd, write, iov, count, extent->offset, extent->length, flags, extent->sparse_end);
}

static int unpack_extent(const struct extent *extent, const struct iovec *iov, unsigned count)
{
    struct image *owner = extent->owner;
    if (count == 1)
        return owner->ops->unpack(owner, extent->guest, extent->length, iov->iov_base);
    char *flat = malloc(extent->length);
    int error = flat ? owner->ops->unpack(owner, extent->guest, extent->length, flat) : ENOMEM;
    if (!error)
        iov_copy(iov, count, 0, flat, extent->length, false);
    free(flat);
    return error;
}

int image_read(struct image *image, struct iovec *iov, unsigned count, uint64_t offset, uint64_t length,
               const bool *abandoned)
{
    struct iovec slice[IMAGE_IOVS];
    for (uint64_t done = 0; done < length && !image_abandoned(abandoned);) {
        struct extent extent;
        int error = image->ops->locate(image, offset + done, length - done, &extent);
        if (error)
            return error;
        struct iovec *part = iov;
        unsigned parts = count;
        if (done || extent.length < length) {
            parts = iov_slice(iov, count, done, extent.length, slice);
            part = slice;
        }
        if (extent.kind == KIND_ZERO)
            iov_zero(part, parts);
        else if (extent.kind == KIND_PACKED)
            error = unpack_extent(&extent, part, parts);
        else
            error = move_extent(&extent, false, part, parts, 0, abandoned);
        image_complete(&extent, !error);
        if (error)
            return error;
        done += extent.length;
    }
    return 0;
}

/* A write into a place that also takes what stands beside it. */
static int write_surrounded(struct image *image, const struct extent *extent, const struct iovec *iov, unsigned count)
{
    uint64_t length = extent->before + extent->length + extent->after;
    void *memory;
    if (posix_memalign(&memory, PAGE, (length + PAGE - 1) / PAGE * PAGE))
        return ENOMEM;
    char *flat = memory;
    struct iovec head = {flat, extent->before}, tail = {flat + extent->before + extent->length, extent->after};
    int error = extent->before
                    ? image_read(image, &head, 1, extent->guest - extent->before, extent->before, NULL)
                    : 0;
    if (!error && extent->after) {
        /* The last cluster may reach beyond the disk. */
        uint64_t from = extent->guest + extent->length, there = from < image->length ? image->length - from : 0;
        uint64_t inside = there < extent->after ? there : extent->after;
        memset(flat + length - (extent->after - inside), 0, extent->after - inside);
        tail.iov_len = inside;
        error = inside ? image_read(image, &tail, 1, from, inside, NULL) : 0;
    }
    if (!error) {
        iov_copy(iov, count, 0, flat + extent->before, extent->length, true);
        struct iovec whole = {flat, length};
        error = file_transfer(extent->fd, true, &whole, 1, extent->offset - extent->before, length, 0, false);
    }
    free(memory);
    return error;
}

/* The first bytes of a disk that may not begin like an image of another format. They are copied before they are looked
 * at, for the guest may change its memory meanwhile. */
static int write_start(struct image *image, const struct iovec *iov, unsigned count, bool durable)
{
    static const char magic[4] = {'Q', 'F', 'I', '\xfb'};
    void *copy;
    if (posix_memalign(&copy, PAGE, PAGE))
        return ENOMEM;
    uint64_t length = 0;
    for (unsigned i = 0; i < count; i++)
        length += iov[i].iov_len;
    length = length < PAGE ? length : PAGE;
    iov_copy(iov, count, 0, copy, length, true);
    struct iovec one = {copy, length};
    int error = length < sizeof magic || !memcmp(copy, magic, sizeof magic)
                    ? EPERM
                    : file_transfer(image->flat, true, &one, 1, 0, length, durable ? RWF_DSYNC : 0, false);
    free(copy);
    return error;
}

int image_write(struct image *image, struct iovec *iov, unsigned count, uint64_t offset, uint64_t length, bool durable,
                const bool *abandoned)
{
    struct iovec slice[IMAGE_IOVS];
    if (image->guarded && !offset && length) {
        int error = write_start(image, iov, count, durable);
        uint64_t done = length < PAGE ? length : PAGE;
        if (error || done == length)
            return error;
        struct iovec rest[IMAGE_IOVS];
        unsigned parts = iov_slice(iov, count, done, length - done, rest);
        return image_write(image, rest, parts, done, length - done, durable, abandoned);
    }
    int flags = durable && image->flat >= 0 ? RWF_DSYNC : 0;
    for (uint64_t done = 0; done < length && !image_abandoned(abandoned);) {
        struct extent extent;
        int error = image->ops->allocate(image, offset + done, length - done, &extent);
        if (error)
            return error;
        struct iovec *part = iov;
        unsigned parts = count;
        if (done || extent.length < length) {
            parts = iov_slice(iov, count, done, extent.length, slice);
            part = slice;
        }
        if (extent.before || extent.after)
            error = write_surrounded(image, &extent, part, parts);
        else
            error = move_extent(&extent, true, part, parts, flags, abandoned);
        int other = image_complete(&extent, !error && !image_abandoned(abandoned));
        if (error || other)
            return error ? error : other;
        done += extent.length;
    }
    return durable && image->flat < 0 ? image->ops->flush(image) : 0;
}

int image_write_zeroes(struct image *image, uint64_t offset, uint64_t length, const bool *abandoned)
{
    char *zeroes = bounce_new(length);
    if (!zeroes)
        return ENOMEM;
    memset(zeroes, 0, length < BOUNCE ? length : BOUNCE);
    int error = 0;
    for (uint64_t done = 0; done < length && !error && !image_abandoned(abandoned); done += BOUNCE) {
        struct iovec iov = {zeroes, length - done < BOUNCE ? length - done : BOUNCE};
        error = image_write(image, &iov, 1, offset + done, iov.iov_len, false, abandoned);
    }
    free(zeroes);
    return error;
}
