/* Split and packed virtqueues, device side (virtio 1.2, 2.7 and 2.8). */
#include "ring.h"

#include <stdlib.h>
#include <string.h>

uint8_t *memory_at(const struct memory *memory, uint64_t gpa, uint64_t size)
{
    for (size_t i = 0; i < memory->count; i++) {
        const struct region *region = &memory->regions[i];
        if (gpa >= region->gpa && gpa - region->gpa < region->size)
            return size <= region->size - (gpa - region->gpa) ? region->host + (gpa - region->gpa) : NULL;
    }
    return NULL;
}

bool memory_here(const struct memory *memory, uint64_t gpa, uint64_t size)
{
    for (size_t i = 0; memory->incomplete && i < memory->count; i++) {
        const struct region *region = &memory->regions[i];
        if (gpa < region->gpa || gpa - region->gpa >= region->size || !region->missing || !size)
            continue;
        uint64_t first = (gpa - region->gpa) >> 12, last = (gpa - region->gpa + size - 1) >> 12;
        for (uint64_t page = first; page <= last; page++) {
            uint64_t word = __atomic_load_n(&region->missing[page / 64], __ATOMIC_ACQUIRE);
            if (word >> page % 64 & 1) {
                memory->want(memory->context, gpa, size);
                return false;
            }
            if (!word)
                page |= 63;
        }
    }
    return true;
}

static uint16_t load16(const uint8_t *at)
{
    return __atomic_load_n((const uint16_t *)(const void *)at, __ATOMIC_ACQUIRE);
}

static void store16(uint8_t *at, uint16_t value)
{
    __atomic_store_n((uint16_t *)(void *)at, value, __ATOMIC_RELEASE);
}

static uint32_t load32(const uint8_t *at)
{
    return __atomic_load_n((const uint32_t *)(const void *)at, __ATOMIC_ACQUIRE);
}

static void store32(uint8_t *at, uint32_t value)
{
    __atomic_store_n((uint32_t *)(void *)at, value, __ATOMIC_RELEASE);
}

static int broken(struct ring *ring, const char *error)
{
    if (!ring->error)
        ring->error = error;
    return -1;
}

/* Whether the ring's areas may be touched. */
static bool areas_here(struct ring *ring)
{
    if (ring->here)
        return true;
    bool desc = memory_here(ring->memory, ring->desc_gpa, ring->desc_size);
    bool driver = memory_here(ring->memory, ring->driver_gpa, ring->driver_size);
    bool device = memory_here(ring->memory, ring->device_gpa, ring->device_size);
    ring->here = desc && driver && device;
    ring->waits |= !ring->here;
    return ring->here;
}

int ring_init(struct ring *ring, const struct memory *memory, uint32_t size, uint64_t desc, uint64_t driver,
              uint64_t device, uint64_t features, const char **error)
{
    memset(ring, 0, sizeof *ring);
    ring->memory = memory;
    ring->features = features;
    ring->size = size;
    ring->packed = features & F_RING_PACKED;
    ring->event_idx = features & F_EVENT_IDX;
    ring->indirect = features & F_INDIRECT_DESC;
    ring->in_order = features & F_IN_ORDER;
    ring->avail_wrap = ring->used_wrap = true;
    if (!size || size > QUEUE_SIZE_MAX || (!ring->packed && (size & (size - 1)))) {
        *error = "queue size is not valid";
        return -1;
    }
    /* 2.7: "Descriptor Table 16, Available Ring 2, Used Ring 4"; 2.8.10.1: "Descriptor Ring 16, [Event Suppression] 4". */
    ring->desc_size = 16ull * size;
    ring->driver_size = ring->packed ? 4 : 6 + 2ull * size;
    ring->device_size = ring->packed ? 4 : 6 + 8ull * size;
    if (desc & 15 || driver & (ring->packed ? 3 : 1) || device & 3) {
        *error = "queue area is not aligned";
        return -1;
    }
    ring->desc_gpa = desc;
    ring->driver_gpa = driver;
    ring->device_gpa = device;
    ring->desc = memory_at(memory, desc, ring->desc_size);
    ring->driver = memory_at(memory, driver, ring->driver_size);
    ring->device = memory_at(memory, device, ring->device_size);
    if (!ring->desc || !ring->driver || !ring->device) {
        *error = "queue area is outside guest memory";
        return -1;
    }
    /* 2.7.10.2: "if the VIRTIO_F_EVENT_IDX feature bit is negotiated: The device MUST set flags to 0." Without it, 0 asks
     * for notifications. */
    if (!ring->packed)
        store16(ring->device, 0);
    ring->used_dirty = true;
    ring->scratch_size = size > INDIRECT_MAX ? size : INDIRECT_MAX;
    ring->scratch = calloc(ring->scratch_size, sizeof *ring->scratch);
    ring->order = ring->in_order ? calloc(size, sizeof *ring->order) : NULL;
    if (!ring->scratch || (ring->in_order && !ring->order)) {
        ring_free(ring);
        *error = "out of memory";
        return -1;
    }
    return 0;
}

