/* qcow2 images: opening, and where bytes stand. */
#include "qcow2_open.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum type { TYPE_NOTHING, TYPE_ZERO, TYPE_DATA, TYPE_PACKED, TYPE_BAD };

int qcow2_pread(int fd, void *to, uint64_t length, uint64_t offset)
{
    struct iovec iov = {to, length};
    return file_transfer(fd, false, &iov, 1, offset, length, 0, true);
}

int qcow2_pwrite(int fd, const void *from, uint64_t length, uint64_t offset)
{
    struct iovec iov = {(void *)from, length};
    return file_transfer(fd, true, &iov, 1, offset, length, 0, false);
}

int qcow2_break(struct qcow2 *q, int error)
{
    if (!q->broken)
        q->broken = error == EUCLEAN ? EIO : error;
    return q->broken;
}

struct cell qcow2_cell(const struct qcow2 *q, const struct table *table, uint64_t index)
{
    const uint8_t *at = table->bytes + (index << q->entry_bits);
    uint64_t raw = load_be(at);
    struct cell cell = {.raw = raw, .copied = raw & FLAG_COPIED};
    if (raw & FLAG_PACKED) {
        cell.packed = true;
        return cell;
    }
    cell.host = raw & OFFSET_MASK;
    cell.has_host = cell.host || (q->external && cell.copied);
    if (q->extended) {
        uint64_t bitmap = load_be(at + 8);
        cell.allocated = (uint32_t)bitmap;
        cell.zero = (uint32_t)(bitmap >> 32);
    } else {
        cell.zero = q->version > 2 && raw & FLAG_ZERO;
        cell.allocated = cell.has_host && !cell.zero;
    }
    return cell;
}

void qcow2_set_cell(const struct qcow2 *q, struct table *table, uint64_t index, const struct cell *cell)
{
    uint8_t *at = table->bytes + (index << q->entry_bits);
    uint64_t raw = cell->raw;
    if (!cell->packed) {
        raw = cell->has_host ? cell->host | (cell->copied ? FLAG_COPIED : 0) : 0;
        if (!q->extended && cell->zero)
            raw |= FLAG_ZERO;
    }
    store_be(at, raw);
    if (q->extended)
        store_be(at + 8, cell->packed ? 0 : (uint64_t)cell->zero << 32 | cell->allocated);
    table->dirty = true;
}

bool qcow2_is_place(const struct qcow2 *q, uint64_t host)
{
    if (q->external)
        return true;
    uint64_t cluster = host >> q->cluster_bits;
    if (host & (q->cluster_size - 1) || cluster >= q->end)
        return false;
    for (unsigned i = 0; i < q->range_count; i++)
        if (cluster - q->ranges[i].cluster < q->ranges[i].count)
            return false;
    return !set_has(&q->metadata, cluster);
}

int qcow2_l2(struct qcow2 *q, uint64_t l1_index, struct table **found)
{
    uint64_t offset = q->l1[l1_index] & OFFSET_MASK;
    *found = NULL;
    if (!offset)
        return 0;
    if (offset & (q->cluster_size - 1) || offset >> q->cluster_bits >= q->end)
        return EIO;
    pthread_mutex_lock(&q->lookup);
    struct table *table = cache_find(&q->l2, offset);
    pthread_mutex_unlock(&q->lookup);
    if (table) {
        *found = table;
        return 0;
    }
    for (int tries = 0;; tries++) {
        pthread_mutex_lock(&q->lookup);
        table = cache_victim(&q->l2, q->cluster_size);
        if (table)
            cache_remove(&q->l2, table);
        pthread_mutex_unlock(&q->lookup);
        if (table)
            break;
        int error = tries ? ENOMEM : qcow2_write_back(q);
        if (error)
            return error;
    }
    int error = qcow2_pread(q->fd, table->bytes, q->cluster_size, offset);
    if (error)
        return error;
    pthread_mutex_lock(&q->lookup);
    cache_insert(&q->l2, table, offset);
    pthread_mutex_unlock(&q->lookup);
    *found = table;
    return 0;
}

static enum type type_of(const struct qcow2 *q, const struct cell *cell, unsigned sub)
{
    if (cell->packed)
        return q->external ? TYPE_BAD : TYPE_PACKED;
    bool allocated = cell->allocated >> sub & 1, zero = cell->zero >> sub & 1;
    if (allocated)
        return zero || !cell->has_host ? TYPE_BAD : TYPE_DATA;
    return zero ? TYPE_ZERO : TYPE_NOTHING;
}

