/* Pieces of translated code: flags, addresses, TLB checks, cold paths, rewriting. */
#include <stdio.h>

#include "softkvm/jit/internal.h"

/* -- flags --------------------------------------------------------------------------------------- */
void gen_flags_save(struct tr *t)
{
	if (!t->in_host || t->in_mem)
		return;
	EM(&t->h, 0x9f, 0x0f, 0x90, 0xc0, 0x66);                /* lahf ; seto al ; mov [aflags], ax */
	em_op_abs(&t->h, false, 0x89, SA, &t->c->aflags);
	t->in_mem = true;
}

void gen_flags_load(struct tr *t)
{
	if (t->in_host)
		return;
	em_flags(&t->h, t->c);
	t->in_host = true;
}

static uint16_t live_before(const struct tinsn *i) { return i->tested | (i->live & ~i->killed); }

void gen_clobber(struct tr *t, unsigned n)
{
	if (live_before(&t->t[n]))
		gen_flags_save(t);
	t->in_host = false;
}

void gen_flags_after(struct tr *t, unsigned n)
{
	if (t->t[n].written) {
		t->in_host = true;
		t->in_mem = false;
	}
}

/* -- registers ----------------------------------------------------------------------------------- */
unsigned gen_get(struct tr *t, unsigned guest, unsigned scratch)
{
	if (t->map[guest] >= 0)
		return (unsigned)t->map[guest];
	em_load(&t->h, scratch, &t->c->gpr[guest]);
	return scratch;
}

void gen_put(struct tr *t, unsigned guest, unsigned host)
{
	if (t->map[guest] >= 0)
		em_mov(&t->h, (unsigned)t->map[guest], host);
	else
		em_store(&t->h, host, &t->c->gpr[guest]);
}

void gen_rip(struct em *e, struct tr *t, bool w, unsigned reg, uint64_t rip)
{
	int64_t off = (int64_t)(rip - (t->k->rip & ~4095ull));

	if (!t->k->page->moves) {
		em_imm(e, reg, w ? rip : (uint32_t)rip);
		return;
	}
	if (off != (int32_t)off)
		t->failed = true;
	em_load(e, reg, &t->k->page->lin);
	em_mem(e, w, 0x8d, reg, (int)reg, -1, 0, (int32_t)off);
}

/* -- addresses ----------------------------------------------------------------------------------- */
static const ZydisDecodedOperandMem *mem_operand(const struct tinsn *i)
{
	for (unsigned n = 0; n < i->z.operand_count; n++)
		if (i->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && (i->op[n].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM ||
								   i->op[n].encoding == ZYDIS_OPERAND_ENCODING_DISP16_32_64))
			return &i->op[n].mem;
	return NULL;
}

bool tr_seg_flat(const struct tr *t, unsigned seg)
{
	uint32_t ok = BM_FLAT | BM_SEG_DATA << seg;

	return seg != SEG_FS && seg != SEG_GS && (tr_64(t) || (seg != SEG_CS && (t->k->mode & ok) == ok));
}

/* ST from an offset in the segment to a linear address. `k` gets what is beyond a limit. False: its handler knows. */
static bool gen_segment(struct tr *t, struct cold *k, unsigned seg, unsigned size)
{
	const struct seg *s = &t->c->seg[seg];
	struct em *e = &t->h;

	if (tr_seg_flat(t, seg))
		return true;
	if (!tr_64(t)) {
		if (seg == SEG_CS || !(t->k->mode & BM_SEG_DATA << seg))
			return false;
		em_load32(e, SC, &s->limit);
		em_mem(e, true, 0x8d, SC, SC, -1, 0, 1 - (int32_t)size);        /* the highest offset: may be negative */
		EM(e, 0x49, 0x39, 0xcf);                                        /* cmp r15, rcx */
		cold_from(k, em_jcc(e, 15));                                    /* jg */
	}
	em_op_abs(e, tr_64(t), 0x03, ST, &s->base);
	return true;
}

