/* The order in which the tables of a qcow2 image reach its file (qcow2.h says why), and what happens then to clusters that
 * nothing names any more. */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int barrier(struct qcow2 *q, int fd)
{
    /* What a failed fdatasync() did not write may be gone: no later one would say so. */
    return fdatasync(fd) ? qcow2_break(q, errno) : 0;
}

static int write_tables(struct qcow2 *q, struct cache *cache, bool fresh_only, bool *any)
{
    for (unsigned i = 0; i < cache->count; i++) {
        struct table *table = &cache->tables[i];
        if (!table->offset || !table->dirty || (fresh_only && !table->fresh))
            continue;
        int error = qcow2_pwrite(q->fd, table->bytes, q->cluster_size, table->offset);
        if (error)
            return error;
        *any = true;
    }
    return 0;
}

static int write_l1(struct qcow2 *q, bool *any)
{
    uint64_t from = q->l1_dirty_from, count = q->l1_dirty_to - from;
    if (q->l1_dirty_from >= q->l1_dirty_to)
        return 0;
    uint64_t *entries = malloc(count * 8);
    if (!entries)
        return ENOMEM;
    for (uint64_t i = 0; i < count; i++)
        store_be(entries + i, q->l1[from + i]);
    int error = qcow2_pwrite(q->fd, entries, count * 8, q->l1_offset + from * 8);
    free(entries);
    *any = true;
    return error;
}

static void all_clean(struct cache *cache)
{
    for (unsigned i = 0; i < cache->count; i++)
        cache->tables[i].dirty = cache->tables[i].fresh = false;
}

/* Give back what no transfer can be using: of `waiting` those, then what was dropped before the barrier that just was. */
static int release(struct qcow2 *q)
{
    for (int round = 0; round < 2; round++) {
        if (q->waiting.count) {
            if (__atomic_load_n(&q->pins[(q->epoch + 1) & 1], __ATOMIC_ACQUIRE))
                return 0;
            qcow2_forget_unpacked(q);
            for (size_t i = 0; i < q->waiting.count; i++) {
                int error = clusters_give(q, q->waiting.list[i].cluster, q->waiting.list[i].count);
                if (error)
                    return qcow2_break(q, error);
            }
            q->waiting.count = 0;
            q->waiting.clusters = 0;
        }
        if (!q->dropped.count)
            return 0;
        struct drops other = q->waiting;
        q->waiting = q->dropped;
        q->dropped = other;
        pthread_mutex_lock(&q->lookup);
        q->epoch++;
        pthread_mutex_unlock(&q->lookup);
    }
    return 0;
}

int qcow2_write_back(struct qcow2 *q)
{
    if (q->broken)
        return q->broken;
    bool any = false;
    int error = write_tables(q, &q->blocks, false, &any);
    if (!error)
        error = write_tables(q, &q->l2, true, &any);
    if (!error && q->data_fd != q->fd)
        error = barrier(q, q->data_fd);
    if (!error)
        error = barrier(q, q->fd);
    any = false;
    if (!error)
        error = write_tables(q, &q->l2, false, &any);
    if (!error)
        error = write_l1(q, &any);
    if (!error && any)
        error = barrier(q, q->fd);
    if (error)
        return error;
    all_clean(&q->blocks);
    all_clean(&q->l2);
    q->l1_dirty_from = q->l1_dirty_to = 0;
    q->dirty = false;
    return 0;
}

int qcow2_flush_locked(struct qcow2 *q)
{
    int error = qcow2_write_back(q);
    return error ? error : release(q);
}

int qcow2_flush(struct image *image)
{
    struct qcow2 *q = qcow2_of(image);
    if (image->read_only)
        return 0;
    pthread_mutex_lock(&q->tables);
    int error = qcow2_flush_locked(q);
    pthread_mutex_unlock(&q->tables);
    return error;
}
