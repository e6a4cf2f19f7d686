/* Integer and bit instructions up to x86-64-v2 on what a generator gives: SSE2 to SSE4.2, POPCNT, CRC32, strings. */
#include <string.h>

#include "work.h"

#define EACH_VECTOR(X)                                                                                                \
    X("paddb") X("paddsw") X("paddusb") X("psubq") X("pmullw") X("pmulhw") X("pmulhuw") X("pmuludq") X("pmaddwd")     \
    X("psadbw") X("pavgb") X("pminub") X("pmaxsw") X("pcmpeqd") X("pcmpgtb") X("packsswb") X("packuswb") X("packssdw") \
    X("punpcklbw") X("punpckhqdq") X("psllw") X("psrlq") X("psrad") X("pshufd $0x1B,") X("pshuflw $0x72,")            \
    X("shufps $0x9C,") X("unpckhps") X("pand") X("pandn") X("por") X("pxor") X("pshufb") X("phaddw") X("phsubd")      \
    X("phaddsw") X("pmaddubsw") X("pmulhrsw") X("psignb") X("psignd") X("pabsw") X("palignr $5,") X("pmulld")         \
    X("pmuldq") X("pminsb") X("pmaxud") X("packusdw") X("phminposuw") X("mpsadbw $5,") X("pblendw $0x5A,")            \
    X("blendpd $2,") X("pblendvb %%xmm0,") X("pmovsxbw") X("pmovzxwd") X("pcmpeqq") X("pcmpgtq") X("ptest")           \
    X("insertps $0x4C,") X("pcmpestrm $0x44,") X("pcmpistrm $0x08,") X("pcmpistri $0x0C,") X("pcmpestri $0x1A,")

static uint64_t vectors(uint64_t seed)
{
    struct random r = { seed };
    uint64_t digest = seed;
    for (unsigned i = 0; i < 150; i++) {
#define ONE(code)                                                                                                     \
        {                                                                                                             \
            uint64_t a[2] __attribute__((aligned(16))) = { next(&r), next(&r) }, flags = 9, index = 0;                \
            uint64_t b[2] __attribute__((aligned(16))) = { next(&r), i % 3 ? next(&r) : i };                          \
            __asm__ volatile("movdqa %2, %%xmm1; movdqa %4, %%xmm0; addq $0, %1; " code " %3, %%xmm1;"                \
                             "lahf; seto %%al; movdqa %%xmm1, %2"                                                     \
                             : "+a"(flags), "+c"(index), "+m"(a) : "m"(b), "m"(a), "d"(7) : "xmm0", "xmm1", "cc");    \
            digest = mix(mix(mix(mix(digest, a[0]), a[1]), flags & 0xFFFF), index);                                   \
        }
        EACH_VECTOR(ONE)
#undef ONE
    }
    return digest;
}

/* Flags that the manuals define, after each. EACH_LOGICAL: but AF. */
#define EACH_SCALAR(X)                                                                                                \
    X("addq %2, %1") X("addb %b2, %b1; adcq %2, %1; adcw %w2, %w1") X("subl %k2, %k1; sbbq %2, %1") X("negw %w1")     \
    X("incq %1; decb %b1") X("popcntq %2, %1; cmpq %2, %1")                                                              \
    X("rolq $13, %1; addq $1, %1") X("rcrl $7, %k1; addw %w2, %w1; rclw $5, %w1; cmpl %k2, %k1")                      \
    X("shldq $11, %2, %1; addq %2, %1")                                                                               \
    X("bswapq %1; notl %k1; addq $0, %1")                                                                             \
    X("btsq $33, %1; btrl $5, %k1; btcw $9, %w1; adcq %2, %1") X("xaddl %k1, %k2; addq %2, %1")                       \
    X("cmpq %2, %1; cmovgq %2, %1; cmpq $0, %1")                                                                      \
    X("imulq $-77, %2, %1; addq %2, %1") X("movsbq %b2, %1; movzwl %w2, %k2; leaq 5(%1,%2,4), %1; addq $3, %1")       \
    X("bsfq %4, %1; addq %2, %1") X("bsrl %4, %k1; addq %2, %1")
