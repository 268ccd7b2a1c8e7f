/*
 * Code that is written while the program runs, and code that runs once: what JIT compilers, dynamic linkers and patching do.
 * The generated functions are small x86-64 sequences emitted here byte by byte.
 */
#include "bench/items/items.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

typedef uint64_t jit_fn(uint64_t);

static uint8_t *code_area(size_t size, int prot)
{
	uint8_t *p = mmap(NULL, size, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED)
		bench_die("no code memory: %s", strerror(errno));
	return p;
}

#define RWX (PROT_READ | PROT_WRITE | PROT_EXEC)

static uint8_t *put(uint8_t *at, const char *bytes, size_t n)
{
	memcpy(at, bytes, n);
	return at + n;
}

static uint8_t *put32(uint8_t *at, uint32_t v)
{
	memcpy(at, &v, 4);
	return at + 4;
}

/* One step on rax, one of several kinds. 3 to 7 bytes. */
static uint8_t *emit_step(uint8_t *at, unsigned kind, uint32_t imm)
{
	switch (kind % 6) {
	case 0: return put32(put(at, "\x48\x05", 2), imm & 0x7fffffff);            /* add $imm, %rax */
	case 1: return put32(put(at, "\x48\x35", 2), imm & 0x7fffffff);            /* xor $imm, %rax */
	case 2: return put(at, "\x48\xc1\xc0\x07", 4);                             /* rol $7, %rax */
	case 3: return put(at, "\x48\x8d\x04\x80", 4);                             /* lea (%rax,%rax,4), %rax */
	case 4: return put(at, "\x48\x01\xf8", 3);                                 /* add %rdi, %rax */
	default: return put32(put(at, "\x48\x2d", 2), imm & 0x7fffffff);           /* sub $imm, %rax */
	}
}

/* mov %rdi, %rax; n steps; ret */
static uint8_t *emit_fn(struct bench *b, uint8_t *at, unsigned n)
{
	at = put(at, "\x48\x89\xf8", 3);
	while (n--) {
		uint64_t v = bench_random(b);

		at = emit_step(at, (unsigned)(v >> 60), (uint32_t)v);
	}
	*at++ = 0xc3;
	return at;
}

static uint64_t call(const uint8_t *code, uint64_t v)
{
	return ((jit_fn *)(uintptr_t)code)(v);
}

/* A new function of 40 instructions at a new place, run `times`. */
static uint64_t fresh(struct bench *b, unsigned fns, unsigned times)
{
	size_t size = (16u << 20);
	uint8_t *area = code_area(size, RWX), *at = area;
	uint64_t sum = 0;

	fns = bench_rounds(b, fns);
	bench_begin(b);
	for (unsigned f = 0; f < fns; f++) {
		uint8_t *code = at;

		if (at + 512 > area + size)
			code = at = area;
		at = emit_fn(b, at, 40);
		at += 16 - ((uintptr_t)at & 15);
		for (unsigned t = 0; t < times; t++)
			sum += call(code, sum + t);
	}
	return sum;
}

static uint64_t run_once(struct bench *b) { return fresh(b, 50000, 1); }
static uint64_t run_warm(struct bench *b) { return fresh(b, 30000, 20); }
static uint64_t run_hot(struct bench *b) { return fresh(b, 3000, 1500); }

/* The same buffer, rewritten every time. */
static uint64_t run_rewrite(struct bench *b)
{
	uint8_t *area = code_area(65536, RWX);
	unsigned rounds = bench_rounds(b, 60000);
	uint64_t sum = 0;

	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++) {
		emit_fn(b, area, 24);
		for (unsigned t = 0; t < 4; t++)
			sum += call(area, sum + t);
	}
	return sum;
}

