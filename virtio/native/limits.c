/* virtio._ring.Limits. */
#include "limits.h"

#include <math.h>

enum { BUCKETS = 2 * LIMIT_KINDS };

static const double SECOND = 1e9, LONGEST = 3600e9;
/* Tokens by which rounding may miss: a wait that was computed is enough then. */
static const double SLACK = 1e-3;

static struct bucket *bucket_at(LimitsObject *self, unsigned index)
{
    return index < LIMIT_KINDS ? &self->ops[index] : &self->bytes[index - LIMIT_KINDS];
}

static void refill(LimitsObject *self, int64_t now)
{
    /* A machine that boots again has a clock that begins again. */
    double seconds = now > self->last ? (double)(now - self->last) / SECOND : 0;
    self->last = now;
    for (unsigned i = 0; seconds > 0 && i < BUCKETS; i++) {
        struct bucket *bucket = bucket_at(self, i);
        bucket->level = fmin(bucket->level + bucket->rate * seconds, bucket->burst);
    }
}

static double missing(const struct bucket *bucket, double cost)
{
    if (bucket->rate <= 0 || cost <= 0)
        return 0;
    double need = fmin(cost, bucket->burst) - bucket->level;
    return need > SLACK ? need / bucket->rate : 0;
}

int64_t limits_wait(LimitsObject *self, enum limit_kind kind, uint64_t bytes, int64_t now)
{
    refill(self, now);
    double seconds = fmax(missing(&self->ops[LIMIT_ALL], 1), missing(&self->bytes[LIMIT_ALL], (double)bytes));
    if (kind != LIMIT_ALL)
        seconds = fmax(seconds, fmax(missing(&self->ops[kind], 1), missing(&self->bytes[kind], (double)bytes)));
    return (int64_t)fmin(ceil(seconds * SECOND), LONGEST);
}

void limits_charge(LimitsObject *self, enum limit_kind kind, uint64_t bytes)
{
    enum limit_kind kinds[] = {LIMIT_ALL, kind};
    for (unsigned i = 0; i < (kind == LIMIT_ALL ? 1 : 2); i++) {
        self->ops[kinds[i]].level -= self->ops[kinds[i]].rate > 0 ? 1 : 0;
        self->bytes[kinds[i]].level -= self->bytes[kinds[i]].rate > 0 ? (double)bytes : 0;
    }
}

int limits_replace(LimitsObject **to, PyObject *given)
{
    if (given != Py_None && !PyObject_TypeCheck(given, &limits_type)) {
        PyErr_SetString(PyExc_TypeError, "Limits or None");
        return -1;
    }
    Py_XSETREF(*to, given == Py_None ? NULL : (LimitsObject *)Py_NewRef(given));
    return 0;
}

static PyObject *limits_set(LimitsObject *self, PyObject *args)
{
    unsigned index;
    double rate, burst;
    PyObject *level = Py_None;
    if (!PyArg_ParseTuple(args, "Idd|O", &index, &rate, &burst, &level))
        return NULL;
    double wanted = level == Py_None ? 0 : PyFloat_AsDouble(level);
    if (PyErr_Occurred())
        return NULL;
    if (index >= BUCKETS || !(rate >= 0) || !(burst >= 0) || !isfinite(rate) || !isfinite(burst) || !isfinite(wanted) ||
        (rate > 0 && burst < 1)) {
        PyErr_SetString(PyExc_ValueError, "set(0 to 5, rate >= 0, burst >= 1, level=None)");
        return NULL;
    }
    struct bucket *bucket = bucket_at(self, index);
    double before = bucket->rate > 0 ? bucket->level : burst;
    *bucket = (struct bucket){rate, rate > 0 ? burst : 0, rate > 0 ? fmin(level == Py_None ? before : wanted, burst) : 0};
    self->active = false;
    for (unsigned i = 0; i < BUCKETS; i++)
        self->active |= bucket_at(self, i)->rate > 0;
    Py_RETURN_NONE;
}

static PyObject *limits_get(LimitsObject *self, PyObject *argument)
{
    unsigned long index = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred())
        return NULL;
    if (index >= BUCKETS) {
        PyErr_SetString(PyExc_ValueError, "get(0 to 5)");
        return NULL;
    }
    struct bucket *bucket = bucket_at(self, (unsigned)index);
    return Py_BuildValue("(ddd)", bucket->rate, bucket->burst, bucket->level);
}

static bool cost(PyObject *args, int *kind, unsigned long long *bytes, long long *now)
{
    if (!PyArg_ParseTuple(args, "iKL", kind, bytes, now))
        return false;
    if (*kind < 0 || *kind >= LIMIT_KINDS)
        PyErr_SetString(PyExc_ValueError, "kind is 0 to 2");
    return *kind >= 0 && *kind < LIMIT_KINDS;
}

static PyObject *limits_py_wait(LimitsObject *self, PyObject *args)
{
    int kind;
    unsigned long long bytes;
    long long now;
    if (!cost(args, &kind, &bytes, &now))
        return NULL;
    return PyLong_FromLongLong(limits_wait(self, (enum limit_kind)kind, bytes, now));
}

static PyObject *limits_py_charge(LimitsObject *self, PyObject *args)
{
    int kind;
    unsigned long long bytes;
    long long now;
    if (!cost(args, &kind, &bytes, &now))
        return NULL;
    refill(self, now);
    limits_charge(self, (enum limit_kind)kind, bytes);
    Py_RETURN_NONE;
}

static PyObject *limits_active(LimitsObject *self, void *Py_UNUSED(unused))
{
    return PyBool_FromLong(self->active);
}

static PyMethodDef limits_methods[] = {
    {"set", (PyCFunction)limits_set, METH_VARARGS,
     "set(index, rate, burst, level=None): a bucket; rate 0 is no limit; without a level a new one is full."},
    {"get", (PyCFunction)limits_get, METH_O, "get(index) -> (rate, burst, level)"},
    {"wait", (PyCFunction)limits_py_wait, METH_VARARGS,
     "wait(kind, bytes, now) -> ns that one operation has to wait; 0: it may pass. kind: 0 all, 1 read, 2 write."},
    {"charge", (PyCFunction)limits_py_charge, METH_VARARGS, "charge(kind, bytes, now): it passes."},
    {0},
};

static PyGetSetDef limits_getset[] = {
    {"active", (getter)limits_active, NULL, "anything is limited", NULL},
    {0},
};

PyTypeObject limits_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.Limits",
    .tp_doc = "Limits(): token buckets by index: operations of all kinds, reads, writes (0 to 2), bytes likewise (3 to 5).",
    .tp_basicsize = sizeof(LimitsObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_methods = limits_methods,
    .tp_getset = limits_getset,
};
