/* Instructions that are plain functions: called by the call_helper* micro-ops with state in SYNC (c->rip is the
 * instruction, c->budget exact), so they may raise anywhere before they change state.
 * Operands: r0, r1 registers; size; disp an immediate; aux; tmp[0] the linear address of a memory operand. */
#ifndef SOFT_HELPERS_H
#define SOFT_HELPERS_H

#include "soft/ops/uop.h"

typedef void (*helper_fn)(struct soft_vcpu *c, struct uop *u);
#define HELPER(name) void name(struct soft_vcpu *c, __attribute__((unused)) struct uop *u)

static inline uint64_t next_rip(const struct soft_vcpu *c, const struct uop *u)
{
    uint64_t next = c->rip + u->len;
    return c->code64 ? next : next & UINT32_MAX;
}

/* exec_legacy.c: the stack and branches in every mode. size: operand size */
HELPER(h_push_r); HELPER(h_push_i); HELPER(h_push_m); HELPER(h_pop_r); HELPER(h_pop_m); HELPER(h_push_seg); HELPER(h_pop_seg);
HELPER(h_pusha); HELPER(h_popa); HELPER(h_pushf); HELPER(h_popf); HELPER(h_enter); HELPER(h_leave);
HELPER(h_jmp_rel); HELPER(h_jcc_rel); HELPER(h_call_rel); HELPER(h_jmp_r); HELPER(h_call_r); HELPER(h_ret);
HELPER(h_loop);      /* aux: 0 LOOPNE, 1 LOOPE, 2 LOOP, 3 JCXZ; base: address size in bytes */
HELPER(h_fall);
HELPER(h_jmp_far); HELPER(h_call_far);     /* immediate: disp, r0 | r1 << 8 is the selector */
/* With REX.W the offset in memory has 64 bits as on Intel's processors. AMD's read 32 (APM vol. 3, CALL (Far), JMP (Far)), on
 * which no program relies; kvm-unit-tests' `emulator` relies on 64. */
HELPER(h_jmp_far_m); HELPER(h_call_far_m); HELPER(h_ret_far); HELPER(h_iret);
HELPER(h_load_far);  /* LDS...: aux: segment; tmp[0] points to offset and selector */
HELPER(h_mov_to_seg); HELPER(h_mov_to_seg_m); HELPER(h_mov_from_seg); HELPER(h_mov_from_seg_m);
HELPER(h_int3); HELPER(h_int); HELPER(h_into); HELPER(h_icebp); HELPER(h_ud); HELPER(h_gp);
HELPER(h_clc); HELPER(h_stc); HELPER(h_cmc); HELPER(h_cld); HELPER(h_std); HELPER(h_cli); HELPER(h_sti);
HELPER(h_lahf); HELPER(h_sahf); HELPER(h_bound); HELPER(h_arpl_r); HELPER(h_arpl_m);

/* exec_misc.c */
HELPER(h_daa); HELPER(h_das); HELPER(h_aaa); HELPER(h_aas); HELPER(h_aam); HELPER(h_aad); HELPER(h_salc); HELPER(h_xlat);
HELPER(h_bt_m);              /* a bit string by r1; aux: 0 BT, 1 BTS, 2 BTR, 3 BTC; base: address size; scale: locked */
HELPER(h_crc32);
HELPER(h_cmpxchg); HELPER(h_cmpxchg8b); HELPER(h_cmpxchg16b);
HELPER(h_rdrand); HELPER(h_cpuid); HELPER(h_rdtsc); HELPER(h_rdtscp); HELPER(h_rdpmc);

/* exec_lock.c: with LOCK; XCHG always is. aux: ALU_*, UN_*, of a bit as above; index: the operand is disp, else r1 */
HELPER(h_lock_alu); HELPER(h_lock_unary); HELPER(h_lock_bit); HELPER(h_lock_xadd); HELPER(h_xchg_m);
HELPER(h_lock_cmpxchg); HELPER(h_lock_cmpxchg8b); HELPER(h_lock_cmpxchg16b);
/* The old value of an operand of which a bit is changed. */
uint64_t soft_locked_bit(struct soft_vcpu *c, uint64_t at, unsigned size, unsigned op, unsigned bit);

/* exec_sys.c */
HELPER(h_in); HELPER(h_out);               /* disp: port, or -1: DX */
HELPER(h_hlt); HELPER(h_pause); HELPER(h_monitor); HELPER(h_mwait);
HELPER(h_mov_from_cr); HELPER(h_mov_to_cr); HELPER(h_mov_from_dr); HELPER(h_mov_to_dr); HELPER(h_clts); HELPER(h_lmsw); HELPER(h_smsw);
HELPER(h_smsw_m);
HELPER(h_sgdt); HELPER(h_sidt); HELPER(h_lgdt); HELPER(h_lidt); HELPER(h_sldt); HELPER(h_str); HELPER(h_lldt); HELPER(h_ltr);
HELPER(h_sldt_m); HELPER(h_str_m);
HELPER(h_verr); HELPER(h_verw); HELPER(h_lar); HELPER(h_lsl);
HELPER(h_invlpg); HELPER(h_invpcid); HELPER(h_wbinvd); HELPER(h_swapgs); HELPER(h_clac); HELPER(h_stac);
HELPER(h_syscall); HELPER(h_sysret); HELPER(h_sysenter); HELPER(h_sysexit); HELPER(h_rdmsr); HELPER(h_wrmsr);
HELPER(h_xgetbv); HELPER(h_xsetbv); HELPER(h_vmcall); HELPER(h_clflush); HELPER(h_fsgsbase);

/* exec_fpu.c: ptr is the helper, so the operation's table entry is in the micro-op that follows */
HELPER(h_fpu_check);                       /* aux: 0 SSE, 1 MMX, 2 x87: #UD, #NM */
HELPER(h_vector); HELPER(h_x87); HELPER(h_fwait);
HELPER(h_fxsave); HELPER(h_fxrstor); HELPER(h_xsave); HELPER(h_xrstor); HELPER(h_ldmxcsr); HELPER(h_stmxcsr);

/* exec_avx.c: the next micro-op has the operation */
HELPER(h_avx_stub); HELPER(h_avx_move);

/* string.c: size: element; aux: STR_*; r0: 0 none, 1 REPE, 2 REPNE; base: address size; seg: of the source */
enum { STR_MOVS, STR_CMPS, STR_STOS, STR_LODS, STR_SCAS, STR_INS, STR_OUTS };
HELPER(h_string);

#endif
