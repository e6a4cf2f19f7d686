/* Compute guests for tests.bench: one workload each (-DWORKLOAD=...). Results must be equal on every machine. */
#include "guest.h"

/* ---- SHA-256 (FIPS 180-4) ---- */
static const u32 K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
static u32 ror(u32 x, int n) { return x >> n | x << (32 - n); }

static void sha256_block(u32 h[8], const u8 *p)
{
    u32 w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = __builtin_bswap32(*(const u32 *)(p + 4 * i));
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (ror(w[i - 15], 7) ^ ror(w[i - 15], 18) ^ w[i - 15] >> 3) +
               (ror(w[i - 2], 17) ^ ror(w[i - 2], 19) ^ w[i - 2] >> 10);
    for (int i = 0; i < 8; i++)
        v[i] = h[i];
    for (int i = 0; i < 64; i++) {
        u32 t1 = v[7] + (ror(v[4], 6) ^ ror(v[4], 11) ^ ror(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
        u32 t2 = (ror(v[0], 2) ^ ror(v[0], 13) ^ ror(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        for (int k = 7; k; k--)
            v[k] = v[k - 1];
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        h[i] += v[i];
}

static u64 sha256(void)
{
    u32 h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    for (u64 i = 0; i < 1 << 20; i++)
        HEAP[i] = (u8)(i * 131 >> 3);
    for (int round = 0; round < 20; round++)
        for (u64 at = 0; at < 1 << 20; at += 64)
            sha256_block(h, HEAP + at);
    return (u64)h[0] << 32 | h[1];
}

/* ---- quicksort ---- */
static u64 noise(u64 *x) { *x ^= *x << 13; *x ^= *x >> 7; *x ^= *x << 17; return *x; }

static void quick(u32 *a, long n)
{
    while (n > 1) {
        u32 pivot = a[n / 2];
        long i = 0, j = n - 1;
        while (i <= j) {
            while (a[i] < pivot) i++;
            while (a[j] > pivot) j--;
            if (i <= j) { u32 t = a[i]; a[i++] = a[j]; a[j--] = t; }
        }
        quick(a, j + 1);
        a += i;
        n -= i;
    }
}

static u64 sort(void)
{
    u32 *a = (u32 *)HEAP;
    u64 seed = 88172645463325252u, sum = 0;
    for (int round = 0; round < 8; round++) {
        for (long i = 0; i < 1000000; i++)
            a[i] = (u32)noise(&seed);
        quick(a, 1000000);
        for (long i = 0; i < 1000000; i += 997)
            sum = sum * 31 + a[i];
    }
    return sum;
}

/* ---- branches: Collatz sequences, and a byte-code interpreter's switch ---- */
static u64 branches(void)
{
    u64 longest = 0, best = 0, acc = 1, x = 1;
    for (u64 n = 1; n < 1000000; n++) {
        u64 steps = 0;
        for (u64 v = n; v != 1; steps++)
            v = v & 1 ? 3 * v + 1 : v >> 1;
        if (steps > longest) { longest = steps; best = n; }
    }
    for (u32 i = 0; i < 60000000; i++) {
        switch ((x = x * 1103515245 + 12345) >> 16 & 7) {
        case 0: acc += x; break;
        case 1: acc ^= x << 3; break;
        case 2: acc -= i; break;
        case 3: if (acc & 1) acc = acc * 3 + 1; break;
        case 4: acc = acc >> 5 | acc << 59; break;
        case 5: acc |= 1; break;
        case 6: acc = ~acc; break;
        default: acc += acc << 2;
        }
    }
    return best * 1000 + longest + acc;
}

/* ---- memory through the TLB: 512 pages of 4 KiB, another page with every access ---- */
static u64 tlb(void)
{
    u64 sum = 0;
    for (u64 i = 0; i < 512 * 512; i++)
        *(volatile u64 *)(SMALL + i * 8) = i;
    for (int round = 0; round < 100; round++)
        for (u64 i = 0; i < 512 * 512; i += 2) {
            u64 at = (i * 4096 * 5 + i * 8) & (512 * 4096 - 8);
            volatile u64 *p = (volatile u64 *)(SMALL + at);
            sum += *p;
            *p = sum;
        }
    return sum;
}

/* ---- rep movsq: 512 MiB in blocks of 16 MiB ---- */
static u64 movs(void)
{
    for (u64 i = 0; i < 16 << 20; i += 8)
        *(u64 *)(HEAP + i) = i * 0x9e3779b97f4a7c15u;
    for (int round = 0; round < 32; round++) {
        void *to = HEAP + (16 << 20) * (1 + (round & 1)), *from = HEAP + (round & 1 ? 16 << 20 : 0);
        u64 n = (16 << 20) / 8;
        __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    }
    u64 sum = 0;
    for (u64 i = 0; i < 16 << 20; i += 4096)
        sum = sum * 31 + *(u64 *)(HEAP + (32 << 20) + i);
    return sum;
}

void run(void)
{
    put('S');
    end(WORKLOAD());
    (void)sha256, (void)sort, (void)branches, (void)tlb, (void)movs;
}
