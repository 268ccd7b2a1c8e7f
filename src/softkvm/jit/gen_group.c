/*
 * Several accesses by one base: integer instructions in a row whose memory operands differ in the displacement only share one
 * check, and ST holds the host address for all of them. Where it fails (another page, a TLB miss, MMIO), all of the
 * row goes to its handlers, one after the other.
 */
#include "softkvm/jit/slots.h"

#define SPAN_MAX 64             /* a row that crosses a page is slow: let that be seldom */
#define ROW_MAX SITE_MAX

/* What it accesses, NULL: nothing. NOPs and prefetches have operands that may be anywhere. */
static const ZydisDecodedOperand *mem_of(const struct tinsn *i)
{
	if (int_nothing(i))
		return NULL;
	for (unsigned n = 0; n < i->z.operand_count; n++)
		if (i->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && i->z.mnemonic != ZYDIS_MNEMONIC_LEA)
			return &i->op[n];
	return NULL;
}

static bool may_join(const struct tr *t, const struct tinsn *i)
{
	const ZydisDecodedOperand *m;

	if (i->by_handler || (i->in->flags & (IF_END | IF_NEW_IMM)) || !int_row(i))
		return false;
	m = mem_of(i);
	if (m && i->z.meta.category == ZYDIS_CATEGORY_BITBYTE && i->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY && i->op[1].type == ZYDIS_OPERAND_TYPE_REGISTER)
		return false;   /* of a bit string: anywhere */
	return !m || (m->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM && m->mem.type == ZYDIS_MEMOP_TYPE_MEM && m->size >= 8 &&
		      m->size <= 64 && i->z.address_width == t->bits && m->mem.base != ZYDIS_REGISTER_RIP &&
		      tr_seg_flat(t, insn_seg(m->mem.segment)) &&
		      (m->mem.index == ZYDIS_REGISTER_NONE || tr_full_reg(t, m->mem.index)));
}

static bool same_base(const ZydisDecodedOperandMem *a, const ZydisDecodedOperandMem *b)
{
	return a->base == b->base && a->index == b->index && (a->index == ZYDIS_REGISTER_NONE || a->scale == b->scale);
}

static bool writes(const struct tinsn *i, ZydisRegister r)
{
	for (unsigned n = 0; r != ZYDIS_REGISTER_NONE && n < i->z.operand_count; n++)
		if (i->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER && (i->op[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) &&
		    ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, i->op[n].reg.value) == ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, r))
			return true;
	return false;
}

static int64_t disp_of(const ZydisDecodedOperandMem *m) { return m->disp.has_displacement ? m->disp.value : 0; }

/* The row that begins at n: how many instructions, 0 when fewer than two accesses would share. */
unsigned row_find(struct tr *t, unsigned n, unsigned end, struct row *r)
{
	const ZydisDecodedOperand *first, *m;
	unsigned last = n;

	if (t->k->apart || !may_join(t, &t->t[n]) || !(first = mem_of(&t->t[n])))
		return 0;
	r->low = disp_of(&first->mem);
	r->high = r->low + first->size / 8;
	r->write = first->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
	for (unsigned k = n; k < end && k < n + ROW_MAX && may_join(t, &t->t[k]); k++) {
		m = mem_of(&t->t[k]);
		if (m) {
			int64_t low = MIN(r->low, disp_of(&m->mem)), high = MAX(r->high, disp_of(&m->mem) + m->size / 8);

			if (!same_base(&m->mem, &first->mem) || high - low > SPAN_MAX)
				break;
			r->low = low;
			r->high = high;
			r->write |= !!(m->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
			last = k;
		}
		if (writes(&t->t[k], first->mem.base) || writes(&t->t[k], first->mem.index))
			break;
	}
	return last > n ? last + 1 - n : 0;
}

/* Address and check for all; the instructions follow with t->row set. */
struct cold *row_begin(struct tr *t, unsigned n, unsigned count, const struct row *r)
{
	struct cold *k;

	gen_clobber(t, n);
	k = cold_new(t, n, count);
	if (!gen_operand_at(t, n, k, r->low, (unsigned)(r->high - r->low), r->write))
		return NULL;
	t->row = true;
	t->row_low = r->low;
	return k;
}

void row_end(struct tr *t, unsigned last, struct cold *k)
{
	t->row = false;
	cold_done(t, last, k);
}
