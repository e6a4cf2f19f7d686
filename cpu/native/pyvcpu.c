/* cpu._core.Vcpu: resume, kick, state blobs. cpu/vm.py adds the typed registers and complete states. */
#include "native/py.h"

#include <errno.h>
#include <linux/kvm.h>
#include <string.h>

struct lv_vcpu *lv_open_vcpu(VcpuObject *self)
{
    return lv_open(self->owner) ? self->vcpu : NULL;
}

struct lv_vcpu *lv_parked_vcpu(VcpuObject *self)
{
    struct lv_vcpu *vcpu = lv_open_vcpu(self);
    if (vcpu && atomic_load(&vcpu->state) != LV_PARKED) {
        PyErr_Format(lv_state_error, "vCPU %u is running: kick it and take its Interrupted exit first", self->index);
        return NULL;
    }
    return vcpu;
}

static PyObject *vcpu_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"vm", "index", NULL};
    PyObject *owner;
    unsigned int index;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!I:Vcpu", names, lv_vm_type, &owner, &index))
        return NULL;
    VcpuObject *self = (VcpuObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->owner = (VmObject *)Py_NewRef(owner);
    struct lv_vm *vm = lv_open(self->owner);
    if (vm && self->owner->busy) {
        PyErr_SetString(lv_state_error, "a vCPU is made inside another call on the same VM");
        vm = NULL;
    }
    if (!vm) {
        Py_DECREF(self);
        return NULL;
    }
    int r;
    self->owner->busy++;
    Py_BEGIN_ALLOW_THREADS /* KVM may sleep for milliseconds */
    r = lv_vcpu_create(vm, index);
    Py_END_ALLOW_THREADS
    self->owner->busy--;
    if (r < 0) {
        Py_DECREF(self);
        return lv_raise(r, "cannot create the vCPU");
    }
    self->vcpu = vm->vcpus[index];
    self->index = index;
    return (PyObject *)self;
}

static void vcpu_dealloc(VcpuObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(self->owner);
    type->tp_free(self);
    Py_DECREF(type);
}

static int vcpu_traverse(VcpuObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->owner);
    return 0;
}

static PyObject *answer(VcpuObject *self, PyObject *entry, bool park)
{
    bool is_read;
    uint64_t value;
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    if (!vcpu || !lv_entry_value(entry, &is_read, &value))
        return NULL;
    if (is_read != vcpu->wants_value) {
        PyErr_Format(lv_state_error, is_read ? "vCPU %u did not stop in a read" : "vCPU %u waits for CompleteRead",
                     self->index);
        return NULL;
    }
    int r = lv_vcpu_resume(vcpu, value, park);
    if (r < 0)
        return lv_raise(r, "cannot resume the vCPU");
    Py_RETURN_NONE;
}

static PyObject *vcpu_resume(VcpuObject *self, PyObject *entry)
{
    return answer(self, entry, false);
}

static PyObject *vcpu_complete(VcpuObject *self, PyObject *entry)
{
    return answer(self, entry, true);
}

static PyObject *vcpu_kick(VcpuObject *self, PyObject *Py_UNUSED(ignored))
{
    if (self->owner->vm && !self->owner->stopping)
        lv_vcpu_kick(self->vcpu);
    Py_RETURN_NONE;
}

static PyObject *vcpu_get_blob(VcpuObject *self, PyObject *args)
{
    int kind;
    Py_buffer initial = {0};
    unsigned char data[8192];
    if (!PyArg_ParseTuple(args, "i|y*:get_blob", &kind, &initial))
        return NULL;
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    PyObject *result = NULL;
    size_t size = initial.obj ? (size_t)initial.len : sizeof data;
    if (vcpu && size > sizeof data) {
        PyErr_SetString(lv_config_error, "too many MSRs in one call");
    } else if (vcpu) {
        memset(data, 0, sizeof data);
        if (initial.obj)
            memcpy(data, initial.buf, size);
        int r = vcpu->vm->ops->get_vcpu(vcpu, (enum lv_state_kind)kind, data, size);
        if (r < 0)
            lv_raise(r, "cannot read the vCPU's state");
        else if (kind == LV_STATE_MSRS) /* (how many, the structure) */
            result = Py_BuildValue("iy#", r, (char *)data, (Py_ssize_t)size);
        else
            result = PyBytes_FromStringAndSize((char *)data, r);
    }
    if (initial.obj)
        PyBuffer_Release(&initial);
    return result;
}

