/* Vector code: SSE4, AES, CLMUL, SHA, AVX2, FMA, BMI2 by intrinsics. An item whose instructions CPUID does not offer is skipped. */
#include "bench/items/items.h"

#include <immintrin.h>
#include <string.h>

#define NEED(b, feature) do { if (!__builtin_cpu_supports(feature)) { (b)->skipped = true; return 0; } } while (0)

static uint8_t data[65536] __attribute__((aligned(64)));

static void fill(struct bench *b)
{
	for (unsigned i = 0; i < sizeof data; i++)
		data[i] = (uint8_t)bench_random(b);
	bench_begin(b);
}

__attribute__((target("aes,sse4.1"))) static uint64_t run_aes(struct bench *b)
{
	__m128i k[11], ctr = _mm_set_epi64x(1, 2), one = _mm_set_epi64x(0, 1), sum = _mm_setzero_si128();
	unsigned rounds = bench_rounds(b, 2500);

	NEED(b, "aes");
	fill(b);
	memcpy(k, data, sizeof k);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < sizeof data; i += 64) {
			__m128i s[4];

			for (unsigned j = 0; j < 4; j++, ctr = _mm_add_epi64(ctr, one))
				s[j] = _mm_xor_si128(ctr, k[0]);
			for (unsigned n = 1; n < 10; n++)
				for (unsigned j = 0; j < 4; j++)
					s[j] = _mm_aesenc_si128(s[j], k[n]);
			for (unsigned j = 0; j < 4; j++) {
				__m128i *at = (__m128i *)(data + i) + j;

				s[j] = _mm_aesenclast_si128(s[j], k[10]);
				_mm_store_si128(at, _mm_xor_si128(_mm_load_si128(at), s[j]));
			}
		}
	sum = _mm_xor_si128(ctr, _mm_load_si128((__m128i *)data));
	return bench_hash((uint64_t)_mm_cvtsi128_si64(sum), data, sizeof data);
}

__attribute__((target("aes,sse4.1"))) static uint64_t run_aes_chain(struct bench *b)
{
	__m128i k[11], v;
	unsigned rounds = bench_rounds(b, 6000000);

	NEED(b, "aes");
	fill(b);
	memcpy(k, data, sizeof k);
	v = k[3];
	for (unsigned r = 0; r < rounds; r++) {
		v = _mm_xor_si128(v, k[0]);
		for (unsigned n = 1; n < 10; n++)
			v = _mm_aesenc_si128(v, k[n]);
		v = _mm_aesdeclast_si128(_mm_aesdec_si128(_mm_aesenclast_si128(v, k[10]), k[1]), k[2]);
	}
	return (uint64_t)_mm_cvtsi128_si64(v);
}

__attribute__((target("pclmul,sse4.1"))) static uint64_t run_clmul(struct bench *b)
{
	__m128i k = _mm_set_epi64x(0x1751997d0, 0x0ccaa009e), x[4] = { _mm_setzero_si128() };
	unsigned rounds = bench_rounds(b, 12000);

	NEED(b, "pclmul");
	fill(b);
	memset(x, 0, sizeof x);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < sizeof data; i += 64)
			for (unsigned j = 0; j < 4; j++)
				x[j] = _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x[j], k, 0x00), _mm_clmulepi64_si128(x[j], k, 0x11)),
						     _mm_load_si128((__m128i *)(data + i) + j));
	return bench_hash(0, x, sizeof x);
}

__attribute__((target("sha,sse4.1"))) static uint64_t run_sha(struct bench *b)
{
	__m128i a = _mm_set_epi32(1, 2, 3, 4), c = _mm_set_epi32(5, 6, 7, 8), m[4], t;
	unsigned rounds = bench_rounds(b, 1200000), ebx = 0;

	/* gcc 12 has no name for this CPUID bit */
	if (__builtin_cpu_supports("avx2") || __builtin_cpu_supports("sse4.2")) {
		unsigned eax = 7, ecx = 0, edx;

		__asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
	}
	if (!(ebx >> 29 & 1)) {
		b->skipped = true;
		return 0;
	}
	fill(b);
	memcpy(m, data, sizeof m);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < 16; i++) {
			t = _mm_add_epi32(m[0], _mm_set1_epi32((int)(i * 0x9e3779b9u)));
			c = _mm_sha256rnds2_epu32(c, a, t);
			a = _mm_sha256rnds2_epu32(a, c, _mm_shuffle_epi32(t, 0x0e));
			t = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(m[0], m[1]), _mm_alignr_epi8(m[3], m[2], 4)), m[3]);
			m[0] = m[1];
			m[1] = m[2];
			m[2] = m[3];
			m[3] = t;
		}
	return (uint64_t)_mm_cvtsi128_si64(_mm_xor_si128(a, c));
}

