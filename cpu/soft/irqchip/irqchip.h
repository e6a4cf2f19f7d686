/* PIC, IOAPIC, LAPIC and PIT of the software core, as one state machine without threads.
 *
 * Calls are made by the thread that runs the VM, or by any if it was created for `threads`: then one at a time is inside, the
 * callbacks included. Time is an argument: nothing here reads a clock.
 * Sources: Intel SDM vol. 3 ch. 11 (APIC), 82093AA (IOAPIC), 8259A, 8254.
 */
#ifndef SOFT_IRQCHIP_H
#define SOFT_IRQCHIP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct irqchip;

/* What the irqchip asks of the vCPUs. `index` is the vCPU's. */
struct irqchip_host {
    void *ctx;
    bool threads;
    void (*wake)(void *ctx, uint32_t index);    /* re-check irqchip_pending(); it may have changed */
    void (*nmi)(void *ctx, uint32_t index);
    void (*init)(void *ctx, uint32_t index);
    void (*sipi)(void *ctx, uint32_t index, uint8_t vector);
    void (*eoi)(void *ctx, uint32_t gsi);       /* level-triggered GSI acknowledged; may be NULL */
    uint64_t (*tsc)(void *ctx, uint32_t index, uint64_t now_ns);                /* guest TSC at a time */
    uint64_t (*tsc_to_ns)(void *ctx, uint32_t index, uint64_t tsc); /* inverse, UINT64_MAX if never */
};

/* Keep all others out; nests. */
void irqchip_lock(struct irqchip *chip);
void irqchip_unlock(struct irqchip *chip);

struct irqchip *irqchip_create(uint32_t vcpus, const struct irqchip_host *host);
void irqchip_destroy(struct irqchip *chip);
/* Take the 8254 and port 0x61 away; before the VM runs. */
void irqchip_without_pit(struct irqchip *chip);
void irqchip_reset_lapic(struct irqchip *chip, uint32_t index, bool init); /* init: keep the APIC id */

void irqchip_set_gsi(struct irqchip *chip, uint32_t gsi, bool level, uint64_t now); /* GSI 0 is the PIT: IOAPIC pin 2 */
void irqchip_msi(struct irqchip *chip, uint64_t address, uint32_t data);
/* KVM_HC_SEND_IPI: the interrupt of `icr` (vector and delivery mode) for every APIC whose bit is set: bit n of the two maps of
 * `width` bits each stands for APIC id first + n. How many took it, or -EINVAL. */
int irqchip_multicast(struct irqchip *chip, uint64_t low, uint64_t high, unsigned width, uint32_t first, uint32_t icr);

/* The highest-priority deliverable vector for the vCPU (LAPIC, or PIC through LINT0/ExtINT), or -1.
 * CR8 is the upper half of the LAPIC's TPR: see irqchip_get_tpr(). */
int irqchip_pending(struct irqchip *chip, uint32_t index);
/* Acknowledge what irqchip_pending() reported; returns the vector. If nothing is pending any more: the spurious vector of the
 * LAPIC, or IRQ 7 of the PIC where the LAPIC is disabled. */
int irqchip_acknowledge(struct irqchip *chip, uint32_t index);
bool irqchip_may_nmi(const struct irqchip *chip); /* a line of its inputs leads to some processor as NMI or INIT */

/* The whole TPR: CR8 is its bits 4 to 7. */
uint8_t irqchip_get_tpr(struct irqchip *chip, uint32_t index);
void irqchip_set_tpr(struct irqchip *chip, uint32_t index, uint8_t tpr);

/* IA32_APIC_BASE (0x1B), x2APIC MSRs 0x800-0x8FF, IA32_TSC_DEADLINE (0x6E0). false: the access is a #GP. */
bool irqchip_msr_read(struct irqchip *chip, uint32_t index, uint32_t msr, uint64_t *value, uint64_t now);
bool irqchip_msr_write(struct irqchip *chip, uint32_t index, uint32_t msr, uint64_t value, uint64_t now);

/* The same for a state being restored: any change of mode in IA32_APIC_BASE. Restore the base first, then the LAPIC's
 * registers, then IA32_TSC_DEADLINE (which only takes a value while the LVT timer is in that mode). */
bool irqchip_restore_msr(struct irqchip *chip, uint32_t index, uint32_t msr, uint64_t value, uint64_t now);

/* Memory-mapped: the LAPIC page at its base (per vCPU), the IOAPIC at 0xFEC00000. true: answered here. */
bool irqchip_mmio_read(struct irqchip *chip, uint32_t index, uint64_t gpa, uint8_t size, uint64_t *value, uint64_t now);
bool irqchip_mmio_write(struct irqchip *chip, uint32_t index, uint64_t gpa, uint8_t size, uint64_t value, uint64_t now);
/* Ports 0x20,0x21,0xA0,0xA1,0x4D0,0x4D1 (PIC), 0x40-0x43,0x61 (PIT). true: answered here. */
bool irqchip_port_read(struct irqchip *chip, uint16_t port, uint8_t size, uint64_t *value, uint64_t now);
bool irqchip_port_write(struct irqchip *chip, uint16_t port, uint8_t size, uint64_t value, uint64_t now);

/* Timers: the earliest time (ns) at which irqchip_advance() has work, UINT64_MAX if none; and do it. */
uint64_t irqchip_next_event(struct irqchip *chip);
void irqchip_advance(struct irqchip *chip, uint64_t now);
/* The same of what one vCPU's thread looks after: the 8254 and its own LAPIC. */
uint64_t irqchip_next_event_of(struct irqchip *chip, uint32_t index);
void irqchip_advance_of(struct irqchip *chip, uint32_t index, uint64_t now);

/* The clock was set: what was running goes on as far from its end as it was. */
void irqchip_clock_moved(struct irqchip *chip, uint64_t before, uint64_t now);
/* The level that irqchip_set_gsi() last gave each GSI, or that the restored IOAPIC had: bit n is GSI n. */
uint32_t irqchip_levels(const struct irqchip *chip);

/* State in the KVM API's layouts. Call irqchip_advance() before taking any part of it. The init callback is answered by
 * irqchip_reset_lapic(index, true): the irqchip does not reset a LAPIC by itself. */
struct kvm_lapic_state;
struct kvm_irqchip;
struct kvm_pit_state2;
void irqchip_get_lapic(struct irqchip *chip, uint32_t index, struct kvm_lapic_state *state, uint64_t now);
void irqchip_set_lapic(struct irqchip *chip, uint32_t index, const struct kvm_lapic_state *state, uint64_t now);
int irqchip_get(struct irqchip *chip, struct kvm_irqchip *state);       /* chip_id selects */
int irqchip_set(struct irqchip *chip, const struct kvm_irqchip *state, uint64_t now);
void irqchip_get_pit(struct irqchip *chip, struct kvm_pit_state2 *state, uint64_t now);
void irqchip_set_pit(struct irqchip *chip, const struct kvm_pit_state2 *state, uint64_t now);

#endif
