/*
 * Vector instructions that touch memory element by element: slow paths of masked loads and stores,
 * gathers, scatters, MASKMOVQ and MASKMOVDQU. A masked-out element is never accessed (SDM vol. 2,
 * fault suppression); a gather or scatter that faults has completed, and cleared from its mask, the
 * elements before.
 */
#include "softkvm/vec/vec.h"

/* Bit n: element n of the memory operand is accessed. */
static uint64_t active(const struct cpu *c, const struct vec_op *op)
{
	unsigned n = op->size / op->esize;
	uint64_t k, m = 0;

	if (op->flags & VO_VMASK) {
		for (unsigned e = 0; e < n; e++)
			m |= (uint64_t)(c->fpu.zmm[op->mask][(e + 1) * op->esize - 1] >> 7) << e;
		return m;
	}
	k = c->fpu.k[op->mask];
	if (op->lanes < 64)
		k &= BIT(op->lanes) - 1;
	if (op->flags & VO_DENSE) {
		unsigned bits = (unsigned)__builtin_popcountll(k);

		return bits < 64 ? BIT(bits) - 1 : ~0ULL;
	}
	/* A broadcast element serves several lanes. */
	for (unsigned e = 0; e < 64; e++)
		if (k >> e & 1)
			m |= BIT(e % n);
	return m;
}

bool mask_is_empty(const struct cpu *c, const struct vec_op *op)
{
	return (op->flags & VO_KMASK) && !active(c, op);
}

static uint64_t lin_of(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin, unsigned e, enum access acc)
{
	if (!mask_by_element(c, i, op))
		return lin + e * op->esize;
	return seg_lin(c, i->seg, (uint32_t)(insn_offset(c, i) + e * op->esize), op->esize, acc);
}

void mask_load(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin, void *buf)
{
	uint64_t m = active(c, op);

	memset(buf, 0, 64);
	for (unsigned e = 0; e < op->size / op->esize; e++)
		if (m >> e & 1)
			mem_read(c, lin_of(c, i, op, lin, e, ACC_READ), (uint8_t *)buf + e * op->esize, op->esize);
}

void mask_probe(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin)
{
	uint64_t m = op->flags & VO_WHOLE ? ~0ULL : active(c, op);

	for (unsigned e = 0; e < op->size / op->esize; e++)
		if (m >> e & 1)
			mem_probe(c, lin_of(c, i, op, lin, e, ACC_WRITE), op->esize, ACC_WRITE);
}

void mask_store(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin, const void *buf)
{
	uint64_t m = active(c, op);

	for (unsigned e = 0; e < op->size / op->esize; e++)
		if (m >> e & 1)
			mem_write(c, lin_of(c, i, op, lin, e, ACC_WRITE), (const uint8_t *)buf + e * op->esize, op->esize);
}

/* -- gather, scatter ------------------------------------------------------------------------------ */
/* dst: data register; src: index register; imm: the rest. */
union vsib {
	uint64_t imm;
	struct { uint8_t mask, elems, esize, isize, width, scale, evex, scatter; };
};

static uint64_t element_lin(struct cpu *c, const struct insn *i, union vsib v, unsigned e, enum access acc)
{
	const uint8_t *ix = c->fpu.zmm[i->src] + e * v.isize;
	int64_t index = v.isize == 8 ? (int64_t)ld_le64(ix) : (int32_t)ld_le32(ix);
	uint64_t off = c->gpr[i->base] + ((uint64_t)index << v.scale) + (uint64_t)(int64_t)i->disp;

	if (i->flags & IF_A32)
		off = (uint32_t)off;
	if (c->flat && i->seg != SEG_FS && i->seg != SEG_GS)
		return off;
	return seg_lin(c, i->seg, off, v.esize, acc);
}

static bool element_on(const struct cpu *c, union vsib v, unsigned e)
{
	if (v.evex)
		return c->fpu.k[v.mask] >> e & 1;
	return c->fpu.zmm[v.mask][(e + 1) * v.esize - 1] >> 7;
}

static void element_done(struct cpu *c, union vsib v, unsigned e)
{
	if (v.evex)
		c->fpu.k[v.mask] &= ~BIT(e);
	else
		memset(c->fpu.zmm[v.mask] + e * v.esize, 0, v.esize);
}

