/* A cable of so many bits a second and so much delay each way between two network namespaces:
 *
 *     wire NETNS_A TAP_A NETNS_B TAP_B BITS_PER_SECOND DELAY_US
 *
 * It makes a tap in each of the two (paths as /run/netns/a), prints a line once both are there, and carries frames until
 * it is killed. What the kernel's netem does, for kernels without it: a frame leaves when the frames before it have left
 * and as many bits as it has on an Ethernet have gone by (with preamble, checksum and gap; a frame that is to be cut into
 * segments counts as its segments), and arrives DELAY_US later. What does not fit the queue of a switch is dropped.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { FRAME = 1 << 17, QUEUE_BYTES = 2 << 20, SLOTS = 1 << 16, ETHERNET = 24, HEADERS = 66 };

struct frame {
    int64_t due;
    uint32_t size;
    char data[];
};

struct way {
    int from, to;
    int64_t bits, delay_ns, line_free;
    uint32_t head, tail;
    struct frame *ring[SLOTS];
};

static struct way ways[2];

static _Noreturn void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static int tap(const char *space, const char *name)
{
    int netns = open(space, O_RDONLY | O_CLOEXEC), size = sizeof(struct virtio_net_hdr);
    if (netns < 0 || setns(netns, CLONE_NEWNET))
        fail(space);
    close(netns);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) || ioctl(fd, TUNSETVNETHDRSZ, &size)
        || ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6))
        fail(name);
    return fd;
}

/* Bytes that the frame takes on the cable. */
static int64_t on_the_cable(const char *data, uint32_t size)
{
    struct virtio_net_hdr head;
    memcpy(&head, data, sizeof head);
    int64_t bytes = size - (uint32_t)sizeof head, segments = 1;
    if (head.gso_type != VIRTIO_NET_HDR_GSO_NONE && head.gso_size)
        segments = (bytes + head.gso_size - 1) / head.gso_size;
    return bytes + (segments - 1) * HEADERS + segments * ETHERNET;
}

static void take(struct way *way, char *buffer)
{
    for (;;) {
        ssize_t size = read(way->from, buffer, FRAME);
        if (size < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (size < (ssize_t)sizeof(struct virtio_net_hdr))
            fail("read");
        int64_t time = now(), begin = way->line_free > time ? way->line_free : time;
        int64_t waiting = (begin - time) * way->bits / 8 / 1000000000;
        if (way->tail - way->head == SLOTS || waiting > QUEUE_BYTES)
            continue;
        struct frame *frame = malloc(sizeof *frame + (size_t)size);
        if (!frame)
            fail("malloc");
        way->line_free = begin + on_the_cable(buffer, (uint32_t)size) * 8 * 1000000000 / way->bits;
        frame->due = way->line_free + way->delay_ns;
        frame->size = (uint32_t)size;
        memcpy(frame->data, buffer, (size_t)size);
        way->ring[way->tail++ % SLOTS] = frame;
    }
}

static void *carry(void *argument)
{
    struct way *way = argument;
    char *buffer = malloc(FRAME);
    if (!buffer)
        fail("malloc");
    prctl(PR_SET_TIMERSLACK, 1000);
    for (;;) {
        struct pollfd poll = { .fd = way->from, .events = POLLIN };
        struct timespec wait = { 0 };
        if (way->head != way->tail) {
            int64_t left = way->ring[way->head % SLOTS]->due - now();
            wait.tv_sec = left > 0 ? left / 1000000000 : 0;
            wait.tv_nsec = left > 0 ? left % 1000000000 : 0;
        }
        if (ppoll(&poll, 1, way->head != way->tail ? &wait : NULL, NULL) < 0 && errno != EINTR)
            fail("poll");
        take(way, buffer);
        while (way->head != way->tail && way->ring[way->head % SLOTS]->due <= now()) {
            struct frame *frame = way->ring[way->head++ % SLOTS];
            /* A tap that is down or full loses a frame, as a network card does. */
            ssize_t written = write(way->to, frame->data, frame->size);
            (void)written;
            free(frame);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        return 2;
    int ends[2] = { tap(argv[1], argv[2]), tap(argv[3], argv[4]) };
    for (int i = 0; i < 2; i++) {
        ways[i].from = ends[i], ways[i].to = ends[!i];
        ways[i].bits = atoll(argv[5]), ways[i].delay_ns = atoll(argv[6]) * 1000;
    }
    if (ways[0].bits <= 0 || ways[0].delay_ns < 0)
        return 2;
    puts("carrying");
    fflush(stdout);
    pthread_t other;
    if (pthread_create(&other, NULL, carry, &ways[0]))
        fail("thread");
    carry(&ways[1]);
}
