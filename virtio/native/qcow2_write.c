/* Places for writes to a qcow2 image, and ranges that become zeroes or nothing. */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { DROPS_MAX = 1 << 16 };
#define DROPPED_BYTES (64ull << 20) /* what is not named any more may take so much of the file until it is given back */

enum change { CHANGE_ZERO, CHANGE_ZERO_UNMAP, CHANGE_DISCARD, CHANGE_FORGET };

static struct claim *claim_of(struct qcow2 *q, uint64_t cluster, uint64_t count)
{
    for (struct claim *claim = q->claims; claim; claim = claim->next)
        if (claim->cluster < cluster + count && cluster < claim->cluster + claim->count)
            return claim;
    return NULL;
}

void qcow2_wait_unclaimed(struct qcow2 *q, uint64_t cluster, uint64_t count)
{
    while (claim_of(q, cluster, count))
        pthread_cond_wait(&q->unclaimed, &q->tables);
}

int qcow2_drop_cell(struct qcow2 *q, const struct cell *cell)
{
    if (q->external)
        return 0;
    uint64_t offset = cell->host, length = cell->host ? q->cluster_size : 0;
    if (cell->packed)
        qcow2_packed_place(q, cell->raw, &offset, &length);
    if (!length)
        return 0;
    uint64_t first = offset >> q->cluster_bits, last = (offset + length - 1) >> q->cluster_bits;
    q->dirty = true;
    /* One at a time: several compressed clusters may share one cluster of the file. */
    for (uint64_t cluster = first; cluster <= last; cluster++) {
        int error = drops_add(&q->dropped, cluster, 1);
        if (error)
            return error;
    }
    return 0;
}

static void set_l1(struct qcow2 *q, uint64_t index, uint64_t entry)
{
    q->l1[index] = entry;
    if (q->l1_dirty_from >= q->l1_dirty_to) {
        q->l1_dirty_from = index;
        q->l1_dirty_to = index + 1;
    } else if (index < q->l1_dirty_from) {
        q->l1_dirty_from = index;
    } else if (index >= q->l1_dirty_to) {
        q->l1_dirty_to = index + 1;
    }
    q->dirty = true;
}

int qcow2_l2_for_writing(struct qcow2 *q, uint64_t l1_index, struct table **found)
{
    uint64_t entry = q->l1[l1_index], old = entry & OFFSET_MASK, cluster, got;
    struct table *table = NULL;
    int error = qcow2_l2(q, l1_index, &table);
    *found = table;
    if (error || (old && entry & FLAG_COPIED))
        return error;
    void *copy;
    if (posix_memalign(&copy, 64, q->cluster_size))
        return ENOMEM;
    if (table)
        memcpy(copy, table->bytes, q->cluster_size);
    else
        memset(copy, 0, q->cluster_size);
    bool blank;
    error = clusters_take(q, 1, &cluster, &got, &blank);
    table = NULL;
    for (int tries = 0; !error && !table && tries < 2; tries++) {
        pthread_mutex_lock(&q->lookup);
        table = cache_victim(&q->l2, q->cluster_size);
        if (table) {
            cache_remove(&q->l2, table);
            free(table->bytes);
            table->bytes = copy;
            cache_insert(&q->l2, table, cluster << q->cluster_bits);
            table->dirty = table->fresh = true;
            error = set_add(&q->metadata, cluster);
            set_l1(q, l1_index, cluster << q->cluster_bits | FLAG_COPIED);
        }
        pthread_mutex_unlock(&q->lookup);
        if (!table)
            error = qcow2_write_back(q);
    }
    if (!table) {
        free(copy);
        return error ? error : ENOMEM;
    }
    *found = table;
    return !error && old ? drops_add(&q->dropped, old >> q->cluster_bits, 1) : error;
}

static uint32_t subs_between(const struct qcow2 *q, uint64_t cluster, uint64_t first, uint64_t last)
{
    uint64_t start = cluster << q->cluster_bits, end = start + q->cluster_size;
    uint64_t from = first > start ? first : start, to = last < end ? last : end;
    if (from >= to)
        return 0;
    unsigned low = (unsigned)((from - start) >> q->sub_bits), high = (unsigned)((to - start - 1) >> q->sub_bits);
    return (uint32_t)((2ull << high) - (1ull << low));
}

