/* Time: the VM's clock (host monotonic, or instructions retired), the guest's TSC, and kvmclock's pages
 * (Documentation/virt/kvm/x86/msr.rst).
 *
 * TSC and kvmclock are pure functions of the VM's clock, so all three always agree.
 */
#include <errno.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "soft/system/system.h"

enum { NS = 1000000000 };
/* Real clock: a turn is to take so long at most, whatever the guest does, since timers are looked at between turns. */
enum {
    TURN_NS = 250000,
    PACE_LEAST = 4 * 1024,  /* ns for 1024 instructions: about 250 million a second */
    PACE_MOST = 128 * 1024, /* slower ones are a thread that had no processor */
    PACE_FROM = 1000,       /* instructions: a shorter turn tells nothing */
};
enum { READS_MAX = 64 /* so many system calls cost about as much as giving the TSC up once more */ };
typedef unsigned __int128 wide;

static __thread bool tsc_given_up;
static __thread uint32_t reads; /* of the clock since then */

void soft_host_give_up_tsc(void)
{
    reads = 0;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* their run-time libraries read clocks in any thread */
    if (!tsc_given_up)
        tsc_given_up = prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0) == 0;
#endif
}

void soft_host_take_tsc(void)
{
    prctl(PR_SET_TSC, PR_TSC_ENABLE, 0, 0, 0);
    tsc_given_up = false;
}

uint64_t soft_host_now(void)
{
    struct timespec t;
    if (tsc_given_up && ++reads > READS_MAX)
        soft_host_take_tsc();
    if (tsc_given_up)
        syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
    else
        clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS + (uint64_t)t.tv_nsec;
}

static uint64_t total_instructions(const struct soft_vm *vm)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        n += soft_instructions(vm->vcpus[i]);
    return n;
}

uint64_t soft_vm_instructions(struct soft_vm *vm) { return total_instructions(vm); }

uint64_t soft_now(struct soft_vm *vm)
{
    if (!vm->config.virtual_clock)
        return soft_host_now() - vm->start_ns;
    uint64_t n = total_instructions(vm), ips = vm->config.virtual_ips;
    return (ips == NS ? n : (uint64_t)((wide)n * NS / ips)) + vm->virtual_ns_skipped;
}

uint64_t soft_vm_now(struct soft_vm *vm) { return soft_now(vm); }

void soft_set_now(struct soft_vm *vm, uint64_t before, uint64_t now)
{
    if (vm->config.virtual_clock)
        vm->virtual_ns_skipped += now - soft_now(vm);
    else
        vm->start_ns = soft_host_now() - now;
    irqchip_clock_moved(vm->irqchip, before, now);
}

int64_t soft_budget_until(const struct soft_vcpu *c, uint64_t now, uint64_t deadline)
{
    const struct soft_vm *vm = c->vm;
    uint64_t ns = deadline > now ? deadline - now : 0, quantum = vm->config.quantum, n;
    if (vm->config.virtual_clock) {
        uint64_t ips = vm->config.virtual_ips;
        wide exact = ((wide)ns * ips + NS - 1) / NS;
        n = exact > quantum ? quantum : (uint64_t)exact;
        return n ? (int64_t)n : 1;
    }
    if (ns > TURN_NS)
        ns = TURN_NS;
    n = ns * 1024 / (c->pace > PACE_LEAST ? c->pace : PACE_LEAST);
    return (int64_t)(n > quantum ? quantum : n < 2000 ? 2000 : n);
}

void soft_pace(struct soft_vcpu *c, uint64_t ns, uint64_t instructions)
{
    if (instructions < PACE_FROM)
        return;
    uint64_t now = ns * 1024 / instructions;
    c->pace = (uint32_t)((3ull * c->pace + (now < PACE_MOST ? now : PACE_MOST)) / 4);
}

/* ---- TSC ---- */

uint64_t soft_tsc_at(const struct soft_vcpu *c, uint64_t now)
{
    return (uint64_t)((wide)now * c->vm->config.tsc_khz / 1000000) + c->tsc_offset;
}

uint64_t soft_tsc_to_ns(const struct soft_vcpu *c, uint64_t tsc)
{
    uint64_t khz = c->vm->config.tsc_khz;
    int64_t ticks = (int64_t)(tsc - c->tsc_offset);
    if (ticks <= 0)
        return 0;
    wide ns = ((wide)(uint64_t)ticks * 1000000 + khz - 1) / khz;
    return ns >> 64 ? UINT64_MAX : (uint64_t)ns;
}