/* ST = offset in its segment. */
static bool gen_address_at(struct tr *t, unsigned n, int64_t disp)
{
	const struct tinsn *i = &t->t[n];
	const ZydisDecodedOperandMem *m = mem_operand(i);
	int base = -1, index = -1;
	bool wide = i->z.address_width == 64;

	if (!m || (i->z.address_width != 64 && i->z.address_width != 32))
		return false;
	if (m->index != ZYDIS_REGISTER_NONE && ZydisRegisterGetClass(m->index) != ZYDIS_REGCLASS_GPR64 &&
	    ZydisRegisterGetClass(m->index) != ZYDIS_REGCLASS_GPR32)
		return false;
	if (m->base == ZYDIS_REGISTER_EIP)
		return false;
	if (m->base == ZYDIS_REGISTER_RIP) {
		gen_rip(&t->h, t, true, ST, tr_end(t, n) + (uint64_t)disp);
	} else {
		if (m->base != ZYDIS_REGISTER_NONE)
			base = (int)gen_get(t, insn_reg_off(m->base) / 8, SC);
		if (m->index != ZYDIS_REGISTER_NONE)
			index = (int)gen_get(t, insn_reg_off(m->index) / 8, ST);
		if (base < 0 && index < 0)
			em_imm(&t->h, ST, wide ? (uint64_t)disp : (uint32_t)disp);
		else if (wide && index < 0 && !disp)
			em_mov(&t->h, ST, (unsigned)base);
		else
			em_mem(&t->h, wide, 0x8d, ST, base, index,
			       m->scale == 8 ? 3 : m->scale == 4 ? 2 : m->scale == 2 ? 1 : 0, (int32_t)disp);
	}
	return true;
}

/* call thunk */
static void put_call(struct em *e, struct tr *t, uint32_t thunk)
{
	e8(e, 0xe8);
	e32(e, 0);
	if (!e->full)
		em_to(e->p - 4, t->j->rw + thunk);
}

void gen_call(struct tr *t, uint32_t thunk) { put_call(&t->h, t, thunk); }

void gen_call_check(struct tr *t, struct cold *k, uint32_t thunk)
{
	put_call(&t->h, t, thunk);
	gen_point_behind(t, k);
}

void gen_point_behind(struct tr *t, struct cold *k) { k->fill[k->nfills++] = (struct fill){ .point = (uint16_t)gen_point_check(t) }; }

/* In code that does not run much the check is called: what counts there is the room it takes. */
void gen_check(struct tr *t, struct cold *k, unsigned size, bool write)
{
	struct fill *f = &k->fill[k->nfills++];

	*f = (struct fill){ .order = (uint8_t)gen_order(size), .write = write };
	if (t->k->in_line)
		f->from = em_check(&t->h, write ? t->tlb->w : t->tlb->r, size, f->apart = t->apart);
	else
		put_call(&t->h, t, t->j->check[t->tlb_mode][write][f->order]);
	f->back = t->h.p;
	f->point = (uint16_t)gen_point_check(t);
}

bool gen_operand_at(struct tr *t, unsigned n, struct cold *k, int64_t disp, unsigned size, bool write)
{
	const ZydisDecodedOperandMem *m = mem_operand(&t->t[n]);

	if (m && hold_operand(t, n, k, disp, size, write)) {
		t->apart = false;
		return true;
	}
	if (!m || !gen_address_at(t, n, disp))
		return false;
	if (t->index)
		em_mem(&t->h, true, 0x8d, ST, ST, SA, 0, 0);
	if (!gen_segment(t, k, insn_seg(m->segment), size))
		return false;
	if (t->align) {
		EM(&t->h, 0x41, 0xf6, 0xc7);            /* test r15b, align ; jne */
		e8(&t->h, t->align);
		cold_from(k, em_jcc(&t->h, 5));
	}
	gen_check(t, k, size, write);
	return true;
}

bool gen_operand(struct tr *t, unsigned n, struct cold *k, unsigned size, bool write)
{
	const ZydisDecodedOperandMem *m = mem_operand(&t->t[n]);

	return m && gen_operand_at(t, n, k, m->disp.has_displacement ? m->disp.value : 0, size, write);
}

