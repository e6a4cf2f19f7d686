/* A stretch of native execution: the vCPU's state into the guest half, and back when it stopped; what the stop means.
 *
 * What comes back are registers of a process that guest code ran in. Each is a value that the guest's program could have put
 * there itself, after the masks below; nothing of it is used as an address on the host.
 */
#define _GNU_SOURCE
#include "soft/direct/internal.h"

#include <errno.h>
#include <linux/ptrace.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { USER_CS = 0x33, USER_DS = 0x2B, SYSCALL_BYTES = 2, SI_KERNEL_CODE = 0x80, TRAP_BREAKPOINT = 1 };
/* What code at CPL 3 can change with IOPL 0. */
#define F_USER (F_ARITH | F_TF | F_DF | F_NT | F_AC | F_ID)
#define MXCSR_BITS 0xFFFFu
enum { SLICE_DOUBLINGS = 10 };
#define LONGEST_NS 20000000ull
#define SHARE_NS 500000ull
#define STRETCH_MAX 100000ull /* that one long stretch does not pay for many short ones */

static long trace(long request, pid_t pid, void *data) { return syscall(SYS_ptrace, request, pid, 0, data); }

bool trip_possible(const struct soft_vcpu *c)
{
    static const unsigned null[] = {SEG_DS, SEG_ES, SEG_FS, SEG_GS};
    if (c->cpl != 3 || !c->code64 || c->align_check || c->mmu.watching || c->caller.count || c->caller.active ||
        c->caller.trace || c->caller.step || c->caller.int3 || c->parked || c->replay.retry || c->pending_valid)
        return false;
    if ((c->rflags & (F_IF | F_IOPL | F_TF | F_ID | F_VM)) != F_IF || (c->dr[7] & 0xFF) || c->in_exception)
        return false;
    if ((c->cr0 & (CR0_TS | CR0_EM | CR0_NE)) != CR0_NE || !(c->cr4 & CR4_OSFXSR) || !(c->cr4 & CR4_OSXMMEXCPT))
        return false;
    if (c->seg[SEG_CS].selector != USER_CS || c->seg[SEG_SS].selector != USER_DS)
        return false;
    for (unsigned i = 0; i < 4; i++)
        if (c->seg[null[i]].selector)
            return false;
    return c->rip < RUNNER_END && soft_canonical(c->seg[SEG_FS].base) && soft_canonical(c->seg[SEG_GS].base) &&
           c->seg[SEG_FS].base < RUNNER_END && c->seg[SEG_GS].base < RUNNER_END;
}

/* ---- state ---- */

static const size_t places[16] = {
    [RAX] = offsetof(struct user_regs_struct, rax), [RCX] = offsetof(struct user_regs_struct, rcx),
    [RDX] = offsetof(struct user_regs_struct, rdx), [RBX] = offsetof(struct user_regs_struct, rbx),
    [RSP] = offsetof(struct user_regs_struct, rsp), [RBP] = offsetof(struct user_regs_struct, rbp),
    [RSI] = offsetof(struct user_regs_struct, rsi), [RDI] = offsetof(struct user_regs_struct, rdi),
    [R8] = offsetof(struct user_regs_struct, r8), [R9] = offsetof(struct user_regs_struct, r9),
    [R10] = offsetof(struct user_regs_struct, r10), [R11] = offsetof(struct user_regs_struct, r11),
    [R12] = offsetof(struct user_regs_struct, r12), [R13] = offsetof(struct user_regs_struct, r13),
    [R14] = offsetof(struct user_regs_struct, r14), [R15] = offsetof(struct user_regs_struct, r15),
};

static bool load(struct soft_vcpu *c, struct runner *r)
{
    struct user_regs_struct *to = &r->regs;
    for (unsigned i = 0; i < 16; i++)
        memcpy((char *)to + places[i], &c->gpr[i], 8);
    to->rip = c->rip;
    to->eflags = soft_flags(c) & ~F_RF; /* there is no breakpoint that it could hold back */
    to->cs = USER_CS;
    to->ss = USER_DS;
    to->ds = to->es = to->fs = to->gs = 0;
    to->fs_base = c->seg[SEG_FS].base;
    to->gs_base = c->seg[SEG_GS].base;
    to->orig_rax = (unsigned long long)-1; /* no system call to be begun again */
    if (trace(PTRACE_SETREGS, r->guest, to) < 0)
        return false;
    fpu_collect(&c->fpu);
    struct fpu compare = c->fpu;
    compare.x87_ready = r->fpu.x87_ready;
    if (r->fp_known && !memcmp(&compare, &r->fpu, sizeof compare))
        return true;
    struct user_fpregs_struct image = r->fp;
    fpu_fxsave(&c->fpu, (uint8_t *)&image, true, true);
    r->fp_known = false;
    if (trace(PTRACE_SETFPREGS, r->guest, &image) < 0)
        return false;
    r->fp = image;
    r->fpu = c->fpu;
    r->fp_known = true;
    return true;
}

