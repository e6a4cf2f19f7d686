/* String instructions. Repeated ones work on as much as lies in one page of source and destination at a time (a large one
 * up to CHUNK; python -m tests.bench soft, movs), through host pointers; RSI, RDI and RCX are exact whenever something can
 * raise, and events are looked for between chunks. */
#include "soft/mmu/access.h"
#include "soft/ops/helpers.h"

struct string_op {
    struct soft_vcpu *c;
    unsigned size, shift, seg; /* size: 1 << shift */
    uint64_t mask;  /* of the address size */
    int64_t step;   /* + or - size */
    bool repeat;
    uint64_t work;  /* what was done, in bytes; see TURN */
    struct soft_slot *code; /* span(): the destination holds code, and is at this address: tell what was written */
    uint64_t gpa;
};

/* Bytes that are copied or stored before events are looked for; bytes after which a repetition that goes on counts as one
 * instruction, so that the longest cannot outlast its turn. An element that is done singly may be an access that the caller
 * answers, and counts for a page of them. Neither depends on what the TLB happens to hold, so that a run under the virtual
 * clock is the same after a restore. */
enum { CHUNK = 64 << 10, TURN = 1 << 20, SINGLE = 4096 };
/* So many bytes of a repetition take about as long as another instruction. With the real clock they shorten the turn as one
 * does, so that copies of many MiB keep no timer waiting. */
enum { BYTES_AN_INSTRUCTION = 32 };

static uint64_t linear(const struct string_op *s, unsigned seg, uint64_t offset, bool write)
{
    struct soft_vcpu *c = s->c;
    offset &= s->mask;
    c->access_ss = seg == SEG_SS;
    if (c->code64)
        return offset + (seg >= SEG_FS ? c->seg[seg].base : 0);
    return soft_seg_check(c, seg, offset, s->size, write);
}
static void advance(const struct string_op *s, unsigned reg, uint64_t n)
{
    uint64_t v = s->c->gpr[reg] + (uint64_t)s->step * n;
    if (s->mask == 0xFFFF)
        *(uint16_t *)&s->c->gpr[reg] = (uint16_t)v;
    else
        s->c->gpr[reg] = v & s->mask;
}
static void count_down(const struct string_op *s, uint64_t n)
{
    if (!s->repeat)
        return;
    uint64_t v = s->c->gpr[RCX] - n;
    if (s->mask == 0xFFFF)
        *(uint16_t *)&s->c->gpr[RCX] = (uint16_t)v;
    else
        s->c->gpr[RCX] = v & s->mask;
}

/* Whether the instruction under way may be in the page of `host`. Then it is done element by element, for it may change itself. */
static bool in_its_page(struct soft_vcpu *c, const uint8_t *host)
{
    uint64_t rip = c->code64 ? c->rip : (c->seg[SEG_CS].base + c->rip) & UINT32_MAX;
    uint8_t *own;
    if ((rip & 0xFFF) > 4096 - 15 || !tlb_hit(c, rip, 1, ACCESS_EXEC, &own))
        return true;
    return (((uintptr_t)own ^ (uintptr_t)host) & ~(uintptr_t)0xFFF) == 0;
}
/* RAM that is not written unseen since it holds code: as soon as it is cleared for another use, all of it is written. */
static uint8_t *code_page(struct string_op *s, uint64_t gpa)
{
    struct soft_vcpu *c = s->c;
    uint8_t *host = c->mmu.watching ? NULL : soft_phys(c->vm, gpa, true, &s->code);
    if (host && !in_its_page(c, host)) {
        s->gpa = gpa;
        return host;
    }
    s->code = NULL;
    return NULL;
}
/* The destination was written, so many bytes. */
static void written(struct string_op *s, uint64_t bytes)
{
    if (SOFT_UNLIKELY(s->code != NULL))
        soft_written(s->c->vm, s->c, s->code, s->gpa, (unsigned)bytes);
    s->code = NULL;
}

/* How many elements from `offset` upwards lie in one piece of plain RAM, at most n; *host is their address. 0: go element
 * by element (something unusual, or to raise the right fault). All of them are going to be accessed, if more than a page. */
