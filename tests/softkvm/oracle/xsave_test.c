/* XSAVE family: round trips through every format, what faults, and that the host restores our standard image to the same state. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <string.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

static uint64_t rng = 88172645463325252ULL;

uint64_t rnd(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	return rng ^= rng << 17;
}

static struct test_case tc;

static void decode(const char *bytes, unsigned len)
{
	ZydisDecoder d;

	memset(&tc, 0, sizeof tc);
	memcpy(tc.bytes, bytes, len);
	ZydisDecoderInit(&d, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	assert_true(ZYAN_SUCCESS(ZydisDecoderDecodeFull(&d, tc.bytes, len, &tc.z, tc.op)));
	tc.len = (uint8_t)len;
	assert_true(engine_prepare(&tc));
}

/* Execute with rdi at the sandbox's start, edx:eax all ones; the resulting trap. */
static int run(const char *bytes, unsigned len, struct state *s)
{
	static struct state out;

	decode(bytes, len);
	s->gpr[R_RDI] = (uintptr_t)sandbox;
	s->gpr[R_RAX] = s->gpr[R_RDX] = 0xffffffff;
	engine_test_run(&tc, s, &out);
	*s = out;
	return out.trap;
}

static void fill(struct state *s)
{
	memset(s, 0, sizeof *s);
	for (unsigned r = 0; r < 16; r++)
		for (unsigned n = 0; n < (host_avx() ? 32 : 16); n++)
			s->zmm[r][n] = (uint8_t)rnd();
	s->fx[0] = 0x7f;
	s->fx[1] = 3;
	s->fx[4] = 0x0f;
	for (unsigned r = 0; r < 8; r++)
		for (unsigned n = 0; n < 10; n++)
			s->fx[32 + 16 * r + n] = (uint8_t)rnd();
	s->mxcsr = 0x1fa5;
}

static void same_state(const struct state *a, const struct state *b)
{
	assert_memory_equal(a->zmm, b->zmm, sizeof a->zmm);
	assert_memory_equal(a->fx, b->fx, 160 - 128);
	assert_memory_equal(a->fx + 32, b->fx + 32, 128);
	assert_int_equal(a->mxcsr, b->mxcsr);
}

#define XRSTOR64 "\x48\x0f\xae\x2f"
static void round_trip(const char *save, unsigned len)
{
	static struct state a, b;

	fill(&a);
	assert_int_equal(run(save, len, &a), -1);
	memset(&b, 0, sizeof b);
	memcpy(b.mem, a.mem, sizeof b.mem);
	assert_int_equal(run(XRSTOR64, 4, &b), -1);
	same_state(&a, &b);
}

static void test_round_trips(void **st)
{
	if (!host_avx())
		skip();
	round_trip("\x48\x0f\xae\x27", 4);      /* xsave64 */
	round_trip("\x48\x0f\xae\x37", 4);      /* xsaveopt64 */
	round_trip("\x48\x0f\xc7\x27", 4);      /* xsavec64 */
}

static void test_init_components(void **st)
{
	static struct state a;

	if (!host_avx())
		skip();
	memset(&a, 0, sizeof a);
	a.fx[0] = 0x7f;
	a.fx[1] = 3;
	a.mxcsr = 0x1f80;
	memset(a.mem, 0xee, sizeof a.mem);
	assert_int_equal(run("\x48\x0f\xc7\x27", 4, &a), -1);
	assert_int_equal(ld_le64(a.mem + 512), 0);      /* XSTATE_BV: nothing in use */
	assert_int_equal(a.mem[576], 0xee);             /* and nothing written */
	memset(a.mem + 512, 0, 64);
	fill(&a);
	assert_int_equal(run(XRSTOR64, 4, &a), -1);     /* fill() cleared memory: all components to their initial state */
	assert_int_equal(a.zmm[3][20], 0);
	assert_int_equal(ld_le16(a.fx), 0x37f);
}

