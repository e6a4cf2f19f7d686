/* virtio._ring.BlockEngine: the virtio-blk request path (virtio 1.2, 5.2.6) over one image.
 *
 * drain() pops a batch, checks it, merges adjacent requests and answers at once what the page cache holds
 * (RWF_NOWAIT); the rest goes to an io_uring or to native threads. What they have done reap() returns to the rings. So
 * the loop never waits for a disk. virtio/devices/blk.py is the same in Python, for backends without a descriptor.
 * Benchmark: tests/bench/bench_virtio.py.
 */
#include "blk.h"
#include "blk_gate.h"
#include "clock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    MORE = 1, SIGNAL = 2, GATED = 4
};

typedef struct {
    PyObject_HEAD
    struct disk disk;
    ImageObject *image;
    struct pool pool;
    struct blk_uring uring; /* not open: everything goes to the threads */
    bool by_kind;           /* with an io_uring: threads do what they do better */
    struct gate gate;       /* of what is limited */
    struct blk_direct *direct;
    PyObject *leaving;      /* a list: rings that are not lent any more, while a vCPU's thread may still be at one */
    bool closed;
    Py_buffer track;        /* one bit for each granule of the disk that was written; none: obj is NULL */
    unsigned track_shift;
} BlockObject;

static void mark_range(BlockObject *self, uint64_t offset, uint64_t length)
{
    if (!length)
        return;
    uint8_t *bits = self->track.buf;
    uint64_t last = (offset + length - 1) >> self->track_shift, end = (uint64_t)self->track.len * 8;
    for (uint64_t at = offset >> self->track_shift; at <= last && at < end; at++)
        bits[at / 8] |= (uint8_t)(1u << at % 8);
}

/* Enter what a request wrote, or may have, where writes are tracked: once it is over, so that whoever clears a bit and
 * reads then sees what was written, or finds the bit set again. */
static void mark(BlockObject *self, const struct request *request)
{
    if (!self->track.obj)
        return;
    if (request->type == T_OUT)
        mark_range(self, request->offset, request->length);
    else if (request->type == T_DISCARD || request->type == T_WRITE_ZEROES)
        for (uint32_t i = 0; request->zeroes && i < request->zeroes_count; i++)
            mark_range(self, request->zeroes[i].sector * SECTOR, (uint64_t)request->zeroes[i].sectors * SECTOR);
}

/* Rings are touched in here alone. Recursive. */
static void enter(BlockObject *self)
{
    pthread_mutex_lock(&self->direct->answering.lock);
}

static void leave(BlockObject *self)
{
    pthread_mutex_unlock(&self->direct->answering.lock);
}

static void job_free(BlockObject *self, struct request *job)
{
    while (job) {
        struct request *next = job->merged;
        self->direct->counts.in_flight--;
        mark(self, job);
        blk_request_free(job);
        job = next;
    }
}

static int job_return(BlockObject *self, struct request *job)
{
    int failed = 0;
    while (job) {
        struct request *next = job->merged;
        mark(self, job);
        blk_count(&self->direct->counts, job);
        failed |= blk_return(job);
        job = next;
    }
    return failed;
}

/* Make `request` a part of the job before it if both are one piece of the disk, or are flushes. */
static bool merge(struct request *job, struct request *request)
{
    if (!job || job->type != request->type)
        return false;
    if (job->type != T_FLUSH) {
        if ((job->type != T_IN && job->type != T_OUT) || job->offset + job->job_length != request->offset ||
            job->job_iovs + request->iovs > IOV_LIMIT)
            return false;
        job->job_length += request->length;
        job->job_iovs += request->iovs;
    }
    job->last->merged = request;
    job->last = request;
    return true;
}

/* job_return(); with `rings`, the job's are remembered there. */
static int job_finish(BlockObject *self, struct request *job, PyObject *rings)
{
    int failed = 0;
    for (const struct request *part = rings ? job : NULL; part; part = part->merged)
        failed |= rings_add(rings, part->ring);
    return job_return(self, job) | failed;
}

/* A write into the page cache of a file system that has no RWF_NOWAIT for it. An io_uring gives such writes to a thread of
 * the kernel's, one after the other, and wakes the loop for each; ours take several and wake it once (bench_guest_io). */
