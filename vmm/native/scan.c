/* Bitmaps of pages: which are set, as runs; which pages of a buffer hold only zeros. */
#include "native.h"

#include <string.h>

/* The first bit from `at` on that is `value`, or `count`. */
static uint64_t find(const uint64_t *words, uint64_t at, uint64_t count, bool value)
{
    while (at < count) {
        uint64_t word = (value ? words[at / 64] : ~words[at / 64]) >> at % 64;
        if (word) {
            at += (uint64_t)__builtin_ctzll(word);
            return at < count ? at : count;
        }
        at = (at / 64 + 1) * 64;
    }
    return count;
}

static bool add_run(PyObject *list, uint64_t first, uint64_t end)
{
    PyObject *run = Py_BuildValue("KK", (unsigned long long)first, (unsigned long long)(end - first));
    bool ok = run && PyList_Append(list, run) == 0;
    Py_XDECREF(run);
    return ok;
}

PyObject *native_runs(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer bitmap;
    unsigned long long gap = 0;
    if (!PyArg_ParseTuple(args, "y*|K:runs", &bitmap, &gap))
        return NULL;
    PyObject *list = NULL;
    size_t words = (size_t)bitmap.len / sizeof(uint64_t);
    uint64_t *copy = PyMem_Malloc((words + 1) * sizeof *copy); /* the buffer may not be aligned */
    if (bitmap.len % (Py_ssize_t)sizeof(uint64_t))
        PyErr_SetString(PyExc_ValueError, "a bitmap has whole 64-bit words");
    else if (!copy)
        PyErr_NoMemory();
    else
        list = PyList_New(0);
    if (list) {
        memcpy(copy, bitmap.buf, (size_t)bitmap.len);
        uint64_t count = words * 64, first = find(copy, 0, count, true);
        while (list && first < count) {
            uint64_t end = find(copy, first, count, false), next = find(copy, end, count, true);
            while (next < count && next - end <= gap) {
                end = find(copy, next, count, false);
                next = find(copy, end, count, true);
            }
            if (!add_run(list, first, end))
                Py_CLEAR(list);
            first = next;
        }
    }
    PyMem_Free(copy);
    PyBuffer_Release(&bitmap);
    return list;
}

static bool is_zero(const uint8_t *page, size_t size)
{
    return !page[0] && !memcmp(page, page + 1, size - 1);
}

PyObject *native_nonzero_pages(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer buffer;
    if (!PyArg_ParseTuple(args, "y*:nonzero_pages", &buffer))
        return NULL;
    size_t size = (size_t)buffer.len, pages = (size + PAGE - 1) / PAGE;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(native_words(pages) * sizeof(uint64_t)));
    if (result) {
        uint8_t *bits = (uint8_t *)PyBytes_AS_STRING(result);
        const uint8_t *data = buffer.buf;
        memset(bits, 0, (size_t)PyBytes_GET_SIZE(result));
        Py_BEGIN_ALLOW_THREADS
        for (size_t page = 0; page < pages; page++) {
            size_t left = size - page * PAGE;
            if (!is_zero(data + page * PAGE, left < PAGE ? left : PAGE))
                bits[page / 8] |= (uint8_t)(1u << page % 8);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&buffer);
    return result;
}
