/* Bodies of random instructions, and of what code often looks like. */
#include "block_make.h"

uint64_t rng;
ZydisDecoder dec;
bool narrow, moved, patched, evex;
unsigned count_seg;

/* -- instructions ---------------------------------------------------------------------------------- */
static void random_opcode32(uint8_t *b, unsigned *n, bool vec)
{
	if (vec && below(4) == 0)
		b[(*n)++] = (uint8_t)(0xd8 | below(8));
	else if (vec && below(4) == 0)
		*n = 0, b[(*n)++] = 0xc4, b[(*n)++] = (uint8_t)(0xc0 | (below(8) ? 0x20 : 0) | (1 + below(3)));
	else if (vec ? below(3) : below(3) == 0)
		b[(*n)++] = 0x0f;
}

/* An EVEX prefix, or an instruction of the opmask registers. */
static void random_evex(uint8_t *b)
{
	unsigned n = 0;

	if (below(6) == 0) {
		b[n++] = 0xc4;
		b[n++] = (uint8_t)(0xe0 | (below(6) ? 1 : 3));
		b[n++] = (uint8_t)((below(2) ? 0x80 : 0) | (below(2) ? 0x78 : 0x40 | below(8) << 3) | below(8));
		b[n++] = (uint8_t)(below(3) ? 0x90 + below(10) : below(2) ? 0x41 + below(11) : 0x30 + below(4));
	} else {
		b[n++] = 0x62;
		b[n++] = (uint8_t)((narrow ? 0xf0 : rnd() & 0xf0) | (1 + below(3)));
		b[n++] = (uint8_t)((rnd() & 0x83) | 4 | (below(2) ? 0x78 : narrow ? 0x40 | below(8) << 3 : below(16) << 3));
		b[n++] = (uint8_t)((narrow ? 8 : rnd() & 8) | below(3) << 5 | (below(4) ? 0 : 0x10) | (below(3) ? below(8) | (below(2) ? 0x80 : 0) : 0));
		if (below(2))
			b[2] |= 0x78, b[3] |= 8;
	}
	while (n < 15)
		b[n++] = (uint8_t)rnd();
}

static unsigned random_bytes(uint8_t *b, bool vec)
{
	unsigned n = 0;


	switch (below(10)) {
	case 0: b[n++] = 0x66; break;
	case 1: b[n++] = below(2) ? 0xf2 : 0xf3; break;
	case 2: b[n++] = 0xf0; break;
	}
	if (narrow && below(8) == 0)
		b[n++] = "\x26\x2e\x36\x3e\x64\x65\x64\x65\x67"[below(9)];
	if (narrow)
		random_opcode32(b, &n, vec);
	else if (vec && below(4) == 0) {
		if (below(3) == 0)
			b[n++] = (uint8_t)(0x40 | below(16));
		b[n++] = (uint8_t)(0xd8 | below(8));
	} else if (vec && below(2)) {
		if (below(2)) {
			n = 0;
			b[n++] = 0xc4;
			b[n++] = (uint8_t)((rnd() & 0xe0) | (1 + below(3)));
			b[n++] = (uint8_t)rnd();
			if (below(2))
				b[n - 1] |= 0x78;
		} else {
			if (below(2))
				b[n++] = (uint8_t)(0x40 | below(16));
			b[n++] = 0x0f;
		}
	} else if (below(10) == 0) {
		n = 0;
		b[n++] = 0xc4;
		b[n++] = (uint8_t)((rnd() & 0xe0) | (2 + below(2)));
		b[n++] = (uint8_t)(rnd() & 0xfb);
		b[n++] = (uint8_t)(0xf0 | below(8));
	} else {
		if (below(3))
			b[n++] = (uint8_t)(0x40 | below(16));
		if (below(3) == 0)
			b[n++] = 0x0f;
	}
	while (n < 15)
		b[n++] = (uint8_t)rnd();
	return n;
}

