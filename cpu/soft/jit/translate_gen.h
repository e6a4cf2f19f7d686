/* Making host code: the x86-64 encoder, guest registers in host registers, the TLB look-up, the ends of a block; and what
 * translate_flags.c and translate_loop.c add, arithmetic flags and loops.
 *
 * Host registers: RDI vCPU, RDX the block's address, RAX, RCX and RSI scratch, the rest hold guest registers.
 * Operand sizes are log2 of bytes. Opcodes are those of the word forms; a byte form is one less.
 */
#ifndef SOFT_TRANSLATE_GEN_H
#define SOFT_TRANSLATE_GEN_H

#include "soft/ops/operations.h"

enum { H_RAX, H_RCX, H_RDX, H_RBX, H_RSP, H_RBP, H_RSI, H_RDI };
enum { GUESTS = 20, WINDOWS = 3, STUBS = 512, LABELS = 12, JUMPS = 4 * LABELS };
enum { RUN_MAX = 24 << 10 }; /* bytes of a run, and of its stubs */
#define FIELD(f) ((int32_t)offsetof(struct soft_vcpu, f))

/* Of flags that are not lazy: AF as the host has it, clear, or set. */
enum af { AF_HOST, AF_CLEAR, AF_SET };

struct stub {
    struct block *block;       /* whose micro-op it is, */
    int64_t bias;              /* and how far its start is from the address in RDX */
    uint32_t at;               /* of the rel32 that jumps here */
    uint16_t uop;
    uint16_t dirty_count;
    uint8_t leave;             /* not back to the interpreter, but out: c->rip = RDX + delta */
    uint8_t fused;             /* leave: first do the comparison's flags */
    uint8_t flags;             /* they are in the word that LAHF made, not lazy */
    bool vectors;              /* YMM registers are held, */
    uint16_t vectors_dirty;    /* and these are changed */
    int64_t delta;
    struct { uint8_t guest, host; } dirty[10];
};
struct registers {
    int8_t where[GUESTS + WINDOWS]; /* host register of a guest register, or of a window's pointer; or -1 */
    int8_t holds[16];          /* what of these is in a host register, or -1 */
    bool dirty[16];
    uint32_t age[16];
    uint16_t vectors, vectors_dirty; /* YMM registers that the host's of the same number hold (emit_avx.c) */
};
/* Bytes that were looked up in the TLB as one (translate_window.c): those from low to high, as seen from the value that a guest
 * register had then; by now it is higher by `at`. */
struct window {
    uint8_t guest;
    bool write;
    int32_t low, high, at;
};
/* A block of a loop, as it is entered with registers in host registers (translate_loop.c). */
struct label {
    struct block *block;
    uint8_t *at;               /* NULL: not made yet */
    struct registers registers;
};
struct gen {
    uint8_t *start, *p, *end;
    uintptr_t runs, runs_size; /* host code as it runs, all of it, */
    uintptr_t runs_start;      /* and what stands at `start` */
    uint64_t linear;           /* 0, or the address in RDX as a kernel's block is made: likely the only one that it ever has */
    struct block *head;        /* what is being made, */
    struct block *block;       /* and which block of a loop */
    int64_t bias;              /* of its start from the address in RDX */
    struct uop *code;          /* its micro-ops, and their operations */
    const uint16_t *ops;
    unsigned uop, count;       /* the one under way, and how many there are */
    bool from_start;           /* the run is all of the block so far */
    struct registers r;
    struct window windows[WINDOWS]; /* those whose pointers are in host registers */
    unsigned at;               /* host register and distance of the operand in memory, behind gen_access() */
    int32_t at_disp;
    uint16_t pinned;
    uint32_t clock;
    bool in_host, in_word, in_lazy; /* where the guest's flags are (translate_flags.c) */
    bool unknown;              /* in_word: the word may say that they are lazy */
    bool result_lazy;          /* not lazy as a whole, but lf[0] is */
    uint8_t af;                /* enum af */
    bool failed, ended;        /* no room; the block's last micro-op was translated */
    struct stub stubs[STUBS];
    unsigned stub_count;
    struct block *loop[LABELS]; /* blocks that may be joined */
    unsigned loop_count;
    struct label labels[LABELS];
    unsigned label_count;
    struct { uint8_t *at; uint8_t label; } jumps[JUMPS]; /* rel32 to fill in */
    unsigned jump_count;
};

