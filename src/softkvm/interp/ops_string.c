/*
 * MOVS STOS LODS CMPS SCAS with their repeat prefixes.
 *
 * A repeated instruction works in runs: as many elements as lie in one page on each side are moved by the
 * host when both sides are plain RAM and the direction is up; everything else goes element by element. It stops
 * at a page, after a bounded number of elements, after MMIO and in single-step mode, leaves RCX, RSI and RDI as
 * the architecture has them there, and is executed again from its start, so interrupts come in between.
 */
#include "softkvm/interp/ops.h"

#define RUN_BYTES (64u << 10)   /* work per visit */
#define RUN_SLOW 256            /* elements one by one per visit */

enum str { S_MOVS, S_STOS, S_LODS, S_CMPS, S_SCAS };

static u64 mask_of(const struct insn *i)
{
	return i->flags & IF_A32 ? UINT32_MAX : i->flags & IF_A16 ? UINT16_MAX : UINT64_MAX;
}

static void add_reg(struct cpu *c, const struct insn *i, unsigned r, u64 delta)
{
	u64 m = mask_of(i), v = (c->gpr[r] + delta) & m;

	c->gpr[r] = m == UINT16_MAX ? (c->gpr[r] & ~m) | v : v;
}

static u64 src_lin(struct cpu *c, const struct insn *i, unsigned size)
{
	u64 o = c->gpr[R_RSI] & mask_of(i);

	if (c->flat)
		return i->seg == SEG_FS || i->seg == SEG_GS ? o + c->seg[i->seg].base : o;
	return seg_lin(c, i->seg, o, size, ACC_READ);
}

static u64 dst_lin(struct cpu *c, const struct insn *i, unsigned size, enum access acc)
{
	u64 o = c->gpr[R_RDI] & mask_of(i);

	return c->flat ? o : seg_lin(c, SEG_ES, o, size, acc);
}

static void set_acc(struct cpu *c, unsigned size, u64 v)
{
	if (size == 1)
		SET8(0, v);
	else if (size == 2)
		SET16(0, v);
	else
		SET64(0, v);
}

static void compare(struct cpu *c, unsigned size, u64 a, u64 b)
{
	u32 f;

#define CMP_AS(bits) __asm__("cmp" SFX##bits " %2, %1" FLAGS_OUT : "=&a"(f) : "r"((u##bits)a), "r"((u##bits)b) : "cc")
	if (size == 1)
		CMP_AS(8);
	else if (size == 2)
		CMP_AS(16);
	else if (size == 4)
		CMP_AS(32);
	else
		CMP_AS(64);
	c->aflags = (u16)f;
}

/* One element; registers move when nothing can fault any more. */
static void element(struct cpu *c, const struct insn *i, enum str op, unsigned size)
{
	u64 step = c->eflags & FL_DF ? (u64)-(s64)size : size, a, b;

	switch (op) {
	case S_MOVS:
		a = ops_ld_slow(c, src_lin(c, i, size), size);
		ops_st_slow(c, dst_lin(c, i, size, ACC_WRITE), a, size);
		break;
	case S_STOS:
		ops_st_slow(c, dst_lin(c, i, size, ACC_WRITE), c->gpr[R_RAX], size);
		break;
	case S_LODS:
		set_acc(c, size, ops_ld_slow(c, src_lin(c, i, size), size));
		break;
	case S_CMPS:
		a = ops_ld_slow(c, src_lin(c, i, size), size);
		b = ops_ld_slow(c, dst_lin(c, i, size, ACC_READ), size);
		compare(c, size, a, b);
		break;
	case S_SCAS:
		b = ops_ld_slow(c, dst_lin(c, i, size, ACC_READ), size);
		compare(c, size, c->gpr[R_RAX], b);
		break;
	}
	if (op != S_STOS && op != S_SCAS)
		add_reg(c, i, R_RSI, step);
	if (op != S_LODS)
		add_reg(c, i, R_RDI, step);
}

/* -- runs -------------------------------------------------------------------------------------- */
/* Elements up to the end of the page of `lin`, and of the register's range. */
static u64 room(u64 lin, u64 reg, u64 mask, unsigned size)
{
	u64 n = (4096 - (lin & 4095)) / size, wrap = mask - reg;

	return MIN(n, wrap / size);
}

static void fill(void *d, u64 v, u64 n, unsigned size)
{
	if (size == 1)
		__asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(v) : "memory");
	else if (size == 2)
		__asm__ volatile("rep stosw" : "+D"(d), "+c"(n) : "a"(v) : "memory");
	else if (size == 4)
		__asm__ volatile("rep stosl" : "+D"(d), "+c"(n) : "a"(v) : "memory");
	else
		__asm__ volatile("rep stosq" : "+D"(d), "+c"(n) : "a"(v) : "memory");
}

