/*
 * The 32-bit items: a freestanding program (no 32-bit C library is asked for), started by i386.c with the item's name and the scale.
 * Writes struct i386_result to standard output and leaves with 0; with 3 where the kernel does not know a call.
 */
#include "bench/items/i386.h"

#define NOINLINE __attribute__((noinline))
#define LONG __attribute__((regparm(0), noinline))      /* arguments on the stack, as the i386 ABI has it */

typedef uint32_t u32;
typedef uint8_t u8;

static long call(long n, long a, long b, long c)
{
	long r;

	__asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory");
	return r;
}

static u32 mix(u32 h, u32 v)
{
	for (int i = 0; i < 4; i++, v >>= 8)
		h = (h ^ (v & 255)) * 16777619u;
	return h;
}

static u32 random_next(u32 *s) { return *s = *s * 1664525u + 1013904223u; }

/* -- items: each returns a hash ---------------------------------------------------------------------------- */
static u32 words[1 << 16];
static u8 text[1 << 16], copy[1 << 16];

static u32 rotate(u32 v, unsigned n) { return v << n | v >> (32 - n); }

/* Additions, rotations and xors with many live values: registers spill. */
static u32 run_rounds(u32 n)
{
	u32 a = 1, b = 2, c = 3, d = 4, e = 5, f = 6;

	for (u32 i = 0; i < n * 600000; i++) {
		u32 t = rotate(a, 5) + ((b & c) | (~b & d)) + e + words[i & 255];

		e = d;
		d = c;
		c = rotate(b, 30);
		b = a ^ f;
		f = rotate(f, 7) + t;
		a = t;
		words[i & 255] ^= a;
	}
	return mix(mix(a, b ^ c), d ^ e);
}

static void LONG sort(u32 *v, int lo, int hi)
{
	while (lo < hi) {
		u32 p = v[(lo + hi) / 2];
		int i = lo, j = hi;

		while (i <= j) {
			while (v[i] < p)
				i++;
			while (v[j] > p)
				j--;
			if (i <= j) {
				u32 t = v[i];

				v[i++] = v[j];
				v[j--] = t;
			}
		}
		sort(v, lo, j);
		lo = i;
	}
}

static u32 run_sort(u32 n)
{
	u32 s = 1, h = 0;

	for (u32 r = 0; r < n; r++) {
		for (u32 i = 0; i < 1 << 16; i++)
			words[i] = random_next(&s);
		sort(words, 0, (1 << 16) - 1);
		h = mix(h, words[12345]);
	}
	return h;
}

static u32 LONG fib(u32 n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }

static u32 run_calls(u32 n)
{
	u32 h = 0;

	while (n--) {
		u32 k = 26;

		__asm__ volatile("" : "+r"(k));         /* each time anew */
		h = mix(h, fib(k));
	}
	return h;
}

/* 2048-bit numbers: multiply, and add with carry. */
static u32 run_bignum(u32 n)
{
	static u32 a[64], b[64], p[128];
	u32 s = 7;

	for (int i = 0; i < 64; i++)
		a[i] = random_next(&s), b[i] = random_next(&s);
	for (u32 r = 0; r < n * 800; r++) {
		for (int i = 0; i < 128; i++)
			p[i] = 0;
		for (int i = 0; i < 64; i++) {
			u32 carry = 0;

			for (int j = 0; j < 64; j++) {
				uint64_t t = (uint64_t)a[i] * b[j] + p[i + j] + carry;

				p[i + j] = (u32)t;
				carry = (u32)(t >> 32);
			}
			p[i + 64] = carry;
		}
		a[r & 63] ^= p[64];
	}
	return mix(p[3], p[100]);
}

/* A bytecode loop: an indirect jump an instruction. */
static u32 NOINLINE interpret(const u8 *pc, u32 count)
{
	u32 acc = 0, x = 1;

	for (;;)
		switch (*pc++) {
		case 0: acc += x; break;
		case 1: x = x * 3 + 1; break;
		case 2: acc ^= x >> 3; break;
		case 3: x += *pc++; break;
		case 4: if (acc & 1) pc++; break;
		case 5: acc = rotate(acc, 9); break;
		case 6: if (--count == 0) return acc ^ x; pc -= *pc + 1; break;
		default: x -= acc; break;
		}
}

