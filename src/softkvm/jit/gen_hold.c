/*
 * One check for accesses that are not in a row (gen_group.c): code that works with an object or with its stack frame uses one base again and again, with
 * other accesses and untaken branches between. The first of them checks all that is to come within HOLD_SPAN bytes and leaves the host's address in
 * a slot (jit_low.hold); those that follow take it from there. Where what is to come lies in two pages, or in one that may not be written, the slot is 0, and
 * each has its own check in the cold part.
 *
 * Why an address may be held: it is used only where every way leads through the first access of this same run of the code, and between them no
 * handler is called on purpose; what a slow path does (MMIO, accessed bits, a fault, which leaves) takes no translation back. What does, the loop
 * does: flushes, revoked write access, new code in a page.
 */
#include "softkvm/jit/slots.h"

#define HOLD_SPAN 128
#define LOOK_INSNS 40           /* how far ahead it is worth while */

struct key { uint8_t base, index, scale; };     /* guest registers; 16: none */
enum { NO_REG = 16 };

static bool key_same(const struct hold *h, struct key k) { return h->base == k.base && h->index == k.index && h->scale == k.scale; }

/* The operand that gen_operand() is for, if what it has is nothing but registers of the natural width and a displacement. */
static const ZydisDecodedOperand *operand(const struct tr *t, const struct tinsn *i, struct key *key)
{
	for (unsigned n = 0; n < i->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &i->op[n];
		const ZydisDecodedOperandMem *m = &o->mem;

		if (o->type != ZYDIS_OPERAND_TYPE_MEMORY || o->encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM)
			continue;
		if (m->type != ZYDIS_MEMOP_TYPE_MEM || i->z.address_width != t->bits || !tr_full_reg(t, m->base) || !tr_seg_flat(t, insn_seg(m->segment)) ||
		    (m->index != ZYDIS_REGISTER_NONE && !tr_full_reg(t, m->index)))
			return NULL;
		*key = (struct key){ insn_reg_off(m->base) / 8, NO_REG, 0 };
		if (m->index != ZYDIS_REGISTER_NONE)
			*key = (struct key){ key->base, insn_reg_off(m->index) / 8, m->scale };
		return o;
	}
	return NULL;
}

/* -- what an instruction does to a base --------------------------------------------------------------- */
/* It writes guest register `reg`: false; but if all it does is to add a constant, that is added to *by. */
static bool keeps(const struct tr *t, const struct tinsn *i, unsigned reg, int64_t *by)
{
	const ZydisDecodedOperand *o = i->op;
	/* Zydis does not say what CMPS and SCAS do to these. */
	bool written = i->z.meta.category == ZYDIS_CATEGORY_STRINGOP && (reg == R_RSI || reg == R_RDI);

	if (reg == NO_REG)
		return true;
	for (unsigned n = 0; n < i->z.operand_count; n++)
		if (o[n].type == ZYDIS_OPERAND_TYPE_REGISTER && (o[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)) {
			ZydisRegister r = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, o[n].reg.value);

			written |= r == (ZydisRegister)(ZYDIS_REGISTER_RAX + reg);
		}
	if (!written)
		return true;
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_PUSH:
		*by -= t->bits / 8;
		return i->z.operand_width == t->bits && reg == R_RSP;
	case ZYDIS_MNEMONIC_POP:
		*by += t->bits / 8;
		return i->z.operand_width == t->bits && reg == R_RSP && o[0].type == ZYDIS_OPERAND_TYPE_REGISTER && insn_reg_off(o[0].reg.value) / 8 != R_RSP;
	case ZYDIS_MNEMONIC_ADD:
	case ZYDIS_MNEMONIC_SUB:
		if (o[0].type != ZYDIS_OPERAND_TYPE_REGISTER || !tr_full_reg(t, o[0].reg.value) || o[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE)
			return false;
		*by += i->z.mnemonic == ZYDIS_MNEMONIC_ADD ? o[1].imm.value.s : -o[1].imm.value.s;
		return o[1].imm.value.s == (int32_t)o[1].imm.value.s;
	default:
		return false;
	}
}

static bool keeps_key(const struct tr *t, const struct tinsn *i, unsigned base, unsigned index, int64_t *by)
{
	return keeps(t, i, base, by) && keeps(t, i, index, by) && (!*by || index == NO_REG);
}

