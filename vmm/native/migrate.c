/* Pages on their way to another host: chosen ones copied out of guest memory into a buffer, and from a buffer into it.
 *
 * A table says what a buffer holds: runs of {first page, count}, with ZERO_RUN for pages that are all zeroes and have no
 * bytes in the buffer. vCPUs may write meanwhile: what is sent is the copy, which its checksum fits, and whoever keeps a
 * dirty log sends the page again. Without the interpreter's lock.
 */
#include "native.h"

#include <string.h>

#define ZERO_RUN 0x80000000u

struct run {
    uint32_t first, count;
};

/* What was last sent of a page; 16 bytes, so that by chance no other content has the same. */
struct digest {
    uint64_t low, high;
};

static uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Two independent lanes of multiply and fold. Not against an adversary: a guest that finds two pages of one digest
 * damages its own memory. */
static struct digest digest_of(const uint8_t *page)
{
    const uint64_t k0 = 0x9E3779B97F4A7C15ull, k1 = 0xD1B54A32D192ED03ull, k2 = 0xABC98388FB8FAC03ull,
                   k3 = 0x8CB92BA72F3D8DD7ull;
    uint64_t a = k0, b = k1, c = k2, d = k3;
    for (size_t at = 0; at < PAGE; at += 32) {
        uint64_t w[4];
        memcpy(w, page + at, sizeof w);
        a = fold(a ^ w[0], k1 ^ w[1]);
        b = fold(b ^ w[2], k0 ^ w[3]);
        c = fold(c + w[1], k3 ^ (w[2] + at));
        d = fold(d + w[3], k2 ^ (w[0] + at));
    }
    return (struct digest){fold(a ^ k2, b ^ k3) | 1, fold(c ^ k0, d ^ k1)};
}

/* The first bit from `at` on that is set, or `count`. */
static size_t next_set(const uint8_t *bitmap, size_t at, size_t count)
{
    while (at < count) {
        if (at % 64 == 0 && at + 64 <= count) {
            uint64_t word;
            memcpy(&word, bitmap + at / 8, sizeof word);
            if (!word) {
                at += 64;
                continue;
            }
            return at + (size_t)__builtin_ctzll(word);
        }
        if (bitmap[at / 8] >> at % 8 & 1)
            return at;
        at++;
    }
    return count;
}

static bool add_page(struct run *runs, uint32_t *count, uint32_t room, uint32_t page, uint32_t kind)
{
    if (*count) {
        struct run *last = &runs[*count - 1];
        uint32_t length = last->count & ~ZERO_RUN;
        if ((last->count & ZERO_RUN) == kind && last->first + length == page && length < 0x7FFFFFFF) {
            last->count++;
            return true;
        }
    }
    if (*count == room)
        return false;
    runs[(*count)++] = (struct run){page, 1 | kind};
    return true;
}

/* pack_pages(view, bitmap, first, table, out, digests, fresh)
 *     -> (next, runs, data pages, zero pages, pages left out) */
