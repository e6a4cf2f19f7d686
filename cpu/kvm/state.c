/* State of the KVM core's VMs and vCPUs: the structures of the KVM API, as they are. */
#include "kvm/kvm_core.h"

#include <string.h>

/* uint64_t: kHz, of all vCPUs alike. */
static int transfer_tsc(struct lv_vm *vm, void *data, size_t size, bool set)
{
    enum { TOLERANCE_PPM = 250 }; /* what KVM itself takes for the same rate (its parameter tsc_tolerance_ppm) */
    uint64_t wanted = 0;
    if (size < sizeof wanted || (set && size != sizeof wanted))
        return -EINVAL;
    /* Without it KVM accepts a higher rate and corrects it at each entry only, and leaves a lower one half set. */
    bool scales = call(vm_fd(vm), KVM_CHECK_EXTENSION, (void *)KVM_CAP_TSC_CONTROL) > 0;
    if (set)
        memcpy(&wanted, data, sizeof wanted);
    if (wanted > UINT32_MAX)
        return -ENOTSUP;
    for (uint32_t i = 0; i < vm->config.vcpus; i++) {
        int khz = vm->vcpus[i] ? call(vcpu_fd(vm->vcpus[i]), KVM_GET_TSC_KHZ, NULL) : -ENOENT;
        if (khz <= 0)
            khz = 0;
        if (!set) {
            uint64_t found = (uint64_t)khz;
            memcpy(data, &found, sizeof found);
            return (int)sizeof found;
        }
        uint64_t apart = wanted > (uint64_t)khz ? wanted - (uint64_t)khz : (uint64_t)khz - wanted;
        if (apart * 1000000 <= TOLERANCE_PPM * wanted || !vm->vcpus[i])
            continue;
        if (!scales || call(vcpu_fd(vm->vcpus[i]), KVM_SET_TSC_KHZ, (void *)(uintptr_t)wanted) < 0)
            return -ENOTSUP;
    }
    return (int)sizeof wanted;
}

static int transfer_vm(struct lv_vm *vm, enum lv_state_kind kind, void *data, size_t size, bool set)
{
    static const uint32_t chips[] = {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC};
    unsigned long request;
    size_t exact;
    switch ((int)kind) {
    case LV_STATE_PIC_MASTER:
    case LV_STATE_PIC_SLAVE:
    case LV_STATE_IOAPIC:
        request = set ? KVM_SET_IRQCHIP : KVM_GET_IRQCHIP;
        exact = sizeof(struct kvm_irqchip);
        if (!set && size >= exact)
            ((struct kvm_irqchip *)data)->chip_id = chips[kind - LV_STATE_PIC_MASTER];
        else if (size == exact && ((struct kvm_irqchip *)data)->chip_id != chips[kind - LV_STATE_PIC_MASTER])
            return -EINVAL;
        break;
    case LV_STATE_PIT:
        request = set ? KVM_SET_PIT2 : KVM_GET_PIT2;
        exact = sizeof(struct kvm_pit_state2);
        break;
    case LV_STATE_CLOCK:
        request = set ? KVM_SET_CLOCK : KVM_GET_CLOCK;
        exact = sizeof(struct kvm_clock_data);
        break;
    case LV_STATE_CORE:
        return 0; /* nothing of its own; another core's turns mean nothing here */
    case LV_STATE_TSC:
        return transfer_tsc(vm, data, size, set);
    default:
        return -EINVAL;
    }
    if (size < exact || (set && size != exact))
        return -EINVAL;
    struct kvm_clock_data clock;
    if (set && kind == LV_STATE_CLOCK) {
        /* The clock goes on where it stood; host time that passed in between (KVM_CLOCK_REALTIME) is not added. */
        memcpy(&clock, data, sizeof clock);
        clock.flags = 0;
        data = &clock;
    }
    int r = lv_kvm_need_chips(vm);
    if (r >= 0)
        r = call(vm_fd(vm), request, data);
    return r < 0 ? r : (int)exact;
}

int lv_kvm_get_vm(struct lv_vm *vm, enum lv_state_kind kind, void *data, size_t size)
{
    return transfer_vm(vm, kind, data, size, false);
}

int lv_kvm_set_vm(struct lv_vm *vm, enum lv_state_kind kind, const void *data, size_t size)
{
    return transfer_vm(vm, kind, (void *)data, size, true);
}

