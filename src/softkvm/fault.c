/* See fault.h. Nothing here locks, allocates or logs: it runs in a signal handler, in the middle of anything. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "softkvm/cpu.h"
#include "softkvm/fault.h"
#include "softkvm/ram.h"
#include "softkvm/vm.h"

#define RED_ZONE 128
#define EFLAGS_DF 0x400
#define EFLAGS_AC 0x40000

/* Dispositions belong to the process, so this is the process's state and no VM's. */
static const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE };
static struct sigaction old[ARRAY_SIZE(signals)];
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static fault_fn *_Atomic parts[FAULT_PARTS];
static __thread struct cpu *running;

/* -- copying ------------------------------------------------------------------------------------ */
/* Between fault_copy_at and fault_copy_bad the handler leads a fault to the latter. One store where the guest may want one. */
extern const char fault_copy_at[], fault_copy_bad[];
__asm__(".pushsection .text\n"
	".globl fault_copy_bytes\n.hidden fault_copy_bytes\n.type fault_copy_bytes, @function\n"
	".globl fault_copy_at\n.hidden fault_copy_at\n.globl fault_copy_bad\n.hidden fault_copy_bad\n"
	"fault_copy_bytes:\n"
	"	mov %rdx, %rcx\n"
	"	xor %eax, %eax\n"
	"fault_copy_at:\n"
	"	cmp $4, %rdx\n"
	"	je 4f\n"
	"	cmp $8, %rdx\n"
	"	je 8f\n"
	"	rep movsb\n"
	"	ret\n"
	"4:	mov (%rsi), %ecx\n"
	"	mov %ecx, (%rdi)\n"
	"	ret\n"
	"8:	mov (%rsi), %rcx\n"
	"	mov %rcx, (%rdi)\n"
	"	ret\n"
	"fault_copy_bad:\n"
	"	mov $1, %eax\n"
	"	ret\n"
	".size fault_copy_bytes, . - fault_copy_bytes\n"
	".popsection\n");

int fault_copy(void *to, const void *from, size_t len)
{
	return fault_copy_bytes(to, from, len) ? -EFAULT : 0;
}

/* -- comparing ---------------------------------------------------------------------------------- */
static __thread jmp_buf *volatile escape;       /* of the comparison under way */

static void escaped(struct cpu *c) { longjmp(*escape, 1); }

bool fault_same(const void *ram, const void *own, size_t len)
{
	jmp_buf here;
	bool same = false;

	if (!_setjmp(here)) {
		escape = &here;
		atomic_signal_fence(memory_order_seq_cst);
		same = ram_same(ram, own, len);
		atomic_signal_fence(memory_order_seq_cst);
	}
	escape = NULL;
	return same;
}

/* -- serving ------------------------------------------------------------------------------------ */
void fault_enter(struct cpu *c)
{
	running = c;
}

void fault_client(struct cpu *c)
{
	c->client_fault = true;
	c->mmio.replay = 0;
	cpu_unwind(c, UNWIND_EXIT);
}

/* A vCPU in the middle of an access holds the table: it is replaced with the world stopped. */
static bool in_slots(const struct vm *vm, uint64_t addr)
{
	const struct slot_table *t = vm ? atomic_load_explicit(&vm->slots, memory_order_acquire) : NULL;

	for (unsigned i = 0; t && i < t->n; i++)
		if (addr - (uintptr_t)t->s[i]->host < t->s[i]->size)
			return true;
	return false;
}

/* Go on in fn(c), as if it had been called where the fault was met. */
static void call_instead(ucontext_t *u, void (*fn)(struct cpu *), struct cpu *c)
{
	greg_t *r = u->uc_mcontext.gregs;

	r[REG_RSP] = ((r[REG_RSP] - RED_ZONE) & ~63ll) - 8;
	r[REG_RDI] = (greg_t)(uintptr_t)c;
	r[REG_RIP] = (greg_t)(uintptr_t)fn;
	r[REG_EFL] &= ~(greg_t)(EFLAGS_DF | EFLAGS_AC);
}

