/* Tests of the software core's irqchip against the data sheets: `irqchip_test NAME` runs TEST(NAME). */
#include "soft/irqchip/irqchip.h"

#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VCPUS = 4, LOG_SIZE = 1 << 16 };
struct world {
    struct irqchip *chip;
    uint64_t now;
    uint32_t woken, nmis[VCPUS], inits[VCPUS], sipis[VCPUS], eois[24];
    uint8_t sipi_vector;
    uint64_t digest; /* of every callback in order */
};

#define CHECK(condition) do { if (!(condition)) { \
    fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); exit(1); } } while (0)
#define EQUAL(a, b) do { long long a_ = (long long)(a), b_ = (long long)(b); if (a_ != b_) { \
    fprintf(stderr, "%s:%d: %s is %#llx, not %#llx\n", __FILE__, __LINE__, #a, a_, b_); exit(1); } } while (0)

static void note(struct world *w, uint64_t what) { w->digest = (w->digest ^ what) * 0x100000001B3ull + 0x9E37; }
static void on_wake(void *ctx, uint32_t i) { ((struct world *)ctx)->woken |= 1u << i; }
static void on_nmi(void *ctx, uint32_t i) { ((struct world *)ctx)->nmis[i]++; note(ctx, 0x100 + i); }
static void on_init(void *ctx, uint32_t i)
{
    struct world *w = ctx;
    w->inits[i]++;
    note(w, 0x200 + i);
    irqchip_reset_lapic(w->chip, i, true);
}
static void on_sipi(void *ctx, uint32_t i, uint8_t v) { struct world *w = ctx; w->sipis[i]++; w->sipi_vector = v; note(w, 0x300 + i); }
static void on_eoi(void *ctx, uint32_t gsi) { ((struct world *)ctx)->eois[gsi]++; note(ctx, 0x400 + gsi); }
/* A guest TSC of 2 GHz, 1000 ahead. */
static uint64_t tsc(void *ctx, uint32_t i, uint64_t now) { (void)ctx; (void)i; return 1000 + now * 2; }
static uint64_t tsc_to_ns(void *ctx, uint32_t i, uint64_t t) { (void)ctx; (void)i; return t <= 1000 ? 0 : (t - 1000 + 1) / 2; }

static struct world *make(void)
{
    struct world *w = calloc(1, sizeof *w);
    struct irqchip_host host = {w, false, on_wake, on_nmi, on_init, on_sipi, on_eoi, tsc, tsc_to_ns};
    w->chip = irqchip_create(VCPUS, &host);
    CHECK(w->chip);
    return w;
}
static void drop(struct world *w) { irqchip_destroy(w->chip); free(w); }

/* ---- access helpers ---- */
static uint8_t in(struct world *w, uint16_t port)
{
    uint64_t v = 0;
    CHECK(irqchip_port_read(w->chip, port, 1, &v, w->now));
    return (uint8_t)v;
}
static void out(struct world *w, uint16_t port, uint8_t v) { CHECK(irqchip_port_write(w->chip, port, 1, v, w->now)); }
static uint32_t rd(struct world *w, uint32_t cpu, uint64_t gpa)
{
    uint64_t v = 0;
    CHECK(irqchip_mmio_read(w->chip, cpu, gpa, 4, &v, w->now));
    return (uint32_t)v;
}
static void wr(struct world *w, uint32_t cpu, uint64_t gpa, uint32_t v) { CHECK(irqchip_mmio_write(w->chip, cpu, gpa, 4, v, w->now)); }
#define APIC 0xFEE00000ull
#define IOAPIC 0xFEC00000ull
static uint32_t lr(struct world *w, uint32_t cpu, uint32_t reg) { return rd(w, cpu, APIC + reg); }
static void lw(struct world *w, uint32_t cpu, uint32_t reg, uint32_t v) { wr(w, cpu, APIC + reg, v); }
static uint32_t ior(struct world *w, uint32_t reg) { wr(w, 0, IOAPIC, reg); return rd(w, 0, IOAPIC + 0x10); }
static void iow(struct world *w, uint32_t reg, uint32_t v) { wr(w, 0, IOAPIC, reg); wr(w, 0, IOAPIC + 0x10, v); }
static void rte(struct world *w, unsigned pin, uint64_t v) { iow(w, 0x11 + 2 * pin, (uint32_t)(v >> 32)); iow(w, 0x10 + 2 * pin, (uint32_t)v); }
static void irq(struct world *w, unsigned gsi, bool level) { irqchip_set_gsi(w->chip, gsi, level, w->now); }
static int pend(struct world *w, uint32_t cpu) { return irqchip_pending(w->chip, cpu); }
static int ack(struct world *w, uint32_t cpu) { return irqchip_acknowledge(w->chip, cpu); }
/* LAPICs on, PICs masked. */
static void enable(struct world *w)
{
    out(w, 0x21, 0xFF); out(w, 0xA1, 0xFF);
    for (unsigned i = 0; i < VCPUS; i++)
        lw(w, i, 0xF0, 0x1FF);
}
static bool msr_get(struct world *w, uint32_t cpu, uint32_t msr, uint64_t *v) { return irqchip_msr_read(w->chip, cpu, msr, v, w->now); }
static bool msr_put(struct world *w, uint32_t cpu, uint32_t msr, uint64_t v) { return irqchip_msr_write(w->chip, cpu, msr, v, w->now); }
static void go(struct world *w, uint64_t now) { w->now = now; irqchip_advance(w->chip, now); }
/* As Linux and every BIOS: vectors 0x20 and 0x28, cascade on IR2, nothing masked. */
static void pic_init(struct world *w, uint8_t icw4)
{
    out(w, 0x20, 0x11); out(w, 0x21, 0x20); out(w, 0x21, 4); out(w, 0x21, icw4);
    out(w, 0xA0, 0x11); out(w, 0xA1, 0x28); out(w, 0xA1, 2); out(w, 0xA1, icw4 & 1);
    out(w, 0x21, 0); out(w, 0xA1, 0);
}
#define PIT_NS(ticks) (((uint64_t)(ticks) * 1000000000 + 1193181) / 1193182)

#define TEST(name) static void test_##name(struct world *w)

/* ---- 8259A ---- */
TEST(pic_fixed_priority_and_eoi)
{
    pic_init(w, 1);
    irq(w, 4, true); irq(w, 1, true);
    EQUAL(pend(w, 0), 0x21);
    EQUAL(ack(w, 0), 0x21);
    EQUAL(pend(w, 0), -1); /* 4 waits for 1 */
    out(w, 0x20, 0x20);
    EQUAL(ack(w, 0), 0x24);
    irq(w, 1, false); irq(w, 1, true);
    EQUAL(ack(w, 0), 0x21); /* nests */
    out(w, 0x20, 0x0B);
    EQUAL(in(w, 0x20), 0x12);
    out(w, 0x20, 0x64); /* specific EOI of 4 */
    EQUAL(in(w, 0x20), 0x02);
    out(w, 0x20, 0x0A);
    EQUAL(in(w, 0x20), 0x00);
}
TEST(pic_edge_needs_a_new_rise)
{
    pic_init(w, 1);
    irq(w, 3, true);
    EQUAL(ack(w, 0), 0x23);
    out(w, 0x20, 0x20);
    irq(w, 3, true);
    EQUAL(pend(w, 0), -1);
    irq(w, 3, false); irq(w, 3, true);
    EQUAL(pend(w, 0), 0x23);
    /* "following initialization, an IR input must make a low-to-high transition" */
    pic_init(w, 1);
    EQUAL(pend(w, 0), -1);
}
TEST(pic_level_by_elcr)
{
    pic_init(w, 1);
    out(w, 0x4D0, 0xFF); out(w, 0x4D1, 0xFF);
    EQUAL(in(w, 0x4D0), 0xF8);
    EQUAL(in(w, 0x4D1), 0xDE);
    irq(w, 5, true);
    EQUAL(ack(w, 0), 0x25);
    out(w, 0x20, 0x20);
    EQUAL(w->eois[5], 1);
    EQUAL(ack(w, 0), 0x25); /* still asserted */
    irq(w, 5, false);
    out(w, 0x20, 0x20);
    EQUAL(pend(w, 0), -1);
}
TEST(pic_cascade)
{
    pic_init(w, 1);
    irq(w, 10, true); irq(w, 8, true);
    EQUAL(ack(w, 0), 0x28);
    EQUAL(pend(w, 0), -1);
    out(w, 0xA0, 0x20);
    EQUAL(pend(w, 0), -1); /* the master still serves IR2 */
    out(w, 0x20, 0x20);
    EQUAL(ack(w, 0), 0x2A);
    irq(w, 3, true);
    EQUAL(pend(w, 0), -1); /* IR3 is below IR2 */
    out(w, 0xA0, 0x20); out(w, 0x20, 0x20);
    EQUAL(pend(w, 0), 0x23);
}
TEST(pic_special_fully_nested)
{
    pic_init(w, 0x11);
    irq(w, 12, true);
    EQUAL(ack(w, 0), 0x2C);
    irq(w, 9, true);
    EQUAL(ack(w, 0), 0x29); /* the slave interrupts itself */
}
TEST(pic_mask_and_special_mask)
{
    pic_init(w, 1);
    out(w, 0x21, 0x10);
    EQUAL(in(w, 0x21), 0x10);
    irq(w, 4, true);
    EQUAL(pend(w, 0), -1);
    out(w, 0x21, 0);
    EQUAL(ack(w, 0), 0x24);
    irq(w, 6, true);
    EQUAL(pend(w, 0), -1);
    out(w, 0x21, 0x10); out(w, 0x20, 0x68); /* mask 4, set special mask mode: 4 inhibits no longer */
    EQUAL(ack(w, 0), 0x26);
    out(w, 0x20, 0x20); /* a non-specific EOI passes over the masked level */
    out(w, 0x20, 0x0B);
    EQUAL(in(w, 0x20), 0x10);
    out(w, 0x20, 0x48);
    out(w, 0x20, 0x20);
    EQUAL(in(w, 0x20), 0);
}
TEST(pic_automatic_eoi_and_rotation)
{
    pic_init(w, 3);
    irq(w, 3, true); irq(w, 4, true);
    EQUAL(ack(w, 0), 0x23);
    EQUAL(ack(w, 0), 0x24);
    out(w, 0x20, 0x80); /* rotate in AEOI */
    irq(w, 3, false); irq(w, 3, true);
    EQUAL(ack(w, 0), 0x23);
    irq(w, 3, false); irq(w, 3, true); irq(w, 4, false); irq(w, 4, true);
    EQUAL(ack(w, 0), 0x24); /* 3 went to the end of the queue */
    EQUAL(ack(w, 0), 0x23);
    pic_init(w, 1);
    out(w, 0x20, 0xC4); /* set priority: 4 lowest, 5 highest */
    irq(w, 0, true); irq(w, 5, true);
    EQUAL(ack(w, 0), 0x25);
    out(w, 0x20, 0xA0); /* rotate on non-specific EOI: 5 lowest, 6 highest */
    irq(w, 5, false); irq(w, 5, true);
    EQUAL(ack(w, 0), 0x20);
}
TEST(pic_poll)
{
    pic_init(w, 1);
    out(w, 0x20, 0x0C);
    EQUAL(in(w, 0x20), 0);
    irq(w, 6, true);
    out(w, 0x20, 0x0C);
    EQUAL(in(w, 0x20), 0x86);
    EQUAL(pend(w, 0), -1);
    out(w, 0x20, 0x0B);
    EQUAL(in(w, 0x20), 0x40);
}
TEST(pic_spurious)
{
    pic_init(w, 1);
    msr_put(w, 0, 0x1B, 0xFEE00100); /* LAPIC off: INTR is the PIC's */
    irq(w, 4, true);
    EQUAL(pend(w, 0), 0x24);
    out(w, 0x21, 0xFF);
    EQUAL(ack(w, 0), 0x27);
    out(w, 0x20, 0x0B);
    EQUAL(in(w, 0x20), 0); /* no ISR bit for a spurious one */
    out(w, 0x21, 0);
    EQUAL(ack(w, 0), 0x24);
    out(w, 0x20, 0x20);
    irq(w, 10, true); /* now the slave takes its request back after the master latched it */
    out(w, 0xA1, 0xFF);
    EQUAL(ack(w, 0), 0x2F);
    EQUAL(in(w, 0x20), 4); /* the master does serve IR2 */
}
TEST(pic_reaches_vcpus_by_lint0_or_ioapic)
{
    pic_init(w, 1);
    irq(w, 4, true);
    EQUAL(pend(w, 0), 0x24); /* power-up: LINT0 of the BSP is ExtINT */
    EQUAL(pend(w, 1), -1);
    lw(w, 0, 0xF0, 0x1FF);
    lw(w, 0, 0x350, 0x10700);
    EQUAL(pend(w, 0), -1);
    lw(w, 1, 0xF0, 0x1FF);
    w->woken = 0;
    lw(w, 1, 0x350, 0x700);
    EQUAL(w->woken, 2);
    EQUAL(pend(w, 1), 0x24);
    lw(w, 1, 0x350, 0x10700);
    rte(w, 0, 2ull << 56 | 0x700); /* virtual wire through the IOAPIC, to APIC id 2 */
    EQUAL(pend(w, 1), -1);
    EQUAL(pend(w, 2), 0x24);
    EQUAL(ack(w, 2), 0x24);
    /* LINT0 as a fixed interrupt: Linux's "virtual wire IRQ" */
    out(w, 0x20, 0x20); irq(w, 4, false);
    lw(w, 0, 0x350, 0x31);
    irq(w, 4, true);
    EQUAL(pend(w, 0), 0x31);
}

/* ---- IOAPIC ---- */
TEST(ioapic_registers)
{
    EQUAL(ior(w, 1), 0x00170011);
    iow(w, 0, 0xFF000000);
    EQUAL(ior(w, 0), 0x0F000000);
    EQUAL(ior(w, 2), 0x0F000000);
    EQUAL(ior(w, 0x10), 0x10000);
    iow(w, 0x10, 0xFFFFFFFF); iow(w, 0x11, 0xFFFFFFFF);
    EQUAL(ior(w, 0x10), 0x1AFFF); /* delivery status and remote IRR are read-only */
    EQUAL(ior(w, 0x11), 0xFF000000);
    EQUAL(ior(w, 0x40), 0);
}
TEST(ioapic_edge)
{
    enable(w);
    rte(w, 4, 1ull << 56 | 0x44);
    irq(w, 4, true);
    EQUAL(w->woken & 2, 2);
    EQUAL(ack(w, 1), 0x44);
    irq(w, 4, true);
    EQUAL(pend(w, 1), -1);
    lw(w, 1, 0xB0, 0);
    irq(w, 4, false); irq(w, 4, true);
    EQUAL(ack(w, 1), 0x44);
    lw(w, 1, 0xB0, 0);
    rte(w, 4, 1ull << 56 | 0x10044); /* an edge while masked is lost */
    irq(w, 4, false); irq(w, 4, true);
    rte(w, 4, 1ull << 56 | 0x44);
    EQUAL(pend(w, 1), -1);
}
TEST(ioapic_level)
{
    enable(w);
    rte(w, 20, 0x8050);
    irq(w, 20, true);
    EQUAL(ior(w, 0x10 + 40) & 0x4000, 0x4000);
    EQUAL(ack(w, 0), 0x50);
    EQUAL(lr(w, 0, 0x180 + 2 * 0x10), 1u << 16); /* TMR */
    irq(w, 20, true);
    EQUAL(pend(w, 0), -1);
    lw(w, 0, 0xB0, 0);
    EQUAL(w->eois[20], 1);
    EQUAL(ack(w, 0), 0x50); /* still asserted */
    irq(w, 20, false);
    lw(w, 0, 0xB0, 0);
    EQUAL(w->eois[20], 2);
    EQUAL(pend(w, 0), -1);
    EQUAL(ior(w, 0x10 + 40) & 0x4000, 0);
    rte(w, 20, 0x18050);
    irq(w, 20, true);
    EQUAL(pend(w, 0), -1);
    rte(w, 20, 0x8050); /* a level while masked is not lost */
    EQUAL(ack(w, 0), 0x50);
    rte(w, 20, 0x10050); /* to edge and masked: clears remote IRR */
    EQUAL(ior(w, 0x10 + 40), 0x10050);
}
TEST(ioapic_gsi0_is_pin2)
{
    enable(w);
    rte(w, 2, 0x30);
    irq(w, 0, true);
    EQUAL(pend(w, 0), 0x30);
}
TEST(ioapic_delivery_modes)
{
    enable(w);
    rte(w, 6, 1ull << 56 | 0x400); irq(w, 6, true);
    EQUAL(w->nmis[1], 1);
    rte(w, 7, 2ull << 56 | 0x500); irq(w, 7, true);
    EQUAL(w->inits[2], 1);
    rte(w, 8, 0xFFull << 56 | 0x66); irq(w, 8, true); /* broadcast; vCPU 2 was reset and is disabled */
    EQUAL(pend(w, 0), 0x66); EQUAL(pend(w, 1), 0x66); EQUAL(pend(w, 2), -1); EQUAL(pend(w, 3), 0x66);
}

/* ---- LAPIC ---- */
TEST(lapic_reset_state)
{
    uint64_t v;
    CHECK(msr_get(w, 0, 0x1B, &v)); EQUAL(v, 0xFEE00900);
    CHECK(msr_get(w, 1, 0x1B, &v)); EQUAL(v, 0xFEE00800);
    EQUAL(lr(w, 3, 0x20), 3u << 24);
    EQUAL(lr(w, 0, 0x30), 0x50014);
    EQUAL(lr(w, 0, 0xF0), 0xFF);
    EQUAL(lr(w, 0, 0xE0), 0xFFFFFFFF);
    EQUAL(lr(w, 1, 0x350), 0x10000);
    EQUAL(lr(w, 0, 0x320), 0x10000);
    CHECK(irqchip_mmio_read(w->chip, 0, APIC + 0x34, 4, &v, 0)); EQUAL(v, 0);
    CHECK(irqchip_mmio_read(w->chip, 0, APIC + 0x31, 1, &v, 0)); EQUAL(v, 0);
    CHECK(irqchip_mmio_read(w->chip, 0, APIC + 0x32, 1, &v, 0)); EQUAL(v, 5);
    CHECK(!irqchip_mmio_read(w->chip, 0, APIC + 0x1000, 4, &v, 0));
}
TEST(lapic_priorities)
{
    enable(w);
    irqchip_msi(w->chip, APIC, 0x51);
    irqchip_msi(w->chip, APIC, 0x43);
    lw(w, 0, 0x80, 0x50);
    EQUAL(pend(w, 0), -1); /* class 5 needs a TPR class below */
    EQUAL(lr(w, 0, 0xA0), 0x50);
    w->woken = 0;
    irqchip_set_tpr(w->chip, 0, 0x4F);
    EQUAL(w->woken, 1);
    EQUAL(irqchip_get_tpr(w->chip, 0), 0x4F);
    EQUAL(ack(w, 0), 0x51);
    EQUAL(lr(w, 0, 0xA0), 0x50);
    irqchip_set_tpr(w->chip, 0, 0);
    EQUAL(pend(w, 0), -1); /* 0x43 is below the one in service */
    irqchip_msi(w->chip, APIC, 0x59);
    EQUAL(pend(w, 0), -1); /* same class */
    irqchip_msi(w->chip, APIC, 0x61);
    EQUAL(ack(w, 0), 0x61);
    lw(w, 0, 0xB0, 0);
    lw(w, 0, 0xB0, 0);
    EQUAL(ack(w, 0), 0x59);
    lw(w, 0, 0xB0, 0);
    EQUAL(ack(w, 0), 0x43);
    lw(w, 0, 0xB0, 0);
    EQUAL(ack(w, 0), 0xFF); /* nothing left: spurious, no ISR bit */
    EQUAL(lr(w, 0, 0x170), 0);
}
TEST(lapic_software_disable)
{
    enable(w);
    lw(w, 0, 0x320, 0x40);
    lw(w, 0, 0xF0, 0xFF);
    EQUAL(lr(w, 0, 0x320), 0x10040);
    lw(w, 0, 0x320, 0x41);
    EQUAL(lr(w, 0, 0x320), 0x10041); /* the mask stays while disabled */
    irqchip_msi(w->chip, APIC, 0x60);
    EQUAL(pend(w, 0), -1);
    irqchip_msi(w->chip, APIC, 0x400);
    EQUAL(w->nmis[0], 1); /* NMI, INIT and SIPI still arrive */
}
TEST(lapic_destinations_physical)
{
    enable(w);
    lw(w, 0, 0x310, 2u << 24); lw(w, 0, 0x300, 0x4041);
    EQUAL(pend(w, 2), 0x41); EQUAL(pend(w, 1), -1);
    lw(w, 0, 0x310, 0xFFu << 24); lw(w, 0, 0x300, 0x4042);
    for (unsigned i = 0; i < VCPUS; i++)
        EQUAL(lr(w, i, 0x220) & 4, 4);
    EQUAL(lr(w, 0, 0x300), 0x4042); /* delivery status idle */
}
TEST(lapic_shorthands)
{
    enable(w);
    lw(w, 1, 0x300, 0x44000 | 0x50);
    EQUAL(pend(w, 1), 0x50); EQUAL(pend(w, 0), -1);
    lw(w, 1, 0x300, 0xC4000 | 0x51);
    EQUAL(pend(w, 1), 0x50); EQUAL(pend(w, 0), 0x51); EQUAL(pend(w, 3), 0x51);
    lw(w, 1, 0x300, 0x84000 | 0x52);
    for (unsigned i = 0; i < VCPUS; i++)
        EQUAL(pend(w, i), 0x52);
}
TEST(lapic_logical_flat_and_cluster)
{
    enable(w);
    for (unsigned i = 0; i < VCPUS; i++)
        lw(w, i, 0xD0, 1u << (24 + i));
    irqchip_msi(w->chip, APIC | 0xA << 12 | 4, 0x60);
    EQUAL(pend(w, 0), -1); EQUAL(pend(w, 1), 0x60); EQUAL(pend(w, 2), -1); EQUAL(pend(w, 3), 0x60);
    for (unsigned i = 0; i < VCPUS; i++) {
        lw(w, i, 0xE0, 0);
        EQUAL(lr(w, i, 0xE0), 0x0FFFFFFF);
        lw(w, i, 0xD0, (i / 2 << 4 | 1u << (i % 2)) << 24);
    }
    irqchip_msi(w->chip, APIC | 0x12 << 12 | 4, 0x70);
    EQUAL(pend(w, 3), 0x70); EQUAL(pend(w, 2), -1); EQUAL(pend(w, 1), 0x60);
}
TEST(lapic_lowest_priority)
{
    enable(w);
    for (unsigned i = 0; i < VCPUS; i++) {
        lw(w, i, 0xD0, 1u << (24 + i));
        lw(w, i, 0x80, i == 2 ? 0x10 : 0x20);
    }
    irqchip_msi(w->chip, APIC | 0xF << 12 | 4, 0x160);
    EQUAL(pend(w, 0), -1); EQUAL(pend(w, 1), -1); EQUAL(pend(w, 2), 0x60); EQUAL(pend(w, 3), -1);
    lw(w, 0, 0x300, 0x84900 | 0x61); /* all, lowest by ICR: shorthand goes to every one; without it arbitrates */
    irqchip_msi(w->chip, APIC | 0x9 << 12 | 0xC, 0x62); /* redirection hint */
    EQUAL((lr(w, 0, 0x230) >> 2 & 1) + (lr(w, 3, 0x230) >> 2 & 1), 1);
}
TEST(lapic_init_sipi)
{
    enable(w);
    lw(w, 0, 0x310, 1u << 24);
    lw(w, 0, 0x300, 0xC500); EQUAL(w->inits[1], 1);
    lw(w, 0, 0x300, 0x8500); EQUAL(w->inits[1], 1); /* de-assert */
    lw(w, 0, 0x300, 0x4608); EQUAL(w->sipis[1], 1); EQUAL(w->sipi_vector, 8);
    EQUAL(lr(w, 1, 0xF0), 0xFF); EQUAL(lr(w, 1, 0x20), 1u << 24);
    lw(w, 0, 0x300, 0xC4400); EQUAL(w->nmis[0], 0); EQUAL(w->nmis[3], 1);
}
TEST(lapic_errors)
{
    enable(w);
    lw(w, 0, 0x370, 0x37);
    lw(w, 0, 0x310, 1u << 24); lw(w, 0, 0x300, 0x4005);
    EQUAL(pend(w, 0), 0x37);
    EQUAL(lr(w, 0, 0x280), 0);
    lw(w, 0, 0x280, 0);
    EQUAL(lr(w, 0, 0x280), 0x20);
    lw(w, 0, 0x280, 0);
    EQUAL(lr(w, 0, 0x280), 0);
    irqchip_msi(w->chip, APIC, 0x05);
    (void)lr(w, 0, 0x3F0);
    lw(w, 0, 0x280, 0);
    EQUAL(lr(w, 0, 0x280), 0xC0);
    lw(w, 0, 0x370, 0x05); /* a bad vector in the error entry itself */
    irqchip_msi(w->chip, APIC, 0x05);
}
TEST(lapic_timer_one_shot)
{
    enable(w);
    lw(w, 0, 0x3E0, 3); /* divide by 16 */
    lw(w, 0, 0x320, 0x40);
    go(w, 100);
    lw(w, 0, 0x380, 1000);
    EQUAL(lr(w, 0, 0x390), 1000);
    EQUAL(irqchip_next_event(w->chip), 16100);
    go(w, 100 + 160);
    EQUAL(lr(w, 0, 0x390), 990);
    go(w, 16099); EQUAL(pend(w, 0), -1); EQUAL(lr(w, 0, 0x390), 0);
    go(w, 16100); EQUAL(ack(w, 0), 0x40); EQUAL(lr(w, 0, 0x390), 0);
    EQUAL(irqchip_next_event(w->chip), UINT64_MAX);
    lw(w, 0, 0x380, 5); lw(w, 0, 0x380, 0);
    EQUAL(irqchip_next_event(w->chip), UINT64_MAX);
}
TEST(lapic_timer_periodic)
{
    enable(w);
    lw(w, 2, 0x3E0, 0xB);
    lw(w, 2, 0x320, 0x20041);
    lw(w, 2, 0x380, 1000);
    go(w, 1000); EQUAL(ack(w, 2), 0x41); lw(w, 2, 0xB0, 0);
    EQUAL(irqchip_next_event(w->chip), 2000);
    go(w, 5300); EQUAL(ack(w, 2), 0x41); lw(w, 2, 0xB0, 0); EQUAL(pend(w, 2), -1);
    EQUAL(irqchip_next_event(w->chip), 6000);
    EQUAL(lr(w, 2, 0x390), 700);
    lw(w, 2, 0x320, 0x30041); /* masked: counts, no interrupt */
    go(w, 6000); EQUAL(pend(w, 2), -1);
    EQUAL(irqchip_next_event(w->chip), 7000);
}
TEST(lapic_timer_changes_mode_late)
{
    enable(w);
    lw(w, 0, 0x3E0, 0xB);
    lw(w, 0, 0x320, 0x40);
    lw(w, 0, 0x380, 1000);
    w->now = 1500; /* the count has come to its end, and nobody has looked yet */
    lw(w, 0, 0x320, 0x20040);
    EQUAL(lr(w, 0, 0x390), 0);
    EQUAL(irqchip_next_event(w->chip), UINT64_MAX);
    EQUAL(ack(w, 0), 0x40); lw(w, 0, 0xB0, 0);
    lw(w, 0, 0x320, 0x40);
    lw(w, 0, 0x380, 1000);
    w->now = 2000;
    lw(w, 0, 0x320, 0x20040); /* in time: it counts on, and then for ever */
    EQUAL(lr(w, 0, 0x390), 500);
    EQUAL(irqchip_next_event(w->chip), 2500);
    go(w, 2500);
    EQUAL(irqchip_next_event(w->chip), 3500);
    lw(w, 0, 0x320, 0x40);
    w->now = 4000;
    lw(w, 0, 0x3E0, 0); /* another divisor is none for a count that has ended */
    EQUAL(irqchip_next_event(w->chip), UINT64_MAX);
}
TEST(multicast)
{
    enable(w);
    EQUAL(irqchip_multicast(w->chip, 0x5, 0, 64, 1, 0x51), 2); /* APIC ids 1 and 3 */
    EQUAL(pend(w, 0), -1); EQUAL(pend(w, 1), 0x51); EQUAL(pend(w, 2), -1); EQUAL(pend(w, 3), 0x51);
    EQUAL(irqchip_multicast(w->chip, 0, 1, 2, 0, 0x52), 1); /* the upper map goes on where the lower ends */
    EQUAL(pend(w, 2), 0x52);
    EQUAL(irqchip_multicast(w->chip, ~0ull, ~0ull, 64, 0xFFFFFFFF, 0x53), 0);
    EQUAL(irqchip_multicast(w->chip, 1, 0, 64, 0, 0x400), 1); EQUAL(w->nmis[0], 1);
    CHECK(irqchip_multicast(w->chip, 1, 0, 64, 0, 0x853) < 0); /* logical */
    CHECK(irqchip_multicast(w->chip, 1, 0, 64, 0, 0x40053) < 0); /* with a shorthand */
    EQUAL(pend(w, 0), -1);
}
TEST(lapic_timer_deadline)
{
    uint64_t v;
    enable(w);
    CHECK(msr_put(w, 0, 0x6E0, 5000));
    CHECK(msr_get(w, 0, 0x6E0, &v)); EQUAL(v, 0); /* not in that mode */
    lw(w, 0, 0x320, 0x40042);
    lw(w, 0, 0x380, 77); EQUAL(lr(w, 0, 0x390), 0);
    CHECK(msr_put(w, 0, 0x6E0, 5000));
    EQUAL(irqchip_next_event(w->chip), 2000);
    CHECK(msr_get(w, 0, 0x6E0, &v)); EQUAL(v, 5000);
    go(w, 1999); EQUAL(pend(w, 0), -1);
    go(w, 2000); EQUAL(ack(w, 0), 0x42);
    CHECK(msr_get(w, 0, 0x6E0, &v)); EQUAL(v, 0);
    lw(w, 0, 0xB0, 0);
    CHECK(msr_put(w, 0, 0x6E0, 1)); EQUAL(ack(w, 0), 0x42); /* in the past: at once */
    CHECK(msr_put(w, 0, 0x6E0, 1ull << 60));
    lw(w, 0, 0x320, 0x42); /* leaving the mode disarms */
    EQUAL(irqchip_next_event(w->chip), UINT64_MAX);
}
TEST(x2apic)
{
    uint64_t v;
    CHECK(!msr_get(w, 1, 0x802, &v));
    CHECK(!msr_put(w, 1, 0x1B, 0xFEE00400)); /* EXTD without EN */
    for (unsigned i = 0; i < VCPUS; i++) {
        CHECK(msr_put(w, i, 0x1B, 0xFEE00C00));
        CHECK(msr_put(w, i, 0x80F, 0x1FF));
    }
    CHECK(!msr_put(w, 1, 0x1B, 0xFEE00800)); /* back to xAPIC only through disabled */
    CHECK(!irqchip_mmio_read(w->chip, 1, APIC, 4, &v, 0));
    CHECK(msr_get(w, 3, 0x802, &v)); EQUAL(v, 3);
    CHECK(msr_get(w, 3, 0x80D, &v)); EQUAL(v, 8);
    CHECK(!msr_get(w, 1, 0x80E, &v)); CHECK(!msr_get(w, 1, 0x831, &v)); CHECK(!msr_get(w, 1, 0x80B, &v));
    CHECK(!msr_put(w, 1, 0x802, 0)); CHECK(!msr_put(w, 1, 0x80B, 1)); CHECK(!msr_put(w, 1, 0x808, 0x100));
    CHECK(!msr_put(w, 1, 0x828, 1)); CHECK(!msr_put(w, 1, 0x80A, 0)); CHECK(!msr_put(w, 1, 0x832, 1ull << 32));
    CHECK(msr_put(w, 1, 0x808, 0x20)); CHECK(msr_get(w, 1, 0x808, &v)); EQUAL(v, 0x20);
    CHECK(msr_put(w, 1, 0x808, 0));
    CHECK(msr_put(w, 0, 0x830, 1ull << 32 | 0x71)); EQUAL(ack(w, 1), 0x71);
    CHECK(msr_get(w, 0, 0x830, &v)); EQUAL(v, 1ull << 32 | 0x71);
    CHECK(msr_put(w, 1, 0x80B, 0));
    CHECK(msr_put(w, 0, 0x830, 0xCull << 32 | 0x872)); EQUAL(pend(w, 2), 0x72); EQUAL(pend(w, 3), 0x72); EQUAL(pend(w, 1), -1);
    CHECK(msr_put(w, 0, 0x830, 0xFFFFFFFFull << 32 | 0x74)); EQUAL(pend(w, 0), 0x74); EQUAL(pend(w, 1), 0x74);
    CHECK(msr_put(w, 1, 0x83F, 0x80)); EQUAL(pend(w, 1), 0x80);
    CHECK(!msr_get(w, 1, 0x83F, &v));
    irqchip_msi(w->chip, APIC | 2 << 12, 0x90); EQUAL(pend(w, 2), 0x90);
    irqchip_msi(w->chip, APIC | 8 << 12 | 4, 0x91); EQUAL(pend(w, 3), 0x91);
    irqchip_msi(w->chip, APIC | 0xFF << 12, 0xA0); EQUAL(pend(w, 0), 0xA0); EQUAL(pend(w, 3), 0xA0);
    CHECK(msr_put(w, 1, 0x1B, 0xFEE00000)); /* disable, then xAPIC afresh */
    CHECK(!msr_put(w, 1, 0x1B, 0xFEE00C00));
    CHECK(msr_put(w, 1, 0x1B, 0xFEE00800));
    EQUAL(lr(w, 1, 0xF0), 0xFF);
}
TEST(lapic_page_moves)
{
    uint64_t v;
    CHECK(msr_put(w, 0, 0x1B, 0x10000900));
    CHECK(!irqchip_mmio_read(w->chip, 0, APIC, 4, &v, 0));
    EQUAL(rd(w, 0, 0x10000030), 0x50014);
    EQUAL(lr(w, 1, 0x30), 0x50014); /* each vCPU has its own base */
    CHECK(!msr_put(w, 0, 0x1B, 1ull << 60 | 0x900));
}
TEST(msi_ignores_other_addresses)
{
    enable(w);
    irqchip_msi(w->chip, 0xFEC00000, 0x50); irqchip_msi(w->chip, 0x1FEE00000ull, 0x50);
    EQUAL(pend(w, 0), -1);
    irqchip_msi(w->chip, APIC | 9 << 12, 0x50); /* no such APIC */
    EQUAL(pend(w, 0), -1);
}

/* ---- 8254 ---- */
static void pit_set(struct world *w, unsigned n, unsigned mode, uint16_t count)
{
    out(w, 0x43, (uint8_t)(n << 6 | 0x30 | mode << 1));
    out(w, (uint16_t)(0x40 + n), (uint8_t)count); out(w, (uint16_t)(0x40 + n), (uint8_t)(count >> 8));
}
static unsigned pit_count(struct world *w, unsigned n)
{
    out(w, 0x43, (uint8_t)(n << 6));
    unsigned low = in(w, (uint16_t)(0x40 + n));
    return low | (unsigned)in(w, (uint16_t)(0x40 + n)) << 8;
}
static bool pit_out2(struct world *w) { return in(w, 0x61) & 0x20; }
TEST(pit_mode0)
{
    pic_init(w, 1);
    pit_set(w, 0, 0, 1000);
    EQUAL(irqchip_next_event(w->chip), PIT_NS(1000));
    go(w, PIT_NS(400)); EQUAL(pit_count(w, 0), 600);
    go(w, PIT_NS(1000) - 1); EQUAL(pend(w, 0), -1);
    go(w, PIT_NS(1000)); EQUAL(ack(w, 0), 0x20);
    EQUAL(irqchip_next_event(w->chip), UINT64_MAX);
    go(w, PIT_NS(1001)); EQUAL(pit_count(w, 0), 0xFFFF); /* goes on, wraps */
    out(w, 0x20, 0x20);
    out(w, 0x43, 0x30); out(w, 0x40, 10); /* half a count: not counting yet */
    EQUAL(irqchip_next_event(w->chip), UINT64_MAX);
    out(w, 0x40, 0);
    go(w, PIT_NS(1011)); EQUAL(ack(w, 0), 0x20);
}
TEST(pit_mode2)
{
    pic_init(w, 1);
    pit_set(w, 0, 2, 100);
    for (unsigned i = 1; i <= 3; i++) {
        EQUAL(irqchip_next_event(w->chip), PIT_NS(100 * i));
        go(w, PIT_NS(100 * i)); EQUAL(ack(w, 0), 0x20); out(w, 0x20, 0x20);
    }
    go(w, PIT_NS(310)); EQUAL(pit_count(w, 0), 90);
    out(w, 0x40, 50); out(w, 0x40, 0); /* takes effect at the end of the period */
    out(w, 0x43, 0xE2); EQUAL(in(w, 0x40), 0xF4); /* null count, OUT high, word, mode 2 */
    EQUAL(irqchip_next_event(w->chip), PIT_NS(400));
    go(w, PIT_NS(400)); EQUAL(irqchip_next_event(w->chip), PIT_NS(450));
    out(w, 0x43, 0xE2); EQUAL(in(w, 0x40), 0xB4);
}
TEST(pit_mode3_square)
{
    out(w, 0x61, 1);
    pit_set(w, 2, 3, 10);
    for (unsigned t = 0; t < 30; t++) {
        w->now = PIT_NS(t);
        EQUAL(pit_out2(w), t % 10 < 5);
        EQUAL(pit_count(w, 2), 10 - t % 5 * 2);
    }
    w->now = PIT_NS(30);
    pit_set(w, 2, 3, 5); /* odd: high one tick longer */
    for (unsigned t = 0; t < 20; t++) {
        w->now = PIT_NS(30 + t);
        EQUAL(pit_out2(w), t % 5 < 3);
    }
}
TEST(pit_gate_and_speaker)
{
    pit_set(w, 2, 0, 100);
    EQUAL(in(w, 0x61) & 0x23, 0);
    w->now = PIT_NS(50); EQUAL(pit_count(w, 2), 100); /* GATE is low: not counting */
    out(w, 0x61, 3); EQUAL(in(w, 0x61) & 3, 3);
    w->now = PIT_NS(90); EQUAL(pit_count(w, 2), 60);
    out(w, 0x61, 0); w->now = PIT_NS(200); EQUAL(pit_count(w, 2), 60); CHECK(!pit_out2(w));
    out(w, 0x61, 1); w->now = PIT_NS(259); CHECK(!pit_out2(w));
    w->now = PIT_NS(260); CHECK(pit_out2(w));
    w->now = 0; EQUAL(in(w, 0x61) & 0x10, 0);
    w->now = 1 << 14; EQUAL(in(w, 0x61) & 0x10, 0x10);
}
TEST(pit_mode1_and_5_are_triggered_by_gate)
{
    pit_set(w, 2, 1, 20);
    CHECK(pit_out2(w));
    w->now = PIT_NS(100); CHECK(pit_out2(w));
    out(w, 0x61, 1); CHECK(!pit_out2(w));
    w->now = PIT_NS(119); CHECK(!pit_out2(w));
    w->now = PIT_NS(120); CHECK(pit_out2(w));
    out(w, 0x61, 0); out(w, 0x61, 1); w->now = PIT_NS(130); out(w, 0x61, 0); out(w, 0x61, 1); /* retrigger */
    w->now = PIT_NS(149); CHECK(!pit_out2(w));
    w->now = PIT_NS(150); CHECK(pit_out2(w));
    out(w, 0x61, 0);
    pit_set(w, 2, 5, 20);
    w->now = PIT_NS(200); out(w, 0x61, 1);
    w->now = PIT_NS(219); CHECK(pit_out2(w));
    w->now = PIT_NS(220); CHECK(!pit_out2(w)); /* the strobe is one tick */
    w->now = PIT_NS(221); CHECK(pit_out2(w));
}
TEST(pit_mode4)
{
    out(w, 0x61, 1);
    pit_set(w, 2, 4, 20);
    w->now = PIT_NS(19); CHECK(pit_out2(w));
    w->now = PIT_NS(20); CHECK(!pit_out2(w));
    w->now = PIT_NS(21); CHECK(pit_out2(w));
    w->now = PIT_NS(22); CHECK(pit_out2(w));
}
TEST(pit_access_modes_and_bcd)
{
    out(w, 0x61, 1);
    out(w, 0x43, 0x90); out(w, 0x42, 200); /* LSB only */
    w->now = PIT_NS(50); EQUAL(in(w, 0x42), 150); EQUAL(in(w, 0x42), 150);
    out(w, 0x43, 0xA0); out(w, 0x42, 2); /* MSB only: 0x200 */
    w->now = PIT_NS(51); EQUAL(in(w, 0x42), 1);
    out(w, 0x43, 0xB1); out(w, 0x42, 0x34); out(w, 0x42, 0x12); /* BCD 1234 */
    w->now = PIT_NS(51 + 35); EQUAL(pit_count(w, 2), 0x1199);
    pit_set(w, 2, 0, 0); w->now += PIT_NS(1) ; EQUAL(pit_count(w, 2) >= 0xFFFE, 1); /* 0 is 65536 */
}
TEST(pit_latch_and_read_back)
{
    out(w, 0x61, 1);
    pit_set(w, 2, 2, 1000); pit_set(w, 0, 2, 500);
    w->now = PIT_NS(100);
    out(w, 0x43, 0xCA); /* count and status of channels 0 and 2 */
    w->now = PIT_NS(150);
    out(w, 0x43, 0x80); /* a second latch before the read is ignored */
    EQUAL(in(w, 0x42), 0xB4); EQUAL(in(w, 0x42), 900 & 0xFF); EQUAL(in(w, 0x42), 900 >> 8);
    EQUAL(in(w, 0x40), 0xB4); EQUAL(in(w, 0x40), 400 & 0xFF); EQUAL(in(w, 0x40), 400 >> 8);
    EQUAL(pit_count(w, 2), 850);
}
TEST(pit_drives_ioapic_pin2)
{
    enable(w);
    rte(w, 2, 0x30);
    pit_set(w, 0, 2, 100);
    for (unsigned i = 1; i < 4; i++) {
        go(w, PIT_NS(100 * i)); EQUAL(ack(w, 0), 0x30); lw(w, 0, 0xB0, 0);
    }
}
TEST(clock_moves)
{
    pic_init(w, 1);
    enable(w);
    lw(w, 0, 0x3E0, 0xB); lw(w, 0, 0x320, 0x40); lw(w, 0, 0x380, 5000000);
    pit_set(w, 0, 2, 1000);
    go(w, PIT_NS(1300));
    uint32_t count = lr(w, 0, 0x390), left = pit_count(w, 0);
    uint64_t before = w->now;
    w->now = 12345678901234;
    irqchip_clock_moved(w->chip, before, w->now);
    EQUAL(lr(w, 0, 0x390), count);
    EQUAL(pit_count(w, 0), left);
    CHECK(irqchip_next_event(w->chip) - w->now <= PIT_NS(700) && irqchip_next_event(w->chip) - w->now >= PIT_NS(699));
}
TEST(levels)
{
    irq(w, 5, true); irq(w, 17, true); irq(w, 0, true); irq(w, 17, false);
    EQUAL(irqchip_levels(w->chip), 0x21);
}
TEST(wide_port_accesses)
{
    uint64_t v;
    CHECK(irqchip_port_write(w->chip, 0x4D0, 2, 0x2008, 0));
    EQUAL(in(w, 0x4D0), 8); EQUAL(in(w, 0x4D1), 0);
    out(w, 0x4D1, 0x0E);
    CHECK(irqchip_port_read(w->chip, 0x4D0, 2, &v, 0)); EQUAL(v, 0x0E08);
    CHECK(irqchip_port_read(w->chip, 0x61, 4, &v, 0)); EQUAL(v >> 8, 0xFFFFFF);
    CHECK(!irqchip_port_read(w->chip, 0x60, 1, &v, 0));
    CHECK(!irqchip_port_write(w->chip, 0x80, 1, 0, 0));
}

/* ---- properties ---- */
static uint64_t seed;
static uint64_t rnd(void)
{
    seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
    return seed * 0x2545F4914F6CDD1Dull >> 16;
}
static uint64_t pick(uint64_t n) { return rnd() % n; }

/* One random action; its visible result. */
static uint64_t act(struct world *w)
{
    static const uint16_t PORTS[] = {0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x42, 0x43, 0x61, 0x40, 0x43};
    static const uint16_t REGS[] = {0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0, 0x100, 0x150, 0x200, 0x230,
                                    0x280, 0x300, 0x310, 0x320, 0x350, 0x360, 0x370, 0x380, 0x390, 0x3E0, 0x3F0, 0x190};
    uint32_t cpu = (uint32_t)pick(VCPUS);
    uint64_t v = 0, value = rnd() >> pick(48), reg = REGS[pick(sizeof REGS / sizeof *REGS)];
    switch (pick(14)) {
    case 0: w->now += pick(3000); irqchip_advance(w->chip, w->now); return irqchip_next_event(w->chip);
    case 1: w->now += pick(3000000); irqchip_advance(w->chip, w->now); return irqchip_next_event(w->chip);
    case 2: irq(w, (unsigned)pick(26), pick(2)); return 0;
    case 3: irqchip_msi(w->chip, APIC | (value & 0xFFFFF), (uint32_t)rnd() & (pick(2) ? 0xFF : 0xFFFF)); return 0;
    case 4: return pend(w, cpu) < 0 ? 0 : (uint64_t)ack(w, cpu) + 1;
    case 5: { uint16_t p = PORTS[pick(12)]; out(w, p, (uint8_t)value); return 0; }
    case 6: return in(w, PORTS[pick(12)]);
    case 7: v = irqchip_mmio_read(w->chip, cpu, APIC + reg, 4, &value, w->now); return v + value;
    case 8: return irqchip_mmio_write(w->chip, cpu, APIC + reg, 4, reg == 0xF0 ? value | 0x100 : value, w->now);
    case 9: v = irqchip_msr_read(w->chip, cpu, 0x800 + (uint32_t)(reg >> 4), &value, w->now); return v + value;
    case 10: return irqchip_msr_write(w->chip, cpu, 0x800 + (uint32_t)(reg >> 4), value, w->now);
    case 11: wr(w, cpu, IOAPIC, (uint32_t)pick(0x42)); wr(w, cpu, IOAPIC + 0x10, (uint32_t)value); return rd(w, cpu, IOAPIC + 0x10);
    case 12: return pick(8) ? irqchip_msr_write(w->chip, cpu, 0x6E0, w->now * 2 + pick(100000), w->now)
                            : irqchip_msr_write(w->chip, cpu, 0x1B, 0xFEE00000 | pick(4) << 10, w->now);
    default:
        if (pick(2))
            irqchip_set_tpr(w->chip, cpu, (uint8_t)value);
        irqchip_mmio_write(w->chip, cpu, APIC + 0xB0, 4, 0, w->now);
        return irqchip_get_tpr(w->chip, cpu);
    }
}
static uint64_t look(struct world *w)
{
    uint64_t h = irqchip_next_event(w->chip);
    for (uint32_t i = 0; i < VCPUS; i++)
        h = h * 31 + (uint64_t)(int64_t)pend(w, i);
    return h * 31 + w->digest;
}
/* A fresh irqchip with the state of w, by way of the KVM layouts alone. */
static struct world *moved(struct world *w)
{
    struct world *n = make();
    struct kvm_irqchip chip;
    struct kvm_pit_state2 pit;
    n->now = w->now; n->digest = w->digest;
    irqchip_advance(w->chip, w->now);
    for (uint32_t i = 0; i < VCPUS; i++) {
        struct kvm_lapic_state s;
        uint64_t base, deadline;
        CHECK(msr_get(w, i, 0x1B, &base)); CHECK(msr_get(w, i, 0x6E0, &deadline));
        irqchip_get_lapic(w->chip, i, &s, w->now);
        CHECK(irqchip_restore_msr(n->chip, i, 0x1B, base, n->now));
        irqchip_set_lapic(n->chip, i, &s, n->now);
        CHECK(irqchip_restore_msr(n->chip, i, 0x6E0, deadline, n->now));
    }
    for (chip.chip_id = 0; chip.chip_id < 3; chip.chip_id++) {
        EQUAL(irqchip_get(w->chip, &chip), 0);
        EQUAL(irqchip_set(n->chip, &chip, n->now), 0);
    }
    irqchip_get_pit(w->chip, &pit, w->now);
    irqchip_set_pit(n->chip, &pit, n->now);
    n->digest = w->digest;
    return n;
}
TEST(property_moving_state_changes_nothing)
{
    for (uint64_t run = 1; run <= 400; run++) {
        struct world *a = make(), *b = make();
        uint64_t s = run * 0x9E3779B97F4A7C15ull;
        if (run & 1) { enable(a); enable(b); pic_init(a, 1); pic_init(b, 1); }
        for (unsigned step = 0; step < 400; step++) {
            seed = s; uint64_t ra = act(a);
            seed = s; uint64_t rb = act(b);
            s = seed;
            if (ra != rb || look(a) != look(b)) {
                fprintf(stderr, "run %llu step %u: %#llx, %#llx\n", (unsigned long long)run, step, (unsigned long long)ra, (unsigned long long)rb);
                exit(1);
            }
            if (s % 13 == 0) { struct world *n = moved(b); drop(b); b = n; }
            else if (s % 13 == 1) { irqchip_advance(a->chip, a->now); irqchip_advance(b->chip, b->now); }
        }
        drop(a); drop(b);
    }
    (void)w;
}
TEST(property_any_state_is_safe)
{
    seed = 42;
    for (unsigned run = 0; run < 3000; run++) {
        struct kvm_lapic_state lapic;
        struct kvm_irqchip chip;
        struct kvm_pit_state2 pit;
        uint8_t *parts[] = {(uint8_t *)&lapic, (uint8_t *)&chip, (uint8_t *)&pit};
        size_t sizes[] = {sizeof lapic, sizeof chip, sizeof pit};
        for (unsigned p = 0; p < 3; p++)
            for (size_t i = 0; i < sizes[p]; i++)
                parts[p][i] = (uint8_t)(pick(3) ? 0 : rnd());
        w->now = rnd() >> pick(40);
        irqchip_set_lapic(w->chip, (uint32_t)pick(VCPUS), &lapic, w->now);
        chip.chip_id = (uint32_t)pick(4);
        (void)irqchip_set(w->chip, &chip, w->now);
        irqchip_set_pit(w->chip, &pit, w->now);
        for (unsigned i = 0; i < 40; i++)
            act(w);
        struct world *n = moved(w);
        drop(n);
    }
}

#define T(name) {#name, test_##name}
static const struct { const char *name; void (*run)(struct world *); } TESTS[] = {
#include "irqchip_tests.inc"
};

int main(int argc, char **argv)
{
    for (unsigned i = 0; argc == 2 && i < sizeof TESTS / sizeof *TESTS; i++)
        if (!strcmp(TESTS[i].name, argv[1])) {
            struct world *w = make();
            TESTS[i].run(w);
            drop(w);
            return 0;
        }
    return 2;
}