void gen_stack_at(struct tr *t, struct cold *k, unsigned size, bool write)
{
	gen_segment(t, k, SEG_SS, size);        /* block_mode_translates() */
	gen_check(t, k, size, write);
}

void gen_stack(struct tr *t, struct cold *k, int32_t d, unsigned size, bool write)
{
	if (hold_stack(t, k, d, size, write))
		return;
	em_mem(&t->h, tr_64(t), 0x8d, ST, H_R12, -1, 0, d);
	gen_stack_at(t, k, size, write);
}

/* -- cold paths ---------------------------------------------------------------------------------- */
struct cold *cold_new(struct tr *t, unsigned n, unsigned count)
{
	struct cold *k = &t->colds[t->ncold++];

	k->nfrom = k->nfills = 0;
	k->back = NULL;
	k->n = (uint8_t)n;
	k->count = (uint8_t)count;
	k->need = t->live;
	k->final = false;
	return k;
}

uint8_t tr_part_of(const struct tr *t, const struct block *b)
{
	unsigned p = 0;

	while (t->part[p].b != b)
		p++;
	return (uint8_t)p;
}

/* EFLAGS are the guest's afterwards, and so is aflags. */
static void call_handlers(struct em *e, struct tr *t, unsigned n, unsigned count, uint8_t need)
{
	struct jit_site *s = jit_arena(t->j, sizeof *s);
	const struct tinsn *ti = &t->t[n];

	if (!s) {
		t->failed = true;
		return;
	}
	*s = (struct jit_site){
		.code = (uint32_t)(uintptr_t)t->k, .part = tr_part_of(t, ti->b), .bytes = ti->b->bytes, .n = ti->b->n,
		.delta = (int16_t)(ti->rip - ti->in->off - t->k->rip),  /* both in one page */
		.first = (uint8_t)(ti->in - ti->b->insn), .count = (uint8_t)count, .need = need,
	};
	em_imm(e, H_RAX, (uintptr_t)s);
	put_call(e, t, t->thunks->call);
}

/* Most failures want an entry, no more. For others, jit_miss() finds the point by the jump behind the call. */
static void emit_fill(struct tr *t, const struct cold *k, const struct fill *f)
{
	struct jit_point *p = &t->points[f->point];
	struct em *e = &t->cold;

	p->n = k->n;
	p->count = k->count & 15;
	p->need = k->need;
	p->back = k->final ? 0 : (uint16_t)(k->back - (t->j->rw + t->k->hot));
	if (!f->from)
		return;
	em_here(e, f->from);
	put_call(e, t, t->j->miss[t->tlb_mode][f->write][f->order]);
	if (f->apart)
		EM(e, 0x31, 0xc9);      /* xor ecx, ecx */
	uint8_t *back = em_jmp(e);
	if (!e->full)
		em_to(back, f->back);
}

static void cold_emit(struct tr *t, const struct cold *k)
{
	struct em *e = &t->cold;

	for (unsigned n = 0; n < k->nfills; n++)
		emit_fill(t, k, &k->fill[n]);
	if (!k->nfrom)
		return;
	for (unsigned n = 0; n < k->nfrom; n++)
		em_here(e, k->from[n]);
	call_handlers(e, t, k->n, k->count, k->need);
	if (k->final)
		return;
	uint8_t *back = em_jmp(e);
	if (!e->full)
		em_to(back, k->back);
}

void gen_colds(struct tr *t);
void gen_colds(struct tr *t)
{
	for (unsigned n = 0; n < t->ncold; n++)
		if (t->colds[n].nfrom || t->colds[n].nfills)
			cold_emit(t, &t->colds[n]);
}

void gen_handler(struct tr *t, unsigned n)
{
	gen_flags_save(t);
	call_handlers(&t->h, t, n, 1, t->live);
	t->in_mem = t->in_host = true;
}

