/* Pages of guest memory: which differ, copies of chosen ones, files of them, checksums.
 *
 * Everything here works on buffers of whole 4 KiB pages, without the interpreter's lock, while vCPUs may write them: a
 * page is then copied in some state between, and whoever keeps a dirty log copies it again.
 * Bitmaps have bit n for page n, in bytes, lowest bit first (as 64-bit little-endian words read the same).
 */
#define _GNU_SOURCE
#include "crc.h"
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { RUN_PAGES = 256 };

static bool bit(const uint8_t *bitmap, size_t n) { return bitmap[n / 8] >> n % 8 & 1; }

/* The place of a page in a file that begins at `offset` is a place of a file; false with an exception set otherwise. */
static bool places_fit(long long offset, size_t pages)
{
    if (offset < 0 || offset > LLONG_MAX - (long long)(pages * PAGE)) {
        PyErr_SetString(PyExc_ValueError, "the offset is out of range");
        return false;
    }
    return true;
}

/* The buffer of whole pages that `view` is; false with an exception set if it is none. */
static bool pages_of(Py_buffer *view, size_t *pages)
{
    if (view->len % PAGE) {
        PyErr_SetString(PyExc_ValueError, "the buffer does not consist of whole pages");
        return false;
    }
    *pages = (size_t)view->len / PAGE;
    return true;
}

static bool bitmap_fits(const Py_buffer *bitmap, size_t pages)
{
    if ((size_t)bitmap->len < (pages + 7) / 8) {
        PyErr_SetString(PyExc_ValueError, "the bitmap is shorter than the memory");
        return false;
    }
    return true;
}

static int write_all(int fd, const uint8_t *data, size_t length, off_t offset)
{
    while (length) {
        ssize_t done = pwrite(fd, data, length, offset);
        if (done < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        data += done;
        length -= (size_t)done;
        offset += done;
    }
    return 0;
}

static int read_all(int fd, uint8_t *data, size_t length, off_t offset)
{
    while (length) {
        ssize_t done = pread(fd, data, length, offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done ? errno : EIO; /* the file is shorter */
        data += done;
        length -= (size_t)done;
        offset += done;
    }
    return 0;
}

/* save_pages(fd, offset, view, pages, fresh) -> bytes written. Pages of the bitmap (None: all) go to the file at their place.
 * Pages of zeroes become holes; in a fresh file they are holes already. */
PyObject *native_save_pages(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd, fresh;
    long long offset;
    Py_buffer view, bitmap = {0};
    PyObject *chosen;
    size_t pages;
    if (!PyArg_ParseTuple(args, "iLy*Op:save_pages", &fd, &offset, &view, &chosen, &fresh))
        return NULL;
    bool ok = pages_of(&view, &pages) && places_fit(offset, pages);
    if (ok && chosen != Py_None)
        ok = !PyObject_GetBuffer(chosen, &bitmap, PyBUF_SIMPLE) && bitmap_fits(&bitmap, pages);
    int error = 0;
    size_t written = 0;
    if (ok) {
        const uint8_t *memory = view.buf, *wanted = bitmap.buf;
        Py_BEGIN_ALLOW_THREADS
        for (size_t n = 0; n < pages && !error;) {
            if (wanted && !bit(wanted, n)) {
                n++;
                continue;
            }
            bool zero = page_is_zero(memory + n * PAGE);
            size_t first = n++;
            while (n < pages && n - first < RUN_PAGES && (!wanted || bit(wanted, n))
                   && page_is_zero(memory + n * PAGE) == zero)
                n++;
            off_t at = (off_t)offset + (off_t)(first * PAGE);
            size_t length = (n - first) * PAGE;
            if (!zero) {
                error = write_all(fd, memory + first * PAGE, length, at);
                written += length;
            } else if (!fresh
                       && fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)length) < 0) {
                error = write_all(fd, memory + first * PAGE, length, at); /* a file system without holes */
                written += length;
            }
        }
        Py_END_ALLOW_THREADS
    }
    if (bitmap.obj)
        PyBuffer_Release(&bitmap);
    PyBuffer_Release(&view);
    if (!ok)
        return NULL;
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSize_t(written);
}

