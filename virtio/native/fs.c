/* virtio._ring.FsEngine: a directory of the host behind a virtio-fs device (virtio 1.2, 5.11).
 *
 * drain() pops a batch, hands it to native threads and returns to its ring what they finish in a moment: the loop waits
 * LINGER_MAX_NS (fs_threads.c) for a file system at most. The rest reap() returns to the rings.
 * Benchmark: tests/bench/bench_share.py. */
#define _GNU_SOURCE
#include "fs.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MORE = 1, SIGNAL = 2 };

typedef struct {
    PyObject_HEAD
    struct fs fs;
    struct fs_pool pool;
    struct fs_direct *direct;
    bool closed;
} FsObject;

/* Return a request to the driver unless its queue was reset; frees it. 0, or -1 with an exception. */
static int give_back(FsObject *self, struct fs_request *request, bool answered)
{
    int failed = 0;
    if (!request->ring) {
        close(request->closes);
        free(request);
        return 0;
    }
    RingObject *ring = request->ring->object;
    if (answered)
        failed = segments_notify(ring->memory, request->chain.segments + request->chain.readable, request->chain.writable,
                                 request->written);
    pthread_mutex_lock(&self->direct->answering.lock);
    if (answered)
        fs_count(&self->direct->counts, request);
    else
        self->direct->counts.in_flight--;
    if (answered && !ring->closed)
        ring_push(&ring->ring, request->chain.order, request->chain.id, request->chain.slots, (uint32_t)request->written);
    pthread_mutex_unlock(&self->direct->answering.lock);
    fs_request_free(request);
    return failed;
}

/* Give back what the threads finish of this ring's requests in a moment. 0, or -1 with an exception. */
static int linger(FsObject *self, RingObject *ring)
{
    struct fs_list done, others = {0};
    int failed = 0;
    Py_BEGIN_ALLOW_THREADS
    done = fs_pool_linger(&self->pool);
    Py_END_ALLOW_THREADS
    for (struct fs_request *request; (request = fs_list_take(&done));) {
        if (request->ring->object == ring)
            failed |= give_back(self, request, true);
        else
            fs_list_add(&others, request);
    }
    fs_pool_put_back(&self->pool, &others);
    return failed;
}

/* The ring, counted once more; NULL with an exception. */
static struct fs_ring *counted(FsObject *self, RingObject *object)
{
    for (unsigned i = 0; i < FS_LANES; i++) {
        struct fs_ring *lent = self->direct->lanes[i].ring; /* the loop's thread alone lends */
        if (lent && lent->object == object) {
            __atomic_fetch_add(&lent->count, 1, __ATOMIC_RELAXED);
            return lent;
        }
    }
    struct fs_ring *ring = fs_ring_new(object);
    if (!ring)
        PyErr_NoMemory();
    return ring;
}

static PyObject *fs_drain(FsObject *self, PyObject *args)
{
    RingObject *ring;
    int urgent = 0, limit = FS_TURN;
    if (!PyArg_ParseTuple(args, "O!|pi", &ring_type, &ring, &urgent, &limit))
        return NULL;
    if (ring->closed || self->closed) {
        PyErr_SetString(state_error, self->closed ? "the engine is closed" : "the queue was reset");
        return NULL;
    }
    struct fs_ring *from = counted(self, ring);
    if (!from)
        return NULL;
    struct fs_list list = {0};
    int taken = 0, failed = 0, flags = 0;
    bool malformed = false;
    pthread_mutex_lock(&self->direct->answering.lock);
    ring_disable_notification(&ring->ring);
    for (;;) {
        struct chain chain;
        if (taken >= limit) {
            flags |= MORE;
            break;
        }
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
        struct fs_request *request = fs_request_new(from, &chain);
        if (!request) {
            PyErr_NoMemory();
            failed = 1;
            break;
        }
        self->direct->counts.in_flight++;
        fs_list_add(&list, request);
    }
    pthread_mutex_unlock(&self->direct->answering.lock);
    fs_ring_put(from);
    bool lingers = list.count;
    if (fs_pool_submit(&self->pool, &list, urgent)) {
        failed |= lingers && linger(self, ring);
    } else {
        for (struct fs_request *request; (request = fs_list_take(&list));) {
            fs_run(&self->fs, request);
            failed |= give_back(self, request, true);
        }
    }
    pthread_mutex_lock(&self->direct->answering.lock);
    failed = failed || ring_notify_area(ring);
    if (!failed && !malformed && ring_needs_notification(&ring->ring))
        flags |= SIGNAL;
    pthread_mutex_unlock(&self->direct->answering.lock);
    if (failed)
        return NULL;
    return malformed ? ring_raise(ring) : PyLong_FromLong(flags);
}

