/* The parts of virtio._ring.FsEngine: a directory of the host as a virtio-fs device serves it (virtio 1.2, 5.11).
 *
 * fs.c          the Python object: requests from rings to threads, and back
 * fs_threads.c  requests on native threads
 * fs_direct.c   requests on the thread of the vCPU that makes them
 * fs_request.c  one request: its bytes in guest memory, what is done for which opcode, the reply
 * fs_names.c    what has to do with names and attributes
 * fs_files.c    what has to do with open files and directories
 * fs_nodes.c    which file of the host a guest's node is; open files
 * fs_wire.h     the messages
 *
 * Safety. A guest names files by nodes that it was told of, and a name of one component; both are checked. A node is
 * resolved by descriptors opened with O_PATH | O_NOFOLLOW below its parent's, so that no symbolic link and no ".." of the
 * host is ever followed. Only regular files and directories are opened. All numbers of the guest are looked up in tables.
 *
 * Everything of Python is the loop's thread's; rings are under `fs_direct.answering.lock`; threads own the requests that they
 * were given. */
#ifndef VIRTIO_FS_H
#define VIRTIO_FS_H

#include "module.h" /* first: it includes Python.h */

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "answering.h"
#include "fs_wire.h"

enum {
    FS_THREADS = 4,
    FS_TURN = 128,              /* requests taken in one turn of the loop */
    FS_NAME_MAX = 255,
    FS_PAGES = 256,             /* of 4 KiB, in one read or write */
    FS_TRANSFER = FS_PAGES << 12,
    FS_ARGUMENTS = 72 << 10,    /* bytes of a request without its data: an xattr of 64 KiB, two names */
    FS_REPLY = 66 << 10,        /* bytes of a reply that is not file data: an xattr, or entries of a directory */
    FS_NODES = 1 << 20,         /* nodes that a guest may know of at a time */
    FS_IOVS = 1024,             /* IOV_MAX: what preadv(2) takes */
    FS_COPY = 64 << 20,         /* bytes of one COPY_FILE_RANGE at most */
    FS_LATER = 4096             /* no errno: a vCPU's thread must not do this, and has done nothing of it */
};

/* What of open(2)'s flags a guest may ask for. The position and appending are the guest's kernel's matter, and its memory
 * is not aligned for O_DIRECT. */
enum { OPEN_FLAGS = O_ACCMODE | O_NONBLOCK | O_DSYNC | O_SYNC | O_TRUNC };

/* One file of the host that the guest knows of. Under `fs.lock`. */
struct node {
    struct node *next_id, *next_file;   /* in the tables */
    struct node *newer, *older;         /* in the list of those with a descriptor, if it has one */
    uint64_t id;
    uint64_t device, inode;
    int64_t born, born_ns;              /* tells a file from a later one with the same inode number */
    uint32_t type;                      /* S_IFMT bits */
    uint64_t lookups;                   /* that the guest has to forget */
    uint32_t pins;                      /* requests that use it, and its descriptor, now */
    uint32_t holds;                     /* children, and open files of it */
    bool adopt;                         /* saved on another host: the file of that name is taken for it */
    int fd;                             /* O_PATH; -1: opened again by name when it is needed */
    struct node *parent;                /* held; NULL: the root */
    char *name;                         /* in the parent; NULL: it has no name any more, or is the root */
};

/* What OPEN, CREATE and OPENDIR made. */
struct file {
    int fd;
    bool directory, append, removed;
    uint32_t flags;
    uint32_t pins, generation;
    struct node *node;                  /* held */
    pthread_mutex_t lock;               /* a directory's position */
};

