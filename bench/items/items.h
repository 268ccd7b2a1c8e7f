/*
 * The benchmark's items: small programs, natively and in a guest the same binary, that each do a fixed amount of work, print
 * a checksum of what they worked out and the seconds they took. `bench/suite` runs them; README.md in bench/ says how.
 *
 * An item is a function. What it does before bench_begin() (tables, files, random data) is not timed; without that call all
 * of it is. Its result must not depend on the machine: it is compared between native run and guests.
 */
#ifndef BENCH_ITEMS_H
#define BENCH_ITEMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bench {
	unsigned scale;                 /* amount of work in per cent of the item's own */
	double begin, end;              /* CLOCK_MONOTONIC, seconds; end 0 while it runs */
	uint64_t rng;
	bool skipped;                   /* the processor or the system lacks what the item needs */
};

struct bench_item {
	const char *class, *name;
	uint64_t (*run)(struct bench *b);
};

/* One table a class, ended by a NULL name. */
extern const struct bench_item items_int[], items_branch[], items_string[], items_fp[], items_simd[], items_mem[], items_os[],
	items_jit[], items_app[], items_i386[];

void bench_begin(struct bench *b);
void bench_end(struct bench *b);

/* `n` repetitions at scale 100; at least one. */
unsigned bench_rounds(const struct bench *b, unsigned n);

/* xorshift64*, the same sequence in every run. */
uint64_t bench_random(struct bench *b);

/* Memory or the end of the program. Zeroed, page-aligned, every page touched. */
void *bench_alloc(size_t size);

void __attribute__((noreturn, format(printf, 1, 2))) bench_die(const char *fmt, ...);

/* FNV-1a over bytes, going on from `h` (0 to start). */
uint64_t bench_hash(uint64_t h, const void *p, size_t n);

/* Keep a value alive, and make the compiler forget what it knows about memory. */
#define bench_keep(x) __asm__ volatile("" : : "g"(x) : "memory")

#ifdef __clang__
#define NOINLINE __attribute__((noinline))
#else
#define NOINLINE __attribute__((noinline, noclone))
#endif

#endif
