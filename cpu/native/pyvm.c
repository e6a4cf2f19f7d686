/* cpu._core.Vm: life, memory slots, the channel of exits, time, state. pyaccess.c and pyirq.c have its other methods. */
#include "native/loop_internal.h"
#include "native/py.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };
#define ADDRESS_LIMIT (1ull << 52) /* the widest physical address (SDM 3A 4.1.4) */

struct lv_vm *lv_open(VmObject *self)
{
    if (!self->vm || self->stopping) {
        PyErr_SetString(lv_state_error, "the VM is closed");
        return NULL;
    }
    if (lv_forked(self->vm)) {
        PyErr_SetString(lv_state_error, "the VM belongs to the process that made it; this one, its child, can only close it");
        return NULL;
    }
    return self->vm;
}

PyObject *lv_none_or_raise(int r, const char *what)
{
    if (r < 0)
        return lv_raise(r, what);
    Py_RETURN_NONE;
}

/* A device wrote there: into the bitmaps of the slots that are logged. Any thread, with or without the GIL. */
static void log_written(void *owner, uint64_t gpa, uint64_t size)
{
    VmObject *self = owner;
    pthread_mutex_lock(&self->log_lock);
    for (unsigned int i = 0; self->logging && size && i < LV_MAX_SLOTS; i++) {
        const struct lv_slot *s = &self->slots[i];
        uint64_t length = (uint64_t)s->buffer.len;
        if (!s->used || !s->written || (gpa >= s->gpa ? gpa - s->gpa >= length : s->gpa - gpa >= size))
            continue;
        uint64_t start = gpa > s->gpa ? gpa - s->gpa : 0, rest = size - (gpa > s->gpa ? 0 : s->gpa - gpa);
        uint64_t last = (rest > length - start ? length - 1 : start + rest - 1) / PAGE;
        for (uint64_t page = start / PAGE; page <= last; page++)
            s->written[page / 64] |= 1ull << page % 64;
    }
    pthread_mutex_unlock(&self->log_lock);
}

static PyObject *vm_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"core", "vcpus", "virtual_clock", "virtual_ips", "epoch_ns", "seed", "system_fd", "pit", "finish",
                            "parallel", NULL};
    const char *core;
    unsigned int vcpus = 1;
    int virtual_clock = 0, system_fd = -1, pit = 1, finish = 1, parallel = 0, error = 0;
    unsigned long long ips = 1000000000, epoch = 0;
    PyObject *seed = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s|IpKKOippp:Vm", names, &core, &vcpus, &virtual_clock, &ips, &epoch,
                                     &seed, &system_fd, &pit, &finish, &parallel))
        return NULL;
    const struct lv_ops *ops = lv_core_by_name(core);
    if (!ops) {
        PyErr_Format(lv_config_error, "this build has no execution core named %.40s", core);
        return NULL;
    }
    if (!vcpus || vcpus > LV_MAX_VCPUS || !ips) {
        PyErr_Format(lv_config_error, "a VM has 1 to %d vCPUs, and time must pass", LV_MAX_VCPUS);
        return NULL;
    }
    struct lv_config config = {.vcpus = vcpus, .virtual_clock = virtual_clock, .virtual_ips = ips, .epoch_ns = epoch,
                               .seeded = seed != Py_None, .system_fd = system_fd, .pit = pit,
                               .finish = finish, .parallel = parallel};
    if (config.seeded && !lv_u64(seed, &config.seed))
        return NULL;
    VmObject *self = (VmObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    struct lv_vm *vm;
    pthread_mutex_init(&self->log_lock, NULL);
    Py_BEGIN_ALLOW_THREADS /* KVM may sleep for milliseconds */
    vm = lv_vm_create(ops, &config, &error);
    Py_END_ALLOW_THREADS
    self->vm = vm;
    if (!vm) {
        Py_DECREF(self);
        return lv_raise(error, "cannot create a VM");
    }
    vm->owner = self;
    vm->written = log_written;
    return (PyObject *)self;
}

static void release_slot(VmObject *self, struct lv_slot *slot)
{
    pthread_mutex_lock(&self->log_lock);
    slot->used = false;
    free(slot->written);
    slot->written = NULL;
    pthread_mutex_unlock(&self->log_lock);
    PyBuffer_Release(&slot->buffer);
}

