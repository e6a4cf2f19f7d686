/* Page server and pager against each other, as a program without Python, for sanitizers: pages are touched by several threads
 * while they come, connections end in mid-course and are taken up again, garbage comes instead. Prints what it did. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../../vmm/native/frame.h"
#include "../../../vmm/native/pager.h"
#include "../../../vmm/native/serve.h"

enum { PAGES = 2048, WORDS = PAGES / 64, READERS = 3 };

static uint8_t *source, *target;

static void must(bool good, const char *what)
{
    if (!good) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static uint8_t *memory(void)
{
    uint8_t *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(at != MAP_FAILED, "mmap");
    return at;
}

struct serving {
    int fd, wake;
    uint64_t todo[WORDS];
    struct serve_counts counts;
    enum serve_end end;
    pthread_t thread;
};

static void *serve(void *argument)
{
    struct serving *s = argument;
    struct serve_region region = {source, PAGES, s->todo};
    s->end = serve_pages(s->fd, s->wake, &region, 1, &s->counts);
    return NULL;
}

static struct serving *begin(int fd, const uint64_t *missing, bool stream)
{
    struct serving *s = calloc(1, sizeof *s);
    must(s, "calloc");
    s->fd = fd;
    s->wake = eventfd(0, EFD_NONBLOCK);
    s->counts.stream = stream;
    for (unsigned i = 0; i < WORDS; i++)
        s->todo[i] = __atomic_load_n(&missing[i], __ATOMIC_ACQUIRE);
    must(!pthread_create(&s->thread, NULL, serve, s), "pthread_create");
    return s;
}

static enum serve_end finish(struct serving *s)
{
    pthread_join(s->thread, NULL);
    enum serve_end end = s->end;
    close(s->fd);
    close(s->wake);
    free(s);
    return end;
}

static void stop(struct serving *s)
{
    __atomic_store_n(&s->counts.stop, 1, __ATOMIC_RELAXED);
    uint64_t one = 1;
    must(write(s->wake, &one, sizeof one) == sizeof one, "eventfd");
}

struct reading {
    unsigned seed, wrong;
    pthread_t thread;
};

static void *touch(void *argument)
{
    struct reading *r = argument;
    for (unsigned i = 0; i < PAGES * 2; i++) {
        uint64_t page = (unsigned)rand_r(&r->seed) % PAGES;
        uint64_t there;
        memcpy(&there, target + page * PAGE + 8, sizeof there);
        r->wrong += there != (page % 3 ? page * 7 + 1 : 0);
    }
    return NULL;
}

static void pair(int ends[2]) { must(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair"); }

static void state(struct pager *p, enum pager_state wanted)
{
    while (pager_state(p) != wanted) {
        struct pollfd told = {pager_fd(p), POLLIN, 0};
        uint64_t count;
        poll(&told, 1, 10);
        (void)!read(pager_fd(p), &count, sizeof count);
    }
}

int main(int argc, char **argv)
{
    unsigned seed = argc > 1 ? (unsigned)atoi(argv[1]) : 1, cuts = argc > 2 ? (unsigned)atoi(argv[2]) : 3;
    source = memory();
    target = memory();
    for (uint64_t page = 0; page < PAGES; page++) {
        uint64_t value = page % 3 ? page * 7 + 1 : 0;
        memcpy(source + page * PAGE + 8, &value, sizeof value);
    }
    memset(target, 0xEE, PAGES * PAGE);
    uint64_t *missing = malloc(WORDS * 8);
    must(missing, "malloc");
    memset(missing, 0xFF, WORDS * 8);
    struct pager_region region = {target, PAGES, missing};
    int error = 0, ends[2];
    struct pager *p = pager_new(&region, 1, false, &error);
    if (!p) {
        printf("no userfaultfd: %s\n", strerror(error));
        return 77;
    }
    pair(ends);
    must(!pager_attach(p, ends[1]), "attach");
    struct serving *s = begin(ends[0], missing, false);
    pager_want(p, 0, 5, 3);
    pager_want(p, 0, PAGES - 1, 100);
    pager_want(p, 7, 0, 1);
    pager_commit(p);
    struct reading readers[READERS] = {0};
    for (unsigned i = 0; i < READERS; i++) {
        readers[i].seed = seed + i;
        must(!pthread_create(&readers[i].thread, NULL, touch, &readers[i]), "pthread_create");
    }
    for (unsigned cut = 0; cut < cuts; cut++) {
        struct pager_counts counts;
        do
            pager_counts(p, &counts);
        while (counts.left > PAGES - PAGES / (cuts + 2) * (cut + 1));
        if (cut % 3 == 0) {
            stop(s);
            shutdown(s->fd, SHUT_RDWR);
        } else if (cut % 3 == 1) {
            shutdown(s->fd, SHUT_RDWR);
        } else {
            pager_detach(p);
        }
        finish(s);
        state(p, PAGER_BROKEN);
        pair(ends);
        if (cut % 2) { /* garbage first */
            uint8_t frame[FRAME_HEAD + 64];
            for (unsigned i = 0; i < sizeof frame; i++)
                frame[i] = (uint8_t)rand_r(&seed);
            if (cut % 4 == 1) {
                uint32_t head[7] = {0, PAGES - 1, 2, 0, 1 | RUN_OF_ZEROES, 5, 0x7FFFFFFF};
                memcpy(frame + FRAME_HEAD, head, sizeof head);
                frame_seal(frame, FRAME_PAGES, sizeof head);
            }
            must(!pager_attach(p, ends[1]), "attach");
            must(write(ends[0], frame, sizeof frame) > 0, "write");
            uint8_t asked[4096];
            while (read(ends[0], asked, sizeof asked) > 0) /* until it is left */
                ;
            state(p, PAGER_BROKEN);
            close(ends[0]);
            pair(ends);
        }
        must(!pager_attach(p, ends[1]), "attach");
        s = begin(ends[0], missing, cut + 1 == cuts);
    }
    if (!cuts) {
        __atomic_store_n(&s->counts.stream, 1, __ATOMIC_RELAXED);
        uint64_t one = 1;
        must(write(s->wake, &one, sizeof one) == sizeof one, "eventfd");
    }
    state(p, PAGER_WHOLE);
    unsigned wrong = 0;
    for (unsigned i = 0; i < READERS; i++) {
        pthread_join(readers[i].thread, NULL);
        wrong += readers[i].wrong;
    }
    enum serve_end end = finish(s);
    struct pager_counts counts;
    pager_counts(p, &counts);
    pager_free(p);
    must(!memcmp(source, target, PAGES * PAGE) && !wrong && end == SERVE_DONE && !counts.left, "memory differs");

    /* Given up: whoever waits goes on, with zeroes. */
    memset(missing, 0xFF, WORDS * 8);
    p = pager_new(&region, 1, false, &error);
    must(p, "pager");
    pair(ends);
    must(!pager_attach(p, ends[1]), "attach");
    struct reading late = {.seed = seed};
    must(!pthread_create(&late.thread, NULL, touch, &late), "pthread_create");
    close(ends[0]);
    pthread_join(late.thread, NULL);
    must(pager_state(p) == PAGER_GIVEN_UP, "it was to be given up");
    pager_free(p);
    /* Ended while somebody waits. */
    memset(missing, 0xFF, WORDS * 8);
    p = pager_new(&region, 1, false, &error);
    must(p, "pager");
    must(!pthread_create(&late.thread, NULL, touch, &late), "pthread_create");
    do
        pager_counts(p, &counts);
    while (!counts.faults);
    pager_free(p);
    pthread_join(late.thread, NULL);
    printf("%u cuts, %llu faults, every byte right\n", cuts, (unsigned long long)counts.faults);
    free(missing);
    return 0;
}
