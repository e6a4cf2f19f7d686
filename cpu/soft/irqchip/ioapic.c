/* The I/O APIC (82093AA data sheet), 24 pins, with the version register that KVM shows (0x11: no EOI register).
 *
 * A pin's level means "asserted"; the polarity bit is kept but not applied, as in KVM. */
#include "soft/irqchip/internal.h"

#include <string.h>

#define RTE_VECTOR 0xFFull
#define RTE_LOGICAL (1ull << 11)
#define RTE_STATUS (1ull << 12)
#define RTE_REMOTE_IRR (1ull << 14)
#define RTE_LEVEL (1ull << 15)
#define RTE_MASK (1ull << 16)
#define RTE_WRITABLE (0xFF0000000001FFFFull & ~(RTE_STATUS | RTE_REMOTE_IRR))
#define RTE_MODE(e) ((uint8_t)(((e) >> 8) & 7))
enum { VERSION = 0x11 };

static struct apic_message message(uint64_t rte)
{
    return (struct apic_message){.destination = (uint32_t)(rte >> 56), .vector = (uint8_t)rte, .mode = RTE_MODE(rte),
                                 .logical = rte & RTE_LOGICAL, .level = rte & RTE_LEVEL};
}

static uint32_t gsi_of(uint32_t pin) { return pin == 2 ? 0 : pin; }

/* Send a pin's interrupt if its entry lets it. */
static void service(struct irqchip *chip, uint32_t pin)
{
    uint64_t *rte = &chip->ioapic.rte[pin];
    if (*rte & RTE_MASK)
        return;
    if ((*rte & RTE_LEVEL) && (*rte & RTE_REMOTE_IRR))
        return;
    if (RTE_MODE(*rte) == DELIVER_EXTINT)
        return; /* the vector is the PIC's: see ioapic_extint() */
    struct apic_message m = message(*rte);
    bool acknowledged = m.mode == DELIVER_FIXED || m.mode == DELIVER_LOWEST;
    if (irqchip_send(chip, &m) && m.level && acknowledged)
        *rte |= RTE_REMOTE_IRR;
}

void ioapic_reset(struct irqchip *chip)
{
    memset(&chip->ioapic, 0, sizeof chip->ioapic);
    for (unsigned i = 0; i < IOAPIC_PINS; i++)
        chip->ioapic.rte[i] = RTE_MASK;
}

void ioapic_set_pin(struct irqchip *chip, uint32_t pin, bool level)
{
    uint32_t bit = 1u << pin, old = chip->ioapic.irr;
    if (!level) {
        chip->ioapic.irr = old & ~bit;
        return;
    }
    chip->ioapic.irr = old | bit;
    if ((chip->ioapic.rte[pin] & RTE_LEVEL) || !(old & bit))
        service(chip, pin);
}

void ioapic_eoi(struct irqchip *chip, uint8_t vector)
{
    for (uint32_t pin = 0; pin < IOAPIC_PINS; pin++) {
        uint64_t *rte = &chip->ioapic.rte[pin];
        if ((*rte & RTE_VECTOR) != vector || !(*rte & RTE_LEVEL) || !(*rte & RTE_REMOTE_IRR))
            continue;
        *rte &= ~RTE_REMOTE_IRR;
        if (chip->host.eoi)
            chip->host.eoi(chip->host.ctx, gsi_of(pin)); /* may lower or raise the pin */
        if (chip->ioapic.irr & (1u << pin))
            service(chip, pin);
    }
}

bool ioapic_extint(const struct irqchip *chip, const struct lapic *l)
{
    uint64_t rte = chip->ioapic.rte[0];
    if ((rte & RTE_MASK) || RTE_MODE(rte) != DELIVER_EXTINT)
        return false;
    struct apic_message m = message(rte);
    return lapic_matches(l, &m);
}

bool ioapic_may_nmi(const struct irqchip *chip)
{
    for (unsigned i = 0; i < IOAPIC_PINS; i++) {
        uint64_t rte = chip->ioapic.rte[i];
        if (!(rte & RTE_MASK) && (RTE_MODE(rte) == DELIVER_NMI || RTE_MODE(rte) == DELIVER_INIT))
            return true;
    }
    return false;
}

uint32_t ioapic_read(struct irqchip *chip, uint32_t offset)
{
    const struct ioapic *io = &chip->ioapic;
    if (offset == 0x00)
        return io->select;
    if (offset != 0x10)
        return 0;
    switch (io->select) {
    case 0:
    case 2: /* arbitration id: loaded with the id */
        return io->id << 24;
    case 1:
        return VERSION | (IOAPIC_PINS - 1) << 16;
    }
    uint32_t pin = (io->select - 0x10) / 2;
    if (io->select < 0x10 || pin >= IOAPIC_PINS)
        return 0;
    return (uint32_t)(io->select & 1 ? io->rte[pin] >> 32 : io->rte[pin]);
}

static void write_entry(struct irqchip *chip, uint32_t pin, bool high, uint32_t value)
{
    uint64_t old = chip->ioapic.rte[pin];
    uint64_t rte = high ? (old & 0xFFFFFFFFull) | (uint64_t)value << 32 : (old & ~0xFFFFFFFFull) | value;
    rte = (rte & RTE_WRITABLE) | (old & ~RTE_WRITABLE);
    if (!(rte & RTE_LEVEL))
        rte &= ~RTE_REMOTE_IRR; /* "undefined for edge-triggered"; Linux clears a stuck one this way */
    chip->ioapic.rte[pin] = rte;
    if ((rte & RTE_LEVEL) && (chip->ioapic.irr & (1u << pin)))
        service(chip, pin);
    if (pin == 0)
        irqchip_pic_changed(chip);
}

void ioapic_write(struct irqchip *chip, uint32_t offset, uint32_t value)
{
    struct ioapic *io = &chip->ioapic;
    if (offset == 0x00) {
        io->select = value & 0xFF;
    } else if (offset == 0x10) {
        if (io->select == 0)
            io->id = (value >> 24) & 0xF;
        else if (io->select >= 0x10 && (io->select - 0x10) / 2 < IOAPIC_PINS)
            write_entry(chip, (io->select - 0x10) / 2, io->select & 1, value);
    }
}

void ioapic_save(const struct irqchip *chip, struct kvm_ioapic_state *state)
{
    memset(state, 0, sizeof *state);
    state->base_address = IOAPIC_BASE;
    state->ioregsel = chip->ioapic.select;
    state->id = chip->ioapic.id;
    state->irr = chip->ioapic.irr;
    for (unsigned i = 0; i < IOAPIC_PINS; i++)
        state->redirtbl[i].bits = chip->ioapic.rte[i];
}

void ioapic_load(struct irqchip *chip, const struct kvm_ioapic_state *state)
{
    struct ioapic *io = &chip->ioapic;
    io->select = state->ioregsel & 0xFF;
    io->id = state->id & 0xF;
    io->irr = state->irr & ((1u << IOAPIC_PINS) - 1);
    for (unsigned i = 0; i < IOAPIC_PINS; i++)
        io->rte[i] = state->redirtbl[i].bits & (RTE_WRITABLE | RTE_STATUS | RTE_REMOTE_IRR);
    irqchip_pic_changed(chip);
}
