/* Host code for hot blocks: what block.c uses of translate.c. */
#ifndef SOFT_TRANSLATE_H
#define SOFT_TRANSLATE_H

#include <stdlib.h>

#include "soft/ops/uop.h"

#ifndef SOFT_HOT
#define SOFT_HOT 40 /* entries until a block is translated; tests build with 1 */
#endif

/* Memory that the VMs of a process share, in bytes. */
struct soft_supply {
    size_t whole;   /* that one has alone, or all together */
    size_t many;    /* that each of many has */
    size_t resting; /* that all together keep when they have slept for a while */
};
/* A VM's part of it, or the whole (block.c). */
size_t soft_share(const struct soft_supply *supply, bool shares);
/* The part that it keeps when it has slept for a while: all of it, if it is the only one. */
size_t soft_resting_share(const struct soft_supply *supply, bool shares);
/* Memory from `base` on was used up to `used`, and before up to `touched`: the host gets back what exceeds `share`,
 * by madvise() with `advice`. */
void soft_give_back(uint8_t *base, size_t *touched, size_t used, size_t share, int advice);

struct host_code;
struct host_code *host_code_create(bool shares);
void host_code_destroy(struct host_code *code);
void host_code_reset(struct host_code *code); /* all translations are dead */
/* The VM sleeps: give back memory beyond its share. False if translations stand there; then all must be dropped first. */
bool host_code_rest(struct host_code *code);
/* Whether it holds more than a VM keeps that has slept for a while. */
bool host_code_exceeds_rest(const struct host_code *code);
void host_code_drop(struct host_code *code); /* all translations are dead, and all memory goes back */
/* False: no room is left. linear: 0, or where a block of a 64-bit kernel stands just now: code that is always there is found
 * sooner (gen_probe()). */
bool host_code_translate(struct host_code *code, struct block *k, uint64_t linear);
/* A block's word_fn as long as it is not translated: make flags lazy. */
void host_flags_enter(struct soft_vcpu *c, struct uop *u, uint64_t rip);
/* Call u->fn, the way into blocks: translations do not preserve callee-saved registers. */
void host_enter(struct soft_vcpu *c, struct uop *u, uint64_t rip);

#endif
