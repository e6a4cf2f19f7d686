/* Which clusters of a qcow2 file are in use: refcount table, refcount blocks, taking and giving back. All with `tables`
 * held. */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BATCH_BYTES = 64 << 20, BATCH_MAX = 64 };

uint64_t refcount_max(const struct qcow2 *q)
{
    return q->refcount_order == 6 ? UINT64_MAX : (1ull << (1u << q->refcount_order)) - 1;
}

static uint64_t block_get(const struct qcow2 *q, const uint8_t *block, uint64_t index)
{
    unsigned bits = 1u << q->refcount_order;
    if (bits < 8)
        return block[index * bits / 8] >> index * bits % 8 & ((1u << bits) - 1);
    uint64_t value = 0;
    for (unsigned i = 0; i < bits / 8; i++)
        value = value << 8 | block[index * (bits / 8) + i];
    return value;
}

static void block_set(const struct qcow2 *q, uint8_t *block, uint64_t index, uint64_t value)
{
    unsigned bits = 1u << q->refcount_order;
    if (bits < 8) {
        unsigned shift = index * bits % 8, mask = ((1u << bits) - 1) << shift;
        uint8_t *at = &block[index * bits / 8];
        *at = (uint8_t)((*at & ~mask) | (value << shift));
        return;
    }
    for (unsigned i = bits / 8; i--; value >>= 8)
        block[index * (bits / 8) + i] = (uint8_t)value;
}

/* The refcount block that covers a cluster; `*found` NULL: there is none. */
static int block_of(struct qcow2 *q, uint64_t cluster, struct table **found)
{
    uint64_t index = cluster >> q->block_bits;
    *found = NULL;
    if (index >= q->reftable_entries || !q->reftable[index])
        return 0;
    uint64_t offset = q->reftable[index];
    if (offset % q->cluster_size || offset / q->cluster_size >= q->end)
        return qcow2_break(q, EUCLEAN);
    if ((*found = cache_find(&q->blocks, offset)))
        return 0;
    struct table *table = cache_victim(&q->blocks, q->cluster_size);
    if (!table) {
        int full = qcow2_write_back(q);
        if (full)
            return full;
        if (!(table = cache_victim(&q->blocks, q->cluster_size)))
            return ENOMEM;
    }
    cache_remove(&q->blocks, table);
    int error = qcow2_pread(q->fd, table->bytes, q->cluster_size, offset);
    if (error)
        return error;
    cache_insert(&q->blocks, table, offset);
    *found = table;
    return 0;
}

int refcount_get(struct qcow2 *q, uint64_t cluster, uint64_t *count)
{
    struct table *block;
    int error = block_of(q, cluster, &block);
    *count = block ? block_get(q, block->bytes, cluster & ((1ull << q->block_bits) - 1)) : 0;
    return error;
}

static bool is_protected(const struct qcow2 *q, uint64_t cluster)
{
    for (unsigned i = 0; i < q->range_count; i++)
        if (cluster - q->ranges[i].cluster < q->ranges[i].count)
            return true;
    return set_has(&q->metadata, cluster);
}

static int set_add_locked(struct qcow2 *q, uint64_t cluster)
{
    pthread_mutex_lock(&q->lookup);
    int error = set_add(&q->metadata, cluster);
    pthread_mutex_unlock(&q->lookup);
    return error;
}

/* Write `count` new refcount blocks for the table's entries from `index` on, one after the other from cluster `place` on,
 * with a refcount of one for the `used` clusters from `first` on. They must be durable before anything names them. */
static int write_blocks(struct qcow2 *q, uint64_t index, uint64_t count, uint64_t place, uint64_t first, uint64_t used)
{
    uint8_t *block = malloc(q->cluster_size);
    int error = block ? 0 : ENOMEM;
    for (uint64_t i = 0; i < count && !error; i++) {
        uint64_t base = (index + i) << q->block_bits;
        memset(block, 0, q->cluster_size);
        for (uint64_t cluster = first; cluster < first + used; cluster++)
            if (cluster >= base && cluster - base < 1ull << q->block_bits)
                block_set(q, block, cluster - base, 1);
        error = qcow2_pwrite(q->fd, block, q->cluster_size, (place + i) * q->cluster_size);
    }
    free(block);
    if (place + count > q->end)
        q->end = place + count;
    return error;
}

