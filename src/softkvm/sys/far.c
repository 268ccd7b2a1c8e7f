/* Far JMP, CALL and RET in every mode (SDM vol. 2 CALL/JMP/RET, vol. 3 5.8). */
#include "softkvm/sys/sysint.h"

/* Real and virtual-8086 mode. */
static void branch_real(struct cpu *c, uint16_t sel, uint64_t off, unsigned opsize, bool call)
{
	uint32_t limit = c->vm86 ? 0xffff : c->seg[SEG_CS].limit;

	if (opsize == 2)
		off = (uint16_t)off;
	if (off > limit)
		cpu_gp(c, 0);
	if (call) {
		uint64_t v[2] = { c->seg[SEG_CS].sel, c->rip };

		stack_push_n(c, v, 2, opsize);
	}
	seg_set_real(c, SEG_CS, sel);
	c->rip = off;
	cpu_update_mode(c);
}

static void check_code_present(struct cpu *c, const struct desc *d)
{
	if (!desc_present(d))
		cpu_raise_err(c, EXC_NP, sel_err(d->sel));
}

static void check_code_bits(struct cpu *c, const struct desc *d)
{
	if (cpu_long(c) && desc_l(d) && desc_db(d))
		cpu_gp(c, sel_err(d->sel));
}

static void branch_code(struct cpu *c, struct desc *d, uint64_t off, unsigned opsize, bool call)
{
	uint64_t v[2] = { c->seg[SEG_CS].sel, c->rip };
	unsigned dpl = desc_dpl(d), rpl = d->sel & 3;

	if (!desc_code(d))
		cpu_gp(c, sel_err(d->sel));
	check_code_bits(c, d);
	if (desc_conforming(d) ? dpl > c->cpl : rpl > c->cpl || dpl != c->cpl)
		cpu_gp(c, sel_err(d->sel));
	check_code_present(c, d);
	if (opsize == 2)
		off = (uint16_t)off;
	off = code_check_ip(c, d, off);
	desc_set_accessed(c, d);
	if (call)
		stack_push_n(c, v, 2, opsize);
	cs_commit(c, d, c->cpl, off);
	cpu_update_mode(c);
}

/* Call through a gate to a more privileged ring: new stack, parameters copied (legacy gates). */
static void gate_inner(struct cpu *c, const struct desc *gate, struct desc *d, uint64_t off, unsigned opsize)
{
	unsigned cpl = desc_dpl(d), n = cpu_long(c) ? 0 : gate->raw >> 32 & 31;
	uint64_t param[31];
	struct nstack ns;

	nstack_from_tss(c, &ns, cpl);
	for (unsigned k = 0; k < n; k++)
		param[k] = stack_peek(c, (uint64_t)k * opsize, opsize);
	nstack_push(c, &ns, c->seg[SEG_SS].sel, opsize);
	nstack_push(c, &ns, c->gpr[R_RSP], opsize);
	while (n)
		nstack_push(c, &ns, param[--n], opsize);
	nstack_push(c, &ns, c->seg[SEG_CS].sel, opsize);
	nstack_push(c, &ns, c->rip, opsize);
	off = code_check_ip(c, d, off);
	desc_set_accessed(c, d);
	nstack_commit(c, &ns);
	cs_commit(c, d, cpl, off);
	cpu_update_mode(c);
}

static void branch_gate(struct cpu *c, struct desc *gate, bool call)
{
	unsigned opsize = cpu_long(c) ? 8 : desc_type(gate) & 8 ? 4 : 2;
	uint64_t off = (gate->raw & 0xffff) | (opsize > 2 ? gate->raw >> 32 & 0xffff0000 : 0);
	uint16_t sel = (uint16_t)(gate->raw >> 16);
	struct desc d;

	if (desc_dpl(gate) < MAX(c->cpl, gate->sel & 3u))
		cpu_gp(c, sel_err(gate->sel));
	if (!desc_present(gate))
		cpu_raise_err(c, EXC_NP, sel_err(gate->sel));
	if (cpu_long(c)) {
		desc_fetch_hi(c, gate, EXC_GP);
		if (gate->hi >> 40 & 31)
			cpu_gp(c, sel_err(gate->sel));
		off |= gate->hi << 32;
	}
	if (sel_null(sel))
		cpu_gp(c, 0);
	desc_fetch(c, sel, EXC_GP, &d);
	if (!desc_code(&d) || desc_dpl(&d) > c->cpl || (cpu_long(c) && (!desc_l(&d) || desc_db(&d))))
		cpu_gp(c, sel_err(sel));
	if (!call && !desc_conforming(&d) && desc_dpl(&d) != c->cpl)
		cpu_gp(c, sel_err(sel));
	check_code_present(c, &d);
	if (!desc_conforming(&d) && desc_dpl(&d) < c->cpl) {
		gate_inner(c, gate, &d, off, opsize);
		return;
	}
	off = code_check_ip(c, &d, off);
	desc_set_accessed(c, &d);
	if (call && cpu_long(c)) {
		/* A 64-bit gate pushes eight bytes even onto a compatibility-mode caller's stack. */
		struct nstack ns = { .ss = c->seg[SEG_SS], .sp = c->gpr[R_RSP], .cpl = c->cpl, .is64 = true };

		nstack_push(c, &ns, c->seg[SEG_CS].sel, 8);
		nstack_push(c, &ns, c->rip, 8);
		c->gpr[R_RSP] = ns.sp;
	} else if (call) {
		uint64_t v[2] = { c->seg[SEG_CS].sel, c->rip };

		stack_push_n(c, v, 2, opsize);
	}
	cs_commit(c, &d, c->cpl, off);
	cpu_update_mode(c);
}

