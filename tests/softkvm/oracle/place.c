/* Random states, and operands placed in the sandbox. */
#include <string.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

uint64_t number(void)
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

static uint64_t low_bits(uint64_t v, unsigned bits) { return bits >= 64 ? v : v & ((1ull << bits) - 1); }

/* What an address takes from a register; AL (XLAT) is the only one of 8 bits. */
static uint64_t reg_value(const struct state *s, ZydisRegister r)
{
	return r == ZYDIS_REGISTER_NONE ? 0 : low_bits(s->gpr[gpr_of(r)], ZydisRegisterGetWidth(ZYDIS_MACHINE_MODE_LONG_64, r));
}

static uint64_t seg_base(const struct test_case *t, const struct state *s, ZydisRegister seg)
{
	uint16_t sel = seg == ZYDIS_REGISTER_CS ? s->cs : seg == ZYDIS_REGISTER_SS ? s->ss :
		       s->seg[seg == ZYDIS_REGISTER_ES ? 1 : seg == ZYDIS_REGISTER_FS ? 2 : seg == ZYDIS_REGISTER_GS ? 3 : 0];

	if (t->bits == 64 && seg != ZYDIS_REGISTER_FS && seg != ZYDIS_REGISTER_GS)
		return 0;
	switch (sel) {
	case SEL_FS: return arena() + FS_BASE;
	case SEL_GS: return arena() + GS_BASE;
	case SEL_CS16: return arena() + A_CODE;
	case SEL_DATA16: return arena() + DATA16_BASE;
	default: return 0;
	}
}

static bool rip_relative(const ZydisDecodedOperandMem *m) { return m->base == ZYDIS_REGISTER_RIP || m->base == ZYDIS_REGISTER_EIP; }

/* BT, BTS, BTR, BTC with the offset in a register reach beyond their operand: by how much. */
static bool bit_string(const struct test_case *t, const ZydisDecodedOperand *o)
{
	switch (t->z.mnemonic) {
	case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
		return o == &t->op[0] && t->op[1].type == ZYDIS_OPERAND_TYPE_REGISTER;
	default:
		return false;
	}
}

static uint64_t bit_reach(const struct test_case *t, const struct state *s)
{
	unsigned w = t->op[1].size;
	int64_t off = (int64_t)(s->gpr[gpr_of(t->op[1].reg.value)] << (64 - w)) >> (64 - w);

	return (uint64_t)((off >> (w == 64 ? 6 : w == 32 ? 5 : 4)) * (int)(w / 8));
}

/* Of the address, what comes from neither base register nor segment. */
static uint64_t offset_rest(const struct test_case *t, const struct state *s, const ZydisDecodedOperand *o)
{
	const ZydisDecodedOperandMem *m = &o->mem;
	uint64_t rest = m->disp.has_displacement ? (uint64_t)m->disp.value : 0;

	if (m->type != ZYDIS_MEMOP_TYPE_VSIB)
		rest += reg_value(s, m->index) * (m->scale ? m->scale : 1);
	return rest + (bit_string(t, o) ? bit_reach(t, s) : 0);
}

