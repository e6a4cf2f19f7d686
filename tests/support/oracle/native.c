/* One instruction on the host's processor: a signal handler loads the state (sigreturn), the trap or fault after it
 * brings it back. The code pages hold INT3 all around the instruction. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "oracle.h"

static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
enum { XSTATE_MAGIC1 = 0x46505853, SW_RESERVED = 464, FX_DEFINED = 416, XSAVE_HEADER = 512, YMM_HIGH = 576, YMM = 4 };

static volatile enum { IDLE, ENTERING, RUNNING } phase;
static const struct insn *current;
static struct cpu_state *current_state;
static gregset_t saved;
static uint8_t saved_fx[FX_DEFINED], saved_high[16][16];
static uint8_t *code;

/* Whether the frame has upper halves of YMM registers. */
static bool has_high(const uint8_t *fp)
{
    uint32_t magic;
    uint64_t features;
    memcpy(&magic, fp + SW_RESERVED, 4);
    memcpy(&features, fp + SW_RESERVED + 8, 8);
    return magic == XSTATE_MAGIC1 && (features & YMM);
}

static void copy_fx(ucontext_t *u, const uint8_t *fx, const uint8_t (*high)[16])
{
    uint8_t *fp = (uint8_t *)u->uc_mcontext.fpregs;
    uint32_t magic;
    memcpy(fp, fx, FX_DEFINED);
    memcpy(&magic, fp + SW_RESERVED, 4);
    if (magic == XSTATE_MAGIC1)
        fp[XSAVE_HEADER] |= 3;
    if (has_high(fp)) {
        memcpy(fp + YMM_HIGH, high, 256);
        fp[XSAVE_HEADER] |= YMM;
    }
}

static void read_fx(const ucontext_t *u, uint8_t *fx, uint8_t (*high)[16])
{
    const uint8_t *fp = (const uint8_t *)u->uc_mcontext.fpregs;
    memcpy(fx, fp, FX_DEFINED);
    memset(high, 0, 256);
    if (has_high(fp) && (fp[XSAVE_HEADER] & YMM))
        memcpy(high, fp + YMM_HIGH, 256);
}

static void handler(int signal, siginfo_t *info, void *context)
{
    (void)info;
    /* POPF may have set AC, which a handler inherits. */
    __builtin_ia32_writeeflags_u64(__builtin_ia32_readeflags_u64() & ~0x40000ull);
    ucontext_t *u = context;
    greg_t *g = u->uc_mcontext.gregs;
    struct cpu_state *s = current_state;
    if (phase == ENTERING) {
        phase = RUNNING;
        memcpy(saved, g, sizeof saved);
        read_fx(u, saved_fx, saved_high);
        for (unsigned i = 0; i < 16; i++)
            g[order[i]] = (greg_t)s->gpr[i];
        g[REG_RIP] = (greg_t)s->rip;
        g[REG_EFL] = (greg_t)s->rflags;
        if (current->mode32)
            g[REG_CSGSFS] = (g[REG_CSGSFS] & ~0xFFFFll) | 0x23;
        copy_fx(u, s->fx, s->high);
        return;
    }
    if (signal == SIGALRM || phase != RUNNING) {
        static const char hang[] = "oracle: an instruction does not end on the host: ", crash[] = "oracle: crash after: ";
        if (signal == SIGALRM)
            (void)!write(2, hang, sizeof hang - 1);
        else
            (void)!write(2, crash, sizeof crash - 1);
        for (unsigned i = 0; i < current->length; i++) {
            char hex[4];
            snprintf(hex, sizeof hex, "%02x ", current->bytes[i]);
            (void)!write(2, hex, 3);
        }
        _exit(3);
    }
    phase = IDLE;
    for (unsigned i = 0; i < 16; i++)
        s->gpr[i] = (uint64_t)g[order[i]];
    s->rip = (uint64_t)g[REG_RIP];
    s->rflags = (uint64_t)g[REG_EFL];
    read_fx(u, s->fx, s->high);
    s->vector = (uint32_t)g[REG_TRAPNO];
    s->error = (uint32_t)g[REG_ERR];
    s->cr2 = s->vector == 14 ? (uint64_t)g[REG_CR2] : 0;
    memcpy(g, saved, sizeof saved);
    copy_fx(u, saved_fx, saved_high);
}

static void *map_at(uintptr_t address, size_t size, int rights)
{
    void *p = mmap((void *)address, size, rights, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_POPULATE, -1, 0);
    if (p != (void *)address) {
        perror("oracle: mmap");
        exit(3);
    }
    return p;
}

void native_init(void)
{
    code = map_at(CODE_BASE, CODE_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC);
    map_at(DATA_BASE, DATA_SIZE, PROT_READ | PROT_WRITE);
    map_at(STACK_BASE, STACK_SIZE, PROT_READ | PROT_WRITE);
    static uint8_t stack[65536] __attribute__((aligned(64)));
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alternate, NULL);
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    static const int signals[] = {SIGUSR1, SIGTRAP, SIGSEGV, SIGILL, SIGBUS, SIGFPE, SIGALRM};
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
        sigaction(signals[i], &action, NULL);
    /* 32-bit code needs usable data segments; 64-bit code does not look at them. */
    asm volatile("movw %0, %%ds; movw %0, %%es" : : "r"((uint16_t)0x2B));
}

void native_run(const struct insn *insn, struct cpu_state *state, struct memory *memory)
{
    uint8_t *data = (uint8_t *)(uintptr_t)DATA_BASE, *stack = (uint8_t *)(uintptr_t)STACK_BASE;
    /* The read-only page has the same contents for every case of a batch: see fill_memory(). */
    memcpy(data, memory->data, DATA_WRITABLE);
    if (memcmp(data + DATA_WRITABLE, memory->data + DATA_WRITABLE, DATA_SIZE - DATA_WRITABLE) != 0) {
        mprotect(data + DATA_WRITABLE, DATA_SIZE - DATA_WRITABLE, PROT_READ | PROT_WRITE);
        memcpy(data + DATA_WRITABLE, memory->data + DATA_WRITABLE, DATA_SIZE - DATA_WRITABLE);
        mprotect(data + DATA_WRITABLE, DATA_SIZE - DATA_WRITABLE, PROT_READ);
    }
    memcpy(stack, memory->stack, STACK_SIZE);
    memset(code, 0xCC, CODE_SIZE);
    memcpy(code + insn->offset, insn->bytes, insn->length);
    current = insn;
    current_state = state;
    state->rip = CODE_BASE + insn->offset;
    phase = ENTERING;
    alarm(20);
    raise(SIGUSR1);
    alarm(0);
    memcpy(memory->data, data, DATA_WRITABLE);
    memcpy(memory->stack, stack, STACK_SIZE);
}
