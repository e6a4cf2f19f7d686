/* vmm._native: the module. */
#include "native.h"

static PyMethodDef functions[] = {
    {"runs", native_runs, METH_VARARGS,
     "runs(bitmap, gap=0) -> [(first, count), ...] of the set bits; runs that at most `gap` clear bits part are one."},
    {"nonzero_pages", native_nonzero_pages, METH_VARARGS,
     "nonzero_pages(buffer) -> a bitmap: which of its 4 KiB pages hold anything but zeros."},
    {0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "vmm._native", .m_size = -1, .m_methods = functions,
    .m_doc = "Guest memory as mappings, and bitmaps of its pages.",
};

PyMODINIT_FUNC PyInit__native(void)
{
    if (PyType_Ready(&native_mapping_type) < 0)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddObjectRef(module, "Mapping", (PyObject *)&native_mapping_type) < 0)
        Py_CLEAR(module);
    return module;
}
