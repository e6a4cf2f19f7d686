/* Inside of the irqchip: state of its four parts, and what they ask of each other.
 *
 * pic.c and ioapic.c know pins and vectors, lapic.c one vCPU's controller and its timer, pit.c counters;
 * irqchip.c routes GSIs and messages between them and holds the public interface.
 */
#ifndef SOFT_IRQCHIP_INTERNAL_H
#define SOFT_IRQCHIP_INTERNAL_H

#include "soft/irqchip/irqchip.h"

#include <linux/kvm.h>
#include <pthread.h>

enum { IRQCHIP_MAX_VCPUS = 16, IOAPIC_PINS = KVM_IOAPIC_NUM_PINS, PIC_CASCADE = 2 };
#define IRQCHIP_NEVER UINT64_MAX
#define IOAPIC_BASE 0xFEC00000ull

/* SDM vol. 3, table 11-1 (interrupt command register delivery modes; the same codes in LVT, RTE and MSI data). */
enum delivery_mode { DELIVER_FIXED, DELIVER_LOWEST, DELIVER_SMI, DELIVER_RESERVED, DELIVER_NMI, DELIVER_INIT,
                     DELIVER_SIPI, DELIVER_EXTINT };

struct lapic {
    struct irqchip *chip;
    uint32_t index;          /* the vCPU's; also the initial APIC id */
    uint64_t base;           /* IA32_APIC_BASE */
    uint32_t regs[256];      /* the register page; byte offset / 4. In struct kvm_lapic_state's order */
    uint64_t tsc_deadline;   /* IA32_TSC_DEADLINE, 0: disarmed */
    uint64_t expiry;         /* one-shot and periodic timer: ns, IRQCHIP_NEVER: disarmed */
};

struct ioapic {
    uint32_t select, id, irr;              /* irr: level of each pin */
    uint64_t rte[IOAPIC_PINS];
};

struct pit_channel {
    uint32_t count;          /* in the counting element, 1 to 65536; 0: none loaded since the mode was set */
    uint32_t next_count;     /* written, to be loaded at the next trigger or end of period; 0: none */
    uint16_t latched_count;
    uint8_t count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode;
    bool bcd, gate;
    bool programmed;         /* a mode or a count was written since power-up */
    int64_t load_tick;       /* CLK tick at which `count` was loaded */
    int64_t frozen_tick;     /* while GATE low stops the counter: when it stopped */
};

struct pit {
    struct pit_channel channels[3];
    bool speaker;
    uint32_t flags;
    int64_t rise_tick;       /* next rising edge of channel 0's OUT; INT64_MAX: none */
};

struct irqchip {
    struct irqchip_host host;
    uint32_t vcpus;
    struct lapic lapics[IRQCHIP_MAX_VCPUS];
    struct ioapic ioapic;
    struct kvm_pic_state pics[2];
    bool pic_output;         /* INTR of the master */
    struct pit pit;
    bool no_pit;             /* its ports are nobody's */
    pthread_mutex_t lock;    /* host.threads; recursive, since callbacks come back */
};

/* A message on the APIC bus. */
struct apic_message {
    uint32_t destination;
    uint8_t vector, mode;    /* enum delivery_mode */
    bool logical, level;
    bool from_x2apic;        /* destination has 32 bits */
};

/* ---- lapic.c ---- */
void lapic_reset(struct lapic *l, bool init);
bool lapic_hw_enabled(const struct lapic *l);
bool lapic_enabled(const struct lapic *l); /* also by software: takes fixed interrupts */
bool lapic_matches(const struct lapic *l, const struct apic_message *m);
bool lapic_accept(struct lapic *l, uint8_t mode, uint8_t vector, bool level);
int lapic_pending(const struct lapic *l);
int lapic_acknowledge(struct lapic *l);
uint8_t lapic_arbitration(const struct lapic *l);
bool lapic_lint0_extint(const struct lapic *l);
bool lapic_lint0_nmi(const struct lapic *l);
void lapic_lint0_rise(struct lapic *l);
bool lapic_mmio_read(struct lapic *l, uint32_t offset, uint8_t size, uint64_t *value, uint64_t now);
void lapic_mmio_write(struct lapic *l, uint32_t offset, uint8_t size, uint64_t value, uint64_t now);
bool lapic_msr_read(struct lapic *l, uint32_t msr, uint64_t *value, uint64_t now);
bool lapic_msr_write(struct lapic *l, uint32_t msr, uint64_t value, uint64_t now, bool by_host);
uint64_t lapic_next_event(struct lapic *l);
void lapic_advance(struct lapic *l, uint64_t now);
void lapic_clock_moved(struct lapic *l, uint64_t before, uint64_t now);
uint8_t lapic_tpr(const struct lapic *l);
void lapic_set_tpr(struct lapic *l, uint8_t tpr);
void lapic_save(struct lapic *l, struct kvm_lapic_state *state, uint64_t now);
void lapic_load(struct lapic *l, const struct kvm_lapic_state *state, uint64_t now);

/* ---- ioapic.c ---- */
void ioapic_reset(struct irqchip *chip);
void ioapic_set_pin(struct irqchip *chip, uint32_t pin, bool level);
void ioapic_eoi(struct irqchip *chip, uint8_t vector);
bool ioapic_extint(const struct irqchip *chip, const struct lapic *l);
bool ioapic_may_nmi(const struct irqchip *chip);
uint32_t ioapic_read(struct irqchip *chip, uint32_t offset);
void ioapic_write(struct irqchip *chip, uint32_t offset, uint32_t value);
void ioapic_save(const struct irqchip *chip, struct kvm_ioapic_state *state);
void ioapic_load(struct irqchip *chip, const struct kvm_ioapic_state *state);

/* ---- pic.c ---- */
void pic_reset(struct irqchip *chip);
void pic_set_irq(struct irqchip *chip, uint32_t irq, bool level);
int pic_peek(const struct irqchip *chip);
int pic_acknowledge(struct irqchip *chip);
uint8_t pic_read(struct irqchip *chip, uint16_t port);
void pic_write(struct irqchip *chip, uint16_t port, uint8_t value);
int pic_load(struct irqchip *chip, unsigned which, const struct kvm_pic_state *state);

/* ---- pit.c ---- */
void pit_reset(struct irqchip *chip);
uint8_t pit_read(struct irqchip *chip, uint16_t port, uint64_t now);
void pit_write(struct irqchip *chip, uint16_t port, uint8_t value, uint64_t now);
uint64_t pit_next_event(const struct irqchip *chip);
void pit_advance(struct irqchip *chip, uint64_t now);
void pit_clock_moved(struct irqchip *chip, uint64_t before, uint64_t now);
void pit_save(struct irqchip *chip, struct kvm_pit_state2 *state, uint64_t now);
void pit_load(struct irqchip *chip, const struct kvm_pit_state2 *state, uint64_t now);

/* ---- irqchip.c ---- */
void irqchip_wake(struct irqchip *chip, uint32_t index);
/* Whether the PIC's INTR reaches this vCPU: through LINT0, through the IOAPIC, or past a disabled LAPIC. */
bool irqchip_accepts_pic(const struct irqchip *chip, const struct lapic *l);
/* The PIC's INTR changed, or its way to the vCPUs. */
void irqchip_pic_changed(struct irqchip *chip);
/* Deliver to every LAPIC that matches (lowest priority: to one). False: none took it. */
bool irqchip_send(struct irqchip *chip, const struct apic_message *m);

#endif
