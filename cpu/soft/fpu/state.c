/* Reset state and memory images of the FPU: FXSAVE and XSAVE (AMD64 APM volume 2, 11.4.4 and 11.5). */
#include <string.h>

#include "soft/fpu/fpu.h"

/* Bits that LDMXCSR and FXRSTOR accept; stored in the images as MXCSR_MASK. */
#define MXCSR_MASK 0xFFFFu
#define MXCSR_RESET 0x1F80u
enum { XFEATURE_X87 = 1, XFEATURE_SSE = 2, XFEATURE_AVX = 4, XSAVE_HEADER = 512, XSAVE_AVX = FPU_XSAVE_LEGACY };
#define COMPACTED (1ull << 63) /* in XCOMP_BV */

static void put(uint8_t *image, size_t offset, const void *from, size_t size) { memcpy(image + offset, from, size); }
static void get(const uint8_t *image, size_t offset, void *to, size_t size) { memcpy(to, image + offset, size); }

static uint32_t get32(const uint8_t *image, size_t offset)
{
    uint32_t v;
    get(image, offset, &v, 4);
    return v;
}

static uint64_t get64(const uint8_t *image, size_t offset)
{
    uint64_t v;
    get(image, offset, &v, 8);
    return v;
}

void fpu_init(struct fpu *f)
{
    f->cw = 0x37F;
    f->sw = 0;
    f->tag = 0;
    f->fop = f->fcs = f->fds = 0;
    f->fip = f->fdp = 0;
    f->x87_ready = false;
}

void fpu_reset(struct fpu *f)
{
    memset(f, 0, sizeof *f);
    fpu_init(f);
    f->mxcsr = MXCSR_RESET;
}

bool fpu_load_mxcsr(struct fpu *f, uint32_t mxcsr)
{
    if (mxcsr & ~MXCSR_MASK)
        return false;
    f->mxcsr = mxcsr;
    f->mxcsr_lazy = false;
    return true;
}

/* The x87 part of the legacy region: bytes 0-23 and 32-159. As AMD processors do, the pointers are stored as zeros
 * unless an exception is pending. */
static void put_x87(const struct fpu *f, uint8_t *image, bool rex_w)
{
    static const uint8_t zeros[16];
    uint16_t tag = f->tag;
    put(image, 0, &f->cw, 2);
    put(image, 2, &f->sw, 2);
    put(image, 4, &tag, 2);
    if (!fpu_pending(f)) {
        put(image, 6, zeros, 2);
        put(image, 8, zeros, 16);
    } else if (rex_w) {
        put(image, 6, &f->fop, 2);
        put(image, 8, &f->fip, 8);
        put(image, 16, &f->fdp, 8);
    } else {
        uint32_t cs = f->fcs, ds = f->fds;
        put(image, 6, &f->fop, 2);
        put(image, 8, &f->fip, 4);
        put(image, 12, &cs, 4);
        put(image, 16, &f->fdp, 4);
        put(image, 20, &ds, 4);
    }
    unsigned top = f->sw >> 11 & 7;
    for (unsigned i = 0; i < 8; i++) {
        put(image, 32 + 16 * i, &f->st[(top + i) & 7], 10);
        put(image, 42 + 16 * i, zeros, 6);
    }
}

/* The pointers' registers have 57 bits. */
static uint64_t canonical(uint64_t v) { return (uint64_t)((int64_t)(v << 7) >> 7); }

static void get_x87(struct fpu *f, const uint8_t *image, bool rex_w)
{
    uint16_t cw;
    get(image, 0, &cw, 2);
    f->cw = fpu_control_word(cw);
    get(image, 2, &f->sw, 2);
    f->tag = image[4];
    get(image, 6, &f->fop, 2);
    f->fop &= 0x7FF;
    if (rex_w) {
        f->fip = canonical(get64(image, 8));
        f->fdp = canonical(get64(image, 16));
        f->fcs = f->fds = 0;
    } else {
        f->fip = get32(image, 8);
        f->fdp = get32(image, 16);
        f->fcs = (uint16_t)get32(image, 12);
        f->fds = (uint16_t)get32(image, 20);
    }
    unsigned top = f->sw >> 11 & 7;
    for (unsigned i = 0; i < 8; i++)
        get(image, 32 + 16 * i, &f->st[(top + i) & 7], 10);
    fpu_summarise(f);
}

static void put_mxcsr(const struct fpu *f, uint8_t *image)
{
    uint32_t mxcsr = fpu_mxcsr(f), mask = MXCSR_MASK;
    put(image, 24, &mxcsr, 4);
    put(image, 28, &mask, 4);
}

static size_t xmm_bytes(bool long_mode) { return long_mode ? 256 : 128; }

void fpu_fxsave(const struct fpu *f, uint8_t image[512], bool rex_w, bool long_mode)
{
    put_x87(f, image, rex_w);
    put_mxcsr(f, image);
    put(image, 160, f->xmm, xmm_bytes(long_mode));
}