/*
 * The test is in the block, the call in its cold part; where that does not help (#NM, #UD, unmasked exceptions) the
 * instruction's handler knows why.
 */
void gen_live(struct tr *t, struct cold *k, unsigned bit)
{
	struct em *e = &t->cold;

	e8(&t->h, 0xf6);                                        /* test byte [vec_ok], bit ; jz */
	em_abs(&t->h, 0, &t->j->low->vec_ok);
	e8(&t->h, bit);
	em_here(e, em_jcc(&t->h, 4));
	em_imm(e, H_RAX, t->live | bit);
	put_call(e, t, t->thunks->live);
	e8(e, 0xf6);
	em_abs(e, 0, &t->j->low->vec_ok);
	e8(e, bit);
	uint8_t *back = em_jcc(e, 5);
	if (!e->full)
		em_to(back, t->h.p);
	cold_from(k, em_jmp(e));
}

/* -- leaving a block ------------------------------------------------------------------------------ */
/* Who is left by a link or at its entry need not say where: run_code() knows. */
static void leave_mapped(struct em *e, struct tr *t, uint64_t rip, const struct jit_link *l)
{
	if (l && !((uintptr_t)l & LEFT_BUDGET)) {
		;
	} else if (!t->k->page->moves && (int64_t)rip == (int32_t)rip) {
		em_op_abs(e, true, 0xc7, 0, &t->c->rip);
		e32(e, (uint32_t)rip);
	} else {
		gen_rip(e, t, true, H_RAX, rip);
		em_store(e, H_RAX, &t->c->rip);
	}
	em_imm(e, H_RAX, (uintptr_t)l);
	uint8_t *j = em_jmp(e);
	if (!e->full)
		em_to(j, t->j->rw + t->j->leave);
}

/* With registers where the map has them. */
void gen_leave(struct em *e, struct tr *t, uint64_t rip, const struct jit_link *l)
{
	if (t->mapped)
		map_out(e, t);
	leave_mapped(e, t, rip, l);
}

/* The jump is patched when the loop knows what it leads to: `jcc`'s, which is not in the cold part, or else one made here. */
static void leave_by_link(struct tr *t, uint64_t rip, uint8_t *jcc, bool behind_call)
{
	struct jit_link *l = jit_arena(t->j, sizeof *l);
	int64_t off = (int64_t)(rip - t->k->rip);
	struct em *e = &t->h;
	uint8_t *j;

	if (!l) {
		t->failed = true;
		return;
	}
	if (tr_64(t) && off != (int32_t)off)
		t->failed = true;
	*l = (struct jit_link){ .from = low_of(t->k), .rip = (int32_t)off, .next = t->k->links, .behind_call = behind_call };
	t->k->links = low_of(l);
	j = jcc ? jcc : em_jmp(e);
	if (!t->swapped)
		e = &t->cold;
	l->at = (uint32_t)(j - t->j->rw);
	l->unlinked = (uint32_t)(e->p - t->j->rw);
	em_here(e, j);
	if (t->k->map && !behind_call) {
		map_out(e, t);
		em_jmp(e);              /* jit_link_at2() */
	}
	leave_mapped(e, t, rip, l);
}

static void jump_to_part(struct tr *t, unsigned p, uint8_t *rel32)
{
	if (t->part[p].at) {
		if (!t->h.full)
			em_to(rel32, t->part[p].at);
	} else if (t->nfix == FIXUPS_MAX) {
		t->failed = true;
	} else {
		t->fix[t->nfix].rel32 = rel32;
		t->fix[t->nfix++].part = p;
	}
}

void gen_jcc_part(struct tr *t, unsigned p, unsigned cc) { jump_to_part(t, p, em_jcc(&t->h, cc)); }

/* The budget is used up: returns the jump that is taken if code may go on all the same. Keeps SA; the host's flags are not the guest's here. */
uint8_t *gen_look(struct em *e, struct tr *t)
{
	em_imm(e, ST, (uintptr_t)t->k);
	put_call(e, t, t->j->look);
	return em_jcc(e, 4);
}

