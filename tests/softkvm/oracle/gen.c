/* Random instructions. */
#include <cpuid.h>
#include <string.h>

#include "oracle.h"

static void random_tail(struct test_case *t, unsigned n)
{
	for (; n < 15; n++)
		t->bytes[n] = (uint8_t)rnd();
}

static unsigned put_rex(uint8_t *b, unsigned bits)
{
	if (bits != 64 || below(2))
		return 0;
	b[0] = 0x40 | below(16);
	return 1;
}

/* Operand size, address size, segment: in front of everything else. */
static unsigned put_prefixes(uint8_t *b, unsigned bits)
{
	static const uint8_t seg[] = { 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x64, 0x65 };
	unsigned n = 0;

	if (below(8) == 0)
		b[n++] = seg[below(sizeof seg)];
	if (below(bits == 64 ? 16 : 6) == 0)
		b[n++] = 0x67;
	if (below(bits == 64 ? 12 : 6) == 0)
		b[n++] = 0x66;
	return n;
}

static unsigned put_legacy(uint8_t *b, unsigned bits)
{
	static const uint8_t pre[] = { 0, 0x66, 0xf2, 0xf3 };
	unsigned n = 0, p = pre[below(4)], map = below(4);

	if (p)
		b[n++] = (uint8_t)p;
	n += put_rex(b + n, bits);
	b[n++] = 0x0f;
	if (map == 2)
		b[n++] = 0x38;
	if (map == 3)
		b[n++] = 0x3a;
	return n;
}

static unsigned put_vex(uint8_t *b, unsigned bits)
{
	b[0] = 0xc4;
	b[1] = (uint8_t)((rnd() & 0xe0) | (1 + below(3)) | (bits == 64 ? 0 : 0xc0));
	b[2] = (uint8_t)rnd();
	if (below(3) == 0)
		b[2] |= 0x78;
	return 3;
}

static unsigned put_evex(uint8_t *b, unsigned bits)
{
	b[0] = 0x62;
	b[1] = (uint8_t)((rnd() & 0xf0) | (1 + below(3)) | (bits == 64 ? 0 : 0xc0));
	b[2] = (uint8_t)(rnd() | 4);
	b[3] = (uint8_t)rnd();
	if (below(3) == 0)
		b[2] |= 0x78, b[3] |= 8;
	return 4;
}

static unsigned put_integer(uint8_t *b, unsigned bits)
{
	unsigned n = 0;

	switch (below(8)) {
	case 0: b[n++] = 0x66; break;
	case 1: b[n++] = below(2) ? 0xf2 : 0xf3; break;
	case 2: b[n++] = 0xf0; break;
	}
	if (below(8) == 0) {
		n += put_vex(b + n, bits);
		b[n - 1] &= 0x7b | (rnd() & 0x80);
		return n;
	}
	n += put_rex(b + n, bits);
	if (below(3) == 0) {
		b[n++] = 0x0f;
		if (below(4) == 0)
			b[n++] = 0x38;
	}
	return n;
}

/* Opcodes of the control group: first and how many; 0x0f.. have two bytes. INT1 is missing: what hypervisors make of its RIP differs. */
static const struct { uint16_t op, count; } control[] = {
	{ 0x70, 16 }, { 0x0f80, 16 }, { 0xe0, 4 }, { 0xe8, 2 }, { 0xeb, 1 }, { 0xff, 1 }, { 0xff, 1 }, { 0xc2, 2 }, { 0xc8, 2 }, { 0x50, 16 },
	{ 0x8f, 1 }, { 0x68, 1 }, { 0x6a, 1 }, { 0x9c, 2 }, { 0x60, 3 }, { 0xd7, 1 }, { 0xcc, 3 }, { 0x06, 2 }, { 0x0e, 1 }, { 0x16, 2 },
	{ 0x1e, 2 }, { 0x0fa0, 2 }, { 0x0fa8, 2 }, { 0x8c, 1 }, { 0x8e, 1 }, { 0xc4, 2 }, { 0x0fb2, 1 }, { 0x0fb4, 2 }, { 0xca, 2 }, { 0xcf, 1 },
	{ 0xea, 1 }, { 0x9a, 1 }, { 0xc2, 2 }, { 0xe4, 4 }, { 0xec, 4 }, { 0x6c, 4 }, { 0xf4, 1 }, { 0xfa, 2 },
};

