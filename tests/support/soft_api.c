/* Checks of the software core's C interface (cpu/soft/soft.h) with small real-mode guests: DMA into code, wake from
 * other threads, interrupts, dirty log, slots, parking, the caller's breakpoints, alarms. Prints "ok NAME" for each; exits
 * 1 at the first that fails. Times are printed, never judged.
 *
 *   soft_api [NAME|all [SECONDS]]    the only one to do; for how long one waits at most
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "soft/soft.h"

enum { RAM_SIZE = 1 << 20 };

struct guest {
    struct soft_vm *vm;
    uint8_t *ram;
    pthread_t thread;
    enum soft_stop stop;
    uint32_t stop_vcpu;
    _Atomic unsigned accesses;
    struct soft_access last;
    _Atomic int started;
};

static const char *current = "";

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("FAILED %s: ", current);
    vprintf(format, arguments);
    printf("\n");
    fflush(stdout);
    _exit(1);
}
#define CHECK(condition) ((condition) ? (void)0 : fail("%s (line %d)", #condition, __LINE__))

static double microseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static double patience = 20e6; /* us */

/* Wait until *word has the value; fails if that takes longer. */
static void wait_word(const uint8_t *at, uint16_t value)
{
    double end = microseconds() + patience;
    while (__atomic_load_n((const uint16_t *)(const void *)at, __ATOMIC_ACQUIRE) != value)
        if (microseconds() > end)
            fail("waited for %u, have %u", value, *(const uint16_t *)(const void *)at);
}

/* Wait until a word that the guest counts up all the time has become greater. */
static void wait_count(const uint8_t *at, uint16_t value)
{
    double end = microseconds() + patience;
    while (__atomic_load_n((const uint16_t *)(const void *)at, __ATOMIC_ACQUIRE) <= value)
        if (microseconds() > end)
            fail("waited for more than %u, have %u", value, *(const uint16_t *)(const void *)at);
}

/* How often two threads wait for each other: with one processor each time is a turn of the host's scheduler. */
static unsigned rounds(unsigned most)
{
    cpu_set_t cpus;
    CHECK(sched_getaffinity(0, sizeof cpus, &cpus) == 0);
    return CPU_COUNT(&cpus) > 1 ? most : most / 20;
}

static uint64_t on_access(void *ctx, const struct soft_access *access)
{
    struct guest *g = ctx;
    g->last = *access;
    g->accesses++;
    return 0x5A;
}

static void on_random(void *ctx, void *buffer, size_t size)
{
    (void)ctx;
    memset(buffer, 7, size);
}

static struct guest *create(uint32_t vcpus, bool virtual_clock, bool log_dirty)
{
    struct guest *g = calloc(1, sizeof *g);
    const struct soft_config config = { .vcpus = vcpus, .virtual_clock = virtual_clock, .virtual_ips = 1000000000,
                                        .tsc_khz = 1000000, .quantum = 20000 };
    const struct soft_host host = { .ctx = g, .access = on_access, .random = on_random };
    g->ram = aligned_alloc(4096, RAM_SIZE);
    memset(g->ram, 0, RAM_SIZE);
    g->vm = soft_vm_create(&config, &host);
    CHECK(g->vm);
    CHECK(soft_vm_set_slot(g->vm, 0, 0, RAM_SIZE, g->ram, false, log_dirty) == 0);
    return g;
}

/* Real mode, everything at segment 0, CS:IP 0:ip; DS reaches 4 GiB. */
static void start_at(struct guest *g, uint32_t vcpu, uint16_t ip, bool interrupts)
{
    struct kvm_sregs s;
    struct kvm_regs r = { .rip = ip, .rsp = 0x8000, .rflags = interrupts ? 0x202 : 2 };
    CHECK(soft_vcpu_get(g->vm, vcpu, SOFT_STATE_SREGS, &s, sizeof s) == 0);
    s.cs.base = 0;
    s.cs.selector = 0;
    s.ds.limit = 0xFFFFFFFF;
    CHECK(soft_vcpu_set(g->vm, vcpu, SOFT_STATE_SREGS, &s, sizeof s) == 0);
    CHECK(soft_vcpu_set(g->vm, vcpu, SOFT_STATE_REGS, &r, sizeof r) == 0);
    struct kvm_mp_state mp = { KVM_MP_STATE_RUNNABLE };
    CHECK(soft_vcpu_set(g->vm, vcpu, SOFT_STATE_MP, &mp, sizeof mp) == 0);
}

