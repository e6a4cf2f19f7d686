/* What others than the image itself use of compressed clusters. */
#ifndef VIRTIO_QCOW2_PACK_H
#define VIRTIO_QCOW2_PACK_H

#include "qcow2.h"

/* Decompress `size` bytes where the host lacks a library; set once, by the Python module. */
extern int (*image_unpack_elsewhere)(int type, const void *data, size_t length, void *to, size_t size);

/* A whole cluster at `offset` from its compressed bytes, which are fewer than a cluster. May block. */
int qcow2_write_packed(struct image *image, uint64_t offset, const void *data, uint64_t length);

#endif