static void close_vm(VmObject *self)
{
    struct lv_vm *vm = self->vm;
    if (!vm || self->stopping)
        return;
    self->stopping = true;
    self->vm = NULL;
    if (lv_forked(vm))
        pthread_mutex_init(&self->log_lock, NULL); /* whoever held it is not here to give it up */
    Py_BEGIN_ALLOW_THREADS
    lv_vm_stop(vm);
    lv_vm_destroy(vm); /* KVM takes up to 20 ms */
    Py_END_ALLOW_THREADS
    for (int i = 0; i < LV_MAX_SLOTS; i++)
        if (self->slots[i].used)
            release_slot(self, &self->slots[i]);
}

static PyObject *vm_close(VmObject *self, PyObject *Py_UNUSED(ignored))
{
    if (self->busy) {
        PyErr_SetString(lv_state_error, "close() inside another call on the same VM");
        return NULL;
    }
    close_vm(self);
    Py_RETURN_NONE;
}

static void vm_finalize(PyObject *object)
{
    VmObject *self = (VmObject *)object;
    if (!self->vm || self->stopping)
        return;
#if PY_VERSION_HEX >= 0x030c0000
    PyObject *pending = PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
#endif
    if (PyErr_ResourceWarning(object, 1, "unclosed VM %R", object))
        PyErr_WriteUnraisable(object);
    close_vm(self);
#if PY_VERSION_HEX >= 0x030c0000
    PyErr_SetRaisedException(pending);
#else
    PyErr_Restore(type, value, traceback);
#endif
}

static void vm_dealloc(VmObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static int vm_traverse(VmObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < LV_MAX_SLOTS; i++)
        if (self->slots[i].used)
            Py_VISIT(self->slots[i].buffer.obj);
    return 0;
}

/* ---- memory ---- */

static PyObject *remove_slot(VmObject *self, struct lv_vm *vm, unsigned int slot)
{
    struct lv_slot *s = &self->slots[slot];
    if (!s->used)
        return lv_none_or_raise(-ENOENT, "no such memory slot");
    int r;
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    r = vm->ops->set_slot(vm, slot, s->gpa, 0, NULL, false, false);
    Py_END_ALLOW_THREADS
    self->busy--;
    if (r >= 0)
        release_slot(self, s);
    return lv_none_or_raise(r, "cannot remove the memory slot");
}

/* KVM API 4.8: a dirty log is a multiple of 64 bits. */
static size_t log_words(const struct lv_slot *slot) { return ((size_t)slot->buffer.len / PAGE + 63) / 64; }

/* Map a slot that has its buffer, with or without the dirty log. */
static int map_slot(VmObject *self, struct lv_vm *vm, unsigned int index, bool log_dirty)
{
    struct lv_slot *s = &self->slots[index];
    int r;
    uint64_t *bits = log_dirty && !s->written ? calloc(log_words(s), sizeof *bits) : NULL;
    if (log_dirty && !s->written && !bits)
        return -ENOMEM;
    if (bits) { /* before the core logs, so that a write during the change is in one of the two */
        pthread_mutex_lock(&self->log_lock);
        s->written = bits;
        self->logging = true;
        pthread_mutex_unlock(&self->log_lock);
    }
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    r = vm->ops->set_slot(vm, index, s->gpa, (uint64_t)s->buffer.len, s->buffer.buf, s->readonly, log_dirty);
    Py_END_ALLOW_THREADS
    self->busy--;
    if (r >= 0)
        s->logged = log_dirty;
    pthread_mutex_lock(&self->log_lock);
    if (!s->logged) {
        free(s->written);
        s->written = NULL;
    }
    self->logging = false;
    for (unsigned int i = 0; i < LV_MAX_SLOTS; i++)
        self->logging |= self->slots[i].used && self->slots[i].logged;
    pthread_mutex_unlock(&self->log_lock);
    return r;
}

