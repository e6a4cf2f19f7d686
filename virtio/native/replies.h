/* Frames of our own for the guest, which stand in a list until Python takes them. Loop thread, with the GIL. */
#ifndef VIRTIO_REPLIES_H
#define VIRTIO_REPLIES_H

#include "module.h" /* first: it includes Python.h */

enum { REPLIES_MAX = 256 }; /* that wait, of those that the guest can cause at will; further ones are lost */

static inline bool replies_full(const PyObject *replies) { return PyList_GET_SIZE(replies) >= REPLIES_MAX; }

/* 0, or -1 with an exception. */
static inline int replies_add(PyObject *replies, const uint8_t *frame, size_t length)
{
    PyObject *one = PyBytes_FromStringAndSize((const char *)frame, (Py_ssize_t)length);
    int failed = !one || PyList_Append(replies, one);
    Py_XDECREF(one);
    return failed ? -1 : 0;
}

/* The list, in whose place an empty one stands from now on. NULL: an exception is set. */
static inline PyObject *replies_take(PyObject **replies)
{
    PyObject *empty = PyList_New(0), *found = *replies;
    if (!empty)
        return NULL;
    *replies = empty;
    return found;
}

#endif
