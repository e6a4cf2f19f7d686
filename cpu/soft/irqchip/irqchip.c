/* The public interface of the irqchip, and the routes between its parts: GSIs to PIC and IOAPIC, messages to LAPICs. */
#include "soft/irqchip/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct irqchip *irqchip_create(uint32_t vcpus, const struct irqchip_host *host)
{
    if (!vcpus || vcpus > IRQCHIP_MAX_VCPUS)
        return NULL;
    struct irqchip *chip = calloc(1, sizeof *chip);
    if (!chip)
        return NULL;
    chip->host = *host;
    chip->vcpus = vcpus;
    if (host->threads) {
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
        pthread_mutex_init(&chip->lock, &attributes);
        pthread_mutexattr_destroy(&attributes);
    }
    pic_reset(chip);
    ioapic_reset(chip);
    pit_reset(chip);
    for (uint32_t i = 0; i < vcpus; i++) {
        chip->lapics[i].chip = chip;
        chip->lapics[i].index = i;
        lapic_reset(&chip->lapics[i], false);
    }
    return chip;
}

void irqchip_destroy(struct irqchip *chip)
{
    if (chip->host.threads)
        pthread_mutex_destroy(&chip->lock);
    free(chip);
}

void irqchip_lock(struct irqchip *chip)
{
    if (chip->host.threads)
        pthread_mutex_lock(&chip->lock);
}
void irqchip_unlock(struct irqchip *chip)
{
    if (chip->host.threads)
        pthread_mutex_unlock(&chip->lock);
}
static struct irqchip *locked(struct irqchip *chip)
{
    irqchip_lock(chip);
    return chip;
}
static void unlock(struct irqchip **chip) { irqchip_unlock(*chip); }
/* To the end of the function. */
#define ALONE_IN(chip) __attribute__((cleanup(unlock), unused)) struct irqchip *guard_ = locked(chip)

void irqchip_without_pit(struct irqchip *chip) { chip->no_pit = true; }

void irqchip_reset_lapic(struct irqchip *chip, uint32_t index, bool init)
{
    ALONE_IN(chip);
    lapic_reset(&chip->lapics[index], init);
}

/* ---- routes ---- */
#define ICR_LOGICAL_OR_SHORTHAND (1u << 11 | 3u << 18)

void irqchip_wake(struct irqchip *chip, uint32_t index) { chip->host.wake(chip->host.ctx, index); }

bool irqchip_accepts_pic(const struct irqchip *chip, const struct lapic *l)
{
    if (!lapic_hw_enabled(l))
        return l->index == 0; /* SDM 11.4.3: LINT0 is the BSP's INTR pin then */
    return lapic_lint0_extint(l) || ioapic_extint(chip, l);
}

void irqchip_pic_changed(struct irqchip *chip)
{
    if (!chip->pic_output)
        return;
    for (uint32_t i = 0; i < chip->vcpus; i++)
        if (irqchip_accepts_pic(chip, &chip->lapics[i]))
            irqchip_wake(chip, i);
}

/* Lowest priority: the LAPIC with the lowest arbitration priority; among equals one chosen by the vector, so that
 * interrupts spread without a state of their own. */
static struct lapic *arbitrate(struct irqchip *chip, const struct apic_message *m)
{
    struct lapic *best = NULL;
    uint8_t best_priority = 0;
    for (uint32_t k = 0; k < chip->vcpus; k++) {
        struct lapic *l = &chip->lapics[(m->vector + k) % chip->vcpus];
        if (!lapic_matches(l, m) || !lapic_enabled(l))
            continue;
        uint8_t priority = lapic_arbitration(l);
        if (!best || priority < best_priority) {
            best = l;
            best_priority = priority;
        }
    }
    return best;
}

bool irqchip_send(struct irqchip *chip, const struct apic_message *m)
{
    bool taken = false;
    if (m->mode == DELIVER_LOWEST) {
        struct lapic *l = arbitrate(chip, m);
        return l && lapic_accept(l, m->mode, m->vector, m->level);
    }
    for (uint32_t i = 0; i < chip->vcpus; i++)
        if (lapic_matches(&chip->lapics[i], m))
            taken |= lapic_accept(&chip->lapics[i], m->mode, m->vector, m->level);
    return taken;
}

int irqchip_multicast(struct irqchip *chip, uint64_t low, uint64_t high, unsigned width, uint32_t first, uint32_t icr)
{
    ALONE_IN(chip);
    uint8_t vector = (uint8_t)icr, mode = (icr >> 8) & 7;
    int reached = 0;
    if (icr & ICR_LOGICAL_OR_SHORTHAND)
        return -EINVAL;
    for (uint32_t i = 0; i < chip->vcpus; i++) {
        uint64_t bit = (uint64_t)i - first; /* far out of range below `first` */
        uint64_t map = bit < width ? low >> bit : bit < 2 * width ? high >> (bit - width) : 0;
        if (map & 1)
            reached += lapic_accept(&chip->lapics[i], mode, vector, false);
    }
    return reached;
}