/* Element by element in ascending order, as overlapping operands demand. */
static void copy(void *d, const void *s, u64 n, unsigned size)
{
	if ((uintptr_t)d - (uintptr_t)s >= n * size) {
		ram_copy(d, s, n * size);       /* no element is read after it was written */
		return;
	}
	if (size == 1)
		__asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
	else if (size == 2)
		__asm__ volatile("rep movsw" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
	else if (size == 4)
		__asm__ volatile("rep movsl" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
	else
		__asm__ volatile("rep movsq" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
}

/* A run of MOVS or STOS on plain RAM going up: elements done, 0 when it must be done one by one. */
static u64 bulk(struct cpu *c, const struct insn *i, enum str op, unsigned size, u64 count)
{
	u64 mask = mask_of(i), n, dl, sl = 0;
	void *d, *s = NULL;

	if ((c->eflags & FL_DF) || count < 2)
		return 0;
	dl = dst_lin(c, i, size, ACC_WRITE);
	n = MIN(count, room(dl, c->gpr[R_RDI] & mask, mask, size));
	if (op == S_MOVS) {
		sl = src_lin(c, i, size);
		n = MIN(n, room(sl, c->gpr[R_RSI] & mask, mask, size));
	}
	if (n < 2)
		return 0;
	if (!c->flat) { /* limits of the whole run; an offence is raised by the element that commits it */
		const struct seg *es = &c->seg[SEG_ES], *ss = &c->seg[i->seg];

		if ((c->gpr[R_RDI] & mask) + n * size - 1 > es->limit || (es->s && !(es->type & 8) && (es->type & 4)) ||
		    (op == S_MOVS && ((c->gpr[R_RSI] & mask) + n * size - 1 > ss->limit ||
				      (ss->s && !(ss->type & 8) && (ss->type & 4)))))
			return 0;
	}
	d = mem_host(c, dl, (unsigned)(n * size), ACC_WRITE);
	if (op == S_MOVS && d)
		s = mem_host(c, sl, (unsigned)(n * size), ACC_READ);
	if (!d || (op == S_MOVS && !s))
		return 0;
	if (op == S_MOVS)
		copy(d, s, n, size);
	else
		fill(d, c->gpr[R_RAX], n, size);
	return n;
}

/* CMPS and SCAS end on the flag; true: that was it. */
static bool ended(const struct cpu *c, const struct insn *i, enum str op)
{
	bool zf = c->aflags & AF_ZF;

	if (op != S_CMPS && op != S_SCAS)
		return false;
	return i->flags & IF_REPNE ? zf : !zf;
}

static bool may_bulk(const struct cpu *c, enum str op)
{
	return (op == S_MOVS || op == S_STOS) && !c->data_bp && !c->one_insn && !c->blocks->stepping;
}

/* True when all elements are done and nothing but the next block is to be looked at. */
static bool repeat(struct cpu *c, const struct insn *i, enum str op, unsigned size)
{
	u64 mask = mask_of(i), count = c->gpr[R_RCX] & mask;
	unsigned slow = 0;
	u64 bytes = 0;

	while (count) {
		u64 n = may_bulk(c, op) ? bulk(c, i, op, size, count) : 0;

		if (n) {
			if (op == S_MOVS)
				add_reg(c, i, R_RSI, n * size);
			add_reg(c, i, R_RDI, n * size);
			bytes += n * size;
		} else {
			element(c, i, op, size);
			n = 1;
			slow++;
		}
		count -= n;
		add_reg(c, i, R_RCX, -n);
		if (count && ended(c, i, op))
			break;
		if (count && (bytes >= RUN_BYTES || slow >= RUN_SLOW || mmio_pending(c) || c->blocks->stepping ||
			      c->trap_db || c->block_end != i + 1 || atomic_load_explicit(&c->requests, memory_order_relaxed))) {
			c->budget -= (int32_t)(slow + bytes / 64);
			c->rip = cpu_cur_rip(c);
			return false;
		}
	}
	c->budget -= (int32_t)(slow + bytes / 64);
	return !mmio_pending(c);
}

#define STR(name, op)                                                           \
	OP(name) { element(c, i, op, i->aux); }                                 \
	OP(rep_##name) { if (repeat(c, i, op, i->aux)) CHAIN(0); return; }
STR(movs, S_MOVS)
STR(stos, S_STOS)
STR(lods, S_LODS)
STR(cmps, S_CMPS)
STR(scas, S_SCAS)

/* -- decoding ---------------------------------------------------------------------------------- */
static insn_fn *const fns[5][2] = { { movs, rep_movs }, { stos, rep_stos }, { lods, rep_lods }, { cmps, rep_cmps }, { scas, rep_scas } };

static bool set_string(struct insn *i, const struct decoded *d, enum str op, unsigned size)
{
	bool rep = i->flags & (IF_REP | IF_REPNE);

	i->aux = (uint8_t)size;
	i->seg = SEG_DS;
	for (unsigned n = 0; n < d->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &d->op[n];

		if (o->type == ZYDIS_OPERAND_TYPE_MEMORY && (o->mem.base == ZYDIS_REGISTER_RSI ||
		    o->mem.base == ZYDIS_REGISTER_ESI || o->mem.base == ZYDIS_REGISTER_SI)) {
			struct insn t = *i;

			insn_set_mem(&t, d, o);
			i->seg = t.seg;
		}
	}
	if (rep)
		i->flags |= IF_END;
	i->fn = fns[op][rep];
	return true;
}

bool ops_string_decode(struct insn *i, const struct decoded *d)
{
	static const enum str kind[16] = { [4] = S_MOVS, [5] = S_MOVS, [6] = S_CMPS, [7] = S_CMPS, [10] = S_STOS, [11] = S_STOS,
					   [12] = S_LODS, [13] = S_LODS, [14] = S_SCAS, [15] = S_SCAS };
	uint8_t op = d->z.opcode;

	if (d->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || d->z.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT ||
	    (i->flags & IF_LOCK) || op < 0xa4 || op > 0xaf || op == 0xa8 || op == 0xa9)
		return false;
	return set_string(i, d, kind[op & 15], op & 1 ? d->z.operand_width / 8 : 1);
}
