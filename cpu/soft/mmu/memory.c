/* Guest memory: slots, guest-physical accesses, and the slow path of every load and store.
 *
 * soft_phys() is the only function that turns a guest address into a host pointer; it checks the slot's bounds, and
 * what it returns is good to the end of that 4 KiB page.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "soft/system/system.h"

struct soft_slot *soft_find_slot(struct soft_vm *vm, uint64_t gpa)
{
    struct soft_slot *slot = &vm->slots[__atomic_load_n(&vm->last_slot, __ATOMIC_RELAXED)];
    if (gpa - slot->gpa < slot->size)
        return slot;
    for (uint32_t i = 0; i < vm->slot_count; i++) {
        slot = &vm->slots[i];
        if (gpa - slot->gpa < slot->size) {
            __atomic_store_n(&vm->last_slot, i, __ATOMIC_RELAXED);
            return slot;
        }
    }
    return NULL;
}

uint8_t *soft_phys(struct soft_vm *vm, uint64_t gpa, bool for_write, struct soft_slot **slot_out)
{
    struct soft_slot *slot = soft_find_slot(vm, gpa);
    if (!slot || (for_write && slot->readonly))
        return NULL;
    if (slot_out)
        *slot_out = slot;
    return slot->host + (gpa - slot->gpa);
}

void soft_written(struct soft_vm *vm, struct soft_vcpu *by, struct soft_slot *slot, uint64_t gpa, unsigned size)
{
    uint64_t first = (gpa - slot->gpa) >> 12;
    if (first >= slot->size >> 12)
        return;
    if (slot->log_dirty)
        soft_set_dirty(slot, first);
    if (SOFT_UNLIKELY(vm->host.written != NULL))
        vm->host.written(vm->host.ctx, gpa & PAGE_MASK);
    if (slot->executors)
        soft_shared_written(vm, by, slot, gpa, size);
    else if (slot->code_pages[first])
        soft_blocks_invalidate(vm->caches[0], gpa, size);
}

void soft_phys_write(struct soft_vm *vm, uint64_t gpa, const void *from, unsigned size)
{
    const uint8_t *bytes = from;
    while (size) {
        unsigned part = (unsigned)(PAGE_BYTES - (gpa & ~PAGE_MASK));
        if (part > size)
            part = size;
        struct soft_slot *slot;
        uint8_t *host = soft_phys(vm, gpa, true, &slot);
        if (host) {
            memcpy(host, bytes, part);
            soft_written(vm, NULL, slot, gpa, part);
        }
        gpa += part;
        bytes += part;
        size -= part;
    }
}

/* ---- guest-physical accesses of a vCPU ---- */

static uint64_t read_host(const uint8_t *host, unsigned size)
{
    uint64_t v = 0;
    switch (size) {
    case 1: return soft_load8(host);
    case 2: return soft_load16(host);
    case 4: return soft_load32(host);
    case 8: return soft_load64(host);
    default: memcpy(&v, host, size & 7); return v;
    }
}

static void write_host(uint8_t *host, unsigned size, uint64_t value)
{
    switch (size) {
    case 1: soft_store8(host, (uint8_t)value); break;
    case 2: soft_store16(host, (uint16_t)value); break;
    case 4: soft_store32(host, (uint32_t)value); break;
    case 8: soft_store64(host, value); break;
    default: memcpy(host, &value, size & 7); break;
    }
}

static uint64_t mask_of(unsigned size) { return size >= 8 ? ~0ull : (1ull << (size * 8)) - 1; }
static bool bus_size(unsigned size) { return size == 1 || size == 2 || size == 4 || size == 8; }

uint64_t soft_phys_load(struct soft_vcpu *c, uint64_t gpa, unsigned size)
{
    struct soft_vm *vm = c->vm;
    if (!bus_size(size)) {
        uint64_t v = 0;
        for (unsigned i = 0; i < size && i < 8; i++)
            v |= soft_phys_load(c, gpa + i, 1) << (i * 8);
        return v;
    }
    const uint8_t *host = soft_phys(vm, gpa, false, NULL);
    if (host && (gpa & ~PAGE_MASK) + size <= PAGE_BYTES)
        return read_host(host, size);
    uint64_t value;
    if (!vm->config.no_irqchip && irqchip_mmio_read(vm->irqchip, c->index, gpa, (uint8_t)size, &value, soft_now(vm))) {
        soft_irqchip_touched(c);
        return value & mask_of(size);
    }
    struct soft_access access = { .address = gpa, .size = (uint8_t)size, .vcpu = (uint8_t)c->index };
    return soft_host_access(c, &access) & mask_of(size);
}

