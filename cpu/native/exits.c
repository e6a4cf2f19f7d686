/* Instances of the frozen dataclasses of cpu/exits.py, made by storing their slots: ten times quicker than calling the
 * class (tests.bench exits), and nothing but allocation can fail. */
#include "native/py.h"

#include <string.h>

enum { FIELDS_MAX = 4 };

struct exit_class {
    const char *name;
    const char *fields[FIELDS_MAX];
    PyTypeObject *type;
    Py_ssize_t offsets[FIELDS_MAX];
    PyObject *single; /* a class without fields has one instance */
};

static struct exit_class classes[LV_EXIT_KINDS] = {
    [LV_PORT_IN] = {.name = "PortIn", .fields = {"port", "size"}},
    [LV_PORT_OUT] = {.name = "PortOut", .fields = {"port", "size", "value"}},
    [LV_MMIO_READ] = {.name = "MmioRead", .fields = {"address", "size"}},
    [LV_MMIO_WRITE] = {.name = "MmioWrite", .fields = {"address", "size", "value"}},
    [LV_HALT] = {.name = "Halt"},
    [LV_SHUTDOWN] = {.name = "Shutdown"},
    [LV_SYSTEM_EVENT] = {.name = "SystemEvent", .fields = {"kind", "data"}},
    [LV_FAIL_ENTRY] = {.name = "FailEntry", .fields = {"reason", "cpu"}},
    [LV_INTERNAL_ERROR] = {.name = "InternalError", .fields = {"suberror", "rip", "instruction", "data"}},
    [LV_DEBUG] = {.name = "Debug", .fields = {"rip", "dr6", "exception", "address"}},
    [LV_INTERRUPTED] = {.name = "Interrupted"},
};
static struct exit_class posted_class = {.name = "Posted", .fields = {"tag", "size", "data"}};
static struct exit_class alarm_class = {.name = "AlarmDue"};
static struct exit_class resume_class = {.name = "Resume"};
static struct exit_class complete_read_class = {.name = "CompleteRead", .fields = {"value"}};

static int resolve(PyObject *module, struct exit_class *c)
{
    PyObject *type = PyObject_GetAttrString(module, c->name);
    if (!type)
        return -1;
    if (!PyType_Check(type)) {
        PyErr_Format(PyExc_TypeError, "cpu.exits.%s is not a class", c->name);
        return -1;
    }
    c->type = (PyTypeObject *)type; /* kept for the life of the process */
    for (int i = 0; i < FIELDS_MAX && c->fields[i]; i++) {
        PyObject *member = PyDict_GetItemString(c->type->tp_dict, c->fields[i]);
        if (!member || !Py_IS_TYPE(member, &PyMemberDescr_Type)) {
            PyErr_Format(PyExc_TypeError, "cpu.exits.%s.%s is not a slot", c->name, c->fields[i]);
            return -1;
        }
        c->offsets[i] = ((PyMemberDescrObject *)member)->d_member->offset;
    }
    if (!c->fields[0])
        c->single = PyObject_CallNoArgs(type);
    return c->fields[0] || c->single ? 0 : -1;
}

int lv_exits_init(void)
{
    PyObject *module = PyImport_ImportModule("cpu.exits");
    if (!module)
        return -1;
    int r = 0;
    for (int i = 0; i < LV_EXIT_KINDS && !r; i++)
        r = resolve(module, &classes[i]);
    if (r || resolve(module, &posted_class) || resolve(module, &alarm_class) || resolve(module, &resume_class) ||
        resolve(module, &complete_read_class))
        r = -1;
    Py_DECREF(module);
    return r;
}

/* A new instance; steals the values, of which any may be NULL after a failed allocation. */
static PyObject *make(struct exit_class *c, PyObject *const *values)
{
    PyObject *object = c->type->tp_alloc(c->type, 0);
    bool complete = object != NULL;
    for (int i = 0; i < FIELDS_MAX && c->fields[i]; i++) {
        if (!values[i])
            complete = false;
        if (object)
            *(PyObject **)((char *)object + c->offsets[i]) = values[i];
        else
            Py_XDECREF(values[i]);
    }
    if (!complete)
        Py_CLEAR(object);
    return object;
}

static PyObject *words(const uint64_t *data, uint32_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (uint32_t i = 0; tuple && i < count; i++) {
        PyObject *word = PyLong_FromUnsignedLongLong(data[i]);
        if (!word)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, word);
    }
    return tuple;
}

PyObject *lv_exit_object(const struct lv_exit *exit)
{
    PyObject *v[FIELDS_MAX] = {0};
    switch (exit->kind) {
    case LV_PORT_OUT:
    case LV_MMIO_WRITE:
        v[2] = PyLong_FromUnsignedLongLong(exit->value);
        /* fall through */
    case LV_PORT_IN:
    case LV_MMIO_READ:
        v[0] = PyLong_FromUnsignedLongLong(exit->address);
        v[1] = PyLong_FromUnsignedLong(exit->size);
        break;
    case LV_SYSTEM_EVENT:
        v[0] = PyLong_FromUnsignedLongLong(exit->code);
        v[1] = words(exit->data, exit->ndata);
        break;
    case LV_FAIL_ENTRY:
        v[0] = PyLong_FromUnsignedLongLong(exit->code);
        v[1] = PyLong_FromUnsignedLong(exit->extra);
        break;
    case LV_INTERNAL_ERROR:
        v[0] = PyLong_FromLongLong((long long)exit->code);
        v[1] = PyLong_FromUnsignedLongLong(exit->rip);
        v[2] = PyBytes_FromStringAndSize((const char *)exit->insn, exit->insn_size);
        v[3] = words(exit->data, exit->ndata);
        break;
    case LV_DEBUG:
        v[0] = PyLong_FromUnsignedLongLong(exit->rip);
        v[1] = PyLong_FromUnsignedLongLong(exit->code);
        v[2] = PyLong_FromUnsignedLong(exit->extra);
        v[3] = PyLong_FromUnsignedLongLong(exit->address);
        break;
    default:
        return Py_NewRef(classes[exit->kind].single);
    }
    return make(&classes[exit->kind], v);
}

PyObject *lv_posted_object(int32_t tag, uint32_t size, PyObject *data)
{
    PyObject *v[FIELDS_MAX] = {PyLong_FromLong(tag), PyLong_FromUnsignedLong(size), data};
    return make(&posted_class, v);
}

PyObject *lv_alarm_object(void)
{
    return Py_NewRef(alarm_class.single);
}

bool lv_entry_value(PyObject *entry, bool *is_read, uint64_t *value)
{
    *value = 0;
    *is_read = Py_IS_TYPE(entry, complete_read_class.type);
    if (Py_IS_TYPE(entry, resume_class.type))
        return true;
    if (!*is_read) {
        PyErr_Format(PyExc_TypeError, "resume() takes Resume or CompleteRead, not %.100s", Py_TYPE(entry)->tp_name);
        return false;
    }
    PyObject *number = *(PyObject **)((char *)entry + complete_read_class.offsets[0]);
    if (!number || !PyLong_Check(number)) {
        PyErr_SetString(PyExc_TypeError, "CompleteRead.value must be an integer");
        return false;
    }
    *value = PyLong_AsUnsignedLongLongMask(number);
    return !(*value == UINT64_MAX && PyErr_Occurred());
}
