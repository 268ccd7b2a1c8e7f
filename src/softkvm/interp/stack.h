/* The stack as PUSH, POP, CALL and RET see it. Private to interp/. */
#ifndef SOFTKVM_INTERP_STACK_H
#define SOFTKVM_INTERP_STACK_H

#include "softkvm/interp/ops.h"

/* 64-bit code only. Stores first, then moves RSP. False: the slow path was taken, so the handler must return. */
static ALWAYS_INLINE bool push64(struct cpu *c, u64 v)
{
	u64 sp = c->gpr[R_RSP] - 8;
	void *p = tlb_hit_w(c, sp, 8);

	if (likely(p))
		ram_st64(p, v);
	else
		ops_st_slow(c, sp, v, 8);
	c->gpr[R_RSP] = sp;
	return p;
}

/* Any mode: linear address of the stack at `off`, wrapped to the stack's width. */
u64 stk_lin(struct cpu *c, u64 off, unsigned size, enum access acc);
/* Set (R|E)SP as far as the stack's width reaches. */
void stk_set(struct cpu *c, u64 sp);
void stk_push(struct cpu *c, u64 v, unsigned size);
/* Value `delta` bytes above the top. */
u64 stk_peek(struct cpu *c, u64 delta, unsigned size);

#endif
