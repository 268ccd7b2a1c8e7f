/* Delivery of events through IVT and IDT in every mode; double and triple faults (SDM vol. 3 ch. 6). */
#include "softkvm/sys/sysint.h"


static bool is_soft(const struct event *e) { return e->type == EV_SOFT || e->type == EV_SOFT_EXC; }

_Noreturn void event_soft_int(struct cpu *c, uint8_t vector, int type)
{
	c->ev = (struct event){ .valid = true, .vector = vector, .type = type, .insn_len = c->cur->len };
	cpu_unwind(c, UNWIND_EVENT);
}

/*
 * RF in the pushed image: set by faults, but for instruction breakpoints, and by whatever comes between two iterations of a
 * repeated string instruction (SDM vol. 3 17.3.1.1); not by INT n, INT3 and INTO, which are complete and so have cleared it.
 */
static uint64_t pushed_flags(const struct cpu *c, const struct event *e)
{
	uint64_t fl = cpu_get_rflags(c);

	if (is_soft(e) || e->type == EV_PRIV_SOFT_EXC)
		fl &= ~(uint64_t)FL_RF;
	if (e->type == EV_EXC && e->vector != EXC_DB && e->vector != EXC_BP && e->vector != EXC_OF)
		fl |= FL_RF;
	if (cpu_mid_rep(c))
		fl |= FL_RF;
	return fl;
}

/* -- real mode and VME redirection ------------------------------------------------------------- */
static void deliver_real(struct cpu *c, const struct event *e)
{
	uint64_t v[3] = { cpu_get_rflags(c), c->seg[SEG_CS].sel, c->rip };
	uint64_t lin = (c->vm86 ? 0 : c->idt.base) + e->vector * 4u;
	uint16_t vec[2];

	if (!c->vm86 && e->vector * 4u + 3 > c->idt.limit)
		cpu_gp(c, e->vector * 8u + 2);
	if (c->vm86)
		mem_read(c, lin, vec, 4);
	else
		mem_read_sys(c, (uint32_t)lin, vec, 4);
	if (c->vm86 && cpu_iopl(c) < 3) {
		v[0] = (v[0] & ~(uint64_t)FL_IF) | FL_IOPL;
		if (c->eflags & FL_VIF)
			v[0] |= FL_IF;
	}
	stack_push_n(c, v, 3, 2);
	seg_set_real(c, SEG_CS, vec[1]);
	c->rip = vec[0];
	if (c->vm86 && cpu_iopl(c) < 3)
		cpu_set_rflags(c, cpu_get_rflags(c) & ~(uint64_t)(FL_TF | FL_RF | FL_NT | FL_VIF));
	else
		cpu_set_rflags(c, cpu_get_rflags(c) & ~(uint64_t)(FL_TF | FL_RF | FL_IF | (c->vm86 ? FL_NT : FL_AC)));
	cpu_update_mode(c);
}

bool vme_redirected(struct cpu *c, unsigned vector)
{
	const struct seg *tr = &c->seg[SEG_TR];
	uint16_t map;
	uint8_t b;

	if (!c->vm86 || !(c->cr4 & CR4_VME))
		return false;
	if (tr->limit < 103)
		cpu_gp(c, 0);
	mem_read_sys(c, (uint32_t)(tr->base + 102), &map, 2);
	if (map < 32 || map - 32u + vector / 8 > tr->limit)
		cpu_gp(c, 0);
	mem_read_sys(c, (uint32_t)(tr->base + map - 32 + vector / 8), &b, 1);
	return !(b >> (vector & 7) & 1);
}