int soft_set_tsc_khz(struct soft_vm *vm, uint64_t khz)
{
    if (khz < 1000 || khz > 100000000)
        return -EINVAL;
    uint64_t now = soft_now(vm);
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        vm->vcpus[i]->tsc_offset = soft_tsc_at(vm->vcpus[i], now) - (uint64_t)((wide)now * khz / 1000000);
    vm->config.tsc_khz = khz;
    for (uint32_t i = 0; i < vm->config.vcpus; i++)
        soft_kvmclock_update(vm->vcpus[i]);
    return 0;
}

/* ---- kvmclock ---- */

struct time_info { /* struct pvclock_vcpu_time_info */
    uint32_t version, pad0;
    uint64_t tsc_timestamp, system_time;
    uint32_t mul;
    int8_t shift;
    uint8_t flags, pad[2];
};
struct wall_clock { /* struct pvclock_wall_clock */
    uint32_t version, seconds, nanoseconds;
};
_Static_assert(sizeof(struct time_info) == 32, "layout of the KVM ABI");
enum { TSC_STABLE = 1, GUEST_STOPPED = 2 };

static uint32_t next_version(struct soft_vm *vm, uint64_t gpa)
{
    uint32_t version = 0;
    const uint8_t *host = soft_phys(vm, gpa, false, NULL);
    if (host && (gpa & 3) == 0)
        memcpy(&version, host, 4);
    return (version & ~1u) + 2;
}

/* Whether memory has what publish() would write, but for the version. */
static bool published(struct soft_vm *vm, uint64_t gpa, const void *info, unsigned size)
{
    const uint8_t *host = soft_phys(vm, gpa, false, NULL);
    uint32_t version;
    if (!host || (gpa & ~PAGE_MASK) + size > PAGE_BYTES)
        return false;
    memcpy(&version, host, sizeof version);
    return version && !(version & 1) && !memcmp(host + 4, (const uint8_t *)info + 4, size - 4);
}

static void publish(struct soft_vm *vm, uint64_t gpa, void *info, unsigned size)
{
    uint32_t version = next_version(vm, gpa), odd = version - 1;
    soft_phys_write(vm, gpa, &odd, 4);
    soft_phys_write(vm, gpa + 4, (const uint8_t *)info + 4, size - 4);
    soft_phys_write(vm, gpa, &version, 4);
}

static uint64_t flags_address(const struct soft_vcpu *c)
{
    return (c->kvm_system_time & ~3ull) + offsetof(struct time_info, flags);
}

static void update(struct soft_vcpu *c, bool restored)
{
    if (!(c->kvm_system_time & 1))
        return;
    wide hz = (wide)c->vm->config.tsc_khz * 1000, mul = ((wide)NS << 32) / hz;
    int shift = 0;
    for (; mul >> 32; shift++)
        mul = ((wide)NS << 32) / (hz << (shift + 1));
    for (; !(mul >> 31) && shift > -31; shift--)
        mul = ((wide)NS << (32 - shift + 1)) / hz;
    struct time_info info = { .tsc_timestamp = c->tsc_offset, .system_time = 0, .mul = (uint32_t)mul, .shift = (int8_t)shift,
                              .flags = TSC_STABLE };
    const uint8_t *flags = soft_phys(c->vm, flags_address(c), false, NULL);
    if (flags)
        info.flags |= *flags & GUEST_STOPPED; /* the guest's to clear */
    if (!restored || !published(c->vm, c->kvm_system_time & ~3ull, &info, sizeof info))
        publish(c->vm, c->kvm_system_time & ~3ull, &info, sizeof info);
}

void soft_kvmclock_update(struct soft_vcpu *c) { update(c, false); }

void soft_kvmclock_restore(struct soft_vcpu *c, uint64_t msr)
{
    c->kvm_system_time = msr;
    update(c, true);
}

void soft_vcpu_stood_still(struct soft_vm *vm, uint32_t vcpu)
{
    const struct soft_vcpu *c = vm->vcpus[vcpu];
    const uint8_t *host = soft_phys(vm, flags_address(c), false, NULL);
    if (vm->config.virtual_clock || !(c->kvm_system_time & 1) || !host)
        return;
    uint8_t flags = *host | GUEST_STOPPED;
    soft_phys_write(vm, flags_address(c), &flags, 1);
}

static void write_wall_clock(struct soft_vcpu *c, bool restored)
{
    uint64_t epoch = c->vm->config.epoch_ns, gpa = c->kvm_wall_clock & ~3ull;
    struct wall_clock clock = { .seconds = (uint32_t)(epoch / NS), .nanoseconds = (uint32_t)(epoch % NS) };
    if (gpa && !(restored && published(c->vm, gpa, &clock, sizeof clock)))
        publish(c->vm, gpa, &clock, sizeof clock);
}

void soft_wall_clock_write(struct soft_vcpu *c) { write_wall_clock(c, false); }

void soft_wall_clock_restore(struct soft_vcpu *c, uint64_t msr)
{
    c->kvm_wall_clock = msr;
    write_wall_clock(c, true);
}
