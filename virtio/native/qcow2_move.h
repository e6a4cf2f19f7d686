/* Moving clusters between a qcow2 image and its backing image while the image is used. */
#ifndef VIRTIO_QCOW2_MOVE_H
#define VIRTIO_QCOW2_MOVE_H

#include "qcow2.h"

/* Copy into the image what it reads from its backing image in that range. Others may read and write meanwhile. May block. */
int qcow2_populate(struct image *image, uint64_t offset, uint64_t length);
/* Write what the image itself holds in that range into its backing image, make that durable, and have the range read from
 * there. Writes to it wait. Others may use the rest meanwhile. The backing image has to be writable, used by nobody else,
 * and as long as this one. May block. */
int qcow2_commit(struct image *image, uint64_t offset, uint64_t length);

#endif
