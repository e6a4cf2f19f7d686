/* limits.c: the control group of one run. */
#ifndef GUEST_LIMITS_H
#define GUEST_LIMITS_H

#include <stdint.h>

/* Bytes of memory, bytes that the root file system may hold more, processes at once; 0: as many as there are. */
struct limits { uint64_t memory, disk; uint32_t processes, reserved; };
enum hit { NOT_HIT = 0, HIT_MEMORY = 1, HIT_PROCESSES = 2, HIT_DISK = 3 };
enum { LOOK_MS = 20 };
struct account { char folder[96]; struct limits limits; uint64_t available; enum hit hit; };
/* Microseconds of CPU; bytes that block devices read and wrote for it; bytes that the root file system holds more. */
struct used { uint64_t cpu_us, disk_read, disk_written, disk_used, hit; };

int begin_limits(struct account *account, const struct limits *limits);
/* In the child: become a member. */
void join_limits(const struct account *account);
/* End every member. */
void kill_limits(const struct account *account);
/* End every member if more is used than may be. */
void look_at_limits(struct account *account);
void read_limits(struct account *account, struct used *used);
void end_limits(struct account *account);
#endif