static u32 run_bytecode(u32 n)
{
	static const u8 program[] = { 0, 1, 2, 3, 77, 4, 5, 0, 7, 2, 1, 4, 5, 6, 13 };

	return interpret(program, n * 200000);
}

static u32 run_strings(u32 n)
{
	u32 h = 0, s = 3;

	for (u32 i = 0; i < sizeof text; i++)
		text[i] = (u8)(random_next(&s) >> 24) | 1;
	for (u32 r = 0; r < n * 25; r++) {
		u8 *d = copy;
		const u8 *p = text;
		u32 left = sizeof text, bytes = 0;

		__asm__ volatile("rep movsb" : "+D"(d), "+S"(p), "+c"(left) : : "memory");
		text[(r * 131) & 0xffff] ^= 2;
		for (u32 i = 0; i < sizeof text; i++)
			bytes += copy[i] == 'a' ? 3 : copy[i] < 'z';
		h = mix(h, bytes);
	}
	return h;
}

static u32 run_x87(u32 n)
{
	double v = 1, s = 0;
	unsigned short cw = 0x27f;      /* 53 bits: the same on every machine */

	__asm__ volatile("fldcw %0" : : "m"(cw));
	for (u32 i = 1; i < n * 500000; i++) {
		v = v * 1.0000001 + 1.0 / (int)i;
		s += v > 5 ? v : -v;
	}
	return (u32)(int)(s / 1e6);
}

/* Accesses by way of %gs, as 32-bit threads reach their own data. */
static u32 run_tls(u32 n)
{
	struct { u32 entry, base, limit, flags; } d = { ~0u, (u32)words + 64, 0xfffff, 0x51 };
	u32 h = 0;

	if (call(243, (long)&d, 0, 0))
		call(1, 3, 0, 0);
	__asm__ volatile("movw %w0, %%gs" : : "r"(d.entry * 8 + 3));
	for (u32 i = 0; i < n * 2000000; i++) {
		u32 v;

		__asm__ volatile("movl %%gs:-4, %0; addl %1, %0; movl %0, %%gs:(,%2,4)" : "=&r"(v) : "r"(i), "r"(i & 63) : "memory");
		h += v;
	}
	return h;
}

static u32 run_syscall(u32 n)
{
	u32 h = 0;

	for (u32 i = 0; i < n * 1000; i++)
		h += (u32)call(20, 0, 0, 0) > 0;
	return h;
}

/* -- main ------------------------------------------------------------------------------------------------------ */
static const struct { const char *name; u32 (*run)(u32 n); u32 rounds; } items[] = {
	{ "rounds", run_rounds, 30 }, { "sort", run_sort, 8 }, { "calls", run_calls, 60 }, { "bignum", run_bignum, 15 },
	{ "bytecode", run_bytecode, 4 }, { "strings", run_strings, 30 }, { "x87", run_x87, 15 }, { "tls", run_tls, 30 },
	{ "syscall", run_syscall, 10 },
};

static bool same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static uint64_t now(void)
{
	struct { u32 s, ns; } t;

	call(265, 1, (long)&t, 0);
	return (uint64_t)t.s * 1000000000u + t.ns;
}

__attribute__((used)) void begin(char **argv);
void begin(char **argv)
{
	struct i386_result r = { 0 };
	u32 scale = 0, n;

	for (const char *p = argv[2]; *p; p++)
		scale = scale * 10 + (u32)(*p - '0');
	for (u32 i = 0; i < sizeof items / sizeof items[0]; i++) {
		if (!same(items[i].name, argv[1]))
			continue;
		n = items[i].rounds * scale / 100;
		r.ns = now();
		r.hash = items[i].run(n ? n : 1);
		r.ns = now() - r.ns;
		call(4, 1, (long)&r, sizeof r);
		call(1, 0, 0, 0);
	}
	call(1, 2, 0, 0);
}

__asm__(".globl _start\n_start:\n\txorl %ebp, %ebp\n\tleal 4(%esp), %eax\n\tandl $-16, %esp\n\tsubl $12, %esp\n\tpushl %eax\n\tcall begin\n");
