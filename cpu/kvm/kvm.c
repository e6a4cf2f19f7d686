/* The KVM core: one native thread a vCPU around KVM_RUN (Linux: Documentation/virt/kvm/api.rst, "the KVM API").
 *
 * Kick: a signal that is blocked in every thread of ours and unblocked only inside KVM_RUN (KVM_SET_SIGNAL_MASK, API 4.40).
 * It stays pending until KVM_RUN looks, so no kick is lost, and no handler ever runs: the process's signal dispositions
 * are untouched. No real-time signal: those are refused when the user's RLIMIT_SIGPENDING is used up (signal(7)), and a kick
 * that is not sent leaves close() waiting. SIGSTKFLT is one that nothing sends.
 */
#define _GNU_SOURCE
#include "kvm/kvm_core.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef KVM_CAP_EXIT_ON_EMULATION_FAILURE
#define KVM_CAP_EXIT_ON_EMULATION_FAILURE 204
#endif
#define KICK_SIGNAL SIGSTKFLT

enum {
    TSS_ADDRESS = 0xfffbd000u,          /* three pages below the firmware area, outside all RAM */
    IDENTITY_MAP_ADDRESS = 0xfffbc000u,
    GSI_COUNT = 24,
    ROUTES_MAX = 4096,
    CPUID_MAX = 256,
    CLEAR_PAGES = 1 << 18,              /* pages (1 GiB) that one call write-protects, so that none holds KVM's lock for long */
    UNKNOWN_EXIT = 0x10000,             /* InternalError.suberror of an exit reason that we do not know: this + reason */
};

/* ---- the VM ---- */

static int load_routes(int fd, const struct lv_route *routes, uint32_t count)
{
    if (count > ROUTES_MAX)
        return -ENOSPC;
    struct kvm_irq_routing *table = calloc(1, sizeof *table + (2 * GSI_COUNT + count) * sizeof table->entries[0]);
    if (!table)
        return -ENOMEM;
    for (uint32_t gsi = 0; gsi < GSI_COUNT; gsi++) {
        if (gsi == 2)
            continue; /* the cascade: IOAPIC pin 2 is driven by GSI 0 */
        if (gsi < 16)
            table->entries[table->nr++] = (struct kvm_irq_routing_entry){
                .gsi = gsi, .type = KVM_IRQ_ROUTING_IRQCHIP,
                .u.irqchip = {.irqchip = gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, .pin = gsi & 7}};
        table->entries[table->nr++] = (struct kvm_irq_routing_entry){
            .gsi = gsi, .type = KVM_IRQ_ROUTING_IRQCHIP,
            .u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = gsi ? gsi : 2}};
    }
    for (uint32_t i = 0; i < count; i++)
        table->entries[table->nr++] = (struct kvm_irq_routing_entry){
            .gsi = routes[i].gsi, .type = KVM_IRQ_ROUTING_MSI,
            .u.msi = {.address_lo = (uint32_t)routes[i].address, .address_hi = (uint32_t)(routes[i].address >> 32),
                      .data = routes[i].data}};
    int r = call(fd, KVM_SET_GSI_ROUTING, table);
    free(table);
    return r;
}

/* The interrupt controllers, the PIT and their routes, once. Not made with the VM but when the first of them or a vCPU is
 * wanted: a memory slot that is set after them waits 5 to 7 ms for the kernel to reclaim what their registration
 * replaced, one that is set before them 30 us (tests.bench start). */
int lv_kvm_need_chips(struct lv_vm *vm)
{
    struct kvm_core_vm *k = vm->core;
    if (atomic_load(&k->chips))
        return 0;
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    int r = 0;
    pthread_mutex_lock(&k->lock);
    if (!k->chips) {
        r = call(k->fd, KVM_CREATE_IRQCHIP, NULL);
        if (r >= 0 && vm->config.pit)
            r = call(k->fd, KVM_CREATE_PIT2, &pit);
        if (r >= 0)
            r = load_routes(k->fd, NULL, 0);
        k->chips = r >= 0;
    }
    pthread_mutex_unlock(&k->lock);
    return r < 0 ? r : 0;
}

static int set_routes(struct lv_vm *vm, const struct lv_route *routes, uint32_t count)
{
    int r = lv_kvm_need_chips(vm);
    return r < 0 ? r : load_routes(vm_fd(vm), routes, count);
}

