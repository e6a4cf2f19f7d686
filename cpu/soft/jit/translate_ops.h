/* What the handlers do that the translator knows: found by the handler's address. */
#ifndef SOFT_TRANSLATE_OPS_H
#define SOFT_TRANSLATE_OPS_H

#include "soft/ops/uop.h"

enum kind { K_NONE, K_ALU_RR, K_ALU_RI, K_ALU_RM, K_ALU_MR, K_ALU_MI, K_UNARY_R, K_SHIFT, K_IMUL, K_IMUL_I, K_MOV_RR, K_MOV_RI,
            K_LOAD, K_LOAD_RIP, K_STORE, K_STORE_RIP, K_STORE_I, K_MOVZX, K_MOVSX, K_MOVZX_M, K_MOVSX_M, K_LEA, K_LEA_RIP,
            K_PUSH, K_PUSH_I, K_POP, K_CMOV, K_SETCC, K_BSWAP, K_EA, K_NOP,
            K_JMP, K_FALL, K_JCC, K_FUSED_RR, K_FUSED_RI, K_CALL, K_RET };
struct meaning {
    uop_fn fn;
    uint8_t kind, op, size, form; /* size: log2 (movsx: destination), op: operation, condition or source size */
    bool flags;
};

void meanings_learn(void);                     /* once, before the others; from any thread */
const struct meaning *meaning_of(uop_fn fn);   /* kind K_NONE if it is not known */

#endif
