/* A machine that is a copy of another becomes one of its own: it gets another state of its random numbers, another host
 * name, machine id, boot id and network addresses, and the right time. */
#include "sys.h"

enum { CLOCK_REALTIME = 0, ENTROPY = 64, ADDRESS = 6, INTERFACES = 64, AF_INET = 2, SOCK_DGRAM = 2 };
enum { SIOCGIFNAME = 0x8910, SIOCSIFHWADDR = 0x8924, SIOCGIFHWADDR = 0x8927 };
enum { O_CREAT = 0100, O_TRUNC = 01000, MS_BIND = 4096, UUID_LINE = 37 };
enum { RNDADDENTROPY = 0x40085203, RNDRESEEDCRNG = 0x5207 };
struct request {
    char name[16];
    union {
        int index;
        struct { uint16_t family; uint8_t data[14]; } address;
        uint8_t room[24];
    } of;
};

static void set_time(const uint8_t *ns)
{
    uint64_t now;
    memcpy(&now, ns, sizeof now);
    long time[2] = {(long)(now / 1000000000), (long)(now % 1000000000)};
    SYS(__NR_clock_settime, CLOCK_REALTIME, time);
}

static void stir_random_numbers(const uint8_t *entropy)
{
    struct { int bits, size; uint8_t data[ENTROPY]; } more = {8 * ENTROPY, ENTROPY, {0}};
    memcpy(more.data, entropy, ENTROPY);
    long random = open_file("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (random < 0) return;
    SYS(__NR_ioctl, random, RNDADDENTROPY, &more);
    SYS(__NR_ioctl, random, RNDRESEEDCRNG, 0);
    SYS(__NR_close, random);
}

/* Give a file that is there another line. */
static void rewrite(const char *path, const uint8_t *text, size_t length)
{
    long file = open_file(path, O_WRONLY | O_CLOEXEC);
    if (file < 0) return;
    if (SYS(__NR_write, file, text, length) == (long)length && SYS(__NR_write, file, "\n", 1) == 1)
        SYS(__NR_ftruncate, file, length + 1);
    SYS(__NR_close, file);
}

/* The kernel has one boot id for as long as it runs, and the original has it, too: another one is mounted over it. */
static void change_boot_id(void)
{
    static const char *const places[] = {"/run/.boot_id", "/dev/.boot_id"};
    char line[UUID_LINE];
    long uuid = open_file("/proc/sys/kernel/random/uuid", O_RDONLY | O_CLOEXEC);
    if (uuid < 0) return;
    long got = SYS(__NR_read, uuid, line, UUID_LINE);
    SYS(__NR_close, uuid);
    for (int i = 0; got == UUID_LINE && i < 2; i++) {
        long file = SYS(__NR_open, places[i], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0444);
        if (file < 0) continue;
        long written = SYS(__NR_write, file, line, UUID_LINE), mounted = -1;
        SYS(__NR_close, file);
        if (written == UUID_LINE)
            mounted = SYS(__NR_mount, places[i], "/proc/sys/kernel/random/boot_id", 0, MS_BIND, 0);
        SYS(__NR_unlink, places[i]); /* the mount keeps it */
        if (mounted >= 0) return;
    }
}

/* The interface that has the address `old` gets the address `new`; its configuration stays. */
static void change_address(const uint8_t *old, const uint8_t *new)
{
    long any = SYS(__NR_socket, AF_INET, SOCK_DGRAM | O_CLOEXEC, 0);
    for (int index = 1; any >= 0 && index < INTERFACES; index++) {
        struct request request = {{0}, {0}};
        request.of.index = index;
        if (SYS(__NR_ioctl, any, SIOCGIFNAME, &request) < 0 || SYS(__NR_ioctl, any, SIOCGIFHWADDR, &request) < 0) continue;
        if (memcmp(request.of.address.data, old, ADDRESS)) continue;
        memcpy(request.of.address.data, new, ADDRESS);
        SYS(__NR_ioctl, any, SIOCSIFHWADDR, &request);
    }
    if (any >= 0) SYS(__NR_close, any);
}

int take_identity(const uint8_t *payload, uint32_t length)
{
    const uint8_t *p = payload + 8 + ENTROPY, *end = payload + length;
    const uint8_t *texts[2];
    size_t lengths[2];
    if (length < 8 + ENTROPY + 3) return 0;
    for (int i = 0; i < 2; i++) {
        lengths[i] = *p++;
        texts[i] = p;
        if (lengths[i] + 1 > (size_t)(end - p)) return 0;
        p += lengths[i];
    }
    unsigned addresses = *p++;
    if ((size_t)(end - p) != addresses * 2u * ADDRESS) return 0;
    set_time(payload);
    stir_random_numbers(payload + 8);
    if (lengths[0]) {
        SYS(__NR_sethostname, texts[0], lengths[0]);
        rewrite("/etc/hostname", texts[0], lengths[0]);
    }
    if (lengths[1]) { /* it runs beside the original */
        rewrite("/etc/machine-id", texts[1], lengths[1]);
        change_boot_id();
    }
    for (; addresses; addresses--, p += 2 * ADDRESS) change_address(p, p + ADDRESS);
    return 1;
}
