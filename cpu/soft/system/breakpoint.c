/* What the caller debugs a vCPU with: steps, points of execution, watched ranges, the trace. The guest's own debugging is
 * debug.c's; nothing here touches guest memory or the guest's debug registers.
 *
 * With no point set nothing costs anything. Points of execution end blocks (block.c) and are looked for where one begins;
 * a watched page is in no TLB, so that each access of it comes to soft_watch_caller(). An instruction that touches what is
 * watched is undone as by a fault, then run again as a single step, at whose end the caller is told.
 */
#include <errno.h>
#include <stdlib.h>

#include "soft/system/system.h"

/* ---- points ---- */

static int by_address(const void *a, const void *b)
{
    const struct soft_point *x = a, *y = b;
    bool data_x = x->kind != SOFT_POINT_EXECUTE, data_y = y->kind != SOFT_POINT_EXECUTE;
    if (data_x != data_y)
        return data_x ? 1 : -1;
    return x->address < y->address ? -1 : x->address > y->address;
}

static bool valid(const struct soft_point *p)
{
    if (p->kind > SOFT_POINT_ACCESS)
        return false;
    return p->kind == SOFT_POINT_EXECUTE || (p->length && p->length <= SOFT_POINT_LENGTH && p->address <= UINT64_MAX - p->length);
}

/* Where in pages blocks have to end, for all vCPUs. Offsets that are no longer needed stay until nothing is debugged any
 * more, so that points which come and go (a debugger removes its own while the guest stands still) cost no translation. */
static void choose_stops(struct soft_vm *vm)
{
    uint64_t stops[64];
    bool debugged = false, more = false, any = false;
    memcpy(stops, vm->stops, sizeof stops);
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        const struct soft_caller *k = &vm->vcpus[i]->caller;
        debugged |= k->count || k->step || k->frozen;
        for (uint32_t n = 0; n < k->executes; n++) {
            unsigned offset = k->points[n].address & 0xFFF;
            more |= !(stops[offset >> 6] >> (offset & 63) & 1);
            stops[offset >> 6] |= 1ull << (offset & 63);
        }
    }
    for (unsigned i = 0; i < 64; i++)
        any |= stops[i] != 0;
    if (!debugged && any)
        memset(stops, 0, sizeof stops);
    else if (!more)
        return;
    memcpy(vm->stops, stops, sizeof stops);
    soft_blocks_set_stops(vm, stops);
}

int soft_vcpu_set_debug(struct soft_vm *vm, uint32_t vcpu, const struct soft_debug *debug)
{
    if (vcpu >= vm->config.vcpus)
        return -EINVAL;
    if (debug->count > SOFT_MAX_POINTS)
        return -E2BIG;
    struct soft_vcpu *c = vm->vcpus[vcpu];
    struct soft_caller *k = &c->caller;
    struct soft_point *points = NULL;
    for (uint32_t i = 0; i < debug->count; i++)
        if (!valid(&debug->points[i]))
            return -EINVAL;
    if (debug->count) {
        points = malloc(debug->count * sizeof *points);
        if (!points)
            return -ENOMEM;
        memcpy(points, debug->points, debug->count * sizeof *points);
        qsort(points, debug->count, sizeof *points, by_address);
    }
    free(k->points);
    k->points = points;
    k->count = debug->count;
    for (k->executes = 0; k->executes < k->count && points[k->executes].kind == SOFT_POINT_EXECUTE;)
        k->executes++;
    k->step = debug->step;
    k->frozen = debug->frozen;
    k->hold_interrupts = debug->hold_interrupts;
    k->int3 = debug->int3;
    k->active = k->step || k->trace;
    k->stepped = k->touched = k->retry = false;
    choose_stops(vm);
    soft_watch_changed(c);
    soft_attend(c);
    return 0;
}

enum soft_debug_reason soft_vcpu_debug_reason(const struct soft_vm *vm, uint32_t vcpu, uint64_t *address)
{
    *address = vm->vcpus[vcpu]->caller.address;
    return (enum soft_debug_reason)vm->vcpus[vcpu]->caller.reason;
}

static uint64_t linear_of(const struct soft_vcpu *c, uint64_t rip)
{
    return c->code64 ? rip : (uint32_t)(c->seg[SEG_CS].base + rip);
}

