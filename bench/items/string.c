/* String instructions and the C library's string functions (which take what CPUID offers). */
#include "bench/items/items.h"

#include <string.h>

#define AREA (4u << 20)

static inline void rep_movsb(void *d, const void *s, size_t n)
{
	__asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
}

static inline void rep_movsq(void *d, const void *s, size_t n)
{
	__asm__ volatile("rep movsq" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
}

static inline void rep_stosb(void *d, int v, size_t n)
{
	__asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(v) : "memory");
}

static inline size_t rep_scasb(const void *s, int v, size_t n)
{
	size_t left = n;

	__asm__ volatile("repne scasb" : "+D"(s), "+c"(left) : "a"(v) : "memory", "cc");
	return n - left;
}

static inline size_t rep_cmpsb(const void *a, const void *c, size_t n)
{
	size_t left = n;

	__asm__ volatile("repe cmpsb" : "+D"(a), "+S"(c), "+c"(left) : : "memory", "cc");
	return n - left;
}

static uint8_t *area(struct bench *b)
{
	uint64_t *p = bench_alloc(2 * AREA);

	for (unsigned i = 0; i < AREA / 8; i++)
		p[i] = bench_random(b) | 0x0101010101010101ull;
	bench_begin(b);
	return (uint8_t *)p;
}

static uint64_t movsb(struct bench *b, unsigned size, unsigned rounds)
{
	uint8_t *p = area(b);

	rounds = bench_rounds(b, rounds);
	for (unsigned r = 0; r < rounds; r++) {
		size_t at = size < 65536 ? r * 61u % 65536 : 0;

		rep_movsb(p + AREA + at, p + at, size);
	}
	bench_end(b);
	return bench_hash(0, p + AREA, 65536);
}

static uint64_t run_movsb_64(struct bench *b) { return movsb(b, 64, 2000000); }
static uint64_t run_movsb_1k(struct bench *b) { return movsb(b, 1024, 500000); }
static uint64_t run_movsb_64k(struct bench *b) { return movsb(b, 65536, 10000); }
static uint64_t run_movsb_2m(struct bench *b) { return movsb(b, 2u << 20, 150); }

static uint64_t run_movsq(struct bench *b)
{
	uint8_t *p = area(b);
	unsigned rounds = bench_rounds(b, 150000);

	for (unsigned r = 0; r < rounds; r++)
		rep_movsq(p + AREA + r * 8 % 32768, p + r * 16 % 32768, 512);
	bench_end(b);
	return bench_hash(0, p + AREA, 65536);
}

static uint64_t stosb(struct bench *b, unsigned size, unsigned rounds)
{
	uint8_t *p = area(b);

	rounds = bench_rounds(b, rounds);
	for (unsigned r = 0; r < rounds; r++)
		rep_stosb(p + AREA + (size < 65536 ? r * 61u % 65536 : 0), (int)r, size);
	bench_end(b);
	return bench_hash(0, p + AREA, 65536);
}

static uint64_t run_stosb_64(struct bench *b) { return stosb(b, 64, 1500000); }
static uint64_t run_stosb_4k(struct bench *b) { return stosb(b, 4096, 200000); }

static uint64_t run_scasb(struct bench *b)
{
	uint8_t *p = area(b);
	unsigned rounds = bench_rounds(b, 25000);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		size_t at = 500 + r % 3000;
		uint8_t old = p[at];

		p[at] = 0;
		sum += rep_scasb(p, 0, 8192);
		p[at] = old;
	}
	return sum;
}

static uint64_t run_cmpsb(struct bench *b)
{
	uint8_t *p = area(b);
	unsigned rounds = bench_rounds(b, 20000);
	uint64_t sum = 0;

	memcpy(p + AREA, p, 8192);
	for (unsigned r = 0; r < rounds; r++) {
		size_t at = 500 + r % 3000;

		p[at] ^= 1;
		sum += rep_cmpsb(p, p + AREA, 8192);
		p[at] ^= 1;
	}
	return sum;
}

