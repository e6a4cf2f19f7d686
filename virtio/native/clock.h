/* The clock of deadlines and short waits. Any thread. */
#ifndef VIRTIO_CLOCK_H
#define VIRTIO_CLOCK_H

#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* CLOCK_MONOTONIC, ns. By a system call: the C library's function reads the TSC, which a vCPU's thread and those that it
 * started may have given up (cpu/soft/hostclock.h). */
static inline int64_t clock_now(void)
{
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

#endif
