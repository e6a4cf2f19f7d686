/* An image whose bytes are the disk's: a raw file or a block device of the host. */
#include "image.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

struct raw {
    struct image image;
    uint32_t align;
};

static bool raw_map(struct image *image, uint64_t offset, uint64_t length, enum intent intent, struct extent *extent)
{
    if (image->guarded && intent == FOR_WRITING && !offset)
        return false; /* image_write() looks at the bytes */
    *extent = (struct extent){.kind = KIND_DATA, .fd = image->flat, .align = ((struct raw *)image)->align,
                              .offset = offset, .length = length, .owner = image, .guest = offset,
                              /* The last sector may be only partly there. */
                              .sparse_end = offset + length > image->length};
    return true;
}

static int raw_locate(struct image *image, uint64_t offset, uint64_t length, struct extent *extent)
{
    return !raw_map(image, offset, length, FOR_READING, extent);
}

static int raw_allocate(struct image *image, uint64_t offset, uint64_t length, struct extent *extent)
{
    return !raw_map(image, offset, length, FOR_READING, extent);
}

static int raw_zero(struct image *image, uint64_t offset, uint64_t length, bool unmap, const bool *abandoned)
{
    return unmap && file_punch(image->flat, offset, length) ? 0 : file_zero(image->flat, offset, length, abandoned);
}

static int raw_discard(struct image *image, uint64_t offset, uint64_t length)
{
    file_punch(image->flat, offset, length); /* a discard that the file system cannot do is a hint not taken */
    return 0;
}

static int raw_flush(struct image *image)
{
    return fdatasync(image->flat) ? errno : 0;
}

static int raw_flush_fd(struct image *image)
{
    return image->flat;
}

static void raw_close(struct image *image)
{
    free(image);
}

static const struct image_ops raw_ops = {
    .name = "raw", .map = raw_map, .locate = raw_locate, .allocate = raw_allocate, .zero = raw_zero,
    .discard = raw_discard, .flush = raw_flush, .flush_fd = raw_flush_fd, .close = raw_close,
};

struct image *raw_open(int fd, uint64_t length, uint32_t align, bool read_only, bool guarded)
{
    struct raw *raw = calloc(1, sizeof *raw);
    if (!raw)
        return NULL;
    raw->image = (struct image){.ops = &raw_ops, .length = length, .fd = fd, .flat = fd, .read_only = read_only,
                                .guarded = guarded};
    raw->align = align;
    return &raw->image;
}
