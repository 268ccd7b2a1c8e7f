/*
 * LOCK-prefixed arithmetic, XCHG with memory, XADD, CMPXCHG, CMPXCHG8B and 16B. Host atomics on the host
 * address; what is not plain RAM within one page goes through mem_lock() (WITH_LOCKED).
 */
#include "softkvm/interp/ops.h"

#define DO2(insn, bits, m, v) do {                                              \
		u32 f_;                                                         \
		__asm__ volatile("lock " insn SFX##bits " %[s], %[d]" FLAGS_OUT \
			: [d] "+m" (*(m)), "=&a"(f_) : [s] "r" ((u##bits)(v)) : "cc", "memory"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define DO2C(insn, bits, m, v) do {                                             \
		u32 f_ = c->aflags;                                             \
		__asm__ volatile("btl $8, %k[f]\n\tlock " insn SFX##bits " %[s], %[d]" FLAGS_OUT \
			: [d] "+m" (*(m)), [f] "+&a"(f_) : [s] "r" ((u##bits)(v)) : "cc", "memory"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define DO1(insn, bits, m) do {                                                 \
		u32 f_ = c->aflags;                                             \
		__asm__ volatile("btl $8, %k[f]\n\tlock " insn SFX##bits " %[d]" FLAGS_OUT \
			: [d] "+m" (*(m)), [f] "+&a"(f_) : : "cc", "memory");   \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define DONOT(bits, m) __asm__ volatile("lock not" SFX##bits " %0" : "+m" (*(m)) : : "cc", "memory")

#define LOCK2(op, bits, F)                                                      \
	OP(op##bits##_mr) { WITH_LOCKED(bits, m, F(#op, bits, m, GET##bits(i->src))); } \
	OP(op##bits##_mi) { WITH_LOCKED(bits, m, F(#op, bits, m, i->imm)); }
#define LOCK1(op, bits) OP(op##bits##_m) { WITH_LOCKED(bits, m, DO1(#op, bits, m)); }
#define NOT1(bits) OP(not##bits##_m) { WITH_LOCKED(bits, m, DONOT(bits, m)); }
#define SIZES(F, ...) F(__VA_ARGS__ 8) F(__VA_ARGS__ 16) F(__VA_ARGS__ 32) F(__VA_ARGS__ 64)
#define L2(op, F) LOCK2(op, 8, F) LOCK2(op, 16, F) LOCK2(op, 32, F) LOCK2(op, 64, F)
#define L1(op) LOCK1(op, 8) LOCK1(op, 16) LOCK1(op, 32) LOCK1(op, 64)
L2(add, DO2)
L2(or, DO2)
L2(and, DO2)
L2(sub, DO2)
L2(xor, DO2)
L2(adc, DO2C)
L2(sbb, DO2C)
L1(inc)
L1(dec)
L1(neg)
NOT1(8) NOT1(16) NOT1(32) NOT1(64)

/* XCHG with memory is locked with or without the prefix. */
#define XCHG(bits)                                                              \
	OP(xchg##bits##_m)                                                      \
	{                                                                       \
		u##bits v = GET##bits(i->src);                                  \
		WITH_LOCKED(bits, m,                                            \
			    __asm__ volatile("xchg" SFX##bits " %0, %1" : "+r"(v), "+m"(*m) : : "memory"); \
			    SET##bits(i->src, v));                              \
	}
XCHG(8) XCHG(16) XCHG(32) XCHG(64)

/*
 * XADD. The register must not change when the copy's store can still fault: WITH_LOCKED and WITH_RMW probe
 * before. Destination last: XADD of a register with itself leaves the sum.
 */
#define XADD_ASM(pfx, bits, m, v) do {                                          \
		u32 f_;                                                         \
		__asm__ volatile(pfx "xadd" SFX##bits " %[val], %[mem]" FLAGS_OUT   \
			: [val] "+&r"(v), [mem] "+m" (*(m)), "=&a"(f_) : : "cc", "memory"); \
		c->aflags = (u16)f_;                                            \
	} while (0)
#define XADD(bits)                                                              \
	OP(xadd##bits##_l) { u##bits v = GET##bits(i->src); WITH_LOCKED(bits, m, XADD_ASM("lock ", bits, m, v); SET##bits(i->src, v)); } \
	OP(xadd##bits##_m) { u##bits v = GET##bits(i->src); WITH_RMW(bits, m, XADD_ASM("", bits, m, v); SET##bits(i->src, v);); } \
	OP(xadd##bits##_r)                                                      \
	{                                                                       \
		u##bits v = GET##bits(i->src), d = GET##bits(i->dst);           \
		XADD_ASM("", bits, &d, v);                                      \
		SET##bits(i->src, v);                                           \
		SET##bits(i->dst, d);                                           \
		NEXT;                                                           \
	}
XADD(8) XADD(16) XADD(32) XADD(64)

/* CMPXCHG: all of RAX goes in and comes out, so upper halves are the CPU's business. */
#define CX_ASM(pfx, bits, m, n) do {                                            \
		u64 a_ = c->gpr[R_RAX], o_;                                     \
		__asm__ volatile(pfx "cmpxchg" SFX##bits " %[new], %[mem]\n\tmovq %%rax, %[o]" FLAGS_OUT \
			: "+&a"(a_), [o] "=&r"(o_), [mem] "+m" (*(m)) : [new] "r" ((u##bits)(n)) : "cc", "memory"); \
		c->gpr[R_RAX] = o_;                                             \
		c->aflags = (u16)a_;                                            \
	} while (0)
#define CMPXCHG(bits)                                                           \
	OP(cx##bits##_l) { u##bits n = GET##bits(i->src); WITH_LOCKED(bits, m, CX_ASM("lock ", bits, m, n)); } \
	OP(cx##bits##_m) { u##bits n = GET##bits(i->src); WITH_RMW(bits, m, CX_ASM("", bits, m, n);); }
CMPXCHG(8) CMPXCHG(16) CMPXCHG(32) CMPXCHG(64)
/* Register destination: its full 64 bits go through, too (but for AH..BH). */
#define CMPXCHG_R(bits, mod)                                                    \
	OP(cx##bits##_r)                                                        \
	{                                                                       \
		u64 a = c->gpr[R_RAX], o, n = GET64(i->src), d = GET64(i->dst); \
		__asm__("cmpxchg" SFX##bits " %" mod "[n], %" mod "[d]\n\tmovq %%rax, %[o]" FLAGS_OUT \
			: "+&a"(a), [o] "=&r"(o), [d] "+&r"(d) : [n] "r"(n) : "cc"); \
		c->gpr[R_RAX] = o;                                              \
		c->aflags = (u16)a;                                             \
		if (i->dst != R_RAX * 8 || (a & AF_ZF))                         \
			SET64(i->dst, d);                                       \
		NEXT;                                                           \
	}
CMPXCHG_R(16, "w") CMPXCHG_R(32, "k") CMPXCHG_R(64, "q")
OP(cx8_r)
{
	u8 n = GET8(i->src), d = GET8(i->dst);

	CX_ASM("", 8, &d, n);
	SET8(i->dst, d);
	NEXT;
}

/* CMPXCHG8B and 16B: ZF only; the accumulator pair changes only on failure. */
OP(cx8b)
{
	u64 want = (u64)GET32(R_RDX * 8) << 32 | GET32(R_RAX * 8), new = (u64)GET32(R_RCX * 8) << 32 | GET32(R_RBX * 8);
	u64 old;

	WITH_LOCKED(64, m,
		    old = want;
		    __asm__ volatile("lock cmpxchgq %[n], %[m]" : "+a"(old), [m] "+m"(*m) : [n] "r"(new) : "cc", "memory");
		    if (old == want) {
			    c->aflags |= AF_ZF;
		    } else {
			    c->aflags &= (u16)~AF_ZF;
			    SET32(R_RAX * 8, old);
			    SET32(R_RDX * 8, old >> 32);
		    });
}

static bool cx16_at(struct cpu *c, void *m)
{
	u64 a = c->gpr[R_RAX], d = c->gpr[R_RDX];
	bool z;

	__asm__ volatile("lock cmpxchg16b %[m]" : "+a"(a), "+d"(d), [m] "+m"(*(unsigned __int128 *)m), "=@ccz"(z)
			 : "b"(c->gpr[R_RBX]), "c"(c->gpr[R_RCX]) : "memory");
	c->aflags = z ? c->aflags | AF_ZF : c->aflags & (u16)~AF_ZF;
	c->gpr[R_RAX] = a;
	c->gpr[R_RDX] = d;
	return z;
}

OP(cx16b)
{
	u64 lin = insn_lin(c, i, 16, ACC_RMW);
	_Alignas(16) u64 t[2];
	void *p;

	if (lin & 15)
		cpu_gp(c, 0);
	p = mem_rmw(c, lin, 16);
	if (p) {
		cx16_at(c, p);
		return;
	}
	mem_lock(c);
	mem_probe(c, lin, 16, ACC_RMW);
	mem_read(c, lin, t, 16);
	cx16_at(c, t);
	mem_write(c, lin, t, 16);
	mem_unlock(c);
}

/* -- decoding ---------------------------------------------------------------------------------- */
#define R2(op) { { op##8_mr, op##8_mi }, { op##16_mr, op##16_mi }, { op##32_mr, op##32_mi }, { op##64_mr, op##64_mi } }
static insn_fn *const two[][4][2] = { R2(add), R2(or), R2(adc), R2(sbb), R2(and), R2(sub), R2(xor) };
#define R1(op) { op##8_m, op##16_m, op##32_m, op##64_m }
static insn_fn *const one[][4] = { R1(inc), R1(dec), R1(neg), R1(not) };
static insn_fn *const xchgs[4] = { xchg8_m, xchg16_m, xchg32_m, xchg64_m };
/* plain memory, locked memory, register */
static insn_fn *const xadds[3][4] = { { xadd8_m, xadd16_m, xadd32_m, xadd64_m }, { xadd8_l, xadd16_l, xadd32_l, xadd64_l },
				      { xadd8_r, xadd16_r, xadd32_r, xadd64_r } };
static insn_fn *const cxs[3][4] = { { cx8_m, cx16_m, cx32_m, cx64_m }, { cx8_l, cx16_l, cx32_l, cx64_l },
				    { cx8_r, cx16_r, cx32_r, cx64_r } };

static int two_index(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_ADD: return 0;
	case ZYDIS_MNEMONIC_OR: return 1;
	case ZYDIS_MNEMONIC_ADC: return 2;
	case ZYDIS_MNEMONIC_SBB: return 3;
	case ZYDIS_MNEMONIC_AND: return 4;
	case ZYDIS_MNEMONIC_SUB: return 5;
	case ZYDIS_MNEMONIC_XOR: return 6;
	default: return -1;
	}
}

static int one_index(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_INC: return 0;
	case ZYDIS_MNEMONIC_DEC: return 1;
	case ZYDIS_MNEMONIC_NEG: return 2;
	case ZYDIS_MNEMONIC_NOT: return 3;
	default: return -1;
	}
}

static bool decode_locked(struct insn *i, const struct decoded *d)
{
	unsigned s = size_index(d->op[0].size);
	int t = two_index(d->z.mnemonic), o = one_index(d->z.mnemonic);

	if (!is_mem(d, 0) || (t < 0 && o < 0))
		return false;
	insn_set_mem(i, d, &d->op[0]);
	if (o >= 0) {
		i->fn = one[o][s];
		return true;
	}
	if (is_imm(d, 1))
		i->imm = d->op[1].imm.value.u;
	else
		i->src = reg_off(d, 1);
	i->fn = two[t][s][is_imm(d, 1)];
	return true;
}

static bool decode_pair(struct insn *i, const struct decoded *d, insn_fn *const fns[3][4])
{
	unsigned kind = !is_mem(d, 0) ? 2 : i->flags & IF_LOCK ? 1 : 0;

	if (is_mem(d, 0))
		insn_set_mem(i, d, &d->op[0]);
	else
		i->dst = reg_off(d, 0);
	i->src = reg_off(d, 1);
	i->fn = fns[kind][size_index(d->op[0].size)];
	return true;
}

bool ops_lock_decode(struct insn *i, const struct decoded *d)
{
	unsigned m;

	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_XCHG:
		if (!is_mem(d, 0) && !is_mem(d, 1))
			return false;
		m = is_mem(d, 0) ? 0 : 1;
		insn_set_mem(i, d, &d->op[m]);
		i->src = reg_off(d, 1 - m);
		i->fn = xchgs[size_index(d->op[0].size)];
		return true;
	case ZYDIS_MNEMONIC_XADD: return decode_pair(i, d, xadds);
	case ZYDIS_MNEMONIC_CMPXCHG: return decode_pair(i, d, cxs);
	case ZYDIS_MNEMONIC_CMPXCHG8B:
	case ZYDIS_MNEMONIC_CMPXCHG16B:
		insn_set_mem(i, d, &d->op[0]);
		i->fn = d->z.mnemonic == ZYDIS_MNEMONIC_CMPXCHG8B ? cx8b : cx16b;
		return true;
	default:
		return (i->flags & IF_LOCK) && decode_locked(i, d);
	}
}