static void vm_destroy(struct lv_vm *vm)
{
    struct kvm_core_vm *k = vm->core;
    if (!k)
        return;
    if (k->fd >= 0)
        close(k->fd);
    for (unsigned i = 0; i < LV_MAX_SLOTS; i++)
        free(k->slots[i].written);
    pthread_rwlock_destroy(&k->guest_mode);
    pthread_mutex_destroy(&k->lock);
    free(k);
    vm->core = NULL;
}

static int vm_create(struct lv_vm *vm)
{
    if (vm->config.virtual_clock)
        return -ENOTSUP;
    struct kvm_core_vm *k = calloc(1, sizeof *k);
    if (!k)
        return -ENOMEM;
    vm->core = k;
    pthread_mutex_init(&k->lock, NULL);
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&k->guest_mode, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    uint64_t identity = IDENTITY_MAP_ADDRESS;
    int r = k->fd = call(vm->config.system_fd, KVM_CREATE_VM, NULL);
    if (r >= 0) {
        k->run_size = (size_t)call(vm->config.system_fd, KVM_GET_VCPU_MMAP_SIZE, NULL);
        r = k->run_size < sizeof(struct kvm_run) ? -EINVAL : 0;
    }
    struct kvm_enable_cap failures = {.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};
    if (r >= 0 && vm->config.finish) /* API 7.32: else a program in the guest gets #UD. Older kernels do not have it. */
        call(k->fd, KVM_ENABLE_CAP, &failures);
    struct kvm_enable_cap manual = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}};
    if (r >= 0) /* API 7.18. Without it one call reads, clears and write-protects the whole slot under KVM's lock. */
        k->clears_log = call(k->fd, KVM_ENABLE_CAP, &manual) >= 0;
    if (r >= 0)
        r = call(k->fd, KVM_SET_TSS_ADDR, (void *)(uintptr_t)TSS_ADDRESS);
    if (r >= 0)
        r = call(k->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity);
    if (r < 0) {
        vm_destroy(vm);
        return r;
    }
    return 0;
}

static int set_slot(struct lv_vm *vm, uint32_t slot, uint64_t gpa, uint64_t size, void *host, bool readonly, bool log_dirty)
{
    struct kvm_core_vm *k = vm->core;
    struct kvm_userspace_memory_region region = {
        .slot = slot, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)host,
        .flags = (readonly ? KVM_MEM_READONLY : 0) | (log_dirty ? KVM_MEM_LOG_DIRTY_PAGES : 0)};
    int r = call(k->fd, KVM_SET_USER_MEMORY_REGION, &region);
    if (r < 0)
        return r;
    uint8_t *written = log_dirty ? calloc((size >> 15) + 1, 1) : NULL;
    if (log_dirty && !written)
        return -ENOMEM;
    pthread_mutex_lock(&k->lock);
    free(k->slots[slot].written);
    k->slots[slot] = (struct kvm_slot){.gpa = gpa, .size = size, .host = host, .readonly = readonly, .written = written};
    pthread_mutex_unlock(&k->lock);
    return 0;
}

static int dirty_log(struct lv_vm *vm, uint32_t slot, uint8_t *bitmap, size_t size)
{
    const struct kvm_core_vm *k = vm->core;
    struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};
    int r = call(k->fd, KVM_GET_DIRTY_LOG, &log);
    /* A page that is written between both calls stays in the result and is clean afterwards: the caller copies it later. */
    uint64_t pages = k->slots[slot].size / 4096;
    for (uint64_t first = 0; r >= 0 && k->clears_log && first < pages; first += CLEAR_PAGES) {
        const uint8_t *part = bitmap + first / 8;
        uint64_t count = pages - first < CLEAR_PAGES ? pages - first : CLEAR_PAGES;
        size_t bytes = first / 8 + (count + 7) / 8 <= size ? (size_t)(count + 7) / 8 : 0;
        if (!bytes || (!part[0] && !memcmp(part, part + 1, bytes - 1)))
            continue;
        struct kvm_clear_dirty_log clear = {.slot = slot, .num_pages = (uint32_t)count, .first_page = first,
                                            .dirty_bitmap = (void *)part};
        r = call(k->fd, KVM_CLEAR_DIRTY_LOG, &clear);
    }
    pthread_mutex_lock(&((struct kvm_core_vm *)vm->core)->lock);
    uint8_t *written = k->slots[slot].written;
    for (size_t i = 0; r >= 0 && written && i < (pages + 7) / 8 && i < size; i++) {
        bitmap[i] |= written[i];
        written[i] = 0;
    }
    pthread_mutex_unlock(&((struct kvm_core_vm *)vm->core)->lock);
    return r;
}