static bool is_cached_write(const struct disk *disk, const struct request *job)
{
    return job->type == T_OUT && !job->dsync && __atomic_load_n(&disk->writes_wait, __ATOMIC_RELAXED);
}

/* Give jobs to the threads; with `one` a single thread begins with them. Does them itself if there can be no threads. */
static int begin_on_threads(BlockObject *self, struct jobs *jobs, bool one, PyObject *rings)
{
    int failed = 0;
    if (jobs->count && !pool_submit(&self->pool, jobs, one)) {
        for (struct request *job; (job = jobs_take(jobs));) {
            blk_run(&self->disk, job);
            failed |= job_finish(self, job, rings);
        }
    }
    return failed;
}

/* Begin what may block. Returns 0, or -1 with an exception. */
static int begin(BlockObject *self, struct jobs *jobs, PyObject *rings)
{
    struct jobs threads = {0}, cached = {0}, uring = {0};
    if (self->uring.ring.fd < 0)
        jobs_join(&threads, jobs);
    for (struct request *job; (job = jobs_take(jobs));)
        jobs_add(self->by_kind && is_cached_write(&self->disk, job) ? &cached : &uring, job);
    if (uring.count)
        blk_uring_submit(&self->uring, &uring, &threads);
    /* The file's lock lets one of them write at a time. */
    return begin_on_threads(self, &cached, true, rings) | begin_on_threads(self, &threads, false, rings);
}

/* A request of its own from what was popped; NULL with an exception. */
static struct request *request_new(RingObject *ring, const struct chain *chain)
{
    struct request *request = blk_request_new(chain);
    if (request)
        request->ring = (RingObject *)Py_NewRef((PyObject *)ring);
    else
        PyErr_NoMemory();
    return request;
}

/* A request that may pass joins the job before it, or is one of its own. */
static void add_request(struct jobs *jobs, struct request *request)
{
    if (merge(jobs->last, request))
        return;
    blk_request_alone(request);
    jobs_add(jobs, request);
}

/* Add what may pass the gate to `jobs`, as much as belongs into a turn of the loop. Whether more might pass. */
static bool pass_gate(BlockObject *self, struct jobs *jobs, int64_t now, bool open)
{
    uint64_t bytes = 0;
    for (int taken = 0; self->gate.waiting; taken++) {
        if (taken >= TURN_REQUESTS || bytes >= TURN_BYTES)
            return true;
        struct request *request = gate_take(&self->gate, now, open);
        if (!request)
            return false;
        bytes += request->length;
        add_request(jobs, request);
    }
    return false;
}

/* Do in this turn what needs no waiting, begin the rest. With `rings`, those of what is done are added. 0, or -1 with an
 * exception. */
static int execute(BlockObject *self, struct jobs *jobs, PyObject *rings)
{
    struct jobs later = {0};
    int failed = 0;
    for (struct request *job; (job = jobs_take(jobs));) {
        bool done = blk_try_now(&self->disk, job, false);
        for (const struct request *part = job; part; part = part->merged)
            blk_direct_learn(self->direct, part, done || is_cached_write(&self->disk, job));
        if (done)
            failed |= job_finish(self, job, rings);
        else
            jobs_add(&later, job);
    }
    if (later.count)
        failed |= begin(self, &later, rings);
    return failed;
}

