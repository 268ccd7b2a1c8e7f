/*
 * Task switches (SDM vol. 3 ch. 8): 16- and 32-bit TSS, by CALL, JMP, IRET and task gates.
 *
 * Up to the commit point faults belong to the old task and nothing but busy bits and the old TSS has
 * been written, the same values again on a second try. Behind it they belong to the new one: its
 * CS:EIP is what the handler sees.
 */
#include "softkvm/sys/sysint.h"

struct task {
	bool t32;
	uint16_t link, seg[6], ldt;     /* seg in encoding order: ES CS SS DS FS GS */
	uint32_t cr3, ip, flags, gpr[8];
	bool trap;
};

static uint64_t tss_lin(const struct seg *tr, unsigned off) { return (uint32_t)(tr->base + off); }

static void task_parse32(struct task *t, const uint8_t *b)
{
	t->link = ld_le16(b);
	t->cr3 = ld_le32(b + 0x1c);
	t->ip = ld_le32(b + 0x20);
	t->flags = ld_le32(b + 0x24);
	for (unsigned k = 0; k < 8; k++)
		t->gpr[k] = ld_le32(b + 0x28 + 4 * k);
	for (unsigned k = 0; k < 6; k++)
		t->seg[k] = ld_le16(b + 0x48 + 4 * k);
	t->ldt = ld_le16(b + 0x60);
	t->trap = b[0x64] & 1;
}

static void task_parse16(struct task *t, const uint8_t *b)
{
	t->link = ld_le16(b);
	t->ip = ld_le16(b + 0xe);
	t->flags = ld_le16(b + 0x10);
	for (unsigned k = 0; k < 8; k++)
		t->gpr[k] = 0xffff0000u | ld_le16(b + 0x12 + 2 * k);
	for (unsigned k = 0; k < 4; k++)
		t->seg[k] = ld_le16(b + 0x22 + 2 * k);
	t->ldt = ld_le16(b + 0x2a);
}

/* Dynamic fields of the running task into its TSS. */
static void task_save(struct cpu *c, uint32_t flags)
{
	const struct seg *tr = &c->seg[SEG_TR];
	uint8_t b[0x40] = { 0 };

	if (tr->type & 8) {
		st_le32(b, (uint32_t)c->rip);
		st_le32(b + 4, flags);
		for (unsigned k = 0; k < 8; k++)
			st_le32(b + 8 + 4 * k, (uint32_t)c->gpr[k]);
		for (unsigned k = 0; k < 6; k++)
			st_le32(b + 0x28 + 4 * k, c->seg[k].sel);
		mem_write_sys(c, tss_lin(tr, 0x20), b, 0x40);
		return;
	}
	st_le16(b, (uint16_t)c->rip);
	st_le16(b + 2, (uint16_t)flags);
	for (unsigned k = 0; k < 8; k++)
		st_le16(b + 4 + 2 * k, (uint16_t)c->gpr[k]);
	for (unsigned k = 0; k < 4; k++)
		st_le16(b + 0x14 + 2 * k, c->seg[k].sel);
	mem_write_sys(c, tss_lin(tr, 0xe), b, 0x1c);
}

static void task_check_desc(struct cpu *c, uint16_t sel, int reason, struct desc *d)
{
	unsigned exc = reason == TASK_IRET ? EXC_TS : EXC_GP, type;

	if (sel_null(sel) || (sel & 4))
		cpu_raise_err(c, exc, sel_err(sel));
	desc_fetch(c, sel, exc, d);
	type = desc_type(d);
	if (desc_s(d) || (type & 5) != 1 || !!(type & 2) != (reason == TASK_IRET))
		cpu_raise_err(c, exc, sel_err(sel));
	if (!desc_present(d))
		cpu_raise_err(c, EXC_NP, sel_err(sel));
	if (desc_limit(d) < (type & 8 ? 0x67u : 0x2bu))
		cpu_raise_err(c, EXC_TS, sel_err(sel));
}

/* -- the new task's segments: checks of SDM table 8-1, in its order ----------------------------- */
static void load_ldt(struct cpu *c, uint16_t sel)
{
	struct seg *l = &c->seg[SEG_LDTR];
	struct desc d;

	seg_null(l, sel);
	if (sel_null(sel))
		return;
	if (sel & 4)
		cpu_raise_err(c, EXC_TS, sel_err(sel));
	desc_fetch(c, sel, EXC_TS, &d);
	if (desc_s(&d) || desc_type(&d) != SYS_LDT || !desc_present(&d))
		cpu_raise_err(c, EXC_TS, sel_err(sel));
	seg_from_desc(l, &d);
}

static void load_cs(struct cpu *c, uint16_t sel)
{
	unsigned rpl = sel & 3;
	struct desc d;

	if (sel_null(sel))
		cpu_raise_err(c, EXC_TS, 0);
	desc_fetch(c, sel, EXC_TS, &d);
	if (!desc_code(&d) || (desc_conforming(&d) ? desc_dpl(&d) > rpl : desc_dpl(&d) != rpl))
		cpu_raise_err(c, EXC_TS, sel_err(sel));
	if (!desc_present(&d))
		cpu_raise_err(c, EXC_NP, sel_err(sel));
	desc_set_accessed(c, &d);
	seg_from_desc(&c->seg[SEG_CS], &d);
}

static void load_ss(struct cpu *c, uint16_t sel, unsigned cpl)
{
	struct desc d;

	if (sel_null(sel))
		cpu_raise_err(c, EXC_TS, 0);
	desc_fetch(c, sel, EXC_TS, &d);
	seg_check_ss(c, sel, &d, cpl, EXC_TS);
	desc_set_accessed(c, &d);
	seg_from_desc(&c->seg[SEG_SS], &d);
}

