/*
 * Memory of a slot that the client unmapped: KVM_RUN gives EFAULT with RIP at the instruction and everything as it was
 * before; mapped again, the guest goes on as if nothing had been. Interpreted and translated. Signals that are none of
 * softkvm's go to the client's handler.
 */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "guest.h"

#define CODE 0x10000u
#define PAGE_GPA 0x200000u
#define ROUNDS 50       /* left when the page is needed */
#define FIRST (PAGE_GPA - 0x2000)

/*
 * Two hundred rounds, an exit behind every hundred. `insn` works on (%rbx), with %rdx and vector and x87 registers of its own:
 * the first fifty rounds of a hundred in another page, so that the fault is met in the middle.
 */
#define CASE(name, pre, insn)                                                                                   \
	GUEST_ASM(name, 64, pre "; mov $0x300000, %edi; mov $7, %edx; mov $0x200000, %r15d; jmp 2f\n"               \
		  "3: out %al, $0x80\n 2: mov $100, %ecx\n 1: mov $0x1fe000, %ebx; cmp $50, %ecx; cmovle %r15, %rbx; " insn "; dec %ecx; jnz 1b; jmp 3b")
CASE(c_load, "", "add (%rbx), %rax; lea 1(%rax), %rax");
CASE(c_store, "", "mov %ecx, 12(%rbx)");
CASE(c_rmw, "", "stc; adc %rdx, 8(%rbx)");
CASE(c_lock, "", "lock xadd %rdx, 16(%rbx)");
CASE(c_cmpxchg, "", "mov %rcx, %rax; cmpxchg %rdx, (%rbx)");
CASE(c_push, "", "mov %rsp, %rbp; lea 64(%rbx), %rsp; push %rcx; pushq $5; pop 8(%rbx); mov %rbp, %rsp");
CASE(c_pop, "", "mov %rsp, %rbp; lea 64(%rbx), %rsp; pop %rsi; pop %r13; mov %rbp, %rsp");
CASE(c_leave, "", "mov %rsp, %r14; lea 64(%rbx), %rbp; leave; mov %r14, %rsp");
CASE(c_call, "", "mov %rsp, %rbp; lea 64(%rbx), %rsp; call 4f; 4: pop %rax; mov %rbp, %rsp");
CASE(c_ret, "", "mov %rsp, %rbp; lea 64(%rbx), %rsp; lea 4f(%rip), %rax; push %rax; ret; 4: mov %rbp, %rsp");
CASE(c_jump, "", "lea 4f(%rip), %rax; mov %rax, 0x100(%rdi); cmpq $0, (%rbx); jmp *0x100(%rdi); 4: nop");
CASE(c_movs, "cld", "mov %rcx, %rbp; mov %rbx, %rsi; mov $40, %ecx; rep movsb; sub $40, %rdi; mov %rbp, %rcx");
CASE(c_stos, "cld", "mov %rcx, %rbp; xchg %rbx, %rdi; mov $5, %ecx; rep stosl; sub $20, %rdi; xchg %rbx, %rdi; mov %rbp, %rcx");
CASE(c_sse, "", "movdqu (%rbx), %xmm1; paddq %xmm1, %xmm2; movdqa %xmm2, 32(%rbx)");
CASE(c_fpmem, "", "cvtsi2sd %ecx, %xmm3; addsd 8(%rbx), %xmm3; mulss 4(%rbx), %xmm4; movups %xmm3, 48(%rbx)");
CASE(c_x87, "fninit", "fildl (%rbx); fistpl 4(%rbx)");
CASE(c_fxsave, "", "fxsave (%rbx); fxrstor (%rbx)");
CASE(c_split, "", "add %rdx, 0xffc(%rbx); mov 0xffd(%rbx), %rax");
CASE(c_bt, "", "bts %ecx, (%rbx); sbb %r8, %r8");
CASE(c_flags, "", "cmp %ecx, %edx; mov (%rbx), %rax; sbb %r9, %r9; add (%rbx), %al; setc %r10b");

CASE(c_row, "", "cmp %ecx, %edx; mov (%rbx), %rax; mov 8(%rbx), %r8; sbb %r9, %r9; add %rax, 16(%rbx); mov %r8, 24(%rbx)");
CASE(c_pushes, "", "mov %rsp, %rbp; lea 128(%rbx), %rsp; push %rcx; push %rdx; push %r14; pop %rsi; pop %r13; pop %rax; mov %rbp, %rsp");
CASE(c_div, "", "mov %rdx, %rbp; orl $1, 4(%rdi); mov $77, %eax; xor %edx, %edx; divl (%rbx); mov %rbp, %rdx");
CASE(c_avx, "mov %cr4, %rax; or $0x40000, %eax; mov %rax, %cr4; xor %ecx, %ecx; xor %edx, %edx; mov $7, %eax; xsetbv",
	"vmovdqu (%rbx), %ymm1; vpaddq 32(%rbx), %ymm1, %ymm2; vmovdqu %ymm2, 64(%rbx); vmovd %ecx, %xmm3");
