/* The scripted core: each vCPU performs a list of steps and records what its reads yielded. For tests.
 *
 * It shares the thread loop with the real cores, so its accesses meet the same posted, shadow and ioeventfd tables. State
 * is stored as it was set. At the end of its script a vCPU idles, as in HLT, until it is kicked. With the virtual clock
 * a step takes STEP_NS, and when all have ended time skips to the alarm.
 */
#define _GNU_SOURCE
#include "native/scripted.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { STEP_NS = 1000, INTERRUPTS_MAX = 65536, MSRS_MAX = 256, STEPS_MAX = 1 << 20, STATES = LV_STATE_TSC + 1 };

struct scripted_slot {
    uint64_t gpa, size;
    uint8_t *host, *dirty;
    bool readonly;
};

struct scripted_vm {
    pthread_mutex_t lock;
    struct scripted_slot slots[LV_MAX_SLOTS];
    struct lv_interrupt *interrupts;
    uint32_t interrupt_count, interrupt_room;
    uint64_t now_ns, alarm_ns; /* virtual clock */
    uint8_t *blobs[STATES];
};

struct scripted_vcpu {
    struct lv_exit *steps;
    uint32_t count, next;
    uint64_t *answers;
    uint32_t answer_count, answer_room;
    uint8_t *blobs[STATES];
    struct { uint32_t index; uint64_t value; } msrs[MSRS_MAX];
    uint32_t msr_count;
};

static size_t blob_size(int kind)
{
    switch (kind) {
    case LV_STATE_REGS: return sizeof(struct kvm_regs);
    case LV_STATE_SREGS: return sizeof(struct kvm_sregs);
    case LV_STATE_XSAVE: return 4096;
    case LV_STATE_XCRS: return sizeof(struct kvm_xcrs);
    case LV_STATE_LAPIC: return sizeof(struct kvm_lapic_state);
    case LV_STATE_EVENTS: return sizeof(struct kvm_vcpu_events);
    case LV_STATE_DEBUGREGS: return sizeof(struct kvm_debugregs);
    case LV_STATE_MP: return sizeof(struct kvm_mp_state);
    case LV_STATE_PIC_MASTER: case LV_STATE_PIC_SLAVE: case LV_STATE_IOAPIC: return sizeof(struct kvm_irqchip);
    case LV_STATE_PIT: return sizeof(struct kvm_pit_state2);
    case LV_STATE_CLOCK: return sizeof(struct kvm_clock_data);
    case LV_STATE_TSC: return sizeof(uint64_t);
    default: return 0;
    }
}

static int get_blob(uint8_t **blobs, int kind, void *data, size_t size)
{
    size_t exact = blob_size(kind);
    if (kind == LV_STATE_CORE || kind == LV_STATE_EXTRA)
        return 0;
    if (!exact || size < exact)
        return -EINVAL;
    if (blobs[kind])
        memcpy(data, blobs[kind], exact);
    else
        memset(data, 0, exact);
    return (int)exact;
}

static int set_blob(uint8_t **blobs, int kind, const void *data, size_t size)
{
    if (kind == LV_STATE_CORE || kind == LV_STATE_EXTRA)
        return 0; /* another core's */
    if (!blob_size(kind) || size != blob_size(kind))
        return -EINVAL;
    if (!blobs[kind] && !(blobs[kind] = malloc(size)))
        return -ENOMEM;
    memcpy(blobs[kind], data, size);
    return (int)size;
}

static void free_blobs(uint8_t **blobs)
{
    for (int i = 0; i < STATES; i++)
        free(blobs[i]);
}

/* ---- the VM ---- */

static int vm_create(struct lv_vm *vm)
{
    struct scripted_vm *s = calloc(1, sizeof *s);
    if (!s)
        return -ENOMEM;
    pthread_mutex_init(&s->lock, NULL);
    s->alarm_ns = UINT64_MAX;
    vm->core = s;
    return 0;
}

