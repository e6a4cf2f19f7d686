/* The table of operations: what a micro-op can do. Two columns of it are code: the interpreter's handlers and the
 * translator's emitters. Both are found by the row's names, so a row without its handler, or with an emitter that does
 * not exist, does not link.
 *
 * Included many times, so without a guard: define the macros whose rows are wanted, the others say nothing.
 *
 * OPERATION(name, operators, sizes, flags, forms, emitter): a family of operations that have their handlers in one array
 *     `name` [operators][sizes][flags][forms] (dimensions of 1 left out). Sizes are log2
 *     of bytes. flags 2: the second variant sets no arithmetic flags. forms 2: the memory operand is base + displacement,
 *     or base + (index << scale) + displacement, both in 64-bit mode without a segment base; everything else is an
 *     operation of ea_* that computes the linear address into tmp[0] followed by form 0 on OFF_T0.
 *     emitter: emit_<emitter>() in jit/ makes host code; none: the handler runs.
 * SINGLE(name, emitter): a family of one; `name` is its handler.
 * INSTRUCTION(name, map, prefix, opcode, feature, flags, emitter, { body }): besides, an instruction "register, register
 *     or memory" of 2, 4 or 8 bytes by operand size that has an opcode for itself. prefix: 0xF2, 0xF3, or 0: whatever
 *     others of the opcode have not. feature: it is decoded as this one only for a guest whose CPUID has that.
 *     flags: FLAG*_, those that it sets, whatever they were (a set of flags of which it keeps one is not among them). The body
 *     is its meaning, and becomes the handler: v is the source, zero-extended; RESULT() sets the destination.
 * VEX_INSTRUCTION(name, map, prefix, opcode, group, feature, flags, { body }): an instruction of general registers of 4 or
 *     8 bytes that has a VEX prefix. v is the operand "register or memory", w the register that VEX.vvvv names. RESULT() sets
 *     the register of ModRM.reg; or, where that is part of the opcode (group; else -1), the one that VEX.vvvv names.
 * FEATURE(name, leaf, index, register, bit): a bit of CPUID that decides how bytes are decoded, and that this core has.
 * HOST_FEATURE(...): the same, of instructions that the host's processor computes: the core has it where the host has.
 */
#ifndef OPERATION
#define OPERATION(...)
#endif
#ifndef SINGLE
#define SINGLE(name, emitter) OPERATION(name, 1, 1, 1, 1, emitter)
#endif
#ifndef INSTRUCTION
#define INSTRUCTION(name, map, prefix, opcode, feature, flags, emitter, ...) SINGLE(name, emitter)
#endif
#ifndef VEX_INSTRUCTION
#define VEX_INSTRUCTION(name, map, prefix, opcode, group, feature, flags, ...) SINGLE(name, none)
#endif
#ifndef FEATURE
#define FEATURE(...)
#endif
#ifndef HOST_FEATURE
#define HOST_FEATURE(name, leaf, index, register, bit) FEATURE(name, leaf, index, register, bit)
#endif

/* Arithmetic and logic (exec_alu.c): ALU_*, UN_*. r0 op= r1, immediate, memory; memory op= r1, immediate. */
OPERATION(alu_rr, ALU_OPS, 4, 2, 1, alu_rr)
OPERATION(alu_ri, ALU_OPS, 4, 2, 1, alu_ri)
OPERATION(alu_rm, ALU_OPS, 4, 2, 2, alu_rm)
OPERATION(alu_mr, ALU_OPS, 4, 2, 2, alu_mr)
OPERATION(alu_mi, ALU_OPS, 4, 2, 2, alu_mi)
OPERATION(unary_r, UN_OPS, 4, 2, 1, unary_r)
OPERATION(unary_m, UN_OPS, 4, 2, 2, unary_m)

/* Shifts, multiplication, division (exec_shift.c): SH_*. By imm (masked, not 0), by CL; size; r0, r1. */
OPERATION(shift_ri, SH_OPS, 4, 2, 1, shift_ri)
OPERATION(shift_rc, SH_OPS, 4, 1, 1, shift_rc) /* aux 1: nobody wants flags */
SINGLE(shld_ri, none)
SINGLE(shld_rc, none)
SINGLE(shrd_ri, none)
SINGLE(shrd_rc, none)
OPERATION(imul_rr, 1, 4, 1, 1, imul_rr)   /* r0 *= r1 (16, 32, 64 bits) */
OPERATION(imul_rri, 1, 4, 1, 1, imul_rri) /* r0 = r1 * imm */
OPERATION(mul_r, 1, 4, 1, 1, none)        /* rDX:rAX by r1 */
OPERATION(imul_r, 1, 4, 1, 1, none)
OPERATION(div_r, 1, 4, 1, 1, none)
OPERATION(idiv_r, 1, 4, 1, 1, none)