void ring_free(struct ring *ring)
{
    free(ring->scratch);
    free(ring->order);
    ring->scratch = NULL;
    ring->order = NULL;
}

static int add_segment(struct ring *ring, struct chain *chain, uint64_t addr, uint32_t len, bool write)
{
    uint32_t at = chain->readable + chain->writable;
    if (at >= ring->scratch_size)
        return broken(ring, "descriptor chain is too long");
    if (!len)
        return broken(ring, "descriptor has length zero");
    /* 2.7.4.2: "The driver MUST place any device-writable descriptor elements after any device-readable" */
    if (!write && chain->writable)
        return broken(ring, "device-readable descriptor after a device-writable one");
    uint8_t *host = memory_at(ring->memory, addr, len);
    if (!host)
        return broken(ring, "descriptor points outside guest memory");
    if (!memory_here(ring->memory, addr, len))
        ring->waits = true; /* the rest of the chain is looked at, so that all of it is asked for at once */
    chain->segments[at] = (struct segment){host, addr, len};
    if (write) {
        chain->writable++;
        chain->writable_length += len;
    } else {
        chain->readable++;
        chain->readable_length += len;
    }
    /* 2.7.5.2: "Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total" */
    if (chain->readable_length + chain->writable_length > UINT32_MAX)
        return broken(ring, "descriptor chain is longer than 2^32 bytes");
    return 0;
}

static const uint8_t *indirect_table(struct ring *ring, uint64_t addr, uint32_t len, uint32_t *entries)
{
    /* 2.7.5.3.1: "The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag unless the VIRTIO_F_INDIRECT_DESC feature
     * was negotiated." */
    if (!ring->indirect) {
        broken(ring, "indirect descriptor without VIRTIO_F_INDIRECT_DESC");
        return NULL;
    }
    if (!len || len % 16) {
        broken(ring, "indirect table's length is not a multiple of 16");
        return NULL;
    }
    /* 2.7.5.3.1: "A driver MUST NOT create a descriptor chain longer than the Queue Size of the device." Linux does
     * with small queues, so the bound is INDIRECT_MAX if that is larger. */
    *entries = len / 16;
    if (*entries > ring->scratch_size) {
        broken(ring, "indirect table is too long");
        return NULL;
    }
    const uint8_t *table = memory_at(ring->memory, addr, len);
    if (!table) {
        broken(ring, "indirect table is outside guest memory");
    } else if (!memory_here(ring->memory, addr, len)) {
        ring->waits = true;
        return NULL;
    }
    return table;
}

