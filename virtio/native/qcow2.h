/* The inside of qcow2 images (the published description: "Qcow2 Image File Format", versions 2 and 3).
 *
 * qcow2.c           opening; where bytes stand (image_ops map, locate); what ends an extent
 * qcow2_cache.c     L2 tables and refcount blocks in memory
 * qcow2_refcount.c  clusters of the file: which are free, taking and giving back
 * qcow2_write.c     places for writes, zeroes, discards
 * qcow2_flush.c     the order in which tables reach the file
 * qcow2_pack.c      compressed clusters
 * qcow2_move.c      between an image and its backing image, while it is used
 *
 * Two locks. `tables` is held by whoever changes tables or loads them, also across system calls. `lookup` is held for a
 * few hundred instructions at most, and by nobody across a system call, so that the loop's thread may take it: it guards
 * what map() reads. Whoever holds both has taken `tables` first. Never wait for `tables` while holding the interpreter's
 * lock.
 *
 * Order on disk. A table in the file never names a cluster whose refcount, contents and own table are not durable:
 * refcounts and new L2 tables go first, then a barrier (fdatasync), then changed L2 tables and the L1 table, then another
 * barrier. A cluster that is no longer named is given back (its refcount lowered, its space punched out) only behind the
 * barrier that made that durable, and when no transfer that began before is under way. So a file whose writer died, or
 * lost power, at any moment has leaked clusters at worst.
 */
#ifndef VIRTIO_QCOW2_H
#define VIRTIO_QCOW2_H

#include "image.h"

#include <pthread.h>

enum {
    CLUSTER_BITS_MIN = 9, CLUSTER_BITS_MAX = 21,
    L1_BYTES_MAX = 32 << 20,
    REFTABLE_BYTES_MAX = 8 << 20,
    RANGES_MAX = 64,
    UNPACKED = 4 /* decompressed clusters that are kept */
};

#define OFFSET_MASK 0x00fffffffffffe00ull
#define FLAG_COPIED (1ull << 63)
#define FLAG_PACKED (1ull << 62)
#define FLAG_ZERO 1ull

/* An L2 table or a refcount block: one cluster as it is in the file, big-endian. */
struct table {
    uint64_t offset; /* in the file; 0: unused */
    uint8_t *bytes;
    struct table *next; /* in its chain of the hash */
    uint64_t used;      /* when, in look-ups of this cache */
    bool dirty;
    bool fresh; /* nothing in the file names it yet */
};

struct cache {
    struct table *tables;
    struct table **heads;
    unsigned count, capacity, mask;
    uint64_t clock;
};

/* A write that got a place and has not ended: nobody else changes these guest clusters. */
struct claim {
    struct claim *next;
    uint64_t cluster, count; /* of the disk */
    uint64_t host;           /* offset of the first in the file */
    uint64_t first, last;    /* bytes of the disk that the place holds afterwards, from and to */
    bool taken;              /* the clusters are new */
    bool zeroes;             /* nothing but zeroes would be in them: no place is needed after all */
};

/* Clusters of the file that nothing names any more. */
struct drop {
    uint64_t cluster, count;
};

struct drops {
    struct drop *list;
    size_t count, room;
    uint64_t clusters; /* of all of them */
};

struct cluster_set {
    uint64_t *slots; /* cluster number + 1 */
    size_t count, mask;
};

struct unpacked {
    uint64_t entry; /* 0: unused */
    uint64_t used;
    uint8_t *bytes;
};

struct qcow2 {
    struct image image;
    int fd;      /* tables, through the page cache */
    int data_fd; /* guest clusters: the same file, perhaps with O_DIRECT, or an external data file */
    bool external, external_raw, extended;
    uint32_t align;
    int version, compression;
    unsigned cluster_bits, l2_bits, sub_bits, subs; /* subs: subclusters of a cluster, 1 or 32 */
    unsigned entry_bits;                            /* log2 of the bytes of an L2 entry */
    unsigned refcount_order, block_bits;            /* block_bits: log2 of the clusters that a refcount block covers */
    uint64_t cluster_size;

    pthread_mutex_t tables, lookup;
    pthread_cond_t unclaimed;
    struct claim *claims;

    uint64_t *l1; /* host byte order; under both locks to change */
    uint64_t l1_entries, l1_offset;
    uint64_t l1_dirty_from, l1_dirty_to; /* entries; empty: from >= to */
    struct cache l2, blocks;
    struct cluster_set metadata; /* clusters of L2 tables and refcount blocks; under both locks to change */
    struct drop ranges[RANGES_MAX]; /* header, L1, refcount table, snapshots: clusters that no guest cluster may be in */
    unsigned range_count;

    uint64_t *reftable; /* host byte order */
    uint64_t reftable_entries, reftable_offset;
    unsigned reftable_range; /* its index in `ranges` */
    _Atomic uint64_t end; /* clusters of the file; changed under `tables` */
    uint64_t free_from; /* no cluster before this one is free */
    _Atomic bool dirty; /* something is not durable; changed under `tables` */
    _Atomic int broken; /* errno: a table could not be written or makes no sense; nothing more is written */

    struct drop barred; /* clusters of the disk that are not written in place now; changed under `lookup` */
    unsigned epoch; /* of transfers; changed under `lookup` */
    uint32_t pins[2];
    struct drops dropped, waiting; /* not named in memory; not named in the file, and since then an epoch has begun */

    pthread_mutex_t unpack_lock;
    struct unpacked unpacked[UNPACKED];
    uint64_t unpack_clock;
    uint64_t packed_at; /* where the next compressed cluster goes; 0: into a new cluster */
};