bool soft_breakpoint_here(struct soft_vcpu *c, uint64_t rip)
{
    struct soft_caller *k = &c->caller;
    uint64_t linear = linear_of(c, rip);
    uint32_t low = 0, high = k->executes;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (k->points[middle].address < linear)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == k->executes || k->points[low].address != linear)
        return false;
    k->reason = SOFT_DEBUG_EXECUTE;
    k->address = linear;
    return true;
}

void soft_stop_at_breakpoint(struct soft_vcpu *c, uint64_t rip)
{
    if (!soft_breakpoint_here(c, rip))
        return;
    c->rip = rip;
    _longjmp(c->fault, JUMP_DEBUG);
}

bool soft_page_watched(const struct soft_vcpu *c, uint64_t page)
{
    const struct soft_caller *k = &c->caller;
    for (uint32_t i = k->executes; i < k->count; i++)
        if (k->points[i].address <= page + (PAGE_BYTES - 1) && page <= k->points[i].address + k->points[i].length - 1)
            return true;
    return false;
}

void soft_watch_caller(struct soft_vcpu *c, uint64_t linear, unsigned size, bool write)
{
    struct soft_caller *k = &c->caller;
    for (uint32_t i = k->executes; i < k->count; i++) {
        const struct soft_point *p = &k->points[i];
        if (!(p->kind & (write ? SOFT_POINT_WRITE : SOFT_POINT_READ)) || linear > p->address + p->length - 1 ||
            p->address > linear + size - 1)
            continue;
        if (c->in_step || !c->replay.allowed) {
            k->touched = true;
            k->address = linear > p->address ? linear : p->address;
            return;
        }
        k->retry = true;
        k->retry_rip = c->rip;
        c->replay.next = 0; /* the answers that it has had already are given again */
        _longjmp(c->fault, JUMP_RETRY);
    }
}

/* ---- stops ---- */

bool soft_caller_stops(struct soft_vcpu *c)
{
    struct soft_caller *k = &c->caller;
    bool watch = k->touched, stops = watch || (k->stepped && k->step);
    k->touched = k->stepped = false;
    if (stops)
        k->reason = watch ? SOFT_DEBUG_WATCH : SOFT_DEBUG_STEP;
    return stops;
}

void soft_caller_event(struct soft_vcpu *c, uint8_t vector, uint64_t rip)
{
    c->caller.stepped |= c->caller.step;
    if (c->caller.trace)
        soft_trace(c, SOFT_TRACE_EVENT, rip, soft_instructions(c), vector);
}

/* ---- the trace ---- */

void soft_trace(struct soft_vcpu *c, unsigned kind, uint64_t rip, uint64_t instructions, uint32_t count)
{
    struct soft_caller *k = &c->caller;
    uint64_t linear = linear_of(c, rip);
    struct soft_trace_entry *last = k->trace_count ? &k->trace[(k->trace_count - 1) % k->trace_size] : NULL;
    if (last && kind != SOFT_TRACE_EVENT && last->kind == kind && last->address == linear && last->count < UINT32_MAX) {
        last->count++;
        return;
    }
    k->trace[k->trace_count++ % k->trace_size] =
        (struct soft_trace_entry){ .address = linear, .instructions = instructions, .count = count, .kind = kind };
}

void soft_caller_free(struct soft_vcpu *c)
{
    free(c->caller.points);
    free(c->caller.trace);
}

int soft_vm_set_trace(struct soft_vm *vm, uint32_t entries)
{
    if (entries > 1u << 20)
        return -EINVAL;
    int error = 0;
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        struct soft_caller *k = &vm->vcpus[i]->caller;
        free(k->trace);
        k->trace = entries ? calloc(entries, sizeof *k->trace) : NULL;
        k->trace_size = entries;
        k->trace_count = 0;
        k->active = k->step || k->trace;
        if (entries && !k->trace)
            error = -ENOMEM;
        soft_attend(vm->vcpus[i]);
    }
    return error;
}

uint32_t soft_vcpu_trace(const struct soft_vm *vm, uint32_t vcpu, struct soft_trace_entry *out, uint32_t max)
{
    const struct soft_caller *k = &vm->vcpus[vcpu]->caller;
    if (!k->trace)
        return 0;
    uint64_t kept = k->trace_count < k->trace_size ? k->trace_count : k->trace_size;
    uint32_t n = kept < max ? (uint32_t)kept : max;
    for (uint32_t i = 0; i < n; i++)
        out[i] = k->trace[(k->trace_count - n + i) % k->trace_size];
    return n;
}