/* gather(view, pages, out) -> number of pages: those of the bitmap, one after the other, to the start of `out`. */
PyObject *native_gather(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer view, bitmap, out;
    size_t pages, moved = 0;
    if (!PyArg_ParseTuple(args, "y*y*w*:gather", &view, &bitmap, &out))
        return NULL;
    bool ok = pages_of(&view, &pages) && bitmap_fits(&bitmap, pages), full = false;
    if (ok) {
        size_t room = (size_t)out.len / PAGE;
        const uint8_t *memory = view.buf, *wanted = bitmap.buf;
        uint8_t *flat = out.buf;
        Py_BEGIN_ALLOW_THREADS
        for (size_t n = 0; n < pages && !full; n++) {
            if (!bit(wanted, n))
                continue;
            if (moved == room)
                full = true;
            else
                memcpy(flat + moved++ * PAGE, memory + n * PAGE, PAGE);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&bitmap);
    PyBuffer_Release(&out);
    if (!ok)
        return NULL;
    if (full) {
        PyErr_SetString(PyExc_ValueError, "the bitmap has more pages than the other buffer");
        return NULL;
    }
    return PyLong_FromSize_t(moved);
}

/* Pages between a file, where page n stands at offset + 4096 n, and memory. With `packed` memory holds just the pages of
 * the bitmap, one after the other; else page n is its page n. */
static PyObject *transfer(PyObject *args, bool writing)
{
    int fd, packed;
    long long offset;
    Py_buffer view, bitmap;
    if (!PyArg_ParseTuple(args, writing ? "iLy*y*p:write_pages" : "iLw*y*p:read_pages", &fd, &offset, &view, &bitmap, &packed))
        return NULL;
    size_t room = (size_t)view.len / PAGE, pages = (size_t)bitmap.len * 8, moved = 0;
    int error = 0;
    bool full = false;
    if (!places_fit(offset, pages)) {
        PyBuffer_Release(&view);
        PyBuffer_Release(&bitmap);
        return NULL;
    }
    uint8_t *memory = view.buf;
    const uint8_t *wanted = bitmap.buf;
    Py_BEGIN_ALLOW_THREADS
    for (size_t n = 0; n < pages && !error && !full;) {
        if (!bit(wanted, n)) {
            n++;
            continue;
        }
        size_t first = n;
        while (n < pages && n - first < RUN_PAGES && bit(wanted, n))
            n++;
        size_t count = n - first, at = packed ? moved : first;
        full = at + count > room;
        if (full)
            break;
        off_t place = (off_t)offset + (off_t)(first * PAGE);
        error = writing ? write_all(fd, memory + at * PAGE, count * PAGE, place)
                        : read_all(fd, memory + at * PAGE, count * PAGE, place);
        moved += count;
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    PyBuffer_Release(&bitmap);
    if (full) {
        PyErr_SetString(PyExc_ValueError, "the bitmap has more pages than the buffer");
        return NULL;
    }
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSize_t(moved * PAGE);
}

PyObject *native_write_pages(PyObject *Py_UNUSED(module), PyObject *args) { return transfer(args, true); }

PyObject *native_read_pages(PyObject *Py_UNUSED(module), PyObject *args) { return transfer(args, false); }

/* differing(view, other) -> bitmap of the pages that are not equal. */
PyObject *native_differing(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer view, other;
    size_t pages, others;
    if (!PyArg_ParseTuple(args, "y*y*:differing", &view, &other))
        return NULL;
    PyObject *result = NULL;
    if (pages_of(&view, &pages) && pages_of(&other, &others)) {
        if (pages != others)
            PyErr_SetString(PyExc_ValueError, "the buffers differ in size");
        else
            result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(native_words(pages) * 8));
    }
    if (result) {
        uint8_t *out = (uint8_t *)PyBytes_AS_STRING(result);
        const uint8_t *a = view.buf, *b = other.buf;
        memset(out, 0, (size_t)PyBytes_GET_SIZE(result));
        Py_BEGIN_ALLOW_THREADS
        for (size_t n = 0; n < pages; n++)
            if (memcmp(a + n * PAGE, b + n * PAGE, PAGE))
                out[n / 8] |= (uint8_t)(1 << n % 8);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&other);
    return result;
}

/* merge(bitmap, other): set in `bitmap` what is set in `other`, which is no longer. */
PyObject *native_merge(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer bitmap, other;
    if (!PyArg_ParseTuple(args, "w*y*:merge", &bitmap, &other))
        return NULL;
    bool fits = other.len <= bitmap.len;
    if (fits)
        for (Py_ssize_t i = 0; i < other.len; i++)
            ((uint8_t *)bitmap.buf)[i] |= ((const uint8_t *)other.buf)[i];
    else
        PyErr_SetString(PyExc_ValueError, "the other bitmap is longer");
    PyBuffer_Release(&bitmap);
    PyBuffer_Release(&other);
    return fits ? Py_NewRef(Py_None) : NULL;
}

/* count(bitmap) -> number of set bits. */
PyObject *native_count(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer bitmap;
    if (!PyArg_ParseTuple(args, "y*:count", &bitmap))
        return NULL;
    size_t set = 0;
    for (Py_ssize_t i = 0; i < bitmap.len; i++)
        set += (size_t)__builtin_popcount(((const uint8_t *)bitmap.buf)[i]);
    PyBuffer_Release(&bitmap);
    return PyLong_FromSize_t(set);
}

PyObject *native_crc32c(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer view;
    unsigned int crc = 0;
    if (!PyArg_ParseTuple(args, "y*|I:crc32c", &view, &crc))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    crc = crc32c(crc, view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(crc);
}

/* checksums(fd, size, chunk) -> CRC-32C of each chunk of the file, 32 bits each of this host. Holes are not read. */
PyObject *native_checksums(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd;
    long long size;
    unsigned int chunk;
    if (!PyArg_ParseTuple(args, "iLI:checksums", &fd, &size, &chunk))
        return NULL;
    if (size < 0 || chunk < PAGE || chunk > 1u << 26 || chunk % PAGE || size > (1LL << 46)) {
        PyErr_SetString(PyExc_ValueError, "the size or the chunk is out of range");
        return NULL;
    }
    size_t chunks = (size_t)((size + chunk - 1) / chunk);
    uint8_t *buffer = PyMem_RawMalloc(chunk);
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(chunks * 4));
    if (!buffer || !result) {
        PyMem_RawFree(buffer);
        Py_XDECREF(result);
        return PyErr_NoMemory();
    }
    uint8_t *out = (uint8_t *)PyBytes_AS_STRING(result);
    int error = 0;
    Py_BEGIN_ALLOW_THREADS
    uint32_t zero_full = 0;
    bool have_zero = false;
    struct stat status;
    if (fstat(fd, &status) < 0)
        error = errno;
    else if (S_ISREG(status.st_mode) && status.st_size < (off_t)size)
        error = EIO; /* the file is shorter: what it lacks is no hole */
    off_t data = -1; /* the next data at or after the place looked at; -1: to be asked for */
    for (size_t n = 0; n < chunks && !error; n++) {
        off_t at = (off_t)n * chunk;
        size_t length = (long long)chunk < size - at ? chunk : (size_t)(size - at);
        if (data < at) {
            data = lseek(fd, at, SEEK_DATA);
            if (data < 0)
                data = errno == ENXIO ? (off_t)size : at; /* no more data; or no such question here */
        }
        uint32_t crc;
        if (data >= at + (off_t)length) {
            if (length != chunk || !have_zero) {
                memset(buffer, 0, length);
                crc = crc32c(0, buffer, length);
                if (length == chunk) {
                    zero_full = crc;
                    have_zero = true;
                }
            } else {
                crc = zero_full;
            }
        } else {
            size_t got = 0;
            while (got < length) {
                ssize_t part = pread(fd, buffer + got, length - got, at + (off_t)got);
                if (part < 0 && errno == EINTR)
                    continue;
                if (part <= 0) {
                    error = part ? errno : EIO; /* the file became shorter */
                    break;
                }
                got += (size_t)part;
            }
            crc = crc32c(0, buffer, length);
            data = -1;
        }
        memcpy(out + n * 4, &crc, 4);
    }
    Py_END_ALLOW_THREADS
    PyMem_RawFree(buffer);
    if (error) {
        Py_DECREF(result);
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return result;
}
