/*
 * MOVS STOS LODS CMPS SCAS with their repeat prefixes.
 *
 * A repeated instruction works in runs: as many elements as lie in one page on each side are moved by the
 * host when both sides are plain RAM; everything else goes element by element. It stops
 * at a page, after a bounded number of elements, after MMIO and where a trap follows each element, leaves RCX, RSI and RDI as
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
/* Elements in the direction of `down` inside the page of `lin` and before the register wraps; 0: not even one. */
static u64 room(u64 lin, u64 reg, u64 mask, unsigned size, bool down)
{
	u64 in_page = lin & 4095;

	if (in_page + size > 4096 || mask - reg < size - 1)
		return 0;
	return down ? MIN(in_page, reg) / size + 1 : MIN((4096 - in_page) / size, (mask - reg) / size);
}

/* The host's own string instruction; `down`: with the direction flag set. */
#define HOST_REP(insn) do {                                                     \
		if (down)                                                       \
			__asm__ volatile("std\n\trep " insn "\n\tcld" : "+D"(d), "+S"(s), "+c"(n) : "a"(v) : "memory", "cc"); \
		else                                                            \
			__asm__ volatile("rep " insn : "+D"(d), "+S"(s), "+c"(n) : "a"(v) : "memory"); \
	} while (0)

static void fill(void *d, u64 v, u64 n, unsigned size, bool down)
{
	void *s = NULL;

	if (size == 1)
		HOST_REP("stosb");
	else if (size == 2)
		HOST_REP("stosw");
	else if (size == 4)
		HOST_REP("stosl");
	else
		HOST_REP("stosq");
}

/* Element by element in order, as overlapping operands demand. */
static void copy(void *d, const void *s, u64 n, unsigned size, bool down)
{
	u64 v = 0;

	if (!down && (uintptr_t)d - (uintptr_t)s >= n * size) {
		ram_copy(d, s, n * size);       /* no element is read after it was written */
		return;
	}
	if (size == 1)
		HOST_REP("movsb");
	else if (size == 2)
		HOST_REP("movsw");
	else if (size == 4)
		HOST_REP("movsl");
	else
		HOST_REP("movsq");
}

/* CMPS (v unused) or SCAS (s unused) over up to n elements: elements done; flags of the last. */
#define HOST_SCAN(insn) do {                                                    \
		if (down)                                                       \
			__asm__ volatile("std\n\t" insn "\n\tcld" FLAGS_OUT : "+D"(d), "+S"(s), "+c"(left), "+a"(v) : : "memory", "cc"); \
		else                                                            \
			__asm__ volatile(insn FLAGS_OUT : "+D"(d), "+S"(s), "+c"(left), "+a"(v) : : "memory", "cc"); \
	} while (0)
#define SCAN_SIZES(prefix, op) do {                                             \
		if (size == 1)                                                  \
			HOST_SCAN(prefix " " op "b");                           \
		else if (size == 2)                                             \
			HOST_SCAN(prefix " " op "w");                           \
		else if (size == 4)                                             \
			HOST_SCAN(prefix " " op "l");                           \
		else                                                            \
			HOST_SCAN(prefix " " op "q");                           \
	} while (0)

static u64 scan(struct cpu *c, const struct insn *i, enum str op, const void *d, const void *s, u64 n, unsigned size, bool down)
{
	u64 left = n, v = c->gpr[R_RAX];

	if (op == S_CMPS && (i->flags & IF_REPNE))
		SCAN_SIZES("repne", "cmps");
	else if (op == S_CMPS)
		SCAN_SIZES("repe", "cmps");
	else if (i->flags & IF_REPNE)
		SCAN_SIZES("repne", "scas");
	else
		SCAN_SIZES("repe", "scas");
	c->aflags = (u16)v;
	return n - left;
}

/* Limits of a whole run outside 64-bit code; an offence is raised by the element that commits it. */
static bool inside(const struct seg *s, u64 off, u64 len)
{
	return off + len - 1 <= s->limit && !(s->s && !(s->type & 8) && (s->type & 4));
}

