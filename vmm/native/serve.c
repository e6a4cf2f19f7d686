/* Pages for a machine that runs elsewhere: see serve.h. */
#define _GNU_SOURCE
#include "serve.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frame.h"

enum {
    PIECE = 8,             /* pages of one frame: so much can be before a page that is waited for */
    UNSENT = 32 << 10,     /* bytes in the kernel that are not on the wire, likewise */
    LOCAL_BUFFER = 64 << 10, /* of a socket that has no wire */
    ZERO_MOST = 4096,      /* zero pages of one frame */
    ROOM = FRAME_HEAD + 12 * FRAME_WANTS,
    PING_MS = 5000
};

struct server {
    int fd;
    const struct serve_region *regions;
    uint32_t count;
    struct serve_counts *counts;
    struct wanted_run *urgent; /* a queue: [head, tail) */
    size_t head, tail, room;
    uint32_t at_region; /* where the stream goes on */
    uint64_t at_page;
    uint8_t in[ROOM];
    size_t have;
    uint8_t out[FRAME_HEAD + FRAME_MOST];
    size_t out_at, out_have;
    int64_t next_ns; /* when the stream may go on, at a limited rate */
    int64_t moved_ns, said_ns; /* when the connection last took bytes, or had nothing to take; when we last began a frame */
};

