/* Methods of cpu._core.Vm for direct execution, and whether the host can. cpu/direct.py has what they mean. */
#include "native/loop_internal.h"
#include "native/py.h"
#include "soft/soft.h"

#include <errno.h>

enum { MAX_RANGES = 4 };

PyObject *lv_vm_set_direct(VmObject *self, PyObject *args)
{
    int fd, always, r = 0;
    const char *program;
    PyObject *list;
    struct lv_direct_memory memory[MAX_RANGES];
    if (!PyArg_ParseTuple(args, "iO!sp:set_direct", &fd, &PyList_Type, &list, &program, &always))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(list);
    if (!vm->ops->set_direct || count > MAX_RANGES)
        return lv_raise(-ENOTSUP, "this core executes nothing directly");
    for (Py_ssize_t i = 0; i < count && !r; i++) {
        PyObject *buffer;
        unsigned long long offset;
        Py_buffer view;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "OK", &buffer, &offset) ||
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) < 0)
            return NULL;
        memory[i] = (struct lv_direct_memory){view.buf, (uint64_t)view.len, offset}; /* the address is its slot's as well */
        PyBuffer_Release(&view);
    }
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    r = vm->ops->set_direct(vm, memory, (uint32_t)count, fd, program, always);
    Py_END_ALLOW_THREADS
    self->busy--;
    return lv_none_or_raise(r, "cannot execute directly");
}

PyObject *lv_direct_probe(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *program;
    char why[160] = "";
    int r;
    if (!PyArg_ParseTuple(args, "s:direct_probe", &program))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    r = soft_direct_probe(program, why, sizeof why);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("is", r, why);
}
