/* Entropy of a VM: getrandom(), or ChaCha20 (RFC 8439, 2.3) keyed by the seed; the stream is the key stream from block 0. */
#include "soft/run/entropy.h"

#include <string.h>
#include <sys/random.h>

static uint32_t rotate(uint32_t x, int n) { return x << n | x >> (32 - n); }

static void quarter_round(uint32_t *x, int a, int b, int c, int d)
{
    x[a] += x[b]; x[d] = rotate(x[d] ^ x[a], 16);
    x[c] += x[d]; x[b] = rotate(x[b] ^ x[c], 12);
    x[a] += x[b]; x[d] = rotate(x[d] ^ x[a], 8);
    x[c] += x[d]; x[b] = rotate(x[b] ^ x[c], 7);
}

/* Block `number` of the stream. Key: the seed, little-endian, then zeros; 64-bit block counter, nonce zero. */
static void block(uint64_t seed, uint64_t number, uint8_t out[64])
{
    uint32_t start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, (uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t x[16];
    start[12] = (uint32_t)number;
    start[13] = (uint32_t)(number >> 32);
    memcpy(x, start, sizeof x);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < 4; i++)
            quarter_round(x, i, i + 4, i + 8, i + 12);
        for (int i = 0; i < 4; i++)
            quarter_round(x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4);
    }
    for (int i = 0; i < 16; i++)
        x[i] += start[i];
    memcpy(out, x, sizeof x); /* x86: little-endian already */
}

void soft_entropy_fill(struct soft_entropy *entropy, void *buffer, size_t size)
{
    uint8_t *to = buffer, bytes[64];
    while (size) {
        size_t offset = 0, n = size;
        if (entropy->seeded) {
            offset = entropy->position % 64;
            block(entropy->seed, entropy->position / 64, bytes);
            n = size < 64 - offset ? size : 64 - offset;
            memcpy(to, bytes + offset, n);
            entropy->position += n;
        } else {
            ssize_t got = getrandom(to, size < 256 ? size : 256, 0);
            n = got > 0 ? (size_t)got : 0; /* interrupted by a signal: again */
        }
        to += n;
        size -= n;
    }
}
