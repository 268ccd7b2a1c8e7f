/* Blocks, faults, self-modifying code, strings, stack and locked operations of the interpreter. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "harness.h"
#include "softkvm/interp/block.h"

static int setup(void **s) { harness_start(); return 0; }
static int teardown(void **s) { harness_stop(); return 0; }
#define CODE(...) do { static const uint8_t b_[] = { __VA_ARGS__ }; harness_code(b_, sizeof b_); } while (0)
#define HLT 0xf4
#define G h.cpu.gpr

static void halts(void)
{
	assert_int_equal(harness_run(), RUN_HALTED);
}

static void faults(unsigned vector, uint64_t rip)
{
	assert_int_equal(harness_run(), RUN_EXIT);
	assert_int_equal(h.got.vector, vector);
	assert_int_equal(h.got_rip, rip);
}

static void test_loop(void **s)
{
	/* 1: add rax,rcx; dec rcx; jnz 1b; hlt */
	CODE(0x48, 0x01, 0xc8, 0x48, 0xff, 0xc9, 0x75, 0xf8, HLT);
	G[R_RCX] = 100000;
	halts();
	assert_int_equal(G[R_RAX], 5000050000ull);
	assert_int_equal(h.cpu.stats.insns, 300001);
	assert_int_equal(h.cpu.rip, H_CODE + 9);
}

static void test_call_stack(void **s)
{
	/* push 5; call +2; hlt; nop; pop rbx; pop rax; push rax; push rbx; ret 8 */
	CODE(0x6a, 0x05, 0xe8, 2, 0, 0, 0, HLT, 0x90, 0x5b, 0x58, 0x50, 0x53, 0xc2, 8, 0);
	halts();
	assert_int_equal(G[R_RAX], 5);
	assert_int_equal(G[R_RSP], H_STACK);
	/* push rsp; pop rax; mov rbp,rsp; push [rsp]; pop [rsp-8]; hlt */
	CODE(0x54, 0x58, 0x50, 0xff, 0x34, 0x24, 0x8f, 0x44, 0x24, 0xf8, HLT);
	halts();
	assert_int_equal(G[R_RAX], H_STACK);
	assert_int_equal(*(uint64_t *)(h.ram + H_STACK - 16), H_STACK);
}

static void test_faults(void **s)
{
	/* mov rax,[0x401000] (not present) behind two instructions */
	CODE(0x90, 0x6a, 0x01, 0x48, 0x8b, 0x04, 0x25, 0x00, 0x10, 0x40, 0x00, HLT);
	faults(EXC_PF, H_CODE + 3);
	assert_int_equal(h.got.payload, 0x401000);
	assert_int_equal(G[R_RSP], H_STACK - 8);
	G[R_RSP] = 0;
	/* push over a missing page leaves rsp: mov esp,0x402000; push rax */
	CODE(0xbc, 0x00, 0x20, 0x40, 0x00, 0x50, HLT);
	faults(EXC_PF, H_CODE + 5);
	assert_int_equal(G[R_RSP], 0x402000);
	assert_int_equal(h.got.error, PF_W);
	CODE(0x0f, 0x0b);
	faults(EXC_UD, H_CODE);
	CODE(0xf0, 0x01, 0xc0);                                         /* lock add eax,eax */
	faults(EXC_UD, H_CODE);
	CODE(0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90);
	faults(EXC_GP, H_CODE);
	CODE(0x31, 0xc9, 0xf7, 0xf1);                                   /* xor ecx,ecx; div ecx */
	faults(EXC_DE, H_CODE + 2);
	CODE(0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0xe0);        /* jmp to a non-canonical address */
	faults(EXC_GP, H_CODE + 10);
}

/* SIB.base 5 with mod 0 is no base, whatever REX.B and the address size say. */
static void test_absent_base(void **s)
{
	memcpy(h.ram + H_DATA + 0x20, "\x78\x56\x34\x12", 4);
	CODE(0x67, 0x43, 0x8b, 0x34, 0xd5, 0x00, 0x00, 0x20, 0x00, HLT);        /* mov esi, [r10d * 8 + H_DATA] */
	G[R_RSI] = 0;
	G[10] = 0xffffffff00000004;
	G[13] = 0x1000;
	halts();
	assert_int_equal(G[R_RSI], 0x12345678);
	G[R_RSI] = 0;
	CODE(0x43, 0x8b, 0x34, 0xd5, 0x00, 0x00, 0x20, 0x00, HLT);
	G[10] = 4;
	halts();
	assert_int_equal(G[R_RSI], 0x12345678);
	G[10] = G[13] = 0;
}

