/* The local APIC of one vCPU: xAPIC page and x2APIC MSRs (SDM vol. 3 ch. 11), timer with TSC deadline.
 *
 * The register page is kept in the order of struct kvm_lapic_state. The timer counts at 1 GHz divided by the divide
 * configuration, as KVM's. Two of the page's reserved words keep what the architecture has no register for:
 * TIMER_REMAINDER (only in saved state) and ESR_PENDING. */
#include "soft/irqchip/internal.h"

#include <string.h>

enum { ID = 0x20, VERSION = 0x30, TPR = 0x80, APR = 0x90, PPR = 0xA0, EOI = 0xB0, RRD = 0xC0, LDR = 0xD0, DFR = 0xE0,
       SVR = 0xF0, ISR = 0x100, TMR = 0x180, IRR = 0x200, ESR = 0x280, LVT_CMCI = 0x2F0, ICR = 0x300, ICR2 = 0x310,
       LVT_TIMER = 0x320, LVT_THERMAL = 0x330, LVT_PERF = 0x340, LVT_LINT0 = 0x350, LVT_LINT1 = 0x360,
       LVT_ERROR = 0x370, TIMER_INITIAL = 0x380, TIMER_CURRENT = 0x390, TIMER_REMAINDER = 0x3A0, ESR_PENDING = 0x3B0,
       TIMER_DIVIDE = 0x3E0, SELF_IPI = 0x3F0 };
enum { LVT_MASK = 1 << 16, LVT_LEVEL = 1 << 15, LVT_STATUS = 1 << 12, SVR_ENABLE = 1 << 8 };
enum { ESR_SEND_VECTOR = 1 << 5, ESR_RECEIVE_VECTOR = 1 << 6, ESR_REGISTER = 1 << 7 };
enum { TIMER_ONE_SHOT, TIMER_PERIODIC, TIMER_DEADLINE };
enum { ICR_LOGICAL = 1 << 11, ICR_STATUS = 1 << 12, ICR_ASSERT = 1 << 14, ICR_LEVEL = 1 << 15 };
#define BASE_BSP (1ull << 8)
#define BASE_EXTD (1ull << 10)
#define BASE_ENABLE (1ull << 11)
#define BASE_DEFAULT 0xFEE00000ull
#define BASE_RESERVED 0xFFF00000000002FFull /* physical addresses have at most 52 bits */
enum { MSR_BASE = 0x1B, MSR_DEADLINE = 0x6E0, MSR_X2APIC = 0x800 };
enum { VERSION_VALUE = 0x14 | 5 << 16 }; /* integrated, 6 LVT entries, no directed EOI: KVM's */

#define R(l, offset) ((l)->regs[(offset) / 4])

static const struct { uint16_t offset; uint32_t writable; } LVTS[] = {
    {LVT_TIMER, 0x000710FF & ~LVT_STATUS}, {LVT_THERMAL, 0x000117FF & ~LVT_STATUS}, {LVT_PERF, 0x000117FF & ~LVT_STATUS},
    {LVT_LINT0, 0x0001B7FF & ~LVT_STATUS}, {LVT_LINT1, 0x0001B7FF & ~LVT_STATUS}, {LVT_ERROR, 0x000110FF & ~LVT_STATUS},
};
enum { LVT_COUNT = sizeof LVTS / sizeof *LVTS };

static bool x2apic(const struct lapic *l) { return (l->base & (BASE_ENABLE | BASE_EXTD)) == (BASE_ENABLE | BASE_EXTD); }
bool lapic_hw_enabled(const struct lapic *l) { return l->base & BASE_ENABLE; }
bool lapic_enabled(const struct lapic *l) { return lapic_hw_enabled(l) && (R(l, SVR) & SVR_ENABLE); }
static bool sw_enabled(const struct lapic *l) { return R(l, SVR) & SVR_ENABLE; }
static unsigned timer_mode(const struct lapic *l) { return (R(l, LVT_TIMER) >> 17) & 3; }

/* ---- the three 256-bit registers ---- */
static uint32_t *word(struct lapic *l, uint32_t reg, uint8_t vector) { return &R(l, reg + (vector >> 5) * 0x10u); }
static void set_bit(struct lapic *l, uint32_t reg, uint8_t vector) { *word(l, reg, vector) |= 1u << (vector & 31); }
static void clear_bit(struct lapic *l, uint32_t reg, uint8_t vector) { *word(l, reg, vector) &= ~(1u << (vector & 31)); }
static bool test_bit(struct lapic *l, uint32_t reg, uint8_t vector) { return *word(l, reg, vector) >> (vector & 31) & 1; }

