/* Memory that comes after its machine: a thread answers page faults (userfaultfd(2)) with pages from a connection. Without
 * Python, so that neither a fault nor its answer ever waits for the interpreter's lock.
 *
 * A page is *missing* until it came; the bitmaps say which are, and only the thread clears bits in them. A fault in a page
 * that is not missing gets zeroes at once: it was never sent, or it was given back.
 */
#ifndef VMM_PAGER_H
#define VMM_PAGER_H

#include <stdbool.h>
#include <stdint.h>

enum pager_state {
    PAGER_LIVE,   /* pages come */
    PAGER_BROKEN, /* the connection ended: faults wait for the next one */
    PAGER_WHOLE,  /* nothing is missing; the thread has ended */
    PAGER_GIVEN_UP /* missing pages read as zeroes: nobody needs the machine any more */
};

struct pager_region {
    uint8_t *host;
    uint64_t pages;
    uint64_t *missing; /* a bitmap in whole words; lives longer than the pager */
};

struct pager_counts {
    uint64_t left;   /* pages that are missing */
    uint64_t faults; /* that waited for the connection */
    uint64_t slowest_ns, waited_ns; /* of those: the longest wait, and all of them */
    uint64_t pages, zero; /* that came */
};

struct pager;

/* Ask the kernel for a userfaultfd: -errno, or the descriptor. `kernel`: faults of the kernel itself (KVM's) are needed. */
int pager_open(bool kernel);

/* Opens, registers the regions and gives back what stands in their missing pages. NULL with *error (an errno). No thread
 * may use the pages meanwhile. */
struct pager *pager_new(const struct pager_region *regions, uint32_t count, bool kernel, int *error);
/* Take pages from this connection from now on, whose descriptor is the pager's; *any thread*. 0 or an errno. */
int pager_attach(struct pager *pager, int fd);
/* Leave the connection, as if it had ended. */
void pager_detach(struct pager *pager);
/* Until this is called, a connection that ends gives the memory up. */
void pager_commit(struct pager *pager);
/* Fetch these before others; pager_fd() is readable when some of them came. */
void pager_want(struct pager *pager, uint32_t region, uint64_t first, uint64_t count);
/* An eventfd: pages that were wanted came, or the state changed. */
int pager_fd(const struct pager *pager);
enum pager_state pager_state(struct pager *pager);
/* Why it is broken; "" if it is not. Static text. */
const char *pager_error(struct pager *pager);
void pager_counts(struct pager *pager, struct pager_counts *counts);
/* Ends the thread; whoever waits in a fault goes on, with zeroes. */
void pager_free(struct pager *pager);

#endif
