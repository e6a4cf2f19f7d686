/* What a job of BlockEngine does to the files. Nothing here knows rings or Python; blk_run() may block. */
#include "blk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BOUNCE = 1 << 20 };

int64_t blk_now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

static uint8_t transfer(int fd, bool write, struct iovec *iov, unsigned count, uint64_t offset, uint64_t length, int flags)
{
    while (length) {
        ssize_t done = write ? pwritev2(fd, iov, (int)count, (off_t)offset, flags)
                             : preadv2(fd, iov, (int)count, (off_t)offset, flags);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return S_IOERR;
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
    return S_OK;
}

/* Move `length` bytes between `flat` and the bytes from `skip` on that `iov` names. */
static void iov_copy(const struct iovec *iov, unsigned count, uint64_t skip, char *flat, uint64_t length, bool to_flat)
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

bool blk_aligned(const struct disk *disk, const struct iovec *iov, unsigned count)
{
    uintptr_t bits = 0;
    for (unsigned i = 0; i < count && disk->align; i++)
        bits |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
    return !disk->align || !(bits % disk->align);
}

/* O_DIRECT wants aligned memory; a guest need not: then the bytes take one more step. */
static uint8_t transfer_bounced(const struct disk *disk, bool write, const struct iovec *iov, unsigned count,
                                uint64_t offset, uint64_t length, int flags)
{
    void *bounce;
    if (posix_memalign(&bounce, 4096, length < BOUNCE ? length : BOUNCE))
        return S_IOERR;
    uint8_t status = S_OK;
    for (uint64_t done = 0; done < length && status == S_OK && !blk_abandoned(disk); done += BOUNCE) {
        uint64_t part = length - done < BOUNCE ? length - done : BOUNCE;
        struct iovec one = {bounce, part};
        if (write)
            iov_copy(iov, count, done, bounce, part, true);
        status = transfer(disk->fd, write, &one, 1, offset + done, part, flags);
        if (!write && status == S_OK)
            iov_copy(iov, count, done, bounce, part, false);
    }
    free(bounce);
    return status;
}

bool blk_is_dirty(const struct disk *disk, uint64_t sector)
{
    return __atomic_load_n(disk->dirty + sector / 8, __ATOMIC_RELAXED) >> sector % 8 & 1;
}

uint64_t blk_dirty_run(const struct disk *disk, uint64_t sector, uint64_t sectors)
{
    uint64_t run = 1;
    bool first = blk_is_dirty(disk, sector);
    while (run < sectors && blk_is_dirty(disk, sector + run) == first)
        run++;
    return run;
}

void blk_set_dirty(struct disk *disk, uint64_t offset, uint64_t length)
{
    for (uint64_t sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++)
        __atomic_fetch_or(disk->dirty + sector / 8, (uint8_t)(1u << sector % 8), __ATOMIC_RELEASE);
}

static unsigned iov_slice(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t length, struct iovec *out)
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

/* A snapshot: writes go to the overlay, each sector is read from where it stands. */
static uint8_t transfer_overlaid(struct disk *disk, bool write, struct iovec *iov, unsigned count, uint64_t offset,
                                 uint64_t length)
{
    if (write) {
        uint8_t status = transfer(disk->overlay, true, iov, count, offset, length, 0);
        if (status == S_OK)
            blk_set_dirty(disk, offset, length);
        return status;
    }
    uint8_t status = S_OK;
    for (uint64_t done = 0; done < length && status == S_OK && !blk_abandoned(disk);) {
        struct iovec part[IOV_LIMIT];
        uint64_t sector = (offset + done) / SECTOR;
        uint64_t run = blk_dirty_run(disk, sector, (length - done) / SECTOR) * SECTOR;
        unsigned parts = iov_slice(iov, count, done, run, part);
        int fd = blk_is_dirty(disk, sector) ? disk->overlay : disk->fd;
        status = transfer(fd, false, part, parts, offset + done, run, 0);
        done += run;
    }
    return status;
}

static uint8_t zero_range(const struct disk *disk, int fd, uint64_t offset, uint64_t length)
{
    static const char zeroes[65536] __attribute__((aligned(4096)));
    if (!fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length))
        return S_OK;
    while (length && !blk_abandoned(disk)) {
        ssize_t done = pwrite(fd, zeroes, length < sizeof zeroes ? length : sizeof zeroes, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return S_IOERR;
        offset += (uint64_t)done;
        length -= (uint64_t)done;
    }
    return S_OK;
}

static bool punch(int fd, uint64_t offset, uint64_t length)
{
    return !fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
}

static uint8_t run_zeroes(struct disk *disk, struct request *request)
{
    uint8_t status = S_OK;
    for (uint32_t i = 0; i < request->zeroes_count && status == S_OK && !blk_abandoned(disk); i++) {
        uint64_t offset = request->zeroes[i].sector * SECTOR, length = (uint64_t)request->zeroes[i].sectors * SECTOR;
        bool unmap = request->type == T_DISCARD || request->zeroes[i].flags & 1;
        if (disk->overlay >= 0) {
            if (length && request->type == T_WRITE_ZEROES) {
                if (punch(disk->overlay, offset, length) || zero_range(disk, disk->overlay, offset, length) == S_OK)
                    blk_set_dirty(disk, offset, length);
                else
                    status = S_IOERR;
            }
            continue;
        }
        if (!length || (unmap && punch(disk->fd, offset, length)))
            continue;
        if (request->type == T_WRITE_ZEROES) /* a discard that the file system cannot do is a hint not taken */
            status = zero_range(disk, disk->fd, offset, length);
    }
    if (request->dsync && status == S_OK && request->type == T_WRITE_ZEROES && disk->overlay < 0 && fdatasync(disk->fd))
        status = S_IOERR;
    return status;
}

unsigned blk_gather(const struct request *job, struct iovec *iov)
{
    unsigned count = 0;
    for (const struct request *request = job; request; request = request->merged) {
        memcpy(iov + count, request->iov, request->iovs * sizeof *iov);
        count += request->iovs;
    }
    return count;
}

void blk_done(struct request *job, uint8_t status)
{
    for (struct request *request = job; request; request = request->merged) {
        request->status = status;
        /* The used length covers the data, so that it is the device's even if the read failed. */
        for (uint32_t i = 0; request->type == T_IN && status != S_OK && i < request->iovs; i++)
            memset(request->iov[i].iov_base, 0, request->iov[i].iov_len);
    }
}

void blk_run(struct disk *disk, struct request *job)
{
    uint8_t status;
    if (blk_abandoned(disk))
        return; /* dropped, as soon as it is back */
    if (job->type == T_IN || job->type == T_OUT) {
        struct iovec iov[IOV_LIMIT];
        unsigned count = blk_gather(job, iov);
        bool write = job->type == T_OUT;
        int flags = job->dsync && write ? RWF_DSYNC : 0;
        if (disk->overlay >= 0)
            status = transfer_overlaid(disk, write, iov, count, job->offset, job->job_length);
        else if (blk_aligned(disk, iov, count))
            status = transfer(disk->fd, write, iov, count, job->offset, job->job_length, flags);
        else
            status = transfer_bounced(disk, write, iov, count, job->offset, job->job_length, flags);
    } else if (job->type == T_FLUSH) {
        /* a snapshot ends with its machine: there is nothing to make durable */
        status = disk->overlay < 0 && fdatasync(disk->fd) ? S_IOERR : S_OK;
    } else {
        status = run_zeroes(disk, job);
    }
    blk_done(job, status);
}

bool blk_try_now(struct disk *disk, struct request *job)
{
    bool write = job->type == T_OUT;
    if (job->type == T_FLUSH && disk->overlay >= 0) {
        blk_done(job, S_OK);
        return true;
    }
    if ((job->type != T_IN && !write) || job->job_length > INLINE_BYTES || disk->align || !(write ? disk->nowait_write && !job->dsync : disk->nowait_read))
        return false;
    int fd = disk->fd;
    if (disk->overlay >= 0) {
        uint64_t first = job->offset / SECTOR, sectors = job->job_length / SECTOR;
        if (write || blk_dirty_run(disk, first, sectors) != sectors)
            return false;
        if (blk_is_dirty(disk, first))
            fd = disk->overlay;
    }
    struct iovec iov[IOV_LIMIT], *at = job->iov;
    unsigned count = job->iovs;
    if (job->merged) {
        count = blk_gather(job, iov);
        at = iov;
    }
    ssize_t done = write ? pwritev2(fd, at, (int)count, (off_t)job->offset, RWF_NOWAIT)
                         : preadv2(fd, at, (int)count, (off_t)job->offset, RWF_NOWAIT);
    if (done < 0 && errno != EAGAIN && errno != EINTR) {
        if (write)
            disk->nowait_write = false;
        else
            disk->nowait_read = false;
    }
    return done >= 0 && (uint64_t)done == job->job_length;
}