/* Moves (exec_mem.c). Operators of movzx and movsx: the source's size; movzx is to 64 bits. */
OPERATION(mov_rr, 1, 4, 1, 1, mov_rr)
OPERATION(mov_ri, 1, 4, 1, 1, mov_ri)
OPERATION(load_r, 1, 4, 1, 2, load_r)
OPERATION(store_r, 1, 4, 1, 2, store_r)
OPERATION(store_i, 1, 4, 1, 2, store_i)
OPERATION(load_rip, 1, 4, 1, 1, load_rip)
OPERATION(store_rip, 1, 4, 1, 1, store_rip)
OPERATION(movzx_rr, 3, 1, 1, 1, movzx_rr)
OPERATION(movsx_rr, 3, 4, 1, 1, movsx_rr)
OPERATION(movzx_rm, 3, 1, 1, 2, movzx_rm)
OPERATION(movsx_rm, 3, 4, 1, 2, movsx_rm)
OPERATION(movzx8_16, 3, 1, 1, 1, none)    /* operators: register, form 0, form 1 */
OPERATION(lea_r, 1, 4, 1, 2, lea_r)       /* 16, 32, 64 bits */
SINGLE(lea_rip, lea_rip)
SINGLE(lea_mask, none)     /* imm: address mask; size */
SINGLE(ea_bd, ea_bd)       /* these, and no others, set tmp[0] */
SINGLE(ea_bi, ea_bi)
SINGLE(ea_rip, ea_rip)
SINGLE(ea_seg, ea_seg)
SINGLE(ea_abs, ea_abs)
SINGLE(ea_a32, none)
SINGLE(ea_a32_rip, none)
SINGLE(ea_a64_rip, ea_a64_rip)
SINGLE(ea_legacy, none)
SINGLE(rmw_load, rmw_load) /* size: probe [tmp0] for writing, load it to tmp1 */
SINGLE(rmw_store, rmw_store) /* size: tmp1 to [tmp0] */
SINGLE(push64_r, push64_r)
SINGLE(push64_i, push64_i)
SINGLE(pop64_r, pop64_r)
SINGLE(leave64, none)
OPERATION(xchg_rr, 1, 4, 1, 1, xchg_rr)
OPERATION(cmov_rr, 16, 4, 1, 1, cmov_rr)  /* operators: conditions; 16, 32, 64 bits */
OPERATION(setcc_r, 16, 1, 1, 1, setcc_r)
SINGLE(bswap16, none)
SINGLE(bswap32, bswap32)
SINGLE(bswap64, bswap64)
SINGLE(movbe16, none)
SINGLE(movbe32, none)
SINGLE(movbe64, none)
SINGLE(cbw, none)
SINGLE(cwde, none)
SINGLE(cdqe, cdqe)
SINGLE(cwd, none)
SINGLE(cdq, cdq)
SINGLE(cqo, cqo)
SINGLE(fence, none)
SINGLE(nop, nop)

/* Branches of 64-bit mode (exec_branch.c). Operators: conditions; of fused ones FUSE_* << 4 | condition (not all exist). */
SINGLE(jmp_rel, jmp_rel)   /* linked */
SINGLE(jmp_fall, jmp_fall) /* the block is full; idx: its last instruction's */
SINGLE(call_rel, call_rel)
SINGLE(ret64, ret64)       /* imm: bytes to pop besides the address */
SINGLE(jmp_r, jmp_r)       /* r1 */
SINGLE(call_r, call_r)
OPERATION(jcc_rel, 16, 1, 1, 1, jcc_rel)
OPERATION(fused_rr, FUSE_OPS * 16, 4, 1, 1, fused_rr)
OPERATION(fused_ri, FUSE_OPS * 16, 4, 1, 1, fused_ri)

/* Bits (exec_misc.c): size. aux of bt_*: 0 BT, 1 BTS, 2 BTR, 3 BTC. */
SINGLE(bt_ri, none)
SINGLE(bt_rr, none)
SINGLE(xadd, none)
SINGLE(cmpxchg_m, cmpxchg_m) /* without LOCK: [tmp0] with rAX, r1 into it; size */
/* Undefined flags of BSF and BSR: AMD processors compute PF from the result and clear the rest (0x100 keeps the lazy ZF
 * clear without touching PF). The destination of a zero source is unchanged. */
