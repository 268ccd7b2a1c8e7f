/* Bytes to `struct insn`: Zydis tells what an instruction is, the families (insn.h) who executes it. */
#include "softkvm/interp/block.h"
#include "softkvm/sys.h"

void op_ud(struct cpu *c, const struct insn *i) { cpu_ud(c); }
void op_fetch_gp(struct cpu *c, const struct insn *i) { cpu_gp(c, 0); }

/* Register number 0..15 and, in *high, whether it is AH..BH. */
static unsigned reg_number(ZydisRegister r, bool *high)
{
	*high = false;
	if (r >= ZYDIS_REGISTER_AL && r <= ZYDIS_REGISTER_BL)
		return r - ZYDIS_REGISTER_AL;
	if (r >= ZYDIS_REGISTER_AH && r <= ZYDIS_REGISTER_BH) {
		*high = true;
		return r - ZYDIS_REGISTER_AH;
	}
	if (r >= ZYDIS_REGISTER_SPL && r <= ZYDIS_REGISTER_R15B)
		return r - ZYDIS_REGISTER_SPL + 4;
	if (r >= ZYDIS_REGISTER_AX && r <= ZYDIS_REGISTER_R15W)
		return r - ZYDIS_REGISTER_AX;
	if (r >= ZYDIS_REGISTER_EAX && r <= ZYDIS_REGISTER_R15D)
		return r - ZYDIS_REGISTER_EAX;
	if (r >= ZYDIS_REGISTER_RAX && r <= ZYDIS_REGISTER_R15)
		return r - ZYDIS_REGISTER_RAX;
	return R_ZERO;
}

uint8_t insn_reg_off(ZydisRegister r)
{
	bool high;
	unsigned n = reg_number(r, &high);

	return (uint8_t)(n * 8 + high);
}

uint8_t insn_seg(ZydisRegister r)
{
	switch (r) {
	case ZYDIS_REGISTER_ES: return SEG_ES;
	case ZYDIS_REGISTER_CS: return SEG_CS;
	case ZYDIS_REGISTER_SS: return SEG_SS;
	case ZYDIS_REGISTER_FS: return SEG_FS;
	case ZYDIS_REGISTER_GS: return SEG_GS;
	default: return SEG_DS;
	}
}

void insn_set_mem(struct insn *i, const struct decoded *d, const ZydisDecodedOperand *op)
{
	const ZydisDecodedOperandMem *m = &op->mem;
	bool high, rip = m->base == ZYDIS_REGISTER_RIP || m->base == ZYDIS_REGISTER_EIP;
	int64_t disp = m->disp.has_displacement ? m->disp.value : 0;

	i->flags |= IF_MEM;
	i->seg = insn_seg(m->segment);
	i->base = rip ? R_BLK : (uint8_t)reg_number(m->base, &high);
	i->index = m->index == ZYDIS_REGISTER_NONE ? R_ZERO : (uint8_t)reg_number(m->index, &high);
	i->scale = m->scale == 8 ? 3 : m->scale == 4 ? 2 : m->scale == 2 ? 1 : 0;
	if (d->code_bits != 64 || d->z.address_width != 64 || i->seg == SEG_FS || i->seg == SEG_GS)
		i->flags |= IF_EA_SLOW;
	if (i->seg == SEG_SS)
		i->flags |= IF_STACK;
	if (rip && disp + i->off + i->len != (int32_t)(disp + i->off + i->len))
		i->flags |= IF_EA_SLOW | IF_RIPREL;     /* insn_offset() adds what does not fit */
	else if (rip)
		disp += i->off + i->len;
	i->disp = (int32_t)disp;
}

