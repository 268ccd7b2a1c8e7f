/* Segment registers: descriptor loading and checks, limits, and what follows from CS and SS (SDM vol. 3 ch. 3, 5). */
#include "softkvm/sys/sysint.h"

uint32_t desc_limit(const struct desc *d)
{
	uint32_t l = (uint32_t)((d->raw & 0xffff) | (d->raw >> 32 & 0xf0000));

	return d->raw >> 55 & 1 ? l << 12 | 0xfff : l;
}

bool desc_try(struct cpu *c, uint16_t sel, struct desc *d)
{
	unsigned off = sel & 0xfff8;
	uint64_t base = c->gdt.base;
	uint32_t limit = c->gdt.limit;

	if (sel & 4) {
		if (c->seg[SEG_LDTR].unusable)
			return false;
		base = c->seg[SEG_LDTR].base;
		limit = c->seg[SEG_LDTR].limit;
	}
	if (off + 7 > limit)
		return false;
	d->lin = base + off;
	if (!cpu_long(c))
		d->lin = (uint32_t)d->lin;
	d->sel = sel;
	d->hi = 0;
	mem_read_sys(c, d->lin, &d->raw, 8);
	return true;
}

void desc_fetch(struct cpu *c, uint16_t sel, unsigned exc, struct desc *d)
{
	if (!desc_try(c, sel, d))
		cpu_raise_err(c, exc, sel_err(sel));
}

void desc_fetch_hi(struct cpu *c, struct desc *d, unsigned exc)
{
	uint32_t limit = d->sel & 4 ? c->seg[SEG_LDTR].limit : c->gdt.limit;

	if ((d->sel & 0xfff8u) + 15 > limit)
		cpu_raise_err(c, exc, sel_err(d->sel));
	mem_read_sys(c, d->lin + 8, &d->hi, 8);
}

/* Change bits of the access byte under the lock that every processor's locked accesses honour. */
static void desc_update(struct cpu *c, struct desc *d, uint8_t set, uint8_t clear)
{
	uint8_t b;

	mem_lock(c);
	mem_read_sys(c, d->lin + 5, &b, 1);
	b = (uint8_t)((b | set) & ~clear);
	mem_write_sys(c, d->lin + 5, &b, 1);
	mem_unlock(c);
	d->raw = (d->raw & ~(0xffull << 40)) | (uint64_t)b << 40;
}

void desc_set_accessed(struct cpu *c, struct desc *d)
{
	if (!(d->raw >> 40 & 1))
		desc_update(c, d, 1, 0);
}

void desc_set_busy(struct cpu *c, struct desc *d, bool busy)
{
	desc_update(c, d, busy ? 2 : 0, busy ? 0 : 2);
}

void seg_from_desc(struct seg *s, const struct desc *d)
{
	*s = (struct seg){
		.base = desc_base32(d), .limit = desc_limit(d), .sel = d->sel, .type = (uint8_t)desc_type(d), .s = desc_s(d),
		.dpl = (uint8_t)desc_dpl(d), .present = desc_present(d), .avl = d->raw >> 52 & 1, .l = desc_l(d),
		.db = desc_db(d), .g = d->raw >> 55 & 1,
	};
}

void seg_null(struct seg *s, uint16_t sel)
{
	*s = (struct seg){ .sel = sel, .unusable = true, .dpl = sel & 3 };
}

void seg_flat(struct seg *s, uint16_t sel, bool code, unsigned dpl, bool l)
{
	*s = (struct seg){ .limit = 0xffffffff, .sel = sel, .type = code ? 11 : 3, .s = 1, .dpl = (uint8_t)dpl, .present = 1,
			   .l = l, .db = !l, .g = 1 };
}

bool seg_range_ok(const struct seg *s, uint64_t off, unsigned size)
{
	uint64_t last = off + size - 1;

	if (s->s && (s->type & 12) == 4)        /* expand-down data */
		return off > s->limit && last <= (s->db ? 0xffffffffu : 0xffffu);
	return last <= s->limit;
}

