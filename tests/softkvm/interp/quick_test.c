/*
 * The decoder in front of Zydis against Zydis: every prefix, REX, map and opcode that it looks at, with random modrm, sib, displacement and immediate,
 * whole and cut off. Whatever it says must be what Zydis says, whichever instruction of the form was the one that it learned from.
 * And what is remembered of decoded instructions, against decoding them, for all of the integer opcodes.
 *   quick_test [ROUNDS [SEED]]     cases for each opcode (10)
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/util.h"
#include "softkvm/api/api.h"
#include "softkvm/interp/block.h"
#include "softkvm/vec/vec.h"

static unsigned rounds = 10;
static uint64_t seed = 1;

static struct quick quick;
static ZydisDecoder decoder;
static ZydisDecodedInstruction want, got;
static ZydisDecodedOperand want_op[ZYDIS_MAX_OPERAND_COUNT], got_op[ZYDIS_MAX_OPERAND_COUNT];
static uint64_t cases, hits;

static uint64_t draw(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static _Noreturn void differ(const uint8_t *b, unsigned avail, const char *what)
{
	char text[64];

	for (unsigned n = 0; n < avail; n++)
		snprintf(text + 3 * n, sizeof text - 3 * n, " %02x", b[n]);
	fail_msg("%s:%s", what, text);
	abort();
}

/* Prefixes beyond their number are not compared. */
static void same(const uint8_t *b, unsigned avail)
{
	size_t used = offsetof(ZydisDecodedInstruction, raw.prefixes) + want.raw.prefix_count * sizeof want.raw.prefixes[0];
	size_t rest = offsetof(ZydisDecodedInstruction, raw.encoding2);

	if (memcmp(&want, &got, used) || memcmp((uint8_t *)&want + rest, (uint8_t *)&got + rest, sizeof want - rest))
		differ(b, avail, "the instruction differs");
	if (memcmp(want_op, got_op, want.operand_count * sizeof want_op[0]))
		differ(b, avail, "operands differ");
	for (unsigned n = want.operand_count; n < ZYDIS_MAX_OPERAND_COUNT; n++)
		if (got_op[n].type != ZYDIS_OPERAND_TYPE_UNUSED)
			differ(b, avail, "an operand too many");
}

/* The bytes end where those that may be read do. */
static void one(const uint8_t *bytes, unsigned avail)
{
	uint8_t *b = malloc(avail);
	bool known, ok;

	assert_non_null(b);
	memcpy(b, bytes, avail);
	memset(&got, 0xa5, sizeof got);
	memset(got_op, 0xa5, sizeof got_op);
	ok = ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, b, avail, &want, want_op));
	known = quick_decode(&quick, b, avail, &got, got_op);
	if (!ok && known)
		differ(b, avail, "Zydis does not know it");
	if (ok && known)
		same(b, avail);
	cases++;
	hits += known;
	if (ok && !known) {
		quick_learn(&quick, b, avail, &want, want_op);
		if (quick_decode(&quick, b, avail, &got, got_op))
			same(b, avail);
	}
	free(b);
}

static void form(unsigned prefix, unsigned rex, bool two, unsigned opcode)
{
	for (unsigned n = 0; n < rounds; n++) {
		uint64_t r[2] = { draw(), draw() };
		unsigned at = 0;
		uint8_t b[32];

		if (prefix)
			b[at++] = (uint8_t)prefix;
		if (rex)
			b[at++] = (uint8_t)rex;
		if (two)
			b[at++] = 0x0f;
		b[at++] = (uint8_t)opcode;
		memcpy(b + at, r, sizeof r);
		one(b, 15);
		one(b, want.length && want.length <= 15 ? want.length : 15);
		one(b, (unsigned)(draw() % 15 + 1));
	}
}

static void all(bool features)
{
	static const uint8_t prefix[] = { 0, 0x66, 0xf2, 0xf3, 0x64, 0x65, 0x67, 0x2e, 0xf0 };

	ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
	ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
	ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_AMD_BRANCHES, features);
	ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_LZCNT, features);
	ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_TZCNT, features);
	quick_forget(&quick);
	cases = hits = 0;
	for (unsigned two = 0; two < 2; two++)
		for (unsigned opcode = 0; opcode < 256; opcode++)
			for (unsigned p = 0; p < ARRAY_SIZE(prefix); p++) {
				form(prefix[p], 0, two, opcode);
				for (unsigned rex = 0x40; rex < 0x50; rex++)
					form(prefix[p], rex, two, opcode);
			}
	printf("%llu cases, %llu by the quick decoder\n", (unsigned long long)cases, (unsigned long long)hits);
	assert_true(hits > cases / 8);
}

static void test_forms(void **st)
{
	all(true);
}

static void test_fewer_features(void **st)
{
	all(false);
}