static void code(struct guest *g, uint32_t at, const char *bytes, size_t size) { memcpy(g->ram + at, bytes, size); }
#define CODE(g, at, bytes) code(g, at, bytes, sizeof(bytes) - 1)

static void *runner(void *arg)
{
    struct guest *g = arg;
    g->started = 1;
    g->stop = soft_vm_run(g->vm, &g->stop_vcpu);
    return NULL;
}

static void run(struct guest *g)
{
    g->started = 0;
    CHECK(pthread_create(&g->thread, NULL, runner, g) == 0);
    while (!g->started)
        ;
}

/* Wake it; how long it took in us. */
static double stop(struct guest *g)
{
    double begin = microseconds();
    soft_vm_wake(g->vm);
    pthread_join(g->thread, NULL);
    CHECK(g->stop == SOFT_STOP_WAKE);
    return microseconds() - begin;
}

static void destroy(struct guest *g)
{
    soft_vm_destroy(g->vm);
    free(g->ram);
    free(g);
}

static uint64_t rip_of(struct guest *g)
{
    struct kvm_regs r;
    CHECK(soft_vcpu_get(g->vm, 0, SOFT_STATE_REGS, &r, sizeof r) == 0);
    return r.rip;
}

/* ---- the checks ---- */

/* A device writes the immediate of an instruction while the guest runs it. */
static void dma(const char *name, uint32_t function, uint32_t immediate, bool high_byte_alone)
{
    struct guest *g = create(1, false, false);
    uint16_t call = (uint16_t)(function - 0x1003);
    CODE(g, 0x1000, "\xE8\x00\x00\xA3\x00\x50\xEB\xF8"); /* call function; mov [5000],ax; jmp 1000 */
    memcpy(g->ram + 0x1001, &call, 2);
    if (function != 0x1000)
        code(g, function, "\xB8\x00\x00\xC3", 4); /* mov ax,0; ret */
    else
        CODE(g, 0x1000, "\xB8\x00\x00\xA3\x00\x50\xEB\xF8"); /* mov ax,0; mov [5000],ax; jmp 1000 */
    start_at(g, 0, 0x1000, false);
    run(g);
    double begin = microseconds();
    for (uint16_t n = 1; n <= rounds(1000); n++) {
        uint16_t value = high_byte_alone ? (uint16_t)((n & 0xFF) << 8) : n;
        memcpy(g->ram + immediate, (uint8_t *)&value + high_byte_alone, 2u - high_byte_alone);
        soft_vm_memory_written(g->vm, immediate, 2u - high_byte_alone);
        wait_word(g->ram + 0x5000, value);
    }
    printf("   %s: %.1f us each\n", name, (microseconds() - begin) / rounds(1000));
    stop(g);
    destroy(g);
}

static void dma_into_code(void)
{
    dma("another page", 0x2000, 0x2001, false);
    dma("the loop itself", 0x1000, 0x1001, false);
    dma("across a page, the first", 0x2FFE, 0x2FFF, false);
    dma("across a page, the second", 0x2FFE, 0x3000, true);
    dma("the end of a page", 0x2FC0, 0x2FC1, false);
}