static int set_irq(struct lv_vm *vm, uint32_t gsi, bool level)
{
    struct kvm_irq_level line = {.irq = gsi, .level = level};
    int r = lv_kvm_need_chips(vm);
    return r < 0 ? r : call(vm_fd(vm), KVM_IRQ_LINE, &line);
}

static int signal_msi(struct lv_vm *vm, uint64_t address, uint32_t data)
{
    struct kvm_msi msi = {.address_lo = (uint32_t)address, .address_hi = (uint32_t)(address >> 32), .data = data};
    int r = lv_kvm_need_chips(vm);
    if (r >= 0)
        r = call(vm_fd(vm), KVM_SIGNAL_MSI, &msi);
    return r < 0 ? r : 0; /* 0: blocked by the guest, 1: delivered */
}

static int irqfd(struct lv_vm *vm, int fd, uint32_t gsi, int resample_fd, bool add)
{
    struct kvm_irqfd request = {.fd = (uint32_t)fd, .gsi = gsi, .flags = add ? 0 : KVM_IRQFD_FLAG_DEASSIGN};
    if (add && resample_fd >= 0) {
        request.flags |= KVM_IRQFD_FLAG_RESAMPLE;
        request.resamplefd = (uint32_t)resample_fd;
    }
    int r = lv_kvm_need_chips(vm);
    return r < 0 ? r : call(vm_fd(vm), KVM_IRQFD, &request);
}

static int ioeventfd(struct lv_vm *vm, int fd, uint8_t space, uint64_t address, uint32_t size, bool has_match,
                     uint64_t match, bool add)
{
    struct kvm_ioeventfd request = {.datamatch = match, .addr = address, .len = size, .fd = fd};
    request.flags = (space == LV_PORT ? KVM_IOEVENTFD_FLAG_PIO : 0) | (has_match ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0) |
                    (add ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN);
    return call(vm_fd(vm), KVM_IOEVENTFD, &request);
}

/* ---- a vCPU ---- */

static void vcpu_destroy(struct lv_vcpu *vcpu)
{
    struct kvm_core_vcpu *k = vcpu->core;
    if (!k)
        return;
    lv_kvm_finish_destroy(k->finish);
    free(k->cpuid);
    if (k->run)
        munmap(k->run, k->run_size);
    if (k->fd >= 0)
        close(k->fd);
    free(k);
    vcpu->core = NULL;
}

static int vcpu_create(struct lv_vcpu *vcpu)
{
    struct kvm_core_vm *vm = vcpu->vm->core;
    struct kvm_core_vcpu *k = calloc(1, sizeof *k);
    if (!k)
        return -ENOMEM;
    vcpu->core = k;
    k->fd = -1;
    int r = lv_kvm_need_chips(vcpu->vm);
    if (r >= 0)
        r = k->fd = call(vm->fd, KVM_CREATE_VCPU, (void *)(uintptr_t)vcpu->index);
    if (r >= 0) {
        k->run_size = vm->run_size;
        k->run = mmap(NULL, k->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, k->fd, 0);
        if (k->run == MAP_FAILED) {
            r = -errno;
            k->run = NULL;
        }
    }
    /* Inside KVM_RUN everything is blocked but the kick. The kernel's sigset is 8 bytes. */
    struct { struct kvm_signal_mask head; uint8_t bits[8]; } mask = {.head.len = 8};
    uint64_t bits = ~(1ull << (KICK_SIGNAL - 1));
    memcpy(mask.head.sigset, &bits, sizeof bits);
    if (r >= 0)
        r = call(k->fd, KVM_SET_SIGNAL_MASK, &mask);
    if (r < 0) {
        vcpu_destroy(vcpu);
        return r;
    }
    return 0;
}

