/* Memory that comes after its machine: see pager.h. */
#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "frame.h"

enum { ROOM = 2 * (FRAME_HEAD + FRAME_MOST), EVENTS = 32, WANT_BYTES = FRAME_HEAD + 12 * FRAME_WANTS };

struct area {
    struct pager_region at;
    uint64_t *asked;   /* pages that were asked for */
    uint64_t *watched; /* pages whose arrival is told */
};

struct pager {
    struct area *areas;
    uint32_t count;
    int uffd, wake, told, link;
    pthread_t thread;
    pthread_mutex_t lock; /* of everything below */
    struct wanted_run *queue; /* of pager_want() */
    size_t queued, room;
    int next_link; /* of pager_attach(), or -1 */
    bool has_next, detach, stop, committed;
    enum pager_state state;
    const char *error;
    struct pager_counts counts;
    /* The thread's own. */
    uint8_t *in;
    size_t have;
    uint8_t *out; /* frames that are not sent yet */
    size_t out_have, out_room;
    int64_t heard_ns;
    /* The faults that wait: a few are timed. */
    struct timed {
        uint32_t region;
        uint64_t page;
        int64_t since_ns;
    } timed[16];
};

static void signal_fd(int fd)
{
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

int pager_open(bool kernel)
{
    int fd = -1;
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && !kernel)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        return -errno;
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(fd, UFFDIO_API, &api) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

/* ---- the memory; the thread's ---- */

static void arrived(struct pager *p, uint32_t region, uint64_t first, uint64_t count)
{
    struct area *area = &p->areas[region];
    bool tell = false;
    for (uint64_t n = first; n < first + count; n++) {
        clear_bit(area->at.missing, n);
        tell = tell || bit_of(area->watched, n);
    }
    pthread_mutex_lock(&p->lock);
    p->counts.left -= count;
    for (size_t i = 0; i < sizeof p->timed / sizeof *p->timed; i++) {
        struct timed *t = &p->timed[i];
        if (!t->since_ns || t->region != region || t->page < first || t->page >= first + count)
            continue;
        uint64_t took = (uint64_t)(now_ns() - t->since_ns);
        t->since_ns = 0;
        p->counts.waited_ns += took;
        if (took > p->counts.slowest_ns)
            p->counts.slowest_ns = took;
    }
    pthread_mutex_unlock(&p->lock);
    if (tell)
        signal_fd(p->told);
}

/* Put pages at their place, of `from` or zeroes, and wake whoever waits for them. false: the kernel refuses. */
static bool place(struct pager *p, uint32_t region, uint64_t first, uint64_t count, const uint8_t *from)
{
    uint8_t *to = p->areas[region].at.host + first * PAGE;
    uint64_t left = count * PAGE;
    while (left) {
        int64_t done;
        int result;
        if (from) {
            struct uffdio_copy copy = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = left};
            result = ioctl(p->uffd, UFFDIO_COPY, &copy);
            done = copy.copy;
        } else {
            struct uffdio_zeropage zero = {.range = {.start = (uintptr_t)to, .len = left}};
            result = ioctl(p->uffd, UFFDIO_ZEROPAGE, &zero);
            done = zero.zeropage;
        }
        if (result < 0 && done <= 0) {
            if (errno == EAGAIN)
                continue;
            if (errno != EEXIST)
                return false;
            /* Somebody's page stands there already; whoever waits for it is to look again. */
            struct uffdio_range range = {.start = (uintptr_t)to, .len = PAGE};
            ioctl(p->uffd, UFFDIO_WAKE, &range);
            done = PAGE;
        }
        to += done;
        if (from)
            from += done;
        left -= (uint64_t)done;
    }
    return true;
}

static enum pager_state current(struct pager *p)
{
    pthread_mutex_lock(&p->lock);
    enum pager_state state = p->state;
    pthread_mutex_unlock(&p->lock);
    return state;
}

static void broke(struct pager *p, const char *why)
{
    if (p->link >= 0)
        close(p->link);
    p->link = -1;
    p->have = p->out_have = 0;
    pthread_mutex_lock(&p->lock);
    if (p->state == PAGER_LIVE) {
        p->state = p->committed ? PAGER_BROKEN : PAGER_GIVEN_UP;
        p->error = why;
    }
    pthread_mutex_unlock(&p->lock);
    signal_fd(p->told);
}

