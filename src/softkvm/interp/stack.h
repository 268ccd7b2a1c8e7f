/* The stack as PUSH, POP, CALL and RET see it. Private to interp/. */
#ifndef SOFTKVM_INTERP_STACK_H
#define SOFTKVM_INTERP_STACK_H

#include "softkvm/interp/ops.h"

/*
 * In 64-bit handlers (ops.h says what MISS does): push a value, storing first, then moving RSP; and load one. False, and
 * a false `hit_`, say that the slow path was taken and the handler must return.
 */
#define PUSH64(v_) __extension__ ({                                             \
		u64 at_ = c->gpr[R_RSP] - 8, w_ = (v_);                         \
		void *to_ = slow_ ? NULL : tlb_hit_w(c, at_, 8);                \
		if (likely(to_)) {                                              \
			ram_st64(to_, w_);                                      \
		} else {                                                        \
			MISS;                                                   \
			ops_st_slow(c, at_, w_, 8);                             \
		}                                                               \
		c->gpr[R_RSP] = at_;                                            \
		to_ != NULL;                                                    \
	})
#define LOAD64(lin_, hit_) __extension__ ({                                     \
		u64 from_ = (lin_), w_;                                         \
		void *p_ = slow_ ? NULL : tlb_hit_r(c, from_, 8);               \
		(hit_) = p_ != NULL;                                            \
		if (likely(p_)) {                                               \
			w_ = ram_ld64(p_);                                      \
		} else {                                                        \
			MISS;                                                   \
			w_ = ops_ld_slow(c, from_, 8);                          \
		}                                                               \
		w_;                                                             \
	})

/* Any mode: linear address of the stack at `off`, wrapped to the stack's width. */
u64 stk_lin(struct cpu *c, u64 off, unsigned size, enum access acc);
/* Set (R|E)SP as far as the stack's width reaches. */
void stk_set(struct cpu *c, u64 sp);
void stk_push(struct cpu *c, u64 v, unsigned size);
/* Value `delta` bytes above the top. */
u64 stk_peek(struct cpu *c, u64 delta, unsigned size);

#endif
