/* Near branches. Far ones are sys's. */
#include "softkvm/interp/ops.h"
#include "softkvm/interp/stack.h"

#define TARGET (c->gpr[R_BLK] + i->imm)
#define RETURN_RIP (c->gpr[R_BLK] + i->off + i->len)

/* A branch target outside 64-bit code, or of a 16-bit branch in it: truncated, checked against the CS limit. */
static u64 narrow_target(struct cpu *c, const struct insn *i, u64 t)
{
	t = i->aux == 16 ? (u16)t : i->aux == 32 ? (u32)t : t;
	if (c->code_bits == 64) {
		if (!cpu_canonical(c, t))
			cpu_gp(c, 0);
	} else if (t > c->seg[SEG_CS].limit) {
		cpu_gp(c, 0);
	}
	return t;
}

/* Behind the last instruction of a block that no branch ends: cpu->rip has been its end all along. */
void op_block_end(struct cpu *c, const struct insn *i) { CHAIN(0); }

/* -- relative ---------------------------------------------------------------------------------- */
OP(jmp64) { c->rip = TARGET; CHAIN(1); }
OP(jmp_narrow) { c->rip = narrow_target(c, i, TARGET); CHAIN(1); }

#define JCC(cc)                                                                 \
	OP(jcc64_##cc) { if (cond(c, cc)) { c->rip = TARGET; CHAIN(1); } CHAIN(0); } \
	OP(jcc_narrow_##cc) { if (cond(c, cc)) { c->rip = narrow_target(c, i, TARGET); CHAIN(1); } CHAIN(0); }
#define CC_ALL(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13) F(14) F(15)
CC_ALL(JCC)
#define JROW(cc) { jcc64_##cc, jcc_narrow_##cc },
static insn_fn *const jccs[16][2] = { CC_ALL(JROW) };

/* LOOPNE, LOOPE, LOOP and JCXZ (opcodes E0..E3), counting in CX, ECX or RCX by address size. */
static bool loop_taken(struct cpu *c, const struct insn *i, u64 count)
{
	bool zf = c->aflags & AF_ZF;

	switch (i->src) {
	case 0: return count && !zf;
	case 1: return count && zf;
	case 2: return count;
	default: return !count;
	}
}

OP(loop)
{
	u64 n = c->gpr[R_RCX] - (i->src != 3);
	bool taken;

	n = i->flags & IF_A32 ? (u32)n : i->flags & IF_A16 ? (u16)n : n;
	taken = loop_taken(c, i, n);
	if (taken)
		c->rip = narrow_target(c, i, TARGET);
	if (i->src != 3) {
		if (i->flags & IF_A16)
			SET16(R_RCX * 8, n);
		else
			SET64(R_RCX * 8, n);
	}
	if (taken)
		CHAIN(1);
	CHAIN(0);
}

/* -- calls and returns in 64-bit code ---------------------------------------------------------- */
OP(call64)
{
	bool fast = PUSH64(RETURN_RIP);

	c->rip = TARGET;
	if (unlikely(!fast))
		return;
	CHAIN(1);
}

static ALWAYS_INLINE bool canonical_fast(const struct cpu *c, u64 t)
{
	return likely((u64)((s64)(t << 16) >> 16) == t) || cpu_canonical(c, t);
}

OP(ret64)
{
	bool hit;
	u64 sp = c->gpr[R_RSP], t = LOAD64(sp, hit);

	if (unlikely(!canonical_fast(c, t)))
		cpu_gp(c, 0);
	c->gpr[R_RSP] = sp + 8 + i->imm;
	c->rip = t;
	if (unlikely(!hit))
		return;
	CHAIN_INDIRECT;
}

OP(jmp64_r)
{
	u64 t = GET64(i->dst);

	if (unlikely(!canonical_fast(c, t)))
		cpu_gp(c, 0);
	c->rip = t;
	CHAIN_INDIRECT;
}

OP(jmp64_m)
{
	bool hit;
	u64 t = LOAD64(insn_lin(c, i, 8, ACC_READ), hit);

	if (unlikely(!canonical_fast(c, t)))
		cpu_gp(c, 0);
	c->rip = t;
	if (unlikely(!hit))
		return;
	CHAIN_INDIRECT;
}

OP(call64_r)
{
	u64 t = GET64(i->dst);
	bool fast;

	if (unlikely(!canonical_fast(c, t)))
		cpu_gp(c, 0);
	fast = PUSH64(RETURN_RIP);
	c->rip = t;
	if (unlikely(!fast))
		return;
	CHAIN_INDIRECT;
}

OP(call64_m)
{
	bool hit, fast;
	u64 t = LOAD64(insn_lin(c, i, 8, ACC_READ), hit);

	if (unlikely(!canonical_fast(c, t)))
		cpu_gp(c, 0);
	fast = PUSH64(RETURN_RIP);
	c->rip = t;
	if (unlikely(!hit || !fast))
		return;
	CHAIN_INDIRECT;
}

/* -- the same elsewhere: aux is the operand size ----------------------------------------------- */
OP(call_narrow)
{
	u64 t = narrow_target(c, i, TARGET);

	stk_push(c, RETURN_RIP, i->aux / 8);
	c->rip = t;
}

OP(ret_narrow)
{
	unsigned size = i->aux / 8;
	u64 t = narrow_target(c, i, stk_peek(c, 0, size));

	stk_set(c, c->gpr[R_RSP] + size + i->imm);
	c->rip = t;
}

static u64 operand(struct cpu *c, const struct insn *i)
{
	return i->flags & IF_MEM ? ops_ld_slow(c, insn_lin(c, i, i->aux / 8, ACC_READ), i->aux / 8) : GET64(i->dst);
}

OP(jmp_narrow_rm) { c->rip = narrow_target(c, i, operand(c, i)); }

OP(call_narrow_rm)
{
	u64 t = narrow_target(c, i, operand(c, i));

	stk_push(c, RETURN_RIP, i->aux / 8);
	c->rip = t;
}

/* -- decoding ---------------------------------------------------------------------------------- */
static void set_target(struct insn *i, const struct decoded *d)
{
	i->imm = (u64)i->off + i->len + d->op[0].imm.value.u;
	i->aux = d->z.operand_width;
	i->flags |= IF_END;
}

/* Calls and jumps, near: by the kind of operand and width. */
static bool decode_transfer(struct insn *i, const struct decoded *d, bool call)
{
	bool wide = d->code_bits == 64 && d->z.operand_width == 64;

	if (d->z.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || d->op[0].type == ZYDIS_OPERAND_TYPE_POINTER)
		return false;
	i->aux = d->z.operand_width;
	i->flags |= IF_END;
	if (is_imm(d, 0)) {
		set_target(i, d);
		i->fn = call ? wide ? call64 : call_narrow : wide ? jmp64 : jmp_narrow;
		return true;
	}
	if (is_mem(d, 0))
		insn_set_mem(i, d, &d->op[0]);
	else
		i->dst = reg_off(d, 0);
	if (!wide)
		i->fn = call ? call_narrow_rm : jmp_narrow_rm;
	else if (is_mem(d, 0))
		i->fn = call ? call64_m : jmp64_m;
	else
		i->fn = call ? call64_r : jmp64_r;
	return true;
}

static bool decode_ret(struct insn *i, const struct decoded *d)
{
	if (d->z.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || d->z.opcode == 0xca || d->z.opcode == 0xcb)
		return false;
	i->imm = d->z.operand_count_visible && is_imm(d, 0) ? (u16)d->op[0].imm.value.u : 0;
	i->aux = d->z.operand_width;
	i->flags |= IF_END | IF_STACK;
	i->fn = d->code_bits == 64 && i->aux == 64 ? ret64 : ret_narrow;
	return true;
}

static bool branch_decode(struct insn *i, const struct decoded *d)
{
	bool map0f = d->z.opcode_map == ZYDIS_OPCODE_MAP_0F, map0 = d->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT;
	uint8_t op = d->z.opcode;

	if (d->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || (i->flags & IF_LOCK))
		return false;
	if ((map0 && (op & 0xf0) == 0x70) || (map0f && (op & 0xf0) == 0x80)) {
		set_target(i, d);
		i->fn = jccs[op & 15][!(d->code_bits == 64 && i->aux == 64)];
		return true;
	}
	if (map0 && op >= 0xe0 && op <= 0xe3) {
		set_target(i, d);
		i->src = op & 3;
		i->fn = loop;
		return true;
	}
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_JMP: return decode_transfer(i, d, false);
	case ZYDIS_MNEMONIC_CALL: return decode_transfer(i, d, true);
	case ZYDIS_MNEMONIC_RET: return decode_ret(i, d);
	default: return false;
	}
}

bool ops_branch_decode(struct insn *i, const struct decoded *d)
{
	if (!branch_decode(i, d))
		return false;
	i->flags |= IF_BRANCH;
	return true;
}
