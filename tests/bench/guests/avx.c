/* AVX2 and FMA guests for tests.bench, the same work as in vector.c by x86-64-v3's instructions. Workloads are not inlined: run()
 * enables AVX first. */
#include <immintrin.h>

#include "guest.h"

/* ---- scan: strlen and memcpy of a C library for AVX2 ---- */
static u64 length(const u8 *s)
{
    const __m256i zero = _mm256_setzero_si256();
    for (u64 n = 0;; n += 128) {
        const __m256i *p = (const __m256i *)(s + n);
        __m256i a = _mm256_loadu_si256(p), b = _mm256_loadu_si256(p + 1), c = _mm256_loadu_si256(p + 2), d = _mm256_loadu_si256(p + 3);
        __m256i least = _mm256_min_epu8(_mm256_min_epu8(a, b), _mm256_min_epu8(c, d));
        if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(least, zero))) {
            u64 low = (u32)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, zero)) | (u64)(u32)_mm256_movemask_epi8(_mm256_cmpeq_epi8(b, zero)) << 32;
            u64 high = (u32)_mm256_movemask_epi8(_mm256_cmpeq_epi8(c, zero)) | (u64)(u32)_mm256_movemask_epi8(_mm256_cmpeq_epi8(d, zero)) << 32;
            return n + (u64)(low ? __builtin_ctzl(low) : 64 + __builtin_ctzl(high));
        }
    }
}

static __attribute__((noinline)) u64 avx_scan(void)
{
    u64 sum = 0;
    for (u64 i = 0; i < 1 << 20; i++)
        HEAP[i] = (u8)(i | 1);
    HEAP[(1 << 20) - 7] = 0;
    for (u64 round = 0; round < 120; round++) {
        sum += length(HEAP + round * 17);
        const __m256i *from = (const __m256i *)HEAP;
        __m256i *to = (__m256i *)(HEAP + (2 << 20) + round * 3);
        for (u64 i = 0; i < (1 << 20) / 128; i++, from += 4, to += 4) {
            __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1), c = _mm256_loadu_si256(from + 2), d = _mm256_loadu_si256(from + 3);
            _mm256_storeu_si256(to, a);
            _mm256_storeu_si256(to + 1, b);
            _mm256_storeu_si256(to + 2, c);
            _mm256_storeu_si256(to + 3, d);
        }
        sum = sum * 31 + HEAP[(2 << 20) + round * 1009];
    }
    return sum;
}

/* ---- chacha: ChaCha20's rounds (RFC 8439), two blocks in four registers ---- */
#define ROTATE(v, n) _mm256_or_si256(_mm256_slli_epi32(v, n), _mm256_srli_epi32(v, 32 - (n)))
#define BYTES(v, by) _mm256_shuffle_epi8(v, by)
#define QUARTER(a, b, c, d)                                                                                            \
    a = _mm256_add_epi32(a, b), d = _mm256_xor_si256(d, a), d = BYTES(d, by16), c = _mm256_add_epi32(c, d),            \
    b = _mm256_xor_si256(b, c), b = ROTATE(b, 12), a = _mm256_add_epi32(a, b), d = _mm256_xor_si256(d, a),             \
    d = BYTES(d, by8), c = _mm256_add_epi32(c, d), b = _mm256_xor_si256(b, c), b = ROTATE(b, 7)
static __attribute__((noinline)) u64 avx_chacha(void)
{
    const __m256i by16 = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0D0C0F0E, 0x09080B0A, 0x05040706, 0x01000302));
    const __m256i by8 = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0E0D0C0F, 0x0A09080B, 0x06050407, 0x02010003));
    __m256i a0 = _mm256_broadcastsi128_si256(_mm_set_epi32(0x6b206574, 0x79622d32, 0x3320646e, 0x61707865));
    __m256i b0 = _mm256_set1_epi32(0x03020100), c0 = _mm256_set1_epi32(0x13121110), d0 = _mm256_set_epi32(0x4a, 9, 0, 2, 0x4a, 9, 0, 1);
    __m256i sum = _mm256_setzero_si256();
    for (u32 block = 0; block < 400000; block += 2) {
        __m256i a = a0, b = b0, c = c0, d = d0;
        for (int i = 0; i < 10; i++) {
            QUARTER(a, b, c, d);
            b = _mm256_shuffle_epi32(b, 0x39), c = _mm256_shuffle_epi32(c, 0x4E), d = _mm256_shuffle_epi32(d, 0x93);
            QUARTER(a, b, c, d);
            b = _mm256_shuffle_epi32(b, 0x93), c = _mm256_shuffle_epi32(c, 0x4E), d = _mm256_shuffle_epi32(d, 0x39);
        }
        sum = _mm256_xor_si256(sum, _mm256_add_epi32(a, a0));
        d0 = _mm256_add_epi32(d0, _mm256_set_epi32(0, 0, 0, 2, 0, 0, 0, 2));
    }
    __m128i both = _mm_xor_si128(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return (u64)_mm_cvtsi128_si64(both);
}

/* ---- matrix: products of 128 x 128 doubles, four at a time, by fused multiplication and addition ---- */
static double A[128][128], B[128][128], C[128][128];
static __attribute__((noinline)) u64 avx_matrix(void)
{
    for (int i = 0; i < 128; i++)
        for (int k = 0; k < 128; k++)
            A[i][k] = 1.0 / (i + k + 1), B[i][k] = i - 0.5 * k;
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 128; i++)
            for (int k = 0; k < 128; k += 16) {
                __m256d s[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
                for (int j = 0; j < 128; j++) {
                    __m256d f = _mm256_broadcast_sd(&A[i][j]);
                    for (int n = 0; n < 4; n++)
                        s[n] = _mm256_fmadd_pd(f, _mm256_loadu_pd(&B[j][k + 4 * n]), s[n]);
                }
                for (int n = 0; n < 4; n++)
                    _mm256_storeu_pd(&C[i][k + 4 * n], s[n]);
            }
        for (int i = 0; i < 128; i++)
            for (int k = 0; k < 128; k += 4)
                _mm256_storeu_pd(&B[i][k], _mm256_fmadd_pd(_mm256_set1_pd(1e-3), _mm256_loadu_pd(&C[i][k]), _mm256_loadu_pd(&B[i][k])));
    }
    double sum = 0;
    for (int i = 0; i < 128; i++)
        sum += C[i][i] + B[i][127 - i];
    u64 bits;
    __builtin_memcpy(&bits, &sum, 8);
    return bits;
}

void run(void)
{
    u64 cr4;
    __asm__ volatile("mov %%cr4, %0" : "=r"(cr4));
    __asm__ volatile("mov %0, %%cr4" : : "r"(cr4 | 1 << 18)); /* OSXSAVE */
    __asm__ volatile("xsetbv" : : "a"(7), "d"(0), "c"(0));
    put('S');
    end(WORKLOAD());
    (void)avx_scan, (void)avx_chacha, (void)avx_matrix;
}
