/* The guest that runs one instruction at CPL 3 in long mode, for every execution core: pages that mirror those of
 * native.c, and an IDT whose gates all lead to HLT at CPL 0, so that an instruction's end (INT3 behind it) or fault
 * stops the vCPU with the exception frame on its kernel stack. core.c and kvm.c are the cores.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "guest.h"

enum {
    /* guest-physical */
    PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, PT_CODE = 0x4000, PT_DATA = 0x5000, PT_STACK = 0x6000, PT_KERNEL = 0x7000,
    KERNEL = 0x10000, KERNEL_SIZE = 0x10000, /* GDT, IDT, TSS, handlers, stack */
    GDT = KERNEL, TSS = KERNEL + 0x800, IDT = KERNEL + 0x1000, HANDLERS = KERNEL + 0x2000, KERNEL_STACK = KERNEL + 0x8000,
    CODE = 0x100000, DATA = 0x110000, STACK = 0x120000,
    /* linear */
    KERNEL_BASE = 0x38000000,
};
#define LINEAR(gpa) ((uint64_t)KERNEL_BASE + ((gpa) - KERNEL))
enum { PRESENT = 1, WRITABLE = 2, USER = 4 };

static void put64(struct guest *g, uint64_t gpa, uint64_t value) { memcpy(g->ram + gpa, &value, 8); }

static void map(struct guest *g, uint64_t table, uint64_t linear, uint64_t gpa, uint64_t size, uint64_t rights)
{
    for (uint64_t o = 0; o < size; o += 0x1000)
        put64(g, table + ((linear + o) >> 12 & 511) * 8, (gpa + o) | rights | PRESENT);
}

static struct kvm_segment segment(uint16_t selector, unsigned type, unsigned dpl, bool l, bool db)
{
    return (struct kvm_segment){.limit = 0xFFFFFFFF, .selector = selector, .type = (uint8_t)type, .present = 1, .dpl = (uint8_t)dpl,
                                .db = db, .s = 1, .l = l, .g = 1};
}

void guest_die(const struct guest *g, const char *what)
{
    fprintf(stderr, "oracle: %s: %s\n", g->name, what);
    exit(3);
}

