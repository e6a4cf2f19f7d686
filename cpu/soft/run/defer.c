/* Accesses that only the caller can answer, and how they are put off so that other vCPUs go on meanwhile.
 *
 * An access that is put off abandons its instruction, as a fault does, and parks the vCPU. When the answer is there, the
 * instruction runs again: accesses that it made before get the same results, and the callback is asked once more.
 */
#include "soft/system/system.h"

static void key_of(const struct soft_vcpu *c, uint64_t key[5])
{
    key[0] = soft_instructions(c);
    key[1] = c->rip;
    key[2] = c->gpr[RCX];
    key[3] = c->gpr[RSI];
    key[4] = c->gpr[RDI];
}

void soft_drop_deferred(struct soft_vcpu *c)
{
    if (!c->replay.retry)
        return;
    c->replay.retry = false;
    soft_vm_wake(c->vm); /* the caller may have put off parking the vCPU until that access was complete */
}

/* The record of the instruction (or iteration) under way, emptied if it is another one than before. */
static struct soft_replay *record_of(struct soft_vcpu *c)
{
    struct soft_replay *r = &c->replay;
    uint64_t key[5];
    key_of(c, key);
    if (memcmp(key, r->key, sizeof key)) {
        memcpy(r->key, key, sizeof key);
        r->count = r->next = 0;
        soft_drop_deferred(c);
    }
    return r;
}

static uint64_t ask(struct soft_vcpu *c, const struct soft_access *access)
{
    uint64_t rip = c->rip;
    c->stats.accesses += !access->retry;
    fpu_collect(&c->fpu);
    uint64_t value = c->vm->host.access(c->vm->host.ctx, access);
    if (SOFT_UNLIKELY(c->rip != rip)) /* the caller set other registers: they win */
        soft_leave(c);
    return value;
}

uint64_t soft_host_access(struct soft_vcpu *c, const struct soft_access *access)
{
    if ((c->vm->config.vcpus == 1 || c->vm->parallel) && !c->mmu.watching) /* soft_watch_caller() abandons instructions, too */
        return ask(c, access);
    struct soft_replay *r = record_of(c);
    if (r->next < r->count)
        return r->results[r->next++];
    struct soft_access now = *access;
    now.retry = r->retry;
    r->retry = false;
    uint64_t value = ask(c, &now);
    if (r->deferring) {
        r->deferring = false;
        r->retry = true;
        r->next = 0;
        c->parked = true; /* the queued change of the same kind comes too late for this turn */
        _longjmp(c->fault, JUMP_RETRY);
    }
    if (r->count < SOFT_REPLAY)
        r->results[r->count++] = value;
    r->next = r->count;
    return value;
}

bool soft_vcpu_defer(struct soft_vm *vm, uint32_t vcpu)
{
    struct soft_vcpu *c = vm->vcpus[vcpu];
    if (vm->config.vcpus == 1 || vm->parallel || !c->replay.allowed || c->replay.count >= SOFT_REPLAY)
        return false;
    c->replay.deferring = true;
    soft_vcpu_park(vm, vcpu, true);
    return true;
}

bool soft_vcpu_deferred(const struct soft_vm *vm, uint32_t vcpu) { return vm->vcpus[vcpu]->replay.retry; }