static void load_data(struct cpu *c, unsigned seg, uint16_t sel, unsigned cpl)
{
	struct desc d;
	unsigned t;

	if (sel_null(sel))
		return;
	desc_fetch(c, sel, EXC_TS, &d);
	t = desc_type(&d);
	if (!desc_s(&d) || (t & 10) == 8 || ((t & 12) != 12 && MAX(sel & 3u, cpl) > desc_dpl(&d)))
		cpu_raise_err(c, EXC_TS, sel_err(sel));
	if (!desc_present(&d))
		cpu_raise_err(c, EXC_NP, sel_err(sel));
	desc_set_accessed(c, &d);
	seg_from_desc(&c->seg[seg], &d);
}

static void task_load_segs(struct cpu *c, const struct task *t)
{
	static const uint8_t data[] = { SEG_ES, SEG_DS, SEG_FS, SEG_GS };
	unsigned cpl = t->seg[SEG_CS] & 3;

	load_ldt(c, t->ldt);
	if (c->eflags & FL_VM) {
		for (unsigned k = 0; k < 6; k++)
			seg_set_real(c, k, t->seg[k]);
		cpu_update_mode(c);
		return;
	}
	load_cs(c, t->seg[SEG_CS]);
	load_ss(c, t->seg[SEG_SS], cpl);
	cpu_update_mode(c);
	for (unsigned k = 0; k < ARRAY_SIZE(data); k++)
		load_data(c, data[k], t->seg[data[k]], cpl);
	if (c->rip > c->seg[SEG_CS].limit)
		cpu_gp(c, 0);
}

/* Everything that needs no check; segment registers hold bare selectors until they are loaded. */
static void task_commit(struct cpu *c, const struct task *t, struct desc *d, int reason)
{
	struct seg *tr = &c->seg[SEG_TR];
	uint32_t flags = t->flags;

	if (reason == TASK_CALL || reason == TASK_GATE)
		flags |= FL_NT;
	seg_from_desc(tr, d);
	tr->type |= 2;
	c->cr0 |= CR0_TS;
	if (t->t32 && cpu_paging(c)) {
		c->cr3 = t->cr3;
		if (c->cr4 & CR4_PAE)
			mmu_load_pdptes(c, t->cr3);
		mmu_flush_nonglobal(c);
	}
	c->rip = t->ip;
	for (unsigned k = 0; k < 8; k++)
		c->gpr[k] = t->gpr[k];
	for (unsigned k = 0; k < 6; k++) {
		uint8_t dpl = k == SEG_SS ? t->seg[SEG_CS] & 3 : 0;

		seg_null(&c->seg[k], t->seg[k]);
		c->seg[k].dpl = dpl;
	}
	c->seg[SEG_CS].db = t->t32;
	cpu_set_rflags(c, flags & (t->t32 ? 0x3f7fd7 : 0x7fd7));
	cpu_update_mode(c);
	c->dr[7] &= ~0x155ull;          /* local breakpoints are the old task's */
	debug_update(c);
	if (t->trap) {
		c->trap_db = true;
		c->trap_dr6 |= 1 << 15;
	}
}

static int task_finish_try(struct cpu *c, const struct task *t, bool has_error, uint32_t error)
{
	int why = _setjmp(c->unwind);

	if (why)
		return why;
	task_load_segs(c, t);
	if (has_error) {
		uint64_t v = error;

		stack_push_n(c, &v, 1, t->t32 ? 4 : 2);
	}
	return 0;
}

static void task_finish(struct cpu *c, const struct task *t, int reason, bool has_error, uint32_t error)
{
	jmp_buf saved;
	bool scope = c->in_unwind_scope;
	int why;

	memcpy(&saved, &c->unwind, sizeof saved);
	c->in_unwind_scope = true;
	why = task_finish_try(c, t, has_error, error);
	memcpy(&c->unwind, &saved, sizeof saved);
	c->in_unwind_scope = scope;
	if (!why)
		return;
	if (why != UNWIND_EVENT || reason == TASK_GATE)
		cpu_unwind(c, (enum unwind)why);        /* a gate: event_deliver() is the caller */
	if (!event_deliver(c))
		cpu_unwind(c, UNWIND_EXIT_NEXT);
}

void task_switch(struct cpu *c, uint16_t sel, int reason, bool has_error, uint32_t error)
{
	struct seg *tr = &c->seg[SEG_TR];
	uint64_t flags = cpu_get_rflags(c);
	uint8_t b[0x68] = { 0 };
	struct task t = { 0 };
	struct desc d, old;

	task_check_desc(c, sel, reason, &d);
	t.t32 = desc_type(&d) & 8;
	mem_read_sys(c, desc_base32(&d), b, t.t32 ? 0x68 : 0x2c);
	if (t.t32)
		task_parse32(&t, b);
	else
		task_parse16(&t, b);
	if (tr->unusable || tr->limit < (tr->type & 8 ? 0x67u : 0x2bu))
		cpu_raise_err(c, EXC_TS, sel_err(tr->sel));
	desc_fetch(c, tr->sel, EXC_TS, &old);
	task_save(c, (uint32_t)(reason == TASK_IRET ? flags & ~(uint64_t)FL_NT : flags));
	if (reason == TASK_CALL || reason == TASK_GATE)
		mem_write_sys(c, desc_base32(&d), &tr->sel, 2);
	if (reason == TASK_JMP || reason == TASK_IRET)
		desc_set_busy(c, &old, false);
	if (reason != TASK_IRET)
		desc_set_busy(c, &d, true);
	c->task_switched = true;
	task_commit(c, &t, &d, reason);
	task_finish(c, &t, reason, has_error, error);
}