#define EACH_LOGICAL(X)                                                                                               \
    X("crc32b %b2, %1; crc32q %2, %1; testq %1, %1") X("shrdw $3, %w2, %w1; xorq %2, %1") X("sarq $1, %1")            \
    X("movbel %4, %k1; addq %2, %1; testb $7, %b1") X("imulq %2, %1; andq $-2, %1")

static uint64_t of_vendor; /* with every flag */
enum { AF_OF_LAHF = 0x1000 };

static uint64_t scalars(uint64_t seed)
{
    struct random r = { seed };
    uint64_t digest = seed;
    for (unsigned i = 0; i < 400; i++) {
#define ONE_WITHOUT(code, without)                                                                                    \
        {                                                                                                             \
            uint64_t a = next(&r) >> (i % 5 * 13), b = next(&r) >> (i % 3 * 21), m = next(&r) | 1, flags = 0;         \
            __asm__ volatile(code "; lahf; seto %%al" : "+a"(flags), "+b"(a), "+c"(b) : "d"(0), "m"(m) : "cc");       \
            digest = mix(mix(mix(digest, a), b), flags & ~(uint64_t)(without));                                       \
            of_vendor = mix(of_vendor, flags);                                                                        \
        }
#define ONE(code) ONE_WITHOUT(code, 0)
        EACH_SCALAR(ONE)
#undef ONE
#define ONE(code) ONE_WITHOUT(code, AF_OF_LAHF)
        EACH_LOGICAL(ONE)
#undef ONE
        uint64_t low = next(&r), high = next(&r) % 1000, by = next(&r) | 1ull << 63, flags = 0;
        __asm__ volatile("divq %2" : "+a"(low), "+d"(high) : "r"(by) : "cc");
        digest = mix(mix(digest, low), high);
        __asm__ volatile("imulq %2; addq $0, %1" : "+a"(low), "+d"(high) : "r"(by) : "cc");
        __asm__ volatile("cqto; idivq %2" : "+a"(low), "=&d"(high) : "r"(by | 1ull << 62) : "cc");
        digest = mix(mix(mix(digest, low), high), flags);
    }
    return digest;
}

/* Repeated string instructions, forwards and backwards, over page boundaries. */
static uint64_t strings(uint64_t seed)
{
    static uint8_t one[3 * 4096], two[3 * 4096];
    struct random r = { seed };
    uint64_t digest = seed;
    for (size_t i = 0; i < sizeof one; i++)
        one[i] = two[i] = (uint8_t)(next(&r) & 3);
    for (unsigned i = 0; i < 60; i++) {
        uint64_t size = 1 + next(&r) % 4000, from = next(&r) % 4096, to = next(&r) % 4096, count = size, zf = 0;
        uint8_t *source = one + from, *target = two + to;
        __asm__ volatile("rep movsb" : "+S"(source), "+D"(target), "+c"(count) : : "memory");
        source = one + from + size, target = two + to + size, count = size;
        __asm__ volatile("std; rep movsb; cld" : "+S"(source), "+D"(target), "+c"(count) : : "memory");
        source = one + to, target = two + from, count = size;
        __asm__ volatile("repe cmpsb; setz %b3" : "+S"(source), "+D"(target), "+c"(count), "+q"(zf) : : "memory", "cc");
        digest = mix(mix(digest, count), zf);
        target = one + from, count = size;
        __asm__ volatile("repne scasb; setz %b2" : "+D"(target), "+c"(count), "+q"(zf) : "a"(3) : "memory", "cc");
        digest = mix(mix(digest, count), zf);
        target = two + to, count = size / 8;
        __asm__ volatile("rep stosq" : "+D"(target), "+c"(count) : "a"(next(&r) & 0x0303030303030303u) : "memory");
        memmove(one + to, one + from, size);
    }
    return mix_bytes(mix_bytes(digest, one, sizeof one), two, sizeof two);
}

void work_vector(uint64_t seed)
{
    report("vector", "vectors", vectors(seed));
    of_vendor = seed;
    report("vector", "scalars", scalars(seed));
    report_of_vendor("vector", "scalars", of_vendor);
    report("vector", "strings", strings(seed));
}