/* A run on plain RAM: elements done, 0 when they must be done one by one. */
static u64 bulk(struct cpu *c, const struct insn *i, enum str op, unsigned size, u64 count)
{
	bool down = c->eflags & FL_DF, reads = op == S_MOVS || op == S_CMPS;
	enum access acc = op == S_MOVS || op == S_STOS ? ACC_WRITE : ACC_READ;
	u64 mask = mask_of(i), n, dl, sl = 0, back, di = c->gpr[R_RDI] & mask, si = c->gpr[R_RSI] & mask;
	void *d, *s = NULL;

	if (op == S_LODS || count < 2)
		return 0;
	dl = dst_lin(c, i, size, acc);
	n = MIN(count, room(dl, di, mask, size, down));
	if (reads) {
		sl = src_lin(c, i, size);
		n = MIN(n, room(sl, si, mask, size, down));
	}
	if (n < 2)
		return 0;
	back = down ? (n - 1) * size : 0;
	if (!c->flat && !(inside(&c->seg[SEG_ES], di - back, n * size) && (!reads || inside(&c->seg[i->seg], si - back, n * size))))
		return 0;
	d = mem_host(c, dl - back, (unsigned)(n * size), acc);
	if (reads && d)
		s = mem_host(c, sl - back, (unsigned)(n * size), ACC_READ);
	if (!d || (reads && !s))
		return 0;
	d = (char *)d + back;
	s = reads ? (char *)s + back : NULL;
	if (op == S_MOVS)
		copy(d, s, n, size, down);
	else if (op == S_STOS)
		fill(d, c->gpr[R_RAX], n, size, down);
	else
		n = scan(c, i, op, d, s, n, size, down);
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

/* A trap follows every element. RF and shadows, for which the loop steps as well, want the instruction only. */
static bool traps(const struct cpu *c) { return c->blocks->stepping && c->step.tf; }

static bool may_bulk(const struct cpu *c, enum str op)
{
	return op != S_LODS && !c->data_bp && !traps(c);
}

/* Most are short: upwards, in one page on each side, which the TLB knows. */
static bool quick(struct cpu *c, const struct insn *i, enum str op, unsigned size)
{
	u64 n = c->gpr[R_RCX], len = n * size;
	void *d, *s;

	if (!c->flat || (i->flags & (IF_A32 | IF_A16)) || (c->eflags & FL_DF) || i->seg == SEG_FS || i->seg == SEG_GS ||
	    n - 1 >= 4096 / size || c->data_bp || traps(c))
		return false;
	d = tlb_hit_w(c, c->gpr[R_RDI], (unsigned)len);
	if (!d)
		return false;
	if (op == S_MOVS) {
		s = tlb_hit_r(c, c->gpr[R_RSI], (unsigned)len);
		if (!s)
			return false;
		copy(d, s, n, size, false);
		c->gpr[R_RSI] += len;
	} else {
		fill(d, c->gpr[R_RAX], n, size, false);
	}
	c->gpr[R_RDI] += len;
	c->gpr[R_RCX] = 0;
	c->rep_begun = false;
	cpu_charge(c, (int32_t)(len / 16));
	return true;
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
			u64 delta = c->eflags & FL_DF ? -(n * size) : n * size;

			if (op == S_MOVS || op == S_CMPS)
				add_reg(c, i, R_RSI, delta);
			add_reg(c, i, R_RDI, delta);
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
		if (count && (bytes >= RUN_BYTES || slow >= RUN_SLOW || mmio_pending(c) || traps(c) ||
			      c->trap_db || atomic_load_explicit(&c->requests, memory_order_relaxed))) {
			cpu_charge(c, (int32_t)(slow * 8 + bytes / 16));
			c->rip = c->rep_rip = cpu_cur_rip(c);
			c->rep_begun = true;
			return false;
		}
	}
	cpu_charge(c, (int32_t)(slow * 8 + bytes / 16));
	c->rep_begun = false;
	return !mmio_pending(c);
}

#define STR(name, op)                                                           \
	OP(name) { element(c, i, op, i->aux); }                                 \
	OP(rep_##name) { if (repeat(c, i, op, i->aux)) CHAIN(0); return; }
#define STR_QUICK(name, op)                                                     \
	OP(name) { element(c, i, op, i->aux); }                                 \
	OP(rep_##name) { if (quick(c, i, op, i->aux) || repeat(c, i, op, i->aux)) CHAIN(0); return; }
STR_QUICK(movs, S_MOVS)
STR_QUICK(stos, S_STOS)
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
