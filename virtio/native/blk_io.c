/* What a job of BlockEngine does to its image. Nothing here knows rings, Python or formats; blk_run() may block. */
#include "blk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint8_t run_zeroes(struct disk *disk, struct request *request)
{
    struct image *image = disk->image;
    int error = 0;
    for (uint32_t i = 0; i < request->zeroes_count && !error && !blk_abandoned(disk); i++) {
        uint64_t offset = request->zeroes[i].sector * SECTOR, length = (uint64_t)request->zeroes[i].sectors * SECTOR;
        if (!length)
            continue;
        if (request->type == T_DISCARD)
            error = image->ops->discard(image, offset, length);
        else
            error = image->ops->zero(image, offset, length, request->zeroes[i].flags & 1, &disk->abandoned);
    }
    if (!error && request->dsync && request->type == T_WRITE_ZEROES)
        error = image->ops->flush(image);
    return error ? S_IOERR : S_OK;
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
    struct image *image = disk->image;
    uint8_t status;
    if (blk_abandoned(disk))
        return; /* dropped, as soon as it is back */
    if (job->type == T_IN || job->type == T_OUT) {
        struct iovec iov[IOV_LIMIT];
        unsigned count = blk_gather(job, iov);
        int error = job->type == T_OUT ? image_write(image, iov, count, job->offset, job->job_length, job->dsync, &disk->abandoned)
                                       : image_read(image, iov, count, job->offset, job->job_length, &disk->abandoned);
        status = error ? S_IOERR : S_OK;
    } else if (job->type == T_FLUSH) {
        status = image->ops->flush(image) ? S_IOERR : S_OK;
    } else {
        status = run_zeroes(disk, job);
    }
    blk_done(job, status);
}

/* Facts of the file system, which several threads find. */
static bool is(const bool *fact)
{
    return __atomic_load_n(fact, __ATOMIC_RELAXED);
}

static void set(bool *fact, bool value)
{
    __atomic_store_n(fact, value, __ATOMIC_RELAXED);
}

/* One extent of a job: moved if that needs no waiting, or, with `patient`, but for the page cache. */
static bool move_now(struct disk *disk, const struct extent *extent, bool write, bool patient, const struct iovec *iov,
                     unsigned count)
{
    if (extent->kind == KIND_ZERO) {
        iov_zero(iov, count);
        return true;
    }
    if (extent->kind != KIND_DATA || extent->align)
        return false;
    bool waits = write && patient && is(&disk->writes_wait);
    ssize_t done = write ? pwritev2(extent->fd, iov, (int)count, (off_t)extent->offset, waits ? 0 : RWF_NOWAIT)
                         : preadv2(extent->fd, iov, (int)count, (off_t)extent->offset, RWF_NOWAIT);
    if (done < 0 && !waits && errno != EAGAIN && errno != EINTR) {
        if (write) { /* for good: an error proper comes again where it is told */
            set(&disk->writes_wait, errno == EOPNOTSUPP);
            set(&disk->nowait_write, false);
        } else {
            set(&disk->nowait_read, false);
        }
    }
    return done >= 0 && (uint64_t)done == extent->length;
}

bool blk_try_now(struct disk *disk, struct request *job, bool patient)
{
    bool write = job->type == T_OUT;
    struct image *image = disk->image;
    if (job->type == T_FLUSH && image->ops->flush_fd(image) == FLUSH_NOTHING) {
        blk_done(job, S_OK);
        return true;
    }
    bool may_write = !job->dsync && (is(&disk->nowait_write) || (patient && is(&disk->writes_wait)));
    if ((job->type != T_IN && !write) || job->job_length > INLINE_BYTES || !(write ? may_write : is(&disk->nowait_read)))
        return false;
    struct iovec all[IOV_LIMIT], slice[IOV_LIMIT], *whole = job->iov;
    unsigned count = job->iovs;
    if (job->merged) {
        count = blk_gather(job, all);
        whole = all;
    }
    for (uint64_t done = 0; done < job->job_length;) {
        struct extent extent;
        uint64_t left = job->job_length - done;
        if (!image->ops->map(image, job->offset + done, left, write ? FOR_WRITING : FOR_READING, &extent))
            return false;
        const struct iovec *part = whole;
        unsigned parts = count;
        if (extent.length < job->job_length) {
            parts = iov_slice(whole, count, done, extent.length, slice);
            part = slice;
        }
        bool moved = move_now(disk, &extent, write, patient, part, parts);
        image_complete(&extent, moved);
        if (!moved)
            return false;
        done += extent.length;
    }
    blk_done(job, S_OK);
    return true;
}
