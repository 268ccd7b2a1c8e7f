/*
 * What bench/mips.c runs in the guest: integer programs as a compiler makes them. Everything is code in one
 * section that can be copied anywhere: no data, no calls out of this file, no vector registers.
 */
#include "bench/guest_work.h"

#define GUEST __attribute__((section("guest_work"), used))
#define NOINLINE GUEST __attribute__((noinline))

static inline uint32_t ror(uint32_t x, unsigned n) { return x >> n | x << (32 - n); }

/* One SHA-256 block after another over `data`; the round constants are in `table`. */
GUEST void work_sha(struct work *w)
{
	uint32_t h[8], s[64];

	for (unsigned i = 0; i < 8; i++)
		h[i] = w->table[64 + i];
	for (uint64_t n = 0; n < w->rounds; n++) {
		uint32_t v[8], t1, t2;
		const uint32_t *in = (const uint32_t *)(w->data + n % 1024 * 64);

		for (unsigned i = 0; i < 16; i++)
			s[i] = __builtin_bswap32(in[i]);
		for (unsigned i = 16; i < 64; i++)
			s[i] = s[i - 16] + (ror(s[i - 15], 7) ^ ror(s[i - 15], 18) ^ s[i - 15] >> 3) + s[i - 7] +
			       (ror(s[i - 2], 17) ^ ror(s[i - 2], 19) ^ s[i - 2] >> 10);
		for (unsigned i = 0; i < 8; i++)
			v[i] = h[i];
		for (unsigned i = 0; i < 64; i++) {
			t1 = v[7] + (ror(v[4], 6) ^ ror(v[4], 11) ^ ror(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) +
			     w->table[i] + s[i];
			t2 = (ror(v[0], 2) ^ ror(v[0], 13) ^ ror(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
			v[7] = v[6], v[6] = v[5], v[5] = v[4], v[4] = v[3] + t1;
			v[3] = v[2], v[2] = v[1], v[1] = v[0], v[0] = t1 + t2;
		}
		for (unsigned i = 0; i < 8; i++)
			h[i] += v[i];
	}
	w->result = h[0];
}

/* Quicksort of 32-bit numbers, refilled from a generator every time. */
NOINLINE static void sort(uint32_t *a, long lo, long hi)
{
	while (lo < hi) {
		uint32_t pivot = a[(lo + hi) / 2], t;
		long i = lo, j = hi;

		while (i <= j) {
			while (a[i] < pivot)
				i++;
			while (a[j] > pivot)
				j--;
			if (i <= j)
				t = a[i], a[i++] = a[j], a[j--] = t;
		}
		sort(a, lo, j);
		lo = i;
	}
}

GUEST void work_sort(struct work *w)
{
	uint32_t *a = (uint32_t *)w->data, x = 1;

	for (uint64_t n = 0; n < w->rounds; n++) {
		for (unsigned i = 0; i < 4096; i++)
			a[i] = x = x * 1664525 + 1013904223;
		sort(a, 0, 4095);
	}
	w->result = a[17];
}

/* Pointers through 4 MiB, one per cache line, in an order no prefetcher knows. */
GUEST void work_chase(struct work *w)
{
	uint64_t *a = (uint64_t *)w->data, at = 0, n = (4u << 20) / 64;

	for (uint64_t i = 0; i < n; i++)
		a[i * 8] = (i * 40503 + 12345) % n * 8;
	for (uint64_t i = 0; i < w->rounds * 4096; i++)
		at = a[at];
	w->result = at;
}

/* A small bytecode machine: an indirect call and a few unpredictable branches per step. */
NOINLINE static uint64_t op_add(uint64_t v, uint64_t k) { return v + k; }
NOINLINE static uint64_t op_mix(uint64_t v, uint64_t k) { return v & 1 ? v * 3 + k : v >> 1; }
NOINLINE static uint64_t op_rot(uint64_t v, uint64_t k) { return v << (k & 31) | v >> (63 - (k & 31)); }
NOINLINE static uint64_t op_cmp(uint64_t v, uint64_t k) { return v > k << 20 ? v - k : v ^ k; }

GUEST void work_calls(struct work *w)
{
	uint64_t (*fn[4])(uint64_t, uint64_t);
	uint64_t v = 1;

	fn[0] = op_add;
	fn[1] = op_mix;
	fn[2] = op_rot;
	fn[3] = op_cmp;
	for (uint64_t i = 0; i < w->rounds * 4096; i++)
		v = fn[(v ^ i) & 3](v, i);
	w->result = v;
}

/* strlen, compare and case folding over words of text. */
GUEST void work_text(struct work *w)
{
	uint8_t *s = w->data;
	uint64_t words = 0;

	for (unsigned i = 0; i < 8192; i++)
		s[i] = i % 7 == 6 ? ' ' : (uint8_t)('A' + i * 11 % 26);
	for (uint64_t n = 0; n < w->rounds; n++)
		for (unsigned i = 0; i < 8192; i++) {
			uint8_t c = s[i];

			if (c >= 'A' && c <= 'Z')
				s[i] = c | 0x20;
			else if (c >= 'a' && c <= 'z')
				s[i] = c & 0xdf;
			else
				words++;
		}
	w->result = words;
}

/* 16 KiB a round with rep movsb and rep stosq: what counts here is bytes, not instructions. */
GUEST void work_copy(struct work *w)
{
	for (uint64_t n = 0; n < w->rounds * 16; n++) {
		void *d = w->data + 65536, *s = w->data;
		uint64_t c = 8192;

		__asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(c) : : "memory");
		d = w->data;
		c = 1024;
		__asm__ volatile("rep stosq" : "+D"(d), "+c"(c) : "a"(n) : "memory");
	}
}

/* Copying by hand, eight bytes at a time. */
GUEST void work_move(struct work *w)
{
	volatile uint64_t *s = (uint64_t *)w->data, *d = (uint64_t *)(w->data + 65536);

	for (uint64_t n = 0; n < w->rounds; n++)
		for (unsigned i = 0; i < 2048; i += 4) {
			d[i] = s[i];
			d[i + 1] = s[i + 1];
			d[i + 2] = s[i + 2];
			d[i + 3] = s[i + 3];
		}
}
