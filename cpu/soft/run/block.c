/* Translated blocks: their cache, keyed by the host address of their first byte and the mode; look-up by linear address;
 * linking; invalidation by physical page; and the entry points that run them.
 *
 * Memory: blocks live in one arena that is filled upwards and given up as a whole when full (or when memory slots
 * change). Dead blocks are not reused before, so a running block that is invalidated may finish its instruction. All
 * VMs of a process share what one alone may take. One that goes to sleep with more than its share gives it back, and, if it
 * is one of several, also what stands beyond the blocks made since the last flush. After a while of sleep it keeps no more
 * than its part of an eighth of that, so that many VMs at rest take little (python -m tests.bench many, state). One with a
 * virtual clock has all for itself: when blocks are made anew decides where turns end, and that must not depend on who else
 * is there.
 * Links only join blocks of the same page, and a page's blocks die together. A dead block's first handler looks its address up
 * again, so jump caches may lead to it; `attention` is set as blocks die, so that one that runs leaves at its end, whatever it
 * is joined with.
 */
#include <stdlib.h>
#include <sys/mman.h>

#include "soft/mmu/access.h"
#include "soft/ops/operations.h"
#include "soft/jit/translate.h"

/* What a block can consist of at most, in multiples of 8. */
enum { CODE_BYTES = BLOCK_MAX_INSNS * 15 + 8 * 2 };
enum { REMADE_MOST = 16 }; /* times that a block is made until its bytes stay the same meanwhile */
enum { HASH_BITS_MIN = 9, HASH_BITS_STEP = 5, HASH_BITS_MAX = 19, PAGE_HASH_BITS = 12, IN_PAGE_BITS = 7 };
enum { ARENA_SIZE = 128 << 20, HUGE = 2 << 20 };
/* No other memory of the process is its direct neighbour. */
enum { GUARD = 4096, MAPPING_SIZE = GUARD + ARENA_SIZE + HUGE + GUARD };
static const struct soft_supply arena_supply = { .whole = ARENA_SIZE, .many = 1536 << 10, .resting = 16 << 20 };
enum { DEAD_LEAST = 128 << 10 }; /* less than that is not given back when a VM goes to sleep */
enum { SHARERS_MANY = 20 }; /* VMs, of which each has the same however many there are */
enum { RESTERS_MAX = 32 }; /* with more VMs at rest a part is no smaller than with so many */

/* A host page that code was translated from. */
struct code_page {
    struct code_page *next;
    const uint8_t *host;
    struct block *blocks;
    struct crossing *crossings; /* pages whose last instruction goes on into this one */
    uint64_t granules;          /* bit i: code in the i-th 64 bytes */
};
struct crossing {
    struct crossing *next;
    struct code_page *from;
};

struct block_cache {
    struct soft_vm *vm;
    uint32_t index; /* in vm->caches */
    struct soft_stats stats;
    struct block **hash; /* 1 << hash_bits lists; larger when there are more blocks than that */
    unsigned hash_bits;
    uint32_t hashed;     /* blocks in it */
    struct code_page *pages[1 << PAGE_HASH_BITS];
    uint8_t *mapping, *arena; /* the arena is aligned in its mapping */
    size_t used, touched; /* touched: the most that was used since memory was last given back */
    uint32_t flushes;
    bool shares;
    struct host_code *host_code;
    bool reset;       /* everything is dead: the arena can be used from its start */
    bool changed;     /* see block_code_changed() */
    uint64_t stops[64]; /* soft_blocks_set_stops() */
    bool any_stops;
    struct decoded scratch;
    uint8_t bytes[CODE_BYTES]; /* what it was made from: memory may change meanwhile */
    struct uop single[BLOCK_MAX_UOPS + 1]; /* code that is not kept */
};

