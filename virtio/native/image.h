/* What the bytes of a disk stand in: one file, or several with tables that say where.
 *
 * The block engine's three paths (the loop's turn, io_uring, threads) know `struct image_ops` and no format:
 *
 * image.c          transfers that may block, by any thread
 * image_raw.c      a file whose bytes are the disk's
 * image_overlay.c  another image that is only read, with what was written in a file beside it
 *
 * A path asks where a range stands (`map`, which never blocks; `locate`, which may), or gets a place for it
 * (`allocate`); it moves the bytes itself, and ends every extent with `complete`. Nothing here knows rings or Python.
 */
#ifndef VIRTIO_IMAGE_H
#define VIRTIO_IMAGE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

struct image;

enum kind {
    KIND_DATA,  /* `length` bytes at `offset` of `fd` */
    KIND_ZERO,  /* reads as zeroes; or nothing is there */
    KIND_PACKED /* the image's `unpack` makes the bytes */
};

enum intent { FOR_READING, FOR_WRITING };

enum { IMAGE_IOVS = 1024 /* the most that one transfer names */ };

/* Where a part of a disk stands. */
struct extent {
    enum kind kind;
    int fd;
    bool sparse_end;     /* what lies past the end of the file reads as zeroes, else it is an I/O error */
    bool hole;           /* of KIND_ZERO: no file says so; nothing was ever written there */
    uint32_t align;      /* O_DIRECT: of memory and lengths, bytes; 0 without */
    uint64_t offset;     /* in the file, bytes */
    uint64_t length;     /* bytes of the disk, from where was asked */
    uint64_t before;     /* of allocate(): so many bytes of the disk before and after the range, as they are now, */
    uint64_t after;      /* belong into the file as well, on either side */
    struct image *owner; /* whose complete() ends it */
    uint64_t guest;      /* the owner's offset of the first byte */
    uint64_t token;      /* the owner's */
};

/* Errors are errno values, 0 is success. `offset + length` never exceeds the disk. */
struct image_ops {
    const char *name;
    /* Where the first bytes of a range stand, as memory knows it. Never blocks. For writing: only what may be written in
     * place. False: locate() or allocate() has to be asked. */
    bool (*map)(struct image *image, uint64_t offset, uint64_t length, enum intent intent, struct extent *extent);
    /* The same for reading, and may block. */
    int (*locate)(struct image *image, uint64_t offset, uint64_t length, struct extent *extent);
    /* A place for the first bytes of a range. May block. */
    int (*allocate)(struct image *image, uint64_t offset, uint64_t length, struct extent *extent);
    /* Ends an extent; `done`: what was to be written there is. NULL: nothing is to be done. Blocks only for an extent of
     * allocate(). */
    int (*complete)(struct extent *extent, bool done);
    /* The bytes of a range that is KIND_PACKED. May block. */
    int (*unpack)(struct image *image, uint64_t offset, uint64_t length, void *to);
    /* The range reads as zeroes afterwards; with `unmap` its space is given up if that can be. May block. */
    int (*zero)(struct image *image, uint64_t offset, uint64_t length, bool unmap, const bool *abandoned);
    /* A hint that the range is not needed. May block. */
    int (*discard)(struct image *image, uint64_t offset, uint64_t length);
    /* What was written is durable afterwards. May block. */
    int (*flush)(struct image *image);
    /* What fdatasync(2) makes all of it durable: a descriptor, or one of the two below. Never blocks. */
    int (*flush_fd)(struct image *image);
    void (*close)(struct image *image);
};

enum { FLUSH_NOTHING = -1, FLUSH_CALL = -2 };

struct image {
    const struct image_ops *ops;
    uint64_t length;       /* bytes */
    int fd;                /* a file that it reads, by which its file system is known */
    int flat;              /* offsets of the disk are offsets in this file, and nothing else is to be kept; or -1 */
    bool read_only;
    bool guarded;          /* its format was found by content: writes may not make it look like another one */
    struct image *backing; /* read where this one has nothing; or NULL */
};

/* Any thread; may block. `abandoned`: what is not done yet need not be any more; or NULL. `iov` may be changed. */
int image_read(struct image *image, struct iovec *iov, unsigned count, uint64_t offset, uint64_t length,
               const bool *abandoned);
/* `durable`: as if a flush followed. */
int image_write(struct image *image, struct iovec *iov, unsigned count, uint64_t offset, uint64_t length, bool durable,
                const bool *abandoned);
/* As `zero` by writing zeroes. */
int image_write_zeroes(struct image *image, uint64_t offset, uint64_t length, const bool *abandoned);
/* Where a range of the backing image stands, which may be shorter than this one. */
bool image_map_backing(struct image *image, uint64_t offset, uint64_t length, struct extent *extent);
int image_locate_backing(struct image *image, uint64_t offset, uint64_t length, struct extent *extent);

static inline int image_complete(struct extent *extent, bool done)
{
    return extent->owner->ops->complete && !extent->hole ? extent->owner->ops->complete(extent, done) : 0;
}

static inline bool image_abandoned(const bool *abandoned)
{
    return abandoned && __atomic_load_n(abandoned, __ATOMIC_RELAXED);
}

/* image.c: pieces of vectors and files */

/* Those parts of `iov` that name `length` bytes from `skip` on. Returns how many; `out` has room for `count`. */
unsigned iov_slice(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t length, struct iovec *out);
void iov_copy(const struct iovec *iov, unsigned count, uint64_t skip, char *flat, uint64_t length, bool to_flat);
void iov_zero(const struct iovec *iov, unsigned count);
bool iov_aligned(const struct iovec *iov, unsigned count, uint32_t align);
/* All of `length` bytes, or an errno; `sparse_end` as in an extent. */
int file_transfer(int fd, bool write, struct iovec *iov, unsigned count, uint64_t offset, uint64_t length, int flags,
                  bool sparse_end);
bool file_punch(int fd, uint64_t offset, uint64_t length);
int file_zero(int fd, uint64_t offset, uint64_t length, const bool *abandoned);

/* image_raw.c */
struct image *raw_open(int fd, uint64_t length, uint32_t align, bool read_only, bool guarded);

/* image_overlay.c: `dirty` has one bit per sector of 512 bytes that stands in `fd`, and is the caller's. */
struct image *overlay_open(int fd, uint8_t *dirty, struct image *backing);

#endif