int qcow2_end_claim(struct qcow2 *q, struct claim *claim, bool done)
{
    pthread_mutex_lock(&q->tables);
    struct table *table = NULL;
    int error = done ? qcow2_l2_for_writing(q, claim->cluster >> q->l2_bits, &table) : 0;
    bool placed = done && !error;
    if (placed) {
        for (uint64_t i = 0; i < claim->count; i++) {
            uint64_t cluster = claim->cluster + i, index = cluster & ((1ull << q->l2_bits) - 1);
            struct cell old = qcow2_cell(q, table, index), cell = old;
            uint32_t touched = subs_between(q, cluster, claim->first, claim->last);
            cell.packed = false;
            cell.has_host = cell.copied = true;
            cell.host = claim->host + (i << q->cluster_bits);
            cell.allocated = (claim->taken ? 0 : old.allocated) | touched;
            cell.zero = old.packed ? 0 : old.zero & ~touched;
            if (claim->zeroes)
                cell = (struct cell){.zero = q->subs == 32 ? UINT32_MAX : 1};
            pthread_mutex_lock(&q->lookup);
            qcow2_set_cell(q, table, index, &cell);
            pthread_mutex_unlock(&q->lookup);
            if (claim->taken && !error)
                error = qcow2_drop_cell(q, &old);
        }
        q->dirty = true;
    }
    if (claim->taken && (!placed || claim->zeroes)) {
        int other = clusters_give(q, claim->host >> q->cluster_bits, claim->count);
        error = error ? error : other;
    }
    struct claim **at = &q->claims;
    while (*at != claim)
        at = &(*at)->next;
    *at = claim->next;
    pthread_cond_broadcast(&q->unclaimed);
    pthread_mutex_unlock(&q->tables);
    free(claim);
    return error;
}

static bool backing_reaches(const struct qcow2 *q, uint64_t offset)
{
    return q->image.backing && offset < q->image.backing->length;
}

/* Whether a cluster that is not fully in memory reads as zeroes without looking into other files. */
static bool reads_zero(const struct qcow2 *q, const struct cell *cell, uint64_t cluster)
{
    uint32_t all = q->subs == 32 ? UINT32_MAX : 1;
    if (cell->packed || cell->allocated)
        return false;
    return cell->zero == all || !backing_reaches(q, cluster << q->cluster_bits);
}

static bool can_stay(const struct qcow2 *q, const struct cell *cell)
{
    return q->external || (cell->has_host && cell->copied && !cell->packed && qcow2_is_place(q, cell->host));
}

/* Bytes beside the written ones, in the first or last cluster of a claim, that have to be written with them. */
static uint64_t margin(const struct qcow2 *q, const struct cell *cell, uint64_t cluster, uint64_t at, bool taken, bool blank,
                       bool before)
{
    uint64_t inside = at & (q->cluster_size - 1), whole = before ? inside : (q->cluster_size - inside) & (q->cluster_size - 1);
    if (!whole || (taken && blank && reads_zero(q, cell, cluster)))
        return 0;
    if (q->subs > 1 && !(taken && (cell->allocated || cell->packed))) {
        uint64_t size = 1ull << q->sub_bits, in_sub = at & (size - 1);
        unsigned sub = (unsigned)((inside - (before ? 0 : 1)) >> q->sub_bits);
        if (!taken && cell->allocated >> sub & 1)
            return 0;
        return before ? in_sub : (size - in_sub) & (size - 1);
    }
    return whole;
}

static struct cell cell_at(const struct qcow2 *q, const struct table *table, uint64_t cluster)
{
    if (table)
        return qcow2_cell(q, table, cluster & ((1ull << q->l2_bits) - 1));
    return (struct cell){0};
}

/* A claim on the first clusters of a range, and its extent. `tables` is held; what may be written in place is not asked
 * for here. */
