/* vmm._native: what the machine does to guest memory without Python. Knows no devices and no cores. */
#ifndef VMM_NATIVE_H
#define VMM_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

#include "page.h"

enum { LARGE = 2 << 20 };

/* mapping.c */
extern PyTypeObject native_mapping_type;

/* scan.c: module functions */
PyObject *native_runs(PyObject *module, PyObject *args);
PyObject *native_nonzero_pages(PyObject *module, PyObject *args);

/* pages.c: module functions */
PyObject *native_save_pages(PyObject *module, PyObject *args);
PyObject *native_write_pages(PyObject *module, PyObject *args);
PyObject *native_read_pages(PyObject *module, PyObject *args);
PyObject *native_gather(PyObject *module, PyObject *args);
PyObject *native_differing(PyObject *module, PyObject *args);
PyObject *native_merge(PyObject *module, PyObject *args);
PyObject *native_count(PyObject *module, PyObject *args);
PyObject *native_crc32c(PyObject *module, PyObject *args);
PyObject *native_checksums(PyObject *module, PyObject *args);

/* migrate.c: module functions */
PyObject *native_pack_pages(PyObject *module, PyObject *args);
PyObject *native_unpack_pages(PyObject *module, PyObject *args);

/* pypager.c */
extern PyTypeObject native_pager_type;
PyObject *native_can_page(PyObject *module, PyObject *args);
PyObject *native_serve_pages(PyObject *module, PyObject *args);

/* Bit n of a bitmap in 64-bit words of this host. */
static inline void native_set_bit(uint64_t *words, uint64_t n) { words[n / 64] |= 1ull << n % 64; }
static inline size_t native_words(uint64_t bits) { return (size_t)((bits + 63) / 64); }

#endif
