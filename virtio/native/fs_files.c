/* FUSE requests about open files and directories. Threads of FsEngine. */
#define _GNU_SOURCE
#include "fs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int reply_open(struct call *call, struct node *node, int fd, uint32_t flags, bool directory)
{
    struct fuse_open_out *out = CALL_OUT(call, fuse_open_out);
    if (!out) {
        close(fd);
        return EINVAL;
    }
    int error = file_new(call->fs, node, fd, flags, directory, &out->fh);
    out->open_flags = call->fs->keep_cache ? (directory ? FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE : FOPEN_KEEP_CACHE) : 0;
    return error;
}

/* Open the file of a pinned node. -errno. `quick`: -FS_LATER if another program has a lease on it (fcntl(2)), which may
 * take as long to give back as the host allows. */
static int open_node(struct fs *fs, struct node *node, uint32_t flags, bool directory, bool quick)
{
    bool writes = (flags & O_ACCMODE) != O_RDONLY || flags & O_TRUNC;
    /* Opening a pipe may block, and opening a device may do anything: the guest's kernel opens its own instead. */
    if (node->type != (directory ? S_IFDIR : S_IFREG))
        return directory ? -ENOTDIR : node->type == S_IFDIR ? -EISDIR : -ENXIO;
    if (writes && fs->read_only)
        return -EROFS;
    int path = node_fd(fs, node);
    if (path < 0)
        return path;
    int how = (directory ? O_RDONLY | O_DIRECTORY : (int)flags & OPEN_FLAGS) | O_CLOEXEC;
    int fd = open(fd_path(path).text, how | (quick ? O_NONBLOCK : 0));
    if (fd < 0)
        return quick && errno == EWOULDBLOCK ? -FS_LATER : -errno;
    if (quick && !(how & O_NONBLOCK))
        fcntl(fd, F_SETFL, how & ~O_NONBLOCK);
    return fd;
}

int fs_open(struct call *call)
{
    const struct fuse_open_in *in = CALL_IN(call, fuse_open_in);
    bool directory = call->in.opcode == FUSE_OPENDIR;
    if (!in)
        return EINVAL;
    if (call->quick && !directory && in->flags & O_TRUNC)
        return FS_LATER;
    struct node *node = node_pin(call->fs, call->in.nodeid);
    if (!node)
        return ESTALE;
    uint32_t flags = directory ? 0 : in->flags & (OPEN_FLAGS | O_APPEND);
    int fd = open_node(call->fs, node, flags, directory, call->quick);
    int error = fd < 0 ? -fd : reply_open(call, node, fd, flags, directory);
    node_unpin(call->fs, node);
    return error;
}

int fs_create(struct call *call)
{
    struct fs *fs = call->fs;
    const struct fuse_create_in *in = CALL_IN(call, fuse_create_in);
    struct fuse_entry_out *entry = CALL_OUT(call, fuse_entry_out);
    struct node *parent, *node = NULL;
    struct statx status;
    int error = EINVAL;
    const char *name = in ? call_name(call, &error) : NULL;
    if (!in || !entry || call->room < sizeof *entry + sizeof(struct fuse_open_out))
        return EINVAL;
    if (!name)
        return error;
    if (fs->read_only)
        return EROFS;
    if (!(parent = node_pin(fs, call->in.nodeid)))
        return ESTALE;
    uint32_t flags = in->flags & (OPEN_FLAGS | O_APPEND);
    int directory = parent->type == S_IFDIR ? node_fd(fs, parent) : -ENOTDIR, fd = -1;
    error = directory < 0 ? -directory : 0;
    if (!error) {
        fd = openat(directory, name, ((int)flags & OPEN_FLAGS) | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, in->mode & 07777);
        if (fd >= 0)
            finish_new(call, fd, directory, in->mode);
        else if (errno != EEXIST || in->flags & O_EXCL)
            error = errno;
        else if (call->quick && flags & O_TRUNC)
            error = FS_LATER;
    }
    if (!error) {
        if (fd >= 0) { /* the file that was made: another may have its name already */
            int path = open(fd_path(fd).text, O_PATH | O_CLOEXEC);
            error = path < 0 ? errno : fs_status(path, &status);
            if (!error)
                node = node_found(fs, path, &status, parent, name, &error);
            else if (path >= 0)
                close(path);
        } else { /* it was there already */
            error = lookup_at(fs, parent, directory, name, call->quick, &node, &status);
            if (!error) {
                fd = open_node(fs, node, flags, false, call->quick);
                error = fd < 0 ? -fd : fs_status(fd, &status);
            }
        }
        if (!error) {
            fill_entry(fs, entry, node, &status);
            error = reply_open(call, node, fd, flags, false);
            fd = -1;
        }
        if (node && error)
            node_forget(fs, node->id, 1);
        if (node)
            node_unpin(fs, node);
    }
    if (fd >= 0)
        close(fd);
    node_unpin(fs, parent);
    return error;
}