static void kick(struct lv_vcpu *vcpu)
{
    int tid = atomic_load(&vcpu->engine->tid);
    /* Without a thread id yet: the thread looks at `kicked` and `closing` before it enters the guest. */
    if (tid)
        syscall(SYS_tgkill, getpid(), tid, KICK_SIGNAL);
}

static void drain_kicks(void)
{
    sigset_t set;
    struct timespec none = {0};
    sigemptyset(&set);
    sigaddset(&set, KICK_SIGNAL);
    while (sigtimedwait(&set, NULL, &none) > 0)
        ;
}

/* The bytes at CS:RIP, for an emulation failure that came without them. */
static void read_instruction(struct lv_vcpu *vcpu, struct lv_exit *exit, uint64_t linear)
{
    struct kvm_core_vm *vm = vcpu->vm->core;
    pthread_mutex_lock(&vm->lock);
    for (exit->insn_size = 0; exit->insn_size < LV_INSN_MAX;) {
        struct kvm_translation t = {.linear_address = linear + exit->insn_size};
        if (call(vcpu_fd(vcpu), KVM_TRANSLATE, &t) < 0 || !t.valid)
            break;
        const uint8_t *byte = NULL;
        for (int i = 0; i < LV_MAX_SLOTS && !byte; i++)
            if (vm->slots[i].size && t.physical_address - vm->slots[i].gpa < vm->slots[i].size)
                byte = vm->slots[i].host + (t.physical_address - vm->slots[i].gpa);
        if (!byte)
            break;
        exit->insn[exit->insn_size++] = *byte;
    }
    pthread_mutex_unlock(&vm->lock);
}

void lv_kvm_failed_instruction(struct lv_vcpu *vcpu, struct lv_exit *exit, uint64_t linear)
{
    const struct kvm_run *run = ((struct kvm_core_vcpu *)vcpu->core)->run;
    uint32_t n = run->emulation_failure.insn_size;
    if (run->emulation_failure.ndata >= 3 &&
        (run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)) {
        exit->insn_size = (uint8_t)(n < LV_INSN_MAX ? n : LV_INSN_MAX);
        memcpy(exit->insn, run->emulation_failure.insn_bytes, exit->insn_size);
    }
    if (!exit->insn_size)
        read_instruction(vcpu, exit, linear);
}

static void park_internal_error(struct lv_vcpu *vcpu, int64_t suberror)
{
    struct kvm_core_vcpu *k = vcpu->core;
    struct lv_exit exit = {.kind = LV_INTERNAL_ERROR, .code = (uint64_t)suberror};
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    if (k->run->exit_reason == KVM_EXIT_INTERNAL_ERROR && suberror >= 0 && suberror < UNKNOWN_EXIT) {
        exit.ndata = k->run->internal.ndata < LV_EXIT_DATA ? k->run->internal.ndata : LV_EXIT_DATA;
        memcpy(exit.data, k->run->internal.data, exit.ndata * sizeof exit.data[0]);
    }
    if (call(k->fd, KVM_GET_REGS, &regs) >= 0) {
        exit.rip = regs.rip;
        if (call(k->fd, KVM_GET_SREGS, &sregs) < 0)
            ;
        else if (k->run->exit_reason == KVM_EXIT_INTERNAL_ERROR && suberror == KVM_INTERNAL_ERROR_EMULATION)
            lv_kvm_failed_instruction(vcpu, &exit, sregs.cs.base + regs.rip);
        else
            read_instruction(vcpu, &exit, sregs.cs.base + regs.rip);
    }
    lv_park(vcpu, &exit);
}

static uint64_t rip_of(struct lv_vcpu *vcpu)
{
    struct kvm_regs regs = {0};
    call(vcpu_fd(vcpu), KVM_GET_REGS, &regs);
    return regs.rip;
}