/* Everything that is missing is zeroes from now on. */
static void fill(struct pager *p)
{
    for (uint32_t r = 0; r < p->count; r++) {
        struct area *area = &p->areas[r];
        uint64_t end = area->at.pages;
        for (uint64_t n = next_bit(area->at.missing, 0, end); n < end; n = next_bit(area->at.missing, n + 1, end)) {
            if (bit_of(area->asked, n))
                place(p, r, n, 1, NULL);
            clear_bit(area->at.missing, n);
        }
    }
    signal_fd(p->told);
}

/* ---- what is asked for ---- */

static void flush(struct pager *p)
{
    while (p->link >= 0 && p->out_have) {
        ssize_t sent = send(p->link, p->out, p->out_have, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0) {
            if (errno != EAGAIN)
                broke(p, "the connection ended");
            return;
        }
        memmove(p->out, p->out + sent, p->out_have - (size_t)sent);
        p->out_have -= (size_t)sent;
    }
}

static void add_out(struct pager *p, const uint8_t *frame, size_t length)
{
    if (p->out_have + length > p->out_room) {
        size_t room = 2 * p->out_room + length;
        uint8_t *larger = realloc(p->out, room);
        if (!larger) {
            broke(p, "no memory");
            return;
        }
        p->out = larger;
        p->out_room = room;
    }
    memcpy(p->out + p->out_have, frame, length);
    p->out_have += length;
}

static void send_wants(struct pager *p, const struct wanted_run *runs, uint32_t count)
{
    uint8_t frame[WANT_BYTES];
    memcpy(frame + FRAME_HEAD, runs, 12 * count);
    frame_seal(frame, FRAME_WANT, 12 * count);
    add_out(p, frame, FRAME_HEAD + 12 * count);
}

/* Ask for the missing pages of a range, but not for those that were asked for; `again` asks for those. */
static void ask(struct pager *p, uint32_t region, uint64_t first, uint64_t count, bool again)
{
    struct area *area = &p->areas[region];
    struct wanted_run runs[FRAME_WANTS];
    uint32_t used = 0;
    uint64_t end = first + count;
    for (uint64_t n = next_bit(area->at.missing, first, end); n < end; n = next_bit(area->at.missing, n + 1, end)) {
        if (bit_of(area->asked, n) != again)
            continue;
        set_bit(area->asked, n);
        if (used && runs[used - 1].first + runs[used - 1].count == n) {
            runs[used - 1].count++;
            continue;
        }
        if (used == FRAME_WANTS) {
            send_wants(p, runs, used);
            used = 0;
        }
        runs[used++] = (struct wanted_run){region, (uint32_t)n, 1};
    }
    if (used)
        send_wants(p, runs, used);
}

static void fault(struct pager *p, uint64_t address)
{
    for (uint32_t r = 0; r < p->count; r++) {
        struct area *area = &p->areas[r];
        uint64_t host = (uintptr_t)area->at.host;
        if (address < host || address - host >= area->at.pages * PAGE)
            continue;
        uint64_t page = (address - host) / PAGE;
        if (!bit_of(area->at.missing, page)) {
            place(p, r, page, 1, NULL);
            return;
        }
        pthread_mutex_lock(&p->lock);
        p->counts.faults++;
        for (size_t i = 0; i < sizeof p->timed / sizeof *p->timed; i++) {
            if (p->timed[i].since_ns)
                continue;
            p->timed[i] = (struct timed){r, page, now_ns()};
            break;
        }
        pthread_mutex_unlock(&p->lock);
        if (p->link >= 0)
            ask(p, r, page, 1, false);
        else
            set_bit(area->asked, page); /* for the next connection */
        return;
    }
}

static void take_faults(struct pager *p)
{
    struct uffd_msg events[EVENTS];
    for (;;) {
        ssize_t got = read(p->uffd, events, sizeof events);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < (ssize_t)sizeof *events)
            return;
        for (size_t i = 0; i < (size_t)got / sizeof *events; i++)
            if (events[i].event == UFFD_EVENT_PAGEFAULT)
                fault(p, events[i].arg.pagefault.address);
    }
}

/* ---- what comes ---- */

/* The missing ones of pages that came. */
static bool take_run(struct pager *p, uint32_t region, uint64_t first, uint64_t count, const uint8_t *from)
{
    const uint64_t *missing = p->areas[region].at.missing;
    uint64_t end = first + count;
    for (uint64_t n = next_bit(missing, first, end); n < end; n = next_bit(missing, n, end)) {
        uint64_t last = n + 1;
        while (last < end && bit_of(missing, last))
            last++;
        if (!place(p, region, n, last - n, from ? from + (n - first) * PAGE : NULL))
            return false;
        pthread_mutex_lock(&p->lock);
        *(from ? &p->counts.pages : &p->counts.zero) += last - n;
        pthread_mutex_unlock(&p->lock);
        arrived(p, region, n, last - n);
        n = last;
    }
    return true;
}