/* One immediate of a function is patched, as inline caches and static keys are. */
static uint64_t run_patch(struct bench *b)
{
	uint8_t *area = code_area(65536, RWX), *at = area, *imm;
	unsigned rounds = bench_rounds(b, 300000);
	uint64_t sum = 0;

	at = put(at, "\x48\x89\xf8\xb9\x10\x00\x00\x00", 8);    /* mov %rdi, %rax; mov $16, %ecx */
	imm = at + 2;
	at = put32(put(at, "\x48\x05", 2), 1);                  /* 1: add $imm, %rax */
	at = put(at, "\x48\xc1\xc0\x05\xff\xc9\x75\xf2\xc3", 9);        /* rol $5, %rax; dec %ecx; jnz 1b; ret */
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++) {
		put32(imm, r);
		sum += call(area, sum);
	}
	return sum;
}

/* Counters in the page of the code that counts them: no code changes, but its page is written all the time. */
static uint64_t run_near(struct bench *b)
{
	uint8_t *area = code_area(65536, RWX), *at = area;
	unsigned rounds = bench_rounds(b, 2000000);
	uint64_t sum = 0, *counter = (uint64_t *)(area + 2048);

	at = put(at, "\x48\x89\xf8\x48\xff\x05", 6);            /* mov %rdi, %rax; incq counter(%rip) */
	at = put32(at, (uint32_t)((uint8_t *)counter - (at + 4)));
	at = put(at, "\x48\x8d\x04\x80\xc3", 5);                /* lea (%rax,%rax,4), %rax; ret */
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++)
		sum += call(area, sum);
	return sum + *counter;
}

/* Straight code that runs once: 80,000 instructions a round in one long function. */
static uint64_t run_straight(struct bench *b)
{
	size_t size = 1u << 20;
	uint8_t *area = code_area(size, RWX);
	unsigned rounds = bench_rounds(b, 30);
	uint64_t sum = 0;

	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++) {
		emit_fn(b, area, 80000);
		sum += call(area, sum);
	}
	return sum;
}

/* Written, then made executable, as JIT compilers that keep W^X do. */
static uint64_t run_protect(struct bench *b)
{
	uint8_t *area = code_area(65536, PROT_READ | PROT_WRITE);
	unsigned rounds = bench_rounds(b, 6000);
	uint64_t sum = 0;

	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++) {
		uint8_t *code = area + (r & 15) * 4096;

		if (mprotect(code, 4096, PROT_READ | PROT_WRITE))
			bench_die("mprotect: %s", strerror(errno));
		emit_fn(b, code, 40);
		if (mprotect(code, 4096, PROT_READ | PROT_EXEC))
			bench_die("mprotect: %s", strerror(errno));
		for (unsigned t = 0; t < 10; t++)
			sum += call(code, sum + t);
	}
	return sum;
}

/* Mapped, filled, run, unmapped: every function in memory that is new. */
static uint64_t run_map(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 5000);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		uint8_t *code = code_area(8192, RWX);

		emit_fn(b, code + 64 * (r & 31), 40);
		for (unsigned t = 0; t < 10; t++)
			sum += call(code + 64 * (r & 31), sum + t);
		munmap(code, 8192);
	}
	return sum;
}

/* A big program that was warm before and is read through again: 2,000 functions of 60 instructions called in turn, few times. */
static uint64_t run_wide(struct bench *b)
{
	uint8_t *area = code_area(2u << 20, RWX), *at = area;
	static uint8_t *fn[4000];
	unsigned rounds = bench_rounds(b, 300);
	uint64_t sum = 0;

	for (unsigned f = 0; f < 4000; f++) {
		fn[f] = at;
		at = emit_fn(b, at, 60);
	}
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned f = 0; f < 4000; f++)
			sum += call(fn[(f * 1597u + r) % 4000], sum);
	return sum;
}

const struct bench_item items_jit[] = {
	{ "jit", "fresh-once", run_once },
	{ "jit", "fresh-20x", run_warm },
	{ "jit", "fresh-1500x", run_hot },
	{ "jit", "rewrite", run_rewrite },
	{ "jit", "patch-immediate", run_patch },
	{ "jit", "data-near-code", run_near },
	{ "jit", "straight-80k", run_straight },
	{ "jit", "mprotect-flip", run_protect },
	{ "jit", "map-fill-run", run_map },
	{ "jit", "wide", run_wide },
	{ 0 },
};
