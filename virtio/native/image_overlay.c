/* An image that is only read, and a file with one bit per sector for what was written over it. It ends with its machine,
 * so nothing of it is ever made durable. */
#include "image.h"

#include <stdlib.h>

enum { SECTOR = 512 };

struct overlay {
    struct image image;
    int fd;
    uint8_t *dirty;
};

static bool is_dirty(const struct overlay *overlay, uint64_t sector)
{
    return __atomic_load_n(overlay->dirty + sector / 8, __ATOMIC_RELAXED) >> sector % 8 & 1;
}

/* How many of `length` bytes from `offset` on stand where the first one does. */
static uint64_t run_of(const struct overlay *overlay, uint64_t offset, uint64_t length)
{
    uint64_t sector = offset / SECTOR, sectors = (length + SECTOR - 1) / SECTOR, run = 1;
    bool first = is_dirty(overlay, sector);
    while (run < sectors && is_dirty(overlay, sector + run) == first)
        run++;
    return run * SECTOR < length ? run * SECTOR : length;
}

static void set_dirty(struct overlay *overlay, uint64_t offset, uint64_t length)
{
    for (uint64_t sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++)
        __atomic_fetch_or(overlay->dirty + sector / 8, (uint8_t)(1u << sector % 8), __ATOMIC_RELEASE);
}

static struct extent own(struct overlay *overlay, uint64_t offset, uint64_t length, enum intent intent)
{
    return (struct extent){.kind = KIND_DATA, .fd = overlay->fd, .offset = offset, .length = length,
                           .owner = &overlay->image, .guest = offset, .token = intent};
}

static bool overlay_map(struct image *image, uint64_t offset, uint64_t length, enum intent intent, struct extent *extent)
{
    struct overlay *overlay = (struct overlay *)image;
    if (intent == FOR_READING) {
        length = run_of(overlay, offset, length);
        if (!is_dirty(overlay, offset / SECTOR))
            return image_map_backing(image, offset, length, extent);
    }
    *extent = own(overlay, offset, length, intent);
    return true;
}

static int overlay_locate(struct image *image, uint64_t offset, uint64_t length, struct extent *extent)
{
    struct overlay *overlay = (struct overlay *)image;
    length = run_of(overlay, offset, length);
    if (!is_dirty(overlay, offset / SECTOR))
        return image_locate_backing(image, offset, length, extent);
    *extent = own(overlay, offset, length, FOR_READING);
    return 0;
}

static int overlay_allocate(struct image *image, uint64_t offset, uint64_t length, struct extent *extent)
{
    *extent = own((struct overlay *)image, offset, length, FOR_WRITING);
    return 0;
}

static int overlay_complete(struct extent *extent, bool done)
{
    if (done && extent->token == FOR_WRITING)
        set_dirty((struct overlay *)extent->owner, extent->guest, extent->length);
    return 0;
}

static int overlay_zero(struct image *image, uint64_t offset, uint64_t length, bool unmap, const bool *abandoned)
{
    (void)unmap;
    struct overlay *overlay = (struct overlay *)image;
    int error = file_punch(overlay->fd, offset, length) ? 0 : file_zero(overlay->fd, offset, length, abandoned);
    if (!error)
        set_dirty(overlay, offset, length);
    return error;
}

static int overlay_discard(struct image *image, uint64_t offset, uint64_t length)
{
    (void)image;
    (void)offset;
    (void)length;
    return 0; /* a hint not taken */
}

static int overlay_flush(struct image *image)
{
    (void)image;
    return 0;
}

static int overlay_flush_fd(struct image *image)
{
    (void)image;
    return FLUSH_NOTHING;
}

static void overlay_close(struct image *image)
{
    free(image);
}

static const struct image_ops overlay_ops = {
    .name = "overlay", .map = overlay_map, .locate = overlay_locate, .allocate = overlay_allocate,
    .complete = overlay_complete, .zero = overlay_zero, .discard = overlay_discard, .flush = overlay_flush,
    .flush_fd = overlay_flush_fd, .close = overlay_close,
};

struct image *overlay_open(int fd, uint8_t *dirty, struct image *backing)
{
    struct overlay *overlay = calloc(1, sizeof *overlay);
    if (!overlay)
        return NULL;
    overlay->image = (struct image){.ops = &overlay_ops, .length = backing->length, .fd = fd, .flat = -1, .backing = backing};
    overlay->fd = fd;
    overlay->dirty = dirty;
    return &overlay->image;
}
