/* Litmus programs for vCPUs that run at the same time (soft_config.parallel): what x86-TSO forbids (Intel SDM vol. 3, 8.2.3),
 * locked operations, code that another vCPU, a device or another mapping changes. 64-bit guests without interrupts; each
 * batch of rounds begins at a barrier and ends with HLT. Prints "ok NAME ROUNDS" for each; exits 1 at the first that fails.
 * Where threads seldom have two processors at the same time rounds take long: then those of a program end after SECONDS.
 *
 *   soft_litmus [ROUNDS [SECONDS [NAME|all [core|native|mixed RUNNER]]]]
 *
 * native: the programs run at CPL 3, by direct execution with the program RUNNER of runners. mixed: every second vCPU does, and
 * the others run in the core; by turns, so that each side of a program is once here and once there.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <linux/memfd.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "soft/direct/direct.h"
#include "soft_guest.h"

enum { RAM = 16 << 20, THREADS = 4, BATCH = 200, LINE = 128 };
enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, PT = 0x4000, ENTRY_POINT = 0x5000, STACKS = 0x10000, CODE = 0x20000, PATCHED = 0x40000,
       SHARED = 0x100000, X = 0x200000, Y = 0x300000, OUT = 0x400000 /* per thread 64 KiB: two words a round */ };
enum { ALIAS = 1 << 30 }; /* the same memory once more */

/* Every program: RDI = SHARED, RSI = rounds, RBX = X, RBP = Y, R12 = where its results go, R13 = its number, R14 = how many
 * threads there are. It begins at BARRIER and ends with HLT. */
