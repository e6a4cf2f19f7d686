/* A stretch of native execution: the vCPU's state into the guest half, and back when it stopped; what the stop means.
 *
 * State goes by the frame of a signal, in pages shared with the guest half. What comes back is copied once while the guest half
 * stands. Guest code can have written it: each value is one that the guest's program could have put into a register, after the
 * checks below; nothing of it is used as an address on the host. What goes out is written whole, whatever was there.
 */
#define _GNU_SOURCE
#include "soft/direct/internal.h"

#include <signal.h>

enum { USER_CS = 0x33, USER_DS = 0x2B, SYSCALL_BYTES = 2, SI_KERNEL_CODE = 0x80 };
enum { INT_N = 0xCD, INT1 = 0xF1 };
enum { TRAP_STEPPED = 2 /* TRAP_TRACE */, TRAP_WATCHED = 6 /* TRAP_PERF */ };
enum { CONTEXT = 7 /* UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS */ };
enum { X87_BYTES = 24, X87_STACK = 32, XMM = 160, X87_AND_SSE = 3 };
/* Component 2: upper halves of YMM registers, of guests that have them (SDM 1, 13.5.2: behind the header, in the format that
 * frames have). */
enum { UPPER = STATE_LEAST, UPPER_BYTES = STATE_AVX - STATE_LEAST };
_Static_assert(sizeof ((struct fpu *)0)->high == UPPER_BYTES, "as component 2 has them");
/* What code at CPL 3 can change with IOPL 0. */
#define F_USER (F_ARITH | F_TF | F_DF | F_NT | F_AC | F_ID)
#define F_ALWAYS 2u
#define MXCSR_BITS 0xFFFFu
#define VSYSCALL_PAGE 0xFFFFFFFFFF600000ull
/* Linux passes this call by all filters, and answers it by SIGILL outside of its own trampolines. */
enum { URETPROBE = 335 };
#define LONGEST_NS 20000000ull
#define LOWEST_STEP 128
#define STRETCH_MAX 100000ull /* that one long stretch does not pay for many short ones */

static bool has_avx(const struct soft_vcpu *c) { return soft_vcpu_xcr0(c) & STATE_HAS_AVX; }

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
    if (has_avx(c) && !soft_avx_enabled(c)) /* what is #UD for the guest would be none natively */
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

static const unsigned places[16] = {[R8] = 0,   [R9] = 1,   [R10] = 2,  [R11] = 3,  [R12] = 4,  [R13] = 5,  [R14] = 6,  [R15] = 7,
                                    [RDI] = 8,  [RSI] = 9,  [RBP] = 10, [RBX] = 11, [RDX] = 12, [RAX] = 13, [RCX] = 14, [RSP] = 15};

/* x87, SSE and what the guest has of AVX, unless the frame has them; what else the processor has stays as it was. */
static void load_fpu(struct soft_vcpu *c, struct runner *r)
{
    uint8_t *state = runner_at(r, r->state);
    uint64_t in_use, features, none[7] = {0};
    const uint32_t end = STATE_END;
    memcpy(&in_use, state + STATE_HEADER, sizeof in_use);
    memcpy(&features, r->made_by_kernel + (STATE_FEATURES - STATE_SOFTWARE), sizeof features);
    in_use &= features;
    fpu_collect(&c->fpu);
    struct fpu compare = c->fpu;
    compare.x87_ready = r->fpu.x87_ready;
    if (!r->fp_known || memcmp(&compare, &r->fpu, sizeof compare)) {
        memset(r->fx, 0, sizeof r->fx);
        fpu_fxsave(&c->fpu, r->fx, true, true);
        memcpy(state, r->fx, FX_USED);
        in_use |= X87_AND_SSE;
        if (has_avx(c)) { /* in its initial state if all are zero: some processors are slower otherwise */
            memcpy(state + UPPER, c->fpu.high, UPPER_BYTES);
            in_use = (in_use & ~(uint64_t)STATE_HAS_AVX) | (fpu_xinuse(&c->fpu) & STATE_HAS_AVX);
        }
        r->fpu = c->fpu;
        r->fp_known = true;
    }
    memcpy(state + STATE_SOFTWARE, r->made_by_kernel, sizeof r->made_by_kernel);
    memcpy(state + r->state_bytes, &end, sizeof end);
    memcpy(state + STATE_HEADER, &in_use, sizeof in_use);
    memcpy(state + STATE_HEADER + sizeof in_use, none, sizeof none);
}

/* A frame by which the guest half goes on at `rip`, with its general registers 0. */
static struct signal_frame frame_to(const struct runner *r, uint64_t rip, uint64_t flags)
{
    return (struct signal_frame){
        .context = CONTEXT,
        .stack = RUNNER_STACK,
        .stack_flags = RUNNER_STACK_FLAGS,
        .stack_bytes = RUNNER_STACK_BYTES,
        .rip = rip,
        .flags = flags,
        .cs = USER_CS,
        .ss = USER_DS,
        .state = RUNNER_FRAME + r->state,
    };
}

