/* An address for a network card by DHCP (RFC 2131, options of RFC 2132), for images that bring no client of their own:
 * DISCOVER, OFFER, REQUEST, ACK, then address, mask, MTU, default route and /etc/resolv.conf. A lease is not renewed.
 * Packets go through a packet socket, for the card has no address yet. What a server says is checked against its packet's
 * length. */
#include "sys.h"

enum { AF_INET = 2, AF_PACKET = 17, SOCK_DGRAM = 2, ETHERTYPE_IP = 0x0800, UDP = 17, SERVER = 67, CLIENT = 68 };
enum { DISCOVER = 1, OFFER = 2, REQUEST = 3, ACK = 5 };
enum { MASK = 1, ROUTER = 3, DNS = 6, DOMAIN = 15, MTU = 26, ADDRESS = 50, TYPE = 53, SERVER_ID = 54, WISHES = 55, END = 255 };
enum { IP = 20, HEADERS = IP + 8, OPTIONS = 240, COOKIE = 0x63538263 /* 99, 130, 83, 99 */, TRIES = 6, FIRST_MS = 250 };
enum { SIOCADDRT = 0x890b, SIOCGIFFLAGS = 0x8913, SIOCSIFFLAGS = 0x8914, SIOCSIFADDR = 0x8916, SIOCSIFNETMASK = 0x891c,
       SIOCSIFMTU = 0x8922, SIOCGIFHWADDR = 0x8927, SIOCGIFINDEX = 0x8933 };

struct address { uint16_t family, port; uint32_t address; uint8_t zero[8]; };
struct interface_request {
    char name[16];
    union { short flags; int number; struct address address; uint8_t hardware[16]; uint8_t room[24]; } of;
};
struct link_address { uint16_t family, protocol; int index; uint16_t kind; uint8_t packet, length, address[8]; };
struct route {
    unsigned long padding;
    struct address to, gateway, mask;
    unsigned short flags;
    short padding2;
    unsigned long padding3[2];
    short metric;
    char *device;
    unsigned long mtu, window;
    unsigned short irtt;
};
/* What a server has said; addresses as they stand in packets. */
struct lease { uint32_t address, mask, router, server, dns[3]; unsigned mtu, type; char domain[256]; };

static uint16_t swap(uint16_t value) { return (uint16_t)(value << 8 | value >> 8); }
static uint16_t sum(const uint8_t *data, size_t n)
{
    uint32_t total = 0;
    for (size_t i = 0; i + 1 < n; i += 2) total += (uint32_t)(data[i] << 8 | data[i + 1]);
    while (total >> 16) total = (total & 0xffff) + (total >> 16);
    return swap((uint16_t)~total);
}

/* The whole IP packet of a message. Its length. */
static size_t make(uint8_t *packet, int type, const uint8_t *hardware, uint32_t transaction, const struct lease *lease)
{
    static const uint8_t head[] = {1, 1, 6, 0};
    uint8_t *message = packet + HEADERS, *at = message + OPTIONS;
    memset(packet, 0, HEADERS + 300);
    memcpy(message, head, 4);
    memcpy(message + 4, &transaction, 4);
    message[10] = 0x80; /* the answer as a broadcast: we have no address to be reached by */
    memcpy(message + 28, hardware, 6);
    uint32_t cookie = COOKIE;
    memcpy(message + 236, &cookie, 4);
    *at++ = TYPE, *at++ = 1, *at++ = (uint8_t)type;
    if (type == REQUEST) {
        *at++ = ADDRESS, *at++ = 4, memcpy(at, &lease->address, 4), at += 4;
        *at++ = SERVER_ID, *at++ = 4, memcpy(at, &lease->server, 4), at += 4;
    }
    static const uint8_t wishes[] = {WISHES, 5, MASK, ROUTER, DNS, DOMAIN, MTU, END};
    memcpy(at, wishes, sizeof wishes);
    const size_t length = HEADERS + 300; /* BOOTP's least (RFC 1542, 2.1) */
    uint16_t total = swap((uint16_t)length), udp = swap((uint16_t)(length - IP)), ports[2] = {swap(CLIENT), swap(SERVER)};
    packet[0] = 0x45, packet[8] = 64, packet[9] = UDP;
    memcpy(packet + 2, &total, 2);
    memset(packet + 16, 255, 4);
    uint16_t checksum = sum(packet, IP);
    memcpy(packet + 10, &checksum, 2);
    memcpy(packet + IP, ports, 4);
    memcpy(packet + IP + 4, &udp, 2); /* without a checksum, as UDP over IPv4 may be */
    return length;
}

