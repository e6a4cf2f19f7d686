/* Compressed clusters of a qcow2 image: reading them, and adding them when an image is converted.
 *
 * The libraries are the host's, found when a compressed cluster is first met, so that building needs neither; where one is
 * missing, or under another name, image_unpack_elsewhere has Python do it. */
#include "qcow2_pack.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { Z_FINISH = 4, Z_STREAM_END = 1, Z_BUF_ERROR = -5, RAW_DEFLATE = -15, TYPE_DEFLATE = 0 };

int (*image_unpack_elsewhere)(int type, const void *data, size_t length, void *to, size_t size);

/* z_stream of zlib.h */
struct stream {
    const uint8_t *next_in;
    unsigned avail_in;
    unsigned long total_in;
    uint8_t *next_out;
    unsigned avail_out;
    unsigned long total_out;
    const char *message;
    void *state;
    void *allocate, *release, *opaque;
    int data_type;
    unsigned long adler, reserved;
};

/* ZSTD_inBuffer and ZSTD_outBuffer of zstd.h */
struct zstd_in {
    const void *bytes;
    size_t size, at;
};
struct zstd_out {
    void *bytes;
    size_t size, at;
};

static struct {
    int (*init)(struct stream *, int, const char *, int);
    int (*inflate)(struct stream *, int);
    int (*end)(struct stream *);
    void *(*zstd_new)(void);
    size_t (*zstd_free)(void *);
    size_t (*zstd_run)(void *, struct zstd_out *, struct zstd_in *);
    unsigned (*zstd_failed)(size_t);
} library;

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void *symbol(void *handle, const char *name)
{
    return handle ? dlsym(handle, name) : NULL;
}

static void load_libraries(void)
{
    void *z = dlopen("libz.so.1", RTLD_NOW | RTLD_LOCAL), *zstd = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    *(void **)&library.init = symbol(z, "inflateInit2_");
    *(void **)&library.inflate = symbol(z, "inflate");
    *(void **)&library.end = symbol(z, "inflateEnd");
    *(void **)&library.zstd_new = symbol(zstd, "ZSTD_createDStream");
    *(void **)&library.zstd_free = symbol(zstd, "ZSTD_freeDStream");
    *(void **)&library.zstd_run = symbol(zstd, "ZSTD_decompressStream");
    *(void **)&library.zstd_failed = symbol(zstd, "ZSTD_isError");
}

static int unpack_deflate(const void *data, size_t length, void *to, size_t size)
{
    struct stream stream = {.next_in = data, .avail_in = (unsigned)length, .next_out = to, .avail_out = (unsigned)size};
    if (library.init(&stream, RAW_DEFLATE, "1.2.0", sizeof stream))
        return EIO;
    int result = library.inflate(&stream, Z_FINISH);
    library.end(&stream);
    return !stream.avail_out && (result == Z_STREAM_END || result == Z_BUF_ERROR) ? 0 : EIO;
}

static int unpack_zstd(const void *data, size_t length, void *to, size_t size)
{
    void *stream = library.zstd_new();
    struct zstd_in in = {data, length, 0};
    struct zstd_out out = {to, size, 0};
    int error = stream ? 0 : ENOMEM;
    while (!error && out.at < size) {
        size_t before = out.at, from = in.at, result = library.zstd_run(stream, &out, &in);
        if (library.zstd_failed(result) || (out.at == before && in.at == from))
            error = EIO;
    }
    library.zstd_free(stream);
    return error;
}

static int unpack(int type, const void *data, size_t length, void *to, size_t size)
{
    pthread_once(&once, load_libraries);
    if (type == TYPE_DEFLATE && library.init && library.inflate && library.end)
        return unpack_deflate(data, length, to, size);
    if (type != TYPE_DEFLATE && library.zstd_new && library.zstd_free && library.zstd_run && library.zstd_failed)
        return unpack_zstd(data, length, to, size);
    return image_unpack_elsewhere ? image_unpack_elsewhere(type, data, length, to, size) : ENOTSUP;
}

void qcow2_packed_place(const struct qcow2 *q, uint64_t entry, uint64_t *offset, uint64_t *length)
{
    unsigned x = 62 - (q->cluster_bits - 8);
    uint64_t sectors = ((entry & (FLAG_PACKED - 1)) >> x) + 1;
    *offset = entry & ((1ull << x) - 1) & ((1ull << 56) - 1);
    *length = sectors * 512 - (*offset & 511);
}

void qcow2_forget_unpacked(struct qcow2 *q)
{
    pthread_mutex_lock(&q->unpack_lock);
    for (unsigned i = 0; i < UNPACKED; i++)
        q->unpacked[i].entry = 0;
    pthread_mutex_unlock(&q->unpack_lock);
}

static bool recall(struct qcow2 *q, uint64_t entry, uint64_t inside, uint64_t length, void *to)
{
    bool found = false;
    pthread_mutex_lock(&q->unpack_lock);
    for (unsigned i = 0; i < UNPACKED && !found; i++) {
        if (q->unpacked[i].entry == entry) {
            memcpy(to, q->unpacked[i].bytes + inside, length);
            q->unpacked[i].used = ++q->unpack_clock;
            found = true;
        }
    }
    pthread_mutex_unlock(&q->unpack_lock);
    return found;
}

