/* `hostile SEED SECONDS`: random attacks of random programs in a guest whose user code runs natively, one after the other and up to three
 * at a time. Attackers are another user's processes, which are killed after a while. Between the attacks programs of the first user
 * must be sound: what they compute, their memory, their calls. Prints how often each kind was tried, and a line "VIOLATION …" for what must
 * not be. Knows where a runner's own pages are, and its two calls (cpu/soft/direct/layout.h). Static, x86-64 Linux, root. */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <errno.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "soft/direct/layout.h"

enum { PAGE = 4096, CODE = 4 * PAGE, DATA = 16 * PAGE, NOBODY = 65534, BROKEN = 77, ATTACK_MS = 150, LOOP_US = 2000 };
#define FRAME ((volatile uint8_t *)RUNNER_FRAME)
#define VSYSCALLS 0xFFFFFFFFFF600000ul

static uint64_t seed;
static uint64_t any(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return (seed ^= seed << 17) * 0x2545F4914F6CDD1Dul;
}
static unsigned below(unsigned n) { return (unsigned)((any() >> 32) * n >> 32); }

/* ---- going on after whatever happened ---- */

static void *back[5];
static uint64_t fs_base;
static uint8_t *code, *data; /* both writable; code executable too, or through another mapping */
static uint8_t *code_write;
static _Alignas(64) uint8_t handler_stack[65536];
static volatile unsigned caught;

/* Guest code may have changed flags, bases and everything else. */
__attribute__((optimize("no-stack-protector"))) static void handler(int number)
{
    __asm__ volatile("mov %0, %%rsi; mov %1, %%edi; mov %2, %%eax; syscall; pushf; andl $~0x44100, (%%rsp); popf; cld"
                     : : "m"(fs_base), "i"(ARCH_SET_FS), "i"(SYS_arch_prctl) : "rax", "rcx", "rdx", "rdi", "rsi", "r11", "memory", "cc");
    __asm__ volatile("fninit; ldmxcsr %0" : : "m"((uint32_t){0x1F80}));
    caught = (unsigned)number;
    __builtin_longjmp(back, 1);
}

static void catch_all(void)
{
    stack_t alternate = {.ss_sp = handler_stack, .ss_size = sizeof handler_stack};
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK | SA_NODEFER};
    sigaltstack(&alternate, NULL);
    for (int i = 1; i < 32; i++)
        if (i != SIGKILL && i != SIGSTOP && i != SIGCHLD && i != SIGTERM)
            sigaction(i, &action, NULL);
    syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_base);
}
#define AND_GO_ON(...)            \
    do {                                \
        if (!__builtin_setjmp(back)) {  \
            __VA_ARGS__;                \
        }                               \
    } while (0)

static void timer(unsigned us) { setitimer(ITIMER_REAL, &(struct itimerval){{0, us}, {0, us}}, NULL); }

