/* General-purpose registers of an instruction, by where they are encoded. */
#ifndef SOFTKVM_JIT_SLOTS_H
#define SOFTKVM_JIT_SLOTS_H

#include "softkvm/jit/internal.h"

enum { SL_REG, SL_RM, SL_OP, SL_V, SL_COUNT };

struct slots {
	int guest[SL_COUNT];            /* guest register, -1 none */
	bool read[SL_COUNT], write[SL_COUNT], high[SL_COUNT];
	const ZydisDecodedOperand *mem;
	bool implicit;                  /* a general-purpose register that is not encoded */
	bool other;                     /* an operand of another kind */
	unsigned scratch[3], nscratch;
	int host[SL_COUNT];
};

void slots_find(struct slots *s, const struct tinsn *i);
/* Host registers for all slots; false: not enough scratch. */
bool slots_load(struct tr *t, struct slots *s);
void slots_store(struct tr *t, const struct slots *s);
struct regs slots_regs(const struct slots *s);

/* Before an instruction with or without memory operand runs: address, check, flags. NULL with *ok false: cannot. */
struct cold *gen_access(struct tr *t, unsigned n, const struct slots *s, bool *ok);
void gen_flags_before(struct tr *t, unsigned n);
void cold_done(struct tr *t, unsigned n, struct cold *k);

#endif
