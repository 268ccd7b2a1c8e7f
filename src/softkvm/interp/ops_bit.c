/* BT BTS BTR BTC, BSF BSR, LZCNT TZCNT POPCNT, CRC32. */
#include "softkvm/interp/ops.h"

/* -- bit tests --------------------------------------------------------------------------------- */
#define BIT_R(op, bits, v, n) do {                                              \
		u32 f_ = c->aflags;                                             \
		__asm__(FLAGS_IN #op SFX##bits " %[nr], %[val]" FLAGS_OUT          \
			: [val] "+&r"(v), "+&a"(f_) : [nr] "r"((u##bits)(n)) : "cc"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
/* The bit number is already reduced: the host must not look beyond the operand. */
#define BIT_M(pfx, op, bits, m, n) do {                                         \
		u32 f_ = c->aflags;                                             \
		__asm__ volatile(FLAGS_IN pfx #op SFX##bits " %[nr], %[val]" FLAGS_OUT \
			: [val] "+m"(*(m)), "+&a"(f_) : [nr] "r"((u##bits)((n) & (bits - 1))) : "cc", "memory"); \
		c->aflags = (u16)f_;                                            \
	} while (0)

/* Memory operand of a bit string: a register's bit number reaches any word around the address. */
static u64 bit_lin(struct cpu *c, const struct insn *i, unsigned bits, s64 n, enum access acc)
{
	u64 o = insn_offset(c, i) + (u64)((n >> (bits == 16 ? 4 : bits == 32 ? 5 : 6)) * (s64)(bits / 8));

	o = i->flags & IF_A32 ? (u32)o : i->flags & IF_A16 ? (u16)o : o;
	if (c->flat)
		return i->seg == SEG_FS || i->seg == SEG_GS ? o + c->seg[i->seg].base : o;
	return seg_lin(c, i->seg, o, bits / 8, acc);
}

#define BTX_R(op, bits)                                                         \
	OP(op##bits##_rr) { u##bits v = GET##bits(i->dst); BIT_R(op, bits, v, GET##bits(i->src)); SET##bits(i->dst, v); NEXT; } \
	OP(op##bits##_ri) { u##bits v = GET##bits(i->dst); BIT_R(op, bits, v, i->imm); SET##bits(i->dst, v); NEXT; }
#define BT(bits)                                                                \
	OP(bt##bits##_rr) { u##bits v = GET##bits(i->dst); BIT_R(bt, bits, v, GET##bits(i->src)); NEXT; } \
	OP(bt##bits##_ri) { u##bits v = GET##bits(i->dst); BIT_R(bt, bits, v, i->imm); NEXT; } \
	OP(bt##bits##_mr) { s64 n = (s##bits)GET##bits(i->src); WITH_LD_AT(bits, v, bit_lin(c, i, bits, n, ACC_READ), BIT_R(bt, bits, v, n)); } \
	OP(bt##bits##_mi) { WITH_LD(bits, v, BIT_R(bt, bits, v, i->imm)); }
#define BTX_M(op, bits)                                                         \
	OP(op##bits##_mr) { s64 n = (s##bits)GET##bits(i->src); WITH_RMW_AT(bits, m, bit_lin(c, i, bits, n, ACC_RMW), BIT_M("", op, bits, m, n);); } \
	OP(op##bits##_mi) { WITH_RMW(bits, m, BIT_M("", op, bits, m, i->imm);); } \
	OP(op##bits##_lr) { s64 n = (s##bits)GET##bits(i->src); WITH_LOCKED_AT(bits, m, bit_lin(c, i, bits, n, ACC_RMW), BIT_M("lock ", op, bits, m, n)); } \
	OP(op##bits##_li) { WITH_LOCKED(bits, m, BIT_M("lock ", op, bits, m, i->imm)); }
#define BTX(op) BTX_R(op, 16) BTX_R(op, 32) BTX_R(op, 64) BTX_M(op, 16) BTX_M(op, 32) BTX_M(op, 64)
BT(16) BT(32) BT(64)
BTX(bts)
BTX(btr)
BTX(btc)

/* -- scans: the destination stays when the source is 0, as the CPU does it ---------------------- */
#define SCAN(op, bits, mod)                                                     \
	OP(op##bits##_r) { SCAN_DO(op, bits, mod, GET##bits(i->src)); NEXT; }   \
	OP(op##bits##_m) { WITH_LD(bits, v, SCAN_DO(op, bits, mod, v)); }
#define SCAN_DO(op, bits, mod, s_) do {                                         \
		u64 d_ = GET64(i->dst);                                         \
		u32 f_ = c->aflags;                                             \
		__asm__(FLAGS_IN #op SFX##bits " %" mod "[s], %" mod "[d]" FLAGS_OUT \
			: [d] "+&r"(d_), "+&a"(f_) : [s] "r"((u64)(u##bits)(s_)) : "cc"); \
		SET64(i->dst, d_);                                              \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define SCANS(op) SCAN(op, 16, "w") SCAN(op, 32, "k") SCAN(op, 64, "q")
SCANS(bsf)
SCANS(bsr)
SCANS(lzcnt)
SCANS(tzcnt)
SCANS(popcnt)

/* CRC32: the destination has 32 bits, also with REX.W. */
#define CRC(bits, reg)                                                          \
	OP(crc32_##bits##_r) { u64 d = GET32(i->dst); CRC_DO(bits, reg, GET##bits(i->src)); SET64(i->dst, d); NEXT; } \
	OP(crc32_##bits##_m) { u64 d = GET32(i->dst); WITH_LD(bits, v, CRC_DO(bits, reg, v); SET64(i->dst, d)); }
#define CRC_DO(bits, reg, s_) __asm__("crc32" SFX##bits " %[s], %" reg "[d]" : [d] "+r"(d) : [s] "r"((u##bits)(s_)))
CRC(8, "k") CRC(16, "k") CRC(32, "k") CRC(64, "q")

/* -- decoding ---------------------------------------------------------------------------------- */
#define BTROW(bits) { bt##bits##_rr, bt##bits##_ri, bt##bits##_mr, bt##bits##_mi, bt##bits##_mr, bt##bits##_mi }
#define BXROW(op, bits) { op##bits##_rr, op##bits##_ri, op##bits##_mr, op##bits##_mi, op##bits##_lr, op##bits##_li }
#define BX(op) { BXROW(op, 16), BXROW(op, 32), BXROW(op, 64) }
static insn_fn *const bits_fn[4][3][6] = { { BTROW(16), BTROW(32), BTROW(64) }, BX(bts), BX(btr), BX(btc) };
#define SROW(op) { { op##16_r, op##16_m }, { op##32_r, op##32_m }, { op##64_r, op##64_m } }
static insn_fn *const scans[][3][2] = { SROW(bsf), SROW(bsr), SROW(lzcnt), SROW(tzcnt), SROW(popcnt) };
static insn_fn *const crcs[4][2] = { { crc32_8_r, crc32_8_m }, { crc32_16_r, crc32_16_m }, { crc32_32_r, crc32_32_m },
				     { crc32_64_r, crc32_64_m } };

static bool decode_bit(struct insn *i, const struct decoded *d, unsigned n)
{
	bool imm = is_imm(d, 1), mem = is_mem(d, 0), lock = i->flags & IF_LOCK;

	if (mem)
		insn_set_mem(i, d, &d->op[0]);
	else
		i->dst = reg_off(d, 0);
	if (imm)
		i->imm = d->op[1].imm.value.u & (d->op[0].size - 1u);
	else
		i->src = reg_off(d, 1);
	i->fn = bits_fn[n][size_index(d->op[0].size) - 1][(mem ? lock ? 4 : 2 : 0) + imm];
	return true;
}

static bool decode_src(struct insn *i, const struct decoded *d, insn_fn *const fn[2])
{
	i->dst = reg_off(d, 0);
	if (is_mem(d, 1))
		insn_set_mem(i, d, &d->op[1]);
	else
		i->src = reg_off(d, 1);
	i->fn = fn[is_mem(d, 1)];
	return true;
}

bool ops_bit_decode(struct insn *i, const struct decoded *d)
{
	unsigned s = size_index(d->op[1].size), s0 = size_index(d->op[0].size) - 1;

	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_BT: return !(i->flags & IF_LOCK) && decode_bit(i, d, 0);
	case ZYDIS_MNEMONIC_BTS: return decode_bit(i, d, 1);
	case ZYDIS_MNEMONIC_BTR: return decode_bit(i, d, 2);
	case ZYDIS_MNEMONIC_BTC: return decode_bit(i, d, 3);
	case ZYDIS_MNEMONIC_BSF: return decode_src(i, d, scans[0][s0]);
	case ZYDIS_MNEMONIC_BSR: return decode_src(i, d, scans[1][s0]);
	case ZYDIS_MNEMONIC_LZCNT: return decode_src(i, d, scans[2][s0]);
	case ZYDIS_MNEMONIC_TZCNT: return decode_src(i, d, scans[3][s0]);
	case ZYDIS_MNEMONIC_POPCNT: return decode_src(i, d, scans[4][s0]);
	case ZYDIS_MNEMONIC_CRC32: return decode_src(i, d, crcs[s]);
	default: return false;
	}
}