enum { QUICK_BYTES = 256 << 10 /* what a vCPU's thread moves at most: it takes some 50 us */ };

static bool ends_at(int fd, uint64_t offset)
{
    struct statx status;
    return !statx(fd, "", AT_EMPTY_PATH, STATX_SIZE, &status) && status.stx_size <= offset;
}

int fs_read(struct call *call)
{
    const struct fuse_read_in *in = CALL_IN(call, fuse_read_in);
    const struct chain *chain = &call->request->chain;
    struct iovec iov[FS_IOVS];
    if (!in || in->size > FS_TRANSFER || in->size > call->room || in->offset > INT64_MAX)
        return EINVAL;
    if (call->quick && in->size > QUICK_BYTES)
        return FS_LATER;
    struct file *file = file_pin(call->fs, in->fh, false);
    if (!file)
        return EBADF;
    uint32_t count = segments_iovs(chain->segments + chain->readable, chain->writable, sizeof(struct fuse_out_header),
                                   in->size, iov, FS_IOVS);
    ssize_t got = preadv2(file->fd, iov, (int)count, (off_t)in->offset, call->quick ? RWF_NOWAIT : 0);
    int error = got < 0 ? file->fd < 0 ? ESTALE : errno : 0;
    if (call->quick && (error || ((size_t)got < in->size && !ends_at(file->fd, in->offset + (uint64_t)got))))
        error = FS_LATER; /* the page cache has only a part of it */
    file_unpin(call->fs, file);
    if (!error) {
        call->placed = true;
        call->replied = call->request->moved = (size_t)got;
    }
    return error;
}

int fs_write(struct call *call)
{
    const struct fuse_write_in *in = CALL_IN(call, fuse_write_in);
    const struct chain *chain = &call->request->chain;
    struct fuse_write_out *out = CALL_OUT(call, fuse_write_out);
    struct iovec iov[FS_IOVS];
    uint64_t skip = sizeof call->in + sizeof *in;
    if (!in || !out || in->size > FS_TRANSFER || chain->readable_length < skip + in->size || in->offset > INT64_MAX)
        return EINVAL;
    if (call->fs->read_only)
        return EROFS;
    if (call->quick && in->size > QUICK_BYTES)
        return FS_LATER;
    struct file *file = file_pin(call->fs, in->fh, false);
    if (!file)
        return EBADF;
    int count = (int)segments_iovs(chain->segments, chain->readable, skip, in->size, iov, FS_IOVS), error = 0;
    /* Pages that the guest's cache writes back go to their place, whichever open file they come by. */
    bool append = file->append && !(in->write_flags & FUSE_WRITE_CACHE);
    ssize_t done = append ? pwritev2(file->fd, iov, count, (off_t)in->offset, RWF_APPEND)
                          : pwritev(file->fd, iov, count, (off_t)in->offset);
    if (done < 0)
        error = file->fd < 0 ? ESTALE : errno;
    else
        out->size = (uint32_t)(call->request->moved = (uint64_t)done);
    file_unpin(call->fs, file);
    return error;
}

/* An entry as getdents64(2) has it. */
struct entry {
    uint64_t inode;
    int64_t next;
    uint16_t length;
    uint8_t type;
    char name[];
} __attribute__((packed));

/* One entry of the directory into the reply; false: it does not fit. */
static bool add_entry(struct call *call, struct file *file, const struct entry *entry, bool plus)
{
    size_t name = strlen(entry->name);
    size_t size = (sizeof(struct fuse_dirent) + name + 7) & ~(size_t)7;
    bool dots = !strcmp(entry->name, ".") || !strcmp(entry->name, "..");
    uint8_t *at = call_room(call, size + (plus ? sizeof(struct fuse_entry_out) : 0));
    if (!at)
        return false;
    if (plus) {
        struct node *node;
        struct statx status;
        if (!dots && !lookup_at(call->fs, file->node, file->fd, entry->name, false, &node, &status)) {
            fill_entry(call->fs, (struct fuse_entry_out *)at, node, &status);
            node_unpin(call->fs, node);
        }
        at += sizeof(struct fuse_entry_out);
    }
    /* What is above the shared directory is not told, not even its number. */
    *(struct fuse_dirent *)at = (struct fuse_dirent){.ino = strcmp(entry->name, "..") ? entry->inode : file->node->inode,
                                                     .off = (uint64_t)entry->next, .namelen = (uint32_t)name,
                                                     .type = entry->type};
    memcpy(at + sizeof(struct fuse_dirent), entry->name, name);
    return true;
}