static uint64_t get(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static void add(uint64_t *word, uint64_t n) { __atomic_fetch_add(word, n, __ATOMIC_RELAXED); }

/* Begin the frame of the pages to be sent from `first` on, before `end`: as many as stand together and are alike. */
static uint64_t make_frame(struct server *s, uint32_t region, uint64_t first, uint64_t end)
{
    const struct serve_region *r = &s->regions[region];
    const uint8_t *from = r->host + first * PAGE;
    uint64_t n = 0, most = end - first;
    bool zero = page_is_zero(from);
    if (most > (zero ? ZERO_MOST : PIECE))
        most = zero ? ZERO_MOST : PIECE;
    while (n < most && bit_of(r->todo, first + n) && page_is_zero(from + n * PAGE) == zero)
        clear_bit(r->todo, first + n++);
    uint32_t head[5] = {region, (uint32_t)first, 1, 0, (uint32_t)n | (zero ? RUN_OF_ZEROES : 0)};
    uint32_t length = sizeof head + (zero ? 0 : (uint32_t)n * PAGE);
    memcpy(s->out + FRAME_HEAD, head, sizeof head);
    if (!zero)
        memcpy(s->out + FRAME_HEAD + sizeof head, from, n * PAGE);
    frame_seal(s->out, FRAME_PAGES, length);
    s->out_at = 0;
    s->out_have = FRAME_HEAD + length;
    add(zero ? &s->counts->zero : &s->counts->pages, n);
    __atomic_fetch_sub(&s->counts->left, n, __ATOMIC_RELAXED);
    return n;
}

/* A frame of what somebody waits for; false: nobody waits. The stream goes on after it, for whoever touched a page is likely
 * to touch the next. */
static bool make_urgent(struct server *s)
{
    while (s->head < s->tail) {
        struct wanted_run *run = &s->urgent[s->head];
        uint64_t end = (uint64_t)run->first + run->count, at = next_bit(s->regions[run->region].todo, run->first, end);
        if (at >= end) {
            if (++s->head == s->tail)
                s->head = s->tail = 0;
            continue;
        }
        uint64_t n = make_frame(s, run->region, at, end);
        add(&s->counts->urgent, n);
        run->count -= (uint32_t)(at + n - run->first);
        run->first = (uint32_t)(at + n);
        s->at_region = run->region;
        s->at_page = at + n;
        return true;
    }
    return false;
}

static bool make_stream(struct server *s)
{
    for (uint32_t looked = 0; looked <= s->count; looked++) {
        const struct serve_region *r = &s->regions[s->at_region];
        uint64_t at = next_bit(r->todo, s->at_page, r->pages);
        if (at < r->pages) {
            s->at_page = at + make_frame(s, s->at_region, at, r->pages);
            return true;
        }
        s->at_region = (s->at_region + 1) % s->count;
        s->at_page = 0;
    }
    return false;
}

/* A frame to send, if there is one; *wait: ms until there may be. */
static bool make(struct server *s, int *wait)
{
    int64_t now = now_ns();
    uint64_t bandwidth = get(&s->counts->bandwidth);
    if (!make_urgent(s)) {
        if (get(&s->counts->stream) && (!bandwidth || now >= s->next_ns)) {
            if (make_stream(s) && bandwidth)
                s->next_ns = (s->next_ns > now - 100000000 ? s->next_ns : now) +
                             (int64_t)(s->out_have * 1000000000ull / bandwidth);
        } else if (get(&s->counts->stream) && get(&s->counts->left)) {
            int64_t left = (s->next_ns - now) / 1000000 + 1;
            *wait = left < *wait ? (int)left : *wait;
        }
    }
    if (!s->out_have && now - s->said_ns > PING_MS * 1000000ll) {
        frame_seal(s->out, FRAME_PING, 0);
        s->out_at = 0;
        s->out_have = FRAME_HEAD;
    }
    if (s->out_have)
        s->said_ns = now;
    return s->out_have;
}

/* Send what there is, as far as the connection takes it; false: it has ended. */
static bool send_on(struct server *s, int *wait)
{
    while (s->out_have || make(s, wait)) {
        ssize_t sent = send(s->fd, s->out + s->out_at, s->out_have - s->out_at, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return errno == EAGAIN;
        s->moved_ns = now_ns();
        add(&s->counts->bytes, (uint64_t)sent);
        s->out_at += (size_t)sent;
        if (s->out_at < s->out_have)
            return true;
        s->out_have = 0;
        struct pollfd more = {s->fd, POLLIN, 0};
        if (poll(&more, 1, 0) > 0) /* what is asked for overtakes the stream */
            return true;
    }
    s->moved_ns = now_ns();
    return true;
}

static enum serve_end want(struct server *s, const uint8_t *payload, uint32_t length)
{
    if (length % 12 || length > 12 * FRAME_WANTS)
        return SERVE_DAMAGED;
    for (uint32_t at = 0; at < length; at += 12) {
        struct wanted_run run;
        memcpy(&run, payload + at, sizeof run);
        if (run.region >= s->count || !run.count || run.first >= s->regions[run.region].pages ||
            run.count > s->regions[run.region].pages - run.first)
            return SERVE_DAMAGED;
        uint64_t end = (uint64_t)run.first + run.count;
        if (next_bit(s->regions[run.region].todo, run.first, end) >= end)
            continue; /* it is on its way */
        if (s->tail == s->room && s->head) {
            memmove(s->urgent, s->urgent + s->head, (s->tail - s->head) * sizeof *s->urgent);
            s->tail -= s->head;
            s->head = 0;
        }
        if (s->tail == s->room) {
            /* An honest target asks for a page once. */
            if (s->room > 1 << 24)
                return SERVE_DAMAGED;
            size_t room = s->room ? 2 * s->room : 256;
            struct wanted_run *larger = realloc(s->urgent, room * sizeof *larger);
            if (!larger)
                return SERVE_NO_MEMORY;
            s->urgent = larger;
            s->room = room;
        }
        s->urgent[s->tail++] = run;
    }
    return SERVE_STOPPED; /* go on */
}

/* SERVE_STOPPED: go on. */
static enum serve_end receive(struct server *s)
{
    ssize_t got = recv(s->fd, s->in + s->have, ROOM - s->have, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return SERVE_STOPPED;
    if (got <= 0)
        return SERVE_LOST;
    s->have += (size_t)got;
    size_t at = 0;
    while (s->have - at >= FRAME_HEAD) {
        struct frame_head head;
        if (!frame_parse(s->in + at, 12 * FRAME_WANTS, &head))
            return SERVE_DAMAGED;
        if (s->have - at - FRAME_HEAD < head.length)
            break;
        const uint8_t *payload = s->in + at + FRAME_HEAD;
        if (crc32c(0, payload, head.length) != head.crc)
            return SERVE_DAMAGED;
        if (head.kind == FRAME_DONE)
            return SERVE_DONE;
        if (head.kind != FRAME_PING) {
            enum serve_end end = head.kind == FRAME_WANT ? want(s, payload, head.length) : SERVE_DAMAGED;
            if (end != SERVE_STOPPED)
                return end;
        }
        at += FRAME_HEAD + head.length;
    }
    memmove(s->in, s->in + at, s->have - at);
    s->have -= at;
    return SERVE_STOPPED;
}

enum serve_end serve_pages(int fd, int wake, const struct serve_region *regions, uint32_t count, struct serve_counts *counts)
{
    struct server *s = calloc(1, sizeof *s);
    if (!s || !count)
        return free(s), SERVE_NO_MEMORY;
    s->fd = fd;
    s->regions = regions;
    s->count = count;
    s->counts = counts;
    s->moved_ns = s->said_ns = now_ns();
    uint64_t left = 0;
    for (uint32_t r = 0; r < count; r++)
        left += count_bits(regions[r].todo, regions[r].pages);
    __atomic_store_n(&counts->left, left, __ATOMIC_RELAXED);
    /* Little waits in the kernel, so that a page that is waited for goes out soon. Not every socket has these. */
    int unsent = UNSENT, local = LOCAL_BUFFER, domain = 0;
    socklen_t size = sizeof domain;
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size);
    if (domain == AF_UNIX)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &local, sizeof local);
    else
        setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
    enum serve_end end = SERVE_STOPPED;
    while (end == SERVE_STOPPED && !get(&counts->stop)) {
        int wait = 1000;
        if (!send_on(s, &wait)) {
            end = SERVE_LOST;
            break;
        }
        struct pollfd polls[2] = {{fd, POLLIN | (s->out_have ? POLLOUT : 0), 0}, {wake, POLLIN, 0}};
        if (poll(polls, 2, wait) < 0 && errno != EINTR)
            end = SERVE_LOST;
        uint64_t raised;
        if (polls[1].revents)
            while (read(wake, &raised, sizeof raised) < 0 && errno == EINTR)
                ;
        if (polls[0].revents & ~POLLOUT)
            end = receive(s);
        if (s->out_have && now_ns() - s->moved_ns > LINK_SILENCE_MS * 1000000ll)
            end = SERVE_LOST;
    }
    free(s->urgent);
    free(s);
    return end;
}
