/* The parts of virtio._ring.BlockEngine (virtio 1.2, 5.2.6).
 *
 * blk.c          the Python object: a batch from ring to jobs, and from jobs back to rings
 * blk_gate.c     requests that wait for tokens
 * blk_request.c  one request: checked, its bytes found, returned to the driver
 * blk_io.c       what one job does to the image, which may block; what the page cache does at once
 * blk_threads.c  jobs on native threads
 * blk_uring.c    jobs on an io_uring
 * blk_direct.c   requests on the thread of the vCPU that makes them
 *
 * Where the bytes of the disk stand is the image's matter (image.h). A job is one request or several that are adjacent on
 * disk. Everything of Python is touched by the loop's thread alone; rings, status bytes and counters by it and by vCPUs'
 * threads, under `blk_direct.answering.lock`; other threads own nothing but the system calls of the jobs that they were
 * given.
 */
#ifndef VIRTIO_BLK_H
#define VIRTIO_BLK_H

#include "module.h" /* first: it includes Python.h */

#include <pthread.h>
#include <sys/uio.h>

#include "answering.h"
#include "image.h"
#include "uring.h"

enum {
    T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13,
    S_OK = 0, S_IOERR = 1, S_UNSUPP = 2,
    SECTOR = 512, HEADER = 16, ID_BYTES = 20, ZEROES_ENTRY = 16,
    ZEROES_ENTRIES = 32,       /* max_discard_seg, max_write_zeroes_seg */
    ZEROES_SECTORS = 0x200000, /* max_discard_sectors, max_write_zeroes_sectors */
    THREADS_MAX = 8,
    IOV_LIMIT = IMAGE_IOVS,
    TURN_REQUESTS = 128,    /* as many are taken in a turn of the loop, or let through the gate */
    TURN_BYTES = 1 << 20,   /* after so many no more requests are taken in this turn of the loop */
    INLINE_BYTES = 2 << 20, /* what a job that is done in the loop's turn may move at most: two of Linux' largest reads */
    URING_DEPTH = 128 /* jobs that the kernel has at a time; the rest waits */
};