static int claim_place(struct qcow2 *q, const struct table *table, uint64_t offset, uint64_t length, struct extent *extent)
{
    uint64_t cluster = offset >> q->cluster_bits, inside = offset & (q->cluster_size - 1);
    uint64_t want = (inside + length + q->cluster_size - 1) >> q->cluster_bits, host, got = 1;
    uint64_t limit = (1ull << q->l2_bits) - (cluster & ((1ull << q->l2_bits) - 1));
    struct cell first = cell_at(q, table, cluster), last = first;
    bool stays = can_stay(q, &first), blank = false;
    if (want > limit)
        want = limit;
    struct claim *claim = malloc(sizeof *claim);
    if (!claim)
        return ENOMEM;
    if (stays) {
        host = q->external ? cluster << q->cluster_bits : first.host;
    } else {
        for (uint64_t more = 1; more < want; more++) {
            struct cell cell = cell_at(q, table, cluster + more);
            if (can_stay(q, &cell) || claim_of(q, cluster + more, 1))
                want = more;
        }
        int error = clusters_take(q, want, &host, &got, &blank);
        if (error) {
            free(claim);
            return error;
        }
        host <<= q->cluster_bits;
        last = cell_at(q, table, cluster + got - 1);
    }
    if (length > (got << q->cluster_bits) - inside)
        length = (got << q->cluster_bits) - inside;
    uint64_t end = offset + length;
    uint64_t before = margin(q, &first, cluster, offset, !stays, blank, true);
    uint64_t after = margin(q, &last, cluster + got - 1, end, !stays, blank, false);
    *claim = (struct claim){.next = q->claims, .cluster = cluster, .count = got, .host = host, .first = offset - before,
                            .last = end + after, .taken = !stays};
    q->claims = claim;
    *extent = (struct extent){.kind = KIND_DATA, .fd = q->data_fd, .align = q->align, .offset = host + inside,
                              .length = length, .before = before, .after = after, .owner = &q->image, .guest = offset,
                              .token = (uint64_t)(uintptr_t)claim};
    return 0;
}

int qcow2_claim_whole(struct qcow2 *q, uint64_t offset, uint64_t *length, struct extent *extent)
{
    uint64_t cluster = offset >> q->cluster_bits, entries = 1ull << q->l2_bits;
    struct table *table;
    int error = qcow2_l2(q, cluster >> q->l2_bits, &table);
    struct cell cell = error ? (struct cell){0} : cell_at(q, table, cluster);
    *length = q->cluster_size - (offset & (q->cluster_size - 1));
    if (error)
        return error;
    /* What has a place, reads as zeroes or reads from no backing image is as it should be; but a cluster of subclusters may
     * be so in part. */
    uint32_t all = q->subs == 32 ? UINT32_MAX : 1;
    if (cell.packed || (cell.allocated | cell.zero) == all || !backing_reaches(q, cluster << q->cluster_bits)) {
        while (((cluster + 1) & (entries - 1)) && !table && *length < q->image.length) {
            *length += q->cluster_size; /* no table, and nothing to be read below: all of it is so */
            cluster++;
        }
        return 0;
    }
    error = claim_place(q, table, offset, *length, extent);
    if (!error) {
        extent->kind = KIND_DATA;
        *length = 0;
    }
    return error;
}

int qcow2_allocate(struct image *image, uint64_t offset, uint64_t length, struct extent *extent)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t cluster = offset >> q->cluster_bits, nothing;
    struct table *table;
    pthread_mutex_lock(&q->tables);
    qcow2_wait_unclaimed(q, cluster, 1);
    int error = image->read_only ? EROFS : q->broken;
    if (!error && cluster >> q->l2_bits >= q->l1_entries)
        error = EIO;
    if (!error && (q->dropped.clusters > DROPPED_BYTES >> q->cluster_bits || q->dropped.count > DROPS_MAX))
        error = qcow2_flush_locked(q);
    if (!error)
        error = qcow2_l2(q, cluster >> q->l2_bits, &table);
    if (!error) {
        pthread_mutex_lock(&q->lookup);
        error = qcow2_find(q, offset, length, FOR_WRITING, extent, &nothing);
        pthread_mutex_unlock(&q->lookup);
        if (error == NOT_IN_PLACE)
            error = claim_place(q, table, offset, length, extent);
    }
    pthread_mutex_unlock(&q->tables);
    return error;
}

