/* Which file of the host a guest's node is, and what it has open.
 *
 * Nodes stand in two tables: by number, as the guest names them, and by the host's identity of the file (device, inode
 * number, time of birth). A node keeps a descriptor while there are few enough of those; the least recently used one loses
 * it and is opened again by its name in its parent, if the same file stands there (else ESTALE). So any number of nodes
 * costs a bounded number of descriptors, and what was saved is found again in another process. */
#define _GNU_SOURCE
#include "fs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { DEPTH_MAX = 256 /* parents that are opened again for one node */ };

int fs_status(int fd, struct statx *status)
{
    return statx(fd, "", AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, status) ? errno : 0;
}

int path_open(int directory, const char *name, bool near)
{
    struct open_how how = {.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC, .resolve = RESOLVE_NO_XDEV};
    int fd = near ? (int)syscall(SYS_openat2, directory, name, &how, sizeof how)
                  : openat(directory, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd >= 0)
        return fd;
    /* Another file system; or a host that has no such call, or forbids it. */
    return near && (errno == EXDEV || errno == ENOSYS || errno == EPERM) ? -FS_LATER : -errno;
}

struct fd_path fd_path(int fd)
{
    struct fd_path path;
    snprintf(path.text, sizeof path.text, "/proc/self/fd/%d", fd);
    return path;
}

static uint64_t device_of(const struct statx *status)
{
    return (uint64_t)status->stx_dev_major << 32 | status->stx_dev_minor;
}

static size_t mix(uint64_t value)
{
    value *= 0x9E3779B97F4A7C15u;
    return (size_t)(value ^ value >> 32);
}

static size_t id_bucket(const struct fs *fs, uint64_t id)
{
    return mix(id) & (fs->buckets - 1);
}

static size_t file_bucket(const struct fs *fs, uint64_t device, uint64_t inode)
{
    return mix(inode ^ device << 20) & (fs->buckets - 1);
}

static struct node *by_id(const struct fs *fs, uint64_t id)
{
    struct node *node = fs->by_id[id_bucket(fs, id)];
    while (node && node->id != id)
        node = node->next_id;
    return node;
}

static bool is_file(const struct node *node, const struct statx *status)
{
    return node->inode == status->stx_ino && node->device == device_of(status) &&
           node->type == (status->stx_mode & S_IFMT) &&
           (!(status->stx_mask & STATX_BTIME) ||
            (node->born == status->stx_btime.tv_sec && node->born_ns == status->stx_btime.tv_nsec));
}

static struct node *by_file(const struct fs *fs, const struct statx *status)
{
    struct node *node = fs->by_file[file_bucket(fs, device_of(status), status->stx_ino)];
    while (node && !is_file(node, status))
        node = node->next_file;
    return node;
}

static void grow(struct fs *fs)
{
    if (fs->nodes < fs->buckets)
        return;
    struct fs larger = {.buckets = fs->buckets * 4};
    larger.by_id = calloc(larger.buckets, sizeof *larger.by_id);
    larger.by_file = calloc(larger.buckets, sizeof *larger.by_file);
    if (!larger.by_id || !larger.by_file) { /* it goes on, slower */
        free(larger.by_id);
        free(larger.by_file);
        return;
    }
    for (size_t i = 0; i < fs->buckets; i++) {
        for (struct node *node = fs->by_id[i], *next; node; node = next) {
            next = node->next_id;
            size_t bucket = id_bucket(&larger, node->id);
            node->next_id = larger.by_id[bucket];
            larger.by_id[bucket] = node;
            bucket = file_bucket(&larger, node->device, node->inode);
            node->next_file = larger.by_file[bucket];
            larger.by_file[bucket] = node;
        }
    }
    free(fs->by_id);
    free(fs->by_file);
    fs->by_id = larger.by_id;
    fs->by_file = larger.by_file;
    fs->buckets = larger.buckets;
}

