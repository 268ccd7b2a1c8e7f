/* Moves and logic that compilers emit all the time: done in C on the image, without a stub. */
#include <emmintrin.h>

#include "softkvm/vec/vec.h"

static inline __m128i *x(struct cpu *c, unsigned n) { return (__m128i *)c->fpu.zmm[n]; }

/* VEX writes zero what lies above. */
static inline void zero_up(struct cpu *c, unsigned n, unsigned from)
{
	const __m128i z = _mm_setzero_si128();

	if (from == 16)
		_mm_storeu_si128(x(c, n) + 1, z);
	_mm_storeu_si128(x(c, n) + 2, z);
	_mm_storeu_si128(x(c, n) + 3, z);
}

static inline uint64_t operand(struct cpu *c, const struct insn *i, unsigned size, unsigned access)
{
	uint64_t lin;

	if (vec_misaligned_first(c, i, i->aux))
		cpu_gp(c, 0);
	lin = insn_lin(c, i, size, access);
	if (unlikely(lin & i->aux))
		cpu_gp(c, 0);
	return lin;
}

/* -- whole-register moves ------------------------------------------------------------------------ */
static inline void load16(struct cpu *c, const struct insn *i)
{
	uint64_t lin = operand(c, i, 16, ACC_READ);
	const void *p = tlb_hit_r(c, lin, 16);

	if (likely(p)) {
		_mm_storeu_si128(x(c, i->dst), ram_ld128(p));
	} else {
		uint8_t buf[16];

		mem_read(c, lin, buf, 16);
		memcpy(x(c, i->dst), buf, 16);
	}
}

static inline void store16(struct cpu *c, const struct insn *i)
{
	uint64_t lin = operand(c, i, 16, ACC_WRITE);
	void *p = tlb_hit_w(c, lin, 16);

	if (likely(p))
		ram_st128(p, _mm_loadu_si128(x(c, i->src)));
	else
		mem_write(c, lin, x(c, i->src), 16);
}

static void sse_load16(struct cpu *c, const struct insn *i) { vec_check_sse(c); load16(c, i); }
static void sse_store16(struct cpu *c, const struct insn *i) { vec_check_sse(c); store16(c, i); }
static void vex_load16(struct cpu *c, const struct insn *i) { vec_check_vex(c); load16(c, i); zero_up(c, i->dst, 16); }
static void vex_store16(struct cpu *c, const struct insn *i) { vec_check_vex(c); store16(c, i); }

static void sse_move16(struct cpu *c, const struct insn *i)
{
	vec_check_sse(c);
	_mm_storeu_si128(x(c, i->dst), _mm_loadu_si128(x(c, i->src)));
}

static void vex_move16(struct cpu *c, const struct insn *i)
{
	vec_check_vex(c);
	_mm_storeu_si128(x(c, i->dst), _mm_loadu_si128(x(c, i->src)));
	zero_up(c, i->dst, 16);
}

static void vex_move32(struct cpu *c, const struct insn *i)
{
	__m128i lo, hi;

	vec_check_vex(c);
	lo = _mm_loadu_si128(x(c, i->src));
	hi = _mm_loadu_si128(x(c, i->src) + 1);
	_mm_storeu_si128(x(c, i->dst), lo);
	_mm_storeu_si128(x(c, i->dst) + 1, hi);
	zero_up(c, i->dst, 32);
}

static void vex_load32(struct cpu *c, const struct insn *i)
{
	uint8_t buf[32];
	uint64_t lin;
	const void *p;

	vec_check_vex(c);
	lin = operand(c, i, 32, ACC_READ);
	p = tlb_hit_r(c, lin, 32);
	if (unlikely(!p)) {
		mem_read(c, lin, buf, 32);
		p = buf;
	}
	_mm_storeu_si128(x(c, i->dst), ram_ld128(p));
	_mm_storeu_si128(x(c, i->dst) + 1, ram_ld128((const __m128i *)p + 1));
	zero_up(c, i->dst, 32);
}

