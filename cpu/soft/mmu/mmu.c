/* Page walks and the software TLBs. Intel SDM vol. 3 chapter 4; AMD64 APM vol. 2 chapter 5.
 *
 * Knows guest-physical memory only through soft_phys(), which alone makes host pointers.
 */
#include <errno.h>

#include "soft/system/system.h"

enum { PTE_P = 1, PTE_W = 2, PTE_U = 4, PTE_A = 0x20, PTE_D = 0x40, PTE_PS = 0x80, PTE_G = 0x100 };
#define PTE_NX (1ull << 63)
#define PTE_ADDRESS (PHYS_MASK & PAGE_MASK)

struct page {
    uint64_t gpa; /* of the 4 KiB page that holds the address */
    unsigned shift; /* 12, 21, 22, 30 or UNPAGED */
    bool global, dirty, quiet;
};

struct step {
    uint8_t *host; /* NULL: the table is not in writable RAM, its entries get no A and D bits */
    struct soft_slot *slot;
    uint64_t gpa, entry;
};

static uint64_t load_entry(struct soft_vcpu *c, uint64_t gpa, unsigned size, struct step *step)
{
    step->gpa = gpa;
    step->host = soft_phys(c->vm, gpa, false, &step->slot);
    if (!step->host)
        return step->entry = ~0ull; /* an unclaimed read; reserved bits make it fault */
    /* Whole, since another vCPU may change it. */
    step->entry = size == 8 ? __atomic_load_n((const uint64_t *)(const void *)step->host, __ATOMIC_RELAXED)
                            : __atomic_load_n((const uint32_t *)(const void *)step->host, __ATOMIC_RELAXED);
    return step->entry;
}