static int walk_split(struct ring *ring, struct chain *chain, const uint8_t *table, uint32_t entries, uint16_t at,
                      bool nested)
{
    for (uint32_t seen = 0;; seen++) {
        if (at >= entries)
            return broken(ring, "descriptor index is outside the table");
        /* 2.7.5.2: "this implies that loops in the descriptor chain are forbidden" */
        if (seen >= entries)
            return broken(ring, "descriptor chain has a loop");
        struct split_desc desc;
        memcpy(&desc, table + 16 * (size_t)at, sizeof desc);
        __asm__ volatile("" ::: "memory"); /* one copy: checked and used values are the same */
        if (desc.flags & DESC_F_INDIRECT) {
            /* 2.7.5.3.1: "The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag within an indirect descriptor" */
            if (nested)
                return broken(ring, "indirect descriptor inside an indirect table");
            /* 2.7.5.3.1: "A driver MUST NOT set both VIRTQ_DESC_F_INDIRECT and VIRTQ_DESC_F_NEXT in flags." */
            if (desc.flags & DESC_F_NEXT)
                return broken(ring, "indirect descriptor with VIRTQ_DESC_F_NEXT");
            uint32_t inner;
            /* 2.7.5.3.2: "The device MUST ignore the write-only flag (flags&VIRTQ_DESC_F_WRITE) in the descriptor
             * that refers to an indirect table." "The device MUST handle the case of zero or more normal chained
             * descriptors followed by a single descriptor with flags&VIRTQ_DESC_F_INDIRECT." */
            const uint8_t *indirect = indirect_table(ring, desc.addr, desc.len, &inner);
            if (!indirect)
                return ring->error ? -1 : 0; /* a table that is missing: the ring waits */
            return walk_split(ring, chain, indirect, inner, 0, true);
        }
        if (add_segment(ring, chain, desc.addr, desc.len, desc.flags & DESC_F_WRITE))
            return -1;
        if (!(desc.flags & DESC_F_NEXT))
            return 0;
        at = desc.next;
    }
}

static int pop_split(struct ring *ring, struct chain *chain)
{
    uint16_t index = load16(ring->driver + 2);
    uint16_t waiting = (uint16_t)(index - ring->next_avail);
    if (!waiting)
        return 0;
    if (waiting > ring->size)
        return broken(ring, "available index jumped by more than the queue size");
    if (ring->in_flight >= ring->size)
        return broken(ring, "more buffers in flight than the queue holds");
    uint16_t head = load16(ring->driver + 4 + 2 * (size_t)(ring->next_avail & (ring->size - 1)));
    if (walk_split(ring, chain, ring->desc, ring->size, head, false))
        return -1;
    if (ring->waits)
        return 0;
    chain->id = head;
    chain->slots = 1;
    ring->next_avail++;
    return 1;
}

static bool packed_available(uint16_t flags, bool wrap)
{
    /* 2.8.1: available when AVAIL equals and USED differs from the driver ring wrap counter */
    return !!(flags & DESC_F_AVAIL) == wrap && !!(flags & DESC_F_USED) != wrap;
}

static int pop_packed(struct ring *ring, struct chain *chain)
{
    uint16_t flags = load16(ring->desc + 16 * (size_t)ring->next_avail + 14);
    if (!packed_available(flags, ring->avail_wrap))
        return 0;
    uint32_t at = ring->next_avail, slots = 0;
    bool wrap = ring->avail_wrap;
    for (;;) {
        if (ring->in_flight + slots >= ring->size)
            return broken(ring, "more descriptors in flight than the queue holds");
        struct packed_desc desc;
        memcpy(&desc, ring->desc + 16 * (size_t)at, sizeof desc);
        __asm__ volatile("" ::: "memory");
        if (slots == 0)
            desc.flags = flags; /* the ones that made it available, loaded with acquire */
        else if (!packed_available(desc.flags, wrap))
            /* 2.8.17: "A driver MUST NOT make the first descriptor in the list available before all subsequent
             * descriptors comprising the list are made available." */
            return broken(ring, "descriptor list runs into one that is not available");
        slots++;
        if (++at == ring->size) {
            at = 0;
            wrap = !wrap;
        }
        if (desc.flags & DESC_F_INDIRECT) {
            /* 2.8.7: an indirect descriptor stands alone; its table is walked in order */
            if (desc.flags & DESC_F_NEXT || slots > 1)
                return broken(ring, "indirect descriptor in a packed descriptor list");
            uint32_t entries;
            const uint8_t *table = indirect_table(ring, desc.addr, desc.len, &entries);
            if (!table)
                return ring->error ? -1 : 0;
            for (uint32_t i = 0; i < entries; i++) {
                struct packed_desc inner;
                memcpy(&inner, table + 16 * (size_t)i, sizeof inner);
                __asm__ volatile("" ::: "memory");
                if (inner.flags & DESC_F_INDIRECT)
                    return broken(ring, "indirect descriptor inside an indirect table");
                if (add_segment(ring, chain, inner.addr, inner.len, inner.flags & DESC_F_WRITE))
                    return -1;
            }
        } else if (add_segment(ring, chain, desc.addr, desc.len, desc.flags & DESC_F_WRITE)) {
            return -1;
        }
        if (!(desc.flags & DESC_F_NEXT)) {
            chain->id = desc.id; /* 2.8.6: "Buffer ID is included in the last descriptor in the list" */
            break;
        }
    }
    if (ring->waits)
        return 0;
    chain->slots = (uint16_t)slots;
    ring->next_avail = (uint16_t)at;
    ring->avail_wrap = wrap;
    return 1;
}