static PyObject *vm_set_memory_slot(VmObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "address", "memory", "readonly", "log_dirty", NULL};
    unsigned int slot;
    PyObject *address, *memory;
    int readonly = 0, log_dirty = 0, r;
    uint64_t gpa;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IOO|$pp:set_memory_slot", names, &slot, &address, &memory, &readonly,
                                     &log_dirty) || !lv_u64(address, &gpa))
        return NULL;
    if (slot >= LV_MAX_SLOTS)
        return PyErr_Format(lv_config_error, "memory slots are numbered 0 to %d", LV_MAX_SLOTS - 1);
    struct lv_slot *s = &self->slots[slot];
    Py_buffer buffer = {0};
    if (memory != Py_None && PyObject_GetBuffer(memory, &buffer, PyBUF_WRITABLE) < 0)
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm) {
        PyBuffer_Release(&buffer);
        return NULL;
    }
    if (memory == Py_None)
        return remove_slot(self, vm, slot);
    uint64_t size = (uint64_t)buffer.len;
    const char *wrong = NULL;
    if (!size || size % PAGE || gpa % PAGE || (uintptr_t)buffer.buf % PAGE)
        wrong = "a memory slot's address, buffer and length must be multiples of 4096 and not empty";
    else if (gpa >= ADDRESS_LIMIT || size > ADDRESS_LIMIT - gpa)
        wrong = "a memory slot must end below 2^52";
    else if (s->used && (s->buffer.buf != buffer.buf || s->buffer.len != buffer.len || s->gpa != gpa ||
                         s->readonly != (bool)readonly))
        wrong = "the memory slot is in use: only log_dirty can be changed";
    if (wrong) {
        PyBuffer_Release(&buffer);
        PyErr_SetString(lv_config_error, wrong);
        return NULL;
    }
    bool fresh = !s->used;
    if (fresh)
        *s = (struct lv_slot){.used = true, .gpa = gpa, .readonly = readonly, .buffer = buffer};
    else
        PyBuffer_Release(&buffer);
    r = map_slot(self, vm, slot, log_dirty);
    if (r < 0 && fresh)
        release_slot(self, s);
    return lv_none_or_raise(r, "cannot map the memory slot");
}

/* Turn the log of every writable slot on or off; those that cannot be turned on leave all off. */
static PyObject *log_all(VmObject *self, bool on)
{
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    int r = 0;
    for (unsigned int i = 0; i < LV_MAX_SLOTS && r >= 0; i++)
        if (self->slots[i].used && !self->slots[i].readonly && self->slots[i].logged != on)
            r = map_slot(self, vm, i, on);
    for (unsigned int i = 0; i < LV_MAX_SLOTS && r < 0 && on; i++)
        if (self->slots[i].used && self->slots[i].logged)
            map_slot(self, vm, i, false);
    return lv_none_or_raise(r, on ? "cannot start the dirty log" : "cannot stop the dirty log");
}

static PyObject *vm_start_dirty_log(VmObject *self, PyObject *Py_UNUSED(ignored)) { return log_all(self, true); }
static PyObject *vm_stop_dirty_log(VmObject *self, PyObject *Py_UNUSED(ignored)) { return log_all(self, false); }

static PyObject *vm_dirty_log(VmObject *self, PyObject *args)
{
    unsigned int slot;
    if (!PyArg_ParseTuple(args, "I:dirty_log", &slot))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    if (slot >= LV_MAX_SLOTS || !self->slots[slot].used)
        return lv_raise(-ENOENT, "no such memory slot");
    if (!self->slots[slot].logged)
        return lv_raise(-EINVAL, "the memory slot has no dirty log");
    size_t size = log_words(&self->slots[slot]) * sizeof(uint64_t);
    PyObject *bitmap = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (!bitmap)
        return NULL;
    memset(PyBytes_AS_STRING(bitmap), 0, size);
    int r;
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    r = vm->ops->dirty_log(vm, slot, (uint8_t *)PyBytes_AS_STRING(bitmap), size);
    Py_END_ALLOW_THREADS
    self->busy--;
    if (r < 0) {
        Py_DECREF(bitmap);
        return lv_raise(r, "cannot read the dirty log");
    }
    uint64_t *written = self->slots[slot].written;
    pthread_mutex_lock(&self->log_lock);
    for (size_t i = 0; written && i < size / sizeof *written; i++) {
        uint64_t both;
        memcpy(&both, PyBytes_AS_STRING(bitmap) + i * sizeof both, sizeof both);
        both |= written[i];
        memcpy(PyBytes_AS_STRING(bitmap) + i * sizeof both, &both, sizeof both);
        written[i] = 0;
    }
    pthread_mutex_unlock(&self->log_lock);
    return bitmap;
}

