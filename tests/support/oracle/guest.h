/* A guest of one vCPU that runs single instructions: what guest.c needs of an execution core. */
#ifndef ORACLE_GUEST_H
#define ORACLE_GUEST_H

#include <linux/kvm.h>

#include "oracle.h"
#include "soft/soft.h"

enum { GUEST_RAM = 0x400000 };

struct guest {
    const char *name;
    /* State in KVM's layouts; they end the program if they fail. */
    void (*get)(enum soft_state kind, void *data, size_t size);
    void (*set)(enum soft_state kind, const void *data, size_t size);
    void (*written)(uint64_t gpa, uint64_t size); /* NULL: the core sees for itself that code was written */
    unsigned (*run)(void);                        /* 0: the vCPU executed HLT; else why not */
    bool avx;                                     /* it has YMM registers */
    uint8_t *ram;
    struct kvm_sregs sregs64, sregs32;
};

void guest_memory(struct guest *g);    /* fills g->ram; then the core is given it */
void guest_registers(struct guest *g); /* once the vCPU exists */
void guest_run(struct guest *g, const struct insn *insn, struct cpu_state *state, struct memory *memory);
_Noreturn void guest_die(const struct guest *g, const char *what);

#endif