static PyObject *drain(BlockObject *self, RingObject *ring, int limit)
{
    struct jobs jobs = {0};
    uint64_t bytes = 0;
    int taken = 0, failed = 0, flags = 0;
    bool malformed = false, gated = gate_closed(&self->gate);
    ring_disable_notification(&ring->ring);
    for (;;) {
        if (taken >= limit || bytes >= TURN_BYTES) {
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
        struct request *request = request_new(ring, &chain);
        if (!request) {
            failed = 1;
            break;
        }
        int status = blk_prepare(&self->disk, request);
        if (status < 0) {
            blk_request_free(request);
            ring->ring.error = "block request without header or status";
            malformed = true;
            break;
        }
        self->direct->counts.in_flight++;
        if (status != S_OK || request->type == T_GET_ID) {
            request->status = (uint8_t)status;
            failed |= job_return(self, request);
            continue;
        }
        bytes += request->length;
        if (!gated) {
            add_request(&jobs, request);
        } else if (!gate_add(&self->gate, request)) {
            job_free(self, request);
            PyErr_NoMemory();
            failed = 1;
            break;
        }
    }
    failed |= execute(self, &jobs, NULL);
    blk_direct_turn(self->direct, (uint32_t)taken);
    if (failed || ring_notify_area(ring))
        return NULL;
    if (malformed)
        return ring_raise(ring);
    if (ring_needs_notification(&ring->ring))
        flags |= SIGNAL;
    if (self->gate.waiting)
        flags |= GATED;
    return PyLong_FromLong(flags);
}

static PyObject *block_drain(BlockObject *self, PyObject *args)
{
    RingObject *ring;
    int limit = TURN_REQUESTS;
    if (!PyArg_ParseTuple(args, "O!|i", &ring_type, &ring, &limit))
        return NULL;
    if (ring->closed || self->closed) {
        PyErr_SetString(state_error, self->closed ? "the engine is closed" : "the queue was reset");
        return NULL;
    }
    enter(self);
    PyObject *flags = drain(self, ring, limit);
    leave(self);
    return flags;
}

static PyObject *release(BlockObject *self, int64_t now, bool open)
{
    PyObject *rings = PyList_New(0);
    if (!rings)
        return NULL;
    struct jobs jobs = {0};
    bool more = pass_gate(self, &jobs, now, open);
    if (execute(self, &jobs, rings)) {
        Py_DECREF(rings);
        return NULL;
    }
    rings = rings_to_notify(rings);
    int64_t wait = more ? 0 : gate_wait(&self->gate, now);
    return rings ? Py_BuildValue("(NL)", rings, (long long)wait) : NULL;
}

static PyObject *block_release(BlockObject *self, PyObject *args)
{
    long long now;
    int open = 0;
    if (!PyArg_ParseTuple(args, "L|p", &now, &open))
        return NULL;
    enter(self);
    PyObject *result = release(self, now, open);
    leave(self);
    return result;
}

static PyObject *block_limit(BlockObject *self, PyObject *limits)
{
    return limits_replace(&self->gate.limits, limits) ? NULL : Py_NewRef(Py_None);
}

/* What vCPUs' threads have left for the loop. Whether none is at it any more. */
static bool take_direct(BlockObject *self, struct jobs *undone, struct jobs *done)
{
    bool idle = blk_direct_take(self->direct, undone, done);
    if (idle && PyList_GET_SIZE(self->leaving))
        (void)PyList_SetSlice(self->leaving, 0, PyList_GET_SIZE(self->leaving), NULL); /* with NULL it cannot fail */
    return idle;
}

/* The rings whose interrupts vCPUs' threads did not send. 0, or -1 with an exception. */
static int add_owed(BlockObject *self, PyObject *rings)
{
    int failed = 0;
    for (unsigned i = 0; i < BLK_LANES; i++) {
        struct blk_lane *lane = &self->direct->lanes[i];
        if (lane->owes)
            failed |= rings_add(rings, lane->owes);
        lane->owes = NULL;
    }
    return failed;
}

static PyObject *reap(BlockObject *self)
{
    struct jobs done = pool_done(&self->pool), elsewhere = {0}, undone, finished, again = {0};
    PyObject *rings = PyList_New(0);
    bool failed = !rings || add_owed(self, rings);
    take_direct(self, &undone, &finished);
    jobs_join(&done, &finished);
    if (self->uring.ring.fd >= 0) {
        blk_uring_done(&self->uring, &done, &elsewhere);
        if (elsewhere.count && !pool_submit(&self->pool, &elsewhere, false)) {
            for (struct request *job = elsewhere.first; job; job = job->next)
                blk_run(&self->disk, job);
            jobs_join(&done, &elsewhere);
        }
    }
    for (struct request *job; (job = jobs_take(&undone));)
        add_request(&again, job);
    if (again.count)
        failed |= !!execute(self, &again, failed ? NULL : rings);
    for (struct request *job; (job = jobs_take(&done));)
        failed |= !!job_finish(self, job, failed ? NULL : rings);
    if (failed)
        Py_CLEAR(rings);
    return rings ? rings_to_notify(rings) : NULL;
}

static PyObject *block_reap(BlockObject *self, PyObject *Py_UNUSED(unused))
{
    enter(self);
    PyObject *rings = reap(self);
    leave(self);
    return rings;
}

/* Drop every request that the kernel does not have, and ask it to end the others, without waiting. Whether none is
 * left. */
static bool cancel(BlockObject *self)
{
    struct jobs dropped = {0}, undone, done;
    blk_abandon(&self->disk, true);
    gate_empty(&self->gate, &dropped);
    bool idle = take_direct(self, &undone, &done);
    jobs_join(&dropped, &undone);
    jobs_join(&dropped, &done);
    Py_BEGIN_ALLOW_THREADS
    idle &= blk_uring_cancel(&self->uring, 0, &dropped);
    idle &= pool_cancel(&self->pool, &dropped);
    Py_END_ALLOW_THREADS
    enter(self);
    for (struct request *job; (job = jobs_take(&dropped));)
        job_free(self, job);
    leave(self);
    blk_abandon(&self->disk, !idle);
    return idle;
}

static PyObject *block_cancel(BlockObject *self, PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(cancel(self));
}

/* vCPUs' threads may carry out what comes in this queue, or, with NULL, no longer. 0, or -1 with an exception. */
static int lend(BlockObject *self, unsigned number, RingObject *ring)
{
    if (self->closed)
        ring = NULL;
    RingObject *before = blk_direct_lend(self->direct, number, (RingObject *)Py_XNewRef((PyObject *)ring));
    int failed = before && before != ring ? PyList_Append(self->leaving, (PyObject *)before) : 0;
    if (!failed)
        Py_XDECREF(before); /* else a vCPU's thread may be at it: it stays for good */
    return failed;
}

static PyObject *block_close(BlockObject *self, PyObject *Py_UNUSED(unused))
{
    if (!self->closed) {
        for (unsigned i = 0; i < BLK_LANES; i++)
            if (lend(self, i, NULL))
                return NULL;
        self->closed = true;
        blk_abandon(&self->disk, true);
        struct jobs dropped = {0};
        Py_BEGIN_ALLOW_THREADS
        answering_wait(&self->direct->answering);
        while (!blk_uring_cancel(&self->uring, clock_now() + 1000000000, &dropped))
            ;
        blk_uring_close(&self->uring);
        pool_close(&self->pool);
        Py_END_ALLOW_THREADS
        enter(self);
        for (struct request *job; (job = jobs_take(&dropped));)
            job_free(self, job);
        leave(self);
        cancel(self);
    }
    Py_RETURN_NONE;
}

static void block_dealloc(BlockObject *self)
{
    if (self->direct && self->leaving)
        Py_XDECREF(block_close(self, NULL));
    if (self->direct)
        answering_put(&self->direct->answering);
    Py_XDECREF(self->leaving);
    pthread_mutex_destroy(&self->pool.lock);
    pthread_cond_destroy(&self->pool.work);
    Py_XDECREF(self->gate.limits);
    Py_XDECREF(self->image);
    if (self->track.obj)
        PyBuffer_Release(&self->track);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *block_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image", "sectors", "read_only", "threads", "serial", "engine", "inline", NULL};
    int read_only = 0, immediate = 1;
    ImageObject *image;
    unsigned threads = 2;
    unsigned long long sectors;
    const char *serial = "", *engine = "auto";
    Py_ssize_t serial_length = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!K|pIy#sp", names, &image_type, &image, &sectors, &read_only,
                                     &threads, &serial, &serial_length, &engine, &immediate))
        return NULL;
    bool wants_uring = !strcmp(engine, "io_uring");
    if (!wants_uring && strcmp(engine, "auto") && strcmp(engine, "threads"))
        return PyErr_Format(PyExc_ValueError, "engine is auto, io_uring or threads, not %s", engine);
    if (!image_holds(image, sectors * SECTOR))
        return NULL;
    BlockObject *self = (BlockObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->image = (ImageObject *)Py_NewRef((PyObject *)image);
    self->disk = (struct disk){.image = image->image, .sectors = sectors, .read_only = read_only, .writeback = true,
                               .nowait_read = immediate, .nowait_write = immediate};
    memcpy(self->disk.serial, serial, (size_t)(serial_length < ID_BYTES ? serial_length : ID_BYTES));
    self->uring.ring.fd = -1;
    self->by_kind = !wants_uring;
    int error = pool_open(&self->pool, &self->disk, threads);
    self->leaving = PyList_New(0);
    self->direct = blk_direct_new(&self->disk, &self->pool);
    if (!self->leaving || !self->direct) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    if (!error && strcmp(engine, "threads")) {
        int refused = blk_uring_open(&self->uring, &self->disk);
        error = wants_uring ? refused : 0;
    }
    if (error) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

/* Readable when reap() has something: the threads' eventfd, and the ring. */
static PyObject *block_descriptors(BlockObject *self, PyObject *Py_UNUSED(unused))
{
    return self->uring.ring.fd < 0 ? Py_BuildValue("(i)", self->pool.event)
                                   : Py_BuildValue("(ii)", self->pool.event, self->uring.ring.fd);
}

static PyObject *block_configure(BlockObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sectors", "writeback", "discard", "write_zeroes", NULL};
    unsigned long long sectors;
    int writeback, discard, write_zeroes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Kppp", names, &sectors, &writeback, &discard, &write_zeroes) ||
        !image_holds(self->image, sectors * SECTOR))
        return NULL;
    enter(self);
    self->disk.sectors = sectors;
    self->disk.writeback = writeback;
    self->disk.discard = discard;
    self->disk.write_zeroes = write_zeroes;
    leave(self);
    Py_RETURN_NONE;
}

