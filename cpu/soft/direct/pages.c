/* What a runner has mapped: kept like a TLB. An entry says no more than the guest's page tables do with their accessed and
 * dirty bits set, so nothing that runs natively could have set one; after a flush entries are compared with the tables and most
 * stay. A page is writable natively only while no translated code was made from it and the dirty log has it already.
 *
 * The walk here only reads. What is not there, or may not be accessed so, is left to the core's own walker by executing the
 * instruction in the core.
 */
#include "soft/direct/internal.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>

enum { P = 1, W = 2, U = 4, A = 0x20, D = 0x40, PS = 0x80, AROUND = 32, POPULATE_MAX = 16, SLICE_DOUBLINGS = 10 };
#define NX (1ull << 63)
#define ADDRESS (PHYS_MASK & PAGE_MASK)
#define REGION_BYTES (REGION_PAGES * PAGE_BYTES)

/* ---- the guest's tables ---- */

/* What decides the pages of a region: a page table, or a large page's entry. */
struct leaf {
    const uint64_t *table; /* NULL: `large` stands for all */
    uint64_t large;        /* its address and rights, for the region's first page; P clear: nothing is mapped */
    bool writable, nx;
};

/* need: which of P, U and A have to be set. */
static bool valid(const struct soft_vcpu *c, uint64_t entry, uint64_t zero, uint64_t need)
{
    uint64_t reserved = (0x000FFFFFFFFFFFFFull & ~c->phys_mask) | (c->efer & EFER_NXE ? 0 : NX) | zero;
    return (entry & need) == need && !(entry & reserved);
}

static struct leaf walk(struct soft_vcpu *c, uint64_t base, uint64_t need)
{
    struct leaf leaf = {.writable = true};
    uint64_t table = c->cr3 & ADDRESS;
    for (unsigned level = 4; level >= 2; level--) {
        const uint8_t *at = soft_phys(c->vm, table, false, NULL);
        if (!at)
            return leaf;
        unsigned shift = 12 + (level - 1) * 9;
        uint64_t entry = __atomic_load_n((const uint64_t *)(const void *)at + (base >> shift & 511), __ATOMIC_RELAXED);
        bool large = level < 4 && (entry & PS);
        if (!valid(c, entry, level == 4 ? PS : large ? ((1ull << shift) - 1) & ~0x1FFFull : 0, need))
            return leaf;
        leaf.writable &= (entry & W) != 0;
        leaf.nx |= (entry & NX) != 0;
        if (large) {
            uint64_t in = base & ((1ull << shift) - 1);
            leaf.large = ((entry & ADDRESS & ~((1ull << shift) - 1)) + in) | (entry & D) | P;
            return leaf;
        }
        table = entry & ADDRESS;
    }
    leaf.table = (const uint64_t *)(const void *)soft_phys(c->vm, table, false, NULL);
    return leaf;
}

struct direct_range *range_of(struct direct_vm *direct, const uint8_t *host)
{
    for (uint32_t i = 0; i < direct->range_count; i++)
        if (host >= direct->ranges[i].host && (uint64_t)(host - direct->ranges[i].host) < direct->ranges[i].size)
            return &direct->ranges[i];
    return NULL;
}

/* Whether a page of RAM may be written without the core seeing each store. */
static bool unseen_writes(struct soft_vcpu *c, struct soft_slot *slot, uint64_t gpa)
{
    uint64_t n = (gpa - slot->gpa) >> 12;
    if (slot->readonly || (slot->log_dirty && !(__atomic_load_n(&slot->dirty[n >> 3], __ATOMIC_RELAXED) >> (n & 7) & 1)))
        return false;
    return soft_shared_may_write(c, slot, n);
}

/* What the tables allow of the i-th page, as region.page has it: nothing unless it was accessed, no writing unless it is
 * dirty. */