static inline void gen_b1(struct gen *g, unsigned v)
{
    if (SOFT_LIKELY(g->p < g->end))
        *g->p++ = (uint8_t)v;
    else
        g->failed = true;
}
static inline void gen_b4(struct gen *g, uint32_t v)
{
    if (SOFT_LIKELY(g->end - g->p >= 4)) {
        __builtin_memcpy(g->p, &v, 4);
        g->p += 4;
    } else {
        g->failed = true;
    }
}
void gen_prefix(struct gen *g, unsigned size, unsigned reg, unsigned index, unsigned base);
/* reg is the ModRM.reg operand. */
void gen_op_rr(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned rm);
void gen_memory(struct gen *g, unsigned reg, unsigned base, int32_t disp);
void gen_op_rm(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned base, int32_t disp);
void gen_op_0f_rr(struct gen *g, unsigned size, unsigned opcode, unsigned reg, unsigned rm);
void gen_mov_imm64(struct gen *g, unsigned reg, uint64_t v);
/* op r/m, imm of group 1 (80, 81, 83) */
void gen_op_imm(struct gen *g, unsigned size, unsigned op, unsigned rm, int64_t imm);
/* YMM registers (a bit each) from the vCPU's memory, and to it; none is held any more (emit_avx.c). */
void gen_vectors_load(struct gen *g, unsigned which);
void gen_vectors_store(struct gen *g, unsigned which);
void gen_vectors_leave(struct gen *g);
/* The host register of a guest register (byte offset); loaded unless it is about to be overwritten entirely. */
unsigned gen_reg_of(struct gen *g, unsigned offset, bool load);
void gen_write_back(struct gen *g);
void gen_end_write_back(struct gen *g); /* at a block's end */
void gen_forget(struct gen *g);
void gen_movsx64(struct gen *g, unsigned size, unsigned to, unsigned from);

/* ---- translate_flags.c ---- */
/* The host's flags are the guest's from now on. */
void gen_new_flags(struct gen *g, enum af af);
/* lf[0] from the result in a register; keeps the host's flags. Uses RAX. */
void gen_result_flags(struct gen *g, unsigned size, unsigned h);
/* mov qword [vCPU + field], v */
void gen_store_field(struct gen *g, int32_t field, uint32_t v);
/* The lazy flags of a subtraction: result in a register, the host's flags. Uses RAX, RCX, RSI. */
void gen_compare_flags(struct gen *g, unsigned size, unsigned h);
/* Nobody wants flags until others are set. */
void gen_no_flags(struct gen *g);
/* Where a block wants flags that it has not set. */
enum flags_entry { ENTRY_UNKNOWN, ENTRY_DEAD /* nowhere */, ENTRY_WORD /* in the word, marked or not */, ENTRY_LAZY };
enum flags_entry gen_flags_entry(struct block *b); /* NULL: any block */
/* Flags where a successor (NULL: any) wants them, and the host's are free. Uses RAX, RCX, RSI. */
void gen_flags_for(struct gen *g, const struct uop *to);
/* Flags are lazy, says the word. */
void gen_mark_lazy(struct gen *g);
/* The host's flags are about to be lost. Uses RAX. */
void gen_clobber(struct gen *g);
/* Make the guest's flags lazy, and the host's free. Uses RAX, RCX, RSI. */
void gen_settle(struct gen *g);
/* Make the host's flags the guest's. False: they are lazy. Uses RAX. */
bool gen_flags_to_host(struct gen *g);
/* The guest's CF in the host's, wherever it is. */
void gen_carry_to_host(struct gen *g);
/* The guest's CF and OF become the host's OF; its other flags, which are not in the host's, stay. Uses RAX, RCX. */
void gen_carry_and_overflow(struct gen *g);
/* lf[1] from the host's flags, of flags that are lazy. Uses RAX, RCX, RSI. */
void gen_lazy_carries(struct gen *g);
/* Where a stub goes: the lazy flags from the word, then on with a handler, or out. */
void host_flags_resume(struct soft_vcpu *c, struct uop *u, uint64_t rip, uop_fn next);
void host_flags_leave(struct soft_vcpu *c);