uint64_t operand_address(const struct test_case *t, const struct state *s, const ZydisDecodedOperand *o)
{
	uint64_t base = rip_relative(&o->mem) ? s->rip + t->len : reg_value(s, o->mem.base);

	base = low_bits(base + offset_rest(t, s, o), t->z.address_width) + seg_base(t, s, o->mem.segment);
	return t->bits == 64 ? base : (uint32_t)base;
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

static uint64_t random_target(const ZydisDecodedOperand *o)
{
	uint64_t target = (uintptr_t)sandbox;

	switch (below(8)) {
	case 0: return target + below(SANDBOX);
	case 1: return target + 4096 - 64 + below(128);
	case 2: return target + SANDBOX - o->size / 8 - (below(4) ? 0 : below(3)) + 1;
	case 3: return target + SANDBOX - 32 + below(64);       /* into the page that cannot be written */
	case 4: return below(4) ? target + below(128) - 64 : target + 64 * below(SANDBOX / 64 - 8);
	default: return target + 64 * below(SANDBOX / 64 - 8);
	}
}

/* No base: the displacement in the instruction says it. */
static bool patch_displacement(struct test_case *t, const struct state *s, const ZydisDecodedOperand *o, uint64_t target)
{
	ZydisDecodedOperandMem *m = (ZydisDecodedOperandMem *)(uintptr_t)&o->mem;
	unsigned size = t->z.raw.disp.size;
	uint64_t d = target - (rip_relative(m) ? s->rip + t->len : 0);

	if (!m->disp.has_displacement || size < 16)
		return false;
	m->disp.value = 0;
	d -= offset_rest(t, s, o);
	memcpy(t->bytes + t->z.raw.disp.offset, &d, size / 8);
	m->disp.value = size == 64 ? (int64_t)d : size == 32 ? (int32_t)d : (int16_t)d;
	return true;
}

static bool place(struct test_case *t, struct state *s, const ZydisDecodedOperand *o)
{
	const ZydisDecodedOperandMem *m = &o->mem;
	uint64_t target = random_target(o) - seg_base(t, s, m->segment);

	if (m->type == ZYDIS_MEMOP_TYPE_AGEN || m->type == ZYDIS_MEMOP_TYPE_MIB)
		return true;
	if (m->type == ZYDIS_MEMOP_TYPE_VSIB) {
		random_indices(s, m, t->z.opcode & 1);
		target = (uintptr_t)sandbox + SANDBOX / 2 + below(256) - seg_base(t, s, m->segment);
	} else if (m->index != ZYDIS_REGISTER_NONE) {
		if (m->base != ZYDIS_REGISTER_NONE && gpr_of(m->index) == gpr_of(m->base))
			return false;
		s->gpr[gpr_of(m->index)] = below(4) ? below(65536) : low_bits(rnd(), t->bits);
	}
	if (bit_string(t, o)) {
		unsigned r = gpr_of(t->op[1].reg.value);

		if (m->base != ZYDIS_REGISTER_NONE && r == gpr_of(m->base))
			return false;
		if (below(2) && (m->index == ZYDIS_REGISTER_NONE || r != gpr_of(m->index)))
			s->gpr[r] = low_bits((uint64_t)below(4096) - 2048, t->bits);
	}
	if (m->base == ZYDIS_REGISTER_NONE || rip_relative(m))
		return patch_displacement(t, s, o, target);
	s->gpr[gpr_of(m->base)] = low_bits(target - offset_rest(t, s, o), t->z.address_width);
	if (below(4) == 0)      /* bits that the address does not take */
		s->gpr[gpr_of(m->base)] |= low_bits(rnd(), t->bits) & ~low_bits(~0ull, ZydisRegisterGetWidth(ZYDIS_MACHINE_MODE_LONG_64, m->base));
	return true;
}

/* -- where control goes --------------------------------------------------------------------------- */
/* From 16-bit code never to 64-bit code: the upper half of RSP is Linux's then (espfix), and it handles the fault there without end. */
static uint16_t random_selector(const struct test_case *t)
{
	static const uint16_t sel[] = { SEL_CS32, SEL_DATA, SEL_CS64, SEL_FS, SEL_GS, SEL_CS16, SEL_DATA16, 0, 3, 0x10, 0xfff8, SEL_DATA, SEL_CS64 };

	uint16_t v = sel[below(ARRAY_SIZE(sel))];

	return t->bits == 16 && v == SEL_CS64 ? SEL_CS32 : v;
}

/* Into the code area, beside the instruction; in code bytes. */
static unsigned random_code(const struct test_case *t)
{
	unsigned to;

	do {
		to = below(8) ? below(CODE_SIZE) : CODE_SIZE - 2 + below(4);
	} while (to + 1 >= t->at && to < t->at + t->len);
	return to;
}

static uint64_t code_address(const struct test_case *t, unsigned to)
{
	return t->bits == 16 ? to : arena() + A_CODE + to;
}

/* Bytes of a near or far pointer as the instruction pops or loads them. */
static void put_word(struct state *s, uint64_t lin, uint64_t v, unsigned size)
{
	uint64_t off = lin - (uintptr_t)sandbox;

	if (off <= SANDBOX - size)
		memcpy(s->mem + off, &v, size);
}

static bool is_far(const struct test_case *t)
{
	return t->z.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || t->z.mnemonic == ZYDIS_MNEMONIC_IRET ||
	       t->z.mnemonic == ZYDIS_MNEMONIC_IRETD || t->z.mnemonic == ZYDIS_MNEMONIC_IRETQ;
}

static bool place_branch(struct test_case *t, struct state *s)
{
	const ZydisDecodedOperand *o = &t->op[0];
	unsigned size = t->z.raw.imm[0].size;
	int64_t rel;

	if (!t->z.raw.imm[0].is_relative) {
		/* A far pointer, offset and selector. */
		uint64_t to = code_address(t, random_code(t));
		uint16_t sel = random_selector(t);

		if (o->type != ZYDIS_OPERAND_TYPE_POINTER)
			return true;
		memcpy(t->bytes + t->z.raw.imm[0].offset, &to, size / 8);
		memcpy(t->bytes + t->z.raw.imm[1].offset, &sel, 2);
		return true;
	}
	if (size == 8) {
		rel = t->z.raw.imm[0].value.s;
		rel += t->at + t->len;
		return !(rel + 1 >= (int64_t)t->at && rel < (int64_t)(t->at + t->len));
	}
	rel = (int64_t)random_code(t) - (t->at + t->len);
	memcpy(t->bytes + t->z.raw.imm[0].offset, &rel, size / 8);
	return true;
}

/* Memory that holds where to go: an indirect branch's operand, the stack of returns; selectors of loads. */
static void store_targets(struct test_case *t, struct state *s)
{
	bool popping = t->z.meta.category == ZYDIS_CATEGORY_RET;
	uint16_t popped_ss = s->ss;

	for (unsigned n = 0; n < t->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &t->op[n];
		unsigned w = t->z.operand_width / 8;
		uint64_t at;

		if (o->type != ZYDIS_OPERAND_TYPE_MEMORY || o->mem.type != ZYDIS_MEMOP_TYPE_MEM || !(o->actions & ZYDIS_OPERAND_ACTION_MASK_READ))
			continue;
		at = operand_address(t, s, o);
		switch (t->z.mnemonic) {
		case ZYDIS_MNEMONIC_IRET: case ZYDIS_MNEMONIC_IRETD: case ZYDIS_MNEMONIC_IRETQ:
			put_word(s, at + 2 * w, (rnd() & 0x254ed5) | 0x202, w);
			popped_ss = below(4) ? s->ss : random_selector(t);
			put_word(s, at + 4 * w, popped_ss, w);
			put_word(s, at + 3 * w, (uintptr_t)sandbox + below(SANDBOX), w);
			break;
		case ZYDIS_MNEMONIC_POPF: case ZYDIS_MNEMONIC_POPFD: case ZYDIS_MNEMONIC_POPFQ:
			put_word(s, at, rnd() & ~(uint64_t)FL_TF, w);
			continue;
		case ZYDIS_MNEMONIC_POP:
			put_word(s, at, random_selector(t), 2);
			continue;
		case ZYDIS_MNEMONIC_LES: case ZYDIS_MNEMONIC_LDS: case ZYDIS_MNEMONIC_LSS: case ZYDIS_MNEMONIC_LFS: case ZYDIS_MNEMONIC_LGS:
			put_word(s, at + w, random_selector(t), 2);
			continue;
		case ZYDIS_MNEMONIC_MOV:
			if (t->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(t->op[0].reg.value) == ZYDIS_REGCLASS_SEGMENT)
				put_word(s, at, random_selector(t), 2);
			continue;
		default:
			break;
		}
		if (!popping && t->z.meta.branch_type == ZYDIS_BRANCH_TYPE_NONE)
			continue;
		/* One thing wrong at a time: which is told first is the processor's choice. */
		if (is_far(t))
			put_word(s, at + w, below(4) ? s->cs : popped_ss != s->ss ? s->cs : random_selector(t), 2);
		put_word(s, at, code_address(t, random_code(t)), w);
	}
}

static void registers_of_control(struct test_case *t, struct state *s)
{
	uint64_t near = (uintptr_t)sandbox + below(SANDBOX) - seg_base(t, s, ZYDIS_REGISTER_SS);

	switch (t->z.mnemonic) {
	case ZYDIS_MNEMONIC_LOOP: case ZYDIS_MNEMONIC_LOOPE: case ZYDIS_MNEMONIC_LOOPNE: case ZYDIS_MNEMONIC_JCXZ:
	case ZYDIS_MNEMONIC_JECXZ: case ZYDIS_MNEMONIC_JRCXZ:
		if (below(2))
			s->gpr[R_RCX] = low_bits((uint64_t)below(3) | (rnd() & (below(2) ? 0 : below(2) ? ~0xffffull : ~0xffffffffull)), t->bits);
		break;
	case ZYDIS_MNEMONIC_ENTER:
		if (below(4))
			t->bytes[t->z.raw.imm[0].offset + 1] &= 3;
		if (below(2))
			t->bytes[t->z.raw.imm[1].offset] &= 3;
		s->gpr[R_RBP] = low_bits(near, t->bits);
		break;
	case ZYDIS_MNEMONIC_LEAVE:
		s->gpr[R_RBP] = low_bits(near, t->bits);
		break;
	case ZYDIS_MNEMONIC_MOV:
		if (t->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(t->op[0].reg.value) == ZYDIS_REGCLASS_SEGMENT &&
		    t->op[1].type == ZYDIS_OPERAND_TYPE_REGISTER)
			s->gpr[gpr_of(t->op[1].reg.value)] = random_selector(t);
		break;
	case ZYDIS_MNEMONIC_RET:
		/* AMD's far return probes the stack that it leaves first of all. */
		if (is_far(t) && t->z.raw.imm[0].size)
			t->bytes[t->z.raw.imm[0].offset] &= 0xf8, t->bytes[t->z.raw.imm[0].offset + 1] = 0;
		break;
	case ZYDIS_MNEMONIC_JMP: case ZYDIS_MNEMONIC_CALL:
		if (t->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER)
			s->gpr[gpr_of(t->op[0].reg.value)] = below(16) ? code_address(t, random_code(t)) :
				t->bits == 64 && below(2) ? 0x123456789abcdef0 : (uintptr_t)sandbox + below(SANDBOX);
		break;
	default:
		break;
	}
}

/* -- images ----------------------------------------------------------------------------------------- */
/* Asked for is what both sides have. */
static void ask_for_common(struct state *s)
{
	s->gpr[R_RAX] = (s->gpr[R_RAX] | (below(2) ? common_xcr0() : 0)) & ~(uint64_t)(0xffffffff & ~common_xcr0());
	s->gpr[R_RDX] &= ~(uint64_t)0xffffffff;
}

/* A header that can be restored, most of the time. */
static void make_header(struct state *s, uint64_t at)
{
	uint64_t bv = rnd() & common_xcr0(), comp = below(2) ? 0 : (rnd() & common_xcr0()) | bv | 1ull << 63;

	memset(s->mem + at, 0, 64);
	if (below(16) == 0)
		bv |= rnd();
	if (below(32) == 0)
		comp |= rnd() & rnd();
	st_le64(s->mem + at, bv);
	st_le64(s->mem + at + 8, comp);
	if (below(32) == 0)
		s->mem[at + 16 + below(48)] = 1;
}

static bool make_image(struct test_case *t, struct state *s)
{
	if ((s->gpr[R_RAX] & 0xffffffff & ~common_xcr0()) || (uint32_t)s->gpr[R_RDX])
		return false;
	for (unsigned n = 0; n < t->z.operand_count; n++) {
		uint64_t at;

		if (t->op[n].type != ZYDIS_OPERAND_TYPE_MEMORY || t->op[n].mem.type != ZYDIS_MEMOP_TYPE_MEM)
			continue;
		at = operand_address(t, s, &t->op[n]) - (uintptr_t)sandbox;
		/* All of it can be had or nothing: which parts are touched is the processor's choice. */
		if (at > SANDBOX - 4096)
			return at >= SANDBOX && at < SANDBOX + 64;
		if (below(16) == 0)
			continue;
		st_le32(s->mem + at + 24, (uint32_t)rnd() & 0xffff);
		make_header(s, at + 512);
	}
	return true;
}

static bool is_image(const struct test_case *t)
{
	switch (t->z.meta.category) {
	case ZYDIS_CATEGORY_XSAVE: case ZYDIS_CATEGORY_XSAVEOPT:
		return true;
	default:
		return t->z.mnemonic == ZYDIS_MNEMONIC_FXRSTOR || t->z.mnemonic == ZYDIS_MNEMONIC_FXRSTOR64 ||
		       t->z.mnemonic == ZYDIS_MNEMONIC_FXSAVE || t->z.mnemonic == ZYDIS_MNEMONIC_FXSAVE64;
	}
}

/* -- all of it -------------------------------------------------------------------------------------- */
/* Alignment of more than an x87 number is checked by some processors and not by others; of two operands either may come first. */
static bool alignment_defined(const struct test_case *t)
{
	unsigned operands = 0;

	for (unsigned n = 0; n < t->z.operand_count; n++) {
		if (t->op[n].type != ZYDIS_OPERAND_TYPE_MEMORY)
			continue;
		if (t->op[n].size > 80 || t->op[n].mem.type == ZYDIS_MEMOP_TYPE_VSIB)
			return false;
		operands++;
	}
	return operands < 2 && !is_far(t) && t->z.mnemonic != ZYDIS_MNEMONIC_CALL;
}

static void random_flags(const struct test_case *t, struct state *s)
{
	s->flags = FL_1 | FL_IF | (rnd() & OSZAPC);
	if (below(4) == 0)
		s->flags |= FL_DF;
	if (below(16) == 0 && alignment_defined(t))
		s->flags |= FL_AC;
	if (below(16) == 0)
		s->flags |= FL_ID;
	if (below(32) == 0)
		s->flags |= FL_NT;
}

static void random_registers(const struct test_case *t, struct state *s)
{
	for (unsigned r = 0; r < 16; r++)
		s->gpr[r] = low_bits(number(), t->bits == 64 ? 64 : 32);
	random_flags(t, s);
	for (unsigned r = 0; r < (native_avx512() ? 32 : 16); r++)
		for (unsigned n = 0; n < (native_avx512() ? 64 : host_avx() ? 32 : 16); n += 8)
			st_le64(s->zmm[r] + n, number());
	for (unsigned r = 0; native_avx512() && r < 8; r++)
		s->k[r] = below(4) ? rnd() : 0;
	random_x87(s);
	random_mxcsr(s);
	for (unsigned n = 0; n < SANDBOX; n += 8)
		st_le64(s->mem + n, number());
	if (is_string(t))
		s->gpr[R_RCX] = below(9);
}

static void segments(const struct test_case *t, struct state *s)
{
	uint16_t data = t->bits == 16 ? SEL_DATA16 : SEL_DATA;

	s->cs = t->bits == 64 ? SEL_CS64 : t->bits == 32 ? SEL_CS32 : SEL_CS16;
	s->ss = data;
	/* Addresses of 16 bits need a base in the arena. */
	s->seg[0] = s->seg[1] = t->z.address_width == 16 ? SEL_DATA16 : data;
	s->seg[2] = SEL_FS;
	s->seg[3] = SEL_GS;
}

bool is_string(const struct test_case *t)
{
	return t->z.meta.category == ZYDIS_CATEGORY_STRINGOP || t->z.meta.category == ZYDIS_CATEGORY_IOSTRINGOP;
}

/* Is an operand in the sandbox, all `size` bytes of it? */
static bool inside(const struct test_case *t, const struct state *s, const ZydisDecodedOperand *o, unsigned size)
{
	return operand_address(t, s, o) - (uintptr_t)sandbox <= SANDBOX - size;
}

/*
 * One thing wrong at a time, where the manuals leave open what is looked at first: calls with a bad target have a good stack, far
 * transfers find all that they pop.
 */
static bool transfer_defined(const struct test_case *t, const struct state *s)
{
	/* A short branch's target is good, but in 16-bit code, where it may be beyond the segment's limit. */
	bool call = t->z.mnemonic == ZYDIS_MNEMONIC_CALL && (!t->z.raw.imm[0].is_relative || t->bits == 16);

	if (!call && !is_far(t))
		return true;
	for (unsigned n = 0; n < t->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &t->op[n];

		if (o->type != ZYDIS_OPERAND_TYPE_MEMORY)
			continue;
		if (o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE ? operand_address(t, s, o) - 32 - (uintptr_t)sandbox > SANDBOX - 64 :
		    !inside(t, s, o, 40))
			return false;
	}
	return true;
}

/* Two operands and both bad: which is looked at first is the processor's choice, and in 16-bit code the faults differ. */
static bool string_defined(const struct test_case *t, const struct state *s)
{
	unsigned bad = 0;

	if (t->bits != 16 || !is_string(t))
		return true;
	for (unsigned n = 0; n < t->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &t->op[n];

		bad += o->type == ZYDIS_OPERAND_TYPE_MEMORY && (!inside(t, s, o, o->size / 8) ||
		       (uint32_t)(operand_address(t, s, o) - seg_base(t, s, o->mem.segment)) > DATA16_LIMIT);
	}
	return bad < 2;
}

/* Outside 64-bit code an operand may or may not reach beyond 4 GiB of its segment: the processor's choice. */
static bool wraps(const struct test_case *t, const struct state *s, const ZydisDecodedOperand *o)
{
	uint64_t off = (uint32_t)(operand_address(t, s, o) - seg_base(t, s, o->mem.segment));

	return t->bits != 64 && off + o->size / 8 > 1ull << 32;
}

bool gen_state(struct test_case *t, struct state *s)
{
	memset(s, 0, sizeof *s);
	/* Mostly in the middle, where short branches stay inside; also across and up to the end of pages. */
	t->at = below(4) ? 256 + below(CODE_SIZE - 512) : below(2) ? 4096 - below(16) : CODE_SIZE - 1 - below(20);
	t->flush = below(4) == 0;
	s->rip = code_address(t, t->at);
	segments(t, s);
	random_registers(t, s);
	registers_of_control(t, s);
	if (is_image(t))
		ask_for_common(s);
	for (unsigned n = 0; n < t->z.operand_count; n++)
		if (t->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && !place(t, s, &t->op[n]))
			return false;
	for (unsigned n = 0; n < t->z.operand_count; n++)
		if (t->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && t->op[n].mem.type == ZYDIS_MEMOP_TYPE_MEM && wraps(t, s, &t->op[n]))
			return false;
	/* IRET to a stack of 16 bits leaves the upper half of ESP what it was; Linux hides that. */
	if (t->bits == 16)
		s->gpr[R_RSP] &= 0xffff;
	if (is_image(t) && !make_image(t, s))
		return false;
	store_targets(t, s);
	if (!transfer_defined(t, s) || !string_defined(t, s))
		return false;
	return t->z.meta.branch_type == ZYDIS_BRANCH_TYPE_NONE || place_branch(t, s);
}
