/* When guest code runs natively: the run loop's way in, and what decides.
 *
 * On a host that is itself a virtual machine a stop costs some 9 us, as much as the core needs for eight thousand instructions, and
 * up to 25 us if it maps something. So an address space gets a runner only after it has been executing for a while, and not while
 * its program enters the guest's kernel more often than every eight thousand instructions. After the kernel returned to a program,
 * its first instructions run in the core, unless this address space has shown that its native stretches are long enough. One
 * whose stretches are short, whose trials all end in system calls, or that has lost more by its stops than it gained, stays in the
 * core for a while, longer each time. Then it may lose a little again: so a program that will gain once its pages are mapped comes
 * to that, and one that never does loses little.
 */
#include "soft/direct/internal.h"

#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    TRIAL = 3000,          /* instructions in the core before an unknown program goes native */
    POOR_NS = 2500,        /* average native stretch below which an address space stays in the core for a while */
    BACKOFF = 200000,      /* instructions of such a while, doubled each time, */
    BACKOFF_MAX = 6,       /* so often at most */
    CREDIT_PART = 32,      /* after a while in the core an address space may lose 1 ns for each so many instructions of the next */
    TRIALS_MAX = 64,       /* in a row that ended in system calls, before it is left alone for a while */
    GROWN = 32000000,      /* instructions, twice, before an address space gets a runner */
    BRIEF = 8000,          /* instructions between two entries into the kernel: fewer are done in the core sooner than a stop */
    KNOWN = 64,            /* returns to the program from which that is known, */
    RECENT = 512,          /* and at which their number and that of the program's instructions are halved */
    FAILURES_MAX = 3,
    HOT = 1000000,         /* instructions in the core, of pages that may not run natively, before an address space gets breakpoints */
    BIND_NS = 50000,       /* stretches shorter than this share a processor with the core's thread, */
    BOUND_STOPS = 256,     /* another one perhaps after so many, */
    BOUND_CORE = 4000000,  /* or so many instructions in the core */
};

static void close_runner(struct soft_vcpu *c, struct runner *r)
{
    kick_settle(c->vm->direct);
    runner_close(r);
    if (c->direct->current == r)
        c->direct->current = NULL;
}

static struct runner *open_runner(struct soft_vcpu *c, struct runner *r, bool breakpoints)
{
    struct direct_vm *direct = c->vm->direct;
    const char *why;
    if (!kick_start(direct, c->vm) || runner_open(direct, r, breakpoints, &why) < 0) {
        if (++c->direct->failures >= FAILURES_MAX)
            __atomic_store_n(&direct->off, true, __ATOMIC_RELAXED);
        return NULL;
    }
    return r;
}

/* The runner of the current address space, if there is one. */
static struct runner *known_runner(struct soft_vcpu *c)
{
    struct direct_vcpu *d = c->direct;
    uint64_t root = c->cr3 & PHYS_MASK & PAGE_MASK;
    for (unsigned i = 0; i < RUNNERS && !d->current; i++)
        if (d->runner[i].used && d->runner[i].root == root)
            d->current = &d->runner[i];
    return d->current;
}

/* From now on it is for the current address space. */
static void begin_space(struct soft_vcpu *c, struct runner *r)
{
    r->used = true;
    r->left = false;
    r->top = 0;
    c->direct->counts.spaces++;
    r->root = c->cr3 & PHYS_MASK & PAGE_MASK;
    r->pcid = c->cr4 & CR4_PCIDE ? c->cr3 & 0xFFF : 0;
    r->stale = true;
    r->average_ns = PAYS_NS;
    r->balance_ns = CREDIT_NS;
    r->refused = r->stops = 0;
    r->trials = 0;
    r->core_until = 0;
    r->backoff = 0;
}

/* One for the current address space: an unused one, or the one that was not used for longest. */
static struct runner *take_runner(struct soft_vcpu *c)
{
    struct direct_vcpu *d = c->direct;
    struct runner *r = &d->runner[0];
    for (unsigned i = 1; i < c->vm->direct->runners && r->used; i++)
        if (!d->runner[i].used || d->runner[i].last_used < r->last_used)
            r = &d->runner[i];
    bool foreign = r->used || r->left; /* something of another address space is in it */
    if (foreign && (!pages_drop_all(r) || !trip_clean(r)))
        close_runner(c, r);
    guard_close(r);
    if (!r->mapper && !open_runner(c, r, false))
        return NULL;
    begin_space(c, r);
    return d->current = r;
}