static PyObject *block_set_image(BlockObject *self, PyObject *args)
{
    ImageObject *image;
    unsigned long long sectors;
    if (!PyArg_ParseTuple(args, "O!K", &image_type, &image, &sectors) || !image_holds(image, sectors * SECTOR))
        return NULL;
    enter(self);
    bool busy = self->direct->counts.in_flight;
    leave(self);
    if (busy || self->closed) {
        PyErr_SetString(state_error, self->closed ? "the engine is closed" : "requests are in flight");
        return NULL;
    }
    /* No job is with the threads either: what they have done is reaped. */
    Py_SETREF(self->image, (ImageObject *)Py_NewRef((PyObject *)image));
    self->disk.image = image->image;
    self->disk.sectors = sectors;
    Py_RETURN_NONE;
}

static PyObject *block_track(BlockObject *self, PyObject *args)
{
    PyObject *bits;
    unsigned shift = 0;
    if (!PyArg_ParseTuple(args, "O|I", &bits, &shift))
        return NULL;
    Py_buffer track = {0};
    if (bits != Py_None && PyObject_GetBuffer(bits, &track, PyBUF_WRITABLE))
        return NULL;
    if (shift > 40) {
        PyBuffer_Release(&track);
        PyErr_SetString(PyExc_ValueError, "the granule is out of range");
        return NULL;
    }
    if (self->track.obj)
        PyBuffer_Release(&self->track);
    self->track = track;
    self->track_shift = shift;
    Py_RETURN_NONE;
}

