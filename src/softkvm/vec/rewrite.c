/*
 * Guest instruction to host instruction: the same opcode and vector registers, the memory operand
 * turned into [rsi] without displacement (so disp8 scaling does not matter), general-purpose
 * registers of the modrm byte into rax (reg) and rcx (rm). The result is 64-bit code whatever the
 * guest's mode was; bits that 32-bit code ignores are forced to what they mean there.
 */
#include "softkvm/vec/vec.h"

struct regs { bool mem, gpr_reg, gpr_rm; };

static bool is_gpr(const ZydisDecodedOperand *o)
{
	ZydisRegisterClass k;

	if (o->type != ZYDIS_OPERAND_TYPE_REGISTER)
		return false;
	k = ZydisRegisterGetClass(o->reg.value);
	return k == ZYDIS_REGCLASS_GPR8 || k == ZYDIS_REGCLASS_GPR16 || k == ZYDIS_REGCLASS_GPR32 || k == ZYDIS_REGCLASS_GPR64;
}

static struct regs look(const struct decoded *d)
{
	struct regs r = { 0 };

	for (unsigned n = 0; n < d->z.operand_count_visible; n++) {
		const ZydisDecodedOperand *o = &d->op[n];

		if (o->type == ZYDIS_OPERAND_TYPE_MEMORY)
			r.mem = true;
		else if (is_gpr(o) && o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
			r.gpr_reg = true;
		else if (is_gpr(o) && o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM)
			r.gpr_rm = true;
	}
	return r;
}

/* Outside 64-bit mode W does not choose a 64-bit general-purpose or memory integer. */
static bool w_is_ignored(const struct decoded *d, struct regs r)
{
	if (d->code_bits == 64)
		return false;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_VCVTSI2SS: case ZYDIS_MNEMONIC_VCVTSI2SD: case ZYDIS_MNEMONIC_VCVTSI2SH:
	case ZYDIS_MNEMONIC_VCVTUSI2SS: case ZYDIS_MNEMONIC_VCVTUSI2SD: case ZYDIS_MNEMONIC_VCVTUSI2SH:
	case ZYDIS_MNEMONIC_VPINSRD: case ZYDIS_MNEMONIC_VPEXTRD: case ZYDIS_MNEMONIC_VMOVD:
	case ZYDIS_MNEMONIC_VPCMPESTRI: case ZYDIS_MNEMONIC_VPCMPESTRM:         /* lengths in EAX and EDX */
		return true;
	default:
		return r.gpr_reg || r.gpr_rm;
	}
}

static void put(struct vec_shape *s, unsigned b)
{
	if (s->len < sizeof s->code)
		s->code[s->len++] = (uint8_t)b;
}

static void legacy_prefixes(struct vec_shape *s, const struct decoded *d, struct regs r)
{
	const ZydisDecodedInstruction *z = &d->z;
	unsigned rex = 0;

	for (unsigned n = 0; n < z->raw.prefix_count; n++) {
		uint8_t b = z->raw.prefixes[n].value;

		if (b == 0x66 || b == 0xf2 || b == 0xf3)
			put(s, b);
	}
	if (z->attributes & ZYDIS_ATTRIB_HAS_REX)
		rex = 0x40 | z->raw.rex.W << 3 | (r.gpr_reg ? 0 : z->raw.rex.R << 2) | (r.mem || r.gpr_rm ? 0 : z->raw.rex.B);
	if (rex & 0xf)
		put(s, rex);
	if (z->opcode_map != ZYDIS_OPCODE_MAP_DEFAULT)
		put(s, 0x0f);
	if (z->opcode_map == ZYDIS_OPCODE_MAP_0F38)
		put(s, 0x38);
	if (z->opcode_map == ZYDIS_OPCODE_MAP_0F3A)
		put(s, 0x3a);
	put(s, z->opcode_map == ZYDIS_OPCODE_MAP_0F0F ? 0x0f : z->opcode);
}

static void vex_prefix(struct vec_shape *s, const struct decoded *d, struct regs r)
{
	const uint8_t *p = d->bytes + d->z.raw.vex.offset;
	unsigned p1, p2;

	if (p[0] == 0xc5) {
		p1 = (p[1] & 0x80) | 0x61;
		p2 = p[1] & 0x7f;
	} else {
		p1 = p[1];
		p2 = p[2];
	}
	if (d->code_bits != 64) {
		p1 |= 0xe0;
		p2 |= 0x40;
		if (w_is_ignored(d, r))
			p2 &= 0x7f;
	}
	p1 |= (r.mem ? 0x60 : 0) | (r.gpr_rm ? 0x20 : 0) | (r.gpr_reg ? 0x80 : 0);
	put(s, 0xc4);
	put(s, p1);
	put(s, p2);
	put(s, d->z.opcode);
}

static void evex_prefix(struct vec_shape *s, const struct decoded *d, struct regs r)
{
	const uint8_t *p = d->bytes + d->z.raw.evex.offset;
	unsigned p1 = p[1], p2 = p[2], p3 = p[3];

	if (d->code_bits != 64) {
		p1 |= 0xf0;
		p2 |= 0x40;
		p3 |= 0x08;
		if (w_is_ignored(d, r))
			p2 &= 0x7f;
	}
	p1 |= (r.mem || r.gpr_rm ? 0x60 : 0) | (r.gpr_reg ? 0x90 : 0);
	put(s, 0x62);
	put(s, p1);
	put(s, p2);
	put(s, p3);
	put(s, d->z.opcode);
}

static void modrm_and_tail(struct vec_shape *s, const struct decoded *d, struct regs r)
{
	const ZydisDecodedInstruction *z = &d->z;
	unsigned reg = r.gpr_reg ? 0 : z->raw.modrm.reg, rm = r.gpr_rm ? 1 : z->raw.modrm.rm, tail;

	put(s, r.mem ? reg << 3 | 6 : 0xc0 | reg << 3 | rm);
	tail = z->raw.modrm.offset + 1u + (z->raw.sib.offset ? 1 : 0) + z->raw.disp.size / 8;
	for (unsigned n = tail; n < z->length; n++) {
		unsigned b = d->bytes[n];

		/* A register in the immediate has three bits outside 64-bit mode. */
		if (d->code_bits != 64 && z->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
			for (unsigned k = 0; k < z->operand_count_visible; k++)
				if (d->op[k].encoding == ZYDIS_OPERAND_ENCODING_IS4)
					b &= 0x7f;
		put(s, b);
	}
}

bool stub_rewrite(struct vec_shape *s, const struct decoded *d)
{
	const ZydisDecodedInstruction *z = &d->z;
	struct regs r = look(d);

	s->len = 0;
	switch (z->encoding) {
	case ZYDIS_INSTRUCTION_ENCODING_LEGACY:
	case ZYDIS_INSTRUCTION_ENCODING_3DNOW:
		legacy_prefixes(s, d, r);
		break;
	case ZYDIS_INSTRUCTION_ENCODING_VEX:
		vex_prefix(s, d, r);
		break;
	case ZYDIS_INSTRUCTION_ENCODING_EVEX:
		evex_prefix(s, d, r);
		break;
	default:
		return false;
	}
	if (z->attributes & ZYDIS_ATTRIB_HAS_MODRM)
		modrm_and_tail(s, d, r);
	return s->len < sizeof s->code;
}