static uint64_t allowed(struct soft_vcpu *c, const struct leaf *leaf, unsigned i)
{
    uint64_t entry, rights = PAGE_R;
    if (leaf->table) {
        entry = __atomic_load_n(&leaf->table[i], __ATOMIC_RELAXED);
        if (!valid(c, entry, 0, P | U | A))
            return 0;
        rights |= leaf->writable && (entry & W) && (entry & D) ? PAGE_W : 0;
        rights |= leaf->nx || (entry & NX) ? 0 : PAGE_X;
        entry &= ADDRESS;
    } else {
        if (!(leaf->large & P))
            return 0;
        rights |= leaf->writable && (leaf->large & D) ? PAGE_W : 0;
        rights |= leaf->nx ? 0 : PAGE_X;
        entry = (leaf->large & ADDRESS) + i * PAGE_BYTES;
    }
    struct soft_slot *slot = soft_find_slot(c->vm, entry);
    if (!slot || !range_of(c->vm->direct, slot->host + (entry - slot->gpa)))
        return 0;
    if ((rights & PAGE_W) && !unseen_writes(c, slot, entry))
        rights &= ~(uint64_t)PAGE_W;
    return entry | rights;
}

/* ---- what is mapped ---- */

static unsigned hash(uint64_t base) { return (unsigned)((base >> 21) * 0x9E3779B97F4A7C15ull >> 56) % REGION_HASH; }

struct region *region_of(struct runner *r, uint64_t linear)
{
    uint64_t base = linear & ~(REGION_BYTES - 1);
    struct region *region = r->regions[hash(base)];
    while (region && region->base != base)
        region = region->next;
    return region;
}

static struct region *make_region(struct runner *r, uint64_t linear)
{
    struct region *region = region_of(r, linear);
    if (region || !(region = calloc(1, sizeof *region)))
        return region;
    region->base = linear & ~(REGION_BYTES - 1);
    region->next = r->regions[hash(region->base)];
    r->regions[hash(region->base)] = region;
    r->region_count++;
    return region;
}

void pages_forget(struct runner *r)
{
    for (unsigned i = 0; i < REGION_HASH; i++)
        while (r->regions[i]) {
            struct region *region = r->regions[i];
            r->regions[i] = region->next;
            free(region);
        }
    r->mapped = r->region_count = 0;
}

bool pages_have(struct runner *r, uint64_t linear, unsigned rights)
{
    const struct region *region = region_of(r, linear);
    uint64_t page = region && !region->stale ? region->page[linear >> 12 & 511] : 0;
    return (page & rights) == rights && !((rights & PAGE_X) && (page & PAGE_LOST));
}

/* Changes that follow one another become one call. */
struct batch {
    struct soft_vcpu *c;
    struct runner *r;
    uint32_t count;
    bool failed, full; /* full: so many mappings that the runner has to begin anew */
    uint64_t linear, bytes, what; /* the run under way; what: as region.page of its first page */
};

static void end_run(struct batch *b)
{
    if (!b->bytes || b->failed || b->full)
        return;
    if (b->r->mapped > MAX_MAPPED) {
        b->full = true;
        return;
    }
    struct runner_command *command = &b->r->page->list[b->count++];
    if (!b->what) {
        *command = (struct runner_command){SYS_munmap, {b->linear, b->bytes}};
        b->r->mapped++; /* out of the middle of one */
    } else {
        struct soft_slot *slot;
        uint64_t gpa = b->what & PAGE_MASK;
        const uint8_t *host = soft_phys(b->c->vm, gpa, false, &slot);
        const struct direct_range *range = host ? range_of(b->c->vm->direct, host) : NULL;
        if (!range || b->bytes > range->size - (uint64_t)(host - range->host)) {
            b->failed = true;
            return;
        }
        uint64_t protection = PROT_READ | (b->what & PAGE_W ? PROT_WRITE : 0) | (b->what & PAGE_X ? PROT_EXEC : 0);
        uint64_t flags = MAP_SHARED | MAP_FIXED | (b->bytes <= POPULATE_MAX * PAGE_BYTES ? MAP_POPULATE : 0);
        b->r->mapped += 2; /* in the middle of one */
        *command = (struct runner_command){
            SYS_mmap, {b->linear, b->bytes, protection, flags, RUNNER_MEMORY_FD, range->offset + (uint64_t)(host - range->host)}};
    }
    b->bytes = 0;
    b->c->direct->counts.commands++;
    if (b->count == RUNNER_MAX_COMMANDS) {
        b->failed |= !runner_command(b->r, b->count);
        b->count = 0;
    }
}