void soft_phys_store(struct soft_vcpu *c, uint64_t gpa, unsigned size, uint64_t value)
{
    struct soft_vm *vm = c->vm;
    if (!bus_size(size)) {
        for (unsigned i = 0; i < size && i < 8; i++)
            soft_phys_store(c, gpa + i, 1, value >> (i * 8));
        return;
    }
    struct soft_slot *slot;
    uint8_t *host = soft_phys(vm, gpa, true, &slot);
    if (host && (gpa & ~PAGE_MASK) + size <= PAGE_BYTES) {
        write_host(host, size, value);
        soft_written(vm, c, slot, gpa, size);
        return;
    }
    value &= mask_of(size);
    if (!vm->config.no_irqchip && irqchip_mmio_write(vm->irqchip, c->index, gpa, (uint8_t)size, value, soft_now(vm))) {
        soft_irqchip_touched(c);
        return;
    }
    struct soft_access access = { .address = gpa, .value = value, .size = (uint8_t)size, .write = true, .vcpu = (uint8_t)c->index };
    soft_host_access(c, &access);
}

/* ---- linear accesses ---- */

/* Record which data breakpoints an access touches (SDM vol. 3, 18.2.5). */
static void watch(struct soft_vcpu *c, uint64_t linear, unsigned size, bool write)
{
    const uint64_t *dr = c->dr;
    for (unsigned i = 0; i < 4; i++) {
        unsigned control = (unsigned)(dr[7] >> (16 + i * 4)) & 15, type = control & 3;
        unsigned length = control >> 2 == 2 ? 8 : (control >> 2) + 1;
        if (!(dr[7] >> (i * 2) & 3) || !(type == 3 || (type == 1 && write)))
            continue;
        uint64_t start = dr[i] & ~(uint64_t)(length - 1);
        if (linear < start + length && start < linear + size)
            c->data_hits |= (uint8_t)(1u << i);
    }
    if (c->caller.count > c->caller.executes)
        soft_watch_caller(c, linear, size, write);
}

static uint64_t wrap(const struct soft_vcpu *c, uint64_t linear)
{
    return c->long_mode ? linear : (uint32_t)linear;
}

/* Where the parts of an access stand: both are translated (and may fault) before anything is read or written. */
struct parts {
    uint8_t *host[2];
    uint64_t gpa[2];
    unsigned size[2];
};

/* #AC (SDM vol. 3, table 6-7). An address that is not canonical comes first. */
static __attribute__((noinline, cold)) void unaligned(struct soft_vcpu *c, uint64_t linear, unsigned size)
{
    static const uint8_t masks[33] = { [2] = 1, [4] = 3, [8] = 7, [10] = 7, [14] = 1, [16] = 15, [28] = 3, [32] = 15 }; /* 32: AMD processors check halves */
    unsigned mask = size <= 32 ? masks[size] : size == 94 ? 1 : size == 108 ? 3 : 0;
    if ((linear & mask) && (!c->long_mode || soft_canonical(linear)))
        soft_raise_error(c, VEC_AC, 0);
}
static inline void check_alignment(struct soft_vcpu *c, uint64_t linear, unsigned size)
{
    if (SOFT_UNLIKELY(c->align_check))
        unaligned(c, linear, size);
}
void soft_check_alignment(struct soft_vcpu *c, uint64_t linear, unsigned size) { check_alignment(c, linear, size); }

static void translate(struct soft_vcpu *c, uint64_t linear, unsigned size, enum soft_kind kind, enum soft_view view,
                      struct parts *p)
{
    linear = wrap(c, linear);
    unsigned first = (unsigned)(PAGE_BYTES - (linear & ~PAGE_MASK));
    if (SOFT_UNLIKELY(c->mmu.watching) && kind != ACCESS_EXEC)
        watch(c, linear, size, kind == ACCESS_WRITE);
    p->size[0] = size <= first ? size : first;
    p->size[1] = size - p->size[0];
    p->host[1] = NULL;
    p->host[0] = soft_mmu_lookup_as(c, linear, kind, view, &p->gpa[0]);
    if (p->size[1]) {
        p->host[1] = soft_mmu_lookup_as(c, wrap(c, linear + first), kind, view, &p->gpa[1]);
        /* The second look-up may have found the first page to hold code, or replaced its entry; host stays valid. */
    }
}

