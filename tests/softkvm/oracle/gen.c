/* Random instructions and random states. */
#include <cpuid.h>
#include <string.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

static void random_tail(struct test_case *t, unsigned n)
{
	for (; n < 15; n++)
		t->bytes[n] = (uint8_t)rnd();
}

static unsigned put_legacy(uint8_t *b)
{
	static const uint8_t pre[] = { 0, 0x66, 0xf2, 0xf3 };
	unsigned n = 0, p = pre[below(4)], map = below(4);

	if (p)
		b[n++] = (uint8_t)p;
	if (below(2))
		b[n++] = 0x40 | below(16);
	b[n++] = 0x0f;
	if (map == 2)
		b[n++] = 0x38;
	if (map == 3)
		b[n++] = 0x3a;
	return n;
}

static unsigned put_vex(uint8_t *b)
{
	b[0] = 0xc4;
	b[1] = (uint8_t)((rnd() & 0xe0) | (1 + below(3)));
	b[2] = (uint8_t)rnd();
	if (below(3) == 0)
		b[2] |= 0x78;
	return 3;
}

static unsigned put_evex(uint8_t *b)
{
	b[0] = 0x62;
	b[1] = (uint8_t)((rnd() & 0xf0) | (1 + below(3)));
	b[2] = (uint8_t)(rnd() | 4);
	b[3] = (uint8_t)rnd();
	if (below(3) == 0)
		b[2] |= 0x78, b[3] |= 8;
	return 4;
}

static unsigned put_integer(uint8_t *b)
{
	unsigned n = 0;

	switch (below(8)) {
	case 0: b[n++] = 0x66; break;
	case 1: b[n++] = below(2) ? 0xf2 : 0xf3; break;
	case 2: b[n++] = 0xf0; break;
	}
	if (below(8) == 0) {
		n += put_vex(b + n);
		b[n - 1] &= 0x7b | (rnd() & 0x80);
		return n;
	}
	if (below(2))
		b[n++] = 0x40 | below(16);
	if (below(3) == 0) {
		b[n++] = 0x0f;
		if (below(4) == 0)
			b[n++] = 0x38;
	}
	return n;
}

enum cpuid_reg { EBX = 1, ECX = 2 };

