/* An Intel host made of this one: what the host's processor does, changed where the table (vendors.h) says that Intel's may do
 * something else. To what is known of Intel's processors, or to any value that the table leaves open.
 *
 * On an AMD host this is what an Intel host may look like to the oracle. Programs are run one instruction at a time, so
 * that a program which reads an undefined flag gets another result.
 */
#include <string.h>

#include "vendors.h"

static void scramble(const struct event *e, const struct freedom *f, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    if (f->everything) { /* seen as any other end */
        out->vector = out->vector == 6 ? 3 : 6;
        return;
    }
    out->rflags ^= rng_next(r) & f->flags & F_STATUS;
    for (unsigned i = 0; i < (e->insn->mode32 ? 8 : 16); i++)
        if (!e->insn->mode32)
            out->gpr[i] ^= rng_next(r) & f->gpr[i];
    for (unsigned i = 0; i < sizeof f->fx; i++)
        if (f->fx[i])
            out->fx[i] ^= (uint8_t)rng_next(r) & f->fx[i];
    for (unsigned n = 0; n < f->ranges; n++)
        for (unsigned i = 0; i < f->memory[n].length; i++)
            ((uint8_t *)memory)[f->memory[n].offset + i] ^= (uint8_t)rng_next(r);
}

/* Another address in the page, and another state of what is done in pieces. */
static void other_fault(const struct freedom *f, struct cpu_state *out, struct memory *memory, struct rng *r)
{
    out->cr2 ^= rng_next(r) & f->cr2;
    if (f->detail) {
        out->error ^= 2;
        out->gpr[7] ^= 1;
        ((uint8_t *)memory)[rng_below(r, DATA_WRITABLE)] ^= 1;
    }
}

static void as_intel(const struct insn *insn, const struct cpu_state *in, const struct memory *before, struct cpu_state *out,
                     struct memory *memory, struct rng *r)
{
    static struct cpu_state host;
    static struct memory host_memory;
    host = *out;
    host_memory = *memory;
    struct event e = {insn, form_of(insn->bytes, insn->mode32), in, &host, &host, before, &host_memory, &host_memory};
    const struct difference *row;
    for (unsigned n = 0; (row = vendors_row(n)); n++) {
        if (row->always)
            continue;
        struct freedom f = {.everything = false};
        freedom_of_row(row, &e, &f);
        if (!row->intel && !is_fault(&host))
            scramble(&e, &f, out, memory, r);
        else if (!row->intel && is_memory_fault(host.vector))
            other_fault(&f, out, memory, r);
        else if (row->intel)
            row->intel(&e, out, memory, r);
    }
}

static void one(const struct insn *insn, struct cpu_state *state, struct memory *memory)
{
    static struct cpu_state in;
    static struct memory before;
    in = *state;
    before = *memory;
    struct rng r = {in.gpr[0] ^ in.gpr[5] << 7 ^ insn->bytes[0] ^ (uint64_t)insn->bytes[1] << 8 ^ (uint64_t)insn->offset << 32};
    native_run(insn, state, memory);
    as_intel(insn, &in, &before, state, memory, &r);
}

void foreign_run(const struct insn *insn, struct cpu_state *state, struct memory *memory)
{
    if (!insn->program) {
        one(insn, state, memory);
        return;
    }
    uint64_t begin = CODE_BASE + insn->offset, end = begin + insn->length, at = begin;
    for (unsigned steps = 0; at != end && steps < 10000; steps++) {
        struct insn single = {.mode32 = insn->mode32, .offset = (unsigned)(at - CODE_BASE)};
        const uint8_t *bytes = insn->bytes + (at - begin);
        memcpy(single.bytes, bytes, insn->length - (at - begin));
        single.length = form_of(bytes, insn->mode32).length;
        one(&single, state, memory);
        if (state->vector != 3)
            return;
        at = state->rip - 1;
    }
    state->rip = end + 1;
}