static bool store(struct soft_vcpu *c, struct runner *r)
{
    const struct user_regs_struct *from = &r->regs;
    struct user_fpregs_struct image;
    if (trace(PTRACE_GETREGS, r->guest, &r->regs) < 0 || trace(PTRACE_GETFPREGS, r->guest, &image) < 0)
        return false;
    for (unsigned i = 0; i < 16; i++)
        memcpy(&c->gpr[i], (const char *)from + places[i], 8);
    c->rip = from->rip;
    soft_set_flags(c, ((uint32_t)from->eflags & F_USER) | (soft_flags(c) & ~(F_USER | F_RF)));
    c->seg[SEG_FS].base = from->fs_base;
    c->seg[SEG_GS].base = from->gs_base;
    if (!r->fp_known || memcmp(&image, &r->fp, sizeof image)) {
        r->fp = image;
        image.mxcsr &= MXCSR_BITS;
        fpu_fxrstor(&c->fpu, (const uint8_t *)&image, true, true);
        r->fpu = c->fpu;
        r->fp_known = true;
    }
    return true;
}

bool trip_clean(struct runner *r)
{
    static const size_t header = 512;
    uint8_t image[16384] __attribute__((aligned(64)));
    struct iovec area = {image, sizeof image};
    memset(image, 0, sizeof image);
    r->fp_known = false;
    if (syscall(SYS_ptrace, PTRACE_GETREGSET, r->guest, 0x202 /* NT_X86_XSTATE */, &area) < 0 || area.iov_len < header + 64)
        return false;
    memset(image + header, 0, 8); /* XSTATE_BV: every component as it is at first */
    return syscall(SYS_ptrace, PTRACE_SETREGSET, r->guest, 0x202, &area) >= 0 && !(r->regs.eflags & F_ID);
}

/* The guest loaded a segment register natively: the host's descriptors are flat ones, as in Linux; the guest's own decide what it
 * has now. */
static void take_segments(struct soft_vcpu *c, const struct user_regs_struct *regs)
{
    const struct { unsigned seg; uint64_t selector; } data[] = {
        {SEG_DS, regs->ds}, {SEG_ES, regs->es}, {SEG_FS, regs->fs}, {SEG_GS, regs->gs}};
    soft_mode_changed(c);
    for (unsigned i = 0; i < 4; i++) {
        if (!(uint16_t)data[i].selector)
            continue;
        uint64_t base = c->seg[data[i].seg].base;
        soft_load_seg(c, data[i].seg, (uint16_t)data[i].selector);
        if (data[i].seg == SEG_FS || data[i].seg == SEG_GS)
            c->seg[data[i].seg].base = base;
    }
    if ((uint16_t)regs->ss != USER_DS)
        soft_load_seg(c, SEG_SS, (uint16_t)regs->ss);
    if ((uint16_t)regs->cs != USER_CS) {
        struct descriptor d;
        uint16_t selector = (uint16_t)regs->cs;
        if (!soft_fetch_descriptor(c, selector, false, &d) || !descriptor_s(&d) || !descriptor_present(&d) ||
            !(descriptor_type(&d) & TYPE_CODE) || descriptor_dpl(&d) != 3 || (selector & 3) != 3)
            soft_raise_error(c, VEC_GP, 0);
        soft_set_cs(c, selector, 3, &d);
        soft_mode_changed(c);
    }
}

static bool segments_changed(const struct user_regs_struct *regs)
{
    return regs->cs != USER_CS || regs->ss != USER_DS || regs->ds || regs->es || regs->fs || regs->gs;
}

/* ---- stops ---- */

static void pend(struct direct_vcpu *d, struct runner *r, uint64_t linear, bool executed)
{
    if (d->pending_for != r)
        d->pending_count = 0;
    d->pending_for = r;
    if (d->pending_count < PENDING)
        d->pending[d->pending_count++] = (linear & PAGE_MASK) | executed;
}

/* Execute the instruction at c->rip in the core, where it faults, or does what it does. */
static void in_core(struct soft_vcpu *c)
{
    soft_step(c);
}

/* A fault at an address: a page that the runner has not, or not so, or a fault of the guest's. */
static enum trip page_stop(struct soft_vcpu *c, struct runner *r, uint64_t linear)
{
    bool executed = (linear & PAGE_MASK) == (c->rip & PAGE_MASK) || (linear & PAGE_MASK) == ((c->rip + 14) & PAGE_MASK);
    executed = executed && !pages_have(r, linear, PAGE_X);
    bool scanned_out = executed && pages_have(r, linear, PAGE_R);
    pend(c->direct, r, linear, executed);
    int64_t slice = 0;
    if (scanned_out) { /* its code stays in the core: the longer the more often it comes there */
        uint8_t *often = &region_of(r, linear)->in_core[linear >> 12 & 511];
        slice = (int64_t)c->vm->direct->page_slice << *often;
        *often += *often < SLICE_DOUBLINGS;
    }
    in_core(c);
    c->direct->slice = slice;
    return slice ? TRIP_CORE : TRIP_NATIVE;
}