/* A page's lists stand side by side, one for every 32 bytes: code that runs together is looked up in the same cache lines. */
static struct block **block_list(const struct block_cache *b, const uint8_t *host, unsigned mode)
{
    uint64_t page = (((uintptr_t)host >> 12) + mode * 0x9E37u) * 0x9E3779B97F4A7C15ull;
    return &b->hash[(page >> (64 - (b->hash_bits - IN_PAGE_BITS)) << IN_PAGE_BITS) | ((uintptr_t)host >> 5 & ((1u << IN_PAGE_BITS) - 1))];
}
static size_t hash_bytes(unsigned bits) { return sizeof(struct block *) << bits; }
static struct block **make_hash(unsigned bits)
{
    void *made = mmap(NULL, hash_bytes(bits), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return made == MAP_FAILED ? NULL : made;
}
static void hash_insert(struct block_cache *b, struct block *k)
{
    struct block **list = block_list(b, k->host, k->mode);
    k->hash_next = *list;
    *list = k;
}
/* Without memory for larger ones its lists become longer. */
static void grow_hash(struct block_cache *b)
{
    struct block **old = b->hash, **made = make_hash(b->hash_bits + HASH_BITS_STEP);
    unsigned bits = b->hash_bits;
    if (!made)
        return;
    b->hash = made;
    b->hash_bits = bits + HASH_BITS_STEP;
    for (unsigned i = 0; i < 1u << bits; i++)
        for (struct block *k = old[i], *next; k; k = next) {
            next = k->hash_next;
            hash_insert(b, k);
        }
    munmap(old, hash_bytes(bits));
}
/* The list as short as it was made. All blocks are dead. */
static void shrink_hash(struct block_cache *b)
{
    struct block **made = b->hash_bits > HASH_BITS_MIN ? make_hash(HASH_BITS_MIN) : NULL;
    if (made) {
        munmap(b->hash, hash_bytes(b->hash_bits));
        b->hash = made;
        b->hash_bits = HASH_BITS_MIN;
    }
}
static void hash_remove(struct block_cache *b, struct block *k)
{
    struct block **at = block_list(b, k->host, k->mode);
    while (*at && *at != k)
        at = &(*at)->hash_next;
    if (*at) {
        *at = k->hash_next;
        b->hashed--;
    }
}
static unsigned page_hash(const uint8_t *page)
{
    return (unsigned)(((uintptr_t)page >> 12) * 0x9E3779B97F4A7C15ull >> (64 - PAGE_HASH_BITS));
}
static const uint8_t *page_of(const uint8_t *host) { return (const uint8_t *)((uintptr_t)host & ~(uintptr_t)0xFFF); }

static uint32_t sharers; /* VMs of this process */

/* Memory is given back in such units: the host frees nothing of a huge page of which only a part is given back. */
static size_t unit(size_t size) { return size < HUGE ? 4096 : HUGE; }

static size_t part(size_t whole, uint32_t parts)
{
    size_t size = whole / (parts < 1 ? 1 : parts);
    return size & ~(unit(size) - 1);
}

size_t soft_share(const struct soft_supply *supply, bool shares)
{
    uint32_t n = shares ? __atomic_load_n(&sharers, __ATOMIC_RELAXED) : 1;
    return n < SHARERS_MANY ? part(supply->whole, n) : supply->many;
}

size_t soft_resting_share(const struct soft_supply *supply, bool shares)
{
    uint32_t n = shares ? __atomic_load_n(&sharers, __ATOMIC_RELAXED) : 1;
    return n <= 1 ? supply->whole : part(supply->resting, n < RESTERS_MAX ? n : RESTERS_MAX);
}

void soft_give_back(uint8_t *base, size_t *touched, size_t used, size_t share, int advice)
{
    if (used > *touched)
        *touched = used;
    if (*touched > share) {
        size_t end = (*touched + HUGE - 1) & ~(size_t)(HUGE - 1); /* whole huge pages: see part() */
        madvise(base + share, end - share, advice);
        *touched = share;
    }
}

struct block_cache *soft_blocks_create(struct soft_vm *vm, uint32_t index)
{
    struct block_cache *b = calloc(1, sizeof *b);
    if (!b)
        return NULL;
    b->hash_bits = HASH_BITS_MIN;
    b->hash = make_hash(b->hash_bits);
    b->mapping = mmap(NULL, MAPPING_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (b->mapping != MAP_FAILED)
        b->arena = (uint8_t *)(((uintptr_t)b->mapping + GUARD + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    if (!b->hash || b->mapping == MAP_FAILED || mprotect(b->arena, ARENA_SIZE, PROT_READ | PROT_WRITE) != 0) {
        if (b->hash)
            munmap(b->hash, hash_bytes(b->hash_bits));
        if (b->mapping != MAP_FAILED)
            munmap(b->mapping, MAPPING_SIZE);
        free(b);
        return NULL;
    }
    /* Huge pages but for the first, so that a tiny guest has none to clear. */
    madvise(b->arena + HUGE, ARENA_SIZE - HUGE, MADV_HUGEPAGE);
    b->vm = vm;
    b->index = index;
    b->shares = !vm->config.virtual_clock;
    b->host_code = host_code_create(b->shares);
    __atomic_add_fetch(&sharers, 1, __ATOMIC_RELAXED);
    return b;
}

void soft_blocks_destroy(struct block_cache *b)
{
    if (b) {
        __atomic_sub_fetch(&sharers, 1, __ATOMIC_RELAXED);
        munmap(b->mapping, MAPPING_SIZE);
        munmap(b->hash, hash_bytes(b->hash_bits));
        host_code_destroy(b->host_code);
        free(b);
    }
}

const struct soft_stats *soft_blocks_stats(const struct block_cache *b) { return &b->stats; }

/* The mode that decides how bytes are decoded; selects the jump table. */
static unsigned current_mode(struct soft_vcpu *c)
{
    if (!c->jumps)
        soft_jump_cache_flush(c, true);
    if (c->code64) {
        bool user = c->view == VIEW_USER;
        c->jumps = c->jump.table[user];
        return MODE_CODE64 | (user ? MODE_USER : 0) | c->features;
    }
    unsigned mode = (SEG_DB(&c->seg[SEG_CS]) ? MODE_DB : 0) | (SEG_DB(&c->seg[SEG_SS]) ? MODE_SS32 : 0);
    unsigned key = mode | (c->view == VIEW_USER ? MODE_USER : 0);
    c->jumps = c->jump.table[2];
    if (c->jump.mode != key) {
        c->jump.mode = key;
        soft_jump_cache_flush(c, true);
    }
    return mode | c->features;
}

static struct uop *find_code(struct soft_vcpu *c, unsigned mode, bool keep);

/* ---- invalidation ---- */

static void flush_all_jumps(struct block_cache *b)
{
    for (unsigned i = 0; i < SOFT_MAX_VCPUS; i++)
        if (b->vm->vcpus[i] && b->vm->vcpus[i]->blocks == b)
            soft_jump_cache_flush(b->vm->vcpus[i], true);
}

/* Set or clear the mark of a host page in every slot that maps it. */
static void mark_page(struct block_cache *b, const uint8_t *page, bool on)
{
    struct soft_vm *vm = b->vm;
    for (unsigned i = 0; i < SOFT_MAX_SLOTS; i++) {
        struct soft_slot *s = &vm->slots[i];
        if (!s->size || page < s->host || (uint64_t)(page - s->host) >= s->size)
            continue;
        uint64_t offset = (uint64_t)(page - s->host);
        if (vm->parallel) {
            soft_shared_mark(vm->vcpus[b->index], s, offset >> 12, on);
            continue;
        }
        bool was = s->code_pages[offset >> 12];
        __atomic_store_n(&s->code_pages[offset >> 12], on, __ATOMIC_RELEASE);
        if (on && !was)
            soft_tlb_protect_page(vm, s->gpa + offset);
    }
}

static struct code_page *find_page(struct block_cache *b, const uint8_t *page)
{
    struct code_page *p = b->pages[page_hash(page)];
    while (p && p->host != page)
        p = p->next;
    return p;
}

static void unlink_block(struct block *k)
{
    struct uop_links *links = block_links(k);
    if (links)
        links->taken = links->next = NULL;
}

/* The first handler of a dead block: what is at its address now? Out of line, as enter_code(). */
static __attribute__((noinline)) struct uop *enter_anew(struct soft_vcpu *c)
{
    if (c->budget <= 0 || __atomic_load_n(&c->attention, __ATOMIC_RELAXED))
        return NULL;
    return find_code(c, current_mode(c), true); /* in place of the dead one in the jump cache */
}
static HANDLER(dead_entry)
{
    c->rip = rip;
    u = enter_anew(c);
    if (!u)
        return;
    return u->fn(c, u, c->rip);
}

/* Blocks that may be running have died: to the run loop at the end of the one that does, and not into another of them. */
static void leave_dead(struct block_cache *b)
{
    b->changed = true;
    for (unsigned i = 0; i < SOFT_MAX_VCPUS; i++)
        if (b->vm->vcpus[i] && b->vm->vcpus[i]->blocks == b)
            __atomic_store_n(&b->vm->vcpus[i]->attention, 1, __ATOMIC_SEQ_CST);
}

static void kill_page(struct block_cache *b, struct code_page *p)
{
    for (struct block *k = p->blocks; k; k = k->page_next) {
        hash_remove(b, k);
        unlink_block(k);
        k->code[0].fn = dead_entry;
        k->word_fn = host_flags_enter;
        b->stats.blocks_invalidated++;
    }
    p->blocks = NULL;
    p->granules = 0;
    mark_page(b, p->host, false);
    struct crossing *x = p->crossings;
    p->crossings = NULL;
    for (; x; x = x->next)
        kill_page(b, x->from);
}

void soft_blocks_invalidate(struct block_cache *b, uint64_t gpa, uint64_t size)
{
    struct soft_vm *vm = b->vm;
    bool killed = false;
    for (unsigned i = 0; i < SOFT_MAX_SLOTS; i++) {
        struct soft_slot *s = &vm->slots[i];
        if (!s->size || !size || gpa >= s->gpa + s->size || gpa + size <= s->gpa)
            continue;
        uint64_t from = gpa > s->gpa ? gpa - s->gpa : 0;
        uint64_t to = gpa + size < s->gpa + s->size ? gpa + size - s->gpa : s->size;
        for (uint64_t page = from >> 12; page <= (to - 1) >> 12; page++) {
            if (!(__atomic_load_n(&s->code_pages[page], __ATOMIC_RELAXED) >> b->index & 1))
                continue;
            struct code_page *p = find_page(b, s->host + (page << 12));
            if (!p)
                continue;
            unsigned low = from > page << 12 ? (unsigned)(from & 0xFFF) : 0;
            unsigned high = to < (page + 1) << 12 ? (unsigned)((to - 1) & 0xFFF) : 0xFFF;
            if (p->granules & soft_granules(low, high)) {
                kill_page(b, p);
                killed = true;
            }
        }
    }
    if (killed)
        leave_dead(b);
}

/* Nothing is freed here: this may be called from inside a running block's access. */
void soft_blocks_flush(struct block_cache *b)
{
    for (unsigned i = 0; i < 1u << PAGE_HASH_BITS; i++)
        for (struct code_page *p = b->pages[i]; p; p = p->next) {
            for (struct block *k = p->blocks; k; k = k->page_next)
                unlink_block(k);
            mark_page(b, p->host, false);
        }
    memset(b->pages, 0, sizeof b->pages);
    if (b->used)
        memset(b->hash, 0, hash_bytes(b->hash_bits));
    b->hashed = 0;
    b->reset = true;
    b->flushes++;
    leave_dead(b);
    flush_all_jumps(b);
}

void soft_blocks_flush_all(struct soft_vm *vm)
{
    for (uint32_t i = 0; i < vm->cache_count; i++)
        soft_blocks_flush(vm->caches[i]);
}

bool block_code_changed(struct soft_vcpu *c)
{
    bool changed = c->blocks->changed;
    c->blocks->changed = false;
    return changed;
}

void soft_blocks_set_stops(struct soft_vm *vm, const uint64_t stops[64])
{
    for (uint32_t i = 0; i < vm->cache_count; i++) {
        struct block_cache *b = vm->caches[i];
        memcpy(b->stops, stops, sizeof b->stops);
        b->any_stops = false;
        for (unsigned k = 0; k < 64; k++)
            b->any_stops |= stops[k] != 0;
        soft_blocks_flush(b);
    }
}

static bool stops_at(const struct block_cache *b, unsigned offset) { return b->stops[offset >> 6] >> (offset & 63) & 1; }

/* How many of the `rest` bytes from an offset in a page on are before the next stop. */
static unsigned until_stop(const struct block_cache *b, unsigned offset, unsigned rest)
{
    for (unsigned n = 1; b->any_stops && n < rest && n < BLOCK_MAX_INSNS * 15; n++)
        if (stops_at(b, offset + n))
            return n;
    return rest;
}

void soft_vm_wake_now(struct soft_vm *vm, uint32_t vcpu)
{
    vm->vcpus[vcpu]->blocks->changed = true; /* makes a store leave its block */
    if (vm->parallel)
        soft_vcpu_wake(vm, vcpu);
    else
        soft_vm_wake(vm);
}

/* Begin the arena anew: everything in it is dead, and nothing of it runs. Memory beyond `keep` goes back. */
static void recycle(struct block_cache *b, size_t keep)
{
    soft_give_back(b->arena, &b->touched, b->used, keep, MADV_DONTNEED);
    b->reset = false;
    b->used = 0;
}

/* What a sleeping VM keeps: one of several, what it has filled since the last flush. */
static size_t kept(const struct block_cache *b, size_t share)
{
    size_t used = (b->used + unit(b->used) - 1) & ~(unit(b->used) - 1);
    bool alone = share == ARENA_SIZE;
    return alone || share < used + DEAD_LEAST ? share : used;
}

void soft_blocks_rest(struct block_cache *b)
{
    size_t share = soft_share(&arena_supply, b->shares);
    if (b->used > share || !host_code_rest(b->host_code)) {
        soft_blocks_flush(b);
        recycle(b, share);
        host_code_reset(b->host_code);
    } else {
        soft_give_back(b->arena, &b->touched, b->used, kept(b, share), MADV_DONTNEED); /* of before the last flush */
    }
}

bool soft_blocks_exceed_rest(const struct block_cache *b)
{
    size_t most = b->touched > b->used ? b->touched : b->used;
    return most > soft_resting_share(&arena_supply, b->shares) || host_code_exceeds_rest(b->host_code);
}

void soft_blocks_rest_long(struct block_cache *b)
{
    soft_blocks_flush(b);
    recycle(b, 0);
    shrink_hash(b);
    host_code_drop(b->host_code);
    for (unsigned i = 0; i < SOFT_MAX_VCPUS; i++)
        if (b->vm->vcpus[i])
            soft_jump_cache_drop(b->vm->vcpus[i]);
}

/* ---- making blocks ---- */

/* Flush unless the arena has room for the largest block and what belongs to it, so that making one block cannot flush, even
 * if another thread makes a VM meanwhile and this VM's share shrinks. */
static void reserve(struct block_cache *b)
{
    size_t share = soft_share(&arena_supply, b->shares);
    size_t size = sizeof(struct block) + BLOCK_MAX_UOPS * (sizeof(struct uop) + sizeof(uint16_t)) + 4096;
    if (b->used > share || share - b->used < size)
        soft_blocks_flush(b);
}

/* `size` bytes of the arena, for which reserve() has made room. */
static void *allocate(struct block_cache *b, size_t size)
{
    size = (size + 7) & ~(size_t)7;
    if (b->reset) {
        recycle(b, soft_share(&arena_supply, b->shares));
        host_code_reset(b->host_code);
    }
    void *p = b->arena + b->used;
    b->used += size;
    return p;
}

/* The record of a page that code is about to be decoded from. Before its bytes are read it is marked: a device that writes
 * to it from another thread finds the mark, or the decoder finds what it wrote (see soft_vm_memory_written()). */
static struct code_page *make_page(struct block_cache *b, const uint8_t *page)
{
    struct code_page *p = find_page(b, page);
    if (!p) {
        p = allocate(b, sizeof *p);
        memset(p, 0, sizeof *p);
        p->host = page;
        p->next = b->pages[page_hash(page)];
        b->pages[page_hash(page)] = p;
    }
    mark_page(b, page, true);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return p;
}

/* The first handler of a block that is not hot yet. */
static HANDLER(count_entry)
{
    struct block *k = (struct block *)((char *)u - offsetof(struct block, code));
    if (++k->entered >= SOFT_HOT) {
        u->fn = k->first;
        bool kernel = (k->mode & (MODE_CODE64 | MODE_USER)) == MODE_CODE64;
        if (!host_code_translate(c->blocks->host_code, k, kernel ? rip : 0))
            soft_blocks_flush(c->blocks);
        return u->fn(c, u, rip);
    }
    return k->first(c, u, rip);
}

/* The first handler of a block at which the caller may have a breakpoint. */
static HANDLER(stop_entry)
{
    struct block *k = (struct block *)((char *)u - offsetof(struct block, code));
    soft_stop_at_breakpoint(c, rip);
    return k->first(c, u, rip);
}

static void mark_granules(struct code_page *p, unsigned low, unsigned high) { p->granules |= soft_granules(low, high); }

/* Copy what was decoded, with the handlers of its operations; ops: NULL, or where the operations themselves are kept. */
static void bind_handlers(struct uop *code, uint16_t *ops, const struct decoded *d)
{
    memcpy(code, d->uops, d->count * sizeof(struct uop));
    for (int i = 0; i < (int)d->count; i++) {
        unsigned op = i == d->links ? OP_NONE : (unsigned)code[i].op;
        if (ops)
            ops[i] = (uint16_t)op;
        if (op != OP_NONE)
            code[i].fn = op_handler(op);
    }
}

/* Keep what was decoded from page p. host2, q: NULL unless the block is one instruction that crosses a page. */
static struct block *make_block(struct block_cache *b, const struct decoded *d, const uint8_t *host, struct code_page *p,
                                const uint8_t *host2, struct code_page *q, unsigned mode)
{
    struct block *k = allocate(b, sizeof(struct block) + d->count * (sizeof(struct uop) + sizeof(uint16_t)));
    *k = (struct block){.host = host, .host2 = host2, .bytes = (uint16_t)d->bytes, .mode = mode,
                        .insns = (uint8_t)d->insns, .count = (uint16_t)d->count, .flags_in = d->flags_in,
                        .linked = d->links >= 0, .word_fn = host_flags_enter};
    bind_handlers(k->code, block_ops(k), d);
    k->first = k->code[0].fn;
    k->stops = stops_at(b, (unsigned)((uintptr_t)host & 0xFFF));
    if (!(mode & MODE_SINGLE))
        k->code[0].fn = k->stops ? stop_entry : count_entry;
    if (k->linked)
        block_links(k)->block = k;
    k->page_next = p->blocks;
    p->blocks = k;
    unsigned offset = (unsigned)((uintptr_t)host & 0xFFF), end = offset + d->bytes - 1;
    mark_granules(p, offset, end < 0xFFF ? end : 0xFFF);
    if (host2) {
        struct crossing *x = allocate(b, sizeof *x);
        *x = (struct crossing){q->crossings, p};
        q->crossings = x;
        mark_granules(q, 0, end & 0xFFF);
    }
    if (b->vm->parallel) {
        soft_shared_granules(b->vm, p->host, p->granules);
        if (q)
            soft_shared_granules(b->vm, q->host, q->granules);
    }
    if (++b->hashed > 1u << b->hash_bits && b->hash_bits < HASH_BITS_MAX)
        grow_hash(b);
    hash_insert(b, k);
    b->stats.blocks_decoded++;
    return k;
}

static const uint8_t *fetch_page(struct soft_vcpu *c, uint64_t linear, uint64_t *gpa)
{
    uint8_t *p;
    if (tlb_hit(c, linear, 1, ACCESS_EXEC, &p))
        return p;
    return soft_mmu_lookup(c, linear, ACCESS_EXEC, gpa);
}

/* One instruction that is not kept: from bytes of which some are outside CS.limit or RAM. */
static struct uop *decode_unkept(struct soft_vcpu *c, uint64_t linear, unsigned mode, uint64_t limit)
{
    struct block_cache *b = c->blocks;
    uint8_t bytes[16];
    unsigned n = limit < 15 ? (unsigned)limit : 15;
    if (SOFT_UNLIKELY(stops_at(b, (unsigned)(linear & 0xFFF))) && !(mode & MODE_SINGLE))
        soft_stop_at_breakpoint(c, c->rip);
    for (unsigned i = 1; i <= n; i++) {
        uint64_t at = linear + i - 1, gpa = 0;
        if (!c->code64)
            at &= UINT32_MAX;
        const uint8_t *p = fetch_page(c, at, &gpa);
        bytes[i - 1] = p ? soft_load8(p) : (uint8_t)soft_phys_load(c, gpa, 1);
        decode_block(&b->scratch, bytes, i, mode, 1);
        if (!b->scratch.need_more) {
            bind_handlers(b->single, NULL, &b->scratch);
            return b->single;
        }
    }
    soft_raise_error(c, VEC_GP, 0);
}

/* Nobody finds the block any more. It stays in its page's list. */
static void forget_block(struct block_cache *b, struct block *k)
{
    unlink_block(k);
    hash_remove(b, k);
    k->mode = UINT16_MAX;
}

/* Another vCPU or a device wrote to the bytes of a block after they were read, and perhaps before their granules were marked.
 * crossing: both parts of an instruction that crosses a page, of which `rest` bytes are in the first. */
static bool changed_meanwhile(const struct block_cache *b, const struct block *k, unsigned rest, const uint8_t *crossing)
{
    uint8_t now[CODE_BYTES];
    if (!k->host2) {
        soft_load_code(now, k->host, k->bytes);
        return memcmp(now, b->bytes, k->bytes) != 0;
    }
    soft_load_code(now, k->host, rest);
    soft_load_code(now + rest, k->host2, 15);
    return memcmp(now, crossing, rest + 15) != 0;
}

/* Whether the instruction at `host`, in the last `rest` bytes of its page, goes on in the next one. */
static bool crosses_page(struct block_cache *b, const uint8_t *host, unsigned rest, unsigned mode)
{
    if (rest >= 15)
        return false;
    soft_load_code(b->bytes, host, rest);
    decode_block(&b->scratch, b->bytes, rest, mode, 1);
    return b->scratch.need_more;
}

/* The block at c->rip, made if necessary. Raises if it cannot be fetched. */
static struct uop *find_code(struct soft_vcpu *c, unsigned mode, bool keep)
{
    struct block_cache *b = c->blocks;
    uint64_t linear = c->rip, limit = UINT64_MAX, gpa = 0;
    b->changed = false;
    c->access_ss = 0;
    if (c->code64) {
        if (!soft_canonical(linear))
            soft_raise_error(c, VEC_GP, 0);
    } else {
        c->rip &= UINT32_MAX;
        if (c->rip > c->seg[SEG_CS].limit)
            soft_raise_error(c, VEC_GP, 0);
        limit = c->seg[SEG_CS].limit - c->rip + 1;
        linear = (c->seg[SEG_CS].base + c->rip) & UINT32_MAX;
    }
    const uint8_t *host = fetch_page(c, linear, &gpa);
    if (SOFT_UNLIKELY(!host))
        return decode_unkept(c, linear, mode, limit);
    struct block *k = *block_list(b, host, mode);
    while (k && (k->host != host || k->mode != mode))
        k = k->hash_next;
    if (k && SOFT_UNLIKELY(k->host2 != NULL)) {
        uint64_t page2 = (linear & ~0xFFFull) + 4096;
        const uint8_t *host2 = fetch_page(c, c->code64 ? page2 : page2 & UINT32_MAX, &gpa);
        if (host2 != k->host2) {
            forget_block(b, k);
            k = NULL;
        }
    }
    for (unsigned tries = 0; !k; tries++) {
        if (SOFT_UNLIKELY(tries == REMADE_MOST))
            return decode_unkept(c, linear, mode, limit);
        unsigned rest = 4096 - (unsigned)(linear & 0xFFF);
        const uint8_t *host2 = NULL;
        if (crosses_page(b, host, rest, mode)) { /* the walk may raise or write: nothing is marked yet */
            uint64_t page2 = (linear & ~0xFFFull) + 4096;
            if (limit <= rest || !(host2 = fetch_page(c, c->code64 ? page2 : page2 & UINT32_MAX, &gpa)))
                return decode_unkept(c, linear, mode, limit);
        }
        reserve(b);
        struct code_page *p = make_page(b, page_of(host)), *q = host2 ? make_page(b, host2) : NULL;
        uint8_t bytes[32];
        if (host2) {
            soft_load_code(bytes, host, rest);
            soft_load_code(bytes + rest, host2, 15);
            decode_block(&b->scratch, bytes, rest + 15, mode, 1);
        } else {
            unsigned until = until_stop(b, (unsigned)(linear & 0xFFF), rest), most = rest < CODE_BYTES ? rest : CODE_BYTES;
            soft_load_code(b->bytes, host, most);
            decode_block(&b->scratch, b->bytes, until < most ? until : most, mode, mode & MODE_SINGLE ? 1 : BLOCK_MAX_INSNS);
            if (b->scratch.need_more && until < rest) /* a stop inside of the first instruction */
                decode_block(&b->scratch, b->bytes, most, mode, 1);
            if (b->scratch.need_more) /* written meanwhile, it crosses now */
                continue;
        }
        if (b->scratch.bytes > limit)
            return decode_unkept(c, linear, mode, limit);
        k = make_block(b, &b->scratch, host, p, host2, q, mode);
        if (b->vm->parallel && changed_meanwhile(b, k, rest, bytes)) {
            forget_block(b, k);
            k = NULL;
        }
    }
    if (SOFT_UNLIKELY(k->bytes > limit))
        return decode_unkept(c, linear, mode, limit);
    if (keep)
        soft_jump_insert(c, linear, k->code, k->host2 != NULL);
    return k->code;
}

/* Out of line of block_enter(), so that nothing there has an address and its end stays a tail call. */
static __attribute__((noinline)) struct uop *enter_code(struct soft_vcpu *c)
{
    if (c->budget <= 0 || __atomic_load_n(&c->attention, __ATOMIC_RELAXED))
        return NULL;
    unsigned mode = current_mode(c);
    if (!c->code64) {
        uint64_t linear = (c->seg[SEG_CS].base + (uint32_t)c->rip) & UINT32_MAX;
        struct soft_jump *e = &c->jumps[jump_hash(linear)];
        /* Limits may differ between segments: only the whole 4 GiB goes without looking. */
        if (e->linear == linear && c->seg[SEG_CS].limit == UINT32_MAX) {
            c->rip &= UINT32_MAX;
            return e->code;
        }
    } else {
        struct soft_jump *e = &c->jumps[jump_hash(c->rip)];
        if (e->linear == c->rip && e->code != &empty_jump)
            return e->code;
    }
    return find_code(c, mode, true);
}

HANDLER(block_enter)
{
    (void)u, (void)rip;
    u = enter_code(c);
    if (!u)
        return;
    return u->fn(c, u, c->rip);
}

static __attribute__((noinline)) struct uop *link_code(struct soft_vcpu *c, struct uop_links *links, bool taken)
{
    struct block_cache *b = c->blocks;
    struct block *from = links->block;
    uint32_t flushes = b->flushes;
    struct uop *code = find_code(c, current_mode(c), true);
    /* Not into what is not kept, from what is dead by now, or to what depends on another page. */
    if (!from || flushes != b->flushes || block_links(from) != links || (code >= b->single && code < b->single + BLOCK_MAX_UOPS))
        return code;
    struct block *to = (struct block *)((char *)code - offsetof(struct block, code));
    if (to->host2 || from->host2 || page_of(to->host) != page_of(from->host))
        return code;
    struct block *k = *block_list(b, from->host, from->mode);
    while (k && k != from)
        k = k->hash_next;
    if (k) {
        if (taken)
            links->taken = code;
        else
            links->next = code;
    }
    return code;
}
HANDLER(block_link_taken)
{
    u = link_code(c, LINKS(u), true);
    rip = c->rip;
    return u->fn(c, u, rip);
}
HANDLER(block_link_next)
{
    u = link_code(c, LINKS(u), false);
    rip = c->rip;
    return u->fn(c, u, rip);
}

/* What a step that ended with a fault kept back. */
void soft_release_budget(struct soft_vcpu *c)
{
    c->budget += c->budget_held;
    c->budget_held = 0;
}

/* Block by block: with a budget of one each leaves at its end. */
static __attribute__((noinline, cold)) void execute_traced(struct soft_vcpu *c)
{
    while (c->budget > 0 && !__atomic_load_n(&c->attention, __ATOMIC_RELAXED)) {
        uint64_t rip = c->rip, before = soft_instructions(c);
        soft_trace(c, SOFT_TRACE_BLOCK, rip, before, 1);
        c->budget_held = c->budget - 1;
        c->budget = 1;
        host_enter(c, &empty_jump, rip);
        soft_release_budget(c);
    }
}

void soft_execute(struct soft_vcpu *c)
{
    soft_release_budget(c);
    if (SOFT_UNLIKELY(c->caller.trace != NULL)) {
        execute_traced(c);
        return;
    }
    while (c->budget > 0 && !__atomic_load_n(&c->attention, __ATOMIC_RELAXED))
        host_enter(c, &empty_jump, c->rip);
}

void soft_execute_some(struct soft_vcpu *c, int64_t most)
{
    soft_release_budget(c);
    if (c->budget > most) {
        c->budget_held = c->budget - most;
        c->budget = most;
    }
    while (c->budget > 0 && !__atomic_load_n(&c->attention, __ATOMIC_RELAXED))
        host_enter(c, &empty_jump, c->rip);
    soft_release_budget(c);
}

bool soft_undefined_by_name(struct soft_vcpu *c)
{
    uint64_t linear = c->code64 ? c->rip : (c->seg[SEG_CS].base + c->rip) & UINT32_MAX, gpa = 0;
    uint8_t bytes[2];
    for (unsigned i = 0; i < 2; i++) {
        const uint8_t *p = fetch_page(c, linear + i, &gpa);
        bytes[i] = p ? soft_load8(p) : (uint8_t)soft_phys_load(c, gpa, 1);
    }
    return bytes[0] == 0x0F && (bytes[1] == 0x0B || bytes[1] == 0xB9 || bytes[1] == 0xFF); /* UD2, UD1, UD0 */
}

void soft_step_unkept(struct soft_vcpu *c)
{
    uint64_t linear = c->rip, limit = UINT64_MAX;
    soft_release_budget(c);
    c->blocks->changed = false;
    c->access_ss = 0;
    if (!c->code64) {
        c->rip &= UINT32_MAX;
        if (c->rip > c->seg[SEG_CS].limit)
            soft_raise_error(c, VEC_GP, 0);
        limit = c->seg[SEG_CS].limit - c->rip + 1;
        linear = (c->seg[SEG_CS].base + c->rip) & UINT32_MAX;
    } else if (!soft_canonical(linear)) {
        soft_raise_error(c, VEC_GP, 0);
    }
    unsigned mode = current_mode(c) | MODE_SINGLE;
    c->budget_held = c->budget - 1;
    c->budget = 1;
    host_enter(c, decode_unkept(c, linear, mode, limit), c->rip);
    soft_release_budget(c);
}

void soft_step(struct soft_vcpu *c)
{
    /* With a budget of one the instruction leaves at its end, wherever it goes. */
    soft_release_budget(c);
    if (SOFT_UNLIKELY(c->caller.trace != NULL))
        soft_trace(c, SOFT_TRACE_STEP, c->rip, soft_instructions(c), 1);
    c->budget_held = c->budget - 1;
    c->budget = 1;
    struct uop *u = find_code(c, current_mode(c) | MODE_SINGLE, false);
    host_enter(c, u, c->rip);
    soft_release_budget(c);
}
