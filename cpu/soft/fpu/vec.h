/* Inside of the vector operations: what vec_*.c share. Include after `#pragma GCC target("sse4.2")`. */
#ifndef SOFT_VEC_H
#define SOFT_VEC_H

#include <nmmintrin.h>

#include "soft/fpu/fpu.h"

/* A row says where an operation stands in the opcode maps; vector.c makes the dense index of them. */
enum vec_when { WHEN_ANY, WHEN_REG, WHEN_MEM };
struct vec_row {
    uint8_t map;     /* enum vec_map */
    uint8_t prefix;  /* enum vec_prefix */
    uint8_t opcode;
    uint8_t when;    /* enum vec_when */
    int8_t group;    /* ModRM.reg of groups 12-14, else -1 */
    struct vec_op op;
};
extern struct vec_row vec_move_rows[], vec_int_rows[], vec_float_rows[], vec_text_rows[], vec_crypto_rows[];
extern const size_t vec_move_count, vec_int_count, vec_float_count, vec_text_count, vec_crypto_count;

#define OP(n, f, size, ...) {.fn = vec_##n, .form = f, .mem_size = size, .name = #n, __VA_ARGS__}
#define VEC_UNUSED __attribute__((unused))
#define VEC_ARGS struct vec_context *ctx VEC_UNUSED, union xmm *dst VEC_UNUSED, const union xmm *src VEC_UNUSED

/* vec_approx.c */
int vec_rcpps(VEC_ARGS);
int vec_rcpss(VEC_ARGS);
int vec_rsqrtps(VEC_ARGS);
int vec_rsqrtss(VEC_ARGS);

/* vec_float.c: around an operation that the host computes under the guest's MXCSR. enter: 0 if nothing has to be done after
 * it; leave: true if it raised an unmasked exception. tiny: the result is denormal. */
uint32_t vec_float_enter(struct fpu *f);
bool vec_float_leave(struct fpu *f, uint32_t host, bool tiny);

static inline __m128i vec_load(const union xmm *x) { return _mm_load_si128((const __m128i *)x); }
static inline void vec_store(union xmm *x, __m128i v) { _mm_store_si128((__m128i *)x, v); }

#endif
