/* The other side of a pager: pages of a machine that runs elsewhere, sent over a connection; those that are waited for
 * there first. Without Python; the memory does not change any more. */
#ifndef VMM_SERVE_H
#define VMM_SERVE_H

#include <stdint.h>

struct serve_region {
    const uint8_t *host;
    uint64_t pages;
    uint64_t *todo; /* a bitmap in whole words: pages that are to be sent; cleared as they are */
};

/* What it is told and tells while it runs, read and written with atomic operations. */
struct serve_counts {
    uint64_t stream;    /* in: send also what nobody waits for */
    uint64_t stop;      /* in: end */
    uint64_t bandwidth; /* in: of the stream, bytes a second at most; 0: as many as go */
    uint64_t bytes, pages, zero, urgent, left;
};

enum serve_end { SERVE_DONE, SERVE_STOPPED, SERVE_LOST, SERVE_DAMAGED, SERVE_NO_MEMORY };

/* Until the other side says that it has everything, or `stop` is set and `wake`, an eventfd, raised, or the connection ends.
 * Blocks. The descriptors stay the caller's. */
enum serve_end serve_pages(int fd, int wake, const struct serve_region *regions, uint32_t count, struct serve_counts *counts);

#endif
