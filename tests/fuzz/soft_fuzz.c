/* Fuzz the software core: random bytes and random plausible instructions in every mode, with interrupts, DMA, dirty log
 * and state changes in between. The promise under test: whatever the guest runs, the process neither crashes nor hangs
 * nor touches memory outside the guest's RAM. Build with ASan and UBSan.
 *
 *   soft_fuzz SECONDS [SEED]        campaigns until the time is over; a failing case prints its seed
 *   soft_fuzz --case SEED           one case, with the state at every stop
 *   soft_fuzz --list SEED COUNT     cases, each with a hash of what it left: equal for every build of the core
 * Exit status 0: nothing found. The sanitizers abort with their own report; a hang is reported by SIGPROF or SIGALRM.
 */
#include <linux/kvm.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "soft/soft.h"

enum {
    RAM_SIZE = 2 << 20, ROM_SIZE = 0x10000, CODE = 0x10000, CODE_SIZE = 0x3000, DATA = 0x40000, TABLES = 0x100000,
    IDT_AT = 0x1000, GDT_AT = 0x2000, TSS_AT = 0x3000, HANDLER = 0x4000, STACK = 0x8000,
    CASE_NS = 1000, /* shortest */
    HANG_SECONDS = 20, /* of processor time: a busy host is no hang */
    SLEEP_SECONDS = 1800, /* nothing in a case waits */
};
#define ROM_AT 0xFFFF0000ull

enum mode { REAL16, PROT32, PROT16, PROT32_PAGED, PAE, LONG64, LONG64_USER, COMPAT, VM86, MODES };

static uint64_t random_state, current_seed;
static uint8_t *ram, *rom;