int ring_pop(struct ring *ring, struct chain *chain)
{
    if (ring->error)
        return -1;
    *chain = (struct chain){.segments = ring->scratch};
    ring->waits = false;
    if (!areas_here(ring))
        return 0;
    int got = ring->packed ? pop_packed(ring, chain) : pop_split(ring, chain);
    if (got != 1)
        return got;
    chain->order = ring->popped++;
    if (ring->in_order)
        ring->order[chain->order % ring->size] = (struct pending){.order = chain->order};
    ring->in_flight += chain->slots;
    return 1;
}

void ring_undo_pop(struct ring *ring, const struct chain *chain)
{
    uint32_t at = ring->next_avail;
    if (ring->packed && at < chain->slots) {
        at += ring->size;
        ring->avail_wrap = !ring->avail_wrap;
    }
    ring->next_avail = (uint16_t)(at - chain->slots);
    ring->in_flight -= chain->slots;
    ring->popped--;
}

static void use_packed(struct ring *ring, const struct pending *chains, uint32_t count)
{
    uint8_t *first = NULL;
    uint16_t first_flags = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *at = ring->desc + 16 * (size_t)ring->next_used;
        uint16_t flags = ring->used_wrap ? DESC_F_AVAIL | DESC_F_USED : 0;
        /* 2.8.3: "In a used descriptor, this bit is used to specify whether any data has been written by the device
         * into any parts of the buffer." */
        if (chains[i].length)
            flags |= DESC_F_WRITE;
        store32(at + 8, chains[i].length);
        store16(at + 12, chains[i].id);
        if (!i) {
            first = at;
            first_flags = flags;
        } else {
            store16(at + 14, flags);
        }
        uint32_t next = ring->next_used + chains[i].slots;
        if (next >= ring->size) {
            next -= ring->size;
            ring->used_wrap = !ring->used_wrap;
        }
        ring->next_used = (uint16_t)next;
    }
    if (first)
        store16(first + 14, first_flags); /* release, and last: everything before it is seen first */
}

static void use_split(struct ring *ring, const struct pending *chains, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *at = ring->device + 4 + 8 * (size_t)(ring->next_used & (ring->size - 1));
        store32(at, chains[i].id);
        store32(at + 4, chains[i].length);
        ring->next_used++;
    }
    /* 2.7.8.2: "The device MUST set len prior to updating the used idx." */
    store16(ring->device + 2, ring->next_used);
}

static void use(struct ring *ring, const struct pending *chains, uint32_t count)
{
    if (ring->packed)
        use_packed(ring, chains, count);
    else
        use_split(ring, chains, count);
    for (uint32_t i = 0; i < count; i++) {
        ring->in_flight -= chains[i].slots;
        ring->signal_delta += chains[i].slots;
    }
    ring->pushed += count;
    ring->used_dirty = true;
}

