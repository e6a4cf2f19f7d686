/* blk_gate.h */
#include "blk_gate.h"

#include <stdlib.h>

static unsigned side_of(const struct request *request)
{
    return request->type == T_IN ? 0 : 1;
}

static enum limit_kind kind_of(const struct request *request)
{
    return request->type == T_IN ? LIMIT_READ : LIMIT_WRITE;
}

bool gate_add(struct gate *gate, struct request *request)
{
    unsigned side = side_of(request);
    struct lane *lane = gate->sides[side].first;
    while (lane && lane->ring != request->ring)
        lane = lane->next;
    if (!lane) {
        lane = calloc(1, sizeof *lane);
        if (!lane)
            return false;
        lane->ring = request->ring;
        if (gate->sides[side].last)
            gate->sides[side].last->next = lane;
        else
            gate->sides[side].first = lane;
        gate->sides[side].last = lane;
    }
    jobs_add(&lane->jobs, request);
    gate->waiting++;
    return true;
}

/* The lane whose turn it is goes behind the others of its side, or ends if it is empty. */
static struct request *take_turn(struct gate *gate, unsigned side)
{
    struct lane *lane = gate->sides[side].first;
    struct request *request = jobs_take(&lane->jobs);
    gate->waiting--;
    gate->sides[side].first = lane->next;
    if (!lane->next)
        gate->sides[side].last = NULL;
    lane->next = NULL;
    if (!lane->jobs.count) {
        free(lane);
    } else if (gate->sides[side].last) {
        gate->sides[side].last->next = lane;
        gate->sides[side].last = lane;
    } else {
        gate->sides[side].first = gate->sides[side].last = lane;
    }
    return request;
}

/* How long the first request of a side has to wait; whether longest for tokens that both sides share. */
static int64_t side_wait(struct gate *gate, unsigned side, int64_t now, bool *shared)
{
    const struct request *request = gate->sides[side].first->jobs.first;
    if (!gate->limits)
        return 0;
    int64_t all = limits_wait(gate->limits, LIMIT_ALL, request->length, now);
    int64_t own = limits_wait(gate->limits, kind_of(request), request->length, now);
    *shared = all > 0 && all == own;
    return own;
}

struct request *gate_take(struct gate *gate, int64_t now, bool open)
{
    for (unsigned i = 0; i < 2; i++) {
        unsigned side = (gate->turn + i) % 2;
        bool shared = false;
        if (!gate->sides[side].first)
            continue;
        if (open || !side_wait(gate, side, now, &shared)) {
            struct request *request = take_turn(gate, side);
            if (gate->limits)
                limits_charge(gate->limits, kind_of(request), request->length);
            gate->turn = !side;
            return request;
        }
        if (shared) {
            gate->turn = side;
            return NULL;
        }
    }
    return NULL;
}

int64_t gate_wait(struct gate *gate, int64_t now)
{
    int64_t wait = -1;
    for (unsigned i = 0; i < 2; i++) {
        unsigned side = (gate->turn + i) % 2;
        bool shared = false;
        if (!gate->sides[side].first)
            continue;
        int64_t own = side_wait(gate, side, now, &shared);
        if (wait < 0 || own < wait)
            wait = own;
        if (shared)
            break; /* the other side must not take the tokens that it waits for */
    }
    return wait;
}

void gate_empty(struct gate *gate, struct jobs *dropped)
{
    for (unsigned side = 0; side < 2; side++)
        while (gate->sides[side].first)
            jobs_add(dropped, take_turn(gate, side));
}