/* From now on the i-th page of the region is `what`. */
static void set_page(struct batch *b, struct region *region, unsigned i, uint64_t what)
{
    uint64_t linear = region->base + i * PAGE_BYTES, *page = &region->page[i];
    bool had = *page != 0, has = what != 0;
    region->count += (uint32_t)has - (uint32_t)had;
    region->executable += (uint32_t)((what & PAGE_X) != 0) - (uint32_t)((*page & PAGE_X) != 0);
    *page = what;
    bool follows = b->bytes && linear == b->linear + b->bytes && (what ? what == b->what + b->bytes && b->what : !b->what);
    if (what && follows) { /* one piece of the file, too */
        const struct soft_slot *slot = soft_find_slot(b->c->vm, b->what & PAGE_MASK);
        follows = slot && (what & PAGE_MASK) - slot->gpa < slot->size;
    }
    if (!follows) {
        end_run(b);
        b->linear = linear;
        b->what = what;
    }
    b->bytes += PAGE_BYTES;
}

/* The commands are carried out when the runner goes on. */
static bool end_batch(struct batch *b)
{
    end_run(b);
    b->c->direct->counts.batches += b->count != 0;
    b->r->waiting = b->count;
    return !b->failed;
}

bool pages_drop_all(struct runner *r)
{
    pages_forget(r);
    guard_forget(r);
    r->page->list[0] = (struct runner_command){SYS_munmap, {0, RUNNER_GATE}};
    r->page->list[1] = (struct runner_command){SYS_munmap, {RUNNER_OWN_END, RUNNER_END - RUNNER_OWN_END}};
    return runner_command(r, 2);
}

/* ---- after a flush ---- */

static void check_region(struct batch *b, struct region *region)
{
    region->stale = false;
    if (!region->count)
        return;
    struct leaf leaf = walk(b->c, region->base, P | U | A);
    for (unsigned i = 0; i < REGION_PAGES; i++) {
        uint64_t old = region->page[i];
        if (!old)
            continue;
        uint64_t now = allowed(b->c, &leaf, i), had = old & PAGE_LOST ? old & ~(uint64_t)PAGE_X : old;
        if (((now ^ old) & PAGE_MASK) || !now)
            now = 0;
        else
            now &= had | PAGE_MASK;
        if (now != old)
            set_page(b, region, i, now);
    }
}

uint64_t pages_top(struct soft_vcpu *c)
{
    const uint64_t *top = (const uint64_t *)(const void *)soft_phys(c->vm, c->cr3 & ADDRESS, false, NULL);
    uint64_t sum = 0;
    for (unsigned i = 0; top && i < 256; i++) {
        uint64_t entry = __atomic_load_n(&top[i], __ATOMIC_RELAXED);
        sum = sum * 31 + (entry & P ? entry & ADDRESS : 0);
    }
    return sum;
}

bool pages_replaced(struct soft_vcpu *c, struct runner *r)
{
    uint64_t top = r->stale ? pages_top(c) : r->top;
    uint32_t kept = 0, lost = 0;
    if (top == r->top)
        return false;
    r->top = top;
    for (unsigned i = 0; i < REGION_HASH; i++)
        for (const struct region *region = r->regions[i]; region; region = region->next) {
            struct leaf leaf = region->count ? walk(c, region->base, P | U | A) : (struct leaf){0};
            for (unsigned n = 0; n < REGION_PAGES && region->count; n++)
                if (region->page[n])
                    *((allowed(c, &leaf, n) ^ region->page[n]) & PAGE_MASK ? &lost : &kept) += 1;
        }
    return lost > kept;
}

void pages_lose(struct runner *r, uint64_t gpa)
{
    for (unsigned i = 0; i < REGION_HASH && r->page; i++)
        for (struct region *region = r->regions[i]; region; region = region->next)
            for (unsigned n = 0; n < REGION_PAGES && region->executable; n++)
                if ((region->page[n] & PAGE_X) && (gpa == PAGE_ALL || (region->page[n] & PAGE_MASK) == gpa)) {
                    region->page[n] |= PAGE_LOST;
                    r->some_lost = true;
                }
}

