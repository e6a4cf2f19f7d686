/* Tables of a qcow2 image in memory, a bounded number of them; and a set of cluster numbers. */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { TABLES_MIN = 8, SET_MIN = 64 };

static unsigned hash(uint64_t number, unsigned mask)
{
    return (unsigned)((number * 0x9e3779b97f4a7c15ull) >> 32) & mask;
}

int cache_open(struct cache *cache, uint64_t bytes, uint64_t cluster_size)
{
    uint64_t capacity = bytes / cluster_size;
    cache->capacity = capacity < TABLES_MIN ? TABLES_MIN : (unsigned)capacity;
    unsigned heads = TABLES_MIN;
    while (heads < cache->capacity)
        heads *= 2;
    cache->mask = heads - 1;
    cache->heads = calloc(heads, sizeof *cache->heads);
    cache->tables = calloc(cache->capacity, sizeof *cache->tables);
    return cache->heads && cache->tables ? 0 : ENOMEM;
}

void cache_close(struct cache *cache)
{
    for (unsigned i = 0; i < cache->count; i++)
        free(cache->tables[i].bytes);
    free(cache->tables);
    free(cache->heads);
    *cache = (struct cache){0};
}

struct table *cache_find(struct cache *cache, uint64_t offset)
{
    for (struct table *table = cache->heads[hash(offset >> CLUSTER_BITS_MIN, cache->mask)]; table; table = table->next) {
        if (table->offset == offset) {
            table->used = ++cache->clock;
            return table;
        }
    }
    return NULL;
}

struct table *cache_victim(struct cache *cache, uint64_t cluster_size)
{
    if (cache->count < cache->capacity) {
        struct table *table = &cache->tables[cache->count];
        void *bytes;
        if (!posix_memalign(&bytes, 64, cluster_size)) {
            table->bytes = bytes;
            cache->count++;
            return table;
        }
    }
    /* The oldest of a few that are looked at in turn is old enough, and a look at all of 65,536 would take too long. */
    struct table *oldest = NULL;
    for (unsigned tried = 0; tried < cache->count && (tried < 64 || !oldest); tried++) {
        struct table *table = &cache->tables[(cache->clock + tried * 7919ull) % cache->count];
        if (!table->dirty && (!oldest || table->used < oldest->used))
            oldest = table;
    }
    for (unsigned i = 0; !oldest && i < cache->count; i++)
        if (!cache->tables[i].dirty)
            oldest = &cache->tables[i];
    return oldest;
}

void cache_insert(struct cache *cache, struct table *table, uint64_t offset)
{
    struct table **head = &cache->heads[hash(offset >> CLUSTER_BITS_MIN, cache->mask)];
    table->offset = offset;
    table->used = ++cache->clock;
    table->dirty = table->fresh = false;
    table->next = *head;
    *head = table;
}

void cache_remove(struct cache *cache, struct table *table)
{
    if (!table->offset)
        return;
    struct table **at = &cache->heads[hash(table->offset >> CLUSTER_BITS_MIN, cache->mask)];
    while (*at != table)
        at = &(*at)->next;
    *at = table->next;
    table->offset = 0;
    table->dirty = table->fresh = false;
}

bool set_has(const struct cluster_set *set, uint64_t cluster)
{
    if (!set->count)
        return false;
    for (size_t i = hash(cluster, (unsigned)set->mask); set->slots[i]; i = (i + 1) & set->mask)
        if (set->slots[i] == cluster + 1)
            return true;
    return false;
}

static void put(struct cluster_set *set, uint64_t slot)
{
    size_t i = hash(slot - 1, (unsigned)set->mask);
    while (set->slots[i])
        i = (i + 1) & set->mask;
    set->slots[i] = slot;
}

int set_add(struct cluster_set *set, uint64_t cluster)
{
    if (set_has(set, cluster))
        return 0;
    if (!set->slots || set->count * 2 > set->mask) {
        struct cluster_set larger = {.count = set->count, .mask = set->slots ? set->mask * 2 + 1 : SET_MIN - 1};
        larger.slots = calloc(larger.mask + 1, sizeof *larger.slots);
        if (!larger.slots)
            return ENOMEM;
        for (size_t i = 0; set->slots && i <= set->mask; i++)
            if (set->slots[i])
                put(&larger, set->slots[i]);
        free(set->slots);
        *set = larger;
    }
    put(set, cluster + 1);
    set->count++;
    return 0;
}

void set_remove(struct cluster_set *set, uint64_t cluster)
{
    if (!set_has(set, cluster))
        return;
    size_t hole = hash(cluster, (unsigned)set->mask);
    while (set->slots[hole] != cluster + 1)
        hole = (hole + 1) & set->mask;
    set->slots[hole] = 0;
    set->count--;
    /* What follows without a gap may belong before the hole. */
    for (size_t i = (hole + 1) & set->mask; set->slots[i]; i = (i + 1) & set->mask) {
        uint64_t slot = set->slots[i];
        set->slots[i] = 0;
        put(set, slot);
    }
}
