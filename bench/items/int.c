/* Integer programs as compilers make them. */
#include "bench/items/items.h"

#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

static inline uint32_t ror(uint32_t x, unsigned n) { return x >> n | x << (32 - n); }

/* What CoreMark does, in small: a linked list that is searched and sorted, a matrix, a state machine over text, a CRC of all. */
struct node {
	struct node *next;
	int16_t value, index;
};

static uint16_t crc16(uint16_t crc, uint16_t v)
{
	for (unsigned i = 0; i < 16; i++, v >>= 1)
		crc = (uint16_t)((crc ^ v) & 1 ? crc >> 1 ^ 0xa001 : crc >> 1);
	return crc;
}

static struct node *list_merge(struct node *a, struct node *b, bool by_index)
{
	struct node head, *tail = &head;

	while (a && b) {
		struct node **take = (by_index ? a->index <= b->index : a->value <= b->value) ? &a : &b;

		tail->next = *take;
		tail = *take;
		*take = (*take)->next;
	}
	tail->next = a ? a : b;
	return head.next;
}

static struct node *list_sort(struct node *list, bool by_index)
{
	struct node *slow = list, *fast;

	if (!list || !list->next)
		return list;
	for (fast = list->next; fast && fast->next; fast = fast->next->next)
		slow = slow->next;
	fast = slow->next;
	slow->next = NULL;
	return list_merge(list_sort(list, by_index), list_sort(fast, by_index), by_index);
}

static unsigned state_machine(const char *s, unsigned counts[8])
{
	enum { START, SIGN, INT, DOT, FRAC, EXP, BAD } st = START;

	for (; *s; s++) {
		char c = *s;

		if (c == ',') {
			counts[st]++;
			st = START;
			continue;
		}
		switch (st) {
		case START: st = c == '+' || c == '-' ? SIGN : c >= '0' && c <= '9' ? INT : c == '.' ? DOT : BAD; break;
		case SIGN:
		case INT: st = c >= '0' && c <= '9' ? INT : c == '.' ? FRAC : c == 'e' ? EXP : BAD; break;
		case DOT:
		case FRAC: st = c >= '0' && c <= '9' ? FRAC : c == 'e' ? EXP : BAD; break;
		case EXP: st = (c >= '0' && c <= '9') || c == '-' ? EXP : BAD; break;
		case BAD: break;
		}
	}
	counts[st]++;
	return counts[INT] * 7 + counts[FRAC] * 3 + counts[BAD];
}

static int matrix(int16_t *a, int16_t *b, int32_t *c, unsigned n, int add)
{
	int sum = 0;

	for (unsigned i = 0; i < n; i++)
		for (unsigned j = 0; j < n; j++) {
			int32_t s = 0;

			for (unsigned k = 0; k < n; k++)
				s += a[i * n + k] * (b[k * n + j] + add);
			c[i * n + j] = s;
			sum += (s >> 2 & 15) + (s >> 5 & 127);
		}
	return sum;
}

static uint64_t run_coremark(struct bench *b)
{
	static struct node nodes[256];
	static int16_t ma[24 * 24], mb[24 * 24];
	static int32_t mc[24 * 24];
	static const char text[] = "5012,-12.25,+.7e3,1e-5,T0.2,874,3.,e,99.5e+,-,12e3,.5,0.0,xyz,65535,-1";
	unsigned rounds = bench_rounds(b, 3600);
	uint16_t crc = 0;

	for (unsigned i = 0; i < 24 * 24; i++) {
		ma[i] = (int16_t)(i * 31 % 251);
		mb[i] = (int16_t)(i * 17 % 127);
	}
	for (unsigned r = 0; r < rounds; r++) {
		struct node *list = nodes, *n;
		unsigned counts[8] = { 0 };

		for (unsigned i = 0; i < 256; i++)
			nodes[i] = (struct node){ i < 255 ? &nodes[i + 1] : NULL, (int16_t)((i * 7919 + r * 13) % 1021), (int16_t)i };
		list = list_sort(list, false);
		for (n = list; n; n = n->next)
			crc = crc16(crc, (uint16_t)n->value);
		list = list_sort(list, true);
		crc = crc16(crc, (uint16_t)(list->value + matrix(ma, mb, mc, 24, (int)(r & 7))));
		for (unsigned i = 0; i < 8; i++)
			crc = crc16(crc, (uint16_t)state_machine(text, counts));
	}
	return crc;
}