/* The first part was an access that the caller answered, which may have read the dirty log or changed slots meanwhile:
 * look the second part up anew. */
static void second_part_again(struct soft_vcpu *c, uint64_t linear, enum soft_view view, struct parts *p)
{
    if (p->size[1] && p->host[1])
        p->host[1] = soft_mmu_lookup_as(c, wrap(c, linear + p->size[0]), ACCESS_WRITE, view, &p->gpa[1]);
}

uint64_t soft_load_as(struct soft_vcpu *c, uint64_t linear, unsigned size, enum soft_view view)
{
    struct parts p;
    const struct soft_tlb_entry *e = &c->tlbs[view].e[ACCESS_READ][(linear >> 12) & (TLB_SIZE - 1)];
    if (((linear + size - 1) & PAGE_MASK) == e->tag && !c->mmu.watching) /* no tag is outside what wrap() leaves */
        return read_host((const uint8_t *)(uintptr_t)(linear + e->addend), size);
    translate(c, linear, size, ACCESS_READ, view, &p);
    uint64_t value = p.host[0] ? read_host(p.host[0], p.size[0]) : soft_phys_load(c, p.gpa[0], p.size[0]);
    if (p.size[1]) {
        uint64_t high = p.host[1] ? read_host(p.host[1], p.size[1]) : soft_phys_load(c, p.gpa[1], p.size[1]);
        value |= high << (p.size[0] * 8);
    }
    return value;
}

void soft_store_as(struct soft_vcpu *c, uint64_t linear, unsigned size, uint64_t value, enum soft_view view)
{
    struct parts p;
    translate(c, linear, size, ACCESS_WRITE, view, &p);
    for (unsigned i = 0; i < 2 && p.size[i]; i++) {
        uint64_t part = i ? value >> (p.size[0] * 8) : value;
        if (p.host[i]) {
            write_host(p.host[i], p.size[i], part);
        } else {
            soft_phys_store(c, p.gpa[i], p.size[i], part);
            if (i == 0)
                second_part_again(c, linear, view, &p);
        }
    }
}

uint64_t soft_load_slow(struct soft_vcpu *c, uint64_t linear, unsigned size)
{
    check_alignment(c, linear, size);
    return soft_load_as(c, linear, size, (enum soft_view)c->view);
}

void soft_store_slow(struct soft_vcpu *c, uint64_t linear, unsigned size, uint64_t value)
{
    check_alignment(c, linear, size);
    soft_store_as(c, linear, size, value, (enum soft_view)c->view);
}

uint64_t soft_sys_load(struct soft_vcpu *c, uint64_t linear, unsigned size)
{
    linear = wrap(c, linear);
    const struct soft_tlb_entry *e = &c->tlbs[VIEW_SUPERVISOR].e[ACCESS_READ][(linear >> 12) & (TLB_SIZE - 1)];
    if (e->tag == (linear & PAGE_MASK) && (linear & ~PAGE_MASK) + size <= PAGE_BYTES)
        return read_host((const uint8_t *)(uintptr_t)(linear + e->addend), size);
    return soft_load_as(c, linear, size, VIEW_SUPERVISOR);
}

void soft_sys_store(struct soft_vcpu *c, uint64_t linear, unsigned size, uint64_t value)
{
    soft_store_as(c, linear, size, value, VIEW_SUPERVISOR);
}

static void load_part(struct soft_vcpu *c, uint64_t gpa, const uint8_t *host, uint8_t *to, unsigned size)
{
    if (host) {
        memcpy(to, host, size);
        return;
    }
    while (size) {
        unsigned n = size >= 8 && !(gpa & 7) ? 8 : size >= 4 && !(gpa & 3) ? 4 : 1;
        uint64_t v = soft_phys_load(c, gpa, n);
        memcpy(to, &v, n);
        gpa += n;
        to += n;
        size -= n;
    }
}

static void store_part(struct soft_vcpu *c, uint64_t gpa, uint8_t *host, const uint8_t *from, unsigned size)
{
    if (host) {
        memcpy(host, from, size);
        return;
    }
    while (size) {
        unsigned n = size >= 8 && !(gpa & 7) ? 8 : size >= 4 && !(gpa & 3) ? 4 : 1;
        uint64_t v = 0;
        memcpy(&v, from, n);
        soft_phys_store(c, gpa, n, v);
        gpa += n;
        from += n;
        size -= n;
    }
}