static int highest(const struct lapic *l, uint32_t reg)
{
    for (int i = 7; i >= 0; i--) {
        uint32_t bits = R(l, reg + (uint32_t)i * 0x10);
        if (bits)
            return i * 32 + 31 - __builtin_clz(bits);
    }
    return -1;
}

/* ---- priorities ---- */
static uint8_t processor_priority(const struct lapic *l)
{
    uint8_t tpr = (uint8_t)R(l, TPR);
    int isr = highest(l, ISR);
    uint8_t isrv = isr < 0 ? 0 : isr & 0xF0;
    return (tpr & 0xF0) >= isrv ? tpr : isrv;
}

int lapic_pending(const struct lapic *l)
{
    if (!lapic_hw_enabled(l))
        return -1;
    int irr = highest(l, IRR);
    return irr >= 0 && (irr & 0xF0) > (processor_priority(l) & 0xF0) ? irr : -1;
}

/* SDM 11.6.2.4: APR = TPR if it exceeds IRRV and ISRV, else the highest of the three classes. */
uint8_t lapic_arbitration(const struct lapic *l)
{
    int irr = highest(l, IRR), isr = highest(l, ISR);
    uint8_t tpr = (uint8_t)R(l, TPR), irrv = irr < 0 ? 0 : irr & 0xF0, isrv = isr < 0 ? 0 : isr & 0xF0;
    uint8_t top = irrv > isrv ? irrv : isrv;
    if ((tpr & 0xF0) >= irrv && (tpr & 0xF0) > isrv)
        return tpr;
    return (tpr & 0xF0) > top ? tpr & 0xF0 : top;
}

int lapic_acknowledge(struct lapic *l)
{
    int vector = lapic_pending(l);
    if (vector < 0)
        return R(l, SVR) & 0xFF; /* the spurious vector: no ISR bit, no EOI */
    clear_bit(l, IRR, (uint8_t)vector);
    set_bit(l, ISR, (uint8_t)vector);
    return vector;
}

static void recheck(struct lapic *l)
{
    if (lapic_pending(l) >= 0)
        irqchip_wake(l->chip, l->index);
}

/* ---- what arrives ---- */
static void request(struct lapic *l, uint8_t vector, bool level)
{
    set_bit(l, IRR, vector);
    if (level)
        set_bit(l, TMR, vector);
    else
        clear_bit(l, TMR, vector);
    recheck(l);
}

static void error(struct lapic *l, uint32_t bit)
{
    uint32_t lvt = R(l, LVT_ERROR);
    R(l, ESR_PENDING) |= bit;
    /* A bad vector in this entry must not report itself for ever. */
    if (!(lvt & LVT_MASK) && (lvt & 0xFF) >= 16 && lapic_hw_enabled(l) && sw_enabled(l))
        request(l, (uint8_t)lvt, false);
}

bool lapic_accept(struct lapic *l, uint8_t mode, uint8_t vector, bool level)
{
    const struct irqchip_host *host = &l->chip->host;
    if (!lapic_hw_enabled(l))
        return false;
    switch (mode) {
    case DELIVER_FIXED:
    case DELIVER_LOWEST:
        if (!sw_enabled(l))
            return false;
        if (vector < 16)
            error(l, ESR_RECEIVE_VECTOR);
        else
            request(l, vector, level);
        return true;
    case DELIVER_NMI:
        host->nmi(host->ctx, l->index);
        return true;
    case DELIVER_INIT:
        host->init(host->ctx, l->index);
        return true;
    case DELIVER_SIPI:
        host->sipi(host->ctx, l->index, vector);
        return true;
    default: /* SMI: there is no SMM. ExtINT: see irqchip_accepts_pic() */
        return false;
    }
}

static void deliver_lvt(struct lapic *l, uint32_t offset)
{
    uint32_t lvt = R(l, offset);
    if (!(lvt & LVT_MASK))
        lapic_accept(l, offset == LVT_TIMER || offset == LVT_ERROR ? DELIVER_FIXED : (lvt >> 8) & 7, (uint8_t)lvt,
                     offset == LVT_LINT0 && (lvt & LVT_LEVEL));
}

