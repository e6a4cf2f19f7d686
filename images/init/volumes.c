/* Superblocks and partition tables. Sources: Linux Documentation/filesystems (ext4/super.rst, erofs.rst, squashfs.rst),
 * "XFS Algorithms & Data Structures" (xfs_sb), the btrfs on-disk format (btrfs.readthedocs.io); UEFI 2.10, 5.2.1 (MBR) and
 * 5.3 (GPT). PARTUUID of an MBR is the kernel's: disk signature and partition number, both hexadecimal (block/partitions). */
#include "volumes.h"

#include "sys.h"

enum { MAX_ENTRY = 4096, MAX_TABLE = 1 << 20, MBR_SIZE = 512, GPT_NAME_CHARACTERS = 36 };

static uint32_t le32(const uint8_t *p) { return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24; }
static uint64_t le64(const uint8_t *p) { return le32(p) | (uint64_t)le32(p + 4) << 32; }

static char *put_hex(char *to, uint64_t value, int digits)
{
    for (int i = digits - 1; i >= 0; i--) *to++ = "0123456789abcdef"[value >> 4 * i & 15];
    *to = 0;
    return to;
}

/* RFC 4122's text of 16 bytes. With `mixed` the first three fields are little-endian, as EFI has them. */
static void put_uuid(char *to, const uint8_t *bytes, int mixed)
{
    static const uint8_t as_efi[16] = {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};
    int any = 0;
    for (int i = 0; i < 16; i++) any |= bytes[i];
    *to = 0;
    for (int i = 0; any && i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) *to++ = '-';
        to = put_hex(to, bytes[mixed ? as_efi[i] : i], 2);
    }
}

static void put_label(char *to, const uint8_t *from, size_t n)
{
    size_t length = 0;
    for (; length < n && from[length]; length++) to[length] = (char)(from[length] < ' ' || from[length] == 127 ? '?' : from[length]);
    to[length] = 0;
}

static void put_type(struct volume *volume, const char *type) { memcpy(volume->type, type, text_length(type) + 1); }

int same_text(const char *a, const char *b)
{
    for (;; a++, b++) {
        char left = *a >= 'A' && *a <= 'Z' ? (char)(*a + 32) : *a, right = *b >= 'A' && *b <= 'Z' ? (char)(*b + 32) : *b;
        if (left != right) return 0;
        if (!left) return 1;
    }
}

/* One kind of superblock: `magic` at byte `magic_at` of the device; where the superblock has UUID and label (length 0: it
 * has none), counted from `base`. */
static const struct kind {
    const char *type, *magic;
    uint32_t magic_length, magic_at, base, uuid_at, label_at, label_length;
} kinds[] = {
    {"ext4", "\x53\xef", 2, 1024 + 0x38, 1024, 0x68, 0x78, 16},
    {"erofs", "\xe2\xe1\xf5\xe0", 4, 1024, 1024, 48, 64, 16},
    {"xfs", "XFSB", 4, 0, 0, 32, 108, 12},
    {"squashfs", "hsqs", 4, 0, 0, 0, 0, 0},
    {"btrfs", "_BHRfS_M", 8, 0x10000 + 0x40, 0x10000, 0x20, 0x12b, 256},
};

void identify(struct volume *volume, read_at *read, void *context)
{
    uint8_t bytes[256];
    volume->type[0] = volume->uuid[0] = volume->label[0] = 0;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const struct kind *kind = &kinds[i];
        if (!read(context, kind->magic_at, bytes, kind->magic_length) || memcmp(bytes, kind->magic, kind->magic_length))
            continue;
        put_type(volume, kind->type);
        if (!kind->label_length) return;
        if (read(context, kind->base + kind->uuid_at, bytes, 16)) put_uuid(volume->uuid, bytes, 0);
        if (read(context, kind->base + kind->label_at, bytes, kind->label_length))
            put_label(volume->label, bytes, kind->label_length);
        return;
    }
}