CASE(c_indirect, "", "lea 4f(%rip), %rax; mov %rax, 0x100(%rdi); movq $0, 0x108(%rdi); mov %rsp, %rbp; lea 64(%rbx), %rsp; call *0x100(%rdi); 4: mov %rbp, %rsp");

#define T(n) { #n, n, n##_end }
static const struct { const char *name; const uint8_t *code, *end; } cases[] = {
	T(c_load), T(c_store), T(c_rmw), T(c_lock), T(c_cmpxchg), T(c_push), T(c_pop), T(c_leave), T(c_call), T(c_ret), T(c_jump), T(c_movs), T(c_stos),
	T(c_sse), T(c_fpmem), T(c_x87), T(c_fxsave), T(c_split), T(c_bt), T(c_flags), T(c_row), T(c_pushes), T(c_div), T(c_avx), T(c_indirect),
};

struct end { struct kvm_regs r; struct kvm_fpu f; uint8_t mem[4 * 4096]; };

static void state(struct guest *g, struct end *e)
{
	memset(e, 0, sizeof *e);
	guest_get_regs(g, 0, &e->r);
	assert_int_equal(gioctl(&g->vcpu[0], KVM_GET_FPU, &e->f, NULL), 0);
}

static void start(struct guest *g, unsigned n)
{
	struct kvm_regs r;

	guest_create(g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	for (unsigned i = 0; i < 4 * 4096; i++)
		g->mem[FIRST + i] = (uint8_t)(i * 7);
	guest_load(g, CODE, cases[n].code, (size_t)(cases[n].end - cases[n].code));
	guest_long64(g, 0, CODE);
	guest_get_regs(g, 0, &r);
	r.rsp = 0x380000;
	guest_set_regs(g, 0, &r);
}

static void page(struct guest *g, uint64_t gpa, int prot) { assert_int_equal(mprotect(g->mem + gpa, 4096, prot), 0); }

static void finish(struct guest *g, struct end *e)
{
	assert_int_equal(guest_run(g, 0), KVM_EXIT_IO);
	state(g, e);
	/* Translated x87 code leaves the pointers as they were (docs/engine-translator.md). */
	e->f.last_opcode = 0;
	e->f.last_ip = e->f.last_dp = 0;
	memcpy(e->mem, g->mem + FIRST, sizeof e->mem);
	guest_destroy(g);
}

/* `warm`: the page goes away between the two hundreds, when its code is translated and the TLB knows it; else before the first. */
static void run_case(unsigned n, bool warm)
{
	static struct end before, again, end, want;
	struct guest g;

	start(&g, n);
	if (warm)
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	finish(&g, &want);

	start(&g, n);
	if (warm)
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	page(&g, PAGE_GPA, PROT_NONE);
	assert_int_equal(guest_run(&g, 0), -EFAULT);
	state(&g, &before);
	assert_int_equal(cases[n].code == c_movs || cases[n].code == c_stos ? before.r.rbp : before.r.rcx, ROUNDS);
	assert_int_equal(guest_run(&g, 0), -EFAULT);
	state(&g, &again);
	assert_memory_equal(&before, &again, sizeof before);
	page(&g, PAGE_GPA, PROT_READ | PROT_WRITE);
	finish(&g, &end);
	assert_memory_equal(&end.r, &want.r, sizeof end.r);
	assert_memory_equal(&end.f, &want.f, sizeof end.f);
	assert_memory_equal(end.mem, want.mem, sizeof end.mem);
}

static void instructions(void)
{
	for (unsigned n = 0; n < sizeof cases / sizeof *cases; n++) {
		if (cases[n].code == c_avx && !__builtin_cpu_supports("avx2"))
			continue;
		print_message("%s\n", cases[n].name);
		run_case(n, false);
		run_case(n, true);
	}
}

static void in_mode(const char *mode)
{
	setenv("LODGE_SOFT_MODE", mode, 1);
	instructions();
	unsetenv("LODGE_SOFT_MODE");
}

static void interpreted(void **st) { in_mode("interp"); }
static void translated(void **st) { in_mode("translate"); }
static void translated_at_once(void **st) { in_mode("translate-at-once"); }

/* -- what the processor reads by itself ------------------------------------------------------------ */
GUEST_ASM(implicit, 64, "mov $0x3000, %eax; mov %rax, %cr3; mov 0x200000, %ebx; int $0x40; 1: inc %rdx; out %al, $0x80; jmp 1b");
GUEST_ASM(handler, 64, "mov $0x77, %ecx; iretq");

/* Unmap one page before the first entry: EFAULT; then the guest reaches its end. */
static void without(uint64_t gpa)
{
	struct kvm_regs r;
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	guest_load(&g, CODE, implicit, (size_t)(implicit_end - implicit));
	guest_load(&g, 0x20000, handler, (size_t)(handler_end - handler));
	guest_long64(&g, 0, CODE);
	guest_gate(&g, 64, 0x40, 0x20000, 0);
	page(&g, gpa, PROT_NONE);
	assert_int_equal(guest_run(&g, 0), -EFAULT);
	assert_int_equal(guest_run(&g, 0), -EFAULT);
	page(&g, gpa, PROT_READ | PROT_WRITE);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rcx, 0x77);
	assert_int_equal(r.rdx, 1);
	/* Code that was compared or fetched before, and is gone now. */
	page(&g, CODE, PROT_NONE);
	assert_int_equal(guest_run(&g, 0), -EFAULT);
	page(&g, CODE, PROT_READ | PROT_WRITE);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rdx, 2);
	guest_destroy(&g);
}