void guest_memory(struct guest *g)
{
    g->ram = mmap(NULL, GUEST_RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (g->ram == MAP_FAILED)
        guest_die(g, "mmap");
    put64(g, PML4, PDPT | PRESENT | WRITABLE | USER);
    put64(g, PDPT, PD | PRESENT | WRITABLE | USER);
    put64(g, PD + (CODE_BASE >> 21 & 511) * 8, PT_CODE | PRESENT | WRITABLE | USER);
    put64(g, PD + (DATA_BASE >> 21 & 511) * 8, PT_DATA | PRESENT | WRITABLE | USER);
    put64(g, PD + (STACK_BASE >> 21 & 511) * 8, PT_STACK | PRESENT | WRITABLE | USER);
    put64(g, PD + (KERNEL_BASE >> 21 & 511) * 8, PT_KERNEL | PRESENT | WRITABLE);
    map(g, PT_CODE, CODE_BASE, CODE, CODE_SIZE, WRITABLE | USER);
    const uint64_t nx = 1ull << 63;
    map(g, PT_DATA, DATA_BASE, DATA, DATA_WRITABLE, WRITABLE | USER | nx);
    map(g, PT_DATA, DATA_BASE + DATA_WRITABLE, DATA + DATA_WRITABLE, DATA_SIZE - DATA_WRITABLE, USER | nx);
    map(g, PT_STACK, STACK_BASE, STACK, STACK_SIZE, WRITABLE | USER | nx);
    map(g, PT_KERNEL, KERNEL_BASE, KERNEL, KERNEL_SIZE, WRITABLE);

    /* Linux's selectors: 10 kernel code, 18 kernel data, 23 32-bit user code, 2B user data, 33 64-bit user code. */
    put64(g, GDT + 0x10, 0x00AF9B000000FFFF);
    put64(g, GDT + 0x18, 0x00CF93000000FFFF);
    put64(g, GDT + 0x20, 0x00CFFB000000FFFF);
    put64(g, GDT + 0x28, 0x00CFF3000000FFFF);
    put64(g, GDT + 0x30, 0x00AFFB000000FFFF);
    put64(g, TSS + 4, LINEAR(KERNEL_STACK)); /* RSP0 */
    g->ram[TSS + 0x66] = 0x68; /* no I/O permission bitmap */
    for (unsigned i = 0; i < 256; i++) {
        uint64_t handler = LINEAR(HANDLERS) + 16 * i;
        uint64_t low = (handler & 0xFFFF) | 0x10ull << 16 | (0x8E00ull | (i == 3 || i == 4 ? 0x6000 : 0)) << 32 |
                       (handler >> 16 & 0xFFFF) << 48;
        put64(g, IDT + 16 * i, low);
        put64(g, IDT + 16 * i + 8, handler >> 32);
        g->ram[HANDLERS + 16 * i] = 0xF4; /* HLT */
    }
}

void guest_registers(struct guest *g)
{
    g->get(SOFT_STATE_SREGS, &g->sregs64, sizeof g->sregs64);
    struct kvm_sregs *s = &g->sregs64;
    s->cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
    s->cr3 = PML4;
    s->cr4 = 0x620 | 0x800 | 0x10000 | 0x40000; /* OSXMMEXCPT OSFXSR PAE, UMIP, FSGSBASE, OSXSAVE */
    s->efer = 0xD01; /* NXE LMA LME SCE */
    s->cs = segment(0x33, 11, 3, true, false);
    s->ss = s->ds = s->es = segment(0x2B, 3, 3, false, true);
    s->fs = s->gs = (struct kvm_segment){.unusable = 1};
    s->tr = (struct kvm_segment){.base = LINEAR(TSS), .limit = 0x67, .selector = 0x40, .type = 11, .present = 1};
    s->ldt = (struct kvm_segment){.unusable = 1};
    s->gdt = (struct kvm_dtable){.base = LINEAR(GDT), .limit = 0x37};
    s->idt = (struct kvm_dtable){.base = LINEAR(IDT), .limit = 0xFFF};
    g->sregs32 = g->sregs64;
    g->sregs32.cs = segment(0x23, 11, 3, false, true);
    struct kvm_xcrs xcrs = {.nr_xcrs = 1};
    xcrs.xcrs[0].value = g->avx ? 7 : 3;
    g->set(SOFT_STATE_SREGS, s, sizeof *s);
    g->set(SOFT_STATE_XCRS, &xcrs, sizeof xcrs);
}

void guest_run(struct guest *g, const struct insn *insn, struct cpu_state *state, struct memory *memory)
{
    memcpy(g->ram + DATA, memory->data, DATA_SIZE);
    memcpy(g->ram + STACK, memory->stack, STACK_SIZE);
    memset(g->ram + CODE, 0xCC, CODE_SIZE);
    memcpy(g->ram + CODE + insn->offset, insn->bytes, insn->length);
    if (g->written)
        g->written(CODE, CODE_SIZE);

    const uint64_t *r = state->gpr;
    struct kvm_regs regs = {.rax = r[0], .rcx = r[1], .rdx = r[2], .rbx = r[3], .rsp = r[4], .rbp = r[5], .rsi = r[6], .rdi = r[7],
                            .r8 = r[8], .r9 = r[9], .r10 = r[10], .r11 = r[11], .r12 = r[12], .r13 = r[13], .r14 = r[14], .r15 = r[15],
                            .rip = CODE_BASE + insn->offset, .rflags = state->rflags};
    static struct kvm_xsave xsave;
    uint8_t *area = (uint8_t *)xsave.region;
    memset(area, 0, 576);
    memcpy(area, state->fx, 416);
    area[512] = 3;
    if (g->avx) {
        memcpy(area + 576, state->high, 256);
        area[512] = 7;
    }
    struct kvm_sregs *s = insn->mode32 ? &g->sregs32 : &g->sregs64;
    g->set(SOFT_STATE_SREGS, s, sizeof *s);
    g->set(SOFT_STATE_REGS, &regs, sizeof regs);
    g->set(SOFT_STATE_XSAVE, &xsave, sizeof xsave);

    unsigned stop = g->run();
    if (stop) {
        state->vector = 1000 + stop;
        return;
    }
    struct kvm_sregs after;
    g->get(SOFT_STATE_REGS, &regs, sizeof regs);
    g->get(SOFT_STATE_SREGS, &after, sizeof after);
    g->get(SOFT_STATE_XSAVE, &xsave, sizeof xsave);
    uint64_t frame[6];
    state->vector = (uint32_t)((regs.rip - LINEAR(HANDLERS)) / 16);
    uint64_t at = regs.rsp - KERNEL_BASE;
    bool has_error = state->vector == 8 || (state->vector >= 10 && state->vector <= 14) || state->vector == 17;
    if (state->vector > 31 || at > KERNEL_SIZE - sizeof frame) {
        state->vector = 2000;
        return;
    }
    memcpy(frame, g->ram + KERNEL + at, sizeof frame);
    const uint64_t *f = has_error ? frame + 1 : frame;
    state->error = has_error ? (uint32_t)frame[0] : 0;
    state->rip = f[0];
    state->rflags = f[2];
    state->cr2 = state->vector == 14 ? after.cr2 : 0;
    uint64_t rsp;
    memcpy(&rsp, g->ram + KERNEL + at + (has_error ? 32 : 24), 8);
    const uint64_t out[16] = {regs.rax, regs.rcx, regs.rdx, regs.rbx, rsp, regs.rbp, regs.rsi, regs.rdi,
                              regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15};
    memcpy(state->gpr, out, sizeof out);
    /* The standard format leaves out what is in its initial state. */
    memcpy(state->fx, area, 416);
    uint64_t bv;
    memcpy(&bv, area + 512, 8);
    memcpy(state->high, area + 576, 256);
    if (!(bv & 4))
        memset(state->high, 0, 256);
    if (!(bv & 2))
        memset(state->fx + 160, 0, 256);
    if (!(bv & 1)) {
        uint32_t mxcsr[2];
        memcpy(mxcsr, state->fx + 24, 8);
        memset(state->fx, 0, 160);
        state->fx[0] = 0x7F;
        state->fx[1] = 3;
        memcpy(state->fx + 24, mxcsr, 8);
    }
    /* FXSAVE of the host's leaves the x87 pointers out while no exception is pending; the core's state has them always. */
    if (!(state->fx[2] & 0x80))
        memset(state->fx + 6, 0, 18);
    memcpy(memory->data, g->ram + DATA, DATA_SIZE);
    memcpy(memory->stack, g->ram + STACK, STACK_SIZE);
}