static void test_fetch_cross(void **s)
{
	/* A five-byte mov at the end of 0x400000 runs into the missing 0x401000. */
	memcpy(h.ram + 0x400ffd, "\xb8\x01\x00", 3);
	CODE(0xb8, 0xfd, 0x0f, 0x40, 0x00, 0xff, 0xe0);                 /* jmp 0x400ffd */
	faults(EXC_PF, 0x400ffd);
	assert_int_equal(h.got.payload, 0x401000);
	assert_int_equal(h.got.error, PF_I);
	/* complete within two present pages */
	memcpy(h.ram + H_CODE + 0xffd, "\xb8\x78\x56\x34\x12\xf4", 6);
	CODE(0xe9, 0xf8, 0x0f, 0, 0);
	halts();
	assert_int_equal(G[R_RAX], 0x12345678);
	h.ram[H_CODE + 0x1000] = 0x99;                                  /* second page changed */
	phys_code_written(&h.vm, H_CODE + 0x1000, 1);
	halts();
	assert_int_equal(G[R_RAX], 0x12995678);
}

static void test_smc(void **s)
{
	/* mov byte [rip+1], 0x42 changes the immediate of the next instruction: mov al, 0 */
	CODE(0xc6, 0x05, 0x01, 0, 0, 0, 0x42, 0xb0, 0x00, HLT);
	halts();
	assert_int_equal(G[R_RAX] & 0xff, 0x42);
	/* a loop that changes its own body: inc byte [rip+3]; mov bl,0; dec ecx; jnz */
	CODE(0xfe, 0x05, 0x01, 0, 0, 0, 0xb3, 0x00, 0xff, 0xc9, 0x75, 0xf4, HLT);
	G[R_RCX] = 100;
	halts();
	assert_int_equal(G[R_RBX] & 0xff, 100);
	/* behind our back, by a client that says nothing */
	h.vm.client_tells_code = false;
	CODE(0xb8, 1, 0, 0, 0, HLT);
	halts();
	h.ram[H_CODE + 1] = 2;
	halts();
	assert_int_equal(G[R_RAX], 2);
}

/* Other code in one place again and again takes up no more entries than at first: looks would go through all of them. */
static void test_rewritten(void **s)
{
	size_t hashed = 0;

	for (unsigned n = 0; n < 2000; n++) {
		if (n & 1)
			CODE(0x89, 0xc8, HLT);          /* mov %ecx, %eax */
		else
			CODE(0x8d, 0x41, 0x01, HLT);    /* lea 1(%rcx), %eax */
		G[R_RCX] = n;
		halts();
		assert_int_equal(G[R_RAX], n | 1);
		if (n == 1)
			hashed = h.cpu.blocks->hashed;
	}
	assert_true(h.cpu.stats.blocks_decoded >= 2000);
	assert_int_equal(h.cpu.blocks->hashed, hashed);
}

static void test_strings(void **s)
{
	uint8_t *d = h.ram + H_DATA;

	for (unsigned n = 0; n < 20000; n++)
		d[n] = (uint8_t)(n * 7);
	CODE(0xf3, 0xa4, HLT);                                          /* rep movsb */
	G[R_RSI] = H_DATA + 3;
	G[R_RDI] = H_DATA + 50001;
	G[R_RCX] = 19000;
	halts();
	assert_memory_equal(d + 3, d + 50001, 19000);
	assert_int_equal(G[R_RCX], 0);
	assert_int_equal(G[R_RDI], H_DATA + 69001);
	memcpy(d, "abc", 3);                                            /* overlapping: spreads the pattern */
	G[R_RSI] = H_DATA;
	G[R_RDI] = H_DATA + 3;
	G[R_RCX] = 9000;
	halts();
	assert_memory_equal(d + 8997, "abcabc", 6);
	CODE(0xfd, 0xf3, 0x48, 0xa5, 0xfc, HLT);                        /* std; rep movsq; cld */
	for (unsigned n = 0; n < 1000; n++)
		((uint64_t *)d)[n] = n;
	G[R_RSI] = H_DATA + 999 * 8;
	G[R_RDI] = H_DATA + 1001 * 8;
	G[R_RCX] = 1000;
	halts();
	assert_int_equal(((uint64_t *)d)[1001], 999);
	assert_int_equal(((uint64_t *)d)[2], 0);
	assert_int_equal(G[R_RSI], H_DATA - 8);
	CODE(0xf2, 0xae, HLT);                                          /* repne scasb */
	memset(d, 1, 5000);
	d[4321] = 0;
	G[R_RAX] = 0;
	G[R_RDI] = H_DATA;
	G[R_RCX] = UINT64_MAX;
	halts();
	assert_int_equal(G[R_RDI], H_DATA + 4322);
	CODE(0xf3, 0xab, HLT);                                          /* rep stosd into a missing page */
	G[R_RDI] = 0x400ff0;
	G[R_RCX] = 100;
	faults(EXC_PF, H_CODE);
	assert_int_equal(G[R_RCX], 96);
	assert_int_equal(G[R_RDI], 0x401000);
}