/* Pages of which code was made, or whose writes the dirty log wants to see again; and code that was written. */
static void protect_region(struct batch *b, struct region *region)
{
    for (unsigned i = 0; i < REGION_PAGES; i++) {
        uint64_t old = region->page[i], now = old;
        if (old & PAGE_LOST)
            now &= ~(uint64_t)(PAGE_LOST | PAGE_X);
        struct soft_slot *slot = old & PAGE_W ? soft_find_slot(b->c->vm, old & PAGE_MASK) : NULL;
        if ((old & PAGE_W) && (!slot || !unseen_writes(b->c, slot, old & PAGE_MASK)))
            now &= ~(uint64_t)PAGE_W;
        if (now != old)
            set_page(b, region, i, now);
    }
}

static bool unprotected(const struct soft_vcpu *c, const struct runner *r)
{
    return r->protect_seq != c->direct->protect_seq || r->some_lost;
}

static void protect(struct batch *b)
{
    b->r->protect_seq = b->c->direct->protect_seq;
    b->r->some_lost = false;
    for (unsigned i = 0; i < REGION_HASH; i++)
        for (struct region *region = b->r->regions[i]; region; region = region->next)
            if (region->count)
                protect_region(b, region);
}

/* Whether the address space has what a runner cannot: pages of its own where ours are, or a table of descriptors. */
static bool beyond_runners(struct soft_vcpu *c)
{
    if (c->ldtr.selector & ~3u)
        return true;
    struct leaf leaf = walk(c, RUNNER_GATE & ~(REGION_BYTES - 1), P | U);
    for (uint64_t at = RUNNER_GATE; at < RUNNER_OWN_END; at += PAGE_BYTES)
        if (leaf.table ? (leaf.table[at >> 12 & 511] & P) : (leaf.large & P))
            return true;
    return false;
}

/* ---- what the guest touched ---- */

static bool usable(uint64_t linear)
{
    return linear >= RUNNER_LOWEST && linear < RUNNER_END && (linear < RUNNER_GATE || linear >= RUNNER_OWN_END);
}

static void note_writable(struct direct_vm *direct, const uint8_t *host)
{
    const struct direct_range *range = range_of(direct, host);
    uint64_t n = range ? (range->offset + (uint64_t)(host - range->host)) >> 12 : 0;
    if (range)
        __atomic_fetch_or(&direct->writable[n >> 3], (uint8_t)(1u << (n & 7)), __ATOMIC_RELAXED);
}

/* The bytes of a page that the runner may execute, or NULL. */
static const uint8_t *executable(struct batch *b, uint64_t linear)
{
    const struct region *region = region_of(b->r, linear);
    uint64_t page = region ? region->page[linear >> 12 & 511] : 0;
    return (page & PAGE_X) && !(page & PAGE_LOST) ? soft_phys(b->c->vm, page & PAGE_MASK, false, NULL) : NULL;
}

/* Whether the code of a page may run natively. What sees the host is watched, if the page is worth it now. */
static bool may_execute(struct batch *b, uint64_t linear, const uint8_t *host, bool worth)
{
    int16_t starts[SCAN_MOST];
    int count = scan_page(b->c->vm->direct, executable(b, linear - PAGE_BYTES), host, executable(b, linear + PAGE_BYTES), starts);
    if (count == 0)
        guard_release(b->r, linear);
    if (count <= 0 || !worth)
        return !count;
    uint64_t lost[GUARDS];
    unsigned lost_count;
    bool taken = guard_take(b->r, linear, starts, (unsigned)count, lost, &lost_count);
    for (unsigned i = 0; i < lost_count; i++) {
        struct region *region = region_of(b->r, lost[i]);
        unsigned n = lost[i] >> 12 & 511;
        set_page(b, region, n, region->page[n] & ~(uint64_t)PAGE_X);
    }
    return taken;
}

