/* images/init/volumes.c on files: prints what it finds in each. Arguments: FILE, or FILE:NUMBER for a partition of it,
 * whose bytes from OFFSET on hold its file system. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../../images/init/volumes.h"

static int read_file_at(void *context, uint64_t at, void *to, size_t n)
{
    /* A buffer of exactly that size, so that a sanitizer sees what is written beyond. */
    uint8_t *exact = malloc(n);
    int whole = at < 1ull << 62 && pread(*(int *)context, exact, n, (off_t)at) == (ssize_t)n;
    if (whole) memcpy(to, exact, n);
    free(exact);
    return whole;
}

int main(int argc, char **argv)
{
    for (int i = 1; i + 1 < argc; i += 2) {
        struct volume volume = {0};
        int fd = open(argv[i], O_RDONLY), number = atoi(argv[i + 1]);
        if (fd < 0) return 1;
        identify(&volume, read_file_at, &fd);
        identify_partition(&volume, number, read_file_at, &fd, (uint64_t)lseek(fd, 0, SEEK_END), 512);
        printf("%s\t%s\t%s\t%s\t%s\n", volume.type, volume.uuid, volume.label, volume.part_uuid, volume.part_label);
        close(fd);
    }
    return 0;
}
