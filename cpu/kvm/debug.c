/* Guest debugging by KVM (KVM_SET_GUEST_DEBUG, API 4.86; KVM_TRANSLATE, API 4.35): single steps, the four debug registers,
 * INT3 as an exit. While a debug register is used the guest's own do not work. */
#include "kvm/kvm_core.h"

#include <string.h>

#define DR7_FIXED 0x600u
#ifndef KVM_GUESTDBG_BLOCKIRQ
#define KVM_GUESTDBG_BLOCKIRQ 0x00100000
#endif

/* SDM vol. 3, 18.2.4: R/W and LEN of a debug register, or -1. */
static int condition(const struct lv_point *p)
{
    static const int8_t lengths[9] = {[0] = -1, [1] = 0, [2] = 1, [3] = -1, [4] = 3, [5] = -1, [6] = -1, [7] = -1, [8] = 2};
    if (p->kind == LV_POINT_EXECUTE)
        return 0;
    if (p->kind > LV_POINT_ACCESS || p->length > 8 || lengths[p->length] < 0 || p->address % p->length)
        return -1;
    return (p->kind == LV_POINT_WRITE ? 1 : 3) | lengths[p->length] << 2;
}

static bool halted(const struct lv_vcpu *vcpu)
{
    struct kvm_mp_state state = {0};
    return call(vcpu_fd(vcpu), KVM_GET_MP_STATE, &state) >= 0 && state.mp_state == KVM_MP_STATE_HALTED;
}

int lv_kvm_set_debug(struct lv_vcpu *vcpu, const struct lv_debug *debug)
{
    struct kvm_core_vcpu *k = vcpu->core;
    struct kvm_guest_debug d = {0};
    if (debug->count > 4)
        return -E2BIG;
    for (uint32_t i = 0; i < debug->count; i++) {
        int how = condition(&debug->points[i]);
        if (how < 0)
            return -EINVAL;
        d.arch.debugreg[i] = debug->points[i].address;
        d.arch.debugreg[7] |= (uint64_t)(2u << (i * 2) | (uint32_t)how << (16 + i * 4));
    }
    if (debug->count) {
        d.control |= KVM_GUESTDBG_USE_HW_BP;
        d.arch.debugreg[7] |= DR7_FIXED;
    }
    if (debug->flags & LV_DEBUG_STEP)
        d.control |= KVM_GUESTDBG_SINGLESTEP;
    if (debug->flags & LV_DEBUG_INT3)
        d.control |= KVM_GUESTDBG_USE_SW_BP;
    if (debug->flags & LV_DEBUG_GIVE_INT3)
        d.control |= KVM_GUESTDBG_INJECT_BP;
    if ((debug->flags & LV_DEBUG_HOLD_INTERRUPTS) && !halted(vcpu)) /* else nothing would ever wake it */
        d.control |= KVM_GUESTDBG_BLOCKIRQ;
    if (d.control)
        d.control |= KVM_GUESTDBG_ENABLE;
    int r = call(vcpu_fd(vcpu), KVM_SET_GUEST_DEBUG, &d);
    if (r == -EINVAL && (d.control & KVM_GUESTDBG_BLOCKIRQ)) { /* Linux before 5.16 */
        d.control &= ~(uint32_t)KVM_GUESTDBG_BLOCKIRQ;
        r = call(vcpu_fd(vcpu), KVM_SET_GUEST_DEBUG, &d);
    }
    if (r < 0)
        return r;
    k->frozen = debug->flags & LV_DEBUG_FROZEN;
    k->stepping = debug->flags & LV_DEBUG_STEP;
    memset(k->points, 0, sizeof k->points);
    for (uint32_t i = 0; i < debug->count; i++)
        k->points[i] = debug->points[i].address;
    return 0;
}

struct lv_exit lv_kvm_debug_exit(const struct kvm_core_vcpu *k)
{
    struct lv_exit exit = {.kind = LV_DEBUG, .rip = k->run->debug.arch.pc, .code = k->run->debug.arch.dr6,
                           .extra = k->run->debug.arch.exception};
    for (unsigned i = 0; i < 4; i++)
        if (exit.code >> i & 1)
            exit.address = k->points[i];
    return exit;
}

int lv_kvm_translate(struct lv_vcpu *vcpu, uint64_t linear, uint64_t *gpa)
{
    struct kvm_translation t = {.linear_address = linear};
    int r = call(vcpu_fd(vcpu), KVM_TRANSLATE, &t);
    if (r < 0)
        return r;
    *gpa = t.physical_address;
    return t.valid ? 0 : -EFAULT;
}
