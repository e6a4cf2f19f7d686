/* Control and debug registers, XCR0, INVLPG and INVPCID. Intel SDM vol. 3 chapters 2 and 17; AMD64 APM vol. 2.
 *
 * Every function checks CPL itself, so that a caller that forgot cannot give a guest more than it may have.
 */
#include "soft/system/system.h"

#define CR0_WRITABLE (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_NE | CR0_WP | CR0_AM | 1ull << 29 | 1ull << 30 | CR0_PG)
#define CR0_ET (1ull << 4)
#define CR0_NW (1ull << 29)
#define CR0_CD (1ull << 30)
#define CR4_PCE (1u << 8)
#define CR4_ALLOWED                                                                                                    \
    (CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_UMIP             \
     | CR4_FSGSBASE | CR4_PCIDE | CR4_OSXSAVE | CR4_SMEP | CR4_SMAP)
#define CR3_NO_FLUSH (1ull << 63)

static void privileged(struct soft_vcpu *c)
{
    if (c->cpl)
        soft_raise_error(c, VEC_GP, 0);
}

static _Noreturn void refuse(struct soft_vcpu *c) { soft_raise_error(c, VEC_GP, 0); }

uint64_t soft_read_cr(struct soft_vcpu *c, unsigned n)
{
    privileged(c);
    switch (n) {
    case 0: return c->cr0;
    case 2: return c->cr2;
    case 3: return c->cr3;
    case 4: return c->cr4;
    case 8: return irqchip_get_tpr(c->vm->irqchip, c->index) >> 4;
    default: soft_raise(c, VEC_UD);
    }
}

static void write_cr0(struct soft_vcpu *c, uint64_t value)
{
    if (value >> 32 || ((value & CR0_PG) && !(value & CR0_PE)) || ((value & CR0_NW) && !(value & CR0_CD)))
        refuse(c);
    value = (value & CR0_WRITABLE) | CR0_ET;
    uint64_t changed = value ^ c->cr0;
    uint32_t efer = c->efer;
    if (changed & CR0_PG) {
        if (value & CR0_PG) {
            if (efer & EFER_LME) {
                if (!(c->cr4 & CR4_PAE) || SEG_L(&c->seg[SEG_CS]))
                    refuse(c);
                efer |= EFER_LMA;
            } else if ((c->cr4 & CR4_PAE) && !soft_load_pdptes(c, c->cr3, false)) {
                refuse(c);
            }
        } else {
            if (c->code64 || (c->cr4 & CR4_PCIDE))
                refuse(c);
            efer &= ~EFER_LMA;
        }
    } else if ((value & CR0_PG) && !c->long_mode && (c->cr4 & CR4_PAE) && (changed & (CR0_CD | CR0_NW))) {
        if (!soft_load_pdptes(c, c->cr3, false))
            refuse(c);
    }
    c->cr0 = value;
    c->efer = efer;
    if (changed & CR0_PE && !(value & CR0_PE))
        c->cpl = 0;
    if (changed & (CR0_PG | CR0_WP | CR0_PE))
        soft_tlb_flush(c, true);
    soft_mode_changed(c);
}

static void write_cr3(struct soft_vcpu *c, uint64_t value)
{
    bool keep = false;
    if (c->cr4 & CR4_PCIDE) {
        keep = (value & CR3_NO_FLUSH) != 0;
        value &= ~CR3_NO_FLUSH;
    }
    if (c->long_mode ? value & ~c->phys_mask : 0)
        refuse(c);
    if (!c->long_mode) {
        value = (uint32_t)value;
        if ((c->cr0 & CR0_PG) && (c->cr4 & CR4_PAE) && !soft_load_pdptes(c, value, false))
            refuse(c);
    }
    /* The TLBs carry no PCID: another address space always starts empty. */
    bool same = value == c->cr3;
    c->cr3 = value;
    if (!(keep && same))
        soft_tlb_switch(c, keep);
}