static bool wanted(const ZydisDecodedInstruction *z, const ZydisDecodedOperand *op)
{
	switch (z->meta.category) {
	case ZYDIS_CATEGORY_BINARY: case ZYDIS_CATEGORY_BITBYTE: case ZYDIS_CATEGORY_BMI1: case ZYDIS_CATEGORY_BMI2:
	case ZYDIS_CATEGORY_CMOV: case ZYDIS_CATEGORY_CONVERT: case ZYDIS_CATEGORY_LOGICAL: case ZYDIS_CATEGORY_LZCNT:
	case ZYDIS_CATEGORY_PUSH: case ZYDIS_CATEGORY_POP: case ZYDIS_CATEGORY_ROTATE: case ZYDIS_CATEGORY_SEMAPHORE:
	case ZYDIS_CATEGORY_SETCC: case ZYDIS_CATEGORY_SHIFT: case ZYDIS_CATEGORY_STRINGOP: case ZYDIS_CATEGORY_ADOX_ADCX:
	case ZYDIS_CATEGORY_DATAXFER: case ZYDIS_CATEGORY_MISC: case ZYDIS_CATEGORY_SSE: case ZYDIS_CATEGORY_AVX:
	case ZYDIS_CATEGORY_AVX2: case ZYDIS_CATEGORY_BROADCAST: case ZYDIS_CATEGORY_LOGICAL_FP: case ZYDIS_CATEGORY_VFMA:
	case ZYDIS_CATEGORY_X87_ALU: case ZYDIS_CATEGORY_FCMOV: case ZYDIS_CATEGORY_MMX:
	case ZYDIS_CATEGORY_AVX512: case ZYDIS_CATEGORY_AVX512_BITALG: case ZYDIS_CATEGORY_AVX512_VBMI: case ZYDIS_CATEGORY_BLEND:
	case ZYDIS_CATEGORY_COMPRESS: case ZYDIS_CATEGORY_EXPAND: case ZYDIS_CATEGORY_CONFLICT: case ZYDIS_CATEGORY_GATHER:
	case ZYDIS_CATEGORY_SCATTER: case ZYDIS_CATEGORY_GFNI: case ZYDIS_CATEGORY_IFMA: case ZYDIS_CATEGORY_KMASK: case ZYDIS_CATEGORY_STTNI:
	case ZYDIS_CATEGORY_VAES: case ZYDIS_CATEGORY_VBMI2: case ZYDIS_CATEGORY_VPCLMULQDQ: case ZYDIS_CATEGORY_AVX2GATHER:
	case ZYDIS_CATEGORY_DECIMAL: case ZYDIS_CATEGORY_AES: case ZYDIS_CATEGORY_SHA: case ZYDIS_CATEGORY_PCLMULQDQ: case ZYDIS_CATEGORY_FLAGOP:
		break;
	default:
		return false;
	}
	for (unsigned n = 0; n < z->operand_count; n++)
		if ((op[n].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(op[n].reg.value) == ZYDIS_REGCLASS_SEGMENT) ||
		    /* page tables lie there */
		    (op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && z->address_width == 16 && (op[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)))
			return false;
	switch (z->mnemonic) {
	case ZYDIS_MNEMONIC_FNSTENV: case ZYDIS_MNEMONIC_FNSAVE:        /* store pointers, which translated code does not keep */
		return false;
	case ZYDIS_MNEMONIC_POPF: case ZYDIS_MNEMONIC_POPFQ: case ZYDIS_MNEMONIC_PUSHF: case ZYDIS_MNEMONIC_PUSHFQ:
	case ZYDIS_MNEMONIC_ENTER: case ZYDIS_MNEMONIC_CPUID: case ZYDIS_MNEMONIC_RDPID: case ZYDIS_MNEMONIC_STD:
	case ZYDIS_MNEMONIC_MONITORX: case ZYDIS_MNEMONIC_MWAITX: case ZYDIS_MNEMONIC_CLZERO: case ZYDIS_MNEMONIC_CLI:
	case ZYDIS_MNEMONIC_STI: case ZYDIS_MNEMONIC_RDRAND: case ZYDIS_MNEMONIC_RDSEED:
	case ZYDIS_MNEMONIC_LEAVE:
		return z->mnemonic == ZYDIS_MNEMONIC_LEAVE && below(4) == 0;
	default:
		return !(z->attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPNE | ZYDIS_ATTRIB_HAS_REPE)) || below(8) == 0;
	}
}

static uint16_t flag_bits(uint32_t f) { return f & 0x8d5; }

