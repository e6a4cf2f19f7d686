/* virtio._ring.BlockEngine: the virtio-blk request path (virtio 1.2, 5.2.6) over one file descriptor.
 *
 * drain() pops a batch, checks it, merges adjacent requests and answers at once what the page cache holds
 * (RWF_NOWAIT); the rest goes to a few native threads that own nothing but the system call. Their completions are
 * signalled by an eventfd and returned to the rings by reap(). So the loop never waits for a disk, and rings and status
 * bytes are touched by the loop's thread only. virtio/devices/blk.py is the same in Python, for backends without a
 * descriptor. Benchmark: tests/bench/bench_virtio.py.
 */
#include "module.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13,
    S_OK = 0, S_IOERR = 1, S_UNSUPP = 2,
    SECTOR = 512, HEADER = 16, ID_BYTES = 20, ZEROES_ENTRY = 16,
    ZEROES_ENTRIES = 32,          /* max_discard_seg, max_write_zeroes_seg */
    ZEROES_SECTORS = 0x200000,    /* max_discard_sectors, max_write_zeroes_sectors */
    THREADS_MAX = 8, IOV_LIMIT = 1024, BOUNCE = 1 << 20,
    INLINE_BYTES = 8 << 20,       /* answered in one drain() at most, so that the loop's turn is bounded */
    MORE = 1, SIGNAL = 2
};

