/* CPUID: what the software core implements, as a table. AMD64 APM vol. 3 appendix E; KVM's leaves
 * (Documentation/virt/kvm/x86/cpuid.rst).
 *
 * Vendor AuthenticAMD, family 19h model 11h ("Genoa"): x86-64-v2 and the system features named below; where the host has
 * what its own processor computes for the core (HOST_FEATURE in ops/table.h), also AVX, AES and their like.
 */
#include <cpuid.h>
#include <errno.h>
#include <linux/kvm.h>

#include "soft/ops/operations.h"
#include "soft/system/system.h"

#define BIT(n) (1u << (n))

enum {
    LEAF1_EDX_COMMON = BIT(0) | BIT(2) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(7) | BIT(8) | BIT(9) /* FPU..APIC, no VME */
                       | BIT(12) | BIT(13) | BIT(15) | BIT(16) | BIT(17) /* MTRR PGE CMOV PAT PSE36 */
                       | BIT(23) | BIT(24),                              /* MMX FXSR */
    SIGNATURE = 0x00A10F11,
};

/* The features that decide how bytes are decoded. */
static const struct { uint32_t leaf, index; size_t offset; unsigned bit; bool host; } features[] = {
#define FEATURE(name, leaf, index, register, bit) {leaf, index, offsetof(struct kvm_cpuid_entry2, register), bit, false},
#define HOST_FEATURE(name, leaf, index, register, bit) {leaf, index, offsetof(struct kvm_cpuid_entry2, register), bit, true},
#include "soft/ops/table.h"
};
enum { FEATURE_COUNT = sizeof features / sizeof features[0] };
static uint32_t *feature_word(struct kvm_cpuid_entry2 *e, unsigned n)
{
    return e->function == features[n].leaf && e->index == features[n].index ? (uint32_t *)((char *)e + features[n].offset) : NULL;
}

/* ---- what the host's processor has ---- */

static bool host_bit(unsigned n)
{
    struct kvm_cpuid_entry2 e = {.function = features[n].leaf, .index = features[n].index};
    return __get_cpuid_count(e.function, e.index, &e.eax, &e.ebx, &e.ecx, &e.edx) &&
           *feature_word(&e, n) >> features[n].bit & 1;
}
/* AVX, AVX2, FMA and F16C, and an operating system that keeps YMM registers (SDM 1, 14.3). */
static bool ask_host_avx(void)
{
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & BIT(27)))
        return false;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6 && host_bit(FEATURE_AVX - 1) && host_bit(FEATURE_AVX2 - 1) && host_bit(FEATURE_FMA - 1) &&
           host_bit(FEATURE_F16C - 1);
}
/* Asked once: in a virtual machine each CPUID is an exit. */
static bool host_avx(void)
{
    enum { NOT_ASKED, NO, YES };
    static int known;
    int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (answer == NOT_ASKED) {
        answer = ask_host_avx() ? YES : NO;
        __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
    }
    return answer == YES;
}
static bool offered(unsigned n)
{
    if (!features[n].host)
        return true;
    switch (n + 1) {
    case FEATURE_AVX: case FEATURE_AVX2: case FEATURE_FMA: case FEATURE_F16C: return host_avx();
    case FEATURE_VAES: case FEATURE_VPCLMUL: return host_avx() && host_bit(n);
    default: return host_bit(n);
    }
}

/* ---- what the core has ---- */

enum { COMPONENTS = 3, COMPONENTS_AVX = 7 }; /* of XCR0: x87, SSE; AVX */
uint64_t soft_supported_xcr0(void) { return host_avx() ? COMPONENTS_AVX : COMPONENTS; }
uint64_t soft_vcpu_xcr0(const struct soft_vcpu *c) { return c->features & MODE_FEATURE(FEATURE_AVX) ? COMPONENTS_AVX : COMPONENTS; }

static void put(struct kvm_cpuid_entry2 *entries, uint32_t max, uint32_t *count, struct kvm_cpuid_entry2 e)
{
    for (unsigned n = 0; n < FEATURE_COUNT; n++)
        if (feature_word(&e, n) && offered(n))
            *feature_word(&e, n) |= BIT(features[n].bit);
    if (*count < max)
        entries[*count] = e;
    if (*count < max)
        ++*count;
}

