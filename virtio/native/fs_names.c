/* FUSE requests about names and attributes. Threads of FsEngine. */
#define _GNU_SOURCE
#include "fs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#define NS 1000000000u

static uint32_t shown_uid(const struct fs *fs, uint32_t uid)
{
    return fs->map_owner && uid == geteuid() ? fs->uid : uid;
}

static uint32_t shown_gid(const struct fs *fs, uint32_t gid)
{
    return fs->map_owner && gid == getegid() ? fs->gid : gid;
}

static void fill_attr(const struct fs *fs, struct fuse_attr *attr, const struct statx *status)
{
    *attr = (struct fuse_attr){
        .ino = status->stx_ino,
        .size = status->stx_size,
        .blocks = status->stx_blocks,
        .atime = (uint64_t)status->stx_atime.tv_sec,
        .mtime = (uint64_t)status->stx_mtime.tv_sec,
        .ctime = (uint64_t)status->stx_ctime.tv_sec,
        .atimensec = status->stx_atime.tv_nsec,
        .mtimensec = status->stx_mtime.tv_nsec,
        .ctimensec = status->stx_ctime.tv_nsec,
        .mode = status->stx_mode,
        .nlink = status->stx_nlink,
        .uid = shown_uid(fs, status->stx_uid),
        .gid = shown_gid(fs, status->stx_gid),
        /* Linux' encoding of a device number in 32 bits: minor 0 to 7, major, minor 8 to 19. */
        .rdev = (status->stx_rdev_minor & 0xFF) | (status->stx_rdev_major & 0xFFF) << 8 |
                (status->stx_rdev_minor & ~0xFFu) << 12,
        .blksize = status->stx_blksize,
    };
}

void fill_entry(const struct fs *fs, struct fuse_entry_out *entry, const struct node *node, const struct statx *status)
{
    entry->nodeid = node->id;
    entry->entry_valid = entry->attr_valid = fs->valid_ns / NS;
    entry->entry_valid_nsec = entry->attr_valid_nsec = (uint32_t)(fs->valid_ns % NS);
    fill_attr(fs, &entry->attr, status);
}

static int reply_attr(struct call *call, const struct statx *status)
{
    struct fuse_attr_out *out = CALL_OUT(call, fuse_attr_out);
    if (!out)
        return EINVAL;
    out->attr_valid = call->fs->valid_ns / NS;
    out->attr_valid_nsec = (uint32_t)(call->fs->valid_ns % NS);
    fill_attr(call->fs, &out->attr, status);
    return 0;
}

int lookup_at(struct fs *fs, struct node *parent, int directory, const char *name, bool near, struct node **found,
              struct statx *status)
{
    int error = 0, fd = path_open(directory, name, near);
    if (fd < 0)
        return -fd;
    error = fs_status(fd, status);
    if (error) {
        close(fd);
        return error;
    }
    *found = node_found(fs, fd, status, parent, name, &error);
    return error;
}

/* The directory that a request names, pinned, with its descriptor. 0 or an errno. */
static int directory_of(struct fs *fs, uint64_t id, struct node **node, int *fd)
{
    *node = node_pin(fs, id);
    if (!*node)
        return ESTALE;
    *fd = (*node)->type == S_IFDIR ? node_fd(fs, *node) : -ENOTDIR;
    if (*fd >= 0)
        return 0;
    node_unpin(fs, *node);
    return -*fd;
}

/* Look a name up for a reply that is an entry. `near`: only if it is on the shared directory's file system. */
static int reply_entry(struct call *call, struct node *parent, int directory, const char *name, bool near)
{
    struct node *node;
    struct statx status;
    struct fuse_entry_out *entry = CALL_OUT(call, fuse_entry_out);
    if (!entry)
        return EINVAL;
    int error = lookup_at(call->fs, parent, directory, name, near, &node, &status);
    if (error)
        return error;
    fill_entry(call->fs, entry, node, &status);
    node_unpin(call->fs, node);
    return 0;
}

int fs_lookup(struct call *call)
{
    int error, directory;
    struct node *parent;
    const char *name = call_name(call, &error);
    if (!name || (error = directory_of(call->fs, call->in.nodeid, &parent, &directory)))
        return error;
    error = reply_entry(call, parent, directory, name, call->quick);
    node_unpin(call->fs, parent);
    return error;
}