static PyObject *fs_reap(FsObject *self, PyObject *Py_UNUSED(unused))
{
    struct fs_list done = fs_pool_done(&self->pool);
    PyObject *rings = PyList_New(0);
    bool failed = !rings;
    for (struct fs_request *request; (request = fs_list_take(&done));) {
        failed |= !failed && rings_add(rings, request->ring->object);
        failed |= !!give_back(self, request, true);
    }
    pthread_mutex_lock(&self->direct->answering.lock);
    for (unsigned i = 0; i < FS_LANES; i++) {
        struct fs_lane *lane = &self->direct->lanes[i];
        if (lane->owes && lane->ring)
            failed = failed || rings_add(rings, lane->ring->object);
        lane->owes = false;
    }
    if (failed)
        Py_CLEAR(rings);
    else
        rings = rings_to_notify(rings);
    pthread_mutex_unlock(&self->direct->answering.lock);
    return rings;
}

/* Drop what no thread has begun. Whether nothing touches guest memory any more; waits for nothing. */
static bool cancel(FsObject *self)
{
    struct fs_list dropped = {0};
    __atomic_store_n(&self->fs.abandoned, true, __ATOMIC_RELAXED);
    bool idle = answering_is_idle(&self->direct->answering); /* first: what it leaves to the pool is dropped next */
    idle = fs_pool_cancel(&self->pool, &dropped) && idle;
    for (struct fs_request *request; (request = fs_list_take(&dropped));)
        give_back(self, request, false);
    __atomic_store_n(&self->fs.abandoned, !idle, __ATOMIC_RELAXED);
    return idle;
}

static PyObject *fs_cancel(FsObject *self, PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(cancel(self));
}

