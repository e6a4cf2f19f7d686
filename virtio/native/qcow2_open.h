/* Opening a qcow2 image whose header was read and checked (virtio/images/header.py). */
#ifndef VIRTIO_QCOW2_OPEN_H
#define VIRTIO_QCOW2_OPEN_H

#include "qcow2.h"

struct qcow2_options {
    int fd, data_fd;
    bool read_only, extended, external, external_raw;
    uint32_t align; /* of data_fd */
    int version, compression;
    unsigned cluster_bits, refcount_order;
    uint64_t length, l1_offset, l1_entries, reftable_offset, reftable_clusters;
    struct image *backing; /* outlives the image */
    const struct drop *ranges; /* clusters of the file, beside the header and the two tables, that are not the guest's */
    unsigned range_count;
    uint64_t cache_bytes;
};

/* NULL: `*problem` says in what way the file makes no sense, else `*error` is an errno. May block. */
struct image *qcow2_open(const struct qcow2_options *options, int *error, const char **problem);

#endif