/* One L2 entry. Without extended entries there is one subcluster, the cluster. */
struct cell {
    uint64_t raw;
    uint64_t host;
    bool has_host, copied, packed;
    uint32_t allocated, zero; /* a bit per subcluster */
};

static inline struct qcow2 *qcow2_of(struct image *image)
{
    return (struct qcow2 *)image;
}

static inline uint64_t load_be(const void *at)
{
    uint64_t value;
    __builtin_memcpy(&value, at, sizeof value);
    return __builtin_bswap64(value);
}

static inline void store_be(void *at, uint64_t value)
{
    value = __builtin_bswap64(value);
    __builtin_memcpy(at, &value, sizeof value);
}

static inline uint64_t round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* All of `length` bytes at `offset`; errno. What the file does not have reads as zeroes. */
int qcow2_pread(int fd, void *to, uint64_t length, uint64_t offset);
int qcow2_pwrite(int fd, const void *from, uint64_t length, uint64_t offset);

/* qcow2.c */
struct cell qcow2_cell(const struct qcow2 *q, const struct table *table, uint64_t index);
void qcow2_set_cell(const struct qcow2 *q, struct table *table, uint64_t index, const struct cell *cell);
/* The L2 table of an L1 entry, loaded if need be; `*found` NULL: there is none. Holds `tables`. */
int qcow2_l2(struct qcow2 *q, uint64_t l1_index, struct table **found);
/* Answers of qcow2_find(), beside an errno. NOT_CACHED: the L2 table has to be loaded. NOT_IN_PLACE: allocate. */
enum { FOUND = 0, NOT_CACHED = -1, NOT_IN_PLACE = -2 };
/* Where the first bytes of a range stand. Holds `lookup`. `*nothing` is 0, or so many bytes are the backing image's. */
int qcow2_find(struct qcow2 *q, uint64_t offset, uint64_t length, enum intent intent, struct extent *extent,
               uint64_t *nothing);
/* Whether a guest cluster may be there: inside the file, in nobody's table. */
bool qcow2_is_place(const struct qcow2 *q, uint64_t host);
int qcow2_break(struct qcow2 *q, int error);

/* qcow2_cache.c */
int cache_open(struct cache *cache, uint64_t bytes, uint64_t cluster_size);
void cache_close(struct cache *cache);
struct table *cache_find(struct cache *cache, uint64_t offset);
/* A place for a table, which the caller has seen is not there: an unused one, or the clean one that was used the longest
 * ago. NULL: all are dirty, or there is no memory. */
struct table *cache_victim(struct cache *cache, uint64_t cluster_size);
void cache_insert(struct cache *cache, struct table *table, uint64_t offset);
void cache_remove(struct cache *cache, struct table *table);

bool set_has(const struct cluster_set *set, uint64_t cluster);
int set_add(struct cluster_set *set, uint64_t cluster);
void set_remove(struct cluster_set *set, uint64_t cluster);

/* qcow2_refcount.c; all hold `tables` */
int refcount_get(struct qcow2 *q, uint64_t cluster, uint64_t *count);
int refcount_add(struct qcow2 *q, uint64_t cluster, int by, uint64_t *now);
uint64_t refcount_max(const struct qcow2 *q);
/* Take a run of at most `want` free clusters that are one piece; how many in `*got`. `*blank`: the file has nothing there
 * yet, so that they read as zeroes. */
int clusters_take(struct qcow2 *q, uint64_t want, uint64_t *first, uint64_t *got, bool *blank);
/* Give clusters back whose place nothing in the file names. */
int clusters_give(struct qcow2 *q, uint64_t first, uint64_t count);
int drops_add(struct drops *drops, uint64_t cluster, uint64_t count);

/* qcow2_write.c */
int qcow2_allocate(struct image *image, uint64_t offset, uint64_t length, struct extent *extent);
int qcow2_end_claim(struct qcow2 *q, struct claim *claim, bool done);
int qcow2_zero(struct image *image, uint64_t offset, uint64_t length, bool unmap, const bool *abandoned);
int qcow2_discard(struct image *image, uint64_t offset, uint64_t length);
int qcow2_forget(struct image *image, uint64_t offset, uint64_t length);
int qcow2_l2_for_writing(struct qcow2 *q, uint64_t l1_index, struct table **found);
/* The first clusters of a range, all unallocated ones, filled with what they read as. `tables` is held, and no claim is on
 * the range; a place in `*extent`, or `*length` bytes from `offset` on need none. */
int qcow2_claim_whole(struct qcow2 *q, uint64_t offset, uint64_t *length, struct extent *extent);
/* Whole clusters of one L2 table become unallocated. `tables` is held; claims are not looked at. */
int qcow2_forget_locked(struct qcow2 *q, uint64_t cluster, uint64_t count);
/* The clusters behind a cell's place are not named any more. */
int qcow2_drop_cell(struct qcow2 *q, const struct cell *cell);
void qcow2_wait_unclaimed(struct qcow2 *q, uint64_t cluster, uint64_t count);

/* qcow2_flush.c */
int qcow2_flush(struct image *image);
int qcow2_flush_locked(struct qcow2 *q);
/* As a flush, but nothing is given back: so no table is dirty afterwards. */
int qcow2_write_back(struct qcow2 *q);

/* qcow2_pack.c */
int qcow2_unpack(struct image *image, uint64_t offset, uint64_t length, void *to);
void qcow2_packed_place(const struct qcow2 *q, uint64_t entry, uint64_t *offset, uint64_t *length);
void qcow2_forget_unpacked(struct qcow2 *q);

#endif