static void gather_exec(struct cpu *c, const struct insn *i)
{
	union vsib v = { i->imm };
	unsigned data = v.elems * v.esize;

	if (v.evex)
		vec_check_slow(c, VC_EVEX);
	else
		vec_check_vex(c);
	for (unsigned e = 0; e < v.elems; e++) {
		uint8_t buf[8], *p = c->fpu.zmm[i->dst] + e * v.esize;

		if (!element_on(c, v, e)) {
			element_done(c, v, e);          /* VEX: its bits go too */
			continue;
		}
		if (v.scatter) {
			mem_write(c, element_lin(c, i, v, e, ACC_WRITE), p, v.esize);
		} else {
			mem_read(c, element_lin(c, i, v, e, ACC_READ), buf, v.esize);
			memcpy(p, buf, v.esize);
		}
		element_done(c, v, e);
	}
	if (!v.scatter)
		memset(c->fpu.zmm[i->dst] + data, 0, 64 - data);
	if (v.evex)
		c->fpu.k[v.mask] = 0;
	else
		memset(c->fpu.zmm[v.mask], 0, 64);
}

static bool gather_decode(struct insn *i, const struct decoded *d)
{
	const ZydisDecodedOperand *mem = NULL, *data = NULL;
	union vsib v = { 0 };
	unsigned index_bits;

	for (unsigned n = 0; n < d->z.operand_count_visible; n++) {
		const ZydisDecodedOperand *o = &d->op[n];

		if (o->type == ZYDIS_OPERAND_TYPE_MEMORY)
			mem = o;
		else if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
			data = o;
		else if (o->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD || o->encoding == ZYDIS_OPERAND_ENCODING_MASK)
			v.mask = (uint8_t)ZydisRegisterGetId(o->reg.value);
	}
	if (!mem || !data || mem->mem.type != ZYDIS_MEMOP_TYPE_VSIB)
		return false;
	/* VGATHER<i><t>: opcode bit 0 is the index width, W the element width. */
	v.evex = d->z.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
	v.scatter = d->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
	v.isize = d->z.opcode & 1 ? 8 : 4;
	v.esize = (v.evex ? d->z.raw.evex.W : d->z.raw.vex.W) ? 8 : 4;
	index_bits = d->z.avx.vector_length ? d->z.avx.vector_length : 128;
	v.elems = (uint8_t)(index_bits / 8 / MAX(v.isize, v.esize));
	v.width = (uint8_t)(index_bits / 8);
	insn_set_mem(i, d, mem);
	v.scale = i->scale;
	i->index = R_ZERO;
	i->scale = 0;
	i->dst = (uint8_t)ZydisRegisterGetId(data->reg.value);
	i->src = (uint8_t)ZydisRegisterGetId(mem->mem.index);
	i->imm = v.imm;
	i->fn = gather_exec;
	return true;
}

/* -- MASKMOVQ, MASKMOVDQU: to DS:rDI ---------------------------------------------------------------- */
enum { MM_MMX, MM_SSE, MM_VEX };

static void maskmov_exec(struct cpu *c, const struct insn *i)
{
	bool mmx = i->aux == MM_MMX;
	const uint8_t *val, *sel;
	uint64_t lin;

	if (i->aux == MM_VEX)
		vec_check_vex(c);
	else if (mmx)
		vec_check_slow(c, VC_MMX);
	else
		vec_check_sse(c);
	if (mmx) {
		x87_check_pending(c);
		x87_mmx_enter(&c->fpu);
	}
	val = mmx ? c->fpu.fx + FX_ST + 16 * i->dst : c->fpu.zmm[i->dst];
	sel = mmx ? c->fpu.fx + FX_ST + 16 * i->src : c->fpu.zmm[i->src];
	lin = insn_lin(c, i, mmx ? 8 : 16, ACC_WRITE);
	/* Implementations differ in whether bytes left out may fault; AMD's check the whole operand. */
	if (!host_is_intel())
		mem_probe(c, lin, mmx ? 8 : 16, ACC_WRITE);
	for (unsigned n = 0; n < (mmx ? 8 : 16); n++)
		if (sel[n] & 0x80)
			mem_probe(c, lin + n, 1, ACC_WRITE);
	for (unsigned n = 0; n < (mmx ? 8 : 16); n++)
		if (sel[n] & 0x80)
			mem_write(c, lin + n, val + n, 1);
}

static bool maskmov_decode(struct insn *i, const struct decoded *d)
{
	for (unsigned n = 2; n < d->z.operand_count; n++)
		if (d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
			insn_set_mem(i, d, &d->op[n]);
	if (!(i->flags & IF_MEM))
		return false;
	i->dst = (uint8_t)ZydisRegisterGetId(d->op[0].reg.value);
	i->src = (uint8_t)ZydisRegisterGetId(d->op[1].reg.value);
	i->aux = d->z.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ ? MM_MMX :
		 d->z.mnemonic == ZYDIS_MNEMONIC_MASKMOVDQU ? MM_SSE : MM_VEX;
	i->fn = maskmov_exec;
	return true;
}

bool mask_decode(struct insn *i, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_MASKMOVQ: case ZYDIS_MNEMONIC_MASKMOVDQU: case ZYDIS_MNEMONIC_VMASKMOVDQU:
		return maskmov_decode(i, d);
	default:
		return gather_decode(i, d);
	}
}