static void map_page(struct batch *b, struct region *region, unsigned i, uint64_t now, bool touched, bool executed)
{
    struct direct_vm *direct = b->c->vm->direct;
    uint64_t old = region->page[i];
    if ((now & PAGE_W) && (now & PAGE_X)) /* either side in turn, so that what is executed was looked at as it is */
        now &= ~(uint64_t)(executed && touched ? PAGE_W : PAGE_X);
    struct soft_slot *slot;
    const uint8_t *host = soft_phys(b->c->vm, now & PAGE_MASK, false, &slot);
    if (now & PAGE_X) {
        uint64_t n = ((now & PAGE_MASK) - slot->gpa) >> 12;
        if (touched || !soft_shared_others_write(b->c, slot, n))
            soft_shared_execute(b->c, slot, n); /* what is looked at now stays so */
        else
            now &= ~(uint64_t)PAGE_X;
    }
    if ((now & PAGE_X) && !may_execute(b, region->base + i * PAGE_BYTES, host, touched && (executed || (old & PAGE_X))))
        now &= ~(uint64_t)PAGE_X;
    b->c->direct->counts.pages++;
    if (now & PAGE_W)
        note_writable(direct, host);
    if (now != old)
        set_page(b, region, i, now);
}

static void map_around(struct batch *b, uint64_t linear, bool executed)
{
    struct soft_vcpu *c = b->c;
    if (!usable(linear)) {
        c->direct->slice = c->vm->direct->page_slice;
        return;
    }
    struct region *region = make_region(b->r, linear);
    if (!region)
        return;
    if (region->stale)
        check_region(b, region);
    struct leaf leaf = walk(c, region->base, P | U | A);
    unsigned target = linear >> 12 & 511;
    unsigned first = leaf.table ? target & ~(AROUND - 1u) : 0, end = leaf.table ? first + AROUND : REGION_PAGES;
    if (leaf.table && !executed) {
        /* What the core translated of a page that the guest goes on writing to is given up. */
        uint64_t entry = leaf.table[target];
        struct soft_slot *slot;
        if (valid(c, entry, 0, P | U | A) && (entry & W) && (entry & D) && leaf.writable && soft_phys(c->vm, entry & ADDRESS, true, &slot) &&
            __atomic_load_n(&slot->code_pages[((entry & ADDRESS) - slot->gpa) >> 12], __ATOMIC_RELAXED)) {
            soft_shared_give_up(c, slot, ((entry & ADDRESS) - slot->gpa) >> 12);
        }
    }
    for (unsigned i = first; i < end; i++) {
        bool touched = i == target;
        if (!usable(region->base + i * PAGE_BYTES) || (region->page[i] && !touched))
            continue;
        uint64_t now = allowed(c, &leaf, i);
        if (now)
            map_page(b, region, i, now, touched, executed);
    }
    if (!region->page[target]) {
        c->direct->slice = c->vm->direct->page_slice;
    } else if (executed && !(region->page[target] & PAGE_X)) {
        /* In the core, the longer the more often it comes there with little native time between. */
        uint8_t *often = &region->in_core[target];
        if (b->r->last_ns >= PAYS_NS)
            *often = 0;
        else
            *often += *often < SLICE_DOUBLINGS;
        c->direct->slice = (int64_t)c->vm->direct->page_slice << *often;
        b->r->refused += (uint64_t)c->direct->slice;
        c->direct->counts.refused++;
    }
}

bool pages_prepare(struct soft_vcpu *c, struct runner *r)
{
    struct direct_vcpu *d = c->direct;
    bool all = r->stale;
    if (r->region_count > MAX_REGIONS && !pages_drop_all(r))
        return false;
    struct batch b = {.c = c, .r = r, .count = r->waiting};
    r->blocked = beyond_runners(c);
    if (all || r->some_stale) {
        for (unsigned i = 0; i < REGION_HASH; i++)
            for (struct region *region = r->regions[i]; region; region = region->next)
                if (all || region->stale)
                    check_region(&b, region);
    }
    r->stale = r->some_stale = false;
    if (unprotected(c, r))
        protect(&b);
    for (uint32_t i = 0; i < d->pending_count && d->pending_for == r; i++)
        map_around(&b, d->pending[i] & PAGE_MASK, d->pending[i] & 1);
    d->pending_count = 0;
    while (unprotected(c, r)) /* by what was mapped now, or by what others asked for while this waited for them */
        protect(&b);
    return end_batch(&b) && (!b.full || pages_drop_all(r));
}
