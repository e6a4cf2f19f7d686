/* Finding and mounting the root file system that the kernel's command line names.
 *
 * root=/dev/NAME, /dev/disk/by-{uuid,label,partuuid,partlabel}/…, UUID=, LABEL=, PARTUUID= (also with /PARTNROFF=n),
 * PARTLABEL=, MAJOR:MINOR or the number of a device in hexadecimal. rootfstype= names file systems to try, with commas;
 * without it the superblock tells. rootflags= are mount options. rootdelay=SECONDS waits first, rootwait without end,
 * rootwait=SECONDS so long; without either a device has ROOT_SECONDS to come. ro and rw: the later of them; ro without
 * either, as in the kernel. With rootfstype=virtiofs root= is the tag of a directory of the host.
 *
 * loopvisor.share.TAG=/PATH: the host's directory of that tag is mounted there, below the root. */
#include "sys.h"
#include "volumes.h"

enum { MAX_DEVICES = 64, ROOT_SECONDS = 10, POLL_MS = 20, SCAN_MS = 100, TELL_MS = 2000, MAX_SECONDS = 1 << 20 };
enum { EIO = 5, ENXIO = 6, ENOTBLK = 15, EINVAL = 22, EROFS = 30 };
enum { BLKSSZGET = 0x1268 };

struct device {
    struct volume volume;
    char name[32], disk[32];
    uint64_t sectors;
    unsigned major, minor, block;
    int number; /* of a partition; 0: a whole disk */
};
static struct device devices[MAX_DEVICES];
static int device_count;

static char *append_within(char *to, const char *text, const char *end)
{
    while (*text && to < end - 1) *to++ = *text++;
    *to = 0;
    return to;
}

/* The file `name` of a block device in sysfs, as text. */
static long attribute(const char *device, const char *name, char *to, size_t size)
{
    char path[128], *end = path + sizeof path;
    char *folder = append_within(append_within(path, "/sys/class/block/", end), device, end);
    append_within(append_within(folder, "/", end), name, end);
    return read_file(path, to, size);
}

static int read_device(void *context, uint64_t at, void *to, size_t n)
{
    return SYS(__NR_pread64, *(int *)context, to, n, at) == (long)n;
}
static int open_device(const char *name)
{
    char path[40];
    append_within(append_within(path, "/dev/", path + sizeof path), name, path + sizeof path);
    return (int)open_file(path, O_RDONLY | O_CLOEXEC);
}

/* The disk that a partition is of: the last but one component of what its entry in sysfs links to. */
static void find_disk(struct device *device)
{
    char path[64], target[512];
    append_within(append_within(path, "/sys/class/block/", path + sizeof path), device->name, path + sizeof path);
    long n = SYS(__NR_readlink, path, target, sizeof target);
    if (n <= 0 || n >= (long)sizeof target) return;
    long end = n;
    while (end > 0 && target[end - 1] != '/') end--;
    long start = --end;
    while (start > 0 && target[start - 1] != '/') start--;
    if (end <= 0 || end - start >= (long)sizeof device->disk) return;
    memcpy(device->disk, target + start, (size_t)(end - start));
    device->disk[end - start] = 0;
}

static void look_at(const char *name)
{
    char text[64];
    const char *after;
    struct device *device = &devices[device_count];
    if (device_count == MAX_DEVICES || text_length(name) >= sizeof device->name) return;
    *device = (struct device){.block = 512};
    append_within(device->name, name, device->name + sizeof device->name);
    long length = attribute(name, "size", text, sizeof text);
    if (length <= 0) return;
    device->sectors = (uint64_t)parse_number(text, text + length, NULL);
    if ((int64_t)device->sectors <= 0) return; /* a loop or RAM disk without anything in it */
    length = attribute(name, "dev", text, sizeof text);
    if (length > 0) {
        device->major = (unsigned)parse_number(text, text + length, &after);
        device->minor = (unsigned)parse_number(after + 1, text + length, NULL);
    }
    length = attribute(name, "partition", text, sizeof text);
    if (length > 0) device->number = (int)parse_number(text, text + length, NULL);
    int fd = open_device(name);
    if (fd >= 0) {
        identify(&device->volume, read_device, &fd);
        SYS(__NR_close, fd);
    }
    if (device->number > 0) {
        find_disk(device);
        char sectors[32];
        length = attribute(device->disk, "size", sectors, sizeof sectors);
        long size = length > 0 ? parse_number(sectors, sectors + length, NULL) : -1;
        fd = open_device(device->disk);
        if (fd >= 0 && size > 0) {
            int block = 512;
            SYS(__NR_ioctl, fd, BLKSSZGET, &block);
            identify_partition(&device->volume, device->number, read_device, &fd, (uint64_t)size * 512, (unsigned)block);
        }
        if (fd >= 0) SYS(__NR_close, fd);
    }
    device_count++;
}

