/*
 * A decoder in front of Zydis for the forms that compilers use most, in 64-bit code: one-byte opcodes and those behind 0F, with at most one of
 * the prefixes 66, F2, F3, FS and GS, and REX.
 *
 * What Zydis says of an instruction depends on its prefixes, its opcode and whether its operand is memory, and for some opcodes on modrm.reg: these
 * are the key of a form, of which the result of Zydis is remembered. All else in it is register numbers, the address, displacement and immediate:
 * they are put into a copy. Whatever is not in the lists, is cut off, or has other operands than those known here is left to Zydis,
 * which is also the twin that tests/softkvm/interp/quick_test compares with.
 *
 * What the interpreter makes of an integer instruction depends on all but its displacement and immediate in a way that nobody need know here: the result
 * for the same prefix, REX, opcode, modrm and sib is remembered (struct quick_memo), and these two are filled in.
 */
#include "softkvm/interp/quick.h"

#include <string.h>

#include "base/util.h"

/* What follows an opcode, and what its key needs. */
enum {
	Q_OK = 1, Q_MODRM = 2,
	Q_GROUP = 4,            /* modrm.reg is more opcode */
	Q_FIRST = 8,            /* and only 0 is taken: with others modrm.rm is opcode as well */
	Q_BRANCH = 16,          /* what 66 does depends on the processor's maker */
	Q_BARE = 64,            /* REX makes it another instruction */
	Q_FORM = 32,            /* more is made of it than a handler, operands and values as they are */
};

#define M (Q_OK | Q_MODRM)
#define G (Q_OK | Q_MODRM | Q_GROUP)
#define B (Q_OK | Q_BRANCH)
#define V (M | Q_FORM)
static const uint8_t one_byte[256] = {
	[0x00 ... 0x03] = M, [0x04 ... 0x05] = Q_OK, [0x08 ... 0x0b] = M, [0x0c ... 0x0d] = Q_OK,
	[0x10 ... 0x13] = M, [0x14 ... 0x15] = Q_OK, [0x18 ... 0x1b] = M, [0x1c ... 0x1d] = Q_OK,
	[0x20 ... 0x23] = M, [0x24 ... 0x25] = Q_OK, [0x28 ... 0x2b] = M, [0x2c ... 0x2d] = Q_OK,
	[0x30 ... 0x33] = M, [0x34 ... 0x35] = Q_OK, [0x38 ... 0x3b] = M, [0x3c ... 0x3d] = Q_OK,
	[0x50 ... 0x5f] = Q_OK, [0x63] = M, [0x68] = Q_OK, [0x69] = M, [0x6a] = Q_OK, [0x6b] = M, [0x70 ... 0x7f] = B,
	[0x80 ... 0x81] = G, [0x83] = G, [0x84 ... 0x8b] = M, [0x8d] = M, [0x90] = Q_OK | Q_BARE, [0x98 ... 0x99] = Q_OK, [0x9c] = Q_OK,
	[0xa4 ... 0xa5] = Q_OK, [0xa8 ... 0xab] = Q_OK,
	[0xb0 ... 0xbf] = Q_OK, [0xc0 ... 0xc1] = G, [0xc3] = B, [0xc6 ... 0xc7] = G | Q_FIRST, [0xc9] = Q_OK, [0xd0 ... 0xd3] = G,
	[0xe8 ... 0xe9] = B, [0xeb] = B, [0xf6 ... 0xf7] = G, [0xfa ... 0xfb] = Q_OK, [0xfe] = G, [0xff] = G | Q_BRANCH,
};
static const uint8_t two_byte[256] = {
	[0x05] = Q_OK, [0x0b] = Q_OK, [0x10 ... 0x17] = V, [0x1f] = G, [0x28 ... 0x2f] = V, [0x40 ... 0x4f] = M, [0x51 ... 0x6f] = V, [0x74 ... 0x76] = V, [0x7e ... 0x7f] = V,
	[0x80 ... 0x8f] = B, [0x90 ... 0x9f] = M, [0xa3] = M, [0xab] = M, [0xaf] = M, [0xb3] = M, [0xb6 ... 0xb7] = M, [0xba] = G | Q_FORM, [0xbb ... 0xbf] = M,
	[0xc6] = V, [0xc8 ... 0xcf] = Q_OK, [0xd4] = V, [0xd6] = V, [0xda ... 0xdb] = V, [0xde ... 0xdf] = V, [0xeb] = V, [0xef] = V, [0xf8 ... 0xfe] = V,
};
#undef V
#undef M
#undef G
#undef B