/* By CPUID: gcc and clang know different names for __builtin_cpu_supports(). */
static bool host_bit(unsigned leaf, enum cpuid_reg reg, unsigned bit)
{
	unsigned r[4];

	return __get_cpuid_count(leaf, 0, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}

/* What every x86-64-v3 CPU has; anything newer may be missing here. */
static bool host_has_int(const struct test_case *t)
{
	switch (t->z.meta.isa_set) {
	case ZYDIS_ISA_SET_I86: case ZYDIS_ISA_SET_I186: case ZYDIS_ISA_SET_I386: case ZYDIS_ISA_SET_I486: case ZYDIS_ISA_SET_I486REAL:
	case ZYDIS_ISA_SET_LONGMODE: case ZYDIS_ISA_SET_CMOV: case ZYDIS_ISA_SET_LAHF: case ZYDIS_ISA_SET_PENTIUMREAL:
	case ZYDIS_ISA_SET_CMPXCHG16B:
		return true;
	case ZYDIS_ISA_SET_BMI1: return __builtin_cpu_supports("bmi");
	case ZYDIS_ISA_SET_BMI2: return __builtin_cpu_supports("bmi2");
	case ZYDIS_ISA_SET_LZCNT: return host_bit(0x80000001, ECX, 5);
	case ZYDIS_ISA_SET_MOVBE: return host_bit(1, ECX, 22);
	case ZYDIS_ISA_SET_POPCNT: case ZYDIS_ISA_SET_SSE42: return __builtin_cpu_supports("popcnt");
	case ZYDIS_ISA_SET_ADOX_ADCX: return host_bit(7, EBX, 19);
	default: return false;
	}
}

/* Deterministic, without transfers of control, without reach outside the sandbox. */
static bool integer_wanted(const struct test_case *t)
{
	switch (t->z.meta.category) {
	case ZYDIS_CATEGORY_BINARY: case ZYDIS_CATEGORY_BITBYTE: case ZYDIS_CATEGORY_BMI1: case ZYDIS_CATEGORY_BMI2:
	case ZYDIS_CATEGORY_CMOV: case ZYDIS_CATEGORY_CONVERT: case ZYDIS_CATEGORY_LOGICAL: case ZYDIS_CATEGORY_LZCNT:
	case ZYDIS_CATEGORY_PUSH: case ZYDIS_CATEGORY_POP: case ZYDIS_CATEGORY_ROTATE: case ZYDIS_CATEGORY_SEMAPHORE:
	case ZYDIS_CATEGORY_SETCC: case ZYDIS_CATEGORY_SHIFT: case ZYDIS_CATEGORY_STRINGOP: case ZYDIS_CATEGORY_ADOX_ADCX:
	case ZYDIS_CATEGORY_DATAXFER: case ZYDIS_CATEGORY_MISC: case ZYDIS_CATEGORY_SSE:
		break;
	case ZYDIS_CATEGORY_FLAGOP:
		return t->z.mnemonic != ZYDIS_MNEMONIC_STI && t->z.mnemonic != ZYDIS_MNEMONIC_CLI && t->z.mnemonic != ZYDIS_MNEMONIC_STD;
	default:
		return false;
	}
	switch (t->z.mnemonic) {
	case ZYDIS_MNEMONIC_POPF: case ZYDIS_MNEMONIC_POPFQ: case ZYDIS_MNEMONIC_PUSHF: case ZYDIS_MNEMONIC_PUSHFQ:
	case ZYDIS_MNEMONIC_ENTER: case ZYDIS_MNEMONIC_CPUID: case ZYDIS_MNEMONIC_XLAT: case ZYDIS_MNEMONIC_RDPID:
	case ZYDIS_MNEMONIC_MONITORX: case ZYDIS_MNEMONIC_MWAITX: case ZYDIS_MNEMONIC_CLZERO: case ZYDIS_MNEMONIC_LEAVE:
		return false;
	default:
		break;
	}
	for (unsigned n = 0; n < t->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &t->op[n];

		if (o->type == ZYDIS_OPERAND_TYPE_MEMORY && o->mem.type == ZYDIS_MEMOP_TYPE_MEM && o->size > 512)
			return false;
		if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(o->reg.value) == ZYDIS_REGCLASS_SEGMENT)
			return false;
	}
	return t->z.meta.isa_set != ZYDIS_ISA_SET_RDRAND && t->z.meta.isa_set != ZYDIS_ISA_SET_RDSEED && host_has_int(t);
}

static bool unwanted(const struct test_case *t)
{
	switch (t->z.mnemonic) {
	case ZYDIS_MNEMONIC_FXSAVE: case ZYDIS_MNEMONIC_FXSAVE64: case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64: case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64:
	case ZYDIS_MNEMONIC_XSAVES: case ZYDIS_MNEMONIC_XSAVES64: case ZYDIS_MNEMONIC_XRSTORS: case ZYDIS_MNEMONIC_XRSTORS64:
		return true;            /* state images hold host addresses: xsave_test.c */
	default:
		return t->z.attributes & ZYDIS_ATTRIB_HAS_SEGMENT_FS || t->z.attributes & ZYDIS_ATTRIB_HAS_SEGMENT_GS;
	}
}

