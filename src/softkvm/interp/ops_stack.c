/* PUSH, POP, PUSHA, POPA, ENTER, LEAVE. Flags and segment registers on the stack are sys's. */
#include "softkvm/interp/stack.h"

u64 stk_lin(struct cpu *c, u64 off, unsigned size, enum access acc)
{
	if (c->code_bits == 64)
		return off;
	return seg_lin(c, SEG_SS, c->stack_bits == 32 ? (u32)off : (u16)off, size, acc);
}

void stk_set(struct cpu *c, u64 sp)
{
	if (c->code_bits == 64)
		c->gpr[R_RSP] = sp;
	else if (c->stack_bits == 32)
		c->gpr[R_RSP] = (u32)sp;
	else
		SET16(R_RSP * 8, sp);
}

void stk_push(struct cpu *c, u64 v, unsigned size)
{
	u64 sp = c->gpr[R_RSP] - size;

	ops_st_slow(c, stk_lin(c, sp, size, ACC_WRITE), v, size);
	stk_set(c, sp);
}

u64 stk_peek(struct cpu *c, u64 delta, unsigned size)
{
	return ops_ld_slow(c, stk_lin(c, c->gpr[R_RSP] + delta, size, ACC_READ), size);
}

/* -- 64-bit operands in 64-bit code ------------------------------------------------------------ */
OP(push64_r)
{
	if (likely(PUSH64(GET64(i->dst))))
		NEXT;
}

OP(push64_i)
{
	if (likely(PUSH64(i->imm)))
		NEXT;
}

OP(push64_m)
{
	bool hit;
	u64 v = LOAD64(insn_lin(c, i, 8, ACC_READ), hit);

	if (likely(PUSH64(v) && hit))
		NEXT;
}

OP(pop64_r)
{
	bool hit;
	u64 sp = c->gpr[R_RSP], v = LOAD64(sp, hit);

	c->gpr[R_RSP] = sp + 8;
	SET64(i->dst, v);
	if (likely(hit))
		NEXT;
}

OP(leave64)
{
	bool hit;
	u64 bp = c->gpr[R_RBP], v = LOAD64(bp, hit);

	c->gpr[R_RSP] = bp + 8;
	c->gpr[R_RBP] = v;
	if (likely(hit))
		NEXT;
}

/* -- everywhere else: aux is the operand size in bytes ----------------------------------------- */
static void set_reg(struct cpu *c, uint8_t off, u64 v, unsigned size)
{
	if (size == 8)
		SET64(off, v);
	else if (size == 4)
		SET32(off, v);
	else
		SET16(off, v);
}

OP(push_r) { stk_push(c, GET64(i->dst), i->aux); }
OP(push_i) { stk_push(c, i->imm, i->aux); }
OP(push_m) { stk_push(c, ops_ld_slow(c, insn_lin(c, i, i->aux, ACC_READ), i->aux), i->aux); }

OP(pop_r)
{
	u64 v = stk_peek(c, 0, i->aux);

	stk_set(c, c->gpr[R_RSP] + i->aux);
	set_reg(c, i->dst, v, i->aux);
}

/* The address is computed with the new stack pointer: the decoder has put that into the displacement. */
OP(pop_m)
{
	u64 v = stk_peek(c, 0, i->aux);

	ops_st_slow(c, insn_lin(c, i, i->aux, ACC_WRITE), v, i->aux);
	stk_set(c, c->gpr[R_RSP] + i->aux);
}

OP(leave)
{
	u64 bp = c->gpr[R_RBP], v = ops_ld_slow(c, stk_lin(c, bp, i->aux, ACC_READ), i->aux);

	stk_set(c, bp + i->aux);
	set_reg(c, R_RBP * 8, v, i->aux);
}