/* One random instruction into the code; `bad` are the flags undefined at this point. */
static bool put_random(struct code *c, bool vec, uint16_t *bad)
{
	ZydisDecodedInstruction z;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	uint8_t b[15];

	/* Most bytes behind such a prefix are no instruction. */
	for (unsigned tries = evex && below(3) ? 64 : 1;;) {
		tries > 1 ? random_evex(b) : random_bytes(b, vec);
		if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(&dec, b, 15, &z, op)) && wanted(&z, op))
			break;
		if (!--tries)
			return false;
	}
	if (z.cpu_flags) {
		uint16_t def = flag_bits(z.cpu_flags->modified | z.cpu_flags->set_0 | z.cpu_flags->set_1);

		if (flag_bits(z.cpu_flags->tested) & *bad)
			return false;
		if (z.meta.category == ZYDIS_CATEGORY_SHIFT || z.meta.category == ZYDIS_CATEGORY_ROTATE)
			def = 0;        /* a count of zero leaves them */
		*bad = (uint16_t)((*bad & ~def) | flag_bits(z.cpu_flags->undefined));
	}
	/* Displacements stay near most of the time. */
	if (z.raw.disp.size == 32) {
		int32_t d = (int32_t)below(512) - 256;

		memcpy(b + z.raw.disp.offset, &d, 4);
	}
	c->at[c->count++] = c->n;
	memcpy(c->b + c->n, b, z.length);
	c->n += z.length;
	return true;
}

/* Runs of pushes or pops, which are translated together. */
static void put_stack(struct code *c)
{
	bool pop = below(2);

	for (unsigned n = 2 + below(5); n && c->count < BODY * 2 - 1; n--) {
		uint8_t b[2] = { 0x41, (uint8_t)((pop ? 0x58 : 0x50) | below(8)) };
		bool rex = !narrow && below(2);

		if (!rex && (b[1] & 7) == 4)
			continue;
		c->at[c->count++] = c->n;
		put(c, b + !rex, 1 + rex);
	}
}

/* Instructions that use one base, which share a check. Flags that matter later are defined by all of these. */
static void put_row(struct code *c)
{
	static const uint8_t ops[] = { 0x01, 0x03, 0x89, 0x8b, 0x39, 0x3b, 0x31, 0x29, 0x88, 0x8a, 0x8b, 0x89, 0x8d, 0x11 };
	unsigned base = below(8), high = below(2);

	if (base == 4)
		base = 6;
	for (unsigned n = 2 + below(6); n && c->count < BODY * 2 - 1; n--) {
		uint8_t b[4] = { (uint8_t)(0x40 | below(2) << 3 | below(2) << 2 | high), ops[below(sizeof ops)],
				 (uint8_t)(0x40 | below(8) << 3 | base), (uint8_t)(below(80) - 20) };

		c->at[c->count++] = c->n;
		put(c, b + narrow, 4 - narrow);
	}
}

/* op reg, [base (+ index << scale) + disp8], into `b`. Base 4 is rsp; index 4: none. */
static unsigned access_bytes(uint8_t *b, unsigned op, unsigned base, unsigned index, unsigned scale)
{
	bool sib = base == 4 || index != 4;
	unsigned n = 0;

	if (!narrow)
		b[n++] = (uint8_t)(0x40 | below(2) << 3);
	b[n++] = (uint8_t)op;
	b[n++] = (uint8_t)(0x40 | below(8) << 3 | (sib ? 4 : base));
	if (sib)
		b[n++] = (uint8_t)(scale << 6 | index << 3 | base);
	b[n++] = (uint8_t)(below(120) - 40);
	return n;
}

/*
 * Work with an object or a frame: accesses by one base, others between them, jumps over some, and additions to base and index, so that
 * one check is for several (jit/gen_hold.c). Flags that matter later are defined by all of these, or not touched.
 */
static void put_object(struct code *c)
{
	static const uint8_t ops[] = { 0x01, 0x03, 0x89, 0x8b, 0x39, 0x3b, 0x31, 0x8b, 0x89, 0x88, 0x8a, 0x29 };
	unsigned base = below(4) ? "\0\1\2\3\5\6\7"[below(7)] : 4, index = below(3) ? 4 : "\0\1\2\3\5\6\7"[below(7)], scale = below(4), n;
	uint8_t b[8], value[5] = { (uint8_t)(0xb8 | index), (uint8_t)below(64) };

	if (index == base)
		index = 4;
	c->at[c->count++] = c->n;
	put(c, value, index == 4 ? 0 : sizeof value);
	if (base != 4 && below(3) == 0) {       /* mov base, in the page that may be read-only */
		put(c, (uint8_t[]){ (uint8_t)(0xb8 | base) }, 1);
		put32(c, DATA + 3 * 8192 + 64 + below(4096 - 256));
	}
	for (unsigned k = 3 + below(8); k && c->count < BODY * 2 - 1; k--) {
		c->at[c->count++] = c->n;
		switch (below(8)) {
		case 0:         /* by another base */
			n = access_bytes(b, ops[below(sizeof ops)], "\0\1\2\3\5\6\7"[below(7)], 4, 0);
			break;
		case 1:         /* add or sub, of the natural width */
			memcpy(b, (uint8_t[]){ 0x48, 0x83, (uint8_t)((below(2) ? 0xc0 : 0xe8) | (below(3) || index == 4 ? base : index)), (uint8_t)(below(48) - 24) }, 4);
			n = 4u - narrow;
			memmove(b, b + narrow, n);
			break;
		case 2:         /* pushed or popped: the frame's base moves */
			n = below(2) ? 1 : 3;
			memcpy(b, (uint8_t[]){ 0xff, (uint8_t)(0x70 | "\0\1\2\3\5\6\7"[below(7)]), (uint8_t)below(64) }, 3);
			if (n == 1)
				b[0] = "\x50\x53\x58\x5a"[below(4)];
			break;
		default:
			n = access_bytes(b, ops[below(sizeof ops)], base, index, scale);
		}
		if (below(4) == 0)
			put(c, (uint8_t[]){ (uint8_t)(0x70 | below(16)), (uint8_t)n }, 2);
		put(c, b, n);
	}
}