static void test_faults(void **st)
{
	static struct state a;

	if (!host_avx())
		skip();
	memset(&a, 0, sizeof a);
	a.mem[512 + 7] = 0x80;                          /* XSTATE_BV has a bit not in XCR0 */
	assert_int_equal(run(XRSTOR64, 4, &a), EXC_GP);
	memset(&a, 0, sizeof a);
	a.mem[520] = 1;                                 /* XCOMP_BV without bit 63 */
	assert_int_equal(run(XRSTOR64, 4, &a), EXC_GP);
	memset(&a, 0, sizeof a);
	a.mem[528] = 1;                                 /* reserved header byte */
	assert_int_equal(run(XRSTOR64, 4, &a), EXC_GP);
	memset(&a, 0, sizeof a);
	a.mem[26] = 0xff;                               /* MXCSR */
	assert_int_equal(run(XRSTOR64, 4, &a), EXC_GP);
	memset(&a, 0, sizeof a);
	assert_int_equal(run("\x48\x0f\xae\x67\x08", 5, &a), EXC_GP);    /* xsave64 [rdi+8]: alignment */
	assert_int_equal(run("\x48\x0f\xc7\x2f", 4, &a), EXC_GP);        /* xsaves64 at CPL 3 */
}

/* The host itself restores what we saved: compare through the native side, which executes xrstor. */
static void test_host_restores(void **st)
{
	static struct state a, h;

	if (!host_avx())
		skip();
	fill(&a);
	assert_int_equal(run("\x48\x0f\xae\x27", 4, &a), -1);
	memset(&h, 0, sizeof h);
	memcpy(h.mem, a.mem, sizeof h.mem);
	h.fx[0] = 0x7f;
	h.fx[1] = 3;
	h.mxcsr = 0x1f80;
	h.flags = 0x202;
	h.gpr[R_RDI] = (uintptr_t)sandbox;
	h.gpr[R_RAX] = 7;
	memcpy(tc.bytes, XRSTOR64, 4);
	tc.len = 4;
	tc.bits = 64;
	h.rip = arena() + A_CODE;
	h.cs = SEL_CS64;
	h.ss = h.seg[0] = h.seg[1] = SEL_DATA;
	st_le64(h.mem + 512, ld_le64(h.mem + 512) & 7);
	native_run(&tc, &h, &h);
	assert_int_equal(h.trap, EXC_BP);
	for (unsigned r = 0; r < 16; r++)
		assert_memory_equal(h.zmm[r], a.zmm[r], 32);
	assert_memory_equal(h.fx + 32, a.fx + 32, 128);
	assert_int_equal(h.mxcsr, a.mxcsr);
}

static void test_kvm_images(void **st)
{
	static struct cpu c, d;
	static uint8_t area[4096];

	fpu_reset(&c.fpu);
	fpu_reset(&d.fpu);
	c.xcr0 = d.xcr0 = xsave_supported();
	for (unsigned r = 0; r < 16; r++)
		for (unsigned n = 0; n < (host_avx() ? 32 : 16); n++)
			c.fpu.zmm[r][n] = (uint8_t)rnd();
	c.pkru = 0x55555554;
	fpu_to_xsave(&c, area, sizeof area);
	assert_int_equal(fpu_from_xsave(&d, area, sizeof area), 0);
	assert_memory_equal(c.fpu.zmm, d.fpu.zmm, sizeof c.fpu.zmm);
	assert_int_equal(d.pkru, c.pkru);
	area[520] = 1;
	assert_true(fpu_from_xsave(&d, area, sizeof area) < 0);
	assert_true(xsave_size(xsave_supported()) <= 4096);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_round_trips), cmocka_unit_test(test_init_components), cmocka_unit_test(test_faults),
		cmocka_unit_test(test_host_restores), cmocka_unit_test(test_kvm_images),
	};

	if (native_init())
		return 77;
	if (engine_init())
		return 1;
	return cmocka_run_group_tests(tests, NULL, NULL);
}
