/* virtio._ring.NetEngine: frames between virtqueues and a descriptor (virtio 1.2, 5.1.6), a batch in one call.
 *
 * Three framings: a tap with its virtio_net_hdr passed through, a datagram socket (one frame each), and a stream with a
 * 4-byte big-endian length before each frame. A frame stays where it is, in the queue or in the socket, while the other
 * side has no room. virtio/devices/net.py is the same in Python, for backends without a descriptor.
 */
#include "fence.h"
#include "flows.h"
#include "limits.h"
#include "module.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    FRAMING_TAP, FRAMING_DATAGRAM, FRAMING_STREAM,
    HEADER = 12,           /* struct virtio_net_hdr with num_buffers: always so with VIRTIO_F_VERSION_1 (5.1.6) */
    FRAME_MAX = 65550 + 4, /* an Ethernet frame with VLAN tag around 64 KiB */
    BUFFER = 256 * 1024,
    IOV_LIMIT = 1024, BATCH = 64, MERGE_MAX = 64,
    MORE = 1, SIGNAL = 2, BLOCKED = 4, STARVED = 8, CLOSED = 16, LIMITED = 32, ANSWERED = 64,
    HDR_F_NEEDS_CSUM = 1, HDR_F_DATA_VALID = 2, GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_ECN = 0x80, /* 5.1.6 */
    F_GUEST_CSUM = 1 << 1, F_GUEST_TSO4 = 1 << 7, F_GUEST_TSO6 = 1 << 8 /* 5.1.3 */
};