void irqchip_set_gsi(struct irqchip *chip, uint32_t gsi, bool level, uint64_t now)
{
    ALONE_IN(chip);
    (void)now;
    if (gsi >= IOAPIC_PINS || gsi == PIC_CASCADE)
        return;
    if (gsi < 16)
        pic_set_irq(chip, gsi, level);
    ioapic_set_pin(chip, gsi ? gsi : 2, level);
}

/* SDM 11.11: message address and data. */
void irqchip_msi(struct irqchip *chip, uint64_t address, uint32_t data)
{
    ALONE_IN(chip);
    struct apic_message m = {.destination = (address >> 12) & 0xFF, .vector = (uint8_t)data, .mode = (data >> 8) & 7,
                             .logical = address & 4, .level = data & 0x8000};
    if (address >> 20 != 0xFEE)
        return;
    if ((address & 8) && m.mode == DELIVER_FIXED)
        m.mode = DELIVER_LOWEST; /* redirection hint */
    if (m.mode == DELIVER_SIPI || m.mode == DELIVER_EXTINT)
        return; /* not for messages */
    if (m.level && !(data & 0x4000))
        return; /* de-assert */
    irqchip_send(chip, &m);
}

int irqchip_pending(struct irqchip *chip, uint32_t index)
{
    ALONE_IN(chip);
    struct lapic *l = &chip->lapics[index];
    if (chip->pic_output && irqchip_accepts_pic(chip, l))
        return pic_peek(chip);
    return lapic_pending(l);
}

int irqchip_acknowledge(struct irqchip *chip, uint32_t index)
{
    ALONE_IN(chip);
    struct lapic *l = &chip->lapics[index];
    bool from_pic = irqchip_accepts_pic(chip, l) && (chip->pic_output || !lapic_hw_enabled(l));
    return from_pic ? pic_acknowledge(chip) : lapic_acknowledge(l);
}

bool irqchip_may_nmi(const struct irqchip *chip)
{
    if (ioapic_may_nmi(chip))
        return true;
    for (uint32_t i = 0; i < chip->vcpus; i++)
        if (lapic_lint0_nmi(&chip->lapics[i]))
            return true;
    return false;
}

uint8_t irqchip_get_tpr(struct irqchip *chip, uint32_t index)
{
    ALONE_IN(chip);
    return lapic_tpr(&chip->lapics[index]);
}

void irqchip_set_tpr(struct irqchip *chip, uint32_t index, uint8_t tpr)
{
    ALONE_IN(chip);
    lapic_set_tpr(&chip->lapics[index], tpr);
}

/* ---- accesses ---- */
bool irqchip_msr_read(struct irqchip *chip, uint32_t index, uint32_t msr, uint64_t *value, uint64_t now)
{
    ALONE_IN(chip);
    return lapic_msr_read(&chip->lapics[index], msr, value, now);
}

bool irqchip_msr_write(struct irqchip *chip, uint32_t index, uint32_t msr, uint64_t value, uint64_t now)
{
    ALONE_IN(chip);
    return lapic_msr_write(&chip->lapics[index], msr, value, now, false);
}

bool irqchip_restore_msr(struct irqchip *chip, uint32_t index, uint32_t msr, uint64_t value, uint64_t now)
{
    ALONE_IN(chip);
    return lapic_msr_write(&chip->lapics[index], msr, value, now, true);
}

static bool in_lapic(const struct lapic *l, uint64_t gpa)
{
    return lapic_hw_enabled(l) && !(l->base & 1u << 10) && gpa >> 12 == (l->base & 0xFFFFFFFFFF000ull) >> 12;
}

static bool in_ioapic(uint64_t gpa) { return gpa >= IOAPIC_BASE && gpa < IOAPIC_BASE + 0x100; }

bool irqchip_mmio_read(struct irqchip *chip, uint32_t index, uint64_t gpa, uint8_t size, uint64_t *value, uint64_t now)
{
    ALONE_IN(chip);
    struct lapic *l = &chip->lapics[index];
    if (in_lapic(l, gpa))
        return lapic_mmio_read(l, gpa & 0xFFF, size, value, now);
    if (!in_ioapic(gpa))
        return false;
    uint32_t offset = gpa & 0xFF;
    *value = (offset & 15) + size <= 8 ? ioapic_read(chip, offset & ~3u) >> (8 * (offset & 3)) : 0;
    if (size < 4)
        *value &= (1u << (8 * size)) - 1;
    return true;
}

bool irqchip_mmio_write(struct irqchip *chip, uint32_t index, uint64_t gpa, uint8_t size, uint64_t value, uint64_t now)
{
    ALONE_IN(chip);
    struct lapic *l = &chip->lapics[index];
    if (in_lapic(l, gpa)) {
        lapic_mmio_write(l, gpa & 0xFFF, size, value, now);
        return true;
    }
    if (!in_ioapic(gpa))
        return false;
    /* The data window takes 32 bits only; the index register also a byte. */
    if (!(gpa & 3) && (size >= 4 || !(gpa & 0xFF)))
        ioapic_write(chip, gpa & 0xFF, (uint32_t)value);
    return true;
}

