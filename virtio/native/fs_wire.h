/* FUSE messages (protocol 7.31 and later, as Linux' virtio-fs driver speaks them), each declared once, field by field.
 *
 * Little endian, as virtio-fs has it on x86 (virtio 1.2, 5.11.6.1: native byte order of the guest). The same messages are
 * declared in virtio/fs/messages.py with construct; `_ring.fuse_layouts()` lets a test compare the two. */
#ifndef VIRTIO_FS_WIRE_H
#define VIRTIO_FS_WIRE_H

#include <stdint.h>

#define FUSE_IN_HEADER(F)                                                                                              \
    F(uint32_t, len) F(uint32_t, opcode) F(uint64_t, unique) F(uint64_t, nodeid) F(uint32_t, uid) F(uint32_t, gid)     \
    F(uint32_t, pid) F(uint16_t, total_extlen) F(uint16_t, padding)
#define FUSE_OUT_HEADER(F) F(uint32_t, len) F(int32_t, error) F(uint64_t, unique)
#define FUSE_ATTR(F)                                                                                                   \
    F(uint64_t, ino) F(uint64_t, size) F(uint64_t, blocks) F(uint64_t, atime) F(uint64_t, mtime) F(uint64_t, ctime)    \
    F(uint32_t, atimensec) F(uint32_t, mtimensec) F(uint32_t, ctimensec) F(uint32_t, mode) F(uint32_t, nlink)          \
    F(uint32_t, uid) F(uint32_t, gid) F(uint32_t, rdev) F(uint32_t, blksize) F(uint32_t, flags)
#define FUSE_ENTRY_OUT(F)                                                                                              \
    F(uint64_t, nodeid) F(uint64_t, generation) F(uint64_t, entry_valid) F(uint64_t, attr_valid)                       \
    F(uint32_t, entry_valid_nsec) F(uint32_t, attr_valid_nsec) F(struct fuse_attr, attr)
#define FUSE_FORGET_IN(F) F(uint64_t, nlookup)
#define FUSE_FORGET_ONE(F) F(uint64_t, nodeid) F(uint64_t, nlookup)
#define FUSE_BATCH_FORGET_IN(F) F(uint32_t, count) F(uint32_t, dummy)
#define FUSE_GETATTR_IN(F) F(uint32_t, flags) F(uint32_t, dummy) F(uint64_t, fh)
#define FUSE_ATTR_OUT(F) F(uint64_t, attr_valid) F(uint32_t, attr_valid_nsec) F(uint32_t, dummy) F(struct fuse_attr, attr)
#define FUSE_MKNOD_IN(F) F(uint32_t, mode) F(uint32_t, rdev) F(uint32_t, umask) F(uint32_t, padding)
#define FUSE_MKDIR_IN(F) F(uint32_t, mode) F(uint32_t, umask)
#define FUSE_RENAME_IN(F) F(uint64_t, newdir)
#define FUSE_RENAME2_IN(F) F(uint64_t, newdir) F(uint32_t, flags) F(uint32_t, padding)
#define FUSE_LINK_IN(F) F(uint64_t, oldnodeid)
#define FUSE_SETATTR_IN(F)                                                                                             \
    F(uint32_t, valid) F(uint32_t, padding) F(uint64_t, fh) F(uint64_t, size) F(uint64_t, lock_owner)                  \
    F(uint64_t, atime) F(uint64_t, mtime) F(uint64_t, ctime) F(uint32_t, atimensec) F(uint32_t, mtimensec)             \
    F(uint32_t, ctimensec) F(uint32_t, mode) F(uint32_t, unused4) F(uint32_t, uid) F(uint32_t, gid)                    \
    F(uint32_t, unused5)
#define FUSE_OPEN_IN(F) F(uint32_t, flags) F(uint32_t, open_flags)
#define FUSE_CREATE_IN(F) F(uint32_t, flags) F(uint32_t, mode) F(uint32_t, umask) F(uint32_t, open_flags)
#define FUSE_OPEN_OUT(F) F(uint64_t, fh) F(uint32_t, open_flags) F(uint32_t, padding)
#define FUSE_RELEASE_IN(F) F(uint64_t, fh) F(uint32_t, flags) F(uint32_t, release_flags) F(uint64_t, lock_owner)
#define FUSE_READ_IN(F)                                                                                                \
    F(uint64_t, fh) F(uint64_t, offset) F(uint32_t, size) F(uint32_t, read_flags) F(uint64_t, lock_owner)              \
    F(uint32_t, flags) F(uint32_t, padding)