/* A device writes code at the very moment in which the guest first runs it: then too the guest sees it at last. */
static void dma_while_decoding(void)
{
    struct guest *g = create(1, false, false);
    volatile uint16_t *round = (uint16_t *)(void *)(g->ram + 0x4000);
    uint32_t random = 1;
    CODE(g, 0x1000, "\xA1\x00\x40\x3B\x06\x02\x40\x74\xF7"             /* wait for a new round at [4000] */
                    "\xA3\x02\x40\xC6\x06\x00\x20\xB8\xA3\x04\x40"       /* note it; mov byte [2000],b8; [4004] = round */
                    "\xE8\xE9\x0F\xA3\x00\x50"                         /* call 2000; mov [5000],ax */
                    "\xA1\x00\x40\x3B\x06\x02\x40\x74\xF1\xEB\xDB");     /* again while the round is the same */
    CODE(g, 0x2000, "\xB8\x00\x00\xC3");
    start_at(g, 0, 0x1000, false);
    run(g);
    for (uint16_t n = 1; n <= rounds(20000); n++) {
        *round = n;
        wait_word(g->ram + 0x4004, n);
        random = random * 1103515245 + 12345;
        for (volatile unsigned spin = random >> 20 & 255; spin; spin--)
            ;
        __atomic_store_n((uint16_t *)(void *)(g->ram + 0x2001), n, __ATOMIC_RELAXED);
        soft_vm_memory_written(g->vm, 0x2001, 2);
        wait_word(g->ram + 0x5000, n);
    }
    stop(g);
    destroy(g);
}

static void wake_spinning(void)
{
    static const struct {
        const char *name, *bytes;
        size_t size;
    } guests[] = {
        { "jmp $", "\xEB\xFE", 2 },
        { "pause", "\xF3\x90\xEB\xFC", 4 },
        { "hlt", "\xFB\xF4\xEB\xFC", 4 },
        { "rep lodsb", "\x66\xB9\xFF\xFF\xFF\xFF\x67\xF3\xAC\xEB\xF5", 11 },
        { "faults", "\x0F\x0B", 2 },
    };
    for (unsigned i = 0; i < sizeof guests / sizeof guests[0]; i++) {
        struct guest *g = create(2, false, false);
        code(g, 0x1000, guests[i].bytes, guests[i].size);
        CODE(g, 6 * 4, "\x00\x10\x00\x00"); /* #UD goes to 0:1000 again */
        start_at(g, 0, 0x1000, true);
        double worst = 0, sum = 0;
        for (unsigned n = 0; n < 200; n++) {
            run(g);
            double t = stop(g);
            sum += t;
            worst = t > worst ? t : worst;
        }
        printf("   %s: %.0f us on average, %.0f at worst\n", guests[i].name, sum / 200, worst);
        destroy(g);
    }
}

static void wake_is_sticky(void)
{
    struct guest *g = create(1, false, false);
    CODE(g, 0x1000, "\xEB\xFE");
    start_at(g, 0, 0x1000, false);
    soft_vm_wake(g->vm);
    uint32_t vcpu;
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_WAKE);
    CHECK(soft_vm_instructions(g->vm) == 0);
    destroy(g);
}

static void interrupts_from_threads(void)
{
    struct guest *g = create(1, false, false);
    CODE(g, 0x1000, "\xB0\x11\xE6\x20\xB0\x20\xE6\x21\xB0\x04\xE6\x21\xB0\x01\xE6\x21\xB0\xEF\xE6\x21" /* PIC at 20, IRQ 4 */
                    "\xFB\xF4\xEB\xFD");                                                              /* sti; hlt; jmp hlt */
    CODE(g, 0x24 * 4, "\x00\x20\x00\x00");
    CODE(g, 0x2000, "\x50\xB0\x20\xE6\x20\x58\xFF\x06\x00\x30\xCF"); /* EOI; inc word [3000]; iret */
    start_at(g, 0, 0x1000, false);
    run(g);
    soft_vm_set_irq(g->vm, 4, true); /* may come before the PIC is set up: IRR keeps no edge then */
    usleep(1000);
    soft_vm_set_irq(g->vm, 4, false);
    double end = microseconds() + 20e6;
    uint16_t before = 0;
    for (unsigned n = 0; n < 1000; n++) {
        before = __atomic_load_n((uint16_t *)(void *)(g->ram + 0x3000), __ATOMIC_ACQUIRE);
        soft_vm_set_irq(g->vm, 4, true);
        soft_vm_set_irq(g->vm, 4, false);
        while (__atomic_load_n((uint16_t *)(void *)(g->ram + 0x3000), __ATOMIC_ACQUIRE) == before) {
            if (microseconds() > end)
                fail("interrupt %u was lost", n);
            if (n == 0) {
                soft_vm_set_irq(g->vm, 4, true);
                soft_vm_set_irq(g->vm, 4, false);
            }
        }
    }
    stop(g);
    destroy(g);
}

