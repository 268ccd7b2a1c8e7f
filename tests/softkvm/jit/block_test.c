/*
 * Random blocks of 64-bit code (--32: of 32-bit code, with segments that are flat, based, limited or useless), run by the interpreter and by the translator from the same state: registers,
 * flags, vector registers, memory and the event that ended the run must agree. The code is a handful of random
 * instructions with jumps among them, memory operands around a few data pages (one missing, one read-only) and
 * now and then far off (non-canonical, wrapping), inside a loop that runs often enough to be translated.
 *
 * In half of the cases the host's instructions that touch guest memory or need an extension are then replaced by undefined
 * ones: the state at every such trap must be understood, and the result be the same (jit/resume.c).
 *
 * With --moved the code is mapped at four addresses and runs at one after the other: its translations go along (jit/page.c).
 *
 * With --patched immediates and displacements change between runs (interp/patch.c, jit/gen_patch.c); what that gives is compared with the
 * same bytes decoded anew.
 *
 * Flags that an instruction leaves undefined are compared only behind one that defines them.
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "softkvm/jit/internal.h"

#define PAGES 16                /* restored before every run; operands lie in the middle */
#define BASE 0x400000u          /* 4 KiB pages, every second one missing (harness.c) */
#define DATA (BASE + 4096 * 4)
#define CODE_MAX 2048
#define BODY 12

static uint64_t rng;

static uint64_t rnd(void)
{
	rng ^= rng >> 12;
	rng ^= rng << 25;
	rng ^= rng >> 27;
	return rng * 0x2545f4914f6cdd1dULL;
}
static unsigned below(unsigned n) { return (unsigned)(rnd() % n); }

struct code { uint8_t b[CODE_MAX]; unsigned n, at[BODY * 2 + 4], count; unsigned jumps, jump_at[BODY]; };

struct result {
	uint64_t gpr[16], rip, rflags;
	uint32_t mxcsr;
	uint8_t zmm[32][64];
	uint8_t fx[160];
	struct event ev;
	bool halted, endless;           /* endless: it overwrote itself or its counter */
	uint8_t mem[PAGES * 4096];
	uint64_t places;                /* put_place() */
};

static ZydisDecoder dec, host_dec;
static bool narrow;             /* 32-bit code */
static bool moved;              /* at another address now and then */
static bool patched;            /* other values now and then */
static unsigned count_seg;      /* where its counter is: flat */

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

	random_bytes(b, vec);
	if (ZYAN_FAILED(ZydisDecoderDecodeFull(&dec, b, 15, &z, op)) || !wanted(&z, op))
		return false;
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

static void put(struct code *c, const void *p, unsigned n)
{
	memcpy(c->b + c->n, p, n);
	c->n += n;
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
	put(c, &"\xa4\xa5\xaa\xab"[below(4)], 1);
}

