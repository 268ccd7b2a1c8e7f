/*
 * Rewriting, for instructions the host need not have: random encodings of all kinds, from 64-bit and 32-bit
 * code, must come out as the same operation on the same vector and mask registers with memory at [rsi].
 */
#include <stdio.h>
#include <string.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

static uint64_t rng = 0x853c49e6748fea9bULL;

uint64_t rnd(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	return rng ^= rng << 17;
}

static bool is_vec_class(ZydisRegister r)
{
	ZydisRegisterClass k = ZydisRegisterGetClass(r);

	return k == ZYDIS_REGCLASS_XMM || k == ZYDIS_REGCLASS_YMM || k == ZYDIS_REGCLASS_ZMM || k == ZYDIS_REGCLASS_MASK ||
	       k == ZYDIS_REGCLASS_MMX;
}

static bool operand_same(const ZydisDecodedOperand *a, const ZydisDecodedOperand *b)
{
	if (a->type != b->type || a->size != b->size || a->actions != b->actions)
		return false;
	if (a->type == ZYDIS_OPERAND_TYPE_REGISTER && is_vec_class(a->reg.value))
		return a->reg.value == b->reg.value;
	if (a->type == ZYDIS_OPERAND_TYPE_MEMORY)
		return b->mem.base == ZYDIS_REGISTER_RSI && b->mem.index == ZYDIS_REGISTER_NONE && !b->mem.disp.value;
	if (a->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		return a->imm.value.u == b->imm.value.u;
	return true;
}

static unsigned random_bytes(uint8_t *b, unsigned bits)
{
	unsigned n = 0;

	for (unsigned k = 0; k < 16; k++)
		b[k] = (uint8_t)rnd();
	switch (rnd() % 3) {
	case 0:
		b[n++] = 0x62;
		b[n] = (uint8_t)((b[n] & 0xf0) | (1 + rnd() % 3) | (bits == 64 ? 0 : 0xc0));
		b[n + 1] |= 4;
		break;
	case 1:
		b[n++] = 0xc4;
		b[n] = (uint8_t)((b[n] & 0xe0) | (1 + rnd() % 3) | (bits == 64 ? 0 : 0xc0));
		break;
	default:
		b[n++] = (const uint8_t[]){ 0x66, 0xf2, 0xf3, 0x0f }[rnd() % 4];
		b[n++] = 0x0f;
	}
	return n;
}

static bool has_vector(const struct decoded *d)
{
	const char *name = ZydisMnemonicGetString(d->z.mnemonic);
	bool vec = !strncmp(name, "cvt", 3) || !strncmp(name, "vcvt", 4);

	if (!strncmp(ZydisISASetGetString(d->z.meta.isa_set), "KNC", 3))
		return false;
	for (unsigned n = 0; n < d->z.operand_count_visible; n++) {
		if (d->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER && is_vec_class(d->op[n].reg.value))
			vec = true;
		if (d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && d->op[n].mem.type != ZYDIS_MEMOP_TYPE_MEM)
			return false;
	}
	return vec;
}

static int check(const struct decoded *d, const ZydisDecoder *d64)
{
	struct vec_shape s = { 0 };
	ZydisDecodedInstruction z;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];

	if (!stub_rewrite(&s, d))
		return 0;
	if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(d64, s.code, s.len, &z, op)) && z.length == s.len && z.mnemonic == d->z.mnemonic &&
	    z.operand_count_visible == d->z.operand_count_visible && z.avx.mask.reg == d->z.avx.mask.reg &&
	    z.avx.vector_length == d->z.avx.vector_length && z.avx.broadcast.mode == d->z.avx.broadcast.mode) {
		unsigned n = 0;

		while (n < z.operand_count_visible && operand_same(&d->op[n], &op[n]))
			n++;
		if (n == z.operand_count_visible)
			return 1;
	}
	printf("%u-bit %s:", d->code_bits, ZydisMnemonicGetString(d->z.mnemonic));
	for (unsigned n = 0; n < d->z.length; n++)
		printf(" %02x", d->bytes[n]);
	printf(" ->");
	for (unsigned n = 0; n < s.len; n++)
		printf(" %02x", s.code[n]);
	printf("\n");
	return -1;
}

int main(void)
{
	ZydisDecoder d64, d32;
	unsigned good = 0, bad = 0;

	ZydisDecoderInit(&d64, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	ZydisDecoderInit(&d32, ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32);
	for (unsigned n = 0; n < 300000 && bad < 20; n++) {
		uint8_t bytes[16];
		struct decoded d = { .bytes = bytes, .code_bits = rnd() & 1 ? 64 : 32 };
		int r;

		random_bytes(bytes, d.code_bits);
		if (ZYAN_FAILED(ZydisDecoderDecodeFull(d.code_bits == 64 ? &d64 : &d32, bytes, 15, &d.z, d.op)) || !has_vector(&d))
			continue;
		r = check(&d, &d64);
		good += r > 0;
		bad += r < 0;
	}
	printf("%u rewritten, %u wrong\n", good, bad);
	return bad || good < 10000;
}