/* A larger refcount table, that covers cluster `needed` and all it takes itself. */
static int grow_table(struct qcow2 *q, uint64_t needed)
{
    uint64_t place = needed >> q->block_bits << q->block_bits;
    if (place < q->end)
        place = q->end;
    uint64_t per_cluster = q->cluster_size / 8, blocks = 1, clusters, entries, first_index = place >> q->block_bits;
    for (;;) {
        uint64_t last = (place + blocks + 1) >> q->block_bits;
        entries = last + 1 + last / 2;
        clusters = (entries + per_cluster - 1) / per_cluster;
        entries = clusters * per_cluster;
        uint64_t want = ((place + clusters + blocks - 1) >> q->block_bits) - first_index + 1;
        if (want <= blocks && (place + clusters + blocks - 1) >> q->block_bits < entries)
            break;
        blocks = want > blocks ? want : blocks + 1;
    }
    if (entries * 8 > REFTABLE_BYTES_MAX && clusters > 1)
        return EFBIG;
    uint64_t *table = calloc(entries, 8);
    uint8_t *bytes = calloc(clusters, q->cluster_size);
    int error = table && bytes ? 0 : ENOMEM;
    if (!error)
        error = write_blocks(q, first_index, blocks, place + clusters, place, clusters + blocks);
    for (uint64_t i = 0; i < blocks && !error; i++)
        error = set_add_locked(q, place + clusters + i);
    if (!error) {
        memcpy(table, q->reftable, q->reftable_entries * 8);
        for (uint64_t i = 0; i < blocks; i++)
            table[first_index + i] = (place + clusters + i) * q->cluster_size;
        for (uint64_t i = 0; i < entries; i++)
            store_be(bytes + i * 8, table[i]);
        error = qcow2_pwrite(q->fd, bytes, clusters * q->cluster_size, place * q->cluster_size);
    }
    if (!error && fdatasync(q->fd))
        error = errno;
    if (!error) {
        uint8_t header[12];
        store_be(header, place * q->cluster_size);
        uint32_t count = __builtin_bswap32((uint32_t)clusters);
        memcpy(header + 8, &count, 4);
        error = qcow2_pwrite(q->fd, header, sizeof header, 48); /* refcount_table_offset, refcount_table_clusters */
    }
    if (!error && fdatasync(q->fd))
        error = errno;
    free(bytes);
    if (error) {
        free(table);
        return qcow2_break(q, error);
    }
    uint64_t old = q->reftable_offset / q->cluster_size, old_clusters = q->reftable_entries / per_cluster;
    free(q->reftable);
    q->reftable = table;
    q->reftable_entries = entries;
    q->reftable_offset = place * q->cluster_size;
    pthread_mutex_lock(&q->lookup);
    q->ranges[q->reftable_range] = (struct drop){place, clusters};
    pthread_mutex_unlock(&q->lookup);
    return drops_add(&q->dropped, old, old_clusters);
}

/* A refcount block for cluster `needed`, which has none; with small clusters several at once, since each costs a barrier. */
static int add_blocks(struct qcow2 *q, uint64_t needed)
{
    uint64_t index = needed >> q->block_bits, covered = 1ull << q->block_bits;
    if (index >= q->reftable_entries)
        return grow_table(q, needed);
    uint64_t first = index << q->block_bits, limit = first + covered;
    uint64_t place = q->end > first && q->end < limit ? q->end : first;
    while (place < limit && is_protected(q, place))
        place++;
    uint64_t batch = BATCH_BYTES / q->cluster_size / covered, count = 0;
    if (batch > BATCH_MAX)
        batch = BATCH_MAX;
    do {
        count++;
    } while (count < batch && count < covered / 4 && place + count < limit && index + count < q->reftable_entries &&
             !q->reftable[index + count] && !is_protected(q, place + count));
    if (place >= limit)
        return qcow2_break(q, EUCLEAN);
    int error = write_blocks(q, index, count, place, place, count);
    if (!error && fdatasync(q->fd))
        error = errno;
    uint8_t entries[BATCH_MAX * 8];
    for (uint64_t i = 0; i < count && !error; i++) {
        q->reftable[index + i] = (place + i) * q->cluster_size;
        store_be(entries + i * 8, q->reftable[index + i]);
        error = set_add_locked(q, place + i);
    }
    if (!error)
        error = qcow2_pwrite(q->fd, entries, count * 8, q->reftable_offset + index * 8);
    q->dirty = true;
    return error ? qcow2_break(q, error) : 0;
}

