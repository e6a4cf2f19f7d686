/* What the files of the Python extension share. Everything here holds the GIL. */
#ifndef LV_PY_H
#define LV_PY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "native/loop.h"

struct lv_slot {
    bool used;
    uint64_t gpa;
    bool readonly, logged;
    Py_buffer buffer;  /* held while the slot maps it */
    uint64_t *written; /* while the slot is logged: a bit for each page that memory_written() named */
};

typedef struct {
    PyObject_HEAD
    struct lv_vm *vm;      /* NULL once closed */
    uint32_t busy;         /* inside a call that must not see the VM closed */
    bool stopping;
    pthread_mutex_t log_lock; /* the next two, against engines' threads; the loop reads them without */
    bool logging;          /* some slot has a dirty log */
    struct lv_slot slots[LV_MAX_SLOTS];
} VmObject;

typedef struct {
    PyObject_HEAD
    VmObject *owner;       /* strong */
    struct lv_vcpu *vcpu;  /* valid while owner->vm is */
    uint32_t index;
} VcpuObject;

extern PyTypeObject *lv_vm_type, *lv_vcpu_type, *lv_shadow_type;
extern PyType_Spec lv_vm_spec, lv_vcpu_spec, lv_shadow_spec;
extern PyObject *lv_config_error, *lv_host_error, *lv_state_error;

const struct lv_ops *lv_core_by_name(const char *name);

/* Raise the error class that fits -errno, "what: strerror". Always NULL. */
PyObject *lv_raise(int error, const char *what);
/* The open VM, or NULL with StateError. After arguments are parsed: their __index__ and the like may close it. */
struct lv_vm *lv_open(VmObject *self);
struct lv_vcpu *lv_open_vcpu(VcpuObject *self);
/* The vCPU, which must be parked; NULL with StateError. */
struct lv_vcpu *lv_parked_vcpu(VcpuObject *self);
/* An unsigned integer; false with an exception. */
bool lv_u64(PyObject *object, uint64_t *value);

/* None, or lv_raise() for r < 0. */
PyObject *lv_none_or_raise(int r, const char *what);

/* Methods of Vm in pyaccess.c and pyirq.c; their Python signatures are in _core.pyi. */
PyObject *lv_vm_add_posted(VmObject *self, PyObject *args, PyObject *kwargs);
PyObject *lv_vm_remove_posted(VmObject *self, PyObject *args, PyObject *kwargs);
PyObject *lv_vm_add_shadow(VmObject *self, PyObject *args, PyObject *kwargs);
PyObject *lv_vm_remove_shadow(VmObject *self, PyObject *args, PyObject *kwargs);
PyObject *lv_vm_add_ioeventfd(VmObject *self, PyObject *args, PyObject *kwargs);
PyObject *lv_vm_remove_ioeventfd(VmObject *self, PyObject *args, PyObject *kwargs);
PyObject *lv_vm_set_irq(VmObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *lv_vm_signal_msi(VmObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *lv_vm_set_msi_routes(VmObject *self, PyObject *sequence);
PyObject *lv_vm_add_irqfd(VmObject *self, PyObject *args, PyObject *kwargs);
PyObject *lv_vm_remove_irqfd(VmObject *self, PyObject *args, PyObject *kwargs);

/* pydirect.c */
PyObject *lv_vm_set_direct(VmObject *self, PyObject *args);
PyObject *lv_direct_probe(PyObject *module, PyObject *args);
/* Methods of Vcpu and Vm in pydebug.c. */
PyObject *lv_vcpu_set_debug_blob(VcpuObject *self, PyObject *args);
PyObject *lv_vcpu_translate(VcpuObject *self, PyObject *address);
PyObject *lv_vcpu_trace_blob(VcpuObject *self, PyObject *ignored);
PyObject *lv_vcpu_past_blob(VcpuObject *self, PyObject *ignored);
PyObject *lv_vm_set_trace(VmObject *self, PyObject *entries);

/* exits.c: the classes of cpu.exits, made without running Python code. */
int lv_exits_init(void);
PyObject *lv_exit_object(const struct lv_exit *exit);
PyObject *lv_posted_object(int32_t tag, uint32_t size, PyObject *data); /* steals data */
PyObject *lv_alarm_object(void);
/* resume()'s argument: true for Resume; CompleteRead sets *value and *is_read. */
bool lv_entry_value(PyObject *entry, bool *is_read, uint64_t *value);

#endif
