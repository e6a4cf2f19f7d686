/* Direct execution: 64-bit guest code of CPL 3 runs natively in a process of its own, a *runner*; the core keeps everything
 * else. A runner is a TLB with an execution unit: what it has mapped follows from the guest's page tables, the core decides
 * every fault, and it may be thrown away whenever its guest half is stopped.
 *
 * The guest half stands in a system call that waits for the core's answer, by the host kernel's word (seccomp's user
 * notification) and not by its own, before the core's thread goes on: what the guest's kernel does in the core is never
 * concurrent with the same vCPU's user code. Of a runner's memory the core reads guest RAM and the frame of the signal that
 * stopped it; what is there is copied once and checked, since guest code may have written it.
 *
 * Files: runner.c (the processes), pages.c (what they have mapped), scan.c (which instructions of a code page must not run),
 * guard.c (breakpoints at them), trip.c (state in and out, why it stopped), decide.c (when it pays; the run loop's only entry),
 * kick.c (ends native execution in time), life.c (switching it on and off).
 */
#ifndef SOFT_DIRECT_DIRECT_H
#define SOFT_DIRECT_DIRECT_H

#include "soft/cpu.h"

/* In place of soft_execute(), for vCPUs with c->direct: natively if that is possible and pays, else in the core. Returns when
 * the budget is used up, at c->attention, and when the vCPU's mode has changed. [run loop, under its setjmp] */
void soft_direct_execute(struct soft_vcpu *c);
void soft_direct_destroy(struct soft_vm *vm);
/* In a forked child: forget what is the parent's. */
void soft_direct_forked(struct soft_vm *vm);

#endif