struct net_header { /* 5.1.6: struct virtio_net_hdr, little-endian as its host */
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

_Static_assert(sizeof(struct net_header) == HEADER, "5.1.6");

typedef struct {
    PyObject_HEAD
    int fd, framing;
    bool mergeable;
    uint32_t features;     /* negotiated ones of 5.1.3 */
    size_t longest;        /* bytes of a frame that the driver agreed to take, unless it is a segmentation offload's */
    uint8_t *in;           /* received, not yet delivered: [in_start, in_end) */
    size_t in_start, in_end;
    uint8_t *out;          /* stream: the rest of a frame that the socket did not take */
    size_t out_start, out_end;
    uint64_t sent, received, dropped;
    uint64_t sent_bytes, received_bytes; /* of the frames that are counted in sent and received */
    LimitsObject *transmit_limits, *receive_limits; /* shared with the card's other queues; NULL: none */
    int64_t wait; /* ns, of the frame that was LIMITED last */
    FlowsObject *flows; /* what watches TCP connections, or NULL */
    FenceObject *fence; /* what decides which frames pass, or NULL */
} NetObject;

/* Whether a frame with so many bytes may pass now. */
static inline bool may_pass(NetObject *self, LimitsObject *limits, uint64_t bytes, int64_t now)
{
    return !limits || !limits->active || !(self->wait = limits_wait(limits, LIMIT_ALL, bytes, now));
}

static inline void charge(LimitsObject *limits, uint64_t bytes)
{
    if (limits)
        limits_charge(limits, LIMIT_ALL, bytes);
}

static size_t gather_chain(const struct chain *chain, uint64_t skip, struct iovec *iov, size_t room)
{
    size_t count = 0;
    for (uint32_t i = 0; i < chain->readable; i++) {
        if (skip >= chain->segments[i].len) {
            skip -= chain->segments[i].len;
            continue;
        }
        if (count == room)
            return SIZE_MAX;
        iov[count++] = (struct iovec){chain->segments[i].host + skip, chain->segments[i].len - skip};
        skip = 0;
    }
    return count;
}

/* The chain's header for a tap, `length` bytes of frame behind it. A copy: what was checked is what the kernel gets. */
static struct net_header outgoing_header(const struct chain *chain, uint64_t length)
{
    struct net_header header;
    char *to = (char *)&header;
    for (size_t i = 0, left = HEADER; left; i++) {
        size_t part = chain->segments[i].len < left ? chain->segments[i].len : left;
        memcpy(to, chain->segments[i].host, part);
        to += part;
        left -= part;
    }
    /* 5.1.6.2.2: "The device MUST ignore flag bits that it does not recognize. If VIRTIO_NET_HDR_F_NEEDS_CSUM bit in flags
     * is not set, the device MUST NOT use the csum_start and csum_offset." */
    header.flags &= HDR_F_NEEDS_CSUM;
    if (!header.flags)
        header.csum_start = header.csum_offset = 0;
    /* 5.1.6.2.2: "The device MUST NOT rely on hdr_len to be correct.": the kernel refuses one beyond the frame. */
    if (header.hdr_len > length)
        header.hdr_len = (uint16_t)length;
    header.num_buffers = 0;
    return header;
}

/* Whether the driver takes a tap's frame with this header, which is made what was negotiated. */
static bool incoming_header(const NetObject *self, struct net_header *header)
{
    /* 5.1.6.4.1: "If VIRTIO_NET_F_GUEST_CSUM is not negotiated, the device MUST set flags to zero"; "If
     * VIRTIO_NET_F_RSC_EXT was not negotiated, the device MUST not set VIRTIO_NET_HDR_F_RSC_INFO bit in flags." A frame
     * that needs what was not negotiated stood in the tap since an earlier driver. */
    bool checksum = self->features & F_GUEST_CSUM;
    if (header->flags & HDR_F_NEEDS_CSUM && !checksum)
        return false;
    header->flags &= checksum ? HDR_F_NEEDS_CSUM | HDR_F_DATA_VALID : 0;
    if (!(header->flags & HDR_F_NEEDS_CSUM))
        header->csum_start = header->csum_offset = 0;
    /* 5.1.6.4.1: "If gso_type differs from VIRTIO_NET_HDR_GSO_NONE, then the device MUST also set the
     * VIRTIO_NET_HDR_F_NEEDS_CSUM bit in flags" */
    if (header->gso_type != GSO_NONE && !(header->flags & HDR_F_NEEDS_CSUM))
        return false;
    switch (header->gso_type) {
    case GSO_NONE: return true;
    case GSO_TCPV4: return self->features & F_GUEST_TSO4;
    case GSO_TCPV6: return self->features & F_GUEST_TSO6;
    default: return false;
    }
}

/* The guest's frame in `*count` parts of `iov`, for who watches connections and for who decides what passes. 0: what is to be
 * sent stands in `iov` and `*length` afterwards, with headers that were judged in `head`; 1: it goes nowhere; -1: an exception
 * is set. There is room for one part more. */
static int examine(NetObject *self, struct iovec *iov, size_t *count, uint64_t *length, uint8_t head[FLOW_HEAD],
                   int *flags)
{
    size_t have = 0;
    if (!self->flows && !self->fence)
        return 0;
    for (size_t i = 0; i < *count && have < FLOW_HEAD; i++) {
        size_t part = iov[i].iov_len < FLOW_HEAD - have ? iov[i].iov_len : FLOW_HEAD - have;
        memcpy(head + have, iov[i].iov_base, part);
        have += part;
    }
    /* A connection whose other end is gone gets its reset, whether or not it would be allowed to begin now. */
    bool first = self->flows && (self->flows->answers || !self->fence);
    int gone = first ? flows_outgoing(self->flows, head, have) : 0;
    if (gone || !self->fence)
        return gone;
    size_t size = (size_t)*length;
    int verdict = fence_outgoing(self->fence, head, have, iov, *count, &size);
    if (verdict < 0)
        return -1;
    if (verdict == CUT) {
        iov[0] = (struct iovec){head, size};
        *count = 1;
        *length = size;
        *flags |= ANSWERED; /* the guest has its reset, too */
        return 0;
    }
    if (verdict != PASS) {
        self->dropped += verdict == REFUSE;
        return 1;
    }
    size_t at = 0, left = have;
    while (at < *count && left >= iov[at].iov_len)
        left -= iov[at++].iov_len;
    if (at < *count)
        iov[at] = (struct iovec){(char *)iov[at].iov_base + left, iov[at].iov_len - left};
    memmove(iov + 1, iov + at, (*count - at) * sizeof *iov);
    iov[0] = (struct iovec){head, have};
    *count += 1 - at;
    return first || !self->flows ? 0 : flows_outgoing(self->flows, head, have);
}

/* Whether everything held back went out. -1: the other end is gone. */
static int flush_out(NetObject *self)
{
    while (self->out_start < self->out_end) {
        ssize_t done = send(self->fd, self->out + self->out_start, self->out_end - self->out_start,
                            MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return errno == EAGAIN ? 0 : -1;
        self->out_start += (size_t)done;
    }
    self->out_start = self->out_end = 0;
    return 1;
}

static void hold_rest(NetObject *self, const struct iovec *iov, size_t count, size_t sent)
{
    for (size_t i = 0; i < count; i++) {
        if (sent >= iov[i].iov_len) {
            sent -= iov[i].iov_len;
            continue;
        }
        memcpy(self->out + self->out_end, (const char *)iov[i].iov_base + sent, iov[i].iov_len - sent);
        self->out_end += iov[i].iov_len - sent;
        sent = 0;
    }
}

/* One batch of frames as a single gathered write. */
static int transmit_stream(NetObject *self, RingObject *ring, int limit, int64_t now)
{
    struct iovec iov[IOV_LIMIT];
    struct pending done[BATCH];
    uint32_t lengths[BATCH];
    uint8_t heads[BATCH][FLOW_HEAD];
    size_t used = 0, total = 0;
    uint32_t count = 0;
    int flags = 0;
    int flushed = flush_out(self);
    if (flushed <= 0)
        return flushed ? CLOSED : BLOCKED;
    for (;;) {
        if ((int)count >= limit || count >= BATCH || total >= BUFFER / 2 || fence_tired(self->fence)) {
            flags |= MORE;
            break;
        }
        struct chain chain;
        int got = ring_pop(&ring->ring, &chain);
        if (got < 0)
            return -1;
        if (!got)
            break;
        uint64_t length = chain.readable_length - HEADER;
        size_t parts = 0;
        bool fits = chain.readable_length > HEADER && length <= FRAME_MAX;
        if (fits && !may_pass(self, self->transmit_limits, length, now)) {
            ring_undo_pop(&ring->ring, &chain);
            flags |= LIMITED;
            break;
        }
        if (fits)
            parts = gather_chain(&chain, HEADER, iov + used + 1, used + 2 < IOV_LIMIT ? IOV_LIMIT - used - 2 : 0);
        if (parts == SIZE_MAX && used) {
            ring_undo_pop(&ring->ring, &chain);
            flags |= MORE;
            break;
        }
        done[count] = (struct pending){chain.order, 0, chain.id, chain.slots, false};
        bool frame = fits && parts != SIZE_MAX;
        int answered = frame ? examine(self, iov + used + 1, &parts, &length, heads[count], &flags) : 0;
        if (answered < 0)
            return -1;
        lengths[count] = __builtin_bswap32((uint32_t)length);
        if (answered) {
            flags |= ANSWERED;
        } else if (frame) {
            iov[used] = (struct iovec){&lengths[count], 4};
            used += 1 + parts;
            total += 4 + length;
            self->sent++;
            self->sent_bytes += length;
            charge(self->transmit_limits, length);
        } else {
            self->dropped++; /* no frame: 5.1.6.2 makes the header and at least one byte the driver's part */
        }
        count++;
    }
    if (used) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = used};
        ssize_t sent;
        do
            sent = sendmsg(self->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (sent < 0 && errno == EINTR);
        if (sent < 0 && errno != EAGAIN)
            flags |= CLOSED;
        else if (sent < 0 || (size_t)sent < total) {
            hold_rest(self, iov, used, sent < 0 ? 0 : (size_t)sent);
            flags |= BLOCKED;
        }
    }
    ring_push_batch(&ring->ring, done, count);
    return flags;
}

static int transmit_frames(NetObject *self, RingObject *ring, int limit, int64_t now)
{
    struct pending done[BATCH];
    uint32_t count = 0;
    int flags = 0;
    bool tap = self->framing == FRAMING_TAP;
    for (;;) {
        if ((int)count >= limit || count >= BATCH || fence_tired(self->fence)) {
            flags |= MORE;
            break;
        }
        struct chain chain;
        int got = ring_pop(&ring->ring, &chain);
        if (got < 0)
            return -1;
        if (!got)
            break;
        bool fits = chain.readable_length > HEADER && chain.readable_length <= FRAME_MAX + HEADER;
        if (fits && !may_pass(self, self->transmit_limits, chain.readable_length - HEADER, now)) {
            ring_undo_pop(&ring->ring, &chain);
            flags |= LIMITED;
            break;
        }
        struct iovec iov[IOV_LIMIT];
        size_t parts = fits
                           ? gather_chain(&chain, HEADER, iov + 1, IOV_LIMIT - 2)
                           : SIZE_MAX;
        ssize_t sent = -1;
        uint8_t head[FLOW_HEAD];
        uint64_t length = chain.readable_length - HEADER;
        int answered = parts != SIZE_MAX ? examine(self, iov + 1, &parts, &length, head, &flags) : 0;
        if (answered < 0)
            return -1;
        if (answered) {
            flags |= ANSWERED;
            done[count++] = (struct pending){chain.order, 0, chain.id, chain.slots, false};
            continue;
        }
        if (parts == SIZE_MAX) {
            errno = EINVAL;
        } else if (tap) {
            struct net_header header = outgoing_header(&chain, length);
            iov[0] = (struct iovec){&header, HEADER};
            do
                sent = writev(self->fd, iov, (int)parts + 1);
            while (sent < 0 && errno == EINTR);
        } else {
            struct msghdr message = {.msg_iov = iov + 1, .msg_iovlen = parts};
            do
                sent = sendmsg(self->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
            while (sent < 0 && errno == EINTR);
        }
        if (sent < 0 && (errno == EAGAIN || errno == ENOBUFS)) {
            ring_undo_pop(&ring->ring, &chain);
            flags |= BLOCKED;
            break;
        }
        if (sent < 0)
            self->dropped++; /* the link is down, or the header makes no sense: the frame is lost, as on a wire */
        else {
            self->sent++;
            self->sent_bytes += length;
            charge(self->transmit_limits, length);
        }
        done[count++] = (struct pending){chain.order, 0, chain.id, chain.slots, false};
    }
    ring_push_batch(&ring->ring, done, count);
    return flags;
}

static void scatter(const struct chain *chain, uint64_t offset, const void *from, uint64_t length)
{
    for (uint32_t i = 0; i < chain->writable && length; i++) {
        const struct segment *segment = &chain->segments[chain->readable + i];
        if (offset >= segment->len) {
            offset -= segment->len;
            continue;
        }
        uint64_t part = segment->len - offset;
        if (part > length)
            part = length;
        memcpy(segment->host + offset, from, part);
        from = (const char *)from + part;
        length -= part;
        offset = 0;
    }
}

/* 1: delivered or dropped; 0: the driver has no room for it; -1: the ring is broken or memory ran out. */
static int deliver(NetObject *self, RingObject *ring, struct net_header header, const uint8_t *frame, size_t length)
{
    struct chain chains[MERGE_MAX];
    struct pending done[MERGE_MAX];
    uint32_t count = 0;
    uint64_t room = 0, need = HEADER + length;
    int result = 0;
    while (room < need) {
        if (count == MERGE_MAX || (count && !self->mergeable)) {
            result = 2; /* it will never fit */
            break;
        }
        int got = ring_pop(&ring->ring, &chains[count]);
        if (got < 0)
            result = -1;
        if (got <= 0)
            break;
        size_t bytes = (chains[count].readable + chains[count].writable + 1) * sizeof(struct segment);
        struct segment *copy = malloc(bytes);
        if (!copy) {
            ring_undo_pop(&ring->ring, &chains[count]);
            result = -1;
            break;
        }
        memcpy(copy, chains[count].segments, bytes - sizeof *copy);
        chains[count].segments = copy;
        room += chains[count].writable_length;
        count++;
    }
    if (room >= need && !result) {
        /* 5.1.6.4.1: "If VIRTIO_NET_F_MRG_RXBUF has not been negotiated, the device MUST set num_buffers to 1." and
         * "the device MUST set num_buffers to indicate the number of buffers the packet (including the header) is
         * spread over." */
        header.num_buffers = (uint16_t)count;
        uint64_t header_left = HEADER, at = 0;
        for (uint32_t i = 0; i < count; i++) {
            uint64_t size = chains[i].writable_length, put = 0;
            if (header_left) {
                put = size < header_left ? size : header_left;
                scatter(&chains[i], 0, (char *)&header + (HEADER - header_left), put);
                header_left -= put;
            }
            uint64_t part = length - at < size - put ? length - at : size - put;
            scatter(&chains[i], put, frame + at, part);
            at += part;
            done[i] = (struct pending){chains[i].order, (uint32_t)(put + part), chains[i].id, chains[i].slots, false};
            if (segments_notify(ring->memory, chains[i].segments + chains[i].readable, chains[i].writable, put + part))
                result = -1;
        }
        /* 5.1.6.4.1: "The device MUST use all buffers used by a single receive packet together, such that at least
         * num_buffers are observed by driver as used." */
        ring_push_batch(&ring->ring, done, count);
        self->received++;
        self->received_bytes += length;
        result = result ? result : 1;
    } else {
        for (uint32_t i = count; i-- > 0;)
            ring_undo_pop(&ring->ring, &chains[i]);
        if (result == 2) {
            self->dropped++;
            result = 1;
        }
    }
    for (uint32_t i = 0; i < count; i++)
        free(chains[i].segments);
    return result;
}

/* Make a frame available at self->in + in_start. 1, 0: nothing there now, -1: the other end is gone. */
static int fill(NetObject *self)
{
    if (self->framing != FRAMING_STREAM) {
        if (self->in_end > self->in_start)
            return 1;
        ssize_t got;
        do
            got = self->framing == FRAMING_TAP ? read(self->fd, self->in, FRAME_MAX + HEADER)
                                               : recv(self->fd, self->in, FRAME_MAX, MSG_DONTWAIT);
        while (got < 0 && errno == EINTR);
        if (got < 0)
            return errno == EAGAIN || errno == ECONNREFUSED || errno == EIO ? 0 : -1;
        self->in_start = 0;
        self->in_end = (size_t)got;
        return got > (self->framing == FRAMING_TAP ? HEADER : 0) ? 1 : 0;
    }
    for (;;) {
        size_t have = self->in_end - self->in_start;
        if (have >= 4) {
            uint32_t length;
            memcpy(&length, self->in + self->in_start, 4);
            length = __builtin_bswap32(length);
            if (length > FRAME_MAX)
                return -1;
            if (have >= 4 + (size_t)length)
                return 1;
        }
        if (self->in_start && self->in_start + 4 + FRAME_MAX > BUFFER) {
            memmove(self->in, self->in + self->in_start, have);
            self->in_start = 0;
            self->in_end = have;
        }
        ssize_t got = recv(self->fd, self->in + self->in_end, BUFFER - self->in_end, MSG_DONTWAIT);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno == EAGAIN ? 0 : -1;
        if (!got)
            return -1;
        self->in_end += (size_t)got;
    }
}

/* A frame of our own for the other end, between the guest's. */
static void inject(NetObject *self, const uint8_t *frame, size_t length)
{
    if (self->framing == FRAMING_TAP)
        return;
    if (self->framing == FRAMING_DATAGRAM) {
        if (send(self->fd, frame, length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            self->dropped++;
        return;
    }
    if (self->out_end + 4 + length > 2 * BUFFER)
        return;
    uint32_t size = __builtin_bswap32((uint32_t)length);
    memcpy(self->out + self->out_end, &size, 4);
    memcpy(self->out + self->out_end + 4, frame, length);
    self->out_end += 4 + length;
    flush_out(self); /* what it does not take, or that the other end is gone, the next transmit or receive notices */
}

/* Whether the frame may pass to the guest. -1: an exception is set. */
static int may_arrive(NetObject *self, const uint8_t *frame, size_t length, int *flags)
{
    uint8_t answer[FLOW_ANSWER];
    size_t size = 0;
    int verdict = self->fence ? fence_incoming(self->fence, frame, length, answer, &size) : PASS;
    if (verdict == CUT) {
        inject(self, answer, size);
        *flags |= ANSWERED;
    }
    return verdict < 0 ? -1 : verdict == PASS;
}

static int receive(NetObject *self, RingObject *ring, int limit, int64_t now, int *answered)
{
    for (int i = 0; i < limit; i++) {
        if (fence_tired(self->fence))
            return MORE;
        /* A frame's length is known only when it is here, and then it cannot wait: it may leave a debt. */
        if (!may_pass(self, self->receive_limits, 1, now))
            return LIMITED;
        int got = fill(self);
        if (got <= 0)
            return got ? CLOSED : 0;
        struct net_header header = {0};
        const uint8_t *frame = self->in + self->in_start;
        size_t length = self->in_end - self->in_start, skip = 0;
        bool takes = true;
        if (self->framing == FRAMING_TAP) {
            memcpy(&header, frame, HEADER);
            takes = incoming_header(self, &header);
            skip = HEADER;
            length -= HEADER;
        } else if (self->framing == FRAMING_STREAM) {
            uint32_t size;
            memcpy(&size, frame, 4);
            length = __builtin_bswap32(size);
            skip = 4;
        }
        /* 5.1.4.1: "The device MUST NOT pass received packets that exceed mtu (plus low level ethernet header length)
         * size with gso_type NONE or ECN after VIRTIO_NET_F_MTU has been successfully negotiated." */
        bool plain = !(header.gso_type & ~GSO_ECN);
        if (takes && length) {
            int arrives = may_arrive(self, frame + skip, length, answered);
            if (arrives < 0)
                return -1;
            takes = arrives;
        }
        if (!takes || (plain && length > self->longest)) {
            self->dropped++;
            self->in_start += skip + length;
            if (self->in_start == self->in_end)
                self->in_start = self->in_end = 0;
            continue;
        }
        int delivered = length ? deliver(self, ring, header, frame + skip, length) : 1;
        if (delivered < 0)
            return -1;
        if (!delivered) {
            ring_want_more(&ring->ring);
            delivered = deliver(self, ring, header, frame + skip, length);
            if (delivered < 0)
                return -1;
            if (!delivered)
                return STARVED;
        }
        charge(self->receive_limits, length);
        if (self->flows && flows_incoming(self->flows, frame + skip, length))
            return -1;
        self->in_start += skip + length;
        if (self->in_start == self->in_end)
            self->in_start = self->in_end = 0;
    }
    /* What is still in the descriptor makes itself heard; a stream's frames that were read with others do not. */
    return self->framing == FRAMING_STREAM && self->in_end > self->in_start ? MORE : 0;
}

static RingObject *ring_argument(PyObject *args, int *limit, long long *now)
{
    RingObject *ring;
    *limit = 256;
    *now = 0;
    if (!PyArg_ParseTuple(args, "O!|iL", &ring_type, &ring, limit, now))
        return NULL;
    if (!ring->closed)
        return ring;
    PyErr_SetString(state_error, "the queue was reset");
    return NULL;
}

static PyObject *answer(RingObject *ring, int flags)
{
    if (ring->ring.error)
        return ring_raise(ring);
    if (flags < 0)
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    if (ring_notify_area(ring))
        return NULL;
    if (ring_needs_notification(&ring->ring))
        flags |= SIGNAL;
    return PyLong_FromLong(flags);
}

static PyObject *net_transmit(NetObject *self, PyObject *args)
{
    int limit, flags, answered = 0;
    long long now;
    RingObject *ring = ring_argument(args, &limit, &now);
    if (!ring)
        return NULL;
    fence_begin(self->fence);
    ring_disable_notification(&ring->ring);
    for (;;) {
        flags = self->framing == FRAMING_STREAM ? transmit_stream(self, ring, limit, now)
                                                : transmit_frames(self, ring, limit, now);
        limit -= BATCH;
        if (flags < 0)
            break;
        answered |= flags & ANSWERED;
        flags &= ~ANSWERED;
        if (flags == MORE && limit > 0 && !fence_tired(self->fence))
            continue;
        if (flags || !ring_enable_notification(&ring->ring))
            break;
    }
    return answer(ring, flags < 0 ? flags : flags | answered);
}

static PyObject *net_receive(NetObject *self, PyObject *args)
{
    int limit, flags, answered = 0;
    long long now;
    RingObject *ring = ring_argument(args, &limit, &now);
    if (!ring)
        return NULL;
    fence_begin(self->fence);
    ring_disable_notification(&ring->ring);
    flags = receive(self, ring, limit, now, &answered);
    return answer(ring, flags < 0 ? flags : flags | answered);
}

static PyObject *net_configure(NetObject *self, PyObject *args)
{
    int mergeable;
    Py_ssize_t longest;
    unsigned long long features = 0;
    if (!PyArg_ParseTuple(args, "pn|K", &mergeable, &longest, &features))
        return NULL;
    self->mergeable = mergeable;
    self->longest = (size_t)longest;
    self->features = (uint32_t)features;
    Py_RETURN_NONE;
}

static PyObject *net_limit(NetObject *self, PyObject *args)
{
    PyObject *transmit, *receive;
    if (!PyArg_ParseTuple(args, "OO", &transmit, &receive) || limits_replace(&self->transmit_limits, transmit) ||
        limits_replace(&self->receive_limits, receive))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *net_watch(NetObject *self, PyObject *flows)
{
    if (flows_replace(&self->flows, flows))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *net_police(NetObject *self, PyObject *fence)
{
    if (fence_replace(&self->fence, fence))
        return NULL;
    Py_RETURN_NONE;
}

/* A mapping of its own: most frames are short, and what they never reach takes no memory. */
static uint8_t *make_buffer(size_t size)
{
    void *made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return made == MAP_FAILED ? NULL : made;
}

static void free_buffer(uint8_t *buffer, size_t size)
{
    if (buffer)
        munmap(buffer, size);
}

static PyObject *net_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "framing", NULL};
    int fd, framing;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ii", names, &fd, &framing))
        return NULL;
    if (framing < FRAMING_TAP || framing > FRAMING_STREAM) {
        PyErr_SetString(PyExc_ValueError, "framing is 0 (tap), 1 (datagram) or 2 (stream)");
        return NULL;
    }
    NetObject *self = (NetObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->fd = fd;
    self->framing = framing;
    self->longest = FRAME_MAX;
    self->in = make_buffer(BUFFER);
    self->out = make_buffer(2 * BUFFER);
    if (!self->in || !self->out) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void net_dealloc(NetObject *self)
{
    free_buffer(self->in, BUFFER);
    free_buffer(self->out, 2 * BUFFER);
    Py_XDECREF(self->transmit_limits);
    Py_XDECREF(self->receive_limits);
    Py_XDECREF(self->flows);
    Py_XDECREF(self->fence);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *net_counter(NetObject *self, void *which)
{
    uint64_t values[] = {self->sent, self->received, self->dropped, self->out_end - self->out_start, self->sent_bytes,
                         self->received_bytes, (uint64_t)self->wait};
    return PyLong_FromUnsignedLongLong(values[(intptr_t)which]);
}

static PyMethodDef net_methods[] = {
    {"transmit", (PyCFunction)net_transmit, METH_VARARGS,
     "transmit(ring, limit=256, now=0) -> flags: 1 more, 2 notify the driver, 4 call again when writable, 16 peer gone,\n"
     "32 call again when there are tokens, 64 look for answers of what watches or decides."},
    {"receive", (PyCFunction)net_receive, METH_VARARGS,
     "receive(ring, limit=256, now=0) -> flags: 1 more, 2 notify the driver, 8 no buffers, 16 peer gone, 32 call again\n"
     "when there are tokens, 64 look for answers of what decides."},
    {"limit", (PyCFunction)net_limit, METH_VARARGS, "limit(transmit, receive): what frames need tokens of, or None."},
    {"watch", (PyCFunction)net_watch, METH_O, "watch(flows): what watches TCP connections, or None."},
    {"police", (PyCFunction)net_police, METH_O, "police(fence): what decides which frames pass, or None."},
    {"configure", (PyCFunction)net_configure, METH_VARARGS,
     "configure(mergeable, longest, features=0): VIRTIO_NET_F_MRG_RXBUF was negotiated; received frames above `longest`\n"
     "bytes are lost, and a tap's that need a checksum or segmentation offload which is not in `features`."},
    {0},
};

static PyGetSetDef net_getset[] = {
    {"sent", (getter)net_counter, NULL, "frames", (void *)0},
    {"received", (getter)net_counter, NULL, "frames", (void *)1},
    {"dropped", (getter)net_counter, NULL, "frames", (void *)2},
    {"sent_bytes", (getter)net_counter, NULL, "of the frames sent", (void *)4},
    {"received_bytes", (getter)net_counter, NULL, "of the frames received", (void *)5},
    {"wait", (getter)net_counter, NULL, "ns that the frame has to wait which the last flag 32 was about", (void *)6},
    {"unsent", (getter)net_counter, NULL, "bytes that a stream has not taken yet", (void *)3},
    {0},
};

PyTypeObject net_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "virtio._ring.NetEngine",
    .tp_doc = "NetEngine(fd, framing): framing 0 tap with a 12-byte virtio_net_hdr, 1 datagrams, 2 length-prefixed stream.",
    .tp_basicsize = sizeof(NetObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = net_new,
    .tp_dealloc = (destructor)net_dealloc,
    .tp_methods = net_methods,
    .tp_getset = net_getset,
};
