/* BMI1, BMI2, ADX. VEX-encoded forms exist in protected mode only; the CPU itself computes. */
#include "softkvm/interp/ops.h"

/* Two sources a (VEX.vvvv or ModRM) and b: the handler knows which is the memory operand. Flags in and out. */
#define BMI3(op, bits, mod, a_, b_) do {                                        \
		u64 o_;                                                         \
		u32 f_ = c->aflags;                                             \
		__asm__(FLAGS_IN #op " %" mod "[y], %" mod "[x], %" mod "[o]" FLAGS_OUT \
			: [o] "=&r"(o_), "+&a"(f_) : [x] "r"((u64)(a_)), [y] "r"((u64)(b_)) : "cc"); \
		SET##bits(i->dst, o_);                                          \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define BMI2_(op, bits, mod, a_) do {                                           \
		u64 o_;                                                         \
		u32 f_ = c->aflags;                                             \
		__asm__(FLAGS_IN #op " %" mod "[x], %" mod "[o]" FLAGS_OUT      \
			: [o] "=&r"(o_), "+&a"(f_) : [x] "r"((u64)(a_)) : "cc"); \
		SET##bits(i->dst, o_);                                          \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define REGB(bits) GET##bits(i->aux)

/* ANDN, PDEP, PEXT: the third operand may be memory. i->aux: vvvv register. AT&T: op src3, src2, dst. */
#define LAST(op, bits, mod)                                                     \
	OP(op##bits##_r) { BMI3(op, bits, mod, REGB(bits), GET##bits(i->src)); NEXT; } \
	OP(op##bits##_m) { WITH_LD(bits, v, BMI3(op, bits, mod, REGB(bits), v)); }
/* BEXTR, BZHI, SARX, SHLX, SHRX: the second operand may be memory, vvvv is the third. */
#define MIDDLE(op, bits, mod)                                                   \
	OP(op##bits##_r) { BMI3(op, bits, mod, GET##bits(i->src), REGB(bits)); NEXT; } \
	OP(op##bits##_m) { WITH_LD(bits, v, BMI3(op, bits, mod, v, REGB(bits))); }
#define ONE(op, bits, mod)                                                      \
	OP(op##bits##_r) { BMI2_(op, bits, mod, GET##bits(i->src)); NEXT; }     \
	OP(op##bits##_m) { WITH_LD(bits, v, BMI2_(op, bits, mod, v)); }
#define BOTH(F, op) F(op, 32, "k") F(op, 64, "q")
BOTH(LAST, andn)
BOTH(LAST, pdep)
BOTH(LAST, pext)
BOTH(MIDDLE, bextr)
BOTH(MIDDLE, bzhi)
BOTH(MIDDLE, sarx)
BOTH(MIDDLE, shlx)
BOTH(MIDDLE, shrx)
BOTH(ONE, blsi)
BOTH(ONE, blsmsk)
BOTH(ONE, blsr)

OP(rorx32_r) { u32 v = GET32(i->src); SET32(i->dst, v >> (i->imm & 31) | v << (-i->imm & 31)); NEXT; }
OP(rorx32_m) { WITH_LD(32, v, SET32(i->dst, v >> (i->imm & 31) | v << (-i->imm & 31))); }
OP(rorx64_r) { u64 v = GET64(i->src); SET64(i->dst, v >> (i->imm & 63) | v << (-i->imm & 63)); NEXT; }
OP(rorx64_m) { WITH_LD(64, v, SET64(i->dst, v >> (i->imm & 63) | v << (-i->imm & 63))); }

/* MULX: i->dst high, i->aux low; the high half wins when they are the same register. */
static void mulx32(struct cpu *c, const struct insn *i, u32 v)
{
	u64 p = (u64)v * GET32(R_RDX * 8);

	SET32(i->aux, p);
	SET32(i->dst, p >> 32);
}

static void mulx64(struct cpu *c, const struct insn *i, u64 v)
{
	unsigned __int128 p = (unsigned __int128)v * GET64(R_RDX * 8);

	SET64(i->aux, p);
	SET64(i->dst, p >> 64);
}

OP(mulx32_r) { mulx32(c, i, GET32(i->src)); NEXT; }
OP(mulx32_m) { WITH_LD(32, v, mulx32(c, i, v)); }
OP(mulx64_r) { mulx64(c, i, GET64(i->src)); NEXT; }
OP(mulx64_m) { WITH_LD(64, v, mulx64(c, i, v)); }

/* ADCX, ADOX: one flag in, one flag out. */
#define ADX(op, bits)                                                           \
	OP(op##bits##_r) { ADX_DO(op, bits, GET##bits(i->src)); NEXT; }         \
	OP(op##bits##_m) { WITH_LD(bits, v, ADX_DO(op, bits, v)); }
#define ADX_DO(op, bits, s_) do {                                               \
		u##bits d_ = GET##bits(i->dst);                                 \
		u32 f_ = c->aflags;                                             \
		__asm__(FLAGS_IN #op SFX##bits " %[s], %[d]" FLAGS_OUT          \
			: [d] "+&r"(d_), "+&a"(f_) : [s] "r"((u##bits)(s_)) : "cc"); \
		SET##bits(i->dst, d_);                                          \
		c->aflags = (u16)f_;                                            \
	} while (0)
ADX(adcx, 32) ADX(adcx, 64)
ADX(adox, 32) ADX(adox, 64)

/* -- decoding ---------------------------------------------------------------------------------- */
struct bmi {
	ZydisMnemonic m;
	uint8_t rm, v;          /* which operand is ModRM.rm, which VEX.vvvv (0: none) */
	insn_fn *fn[2][2];      /* size, memory */
};
#define FN(op) { { op##32_r, op##32_m }, { op##64_r, op##64_m } }
static const struct bmi table[] = {
	{ ZYDIS_MNEMONIC_ANDN, 2, 1, FN(andn) }, { ZYDIS_MNEMONIC_PDEP, 2, 1, FN(pdep) }, { ZYDIS_MNEMONIC_PEXT, 2, 1, FN(pext) },
	{ ZYDIS_MNEMONIC_BEXTR, 1, 2, FN(bextr) }, { ZYDIS_MNEMONIC_BZHI, 1, 2, FN(bzhi) }, { ZYDIS_MNEMONIC_SARX, 1, 2, FN(sarx) },
	{ ZYDIS_MNEMONIC_SHLX, 1, 2, FN(shlx) }, { ZYDIS_MNEMONIC_SHRX, 1, 2, FN(shrx) }, { ZYDIS_MNEMONIC_BLSI, 1, 0, FN(blsi) },
	{ ZYDIS_MNEMONIC_BLSMSK, 1, 0, FN(blsmsk) }, { ZYDIS_MNEMONIC_BLSR, 1, 0, FN(blsr) }, { ZYDIS_MNEMONIC_RORX, 1, 0, FN(rorx) },
	{ ZYDIS_MNEMONIC_MULX, 2, 1, FN(mulx) }, { ZYDIS_MNEMONIC_ADCX, 1, 0, FN(adcx) }, { ZYDIS_MNEMONIC_ADOX, 1, 0, FN(adox) },
};

bool ops_bmi_decode(struct insn *i, const struct decoded *d)
{
	for (const struct bmi *b = table; b < table + ARRAY_SIZE(table); b++) {
		if (b->m != d->z.mnemonic)
			continue;
		if (!is_reg(d, 0) || (d->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY &&
				      d->z.encoding != ZYDIS_INSTRUCTION_ENCODING_VEX) ||
		    (b->m == ZYDIS_MNEMONIC_BEXTR && is_imm(d, 2)))
			return false;   /* XOP, APX */
		i->dst = reg_off(d, 0);
		if (b->v)
			i->aux = reg_off(d, b->v);
		if (is_mem(d, b->rm))
			insn_set_mem(i, d, &d->op[b->rm]);
		else
			i->src = reg_off(d, b->rm);
		if (b->m == ZYDIS_MNEMONIC_RORX)
			i->imm = d->op[2].imm.value.u;
		i->fn = b->fn[d->op[0].size == 64][is_mem(d, b->rm)];
		return true;
	}
	return false;
}
