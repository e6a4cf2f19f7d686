/* Where AMD's and Intel's processors may do different things, as one table (vendors.c, vendors_fpu.c), and how two outcomes
 * of an instruction are compared under it.
 *
 * The software core shows its guest an AMD processor. On an AMD host everything is compared with it (RULES_AMD); on any
 * other host what the manuals of both vendors define (RULES_COMMON): each row of the table says what of an outcome it
 * leaves free. Rows marked `always` hold on every host; their reason is not the vendor.
 *
 * A row may also say what Intel's processors do instead (`intel`), for foreign.c, which makes an Intel host of this one.
 */
#ifndef ORACLE_VENDORS_H
#define ORACLE_VENDORS_H

#include "form.h"

enum rules { RULES_AMD, RULES_COMMON };

/* Both sides' outcome of one instruction (or of one program) from the same state. */
struct event {
    const struct insn *insn;
    struct form form;
    const struct cpu_state *in, *host, *core;
    const struct memory *before, *host_memory, *core_memory;
};

/* What is not compared. Masks have a bit for each that is free. */
struct freedom {
    bool everything;
    bool detail;  /* of a fault: CR2, error code, what was done before it */
    bool order;   /* which of an instruction's faults on memory, pending or invalid opcode comes first */
    uint64_t flags, gpr[16], cr2;
    uint32_t error;
    uint8_t fx[416], high[256]; /* high: upper halves of YMM registers */
    unsigned ranges;
    struct { uint32_t offset, length; } memory[32]; /* bytes of struct memory */
};

struct rng;
struct difference {
    const char *name;
    const char *what; /* how they differ */
    const char *intel_source, *amd_source;
    bool always;
    /* Of RFLAGS, whatever the operands (count: of a shift, -1 if not known). NULL: none. */
    unsigned (*flags)(const struct form *x, int count);
    /* What the row leaves free in this event; NULL: only flags. */
    void (*free)(const struct event *e, struct freedom *f);
    /* Changes AMD's outcome to Intel's; NULL: foreign.c takes any value where the row leaves one free. */
    void (*intel)(const struct event *e, struct cpu_state *out, struct memory *memory, struct rng *r);
};
extern const struct difference integer_differences[], fpu_differences[]; /* both end with a row without a name */

/* The table's row `n`; NULL after the last. */
const struct difference *vendors_row(unsigned n);

/* Flags that some vendor's manual leaves undefined after the instruction. */
unsigned vendors_undefined_flags(const struct form *x, int count);
int vendors_shift_count(const struct form *x, const struct cpu_state *in);
/* An instruction whose result, not only its flags, may be undefined by its operands: not for programs. */
bool vendors_unfit_for_programs(const struct form *x);

void freedom_of(enum rules rules, const struct event *e, struct freedom *f);
void freedom_of_row(const struct difference *row, const struct event *e, struct freedom *f);
void free_memory(struct freedom *f, uint64_t address, uint64_t offset, uint32_t length);
bool outcomes_equal(const struct event *e, const struct freedom *f);
static inline bool is_memory_fault(uint32_t vector) { return vector == 12 || vector == 13 || vector == 14 || vector == 17; }
static inline bool is_fault(const struct cpu_state *s) { return s->vector != 3 && s->vector != 1; }
static inline bool any_fault(const struct event *e) { return is_fault(e->host) || is_fault(e->core); }
static inline bool either(const struct event *e, uint32_t vector) { return e->host->vector == vector || e->core->vector == vector; }

/* The rules for the processor that this runs on. */
enum rules vendors_host_rules(void);
void vendors_print(void); /* the table as Markdown */

/* foreign.c: `insn` as an Intel processor may do it. */
void foreign_run(const struct insn *insn, struct cpu_state *state, struct memory *memory);

#endif