static void vm_destroy(struct lv_vm *vm)
{
    struct scripted_vm *s = vm->core;
    for (int i = 0; i < LV_MAX_SLOTS; i++)
        free(s->slots[i].dirty);
    free_blobs(s->blobs);
    free(s->interrupts);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static int set_slot(struct lv_vm *vm, uint32_t slot, uint64_t gpa, uint64_t size, void *host, bool readonly, bool log_dirty)
{
    struct scripted_vm *s = vm->core;
    uint8_t *dirty = NULL;
    for (uint32_t i = 0; size && i < LV_MAX_SLOTS; i++)
        if (i != slot && s->slots[i].size && gpa < s->slots[i].gpa + s->slots[i].size && s->slots[i].gpa < gpa + size)
            return -EEXIST;
    if (size && log_dirty && !(dirty = calloc(1, (size / 4096 + 63) / 64 * 8)))
        return -ENOMEM;
    pthread_mutex_lock(&s->lock);
    free(s->slots[slot].dirty);
    s->slots[slot] = (struct scripted_slot){.gpa = gpa, .size = size, .host = host, .dirty = dirty, .readonly = readonly};
    pthread_mutex_unlock(&s->lock);
    return 0;
}

static int dirty_log(struct lv_vm *vm, uint32_t slot, uint8_t *bitmap, size_t size)
{
    struct scripted_vm *s = vm->core;
    int r = -ENOENT;
    pthread_mutex_lock(&s->lock);
    if (s->slots[slot].dirty) {
        memcpy(bitmap, s->slots[slot].dirty, size);
        memset(s->slots[slot].dirty, 0, size);
        r = 0;
    }
    pthread_mutex_unlock(&s->lock);
    return r;
}

static int record(struct lv_vm *vm, const struct lv_interrupt *interrupt)
{
    struct scripted_vm *s = vm->core;
    int r = 0;
    pthread_mutex_lock(&s->lock);
    if (s->interrupt_count == s->interrupt_room) {
        uint32_t room = s->interrupt_room ? s->interrupt_room * 2 : 64;
        struct lv_interrupt *grown = room > INTERRUPTS_MAX ? NULL : realloc(s->interrupts, room * sizeof *grown);
        if (grown) {
            s->interrupts = grown;
            s->interrupt_room = room;
        } else {
            r = -ENOSPC;
        }
    }
    if (!r)
        s->interrupts[s->interrupt_count++] = *interrupt;
    pthread_mutex_unlock(&s->lock);
    return r;
}

static int set_irq(struct lv_vm *vm, uint32_t gsi, bool level)
{
    return record(vm, &(struct lv_interrupt){.gsi_or_data = gsi, .address = level});
}

static int signal_msi(struct lv_vm *vm, uint64_t address, uint32_t data)
{
    return record(vm, &(struct lv_interrupt){.msi = true, .gsi_or_data = data, .address = address});
}

uint32_t lv_script_interrupts(struct lv_vm *vm, struct lv_interrupt *log, uint32_t max)
{
    struct scripted_vm *s = vm->core;
    pthread_mutex_lock(&s->lock);
    uint32_t count = s->interrupt_count;
    if (log && max)
        memcpy(log, s->interrupts, (count < max ? count : max) * sizeof *log);
    pthread_mutex_unlock(&s->lock);
    return count;
}

static uint64_t now(struct lv_vm *vm)
{
    struct scripted_vm *s = vm->core;
    if (!vm->config.virtual_clock) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec - vm->start_ns;
    }
    pthread_mutex_lock(&s->lock);
    uint64_t ns = s->now_ns;
    pthread_mutex_unlock(&s->lock);
    return ns;
}

static int set_alarm(struct lv_vm *vm, uint64_t deadline_ns)
{
    struct scripted_vm *s = vm->core;
    if (!vm->config.virtual_clock)
        return -ENOSYS;
    pthread_mutex_lock(&s->lock);
    s->alarm_ns = deadline_ns;
    pthread_mutex_unlock(&s->lock);
    for (uint32_t i = 0; i < vm->engine_count; i++)
        lv_engine_wake(vm->engines[i]);
    return 0;
}

/* Virtual clock: advance by `ns`, or (idle) to the alarm. True if the alarm is due now. */
static bool advance(struct lv_vm *vm, uint64_t ns, bool idle)
{
    struct scripted_vm *s = vm->core;
    bool due = false;
    if (!vm->config.virtual_clock)
        return false;
    pthread_mutex_lock(&s->lock);
    s->now_ns += ns;
    if (idle && s->alarm_ns != UINT64_MAX && s->alarm_ns > s->now_ns)
        s->now_ns = s->alarm_ns;
    if (s->now_ns >= s->alarm_ns) {
        s->alarm_ns = UINT64_MAX;
        due = true;
    }
    pthread_mutex_unlock(&s->lock);
    return due;
}