#define BARRIER "lock incq (%rdi); 1: pause; cmpq %r14, (%rdi); jb 1b;"
#define PROGRAM(name, ...)                                                                                             \
    extern const uint8_t name##_begin[], name##_end[];                                                                 \
    __asm__(".pushsection .rodata; .globl " #name "_begin, " #name "_end; " #name "_begin: " BARRIER __VA_ARGS__       \
            "; cli; hlt; " #name "_end: .popsection")
/* Rounds over X and Y: `body` may use RAX and RDX as the round's results, which are stored, R10 and R11. */
#define FREE_ROUNDS(body)                                                                                              \
    "xor %r8d, %r8d; xor %r9d, %r9d; xor %r13d, %r13d; 2: xor %eax, %eax; xor %edx, %edx; " body                       \
    "; mov %eax, (%r12,%r9); mov %edx, 4(%r12,%r9); add $8, %r9; add $128, %r8; dec %rsi; jnz 2b"
/* The same, and each round begins when all threads are there: for two. Who waits for long gives its processor away: by PAUSEs in a row. */
#define ROUNDS(body)                                                                                                   \
    FREE_ROUNDS("add %r14, %r13; lock incq 0x40(%rdi); mov $4000, %r15d;"                                              \
                "7: cmpq %r13, 0x40(%rdi); jae 8f; dec %r15d; jnz 7b; 9: pause; cmpq %r13, 0x40(%rdi); jb 9b; 8:" body)

PROGRAM(write_both, ROUNDS("movl $1, (%rbx,%r8); movl $1, (%rbp,%r8)"));
PROGRAM(read_both, ROUNDS("mov (%rbp,%r8), %eax; mov (%rbx,%r8), %edx"));
PROGRAM(write_x_read_y, ROUNDS("movl $1, (%rbx,%r8); mfence; mov (%rbp,%r8), %eax"));
PROGRAM(write_y_read_x, ROUNDS("movl $1, (%rbp,%r8); mfence; mov (%rbx,%r8), %eax"));
PROGRAM(xchg_x_read_y, ROUNDS("mov $1, %r10d; xchg %r10d, (%rbx,%r8); mov (%rbp,%r8), %eax"));
PROGRAM(xchg_y_read_x, ROUNDS("mov $1, %r10d; xchg %r10d, (%rbp,%r8); mov (%rbx,%r8), %eax"));
PROGRAM(cpuid_x_read_y, ROUNDS("movl $1, (%rbx,%r8); mov %rbx, %r10; mov %rdx, %r11; xor %eax, %eax; cpuid; mov %r10, %rbx;"
                               "xor %edx, %edx; mov (%rbp,%r8), %eax"));
PROGRAM(cpuid_y_read_x, ROUNDS("movl $1, (%rbp,%r8); mov %rbx, %r10; mov %rdx, %r11; xor %eax, %eax; cpuid; mov %r10, %rbx;"
                               "xor %edx, %edx; mov (%rbx,%r8), %eax"));
PROGRAM(plain_x_read_y, ROUNDS("movl $1, (%rbx,%r8); mov (%rbp,%r8), %eax"));
PROGRAM(plain_y_read_x, ROUNDS("movl $1, (%rbp,%r8); mov (%rbx,%r8), %eax"));
PROGRAM(read_x_write_y, ROUNDS("mov (%rbx,%r8), %eax; movl $1, (%rbp,%r8)"));
PROGRAM(read_y_write_x, ROUNDS("mov (%rbp,%r8), %eax; movl $1, (%rbx,%r8)"));
/* Here the last value that stays in memory counts, too. */
PROGRAM(x1_y2, ROUNDS("movl $1, (%rbx,%r8); movl $2, (%rbp,%r8)"));
PROGRAM(y1_x2, ROUNDS("movl $1, (%rbp,%r8); movl $2, (%rbx,%r8)"));
PROGRAM(y2_read_x, ROUNDS("movl $2, (%rbp,%r8); mfence; mov (%rbx,%r8), %eax"));
PROGRAM(x2_y1, ROUNDS("movl $2, (%rbx,%r8); movl $1, (%rbp,%r8)"));
PROGRAM(read_y_write_x1, ROUNDS("mov (%rbp,%r8), %eax; movl $1, (%rbx,%r8)"));
PROGRAM(x1_x2, ROUNDS("movl $1, (%rbx,%r8); movl $2, (%rbx,%r8)"));
PROGRAM(read_x_twice, ROUNDS("mov (%rbx,%r8), %eax; mov (%rbx,%r8), %edx"));
PROGRAM(add_x_read_y, ROUNDS("lock incl (%rbx,%r8); mov (%rbp,%r8), %eax"));
PROGRAM(add_y_read_x, ROUNDS("lock incl (%rbp,%r8); mov (%rbx,%r8), %eax"));
PROGRAM(plain_x_split_read_y, ROUNDS("movl $1, (%rbx,%r8); lock incl 0x3E(%rbx,%r8); mov (%rbp,%r8), %eax"));
PROGRAM(plain_y_split_read_x, ROUNDS("movl $1, (%rbp,%r8); lock incl 0x3E(%rbp,%r8); mov (%rbx,%r8), %eax"));
PROGRAM(copy_both, ROUNDS("push %rsi; mov %rdi, %r10; movl $1, 0xC0(%rdi); lea 0xC0(%r10), %rsi; lea (%rbx,%r8), %rdi;"
                          "mov $1, %ecx; rep movsl; movl $1, (%rbp,%r8); mov %r10, %rdi; pop %rsi"));
PROGRAM(pass_x_on, FREE_ROUNDS("mov (%rbx,%r8), %eax; test %eax, %eax; jz 5f; movl $1, (%rbp,%r8); 5:"));
PROGRAM(xchg_x, FREE_ROUNDS("mov $1, %r10d; xchg %r10d, (%rbx,%r8)"));
PROGRAM(xchg_y, FREE_ROUNDS("mov $1, %r10d; xchg %r10d, (%rbp,%r8)"));
/* Stores of all zeros and all ones, and loads that must see one of them: inside a line each is one access (SDM vol. 3,
 * 8.1.1), whatever instruction makes it; aligned 16 bytes are on processors that have AVX (R15). */
PROGRAM(store_words, "2: xor %eax, %eax; mov %rsi, %rcx; and $1, %ecx; sub %rcx, %rax; mov %rax, 0x9(%rbx); mov %eax, 0x53(%rbx);"
                     "mov %ax, 0x95(%rbx); movq %rax, %xmm0; movq %xmm0, 0xC8(%rbx); mov %rsp, %r10; lea 0x110(%rbx), %rsp; push %rax;"
                     "mov %r10, %rsp; mov %rdi, %r10; lea 0x148(%rbx), %rdi; stosq; mov %r10, %rdi;"
                     "punpcklqdq %xmm0, %xmm0; movdqa %xmm0, 0x300(%rbx); dec %rsi; jnz 2b");
#define WHOLE(load) load "; lea 1(%rax), %rdx; cmp $1, %rdx; setbe %dl; movzx %dl, %edx; xor $1, %edx; add %rdx, %r11;"
PROGRAM(load_words, "xor %r11d, %r11d; 2:" WHOLE("mov 0x9(%rbx), %rax") WHOLE("movslq 0x53(%rbx), %rax") WHOLE("movswq 0x95(%rbx), %rax")
                    WHOLE("movq 0xC8(%rbx), %xmm1; movq %xmm1, %rax") WHOLE("mov %rsp, %r10; lea 0x108(%rbx), %rsp; pop %rax; mov %r10, %rsp")
                    WHOLE("mov %rsi, %r10; lea 0x148(%rbx), %rsi; lodsq; mov %r10, %rsi") WHOLE("fildll 0x9(%rbx); fistpll 0x200(%rbx); mov 0x200(%rbx), %rax")
                    "movdqa 0x300(%rbx), %xmm1; movq %xmm1, %rax; psrldq $8, %xmm1; movq %xmm1, %rdx; cmp %rax, %rdx; je 5f;"
                    "add %r15, %r11; 5: dec %rsi; jnz 2b; lock addl %r11d, 0x180(%rdi)");
/* The walker sets accessed and dirty by a locked operation (SDM vol. 3, 8.1.2.1): what another vCPU adds to the entry
 * meanwhile stays, and what it takes away does not come back. R15: the entry. */
PROGRAM(walk, "mov $0x1F0000, %r9d; 2: lock andq $~0x60, (%r15); invlpg (%r9); mov (%r9), %eax; movl $1, (%r9);"
              "mov (%r15), %rax; not %rax; test $0x60, %al; jz 5f; lock incl 0x180(%rdi); 5: dec %rsi; jnz 2b");
PROGRAM(add_to_entry, "mov $1, %eax; shl $52, %rax; 2: lock addq %rax, (%r15); dec %rsi; jnz 2b");

PROGRAM(write_x, FREE_ROUNDS("movl $1, (%rbx,%r8)"));
PROGRAM(write_y, FREE_ROUNDS("movl $1, (%rbp,%r8)"));
PROGRAM(read_x_then_y, FREE_ROUNDS("mov (%rbx,%r8), %eax; mov (%rbp,%r8), %edx"));
PROGRAM(read_y_then_x, FREE_ROUNDS("mov (%rbp,%r8), %eax; mov (%rbx,%r8), %edx"));

/* Each adds 1 to counters, a kind of operation and a place each: inside a line, across lines, across pages. */
#define PLACES(op) op "0x100(%rbx); " op "0x13D(%rbx); " op "0xFFD(%rbx);"
PROGRAM(counters,
        "2:" PLACES("lock incl ") "lock addq $1, 0x200(%rbx); lock addw $1, 0x211(%rbx); lock addb $1, 0x220(%rbx);"
        "mov $1, %eax; lock xadd %rax, 0x280(%rbx); lock subl $-1, 0x2BE(%rbx); stc; lock adcl $0, 0x300(%rbx);"
        "mov 0x380(%rbx), %eax; 3: lea 1(%rax), %edx; lock cmpxchg %edx, 0x380(%rbx); jne 3b;"
        "mov 0x3FE(%rbx), %eax; 3: lea 1(%rax), %edx; lock cmpxchg %edx, 0x3FE(%rbx); jne 3b;"
        "push %rbx; mov %rbx, %r10; mov 0x440(%r10), %rax; mov 0x448(%r10), %rdx;"
        "3: lea 1(%rax), %rbx; lea 2(%rdx), %rcx; lock cmpxchg16b 0x440(%r10); jne 3b; pop %rbx;"
        /* a lock of a bit, one of XCHG; what they guard is changed by plain instructions */
        "4: lock btsl $5, 0x480(%rbx); jnc 5f; pause; jmp 4b; 5: incl 0x500(%rbx); lock btrl $5, 0x480(%rbx);"
        "mov $1, %eax; 4: xchg %eax, 0x580(%rbx); test %eax, %eax; jz 5f; pause; jmp 4b; 5: incl 0x600(%rbx); movl $0, 0x580(%rbx);"
        "dec %rsi; jnz 2b");

/* The first vCPU changes what a function of the others returns and tells them; they serialize and call it. R15: through
 * which address it writes. The page has a second function, which runs all the time, so that the page holds code. */
PROGRAM(patch, "1: mov 0x80(%rdi), %rax; inc %rax; test %r13, %r13; jnz 3f;"
               /* writer: RAX = next value */
               "2: mov %eax, 1(%r15); mov %rax, 0x80(%rdi); lea -1(%r14), %rdx; imul %rax, %rdx;"
               "4: pause; cmp %rdx, 0x100(%rdi); jb 4b; inc %rax; cmp %rsi, %rax; jbe 2b; jmp 9f;"
               /* readers: R8 = the value that is next */
               "3: mov $0x40000, %r9d; mov $1, %r8d;"
               "5: pause; lea 0x40(%r9), %rax; call *%rax; cmp %r8, 0x80(%rdi); jb 5b;"
               "xor %eax, %eax; mov %rbx, %r10; cpuid; mov %r10, %rbx; call *%r9; cmp %r8d, %eax; je 6f;"
               "lock incl 0x180(%rdi); 6: lock incq 0x100(%rdi); inc %r8; cmp %rsi, %r8; jbe 5b; 9:");
/* The same with code that is new each time, which nobody has to serialize for in practice: 16 bytes from 0x40000 on. */
PROGRAM(fresh, "test %r13, %r13; jnz 3f; mov $1, %eax; mov %r15, %r9;"
               "2: movb $0xB8, (%r9); mov %eax, 1(%r9); movb $0xC3, 5(%r9); mov %rax, 0x80(%rdi);"
               "lea -1(%r14), %rdx; imul %rax, %rdx; 4: pause; cmp %rdx, 0x100(%rdi); jb 4b;"
               "add $16, %r9; inc %rax; cmp %rsi, %rax; jbe 2b; jmp 9f;"
               "3: mov $0x40000, %r9d; mov $1, %r8d;"
               "5: pause; cmp %r8, 0x80(%rdi); jb 5b; call *%r9; cmp %r8d, %eax; je 6f; lock incl 0x180(%rdi);"
               "6: lock incq 0x100(%rdi); add $16, %r9; inc %r8; cmp %rsi, %r8; jbe 5b; 9:");

/* The first vCPU puts a CPUID into the function that the others call, and takes it away, every second time each: what they see is
 * the guest's. */
PROGRAM(hide, "mov $1, %eax; test %r13, %r13; jnz 3f;"
              "2: mov $0x9090, %ecx; test $1, %al; jnz 7f; mov $0xA20F, %ecx; 7: mov %cx, 5(%r15); mov %rax, 0x80(%rdi);"
              "lea -1(%r14), %rdx; imul %rax, %rdx; 4: pause; cmp %rdx, 0x100(%rdi); jb 4b; inc %rax; cmp %rsi, %rax; jbe 2b; jmp 9f;"
              "3: mov $0x40000, %r9d; mov $1, %r8d;"
              "5: pause; cmp %r8, 0x80(%rdi); jb 5b; xor %eax, %eax; mov %rbx, %r10; cpuid; xor %edx, %edx; call *%r9; mov %r10, %rbx;"
              "mov %r8d, %eax; and $1, %eax; dec %eax; and $0x5A5A5A5A, %eax; cmp %eax, %edx; je 6f; lock incl 0x180(%rdi);"
              "6: lock incq 0x100(%rdi); inc %r8; cmp %rsi, %r8; jbe 5b; 9:");

/* Each vCPU changes a function of its own, all of them in one page, and calls it; R15: the page, as it is written to. The
 * first is translated anew at once (SDM vol. 3, 9.1.3, option 1), the second after a serializing instruction. */
#define OWN(serialize)                                                                                                 \
    "mov %r13, %r9; shl $6, %r9; lea (%r15,%r9), %r11; add $0x40000, %r9; xor %r8d, %r8d;"                             \
    "2: inc %r8; mov %r8d, 1(%r11); " serialize " call *%r9; cmp %r8d, %eax; je 6f; lock incl 0x180(%rdi);"            \
    "6: cmp %rsi, %r8; jb 2b"
PROGRAM(own_code, OWN(""));
PROGRAM(own_code_serialized, OWN("mov %rbx, %r10; xor %eax, %eax; cpuid; mov %r10, %rbx;"));

static struct soft_vm *vm;
static uint8_t *ram;
static unsigned threads;
static pthread_barrier_t begin, end;
static bool ending;
static const char *current;
static enum { CORE, NATIVE, MIXED } how = CORE;
static unsigned batches;
static bool native_at(unsigned vcpu) { return how == NATIVE || (how == MIXED && ((vcpu ^ batches) & 1)); }

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

static void *run(void *arg)
{
    uint32_t index = (uint32_t)(uintptr_t)arg;
    for (;;) {
        pthread_barrier_wait(&begin);
        if (ending)
            return NULL;
        enum soft_stop stop;
        while ((stop = soft_vcpu_run(vm, index)) == SOFT_STOP_WAKE)
            ;
        if (stop != SOFT_STOP_HALTED)
            fail("vCPU %u stopped with %d", index, stop);
        pthread_barrier_wait(&end);
    }
}

static void put64(uint32_t at, uint64_t v) { memcpy(ram + at, &v, 8); }
static uint32_t get32(uint32_t at)
{
    uint32_t v;
    memcpy(&v, ram + at, 4);
    return v;
}

/* A program's last two bytes are CLI and HLT. At CPL 3 it calls the system, whose first instructions are these. */
static void prepare(uint32_t index, const uint8_t *from, const uint8_t *to, uint64_t rounds, uint64_t r15)
{
    static const uint8_t syscall[] = { 0x0F, 0x05 };
    uint32_t at = CODE + index * 0x2000, end = at + (uint32_t)(to - from);
    bool native = native_at(index) && to - from > 2;
    memcpy(ram + at, from, (size_t)(to - from));
    if (native)
        memcpy(ram + end - sizeof syscall, syscall, sizeof syscall);
    soft_vm_memory_written(vm, at, (uint64_t)(to - from));
    struct kvm_regs r = { .rip = at, .rsp = STACKS + 0x1000 * (index + 1), .rflags = 2, .rdi = SHARED, .rsi = rounds, .rbx = X,
                          .rbp = Y, .r12 = OUT + 0x10000 * index, .r13 = index, .r14 = threads, .r15 = r15 };
    const struct kvm_dtable none = { 0 };
    if (!begin_64bit(vm, index, &r, PML4, none, none) || (native && !go_to_user(vm, index, ENTRY_POINT)))
        fail("a state was refused");
}

/* The first `count` vCPUs run programs[0..count-1], the others sleep. */
struct program {
    const uint8_t *begin, *end;
};
#define P(name) { name##_begin, name##_end }

static void batch(const struct program *programs, unsigned count, uint64_t rounds, uint64_t r15)
{
    static const uint8_t halt[] = { 0xFA, 0xF4 };
    memset(ram + SHARED, 0, 0x1000);
    threads = count;
    for (unsigned i = 0; i < THREADS; i++)
        prepare(i, i < count ? programs[i].begin : halt, i < count ? programs[i].end : halt + sizeof halt, rounds, r15);
    pthread_barrier_wait(&begin);
    pthread_barrier_wait(&end);
    batches++;
}

/* ---- what orders of loads and stores may be seen ---- */

enum { IN_MEMORY = THREADS }; /* behind the vCPUs' results: X and Y as they are at last */
typedef const uint32_t (*results_t)[2]; /* by vCPU: EAX, EDX */
struct litmus {
    const char *name;
    unsigned count;
    struct program programs[THREADS];
    bool (*forbidden)(results_t r); /* NULL: nothing is */
};
static bool both_zero(results_t r) { return !r[0][0] && !r[1][0]; }
static bool both_one(results_t r) { return r[0][0] && r[1][0]; }
static bool second_alone(results_t r) { return r[1][0] && !r[1][1]; }
static bool third_alone(results_t r) { return r[2][0] && !r[2][1]; }
static bool two_orders(results_t r) { return r[2][0] && !r[2][1] && r[3][0] && !r[3][1]; }
static bool first_stores_last(results_t r) { return r[IN_MEMORY][0] == 1 && r[IN_MEMORY][1] == 1; }
static bool store_unseen(results_t r) { return r[IN_MEMORY][1] == 2 && !r[1][0]; }
static bool later_store_first(results_t r) { return r[1][0] && r[IN_MEMORY][0] == 2; }
static bool goes_back(results_t r) { return r[1][0] > r[1][1]; }

static const struct litmus ORDERS[] = {
    { "message passing", 2, { P(write_both), P(read_both) }, second_alone },
    { "message passing, string", 2, { P(copy_both), P(read_both) }, second_alone },
    { "store buffering", 2, { P(plain_x_read_y), P(plain_y_read_x) }, NULL },
    { "store buffering, mfence", 2, { P(write_x_read_y), P(write_y_read_x) }, both_zero },
    { "store buffering, xchg", 2, { P(xchg_x_read_y), P(xchg_y_read_x) }, both_zero },
    { "store buffering, lock inc", 2, { P(add_x_read_y), P(add_y_read_x) }, both_zero },
    { "store buffering, split lock", 2, { P(plain_x_split_read_y), P(plain_y_split_read_x) }, both_zero },
    { "store buffering, cpuid", 2, { P(cpuid_x_read_y), P(cpuid_y_read_x) }, both_zero },
    { "load buffering", 2, { P(read_x_write_y), P(read_y_write_x) }, both_one },
    { "2+2w", 2, { P(x1_y2), P(y1_x2) }, first_stores_last },
    { "r", 2, { P(write_both), P(y2_read_x) }, store_unseen },
    { "s", 2, { P(x2_y1), P(read_y_write_x1) }, later_store_first },
    { "coherence", 2, { P(x1_x2), P(read_x_twice) }, goes_back },
    { "write to read causality", 3, { P(write_x), P(pass_x_on), P(read_y_then_x) }, third_alone },
    { "iriw", 4, { P(write_x), P(write_y), P(read_x_then_y), P(read_y_then_x) }, two_orders },
    { "iriw, xchg", 4, { P(xchg_x), P(xchg_y), P(read_x_then_y), P(read_y_then_x) }, two_orders },
};

static uint64_t weak; /* rounds in which stores passed loads as they may: the test sees what it looks for */
static time_t seconds = 3600;
static uint64_t order(const struct litmus *l, uint64_t rounds)
{
    uint64_t done = 0;
    for (time_t begun = time(NULL); done < rounds && time(NULL) - begun <= seconds; done += BATCH) {
        memset(ram + X, 0, BATCH * LINE);
        memset(ram + Y, 0, BATCH * LINE);
        batch(l->programs, l->count, BATCH, 0);
        for (unsigned k = 0; k < BATCH; k++) {
            uint32_t results[THREADS + 1][2] = { [IN_MEMORY] = { get32(X + LINE * k), get32(Y + LINE * k) } };
            for (unsigned i = 0; i < l->count; i++)
                for (unsigned word = 0; word < 2; word++)
                    results[i][word] = get32(OUT + 0x10000 * i + 8 * k + 4 * word);
            if (!l->forbidden)
                weak += both_zero((results_t)results);
            else if (l->forbidden((results_t)results))
                fail("round %u: %u %u, %u %u, %u %u, %u %u, in memory %u %u", k, results[0][0], results[0][1], results[1][0],
                     results[1][1], results[2][0], results[2][1], results[3][0], results[3][1], results[IN_MEMORY][0],
                     results[IN_MEMORY][1]);
        }
    }
    return done;
}

static void count_up(uint64_t rounds)
{
    static const struct program all[THREADS] = { P(counters), P(counters), P(counters), P(counters) };
    static const struct { uint32_t at; unsigned bytes, each; } sums[] = {
        { 0x100, 4, 1 }, { 0x13D, 4, 1 }, { 0xFFD, 4, 1 }, { 0x200, 8, 1 }, { 0x211, 2, 1 }, { 0x220, 1, 1 }, { 0x280, 8, 1 },
        { 0x2BE, 4, 1 }, { 0x300, 4, 1 }, { 0x380, 4, 1 }, { 0x3FE, 4, 1 }, { 0x440, 8, 1 }, { 0x448, 8, 2 }, { 0x480, 4, 0 },
        { 0x500, 4, 1 }, { 0x580, 4, 0 }, { 0x600, 4, 1 } };
    memset(ram + X, 0, 0x2000);
    batch(all, THREADS, rounds, 0);
    for (unsigned i = 0; i < sizeof sums / sizeof *sums; i++) {
        uint64_t v = 0, wanted = rounds * THREADS * sums[i].each;
        memcpy(&v, ram + X + sums[i].at, sums[i].bytes);
        if (sums[i].bytes < 8)
            wanted &= (1ull << (8 * sums[i].bytes)) - 1;
        if (v != wanted)
            fail("the counter at %#x has %llu instead of %llu", sums[i].at, (unsigned long long)v, (unsigned long long)wanted);
    }
}

static void count_wrong(const char *what)
{
    if (get32(SHARED + 0x180))
        fail("%s %u times", what, get32(SHARED + 0x180));
}

static void whole_words(uint64_t rounds)
{
    static const struct program both[] = { P(store_words), P(load_words) };
    memset(ram + X, 0, 0x1000);
    batch(both, 2, rounds, __builtin_cpu_supports("avx") ? 1 : 0);
    count_wrong("half a store was seen");
}

static void walk_tables(uint64_t rounds)
{
    static const struct program both[] = { P(walk), P(add_to_entry) };
    enum { PAGE = 0x1F0, ENTRY = PT + 8 * PAGE, MOST = 2000 /* entries have 11 bits that mean nothing */ };
    while (rounds) {
        uint64_t part = rounds < MOST ? rounds : MOST, entry;
        put64(ENTRY, PAGE << 12 | 3);
        batch(both, 2, part, ENTRY);
        count_wrong("an accessed or dirty bit was lost");
        memcpy(&entry, ram + ENTRY, 8);
        if (entry >> 52 != part || (entry & 0xFFFFFFFFFFF9Full) != (PAGE << 12 | 3))
            fail("the entry is %#llx after %llu additions", (unsigned long long)entry, (unsigned long long)part);
        rounds -= part;
    }
}

static void write_code(uint32_t at, const void *bytes, size_t size)
{
    memcpy(ram + at, bytes, size);
    soft_vm_memory_written(vm, at, size);
}

static void modify(uint64_t rounds, unsigned count, uint64_t through)
{
    static const struct program all[THREADS] = { P(patch), P(patch), P(patch), P(patch) };
    static const uint8_t function[] = { 0xB8, 0, 0, 0, 0, 0xC3 }, other[] = { 0x31, 0xC0, 0xC3 };
    write_code(PATCHED, function, sizeof function); /* mov eax, 0; ret */
    write_code(PATCHED + 0x40, other, sizeof other);
    batch(all, count, rounds, PATCHED + through);
    count_wrong("old code ran");
}

static void hide_cpuid(uint64_t rounds, unsigned count, uint64_t through)
{
    static const struct program all[THREADS] = { P(hide), P(hide), P(hide), P(hide) };
    static const uint8_t function[] = { 0xB8, 4, 0, 0, 0x80, 0x90, 0x90, 0xC3 }; /* mov eax, 0x80000004; nop; nop; ret */
    write_code(PATCHED, function, sizeof function);
    batch(all, count, rounds, PATCHED + through);
    count_wrong("another processor's CPUID was seen");
}

/* The guest's CPUID is one that no host has, and without AVX, which the programs would have to enable. */
static void set_cpuid(void)
{
    static struct kvm_cpuid_entry2 entries[256];
    uint32_t count = soft_supported_cpuid(entries, 256);
    for (uint32_t i = 0; i < count; i++) {
        if (entries[i].function == 0x80000004)
            entries[i].edx = 0x5A5A5A5A;
        if (entries[i].function == 1)
            entries[i].ecx &= ~(1u << 28);
        if (entries[i].function == 13 && !entries[i].index)
            entries[i].eax &= 3;
    }
    for (uint32_t i = 0; i < THREADS; i++)
        if (soft_vcpu_set_cpuid(vm, i, entries, count))
            fail("CPUID was refused");
}

static void modify_own(uint64_t rounds, unsigned count, uint64_t through)
{
    static const struct program direct[THREADS] = { P(own_code), P(own_code), P(own_code), P(own_code) };
    static const struct program serialized[THREADS] = { P(own_code_serialized), P(own_code_serialized), P(own_code_serialized),
                                                        P(own_code_serialized) };
    static const uint8_t function[] = { 0xB8, 0, 0, 0, 0, 0xC3 };
    for (unsigned i = 0; i < THREADS; i++)
        write_code(PATCHED + 64 * i, function, sizeof function);
    batch(through ? serialized : direct, count, rounds, PATCHED + through);
    count_wrong("old code ran");
}

static void make_code(uint64_t rounds, unsigned count, uint64_t through)
{
    static const struct program all[THREADS] = { P(fresh), P(fresh), P(fresh), P(fresh) };
    while (rounds) {
        uint64_t part = rounds < 8192 ? rounds : 8192; /* 128 KiB */
        memset(ram + PATCHED, 0xCC, 16 * part);
        soft_vm_memory_written(vm, PATCHED, 16 * part);
        batch(all, count, part, PATCHED + through);
        count_wrong("old code ran");
        rounds -= part;
    }
}

/* A device changes the code instead: the writer is this program. */
static void *device(void *arg)
{
    const uint64_t rounds = ((const uint64_t *)arg)[0], readers = ((const uint64_t *)arg)[1];
    while (__atomic_load_n((uint64_t *)(void *)(ram + SHARED), __ATOMIC_SEQ_CST) <= readers)
        sched_yield();
    for (uint32_t value = 1; value <= rounds; value++) {
        __atomic_store_n((uint32_t *)(void *)(ram + PATCHED + 4), value, __ATOMIC_SEQ_CST);
        soft_vm_memory_written(vm, PATCHED + 4, 4);
        __atomic_store_n((uint64_t *)(void *)(ram + SHARED + 0x80), value, __ATOMIC_SEQ_CST);
        while (__atomic_load_n((uint64_t *)(void *)(ram + SHARED + 0x100), __ATOMIC_SEQ_CST) < value * readers)
            sched_yield();
    }
    return NULL;
}
static void modify_by_device(uint64_t rounds, unsigned count)
{
    static const uint8_t function[] = { 0x90, 0x90, 0x90, 0xB8, 0, 0, 0, 0, 0xC3 }, other[] = { 0x31, 0xC0, 0xC3 };
    pthread_t thread;
    static const uint8_t arrive[] = { 0xF0, 0x48, 0xFF, 0x07, 0xFA, 0xF4 }; /* lock incq (%rdi); cli; hlt */
    const struct program programs[THREADS] = { { arrive, arrive + sizeof arrive }, P(patch), P(patch), P(patch) };
    write_code(PATCHED, function, sizeof function);
    write_code(PATCHED + 0x40, other, sizeof other);
    memset(ram + SHARED, 0, 0x1000);
    uint64_t what[2] = { rounds, count - 1 };
    if (pthread_create(&thread, NULL, device, what))
        fail("no thread");
    batch(programs, count, rounds, 0);
    pthread_join(thread, NULL);
    count_wrong("old code ran");
}

static void build_tables(void)
{
    put64(PML4, PDPT | 7);
    put64(PDPT, PD | 7);
    put64(PDPT + 8, PD | 7); /* ALIAS */
    put64(PD, PT | 7);
    for (unsigned i = 1; i < RAM >> 21; i++)
        put64(PD + 8 * i, (uint64_t)i << 21 | 0x87);
    for (unsigned i = 0; i < 512; i++)
        put64(PT + 8 * i, (uint64_t)i << 12 | 7);
    memcpy(ram + ENTRY_POINT, (const uint8_t[]){ 0xFA, 0xF4 }, 2);
}

int main(int argc, char **argv)
{
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 0) : 20000;
    const char *only = argc > 3 && strcmp(argv[3], "all") ? argv[3] : NULL;
    seconds = argc > 2 ? atoi(argv[2]) : seconds;
    const struct soft_config config = { .vcpus = THREADS, .parallel = true, .tsc_khz = 1000000, .quantum = 50000 };
    pthread_t ids[THREADS];
    if (argc > 5)
        how = !strcmp(argv[4], "native") ? NATIVE : MIXED;
    int memory = memfd_create("litmus", MFD_CLOEXEC);
    ram = memory < 0 || ftruncate(memory, RAM) < 0 ? MAP_FAILED : mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (ram == MAP_FAILED)
        fail("no memory");
    build_tables();
    vm = soft_vm_create(&config, &NO_DEVICES);
    if (!vm || soft_vm_set_slot(vm, 0, 0, RAM, ram, false, false))
        fail("no VM");
    set_cpuid();
    if (how != CORE && soft_vm_set_direct(vm, &(struct soft_direct_memory){ ram, RAM, 0 }, 1, memory, argv[5], true))
        fail("no direct execution");
    pthread_barrier_init(&begin, NULL, THREADS + 1);
    pthread_barrier_init(&end, NULL, THREADS + 1);
    for (uintptr_t i = 0; i < THREADS; i++)
        if (pthread_create(&ids[i], NULL, run, (void *)i))
            fail("no thread");
#define CHECK(name, n, call)                                                                                           \
    if (!only || !strcmp(only, name)) {                                                                                \
        current = name;                                                                                                \
        uint64_t done = (n);                                                                                           \
        call;                                                                                                          \
        printf("ok %s %llu\n", name, (unsigned long long)done);                                                         \
        fflush(stdout);                                                                                                \
    }
    for (unsigned i = 0; i < sizeof ORDERS / sizeof *ORDERS; i++)
        CHECK(ORDERS[i].name, 0, done = order(&ORDERS[i], rounds));
    CHECK("whole words", rounds, whole_words(rounds));
    if (how == CORE) { /* it needs INVLPG */
        CHECK("accessed and dirty bits", rounds, walk_tables(rounds));
    }
    uint64_t slow_rounds = seconds < 3600 ? rounds / 8 + 1 : rounds; /* some us each: a campaign does all of them */
    CHECK("locked counters", slow_rounds, count_up(slow_rounds));
    CHECK("changed code", slow_rounds, modify(slow_rounds, 2, 0));
    CHECK("changed code, three readers", slow_rounds, modify(slow_rounds, 4, 0));
    CHECK("changed code, another mapping", slow_rounds, modify(slow_rounds, 2, ALIAS));
    CHECK("hidden CPUID", slow_rounds, hide_cpuid(slow_rounds, 2, 0));
    CHECK("hidden CPUID, another mapping", slow_rounds, hide_cpuid(slow_rounds, 4, ALIAS));
    CHECK("own code", slow_rounds, modify_own(slow_rounds, 1, 0));
    CHECK("own code, four in a page", slow_rounds, modify_own(slow_rounds, 4, 0));
    CHECK("own code, another mapping", slow_rounds, modify_own(slow_rounds, 4, ALIAS));
    CHECK("new code", slow_rounds, make_code(slow_rounds, 2, 0));
    CHECK("new code, three readers", slow_rounds, make_code(slow_rounds, 4, ALIAS));
    CHECK("code changed by a device", slow_rounds, modify_by_device(slow_rounds, 2));
    CHECK("code changed by a device, three readers", slow_rounds, modify_by_device(slow_rounds, 4));
    struct soft_native_stats native;
    soft_direct_stats(vm, &native);
    printf("%llu us natively, %llu stops\n", (unsigned long long)native.ns / 1000, (unsigned long long)native.stops);
    printf("stores passed loads in %llu rounds of store buffering\n", (unsigned long long)weak);
    ending = true;
    pthread_barrier_wait(&begin);
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(ids[i], NULL);
    soft_vm_destroy(vm);
    munmap(ram, RAM);
    close(memory);
    return 0;
}
