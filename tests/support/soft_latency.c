/* How soon interrupts and kicks reach vCPUs that run at the same time and are busy, each on a thread of its own.
 *
 * Two kinds of work keep the vCPUs busy: arithmetic, and copies of 1 MiB by REP MOVSB. Meanwhile a message arrives for one vCPU
 * after the other, vCPU 0 sends interrupts to the next one, every vCPU's own timer expires, and vCPUs are kicked. The
 * guest's TSC is the VM's clock in ns, so its handlers note when they begin. Prints a line for each kind:
 * "NAME COUNT MEDIAN P99 P999 LONGEST OVER-1MS", times in us.
 *
 *   soft_latency [VCPUS [EVENTS]]
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "soft_guest.h"

enum { RAM = 32 << 20, MOST = 8, EVENTS_MOST = 1 << 20, PAUSE_NS = 300000 };
enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, PD_APIC = 0x4000, IDT = 0x5000, GDT = 0x6000, STACKS = 0x10000, CODE = 0x20000,
       NOTES = 0x40000 /* a struct note for each vCPU */, COPIED = 0x800000 };
enum { MESSAGE = 0x40, SENT = 0x41, TIMER = 0x42, KINDS = 4 /* and kicks */ };

/* What the programs of one vCPU note, in times of the TSC; they know each member by its offset. */
struct note {
    uint64_t done;          /* 0: interrupts of all kinds */
    uint64_t seen[3];       /* 8: when the handler of the last one began, by vector - MESSAGE */
    uint64_t count[3];      /* 32: how many there were */
    uint64_t sent;          /* 56, of vCPU 0: when it last sent one to vCPU 1 */
    uint64_t due;           /* 64: the timer's next deadline */
    uint64_t expired_due;   /* 72: the deadline of its last interrupt, */
    uint64_t expired_seen;  /* 80: and when the handler of that began */
    uint64_t unused;
    uint64_t asked;         /* 96, of vCPU 0: the host counts what is to be sent, */
    uint64_t answered;      /* 104: and vCPU 0 what it has sent */
    uint64_t unused_too[2];
};
_Static_assert(sizeof(struct note) == 128 && offsetof(struct note, count) == 32 && offsetof(struct note, sent) == 56 &&
                   offsetof(struct note, expired_due) == 72 && offsetof(struct note, asked) == 96,
               "the programs count on it");