static void dirty_log(void)
{
    struct guest *g = create(1, false, true);
    uint8_t bitmap[RAM_SIZE / 4096 / 8];
    uint32_t vcpu;
    CODE(g, 0x1000, "\xA2\x00\x50\xA2\x01\x50\xA2\xFF\x6F\xA3\xFF\x8F\xF4\xEB\xF1"); /* [5000],[5001],[6fff],[8fff..9000] */
    start_at(g, 0, 0x1000, false);
    memset(bitmap, 0, sizeof bitmap);
    CHECK(soft_vm_dirty_log(g->vm, 0, bitmap, sizeof bitmap - 1) == -EINVAL);
    CHECK(soft_vm_dirty_log(g->vm, 1, bitmap, sizeof bitmap) == -EINVAL);
    for (unsigned round = 0; round < 3; round++) {
        CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_HALTED);
        CHECK(soft_vm_dirty_log(g->vm, 0, bitmap, sizeof bitmap) == 0);
        CHECK(bitmap[0] == (1 << 5 | 1 << 6) && bitmap[1] == (1 << 0 | 1 << 1) && !bitmap[2]);
        CHECK(soft_vm_dirty_log(g->vm, 0, bitmap, sizeof bitmap) == 0);
        CHECK(!bitmap[0] && !bitmap[1]);
        start_at(g, 0, 0x1000, false);
    }
    destroy(g);
}

static void slots(void)
{
    struct guest *g = create(1, false, false);
    uint8_t *page = aligned_alloc(4096, 8192);
    uint32_t vcpu;
    memset(page, 0x33, 8192);
    CHECK(soft_vm_set_slot(g->vm, 1, RAM_SIZE - 4096, 8192, page, false, false) == -EEXIST);
    CHECK(soft_vm_set_slot(g->vm, 1, RAM_SIZE + 1, 4096, page, false, false) == -EINVAL);
    CHECK(soft_vm_set_slot(g->vm, 1, RAM_SIZE, 4095, page, false, false) == -EINVAL);
    CHECK(soft_vm_set_slot(g->vm, 64, RAM_SIZE, 4096, page, false, false) == -EINVAL);
    CHECK(soft_vm_set_slot(g->vm, 1, RAM_SIZE, 4096, NULL, false, false) == -EINVAL);
    CHECK(soft_vm_set_slot(g->vm, 1, ~0ull << 12, 8192, page, false, false) == -EINVAL);
    /* RAM in two slots with a read-only hole at 0x20000: read through, writes are accesses */
    CHECK(soft_vm_set_slot(g->vm, 0, 0, 0, NULL, false, false) == 0);
    CHECK(soft_vm_set_slot(g->vm, 0, 0, 0x20000, g->ram, false, false) == 0);
    CHECK(soft_vm_set_slot(g->vm, 1, 0x20000, 4096, page, true, false) == 0);
    CODE(g, 0x1000, "\xB8\x00\x20\x8E\xD8\xA0\x00\x00\xA2\x01\x00\xA0\x00\x10\xF4"); /* ds=2000: load [0], store [1], load [1000] */
    start_at(g, 0, 0x1000, false);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_HALTED);
    struct kvm_regs r;
    CHECK(soft_vcpu_get(g->vm, 0, SOFT_STATE_REGS, &r, sizeof r) == 0);
    CHECK(g->accesses == 2 && !g->last.write && g->last.address == 0x21000 && (r.rax & 0xFF) == 0x5A);
    CHECK(page[1] == 0x33);
    /* the slot goes: the same load is an access now */
    CHECK(soft_vm_set_slot(g->vm, 1, 0, 0, NULL, false, false) == 0);
    start_at(g, 0, 0x1000, false);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_HALTED);
    CHECK(g->accesses == 5);
    free(page);
    destroy(g);
}

