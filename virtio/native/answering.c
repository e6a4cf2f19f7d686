/* What the engines share of answering on vCPUs' threads: answering.h. */
#define _GNU_SOURCE
#include "answering.h"
#include "clock.h"

#include <stdlib.h>

enum { SHY_MOST = 8192 /* doorbells */ };

void answering_open(struct answering *answering)
{
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&answering->lock, &recursive);
    pthread_mutexattr_destroy(&recursive);
    pthread_cond_init(&answering->ended, NULL);
    answering->count = 1;
}

void answering_put(struct answering *answering)
{
    if (__atomic_sub_fetch(&answering->count, 1, __ATOMIC_ACQ_REL))
        return;
    pthread_mutex_destroy(&answering->lock);
    pthread_cond_destroy(&answering->ended);
    free(answering);
}

bool answering_is_idle(struct answering *answering)
{
    pthread_mutex_lock(&answering->lock);
    bool idle = !answering->busy;
    pthread_mutex_unlock(&answering->lock);
    return idle;
}

void answering_wait(struct answering *answering)
{
    pthread_mutex_lock(&answering->lock);
    while (answering->busy)
        pthread_cond_wait(&answering->ended, &answering->lock);
    pthread_mutex_unlock(&answering->lock);
}

static void retain(struct lv_answerer *answerer)
{
    __atomic_fetch_add(&((struct answering_lane *)answerer)->answering->count, 1, __ATOMIC_RELAXED);
}

static void release(struct lv_answerer *answerer)
{
    answering_put(((struct answering_lane *)answerer)->answering);
}

void lane_open(struct answering_lane *lane, struct answering *answering,
               bool (*ring)(struct lv_answerer *, const struct lv_answerer_host *), enum lv_asked asked)
{
    *lane = (struct answering_lane){.answerer = {ring, retain, release, asked}, .answering = answering};
}

bool lane_tell(const struct answering_lane *lane, struct ring *ring, const struct lv_answerer_host *host)
{
    if (ring->used_dirty) {
        ring->used_dirty = false;
        if (ring->packed)
            host->written(host->machine, ring->desc_gpa, ring->desc_size);
        host->written(host->machine, ring->device_gpa, ring->device_size);
    }
    if (!lane->has_message)
        return false;
    if (ring_needs_notification(ring))
        host->message(host->machine, lane->address, lane->data);
    return true;
}

void attempt_begin(struct attempt *attempt)
{
    getrusage(RUSAGE_THREAD, &attempt->before);
    attempt->begin = clock_now();
}

void attempt_end(const struct attempt *attempt, struct answering *answering, int64_t slow_ns, uint32_t least)
{
    struct rusage after;
    if (clock_now() - attempt->begin >= slow_ns && !getrusage(RUSAGE_THREAD, &after) &&
        after.ru_nvcsw != attempt->before.ru_nvcsw) {
        uint32_t before = answering->shyness;
        answering->shyness = !before ? least : before < SHY_MOST ? 2 * before : SHY_MOST;
        answering->shy = answering->shyness;
    } else if (answering->shyness > 1) {
        answering->shyness--;
    }
}

bool lane_number(unsigned number, unsigned lanes)
{
    if (number < lanes)
        return true;
    PyErr_Format(PyExc_ValueError, "queues are 0 to %u", lanes - 1);
    return false;
}

int lane_ring(PyObject *object, void *ring)
{
    if (object != Py_None && !PyObject_TypeCheck(object, &ring_type)) {
        PyErr_SetString(PyExc_TypeError, "lend(queue, ring or None)");
        return 0;
    }
    *(RingObject **)ring = object == Py_None ? NULL : (RingObject *)object;
    return 1;
}

static void release_capsule(PyObject *capsule)
{
    release(PyCapsule_GetPointer(capsule, LV_ANSWERER_CAPSULE));
}

PyObject *lane_capsule(struct answering_lane *lane)
{
    PyObject *capsule = PyCapsule_New(&lane->answerer, LV_ANSWERER_CAPSULE, release_capsule);
    if (capsule)
        retain(&lane->answerer);
    return capsule;
}

PyObject *lane_set_message(struct answering_lane *lane, PyObject *message)
{
    unsigned long long address = 0;
    unsigned data = 0;
    if (message != Py_None && !PyArg_ParseTuple(message, "KI", &address, &data))
        return NULL;
    pthread_mutex_lock(&lane->answering->lock);
    lane->has_message = message != Py_None;
    lane->address = address;
    lane->data = data;
    pthread_mutex_unlock(&lane->answering->lock);
    Py_RETURN_NONE;
}
