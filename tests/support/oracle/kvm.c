/* One instruction at CPL 3 of a guest of the host's KVM (guest.c). */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest.h"

static int vcpu;
static struct kvm_run *shared;
static struct guest guest;

static const struct {
    unsigned long get, set;
} requests[] = {
    [SOFT_STATE_REGS] = {KVM_GET_REGS, KVM_SET_REGS},
    [SOFT_STATE_SREGS] = {KVM_GET_SREGS, KVM_SET_SREGS},
    [SOFT_STATE_XSAVE] = {KVM_GET_XSAVE, KVM_SET_XSAVE},
    [SOFT_STATE_XCRS] = {KVM_GET_XCRS, KVM_SET_XCRS},
};

static void get(enum soft_state kind, void *data, size_t size)
{
    (void)size;
    if (ioctl(vcpu, requests[kind].get, data) < 0)
        guest_die(&guest, "get state");
}

static void set(enum soft_state kind, const void *data, size_t size)
{
    (void)size;
    if (ioctl(vcpu, requests[kind].set, data) < 0)
        guest_die(&guest, "set state");
}

/* An instruction that does not end ends the program: see native.c's handler of SIGALRM. */
static unsigned run(void)
{
    alarm(20);
    int result = ioctl(vcpu, KVM_RUN, 0);
    alarm(0);
    return result < 0 ? 100 : shared->exit_reason == KVM_EXIT_HLT ? 0 : shared->exit_reason ? shared->exit_reason : 99;
}

static struct guest guest = {.name = "kvm", .get = get, .set = set, .run = run};

bool kvm_init(void)
{
    int system = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (system < 0)
        return false;
    guest_memory(&guest);
    int vm = ioctl(system, KVM_CREATE_VM, 0);
    struct kvm_userspace_memory_region slot = {.memory_size = GUEST_RAM, .userspace_addr = (uintptr_t)guest.ram};
    if (vm < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
        guest_die(&guest, "create a VM");
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    int size = ioctl(system, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (vcpu < 0 || size < 0)
        guest_die(&guest, "create a vCPU");
    shared = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    enum { ROOM = 256 };
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + ROOM * sizeof cpuid->entries[0]);
    if (shared == MAP_FAILED || !cpuid)
        guest_die(&guest, "memory");
    cpuid->nent = ROOM;
    if (ioctl(system, KVM_GET_SUPPORTED_CPUID, cpuid) < 0 || ioctl(vcpu, KVM_SET_CPUID2, cpuid) < 0)
        guest_die(&guest, "CPUID");
    for (uint32_t i = 0; i < cpuid->nent; i++)
        guest.avx |= cpuid->entries[i].function == 1 && cpuid->entries[i].ecx >> 28 & 1;
    free(cpuid);
    guest_registers(&guest);
    return true;
}

void kvm_run(const struct insn *insn, struct cpu_state *state, struct memory *memory)
{
    guest_run(&guest, insn, state, memory);
}
