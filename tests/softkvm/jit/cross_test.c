/*
 * Two pages of translated code. An instruction that crosses a page end, in a loop: its second page is written by the guest, by the client, and
 * replaced by another, and the loop must notice each time. And loops in two pages that lead to each other, while one is written; and runs of bytes over a
 * page's end.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <string.h>

#include "harness.h"
#include "softkvm/jit/internal.h"

#define FIRST 0x400000u         /* mapped 1:1 by 4 KiB pages, every second one missing (harness.c) */
#define OTHER 0x600000u
#define AT (FIRST + 4094)       /* mov eax, imm32: two bytes here, three there */

static void put(uint32_t gpa, const void *p, unsigned n)
{
	memcpy(h.ram + gpa, p, n);
	phys_code_written(&h.vm, gpa, n);
}

static void map(uint32_t lin, uint32_t gpa)
{
	st_le64(h.ram + 0x4000 + 8 * (lin >> 12 & 511), gpa | PTE_P | PTE_W);
	mmu_flush_all(&h.cpu);
}

/* What is behind the first two bytes: the rest of the immediate, then the end of the loop. `store`: mov [AT + 3], cl first. */
static void second_page(uint32_t gpa, uint8_t mid, bool store)
{
	static const uint8_t st[] = { 0x88, 0x0c, 0x25, 0x01, 0x10, 0x40, 0x00 };
	uint8_t b[32] = { 0x00, mid, 0x00 };
	unsigned n = 3;

	if (store) {
		memcpy(b + n, st, sizeof st);
		n += sizeof st;
	}
	memcpy(b + n, "\x01\xc2\xff\xc9\x0f\x85", 6);      /* add edx, eax ; dec ecx ; jnz AT - 2 */
	n += 10;
	st_le32(b + n - 4, AT - 2 - (FIRST + 4096 + n));
	b[n++] = 0xf4;
	put(gpa, b, n);
}

static void first_page(void)
{
	put(H_CODE, "\x68\xfc\x0f\x40\x00\xc3", 6);      /* push AT - 2 ; ret */
	put(AT - 2, "\x90\x90\xb8\x05", 4);    /* a block of its page, which leads to the other by a link that looks at nothing */
}

/* The first page is not touched, so that links from it stay. */
static uint32_t run(unsigned loops)
{
	h.cpu.gpr[R_RCX] = loops;
	h.cpu.gpr[R_RDX] = 0;
	h.cpu.gpr[R_RSP] = H_STACK;
	assert_int_equal(harness_run(), RUN_HALTED);
	return (uint32_t)h.cpu.gpr[R_RDX];
}

/* So often that it was translated and linked: hardly any block comes by way of the loop. */
static void expect(unsigned value)
{
	uint64_t blocks = h.cpu.stats.blocks_run;

	assert_int_equal(run(1000), 1000 * value);
	assert_in_range(h.cpu.stats.blocks_run - blocks, 1, 200);
}

static void test_client_writes(void **s)
{
	second_page(FIRST + 4096, 1, false);
	expect(0x10005);
	second_page(FIRST + 4096, 2, false);
	expect(0x20005);
	put(AT + 1, "\x07", 1);
	expect(0x20007);
}

static void test_page_replaced(void **s)
{
	second_page(FIRST + 4096, 3, false);
	second_page(OTHER, 4, false);
	expect(0x30005);
	map(FIRST + 4096, OTHER);
	expect(0x40005);
	map(FIRST + 4096, FIRST + 4096);
	expect(0x30005);
}

static void test_guest_writes(void **s)
{
	uint32_t want = 0;

	second_page(FIRST + 4096, 0, true);
	for (unsigned n = 0; n < 100; n++)      /* each iteration adds what the one before stored */
		want += (n ? 100 - (n - 1) : 0) << 16 | 5;
	assert_int_equal(run(100), want);
}

/* r13-r15 in loops, so that regions have them in registers of the host; then `tail`. Returns where code goes on. */
static uint32_t busy_loop(uint32_t at, uint8_t step, const char *tail, unsigned n)
{
	uint8_t b[] = { 0x41, 0xbf, 4, 0, 0, 0,         /* mov r15d, 4 */
			0x4d, 0x01, 0xf5,               /* add r13, r14 */
			0x49, 0x83, 0xc6, step,         /* add r14, step */
			0x49, 0xff, 0xcf, 0x75, 0xf4 }; /* dec r15 ; jnz to the first add */

	put(at, b, sizeof b);
	put(at + sizeof b, tail, n);
	return at + (uint32_t)sizeof b + n;
}

static void put32(uint32_t gpa, uint32_t v) { put(gpa, &v, 4); }