static PyObject *vcpu_set_blob(VcpuObject *self, PyObject *args)
{
    int kind;
    Py_buffer blob;
    if (!PyArg_ParseTuple(args, "iy*:set_blob", &kind, &blob))
        return NULL;
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    int r = vcpu ? vcpu->vm->ops->set_vcpu(vcpu, (enum lv_state_kind)kind, blob.buf, (size_t)blob.len) : 0;
    PyBuffer_Release(&blob);
    if (!vcpu)
        return NULL;
    return r < 0 ? lv_raise(r, "cannot set the vCPU's state") : PyLong_FromLong(r);
}

static PyObject *vcpu_set_cpuid_blob(VcpuObject *self, PyObject *args)
{
    Py_buffer blob;
    if (!PyArg_ParseTuple(args, "y*:set_cpuid_blob", &blob))
        return NULL;
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    int r = 0;
    size_t each = sizeof(struct kvm_cpuid_entry2);
    if (vcpu)
        r = (size_t)blob.len % each ? -EINVAL
            : vcpu->vm->ops->set_cpuid(vcpu, blob.buf, (uint32_t)((size_t)blob.len / each));
    PyBuffer_Release(&blob);
    if (!vcpu)
        return NULL;
    if (r < 0)
        return lv_raise(r, "cannot set CPUID");
    Py_RETURN_NONE;
}

static PyObject *vcpu_stood_still(VcpuObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vcpu *vcpu = lv_parked_vcpu(self);
    if (!vcpu)
        return NULL;
    int r = vcpu->vm->ops->stood_still ? vcpu->vm->ops->stood_still(vcpu) : 0;
    if (r < 0)
        return lv_raise(r, "cannot tell the guest that it stood still");
    Py_RETURN_NONE;
}

static PyObject *vcpu_nmi(VcpuObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vcpu *vcpu = lv_open_vcpu(self);
    if (!vcpu)
        return NULL;
    int r = vcpu->vm->ops->nmi ? vcpu->vm->ops->nmi(vcpu) : -ENOTSUP;
    if (r < 0)
        return lv_raise(r, "cannot inject an NMI");
    Py_RETURN_NONE;
}

static PyObject *vcpu_get_index(VcpuObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(self->index);
}

static PyObject *vcpu_get_parked(VcpuObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->owner->vm && atomic_load(&self->vcpu->state) == LV_PARKED);
}

static PyMethodDef vcpu_methods[] = {
    {"resume", (PyCFunction)vcpu_resume, METH_O, "Answer the exit that parked it and run on."},
    {"complete", (PyCFunction)vcpu_complete, METH_O, "Answer the exit that parked it; Interrupted follows."},
    {"kick", (PyCFunction)vcpu_kick, METH_NOARGS, "Make it park with Interrupted soon. Any thread."},
    {"get_blob", (PyCFunction)vcpu_get_blob, METH_VARARGS, "get_blob(kind[, initial]) -> bytes; MSRS: (count, bytes)."},
    {"set_blob", (PyCFunction)vcpu_set_blob, METH_VARARGS, "set_blob(kind, data) -> bytes or MSRs done."},
    {"set_cpuid_blob", (PyCFunction)vcpu_set_cpuid_blob, METH_VARARGS, "An array of struct kvm_cpuid_entry2."},
    {"set_debug_blob", (PyCFunction)lv_vcpu_set_debug_blob, METH_VARARGS, "A struct lv_debug."},
    {"translate", (PyCFunction)lv_vcpu_translate, METH_O, "The guest-physical address of a linear one, or None."},
    {"trace_blob", (PyCFunction)lv_vcpu_trace_blob, METH_NOARGS, "An array of struct lv_trace_entry, the oldest first."},
    {"past_blob", (PyCFunction)lv_vcpu_past_blob, METH_NOARGS, "(CLOCK_MONOTONIC in ns, array of struct lv_past_exit)."},
    {"stood_still", (PyCFunction)vcpu_stood_still, METH_NOARGS, "Have the guest's watchdogs told that it stood still."},
    {"nmi", (PyCFunction)vcpu_nmi, METH_NOARGS, "Inject an NMI."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef vcpu_getset[] = {
    {"index", (getter)vcpu_get_index, NULL, "Its number, which is its APIC id.", NULL},
    {"parked", (getter)vcpu_get_parked, NULL, "Whether it waits for resume().", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot vcpu_slots[] = {
    {Py_tp_new, vcpu_new},
    {Py_tp_dealloc, vcpu_dealloc},
    {Py_tp_traverse, vcpu_traverse},
    {Py_tp_methods, vcpu_methods},
    {Py_tp_getset, vcpu_getset},
    {0, NULL},
};

PyType_Spec lv_vcpu_spec = {
    .name = "cpu._core.Vcpu", .basicsize = sizeof(VcpuObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, .slots = vcpu_slots,
};
