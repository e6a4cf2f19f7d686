/* Interrupts of cores that have no irqfds of their own: the loop serves them from take(). */
#define _GNU_SOURCE
#include "native/loop_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { POLL_BATCH = 16, LINES = 24 };

struct lv_irqfd {
    struct lv_irqfd *next;
    int user_fd, fd, resample_fd; /* fd and resample_fd are our duplicates; resample_fd -1: edge */
    uint32_t gsi;
    bool asserted;
};

static void serve(struct lv_vm *vm, struct lv_irqfd *irqfd)
{
    uint64_t count;
    if (read(irqfd->fd, &count, sizeof count) != sizeof count)
        return;
    for (uint32_t i = 0; i < vm->route_count; i++) {
        if (vm->routes[i].gsi == irqfd->gsi) {
            vm->ops->signal_msi(vm, vm->routes[i].address, vm->routes[i].data);
            return;
        }
    }
    if (irqfd->gsi >= LINES)
        return; /* an MSI GSI without a route: the message has nowhere to go */
    if (irqfd->resample_fd >= 0) {
        /* In this order: an acknowledgement of an earlier interrupt that comes between must leave a line that the next
         * one lowers. The other way round it would lower nothing and the line would stay up for ever. */
        vm->ops->set_irq(vm, irqfd->gsi, true);
        lv_lock(vm);
        irqfd->asserted = true;
        pthread_mutex_unlock(&vm->lock);
    } else {
        vm->ops->set_irq(vm, irqfd->gsi, true);
        vm->ops->set_irq(vm, irqfd->gsi, false);
    }
}

void lv_irqfds_serve(struct lv_vm *vm)
{
    struct epoll_event ready[POLL_BATCH];
    int n = epoll_wait(vm->poll_fd, ready, POLL_BATCH, 0);
    for (int i = 0; i < n; i++)
        if (ready[i].data.ptr)
            serve(vm, ready[i].data.ptr);
}

void lv_eoi(struct lv_vm *vm, uint32_t gsi)
{
    bool lower = false;
    lv_lock(vm);
    for (struct lv_irqfd *i = vm->irqfds; i; i = i->next)
        if (i->gsi == gsi && i->asserted) {
            i->asserted = false;
            lower = true;
        }
    pthread_mutex_unlock(&vm->lock);
    if (!lower)
        return;
    /* Lower first: the owner may raise it again as soon as it hears of the acknowledgement. */
    vm->ops->set_irq(vm, gsi, false);
    lv_lock(vm);
    for (struct lv_irqfd *i = vm->irqfds; i; i = i->next)
        if (i->gsi == gsi && i->resample_fd >= 0) {
            uint64_t one = 1;
            (void)!write(i->resample_fd, &one, sizeof one);
        }
    pthread_mutex_unlock(&vm->lock);
}

static void discard(struct lv_irqfd *irqfd)
{
    if (irqfd->fd >= 0)
        close(irqfd->fd);
    if (irqfd->resample_fd >= 0)
        close(irqfd->resample_fd);
    free(irqfd);
}

int lv_irqfd(struct lv_vm *vm, int fd, uint32_t gsi, int resample_fd, bool add)
{
    if (vm->ops->irqfd)
        return vm->ops->irqfd(vm, fd, gsi, resample_fd, add);
    struct lv_irqfd **link = &vm->irqfds;
    while (*link && !((*link)->user_fd == fd && (*link)->gsi == gsi))
        link = &(*link)->next;
    if (!add) {
        struct lv_irqfd *gone = *link;
        if (!gone)
            return -ENOENT;
        epoll_ctl(vm->poll_fd, EPOLL_CTL_DEL, gone->fd, NULL);
        lv_lock(vm);
        *link = gone->next;
        bool lower = gone->asserted;
        for (struct lv_irqfd *i = vm->irqfds; i; i = i->next)
            lower &= !(i->gsi == gsi && i->asserted);
        pthread_mutex_unlock(&vm->lock);
        if (lower)
            vm->ops->set_irq(vm, gsi, false);
        discard(gone);
        return 0;
    }
    if (*link)
        return -EEXIST;
    struct lv_irqfd *made = calloc(1, sizeof *made);
    if (!made)
        return -ENOMEM;
    made->user_fd = fd;
    made->gsi = gsi;
    made->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    made->resample_fd = resample_fd < 0 ? -1 : fcntl(resample_fd, F_DUPFD_CLOEXEC, 3);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = made};
    if (made->fd < 0 || (resample_fd >= 0 && made->resample_fd < 0) ||
        epoll_ctl(vm->poll_fd, EPOLL_CTL_ADD, made->fd, &event) < 0) {
        int error = -errno;
        discard(made);
        return error;
    }
    lv_lock(vm);
    made->next = vm->irqfds;
    vm->irqfds = made;
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

int lv_set_routes(struct lv_vm *vm, const struct lv_route *routes, uint32_t count)
{
    if (vm->ops->set_routes)
        return vm->ops->set_routes(vm, routes, count);
    struct lv_route *copy = malloc(count ? count * sizeof *copy : 1);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, routes, count * sizeof *copy);
    free(vm->routes);
    vm->routes = copy;
    vm->route_count = count;
    return 0;
}

void lv_irqfds_free(struct lv_vm *vm)
{
    while (vm->irqfds) {
        struct lv_irqfd *next = vm->irqfds->next;
        discard(vm->irqfds);
        vm->irqfds = next;
    }
    free(vm->routes);
}