__attribute__((target("sse4.2"))) static uint64_t run_sse_int(struct bench *b)
{
	__m128i acc = _mm_setzero_si128();
	unsigned rounds = bench_rounds(b, 20000);

	NEED(b, "sse4.2");
	fill(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < sizeof data; i += 32) {
			__m128i x = _mm_load_si128((__m128i *)(data + i)), y = _mm_load_si128((__m128i *)(data + i + 16));

			x = _mm_add_epi32(_mm_mullo_epi32(x, y), _mm_madd_epi16(x, y));
			y = _mm_max_epi32(_mm_blendv_epi8(x, y, acc), _mm_sad_epu8(x, y));
			acc = _mm_add_epi32(acc, _mm_xor_si128(y, _mm_srli_epi32(x, 3)));
		}
	return (uint64_t)_mm_cvtsi128_si64(acc) ^ (uint64_t)_mm_extract_epi64(acc, 1);
}

__attribute__((target("ssse3"))) static uint64_t run_shuffle(struct bench *b)
{
	__m128i map = _mm_set_epi8(3, 14, 7, 1, 12, 0, 9, 4, 15, 2, 8, 13, 6, 11, 10, 5), acc = map;
	unsigned rounds = bench_rounds(b, 14000);

	NEED(b, "ssse3");
	fill(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i + 16 < sizeof data; i += 16) {
			__m128i v = _mm_loadu_si128((__m128i *)(data + i + (r & 7)));

			v = _mm_maddubs_epi16(_mm_shuffle_epi8(v, map), _mm_set1_epi16(0x0140));
			acc = _mm_add_epi16(_mm_packus_epi16(v, acc), _mm_unpacklo_epi8(acc, v));
		}
	return bench_hash(0, &acc, sizeof acc);
}

__attribute__((target("sse4.2"))) static uint64_t run_strsse(struct bench *b)
{
	const __m128i set = _mm_setr_epi8('0', '9', 'a', 'z', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
	unsigned rounds = bench_rounds(b, 12000);
	uint64_t sum = 0;
	uint32_t crc = 0;

	NEED(b, "sse4.2");
	fill(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < sizeof data; i += 16) {
			__m128i v = _mm_load_si128((__m128i *)(data + i));

			sum += (unsigned)_mm_cmpestri(set, 4, v, 16, _SIDD_CMP_RANGES);
			crc = (uint32_t)_mm_crc32_u64(crc, (uint64_t)_mm_cvtsi128_si64(v));
		}
	return sum << 32 | crc;
}

__attribute__((target("avx2"))) static uint64_t run_avx2_int(struct bench *b)
{
	__m256i acc = _mm256_setzero_si256();
	unsigned rounds = bench_rounds(b, 50000);

	NEED(b, "avx2");
	fill(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < sizeof data; i += 64) {
			__m256i x = _mm256_load_si256((__m256i *)(data + i)), y = _mm256_load_si256((__m256i *)(data + i + 32));

			x = _mm256_add_epi32(_mm256_mullo_epi32(x, y), _mm256_sllv_epi32(x, _mm256_srli_epi32(y, 27)));
			acc = _mm256_add_epi32(acc, _mm256_xor_si256(x, _mm256_shuffle_epi8(y, acc)));
		}
	return bench_hash(0, &acc, sizeof acc);
}

__attribute__((target("avx2"))) static uint64_t run_chacha(struct bench *b)
{
	__m256i s[4], o = _mm256_setzero_si256();
	unsigned rounds = bench_rounds(b, 2400000);

	NEED(b, "avx2");
	fill(b);
	memcpy(s, data, sizeof s);
#define ROT(v, n) _mm256_or_si256(_mm256_slli_epi32(v, n), _mm256_srli_epi32(v, 32 - n))
	for (unsigned r = 0; r < rounds; r++) {
		__m256i a = s[0], c = s[1], d = s[2], e = s[3];

		for (unsigned i = 0; i < 8; i++) {
			a = _mm256_add_epi32(a, c); e = ROT(_mm256_xor_si256(e, a), 16);
			d = _mm256_add_epi32(d, e); c = ROT(_mm256_xor_si256(c, d), 12);
			a = _mm256_add_epi32(a, c); e = ROT(_mm256_xor_si256(e, a), 8);
			d = _mm256_add_epi32(d, e); c = ROT(_mm256_xor_si256(c, d), 7);
			c = _mm256_shuffle_epi32(c, 0x39);
			d = _mm256_shuffle_epi32(d, 0x4e);
			e = _mm256_shuffle_epi32(e, 0x93);
		}
		o = _mm256_xor_si256(o, _mm256_add_epi32(a, _mm256_add_epi32(c, _mm256_add_epi32(d, e))));
		s[3] = _mm256_add_epi64(s[3], _mm256_set1_epi64x(1));
	}
#undef ROT
	return bench_hash(0, &o, sizeof o);
}

__attribute__((target("avx2,fma"))) static uint64_t run_fma(struct bench *b)
{
	static float x[256 * 256] __attribute__((aligned(32))), y[256 * 256] __attribute__((aligned(32))), z[256 * 256] __attribute__((aligned(32)));
	unsigned rounds = bench_rounds(b, 30);

	NEED(b, "fma");
	for (unsigned i = 0; i < 256 * 256; i++) {
		x[i] = (float)(i % 13) / 8;
		y[i] = (float)(i % 29) / 16;
	}
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < 256; i++)
			for (unsigned j = 0; j < 256; j += 32) {
				__m256 s[4];

				for (unsigned q = 0; q < 4; q++)
					s[q] = _mm256_set1_ps((float)r);
				for (unsigned k = 0; k < 256; k++) {
					__m256 v = _mm256_broadcast_ss(&x[i * 256 + k]);

					for (unsigned q = 0; q < 4; q++)
						s[q] = _mm256_fmadd_ps(v, _mm256_load_ps(&y[k * 256 + j + 8 * q]), s[q]);
				}
				for (unsigned q = 0; q < 4; q++)
					_mm256_store_ps(&z[i * 256 + j + 8 * q], s[q]);
			}
	bench_end(b);
	return bench_hash(0, z, sizeof z);
}