/* -- gates ------------------------------------------------------------------------------------ */
static void read_gate(struct cpu *c, const struct event *e, struct desc *g)
{
	unsigned size = cpu_long(c) ? 16 : 8, off = e->vector * size, t;
	uint32_t err = e->vector * 8u + 2;

	if (off + size - 1 > c->idt.limit)
		cpu_gp(c, err);
	*g = (struct desc){ .lin = c->idt.base + off };
	if (!cpu_long(c))
		g->lin = (uint32_t)g->lin;
	mem_read_sys(c, g->lin, &g->raw, 8);
	if (cpu_long(c))
		mem_read_sys(c, g->lin + 8, &g->hi, 8);
	t = desc_type(g);
	if (desc_s(g) || !(t == SYS_INT32 || t == SYS_TRAP32 ||
			   (!cpu_long(c) && (t == SYS_INT16 || t == SYS_TRAP16 || t == SYS_TASK_GATE))))
		cpu_gp(c, err);
	if (is_soft(e) && desc_dpl(g) < c->cpl)
		cpu_gp(c, err);
	if (!desc_present(g))
		cpu_raise_err(c, EXC_NP, err);
}

static void check_target(struct cpu *c, uint16_t sel, struct desc *d)
{
	if (sel_null(sel))
		cpu_gp(c, 0);
	desc_fetch(c, sel, EXC_GP, d);
	if (!desc_code(d) || desc_dpl(d) > c->cpl || (cpu_long(c) && (!desc_l(d) || desc_db(d))))
		cpu_gp(c, sel_err(sel));
	if (!desc_present(d))
		cpu_raise_err(c, EXC_NP, sel_err(sel));
	if (c->vm86 && (desc_conforming(d) || desc_dpl(d)))
		cpu_gp(c, sel_err(sel));
}

/* The stack the handler runs on: *switched when SS:(R)SP are pushed because of a change of rings. */
static void choose_stack(struct cpu *c, const struct desc *gate, unsigned cpl, struct nstack *ns)
{
	unsigned ist = cpu_long(c) ? gate->raw >> 32 & 7 : 0;

	if (ist) {
		const struct seg *tr = &c->seg[SEG_TR];

		*ns = (struct nstack){ .cpl = cpl, .is64 = true };
		if (0x1c + ist * 8 + 7 > tr->limit)
			cpu_raise_err(c, EXC_TS, sel_err(tr->sel));
		mem_read_sys(c, tr->base + 0x1c + ist * 8, &ns->sp, 8);
		if (cpl == c->cpl) {
			ns->ss = c->seg[SEG_SS];
		} else {
			seg_null(&ns->ss, (uint16_t)cpl);
			ns->ss.dpl = (uint8_t)cpl;
		}
	} else if (cpl < c->cpl) {
		nstack_from_tss(c, ns, cpl);
	} else {
		*ns = (struct nstack){ .ss = c->seg[SEG_SS], .sp = c->gpr[R_RSP], .cpl = cpl, .is64 = cpu_long(c) };
	}
	if (cpu_long(c))
		ns->sp &= ~15ull;
}

static void push_frame(struct cpu *c, const struct event *e, struct nstack *ns, unsigned size, bool with_ss)
{
	if (c->vm86) {
		nstack_push(c, ns, c->seg[SEG_GS].sel, size);
		nstack_push(c, ns, c->seg[SEG_FS].sel, size);
		nstack_push(c, ns, c->seg[SEG_DS].sel, size);
		nstack_push(c, ns, c->seg[SEG_ES].sel, size);
	}
	if (with_ss) {
		nstack_push(c, ns, c->seg[SEG_SS].sel, size);
		nstack_push(c, ns, c->gpr[R_RSP], size);
	}
	nstack_push(c, ns, pushed_flags(c, e), size);
	nstack_push(c, ns, c->seg[SEG_CS].sel, size);
	nstack_push(c, ns, c->rip, size);
	if (e->has_error)
		nstack_push(c, ns, e->error, size);
}

