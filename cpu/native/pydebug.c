/* Methods of cpu._core.Vcpu and Vm for debuggers: breakpoints, addresses, what was executed. cpu/debug.py has the types. */
#include "native/py.h"
#include "native/loop_internal.h"

#include <errno.h>
#include <string.h>

PyObject *lv_vcpu_set_debug_blob(VcpuObject *self, PyObject *args)
{
    Py_buffer blob;
    if (!PyArg_ParseTuple(args, "y*:set_debug_blob", &blob))
        return NULL;
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    int r = -ENOTSUP;
    if (vcpu && vcpu->vm->ops->set_debug) {
        const struct lv_debug *debug = blob.buf;
        size_t size = (size_t)blob.len;
        r = -EINVAL;
        if (size >= sizeof *debug && debug->count <= LV_MAX_POINTS &&
            size == sizeof *debug + debug->count * sizeof debug->points[0])
            r = vcpu->vm->ops->set_debug(vcpu, debug);
    }
    PyBuffer_Release(&blob);
    if (!vcpu)
        return NULL;
    return lv_none_or_raise(r, "cannot set breakpoints");
}

PyObject *lv_vcpu_translate(VcpuObject *self, PyObject *address)
{
    uint64_t linear, gpa = 0;
    if (!lv_u64(address, &linear))
        return NULL;
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    if (!vcpu)
        return NULL;
    int r = vcpu->vm->ops->translate ? vcpu->vm->ops->translate(vcpu, linear, &gpa) : -ENOTSUP;
    if (r == -EFAULT)
        Py_RETURN_NONE;
    return r < 0 ? lv_raise(r, "cannot translate an address") : PyLong_FromUnsignedLongLong(gpa);
}

PyObject *lv_vcpu_trace_blob(VcpuObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    if (!vcpu)
        return NULL;
    if (!vcpu->vm->ops->trace)
        return PyBytes_FromStringAndSize(NULL, 0);
    uint32_t max = vcpu->vm->trace_entries, count;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(max * sizeof(struct lv_trace_entry)));
    if (!bytes)
        return NULL;
    count = vcpu->vm->ops->trace(vcpu->vm, self->index, (struct lv_trace_entry *)(void *)PyBytes_AS_STRING(bytes), max);
    _PyBytes_Resize(&bytes, (Py_ssize_t)(count * sizeof(struct lv_trace_entry)));
    return bytes;
}

PyObject *lv_vcpu_past_blob(VcpuObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    if (!vcpu)
        return NULL;
    uint64_t kept = vcpu->past_count < LV_PAST_EXITS ? vcpu->past_count : LV_PAST_EXITS;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(kept * sizeof(struct lv_past_exit)));
    if (!bytes)
        return NULL;
    for (uint64_t i = 0; i < kept; i++)
        memcpy(PyBytes_AS_STRING(bytes) + i * sizeof(struct lv_past_exit),
               &vcpu->past[(vcpu->past_count - kept + i) % LV_PAST_EXITS], sizeof(struct lv_past_exit));
    return Py_BuildValue("KN", (unsigned long long)lv_clock(), bytes);
}

PyObject *lv_vm_set_trace(VmObject *self, PyObject *entries)
{
    uint64_t count;
    if (!lv_u64(entries, &count))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    int r = count > 1u << 20 ? -EINVAL : vm->ops->set_trace ? vm->ops->set_trace(vm, (uint32_t)count) : -ENOTSUP;
    if (r >= 0)
        vm->trace_entries = (uint32_t)count;
    return lv_none_or_raise(r, "cannot keep a trace");
}
