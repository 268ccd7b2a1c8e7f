/*
 * Memory of a guest at rest. Most of what was decoded and translated while it booted is never wanted again, and nothing tells which of
 * it: where a vCPU does next to nothing for a second, all is given back. That is done once. What it works on later is given back only
 * after ten minutes of rest: making it anew costs a large program seconds, and a user who stops to think should not pay for it.
 */
#include <stdatomic.h>
#include <sys/mman.h>

#include "softkvm/interp/block.h"
#include "softkvm/jit/jit.h"
#include "softkvm/sys.h"

#define REST_NS 1000000000u     /* after the boot, with no more instructions ... */
#define REST_INSNS 4000000u     /* ... than timer ticks make in a second */
#define REST_LATER 600u         /* times as long afterwards ... */
#define REST_WORK 100u          /* ... and times as many instructions */
#define REST_BYTES (4u << 20)   /* of all vCPUs, to be worth it */

static bool pays(const struct cpu *c)
{
	unsigned n = c->vm ? MAX(atomic_load_explicit(&c->vm->ncpus, memory_order_relaxed), 1u) : 1;

	return c->blocks && c->blocks->used + c->stats.code_used >= REST_BYTES / n;
}

uint64_t engine_rest_due(struct cpu *c, uint64_t now)
{
	struct block_cache *bc = c->blocks;
	uint64_t ns = (uint64_t)REST_NS * (bc->rest.again ? REST_LATER : 1);

	if (!pays(c))
		return UINT64_MAX;
	if (!bc->rest.since || c->stats.insns - bc->rest.insns > (uint64_t)REST_INSNS * (bc->rest.again ? REST_WORK : 1)) {
		bc->rest.since = now;
		bc->rest.insns = c->stats.insns;
	}
	return bc->rest.since + ns;
}

void engine_rest(struct cpu *c)
{
	struct block_cache *bc = c->blocks;

	bc->rest.again = true;
	bc->rest.since = 0;
	block_no_insn(c);
	block_flush(c);
	jit_give_back(c);
	madvise(bc->arena, bc->size, MADV_DONTNEED);    /* no more than a favour */
}
