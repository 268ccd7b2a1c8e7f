/*
 * Vector instructions: the same instruction on the same vector registers. Register numbers need no map: the host's
 * stand for the guest's, from the first vector instruction on until translated code is left or a handler is called (live.c).
 * The first of a kind in a block looks whether that is so.
 */
#include <stdio.h>

#include "softkvm/jit/slots.h"
#include "softkvm/vec/vec.h"

/* -- which --------------------------------------------------------------------------------------- */
/* Lengths in rax and rdx, an index in rcx: what SSE4.2's string instructions have besides their operands. */
enum { STR_LENGTHS = 1, STR_INDEX = 2 };

static unsigned string(const struct tinsn *i)
{
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_PCMPESTRI: case ZYDIS_MNEMONIC_VPCMPESTRI: return STR_LENGTHS | STR_INDEX;
	case ZYDIS_MNEMONIC_PCMPESTRM: case ZYDIS_MNEMONIC_VPCMPESTRM: return STR_LENGTHS;
	case ZYDIS_MNEMONIC_PCMPISTRI: case ZYDIS_MNEMONIC_VPCMPISTRI: return STR_INDEX;
	default: return 0;
	}
}

#define MXCSR_MASKED 0x1f80u    /* all exceptions */

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
			if (o->encoding == ZYDIS_OPERAND_ENCODING_NONE && string(i))
				break;
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
	if (other_operands(i, gpr) || (string(i) && !tr_64(t) && i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY))
		return false;
	d->z = i->z;
	memcpy(d->op, i->op, sizeof d->op);
	d->bytes = tr_bytes(t, n);
	d->code_bits = t->bits;
	d->cpu = t->c;
	if (!vec_op_build(op, d))
		return false;
	if (op->flags & (VO_PEND | VO_EMMS) || op->s.x87)
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
		k = cold_new(t, n, 1);
		gen_live(t, k, JV_VEX);
		t->live |= JV_VEX;
		cold_done(t, n, k);
	}
	for (unsigned m = 0; m < t->t[n].z.length; m++)
		e8(&t->h, tr_bytes(t, n)[m]);
	return true;
}

/* The value is looked at where the guest cannot change it any more: nothing reserved, all exceptions masked. */
static void load_mxcsr(struct tr *t, struct cold *k)
{
	uint32_t mask = t->j->mxcsr_mask & ld_le32(t->c->fpu.fx + FX_MASK);
	const void *p = &t->j->low->mxcsr;
	struct em *e = &t->h;

	EM(e, 0x41, 0x8b, 0x0f);                        /* mov ecx, [r15] */
	em_op_abs(e, false, 0x89, H_RCX, p);
	EM(e, 0x81, 0xf1);                              /* xor ecx, 0x1f80 ; test ecx, what must be 0 now ; jne */
	e32(e, MXCSR_MASKED);
	EM(e, 0xf7, 0xc1);
	e32(e, MXCSR_MASKED | ~mask);
	cold_from(k, em_jcc(e, 5));
	EM(e, 0x0f, 0xae);                              /* ldmxcsr [p] */
	em_abs(e, 2, p);
}

/* While vector registers are the guest's, so is MXCSR. */
static bool mxcsr(struct tr *t, unsigned n, bool vex, bool load)
{
	unsigned bit = (vex ? JV_VEX : JV_SSE) << (load ? JV_FP_SHIFT : 0);
	struct cold *k;

	if (vex && !host_avx())
		return false;
	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	if (!(t->live & bit))
		gen_live(t, k, bit);
	if (!gen_operand(t, n, k, 4, !load))
		return false;
	gen_point(t, n);
	if (load)
		load_mxcsr(t, k);
	else
		EM(&t->h, 0x41, 0x0f, 0xae, 0x1f);      /* stmxcsr [r15] */
	t->live |= implied(bit);
	cold_done(t, n, k);
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
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_STMXCSR: return mxcsr(t, n, false, false);
	case ZYDIS_MNEMONIC_LDMXCSR: return mxcsr(t, n, false, true);
	case ZYDIS_MNEMONIC_VSTMXCSR: return mxcsr(t, n, true, false);
	case ZYDIS_MNEMONIC_VLDMXCSR: return mxcsr(t, n, true, true);
	default: break;
	}
	if (!describe(t, n, &op, &gpr))
		return false;
	slots_find(&s, i);
	s.other = false;
	bit = class_bit(&op);
	t->mem_disp = 0;
	/* Checks destroy flags: all of them together. */
	if (!(t->live & bit) || s.mem) {
		gen_clobber(t, n);
		k = cold_new(t, n, 1);
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
	if (string(i) & STR_LENGTHS)
		em_mov(&t->h, H_RAX, H_R13);
	if (!slots_load(t, &s) || !gen_rewrite(t, i, tr_bytes(t, n), slots_regs(&s)))
		return false;
	slots_store(t, &s);
	if (string(i) & STR_INDEX)
		em_mov(&t->h, H_R14, H_RCX);
	t->live |= implied(bit);
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}