/* xor edx, edx ; div by memory. Flags are undefined then. */
static void put_div(struct code *c, uint16_t *bad)
{
	uint8_t w = below(2) ? 0x48 : 0x40, b[4] = { w, 0xf7, (uint8_t)(0x70 | below(4)), (uint8_t)below(256) };

	c->at[c->count++] = c->n;
	put(c, "\x31\xd2", 2);
	put(c, b + narrow, 4 - narrow);
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

/* A forward conditional jump over the next instruction or two; where it leads is known later. */
static void put_jcc(struct code *c)
{
	uint8_t b[2] = { (uint8_t)(0x70 | below(16)), 0 };

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
static void make(struct code *c, bool vec, unsigned at)
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
		if (below(24) == 0 && c->count < BODY * 2 - 2)
			put_string(c);
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

/* -- states ---------------------------------------------------------------------------------------- */
static uint64_t value(void)
{
	switch (below(8)) {
	case 0: return rnd();
	case 1: return below(300);
	case 2: return DATA + 4096 * below(8) + 4080 + below(32);
	case 3: return below(8) ? DATA + 8192 : (below(2) ? 0x7ffffffffff8ull : 0xfffffffffffffff0ull) + below(16);
	default: return DATA + 8192 * below(4) + below(4096);
	}
}

static struct result start;

/* Of 32-bit code: mostly all flat but FS and GS; else with bases and limits near what operands reach, or of another type. */
static void random_segments(void)
{
	static const uint32_t limits[] = { UINT32_MAX, DATA + 16383, 0x1fff, 0x17, DATA + 8192 + 2047, 0xfffffffe };
	bool flat = below(4);

	harness_compat();
	for (unsigned n = SEG_ES; n <= SEG_GS; n++) {
		struct seg *s = &h.cpu.seg[n];

		if (n == SEG_CS || n == count_seg || (n <= SEG_DS && (flat || below(2))))
			continue;
		s->base = below(2) ? 0 : below(2) ? DATA + below(8192) : (uint32_t)-(int32_t)below(65536);
		s->limit = below(2) ? UINT32_MAX : limits[below(ARRAY_SIZE(limits))];
		if (below(8) == 0)
			s->type = n == SEG_SS ? 7 : "\1\5\7\x9\xb"[below(5)];
		s->unusable = n != SEG_SS && below(8) == 0;
	}
}

static void random_state(void)
{
	for (unsigned r = 0; r < 16; r++)
		start.gpr[r] = value() | (narrow && below(4) == 0 ? rnd() << 32 : 0);
	/* The page below is missing: runs of pushes and pops may end in the middle. */
	start.gpr[R_RSP] = DATA + 8192 + (below(4) ? 2048 : below(2) ? 0 : 4096 - 64) + 8 * below(16);
	if (narrow)
		random_segments();
	start.rflags = rnd() & 0x8d5;
	start.mxcsr = below(8) ? 0x1f80 : 0x1fa0;
	for (unsigned n = 0; n < sizeof start.zmm / 8; n++)
		st_le64((uint8_t *)start.zmm + 8 * n, below(2) ? rnd() : 0x3ff0000000000000 + (rnd() & 0xfffff00000000));
	memset(start.fx, 0, sizeof start.fx);
	st_le16(start.fx, (uint16_t)(0x40 | (below(8) ? 0x3f : below(64)) | below(16) << 8));
	st_le16(start.fx + 2, (uint16_t)(below(8) << 11 | (below(4) ? 0 : below(16) << 8)));
	start.fx[4] = (uint8_t)rnd();
	for (unsigned r = 0; r < 8; r++) {
		st_le64(start.fx + 32 + 16 * r, rnd() | 1ull << 63);
		st_le16(start.fx + 40 + 16 * r, (uint16_t)(below(4) ? 0x3ff0 + below(32) : rnd()));
	}
	for (unsigned n = 0; n < 32 && !__builtin_cpu_supports("avx512f"); n++)
		memset(start.zmm[n] + 32, 0, 32);
	for (unsigned n = 0; n < sizeof start.mem / 8; n++)
		st_le64(start.mem + 8 * n, below(4) ? value() : rnd());
}

static struct code code;
static uint8_t low[0x20000];    /* as the harness made it: page tables */
static unsigned code_at, rounds;
static bool all_clear;

/* Everything that operands reach, but for page tables: a stray store would be seen by the next run. */
static void lay_out(void)
{
	if (all_clear) {
		memset(h.ram, 0, H_RAM);
		phys_code_written(&h.vm, 0, H_RAM);
	}
	memcpy(h.ram, low, sizeof low);
	memset(h.ram + 0x180000, 0, 0x180000);
	memset(h.ram + BASE + PAGES * 4096, 0, 0xf0000);        /* bit strings reach far */
	memset(h.ram + 0x800000, 0, 0x20000);  /* sums of two and three bases */
	memset(h.ram + 0xc00000, 0, 0x40000);
	memset(h.ram + H_CODE - 4096, 0x90, 3 * 4096);
	memcpy(h.ram + H_CODE + code_at, code.b, code.n);
	phys_code_written(&h.vm, H_CODE - 4096, 3 * 4096);
	for (unsigned p = 0; p < PAGES; p++)
		memcpy(h.ram + BASE + p * 4096, start.mem + p * 4096, 4096);
	phys_code_written(&h.vm, BASE, sizeof start.mem);
}

static void run(struct result *out, unsigned loops)
{
	struct cpu *c = &h.cpu;
	uint32_t n = loops;

	if (below(12) == 0)
		block_collect(c, 1 << 30);      /* blocks move; what is translated goes on */
	lay_out();
	memcpy(h.ram + 0x500000, &n, 4);
	st_le32(h.ram + 0x500008, rounds);
	st_le64(h.ram + 0x500020, 0);
	st_le64(h.ram + 0x500010, H_CODE + code_at + harness_alias(1));
	memcpy(c->gpr, start.gpr, sizeof start.gpr);
	c->aflags = aflags_from(start.rflags);
	c->eflags = 0;
	c->fpu.mxcsr = start.mxcsr;
	memcpy(c->fpu.zmm, start.zmm, sizeof start.zmm);
	memcpy(c->fpu.fx, start.fx, sizeof start.fx);
	mmu_flush_all(c);
	mmio_reset(c);
	c->mmio.next_write = 0;
	c->trap_db = false;
	h.polls_left = 1000;
	out->endless = harness_run() == RUN_EINTR;
	out->halted = c->halted;
	memcpy(out->gpr, c->gpr, sizeof out->gpr);
	out->rip = h.got.valid ? h.got_rip : c->rip;
	out->rflags = cpu_get_rflags(c);
	out->mxcsr = c->fpu.mxcsr;
	memcpy(out->zmm, c->fpu.zmm, sizeof out->zmm);
	memcpy(out->fx, c->fpu.fx, sizeof out->fx);
	out->ev = h.got;
	memcpy(out->mem, h.ram + BASE, sizeof out->mem);
	out->places = ld_le64(h.ram + 0x500020);
}

/* -- comparison ------------------------------------------------------------------------------------- */
static unsigned differ(const struct result *a, const struct result *b, bool print)
{
	unsigned n = 0;
#define DIFF(cond, ...) do { if (cond) { n++; if (print) printf(__VA_ARGS__); } } while (0)

	for (unsigned r = 0; r < 16; r++)
		DIFF(a->gpr[r] != b->gpr[r], "  r%u: start %" PRIx64 " interp %" PRIx64 " translated %" PRIx64 "\n", r, start.gpr[r], a->gpr[r], b->gpr[r]);
	DIFF(a->rip != b->rip, "  rip: %" PRIx64 " %" PRIx64 "\n", a->rip, b->rip);
	DIFF(a->ev.valid != b->ev.valid || (a->ev.valid && (a->ev.vector != b->ev.vector || a->ev.error != b->ev.error ||
	     a->ev.payload != b->ev.payload)), "  event: %d %u %x %" PRIx64 " / %d %u %x %" PRIx64 "\n", a->ev.valid, a->ev.vector, a->ev.error,
	     a->ev.payload, b->ev.valid, b->ev.vector, b->ev.error, b->ev.payload);
	/* Elsewhere flags may be undefined, and those that nobody reads any more are not kept at a fault. */
	DIFF(a->halted != b->halted, "  halted: %d %d\n", a->halted, b->halted);
	DIFF(a->halted && a->rflags != b->rflags, "  rflags: %" PRIx64 " %" PRIx64 "\n", a->rflags, b->rflags);
	DIFF(a->mxcsr != b->mxcsr, "  mxcsr: %x %x\n", a->mxcsr, b->mxcsr);
	for (unsigned r = 0; r < 32; r++)
		for (unsigned k = 0; k < 8; k++)
			DIFF(memcmp(&a->zmm[r][8 * k], &b->zmm[r][8 * k], 8), "  zmm%u[%u]: %" PRIx64 " %" PRIx64 "\n", r, k,
			     ld_le64(a->zmm[r] + 8 * k), ld_le64(b->zmm[r] + 8 * k));
	DIFF(memcmp(a->fx, b->fx, 5), "  fcw, fsw, ftw: %04x %04x %02x / %04x %04x %02x\n", ld_le16(a->fx), ld_le16(a->fx + 2), a->fx[4],
	     ld_le16(b->fx), ld_le16(b->fx + 2), b->fx[4]);
	for (unsigned r = 0; r < 8; r++)
		DIFF(memcmp(a->fx + 32 + 16 * r, b->fx + 32 + 16 * r, 10), "  st%u: %04x:%016" PRIx64 " %04x:%016" PRIx64 "\n", r,
		     ld_le16(a->fx + 40 + 16 * r), ld_le64(a->fx + 32 + 16 * r), ld_le16(b->fx + 40 + 16 * r), ld_le64(b->fx + 32 + 16 * r));
	for (unsigned k = 0; k < sizeof a->mem; k += 8)
		DIFF(memcmp(a->mem + k, b->mem + k, 8), "  mem %x: %" PRIx64 " %" PRIx64 "\n", BASE + k, ld_le64(a->mem + k),
		     ld_le64(b->mem + k));
	DIFF(a->places != b->places, "  places: %" PRIx64 " %" PRIx64 "\n", a->places, b->places);
	return n;
}

static void disasm(const struct code *c, unsigned at)
{
	ZydisFormatter f;

	ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
	for (unsigned n = 0; n < c->n;) {
		ZydisDecodedInstruction z;
		ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
		char s[128];

		if (ZYAN_FAILED(ZydisDecoderDecodeFull(&dec, c->b + n, c->n - n, &z, op)))
			break;
		ZydisFormatterFormatInstruction(&f, &z, op, z.operand_count_visible, s, sizeof s, H_CODE + at + n, NULL);
		printf("  %x: %s   [", H_CODE + at + n, s);
		for (unsigned k = 0; k < z.length; k++)
			printf("%02x", c->b[n + k]);
		printf("]\n");
		n += z.length;
	}
}

/* -- traps ------------------------------------------------------------------------------------------ */
static bool point_at(const struct jit *j, uint32_t at)
{
	const struct jit_code *k = point_code(j, at);

	return k && point_find(j, k, at, false);
}

/* Host instructions since `from` that use the address of a checked operand, and of which a trap would not be understood. */
static unsigned no_point(const struct jit *j, size_t from)
{
	unsigned bad = 0;

	for (size_t at = from; at < j->hot;) {
		ZydisDecodedInstruction z;
		ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];

		if (j->rw[at] == 0xcc) {        /* between two translations */
			at++;
			continue;
		}
		if (ZYAN_FAILED(ZydisDecoderDecodeFull(&host_dec, j->rw + at, 15, &z, op))) {
			printf("code at %zx is not understood\n", at);
			return bad + 1;
		}
		for (unsigned n = 0; n < z.operand_count; n++)
			if (op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && op[n].mem.base == ZYDIS_REGISTER_R15 && z.mnemonic != ZYDIS_MNEMONIC_LEA &&
			    !point_at(j, (uint32_t)at)) {
				printf("%s at %zx: nobody knows the state there\n", ZydisMnemonicGetString(z.mnemonic), at);
				bad++;
			}
		at += z.length;
	}
	return bad;
}

/* Undefined instructions in place of some (or all) of the host's that may trap: as if it had none of them. */
static void break_code(struct jit *j)
{
	bool all = below(2);

	for (const struct jit_code *k = j->codes; k; k = k->next)
		for (uint32_t n = 0; n < k->npoints; n++) {
			const struct jit_point *p = &j->points[k->points + n];

			if ((p->flags & POINT_TRAP) && (all || below(3) == 0))
				memcpy(j->rw + k->hot + p->at, "\x0f\x0b", 2);
		}
}

/* -- main ------------------------------------------------------------------------------------------- */
struct counts { unsigned trapped, endless; };
static struct result interpreted, translated;

static bool agree(unsigned loops, struct counts *n)
{
	struct jit *jit = h.cpu.jit;

	run(&translated, loops);
	if (interpreted.endless || translated.endless) {
		n->endless++;
		return true;
	}
	if (!differ(&interpreted, &translated, false))
		return true;
	/* An operand may have reached memory that only this restores. */
	jit->off = true;
	all_clear = true;
	run(&interpreted, loops);
	jit->off = false;
	run(&translated, loops);
	all_clear = false;
	return !differ(&interpreted, &translated, false);
}

/* -- patches --------------------------------------------------------------------------------------- */
#define PATCHES 5

static struct { struct code code; struct result got; } runs[PATCHES];

/* New values for some instructions, but for branches and code addresses. */
static void patch(struct code *c)
{
	for (unsigned k = 0; k < c->count; k++) {
		uint8_t *b = c->b + c->at[k];
		ZydisDecodedInstruction z;
		ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];

		if (below(2) || ZYAN_FAILED(ZydisDecoderDecodeFull(&dec, b, 15, &z, op)) || z.raw.imm[0].is_relative ||
		    (z.raw.imm[0].value.u >= H_CODE - 4096 && z.raw.imm[0].value.u < H_CODE + 8192))
			continue;
		for (unsigned n = 0; n < 2; n++)
			for (unsigned i = 0; i < z.raw.imm[n].size / 8; i++)
				b[z.raw.imm[n].offset + i] = (uint8_t)rnd();
		if (z.raw.disp.size == 8 || z.raw.disp.size == 32)
			b[z.raw.disp.offset] ^= below(3) ? 0 : (uint8_t)below(64);
	}
}

