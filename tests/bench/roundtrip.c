/* The floor of exit costs: a C loop around KVM_RUN, no thread loop, nobody asked. Prints one duration in ns a line.
 *
 * usage: roundtrip COUNT BURST HEXCODE    real-mode code for address 0x1000; each of COUNT lines is BURST exits
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static void need(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static unsigned long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (unsigned long long)t.tv_sec * 1000000000u + (unsigned long long)t.tv_nsec;
}

int main(int argc, char **argv)
{
    need(argc == 4, "usage");
    int count = atoi(argv[1]), burst = atoi(argv[2]);
    const char *code = argv[3];
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm = ioctl(kvm, KVM_CREATE_VM, 0);
    need(vm >= 0, "KVM_CREATE_VM");
    unsigned char *memory = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    struct kvm_userspace_memory_region region = {.memory_size = 1 << 16, .userspace_addr = (unsigned long)memory};
    struct kvm_pit_config pit = {0};
    need(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) >= 0 && ioctl(vm, KVM_CREATE_IRQCHIP, 0) >= 0 &&
             ioctl(vm, KVM_CREATE_PIT2, &pit) >= 0 && ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) >= 0, "VM");
    for (size_t i = 0; code[2 * i]; i++)
        sscanf(code + 2 * i, "%2hhx", memory + 0x1000 + i);
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    size_t size = (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    need(ioctl(vcpu, KVM_GET_SREGS, &sregs) >= 0, "sregs");
    sregs.cs.base = sregs.cs.selector = 0;
    need(ioctl(vcpu, KVM_SET_SREGS, &sregs) >= 0 && ioctl(vcpu, KVM_SET_REGS, &regs) >= 0, "registers");
    unsigned long long *rounds = calloc((size_t)count, sizeof *rounds);
    for (int i = 0; i < count; i++) {
        unsigned long long begin = now();
        for (int j = 0; j < burst; j++) {
            need(ioctl(vcpu, KVM_RUN, 0) >= 0, "KVM_RUN");
            need(run->exit_reason == KVM_EXIT_IO, "exit");
        }
        rounds[i] = now() - begin;
    }
    for (int i = 0; i < count; i++)
        printf("%llu\n", rounds[i]);
    return 0;
}