/* Set A (and D) in an entry; false if it changed meanwhile and the walk must start again. */
static bool mark(struct soft_vcpu *c, struct step *step, unsigned size, uint64_t bits)
{
    if ((step->entry & bits) == bits || step->slot->readonly)
        return true;
    if (size == 8) {
        uint64_t expected = step->entry;
        if (!__atomic_compare_exchange_n((uint64_t *)(void *)step->host, &expected, expected | bits, false, __ATOMIC_SEQ_CST,
                                         __ATOMIC_RELAXED))
            return false;
    } else {
        uint32_t expected = (uint32_t)step->entry;
        if (!__atomic_compare_exchange_n((uint32_t *)(void *)step->host, &expected, expected | (uint32_t)bits, false,
                                         __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return false;
    }
    soft_written(c->vm, c, step->slot, step->gpa, size);
    return true;
}

/* Walk the tables for one access. false: *error is the #PF error code. out->quiet: no entry gets A or D. */
static bool walk(struct soft_vcpu *c, uint64_t linear, enum soft_kind kind, enum soft_view view, struct page *out,
                 uint32_t *error)
{
    const bool pae = (c->cr4 & CR4_PAE) != 0;
    const bool nxe = pae && (c->efer & EFER_NXE);
    const unsigned bits = pae ? 9 : 10, size = pae ? 8 : 4;
    const uint32_t code = (kind == ACCESS_WRITE ? PF_W : 0) | (view == VIEW_USER ? PF_U : 0)
                          | (kind == ACCESS_EXEC && (nxe || (c->cr4 & CR4_SMEP)) ? PF_I : 0);
    uint64_t reserved = 0;
    if (pae)
        reserved = (0x000FFFFFFFFFFFFFull & ~c->phys_mask) | (nxe ? 0 : PTE_NX) | (c->long_mode ? 0 : 0x7FF0000000000000ull);

again:;
    struct step path[4];
    unsigned depth = 0, level = 2;
    bool user = true, writable = true, nx = false;
    uint64_t table;
    if (c->long_mode) {
        table = c->cr3 & PTE_ADDRESS;
        level = 4;
    } else if (pae) {
        table = c->mmu.pdpte[(linear >> 30) & 3];
        if (!(table & PTE_P)) {
            *error = code;
            return false;
        }
        table &= PTE_ADDRESS;
    } else {
        table = c->cr3 & 0xFFFFF000u;
    }
    uint64_t entry;
    unsigned shift;
    for (;; level--) {
        shift = 12 + (level - 1) * bits;
        entry = load_entry(c, table + ((linear >> shift) & ((1u << bits) - 1)) * size, size, &path[depth++]);
        if (!(entry & PTE_P)) {
            *error = code;
            return false;
        }
        bool leaf = level == 1;
        uint64_t bad = entry & reserved;
        if (level == 4) {
            bad |= entry & PTE_PS;
        } else if (level > 1 && (entry & PTE_PS) && (pae || (c->cr4 & CR4_PSE))) {
            leaf = true;
            bad |= pae ? entry & ((1ull << shift) - 1) & ~0x1FFFull : entry & (1u << 21);
        }
        user &= (entry & PTE_U) != 0;
        writable &= (entry & PTE_W) != 0;
        nx |= nxe && (entry & PTE_NX);
        if (bad || !path[depth - 1].host) {
            *error = code | PF_P | PF_RSVD;
            return false;
        }
        if (leaf)
            break;
        table = pae ? entry & PTE_ADDRESS : entry & 0xFFFFF000u;
    }

    bool allowed = !(kind == ACCESS_EXEC && nx);
    if (view == VIEW_USER) {
        allowed &= user && (kind != ACCESS_WRITE || writable);
    } else {
        if (user && kind == ACCESS_EXEC)
            allowed &= !(c->cr4 & CR4_SMEP);
        else if (user)
            allowed &= !(c->cr4 & CR4_SMAP) || view == VIEW_SUPERVISOR_AC;
        if (kind == ACCESS_WRITE && !writable)
            allowed &= !(c->cr0 & CR0_WP);
    }
    if (!allowed) {
        *error = code | PF_P;
        return false;
    }
    for (unsigned i = 0; i < depth && !out->quiet; i++) {
        uint64_t want = PTE_A | (i == depth - 1 && kind == ACCESS_WRITE ? PTE_D : 0);
        if (!mark(c, &path[i], size, want))
            goto again;
    }
    uint64_t base;
    if (shift == 22)
        base = (entry & 0xFFC00000u) | ((entry >> 13) & 0xFF) << 32;
    else
        base = entry & PTE_ADDRESS & ~((1ull << shift) - 1);
    out->gpa = base | (linear & ((1ull << shift) - 1) & PAGE_MASK);
    out->shift = shift;
    out->global = (entry & PTE_G) && (c->cr4 & CR4_PGE);
    out->dirty = kind == ACCESS_WRITE || (entry & PTE_D);
    return true;
}

/* ---- TLBs ---- */

static inline unsigned tlb_index(uint64_t linear) { return (linear >> 12) & (TLB_SIZE - 1); }
static inline void bit_set(uint64_t *map, unsigned words, uint64_t n) { map[(n / 64) % words] |= 1ull << (n % 64); }
static inline bool bit_test(const uint64_t *map, unsigned words, uint64_t n) { return map[(n / 64) % words] >> (n % 64) & 1; }

static struct soft_tlb_entry *entry_at(struct soft_vcpu *c, unsigned flat)
{
    unsigned view = flat / (ACCESS_KINDS * TLB_SIZE), rest = flat % (ACCESS_KINDS * TLB_SIZE);
    return &c->tlbs[view % VIEW_COUNT].e[rest / TLB_SIZE][rest % TLB_SIZE];
}

static void install(struct soft_vcpu *c, enum soft_view view, enum soft_kind kind, uint64_t linear, const uint8_t *host,
                    bool global)
{
    unsigned index = tlb_index(linear), flat = (view * ACCESS_KINDS + kind) * TLB_SIZE + index;
    struct soft_tlb_entry *e = &c->tlbs[view].e[kind][index];
    if (e->tag != 1 && e->tag != (linear & PAGE_MASK)) {
        struct soft_victim *v = &c->mmu.victims[view][kind][c->mmu.next_victim++ % TLB_VICTIMS];
        v->entry = *e;
        v->global = bit_test(c->mmu.listed[1], TLB_ENTRIES / 64, flat) && !bit_test(c->mmu.listed[0], TLB_ENTRIES / 64, flat);
        c->mmu.have_victims = true;
    }
    e->tag = linear & PAGE_MASK;
    e->addend = (uint64_t)(uintptr_t)host - e->tag;
    if (bit_test(c->mmu.listed[global], TLB_ENTRIES / 64, flat))
        return;
    bit_set(c->mmu.listed[global], TLB_ENTRIES / 64, flat);
    uint32_t *used = &c->mmu.used[global];
    if (*used < TLB_LIST)
        c->mmu.list[global][*used] = (uint16_t)flat;
    if (*used <= TLB_LIST)
        ++*used;
}

bool soft_tlb_executes_global(struct soft_vcpu *c, uint64_t linear)
{
    unsigned index = tlb_index(linear), flat = (c->view * ACCESS_KINDS + ACCESS_EXEC) * TLB_SIZE + index;
    return c->tlbs[c->view].e[ACCESS_EXEC][index].tag == (linear & PAGE_MASK) &&
           bit_test(c->mmu.listed[1], TLB_ENTRIES / 64, flat) && !bit_test(c->mmu.listed[0], TLB_ENTRIES / 64, flat);
}

/* The page may be among what was last replaced: put it back. */
static uint8_t *restore_victim(struct soft_vcpu *c, enum soft_view view, enum soft_kind kind, uint64_t linear)
{
    for (unsigned i = 0; i < TLB_VICTIMS; i++) {
        struct soft_victim *v = &c->mmu.victims[view][kind][i];
        if (v->entry.tag != (linear & PAGE_MASK))
            continue;
        struct soft_victim found = *v;
        v->entry.tag = 1;
        uint8_t *page = (uint8_t *)(uintptr_t)(found.entry.tag + found.entry.addend);
        install(c, view, kind, linear, page, found.global);
        return page + (linear & ~PAGE_MASK);
    }
    return NULL;
}

static void clear_victims(struct soft_vcpu *c)
{
    if (!c->mmu.have_victims)
        return;
    for (unsigned i = 0; i < VIEW_COUNT * ACCESS_KINDS * TLB_VICTIMS; i++)
        c->mmu.victims[i / (ACCESS_KINDS * TLB_VICTIMS)][i / TLB_VICTIMS % ACCESS_KINDS][i % TLB_VICTIMS].entry.tag = 1;
    c->mmu.have_victims = false;
}

static void clear_all(struct soft_vcpu *c)
{
    for (unsigned view = 0; view < VIEW_COUNT; view++)
        for (unsigned kind = 0; kind < ACCESS_KINDS; kind++)
            for (unsigned i = 0; i < TLB_SIZE; i++)
                c->tlbs[view].e[kind][i].tag = 1;
    memset(c->mmu.used, 0, sizeof c->mmu.used);
    memset(c->mmu.listed, 0, sizeof c->mmu.listed);
    memset(c->mmu.large4m, 0, sizeof c->mmu.large4m);
    memset(c->mmu.large1g, 0, sizeof c->mmu.large1g);
}

static bool clear_list(struct soft_vcpu *c, unsigned global)
{
    if (c->mmu.used[global] > TLB_LIST)
        return false;
    for (unsigned i = 0; i < c->mmu.used[global]; i++) {
        unsigned flat = c->mmu.list[global][i];
        entry_at(c, flat)->tag = 1;
        c->mmu.listed[global][flat / 64 % (TLB_ENTRIES / 64)] &= ~(1ull << (flat % 64));
    }
    c->mmu.used[global] = 0;
    return true;
}

static void flush(struct soft_vcpu *c, bool global_too)
{
    c->stats.tlb_flushes++;
    clear_victims(c);
    if (!clear_list(c, 0) || (global_too && !clear_list(c, 1)))
        clear_all(c);
    soft_jump_cache_flush(c, global_too);
}

void soft_tlb_flush(struct soft_vcpu *c, bool global_too)
{
    flush(c, global_too);
    if (c->direct)
        soft_direct_flushed(c);
}

void soft_tlb_switch(struct soft_vcpu *c, bool keep)
{
    flush(c, false);
    if (c->direct)
        soft_direct_switched(c, keep);
}

void soft_tlb_flush_page(struct soft_vcpu *c, uint64_t linear)
{
    uint64_t page = linear & PAGE_MASK;
    unsigned shift = 0;
    clear_victims(c);
    if (c->direct)
        soft_direct_flushed_page(c, linear);
    if (bit_test(c->mmu.large1g, 4, linear >> 30))
        shift = 30;
    else if (bit_test(c->mmu.large4m, 16, linear >> 22))
        shift = 22;
    if (!shift) {
        unsigned index = tlb_index(linear);
        for (unsigned view = 0; view < VIEW_COUNT; view++)
            for (unsigned kind = 0; kind < ACCESS_KINDS; kind++)
                if (c->tlbs[view].e[kind][index].tag == page)
                    c->tlbs[view].e[kind][index].tag = 1;
        soft_jump_cache_flush_page(c, linear);
        return;
    }
    for (unsigned global = 0; global < 2; global++) {
        if (c->mmu.used[global] > TLB_LIST) {
            clear_all(c);
            break;
        }
        for (unsigned i = 0; i < c->mmu.used[global]; i++) {
            struct soft_tlb_entry *e = entry_at(c, c->mmu.list[global][i]);
            if (e->tag >> shift == linear >> shift)
                e->tag = 1;
        }
    }
    soft_jump_cache_flush(c, true);
}

void soft_tlb_flush_all_vcpus(struct soft_vm *vm)
{
    for (unsigned i = 0; i < vm->config.vcpus; i++)
        soft_tlb_flush(vm->vcpus[i], true);
}

void soft_tlb_flush_writes(struct soft_vm *vm)
{
    for (unsigned index = 0; index < vm->config.vcpus; index++)
        soft_tlb_protect(vm->vcpus[index], NULL);
}

void soft_tlb_protect(struct soft_vcpu *c, const uint8_t *host)
{
    if (c->direct)
        soft_direct_protect(c, host);
    clear_victims(c);
    for (unsigned view = 0; view < VIEW_COUNT; view++) {
        struct soft_tlb_entry *e = c->tlbs[view].e[ACCESS_WRITE];
        for (unsigned i = 0; i < TLB_SIZE; i++)
            if (!host || (e[i].tag != 1 && e[i].tag + e[i].addend == (uint64_t)(uintptr_t)host))
                e[i].tag = 1;
    }
}

void soft_tlb_protect_page(struct soft_vm *vm, uint64_t gpa)
{
    struct soft_slot *slot;
    const uint8_t *host = soft_phys(vm, gpa & PAGE_MASK, false, &slot);
    if (!host)
        return;
    for (unsigned n = 0; n < vm->config.vcpus; n++)
        soft_tlb_protect(vm->vcpus[n], host);
}

/* ---- translation ---- */

/* Without paging the whole address space is one page. */
enum { UNPAGED = 32 };

/* Before the n-th page of a slot is written directly: false if it holds code that was translated or looked at, so that every write
 * must be seen. */
static inline bool may_write(struct soft_vcpu *c, struct soft_slot *slot, uint64_t n)
{
    struct soft_vm *vm = c->vm;
    if (SOFT_UNLIKELY(vm->host.written != NULL))
        vm->host.written(vm->host.ctx, slot->gpa + (n << 12));
    if (slot->log_dirty)
        soft_set_dirty(slot, n);
    if (slot->writers)
        return soft_shared_may_write(c, slot, n);
    return !slot->code_pages[n];
}

static bool page_watched(const struct soft_vcpu *c, uint64_t linear)
{
    for (unsigned i = 0; i < 4; i++)
        if (c->mmu.watched[i] == ((linear & PAGE_MASK) | 1))
            return true;
    return soft_page_watched(c, linear & PAGE_MASK);
}

/* Walk and install the entry. As soft_mmu_lookup(); the caller has *page in any case, *slot unless NULL is returned. */
static inline uint8_t *fill(struct soft_vcpu *c, uint64_t linear, enum soft_kind kind, enum soft_view view, struct page *page,
                            struct soft_slot **slot)
{
    if (c->long_mode ? !soft_canonical(linear) : linear >> 32 != 0)
        soft_raise_error(c, c->access_ss ? VEC_SS : VEC_GP, 0);

    *page = (struct page){ .gpa = linear & PAGE_MASK, .shift = UNPAGED, .global = false, .dirty = true };
    if (c->cr0 & CR0_PG) {
        uint32_t error;
        if (!walk(c, linear, kind, view, page, &error))
            soft_raise_pf(c, linear, error);
    }
    c->stats.tlb_fills++;
    uint8_t *host = soft_phys(c->vm, page->gpa, kind == ACCESS_WRITE, slot);
    if (!host)
        return NULL;
    if (kind != ACCESS_EXEC && c->mmu.watching && page_watched(c, linear))
        return NULL;
    if (kind == ACCESS_WRITE && !may_write(c, *slot, (page->gpa - (*slot)->gpa) >> 12))
        return NULL;
    if (page->shift > 12 && page->shift != UNPAGED) {
        if (page->shift == 30)
            bit_set(c->mmu.large1g, 4, linear >> 30);
        else
            bit_set(c->mmu.large4m, 16, linear >> 22);
    }
    install(c, view, kind, linear, host, page->global);
    return host + (linear & ~PAGE_MASK);
}

uint8_t *soft_mmu_lookup_as(struct soft_vcpu *c, uint64_t linear, enum soft_kind kind, enum soft_view view, uint64_t *gpa)
{
    struct soft_tlb_entry *e = &c->tlbs[view].e[kind][tlb_index(linear)];
    if (e->tag == (linear & PAGE_MASK))
        return (uint8_t *)(uintptr_t)(linear + e->addend);
    if (c->mmu.have_victims) {
        uint8_t *found = restore_victim(c, view, kind, linear);
        if (found)
            return found;
    }
    struct page page;
    struct soft_slot *slot;
    uint8_t *host = fill(c, linear, kind, view, &page, &slot);
    *gpa = page.gpa | (linear & ~PAGE_MASK);
    return host;
}

int soft_vcpu_translate(struct soft_vm *vm, uint32_t vcpu, uint64_t linear, uint64_t *gpa)
{
    struct soft_vcpu *c = vcpu < vm->config.vcpus ? vm->vcpus[vcpu] : NULL;
    if (!c || (c->long_mode ? !soft_canonical(linear) : linear >> 32 != 0))
        return -EFAULT;
    struct page page = { .gpa = linear & PAGE_MASK, .quiet = true };
    uint32_t error;
    /* VIEW_SUPERVISOR_AC may read whatever is mapped. */
    if ((c->cr0 & CR0_PG) && !walk(c, linear, ACCESS_READ, VIEW_SUPERVISOR_AC, &page, &error))
        return -EFAULT;
    *gpa = page.gpa | (linear & ~PAGE_MASK);
    return 0;
}

uint8_t *soft_mmu_lookup(struct soft_vcpu *c, uint64_t linear, enum soft_kind kind, uint64_t *gpa)
{
    return soft_mmu_lookup_as(c, linear, kind, (enum soft_view)c->view, gpa);
}

uint64_t soft_mmu_run(struct soft_vcpu *c, uint64_t linear, uint64_t size, enum soft_kind kind, uint8_t **host)
{
    uint64_t first = PAGE_BYTES - (linear & ~PAGE_MASK);
    const struct soft_tlb_entry *e = &c->tlbs[c->view].e[kind][tlb_index(linear)];
    bool large = !(c->cr0 & CR0_PG) || bit_test(c->mmu.large1g, 4, linear >> 30) || bit_test(c->mmu.large4m, 16, linear >> 22);
    if (e->tag == (linear & PAGE_MASK) && (!large || c->mmu.watching)) {
        *host = (uint8_t *)(uintptr_t)(linear + e->addend);
        return size < first ? size : first;
    }
    struct page page;
    struct soft_slot *slot;
    *host = fill(c, linear, kind, (enum soft_view)c->view, &page, &slot);
    if (!*host)
        return 0;
    if (size <= first || c->mmu.watching)
        return size < first ? size : first;
    /* Rights, A and D are the whole page's, and the slot is one piece of the host's memory. */
    uint64_t in_page = (linear | ((1ull << page.shift) - 1)) - linear + 1;
    uint64_t in_slot = slot->gpa + slot->size - page.gpa - (linear & ~PAGE_MASK);
    size = size < in_page ? size : in_page;
    size = size < in_slot ? size : in_slot;
    if (kind != ACCESS_WRITE)
        return size;
    uint64_t run = first, n = (page.gpa - slot->gpa) >> 12;
    while (run < size && may_write(c, slot, ++n))
        run += PAGE_BYTES;
    return run < size ? run : size;
}

/* SDM 4.4.1: bits 1, 2, 5 to 8 and those above the physical width are reserved in a present entry. */
static bool pdpte_valid(const struct soft_vcpu *c, uint64_t entry)
{
    return !(entry & PTE_P) || !(entry & (0x1E6ull | ~c->phys_mask));
}

void soft_set_pdptes(struct soft_vcpu *c, const uint64_t *entries)
{
    for (unsigned i = 0; i < 4; i++)
        c->mmu.pdpte[i] = pdpte_valid(c, entries[i]) ? entries[i] : 0;
    soft_tlb_flush(c, true);
}

bool soft_load_pdptes(struct soft_vcpu *c, uint64_t cr3, bool restoring)
{
    uint64_t entries[4];
    for (unsigned i = 0; i < 4; i++) {
        struct step step;
        entries[i] = load_entry(c, (cr3 & 0xFFFFFFE0u) + i * 8, 8, &step);
        if (!pdpte_valid(c, entries[i])) {
            if (!restoring)
                return false;
            entries[i] = 0; /* memory changed since the processor read it */
        }
    }
    memcpy(c->mmu.pdpte, entries, sizeof entries);
    return true;
}

/* Always empty, and of all VMs. */
static const struct soft_tlb no_tlb = {.e = {[0 ... ACCESS_KINDS - 1] = {[0 ... TLB_SIZE - 1] = {.tag = 1}}}};

void soft_mode_changed(struct soft_vcpu *c)
{
    c->long_mode = (c->efer & EFER_LMA) != 0;
    c->code64 = c->long_mode && SEG_L(&c->seg[SEG_CS]);
    if (c->cpl == 3)
        c->view = VIEW_USER;
    else
        c->view = (c->cr4 & CR4_SMAP) && (c->rflags & F_AC) ? VIEW_SUPERVISOR_AC : VIEW_SUPERVISOR;
    c->align_check = c->cpl == 3 && (c->cr0 & CR0_AM) && (c->rflags & F_AC);
    c->tlb = c->align_check ? &no_tlb : &c->tlbs[c->view];
    if (c->direct)
        soft_direct_mode(c);
}
