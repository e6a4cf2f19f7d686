/* How two outcomes are compared: exactly, but for what the table (vendors.h) leaves free. */
#include <string.h>

#include "vendors.h"

enum { F_COMPARED = F_STATUS | F_DF /* the kernel does not give back all others as they were */ };

void free_memory(struct freedom *f, uint64_t address, uint64_t offset, uint32_t length)
{
    uint64_t at = address + offset;
    if (f->ranges == sizeof f->memory / sizeof f->memory[0])
        __builtin_trap();
    if (at >= DATA_BASE && at + length <= DATA_BASE + DATA_SIZE)
        at -= DATA_BASE;
    else if (at >= STACK_BASE && at + length <= STACK_BASE + STACK_SIZE)
        at = at - STACK_BASE + DATA_SIZE;
    else
        return;
    f->memory[f->ranges].offset = (uint32_t)at;
    f->memory[f->ranges++].length = length;
}

void freedom_of_row(const struct difference *row, const struct event *e, struct freedom *f)
{
    if (row->flags && !e->insn->program && !is_fault(e->host))
        f->flags |= row->flags(&e->form, vendors_shift_count(&e->form, e->in));
    if (row->free)
        row->free(e, f);
}

void freedom_of(enum rules rules, const struct event *e, struct freedom *f)
{
    const struct difference *row;
    memset(f, 0, sizeof *f);
    for (unsigned n = 0; (row = vendors_row(n)); n++)
        if (row->always || rules == RULES_COMMON)
            freedom_of_row(row, e, f);
}

static bool memory_equal(const struct event *e, const struct freedom *f)
{
    const uint8_t *a = (const uint8_t *)e->host_memory, *b = (const uint8_t *)e->core_memory;
    if (memcmp(a, b, sizeof(struct memory)) == 0)
        return true;
    for (uint32_t i = 0; i < sizeof(struct memory); i++) {
        if (a[i] == b[i])
            continue;
        bool is_free = false;
        for (unsigned n = 0; n < f->ranges && !is_free; n++)
            is_free = i - f->memory[n].offset < f->memory[n].length;
        if (!is_free)
            return false;
    }
    return true;
}

/* #UD, #NP... and #MF come before or after faults of memory. */
static bool any_order(const struct event *e, uint32_t vector)
{
    return is_memory_fault(vector) || vector == 16 || (vector == 6 && (e->form.lock || (e->form.map == MAP_0F && (e->form.opcode & 0xFC) == 0x20)));
}

bool outcomes_equal(const struct event *e, const struct freedom *f)
{
    const struct cpu_state *a = e->host, *b = e->core;
    if (f->everything)
        return true;
    if (a->vector != b->vector)
        return f->order && any_order(e, a->vector) && any_order(e, b->vector) && a->rip == b->rip;
    if (a->rip != b->rip)
        return false;
    if (f->detail && is_memory_fault(a->vector))
        return true;
    if (a->vector == 14 && (a->cr2 ^ b->cr2) & ~f->cr2)
        return false;
    if ((a->error ^ b->error) & ~f->error || ((a->rflags ^ b->rflags) & F_COMPARED & ~f->flags))
        return false;
    for (unsigned i = 0; i < (e->insn->mode32 ? 8 : 16); i++)
        if ((a->gpr[i] ^ b->gpr[i]) & ~f->gpr[i])
            return false;
    for (unsigned i = 0; i < sizeof f->fx; i++)
        if ((a->fx[i] ^ b->fx[i]) & ~f->fx[i])
            return false;
    for (unsigned i = 0; i < sizeof f->high; i++)
        if ((((const uint8_t *)a->high)[i] ^ ((const uint8_t *)b->high)[i]) & ~f->high[i])
            return false;
    return memory_equal(e, f);
}
