/*
 * A full arena: blocks that were translated move to its start, where they stay as long as their translations do; the rest, much of it
 * code that ran once, is forgotten. Without a translator nothing tells them apart, and all are.
 */
#include <string.h>

#include "softkvm/interp/block.h"
#include "softkvm/jit/jit.h"

static struct block *mark(struct block *b)
{
	b->kept = true;
	return b;
}

static struct block *moved_to(struct block *b) { return (struct block *)((uint8_t *)b - (size_t)b->moves * BLOCK_ALIGN); }

static struct block *after(struct block *b) { return (struct block *)((uint8_t *)b + block_bytes(b)); }

/* Blocks that a lookup gave up stay out of the hash. */
static void mark_hashed(struct block_cache *bc)
{
	for (size_t n = 0; n < (size_t)1 << bc->hash_bits; n++) {
		struct block *b = block_hashed(bc, bc->hash[n]);

		if (b)
			b->hashed = true;
	}
}

/* Where each of the kept will be; how many bytes they take. */
static size_t plan(struct block_cache *bc)
{
	struct block *end = (struct block *)(bc->arena + bc->used);
	uint8_t *to = bc->arena;

	for (struct block *b = (struct block *)bc->arena; b < end; b = after(b))
		if (b->kept) {
			b->moves = (uint32_t)((size_t)((uint8_t *)b - to) / BLOCK_ALIGN);
			to += block_bytes(b);
		}
	return (size_t)(to - bc->arena);
}

static size_t kept_bytes(const struct block_cache *bc)
{
	struct block *end = (struct block *)(bc->arena + bc->used);
	size_t sum = 0;

	for (struct block *b = (struct block *)bc->arena; b < end; b = after(b))
		sum += b->kept ? block_bytes(b) : 0;
	return sum;
}

static void move(struct block_cache *bc)
{
	struct block *end = (struct block *)(bc->arena + bc->used), *next;

	block_hash_clear(bc);
	for (struct block *b = (struct block *)bc->arena, *to; b < end; b = next) {
		next = after(b);
		if (!b->kept)
			continue;
		to = moved_to(b);
		memmove(to, b, block_bytes(b));
		if (to->hashed)
			block_hash_add(bc, to);
		to->kept = to->hashed = false;
	}
}

static void unmark(struct block_cache *bc)
{
	struct block *end = (struct block *)(bc->arena + bc->used);

	for (struct block *b = (struct block *)bc->arena; b < end; b = after(b))
		b->kept = b->hashed = false;
}

bool block_collect(struct cpu *c, size_t limit)
{
	struct block_cache *bc = c->blocks;

	if (bc->linked || !jit_blocks_begin(c))
		return false;
	jit_blocks_visit(c, mark);
	if (kept_bytes(bc) > limit / 8 * 7) {
		unmark(bc);
		return false;
	}
	mark_hashed(bc);
	size_t used = plan(bc);

	jit_blocks_visit(c, moved_to);
	move(bc);
	bc->used = used;
	memset(bc->fast, 0, sizeof bc->fast);
	memset(bc->fields, 0, sizeof bc->fields);
	bc->want = NULL;
	c->code_stamp = CODE_STAMP_NONE;
	c->stats.block_collections++;
	return true;
}
