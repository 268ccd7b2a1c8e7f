/*
 * The host side. A signal frame with the whole state (vector state, code and stack segment included) is handed to sigreturn; the
 * signal that the instruction or the INT3 behind it raises brings the state back. The frame's form is learnt from a first signal.
 */
#include <asm/ldt.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

#define KERNEL_UC 304           /* the kernel's struct ucontext, with a signal mask of 8 bytes */

uint8_t *sandbox;
static uint8_t *alias;
static struct { uint64_t pad[2]; ucontext_t uc; } frame __attribute__((aligned(64)));      /* the word before is popped into */
static uint8_t *fpstate;        /* what the frame points to; the template's reserved parts stay */
static uint64_t fp_features;
static bool has32, has16;

/* Known to the assembly below. */
extern uint64_t native_host_rsp, native_host_fs;
extern uint16_t native_seg[4];
extern ucontext_t *native_uc;
void native_enter(void *uc, uint64_t flags, const uint16_t *seg);
void native_probe(void);
void native_on_signal(int sig, siginfo_t *si, void *uc);
void native_restorer(void);
uint64_t native_host_rsp, native_host_fs;
uint16_t native_seg[4];
ucontext_t *native_uc;

/*
 * native_enter: DS, ES, FS, GS; then the flags that sigreturn does not set (ID, NT), which a system call keeps. The handler comes
 * with the test's segments and FS base, so it touches nothing of the C library's before it has put them back.
 */
#define PUSH_ALL "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n mov %rsp, native_host_rsp(%rip)\n"
__asm__(".text\n"
	"native_enter:" PUSH_ALL
	"mov %rdi, %rsp; push %rsi\n"
	"mov (%rdx), %ds; mov 2(%rdx), %es; mov 4(%rdx), %fs; mov 6(%rdx), %gs\n"
	"mov $15, %eax; popfq; syscall\n"
	"native_probe:" PUSH_ALL "int3\n"
	"native_on_signal:\n"
	"push $0x202; popfq\n"
	"mov %ds, native_seg(%rip); mov %es, native_seg+2(%rip); mov %fs, native_seg+4(%rip); mov %gs, native_seg+6(%rip)\n"
	"xor %eax, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %fs; mov %eax, %gs\n"
	"mov $158, %eax; mov $0x1002, %edi; mov native_host_fs(%rip), %rsi; syscall\n"          /* arch_prctl(ARCH_SET_FS) */
	"mov %rdx, native_uc(%rip); mov native_host_rsp(%rip), %rsp\n"
	"pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n"
	"native_restorer: mov $15, %eax; syscall\n");

/* The kernel's struct: past any sanitizer, whose own handler would need the thread's FS. */
struct ksigaction { void *handler; unsigned long flags; void *restorer; uint64_t mask; };
#define SA_RESTORER 0x04000000
static const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP };
static struct ksigaction before[ARRAY_SIZE(signals)];  /* the engine's, and whose it found */

static void signals_ours(void)
{
	struct ksigaction k = { native_on_signal, SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTORER, native_restorer, 0 };

	for (unsigned n = 0; n < ARRAY_SIZE(signals); n++)
		syscall(SYS_rt_sigaction, signals[n], &k, &before[n], 8);
}

static void signals_back(void)
{
	for (unsigned n = 0; n < ARRAY_SIZE(signals); n++)
		syscall(SYS_rt_sigaction, signals[n], &before[n], NULL, 8);
}

bool native_avx512(void) { return host_avx512(); }
uint8_t *native_alias(void) { return alias; }
bool native_has(unsigned bits) { return bits == 64 || (bits == 32 ? has32 : has16); }

static int map_arena(void)
{
	const int fixed = MAP_SHARED | MAP_FIXED;
	uint8_t *p = mmap(NULL, 2 * ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_32BIT, -1, 0);
	int fd = memfd_create("oracle", MFD_CLOEXEC);

	if (fd < 0 || p == MAP_FAILED || ftruncate(fd, ARENA))
		return -1;
	p = (uint8_t *)ALIGN_UP((uintptr_t)p, (uintptr_t)ARENA);
	alias = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (alias == MAP_FAILED ||
	    mmap(p + A_SANDBOX, SANDBOX, PROT_READ | PROT_WRITE, fixed, fd, A_SANDBOX) == MAP_FAILED ||
	    mmap(p + A_CONST, 4096, PROT_READ, fixed, fd, A_CONST) == MAP_FAILED ||
	    mmap(p + A_CODE, CODE_SIZE, PROT_READ | PROT_EXEC, fixed, fd, A_CODE) == MAP_FAILED)
		return -1;
	close(fd);
	sandbox = p + A_SANDBOX;
	/* What returns to something read from here must find nothing at all. */
	for (unsigned n = 0; n < 4096; n++)
		alias[A_CONST + n] = (uint8_t)(n * 37 + n / 256) | 0x80;
	return 0;
}

static int ldt_entry(unsigned sel, uint64_t base, uint32_t limit, bool code, bool b32)
{
	struct user_desc d = { .entry_number = sel >> 3, .base_addr = (unsigned)base, .limit = limit > 0xfffff ? limit >> 12 : limit,
		.seg_32bit = b32, .contents = code ? 2 : 0, .limit_in_pages = limit > 0xfffff, .useable = 1 };

	return (int)syscall(SYS_modify_ldt, 1, &d, sizeof d);
}

