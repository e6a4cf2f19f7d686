/* The host's clock, for threads that may not read the TSC.
 *
 * A runner's guest half may not read the host's TSC (PR_SET_TSC: CR4.TSD, prctl(2)). The kernel writes CR4 whenever a processor goes
 * from a thread that may to one that may not, and back; on a host that is a virtual machine itself each such write can be an exit
 * to its hypervisor, which costs more than the rest of a stop. So the thread that runs a vCPU natively gives the TSC up, too. It
 * executes only code of this package, which calls nothing that reads the TSC: not the C library's clock_gettime(), no adaptive
 * mutex (tests/unit/test_native_sources.py). It asks here, which makes a system call of it. If it asks many times without running
 * natively in between, as for a guest's kernel that reads its TSC often, it gets the host's TSC back.
 */
#ifndef SOFT_HOSTCLOCK_H
#define SOFT_HOSTCLOCK_H

#include <stdint.h>

/* CLOCK_MONOTONIC, ns. Any thread, but one that a vCPU's thread started calls soft_host_take_tsc() before. */
uint64_t soft_host_now(void);
void soft_host_give_up_tsc(void); /* of the calling thread; nothing where it cannot be given up */
void soft_host_take_tsc(void);    /* the calling thread may read it; a thread that was just started may only if its creator may */

#endif
