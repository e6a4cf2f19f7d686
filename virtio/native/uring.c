#define _GNU_SOURCE
#include "uring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef LV_URING

/* What is needed of it: rings in one mapping (5.4), no completion lost and iovecs read at submission (5.5), time limits
 * for waiting (5.11). IORING_OP_FALLOCATE and IORING_OP_ASYNC_CANCEL are older than the last of these. */
#define FEATURES (IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG)

static int setup(unsigned entries, struct io_uring_params *params, unsigned flags)
{
    memset(params, 0, sizeof *params);
    params->flags = flags;
    return (int)syscall(__NR_io_uring_setup, entries, params);
}

static void *map(int fd, size_t size, off_t what)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
    if (at == MAP_FAILED)
        return NULL;
    madvise(at, size, MADV_DONTFORK);
    return at;
}

int uring_open(struct uring *ring, unsigned entries)
{
    struct io_uring_params params;
    memset(ring, 0, sizeof *ring);
    /* The thread that submits sleeps in the loop: it need not be interrupted to see a completion (Linux 5.19). */
#ifdef IORING_SETUP_COOP_TASKRUN
    ring->fd = setup(entries, &params, IORING_SETUP_COOP_TASKRUN);
    if (ring->fd < 0 && errno == EINVAL)
#endif
        ring->fd = setup(entries, &params, 0);
    if (ring->fd < 0)
        return errno;
    int error = ENOSYS;
    if ((params.features & FEATURES) != FEATURES)
        goto failed;
    size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->rings_size = sq_size > cq_size ? sq_size : cq_size;
    ring->sqes_size = params.sq_entries * sizeof(struct io_uring_sqe);
    ring->rings = map(ring->fd, ring->rings_size, IORING_OFF_SQ_RING);
    ring->sqes = map(ring->fd, ring->sqes_size, IORING_OFF_SQES);
    if (!ring->rings || !ring->sqes) {
        error = ENOMEM;
        goto failed;
    }
    char *base = ring->rings;
    ring->sq_head = (unsigned *)(base + params.sq_off.head);
    ring->sq_tail = (unsigned *)(base + params.sq_off.tail);
    ring->sq_mask = *(unsigned *)(base + params.sq_off.ring_mask);
    ring->cq_head = (unsigned *)(base + params.cq_off.head);
    ring->cq_tail = (unsigned *)(base + params.cq_off.tail);
    ring->cq_mask = *(unsigned *)(base + params.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(base + params.cq_off.cqes);
    ring->sq_entries = params.sq_entries;
    ring->cq_entries = params.cq_entries;
    ring->tail = *ring->sq_tail;
    unsigned *array = (unsigned *)(base + params.sq_off.array);
    for (unsigned i = 0; i < params.sq_entries; i++)
        array[i] = i;
    return 0;
failed:
    uring_close(ring);
    return error;
}

void uring_close(struct uring *ring)
{
    if (ring->sqes)
        munmap(ring->sqes, ring->sqes_size);
    if (ring->rings)
        munmap(ring->rings, ring->rings_size);
    if (ring->fd >= 0)
        close(ring->fd);
    memset(ring, 0, sizeof *ring);
    ring->fd = -1;
}

struct io_uring_sqe *uring_entry(struct uring *ring)
{
    if (ring->tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) >= ring->sq_entries)
        return NULL;
    struct io_uring_sqe *entry = &ring->sqes[ring->tail++ & ring->sq_mask];
    memset(entry, 0, sizeof *entry);
    return entry;
}

int uring_submit(struct uring *ring, bool wait, int64_t timeout_ns)
{
    struct __kernel_timespec time = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    struct io_uring_getevents_arg argument = {.ts = (uint64_t)(uintptr_t)&time};
    __atomic_store_n(ring->sq_tail, ring->tail, __ATOMIC_RELEASE);
    for (;;) {
        unsigned count = ring->tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
        if (!count && !wait)
            return 0;
        long taken = wait ? syscall(__NR_io_uring_enter, ring->fd, count, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG,
                                    &argument, sizeof argument)
                          : syscall(__NR_io_uring_enter, ring->fd, count, 0, 0, NULL, 0);
        if (taken < 0 && errno == EINTR && !wait)
            continue;
        if (taken < 0)
            return errno;
        /* It stops early at an entry that it refuses, whose completion says why. */
        if ((unsigned)taken == count)
            return 0;
        if (!taken && count)
            return EAGAIN;
    }
}

bool uring_retract(struct uring *ring, uint64_t *user_data)
{
    if (ring->tail == __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE))
        return false;
    *user_data = ring->sqes[--ring->tail & ring->sq_mask].user_data;
    __atomic_store_n(ring->sq_tail, ring->tail, __ATOMIC_RELEASE);
    return true;
}

bool uring_completion(struct uring *ring, uint64_t *user_data, int32_t *result)
{
    unsigned head = *ring->cq_head;
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
        return false;
    const struct io_uring_cqe *entry = &ring->cqes[head & ring->cq_mask];
    *user_data = entry->user_data;
    *result = entry->res;
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    return true;
}

#else /* a C library's headers without it: as on a kernel without it */

int uring_open(struct uring *ring, unsigned entries)
{
    (void)entries;
    memset(ring, 0, sizeof *ring);
    ring->fd = -1;
    return ENOSYS;
}

void uring_close(struct uring *ring)
{
    (void)ring;
}

#endif