/* Handlers, system instructions, and REP MOVS and STOS, which code goes on behind. */
static bool ends_all(const struct tinsn *i)
{
	return i->by_handler || (i->in->flags & (IF_ONCE | IF_NEW_IMM | IF_NEW_DISP)) || ((i->in->flags & IF_END) && i->end == END_NONE);
}

void hold_forget(struct tr *t)
{
	for (unsigned n = 0; n < HOLDS; n++)
		t->hold[n].used = false;
}

void hold_behind(struct tr *t, unsigned n)
{
	if (ends_all(&t->t[n])) {
		hold_forget(t);
		return;
	}
	for (unsigned m = 0; m < HOLDS; m++) {
		struct hold *h = &t->hold[m];
		int64_t by = 0;

		if (!h->used)
			continue;
		h->used = keeps_key(t, &t->t[n], h->base, h->index, &by);
		h->low -= by;
		h->high -= by;
	}
}

/* -- what is to come --------------------------------------------------------------------------------- */
struct plan { struct key key; int64_t low, high, by; bool write; unsigned more; };

static void join(struct plan *p, int64_t disp, unsigned size, bool write, bool sure)
{
	int64_t low = MIN(p->low, disp + p->by), high = MAX(p->high, disp + p->by + size);

	if (high - low > HOLD_SPAN || !size || size > 64 || (write && !p->write && !sure))
		return;
	p->low = low;
	p->high = high;
	p->write |= write;
	p->more++;
}

/* What instruction m accesses by that base. `sure`: it will run, so that write access is not wanted in vain. */
static void see(const struct tr *t, struct plan *p, unsigned m, bool sure)
{
	const struct tinsn *i = &t->t[m];
	const ZydisDecodedOperand *o;
	unsigned word = t->bits / 8;
	struct key key;

	if (int_nothing(i) || i->z.mnemonic == ZYDIS_MNEMONIC_LEA)
		return;
	o = operand(t, i, &key);
	if (o && key.base == p->key.base && key.index == p->key.index && key.scale == p->key.scale)
		join(p, o->mem.disp.has_displacement ? o->mem.disp.value : 0, o->size / 8, o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE, sure);
	if (p->key.base != R_RSP || p->key.index != NO_REG || i->z.operand_width != t->bits)
		return;
	if (i->z.mnemonic == ZYDIS_MNEMONIC_PUSH || i->z.mnemonic == ZYDIS_MNEMONIC_CALL)
		join(p, -(int64_t)word, word, true, sure);
	else if (i->z.mnemonic == ZYDIS_MNEMONIC_POP || i->z.mnemonic == ZYDIS_MNEMONIC_RET)
		join(p, 0, word, false, sure);
}

static bool step(const struct tr *t, struct plan *p, unsigned m)
{
	int64_t by = 0;

	if (ends_all(&t->t[m]) || !keeps_key(t, &t->t[m], p->key.base, p->key.index, &by))
		return false;
	p->by += by;
	return true;
}

/* From instruction n, whose own access p says, over `count` that are done together. */
static void look(const struct tr *t, struct plan *p, unsigned n, unsigned count)
{
	unsigned part = t->now, m = n;

	for (; m < n + count; m++)
		if (!step(t, p, m))
			return;
	for (; m < t->n && m < n + LOOK_INSNS; m++) {
		while (part + 1 < t->nparts && m >= t->part[part + 1].first)
			if (t->part[++part].label)
				return;
		see(t, p, m, part == t->now);
		if (!step(t, p, m) || t->t[m].end == END_OTHER)
			return;
	}
}

/* -- code -------------------------------------------------------------------------------------------- */
/* Absolute: em_op_near() made FISTP and a load behind it take 1.75 times as long on Zen 4. */
static void slot(struct tr *t, unsigned n, unsigned op, unsigned reg) { em_op_abs(&t->h, true, op, reg, &t->j->low->hold[n]); }

static void address(struct tr *t, struct key k, unsigned scale, int64_t disp)
{
	int base = (int)gen_get(t, k.base, SC), index = k.index == NO_REG ? -1 : (int)gen_get(t, k.index, ST);

	em_mem(&t->h, tr_64(t), 0x8d, ST, base, index, scale, (int32_t)disp);
}