static bool seg_type_ok(const struct seg *s, enum access acc)
{
	if (s->unusable)
		return false;
	if (acc == ACC_READ)
		return !(s->type & 8) || (s->type & 2);
	if (acc == ACC_EXEC)
		return true;
	return (s->type & 10) == 2;
}

uint64_t seg_lin(struct cpu *c, unsigned seg, uint64_t off, unsigned size, enum access acc)
{
	const struct seg *s = &c->seg[seg];

	if (c->flat)
		return seg == SEG_FS || seg == SEG_GS ? s->base + off : off;
	off = (uint32_t)off;
	if ((!c->real && !c->vm86 && !seg_type_ok(s, acc)) || !seg_range_ok(s, off, size))
		cpu_raise_err(c, seg == SEG_SS ? EXC_SS : EXC_GP, 0);
	return (uint32_t)(s->base + off);
}

void cpu_update_mode(struct cpu *c)
{
	const struct seg *cs = &c->seg[SEG_CS], *ss = &c->seg[SEG_SS];

	c->real = !(c->cr0 & CR0_PE);
	c->vm86 = !c->real && (c->eflags & FL_VM);
	c->flat = cpu_long(c) && cs->l && !c->vm86;
	c->code_bits = c->flat ? 64 : cs->db ? 32 : 16;
	c->stack_bits = c->flat ? 64 : ss->db ? 32 : 16;
	c->cpl = c->real ? 0 : c->vm86 ? 3 : ss->dpl;
	mmu_select(c);
	event_update_one_insn(c);
}

void cpu_set_rflags(struct cpu *c, uint64_t fl)
{
	uint32_t old = c->eflags;

	c->aflags = aflags_from(fl);
	c->eflags = (uint32_t)fl & 0x3f7700;
	c->step.rf = false;     /* an RF that this instruction loads is for the next */
	if ((old ^ c->eflags) & (FL_AC | FL_VM))
		cpu_update_mode(c);
	if ((c->eflags & ~old & FL_IF) && c->irq_blocked)
		event_unblocked(c);
	event_update_one_insn(c);
}

/* -- loading ---------------------------------------------------------------------------------- */
void seg_set_real(struct cpu *c, unsigned seg, uint16_t sel)
{
	struct seg *s = &c->seg[seg];

	/* Real mode changes selector and base only: limits and attributes stay ("unreal" mode). */
	if ((c->cr0 & CR0_PE) || s->unusable)
		*s = (struct seg){ .limit = 0xffff, .type = 3, .s = 1, .present = 1, .dpl = c->cr0 & CR0_PE ? 3 : 0 };
	s->sel = sel;
	s->base = (uint32_t)sel << 4;
}

void seg_check_data(struct cpu *c, uint16_t sel, const struct desc *d, unsigned cpl)
{
	unsigned t = desc_type(d);

	if (!desc_s(d) || (t & 10) == 8)
		cpu_gp(c, sel_err(sel));
	if ((t & 12) != 12 && MAX(sel & 3u, cpl) > desc_dpl(d))
		cpu_gp(c, sel_err(sel));
	if (!desc_present(d))
		cpu_raise_err(c, EXC_NP, sel_err(sel));
}

void seg_check_ss(struct cpu *c, uint16_t sel, const struct desc *d, unsigned cpl, unsigned exc)
{
	if ((sel & 3u) != cpl || !desc_data_writable(d) || desc_dpl(d) != cpl)
		cpu_raise_err(c, exc, sel_err(sel));
	if (!desc_present(d))
		cpu_raise_err(c, EXC_SS, sel_err(sel));
}

