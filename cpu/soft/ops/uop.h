/* Micro-ops: what decode/ makes of instructions, block.c keeps and interp/ and jit/ run.
 *
 * A micro-op's `fn` does its work and ends with a tail call to the next one's, so that a block runs without returning
 * and without using the host's stack. `rip` (a host register throughout) is the address of the block's first
 * instruction: micro-ops know addresses only relative to it, so a block serves every linear address its page has.
 *
 * Accounting: c->budget is charged when a block is left, by the number of instructions that were completed
 * (`idx` + 1). Before a call that can raise, look at the clock or stop, SYNC makes c->rip and c->budget exact.
 *
 * Dead flags: a micro-op whose arithmetic flags are overwritten later in its block, with nothing between that reads them
 * or can fault, is run in a variant that does not set them.
 */
#ifndef SOFT_UOP_H
#define SOFT_UOP_H

#include "soft/cpu.h"
#include "soft/ops/flags.h"

typedef void (*uop_fn)(struct soft_vcpu *c, struct uop *u, uint64_t rip);

struct uop {
    union {
        uop_fn fn;
        uint64_t op;     /* until block.c has it: what decode.c made it, OP_* (operations.h) */
    };
    uint8_t r0, r1;      /* byte offsets of register operands in struct soft_vcpu (AH is RAX + 1) */
    uint8_t base, index; /* of the address: byte offsets of 64-bit registers, or OFF_ZERO */
    uint8_t scale;       /* 0 to 3 */
    uint8_t seg;         /* SEG_*, of the memory operand */
    uint8_t idx;         /* instructions before this one in the block */
    uint8_t len;         /* of the instruction, bytes */
    union {
        uint64_t imm;
        const void *ptr;
    };
    int32_t disp;
    uint16_t off;        /* of the instruction from the block's start, bytes */
    uint8_t size;        /* operand size in bytes, for micro-ops that serve several */
    uint8_t aux;
};
_Static_assert(sizeof(struct uop) == 32, "half of a cache line");

/* The last micro-op of a block that ends with a direct jump is followed by this instead of a micro-op. */
struct uop_links {
    struct uop *taken, *next; /* first micro-ops of the successors, when in the same page and known */
    struct block *block;
    int64_t delta;            /* taken target - block start */
};
_Static_assert(sizeof(struct uop_links) == sizeof(struct uop), "takes a micro-op's place");
#define LINKS(u) ((struct uop_links *)((u) + 1))

enum {
    OFF_ZERO = offsetof(struct soft_vcpu, zero),
    OFF_T0 = offsetof(struct soft_vcpu, tmp[0]),
    OFF_T1 = offsetof(struct soft_vcpu, tmp[1]),
    OFF_T2 = offsetof(struct soft_vcpu, tmp[2]),
};
_Static_assert(offsetof(struct soft_vcpu, gpr) == 0 && OFF_T2 < 256, "register operands are byte offsets");

/* How block code depends on the processor's mode, and on its CPUID (FEATURE_*, operations.h); part of a block's key. */
#define MODE_FEATURE(n) (1u << (8 + (n)))
enum { MODE_CODE64 = 1, MODE_DB = 2 /* CS.D */, MODE_SS32 = 4 /* SS.B */, MODE_USER = 8 /* not for decoding */,
       MODE_SINGLE = 16 /* blocks of one instruction */ };
enum { BLOCK_MAX_INSNS = 48, BLOCK_MAX_UOPS = 160, INSN_MAX_UOPS = 12 };

struct block {
    struct block *hash_next, *page_next;
    const uint8_t *host;    /* of the first byte: with mode, the key */
    const uint8_t *host2;   /* page-crossing instruction: start of the second page */
    uop_fn first;           /* the first micro-op's own handler */
    uint16_t bytes;
    uint16_t count;         /* micro-ops */
    uint16_t entered;       /* times, until it is translated */
    uint8_t insns;
    bool flags_in;          /* it may read arithmetic flags that it has not set */
    uint32_t mode;
    bool linked;            /* a struct uop_links is the last of `code` */
    bool stops;             /* the caller may have a breakpoint at its start */
    bool in_loop;           /* another block's host code has it, as a part of a loop */
    uint8_t flags_entry;    /* the translator's: where it wants flags that it has not set */
    uop_fn word_fn;         /* code[0].fn for host code that has flags elsewhere (jit/translate_flags.c) */
    struct uop code[];      /* behind them block_ops() */
};
enum { BLOCK_WORD_FN = (int)offsetof(struct block, word_fn) - (int)offsetof(struct block, code) };
_Static_assert(BLOCK_WORD_FN == -(int)sizeof(uop_fn), "word_fn stands right before code, as in struct empty_entry");
/* Operations of the micro-ops, for the translator. */
static inline uint16_t *block_ops(struct block *k) { return (uint16_t *)(k->code + k->count); }
/* Of the last micro-op, or NULL. */
static inline struct uop_links *block_links(struct block *k)
{
    return k->linked ? (struct uop_links *)(k->code + k->count - 1) : NULL;
}

/* ---- decode.c ---- */
struct decoded {
    struct uop uops[BLOCK_MAX_UOPS];
    unsigned count, insns, bytes;
    bool flags_in;
    int links;      /* index of the struct uop_links, which is the last, or -1 */
    bool need_more; /* not even the first instruction is complete in the bytes given */
};
/* Decode at most max_insns instructions from `available` bytes (up to a page's end; at least 15, or all there are).
 * An instruction of which bytes are missing is left out. mode: MODE_*. */
void decode_block(struct decoded *d, const uint8_t *bytes, unsigned available, unsigned mode, unsigned max_insns);

/* ---- block.c ---- */
/* Go on at c->rip through the jump cache or the block cache; returns when budget or attention ask for it. */
void block_enter(struct soft_vcpu *c, struct uop *u, uint64_t rip);
/* The successor of a direct jump was not linked yet: c->rip is it; link it if that is possible, and go on. */
void block_link_taken(struct soft_vcpu *c, struct uop *u, uint64_t rip);
void block_link_next(struct soft_vcpu *c, struct uop *u, uint64_t rip);
/* Code bytes were written since the block was entered (a store's slow path asks; reading clears). */
bool block_code_changed(struct soft_vcpu *c);

/* ---- jump.c ---- */
/* What an empty entry of a jump cache leads to; it enters c->rip. */
extern struct empty_entry {
    uop_fn word_fn; /* as in struct block */
    struct uop code;
} empty_entry;
#define empty_jump empty_entry.code
/* Code at `linear` into the current table. crosses: the instruction there goes on in the next page. */
void soft_jump_insert(struct soft_vcpu *c, uint64_t linear, struct uop *code, bool crosses);

static inline unsigned jump_hash(uint64_t rip) { return (unsigned)((rip ^ (rip >> 12)) & (JUMP_SIZE - 1)); }

/* Handlers have a section of their own so that tests/unit/test_soft_handlers.py finds them in the object code. */
#define HANDLER_ARGUMENTS struct soft_vcpu *c, struct uop *u, uint64_t rip
#ifdef __SANITIZE_THREAD__ /* what they share is guest memory, and they end in tail calls */
#define UNCHECKED no_sanitize_thread,
#else
#define UNCHECKED
#endif
#define HANDLER(name) __attribute__((UNCHECKED section("soft_handlers"))) void name(HANDLER_ARGUMENTS)
#define SLOW_HANDLER(name) __attribute__((UNCHECKED noinline, cold, section("soft_slow"))) void name(HANDLER_ARGUMENTS)

#endif