uint32_t soft_supported_cpuid(struct kvm_cpuid_entry2 *entries, uint32_t max)
{
    static const char brand[48] = "loopvisor software x86-64 core";
    uint32_t n = 0, words[12];
    memcpy(words, brand, sizeof words);
#define PUT(f, a, b, c_, d) put(entries, max, &n, (struct kvm_cpuid_entry2){ .function = (f), .eax = (a), .ebx = (b), .ecx = (c_), .edx = (d) })
#define PUT_INDEX(f, i, a, b, c_, d)                                                                                   \
    put(entries, max, &n,                                                                                              \
        (struct kvm_cpuid_entry2){ .function = (f), .index = (i), .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = (a), \
                                   .ebx = (b), .ecx = (c_), .edx = (d) })
    PUT(0, 0xD, 0x68747541, 0x444D4163, 0x69746E65); /* AuthenticAMD */
    PUT(1, SIGNATURE, 8 << 8 | BIT(16),
        BIT(0) | BIT(9) | BIT(13) | BIT(17) | BIT(19) | BIT(20) | BIT(21) | BIT(22) | BIT(24) | BIT(26) | BIT(30)
            | BIT(31), /* SSE3 SSSE3 CX16 PCID SSE4.1 SSE4.2 X2APIC MOVBE TSC_DEADLINE XSAVE RDRAND HYPERVISOR */
        LEAF1_EDX_COMMON | BIT(11) | BIT(19) | BIT(25) | BIT(26)); /* SEP CLFSH SSE SSE2 */
    PUT(6, BIT(2), 0, 0, 0); /* ARAT */
    PUT_INDEX(7, 0, 0, BIT(0) | BIT(1) | BIT(7) | BIT(9) | BIT(10) | BIT(18) | BIT(20), BIT(2), 0);
    /* FSGSBASE TSC_ADJUST SMEP ERMS INVPCID RDSEED SMAP; UMIP */
    PUT_INDEX(0xB, 0, 0, 1, BIT(8), 0);
    PUT_INDEX(0xB, 1, 0, 1, 2 << 8 | 1, 0);
    uint32_t components = (uint32_t)soft_supported_xcr0();
    PUT_INDEX(0xD, 0, components, FPU_XSAVE_SIZE(components), FPU_XSAVE_SIZE(components), 0);
    PUT_INDEX(0xD, 1, BIT(0) | BIT(1) | BIT(2) | BIT(3), FPU_XSAVE_SIZE(components), 0, 0); /* XSAVEOPT XSAVEC XGETBV1 XSAVES */
    if (components == COMPONENTS_AVX)
        PUT_INDEX(0xD, 2, FPU_XSAVE_AVX - FPU_XSAVE_LEGACY, FPU_XSAVE_LEGACY, 0, 0);
    PUT(0x40000000, 0x40000010, 0x4B4D564B, 0x564B4D56, 0x4D); /* KVMKVMKVM */
    PUT(0x40000001, BIT(0) | BIT(1) | BIT(3) | BIT(11) | BIT(24), 0, 0, 0);
    /* CLOCKSOURCE NOP_IO_DELAY CLOCKSOURCE2 PV_SEND_IPI CLOCKSOURCE_STABLE */
    PUT(0x40000010, 0, 0, 0, 0);
    PUT(0x80000000, 0x80000021, 0x68747541, 0x444D4163, 0x69746E65);
    PUT(0x80000001, SIGNATURE, 0, BIT(0) | BIT(8), /* LAHF, PREFETCHW */
        LEAF1_EDX_COMMON | BIT(11) | BIT(20) | BIT(22) | BIT(26) | BIT(27) | BIT(29)); /* SYSCALL NX MMXEXT 1G RDTSCP LM */
    PUT(0x80000002, words[0], words[1], words[2], words[3]);
    PUT(0x80000003, words[4], words[5], words[6], words[7]);
    PUT(0x80000004, words[8], words[9], words[10], words[11]);
    PUT(0x80000005, 0xFF48FF40, 0xFF48FF40, 32u << 24 | 8 << 16 | 1 << 8 | 64, 32u << 24 | 8 << 16 | 1 << 8 | 64);
    PUT(0x80000006, 0x48002200, 0x68004200, 1024u << 16 | 6 << 12 | 1 << 8 | 64, 64u << 18 | 9 << 12 | 1 << 8 | 64);
    PUT(0x80000007, 0, 0, 0, BIT(8)); /* invariant TSC */
    PUT(0x80000008, PHYS_BITS | LINEAR_BITS << 8, BIT(26) | BIT(29), 0, 0); /* SSB_NO, BTC_NO */
    PUT(0x80000021, BIT(0) | BIT(2) | BIT(6) | BIT(8) | BIT(29), 0, BIT(1) | BIT(2), 0);
    /* NoNestedDataBp, LFENCE serializing, null selector clears base, automatic IBRS, SRSO_NO; TSA_SQ_NO, TSA_L1_NO */
#undef PUT
#undef PUT_INDEX
    return n;
}