static void vex_store32(struct cpu *c, const struct insn *i)
{
	uint64_t lin;
	void *p;

	vec_check_vex(c);
	lin = operand(c, i, 32, ACC_WRITE);
	p = tlb_hit_w(c, lin, 32);
	if (unlikely(!p)) {
		mem_write(c, lin, x(c, i->src), 32);
		return;
	}
	ram_st128(p, _mm_loadu_si128(x(c, i->src)));
	ram_st128((__m128i *)p + 1, _mm_loadu_si128(x(c, i->src) + 1));
}

/* -- MOVD, MOVQ ---------------------------------------------------------------------------------- */
static inline void set_low(struct cpu *c, const struct insn *i, uint64_t v, bool vex)
{
	_mm_storeu_si128(x(c, i->dst), _mm_set_epi64x(0, (long long)v));
	if (vex)
		zero_up(c, i->dst, 16);
}

static inline uint64_t low64(struct cpu *c, unsigned n) { return ld_le64(c->fpu.zmm[n]); }

#define LOW(name, vexp)                                                                                       \
	static void name##_load4(struct cpu *c, const struct insn *i)                                         \
	{ vec_check_##name(c); set_low(c, i, mem_ld32(c, insn_lin(c, i, 4, ACC_READ)), vexp); }               \
	static void name##_load8(struct cpu *c, const struct insn *i)                                         \
	{ vec_check_##name(c); set_low(c, i, mem_ld64(c, insn_lin(c, i, 8, ACC_READ)), vexp); }               \
	static void name##_store4(struct cpu *c, const struct insn *i)                                        \
	{ vec_check_##name(c); mem_st32(c, insn_lin(c, i, 4, ACC_WRITE), (uint32_t)low64(c, i->src)); }       \
	static void name##_store8(struct cpu *c, const struct insn *i)                                        \
	{ vec_check_##name(c); mem_st64(c, insn_lin(c, i, 8, ACC_WRITE), low64(c, i->src)); }                 \
	static void name##_from4(struct cpu *c, const struct insn *i)                                         \
	{ vec_check_##name(c); set_low(c, i, REG32(c, i->src), vexp); }                                       \
	static void name##_from8(struct cpu *c, const struct insn *i)                                         \
	{ vec_check_##name(c); set_low(c, i, REG64(c, i->src), vexp); }                                       \
	static void name##_to4(struct cpu *c, const struct insn *i)                                           \
	{ vec_check_##name(c); REG_SET32(c, i->dst, low64(c, i->src)); }                                      \
	static void name##_to8(struct cpu *c, const struct insn *i)                                           \
	{ vec_check_##name(c); REG64(c, i->dst) = low64(c, i->src); }                                         \
	static void name##_movq(struct cpu *c, const struct insn *i)                                          \
	{ vec_check_##name(c); set_low(c, i, low64(c, i->src), vexp); }
LOW(sse, false)
LOW(vex, true)

struct lowset { insn_fn *load4, *load8, *store4, *store8, *from4, *from8, *to4, *to8, *movq; };
static const struct lowset lows[2] = {
	{ sse_load4, sse_load8, sse_store4, sse_store8, sse_from4, sse_from8, sse_to4, sse_to8, sse_movq },
	{ vex_load4, vex_load8, vex_store4, vex_store8, vex_from4, vex_from8, vex_to4, vex_to8, vex_movq },
};

static bool is_vec(const ZydisDecodedOperand *o)
{
	return o->type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(o->reg.value) == ZYDIS_REGCLASS_XMM;
}

static bool low_decode(struct insn *i, const struct decoded *d, bool vex)
{
	const struct lowset *l = &lows[vex];
	const ZydisDecodedOperand *a = &d->op[0], *b = &d->op[1];
	bool q = MIN(a->size, b->size) == 64, xa = is_vec(a), xb = is_vec(b);

	if (xa)
		i->dst = (uint8_t)ZydisRegisterGetId(a->reg.value);
	if (xb)
		i->src = (uint8_t)ZydisRegisterGetId(b->reg.value);
	if (xa && xb)
		i->fn = l->movq;
	else if (xa && b->type == ZYDIS_OPERAND_TYPE_MEMORY)
		i->fn = q ? l->load8 : l->load4;
	else if (xb && a->type == ZYDIS_OPERAND_TYPE_MEMORY)
		i->fn = q ? l->store8 : l->store4;
	else if (xa) {
		i->src = insn_reg_off(b->reg.value);
		i->fn = q ? l->from8 : l->from4;
	} else {
		i->dst = insn_reg_off(a->reg.value);
		i->fn = q ? l->to8 : l->to4;
	}
	return xa || xb;
}

/* -- logic and compares, register and memory ------------------------------------------------------ */
#define ALU(name, expr)                                                                                       \
	static void sse_##name(struct cpu *c, const struct insn *i)                                           \
	{                                                                                                     \
		__m128i a, b;                                                                                 \
		vec_check_sse(c);                                                                             \
		a = _mm_loadu_si128(x(c, i->dst));                                                            \
		b = _mm_loadu_si128(x(c, i->src));                                                            \
		_mm_storeu_si128(x(c, i->dst), expr);                                                         \
	}                                                                                                     \
	static void vex_##name(struct cpu *c, const struct insn *i)                                           \
	{                                                                                                     \
		__m128i a, b;                                                                                 \
		vec_check_vex(c);                                                                             \
		a = _mm_loadu_si128(x(c, i->aux));                                                            \
		b = _mm_loadu_si128(x(c, i->src));                                                            \
		_mm_storeu_si128(x(c, i->dst), expr);                                                         \
		zero_up(c, i->dst, 16);                                                                       \
	}
ALU(xor, _mm_xor_si128(a, b))
ALU(and, _mm_and_si128(a, b))
ALU(or, _mm_or_si128(a, b))
ALU(andn, _mm_andnot_si128(a, b))
ALU(cmpeqb, _mm_cmpeq_epi8(a, b))
ALU(subb, _mm_sub_epi8(a, b))
ALU(minub, _mm_min_epu8(a, b))
ALU(addd, _mm_add_epi32(a, b))
ALU(addq, _mm_add_epi64(a, b))
ALU(unpcklqdq, _mm_unpacklo_epi64(a, b))

static insn_fn *alu(ZydisMnemonic m, bool *vex)
{
#define A(M, V, f) case ZYDIS_MNEMONIC_##M: *vex = false; return sse_##f; case ZYDIS_MNEMONIC_##V: *vex = true; return vex_##f
	switch (m) {
	A(PXOR, VPXOR, xor); A(XORPS, VXORPS, xor); A(XORPD, VXORPD, xor);
	A(PAND, VPAND, and); A(ANDPS, VANDPS, and); A(ANDPD, VANDPD, and);
	A(POR, VPOR, or); A(ORPS, VORPS, or); A(ORPD, VORPD, or);
	A(PANDN, VPANDN, andn); A(ANDNPS, VANDNPS, andn); A(ANDNPD, VANDNPD, andn);
	A(PCMPEQB, VPCMPEQB, cmpeqb); A(PSUBB, VPSUBB, subb); A(PMINUB, VPMINUB, minub);
	A(PADDD, VPADDD, addd); A(PADDQ, VPADDQ, addq); A(PUNPCKLQDQ, VPUNPCKLQDQ, unpcklqdq);
	default: return NULL;
	}
#undef A
}

static void sse_pmovmskb(struct cpu *c, const struct insn *i)
{
	vec_check_sse(c);
	REG64(c, i->dst) = (uint32_t)_mm_movemask_epi8(_mm_loadu_si128(x(c, i->src)));
}

static void vex_pmovmskb(struct cpu *c, const struct insn *i)
{
	uint32_t lo, hi;

	vec_check_vex(c);
	lo = (uint32_t)_mm_movemask_epi8(_mm_loadu_si128(x(c, i->src)));
	hi = i->aux ? (uint32_t)_mm_movemask_epi8(_mm_loadu_si128(x(c, i->src) + 1)) : 0;
	REG64(c, i->dst) = lo | hi << 16;
}

/* -- decoding ------------------------------------------------------------------------------------- */
static bool move_decode(struct insn *i, const struct vec_op *op, const struct decoded *d, bool vex)
{
	bool wide = op->s.width == 32;

	for (unsigned n = 0; n < 2; n++)
		if (d->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER)
			*(n ? &i->src : &i->dst) = (uint8_t)ZydisRegisterGetId(d->op[n].reg.value);
	i->aux = op->align;
	if (op->flags & VO_STORE)
		i->fn = wide ? vex_store32 : vex ? vex_store16 : sse_store16;
	else if (op->flags & VO_LOAD)
		i->fn = wide ? vex_load32 : vex ? vex_load16 : sse_load16;
	else
		i->fn = wide ? vex_move32 : vex ? vex_move16 : sse_move16;
	return true;
}

static bool alu_decode(struct insn *i, const struct vec_op *op, const struct decoded *d)
{
	bool vex = false;
	insn_fn *fn = alu(d->z.mnemonic, &vex);
	const ZydisDecodedOperand *last = &d->op[vex ? 2 : 1];

	if (!fn || op->size || op->s.width == 32)
		return false;
	i->fn = fn;
	i->dst = (uint8_t)ZydisRegisterGetId(d->op[0].reg.value);
	i->src = (uint8_t)ZydisRegisterGetId(last->reg.value);
	if (vex)
		i->aux = (uint8_t)ZydisRegisterGetId(d->op[1].reg.value);
	return true;
}

bool hot_decode(struct insn *i, const struct decoded *d, const struct vec_op *op)
{
	bool vex = d->z.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;

	if (op->cls != (vex ? VC_VEX : VC_SSE) || op->s.mm_in || op->flags & VO_VMASK)
		return false;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_MOVAPS: case ZYDIS_MNEMONIC_MOVAPD: case ZYDIS_MNEMONIC_MOVDQA:
	case ZYDIS_MNEMONIC_MOVUPS: case ZYDIS_MNEMONIC_MOVUPD: case ZYDIS_MNEMONIC_MOVDQU:
	case ZYDIS_MNEMONIC_VMOVAPS: case ZYDIS_MNEMONIC_VMOVAPD: case ZYDIS_MNEMONIC_VMOVDQA:
	case ZYDIS_MNEMONIC_VMOVUPS: case ZYDIS_MNEMONIC_VMOVUPD: case ZYDIS_MNEMONIC_VMOVDQU:
	case ZYDIS_MNEMONIC_MOVNTDQ: case ZYDIS_MNEMONIC_MOVNTPS: case ZYDIS_MNEMONIC_VMOVNTDQ: case ZYDIS_MNEMONIC_VMOVNTPS:
		return move_decode(i, op, d, vex);
	case ZYDIS_MNEMONIC_MOVD: case ZYDIS_MNEMONIC_MOVQ: case ZYDIS_MNEMONIC_VMOVD: case ZYDIS_MNEMONIC_VMOVQ:
		return low_decode(i, d, vex);
	case ZYDIS_MNEMONIC_PMOVMSKB: case ZYDIS_MNEMONIC_VPMOVMSKB:
		i->dst = insn_reg_off(d->op[0].reg.value);
		i->src = (uint8_t)ZydisRegisterGetId(d->op[1].reg.value);
		i->aux = op->s.width == 32;
		i->fn = vex ? vex_pmovmskb : sse_pmovmskb;
		return true;
	default:
		return alu_decode(i, op, d);
	}
}