static bool is_pic(uint16_t port) { return (port & ~0x81) == 0x20 || (port & ~1) == 0x4D0; }
static bool is_pit(const struct irqchip *chip, uint16_t port)
{
    return !chip->no_pit && ((port & ~3) == 0x40 || port == 0x61);
}

/* Wider accesses reach the byte ports one after the other; a byte that nobody answers reads as ones. */
bool irqchip_port_read(struct irqchip *chip, uint16_t port, uint8_t size, uint64_t *value, uint64_t now)
{
    ALONE_IN(chip);
    if (!is_pic(port) && !is_pit(chip, port))
        return false;
    *value = 0;
    for (unsigned i = 0; i < size; i++) {
        uint16_t p = (uint16_t)(port + i);
        uint64_t byte = is_pic(p) ? pic_read(chip, p) : is_pit(chip, p) ? pit_read(chip, p, now) : 0xFF;
        *value |= byte << (8 * i);
    }
    return true;
}

bool irqchip_port_write(struct irqchip *chip, uint16_t port, uint8_t size, uint64_t value, uint64_t now)
{
    ALONE_IN(chip);
    if (!is_pic(port) && !is_pit(chip, port))
        return false;
    for (unsigned i = 0; i < size; i++) {
        uint16_t p = (uint16_t)(port + i);
        if (is_pic(p))
            pic_write(chip, p, (uint8_t)(value >> (8 * i)));
        else if (is_pit(chip, p))
            pit_write(chip, p, (uint8_t)(value >> (8 * i)), now);
    }
    return true;
}

/* ---- time ---- */
uint64_t irqchip_next_event(struct irqchip *chip)
{
    ALONE_IN(chip);
    uint64_t next = pit_next_event(chip);
    for (uint32_t i = 0; i < chip->vcpus; i++) {
        uint64_t at = lapic_next_event(&chip->lapics[i]);
        if (at < next)
            next = at;
    }
    return next;
}

void irqchip_advance(struct irqchip *chip, uint64_t now)
{
    ALONE_IN(chip);
    pit_advance(chip, now);
    for (uint32_t i = 0; i < chip->vcpus; i++)
        lapic_advance(&chip->lapics[i], now);
}

uint64_t irqchip_next_event_of(struct irqchip *chip, uint32_t index)
{
    ALONE_IN(chip);
    uint64_t pit = pit_next_event(chip), own = lapic_next_event(&chip->lapics[index]);
    return pit < own ? pit : own;
}

void irqchip_advance_of(struct irqchip *chip, uint32_t index, uint64_t now)
{
    ALONE_IN(chip);
    pit_advance(chip, now);
    lapic_advance(&chip->lapics[index], now);
}

void irqchip_clock_moved(struct irqchip *chip, uint64_t before, uint64_t now)
{
    ALONE_IN(chip);
    pit_clock_moved(chip, before, now);
    for (uint32_t i = 0; i < chip->vcpus; i++)
        lapic_clock_moved(&chip->lapics[i], before, now);
}

uint32_t irqchip_levels(const struct irqchip *chip)
{
    uint32_t pins = chip->ioapic.irr;
    return (pins & ~5u) | (pins >> 2 & 1);
}

/* ---- state ---- */
void irqchip_get_lapic(struct irqchip *chip, uint32_t index, struct kvm_lapic_state *state, uint64_t now)
{
    ALONE_IN(chip);
    irqchip_advance(chip, now);
    lapic_save(&chip->lapics[index], state, now);
}

void irqchip_set_lapic(struct irqchip *chip, uint32_t index, const struct kvm_lapic_state *state, uint64_t now)
{
    ALONE_IN(chip);
    lapic_load(&chip->lapics[index], state, now);
}

int irqchip_get(struct irqchip *chip, struct kvm_irqchip *state)
{
    ALONE_IN(chip);
    uint32_t id = state->chip_id;
    memset(&state->chip, 0, sizeof state->chip);
    if (id == KVM_IRQCHIP_IOAPIC)
        ioapic_save(chip, &state->chip.ioapic);
    else if (id <= KVM_IRQCHIP_PIC_SLAVE)
        state->chip.pic = chip->pics[id];
    else
        return -EINVAL;
    return 0;
}

int irqchip_set(struct irqchip *chip, const struct kvm_irqchip *state, uint64_t now)
{
    ALONE_IN(chip);
    (void)now;
    if (state->chip_id == KVM_IRQCHIP_IOAPIC) {
        ioapic_load(chip, &state->chip.ioapic);
        return 0;
    }
    return state->chip_id <= KVM_IRQCHIP_PIC_SLAVE ? pic_load(chip, state->chip_id, &state->chip.pic) : -EINVAL;
}

void irqchip_get_pit(struct irqchip *chip, struct kvm_pit_state2 *state, uint64_t now)
{
    ALONE_IN(chip);
    irqchip_advance(chip, now);
    pit_save(chip, state, now);
}

void irqchip_set_pit(struct irqchip *chip, const struct kvm_pit_state2 *state, uint64_t now)
{
    ALONE_IN(chip);
    pit_load(chip, state, now);
}
