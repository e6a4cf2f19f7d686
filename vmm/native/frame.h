/* Frames of a page link (vmm/migration/protocol.py), bitmaps and the clock for the two threads that speak it. Without
 * Python. */
#ifndef VMM_FRAME_H
#define VMM_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "crc.h"
#include "page.h"

enum { FRAME_PAGES = 6, FRAME_DONE = 15, FRAME_PING = 16, FRAME_WANT = 23 };
enum {
    FRAME_HEAD = 16,
    FRAME_RUNS = 64,       /* of one PAGES frame of a page link at most */
    FRAME_DATA_PAGES = 64, /* likewise */
    FRAME_WANTS = 256,     /* of one WANT frame */
    PAGES_HEAD = 12,
    FRAME_MOST = PAGES_HEAD + 8 * FRAME_RUNS + PAGE * FRAME_DATA_PAGES,
    LINK_SILENCE_MS = 30000
};
#define RUN_OF_ZEROES 0x80000000u

/* Pages of a region. In a PAGES table without the region; its count has RUN_OF_ZEROES for pages that have no bytes. */
struct page_run {
    uint32_t first, count;
};
struct wanted_run {
    uint32_t region, first, count;
};

struct frame_head {
    uint8_t kind, flags;
    uint16_t zero;
    uint32_t length, crc, own;
};
_Static_assert(sizeof(struct frame_head) == FRAME_HEAD, "as protocol.py declares it");

/* The header of a frame whose payload follows it in the buffer. */
static inline void frame_seal(uint8_t *frame, uint8_t kind, uint32_t length)
{
    struct frame_head head = {.kind = kind, .length = length, .crc = crc32c(0, frame + FRAME_HEAD, length)};
    head.own = crc32c(0, &head, 12);
    memcpy(frame, &head, sizeof head);
}

/* Whether the header is one, of a frame of `most` bytes at most. */
static inline bool frame_parse(const uint8_t *data, uint32_t most, struct frame_head *head)
{
    memcpy(head, data, sizeof *head);
    return crc32c(0, head, 12) == head->own && !head->flags && !head->zero && head->length <= most;
}

static inline bool bit_of(const uint64_t *words, uint64_t n)
{
    return __atomic_load_n(&words[n / 64], __ATOMIC_ACQUIRE) >> n % 64 & 1;
}

static inline void clear_bit(uint64_t *words, uint64_t n)
{
    __atomic_fetch_and(&words[n / 64], ~(1ull << n % 64), __ATOMIC_RELEASE);
}

static inline void set_bit(uint64_t *words, uint64_t n)
{
    __atomic_fetch_or(&words[n / 64], 1ull << n % 64, __ATOMIC_RELEASE);
}

/* The first bit from `at` on that is set, or `count`. */
static inline uint64_t next_bit(const uint64_t *words, uint64_t at, uint64_t count)
{
    while (at < count) {
        uint64_t word = __atomic_load_n(&words[at / 64], __ATOMIC_ACQUIRE) >> at % 64;
        if (word) {
            at += (uint64_t)__builtin_ctzll(word);
            return at < count ? at : count;
        }
        at = (at / 64 + 1) * 64;
    }
    return count;
}

/* How many bits are set. No other thread may change them meanwhile. */
static inline uint64_t count_bits(const uint64_t *words, uint64_t bits)
{
    uint64_t set = 0;
    for (uint64_t i = 0; i < (bits + 63) / 64; i++)
        set += (uint64_t)__builtin_popcountll(words[i]);
    return set;
}

static inline int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

#endif
