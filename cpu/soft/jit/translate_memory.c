/* Memory for host code: written through one mapping, run from another, so no page is ever writable and executable at one
 * address. A host that does not allow the second mapping gets no translations.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "soft/jit/translate_memory.h"

#ifndef MFD_EXEC
#define MFD_EXEC 0x10u
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
/* Memory is made ready for an AHEADth of what is used, if that is some: two page faults less for each page of it. */
enum { AHEAD = 8, AHEAD_LEAST = 64 << 10 };

const struct soft_supply host_code_supply = { .whole = HOST_CODE_SIZE, .many = 768 << 10, .resting = 8 << 20 };

/* Two mappings of unnamed memory. False: the host does not allow it. */
static bool map_twice(struct host_code *code)
{
    int fd = memfd_create("loopvisor-code", MFD_CLOEXEC | MFD_EXEC);
    if (fd < 0 && errno == EINVAL) /* before Linux 6.3 */
        fd = memfd_create("loopvisor-code", MFD_CLOEXEC);
    if (fd < 0)
        return false;
    void *writes = MAP_FAILED, *runs = MAP_FAILED;
    if (ftruncate(fd, HOST_CODE_SIZE) == 0) {
        writes = mmap(NULL, HOST_CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
        runs = mmap(NULL, HOST_CODE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_NORESERVE, fd, 0);
    }
    close(fd);
    if (writes == MAP_FAILED || runs == MAP_FAILED) {
        if (writes != MAP_FAILED)
            munmap(writes, HOST_CODE_SIZE);
        if (runs != MAP_FAILED)
            munmap(runs, HOST_CODE_SIZE);
        return false;
    }
    /* A child process has no use for it, and could write to it. */
    madvise(writes, HOST_CODE_SIZE, MADV_DONTFORK);
    madvise(runs, HOST_CODE_SIZE, MADV_DONTFORK);
    code->base = writes;
    code->runs = runs;
    return true;
}

struct host_code *host_code_create(bool shares)
{
    static struct host_code none;
#ifdef __SANITIZE_ADDRESS__
    return &none; /* handlers call each other there, and so need the callee-saved registers */
#endif
    struct host_code *code = malloc(sizeof *code);
    if (!code)
        return &none;
    code->used = code->touched = code->ready = 0;
    code->hot = code->cold = (struct host_piece){0};
    code->shares = shares;
    if (!map_twice(code)) {
        free(code);
        return &none;
    }
    return code;
}
/* `size` more bytes are about to be written. */
static void make_ready(struct host_code *code, size_t size)
{
    size_t share = soft_share(&host_code_supply, code->shares), ahead = code->used / AHEAD;
    size_t from = code->ready, end = (code->used + size + ahead) & ~(size_t)4095;
    if (code->used + size <= from || ahead < AHEAD_LEAST)
        return;
    if (end > share)
        end = share;
    if (from < (code->used & ~(size_t)4095))
        from = code->used & ~(size_t)4095;
    code->ready = end;
    /* Without them (Linux before 5.14) the faults come one by one. */
    if (from < end && madvise(code->base + from, end - from, MADV_POPULATE_WRITE) == 0) {
        madvise((void *)(uintptr_t)(code->runs + from), end - from, MADV_POPULATE_READ);
        if (code->touched < end)
            code->touched = end;
    }
}
bool host_code_next_piece(struct host_code *code, struct host_piece *piece)
{
    if (code->used + HOST_CODE_PIECE > soft_share(&host_code_supply, code->shares))
        return false;
    make_ready(code, HOST_CODE_PIECE);
    *piece = (struct host_piece){ .at = code->used, .end = code->used + HOST_CODE_PIECE };
    code->used += HOST_CODE_PIECE;
    return true;
}
void host_code_destroy(struct host_code *code)
{
    if (code->base) {
        munmap(code->base, HOST_CODE_SIZE);
        munmap((void *)(uintptr_t)code->runs, HOST_CODE_SIZE);
        free(code);
    }
}
static void give_back(struct host_code *code, size_t keep)
{
    soft_give_back(code->base, &code->touched, code->used, keep, MADV_REMOVE);
    if (code->ready > keep)
        code->ready = keep;
}
bool host_code_rest(struct host_code *code)
{
    size_t share = soft_share(&host_code_supply, code->shares);
    if (!code->base)
        return true;
    if (code->used > share)
        return false;
    give_back(code, share);
    return true;
}
bool host_code_exceeds_rest(const struct host_code *code)
{
    size_t most = code->touched > code->used ? code->touched : code->used;
    return code->base && most > soft_resting_share(&host_code_supply, code->shares);
}
static void reset(struct host_code *code, size_t keep)
{
    if (!code->base)
        return;
    give_back(code, keep);
    code->used = 0;
    code->hot = code->cold = (struct host_piece){0};
}
void host_code_reset(struct host_code *code) { reset(code, soft_share(&host_code_supply, code->shares)); }
void host_code_drop(struct host_code *code) { reset(code, 0); }
