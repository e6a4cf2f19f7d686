/* Jobs of BlockEngine on an io_uring: as many at a time as the kernel takes, no thread of ours.
 *
 * A job takes one operation, or one after the other: the extents of its range, what a short transfer left, the entries of
 * a discard. What an io_uring cannot do (memory that O_DIRECT does not take, what needs a place first, zeroes that the
 * file system cannot make) goes to the threads.
 */
#include "blk.h"
#include "clock.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>

#ifndef FUSE_SUPER_MAGIC
#define FUSE_SUPER_MAGIC 0x65735546 /* linux/magic.h of newer kernels */
#endif

int blk_uring_open(struct blk_uring *uring, struct disk *disk)
{
    memset(uring, 0, sizeof *uring);
    uring->disk = disk;
    int error = uring_open(&uring->ring, URING_DEPTH);
#ifdef LV_URING
    /* Before it tries a file that has no RWF_NOWAIT, the kernel polls it, and for FUSE's that asks the server: a worker
     * of the kernel's may wait for the answer, the loop may not. */
    struct statfs system;
    for (const struct image *image = disk->image; image; image = image->backing)
        if (fstatfs(image->fd, &system) || system.f_type == FUSE_SUPER_MAGIC)
            uring->flags = IOSQE_ASYNC;
#endif
    return error;
}

void blk_uring_close(struct blk_uring *uring)
{
    uring_close(&uring->ring);
}

#ifdef LV_URING

enum progress { DONE_OK, DONE_FAILED, GO_ON, ELSEWHERE };

static bool is_transfer(const struct request *job)
{
    return job->type == T_IN || job->type == T_OUT;
}

/* Past entries of a discard or write-zeroes that ask for nothing. */
static void skip_empty(struct request *job)
{
    while (job->step < job->zeroes_count && !job->zeroes[job->step].sectors)
        job->step++;
}

/* The whole job's iovec, and room for a part of it, as a copy: that of a request stays as it is. */
static bool gather(struct request *job)
{
    if (!job->all) {
        job->all = malloc(2 * job->job_iovs * sizeof *job->all);
        if (job->all)
            blk_gather(job, job->all);
    }
    return job->all;
}

static void prepare(struct request *job)
{
    job->step = 0;
    job->moved = 0;
    skip_empty(job);
}

/* Find what the next operation of a transfer moves: `iov` and job->extent. False: not by an io_uring. */
static bool plan_transfer(struct image *image, struct request *job, struct iovec **iov, unsigned *count)
{
    bool write = job->type == T_OUT;
    struct extent *extent = &job->extent;
    if ((job->merged && !gather(job)) || (write && job->dsync && image->flat < 0) ||
        !image->ops->map(image, job->offset + job->moved, job->job_length - job->moved,
                         write ? FOR_WRITING : FOR_READING, extent))
        return false;
    bool whole = extent->length == job->job_length;
    if (extent->kind == KIND_DATA && (whole || gather(job))) {
        *iov = job->all ? job->all : job->iov;
        *count = job->job_iovs;
        if (!whole) {
            *iov = job->all + job->job_iovs;
            *count = iov_slice(job->all, job->job_iovs, job->moved, extent->length, *iov);
        }
        if (iov_aligned(*iov, *count, extent->align))
            return true;
    }
    image_complete(extent, false);
    return false;
}