static PyObject *fs_reset(FsObject *self, PyObject *Py_UNUSED(unused))
{
    if (self->direct->counts.in_flight || self->closed) {
        PyErr_SetString(state_error, self->closed ? "the engine is closed" : "requests are in flight");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    nodes_clear(&self->fs);
    Py_END_ALLOW_THREADS
    self->fs.minor = 0;
    Py_RETURN_NONE;
}

static PyObject *fs_close(FsObject *self, PyObject *Py_UNUSED(unused))
{
    if (!self->closed) {
        self->closed = true;
        __atomic_store_n(&self->fs.abandoned, true, __ATOMIC_RELAXED);
        for (unsigned i = 0; self->direct && i < FS_LANES; i++)
            (void)fs_direct_lend(self->direct, i, NULL);
        Py_BEGIN_ALLOW_THREADS
        if (self->direct)
            answering_wait(&self->direct->answering);
        fs_pool_close(&self->pool);
        Py_END_ALLOW_THREADS
        if (self->direct)
            cancel(self);
        nodes_close(&self->fs);
    }
    Py_RETURN_NONE;
}

static void fs_dealloc(FsObject *self)
{
    Py_XDECREF(fs_close(self, NULL));
    if (self->direct)
        answering_put(&self->direct->answering);
    pthread_mutex_destroy(&self->pool.lock);
    pthread_cond_destroy(&self->pool.work);
    pthread_mutex_destroy(&self->fs.lock);
    pthread_rwlock_destroy(&self->fs.session);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *fs_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"root", "read_only", "owner", "valid", "keep_cache", "descriptors", NULL};
    int root, read_only = 0, keep_cache = 0;
    PyObject *owner = Py_None;
    double valid = 1.0;
    unsigned descriptors = 512;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i|pOdpI", names, &root, &read_only, &owner, &valid, &keep_cache,
                                     &descriptors))
        return NULL;
    unsigned uid = 0, gid = 0;
    if (owner != Py_None && !PyArg_ParseTuple(owner, "II", &uid, &gid))
        return NULL;
    if (!(valid >= 0 && valid <= 1e9) || descriptors < 2) {
        PyErr_SetString(PyExc_ValueError, "valid is 0 to 1e9 seconds, descriptors at least 2");
        return NULL;
    }
    FsObject *self = (FsObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    pthread_mutex_init(&self->fs.lock, NULL);
    pthread_rwlock_init(&self->fs.session, NULL);
    self->fs.read_only = read_only;
    self->fs.keep_cache = keep_cache;
    self->fs.map_owner = owner != Py_None;
    self->fs.own_ids = owner == Py_None && geteuid() == 0;
    self->fs.uid = uid;
    self->fs.gid = gid;
    self->fs.valid_ns = (uint64_t)(valid * 1e9);
    self->fs.descriptors_max = self->fs.files_max = descriptors / 2;
    self->pool.event = -1;
    int error = fs_pool_open(&self->pool, &self->fs);
    self->direct = fs_direct_new(&self->fs, &self->pool);
    if (!error && !self->direct)
        error = ENOMEM;
    if (!error) {
        int own = fcntl(root, F_DUPFD_CLOEXEC, 3);
        error = own < 0 ? errno : nodes_open(&self->fs, own);
    }
    if (error) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

/* (minor, flags, (device, inode), nodes, files): each node (id, parent, name or None, type, device, inode, born, ns,
 * lookups), each file (handle, node, flags, directory). */
static PyObject *fs_save(FsObject *self, PyObject *Py_UNUSED(unused))
{
    struct fs *fs = &self->fs;
    if (self->direct->counts.in_flight || self->closed) {
        PyErr_SetString(state_error, self->closed ? "the engine is closed" : "requests are in flight");
        return NULL;
    }
    PyObject *nodes = PyList_New(0), *files = PyList_New(0), *result = NULL;
    bool failed = !nodes || !files;
    for (size_t i = 0; i < fs->buckets && !failed; i++) {
        for (struct node *node = fs->by_id[i]; node && !failed; node = node->next_id) {
            if (node == fs->root)
                continue;
            PyObject *one = Py_BuildValue("(KKyIKKLLK)", node->id, node->parent->id, node->name ? node->name : "", node->type,
                                          node->device, node->inode, (long long)node->born, (long long)node->born_ns,
                                          node->lookups);
            failed = !one || PyList_Append(nodes, one);
            Py_XDECREF(one);
        }
    }
    for (size_t i = 0; i < fs->files_room && !failed; i++) {
        struct file *file = fs->files[i];
        if (!file)
            continue;
        PyObject *one = Py_BuildValue("(KKIO)", (uint64_t)i | (uint64_t)file->generation << 32, file->node->id, file->flags,
                                      file->directory ? Py_True : Py_False);
        failed = !one || PyList_Append(files, one);
        Py_XDECREF(one);
    }
    if (!failed)
        result = Py_BuildValue("(II(KK)OO)", fs->minor, fs->flags, fs->root->device, fs->root->inode, nodes, files);
    Py_XDECREF(nodes);
    Py_XDECREF(files);
    return result;
}

/* What fs_save() gave, parents before their children. StateError: it contradicts itself; everything is forgotten then. */
static PyObject *fs_restore(FsObject *self, PyObject *args)
{
    struct fs *fs = &self->fs;
    unsigned minor, flags;
    unsigned long long device, inode;
    PyObject *nodes, *files;
    if (!PyArg_ParseTuple(args, "II(KK)O!O!", &minor, &flags, &device, &inode, &PyList_Type, &nodes, &PyList_Type, &files))
        return NULL;
    PyObject *cleared = fs_reset(self, NULL);
    if (!cleared)
        return NULL;
    Py_DECREF(cleared);
    bool elsewhere = device != fs->root->device || inode != fs->root->inode, failed = false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(nodes) && !failed; i++) {
        unsigned long long id, parent, node_device, node_inode, lookups;
        long long born, born_ns;
        unsigned type;
        const char *name;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(nodes, i), "KKyIKKLLK", &id, &parent, &name, &type, &node_device, &node_inode,
                              &born, &born_ns, &lookups))
            return NULL;
        struct node saved = {.id = id, .device = node_device, .inode = node_inode, .born = born, .born_ns = born_ns,
                             .type = type, .lookups = lookups, .adopt = elsewhere};
        failed = strlen(name) > FS_NAME_MAX || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, "..") ||
                 node_restore(fs, &saved, parent, *name ? name : NULL);
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(files) && !failed; i++) {
        unsigned long long handle, node;
        unsigned how;
        int directory;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(files, i), "KKIp", &handle, &node, &how, &directory))
            return NULL;
        failed = file_restore(fs, handle, node, how, directory);
    }
    if (failed) {
        nodes_clear(fs);
        PyErr_SetString(state_error, "the saved nodes and open files of the share contradict themselves");
        return NULL;
    }
    fs->minor = minor;
    fs->flags = flags;
    /* Before the guest looks a name up anew: the file would get a new node then, and what is open of the old one be lost. */
    for (Py_ssize_t i = 0; elsewhere && i < PyList_GET_SIZE(nodes); i++) {
        struct node *node = node_pin(fs, PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(PyList_GET_ITEM(nodes, i), 0)));
        if (!node)
            continue;
        Py_BEGIN_ALLOW_THREADS
        (void)node_fd(fs, node);
        node_unpin(fs, node);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static PyObject *fs_answerer(FsObject *self, PyObject *args)
{
    unsigned number;
    if (!PyArg_ParseTuple(args, "I", &number) || !lane_number(number, FS_LANES))
        return NULL;
    return lane_capsule(&self->direct->lanes[number].lane);
}