static bool is_memory(int sig) { return sig == SIGSEGV || sig == SIGBUS; }

/* The hardware lost the page: the client's affair, as it is under KVM. */
static bool broken_memory(int sig, const siginfo_t *si)
{
	return sig == SIGBUS && (si->si_code == BUS_MCEERR_AR || si->si_code == BUS_MCEERR_AO);
}

static bool serve(int sig, const siginfo_t *si, ucontext_t *u)
{
	struct cpu *c = running;
	struct fault f = { .sig = sig, .pc = (uint64_t)u->uc_mcontext.gregs[REG_RIP], .uc = u };

	if (si->si_code <= 0)           /* somebody sent it */
		return false;
	if (is_memory(sig) && f.pc - (uintptr_t)fault_copy_at < (uintptr_t)(fault_copy_bad - fault_copy_at)) {
		u->uc_mcontext.gregs[REG_RIP] = (greg_t)(uintptr_t)fault_copy_bad;
		return true;
	}
	if (is_memory(sig) && escape) {
		call_instead(u, escaped, NULL);
		return true;
	}
	if (!c)
		return false;
	f.client = is_memory(sig) && !broken_memory(sig, si) && in_slots(c->vm, (uintptr_t)si->si_addr);
	for (unsigned n = 0; n < FAULT_PARTS; n++) {
		fault_fn *fn = atomic_load_explicit(&parts[n], memory_order_acquire);

		if (fn && fn(c, &f))
			return true;
	}
	if (!f.client || !c->in_unwind_scope)
		return false;
	call_instead(u, fault_client, c);
	return true;
}

/* -- the client's handlers ------------------------------------------------------------------------ */
static void on_signal(int sig, siginfo_t *si, void *uctx);

/* What ends a process that does not handle the signal: the default action, by the instruction trapping again or by sending it again. */
static void die(int sig, const siginfo_t *si)
{
	struct sigaction dfl = { .sa_handler = SIG_DFL };

	sigaction(sig, &dfl, NULL);
	if (si->si_code <= 0)
		raise(sig);
}

static void pass_on(const struct sigaction *a, int sig, siginfo_t *si, void *uctx)
{
	sigset_t before, mask = a->sa_mask;

	if (!(a->sa_flags & SA_SIGINFO) && a->sa_handler == SIG_IGN && si->si_code <= 0)
		return;
	if (!(a->sa_flags & SA_SIGINFO) && (a->sa_handler == SIG_DFL || a->sa_handler == SIG_IGN)) {
		die(sig, si);
		return;
	}
	if (!(a->sa_flags & SA_NODEFER))
		sigaddset(&mask, sig);
	pthread_sigmask(SIG_BLOCK, &mask, &before);
	if (a->sa_flags & SA_SIGINFO)
		a->sa_sigaction(sig, si, uctx);
	else
		a->sa_handler(sig);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void on_signal(int sig, siginfo_t *si, void *uctx)
{
	int saved = errno;

	if (!serve(sig, si, uctx))
		for (unsigned n = 0; n < ARRAY_SIZE(signals); n++)
			if (signals[n] == sig)
				pass_on(&old[n], sig, si, uctx);
	errno = saved;
}

void fault_install(void)
{
	struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER }, now;

	sigemptyset(&sa.sa_mask);
	pthread_mutex_lock(&install_lock);
	for (unsigned n = 0; n < ARRAY_SIZE(signals); n++) {
		if (sigaction(signals[n], NULL, &now) || ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_signal))
			continue;
		old[n] = now;
		sigaction(signals[n], &sa, NULL);
	}
	pthread_mutex_unlock(&install_lock);
}

void fault_serve(enum fault_part part, fault_fn *fn)
{
	atomic_store_explicit(&parts[part], fn, memory_order_release);
	fault_install();
}
