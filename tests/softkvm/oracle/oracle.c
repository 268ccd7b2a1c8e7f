/* Command line, comparison and report of the differential test. */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

static uint64_t rng;
static unsigned long only;       /* --try: this one alone */

uint64_t rnd(void)
{
	rng ^= rng >> 12;
	rng ^= rng << 25;
	rng ^= rng >> 27;
	return rng * 0x2545f4914f6cdd1dULL;
}

static const char *const names[G_COUNT] = { "integer", "control", "x87", "sse", "avx", "avx512", "state" };

static void disasm(const struct test_case *t, const struct state *in)
{
	ZydisDecodedInstruction z;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	ZydisDecoder d;
	ZydisFormatter f;
	char s[128] = "?";

	ZydisDecoderInit(&d, t->bits == 64 ? ZYDIS_MACHINE_MODE_LONG_64 : t->bits == 32 ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32 :
			 ZYDIS_MACHINE_MODE_LONG_COMPAT_16, t->bits == 64 ? ZYDIS_STACK_WIDTH_64 : t->bits == 32 ? ZYDIS_STACK_WIDTH_32 :
			 ZYDIS_STACK_WIDTH_16);
	ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
	if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(&d, t->bytes, t->len, &z, op)))
		ZydisFormatterFormatInstruction(&f, &z, op, z.operand_count_visible, s, sizeof s, in->rip, NULL);
	printf("%s   [", s);
	for (unsigned n = 0; n < t->len; n++)
		printf("%s%02x", n ? " " : "", t->bytes[n]);
	printf("] at %#" PRIx64 "%s, sandbox %p\n", in->rip, t->flush ? ", TLB empty" : "", (void *)sandbox);
}

static void hex(const char *name, unsigned r, const void *in, const void *a, const void *b, size_t len)
{
	const uint8_t *p[3] = { in, a, b };
	static const char *const who[3] = { "before", "host", "engine" };

	for (unsigned w = 0; w < 3; w++) {
		printf("  %s%-3u %-7s", name, r, who[w]);
		for (size_t n = len; n--;)
			printf("%02x%s", p[w][n], n && n % 8 == 0 ? "_" : "");
		printf("\n");
	}
}

/* --try: all that went in, and the memory at each operand. */
static void print_inputs(const struct test_case *t, const struct state *in)
{
	disasm(t, in);
	for (unsigned r = 0; r < 16; r++)
		printf("  r%-2u %016" PRIx64 "%s", r, in->gpr[r], r % 4 == 3 ? "\n" : "");
	printf("  flags %" PRIx64 "\n", in->flags);
	for (unsigned n = 0; n < t->z.operand_count; n++) {
		uint64_t lin, at;

		if (t->op[n].type != ZYDIS_OPERAND_TYPE_MEMORY || t->op[n].mem.type != ZYDIS_MEMOP_TYPE_MEM)
			continue;
		lin = operand_address(t, in, &t->op[n]);
		at = lin - (uintptr_t)sandbox;
		printf("  operand %u, %u bits, at %" PRIx64 ":", n, t->op[n].size, lin);
		for (unsigned k = 0; k < 64 && at + k < SANDBOX; k++)
			printf("%s%02x", k % 8 ? "" : " ", in->mem[at + k]);
		printf("\n");
	}
}

struct diff { const struct state *in, *a, *b; unsigned n; };

static void cmp(struct diff *d, const char *name, unsigned r, size_t off, size_t len)
{
	const uint8_t *i = (const uint8_t *)d->in + off, *a = (const uint8_t *)d->a + off, *b = (const uint8_t *)d->b + off;

	if (!memcmp(a, b, len))
		return;
	d->n++;
	hex(name, r, i, a, b, len);
}

/* Bytes of memory that need not be equal: pointers of the last x87 instruction. */
static void blank(struct state *s, uint64_t lin, unsigned from, unsigned n)
{
	int64_t at = (int64_t)(lin + from - (uintptr_t)sandbox), first = MAX(at, 0), end = MIN(at + n, SANDBOX);

	if (first < end)
		memset(s->mem + first, 0, (size_t)(end - first));
}

static void blank_pointers(const struct test_case *t, const struct state *in, struct state *s)
{
	bool o16 = t->z.operand_width == 16;
	uint64_t at = 0;

	memset(s->fx + 6, 0, 18);
	for (unsigned n = 0; n < t->z.operand_count; n++)
		if (t->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && t->op[n].mem.type == ZYDIS_MEMOP_TYPE_MEM)
			at = operand_address(t, in, &t->op[n]);
	switch (t->z.mnemonic) {
	case ZYDIS_MNEMONIC_FNSTENV: case ZYDIS_MNEMONIC_FNSAVE:
		blank(s, at, o16 ? 6 : 12, o16 ? 8 : 16);
		break;
	case ZYDIS_MNEMONIC_FXSAVE: case ZYDIS_MNEMONIC_FXSAVE64: case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64: case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64:
		blank(s, at, 6, 18);
		break;
	default:
		break;
	}
}

