/* One instruction on the software core, as a guest sees it (guest.c). Uses only the public interface, soft.h. */
#include <stdlib.h>
#include <string.h>

#include "guest.h"

static struct soft_vm *vm;
static struct guest guest;

static uint64_t access_nothing(void *ctx, const struct soft_access *access)
{
    (void)ctx;
    (void)access;
    return ~0ull;
}

static void random_bytes(void *ctx, void *buffer, size_t size)
{
    (void)ctx;
    memset(buffer, 0x5A, size);
}

static void get(enum soft_state kind, void *data, size_t size)
{
    if (soft_vcpu_get(vm, 0, kind, data, size) != 0)
        guest_die(&guest, "get state");
}

static void set(enum soft_state kind, const void *data, size_t size)
{
    if (soft_vcpu_set(vm, 0, kind, data, size) != 0)
        guest_die(&guest, "set state");
}

static void written(uint64_t gpa, uint64_t size) { soft_vm_memory_written(vm, gpa, size); }

static unsigned run(void)
{
    uint32_t vcpu = 0;
    static const struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
    set(SOFT_STATE_MP, &runnable, sizeof runnable);
    enum soft_stop stop = soft_vm_run(vm, &vcpu);
    return stop == SOFT_STOP_HALTED ? 0 : 1 + (unsigned)stop;
}

static struct guest guest = {.name = "core", .get = get, .set = set, .written = written, .run = run};

void core_init(void)
{
    guest_memory(&guest);
    struct soft_config config = {.vcpus = 1, .virtual_clock = true, .virtual_ips = 1000000000, .tsc_khz = 1000000, .quantum = 100000};
    struct soft_host host = {.access = access_nothing, .random = random_bytes};
    vm = soft_vm_create(&config, &host);
    if (!vm || soft_vm_set_slot(vm, 0, 0, GUEST_RAM, guest.ram, false, false) != 0)
        guest_die(&guest, "soft_vm_create");
    uint32_t room = 256, count;
    struct kvm_cpuid_entry2 *entries = calloc(room, sizeof *entries);
    if (!entries)
        guest_die(&guest, "calloc");
    count = soft_supported_cpuid(entries, room);
    if (soft_vcpu_set_cpuid(vm, 0, entries, count) != 0)
        guest_die(&guest, "soft_vcpu_set_cpuid");
    for (uint32_t i = 0; i < count; i++)
        guest.avx |= entries[i].function == 1 && entries[i].ecx >> 28 & 1;
    free(entries);
    guest_registers(&guest);
}

void core_run(const struct insn *insn, struct cpu_state *state, struct memory *memory)
{
    guest_run(&guest, insn, state, memory);
}