bool lapic_lint0_extint(const struct lapic *l)
{
    return !(R(l, LVT_LINT0) & LVT_MASK) && ((R(l, LVT_LINT0) >> 8) & 7) == DELIVER_EXTINT;
}

bool lapic_lint0_nmi(const struct lapic *l)
{
    return lapic_hw_enabled(l) && !(R(l, LVT_LINT0) & LVT_MASK) && ((R(l, LVT_LINT0) >> 8) & 7) == DELIVER_NMI;
}

void lapic_lint0_rise(struct lapic *l)
{
    uint8_t mode = (R(l, LVT_LINT0) >> 8) & 7;
    if (mode == DELIVER_FIXED || mode == DELIVER_NMI)
        deliver_lvt(l, LVT_LINT0);
}

static uint32_t x2apic_ldr(const struct lapic *l) { return (l->index >> 4) << 16 | 1u << (l->index & 15); }

/* SDM 11.6.2; a destination of 8 bits reaches an x2APIC as ids 0 to 254 and, logical, as cluster 0. */
bool lapic_matches(const struct lapic *l, const struct apic_message *m)
{
    uint32_t d = m->destination;
    if (!lapic_hw_enabled(l))
        return false;
    if (m->from_x2apic ? d == 0xFFFFFFFF : d == 0xFF)
        return true;
    if (!m->logical)
        return d == l->index;
    if (x2apic(l)) {
        uint32_t ldr = x2apic_ldr(l);
        return ldr >> 16 == d >> 16 && (ldr & d & 0xFFFF);
    }
    if (d > 0xFF)
        return false;
    uint32_t ldr = R(l, LDR) >> 24;
    if (R(l, DFR) >> 28 == 0xF)
        return ldr & d;
    return R(l, DFR) >> 28 == 0 && ldr >> 4 == d >> 4 && (ldr & d & 0xF);
}

/* ---- what it sends ---- */
static void send_ipi(struct lapic *l, uint32_t low, uint32_t destination)
{
    struct apic_message m = {.destination = destination, .vector = (uint8_t)low, .mode = (low >> 8) & 7,
                             .logical = low & ICR_LOGICAL, .from_x2apic = x2apic(l)};
    unsigned shorthand = (low >> 18) & 3;
    if ((m.mode == DELIVER_FIXED || m.mode == DELIVER_LOWEST) && m.vector < 16) {
        error(l, ESR_SEND_VECTOR);
        return;
    }
    if (m.mode == DELIVER_RESERVED || m.mode == DELIVER_EXTINT)
        return;
    if (m.mode == DELIVER_INIT && (low & ICR_LEVEL) && !(low & ICR_ASSERT))
        return; /* level de-assert: only arbitration ids of processors before the Pentium 4 hear it */
    if (!shorthand) {
        irqchip_send(l->chip, &m);
    } else if (shorthand == 1) {
        lapic_accept(l, m.mode, m.vector, false);
    } else {
        for (uint32_t i = 0; i < l->chip->vcpus; i++)
            if (shorthand == 2 || i != l->index)
                lapic_accept(&l->chip->lapics[i], m.mode, m.vector, false);
    }
}

static void end_of_interrupt(struct lapic *l)
{
    int vector = highest(l, ISR);
    if (vector < 0)
        return;
    clear_bit(l, ISR, (uint8_t)vector);
    if (test_bit(l, TMR, (uint8_t)vector))
        ioapic_eoi(l->chip, (uint8_t)vector);
    recheck(l);
}

/* ---- timer ---- */
static uint64_t divisor(const struct lapic *l)
{
    unsigned code = (R(l, TIMER_DIVIDE) & 3) | (R(l, TIMER_DIVIDE) >> 1 & 4);
    return code == 7 ? 1 : 2ull << code;
}

static uint64_t period(const struct lapic *l) { return R(l, TIMER_INITIAL) * divisor(l); }

/* ns until the count reaches zero; 0: disarmed. */
static uint64_t remaining(const struct lapic *l, uint64_t now)
{
    if (l->expiry == IRQCHIP_NEVER)
        return 0;
    if (l->expiry > now)
        return l->expiry - now;
    return timer_mode(l) == TIMER_PERIODIC && period(l) ? period(l) - (now - l->expiry) % period(l) : 0;
}

static void start_timer(struct lapic *l, uint64_t now, uint64_t ns) { l->expiry = ns ? now + ns : IRQCHIP_NEVER; }