#define FUSE_WRITE_IN(F)                                                                                               \
    F(uint64_t, fh) F(uint64_t, offset) F(uint32_t, size) F(uint32_t, write_flags) F(uint64_t, lock_owner)             \
    F(uint32_t, flags) F(uint32_t, padding)
#define FUSE_WRITE_OUT(F) F(uint32_t, size) F(uint32_t, padding)
#define FUSE_STATFS_OUT(F)                                                                                             \
    F(uint64_t, blocks) F(uint64_t, bfree) F(uint64_t, bavail) F(uint64_t, files) F(uint64_t, ffree)                   \
    F(uint32_t, bsize) F(uint32_t, namelen) F(uint32_t, frsize) F(uint32_t, padding) F(uint64_t, spare0)               \
    F(uint64_t, spare1) F(uint64_t, spare2)
#define FUSE_FSYNC_IN(F) F(uint64_t, fh) F(uint32_t, flags) F(uint32_t, padding)
#define FUSE_SETXATTR_IN(F) F(uint32_t, size) F(uint32_t, flags)
#define FUSE_GETXATTR_IN(F) F(uint32_t, size) F(uint32_t, padding)
#define FUSE_GETXATTR_OUT(F) F(uint32_t, size) F(uint32_t, padding)
#define FUSE_INIT_IN(F) F(uint32_t, major) F(uint32_t, minor) F(uint32_t, max_readahead) F(uint32_t, flags)
#define FUSE_INIT_OUT(F)                                                                                               \
    F(uint32_t, major) F(uint32_t, minor) F(uint32_t, max_readahead) F(uint32_t, flags) F(uint16_t, max_background)    \
    F(uint16_t, congestion_threshold) F(uint32_t, max_write) F(uint32_t, time_gran) F(uint16_t, max_pages)             \
    F(uint16_t, map_alignment) F(uint32_t, flags2) F(uint32_t, unused0) F(uint64_t, unused1) F(uint64_t, unused2)      \
    F(uint64_t, unused3)
#define FUSE_FALLOCATE_IN(F) F(uint64_t, fh) F(uint64_t, offset) F(uint64_t, length) F(uint32_t, mode) F(uint32_t, padding)
#define FUSE_LSEEK_IN(F) F(uint64_t, fh) F(uint64_t, offset) F(uint32_t, whence) F(uint32_t, padding)
#define FUSE_LSEEK_OUT(F) F(uint64_t, offset)
#define FUSE_COPY_IN(F)                                                                                                \
    F(uint64_t, fh_in) F(uint64_t, off_in) F(uint64_t, nodeid_out) F(uint64_t, fh_out) F(uint64_t, off_out)            \
    F(uint64_t, len) F(uint64_t, flags)
#define FUSE_DIRENT(F) F(uint64_t, ino) F(uint64_t, off) F(uint32_t, namelen) F(uint32_t, type)

/* Every message: M(struct's name, its fields). */
#define FUSE_MESSAGES(M)                                                                                               \
    M(fuse_in_header, FUSE_IN_HEADER)                                                                                  \
    M(fuse_out_header, FUSE_OUT_HEADER)                                                                                \
    M(fuse_attr, FUSE_ATTR)                                                                                            \
    M(fuse_entry_out, FUSE_ENTRY_OUT)                                                                                  \
    M(fuse_forget_in, FUSE_FORGET_IN)                                                                                  \
    M(fuse_forget_one, FUSE_FORGET_ONE)                                                                                \
    M(fuse_batch_forget_in, FUSE_BATCH_FORGET_IN)                                                                      \
    M(fuse_getattr_in, FUSE_GETATTR_IN)                                                                                \
    M(fuse_attr_out, FUSE_ATTR_OUT)                                                                                    \
    M(fuse_mknod_in, FUSE_MKNOD_IN)                                                                                    \
    M(fuse_mkdir_in, FUSE_MKDIR_IN)                                                                                    \
    M(fuse_rename_in, FUSE_RENAME_IN)                                                                                  \
    M(fuse_rename2_in, FUSE_RENAME2_IN)                                                                                \
    M(fuse_link_in, FUSE_LINK_IN)                                                                                      \
    M(fuse_setattr_in, FUSE_SETATTR_IN)                                                                                \
    M(fuse_open_in, FUSE_OPEN_IN)                                                                                      \
    M(fuse_create_in, FUSE_CREATE_IN)                                                                                  \
    M(fuse_open_out, FUSE_OPEN_OUT)                                                                                    \
    M(fuse_release_in, FUSE_RELEASE_IN)                                                                                \
    M(fuse_read_in, FUSE_READ_IN)                                                                                      \
    M(fuse_write_in, FUSE_WRITE_IN)                                                                                    \
    M(fuse_write_out, FUSE_WRITE_OUT)                                                                                  \
    M(fuse_statfs_out, FUSE_STATFS_OUT)                                                                                \
    M(fuse_fsync_in, FUSE_FSYNC_IN)                                                                                    \
    M(fuse_setxattr_in, FUSE_SETXATTR_IN)                                                                              \
    M(fuse_getxattr_in, FUSE_GETXATTR_IN)                                                                              \
    M(fuse_getxattr_out, FUSE_GETXATTR_OUT)                                                                            \
    M(fuse_init_in, FUSE_INIT_IN)                                                                                      \
    M(fuse_init_out, FUSE_INIT_OUT)                                                                                    \
    M(fuse_fallocate_in, FUSE_FALLOCATE_IN)                                                                            \
    M(fuse_lseek_in, FUSE_LSEEK_IN)                                                                                    \
    M(fuse_lseek_out, FUSE_LSEEK_OUT)                                                                                  \
    M(fuse_copy_in, FUSE_COPY_IN)                                                                                      \
    M(fuse_dirent, FUSE_DIRENT)

