/*
 * System instructions that the translator has code of its own for (jit/gen_sys.c), in a loop of the kernel's, with flags that matter around
 * them: interpreted, translated when hot and translated at once the guest must end with the same registers.
 */
#include <stdio.h>
#include <stdlib.h>

#include "guest.h"

#define MIX(reg) "rol $7, %r15; add %" #reg ", %r15;"
#define FLAGS "lahf; seto %al; movzx %ax, %eax;" MIX(rax)
#define RFLAGS "pushfq; pop %rax;" MIX(rax)
#define BIT(op) "test %r15, %r15; " op "; setc %al; setz %ah; movzx %ax, %eax;" MIX(rax)

/*
 * r8 counts down; r15 is the hash of all that was seen, r14 gives flags, r13 counts page faults, r11 time that ran backwards. The page at 2 MiB is
 * the user's: only STAC makes it reachable.
 */
GUEST_ASM(loop, 64,
	"mov %cr4, %rax; or $0x210000, %rax; mov %rax, %cr4; mov $400, %r8d; xor %r15d, %r15d; xor %r12d, %r12d; xor %r11d, %r11d; xor %r13d, %r13d;"
	"mov $0x9e3779b97f4a7c15, %r14;"
	"1: add %r15, %r14; cli;" FLAGS RFLAGS
	"add %r15, %r14; sti; nop;" FLAGS RFLAGS
	"sub %r15, %r14; std; pushfq; cld; pop %rax;" MIX(rax) FLAGS RFLAGS
	"add %r15, %r14; swapgs;" FLAGS "rdgsbase %rax;" MIX(rax)
	"mov %r15, %rax; shl $17, %rax; sar $17, %rax; wrgsbase %rax; swapgs; rdgsbase %rax;" MIX(rax)
	"mov %r15, %rbx; shl $17, %rbx; sar $17, %rbx; wrfsbase %rbx; rdfsbase %rax;" MIX(rax)
	"wrfsbase %r15d; rdfsbase %rax;" MIX(rax) "rdfsbase %eax;" MIX(rax)
	"mov %ds, %eax;" MIX(rax) "mov %cs, %r10;" MIX(r10) "mov %cr0, %rax;" MIX(rax) "mov %cr2, %rax;" MIX(rax) "mov %cr3, %r10;" MIX(r10)
	"mov %cr4, %rax;" MIX(rax)
	"mov %r15, %rcx; and $0xfff, %ecx; sub $0x800, %rcx; mov $0x100800, %edi;"
	BIT("bts %rcx, (%rdi)") BIT("bt %rcx, (%rdi)") BIT("lock btr %rcx, (%rdi)") BIT("btc %rcx, (%rdi)")
	BIT("btr %ecx, 4(%rdi)") BIT("lock bts %ecx, 4(%rdi)") BIT("bt %ecx, -4(%rdi,%r8,8)") "mov %r15, %r10; and $0x7f, %r10d;" BIT("btc %r10, (%rdi)")
	"mov $0x101000, %edi; mov (%rdi), %rax; mov 8(%rdi), %rdx; mov %r15, %rbx; mov %r8, %rcx; test $1, %r8b; jz 2f; inc %rax;"
	"2: cmp %r8, %r15; lock cmpxchg16b (%rdi); setz %bl; setc %bh;" MIX(rax) MIX(rdx) MIX(rbx)
	"mov (%rdi), %rax; mov 8(%rdi), %rdx; cmpxchg16b (%rdi); setz %bl;" MIX(rbx)
	"add %r15, %r14; stac;" FLAGS "mov 0x200000, %rax; add %r15, %rax; mov %rax, 0x200000;" MIX(rax) RFLAGS "stac; stac; clac;" RFLAGS
	"test $15, %r8b; jnz 3f; mov 0x200008, %rax; stac; 3: clac; clac;" RFLAGS
	"rdtsc; shl $32, %rdx; or %rdx, %rax; cmp %r12, %rax; adc $0, %r11; mov %rax, %r12;"
	"rdtscp; shl $32, %rdx; or %rdx, %rax; cmp %r12, %rax; adc $0, %r11; mov %rax, %r12;" MIX(rcx)
	"dec %r8d; jnz 1b; out %al, $0x80; hlt");
