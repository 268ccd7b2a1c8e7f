/* Descriptor tables and selectors: LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR, LAR, LSL, VERR, VERW, ARPL. */
#include "softkvm/sys/sysint.h"

/* aux: operand size in bytes; dst: 0 GDT, 1 IDT. */
static void op_store_table(struct cpu *c, const struct insn *i)
{
	const struct dtable *t = i->dst ? &c->idt : &c->gdt;
	unsigned n = c->flat ? 10 : 6;
	uint8_t b[10];

	need_no_umip(c);
	st_le16(b, t->limit);
	st_le64(b + 2, t->base);
	mem_write(c, insn_lin(c, i, n, ACC_WRITE), b, n);
}

static void op_load_table(struct cpu *c, const struct insn *i)
{
	struct dtable *t = i->dst ? &c->idt : &c->gdt;
	unsigned n = c->flat ? 10 : 6;
	uint8_t b[10] = { 0 };
	uint64_t base;

	need_cpl0(c);
	mem_read(c, insn_lin(c, i, n, ACC_READ), b, n);
	base = ld_le64(b + 2);
	if (c->flat && !cpuid_canonical(c, base))
		cpu_gp(c, 0);
	if (!c->flat && i->aux == 2)
		base &= 0xffffff;
	*t = (struct dtable){ .base = base, .limit = ld_le16(b) };
}

static void need_protected(struct cpu *c)
{
	if (c->real || c->vm86)
		cpu_ud(c);
}

/* r/m16 operand; src is the register. */
static uint16_t rm16(struct cpu *c, const struct insn *i)
{
	return i->flags & IF_MEM ? mem_ld16(c, insn_lin(c, i, 2, ACC_READ)) : REG16(c, i->src);
}

/* SLDT, STR: src is the segment register. */
static void op_store_sel(struct cpu *c, const struct insn *i)
{
	uint16_t sel = c->seg[i->src].sel;

	need_protected(c);
	need_no_umip(c);
	if (i->flags & IF_MEM)
		mem_st16(c, insn_lin(c, i, 2, ACC_WRITE), sel);
	else if (i->aux == 2)
		REG16(c, i->dst) = sel;
	else
		REG64(c, i->dst) = sel;
}

/* LDT or TSS descriptor for LLDT and LTR, with its upper half in long mode. */
static void fetch_system(struct cpu *c, uint16_t sel, unsigned t16, unsigned t32, struct desc *d)
{
	unsigned type;

	if (sel & 4)
		cpu_gp(c, sel_err(sel));
	desc_fetch(c, sel, EXC_GP, d);
	type = desc_type(d);
	if (desc_s(d) || (type != t32 && (type != t16 || cpu_long(c))))
		cpu_gp(c, sel_err(sel));
	if (!desc_present(d))
		cpu_raise_err(c, EXC_NP, sel_err(sel));
	if (!cpu_long(c))
		return;
	desc_fetch_hi(c, d, EXC_GP);
	if ((d->hi >> 40 & 31) || !cpuid_canonical(c, desc_base64(d)))
		cpu_gp(c, sel_err(sel));
}

static void op_lldt(struct cpu *c, const struct insn *i)
{
	struct seg *s = &c->seg[SEG_LDTR];
	struct desc d;
	uint16_t sel;

	need_protected(c);
	need_cpl0(c);
	sel = rm16(c, i);
	if (sel_null(sel)) {
		seg_null(s, sel);
		return;
	}
	fetch_system(c, sel, SYS_LDT, SYS_LDT, &d);
	seg_from_desc(s, &d);
	s->base = desc_base64(&d);
}

static void op_ltr(struct cpu *c, const struct insn *i)
{
	struct seg *s = &c->seg[SEG_TR];
	struct desc d;
	uint16_t sel;

	need_protected(c);
	need_cpl0(c);
	sel = rm16(c, i);
	if (sel_null(sel))
		cpu_gp(c, 0);
	fetch_system(c, sel, SYS_TSS16, SYS_TSS32, &d);
	desc_set_busy(c, &d, true);
	seg_from_desc(s, &d);
	s->base = desc_base64(&d);
	s->type |= 2;
}

static void set_zf(struct cpu *c, bool on)
{
	c->aflags = (uint16_t)((c->aflags & ~(FL_ZF << 8)) | (on ? FL_ZF << 8 : 0));
}

/* May a segment register at this privilege see the descriptor? */
static bool visible(const struct cpu *c, const struct desc *d)
{
	if (desc_code(d) && desc_conforming(d))
		return true;
	return MAX(c->cpl, d->sel & 3u) <= desc_dpl(d);
}

static bool system_type_ok(const struct cpu *c, unsigned type, bool lsl)
{
	switch (type) {
	case SYS_LDT: case SYS_TSS32: case SYS_TSS32_BUSY:
		return true;
	case SYS_TSS16: case SYS_TSS16_BUSY:
		return !cpu_long(c);
	case SYS_CALL32:
		return !lsl;
	case SYS_CALL16: case SYS_TASK_GATE:
		return !lsl && !cpu_long(c);
	default:
		return false;
	}
}