static uint64_t run_memcpy(struct bench *b)
{
	uint8_t *p = area(b);
	unsigned rounds = bench_rounds(b, 4500000);
	void *(*volatile copy)(void *, const void *, size_t) = memcpy;

	for (unsigned r = 0; r < rounds; r++)
		copy(p + AREA + r * 31u % 65536, p + r * 17u % 65536, 8 + r * 7u % 1500);
	bench_end(b);
	return bench_hash(0, p + AREA, 65536);
}

static uint64_t run_memset(struct bench *b)
{
	uint8_t *p = area(b);
	unsigned rounds = bench_rounds(b, 6000000);
	void *(*volatile set)(void *, int, size_t) = memset;

	for (unsigned r = 0; r < rounds; r++)
		set(p + AREA + r * 31u % 65536, (int)r, 8 + r * 7u % 1500);
	bench_end(b);
	return bench_hash(0, p + AREA, 65536);
}

static uint64_t run_strlen(struct bench *b)
{
	char *p = (char *)area(b);
	unsigned rounds = bench_rounds(b, 9000000);
	size_t (*volatile len)(const char *) = strlen;
	uint64_t sum = 0;

	for (unsigned i = 0; i < 65536; i += 1 + i % 700)
		p[i] = 0;
	p[65536] = 0;
	for (unsigned r = 0; r < rounds; r++)
		sum += len(p + r * 61u % 65536);
	return sum;
}

static uint64_t run_strcmp(struct bench *b)
{
	char *p = (char *)area(b);
	unsigned rounds = bench_rounds(b, 4500000);
	int (*volatile compare)(const char *, const char *) = strcmp;
	char *(*volatile find)(const char *, int) = strchr;
	uint64_t sum = 0;

	memcpy(p + AREA, p, 65536);
	for (unsigned i = 0; i < 65536; i += 1 + i % 300) {
		p[i] = 0;
		p[AREA + i] = (char)(i & 1);
	}
	p[65536] = p[AREA + 65536] = 0;
	for (unsigned r = 0; r < rounds; r++) {
		unsigned at = r * 61u % 65536;

		sum += compare(p + at, p + AREA + at) > 0;
		sum += find(p + at, 0x41) != NULL;
	}
	return sum;
}

static uint64_t run_bytes(struct bench *b)
{
	char *p = (char *)area(b);
	unsigned rounds = bench_rounds(b, 1300);
	uint64_t words = 0;

	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < 65536; i++) {
			char c = p[i];

			if (c >= 'A' && c <= 'Z')
				p[i] = (char)(c | 0x20);
			else if (c == ' ' || c == '\n')
				words++;
			bench_keep(words);
		}
	return words;
}

/* Byte by byte through a table, as assembly was written when programs had to be short. */
static uint64_t run_single(struct bench *b)
{
	uint8_t *p = area(b);
	unsigned rounds = bench_rounds(b, 6000);

	for (unsigned r = 0; r < rounds; r++) {
		const uint8_t *from = p + r * 61u % 65536;
		uint8_t *to = p + AREA + r % 4096;
		size_t n = 2048;

		__asm__ volatile("1: lodsb\n\txlat\n\tstosb\n\tloop 1b" : "+S"(from), "+D"(to), "+c"(n) : "b"(p) : "rax", "memory");
	}
	bench_end(b);
	return bench_hash(0, p + AREA, 8192);
}

const struct bench_item items_string[] = {
	{ "string", "rep-movsb-64", run_movsb_64 },
	{ "string", "rep-movsb-1k", run_movsb_1k },
	{ "string", "rep-movsb-64k", run_movsb_64k },
	{ "string", "rep-movsb-2m", run_movsb_2m },
	{ "string", "rep-movsq-4k", run_movsq },
	{ "string", "rep-stosb-64", run_stosb_64 },
	{ "string", "rep-stosb-4k", run_stosb_4k },
	{ "string", "repne-scasb", run_scasb },
	{ "string", "repe-cmpsb", run_cmpsb },
	{ "string", "single", run_single },
	{ "string", "memcpy", run_memcpy },
	{ "string", "memset", run_memset },
	{ "string", "strlen", run_strlen },
	{ "string", "strcmp-strchr", run_strcmp },
	{ "string", "bytes", run_bytes },
	{ 0 },
};
