/*
 * What translated code calls when its budget is used up. Mostly nothing waits: no request, no timer, no signal to look for yet. Then the budget
 * is refilled and code goes on where it is, which spares the way out, a lookup, the way in, and the calls on the host's stack. Compiled to
 * leave the guest's vector state alone, as mmu/fill.c.
 */
#include <x86intrin.h>

#include "softkvm/jit/internal.h"

static bool loop_is_wanted(const struct cpu *c, const struct jit *j, uint64_t now)
{
	return j->lock || c->profile || now >= c->look_until || __atomic_load_n(&c->run->immediate_exit, __ATOMIC_RELAXED) ||
	       block_event_due(c);
}

uint64_t jit_look(struct jit *j, struct jit_code *k)
{
	struct cpu *c = j->c;
	uint64_t now = __rdtsc();

	if (loop_is_wanted(c, j, now) || heat_would_want(j, k))
		return 1;
	block_count_insns(c);
	block_refill(c, now);
	j->heat_time++;
	heat_budget(j, k);
	return 0;
}