static void parking(void)
{
    struct guest *g = create(2, false, false);
    CODE(g, 0x1000, "\xFF\x06\x00\x30\xEB\xFA"); /* inc word [3000]; jmp */
    CODE(g, 0x1100, "\xFF\x06\x02\x30\xEB\xFA");
    start_at(g, 0, 0x1000, false);
    start_at(g, 1, 0x1100, false);
    soft_vcpu_park(g->vm, 1, true);
    run(g);
    wait_count(g->ram + 0x3000, 1000);
    CHECK(*(uint16_t *)(void *)(g->ram + 0x3002) == 0);
    soft_vcpu_park(g->vm, 0, true);
    soft_vcpu_park(g->vm, 1, false);
    wait_count(g->ram + 0x3002, 1000);
    stop(g);
    destroy(g);
}

static void caller_debug(void)
{
    struct guest *g = create(1, false, false);
    uint32_t vcpu;
    CODE(g, 0x1000, "\x90\x90\x90\xA2\x00\x50\x90\xCC\x90\xF4");
    start_at(g, 0, 0x1000, false);
    struct soft_debug d = { .step = true };
    uint64_t at;
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x1001);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x1002);
    CHECK(soft_vcpu_debug_reason(g->vm, 0, &at) == SOFT_DEBUG_STEP);
    struct soft_point points[] = { { 0x5000, 1, SOFT_POINT_WRITE }, { 0x1003, 0, SOFT_POINT_EXECUTE } };
    d = (struct soft_debug){ .int3 = true, .count = 2, .points = points };
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x1003);
    CHECK(soft_vcpu_debug_reason(g->vm, 0, &at) == SOFT_DEBUG_EXECUTE && at == 0x1003);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x1003); /* until it is stepped over */
    d.step = true;
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x1006);
    CHECK(soft_vcpu_debug_reason(g->vm, 0, &at) == SOFT_DEBUG_WATCH && at == 0x5000);
    d.step = false;
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x1007); /* at INT3 */
    CHECK(soft_vcpu_debug_reason(g->vm, 0, &at) == SOFT_DEBUG_INT3);
    points[1].address = 0xFFFFFFFFFFFFFFFF;
    points[1].kind = 9;
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == -EINVAL);
    d = (struct soft_debug){ .count = SOFT_MAX_POINTS + 1 };
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == -E2BIG);
    d = (struct soft_debug){ 0 };
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    destroy(g);
}

/* A loop that runs translated stops at a breakpoint that is set later, in its middle, at each turn; what is watched is
 * reported from translated code, with the store done; without either it runs on. */
static void caller_points(void)
{
    struct guest *g = create(1, false, false);
    uint32_t vcpu;
    uint64_t at, gpa;
    CODE(g, 0x1000, "\xFF\x06\x00\x30\x40\x43\xFF\x06\x10\x30\xEB\xF4"); /* inc [3000]; inc ax; inc bx; inc [3010]; jmp */
    start_at(g, 0, 0x1000, false);
    run(g);
    wait_count(g->ram + 0x3000, 1000);
    stop(g);
    struct soft_point points[] = { { 0x1005, 1, SOFT_POINT_EXECUTE }, { 0x3011, 1, SOFT_POINT_ACCESS } };
    struct soft_debug d = { .count = 1, .points = points };
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    struct soft_debug over = { .step = true };
    for (unsigned i = 0; i < 3; i++) {
        CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x1005);
        CHECK(soft_vcpu_set_debug(g->vm, 0, &over) == 0);
        CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x1006);
        CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    }
    uint16_t before = *(uint16_t *)(void *)(g->ram + 0x3010);
    d = (struct soft_debug){ .count = 1, .points = points + 1 };
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    for (unsigned i = 1; i <= 3; i++) {
        CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG && rip_of(g) == 0x100A);
        CHECK(soft_vcpu_debug_reason(g->vm, 0, &at) == SOFT_DEBUG_WATCH && at == 0x3011);
        CHECK(*(uint16_t *)(void *)(g->ram + 0x3010) == (uint16_t)(before + i));
    }
    CHECK(soft_vm_set_trace(g->vm, 4) == 0);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_DEBUG);
    struct soft_trace_entry t[8];
    uint32_t n = soft_vcpu_trace(g->vm, 0, t, 8);
    CHECK(n >= 2 && n <= 4 && t[n - 1].address == 0x1006 && t[n - 1].kind == SOFT_TRACE_STEP);
    CHECK(soft_vm_set_trace(g->vm, 0) == 0);
    CHECK(soft_vcpu_translate(g->vm, 0, 0x1234, &gpa) == 0 && gpa == 0x1234);
    CHECK(soft_vcpu_translate(g->vm, 0, 1ull << 40, &gpa) == -EFAULT);
    d = (struct soft_debug){ .frozen = true };
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    before = *(uint16_t *)(void *)(g->ram + 0x3010);
    soft_vm_wake(g->vm);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_WAKE);
    CHECK(*(uint16_t *)(void *)(g->ram + 0x3010) == before);
    d.frozen = false;
    CHECK(soft_vcpu_set_debug(g->vm, 0, &d) == 0);
    memset(g->ram + 0x3010, 0, 2);
    run(g);
    wait_count(g->ram + 0x3010, 1000);
    stop(g);
    destroy(g);
}

