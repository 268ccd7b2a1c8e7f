/*
 * Memory of a guest at rest. Most of what was decoded and translated while it booted, or for another piece of work that is done, is never
 * wanted again, and nothing tells which of it: where a vCPU does next to nothing for a while, all is given back. What is needed again
 * costs its making once more, some tenths of a second at most; so the next rest has to be twice as long, up to a minute.
 */
#include <stdatomic.h>
#include <sys/mman.h>

#include "softkvm/interp/block.h"
#include "softkvm/sys.h"

#define REST_NS 1000000000u     /* the first time, of no more ... */
#define REST_INSNS 4000000u     /* ... than timer ticks make in a second */
#define REST_TIMES 6u           /* that it doubles */
#define REST_BYTES (4u << 20)   /* of all vCPUs, to be worth it */

static bool pays(const struct cpu *c)
{
	unsigned n = c->vm ? MAX(atomic_load_explicit(&c->vm->ncpus, memory_order_relaxed), 1u) : 1;

	return c->blocks && c->blocks->used + c->stats.code_used >= REST_BYTES / n;
}

uint64_t engine_rest_due(struct cpu *c, uint64_t now)
{
	struct block_cache *bc = c->blocks;

	if (!pays(c))
		return UINT64_MAX;
	if (!bc->rest.since || (c->stats.insns - bc->rest.insns) >> bc->rest.times > REST_INSNS) {
		bc->rest.since = now;
		bc->rest.insns = c->stats.insns;
	}
	return bc->rest.since + ((uint64_t)REST_NS << bc->rest.times);
}

void engine_rest(struct cpu *c)
{
	struct block_cache *bc = c->blocks;

	bc->rest.times += bc->rest.times < REST_TIMES;
	bc->rest.since = 0;
	block_no_insn(c);
	block_flush(c);
	madvise(bc->arena, bc->size, MADV_DONTNEED);    /* no more than a favour */
}
