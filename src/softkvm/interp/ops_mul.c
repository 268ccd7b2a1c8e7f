/* MUL IMUL DIV IDIV, and the decimal adjustments of 16- and 32-bit code. */
#include "softkvm/interp/ops.h"

/* -- one-operand multiplication ---------------------------------------------------------------- */
#define MUL_WIDE(op, bits, src_) do {                                           \
		u##bits lo_ = GET##bits(R_RAX * 8), hi_ = 0;                    \
		u##bits out_;                                                   \
		u32 f_;                                                         \
		u64 a_ = lo_;                                                   \
		__asm__(#op SFX##bits " %[s]\n\tmov" SFX##bits " " ACC##bits ", %[o]" FLAGS_OUT \
			: "+&a"(a_), "+&d"(hi_), [o] "=&r"(out_) : [s] "r"((u##bits)(src_)) : "cc"); \
		f_ = (u32)a_;                                                   \
		SET##bits(R_RAX * 8, out_);                                     \
		SET##bits(R_RDX * 8, hi_);                                      \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define ACC16 "%%ax"
#define ACC32 "%%eax"
#define ACC64 "%%rax"
/* 8 bits: the product is AX. */
#define MUL_8(op, src_) do {                                                    \
		u32 a_ = GET8(R_RAX * 8);                                       \
		u16 out_;                                                       \
		__asm__(#op "b %[s]\n\tmovw %%ax, %[o]" FLAGS_OUT               \
			: "+&a"(a_), [o] "=&r"(out_) : [s] "r"((u8)(src_)) : "cc"); \
		SET16(R_RAX * 8, out_);                                         \
		c->aflags = (u16)a_;                                            \
	} while (0)
#define MULS(op)                                                                \
	OP(op##8_r) { MUL_8(op, GET8(i->dst)); NEXT; }                          \
	OP(op##8_m) { WITH_LD(8, v, MUL_8(op, v)); }                            \
	OP(op##16_r) { MUL_WIDE(op, 16, GET16(i->dst)); NEXT; }                 \
	OP(op##16_m) { WITH_LD(16, v, MUL_WIDE(op, 16, v)); }                   \
	OP(op##32_r) { MUL_WIDE(op, 32, GET32(i->dst)); NEXT; }                 \
	OP(op##32_m) { WITH_LD(32, v, MUL_WIDE(op, 32, v)); }                   \
	OP(op##64_r) { MUL_WIDE(op, 64, GET64(i->dst)); NEXT; }                 \
	OP(op##64_m) { WITH_LD(64, v, MUL_WIDE(op, 64, v)); }
MULS(mul)
MULS(imul)

/* IMUL with two and three operands. */
#define IMUL2(bits, a, b) do {                                                  \
		u##bits v_ = (u##bits)(a);                                      \
		u32 f_;                                                         \
		__asm__("imul" SFX##bits " %[s], %[d]" FLAGS_OUT                \
			: [d] "+&r"(v_), "=&a"(f_) : [s] "r"((u##bits)(b)) : "cc"); \
		SET##bits(i->dst, v_);                                          \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define IMULS(bits)                                                             \
	OP(imul2_##bits##_r) { IMUL2(bits, GET##bits(i->dst), GET##bits(i->src)); NEXT; } \
	OP(imul2_##bits##_m) { WITH_LD(bits, v, IMUL2(bits, GET##bits(i->dst), v)); } \
	OP(imul3_##bits##_r) { IMUL2(bits, GET##bits(i->src), i->imm); NEXT; }  \
	OP(imul3_##bits##_m) { WITH_LD(bits, v, IMUL2(bits, v, i->imm)); }
IMULS(16) IMULS(32) IMULS(64)

/* -- division: flags are undefined and stay ---------------------------------------------------- */
static _Noreturn void divide_error(struct cpu *c) { cpu_raise(c, EXC_DE); }

static void div8(struct cpu *c, u8 s)
{
	u16 a = GET16(R_RAX * 8);

	if (!s || a / s > 0xff)
		divide_error(c);
	SET16(R_RAX * 8, (u16)(a % s << 8 | a / s));
}

static void idiv8(struct cpu *c, u8 s8_)
{
	int a = (s16)GET16(R_RAX * 8), s = (s8)s8_;

	if (!s || a / s != (s8)(a / s))
		divide_error(c);
	SET16(R_RAX * 8, (u16)((u8)(a % s) << 8 | (u8)(a / s)));
}

#define DIV_C(bits, wide)                                                       \
	static void div##bits(struct cpu *c, u##bits s)                         \
	{                                                                       \
		u##wide a = (u##wide)GET##bits(R_RDX * 8) << bits | GET##bits(R_RAX * 8); \
		if (!s || a / s != (u##bits)(a / s))                            \
			divide_error(c);                                        \
		SET##bits(R_RAX * 8, a / s);                                    \
		SET##bits(R_RDX * 8, a % s);                                    \
	}                                                                       \
	static void idiv##bits(struct cpu *c, u##bits su)                       \
	{                                                                       \
		s##wide a = (s##wide)((u##wide)GET##bits(R_RDX * 8) << bits | GET##bits(R_RAX * 8)); \
		s##wide s = (s##bits)su;                                        \
		if (!s || (s == -1 && a == (s##wide)((u##wide)1 << (wide - 1))) || a / s != (s##bits)(a / s)) \
			divide_error(c);                                        \
		SET##bits(R_RAX * 8, (u##bits)(a / s));                         \
		SET##bits(R_RDX * 8, (u##bits)(a % s));                         \
	}
DIV_C(16, 32)
DIV_C(32, 64)

static void div64(struct cpu *c, u64 s)
{
	u64 lo = c->gpr[R_RAX], hi = c->gpr[R_RDX];

	if (hi >= s)
		divide_error(c);
	__asm__("divq %2" : "+a"(lo), "+d"(hi) : "r"(s) : "cc");
	c->gpr[R_RAX] = lo;
	c->gpr[R_RDX] = hi;
}

/* By magnitudes: the host's IDIV would trap. */
static void idiv64(struct cpu *c, u64 su)
{
	unsigned __int128 a = (unsigned __int128)c->gpr[R_RDX] << 64 | c->gpr[R_RAX];
	bool an = c->gpr[R_RDX] >> 63, sn = su >> 63;
	u64 s = sn ? -su : su, lo, hi;

	if (an)
		a = -a;
	lo = (u64)a;
	hi = (u64)(a >> 64);
	if (hi >= s)
		divide_error(c);
	__asm__("divq %2" : "+a"(lo), "+d"(hi) : "r"(s) : "cc");
	if (lo > (u64)INT64_MAX + (an != sn))
		divide_error(c);
	c->gpr[R_RAX] = an != sn ? -lo : lo;
	c->gpr[R_RDX] = an ? -hi : hi;
}

#define DIVS(op, bits)                                                          \
	OP(op##bits##_r) { op##bits(c, GET##bits(i->dst)); NEXT; }              \
	OP(op##bits##_m) { WITH_LD(bits, v, op##bits(c, v)); }
DIVS(div, 8) DIVS(div, 16) DIVS(div, 32) DIVS(div, 64)
DIVS(idiv, 8) DIVS(idiv, 16) DIVS(idiv, 32) DIVS(idiv, 64)

/* -- decimal adjustments (SDM vol. 2; undefined flags as left by the last step) ------------------ */
static u16 szp(u8 v)
{
	return (u16)((v ? 0 : AF_ZF) | (v & 0x80 ? AF_SF : 0) | (__builtin_parity(v) ? 0 : AF_PF) | 0x0200);
}

static void adjust_packed(struct cpu *c, bool sub)
{
	u8 al = GET8(0), old = al;
	bool cf = c->aflags & AF_CF, af = c->aflags & AF_AF, out = false, over = old > 0x99 || cf;

	if ((al & 15) > 9 || af) {
		out = cf || (sub ? al < 6 : al > 0xf9);
		al = (u8)(sub ? al - 6 : al + 6);
		af = true;
	}
	if (over) {
		al = (u8)(sub ? al - 0x60 : al + 0x60);
		out = true;
	}
	SET8(0, al);
	c->aflags = (u16)(szp(al) | (out ? AF_CF : 0) | (af ? AF_AF : 0));
}

OP(daa) { adjust_packed(c, false); }
OP(das) { adjust_packed(c, true); }

static void adjust_unpacked(struct cpu *c, int step)
{
	u16 ax = GET16(0);
	bool adj = (ax & 15) > 9 || (c->aflags & AF_AF);

	if (adj)
		ax = (u16)(ax + step);
	SET16(0, ax & 0xff0f);
	c->aflags = (u16)(szp((u8)ax & 15) | (adj ? AF_CF | AF_AF : 0));
}

OP(aaa) { adjust_unpacked(c, 0x106); }
OP(aas) { adjust_unpacked(c, -0x106); }

OP(aam)
{
	u8 al = GET8(0), base = (u8)i->imm;

	if (!base)
		divide_error(c);
	SET16(0, (u16)(al / base << 8 | al % base));
	c->aflags = szp(al % base);
}

OP(aad)
{
	u16 ax = GET16(0);
	u8 al = (u8)(ax + (ax >> 8) * (u8)i->imm);

	SET16(0, al);
	c->aflags = szp(al);
}

/* -- decoding ---------------------------------------------------------------------------------- */
#define ROW(op) { { op##8_r, op##8_m }, { op##16_r, op##16_m }, { op##32_r, op##32_m }, { op##64_r, op##64_m } }
static insn_fn *const one[][4][2] = { ROW(mul), ROW(imul), ROW(div), ROW(idiv) };
#define IROW(bits) { { imul2_##bits##_r, imul2_##bits##_m }, { imul3_##bits##_r, imul3_##bits##_m } }
static insn_fn *const imuls[3][2][2] = { IROW(16), IROW(32), IROW(64) };

static bool decode_one(struct insn *i, const struct decoded *d, unsigned n)
{
	if (is_mem(d, 0))
		insn_set_mem(i, d, &d->op[0]);
	else
		i->dst = reg_off(d, 0);
	i->fn = one[n][size_index(d->op[0].size)][is_mem(d, 0)];
	return true;
}

static bool decode_imul(struct insn *i, const struct decoded *d)
{
	bool three = d->z.operand_count_visible == 3;

	if (d->z.operand_count_visible == 1)
		return decode_one(i, d, 1);
	i->dst = reg_off(d, 0);
	if (three)
		i->imm = d->op[2].imm.value.u;
	if (is_mem(d, 1))
		insn_set_mem(i, d, &d->op[1]);
	else
		i->src = reg_off(d, 1);
	i->fn = imuls[size_index(d->op[0].size) - 1][three][is_mem(d, 1)];
	return true;
}

bool ops_mul_decode(struct insn *i, const struct decoded *d)
{
	if (i->flags & IF_LOCK)
		return false;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_MUL: return decode_one(i, d, 0);
	case ZYDIS_MNEMONIC_IMUL: return decode_imul(i, d);
	case ZYDIS_MNEMONIC_DIV: return decode_one(i, d, 2);
	case ZYDIS_MNEMONIC_IDIV: return decode_one(i, d, 3);
	case ZYDIS_MNEMONIC_DAA: i->fn = daa; return true;
	case ZYDIS_MNEMONIC_DAS: i->fn = das; return true;
	case ZYDIS_MNEMONIC_AAA: i->fn = aaa; return true;
	case ZYDIS_MNEMONIC_AAS: i->fn = aas; return true;
	case ZYDIS_MNEMONIC_AAM: i->imm = d->op[0].imm.value.u; i->fn = aam; return true;
	case ZYDIS_MNEMONIC_AAD: i->imm = d->op[0].imm.value.u; i->fn = aad; return true;
	default: return false;
	}
}