void ring_push_batch(struct ring *ring, const struct pending *chains, uint32_t count)
{
    if (ring->error || !count)
        return;
    uint32_t ready = 0;
    while (ring->in_order && ready < count && chains[ready].order == ring->pushed + ready)
        ready++;
    if (!ring->in_order || (ready == count && ring->pushed + count == ring->popped)) {
        use(ring, chains, count);
        return;
    }
    /* 2.7.9, 2.8.8: with VIRTIO_F_IN_ORDER buffers are used in the order they were made available. */
    for (uint32_t i = 0; i < count; i++) {
        ring->order[chains[i].order % ring->size] = chains[i];
        ring->order[chains[i].order % ring->size].done = true;
    }
    while (ring->pushed < ring->popped) {
        struct pending *first = &ring->order[ring->pushed % ring->size];
        if (!first->done || first->order != ring->pushed)
            break;
        first->done = false;
        use(ring, first, 1);
    }
}

void ring_push(struct ring *ring, uint64_t order, uint16_t id, uint16_t slots, uint32_t length)
{
    struct pending one = {order, length, id, slots, false};
    ring_push_batch(ring, &one, 1);
}

static bool passed(uint16_t event, uint16_t new, uint32_t delta)
{
    /* 2.7.10: notify if the index in `event` was passed by the last `delta` entries */
    return (uint16_t)(new - event - 1) < delta;
}

bool ring_needs_notification(struct ring *ring)
{
    uint32_t delta = ring->signal_delta;
    ring->signal_delta = 0;
    if (!delta || ring->error)
        return false;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* used entries are visible before the driver's wish is read */
    if (ring->packed) {
        uint32_t event = load32(ring->driver);
        uint16_t flags = (uint16_t)(event >> 16) & 3;
        if (flags == EVENT_DISABLE)
            return false;
        if (flags != EVENT_DESC || !ring->event_idx)
            return true;
        uint16_t offset = event & 0x7fff;
        if (!!(event & 0x8000) != ring->used_wrap)
            offset = (uint16_t)(offset - ring->size);
        return passed(offset, ring->next_used, delta);
    }
    if (ring->event_idx) /* 2.7.7.2: "the device MUST ignore the lower bit of flags" when EVENT_IDX is negotiated */
        return passed(load16(ring->driver + 4 + 2 * (size_t)ring->size), ring->next_used, delta);
    return !(load16(ring->driver) & AVAIL_F_NO_INTERRUPT);
}

bool ring_has_available(struct ring *ring)
{
    if (ring->error || ring->waits || !areas_here(ring))
        return false;
    if (ring->packed)
        return packed_available(load16(ring->desc + 16 * (size_t)ring->next_avail + 14), ring->avail_wrap);
    return load16(ring->driver + 2) != ring->next_avail;
}

bool ring_look_again(struct ring *ring)
{
    bool waited = ring->waits;
    ring->waits = false;
    return waited && !ring->error;
}

bool ring_enable_notification(struct ring *ring)
{
    if (ring->error || !areas_here(ring))
        return false;
    if (ring->packed) {
        uint32_t offset = ring->next_avail | (ring->avail_wrap ? 0x8000u : 0);
        store32(ring->device, ring->event_idx ? offset | EVENT_DESC << 16 : EVENT_ENABLE << 16);
    } else if (ring->event_idx) {
        /* 2.7.10.2: avail_event says from which entry on the driver has to notify */
        store16(ring->device + 4 + 8 * (size_t)ring->size, ring->next_avail);
    } else {
        store16(ring->device, 0);
    }
    ring->used_dirty = true;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish is visible before we look once more */
    return ring_has_available(ring);
}

void ring_want_more(struct ring *ring)
{
    if (ring->error || !areas_here(ring))
        return;
    if (ring->packed)
        store32(ring->device, (uint32_t)EVENT_ENABLE << 16);
    else if (ring->event_idx)
        store16(ring->device + 4 + 8 * (size_t)ring->size, load16(ring->driver + 2));
    else
        store16(ring->device, 0);
    ring->used_dirty = true;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void ring_disable_notification(struct ring *ring)
{
    if (ring->error || !areas_here(ring))
        return;
    if (ring->packed)
        store32(ring->device, (uint32_t)EVENT_DISABLE << 16);
    else if (!ring->event_idx) /* 2.7.10.2: with it, "the device MUST set flags to 0" */
        store16(ring->device, USED_F_NO_NOTIFY);
    ring->used_dirty = true;
}