int fs_readdir(struct call *call)
{
    enum { PART = 16 << 10 };
    const struct fuse_read_in *in = CALL_IN(call, fuse_read_in);
    bool plus = call->in.opcode == FUSE_READDIRPLUS;
    _Alignas(8) char buffer[PART];
    if (!in || in->offset > INT64_MAX)
        return EINVAL;
    if (call->room > in->size)
        call->room = in->size;
    struct file *file = file_pin(call->fs, in->fh, true);
    if (!file)
        return EBADF;
    pthread_mutex_lock(&file->lock); /* the position is one for all who read it */
    int error = file->fd < 0 ? ESTALE : lseek(file->fd, (off_t)in->offset, SEEK_SET) < 0 ? errno : 0;
    for (bool full = false; !error && !full;) {
        long got = syscall(SYS_getdents64, file->fd, buffer, PART);
        if (got <= 0) {
            if (got < 0 && !call->replied)
                error = errno;
            break;
        }
        for (long at = 0; at < got && !full; at += ((const struct entry *)(buffer + at))->length)
            full = !add_entry(call, file, (const struct entry *)(buffer + at), plus);
        if (full && !call->replied)
            error = EINVAL; /* an empty reply would mean the end */
    }
    pthread_mutex_unlock(&file->lock);
    file_unpin(call->fs, file);
    return error;
}

int fs_release(struct call *call)
{
    const struct fuse_release_in *in = CALL_IN(call, fuse_release_in);
    return in ? file_release(call->fs, in->fh) : EINVAL;
}

int fs_fsync(struct call *call)
{
    if (call->in.opcode == FUSE_SYNCFS) {
        int fd = openat(call->fs->root->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        int error = fd < 0 || syncfs(fd) ? errno : 0;
        if (fd >= 0)
            close(fd);
        return error;
    }
    const struct fuse_fsync_in *in = CALL_IN(call, fuse_fsync_in);
    struct file *file = in ? file_pin(call->fs, in->fh, call->in.opcode == FUSE_FSYNCDIR) : NULL;
    if (!file)
        return in ? EBADF : EINVAL;
    int error = (in->flags & FUSE_FSYNC_FDATASYNC ? fdatasync(file->fd) : fsync(file->fd)) ? errno : 0;
    file_unpin(call->fs, file);
    return error;
}

int fs_fallocate(struct call *call)
{
    const struct fuse_fallocate_in *in = CALL_IN(call, fuse_fallocate_in);
    if (!in || in->offset > INT64_MAX || in->length > INT64_MAX)
        return EINVAL;
    if (call->fs->read_only)
        return EROFS;
    struct file *file = file_pin(call->fs, in->fh, false);
    if (!file)
        return EBADF;
    int error = fallocate(file->fd, (int)in->mode, (off_t)in->offset, (off_t)in->length) ? errno : 0;
    file_unpin(call->fs, file);
    return error;
}

int fs_lseek(struct call *call)
{
    const struct fuse_lseek_in *in = CALL_IN(call, fuse_lseek_in);
    struct fuse_lseek_out *out = CALL_OUT(call, fuse_lseek_out);
    if (!in || !out || (in->whence != SEEK_DATA && in->whence != SEEK_HOLE))
        return EINVAL;
    struct file *file = file_pin(call->fs, in->fh, false);
    if (!file)
        return EBADF;
    off_t at = lseek(file->fd, (off_t)in->offset, (int)in->whence);
    int error = at < 0 ? errno : 0;
    out->offset = (uint64_t)at;
    file_unpin(call->fs, file);
    return error;
}

int fs_copy(struct call *call)
{
    const struct fuse_copy_in *in = CALL_IN(call, fuse_copy_in);
    struct fuse_write_out *out = CALL_OUT(call, fuse_write_out);
    if (!in || !out || in->flags || in->off_in > INT64_MAX || in->off_out > INT64_MAX)
        return EINVAL;
    if (call->fs->read_only)
        return EROFS;
    struct file *from = file_pin(call->fs, in->fh_in, false), *to = file_pin(call->fs, in->fh_out, false);
    int error = EBADF;
    if (from && to) {
        loff_t read_at = (loff_t)in->off_in, write_at = (loff_t)in->off_out;
        ssize_t done = copy_file_range(from->fd, &read_at, to->fd, &write_at, in->len < FS_COPY ? in->len : FS_COPY, 0);
        error = done < 0 ? errno : 0;
        out->size = error ? 0 : (uint32_t)done;
    }
    if (from)
        file_unpin(call->fs, from);
    if (to)
        file_unpin(call->fs, to);
    return error;
}