static void branch_task(struct cpu *c, struct desc *d, bool call)
{
	uint16_t sel = d->sel;

	if (desc_dpl(d) < MAX(c->cpl, sel & 3u))
		cpu_gp(c, sel_err(sel));
	if (desc_type(d) == SYS_TASK_GATE) {
		if (!desc_present(d))
			cpu_raise_err(c, EXC_NP, sel_err(sel));
		sel = (uint16_t)(d->raw >> 16);
	}
	task_switch(c, sel, call ? TASK_CALL : TASK_JMP, false, 0);
}

void far_branch(struct cpu *c, uint16_t sel, uint64_t off, unsigned opsize, bool call)
{
	struct desc d;

	if (c->real || c->vm86) {
		branch_real(c, sel, off, opsize, call);
		return;
	}
	if (sel_null(sel))
		cpu_gp(c, 0);
	desc_fetch(c, sel, EXC_GP, &d);
	if (desc_s(&d)) {
		branch_code(c, &d, off, opsize, call);
		return;
	}
	switch (desc_type(&d)) {
	case SYS_CALL16:
		if (cpu_long(c))
			cpu_gp(c, sel_err(sel));
		/* fall through */
	case SYS_CALL32:
		branch_gate(c, &d, call);
		return;
	case SYS_TSS16: case SYS_TSS32: case SYS_TSS16_BUSY: case SYS_TSS32_BUSY: case SYS_TASK_GATE:
		if (cpu_long(c))
			cpu_gp(c, sel_err(sel));
		branch_task(c, &d, call);
		return;
	default:
		cpu_gp(c, sel_err(sel));
	}
}

/* -- RET -------------------------------------------------------------------------------------- */
static void ret_real(struct cpu *c, unsigned opsize, unsigned pop)
{
	uint64_t ip = stack_peek(c, 0, opsize);
	uint16_t sel = (uint16_t)stack_peek(c, opsize, opsize);

	if (ip > (c->vm86 ? 0xffff : c->seg[SEG_CS].limit))
		cpu_gp(c, 0);
	stack_set_sp(c, c->gpr[R_RSP] + 2 * opsize + pop);
	seg_set_real(c, SEG_CS, sel);
	c->rip = ip;
	cpu_update_mode(c);
}

/* Stack pointer after a return: what the new mode lets through. */
static void set_outer_sp(struct cpu *c, uint64_t sp)
{
	if (c->stack_bits == 16)
		c->gpr[R_RSP] = (c->gpr[R_RSP] & ~0xffffull) | (uint16_t)sp;
	else
		c->gpr[R_RSP] = c->stack_bits == 32 ? (uint32_t)sp : sp;
}

static void ret_outer(struct cpu *c, struct desc *d, uint64_t ip, unsigned opsize, unsigned pop)
{
	uint64_t sp = stack_peek(c, 2ull * opsize + pop, opsize);
	uint16_t sel = (uint16_t)stack_peek(c, 3ull * opsize + pop, opsize);
	unsigned rpl = d->sel & 3;
	struct desc ss;
	struct seg s;

	if (sel_null(sel)) {
		if (!desc_is_64(c, d) || rpl == 3 || (sel & 3u) != rpl)
			cpu_gp(c, 0);
		seg_null(&s, sel);
	} else {
		desc_fetch(c, sel, EXC_GP, &ss);
		seg_check_ss(c, sel, &ss, rpl, EXC_GP);
		desc_set_accessed(c, &ss);
		seg_from_desc(&s, &ss);
	}
	ip = code_check_ip(c, d, ip);
	desc_set_accessed(c, d);
	s.dpl = (uint8_t)rpl;
	c->seg[SEG_SS] = s;
	cs_commit(c, d, rpl, ip);
	cpu_update_mode(c);
	set_outer_sp(c, sp + pop);
	seg_null_inner(c, rpl);
}

