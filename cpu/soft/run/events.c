/* What other threads send to the thread that runs the VM: interrupts, messages, DMA, wake, park, alarm.
 *
 * Everything is kept coalesced, so that memory is bounded by what exists (GSIs, distinct messages), not by how often
 * it is sent. Setting c->attention makes the block loop return; the run loop then applies everything in one go.
 */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "soft/system/system.h"

enum { DMA_RANGES = 64 };

struct message {
    uint64_t address;
    uint32_t data;
};
struct range {
    uint64_t gpa, size;
};

struct vm_events {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    uint32_t pending; /* atomic: anything to apply */
    bool sleeping, wake;
    uint32_t gsi_applied, gsi_last, gsi_rose, gsi_fell;
    uint32_t nmi, park_changed, park_value;
    struct message *messages;
    size_t message_count, message_capacity;
    struct range ranges[DMA_RANGES];
    unsigned range_count;
    bool all_memory;
};

struct vm_events *soft_events_create(void)
{
    struct vm_events *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->cond, &attributes);
    pthread_condattr_destroy(&attributes);
    return e;
}

/* To destroy a condition variable waits for those that wait for it, who are not in this process. */
void soft_events_forked(struct vm_events *e)
{
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->cond, NULL);
}

void soft_events_destroy(struct vm_events *e)
{
    if (!e)
        return;
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->cond);
    free(e->messages);
    free(e);
}

void soft_events_lock(struct soft_vm *vm) { pthread_mutex_lock(&vm->events->lock); }
void soft_events_unlock(struct soft_vm *vm) { pthread_mutex_unlock(&vm->events->lock); }

/* Something was queued; the lock is held. */
static void announce(struct soft_vm *vm)
{
    struct vm_events *e = vm->events;
    __atomic_store_n(&e->pending, 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        soft_attend(vm->vcpus[i]);
    if (e->sleeping)
        pthread_cond_signal(&e->cond);
}

void soft_vm_wake(struct soft_vm *vm)
{
    for (uint32_t i = 0; vm->parallel && i < vm->config.vcpus; i++)
        soft_vcpu_wake(vm, i);
    if (vm->parallel)
        return;
    soft_events_lock(vm);
    vm->events->wake = true;
    announce(vm);
    soft_events_unlock(vm);
}

void soft_vcpu_park(struct soft_vm *vm, uint32_t vcpu, bool parked)
{
    if (vcpu >= vm->config.vcpus)
        return;
    uint32_t bit = 1u << vcpu;
    soft_events_lock(vm);
    vm->events->park_changed |= bit;
    vm->events->park_value = parked ? vm->events->park_value | bit : vm->events->park_value & ~bit;
    announce(vm);
    soft_events_unlock(vm);
}

void soft_vm_set_irq(struct soft_vm *vm, uint32_t gsi, bool level)
{
    if (gsi >= SOFT_GSI_COUNT)
        return;
    struct vm_events *e = vm->events;
    uint32_t bit = 1u << gsi;
    if (vm->parallel) {
        irqchip_lock(vm->irqchip);
        if (((e->gsi_last & bit) != 0) != level) {
            e->gsi_last ^= bit;
            irqchip_set_gsi(vm->irqchip, gsi, level, soft_now(vm));
        }
        irqchip_unlock(vm->irqchip);
        return;
    }
    soft_events_lock(vm);
    if (((e->gsi_last & bit) != 0) != level) {
        e->gsi_last ^= bit;
        if (level)
            e->gsi_rose |= bit;
        else
            e->gsi_fell |= bit;
        announce(vm);
    }
    soft_events_unlock(vm);
}

void soft_events_set_levels(struct soft_vm *vm, uint32_t levels)
{
    struct vm_events *e = vm->events;
    irqchip_lock(vm->irqchip);
    soft_events_lock(vm);
    e->gsi_applied = e->gsi_last = levels;
    e->gsi_rose = e->gsi_fell = 0;
    soft_events_unlock(vm);
    irqchip_unlock(vm->irqchip);
}

void soft_vm_signal_msi(struct soft_vm *vm, uint64_t address, uint32_t data)
{
    struct vm_events *e = vm->events;
    if (vm->parallel) {
        irqchip_msi(vm->irqchip, address, data);
        return;
    }
    soft_events_lock(vm);
    size_t i = 0;
    while (i < e->message_count && (e->messages[i].address != address || e->messages[i].data != data))
        i++;
    if (i == e->message_count) {
        if (i == e->message_capacity) {
            size_t capacity = i ? i * 2 : 32;
            struct message *grown = realloc(e->messages, capacity * sizeof *grown);
            if (grown) {
                e->messages = grown;
                e->message_capacity = capacity;
            }
        }
        if (i < e->message_capacity)
            e->messages[e->message_count++] = (struct message){ address, data };
    }
    announce(vm);
    soft_events_unlock(vm);
}

void soft_vm_nmi(struct soft_vm *vm, uint32_t vcpu)
{
    if (vcpu >= vm->config.vcpus)
        return;
    if (vm->parallel) {
        __atomic_store_n(&vm->vcpus[vcpu]->nmi_pending, true, __ATOMIC_SEQ_CST);
        soft_attend(vm->vcpus[vcpu]);
        return;
    }
    soft_events_lock(vm);
    vm->events->nmi |= 1u << vcpu;
    announce(vm);
    soft_events_unlock(vm);
}

void soft_vm_set_alarm(struct soft_vm *vm, uint64_t deadline_ns)
{
    soft_events_lock(vm);
    vm->alarm_ns = deadline_ns;
    announce(vm);
    soft_events_unlock(vm);
}

uint64_t soft_alarm(struct soft_vm *vm)
{
    soft_events_lock(vm);
    uint64_t alarm = vm->alarm_ns;
    soft_events_unlock(vm);
    return alarm;
}

/* Tell those vCPUs that have code of the range. Slots do not change: the lock is held, or this is the VM's thread. */
static void tell_written(struct soft_vm *vm, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = 0; i < vm->slot_count; i++) {
        struct soft_slot *slot = &vm->slots[i];
        if (!slot->size || gpa >= slot->gpa + slot->size || slot->gpa >= gpa + size)
            continue;
        uint64_t at = gpa > slot->gpa ? gpa : slot->gpa;
        uint64_t end = gpa + size < slot->gpa + slot->size ? gpa + size : slot->gpa + slot->size;
        for (uint64_t next; at < end; at = next) {
            next = (at & PAGE_MASK) + PAGE_BYTES < end ? (at & PAGE_MASK) + PAGE_BYTES : end;
            soft_shared_written(vm, NULL, slot, at, next - at);
        }
    }
}