/* Another runner for the current address space, with breakpoints. */
static void give_breakpoints(struct soft_vcpu *c, struct runner *r)
{
    close_runner(c, r);
    if (!open_runner(c, r, true))
        return;
    c->vm->direct->no_guards = !guard_any(r);
    begin_space(c, r);
    c->direct->current = r;
}

/* Runners end with the thread that made them: if another one runs the vCPU now, it makes its own. */
static void follow_thread(struct soft_vcpu *c)
{
    struct direct_vcpu *d = c->direct;
    static __thread pid_t self;
    if (!self)
        self = (pid_t)syscall(SYS_gettid);
    if (d->thread == self)
        return;
    for (unsigned i = 0; i < RUNNERS; i++)
        if (d->runner[i].mapper)
            close_runner(c, &d->runner[i]);
    d->thread = self;
    __atomic_store_n(&d->bound, -1, __ATOMIC_RELAXED);
}

/* How long an address space without a runner has been executing: those that die young get none. */
static struct young *young_of(struct direct_vcpu *d, uint64_t root)
{
    struct young *y = &d->young[(root >> 12) % YOUNG];
    if (y->root != root)
        *y = (struct young){.root = root};
    return y;
}

/* Count what was executed since the last time for the address space that was the current one. */
static struct young *count_age(struct soft_vcpu *c)
{
    struct direct_vcpu *d = c->direct;
    struct young *y = young_of(d, d->root);
    uint64_t now = soft_instructions(c);
    y->spent += (int64_t)(now - d->counted);
    d->counted = now;
    return y;
}

/* From the guest's kernel to a program that stays in the core. */
static void count_return(struct direct_vcpu *d)
{
    struct young *y = young_of(d, d->root);
    if (++y->returns >= RECENT) {
        y->returns /= 2;
        y->user /= 2;
    }
}

/* Whether its program enters the guest's kernel too often for native stretches, as far as the core saw. */
static bool brief(struct direct_vcpu *d)
{
    const struct young *y = young_of(d, d->root);
    return y->returns >= KNOWN && y->user < (uint64_t)y->returns * BRIEF;
}

/* Whether it has lived so long that it may get a runner. */
static bool grown(struct soft_vcpu *c)
{
    struct young *y = count_age(c);
    if (y->spent < GROWN)
        return false;
    uint64_t top = pages_top(c);
    if (y->top == top && !brief(c->direct)) {
        y->trials = 0;
        return true;
    }
    y->top = top;
    y->spent = 0;
    return false;
}

/* The guest's program is where it was when the stretch began, memory is not: only the program's end is left. */
static void lose(struct soft_vcpu *c, struct runner *r)
{
    close_runner(c, r);
    if (++c->direct->failures >= FAILURES_MAX)
        __atomic_store_n(&c->vm->direct->off, true, __ATOMIC_RELAXED);
    soft_raise_error(c, VEC_GP, 0);
}

/* What is executed in the core from now on is for this reason. */
static void stay(struct soft_vcpu *c, enum soft_native_core why)
{
    soft_direct_mode(c);
    c->direct->why = why;
}

static void in_core(struct soft_vcpu *c, int64_t most, enum soft_native_core why)
{
    uint64_t before = soft_instructions(c);
    stay(c, why);
    soft_execute_some(c, most);
    c->direct->slice -= (int64_t)(soft_instructions(c) - before);
}

/* In the core for a while. */
static void give_up(struct soft_vcpu *c, struct runner *r)
{
    r->core_until = soft_instructions(c) + ((uint64_t)BACKOFF << r->backoff);
    r->average_ns = PAYS_NS;
    r->balance_ns = (int64_t)((BACKOFF << r->backoff) / CREDIT_PART);
    if (r->backoff < BACKOFF_MAX)
        r->backoff++;
    r->trials = 0;
}