static PyObject *fs_lend(FsObject *self, PyObject *args)
{
    unsigned number;
    RingObject *object;
    if (!PyArg_ParseTuple(args, "IO&", &number, lane_ring, &object) || !lane_number(number, FS_LANES))
        return NULL;
    struct fs_ring *ring = NULL;
    if (object && self->fs.local && !self->closed && fs_pool_ready(&self->pool) && !(ring = fs_ring_new(object)))
        return PyErr_NoMemory();
    return PyBool_FromLong(fs_direct_lend(self->direct, number, ring));
}

static PyObject *fs_message(FsObject *self, PyObject *args)
{
    unsigned number;
    PyObject *message;
    if (!PyArg_ParseTuple(args, "IO", &number, &message) || !lane_number(number, FS_LANES))
        return NULL;
    return lane_set_message(&self->direct->lanes[number].lane, message);
}

static PyObject *fs_descriptors(FsObject *self, PyObject *Py_UNUSED(unused))
{
    return Py_BuildValue("(i)", self->pool.event);
}

static PyObject *fs_in_flight(FsObject *self, void *Py_UNUSED(unused))
{
    pthread_mutex_lock(&self->direct->answering.lock);
    uint32_t in_flight = self->direct->counts.in_flight;
    pthread_mutex_unlock(&self->direct->answering.lock);
    return PyLong_FromUnsignedLong(in_flight);
}

static PyObject *fs_counters(FsObject *self, void *Py_UNUSED(unused))
{
    pthread_mutex_lock(&self->direct->answering.lock);
    struct fs_counts counts = self->direct->counts;
    pthread_mutex_unlock(&self->direct->answering.lock);
    return Py_BuildValue("(KKKK)", counts.requests, counts.failures, counts.bytes_read, counts.bytes_written);
}

/* How many (nodes, descriptors of nodes, open files) there are; while requests run, of a moment. */
static PyObject *fs_sizes(FsObject *self, void *Py_UNUSED(unused))
{
    size_t nodes, descriptors, files;
    pthread_mutex_lock(&self->fs.lock);
    nodes = self->fs.nodes;
    descriptors = self->fs.descriptors;
    files = self->fs.files_count;
    pthread_mutex_unlock(&self->fs.lock);
    return Py_BuildValue("(nnn)", (Py_ssize_t)nodes, (Py_ssize_t)descriptors, (Py_ssize_t)files);
}