/* How many subclusters from `sub` on are of that type. */
static unsigned same_from(const struct qcow2 *q, const struct cell *cell, unsigned sub, enum type type)
{
    unsigned count = 1;
    if (cell->packed)
        return q->subs - sub;
    while (sub + count < q->subs && type_of(q, cell, sub + count) == type)
        count++;
    return count;
}

static bool writable_in_place(const struct qcow2 *q, const struct cell *cell)
{
    return (cell->copied || q->external) && qcow2_is_place(q, cell->host);
}

int qcow2_find(struct qcow2 *q, uint64_t offset, uint64_t length, enum intent intent, struct extent *extent,
               uint64_t *nothing)
{
    uint64_t cluster = offset >> q->cluster_bits, inside = offset & (q->cluster_size - 1);
    uint64_t l1_index = cluster >> q->l2_bits, index = cluster & ((1ull << q->l2_bits) - 1), limit = 1ull << q->l2_bits;
    uint64_t covered = ((limit - index) << q->cluster_bits) - inside;
    if (length > covered)
        length = covered;
    *nothing = 0;
    if (l1_index >= q->l1_entries)
        return EIO;
    uint64_t table_at = q->l1[l1_index] & OFFSET_MASK;
    if (!table_at) {
        *nothing = length;
        return intent == FOR_WRITING ? NOT_IN_PLACE : FOUND;
    }
    const struct table *table = cache_find(&q->l2, table_at);
    if (!table)
        return NOT_CACHED;
    unsigned sub = (unsigned)(inside >> q->sub_bits);
    struct cell cell = qcow2_cell(q, table, index);
    enum type type = type_of(q, &cell, sub);
    uint64_t host = cell.host;
    if (type == TYPE_BAD || (type == TYPE_DATA && !q->external && (host & (q->cluster_size - 1) || host >> q->cluster_bits >= q->end)))
        return EIO;
    if (intent == FOR_WRITING && (type != TYPE_DATA || !writable_in_place(q, &cell)))
        return NOT_IN_PLACE;
    if (intent == FOR_WRITING && q->barred.count && cluster < q->barred.cluster + q->barred.count &&
        q->barred.cluster <= (offset + length - 1) >> q->cluster_bits)
        return NOT_IN_PLACE;
    uint64_t run = ((uint64_t)(sub + same_from(q, &cell, sub, type)) << q->sub_bits) - inside;
    bool whole = sub + same_from(q, &cell, sub, type) == q->subs;
    while (run < length && whole && type != TYPE_PACKED) {
        uint64_t next = cell.host + q->cluster_size;
        index++;
        cell = qcow2_cell(q, table, index);
        if (type_of(q, &cell, 0) != type)
            break;
        if (type == TYPE_DATA && (cell.host != next || (!q->external && cell.host >> q->cluster_bits >= q->end) ||
                                  (intent == FOR_WRITING && !writable_in_place(q, &cell))))
            break;
        unsigned count = same_from(q, &cell, 0, type);
        run += (uint64_t)count << q->sub_bits;
        whole = count == q->subs;
    }
    if (run < length)
        length = run;
    if (type == TYPE_NOTHING) {
        *nothing = length;
        return FOUND;
    }
    *extent = (struct extent){.kind = type == TYPE_DATA ? KIND_DATA : type == TYPE_ZERO ? KIND_ZERO : KIND_PACKED,
                              .fd = -1, .length = length, .owner = &q->image, .guest = offset, .token = 2};
    if (type == TYPE_DATA) {
        extent->fd = q->data_fd;
        extent->align = q->align;
        extent->sparse_end = true;
        extent->offset = host + inside;
        extent->token = q->epoch & 1;
        __atomic_fetch_add(&q->pins[extent->token], 1, __ATOMIC_RELAXED);
    }
    return FOUND;
}

static bool qcow2_map(struct image *image, uint64_t offset, uint64_t length, enum intent intent, struct extent *extent)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t nothing;
    pthread_mutex_lock(&q->lookup);
    int got = qcow2_find(q, offset, length, intent, extent, &nothing);
    pthread_mutex_unlock(&q->lookup);
    if (got != FOUND)
        return false;
    return !nothing || image_map_backing(image, offset, nothing, extent);
}