int soft_vcpu_set_cpuid(struct soft_vm *vm, uint32_t vcpu, const struct kvm_cpuid_entry2 *entries, uint32_t count)
{
    if (vcpu >= vm->config.vcpus)
        return -EINVAL;
    struct soft_vcpu *c = vm->vcpus[vcpu];
    if (count > sizeof c->cpuid / sizeof c->cpuid[0])
        return -E2BIG;
    for (uint32_t i = 0; i < count; i++) {
        c->cpuid[i].function = entries[i].function;
        c->cpuid[i].index = entries[i].index;
        c->cpuid[i].flags = entries[i].flags;
        c->cpuid[i].eax = entries[i].eax;
        c->cpuid[i].ebx = entries[i].ebx;
        c->cpuid[i].ecx = entries[i].ecx;
        c->cpuid[i].edx = entries[i].edx;
    }
    c->cpuid_count = count;
    unsigned bits = PHYS_BITS;
    for (uint32_t i = 0; i < count; i++)
        if (entries[i].function == 0x80000008)
            bits = entries[i].eax & 0xFF;
    c->features = MODE_FEATURE(FEATURE_ALWAYS);
    for (uint32_t i = 0; i < count; i++)
        for (unsigned n = 0; n < FEATURE_COUNT; n++) {
            struct kvm_cpuid_entry2 e = entries[i];
            const uint32_t *word = feature_word(&e, n);
            if (word && (*word & BIT(features[n].bit)))
                c->features |= MODE_FEATURE(FEATURE_ALWAYS + 1 + n);
        }
    c->phys_mask = (1ull << (bits < 36 || bits > PHYS_BITS ? PHYS_BITS : bits)) - 1;
    soft_tlb_flush(c, true);
    return 0;
}

/* Until the VMM sets a table: what is supported, with the VM's topology (one package, a core a vCPU). */
void soft_default_cpuid(struct soft_vcpu *c)
{
    struct kvm_cpuid_entry2 entries[64];
    uint32_t count = soft_supported_cpuid(entries, 64), vcpus = c->vm->config.vcpus, width = 0;
    while (1u << width < vcpus)
        width++;
    for (uint32_t i = 0; i < count; i++) {
        struct kvm_cpuid_entry2 *e = &entries[i];
        switch (e->function) {
        case 1:
            e->ebx = (e->ebx & 0xFFFF) | vcpus << 16 | c->index << 24;
            if (vcpus > 1)
                e->edx |= BIT(28);
            break;
        case 0xB:
            e->edx = c->index;
            if (e->index == 1) {
                e->eax = width;
                e->ebx = vcpus;
            }
            break;
        case 0x40000010:
            e->eax = (uint32_t)c->vm->config.tsc_khz;
            e->ebx = 1000000; /* LAPIC timer: 1 GHz */
            break;
        case 0x80000001:
            if (vcpus > 1)
                e->ecx |= BIT(1); /* CMP_LEGACY */
            break;
        case 0x80000008:
            e->ecx = width << 12 | (vcpus - 1);
            break;
        default:
            break;
        }
    }
    soft_vcpu_set_cpuid(c->vm, c->index, entries, count);
}

void soft_cpuid(struct soft_vcpu *c)
{
    uint32_t function = (uint32_t)c->gpr[RAX], index = (uint32_t)c->gpr[RCX];
    uint32_t out[4] = { 0, 0, 0, 0 };
    for (uint32_t i = 0; i < c->cpuid_count; i++) {
        if (c->cpuid[i].function != function
            || ((c->cpuid[i].flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) && c->cpuid[i].index != index))
            continue;
        out[0] = c->cpuid[i].eax;
        out[1] = c->cpuid[i].ebx;
        out[2] = c->cpuid[i].ecx;
        out[3] = c->cpuid[i].edx;
        break;
    }
    /* What follows the processor's state. */
    if (function == 1) {
        uint64_t apic_base = 0;
        irqchip_msr_read(c->vm->irqchip, c->index, 0x1B, &apic_base, soft_now(c->vm));
        if (!(apic_base & BIT(11)))
            out[3] &= ~BIT(9);
        out[2] = (out[2] & ~BIT(27)) | (c->cr4 & CR4_OSXSAVE ? BIT(27) : 0);
    }
    if (function == 0xD && index < 2 && out[1]) /* the area of what is enabled in XCR0 */
        out[1] = FPU_XSAVE_SIZE(c->xcr0);
    c->gpr[RAX] = out[0];
    c->gpr[RBX] = out[1];
    c->gpr[RCX] = out[2];
    c->gpr[RDX] = out[3];
}