/* An instruction taken apart. */
struct parts {
	const uint8_t *bytes;
	uint32_t key;
	bool has_modrm, mem, has_sib, rip, form;
	uint8_t rex, rex_at, opcode, modrm, modrm_at, sib, disp_size, end;      /* end: where the immediate begins */
	int32_t disp;
};

static unsigned prefix_class(uint8_t b)
{
	switch (b) {
	case 0x66: return 1;
	case 0xf2: return 2;
	case 0xf3: return 3;
	case 0x64: return 4;
	case 0x65: return 5;
	default: return 0;
	}
}

/* modrm, sib and displacement at `at`, all within `avail`. */
static bool take_modrm(struct parts *p, unsigned at, unsigned avail)
{
	if (at >= avail)
		return false;
	p->has_modrm = true;
	p->modrm = p->bytes[at];
	p->modrm_at = (uint8_t)at++;
	p->mem = p->modrm < 0xc0;
	if (p->mem) {
		unsigned mod = p->modrm >> 6, rm = p->modrm & 7;

		if (rm == 4) {
			if (at >= avail)
				return false;
			p->has_sib = true;
			p->sib = p->bytes[at++];
			rm = p->sib & 7;
		}
		p->rip = !mod && rm == 5 && !p->has_sib;
		p->disp_size = mod == 1 ? 1 : mod == 2 || (!mod && rm == 5) ? 4 : 0;
		if (at + p->disp_size > avail)
			return false;
		if (p->disp_size)
			p->disp = p->disp_size == 1 ? (int8_t)p->bytes[at] : (int32_t)ld_le32(p->bytes + at);
		at += p->disp_size;
	}
	p->end = (uint8_t)at;
	return true;
}

static bool take_apart(struct parts *p, const uint8_t *bytes, unsigned avail)
{
	unsigned at = 0, pre, kind, map = 0;

	*p = (struct parts){ .bytes = bytes };
	pre = avail ? prefix_class(bytes[0]) : 0;
	at += pre > 0;
	if (at < avail && (bytes[at] & 0xf0) == 0x40) {
		p->rex_at = (uint8_t)at;
		p->rex = bytes[at++];
	}
	if (at < avail && bytes[at] == 0x0f) {
		map = 1;
		at++;
	}
	if (at >= avail)
		return false;
	p->opcode = bytes[at++];
	kind = (map ? two_byte : one_byte)[p->opcode];
	if (!kind || ((kind & Q_BRANCH) && pre == 1) || ((kind & Q_BARE) && p->rex))
		return false;
	p->form = kind & Q_FORM;
	p->end = (uint8_t)at;
	if (((kind & Q_MODRM) && !take_modrm(p, at, avail)) || ((kind & Q_FIRST) && (p->modrm & 0x38)))
		return false;
	p->key = 1u << 31 | pre << 16 | (unsigned)(p->rex != 0) << 15 | (unsigned)(p->rex >> 3 & 1) << 14 | (unsigned)p->mem << 13 |
		 (kind & Q_GROUP ? (p->modrm >> 3 & 7u) << 9 : 0) | map << 8 | p->opcode;
	return true;
}

/* Two places where a form may be. */
static struct quick_form *form_at(struct quick *q, uint32_t key, unsigned second)
{
	return &q->form[(key * 0x9e3779b1u >> (32 - QUICK_BITS)) ^ second];
}

static const struct quick_form *form_of(struct quick *q, uint32_t key)
{
	const struct quick_form *f = form_at(q, key, 0);

	if (likely(f->key == key))
		return f;
	f = form_at(q, key, 1);
	return f->key == key ? f : NULL;
}

/* -- filling in ---------------------------------------------------------------------------------- */
static bool gpr8(ZydisRegister r) { return r >= ZYDIS_REGISTER_AL && r <= ZYDIS_REGISTER_R15B; }