static void deliver_gate(struct cpu *c, const struct event *e, struct desc *gate)
{
	uint64_t off = (gate->raw & 0xffff) | (desc_type(gate) & 8 ? gate->raw >> 32 & 0xffff0000 : 0) | gate->hi << 32;
	unsigned size = cpu_long(c) ? 8 : desc_type(gate) & 8 ? 4 : 2, cpl;
	uint64_t clear = FL_TF | FL_NT | FL_RF | FL_VM;
	struct nstack ns;
	struct desc d;

	check_target(c, (uint16_t)(gate->raw >> 16), &d);
	cpl = desc_conforming(&d) ? c->cpl : desc_dpl(&d);
	choose_stack(c, gate, cpl, &ns);
	push_frame(c, e, &ns, size, cpl < c->cpl || cpu_long(c));
	off = code_check_ip(c, &d, off);
	desc_set_accessed(c, &d);
	/* Nothing below can fault. */
	if (c->vm86)
		for (unsigned k = SEG_DS; k <= SEG_GS; k++)
			seg_null(&c->seg[k], 0);
	if (c->vm86)
		seg_null(&c->seg[SEG_ES], 0);
	nstack_commit(c, &ns);
	cs_commit(c, &d, cpl, off);
	if (!(desc_type(gate) & 1))
		clear |= FL_IF;
	cpu_set_rflags(c, cpu_get_rflags(c) & ~clear);
	cpu_update_mode(c);
}

static void deliver_one(struct cpu *c, const struct event *e)
{
	struct desc gate;

	if (c->real || (e->type == EV_SOFT && vme_redirected(c, e->vector))) {
		deliver_real(c, e);
		return;
	}
	if (e->type == EV_SOFT && c->vm86 && cpu_iopl(c) < 3)
		cpu_gp(c, 0);
	read_gate(c, e, &gate);
	if (desc_type(&gate) == SYS_TASK_GATE)
		task_switch(c, (uint16_t)(gate.raw >> 16), TASK_GATE, e->has_error, e->error);
	else
		deliver_gate(c, e, &gate);
}

/* -- combining faults ------------------------------------------------------------------------- */
static int deliver_try(struct cpu *c, const struct event *e)
{
	int why = _setjmp(c->unwind);

	if (why)
		return why;
	deliver_one(c, e);
	return 0;
}

enum { BENIGN, CONTRIBUTORY, PAGE_FAULT, DOUBLE };

static int fault_class(const struct event *e)
{
	if (e->type != EV_EXC)
		return BENIGN;
	switch (e->vector) {
	case EXC_DE: case EXC_TS: case EXC_NP: case EXC_SS: case EXC_GP: case EXC_CP:
		return CONTRIBUTORY;
	case EXC_PF: case EXC_VE:
		return PAGE_FAULT;
	case EXC_DF:
		return DOUBLE;
	default:
		return BENIGN;
	}
}

/* The fault in cpu->ev was met while `first` was being delivered. False: triple fault. */
static bool combine(struct cpu *c, const struct event *first)
{
	int a = fault_class(first), b = fault_class(&c->ev);

	if (a == DOUBLE)
		return false;
	if ((a == CONTRIBUTORY && b == CONTRIBUTORY) || (a == PAGE_FAULT && b != BENIGN)) {
		if (c->ev.vector == EXC_PF && c->ev.has_payload)
			c->cr2 = c->ev.payload;
		c->ev = (struct event){ .valid = true, .vector = EXC_DF, .type = EV_EXC, .has_error = !c->real };
	} else if (!is_soft(first) && c->ev.has_error && c->ev.vector >= EXC_TS && c->ev.vector <= EXC_GP) {
		c->ev.error |= 1;       /* EXT: not the program's own doing */
	}
	return true;
}

void event_db_payload(struct cpu *c, uint64_t payload)
{
	c->dr[6] = (c->dr[6] & ~(uint64_t)DR6_TRAPS) | DR6_FIXED | payload;
}