/* An interrupt in the middle of it left RF set: what is left goes as fast as before. */
static void test_string_resumed(void **s)
{
	uint64_t visits = h.cpu.stats.blocks_run;

	CODE(0xf3, 0xa4, HLT);                                          /* rep movsb */
	memset(h.ram + H_DATA, 0x5a, 19000);
	G[R_RSI] = H_DATA;
	G[R_RDI] = H_DATA + 50001;
	G[R_RCX] = 19000;
	h.cpu.eflags |= FL_RF;
	h.cpu.one_insn = true;
	halts();
	assert_int_equal(G[R_RCX], 0);
	assert_memory_equal(h.ram + H_DATA, h.ram + H_DATA + 50001, 19000);
	assert_false(h.cpu.eflags & FL_RF);
	assert_in_range(h.cpu.stats.blocks_run - visits, 1, 20);
}

/* What the manual says, element by element, on a copy of the memory at H_DATA. */
struct strings { uint64_t rax, rcx, rsi, rdi; bool zf; };

static void model_step(struct strings *m, uint8_t *mem, char op, unsigned size, int64_t step)
{
	uint64_t a = 0, b = 0, mask = size == 8 ? ~0ull : (1ull << 8 * size) - 1;

	if (op == 'm') {
		memmove(mem + (m->rdi - H_DATA), mem + (m->rsi - H_DATA), size);
	} else if (op == 's') {
		memcpy(mem + (m->rdi - H_DATA), &m->rax, size);
	} else if (op == 'l') {
		memcpy(&a, mem + (m->rsi - H_DATA), size);
		m->rax = size == 4 ? a : (m->rax & ~mask) | a;
	} else {
		a = m->rax & mask;
		if (op == 'c')
			memcpy(&a, mem + (m->rsi - H_DATA), size);
		memcpy(&b, mem + (m->rdi - H_DATA), size);
		m->zf = a == b;
	}
	if (op == 'm' || op == 'l' || op == 'c')
		m->rsi += (uint64_t)step;
	if (op != 'l')
		m->rdi += (uint64_t)step;
}

static void model(struct strings *m, uint8_t *mem, char op, unsigned size, bool down, bool repne)
{
	while (m->rcx) {
		model_step(m, mem, op, size, down ? -(int64_t)size : size);
		m->rcx--;
		if ((op == 'c' || op == 'a') && m->zf == repne)
			return;
	}
}

static void test_strings_random(void **s)
{
	static const struct { char op; uint8_t code; } ops[] = { { 'm', 0xa4 }, { 's', 0xaa }, { 'l', 0xac }, { 'c', 0xa6 }, { 'a', 0xae } };
	enum { AREA = 64 << 10 };
	uint8_t *d = h.ram + H_DATA, *mem = malloc(AREA);

	assert_non_null(mem);
	srandom(1);
	for (unsigned n = 0; n < 3000; n++) {
		unsigned k = (unsigned)random() % 5, shift = (unsigned)random() % 4, size = 1u << shift;
		bool down = random() & 1, repne = random() & 1, compares = ops[k].op == 'c' || ops[k].op == 'a';
		uint64_t far = 16384, count = (uint64_t)random() % (random() & 1 ? 12 : 1500);
		struct strings m = { .rax = 0x0101010101010101u * (random() & 1), .rcx = count, .zf = true,
				     .rsi = H_DATA + far + (uint64_t)random() % 20000, .rdi = H_DATA + far + (uint64_t)random() % 20000 };

		if (random() & 1)
			m.rdi = m.rsi + (uint64_t)(random() % 65) - 32;
		for (unsigned b = 0; b < AREA; b++)
			d[b] = compares ? (random() % 2000 == 0) ^ repne : (uint8_t)random();
		memcpy(mem, d, AREA);
		const uint8_t code[] = { down ? 0xfd : 0xfc, repne ? 0xf2 : 0xf3, shift == 1 ? 0x66 : 0x3e, shift == 3 ? 0x48 : 0x40,
					 (uint8_t)(ops[k].code | !!shift), 0xfc, HLT };
		harness_code(code, sizeof code);
		G[R_RAX] = m.rax;
		G[R_RCX] = m.rcx;
		G[R_RSI] = m.rsi;
		G[R_RDI] = m.rdi;
		halts();
		model(&m, mem, ops[k].op, size, down, repne);
		assert_int_equal(G[R_RAX], m.rax);
		assert_int_equal(G[R_RCX], m.rcx);
		assert_int_equal(G[R_RSI], m.rsi);
		assert_int_equal(G[R_RDI], m.rdi);
		if (compares && count)
			assert_int_equal(h.cpu.aflags >> 14 & 1, m.zf);
		assert_memory_equal(d, mem, AREA);
	}
	free(mem);
}

