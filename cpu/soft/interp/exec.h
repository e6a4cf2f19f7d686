/* The interpreter's handlers, as the table of operations names them (ops/table.h). */
#ifndef SOFT_EXEC_H
#define SOFT_EXEC_H

#include "soft/ops/operations.h"

#define SINGLE(name, emitter) HANDLER(name);
#include "soft/ops/table.h"

/* exec_alu.c: [operation][size][without flags], [form] last */
extern const uop_fn alu_rr[ALU_OPS][4][2], alu_ri[ALU_OPS][4][2];
extern const uop_fn alu_rm[ALU_OPS][4][2][2], alu_mr[ALU_OPS][4][2][2], alu_mi[ALU_OPS][4][2][2];
extern const uop_fn unary_r[UN_OPS][4][2], unary_m[UN_OPS][4][2][2];
/* exec_shift.c */
extern const uop_fn shift_ri[SH_OPS][4][2], shift_rc[SH_OPS][4];
extern const uop_fn imul_rr[4], imul_rri[4], mul_r[4], imul_r[4], div_r[4], idiv_r[4];
/* exec_mem.c; movzx, movsx: [source][destination] size */
extern const uop_fn mov_rr[4], mov_ri[4], load_r[4][2], store_r[4][2], store_i[4][2], load_rip[4], store_rip[4];
extern const uop_fn movzx_rr[3], movsx_rr[3][4], movzx_rm[3][2], movsx_rm[3][4][2], movzx8_16[3];
extern const uop_fn lea_r[4][2], xchg_rr[4], cmov_rr[16][4], setcc_r[16];
/* exec_branch.c */
extern const uop_fn jcc_rel[16], fused_rr[FUSE_OPS][16][4], fused_ri[FUSE_OPS][16][4]; /* NULL: not fused */
extern const uop_fn avx_rm[2], avx_load[2], avx_store[2]; /* exec_avx.c */
/* exec_vec.c: of frequent operations, else NULL */
extern uop_fn vec_fast[FPU_VECTOR_OPS][4];

#endif
