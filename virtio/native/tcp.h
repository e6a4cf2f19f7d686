/* TCP segments in Ethernet frames, as far as whoever watches connections needs them. */
#ifndef VIRTIO_TCP_H
#define VIRTIO_TCP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    ETHERNET = 14, ETHERTYPE_IPV4 = 0x0800, ETHERTYPE_IPV6 = 0x86DD, PROTOCOL_TCP = 6,
    TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16,
    FLOW_HEAD = 14 + 60 + 60, /* bytes of a frame that matter: Ethernet, IP and TCP headers */
    FLOW_ANSWER = 14 + 40 + 20,
};

/* As it is saved, 50 bytes: Ethernet and IP addresses (version 4: four bytes and zeroes) and ports in network order. */
struct flow {
    uint8_t guest_mac[6], peer_mac[6], guest[16], peer[16], version[2], guest_port[2], peer_port[2];
};
_Static_assert(sizeof(struct flow) == 50, "no padding");

/* What a frame says of its connection. */
struct segment_seen {
    struct flow flow; /* seen from the guest */
    uint8_t flags;
    uint32_t seq, ack, length; /* length: as sequence numbers count it */
};

static inline uint16_t load16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static inline void store16(uint8_t *p, uint16_t v) { p[0] = (uint8_t)(v >> 8), p[1] = (uint8_t)v; }

/* Of the addresses of a connection, of 8 bytes or more: where tables look for it. Each multiplication by an odd number near
 * the golden ratio of 2^64 carries what is in a bit to all higher ones, and the shift brings it down again. */
static inline uint64_t tcp_hash(const uint8_t *bytes, size_t length)
{
    uint64_t hash = length, word;
    for (size_t at = 0; at < length; at += 8) {
        memcpy(&word, bytes + (at + 8 <= length ? at : length - 8), 8);
        hash = (hash ^ word) * 0x9E3779B97F4A7C15;
        hash ^= hash >> 32;
    }
    return hash * 0x9E3779B97F4A7C15 >> 32;
}

/* Whether the frame is a whole TCP header over IP that is understood; `outgoing`: the guest sends it. */
bool tcp_look(const uint8_t *frame, size_t length, bool outgoing, struct segment_seen *found);
/* A segment without data from the peer to the guest. The frame's length. */
size_t tcp_segment(uint8_t frame[FLOW_ANSWER], const struct flow *flow, uint8_t flags, uint32_t seq, uint32_t ack);
/* What the receiver of `seen` resets its sender with (RFC 9293, 3.10.7.1), `outgoing` as it was looked at. */
size_t tcp_reset_sender(uint8_t frame[FLOW_ANSWER], const struct segment_seen *seen, bool outgoing);
/* What its sender resets its receiver with instead of sending it. */
size_t tcp_reset_receiver(uint8_t frame[FLOW_ANSWER], const struct segment_seen *seen, bool outgoing);

#endif
