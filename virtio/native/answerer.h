/* Who can answer a doorbell on the engine's thread, so that no other thread has to be woken for it.
 *
 * The vCPU that rings waits meanwhile, so an answerer does only what takes about as long as waking a thread, and leaves
 * everything else to whoever watches the doorbell's descriptor. A core whose doorbells are rung in the kernel (KVM), and
 * any core with the virtual clock, does not ask.
 *
 * Vm.add_ioeventfd() takes a capsule of this name with a struct lv_answerer, which another extension module declares by
 * the same words (cpu/native/answerer.h): a change of the struct changes the name. */
#ifndef LV_ANSWERER_H
#define LV_ANSWERER_H

#include <stdbool.h>
#include <stdint.h>

#define LV_ANSWERER_CAPSULE "loopvisor.answerer.1"

/* What an answerer may do to the machine. [engine] */
struct lv_answerer_host {
    void *machine;
    void (*written)(void *machine, uint64_t gpa, uint64_t size); /* it wrote there */
    void (*message)(void *machine, uint64_t address, uint32_t data); /* a message signalled interrupt */
};

struct lv_answerer {
    /* The doorbell was rung. True: nobody else has to hear of it. [engine] */
    bool (*ring)(struct lv_answerer *self, const struct lv_answerer_host *host);
    /* One reference more or less; without the last it is gone. [any] */
    void (*retain)(struct lv_answerer *self);
    void (*release)(struct lv_answerer *self);
    uint32_t asked; /* enum lv_asked; atomic, since it may change at any time */
};

/* When it is asked. */
enum lv_asked {
    LV_ASKED_AT_ONCE,
    LV_ASKED_IF_CROWDED, /* at the end of the vCPU's turn, where no processor is free for the loop; else not at all */
    LV_ASKED_LATER,      /* at the end of the vCPU's turn, or when it halts or exits */
};

#endif