static void insert(struct fs *fs, struct node *node)
{
    grow(fs);
    size_t bucket = id_bucket(fs, node->id);
    node->next_id = fs->by_id[bucket];
    fs->by_id[bucket] = node;
    bucket = file_bucket(fs, node->device, node->inode);
    node->next_file = fs->by_file[bucket];
    fs->by_file[bucket] = node;
    fs->nodes++;
}

static void take_out(struct fs *fs, struct node *node)
{
    struct node **at = &fs->by_id[id_bucket(fs, node->id)];
    while (*at != node)
        at = &(*at)->next_id;
    *at = node->next_id;
    at = &fs->by_file[file_bucket(fs, node->device, node->inode)];
    while (*at != node)
        at = &(*at)->next_file;
    *at = node->next_file;
    fs->nodes--;
}

/* Descriptors, the newest first. The root keeps its own and is in no list. */

static void unlist(struct fs *fs, struct node *node)
{
    if (node == fs->root || node->fd < 0)
        return;
    *(node->newer ? &node->newer->older : &fs->newest) = node->older;
    *(node->older ? &node->older->newer : &fs->oldest) = node->newer;
    node->newer = node->older = NULL;
}

static void enlist(struct fs *fs, struct node *node)
{
    if (node == fs->root || node->fd < 0)
        return;
    node->older = fs->newest;
    *(fs->newest ? &fs->newest->newer : &fs->oldest) = node;
    fs->newest = node;
}

/* Closing a file that has lost its name gives its blocks back, which takes time that nobody is to wait for the lock. */
static void close_later(struct fs *fs, int fd)
{
    if (fs->closing_count == fs->closing_room) {
        size_t room = fs->closing_room ? 2 * fs->closing_room : 16;
        int *grown = realloc(fs->closing, room * sizeof *grown);
        if (!grown) {
            close(fd);
            return;
        }
        fs->closing = grown;
        fs->closing_room = room;
    }
    fs->closing[fs->closing_count] = fd;
    __atomic_store_n(&fs->closing_count, fs->closing_count + 1, __ATOMIC_RELAXED);
}

static bool has_no_name(int fd)
{
    struct statx status;
    return !statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_NLINK, &status) && !status.stx_nlink;
}

void fs_sweep(struct fs *fs, void (*later)(void *context, int fd), void *context)
{
    if (!__atomic_load_n(&fs->closing_count, __ATOMIC_RELAXED))
        return;
    pthread_mutex_lock(&fs->lock);
    int *closing = fs->closing;
    size_t count = fs->closing_count;
    fs->closing = NULL;
    fs->closing_room = 0;
    __atomic_store_n(&fs->closing_count, 0, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&fs->lock);
    for (size_t i = 0; i < count; i++) {
        if (later && has_no_name(closing[i]))
            later(context, closing[i]);
        else
            close(closing[i]);
    }
    free(closing);
}

static void drop_fd(struct fs *fs, struct node *node)
{
    unlist(fs, node);
    close_later(fs, node->fd);
    node->fd = -1;
    fs->descriptors--;
}

/* Take descriptors from nodes that no request uses now: first from those with a name, which can be opened again, then,
 * since a guest may make any number of them, from those without. A few steps at a time. */
static void evict(struct fs *fs)
{
    for (int nameless = 0; nameless < 2; nameless++) {
        for (int steps = 64; fs->oldest && steps-- && fs->descriptors > fs->descriptors_max;) {
            struct node *node = fs->oldest;
            if (!node->pins && (nameless || node->name)) {
                drop_fd(fs, node);
            } else {
                unlist(fs, node);
                enlist(fs, node);
            }
        }
    }
}

/* A descriptor of the node's file: the node takes it if it has none. What is left to be closed; -1: nothing. */
static int offer_fd(struct fs *fs, struct node *node, int fd)
{
    if (node->fd >= 0)
        return fd;
    node->fd = fd;
    fs->descriptors++;
    enlist(fs, node);
    evict(fs);
    return -1;
}

