/* The bytes of descriptor chains as segments of guest memory. Any thread. */
#include "ring.h"

#include <stdlib.h>
#include <string.h>

/* The next piece of [skip, skip + length) in a segment; false: none of it is there. */
static bool piece(const struct segment *segment, uint64_t *skip, uint64_t length, struct iovec *part)
{
    if (*skip >= segment->len) {
        *skip -= segment->len;
        return false;
    }
    uint64_t there = segment->len - *skip;
    *part = (struct iovec){segment->host + *skip, there < length ? there : length};
    *skip = 0;
    return true;
}

uint64_t segments_copy(const struct segment *segments, uint32_t count, uint64_t skip, void *flat, uint64_t length, bool to_flat)
{
    uint64_t done = 0;
    for (uint32_t i = 0; i < count && done < length; i++) {
        struct iovec part;
        if (!piece(&segments[i], &skip, length - done, &part))
            continue;
        char *at = (char *)flat + done;
        memcpy(to_flat ? at : part.iov_base, to_flat ? part.iov_base : at, part.iov_len);
        done += part.iov_len;
    }
    return done;
}

uint32_t segments_iovs(const struct segment *segments, uint32_t count, uint64_t skip, uint64_t length, struct iovec *iov,
                       uint32_t most)
{
    uint32_t iovs = 0;
    for (uint32_t i = 0; i < count && length && iovs < most; i++)
        if (piece(&segments[i], &skip, length, &iov[iovs]))
            length -= iov[iovs++].iov_len;
    return iovs;
}

bool chain_keep(struct chain *kept, const struct chain *chain)
{
    size_t segments = (size_t)chain->readable + chain->writable;
    struct segment *copy = malloc((segments + 1) * sizeof *copy);
    if (!copy)
        return false;
    memcpy(copy, chain->segments, segments * sizeof *copy);
    *kept = *chain;
    kept->segments = copy;
    return true;
}