struct zeroes {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct request {
    struct request *next;   /* in a queue of jobs */
    struct request *merged; /* the rest of this job: adjacent on disk, same type */
    struct request *last;   /* tail of `merged`, valid in the first */
    RingObject *ring;
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
    uint32_t iovs;
    struct iovec iov[];
};

typedef struct {
    PyObject_HEAD
    int fd, event;
    int overlay;       /* descriptor that takes the writes, or -1; `dirty` has one bit per sector that is there */
    Py_buffer dirty;
    uint64_t sectors;
    bool read_only, direct, nowait_read, nowait_write, writeback, discard, write_zeroes, stopping;
    char serial[ID_BYTES];
    unsigned threads, started;
    pthread_t thread[THREADS_MAX];
    pthread_mutex_t lock;
    pthread_cond_t work, idle;
    struct request *queue, *queue_tail, *done;
    unsigned queued, running;
    uint32_t in_flight; /* requests between pop and push; loop thread */
} BlockObject;

/* ---- in any thread: the system calls ---- */

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

/* O_DIRECT wants aligned memory; a guest need not: then the bytes take one more step. */
static uint8_t transfer_bounced(int fd, bool write, const struct iovec *iov, unsigned count, uint64_t offset,
                                uint64_t length, int flags)
{
    void *bounce;
    if (posix_memalign(&bounce, 4096, length < BOUNCE ? length : BOUNCE))
        return S_IOERR;
    uint8_t status = S_OK;
    for (uint64_t done = 0; done < length && status == S_OK; done += BOUNCE) {
        uint64_t part = length - done < BOUNCE ? length - done : BOUNCE;
        struct iovec one = {bounce, part};
        if (write)
            iov_copy(iov, count, done, bounce, part, true);
        status = transfer(fd, write, &one, 1, offset + done, part, flags);
        if (!write && status == S_OK)
            iov_copy(iov, count, done, bounce, part, false);
    }
    free(bounce);
    return status;
}

static bool is_dirty(const BlockObject *self, uint64_t sector)
{
    return __atomic_load_n((uint8_t *)self->dirty.buf + sector / 8, __ATOMIC_RELAXED) >> sector % 8 & 1;
}

/* How many of `sectors` from `sector` on stand where the first one does. */
static uint64_t dirty_run(const BlockObject *self, uint64_t sector, uint64_t sectors)
{
    uint64_t run = 1;
    bool first = is_dirty(self, sector);
    while (run < sectors && is_dirty(self, sector + run) == first)
        run++;
    return run;
}

static void set_dirty(BlockObject *self, uint64_t offset, uint64_t length)
{
    for (uint64_t sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++)
        __atomic_fetch_or((uint8_t *)self->dirty.buf + sector / 8, (uint8_t)(1u << sector % 8), __ATOMIC_RELEASE);
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
static uint8_t transfer_overlaid(BlockObject *self, bool write, struct iovec *iov, unsigned count, uint64_t offset,
                                 uint64_t length)
{
    if (write) {
        uint8_t status = transfer(self->overlay, true, iov, count, offset, length, 0);
        if (status == S_OK)
            set_dirty(self, offset, length);
        return status;
    }
    uint8_t status = S_OK;
    for (uint64_t done = 0; done < length && status == S_OK;) {
        struct iovec part[IOV_LIMIT];
        uint64_t sector = (offset + done) / SECTOR;
        uint64_t run = dirty_run(self, sector, (length - done) / SECTOR) * SECTOR;
        unsigned parts = iov_slice(iov, count, done, run, part);
        status = transfer(is_dirty(self, sector) ? self->overlay : self->fd, false, part, parts, offset + done, run, 0);
        done += run;
    }
    return status;
}

static uint8_t zero_range(int fd, uint64_t offset, uint64_t length)
{
    static const char zeroes[65536];
    if (!fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length))
        return S_OK;
    while (length) {
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

static uint8_t run_zeroes(BlockObject *self, struct request *request)
{
    uint8_t status = S_OK;
    for (uint32_t i = 0; i < request->zeroes_count && status == S_OK; i++) {
        uint64_t offset = request->zeroes[i].sector * SECTOR, length = (uint64_t)request->zeroes[i].sectors * SECTOR;
        bool unmap = request->type == T_DISCARD || request->zeroes[i].flags & 1;
        if (self->overlay >= 0) {
            if (length && request->type == T_WRITE_ZEROES) {
                if (!fallocate(self->overlay, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) ||
                    zero_range(self->overlay, offset, length) == S_OK)
                    set_dirty(self, offset, length);
                else
                    status = S_IOERR;
            }
            continue;
        }
        if (!length || (unmap && !fallocate(self->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                                            (off_t)length)))
            continue;
        if (request->type == T_WRITE_ZEROES) /* a discard that the file system cannot do is a hint not taken */
            status = zero_range(self->fd, offset, length);
    }
    if (request->dsync && status == S_OK && request->type == T_WRITE_ZEROES && fdatasync(self->fd))
        status = S_IOERR;
    return status;
}

static unsigned gather(struct request *job, struct iovec *iov)
{
    unsigned count = 0;
    for (struct request *request = job; request; request = request->merged) {
        memcpy(iov + count, request->iov, request->iovs * sizeof *iov);
        count += request->iovs;
    }
    return count;
}

static void run_job(BlockObject *self, struct request *job)
{
    uint8_t status;
    if (job->type == T_IN || job->type == T_OUT) {
        struct iovec iov[IOV_LIMIT];
        unsigned count = gather(job, iov);
        bool aligned = true;
        for (unsigned i = 0; i < count && self->direct; i++)
            aligned &= !(((uintptr_t)iov[i].iov_base | iov[i].iov_len) % SECTOR);
        int flags = job->dsync ? RWF_DSYNC : 0;
        status = self->overlay >= 0
                     ? transfer_overlaid(self, job->type == T_OUT, iov, count, job->offset, job->job_length)
                 : aligned ? transfer(self->fd, job->type == T_OUT, iov, count, job->offset, job->job_length, flags)
                         : transfer_bounced(self->fd, job->type == T_OUT, iov, count, job->offset, job->job_length, flags);
    } else if (job->type == T_FLUSH) {
        /* a snapshot ends with its machine: there is nothing to make durable */
        status = self->overlay < 0 && fdatasync(self->fd) ? S_IOERR : S_OK;
    } else {
        status = run_zeroes(self, job);
    }
    for (struct request *request = job; request; request = request->merged) {
        request->status = status;
        /* The used length covers the data, so that it is the device's even if the read failed. */
        for (uint32_t i = 0; request->type == T_IN && status != S_OK && i < request->iovs; i++)
            memset(request->iov[i].iov_base, 0, request->iov[i].iov_len);
    }
}

static void *worker(void *argument)
{
    BlockObject *self = argument;
    pthread_mutex_lock(&self->lock);
    for (;;) {
        while (!self->queue && !self->stopping)
            pthread_cond_wait(&self->work, &self->lock);
        if (self->stopping)
            break;
        unsigned take = 1 + self->queued / (2 * self->threads);
        struct request *jobs = self->queue, *tail = jobs;
        for (unsigned i = 1; i < take && tail->next; i++)
            tail = tail->next;
        self->queue = tail->next;
        if (!self->queue)
            self->queue_tail = NULL;
        tail->next = NULL;
        unsigned taken = 0;
        for (struct request *job = jobs; job; job = job->next)
            taken++;
        self->queued -= taken;
        self->running += taken;
        pthread_mutex_unlock(&self->lock);
        for (struct request *job = jobs; job; job = job->next)
            run_job(self, job);
        pthread_mutex_lock(&self->lock);
        bool first = !self->done;
        tail->next = self->done;
        self->done = jobs;
        self->running -= taken;
        if (!self->running)
            pthread_cond_broadcast(&self->idle);
        if (first)
            eventfd_write(self->event, 1);
    }
    pthread_mutex_unlock(&self->lock);
    return NULL;
}

/* ---- in the loop's thread ---- */

static void request_free(struct request *request)
{
    Py_XDECREF(request->ring);
    free(request->chain.segments);
    free(request->zeroes);
    free(request);
}

static void job_free(BlockObject *self, struct request *job)
{
    while (job) {
        struct request *next = job->merged;
        self->in_flight--;
        request_free(job);
        job = next;
    }
}

/* Return one request to the driver. 0, or -1 with an exception. */
static int finish(BlockObject *self, struct request *request)
{
    RingObject *ring = request->ring;
    int failed = 0;
    if (!ring->closed) {
        *request->status_at = request->status;
        uint64_t length = request->chain.writable_length;
        failed = segments_notify(ring->memory, request->chain.segments + request->chain.readable,
                                 request->chain.writable, length);
        ring_push(&ring->ring, request->chain.order, request->chain.id, request->chain.slots, (uint32_t)length);
    }
    self->in_flight--;
    request_free(request);
    return failed;
}

static int finish_job(BlockObject *self, struct request *job)
{
    int failed = 0;
    while (job) {
        struct request *next = job->merged;
        failed |= finish(self, job);
        job = next;
    }
    return failed;
}

static void copy_out(const struct chain *chain, uint64_t offset, void *to, uint64_t length)
{
    for (uint32_t i = 0; i < chain->readable && length; i++) {
        if (offset >= chain->segments[i].len) {
            offset -= chain->segments[i].len;
            continue;
        }
        uint64_t part = chain->segments[i].len - offset;
        if (part > length)
            part = length;
        memcpy(to, chain->segments[i].host + offset, part);
        to = (char *)to + part;
        length -= part;
        offset = 0;
    }
}

static void add_iovs(struct request *request, const struct segment *segments, uint32_t count, uint64_t skip, uint64_t length)
{
    for (uint32_t i = 0; i < count && length; i++) {
        if (skip >= segments[i].len) {
            skip -= segments[i].len;
            continue;
        }
        uint64_t part = segments[i].len - skip;
        if (part > length)
            part = length;
        request->iov[request->iovs++] = (struct iovec){segments[i].host + skip, part};
        length -= part;
        skip = 0;
    }
}

static uint8_t check_zeroes(BlockObject *self, struct request *request, uint64_t length)
{
    bool discard = request->type == T_DISCARD;
    if (!(discard ? self->discard : self->write_zeroes))
        return S_UNSUPP;
    if (self->read_only || !length || length % ZEROES_ENTRY || length / ZEROES_ENTRY > ZEROES_ENTRIES)
        return S_IOERR;
    request->zeroes_count = (uint32_t)(length / ZEROES_ENTRY);
    request->zeroes = malloc(length);
    if (!request->zeroes)
        return S_IOERR;
    copy_out(&request->chain, HEADER, request->zeroes, length);
    for (uint32_t i = 0; i < request->zeroes_count; i++) {
        struct zeroes *entry = &request->zeroes[i];
        /* 5.2.6.2: "the device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard, secure erase and write
         * zeroes commands if any unknown flag is set. Furthermore, the device MUST set the status byte to
         * VIRTIO_BLK_S_UNSUPP for discard commands if the unmap flag is set." */
        if (entry->flags & ~1u || (discard && entry->flags))
            return S_UNSUPP;
        if (entry->sectors > ZEROES_SECTORS || entry->sector > self->sectors ||
            entry->sectors > self->sectors - entry->sector)
            return S_IOERR;
    }
    return S_OK;
}

/* Check a request: S_OK means that a thread has to act; else it is answered (status set), -1: the chain is malformed. */
static int prepare(BlockObject *self, struct request *request)
{
    struct chain *chain = &request->chain;
    struct { uint32_t type, reserved; uint64_t sector; } header;
    /* 2.7.4.2 lets a driver lay the parts out as it likes; the header and the status byte must be there. */
    if (chain->readable_length < HEADER || !chain->writable_length)
        return -1;
    copy_out(chain, 0, &header, HEADER);
    struct segment *tail = &chain->segments[chain->readable + chain->writable - 1];
    request->status_at = tail->host + tail->len - 1;
    request->type = header.type;
    uint64_t in = chain->writable_length - 1, out = chain->readable_length - HEADER;
    struct segment *writable = chain->segments + chain->readable;
    request->dsync = !self->writeback;
    switch (header.type) {
    case T_IN:
    case T_OUT:
        request->length = header.type == T_IN ? in : out;
        /* 5.2.6.2: "A device MUST set the status byte to VIRTIO_BLK_S_IOERR for a write request if the VIRTIO_BLK_F_RO
         * feature if offered, and MUST NOT write any data." */
        if (header.type == T_OUT && self->read_only)
            return S_IOERR;
        if (!request->length || request->length % SECTOR || header.sector > self->sectors ||
            request->length / SECTOR > self->sectors - header.sector)
            return S_IOERR;
        request->offset = header.sector * SECTOR;
        if (header.type == T_IN)
            add_iovs(request, writable, chain->writable, 0, in);
        else
            add_iovs(request, chain->segments, chain->readable, HEADER, out);
        if (request->iovs > IOV_LIMIT)
            return S_IOERR;
        return S_OK;
    case T_FLUSH:
        return S_OK;
    case T_GET_ID: {
        if (in < ID_BYTES)
            return S_IOERR;
        add_iovs(request, writable, chain->writable, 0, ID_BYTES);
        const char *from = self->serial;
        for (uint32_t i = 0; i < request->iovs; from += request->iov[i++].iov_len)
            memcpy(request->iov[i].iov_base, from, request->iov[i].iov_len);
        request->type = T_GET_ID;
        return S_OK;
    }
    case T_DISCARD:
    case T_WRITE_ZEROES:
        return check_zeroes(self, request, out);
    default:
        return S_UNSUPP; /* 5.2.6: "UNSUPP for a request unsupported by device" */
    }
}

static bool start_threads(BlockObject *self)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (self->started < self->threads) {
        if (pthread_create(&self->thread[self->started], NULL, worker, self))
            break;
        self->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return self->started;
}

/* What the page cache answers at once; false: a thread has to do it. */
static bool try_now(BlockObject *self, struct request *job)
{
    bool write = job->type == T_OUT;
    if ((job->type != T_IN && !write) || self->direct || !(write ? self->nowait_write && !job->dsync : self->nowait_read))
        return false;
    int fd = self->fd;
    if (self->overlay >= 0) {
        uint64_t first = job->offset / SECTOR, sectors = job->job_length / SECTOR;
        if (write || dirty_run(self, first, sectors) != sectors)
            return false;
        if (is_dirty(self, first))
            fd = self->overlay;
    }
    struct iovec iov[IOV_LIMIT], *at = job->iov;
    unsigned count = job->iovs;
    if (job->merged) {
        count = gather(job, iov);
        at = iov;
    }
    ssize_t done = write ? pwritev2(fd, at, (int)count, (off_t)job->offset, RWF_NOWAIT)
                         : preadv2(fd, at, (int)count, (off_t)job->offset, RWF_NOWAIT);
    if (done < 0 && errno != EAGAIN && errno != EINTR) {
        if (write)
            self->nowait_write = false;
        else
            self->nowait_read = false;
    }
    return done >= 0 && (uint64_t)done == job->job_length;
}

static PyObject *block_drain(BlockObject *self, PyObject *args)
{
    RingObject *ring;
    int limit = 128;
    if (!PyArg_ParseTuple(args, "O!|i", &ring_type, &ring, &limit))
        return NULL;
    if (ring->closed) {
        PyErr_SetString(state_error, "the queue was reset");
        return NULL;
    }
    struct request *first = NULL, **end = &first, *last = NULL;
    uint64_t bytes = 0;
    int taken = 0, failed = 0, flags = 0;
    bool malformed = false;
    ring_disable_notification(&ring->ring);
    for (;;) {
        if (taken >= limit || bytes >= INLINE_BYTES) {
            flags |= MORE;
            break;
        }
        struct chain chain;
        int got = ring_pop(&ring->ring, &chain);
        if (got < 0) {
            malformed = true;
            break;
        }
        if (!got) {
            if (!ring_enable_notification(&ring->ring))
                break;
            continue;
        }
        taken++;
        uint32_t segments = chain.readable + chain.writable;
        struct request *request = calloc(1, sizeof *request + (segments + 1) * sizeof *request->iov);
        struct segment *copy = malloc((segments + 1) * sizeof *copy);
        if (!request || !copy) {
            free(request);
            free(copy);
            PyErr_NoMemory();
            failed = 1;
            break;
        }
        memcpy(copy, chain.segments, segments * sizeof *copy);
        request->chain = chain;
        request->chain.segments = copy;
        request->ring = (RingObject *)Py_NewRef((PyObject *)ring);
        self->in_flight++;
        int status = prepare(self, request);
        if (status < 0) {
            self->in_flight--;
            request_free(request);
            ring->ring.error = "block request without header or status";
            malformed = true;
            break;
        }
        if (status != S_OK || request->type == T_GET_ID) {
            request->status = (uint8_t)status;
            failed |= finish(self, request);
            continue;
        }
        bytes += request->length;
        if (last && last->type == request->type && (request->type == T_IN || request->type == T_OUT) &&
            last->offset + last->job_length == request->offset && last->job_iovs + request->iovs <= IOV_LIMIT) {
            last->last->merged = request;
            last->last = request;
            last->job_length += request->length;
            last->job_iovs += request->iovs;
            continue;
        }
        request->last = request;
        request->job_length = request->length;
        request->job_iovs = request->iovs;
        *end = last = request;
        end = &request->next;
    }
    /* What cannot be answered now is handed over before the rest is copied, so that the threads work meanwhile. */
    struct request *later = NULL, **later_end = &later, *later_tail = NULL;
    unsigned count = 0;
    while (first) {
        struct request *job = first;
        first = job->next;
        job->next = NULL;
        if (try_now(self, job)) {
            failed |= finish_job(self, job);
        } else {
            *later_end = later_tail = job;
            later_end = &job->next;
            count++;
        }
    }
    if (later && !start_threads(self)) {
        for (struct request *next; later; later = next) {
            next = later->next;
            run_job(self, later);
            failed |= finish_job(self, later);
        }
    } else if (later) {
        pthread_mutex_lock(&self->lock);
        if (self->queue_tail)
            self->queue_tail->next = later;
        else
            self->queue = later;
        self->queue_tail = later_tail;
        self->queued += count;
        if (count > 1)
            pthread_cond_broadcast(&self->work);
        else
            pthread_cond_signal(&self->work);
        pthread_mutex_unlock(&self->lock);
    }
    if (failed || ring_notify_area(ring))
        return NULL;
    if (malformed)
        return ring_raise(ring);
    if (ring_needs_notification(&ring->ring))
        flags |= SIGNAL;
    return PyLong_FromLong(flags);
}

static PyObject *block_reap(BlockObject *self, PyObject *Py_UNUSED(unused))
{
    eventfd_t count;
    eventfd_read(self->event, &count);
    pthread_mutex_lock(&self->lock);
    struct request *jobs = self->done;
    self->done = NULL;
    pthread_mutex_unlock(&self->lock);
    /* the list is last first; oldest completions are returned first */
    struct request *ordered = NULL;
    while (jobs) {
        struct request *next = jobs->next;
        jobs->next = ordered;
        ordered = jobs;
        jobs = next;
    }
    PyObject *rings = PyList_New(0);
    bool failed = !rings;
    while (ordered) {
        struct request *job = ordered;
        ordered = job->next;
        RingObject *ring = (RingObject *)Py_NewRef((PyObject *)job->ring);
        failed |= !!finish_job(self, job);
        int known = failed || ring->closed ? 1 : PySequence_Contains(rings, (PyObject *)ring);
        if (known < 0 || (!known && PyList_Append(rings, (PyObject *)ring)))
            failed = true;
        Py_DECREF(ring);
    }
    for (Py_ssize_t i = failed ? -1 : PyList_GET_SIZE(rings) - 1; i >= 0; i--) {
        RingObject *ring = (RingObject *)PyList_GET_ITEM(rings, i);
        if (ring_notify_area(ring)) {
            failed = true;
            break;
        }
        if (!ring_needs_notification(&ring->ring) && PyList_SetSlice(rings, i, i + 1, NULL)) {
            failed = true;
            break;
        }
    }
    if (failed)
        Py_CLEAR(rings);
    return rings;
}

static void drop(BlockObject *self, struct request *jobs)
{
    while (jobs) {
        struct request *next = jobs->next;
        job_free(self, jobs);
        jobs = next;
    }
}

static bool cancel(BlockObject *self, long timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&self->lock);
    struct request *dropped = self->queue;
    self->queue = self->queue_tail = NULL;
    self->queued = 0;
    int error = 0;
    while (self->running && error != ETIMEDOUT)
        error = pthread_cond_timedwait(&self->idle, &self->lock, &until);
    bool idle = !self->running;
    struct request *done = self->done;
    self->done = NULL;
    pthread_mutex_unlock(&self->lock);
    drop(self, dropped);
    drop(self, done);
    return idle;
}

static PyObject *block_cancel(BlockObject *self, PyObject *timeout_ms)
{
    long timeout = PyLong_AsLong(timeout_ms);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(cancel(self, timeout));
}

static PyObject *block_close(BlockObject *self, PyObject *Py_UNUSED(unused))
{
    pthread_mutex_lock(&self->lock);
    self->stopping = true;
    pthread_cond_broadcast(&self->work);
    pthread_mutex_unlock(&self->lock);
    Py_BEGIN_ALLOW_THREADS
    for (unsigned i = 0; i < self->started; i++)
        pthread_join(self->thread[i], NULL);
    Py_END_ALLOW_THREADS
    self->started = 0;
    self->threads = 0;
    cancel(self, 0);
    if (self->event >= 0)
        close(self->event);
    self->event = -1;
    Py_RETURN_NONE;
}

static PyObject *block_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "sectors", "read_only", "direct", "threads", "serial", "overlay", "dirty", NULL};
    int fd, read_only = 0, direct = 0, overlay = -1;
    PyObject *dirty = Py_None;
    unsigned threads = 2;
    unsigned long long sectors;
    const char *serial = "";
    Py_ssize_t serial_length = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iK|ppIy#iO", names, &fd, &sectors, &read_only, &direct,
                                     &threads, &serial, &serial_length, &overlay, &dirty))
        return NULL;
    BlockObject *self = (BlockObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->work, &monotonic);
    pthread_cond_init(&self->idle, &monotonic);
    pthread_condattr_destroy(&monotonic);
    self->fd = fd;
    self->overlay = overlay;
    self->event = -1;
    self->sectors = sectors;
    if (overlay >= 0) {
        if (PyObject_GetBuffer(dirty, &self->dirty, PyBUF_WRITABLE)) {
            Py_DECREF(self);
            return NULL;
        }
        if ((uint64_t)self->dirty.len * 8 < sectors) {
            PyErr_SetString(PyExc_ValueError, "dirty has fewer bits than there are sectors");
            Py_DECREF(self);
            return NULL;
        }
    }
    self->read_only = read_only;
    self->direct = direct;
    self->threads = threads < 1 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads;
    self->nowait_read = self->nowait_write = true;
    self->writeback = true;
    memcpy(self->serial, serial, (size_t)(serial_length < ID_BYTES ? serial_length : ID_BYTES));
    self->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (self->event < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void block_dealloc(BlockObject *self)
{
    Py_XDECREF(block_close(self, NULL));
    pthread_mutex_destroy(&self->lock);
    pthread_cond_destroy(&self->work);
    pthread_cond_destroy(&self->idle);
    if (self->dirty.obj)
        PyBuffer_Release(&self->dirty);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *block_fileno(BlockObject *self, PyObject *Py_UNUSED(unused))
{
    return PyLong_FromLong(self->event);
}

static PyObject *block_configure(BlockObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sectors", "writeback", "discard", "write_zeroes", NULL};
    unsigned long long sectors;
    int writeback, discard, write_zeroes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Kppp", names, &sectors, &writeback, &discard, &write_zeroes))
        return NULL;
    if (self->overlay >= 0 && (uint64_t)self->dirty.len * 8 < sectors) {
        PyErr_SetString(PyExc_ValueError, "dirty has fewer bits than there are sectors");
        return NULL;
    }
    self->sectors = sectors;
    self->writeback = writeback;
    self->discard = discard;
    self->write_zeroes = write_zeroes;
    Py_RETURN_NONE;
}

static PyObject *block_in_flight(BlockObject *self, void *Py_UNUSED(unused))
{
    return PyLong_FromUnsignedLong(self->in_flight);
}

static PyMethodDef block_methods[] = {
    {"drain", (PyCFunction)block_drain, METH_VARARGS,
     "drain(ring, limit=128) -> flags: 1 more is waiting (call again), 2 the driver wants a notification."},
    {"reap", (PyCFunction)block_reap, METH_NOARGS, "Return what the threads completed; rings that want a notification."},
    {"cancel", (PyCFunction)block_cancel, METH_O,
     "cancel(timeout_ms) -> whether no thread touches guest memory any more; drops every request."},
    {"configure", (PyCFunction)(void (*)(void))block_configure, METH_VARARGS | METH_KEYWORDS,
     "configure(sectors, writeback, discard, write_zeroes)"},
    {"close", (PyCFunction)block_close, METH_NOARGS, "Stop the threads; waits for system calls that run."},
    {"fileno", (PyCFunction)block_fileno, METH_NOARGS, "Readable when reap() has something."},
    {0},
};

static PyGetSetDef block_getset[] = {
    {"in_flight", (getter)block_in_flight, NULL, "requests popped and not returned", NULL},
    {0},
};

PyTypeObject block_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.BlockEngine",
    .tp_doc = "BlockEngine(fd, sectors, read_only=False, direct=False, threads=2, serial=b'', overlay=-1, dirty=None)",
    .tp_basicsize = sizeof(BlockObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = block_new,
    .tp_dealloc = (destructor)block_dealloc,
    .tp_methods = block_methods,
    .tp_getset = block_getset,
};