static PyObject *block_answerer(BlockObject *self, PyObject *args)
{
    unsigned number;
    if (!PyArg_ParseTuple(args, "I", &number) || !lane_number(number, BLK_LANES))
        return NULL;
    return lane_capsule(&self->direct->lanes[number].lane);
}

static PyObject *block_lend(BlockObject *self, PyObject *args)
{
    unsigned number;
    RingObject *ring;
    if (!PyArg_ParseTuple(args, "IO&", &number, lane_ring, &ring) || !lane_number(number, BLK_LANES))
        return NULL;
    return lend(self, number, ring) ? NULL : Py_NewRef(Py_None);
}

static PyObject *block_message(BlockObject *self, PyObject *args)
{
    unsigned number;
    PyObject *message;
    if (!PyArg_ParseTuple(args, "IO", &number, &message) || !lane_number(number, BLK_LANES))
        return NULL;
    return lane_set_message(&self->direct->lanes[number].lane, message);
}

static PyObject *block_io_uring_error(PyObject *Py_UNUSED(type), PyObject *Py_UNUSED(unused))
{
    struct uring ring;
    int error = uring_open(&ring, 1);
    if (!error)
        uring_close(&ring);
    return PyLong_FromLong(error);
}

static PyObject *block_in_flight(BlockObject *self, void *Py_UNUSED(unused))
{
    enter(self);
    uint32_t in_flight = self->direct->counts.in_flight;
    leave(self);
    return PyLong_FromUnsignedLong(in_flight);
}