static void load(struct soft_vcpu *c, struct runner *r)
{
    uint64_t flags = soft_flags(c) & ~F_RF; /* there is no breakpoint that it could hold back */
    struct signal_frame to = frame_to(r, c->rip, flags);
    for (unsigned i = 0; i < 16; i++)
        to.gpr[places[i]] = c->gpr[i];
    memcpy(runner_at(r, r->stack), &to, offsetof(struct signal_frame, info));
    r->page->flags = (flags & (F_NT | F_ID)) | F_ALWAYS; /* a return from a signal leaves these two as they are */
    r->page->fs_base = c->seg[SEG_FS].base;
    r->page->gs_base = c->seg[SEG_GS].base;
    load_fpu(c, r);
}

static void store_fpu(struct soft_vcpu *c, struct runner *r)
{
    static const uint8_t x87[X87_BYTES] = {0x7F, 0x03};
    const uint8_t *state = runner_at(r, r->state);
    uint8_t image[512] __attribute__((aligned(16)));
    uint64_t in_use;
    uint32_t mxcsr;
    memcpy(&in_use, state + STATE_HEADER, sizeof in_use);
    memcpy(image, state, FX_USED);
    memset(image + FX_USED, 0, sizeof image - FX_USED);
    if (!(in_use & 1)) { /* as it is after FNINIT */
        memcpy(image, x87, sizeof x87);
        memset(image + X87_STACK, 0, XMM - X87_STACK);
    }
    if (!(in_use & 2))
        memset(image + XMM, 0, FX_USED - XMM);
    uint8_t upper[UPPER_BYTES] = {0};
    if (has_avx(c) && (in_use & STATE_HAS_AVX))
        memcpy(upper, state + UPPER, sizeof upper);
    if (r->fp_known && !memcmp(image, r->fx, FX_USED) && !memcmp(upper, r->fpu.high, sizeof upper))
        return;
    memcpy(r->fx, image, sizeof image);
    memcpy(&mxcsr, image + X87_BYTES, sizeof mxcsr);
    r->fp_known = !(mxcsr & ~MXCSR_BITS);
    mxcsr &= MXCSR_BITS;
    memcpy(image + X87_BYTES, &mxcsr, sizeof mxcsr);
    fpu_fxrstor(&c->fpu, image, true, true);
    memcpy(c->fpu.high, upper, sizeof upper);
    r->fpu = c->fpu;
}

/* False: it claims what no program can have done. */
static bool store(struct soft_vcpu *c, struct runner *r, const uint64_t arguments[6], struct stop *stop)
{
    struct signal_frame *from = &stop->frame;
    memcpy(from, runner_at(r, r->stack), sizeof *from);
    stop->fs_base = arguments[0];
    stop->gs_base = arguments[1];
    stop->ds = (uint16_t)arguments[2];
    stop->es = (uint16_t)(arguments[2] >> 16);
    stop->fs = (uint16_t)(arguments[2] >> 32);
    stop->gs = (uint16_t)(arguments[2] >> 48);
    if (!soft_canonical(from->rip) || !soft_canonical(stop->fs_base) || !soft_canonical(stop->gs_base))
        return false;
    for (unsigned i = 0; i < 16; i++)
        c->gpr[i] = from->gpr[places[i]];
    stop->entered = c->rip;
    c->rip = from->rip;
    soft_set_flags(c, ((uint32_t)from->flags & F_USER) | (soft_flags(c) & ~(F_USER | F_RF)));
    c->seg[SEG_FS].base = stop->fs_base;
    c->seg[SEG_GS].base = stop->gs_base;
    store_fpu(c, r);
    return true;
}

bool trip_clean(struct runner *r)
{
    struct signal_frame frame = frame_to(r, RUNNER_REST, F_ALWAYS);
    uint8_t *state = runner_at(r, r->state);
    uint64_t arguments[6];
    memcpy(runner_at(r, r->stack), &frame, offsetof(struct signal_frame, info));
    memcpy(state + STATE_SOFTWARE, r->made_by_kernel, sizeof r->made_by_kernel);
    memset(state + STATE_HEADER, 0, STATE_LEAST - STATE_HEADER); /* all registers as they are at first */
    r->page->flags = F_ALWAYS;
    r->page->fs_base = r->page->gs_base = 0;
    r->fp_known = r->suspect = false;
    if (!runner_resume(r, arguments))
        return false;
    /* Only gate code ran since, so this is what it and the kernel say. */
    memcpy(&frame, runner_at(r, r->stack), sizeof frame);
    return arguments[4] == (uint64_t)RUNNER_FRAME + r->stack && frame.rip == RUNNER_REST;
}

