/* Decoded blocks by physical address and mode: see struct block_cache. */
#include <sys/mman.h>

#include "softkvm/interp/block.h"

static uint64_t hash_of(uint64_t gpa, uint32_t mode)
{
	return (gpa ^ (uint64_t)(mode & BM_PHYS_MASK) << 40) * 0x9e3779b97f4a7c15ULL;
}

/* Its first entry; they go on in the next lines where that is full. */
static size_t hash_line(const struct block_cache *bc, uint64_t h) { return (size_t)(h >> (64 - bc->hash_bits)) & ~(size_t)(BLOCK_HASH_LINE - 1); }

static uint8_t hash_tag(uint64_t h) { return (uint8_t)(h >> 24); }

/*
 * Some entries are always 0. One that was given up serves again: code written anew at one place, time and again, would leave a row of
 * them that every look there goes through.
 */
static void hash_put(struct block_cache *bc, uint32_t *hash, uint32_t entry, uint64_t h)
{
	size_t n = hash_line(bc, h), mask = ((size_t)1 << bc->hash_bits) - 1;

	while (hash[n] && hash[n] != BLOCK_HASH_GONE)
		n = (n + 1) & mask;
	bc->hashed += !hash[n];
	hash[n] = entry;
}

/* Empty, lines on cache lines; NULL: no memory. */
static uint32_t *hash_map(unsigned bits)
{
	void *p = mmap(NULL, sizeof(uint32_t) << bits, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

bool block_hash_init(struct block_cache *bc)
{
	bc->hash_bits = BLOCK_HASH_BITS;
	bc->hash = hash_map(bc->hash_bits);
	return bc->hash;
}

void block_hash_free(struct block_cache *bc)
{
	if (bc->hash)
		munmap(bc->hash, sizeof *bc->hash << bc->hash_bits);
}

/* Twice the entries, for twice the blocks. */
static void hash_grow(struct block_cache *bc)
{
	uint32_t *old = bc->hash, *new = hash_map(bc->hash_bits + 1);
	size_t n = (size_t)1 << bc->hash_bits;

	if (!new)
		return;
	bc->hash = new;
	bc->hash_bits++;
	bc->hashed = 0;
	for (size_t i = 0; i < n; i++) {
		const struct block *b = block_hashed(bc, old[i]);

		if (b)
			hash_put(bc, new, old[i], hash_of(b->gpa, b->mode));
	}
	munmap(old, sizeof *old * n);
}

void block_hash_clear(struct block_cache *bc)
{
	memset(bc->hash, 0, sizeof *bc->hash << bc->hash_bits);
	bc->hashed = 0;
}

void block_hash_add(struct block_cache *bc, struct block *b)
{
	uint64_t h = hash_of(b->gpa, b->mode);
	size_t n = (size_t)1 << bc->hash_bits;

	if (bc->hashed >= n / 4 * 3)
		hash_grow(bc);
	if (bc->hashed < n / 8 * 7)     /* else there was no memory: it is not found again by its address */
		hash_put(bc, bc->hash, (uint32_t)((size_t)((uint8_t *)b - bc->arena) / BLOCK_ALIGN + 1) << 8 | hash_tag(h), h);
}

uint32_t *block_hash_look(const struct block_cache *bc, uint64_t gpa, uint32_t mode, struct block **found)
{
	uint64_t h = hash_of(gpa, mode);
	size_t n = hash_line(bc, h), mask = ((size_t)1 << bc->hash_bits) - 1;
	uint8_t tag = hash_tag(h);

	for (; bc->hash[n]; n = (n + 1) & mask) {
		struct block *b = (uint8_t)bc->hash[n] == tag ? block_hashed(bc, bc->hash[n]) : NULL;

		if (b && b->gpa == gpa && b->mode == (mode & BM_PHYS_MASK)) {
			*found = b;
			return &bc->hash[n];
		}
	}
	return NULL;
}

struct block *block_hash_find(const struct block_cache *bc, uint64_t gpa, uint32_t mode)
{
	struct block *b;

	return block_hash_look(bc, gpa, mode, &b) ? b : NULL;
}
