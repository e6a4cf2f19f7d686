/* One virtio-blk request (virtio 1.2, 5.2.6): checked, its bytes found in guest memory, returned to the driver. */
#include "blk.h"

#include <stdlib.h>
#include <string.h>

static void copy_out(const struct chain *chain, uint64_t offset, void *to, uint64_t length)
{
    segments_copy(chain->segments, chain->readable, offset, to, length, true);
}

/* The request's bytes in guest memory; it has room for a piece of each segment. */
static void find_bytes(struct request *request, const struct segment *segments, uint32_t count, uint64_t skip, uint64_t length)
{
    request->iovs = segments_iovs(segments, count, skip, length, request->iov, count);
}

static uint8_t check_zeroes(const struct disk *disk, struct request *request, uint64_t length)
{
    bool discard = request->type == T_DISCARD;
    if (!(discard ? disk->discard : disk->write_zeroes))
        return S_UNSUPP;
    if (disk->read_only || !length || length % ZEROES_ENTRY || length / ZEROES_ENTRY > ZEROES_ENTRIES)
        return S_IOERR;
    request->zeroes_count = (uint32_t)(length / ZEROES_ENTRY);
    request->zeroes = malloc(length);
    if (!request->zeroes)
        return S_IOERR;
    copy_out(&request->chain, HEADER, request->zeroes, length);
    for (uint32_t i = 0; i < request->zeroes_count; i++) {
        struct zeroes *entry = &request->zeroes[i];
        /* 5.2.6.2: "the device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard, secure erase and write
         * zeroes commands if any unknown flag is set. Furthermore, the device MUST set the status byte to
         * VIRTIO_BLK_S_UNSUPP for discard commands if the unmap flag is set." */
        if (entry->flags & ~1u || (discard && entry->flags))
            return S_UNSUPP;
        if (entry->sectors > ZEROES_SECTORS || entry->sector > disk->sectors ||
            entry->sectors > disk->sectors - entry->sector)
            return S_IOERR;
    }
    return S_OK;
}

int blk_prepare(const struct disk *disk, struct request *request)
{
    struct chain *chain = &request->chain;
    struct { uint32_t type, reserved; uint64_t sector; } header;
    /* 2.7.4.2 lets a driver lay the parts out as it likes; the header and the status byte must be there. */
    if (chain->readable_length < HEADER || !chain->writable_length)
        return -1;
    copy_out(chain, 0, &header, HEADER);
    struct segment *tail = &chain->segments[chain->readable + chain->writable - 1];
    request->status_at = tail->host + tail->len - 1;
    request->type = header.type;
    uint64_t in = chain->writable_length - 1, out = chain->readable_length - HEADER;
    struct segment *writable = chain->segments + chain->readable;
    request->dsync = !disk->writeback;
    switch (header.type) {
    case T_IN:
    case T_OUT:
        request->length = header.type == T_IN ? in : out;
        /* 5.2.6.2: "A device MUST set the status byte to VIRTIO_BLK_S_IOERR for a write request if the VIRTIO_BLK_F_RO
         * feature if offered, and MUST NOT write any data." */
        if (header.type == T_OUT && disk->read_only)
            return S_IOERR;
        if (!request->length || request->length % SECTOR || header.sector > disk->sectors ||
            request->length / SECTOR > disk->sectors - header.sector)
            return S_IOERR;
        request->offset = header.sector * SECTOR;
        if (header.type == T_IN)
            find_bytes(request, writable, chain->writable, 0, in);
        else
            find_bytes(request, chain->segments, chain->readable, HEADER, out);
        if (request->iovs > IOV_LIMIT)
            return S_IOERR;
        return S_OK;
    case T_FLUSH:
        return S_OK;
    case T_GET_ID: {
        if (in < ID_BYTES)
            return S_IOERR;
        find_bytes(request, writable, chain->writable, 0, ID_BYTES);
        const char *from = disk->serial;
        for (uint32_t i = 0; i < request->iovs; from += request->iov[i++].iov_len)
            memcpy(request->iov[i].iov_base, from, request->iov[i].iov_len);
        request->type = T_GET_ID;
        return S_OK;
    }
    case T_DISCARD:
    case T_WRITE_ZEROES:
        return check_zeroes(disk, request, out);
    default:
        return S_UNSUPP; /* 5.2.6: "UNSUPP for a request unsupported by device" */
    }
}

struct request *blk_request_new(const struct chain *chain)
{
    uint32_t segments = chain->readable + chain->writable;
    struct request *request = calloc(1, sizeof *request + (segments + 1) * sizeof *request->iov);
    if (!request || !chain_keep(&request->chain, chain)) {
        free(request);
        return NULL;
    }
    return request;
}

void blk_request_alone(struct request *request)
{
    request->last = request;
    request->job_length = request->length;
    request->job_iovs = request->iovs;
}

void blk_request_drop(struct request *request)
{
    free(request->chain.segments);
    free(request->zeroes);
    free(request->all);
    free(request);
}

void blk_request_free(struct request *request)
{
    Py_XDECREF(request->ring);
    blk_request_drop(request);
}

int blk_return(struct request *request)
{
    RingObject *ring = request->ring;
    if (!ring->closed)
        *request->status_at = request->status;
    /* Also of a queue that was reset meanwhile: the kernel may have written before it was told to stop. */
    int failed = segments_notify(ring->memory, request->chain.segments + request->chain.readable, request->chain.writable,
                                 request->chain.writable_length);
    if (!ring->closed)
        ring_push(&ring->ring, request->chain.order, request->chain.id, request->chain.slots, blk_used(request));
    blk_request_free(request);
    return failed;
}