int fs_getattr(struct call *call)
{
    struct statx status;
    struct node *node = node_pin(call->fs, call->in.nodeid);
    if (!node)
        return ESTALE;
    int error = 0, fd = node_fd(call->fs, node);
    if (fd < 0) {
        /* It may have lost its name but be open. */
        const struct fuse_getattr_in *in = CALL_IN(call, fuse_getattr_in);
        struct file *file = in && in->flags & FUSE_GETATTR_FH ? file_pin(call->fs, in->fh, node->type == S_IFDIR) : NULL;
        error = !file || file->fd < 0 ? -fd : fs_status(file->fd, &status);
        if (file)
            file_unpin(call->fs, file);
    } else {
        error = fs_status(fd, &status);
    }
    node_unpin(call->fs, node);
    return error ? error : reply_attr(call, &status);
}

static int set_owner(const struct call *call, int fd, const struct fuse_setattr_in *in)
{
    const struct fs *fs = call->fs;
    bool uid = in->valid & FATTR_UID, gid = in->valid & FATTR_GID;
    struct statx status;
    int error = fs_status(fd, &status);
    if (error)
        return error;
    if (fs->own_ids)
        return fchownat(fd, "", uid ? in->uid : (uid_t)-1, gid ? in->gid : (gid_t)-1, AT_EMPTY_PATH) ? errno : 0;
    /* This process cannot give files away; that a file stays whose it is is no change. */
    return (uid && in->uid != shown_uid(fs, status.stx_uid)) || (gid && in->gid != shown_gid(fs, status.stx_gid)) ? EPERM : 0;
}

static int set_size(struct call *call, const struct node *node, int fd, const struct fuse_setattr_in *in)
{
    if (node->type != S_IFREG)
        return EINVAL;
    if (in->size > INT64_MAX)
        return EFBIG;
    if (in->valid & FATTR_FH) {
        struct file *file = file_pin(call->fs, in->fh, false);
        int error = !file || file->node != node ? EBADF : ftruncate(file->fd, (off_t)in->size) ? errno : 0;
        if (file)
            file_unpin(call->fs, file);
        return error;
    }
    return truncate(fd_path(fd).text, (off_t)in->size) ? errno : 0;
}

static struct timespec time_of(uint32_t valid, uint32_t set, uint32_t now, uint64_t seconds, uint32_t ns)
{
    if (valid & now)
        return (struct timespec){0, UTIME_NOW};
    return valid & set ? (struct timespec){(time_t)seconds, ns < NS ? ns : 0} : (struct timespec){0, UTIME_OMIT};
}

static int change(struct call *call, struct node *node, int fd, const struct fuse_setattr_in *in)
{
    int error = 0;
    if (in->valid & FATTR_MODE) {
        if (node->type == S_IFLNK)
            return EOPNOTSUPP;
        if (chmod(fd_path(fd).text, in->mode & 07777))
            return errno;
    }
    if (in->valid & (FATTR_UID | FATTR_GID) && (error = set_owner(call, fd, in)))
        return error;
    if (in->valid & FATTR_SIZE && (error = set_size(call, node, fd, in)))
        return error;
    if (in->valid & (FATTR_ATIME | FATTR_MTIME)) {
        struct timespec times[] = {time_of(in->valid, FATTR_ATIME, FATTR_ATIME_NOW, in->atime, in->atimensec),
                                   time_of(in->valid, FATTR_MTIME, FATTR_MTIME_NOW, in->mtime, in->mtimensec)};
        if (node->type == S_IFLNK ? utimensat(fd, "", times, AT_EMPTY_PATH) : utimensat(AT_FDCWD, fd_path(fd).text, times, 0))
            return errno;
    }
    return 0;
}

int fs_setattr(struct call *call)
{
    const struct fuse_setattr_in *in = CALL_IN(call, fuse_setattr_in);
    struct statx status;
    if (!in)
        return EINVAL;
    if (call->fs->read_only)
        return EROFS;
    if (call->quick && in->valid & FATTR_SIZE)
        return FS_LATER;
    struct node *node = node_pin(call->fs, call->in.nodeid);
    if (!node)
        return ESTALE;
    int fd = node_fd(call->fs, node);
    int error = fd < 0 ? -fd : change(call, node, fd, in);
    if (!error)
        error = fs_status(fd, &status);
    node_unpin(call->fs, node);
    return error ? error : reply_attr(call, &status);
}

