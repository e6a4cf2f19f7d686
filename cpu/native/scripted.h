/* The scripted core's extra interface: what its vCPUs do, and what became of it. */
#ifndef LV_SCRIPTED_H
#define LV_SCRIPTED_H

#include "native/loop.h"

enum { LV_SCRIPT_STORE = LV_EXIT_KINDS }; /* a step: write `size` bytes of `value` to guest memory at `address` */

struct lv_interrupt {
    bool msi;
    uint32_t gsi_or_data; /* line: GSI; MSI: data */
    uint64_t address;     /* line: level; MSI: address */
};

/* Append steps (accesses, other exits, stores). The vCPU is PARKED. */
int lv_script_append(struct lv_vcpu *vcpu, const struct lv_exit *steps, uint32_t count);
/* The values that its reads yielded, in order, and how many. The vCPU is PARKED. */
const uint64_t *lv_script_answers(struct lv_vcpu *vcpu, uint32_t *count);
/* Interrupts signalled so far, in order: copied to `log` (at most max); returns how many there are. */
uint32_t lv_script_interrupts(struct lv_vm *vm, struct lv_interrupt *log, uint32_t max);

#endif