enum { MSR_TSC = 0x10, NEAR_MS = 10 };

static int tsc_offset(const struct lv_vcpu *vcpu, unsigned long request, uint64_t *offset)
{
    struct kvm_device_attr attribute = {.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)offset};
    return call(vcpu_fd(vcpu), request, &attribute);
}

/* KVM takes a TSC that is written within a second of what another vCPU, or this one, had for the same one and leaves it
 * (virt/kvm/devices/vcpu.rst 4.1): a restored guest's would jump back. Its offset is set instead, the first vCPU's where
 * both are within what it takes to read them one after the other. Before Linux 5.16 KVM's guess has to do. */
static void set_tsc(struct lv_vcpu *vcpu, uint64_t wanted)
{
    struct { struct kvm_msrs head; struct kvm_msr_entry entry; } now = {.head.nmsrs = 1, .entry.index = MSR_TSC};
    const struct lv_vcpu *first = vcpu->vm->vcpus[0];
    uint64_t offset, other;
    if (tsc_offset(vcpu, KVM_GET_DEVICE_ATTR, &offset) < 0 || call(vcpu_fd(vcpu), KVM_GET_MSRS, &now) != 1)
        return;
    offset += wanted - now.entry.data;
    int khz = call(vcpu_fd(vcpu), KVM_GET_TSC_KHZ, NULL);
    uint64_t near = khz > 0 ? (uint64_t)khz * NEAR_MS : 0;
    if (first && first != vcpu && tsc_offset(first, KVM_GET_DEVICE_ATTR, &other) >= 0 && other - offset + near <= 2 * near)
        offset = other;
    tsc_offset(vcpu, KVM_SET_DEVICE_ATTR, &offset);
}

static int msrs(struct lv_vcpu *vcpu, unsigned long request, void *data, size_t size)
{
    const struct kvm_msrs *head = data;
    if (size < sizeof *head || size != sizeof *head + (size_t)head->nmsrs * sizeof head->entries[0])
        return -EINVAL;
    int done = call(vcpu_fd(vcpu), request, data);
    for (int i = 0; request == KVM_SET_MSRS && i < done; i++)
        if (head->entries[i].index == MSR_TSC)
            set_tsc(vcpu, head->entries[i].data);
    return done;
}

static int transfer_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, void *data, size_t size, bool set)
{
    static const struct { unsigned long get, set; size_t size; } table[LV_VCPU_STATES] = {
        [LV_STATE_REGS] = {KVM_GET_REGS, KVM_SET_REGS, sizeof(struct kvm_regs)},
        [LV_STATE_SREGS] = {KVM_GET_SREGS, KVM_SET_SREGS, sizeof(struct kvm_sregs)},
        [LV_STATE_XSAVE] = {KVM_GET_XSAVE, KVM_SET_XSAVE, 4096},
        [LV_STATE_XCRS] = {KVM_GET_XCRS, KVM_SET_XCRS, sizeof(struct kvm_xcrs)},
        [LV_STATE_LAPIC] = {KVM_GET_LAPIC, KVM_SET_LAPIC, sizeof(struct kvm_lapic_state)},
        [LV_STATE_EVENTS] = {KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, sizeof(struct kvm_vcpu_events)},
        [LV_STATE_DEBUGREGS] = {KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, sizeof(struct kvm_debugregs)},
        [LV_STATE_MP] = {KVM_GET_MP_STATE, KVM_SET_MP_STATE, sizeof(struct kvm_mp_state)},
    };
    if (kind == LV_STATE_EXTRA)
        return 0; /* nothing of its own; another core's means nothing here */
    if (kind == LV_STATE_MSRS)
        return msrs(vcpu, set ? KVM_SET_MSRS : KVM_GET_MSRS, data, size);
    if ((unsigned)kind >= LV_VCPU_STATES || size < table[kind].size || (set && size != table[kind].size))
        return -EINVAL;
    int r = call(vcpu_fd(vcpu), set ? table[kind].set : table[kind].get, data);
    return r < 0 ? r : (int)table[kind].size;
}

int lv_kvm_get_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, void *data, size_t size)
{
    return transfer_vcpu(vcpu, kind, data, size, false);
}

int lv_kvm_set_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, const void *data, size_t size)
{
    return transfer_vcpu(vcpu, kind, (void *)data, size, true);
}