static void tables_and_code(void **st)
{
	without(CODE);
	without(0x20000);       /* the handler's code */
	without(0x7000);        /* the stack */
	without(0x3000);        /* page tables */
	without(0x2000);        /* IDT */
}

/* Read-only memory in a slot that is not: reads work, the first store is EFAULT. */
static void read_only(void **st)
{
	struct kvm_regs r;
	struct guest g;

	start(&g, 2);
	page(&g, PAGE_GPA, PROT_READ);
	assert_int_equal(guest_run(&g, 0), -EFAULT);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rcx, ROUNDS);
	guest_destroy(&g);
}

/* -- other people's signals ------------------------------------------------------------------------ */
static sigjmp_buf out;
static volatile int got;
static void caught(int s, siginfo_t *si, void *u) { got = s; siglongjmp(out, 1); }

static void client_signals(void **st)
{
	struct sigaction sa = { .sa_sigaction = caught, .sa_flags = SA_SIGINFO }, was[3];
	static const int sig[3] = { SIGSEGV, SIGILL, SIGFPE };
	uint8_t *p = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	sigset_t mask;
	struct guest g;

	for (unsigned n = 0; n < 3; n++)
		sigaction(sig[n], &sa, &was[n]);
	/* The client's handlers came last: the next vCPU puts softkvm's before them. */
	start(&g, 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	for (unsigned n = 0; n < 3; n++) {
		got = 0;
		if (!sigsetjmp(out, 1)) {
			if (n == 0)
				*(volatile uint8_t *)p = 1;
			else if (n == 1)
				__asm__ volatile("ud2");
			else
				__asm__ volatile("xor %%ecx, %%ecx; div %%ecx" ::: "eax", "ecx", "edx");
		}
		assert_int_equal(got, sig[n]);
	}
	/* Sent, not raised; and memory of a slot outside KVM_RUN is the client's too. */
	got = 0;
	if (!sigsetjmp(out, 1))
		raise(SIGSEGV);
	assert_int_equal(got, SIGSEGV);
	page(&g, PAGE_GPA, PROT_NONE);
	got = 0;
	if (!sigsetjmp(out, 1))
		*(volatile uint8_t *)(g.mem + PAGE_GPA) = 1;
	assert_int_equal(got, SIGSEGV);
	/* Blocked by the client: it would end the process. */
	sigemptyset(&mask);
	sigaddset(&mask, SIGSEGV);
	pthread_sigmask(SIG_BLOCK, &mask, NULL);
	assert_int_equal(guest_run(&g, 0), -EFAULT);
	pthread_sigmask(SIG_BLOCK, NULL, &mask);
	assert_true(sigismember(&mask, SIGSEGV));
	sigdelset(&mask, SIGSEGV);
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	guest_destroy(&g);
	munmap(p, 4096);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(interpreted), cmocka_unit_test(translated), cmocka_unit_test(translated_at_once),
		cmocka_unit_test(tables_and_code), cmocka_unit_test(read_only),
		cmocka_unit_test(client_signals),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