/* ENTER: the frame is built below the old top; registers change when nothing can fault any more. */
OP(enter)
{
	unsigned size = i->aux, level = i->src & 31;
	u64 sp = c->gpr[R_RSP] - size, bp = c->gpr[R_RBP], frame = sp;

	ops_st_slow(c, stk_lin(c, sp, size, ACC_WRITE), bp, size);
	for (unsigned n = 1; n < level; n++) {
		u64 v;

		bp -= size;
		sp -= size;
		v = ops_ld_slow(c, stk_lin(c, bp, size, ACC_READ), size);
		ops_st_slow(c, stk_lin(c, sp, size, ACC_WRITE), v, size);
	}
	if (level) {
		sp -= size;
		ops_st_slow(c, stk_lin(c, sp, size, ACC_WRITE), frame, size);
	}
	sp -= i->imm;
	mem_probe(c, stk_lin(c, sp, size, ACC_WRITE), size, ACC_WRITE);
	set_reg(c, R_RBP * 8, c->stack_bits == 16 && size == 4 ? (c->gpr[R_RBP] & 0xffff0000) | (u16)frame : frame, size);
	stk_set(c, sp);
}

OP(pusha)
{
	unsigned size = i->aux;
	u64 sp = c->gpr[R_RSP];

	for (unsigned r = 0; r < 8; r++) {
		sp -= size;
		ops_st_slow(c, stk_lin(c, sp, size, ACC_WRITE), c->gpr[r], size);
	}
	stk_set(c, sp);
}

OP(popa)
{
	unsigned size = i->aux;
	u64 v[8];

	for (unsigned n = 0; n < 8; n++)
		v[7 - n] = stk_peek(c, n * size, size);
	for (unsigned r = 0; r < 8; r++)
		if (r != R_RSP)
			set_reg(c, (uint8_t)(r * 8), v[r], size);
	stk_set(c, c->gpr[R_RSP] + 8 * size);
}

/* -- decoding ---------------------------------------------------------------------------------- */
static bool general(const struct decoded *d)
{
	return d->op[0].type != ZYDIS_OPERAND_TYPE_REGISTER ||
	       ZydisRegisterGetClass(d->op[0].reg.value) <= ZYDIS_REGCLASS_GPR64;
}

static bool decode_push(struct insn *i, const struct decoded *d, bool wide)
{
	if (is_mem(d, 0)) {
		insn_set_mem(i, d, &d->op[0]);
		i->fn = wide ? push64_m : push_m;
	} else if (is_imm(d, 0)) {
		i->imm = d->op[0].imm.value.u;
		i->fn = wide ? push64_i : push_i;
	} else {
		i->dst = reg_off(d, 0);
		i->fn = wide ? push64_r : push_r;
	}
	i->flags |= IF_STACK;
	return true;
}

static bool decode_pop(struct insn *i, const struct decoded *d, bool wide)
{
	if (is_mem(d, 0)) {
		insn_set_mem(i, d, &d->op[0]);
		if (i->base == R_RSP)
			i->disp += i->aux;
		i->fn = pop_m;
	} else {
		i->dst = reg_off(d, 0);
		i->fn = wide ? pop64_r : pop_r;
	}
	i->flags |= IF_STACK;
	return true;
}

bool ops_stack_decode(struct insn *i, const struct decoded *d)
{
	bool wide = d->code_bits == 64 && d->z.operand_width == 64;

	if ((i->flags & IF_LOCK) || d->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return false;
	i->aux = d->z.operand_width / 8;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_PUSH:
		return general(d) && decode_push(i, d, wide);
	case ZYDIS_MNEMONIC_POP:
		return general(d) && decode_pop(i, d, wide);
	case ZYDIS_MNEMONIC_PUSHA:
	case ZYDIS_MNEMONIC_PUSHAD:
		i->aux = d->z.mnemonic == ZYDIS_MNEMONIC_PUSHA ? 2 : 4;
		i->flags |= IF_STACK;
		i->fn = pusha;
		return true;
	case ZYDIS_MNEMONIC_POPA:
	case ZYDIS_MNEMONIC_POPAD:
		i->aux = d->z.mnemonic == ZYDIS_MNEMONIC_POPA ? 2 : 4;
		i->flags |= IF_STACK;
		i->fn = popa;
		return true;
	case ZYDIS_MNEMONIC_ENTER:
		i->imm = (u16)d->op[0].imm.value.u;
		i->src = (uint8_t)d->op[1].imm.value.u;
		i->flags |= IF_STACK;
		i->fn = enter;
		return true;
	case ZYDIS_MNEMONIC_LEAVE:
		i->flags |= IF_STACK;
		i->fn = wide ? leave64 : leave;
		return true;
	default:
		return false;
	}
}
