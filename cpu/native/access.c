/* The table of addresses whose accesses the engine thread answers itself: posted writes, shadow reads, ioeventfds. */
#define _GNU_SOURCE
#include "native/loop_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

enum entry_kind { ENTRY_POSTED, ENTRY_SHADOW, ENTRY_IOEVENTFD };

struct lv_entry {
    struct lv_entry *next;
    uint64_t address;
    uint8_t space, size, kind;
    bool has_match;            /* ioeventfd */
    bool valid, has_after;     /* shadow */
    int32_t tag;               /* posted; shadow with has_after */
    int user_fd, fd;           /* ioeventfd: the caller's number, our duplicate */
    uint64_t match;            /* ioeventfd */
    uint64_t value, after;     /* shadow */
    struct lv_entry *next_put_off; /* ioeventfd: in the list of its engine */
    uint64_t put_off;              /* ioeventfd: so many writes the descriptor is not told of yet */
    struct lv_engine *put_off_by;  /* ioeventfd: that engine, while put_off is not 0 */
    struct lv_answerer *answerer;  /* ioeventfd: it is asked first; a reference; NULL: nobody is */
};

static uint32_t slot_of(uint8_t space, uint64_t address)
{
    uint64_t x = (address ^ ((uint64_t)space << 63)) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(x >> 56) % LV_TABLE_SIZE;
}

static uint64_t mask(uint32_t size)
{
    return size >= 8 ? UINT64_MAX : (1ull << (8 * size)) - 1;
}

static struct lv_entry **find(struct lv_vm *vm, enum entry_kind kind, uint8_t space, uint64_t address, uint32_t size)
{
    if (!vm->table)
        return NULL;
    for (struct lv_entry **link = &vm->table[slot_of(space, address)]; *link; link = &(*link)->next) {
        struct lv_entry *e = *link;
        if (e->address == address && e->space == space && e->kind == kind && e->size == size)
            return link;
    }
    return NULL;
}

static bool valid_size(uint32_t size)
{
    return size == 1 || size == 2 || size == 4 || size == 8;
}

