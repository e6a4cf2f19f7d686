/* The table of handlers that the translator knows. */
#include <pthread.h>

#include "soft/interp/exec.h"
#include "soft/jit/translate_ops.h"

enum { MEANINGS = 4096 };
static struct meaning meanings[MEANINGS];

static unsigned meaning_hash(uop_fn fn) { return (unsigned)((uintptr_t)fn * 0x9E3779B97F4A7C15ull >> 52); }
static void know(uop_fn fn, enum kind kind, unsigned op, unsigned size, unsigned form, bool flags)
{
    if (!fn)
        return;
    unsigned i = meaning_hash(fn);
    while (meanings[i].fn && meanings[i].fn != fn)
        i = (i + 1) % MEANINGS;
    if (!meanings[i].fn)
        meanings[i] = (struct meaning){fn, (uint8_t)kind, (uint8_t)op, (uint8_t)size, (uint8_t)form, flags};
}
const struct meaning *meaning_of(uop_fn fn)
{
    unsigned i = meaning_hash(fn);
    while (meanings[i].fn && meanings[i].fn != fn)
        i = (i + 1) % MEANINGS;
    return &meanings[i];
}
static void learn(void)
{
    for (unsigned op = 0; op < ALU_OPS; op++)
        for (unsigned s = 0; s < 4; s++)
            for (unsigned nf = 0; nf < 2; nf++) {
                if (op == ALU_ADC || op == ALU_SBB)
                    continue;
                know(alu_rr[op][s][nf], K_ALU_RR, op, s, 0, !nf);
                know(alu_ri[op][s][nf], K_ALU_RI, op, s, 0, !nf);
                for (unsigned f = 0; f < 2; f++) {
                    know(alu_rm[op][s][nf][f], K_ALU_RM, op, s, f, !nf);
                    know(alu_mr[op][s][nf][f], K_ALU_MR, op, s, f, !nf);
                    know(alu_mi[op][s][nf][f], K_ALU_MI, op, s, f, !nf);
                }
            }
    for (unsigned op = 0; op < UN_OPS; op++)
        for (unsigned s = 0; s < 4; s++)
            for (unsigned nf = 0; nf < 2; nf++)
                know(unary_r[op][s][nf], K_UNARY_R, op, s, 0, !nf && op != UN_NOT);
    for (unsigned op = 0; op < SH_OPS; op++)
        for (unsigned s = 0; s < 4; s++)
            if (op != SH_RCL && op != SH_RCR) {
                know(shift_ri[op][s][1], K_SHIFT, op, s, 0, false);
            }
    for (unsigned s = 0; s < 4; s++) {
        know(imul_rr[s], K_IMUL, 0, s, 0, true);
        know(imul_rri[s], K_IMUL_I, 0, s, 0, true);
        know(mov_rr[s], K_MOV_RR, 0, s, 0, false);
        know(mov_ri[s], K_MOV_RI, 0, s, 0, false);
        know(load_rip[s], K_LOAD_RIP, 0, s, 0, false);
        know(store_rip[s], K_STORE_RIP, 0, s, 0, false);
        for (unsigned f = 0; f < 2; f++) {
            know(load_r[s][f], K_LOAD, 0, s, f, false);
            know(store_r[s][f], K_STORE, 0, s, f, false);
            know(store_i[s][f], K_STORE_I, 0, s, f, false);
            know(lea_r[s][f], K_LEA, 0, s, f, false);
        }
        for (unsigned from = 0; from < 3; from++) {
            know(movsx_rr[from][s], K_MOVSX, from, s, 0, false);
            for (unsigned f = 0; f < 2; f++)
                know(movsx_rm[from][s][f], K_MOVSX_M, from, s, f, false);
        }
        for (unsigned cc = 0; cc < 16; cc++) {
            know(cmov_rr[cc][s], K_CMOV, cc, s, 0, false);
            for (unsigned op = 0; op < FUSE_OPS; op++) {
                know(fused_rr[op][cc][s], K_FUSED_RR, op << 4 | cc, s, 0, true);
                know(fused_ri[op][cc][s], K_FUSED_RI, op << 4 | cc, s, 0, true);
            }
        }
    }
    for (unsigned from = 0; from < 3; from++) {
        know(movzx_rr[from], K_MOVZX, from, 3, 0, false);
        for (unsigned f = 0; f < 2; f++)
            know(movzx_rm[from][f], K_MOVZX_M, from, 3, f, false);
    }
    for (unsigned cc = 0; cc < 16; cc++) {
        know(setcc_r[cc], K_SETCC, cc, 0, 0, false);
        know(jcc_rel[cc], K_JCC, cc, 0, 0, false);
    }
    know(lea_rip, K_LEA_RIP, 0, 3, 0, false);
    know(push64_r, K_PUSH, 0, 3, 0, false);
    know(push64_i, K_PUSH_I, 0, 3, 0, false);
    know(pop64_r, K_POP, 0, 3, 0, false);
    know(bswap32, K_BSWAP, 0, 2, 0, false);
    know(bswap64, K_BSWAP, 0, 3, 0, false);
    know(ea_bd, K_EA, 0, 3, 0, false);
    know(ea_bi, K_EA, 0, 3, 1, false);
    know(ea_rip, K_EA, 1, 3, 0, false);
    know(nop, K_NOP, 0, 0, 0, false);
    know(jmp_rel, K_JMP, 0, 0, 0, false);
    know(jmp_fall, K_FALL, 0, 0, 0, false);
    know(call_rel, K_CALL, 0, 0, 0, false);
    know(ret64, K_RET, 0, 0, 0, false);
}

void meanings_learn(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, learn);
}