static void look_unless_hidden(const char *name)
{
    if (name[0] != '.') look_at(name);
}

static void scan(void)
{
    device_count = 0;
    each_entry("/sys/class/block", look_unless_hidden);
}

/* A label in /dev/disk/by-label is written as udev does: \x20 for what is no plain character. */
static void undo_escapes(char *text)
{
    char *to = text;
    for (const char *p = text; *p;) {
        unsigned value = 0, digits = 0;
        if (p[0] == '\\' && p[1] == 'x')
            for (const char *q = p + 2; digits < 2; q++, digits++) {
                char c = *q;
                if (c >= '0' && c <= '9') value = value * 16 + (unsigned)(c - '0');
                else if ((c | 32) >= 'a' && (c | 32) <= 'f') value = value * 16 + (unsigned)((c | 32) - 'a') + 10;
                else break;
            }
        if (digits == 2 && value) *to++ = (char)value, p += 4;
        else *to++ = *p++;
    }
    *to = 0;
}

static int is_partition(const struct device *device, const char *disk, int number)
{
    return device->number == number && text_equal(device->disk, disk);
}

/* The device that root= means, from the last scan; NULL if there is none. */
static struct device *find(const char *root)
{
    static const char *const ways[][2] = {
        {"UUID=", "/dev/disk/by-uuid/"}, {"LABEL=", "/dev/disk/by-label/"},
        {"PARTUUID=", "/dev/disk/by-partuuid/"}, {"PARTLABEL=", "/dev/disk/by-partlabel/"},
    };
    char wanted[300];
    const char *value = NULL, *after;
    int way = 0;
    for (; way < 4 && !value; way++) {
        value = text_after(root, ways[way][0]);
        if (!value) value = text_after(root, ways[way][1]);
    }
    way--;
    if (!value) {
        const char *end = root + text_length(root), *name = text_after(root, "/dev/");
        long major = parse_number(root, end, &after), minor = -1, hexadecimal = 0;
        if (major >= 0 && *after == ':') minor = parse_number(after + 1, end, &after);
        int numbers = minor >= 0 && after == end;
        const char *p = root;
        for (; *p && !numbers; p++) {
            char c = (char)(*p | 32);
            if (c >= '0' && c <= '9') hexadecimal = hexadecimal * 16 + (c - '0');
            else if (c >= 'a' && c <= 'f') hexadecimal = hexadecimal * 16 + (c - 'a') + 10;
            else break;
        }
        if (!numbers && p == end && end - root <= 8) {
            /* the kernel's new_decode_dev(): twelve bits of major between eight and twelve of minor */
            numbers = 1, major = hexadecimal >> 8 & 0xfff, minor = (hexadecimal & 0xff) | (hexadecimal >> 12 & 0xfff00);
        }
        for (int i = 0; i < device_count; i++) {
            if (text_equal(devices[i].name, name ? name : root)) return &devices[i];
            if (numbers && devices[i].major == (unsigned)major && devices[i].minor == (unsigned)minor) return &devices[i];
        }
        return NULL;
    }
    append_within(wanted, value, wanted + sizeof wanted);
    if (root[0] == '/') undo_escapes(wanted);
    int offset = 0;
    for (char *p = wanted; way == 2 && *p; p++) {
        const char *number = text_after(p, "/PARTNROFF=");
        if (!number) continue;
        int sign = *number == '-' ? -1 : 1;
        number += sign < 0;
        offset = sign * (int)parse_number(number, number + text_length(number), NULL);
        *p = 0;
    }
    for (int i = 0; i < device_count; i++) {
        const struct volume *volume = &devices[i].volume;
        const char *has[] = {volume->uuid, volume->label, volume->part_uuid, volume->part_label};
        if (!*has[way] || !(way & 1 ? text_equal(has[way], wanted) : same_text(has[way], wanted))) continue;
        if (!offset) return &devices[i];
        for (int j = 0; j < device_count; j++)
            if (is_partition(&devices[j], devices[i].disk, devices[i].number + offset)) return &devices[j];
    }
    return NULL;
}