struct zeroes {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct request {
    struct request *next;   /* in a list of jobs */
    struct request *merged; /* the rest of this job: adjacent on disk, same type */
    struct request *last;   /* tail of `merged`, valid in the first */
    RingObject *ring;       /* a reference; on a vCPU's thread it is the lane's */
    struct chain chain; /* segments: own copy */
    uint8_t *status_at;
    uint32_t type;
    uint8_t status;
    bool dsync;
    uint64_t offset, length; /* bytes */
    uint64_t job_length;     /* with everything merged, valid in the first */
    uint32_t job_iovs;
    uint32_t zeroes_count;
    struct zeroes *zeroes;
    /* Of a job on an io_uring: */
    struct iovec *all;    /* of the whole job, if it is not `iov`; the second half is room for a part of it */
    struct extent extent; /* where the operation that is in flight moves bytes */
    uint64_t moved;       /* bytes done */
    uint32_t step;        /* entries of `zeroes` done */
    uint32_t iovs;
    struct iovec iov[];
};

/* A list of jobs, linked by `next`. */
struct jobs {
    struct request *first, *last;
    unsigned count;
};

static inline void jobs_add(struct jobs *jobs, struct request *job)
{
    job->next = NULL;
    if (jobs->last)
        jobs->last->next = job;
    else
        jobs->first = job;
    jobs->last = job;
    jobs->count++;
}

static inline struct request *jobs_take(struct jobs *jobs)
{
    struct request *job = jobs->first;
    if (job) {
        jobs->first = job->next;
        if (!jobs->first)
            jobs->last = NULL;
        jobs->count--;
        job->next = NULL;
    }
    return job;
}

/* Append `more`, which is empty then. */
static inline void jobs_join(struct jobs *jobs, struct jobs *more)
{
    if (!more->first)
        return;
    if (jobs->last)
        jobs->last->next = more->first;
    else
        jobs->first = more->first;
    jobs->last = more->last;
    jobs->count += more->count;
    *more = (struct jobs){0};
}

struct disk {
    struct image *image;
    uint64_t sectors;
    bool read_only, writeback, discard, write_zeroes;
    bool nowait_read, nowait_write; /* the file system answers RWF_NOWAIT; atomic, as the next */
    bool writes_wait; /* it refused RWF_NOWAIT for a write into the page cache */
    bool abandoned; /* skip requests that were not yet submitted; set by the loop's thread, atomic */
    char serial[ID_BYTES];
};

/* blk_request.c */

/* A request from what was popped, without a reference to its ring; NULL: no memory. Any thread. */
struct request *blk_request_new(const struct chain *chain);
/* A request that is not of one job with others. Any thread. */
void blk_request_alone(struct request *request);
/* What blk_request_free() does but for the ring. Any thread. */
void blk_request_drop(struct request *request);
/* The used length that the driver is told. */
static inline uint32_t blk_used(const struct request *request)
{
    return (uint32_t)request->chain.writable_length;
}
/* Check a request: S_OK means that there is something to do; else it is answered (status set). -1: a malformed chain. */
int blk_prepare(const struct disk *disk, struct request *request);
/* Loop thread, as the next. */
void blk_request_free(struct request *request);
/* Return a request to the driver unless its queue was reset; frees it. 0, or -1 with an exception. */
int blk_return(struct request *request);

/* blk_io.c; any thread */

static inline bool blk_abandoned(const struct disk *disk)
{
    return __atomic_load_n(&disk->abandoned, __ATOMIC_RELAXED);
}

static inline void blk_abandon(struct disk *disk, bool abandon)
{
    __atomic_store_n(&disk->abandoned, abandon, __ATOMIC_RELAXED);
}

void blk_run(struct disk *disk, struct request *job);
/* The outcome of a whole job. */
void blk_done(struct request *job, uint8_t status);
/* What the page cache answers at once; false: it would have blocked. With `patient` a write may wait for the page cache where
 * the file system has no RWF_NOWAIT for that. */
bool blk_try_now(struct disk *disk, struct request *job, bool patient);
unsigned blk_gather(const struct request *job, struct iovec *iov);

/* blk_threads.c; all calls from the loop's thread */

struct pool {
    struct disk *disk;
    int event; /* eventfd, readable when pool_done() has something */
    unsigned threads, started;
    pthread_t thread[THREADS_MAX];
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct jobs queue, done;
    unsigned running;
    bool stopping;
    bool poked; /* atomic: the event was signalled by another than our threads */
};

/* 0 or an errno. Threads start with the first job. */
int pool_open(struct pool *pool, struct disk *disk, unsigned threads);
/* Takes the jobs; false, and takes none, if no thread can be started. `one`: wake one thread for all of them. */
bool pool_submit(struct pool *pool, struct jobs *jobs, bool one);
struct jobs pool_done(struct pool *pool);
/* Have the loop come to pool_done(). Any thread. */
void pool_poke(struct pool *pool);
/* Drop what waits. Whether nothing runs. */
bool pool_cancel(struct pool *pool, struct jobs *dropped);
/* Wait for what runs and end the threads; call without the GIL. */
void pool_close(struct pool *pool);

/* blk_uring.c; one thread at a time */

struct blk_uring {
    struct uring ring;
    struct disk *disk;
    struct jobs waiting;
    unsigned in_flight; /* jobs that the kernel has */
    uint8_t flags;      /* of every entry */
    bool cancelling;
};

/* 0 or an errno; the ring has fd -1 then. */
int blk_uring_open(struct blk_uring *uring, struct disk *disk);
/* Takes the jobs; those that are not for an io_uring come back in `elsewhere`. */
void blk_uring_submit(struct blk_uring *uring, struct jobs *jobs, struct jobs *elsewhere);
/* What the kernel has completed; jobs that it cannot do come back in `elsewhere`. */
void blk_uring_done(struct blk_uring *uring, struct jobs *done, struct jobs *elsewhere);
/* Drop what waits and wait until nothing is in flight, or until `deadline` (CLOCK_MONOTONIC, ns). Whether nothing is. */
bool blk_uring_cancel(struct blk_uring *uring, int64_t deadline, struct jobs *dropped);
void blk_uring_close(struct blk_uring *uring);

/* blk_direct.c */

enum { BLK_LANES = 16 };

/* What is counted of requests that were returned to the driver. */
enum { BLK_READS, BLK_WRITES, BLK_FLUSHES, BLK_OTHERS, BLK_FAILED, BLK_COUNTERS };

struct blk_counts {
    uint32_t in_flight; /* requests between pop and push */
    uint64_t requests[BLK_COUNTERS], bytes[BLK_COUNTERS];
};

/* A request that was in flight is returned. */
void blk_count(struct blk_counts *counts, const struct request *request);

/* One queue as vCPUs' threads see it. */
struct blk_lane {
    struct answering_lane lane; /* first */
    RingObject *ring;       /* lent, a reference; NULL: vCPUs leave this queue to the loop */
    RingObject *owes;       /* what was pushed there the driver is not told of yet; no reference */
};

struct blk_direct {
    struct answering answering; /* first; its lock is of everything below, too */
    struct disk *disk;
    struct pool *pool;
    struct jobs undone, done; /* for the loop: to be carried out, to be returned */
    struct blk_counts counts;
    uint32_t quick;         /* requests in a row that the page cache did at once, or would have */
    uint32_t average;       /* bytes of a read or write */
    uint32_t writes, together; /* of a few requests, as 256ths: how many write; how many come at a time */
    uint32_t asked;         /* enum lv_asked, of all lanes */
    struct blk_lane lanes[BLK_LANES];
};

/* With the lock: a request was, or was not, one that a vCPU's thread can carry out quickly. */
void blk_direct_learn(struct blk_direct *direct, const struct request *request, bool quick);
/* The same of so many requests that came together; then it is decided when vCPUs' threads are asked. */
void blk_direct_turn(struct blk_direct *direct, uint32_t requests);

struct blk_direct *blk_direct_new(struct disk *disk, struct pool *pool); /* NULL: no memory */
/* Loop thread: vCPUs may answer what comes in this queue; with NULL no longer, though one may be at it still. The ring that was
 * lent, which the caller gives up when nothing runs any more and blk_direct_take() took what there was. */
RingObject *blk_direct_lend(struct blk_direct *direct, unsigned lane, RingObject *ring);
/* Loop thread: what is left for it; the requests have references to their rings. Whether nothing runs. */
bool blk_direct_take(struct blk_direct *direct, struct jobs *undone, struct jobs *done);

#endif