/* NULL, or what is wrong with a PAGES frame. */
static const char *take_pages(struct pager *p, const uint8_t *payload, uint32_t length)
{
    uint32_t head[3]; /* region, base, runs */
    if (length < PAGES_HEAD)
        return "a PAGES frame without its head";
    memcpy(head, payload, sizeof head);
    uint32_t region = head[0], base = head[1], runs = head[2];
    if (region >= p->count || runs > FRAME_RUNS || length < PAGES_HEAD + 8 * runs)
        return "a PAGES frame that is malformed";
    struct page_run table[FRAME_RUNS];
    memcpy(table, payload + PAGES_HEAD, 8 * runs);
    uint64_t pages = p->areas[region].at.pages, bytes = 0;
    for (uint32_t i = 0; i < runs; i++) {
        uint64_t count = table[i].count & ~RUN_OF_ZEROES, first = (uint64_t)base + table[i].first;
        if (!count || first >= pages || count > pages - first)
            return "pages out of bounds";
        bytes += table[i].count & RUN_OF_ZEROES ? 0 : count * PAGE;
    }
    if (length != PAGES_HEAD + 8 * runs + bytes)
        return "a PAGES frame whose table does not fit its data";
    const uint8_t *data = payload + PAGES_HEAD + 8 * runs;
    for (uint32_t i = 0; i < runs; i++) {
        bool zero = table[i].count & RUN_OF_ZEROES;
        uint64_t count = table[i].count & ~RUN_OF_ZEROES;
        if (!take_run(p, region, (uint64_t)base + table[i].first, count, zero ? NULL : data))
            return "the host has no memory for a page";
        data += zero ? 0 : count * PAGE;
    }
    return NULL;
}

static void receive(struct pager *p)
{
    ssize_t got = recv(p->link, p->in + p->have, ROOM - p->have, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        broke(p, "the connection ended");
        return;
    }
    p->heard_ns = now_ns();
    p->have += (size_t)got;
    size_t at = 0;
    while (p->link >= 0 && p->have - at >= FRAME_HEAD) {
        struct frame_head head;
        if (!frame_parse(p->in + at, FRAME_MOST, &head)) {
            broke(p, "the stream is damaged: a frame's header is none");
            return;
        }
        if (p->have - at - FRAME_HEAD < head.length)
            break;
        const uint8_t *payload = p->in + at + FRAME_HEAD;
        const char *wrong = NULL;
        if (crc32c(0, payload, head.length) != head.crc)
            wrong = "the stream is damaged: a payload does not fit its checksum";
        else if (head.kind == FRAME_PAGES)
            wrong = take_pages(p, payload, head.length);
        else if (head.kind != FRAME_PING)
            wrong = "a frame out of turn";
        if (wrong) {
            broke(p, wrong);
            return;
        }
        at += FRAME_HEAD + head.length;
    }
    if (p->link >= 0) {
        memmove(p->in, p->in + at, p->have - at);
        p->have -= at;
    }
}

/* ---- the thread ---- */

/* What others want; false: it ends. */
static bool take_orders(struct pager *p)
{
    uint64_t count;
    while (read(p->wake, &count, sizeof count) < 0 && errno == EINTR)
        ;
    pthread_mutex_lock(&p->lock);
    bool stop = p->stop, detach = p->detach, attach = p->has_next, give_up = p->state == PAGER_GIVEN_UP;
    int fd = p->next_link;
    struct wanted_run *queue = p->queue;
    size_t queued = p->queued;
    p->queue = NULL;
    p->queued = p->room = 0;
    p->detach = false;
    if (!stop)
        p->has_next = false; /* else free_all() closes it */
    pthread_mutex_unlock(&p->lock);
    if (stop)
        return free(queue), false;
    if ((detach || attach) && p->link >= 0)
        broke(p, "the connection was left");
    if (attach && !give_up) {
        p->link = fd;
        p->heard_ns = now_ns();
        pthread_mutex_lock(&p->lock);
        p->state = PAGER_LIVE;
        p->error = "";
        pthread_mutex_unlock(&p->lock);
        for (uint32_t r = 0; r < p->count; r++)
            ask(p, r, 0, p->areas[r].at.pages, true);
        signal_fd(p->told);
    } else if (attach) {
        close(fd);
    }
    for (size_t i = 0; i < queued; i++) {
        struct wanted_run *run = &queue[i];
        struct area *area = &p->areas[run->region];
        bool here = true;
        for (uint64_t n = run->first; n < (uint64_t)run->first + run->count; n++) {
            set_bit(area->watched, n);
            if (bit_of(area->at.missing, n)) {
                here = false;
                if (p->link < 0)
                    set_bit(area->asked, n);
            }
        }
        if (p->link >= 0)
            ask(p, run->region, run->first, run->count, false);
        if (here)
            signal_fd(p->told);
    }
    free(queue);
    return true;
}