/* #PF: with EFLAGS.AC the access may be made. */
GUEST_ASM(on_fault, 64, "inc %r13; add $8, %rsp; orl $0x40000, 16(%rsp); iretq");

#define SELECTORS "mov %cs, %eax;" MIX(rax) "mov %r15, %rax; mov %ss, %ax;" MIX(rax) "mov %r15, %r11; mov %ds, %r11w;" MIX(r11)
#define WRMSR(number, high, low) "mov $" #number ", %ecx; mov $" #high ", %edx; mov $" #low ", %eax; wrmsr;"
/*
 * Ring 3 and back by SYSCALL and SYSRET, 2000 times. The kernel answers with the code at 0x30000; what it gives back as flags is a hash, now
 * and then with AC, NT or TF, whose trap is counted in r13. r9: PKRU is there; r10 counts as r8 does, in the kernel.
 */
GUEST_ASM(to_user, 64,
	"mov $7, %eax; xor %ecx, %ecx; cpuid; and $8, %ecx; shl $19, %ecx; mov %ecx, %r9d; mov %cr4, %rax; or %rcx, %rax; mov %rax, %cr4;"
	WRMSR(0xc0000081, 0x00330010, 0x1234) WRMSR(0xc0000082, 0, 0x30000) WRMSR(0xc0000084, 0, 0x47711)
	"mov $2000, %r8d; xor %r15d, %r15d; xor %r13d, %r13d; mov $0x9e3779b97f4a7c15, %r14; mov $0x200000, %ecx; mov $2, %r11d; mov $0x280000, %esp; sysretq");
GUEST_ASM(user, 64,
	"1: mov %r8d, %edx; mov %r15, %r11;" SELECTORS "add %r15, %r14; syscall;" FLAGS RFLAGS MIX(rcx) MIX(r11) SELECTORS
	"cld; add %r15, %r14; mov %r8, %rbx; syscall; setc %al; movzx %al, %eax;" MIX(rax) "dec %r8d; jnz 1b; xor %edx, %edx; syscall");
GUEST_ASM(in_kernel, 64,
	"test %edx, %edx; jz 9f;" FLAGS RFLAGS MIX(rcx) MIX(r11) "mov %rcx, %rbp;" SELECTORS
	"mov %r8d, %eax; shl $3, %eax; and $0x38, %eax; test $31, %r8b; jnz 4f; or $0x85, %al; 4: mov %ax, 0x101000; add %r15, %r14; verw 0x101000;" FLAGS "cmp %r14, %r15; verw 0x101000; setz %al; setl %ah;" MIX(rax)
	"cmp %eax, %eax; verw 0x101000; setz %al; setc %ah;" MIX(rax)
	"test %r9d, %r9d; jz 2f; mov %r15, %rax; xor %ecx, %ecx; rdpkru;" MIX(rax) MIX(rdx) "2: mov %rbp, %rcx;"
	"mov %r15, %r11; and $0x200cd5, %r11d; mov %r15d, %eax; test $31, %r8b; jnz 3f; and $0x44100, %eax; or %rax, %r11;"
	"3: mov $1, %edx; sysretq; 9: out %al, $0x80; hlt");
/* #DB */
GUEST_ASM(on_step, 64, "inc %r13; andl $0xfffffeff, 16(%rsp); iretq");

/*
 * What is called replaces now and then the page that it was called from by another, which adds 7 instead of 5 behind the call: the return leads there, although
 * it was a call of the host's that would lead to the first. r8: how many.
 */
GUEST_ASM(begin, 64, "mov $0x90000, %esp; mov $4000, %r8d; xor %edx, %edx; mov $0x200000, %eax; jmp *%rax");
GUEST_ASM(adds_5, 64, "1: mov $0x30000, %eax; call *%rax; add $5, %edx; dec %r8d; jnz 1b; out %al, $0x80; hlt");
GUEST_ASM(adds_7, 64, "1: mov $0x30000, %eax; call *%rax; add $7, %edx; dec %r8d; jnz 1b; out %al, $0x80; hlt");
GUEST_ASM(replace, 64, "test $3, %r8b; jnz 2f; xorl $0x600000, 0x5008; test $4, %r8b; jz 1f; invlpg 0x200000; ret; 1: mov %cr3, %rax; mov %rax, %cr3; 2: ret");