/* The guest loaded a segment register natively: the host's descriptors are flat ones, as in Linux; the guest's own decide what it
 * has now. */
static void take_segments(struct soft_vcpu *c, const struct stop *stop)
{
    const struct { unsigned seg; uint16_t selector; } data[] = {
        {SEG_DS, stop->ds}, {SEG_ES, stop->es}, {SEG_FS, stop->fs}, {SEG_GS, stop->gs}};
    soft_mode_changed(c);
    for (unsigned i = 0; i < 4; i++) {
        if (!data[i].selector)
            continue;
        uint64_t base = c->seg[data[i].seg].base;
        soft_load_seg(c, data[i].seg, data[i].selector);
        if (data[i].seg == SEG_FS || data[i].seg == SEG_GS)
            c->seg[data[i].seg].base = base;
    }
    if (stop->frame.ss != USER_DS)
        soft_load_seg(c, SEG_SS, stop->frame.ss);
    if (stop->frame.cs != USER_CS) {
        struct descriptor d;
        uint16_t selector = stop->frame.cs;
        if (!soft_fetch_descriptor(c, selector, false, &d) || !descriptor_s(&d) || !descriptor_present(&d) ||
            !(descriptor_type(&d) & TYPE_CODE) || descriptor_dpl(&d) != 3 || (selector & 3) != 3)
            soft_raise_error(c, VEC_GP, 0);
        soft_set_cs(c, selector, 3, &d);
        soft_mode_changed(c);
    }
}

static bool segments_changed(const struct stop *stop)
{
    return stop->frame.cs != USER_CS || stop->frame.ss != USER_DS || stop->ds || stop->es || stop->fs || stop->gs;
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
    c->direct->counts.stop[SOFT_NATIVE_PAGE]++;
    bool executed = (linear & PAGE_MASK) == (c->rip & PAGE_MASK) || (linear & PAGE_MASK) == ((c->rip + 14) & PAGE_MASK);
    executed = executed && !pages_have(r, linear, PAGE_X);
    pend(c->direct, r, linear, executed);
    in_core(c);
    return TRIP_NATIVE;
}

static uint8_t code_byte(struct soft_vcpu *c, struct runner *r, uint64_t linear)
{
    const struct region *region = region_of(r, linear);
    uint64_t page = region ? region->page[linear >> 12 & 511] : 0;
    const uint8_t *host = page ? soft_phys(c->vm, page & PAGE_MASK, false, NULL) : NULL;
    return host ? host[linear & ~PAGE_MASK] : 0;
}

/* Back to the instruction that trapped behind itself: INT3, INTO, or INT 3 or INT 4 in two bytes. A host that is a virtual machine may
 * stop at INT1, others behind it. */
static void undo_trap(struct soft_vcpu *c, struct runner *r, const struct stop *stop)
{
    const struct signal_frame *frame = &stop->frame;
    bool overflow = frame->info.signal == SIGSEGV && frame->trap == VEC_OF;
    if (!overflow && (frame->info.signal != SIGTRAP || frame->info.code == TRAP_STEPPED || frame->info.code == TRAP_WATCHED))
        return;
    uint8_t last = code_byte(c, r, c->rip - 1);
    if (!overflow && frame->trap == VEC_DB) {
        bool at = last != INT1 || (c->rip == stop->entered && code_byte(c, r, c->rip) == INT1);
        c->rip -= at ? 0 : 1;
        return;
    }
    bool two = last == (overflow ? VEC_OF : VEC_BP) && code_byte(c, r, c->rip - 2) == INT_N;
    c->rip -= two ? 2 : 1;
}

/* A vsyscall address was called, and the host's kernel returned from it already: the core calls it. */
static void undo_vsyscall(struct soft_vcpu *c, uint64_t called)
{
    c->rip = called;
    c->gpr[RSP] -= 8;
}

static enum trip signal_stop(struct soft_vcpu *c, struct runner *r, const struct stop *stop)
{
    const struct signal_frame *frame = &stop->frame;
    int32_t code = frame->info.code;
    switch (frame->info.signal) {
    case SIGSEGV:
        if (code > 0 && code != SI_KERNEL_CODE)
            return page_stop(c, r, frame->info.address);
        undo_trap(c, r, stop);
        break;
    case SIGILL:
        if (code == SI_KERNEL_CODE) { /* a call of URETPROBE */
            c->rip -= SYSCALL_BYTES;
            c->gpr[RAX] = URETPROBE;
        }
        break;
    case SIGBUS:
    case SIGFPE:
        break;
    case SIGSYS: /* at a vsyscall address: after_stop() took the system calls */
        undo_vsyscall(c, frame->info.address);
        break;
    case SIGTRAP:
        if (code == TRAP_WATCHED) { /* guard.c: it was not executed */
            c->direct->counts.stop[SOFT_NATIVE_GUARD]++;
            in_core(c);
            return TRIP_NATIVE;
        }
        if (code == TRAP_STEPPED) { /* a single step of the guest's own ended */
            c->dr[6] |= DR6_BS;
            soft_raise(c, VEC_DB);
        }
        undo_trap(c, r, stop);
        break;
    default: /* a kick, or somebody's signal to the process: nothing of the guest's */
        c->direct->counts.stop[SOFT_NATIVE_KICK]++;
        return TRIP_CORE;
    }
    c->direct->counts.stop[SOFT_NATIVE_FAULT]++;
    in_core(c);
    return TRIP_NATIVE;
}

