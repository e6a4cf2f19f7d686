/* The Python objects of virtio._ring: Memory, Ring, Chain, Image, and what the engines need of them. Loop thread, with the GIL. */
#ifndef VIRTIO_MODULE_H
#define VIRTIO_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "image.h"
#include "ring.h"

typedef struct {
    PyObject_HEAD
    struct memory memory;
    Py_buffer *buffers;   /* one export per region */
    PyObject **objects;   /* the regions as memoryviews, to slice */
    PyObject *written;    /* called with (gpa, length) after a device wrote; or NULL */
    Py_buffer *missing;   /* one export per region, or none */
    PyObject *want;       /* called with (gpa, length) whose missing pages are wanted; or NULL */
    PyObject *written_ranges; /* the same for several ranges, with bytes: pairs of 64 bits; or NULL */
} MemoryObject;

typedef struct {
    PyObject_HEAD
    MemoryObject *memory;
    struct ring ring;
    bool closed;
} RingObject;

typedef struct {
    PyObject_HEAD
    RingObject *ring;
    struct chain chain; /* segments are our own copy */
    uint64_t written;   /* write cursor, bytes */
    bool exposed;       /* writable() handed out views, so that `written` does not say what was written */
    bool returned;
} ChainObject;

typedef struct {
    PyObject_HEAD
    struct image *image;
    PyObject *backing; /* an Image, or NULL */
    Py_buffer dirty;   /* of an overlay */
    bool closed;
} ImageObject;

extern PyTypeObject memory_type, ring_type, chain_type, image_type, block_type, net_type, fs_type;
extern PyObject *guest_error, *state_error;

/* Tell whoever listens that the device wrote there. 0, or -1 with an exception. */
int memory_notify(MemoryObject *memory, uint64_t gpa, uint64_t length);
/* The same for the first `length` bytes of a chain's writable segments, and for the device area of a ring. */
int segments_notify(MemoryObject *memory, const struct segment *segments, uint32_t count, uint64_t length);
int ring_notify_area(RingObject *self);
/* A memoryview of [host, host + size), which lies in one region. NULL with an exception. */
PyObject *region_slice(MemoryObject *memory, const uint8_t *host, uint64_t size);
/* Whether the image is open and has so many bytes; false with an exception. */
bool image_holds(ImageObject *image, uint64_t length);
/* Whether the chain may still be touched; false with StateError. */
bool chain_usable(ChainObject *chain);
/* The ring is among those with used buffers. 0, or -1 with an exception. */
int rings_add(PyObject *rings, RingObject *ring);
/* Of `rings`, which is given up, those whose drivers want a notification; NULL with an exception. */
PyObject *rings_to_notify(PyObject *rings);
/* Raise GuestError from ring.error. */
PyObject *ring_raise(RingObject *self);

#endif