void far_ret(struct cpu *c, unsigned opsize, unsigned pop)
{
	struct desc d;
	uint64_t ip;
	uint16_t sel;
	unsigned rpl;

	if (c->real || c->vm86) {
		ret_real(c, opsize, pop);
		return;
	}
	ip = stack_peek(c, 0, opsize);
	sel = (uint16_t)stack_peek(c, opsize, opsize);
	rpl = sel & 3;
	if (sel_null(sel))
		cpu_gp(c, 0);
	desc_fetch(c, sel, EXC_GP, &d);
	if (!desc_code(&d) || rpl < c->cpl)
		cpu_gp(c, sel_err(sel));
	check_code_bits(c, &d);
	if (desc_conforming(&d) ? desc_dpl(&d) > rpl : desc_dpl(&d) != rpl)
		cpu_gp(c, sel_err(sel));
	check_code_present(c, &d);
	if (rpl > c->cpl) {
		ret_outer(c, &d, ip, opsize, pop);
		return;
	}
	ip = code_check_ip(c, &d, ip);
	desc_set_accessed(c, &d);
	stack_set_sp(c, c->gpr[R_RSP] + 2 * opsize + pop);
	cs_commit(c, &d, c->cpl, ip);
	cpu_update_mode(c);
}

/* -- instructions ----------------------------------------------------------------------------- */
/* aux: operand size; dst: 1 for CALL. Direct: imm is offset | selector << 32. */
static void op_far_direct(struct cpu *c, const struct insn *i)
{
	far_branch(c, (uint16_t)(i->imm >> 32), (uint32_t)i->imm, i->aux, i->dst);
}

uint64_t far_pointer(struct cpu *c, const struct insn *i, uint16_t *sel)
{
	uint64_t lin = insn_lin(c, i, i->aux + 2, ACC_READ), off = 0;

	mem_read(c, lin, &off, i->aux);
	*sel = mem_ld16(c, lin + i->aux);
	return off;
}

static void op_far_mem(struct cpu *c, const struct insn *i)
{
	uint16_t sel;
	uint64_t off = far_pointer(c, i, &sel);

	far_branch(c, sel, off, i->aux, i->dst);
}

/*
 * With REX.W on AMD processors, which have no 64-bit offset here and ignore it. But nothing loads a far pointer from a device:
 * KVM emulates that, and its emulator is Intel's.
 */
static void op_far_mem_rexw(struct cpu *c, const struct insn *i)
{
	uint64_t lin = insn_lin(c, i, 6, ACC_READ), off = mem_ld32(c, lin);
	unsigned size = 4;

	if (mmio_pending(c)) {
		off |= (uint64_t)mem_ld32(c, lin + 4) << 32;
		size = 8;
	}
	far_branch(c, mem_ld16(c, lin + size), off, size, i->dst);
}

static void op_far_ret(struct cpu *c, const struct insn *i) { far_ret(c, i->aux, (unsigned)i->imm); }
static void op_iret(struct cpu *c, const struct insn *i) { far_iret(c, i->aux); }

static bool decode_far_branch(struct insn *i, const struct decoded *d)
{
	i->aux = d->z.operand_width / 8;
	i->dst = d->z.mnemonic == ZYDIS_MNEMONIC_CALL;
	if (d->op[0].type == ZYDIS_OPERAND_TYPE_POINTER) {
		i->fn = op_far_direct;
		i->imm = d->op[0].ptr.offset | (uint64_t)d->op[0].ptr.segment << 32;
		return true;
	}
	insn_set_mem(i, d, &d->op[0]);
	i->fn = i->aux == 8 && d->cpu->feat && d->cpu->feat->amd ? op_far_mem_rexw : op_far_mem;
	return true;
}

bool sys_decode_far(struct insn *i, const struct decoded *d)
{
	bool far = d->z.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR;

	i->flags |= IF_END;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_CALL:
	case ZYDIS_MNEMONIC_JMP:
		return far && decode_far_branch(i, d);
	case ZYDIS_MNEMONIC_RET:
		if (!far)
			return false;
		i->fn = op_far_ret;
		i->flags |= IF_STACK;
		i->aux = d->z.operand_width / 8;
		i->imm = d->op[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (uint16_t)d->op[0].imm.value.u : 0;
		return true;
	case ZYDIS_MNEMONIC_IRET: i->aux = 2; break;
	case ZYDIS_MNEMONIC_IRETD: i->aux = 4; break;
	case ZYDIS_MNEMONIC_IRETQ: i->aux = 8; break;
	default:
		return false;
	}
	i->fn = op_iret;
	i->flags |= IF_STACK;
	return true;
}