int fs_readlink(struct call *call)
{
    struct node *node = node_pin(call->fs, call->in.nodeid);
    if (!node)
        return ESTALE;
    int fd = node->type == S_IFLNK ? node_fd(call->fs, node) : -EINVAL, error = fd < 0 ? -fd : 0;
    if (!error) {
        size_t room = call->room < FS_REPLY ? call->room : FS_REPLY;
        ssize_t got = readlinkat(fd, "", (char *)call->reply, room);
        if (got < 0)
            error = errno;
        else
            call->replied = (size_t)got;
    }
    node_unpin(call->fs, node);
    return error;
}

void finish_new(const struct call *call, int fd, int directory, mode_t mode)
{
    struct statx above;
    bool inherits = !fs_status(directory, &above) && above.stx_mode & S_ISGID;
    if (call->fs->own_ids && fchownat(fd, "", call->in.uid, inherits ? (gid_t)-1 : call->in.gid, AT_EMPTY_PATH))
        return; /* it keeps the owner that the host gave it */
    if (inherits && call->in.opcode == FUSE_MKDIR)
        mode |= S_ISGID; /* the host's kernel gave it to the new directory */
    /* A change of owner takes the set-user-ID bits away; and a thread may have had to apply a foreign umask. */
    if ((call->fs->own_ids && mode & 06000) || __atomic_load_n(&call->fs->fix_modes, __ATOMIC_RELAXED))
        (void)!chmod(fd_path(fd).text, mode & 07777);
}

/* Make what MKNOD, MKDIR or SYMLINK ask for. */
static int make(struct call *call, int directory, const char **name, mode_t *mode)
{
    int error;
    if (call->in.opcode == FUSE_MKDIR) {
        const struct fuse_mkdir_in *in = CALL_IN(call, fuse_mkdir_in);
        if (!in)
            return EINVAL;
        *mode = in->mode & 07777;
        if (!(*name = call_name(call, &error)))
            return error;
        return mkdirat(directory, *name, *mode) ? errno : 0;
    }
    if (call->in.opcode == FUSE_SYMLINK) {
        if (!(*name = call_name(call, &error)))
            return error;
        const char *target = (const char *)call->arguments;
        size_t length = strnlen(target, call->length);
        if (!length || length == call->length)
            return EINVAL;
        return symlinkat(target, directory, *name) ? errno : 0;
    }
    const struct fuse_mknod_in *in = CALL_IN(call, fuse_mknod_in);
    if (!in)
        return EINVAL;
    *mode = in->mode;
    if (!(*name = call_name(call, &error)))
        return error;
    /* A device would be one of the host's. */
    if (!S_ISREG(in->mode) && !S_ISFIFO(in->mode) && !S_ISSOCK(in->mode))
        return EPERM;
    return mknodat(directory, *name, in->mode, 0) ? errno : 0;
}

static int make_link(struct call *call, int directory, const char **name)
{
    int error;
    const struct fuse_link_in *in = CALL_IN(call, fuse_link_in);
    if (!in)
        return EINVAL;
    if (!(*name = call_name(call, &error)))
        return error;
    struct node *node = node_pin(call->fs, in->oldnodeid);
    if (!node)
        return ESTALE;
    int fd = node->type == S_IFDIR ? -EPERM : node_fd(call->fs, node);
    error = fd < 0 ? -fd : linkat(AT_FDCWD, fd_path(fd).text, directory, *name, AT_SYMLINK_FOLLOW) ? errno : 0;
    node_unpin(call->fs, node);
    return error;
}