static const char *const modes[] = { "interp", "translate", "translate-at-once" };

/* Code at 0x10000, where the guest begins, and elsewhere; a page directory entry for 2 MiB, 0: as it is; what #PF leads to. */
struct program { const uint8_t *code, *end; struct { uint64_t at; const uint8_t *code, *end; } more[4]; uint64_t entry; uint32_t on_fault; };

/* Runs it until it writes to a port. */
static struct kvm_regs run_in(const char *mode, const struct program *p, struct softkvm_stats *s)
{
	struct kvm_regs r;
	struct guest g;

	setenv("LODGE_SOFT_MODE", mode, 1);
	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .mem_size = 8 << 20 });
	guest_load(&g, 0x10000, p->code, (size_t)(p->end - p->code));
	for (unsigned n = 0; n < 4 && p->more[n].code; n++)
		guest_load(&g, p->more[n].at, p->more[n].code, (size_t)(p->more[n].end - p->more[n].code));
	guest_long64(&g, 0, 0x10000);
	if (p->entry)
		guest_load(&g, 0x5008, &p->entry, 8);
	if (p->on_fault)
		guest_gate(&g, 64, 14, p->on_fault, 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(softkvm_vcpu_stats(g.vcpu[0].f, s), 0);
	guest_destroy(&g);
	return r;
}

static void returns_to_what_is_there(void **state)
{
	const struct program p = { begin, begin_end, { { 0x30000, replace, replace_end }, { 0x200000, adds_5, adds_5_end }, { 0x400000, adds_7, adds_7_end } },
		.entry = 0x200083 };
	struct softkvm_stats s;

	for (unsigned m = 0; m < 3; m++)
		assert_int_equal(run_in(modes[m], &p, &s).rdx, 4000 * 6);
}

/*
 * A page is read, and behind a branch written, by one base: that it may be read is known by then, but not that it may be written. In every fourth round
 * it may not. r13: page faults.
 */
GUEST_ASM(read_then_write, 64,
	"mov %cr0, %rax; or $0x10000, %eax; mov %rax, %cr0; mov $4000, %r8d; xor %r13d, %r13d; xor %edx, %edx; mov $0x108000, %esi;"
	"1: mov $0x100000, %ebx; test $3, %r8b; jnz 2f; mov $0x200000, %ebx;"
	"2: mov (%rbx), %rax; add (%rsi), %rdx; mov 24(%rbx), %rcx; test %rax, %rax; jnz 3f; mov %r8, 8(%rbx); 3: add 16(%rbx), %rdx; dec %r8d; jnz 1b; out %al, $0x80; hlt");
GUEST_ASM(on_write, 64, "inc %r13; add $8, %rsp; addq $4, (%rsp); iretq");

static void reading_is_not_writing(void **state)
{
	const struct program p = { read_then_write, read_then_write_end, { { 0x20000, on_write, on_write_end } }, .entry = 0x200081, .on_fault = 0x20000 };
	struct softkvm_stats s;

	for (unsigned m = 0; m < 3; m++)
		assert_int_equal(run_in(modes[m], &p, &s).r13, 1000);
}

/*
 * A loop that is longer than many budgets, where every register and CF are needed from one round to the next, vector and x87 state as well; its calls, returns and
 * indirect jumps charge the budget too. All lands in the registers.
 */
GUEST_ASM(chain, 64,
	"mov %cr4, %rax; or $0x600, %eax; mov %rax, %cr4; fninit; fldz; fld1; mov $0x90000, %esp; mov $1000000, %r8d; mov $0x30001, %eax; mov $5, %ebx; mov $7, %ecx;"
	"mov $9, %edx; mov $11, %esi; mov $13, %edi; mov $15, %ebp; mov $17, %r9d; mov $19, %r10d; mov $21, %r11d; mov $23, %r12d; mov $25, %r13d; mov $27, %r14d;"
	"mov $29, %r15d; movq %rax, %xmm0; movq %rbx, %xmm1; movq %rcx, %xmm15; stc;"
	"1: adc %rbx, %rax; adc %rax, %rcx; adc %rcx, %rdx; adc %rdx, %rsi; adc %rsi, %rdi; adc %rdi, %rbp; adc %rbp, %r9; adc %r9, %r10; adc %r10, %r11;"
	"adc %r11, %r12; adc %r12, %r13; adc %r13, %r14; adc %r14, %r15; call 2f; adc %r15, %rbx; paddq %xmm0, %xmm1; paddq %xmm1, %xmm15; pxor %xmm15, %xmm0;"
	"fadd %st(1), %st; fxch; lea 3f(%rip), %rdi; jmp *%rdi; 2: ret; 3: mov %rbx, %rdi; dec %r8d; jnz 1b;"
	"fistpl 0x100000; fistpl 0x100004; movq %xmm0, %r8; movq %xmm15, %rdi; xor 0x100000, %rdi; out %al, $0x80; hlt");

