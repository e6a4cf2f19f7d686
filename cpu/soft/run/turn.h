/* What the two run loops share: vm.c's, which gives all vCPUs their turns on one thread, and parallel.c's of one vCPU. */
#ifndef SOFT_TURN_H
#define SOFT_TURN_H

#include "soft/system/system.h"

enum { GO_ON = -1 };

bool soft_can_run(struct soft_vcpu *c, uint64_t now);
/* Run `c` until its budget is used up or something asks for a look: GO_ON, or an enum soft_stop. */
int soft_run_turn(struct soft_vcpu *c);
/* It can wake by an NMI, an INIT or SIPI only. */
bool soft_sleeps_for_good(const struct soft_vcpu *c);

#endif