/* Does any page of the range hold code that was translated, or that runs natively? The lock is held, so slots do not change. */
static bool holds_code(const struct soft_vm *vm, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = 0; i < vm->slot_count; i++) {
        const struct soft_slot *slot = &vm->slots[i];
        if (!slot->size || gpa >= slot->gpa + slot->size || slot->gpa >= gpa + size)
            continue;
        uint64_t first = gpa > slot->gpa ? (gpa - slot->gpa) >> 12 : 0;
        uint64_t end = gpa + size - slot->gpa < slot->size ? gpa + size - slot->gpa : slot->size;
        for (uint64_t page = first; page < (end + PAGE_BYTES - 1) >> 12; page++)
            if (__atomic_load_n(&slot->code_pages[page], __ATOMIC_ACQUIRE) ||
                (slot->executors && __atomic_load_n(&slot->executors[page], __ATOMIC_ACQUIRE)))
                return true;
    }
    return false;
}

void soft_vm_memory_written(struct soft_vm *vm, uint64_t gpa, uint64_t size)
{
    struct vm_events *e = vm->events;
    if (!size || gpa >> PHYS_BITS || size > 1ull << PHYS_BITS)
        return;
    bool told = vm->parallel != NULL;
    soft_events_lock(vm);
    if (told) {
        tell_written(vm, gpa, size);
    } else if (holds_code(vm, gpa, size)) {
        if (e->range_count < DMA_RANGES)
            e->ranges[e->range_count++] = (struct range){ gpa, size };
        else
            e->all_memory = true;
        announce(vm);
        told = true;
    }
    soft_events_unlock(vm);
    if (told && vm->direct)
        soft_shared_settle(vm);
}

bool soft_events_pending(const struct soft_vm *vm)
{
    return __atomic_load_n(&vm->events->pending, __ATOMIC_ACQUIRE) != 0;
}