static void budgets_end_unseen(void **state)
{
	const struct program p = { chain, chain_end };
	struct kvm_regs r[3];

	for (unsigned m = 0; m < 3; m++) {
		struct softkvm_stats s;

		r[m] = run_in(modes[m], &p, &s);
		assert_memory_equal(&r[m], &r[0], sizeof r[0]);
		print_message("%s: left %llu times\n", modes[m], (unsigned long long)(s.left_by_budget + s.left_for_loop));
		if (m == 1)     /* 28 million instructions are 6800 budgets */
			assert_in_range(s.left_by_budget + s.left_for_loop, 1, 3400);
	}
}

/* Pushes, pops and accesses in a row, always across a page end: before long each has a check of its own. */
GUEST_ASM(rows, 64,
	"mov $0x80010, %esp; mov $0x90ff0, %ebx; mov $200000, %r8d; mov $1, %eax; mov $2, %ecx; mov $3, %edx; mov $4, %esi;"
	"1: push %rax; push %rcx; push %rdx; push %rsi; add %r8, 8(%rbx); add %rax, 16(%rbx); add %rcx, (%rbx); add 16(%rbx), %rdx; pop %rax; pop %rsi; pop %rcx; pop %rdx;"
	"dec %r8d; jnz 1b; mov 8(%rbx), %rdi; out %al, $0x80; hlt");

static void rows_across_pages(void **state)
{
	const struct program p = { rows, rows_end };
	struct kvm_regs r[2];

	for (unsigned m = 0; m < 2; m++) {
		struct softkvm_stats s;

		r[m] = run_in(modes[m], &p, &s);
		assert_memory_equal(&r[m], &r[0], sizeof r[0]);
		print_message("%s: %llu calls of handlers\n", modes[m], (unsigned long long)s.handler_calls);
		assert_true(s.handler_calls < 20000);
	}
}

/*
 * PUSH of memory whose page table entry has lost its A bit, so that a handler does it; the pushes behind it must go to this stack, and not to where
 * accesses by rsp before went.
 */
GUEST_ASM(half_pushed, 64,
	"mov $200000, %r8d; xor %edx, %edx; mov $0x200000, %ebx; mov $3, %eax; mov $5, %ecx; mov $0x5008, %esi;"
	"1: mov $0x90800, %esp; call 5f; mov $0xa0800, %esp; test $3, %r8b; jnz 3f; andl $0xffffffdf, (%rsi); invlpg (%rbx); 3: call 6f; dec %r8d; jnz 1b; out %al, $0x80; hlt;"
	"5: mov 8(%rsp), %r9; mov (%rbx), %r10; mov 24(%rsp), %r11; mov 8(%rbx), %r10; mov %r9, 40(%rsp); ret;"
	"6: push 8(%rbx); lea (%r8), %r9; push %rax; lea (%r8), %r10; push %rcx; lea (%r8), %r11; push %rax; lea (%r8), %r9;"
	"mov %rsp, %r12; add 8(%r12), %rdx; mov (%rbx), %r10; add 16(%r12), %rdx; movq $0, 8(%r12); mov (%rbx), %r10; movq $0, 16(%r12); add $32, %rsp; ret");

static void pushes_behind_a_handler(void **state)
{
	const struct program p = { half_pushed, half_pushed_end, .entry = 0x200083 };

	for (unsigned m = 0; m < 3; m++) {
		struct softkvm_stats s;

		assert_int_equal(run_in(modes[m], &p, &s).rdx, 200000 * 8);
		assert_true(!m || s.handler_calls >= 50000);    /* the pushes that lost their A bit */
	}
}

