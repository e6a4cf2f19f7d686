/* The 8254 programmable interval timer and port 0x61 (8254 data sheet; "OUT", "GATE", "CLK", "CR" are its words).
 *
 * Counters are computed from the time at which they were loaded, in whole CLK ticks of 1.193182 MHz since time 0; nothing
 * runs between accesses. The pulse that moves CR to the counting element is not counted. A count written to a running counter in
 * mode 2 or 3 is loaded at the end of the period (in mode 3 hardware does it after the half period).
 *
 * State: in struct kvm_pit_state2 count_load_time is host time, which means nothing to another host. It is saved here as
 * minus the ns since the load; a positive one (KVM's) reloads the counter, as KVM itself does. reserved[0..2] hold
 * counts that are written but not yet loaded. A counter that was never programmed has mode 0xFF, as in KVM, which gives it a
 * count of 65536 but does not let it run. */
#include "soft/irqchip/internal.h"

#include <string.h>

#define PIT_HZ 1193182
#define NS 1000000000
enum { ACCESS_LSB = 1, ACCESS_MSB, ACCESS_WORD, ACCESS_WORD_MSB }; /* KVM's RW_STATE_* */
enum { UNPROGRAMMED = 0xFF };
enum { REFRESH_SHIFT = 14 }; /* port 0x61 bit 4 toggles each 2^14 ns: close to the 15.085 us of DRAM refresh */

static int64_t tick_at(uint64_t ns) { return (int64_t)((unsigned __int128)ns * PIT_HZ / NS); }

/* The first ns at which tick_at() is `tick`. */
static uint64_t ns_of(int64_t tick) { return (uint64_t)(((unsigned __int128)(uint64_t)tick * NS + PIT_HZ - 1) / PIT_HZ); }

static bool stops_on_gate(const struct pit_channel *c) { return c->mode != 1 && c->mode != 5; }
static bool frozen(const struct pit_channel *c) { return !c->gate && stops_on_gate(c); }
static bool periodic(const struct pit_channel *c) { return c->mode == 2 || c->mode == 3; }
static int64_t elapsed(const struct pit_channel *c, int64_t tick) { return (frozen(c) ? c->frozen_tick : tick) - c->load_tick; }

/* Begin the period that `tick` is in, with a count that was waiting for it. */
static void roll(struct pit_channel *c, int64_t tick)
{
    if (!periodic(c) || !c->count || frozen(c))
        return;
    int64_t gone = tick - c->load_tick;
    if (c->next_count && gone >= c->count) {
        c->load_tick += c->count;
        c->count = c->next_count;
        c->next_count = 0;
        gone = tick - c->load_tick;
    }
    if (gone >= c->count)
        c->load_tick += gone / c->count * c->count;
}

static bool output(const struct pit_channel *c, int64_t tick)
{
    int64_t gone = elapsed(c, tick);
    if (!c->count)
        return c->mode != 0;
    switch (c->mode) {
    case 0:
    case 1:
        return gone >= c->count;
    case 2:
        return !c->gate || gone % c->count != c->count - 1;
    case 3:
        return !c->gate || gone % c->count < (c->count + 1) / 2;
    default:
        return gone != c->count;
    }
}

static uint16_t counter(const struct pit_channel *c, int64_t tick)
{
    int64_t gone = elapsed(c, tick), value;
    int64_t modulus = c->bcd ? 10000 : 0x10000;
    if (!c->count)
        return 0;
    if (c->mode == 2) {
        value = c->count - gone % c->count;
    } else if (c->mode == 3) { /* counts by two; odd counts start one lower, their high half is one tick longer */
        int64_t phase = gone % c->count, high = (c->count + 1) / 2;
        value = (c->count & ~1u) - 2 * (phase < high ? phase : phase - high);
    } else {
        value = c->count - gone;
    }
    value = (value % modulus + modulus) % modulus;
    if (c->bcd)
        value = value % 10 | value / 10 % 10 << 4 | value / 100 % 10 << 8 | value / 1000 << 12;
    return (uint16_t)value;
}

/* The first rising edge of OUT after `tick`. */
static int64_t next_rise(const struct pit_channel *c, int64_t tick)
{
    if (!c->count)
        return INT64_MAX;
    int64_t rise = c->load_tick + c->count + (c->mode >= 4);
    if (rise > tick)
        return rise;
    if (!periodic(c))
        return INT64_MAX;
    return rise + ((tick - rise) / c->count + 1) * c->count;
}

static void schedule(struct irqchip *chip, int64_t tick) { chip->pit.rise_tick = next_rise(&chip->pit.channels[0], tick); }

static void write_count(struct irqchip *chip, unsigned n, uint16_t raw, int64_t tick)
{
    struct pit_channel *c = &chip->pit.channels[n];
    uint32_t count = raw;
    if (c->bcd) {
        count = 0;
        for (int shift = 12; shift >= 0; shift -= 4)
            count = count * 10 + (raw >> shift & 15);
    }
    if (!count)
        count = c->bcd ? 10000 : 0x10000;
    if (!stops_on_gate(c) || (periodic(c) && c->count)) {
        c->next_count = count;
    } else {
        c->count = count;
        c->next_count = 0;
        c->load_tick = c->frozen_tick = tick;
    }
    if (n == 0)
        schedule(chip, tick);
}

