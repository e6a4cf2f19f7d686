/* Virtqueues, device side: guest memory, descriptor chains, split and packed rings.
 *
 * virtio 1.2, sections 2.7 (split) and 2.8 (packed). Nothing here knows Python, devices or transports. Everything a
 * guest wrote is copied once, then checked, then used. Loop thread only.
 */
#ifndef VIRTIO_RING_H
#define VIRTIO_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum {
    DESC_F_NEXT = 1,
    DESC_F_WRITE = 2,
    DESC_F_INDIRECT = 4,
    DESC_F_AVAIL = 1 << 7,
    DESC_F_USED = 1 << 15,
    AVAIL_F_NO_INTERRUPT = 1,
    USED_F_NO_NOTIFY = 1,
    EVENT_ENABLE = 0,
    EVENT_DISABLE = 1,
    EVENT_DESC = 2,
    QUEUE_SIZE_MAX = 32768, /* 2.7, 2.8: the maximum Queue Size value is 32768 */
    INDIRECT_MAX = 1024     /* our bound on an indirect table's entries when the Queue Size is smaller */
};

#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_RING_PACKED (1ull << 34)
#define F_IN_ORDER (1ull << 35)

struct split_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct packed_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t id;
    uint16_t flags;
};

_Static_assert(sizeof(struct split_desc) == 16 && sizeof(struct packed_desc) == 16, "2.7.5, 2.8.13");

struct region {
    uint64_t gpa, size;
    uint8_t *host;
    const uint64_t *missing; /* bit n: page n is still on its way from another host; NULL: none is. Others clear bits. */
};

struct memory {
    struct region *regions;
    size_t count;
    bool incomplete; /* there are regions with `missing` */
    void (*want)(void *context, uint64_t gpa, uint64_t size); /* have pages of this range fetched; of an incomplete memory */
    void *context;
};

/* Host address of [gpa, gpa + size), or NULL unless one region holds all of it. */
uint8_t *memory_at(const struct memory *memory, uint64_t gpa, uint64_t size);
/* Whether no page of the range is missing; those that are, are asked for. Whoever touches a missing page waits in a page
 * fault, which the loop must not. */
bool memory_here(const struct memory *memory, uint64_t gpa, uint64_t size);

struct segment {
    uint8_t *host;
    uint64_t gpa;
    uint32_t len;
};

struct chain {
    struct segment *segments; /* device-readable ones first */
    uint32_t readable, writable;
    uint64_t readable_length, writable_length; /* bytes */
    uint16_t id;                               /* split: head index; packed: buffer id */
    uint16_t slots;                            /* packed: descriptors in the ring; split: 1 */
    uint64_t order;                            /* how many chains were popped before it */
};

/* segments.c. Copy bytes [skip, skip + length) of segments into `flat` or out of it; how many there were. */
uint64_t segments_copy(const struct segment *segments, uint32_t count, uint64_t skip, void *flat, uint64_t length, bool to_flat);
/* The same bytes as at most `most` pieces; how many. */
uint32_t segments_iovs(const struct segment *segments, uint32_t count, uint64_t skip, uint64_t length, struct iovec *iov,
                       uint32_t most);
/* A chain that outlives the next pop: `kept` has segments of its own, to be freed. false: no memory. */
bool chain_keep(struct chain *kept, const struct chain *chain);

struct pending {
    uint64_t order;
    uint32_t length;
    uint16_t id, slots;
    bool done;
};

struct ring {
    const struct memory *memory;
    uint64_t features;
    uint32_t size;
    bool packed, event_idx, indirect, in_order;
    uint64_t desc_gpa, driver_gpa, device_gpa;
    uint8_t *desc, *driver, *device;
    uint64_t desc_size, driver_size, device_size;
    uint16_t next_avail, next_used;
    bool avail_wrap, used_wrap; /* packed: 2.8.1 driver and device ring wrap counters */
    uint32_t in_flight;         /* ring slots popped and not yet pushed (split: chains) */
    uint64_t popped, pushed;
    uint32_t signal_delta; /* used slots since the last needs_notification */
    struct pending *order; /* IN_ORDER: `size` entries, by order % size */
    const char *error;     /* set once, by the first malformed thing seen: the ring is broken from then on */
    bool here;             /* no page of the ring's areas is missing */
    bool waits;            /* for pages: nothing is available until ring_look_again() */
    bool used_dirty;       /* the device wrote its area since ring_take_dirty */
    struct segment *scratch; /* of `scratch_size` segments: one chain */
    uint32_t scratch_size;
};

/* 0, or -1 with *error saying why. The areas are checked against memory here, once. */
int ring_init(struct ring *ring, const struct memory *memory, uint32_t size, uint64_t desc, uint64_t driver,
              uint64_t device, uint64_t features, const char **error);
void ring_free(struct ring *ring);

/* 1: a chain, its segments in ring->scratch until the next pop; 0: none available, or its memory has not come yet
 * (ring->waits); -1: ring->error. No page of a chain that was popped is missing. */
int ring_pop(struct ring *ring, struct chain *chain);
/* Take back the most recent pop that was not undone; nothing may have been pushed since. */
void ring_undo_pop(struct ring *ring, const struct chain *chain);
/* Return chains with `length` bytes written into their device-writable parts; the driver sees all of them at once. */
void ring_push_batch(struct ring *ring, const struct pending *chains, uint32_t count);
void ring_push(struct ring *ring, uint64_t order, uint16_t id, uint16_t slots, uint32_t length);
/* Whether the driver wants a used buffer notification for what was pushed since the last call. */
bool ring_needs_notification(struct ring *ring);
/* Ask for available buffer notifications; true: more came meanwhile (pop again). */
bool ring_enable_notification(struct ring *ring);
/* Ask for a notification with the next buffer although some are available: they are too few. Then look once more. */
void ring_want_more(struct ring *ring);
void ring_disable_notification(struct ring *ring);
bool ring_has_available(struct ring *ring);
/* Some of the pages that were missing have come: whether the ring waited, and is to be looked at again. */
bool ring_look_again(struct ring *ring);

#endif