static void write_lvt_timer(struct lapic *l, uint32_t value)
{
    bool was_deadline = timer_mode(l) == TIMER_DEADLINE;
    R(l, LVT_TIMER) = value;
    if (was_deadline != (timer_mode(l) == TIMER_DEADLINE)) { /* "disarms the local-APIC timer" */
        R(l, TIMER_INITIAL) = 0;
        l->tsc_deadline = 0;
        l->expiry = IRQCHIP_NEVER;
    }
}

uint64_t lapic_next_event(struct lapic *l)
{
    const struct irqchip_host *host = &l->chip->host;
    if (l->tsc_deadline)
        return host->tsc_to_ns(host->ctx, l->index, l->tsc_deadline);
    return l->expiry;
}

void lapic_advance(struct lapic *l, uint64_t now)
{
    if (lapic_next_event(l) > now)
        return;
    l->tsc_deadline = 0;
    if (l->expiry != IRQCHIP_NEVER)
        start_timer(l, now, remaining(l, now)); /* periods that were missed together are one interrupt */
    deliver_lvt(l, LVT_TIMER);
}

void lapic_clock_moved(struct lapic *l, uint64_t before, uint64_t now)
{
    if (l->expiry != IRQCHIP_NEVER)
        l->expiry += now - before;
}

/* ---- registers ---- */
static void write_svr(struct lapic *l, uint32_t value)
{
    R(l, SVR) = value & 0x3FF;
    if (value & SVR_ENABLE)
        return;
    for (unsigned i = 0; i < LVT_COUNT; i++) /* SDM 11.4.7.2: "the mask bits for all the LVT entries are set" */
        R(l, LVTS[i].offset) |= LVT_MASK;
}

/* Whether `offset` is a register that can be read (x2APIC has no DFR, APR, RRD, ICR2; xAPIC no SELF IPI). */
static bool readable(const struct lapic *l, uint32_t offset)
{
    if ((offset >= ISR && offset <= ESR) || (offset >= LVT_TIMER && offset <= TIMER_CURRENT))
        return true;
    switch (offset) {
    case ID: case VERSION: case TPR: case PPR: case LDR: case SVR: case ICR: case TIMER_DIVIDE:
        return true;
    case APR: case RRD: case DFR: case ICR2:
        return !x2apic(l);
    default:
        return false;
    }
}

static uint32_t read_register(struct lapic *l, uint32_t offset, uint64_t now)
{
    if (offset == TIMER_CURRENT || (offset >= IRR && offset < ESR))
        lapic_advance(l, now); /* who sees that the count has come to its end sees its interrupt, too */
    switch (offset) {
    case ID:
        return x2apic(l) ? l->index : l->index << 24;
    case LDR:
        return x2apic(l) ? x2apic_ldr(l) : R(l, LDR);
    case APR:
        return lapic_arbitration(l);
    case PPR:
        return processor_priority(l);
    case TIMER_CURRENT:
        return timer_mode(l) == TIMER_DEADLINE ? 0 : (uint32_t)(remaining(l, now) / divisor(l));
    default:
        return R(l, offset);
    }
}

