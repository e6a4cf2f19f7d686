/* One virtio-fs request: its bytes in guest memory, what is done for which opcode, the reply (virtio 1.2, 5.11.6). */
#define _GNU_SOURCE
#include "fs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct fs_request *fs_request_new(struct fs_ring *ring, const struct chain *chain)
{
    struct fs_request *request = calloc(1, sizeof *request);
    if (!request || !chain_keep(&request->chain, chain)) {
        free(request);
        return NULL;
    }
    __atomic_fetch_add(&ring->count, 1, __ATOMIC_RELAXED);
    request->ring = ring;
    request->closes = -1;
    return request;
}

static void free_request(struct fs_request *request)
{
    free(request->chain.segments);
    free(request);
}

void fs_request_free(struct fs_request *request)
{
    fs_ring_put(request->ring);
    free_request(request);
}

void fs_request_drop(struct fs_request *request)
{
    __atomic_fetch_sub(&request->ring->count, 1, __ATOMIC_RELEASE);
    free_request(request);
}

const void *call_bytes(struct call *call, size_t length)
{
    if (call->length < length)
        return NULL;
    const void *at = call->arguments;
    call->arguments += length;
    call->length -= length;
    return at;
}

const char *call_name(struct call *call, int *error)
{
    const char *name = (const char *)call->arguments;
    size_t length = strnlen(name, call->length);
    *error = EINVAL;
    if (length == call->length || !length || memchr(name, '/', length) || !strcmp(name, ".") || !strcmp(name, ".."))
        return NULL;
    *error = ENAMETOOLONG;
    if (length > FS_NAME_MAX)
        return NULL;
    call_bytes(call, length + 1);
    *error = 0;
    return name;
}

void *call_room(struct call *call, size_t length)
{
    if (call->replied + length > FS_REPLY || call->replied + length > call->room)
        return NULL;
    void *at = call->reply + call->replied;
    memset(at, 0, length);
    call->replied += length;
    return at;
}

/* Into the device-writable part from its start. */
static void put(const struct chain *chain, void *from, uint64_t length)
{
    segments_copy(chain->segments + chain->readable, chain->writable, 0, from, length, false);
}

static int init(struct call *call)
{
    struct fs *fs = call->fs;
    const struct fuse_init_in *in = CALL_IN(call, fuse_init_in);
    struct fuse_init_out *out = CALL_OUT(call, fuse_init_out);
    if (!in || !out)
        return EINVAL;
    out->major = FUSE_MAJOR;
    out->minor = FUSE_MINOR;
    if (in->major > FUSE_MAJOR)
        return 0; /* the driver asks again, with ours */
    if (in->major < FUSE_MAJOR || in->minor < FUSE_MINOR_LEAST)
        return EPROTO;
    nodes_clear(fs);
    uint32_t ours = FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_AUTO_INVAL_DATA | FUSE_DO_READDIRPLUS |
                    FUSE_READDIRPLUS_AUTO | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_CACHE_SYMLINKS;
    fs->minor = in->minor < FUSE_MINOR ? in->minor : FUSE_MINOR;
    fs->flags = in->flags & ours;
    out->flags = fs->flags;
    out->max_readahead = in->max_readahead;
    out->max_background = 64;
    out->congestion_threshold = 48;
    out->max_write = FS_TRANSFER;
    out->max_pages = FS_PAGES;
    out->time_gran = 1;
    return 0;
}

static int forget(struct call *call)
{
    const struct fuse_forget_in *in = CALL_IN(call, fuse_forget_in);
    if (in)
        node_forget(call->fs, call->in.nodeid, in->nlookup);
    return 0;
}

static int batch_forget(struct call *call)
{
    const struct fuse_batch_forget_in *in = CALL_IN(call, fuse_batch_forget_in);
    for (uint32_t left = in ? in->count : 0; left--;) {
        const struct fuse_forget_one *one = CALL_IN(call, fuse_forget_one);
        if (!one)
            break;
        node_forget(call->fs, one->nodeid, one->nlookup);
    }
    return 0;
}

static int dispatch(struct call *call)
{
    switch (call->in.opcode) {
    case FUSE_LOOKUP: return fs_lookup(call);
    case FUSE_GETATTR: return fs_getattr(call);
    case FUSE_SETATTR: return fs_setattr(call);
    case FUSE_READLINK: return fs_readlink(call);
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_LINK: return fs_make(call);
    case FUSE_UNLINK:
    case FUSE_RMDIR: return fs_remove(call);
    case FUSE_RENAME:
    case FUSE_RENAME2: return fs_rename(call);
    case FUSE_OPEN:
    case FUSE_OPENDIR: return fs_open(call);
    case FUSE_CREATE: return fs_create(call);
    case FUSE_READ: return fs_read(call);
    case FUSE_WRITE: return fs_write(call);
    case FUSE_READDIR:
    case FUSE_READDIRPLUS: return fs_readdir(call);
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR: return fs_release(call);
    case FUSE_STATFS: return fs_statfs(call);
    case FUSE_FSYNC:
    case FUSE_FSYNCDIR:
    case FUSE_SYNCFS: return fs_fsync(call);
    case FUSE_SETXATTR:
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR:
    case FUSE_REMOVEXATTR: return fs_xattr(call);
    case FUSE_FALLOCATE: return fs_fallocate(call);
    case FUSE_LSEEK: return fs_lseek(call);
    case FUSE_COPY_FILE_RANGE: return fs_copy(call);
    default: return ENOSYS; /* the driver does it itself, or not at all, and asks no more */
    }
}