void gen_charge(struct tr *t, struct cold *k, uint32_t n)
{
	uint8_t *over, *on;

	em_charge(&t->h, t->c, n);
	over = em_jcc(&t->h, 14);                               /* jle */
	em_here(&t->cold, over);
	on = gen_look(&t->cold, t);
	if (!t->cold.full)
		em_to(on, t->h.p);
	cold_from(k, em_jmp(&t->cold));
}

static void leave_budget(struct em *e, struct tr *t, uint64_t rip)
{
	gen_leave(e, t, rip, (const struct jit_link *)((uintptr_t)t->k | LEFT_BUDGET));
}

/* Returns the jump for the case that code may go on. */
static uint8_t *leave_here(struct tr *t, uint8_t *rel32, uint64_t rip)
{
	uint8_t *on;

	em_here(&t->cold, rel32);
	on = gen_look(&t->cold, t);
	leave_budget(&t->cold, t, rip);
	return on;
}

static void leave_or_go_on(struct tr *t, uint8_t *rel32, uint64_t rip)
{
	uint8_t *on = leave_here(t, rel32, rip);

	if (!t->cold.full)
		em_to(on, t->h.p);
}

/*
 * A jump back within the region counts the instructions: loops end when the budget does. One that leaves it needs to only where the region's own entry
 * does not count: where checks are in line.
 */
void gen_edge(struct tr *t, uint64_t rip, unsigned n, bool next)
{
	int p = tr_part(t, rip);
	struct em *e = &t->h;

	if (p >= 0 && next && (unsigned)p == t->now + 1 && rip > t->t[n].rip) {
		if (t->part[p].label && t->part[p].live)
			gen_flags_save(t);
		return;
	}
	if (p >= 0 ? t->part[p].live : !flags_dead_at(t, rip))
		gen_flags_save(t);
	if (rip <= t->t[n].rip && (p >= 0 || t->k->in_line)) {
		em_charge(e, t->c, p >= 0 && t->part[p].first <= n ? n + 1 - t->part[p].first : tr_count(t, n));
		t->in_host = false;
		if (p >= 0 && !(next && (unsigned)p == t->now + 1)) {
			jump_to_part(t, (unsigned)p, em_jcc(e, 15));    /* jg */
			jump_to_part(t, (unsigned)p, leave_here(t, em_jmp(e), rip));
			return;
		}
		if (t->swapped) {
			uint8_t *on = em_jcc(e, 15), *too = gen_look(e, t);

			leave_budget(e, t, rip);
			em_here(e, on);
			em_here(e, too);
		} else {
			leave_or_go_on(t, em_jcc(e, 14), rip);  /* jle */
		}
		if (p >= 0)
			return;
	}
	if (p >= 0)
		jump_to_part(t, (unsigned)p, em_jmp(e));
	else
		leave_by_link(t, rip, NULL, false);
}

void gen_call_edge(struct tr *t, uint64_t rip, unsigned n)
{
	int p = tr_part(t, rip);
	uint8_t *rel32;

	if (rip <= t->t[n].rip && (p >= 0 || t->k->in_line)) {
		em_charge(&t->h, t->c, tr_count(t, n));
		leave_or_go_on(t, em_jcc(&t->h, 14), rip);      /* jle */
	}
	rel32 = em_call(&t->h);
	if (p >= 0)
		jump_to_part(t, (unsigned)p, rel32);
	else
		leave_by_link(t, rip, rel32, false);
}

void gen_return_edge(struct tr *t, unsigned n) { leave_by_link(t, tr_end(t, n), NULL, true); }

bool gen_jcc_link(struct tr *t, unsigned n, unsigned cc, uint64_t rip)
{
	if ((t->k->in_line && rip <= t->t[n].rip) || tr_part(t, rip) >= 0 || (t->in_host && !t->in_mem && !flags_dead_at(t, rip)))
		return false;
	leave_by_link(t, rip, em_jcc(&t->h, cc), false);
	return true;
}

