/* The extension module cpu._core: the thread loop and the cores, for cpu/vm.py. */
#include "native/py.h"
#include "native/scripted.h"

#include <errno.h>
#include <linux/kvm.h>
#include <string.h>

PyTypeObject *lv_vm_type, *lv_vcpu_type, *lv_shadow_type;
PyObject *lv_config_error, *lv_host_error, *lv_state_error;

const struct lv_ops *lv_core_by_name(const char *name)
{
    const struct lv_ops *all[] = {&lv_kvm_ops, &lv_scripted_ops, &lv_soft_ops};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i] && !strcmp(all[i]->name, name))
            return all[i];
    return NULL;
}

PyObject *lv_raise(int error, const char *what)
{
    PyObject *class = lv_host_error;
    switch (-error) {
    case EINVAL: case EEXIST: case ENOENT: case ERANGE: case ENOTSUP: case E2BIG: case EBADF:
        class = lv_config_error;
        break;
    case EBUSY:
        class = lv_state_error;
        break;
    default:
        break;
    }
    return PyErr_Format(class, "%s: %s", what, strerror(-error));
}

bool lv_u64(PyObject *object, uint64_t *value)
{
    PyObject *number = PyNumber_Index(object);
    if (!number)
        return false;
    *value = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return !(*value == UINT64_MAX && PyErr_Occurred());
}

static PyObject *supported_cpuid(PyObject *Py_UNUSED(self), PyObject *args)
{
    const char *name;
    struct kvm_cpuid_entry2 entries[256];
    if (!PyArg_ParseTuple(args, "s:supported_cpuid", &name))
        return NULL;
    const struct lv_ops *ops = lv_core_by_name(name);
    uint32_t count = ops && ops->supported_cpuid ? ops->supported_cpuid(entries, 256) : 0;
    return PyBytes_FromStringAndSize((char *)entries, (Py_ssize_t)(count * sizeof entries[0]));
}

static PyObject *msr_list(PyObject *Py_UNUSED(self), PyObject *args)
{
    const char *name;
    uint32_t indices[512];
    if (!PyArg_ParseTuple(args, "s:msr_list", &name))
        return NULL;
    const struct lv_ops *ops = lv_core_by_name(name);
    uint32_t count = ops && ops->msr_list ? ops->msr_list(indices, 512) : 0;
    return PyBytes_FromStringAndSize((char *)indices, (Py_ssize_t)(count * sizeof indices[0]));
}

/* ---- the scripted core ---- */

static struct lv_vcpu *scripted(PyObject *object)
{
    if (!PyObject_TypeCheck(object, lv_vcpu_type)) {
        PyErr_SetString(PyExc_TypeError, "a vCPU of the scripted core is needed");
        return NULL;
    }
    struct lv_vcpu *vcpu = lv_open_vcpu((VcpuObject *)object);
    if (vcpu && (vcpu->vm->ops != &lv_scripted_ops || atomic_load(&vcpu->state) != LV_PARKED)) {
        PyErr_SetString(lv_state_error, "the vCPU is not a parked one of the scripted core");
        return NULL;
    }
    return vcpu;
}

static PyObject *script_append(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *object;
    Py_buffer blob;
    if (!PyArg_ParseTuple(args, "Oy*:script_append", &object, &blob))
        return NULL;
    struct lv_vcpu *vcpu = scripted(object);
    int r = 0;
    if (vcpu) {
        const struct lv_exit *steps = blob.buf;
        size_t count = (size_t)blob.len / sizeof *steps;
        r = (size_t)blob.len % sizeof *steps ? -EINVAL : 0;
        for (size_t i = 0; !r && i < count; i++) {
            bool access = steps[i].kind <= LV_MMIO_WRITE || steps[i].kind == LV_SCRIPT_STORE;
            uint32_t n = steps[i].size;
            if (steps[i].kind > LV_SCRIPT_STORE || steps[i].ndata > LV_EXIT_DATA || steps[i].insn_size > LV_INSN_MAX ||
                (access && n != 1 && n != 2 && n != 4 && n != 8))
                r = -EINVAL;
        }
        if (!r)
            r = lv_script_append(vcpu, steps, (uint32_t)count);
    }
    PyBuffer_Release(&blob);
    if (!vcpu)
        return NULL;
    if (r < 0)
        return lv_raise(r, "cannot extend the script");
    Py_RETURN_NONE;
}