static void seg_load_ss(struct cpu *c, uint16_t sel)
{
	struct desc d;

	if (sel_null(sel)) {
		if (c->code_bits != 64 || c->cpl == 3 || (sel & 3) != c->cpl)
			cpu_gp(c, 0);
		seg_null(&c->seg[SEG_SS], sel);
		c->seg[SEG_SS].dpl = c->cpl;
		return;
	}
	desc_fetch(c, sel, EXC_GP, &d);
	seg_check_ss(c, sel, &d, c->cpl, EXC_GP);
	desc_set_accessed(c, &d);
	seg_from_desc(&c->seg[SEG_SS], &d);
}

void seg_load(struct cpu *c, unsigned seg, uint16_t sel)
{
	struct desc d;

	if (c->real || c->vm86) {
		seg_set_real(c, seg, sel);
	} else if (seg == SEG_SS) {
		seg_load_ss(c, sel);
	} else if (sel_null(sel)) {
		seg_null(&c->seg[seg], sel);
	} else {
		desc_fetch(c, sel, EXC_GP, &d);
		seg_check_data(c, sel, &d, c->cpl);
		desc_set_accessed(c, &d);
		seg_from_desc(&c->seg[seg], &d);
	}
	if (seg == SEG_SS)
		cpu_update_mode(c);
}

void seg_null_inner(struct cpu *c, unsigned cpl)
{
	static const uint8_t data[] = { SEG_ES, SEG_DS, SEG_FS, SEG_GS };

	for (unsigned i = 0; i < ARRAY_SIZE(data); i++) {
		struct seg *s = &c->seg[data[i]];

		if (!s->unusable && s->dpl < cpl && (s->type & 12) != 12)
			seg_null(s, 0);
	}
}

/* -- struct kvm_segment ----------------------------------------------------------------------- */
void seg_from_kvm(struct seg *s, const struct kvm_segment *k)
{
	*s = (struct seg){
		.base = k->base, .limit = k->limit, .sel = k->selector, .type = k->type & 15, .s = k->s & 1, .dpl = k->dpl & 3,
		.present = k->present & 1, .avl = k->avl & 1, .l = k->l & 1, .db = k->db & 1, .g = k->g & 1,
		.unusable = k->unusable || !k->present,
	};
}

void seg_to_kvm(struct kvm_segment *k, const struct seg *s)
{
	*k = (struct kvm_segment){
		.base = s->base, .limit = s->limit, .selector = s->sel, .type = s->type, .present = s->present, .dpl = s->dpl,
		.db = s->db, .s = s->s, .l = s->l, .g = s->g, .avl = s->avl, .unusable = s->unusable,
	};
}

/* -- code ------------------------------------------------------------------------------------- */
uint64_t code_check_ip(struct cpu *c, const struct desc *cs, uint64_t ip)
{
	if (desc_is_64(c, cs)) {
		if (!cpu_canonical(c, ip))
			cpu_gp(c, 0);
		return ip;
	}
	ip = (uint32_t)ip;
	if (ip > desc_limit(cs))
		cpu_gp(c, 0);
	return ip;
}

void cs_commit(struct cpu *c, struct desc *d, unsigned cpl, uint64_t ip)
{
	seg_from_desc(&c->seg[SEG_CS], d);
	c->seg[SEG_CS].sel = (uint16_t)((d->sel & ~3u) | cpl);
	c->rip = ip;
}

/* -- stacks ----------------------------------------------------------------------------------- */
uint64_t stack_lin(struct cpu *c, uint64_t off, unsigned size, enum access acc)
{
	off &= stack_mask(c);
	if (c->flat) {
		if (!cpu_canonical(c, off) || !cpu_canonical(c, off + size - 1))
			cpu_raise_err(c, EXC_SS, 0);
		return off;
	}
	return seg_lin(c, SEG_SS, off, size, acc);
}

void stack_set_sp(struct cpu *c, uint64_t sp)
{
	if (c->stack_bits == 16)
		c->gpr[R_RSP] = (c->gpr[R_RSP] & ~0xffffull) | (sp & 0xffff);
	else
		c->gpr[R_RSP] = sp & stack_mask(c);
}