static bool patched_agree(unsigned loops, struct counts *n)
{
	struct code first = code;
	bool ok = true;

	for (unsigned k = 0; k < PATCHES; k++) {
		patch(&code);
		runs[k].code = code;
		h.cpu.jit->off = below(4) == 0;
		run(&runs[k].got, loops);
	}
	h.cpu.jit->off = true;
	for (unsigned k = 0; ok && k < PATCHES; k++) {
		code = runs[k].code;
		block_flush(&h.cpu);
		run(&interpreted, loops);
		translated = runs[k].got;
		n->endless += interpreted.endless;
		ok = interpreted.endless || translated.endless || !differ(&interpreted, &translated, false);
	}
	h.cpu.jit->off = false;
	if (ok)
		code = first;
	return ok;
}

/* What operands may have reached that nothing restores: then once more, with all of it restored. */
static bool try_patched(unsigned loops, struct counts *n)
{
	uint64_t was = rng;
	struct code first = code;
	bool ok;

	if (patched_agree(loops, n))
		return true;
	rng = was;
	code = first;
	block_flush(&h.cpu);
	all_clear = true;
	for (unsigned k = 0; k < 20; k++)
		run(&translated, loops);
	ok = patched_agree(loops, n);
	all_clear = false;
	return ok;
}

