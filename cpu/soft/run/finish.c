/* One instruction for another hypervisor: soft_vcpu_finish(). The run loop in small, without turns, interrupts and time. */
#include "soft/system/system.h"

enum { REPETITIONS = 1 << 16 };

enum soft_finish soft_vcpu_finish(struct soft_vm *vm, uint32_t vcpu)
{
    struct soft_vcpu *c = vm->vcpus[vcpu];
    volatile bool done = false;
    volatile unsigned repetitions = 0;
    uint64_t start = c->rip;
    c->in_step = c->in_exception = false;
    c->replay.allowed = false;
    soft_set_budget(c, 2 * REPETITIONS);
    switch (_setjmp(c->fault)) {
    case JUMP_FAULT:
        c->in_step = false;
        /* Not while an exception is delivered: #UD is not one that delivery raises. */
        if (!done && c->fault_vector == VEC_UD && !soft_undefined_by_name(c))
            return SOFT_FINISH_UNKNOWN;
        done = true;
        soft_deliver_pending_fault(c);
        break;
    case JUMP_LEAVE:
        done = true;
        if (c->in_step)
            soft_step_end(c);
        break;
    case JUMP_TRIPLE:
        c->in_exception = c->in_step = false;
        return SOFT_FINISH_SHUTDOWN;
    case JUMP_DEBUG: /* nobody asked for one */
    case JUMP_RETRY:
        c->in_step = false;
        return SOFT_FINISH_UNKNOWN;
    default:
        break;
    }
    while (!done) {
        soft_step_begin(c);
        soft_step_unkept(c);
        done = true; /* its traps are delivered now */
        soft_step_end(c);
        done = c->rip != start || ++repetitions == REPETITIONS;
    }
    c->in_exception = false;
    fpu_collect(&c->fpu);
    return SOFT_FINISHED;
}