/* What patching is for: arithmetic, tests and moves with an immediate, on registers and memory. But for moves, they define all flags. */
static void put_immediate(struct code *c)
{
	static const struct { uint8_t op, imm, kinds; } forms[] = { { 0x80, 1, 8 }, { 0x81, 4, 8 }, { 0x83, 1, 8 }, { 0xc6, 1, 1 }, { 0xc7, 4, 1 },
								    { 0xf6, 1, 1 }, { 0xf7, 4, 1 } };
	unsigned f = below(ARRAY_SIZE(forms)), rm = "\0\1\2\3\5\6\7"[below(7)];
	bool mem = below(2);
	uint8_t b[4] = { (uint8_t)(0x40 | below(2) << 3 | below(2)), forms[f].op, (uint8_t)((mem ? 0x40 : 0xc0) | below(forms[f].kinds) << 3 | rm),
			 (uint8_t)below(128) };
	uint32_t v = (uint32_t)rnd();

	c->at[c->count++] = c->n;
	put(c, b + narrow, 3u + mem - narrow);
	put(c, &v, forms[f].imm);
}

/* A repeated string instruction whose run is often in one page on each side: mov edi ; mov esi, or lea rsi near rdi ; mov rcx ; rep. */
static void put_string(struct code *c)
{
	uint32_t to = DATA + 8192 * below(4) + below(4096), from = DATA + 8192 * below(4) + below(4096);
	uint64_t count = below(8) ? below(below(2) ? 9 : 260) : below(4) ? 500 + below(4000) : (1ull << (29 + below(4))) + below(9);
	uint8_t rex = (uint8_t)(0x48 & (unsigned)-below(2)), lea[4] = { 0x48, 0x8d, 0x77, (uint8_t)(below(96) - 48) };

	c->at[c->count++] = c->n;
	put(c, "\xbf", 1);
	put(c, &to, 4);
	if (below(2)) {
		put(c, "\xbe", 1);
		put(c, &from, 4);
	} else {
		put(c, lea + narrow, 4 - narrow);
	}
	put(c, "\x88\x07\x8a\x06", 4);        /* mov [rdi], al ; mov al, [rsi]: the TLB has both pages */
	put(c, &"\x48\xb9"[narrow], 2u - narrow);
	put(c, &count, narrow ? 4 : 8);
	c->at[c->count++] = c->n;
	if (below(8) == 0)
		put(c, &"\x67\x64\x2e"[below(3)], 1);
	if (below(4) == 0)
		put(c, "\x66", 1);
	put(c, &"\xf3\xf3\xf3\xf2"[below(4)], 1);
	if (rex && !narrow)
		put(c, &rex, 1);
	put(c, &"\xa4\xa5\xaa\xab\xa6\xa7\xae\xaf"[below(8)], 1);
}