static uint64_t span(struct string_op *s, unsigned seg, uint64_t offset, bool write, uint64_t n, uint8_t **host)
{
    struct soft_vcpu *c = s->c;
    enum soft_kind kind = write ? ACCESS_WRITE : ACCESS_READ;
    uint64_t at, room;
    offset &= s->mask;
    if (s->step < 0 || c->align_check)
        return 0;
    n = n < (uint64_t)CHUNK >> s->shift ? n : (uint64_t)CHUNK >> s->shift;
    if (c->code64) {
        at = offset + (seg >= SEG_FS ? c->seg[seg].base : 0);
    } else {
        const struct soft_seg *g = &c->seg[seg];
        if ((g->attr & 0x9E) != 0x92 || offset > g->limit)
            return 0;
        at = (g->base + offset) & UINT32_MAX;
        room = (g->limit - offset + 1) >> s->shift;
        n = n < room ? n : room;
        room = (UINT32_MAX + 1ull - at) >> s->shift;
        n = n < room ? n : room;
    }
    if (s->mask != UINT64_MAX) {
        room = (s->mask - offset + 1) >> s->shift;
        n = n < room ? n : room;
    }
    if (n == 0)
        return 0;
    c->access_ss = seg == SEG_SS;
    if (n * s->size > 2 * 4096) {
        room = soft_mmu_run(c, at, n * s->size, kind, host) >> s->shift;
        if (room || !write)
            return room;
    }
    room = (4096 - (at & 0xFFF)) >> s->shift;
    n = n < room ? n : room;
    if (n == 0 || tlb_hit(c, at, s->size, kind, host))
        return n;
    uint64_t gpa;
    *host = soft_mmu_lookup(c, at, kind, &gpa);
    if (!*host && write)
        *host = code_page(s, gpa);
    return *host ? n : 0;
}

static void fill(uint8_t *p, uint64_t v, unsigned size, uint64_t n)
{
    uint64_t all = (uint8_t)v * 0x0101010101010101ull;
    if (((v ^ all) & (UINT64_MAX >> (64 - 8 * size))) == 0) {
        memset(p, (int)(v & 0xFF), n * size);
        return;
    }
    switch (size) {
    case 2:
        for (uint64_t i = 0; i < n; i++)
            MEM(16, p + 2 * i) = (uint16_t)v;
        break;
    case 4:
        for (uint64_t i = 0; i < n; i++)
            MEM(32, p + 4 * i) = (uint32_t)v;
        break;
    default:
        for (uint64_t i = 0; i < n; i++)
            MEM(64, p + 8 * i) = v;
    }
}
static uint64_t element(const uint8_t *p, unsigned size)
{
    return size == 1 ? *p : size == 2 ? MEM(16, p) : size == 4 ? MEM(32, p) : MEM(64, p);
}

/* Elements are copied one after the other, lowest first: where the destination overlaps the source from above, what was
 * copied is copied again. */
static void move(uint8_t *to, const uint8_t *from, unsigned size, uint64_t n)
{
    uint64_t bytes = n * size, distance = (uint64_t)(to - from);
    if (distance == 0 || distance >= bytes) {
        memmove(to, from, bytes);
        return;
    }
    if (distance < size) { /* an element overwrites part of its own source */
        for (uint64_t i = 0; i < bytes; i += size) {
            uint64_t v = element(from + i, size);
            memcpy(to + i, &v, size);
        }
        return;
    }
    /* The result has the period `distance`, of which `from` holds more and more. */
    for (uint64_t done = 0, part; done < bytes; done += part) {
        part = distance + done < bytes - done ? distance + done : bytes - done;
        memcpy(to + done, from, part);
    }
}

/* A comparison mostly ends soon: it looks no further than a page. */
static uint64_t in_page(const struct string_op *s, uint64_t n) { return n < 4096u >> s->shift ? n : 4096u >> s->shift; }

static uint64_t single(struct string_op *s)
{
    s->work += SINGLE;
    return 1;
}