PyObject *native_pack_pages(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer view, bitmap, table, out, digests = {0};
    unsigned long long first;
    PyObject *known;
    int fresh;
    if (!PyArg_ParseTuple(args, "y*y*Kw*w*Op:pack_pages", &view, &bitmap, &first, &table, &out, &known, &fresh))
        return NULL;
    size_t pages = (size_t)view.len / PAGE;
    bool ok = true;
    if (known != Py_None)
        ok = !PyObject_GetBuffer(known, &digests, PyBUF_WRITABLE);
    if (ok && (view.len % PAGE || (size_t)bitmap.len < (pages + 7) / 8 || table.len < (Py_ssize_t)sizeof(struct run) ||
               out.len < PAGE || (digests.obj && (size_t)digests.len < pages * sizeof(struct digest)) ||
               pages > 0x7FFFFFFF)) {
        PyErr_SetString(PyExc_ValueError, "the buffers do not fit each other");
        ok = false;
    }
    uint32_t runs = 0;
    size_t data = 0, zero = 0, left_out = 0, at = (size_t)first;
    if (ok) {
        const uint8_t *memory = view.buf, *wanted = bitmap.buf;
        struct run *entries = table.buf;
        struct digest *sent = digests.buf;
        uint8_t *to = out.buf;
        size_t room = (size_t)out.len / PAGE;
        uint32_t most = (uint32_t)((size_t)table.len / sizeof(struct run));
        Py_BEGIN_ALLOW_THREADS
        for (at = next_set(wanted, at, pages); at < pages; at = next_set(wanted, at + 1, pages)) {
            const uint8_t *page = memory + at * PAGE;
            if (page_is_zero(page)) {
                /* A page that was never sent is zeroes there. */
                bool same = fresh || (sent && !sent[at].low && !sent[at].high);
                if (same)
                    left_out++;
                else if (add_page(entries, &runs, most, (uint32_t)at, ZERO_RUN))
                    zero++;
                else
                    break;
                if (sent)
                    sent[at] = (struct digest){0, 0};
                continue;
            }
            if (data == room)
                break;
            memcpy(to + data * PAGE, page, PAGE);
            struct digest now = {0, 0};
            if (sent) {
                now = digest_of(to + data * PAGE);
                if (!fresh && now.low == sent[at].low && now.high == sent[at].high) {
                    left_out++;
                    continue;
                }
            }
            if (!add_page(entries, &runs, most, (uint32_t)at, 0))
                break;
            if (sent)
                sent[at] = now;
            data++;
        }
        Py_END_ALLOW_THREADS
    }
    if (digests.obj)
        PyBuffer_Release(&digests);
    PyBuffer_Release(&view);
    PyBuffer_Release(&bitmap);
    PyBuffer_Release(&table);
    PyBuffer_Release(&out);
    if (!ok)
        return NULL;
    return Py_BuildValue("(nInnn)", (Py_ssize_t)at, runs, (Py_ssize_t)data, (Py_ssize_t)zero, (Py_ssize_t)left_out);
}

/* unpack_pages(view, table, data) -> pages: what pack_pages() made, checked, into memory. ValueError, and memory is as it
 * was, if the table is out of bounds. */
PyObject *native_unpack_pages(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer view, table, data;
    if (!PyArg_ParseTuple(args, "w*y*y*:unpack_pages", &view, &table, &data))
        return NULL;
    size_t pages = (size_t)view.len / PAGE, runs = (size_t)table.len / sizeof(struct run), done = 0, bytes = 0;
    bool ok = !(table.len % (Py_ssize_t)sizeof(struct run)) && !(data.len % PAGE);
    const uint8_t *entries = table.buf;
    for (size_t i = 0; ok && i < runs; i++) {
        struct run run;
        memcpy(&run, entries + i * sizeof run, sizeof run);
        size_t count = run.count & ~ZERO_RUN;
        ok = count && run.first < pages && count <= pages - run.first;
        done += count;
        /* Zero pages cost the sender nothing: it may name each but once. */
        ok = ok && done <= pages;
        if (!(run.count & ZERO_RUN))
            bytes += count * PAGE;
    }
    if (ok && bytes == (size_t)data.len) {
        uint8_t *memory = view.buf;
        const uint8_t *from = data.buf;
        Py_BEGIN_ALLOW_THREADS
        for (size_t i = 0; i < runs; i++) {
            struct run run;
            memcpy(&run, entries + i * sizeof run, sizeof run);
            size_t count = run.count & ~ZERO_RUN;
            uint8_t *to = memory + (size_t)run.first * PAGE;
            if (!(run.count & ZERO_RUN)) {
                memcpy(to, from, count * PAGE);
                from += count * PAGE;
                continue;
            }
            for (size_t n = 0; n < count; n++) /* a page that is not there yet stays so */
                if (!page_is_zero(to + n * PAGE))
                    memset(to + n * PAGE, 0, PAGE);
        }
        Py_END_ALLOW_THREADS
    } else {
        ok = false;
        PyErr_SetString(PyExc_ValueError, "pages out of bounds");
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&table);
    PyBuffer_Release(&data);
    return ok ? PyLong_FromSize_t(done) : NULL;
}