/* Another register, address and displacement of the same form is known once one was seen; nothing is after quick_forget(). */
static void test_learns(void **st)
{
	static const uint8_t first[] = { 0x48, 0x8b, 0x44, 0x8d, 0xf8 }, other[] = { 0x4c, 0x8b, 0x2d, 0x11, 0x22, 0x33, 0x44 };

	quick_forget(&quick);
	assert_int_equal(ZydisDecoderDecodeFull(&decoder, first, sizeof first, &want, want_op), ZYAN_STATUS_SUCCESS);
	assert_false(quick_decode(&quick, first, sizeof first, &got, got_op));
	quick_learn(&quick, first, sizeof first, &want, want_op);
	assert_true(quick_decode(&quick, other, sizeof other, &got, got_op));
	assert_int_equal(ZydisDecoderDecodeFull(&decoder, other, sizeof other, &want, want_op), ZYAN_STATUS_SUCCESS);
	same(other, sizeof other);
	assert_false(quick_decode(&quick, other, sizeof other - 1, &got, got_op));
	quick_forget(&quick);
	assert_false(quick_decode(&quick, other, sizeof other, &got, got_op));
}

/* -- whole instructions -------------------------------------------------------------------------- */
static struct cpu *cpu;         /* without memory of what it decoded */
static struct block_cache *blocks;

static void whole(const uint8_t *b, unsigned avail, unsigned off)
{
	const uint32_t mode = BM_CODE64 | BM_STACK64;
	struct insn slow, fast;
	enum decode_result r = decode_insn(cpu, &decoder, mode, b, avail, off, &slow);
	bool known;

	memset(&fast, 0xa5, sizeof fast);
	known = quick_insn(&blocks->quick, b, avail, off, &fast);
	cases++;
	hits += known;
	if (known && (r != DEC_OK || memcmp(&slow, &fast, sizeof slow)))
		differ(b, avail, "the decoded instruction differs");
	if (known)
		return;
	cpu->blocks = blocks;
	if (decode_insn(cpu, &decoder, mode, b, avail, off, &fast) != r || (r == DEC_OK && memcmp(&slow, &fast, sizeof slow)))
		differ(b, avail, "decoded otherwise");
	cpu->blocks = NULL;
}

/* Any prefix, REX, modrm and sib of an opcode, from few enough to meet again, with values small, large and of either sign. */
static void any_value(unsigned prefix, bool two, unsigned opcode)
{
	static const uint8_t edge[] = { 0, 1, 0x7f, 0x80, 0xff };
	uint8_t first[4][3];

	for (unsigned k = 0; k < 4; k++)
		for (unsigned n = 0; n < 3; n++)
			first[k][n] = (uint8_t)draw();
	for (unsigned n = 0; n < rounds * 2; n++) {
		const uint8_t *f = first[n % 4];
		unsigned at = 0;
		uint8_t b[32];

		for (unsigned k = 0; k < sizeof b; k++)
			b[k] = draw() % 2 ? edge[draw() % sizeof edge] : (uint8_t)draw();
		if (prefix)
			b[at++] = (uint8_t)prefix;
		if (f[0] & 1)
			b[at++] = 0x40 | (f[0] >> 4);
		if (two)
			b[at++] = 0x0f;
		b[at++] = (uint8_t)opcode;
		b[at++] = f[1];
		b[at++] = f[2];
		whole(b, 15, (unsigned)(draw() % 512));
		whole(b, (unsigned)(draw() % 15 + 1), (unsigned)(draw() % 512));
	}
}

static void test_whole(void **st)
{
	static const uint8_t prefix[] = { 0, 0x66, 0xf2, 0xf3, 0x64, 0x65 };

	cpu = calloc(1, sizeof *cpu);
	blocks = calloc(1, sizeof *blocks);
	assert_true(cpu && blocks);
	cpu->feat = cpuid_host_features();
	decode_init(&decoder, cpu, BM_CODE64 | BM_STACK64);
	cases = hits = 0;
	for (unsigned two = 0; two < 2; two++)
		for (unsigned opcode = 0; opcode < 256; opcode++)
			for (unsigned p = 0; p < ARRAY_SIZE(prefix); p++)
				for (unsigned n = 0; n < 8; n++)
					if (!two || (opcode >= 0x40 && opcode < 0x50) || (opcode >= 0x80 && opcode < 0xc0) || opcode == 0x1f ||
					    (opcode >= 0xc8 && opcode < 0xd0))        /* no vectors */
						any_value(prefix[p], two, opcode);
	printf("%llu cases, %llu remembered\n", (unsigned long long)cases, (unsigned long long)hits);
	assert_true(hits > cases / 8);
	vec_cpu_free(cpu);      /* x87 instructions have stubs */
	free(blocks);
	free(cpu);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_whole),
		cmocka_unit_test(test_forms),
		cmocka_unit_test(test_fewer_features),
		cmocka_unit_test(test_learns),
	};

	if (argc > 1)
		rounds = (unsigned)atoi(argv[1]);
	if (argc > 2)
		seed = strtoull(argv[2], NULL, 0) | 1;
	return cmocka_run_group_tests(tests, NULL, NULL);
}
