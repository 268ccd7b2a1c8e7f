/*
 * Vector instructions: the same instruction on the same vector registers, loaded from struct fpu when a block first
 * reads them and written back where it leaves or hands over. Register numbers need no map: the host's stand for the
 * guest's.
 *
 * Legacy SSE blocks hold the low 16 bytes and leave the rest in memory alone; a block with VEX or EVEX
 * instructions holds whole registers.
 *
 * Whether vector instructions may run is looked at once per block (vec_ok, which only what ends a block can
 * change). Those that use MXCSR need the host's to stand for the guest's (fp_ok, run.c); where it does not yet, the
 * first one goes to its handler, which tries to arrange it.
 */
#include <stdio.h>

#include "softkvm/jit/slots.h"
#include "softkvm/vec/vec.h"

/* -- registers ----------------------------------------------------------------------------------- */
static void move(struct em *e, struct tr *t, unsigned n, bool store)
{
	const void *p = t->c->fpu.zmm[n];

	if (t->wide && (host_avx512() || n >= 16)) {
		e8(e, 0x62);
		e8(e, (n & 8 ? 0 : 0x80) | 0x60 | (n & 16 ? 0 : 0x10) | 1);
		e8(e, 0x7c);
		e8(e, 0x48);
	} else if (t->wide) {
		e8(e, 0xc5);
		e8(e, (n & 8 ? 0 : 0x80) | 0x7c);
	} else {
		if (n & 8)
			e8(e, 0x44);
		e8(e, 0x0f);
	}
	e8(e, 0x10 + store);
	em_abs(e, n, p);
}

void vec_store_set(struct em *e, struct tr *t, uint32_t set)
{
	for (; set; set &= set - 1)
		move(e, t, (unsigned)__builtin_ctz(set), true);
}

void vec_load_set(struct em *e, struct tr *t, uint32_t set)
{
	for (; set; set &= set - 1)
		move(e, t, (unsigned)__builtin_ctz(set), false);
}

void vec_flush_out(struct tr *t)
{
	vec_store_set(&t->h, t, t->vdirty);
	if (t->wide && t->vloaded)
		EM(&t->h, 0xc5, 0xf8, 0x77);
	t->vdirty = t->vloaded = 0;
}

bool vec_wants_wide(const struct tinsn *i)
{
	bool v = i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX || i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;

	if (!v)
		return false;
	for (unsigned n = 0; n < i->z.operand_count; n++)
		if (i->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER)
			switch (ZydisRegisterGetClass(i->op[n].reg.value)) {
			case ZYDIS_REGCLASS_XMM: case ZYDIS_REGCLASS_YMM: case ZYDIS_REGCLASS_ZMM: return true;
			default: break;
			}
	return false;
}

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

/* Loads and moves that write all 16 bytes: what was there before is not wanted. */
static bool whole_write(const struct tinsn *i)
{
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_MOVAPS: case ZYDIS_MNEMONIC_MOVUPS: case ZYDIS_MNEMONIC_MOVAPD: case ZYDIS_MNEMONIC_MOVUPD:
	case ZYDIS_MNEMONIC_MOVDQA: case ZYDIS_MNEMONIC_MOVDQU: case ZYDIS_MNEMONIC_MOVQ: case ZYDIS_MNEMONIC_MOVD:
	case ZYDIS_MNEMONIC_PSHUFD: case ZYDIS_MNEMONIC_LDDQU:
		return true;
	case ZYDIS_MNEMONIC_MOVSS: case ZYDIS_MNEMONIC_MOVSD:
		return i->op[1].type == ZYDIS_OPERAND_TYPE_MEMORY;
	default:
		return false;
	}
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
	d->code_bits = 64;
	d->cpu = t->c;
	if (!vec_op_build(op, d))
		return false;
	if (op->flags & (VO_MMX | VO_KMASK | VO_VMASK | VO_DENSE | VO_PEND | VO_EMMS) || op->s.k_in || op->s.k_out || op->s.x87)
		return false;
	if (op->cls != VC_SSE && op->cls != VC_VEX && op->cls != VC_EVEX)
		return false;
	/* An instruction of the stubs' must have run on this CPU once: what Zydis takes need not exist here. */
	return !vec_op_unproven(&t->b->insn[n]);
}

static void test_byte(struct tr *t, const void *p, unsigned mask, struct cold *k)
{
	e8(&t->h, 0xf6);                                /* test byte [p], mask ; jz cold */
	em_abs(&t->h, 0, p);
	e8(&t->h, mask);
	cold_from(k, em_jcc(&t->h, 4));
}

static unsigned class_bit(enum vec_class c) { return c == VC_SSE ? JV_SSE : c == VC_VEX ? JV_VEX : JV_EVEX; }

bool gen_vec(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	struct jit_low *low = t->j->low;
	struct vec_op op;
	struct slots s;
	struct cold *k;
	unsigned bit;
	uint32_t in;
	bool gpr, ok, check_ok, check_fp;

	if ((t->b->insn[n].flags & IF_END) || !describe(t, n, &op, &gpr))
		return false;
	slots_find(&s, i);
	s.other = false;
	bit = class_bit(op.cls);
	/* Checks destroy flags: all of them together. */
	check_ok = !(t->vec_checked & bit);
	check_fp = op.flags & VO_FP;

	k = NULL;
	if (check_ok || check_fp || s.mem) {
		gen_clobber(t, n);
		k = cold_new(t, n);
		if (check_ok)
			test_byte(t, &low->vec_ok, bit, k);
		if (check_fp) {
			test_byte(t, &low->fp_ok, 1, k);
			k->site->stop.aux = 1;
		}
	}
	if (s.mem) {
		ok = gen_address(t, n) && s.mem->size >= 8 && s.mem->size <= 512;
		if (!ok)
			return false;
		gen_check(t, k, s.mem->size / 8, s.mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
		if (op.align) {
			EM(&t->h, 0x41, 0xf6, 0xc7);            /* test r15b, align */
			e8(&t->h, op.align);
			cold_from(k, em_jcc(&t->h, 5));
		}
	}
	gen_flags_before(t, n);
	in = op.s.v_in;
	if (i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && !t->wide && whole_write(i) &&
	    i->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER && op.s.v_out &&
	    !(i->op[1].type == ZYDIS_OPERAND_TYPE_REGISTER && i->op[1].reg.value == i->op[0].reg.value))
		in &= ~op.s.v_out;
	vec_load_set(&t->h, t, in & ~t->vloaded);
	t->vloaded |= in;
	if (!slots_load(t, &s))
		return false;
	if (!gen_rewrite(t, i, tr_bytes(t, n), slots_regs(&s)))
		return false;
	slots_store(t, &s);
	t->vloaded |= op.s.v_out;
	t->vdirty |= op.s.v_out;
	t->vec_checked |= bit;
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}