struct fs {
    pthread_rwlock_t session;           /* written by INIT, DESTROY and reset; read by every other request */
    pthread_mutex_t lock;               /* the tables */
    struct node **by_id, **by_file;
    size_t buckets;                     /* a power of two */
    struct node *root, *newest, *oldest;
    size_t nodes, descriptors, descriptors_max;
    uint64_t next_id;
    struct file **files;
    size_t files_room, files_count, files_max, files_hint; /* no place before the hint is free */
    uint32_t next_generation;
    bool read_only, map_owner, keep_cache;
    bool own_ids;                       /* this process may give files to others */
    bool local;                         /* the file system waits for no other machine and no process */
    bool fix_modes;                     /* atomic: the threads could not get a umask of their own */
    uint32_t uid, gid;                  /* as which the guest sees files of this process's user, if map_owner */
    uint64_t valid_ns;                  /* how long the guest may believe names and attributes */
    uint32_t minor, flags;              /* negotiated; 0: not initialised */
    bool abandoned;                     /* atomic: what was not begun is not done any more */
    int *closing;                       /* descriptors that nobody uses any more: closed without the lock */
    size_t closing_count, closing_room; /* the count is read without the lock */
};

/* A ring that requests came from. It is counted, since a vCPU's thread has no GIL for the Python object's own count. The
 * loop's thread gives up the last one: while others have one, a lane or a request that the loop will free has another. */
struct fs_ring {
    uint32_t count; /* atomic */
    RingObject *object;
};

struct fs_request {
    struct fs_request *next;
    struct fs_ring *ring;               /* NULL: there is nothing to answer, `closes` is to be closed */
    int closes;
    struct chain chain;                 /* segments: own copy */
    uint64_t written;                   /* bytes of the reply */
    uint64_t moved;                     /* bytes of file data, for the counters */
    uint32_t opcode;
    int32_t error;
};

struct fs_list {
    struct fs_request *first, *last;
    unsigned count;
};

static inline void fs_list_add(struct fs_list *list, struct fs_request *request)
{
    request->next = NULL;
    if (list->last)
        list->last->next = request;
    else
        list->first = request;
    list->last = request;
    list->count++;
}

static inline struct fs_request *fs_list_take(struct fs_list *list)
{
    struct fs_request *request = list->first;
    if (request) {
        list->first = request->next;
        if (!list->first)
            list->last = NULL;
        list->count--;
        request->next = NULL;
    }
    return request;
}

/* One request while a thread works on it. Handlers return 0 or an errno; `reply` has FS_REPLY bytes. */
struct call {
    struct fs *fs;
    struct fs_request *request;
    struct fuse_in_header in;
    const uint8_t *arguments;           /* behind the header; a zero byte follows them */
    size_t length;
    uint8_t *reply;
    size_t replied;                     /* bytes of `reply`, or of file data already in place */
    uint64_t room;                      /* bytes of the driver's buffer behind the header of the reply */
    bool placed;                        /* the reply is in guest memory already */
    bool quick;                         /* a vCPU waits: FS_LATER for what may take long */
};

/* fs_nodes.c; any thread */

int nodes_open(struct fs *fs, int root);   /* takes the descriptor. 0 or an errno */
void nodes_clear(struct fs *fs);           /* forget all but the root, close open files */
void nodes_close(struct fs *fs);
/* The node, pinned; NULL: there is none. */
struct node *node_pin(struct fs *fs, uint64_t id);
void node_unpin(struct fs *fs, struct node *node);
/* A descriptor (O_PATH) of a pinned node, good until node_unpin(). -errno. */
int node_fd(struct fs *fs, struct node *node);
/* The node of an open descriptor (O_PATH; taken), which is `name` in `parent`: looked up once more. NULL: *error. */
struct node *node_found(struct fs *fs, int fd, const struct statx *status, struct node *parent, const char *name, int *error);
void node_forget(struct fs *fs, uint64_t id, uint64_t lookups);
/* The node that `name` in a directory is now, pinned and with a descriptor; NULL: the guest knows none. The descriptor is
 * path_open()'s, or an error. */