static void halted_and_nmi(void)
{
    struct guest *g = create(1, false, false);
    uint32_t vcpu = 9;
    CODE(g, 0x1000, "\xFA\xF4\xFF\x06\x02\x30\xEB\xF9"); /* cli; hlt; inc word [3002]; jmp hlt */
    CODE(g, 2 * 4, "\x00\x20\x00\x00");
    CODE(g, 0x2000, "\xFF\x06\x00\x30\xCF");
    start_at(g, 0, 0x1000, false);
    for (uint16_t n = 0; n < 10; n++) {
        CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_HALTED && vcpu == 0);
        CHECK(*(uint16_t *)(void *)(g->ram + 0x3000) == n && *(uint16_t *)(void *)(g->ram + 0x3002) == n);
        soft_vm_nmi(g->vm, 0);
    }
    destroy(g);
}

/* An NMI that is pending waits for the instruction behind STI or MOV SS (APM vol. 3, STI; SDM vol. 3, 6.8.3). */
static void nmi_and_shadow(void)
{
    static const struct { uint8_t shadow; uint16_t ip; } cases[] = {
        { 0, 0x1000 }, { KVM_X86_SHADOW_INT_STI, 0x1001 }, { KVM_X86_SHADOW_INT_MOV_SS, 0x1001 },
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct guest *g = create(1, false, false);
        uint32_t vcpu;
        CODE(g, 0x1000, "\x40\x40\x40\xF4"); /* inc ax, three times; hlt */
        CODE(g, 2 * 4, "\x00\x20\x00\x00");
        CODE(g, 0x2000, "\xF4");
        start_at(g, 0, 0x1000, false);
        const struct kvm_vcpu_events events = { .interrupt.shadow = cases[i].shadow, .nmi.pending = 1,
            .flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW };
        CHECK(soft_vcpu_set(g->vm, 0, SOFT_STATE_EVENTS, &events, sizeof events) == 0);
        CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_HALTED);
        CHECK(rip_of(g) == 0x2001);
        CHECK(*(uint16_t *)(void *)(g->ram + 0x8000 - 6) == cases[i].ip);
        destroy(g);
    }
}

/* What CPUID says of physical addresses decides which bits are reserved: here of the APIC's base. */
static void physical_addresses(void)
{
    for (unsigned bits = 40; bits <= 48; bits += 8) {
        struct guest *g = create(1, false, false);
        const struct kvm_cpuid_entry2 entry = { .function = 0x80000008, .eax = 48 << 8 | bits };
        uint32_t vcpu;
        CHECK(soft_vcpu_set_cpuid(g->vm, 0, &entry, 1) == 0);
        /* mov ecx, 1Bh; rdmsr; or edx, 100h; wrmsr; hlt */
        CODE(g, 0x1000, "\x66\xB9\x1B\x00\x00\x00\x0F\x32\x66\x81\xCA\x00\x01\x00\x00\x0F\x30\xF4");
        CODE(g, 13 * 4, "\x00\x20\x00\x00");
        CODE(g, 0x2000, "\xF4");
        start_at(g, 0, 0x1000, false);
        CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_HALTED);
        CHECK(rip_of(g) == (bits == 40 ? 0x2001u : 0x1012u));
        destroy(g);
    }
}

