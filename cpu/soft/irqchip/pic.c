/* Two cascaded 8259A interrupt controllers with the PIIX edge/level registers (8259A data sheet; "ICW" and "OCW" are its words).
 *
 * An edge-triggered request stays latched until it is acknowledged, also when the line falls (as KVM has it). */
#include "soft/irqchip/internal.h"

#include <errno.h>
#include <string.h>

enum { OCW2_ROTATE = 4, OCW2_SPECIFIC = 2, OCW2_EOI = 1 };
enum { INIT_DONE, INIT_ICW2, INIT_ICW3, INIT_ICW4 };
static const uint8_t ELCR_MASK[2] = {0xF8, 0xDE}; /* IRQ 0, 1, 2, 8 and 13 are always edge-triggered */

/* The place (0 highest) of the most urgent request in a set of IR lines; 8 if the set is empty. */
static unsigned priority_of(const struct kvm_pic_state *s, uint8_t set)
{
    unsigned place = 0;
    if (!set)
        return 8;
    while (!(set & (1u << ((place + s->priority_add) & 7))))
        place++;
    return place;
}

/* The IR line to be acknowledged next, or -1. */
static int requested(const struct kvm_pic_state *s, bool master)
{
    unsigned place = priority_of(s, s->irr & ~s->imr);
    uint8_t in_service = s->isr;
    if (place == 8)
        return -1;
    if (s->special_mask)
        in_service &= (uint8_t)~s->imr;
    if (s->special_fully_nested_mode && master)
        in_service &= (uint8_t) ~(1u << PIC_CASCADE); /* the slave may interrupt its own service */
    return place < priority_of(s, in_service) ? (int)((place + s->priority_add) & 7) : -1;
}

static void drive(struct kvm_pic_state *s, unsigned line, bool level)
{
    uint8_t bit = (uint8_t)(1u << line);
    if (s->elcr & bit) {
        s->irr = level ? s->irr | bit : s->irr & (uint8_t)~bit;
    } else if (level && !(s->last_irr & bit)) {
        s->irr |= bit;
    }
    s->last_irr = level ? s->last_irr | bit : s->last_irr & (uint8_t)~bit;
}

static void update(struct irqchip *chip)
{
    drive(&chip->pics[0], PIC_CASCADE, requested(&chip->pics[1], false) >= 0);
    bool output = requested(&chip->pics[0], true) >= 0;
    bool rise = output && !chip->pic_output;
    chip->pic_output = output;
    if (!output)
        return;
    if (rise)
        for (uint32_t i = 0; i < chip->vcpus; i++)
            lapic_lint0_rise(&chip->lapics[i]);
    irqchip_pic_changed(chip);
}

static void finish(struct irqchip *chip, unsigned which, unsigned line)
{
    struct kvm_pic_state *s = &chip->pics[which];
    s->isr &= (uint8_t) ~(1u << line);
    if ((s->elcr & (1u << line)) && chip->host.eoi)
        chip->host.eoi(chip->host.ctx, which * 8 + line);
}

static void take(struct irqchip *chip, unsigned which, unsigned line)
{
    struct kvm_pic_state *s = &chip->pics[which];
    uint8_t bit = (uint8_t)(1u << line);
    s->isr |= bit;
    if (!(s->elcr & bit))
        s->irr &= (uint8_t)~bit;
    if (s->auto_eoi) {
        if (s->rotate_on_auto_eoi)
            s->priority_add = (uint8_t)((line + 1) & 7);
        finish(chip, which, line);
    }
}

void pic_reset(struct irqchip *chip)
{
    memset(chip->pics, 0, sizeof chip->pics);
    for (unsigned i = 0; i < 2; i++)
        chip->pics[i].elcr_mask = ELCR_MASK[i];
    chip->pic_output = false;
}

void pic_set_irq(struct irqchip *chip, uint32_t irq, bool level)
{
    if (irq == PIC_CASCADE)
        return;
    drive(&chip->pics[irq >> 3], irq & 7, level);
    update(chip);
}

int pic_peek(const struct irqchip *chip)
{
    int line = requested(&chip->pics[0], true);
    if (line < 0)
        return -1;
    if (line != PIC_CASCADE)
        return chip->pics[0].irq_base + line;
    line = requested(&chip->pics[1], false);
    return chip->pics[1].irq_base + (line < 0 ? 7 : line);
}

int pic_acknowledge(struct irqchip *chip)
{
    int line = requested(&chip->pics[0], true), vector;
    if (line < 0)
        return chip->pics[0].irq_base + 7; /* the request is gone: "the 8259A will issue an interrupt level 7" */
    take(chip, 0, (unsigned)line);
    vector = chip->pics[0].irq_base + line;
    if (line == PIC_CASCADE) {
        line = requested(&chip->pics[1], false);
        if (line >= 0)
            take(chip, 1, (unsigned)line);
        vector = chip->pics[1].irq_base + (line < 0 ? 7 : line);
        drive(&chip->pics[0], PIC_CASCADE, false); /* INT falls during INTA; update() raises it again */
    }
    update(chip);
    return vector;
}