struct node *node_named(struct fs *fs, int fd);
/* The node has lost this name, or got it. */
void node_unnamed(struct fs *fs, struct node *node, const struct node *parent, const char *name);
void node_renamed(struct fs *fs, struct node *node, struct node *parent, const char *name);
/* One node or file that was saved before. -1: there is one of that number, or no such parent. */
int node_restore(struct fs *fs, const struct node *saved, uint64_t parent, const char *name);
int file_restore(struct fs *fs, uint64_t handle, uint64_t node, uint32_t flags, bool directory);

int fs_status(int fd, struct statx *status); /* 0 or an errno */
/* An O_PATH descriptor of `name` in a directory, or -errno. `near`: -FS_LATER if it is on another file system. */
int path_open(int directory, const char *name, bool near);
/* Whether the node's file is on the file system of the shared directory itself. */
bool node_is_near(struct fs *fs, uint64_t id);
/* Close what requests have left to be closed. `later`, if not NULL, gets files that have no name any more. */
void fs_sweep(struct fs *fs, void (*later)(void *context, int fd), void *context);
/* An open file (the descriptor is taken) of a pinned node. 0 or an errno. */
int file_new(struct fs *fs, struct node *node, int fd, uint32_t flags, bool directory, uint64_t *handle);
struct file *file_pin(struct fs *fs, uint64_t handle, bool directory);
void file_unpin(struct fs *fs, struct file *file);
/* ENOENT: there is none. */
int file_release(struct fs *fs, uint64_t handle);

/* fs_request.c */

struct fs_request *fs_request_new(struct fs_ring *ring, const struct chain *chain); /* any thread. NULL: no memory */
void fs_request_free(struct fs_request *request);                                   /* loop thread */
void fs_request_drop(struct fs_request *request); /* any thread; somebody else has its ring, too */
void fs_run(struct fs *fs, struct fs_request *request);                             /* any thread; may block */
/* The same on a vCPU's thread. False: it may take long, and nothing was done. */
bool fs_run_quick(struct fs *fs, struct fs_request *request);
/* The next name among the arguments: one component. NULL with *error. */
const char *call_name(struct call *call, int *error);
/* The next `length` bytes of the arguments; NULL: there are not so many. */
const void *call_bytes(struct call *call, size_t length);
#define CALL_IN(call, type) ((const struct type *)call_bytes(call, sizeof(struct type)))
/* Room for the next part of the reply; NULL: FS_REPLY is not enough, or the driver's buffer. */
void *call_room(struct call *call, size_t length);
#define CALL_OUT(call, type) ((struct type *)call_room(call, sizeof(struct type)))

/* fs_names.c */

int fs_lookup(struct call *call);
int fs_getattr(struct call *call);
int fs_setattr(struct call *call);
int fs_readlink(struct call *call);
int fs_make(struct call *call); /* MKNOD, MKDIR, SYMLINK, LINK */
int fs_remove(struct call *call);
int fs_rename(struct call *call);
int fs_statfs(struct call *call);
int fs_xattr(struct call *call);
/* Look `name` up in a directory (pinned, `directory` its descriptor): *found is pinned. 0 or an errno. */
int lookup_at(struct fs *fs, struct node *parent, int directory, const char *name, bool near, struct node **found,
              struct statx *status);
void fill_entry(const struct fs *fs, struct fuse_entry_out *entry, const struct node *node, const struct statx *status);
/* A new file of mode `mode` in `directory` gets its owner from the request, where the host lets this process give it. */
void finish_new(const struct call *call, int fd, int directory, mode_t mode);

/* fs_files.c */

int fs_open(struct call *call); /* OPEN, OPENDIR */
int fs_create(struct call *call);
int fs_read(struct call *call);
int fs_write(struct call *call);
int fs_readdir(struct call *call);
int fs_release(struct call *call);
int fs_fsync(struct call *call);
int fs_fallocate(struct call *call);
int fs_lseek(struct call *call);
int fs_copy(struct call *call);

/* "/proc/self/fd/N": the way to open, link or change what an O_PATH descriptor names. */
struct fd_path { char text[32]; };
struct fd_path fd_path(int fd);

