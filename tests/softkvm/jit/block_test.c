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
 * With --evex it is AVX-512 instructions for the most part.
 *
 * With --missing the TLB fails any check (block_miss.c).
 *
 * With --calls it is functions that call each other (block_calls.c).
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

#include "block_miss.h"

struct result {
	uint64_t gpr[16], rip, rflags;
	uint32_t mxcsr;
	uint8_t zmm[32][64];
	uint64_t k[8];
	uint8_t fx[160];
	struct event ev;
	bool halted, endless;           /* endless: it overwrote itself or its counter */
	uint8_t mem[PAGES * 4096];
	uint64_t places;                /* put_place() */
};

static ZydisDecoder host_dec;
static bool calls;              /* programs of calls */

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
		calls ? harness_compat() : random_segments();
	start.rflags = rnd() & 0x8d5;
	start.mxcsr = below(8) ? 0x1f80 : 0x1fa0;
	for (unsigned n = 0; n < sizeof start.zmm / 8; n++)
		st_le64((uint8_t *)start.zmm + 8 * n, below(2) ? rnd() : 0x3ff0000000000000 + (rnd() & 0xfffff00000000));
	for (unsigned n = 0; n < 8 && evex; n++)
		start.k[n] = below(4) ? rnd() : below(3) ? below(16) : below(2) ? 0 : ~0ULL;
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

/* Page tables, but for the bits that the processor sets: what was walked before may be good or not. */
static bool tables_written(void)
{
	for (unsigned at = 0; at < sizeof low; at += 8)
		if ((ld_le64(h.ram + at) ^ ld_le64(low + at)) & ~(uint64_t)(PTE_A | PTE_D))
			return true;
	return false;
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
	memcpy(c->fpu.k, start.k, sizeof start.k);
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
	memcpy(out->k, c->fpu.k, sizeof out->k);
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
	for (unsigned r = 0; r < 8; r++)
		DIFF(a->k[r] != b->k[r], "  k%u: %" PRIx64 " %" PRIx64 "\n", r, a->k[r], b->k[r]);
	DIFF(memcmp(a->fx, b->fx, 5), "  fcw, fsw, ftw: %04x %04x %02x / %04x %04x %02x\n", ld_le16(a->fx), ld_le16(a->fx + 2), a->fx[4],
	     ld_le16(b->fx), ld_le16(b->fx + 2), b->fx[4]);
	for (unsigned r = 0; r < 8; r++)
		DIFF(memcmp(a->fx + 32 + 16 * r, b->fx + 32 + 16 * r, 10), "  st%u: %04x:%016" PRIx64 " %04x:%016" PRIx64 "\n", r,
		     ld_le16(a->fx + 40 + 16 * r), ld_le64(a->fx + 32 + 16 * r), ld_le16(b->fx + 40 + 16 * r), ld_le64(b->fx + 32 + 16 * r));
	for (unsigned k = 0; k < sizeof a->mem; k += 8)
		DIFF(memcmp(a->mem + k, b->mem + k, 8), "  mem %x: %" PRIx64 " %" PRIx64 "\n", BASE + k, ld_le64(a->mem + k),
		     ld_le64(b->mem + k));
	for (unsigned k = 0; k < sizeof nobodys; k += 8)
		DIFF(ld_le64(nobodys + k), "  a store went to nobody's memory\n");
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
	if (missing && tables_written()) {
		n->endless++;
		return true;
	}
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

/* Whether one of the operands' pages may be written, and what lies behind others: nothing, the page that is next in memory, or another one. */
static void map_some(void)
{
	low[0x4000 + 8 * ((DATA + 3 * 8192 - BASE) >> 12)] = PTE_P | (below(2) ? PTE_W : 0);
	for (unsigned page = 3; page <= 9; page += 2) {
		uint64_t to = BASE + 4096 * (below(2) ? page : 13);

		st_le64(low + 0x4000 + 8 * page, below(2) ? 0 : to | PTE_P | (below(4) ? PTE_W : 0));
	}
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
	calls ? make_calls(&code, at) : make(&code, vec, at);
	map_some();
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
	if (ok && !patched && below(calls ? 40 : 2) == 0) {
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
		{ "patched", 0, 0, 'p' }, { "calls", 0, 0, 'l' }, { "evex", 0, 0, 'e' }, { "missing", 0, 0, 'i' }, { 0 } };
	struct counts count = { 0 };
	unsigned cases = 10000, seed = 1, bad = 0;
	bool vec = false;
	int o;

	while ((o = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (o) {
		case 'c': cases = (unsigned)strtoul(optarg, NULL, 0); break;
		case 's': seed = (unsigned)strtoul(optarg, NULL, 0); break;
		case 'v': vec = true; break;
		case 'e': vec = evex = true; break;
		case 'n': narrow = true; break;
		case 'm': moved = true; break;
		case 'p': patched = true; break;
		case 'l': calls = true; break;
		case 'i': missing = true; break;
		default: return 2;
		}
	}
	if (evex && !__builtin_cpu_supports("avx512f")) {
		printf("no AVX-512 here\n");
		return 77;
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
	if (missing && refused < cases) {
		printf("no more than %" PRIu64 " accesses were left to handlers\n", refused);
		bad++;
	}
	jit_cpu_free(&h.cpu);
	harness_stop();
	return bad != 0;
}
