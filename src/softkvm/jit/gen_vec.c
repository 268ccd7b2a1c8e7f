/*
 * Vector instructions: the same instruction on the same vector registers. Register numbers need no map: the host's
 * stand for the guest's, from the first vector instruction on until translated code is left or a handler is called (live.c).
 * The first of a kind in a block looks whether that is so.
 */
#include <stdio.h>

#include "softkvm/jit/slots.h"
#include "softkvm/vec/vec.h"

/* -- which --------------------------------------------------------------------------------------- */
static bool other_operands(const struct tinsn *i, bool *gpr)
{
	for (unsigned n = 0; n < i->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &i->op[n];

		if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
			continue;
		if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
			if (o->encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM || o->mem.type != ZYDIS_MEMOP_TYPE_MEM)
				return true;
			continue;
		}
		if (o->type != ZYDIS_OPERAND_TYPE_REGISTER)
			return true;
		switch (ZydisRegisterGetClass(o->reg.value)) {
		case ZYDIS_REGCLASS_XMM: case ZYDIS_REGCLASS_YMM: case ZYDIS_REGCLASS_ZMM: case ZYDIS_REGCLASS_FLAGS:
		case ZYDIS_REGCLASS_MMX: case ZYDIS_REGCLASS_MASK:
			break;
		case ZYDIS_REGCLASS_GPR8: case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64:
			if (o->encoding != ZYDIS_OPERAND_ENCODING_MODRM_REG && o->encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM)
				return true;
			*gpr = true;
			break;
		default:
			if (o->reg.value != ZYDIS_REGISTER_MXCSR)
				return true;
		}
	}
	return false;
}

static bool describe(struct tr *t, unsigned n, struct vec_op *op, bool *gpr)
{
	const struct tinsn *i = &t->t[n];
	struct decoded *d = &t->d;

	if (i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY && i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_VEX &&
	    i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX)
		return false;
	*gpr = false;
	if (other_operands(i, gpr))
		return false;
	d->z = i->z;
	memcpy(d->op, i->op, sizeof d->op);
	d->bytes = tr_bytes(t, n);
	d->code_bits = t->bits;
	d->cpu = t->c;
	if (!vec_op_build(op, d))
		return false;
	if (op->flags & (VO_KMASK | VO_VMASK | VO_DENSE | VO_PEND | VO_EMMS) || op->s.x87)
		return false;
	if (op->flags & VO_MMX ? op->cls != VC_MMX || (op->flags & VO_FP) : op->cls != VC_SSE && op->cls != VC_VEX && op->cls != VC_EVEX)
		return false;
	/* An instruction of the stubs' must have run on this CPU once: what Zydis takes need not exist here. */
	return !vec_op_unproven(t->t[n].in);
}

static unsigned class_bit(const struct vec_op *op)
{
	unsigned bit = op->cls == VC_SSE ? JV_SSE : op->cls == VC_VEX ? JV_VEX : JV_EVEX;

	if (op->cls == VC_MMX)
		return JV_X87;
	return op->flags & VO_FP ? bit << JV_FP_SHIFT : bit;
}

/* What else holds where `bit` does. */
static unsigned implied(unsigned bit)
{
	return bit & JV_X87 ? bit : bit | (bit >> JV_FP_SHIFT);
}

static bool vzero(struct tr *t, unsigned n)
{
	struct cold *k;

	if (!(t->live & JV_VEX)) {
		gen_clobber(t, n);
		k = cold_new(t, n);
		gen_live(t, k, JV_VEX);
		t->live |= JV_VEX;
		cold_done(t, n, k);
	}
	for (unsigned m = 0; m < t->t[n].z.length; m++)
		e8(&t->h, tr_bytes(t, n)[m]);
	return true;
}

bool gen_vec(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	struct vec_op op;
	struct slots s;
	struct cold *k = NULL;
	unsigned bit;
	bool gpr;

	if (t->t[n].in->flags & IF_END)
		return false;
	if (tr_64(t) && host_avx() && (i->z.mnemonic == ZYDIS_MNEMONIC_VZEROUPPER || i->z.mnemonic == ZYDIS_MNEMONIC_VZEROALL))
		return vzero(t, n);
	if (!describe(t, n, &op, &gpr))
		return false;
	slots_find(&s, i);
	s.other = false;
	bit = class_bit(&op);
	t->mem_disp = 0;
	/* Checks destroy flags: all of them together. */
	if (!(t->live & bit) || s.mem) {
		gen_clobber(t, n);
		k = cold_new(t, n);
		if (!(t->live & bit))
			gen_live(t, k, bit);
	}
	if (s.mem) {
		if (s.mem->size < 8 || s.mem->size > 512 ||
		    !gen_operand(t, n, k, s.mem->size / 8, s.mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
			return false;
		if (op.align) {
			EM(&t->h, 0x41, 0xf6, 0xc7);            /* test r15b, align */
			e8(&t->h, op.align);
			cold_from(k, em_jcc(&t->h, 5));
		}
	}
	gen_flags_before(t, n);
	if (!slots_load(t, &s) || !gen_rewrite(t, i, tr_bytes(t, n), slots_regs(&s)))
		return false;
	slots_store(t, &s);
	t->live |= implied(bit);
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}
