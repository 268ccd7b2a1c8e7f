/* SHL SHR SAR ROL ROR RCL RCR, SHLD SHRD. A count of zero keeps the flags, so they are loaded first. */
#include "softkvm/interp/ops.h"

#define SH(op, bits, dst_, con, cnt) do {                                       \
		u32 f_ = c->aflags;                                             \
		__asm__(FLAGS_IN #op SFX##bits " %%cl, %[d]" FLAGS_OUT          \
			: [d] con (dst_), "+&a"(f_) : "c"((u8)(cnt)) : "cc");   \
		c->aflags = (u16)f_;                                            \
	} while (0)
/*
 * A 32-bit register is zero-extended even when the count is 0.
 */
#define SHIFT(op, bits)                                                         \
	OP(op##bits##_ri) { u##bits v = GET##bits(i->dst); SH(op, bits, v, "+&r", i->imm); SET##bits(i->dst, v); NEXT; } \
	OP(op##bits##_rc) { u##bits v = GET##bits(i->dst); SH(op, bits, v, "+&r", GET8(R_RCX * 8)); SET##bits(i->dst, v); NEXT; } \
	OP(op##bits##_mi) { WITH_RMW(bits, m, SH(op, bits, *m, "+m", i->imm);); } \
	OP(op##bits##_mc) { WITH_RMW(bits, m, SH(op, bits, *m, "+m", GET8(R_RCX * 8));); }
#define SHIFTS(op) SHIFT(op, 8) SHIFT(op, 16) SHIFT(op, 32) SHIFT(op, 64)
SHIFTS(shl)
SHIFTS(shr)
SHIFTS(sar)
SHIFTS(rol)
SHIFTS(ror)
SHIFTS(rcl)
SHIFTS(rcr)

#define DSH(op, bits, dst_, con, cnt) do {                                      \
		u32 f_ = c->aflags;                                             \
		__asm__(FLAGS_IN #op SFX##bits " %%cl, %[s], %[d]" FLAGS_OUT    \
			: [d] con (dst_), "+&a"(f_) : "c"((u8)(cnt)), [s] "r"(GET##bits(i->src)) : "cc"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define DOUBLE(op, bits)                                                        \
	OP(op##bits##_ri) { u##bits v = GET##bits(i->dst); DSH(op, bits, v, "+&r", i->imm); SET##bits(i->dst, v); NEXT; } \
	OP(op##bits##_rc) { u##bits v = GET##bits(i->dst); DSH(op, bits, v, "+&r", GET8(R_RCX * 8)); SET##bits(i->dst, v); NEXT; } \
	OP(op##bits##_mi) { WITH_RMW(bits, m, DSH(op, bits, *m, "+m", i->imm);); } \
	OP(op##bits##_mc) { WITH_RMW(bits, m, DSH(op, bits, *m, "+m", GET8(R_RCX * 8));); }
DOUBLE(shld, 16) DOUBLE(shld, 32) DOUBLE(shld, 64)
DOUBLE(shrd, 16) DOUBLE(shrd, 32) DOUBLE(shrd, 64)

#define ROW(op, bits) { op##bits##_ri, op##bits##_rc, op##bits##_mi, op##bits##_mc }
#define TABLE(op) { ROW(op, 8), ROW(op, 16), ROW(op, 32), ROW(op, 64) }
static insn_fn *const shifts[][4][4] = { TABLE(shl), TABLE(shr), TABLE(sar), TABLE(rol), TABLE(ror), TABLE(rcl), TABLE(rcr) };
#define DTABLE(op) { ROW(op, 16), ROW(op, 32), ROW(op, 64) }
static insn_fn *const doubles[][3][4] = { DTABLE(shld), DTABLE(shrd) };

static unsigned operands(struct insn *i, const struct decoded *d, unsigned count)
{
	if (is_mem(d, 0))
		insn_set_mem(i, d, &d->op[0]);
	else
		i->dst = reg_off(d, 0);
	if (is_imm(d, count))
		i->imm = (u8)d->op[count].imm.value.u;
	return (is_mem(d, 0) ? 2 : 0) + !is_imm(d, count);
}

static bool decode_shift(struct insn *i, const struct decoded *d, unsigned n)
{
	i->fn = shifts[n][size_index(d->op[0].size)][operands(i, d, 1)];
	return true;
}

static bool decode_double(struct insn *i, const struct decoded *d, unsigned n)
{
	i->src = reg_off(d, 1);
	i->fn = doubles[n][size_index(d->op[0].size) - 1][operands(i, d, 2)];
	return true;
}

bool ops_shift_decode(struct insn *i, const struct decoded *d)
{
	if (i->flags & IF_LOCK)
		return false;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_SHL: return decode_shift(i, d, 0);
	case ZYDIS_MNEMONIC_SHR: return decode_shift(i, d, 1);
	case ZYDIS_MNEMONIC_SAR: return decode_shift(i, d, 2);
	case ZYDIS_MNEMONIC_ROL: return decode_shift(i, d, 3);
	case ZYDIS_MNEMONIC_ROR: return decode_shift(i, d, 4);
	case ZYDIS_MNEMONIC_RCL: return decode_shift(i, d, 5);
	case ZYDIS_MNEMONIC_RCR: return decode_shift(i, d, 6);
	case ZYDIS_MNEMONIC_SHLD: return decode_double(i, d, 0);
	case ZYDIS_MNEMONIC_SHRD: return decode_double(i, d, 1);
	default: return false;
	}
}