__attribute__((target("avx2"))) static uint64_t run_avx_float(struct bench *b)
{
	static double x[4096] __attribute__((aligned(32)));
	__m256d acc = _mm256_setzero_pd();
	unsigned rounds = bench_rounds(b, 50000);

	NEED(b, "avx2");
	for (unsigned i = 0; i < 4096; i++)
		x[i] = 1.0 + i % 37 / 8.0;
	bench_begin(b);
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < 4096; i += 8) {
			__m256d u = _mm256_load_pd(x + i), v = _mm256_loadu_pd(x + (i + 5) % 4088);

			u = _mm256_blendv_pd(_mm256_mul_pd(u, v), _mm256_permute4x64_pd(u, 0x1b), _mm256_cmp_pd(u, v, _CMP_LT_OQ));
			acc = _mm256_add_pd(_mm256_mul_pd(acc, _mm256_set1_pd(0.5)), _mm256_hadd_pd(u, v));
		}
	return bench_hash(0, &acc, sizeof acc);
}

__attribute__((target("avx2"))) static uint64_t run_gather(struct bench *b)
{
	__m256i acc = _mm256_setzero_si256(), index = _mm256_setr_epi32(1, 700, 1500, 3, 9000, 77, 12345, 16000);
	unsigned rounds = bench_rounds(b, 5000000);

	NEED(b, "avx2");
	fill(b);
	for (unsigned r = 0; r < rounds; r++) {
		acc = _mm256_add_epi32(acc, _mm256_i32gather_epi32((const int *)data, index, 4));
		index = _mm256_and_si256(_mm256_add_epi32(index, _mm256_srli_epi32(acc, 20)), _mm256_set1_epi32(16383));
	}
	return bench_hash(0, &acc, sizeof acc);
}

__attribute__((target("bmi,bmi2,popcnt,lzcnt"))) static uint64_t run_bmi(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 24000000);
	uint64_t v = 0x123456789abcdef, sum = 0;

	NEED(b, "bmi2");
	for (unsigned r = 0; r < rounds; r++) {
		unsigned long long hi;

		v = _mulx_u64(v | 1, 0x9e3779b97f4a7c15ull, &hi) ^ hi;
		sum += _pdep_u64(v, 0x00ff00ff0f0f3333ull) ^ _pext_u64(v, 0xf0f0123456789abcull);
		sum += (uint64_t)_mm_popcnt_u64(v) + _lzcnt_u64(v) + _tzcnt_u64(v) + _andn_u64(v, sum) + _bzhi_u64(v, r & 63);
	}
	return sum;
}

const struct bench_item items_simd[] = {
	{ "simd", "aes-ctr", run_aes },
	{ "simd", "aes-chain", run_aes_chain },
	{ "simd", "clmul", run_clmul },
	{ "simd", "sha-ni", run_sha },
	{ "simd", "sse4-int", run_sse_int },
	{ "simd", "ssse3-shuffle", run_shuffle },
	{ "simd", "sse42-string", run_strsse },
	{ "simd", "avx2-int", run_avx2_int },
	{ "simd", "avx2-chacha", run_chacha },
	{ "simd", "avx2-float", run_avx_float },
	{ "simd", "avx2-gather", run_gather },
	{ "simd", "fma-matmul", run_fma },
	{ "simd", "bmi", run_bmi },
	{ 0 },
};