/* Whether nothing would change if a range became zeroes. May block. */
static bool is_zero_already(struct image *image, uint64_t offset, uint64_t length)
{
    while (length) {
        struct extent extent;
        if (qcow2_of(image)->broken || image->ops->locate(image, offset, length, &extent))
            return false;
        image_complete(&extent, false);
        if (extent.kind != KIND_ZERO)
            return false;
        offset += extent.length;
        length -= extent.length;
    }
    return true;
}

/* What a cell becomes of which the subclusters `touched` change. False: nothing changes. */
static bool change_cell(const struct qcow2 *q, const struct cell *old, uint64_t cluster, uint32_t touched, enum change change,
                        struct cell *cell)
{
    uint32_t all = q->subs == 32 ? UINT32_MAX : 1;
    bool whole = touched == all, backed = backing_reaches(q, cluster << q->cluster_bits), zeroes = q->version > 2;
    *cell = (struct cell){0};
    bool empty = !old->packed && !old->has_host && !old->allocated && !old->zero;
    if (empty && (!backed || change == CHANGE_FORGET))
        return false;
    switch (change) {
    case CHANGE_FORGET:
        return whole;
    case CHANGE_DISCARD:
        if (!whole || (backed && !zeroes))
            return false;
        if (backed)
            cell->zero = all;
        break;
    default:
        if (!whole && old->packed)
            return false;
        if (!whole) {
            *cell = *old;
            cell->zero |= touched;
            cell->allocated &= ~touched;
            return cell->zero != old->zero || cell->allocated != old->allocated;
        }
        if (zeroes && (backed || change == CHANGE_ZERO))
            cell->zero = all;
        if (change == CHANGE_ZERO && zeroes && can_stay(q, old) && !q->external) {
            cell->has_host = cell->copied = true;
            cell->host = old->host;
        }
        if (!zeroes && backed)
            return false;
    }
    return old->packed || cell->has_host != old->has_host || cell->zero != old->zero || cell->allocated != old->allocated;
}

/* The part of a range that one L2 table covers; `*length` is shortened to it. */
static int change_part(struct qcow2 *q, uint64_t offset, uint64_t *length, enum change change)
{
    uint64_t cluster = offset >> q->cluster_bits, entries = 1ull << q->l2_bits;
    uint64_t covered = ((entries - (cluster & (entries - 1))) << q->cluster_bits) - (offset & (q->cluster_size - 1));
    if (*length > covered)
        *length = covered;
    uint64_t end = offset + *length, count = ((end + q->cluster_size - 1) >> q->cluster_bits) - cluster;
    if (end == q->image.length)
        end = (cluster + count) << q->cluster_bits; /* the rest of the last cluster is nobody's */
    /* Of a discard only subclusters that it covers. */
    uint64_t unit = 1ull << q->sub_bits, from = round_up(offset, unit), to = end & ~(unit - 1);
    struct table *table;
    pthread_mutex_lock(&q->tables);
    qcow2_wait_unclaimed(q, cluster, count);
    int error = q->broken;
    if (!error && cluster >> q->l2_bits >= q->l1_entries)
        error = EIO;
    if (!error && (q->dropped.clusters > DROPPED_BYTES >> q->cluster_bits || q->dropped.count > DROPS_MAX))
        error = qcow2_flush_locked(q);
    if (!error)
        error = qcow2_l2(q, cluster >> q->l2_bits, &table);
    bool nothing = !error && !table && (change == CHANGE_FORGET || !backing_reaches(q, offset));
    bool writable = false;
    for (uint64_t i = 0; i < count && !error && !nothing; i++) {
        struct cell old = cell_at(q, table, cluster + i), cell;
        uint32_t touched = subs_between(q, cluster + i, from, to);
        if (!touched || !change_cell(q, &old, cluster + i, touched, change, &cell))
            continue;
        if (!writable)
            error = qcow2_l2_for_writing(q, cluster >> q->l2_bits, &table);
        writable = true;
        if (error)
            break;
        pthread_mutex_lock(&q->lookup);
        qcow2_set_cell(q, table, (cluster + i) & (entries - 1), &cell);
        pthread_mutex_unlock(&q->lookup);
        q->dirty = true;
        if (!cell.has_host)
            error = qcow2_drop_cell(q, &old);
    }
    pthread_mutex_unlock(&q->tables);
    return error;
}