/* The refcount block that covers a cluster, made if there is none. */
static int block_for_writing(struct qcow2 *q, uint64_t cluster, struct table **found)
{
    int error = block_of(q, cluster, found);
    /* A table that had to grow may have no block for this cluster yet. */
    for (int tries = 0; tries < 2 && !error && !*found; tries++) {
        error = add_blocks(q, cluster);
        if (!error)
            error = block_of(q, cluster, found);
    }
    return !error && !*found ? qcow2_break(q, EUCLEAN) : error;
}

int refcount_add(struct qcow2 *q, uint64_t cluster, int by, uint64_t *now)
{
    struct table *block;
    int error = by < 0 ? block_of(q, cluster, &block) : block_for_writing(q, cluster, &block);
    if (!error && !block)
        error = qcow2_break(q, EUCLEAN);
    if (error)
        return error;
    uint64_t index = cluster & ((1ull << q->block_bits) - 1), count = block_get(q, block->bytes, index);
    if (by < 0 ? !count : count == refcount_max(q))
        return by < 0 ? qcow2_break(q, EUCLEAN) : EOVERFLOW;
    count += (uint64_t)(int64_t)by;
    block_set(q, block->bytes, index, count);
    block->dirty = true;
    q->dirty = true;
    if (now)
        *now = count;
    return 0;
}

int clusters_take(struct qcow2 *q, uint64_t want, uint64_t *first, uint64_t *got, bool *blank)
{
    uint64_t covered = 1ull << q->block_bits, cluster = q->free_from;
    *got = 0;
    if (q->broken)
        return q->broken;
    for (;;) {
        struct table *block;
        int error = block_for_writing(q, cluster, &block);
        if (error)
            return error;
        uint64_t index = cluster & (covered - 1);
        while (index < covered && block_get(q, block->bytes, index))
            index++;
        cluster = (cluster & ~(covered - 1)) + index;
        if (index < covered) {
            uint64_t count = 0;
            bool beyond = cluster >= q->end;
            if (cluster + want >= OFFSET_MASK / q->cluster_size)
                return EFBIG;
            while (count < want && index + count < covered && (cluster + count >= q->end) == beyond &&
                   !block_get(q, block->bytes, index + count)) {
                if (is_protected(q, cluster + count))
                    return qcow2_break(q, EUCLEAN);
                block_set(q, block->bytes, index + count++, 1);
            }
            block->dirty = true;
            q->dirty = true;
            q->free_from = cluster + count;
            if (cluster + count > q->end)
                q->end = cluster + count;
            *first = cluster;
            *got = count;
            *blank = beyond;
            return 0;
        }
    }
}

int clusters_give(struct qcow2 *q, uint64_t first, uint64_t count)
{
    uint64_t run = 0;
    int error = 0;
    for (uint64_t cluster = first; cluster < first + count && !error; cluster++) {
        uint64_t now = 1;
        error = refcount_add(q, cluster, -1, &now);
        if (!error && !now) {
            run++;
            if (cluster < q->free_from)
                q->free_from = cluster;
            if (q->packed_at >> q->cluster_bits == cluster)
                q->packed_at = 0;
            pthread_mutex_lock(&q->lookup);
            set_remove(&q->metadata, cluster);
            struct table *table = cache_find(&q->l2, cluster * q->cluster_size);
            if (table)
                cache_remove(&q->l2, table);
            pthread_mutex_unlock(&q->lookup);
        }
        if ((error || now || cluster + 1 == first + count) && run) {
            uint64_t end = cluster + (!error && !now);
            file_punch(q->fd, (end - run) * q->cluster_size, run * q->cluster_size);
            run = 0;
        }
    }
    return error;
}

int drops_add(struct drops *drops, uint64_t cluster, uint64_t count)
{
    struct drop *last = drops->count ? &drops->list[drops->count - 1] : NULL;
    drops->clusters += count;
    if (last && last->cluster + last->count == cluster) {
        last->count += count;
        return 0;
    }
    if (drops->count == drops->room) {
        size_t room = drops->room ? drops->room * 2 : 64;
        struct drop *list = realloc(drops->list, room * sizeof *list);
        if (!list)
            return ENOMEM;
        drops->list = list;
        drops->room = room;
    }
    drops->list[drops->count++] = (struct drop){cluster, count};
    return 0;
}