/* Insert a copy of `entry` (its fd is owned from then on). */
static int insert(struct lv_vm *vm, const struct lv_entry *entry)
{
    if (!vm->table && !(vm->table = calloc(LV_TABLE_SIZE, sizeof *vm->table)))
        return -ENOMEM;
    if (vm->entry_count >= LV_TABLE_ENTRIES_MAX)
        return -ENOSPC;
    struct lv_entry *made = malloc(sizeof *made);
    if (!made)
        return -ENOMEM;
    *made = *entry;
    lv_lock(vm);
    struct lv_entry **head = &vm->table[slot_of(entry->space, entry->address)];
    made->next = *head;
    *head = made;
    vm->entry_count++;
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

/* Under the lock: what was put off is not told by its engine any more. */
static void forget_doorbell(struct lv_entry *e)
{
    if (!e->put_off)
        return;
    for (struct lv_entry **link = &e->put_off_by->put_off; *link; link = &(*link)->next_put_off)
        if (*link == e) {
            *link = e->next_put_off;
            break;
        }
    e->put_off = 0;
}

static void unlink_entry(struct lv_vm *vm, struct lv_entry **link)
{
    struct lv_entry *gone = *link;
    lv_lock(vm);
    *link = gone->next;
    vm->entry_count--;
    forget_doorbell(gone);
    pthread_mutex_unlock(&vm->lock);
    if (gone->kind == ENTRY_IOEVENTFD)
        close(gone->fd);
    if (gone->answerer)
        gone->answerer->release(gone->answerer);
    free(gone);
}

static int add(struct lv_vm *vm, enum entry_kind kind, uint8_t space, uint64_t address, uint8_t size, int32_t tag)
{
    if (!valid_size(size))
        return -EINVAL;
    if (find(vm, kind, space, address, size))
        return -EEXIST;
    struct lv_entry entry = {.kind = (uint8_t)kind, .space = space, .address = address, .size = size, .tag = tag};
    return insert(vm, &entry);
}

static int removed(struct lv_vm *vm, enum entry_kind kind, uint8_t space, uint64_t address, uint8_t size)
{
    struct lv_entry **link = find(vm, kind, space, address, size);
    if (!link)
        return -ENOENT;
    unlink_entry(vm, link);
    return 0;
}

int lv_add_posted(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size, int32_t tag)
{
    return add(vm, ENTRY_POSTED, space, address, size, tag);
}

int lv_remove_posted(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size)
{
    return removed(vm, ENTRY_POSTED, space, address, size);
}

int lv_add_shadow(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size, int32_t tag)
{
    return add(vm, ENTRY_SHADOW, space, address, size, tag);
}

int lv_remove_shadow(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size)
{
    return removed(vm, ENTRY_SHADOW, space, address, size);
}

int lv_shadow_set(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size, uint64_t value, bool has_after, uint64_t after)
{
    struct lv_entry **link = find(vm, ENTRY_SHADOW, space, address, size);
    if (!link)
        return -ENOENT;
    lv_lock(vm);
    (*link)->value = value & mask(size);
    (*link)->after = after & mask(size);
    (*link)->has_after = has_after;
    (*link)->valid = true;
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

int lv_shadow_invalidate(struct lv_vm *vm, uint8_t space, uint64_t address, uint8_t size)
{
    struct lv_entry **link = find(vm, ENTRY_SHADOW, space, address, size);
    if (!link)
        return -ENOENT;
    lv_lock(vm);
    (*link)->valid = false;
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

int lv_ioeventfd(struct lv_vm *vm, int fd, uint8_t space, uint64_t address, uint32_t size, bool has_match,
                 uint64_t match, struct lv_answerer *answerer, bool adding)
{
    if (size && !valid_size(size))
        return -EINVAL;
    if (!size && has_match)
        return -EINVAL; /* KVM API 4.59: a match of any length has no datamatch */
    if (vm->ops->ioeventfd)
        return vm->ops->ioeventfd(vm, fd, space, address, size, has_match, match, adding);
    struct lv_entry **link = vm->table ? &vm->table[slot_of(space, address)] : NULL;
    for (; link && *link; link = &(*link)->next) {
        struct lv_entry *e = *link;
        if (e->kind == ENTRY_IOEVENTFD && e->address == address && e->space == space && e->size == size &&
            e->has_match == has_match && (!has_match || e->match == (match & mask(size))) &&
            (adding || e->user_fd == fd)) {
            if (adding)
                return -EEXIST;
            unlink_entry(vm, link);
            return 0;
        }
    }
    if (!adding)
        return -ENOENT;
    struct lv_entry entry = {.kind = ENTRY_IOEVENTFD, .space = space, .address = address, .size = (uint8_t)size,
                             .has_match = has_match, .match = match & mask(size), .user_fd = fd, .answerer = answerer};
    entry.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (entry.fd < 0)
        return -errno;
    int error = insert(vm, &entry);
    if (error)
        close(entry.fd);
    else if (answerer)
        answerer->retain(answerer);
    return error;
}

void lv_table_free(struct lv_vm *vm)
{
    for (uint32_t i = 0; vm->table && i < LV_TABLE_SIZE; i++)
        while (vm->table[i])
            unlink_entry(vm, &vm->table[i]);
    free(vm->table);
    vm->table = NULL;
}

/* ---- [engine] ---- */

/* Telling a descriptor wakes the loop's thread. Where no processor is free for it, it takes the vCPU's: two switches of
 * threads, and then an interrupt, for each request of a driver that was about to make more. So an engine looks how
 * long telling takes. While that is long, doorbells are put off to the end of the vCPU's turn (at most
 * some 100 us), or until it halts or exits: what the driver has made available by then is served in one go, by the vCPU's
 * own thread if there is an answerer that can. Now and then one is told at once, to see whether that is still so.
 * Benchmark: tests/bench/bench_guest_io.py.
 */
enum {
    DOORBELL_SLOW_NS = 10000, /* a thread that wakes on another processor takes 2 to 6 us of the one that wakes it */
    DOORBELL_MOST_NS = 30000, /* what a slow one counts for: one alone puts nothing off */
    DOORBELL_PROBE = 64,      /* the first after so many that were put off is told at once */
};

/* Under the lock, so that the descriptor cannot be removed and its number reused meanwhile. */
static void tell(struct lv_entry *e, uint64_t writes)
{
    (void)!write(e->fd, &writes, sizeof writes);
}

/* For the loop, as far as that is known: this process may have one only. */
static bool no_processor_free(struct lv_engine *engine)
{
    return atomic_load_explicit(&lv_spinners_max, memory_order_relaxed) < 1 ||
           (engine->doorbell_ns >= DOORBELL_SLOW_NS && ++engine->doorbells % DOORBELL_PROBE);
}

/* enum lv_asked; -1: there is nobody to ask. */
static int when_asked(const struct lv_vm *vm, const struct lv_entry *e)
{
    bool asks = e->answerer && !vm->config.virtual_clock && vm->written;
    return asks ? (int)__atomic_load_n(&e->answerer->asked, __ATOMIC_RELAXED) : -1;
}

static void doorbell(struct lv_engine *engine, struct lv_entry *e)
{
    if (e->put_off && e->put_off_by != engine) {
        /* Another vCPU rang it, and may not have a processor now: this one does not wait for that turn's end. */
        uint64_t writes = e->put_off + 1;
        forget_doorbell(e);
        tell(e, writes);
        return;
    }
    if (engine->puts_off && (when_asked(engine->vm, e) == LV_ASKED_LATER || no_processor_free(engine))) {
        if (!e->put_off++) {
            e->next_put_off = engine->put_off;
            e->put_off_by = engine;
            __atomic_store_n(&engine->put_off, e, __ATOMIC_RELAXED);
        }
        lv_count(engine->vm, LV_STAT_PUT_OFF);
        return;
    }
    uint64_t begin = engine->puts_off ? lv_clock() : 0;
    tell(e, 1);
    if (engine->puts_off) {
        uint64_t took = lv_clock() - begin;
        engine->doorbell_ns = (3 * engine->doorbell_ns + (took < DOORBELL_MOST_NS ? took : DOORBELL_MOST_NS)) / 4;
    }
}

static void signal_message(void *machine, uint64_t address, uint32_t data)
{
    struct lv_vm *vm = machine;
    vm->ops->signal_msi(vm, address, data);
}

void lv_memory_written(struct lv_vm *vm, uint64_t gpa, uint64_t size)
{
    vm->written(vm->owner, gpa, size);
    if (vm->ops->memory_written)
        vm->ops->memory_written(vm, gpa, size);
}

static void note_written(void *machine, uint64_t gpa, uint64_t size) { lv_memory_written(machine, gpa, size); }

/* Whether the answerer did what the doorbell asks for. The lock is held on entry and on return, but not meanwhile. */
static bool answered(struct lv_vm *vm, struct lv_answerer *answerer)
{
    const struct lv_answerer_host host = {.machine = vm, .written = note_written, .message = signal_message};
    answerer->retain(answerer); /* the entry may be removed meanwhile */
    pthread_mutex_unlock(&vm->lock);
    bool done = answerer->ring(answerer, &host);
    answerer->release(answerer);
    lv_lock(vm);
    if (done)
        lv_count(vm, LV_STAT_ANSWERED);
    return done;
}

bool lv_has_put_off(const struct lv_engine *engine)
{
    return __atomic_load_n(&engine->put_off, __ATOMIC_RELAXED); /* only this thread adds to it */
}

/* Under the lock: whether the entry was not removed. */
static bool is_there(const struct lv_vm *vm, uint32_t slot, const struct lv_entry *entry)
{
    for (const struct lv_entry *e = vm->table[slot]; e; e = e->next)
        if (e == entry)
            return true;
    return false;
}

void lv_tell_put_off(struct lv_engine *engine)
{
    struct lv_vm *vm = engine->vm;
    if (!lv_has_put_off(engine))
        return;
    lv_lock(vm);
    while (engine->put_off) {
        struct lv_entry *e = engine->put_off;
        uint32_t slot = slot_of(e->space, e->address);
        uint64_t writes = e->put_off;
        engine->put_off = e->next_put_off;
        e->put_off = 0;
        /* If the entry was freed meanwhile and a new one stands at the same place in memory, the new one's descriptor is told:
         * a spurious notification, which is allowed. */
        if (when_asked(vm, e) < LV_ASKED_IF_CROWDED || (!answered(vm, e->answerer) && is_there(vm, slot, e)))
            tell(e, writes);
    }
    pthread_mutex_unlock(&vm->lock);
}

/* True: the write is done. The lock is held on entry and, when false, on return. `ask`: an answerer, if there is one. */
static bool write_on_the_spot(struct lv_vcpu *vcpu, const struct lv_access *a, bool ask)
{
    struct lv_vm *vm = vcpu->vm;
    struct lv_entry *posted = NULL;
    for (struct lv_entry *e = vm->table[slot_of(a->space, a->address)]; e; e = e->next) {
        if (e->address != a->address || e->space != a->space)
            continue;
        if (e->kind == ENTRY_POSTED && e->size == a->size)
            posted = e;
        if (e->kind == ENTRY_IOEVENTFD && (!e->size || e->size == a->size) &&
            (!e->has_match || e->match == (a->value & mask(a->size)))) {
            if (ask && when_asked(vm, e) == LV_ASKED_AT_ONCE) {
                if (!answered(vm, e->answerer))
                    return write_on_the_spot(vcpu, a, false);
                lv_count(vm, LV_STAT_IOEVENTFD);
                pthread_mutex_unlock(&vm->lock);
                return true;
            }
            doorbell(vcpu->engine, e);
            lv_count(vm, LV_STAT_IOEVENTFD);
            if (vm->config.virtual_clock)
                lv_push_locked(vcpu->engine, &(struct lv_event){.kind = LV_EVENT_BARRIER});
            else
                pthread_mutex_unlock(&vm->lock);
            return true;
        }
    }
    if (!posted)
        return false;
    lv_count(vm, LV_STAT_POSTED);
    lv_push_locked(vcpu->engine, &(struct lv_event){.kind = LV_EVENT_POSTED, .size = a->size, .tag = posted->tag,
                                                    .value = a->value & mask(a->size)});
    return true;
}

static bool read_on_the_spot(struct lv_vcpu *vcpu, const struct lv_access *a, uint64_t *value)
{
    struct lv_vm *vm = vcpu->vm;
    struct lv_entry **link = find(vm, ENTRY_SHADOW, a->space, a->address, a->size);
    struct lv_entry *e = link ? *link : NULL;
    if (!e || !e->valid)
        return false;
    lv_count(vm, LV_STAT_SHADOW);
    *value = e->value;
    if (e->has_after) {
        e->has_after = false;
        e->value = e->after;
        lv_push_locked(vcpu->engine, &(struct lv_event){.kind = LV_EVENT_POSTED, .notice = 1, .size = a->size,
                                                        .tag = e->tag});
    } else {
        pthread_mutex_unlock(&vm->lock);
    }
    return true;
}

static uint8_t kind_of(const struct lv_access *a)
{
    static const uint8_t kinds[2][2] = {{LV_PORT_IN, LV_PORT_OUT}, {LV_MMIO_READ, LV_MMIO_WRITE}};
    return kinds[a->space != 0][a->write];
}

bool lv_try_access(struct lv_vcpu *vcpu, const struct lv_access *a, uint64_t *value)
{
    struct lv_vm *vm = vcpu->vm;
    struct lv_vcpu *outer = vcpu->engine->waiting;
    bool done = false;
    *value = 0;
    if (vm->entry_count) {
        /* While this waits (virtual clock, full queue) the vCPU is inside an instruction: a kick must not park it here. */
        vcpu->engine->waiting = vcpu;
        lv_lock(vm);
        done = a->write ? write_on_the_spot(vcpu, a, true) : read_on_the_spot(vcpu, a, value);
        if (!done)
            pthread_mutex_unlock(&vm->lock);
        vcpu->engine->waiting = outer;
    }
    if (done)
        lv_remember(vcpu, kind_of(a), a->size, a->address, a->write ? a->value & mask(a->size) : *value, LV_PAST_ON_THE_SPOT);
    return done;
}

struct lv_exit lv_access_exit(const struct lv_access *a)
{
    return (struct lv_exit){.kind = kind_of(a), .size = a->size, .address = a->address,
                            .value = a->write ? a->value & mask(a->size) : 0};
}

uint64_t lv_access(struct lv_vcpu *vcpu, const struct lv_access *a)
{
    uint64_t value;
    if (lv_try_access(vcpu, a, &value))
        return value;
    struct lv_exit exit = lv_access_exit(a);
    value = lv_ask(vcpu, &exit, true);
    return a->write ? 0 : value & mask(a->size);
}