/* -- rewriting ------------------------------------------------------------------------------------ */
/* modrm and what follows it: the immediate. */
static void put_tail(struct em *e, const struct tinsn *i, const uint8_t *bytes, struct regs r, int8_t disp)
{
	unsigned end = i->z.length;

	if (i->z.attributes & ZYDIS_ATTRIB_HAS_MODRM) {
		uint8_t m = bytes[i->z.raw.modrm.offset];

		if (r.reg >= 0)
			m = (uint8_t)((m & 0xc7) | (r.reg & 7) << 3);
		if (r.mem)
			m = (uint8_t)((m & 0x38) | (r.apart ? 4 : 7) | (disp ? 0x40 : 0));
		else if (r.rm >= 0)
			m = (uint8_t)((m & 0xf8) | (r.rm & 7));
		e8(e, m);
		if (r.apart)
			e8(e, SC << 3 | (ST & 7));
		if (r.mem && disp)
			e8(e, (uint8_t)disp);
	}
	for (unsigned k = 0; k < 2; k++)
		if (i->z.raw.imm[k].size)
			end = MIN(end, (unsigned)i->z.raw.imm[k].offset);
	if (!i->z.raw.imm[0].size && !i->z.raw.imm[1].size)
		return;
	for (; end < i->z.length; end++)
		e8(e, bytes[end]);
}

/* INC and DEC as 32-bit code has them: the opcodes are prefixes in 64-bit code. */
static void put_inc(struct em *e, bool o16, unsigned opcode, unsigned reg)
{
	if (o16)
		e8(e, 0x66);
	e8(e, 0x40 | reg >> 3);
	e8(e, 0xff);
	e8(e, 0xc0 | (opcode & 8) | (reg & 7));
}

static bool put_legacy(struct em *e, const struct tinsn *i, const uint8_t *bytes, struct regs r, int8_t disp)
{
	const ZydisDecodedInstruction *z = &i->z;
	unsigned rex = 0x40 | z->raw.rex.W << 3 | z->raw.rex.R << 2 | z->raw.rex.X << 1 | z->raw.rex.B;
	unsigned opcode = z->opcode;
	bool lock = z->attributes & ZYDIS_ATTRIB_HAS_LOCK;

	if (z->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (opcode & 0xf0) == 0x40) {
		put_inc(e, z->operand_width == 16, opcode, (unsigned)r.op);
		return r.op >= 0;
	}
	if (z->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && opcode == 0x82)
		opcode = 0x80;          /* the same, and not in 64-bit code */
	for (unsigned n = 0; n < z->raw.prefix_count; n++) {
		uint8_t b = z->raw.prefixes[n].value;

		if (b == 0x66 || b == 0xf0 || ((b == 0xf2 || b == 0xf3) && !lock && z->raw.prefixes[n].type != ZYDIS_PREFIX_TYPE_IGNORED &&
					       z->mnemonic != ZYDIS_MNEMONIC_XCHG))
			e8(e, b);
	}
	if (r.reg >= 0)
		rex = (rex & ~4u) | (unsigned)(r.reg >> 3) << 2;
	if (r.mem)
		rex = (rex & ~3u) | 1;
	else if (r.rm >= 0)
		rex = (rex & ~3u) | (unsigned)r.rm >> 3;
	if (r.op >= 0) {
		rex = (rex & ~3u) | (unsigned)r.op >> 3;
		opcode = (opcode & 0xf8) | (r.op & 7);
	}
	e8(e, rex);
	switch (z->opcode_map) {
	case ZYDIS_OPCODE_MAP_DEFAULT: break;
	case ZYDIS_OPCODE_MAP_0F: e8(e, 0x0f); break;
	case ZYDIS_OPCODE_MAP_0F38: e8(e, 0x0f); e8(e, 0x38); break;
	case ZYDIS_OPCODE_MAP_0F3A: e8(e, 0x0f); e8(e, 0x3a); break;
	default: return false;
	}
	e8(e, opcode);
	put_tail(e, i, bytes, r, disp);
	return true;
}