/* Keep a cluster; takes `bytes`. */
static void keep(struct qcow2 *q, uint64_t entry, uint8_t *bytes)
{
    pthread_mutex_lock(&q->unpack_lock);
    struct unpacked *oldest = &q->unpacked[0];
    for (unsigned i = 1; i < UNPACKED; i++)
        if (q->unpacked[i].used < oldest->used)
            oldest = &q->unpacked[i];
    free(oldest->bytes);
    *oldest = (struct unpacked){entry, ++q->unpack_clock, bytes};
    pthread_mutex_unlock(&q->unpack_lock);
}

/* The bytes of the cluster that `entry` describes. */
static int fetch(struct qcow2 *q, uint64_t entry, uint64_t inside, uint64_t length, void *to)
{
    uint64_t offset, packed_length;
    qcow2_packed_place(q, entry, &offset, &packed_length);
    if (offset >> q->cluster_bits >= q->end)
        return EIO;
    uint8_t *packed = malloc(packed_length), *bytes = malloc(q->cluster_size);
    int error = packed && bytes ? qcow2_pread(q->fd, packed, packed_length, offset) : ENOMEM;
    if (!error)
        error = unpack(q->compression, packed, packed_length, bytes, q->cluster_size);
    free(packed);
    if (error) {
        free(bytes);
        return error;
    }
    memcpy(to, bytes + inside, length);
    keep(q, entry, bytes);
    return 0;
}

int qcow2_unpack(struct image *image, uint64_t offset, uint64_t length, void *to)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t cluster = offset >> q->cluster_bits, inside = offset & (q->cluster_size - 1);
    struct table *table;
    struct cell cell = {0};
    pthread_mutex_lock(&q->tables);
    int error = qcow2_l2(q, cluster >> q->l2_bits, &table);
    unsigned epoch = 0;
    if (!error && table) {
        pthread_mutex_lock(&q->lookup);
        cell = qcow2_cell(q, table, cluster & ((1ull << q->l2_bits) - 1));
        epoch = q->epoch & 1;
        __atomic_fetch_add(&q->pins[epoch], 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&q->lookup);
    }
    pthread_mutex_unlock(&q->tables);
    if (error || !table)
        return error ? error : EIO;
    if (!cell.packed) {
        /* Written meanwhile. */
        struct iovec iov = {to, length};
        error = image_read(image, &iov, 1, offset, length, NULL);
    } else if (!recall(q, cell.raw, inside, length, to)) {
        error = fetch(q, cell.raw, inside, length, to);
    }
    __atomic_fetch_sub(&q->pins[epoch], 1, __ATOMIC_RELEASE);
    return error;
}

/* Take one more cluster for compressed data; `*at` is its offset. */
static int packed_cluster(struct qcow2 *q, uint64_t *at)
{
    uint64_t first, got;
    bool blank;
    int error = clusters_take(q, 1, &first, &got, &blank);
    *at = first << q->cluster_bits;
    return error;
}

int qcow2_write_packed(struct image *image, uint64_t offset, const void *data, uint64_t length)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t cluster = offset >> q->cluster_bits, index = cluster & ((1ull << q->l2_bits) - 1);
    if (image->read_only || q->external)
        return EROFS;
    if (!length || length >= q->cluster_size || offset & (q->cluster_size - 1) || cluster >> q->l2_bits >= q->l1_entries)
        return EINVAL;
    pthread_mutex_lock(&q->tables);
    qcow2_wait_unclaimed(q, cluster, 1);
    struct table *table;
    int error = qcow2_l2_for_writing(q, cluster >> q->l2_bits, &table);
    uint64_t room = (q->cluster_size - (q->packed_at & (q->cluster_size - 1))) & (q->cluster_size - 1), at = q->packed_at;
    bool shared = room && !error;
    if (shared) {
        /* The cluster that is begun is one reference more; a narrow refcount may not have it. */
        error = refcount_add(q, at >> q->cluster_bits, 1, NULL);
        if (error == EOVERFLOW) {
            shared = false;
            error = 0;
        }
    }
    uint64_t beyond = !shared || length > room ? 1 : 0, next = 0;
    if (!error && beyond)
        error = packed_cluster(q, &next);
    if (!error && shared && beyond && next != (at & ~(q->cluster_size - 1)) + q->cluster_size) {
        /* Not adjacent: the whole goes into the new one. */
        error = clusters_give(q, at >> q->cluster_bits, 1);
        shared = false;
    }
    if (!shared)
        at = next;
    unsigned x = 62 - (q->cluster_bits - 8);
    if (!error && at + length > 1ull << (x < 56 ? x : 56))
        error = EFBIG;
    if (!error)
        error = qcow2_pwrite(q->fd, data, length, at);
    if (!error) {
        uint64_t sectors = ((at + length - 1) >> 9) - (at >> 9);
        struct cell old = qcow2_cell(q, table, index), cell = {.packed = true, .raw = FLAG_PACKED | sectors << x | at};
        pthread_mutex_lock(&q->lookup);
        qcow2_set_cell(q, table, index, &cell);
        pthread_mutex_unlock(&q->lookup);
        q->dirty = true;
        q->packed_at = at + length;
        error = qcow2_drop_cell(q, &old);
    }
    pthread_mutex_unlock(&q->tables);
    return error;
}