/* String instructions for one element, upwards as a rule, most often in a loop of LOOP: mov edi ; mov esi ; mov ecx ; std ; op ; loop ; cld. */
static void put_single(struct code *c)
{
	uint32_t v[3] = { DATA + 8192 * below(4) + 512 + below(4096), DATA + 8192 * below(4) + 512 + below(4096), 1 + below(20) };
	bool down = below(8) == 0, w = !narrow && below(4) == 0;
	unsigned from;

	c->at[c->count++] = c->n;
	for (unsigned k = 0; k < 3; k++) {
		put(c, &"\xbf\xbe\xb9"[k], 1);
		put(c, &v[k], 4);
	}
	put(c, "\xfd", down);
	from = c->n;
	if (below(8) == 0)
		put(c, &"\x64\x2e\x67"[below(3)], 1);
	if (below(4) == 0)
		put(c, "\x66", 1);
	put(c, "\x48", w);
	put(c, &"\xa4\xa5\xa6\xa7\xaa\xab\xac\xad\xae\xaf"[below(10)], 1);
	if (below(4)) {
		uint8_t loop[2] = { (uint8_t)(0xe0 | (below(8) ? 2 : below(4))), (uint8_t)(from - (c->n + 2)) };

		put(c, loop, 2);
	}
	put(c, "\xfc", down);
}

/* What else has a way of its own: mov ebx ; xlat. mov ebx ; cmpxchg8b [ebx]. A word of MMX and its end. */
static void put_rare(struct code *c)
{
	uint32_t at = DATA + 8192 * below(4) + below(4096 + 8);

	c->at[c->count++] = c->n;
	put(c, "\xbb", 1);
	put(c, &at, 4);
	switch (below(3)) {
	case 0:
		put(c, "\xd7", 1);
		break;
	case 1:
		put(c, "\xf0", below(2));
		put(c, "\x0f\xc7\x0b", 3);
		break;
	default:
		put(c, "\x0f\x6f\x13\x0f\xfc\xd2\x0f\x7e\xd1\x0f\x77", 11);      /* movq mm2, [ebx] ; paddb ; movd ecx, mm2 ; emms */
	}
}

/* xor edx, edx ; div or idiv by memory or, if it is of a byte, by AH. Flags are undefined then. */
static void put_div(struct code *c, uint16_t *bad)
{
	uint8_t w = below(2) ? 0x48 : 0x40, b[5] = { 0x66, w, (uint8_t)(0xf6 | (below(4) > 0)), (uint8_t)(0x70 | below(2) << 3 | below(4)), (uint8_t)below(256) };
	unsigned first = below(4) == 0 ? 0 : 1;

	c->at[c->count++] = c->n;
	put(c, "\x31\xd2", 2);
	if (b[2] == 0xf6 && below(2)) {
		put(c, (uint8_t[]){ 0xf6, (uint8_t)(0xf0 | below(2) << 3 | below(8)) }, 2);
	} else {
		put(c, b, 1 - first);
		put(c, b + 1 + narrow, 4 - narrow);
	}
	*bad = 0x8d5;
}

/*
 * A call of a few bytes, directly or not, and the return; `at` is the code's offset in its page. Flags stay. What is
 * called has no jump, and no instruction that jumps may lead to.
 */
static void put_call(struct code *c, unsigned at)
{
	unsigned kind = below(4), reg = "\0\1\2\3\6\7"[below(6)], from, more = below(3) ? 0 : 8;
	uint8_t mov[] = { (uint8_t)(0xb8 | reg), 0, 0, 0, 0 }, reach[] = { 0xff, (uint8_t)((kind == 1 ? 0xd0 : 0xe0) | reg) };
	uint32_t to;

	c->at[c->count++] = from = c->n;
	switch (kind) {
	case 0:                 /* call +2 */
		put(c, "\xe8\x02\0\0", 5);
		break;
	case 3:                 /* push ; ret */
		to = H_CODE + at + from + 8;
		put(c, "\x68", 1);
		put(c, &to, 4);
		put(c, "\xc3\xeb\x06\x8d\x40\x01\x8d\x49\x01", 9);    /* over ; lea eax, [eax + 1] ; lea ecx, [ecx + 1] */
		return;
	default:                /* mov reg, imm ; call or jmp reg */
		to = H_CODE + at + from + 9;
		memcpy(mov + 1, &to, 4);
		put(c, mov, 5);
		put(c, reach, 2);
	}
	/* Over ; lea edx, [edx + 3] ; mov reg, data: stores by way of it shall not reach the code ; ret */
	to = DATA + 8192 + below(4096);
	memcpy(mov + 1, &to, 4);
	put(c, kind == 2 ? "\xeb\x08" : more ? "\xeb\x0b" : "\xeb\x09", 2);
	put(c, "\x8d\x52\x03", 3);
	put(c, mov, 5);
	put(c, more ? "\xc2\x08" : "\xc3", kind == 2 ? 0 : more ? 3 : 1);
}

