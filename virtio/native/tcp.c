/* See tcp.h. */
#include "tcp.h"

#include <string.h>

static uint32_t load32(const uint8_t *p) { return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]; }
static void store32(uint8_t *p, uint32_t v) { p[0] = (uint8_t)(v >> 24), p[1] = (uint8_t)(v >> 16), p[2] = (uint8_t)(v >> 8), p[3] = (uint8_t)v; }

bool tcp_look(const uint8_t *frame, size_t length, bool outgoing, struct segment_seen *found)
{
    if (length < ETHERNET + 20)
        return false;
    const uint8_t *ip = frame + ETHERNET, *tcp, *source, *target;
    size_t have = length - ETHERNET, size, total, address;
    uint16_t type = load16(frame + 12);
    uint8_t version = ip[0] >> 4;
    if (type == ETHERTYPE_IPV4 && version == 4) {
        size = (size_t)(ip[0] & 15) * 4;
        total = load16(ip + 2);
        if (size < 20 || ip[9] != PROTOCOL_TCP || (load16(ip + 6) & 0x3FFF))
            return false;
        source = ip + 12, target = ip + 16, address = 4;
    } else if (type == ETHERTYPE_IPV6 && version == 6 && have >= 40) {
        size = 40;
        total = 40u + load16(ip + 4);
        if (ip[6] != PROTOCOL_TCP)
            return false;
        source = ip + 8, target = ip + 24, address = 16;
    } else {
        return false;
    }
    if (have < size + 20 || total < size + 20)
        return false;
    tcp = ip + size;
    size_t header = (size_t)(tcp[12] >> 4) * 4;
    if (header < 20 || total < size + header)
        return false;
    memset(found, 0, sizeof *found);
    found->flags = tcp[13];
    found->seq = load32(tcp + 4);
    found->ack = load32(tcp + 8);
    found->length = (uint32_t)(total - size - header) + !!(tcp[13] & TCP_SYN) + !!(tcp[13] & TCP_FIN);
    struct flow *f = &found->flow;
    memcpy(outgoing ? f->peer_mac : f->guest_mac, frame, 6);
    memcpy(outgoing ? f->guest_mac : f->peer_mac, frame + 6, 6);
    memcpy(outgoing ? f->guest : f->peer, source, address);
    memcpy(outgoing ? f->peer : f->guest, target, address);
    memcpy(outgoing ? f->guest_port : f->peer_port, tcp, 2);
    memcpy(outgoing ? f->peer_port : f->guest_port, tcp + 2, 2);
    f->version[1] = version;
    return true;
}

static uint32_t sum(const uint8_t *bytes, size_t length, uint32_t total) /* RFC 1071; of an even number of bytes */
{
    for (size_t i = 0; i < length; i += 2)
        total += load16(bytes + i);
    return total;
}

static uint16_t folded(uint32_t total)
{
    total = (total >> 16) + (total & 0xFFFF);
    return (uint16_t)~(total + (total >> 16));
}

size_t tcp_segment(uint8_t frame[FLOW_ANSWER], const struct flow *flow, uint8_t flags, uint32_t seq, uint32_t ack)
{
    memset(frame, 0, FLOW_ANSWER);
    uint8_t *ip = frame + ETHERNET;
    bool v4 = flow->version[1] == 4;
    size_t size = v4 ? 20 : 40, address = v4 ? 4 : 16;
    uint8_t *tcp = ip + size;
    memcpy(frame, flow->guest_mac, 6);
    memcpy(frame + 6, flow->peer_mac, 6);
    store16(frame + 12, v4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6);
    if (v4) {
        ip[0] = 0x45;
        store16(ip + 2, 40);
        ip[6] = 0x40; /* not to be fragmented */
        ip[8] = 64;
        ip[9] = PROTOCOL_TCP;
    } else {
        ip[0] = 0x60;
        store16(ip + 4, 20);
        ip[6] = PROTOCOL_TCP;
        ip[7] = 64;
    }
    memcpy(ip + (v4 ? 12 : 8), flow->peer, address);
    memcpy(ip + (v4 ? 16 : 24), flow->guest, address);
    if (v4)
        store16(ip + 10, folded(sum(ip, 20, 0)));
    memcpy(tcp, flow->peer_port, 2);
    memcpy(tcp + 2, flow->guest_port, 2);
    store32(tcp + 4, seq);
    store32(tcp + 8, ack);
    tcp[12] = 5 << 4;
    tcp[13] = flags;
    store16(tcp + 16, folded(sum(tcp, 20, sum(ip + (v4 ? 12 : 8), 2 * address, PROTOCOL_TCP + 20))));
    return ETHERNET + size + 20;
}

static struct flow turned(const struct flow *flow)
{
    struct flow other = *flow;
    memcpy(other.guest_mac, flow->peer_mac, 6);
    memcpy(other.peer_mac, flow->guest_mac, 6);
    memcpy(other.guest, flow->peer, 16);
    memcpy(other.peer, flow->guest, 16);
    memcpy(other.guest_port, flow->peer_port, 2);
    memcpy(other.peer_port, flow->guest_port, 2);
    return other;
}

size_t tcp_reset_sender(uint8_t frame[FLOW_ANSWER], const struct segment_seen *seen, bool outgoing)
{
    /* "If the ACK bit is off, sequence number zero is used, <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>. If the ACK bit is
     * on, <SEQ=SEG.ACK><CTL=RST>." */
    struct flow flow = outgoing ? seen->flow : turned(&seen->flow);
    return seen->flags & TCP_ACK ? tcp_segment(frame, &flow, TCP_RST, seen->ack, 0)
                                 : tcp_segment(frame, &flow, TCP_RST | TCP_ACK, 0, seen->seq + seen->length);
}

size_t tcp_reset_receiver(uint8_t frame[FLOW_ANSWER], const struct segment_seen *seen, bool outgoing)
{
    struct flow flow = outgoing ? turned(&seen->flow) : seen->flow;
    return tcp_segment(frame, &flow, TCP_RST | (seen->flags & TCP_ACK), seen->seq, seen->ack);
}