void soft_load_bytes(struct soft_vcpu *c, uint64_t linear, void *to, unsigned size)
{
    struct parts p;
    if (!size || size > PAGE_BYTES)
        return;
    check_alignment(c, linear, size);
    translate(c, linear, size, ACCESS_READ, (enum soft_view)c->view, &p);
    load_part(c, p.gpa[0], p.host[0], to, p.size[0]);
    if (p.size[1])
        load_part(c, p.gpa[1], p.host[1], (uint8_t *)to + p.size[0], p.size[1]);
}

void soft_store_bytes(struct soft_vcpu *c, uint64_t linear, const void *from, unsigned size)
{
    struct parts p;
    if (!size || size > PAGE_BYTES)
        return;
    check_alignment(c, linear, size);
    translate(c, linear, size, ACCESS_WRITE, (enum soft_view)c->view, &p);
    store_part(c, p.gpa[0], p.host[0], from, p.size[0]);
    if (!p.host[0])
        second_part_again(c, linear, (enum soft_view)c->view, &p);
    if (p.size[1])
        store_part(c, p.gpa[1], p.host[1], (const uint8_t *)from + p.size[0], p.size[1]);
}

void soft_probe_write(struct soft_vcpu *c, uint64_t linear, unsigned size)
{
    struct parts p;
    check_alignment(c, linear, size);
    if (size && size <= PAGE_BYTES)
        translate(c, linear, size, ACCESS_WRITE, (enum soft_view)c->view, &p);
}

bool soft_lock(struct soft_vcpu *c, uint64_t linear, unsigned size, struct soft_locked *l)
{
    struct parts p;
    check_alignment(c, linear, size);
    translate(c, linear, size, ACCESS_WRITE, (enum soft_view)c->view, &p);
    *l = (struct soft_locked){ .host = p.host[0], .gpa = p.gpa[0], .size = size };
    if (soft_one_line(linear, size)) {
        if (l->host)
            return true;
        l->host = c->mmu.watching ? NULL : soft_phys(c->vm, l->gpa, true, &l->slot);
        if (l->host)
            return true;
    }
    l->host = NULL;
    for (unsigned i = 0; i < 2 && p.size[i]; i++)
        if (!p.host[i] && !soft_phys(c->vm, p.gpa[i], true, NULL))
            return false;
    soft_alone_begin(c);
    return false;
}

void soft_unlock(struct soft_vcpu *c, const struct soft_locked *l)
{
    if (l->slot)
        soft_written(c->vm, c, l->slot, l->gpa, l->size);
    if (!l->host)
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    soft_alone_end(c);
}

/* ---- data breakpoints ---- */

void soft_watch_changed(struct soft_vcpu *c)
{
    memset(c->mmu.watched, 0, sizeof c->mmu.watched);
    bool watching = c->caller.count > c->caller.executes;
    for (unsigned i = 0; i < 4; i++) {
        if (!(c->dr[7] >> (i * 2) & 3) || !(c->dr[7] >> (16 + i * 4) & 1))
            continue;
        watching = true;
        c->mmu.watched[i] = (c->dr[i] & PAGE_MASK) | 1;
    }
    if (watching || c->mmu.watching)
        soft_tlb_flush(c, true);
    c->mmu.watching = watching;
}

/* ---- slots ---- */

static int set_log(struct soft_vm *vm, struct soft_slot *slot, bool log_dirty)
{
    if (log_dirty == slot->log_dirty)
        return 0;
    uint8_t *dirty = log_dirty ? calloc((slot->size >> 15) + 1, 1) : NULL;
    if (log_dirty && !dirty)
        return -ENOMEM;
    free(slot->dirty);
    slot->dirty = dirty;
    slot->log_dirty = log_dirty;
    soft_tlb_flush_writes(vm);
    return 0;
}