int qcow2_forget_locked(struct qcow2 *q, uint64_t cluster, uint64_t count)
{
    struct table *table;
    int error = qcow2_l2(q, cluster >> q->l2_bits, &table);
    if (error || !table)
        return error;
    error = qcow2_l2_for_writing(q, cluster >> q->l2_bits, &table);
    for (uint64_t i = 0; i < count && !error; i++) {
        uint64_t index = (cluster + i) & ((1ull << q->l2_bits) - 1);
        struct cell old = qcow2_cell(q, table, index), cell = {0};
        if (!old.packed && !old.has_host && !old.zero)
            continue;
        pthread_mutex_lock(&q->lookup);
        qcow2_set_cell(q, table, index, &cell);
        pthread_mutex_unlock(&q->lookup);
        q->dirty = true;
        error = qcow2_drop_cell(q, &old);
    }
    return error;
}

static int change_range(struct image *image, uint64_t offset, uint64_t length, enum change change, const bool *abandoned)
{
    int error = image->read_only ? EROFS : 0;
    while (length && !error && !image_abandoned(abandoned)) {
        uint64_t part = length;
        error = change_part(qcow2_of(image), offset, &part, change);
        offset += part;
        length -= part;
    }
    return error;
}

/* Zeroes where only a part of a unit is to become so. */
static int zero_edge(struct image *image, uint64_t offset, uint64_t length, const bool *abandoned)
{
    if (!length || is_zero_already(image, offset, length))
        return 0;
    return image_write_zeroes(image, offset, length, abandoned);
}

int qcow2_zero(struct image *image, uint64_t offset, uint64_t length, bool unmap, const bool *abandoned)
{
    struct qcow2 *q = qcow2_of(image);
    if (image->read_only)
        return EROFS;
    if (q->external_raw || (q->version < 3 && image->backing))
        return image_write_zeroes(image, offset, length, abandoned);
    uint64_t unit = 1ull << q->sub_bits, end = offset + length;
    uint64_t from = round_up(offset, unit), to = end == image->length ? end : end / unit * unit;
    if (from >= to)
        return zero_edge(image, offset, length, abandoned);
    int error = zero_edge(image, offset, from - offset, abandoned);
    if (!error)
        error = zero_edge(image, to, end - to, abandoned);
    if (!error)
        error = change_range(image, from, to - from, unmap ? CHANGE_ZERO_UNMAP : CHANGE_ZERO, abandoned);
    if (q->subs > 1 && !error) {
        /* Compressed clusters of which only some subclusters were meant are as before. */
        uint64_t first = round_up(from, q->cluster_size), last = to / q->cluster_size * q->cluster_size;
        error = zero_edge(image, from, (first < to ? first : to) - from, abandoned);
        if (!error && last >= first && to != image->length)
            error = zero_edge(image, last, to - last, abandoned);
    }
    return error;
}

int qcow2_discard(struct image *image, uint64_t offset, uint64_t length)
{
    struct qcow2 *q = qcow2_of(image);
    if (image->read_only)
        return EROFS;
    if (q->external) {
        file_punch(q->data_fd, offset, length);
        return 0;
    }
    return change_range(image, offset, length, CHANGE_DISCARD, NULL);
}

int qcow2_forget(struct image *image, uint64_t offset, uint64_t length)
{
    return change_range(image, offset, length, CHANGE_FORGET, NULL);
}
