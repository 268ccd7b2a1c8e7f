/* MOV, PUSH, POP of segment registers, LDS and its kin, SWAPGS, FS and GS bases. */
#include "softkvm/sys/sysint.h"

/* dst, src: gpr offset or segment number; aux: operand size. */
static void op_mov_from_seg_reg(struct cpu *c, const struct insn *i)
{
	uint16_t sel = c->seg[i->src].sel;

	if (i->aux == 2)
		REG16(c, i->dst) = sel;
	else
		REG64(c, i->dst) = sel;
}

static void op_mov_from_seg_mem(struct cpu *c, const struct insn *i)
{
	mem_st16(c, insn_lin(c, i, 2, ACC_WRITE), c->seg[i->src].sel);
}

static void load_seg(struct cpu *c, unsigned seg, uint16_t sel)
{
	seg_load(c, seg, sel);
	if (seg == SEG_SS) {
		c->shadow |= SHADOW_MOV_SS;
		event_update_one_insn(c);
	}
}

static void op_mov_to_seg_reg(struct cpu *c, const struct insn *i) { load_seg(c, i->dst, REG16(c, i->src)); }

static void op_mov_to_seg_mem(struct cpu *c, const struct insn *i)
{
	load_seg(c, i->dst, mem_ld16(c, insn_lin(c, i, 2, ACC_READ)));
}

static void op_push_seg(struct cpu *c, const struct insn *i)
{
	uint16_t sel = c->seg[i->src].sel;
	uint64_t sp = c->gpr[R_RSP] - i->aux;

	/* With a 32-bit operand Intel's processors write 16 bits and leave the upper half of the slot alone. */
	if (i->aux == 4 && !(c->feat && c->feat->amd))
		mem_write(c, stack_lin(c, sp, 2, ACC_WRITE), &sel, 2);
	else
		mem_write(c, stack_lin(c, sp, i->aux, ACC_WRITE), &(uint64_t){ sel }, i->aux);
	stack_set_sp(c, sp);
}

static void op_pop_seg(struct cpu *c, const struct insn *i)
{
	uint16_t sel = (uint16_t)stack_peek(c, 0, i->aux);
	uint64_t sp = c->gpr[R_RSP] + i->aux;
	unsigned bits = c->stack_bits;

	load_seg(c, i->dst, sel);
	/* The width of the stack at the start counts. */
	if (bits == 16)
		c->gpr[R_RSP] = (c->gpr[R_RSP] & ~0xffffull) | (uint16_t)sp;
	else
		c->gpr[R_RSP] = bits == 32 ? (uint32_t)sp : sp;
}

/* dst: gpr offset; src: segment. */
static void op_lxs(struct cpu *c, const struct insn *i)
{
	uint16_t sel;
	uint64_t off = far_pointer(c, i, &sel);

	seg_load(c, i->src, sel);
	if (i->aux == 2)
		REG16(c, i->dst) = (uint16_t)off;
	else
		REG64(c, i->dst) = off;
}

static void op_swapgs(struct cpu *c, const struct insn *i)
{
	uint64_t v = c->seg[SEG_GS].base;

	need_cpl0(c);
	c->seg[SEG_GS].base = c->msr.kernel_gs_base;
	c->msr.kernel_gs_base = v;
}

static void need_fsgsbase(struct cpu *c)
{
	if (!(c->cr4 & CR4_FSGSBASE) || !c->flat)
		cpu_ud(c);
}

static void op_rdbase(struct cpu *c, const struct insn *i)
{
	need_fsgsbase(c);
	REG64(c, i->dst) = i->aux == 4 ? (uint32_t)c->seg[i->src].base : c->seg[i->src].base;
}

static void op_wrbase(struct cpu *c, const struct insn *i)
{
	uint64_t v = i->aux == 4 ? REG32(c, i->src) : REG64(c, i->src);

	need_fsgsbase(c);
	if (!cpuid_canonical(c, v))
		cpu_gp(c, 0);
	c->seg[i->dst].base = v;
}

static int seg_of(ZydisRegister r)
{
	switch (r) {
	case ZYDIS_REGISTER_ES: return SEG_ES;
	case ZYDIS_REGISTER_CS: return SEG_CS;
	case ZYDIS_REGISTER_SS: return SEG_SS;
	case ZYDIS_REGISTER_DS: return SEG_DS;
	case ZYDIS_REGISTER_FS: return SEG_FS;
	case ZYDIS_REGISTER_GS: return SEG_GS;
	default: return -1;
	}
}