static bool one(unsigned seed, bool vec, struct counts *n)
{
	struct jit *jit = h.cpu.jit;
	unsigned at = below(4) ? 0 : 4096 - 40 + below(40), loops;
	const char *what = "";
	size_t hot;
	uint32_t gen;
	bool ok;

	hot = jit->hot;
	gen = jit->gen;

	while (narrow && (count_seg = below(6)) == SEG_CS)
		;
	make(&code, vec, at);
	code_at = at;
	random_state();
	rounds = below(6);
	loops = below(2) ? 24 + below(40) : 1 + below(4);
	h.alias = 0;
	if (loops < 8)          /* few rounds on random data: translated before by being run often */
		for (unsigned k = 0; k < 20; k++) {
			h.alias = moved ? harness_alias(below(4)) : 0;
			run(&translated, 1);
		}
	h.alias = moved ? harness_alias(below(4)) : 0;
	jit->off = true;
	run(&interpreted, loops);
	jit->off = false;
	ok = agree(loops, n);
	if (ok && gen == jit->gen)
		ok = !no_point(jit, hot);
	for (unsigned k = 0; ok && moved && k < 3; k++) {
		h.alias = harness_alias(below(4));
		jit->off = true;
		run(&interpreted, loops);
		jit->off = false;
		ok = agree(loops, n);
	}
	if (ok && patched && !try_patched(loops, n)) {
		what = ", patched";
		ok = false;
	}
	if (ok && !patched && below(2)) {
		uint64_t before = h.cpu.stats.host_faults;

		break_code(jit);
		what = ", with traps";
		ok = agree(loops, n);
		n->trapped += h.cpu.stats.host_faults != before;
	}
	if (ok)
		return true;
	printf("seed %u: %u rounds, code at %x%s\n", seed, loops, H_CODE + at, what);
	disasm(&code, at);
	for (unsigned r = SEG_ES; narrow && r <= SEG_GS; r++)
		printf("  segment %u: base %" PRIx64 " limit %x type %x%s\n", r, h.cpu.seg[r].base, h.cpu.seg[r].limit, h.cpu.seg[r].type,
		       h.cpu.seg[r].unusable ? " unusable" : "");
	for (unsigned r = 0; r < 16; r++)
		printf("  r%-2u %16" PRIx64 "%s", r, start.gpr[r], r % 4 == 3 ? "\n" : "");
	differ(&interpreted, &translated, true);
	return false;
}

