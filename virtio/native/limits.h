/* Token buckets: how many operations and bytes a second a device may move (virtio/limits.py).
 *
 * A bucket fills at `rate` tokens a second up to `burst`. What costs more than `burst` passes when the bucket is full and
 * leaves a debt, so that over time exactly `rate` passes, however large requests are. Time is an argument. Loop thread.
 */
#ifndef VIRTIO_LIMITS_H
#define VIRTIO_LIMITS_H

#include "module.h" /* first: it includes Python.h */

enum limit_kind { LIMIT_ALL, LIMIT_READ, LIMIT_WRITE, LIMIT_KINDS };

struct bucket {
    double rate, burst; /* tokens a second, tokens; rate 0: no limit */
    double level;       /* below 0: a debt */
};

typedef struct {
    PyObject_HEAD
    struct bucket ops[LIMIT_KINDS], bytes[LIMIT_KINDS];
    int64_t last; /* ns, when the levels were true */
    bool active;  /* one of the rates is not 0 */
} LimitsObject;

extern PyTypeObject limits_type;

/* How long one operation of so many bytes has to wait, ns; 0: it may pass. LIMIT_ALL looks at the buckets that reads and
 * writes share and no others; the other kinds look at those as well. */
int64_t limits_wait(LimitsObject *limits, enum limit_kind kind, uint64_t bytes, int64_t now);
/* It passes. */
void limits_charge(LimitsObject *limits, enum limit_kind kind, uint64_t bytes);
/* What is given as a Limits object or None, in `*to`, which held a reference to another or NULL. 0, or -1 with TypeError. */
int limits_replace(LimitsObject **to, PyObject *given);

#endif