bool gen_instruction(struct test_case *t, enum group g)
{
	static ZydisDecoder dec;
	static bool ready;
	unsigned n = 0;

	if (!ready)
		ZydisDecoderInit(&dec, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	ready = true;
	memset(t->bytes, 0, sizeof t->bytes);
	switch (g) {
	case G_X87:
		if (below(8) == 0)
			t->bytes[n++] = 0x66;
		t->bytes[n++] = 0xd8 | below(8);
		break;
	case G_SSE: n = put_legacy(t->bytes); break;
	case G_AVX: n = put_vex(t->bytes); break;
	case G_AVX512: n = put_evex(t->bytes); break;
	default: n = put_integer(t->bytes); break;
	}
	random_tail(t, n);
	if (ZYAN_FAILED(ZydisDecoderDecodeFull(&dec, t->bytes, 15, &t->z, t->op)))
		return false;
	t->len = t->z.length;
	t->integer = g == G_INTEGER;
	if (g == G_INTEGER && !integer_wanted(t))
		return false;
	return !unwanted(t) && engine_prepare(t);
}

/* -- states ----------------------------------------------------------------------------------------- */
static uint64_t number(void)
{
	static const uint64_t special[] = { 0, 1, 0x8000000000000000, 0x3ff0000000000000, 0x7ff0000000000000, 0x7ff8000000000000,
		0x7ff0000000000001, 0x000fffffffffffff, 0x0010000000000000, 0x7fefffffffffffff, 0x3f8000003f800000,
		0x7f8000007fc00000, 0x7f80000100000001, 0x807fffff00800000, 0x7f7fffffff7fffff, 0xffffffffffffffff,
		0x41dfffffffc00000, 0x43e0000000000000, 0x4f0000004effffff, 0x7c007e0004003bff };

	switch (below(4)) {
	case 0: return special[below(ARRAY_SIZE(special))];
	case 1: return (rnd() & 0x800fffffffffffffULL) | (uint64_t)(0x3f0 + below(32)) << 52;
	case 2: return (rnd() & 0x807fffff807fffffULL) | (uint64_t)(0x78 + below(16)) << 23 | (uint64_t)(0x78 + below(16)) << 55;
	default: return rnd();
	}
}

static void random_st(uint8_t *p)
{
	uint64_t m = number() | (below(8) ? BIT(63) : 0);
	uint16_t e = (uint16_t)(0x3fff - 40 + below(80));

	switch (below(8)) {
	case 0: e = 0; m = below(2) ? 0 : m; break;
	case 1: e = 0x7fff; m = below(2) ? BIT(63) : m; break;
	case 2: e = (uint16_t)rnd() & 0x7fff; break;
	}
	if (below(2))
		e |= 0x8000;
	memcpy(p, &m, 8);
	memcpy(p + 8, &e, 2);
	memset(p + 10, 0, 6);
}

static void random_x87(struct state *s)
{
	uint16_t cw = below(3) ? 0x37f : (uint16_t)((rnd() & 0xf3f) | 0x40), sw = (uint16_t)(rnd() & 0x7f7f);

	if (below(2) == 0)
		sw &= 0x7f00;
	if (below(2))
		cw |= 0x3f;
	if (below(8))
		sw &= ~(~cw & 0x3f);
	if (sw & ~cw & 0x3f)
		sw |= 0x8080;
	memset(s->fx, 0, sizeof s->fx);
	memcpy(s->fx, &cw, 2);
	memcpy(s->fx + 2, &sw, 2);
	s->fx[4] = below(2) ? 0xff : (uint8_t)rnd();
	for (unsigned r = 0; r < 8; r++)
		random_st(s->fx + 32 + 16 * r);
}

static void random_mxcsr(struct state *s)
{
	switch (below(4)) {
	case 0: case 1: s->mxcsr = 0x1f80 | (rnd() & 0x3f); break;
	case 2: s->mxcsr = 0x1f80 | (rnd() & 0xe07f); break;
	default: s->mxcsr = rnd() & 0xffff; break;
	}
}

static unsigned gpr_of(ZydisRegister r)
{
	return (unsigned)ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, r)) & 15;
}