/* The first register of r's kind; NONE: a kind that is not known here. */
static ZydisRegister first_of(ZydisRegister r)
{
	static const struct { ZydisRegister first, last; } kind[] = {
		{ ZYDIS_REGISTER_AL, ZYDIS_REGISTER_R15B }, { ZYDIS_REGISTER_AX, ZYDIS_REGISTER_R15W }, { ZYDIS_REGISTER_EAX, ZYDIS_REGISTER_R15D },
		{ ZYDIS_REGISTER_RAX, ZYDIS_REGISTER_R15 }, { ZYDIS_REGISTER_MM0, ZYDIS_REGISTER_MM7 }, { ZYDIS_REGISTER_XMM0, ZYDIS_REGISTER_XMM15 },
	};

	for (unsigned n = 0; n < ARRAY_SIZE(kind); n++)
		if (r >= kind[n].first && r <= kind[n].last)
			return kind[n].first;
	return ZYDIS_REGISTER_NONE;
}

static void set_reg(ZydisDecodedOperand *op, unsigned n, bool rex)
{
	ZydisRegister first = op->reg.value;    /* form_keep() put it there */

	if (first == ZYDIS_REGISTER_MM0)
		n &= 7;
	else if (gpr8(first) && (n > 7 || (n > 3 && rex)))
		n += ZYDIS_REGISTER_SPL - ZYDIS_REGISTER_AL - 4;
	op->reg.value = first + n;
}

static void set_mem(ZydisDecodedOperandMem *m, const struct parts *p, bool segment)
{
	unsigned base = p->modrm & 7, index = 4;

	if (p->has_sib) {
		base = p->sib & 7;
		index = (p->sib >> 3 & 7u) | (p->rex & 2u) << 2;
	}
	m->base = p->rip ? ZYDIS_REGISTER_RIP : base == 5 && p->modrm < 0x40 ? ZYDIS_REGISTER_NONE : ZYDIS_REGISTER_RAX + (base | (p->rex & 1u) << 3);
	m->index = index == 4 ? ZYDIS_REGISTER_NONE : ZYDIS_REGISTER_RAX + index;
	m->scale = index == 4 ? 0 : (uint8_t)(1u << (p->sib >> 6));
	if (!segment)
		m->segment = m->base == ZYDIS_REGISTER_RSP || m->base == ZYDIS_REGISTER_RBP ? ZYDIS_REGISTER_SS : ZYDIS_REGISTER_DS;
	m->disp.has_displacement = p->disp_size != 0;
	m->disp.value = p->disp;
}

static void set_raw(ZydisDecodedInstruction *z, const struct parts *p)
{
	if (p->rex) {
		z->raw.prefixes[z->raw.prefix_count - 1].value = p->rex;
		z->raw.rex.W = p->rex >> 3 & 1;
		z->raw.rex.R = p->rex >> 2 & 1;
		z->raw.rex.X = p->rex >> 1 & 1;
		z->raw.rex.B = p->rex & 1;
		z->raw.rex.offset = p->rex_at;
	}
	if (!p->has_modrm)
		return;
	z->raw.modrm.mod = p->modrm >> 6;
	z->raw.modrm.reg = p->modrm >> 3 & 7;
	z->raw.modrm.rm = p->modrm & 7;
	z->raw.modrm.offset = p->modrm_at;
	if (p->has_sib) {
		z->attributes |= ZYDIS_ATTRIB_HAS_SIB;
		z->raw.sib.scale = p->sib >> 6;
		z->raw.sib.index = p->sib >> 3 & 7;
		z->raw.sib.base = p->sib & 7;
		z->raw.sib.offset = p->modrm_at + 1;
	}
	if (p->rip)
		z->attributes |= ZYDIS_ATTRIB_IS_RELATIVE;
	if (p->disp_size) {
		z->raw.disp.value = p->disp;
		z->raw.disp.size = (uint8_t)(p->disp_size * 8);
		z->raw.disp.offset = p->end - p->disp_size;
	}
}

static int64_t immediate(const uint8_t *at, unsigned size, bool sign)
{
	switch (size) {
	case 8: return sign ? (int8_t)*at : *at;
	case 16: return sign ? (int16_t)ld_le16(at) : ld_le16(at);
	case 32: return sign ? (int32_t)ld_le32(at) : (int64_t)ld_le32(at);
	default: return (int64_t)ld_le64(at);
	}
}