INSTRUCTION(bsf, 0x0F, 0, 0xBC, ALWAYS, FLAGS_ALL, none, {
    uint64_t r = v ? (uint64_t)__builtin_ctzll(v) : 0;
    c->lf[0] = v ? r | 0x100 : 0;
    c->lf[1] = c->lf[2] = 0;
    if (v)
        RESULT(r);
})
INSTRUCTION(bsr, 0x0F, 0, 0xBD, ALWAYS, FLAGS_ALL, none, {
    uint64_t r = v ? 63u - (uint64_t)__builtin_clzll(v) : 0;
    c->lf[0] = v ? r | 0x100 : 0;
    c->lf[1] = c->lf[2] = 0;
    if (v)
        RESULT(r);
})
FEATURE(LZCNT, 0x80000001, 0, ecx, 5)
/* Undefined flags of LZCNT: AMD processors keep OF and clear SF, AF and PF. So all flags that live behind it do before it. */
INSTRUCTION(lzcnt, 0x0F, 0xF3, 0xBD, LZCNT, 0, lzcnt, {
    unsigned bits = u->size * 8, r = v ? (unsigned)__builtin_clzll(v) - (64 - bits) : bits;
    flags_set_arith(c, (v ? 0 : F_CF) | (r ? 0 : F_ZF) | (flag_of(c) ? F_OF : 0));
    RESULT(r);
})
FEATURE(POPCNT, 1, 0, ecx, 23)
INSTRUCTION(popcnt, 0x0F, 0xF3, 0xB8, POPCNT, FLAGS_ALL, none, {
    uint64_t n = v - (v >> 1 & 0x5555555555555555);
    n = (n & 0x3333333333333333) + (n >> 2 & 0x3333333333333333);
    n = ((n + (n >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56;
    flags_set_arith(c, v ? 0 : F_ZF);
    RESULT(n);
})

/* TZCNT is BSF without BMI1. Undefined flags of BMI1 and BMI2: see docs/processor.md. */
FEATURE(BMI1, 7, 0, ebx, 3)
INSTRUCTION(tzcnt, 0x0F, 0xF3, 0xBC, BMI1, 0, none, {
    unsigned bits = u->size * 8, r = v ? (unsigned)__builtin_ctzll(v) : bits;
    flags_set_arith(c, (v ? 0 : F_CF) | (r ? 0 : F_ZF) | (flag_of(c) ? F_OF : 0));
    RESULT(r);
})
VEX_INSTRUCTION(andn, 0x38, 0, 0xF2, -1, BMI1, FLAGS_ALL, {
    uint64_t r = ~w & v;
    flags_set_result(c, r, u->size, false);
    RESULT(r);
})
VEX_INSTRUCTION(blsr, 0x38, 0, 0xF3, 1, BMI1, FLAGS_ALL, {
    uint64_t r = v & (v - 1);
    flags_set_result(c, r, u->size, v == 0);
    RESULT(r);
})
VEX_INSTRUCTION(blsmsk, 0x38, 0, 0xF3, 2, BMI1, FLAGS_ALL, {
    uint64_t r = v ^ (v - 1);
    flags_set_result(c, r, u->size, v == 0);
    RESULT(r);
})
VEX_INSTRUCTION(blsi, 0x38, 0, 0xF3, 3, BMI1, FLAGS_ALL, {
    uint64_t r = v & -v;
    flags_set_result(c, r, u->size, v != 0);
    RESULT(r);
})
/* Undefined flags of BEXTR: AMD processors set AF, clear SF, and compute PF from the result. */
VEX_INSTRUCTION(bextr, 0x38, 0, 0xF7, -1, BMI1, FLAGS_ALL, {
    unsigned start = w & 0xFF, length = w >> 8 & 0xFF;
    uint64_t r = start < 64 ? v >> start : 0;
    if (length < 64)
        r &= (1ull << length) - 1;
    flags_set_result(c, r, u->size, false);
    c->lf[2] = 8 | (c->lf[0] & 1ull << 63);
    RESULT(r);
})
FEATURE(BMI2, 7, 0, ebx, 8)
VEX_INSTRUCTION(bzhi, 0x38, 0, 0xF5, -1, BMI2, FLAGS_ALL, {
    unsigned n = w & 0xFF;
    uint64_t r = n < u->size * 8u ? v & ((1ull << n) - 1) : v;
    flags_set_result(c, r, u->size, n >= u->size * 8u);
    RESULT(r);
})
VEX_INSTRUCTION(pext, 0x38, 0xF3, 0xF5, -1, BMI2, 0, {
    uint64_t r = 0;
    for (unsigned n = 0; v; v &= v - 1, n++)
        r |= (w >> __builtin_ctzll(v) & 1) << n;
    RESULT(r);
})
VEX_INSTRUCTION(pdep, 0x38, 0xF2, 0xF5, -1, BMI2, 0, {
    uint64_t r = 0;
    for (unsigned n = 0; v; v &= v - 1, n++)
        r |= (v & -v) * (w >> n & 1);
    RESULT(r);
})
VEX_INSTRUCTION(mulx, 0x38, 0xF2, 0xF6, -1, BMI2, 0, { /* the high half wins where both destinations are one */
    unsigned __int128 r = (unsigned __int128)v * get_reg(c, RDX * 8, u->size);
    set_reg(c, u->base, u->size, (uint64_t)r);
    RESULT(u->size == 8 ? (uint64_t)(r >> 64) : (uint64_t)r >> 32);
})
VEX_INSTRUCTION(shlx, 0x38, 0x66, 0xF7, -1, BMI2, 0, { RESULT(v << (w & (u->size * 8u - 1))); })
VEX_INSTRUCTION(sarx, 0x38, 0xF3, 0xF7, -1, BMI2, 0, { RESULT((uint64_t)(sign_extend(v, u->size) >> (w & (u->size * 8u - 1)))); })
VEX_INSTRUCTION(shrx, 0x38, 0xF2, 0xF7, -1, BMI2, 0, { RESULT(v >> (w & (u->size * 8u - 1))); })
VEX_INSTRUCTION(rorx, 0x3A, 0xF2, 0xF0, -1, BMI2, 0, {
    unsigned bits = u->size * 8, n = u->imm & (bits - 1);
    RESULT(n ? v >> n | v << (bits - n) : v);
})
/* AVX and what comes with it (fpu/avx.h). All or none of the first four are there. */
HOST_FEATURE(AVX, 1, 0, ecx, 28)
HOST_FEATURE(AVX2, 7, 0, ebx, 5)
HOST_FEATURE(FMA, 1, 0, ecx, 12)
HOST_FEATURE(F16C, 1, 0, ecx, 29)
HOST_FEATURE(AES, 1, 0, ecx, 25)
HOST_FEATURE(PCLMUL, 1, 0, ecx, 1)
HOST_FEATURE(SHA, 7, 0, ebx, 29)
HOST_FEATURE(VAES, 7, 0, ecx, 9)
HOST_FEATURE(VPCLMUL, 7, 0, ecx, 10)
SINGLE(vex_available, vex_available) /* aux 0: of general registers; 1: AVX: #UD, #NM */

/* x87, MMX and SSE (exec_fpu.c, exec_vec.c): r0, r1 are numbers of XMM registers; ptr: struct vec_op. */
SINGLE(vec_copy, none)
SINGLE(vec_rr, none)
SINGLE(fpu_available, none) /* aux: 0 SSE, 1 MMX, 2 x87: #UD, #NM */
/* Operators: vec_op.id of frequent operations (not all exist); forms: of registers without and with REX.W, of memory. */
OPERATION(vec_fast, FPU_VECTOR_OPS, 1, 1, 4, none)

/* With a VEX prefix (exec_avx.c); ptr: struct avx_op. */
SINGLE(avx_rr, avx_rr)
OPERATION(avx_rm, 1, 1, 1, 2, avx_rm)
SINGLE(avx_mask, avx_mask)
OPERATION(avx_load, 1, 1, 1, 2, avx_load)
OPERATION(avx_store, 1, 1, 1, 2, avx_store)
SINGLE(avx_zero_upper, avx_zero_upper)
SINGLE(avx_other, avx_other)       /* as call_helper, which the next micro-op goes with; those of avx_repeats() */
SINGLE(avx_other_store, avx_other) /* as call_helper_store */

/* Calls of plain functions (helpers.h). In a helper state is in SYNC; the micro-op has its operands. */
SINGLE(call_helper, none)       /* ptr: helper; goes on with the next micro-op */
SINGLE(call_helper_store, none) /* goes on, unless the helper wrote code */
SINGLE(call_helper_end, none)   /* the helper has set c->rip; ends the block; the mode may have changed */

#undef OPERATION
#undef SINGLE
#undef INSTRUCTION
#undef VEX_INSTRUCTION
#undef FEATURE
#undef HOST_FEATURE