bool fpu_fxrstor(struct fpu *f, const uint8_t image[512], bool rex_w, bool long_mode)
{
    if (!fpu_load_mxcsr(f, get32(image, 24)))
        return false;
    get_x87(f, image, rex_w);
    get(image, 160, f->xmm, xmm_bytes(long_mode));
    return true;
}

uint64_t fpu_xinuse(const struct fpu *f)
{
    uint64_t any = 0;
    for (unsigned i = 0; i < 16; i++)
        any |= f->xmm[i].q[0] | f->xmm[i].q[1];
    uint64_t inuse = any ? XFEATURE_SSE : 0;
    any = 0;
    for (unsigned i = 0; i < 16; i++)
        any |= f->high[i].q[0] | f->high[i].q[1];
    if (any)
        inuse |= XFEATURE_AVX;
    any = f->fip | f->fdp;
    for (unsigned i = 0; i < 8; i++)
        any |= f->st[i].mantissa | f->st[i].exponent;
    if (any || f->cw != 0x37F || f->sw || f->tag || f->fop || f->fcs || f->fds)
        inuse |= XFEATURE_X87;
    return inuse;
}

void fpu_xsave(const struct fpu *f, uint8_t *area, uint64_t rfbm, enum fpu_xsave_form form, bool rex_w, bool long_mode)
{
    uint64_t inuse = fpu_xinuse(f), bv = get64(area, XSAVE_HEADER);
    if (form == XSAVE_COMPACTED) {
        if (fpu_mxcsr(f) != MXCSR_RESET)
            inuse |= XFEATURE_SSE; /* SDM 1, 13.10 */
        uint64_t compacted = rfbm | COMPACTED;
        put(area, XSAVE_HEADER + 8, &compacted, 8);
        bv = 0;
    }
    uint64_t write = form == XSAVE_STANDARD ? rfbm : rfbm & inuse;
    if (write & XFEATURE_X87)
        put_x87(f, area, rex_w);
    if (write & XFEATURE_SSE)
        put(area, 160, f->xmm, xmm_bytes(long_mode));
    if (write & XFEATURE_AVX)
        put(area, XSAVE_AVX, f->high, xmm_bytes(long_mode));
    /* The standard format has MXCSR with either of the two (SDM 1, 13.7), the compacted one with SSE (13.10). */
    if (form == XSAVE_COMPACTED ? write & XFEATURE_SSE : rfbm & (XFEATURE_SSE | XFEATURE_AVX))
        put_mxcsr(f, area);
    bv = (bv & ~rfbm) | (inuse & rfbm);
    put(area, XSAVE_HEADER, &bv, 8);
}

bool fpu_xsave_compacted(const uint8_t *area) { return get64(area, XSAVE_HEADER + 8) & COMPACTED; }

bool fpu_xrstor(struct fpu *f, const uint8_t *area, uint64_t rfbm, uint64_t xcr0, bool rex_w, bool long_mode)
{
    uint64_t bv = get64(area, XSAVE_HEADER), compacted = get64(area, XSAVE_HEADER + 8);
    /* #GP: "XSTATE_BV sets a bit that XCR0 does not", "bytes 8-23 of the header are not all zero"; in the compacted format
     * (SDM 1, 13.8.2) "XCOMP_BV sets a bit in the range 62:0 that XCR0 does not", "XSTATE_BV sets a bit that XCOMP_BV does
     * not", "bytes 63:16 of the header are not all zero". */
    if (compacted & COMPACTED) {
        if ((compacted & ~(xcr0 | COMPACTED)) || (bv & ~(compacted & ~COMPACTED)))
            return false;
        for (unsigned i = 16; i < 64; i += 8)
            if (get64(area, XSAVE_HEADER + i))
                return false;
    } else if ((bv & ~xcr0) || compacted || get64(area, XSAVE_HEADER + 16)) {
        return false;
    }
    if (rfbm & (compacted ? XFEATURE_SSE : XFEATURE_SSE | XFEATURE_AVX)) { /* SDM 1, 13.8.1, 13.8.2 */
        bool initial = (compacted & COMPACTED) && !(bv & XFEATURE_SSE);
        if (!fpu_load_mxcsr(f, initial ? MXCSR_RESET : get32(area, 24)))
            return false;
    }
    if (rfbm & XFEATURE_X87) {
        if (bv & XFEATURE_X87) {
            get_x87(f, area, rex_w);
        } else {
            fpu_init(f);
            memset(f->st, 0, sizeof f->st);
        }
    }
    if (rfbm & XFEATURE_SSE) {
        if (bv & XFEATURE_SSE)
            get(area, 160, f->xmm, xmm_bytes(long_mode));
        else
            memset(f->xmm, 0, xmm_bytes(long_mode));
    }
    if (rfbm & XFEATURE_AVX) {
        if (bv & XFEATURE_AVX)
            get(area, XSAVE_AVX, f->high, xmm_bytes(long_mode));
        else
            memset(f->high, 0, xmm_bytes(long_mode));
    }
    return true;
}