uint64_t stack_peek(struct cpu *c, uint64_t delta, unsigned size)
{
	uint64_t v = 0;

	mem_read(c, stack_lin(c, c->gpr[R_RSP] + delta, size, ACC_READ), &v, size);
	return v;
}

void stack_push_n(struct cpu *c, const uint64_t *v, unsigned n, unsigned size)
{
	uint64_t sp = c->gpr[R_RSP];

	for (unsigned i = 0; i < n; i++) {
		sp -= size;
		mem_write(c, stack_lin(c, sp, size, ACC_WRITE), &v[i], size);
	}
	stack_set_sp(c, sp);
}

/* Word at `off` of the current TSS. */
static uint64_t tss_read(struct cpu *c, unsigned off, unsigned size)
{
	const struct seg *tr = &c->seg[SEG_TR];
	uint64_t v = 0, lin = tr->base + off;

	if (off + size - 1 > tr->limit)
		cpu_raise_err(c, EXC_TS, sel_err(tr->sel));
	if (!cpu_long(c))
		lin = (uint32_t)lin;
	mem_read_sys(c, lin, &v, size);
	return v;
}

static void nstack_long(struct cpu *c, struct nstack *n, unsigned cpl)
{
	n->sp = tss_read(c, 4 + cpl * 8, 8);
	n->is64 = true;
	seg_null(&n->ss, (uint16_t)cpl);
	n->ss.dpl = (uint8_t)cpl;
}

void nstack_from_tss(struct cpu *c, struct nstack *n, unsigned cpl)
{
	bool tss32 = c->seg[SEG_TR].type & 8;
	uint16_t sel;

	memset(n, 0, sizeof *n);
	n->cpl = cpl;
	if (cpu_long(c)) {
		nstack_long(c, n, cpl);
		return;
	}
	if (tss32) {
		sel = (uint16_t)tss_read(c, 8 + cpl * 8, 2);
		n->sp = tss_read(c, 4 + cpl * 8, 4);
	} else {
		sel = (uint16_t)tss_read(c, 4 + cpl * 4, 2);
		n->sp = tss_read(c, 2 + cpl * 4, 2);
	}
	if (sel_null(sel))
		cpu_raise_err(c, EXC_TS, 0);
	desc_fetch(c, sel, EXC_TS, &n->d);
	seg_check_ss(c, sel, &n->d, cpl, EXC_TS);
	desc_set_accessed(c, &n->d);
	seg_from_desc(&n->ss, &n->d);
}

void nstack_push(struct cpu *c, struct nstack *n, uint64_t v, unsigned size)
{
	uint64_t sp = n->sp - size, off;

	if (n->is64) {
		if (!cpu_canonical(c, sp) || !cpu_canonical(c, sp + size - 1))
			cpu_raise_err(c, EXC_SS, 0);
		mem_write_cpl(c, n->cpl, sp, &v, size);
		n->sp = sp;
		return;
	}
	off = n->ss.db ? (uint32_t)sp : (uint16_t)sp;
	if (!seg_range_ok(&n->ss, off, size))
		cpu_raise_err(c, EXC_SS, n->cpl == c->cpl ? 0 : sel_err(n->ss.sel));
	mem_write_cpl(c, n->cpl, (uint32_t)(n->ss.base + off), &v, size);
	n->sp = n->ss.db ? (uint32_t)sp : (n->sp & ~0xffffull) | off;
}

void nstack_commit(struct cpu *c, struct nstack *n)
{
	c->seg[SEG_SS] = n->ss;
	if (!n->is64 && !n->ss.db)
		c->gpr[R_RSP] = (c->gpr[R_RSP] & ~0xffffull) | (uint16_t)n->sp;
	else
		c->gpr[R_RSP] = n->sp;
}
