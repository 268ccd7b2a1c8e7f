/* Memory: latency in each level, copies, random access, more pages than any TLB holds. */
#include "bench/items/items.h"

#include <string.h>

/* A random cycle through `n` cells, `step` bytes apart. */
static void **ring(struct bench *b, size_t n, size_t step)
{
	uint8_t *p = bench_alloc(n * step);
	uint32_t *order = bench_alloc(n * sizeof *order);

	for (size_t i = 0; i < n; i++)
		order[i] = (uint32_t)i;
	for (size_t i = n - 1; i; i--) {
		size_t k = bench_random(b) % i;
		uint32_t t = order[i];

		order[i] = order[k];
		order[k] = t;
	}
	/* cells of a page-sized step start on different lines, or they would all fall into one set of the cache */
	for (size_t i = 0; i < n; i++) {
		uint32_t at = order[i], to = order[(i + 1) % n];

		*(void **)(p + at * step + (step >= 4096 ? at % 60 * 64 : 0)) = p + to * step + (step >= 4096 ? to % 60 * 64 : 0);
	}
	bench_begin(b);
	return (void **)(p + order[0] * step + (step >= 4096 ? order[0] % 60 * 64 : 0));
}

static uint64_t chase(struct bench *b, size_t n, size_t step, unsigned rounds)
{
	void **start = ring(b, n, step), **p = start;

	rounds = bench_rounds(b, rounds);
	for (unsigned r = 0; r < rounds; r++)
		p = *p;
	return (uint64_t)((uint8_t *)p - (uint8_t *)start);
}

static uint64_t run_chase_l1(struct bench *b) { return chase(b, 256, 64, 40000000); }
static uint64_t run_chase_l2(struct bench *b) { return chase(b, 4096, 64, 14000000); }
static uint64_t run_chase_ram(struct bench *b) { return chase(b, 1u << 20, 64, 600000); }
static uint64_t run_chase_tlb(struct bench *b) { return chase(b, 40000, 4096, 400000); }

static uint64_t run_chase_tlb2(struct bench *b) { return chase(b, 2048, 4096, 4000000); }

static uint64_t run_copy(struct bench *b)
{
	uint8_t *p = bench_alloc(64u << 20);
	unsigned rounds = bench_rounds(b, 16);

	for (size_t i = 0; i < 32u << 20; i += 64)
		p[i] = (uint8_t)(i >> 6);
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++)
		memcpy(p + (32u << 20), p + (r & 63), (32u << 20) - 64);
	bench_end(b);
	return bench_hash(0, p + (32u << 20), 65536);
}

static uint64_t run_loop_copy(struct bench *b)
{
	volatile uint64_t *p = bench_alloc(16u << 20);
	unsigned rounds = bench_rounds(b, 60), n = (8u << 20) / 8;

	for (unsigned i = 0; i < n; i++)
		p[i] = i;
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < n; i += 4) {
			p[n + i] = p[i];
			p[n + i + 1] = p[i + 1];
			p[n + i + 2] = p[i + 2];
			p[n + i + 3] = p[i + 3];
		}
	bench_end(b);
	return p[n + 12345];
}

static uint64_t run_random(struct bench *b)
{
	size_t n = (64u << 20) / 8;
	uint64_t *p = bench_alloc(n * 8), v = 1, sum = 0;
	unsigned rounds = bench_rounds(b, 7000000);

	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++) {
		v = v * 6364136223846793005ull + 1442695040888963407ull;
		sum += p[v >> 41] ^= v;
	}
	return sum;
}

static uint64_t run_histogram(struct bench *b)
{
	static uint32_t counts[65536];
	uint16_t *in = bench_alloc(2u << 20);
	unsigned rounds = bench_rounds(b, 90), n = 1u << 20;

	for (unsigned i = 0; i < n; i++)
		in[i] = (uint16_t)bench_random(b);
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < n; i++)
			counts[in[i]]++;
	bench_end(b);
	return bench_hash(0, counts, sizeof counts);
}

static uint64_t run_transpose(struct bench *b)
{
	enum { M = 1024 };
	uint32_t *a = bench_alloc(M * M * 4), *c = bench_alloc(M * M * 4);
	unsigned rounds = bench_rounds(b, 22);

	for (unsigned i = 0; i < M * M; i++)
		a[i] = i * 7;
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < M; i++)
			for (unsigned j = 0; j < M; j++)
				c[j * M + i] = a[i * M + j] + r;
	bench_end(b);
	return bench_hash(0, c, 65536);
}

static uint64_t run_atomics(struct bench *b)
{
	static uint64_t cells[64];
	unsigned rounds = bench_rounds(b, 6000000);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		uint64_t *p = &cells[r & 63], old = *p;

		sum += __atomic_fetch_add(p, r, __ATOMIC_SEQ_CST);
		__atomic_compare_exchange_n(p, &old, sum, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
		sum ^= __atomic_exchange_n(&cells[(r + 7) & 63], r, __ATOMIC_SEQ_CST);
	}
	return sum;
}

const struct bench_item items_mem[] = {
	{ "memory", "chase-l1", run_chase_l1 },
	{ "memory", "chase-l2", run_chase_l2 },
	{ "memory", "chase-ram", run_chase_ram },
	{ "memory", "chase-2k-pages", run_chase_tlb2 },
	{ "memory", "chase-40k-pages", run_chase_tlb },
	{ "memory", "memcpy-32m", run_copy },
	{ "memory", "loop-copy", run_loop_copy },
	{ "memory", "random-update", run_random },
	{ "memory", "histogram", run_histogram },
	{ "memory", "transpose", run_transpose },
	{ "memory", "atomics", run_atomics },
	{ 0 },
};