/* A vsyscall address was called, and the host's kernel returned from it already: the core calls it. */
static void undo_vsyscall(struct soft_vcpu *c, uint64_t called)
{
    c->rip = called;
    c->gpr[RSP] -= 8;
}

static enum trip signal_stop(struct soft_vcpu *c, struct runner *r, int signal)
{
    siginfo_t info;
    if (trace(PTRACE_GETSIGINFO, r->guest, &info) < 0)
        return TRIP_LOST;
    switch (signal) {
    case SIGSEGV:
    case SIGBUS:
        if (info.si_code != SI_KERNEL_CODE && info.si_code > 0 && signal == SIGSEGV)
            return page_stop(c, r, (uint64_t)(uintptr_t)info.si_addr);
        in_core(c);
        return TRIP_NATIVE;
    case SIGILL:
    case SIGFPE:
        in_core(c);
        return TRIP_NATIVE;
    case SIGSYS:
        undo_vsyscall(c, (uint64_t)(uintptr_t)info.si_call_addr);
        in_core(c);
        return TRIP_NATIVE;
    case SIGTRAP:
        if (c->rflags & F_TF) { /* a single step of the guest's own ended */
            c->dr[6] |= DR6_BS;
            soft_raise(c, VEC_DB);
        }
        c->rip--; /* INT3 and INT1 trap behind themselves */
        in_core(c);
        return TRIP_NATIVE;
    default: /* a kick, or somebody's signal to the process: nothing of the guest's */
        return TRIP_CORE;
    }
}

static enum trip after_stop(struct soft_vcpu *c, struct runner *r, int status)
{
    int signal = WSTOPSIG(status);
    bool system_call = signal == (SIGTRAP | 0x80);
    if (system_call) { /* back to the instruction: the core executes it */
        c->gpr[RAX] = r->regs.orig_rax;
        c->rip -= SYSCALL_BYTES;
    }
    if (segments_changed(&r->regs)) {
        if (signal == SIGTRAP && !(c->rflags & F_TF))
            c->rip--;
        c->direct->slice = c->vm->direct->page_slice;
        take_segments(c, &r->regs);
        soft_system_flags_changed(c);
        return TRIP_CORE;
    }
    soft_mode_changed(c);
    if (system_call) {
        in_core(c);
        return c->cpl == 3 ? TRIP_NATIVE : TRIP_CORE;
    }
    enum trip result = signal_stop(c, r, signal);
    soft_system_flags_changed(c);
    return result;
}

/* When the stretch has to end: at the next timer event, or sooner so that others have their turn. */
static uint64_t deadline_of(struct soft_vcpu *c, uint64_t now)
{
    struct soft_vm *vm = c->vm;
    uint64_t at = c->turn_limit_ns, limit = vm->config.vcpus > 1 ? SHARE_NS : LONGEST_NS;
    uint64_t end = at > UINT64_MAX - vm->start_ns ? UINT64_MAX : at + vm->start_ns;
    return end < now + limit ? end : now + limit;
}

/* What the guest half has used of a processor: a busy host's waiting does not count. */
static uint64_t guest_time(pid_t pid)
{
    struct timespec t = {0};
    clock_gettime((clockid_t)(~(unsigned)pid << 3 | 2), &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

enum trip trip_run(struct soft_vcpu *c, struct runner *r)
{
    struct direct_vcpu *d = c->direct;
    struct soft_vm *vm = c->vm;
    if (!load(c, r))
        return TRIP_LOST;
    uint64_t began = soft_host_now();
    kick_before(vm, d, r->guest, deadline_of(c, began));
    if (__atomic_load_n(&c->attention, __ATOMIC_SEQ_CST)) {
        kick_after(d);
        return TRIP_CORE;
    }
    c->shadow = 0; /* of an STI or MOV SS that is past */
    int status = runner_resume(r);
    kick_after(d);
    uint64_t ns = soft_host_now() - began, used = guest_time(r->guest), worked = used - r->used_ns;
    r->used_ns = used;
    if (worked < vm->direct->floor_ns)
        vm->direct->floor_ns = worked;
    worked -= vm->direct->floor_ns;
    d->native_ns += worked;
    d->native_stops++;
    r->average_ns = (uint64_t)((int64_t)r->average_ns + ((int64_t)(worked < STRETCH_MAX ? worked : STRETCH_MAX) - (int64_t)r->average_ns) / 8);
    /* As many instructions as the core would have executed: turns and budgets are in its measure. */
    c->budget -= (int64_t)(ns / 4);
    if (status < 0 || !WIFSTOPPED(status) || !store(c, r))
        return TRIP_LOST;
    return after_stop(c, r, status);
}