static int get_vm(struct lv_vm *vm, enum lv_state_kind kind, void *data, size_t size)
{
    int r = get_blob(((struct scripted_vm *)vm->core)->blobs, (int)kind, data, size);
    if (r > 0 && kind >= LV_STATE_PIC_MASTER && kind <= LV_STATE_IOAPIC)
        ((struct kvm_irqchip *)data)->chip_id = kind - LV_STATE_PIC_MASTER;
    if (r > 0 && kind == LV_STATE_CLOCK)
        ((struct kvm_clock_data *)data)->clock = now(vm);
    return r;
}

/* Time goes on from what is set. */
static void set_now(struct lv_vm *vm, uint64_t now_ns)
{
    struct scripted_vm *s = vm->core;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    pthread_mutex_lock(&s->lock);
    s->now_ns = now_ns;
    vm->start_ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec - now_ns;
    pthread_mutex_unlock(&s->lock);
}

static int set_vm(struct lv_vm *vm, enum lv_state_kind kind, const void *data, size_t size)
{
    int r = set_blob(((struct scripted_vm *)vm->core)->blobs, (int)kind, data, size);
    if (r > 0 && kind == LV_STATE_CLOCK) {
        struct kvm_clock_data clock;
        memcpy(&clock, data, sizeof clock);
        set_now(vm, clock.clock);
    }
    return r;
}

/* ---- a vCPU ---- */

static int vcpu_create(struct lv_vcpu *vcpu)
{
    vcpu->core = calloc(1, sizeof(struct scripted_vcpu));
    return vcpu->core ? 0 : -ENOMEM;
}

static void vcpu_destroy(struct lv_vcpu *vcpu)
{
    struct scripted_vcpu *s = vcpu->core;
    free_blobs(s->blobs);
    free(s->steps);
    free(s->answers);
    free(s);
}

int lv_script_append(struct lv_vcpu *vcpu, const struct lv_exit *steps, uint32_t count)
{
    struct scripted_vcpu *s = vcpu->core;
    if (count > STEPS_MAX || s->count > STEPS_MAX - count)
        return -ENOSPC;
    struct lv_exit *grown = realloc(s->steps, (s->count + count + 1) * sizeof *grown);
    if (!grown)
        return -ENOMEM;
    s->steps = grown;
    memcpy(s->steps + s->count, steps, count * sizeof *steps);
    s->count += count;
    return 0;
}

const uint64_t *lv_script_answers(struct lv_vcpu *vcpu, uint32_t *count)
{
    struct scripted_vcpu *s = vcpu->core;
    *count = s->answer_count;
    return s->answers;
}

static void store(struct lv_vm *vm, const struct lv_exit *step)
{
    struct scripted_vm *s = vm->core;
    pthread_mutex_lock(&s->lock);
    for (uint32_t i = 0; i < step->size && i < 8; i++) {
        uint64_t gpa = step->address + i;
        for (int n = 0; n < LV_MAX_SLOTS; n++) {
            struct scripted_slot *slot = &s->slots[n];
            uint64_t offset = gpa - slot->gpa;
            if (!slot->size || offset >= slot->size || slot->readonly)
                continue;
            slot->host[offset] = (uint8_t)(step->value >> (8 * i));
            if (slot->dirty)
                slot->dirty[offset / 4096 / 8] |= (uint8_t)(1u << (offset / 4096 % 8));
        }
    }
    pthread_mutex_unlock(&s->lock);
}

static void answer(struct scripted_vcpu *s, uint64_t value)
{
    if (s->answer_count == s->answer_room) {
        uint32_t room = s->answer_room ? s->answer_room * 2 : 64;
        uint64_t *grown = realloc(s->answers, room * sizeof *grown);
        if (!grown)
            return;
        s->answers = grown;
        s->answer_room = room;
    }
    s->answers[s->answer_count++] = value;
}