static void test_mmio(void **s)
{
	/* add eax,[0x8000000]; mov [0x8000008],eax; hlt: memory that nobody has */
	CODE(0x03, 0x04, 0x25, 0, 0, 0, 0x08, 0x89, 0x04, 0x25, 8, 0, 0, 0x08, HLT);
	G[R_RAX] = 1;
	assert_int_equal(harness_run(), RUN_EXIT);
	assert_int_equal(h.run->exit_reason, KVM_EXIT_MMIO);
	assert_int_equal(h.cpu.rip, H_CODE);
	st_le32(h.run->mmio.data, 41);
	assert_false(mmio_complete(&h.cpu));
	assert_int_equal(engine_run(&h.cpu), RUN_EXIT);
	assert_int_equal(h.run->mmio.is_write, 1);
	assert_int_equal(ld_le32(h.run->mmio.data), 42);
	assert_int_equal(h.cpu.rip, H_CODE + 14);
	assert_false(mmio_complete(&h.cpu));
	assert_int_equal(engine_run(&h.cpu), RUN_HALTED);
}

static void test_locked(void **s)
{
	/* lock xadd [rdi],rax; lock cmpxchg [rdi],rbx; hlt, also across a page */
	CODE(0xf0, 0x48, 0x0f, 0xc1, 0x07, 0xf0, 0x48, 0x0f, 0xb1, 0x1f, HLT);
	for (unsigned n = 0; n < 2; n++) {
		uint64_t a = H_DATA + (n ? 4092 : 0);

		st_le64(h.ram + a, 100);
		G[R_RDI] = a;
		G[R_RAX] = 7;
		G[R_RBX] = 55;
		halts();
		assert_int_equal(G[R_RAX], 107);                        /* 100 was compared with 107, 107 loaded */
		assert_int_equal(ld_le64(h.ram + a), 107);
		halts();                                                /* adds 107: 214; rax = 107 */
		assert_int_equal(ld_le64(h.ram + a), 214);
	}
}

static void test_16(void **s)
{
	harness_mode(16);
	/* mov ax,0xffff; add ax,1; push ax; pusha; popa; pop bx; mov [0x7000],sp; loop; hlt */
	CODE(0xb8, 0xff, 0xff, 0x05, 1, 0, 0x50, 0x60, 0x61, 0x5b, 0x89, 0x26, 0x00, 0x70, 0xb9, 5, 0, 0x42, 0xe2, 0xfd, HLT);
	G[R_RDX] = 0xabcd0000;
	halts();
	assert_int_equal(ld_le16(h.ram + H_CODE + 0x7000), 0x8000);
	assert_int_equal(G[R_RDX], 0xabcd0005);
	assert_int_equal(G[R_RCX] & 0xffff, 0);
	/* mov al,[0x10000 by ebx]: beyond the limit */
	CODE(0x66, 0xbb, 0, 0, 1, 0, 0x67, 0x8a, 0x03, HLT);
	faults(EXC_GP, 6);
}

static void test_32(void **s)
{
	harness_mode(32);
	/* mov eax,0x99; daa; aam; enter 16,1; leave; inc edx; hlt */
	CODE(0xb8, 0x9a, 0, 0, 0, 0x27, 0x89, 0xc3, 0xc8, 16, 0, 1, 0xc9, 0x42, HLT);
	G[R_RBP] = 0x1234;
	halts();
	assert_int_equal(G[R_RBX], 0);
	assert_int_equal(G[R_RBP], 0x1234);
	assert_int_equal(G[R_RSP], H_STACK);
	assert_int_equal(G[R_RDX], 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(test_loop), T(test_call_stack), T(test_faults), T(test_absent_base), T(test_fetch_cross), T(test_smc), T(test_rewritten), T(test_strings), T(test_string_resumed), T(test_strings_random), T(test_mmio),
		T(test_locked), T(test_16), T(test_32),
	};
	return cmocka_run_group_tests_name("interp", tests, NULL, NULL);
}