static void do_port(struct lv_vcpu *vcpu, struct kvm_core_vcpu *k)
{
    /* Copied once: the page is shared with the kernel only, but KVM_RUN reuses it. */
    uint32_t count = k->run->io.count;
    uint8_t size = k->run->io.size;
    uint64_t offset = k->run->io.data_offset;
    bool write = k->run->io.direction == KVM_EXIT_IO_OUT;
    if ((size != 1 && size != 2 && size != 4) || offset > k->run_size || (uint64_t)count * size > k->run_size - offset) {
        park_internal_error(vcpu, UNKNOWN_EXIT + KVM_EXIT_IO);
        return;
    }
    struct lv_access access = {.address = k->run->io.port, .size = size, .space = LV_PORT, .write = write};
    uint8_t *data = (uint8_t *)k->run + offset;
    for (uint32_t i = 0; i < count && !lv_closing(vcpu->vm); i++, data += size) {
        access.value = 0;
        if (write)
            memcpy(&access.value, data, size);
        uint64_t value = lv_access(vcpu, &access);
        if (!write)
            memcpy(data, &value, size);
    }
}

static void do_mmio(struct lv_vcpu *vcpu, struct kvm_core_vcpu *k)
{
    uint32_t left = k->run->mmio.len < 8 ? k->run->mmio.len : 8;
    uint8_t *data = k->run->mmio.data;
    struct lv_access access = {.address = k->run->mmio.phys_addr, .space = LV_MMIO, .write = k->run->mmio.is_write};
    /* An access that crosses a page arrives in parts of any length: as powers of two, lowest address first. */
    while (left && !lv_closing(vcpu->vm)) {
        access.size = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        access.value = 0;
        if (access.write)
            memcpy(&access.value, data, access.size);
        uint64_t value = lv_access(vcpu, &access);
        if (!access.write)
            memcpy(data, &value, access.size);
        data += access.size;
        access.address += access.size;
        left -= access.size;
    }
}

static void park_system_event(struct lv_vcpu *vcpu, struct kvm_core_vcpu *k)
{
    struct lv_exit exit = {.kind = LV_SYSTEM_EVENT, .code = k->run->system_event.type};
    exit.ndata = k->run->system_event.ndata < LV_EXIT_DATA ? k->run->system_event.ndata : LV_EXIT_DATA;
    memcpy(exit.data, k->run->system_event.data, exit.ndata * sizeof exit.data[0]);
    lv_park(vcpu, &exit);
}

static void handle(struct lv_vcpu *vcpu, struct kvm_core_vcpu *k)
{
    struct lv_exit exit = {0};
    switch (k->run->exit_reason) {
    case KVM_EXIT_IO:
        do_port(vcpu, k);
        return;
    case KVM_EXIT_MMIO:
        do_mmio(vcpu, k);
        return;
    case KVM_EXIT_HLT:
        exit.kind = LV_HALT;
        break;
    case KVM_EXIT_SHUTDOWN:
        exit.kind = LV_SHUTDOWN;
        break;
    case KVM_EXIT_FAIL_ENTRY:
        exit.kind = LV_FAIL_ENTRY;
        exit.code = k->run->fail_entry.hardware_entry_failure_reason;
        exit.extra = k->run->fail_entry.cpu;
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        park_system_event(vcpu, k);
        return;
    case KVM_EXIT_DEBUG:
        exit = lv_kvm_debug_exit(k);
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        switch (k->run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION ? lv_kvm_finish(vcpu) : LV_NOT_FINISHED) {
        case LV_FINISHED:
            if (!k->stepping)
                return;
            exit = (struct lv_exit){.kind = LV_DEBUG, .rip = rip_of(vcpu), .code = LV_DR6_STEP, .extra = 1};
            break;
        case LV_FINISHED_SHUTDOWN:
            exit.kind = LV_SHUTDOWN;
            break;
        default:
            park_internal_error(vcpu, k->run->internal.suberror);
            return;
        }
        break;
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
        return;
    default:
        park_internal_error(vcpu, UNKNOWN_EXIT + (int64_t)k->run->exit_reason);
        return;
    }
    lv_park(vcpu, &exit);
}

