/* SSE2 and x87 guests for tests.bench, as compute.c's: library code that scans and moves memory, a stream cipher on integer
 * vectors, scalar and packed floating point, extended precision. */
#include <emmintrin.h>

#include "guest.h"

/* ---- scan: what strlen and memcpy of a C library do ---- */
static u64 length(const u8 *s)
{
    const __m128i zero = _mm_setzero_si128();
    for (u64 n = 0;; n += 64) {
        const __m128i *p = (const __m128i *)(s + n);
        __m128i a = _mm_loadu_si128(p), b = _mm_loadu_si128(p + 1), c = _mm_loadu_si128(p + 2), d = _mm_loadu_si128(p + 3);
        __m128i least = _mm_min_epu8(_mm_min_epu8(a, b), _mm_min_epu8(c, d));
        if (_mm_movemask_epi8(_mm_cmpeq_epi8(least, zero))) {
            u64 mask = (u32)_mm_movemask_epi8(_mm_cmpeq_epi8(a, zero)) | (u64)(u32)_mm_movemask_epi8(_mm_cmpeq_epi8(b, zero)) << 16 |
                       (u64)(u32)_mm_movemask_epi8(_mm_cmpeq_epi8(c, zero)) << 32 | (u64)(u32)_mm_movemask_epi8(_mm_cmpeq_epi8(d, zero)) << 48;
            return n + (u64)__builtin_ctzl(mask);
        }
    }
}

static u64 scan(void)
{
    u64 sum = 0;
    for (u64 i = 0; i < 1 << 20; i++)
        HEAP[i] = (u8)(i | 1);
    HEAP[(1 << 20) - 7] = 0;
    for (u64 round = 0; round < 60; round++) {
        sum += length(HEAP + round * 17);
        const __m128i *from = (const __m128i *)HEAP;
        __m128i *to = (__m128i *)(HEAP + (2 << 20) + round * 3);
        for (u64 i = 0; i < (1 << 20) / 64; i++, from += 4, to += 4) {
            __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1), c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
            _mm_storeu_si128(to, a);
            _mm_storeu_si128(to + 1, b);
            _mm_storeu_si128(to + 2, c);
            _mm_storeu_si128(to + 3, d);
        }
        sum = sum * 31 + HEAP[(2 << 20) + round * 1009];
    }
    return sum;
}

/* ---- chacha: ChaCha20's rounds (RFC 8439), a block in four registers ---- */
#define ROTATE(v, n) _mm_or_si128(_mm_slli_epi32(v, n), _mm_srli_epi32(v, 32 - (n)))
#define QUARTER(a, b, c, d)                                                                                            \
    a = _mm_add_epi32(a, b), d = _mm_xor_si128(d, a), d = ROTATE(d, 16), c = _mm_add_epi32(c, d), b = _mm_xor_si128(b, c), \
    b = ROTATE(b, 12), a = _mm_add_epi32(a, b), d = _mm_xor_si128(d, a), d = ROTATE(d, 8), c = _mm_add_epi32(c, d),    \
    b = _mm_xor_si128(b, c), b = ROTATE(b, 7)
static u64 chacha(void)
{
    __m128i a0 = _mm_set_epi32(0x6b206574, 0x79622d32, 0x3320646e, 0x61707865), b0 = _mm_set1_epi32(0x03020100), c0 = _mm_set1_epi32(0x13121110),
            d0 = _mm_set_epi32(0x4a, 0x09, 0, 1), sum = _mm_setzero_si128();
    for (u32 block = 0; block < 400000; block++) {
        __m128i a = a0, b = b0, c = c0, d = d0;
        for (int i = 0; i < 10; i++) {
            QUARTER(a, b, c, d);
            b = _mm_shuffle_epi32(b, 0x39), c = _mm_shuffle_epi32(c, 0x4E), d = _mm_shuffle_epi32(d, 0x93);
            QUARTER(a, b, c, d);
            b = _mm_shuffle_epi32(b, 0x93), c = _mm_shuffle_epi32(c, 0x4E), d = _mm_shuffle_epi32(d, 0x39);
        }
        sum = _mm_xor_si128(sum, _mm_add_epi32(a, a0));
        d0 = _mm_add_epi32(d0, _mm_set_epi32(0, 0, 0, 1));
    }
    return (u64)_mm_cvtsi128_si64(sum);
}

/* ---- matrix: products of 128 x 128 doubles, scalar and in pairs ---- */
static double A[128][128], B[128][128], C[128][128];
static u64 matrix(void)
{
    for (int i = 0; i < 128; i++)
        for (int k = 0; k < 128; k++)
            A[i][k] = 1.0 / (i + k + 1), B[i][k] = i - 0.5 * k;
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < 128; i++)
            for (int k = 0; k < 128; k++) {
                double s = 0;
                for (int j = 0; j < 128; j++)
                    s += A[i][j] * B[j][k];
                C[i][k] = s;
            }
        for (int i = 0; i < 128; i++)
            for (int j = 0; j < 128; j++) {
                __m128d f = _mm_set1_pd(A[i][j] * 0.001);
                for (int k = 0; k < 128; k += 2)
                    _mm_storeu_pd(&B[i][k], _mm_add_pd(_mm_loadu_pd(&B[i][k]), _mm_mul_pd(f, _mm_loadu_pd(&C[j][k]))));
            }
    }
    double sum = 0;
    for (int i = 0; i < 128; i++)
        sum += C[i][i] + B[i][127 - i];
    u64 bits;
    __builtin_memcpy(&bits, &sum, 8);
    return bits;
}

/* ---- extended: a series in 80-bit precision ---- */
static u64 extended(void)
{
    volatile long double x = 0.5L;
    long double sum = 0;
    for (long i = 1; i < 3000000; i++) {
        sum += x / i - (long double)i * 1e-9L;
        if (sum > 100.0L)
            sum *= 0.25L;
    }
    long double scaled = sum * 1048576.0L;
    return (u64)(long)scaled;
}

void run(void)
{
    put('S');
    end(WORKLOAD());
    (void)scan, (void)chacha, (void)matrix, (void)extended;
}
