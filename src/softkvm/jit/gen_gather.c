/*
 * VEX gathers, element by element: each has its own check, its own load. Index, mask and result pass through memory of ours
 * (jit_low.gather), so nothing of the guest's has changed when some element turns out to need the handler, which then does all.
 */
#include "softkvm/jit/slots.h"
#include "softkvm/vec/vec.h"

struct gather {
	unsigned data, index, mask;     /* vector registers */
	unsigned n, esize, isize;       /* elements, bytes of one in memory, of an index */
	const ZydisDecodedOperandMem *m;
};

/* What one takes at the most: of room in the code, and of the region's points. */
#define GATHER_BYTES 1024
#define GATHER_POINTS 8

static bool is_gather(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_VPGATHERDD: case ZYDIS_MNEMONIC_VPGATHERDQ: case ZYDIS_MNEMONIC_VPGATHERQD: case ZYDIS_MNEMONIC_VPGATHERQQ:
	case ZYDIS_MNEMONIC_VGATHERDPS: case ZYDIS_MNEMONIC_VGATHERDPD: case ZYDIS_MNEMONIC_VGATHERQPS: case ZYDIS_MNEMONIC_VGATHERQPD:
		return true;
	default:
		return false;
	}
}

static bool find(const struct tr *t, const struct tinsn *i, struct gather *g)
{
	unsigned bytes = i->z.raw.vex.L ? 32 : 16;

	if (i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_VEX || !is_gather(i->z.mnemonic) || !tr_64(t) || i->z.address_width != 64 || !host_avx())
		return false;
	g->m = &i->op[1].mem;
	if (i->op[1].type != ZYDIS_OPERAND_TYPE_MEMORY || g->m->type != ZYDIS_MEMOP_TYPE_VSIB || !tr_seg_flat(t, insn_seg(g->m->segment)))
		return false;
	g->data = (unsigned)ZydisRegisterGetId(i->op[0].reg.value);
	g->index = (unsigned)ZydisRegisterGetId(g->m->index);
	g->mask = (unsigned)ZydisRegisterGetId(i->op[2].reg.value);
	g->isize = i->z.opcode & 1 ? 8 : 4;
	g->esize = i->z.raw.vex.W ? 8 : 4;
	g->n = bytes / MAX(g->isize, g->esize);
	return g->data != g->index && g->data != g->mask && g->index != g->mask;
}

/* vmovdqu of 32 bytes, or loads of fewer that clear what lies above. */
static void move(struct em *e, unsigned reg, const void *p, bool store, unsigned bytes)
{
	e8(e, 0xc5);
	e8(e, (reg & 8 ? 0 : 0x80) | 0x7a | (bytes == 32 ? 4 : 0));
	e8(e, store ? 0x7f : bytes == 8 ? 0x7e : 0x6f);
	em_abs(e, reg, p);
}

/* vpxor xmm, xmm, xmm */
static void clear(struct em *e, unsigned reg)
{
	e8(e, 0xc4);
	e8(e, (reg & 8 ? 0 : 0xa0) | 0x41);
	e8(e, (~reg & 15) << 3 | 1);
	e8(e, 0xef);
	e8(e, 0xc0 | (reg & 7) << 3 | (reg & 7));
}

static void element(struct tr *t, unsigned n, struct cold *k, const struct gather *g, unsigned x)
{
	struct jit_low *l = t->j->low;
	struct em *e = &t->h;
	uint8_t *skip;
	int base = -1;

	e8(e, 0xf6);                                    /* test byte [sign of the mask's element], 0x80 ; jz */
	em_abs(e, 0, l->gather.mask + (x + 1) * g->esize - 1);
	e8(e, 0x80);
	skip = em_jcc(e, 4);
	em_op_abs(e, true, g->isize == 8 ? 0x8b : 0x63, ST, l->gather.index + x * g->isize);
	if (g->m->base != ZYDIS_REGISTER_NONE)
		base = (int)gen_get(t, insn_reg_off(g->m->base) / 8, SC);
	em_mem(e, true, 0x8d, ST, base, ST, g->m->scale == 8 ? 3 : g->m->scale == 4 ? 2 : g->m->scale == 2 ? 1 : 0,
	       g->m->disp.has_displacement ? (int32_t)g->m->disp.value : 0);
	gen_check(t, k, g->esize, false);
	gen_point(t, n);
	em_mem(e, g->esize == 8, 0x8b, SC, ST, -1, 0, 0);
	em_op_abs(e, g->esize == 8, 0x89, SC, l->gather.data + x * g->esize);
	em_here(e, skip);
}

bool gen_gather(struct tr *t, unsigned n)
{
	struct jit_low *l = t->j->low;
	struct gather g;
	struct cold *k;

	if (!find(t, &t->t[n], &g) || t->h.end - t->h.p < 8 * GATHER_BYTES || t->npoints > POINTS_MAX / 2 - GATHER_POINTS)
		return false;
	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	if (!(t->live & JV_VEX))
		gen_live(t, k, JV_VEX);
	t->live |= JV_VEX | JV_SSE;
	move(&t->h, g.index, l->gather.index, true, 32);
	move(&t->h, g.mask, l->gather.mask, true, 32);
	move(&t->h, g.data, l->gather.data, true, 32);
	for (unsigned x = 0; x < g.n; x++)
		element(t, n, k, &g, x);
	move(&t->h, g.data, l->gather.data, false, g.n * g.esize);
	clear(&t->h, g.mask);
	cold_done(t, n, k);
	return true;
}