/* UEFI 2.10, 5.3.2: CRC-32 (ISO 3309), over `n` more bytes; begins and ends with all bits inverted. */
static uint32_t crc32(uint32_t crc, const uint8_t *p, size_t n)
{
    static const uint32_t by_nibble[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
        0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };
    for (; n; n--, p++) {
        crc = by_nibble[(crc ^ *p) & 15] ^ crc >> 4;
        crc = by_nibble[(crc ^ *p >> 4) & 15] ^ crc >> 4;
    }
    return crc;
}

/* UTF-16LE to UTF-8; what is no character of the first plane, or no printable one, becomes "?". */
static void put_utf16(char *to, const uint8_t *from, int characters)
{
    for (int i = 0; i < characters; i++, from += 2) {
        unsigned c = from[0] | (unsigned)from[1] << 8;
        if (!c) break;
        if (c < ' ' || c == 127 || (c >= 0xd800 && c < 0xe000)) c = '?';
        if (c < 0x80) *to++ = (char)c;
        else if (c < 0x800) *to++ = (char)(0xc0 | c >> 6), *to++ = (char)(0x80 | (c & 63));
        else *to++ = (char)(0xe0 | c >> 12), *to++ = (char)(0x80 | (c >> 6 & 63)), *to++ = (char)(0x80 | (c & 63));
    }
    *to = 0;
}

/* The entry of partition `number` by the GPT header in logical block `at`; 0 if that header or its table is not valid. */
static int read_gpt(struct volume *volume, int number, read_at *read, void *context, uint64_t bytes, unsigned block,
                    uint64_t at)
{
    uint8_t header[512], entry[128], zero[4] = {0}, part[512];
    if (at >= bytes / block || !read(context, at * block, header, sizeof header)) return 0;
    uint32_t header_size = le32(header + 12), count = le32(header + 80), size = le32(header + 84);
    uint64_t table = le64(header + 72);
    /* 5.3.2: HeaderSize "MUST be greater than or equal to 92 and must be less than or equal to the logical block size";
     * SizeOfPartitionEntry "128 x 2 n". */
    if (memcmp(header, "EFI PART", 8) || header_size < 92 || header_size > sizeof header || le64(header + 24) != at ||
        size < 128 || size > MAX_ENTRY || size & (size - 1) || !count || count > MAX_TABLE / size ||
        table >= bytes / block || (uint32_t)number > count)
        return 0;
    uint32_t crc = crc32(crc32(crc32(~0u, header, 16), zero, 4), header + 20, header_size - 20);
    if (~crc != le32(header + 16)) return 0;
    crc = ~0u;
    for (uint32_t left = count * size, from = 0; left;) {
        uint32_t n = left < sizeof part ? left : (uint32_t)sizeof part;
        if (!read(context, table * block + from, part, n)) return 0;
        crc = crc32(crc, part, n);
        from += n;
        left -= n;
    }
    if (~crc != le32(header + 88)) return 0;
    if (!read(context, table * block + (uint64_t)(number - 1) * size, entry, sizeof entry)) return 0;
    put_uuid(volume->part_uuid, entry + 16, 1);
    put_utf16(volume->part_label, entry + 56, GPT_NAME_CHARACTERS);
    return 1;
}

void identify_partition(struct volume *volume, int number, read_at *read, void *context, uint64_t bytes, unsigned block)
{
    uint8_t mbr[MBR_SIZE];
    volume->part_uuid[0] = volume->part_label[0] = 0;
    if (number < 1 || block < 512 || block > 65536 || !read(context, 0, mbr, sizeof mbr)) return;
    if (mbr[510] != 0x55 || mbr[511] != 0xaa) return;
    int protective = 0;
    for (int i = 0; i < 4; i++) protective |= mbr[446 + 16 * i + 4] == 0xee; /* 5.2.3 */
    if (protective) {
        /* 5.3.2: the backup header is in the last logical block. */
        if (!read_gpt(volume, number, read, context, bytes, block, 1) && bytes / block > 1)
            read_gpt(volume, number, read, context, bytes, block, bytes / block - 1);
        return;
    }
    char *end = put_hex(volume->part_uuid, le32(mbr + 440), 8);
    *end++ = '-';
    put_hex(end, (unsigned)number, number > 0xff ? 4 : 2);
}