/* What the opcode's handler says, under the lock that keeps a new session from the requests of the old one. */
static int answer(struct call *call)
{
    struct fs *fs = call->fs;
    uint32_t opcode = call->in.opcode;
    bool alone = opcode == FUSE_INIT || opcode == FUSE_DESTROY;
    int error;
    if (alone)
        pthread_rwlock_wrlock(&fs->session);
    else if (!call->quick)
        pthread_rwlock_rdlock(&fs->session);
    else if (pthread_rwlock_tryrdlock(&fs->session))
        return FS_LATER;
    if (opcode == FUSE_INIT) {
        error = init(call);
    } else if (!fs->minor) {
        error = EPROTO;
    } else if (opcode == FUSE_DESTROY) {
        nodes_clear(fs);
        fs->minor = 0;
        error = 0;
    } else if (opcode == FUSE_FORGET) {
        error = forget(call);
    } else if (opcode == FUSE_BATCH_FORGET) {
        error = batch_forget(call);
    } else {
        error = dispatch(call);
    }
    pthread_rwlock_unlock(&fs->session);
    return error;
}

/* What a local file system does in about the time that waking a thread takes, for a file whose inode is in memory; and what
 * is not done at all. Not among them: what reads or writes any number of blocks, and what has several files, of which one
 * may be far away. */
static bool may_be_quick(const struct call *call)
{
    switch (call->in.opcode) {
    case FUSE_LOOKUP:
    case FUSE_GETATTR:
    case FUSE_SETATTR:
    case FUSE_READLINK:
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_UNLINK:
    case FUSE_RMDIR:
    case FUSE_OPEN:
    case FUSE_OPENDIR:
    case FUSE_CREATE:
    case FUSE_READ:
    case FUSE_WRITE:
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR:
    case FUSE_FORGET:
        return node_is_near(call->fs, call->in.nodeid);
    case FUSE_FLUSH:
        return true;
    default:
        return false;
    }
}

/* False: a quick call that must not be; nothing was done. */
static bool run(struct fs *fs, struct fs_request *request, bool quick)
{
    struct chain *chain = &request->chain;
    struct call call = {.fs = fs, .request = request, .quick = quick};
    struct fuse_out_header out;
    if (__atomic_load_n(&fs->abandoned, __ATOMIC_RELAXED))
        return true;
    /* All but the data of a write is copied once, before anything of it is looked at. */
    size_t most = sizeof call.in + FS_ARGUMENTS;
    if (chain->readable_length < most)
        most = chain->readable_length;
    uint8_t *copy = malloc(most + 1);
    size_t got = copy ? segments_copy(chain->segments, chain->readable, 0, copy, most, true) : 0;
    if (got >= sizeof call.in) {
        memcpy(&call.in, copy, sizeof call.in);
        copy[got] = 0;
        call.arguments = copy + sizeof call.in;
        call.length = got - sizeof call.in;
    }
    request->opcode = call.in.opcode;
    if (quick && got >= sizeof call.in && !may_be_quick(&call)) {
        free(copy);
        return false;
    }
    bool silent = call.in.opcode == FUSE_FORGET || call.in.opcode == FUSE_BATCH_FORGET;
    int error = !copy ? ENOMEM : got < sizeof call.in || call.in.len != chain->readable_length ? EIO : 0;
    if (!silent && chain->writable_length < sizeof out) {
        free(copy);
        return true; /* there is no room to say anything, so nothing is done */
    }
    call.room = silent ? 0 : chain->writable_length - sizeof out;
    call.reply = silent ? NULL : malloc(sizeof out + FS_REPLY);
    uint8_t *reply = call.reply;
    if (!silent && !reply)
        error = ENOMEM;
    else if (reply)
        call.reply += sizeof out;
    if (!error)
        error = answer(&call);
    if (error == FS_LATER) {
        free(reply);
        free(copy);
        return false;
    }
    if (error)
        call.replied = 0;
    request->error = error;
    if (!silent) {
        out = (struct fuse_out_header){(uint32_t)(sizeof out + call.replied), -error, call.in.unique};
        request->written = out.len;
        if (reply && !call.placed && !error) {
            memcpy(reply, &out, sizeof out);
            put(chain, reply, request->written);
        } else {
            put(chain, &out, sizeof out);
        }
    }
    free(reply);
    free(copy);
    return true;
}

void fs_run(struct fs *fs, struct fs_request *request)
{
    (void)run(fs, request, false);
    fs_sweep(fs, NULL, NULL);
}

bool fs_run_quick(struct fs *fs, struct fs_request *request)
{
    return run(fs, request, true);
}
