/* IRET in every mode (SDM vol. 2 IRET). */
#include "softkvm/sys/sysint.h"

uint64_t flags_merge(const struct cpu *c, uint64_t v, unsigned opsize, unsigned cpl, bool iret)
{
	uint64_t old = cpu_get_rflags(c), mask = FL_OSZAPC | FL_TF | FL_DF | FL_NT;

	if (opsize > 2)
		mask |= FL_AC | FL_ID | (iret ? FL_RF : 0);
	if (cpl == 0)
		mask |= FL_IOPL;
	if (c->real || cpl <= cpu_iopl(c))
		mask |= FL_IF;
	v = (old & ~mask) | (v & mask);
	if (!iret)
		v &= ~(uint64_t)FL_RF;
	return v;
}

static void nmi_unmask(struct cpu *c)
{
	if (c->nmi_masked) {
		c->nmi_masked = false;
		event_unblocked(c);
	}
}

static void iret_real(struct cpu *c, unsigned opsize)
{
	uint64_t ip = stack_peek(c, 0, opsize), fl = stack_peek(c, 2 * opsize, opsize);
	uint16_t sel = (uint16_t)stack_peek(c, opsize, opsize);

	if (ip > (c->vm86 ? 0xffff : c->seg[SEG_CS].limit))
		cpu_gp(c, 0);
	stack_set_sp(c, c->gpr[R_RSP] + 3 * opsize);
	seg_set_real(c, SEG_CS, sel);
	c->rip = ip;
	cpu_set_rflags(c, flags_merge(c, fl, opsize, c->cpl, true));
	cpu_update_mode(c);
	nmi_unmask(c);
}

/* Virtual-8086 mode below IOPL 3 with VME: IF is VIF. */
static void iret_vme(struct cpu *c)
{
	uint64_t ip = stack_peek(c, 0, 2), fl = stack_peek(c, 4, 2), new;
	uint16_t sel = (uint16_t)stack_peek(c, 2, 2);

	if ((fl & FL_TF) || ((fl & FL_IF) && (c->eflags & FL_VIP)))
		cpu_gp(c, 0);
	new = flags_merge(c, fl, 2, 3, true) & ~(uint64_t)FL_VIF;
	if (fl & FL_IF)
		new |= FL_VIF;
	stack_set_sp(c, c->gpr[R_RSP] + 6);
	seg_set_real(c, SEG_CS, sel);
	c->rip = ip;
	cpu_set_rflags(c, new);
	nmi_unmask(c);
}

static void iret_to_vm86(struct cpu *c, uint64_t ip, uint16_t cs, uint64_t fl)
{
	static const uint8_t order[] = { SEG_ES, SEG_DS, SEG_FS, SEG_GS };
	uint64_t v[6];

	for (unsigned k = 0; k < 6; k++)
		v[k] = stack_peek(c, 12 + 4 * k, 4);
	if ((ip & 0xffffffff) > 0xffff)
		cpu_gp(c, 0);
	c->rip = ip;
	c->gpr[R_RSP] = (uint32_t)v[0];
	seg_set_real(c, SEG_CS, cs);
	seg_set_real(c, SEG_SS, (uint16_t)v[1]);
	for (unsigned k = 0; k < 4; k++)
		seg_set_real(c, order[k], (uint16_t)v[2 + k]);
	cpu_set_rflags(c, fl & 0x3f7fd7);
	cpu_update_mode(c);
	nmi_unmask(c);
}

static void check_return_cs(struct cpu *c, struct desc *d, uint16_t sel)
{
	unsigned rpl = sel & 3;

	if (sel_null(sel))
		cpu_gp(c, 0);
	desc_fetch(c, sel, EXC_GP, d);
	if (!desc_code(d) || rpl < c->cpl || (cpu_long(c) && desc_l(d) && desc_db(d)))
		cpu_gp(c, sel_err(sel));
	if (desc_conforming(d) ? desc_dpl(d) > rpl : desc_dpl(d) != rpl)
		cpu_gp(c, sel_err(sel));
	if (!desc_present(d))
		cpu_raise_err(c, EXC_NP, sel_err(sel));
}

/* SS:RSP of the frame, where the frame has them. */
static void load_return_ss(struct cpu *c, struct desc *cs, struct seg *s, unsigned opsize)
{
	uint16_t sel = (uint16_t)stack_peek(c, 4ull * opsize, opsize);
	unsigned rpl = cs->sel & 3;
	struct desc ss;

	if (sel_null(sel)) {
		if (!desc_is_64(c, cs) || rpl == 3 || (sel & 3u) != rpl)
			cpu_gp(c, 0);
		seg_null(s, sel);
	} else {
		desc_fetch(c, sel, EXC_GP, &ss);
		seg_check_ss(c, sel, &ss, rpl, EXC_GP);
		desc_set_accessed(c, &ss);
		seg_from_desc(s, &ss);
	}
	s->dpl = (uint8_t)rpl;
}

static uint64_t iret_flags(struct cpu *c, uint64_t fl, unsigned opsize)
{
	uint64_t new = flags_merge(c, fl, opsize, c->cpl, true);

	if (c->cpl == 0 && opsize > 2 && !c->real)
		new = (new & ~(uint64_t)(FL_VIF | FL_VIP)) | (fl & (FL_VIF | FL_VIP));
	return new;
}

static void iret_protected(struct cpu *c, unsigned opsize)
{
	uint64_t ip = stack_peek(c, 0, opsize), fl = stack_peek(c, 2 * opsize, opsize), sp = 0;
	uint16_t sel = (uint16_t)stack_peek(c, opsize, opsize);
	struct seg ss;
	struct desc d;
	bool outer, full;

	if ((fl & FL_VM) && opsize == 4 && c->cpl == 0 && !cpu_long(c)) {
		iret_to_vm86(c, ip, sel, fl);
		return;
	}
	check_return_cs(c, &d, sel);
	outer = (sel & 3) > c->cpl;
	full = outer || c->flat;        /* 64-bit code always pops SS:RSP */
	if (full) {
		sp = stack_peek(c, 3ull * opsize, opsize);
		load_return_ss(c, &d, &ss, opsize);
	}
	ip = code_check_ip(c, &d, ip);
	desc_set_accessed(c, &d);
	fl = iret_flags(c, fl, opsize);
	if (!full)
		stack_set_sp(c, c->gpr[R_RSP] + 3 * opsize);
	else
		c->seg[SEG_SS] = ss;
	cs_commit(c, &d, sel & 3, ip);
	cpu_set_rflags(c, fl);
	cpu_update_mode(c);
	if (full)
		stack_set_sp(c, sp);
	if (outer)
		seg_null_inner(c, sel & 3);
	nmi_unmask(c);
}

void far_iret(struct cpu *c, unsigned opsize)
{
	if (c->real) {
		iret_real(c, opsize);
	} else if (c->vm86) {
		if (cpu_iopl(c) == 3)
			iret_real(c, opsize);
		else if (opsize == 2 && (c->cr4 & CR4_VME))
			iret_vme(c);
		else
			cpu_gp(c, 0);
	} else if (c->eflags & FL_NT) {
		uint16_t link = 0;

		if (cpu_long(c))
			cpu_gp(c, 0);
		mem_read_sys(c, (uint32_t)c->seg[SEG_TR].base, &link, 2);
		if (link & 4)
			cpu_raise_err(c, EXC_TS, sel_err(link));
		task_switch(c, link, TASK_IRET, false, 0);
		nmi_unmask(c);
	} else {
		iret_protected(c, opsize);
	}
}