static void run(struct lv_engine *engine)
{
    static const struct lv_exit interrupted = {.kind = LV_INTERRUPTED};
    struct lv_vcpu *vcpu = engine->vcpus[0];
    struct kvm_core_vcpu *k = vcpu->core;
    pthread_rwlock_t *guest_mode = &((struct kvm_core_vm *)vcpu->vm->core)->guest_mode;
    while (!lv_closing(vcpu->vm)) {
        uint32_t seq = atomic_load(&engine->seq);
        if (k->frozen && !atomic_load(&vcpu->kicked)) {
            lv_engine_wait(engine, seq);
            continue;
        }
        /* With immediate_exit KVM_RUN still completes the instruction that the last exit was in (API 5, kvm_run). */
        k->run->immediate_exit = atomic_load(&vcpu->kicked) != 0;
        pthread_rwlock_rdlock(guest_mode);
        int ran = ioctl(k->fd, KVM_RUN, NULL), error = errno;
        pthread_rwlock_unlock(guest_mode);
        if (ran >= 0) {
            handle(vcpu, k);
            continue;
        }
        if (error == EINTR || error == EAGAIN) {
            /* A kick; or SIGSTOP and a debugger, which concern nobody here; or an AP that got INIT. */
            drain_kicks();
            if (atomic_exchange(&vcpu->kicked, 0))
                lv_park(vcpu, &interrupted);
        } else {
            park_internal_error(vcpu, -error);
        }
    }
}

static int set_cpuid(struct lv_vcpu *vcpu, const struct kvm_cpuid_entry2 *entries, uint32_t count)
{
    if (count > CPUID_MAX)
        return -E2BIG;
    struct kvm_cpuid2 *table = calloc(1, sizeof *table + count * sizeof *entries);
    if (!table)
        return -ENOMEM;
    table->nent = count;
    memcpy(table->entries, entries, count * sizeof *entries);
    int r = call(vcpu_fd(vcpu), KVM_SET_CPUID2, table);
    free(table);
    if (r < 0)
        return r;
    struct kvm_core_vcpu *k = vcpu->core;
    struct kvm_cpuid_entry2 *copy = calloc(count ? count : 1, sizeof *entries);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, entries, count * sizeof *entries);
    free(k->cpuid);
    k->cpuid = copy;
    k->cpuid_count = count;
    lv_kvm_finish_destroy(k->finish); /* it has the old one */
    k->finish = NULL;
    return r;
}

static int stood_still(struct lv_vcpu *vcpu)
{
    int r = call(vcpu_fd(vcpu), KVM_KVMCLOCK_CTRL, NULL);
    return r == -EINVAL ? 0 : r; /* the guest does not use kvmclock */
}

static uint32_t stats(struct lv_vm *vm, struct lv_stat *out, uint32_t max)
{
    if (max)
        *out = (struct lv_stat){"finished", atomic_load(&((struct kvm_core_vm *)vm->core)->finished)};
    return max ? 1 : 0;
}

static uint32_t last_finished(struct lv_vm *vm, uint8_t *bytes)
{
    struct kvm_core_vm *k = vm->core;
    pthread_mutex_lock(&k->lock);
    uint32_t size = k->sample_size;
    memcpy(bytes, k->sample, size);
    pthread_mutex_unlock(&k->lock);
    return size;
}

/* In a forked child: the threads are not here. */
static void forked(struct lv_vm *vm)
{
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        if (vm->vcpus[i] && vm->vcpus[i]->core)
            lv_kvm_finish_forked(((struct kvm_core_vcpu *)vm->vcpus[i]->core)->finish);
}

static int nmi(struct lv_vcpu *vcpu)
{
    /* Not KVM_NMI: a vCPU's ioctls wait for KVM_RUN to return. As a message, delivery mode 4 (SDM 3A 11.11). */
    return signal_msi(vcpu->vm, 0xfee00000u | (uint64_t)vcpu->index << 12, 4u << 8);
}

const struct lv_ops lv_kvm_ops = {
    .name = "kvm",
    .vm_create = vm_create, .vm_destroy = vm_destroy,
    .vcpu_create = vcpu_create, .vcpu_destroy = vcpu_destroy,
    .run = run, .kick = kick,
    .set_slot = set_slot, .dirty_log = dirty_log,
    .set_irq = set_irq, .signal_msi = signal_msi, .set_routes = set_routes, .irqfd = irqfd, .ioeventfd = ioeventfd,
    .get_vcpu = lv_kvm_get_vcpu, .set_vcpu = lv_kvm_set_vcpu, .get_vm = lv_kvm_get_vm, .set_vm = lv_kvm_set_vm,
    .stood_still = stood_still, .set_cpuid = set_cpuid, .set_debug = lv_kvm_set_debug, .translate = lv_kvm_translate,
    .nmi = nmi, .forked = forked, .stats = stats, .last_finished = last_finished,
};