/* Behind the prefixes, of which those beyond their number are nobody's. */
#define RAW_REST offsetof(ZydisDecodedInstruction, raw.encoding2)

/* memset() of this size is a string instruction to compilers, which takes longer than all else here. */
static inline void clear(uint8_t *p, size_t n)
{
	for (; n >= 16; p += 16, n -= 16)
		memset(p, 0, 16);
	memset(p, 0, n & 15);
}

bool quick_decode(struct quick *q, const uint8_t *bytes, unsigned avail, ZydisDecodedInstruction *z, ZydisDecodedOperand *op)
{
	const struct quick_form *f;
	struct parts p;
	unsigned imm;

	if (!take_apart(&p, bytes, avail) || !(f = form_of(q, p.key)) || p.end + (imm = f->imm.size / 8u) > avail)
		return false;
	memcpy(z, f->head, sizeof f->head);
	clear((uint8_t *)z + RAW_REST, sizeof *z - RAW_REST);
	for (unsigned n = f->nop; n < ZYDIS_MAX_OPERAND_COUNT; n++)
		op[n].type = ZYDIS_OPERAND_TYPE_UNUSED;
	z->length = (uint8_t)(p.end + imm);
	z->opcode = p.opcode;
	set_raw(z, &p);
	if (imm) {
		z->raw.imm[0] = f->imm;
		z->raw.imm[0].offset = p.end;
		z->raw.imm[0].value.s = immediate(bytes + p.end, f->imm.size, f->imm.is_signed);
	}
	for (unsigned n = 0; n < f->nop; n++) {
		op[n] = f->op[n];
		switch (f->fill[n]) {
		case QUICK_REG: set_reg(&op[n], (p.modrm >> 3 & 7u) | (p.rex & 4u) << 1, p.rex); break;
		case QUICK_RM: set_reg(&op[n], (p.modrm & 7u) | (p.rex & 1u) << 3, p.rex); break;
		case QUICK_OPCODE: set_reg(&op[n], (p.opcode & 7u) | (p.rex & 1u) << 3, p.rex); break;
		case QUICK_MEM: set_mem(&op[n].mem, &p, z->attributes & ZYDIS_ATTRIB_HAS_SEGMENT); break;
		case QUICK_IMM: op[n].imm.value.s = z->raw.imm[0].value.s; break;
		default: break;
		}
	}
	return true;
}

/* -- remembering --------------------------------------------------------------------------------- */
/* What of this operand is to be filled in; QUICK_NOT: something that is not known here. */
static enum quick_fill fill_of(const ZydisDecodedOperand *op, const ZydisDecodedInstruction *z)
{
	bool reg = op->type == ZYDIS_OPERAND_TYPE_REGISTER && first_of(op->reg.value) != ZYDIS_REGISTER_NONE;

	switch (op->encoding) {
	case ZYDIS_OPERAND_ENCODING_NONE:
		return QUICK_KEEP;
	case ZYDIS_OPERAND_ENCODING_MODRM_REG:
		return reg ? QUICK_REG : QUICK_NOT;
	case ZYDIS_OPERAND_ENCODING_MODRM_RM:
		return reg ? QUICK_RM : op->type == ZYDIS_OPERAND_TYPE_MEMORY && op->mem.type != ZYDIS_MEMOP_TYPE_MIB ? QUICK_MEM : QUICK_NOT;
	case ZYDIS_OPERAND_ENCODING_OPCODE:
		return reg ? QUICK_OPCODE : QUICK_NOT;
	default:
		return op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE && z->raw.imm[0].size ? QUICK_IMM : QUICK_NOT;
	}
}