/* False: no such register, or it cannot be written. */
static bool write_register(struct lapic *l, uint32_t offset, uint32_t value, uint64_t now)
{
    if (offset == LVT_TIMER || offset == TIMER_INITIAL || offset == TIMER_DIVIDE)
        lapic_advance(l, now); /* a count that has come to its end did so under the mode and divisor that it had */
    for (unsigned i = 0; i < LVT_COUNT; i++) {
        if (LVTS[i].offset != offset)
            continue;
        value &= LVTS[i].writable;
        if (!sw_enabled(l))
            value |= LVT_MASK;
        if (offset == LVT_TIMER)
            write_lvt_timer(l, value);
        else
            R(l, offset) = value;
        if (offset == LVT_LINT0)
            irqchip_pic_changed(l->chip);
        return true;
    }
    switch (offset) {
    case TPR:
        lapic_set_tpr(l, (uint8_t)value);
        return true;
    case EOI:
        end_of_interrupt(l);
        return true;
    case LDR:
        if (x2apic(l))
            return false;
        R(l, LDR) = value & 0xFF000000;
        return true;
    case DFR:
        if (x2apic(l))
            return false;
        R(l, DFR) = value | 0x0FFFFFFF;
        return true;
    case SVR:
        write_svr(l, value);
        return true;
    case ESR: /* SDM 11.5.3: a write makes the register show the errors since the last one */
        R(l, ESR) = R(l, ESR_PENDING);
        R(l, ESR_PENDING) = 0;
        return true;
    case ICR:
        R(l, ICR) = value & 0x000CCFFF & ~ICR_STATUS;
        send_ipi(l, value, x2apic(l) ? R(l, ICR2) : R(l, ICR2) >> 24);
        return true;
    case ICR2:
        if (x2apic(l))
            return false;
        R(l, ICR2) = value & 0xFF000000;
        return true;
    case TIMER_INITIAL:
        if (timer_mode(l) != TIMER_DEADLINE) {
            R(l, TIMER_INITIAL) = value;
            start_timer(l, now, period(l));
        }
        return true;
    case TIMER_DIVIDE: {
        uint64_t count = remaining(l, now) / divisor(l);
        R(l, TIMER_DIVIDE) = value & 0xB;
        if (l->expiry != IRQCHIP_NEVER)
            start_timer(l, now, (count ? count : 1) * divisor(l));
        return true;
    }
    case SELF_IPI:
        if (!x2apic(l))
            return false;
        send_ipi(l, (value & 0xFF) | 1 << 18, 0);
        return true;
    case ID: /* read-only, as on processors of today */
        return !x2apic(l);
    default:
        return false;
    }
}

bool lapic_mmio_read(struct lapic *l, uint32_t offset, uint8_t size, uint64_t *value, uint64_t now)
{
    uint32_t aligned = offset & ~15u, byte = offset & 15;
    *value = 0;
    if (byte + size > 4)
        return true; /* only the first four bytes of each sixteen exist */
    if (!readable(l, aligned)) {
        error(l, ESR_REGISTER);
        return true;
    }
    *value = read_register(l, aligned, now) >> (8 * byte);
    if (size < 4)
        *value &= (1u << (8 * size)) - 1;
    return true;
}

void lapic_mmio_write(struct lapic *l, uint32_t offset, uint8_t size, uint64_t value, uint64_t now)
{
    if ((offset & 15) || size != 4)
        return; /* "undefined"; KVM ignores them, too */
    if (!write_register(l, offset, (uint32_t)value, now) && !readable(l, offset))
        error(l, ESR_REGISTER);
}

/* ---- MSRs ---- */
static bool write_base(struct lapic *l, uint64_t value, bool by_host)
{
    uint64_t old = l->base & (BASE_ENABLE | BASE_EXTD), new = value & (BASE_ENABLE | BASE_EXTD);
    if ((value & BASE_RESERVED) || new == BASE_EXTD)
        return false;
    if (!by_host) { /* SDM figure 11-27: x2APIC is entered from xAPIC and left by disabling only */
        if (new == (BASE_ENABLE | BASE_EXTD) && !old)
            return false;
        if (new == BASE_ENABLE && old == (BASE_ENABLE | BASE_EXTD))
            return false;
        if (old && !new)
            lapic_reset(l, true);
    }
    l->base = value;
    if (old != new && new == (BASE_ENABLE | BASE_EXTD))
        R(l, ICR2) = 0;
    irqchip_pic_changed(l->chip);
    recheck(l);
    return true;
}

/* Bits of an x2APIC register that may be set in a write; others are a #GP (SDM table 11-6). */
static uint32_t x2apic_writable(uint32_t offset)
{
    for (unsigned i = 0; i < LVT_COUNT; i++)
        if (LVTS[i].offset == offset)
            return LVTS[i].writable | LVT_STATUS | (offset == LVT_LINT0 || offset == LVT_LINT1 ? 1u << 14 : 0);
    switch (offset) {
    case TPR: case SELF_IPI:
        return 0xFF;
    case EOI: case ESR:
        return 0;
    case SVR:
        return 0x3FF;
    case ICR:
        return 0x000CDFFF;
    case TIMER_DIVIDE:
        return 0xB;
    default:
        return 0xFFFFFFFF;
    }
}

bool lapic_msr_read(struct lapic *l, uint32_t msr, uint64_t *value, uint64_t now)
{
    if (msr == MSR_BASE) {
        *value = l->base;
        return true;
    }
    if (msr == MSR_DEADLINE) {
        lapic_advance(l, now);
        *value = l->tsc_deadline;
        return true;
    }
    uint32_t offset = (msr - MSR_X2APIC) << 4;
    if (msr < MSR_X2APIC || msr > MSR_X2APIC + 0x3F || !x2apic(l) || !readable(l, offset))
        return false;
    *value = read_register(l, offset, now);
    if (offset == ICR)
        *value |= (uint64_t)R(l, ICR2) << 32;
    return true;
}

