/* What the files of the KVM core share. */
#ifndef LV_KVM_CORE_H
#define LV_KVM_CORE_H

#include "native/loop.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

struct kvm_slot {
    uint64_t gpa, size;
    uint8_t *host;
    bool readonly;
    uint8_t *written; /* with the dirty log: a bit a page that was written outside guest mode (finish.c); under the lock */
};

struct kvm_core_vm {
    int fd;
    size_t run_size;
    bool clears_log;      /* KVM_GET_DIRTY_LOG leaves the log, KVM_CLEAR_DIRTY_LOG clears it */
    _Atomic bool chips;   /* the interrupt controllers and the PIT are there */
    pthread_mutex_t lock; /* slots: the loop changes them, engines read instruction bytes; the making of the chips */
    struct kvm_slot slots[LV_MAX_SLOTS];
    pthread_rwlock_t guest_mode; /* read: vCPUs in KVM_RUN; written: one finishes an instruction (finish.c) */
    _Atomic uint64_t finished;   /* instructions that the software core executed */
    uint8_t sample[LV_INSN_MAX]; /* the bytes of one of the last of them, under the lock */
    uint8_t sample_size;
};

struct kvm_core_vcpu {
    int fd;
    struct kvm_run *run;
    size_t run_size;
    bool frozen;        /* resumed, but not to enter the guest; set while parked */
    uint64_t points[4]; /* what the VMM's debug registers hold */
    bool stepping;      /* the VMM steps it */
    struct kvm_finish *finish; /* NULL until KVM gives up the first instruction */
    struct kvm_cpuid_entry2 *cpuid; /* as it was set */
    uint32_t cpuid_count;
};

static inline int call(int fd, unsigned long request, const void *argument)
{
    int r;
    do
        r = ioctl(fd, request, argument);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : r;
}

static inline int vm_fd(const struct lv_vm *vm) { return ((struct kvm_core_vm *)vm->core)->fd; }
static inline int vcpu_fd(const struct lv_vcpu *vcpu) { return ((struct kvm_core_vcpu *)vcpu->core)->fd; }

/* The interrupt controllers are made with the first of them that is wanted. */
int lv_kvm_need_chips(struct lv_vm *vm);

/* kvm.c: the bytes at RIP of the instruction that KVM gave up, those that can be read. [engine] */
void lv_kvm_failed_instruction(struct lv_vcpu *vcpu, struct lv_exit *exit, uint64_t linear);

/* finish.c: an instruction that KVM gave up. [engine] */
struct kvm_finish;
enum lv_finished { LV_NOT_FINISHED, LV_FINISHED, LV_FINISHED_SHUTDOWN };
enum lv_finished lv_kvm_finish(struct lv_vcpu *vcpu);
void lv_kvm_finish_destroy(struct kvm_finish *finish);
void lv_kvm_finish_forked(struct kvm_finish *finish);
/* From the first to the second no other vCPU is in guest mode. */
void lv_kvm_alone(struct lv_vcpu *vcpu);
void lv_kvm_together(struct lv_vcpu *vcpu);

/* debug.c */
int lv_kvm_set_debug(struct lv_vcpu *vcpu, const struct lv_debug *debug);
int lv_kvm_translate(struct lv_vcpu *vcpu, uint64_t linear, uint64_t *gpa);
struct lv_exit lv_kvm_debug_exit(const struct kvm_core_vcpu *k);

/* state.c: get and set of struct lv_ops */
int lv_kvm_get_vm(struct lv_vm *vm, enum lv_state_kind kind, void *data, size_t size);
int lv_kvm_set_vm(struct lv_vm *vm, enum lv_state_kind kind, const void *data, size_t size);
int lv_kvm_get_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, void *data, size_t size);
int lv_kvm_set_vcpu(struct lv_vcpu *vcpu, enum lv_state_kind kind, const void *data, size_t size);

#endif
