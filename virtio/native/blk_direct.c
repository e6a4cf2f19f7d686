/* Requests of BlockEngine that the thread of the vCPU carries out which makes them.
 *
 * The loop's thread, and the threads that write into the page cache, do a disk's work beside the guest, which pays for large
 * requests while a processor is free for them. Where none is, waking them takes the vCPU's, and each of them competes with it
 * and with whoever else is busy (tests/bench/bench_guest_io.py, one processor busy); and waking one costs more than moving a
 * few KiB. So the thread of the vCPU does small requests at the end of its turn, and where the core finds that no processor is
 * free (cpu/native/access.c), large ones too: it pops requests, moves their bytes if the page cache does that at once, pushes
 * them and sends the interrupt. What needs more goes to the loop, and so do writes for a while after one for which the thread
 * had to sleep.
 *
 * A ring is lent while the device is active, not paused, and nothing else is to be done to its requests. After it was taken
 * back, a request that is under way is returned by the loop. */
#include "blk.h"

#include <stdlib.h>

enum {
    DIRECT_REQUESTS = 64,      /* that one doorbell has carried out at most */
    DIRECT_BYTES = 1 << 20,    /* after so many no more are */
    DIRECT_SLOW_NS = 500000,   /* a write for which the thread slept so long makes it shy */
    SHY_LEAST = 64,            /* doorbells */
    SMALL_BYTES = 16 << 10,    /* of an average request: moving them takes less than waking a thread */
    QUICK_LEAST = 16,          /* requests in a row, before it is believed that the page cache has them */
    ONE = 256                  /* of averages of what is less than a few */
};

static uint32_t averaged(uint32_t before, uint64_t now)
{
    return (uint32_t)((7 * (uint64_t)before + now) / 8);
}

/* Whether a vCPU's thread is to carry requests out although a processor may be free. Writes cost it more than reads, and
 * others can do them beside it; unless the driver waits for each of them. */
static bool is_worth_it(const struct blk_direct *direct)
{
    return direct->quick == QUICK_LEAST && direct->average <= SMALL_BYTES &&
           (direct->writes < ONE / 4 || direct->together < 2 * ONE);
}

void blk_direct_learn(struct blk_direct *direct, const struct request *request, bool quick)
{
    if (request->type != T_IN && request->type != T_OUT)
        return;
    direct->average = averaged(direct->average, request->length < DIRECT_BYTES ? request->length : DIRECT_BYTES);
    direct->writes = averaged(direct->writes, request->type == T_OUT ? ONE : 0);
    direct->quick = !quick ? 0 : direct->quick < QUICK_LEAST ? direct->quick + 1 : QUICK_LEAST;
}

void blk_direct_turn(struct blk_direct *direct, uint32_t requests)
{
    if (requests)
        direct->together = averaged(direct->together, requests * ONE);
    uint32_t asked = is_worth_it(direct) ? LV_ASKED_LATER : LV_ASKED_IF_CROWDED;
    if (asked == direct->asked)
        return;
    direct->asked = asked;
    for (unsigned i = 0; i < BLK_LANES; i++)
        __atomic_store_n(&direct->lanes[i].lane.answerer.asked, asked, __ATOMIC_RELAXED);
}

void blk_count(struct blk_counts *counts, const struct request *request)
{
    int which = request->status != S_OK    ? BLK_FAILED
                : request->type == T_IN    ? BLK_READS
                : request->type == T_OUT   ? BLK_WRITES
                : request->type == T_FLUSH ? BLK_FLUSHES
                                           : BLK_OTHERS;
    counts->in_flight--;
    counts->requests[which]++;
    if (which == BLK_READS || which == BLK_WRITES)
        counts->bytes[which] += request->length;
}

/* Without the lock. False: it is not done. */
static bool attempt(struct blk_direct *direct, struct request *request)
{
    if (request->type != T_OUT)
        return blk_try_now(direct->disk, request, false);
    if (direct->answering.shy)
        return false;
    struct attempt now;
    attempt_begin(&now);
    bool done = blk_try_now(direct->disk, request, true);
    attempt_end(&now, &direct->answering, DIRECT_SLOW_NS, SHY_LEAST);
    return done;
}

/* With the lock, to the driver. */
static void push(struct blk_direct *direct, struct request *request, const struct lv_answerer_host *host)
{
    const struct chain *chain = &request->chain;
    *request->status_at = request->status;
    for (uint32_t i = 0; i < chain->writable; i++) {
        const struct segment *segment = &chain->segments[chain->readable + i];
        host->written(host->machine, segment->gpa, segment->len);
    }
    ring_push(&request->ring->ring, chain->order, chain->id, chain->slots, blk_used(request));
    blk_count(&direct->counts, request);
    blk_request_drop(request);
}

