/* Branches, calls and interpreters. */
#include "bench/items/items.h"

#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

enum op { PUSH, ADD, SUB, MUL, DUP, SWAP, LOAD, STORE, JNZ, LESS, XOR, HALT };

/* sum of (i * i ^ i - 3) while i counts down from local 0, inner loop 16 */
static const int16_t program[] = {
	PUSH, 0, STORE, 1,
	/* 4: */ PUSH, 16, STORE, 2,
	/* 8: */ LOAD, 0, LOAD, 0, MUL, LOAD, 2, XOR, PUSH, 3, SUB, LOAD, 1, ADD, STORE, 1,
	LOAD, 2, PUSH, 1, SUB, DUP, STORE, 2, JNZ, 8,
	LOAD, 0, PUSH, 1, SUB, DUP, STORE, 0, JNZ, 4,
	LOAD, 1, HALT,
};

static NOINLINE uint64_t vm_switch(uint64_t n)
{
	uint64_t st[16], local[4] = { n }, *sp = st, t;
	const int16_t *pc = program;

	for (;;)
		switch ((enum op)*pc++) {
		case PUSH: *sp++ = (uint64_t)*pc++; break;
		case ADD: sp--; sp[-1] += *sp; break;
		case SUB: sp--; sp[-1] -= *sp; break;
		case MUL: sp--; sp[-1] *= *sp; break;
		case XOR: sp--; sp[-1] ^= *sp; break;
		case LESS: sp--; sp[-1] = sp[-1] < *sp; break;
		case DUP: *sp = sp[-1]; sp++; break;
		case SWAP: t = sp[-1]; sp[-1] = sp[-2]; sp[-2] = t; break;
		case LOAD: *sp++ = local[*pc++]; break;
		case STORE: local[*pc++] = *--sp; break;
		case JNZ: t = *--sp; pc = t ? program + *pc : pc + 1; break;
		case HALT: return sp[-1];
		}
}

static NOINLINE uint64_t vm_goto(uint64_t n)
{
	static const void *const to[] = { &&push, &&add, &&sub, &&mul, &&dup, &&swap, &&load, &&store, &&jnz, &&less, &&xor, &&halt };
	uint64_t st[16], local[4] = { n }, *sp = st, t;
	const int16_t *pc = program;

#define NEXT goto *to[*pc++]
	NEXT;
push:	*sp++ = (uint64_t)*pc++; NEXT;
add:	sp--; sp[-1] += *sp; NEXT;
sub:	sp--; sp[-1] -= *sp; NEXT;
mul:	sp--; sp[-1] *= *sp; NEXT;
xor:	sp--; sp[-1] ^= *sp; NEXT;
less:	sp--; sp[-1] = sp[-1] < *sp; NEXT;
dup:	*sp = sp[-1]; sp++; NEXT;
swap:	t = sp[-1]; sp[-1] = sp[-2]; sp[-2] = t; NEXT;
load:	*sp++ = local[*pc++]; NEXT;
store:	local[*pc++] = *--sp; NEXT;
jnz:	t = *--sp; pc = t ? program + *pc : pc + 1; NEXT;
halt:	return sp[-1];
#undef NEXT
}

static uint64_t run_switch(struct bench *b)
{
	return vm_switch(bench_rounds(b, 90000));
}

static uint64_t run_goto(struct bench *b)
{
	return vm_goto(bench_rounds(b, 140000));
}

static NOINLINE uint64_t fib(unsigned n)
{
	return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static uint64_t run_fib(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 90);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++)
		sum += fib(26 + (r & 1));
	return sum;
}

static NOINLINE unsigned queens(unsigned all, unsigned cols, unsigned left, unsigned right)
{
	unsigned n = 0, free = all & ~(cols | left | right);

	if (cols == all)
		return 1;
	while (free) {
		unsigned q = free & -free;

		free ^= q;
		n += queens(all, cols | q, (left | q) << 1, (right | q) >> 1);
	}
	return n;
}

static uint64_t run_queens(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 80);
	uint64_t n = 0;

	for (unsigned r = 0; r < rounds; r++)
		n += queens((1u << (10 + r % 2)) - 1, 0, 0, 0);
	return n;
}

struct shape {
	const struct shape_ops *ops;
	uint64_t a, b;
};

struct shape_ops {
	uint64_t (*area)(const struct shape *s);
	void (*grow)(struct shape *s, uint64_t by);
};

static uint64_t square_area(const struct shape *s) { return s->a * s->a; }
static uint64_t rect_area(const struct shape *s) { return s->a * s->b; }
static uint64_t tri_area(const struct shape *s) { return s->a * s->b / 2; }
static uint64_t ring_area(const struct shape *s) { return 3 * (s->a * s->a - s->b * s->b); }
static void grow_a(struct shape *s, uint64_t by) { s->a += by; }
static void grow_b(struct shape *s, uint64_t by) { s->b += by; }
static void grow_ab(struct shape *s, uint64_t by) { s->a += by; s->b ^= by; }