static void apply_gsi(struct soft_vm *vm, uint32_t gsi, bool fell, bool rose, bool last, uint64_t now)
{
    uint32_t bit = 1u << gsi;
    bool level = (vm->events->gsi_applied & bit) != 0;
    if (level && fell) {
        irqchip_set_gsi(vm->irqchip, gsi, false, now);
        level = false;
    }
    if (!level && rose) {
        irqchip_set_gsi(vm->irqchip, gsi, true, now);
        level = true;
    }
    if (level != last)
        irqchip_set_gsi(vm->irqchip, gsi, last, now);
    vm->events->gsi_applied = last ? vm->events->gsi_applied | bit : vm->events->gsi_applied & ~bit;
}

void soft_events_apply_line(struct soft_vm *vm, uint32_t gsi)
{
    struct vm_events *e = vm->events;
    uint32_t bit = 1u << gsi;
    soft_events_lock(vm);
    if (vm->parallel) { /* soft_vm_set_irq() does it at once */
        soft_events_unlock(vm);
        return;
    }
    bool rose = e->gsi_rose & bit, fell = e->gsi_fell & bit, last = e->gsi_last & bit;
    e->gsi_rose &= ~bit;
    e->gsi_fell &= ~bit;
    soft_events_unlock(vm);
    if (rose || fell)
        apply_gsi(vm, gsi, fell, rose, last, soft_now(vm));
}

bool soft_events_apply(struct soft_vm *vm)
{
    struct vm_events *e = vm->events;
    struct message *messages = NULL;
    struct range ranges[DMA_RANGES];

    soft_events_lock(vm);
    __atomic_store_n(&e->pending, 0, __ATOMIC_RELAXED);
    bool wake = e->wake, all_memory = e->all_memory;
    uint32_t rose = e->gsi_rose, fell = e->gsi_fell, last = e->gsi_last, nmi = e->nmi;
    size_t message_count = e->message_count;
    unsigned range_count = e->range_count;
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        if (e->park_changed >> i & 1)
            vm->vcpus[i]->parked = e->park_value >> i & 1;
    if (message_count) {
        messages = e->messages;
        e->messages = NULL;
        e->message_capacity = 0;
    }
    memcpy(ranges, e->ranges, range_count * sizeof ranges[0]);
    e->wake = e->all_memory = false;
    e->gsi_rose = e->gsi_fell = e->nmi = e->park_changed = 0;
    e->message_count = 0;
    e->range_count = 0;
    soft_events_unlock(vm);

    uint64_t now = soft_now(vm);
    for (uint32_t gsi = 0; (rose | fell) >> gsi; gsi++)
        if ((rose | fell) >> gsi & 1)
            apply_gsi(vm, gsi, fell >> gsi & 1, rose >> gsi & 1, last >> gsi & 1, now);
    for (size_t i = 0; i < message_count; i++)
        irqchip_msi(vm->irqchip, messages[i].address, messages[i].data);
    free(messages);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        if (nmi >> i & 1)
            vm->vcpus[i]->nmi_pending = true;
    if (all_memory) {
        soft_blocks_flush_all(vm);
        if (vm->direct)
            soft_direct_code_written(vm->vcpus[0], PAGE_ALL);
    }
    for (unsigned i = 0; i < range_count && !all_memory; i++) {
        if (vm->direct)
            tell_written(vm, ranges[i].gpa, ranges[i].size);
        else
            soft_blocks_invalidate(vm->caches[0], ranges[i].gpa, ranges[i].size);
    }
    return wake;
}

void soft_events_wait(struct soft_vm *vm, uint64_t deadline)
{
    struct vm_events *e = vm->events;
    soft_events_lock(vm);
    if (!soft_events_pending(vm)) {
        e->sleeping = true;
        uint64_t latest = soft_now(vm) + 3600ull * 1000000000;
        if (deadline == UINT64_MAX || vm->config.virtual_clock) {
            pthread_cond_wait(&e->cond, &e->lock);
        } else {
            uint64_t at = vm->start_ns + (deadline < latest ? deadline : latest);
            struct timespec t = { .tv_sec = (time_t)(at / 1000000000), .tv_nsec = (long)(at % 1000000000) };
            pthread_cond_timedwait(&e->cond, &e->lock, &t);
        }
        e->sleeping = false;
    }
    soft_events_unlock(vm);
}