static void set_modes(ZydisDecoder *z, const struct cpu *c)
{
	const struct cpu_features *f = c->feat;

	/* Without CET and MPX in the guest their encodings are NOPs; prefixes of absent bit instructions are ignored. */
	ZydisDecoderEnableMode(z, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
	ZydisDecoderEnableMode(z, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
	if (!f)
		return;
	ZydisDecoderEnableMode(z, ZYDIS_DECODER_MODE_AMD_BRANCHES, f->amd);
	ZydisDecoderEnableMode(z, ZYDIS_DECODER_MODE_LZCNT, f->f80000001_ecx >> 5 & 1);
	ZydisDecoderEnableMode(z, ZYDIS_DECODER_MODE_TZCNT, f->f7_ebx >> 3 & 1);
	ZydisDecoderEnableMode(z, ZYDIS_DECODER_MODE_CLDEMOTE, f->f7_ecx >> 25 & 1);
	ZydisDecoderEnableMode(z, ZYDIS_DECODER_MODE_WBNOINVD, f->f80000008_ebx >> 9 & 1);
}

void decode_init(ZydisDecoder *z, const struct cpu *c, uint32_t mode)
{
	bool real = mode & BM_REAL, b32 = mode & BM_CODE32;

	if (mode & BM_CODE64)
		ZydisDecoderInit(z, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	else if (real && !b32)
		ZydisDecoderInit(z, ZYDIS_MACHINE_MODE_REAL_16, ZYDIS_STACK_WIDTH_16);
	else
		ZydisDecoderInit(z, b32 ? ZYDIS_MACHINE_MODE_LEGACY_32 : ZYDIS_MACHINE_MODE_LEGACY_16,
				 mode & BM_STACK32 ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_16);
	set_modes(z, c);
}

/*
 * With a 32-bit address in 64-bit code Zydis 4.0 takes an absent base (SIB.base 5, mod 0) with REX.B for R13; there is none
 * whatever REX.B says (SDM vol. 2 table 2-3), but a displacement, and so no change of the segment either.
 */
static void absent_base(const ZydisDecodedInstruction *z, ZydisDecodedOperand *op)
{
	if (!z->raw.sib.offset || z->raw.sib.base != 5 || z->raw.modrm.mod)
		return;
	for (unsigned n = 0; n < z->operand_count; n++) {
		ZydisDecodedOperandMem *m = &op[n].mem;

		if (op[n].type != ZYDIS_OPERAND_TYPE_MEMORY || m->base != ZYDIS_REGISTER_R13D)
			continue;
		m->base = ZYDIS_REGISTER_NONE;
		m->disp.has_displacement = ZYAN_TRUE;
		m->disp.value = z->raw.disp.value;
	}
}

/* AMD's near branches in 64-bit code heed an operand size prefix; Zydis knows it of those with a displacement of 32 bits. */
static void narrow_branch(ZydisDecodedInstruction *z)
{
	if (z->meta.branch_type != ZYDIS_BRANCH_TYPE_SHORT && z->meta.branch_type != ZYDIS_BRANCH_TYPE_NEAR)
		return;
	for (unsigned n = 0; n < z->raw.prefix_count; n++)
		if (z->raw.prefixes[n].value == 0x66 && !z->raw.rex.W)
			z->operand_width = 16;
}

ZyanStatus decode_zydis(const ZydisDecoder *dec, const struct cpu *c, const uint8_t *bytes, unsigned avail, ZydisDecodedInstruction *z,
			ZydisDecodedOperand *op)
{
	struct quick *q = c->blocks && dec->machine_mode == ZYDIS_MACHINE_MODE_LONG_64 ? &c->blocks->quick : NULL;
	ZyanStatus st;

	if (q && quick_decode(q, bytes, avail, z, op))
		return ZYAN_STATUS_SUCCESS;
	st = ZydisDecoderDecodeFull(dec, bytes, avail, z, op);
	if (ZYAN_FAILED(st) || z->machine_mode != ZYDIS_MACHINE_MODE_LONG_64)
		return st;
	if (z->address_width == 32)
		absent_base(z, op);
	if (c->feat && c->feat->amd)
		narrow_branch(z);
	if (q)
		quick_learn(q, bytes, avail, z, op);
	return st;
}

static uint16_t prefix_flags(const ZydisDecodedInstruction *z)
{
	uint16_t f = 0;

	if (z->attributes & ZYDIS_ATTRIB_HAS_LOCK)
		f |= IF_LOCK;
	if (z->attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE))
		f |= IF_REP;
	if (z->attributes & ZYDIS_ATTRIB_HAS_REPNE)
		f |= IF_REPNE;
	if (z->address_width == 32)
		f |= IF_A32;
	if (z->address_width == 16)
		f |= IF_A16;
	if (z->operand_width == 16)
		f |= IF_O16;
	return f;
}

static bool families(struct insn *i, const struct decoded *d)
{
	const struct insn blank = *i;

	if (ops_decode(i, d)) {
		if (d->z.mnemonic == ZYDIS_MNEMONIC_RDRAND || d->z.mnemonic == ZYDIS_MNEMONIC_RDSEED)
			i->flags |= IF_ONCE;
		return true;
	}
	*i = blank;
	if (sys_decode(i, d)) {
		i->flags |= IF_ONCE;
		return true;
	}
	*i = blank;
	return vec_decode(i, d);
}

/* No family knows it, or it does not exist here. */
static void undefined(struct insn *i)
{
	i->fn = op_ud;
	i->flags |= IF_END;
}

enum decode_result decode_insn(const struct cpu *c, const ZydisDecoder *z, uint32_t mode, const uint8_t *bytes, unsigned avail,
			       unsigned off, struct insn *i)
{
	struct quick *q = c->blocks && (mode & BM_CODE64) ? &c->blocks->quick : NULL;
	struct decoded d;       /* a kilobyte, all of which Zydis writes */
	ZyanStatus st;

	if (q && quick_insn(q, bytes, avail, off, i))
		return DEC_OK;
	d.bytes = bytes;
	d.cpu = c;
	d.code_bits = mode & BM_CODE64 ? 64 : mode & BM_CODE32 ? 32 : 16;
	st = decode_zydis(z, c, bytes, avail, &d.z, d.op);
	*i = (struct insn){ .off = (uint16_t)off, .base = R_ZERO, .index = R_ZERO, .seg = SEG_DS };
	if (st == ZYDIS_STATUS_NO_MORE_DATA && avail < 15)
		return DEC_MORE;
	i->len = (uint8_t)avail;
	if (st == ZYDIS_STATUS_NO_MORE_DATA || st == ZYDIS_STATUS_INSTRUCTION_TOO_LONG) {
		i->fn = op_fetch_gp;
		i->flags = IF_END;
		return DEC_OK;
	}
	if (!ZYAN_SUCCESS(st)) {
		undefined(i);
		return DEC_OK;
	}
	i->len = d.z.length;
	i->flags = prefix_flags(&d.z);
	/* Zydis knows Xeon Phi's own VEX encodings (LZCNT and others): no other CPU does. */
	if ((d.z.meta.isa_set >= ZYDIS_ISA_SET_KNCE && d.z.meta.isa_set <= ZYDIS_ISA_SET_KNC_PF_HINT) ||
	    (!cpuid_has_isa(c, d.z.meta.isa_set) && d.z.mnemonic != ZYDIS_MNEMONIC_VMMCALL /* a hypercall, with or without SVM */) ||
	    !families(i, &d))
		undefined(i);
	else if (q)
		quick_insn_learn(q, bytes, avail, &d.z, i);
	return DEC_OK;
}

/* -- addresses --------------------------------------------------------------------------------- */
uint64_t insn_offset(const struct cpu *c, const struct insn *i)
{
	uint64_t o = c->gpr[i->base] + (c->gpr[i->index] << i->scale) + (uint64_t)(int64_t)i->disp;

	if (unlikely(i->flags & (IF_A32 | IF_A16 | IF_RIPREL))) {
		if (i->flags & IF_RIPREL)
			o += i->off + i->len;
		if (i->flags & IF_A32)
			o = (uint32_t)o;
		else if (i->flags & IF_A16)
			o = (uint16_t)o;
	}
	return o;
}

uint64_t insn_lin_slow(struct cpu *c, const struct insn *i, unsigned size, enum access acc)
{
	uint64_t o = insn_offset(c, i);

	if (likely(c->flat))
		return i->seg == SEG_FS || i->seg == SEG_GS ? c->seg[i->seg].base + o : o;
	return seg_lin(c, i->seg, o, size, acc);
}