static bool in_use(const struct fs *fs, const struct node *node)
{
    return node == fs->root || node->lookups || node->pins || node->holds;
}

/* Free a node that nothing uses, then its parent, if it was the last that held it. */
static void collect(struct fs *fs, struct node *node)
{
    while (node && !in_use(fs, node)) {
        struct node *parent = node->parent;
        take_out(fs, node);
        if (node->fd >= 0)
            drop_fd(fs, node);
        free(node->name);
        free(node);
        if (parent)
            parent->holds--;
        node = parent;
    }
}

static void set_place(struct fs *fs, struct node *node, struct node *parent, const char *name)
{
    if (node == fs->root)
        return;
    for (const struct node *above = node->type == S_IFDIR ? parent : NULL; above; above = above->parent)
        if (above == node)
            return; /* a directory below itself: the host moved them meanwhile */
    char *copy = name ? strdup(name) : NULL;
    struct node *before = node->parent;
    parent->holds++;
    node->parent = parent;
    free(node->name);
    node->name = copy;
    if (before) {
        before->holds--;
        collect(fs, before);
    }
}

struct node *node_pin(struct fs *fs, uint64_t id)
{
    pthread_mutex_lock(&fs->lock);
    struct node *node = by_id(fs, id);
    if (node)
        node->pins++;
    pthread_mutex_unlock(&fs->lock);
    return node;
}

void node_unpin(struct fs *fs, struct node *node)
{
    pthread_mutex_lock(&fs->lock);
    node->pins--;
    collect(fs, node);
    pthread_mutex_unlock(&fs->lock);
}

struct step {
    struct node *node; /* pinned */
    char *name;
};