int main(int argc, char **argv)
{
	static const struct option opts[] = { { "cases", 1, 0, 'c' }, { "seed", 1, 0, 's' }, { "vec", 0, 0, 'v' }, { "32", 0, 0, 'n' }, { "moved", 0, 0, 'm' },
		{ "patched", 0, 0, 'p' }, { 0 } };
	struct counts count = { 0 };
	unsigned cases = 10000, seed = 1, bad = 0;
	bool vec = false;
	int o;

	while ((o = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (o) {
		case 'c': cases = (unsigned)strtoul(optarg, NULL, 0); break;
		case 's': seed = (unsigned)strtoul(optarg, NULL, 0); break;
		case 'v': vec = true; break;
		case 'n': narrow = true; break;
		case 'm': moved = true; break;
		case 'p': patched = true; break;
		default: return 2;
		}
	}
	ZydisDecoderInit(&host_dec, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	ZydisDecoderInit(&dec, narrow ? ZYDIS_MACHINE_MODE_LEGACY_32 : ZYDIS_MACHINE_MODE_LONG_64, narrow ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_64);
	harness_start();
	memcpy(low, h.ram, sizeof low);
	h.cpu.cr4 |= CR4_OSFXSR | CR4_OSXSAVE;
	h.cpu.xcr0 = 0xe7;
	if (jit_cpu_init(&h.cpu, &(struct jit_config){ .bytes = 4 << 20, .perf_fd = -1 })) {
		printf("no translator here\n");
		return 77;
	}
	h.cpu.jit->in_line = 1;
	for (unsigned n = 0; n < cases && bad < 5; n++) {
		rng = (seed + n) * 0x9e3779b97f4a7c15ULL | 1;
		rnd(), rnd();
		bad += !one(seed + n, vec, &count);
	}
	printf("%u cases from seed %u: %u differ, %u met traps, %u did not end; pages moved %" PRIu64 " times\n", cases, seed, bad,
	       count.trapped, count.endless, h.cpu.jit->moves);
	if (moved && h.cpu.jit->moves < cases) {
		printf("code hardly moved\n");
		bad++;
	}
	if (patched && h.cpu.stats.blocks_patched < cases) {
		printf("no more than %" PRIu64 " blocks were patched\n", h.cpu.stats.blocks_patched);
		bad++;
	}
	if (cases >= 1000 && ((!patched && count.trapped < cases / 20) || count.endless > cases / 100)) {
		printf("too few met traps or ended\n");
		bad++;
	}
	jit_cpu_free(&h.cpu);
	harness_stop();
	return bad != 0;
}
