/* Inside of the decoder: shared by decode.c, decode_map.c, decode_alu.c, decode_branch.c and decode_0f.c. */
#ifndef SOFT_DECODE_H
#define SOFT_DECODE_H

#include "soft/ops/helpers.h"
#include "soft/ops/operations.h"

/* Flags as dead-flag elimination sees them. */
enum { FLAG_C = 1, FLAGS_REST = 2, FLAGS_ALL = 3 };

struct uop_meta {
    uint16_t without; /* variant that sets no flags, or OP_NONE */
    uint8_t effects; /* flags it may change */
    uint8_t kills;   /* flags it always overwrites */
    uint8_t reads;
    bool pure;       /* cannot fault, whatever the registers hold */
    bool mark;       /* aux is free: set it when no flags are wanted */
    uint8_t fuse;    /* 1 + FUSE_*: the CMP or TEST of registers (fuse_imm: register and immediate) */
    bool fuse_imm;
};

struct dec {
    struct decoded *out;
    const uint8_t *bytes;
    unsigned available, pos, start; /* start: of the instruction */
    unsigned mode, insn;
    bool c64;
    bool missing; /* bytes beyond `available` were asked for */
    bool bad;     /* #UD */
    bool end;     /* the block ends with this instruction */
    bool fused;   /* the micro-op of the instruction before was taken over */
    /* prefixes */
    uint8_t rex, rep, opcode;
    int seg;
    bool lock, lock_ok, p66;
    unsigned opsize, adsize, stack_size;
    /* ModRM and memory operand */
    bool has_modrm, mem, ea_rip, op_tmp;
    uint8_t modrm, mod, reg, rm;
    uint8_t ea_base, ea_index, ea_scale, ea_seg;
    int32_t ea_disp;
    int rip_fix;  /* micro-op whose imm is relative to the instruction's end, or -1 */
    struct uop_meta meta[BLOCK_MAX_UOPS];
    /* FPU availability was checked already in this block: bit per kind */
    uint8_t fpu_checked;
};

#define LOG2(size) ((unsigned)__builtin_ctz(size))
/* The operand size of opcodes whose lowest bit is "word". */
static inline unsigned width(const struct dec *d) { return d->opcode & 1 ? d->opsize : 1; }

uint8_t dec_u8(struct dec *d);
uint16_t dec_u16(struct dec *d);
uint32_t dec_u32(struct dec *d);
uint64_t dec_u64(struct dec *d);
int64_t dec_imm(struct dec *d, unsigned size);
void dec_modrm(struct dec *d);

struct uop *emit(struct dec *d, unsigned op); /* OP_* */
struct uop *emit_flags(struct dec *d, unsigned op, unsigned without, unsigned effects, unsigned kills, unsigned reads);
struct uop *emit_pure(struct dec *d, unsigned op);
struct uop *impure(struct dec *d, struct uop *u); /* the one just emitted with emit_flags() can fault */
struct uop *emit_helper(struct dec *d, helper_fn helper);
struct uop *emit_helper_store(struct dec *d, helper_fn helper);
struct uop *emit_helper_end(struct dec *d, helper_fn helper);
void emit_links(struct dec *d, int64_t delta);
void emit_address(struct dec *d, unsigned size, bool write);
void emit_load(struct dec *d, unsigned size, unsigned to);
void emit_store(struct dec *d, unsigned size, unsigned from);
int address_form(struct dec *d, unsigned size, bool write);
void operand(struct dec *d, struct uop *u);
unsigned reg_off(const struct dec *d, unsigned n, unsigned size);
unsigned source_rm(struct dec *d, unsigned size);
unsigned rmw_begin(struct dec *d, unsigned size);
void rmw_end(struct dec *d, unsigned size);

void decode_opcode(struct dec *d);      /* decode_map.c */
/* decode_alu.c: operations ALU_*; of r/m and register, register and r/m, a register or r/m and an immediate. */
void decode_alu_rm_reg(struct dec *d, unsigned op, unsigned size);
void decode_alu_reg_rm(struct dec *d, unsigned op, unsigned size);
void decode_alu_reg_imm(struct dec *d, unsigned op, unsigned size, unsigned reg, int64_t imm);
void decode_alu_rm_imm(struct dec *d, unsigned op, unsigned size, int64_t imm);
void decode_inc_dec(struct dec *d, unsigned op, unsigned size);   /* r/m; UN_* */
void decode_shift(struct dec *d, unsigned size, int count);       /* group 2; count -1: CL */
void decode_group3(struct dec *d);
void decode_imul3(struct dec *d, bool byte);                      /* byte: the immediate is one */
/* decode_branch.c: near ones, by a displacement that decode_displacement() reads (a byte, or by operand size). */
int64_t decode_displacement(struct dec *d, bool byte);
void decode_jcc(struct dec *d, unsigned cc, int64_t rel);
void decode_jump_rel(struct dec *d, int64_t rel);
void decode_call_rel(struct dec *d, int64_t rel);
void decode_branch_rm(struct dec *d, bool call);
void decode_ret(struct dec *d, unsigned pop); /* pop: bytes besides the address */
void decode_far_immediate(struct dec *d, helper_fn helper);
void decode_push_seg(struct dec *d, unsigned seg);
void decode_pop_seg(struct dec *d, unsigned seg);
void emit_fpu_check(struct dec *d, unsigned kind); /* decode_0f.c; kind: 0 SSE, 1 MMX, 2 x87 */
void decode_two_byte(struct dec *d);    /* decode_0f.c */
/* C4, C5: false: not a VEX prefix. */
bool decode_vex(struct dec *d);         /* decode_vex.c */
bool dec_has(const struct dec *d, enum vec_feature feature); /* the guest has it */
bool decode_vector(struct dec *d, unsigned map, uint8_t opcode); /* decode_0f.c: true if it was one */

#endif