/* A forward conditional jump, LOOP and JRCXZ among them, over the next instruction or two; where it leads is known later. */
static void put_jcc(struct code *c)
{
	uint8_t b[2] = { (uint8_t)(below(6) ? 0x70 | below(16) : 0xe0 | below(4)), 0 };

	c->jump_at[c->jumps++] = c->n;
	put(c, b, 2);
}

/* Every round says where it was: push rax ; lea rax, [rip] ; add [0x500020], rax ; pop rax. */
static void put_place(struct code *c)
{
	put(c, "\x50\x48\x8d\x05\0\0\0\0\x48\x01\x04\x25\x20\0\x50\0\x58", 17);
}

/* Begin again at another address: [0x500008] times, to and fro between two of them, without a TLB flush. */
static void put_move(struct code *c)
{
	static const uint8_t count[] = { 0x83, 0x04, 0x25, 8, 0, 0x50, 0, 0xff, 0x78, 0 };   /* add dword [0x500008], -1 ; js over all this */
	static const uint8_t again[] = { 0xc7, 0x04, 0x25, 0, 0, 0x50, 0, 3, 0, 0, 0 };         /* mov dword [0x500000], 3 */
	static const uint8_t other[] = { 0x81, 0x34, 0x25, 0x14, 0, 0x50, 0 };                  /* xor dword [0x500014], upper half of harness_alias() */
	static const uint8_t shift[] = { 0x81, 0x34, 0x25, 0x10, 0, 0x50, 0 };                  /* xor dword [0x500010], lower half */
	static const uint8_t jump[] = { 0xff, 0x24, 0x25, 0x10, 0, 0x50, 0 };                   /* jmp [0x500010] */
	uint64_t bits = harness_alias(1 + below(3));
	unsigned from;

	put(c, count, sizeof count);
	from = c->n;
	put(c, again, sizeof again);
	put(c, other, sizeof other);
	put(c, (uint8_t *)&bits + 4, 4);
	put(c, shift, sizeof shift);
	put(c, &bits, 4);
	if (below(2))
		put(c, jump, sizeof jump);
	else
		put(c, "\xff\x14\x25\x10\0\x50", 7);        /* the same as a call */
	c->b[from - 1] = (uint8_t)(c->n - from);
}

/* loop: body ; dec dword [DATA_COUNT] via absolute address ; jnz loop ; hlt. Flags at the end are known ones. */
void make(struct code *c, bool vec, unsigned at)
{
	uint16_t bad = 0;
	unsigned n = 1 + below(BODY), tries = 0, body;

	memset(c, 0, sizeof *c);
	body = c->n;
	if (moved)
		put_place(c);
	while (c->count < n && tries++ < 2000) {
		if (c->jumps < 3 && below(6) == 0 && !bad)
			put_jcc(c);
		if (below(12) == 0)
			put_stack(c);
		if (!bad && below(6) == 0)
			put_row(c);
		if (!bad && below(6) == 0 && c->count < BODY * 2 - 2)
			put_object(c);
		if (below(24) == 0 && c->count < BODY * 2 - 2)
			put_string(c);
		if (!bad && below(24) == 0 && c->count < BODY * 2 - 2)
			put_single(c);
		if (!bad && below(24) == 0 && c->count < BODY * 2 - 2)
			put_rare(c);
		if (patched && !bad && below(2) && c->count < BODY * 2 - 1)
			put_immediate(c);
		if (below(16) == 0)
			put_div(c, &bad);
		if (below(12) == 0 && c->count < BODY * 2 - 1)
			put_call(c, at);
		put_random(c, vec, &bad);
	}
	c->at[c->count] = c->n;
	for (unsigned j = 0; j < c->jumps; j++) {
		unsigned to = c->n;

		for (unsigned k = c->count + 1; k--;)
			if (c->at[k] > c->jump_at[j] + 2 && below(2))
				to = c->at[k];
		c->b[c->jump_at[j] + 1] = (uint8_t)MIN(to - c->jump_at[j] - 2, 127u);
	}
	/* The counter lies where random operands hardly reach; it defines all flags but CF: add, not dec. */
	static const uint8_t count[] = { 0x83, 0x04, 0x25, 0, 0, 0x50, 0, 0xff };       /* add dword [0x500000], -1 */
	if (narrow)
		put(c, &"\x26\x2e\x36\x3e\x64\x65"[count_seg], 1);
	put(c, count, sizeof count);
	int32_t rel = (int32_t)body - (int32_t)(c->n + 6);
	put(c, "\x0f\x85", 2);
	put(c, &rel, 4);
	if (moved)
		put_move(c);
	put(c, "\xf4", 1);
}