static int qcow2_locate(struct image *image, uint64_t offset, uint64_t length, struct extent *extent)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t nothing;
    pthread_mutex_lock(&q->lookup);
    int got = qcow2_find(q, offset, length, FOR_READING, extent, &nothing);
    pthread_mutex_unlock(&q->lookup);
    if (got == NOT_CACHED) {
        struct table *table;
        pthread_mutex_lock(&q->tables);
        got = qcow2_l2(q, offset >> (q->cluster_bits + q->l2_bits), &table);
        /* While `tables` is held nobody can take the table away again. */
        if (!got) {
            pthread_mutex_lock(&q->lookup);
            got = qcow2_find(q, offset, length, FOR_READING, extent, &nothing);
            pthread_mutex_unlock(&q->lookup);
        }
        pthread_mutex_unlock(&q->tables);
    }
    if (got)
        return got > 0 ? got : EIO;
    return nothing ? image_locate_backing(image, offset, nothing, extent) : 0;
}

static int qcow2_complete(struct extent *extent, bool done)
{
    struct qcow2 *q = qcow2_of(extent->owner);
    if (extent->token < 2) {
        __atomic_fetch_sub(&q->pins[extent->token], 1, __ATOMIC_RELEASE);
        return 0;
    }
    return extent->token == 2 ? 0 : qcow2_end_claim(q, (struct claim *)(uintptr_t)extent->token, done);
}

static int qcow2_flush_fd(struct image *image)
{
    struct qcow2 *q = qcow2_of(image);
    if (image->read_only)
        return FLUSH_NOTHING;
    return __atomic_load_n(&q->dirty, __ATOMIC_ACQUIRE) || q->broken ? FLUSH_CALL : q->data_fd;
}

static void qcow2_close(struct image *image)
{
    struct qcow2 *q = qcow2_of(image);
    cache_close(&q->l2);
    cache_close(&q->blocks);
    for (unsigned i = 0; i < UNPACKED; i++)
        free(q->unpacked[i].bytes);
    free(q->metadata.slots);
    free(q->dropped.list);
    free(q->waiting.list);
    free(q->l1);
    free(q->reftable);
    pthread_mutex_destroy(&q->tables);
    pthread_mutex_destroy(&q->lookup);
    pthread_mutex_destroy(&q->unpack_lock);
    pthread_cond_destroy(&q->unclaimed);
    free(q);
}

static const struct image_ops qcow2_ops = {
    .name = "qcow2", .map = qcow2_map, .locate = qcow2_locate, .allocate = qcow2_allocate, .complete = qcow2_complete,
    .unpack = qcow2_unpack, .zero = qcow2_zero, .discard = qcow2_discard, .flush = qcow2_flush,
    .flush_fd = qcow2_flush_fd, .close = qcow2_close,
};

static int load_numbers(int fd, uint64_t offset, uint64_t count, uint64_t **numbers)
{
    *numbers = calloc(count ? count : 1, 8);
    int error = *numbers ? qcow2_pread(fd, *numbers, count * 8, offset) : ENOMEM;
    for (uint64_t i = 0; i < count && !error; i++)
        (*numbers)[i] = __builtin_bswap64((*numbers)[i]);
    return error;
}

/* The clusters that hold tables. A file in which two of them meet is not written. */
static const char *find_metadata(struct qcow2 *q, int *error)
{
    for (unsigned i = 0; i < q->range_count; i++)
        for (unsigned j = 0; j < i; j++)
            if (q->ranges[i].cluster < q->ranges[j].cluster + q->ranges[j].count &&
                q->ranges[j].cluster < q->ranges[i].cluster + q->ranges[i].count)
                return "its tables overlap";
    for (uint64_t i = 0; i < q->reftable_entries; i++) {
        uint64_t offset = q->reftable[i];
        if (!offset)
            continue;
        if (!qcow2_is_place(q, offset))
            return "a refcount block is where none can be";
        if ((*error = set_add(&q->metadata, offset >> q->cluster_bits)))
            return NULL;
    }
    struct cluster_set seen = {0}; /* of L2 tables, which several L1 entries may name */
    const char *problem = NULL;
    for (uint64_t i = 0; i < q->l1_entries && !problem && !*error; i++) {
        uint64_t offset = q->l1[i] & OFFSET_MASK, cluster = offset >> q->cluster_bits;
        if (!offset || set_has(&seen, cluster))
            continue;
        if (offset & (q->cluster_size - 1) || cluster >= q->end)
            continue; /* what it covers is an I/O error */
        bool external = q->external;
        q->external = false;
        if (!qcow2_is_place(q, offset))
            problem = "an L2 table is where none can be";
        q->external = external;
        if (!problem && !(*error = set_add(&seen, cluster)))
            *error = set_add(&q->metadata, cluster);
    }
    free(seen.slots);
    return problem;
}