/* Give a node without descriptor its file again. `above` has one. 0 or an errno. */
static int open_again(struct fs *fs, struct node *above, const struct step *step)
{
    struct statx status;
    if (!step->name)
        return ESTALE;
    int fd = openat(above->fd, step->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT || errno == ENOTDIR ? ESTALE : errno;
    int error = fs_status(fd, &status);
    pthread_mutex_lock(&fs->lock);
    if (!error && step->node->adopt && step->node->type == (status.stx_mode & S_IFMT) && !by_file(fs, &status)) {
        struct node *node = step->node;
        take_out(fs, node);
        node->device = device_of(&status);
        node->inode = status.stx_ino;
        node->born = status.stx_btime.tv_sec;
        node->born_ns = status.stx_btime.tv_nsec;
        node->adopt = false;
        insert(fs, node);
    }
    if (!error && !is_file(step->node, &status))
        error = ESTALE;
    if (!error)
        fd = offer_fd(fs, step->node, fd);
    pthread_mutex_unlock(&fs->lock);
    if (fd >= 0)
        close(fd);
    return error;
}

int node_fd(struct fs *fs, struct node *node)
{
    struct step steps[DEPTH_MAX];
    int count = 0, error = 0;
    pthread_mutex_lock(&fs->lock);
    if (node->fd >= 0) {
        unlist(fs, node);
        enlist(fs, node);
        int fd = node->fd;
        pthread_mutex_unlock(&fs->lock);
        return fd;
    }
    struct node *above = node;
    for (; above && above->fd < 0; above = above->parent) {
        if (count == DEPTH_MAX) {
            error = ESTALE;
            break;
        }
        above->pins++;
        steps[count++] = (struct step){above, above->name ? strdup(above->name) : NULL};
    }
    if (above)
        above->pins++;
    pthread_mutex_unlock(&fs->lock);
    struct node *at = above;
    for (int i = count; i-- && !error; at = steps[i].node)
        error = at ? open_again(fs, at, &steps[i]) : ESTALE;
    for (int i = 0; i < count; i++) {
        free(steps[i].name);
        node_unpin(fs, steps[i].node);
    }
    if (above)
        node_unpin(fs, above);
    return error ? -error : node->fd;
}

struct node *node_found(struct fs *fs, int fd, const struct statx *status, struct node *parent, const char *name, int *error)
{
    pthread_mutex_lock(&fs->lock);
    struct node *node = by_file(fs, status);
    if (!node) {
        node = fs->nodes < FS_NODES ? calloc(1, sizeof *node) : NULL;
        if (!node) {
            pthread_mutex_unlock(&fs->lock);
            close(fd);
            *error = ENOMEM;
            return NULL;
        }
        node->id = fs->next_id++;
        node->device = device_of(status);
        node->inode = status->stx_ino;
        node->born = status->stx_btime.tv_sec;
        node->born_ns = status->stx_btime.tv_nsec;
        node->type = status->stx_mode & S_IFMT;
        node->fd = -1;
        insert(fs, node);
    }
    node->pins++;
    node->lookups++;
    set_place(fs, node, parent, name);
    fd = offer_fd(fs, node, fd);
    pthread_mutex_unlock(&fs->lock);
    if (fd >= 0)
        close(fd);
    return node;
}

void node_forget(struct fs *fs, uint64_t id, uint64_t lookups)
{
    pthread_mutex_lock(&fs->lock);
    struct node *node = by_id(fs, id);
    if (node && node != fs->root) {
        node->lookups -= lookups < node->lookups ? lookups : node->lookups;
        collect(fs, node);
    }
    pthread_mutex_unlock(&fs->lock);
}

bool node_is_near(struct fs *fs, uint64_t id)
{
    pthread_mutex_lock(&fs->lock);
    const struct node *node = by_id(fs, id);
    bool near = !node || node->device == fs->root->device;
    pthread_mutex_unlock(&fs->lock);
    return near;
}

struct node *node_named(struct fs *fs, int fd)
{
    struct statx status;
    if (fd < 0)
        return NULL;
    struct node *node = NULL;
    if (!fs_status(fd, &status)) {
        pthread_mutex_lock(&fs->lock);
        node = by_file(fs, &status);
        if (node) {
            node->pins++;
            fd = offer_fd(fs, node, fd);
        }
        pthread_mutex_unlock(&fs->lock);
    }
    if (fd >= 0)
        close(fd);
    return node;
}

void node_unnamed(struct fs *fs, struct node *node, const struct node *parent, const char *name)
{
    pthread_mutex_lock(&fs->lock);
    if (node->parent == parent && node->name && !strcmp(node->name, name)) {
        free(node->name);
        node->name = NULL;
    }
    pthread_mutex_unlock(&fs->lock);
}

void node_renamed(struct fs *fs, struct node *node, struct node *parent, const char *name)
{
    pthread_mutex_lock(&fs->lock);
    set_place(fs, node, parent, name);
    pthread_mutex_unlock(&fs->lock);
}

/* Open files. */

static struct file *file_of(const struct fs *fs, uint64_t handle)
{
    uint64_t index = handle & 0xFFFFFFFF;
    struct file *file = index < fs->files_room ? fs->files[index] : NULL;
    return file && !file->removed && file->generation == handle >> 32 ? file : NULL;
}

/* Room for a file at `index`, or at any place. -1: none. */
static int64_t file_place(struct fs *fs, int64_t index)
{
    if (fs->files_count >= fs->files_max)
        return -1;
    if (index < 0) {
        for (index = (int64_t)fs->files_hint; (size_t)index < fs->files_room && fs->files[index]; index++)
            ;
        fs->files_hint = (size_t)index;
    }
    if ((size_t)index >= fs->files_max)
        return -1;
    if ((size_t)index >= fs->files_room) {
        size_t room = (size_t)index + 64;
        struct file **files = realloc(fs->files, room * sizeof *files);
        if (!files)
            return -1;
        memset(files + fs->files_room, 0, (room - fs->files_room) * sizeof *files);
        fs->files = files;
        fs->files_room = room;
    }
    return fs->files[index] ? -1 : index;
}

static int file_put(struct fs *fs, struct node *node, int fd, uint32_t flags, bool directory, int64_t wanted,
                    uint32_t generation, uint64_t *handle)
{
    struct file *file = calloc(1, sizeof *file);
    pthread_mutex_lock(&fs->lock);
    int64_t index = file ? file_place(fs, wanted) : -1;
    if (index < 0) {
        pthread_mutex_unlock(&fs->lock);
        free(file);
        if (fd >= 0)
            close(fd);
        return file ? ENFILE : ENOMEM;
    }
    *file = (struct file){.fd = fd, .directory = directory, .append = flags & O_APPEND, .flags = flags,
                          .generation = generation ? generation : fs->next_generation++, .node = node};
    if (!fs->next_generation)
        fs->next_generation = 1;
    pthread_mutex_init(&file->lock, NULL);
    node->holds++;
    fs->files[index] = file;
    fs->files_count++;
    *handle = (uint64_t)index | (uint64_t)file->generation << 32;
    pthread_mutex_unlock(&fs->lock);
    return 0;
}

int file_new(struct fs *fs, struct node *node, int fd, uint32_t flags, bool directory, uint64_t *handle)
{
    return file_put(fs, node, fd, flags, directory, -1, 0, handle);
}

static void file_free(struct fs *fs, struct file *file)
{
    file->node->holds--;
    collect(fs, file->node);
    if (file->fd >= 0)
        close_later(fs, file->fd);
    pthread_mutex_destroy(&file->lock);
    free(file);
}

struct file *file_pin(struct fs *fs, uint64_t handle, bool directory)
{
    pthread_mutex_lock(&fs->lock);
    struct file *file = file_of(fs, handle);
    if (file && file->directory != directory)
        file = NULL;
    bool closed = file && file->fd < 0;
    if (file) {
        file->pins++;
        if (closed)
            file->node->pins++;
    }
    pthread_mutex_unlock(&fs->lock);
    if (!closed)
        return file;
    /* Saved in another process and not used since. */
    int path = node_fd(fs, file->node);
    int fd = path < 0 ? -1 : open(fd_path(path).text, (int)(file->flags & ~(unsigned)(O_APPEND | O_TRUNC)) | O_CLOEXEC);
    pthread_mutex_lock(&fs->lock);
    if (file->fd < 0 && fd >= 0) {
        file->fd = fd;
        fd = -1;
    }
    file->node->pins--;
    pthread_mutex_unlock(&fs->lock);
    if (fd >= 0)
        close(fd);
    return file;
}

void file_unpin(struct fs *fs, struct file *file)
{
    pthread_mutex_lock(&fs->lock);
    if (!--file->pins && file->removed)
        file_free(fs, file);
    pthread_mutex_unlock(&fs->lock);
}

int file_release(struct fs *fs, uint64_t handle)
{
    pthread_mutex_lock(&fs->lock);
    struct file *file = file_of(fs, handle);
    if (file) {
        fs->files[handle & 0xFFFFFFFF] = NULL;
        if ((handle & 0xFFFFFFFF) < fs->files_hint)
            fs->files_hint = handle & 0xFFFFFFFF;
        fs->files_count--;
        file->removed = true;
        if (!file->pins)
            file_free(fs, file);
    }
    pthread_mutex_unlock(&fs->lock);
    return file ? 0 : EBADF;
}

/* Life. */

/* A file system that answers from memory and this host's disks. One that is not known may wait for anybody. */
static bool is_local(int fd)
{
    static const unsigned long known[] = {EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC,
                                          TMPFS_MAGIC, OVERLAYFS_SUPER_MAGIC};
    struct statfs status;
    if (fstatfs(fd, &status))
        return false;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if ((unsigned long)status.f_type == known[i])
            return true;
    return false;
}

int nodes_open(struct fs *fs, int root)
{
    struct statx status;
    int error = fs_status(root, &status);
    struct node *node = calloc(1, sizeof *node);
    fs->buckets = 256;
    fs->by_id = calloc(fs->buckets, sizeof *fs->by_id);
    fs->by_file = calloc(fs->buckets, sizeof *fs->by_file);
    if (error || !node || !fs->by_id || !fs->by_file || !S_ISDIR(status.stx_mode)) {
        free(node);
        close(root);
        return error ? error : !node || !fs->by_id || !fs->by_file ? ENOMEM : ENOTDIR;
    }
    *node = (struct node){.id = FUSE_ROOT_ID, .device = device_of(&status), .inode = status.stx_ino, .fd = root,
                          .born = status.stx_btime.tv_sec, .born_ns = status.stx_btime.tv_nsec, .type = S_IFDIR};
    fs->next_id = FUSE_ROOT_ID + 1;
    fs->next_generation = 1;
    fs->local = is_local(root);
    fs->root = node;
    insert(fs, node);
    return 0;
}

void nodes_clear(struct fs *fs)
{
    if (!fs->root)
        return;
    pthread_mutex_lock(&fs->lock);
    for (size_t i = 0; i < fs->files_room; i++) {
        if (fs->files[i]) {
            file_free(fs, fs->files[i]);
            fs->files[i] = NULL;
        }
    }
    fs->files_count = fs->files_hint = 0;
    for (size_t i = 0; i < fs->buckets; i++) {
        struct node *node = fs->by_id[i];
        fs->by_id[i] = fs->by_file[i] = NULL;
        while (node) {
            struct node *next = node->next_id;
            if (node != fs->root) {
                if (node->fd >= 0)
                    close(node->fd);
                free(node->name);
                free(node);
            }
            node = next;
        }
    }
    fs->newest = fs->oldest = NULL;
    fs->nodes = fs->descriptors = 0;
    fs->root->holds = fs->root->pins = 0;
    insert(fs, fs->root);
    pthread_mutex_unlock(&fs->lock);
    fs_sweep(fs, NULL, NULL);
}

void nodes_close(struct fs *fs)
{
    nodes_clear(fs);
    if (fs->root)
        close(fs->root->fd);
    free(fs->root);
    free(fs->by_id);
    free(fs->by_file);
    free(fs->files);
    fs->root = NULL;
    fs->by_id = fs->by_file = NULL;
    fs->files = NULL;
    fs->files_room = 0;
}

int node_restore(struct fs *fs, const struct node *saved, uint64_t parent, const char *name)
{
    struct node *above = by_id(fs, parent), *node = calloc(1, sizeof *node);
    /* Only directories have something below them, so that parents make no circle; and numbers do not run out. */
    if (!above || above->type != S_IFDIR || !node || by_id(fs, saved->id) || saved->id <= FUSE_ROOT_ID ||
        saved->id > INT64_MAX || fs->nodes >= FS_NODES) {
        free(node);
        return -1;
    }
    *node = *saved;
    node->fd = -1;
    node->newer = node->older = NULL;
    node->parent = NULL;
    node->name = NULL;
    node->pins = node->holds = 0;
    insert(fs, node);
    set_place(fs, node, above, name);
    if (node->id >= fs->next_id)
        fs->next_id = node->id + 1;
    return 0;
}

int file_restore(struct fs *fs, uint64_t handle, uint64_t id, uint32_t flags, bool directory)
{
    struct node *node = by_id(fs, id);
    uint64_t made;
    if (!node || !(handle >> 32) || (directory ? S_IFDIR : S_IFREG) != node->type ||
        flags & ~(uint32_t)(directory ? 0 : OPEN_FLAGS | O_APPEND) ||
        file_put(fs, node, -1, flags, directory, (int64_t)(handle & 0xFFFFFFFF), (uint32_t)(handle >> 32), &made))
        return -1;
    if (handle >> 32 >= fs->next_generation)
        fs->next_generation = (uint32_t)(handle >> 32) + 1;
    if (!fs->next_generation)
        fs->next_generation = 1;
    return 0;
}
