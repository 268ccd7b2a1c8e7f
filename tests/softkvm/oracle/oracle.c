/* Command line, comparison and report of the differential test. */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "oracle.h"

static uint64_t rng;

uint64_t rnd(void)
{
	rng ^= rng >> 12;
	rng ^= rng << 25;
	rng ^= rng >> 27;
	return rng * 0x2545f4914f6cdd1dULL;
}

static const char *const names[G_COUNT] = { "x87", "sse", "avx", "avx512", "integer" };

static void disasm(const struct test_case *t)
{
	ZydisFormatter f;
	char s[128];

	ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
	ZydisFormatterFormatInstruction(&f, &t->z, t->op, t->z.operand_count_visible, s, sizeof s, ZYDIS_RUNTIME_ADDRESS_NONE, NULL);
	printf("%s   [", s);
	for (unsigned n = 0; n < t->len; n++)
		printf("%s%02x", n ? " " : "", t->bytes[n]);
	printf("] tlb %d%d%d\n", t->tlb[0], t->tlb[1], t->tlb[2]);
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

struct diff { const struct state *in, *a, *b; unsigned n; };

static void cmp(struct diff *d, const char *name, unsigned r, size_t off, size_t len)
{
	const uint8_t *i = (const uint8_t *)d->in + off, *a = (const uint8_t *)d->a + off, *b = (const uint8_t *)d->b + off;

	if (!memcmp(a, b, len))
		return;
	d->n++;
	hex(name, r, i, a, b, len);
}

/* Where x87 environments hold pointers of the last instruction, which differ by nature. */
static void blank_pointers(const struct test_case *t, struct state *s)
{
	const ZydisDecodedOperandMem *m = &t->op[0].mem;
	bool o16 = t->z.attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE;
	uint64_t at;

	memset(s->fx + 6, 0, 18);
	if (t->z.mnemonic != ZYDIS_MNEMONIC_FNSTENV && t->z.mnemonic != ZYDIS_MNEMONIC_FNSAVE)
		return;
	at = s->gpr[ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, m->base)) & 15];
	if (m->index != ZYDIS_REGISTER_NONE)
		at += m->scale * s->gpr[ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, m->index)) & 15];
	at += (m->disp.has_displacement ? (uint64_t)m->disp.value : 0) - (uintptr_t)sandbox;
	if (t->z.address_width == 32)
		at = (uint32_t)at;
	if (at <= SANDBOX - (o16 ? 14 : 28))
		memset(s->mem + at + (o16 ? 6 : 12), 0, o16 ? 8 : 16);
}

static bool same(const struct test_case *t, const struct state *in, struct state *a, struct state *b)
{
	struct diff d = { in, a, b, 0 };
	uint64_t undef = t->z.cpu_flags ? t->z.cpu_flags->undefined : 0;

	blank_pointers(t, a);
	blank_pointers(t, b);
	a->flags &= OSZAPC & ~undef;
	b->flags &= OSZAPC & ~undef;
	if (a->trap != b->trap) {
		printf("  trap: host %d engine %d\n", a->trap, b->trap);
		d.n++;
	}
	for (unsigned r = 0; r < 16; r++)
		cmp(&d, "gpr", r, offsetof(struct state, gpr) + 8 * r, 8);
	for (unsigned r = 0; r < 32; r++)
		cmp(&d, "zmm", r, offsetof(struct state, zmm) + 64 * r, 64);
	for (unsigned r = 0; r < 8; r++)
		cmp(&d, "k", r, offsetof(struct state, k) + 8 * r, 8);
	for (unsigned r = 0; r < 8; r++)
		cmp(&d, "st", r, offsetof(struct state, fx) + 32 + 16 * r, 10);
	cmp(&d, "fcw/fsw/ftw", 0, offsetof(struct state, fx), 5);
	cmp(&d, "flags", 0, offsetof(struct state, flags), 8);
	cmp(&d, "mxcsr", 0, offsetof(struct state, mxcsr), 4);
	for (unsigned n = 0; n < SANDBOX; n += 16)
		cmp(&d, "mem", n, offsetof(struct state, mem) + n, 16);
	return d.n == 0;
}

static unsigned run_group(enum group g, unsigned long cases, uint64_t seed, unsigned max_diffs)
{
	static struct state in, a, b;
	unsigned long done = 0, tries = 0;
	unsigned diffs = 0;
	struct test_case t;

	memset(&t, 0, sizeof t);
	while (done < cases && diffs < max_diffs && tries < cases * 2000) {
		/* Every case can be had again by its own seed. */
		rng = seed * 0x9e3779b97f4a7c15ULL + ++tries * 0xd1342543de82ef95ULL;
		rng = rng ? rng : 1;
		rnd(), rnd();
		if (!gen_instruction(&t, g) || !gen_state(&t, &in))
			continue;
		done++;
		native_run(&t, &in, &a);
		engine_test_run(&t, &in, &b);
		if (same(&t, &in, &a, &b))
			continue;
		diffs++;
		printf("%s: seed %" PRIu64 " try %lu: mxcsr %x fcw %02x%02x fsw %02x%02x trap %d: ", names[g], seed, tries, in.mxcsr,
		       in.fx[1], in.fx[0], in.fx[3], in.fx[2], a.trap);
		disasm(&t);
	}
	printf("%s: %lu cases, %u differences\n", names[g], done, diffs);
	return diffs;
}

int main(int argc, char **argv)
{
	static const struct option opts[] = { { "cases", 1, 0, 'c' }, { "seed", 1, 0, 's' }, { "group", 1, 0, 'g' }, { "diffs", 1, 0, 'd' }, { 0 } };
	unsigned long cases = 100000;
	uint64_t seed = (uint64_t)time(NULL);
	const char *group = "all";
	unsigned diffs = 0, max_diffs = 20, groups = 0;
	int o;

	while ((o = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (o) {
		case 'c': cases = strtoul(optarg, NULL, 0); break;
		case 's': seed = strtoull(optarg, NULL, 0); break;
		case 'g': group = optarg; break;
		case 'd': max_diffs = (unsigned)strtoul(optarg, NULL, 0); break;
		default: return 2;
		}
	}
	printf("seed %" PRIu64 "\n", seed);
	if (native_init() || engine_init()) {
		printf("cannot set up\n");
		return 1;
	}
	for (unsigned g = 0; g < G_COUNT; g++)
		groups += !strcmp(group, "all") || !strcmp(group, names[g]);
	for (unsigned g = 0; g < G_COUNT; g++) {
		if (strcmp(group, "all") && strcmp(group, names[g]))
			continue;
		if (g == G_AVX512 && !native_avx512()) {
			printf("avx512: SKIPPED, the host has none\n");
			if (groups == 1)
				return 77;
			continue;
		}
		diffs += run_group(g, cases / groups, seed, max_diffs);
	}
	return diffs != 0;
}
