/* Moving clusters between a qcow2 image and its backing image while the image is used. */
#include "qcow2_move.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BATCH = 4 << 20, WAIT_NS = 50000 };

static uint64_t batch_of(const struct qcow2 *q, uint64_t offset, uint64_t length)
{
    uint64_t covered = q->cluster_size << q->l2_bits, left = covered - offset % covered;
    uint64_t batch = BATCH > q->cluster_size ? BATCH - offset % q->cluster_size : q->cluster_size - offset % q->cluster_size;
    batch = batch < left ? batch : left;
    return batch < length ? batch : length;
}

/* Wait until no transfer is under way that began before this call. */
static void wait_for_transfers(struct qcow2 *q)
{
    const struct timespec moment = {0, WAIT_NS};
    for (bool flipped = false;;) {
        pthread_mutex_lock(&q->lookup);
        bool idle = !__atomic_load_n(&q->pins[(q->epoch + 1) & 1], __ATOMIC_ACQUIRE);
        bool over = idle && flipped;
        if (idle && !flipped) {
            q->epoch++;
            flipped = true;
        }
        pthread_mutex_unlock(&q->lookup);
        if (over)
            return;
        nanosleep(&moment, NULL);
    }
}

static void bar(struct qcow2 *q, uint64_t cluster, uint64_t count)
{
    pthread_mutex_lock(&q->lookup);
    q->barred = (struct drop){cluster, count};
    pthread_mutex_unlock(&q->lookup);
}

static bool is_zero(const char *bytes, uint64_t length)
{
    return !bytes[0] && !memcmp(bytes, bytes + 1, length - 1);
}

/* One claimed cluster gets the bytes that it reads as. */
static int fill(struct image *image, struct extent *extent)
{
    struct claim *claim = (struct claim *)(uintptr_t)extent->token;
    void *bytes;
    if (posix_memalign(&bytes, 4096, round_up(extent->length, 4096)))
        return ENOMEM;
    uint64_t there = extent->guest < image->length ? image->length - extent->guest : 0;
    struct iovec iov = {bytes, extent->length < there ? extent->length : there};
    memset(bytes, 0, extent->length);
    int error = image_read(image, &iov, 1, extent->guest, iov.iov_len, NULL);
    iov = (struct iovec){bytes, extent->length};
    if (!error && claim->taken && qcow2_of(image)->version > 2 && is_zero(bytes, extent->length))
        claim->zeroes = true;
    else if (!error)
        error = file_transfer(extent->fd, true, &iov, 1, extent->offset, extent->length, 0, false);
    free(bytes);
    return error;
}

int qcow2_populate(struct image *image, uint64_t offset, uint64_t length)
{
    struct qcow2 *q = qcow2_of(image);
    if (image->read_only)
        return EROFS;
    uint64_t end = round_up(offset + length, q->cluster_size);
    for (offset = offset / q->cluster_size * q->cluster_size; offset < end;) {
        struct extent extent = {.kind = KIND_ZERO};
        uint64_t done;
        pthread_mutex_lock(&q->tables);
        qcow2_wait_unclaimed(q, offset >> q->cluster_bits, 1);
        int error = q->broken ? q->broken : qcow2_claim_whole(q, offset, &done, &extent);
        /* Some of its subclusters may have their place already, and be written there. */
        bool in_place = !error && !done && !((struct claim *)(uintptr_t)extent.token)->taken;
        if (in_place)
            bar(q, offset >> q->cluster_bits, 1);
        pthread_mutex_unlock(&q->tables);
        if (error)
            return error;
        if (!done) {
            if (in_place)
                wait_for_transfers(q);
            error = fill(image, &extent);
            int other = image_complete(&extent, !error);
            if (in_place)
                bar(q, 0, 0);
            if (error || other)
                return error ? error : other;
            done = extent.length;
        }
        offset += done;
    }
    return 0;
}

/* What the image itself holds of a range into its backing image. */
static int copy_down(struct image *image, uint64_t offset, uint64_t length, char *bytes)
{
    struct image *below = image->backing;
    while (length) {
        struct extent extent;
        int error = image->ops->locate(image, offset, length, &extent);
        if (error)
            return error;
        image_complete(&extent, false);
        bool own = extent.owner == image && !extent.hole;
        if (own && extent.kind == KIND_ZERO) {
            error = below->ops->zero(below, offset, extent.length, true, NULL);
        } else if (own) {
            struct iovec iov = {bytes, extent.length};
            error = image_read(image, &iov, 1, offset, extent.length, NULL);
            iov = (struct iovec){bytes, extent.length};
            if (!error)
                error = image_write(below, &iov, 1, offset, extent.length, false, NULL);
        }
        if (error)
            return error;
        offset += extent.length;
        length -= extent.length;
    }
    return 0;
}

static int commit_batch(struct image *image, uint64_t offset, uint64_t length, char *bytes)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t cluster = offset >> q->cluster_bits, count = ((offset + length - 1) >> q->cluster_bits) - cluster + 1;
    struct table *table = NULL;
    struct claim claim = {.cluster = cluster, .count = count};
    pthread_mutex_lock(&q->tables);
    qcow2_wait_unclaimed(q, cluster, count);
    int error = q->broken ? q->broken : qcow2_l2(q, cluster >> q->l2_bits, &table);
    if (error || !table) {
        pthread_mutex_unlock(&q->tables);
        return error;
    }
    claim.next = q->claims;
    q->claims = &claim;
    bar(q, cluster, count);
    pthread_mutex_unlock(&q->tables);

    wait_for_transfers(q);
    error = copy_down(image, offset, length, bytes);
    if (!error)
        error = image->backing->ops->flush(image->backing);

    pthread_mutex_lock(&q->tables);
    if (!error)
        error = qcow2_forget_locked(q, cluster, count);
    struct claim **at = &q->claims;
    while (*at != &claim)
        at = &(*at)->next;
    *at = claim.next;
    bar(q, 0, 0);
    pthread_cond_broadcast(&q->unclaimed);
    pthread_mutex_unlock(&q->tables);
    return error;
}

int qcow2_commit(struct image *image, uint64_t offset, uint64_t length)
{
    struct qcow2 *q = qcow2_of(image);
    struct image *below = image->backing;
    if (image->read_only || !below || below->read_only)
        return EROFS;
    if (below->length < image->length || offset % q->cluster_size)
        return EINVAL;
    char *bytes;
    uint64_t room = BATCH > q->cluster_size ? BATCH : q->cluster_size;
    if (posix_memalign((void **)&bytes, 4096, room))
        return ENOMEM;
    int error = 0;
    while (length && !error) {
        uint64_t part = batch_of(q, offset, length);
        error = commit_batch(image, offset, part, bytes);
        offset += part;
        length -= part;
    }
    free(bytes);
    return error;
}