void quick_learn(struct quick *q, const uint8_t *bytes, unsigned avail, const ZydisDecodedInstruction *z, const ZydisDecodedOperand *op)
{
	enum quick_fill fill[QUICK_OPS];
	struct quick_form *f;
	struct parts p;

	if (!take_apart(&p, bytes, avail) || z->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || z->raw.imm[1].size || z->operand_count > QUICK_OPS ||
	    z->length != p.end + z->raw.imm[0].size / 8 || z->raw.prefix_count != (prefix_class(bytes[0]) > 0) + (p.rex != 0))
		return;
	for (unsigned n = 0; n < z->operand_count; n++)
		if ((fill[n] = fill_of(&op[n], z)) == QUICK_NOT)
			return;
	if (form_of(q, p.key))          /* there was no more to read of this one */
		return;
	f = form_at(q, p.key, 0);
	if (f->key)                     /* what was there longest goes */
		*form_at(q, p.key, 1) = *f;
	memcpy(f->head, z, sizeof f->head);
	memcpy(f->op, op, z->operand_count * sizeof *op);
	f->imm = z->raw.imm[0];
	f->nop = z->operand_count;
	for (unsigned n = 0; n < f->nop; n++) {
		f->fill[n] = (uint8_t)fill[n];
		if (fill[n] >= QUICK_REG && fill[n] <= QUICK_OPCODE)
			f->op[n].reg.value = first_of(op[n].reg.value);
	}
	if (p.mem) {
		ZydisInstructionAttributes a = z->attributes & ~(ZYDIS_ATTRIB_HAS_SIB | ZYDIS_ATTRIB_IS_RELATIVE);

		memcpy(f->head + offsetof(ZydisDecodedInstruction, attributes), &a, sizeof a);
	}
	f->key = p.key;
}

/* -- whole instructions -------------------------------------------------------------------------- */
/* What becomes of the immediate in struct insn. */
enum memo_imm { MEMO_ZERO, MEMO_SIGN, MEMO_BYTE, MEMO_TARGET /* from the start of the block */ };

static uint64_t memo_key(const struct parts *p)
{
	return (uint64_t)p->key << 32 | (uint64_t)p->rex << 24 | (uint64_t)p->has_sib << 16 | (p->has_modrm ? p->modrm << 8 : 0) | p->sib;
}

static unsigned memo_index(uint64_t key) { return (unsigned)(key * 0x9e3779b97f4a7c15ull >> (64 - MEMO_BITS)); }

static bool memo_fill(const struct quick_memo *m, const struct parts *p, unsigned off, struct insn *i)
{
	int64_t disp = p->disp;

	*i = m->insn;
	i->off = (uint16_t)off;
	i->len = (uint8_t)(p->end + m->imm / 8u);
	if (p->rip)
		disp += i->off + i->len;
	if (disp != (int32_t)disp)
		return false;
	if (i->flags & IF_MEM)          /* a NOP's is nobody's */
		i->disp = (int32_t)disp;
	if (m->imm)
		i->imm = (uint64_t)immediate(p->bytes + p->end, m->imm, m->kind != MEMO_ZERO);
	if (m->kind == MEMO_BYTE)
		i->imm = (uint8_t)i->imm;
	else if (m->kind == MEMO_TARGET)
		i->imm += i->off + i->len;
	return true;
}

bool quick_insn(const struct quick *q, const uint8_t *bytes, unsigned avail, unsigned off, struct insn *i)
{
	const struct quick_memo *m;
	struct parts p;
	uint64_t key;

	if (!take_apart(&p, bytes, avail))
		return false;
	key = memo_key(&p);
	m = &q->memo[memo_index(key)];
	return m->key == key && p.end + m->imm / 8u <= avail && memo_fill(m, &p, off, i);
}

static enum memo_imm memo_imm(const struct parts *p, const ZydisDecodedInstruction *z)
{
	if (z->raw.imm[0].is_relative)
		return MEMO_TARGET;
	if (z->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (p->opcode & 0xfe) == 0xc0)    /* shifts */
		return MEMO_BYTE;
	return z->raw.imm[0].is_signed ? MEMO_SIGN : MEMO_ZERO;
}

void quick_insn_learn(struct quick *q, const uint8_t *bytes, unsigned avail, const ZydisDecodedInstruction *z, const struct insn *i)
{
	struct quick_memo m = { .insn = *i, .imm = z->raw.imm[0].size };
	struct parts p;
	struct insn same;

	if (!take_apart(&p, bytes, avail) || p.form || (i->flags & (IF_ONCE | IF_RIPREL)) || i->len != p.end + m.imm / 8u || z->raw.imm[1].size)
		return;
	m.key = memo_key(&p);
	m.kind = memo_imm(&p, z);
	if (memo_fill(&m, &p, i->off, &same) && !memcmp(&same, i, sizeof same))
		q->memo[memo_index(m.key)] = m;
}