static void ocw2(struct irqchip *chip, unsigned which, uint8_t value)
{
    struct kvm_pic_state *s = &chip->pics[which];
    unsigned command = value >> 5, line = value & 7;
    if (!(command & OCW2_EOI)) {
        if (command == (OCW2_ROTATE | OCW2_SPECIFIC))
            s->priority_add = (uint8_t)((line + 1) & 7);
        else if (command != OCW2_SPECIFIC)
            s->rotate_on_auto_eoi = command == OCW2_ROTATE;
        return;
    }
    if (!(command & OCW2_SPECIFIC)) {
        /* In special mask mode a non-specific EOI does not reach levels that are masked. */
        unsigned place = priority_of(s, s->special_mask ? s->isr & ~s->imr : s->isr);
        if (place == 8)
            return;
        line = (place + s->priority_add) & 7;
    }
    if (command & OCW2_ROTATE)
        s->priority_add = (uint8_t)((line + 1) & 7);
    if (s->isr & (1u << line))
        finish(chip, which, line);
}

static void write_command(struct irqchip *chip, unsigned which, uint8_t value)
{
    struct kvm_pic_state *s = &chip->pics[which];
    if (value & 0x10) { /* ICW1; bit 3 (LTIM) is ELCR's here, bit 1 (single) is never so in a PC. last_irr stays: "an IR
                         * input must make a low-to-high transition" after it */
        s->irr &= s->elcr;
        s->imr = s->isr = s->priority_add = 0;
        s->special_mask = s->read_reg_select = s->poll = 0;
        s->auto_eoi = s->rotate_on_auto_eoi = s->special_fully_nested_mode = 0;
        s->init4 = value & 1;
        s->init_state = INIT_ICW2;
    } else if (value & 0x08) { /* OCW3 */
        s->poll = (value >> 2) & 1;
        if (value & 0x02)
            s->read_reg_select = value & 1;
        if (value & 0x40)
            s->special_mask = (value >> 5) & 1;
    } else {
        ocw2(chip, which, value);
    }
}

static void write_data(struct kvm_pic_state *s, uint8_t value)
{
    switch (s->init_state) {
    case INIT_DONE:
        s->imr = value;
        break;
    case INIT_ICW2:
        s->irq_base = value & 0xF8;
        s->init_state = INIT_ICW3;
        break;
    case INIT_ICW3: /* the wiring of the cascade is fixed */
        s->init_state = s->init4 ? INIT_ICW4 : INIT_DONE;
        break;
    default:
        s->special_fully_nested_mode = (value >> 4) & 1;
        s->auto_eoi = (value >> 1) & 1;
        s->init_state = INIT_DONE;
    }
}

void pic_write(struct irqchip *chip, uint16_t port, uint8_t value)
{
    if (port == 0x4D0 || port == 0x4D1) {
        chip->pics[port & 1].elcr = value & ELCR_MASK[port & 1];
    } else {
        unsigned which = port >> 7;
        if (port & 1)
            write_data(&chip->pics[which], value);
        else
            write_command(chip, which, value);
    }
    update(chip);
}

static uint8_t poll(struct irqchip *chip, unsigned which)
{
    int line = requested(&chip->pics[which], which == 0);
    chip->pics[which].poll = 0;
    if (line < 0)
        return 0;
    take(chip, which, (unsigned)line);
    if (which == 0 && line == PIC_CASCADE)
        drive(&chip->pics[0], PIC_CASCADE, false);
    update(chip);
    return (uint8_t)(0x80 | line);
}

uint8_t pic_read(struct irqchip *chip, uint16_t port)
{
    if (port == 0x4D0 || port == 0x4D1)
        return chip->pics[port & 1].elcr;
    unsigned which = port >> 7;
    const struct kvm_pic_state *s = &chip->pics[which];
    if (s->poll)
        return poll(chip, which);
    if (port & 1)
        return s->imr;
    return s->read_reg_select ? s->isr : s->irr;
}

int pic_load(struct irqchip *chip, unsigned which, const struct kvm_pic_state *state)
{
    struct kvm_pic_state s = *state;
    if (s.init_state > INIT_ICW4)
        return -EINVAL;
    s.priority_add &= 7;
    s.irq_base &= 0xF8;
    s.elcr &= ELCR_MASK[which];
    s.elcr_mask = ELCR_MASK[which];
    chip->pics[which] = s;
    /* No edges: what the lines did before is part of the state. */
    chip->pic_output = requested(&chip->pics[0], true) >= 0;
    if (chip->pic_output)
        irqchip_pic_changed(chip);
    return 0;
}