static void alarms(void)
{
    struct guest *g = create(1, true, false);
    uint32_t vcpu;
    CODE(g, 0x1000, "\x90\xEB\xFD");
    start_at(g, 0, 0x1000, false);
    for (uint64_t at = 1000; at < 1000000; at = at * 3 / 2) {
        soft_vm_set_alarm(g->vm, at);
        CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_ALARM);
        CHECK(soft_vm_now(g->vm) >= at && soft_vm_now(g->vm) < at + 100);
    }
    CODE(g, 0x1000, "\xFB\xF4\xEB\xFC"); /* sti; hlt: time is skipped */
    soft_vm_memory_written(g->vm, 0x1000, 4);
    start_at(g, 0, 0x1000, true);
    soft_vm_set_alarm(g->vm, 5000000000ull);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_ALARM && soft_vm_now(g->vm) == 5000000000ull);
    destroy(g);
}

static void state_is_checked(void)
{
    struct guest *g = create(1, false, false);
    struct kvm_sregs s, again;
    CHECK(soft_vcpu_get(g->vm, 0, SOFT_STATE_SREGS, &s, sizeof s) == 0);
    CHECK(soft_vcpu_get(g->vm, 0, SOFT_STATE_SREGS, &s, sizeof s - 1) == -EINVAL);
    CHECK(soft_vcpu_get(g->vm, 1, SOFT_STATE_SREGS, &s, sizeof s) == -EINVAL);
    CHECK(soft_vcpu_set(g->vm, 0, SOFT_STATE_SREGS, &s, sizeof s) == 0);
    CHECK(soft_vcpu_get(g->vm, 0, SOFT_STATE_SREGS, &again, sizeof again) == 0 && !memcmp(&s, &again, sizeof s));
    s.efer = 0x500; /* LMA without paging */
    CHECK(soft_vcpu_set(g->vm, 0, SOFT_STATE_SREGS, &s, sizeof s) == -EINVAL);
    struct {
        struct kvm_msrs header;
        struct kvm_msr_entry entry;
    } msr = { .header = { .nmsrs = 2 } };
    CHECK(soft_vcpu_get(g->vm, 0, SOFT_STATE_MSRS, &msr, sizeof msr) == -EINVAL);
    uint8_t core[SOFT_CORE_STATE_SIZE];
    CHECK(soft_vm_get(g->vm, SOFT_VM_CORE, core, sizeof core) == 0);
    CHECK(soft_vm_set(g->vm, SOFT_VM_CORE, core, sizeof core) == 0);
    core[0] = 99;
    CHECK(soft_vm_set(g->vm, SOFT_VM_CORE, core, sizeof core) == -EINVAL);
    destroy(g);
}

static uint64_t decoded(struct guest *g)
{
    struct soft_stats stats;
    soft_vm_stats(g->vm, &stats);
    return stats.blocks_decoded;
}

static long resident_kib(void)
{
    long total, resident;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file && fscanf(file, "%ld %ld", &total, &resident) == 2);
    fclose(file);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

