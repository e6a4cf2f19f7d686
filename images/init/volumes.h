/* What a block device holds, told from its first bytes. Knows no system call, so that tests run it on files. Everything
 * that is read comes from a disk that anybody may have written: sizes and offsets are bounded, text is made printable. */
#ifndef GUEST_VOLUMES_H
#define GUEST_VOLUMES_H

#include <stddef.h>
#include <stdint.h>

/* Read `n` bytes at byte `at` of the device into `to`; 1 if all of them came. */
typedef int read_at(void *context, uint64_t at, void *to, size_t n);

struct volume {
    char type[16]; /* as mount(2) names it; empty: not known */
    char uuid[37], label[257];
    char part_uuid[37], part_label[109];
};

/* The file system on a device: type, uuid, label. */
void identify(struct volume *volume, read_at *read, void *context);
/* PARTUUID and PARTLABEL of partition `number` (from 1) of a disk of `bytes` bytes, whose table is read; `block` is the
 * size of its logical blocks. */
void identify_partition(struct volume *volume, int number, read_at *read, void *context, uint64_t bytes, unsigned block);
/* Equal, upper and lower case alike. */
int same_text(const char *a, const char *b);
#endif
