/* cpu._core.Vm's interrupts: lines, messages, routes, irqfds. */
#include "native/py.h"

#include <errno.h>

enum { IRQ_LINES = 24, GSI_MAX = 4096, ROUTES_MAX = 4072 };

PyObject *lv_vm_set_irq(VmObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t gsi;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "set_irq(gsi, level)");
    if (!lv_u64(args[0], &gsi))
        return NULL;
    int level = PyObject_IsTrue(args[1]);
    if (level < 0)
        return NULL;
    if (gsi >= IRQ_LINES)
        return PyErr_Format(lv_config_error, "interrupt lines are numbered 0 to %d", IRQ_LINES - 1);
    struct lv_vm *vm = lv_open(self);
    return vm ? lv_none_or_raise(vm->ops->set_irq(vm, (uint32_t)gsi, level), "cannot drive the interrupt line") : NULL;
}

PyObject *lv_vm_signal_msi(VmObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t address, data;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "signal_msi(address, data)");
    if (!lv_u64(args[0], &address) || !lv_u64(args[1], &data))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    return vm ? lv_none_or_raise(vm->ops->signal_msi(vm, address, (uint32_t)data), "cannot signal the MSI") : NULL;
}

static bool attribute(PyObject *object, const char *name, uint64_t *value)
{
    PyObject *number = PyObject_GetAttrString(object, name);
    bool good = number && lv_u64(number, value);
    Py_XDECREF(number);
    return good;
}

PyObject *lv_vm_set_msi_routes(VmObject *self, PyObject *sequence)
{
    PyObject *result = NULL, *items = PySequence_Fast(sequence, "set_msi_routes() takes a sequence of MsiRoute");
    struct lv_route *routes = NULL;
    if (!items)
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
    if (count > ROUTES_MAX) {
        PyErr_Format(lv_config_error, "at most %d MSI routes", ROUTES_MAX);
        goto out;
    }
    routes = PyMem_Calloc((size_t)count + 1, sizeof *routes);
    if (!routes) {
        PyErr_NoMemory();
        goto out;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_Fast_GET_ITEM(items, i);
        uint64_t gsi, address, data;
        if (!attribute(item, "gsi", &gsi) || !attribute(item, "address", &address) || !attribute(item, "data", &data))
            goto out;
        if (gsi < IRQ_LINES || gsi >= GSI_MAX) {
            PyErr_Format(lv_config_error, "MSI routes have GSIs %d to %d", IRQ_LINES, GSI_MAX - 1);
            goto out;
        }
        routes[i] = (struct lv_route){.gsi = (uint32_t)gsi, .address = address, .data = (uint32_t)data};
    }
    struct lv_vm *vm = lv_open(self);
    if (vm)
        result = lv_none_or_raise(lv_set_routes(vm, routes, (uint32_t)count), "cannot set the MSI routes");
out:
    PyMem_Free(routes);
    Py_DECREF(items);
    return result;
}

PyObject *lv_vm_add_irqfd(VmObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "gsi", "resample_fd", NULL};
    int fd, resample_fd = -1;
    unsigned int gsi;
    PyObject *resample = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iI|O:add_irqfd", names, &fd, &gsi, &resample))
        return NULL;
    if (resample != Py_None && (resample_fd = (int)PyLong_AsLong(resample)) == -1 && PyErr_Occurred())
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    if (gsi >= GSI_MAX || (resample_fd >= 0 && gsi >= IRQ_LINES))
        return lv_raise(-EINVAL, "no such GSI for an irqfd");
    return lv_none_or_raise(lv_irqfd(vm, fd, gsi, resample_fd, true), "cannot add the irqfd");
}

PyObject *lv_vm_remove_irqfd(VmObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "gsi", NULL};
    int fd;
    unsigned int gsi;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iI:remove_irqfd", names, &fd, &gsi))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    return vm ? lv_none_or_raise(lv_irqfd(vm, fd, gsi, -1, false), "no such irqfd") : NULL;
}