/* Is it an answer to us? Then what it says goes to *lease. */
static int read_answer(const uint8_t *packet, size_t length, const uint8_t *hardware, uint32_t transaction, struct lease *lease)
{
    uint32_t word;
    size_t ip = (size_t)(packet[0] & 15) * 4;
    if (length < IP || packet[0] >> 4 != 4 || ip < IP || packet[9] != UDP || length < ip + 8 + OPTIONS) return 0;
    const uint8_t *udp = packet + ip, *message = udp + 8, *end = packet + length;
    if ((udp[2] << 8 | udp[3]) != CLIENT || message[0] != 2 || memcmp(message + 28, hardware, 6)) return 0;
    memcpy(&word, message + 4, 4);
    if (word != transaction) return 0;
    memcpy(&word, message + 236, 4);
    if (word != COOKIE) return 0;
    memset(lease, 0, sizeof *lease);
    memcpy(&lease->address, message + 16, 4);
    for (const uint8_t *p = message + OPTIONS; p < end && *p != END;) {
        if (!*p) { p++; continue; }
        if (end - p < 2 || end - p < 2 + p[1]) return 0;
        const uint8_t *value = p + 2;
        unsigned size = p[1];
        switch (*p) {
        case MASK: if (size == 4) memcpy(&lease->mask, value, 4); break;
        case ROUTER: if (size >= 4) memcpy(&lease->router, value, 4); break;
        case SERVER_ID: if (size == 4) memcpy(&lease->server, value, 4); break;
        case DNS: memcpy(lease->dns, value, size < 12 ? size & ~3u : 12); break;
        case MTU: if (size == 2) lease->mtu = (unsigned)(value[0] << 8 | value[1]); break;
        case TYPE: if (size == 1) lease->type = value[0]; break;
        case DOMAIN:
            for (unsigned i = 0; i < size; i++) {
                uint8_t c = value[i], letter = c | 32;
                int plain = (letter >= 'a' && letter <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '-';
                lease->domain[i] = (char)(plain ? c : 0);
            }
            break;
        }
        p += 2 + size;
    }
    return 1;
}

/* Send a message, over and over, until there is an answer of type `wanted`. 0: there was none. */
static int ask(int link, int index, int type, unsigned wanted, const uint8_t *hardware, struct lease *lease)
{
    static uint32_t transaction = 0;
    static uint8_t packet[2048];
    struct link_address everybody = {AF_PACKET, swap(ETHERTYPE_IP), index, 0, 0, 6, {255, 255, 255, 255, 255, 255}};
    if (!transaction) SYS(__NR_getrandom, &transaction, sizeof transaction, 0);
    long wait = FIRST_MS;
    for (int i = 0; i < TRIES; i++, wait *= 2) {
        size_t length = make(packet, type, hardware, transaction, lease);
        SYS(__NR_sendto, link, packet, length, 0, &everybody, sizeof everybody);
        for (long end = now_ms() + wait, left; (left = end - now_ms()) > 0;) {
            struct pollfd ready = {link, POLLIN, 0};
            struct lease answer;
            if (SYS(__NR_poll, &ready, 1, left) <= 0) continue;
            long got = SYS(__NR_recvfrom, link, packet, sizeof packet, 0x40 /* MSG_DONTWAIT */, 0, 0);
            if (got <= 0 || !read_answer(packet, (size_t)got, hardware, transaction, &answer)) continue;
            if (answer.type != wanted || !answer.address) continue;
            *lease = answer;
            return 1;
        }
    }
    return 0;
}

static void set_address(int fd, struct interface_request *request, unsigned long what, uint32_t address)
{
    request->of.address = (struct address){AF_INET, 0, address, {0}};
    SYS(__NR_ioctl, fd, what, request);
}

static void add_route(int fd, char *device, uint32_t to, uint32_t mask, uint32_t gateway)
{
    struct route route = {.to = {AF_INET, 0, to, {0}}, .gateway = {AF_INET, 0, gateway, {0}}, .mask = {AF_INET, 0, mask, {0}},
                          .flags = (unsigned short)(1 /* RTF_UP */ | (gateway ? 2 : 0) | (mask + 1 ? 0 : 4)), .device = device};
    SYS(__NR_ioctl, fd, SIOCADDRT, &route);
}

static void apply(int fd, struct interface_request *request, const struct lease *lease)
{
    if (lease->mtu >= 576) {
        request->of.number = (int)lease->mtu;
        SYS(__NR_ioctl, fd, SIOCSIFMTU, request);
    }
    uint32_t mask = lease->mask ? lease->mask : 0xffffff;
    set_address(fd, request, SIOCSIFADDR, lease->address);
    set_address(fd, request, SIOCSIFNETMASK, mask);
    if (!lease->router) return;
    if ((lease->router ^ lease->address) & mask) add_route(fd, request->name, lease->router, ~0u, 0);
    add_route(fd, request->name, 0, 0, lease->router);
}

static char *put_address(char *to, uint32_t address)
{
    for (int i = 0; i < 4; i++, address >>= 8) {
        unsigned byte = address & 255;
        if (byte > 99) *to++ = (char)('0' + byte / 100);
        if (byte > 9) *to++ = (char)('0' + byte / 10 % 10);
        *to++ = (char)('0' + byte % 10);
        *to++ = '.';
    }
    to[-1] = 0;
    return to - 1;
}
static char *put(char *to, const char *text)
{
    while (*text) *to++ = *text++;
    return to;
}

int configure_network(const char *device)
{
    struct interface_request request = {{0}, {0}};
    struct lease lease = {0};
    uint8_t hardware[6];
    if (text_length(device) >= sizeof request.name) return 0;
    memcpy(request.name, device, text_length(device));
    long fd = SYS(__NR_socket, AF_INET, SOCK_DGRAM | O_CLOEXEC, 0);
    long link = SYS(__NR_socket, AF_PACKET, SOCK_DGRAM | O_CLOEXEC, swap(ETHERTYPE_IP));
    int done = 0;
    if (fd < 0 || link < 0 || SYS(__NR_ioctl, fd, SIOCGIFHWADDR, &request) < 0) goto out;
    memcpy(hardware, request.of.hardware + 2, 6);
    if (SYS(__NR_ioctl, fd, SIOCGIFINDEX, &request) < 0) goto out;
    int index = request.of.number;
    if (SYS(__NR_ioctl, fd, SIOCGIFFLAGS, &request) < 0) goto out;
    request.of.flags |= 1 /* IFF_UP */ | 64 /* IFF_RUNNING */;
    SYS(__NR_ioctl, fd, SIOCSIFFLAGS, &request);
    struct link_address ours = {AF_PACKET, swap(ETHERTYPE_IP), index, 0, 0, 6, {0}};
    if (SYS(__NR_bind, link, &ours, sizeof ours) < 0) goto out;
    if (!ask((int)link, index, DISCOVER, OFFER, hardware, &lease)) goto out;
    if (!ask((int)link, index, REQUEST, ACK, hardware, &lease)) goto out;
    apply((int)fd, &request, &lease);
    char text[400], *to = text;
    if (lease.domain[0]) to = put(put(put(to, "search "), lease.domain), "\n");
    for (int i = 0; i < 3; i++)
        if (lease.dns[i]) to = put(put_address(put(to, "nameserver "), lease.dns[i]), "\n");
    *to = 0;
    if (to != text) replace_file("/etc/resolv.conf", text);
    done = 1;
out:
    if (fd >= 0) SYS(__NR_close, fd);
    if (link >= 0) SYS(__NR_close, link);
    return done;
}