static const uint32_t sha_k[8] = { 0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5 };

/* SHA-256's round function (constants repeat: the work is the same). */
static void sha_block(uint32_t h[8], const uint32_t *in)
{
	uint32_t w[64], s[8];

	memcpy(w, in, 64);
	for (unsigned i = 16; i < 64; i++)
		w[i] = w[i - 16] + (ror(w[i - 15], 7) ^ ror(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
			(ror(w[i - 2], 17) ^ ror(w[i - 2], 19) ^ w[i - 2] >> 10);
	memcpy(s, h, 32);
	for (unsigned i = 0; i < 64; i++) {
		uint32_t t1 = s[7] + (ror(s[4], 6) ^ ror(s[4], 11) ^ ror(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + sha_k[i & 7] + w[i];
		uint32_t t2 = (ror(s[0], 2) ^ ror(s[0], 13) ^ ror(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));

		memmove(s + 1, s, 28);
		s[4] += t1;
		s[0] = t1 + t2;
	}
	for (unsigned i = 0; i < 8; i++)
		h[i] += s[i];
}

static uint64_t run_sha256(struct bench *b)
{
	uint32_t h[8] = { 1, 2, 3, 4, 5, 6, 7, 8 }, data[16];
	unsigned rounds = bench_rounds(b, 130000);

	for (unsigned i = 0; i < 16; i++)
		data[i] = i * 2654435761u;
	for (unsigned r = 0; r < rounds; r++) {
		sha_block(h, data);
		data[r & 15] ^= h[r & 7];
	}
	return bench_hash(0, h, sizeof h);
}

static void quicksort(uint32_t *a, long lo, long hi)
{
	while (lo < hi) {
		uint32_t p = a[(lo + hi) / 2];
		long i = lo, j = hi;

		while (i <= j) {
			while (a[i] < p)
				i++;
			while (a[j] > p)
				j--;
			if (i <= j) {
				uint32_t t = a[i];

				a[i++] = a[j];
				a[j--] = t;
			}
		}
		quicksort(a, lo, j);
		lo = i;
	}
}

static uint64_t run_sort(struct bench *b)
{
	unsigned n = bench_rounds(b, 1500000);
	uint32_t *a = bench_alloc(n * sizeof *a);
	uint64_t h = 0;

	for (unsigned i = 0; i < n; i++)
		a[i] = (uint32_t)bench_random(b);
	bench_begin(b);
	quicksort(a, 0, (long)n - 1);
	bench_end(b);
	for (unsigned i = 0; i < n; i += 97)
		h = h * 31 + a[i];
	return h;
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static uint64_t run_qsort(struct bench *b)
{
	unsigned n = bench_rounds(b, 600000);
	uint64_t *a = bench_alloc(n * sizeof *a), h = 0;

	for (unsigned i = 0; i < n; i++)
		a[i] = bench_random(b);
	bench_begin(b);
	qsort(a, n, sizeof *a, by_value);
	bench_end(b);
	for (unsigned i = 0; i < n; i += 97)
		h = h * 31 + a[i];
	return h;
}

#define LIMBS 32

/* a * b mod 2^(64 * LIMBS) - 1: schoolbook with 128-bit products, end-around fold. */
static void big_mul(uint64_t *r, const uint64_t *a, const uint64_t *b)
{
	uint64_t t[2 * LIMBS] = { 0 }, carry = 0;

	for (unsigned i = 0; i < LIMBS; i++) {
		unsigned __int128 c = 0;

		for (unsigned j = 0; j < LIMBS; j++) {
			c += (unsigned __int128)a[i] * b[j] + t[i + j];
			t[i + j] = (uint64_t)c;
			c >>= 64;
		}
		t[i + LIMBS] = (uint64_t)c;
	}
	for (unsigned i = 0; i < LIMBS; i++) {
		unsigned __int128 c = (unsigned __int128)t[i] + t[i + LIMBS] + carry;

		r[i] = (uint64_t)c;
		carry = (uint64_t)(c >> 64);
	}
	r[0] += carry;
}

static uint64_t run_bignum(struct bench *b)
{
	uint64_t x[LIMBS], y[LIMBS];
	unsigned rounds = bench_rounds(b, 40000);

	for (unsigned i = 0; i < LIMBS; i++) {
		x[i] = bench_random(b);
		y[i] = bench_random(b);
	}
	for (unsigned r = 0; r < rounds; r++)
		big_mul(x, x, r & 1 ? x : y);
	return bench_hash(0, x, sizeof x);
}

/* r[0..8] += a[0..7] * v with two chains of carries, as the inner loop of RSA has it. */
static void mulx_row(uint64_t *r, const uint64_t *a, uint64_t v)
{
#define STEP(at) "mulx " #at "(%1), %%r8, %%r9\n\tadcx " #at "(%0), %%r8\n\tadox %%r10, %%r8\n\tmov %%r9, %%r10\n\tmov %%r8, " #at "(%0)\n\t"
	__asm__ volatile("xor %%r10d, %%r10d\n\t" STEP(0) STEP(8) STEP(16) STEP(24) STEP(32) STEP(40) STEP(48) STEP(56)
			 "mov $0, %%r8d\n\tadcx 64(%0), %%r10\n\tadox %%r8, %%r10\n\tmov %%r10, 64(%0)"
			 : : "r"(r), "r"(a), "d"(v) : "r8", "r9", "r10", "memory", "cc");
#undef STEP
}

static uint64_t run_adx(struct bench *b)
{
	uint32_t eax, ebx = 0, ecx, edx;
	uint64_t x[8], r[32] = { 0 };
	unsigned rounds = bench_rounds(b, 600000);

	if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (ebx & (1u << 8 | 1u << 19)) != (1u << 8 | 1u << 19)) {
		b->skipped = true;
		return 0;
	}
	for (unsigned i = 0; i < 8; i++)
		x[i] = bench_random(b);
	for (unsigned k = 0; k < rounds; k++)
		for (unsigned i = 0; i < 8; i++)
			mulx_row(r + i, x, x[i] + k);
	return bench_hash(0, r, sizeof r);
}

static uint64_t run_crc32(struct bench *b)
{
	static uint32_t table[256];
	static uint8_t data[65536];
	unsigned rounds = bench_rounds(b, 350);
	uint32_t crc = ~0u;

	for (unsigned i = 0; i < 256; i++) {
		uint32_t c = i;

		for (unsigned k = 0; k < 8; k++)
			c = c & 1 ? c >> 1 ^ 0xedb88320 : c >> 1;
		table[i] = c;
	}
	for (unsigned i = 0; i < sizeof data; i++)
		data[i] = (uint8_t)bench_random(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < sizeof data; i++)
			crc = crc >> 8 ^ table[(crc ^ data[i]) & 255];
	return crc;
}

static uint64_t run_hash64(struct bench *b)
{
	static uint64_t data[4096];
	unsigned rounds = bench_rounds(b, 9000);
	uint64_t h[4] = { 1, 2, 3, 4 };

	for (unsigned i = 0; i < 4096; i++)
		data[i] = bench_random(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < 4096; i += 4)
			for (unsigned k = 0; k < 4; k++) {
				h[k] += data[i + k] * 0xc2b2ae3d27d4eb4full;
				h[k] = (h[k] << 31 | h[k] >> 33) * 0x9e3779b185ebca87ull;
			}
	return h[0] ^ h[1] ^ h[2] ^ h[3];
}

static uint64_t run_sieve(struct bench *b)
{
	static uint8_t s[1 << 20];
	unsigned rounds = bench_rounds(b, 25);
	uint64_t count = 0;

	for (unsigned r = 0; r < rounds; r++) {
		memset(s, 0, sizeof s);
		for (unsigned i = 2; i * i < sizeof s; i++)
			if (!s[i])
				for (unsigned j = i * i; j < sizeof s; j += i)
					s[j] = 1;
		for (unsigned i = 2; i < sizeof s; i++)
			count += !s[i];
	}
	return count;
}

static uint64_t run_gcd(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 500000);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		uint64_t x = bench_random(b) | 1, y = bench_random(b) >> 20 | 1;

		while (y) {
			uint64_t t = x % y;

			x = y;
			y = t;
		}
		sum += x;
	}
	return sum;
}

static uint64_t run_base64(struct bench *b)
{
	static const char set[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	static uint8_t in[49152], out[65536], map[256];
	unsigned rounds = bench_rounds(b, 1000);
	uint64_t h = 0;

	for (unsigned i = 0; i < sizeof in; i++)
		in[i] = (uint8_t)bench_random(b);
	for (unsigned i = 0; i < 64; i++)
		map[(uint8_t)set[i]] = (uint8_t)i;
	for (unsigned r = 0; r < rounds; r++) {
		for (unsigned i = 0, o = 0; i < sizeof in; i += 3, o += 4) {
			uint32_t v = (uint32_t)in[i] << 16 | (uint32_t)in[i + 1] << 8 | in[i + 2];

			out[o] = (uint8_t)set[v >> 18];
			out[o + 1] = (uint8_t)set[v >> 12 & 63];
			out[o + 2] = (uint8_t)set[v >> 6 & 63];
			out[o + 3] = (uint8_t)set[v & 63];
		}
		for (unsigned i = 0, o = 0; o < sizeof in; i += 4, o += 3) {
			uint32_t v = (uint32_t)map[out[i]] << 18 | (uint32_t)map[out[i + 1]] << 12 | (uint32_t)map[out[i + 2]] << 6 | map[out[i + 3]];

			in[o] = (uint8_t)(v >> 16);
			in[o + 1] = (uint8_t)(v >> 8);
			in[o + 2] = (uint8_t)(v + r);
		}
		h += in[r % sizeof in];
	}
	return h;
}

/* A greedy LZ77 matcher with a hash table, as compressors have it. */
static uint64_t run_lz(struct bench *b)
{
	static uint8_t s[1 << 18];
	static uint32_t heads[1 << 14];
	unsigned rounds = bench_rounds(b, 48);
	uint64_t out = 0;

	for (unsigned i = 0; i < sizeof s; i++)
		s[i] = i > 300 && bench_random(b) % 8 ? s[i - 1 - i / 7 % 300] : (uint8_t)(bench_random(b) % 32);
	for (unsigned r = 0; r < rounds; r++) {
		memset(heads, 0, sizeof heads);
		for (unsigned i = 1; i + 64 < sizeof s;) {
			uint32_t v, h, at;
			unsigned len = 0;

			memcpy(&v, s + i, 4);
			h = (v * 2654435761u) >> 18;
			at = heads[h];
			heads[h] = i;
			while (at && len < 64 && s[at + len] == s[i + len])
				len++;
			out = out * 33 + len;
			i += len >= 4 ? len : 1;
		}
	}
	return out;
}

static uint64_t run_huffman(struct bench *b)
{
	static uint8_t bits[1 << 16];
	unsigned rounds = bench_rounds(b, 70);
	uint64_t sum = 0;

	for (unsigned i = 0; i < sizeof bits; i++)
		bits[i] = (uint8_t)bench_random(b);
	/* canonical code: n ones and a zero, then n bits of value */
	for (unsigned r = 0; r < rounds; r++) {
		uint64_t acc = 0;
		unsigned have = 0, at = 0;

		while (at + 8 < sizeof bits) {
			unsigned n;

			while (have <= 56) {
				acc |= (uint64_t)bits[at++] << have;
				have += 8;
			}
			n = (unsigned)__builtin_ctzll(~acc | 1ull << 20);
			acc >>= n + 1;
			sum += acc & ((1ull << n) - 1);
			acc >>= n;
			have = have > 2 * n + 1 ? have - 2 * n - 1 : 0;
		}
	}
	return sum;
}

const struct bench_item items_int[] = {
	{ "integer", "coremark", run_coremark },
	{ "integer", "sha256", run_sha256 },
	{ "integer", "sort", run_sort },
	{ "integer", "qsort", run_qsort },
	{ "integer", "bignum", run_bignum },
	{ "integer", "adx", run_adx },
	{ "integer", "crc32", run_crc32 },
	{ "integer", "hash64", run_hash64 },
	{ "integer", "sieve", run_sieve },
	{ "integer", "gcd-div", run_gcd },
	{ "integer", "base64", run_base64 },
	{ "integer", "lz77", run_lz },
	{ "integer", "huffman", run_huffman },
	{ 0 },
};