static PyObject *vm_memory_written(VmObject *self, PyObject *args)
{
    PyObject *address, *length;
    uint64_t gpa, size;
    if (!PyArg_ParseTuple(args, "OO:memory_written", &address, &length) || !lv_u64(address, &gpa) || !lv_u64(length, &size))
        return NULL;
    if (!lv_open(self))
        return NULL;
    lv_memory_written(self->vm, gpa, size);
    Py_RETURN_NONE;
}

static PyObject *vm_memory_written_ranges(VmObject *self, PyObject *ranges)
{
    char *data;
    Py_ssize_t size;
    uint64_t pair[2];
    if (!lv_open(self) || PyBytes_AsStringAndSize(ranges, &data, &size))
        return NULL;
    for (Py_ssize_t at = 0; at + (Py_ssize_t)sizeof pair <= size; at += (Py_ssize_t)sizeof pair) {
        memcpy(pair, data + at, sizeof pair);
        lv_memory_written(self->vm, pair[0], pair[1]);
    }
    Py_RETURN_NONE;
}

/* ---- the channel ---- */

static PyObject *vm_fileno(VmObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vm *vm = lv_open(self);
    return vm ? PyLong_FromLong(vm->poll_fd) : NULL;
}

/* One Posted from as many consecutive events of the same tag and size as there are; *index moves past them. */
static PyObject *merge(const struct lv_event *events, uint32_t count, uint32_t *index)
{
    const struct lv_event *first = &events[*index];
    uint32_t n = 1;
    if (first->notice) {
        ++*index;
        return lv_posted_object(first->tag, first->size, PyBytes_FromStringAndSize(NULL, 0));
    }
    while (*index + n < count && first[n].kind == LV_EVENT_POSTED && !first[n].notice && first[n].tag == first->tag &&
           first[n].size == first->size)
        n++;
    PyObject *data = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n * first->size);
    for (uint32_t i = 0; data && i < n; i++)
        memcpy(PyBytes_AS_STRING(data) + (size_t)i * first->size, &first[i].value, first->size);
    *index += n;
    return lv_posted_object(first->tag, first->size, data);
}

static PyObject *exit_pair(struct lv_vcpu *vcpu)
{
    PyObject *exit = lv_exit_object(&vcpu->exit);
    PyObject *index = PyLong_FromUnsignedLong(vcpu->index);
    PyObject *pair = exit && index ? PyTuple_New(2) : NULL;
    if (!pair) {
        Py_XDECREF(exit);
        Py_XDECREF(index);
        return NULL;
    }
    PyTuple_SET_ITEM(pair, 0, index);
    PyTuple_SET_ITEM(pair, 1, exit);
    return pair;
}

static PyObject *vm_linger(VmObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    lv_vm_linger(vm); /* with the GIL: giving it up and taking it again costs as much as this waits */
    Py_RETURN_NONE;
}