static PyObject *block_waiting(BlockObject *self, void *Py_UNUSED(unused))
{
    return PyLong_FromUnsignedLong(self->gate.waiting);
}

static PyObject *block_engine(BlockObject *self, void *Py_UNUSED(unused))
{
    return PyUnicode_FromString(self->uring.ring.fd < 0 ? "threads" : "io_uring");
}

static PyObject *block_counters(BlockObject *self, void *Py_UNUSED(unused))
{
    enter(self);
    struct blk_counts counts = self->direct->counts;
    leave(self);
    return Py_BuildValue("(KKKKKK)", counts.requests[BLK_READS], counts.bytes[BLK_READS], counts.requests[BLK_WRITES],
                         counts.bytes[BLK_WRITES], counts.requests[BLK_FLUSHES], counts.requests[BLK_FAILED]);
}

static PyMethodDef block_methods[] = {
    {"drain", (PyCFunction)block_drain, METH_VARARGS,
     "drain(ring, limit=128) -> flags: 1 more is waiting (call again), 2 the driver wants a notification, 4 requests wait\n"
     "for tokens (call release)."},
    {"release", (PyCFunction)block_release, METH_VARARGS,
     "release(now, open=False) -> (rings that want a notification, ns until the next call, -1: nothing waits). Go on with\n"
     "what tokens suffice for at `now`, or with `open` with everything: tokens are owed then."},
    {"limit", (PyCFunction)block_limit, METH_O, "limit(limits): what requests need tokens of, or None."},
    {"reap", (PyCFunction)block_reap, METH_NOARGS, "Return what is completed; rings that want a notification."},
    {"cancel", (PyCFunction)block_cancel, METH_NOARGS,
     "cancel() -> whether nothing touches guest memory any more; drops every request, waits for none."},
    {"configure", (PyCFunction)(void (*)(void))block_configure, METH_VARARGS | METH_KEYWORDS,
     "configure(sectors, writeback, discard, write_zeroes)"},
    {"set_image", (PyCFunction)block_set_image, METH_VARARGS,
     "set_image(image, sectors): use another one; StateError while requests are in flight."},
    {"track", (PyCFunction)block_track, METH_VARARGS,
     "track(bits, shift=0): set bit n of `bits`, lowest first, when a request that may have written byte n << shift is over; "
     "None: no more"},
    {"close", (PyCFunction)block_close, METH_NOARGS, "Wait for system calls that run, drop the rest, stop."},
    {"answerer", (PyCFunction)block_answerer, METH_VARARGS,
     "answerer(queue) -> a capsule (answerer.h) for that queue's doorbell; it answers while the queue is lent and has a message."},
    {"lend", (PyCFunction)block_lend, METH_VARARGS,
     "lend(queue, ring): vCPUs' threads may carry out what comes in it; None: no longer, and reap() has what they leave."},
    {"message", (PyCFunction)block_message, METH_VARARGS,
     "message(queue, (address, data)): what its interrupt is now; None: only the loop can send it."},
    {"descriptors", (PyCFunction)block_descriptors, METH_NOARGS, "One of them is readable when reap() has something."},
    {"io_uring_error", block_io_uring_error, METH_NOARGS | METH_STATIC, "Why there is no io_uring here, an errno; 0: there is."},
    {0},
};

static PyGetSetDef block_getset[] = {
    {"counters", (getter)block_counters, NULL,
     "requests answered so far: (reads, bytes read, writes, bytes written, flushes, failures)", NULL},
    {"in_flight", (getter)block_in_flight, NULL, "requests popped and not returned", NULL},
    {"waiting", (getter)block_waiting, NULL, "those of them that wait for tokens", NULL},
    {"engine", (getter)block_engine, NULL, "what does the jobs that may block: io_uring or threads", NULL},
    {0},
};

PyTypeObject block_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.BlockEngine",
    .tp_doc = "BlockEngine(image, sectors, read_only=False, threads=2, serial=b'', engine='auto', inline=True); "
              "engine: auto, io_uring (OSError without it) or threads; inline: answer what the page cache has in drain()",
    .tp_basicsize = sizeof(BlockObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = block_new,
    .tp_dealloc = (destructor)block_dealloc,
    .tp_methods = block_methods,
    .tp_getset = block_getset,
};