/* An address space without a runner whose trials all end in system calls is left alone for a while, too. */
static void leave_alone(struct soft_vcpu *c)
{
    struct young *y = count_age(c);
    if (++y->trials <= TRIALS_MAX)
        return;
    y->trials = 0;
    y->spent = -((int64_t)BACKOFF << y->backoff);
    if (y->backoff < BACKOFF_MAX)
        y->backoff++;
}

/* Whether it stays in the core for a while, since stops follow each other too closely. */
static bool poor(struct soft_vcpu *c, struct runner *r)
{
    if (c->vm->direct->always)
        return false;
    if (r->core_until > soft_instructions(c))
        return true;
    bool was_poor = r->core_until;
    r->core_until = 0;
    if ((was_poor && brief(c->direct)) || r->average_ns < POOR_NS || r->balance_ns < 0) {
        give_up(c, r);
        return true;
    }
    if (r->average_ns > 4 * PAYS_NS)
        r->backoff = 0;
    return false;
}

/* Until how many instructions are retired the current address space stays in the core in any case: 0, or one that is past, if it
 * need not. */
static uint64_t stays_until(struct soft_vcpu *c)
{
    const struct runner *r = known_runner(c);
    if (r)
        return r->core_until;
    return c->vm->direct->always ? 0 : soft_instructions(c) + (uint64_t)(GROWN - count_age(c)->spent);
}

void soft_direct_returned(struct soft_vcpu *c)
{
    struct direct_vcpu *d = c->direct;
    if (c->cpl != 3 || !c->code64 || __atomic_load_n(&c->vm->direct->off, __ATOMIC_RELAXED))
        return;
    uint64_t now = soft_instructions(c);
    if (now >= d->quiet_until)
        d->quiet_until = stays_until(c);
    if (now < d->quiet_until) { /* the run loop is not left for it */
        d->why = d->current ? SOFT_CORE_POOR : SOFT_CORE_YOUNG;
        count_return(d);
        return;
    }
    d->returned = true;
    __atomic_store_n(&c->attention, 1, __ATOMIC_RELAXED);
}

/* Whether the pages that may not run natively cost more than stops with breakpoints would. */
static bool breakpoints_pay(const struct soft_vcpu *c, const struct runner *r)
{
    const uint64_t *floor = c->direct->floor_ns;
    uint64_t more = floor[true] > floor[false] ? STOP_FLOORS * (floor[true] - floor[false]) : 0; /* an instruction takes about 1 ns in the core */
    return !guard_any(r) && !c->vm->direct->no_guards && r->refused > HOT + r->stops * more;
}

static void bind(struct soft_vcpu *c, struct runner *r)
{
    struct direct_vcpu *d = c->direct;
    bool was = d->bound >= 0;
    runner_bind(c, r);
    if (!was)
        d->bound_stops = BOUND_STOPS;
    d->bound_until = soft_instructions(c) + BOUND_CORE;
}

/* Natively, once. */
static void stretch(struct soft_vcpu *c, struct runner *r)
{
    struct direct_vcpu *d = c->direct;
    r->last_used = ++d->use;
    if (r->suspect)
        d->pending_count = 0; /* another's, perhaps */
    if (!pages_prepare(c, r) || (r->suspect && !(runner_command(r, r->waiting) && trip_clean(r)))) {
        close_runner(c, r);
        return;
    }
    if (r->blocked)
        d->slice = TRIAL, d->slice_why = SOFT_CORE_IMPOSSIBLE;
    if (d->slice > 0)
        return;
    if (breakpoints_pay(c, r)) {
        give_breakpoints(c, r);
        return;
    }
    if (!guard_set(r)) {
        guard_close(r);
        c->vm->direct->no_guards = true;
        if (!pages_drop_all(r))
            close_runner(c, r);
        return;
    }
    if (r->average_ns >= BIND_NS || (d->bound >= 0 && !d->bound_stops--))
        runner_unbind(d);
    else
        bind(c, r);
    r->trials = 0;
    soft_host_give_up_tsc();
    stay(c, SOFT_CORE_STOP);
    d->slice_why = SOFT_CORE_REFUSED;
    if (trip_run(c, r) == TRIP_LOST)
        lose(c, r);
}