/* fs_threads.c; calls from the loop's thread, where not said */

struct fs_pool {
    struct fs *fs;
    int event; /* eventfd, readable when fs_pool_done() has something */
    unsigned started;
    pthread_t thread[1 + FS_THREADS]; /* the first has the urgent requests to itself */
    pthread_mutex_t lock;
    pthread_cond_t work, urgent_work;
    struct fs_list queue, urgent, done;
    unsigned running, idle;
    bool stopping;
    bool watched;          /* the loop looks at `done` now and need not be told */
    uint32_t linger_ns;    /* adaptive: how long the loop looks for what it has just submitted; 0: nobody else could run */
    int64_t submitted_ns;  /* CLOCK_MONOTONIC of the last submission; loop thread only, as the one before */
};

int fs_pool_open(struct fs_pool *pool, struct fs *fs); /* 0 or an errno */
/* False: no thread could be started, and the list is as it was. `urgent`: they wait for no other requests. */
bool fs_pool_submit(struct fs_pool *pool, struct fs_list *requests, bool urgent);
struct fs_list fs_pool_done(struct fs_pool *pool);
/* After a submission: wait a moment for what is done, which saves the loop a sleep and being woken. Without the GIL. */
struct fs_list fs_pool_linger(struct fs_pool *pool);
/* Requests that fs_pool_linger() gave and the caller cannot take: fs_pool_done() has them. */
void fs_pool_put_back(struct fs_pool *pool, struct fs_list *requests);
/* Start the threads; whether there are enough. */
bool fs_pool_ready(struct fs_pool *pool);
/* A vCPU's thread leaves a request to a pool that is ready; or what it has answered, but the loop has to return. */
void fs_pool_hand_over(struct fs_pool *pool, struct fs_request *request, bool urgent);
void fs_pool_answered(struct fs_pool *pool, struct fs_request *request);
void fs_pool_wake_loop(struct fs_pool *pool); /* any thread: fs_pool_done() is to be called */
bool fs_pool_cancel(struct fs_pool *pool, struct fs_list *dropped); /* whether nothing runs */
void fs_pool_close(struct fs_pool *pool);                           /* waits for what runs; without the GIL */

/* fs_direct.c */

enum { FS_LANES = 2 };

struct fs_counts {
    uint32_t in_flight; /* requests between pop and push */
    uint64_t requests, failures, bytes_read, bytes_written;
};

/* A request that was in flight is answered. */
static inline void fs_count(struct fs_counts *counts, const struct fs_request *request)
{
    counts->in_flight--;
    counts->requests++;
    counts->failures += !!request->error;
    if (request->opcode == FUSE_READ)
        counts->bytes_read += request->moved;
    else if (request->opcode == FUSE_WRITE)
        counts->bytes_written += request->moved;
}

/* One queue as vCPUs' threads see it. */
struct fs_lane {
    struct answering_lane lane; /* first */
    bool urgent;
    bool owes;              /* an interrupt that could not be sent from there */
    struct fs_ring *ring;   /* lent; NULL: vCPUs leave this queue to the loop */
};

struct fs_direct {
    struct answering answering; /* first; its lock is of everything below, too */
    struct fs *fs;
    struct fs_pool *pool;
    struct fs_counts counts;
    struct fs_lane lanes[FS_LANES];
};

struct fs_ring *fs_ring_new(RingObject *object); /* loop thread, as the next. NULL: no memory */
void fs_ring_put(struct fs_ring *ring);

struct fs_direct *fs_direct_new(struct fs *fs, struct fs_pool *pool); /* NULL: no memory */
/* Loop thread: vCPUs may answer what comes in this queue; with NULL no longer, though one may be at it still. Whether an
 * interrupt of the ring that was lent before is owed. */
bool fs_direct_lend(struct fs_direct *direct, unsigned lane, struct fs_ring *ring);

#endif
