/* Execution breakpoints in a runner's debug registers, at addresses where an instruction could begin that sees the host.
 *
 * Such a breakpoint stops the guest half before the instruction is executed, however it was reached, and the core executes
 * it. Reads of the page see its true bytes. There are four, so they are a cache: a page with such addresses is executable while
 * it holds breakpoints for all of them. They are the host kernel's perf events, which the guest half opened on itself before any guest
 * code was there and gave away; where it may not (kernel.perf_event_paranoid, a container), such pages are executed in the core.
 * A process with breakpoints, set or not, costs more at each stop. So only address spaces in which such pages are hot get a runner
 * with breakpoints (decide.c).
 */
#define _GNU_SOURCE
#include "soft/direct/internal.h"

#include <linux/hw_breakpoint.h>
#include <linux/perf_event.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { LEAST_NS = 40000 /* a page that has just got its breakpoints keeps them so long: moving them costs half of that */ };

static bool alive(struct runner *r, const struct guard *g)
{
    const struct region *region = region_of(r, g->page);
    return region && (region->page[g->page >> 12 & 511] & PAGE_X);
}

bool guard_any(const struct runner *r) { return r->guards[0].fd != 0; }

void guard_release(struct runner *r, uint64_t page)
{
    for (unsigned i = 0; i < GUARDS; i++)
        if (r->guards[i].page == page)
            r->guards[i].page = 0;
}

bool guard_take(struct runner *r, uint64_t page, const int16_t *starts, unsigned count, uint64_t lost[GUARDS], unsigned *lost_count)
{
    unsigned unused = 0;
    *lost_count = 0;
    if (!guard_any(r) || count > GUARDS)
        return false;
    guard_release(r, page);
    for (unsigned i = 0; i < GUARDS; i++) {
        struct guard *g = &r->guards[i];
        if (g->page && !alive(r, g))
            g->page = 0;
        unused += !g->page;
    }
    while (unused < count) {
        const struct guard *oldest = NULL;
        for (unsigned i = 0; i < GUARDS; i++)
            if (r->guards[i].page && (!oldest || r->guards[i].since_ns < oldest->since_ns))
                oldest = &r->guards[i];
        if (!oldest || r->used_ns - oldest->since_ns < LEAST_NS)
            return false;
        uint64_t victim = oldest->page;
        lost[(*lost_count)++] = victim;
        guard_release(r, victim);
        for (unsigned i = unused = 0; i < GUARDS; i++)
            unused += !r->guards[i].page;
    }
    for (struct guard *g = r->guards; count; g++) {
        if (g->page)
            continue;
        g->page = page;
        g->address = page + (uint64_t)(int64_t)starts[--count];
        g->since_ns = r->used_ns;
    }
    return true;
}

/* The event stops the guest half by SIGTRAP with TRAP_PERF, before the instruction. */
static bool arm(struct guard *g)
{
    struct perf_event_attr attributes = RUNNER_BREAKPOINT(g->address, 0);
    if (ioctl(g->fd - 1, PERF_EVENT_IOC_MODIFY_ATTRIBUTES, &attributes) < 0 || (!g->armed && ioctl(g->fd - 1, PERF_EVENT_IOC_ENABLE, 0) < 0))
        return false;
    g->armed = g->address;
    return true;
}

bool guard_set(struct runner *r)
{
    for (unsigned i = 0; i < GUARDS; i++) {
        struct guard *g = &r->guards[i];
        if (g->page && g->armed != g->address && !arm(g))
            return false;
        if (!g->page && g->armed) {
            ioctl(g->fd - 1, PERF_EVENT_IOC_DISABLE, 0);
            g->armed = 0;
        }
    }
    return true;
}

void guard_forget(struct runner *r)
{
    for (unsigned i = 0; i < GUARDS; i++)
        r->guards[i].page = 0;
}

void guard_open(struct runner *r, const int fds[GUARDS])
{
    for (unsigned i = 0; i < GUARDS; i++)
        r->guards[i] = (struct guard){.fd = fds[i] + 1};
}

void guard_close(struct runner *r)
{
    for (unsigned i = 0; i < GUARDS; i++)
        if (r->guards[i].fd)
            close(r->guards[i].fd - 1);
    memset(r->guards, 0, sizeof r->guards);
}
