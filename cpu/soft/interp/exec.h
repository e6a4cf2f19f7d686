/* Tables of micro-op handlers that decode.c chooses from. Sizes are log2 of bytes; form 0 is base + displacement,
 * form 1 base + (index << scale) + displacement, both in 64-bit mode without a segment base; everything else is a
 * micro-op of ea_* that computes the linear address into tmp[0] followed by form 0 on OFF_T0. */
#ifndef SOFT_EXEC_H
#define SOFT_EXEC_H

#include "soft/ops/uop.h"

enum { ALU_ADD, ALU_OR, ALU_ADC, ALU_SBB, ALU_AND, ALU_SUB, ALU_XOR, ALU_CMP, ALU_TEST, ALU_OPS };
enum { UN_INC, UN_DEC, UN_NEG, UN_NOT, UN_OPS };
enum { SH_ROL, SH_ROR, SH_RCL, SH_RCR, SH_SHL, SH_SHR, SH_SAL, SH_SAR, SH_OPS };

/* exec_alu.c: [operation][size][without flags]; r0 op= r1 / imm / memory, memory op= r1 / imm */
extern const uop_fn alu_rr[ALU_OPS][4][2], alu_ri[ALU_OPS][4][2];
extern const uop_fn alu_rm[ALU_OPS][4][2][2], alu_mr[ALU_OPS][4][2][2], alu_mi[ALU_OPS][4][2][2]; /* [form] last */
extern const uop_fn unary_r[UN_OPS][4][2], unary_m[UN_OPS][4][2][2];

/* exec_shift.c */
extern const uop_fn shift_ri[SH_OPS][4][2], shift_rc[SH_OPS][4]; /* by imm (masked, not 0), by CL */
HANDLER(shld_ri); HANDLER(shld_rc); HANDLER(shrd_ri); HANDLER(shrd_rc); /* size; r0, r1 */
extern const uop_fn imul_rr[4], imul_rri[4];       /* r0 *= r1; r0 = r1 * imm (16, 32, 64 bits) */
extern const uop_fn mul_r[4], imul_r[4], div_r[4], idiv_r[4]; /* rDX:rAX by r1 */

/* exec_mem.c */
extern const uop_fn mov_rr[4], mov_ri[4], load_r[4][2], store_r[4][2], store_i[4][2];
extern const uop_fn movzx_rr[3], movsx_rr[3][4];   /* [source]; [source][destination] size; zero extension is to 64 */
extern const uop_fn movzx_rm[3][2], movsx_rm[3][4][2];
extern const uop_fn movzx8_16[3];                  /* register, form 0, form 1 */
extern const uop_fn lea_r[4][2];                   /* 16, 32, 64 bits */
HANDLER(lea_rip); HANDLER(lea_mask);               /* imm: address mask; size */
HANDLER(ea_bd); HANDLER(ea_bi); HANDLER(ea_rip); HANDLER(ea_seg); HANDLER(ea_abs); HANDLER(ea_a32); HANDLER(ea_a32_rip); HANDLER(ea_a64_rip); HANDLER(ea_legacy);
extern const uop_fn load_rip[4], store_rip[4];
HANDLER(rmw_load);                                 /* size: probe [tmp0] for writing, load it to tmp1 */
HANDLER(rmw_store);                                /* size: tmp1 to [tmp0] */
extern const uop_fn push64_r, push64_i, pop64_r, leave64;
extern const uop_fn xchg_rr[4];
extern const uop_fn cmov_rr[16][4];                /* 16, 32, 64 */
extern const uop_fn setcc_r[16];
HANDLER(bswap16); HANDLER(bswap32); HANDLER(bswap64); HANDLER(movbe16); HANDLER(movbe32); HANDLER(movbe64);
HANDLER(cbw); HANDLER(cwde); HANDLER(cdqe); HANDLER(cwd); HANDLER(cdq); HANDLER(cqo);
HANDLER(fence); HANDLER(nop);

/* exec_branch.c: 64-bit mode unless "legacy" */
HANDLER(jmp_rel);                                  /* linked */
HANDLER(jmp_fall);                                 /* the block is full; idx: its last instruction's */
HANDLER(call_rel); HANDLER(ret64);                 /* imm: bytes to pop besides the address */
HANDLER(jmp_r); HANDLER(call_r);                   /* r1 */
extern const uop_fn jcc_rel[16];
enum { FUSE_CMP, FUSE_TEST, FUSE_OPS };
extern const uop_fn fused_rr[FUSE_OPS][16][4], fused_ri[FUSE_OPS][16][4]; /* NULL: not fused */

/* exec_misc.c */
HANDLER(bt_ri); HANDLER(bt_rr);            /* size; aux: 0 BT, 1 BTS, 2 BTR, 3 BTC */
HANDLER(bsf_rr); HANDLER(bsr_rr); HANDLER(popcnt_rr); HANDLER(xadd); /* size */

/* exec_fpu.c: r0, r1 are numbers of XMM registers */
HANDLER(vec_copy); HANDLER(vec_rr);        /* ptr: struct vec_op */

HANDLER(fpu_available);                    /* aux: 0 SSE, 1 MMX, 2 x87: #UD, #NM */
/* exec_vec.c: the handler of a frequent operation, or NULL. memory: with a memory operand of address form `form`. */
uop_fn vec_fast(const struct vec_op *op, bool memory, bool wide, int form);

/* Calls of plain functions (helpers.h). In a helper state is in SYNC; the micro-op has its operands. */
typedef void (*helper_fn)(struct soft_vcpu *c, struct uop *u);
HANDLER(call_helper);      /* ptr: helper; goes on with the next micro-op */
HANDLER(call_helper_store);/* goes on, unless the helper wrote code */
HANDLER(call_helper_end);  /* the helper has set c->rip; ends the block; the mode may have changed */

#endif