static enum trip after_stop(struct soft_vcpu *c, struct runner *r, const struct stop *stop)
{
    int signal = stop->frame.info.signal;
    bool system_call = signal == SIGSYS && (stop->frame.info.address & PAGE_MASK) != VSYSCALL_PAGE;
    if (system_call) /* back to the instruction: the core executes it */
        c->rip -= SYSCALL_BYTES;
    if (segments_changed(stop)) {
        undo_trap(c, r, stop);
        c->direct->slice = c->vm->direct->page_slice;
        take_segments(c, stop);
        soft_system_flags_changed(c);
        return TRIP_CORE;
    }
    soft_mode_changed(c);
    if (system_call) {
        c->direct->counts.stop[SOFT_NATIVE_CALL]++;
        in_core(c);
        return c->cpl == 3 ? TRIP_NATIVE : TRIP_CORE;
    }
    enum trip result = signal_stop(c, r, stop);
    soft_system_flags_changed(c);
    return result;
}

/* When the stretch has to end: at the next timer event, or sooner. */
static uint64_t deadline_of(struct soft_vcpu *c, uint64_t now)
{
    struct soft_vm *vm = c->vm;
    uint64_t at = c->turn_limit_ns, limit = LONGEST_NS;
    uint64_t end = at > UINT64_MAX - vm->start_ns ? UINT64_MAX : at + vm->start_ns;
    return end < now + limit ? end : now + limit;
}

/* Up by a step for a larger sample, down by nine for a smaller one: it stays where nine of ten are larger. */
static void follow_lowest(uint64_t *lowest, uint64_t sample)
{
    uint64_t step = *lowest / LOWEST_STEP + 1, down = 9 * step;
    *lowest = sample > *lowest ? *lowest + step : *lowest - (down < *lowest ? down : *lowest);
}

/* What a stretch was worth. Stops at pages are the fewer the longer a program runs, and kicks are not its own: neither says anything
 * about the next stretch. */
static void account(struct runner *r, uint64_t worked, uint64_t cost, bool own)
{
    int64_t most = (int64_t)(worked < STRETCH_MAX ? worked : STRETCH_MAX);
    if (own)
        r->average_ns = (uint64_t)((int64_t)r->average_ns + (most - (int64_t)r->average_ns) / 8);
    r->balance_ns += (int64_t)worked * GAIN - (int64_t)cost;
    if (r->balance_ns > CREDIT_NS)
        r->balance_ns = CREDIT_NS;
}

enum trip trip_run(struct soft_vcpu *c, struct runner *r)
{
    struct direct_vcpu *d = c->direct;
    struct soft_vm *vm = c->vm;
    load(c, r);
    uint64_t began = soft_host_now();
    kick_before(vm, d, r, deadline_of(c, began));
    if (__atomic_load_n(&c->attention, __ATOMIC_SEQ_CST)) {
        kick_after(d);
        return TRIP_CORE;
    }
    c->shadow = 0; /* of an STI or MOV SS that is past */
    uint64_t arguments[6];
    struct stop stop;
    bool stands = runner_resume(r, arguments);
    kick_after(d);
    uint64_t ns = soft_host_now() - began, used = kick_time(r->guest), worked = used - r->used_ns;
    r->used_ns = used;
    uint64_t spent = worked, *floor = &d->floor_ns[guard_any(r)];
    worked = worked > *floor ? worked - *floor : 0;
    d->counts.ns += worked;
    d->counts.stops++;
    r->last_ns = worked;
    r->stops++;
    /* As many instructions as the core would have executed: turns and budgets are in its measure. */
    c->budget -= (int64_t)(ns / 4);
    d->user_from = soft_instructions(c);
    if (!stands || !store(c, r, arguments, &stop))
        return TRIP_LOST;
    d->failures = 0;
    int signal = stop.frame.info.signal;
    if (c->rip == stop.entered && signal == SIGSEGV) /* not one instruction was executed */
        follow_lowest(floor, spent);
    account(r, worked, STOP_FLOORS * *floor, signal != SIGSEGV && signal != SIGUSR1);
    return after_stop(c, r, &stop);
}