/* What an exception changes before it is delivered. */
static void apply_payload(struct cpu *c, struct event *e)
{
	if (e->type != EV_EXC)
		return;
	if (e->vector == EXC_PF && e->has_payload) {
		c->cr2 = e->payload;
	} else if (e->vector == EXC_DB) {
		if (e->has_payload)
			event_db_payload(c, e->payload);
		if (c->dr[7] & (1 << 13)) {
			c->dr[7] &= ~(1ull << 13);
			debug_update(c);
		}
	}
	e->has_payload = false;
}

/* Guest debugging takes #DB and #BP: KVM_EXIT_DEBUG. */
static bool debug_exit(struct cpu *c, const struct event *e)
{
	struct kvm_debug_exit_arch *a = &c->run->debug.arch;
	bool db = e->type == EV_EXC && e->vector == EXC_DB, bp = e->type == EV_SOFT_EXC && e->vector == EXC_BP;

	if (!c->dbg.enabled || !((db && (c->dbg.step || c->dbg.hw_bp)) || (bp && c->dbg.sw_bp)))
		return false;
	if (bp)
		c->rip -= e->insn_len;
	memset(a, 0, sizeof *a);
	a->exception = e->vector;
	a->pc = c->flat ? c->rip : (uint32_t)(c->seg[SEG_CS].base + c->rip);
	if (db) {
		a->dr6 = DR6_FIXED | (e->has_payload ? e->payload : 0);
		a->dr7 = c->dbg.hw_bp ? c->dbg.dr7 : c->dr[7];
	}
	c->run->exit_reason = KVM_EXIT_DEBUG;
	c->ev.valid = false;
	return true;
}

static void delivered(struct cpu *c, const struct event *e)
{
	c->ev.valid = c->ev_pending = false;
	c->halted = c->rep_begun = false;
	c->shadow = 0;
	if (e->type == EV_NMI)
		c->nmi_masked = true;
	if (e->type == EV_EXT)
		c->stats.interrupts++;
	event_update_one_insn(c);
}

/* 1: delivered; 0: leave, kvm_run is filled in (the event is delivered, unless cpu->ev is still valid); -1: triple fault. */
static int deliver_all(struct cpu *c)
{
	for (;;) {
		struct event e = c->ev;
		int why;

		if (debug_exit(c, &e))
			return 0;
		apply_payload(c, &e);
		c->ev = e;
		c->task_switched = false;
		c->mmio.of_event = true;
		why = deliver_try(c, &e);
		if (why == UNWIND_RETRY) {
			c->mmio.replay = 0;
			c->ev = e;
			continue;
		}
		if (!why || why == UNWIND_LEAVE) {
			delivered(c, &e);
			return !mmio_commit(c); /* a stack in MMIO space: the frame is on its way */
		}
		if (why != UNWIND_EVENT) {      /* tables in MMIO space: the exit comes first, then all over again */
			c->ev = e;
			return 0;
		}
		mmio_reset(c);                  /* nothing of it has happened */
		if (!c->task_switched && e.insn_len && e.type != EV_EXC)
			c->rip -= e.insn_len;   /* the fault is the INT instruction's */
		if (!combine(c, &e))
			return -1;
	}
}

bool event_deliver(struct cpu *c)
{
	bool scope = c->in_unwind_scope;
	const struct insn *cur = c->cur;
	jmp_buf saved;
	int r;

	/* A fault overtakes traps its instruction had recorded, INT1 those that a MOV SS before it had held back. */
	if (c->ev.type == EV_EXC || c->ev.type == EV_PRIV_SOFT_EXC) {
		c->trap_db = false;
		c->trap_dr6 = 0;
	}
	memcpy(&saved, &c->unwind, sizeof saved);
	c->in_unwind_scope = true;
	c->cur = NULL;                  /* implicit accesses are nobody's operands */
	r = deliver_all(c);
	c->cur = cur;
	memcpy(&c->unwind, &saved, sizeof saved);
	c->in_unwind_scope = scope;
	if (r < 0) {
		c->ev.valid = c->ev_pending = false;
		c->run->exit_reason = KVM_EXIT_SHUTDOWN;
		return false;
	}
	return r > 0;
}