bool lapic_msr_write(struct lapic *l, uint32_t msr, uint64_t value, uint64_t now, bool by_host)
{
    if (msr == MSR_BASE)
        return write_base(l, value, by_host);
    if (msr == MSR_DEADLINE) {
        if (timer_mode(l) == TIMER_DEADLINE) {
            l->tsc_deadline = value;
            lapic_advance(l, now);
        }
        return true;
    }
    uint32_t offset = (msr - MSR_X2APIC) << 4;
    if (msr < MSR_X2APIC || msr > MSR_X2APIC + 0x3F || !x2apic(l))
        return false;
    if ((value & ~(uint64_t)x2apic_writable(offset)) && (offset != ICR || ((uint32_t)value & ~x2apic_writable(ICR))))
        return false;
    if (offset == ICR)
        R(l, ICR2) = (uint32_t)(value >> 32);
    return write_register(l, offset, (uint32_t)value, now);
}

uint8_t lapic_tpr(const struct lapic *l) { return (uint8_t)R(l, TPR); }

void lapic_set_tpr(struct lapic *l, uint8_t tpr)
{
    R(l, TPR) = tpr;
    recheck(l);
}

/* ---- reset and state ---- */
void lapic_reset(struct lapic *l, bool init)
{
    memset(l->regs, 0, sizeof l->regs);
    if (!init)
        l->base = BASE_DEFAULT | BASE_ENABLE | (l->index ? 0 : BASE_BSP);
    R(l, VERSION) = VERSION_VALUE;
    R(l, DFR) = 0xFFFFFFFF;
    R(l, SVR) = 0xFF;
    for (unsigned i = 0; i < LVT_COUNT; i++)
        R(l, LVTS[i].offset) = LVT_MASK;
    if (l->index == 0) /* no firmware sets up virtual wire mode, so it is the power-up state, as in KVM */
        R(l, LVT_LINT0) = DELIVER_EXTINT << 8;
    l->tsc_deadline = 0;
    l->expiry = IRQCHIP_NEVER;
}

void lapic_save(struct lapic *l, struct kvm_lapic_state *state, uint64_t now)
{
    static const uint32_t LIVE[] = {LDR, PPR, APR, TIMER_CURRENT};
    uint32_t regs[256];
    _Static_assert(sizeof regs == sizeof state->regs, "the register page");
    memcpy(regs, l->regs, sizeof regs);
    for (unsigned i = 0; i < sizeof LIVE / sizeof *LIVE; i++)
        regs[LIVE[i] / 4] = read_register(l, LIVE[i], now);
    regs[ID / 4] = l->index << 24; /* KVM's form in both modes, unless KVM_CAP_X2APIC_API asks for another */
    regs[TIMER_REMAINDER / 4] = (uint32_t)(remaining(l, now) % divisor(l));
    memcpy(state->regs, regs, sizeof regs);
}

void lapic_load(struct lapic *l, const struct kvm_lapic_state *state, uint64_t now)
{
    memcpy(l->regs, state->regs, sizeof l->regs);
    R(l, ID) = 0;
    R(l, VERSION) = VERSION_VALUE;
    R(l, SVR) &= 0x3FF;
    R(l, TPR) &= 0xFF;
    R(l, TIMER_DIVIDE) &= 0xB;
    R(l, ESR_PENDING) &= 0xFF;
    R(l, ICR) &= 0x000CCFFF & ~ICR_STATUS;
    for (unsigned i = 0; i < LVT_COUNT; i++)
        R(l, LVTS[i].offset) &= LVTS[i].writable;
    R(l, ISR) &= 0xFFFF0000; /* vectors 0 to 15 cannot be requested */
    R(l, IRR) &= 0xFFFF0000;
    uint64_t left = R(l, TIMER_CURRENT) * divisor(l) + R(l, TIMER_REMAINDER) % divisor(l);
    R(l, TIMER_REMAINDER) = R(l, TIMER_CURRENT) = 0;
    start_timer(l, now, timer_mode(l) == TIMER_DEADLINE ? 0 : left);
    irqchip_pic_changed(l->chip);
    recheck(l);
}