static uint64_t run_virtual(struct bench *b)
{
	static const struct shape_ops ops[] = { { square_area, grow_a }, { rect_area, grow_b }, { tri_area, grow_ab }, { ring_area, grow_a } };
	static struct shape shapes[1024];
	unsigned rounds = bench_rounds(b, 6000);
	uint64_t sum = 0;

	for (unsigned i = 0; i < 1024; i++)
		shapes[i] = (struct shape){ &ops[bench_random(b) % 4], i, i * 3 };
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < 1024; i++) {
			sum += shapes[i].ops->area(&shapes[i]);
			shapes[i].ops->grow(&shapes[i], sum & 7);
		}
	return sum;
}

static uint64_t run_unpredictable(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 7000000);
	uint64_t v = 88172645463325252ull, a = 0, c = 0;

	for (unsigned r = 0; r < rounds; r++) {
		v ^= v << 13;
		v ^= v >> 7;
		v ^= v << 17;
		if (v & 1)
			a += v >> 40;
		else
			c ^= v;
		if ((v & 6) == 2)
			a = a * 5 + 1;
		bench_keep(a);
	}
	return a ^ c;
}

struct tree {
	struct tree *kid[2];
	uint32_t key, prio;
};

static NOINLINE struct tree *insert(struct tree *t, struct tree *n)
{
	unsigned side;

	if (!t)
		return n;
	side = n->key > t->key;
	t->kid[side] = insert(t->kid[side], n);
	if (t->kid[side]->prio > t->prio) {
		struct tree *k = t->kid[side];

		t->kid[side] = k->kid[!side];
		k->kid[!side] = t;
		return k;
	}
	return t;
}

static uint64_t run_tree(struct bench *b)
{
	unsigned n = bench_rounds(b, 80000);
	struct tree *pool = bench_alloc(n * sizeof *pool), *root = NULL;
	uint64_t depth = 0;

	bench_begin(b);
	for (unsigned i = 0; i < n; i++) {
		pool[i].key = (uint32_t)bench_random(b);
		pool[i].prio = (uint32_t)bench_random(b);
		root = insert(root, &pool[i]);
	}
	for (unsigned i = 0; i < n; i++)
		for (struct tree *t = root; t->key != pool[i].key; t = t->kid[pool[i].key > t->key])
			depth++;
	return depth;
}

/* A backtracking matcher: characters, '.', '*', '^' and '$'. */
static int match_here(const char *re, const char *s);

static NOINLINE int match_star(char c, const char *re, const char *s)
{
	do {
		if (match_here(re, s))
			return 1;
	} while (*s && (*s++ == c || c == '.'));
	return 0;
}

static NOINLINE int match_here(const char *re, const char *s)
{
	if (!*re)
		return 1;
	if (re[1] == '*')
		return match_star(*re, re + 2, s);
	if (*re == '$' && !re[1])
		return !*s;
	if (*s && (*re == '.' || *re == *s))
		return match_here(re + 1, s + 1);
	return 0;
}

static uint64_t run_regex(struct bench *b)
{
	static const char *const res[] = { "a.*b.*c$", "x*y*z", "q.*u.*a.*d", ".*e.*f.*g.*h$", "ab*c*d" };
	static char text[64][81];
	unsigned rounds = bench_rounds(b, 18);
	uint64_t hits = 0;

	for (unsigned i = 0; i < 64; i++)
		for (unsigned k = 0; k < 80; k++)
			text[i][k] = (char)('a' + bench_random(b) % 26);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned k = 0; k < 5; k++)
			for (unsigned i = 0; i < 64; i++)
				for (const char *s = text[i]; *s; s++)
					hits += (uint64_t)match_here(res[k], s) << k;
	return hits;
}

static NOINLINE unsigned dive(jmp_buf env, unsigned depth, unsigned v)
{
	volatile unsigned keep = v;

	if (!depth) {
		if (v != ~0u)
			longjmp(env, 1 + (int)(v & 15));
		return v;
	}
	return dive(env, depth - 1, v * 5 + 1) + keep;
}

static uint64_t run_longjmp(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 2000000);
	uint64_t sum = 0;

	for (volatile unsigned r = 0; r < rounds; r++) {
		jmp_buf env;
		int got = setjmp(env);

		if (!got)
			sum += dive(env, 8, r);
		sum += (uint64_t)got;
	}
	return sum;
}

/* Calls with many arguments, a return that is mispredicted by a chain deeper than the return stack. */
static NOINLINE uint64_t deep(unsigned n, uint64_t a, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g)
{
	return n ? deep(n - 1, c, d, e, f, g, a + n) + g : a ^ c ^ d ^ e ^ f ^ g;
}

static uint64_t run_deep(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 300000);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++)
		sum += deep(200, r, 1, 2, 3, 4, 5);
	return sum;
}

const struct bench_item items_branch[] = {
	{ "branch", "vm-switch", run_switch },
	{ "branch", "vm-goto", run_goto },
	{ "branch", "fib", run_fib },
	{ "branch", "queens", run_queens },
	{ "branch", "virtual", run_virtual },
	{ "branch", "unpredictable", run_unpredictable },
	{ "branch", "treap", run_tree },
	{ "branch", "regex", run_regex },
	{ "branch", "longjmp", run_longjmp },
	{ "branch", "deep-calls", run_deep },
	{ 0 },
};