/* LAR (src2 aux bit 7 clear) and LSL. imm: 1 for LSL. */
static void op_lar_lsl(struct cpu *c, const struct insn *i)
{
	bool lsl = i->imm, ok;
	struct desc d;
	uint64_t v = 0;
	uint16_t sel;

	need_protected(c);
	sel = rm16(c, i);
	ok = !sel_null(sel) && desc_try(c, sel, &d) && visible(c, &d) && (desc_s(&d) || system_type_ok(c, desc_type(&d), lsl));
	if (ok)
		v = lsl ? desc_limit(&d) : d.raw >> 32 & 0x00ffff00;
	set_zf(c, ok);
	if (!ok)
		return;
	if (i->aux == 2)
		REG16(c, i->dst) = (uint16_t)v;
	else
		REG64(c, i->dst) = v;
}

/* imm: 1 for VERW. */
static void op_verr_verw(struct cpu *c, const struct insn *i)
{
	struct desc d;
	uint16_t sel;
	bool ok;

	need_protected(c);
	sel = rm16(c, i);
	ok = !sel_null(sel) && desc_try(c, sel, &d) && desc_s(&d) && visible(c, &d);
	if (ok)
		ok = i->imm ? desc_data_writable(&d) : (desc_type(&d) & 10) != 8;
	set_zf(c, ok);
}

static void op_arpl(struct cpu *c, const struct insn *i)
{
	uint16_t src = REG16(c, i->dst), v;
	uint64_t lin = 0;

	need_protected(c);
	if (i->flags & IF_MEM) {
		lin = insn_lin(c, i, 2, ACC_RMW);
		mem_probe(c, lin, 2, ACC_WRITE);
		v = mem_ld16(c, lin);
	} else {
		v = REG16(c, i->src);
	}
	if ((v & 3) >= (src & 3)) {
		set_zf(c, false);
		return;
	}
	v = (uint16_t)((v & ~3) | (src & 3));
	if (i->flags & IF_MEM)
		mem_st16(c, lin, v);
	else
		REG16(c, i->src) = v;
	set_zf(c, true);
}

/* -- decoding --------------------------------------------------------------------------------- */
static bool decode_table(struct insn *i, const struct decoded *d, bool idt, insn_fn *fn)
{
	if (d->op[0].type != ZYDIS_OPERAND_TYPE_MEMORY)
		return false;
	insn_set_mem(i, d, &d->op[0]);
	i->aux = d->z.operand_width / 8;
	i->dst = idt;
	i->fn = fn;
	i->flags |= IF_END;
	return true;
}

static bool decode_rm(struct insn *i, const struct decoded *d, const ZydisDecodedOperand *op, insn_fn *fn)
{
	i->aux = d->z.operand_width / 8;
	if (op->type == ZYDIS_OPERAND_TYPE_MEMORY) {
		insn_set_mem(i, d, op);
	} else {
		i->src = insn_reg_off(op->reg.value);
		i->aux = op->size / 8;
	}
	i->fn = fn;
	return true;
}

static bool decode_store_sel(struct insn *i, const struct decoded *d, unsigned seg)
{
	decode_rm(i, d, &d->op[0], op_store_sel);
	i->dst = i->src;
	i->src = (uint8_t)seg;
	return true;
}

static bool decode_lar(struct insn *i, const struct decoded *d, bool lsl)
{
	decode_rm(i, d, &d->op[1], op_lar_lsl);
	i->aux = d->op[0].size / 8;
	i->dst = insn_reg_off(d->op[0].reg.value);
	i->imm = lsl;
	return true;
}

bool sys_decode_desc(struct insn *i, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_SGDT: return decode_table(i, d, false, op_store_table);
	case ZYDIS_MNEMONIC_SIDT: return decode_table(i, d, true, op_store_table);
	case ZYDIS_MNEMONIC_LGDT: return decode_table(i, d, false, op_load_table);
	case ZYDIS_MNEMONIC_LIDT: return decode_table(i, d, true, op_load_table);
	case ZYDIS_MNEMONIC_SLDT: return decode_store_sel(i, d, SEG_LDTR);
	case ZYDIS_MNEMONIC_STR: return decode_store_sel(i, d, SEG_TR);
	case ZYDIS_MNEMONIC_LLDT: return decode_rm(i, d, &d->op[0], op_lldt);
	case ZYDIS_MNEMONIC_LTR: return decode_rm(i, d, &d->op[0], op_ltr);
	case ZYDIS_MNEMONIC_LAR: return decode_lar(i, d, false);
	case ZYDIS_MNEMONIC_LSL: return decode_lar(i, d, true);
	case ZYDIS_MNEMONIC_VERR: return decode_rm(i, d, &d->op[0], op_verr_verw);
	case ZYDIS_MNEMONIC_VERW: decode_rm(i, d, &d->op[0], op_verr_verw); i->imm = 1; return true;
	case ZYDIS_MNEMONIC_ARPL:
		decode_rm(i, d, &d->op[0], op_arpl);
		i->dst = insn_reg_off(d->op[1].reg.value);
		return true;
	default: return false;
	}
}