static PyObject *vm_take(VmObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    if (self->busy) {
        PyErr_SetString(lv_state_error, "take() inside another call on the same VM");
        return NULL;
    }
    uint32_t count;
    PyObject *list = PyList_New(0);
    if (!list)
        return NULL;
    self->busy++; /* making objects may run the garbage collector, and that may run anything */
    const struct lv_event *events = lv_vm_take(vm, &count);
    for (uint32_t i = 0; list && i < count;) {
        PyObject *item = NULL;
        switch (events[i].kind) {
        case LV_EVENT_POSTED:
            item = merge(events, count, &i);
            break;
        case LV_EVENT_EXIT:
            item = exit_pair(vm->vcpus[events[i++].vcpu]);
            break;
        case LV_EVENT_ALARM:
            i++;
            item = lv_alarm_object();
            break;
        default: /* a barrier: nothing to see */
            i++;
            continue;
        }
        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    self->busy--;
    return list;
}

/* ---- time, state, counters ---- */

static PyObject *vm_now_ns(VmObject *self, PyObject *Py_UNUSED(ignored))
{
    struct lv_vm *vm = lv_open(self);
    return vm ? PyLong_FromUnsignedLongLong(lv_vm_now(vm)) : NULL;
}

static PyObject *vm_set_alarm(VmObject *self, PyObject *deadline)
{
    uint64_t ns = UINT64_MAX;
    if (deadline != Py_None && !lv_u64(deadline, &ns))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    return lv_none_or_raise(lv_vm_set_alarm(vm, ns), "cannot set the alarm");
}

/* A PIT that a VM has not has no state, whatever the core says. */
static bool has_state(const struct lv_vm *vm, int kind) { return kind != LV_STATE_PIT || vm->config.pit; }

static PyObject *vm_get_blob(VmObject *self, PyObject *args)
{
    int kind;
    unsigned char data[8192] = {0};
    if (!PyArg_ParseTuple(args, "i:get_blob", &kind))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    int r = has_state(vm, kind) ? vm->ops->get_vm(vm, (enum lv_state_kind)kind, data, sizeof data) : 0;
    return r < 0 ? lv_raise(r, "cannot read the VM's state") : PyBytes_FromStringAndSize((char *)data, r);
}

static PyObject *vm_set_blob(VmObject *self, PyObject *args)
{
    int kind;
    Py_buffer blob;
    if (!PyArg_ParseTuple(args, "iy*:set_blob", &kind, &blob))
        return NULL;
    struct lv_vm *vm = lv_open(self);
    int r;
    if (!vm) {
        PyBuffer_Release(&blob);
        return NULL;
    }
    if (has_state(vm, kind))
        r = vm->ops->set_vm(vm, (enum lv_state_kind)kind, blob.buf, (size_t)blob.len);
    else
        r = blob.len ? -EINVAL : 0;
    if (r >= 0 && kind == LV_STATE_CLOCK && !vm->ops->now) {
        struct kvm_clock_data clock; /* the core took it, so it has this size */
        memcpy(&clock, blob.buf, sizeof clock);
        vm->start_ns = lv_clock() - clock.clock;
    }
    PyBuffer_Release(&blob);
    return lv_none_or_raise(r, "cannot set the VM's state");
}

static PyObject *vm_stats(VmObject *self, PyObject *Py_UNUSED(ignored))
{
    static const char *const names[LV_STATS] = {
        [LV_PORT_IN] = "exit.port-in", [LV_PORT_OUT] = "exit.port-out", [LV_MMIO_READ] = "exit.mmio-read",
        [LV_MMIO_WRITE] = "exit.mmio-write", [LV_HALT] = "exit.halt", [LV_SHUTDOWN] = "exit.shutdown",
        [LV_SYSTEM_EVENT] = "exit.system-event", [LV_FAIL_ENTRY] = "exit.fail-entry",
        [LV_INTERNAL_ERROR] = "exit.internal-error", [LV_DEBUG] = "exit.debug", [LV_INTERRUPTED] = "exit.interrupted",
        [LV_STAT_POSTED] = "posted", [LV_STAT_SHADOW] = "shadow", [LV_STAT_IOEVENTFD] = "ioeventfd",
        [LV_STAT_ANSWERED] = "ioeventfd.answered",
        [LV_STAT_PUT_OFF] = "ioeventfd.put_off", [LV_STAT_POSTED_WAIT] = "posted.waits", [LV_STAT_SLEEP] = "sleeps"};
    struct lv_stat own[64];
    struct lv_vm *vm = lv_open(self);
    PyObject *dict = vm ? PyDict_New() : NULL;
    if (!dict)
        return NULL;
    uint32_t count = vm->ops->stats ? vm->ops->stats(vm, own, 64) : 0;
    for (uint32_t i = 0; i < LV_STATS + count; i++) {
        const char *name = i < LV_STATS ? names[i] : own[i - LV_STATS].name;
        uint64_t value = i < LV_STATS ? atomic_load(&vm->stats[i]) : own[i - LV_STATS].value;
        PyObject *number = PyLong_FromUnsignedLongLong(value);
        if (!number || PyDict_SetItemString(dict, name, number) < 0) {
            Py_XDECREF(number);
            Py_DECREF(dict);
            return NULL;
        }
        Py_DECREF(number);
    }
    return dict;
}

static PyObject *vm_last_finished(VmObject *self, PyObject *Py_UNUSED(ignored))
{
    uint8_t bytes[LV_INSN_MAX];
    struct lv_vm *vm = lv_open(self);
    if (!vm)
        return NULL;
    uint32_t size = vm->ops->last_finished ? vm->ops->last_finished(vm, bytes) : 0;
    return PyBytes_FromStringAndSize((const char *)bytes, size);
}

static PyMethodDef vm_methods[] = {
    {"set_memory_slot", (PyCFunction)(void (*)(void))vm_set_memory_slot, METH_VARARGS | METH_KEYWORDS, NULL},
    {"start_dirty_log", (PyCFunction)vm_start_dirty_log, METH_NOARGS, NULL},
    {"stop_dirty_log", (PyCFunction)vm_stop_dirty_log, METH_NOARGS, NULL},
    {"dirty_log", (PyCFunction)vm_dirty_log, METH_VARARGS, NULL},
    {"memory_written", (PyCFunction)vm_memory_written, METH_VARARGS, NULL},
    {"memory_written_ranges", (PyCFunction)vm_memory_written_ranges, METH_O, NULL},
    {"fileno", (PyCFunction)vm_fileno, METH_NOARGS, NULL},
    {"take", (PyCFunction)vm_take, METH_NOARGS, NULL},
    {"linger", (PyCFunction)vm_linger, METH_NOARGS, NULL},
    {"add_posted", (PyCFunction)(void (*)(void))lv_vm_add_posted, METH_VARARGS | METH_KEYWORDS, NULL},
    {"remove_posted", (PyCFunction)(void (*)(void))lv_vm_remove_posted, METH_VARARGS | METH_KEYWORDS, NULL},
    {"add_shadow", (PyCFunction)(void (*)(void))lv_vm_add_shadow, METH_VARARGS | METH_KEYWORDS, NULL},
    {"remove_shadow", (PyCFunction)(void (*)(void))lv_vm_remove_shadow, METH_VARARGS | METH_KEYWORDS, NULL},
    {"add_ioeventfd", (PyCFunction)(void (*)(void))lv_vm_add_ioeventfd, METH_VARARGS | METH_KEYWORDS, NULL},
    {"remove_ioeventfd", (PyCFunction)(void (*)(void))lv_vm_remove_ioeventfd, METH_VARARGS | METH_KEYWORDS, NULL},
    {"set_irq", (PyCFunction)(void (*)(void))lv_vm_set_irq, METH_FASTCALL, NULL},
    {"signal_msi", (PyCFunction)(void (*)(void))lv_vm_signal_msi, METH_FASTCALL, NULL},
    {"set_msi_routes", (PyCFunction)lv_vm_set_msi_routes, METH_O, NULL},
    {"add_irqfd", (PyCFunction)(void (*)(void))lv_vm_add_irqfd, METH_VARARGS | METH_KEYWORDS, NULL},
    {"remove_irqfd", (PyCFunction)(void (*)(void))lv_vm_remove_irqfd, METH_VARARGS | METH_KEYWORDS, NULL},
    {"now_ns", (PyCFunction)vm_now_ns, METH_NOARGS, NULL},
    {"set_alarm", (PyCFunction)vm_set_alarm, METH_O, NULL},
    {"get_blob", (PyCFunction)vm_get_blob, METH_VARARGS, "get_blob(kind) -> bytes"},
    {"set_blob", (PyCFunction)vm_set_blob, METH_VARARGS, "set_blob(kind, data)"},
    {"stats", (PyCFunction)vm_stats, METH_NOARGS, NULL},
    {"last_finished", (PyCFunction)vm_last_finished, METH_NOARGS, NULL},
    {"set_trace", (PyCFunction)lv_vm_set_trace, METH_O, "Keep the last n of what each vCPU executes."},
    {"set_direct", (PyCFunction)lv_vm_set_direct, METH_VARARGS, "set_direct(fd, [(buffer, offset)], program, always)"},
    {"close", (PyCFunction)vm_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyObject *vm_get_closed(VmObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(!self->vm || self->stopping);
}

static PyGetSetDef vm_getset[] = {
    {"closed", (getter)vm_get_closed, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot vm_slots[] = {
    {Py_tp_new, vm_new},
    {Py_tp_dealloc, vm_dealloc},
    {Py_tp_finalize, vm_finalize},
    {Py_tp_traverse, vm_traverse},
    {Py_tp_methods, vm_methods},
    {Py_tp_getset, vm_getset},
    {0, NULL},
};

PyType_Spec lv_vm_spec = {
    .name = "cpu._core.Vm", .basicsize = sizeof(VmObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, .slots = vm_slots,
};