static struct kvm_regs run_rings(const char *mode, struct softkvm_stats *s)
{
	const uint64_t user_page = 0x200087, ss_and_cs[2] = { 0x00cff3000000ffff, 0x00affb000000ffff };
	struct kvm_regs r;
	struct guest g;

	setenv("LODGE_SOFT_MODE", mode, 1);
	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	guest_load(&g, 0x10000, to_user, (size_t)(to_user_end - to_user));
	guest_load(&g, 0x20000, on_step, (size_t)(on_step_end - on_step));
	guest_load(&g, 0x30000, in_kernel, (size_t)(in_kernel_end - in_kernel));
	guest_load(&g, 0x200000, user, (size_t)(user_end - user));
	guest_long64(&g, 0, 0x10000);
	guest_load(&g, 0x1038, ss_and_cs, 16);
	guest_load(&g, 0x5008, &user_page, 8);
	guest_gate(&g, 64, 1, 0x20000, 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(softkvm_vcpu_stats(g.vcpu[0].f, s), 0);
	guest_destroy(&g);
	return r;
}

static void rings_agree(void **state)
{
	struct kvm_regs r[3];
	struct softkvm_stats s[3];

	for (unsigned m = 0; m < 3; m++) {
		r[m] = run_rings(modes[m], &s[m]);
		print_message("%s: %016llx, %llu steps, %llu calls of handlers\n", modes[m], (unsigned long long)r[m].r15, (unsigned long long)r[m].r13,
			      (unsigned long long)s[m].handler_calls);
		assert_int_equal(r[m].r8, 0);
		assert_int_equal(r[m].r13, r[0].r13);
		assert_int_equal(r[m].r14, r[0].r14);
		assert_int_equal(r[m].r15, r[0].r15);
	}
	assert_true(r[0].r13 > 0);
	/* Of 8000 changes of rings and 12000 VERWs a part: null and odd selectors, AC and TF. */
	assert_true(s[2].handler_calls < 5000);
}

static struct kvm_regs run(const char *mode, struct softkvm_stats *s)
{
	const uint64_t kernel = 0x83, user = 0x200087;
	struct kvm_regs r;
	struct guest g;

	setenv("LODGE_SOFT_MODE", mode, 1);
	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	guest_load(&g, 0x10000, loop, (size_t)(loop_end - loop));
	guest_load(&g, 0x20000, on_fault, (size_t)(on_fault_end - on_fault));
	guest_long64(&g, 0, 0x10000);
	guest_load(&g, 0x5000, &kernel, 8);
	guest_load(&g, 0x5008, &user, 8);
	guest_gate(&g, 64, 14, 0x20000, 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(softkvm_vcpu_stats(g.vcpu[0].f, s), 0);
	guest_destroy(&g);
	return r;
}

static void all_modes_agree(void **state)
{
	struct kvm_regs r[3];
	struct softkvm_stats s[3];

	for (unsigned m = 0; m < 3; m++) {
		r[m] = run(modes[m], &s[m]);
		print_message("%s: %016llx, %llu calls of handlers\n", modes[m], (unsigned long long)r[m].r15, (unsigned long long)s[m].handler_calls);
		assert_int_equal(r[m].r8, 0);
		assert_int_equal(r[m].r11, 0);
		assert_int_equal(r[m].r13, 400 / 16);
		assert_int_equal(r[m].r14, r[0].r14);
		assert_int_equal(r[m].r15, r[0].r15);
	}
	assert_true(s[2].translations > 0);
	/* A round has some eighty instructions of these kinds: now and then one is to be their handlers'. */
	assert_true(s[2].handler_calls < 400 * 12);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(all_modes_agree), cmocka_unit_test(rings_agree), cmocka_unit_test(returns_to_what_is_there),
		cmocka_unit_test(reading_is_not_writing), cmocka_unit_test(budgets_end_unseen),
		cmocka_unit_test(rows_across_pages), cmocka_unit_test(pushes_behind_a_handler) };

	if (!__builtin_cpu_supports("bmi2")) {
		printf("no translator here\n");
		return 77;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