static bool put_vex(struct em *e, const struct tinsn *i, const uint8_t *bytes, struct regs r, int8_t disp)
{
	const uint8_t *v = bytes + i->z.raw.vex.offset;
	unsigned b1, b2;

	if (v[0] == 0xc5) {
		b1 = (v[1] & 0x80) | 0x61;
		b2 = v[1] & 0x7f;
	} else if (v[0] == 0xc4) {
		b1 = v[1];
		b2 = v[2];
	} else {
		return false;
	}
	if (r.reg >= 0)
		b1 = (b1 & ~0x80u) | (r.reg >> 3 ? 0 : 0x80);
	if (r.mem)
		b1 = (b1 & ~0x60u) | 0x40;
	else if (r.rm >= 0)
		b1 = (b1 & ~0x60u) | 0x40 | (r.rm >> 3 ? 0 : 0x20);
	if (r.v >= 0)
		b2 = (b2 & ~0x78u) | (~(unsigned)r.v & 15) << 3;
	e8(e, 0xc4);
	e8(e, b1);
	e8(e, b2);
	e8(e, i->z.opcode);
	put_tail(e, i, bytes, r, disp);
	return true;
}

static bool put_evex(struct em *e, const struct tinsn *i, const uint8_t *bytes, struct regs r)
{
	const uint8_t *v = bytes + i->z.raw.evex.offset;
	unsigned p0 = v[1], p1 = v[2];

	if (r.reg >= 0)
		p0 = (p0 & ~0x90u) | 0x10 | (r.reg >> 3 ? 0 : 0x80);
	if (r.mem)
		p0 = (p0 & ~0x60u) | 0x40;
	else if (r.rm >= 0)
		p0 = (p0 & ~0x60u) | 0x40 | (r.rm >> 3 ? 0 : 0x20);
	if (r.v >= 0)
		return false;
	e8(e, 0x62);
	e8(e, p0);
	e8(e, p1);
	e8(e, v[3]);
	e8(e, i->z.opcode);
	put_tail(e, i, bytes, r, 0);
	return true;
}

/*
 * 32-bit code has eight registers: it ignores what would name others, and W where that would choose a 64-bit integer. No
 * compiler makes those: the handler knows what they mean.
 */
static bool ignored_bits(const struct tinsn *i, const uint8_t *bytes, struct regs r)
{
	bool evex = i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX, gpr = r.reg >= 0 || r.rm >= 0 || r.v >= 0;
	const uint8_t *v = bytes + (evex ? i->z.raw.evex.offset : i->z.raw.vex.offset);
	unsigned p1 = v[1], p2 = v[2];

	for (unsigned n = 0; n < i->z.operand_count_visible; n++) {
		if (i->op[n].encoding == ZYDIS_OPERAND_ENCODING_IS4)
			return true;
		gpr |= i->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && i->op[n].size == 32;
	}
	if (v[0] == 0xc5)
		return (p1 & 0xc0) != 0xc0;
	return (p1 & (evex ? 0xf0 : 0xe0)) != (evex ? 0xf0 : 0xe0) || !(p2 & 0x40) || (evex && !(v[3] & 8)) || ((p2 & 0x80) && gpr);
}

bool gen_rewrite(struct tr *t, const struct tinsn *i, const uint8_t *bytes, struct regs r)
{
	if (!tr_64(t) && i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY && ignored_bits(i, bytes, r))
		return false;
	if (r.mem || i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || i->z.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT)
		gen_point(t, (unsigned)(i - t->t));
	switch (i->z.encoding) {
	case ZYDIS_INSTRUCTION_ENCODING_LEGACY: return put_legacy(&t->h, i, bytes, r, t->mem_disp);
	case ZYDIS_INSTRUCTION_ENCODING_VEX: return put_vex(&t->h, i, bytes, r, t->mem_disp);
	case ZYDIS_INSTRUCTION_ENCODING_EVEX: return put_evex(&t->h, i, bytes, r);
	default: return false;
	}
}
