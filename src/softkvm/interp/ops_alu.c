/* ADD OR ADC SBB AND SUB XOR CMP TEST, INC DEC NEG NOT; without LOCK. */
#include "softkvm/interp/ops.h"

/* One two-operand step on `dst_` (register or memory, by constraint) with `src_`. */
#define ALU2(op, bits, dst_, src_) do {                                         \
		u32 f_;                                                         \
		__asm__(#op SFX##bits " %[s], %[d]" FLAGS_OUT                   \
			: [d] "+" DSTC(bits) (dst_), "=&a"(f_) : [s] SRCC(bits) ((u##bits)(src_)) : "cc"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define ALU2C(op, bits, dst_, src_) do {                                        \
		u32 f_ = c->aflags;                                             \
		__asm__("btl $8, %k[f]\n\t" #op SFX##bits " %[s], %[d]" FLAGS_OUT \
			: [d] "+" DSTC(bits) (dst_), [f] "+&a"(f_) : [s] SRCC(bits) ((u##bits)(src_)) : "cc"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define ALUCMP(op, bits, dst_, src_) do {                                       \
		u32 f_;                                                         \
		__asm__(#op SFX##bits " %[s], %[d]" FLAGS_OUT                   \
			: "=&a"(f_) : [d] "r" (dst_), [s] "r" ((u##bits)(src_)) : "cc"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define DSTC(bits) "r"
#define SRCC(bits) "r"
/* On memory in place. */
#define ALU2M(op, bits, dst_, src_) do {                                        \
		u32 f_;                                                         \
		__asm__(#op SFX##bits " %[s], %[d]" FLAGS_OUT                   \
			: [d] "+m" (dst_), "=&a"(f_) : [s] "r" ((u##bits)(src_)) : "cc"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define ALU2CM(op, bits, dst_, src_) do {                                       \
		u32 f_ = c->aflags;                                             \
		__asm__("btl $8, %k[f]\n\t" #op SFX##bits " %[s], %[d]" FLAGS_OUT \
			: [d] "+m" (dst_), [f] "+&a"(f_) : [s] "r" ((u##bits)(src_)) : "cc"); \
		c->aflags = (u16)f_;                                            \
	} while (0)

/* Writers: rr, ri, rm, mr, mi. */
#define ALU_FORMS(op, bits, R, M)                                               \
	OP(op##bits##_rr) { u##bits v = GET##bits(i->dst); R(op, bits, v, GET##bits(i->src)); SET##bits(i->dst, v); NEXT; } \
	OP(op##bits##_ri) { u##bits v = GET##bits(i->dst); R(op, bits, v, i->imm); SET##bits(i->dst, v); NEXT; } \
	OP(op##bits##_rm) { WITH_LD(bits, s, u##bits v = GET##bits(i->dst); R(op, bits, v, s); SET##bits(i->dst, v)); } \
	OP(op##bits##_mr) { WITH_RMW(bits, m, M(op, bits, *m, GET##bits(i->src))); } \
	OP(op##bits##_mi) { WITH_RMW(bits, m, M(op, bits, *m, i->imm)); }
/* Comparers: nothing is written. */
#define CMP_FORMS(op, bits)                                                     \
	OP(op##bits##_rr) { ALUCMP(op, bits, GET##bits(i->dst), GET##bits(i->src)); NEXT; } \
	OP(op##bits##_ri) { ALUCMP(op, bits, GET##bits(i->dst), i->imm); NEXT; } \
	OP(op##bits##_rm) { WITH_LD(bits, s, ALUCMP(op, bits, GET##bits(i->dst), s)); } \
	OP(op##bits##_mr) { WITH_LD(bits, s, ALUCMP(op, bits, s, GET##bits(i->src))); } \
	OP(op##bits##_mi) { WITH_LD(bits, s, ALUCMP(op, bits, s, i->imm)); }
#define SIZES(F, ...) F(__VA_ARGS__, 8) F(__VA_ARGS__, 16) F(__VA_ARGS__, 32) F(__VA_ARGS__, 64)
#define PLAIN(op, bits) ALU_FORMS(op, bits, ALU2, ALU2M)
#define CARRY(op, bits) ALU_FORMS(op, bits, ALU2C, ALU2CM)
SIZES(PLAIN, add)
SIZES(PLAIN, or)
SIZES(PLAIN, and)
SIZES(PLAIN, sub)
SIZES(PLAIN, xor)
SIZES(CARRY, adc)
SIZES(CARRY, sbb)
SIZES(CMP_FORMS, cmp)
SIZES(CMP_FORMS, test)

/* One operand. INC and DEC keep CF: it is loaded first. */
#define UN_KEEP(op, bits, dst_, con) do {                                       \
		u32 f_ = c->aflags;                                             \
		__asm__("btl $8, %k[f]\n\t" #op SFX##bits " %[d]" FLAGS_OUT     \
			: [d] con (dst_), [f] "+&a"(f_) : : "cc");              \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define UN_NOFLAG(op, bits, dst_, con) (dst_) = (u##bits)~(dst_)
#define UNARY(op, bits, F)                                                      \
	OP(op##bits##_r) { u##bits v = GET##bits(i->dst); F(op, bits, v, "+r"); SET##bits(i->dst, v); NEXT; } \
	OP(op##bits##_m) { WITH_RMW(bits, m, F(op, bits, *m, "+m")); }
#define UNARY_SIZES(op, F) UNARY(op, 8, F) UNARY(op, 16, F) UNARY(op, 32, F) UNARY(op, 64, F)
UNARY_SIZES(inc, UN_KEEP)
UNARY_SIZES(dec, UN_KEEP)
UNARY_SIZES(neg, UN_KEEP)
UNARY_SIZES(not, UN_NOFLAG)

/* xor r,r and sub r,r: the result is known, only a dependency saved, but the commonest way to clear a register. */
OP(zero32)
{
	SET64(i->dst, 0);
	c->aflags = AF_ZF | AF_PF | 0x0200;
	NEXT;
}

enum { F_RR, F_RI, F_RM, F_MR, F_MI, F_COUNT };
#define ROW(op, bits) { op##bits##_rr, op##bits##_ri, op##bits##_rm, op##bits##_mr, op##bits##_mi }
#define TABLE(op) { ROW(op, 8), ROW(op, 16), ROW(op, 32), ROW(op, 64) }
enum { A_ADD, A_OR, A_ADC, A_SBB, A_AND, A_SUB, A_XOR, A_CMP, A_TEST };
static insn_fn *const alu[][4][F_COUNT] = {
	[A_ADD] = TABLE(add), [A_OR] = TABLE(or), [A_ADC] = TABLE(adc), [A_SBB] = TABLE(sbb), [A_AND] = TABLE(and),
	[A_SUB] = TABLE(sub), [A_XOR] = TABLE(xor), [A_CMP] = TABLE(cmp), [A_TEST] = TABLE(test),
};
#define UROW(op, bits) { op##bits##_r, op##bits##_m }
#define UTABLE(op) { UROW(op, 8), UROW(op, 16), UROW(op, 32), UROW(op, 64) }
static insn_fn *const unary[][4][2] = { UTABLE(inc), UTABLE(dec), UTABLE(neg), UTABLE(not) };

static bool two_operands(struct insn *i, const struct decoded *d, unsigned a)
{
	unsigned s = size_index(d->op[0].size), form;

	if (is_mem(d, 0)) {
		insn_set_mem(i, d, &d->op[0]);
		form = is_imm(d, 1) ? F_MI : F_MR;
	} else {
		i->dst = reg_off(d, 0);
		form = is_imm(d, 1) ? F_RI : is_mem(d, 1) ? F_RM : F_RR;
	}
	if (is_imm(d, 1))
		i->imm = d->op[1].imm.value.u;
	else if (is_mem(d, 1))
		insn_set_mem(i, d, &d->op[1]);
	else
		i->src = reg_off(d, 1);
	i->fn = alu[a][s][form];
	if (a == A_XOR && form == F_RR && s >= 2 && i->dst == i->src)
		i->fn = zero32;
	return true;
}

static bool one_operand(struct insn *i, const struct decoded *d, unsigned u)
{
	unsigned s = size_index(d->op[0].size);

	if (is_mem(d, 0))
		insn_set_mem(i, d, &d->op[0]);
	else
		i->dst = reg_off(d, 0);
	i->fn = unary[u][s][is_mem(d, 0)];
	return true;
}

bool ops_alu_decode(struct insn *i, const struct decoded *d)
{
	if (i->flags & IF_LOCK)
		return false;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_ADD: return two_operands(i, d, A_ADD);
	case ZYDIS_MNEMONIC_OR: return two_operands(i, d, A_OR);
	case ZYDIS_MNEMONIC_ADC: return two_operands(i, d, A_ADC);
	case ZYDIS_MNEMONIC_SBB: return two_operands(i, d, A_SBB);
	case ZYDIS_MNEMONIC_AND: return two_operands(i, d, A_AND);
	case ZYDIS_MNEMONIC_SUB: return two_operands(i, d, A_SUB);
	case ZYDIS_MNEMONIC_XOR: return two_operands(i, d, A_XOR);
	case ZYDIS_MNEMONIC_CMP: return two_operands(i, d, A_CMP);
	case ZYDIS_MNEMONIC_TEST: return two_operands(i, d, A_TEST);
	case ZYDIS_MNEMONIC_INC: return one_operand(i, d, 0);
	case ZYDIS_MNEMONIC_DEC: return one_operand(i, d, 1);
	case ZYDIS_MNEMONIC_NEG: return one_operand(i, d, 2);
	case ZYDIS_MNEMONIC_NOT: return one_operand(i, d, 3);
	default: return false;
	}
}
