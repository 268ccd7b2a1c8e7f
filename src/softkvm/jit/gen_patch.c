/*
 * What a translation holds of bytes that may change without it being made anew: immediates that were written once (interp/patch.c), which
 * the code reads from memory, and code beyond its blocks that was looked at for flags.
 */
#include "softkvm/jit/slots.h"

/* -- immediates ----------------------------------------------------------------------------------- */
static struct jit_patch *patch_new(struct tr *t, unsigned n)
{
	struct jit_patch *p = jit_arena(t->j, sizeof *p);
	const struct tinsn *i = &t->t[n];

	if (!p) {
		t->failed = true;
		return NULL;
	}
	*p = (struct jit_patch){ .value = i->in->imm, .next = t->k->patches, .part = tr_part_of(t, i->b),
				 .insn = (uint8_t)(i->in - i->b->insn) };
	t->k->patches = low_of(p);
	return p;
}

/* Opcode of `op r/m, r`, for bytes; -1: another instruction. */
static int opcode_of(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_ADD: return 0x00;
	case ZYDIS_MNEMONIC_OR: return 0x08;
	case ZYDIS_MNEMONIC_ADC: return 0x10;
	case ZYDIS_MNEMONIC_SBB: return 0x18;
	case ZYDIS_MNEMONIC_AND: return 0x20;
	case ZYDIS_MNEMONIC_SUB: return 0x28;
	case ZYDIS_MNEMONIC_XOR: return 0x30;
	case ZYDIS_MNEMONIC_CMP: return 0x38;
	case ZYDIS_MNEMONIC_TEST: return 0x84;
	case ZYDIS_MNEMONIC_MOV: return 0x88;
	default: return -1;
	}
}

/* op, on `width` bits: a register or [ST], and SC. */
static void put_op(struct em *e, unsigned width, unsigned opcode, int host)
{
	unsigned rm = host < 0 ? ST : (unsigned)host;

	if (width == 16)
		e8(e, 0x66);
	e8(e, 0x40 | (width == 64) << 3 | rm >> 3);
	e8(e, opcode | (width != 8));
	e8(e, (host < 0 ? 0 : 0xc0) | SC << 3 | (rm & 7));
}

/*
 * `op operand, immediate`, the immediate being sign-extended in insn.imm already. Guest registers that are in memory come by way of SA.
 */
bool gen_patched(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	const ZydisDecodedOperand *o = &i->op[0];
	int opcode = opcode_of(i->z.mnemonic), host = -1;
	struct jit_patch *p;
	struct slots s;
	struct cold *k;
	unsigned g = 0;
	bool ok;

	if (opcode < 0 || i->z.operand_count_visible != 2 || i->op[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || i->z.attributes & ZYDIS_ATTRIB_HAS_LOCK)
		return false;
	slots_find(&s, i);
	if (s.other || (o->type != ZYDIS_OPERAND_TYPE_MEMORY && (o->type != ZYDIS_OPERAND_TYPE_REGISTER || insn_reg_off(o->reg.value) & 1)))
		return false;
	k = gen_access(t, n, &s, &ok);
	if (!ok || !(p = patch_new(t, n)))
		return false;
	gen_flags_before(t, n);
	if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
		g = insn_reg_off(o->reg.value) / 8;
		host = (int)gen_get(t, g, SA);
	}
	em_load(&t->h, SC, &p->value);
	if (s.mem)
		gen_point(t, n);
	put_op(&t->h, o->size, (unsigned)opcode, host);
	if (host >= 0 && (o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
		gen_put(t, g, (unsigned)host);
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}

unsigned patch_count(const struct jit_code *k)
{
	unsigned sum = 0;

	for (unsigned n = 0; n < k->nparts; n++)
		sum += k->part[n]->patched;
	return sum;
}

void patch_values(const struct jit_code *k)
{
	for (struct jit_patch *p = LOW_PTR(struct jit_patch, k->patches); p; p = LOW_PTR(struct jit_patch, p->next))
		p->value = k->part[p->part]->insn[p->insn].imm;
}

/* -- looks ahead ---------------------------------------------------------------------------------- */
/* The translation is complete: what it relies on beyond its blocks. */
void looks_keep(struct tr *t)
{
	for (unsigned n = 0; n < t->nseen; n++) {
		const struct ahead *s = &t->seen[n];
		struct jit_look *l;

		if (!s->dead)
			continue;
		l = jit_arena(t->j, sizeof *l + s->len);        /* has_room() saw to it */
		*l = (struct jit_look){ .mask = s->mask, .next = t->k->looks, .off = s->rip & 4095, .len = s->len };
		memcpy(l->bytes, s->bytes, s->len);
		t->k->looks = low_of(l);
	}
}

bool looks_same(struct cpu *c, const struct jit_code *k)
{
	const struct code_page page = block_page(k->b);
	uint8_t now[64];

	for (const struct jit_look *l = LOW_PTR(struct jit_look, k->looks); l; l = LOW_PTR(struct jit_look, l->next)) {
		mmu_code_lines(c, &page, l->off, l->len);
		ram_copy(now, page.host + l->off, l->len);
		for (unsigned n = 0; n < l->len; n++)
			if ((l->mask >> n & 1) && now[n] != l->bytes[n])
				return false;
	}
	return true;
}
