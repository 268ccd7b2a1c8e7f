/*
 * Code whose immediates are written again and again: inline caches, call sites, static keys. A block that differs from the bytes it
 * was made of in nothing but immediates and displacements stays, with the new ones, and what was translated from it need not be made anew
 * either: the translator reads such immediates from memory (jit/gen_patch.c).
 */
#include <string.h>

#include "softkvm/interp/block.h"

/* The instruction's bytes differ in [at, at + n) only, if at all. */
static bool same_around(const uint8_t *a, const uint8_t *b, unsigned len, unsigned at, unsigned n)
{
	return !memcmp(a, b, at) && !memcmp(a + at + n, b + at + n, len - at - n);
}

/* Handlers of these take any value, of which so many bits count as the operation has: sign-extended it is right for all. */
static bool any_value(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_ADC: case ZYDIS_MNEMONIC_SBB: case ZYDIS_MNEMONIC_AND:
	case ZYDIS_MNEMONIC_SUB: case ZYDIS_MNEMONIC_XOR: case ZYDIS_MNEMONIC_CMP: case ZYDIS_MNEMONIC_TEST: case ZYDIS_MNEMONIC_MOV:
		return true;
	default:
		return false;
	}
}

/* What is new about an instruction. */
struct value {
	unsigned flag;          /* IF_NEW_IMM, IF_NEW_DISP */
	unsigned at;            /* where its immediate begins; it goes to the end */
	bool any;               /* and has a handler for which it may be any */
};

/* `i`'s bytes are `now` and were `was`. False: there is more new about it. */
static bool what_is_new(const struct cpu *c, const ZydisDecoder *dec, const struct insn *i, const uint8_t *now, const uint8_t *was, struct value *v)
{
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	ZydisDecodedInstruction z;

	if (ZYAN_FAILED(decode_zydis(dec, c, now, i->len, &z, op)) || z.length != i->len)
		return false;
	v->at = z.raw.imm[0].size ? z.raw.imm[0].offset : z.length;
	v->flag = IF_NEW_IMM;
	v->any = any_value(z.mnemonic) && z.raw.imm[0].size;
	if (same_around(now, was, i->len, v->at, i->len - v->at))
		return true;
	v->flag = IF_NEW_DISP;
	v->any = false;
	return z.raw.disp.size && same_around(now, was, v->at, z.raw.disp.offset, z.raw.disp.size / 8);
}

static bool same_kind(const struct insn *a, const struct insn *b)
{
	return a->fn == b->fn && a->len == b->len && a->dst == b->dst && a->src == b->src && a->base == b->base && a->index == b->index &&
	       a->scale == b->scale && a->seg == b->seg && a->aux == b->aux &&
	       !((a->flags ^ b->flags) & ~(IF_END | IF_NEW_IMM | IF_NEW_DISP));
}

static struct block_field *field_of(struct cpu *c, const struct insn *i)
{
	return &c->blocks->fields[(uintptr_t)i / sizeof *i % ARRAY_SIZE(c->blocks->fields)];
}

/* An instruction that was patched before: without decoding it. */
static bool patch_again(struct cpu *c, struct insn *i, const uint8_t *now, const uint8_t *was)
{
	const struct block_field *f = field_of(c, i);
	uint64_t v = 0;

	if (f->insn != i || !same_around(now, was, i->len, f->at, f->len))
		return false;
	memcpy(&v, now + f->at, f->len);
	i->imm = (uint64_t)((int64_t)(v << (64 - 8 * f->len)) >> (64 - 8 * f->len));
	return true;
}

static bool patch_insn(struct cpu *c, struct block *b, struct insn *i, const uint8_t *now, const uint8_t *was)
{
	struct value v;
	struct insn new;
	ZydisDecoder z;

	decode_init(&z, c, b->mode);
	if (!what_is_new(c, &z, i, now, was, &v) || decode_insn(c, &z, b->mode, now, i->len, i->off, &new) != DEC_OK || !same_kind(i, &new))
		return false;
	b->patched += !(i->flags & v.flag);
	i->flags |= (uint16_t)v.flag;
	i->imm = new.imm;
	i->disp = new.disp;
	if (v.any)
		*field_of(c, i) = (struct block_field){ i, (uint8_t)v.at, (uint8_t)(i->len - v.at) };
	return true;
}

bool block_patch(struct cpu *c, struct block *b)
{
	uint8_t now[BLOCK_MAX_BYTES + 16], *copy = (uint8_t *)(uintptr_t)block_copy(b);

	if (b->cross || b->bytes > sizeof now)
		return false;
	ram_copy(now, b->host, b->bytes);
	for (unsigned n = 0; n < b->n; n++) {
		struct insn *i = &b->insn[n];
		uint8_t *was = copy + i->off;

		if (!memcmp(now + i->off, was, i->len))
			continue;
		if (!patch_again(c, i, now + i->off, was) && !patch_insn(c, b, i, now + i->off, was))
			return false;   /* the instructions up to here are those of the copy all the same */
		memcpy(was, now + i->off, i->len);
	}
	c->stats.blocks_patched++;
	return true;
}