#define CODE_OF(name, text)                                                                                            \
    extern const uint8_t name##_begin[], name##_end[];                                                                 \
    __asm__(".pushsection .rodata; .globl " #name "_begin, " #name "_end; " #name "_begin: " text "; " #name "_end: .popsection")
/* R12: the vCPU's note. Handlers use R8 to R11 and RAX, RCX, RDX, which no work relies on. */
#define HANDLER(number)                                                                                                \
    "push %rax; push %rdx; push %rcx; rdtsc; shl $32, %rdx; or %rdx, %rax; mov %rax, 8+8*" #number "(%r12);"             \
    "incq 32+8*" #number "(%r12); incq (%r12);"
#define END_HANDLER "mov $0xFEE000B0, %ecx; movl $0, (%rcx); pop %rcx; pop %rdx; pop %rax; iretq"
CODE_OF(on_message, HANDLER(0) END_HANDLER);
CODE_OF(on_sent, HANDLER(1) END_HANDLER);
/* The next deadline is 500 us away. */
#define ARM "rdtsc; shl $32, %rdx; or %rdx, %rax; add $500000, %rax; mov %rax, 64(%r12); mov %rax, %rdx; shr $32, %rdx;" \
            "mov $0x6E0, %ecx; wrmsr;"
CODE_OF(on_timer, HANDLER(2) "mov 64(%r12), %rcx; mov %rcx, 72(%r12); mov %rax, 80(%r12);" ARM END_HANDLER);
/* APIC on, the timer in deadline mode, then work for ever; vCPU 0 (R13) sends MESSAGE + 1 to vCPU 1 as the host asks. */
#define BEGIN "mov $0xFEE00000, %ebx; movl $0x1FF, 0xF0(%rbx); movl $0x40042, 0x320(%rbx); mfence;" ARM "sti; "
#define SEND "test %r13, %r13; jnz 7f; mov 96(%r12), %rax; cmp 104(%r12), %rax; je 7f; mov %rax, 104(%r12); cli; movl $0x1000000, 0x310(%rbx);" \
             "rdtsc; shl $32, %rdx; or %rdx, %rax; mov %rax, 56(%r12); movl $0x4041, 0x300(%rbx); sti; 7:"
CODE_OF(compute, BEGIN "2: mov $1000, %r15d; 3: imul $77, %r14, %r14; add $5, %r14; dec %r15d; jnz 3b;" SEND "jmp 2b");
CODE_OF(copy, BEGIN "2: mov $0x800000, %esi; mov $0x900000, %edi; mov $0x100000, %ecx; rep movsb;" SEND "jmp 2b");

static struct soft_vm *vm;
static uint8_t *ram;
static unsigned vcpus = 2, events = 2000;
static bool ending;
static uint64_t returned[MOST]; /* atomic: when each thread was last out of the guest for a kick */
static uint32_t *times[KINDS];
static unsigned counts[KINDS];

static volatile struct note *note(unsigned i) { return (volatile struct note *)(void *)(ram + NOTES) + i; }

static void *run(void *arg)
{
    uint32_t index = (uint32_t)(uintptr_t)arg;
    while (!__atomic_load_n(&ending, __ATOMIC_SEQ_CST)) {
        enum soft_stop stop = soft_vcpu_run(vm, index);
        if (stop != SOFT_STOP_WAKE) {
            printf("vCPU %u stopped with %d\n", index, stop);
            exit(1);
        }
        __atomic_store_n(&returned[index], soft_vm_now(vm), __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void put64(uint32_t at, uint64_t v) { memcpy(ram + at, &v, 8); }

static void gate(unsigned vector, const uint8_t *begin, const uint8_t *end, uint32_t at)
{
    memcpy(ram + at, begin, (size_t)(end - begin));
    put64(IDT + 16 * vector, (at & 0xFFFFull) | 8ull << 16 | 0x8E00ull << 32 | (uint64_t)(at >> 16) << 48);
    put64(IDT + 16 * vector + 8, 0);
}

static void prepare(uint32_t index, const uint8_t *begin, const uint8_t *end)
{
    uint32_t at = CODE + index * 0x2000;
    memcpy(ram + at, begin, (size_t)(end - begin));
    struct kvm_regs r = { .rip = at, .rsp = STACKS + 0x1000 * (index + 1), .rflags = 2, .r12 = NOTES + 128 * index, .r13 = index };
    const struct kvm_dtable gdt = { .base = GDT, .limit = 0x17 }, idt = { .base = IDT, .limit = 0xFFF };
    if (!begin_64bit(vm, index, &r, PML4, gdt, idt)) {
        printf("a state was refused\n");
        exit(1);
    }
}

static void build_memory(void)
{
    memset(ram, 0, COPIED);
    put64(PML4, PDPT | 3);
    put64(PDPT, PD | 3);
    put64(PDPT + 24, PD_APIC | 3);
    for (unsigned i = 0; i < RAM >> 21; i++)
        put64(PD + 8 * i, (uint64_t)i << 21 | 0x83);
    put64(PD_APIC + 8 * (0xFEE00000u >> 21 & 511), 0xFEE00083);
    put64(GDT + 8, 0x00AF9B000000FFFF);
    put64(GDT + 16, 0x00CF93000000FFFF);
    gate(MESSAGE, on_message_begin, on_message_end, 0x8000);
    gate(SENT, on_sent_begin, on_sent_end, 0x8200);
    gate(TIMER, on_timer_begin, on_timer_end, 0x8400);
}

static void rest(uint64_t ns)
{
    struct timespec t = { 0, (long)ns };
    nanosleep(&t, NULL);
}

static void keep(unsigned kind, uint64_t from, uint64_t to)
{
    if (counts[kind] < EVENTS_MOST)
        times[kind][counts[kind]++] = to > from ? (uint32_t)((to - from) / 100) : 0; /* 0.1 us */
}

/* Until `word` is more than `before`; the wait is coarse, since the guest notes the time. False: not within ten seconds. */
static bool wait_beyond(const volatile uint64_t *word, uint64_t before)
{
    for (uint64_t begun = soft_vm_now(vm); __atomic_load_n(word, __ATOMIC_SEQ_CST) <= before; rest(PAUSE_NS / 6))
        if (soft_vm_now(vm) - begun > 10000000000ull)
            return false;
    return true;
}

static int by_time(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void report(const char *work, const char *name, unsigned kind)
{
    uint32_t *t = times[kind];
    unsigned n = counts[kind], over = 0;
    qsort(t, n, sizeof *t, by_time);
    for (unsigned i = 0; i < n; i++)
        over += t[i] > 10000;
    printf("%s-%s %u %.1f %.1f %.1f %.1f %u\n", name, work, n, n ? t[n / 2] / 10. : 0, n ? t[n * 99ull / 100] / 10. : 0,
           n ? t[n * 999ull / 1000] / 10. : 0, n ? t[n - 1] / 10. : 0, over);
    fflush(stdout);
    counts[kind] = 0;
}

static const char *missing(const char *what, unsigned i)
{
    struct kvm_regs r = { 0 };
    soft_vm_stop_all(vm);
    soft_vcpu_get(vm, i, SOFT_STATE_REGS, &r, sizeof r);
    fprintf(stderr, "vCPU %u is at %#llx, RCX %#llx, RFLAGS %#llx after %llu interrupts\n", i, r.rip, r.rcx, r.rflags,
            (unsigned long long)note(i)->done);
    return what;
}

/* NULL, or what did not arrive. */
static const char *measure(unsigned k, uint64_t *timer_seen)
{
    unsigned i = k % vcpus;
    volatile struct note *n = note(i), *first = note(0), *second = note(1);
    uint64_t before = n->count[0], begun = soft_vm_now(vm);
    soft_vm_signal_msi(vm, 0xFEE00000u | i << 12, MESSAGE);
    if (!wait_beyond(&n->count[0], before))
        return missing("message", i);
    keep(0, begun, n->seen[0]);
    if (vcpus > 1) {
        before = second->count[1];
        first->asked++;
        if (!wait_beyond(&second->count[1], before))
            return missing("interrupt of another vCPU", 1);
        keep(1, first->sent, second->seen[1]);
    }
    uint64_t due = n->expired_due, seen = n->expired_seen;
    if (due && seen >= due && seen != timer_seen[i])
        keep(2, due, seen);
    timer_seen[i] = seen;
    before = __atomic_load_n(&returned[i], __ATOMIC_SEQ_CST);
    begun = soft_vm_now(vm);
    soft_vcpu_wake(vm, i);
    if (!wait_beyond(&returned[i], before))
        return missing("kick", i);
    keep(3, begun, returned[i]);
    rest(PAUSE_NS);
    return NULL;
}

static void work(const char *name, const uint8_t *begin, const uint8_t *end)
{
    static const char *const kinds[KINDS] = { "message", "ipi", "timer", "kick" };
    const struct soft_config config = { .vcpus = vcpus, .parallel = true, .tsc_khz = 1000000, .quantum = 50000 };
    uint64_t timer_seen[MOST] = { 0 };
    pthread_t ids[MOST];
    ending = false;
    memset(returned, 0, sizeof returned);
    build_memory();
    vm = soft_vm_create(&config, &NO_DEVICES);
    if (!vm || soft_vm_set_slot(vm, 0, 0, RAM, ram, false, false))
        exit(1);
    for (unsigned i = 0; i < vcpus; i++)
        prepare(i, begin, end);
    for (uintptr_t i = 0; i < vcpus; i++)
        if (pthread_create(&ids[i], NULL, run, (void *)i))
            exit(1);
    rest(20000000);
    for (unsigned k = 0; k < events; k++) {
        const char *what = measure(k, timer_seen);
        if (what) {
            printf("%s: no %s within ten seconds\n", name, what);
            exit(1);
        }
    }
    __atomic_store_n(&ending, true, __ATOMIC_SEQ_CST);
    soft_vm_wake(vm);
    for (unsigned i = 0; i < vcpus; i++)
        pthread_join(ids[i], NULL);
    soft_vm_destroy(vm);
    for (unsigned kind = 0; kind < KINDS; kind++)
        report(name, kinds[kind], kind);
}

int main(int argc, char **argv)
{
    vcpus = argc > 1 ? (unsigned)atoi(argv[1]) : vcpus;
    events = argc > 2 ? (unsigned)atoi(argv[2]) : events;
    if (vcpus < 1 || vcpus > MOST || events > EVENTS_MOST) {
        fprintf(stderr, "usage: soft_latency [1 to %d vCPUs [up to %d events]]\n", MOST, EVENTS_MOST);
        return 2;
    }
    ram = aligned_alloc(4096, RAM);
    for (unsigned kind = 0; kind < KINDS; kind++)
        times[kind] = calloc(EVENTS_MOST, sizeof **times);
    work("compute", compute_begin, compute_end);
    work("copy", copy_begin, copy_end);
    for (unsigned kind = 0; kind < KINDS; kind++)
        free(times[kind]);
    free(ram);
    return 0;
}