static void write_channel(struct irqchip *chip, unsigned n, uint8_t value, int64_t tick)
{
    struct pit_channel *c = &chip->pit.channels[n];
    c->programmed = true;
    switch (c->write_state) {
    case ACCESS_MSB:
        write_count(chip, n, (uint16_t)(value << 8), tick);
        break;
    case ACCESS_WORD:
        c->write_latch = value;
        c->write_state = ACCESS_WORD_MSB;
        if (c->mode == 0) { /* "writing the first byte disables counting, OUT is set low immediately" */
            c->count = 0;
            if (n == 0)
                schedule(chip, tick);
        }
        break;
    case ACCESS_WORD_MSB:
        c->write_state = ACCESS_WORD;
        write_count(chip, n, (uint16_t)(value << 8 | c->write_latch), tick);
        break;
    default:
        write_count(chip, n, value, tick);
    }
}

static void latch_count(struct pit_channel *c, int64_t tick)
{
    if (c->count_latched)
        return; /* until it is read, later latches are ignored */
    c->latched_count = counter(c, tick);
    c->count_latched = c->rw_mode;
}

static void latch_status(struct pit_channel *c, int64_t tick)
{
    if (c->status_latched)
        return;
    bool null_count = !c->count || c->next_count;
    c->status = (uint8_t)(output(c, tick) << 7 | null_count << 6 | c->rw_mode << 4 | c->mode << 1 | c->bcd);
    c->status_latched = 1;
}

static void write_control(struct irqchip *chip, uint8_t value, int64_t tick)
{
    unsigned n = value >> 6, access = (value >> 4) & 3;
    if (n == 3) { /* read-back */
        for (unsigned i = 0; i < 3; i++) {
            if (!(value & (2u << i)))
                continue;
            if (!(value & 0x20))
                latch_count(&chip->pit.channels[i], tick);
            if (!(value & 0x10))
                latch_status(&chip->pit.channels[i], tick);
        }
        return;
    }
    struct pit_channel *c = &chip->pit.channels[n];
    if (!access) {
        latch_count(c, tick);
        return;
    }
    c->rw_mode = c->read_state = c->write_state = (uint8_t)access;
    c->programmed = true;
    c->mode = (value >> 1) & 7;
    if (c->mode > 5)
        c->mode &= 3; /* 6 and 7 are 2 and 3 */
    c->bcd = value & 1;
    c->count = c->next_count = 0;
    c->count_latched = c->status_latched = 0;
    c->load_tick = c->frozen_tick = tick;
    if (n == 0) {
        irqchip_set_gsi(chip, 0, false, 0);
        schedule(chip, tick);
    }
}

static uint8_t read_channel(struct pit_channel *c, int64_t tick)
{
    if (c->status_latched) {
        c->status_latched = 0;
        return c->status;
    }
    if (c->count_latched) {
        switch (c->count_latched) {
        case ACCESS_MSB:
            c->count_latched = 0;
            return (uint8_t)(c->latched_count >> 8);
        case ACCESS_WORD:
            c->count_latched = ACCESS_MSB;
            return (uint8_t)c->latched_count;
        default:
            c->count_latched = 0;
            return (uint8_t)c->latched_count;
        }
    }
    uint16_t value = counter(c, tick);
    switch (c->read_state) {
    case ACCESS_MSB:
        return (uint8_t)(value >> 8);
    case ACCESS_WORD:
        c->read_state = ACCESS_WORD_MSB;
        return (uint8_t)value;
    case ACCESS_WORD_MSB:
        c->read_state = ACCESS_WORD;
        return (uint8_t)(value >> 8);
    default:
        return (uint8_t)value;
    }
}

static void set_gate(struct pit_channel *c, bool gate, int64_t tick)
{
    if (gate == c->gate)
        return;
    if (!gate) {
        c->frozen_tick = tick;
        c->gate = false;
        return;
    }
    if (c->mode == 0 || c->mode == 4) {
        c->load_tick += tick - c->frozen_tick;
    } else { /* a rising edge triggers modes 1 and 5 and restarts modes 2 and 3 */
        if (c->next_count)
            c->count = c->next_count;
        c->next_count = 0;
        c->load_tick = tick;
    }
    c->gate = true;
}

void pit_reset(struct irqchip *chip)
{
    memset(&chip->pit, 0, sizeof chip->pit);
    for (unsigned i = 0; i < 3; i++) {
        struct pit_channel *c = &chip->pit.channels[i];
        c->gate = i != 2;
        c->rw_mode = c->read_state = c->write_state = ACCESS_WORD;
    }
    chip->pit.rise_tick = INT64_MAX;
}

uint8_t pit_read(struct irqchip *chip, uint16_t port, uint64_t now)
{
    int64_t tick = tick_at(now);
    struct pit_channel *c = &chip->pit.channels[port == 0x61 ? 2 : port & 3];
    pit_advance(chip, now);
    if (port == 0x43)
        return 0; /* write only */
    roll(c, tick);
    if (port != 0x61)
        return read_channel(c, tick);
    return (uint8_t)(c->gate | chip->pit.speaker << 1 | (now >> REFRESH_SHIFT & 1) << 4 | output(c, tick) << 5);
}

