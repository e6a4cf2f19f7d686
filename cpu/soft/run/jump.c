/* Jump caches: linear addresses of translated code, for each vCPU. */
#include <sys/mman.h>

#include "soft/mmu/access.h"
#include "soft/jit/translate.h"

/* What an empty entry of a jump cache leads to: rip is the address looked for. */
static HANDLER(jump_miss)
{
    c->rip = rip;
    return block_enter(c, u, rip);
}
struct empty_entry empty_entry = {host_flags_enter, {.fn = jump_miss}};
_Static_assert(offsetof(struct empty_entry, code) == (size_t)-BLOCK_WORD_FN, "host code finds word_fn from the address of code");

static void jump_clear(struct soft_jump *e)
{
    e->linear = 0x80A5A5A5A5A5A5A5; /* not canonical; whoever jumps there anyway comes to jump_miss */
    e->code = &empty_jump;
}

/* Clear what one of the lists names: the entries of 64-bit supervisor code, or all others. */
static void clear_jumps(struct soft_jumps *j, bool supervisor)
{
    struct soft_jump *entries = &j->table[0][0];
    unsigned from = supervisor ? 0 : JUMP_SIZE, to = supervisor ? JUMP_SIZE : JUMP_TABLES * JUMP_SIZE;
    if (j->used[supervisor] > JUMP_SIZE) {
        for (unsigned i = from; i < to; i++)
            jump_clear(&entries[i]);
    } else {
        for (unsigned i = 0; i < j->used[supervisor]; i++)
            jump_clear(&entries[j->list[supervisor][i]]);
    }
    j->used[supervisor] = 0;
    memset(j->pages[supervisor], 0, sizeof j->pages[supervisor]);
}

void soft_jump_cache_flush(struct soft_vcpu *c, bool global_too)
{
    struct soft_jumps *j = &c->jump;
    if (!c->jumps) {
        /* All zeroes, which only address 0 could be taken for: its entries are the first ones. */
        for (unsigned i = 0; i < JUMP_TABLES; i++)
            jump_clear(&j->table[i][0]);
        c->jumps = j->table[0];
        return;
    }
    clear_jumps(j, false);
    if (global_too || j->local) {
        clear_jumps(j, true);
        j->local = false;
    }
}

void soft_jump_cache_drop(struct soft_vcpu *c)
{
    struct soft_jumps *j = &c->jump;
    uintptr_t from = ((uintptr_t)j->table + 4095) & ~(uintptr_t)4095, to = (uintptr_t)(&j->table + 1) & ~(uintptr_t)4095;
    soft_jump_cache_flush(c, true);
    /* The whole pages become zeroes, as all of it is at first; in the parts of pages at both ends empty entries stay. */
    madvise((void *)from, to - from, MADV_DONTNEED);
    c->jumps = NULL;
}

static unsigned jump_page_bit(uint64_t linear) { return (unsigned)((linear >> 12) ^ (linear >> 24)) & 4095; }

static bool page_has_jumps(const struct soft_jumps *j, uint64_t linear)
{
    unsigned bit = jump_page_bit(linear);
    return (j->pages[0][bit >> 6] | j->pages[1][bit >> 6]) >> (bit & 63) & 1;
}

void soft_jump_cache_flush_page(struct soft_vcpu *c, uint64_t linear)
{
    /* An instruction that crosses into the page is found under the page before. */
    if (page_has_jumps(&c->jump, linear) || page_has_jumps(&c->jump, linear - 4096))
        soft_jump_cache_flush(c, true);
}

void soft_jump_insert(struct soft_vcpu *c, uint64_t linear, struct uop *code, bool crosses)
{
    struct soft_jumps *j = &c->jump;
    struct soft_jump *e = &c->jumps[jump_hash(linear)];
    bool supervisor = c->jumps == j->table[0];
    if (supervisor && !(soft_tlb_executes_global(c, linear) && (!crosses || soft_tlb_executes_global(c, linear + 4096))))
        j->local = true;
    if (!e->code || e->code == &empty_jump) {
        if (j->used[supervisor] < JUMP_SIZE)
            j->list[supervisor][j->used[supervisor]] = (uint16_t)(e - &j->table[0][0]);
        if (j->used[supervisor] <= JUMP_SIZE)
            j->used[supervisor]++;
    }
    e->linear = linear;
    e->code = code;
    unsigned bit = jump_page_bit(linear);
    j->pages[supervisor][bit >> 6] |= 1ull << (bit & 63);
}