struct image *qcow2_open(const struct qcow2_options *options, int *error, const char **problem)
{
    *problem = NULL;
    *error = EINVAL;
    unsigned bits = options->cluster_bits;
    if (bits < CLUSTER_BITS_MIN || bits > CLUSTER_BITS_MAX || options->refcount_order > 6 ||
        options->range_count >= RANGES_MAX - 4 || (options->extended && bits < 14) ||
        options->l1_entries * 8 > L1_BYTES_MAX || options->reftable_clusters << bits > REFTABLE_BYTES_MAX + (1u << bits))
        return NULL;
    struct qcow2 *q = calloc(1, sizeof *q);
    *error = ENOMEM;
    if (!q)
        return NULL;
    q->image = (struct image){.ops = &qcow2_ops, .length = options->length, .fd = options->data_fd, .flat = -1, .read_only = options->read_only,
                              .backing = options->backing};
    q->fd = options->fd;
    q->data_fd = options->data_fd;
    q->external = options->external;
    q->external_raw = options->external_raw;
    q->extended = options->extended;
    q->align = options->align;
    q->version = options->version;
    q->compression = options->compression;
    q->cluster_bits = bits;
    q->cluster_size = 1ull << bits;
    q->entry_bits = q->extended ? 4 : 3;
    q->l2_bits = bits - q->entry_bits;
    q->subs = q->extended ? 32 : 1;
    q->sub_bits = q->extended ? bits - 5 : bits;
    q->refcount_order = options->refcount_order;
    q->block_bits = bits + 3 - q->refcount_order;
    q->l1_entries = options->l1_entries;
    q->l1_offset = options->l1_offset;
    q->reftable_offset = options->reftable_offset;
    q->reftable_entries = options->reftable_clusters * q->cluster_size / 8;
    pthread_mutex_init(&q->tables, NULL);
    pthread_mutex_init(&q->lookup, NULL);
    pthread_mutex_init(&q->unpack_lock, NULL);
    pthread_cond_init(&q->unclaimed, NULL);
    off_t size = lseek(q->fd, 0, SEEK_END);
    *error = size < 0 ? errno : 0;
    q->end = round_up((uint64_t)size, q->cluster_size) >> bits;
    memcpy(q->ranges, options->ranges, options->range_count * sizeof *q->ranges);
    q->range_count = options->range_count;
    q->ranges[q->range_count++] = (struct drop){0, 1};
    if (q->l1_entries)
        q->ranges[q->range_count++] =
            (struct drop){q->l1_offset >> bits, (q->l1_entries * 8 + q->cluster_size - 1) >> bits};
    q->reftable_range = q->range_count;
    q->ranges[q->range_count++] = (struct drop){q->reftable_offset >> bits, options->reftable_clusters};
    uint64_t covered = q->l1_entries << (q->l2_bits + bits);
    if (!*error && q->image.length > covered)
        *problem = "its L1 table is too small for its size";
    if (!*error)
        *error = cache_open(&q->l2, options->cache_bytes, q->cluster_size);
    if (!*error)
        *error = cache_open(&q->blocks, options->cache_bytes / 8, q->cluster_size);
    if (!*error)
        *error = load_numbers(q->fd, q->l1_offset, q->l1_entries, &q->l1);
    if (!*error)
        *error = load_numbers(q->fd, q->reftable_offset, q->reftable_entries, &q->reftable);
    if (!*error && !*problem && !q->image.read_only)
        *problem = find_metadata(q, error);
    if (*error || *problem) {
        qcow2_close(&q->image);
        return NULL;
    }
    return &q->image;
}