int fs_make(struct call *call)
{
    int directory, error;
    struct node *parent;
    const char *name;
    mode_t mode = 0;
    if (call->fs->read_only)
        return EROFS;
    if (call->room < sizeof(struct fuse_entry_out))
        return EINVAL;
    if ((error = directory_of(call->fs, call->in.nodeid, &parent, &directory)))
        return error;
    error = call->in.opcode == FUSE_LINK ? make_link(call, directory, &name) : make(call, directory, &name, &mode);
    if (!error && call->in.opcode != FUSE_LINK) {
        int fd = openat(directory, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
        if (fd >= 0) {
            finish_new(call, fd, directory, mode);
            close(fd);
        }
    }
    if (!error)
        error = reply_entry(call, parent, directory, name, false);
    node_unpin(call->fs, parent);
    return error;
}

int fs_remove(struct call *call)
{
    int directory, error;
    struct node *parent;
    const char *name = call_name(call, &error);
    if (!name)
        return error;
    if (call->fs->read_only)
        return EROFS;
    if ((error = directory_of(call->fs, call->in.nodeid, &parent, &directory)))
        return error;
    /* The guest may have it open: it keeps its descriptor when its name is gone. */
    int fd = path_open(directory, name, call->quick);
    struct node *node = node_named(call->fs, fd);
    error = fd == -FS_LATER ? FS_LATER
            : unlinkat(directory, name, call->in.opcode == FUSE_RMDIR ? AT_REMOVEDIR : 0) ? errno : 0;
    if (node) {
        if (!error)
            node_unnamed(call->fs, node, parent, name);
        node_unpin(call->fs, node);
    }
    node_unpin(call->fs, parent);
    return error;
}

/* The node that now has this name is told so. */
static void moved(struct fs *fs, struct node *parent, int directory, const char *name)
{
    struct node *node = node_named(fs, path_open(directory, name, false));
    if (node) {
        node_renamed(fs, node, parent, name);
        node_unpin(fs, node);
    }
}

int fs_rename(struct call *call)
{
    uint64_t target;
    uint32_t flags = 0;
    int error, from, to;
    struct node *source, *parent;
    if (call->in.opcode == FUSE_RENAME2) {
        const struct fuse_rename2_in *in = CALL_IN(call, fuse_rename2_in);
        if (!in)
            return EINVAL;
        target = in->newdir;
        flags = in->flags;
    } else {
        const struct fuse_rename_in *in = CALL_IN(call, fuse_rename_in);
        if (!in)
            return EINVAL;
        target = in->newdir;
    }
    const char *old = call_name(call, &error), *new = old ? call_name(call, &error) : NULL;
    if (!new)
        return error;
    if (call->fs->read_only)
        return EROFS;
    if (flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE)) /* a whiteout is a device */
        return EINVAL;
    if ((error = directory_of(call->fs, call->in.nodeid, &source, &from)))
        return error;
    if ((error = directory_of(call->fs, target, &parent, &to))) {
        node_unpin(call->fs, source);
        return error;
    }
    struct node *replaced = node_named(call->fs, path_open(to, new, false));
    error = syscall(SYS_renameat2, from, old, to, new, flags) ? errno : 0;
    if (replaced) {
        if (!error)
            node_unnamed(call->fs, replaced, parent, new);
        node_unpin(call->fs, replaced);
    }
    if (!error) {
        moved(call->fs, parent, to, new);
        if (flags & RENAME_EXCHANGE)
            moved(call->fs, source, from, old);
    }
    node_unpin(call->fs, parent);
    node_unpin(call->fs, source);
    return error;
}

int fs_statfs(struct call *call)
{
    struct statfs status;
    struct fuse_statfs_out *out = CALL_OUT(call, fuse_statfs_out);
    if (!out)
        return EINVAL;
    struct node *node = node_pin(call->fs, call->in.nodeid);
    if (!node)
        return ESTALE;
    int fd = node_fd(call->fs, node), error = fd < 0 ? -fd : fstatfs(fd, &status) ? errno : 0;
    node_unpin(call->fs, node);
    if (!error)
        *out = (struct fuse_statfs_out){.blocks = status.f_blocks, .bfree = status.f_bfree, .bavail = status.f_bavail,
                                        .files = status.f_files, .ffree = status.f_ffree, .bsize = (uint32_t)status.f_bsize,
                                        .namelen = FS_NAME_MAX, .frsize = (uint32_t)status.f_frsize};
    return error;
}

/* Attributes that a guest may read, and change. Those of the kernel's security modules and of overlay file systems mean
 * something to the host. */
static bool may_read(const char *name)
{
    return !strncmp(name, "user.", 5) || !strncmp(name, "system.posix_acl_", 17) || !strcmp(name, "security.capability");
}

static bool may_write(const char *name)
{
    return may_read(name) && strncmp(name, "security.", 9);
}

