/* cpu._core.Vm's addresses that need no exit (posted, shadow, ioeventfd), and cpu._core.Shadow. */
#include "native/py.h"

#include <errno.h>

static bool parse_range(PyObject *args, PyObject *kwargs, bool tagged, struct lv_access *access, int *tag)
{
    static char *with_tag[] = {"space", "address", "size", "tag", NULL};
    static char *without[] = {"space", "address", "size", NULL};
    int space, size;
    PyObject *address;
    if (!(tagged ? PyArg_ParseTupleAndKeywords(args, kwargs, "iOi|i", with_tag, &space, &address, &size, tag)
                 : PyArg_ParseTupleAndKeywords(args, kwargs, "iOi", without, &space, &address, &size)) ||
        !lv_u64(address, &access->address))
        return false;
    if (space != LV_PORT && space != LV_MMIO) {
        PyErr_SetString(lv_config_error, "space is PORT or MMIO");
        return false;
    }
    if (space == LV_PORT && access->address > 0xffff) {
        PyErr_SetString(lv_config_error, "ports end at 0xffff");
        return false;
    }
    access->space = (uint8_t)space;
    access->size = size < 0 || size > 8 ? 255 : (uint8_t)size;
    return true;
}

PyObject *lv_vm_add_posted(VmObject *self, PyObject *args, PyObject *kwargs)
{
    struct lv_access a;
    int tag = 0;
    if (!parse_range(args, kwargs, true, &a, &tag))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    return vm ? lv_none_or_raise(lv_add_posted(vm, a.space, a.address, a.size, tag), "cannot make the address posted") : NULL;
}

PyObject *lv_vm_remove_posted(VmObject *self, PyObject *args, PyObject *kwargs)
{
    struct lv_access a;
    if (!parse_range(args, kwargs, false, &a, NULL))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    return vm ? lv_none_or_raise(lv_remove_posted(vm, a.space, a.address, a.size), "no such posted address") : NULL;
}

typedef struct {
    PyObject_HEAD
    VmObject *owner;
    uint64_t address;
    uint8_t space, size;
} ShadowObject;

PyObject *lv_vm_add_shadow(VmObject *self, PyObject *args, PyObject *kwargs)
{
    struct lv_access a;
    int tag = 0;
    if (!parse_range(args, kwargs, true, &a, &tag))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    int r = lv_add_shadow(vm, a.space, a.address, a.size, tag);
    if (r < 0)
        return lv_raise(r, "cannot make the address a shadow");
    ShadowObject *shadow = (ShadowObject *)lv_shadow_type->tp_alloc(lv_shadow_type, 0);
    if (!shadow) {
        lv_remove_shadow(vm, a.space, a.address, a.size);
        return NULL;
    }
    shadow->owner = (VmObject *)Py_NewRef((PyObject *)self);
    shadow->space = a.space;
    shadow->address = a.address;
    shadow->size = a.size;
    return (PyObject *)shadow;
}

PyObject *lv_vm_remove_shadow(VmObject *self, PyObject *args, PyObject *kwargs)
{
    struct lv_access a;
    if (!parse_range(args, kwargs, false, &a, NULL))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    return vm ? lv_none_or_raise(lv_remove_shadow(vm, a.space, a.address, a.size), "no such shadow") : NULL;
}

static PyObject *ioeventfd(VmObject *self, PyObject *args, PyObject *kwargs, bool add)
{
    static char *names[] = {"fd", "space", "address", "size", "match", "answerer", NULL};
    static char *without[] = {"fd", "space", "address", "size", "match", NULL};
    int fd, space, size;
    PyObject *address, *match = Py_None, *capsule = Py_None;
    uint64_t at, value = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, add ? "iiOi|OO" : "iiOi|O", add ? names : without, &fd, &space, &address,
                                     &size, &match, &capsule) ||
        !lv_u64(address, &at) || (match != Py_None && !lv_u64(match, &value)))
        return NULL;
    struct lv_answerer *answerer = NULL;
    if (capsule != Py_None && !(answerer = PyCapsule_GetPointer(capsule, LV_ANSWERER_CAPSULE)))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    if ((space != LV_PORT && space != LV_MMIO) || size < 0 || size > 8)
        return lv_raise(-EINVAL, "no such ioeventfd");
    return lv_none_or_raise(lv_ioeventfd(vm, fd, (uint8_t)space, at, (uint32_t)size, match != Py_None, value, answerer, add),
                         add ? "cannot add the ioeventfd" : "no such ioeventfd");
}

PyObject *lv_vm_add_ioeventfd(VmObject *self, PyObject *args, PyObject *kwargs)
{
    return ioeventfd(self, args, kwargs, true);
}

PyObject *lv_vm_remove_ioeventfd(VmObject *self, PyObject *args, PyObject *kwargs)
{
    return ioeventfd(self, args, kwargs, false);
}

/* ---- Shadow ---- */

static PyObject *shadow_set(ShadowObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    /* set(value, after=None) */
    Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    uint64_t value, after = 0;
    if (count < 1 || count + named > 2 ||
        (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "after")))
        return PyErr_Format(PyExc_TypeError, "set(value, after=None)");
    bool has_after = count + named == 2 && args[1] != Py_None;
    if (!lv_u64(args[0], &value) || (has_after && !lv_u64(args[1], &after)))
        return NULL;
    struct lv_vm *vm = lv_open(self->owner);
    return vm ? lv_none_or_raise(lv_shadow_set(vm, self->space, self->address, self->size, value, has_after, after),
                                 "the shadow was removed")
              : NULL;
}

static PyObject *shadow_invalidate(ShadowObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vm *vm = lv_open(self->owner);
    return vm ? lv_none_or_raise(lv_shadow_invalidate(vm, self->space, self->address, self->size), "the shadow was removed")
              : NULL;
}

static void shadow_dealloc(ShadowObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(self->owner);
    type->tp_free(self);
    Py_DECREF(type);
}

static int shadow_traverse(ShadowObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->owner);
    return 0;
}

static PyMethodDef shadow_methods[] = {
    {"set", (PyCFunction)(void (*)(void))shadow_set, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"invalidate", (PyCFunction)shadow_invalidate, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot shadow_slots[] = {
    {Py_tp_dealloc, shadow_dealloc},
    {Py_tp_traverse, shadow_traverse},
    {Py_tp_methods, shadow_methods},
    {0, NULL},
};

PyType_Spec lv_shadow_spec = {
    .name = "cpu._core.Shadow", .basicsize = sizeof(ShadowObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, .slots = shadow_slots,
};
