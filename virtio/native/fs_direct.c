/* Requests of FsEngine that the thread of the vCPU answers which makes them.
 *
 * A guest that unpacks an archive waits for each of its messages, and waking another thread for one costs more than most of
 * them take; being woken by it costs the same again (tests/bench/bench_share.py). So where a core rings doorbells on the
 * vCPU's own thread (answerer.h), that thread pops the request, answers it, pushes it and sends the interrupt, if it may be
 * expected to take no longer: fs_request.c says which may. The rest goes to the pool's threads, and so does everything for
 * a while after a request for which the thread had to sleep, since a disk was slow or other writers held it up.
 *
 * A ring is lent while the device is active and not paused. After it was taken back, a request that is under way is
 * returned by the loop, as one of the pool's threads' is. */
#define _GNU_SOURCE
#include "fs.h"

#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    DIRECT_TURN = 16,         /* requests that one ringing of the doorbell answers at most */
    DIRECT_SLOW_NS = 4000000, /* a request for which the thread slept so long makes it shy: more than a turn of the host's
                               * scheduler, which a guest has to bear as well */
    SHY_LEAST = 16            /* doorbells */
};

struct fs_ring *fs_ring_new(RingObject *object)
{
    struct fs_ring *ring = malloc(sizeof *ring);
    if (ring)
        *ring = (struct fs_ring){1, (RingObject *)Py_NewRef((PyObject *)object)};
    return ring;
}

void fs_ring_put(struct fs_ring *ring)
{
    if (__atomic_sub_fetch(&ring->count, 1, __ATOMIC_ACQ_REL))
        return;
    Py_DECREF(ring->object);
    free(ring);
}

/* A umask of its own, as the pool's threads have. The thread is the core's, which uses no file names. */
static void have_own_umask(struct fs *fs)
{
    static _Thread_local bool done;
    if (done)
        return;
    done = true;
    if (!unshare(CLONE_FS))
        umask(0);
    else
        __atomic_store_n(&fs->fix_modes, true, __ATOMIC_RELAXED);
}

/* Giving the blocks of a file back that has no name any more takes the journal, and nobody waits for it. */
static void leave_to_pool(void *context, int fd)
{
    struct fs_pool *pool = context;
    struct fs_request *request = calloc(1, sizeof *request);
    if (!request) {
        close(fd);
        return;
    }
    request->closes = fd;
    fs_pool_hand_over(pool, request, true);
}

/* Answer a request without the lock. False: a thread of the pool has to. */
static bool attempt(struct fs_direct *direct, struct fs_request *request)
{
    struct attempt now;
    attempt_begin(&now);
    bool answered = fs_run_quick(direct->fs, request);
    fs_sweep(direct->fs, leave_to_pool, direct->pool);
    attempt_end(&now, &direct->answering, DIRECT_SLOW_NS, SHY_LEAST);
    return answered;
}

/* With the lock, to the driver. */
static void push(struct fs_direct *direct, struct fs_request *request, const struct lv_answerer_host *host)
{
    const struct chain *chain = &request->chain;
    uint64_t left = request->written;
    for (uint32_t i = 0; i < chain->writable && left; i++) {
        const struct segment *segment = &chain->segments[chain->readable + i];
        uint64_t part = left < segment->len ? left : segment->len;
        host->written(host->machine, segment->gpa, part);
        left -= part;
    }
    ring_push(&request->ring->object->ring, chain->order, chain->id, chain->slots, (uint32_t)request->written);
    fs_count(&direct->counts, request);
    fs_request_drop(request);
}

/* With the lock: tell the driver of what was pushed, and whoever logs what was written. */
static void finish(struct fs_direct *direct, struct fs_lane *lane, const struct lv_answerer_host *host)
{
    if (!lane_tell(&lane->lane, &lane->ring->object->ring, host)) {
        lane->owes = true;
        fs_pool_wake_loop(direct->pool);
    }
}

/* With the lock, which is given up during each request. Whether all of the queue was taken. */
static bool serve(struct fs_direct *direct, struct fs_lane *lane, const struct lv_answerer_host *host)
{
    struct fs_ring *lent = lane->ring;
    struct ring *ring = &lent->object->ring;
    bool all = false;
    ring_disable_notification(ring);
    for (int left = DIRECT_TURN; left-- && lane->ring == lent;) {
        struct chain chain;
        int got = ring_pop(ring, &chain);
        if (got < 0)
            break; /* the loop finds the same, and says so */
        if (!got) {
            if ((all = !ring_enable_notification(ring)))
                break;
            continue;
        }
        struct fs_request *request = fs_request_new(lent, &chain);
        if (!request) {
            ring_undo_pop(ring, &chain);
            break;
        }
        direct->counts.in_flight++;
        pthread_mutex_unlock(&direct->answering.lock);
        bool answered = attempt(direct, request);
        pthread_mutex_lock(&direct->answering.lock);
        if (!answered)
            fs_pool_hand_over(direct->pool, request, lane->urgent);
        else if (lane->ring == lent)
            push(direct, request, host);
        else
            fs_pool_answered(direct->pool, request);
    }
    if (lane->ring != lent)
        return false;
    finish(direct, lane, host);
    return all;
}

static bool doorbell(struct lv_answerer *answerer, const struct lv_answerer_host *host)
{
    struct fs_lane *lane = (struct fs_lane *)answerer; /* its first member */
    struct fs_direct *direct = (struct fs_direct *)lane->lane.answering; /* likewise */
    bool done = false;
    pthread_mutex_lock(&direct->answering.lock);
    if (lane->ring && lane->lane.has_message && !direct->answering.busy && !lane->ring->object->memory->memory.incomplete) {
        if (direct->answering.shy) {
            direct->answering.shy--;
        } else {
            have_own_umask(direct->fs);
            direct->answering.busy = true;
            done = serve(direct, lane, host);
            direct->answering.busy = false;
            pthread_cond_broadcast(&direct->answering.ended);
        }
    }
    pthread_mutex_unlock(&direct->answering.lock);
    return done;
}

struct fs_direct *fs_direct_new(struct fs *fs, struct fs_pool *pool)
{
    struct fs_direct *direct = calloc(1, sizeof *direct);
    if (!direct)
        return NULL;
    answering_open(&direct->answering);
    direct->fs = fs;
    direct->pool = pool;
    for (unsigned i = 0; i < FS_LANES; i++) {
        lane_open(&direct->lanes[i].lane, &direct->answering, doorbell, LV_ASKED_AT_ONCE);
        direct->lanes[i].urgent = !i;
    }
    return direct;
}

bool fs_direct_lend(struct fs_direct *direct, unsigned number, struct fs_ring *ring)
{
    struct fs_lane *lane = &direct->lanes[number];
    pthread_mutex_lock(&direct->answering.lock);
    struct fs_ring *before = lane->ring;
    bool owed = lane->owes;
    lane->ring = ring;
    lane->owes = false;
    pthread_mutex_unlock(&direct->answering.lock);
    if (before)
        fs_ring_put(before);
    return owed;
}
