/* One instruction on the software core, as a guest sees it: a vCPU in long mode at CPL 3, in pages that mirror those
 * of native.c. Every IDT gate leads to HLT at CPL 0, so an instruction's end (INT3 behind it) or fault stops the VM
 * with the exception frame on its kernel stack. Uses only the public interface, soft.h.
 */
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "oracle.h"
#include "soft/soft.h"

enum {
    RAM_SIZE = 0x400000,
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

static uint8_t *ram;
static struct soft_vm *vm;
static struct kvm_sregs sregs64, sregs32;

static void die(const char *what)
{
    fprintf(stderr, "oracle: core: %s\n", what);
    exit(3);
}

static void put64(uint64_t gpa, uint64_t value) { memcpy(ram + gpa, &value, 8); }

static void map(uint64_t table, uint64_t linear, uint64_t gpa, uint64_t size, uint64_t rights)
{
    for (uint64_t o = 0; o < size; o += 0x1000)
        put64(table + ((linear + o) >> 12 & 511) * 8, (gpa + o) | rights | PRESENT);
}

static uint64_t access_nothing(void *ctx, const struct soft_access *access)
{
    (void)ctx;
    (void)access;
    return ~0ull;
}

static void random_bytes(void *ctx, void *buffer, size_t size)
{
    (void)ctx;
    memset(buffer, 0x5A, size);
}

static struct kvm_segment segment(uint16_t selector, unsigned type, unsigned dpl, bool l, bool db)
{
    return (struct kvm_segment){.limit = 0xFFFFFFFF, .selector = selector, .type = (uint8_t)type, .present = 1, .dpl = (uint8_t)dpl,
                                .db = db, .s = 1, .l = l, .g = 1};
}

void core_init(void)
{
    ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        die("mmap");
    put64(PML4, PDPT | PRESENT | WRITABLE | USER);
    put64(PDPT, PD | PRESENT | WRITABLE | USER);
    put64(PD + (CODE_BASE >> 21 & 511) * 8, PT_CODE | PRESENT | WRITABLE | USER);
    put64(PD + (DATA_BASE >> 21 & 511) * 8, PT_DATA | PRESENT | WRITABLE | USER);
    put64(PD + (STACK_BASE >> 21 & 511) * 8, PT_STACK | PRESENT | WRITABLE | USER);
    put64(PD + (KERNEL_BASE >> 21 & 511) * 8, PT_KERNEL | PRESENT | WRITABLE);
    map(PT_CODE, CODE_BASE, CODE, CODE_SIZE, WRITABLE | USER);
    const uint64_t nx = 1ull << 63;
    map(PT_DATA, DATA_BASE, DATA, DATA_WRITABLE, WRITABLE | USER | nx);
    map(PT_DATA, DATA_BASE + DATA_WRITABLE, DATA + DATA_WRITABLE, DATA_SIZE - DATA_WRITABLE, USER | nx);
    map(PT_STACK, STACK_BASE, STACK, STACK_SIZE, WRITABLE | USER | nx);
    map(PT_KERNEL, KERNEL_BASE, KERNEL, KERNEL_SIZE, WRITABLE);

    /* Linux's selectors: 10 kernel code, 18 kernel data, 23 32-bit user code, 2B user data, 33 64-bit user code. */
    put64(GDT + 0x10, 0x00AF9B000000FFFF);
    put64(GDT + 0x18, 0x00CF93000000FFFF);
    put64(GDT + 0x20, 0x00CFFB000000FFFF);
    put64(GDT + 0x28, 0x00CFF3000000FFFF);
    put64(GDT + 0x30, 0x00AFFB000000FFFF);
    put64(TSS + 4, LINEAR(KERNEL_STACK)); /* RSP0 */
    ram[TSS + 0x66] = 0x68; /* no I/O permission bitmap */
    for (unsigned i = 0; i < 256; i++) {
        uint64_t handler = LINEAR(HANDLERS) + 16 * i;
        uint64_t low = (handler & 0xFFFF) | 0x10ull << 16 | (0x8E00ull | (i == 3 || i == 4 ? 0x6000 : 0)) << 32 | (handler >> 16 & 0xFFFF) << 48;
        put64(IDT + 16 * i, low);
        put64(IDT + 16 * i + 8, handler >> 32);
        ram[HANDLERS + 16 * i] = 0xF4; /* HLT */
    }

    struct soft_config config = {.vcpus = 1, .virtual_clock = true, .virtual_ips = 1000000000, .tsc_khz = 1000000, .quantum = 100000};
    struct soft_host host = {.access = access_nothing, .random = random_bytes};
    vm = soft_vm_create(&config, &host);
    if (!vm || soft_vm_set_slot(vm, 0, 0, RAM_SIZE, ram, false, false) != 0)
        die("soft_vm_create");
    uint32_t room = 256, count;
    struct kvm_cpuid_entry2 *entries = calloc(room, sizeof *entries);
    if (!entries)
        die("calloc");
    count = soft_supported_cpuid(entries, room);
    if (soft_vcpu_set_cpuid(vm, 0, entries, count) != 0)
        die("soft_vcpu_set_cpuid");
    free(entries);

    if (soft_vcpu_get(vm, 0, SOFT_STATE_SREGS, &sregs64, sizeof sregs64) != 0)
        die("get SREGS");
    struct kvm_sregs *s = &sregs64;
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
    sregs32 = sregs64;
    sregs32.cs = segment(0x23, 11, 3, false, true);
    struct kvm_xcrs xcrs = {.nr_xcrs = 1};
    xcrs.xcrs[0].value = 3;
    if (soft_vcpu_set(vm, 0, SOFT_STATE_SREGS, s, sizeof *s) != 0 || soft_vcpu_set(vm, 0, SOFT_STATE_XCRS, &xcrs, sizeof xcrs) != 0)
        die("set SREGS or XCRS");
}

void core_run(const struct insn *insn, struct cpu_state *state, struct memory *memory)
{
    memcpy(ram + DATA, memory->data, DATA_SIZE);
    memcpy(ram + STACK, memory->stack, STACK_SIZE);
    memset(ram + CODE, 0xCC, CODE_SIZE);
    memcpy(ram + CODE + insn->offset, insn->bytes, insn->length);
    soft_vm_memory_written(vm, CODE, CODE_SIZE);

    const uint64_t *g = state->gpr;
    struct kvm_regs regs = {.rax = g[0], .rcx = g[1], .rdx = g[2], .rbx = g[3], .rsp = g[4], .rbp = g[5], .rsi = g[6], .rdi = g[7],
                            .r8 = g[8], .r9 = g[9], .r10 = g[10], .r11 = g[11], .r12 = g[12], .r13 = g[13], .r14 = g[14], .r15 = g[15],
                            .rip = CODE_BASE + insn->offset, .rflags = state->rflags};
    struct kvm_mp_state mp = {.mp_state = KVM_MP_STATE_RUNNABLE};
    static struct kvm_xsave xsave;
    uint8_t *area = (uint8_t *)xsave.region;
    memset(area, 0, 576);
    memcpy(area, state->fx, 416);
    area[512] = 3;
    struct kvm_sregs *s = insn->mode32 ? &sregs32 : &sregs64;
    if (soft_vcpu_set(vm, 0, SOFT_STATE_SREGS, s, sizeof *s) != 0 || soft_vcpu_set(vm, 0, SOFT_STATE_REGS, &regs, sizeof regs) != 0 ||
        soft_vcpu_set(vm, 0, SOFT_STATE_XSAVE, &xsave, sizeof xsave) != 0 || soft_vcpu_set(vm, 0, SOFT_STATE_MP, &mp, sizeof mp) != 0)
        die("set state");

    uint32_t vcpu = 0;
    enum soft_stop stop = soft_vm_run(vm, &vcpu);
    if (stop != SOFT_STOP_HALTED) {
        state->vector = 1000 + (uint32_t)stop;
        return;
    }
    struct kvm_sregs after;
    if (soft_vcpu_get(vm, 0, SOFT_STATE_REGS, &regs, sizeof regs) != 0 || soft_vcpu_get(vm, 0, SOFT_STATE_SREGS, &after, sizeof after) != 0 ||
        soft_vcpu_get(vm, 0, SOFT_STATE_XSAVE, &xsave, sizeof xsave) != 0)
        die("get state");
    uint64_t frame[6];
    state->vector = (uint32_t)((regs.rip - LINEAR(HANDLERS)) / 16);
    uint64_t at = regs.rsp - KERNEL_BASE;
    bool has_error = state->vector == 8 || (state->vector >= 10 && state->vector <= 14) || state->vector == 17;
    if (state->vector > 31 || at > KERNEL_SIZE - sizeof frame) {
        state->vector = 2000;
        return;
    }
    memcpy(frame, ram + KERNEL + at, sizeof frame);
    const uint64_t *f = has_error ? frame + 1 : frame;
    state->error = has_error ? (uint32_t)frame[0] : 0;
    state->rip = f[0];
    state->rflags = f[2];
    state->cr2 = state->vector == 14 ? after.cr2 : 0;
    uint64_t rsp;
    memcpy(&rsp, ram + KERNEL + at + (has_error ? 32 : 24), 8);
    const uint64_t out[16] = {regs.rax, regs.rcx, regs.rdx, regs.rbx, rsp, regs.rbp, regs.rsi, regs.rdi,
                              regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15};
    memcpy(state->gpr, out, sizeof out);
    /* The standard format leaves out what is in its initial state. */
    memcpy(state->fx, area, 416);
    uint64_t bv;
    memcpy(&bv, area + 512, 8);
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
    memcpy(memory->data, ram + DATA, DATA_SIZE);
    memcpy(memory->stack, ram + STACK, STACK_SIZE);
}
