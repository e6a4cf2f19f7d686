/* A native oracle for user-mode instructions: generated instructions run on the host's processor and on the software
 * core from the same state, and every register, flag, byte of memory and fault is compared.
 *
 * native.c runs one instruction in this process under signal handlers; guest.c runs it in a vCPU at CPL 3, of the
 * software core (core.c) or of the host's KVM (kvm.c); direct.c calls the FPU's operations without decoder; generate.c
 * makes the instructions, sequence.c programs of several. vendors.c and vendors_fpu.c say where processors of AMD and Intel
 * may differ, compare.c compares under that, foreign.c makes an Intel host of an AMD one; main.c runs it all.
 */
#ifndef ORACLE_H
#define ORACLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    CODE_BASE = 0x10000000, CODE_SIZE = 0x2000,
    DATA_BASE = 0x20000000, DATA_SIZE = 0x3000, /* two writable pages, then a read-only one; the rest unmapped */
    DATA_WRITABLE = 0x2000,
    STACK_BASE = 0x30000000, STACK_SIZE = 0x1000,
};

struct cpu_state {
    uint64_t gpr[16]; /* in encoding order: RAX RCX RDX RBX RSP RBP RSI RDI R8... */
    uint64_t rip, rflags;
    uint8_t fx[512] __attribute__((aligned(16))); /* FXSAVE64 image */
    uint8_t high[16][16];                         /* upper halves of YMM registers */
    /* how it ended */
    uint32_t vector, error;
    uint64_t cr2;
};

struct memory {
    uint8_t data[DATA_SIZE];
    uint8_t stack[STACK_SIZE];
};

enum { MAP_ONE, MAP_0F, MAP_0F38, MAP_0F3A, MAP_COUNT };

struct insn {
    uint8_t bytes[112];
    unsigned length;
    unsigned offset; /* in the code pages */
    bool mode32;
    bool program; /* several instructions */
    bool vex;     /* map and opcode are those of VEX.mmmmm */
    /* what direct.c needs of it */
    uint8_t map, opcode, prefix /* as enum vec_prefix */, rex, modrm, imm;
    bool operand16, has_modrm, other_prefixes;
    uint64_t ea;
};

struct rng { uint64_t s; };
static inline uint64_t rng_next(struct rng *r) /* splitmix64 */
{
    uint64_t z = r->s += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}
static inline unsigned rng_below(struct rng *r, unsigned n) { return (unsigned)((rng_next(r) >> 32) * n >> 32); }
static inline bool rng_one_in(struct rng *r, unsigned n) { return rng_below(r, n) == 0; }

/* generate.c: a slot is (map, opcode, prefix, REX.W). false: the instruction is not compared (a system call, state that
 * the two sides do not share, an extension that the core does not offer). */
bool generate(struct rng *r, unsigned map, unsigned opcode, unsigned prefix, bool rex_w, bool mode32, int modrm,
              struct insn *insn, struct cpu_state *state, struct memory *memory);
/* vex.c: the same with a VEX prefix; prefix: VEX.pp as enum vec_prefix orders it. */
bool generate_vex(struct rng *r, unsigned map, unsigned opcode, unsigned prefix, bool w, bool l, bool mode32, struct insn *insn,
                  struct cpu_state *state, struct memory *memory);
void any_operand(struct rng *r, uint8_t *to); /* 16 bytes of one kind of operand */
uint64_t any_address(struct rng *r);
/* An instruction without bytes yet: what it is, and where in the code pages, now and then across their boundary. */
void insn_begin(struct rng *r, struct insn *insn, unsigned map, unsigned opcode, unsigned prefix, bool mode32);
void insn_put(struct insn *insn, uint64_t value, unsigned size);
/* ModRM, SIB and displacement for insn->ea; sets the registers that it needs. */
void memory_operand(struct rng *r, struct insn *insn, struct cpu_state *s, unsigned reg, bool address32, unsigned imm_bytes);
bool insn_has_modrm(unsigned map, unsigned opcode, bool mode32);
unsigned insn_immediate_bytes(unsigned map, unsigned opcode, unsigned modrm, bool operand16, bool rex_w, bool address32, bool mode32);
void any_registers(struct rng *r, struct cpu_state *state, bool mode32);
void fill_memory(struct rng *r, struct memory *memory);

/* sequence.c: insn is a whole program. common: one whose result is defined for every vendor's processors; vex: mostly
 * instructions with a VEX prefix. */
void generate_program(struct rng *r, bool mode32, bool common, bool vex, struct insn *insn, struct cpu_state *state);

/* native.c */
void native_init(void);
void native_run(const struct insn *insn, struct cpu_state *state, struct memory *memory);

/* core.c: a vCPU of the software core */
void core_init(void);
void core_run(const struct insn *insn, struct cpu_state *state, struct memory *memory);

/* kvm.c: a vCPU of the host's KVM; false: there is none */
bool kvm_init(void);
void kvm_run(const struct insn *insn, struct cpu_state *state, struct memory *memory);

/* direct.c: false if the instruction is not an FPU operation, or faults in a way the decoder is responsible for. */
bool direct_run(const struct insn *insn, struct cpu_state *state, struct memory *memory);

#endif