/* `size` bytes for each page of a slot. A mapping of its own, so that what is never touched of it takes no memory. */
static void *make_map(const struct soft_slot *slot, size_t size)
{
    void *made = mmap(NULL, (slot->size >> 12) * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return made == MAP_FAILED ? NULL : made;
}
static void free_map(const struct soft_slot *slot, void *map, size_t size)
{
    if (map)
        munmap(map, (slot->size >> 12) * size);
}
static void free_maps(struct soft_slot *slot)
{
    free_map(slot, slot->code_pages, sizeof *slot->code_pages);
    free_map(slot, slot->granules, sizeof *slot->granules);
    free_map(slot, slot->writers, sizeof *slot->writers);
    free_map(slot, slot->executors, sizeof *slot->executors);
    free(slot->dirty);
}
/* Who may write to each page, and whose runners execute it: false if there is no memory for it. */
static bool make_users(struct soft_slot *slot)
{
    slot->writers = make_map(slot, sizeof *slot->writers);
    slot->executors = make_map(slot, sizeof *slot->executors);
    return slot->writers && slot->executors;
}

int soft_slots_know_users(struct soft_vm *vm)
{
    for (uint32_t i = 0; i < vm->slot_count; i++) {
        struct soft_slot *slot = &vm->slots[i], fresh = *slot;
        if (!slot->size || slot->executors)
            continue;
        if (!make_users(&fresh)) {
            free_map(&fresh, fresh.writers, sizeof *fresh.writers);
            free_map(&fresh, fresh.executors, sizeof *fresh.executors);
            return -ENOMEM;
        }
        *slot = fresh;
    }
    soft_tlb_flush_writes(vm); /* the next write to each page is noted */
    return 0;
}

void soft_slots_free(struct soft_vm *vm)
{
    for (uint32_t i = 0; i < SOFT_MAX_SLOTS; i++)
        free_maps(&vm->slots[i]);
}

int soft_vm_set_slot(struct soft_vm *vm, uint32_t index, uint64_t gpa, uint64_t size, void *host, bool readonly,
                     bool log_dirty)
{
    if (index >= SOFT_MAX_SLOTS || ((gpa | size) & ~PAGE_MASK) || size > 1ull << PHYS_BITS
        || gpa > (1ull << PHYS_BITS) - size || (size && (!host || ((uintptr_t)host & ~PAGE_MASK))))
        return -EINVAL;
    struct soft_slot *slot = &vm->slots[index], fresh = { 0 };
    if (size && slot->size == size && slot->gpa == gpa && slot->host == host && slot->readonly == readonly)
        return set_log(vm, slot, log_dirty);
    for (uint32_t i = 0; size && i < SOFT_MAX_SLOTS; i++) {
        const struct soft_slot *other = &vm->slots[i];
        if (i != index && other->size && gpa < other->gpa + other->size && other->gpa < gpa + size)
            return -EEXIST;
    }
    if (size) {
        fresh = (struct soft_slot){ .gpa = gpa, .size = size, .host = host, .readonly = readonly, .log_dirty = log_dirty };
        fresh.code_pages = make_map(&fresh, sizeof *fresh.code_pages);
        fresh.dirty = log_dirty ? calloc((size >> 15) + 1, 1) : NULL;
        fresh.granules = vm->parallel ? make_map(&fresh, sizeof *fresh.granules) : NULL;
        bool users = !(vm->parallel || vm->direct) || make_users(&fresh);
        if (!fresh.code_pages || (log_dirty && !fresh.dirty) || (vm->parallel && !fresh.granules) || !users) {
            free_maps(&fresh);
            return -ENOMEM;
        }
    }
    soft_blocks_flush_all(vm);
    soft_events_lock(vm);
    struct soft_slot old = *slot;
    *slot = fresh;
    vm->slot_count = 0;
    for (uint32_t i = 0; i < SOFT_MAX_SLOTS; i++)
        if (vm->slots[i].size)
            vm->slot_count = i + 1;
    vm->last_slot = 0;
    soft_events_unlock(vm);
    free_maps(&old);
    soft_tlb_flush_all_vcpus(vm);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        if (vm->vcpus[i]->direct)
            soft_direct_code_written(vm->vcpus[i], PAGE_ALL); /* no page has an executor's mark any more */
    return 0;
}

int soft_vm_dirty_log(struct soft_vm *vm, uint32_t index, uint8_t *bitmap, size_t bitmap_size)
{
    if (index >= SOFT_MAX_SLOTS || !vm->slots[index].dirty)
        return -EINVAL;
    struct soft_slot *slot = &vm->slots[index];
    size_t bytes = ((slot->size >> 12) + 7) / 8;
    if (bitmap_size < bytes)
        return -EINVAL;
    memcpy(bitmap, slot->dirty, bytes);
    memset(slot->dirty, 0, bytes);
    soft_tlb_flush_writes(vm); /* the next write to each page must be seen */
    return 0;
}