static bool whole(struct pager *p)
{
    pthread_mutex_lock(&p->lock);
    bool all = !p->counts.left && p->committed && p->state != PAGER_GIVEN_UP;
    pthread_mutex_unlock(&p->lock);
    return all;
}

/* Everything came: say so, and be done. The other side ends the connection. */
static void finish(struct pager *p)
{
    uint8_t frame[FRAME_HEAD];
    frame_seal(frame, FRAME_DONE, 0);
    add_out(p, frame, sizeof frame);
    flush(p);
    for (int64_t until = now_ns() + 5000000000ll; p->link >= 0 && p->out_have && now_ns() < until;) {
        struct pollfd poll_link = {p->link, POLLOUT, 0};
        poll(&poll_link, 1, 100);
        flush(p);
    }
    if (p->link >= 0)
        shutdown(p->link, SHUT_WR);
    for (uint32_t r = 0; r < p->count; r++) {
        struct uffdio_range range = {(uintptr_t)p->areas[r].at.host, p->areas[r].at.pages * PAGE};
        ioctl(p->uffd, UFFDIO_UNREGISTER, &range);
    }
    pthread_mutex_lock(&p->lock);
    p->state = PAGER_WHOLE;
    p->error = "";
    pthread_mutex_unlock(&p->lock);
    signal_fd(p->told);
    /* What the other side had sent twice is read: a connection that is closed with bytes in it may lose ours. */
    for (int64_t until = now_ns() + 5000000000ll; p->link >= 0 && now_ns() < until;) {
        struct pollfd polls[2] = {{p->link, POLLIN, 0}, {p->wake, POLLIN, 0}};
        poll(polls, 2, 1000);
        if (polls[1].revents && !take_orders(p))
            return;
        if (p->link >= 0 && polls[0].revents && recv(p->link, p->in, ROOM, MSG_DONTWAIT) <= 0)
            return;
    }
}

static void *work(void *argument)
{
    struct pager *p = argument;
    for (;;) {
        if (whole(p)) {
            finish(p);
            return NULL;
        }
        struct pollfd polls[3] = {{p->wake, POLLIN, 0}, {p->uffd, POLLIN, 0},
                                  {p->link, POLLIN | (p->out_have ? POLLOUT : 0), 0}};
        if (poll(polls, 3, 1000) < 0 && errno != EINTR)
            abort(); /* descriptors of our own that are none */
        if (polls[0].revents && !take_orders(p))
            return NULL;
        if (polls[1].revents)
            take_faults(p);
        if (current(p) == PAGER_GIVEN_UP)
            fill(p);
        if (p->link >= 0 && p->link == polls[2].fd && polls[2].revents & ~POLLOUT)
            receive(p);
        if (p->link >= 0)
            flush(p);
        pthread_mutex_lock(&p->lock);
        bool waits = p->committed && p->counts.left;
        pthread_mutex_unlock(&p->lock);
        if (p->link >= 0 && waits && now_ns() - p->heard_ns > LINK_SILENCE_MS * 1000000ll)
            broke(p, "the other side has said nothing for 30 s");
    }
}

/* ---- for others ---- */

/* Register the regions, and empty the pages that are missing. 0 or an errno. */
static int take_memory(struct pager *p)
{
    for (uint32_t r = 0; r < p->count; r++) {
        struct pager_region *at = &p->areas[r].at;
        struct uffdio_register range = {.range = {(uintptr_t)at->host, at->pages * PAGE},
                                        .mode = UFFDIO_REGISTER_MODE_MISSING};
        if (ioctl(p->uffd, UFFDIO_REGISTER, &range) < 0)
            return errno;
        for (uint64_t n = next_bit(at->missing, 0, at->pages); n < at->pages; n = next_bit(at->missing, n, at->pages)) {
            uint64_t end = n + 1;
            while (end < at->pages && bit_of(at->missing, end))
                end++;
            if (madvise(at->host + n * PAGE, (end - n) * PAGE, MADV_DONTNEED) < 0)
                return errno;
            n = end;
        }
    }
    return 0;
}