static unsigned put_control(uint8_t *b, unsigned bits)
{
	unsigned n = 0, c = below(ARRAY_SIZE(control)), op = control[c].op + below(control[c].count);

	if (below(16) == 0 && op != 0xe0 && op != 0xe1)         /* LOOPNE and LOOPE: processors see conditions in those */
		b[n++] = below(2) ? 0xf2 : 0xf3;
	n += put_rex(b + n, bits);
	if (op >> 8)
		b[n++] = 0x0f;
	b[n++] = (uint8_t)op;
	if (op == 0xff)
		b[n++] = (uint8_t)((rnd() & 0xc7) | (2 + below(5)) << 3);
	return n;
}

/* FXSAVE, FXRSTOR, XSAVE, XRSTOR, XSAVEOPT, XSAVEC, and their privileged forms. */
static unsigned put_state(uint8_t *b, unsigned bits)
{
	unsigned n = put_rex(b, bits);

	b[n++] = 0x0f;
	b[n++] = below(4) ? 0xae : 0xc7;
	if (b[n - 1] == 0xae) {
		static const uint8_t r[] = { 0, 1, 4, 5, 6 };

		b[n] = (uint8_t)((rnd() & 0xc7) | r[below(5)] << 3);
	} else {
		b[n] = (uint8_t)((rnd() & 0xc7) | (3 + below(3)) << 3);
	}
	return n + 1;
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

/* Without transfers of control, which are the control group's. */
static bool integer_wanted(const struct test_case *t)
{
	switch (t->z.meta.category) {
	case ZYDIS_CATEGORY_BINARY: case ZYDIS_CATEGORY_BITBYTE: case ZYDIS_CATEGORY_BMI1: case ZYDIS_CATEGORY_BMI2:
	case ZYDIS_CATEGORY_CMOV: case ZYDIS_CATEGORY_CONVERT: case ZYDIS_CATEGORY_LOGICAL: case ZYDIS_CATEGORY_LZCNT:
	case ZYDIS_CATEGORY_PUSH: case ZYDIS_CATEGORY_POP: case ZYDIS_CATEGORY_ROTATE: case ZYDIS_CATEGORY_SEMAPHORE:
	case ZYDIS_CATEGORY_SETCC: case ZYDIS_CATEGORY_SHIFT: case ZYDIS_CATEGORY_STRINGOP: case ZYDIS_CATEGORY_ADOX_ADCX:
	case ZYDIS_CATEGORY_DATAXFER: case ZYDIS_CATEGORY_MISC: case ZYDIS_CATEGORY_SSE: case ZYDIS_CATEGORY_FLAGOP:
	case ZYDIS_CATEGORY_DECIMAL: case ZYDIS_CATEGORY_NOP: case ZYDIS_CATEGORY_WIDENOP:
		break;
	default:
		return false;
	}
	switch (t->z.mnemonic) {
	case ZYDIS_MNEMONIC_CPUID: case ZYDIS_MNEMONIC_RDPID: case ZYDIS_MNEMONIC_MONITORX: case ZYDIS_MNEMONIC_MWAITX:
	case ZYDIS_MNEMONIC_CLZERO: case ZYDIS_MNEMONIC_RDRAND: case ZYDIS_MNEMONIC_RDSEED:
		return false;
	default:
		return host_has_int(t);
	}
}

/* VEX.W in code that has no 64-bit registers: ignored by some processors, #UD on others. */
static bool wide_in_narrow(const struct test_case *t)
{
	return t->bits != 64 && t->z.raw.vex.W && (t->z.mnemonic == ZYDIS_MNEMONIC_VPINSRD || t->z.mnemonic == ZYDIS_MNEMONIC_VPEXTRD);
}

/* Vector groups: what has a vector register, but for the states' images, and what makes integers of numbers in memory. */
static bool vector_wanted(const struct test_case *t)
{
	const char *name = ZydisMnemonicGetString(t->z.mnemonic);

	if (wide_in_narrow(t))
		return false;
	if (!strncmp(name, "cvt", 3) || !strncmp(name, "vcvt", 4))
		return true;
	for (unsigned n = 0; n < t->z.operand_count; n++) {
		ZydisRegisterClass c = t->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER ? ZydisRegisterGetClass(t->op[n].reg.value) : ZYDIS_REGCLASS_INVALID;

		if (c == ZYDIS_REGCLASS_MMX || c == ZYDIS_REGCLASS_XMM || c == ZYDIS_REGCLASS_YMM || c == ZYDIS_REGCLASS_ZMM ||
		    c == ZYDIS_REGCLASS_MASK)
			return true;
	}
	return t->z.mnemonic == ZYDIS_MNEMONIC_LDMXCSR || t->z.mnemonic == ZYDIS_MNEMONIC_STMXCSR || t->z.mnemonic == ZYDIS_MNEMONIC_EMMS;
}

static bool control_wanted(const struct test_case *t)
{
	/* INT 0x80 is a system call. */
	return t->z.mnemonic != ZYDIS_MNEMONIC_INT || (t->z.raw.imm[0].value.u & 0xff) != 0x80;
}

static bool host_is_amd(void)
{
	unsigned a, b, c, d;

	return __get_cpuid(0, &a, &b, &c, &d) && c == signature_AMD_ecx;
}

static const ZydisDecoder *decoder(unsigned bits)
{
	static ZydisDecoder d[3];

	if (d[2].machine_mode != ZYDIS_MACHINE_MODE_LONG_64 || !d[2].stack_width) {
		ZydisDecoderInit(&d[0], ZYDIS_MACHINE_MODE_LONG_COMPAT_16, ZYDIS_STACK_WIDTH_16);
		ZydisDecoderInit(&d[1], ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32);
		ZydisDecoderInit(&d[2], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
		for (unsigned n = 0; n < 3; n++) {
			ZydisDecoderEnableMode(&d[n], ZYDIS_DECODER_MODE_AMD_BRANCHES, host_is_amd());
			ZydisDecoderEnableMode(&d[n], ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
			ZydisDecoderEnableMode(&d[n], ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
		}
	}
	return &d[bits / 32];
}

/* Zydis 4.0 gives R13D for an absent base with REX.B and a 32-bit address. */
static void absent_base(struct test_case *t)
{
	for (unsigned n = 0; n < t->z.operand_count; n++) {
		ZydisDecodedOperandMem *m = &t->op[n].mem;

		if (t->op[n].type != ZYDIS_OPERAND_TYPE_MEMORY || m->base != ZYDIS_REGISTER_R13D || t->z.raw.modrm.mod ||
		    !t->z.raw.sib.offset || t->z.raw.sib.base != 5)
			continue;
		m->base = ZYDIS_REGISTER_NONE;
		m->disp.has_displacement = ZYAN_TRUE;
		m->disp.value = t->z.raw.disp.value;
	}
}

/* AMD's near branches heed an operand size prefix, which Zydis does not know of all of them. */
static void narrow_branch(struct test_case *t)
{
	if (t->bits != 64 || !host_is_amd() ||
	    (t->z.meta.branch_type != ZYDIS_BRANCH_TYPE_SHORT && t->z.meta.branch_type != ZYDIS_BRANCH_TYPE_NEAR))
		return;
	for (unsigned n = 0; n < t->z.raw.prefix_count; n++)
		if (t->z.raw.prefixes[n].value == 0x66 && !t->z.raw.rex.W)
			t->z.operand_width = 16;
}

bool gen_instruction(struct test_case *t, enum group g, unsigned bits)
{
	unsigned n;

	memset(t, 0, sizeof *t);
	t->bits = (uint8_t)bits;
	n = put_prefixes(t->bytes, bits);
	switch (g) {
	case G_X87: t->bytes[n++] = 0xd8 | below(8); break;
	case G_SSE: n += put_legacy(t->bytes + n, bits); break;
	case G_AVX: n += put_vex(t->bytes + n, bits); break;
	case G_AVX512: n += put_evex(t->bytes + n, bits); break;
	case G_CONTROL: n += put_control(t->bytes + n, bits); break;
	case G_STATE: n += put_state(t->bytes + n, bits); break;
	default: n += put_integer(t->bytes + n, bits); break;
	}
	random_tail(t, n);
	if (ZYAN_FAILED(ZydisDecoderDecodeFull(decoder(bits), t->bytes, 15, &t->z, t->op)))
		return false;
	t->len = t->z.length;
	absent_base(t);
	narrow_branch(t);
	switch (g) {
	case G_INTEGER: return integer_wanted(t);
	case G_CONTROL: return control_wanted(t);
	case G_X87: case G_STATE: return true;
	default: return vector_wanted(t);
	}
}