/* In the cold part: the access alone, checked by a call; on at `back`. */
static void alone(struct tr *t, struct key k, unsigned scale, int64_t disp, unsigned size, bool write, const uint8_t *back)
{
	uint8_t *j;

	address(t, k, scale, disp);
	gen_call(t, t->j->check[t->tlb_mode][write][gen_order(size)]);
	j = em_jmp(&t->h);
	if (!t->h.full)
		em_to(j, back);
}

static void advance(struct tr *t, int64_t by)
{
	if (by)
		em_mem(&t->h, true, 0x8d, ST, ST, -1, 0, (int32_t)by);
}

static unsigned free_slot(struct tr *t)
{
	for (unsigned n = 0; n < HOLDS; n++)
		if (!t->hold[n].used)
			return n;
	return t->next_hold++ % HOLDS;
}

static void begin(struct tr *t, struct cold *k, const struct plan *p, unsigned scale, int64_t disp, unsigned size, bool write)
{
	unsigned n = free_slot(t);
	uint8_t *from;

	t->hold[n] = (struct hold){ p->low, p->high, p->key.base, p->key.index, p->key.scale, p->write, true };
	address(t, p->key, scale, p->low);
	from = em_check(&t->h, p->write ? t->tlb->w : t->tlb->r, (unsigned)(p->high - p->low), false);
	slot(t, n, 0x89, ST);
	advance(t, disp - p->low);
	gen_point_behind(t, k);
	const uint8_t *back = t->h.p;

	tr_swap(t);
	em_here(&t->h, from);
	EM(&t->h, 0x31, 0xc9);                          /* xor ecx, ecx */
	slot(t, n, 0x89, SC);
	alone(t, p->key, scale, disp, size, write, back);
	tr_swap(t);
}

static void go_on(struct tr *t, struct cold *k, unsigned n, struct key key, unsigned scale, int64_t disp, unsigned size, bool write)
{
	uint8_t *none;

	slot(t, n, 0x8b, ST);
	EM(&t->h, 0x4d, 0x85, 0xff);                    /* test r15, r15 */
	none = em_jcc(&t->h, 4);
	advance(t, disp - t->hold[n].low);
	gen_point_behind(t, k);
	const uint8_t *back = t->h.p;

	tr_swap(t);
	em_here(&t->h, none);
	alone(t, key, scale, disp, size, write, back);
	tr_swap(t);
}

static bool access_by(struct tr *t, struct cold *k, struct key key, int64_t disp, unsigned size, bool write, unsigned count)
{
	struct plan p = { key, disp, disp + size, 0, write, 0 };
	unsigned scale = key.scale == 8 ? 3 : key.scale == 4 ? 2 : key.scale == 2 ? 1 : 0;

	if (!t->k->in_line || t->swapped || t->align || t->index || size > 64)
		return false;
	for (unsigned n = 0; n < HOLDS; n++) {
		const struct hold *h = &t->hold[n];

		if (h->used && key_same(h, key) && disp >= h->low && disp + size <= h->high && (h->write || !write)) {
			go_on(t, k, n, key, scale, disp, size, write);
			return true;
		}
	}
	/*
	 * If the instruction can go to its handler before it comes here (the other operand's check, vector state), code goes on behind it with the slot as
	 * somebody else left it: the address of a page that may be nobody's any more.
	 */
	if (k->nfrom || k->nfills)
		return false;
	look(t, &p, k->n, count);
	if (!p.more || p.low != (int32_t)p.low)
		return false;
	begin(t, k, &p, scale, disp, size, write);
	return true;
}

bool hold_operand(struct tr *t, unsigned n, struct cold *k, int64_t disp, unsigned size, bool write)
{
	struct key key;

	if (disp != (int32_t)disp || !operand(t, &t->t[n], &key))
		return false;
	return access_by(t, k, key, disp, size, write, k->count);
}

bool hold_stack(struct tr *t, struct cold *k, int32_t d, unsigned size, bool write)
{
	return tr_seg_flat(t, SEG_SS) && access_by(t, k, (struct key){ R_RSP, NO_REG, 0 }, d, size, write, k->count);
}
