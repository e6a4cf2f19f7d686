/* Inside of the x87 operations: the exact path that the short ones fall back on. */
#ifndef SOFT_X87_H
#define SOFT_X87_H

#include "soft/fpu/fpu.h"

enum {
    X87_IE = 1, X87_DE = 2, X87_ZE = 4, X87_OE = 8, X87_UE = 16, X87_PE = 32, X87_SF = 64,
    X87_C0 = 0x100, X87_C1 = 0x200, X87_C2 = 0x400, X87_C3 = 0x4000, X87_CC = X87_C0 | X87_C1 | X87_C2 | X87_C3
};

/* Run the instruction on the host with the guest's whole environment. opcode: 0 to 7 for D8 to DF. */
int fpu_x87_register(struct x87_context *ctx, unsigned opcode);
int fpu_x87_load(struct x87_context *ctx, unsigned opcode);
int fpu_x87_store(struct x87_context *ctx, unsigned opcode); /* FPU_NO_STORE, or 0 and then commit */
void fpu_x87_store_commit(struct x87_context *ctx);

/* Results that do not depend on the host (x87_math.c): false if they do not apply, and then nothing has changed. */
bool fpu_x87_math_register(struct x87_context *ctx, unsigned opcode);
bool fpu_x87_math_load(struct x87_context *ctx, unsigned opcode);

#endif