static void say_number(uint64_t value)
{
    char digits[24];
    append_number(digits, value);
    say(digits);
}
static void say_field(const char *name, const char *value)
{
    if (!*value) return;
    say(" ");
    say(name);
    say("=\"");
    say(value);
    say("\"");
}

/* What there is, a line for each device. */
static void say_devices(void)
{
    if (!device_count) say("init: there is no block device at all: no disk, or no driver for it in this initramfs\n");
    else say("init: there is:\n");
    for (int i = 0; i < device_count; i++) {
        const struct device *device = &devices[i];
        say("init:   /dev/");
        say(device->name);
        say(" ");
        say_number(device->sectors / 2);
        say("K");
        say_field("TYPE", device->volume.type);
        say_field("UUID", device->volume.uuid);
        say_field("LABEL", device->volume.label);
        say_field("PARTUUID", device->volume.part_uuid);
        say_field("PARTLABEL", device->volume.part_label);
        say("\n");
    }
}

static const char *reason(long error)
{
    switch (-error) {
    case ENOENT: return "no such device";
    case ENXIO: return "no such device";
    case EIO: return "input/output error";
    case ENODEV: return "the kernel has no such file system; its module belongs into the image's recipe";
    case ENOTBLK: return "no block device";
    case EINVAL: return "no such file system there, or an option of rootflags that it does not take";
    case EACCES: return "permission denied";
    default: return "it does not work";
    }
}

/* Options that are flags of mount(2), as mount(8) has them; the rest is the file system's own, and stays in `options`. */
static unsigned long take_flags(char *options)
{
    static const struct { const char *name; unsigned set, clear; } known[] = {
        {"defaults", 0, 0}, {"ro", 1, 0}, {"rw", 0, 1}, {"nosuid", 2, 0}, {"suid", 0, 2}, {"nodev", 4, 0}, {"dev", 0, 4},
        {"noexec", 8, 0}, {"exec", 0, 8}, {"sync", 16, 0}, {"async", 0, 16}, {"dirsync", 128, 0}, {"noatime", 1024, 0},
        {"atime", 0, 1024}, {"nodiratime", 2048, 0}, {"diratime", 0, 2048}, {"relatime", 1 << 21, 0},
        {"norelatime", 0, 1 << 21}, {"strictatime", 1 << 24, 0}, {"lazytime", 1 << 25, 0},
    };
    unsigned long flags = 0;
    char *to = options;
    for (char *p = options; *p;) {
        char *word = p;
        while (*p && *p != ',') p++;
        size_t n = (size_t)(p - word), i = 0;
        if (*p) p++;
        for (; i < sizeof known / sizeof *known; i++)
            if (text_length(known[i].name) == n && !memcmp(known[i].name, word, n)) break;
        if (i < sizeof known / sizeof *known) {
            flags = (flags & ~(unsigned long)known[i].clear) | known[i].set;
            continue;
        }
        if (to != options) *to++ = ',';
        memcpy(to, word, n);
        to += n;
    }
    *to = 0;
    return flags;
}

static long mount_as(const char *path, const char *type, unsigned long flags, const char *options)
{
    load_file_system(type);
    long error = SYS(__NR_mount, path, "/newroot", type, flags, options);
    if (error == -EROFS || (error == -EACCES && !(flags & MS_RDONLY)))
        error = SYS(__NR_mount, path, "/newroot", type, flags | MS_RDONLY, options);
    return error;
}

/* Try the types of rootfstype, or what the superblock says, or what the kernel knows. */
static long mount_device(const struct device *device, unsigned long flags, const char *options)
{
    char path[40], types[1024], *end = path + sizeof path;
    long error = -EINVAL;
    append_within(append_within(path, "/dev/", end), device->name, end);
    if (!argument("rootfstype", types, sizeof types)) {
        if (device->volume.type[0]) return mount_as(path, device->volume.type, flags, options);
        long length = read_file("/proc/filesystems", types, sizeof types);
        if (length <= 0) return error;
        /* "nodev\tNAME" is one without a device */
        char *to = types;
        for (char *p = types; *p;) {
            int usable = *p == '\t';
            while (*p && *p <= ' ' && *p != '\n') p++;
            while (*p && *p != '\n') {
                if (usable) *to++ = *p;
                p++;
            }
            if (usable) *to++ = ',';
            if (*p) p++;
        }
        *to = 0;
    }
    for (char *p = types; *p;) {
        char *type = p;
        while (*p && *p != ',') p++;
        if (*p) *p++ = 0;
        if (!*type) continue;
        error = mount_as(path, type, flags, options);
        if (error != -EINVAL && error != -ENODEV) break;
    }
    return error;
}