/* Fill in the next operation. False: there is none that an io_uring can do. */
static bool fill(struct image *image, struct request *job, struct io_uring_sqe *entry)
{
    /* Not a registered file: the kernel keeps those for a while after the ring is closed, and with it the image's lock. */
    entry->user_data = (uint64_t)(uintptr_t)job;
    if (is_transfer(job)) {
        bool write = job->type == T_OUT;
        struct iovec *iov;
        unsigned count;
        if (!plan_transfer(image, job, &iov, &count))
            return false;
        entry->fd = job->extent.fd;
        entry->off = job->extent.offset;
        if (count == 1 && iov->iov_len <= UINT32_MAX) {
            entry->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
            entry->addr = (uint64_t)(uintptr_t)iov->iov_base;
            entry->len = (uint32_t)iov->iov_len;
        } else {
            entry->opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
            entry->addr = (uint64_t)(uintptr_t)iov;
            entry->len = count;
        }
        entry->rw_flags = write && job->dsync ? RWF_DSYNC : 0;
        return true;
    }
    if (job->type == T_FLUSH || job->step == job->zeroes_count) {
        entry->opcode = IORING_OP_FSYNC;
        entry->fsync_flags = IORING_FSYNC_DATASYNC;
        entry->fd = image->ops->flush_fd(image);
        return entry->fd >= 0;
    }
    const struct zeroes *zeroes = &job->zeroes[job->step];
    bool unmap = job->type == T_DISCARD || zeroes->flags & 1;
    entry->opcode = IORING_OP_FALLOCATE;
    entry->fd = image->flat;
    entry->off = zeroes->sector * SECTOR;
    entry->addr = (uint64_t)zeroes->sectors * SECTOR;
    entry->len = FALLOC_FL_KEEP_SIZE | (unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
    return image->flat >= 0;
}

/* An operation of `job` is over, which `moved` as many bytes. */
static void complete(struct request *job, uint64_t moved)
{
    if (is_transfer(job)) {
        job->extent.length = moved < job->extent.length ? moved : job->extent.length;
        image_complete(&job->extent, moved);
        job->moved += moved;
    }
}

/* What `result` of an operation means for its job. */
static enum progress advance(struct request *job, int32_t result)
{
    complete(job, result > 0 ? (uint64_t)result : 0);
    if (result == -EINTR)
        return GO_ON;
    if (result == -EAGAIN || result == -EOPNOTSUPP)
        return ELSEWHERE;
    if (is_transfer(job)) {
        if (!result && job->type == T_IN && job->extent.sparse_end)
            return ELSEWHERE;
        if (result <= 0)
            return DONE_FAILED;
        return job->moved < job->job_length ? GO_ON : DONE_OK;
    }
    if (job->type == T_FLUSH || job->step == job->zeroes_count)
        return result < 0 ? DONE_FAILED : DONE_OK;
    if (result < 0 && job->type == T_WRITE_ZEROES)
        return ELSEWHERE; /* a discard that the file system cannot do is a hint not taken */
    job->step++;
    skip_empty(job);
    if (job->step < job->zeroes_count || (job->type == T_WRITE_ZEROES && job->dsync))
        return GO_ON;
    return DONE_OK;
}

/* Hand over what waits, as far as it may be in flight. */
static void feed(struct blk_uring *uring, struct jobs *elsewhere)
{
    uint64_t bytes = 0;
    while (uring->waiting.count && uring->in_flight < URING_DEPTH) {
        struct io_uring_sqe *entry = uring_entry(&uring->ring);
        if (!entry)
            break;
        struct request *job = jobs_take(&uring->waiting);
        uint64_t none;
        if (!fill(uring->disk->image, job, entry)) {
            uring_retract(&uring->ring, &none);
            jobs_add(elsewhere, job);
            continue;
        }
        /* The kernel does at once, in our call, what it can do without waiting: no more than a turn of the loop may move. */
        bytes += is_transfer(job) ? job->job_length : 0;
        entry->flags = bytes > INLINE_BYTES ? IOSQE_ASYNC : uring->flags;
        uring->in_flight++;
    }
    uint64_t retracted;
    if (!uring_submit(&uring->ring, false, 0))
        return;
    /* The kernel has no memory for more: nothing would wake us to try again. */
    while (uring_retract(&uring->ring, &retracted)) {
        if (retracted) {
            struct request *job = (struct request *)(uintptr_t)retracted;
            uring->in_flight--;
            complete(job, 0);
            jobs_add(elsewhere, job);
        }
    }
}

void blk_uring_submit(struct blk_uring *uring, struct jobs *jobs, struct jobs *elsewhere)
{
    for (struct request *job; (job = jobs_take(jobs));) {
        prepare(job);
        jobs_add(&uring->waiting, job);
    }
    feed(uring, elsewhere);
}

void blk_uring_done(struct blk_uring *uring, struct jobs *done, struct jobs *elsewhere)
{
    uint64_t user_data;
    int32_t result;
    while (uring_completion(&uring->ring, &user_data, &result)) {
        struct request *job = (struct request *)(uintptr_t)user_data;
        if (!job)
            continue; /* a cancellation */
        uring->in_flight--;
        enum progress progress = advance(job, result);
        if (progress == GO_ON) {
            jobs_add(&uring->waiting, job);
        } else if (progress == ELSEWHERE) {
            jobs_add(elsewhere, job);
        } else {
            blk_done(job, progress == DONE_OK ? S_OK : S_IOERR);
            jobs_add(done, job);
        }
    }
    if (uring->waiting.count)
        feed(uring, elsewhere);
}

bool blk_uring_cancel(struct blk_uring *uring, int64_t deadline, struct jobs *dropped)
{
    if (uring->ring.fd < 0)
        return true;
#ifdef IORING_ASYNC_CANCEL_ANY
    /* Linux 5.19; an older kernel refuses it, and what is in flight ends by itself */
    struct io_uring_sqe *entry = uring->in_flight && !uring->cancelling ? uring_entry(&uring->ring) : NULL;
    if (entry) {
        entry->opcode = IORING_OP_ASYNC_CANCEL;
        entry->cancel_flags = IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL;
        uring->cancelling = true;
    }
#endif
    for (bool waited = false;; waited = true) {
        uint64_t user_data;
        int32_t result;
        while (uring_completion(&uring->ring, &user_data, &result)) {
            if (user_data) {
                struct request *job = (struct request *)(uintptr_t)user_data;
                uring->in_flight--;
                complete(job, result > 0 ? (uint64_t)result : 0);
                jobs_add(dropped, job);
            }
        }
        jobs_join(dropped, &uring->waiting);
        if (!uring->in_flight)
            break;
        int64_t left = deadline - clock_now();
        if (waited && left <= 0)
            return false;
        uring_submit(&uring->ring, true, left > 0 ? left : 0);
    }
    uring->cancelling = false;
    return true;
}

#else

void blk_uring_submit(struct blk_uring *uring, struct jobs *jobs, struct jobs *elsewhere)
{
    (void)uring;
    jobs_join(elsewhere, jobs);
}

void blk_uring_done(struct blk_uring *uring, struct jobs *done, struct jobs *elsewhere)
{
    (void)uring;
    (void)done;
    (void)elsewhere;
}

bool blk_uring_cancel(struct blk_uring *uring, int64_t deadline, struct jobs *dropped)
{
    (void)uring;
    (void)deadline;
    (void)dropped;
    return true;
}

#endif