static void free_all(struct pager *p)
{
    for (int *fd = (int[]){p->uffd, p->wake, p->told, p->link, p->has_next ? p->next_link : -1}, i = 0; i < 5; i++)
        if (fd[i] >= 0)
            close(fd[i]);
    for (uint32_t r = 0; p->areas && r < p->count; r++) {
        free(p->areas[r].asked);
        free(p->areas[r].watched);
    }
    pthread_mutex_destroy(&p->lock);
    free(p->areas);
    free(p->queue);
    free(p->in);
    free(p->out);
    free(p);
}

struct pager *pager_new(const struct pager_region *regions, uint32_t count, bool kernel, int *error)
{
    struct pager *p = calloc(1, sizeof *p);
    if (!p) {
        *error = ENOMEM;
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    p->uffd = p->wake = p->told = p->link = p->next_link = -1;
    p->count = count;
    p->error = "";
    p->areas = calloc(count + 1, sizeof *p->areas);
    p->in = malloc(ROOM);
    p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->told = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    *error = p->areas && p->in ? p->wake < 0 || p->told < 0 ? errno : 0 : ENOMEM;
    for (uint32_t r = 0; !*error && r < count; r++) {
        uint64_t words = (regions[r].pages + 63) / 64;
        p->areas[r] = (struct area){regions[r], calloc(words + 1, 8), calloc(words + 1, 8)};
        p->counts.left += count_bits(regions[r].missing, regions[r].pages);
        if (!p->areas[r].asked || !p->areas[r].watched)
            *error = ENOMEM;
    }
    if (!*error) {
        p->uffd = pager_open(kernel);
        *error = p->uffd < 0 ? -p->uffd : take_memory(p);
    }
    if (!*error) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        *error = pthread_create(&p->thread, NULL, work, p);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (*error) {
        free_all(p);
        return NULL;
    }
    return p;
}

int pager_attach(struct pager *p, int fd)
{
    pthread_mutex_lock(&p->lock);
    int error = p->state == PAGER_WHOLE || p->state == PAGER_GIVEN_UP ? EPIPE : 0;
    if (!error) {
        if (p->has_next)
            close(p->next_link);
        p->next_link = fd;
        p->has_next = true;
    }
    pthread_mutex_unlock(&p->lock);
    if (error)
        close(fd);
    else
        signal_fd(p->wake);
    return error;
}

void pager_detach(struct pager *p)
{
    pthread_mutex_lock(&p->lock);
    p->detach = true;
    pthread_mutex_unlock(&p->lock);
    signal_fd(p->wake);
}

void pager_commit(struct pager *p)
{
    pthread_mutex_lock(&p->lock);
    p->committed = true;
    pthread_mutex_unlock(&p->lock);
    signal_fd(p->wake);
}

void pager_want(struct pager *p, uint32_t region, uint64_t first, uint64_t count)
{
    if (region >= p->count || first >= p->areas[region].at.pages)
        return;
    uint64_t pages = p->areas[region].at.pages;
    if (count > pages - first)
        count = pages - first;
    pthread_mutex_lock(&p->lock);
    if (p->queued == p->room) {
        size_t room = p->room ? 2 * p->room : 64;
        struct wanted_run *larger = realloc(p->queue, room * sizeof *larger);
        if (larger) {
            p->queue = larger;
            p->room = room;
        }
    }
    if (p->queued < p->room) /* else they come with the rest */
        p->queue[p->queued++] = (struct wanted_run){region, (uint32_t)first, (uint32_t)count};
    pthread_mutex_unlock(&p->lock);
    signal_fd(p->wake);
}

int pager_fd(const struct pager *p) { return p->told; }

enum pager_state pager_state(struct pager *p) { return current(p); }

const char *pager_error(struct pager *p)
{
    pthread_mutex_lock(&p->lock);
    const char *error = p->error;
    pthread_mutex_unlock(&p->lock);
    return error;
}

void pager_counts(struct pager *p, struct pager_counts *counts)
{
    pthread_mutex_lock(&p->lock);
    *counts = p->counts;
    pthread_mutex_unlock(&p->lock);
}

void pager_free(struct pager *p)
{
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_mutex_unlock(&p->lock);
    signal_fd(p->wake);
    pthread_join(p->thread, NULL);
    /* Closing the last descriptor unregisters the memory and wakes whoever waits for it. */
    free_all(p);
}
