/* Random code for block_test.c: what a loop's body is made of (block_make.c), and programs of calls and returns (block_calls.c). */
#ifndef TESTS_BLOCK_MAKE_H
#define TESTS_BLOCK_MAKE_H

#include <string.h>

#include "harness.h"
#include "softkvm/jit/internal.h"

#define PAGES 16                /* restored before every run; operands lie in the middle */
#define BASE 0x400000u          /* 4 KiB pages, every second one missing (harness.c) */
#define DATA (BASE + 4096 * 4)
#define CODE_MAX 2048
#define BODY 12

struct code { uint8_t b[CODE_MAX]; unsigned n, at[BODY * 2 + 4], count; unsigned jumps, jump_at[BODY]; };

extern uint64_t rng;
extern ZydisDecoder dec;
extern bool narrow;             /* 32-bit code */
extern bool moved;              /* at another address now and then */
extern bool evex;               /* AVX-512 instructions among the others */
extern bool patched;            /* other values now and then */
extern unsigned count_seg;      /* where its counter is: flat */

static inline uint64_t rnd(void)
{
	rng ^= rng >> 12;
	rng ^= rng << 25;
	rng ^= rng >> 27;
	return rng * 0x2545f4914f6cdd1dULL;
}
static inline unsigned below(unsigned n) { return (unsigned)(rnd() % n); }

static inline void put(struct code *c, const void *p, unsigned n)
{
	memcpy(c->b + c->n, p, n);
	c->n += n;
}
static inline void put32(struct code *c, uint32_t v) { put(c, &v, 4); }

/* A program that begins at H_CODE + at, runs its body [0x500000] times, and ends with HLT. */
void make(struct code *c, bool vec, unsigned at);
void make_calls(struct code *c, unsigned at);

#endif