/* ---- translate_gen.c ---- */
void gen_lea_address(struct gen *g, const struct uop *u, unsigned form, unsigned to, unsigned size);
/* The linear address is in RSI, or `h`: turn it into a host pointer, or go to the interpreter. Flags are lost. Uses RAX, RCX. */
void gen_tlb(struct gen *g, unsigned bytes, enum soft_kind kind);
void gen_tlb_at(struct gen *g, unsigned h, unsigned bytes, enum soft_kind kind);
/* To the micro-op's handler, on a condition. */
void gen_to_handler(struct gen *g, unsigned cc);
/* An operand in memory, which is then at [g->at + g->at_disp], or to the handler: `size` (log2) bytes at the address that the
 * micro-op forms, or u->size bytes at tmp[0]. Flags are lost, unless they are kept as g->in_host says. */
void gen_access(struct gen *g, const struct uop *u, unsigned form, unsigned size, enum soft_kind kind);
void gen_access_tmp(struct gen *g, const struct uop *u, enum soft_kind kind);
/* The same of 8 bytes on the stack, at a distance from RSP. */
void gen_access_stack(struct gen *g, const struct uop *u, int32_t disp, enum soft_kind kind);
/* The same by a look-up of its own, at RSI. */
void gen_access_alone(struct gen *g, const struct uop *u, unsigned form, unsigned size, enum soft_kind kind);
void gen_rip_address(struct gen *g, const struct uop *u, unsigned to);
/* Charge the budget, look for attention; out through a stub when due. */
void gen_due(struct gen *g, const struct uop *u, int64_t delta, bool fused);
void gen_budget(struct gen *g, const struct uop *u, int64_t delta, bool fused); /* the budget alone */
void gen_add_rip(struct gen *g, unsigned to, int64_t delta);
/* The block of its first micro-op, or NULL for NULL. */
static inline struct block *gen_block_of(const struct uop *first)
{
    return !first ? NULL : (struct block *)((char *)(uintptr_t)first - offsetof(struct block, code));
}
/* The successor's address is in RCX: find it in the jump cache (RAX: entry), else go to the interpreter. */
void gen_probe(struct gen *g);
/* To the block of the jump cache's entry in RAX; its address is in RDX. Uses RSI. */
void gen_jump_cached(struct gen *g);
/* The same for a fixed address: `delta` from the block's start. */
void gen_probe_fixed(struct gen *g, int64_t delta);
void gen_jump_fixed(struct gen *g, int64_t delta); /* uses RAX, too */
/* RAX: the jump cache's entry for the linear address in a register. */
void gen_jump_entry(struct gen *g, unsigned address);
/* To a fixed successor. */
void gen_go(struct gen *g, const struct uop *u, bool taken, bool fused);

/* ---- translate_window.c ---- */
/* The operand in memory of the micro-op under way by a window that there is or that pays: as gen_access(). False: neither. */
bool gen_window(struct gen *g, const struct uop *u);
/* A micro-op was made: what has become of the registers that windows are seen from. */
void gen_windows_follow(struct gen *g, const struct uop *u, unsigned op);
void gen_windows_forget(struct gen *g);

/* ---- translate_loop.c ---- */
/* Find the loop that a block begins: g->loop, without blocks if there is none. */
void gen_find_loop(struct gen *g, struct block *head);
/* Whether a block's successor is one of the loop. */
bool gen_in_loop(const struct gen *g, const struct uop *to);
/* The way to a successor in the loop: registers stay where they are, or come where it expects them. */
void gen_loop_edge(struct gen *g, const struct uop *u, struct uop *to, int64_t delta, bool fused);
/* A block of the loop that is to be made now, at g->p; NULL: none is left, and jumps between them are complete. */
struct block *gen_loop_next(struct gen *g);

#endif