void pit_write(struct irqchip *chip, uint16_t port, uint8_t value, uint64_t now)
{
    int64_t tick = tick_at(now);
    pit_advance(chip, now);
    for (unsigned i = 0; i < 3; i++)
        roll(&chip->pit.channels[i], tick);
    if (port == 0x61) {
        chip->pit.speaker = value & 2;
        set_gate(&chip->pit.channels[2], value & 1, tick);
    } else if (port == 0x43) {
        write_control(chip, value, tick);
    } else {
        write_channel(chip, port & 3, value, tick);
    }
}

uint64_t pit_next_event(const struct irqchip *chip)
{
    return chip->pit.rise_tick == INT64_MAX ? IRQCHIP_NEVER : ns_of(chip->pit.rise_tick);
}

/* Edges that were missed together are one interrupt: the line has no more to say. */
void pit_advance(struct irqchip *chip, uint64_t now)
{
    int64_t tick = tick_at(now);
    if (chip->pit.rise_tick > tick)
        return;
    roll(&chip->pit.channels[0], tick);
    schedule(chip, tick);
    irqchip_set_gsi(chip, 0, false, now);
    irqchip_set_gsi(chip, 0, true, now);
}

void pit_clock_moved(struct irqchip *chip, uint64_t before, uint64_t now)
{
    int64_t ticks = tick_at(now) - tick_at(before);
    for (unsigned i = 0; i < 3; i++) {
        chip->pit.channels[i].load_tick += ticks;
        chip->pit.channels[i].frozen_tick += ticks;
    }
    schedule(chip, tick_at(now));
}

void pit_save(struct irqchip *chip, struct kvm_pit_state2 *state, uint64_t now)
{
    int64_t tick = tick_at(now);
    pit_advance(chip, now);
    memset(state, 0, sizeof *state);
    for (unsigned i = 0; i < 3; i++) {
        struct pit_channel *c = &chip->pit.channels[i];
        roll(c, tick);
        int64_t gone = elapsed(c, tick);
        state->channels[i] = (struct kvm_pit_channel_state){
            .count = c->count, .latched_count = c->latched_count, .count_latched = c->count_latched,
            .status_latched = c->status_latched, .status = c->status, .read_state = c->read_state,
            .write_state = c->write_state, .write_latch = c->write_latch, .rw_mode = c->rw_mode,
            .mode = c->programmed ? c->mode : UNPROGRAMMED,
            .bcd = c->bcd, .gate = c->gate, .count_load_time = gone > 0 ? -(int64_t)ns_of(gone) : 0,
        };
        state->reserved[i] = c->next_count;
    }
    state->flags = chip->pit.flags | (chip->pit.speaker ? KVM_PIT_FLAGS_SPEAKER_DATA_ON : 0);
}

static uint8_t in_range(uint8_t value, uint8_t low, uint8_t high, uint8_t otherwise)
{
    return value >= low && value <= high ? value : otherwise;
}

void pit_load(struct irqchip *chip, const struct kvm_pit_state2 *state, uint64_t now)
{
    int64_t tick = tick_at(now);
    for (unsigned i = 0; i < 3; i++) {
        const struct kvm_pit_channel_state *s = &state->channels[i];
        struct pit_channel *c = &chip->pit.channels[i];
        bool programmed = s->mode != UNPROGRAMMED;
        *c = (struct pit_channel){
            .programmed = programmed, .count = !programmed ? 0 : s->count > 0x10000 ? 0x10000 : s->count,
            .next_count = state->reserved[i] > 0x10000 ? 0x10000 : state->reserved[i],
            .latched_count = s->latched_count, .count_latched = in_range(s->count_latched, 0, ACCESS_WORD_MSB, 0),
            .status_latched = s->status_latched != 0, .status = s->status, .write_latch = s->write_latch,
            .read_state = in_range(s->read_state, ACCESS_LSB, ACCESS_WORD_MSB, ACCESS_WORD),
            .write_state = in_range(s->write_state, ACCESS_LSB, ACCESS_WORD_MSB, ACCESS_WORD),
            .rw_mode = in_range(s->rw_mode, ACCESS_LSB, ACCESS_WORD, ACCESS_WORD),
            .mode = !programmed ? 0 : in_range(s->mode, 0, 5, s->mode & 3), .bcd = s->bcd != 0, .gate = i != 2 || s->gate != 0,
        };
        /* Centuries ago is as good as any earlier time, and stays clear of overflow. */
        int64_t gone = s->count_load_time > 0 ? 0 : s->count_load_time < -(INT64_MAX >> 1) ? INT64_MAX >> 1 : -s->count_load_time;
        c->frozen_tick = tick;
        c->load_tick = tick - tick_at((uint64_t)gone);
    }
    chip->pit.flags = state->flags & ~(uint32_t)KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    chip->pit.speaker = state->flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    schedule(chip, tick);
}