/* A name of an attribute, which may have slashes. */
static const char *attribute_name(struct call *call)
{
    const char *name = (const char *)call->arguments;
    size_t length = strnlen(name, call->length);
    return length == call->length || !length || length > FS_NAME_MAX ? NULL : call_bytes(call, length + 1);
}

/* The reply of GETXATTR and LISTXATTR: the bytes, or only their number if the driver asked with size 0. */
static int reply_xattr(struct call *call, uint32_t size, const void *bytes, size_t length)
{
    if (!size) {
        struct fuse_getxattr_out *out = CALL_OUT(call, fuse_getxattr_out);
        if (!out)
            return EINVAL;
        out->size = (uint32_t)length;
        return 0;
    }
    void *room = length <= size ? call_room(call, length) : NULL;
    if (!room)
        return ERANGE;
    memcpy(room, bytes, length);
    return 0;
}

static int list_xattrs(struct call *call, const char *path, uint32_t size)
{
    char *names = malloc(XATTR_LIST_MAX);
    if (!names)
        return ENOMEM;
    ssize_t got = listxattr(path, names, XATTR_LIST_MAX);
    int error = got < 0 ? errno : 0;
    size_t kept = 0;
    for (char *name = names; !error && name < names + got;) {
        size_t length = strlen(name) + 1;
        if (may_read(name)) {
            memmove(names + kept, name, length);
            kept += length;
        }
        name += length;
    }
    if (!error)
        error = reply_xattr(call, size, names, kept);
    free(names);
    return error;
}

static int get_xattr(struct call *call, const char *path, uint32_t size, const char *name)
{
    if (!may_read(name))
        return EOPNOTSUPP;
    /* Mostly there is none, or it is short, and the host's kernel clears as much memory as it is offered. */
    uint8_t few[256];
    ssize_t got = getxattr(path, name, few, sizeof few);
    if (got >= 0 || errno != ERANGE)
        return got < 0 ? errno : reply_xattr(call, size, few, (size_t)got);
    void *value = malloc(XATTR_SIZE_MAX);
    if (!value)
        return ENOMEM;
    got = getxattr(path, name, value, XATTR_SIZE_MAX);
    int error = got < 0 ? errno : reply_xattr(call, size, value, (size_t)got);
    free(value);
    return error;
}

/* `takes_them`: whether a node of its type has attributes that can be changed. */
static int do_xattr(struct call *call, const char *path, bool takes_them)
{
    const char *name;
    switch (call->in.opcode) {
    case FUSE_SETXATTR: {
        const struct fuse_setxattr_in *in = CALL_IN(call, fuse_setxattr_in);
        if (!in || !(name = attribute_name(call)) || call->length < in->size || in->flags & ~(uint32_t)(XATTR_CREATE | XATTR_REPLACE))
            return EINVAL;
        if (!may_write(name))
            return EOPNOTSUPP;
        if (!takes_them)
            return EPERM;
        return setxattr(path, name, call->arguments, in->size, (int)in->flags) ? errno : 0;
    }
    case FUSE_REMOVEXATTR:
        if (!(name = attribute_name(call)))
            return EINVAL;
        if (!may_write(name))
            return EOPNOTSUPP;
        if (!takes_them)
            return EPERM;
        return removexattr(path, name) ? errno : 0;
    default: {
        const struct fuse_getxattr_in *in = CALL_IN(call, fuse_getxattr_in);
        if (!in)
            return EINVAL;
        if (call->in.opcode == FUSE_LISTXATTR)
            return list_xattrs(call, path, in->size);
        return (name = attribute_name(call)) ? get_xattr(call, path, in->size, name) : EINVAL;
    }
    }
}

int fs_xattr(struct call *call)
{
    bool changes = call->in.opcode == FUSE_SETXATTR || call->in.opcode == FUSE_REMOVEXATTR;
    if (changes && call->fs->read_only)
        return EROFS;
    struct node *node = node_pin(call->fs, call->in.nodeid);
    if (!node)
        return ESTALE;
    int fd = node_fd(call->fs, node);
    bool takes_them = node->type == S_IFREG || node->type == S_IFDIR;
    int error = fd < 0 ? -fd : do_xattr(call, fd_path(fd).text, takes_them);
    node_unpin(call->fs, node);
    return error;
}
