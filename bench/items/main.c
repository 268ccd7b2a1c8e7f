/*
 * bench-items list | CLASS/NAME [SCALE%]: see items.h. Prints one line: name, checksum, seconds; or name and "skip".
 */
#include "bench/items/items.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static const struct bench_item *const classes[] = { items_int, items_branch, items_string, items_fp, items_simd, items_mem, items_os,
	items_jit, items_app, items_i386 };

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

void bench_begin(struct bench *b)
{
	b->begin = now();
}

void bench_end(struct bench *b)
{
	b->end = now();
}

unsigned bench_rounds(const struct bench *b, unsigned n)
{
	uint64_t r = (uint64_t)n * b->scale / 100;

	return r ? (unsigned)r : 1;
}

uint64_t bench_random(struct bench *b)
{
	b->rng ^= b->rng >> 12;
	b->rng ^= b->rng << 25;
	b->rng ^= b->rng >> 27;
	return b->rng * 0x2545f4914f6cdd1dull;
}

void *bench_alloc(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED)
		bench_die("no memory for %zu bytes", size);
	return p;
}

void bench_die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fputs("bench-items: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	va_end(ap);
	exit(1);
}

uint64_t bench_hash(uint64_t h, const void *p, size_t n)
{
	const uint8_t *s = p;

	if (!h)
		h = 0xcbf29ce484222325ull;
	for (size_t i = 0; i < n; i++)
		h = (h ^ s[i]) * 0x100000001b3ull;
	return h;
}

static int list(void)
{
	for (size_t c = 0; c < sizeof classes / sizeof classes[0]; c++)
		for (const struct bench_item *i = classes[c]; i->name; i++)
			printf("%s/%s\n", i->class, i->name);
	return 0;
}

static const struct bench_item *find(const char *what)
{
	const char *slash = strchr(what, '/');
	size_t n = slash ? (size_t)(slash - what) : 0;

	for (size_t c = 0; n && c < sizeof classes / sizeof classes[0]; c++)
		for (const struct bench_item *i = classes[c]; i->name; i++)
			if (strlen(i->class) == n && !memcmp(i->class, what, n) && !strcmp(i->name, slash + 1))
				return i;
	return NULL;
}

int main(int argc, char **argv)
{
	struct bench b = { .scale = 100, .rng = 0x9e3779b97f4a7c15ull };
	const struct bench_item *item;
	uint64_t result;

	if (argc == 2 && !strcmp(argv[1], "list"))
		return list();
	if (argc == 2 && !strcmp(argv[1], "none"))      /* what os/fork-exec executes */
		return 0;
	if (argc < 2 || argc > 3)
		bench_die("usage: bench-items list | CLASS/NAME [SCALE%%]");
	if (argc == 3)
		b.scale = (unsigned)strtoul(argv[2], NULL, 10);
	item = find(argv[1]);
	if (!item)
		bench_die("no item '%s'", argv[1]);
	bench_begin(&b);
	result = item->run(&b);
	if (b.end == 0)
		bench_end(&b);
	if (b.skipped)
		printf("%s skip\n", argv[1]);
	else
		printf("%s %016llx %.6f\n", argv[1], (unsigned long long)result, b.end - b.begin);
	return 0;
}
