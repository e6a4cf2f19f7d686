/* One io_uring of the Linux kernel: set-up, submission and completion by raw system calls, without a library.
 *
 * io_uring_setup(2), io_uring_enter(2). No SQPOLL: the kernel works only when it is entered or
 * interrupted. One thread at a time. Knows nothing of disks.
 */
#ifndef VIRTIO_URING_H
#define VIRTIO_URING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined __has_include
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <linux/time_types.h>
#ifdef IORING_ENTER_EXT_ARG /* headers of Linux 5.11 */
#define LV_URING 1
#endif
#endif
#endif

struct io_uring_sqe;
struct io_uring_cqe;

struct uring {
    int fd; /* readable when there are completions; -1: not open */
    unsigned *sq_head, *sq_tail, *cq_head, *cq_tail;
    unsigned sq_mask, cq_mask, sq_entries, cq_entries;
    unsigned tail; /* of the submission queue; what lies between *sq_head and it waits for uring_submit() */
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_size, sqes_size;
};

/* 0 or an errno: ENOSYS (no such system call, or one too old: before Linux 5.11), EPERM (forbidden), … */
int uring_open(struct uring *ring, unsigned entries);
/* Nothing may be in flight. */
void uring_close(struct uring *ring);
/* A zeroed entry, or NULL if the queue is full. */
struct io_uring_sqe *uring_entry(struct uring *ring);
/* Hand over what was filled in; with `wait` until a completion is there or the time is over. 0 or an errno. */
int uring_submit(struct uring *ring, bool wait, int64_t timeout_ns);
/* Take back the newest entry that the kernel has not taken; its user_data. False: it has taken all. */
bool uring_retract(struct uring *ring, uint64_t *user_data);
/* The next completion, if there is one. */
bool uring_completion(struct uring *ring, uint64_t *user_data, int32_t *result);

#endif