static int make_ldt(void)
{
	uint64_t a = arena();

	if (ldt_entry(SEL_FS, a + FS_BASE, 0xffffffff, false, true) || ldt_entry(SEL_GS, a + GS_BASE, GS_LIMIT, false, true))
		return -1;
	has16 = !ldt_entry(SEL_CS16, a + A_CODE, CODE_SIZE - 1, true, false) &&
		!ldt_entry(SEL_DATA16, a + DATA16_BASE, DATA16_LIMIT, false, false);
	return 0;
}

static int learn_frame(void)
{
	const uint8_t *fp;
	uint32_t size;

	signals_ours();
	native_probe();
	signals_back();
	memcpy(&frame.uc, native_uc, KERNEL_UC);
	fp = (const uint8_t *)native_uc->uc_mcontext.fpregs;
	memcpy(&size, fp + 464 + 4, 4);
	memcpy(&fp_features, fp + 464 + 8, 8);
	if (ld_le32(fp + 464) != 0x46505853)     /* FP_XSTATE_MAGIC1 */
		return -1;
	if (size < 576 || size > 32768 || posix_memalign((void **)&fpstate, 64, size))
		return -1;
	memcpy(fpstate, fp, size);
	frame.uc.uc_mcontext.fpregs = (void *)fpstate;
	return 0;
}

void arena_load(const struct test_case *t, const struct state *in)
{
	uint8_t *code = alias + A_CODE;

	memset(code, 0xcc, CODE_SIZE);
	if (t->at)
		code[t->at - 1] = 0x90;
	memcpy(code + t->at, t->bytes, MIN((unsigned)t->len, CODE_SIZE - t->at));
	memcpy(alias + A_SANDBOX, in->mem, SANDBOX);
}

static const int reg_of[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10,
				REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };

void native_run(const struct test_case *t, const struct state *in, struct state *out)
{
	mcontext_t *m = &frame.uc.uc_mcontext;

	arena_load(t, in);
	(void)*(volatile const uint8_t *)(sandbox + SANDBOX);   /* present, so that a fault tells of its rights */
	state_to_xsave(in, fpstate, fp_features);
	for (unsigned r = 0; r < 16; r++)
		m->gregs[reg_of[r]] = (greg_t)in->gpr[r];
	m->gregs[REG_RIP] = (greg_t)in->rip;
	m->gregs[REG_EFL] = (greg_t)in->flags;
	m->gregs[REG_CSGSFS] = in->cs | (greg_t)in->ss << 48;
	signals_ours();
	native_enter(&frame.uc, in->flags & ~(uint64_t)(FL_TF | FL_DF), in->seg);
	signals_back();
	m = &native_uc->uc_mcontext;
	for (unsigned r = 0; r < 16; r++)
		out->gpr[r] = (uint64_t)m->gregs[reg_of[r]];
	out->rip = (uint64_t)m->gregs[REG_RIP];
	out->flags = (uint64_t)m->gregs[REG_EFL];
	out->cs = (uint16_t)m->gregs[REG_CSGSFS];
	out->ss = (uint16_t)((uint64_t)m->gregs[REG_CSGSFS] >> 48);
	memcpy(out->seg, native_seg, sizeof out->seg);
	out->trap = (int)m->gregs[REG_TRAPNO];
	out->error = EXC_HAS_ERROR_MASK >> out->trap & 1 ? (uint32_t)m->gregs[REG_ERR] : 0;
	out->cr2 = out->trap == EXC_PF ? (uint64_t)m->gregs[REG_CR2] : 0;
	state_from_xsave(out, (const uint8_t *)m->fpregs);
	memcpy(out->mem, alias + A_SANDBOX, SANDBOX);
}

/* A kernel may have been built or started without 32-bit code, or without 16-bit segments. */
static bool can_run(uint16_t cs, uint16_t data, uint64_t rip)
{
	static struct state s, out;
	const struct test_case t = { .bytes = { 0x90 }, .len = 1 };

	s = (struct state){ .flags = FL_1 | FL_IF, .cs = cs, .ss = data, .seg = { data, data }, .rip = rip, .mxcsr = 0x1f80 };
	native_run(&t, &s, &out);
	return out.trap == EXC_BP && out.cs == cs && out.rip == rip + 2;
}

int native_init(void)
{
	static uint8_t stack[65536];
	stack_t ss = { .ss_sp = stack, .ss_size = sizeof stack };

	syscall(SYS_arch_prctl, 0x1003 /* ARCH_GET_FS */, &native_host_fs);
	sigaltstack(&ss, NULL);
	if (map_arena() || make_ldt()) {
		printf("no arena below 2 GiB, or no LDT: %s\n", strerror(errno));
		return -1;
	}
	if (learn_frame())
		return -1;
	has32 = can_run(SEL_CS32, SEL_DATA, arena() + A_CODE);
	has16 = has16 && can_run(SEL_CS16, SEL_DATA16, 0);
	return 0;
}