/* An instruction that faults may have done the stores before: images, the frame of a far call. */
static void blank_partial(const struct test_case *t, const struct state *in, struct state *s)
{
	bool call = t->z.mnemonic == ZYDIS_MNEMONIC_CALL && t->z.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR;

	for (unsigned n = 0; n < t->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &t->op[n];

		if (o->type != ZYDIS_OPERAND_TYPE_MEMORY || !(o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
			continue;
		if (o->size > 512)
			blank(s, operand_address(t, in, o), 0, 4096);
		if (call)
			blank(s, operand_address(t, in, o) - 16, 0, 16);
	}
}

/* What need not be equal, made so. */
static void settle(const struct test_case *t, const struct state *in, struct state *s)
{
	uint64_t undef = t->z.cpu_flags && s->rip != in->rip ? t->z.cpu_flags->undefined : 0;

	blank_pointers(t, in, s);
	if (s->rip == in->rip)
		blank_partial(t, in, s);
	s->flags &= ~undef;
	/* Linux says so of the kernel's half, to tell nothing of it; and elsewhere the host may have memory, that of ASan for one. */
	if (s->cr2 - arena() >= ARENA)
		s->error &= ~(uint32_t)PF_P;
	/* Which of two operands it was that faulted first, too. */
	if (is_string(t))
		s->cr2 = 0;
	s->cr2 &= ~4095ull;             /* which byte of an operand of several was touched first is the processor's choice */
	for (unsigned n = 0; n < 4; n++)
		if (s->seg[n] < 4)      /* null selectors lose their RPL on the way to the handler (SDM vol. 2, IRET) */
			s->seg[n] = 0;
	for (unsigned r = 0; r < 16 && (t->bits != 64 || s->cs != SEL_CS64); r++)
		s->gpr[r] = r < 8 ? (uint32_t)s->gpr[r] : 0;
}

static void cmp_num(struct diff *d, const char *name, uint64_t in, uint64_t a, uint64_t b)
{
	if (a == b)
		return;
	d->n++;
	printf("  %-6s before %" PRIx64 " host %" PRIx64 " engine %" PRIx64 "\n", name, in, a, b);
}

static bool same(const struct test_case *t, const struct state *in, const struct state *a, const struct state *b)
{
	static const char *const seg[4] = { "ds", "es", "fs", "gs" };
	struct diff d = { in, a, b, 0 };

	cmp_num(&d, "trap", 0, (unsigned)a->trap, (unsigned)b->trap);
	cmp_num(&d, "error", 0, a->error, b->error);
	cmp_num(&d, "cr2", 0, a->cr2, b->cr2);
	cmp_num(&d, "rip", in->rip, a->rip, b->rip);
	cmp_num(&d, "flags", in->flags, a->flags, b->flags);
	cmp_num(&d, "mxcsr", in->mxcsr, a->mxcsr, b->mxcsr);
	cmp_num(&d, "cs", in->cs, a->cs, b->cs);
	cmp_num(&d, "ss", in->ss, a->ss, b->ss);
	for (unsigned n = 0; n < 4; n++)
		cmp_num(&d, seg[n], in->seg[n], a->seg[n], b->seg[n]);
	for (unsigned r = 0; r < 16; r++)
		cmp(&d, "gpr", r, offsetof(struct state, gpr) + 8 * r, 8);
	for (unsigned r = 0; r < 32; r++)
		cmp(&d, "zmm", r, offsetof(struct state, zmm) + 64 * r, 64);
	for (unsigned r = 0; r < 8; r++)
		cmp(&d, "k", r, offsetof(struct state, k) + 8 * r, 8);
	for (unsigned r = 0; r < 8; r++)
		cmp(&d, "st", r, offsetof(struct state, fx) + 32 + 16 * r, 10);
	cmp(&d, "fcw/fsw/ftw", 0, offsetof(struct state, fx), 5);
	for (unsigned n = 0; n < SANDBOX; n += 16)
		cmp(&d, "mem", n, offsetof(struct state, mem) + n, 16);
	return d.n == 0;
}

static uint64_t seed;
static unsigned max_diffs = 20;

/* The host is asked again: a virtual one was seen to leave RF out of a fault's flags once in a million. */
static bool host_differs(const struct test_case *t, const struct state *in, struct state *a)
{
	static struct state again;

	native_run(t, in, &again);
	settle(t, in, &again);
	if (!memcmp(a, &again, sizeof again))
		return false;
	*a = again;
	return true;
}

/* On the host, then in the guest twice: the second time behind a NOP, as another block, with what the first left in TLB and stubs. */
static bool run_case(const struct test_case *t, const struct state *in)
{
	static struct state a, b;

	native_run(t, in, &a);
	settle(t, in, &a);
	for (unsigned start = 0; start < (t->at ? 2u : 1u); start++) {
		vm_run(t, in, &b, start);
		settle(t, in, &b);
		if (!same(t, in, &a, &b) && !(host_differs(t, in, &a) && same(t, in, &a, &b))) {
			printf("%s time, trap %d: ", start ? "second" : "first", a.trap);
			return false;
		}
	}
	return true;
}

static unsigned run_group(enum group g, unsigned bits, unsigned long cases)
{
	static struct state in;
	unsigned long done = 0, tries = 0;
	unsigned diffs = 0;
	struct test_case t;

	while (done < cases && diffs < max_diffs && tries < (only ? only : cases * 2000)) {
		/* Every case can be had again by its own seed. */
		rng = seed * 0x9e3779b97f4a7c15ULL + ++tries * 0xd1342543de82ef95ULL;
		rng = rng ? rng : 1;
		rnd(), rnd();
		if ((only && tries != only) || !gen_instruction(&t, g, bits) || !gen_state(&t, &in))
			continue;
		done++;
		if (only)
			print_inputs(&t, &in);
		if (run_case(&t, &in))
			continue;
		diffs++;
		printf("%s, %u bits: seed %" PRIu64 " try %lu: ", names[g], bits, seed, tries);
		disasm(&t, &in);
	}
	printf("%s, %u bits: %lu cases, %u differences\n", names[g], bits, done, diffs);
	return diffs;
}

static bool chosen(const char *want, const char *name) { return !strcmp(want, "all") || !strcmp(want, name); }

/* Half of the cases is 64-bit code, 3/8 32-bit code. */
static unsigned run_all(const char *group, const char *bits, unsigned long cases, bool *any)
{
	static const struct { unsigned bits; const char *name; unsigned eighths; } modes[] = { { 64, "64", 4 }, { 32, "32", 3 }, { 16, "16", 1 } };
	unsigned diffs = 0, groups = 0, eighths = 0;

	for (unsigned g = 0; g < G_COUNT; g++)
		groups += chosen(group, names[g]);
	for (unsigned m = 0; m < 3; m++)
		eighths += chosen(bits, modes[m].name) ? modes[m].eighths : 0;
	for (unsigned m = 0; m < 3; m++) {
		for (unsigned g = 0; g < G_COUNT; g++) {
			if (!chosen(group, names[g]) || !chosen(bits, modes[m].name))
				continue;
			if (!native_has(modes[m].bits) || (g == G_AVX512 && !native_avx512()) || (g == G_AVX && !host_avx())) {
				printf("%s, %u bits: SKIPPED, the host has none\n", names[g], modes[m].bits);
				continue;
			}
			*any = true;
			diffs += run_group(g, modes[m].bits, cases * modes[m].eighths / eighths / groups);
		}
	}
	return diffs;
}

int main(int argc, char **argv)
{
	static const struct option opts[] = { { "cases", 1, 0, 'c' }, { "seed", 1, 0, 's' }, { "group", 1, 0, 'g' }, { "bits", 1, 0, 'b' },
					      { "diffs", 1, 0, 'd' }, { "try", 1, 0, 't' }, { 0 } };
	const char *group = "all", *bits = "all", *mode = getenv("LODGE_SOFT_MODE");
	unsigned long cases = 100000;
	bool any = false;
	unsigned diffs;
	int o;

	seed = (uint64_t)time(NULL);
	setlinebuf(stdout);
	while ((o = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (o) {
		case 'c': cases = strtoul(optarg, NULL, 0); break;
		case 's': seed = strtoull(optarg, NULL, 0); break;
		case 'g': group = optarg; break;
		case 'b': bits = optarg; break;
		case 'd': max_diffs = (unsigned)strtoul(optarg, NULL, 0); break;
		case 't': only = strtoul(optarg, NULL, 0); break;
		default: return 2;
		}
	}
	printf("seed %" PRIu64 ", engine %s\n", seed, mode ? mode : "as it is by default");
	if (native_init()) {
		printf("SKIPPED: the native side cannot be set up on this host\n");
		return 77;
	}
	if (vm_init()) {
		printf("cannot set up the VM\n");
		return 1;
	}
	diffs = run_all(group, bits, cases, &any);
	vm_end();
	return any ? diffs != 0 : 77;
}