/* One chunk or element; the number of elements done. *stop: a comparison ended the repetition. */
static uint64_t chunk(struct string_op *s, unsigned op, unsigned until, uint64_t n, bool *stop)
{
    struct soft_vcpu *c = s->c;
    uint8_t *from, *to;
    uint64_t k, v;
    unsigned size = s->size;
    switch (op) {
    case STR_MOVS:
        k = n > 1 ? span(s, s->seg, c->gpr[RSI], false, n, &from) : 0;
        if (k)
            k = span(s, SEG_ES, c->gpr[RDI], true, k, &to);
        if (k) {
            move(to, from, size, k);
            written(s, k * size);
            s->work += k * size;
        } else {
            k = single(s);
            v = load(c, linear(s, s->seg, c->gpr[RSI], false), size);
            store(c, linear(s, SEG_ES, c->gpr[RDI], true), size, v);
        }
        advance(s, RSI, k);
        advance(s, RDI, k);
        return k;
    case STR_STOS:
        k = n > 1 ? span(s, SEG_ES, c->gpr[RDI], true, n, &to) : 0;
        if (k) {
            fill(to, c->gpr[RAX], size, k);
            written(s, k * size);
            s->work += k * size;
        } else {
            k = single(s);
            store(c, linear(s, SEG_ES, c->gpr[RDI], true), size, get_reg(c, RAX * 8, size));
        }
        advance(s, RDI, k);
        return k;
    case STR_LODS:
        set_reg(c, RAX * 8, size, load(c, linear(s, s->seg, c->gpr[RSI], false), size));
        advance(s, RSI, 1);
        return single(s);
    case STR_CMPS: {
        uint64_t a, b;
        /* If both operands fault, AMD processors report the destination's. */
        k = n > 1 ? span(s, SEG_ES, c->gpr[RDI], false, in_page(s, n), &to) : 0;
        if (k)
            k = span(s, s->seg, c->gpr[RSI], false, k, &from);
        if (k) {
            uint64_t i = 0;
            do {
                a = element(from + i * size, size);
                b = element(to + i * size, size);
                i++;
            } while (i < k && (a == b) == (until == 1));
            k = i;
            s->work += k * size;
        } else {
            k = single(s);
            soft_check_alignment(c, linear(s, s->seg, c->gpr[RSI], false), size);
            b = load(c, linear(s, SEG_ES, c->gpr[RDI], false), size);
            a = load(c, linear(s, s->seg, c->gpr[RSI], false), size);
        }
        flags_compare(c, a, b, size);
        *stop = until && (a == b) != (until == 1);
        advance(s, RSI, k);
        advance(s, RDI, k);
        return k;
    }
    case STR_SCAS: {
        uint64_t a = get_reg(c, RAX * 8, size), b;
        k = n > 1 ? span(s, SEG_ES, c->gpr[RDI], false, in_page(s, n), &to) : 0;
        if (k) {
            uint64_t i = 0;
            do
                b = element(to + i++ * size, size);
            while (i < k && (a == b) == (until == 1));
            k = i;
            s->work += k * size;
        } else {
            k = single(s);
            b = load(c, linear(s, SEG_ES, c->gpr[RDI], false), size);
        }
        flags_compare(c, a, b, size);
        *stop = until && (a == b) != (until == 1);
        advance(s, RDI, k);
        return k;
    }
    case STR_INS: {
        uint64_t at = linear(s, SEG_ES, c->gpr[RDI], true);
        soft_probe_write(c, at, size);
        store(c, at, size, soft_port_read(c, (uint16_t)c->gpr[RDX], size));
        advance(s, RDI, 1);
        return single(s);
    }
    default:
        v = load(c, linear(s, s->seg, c->gpr[RSI], false), size);
        soft_port_write(c, (uint16_t)c->gpr[RDX], size, (uint32_t)v);
        advance(s, RSI, 1);
        return single(s);
    }
}

/* Shorten the turn by what was done; see BYTES_AN_INSTRUCTION. */
static void charge(const struct string_op *s)
{
    if (s->work > SINGLE && !s->c->budget_held && !s->c->vm->config.virtual_clock)
        soft_shorten_turn(s->c, s->work / BYTES_AN_INSTRUCTION);
}

HELPER(h_string)
{
    struct string_op s = {.c = c, .size = u->size, .shift = (unsigned)__builtin_ctz(u->size), .seg = u->seg, .repeat = u->r0 != 0};
    unsigned op = u->aux;
    uint64_t next = next_rip(c, u);
    s.mask = u->base == 8 ? UINT64_MAX : u->base == 4 ? UINT32_MAX : 0xFFFF;
    s.step = c->rflags & F_DF ? -(int64_t)u->size : (int64_t)u->size;
    if (op >= STR_INS)
        soft_check_io(c, (uint16_t)c->gpr[RDX], u->size);
    bool stop = false;
    if (!s.repeat) {
        chunk(&s, op, 0, 1, &stop);
        c->rip = next;
        return;
    }
    for (;;) {
        uint64_t n = c->gpr[RCX] & s.mask;
        if (n == 0 || stop)
            break;
        if (s.work >= TURN) {
            charge(&s);
            return;
        }
        uint64_t most = (TURN - s.work + s.size - 1) >> s.shift;
        count_down(&s, chunk(&s, op, u->r0, c->budget_held ? 1 : n < most ? n : most, &stop));
        /* Stepping, an event, or code was written (perhaps this instruction): come back for the rest. */
        if ((c->gpr[RCX] & s.mask) && !stop &&
            (c->budget_held || __atomic_load_n(&c->attention, __ATOMIC_RELAXED) || block_code_changed(c))) {
            if (!c->budget_held)
                c->budget++;
            charge(&s);
            return;
        }
    }
    charge(&s);
    c->rip = next;
}