static void step(struct lv_vcpu *vcpu, struct scripted_vcpu *s)
{
    struct lv_exit step = s->steps[s->next++];
    if (step.kind == LV_SCRIPT_STORE) {
        store(vcpu->vm, &step);
    } else if (step.kind <= LV_MMIO_WRITE) {
        struct lv_access access = {.address = step.address, .value = step.value, .size = (uint8_t)step.size,
                                   .space = step.kind >= LV_MMIO_READ ? LV_MMIO : LV_PORT, .write = step.kind & 1};
        uint64_t value = lv_access(vcpu, &access);
        if (!access.write && !lv_closing(vcpu->vm))
            answer(s, value);
    } else {
        lv_park(vcpu, &step);
    }
}

static void run(struct lv_engine *engine)
{
    static const struct lv_exit interrupted = {.kind = LV_INTERRUPTED};
    struct lv_vcpu *vcpu = engine->vcpus[0];
    struct scripted_vcpu *s = vcpu->core;
    while (!lv_closing(engine->vm)) {
        uint32_t seq = atomic_load(&engine->seq);
        if (atomic_exchange(&vcpu->kicked, 0)) {
            lv_park(vcpu, &interrupted);
        } else if (s->next < s->count) {
            step(vcpu, s);
            if (advance(engine->vm, STEP_NS, false))
                lv_alarm_due(engine);
        } else if (advance(engine->vm, 0, true)) {
            lv_alarm_due(engine);
        } else {
            lv_engine_wait(engine, seq);
        }
    }
}

static void kick(struct lv_vcpu *vcpu)
{
    (void)vcpu; /* the loop has woken the engine, which looks at `kicked` before each step */
}

static int msr(struct scripted_vcpu *s, struct kvm_msr_entry *entry, bool set)
{
    uint32_t i = 0;
    while (i < s->msr_count && s->msrs[i].index != entry->index)
        i++;
    if (set && i == MSRS_MAX)
        return -ENOSPC;
    if (set) {
        s->msrs[i].index = entry->index;
        s->msrs[i].value = entry->data;
        s->msr_count += i == s->msr_count;
    } else {
        entry->data = i < s->msr_count ? s->msrs[i].value : 0;
    }
    return 0;
}

static int msrs(struct scripted_vcpu *s, struct kvm_msrs *data, size_t size, bool set)
{
    if (size < sizeof *data || size != sizeof *data + (size_t)data->nmsrs * sizeof data->entries[0])
        return -EINVAL;
    for (uint32_t i = 0; i < data->nmsrs; i++)
        if (msr(s, &data->entries[i], set))
            return (int)i;
    return (int)data->nmsrs;
}

static int get_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, void *data, size_t size)
{
    struct scripted_vcpu *s = vcpu->core;
    return kind == LV_STATE_MSRS ? msrs(s, data, size, false) : get_blob(s->blobs, (int)kind, data, size);
}

static int set_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, const void *data, size_t size)
{
    struct scripted_vcpu *s = vcpu->core;
    return kind == LV_STATE_MSRS ? msrs(s, (void *)data, size, true) : set_blob(s->blobs, (int)kind, data, size);
}

static int set_cpuid(struct lv_vcpu *vcpu, const struct kvm_cpuid_entry2 *entries, uint32_t count)
{
    (void)vcpu, (void)entries, (void)count;
    return 0;
}

static int set_debug(struct lv_vcpu *vcpu, const struct lv_debug *debug)
{
    (void)vcpu, (void)debug;
    return 0;
}

static int nmi(struct lv_vcpu *vcpu)
{
    /* As the MSI that would deliver it: delivery mode 4 (SDM 3A 11.11.2). */
    return record(vcpu->vm, &(struct lv_interrupt){.msi = true, .gsi_or_data = 4u << 8,
                                                   .address = 0xfee00000u | (uint64_t)vcpu->index << 12});
}

const struct lv_ops lv_scripted_ops = {
    .name = "scripted",
    .vm_create = vm_create, .vm_destroy = vm_destroy,
    .vcpu_create = vcpu_create, .vcpu_destroy = vcpu_destroy,
    .run = run, .kick = kick,
    .set_slot = set_slot, .dirty_log = dirty_log,
    .set_irq = set_irq, .signal_msi = signal_msi,
    .now = now, .set_alarm = set_alarm,
    .get_vcpu = get_vcpu, .set_vcpu = set_vcpu, .get_vm = get_vm, .set_vm = set_vm,
    .set_cpuid = set_cpuid, .set_debug = set_debug, .nmi = nmi,
};