/* Two pages whose loops have the same registers changed lead to each other; the second is stale when the first comes to it. */
static void test_mapped_and_stale(void **s)
{
	uint32_t first = FIRST + 0x100, second = FIRST + 4096 + 0x100, end;

	put(H_CODE, "\x68\x00\x01\x40\x00\xc3", 6);      /* push first ; ret */
	end = busy_loop(first, 3, "\xe9\0\0\0", 5);        /* jmp second */
	put32(end - 4, second - end);
	for (unsigned n = 0; n < 8; n++) {
		uint8_t step = (uint8_t)(n / 2);        /* in every other round the same bytes are written */
		uint64_t sum = 0, add = 0;

		end = busy_loop(second, step, "\xff\xc9\x0f\x85\0\0\0\0\xf4", 9) - 1;  /* dec ecx ; jnz first ; hlt */
		put32(end - 4, first - end);
		h.cpu.gpr[13] = h.cpu.gpr[14] = 0;
		run(n < 4 ? 300 : 3000);
		for (unsigned k = 0; k < (n < 4 ? 300u : 3000u) * 8; k++) {
			sum += add;
			add += k / 4 % 2 ? step : 3;
		}
		assert_int_equal(h.cpu.gpr[13], sum);
		assert_int_equal(h.cpu.gpr[14], add);
	}
}

/* REP MOVSB and STOSB over the end of a page. `next`: the second page lies behind the first one in memory as well. */
#define END (FIRST + 4096)
static void run_of_bytes(bool moves, uint32_t from, uint32_t to, unsigned n, bool next)
{
	uint8_t b[] = { 0xbe, 0, 0, 0, 0, 0xbf, 0, 0, 0, 0,     /* mov esi, from ; mov edi, to */
			0xb9, 0, 0, 0, 0, 0xf3, moves ? 0xa4 : 0xaa,    /* mov ecx, n ; rep movsb or stosb */
			0x41, 0xff, 0xc8, 0x75, 0xea, 0xf4 };   /* dec r8d ; jnz ; hlt */
	static uint8_t model[8192];
	uint64_t calls;

	st_le32(b + 1, from);
	st_le32(b + 6, to);
	st_le32(b + 11, n);
	put(H_CODE, b, sizeof b);
	map(END, next ? END : OTHER);
	for (unsigned k = 0; k < sizeof model; k++)
		h.ram[(k < 4096 ? FIRST : next ? FIRST : OTHER - 4096) + k] = model[k] = (uint8_t)(k * 7 + k / 256);
	calls = h.cpu.stats.handler_calls;
	h.cpu.gpr[R_RAX] = 0x5a;
	h.cpu.gpr[8] = 300;
	assert_int_equal(harness_run(), RUN_HALTED);
	for (unsigned k = 0; k < 300 * n; k++)
		model[to - FIRST + k % n] = moves ? model[from - FIRST + k % n] : 0x5a;
	assert_memory_equal(h.ram + FIRST, model, 4096);
	assert_memory_equal(h.ram + (next ? END : OTHER), model + 4096, 4096);
	/* By the handler or not: as it should be, once the code has run for a while. What overlaps from behind is the handler's. */
	calls = h.cpu.stats.handler_calls - calls;
	if (!next)
		assert_true(calls > 200);
	else if (!moves || from < to || from >= to + n)
		assert_true(calls < 100);
}

static void test_runs_of_bytes(void **s)
{
	for (unsigned next = 0; next < 2; next++) {
		run_of_bytes(false, END, END - 1000, 3000, next);
		run_of_bytes(false, END, END - 5, 12, next);
		run_of_bytes(true, FIRST, END - 100, 1000, next);
		run_of_bytes(true, END - 40, FIRST + 64, 64, next);
		run_of_bytes(true, END - 40, END - 39, 60, next);       /* the byte that it begins with, again and again */
		run_of_bytes(true, END - 40, END - 24, 60, next);
		run_of_bytes(true, END - 24, END - 40, 60, next);
	}
}

static int setup(void **s)
{
	harness_start();
	map(FIRST + 4096, FIRST + 4096);
	first_page();
	return jit_cpu_init(&h.cpu, &(struct jit_config){ .bytes = 4 << 20, .perf_fd = -1 });
}

static int teardown(void **s)
{
	jit_cpu_free(&h.cpu);
	harness_stop();
	return 0;
}

static void narrow(void **s)
{
	harness_compat();
	test_client_writes(s);
	first_page();
	test_page_replaced(s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_client_writes, setup, teardown),
		cmocka_unit_test_setup_teardown(test_page_replaced, setup, teardown),
		cmocka_unit_test_setup_teardown(test_guest_writes, setup, teardown),
		cmocka_unit_test_setup_teardown(test_mapped_and_stale, setup, teardown),
		cmocka_unit_test_setup_teardown(test_runs_of_bytes, setup, teardown),
		cmocka_unit_test_setup_teardown(narrow, setup, teardown),
	};

	if (!__builtin_cpu_supports("bmi2"))
		return 77;      /* no translator here */
	return cmocka_run_group_tests(tests, NULL, NULL);
}