/* A gather's indices, small; the element width does not matter, as small 64-bit values are small 32-bit pairs. */
static void random_indices(struct state *s, const ZydisDecodedOperandMem *m, bool wide)
{
	uint8_t *v = s->zmm[ZydisRegisterGetId(m->index) & 31];
	unsigned range = 2000 / (m->scale ? m->scale : 1);

	for (unsigned n = 0; n < 64; n += wide ? 8 : 4) {
		int64_t x = (int64_t)below(range) - (int)(range / 2);

		memcpy(v + n, &x, wide ? 8 : 4);
	}
}

static bool place(struct test_case *t, struct state *s, const ZydisDecodedOperand *o)
{
	const ZydisDecodedOperandMem *m = &o->mem;
	bool vsib = m->type == ZYDIS_MEMOP_TYPE_VSIB;
	uint64_t target = (uintptr_t)sandbox, rest = m->disp.has_displacement ? (uint64_t)m->disp.value : 0;

	if (m->type == ZYDIS_MEMOP_TYPE_AGEN)
		return m->base != ZYDIS_REGISTER_RIP && m->base != ZYDIS_REGISTER_EIP;
	if (m->base == ZYDIS_REGISTER_NONE || m->base == ZYDIS_REGISTER_RIP || m->base == ZYDIS_REGISTER_EIP)
		return false;
	if (vsib) {
		random_indices(s, m, t->z.opcode & 1);
		target += SANDBOX / 2 + below(256);
	} else {
		switch (below(8)) {
		case 0: target += below(SANDBOX); break;
		case 1: target += 4096 - 64 + below(128); break;
		case 2: target += SANDBOX - o->size / 8 - (below(4) ? 0 : below(3) - 1u); break;
		default: target += 64 * below(SANDBOX / 64 - 8); break;
		}
		if (m->index != ZYDIS_REGISTER_NONE) {
			if (gpr_of(m->index) == gpr_of(m->base))
				return false;
			s->gpr[gpr_of(m->index)] = below(65536);
			rest += s->gpr[gpr_of(m->index)] * m->scale;
		}
	}
	s->gpr[gpr_of(m->base)] = target - rest;
	if (t->z.address_width == 32)
		s->gpr[gpr_of(m->base)] = (uint32_t)(target - rest);
	return true;
}

bool gen_state(struct test_case *t, struct state *s)
{
	memset(s, 0, sizeof *s);
	for (unsigned r = 0; r < 16; r++)
		s->gpr[r] = number();
	s->flags = 0x202 | (rnd() & OSZAPC);
	for (unsigned r = 0; r < (native_avx512() ? 32 : 16); r++)
		for (unsigned n = 0; n < (native_avx512() ? 64 : host_avx() ? 32 : 16); n += 8)
			st_le64(s->zmm[r] + n, number());
	for (unsigned r = 0; native_avx512() && r < 8; r++)
		s->k[r] = below(4) ? rnd() : 0;
	if (t->z.meta.category == ZYDIS_CATEGORY_STRINGOP)
		s->gpr[1] = below(9);
	/* A bit offset in a register moves the address. */
	if (t->z.mnemonic >= ZYDIS_MNEMONIC_BT && t->z.mnemonic <= ZYDIS_MNEMONIC_BTS && t->op[1].type == ZYDIS_OPERAND_TYPE_REGISTER &&
	    t->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY) {
		if (gpr_of(t->op[1].reg.value) == gpr_of(t->op[0].mem.base))
			return false;
		if (t->op[0].mem.index != ZYDIS_REGISTER_NONE)
			return false;
		s->gpr[gpr_of(t->op[1].reg.value)] = (uint64_t)below(4096) - 2048;
	}
	random_x87(s);
	random_mxcsr(s);
	for (unsigned n = 0; n < SANDBOX; n += 8)
		st_le64(s->mem + n, number());
	for (unsigned n = 0; n < SANDBOX_PAGES; n++)
		t->tlb[n] = below(4);
	for (unsigned n = 0; n < t->z.operand_count; n++)
		if (t->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && !place(t, s, &t->op[n]))
			return false;
	return true;
}
