/* The arena of decoded blocks: how much of it there is, and what happens when it is full. */
#include <stdatomic.h>
#include <sys/mman.h>

#include "softkvm/interp/block.h"
#include "softkvm/jit/jit.h"
#include "softkvm/softkvm.h"

/* What the arenas of a VM may take together once they have grown: the rest of the memory for code is the translator's. */
static uint64_t grown_total(const struct cpu *c)
{
	return c->vm && c->vm->policy.translate ? c->vm->policy.code_bytes - c->vm->policy.code_bytes / 8 * CODE_EIGHTHS : 0;
}

/* This vCPU's share. */
static size_t arena_limit(const struct cpu *c)
{
	unsigned n = c->vm ? MAX(atomic_load_explicit(&c->vm->ncpus, memory_order_relaxed), 1u) : 1;
	uint64_t first = MAX(BLOCK_ARENA_TOTAL / n, BLOCK_ARENA_MIN);

	if (c->jit)
		first = MIN(first, BLOCK_ARENA_JIT);

	return (size_t)MIN(MAX(first, MIN(first << c->blocks->grown, grown_total(c) / n)), c->blocks->size);
}

/* The hash has 24 bits to say where in it a block is. */
_Static_assert(SOFTKVM_CODE_MAX - SOFTKVM_CODE_MAX / 8 * CODE_EIGHTHS < (uint64_t)BLOCK_ALIGN << 24, "hash.c: an arena too large");

bool block_arena_init(struct cpu *c)
{
	struct block_cache *bc = c->blocks;

	bc->size = MAX((uint64_t)BLOCK_ARENA_TOTAL, grown_total(c));    /* of addresses; pages come as they are used */
	bc->arena = mmap(NULL, bc->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return bc->arena != MAP_FAILED;
}

void block_arena_free(struct block_cache *bc)
{
	if (bc->arena != MAP_FAILED)
		munmap(bc->arena, bc->size);
}

/* The arena is full. True: it may hold more from now on. A boot executes much code once: that is no reason. */
static bool arena_grow(struct cpu *c)
{
	struct block_cache *bc = c->blocks;
	size_t limit = arena_limit(c);

	if (c->stats.blocks_decoded < BLOCK_GROW)
		return false;
	bc->grown++;
	if (arena_limit(c) > limit)
		return true;
	bc->grown--;
	return false;
}

/* Little was done for each block that was decoded since it was full last. */
static bool arena_busy(struct cpu *c)
{
	struct block_cache *bc = c->blocks;
	uint64_t blocks = c->stats.blocks_decoded - bc->full_blocks, insns = c->stats.insns - bc->full_insns;

	bc->full_blocks = c->stats.blocks_decoded;
	bc->full_insns = c->stats.insns;
	return insns / BLOCK_BUSY < blocks;
}

/* Makes room by letting it grow, or by forgetting what was not translated, or, if that is not enough, all. */
static void arena_full(struct cpu *c)
{
	if ((arena_busy(c) && arena_grow(c)) || block_collect(c, arena_limit(c)) || arena_grow(c))
		return;
	block_flush(c);
}

struct block *block_alloc(struct cpu *c, size_t need)
{
	struct block_cache *bc = c->blocks;
	struct block *b;

	need = ALIGN_UP(need, BLOCK_ALIGN) + BLOCK_LINKS;
	if (bc->used + need > arena_limit(c))
		arena_full(c);
	if (bc->used + need > arena_limit(c))   /* it had held more before other vCPUs came */
		block_flush(c);
	if (!bc->used)
		bc->linked = !c->jit;
	if (bc->linked)
		memset(bc->arena + bc->used, 0, BLOCK_LINKS);
	b = (struct block *)(bc->arena + bc->used + (bc->linked ? BLOCK_LINKS : 0));
	bc->used += need - (bc->linked ? 0 : BLOCK_LINKS);
	return b;
}
