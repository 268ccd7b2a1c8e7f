/* MOV and its kin, LEA, XCHG between registers, CMOVcc, SETcc, sign extensions, BSWAP. */
#include "softkvm/interp/ops.h"

#define MOVS(bits)                                                              \
	OP(mov##bits##_rr) { SET##bits(i->dst, GET##bits(i->src)); NEXT; }      \
	OP(mov##bits##_ri) { SET##bits(i->dst, i->imm); NEXT; }                 \
	OP(mov##bits##_rm) { WITH_LD(bits, v, SET##bits(i->dst, v)); }          \
	OP(mov##bits##_mr) { END_ST(bits, GET##bits(i->src)); }                 \
	OP(mov##bits##_mi) { END_ST(bits, i->imm); }                            \
	/* base + displacement only, no segment: most loads and stores */       \
	OP(mov##bits##_rb) { WITH_LD_AT(bits, v, c->gpr[i->base] + (u64)(s64)i->disp, SET##bits(i->dst, v)); } \
	OP(mov##bits##_br) { END_ST_AT(bits, c->gpr[i->base] + (u64)(s64)i->disp, GET##bits(i->src)); } \
	/* the address is the immediate (moffs): always through the segment */  \
	OP(mov##bits##_ro) { WITH_LD_AT(bits, v, moffs(c, i, bits / 8, ACC_READ), SET##bits(R_RAX, v)); } \
	OP(mov##bits##_or) { END_ST_AT(bits, moffs(c, i, bits / 8, ACC_WRITE), GET##bits(R_RAX)); } \
	OP(xchg##bits##_rr) { u##bits a = GET##bits(i->dst), b = GET##bits(i->src); SET##bits(i->dst, b); SET##bits(i->src, a); NEXT; } \
	OP(lea##bits) { SET##bits(i->dst, insn_offset(c, i)); NEXT; }

static u64 moffs(struct cpu *c, const struct insn *i, unsigned size, enum access acc)
{
	u64 o = i->imm;

	if (i->flags & IF_A32)
		o = (u32)o;
	else if (i->flags & IF_A16)
		o = (u16)o;
	if (c->flat)
		return i->seg == SEG_FS || i->seg == SEG_GS ? o + c->seg[i->seg].base : o;
	return seg_lin(c, i->seg, o, size, acc);
}

MOVS(8)
MOVS(16)
MOVS(32)
MOVS(64)

OP(lea64_plain)
{
	SET64(i->dst, c->gpr[i->base] + (c->gpr[i->index] << i->scale) + (u64)(s64)i->disp);
	NEXT;
}

/* MOVZX, MOVSX, MOVSXD: destination size, source size. */
#define EXT(name, st, sb, db)                                                   \
	OP(name##_r) { SET##db(i->dst, (st)GET##sb(i->src)); NEXT; }            \
	OP(name##_m) { WITH_LD(sb, v, SET##db(i->dst, (st)v)); }
EXT(movzx16_8, u8, 8, 16)
EXT(movzx32_8, u8, 8, 64)
EXT(movzx32_16, u16, 16, 64)
EXT(movsx16_8, s8, 8, 16)
EXT(movsx32_8, s8, 8, 32)
EXT(movsx64_8, s8, 8, 64)
EXT(movsx16_16, s16, 16, 16)
EXT(movsx32_16, s16, 16, 32)
EXT(movsx64_16, s16, 16, 64)
EXT(movsx16_32, s32, 32, 16)       /* MOVSXD of 16 bits reads all 32, as the CPU's page faults show */
EXT(movsx32_32, s32, 32, 32)
EXT(movsx64_32, s32, 32, 64)

/* MOVBE. */
#define BE(bits, swap)                                                          \
	OP(movbe##bits##_rm) { WITH_LD(bits, v, SET##bits(i->dst, swap(v))); }  \
	OP(movbe##bits##_mr) { END_ST(bits, swap(GET##bits(i->src))); }
BE(16, __builtin_bswap16)
BE(32, __builtin_bswap32)
BE(64, __builtin_bswap64)

/* Undefined for 16 bits: let the CPU decide. */
OP(bswap16)
{
	u32 v = GET16(i->dst);

	__asm__(".byte 0x66, 0x0f, 0xc8" : "+a"(v));
	SET16(i->dst, v);
	NEXT;
}
OP(bswap32) { SET32(i->dst, __builtin_bswap32(GET32(i->dst))); NEXT; }
OP(bswap64) { SET64(i->dst, __builtin_bswap64(GET64(i->dst))); NEXT; }

/* Condition codes: one handler per code, size and source. */
#define CMOV(cc, bits)                                                          \
	OP(cmov##bits##_r_##cc) { u##bits v = cond(c, cc) ? GET##bits(i->src) : GET##bits(i->dst); SET##bits(i->dst, v); NEXT; } \
	OP(cmov##bits##_m_##cc) { WITH_LD(bits, v, v = cond(c, cc) ? v : GET##bits(i->dst); SET##bits(i->dst, v)); }
#define CC_ALL(F, ...) F(0, ##__VA_ARGS__) F(1, ##__VA_ARGS__) F(2, ##__VA_ARGS__) F(3, ##__VA_ARGS__) \
	F(4, ##__VA_ARGS__) F(5, ##__VA_ARGS__) F(6, ##__VA_ARGS__) F(7, ##__VA_ARGS__) F(8, ##__VA_ARGS__) \
	F(9, ##__VA_ARGS__) F(10, ##__VA_ARGS__) F(11, ##__VA_ARGS__) F(12, ##__VA_ARGS__) F(13, ##__VA_ARGS__) \
	F(14, ##__VA_ARGS__) F(15, ##__VA_ARGS__)
CC_ALL(CMOV, 16)
CC_ALL(CMOV, 32)
CC_ALL(CMOV, 64)
#define SETCC(cc)                                                               \
	OP(set_r_##cc) { SET8(i->dst, cond(c, cc)); NEXT; }                     \
	OP(set_m_##cc) { END_ST(8, cond(c, cc)); }
CC_ALL(SETCC)

/* Accumulator extensions. */
OP(cbw) { SET16(R_RAX * 8, (s8)GET8(R_RAX * 8)); NEXT; }
OP(cwde) { SET32(R_RAX * 8, (s16)GET16(R_RAX * 8)); NEXT; }
OP(cdqe) { SET64(R_RAX * 8, (s32)GET32(R_RAX * 8)); NEXT; }
OP(cwd) { SET16(R_RDX * 8, (s16)GET16(R_RAX * 8) >> 15); NEXT; }
OP(cdq) { SET32(R_RDX * 8, (s32)GET32(R_RAX * 8) >> 31); NEXT; }
OP(cqo) { SET64(R_RDX * 8, (s64)GET64(R_RAX * 8) >> 63); NEXT; }

/* -- decoding ---------------------------------------------------------------------------------- */
enum { M_RR, M_RI, M_RM, M_MR, M_MI, M_RB, M_BR, M_RO, M_OR, M_XCHG, M_LEA, M_COUNT };
#define MROW(bits) { mov##bits##_rr, mov##bits##_ri, mov##bits##_rm, mov##bits##_mr, mov##bits##_mi, mov##bits##_rb, \
		     mov##bits##_br, mov##bits##_ro, mov##bits##_or, xchg##bits##_rr, lea##bits }
static insn_fn *const movs[4][M_COUNT] = { MROW(8), MROW(16), MROW(32), MROW(64) };
#define CROW(cc) { { cmov16_r_##cc, cmov16_m_##cc }, { cmov32_r_##cc, cmov32_m_##cc }, { cmov64_r_##cc, cmov64_m_##cc } },
static insn_fn *const cmovs[16][3][2] = { CC_ALL(CROW) };
#define SROW(cc) { set_r_##cc, set_m_##cc },
static insn_fn *const sets[16][2] = { CC_ALL(SROW) };

static bool simple_ea(const struct insn *i)
{
	return !(i->flags & IF_EA_SLOW) && i->index == R_ZERO;
}

/* A0..A3: the address may have 64 bits. */
static bool decode_moffs(struct insn *i, const struct decoded *d, unsigned m, unsigned s)
{
	insn_set_mem(i, d, &d->op[m]);
	i->imm = (u64)d->op[m].mem.disp.value;
	i->fn = movs[s][m ? M_RO : M_OR];
	return true;
}

static bool decode_mov(struct insn *i, const struct decoded *d)
{
	unsigned s = size_index(d->op[0].size), m = is_mem(d, 0) ? 0 : 1;

	if (d->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER &&
	    ZydisRegisterGetClass(d->op[0].reg.value) > ZYDIS_REGCLASS_GPR64)
		return false;   /* segment, control, debug registers: sys */
	if (d->op[1].type == ZYDIS_OPERAND_TYPE_REGISTER &&
	    ZydisRegisterGetClass(d->op[1].reg.value) > ZYDIS_REGCLASS_GPR64)
		return false;
	if (d->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && d->z.opcode >= 0xa0 && d->z.opcode <= 0xa3)
		return decode_moffs(i, d, m, s);
	if (is_imm(d, 1))
		i->imm = d->op[1].imm.value.u;
	else if (is_reg(d, 1))
		i->src = reg_off(d, 1);
	if (is_reg(d, 0))
		i->dst = reg_off(d, 0);
	if (is_mem(d, m))
		insn_set_mem(i, d, &d->op[m]);
	if (is_mem(d, 0))
		i->fn = movs[s][is_imm(d, 1) ? M_MI : simple_ea(i) ? M_BR : M_MR];
	else if (is_mem(d, 1))
		i->fn = movs[s][simple_ea(i) ? M_RB : M_RM];
	else
		i->fn = movs[s][is_imm(d, 1) ? M_RI : M_RR];
	return true;
}

static insn_fn *extension(bool sign, unsigned db, unsigned sb, bool mem)
{
#define PICK(name) (mem ? name##_m : name##_r)
	if (!sign && sb == 8)
		return db == 16 ? PICK(movzx16_8) : PICK(movzx32_8);
	if (!sign)
		return db == 16 ? mem ? mov16_rm : mov16_rr : PICK(movzx32_16);
	if (sb == 8)
		return db == 16 ? PICK(movsx16_8) : db == 32 ? PICK(movsx32_8) : PICK(movsx64_8);
	if (sb == 16)
		return db == 16 ? PICK(movsx16_16) : db == 32 ? PICK(movsx32_16) : PICK(movsx64_16);
	return db == 16 ? PICK(movsx16_32) : db == 32 ? PICK(movsx32_32) : PICK(movsx64_32);
#undef PICK
}

static bool decode_ext(struct insn *i, const struct decoded *d, bool sign)
{
	i->dst = reg_off(d, 0);
	if (is_mem(d, 1))
		insn_set_mem(i, d, &d->op[1]);
	else
		i->src = reg_off(d, 1);
	i->fn = extension(sign, d->op[0].size, d->op[1].size, is_mem(d, 1));
	return true;
}

static bool decode_lea(struct insn *i, const struct decoded *d)
{
	unsigned s = size_index(d->op[0].size);

	i->dst = reg_off(d, 0);
	insn_set_mem(i, d, &d->op[1]);
	i->fn = movs[s][M_LEA];
	if (s == 3 && !(i->flags & (IF_A32 | IF_A16 | IF_RIPREL)))
		i->fn = lea64_plain;
	return true;
}

static bool decode_cmov(struct insn *i, const struct decoded *d)
{
	i->dst = reg_off(d, 0);
	if (is_mem(d, 1))
		insn_set_mem(i, d, &d->op[1]);
	else
		i->src = reg_off(d, 1);
	i->fn = cmovs[d->z.opcode & 15][size_index(d->op[0].size) - 1][is_mem(d, 1)];
	return true;
}

static bool decode_setcc(struct insn *i, const struct decoded *d)
{
	if (is_mem(d, 0))
		insn_set_mem(i, d, &d->op[0]);
	else
		i->dst = reg_off(d, 0);
	i->fn = sets[d->z.opcode & 15][is_mem(d, 0)];
	return true;
}

static bool decode_movbe(struct insn *i, const struct decoded *d)
{
	static insn_fn *const be[3][2] = { { movbe16_rm, movbe16_mr }, { movbe32_rm, movbe32_mr }, { movbe64_rm, movbe64_mr } };
	unsigned m = is_mem(d, 0) ? 0 : 1;

	insn_set_mem(i, d, &d->op[m]);
	if (m)
		i->dst = reg_off(d, 0);
	else
		i->src = reg_off(d, 1);
	i->fn = be[size_index(d->op[0].size) - 1][!m];
	return true;
}

static bool decode_bswap(struct insn *i, const struct decoded *d)
{
	i->dst = reg_off(d, 0);
	i->fn = d->op[0].size == 64 ? bswap64 : d->op[0].size == 32 ? bswap32 : bswap16;
	return true;
}

bool ops_mov_decode(struct insn *i, const struct decoded *d)
{
	bool map0f = d->z.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && d->z.opcode_map == ZYDIS_OPCODE_MAP_0F;

	if (i->flags & IF_LOCK)
		return false;
	if (map0f && (d->z.opcode & 0xf0) == 0x40)
		return decode_cmov(i, d);
	if (map0f && (d->z.opcode & 0xf0) == 0x90)
		return decode_setcc(i, d);
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_MOV:
	case ZYDIS_MNEMONIC_MOVNTI:
		return decode_mov(i, d);
	case ZYDIS_MNEMONIC_MOVZX: return decode_ext(i, d, false);
	case ZYDIS_MNEMONIC_MOVSX:
	case ZYDIS_MNEMONIC_MOVSXD:
		return decode_ext(i, d, true);
	case ZYDIS_MNEMONIC_MOVBE: return decode_movbe(i, d);
	case ZYDIS_MNEMONIC_LEA: return decode_lea(i, d);
	case ZYDIS_MNEMONIC_BSWAP: return decode_bswap(i, d);
	case ZYDIS_MNEMONIC_XCHG:
		if (is_mem(d, 0) || is_mem(d, 1))
			return false;
		i->dst = reg_off(d, 0);
		i->src = reg_off(d, 1);
		i->fn = movs[size_index(d->op[0].size)][M_XCHG];
		return true;
	case ZYDIS_MNEMONIC_CBW: i->fn = cbw; return true;
	case ZYDIS_MNEMONIC_CWDE: i->fn = cwde; return true;
	case ZYDIS_MNEMONIC_CDQE: i->fn = cdqe; return true;
	case ZYDIS_MNEMONIC_CWD: i->fn = cwd; return true;
	case ZYDIS_MNEMONIC_CDQ: i->fn = cdq; return true;
	case ZYDIS_MNEMONIC_CQO: i->fn = cqo; return true;
	default: return false;
	}
}
