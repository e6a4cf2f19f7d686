/* A page of guest memory. Without Python. */
#ifndef VMM_PAGE_H
#define VMM_PAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { PAGE = 4096 };

/* Whether all bytes are 0. The page may stand at any address; another thread may write into it meanwhile. */
static inline bool page_is_zero(const uint8_t *page)
{
    for (size_t at = 0; at < PAGE; at += 64) {
        uint64_t w[8];
        memcpy(w, page + at, sizeof w);
        if (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7])
            return false;
    }
    return true;
}

#endif