static void write_cr4(struct soft_vcpu *c, uint64_t value)
{
    if (value & ~(uint64_t)CR4_ALLOWED)
        refuse(c);
    uint64_t changed = value ^ c->cr4;
    if ((changed & CR4_PAE) && c->long_mode)
        refuse(c);
    if ((changed & value & CR4_PCIDE) && (!c->long_mode || (c->cr3 & 0xFFF)))
        refuse(c);
    if ((value & CR4_PAE) && (c->cr0 & CR0_PG) && !c->long_mode && (changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP))
        && !soft_load_pdptes(c, c->cr3, false))
        refuse(c);
    c->cr4 = value;
    if (changed & (CR4_PGE | CR4_PAE | CR4_PSE | CR4_PCIDE | CR4_SMEP | CR4_SMAP))
        soft_tlb_flush(c, true);
    soft_mode_changed(c);
}

void soft_write_cr(struct soft_vcpu *c, unsigned n, uint64_t value)
{
    privileged(c);
    switch (n) {
    case 0: write_cr0(c, value); break;
    case 2: c->cr2 = value; break;
    case 3: write_cr3(c, value); break;
    case 4: write_cr4(c, value); break;
    case 8:
        if (value > 15)
            refuse(c);
        irqchip_set_tpr(c->vm->irqchip, c->index, (uint8_t)(value << 4));
        soft_attend(c);
        break;
    default: soft_raise(c, VEC_UD);
    }
}

void soft_lmsw(struct soft_vcpu *c, uint16_t value)
{
    privileged(c);
    uint64_t keep = c->cr0 & ~(CR0_MP | CR0_EM | CR0_TS);
    write_cr0(c, keep | (value & (CR0_PE | CR0_MP | CR0_EM | CR0_TS)));
}

void soft_xsetbv(struct soft_vcpu *c, uint32_t index, uint64_t value)
{
    if (!(c->cr4 & CR4_OSXSAVE))
        soft_raise(c, VEC_UD);
    privileged(c);
    if (index != 0 || !soft_xcr0_valid(c, value))
        refuse(c);
    c->xcr0 = value;
}

/* ---- TLB instructions ---- */

void soft_invlpg(struct soft_vcpu *c, uint64_t linear)
{
    privileged(c);
    if (!c->long_mode)
        linear = (uint32_t)linear;
    if (!c->long_mode || soft_canonical(linear))
        soft_tlb_flush_page(c, linear);
}

void soft_invpcid(struct soft_vcpu *c, uint64_t type, uint64_t pcid, uint64_t linear)
{
    privileged(c);
    if (type > 3 || (type < 2 && (pcid >> 12 || (pcid && !(c->cr4 & CR4_PCIDE)))) || (type == 0 && !soft_canonical(linear)))
        refuse(c);
    switch (type) {
    case 0:
        soft_tlb_flush_page(c, linear);
        break;
    case 1:
    case 3:
        soft_tlb_flush(c, false);
        break;
    default:
        soft_tlb_flush(c, true);
    }
}

/* ---- debug registers ---- */

static unsigned debug_register(struct soft_vcpu *c, unsigned n)
{
    privileged(c);
    if (n == 4 || n == 5) {
        if (c->cr4 & CR4_DE)
            soft_raise(c, VEC_UD);
        n += 2;
    }
    if (c->dr[7] & DR7_GD) {
        c->dr[7] &= ~(uint64_t)DR7_GD;
        c->dr[6] |= DR6_BD;
        soft_raise(c, VEC_DB);
    }
    return n & 7;
}

uint64_t soft_read_dr(struct soft_vcpu *c, unsigned n) { return c->dr[debug_register(c, n)]; }

void soft_write_dr(struct soft_vcpu *c, unsigned n, uint64_t value)
{
    n = debug_register(c, n);
    if (n >= 6 && value >> 32)
        refuse(c);
    if (n == 6)
        value = (value & 0xE00F) | DR6_FIXED;
    else if (n == 7)
        value = (value & 0xFFFF2BFFull) | 0x400;
    /* DR0 to DR3 take any address: "MOV DRn instructions do not check [...]", SDM vol. 3, 18.2.6. */
    c->dr[n] = value;
    if (n != 6) {
        soft_watch_changed(c);
        soft_attend(c);
    }
}
