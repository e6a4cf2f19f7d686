/* vmm._native: the module. */
#include "native.h"

static PyMethodDef functions[] = {
    {"runs", native_runs, METH_VARARGS,
     "runs(bitmap, gap=0) -> [(first, count), ...] of the set bits; runs that at most `gap` clear bits part are one."},
    {"nonzero_pages", native_nonzero_pages, METH_VARARGS,
     "nonzero_pages(buffer) -> a bitmap: which of its 4 KiB pages hold anything but zeros."},
    {"save_pages", native_save_pages, METH_VARARGS,
     "save_pages(fd, offset, view, bitmap | None, fresh) -> bytes written: pages to a file, page n at offset + 4096 n. "
     "Pages of zeroes become holes; in a fresh file they are holes already."},
    {"write_pages", native_write_pages, METH_VARARGS,
     "write_pages(fd, offset, view, bitmap, packed) -> bytes: pages of the bitmap to a file; packed: the view holds only "
     "them, one after the other."},
    {"read_pages", native_read_pages, METH_VARARGS,
     "read_pages(fd, offset, view, bitmap, packed) -> bytes: the other way round."},
    {"gather", native_gather, METH_VARARGS,
     "gather(view, bitmap, out) -> pages: copy those of the bitmap, one after the other, to the start of out."},
    {"differing", native_differing, METH_VARARGS, "differing(view, other) -> a bitmap of the pages that are not equal."},
    {"merge", native_merge, METH_VARARGS, "merge(bitmap, other): set in bitmap what is set in other."},
    {"count", native_count, METH_VARARGS, "count(bitmap) -> number of set bits."},
    {"crc32c", native_crc32c, METH_VARARGS, "crc32c(data, crc=0) -> CRC-32C (RFC 3720, 12.1), continued from crc."},
    {"checksums", native_checksums, METH_VARARGS,
     "checksums(fd, size, chunk) -> CRC-32C of each chunk of a file, 32 bits each; holes are not read."},
    {"pack_pages", native_pack_pages, METH_VARARGS,
     "pack_pages(view, bitmap, first, table, out, digests | None, fresh) -> (next, runs, data pages, zero pages, left out): "
     "copy pages of the bitmap, from page `first` on, to `out` as far as there is room, and say in `table` which. Zero "
     "pages are named only; with `fresh` not even that. With `digests`, 16 bytes a page, those that were sent so before "
     "are left out."},
    {"unpack_pages", native_unpack_pages, METH_VARARGS,
     "unpack_pages(view, table, data) -> pages: the other way round. ValueError if it is out of bounds."},
    {"can_page", native_can_page, METH_VARARGS,
     "can_page(kernel): whether this process may have a Pager; `kernel`: for memory that the kernel itself touches (KVM)."},
    {"serve_pages", native_serve_pages, METH_VARARGS,
     "serve_pages(fd, wake, [(memory, bitmap), ...], counts) -> done | stopped | lost | damaged | no memory: send the pages "
     "of the bitmaps to a Pager, those first that it asks for, until it has all. Blocks. `counts`: 64-bit numbers: stream "
     "(also send what nobody asked for), stop, bandwidth, which are read as it goes (raise `wake`, an eventfd, after a "
     "change), and bytes, pages, zero pages, pages asked for, pages left."},
    {0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "vmm._native", .m_size = -1, .m_methods = functions,
    .m_doc = "Guest memory as mappings, and bitmaps of its pages.",
};

PyMODINIT_FUNC PyInit__native(void)
{
    if (PyType_Ready(&native_mapping_type) < 0 || PyType_Ready(&native_pager_type) < 0)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddObjectRef(module, "Mapping", (PyObject *)&native_mapping_type) < 0)
        Py_CLEAR(module);
    if (module && PyModule_AddObjectRef(module, "Pager", (PyObject *)&native_pager_type) < 0)
        Py_CLEAR(module);
    return module;
}