void soft_direct_execute(struct soft_vcpu *c)
{
    struct direct_vcpu *d = c->direct;
    struct direct_vm *direct = c->vm->direct;
    bool off = __atomic_load_n(&direct->off, __ATOMIC_RELAXED);
    if (d->bound >= 0 && (off || soft_instructions(c) > d->bound_until))
        runner_unbind(d);
    if (off || !trip_possible(c)) {
        stay(c, SOFT_CORE_IMPOSSIBLE);
        soft_execute(c);
        return;
    }
    follow_thread(c);
    struct runner *r = known_runner(c);
    if (r && pages_replaced(c, r)) { /* a program ended, and its root became another's */
        r->used = false;
        r->left = true;
        r = d->current = NULL;
        count_age(c)->spent = 0;
    }
    if (d->returned) {
        d->returned = false;
        d->slice_why = SOFT_CORE_TRIAL;
        d->slice = direct->always || (r && r->average_ns >= PAYS_NS) ? 0 : TRIAL;
        if (r && d->slice && ++r->trials > TRIALS_MAX)
            give_up(c, r);
        else if (!r && d->slice)
            leave_alone(c);
    }
    if (d->slice > 0) {
        in_core(c, d->slice, d->slice_why);
        return;
    }
    if (!r && !direct->always && !grown(c)) {
        in_core(c, GROWN, SOFT_CORE_YOUNG);
        return;
    }
    if (!r)
        r = take_runner(c);
    if (!r || poor(c, r))
        in_core(c, GROWN, SOFT_CORE_POOR);
    else
        stretch(c, r);
}

/* ---- what the core tells ---- */

void soft_direct_mode(struct soft_vcpu *c)
{
    struct direct_vcpu *d = c->direct;
    uint64_t now = soft_instructions(c);
    if (d->in_user) {
        d->counts.core[d->why] += now - d->user_from;
        if (d->why == SOFT_CORE_YOUNG || d->why == SOFT_CORE_POOR)
            young_of(d, d->root)->user += now - d->user_from;
    }
    d->in_user = c->cpl == 3;
    d->user_from = now;
}

void soft_direct_flushed(struct soft_vcpu *c)
{
    for (unsigned i = 0; i < RUNNERS; i++)
        c->direct->runner[i].stale = true;
}

void soft_direct_flushed_page(struct soft_vcpu *c, uint64_t linear)
{
    for (unsigned i = 0; i < RUNNERS; i++) {
        struct runner *r = &c->direct->runner[i];
        struct region *region = r->used && !r->stale ? region_of(r, linear) : NULL;
        if (region)
            region->stale = r->some_stale = true;
    }
}

/* A flush of one process-context identifier (SDM vol. 3, 4.10.4.1), or of none. */
void soft_direct_switched(struct soft_vcpu *c, bool keep)
{
    uint64_t root = c->cr3 & PHYS_MASK & PAGE_MASK, pcid = c->cr4 & CR4_PCIDE ? c->cr3 & 0xFFF : 0;
    bool other = c->direct->root != root;
    count_age(c);
    c->direct->current = NULL;
    c->direct->quiet_until = 0;
    c->direct->root = root;
    for (unsigned i = 0; i < RUNNERS; i++) {
        struct runner *r = &c->direct->runner[i];
        if (!r->used)
            continue;
        if (!keep && r->pcid == pcid)
            r->stale = true;
        if (r->root == root && r->pcid != pcid) {
            r->stale = true;
            r->pcid = pcid;
        }
        /* A program may have ended, and its root become another's: then its translations were flushed. */
        if (r->root == root && other && r->stale)
            r->suspect = true;
    }
}

void soft_direct_protect(struct soft_vcpu *c, const uint8_t *host)
{
    struct direct_vm *direct = c->vm->direct;
    const struct direct_range *range = host ? range_of(direct, host) : NULL;
    uint64_t n = range ? (range->offset + (uint64_t)(host - range->host)) >> 12 : 0;
    if (!host || (range && (__atomic_load_n(&direct->writable[n >> 3], __ATOMIC_RELAXED) >> (n & 7) & 1)))
        c->direct->protect_seq++;
}

void soft_direct_code_written(struct soft_vcpu *c, uint64_t gpa)
{
    for (unsigned i = 0; i < RUNNERS; i++)
        pages_lose(&c->direct->runner[i], gpa);
}