static uint64_t rnd(void)
{
    uint64_t z = (random_state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

static uint32_t below(uint32_t n) { return (uint32_t)(rnd() >> 32) % n; }

static uint64_t edge_value(void)
{
    static const uint64_t edges[] = { 0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
                                      0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x00007FFFFFFFFFFF,
                                      0xFFFF800000000000, RAM_SIZE - 1, RAM_SIZE - 4, RAM_SIZE, 0xFEE00000, 0xFEC00000,
                                      0xFFFFFFF8, 0xFFF, 0xFFC, 0xC0000080, 0x800, 0x1B, 0x6E0 };
    switch (below(4)) {
    case 0: return edges[below(sizeof edges / sizeof edges[0])];
    case 1: return DATA + below(0x10000);
    case 2: return CODE + below(CODE_SIZE);
    default: {
        uint64_t value = rnd(); /* one call a statement everywhere: the order of evaluation is the compiler's otherwise */
        return value >> below(64);
    }
    }
}

/* ---- code ---- */

static unsigned put_modrm(uint8_t *p, bool address16)
{
    uint8_t modrm = (uint8_t)rnd();
    unsigned n = 0;
    p[n++] = modrm;
    unsigned mod = modrm >> 6, rm = modrm & 7;
    if (mod == 3)
        return n;
    if (address16) {
        unsigned d = mod == 1 ? 1 : mod == 2 || (mod == 0 && rm == 6) ? 2 : 0;
        for (unsigned i = 0; i < d; i++)
            p[n++] = (uint8_t)rnd();
        return n;
    }
    uint8_t sib = 0;
    if (rm == 4)
        p[n++] = sib = (uint8_t)rnd();
    if (mod == 1) {
        p[n++] = (uint8_t)rnd();
    } else if (mod == 2 || (mod == 0 && (rm == 5 || (rm == 4 && (sib & 7) == 5)))) {
        uint32_t d = below(3) ? DATA + below(0x10000) : (uint32_t)edge_value();
        memcpy(p + n, &d, 4);
        n += 4;
    }
    return n;
}

/* Something that is likely to be one instruction: prefixes, an opcode of any map, ModRM, an immediate. */
static unsigned put_instruction(uint8_t *p)
{
    static const uint8_t prefixes[] = { 0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65 };
    unsigned n = 0;
    while (below(4) == 0 && n < 3)
        p[n++] = prefixes[below(sizeof prefixes)];
    bool vex = below(6) == 0;
    if (below(3) == 0 && !vex)
        p[n++] = (uint8_t)(0x40 | below(16));
    if (vex) {
        unsigned map = 1 + below(3);
        if (map == 1 && below(2)) {
            p[n++] = 0xC5;
        } else {
            p[n++] = 0xC4;
            p[n++] = (uint8_t)(0xE0 | map); /* in 32-bit code that is no LES */
            if (below(2))
                p[n - 1] ^= (uint8_t)(below(8) << 5);
        }
        p[n++] = (uint8_t)(below(2) ? rnd() : 0x78 | (rnd() & 0x87)); /* half of them without VEX.vvvv */
        p[n++] = (uint8_t)rnd();
        n += put_modrm(p + n, false);
        if (map == 3 || below(4) == 0)
            p[n++] = (uint8_t)rnd();
        return n;
    }
    switch (below(8)) {
    case 0: case 1: case 2:
        p[n++] = 0x0F;
        p[n++] = (uint8_t)rnd();
        break;
    case 3:
        p[n++] = 0x0F;
        p[n++] = below(2) ? 0x38 : 0x3A;
        p[n++] = (uint8_t)rnd();
        break;
    case 4:
        p[n++] = (uint8_t)(0xD8 + below(8));
        break;
    default:
        p[n++] = (uint8_t)rnd();
        break;
    }
    n += put_modrm(p + n, below(8) == 0);
    unsigned immediate = below(5);
    for (unsigned i = 0; i < immediate; i++)
        p[n++] = (uint8_t)(below(2) ? rnd() : below(4));
    return n;
}

/* 64-bit code as compilers make it: an access at a small distance from register `base`, a push, a pop, or a change of `base`,
 * which now and then points near the end of a page. */
static unsigned put_access(uint8_t *p, unsigned base)
{
    static const uint8_t opcodes[] = { 0x8B, 0x8B, 0x89, 0x89, 0x03, 0x01, 0x11, 0x13, 0x2B, 0x39, 0x3B, 0x85, 0x8A, 0x88, 0x63, 0x31 };
    unsigned n = 0, reg = below(16), wide = below(2) << 3, high = base >> 3;
    int8_t distance = (int8_t)(below(80) - 40);
    switch (below(12)) {
    case 0:
        if (reg >> 3)
            p[n++] = 0x41;
        p[n++] = (uint8_t)((below(2) ? 0x50 : 0x58) | (reg & 7)); /* push, pop */
        return n;
    case 1: {
        uint64_t at = DATA + 0x1000 * (1 + below(8)) - below(96);
        if (below(8))
            break;
        p[n++] = (uint8_t)(0x48 | high);
        p[n++] = (uint8_t)(0xB8 | (base & 7)); /* mov base, imm64 */
        memcpy(p + n, &at, 8);
        return n + 8;
    }
    case 2:
        p[n++] = (uint8_t)(0x48 | high);
        p[n++] = 0x83;
        p[n++] = (uint8_t)((below(2) ? 0xC0 : 0xE8) | (base & 7)); /* add, sub base, imm8 */
        p[n++] = (uint8_t)(below(32) - 16);
        return n;
    case 3: reg = base, wide = 8; p[n++] = (uint8_t)(0x48 | high << 2 | high), p[n++] = 0x8D; goto operand; /* lea base, [base + d] */
    case 4: reg = below(2); p[n++] = (uint8_t)(0x40 | wide | high), p[n++] = 0xFF; goto operand; /* inc, dec */
    case 5: p[n++] = (uint8_t)(0x40 | wide | (reg >> 3) << 2 | high), p[n++] = 0x0F, p[n++] = below(2) ? 0xB6 : 0xBF; goto operand;
    case 6: /* POPCNT, TZCNT, LZCNT of registers */
        p[n++] = 0xF3, p[n++] = (uint8_t)(0x40 | wide | below(2)), p[n++] = 0x0F;
        p[n++] = below(3) ? 0xBD : below(2) ? 0xBC : 0xB8;
        p[n++] = (uint8_t)(0xC0 | (reg & 7) << 3 | below(8));
        return n;
    default: break;
    }
    if (below(6) == 0)
        p[n++] = 0x66;
    p[n++] = (uint8_t)(0x40 | wide | (reg >> 3) << 2 | high);
    p[n++] = opcodes[below(sizeof opcodes)];
operand:
    p[n++] = (uint8_t)(0x40 | (reg & 7) << 3 | (base & 7));
    if ((base & 7) == 4)
        p[n++] = 0x24;
    p[n++] = (uint8_t)distance;
    return n;
}

static void fill_code(uint8_t *at, unsigned size)
{
    if (below(4) == 0) {
        unsigned n = 0, base = below(16);
        uint64_t data = DATA + 0x1000 * (1 + below(8)) - below(96);
        at[n++] = (uint8_t)(0x48 | base >> 3);
        at[n++] = (uint8_t)(0xB8 | (base & 7));
        memcpy(at + n, &data, 8);
        for (n += 8; n + 32 < size;)
            n += below(64) ? put_access(at + n, below(8) ? base : below(16)) : put_instruction(at + n);
        return;
    }
    if (below(4) == 0) {
        for (unsigned i = 0; i < size; i++)
            at[i] = (uint8_t)rnd();
        return;
    }
    unsigned n = 0;
    while (n + 32 < size)
        n += put_instruction(at + n);
}

/* ---- machine set-up ---- */

static void put64(uint32_t at, uint64_t v) { memcpy(ram + at, &v, 8); }
static void put32(uint32_t at, uint32_t v) { memcpy(ram + at, &v, 4); }

/* A page table entry: anything, or a page of RAM with odd rights. */
static uint64_t odd_entry(void)
{
    uint64_t entry = rnd();
    if (below(2))
        return entry;
    return (entry & (1ull << 63 | 0x1FF000 | 7)) | 1;
}

static void build_tables(enum mode mode)
{
    static const uint64_t gdt[] = { 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF, 0x00CFF3000000FFFF,
                                    0x00AFFB000000FFFF, 0x00CFFB000000FFFF, 0x000F9B000000FFFF, 0x0000930000000FFF,
                                    0x0000890030000FFF, 0, 0x0000EC0000184000, 0, 0x00C097000000000F };
    memcpy(ram + GDT_AT, gdt, sizeof gdt);
    for (unsigned i = 16; i < 64; i++) /* any descriptor */
        put64(GDT_AT + i * 8, rnd());
    bool long_mode = mode >= LONG64 && mode <= COMPAT;
    for (unsigned v = 0; v < 256; v++) {
        uint32_t handler = HANDLER + (v < 32 ? v * 16 : 0x200);
        if (mode == REAL16) {
            put32(v * 4, handler);
        } else if (long_mode) {
            put64(IDT_AT + v * 16, (handler & 0xFFFF) | 0x18u << 16 | (uint64_t)(0xEE00 | (v == 8)) << 32 | (uint64_t)(handler >> 16) << 48);
            put64(IDT_AT + v * 16 + 8, 0);
        } else {
            put64(IDT_AT + v * 8, (handler & 0xFFFF) | 0x08u << 16 | 0xEE00ull << 32 | (uint64_t)(handler >> 16) << 48);
        }
    }
    if (below(8) == 0)
        for (unsigned i = 0; i < 16; i++) /* gates of any kind */
            put64(IDT_AT + below(512) * 8, rnd());
    memset(ram + TSS_AT, 0, 0x200);
    if (long_mode) {
        for (unsigned i = 0; i < 10; i++)
            put64(TSS_AT + 4 + i * 8, STACK - i * 0x100);
    } else {
        for (unsigned i = 0; i < 3; i++) {
            put32(TSS_AT + 4 + i * 8, STACK - i * 0x100);
            put32(TSS_AT + 8 + i * 8, 0x10);
        }
    }
    ram[TSS_AT + 0x66] = 0x68;
    /* Handlers: drop the error code, step the return address on by a few bytes, return. */
    for (unsigned v = 0; v < 33; v++) {
        uint8_t *h = ram + HANDLER + v * 16;
        unsigned n = 0;
        bool error = v == 8 || (v >= 10 && v <= 14) || v == 17;
        if (mode == REAL16) {
            static const uint8_t code[] = { 0x55, 0x89, 0xE5, 0x83, 0x46, 0x02, 0x03, 0x5D, 0xCF };
            memcpy(h, code, sizeof code); /* push bp; mov bp,sp; add word [bp+2],3; pop bp; iret */
            continue;
        }
        if (error) {
            static const uint8_t drop64[] = { 0x48, 0x83, 0xC4, 0x08 }, drop32[] = { 0x83, 0xC4, 0x04 };
            memcpy(h, long_mode ? drop64 : drop32, long_mode ? 4 : 3);
            n = long_mode ? 4 : 3;
        }
        static const uint8_t step64[] = { 0x48, 0x83, 0x04, 0x24, 0x03, 0x48, 0xCF }, step32[] = { 0x83, 0x04, 0x24, 0x03, 0xCF };
        memcpy(h + n, long_mode ? step64 : step32, long_mode ? 7 : 5);
    }
    if (below(16) == 0)
        fill_code(ram + HANDLER, 0x220);
    /* Page tables: identity over RAM with odd entries in between. */
    memset(ram + TABLES, 0, 0x6000);
    if (mode == PROT32_PAGED || mode == VM86) {
        put32(TABLES, TABLES + 0x1007);
        put32(TABLES + 4, below(2) ? 0x87 : (uint32_t)rnd());
        for (unsigned i = 0; i < 512; i++)
            put32(TABLES + 0x1000 + i * 4, i << 12 | 7);
        for (unsigned i = 0; i < 24; i++)
            put32(TABLES + 0x1000 + (0x40 + i % 16) * 4, (uint32_t)odd_entry());
    } else if (mode == PAE || long_mode) {
        put64(TABLES, TABLES + (mode == PAE ? 0x1001 : 0x1007));
        put64(TABLES + 8, below(4) ? 0 : rnd() & ~0x1E6ull);
        uint32_t pd = mode == PAE ? TABLES + 0x1000 : TABLES + 0x2000;
        if (mode != PAE) {
            put64(TABLES + 0x1000, TABLES + 0x2007);
            put64(TABLES + 0x1008, below(2) ? 0x87 : rnd());
            put64(TABLES + 0x1FF8, below(2) ? TABLES + 0x2007 : rnd());
            put64(TABLES + 0xFF8, TABLES + 0x1007);
        }
        put64(pd, TABLES + 0x3007);
        put64(pd + 8, below(2) ? 0x87 : rnd());
        put64(pd + 16, 0xFEC00083ull | 4);
        for (unsigned i = 0; i < 512; i++)
            put64(TABLES + 0x3000 + i * 8, (uint64_t)i << 12 | 7);
        for (unsigned i = 0; i < 24; i++)
            put64(TABLES + 0x3000 + (0x40 + i % 16) * 8, odd_entry());
    }
}

static struct kvm_segment flat(uint16_t selector, uint8_t type, uint8_t dpl, bool wide)
{
    return (struct kvm_segment){ .limit = 0xFFFFFFFF, .selector = selector, .type = type, .present = 1, .dpl = dpl, .s = 1,
                                 .db = !wide, .l = wide, .g = 1 };
}

static void build_state(struct soft_vm *vm, enum mode mode)
{
    struct kvm_sregs s;
    struct kvm_regs r = { .rflags = 2 | (rnd() & 0x8D5) };
    uint64_t *gpr = (uint64_t *)&r;
    soft_vcpu_get(vm, 0, SOFT_STATE_SREGS, &s, sizeof s);
    for (unsigned i = 0; i < 16; i++)
        gpr[i] = edge_value();
    r.rsp = STACK;
    r.rip = CODE;
    s.cr0 = 0x10 | (below(2) ? 0x20 : 0);
    s.cr0 |= below(8) ? 0 : 0xC;
    s.cr2 = s.cr3 = s.efer = 0;
    s.cr4 = 0x600 | (below(4) ? 0 : rnd() & 0x304F0);
    s.cr8 = 0;
    s.gdt = (struct kvm_dtable){ .base = GDT_AT, .limit = 0x1FF };
    s.idt = (struct kvm_dtable){ .base = mode == REAL16 ? 0 : IDT_AT, .limit = 0xFFF };
    s.tr = (struct kvm_segment){ .base = TSS_AT, .limit = 0xFFF, .selector = 0x48, .type = 11, .present = 1 };
    s.ldt = (struct kvm_segment){ .base = GDT_AT, .limit = 0x1FF, .selector = 0x50, .type = 2, .present = (uint8_t)below(2) };
    if (mode == REAL16) {
        struct kvm_segment seg = { .limit = 0xFFFF, .type = 3, .present = 1, .s = 1 };
        s.ds = s.es = s.fs = s.gs = s.ss = s.cs = seg;
        s.cs.type = 11;
        s.cs.selector = CODE >> 4;
        s.cs.base = CODE;
        s.ds.selector = s.es.selector = DATA >> 4;
        s.ds.base = s.es.base = DATA;
        r.rip = 0;
    } else {
        s.cr0 |= 1 | (below(2) ? 1u << 16 : 0);
        s.cs = flat(0x08, 11, 0, false);
        s.ds = s.es = s.fs = s.gs = s.ss = flat(0x10, 3, 0, false);
        if (mode == PROT16) {
            s.cs.db = s.ss.db = 0;
            s.ds.limit = DATA + 0x1000;
            s.cs.base = CODE;
            s.cs.limit = 0xFFFF;
            r.rip = 0;
        }
        if (mode >= PROT32_PAGED) {
            s.cr0 |= 1u << 31;
            s.cr3 = TABLES;
            s.cr4 |= 0x10 | (mode == PAE || (mode >= LONG64 && mode <= COMPAT) ? 0x20 : 0);
        }
        if (mode >= LONG64 && mode <= COMPAT) {
            s.efer = 0x500 | (below(4) ? 0x801 : 0);
            if (mode != COMPAT)
                s.cs = flat(0x18, 11, 0, true);
            s.cr4 |= below(2) ? 0x10080 : 0;
        }
        if (mode == LONG64_USER || (mode == COMPAT && below(2))) {
            s.cs = mode == COMPAT ? flat(0x33, 11, 3, false) : flat(0x2B, 11, 3, true);
            s.ss = s.ds = s.es = flat(0x23, 3, 3, false);
        }
        if (mode == VM86) {
            struct kvm_segment seg = { .limit = 0xFFFF, .type = 3, .present = 1, .s = 1, .dpl = 3 };
            s.ds = s.es = s.fs = s.gs = s.ss = s.cs = seg;
            s.cs.selector = CODE >> 4;
            s.cs.base = CODE;
            r.rip = 0;
            r.rflags |= 1u << 17 | (below(2) ? 0x3000 : 0);
        }
    }
    s.apic_base = 0xFEE00900;
    if (below(4) == 0)
        r.rflags |= below(2) ? 0x200 : 0x100;
    if (below(4)) { /* YMM registers, where this host has them */
        struct kvm_xcrs xcrs = { .nr_xcrs = 1 };
        xcrs.xcrs[0].value = soft_supported_xcr0();
        soft_vcpu_set(vm, 0, SOFT_STATE_XCRS, &xcrs, sizeof xcrs);
        s.cr4 |= 0x40000;
    }
    soft_vcpu_set(vm, 0, SOFT_STATE_SREGS, &s, sizeof s);
    soft_vcpu_set(vm, 0, SOFT_STATE_REGS, &r, sizeof r);
    soft_vcpu_set(vm, 0, SOFT_STATE_SREGS, &s, sizeof s);
    static const struct kvm_mp_state runnable = { KVM_MP_STATE_RUNNABLE };
    soft_vcpu_set(vm, 0, SOFT_STATE_MP, &runnable, sizeof runnable);
    struct kvm_vcpu_events none = { .flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW };
    soft_vcpu_set(vm, 0, SOFT_STATE_EVENTS, &none, sizeof none);
    if (below(4) == 0) {
        uint8_t area[4096] __attribute__((aligned(64)));
        soft_vcpu_get(vm, 0, SOFT_STATE_XSAVE, area, sizeof area);
        for (unsigned i = 32; i < 832; i++)
            area[i] = i < 416 || i >= 576 ? (uint8_t)rnd() : area[i];
        area[512] = 7;
        soft_vcpu_set(vm, 0, SOFT_STATE_XSAVE, area, sizeof area);
    }
    struct kvm_debugregs d = { .dr6 = 0xFFFF0FF0, .dr7 = 0x400 };
    if (below(16) == 0) {
        for (unsigned i = 0; i < 4; i++)
            d.db[i] = edge_value();
        d.dr7 |= rnd() & 0xFFFF00FF;
    }
    soft_vcpu_set(vm, 0, SOFT_STATE_DEBUGREGS, &d, sizeof d);
}

/* ---- hostile surroundings ---- */

static struct soft_vm *the_vm;

static void disturb(struct soft_vm *vm)
{
    uint8_t bitmap[RAM_SIZE / 4096 / 8];
    uint64_t at = below(RAM_SIZE - 64);
    switch (below(8)) {
    case 0: soft_vm_set_irq(vm, below(24), at & 1); break;
    case 1: soft_vm_signal_msi(vm, 0xFEE00000 | at, (uint32_t)rnd()); break;
    case 2: soft_vm_nmi(vm, 0); break;
    case 3:
        for (unsigned i = 0; i < 64; i++)
            ram[at + i] = (uint8_t)rnd();
        soft_vm_memory_written(vm, at, 64);
        break;
    case 4: soft_vm_memory_written(vm, rnd(), at); break;
    default: soft_vm_dirty_log(vm, 0, bitmap, sizeof bitmap); break;
    }
}

static uint64_t access_bus(void *ctx, const struct soft_access *a)
{
    (void)ctx;
    if (a->write && below(8) == 0)
        disturb(the_vm);
    return rnd();
}

static void random_bytes(void *ctx, void *buffer, size_t size)
{
    (void)ctx;
    for (size_t i = 0; i < size; i++)
        ((uint8_t *)buffer)[i] = (uint8_t)rnd();
}

static void random_state_blob(struct soft_vm *vm)
{
    static const size_t sizes[] = { sizeof(struct kvm_regs), sizeof(struct kvm_sregs), 4096, sizeof(struct kvm_xcrs), 0,
                                    sizeof(struct kvm_lapic_state), sizeof(struct kvm_vcpu_events),
                                    sizeof(struct kvm_debugregs), sizeof(struct kvm_mp_state) };
    uint8_t blob[4096] __attribute__((aligned(64)));
    unsigned kind = below(9);
    if (!sizes[kind])
        return;
    soft_vcpu_get(vm, 0, (enum soft_state)kind, blob, sizes[kind]);
    for (unsigned i = 0; i < 4; i++)
        {
        uint32_t at = below((uint32_t)sizes[kind]);
        blob[at] = (uint8_t)rnd();
    }
    soft_vcpu_set(vm, 0, (enum soft_state)kind, blob, sizes[kind]);
}

static void on_hang(int signal_number)
{
    (void)signal_number;
    char text[80];
    int n = snprintf(text, sizeof text, "soft_fuzz: HANG in case %llu\n", (unsigned long long)current_seed);
    if (write(2, text, (size_t)n) < 0)
        _exit(1);
    abort();
}

/* Seconds from now; 0: none. */
static void watch(unsigned busy, unsigned asleep)
{
    struct itimerval time = {.it_value.tv_sec = busy};
    setitimer(ITIMER_PROF, &time, NULL);
    alarm(asleep);
}

static struct soft_vm *create(void)
{
    static const struct soft_host host = { .access = access_bus, .random = random_bytes };
    const struct soft_config config = { .vcpus = 2, .virtual_clock = true, .virtual_ips = 1000000000, .tsc_khz = 1000000, .quantum = 5000 };
    struct soft_vm *vm = soft_vm_create(&config, &host);
    if (!vm || soft_vm_set_slot(vm, 0, 0, RAM_SIZE, ram, false, true) || soft_vm_set_slot(vm, 1, ROM_AT, ROM_SIZE, rom, true, false))
        abort();
    return the_vm = vm;
}

static uint64_t stops[8];

static uint64_t hash_bytes(uint64_t h, const void *data, size_t size)
{
    uint64_t word;
    for (size_t i = 0; i + 8 <= size; i += 8) {
        memcpy(&word, (const uint8_t *)data + i, 8);
        h = (h ^ word) * 0x9E3779B97F4A7C15ull;
        h ^= h >> 29;
    }
    return h;
}

static uint64_t hash_case(struct soft_vm *vm)
{
    uint64_t h = hash_bytes(soft_vm_instructions(vm), ram, RAM_SIZE);
    for (uint32_t vcpu = 0; vcpu < 2; vcpu++) {
        struct kvm_regs r;
        struct kvm_sregs s;
        uint8_t xsave[4096];
        soft_vcpu_get(vm, vcpu, SOFT_STATE_REGS, &r, sizeof r);
        soft_vcpu_get(vm, vcpu, SOFT_STATE_SREGS, &s, sizeof s);
        soft_vcpu_get(vm, vcpu, SOFT_STATE_XSAVE, xsave, sizeof xsave);
        h = hash_bytes(hash_bytes(hash_bytes(h, &r, sizeof r), &s, sizeof s), xsave, sizeof xsave);
    }
    return h;
}

static bool verbose;

static void print_case(struct soft_vm *vm, const char *when)
{
    printf("%s: instructions %llu\n", when, (unsigned long long)soft_vm_instructions(vm));
    for (uint32_t vcpu = 0; vcpu < 2; vcpu++) {
        struct kvm_regs r;
        struct kvm_sregs s;
        uint64_t words[18];
        soft_vcpu_get(vm, vcpu, SOFT_STATE_REGS, &r, sizeof r);
        soft_vcpu_get(vm, vcpu, SOFT_STATE_SREGS, &s, sizeof s);
        memcpy(words, &r, sizeof words);
        printf(" vcpu %u cs %04x base %llx rip %llx flags %llx cr0 %llx cr2 %llx cr3 %llx cr4 %llx efer %llx\n", vcpu,
               s.cs.selector, s.cs.base, r.rip, r.rflags, s.cr0, s.cr2, s.cr3, s.cr4, s.efer);
        for (unsigned i = 0; i < 16; i++)
            printf(" %016llx%s", (unsigned long long)words[i], i % 8 == 7 ? "\n" : "");
    }
    for (uint32_t page = 0; page < RAM_SIZE; page += 4096)
        printf(" page %x %016llx\n", page, (unsigned long long)hash_bytes(1, ram + page, 4096));
}

static uint64_t run_case(uint64_t seed)
{
    current_seed = seed;
    random_state = seed;
    watch(HANG_SECONDS, SLEEP_SECONDS);
    memset(ram, 0, RAM_SIZE);
    struct soft_vm *vm = create();
    enum mode mode = (enum mode)below(MODES);
    fill_code(ram + CODE, CODE_SIZE);
    fill_code(ram + DATA, 0x1000);
    fill_code(ram + RAM_SIZE - 0x1000, 0x1000); /* code up to the very end of RAM */
    build_tables(mode);
    soft_vm_memory_written(vm, 0, RAM_SIZE);
    build_state(vm, mode);
    if (below(32) == 0)
        random_state_blob(vm);
    uint64_t end = soft_vm_now(vm) + ((uint64_t)CASE_NS << below(6));
    if (verbose)
        print_case(vm, "start");
    for (unsigned turns = 0; turns < 64; turns++) {
        uint32_t vcpu;
        soft_vm_set_alarm(vm, end);
        enum soft_stop stop = soft_vm_run(vm, &vcpu);
        stops[stop & 7]++;
        if (verbose)
            print_case(vm, "stop");
        if (stop == SOFT_STOP_SHUTDOWN || stop == SOFT_STOP_HALTED || stop == SOFT_STOP_ERROR)
            break;
        if (soft_vm_now(vm) >= end) {
            if (below(2))
                break;
            disturb(vm);
            end = soft_vm_now(vm) + CASE_NS / 4;
        }
    }
    uint64_t hash = hash_case(vm);
    soft_vm_destroy(vm);
    watch(0, 0);
    return hash;
}

/* Memory between pages that may not be touched (host code is not instrumented). */
static uint8_t *guarded(size_t size)
{
#ifdef __SANITIZE_ADDRESS__
    return aligned_alloc(4096, size);
#else
    const size_t guard = 16 << 20;
    uint8_t *at = mmap(NULL, size + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED || mprotect(at + guard, size, PROT_READ | PROT_WRITE))
        abort();
    return at + guard;
#endif
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "soft_fuzz SECONDS [SEED] | --case SEED | --list SEED COUNT\n");
        return 2;
    }
    signal(SIGALRM, on_hang);
    signal(SIGPROF, on_hang);
    ram = guarded(RAM_SIZE);
    rom = guarded(ROM_SIZE);
    memset(ram, 0, RAM_SIZE);
    memset(rom, 0xF4, ROM_SIZE);
    if (!strcmp(argv[1], "--case") && argc > 2) {
        verbose = true;
        run_case(strtoull(argv[2], NULL, 0));
        return 0;
    }
    if (!strcmp(argv[1], "--list") && argc > 3) {
        uint64_t seed = strtoull(argv[2], NULL, 0), count = strtoull(argv[3], NULL, 0);
        for (uint64_t i = 0; i < count; i++)
            printf("%llu %016llx\n", (unsigned long long)(seed + i), (unsigned long long)run_case(seed + i));
        return 0;
    }
    long seconds = atol(argv[1]);
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : (uint64_t)time(NULL), cases = 0;
    time_t start = time(NULL);
    while (time(NULL) - start < seconds) {
        run_case(seed * 1000003 + cases++);
    }
    printf("soft_fuzz: %llu cases from seed %llu; stops: wake %llu shutdown %llu halted %llu alarm %llu\n",
           (unsigned long long)cases, (unsigned long long)seed, (unsigned long long)stops[SOFT_STOP_WAKE],
           (unsigned long long)stops[SOFT_STOP_SHUTDOWN], (unsigned long long)stops[SOFT_STOP_HALTED],
           (unsigned long long)stops[SOFT_STOP_ALARM]);
    return 0;
}