/* With the lock: tell the driver of what was pushed, and whoever logs what was written. */
static void finish(struct blk_direct *direct, struct blk_lane *lane, const struct lv_answerer_host *host)
{
    if (!lane_tell(&lane->lane, &lane->ring->ring, host)) {
        lane->owes = lane->ring;
        pool_poke(direct->pool);
    }
}

/* With the lock: the loop has to go on with a request. */
static void leave_to_loop(struct blk_direct *direct, struct jobs *jobs, struct request *request)
{
    jobs_add(jobs, request);
    pool_poke(direct->pool);
}

/* With the lock, which is given up while bytes are moved. Whether all of the queue was taken and is done. */
static bool serve(struct blk_direct *direct, struct blk_lane *lane, const struct lv_answerer_host *host)
{
    RingObject *lent = lane->ring;
    struct ring *ring = &lent->ring;
    uint64_t bytes = 0;
    uint32_t taken = 0;
    bool all = false;
    ring_disable_notification(ring);
    for (int left = 2 * DIRECT_REQUESTS; left-- && taken < DIRECT_REQUESTS && bytes < DIRECT_BYTES && lane->ring == lent;) {
        struct chain chain;
        int got = ring_pop(ring, &chain);
        if (got < 0)
            break; /* the loop finds the same, and says so */
        if (!got) {
            if ((all = !ring_enable_notification(ring)))
                break;
            continue;
        }
        struct request *request = blk_request_new(&chain);
        if (!request) {
            ring_undo_pop(ring, &chain);
            break;
        }
        taken++;
        request->ring = lent;
        int status = blk_prepare(direct->disk, request);
        if (status < 0) {
            ring->error = "block request without header or status";
            blk_request_drop(request);
            break;
        }
        direct->counts.in_flight++;
        if (status != S_OK || request->type == T_GET_ID) {
            request->status = (uint8_t)status;
            push(direct, request, host);
            continue;
        }
        bytes += request->length;
        blk_request_alone(request);
        pthread_mutex_unlock(&direct->answering.lock);
        bool done = attempt(direct, request);
        pthread_mutex_lock(&direct->answering.lock);
        blk_direct_learn(direct, request, done);
        if (!done) {
            leave_to_loop(direct, &direct->undone, request);
            break;
        }
        if (lane->ring == lent)
            push(direct, request, host);
        else
            leave_to_loop(direct, &direct->done, request);
    }
    blk_direct_turn(direct, taken);
    if (lane->ring != lent)
        return false;
    finish(direct, lane, host);
    return all;
}

static bool doorbell(struct lv_answerer *answerer, const struct lv_answerer_host *host)
{
    struct blk_lane *lane = (struct blk_lane *)answerer; /* its first member */
    struct blk_direct *direct = (struct blk_direct *)lane->lane.answering; /* likewise */
    bool done = false;
    if (pthread_mutex_trylock(&direct->answering.lock))
        return false; /* the loop is at it, and may be for as long as it takes to move some MiB */
    if (lane->ring && lane->lane.has_message && !direct->answering.busy && !lane->ring->memory->memory.incomplete) {
        if (direct->answering.shy)
            direct->answering.shy--;
        direct->answering.busy = true;
        done = serve(direct, lane, host);
        direct->answering.busy = false;
        pthread_cond_broadcast(&direct->answering.ended);
    }
    pthread_mutex_unlock(&direct->answering.lock);
    return done;
}

struct blk_direct *blk_direct_new(struct disk *disk, struct pool *pool)
{
    struct blk_direct *direct = calloc(1, sizeof *direct);
    if (!direct)
        return NULL;
    answering_open(&direct->answering);
    direct->disk = disk;
    direct->pool = pool;
    direct->asked = LV_ASKED_IF_CROWDED;
    for (unsigned i = 0; i < BLK_LANES; i++)
        lane_open(&direct->lanes[i].lane, &direct->answering, doorbell, LV_ASKED_IF_CROWDED);
    return direct;
}

RingObject *blk_direct_lend(struct blk_direct *direct, unsigned number, RingObject *ring)
{
    struct blk_lane *lane = &direct->lanes[number];
    pthread_mutex_lock(&direct->answering.lock);
    RingObject *before = lane->ring;
    lane->ring = ring;
    if (before && before != ring && before->ring.signal_delta)
        lane->owes = before; /* a vCPU has pushed something and does not come to telling the driver */
    pthread_mutex_unlock(&direct->answering.lock);
    return before;
}

bool blk_direct_take(struct blk_direct *direct, struct jobs *undone, struct jobs *done)
{
    pthread_mutex_lock(&direct->answering.lock);
    *undone = direct->undone;
    *done = direct->done;
    direct->undone = direct->done = (struct jobs){0};
    bool idle = !direct->answering.busy;
    pthread_mutex_unlock(&direct->answering.lock);
    for (struct request *request = undone->first; request; request = request->next)
        Py_INCREF(request->ring);
    for (struct request *request = done->first; request; request = request->next)
        Py_INCREF(request->ring);
    return idle;
}