/* A number of seconds; -1 if the parameter is not there, 0 if it is no number. */
static long seconds(const char *name)
{
    char text[16];
    if (!argument(name, text, sizeof text)) return -1;
    long value = parse_number(text, text + text_length(text), NULL);
    return value < 0 ? 0 : value > MAX_SECONDS ? MAX_SECONDS : value;
}

/* A directory of the host; its device may still be coming. */
static long mount_share(const char *tag, const char *path, unsigned long flags, const char *options, long wait)
{
    long error, begin = now_ms();
    load_file_system("virtiofs");
    for (;; pause_ms(POLL_MS)) {
        error = SYS(__NR_mount, tag, path, "virtiofs", flags, options);
        if (error != -EINVAL || (wait && now_ms() - begin > wait * 1000)) return error;
    }
}

/* Make the directories of a path in which slashes end at `from`. */
static void make_path(char *path, char *from)
{
    for (char *p = from; *p; p++) {
        if (*p != '/' || p == from) continue;
        *p = 0;
        SYS(__NR_mkdir, path, 0755);
        *p = '/';
    }
    SYS(__NR_mkdir, path, 0755);
}

void mount_shares(const char *root)
{
    char name[64], place[256], path[300], *end = path + sizeof path;
    for (int at = 0; share_argument(at, name, sizeof name, place, sizeof place); at++) {
        char *below = append_within(path, root, end);
        append_within(below, place, end);
        make_path(path, below);
        long error = mount_share(name, path, 0, "", 2);
        if (error >= 0) continue;
        say("init: cannot mount the share ");
        say(name);
        say(" at ");
        say(place);
        say(error == -ENOENT ? ": there is no such directory, and it cannot be made" :
            error == -EINVAL ? ": the machine has no share of that name" :
            error == -ENODEV ? ": the kernel has no virtiofs; its module belongs into the image's recipe" : "");
        say("\n");
    }
}

int mount_root(const char *root)
{
    static const char *const modes[] = {"ro", "rw", NULL}, *const waits[] = {"rootwait", NULL};
    char options[1024] = "";
    argument("rootflags", options, sizeof options);
    unsigned long flags = last_of(modes, 0) ? 0 : MS_RDONLY;
    unsigned long more = take_flags(options);
    long delay = seconds("rootdelay"), wait = seconds("rootwait"), begin, now;
    if (delay > 0) pause_ms(delay * 1000);
    if (wait < 0) wait = last_of(waits, -1) == 0 ? 0 : ROOT_SECONDS;
    int told = 0;
    struct device *device;
    char type[16];
    SYS(__NR_mkdir, "/newroot", 0755);
    if (argument("rootfstype", type, sizeof type) && text_equal(type, "virtiofs")) {
        long refused = mount_share(root, "/newroot", flags | more, options, wait);
        if (refused >= 0) return 1;
        say("init: cannot mount the root file system: the share ");
        say(root);
        say(refused == -EINVAL ? ": the machine has no share of that name\n" :
            refused == -ENODEV ? ": the kernel has no virtiofs; its module belongs into the image's recipe\n" :
            ": it does not work\n");
        return 0;
    }
    for (begin = now_ms();; pause_ms(now - begin < SCAN_MS ? POLL_MS : SCAN_MS)) {
        scan();
        device = find(root);
        now = now_ms();
        if (device || (wait && now - begin > wait * 1000)) break;
        if (!told && now - begin > TELL_MS) {
            told = 1;
            say("init: waiting for root=");
            say(root);
            say("\n");
        }
    }
    long error = device ? mount_device(device, flags | more, options) : -ENOENT;
    if (error >= 0) return 1;
    say("init: cannot mount the root file system root=");
    say(root);
    say(": ");
    say(reason(error));
    say("\n");
    say_devices();
    return 0;
}