/* Whether code is written through the mapping by which it is executed, or through another one. */
static void make_pages(bool two)
{
    int fd = two ? memfd_create("code", 0) : -1;
    int how = two ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    if (two && ftruncate(fd, CODE))
        _exit(1);
    code = mmap(NULL, CODE, PROT_READ | PROT_EXEC | (two ? 0 : PROT_WRITE), how, fd, 0);
    code_write = two ? mmap(NULL, CODE, PROT_READ | PROT_WRITE, how, fd, 0) : code;
    data = mmap(NULL, DATA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (code == MAP_FAILED || code_write == MAP_FAILED || data == MAP_FAILED)
        _exit(1);
}

static uint64_t address(void)
{
    switch (below(12)) {
    case 0: return RUNNER_GATE + below(512);
    case 1: return RUNNER_FRAME + below(RUNNER_FRAME_BYTES);
    case 2: return RUNNER_COMMANDS + below(PAGE);
    case 3: return 0xFFFFFFFF81000000ul + below(1 << 24);
    case 4: return 0xFFFF888000000000ul + (any() & 0xFFFFFFF);
    case 5: return 0x8000000000000000ul | any();
    case 6: return VSYSCALLS + below(4) * 0x400;
    case 7: return (uint64_t)code + below(CODE);
    case 8: return RUNNER_END - below(64);
    case 9: return any() & 0x7FFFFFFFFFFF;
    default: return (uint64_t)data + DATA / 2 + below(DATA / 4);
    }
}
static uint64_t value(void)
{
    switch (below(6)) {
    case 0: return any();
    case 1: return below(512);
    case 2: return RUNNER_MAGIC;
    case 3: return 1ul << below(64);
    default: return address();
    }
}

/* ---- random code ---- */

static __attribute__((used)) uint64_t registers[16], target;
static __attribute__((noinline)) void enter(uint64_t to)
{
    for (unsigned i = 0; i < 16; i++)
        registers[i] = value();
    if (below(4))
        registers[4] = (uint64_t)data + DATA / 2 + below(PAGE) / 8 * 8;
    if (!below(3)) {
        registers[0] = below(2) ? RUNNER_STOP : RUNNER_RETURN;
        registers[10] = RUNNER_MAGIC;
    }
    target = to;
    __asm__ volatile("lea registers(%%rip), %%rax; mov 8(%%rax), %%rcx; mov 16(%%rax), %%rdx; mov 24(%%rax), %%rbx; mov 32(%%rax), %%rsp\n\t"
                     "mov 40(%%rax), %%rbp; mov 48(%%rax), %%rsi; mov 56(%%rax), %%rdi; mov 64(%%rax), %%r8; mov 72(%%rax), %%r9\n\t"
                     "mov 80(%%rax), %%r10; mov 88(%%rax), %%r11; mov 96(%%rax), %%r12; mov 104(%%rax), %%r13; mov 112(%%rax), %%r14\n\t"
                     "mov 120(%%rax), %%r15; mov (%%rax), %%rax; jmp *target(%%rip)" : : : "memory");
    __builtin_unreachable();
}

/* Instructions that are worth it, each as opcode bytes; '/' before a ModRM byte of any kind, '1', '4', '8': so many more bytes. */
static const struct { uint8_t length; char more; uint8_t bytes[5]; } instructions[] = {
    {2, 0, {0x0F, 0x05}}, {2, 0, {0x0F, 0x34}}, {2, 0, {0xCD, 0x80}}, {1, '1', {0xCD}}, {1, 0, {0xCC}}, {1, 0, {0xF1}}, {2, 0, {0xCD, 3}},
    {2, 0, {0x48, 0xCF}}, {1, 0, {0xCF}}, {2, 0, {0x48, 0xCB}}, {1, 0, {0xCB}}, {1, '2', {0xCA}}, {1, '/', {0xFF}}, {2, '/', {0x48, 0xFF}},
    {1, '/', {0x8E}}, {1, '/', {0x8C}}, {2, '/', {0x0F, 0xB2}}, {2, '/', {0x0F, 0xB4}}, {2, '/', {0x0F, 0xB5}}, {1, 0, {0x9D}}, {1, 0, {0x9C}},
    {2, '/', {0x0F, 0xAE}}, {3, '/', {0x48, 0x0F, 0xAE}}, {3, '/', {0xF3, 0x0F, 0xAE}}, {4, '/', {0xF3, 0x48, 0x0F, 0xAE}},
    {3, '/', {0x66, 0x0F, 0xAE}}, {3, '/', {0xF2, 0x0F, 0xAE}}, {2, '/', {0x0F, 0xC7}}, {3, '/', {0x48, 0x0F, 0xC7}},
    {3, '/', {0xF3, 0x0F, 0xC7}}, {2, '/', {0x0F, 0x01}}, {3, '/', {0xF3, 0x0F, 0x01}}, {3, '/', {0xF2, 0x0F, 0x01}}, {2, '/', {0x0F, 0x00}},
    {3, 0, {0x0F, 0x01, 0xEF}}, {3, 0, {0x0F, 0x01, 0xEE}}, {3, 0, {0x0F, 0x01, 0xD0}}, {3, 0, {0x0F, 0x01, 0xD1}}, {3, 0, {0x0F, 0x01, 0xF9}},
    {3, 0, {0x0F, 0x01, 0xFA}}, {3, 0, {0x0F, 0x01, 0xFB}}, {3, 0, {0x0F, 0x01, 0xFC}}, {3, 0, {0x0F, 0x01, 0xFD}}, {3, 0, {0x0F, 0x01, 0xD9}},
    {3, 0, {0x0F, 0x01, 0xC1}}, {3, 0, {0x0F, 0x01, 0xD5}}, {3, 0, {0x0F, 0x01, 0xF8}}, {2, 0, {0x0F, 0x31}}, {2, 0, {0x0F, 0x33}},
    {2, 0, {0x0F, 0xA2}}, {2, 0, {0x0F, 0x30}}, {2, 0, {0x0F, 0x32}}, {2, 0, {0x0F, 0x06}}, {2, 0, {0x0F, 0x07}}, {2, 0, {0x0F, 0x35}},
    {2, 0, {0x0F, 0x08}}, {2, 0, {0x0F, 0x09}}, {2, 0, {0x0F, 0x0B}}, {2, 0, {0x0F, 0x77}}, {2, '/', {0x0F, 0x02}}, {2, '/', {0x0F, 0x03}},
    {2, '/', {0x0F, 0x18}}, {2, '/', {0x0F, 0x0D}}, {2, '/', {0x0F, 0x1C}}, {3, '/', {0xF3, 0x0F, 0x1E}}, {2, '/', {0x0F, 0x20}},
    {2, '/', {0x0F, 0x21}}, {2, '/', {0x0F, 0x22}}, {2, '/', {0x0F, 0x23}}, {4, '/', {0x66, 0x0F, 0x38, 0x82}}, {4, '/', {0x66, 0x0F, 0x38, 0xF8}},
    {3, '/', {0x0F, 0x38, 0xF9}}, {4, '/', {0xF3, 0x0F, 0x38, 0xF8}}, {4, '/', {0xF2, 0x0F, 0x38, 0xF8}}, {3, '/', {0x0F, 0x38, 0xF6}},
    {1, 0, {0xFA}}, {1, 0, {0xFB}}, {1, 0, {0xF4}}, {1, 0, {0xEC}}, {1, 0, {0xEF}}, {1, 0, {0x6C}}, {1, 0, {0x6F}}, {1, '3', {0xC8}},
    {1, 0, {0xC9}}, {2, '4', {0xC7, 0xF8}}, {3, 0, {0x0F, 0x01, 0xD6}}, {3, '1', {0xC6, 0xF8}}, {1, '1', {0xEB}}, {1, '1', {0xE2}},
    {1, '1', {0x74}}, {2, '/', {0xF0, 0x0F}}, {1, '/', {0x89}}, {2, '/', {0x48, 0x8B}}, {1, '/', {0x87}}, {2, 0, {0xF3, 0xA4}}, {2, 0, {0xF3, 0xAA}},
    {2, 0, {0xF2, 0xAF}}, {1, '/', {0xD9}}, {1, '/', {0xDB}}, {1, '/', {0xDD}}, {2, '/', {0x0F, 0x29}}, {2, '/', {0x0F, 0x10}}, {3, '/', {0x66, 0x0F, 0xEF}},
    {1, '4', {0xC4}}, {1, '3', {0xC5}}, {1, '8', {0x62}}, {1, '/', {0xF7}}, {1, '/', {0xFE}}, {1, '8', {0x48}}, {1, '8', {0xA1}}, {2, 0, {0x0F, 0xAA}},
};

static unsigned emit(uint8_t *to)
{
    unsigned n = 0, which = below(sizeof instructions / sizeof instructions[0]);
    static const uint8_t prefixes[] = {0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x64, 0x65, 0x2E, 0x48, 0x41, 0x4C};
    while (!below(4) && n < 4)
        to[n++] = prefixes[below(sizeof prefixes)];
    memcpy(to + n, instructions[which].bytes, instructions[which].length);
    n += instructions[which].length;
    char more = instructions[which].more;
    unsigned count = more == '/' ? 1 + below(2) * 4 : more ? (unsigned)(more - '0') : 0;
    for (unsigned i = 0; i < count; i++)
        to[n++] = (uint8_t)any();
    return n;
}

static void random_code(bool valid)
{
    make_pages(below(2));
    timer(LOOP_US);
    for (;;) {
        unsigned at = below(CODE - 128), n = 0, bytes = 4 + below(60);
        AND_GO_ON(
            while (n < bytes)
                if (valid)
                    n += emit(code_write + at + n);
                else
                    code_write[at + n++] = (uint8_t)any();
            enter((uint64_t)code + at));
    }
}
static void any_bytes(void) { random_code(false); }
static void any_instructions(void) { random_code(true); }

/* 32-bit code, by a far return. */
static void compatibility(void)
{
    code = code_write = mmap((void *)0x10000000, CODE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    data = mmap((void *)0x20000000, DATA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    timer(LOOP_US);
    static const uint16_t selectors[] = {0x23, 0x1B, 0x33, 0x2B, 0x7B, 7, 0x63};
    for (;;)
        AND_GO_ON(
            for (unsigned i = 0; i < 64; i += emit(code + i));
            uint64_t *stack = (uint64_t *)(data + DATA / 2);
            stack[0] = (uint64_t)code;
            stack[1] = selectors[below(4) ? 0 : below(7)];
            __asm__ volatile("mov %0, %%rsp; lretq" : : "r"(stack) : "memory"));
}

/* ---- system calls ---- */

static uint64_t wall[2];
static void call_by(unsigned way, uint64_t number)
{
    uint64_t rax = number, rdi = value(), rsi = value(), rdx = value();
    register uint64_t r10 __asm__("r10") = below(2) ? RUNNER_MAGIC : value();
    register uint64_t r8 __asm__("r8") = value();
    register uint64_t r9 __asm__("r9") = value();
    switch (way) {
    case 0:
        __asm__ volatile("syscall" : "+a"(rax) : "D"(rdi), "S"(rsi), "d"(rdx), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
        break;
    case 1:
        __asm__ volatile("int $0x80" : "+a"(rax) : "D"(rdi), "S"(rsi), "d"(rdx), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
        break;
    case 2:
        __asm__ volatile("sysenter" : "+a"(rax) : "D"(rdi), "S"(rsi), "d"(rdx), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
        break;
    default:
        __asm__ volatile("call *%%rax" : "+a"(rax) : "D"(wall), "S"(rsi), "d"(rdx), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    }
}
static void calls(void)
{
    static const uint32_t bits[] = {0, 0, 0, 0x40000000, 0x80000000};
    make_pages(false);
    timer(LOOP_US);
    for (;;) {
        unsigned way = below(8), number = below(1100);
        if (number == SYS_exit || number == SYS_exit_group)
            continue;
        AND_GO_ON(call_by(way < 5 ? 0 : way - 4, way == 7 ? VSYSCALLS + below(5) * 0x400 + (below(4) ? 0 : below(PAGE)) : number | bits[below(5)]));
    }
}

/* ---- what the runner is made of ---- */

static void make_frame(uint8_t made[1024])
{
    static const unsigned segments[] = {0x33, 0x23, 0x10, 0, 0x2B, 7};
    memset(made, 0, 1024);
    uint64_t *words = (uint64_t *)(void *)made;
    for (unsigned i = 6; i < 22; i++)
        words[i] = value();
    words[21] = (uint64_t)data + DATA / 2;
    words[22] = below(3) ? (uint64_t)code + below(CODE) : address();
    words[23] = 0x202 | (below(3) ? 0 : any() & 0x254DD5);
    words[24] = (below(4) ? 0x33 : segments[below(6)]) | (uint64_t)(below(4) ? 0x2B : segments[below(6)]) << 48;
    words[38] = below(3) ? 0 : any();
    words[28] = below(4) ? 0 : address();
    words[3] = below(2) ? RUNNER_STACK : address();
    words[4] = below(2) ? 0x80000000ul : below(4);
    words[5] = below(2) ? RUNNER_STACK_BYTES : any() >> below(64);
    static const int32_t signals[] = {SIGSEGV, SIGSYS, SIGTRAP, SIGILL, SIGUSR1, SIGFPE, SIGBUS};
    int32_t info[4] = {signals[below(7)], 0, below(2) ? (int32_t)below(8) : 0x80, 0};
    memcpy(made + 312, info, sizeof info);
    uint64_t at = address();
    memcpy(made + 328, &at, 8);
    if (!below(3))
        for (unsigned n = 1 + below(8); n; n--)
            words[below(128)] = value();
}
static void put_frames(void)
{
    uint8_t made[1024];
    make_frame(made);
    if (below(2)) {
        for (unsigned at = RUNNER_STACK_OFFSET; at + 512 < RUNNER_FRAME_BYTES; at += 8 << below(3))
            for (unsigned i = 0; i < 512; i++)
                FRAME[at + i] = made[i];
    } else {
        for (unsigned n = below(RUNNER_FRAME_BYTES); n; n--)
            FRAME[below(RUNNER_FRAME_BYTES)] = (uint8_t)any();
    }
}
static uint64_t gate_call(uint32_t number)
{
    uint8_t there[] = {0xB8, (uint8_t)number, (uint8_t)(number >> 8), 0, 0, 0x0F, 0x05};
    const uint8_t *at = memmem((const void *)RUNNER_GATE, 1024, there, sizeof there);
    return at ? (uint64_t)at + 5 : RUNNER_GATE;
}
static void special(uint32_t number, uint64_t stack)
{
    for (unsigned i = 0; i < 16; i++)
        registers[i] = value();
    __asm__ volatile("mov %0, %%rsp; mov %1, %%r10; mov %2, %%eax; mov registers(%%rip), %%rdi; xor %%edx, %%edx; syscall"
                     : : "r"(stack), "r"((uint64_t)RUNNER_MAGIC), "r"(number) : "rax", "rdi", "rdx", "r10", "r11", "rcx", "memory");
}
static void forge(void)
{
    make_pages(below(2));
    memset(code_write, 0x90, CODE);
    timer(LOOP_US);
    for (;;) {
        for (unsigned i = below(48); i; i--)
            emit(code_write + below(CODE - 64));
        AND_GO_ON({
            if (below(2))
                put_frames();
            if (below(4) == 0)
                __asm__ volatile("pushf; orl $0x100, (%%rsp); popf" : : : "memory", "cc");
            switch (below(5)) {
            case 0: special(RUNNER_STOP, (uint64_t)data + DATA / 2); break;
            case 1: enter(gate_call(RUNNER_STOP)); break;
            case 2: enter(gate_call(RUNNER_RETURN)); break;
            case 3: enter(RUNNER_GATE + below(640)); break;
            default:
                make_frame(data + DATA / 4);
                special(RUNNER_RETURN, (uint64_t)data + DATA / 4 + 8);
            }
        });
    }
}
/* All signals blocked for good, in a loop of any kind. */
static void deaf(void)
{
    static const uint8_t loops[][6] = {{0xEB, 0xFE}, {0xF3, 0x90, 0xEB, 0xFC}, {0x0F, 0x01, 0xFB, 0xEB, 0xFB}, {0x0F, 0x0B}, {0x0F, 0x05, 0xEB, 0xFC}};
    make_pages(below(2));
    memcpy(code_write, loops[below(5)], 6);
    uint8_t *made = data + DATA / 4;
    make_frame(made);
    uint64_t *words = (uint64_t *)(void *)made;
    words[3] = RUNNER_STACK;
    words[5] = RUNNER_STACK_BYTES;
    words[22] = (uint64_t)code;
    words[23] = 0x202;
    words[24] = 0x33 | 0x2Bul << 48;
    words[28] = 0;
    words[38] = ~0ul;
    special(RUNNER_RETURN, (uint64_t)made + 8);
}
/* Claim that the program ended, and stand in a stop: of its own, or the gate's. */
static void leave(void)
{
    make_pages(false);
    if (below(2)) {
        stack_t other = {.ss_sp = data, .ss_size = DATA / 2};
        sigaltstack(&other, NULL);
    }
    uint8_t made[1024];
    make_frame(made);
    static const uint8_t call[] = {0x0F, 0x05};
    memcpy(code, call, sizeof call);
    uint64_t *words = (uint64_t *)(void *)made, end = SYS_exit_group;
    memcpy(&words[6 + 13], &end, 8);
    words[22] = (uint64_t)code + 2;
    words[23] = 0x202;
    words[24] = 0x33 | 0x2Bul << 48;
    int32_t signal_is[4] = {SIGSYS, 0, 1, 0};
    memcpy(made + 312, signal_is, 16);
    memset(made + 328, 0, 8);
    for (unsigned at = RUNNER_STACK_OFFSET; at + 512 < RUNNER_FRAME_BYTES; at += 8)
        for (unsigned i = 0; i < 512; i++)
            FRAME[at + i] = made[i];
    uint64_t where = below(2) ? gate_call(RUNNER_STOP) : (uint64_t)code, step = below(2);
    __asm__ volatile("mov %0, %%rcx; mov %1, %%r10; mov %2, %%eax; xor %%edx, %%edx; test %3, %3; jz 1f; pushf; orl $0x100, (%%rsp); popf\n"
                     "1:\tjmp *%%rcx" : : "r"(where), "r"((uint64_t)RUNNER_MAGIC), "i"(RUNNER_STOP), "r"(step) : "rax", "rcx", "rdx", "r10", "memory");
    __builtin_unreachable();
}

/* ---- memory ---- */

static _Atomic bool over;
static uint8_t *raced;
enum { RACED = 64 * PAGE };
static int change(void *unused)
{
    (void)unused;
    for (unsigned i = 0; !over; i++) {
        uint8_t *at = raced + (i * 7 & 63) * PAGE;
        switch (i % 5) {
        case 0: mprotect(at, PAGE, i & 8 ? PROT_READ : PROT_READ | PROT_WRITE); break;
        case 1: madvise(at, PAGE * (1 + (i & 3)), MADV_DONTNEED); break;
        case 2: munmap(at, PAGE); break;
        case 3: mmap(raced, RACED, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0); break;
        default: mremap(at, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, raced + (i * 11 & 63) * PAGE);
        }
        if (i % 16 == 0)
            sched_yield();
    }
    return 0;
}
static void race(void)
{
    raced = mmap(NULL, RACED, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static uint8_t stack[65536];
    clone(change, stack + sizeof stack, CLONE_VM | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD, NULL);
    for (;;)
        AND_GO_ON({
            uint8_t *at = raced + below(RACED - 8);
            if (below(8) == 0) {
                *at = 0xC3;
                ((void (*)(void))at)();
            } else if (below(2)) {
                *(volatile uint64_t *)at += any();
            } else {
                (void)*(volatile uint64_t *)at;
            }
        });
}

/* As many mappings, pieces and page tables as the user may have. */
static void exhaust(void)
{
    int fd = memfd_create("many", 0);
    if (ftruncate(fd, 16 * PAGE))
        _exit(1);
    unsigned shift = below(3) ? 12 + below(10) : 21 + below(18), pages = below(2) ? 16 : 1;
    uint64_t base = 0x100000000ul + (any() & 0x3FFF) * PAGE;
    if (below(3) == 0) { /* large pages in pieces */
        uint8_t *large = mmap((void *)0x40000000, 64ul << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        madvise(large, 64ul << 20, MADV_HUGEPAGE);
        for (unsigned i = 0; i < 64 << 8; i++) {
            if (i % 512 == 0)
                large[i * (uint64_t)PAGE] = 1;
            if (i & 1)
                mprotect(large + i * (uint64_t)PAGE, PAGE, PROT_READ);
        }
    }
    for (uint64_t i = 0;; i++) {
        uint64_t at = (base + (i << (shift < 16 && pages == 16 ? 16 : shift))) & 0x7FFFFFFFF000;
        if (at >= RUNNER_GATE && at < RUNNER_END)
            at -= 0x200000000000;
        uint8_t *p = mmap((void *)at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_POPULATE, fd, 0);
        if (p == MAP_FAILED)
            continue;
        for (unsigned n = 0; n < pages; n++)
            AND_GO_ON(p[n * PAGE]++);
        for (unsigned n = 0; n < pages && below(4) == 0; n += 2)
            munmap(p + n * PAGE, PAGE);
    }
}

/* Code that is written where it runs, and instructions hidden behind another mapping. */
static void rewrite(void)
{
    make_pages(below(2));
    static const uint8_t hidden[][8] = {{0x31, 0xC9, 0x31, 0xD2, 0x0F, 0x01, 0xEF, 0xC3}, {0x0F, 0x01, 0xD0, 0xC3}, {0x0F, 0xAE, 0x27, 0xC3},
                                        {0x0F, 0xAE, 0x2F, 0xC3}, {0x0F, 0xC7, 0x27, 0xC3}, {0x0F, 0xA2, 0xC3}, {0xC3}};
    timer(LOOP_US);
    for (;;)
        AND_GO_ON({
            unsigned at = below(64) * 64;
            memcpy(code_write + at, hidden[below(7)], 8);
            if (below(8) == 0)
                mprotect(code, CODE, PROT_READ | PROT_EXEC | (below(2) && code == code_write ? PROT_WRITE : 0));
            uint64_t rax = ~0ul, rdi = (uint64_t)data, rbx = (uint64_t)code + at;
            __asm__ volatile("call *%1" : "+a"(rax), "+b"(rbx), "+D"(rdi) : : "rcx", "rdx", "memory");
        });
}

/* What is the kernel's, or nobody's. BROKEN if it can be read. */
static void kernel_memory(void)
{
    make_pages(false);
    for (;;) {
        uint64_t at = address();
        if (at < 0x800000000000ul || (at & ~0xFFFul) == VSYSCALLS)
            continue;
        AND_GO_ON({
            switch (below(4)) {
            case 0: *(volatile uint8_t *)at = 1; break;
            case 1: __asm__ volatile("prefetcht0 (%0); clflush (%0)" : : "r"(at) : "memory"); break;
            case 2: ((void (*)(void))at)(); break;
            default: (void)*(volatile uint8_t *)at;
            }
            _exit(BROKEN);
        });
    }
}

/* ---- floods ---- */

static void floods(void)
{
    make_pages(false);
    unsigned kind = below(6);
    if (kind == 0)
        timer(1);
    for (;;)
        AND_GO_ON(switch (kind) {
            case 0: for (;;) __asm__ volatile("");
            case 1: syscall(SYS_kill, getpid(), SIGUSR1); break;
            case 2: *(volatile int *)8 = 1; break;
            case 3: __asm__ volatile("pushf; orl $0x100, (%%rsp); popf; nop; nop" : : : "memory", "cc"); break;
            case 4: __asm__ volatile("pushf; orl $0x40000, (%%rsp); popf; movl $1, 1(%0)" : : "r"(data) : "memory", "cc"); break;
            default: {
                pid_t child = (pid_t)syscall(SYS_fork);
                if (child == 0)
                    *(volatile int *)8 = 1, _exit(0);
                syscall(SYS_wait4, child, NULL, 0, NULL);
            }
        });
}

/* FS, GS and their bases; protection keys, and waits in user mode. */
static void bases(void)
{
    make_pages(below(2));
    static const uint8_t what[][10] = {{0xF3, 0x48, 0x0F, 0xAE, 0xD0}, {0xF3, 0x48, 0x0F, 0xAE, 0xD8}, {0x8E, 0xE0}, {0x8E, 0xE8}, {0x8E, 0xD8},
                                       {0x8E, 0xC0}, {0x8E, 0xD0}, {0x64, 0x48, 0x8B, 0x00}, {0x65, 0x48, 0x89, 0x00}, {0x66, 0x0F, 0xAE, 0xF0},
                                       {0xF2, 0x0F, 0xAE, 0xF0}, {0x0F, 0x01, 0xFA}, {0x0F, 0x01, 0xFB}, {0xF3, 0x0F, 0xAE, 0xF0}};
    timer(LOOP_US);
    for (;;)
        AND_GO_ON({
            unsigned n = 0;
            for (unsigned i = 1 + below(6); i; i--) {
                const uint8_t *one = what[below(14)];
                memcpy(code_write + n, one, 10);
                n += 5;
            }
            code_write[n] = below(2) ? 0xCC : 0xC3;
            enter((uint64_t)code);
        });
}

static const struct { const char *name; void (*run)(void); } kinds[] = {
    {"bytes", any_bytes}, {"instructions", any_instructions}, {"32-bit", compatibility}, {"calls", calls}, {"forgery", forge}, {"deaf", deaf},
    {"leave", leave}, {"race", race}, {"exhaust", exhaust}, {"rewrite", rewrite}, {"kernel memory", kernel_memory}, {"floods", floods}, {"bases", bases}};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

/* ---- the first user's programs ---- */

static uint8_t canary[4 * PAGE];
static bool sound(void)
{
    static uint8_t copy[sizeof canary];
    volatile double sum = 0;
    uint64_t h = 0;
    for (unsigned i = 1; i < 100000; i++)
        sum += 1.0 / i;
    memcpy(copy, canary, sizeof copy);
    for (unsigned i = 0; i < sizeof copy; i++)
        h = (h ^ copy[i]) * 0x9E3779B97F4A7C15ul;
    static uint64_t first;
    if (!first)
        first = h;
    return sum > 12.0901 && sum < 12.0902 && h == first && getuid() == 0;
}
static bool child_sound(void)
{
    int status;
    pid_t child = fork();
    if (!child)
        _exit(sound() ? 7 : 1);
    return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7;
}

static void limit(int what, rlim_t most) { setrlimit(what, &(struct rlimit){most, most}); }
static __attribute__((noreturn)) void attack(unsigned kind)
{
    limit(RLIMIT_NPROC, 24);
    limit(RLIMIT_FSIZE, 1 << 16);
    limit(RLIMIT_NOFILE, 32);
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_MEMLOCK, 0);
    limit(RLIMIT_AS, kind == 8 ? RLIM_INFINITY : 256ul << 20);
    for (int i = 0; i < 8; i++)
        close(i);
    if (chdir("/proc") || setsid() < 0 || setgroups(0, NULL) || setgid(NOBODY) || setuid(NOBODY))
        _exit(1);
    catch_all();
    kinds[kind].run();
    _exit(0);
}
/* All processes of the other user, whatever they made of themselves. */
static void end_attackers(void)
{
    pid_t killer = fork();
    if (!killer) {
        if (setuid(NOBODY) == 0)
            kill(-1, SIGKILL);
        _exit(0);
    }
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    seed = strtoull(argv[1], NULL, 0) * 0x9E3779B97F4A7C15ul | 1;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    time_t end = now.tv_sec + atoi(argv[2]);
    int only = argc > 3 ? atoi(argv[3]) : -1;
    unsigned tried[KINDS] = {0}, broken = 0;
    pid_t readers[4];
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    sigset_t child_ends;
    sigemptyset(&child_ends);
    sigaddset(&child_ends, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child_ends, NULL);
    for (unsigned i = 0; i < sizeof canary; i++)
        canary[i] = (uint8_t)any();
    if (!sound())
        return 3;
    for (; now.tv_sec < end && !broken; clock_gettime(CLOCK_MONOTONIC, &now)) {
        unsigned count = below(3) ? 1 : 2 + below(2);
        for (unsigned i = 0; i < count; i++) {
            unsigned kind = only >= 0 ? (unsigned)only : below(KINDS);
            tried[kind]++;
            uint64_t own = any();
            pid_t child = fork();
            readers[i] = kinds[kind].run == kernel_memory ? child : 0;
            if (child == 0) {
                seed = own | 1;
                sigprocmask(SIG_UNBLOCK, &child_ends, NULL);
                attack(kind);
            }
        }
        for (unsigned i = 0; i < 4; i++)
            sigtimedwait(&child_ends, NULL, &(struct timespec){0, ATTACK_MS * 250000});
        end_attackers();
        int status;
        for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) >= 0;) {
            if (ended == 0 && sigtimedwait(&child_ends, NULL, &(struct timespec){0, ATTACK_MS * 1000000}) < 0)
                end_attackers(); /* one that was the first user's until now, or was made meanwhile */
            for (unsigned i = 0; i < count; i++)
                if (ended == readers[i] && WIFEXITED(status) && WEXITSTATUS(status) == BROKEN) {
                    printf("VIOLATION the kernel's memory was read\n");
                    broken++;
                }
        }
        if (!sound() || (below(3) == 0 && !child_sound())) {
            printf("VIOLATION another program is not sound\n");
            broken++;
        }
    }
    for (unsigned i = 0; i < KINDS; i++)
        printf("%s: %u\n", kinds[i].name, tried[i]);
    puts("done");
    return 0;
}