#define FUSE_FIELD(type, name) type name;
#define FUSE_STRUCT(name, fields) struct name { fields(FUSE_FIELD) };
FUSE_MESSAGES(FUSE_STRUCT)
#undef FUSE_STRUCT
#undef FUSE_FIELD

enum fuse_opcode {
    FUSE_LOOKUP = 1, FUSE_FORGET = 2, FUSE_GETATTR = 3, FUSE_SETATTR = 4, FUSE_READLINK = 5, FUSE_SYMLINK = 6,
    FUSE_MKNOD = 8, FUSE_MKDIR = 9, FUSE_UNLINK = 10, FUSE_RMDIR = 11, FUSE_RENAME = 12, FUSE_LINK = 13, FUSE_OPEN = 14,
    FUSE_READ = 15, FUSE_WRITE = 16, FUSE_STATFS = 17, FUSE_RELEASE = 18, FUSE_FSYNC = 20, FUSE_SETXATTR = 21,
    FUSE_GETXATTR = 22, FUSE_LISTXATTR = 23, FUSE_REMOVEXATTR = 24, FUSE_FLUSH = 25, FUSE_INIT = 26, FUSE_OPENDIR = 27,
    FUSE_READDIR = 28, FUSE_RELEASEDIR = 29, FUSE_FSYNCDIR = 30, FUSE_CREATE = 35, FUSE_DESTROY = 38,
    FUSE_BATCH_FORGET = 42, FUSE_FALLOCATE = 43, FUSE_READDIRPLUS = 44, FUSE_RENAME2 = 45, FUSE_LSEEK = 46,
    FUSE_COPY_FILE_RANGE = 47, FUSE_SYNCFS = 50
};

enum {
    FUSE_MAJOR = 7, FUSE_MINOR = 38, FUSE_MINOR_LEAST = 31, FUSE_ROOT_ID = 1,
    /* flags of INIT */
    FUSE_ASYNC_READ = 1 << 0, FUSE_ATOMIC_O_TRUNC = 1 << 3, FUSE_BIG_WRITES = 1 << 5, FUSE_AUTO_INVAL_DATA = 1 << 12,
    FUSE_DO_READDIRPLUS = 1 << 13, FUSE_READDIRPLUS_AUTO = 1 << 14, FUSE_ASYNC_DIO = 1 << 15,
    FUSE_PARALLEL_DIROPS = 1 << 18, FUSE_MAX_PAGES = 1 << 22, FUSE_CACHE_SYMLINKS = 1 << 23,
    /* valid bits of SETATTR */
    FATTR_MODE = 1 << 0, FATTR_UID = 1 << 1, FATTR_GID = 1 << 2, FATTR_SIZE = 1 << 3, FATTR_ATIME = 1 << 4,
    FATTR_MTIME = 1 << 5, FATTR_FH = 1 << 6, FATTR_ATIME_NOW = 1 << 7, FATTR_MTIME_NOW = 1 << 8,
    /* others */
    FOPEN_KEEP_CACHE = 1 << 1, FOPEN_CACHE_DIR = 1 << 3, FUSE_WRITE_CACHE = 1 << 0, FUSE_GETATTR_FH = 1 << 0,
    FUSE_FSYNC_FDATASYNC = 1 << 0
};

#endif
