/* CRC-32C. Without Python; any thread. */
#ifndef VMM_CRC_H
#define VMM_CRC_H

#include <stddef.h>
#include <stdint.h>

/* RFC 3720, 12.1, continued from `crc`; 0 to begin. */
uint32_t crc32c(uint32_t crc, const void *data, size_t n);

#endif