static int op_seg(const ZydisDecodedOperand *op)
{
	return op->type == ZYDIS_OPERAND_TYPE_REGISTER ? seg_of(op->reg.value) : -1;
}

static bool decode_mov(struct insn *i, const struct decoded *d)
{
	int to = op_seg(&d->op[0]), from = op_seg(&d->op[1]);
	const ZydisDecodedOperand *other = to >= 0 ? &d->op[1] : &d->op[0];
	bool mem = other->type == ZYDIS_OPERAND_TYPE_MEMORY;

	if (to < 0 && from < 0)
		return false;
	if (mem)
		insn_set_mem(i, d, other);
	if (to >= 0) {
		i->flags |= IF_END;
		i->dst = (uint8_t)to;
		if (!mem)
			i->src = insn_reg_off(other->reg.value);
		i->fn = to == SEG_CS ? op_ud : mem ? op_mov_to_seg_mem : op_mov_to_seg_reg;
		return true;
	}
	i->src = (uint8_t)from;
	i->aux = d->z.operand_width / 8;
	if (!mem)
		i->dst = insn_reg_off(other->reg.value);
	i->fn = mem ? op_mov_from_seg_mem : op_mov_from_seg_reg;
	return true;
}

static bool decode_stack(struct insn *i, const struct decoded *d)
{
	int s = op_seg(&d->op[0]);

	if (s < 0)
		return false;
	i->flags |= IF_STACK;
	i->aux = d->z.operand_width / 8;
	if (d->code_bits == 64 && i->aux == 4)
		i->aux = 8;
	i->src = i->dst = (uint8_t)s;
	i->fn = op_push_seg;
	if (d->z.mnemonic == ZYDIS_MNEMONIC_POP) {
		i->fn = op_pop_seg;
		i->flags |= IF_END;
	}
	return true;
}

static bool decode_lxs(struct insn *i, const struct decoded *d, unsigned seg)
{
	if (d->op[1].type != ZYDIS_OPERAND_TYPE_MEMORY)
		return false;
	i->flags |= IF_END;
	insn_set_mem(i, d, &d->op[1]);
	i->aux = d->z.operand_width / 8;
	if (i->aux == 8 && d->cpu->feat && d->cpu->feat->amd)
		i->aux = 4;
	i->dst = insn_reg_off(d->op[0].reg.value);
	i->src = (uint8_t)seg;
	i->fn = op_lxs;
	return true;
}

static bool decode_base(struct insn *i, const struct decoded *d, unsigned seg, bool write)
{
	i->aux = d->z.operand_width / 8;
	if (write) {
		i->dst = (uint8_t)seg;
		i->src = insn_reg_off(d->op[0].reg.value);
		i->fn = op_wrbase;
	} else {
		i->src = (uint8_t)seg;
		i->dst = insn_reg_off(d->op[0].reg.value);
		i->fn = op_rdbase;
	}
	return true;
}

bool sys_decode_seg(struct insn *i, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_MOV: return decode_mov(i, d);
	case ZYDIS_MNEMONIC_PUSH:
	case ZYDIS_MNEMONIC_POP: return decode_stack(i, d);
	case ZYDIS_MNEMONIC_LES: return decode_lxs(i, d, SEG_ES);
	case ZYDIS_MNEMONIC_LDS: return decode_lxs(i, d, SEG_DS);
	case ZYDIS_MNEMONIC_LSS: return decode_lxs(i, d, SEG_SS);
	case ZYDIS_MNEMONIC_LFS: return decode_lxs(i, d, SEG_FS);
	case ZYDIS_MNEMONIC_LGS: return decode_lxs(i, d, SEG_GS);
	case ZYDIS_MNEMONIC_RDFSBASE: return decode_base(i, d, SEG_FS, false);
	case ZYDIS_MNEMONIC_RDGSBASE: return decode_base(i, d, SEG_GS, false);
	case ZYDIS_MNEMONIC_WRFSBASE: return decode_base(i, d, SEG_FS, true);
	case ZYDIS_MNEMONIC_WRGSBASE: return decode_base(i, d, SEG_GS, true);
	case ZYDIS_MNEMONIC_SWAPGS: i->fn = op_swapgs; return true;
	default: return false;
	}
}