/* {message: ((field, offset, size)...)}, from fs_wire.h. */
static PyObject *fs_layouts(PyObject *Py_UNUSED(type), PyObject *Py_UNUSED(unused))
{
    PyObject *layouts = PyDict_New(), *fields = NULL, *one = NULL;
    bool failed = !layouts;
#define LAYOUT_FIELD(kind, name)                                                                                       \
    one = failed ? NULL : Py_BuildValue("(snn)", #name, (Py_ssize_t)offsetof(LAYOUT, name), (Py_ssize_t)sizeof(kind));  \
    failed = !one || PyList_Append(fields, one);                                                                       \
    Py_XDECREF(one);
#define LAYOUT_MESSAGE(message, list)                                                                                  \
    fields = PyList_New(0);                                                                                            \
    failed = failed || !fields;                                                                                        \
    {                                                                                                                  \
        typedef struct message LAYOUT;                                                                                 \
        list(LAYOUT_FIELD)                                                                                             \
    }                                                                                                                  \
    failed = failed || PyDict_SetItemString(layouts, #message, fields);                                                \
    Py_XDECREF(fields);
    FUSE_MESSAGES(LAYOUT_MESSAGE)
#undef LAYOUT_MESSAGE
#undef LAYOUT_FIELD
    if (failed)
        Py_CLEAR(layouts);
    return layouts;
}

static PyMethodDef fs_methods[] = {
    {"drain", (PyCFunction)fs_drain, METH_VARARGS,
     "drain(ring, urgent=False, limit=128) -> flags: 1 more is waiting (call again), 2 the driver wants a notification."},
    {"reap", (PyCFunction)fs_reap, METH_NOARGS, "Return what is done; rings that want a notification."},
    {"cancel", (PyCFunction)fs_cancel, METH_NOARGS,
     "cancel() -> whether nothing touches guest memory any more; drops every request that was not begun, waits for none."},
    {"reset", (PyCFunction)fs_reset, METH_NOARGS, "Forget every node and close every file; StateError while requests are in flight."},
    {"save", (PyCFunction)fs_save, METH_NOARGS,
     "(minor, flags, root's identity, nodes, open files); StateError while requests are in flight."},
    {"restore", (PyCFunction)fs_restore, METH_VARARGS, "restore(minor, flags, identity, nodes, files): what save() gave."},
    {"close", (PyCFunction)fs_close, METH_NOARGS, "Wait for system calls that run, drop the rest, close all files."},
    {"answerer", (PyCFunction)fs_answerer, METH_VARARGS,
     "answerer(queue) -> a capsule (answerer.h) for that queue's doorbell; it answers while the queue is lent and has a message."},
    {"lend", (PyCFunction)fs_lend, METH_VARARGS,
     "lend(queue, ring): vCPUs' threads may answer what comes in it; None: no longer. in_flight counts what is under way. "
     "Whether an interrupt of the queue is owed."},
    {"message", (PyCFunction)fs_message, METH_VARARGS,
     "message(queue, (address, data)): what its interrupt is now; None: only the loop can send it."},
    {"descriptors", (PyCFunction)fs_descriptors, METH_NOARGS, "One of them is readable when reap() has something."},
    {"layouts", fs_layouts, METH_NOARGS | METH_STATIC, "Every message: name -> [(field, offset, bytes)]."},
    {0},
};

static PyGetSetDef fs_getset[] = {
    {"in_flight", (getter)fs_in_flight, NULL, "requests popped and not returned", NULL},
    {"counters", (getter)fs_counters, NULL, "so far: (requests, failed ones, bytes read, bytes written)", NULL},
    {"sizes", (getter)fs_sizes, NULL, "now: (nodes, descriptors of nodes, open files)", NULL},
    {0},
};

PyTypeObject fs_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.FsEngine",
    .tp_doc = "FsEngine(root, read_only=False, owner=None, valid=1.0, keep_cache=False, descriptors=512); root: an open "
              "directory (duplicated); owner: (uid, gid) as which the guest sees files of this process's user",
    .tp_basicsize = sizeof(FsObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = fs_new,
    .tp_dealloc = (destructor)fs_dealloc,
    .tp_methods = fs_methods,
    .tp_getset = fs_getset,
};