static PyObject *script_answers(PyObject *Py_UNUSED(self), PyObject *object)
{
    struct lv_vcpu *vcpu = scripted(object);
    uint32_t count;
    if (!vcpu)
        return NULL;
    const uint64_t *answers = lv_script_answers(vcpu, &count);
    PyObject *list = PyList_New(count);
    for (uint32_t i = 0; list && i < count; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(answers[i]);
        if (number)
            PyList_SET_ITEM(list, i, number);
        else
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *script_interrupts(PyObject *Py_UNUSED(self), PyObject *object)
{
    if (!PyObject_TypeCheck(object, lv_vm_type))
        return PyErr_Format(PyExc_TypeError, "a VM of the scripted core is needed");
    struct lv_vm *vm = lv_open((VmObject *)object);
    if (!vm)
        return NULL;
    if (vm->ops != &lv_scripted_ops)
        return PyErr_Format(lv_state_error, "the VM is not one of the scripted core");
    uint32_t count = lv_script_interrupts(vm, NULL, 0);
    struct lv_interrupt *log = PyMem_Calloc((size_t)count + 1, sizeof *log);
    if (!log)
        return PyErr_NoMemory();
    lv_script_interrupts(vm, log, count);
    PyObject *list = PyList_New(count);
    for (uint32_t i = 0; list && i < count; i++) {
        PyObject *item = Py_BuildValue("(OKI)", log[i].msi ? Py_True : Py_False, (unsigned long long)log[i].address,
                                       log[i].gsi_or_data);
        if (item)
            PyList_SET_ITEM(list, i, item);
        else
            Py_CLEAR(list);
    }
    PyMem_Free(log);
    return list;
}

static PyMethodDef methods[] = {
    {"supported_cpuid", supported_cpuid, METH_VARARGS, "supported_cpuid(core) -> array of struct kvm_cpuid_entry2"},
    {"msr_list", msr_list, METH_VARARGS, "msr_list(core) -> array of 32-bit MSR indices worth saving"},
    {"script_append", script_append, METH_VARARGS, "script_append(vcpu, array of struct lv_exit)"},
    {"script_answers", script_answers, METH_O, "script_answers(vcpu) -> what its reads yielded"},
    {"script_interrupts", script_interrupts, METH_O, "script_interrupts(vm) -> [(msi, address or level, data or GSI)]"},
    {"direct_probe", lv_direct_probe, METH_VARARGS, "direct_probe(program) -> (1: CPUID faults | 2: breakpoints; or -errno, why not)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "cpu._core", .m_doc = "The vCPU thread loop and the native execution cores.",
    .m_size = -1, .m_methods = methods,
};

static PyObject *error_class(PyObject *errors, const char *name)
{
    return PyObject_GetAttrString(errors, name);
}

static int fill(PyObject *module)
{
    PyObject *errors = PyImport_ImportModule("cpu.errors");
    if (!errors)
        return -1;
    lv_config_error = error_class(errors, "ConfigError");
    lv_host_error = error_class(errors, "HostError");
    lv_state_error = error_class(errors, "StateError");
    Py_DECREF(errors);
    if (!lv_config_error || !lv_host_error || !lv_state_error || lv_exits_init() < 0)
        return -1;
    lv_vm_type = (PyTypeObject *)PyType_FromSpec(&lv_vm_spec);
    lv_vcpu_type = (PyTypeObject *)PyType_FromSpec(&lv_vcpu_spec);
    lv_shadow_type = (PyTypeObject *)PyType_FromSpec(&lv_shadow_spec);
    PyObject *cores = lv_core_by_name("soft") ? Py_BuildValue("(sss)", "kvm", "scripted", "soft")
                                              : Py_BuildValue("(ss)", "kvm", "scripted");
    if (!lv_vm_type || !lv_vcpu_type || !lv_shadow_type || !cores)
        return -1;
    int r = PyModule_AddObjectRef(module, "CORES", cores);
    Py_DECREF(cores);
    if (r < 0 || PyModule_AddIntConstant(module, "MAX_VCPUS", LV_MAX_VCPUS) < 0 ||
        PyModule_AddIntConstant(module, "MAX_SLOTS", LV_MAX_SLOTS) < 0 ||
        PyModule_AddIntConstant(module, "EXIT_SIZE", sizeof(struct lv_exit)) < 0 ||
        PyModule_AddObjectRef(module, "Vm", (PyObject *)lv_vm_type) < 0 ||
        PyModule_AddObjectRef(module, "Vcpu", (PyObject *)lv_vcpu_type) < 0 ||
        PyModule_AddObjectRef(module, "Shadow", (PyObject *)lv_shadow_type) < 0)
        return -1;
    return 0;
}

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && fill(module) < 0)
        Py_CLEAR(module);
    return module;
}