/* A VM that sleeps keeps its blocks while it is alone. One of many gives them back, and makes them anew when it wakes. */
static void resting(void)
{
    enum { FIRST = 0x8000, BLOCKS = 10000, OTHERS = 31 };
    struct guest *g = create(1, false, false), *others[OTHERS];
    CODE(g, 0x1000, "\xF4\xEB\xFD"); /* hlt; jmp hlt */
    CODE(g, 2 * 4, "\x00\x20\x00\x00");
    CODE(g, 0x2000, "\xE9\xFD\x5F"); /* the NMI's handler: jmp FIRST */
    for (unsigned i = 0; i < BLOCKS; i++)
        CODE(g, FIRST + 3 * i, "\xEB\x01"); /* a jump over a byte */
    CODE(g, FIRST + 3 * BLOCKS, "\xFF\x06\x00\x30\xCF"); /* inc word [3000]; iret */
    start_at(g, 0, 0x1000, true);
    run(g);
    soft_vm_nmi(g->vm, 0);
    wait_word(g->ram + 0x3000, 1);
    uint64_t made = decoded(g);
    CHECK(made > BLOCKS);
    usleep(500000); /* twice as long as it takes to count as resting */
    soft_vm_nmi(g->vm, 0);
    wait_word(g->ram + 0x3000, 2);
    CHECK(decoded(g) < made + 10);
    for (unsigned i = 0; i < OTHERS; i++)
        others[i] = create(1, false, false);
    long before = resident_kib();
    soft_vm_nmi(g->vm, 0);
    wait_word(g->ram + 0x3000, 3);
#ifndef __SANITIZE_ADDRESS__ /* ASan keeps what was freed */
    for (double end = microseconds() + patience; resident_kib() > before - 1024; usleep(1000))
        if (microseconds() > end)
            fail("%ld KiB are resident after a rest, %ld were before", resident_kib(), before);
#else
    (void)before;
    usleep(500000);
#endif
    soft_vm_nmi(g->vm, 0);
    wait_word(g->ram + 0x3000, 4);
    CHECK(decoded(g) > made + BLOCKS);
    stop(g);
    destroy(g);
    for (unsigned i = 0; i < OTHERS; i++)
        destroy(others[i]);
}

/* A timer's interrupt comes in time while the guest copies 60 KiB over and over, each time by one instruction. Real clock. */
static void timer_in_copies(void)
{
    struct guest *g = create(1, false, false);
    uint32_t vcpu = 9;
    CODE(g, 0x1000, "\xB8\x00\x20\x8E\xC0" /* ES = 2000 */
         "\x66\xB9\x1B\x00\x00\x00\x0F\x32\x0D\x00\x0C\x0F\x30" /* x2APIC */
         "\x66\x31\xD2\x66\xB9\x0F\x08\x00\x00\x66\xB8\xFF\x01\x00\x00\x0F\x30" /* enabled */
         "\x66\xB9\x32\x08\x00\x00\x66\xB8\x42\x00\x04\x00\x0F\x30" /* timer: vector 42, a deadline */
         "\x0F\x31\x66\x05\xA0\x86\x01\x00\x66\x83\xD2\x00\x66\xB9\xE0\x06\x00\x00\x0F\x30\xFB" /* in 100 us; sti */
         "\x31\xF6\x31\xFF\xB9\x00\xF0\xF3\xA4\x66\xFF\x06\x00\x30\xEB\xF0"); /* rep movsb; inc dword [3000]; again */
    CODE(g, 0x42 * 4, "\x00\x20\x00\x00");
    CODE(g, 0x2000, "\xFA\xF4"); /* cli; hlt */
    start_at(g, 0, 0x1000, false);
    CHECK(soft_vm_run(g->vm, &vcpu) == SOFT_STOP_HALTED && rip_of(g) == 0x2002);
    uint32_t copies = *(uint32_t *)(void *)(g->ram + 0x3000);
    if (copies > 1000) /* of some us each */
        fail("%u copies before the interrupt", copies);
    destroy(g);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*check)(void);
    } checks[] = {
        { "dma_into_code", dma_into_code }, { "dma_while_decoding", dma_while_decoding }, { "wake_spinning", wake_spinning }, { "wake_is_sticky", wake_is_sticky },
        { "interrupts_from_threads", interrupts_from_threads }, { "dirty_log", dirty_log }, { "slots", slots },
        { "parking", parking }, { "caller_debug", caller_debug }, { "caller_points", caller_points }, { "halted_and_nmi", halted_and_nmi }, { "nmi_and_shadow", nmi_and_shadow }, { "physical_addresses", physical_addresses }, { "alarms", alarms },
        { "state_is_checked", state_is_checked }, { "resting", resting }, { "timer_in_copies", timer_in_copies },
    };
    for (unsigned i = 0; i < sizeof checks / sizeof checks[0]; i++) {
        if (argc > 1 && strcmp(argv[1], "all") && strcmp(argv[1], checks[i].name))
            continue;
        if (argc > 2)
            patience = atof(argv[2]) * 1e6;
        current = checks[i].name;
        checks[i].check();
        printf("ok %s\n", current);
        fflush(stdout);
    }
    return 0;
}
