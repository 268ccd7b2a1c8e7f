/* The host side: a piece of code loads the whole state, executes the instruction and stores the state. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

struct native {
	struct state s;
	uint64_t host_rsp;
	uint32_t host_mxcsr;
};

uint8_t *sandbox;
static struct native *nat;
static uint8_t *code, *emit_at, *after;
static volatile sig_atomic_t in_native, trap;

bool native_avx512(void) { return host_avx512(); }

static void b(const char *bytes, size_t n) { memcpy(emit_at, bytes, n); emit_at += n; }
#define B(s) b(s, sizeof(s) - 1)

static uint32_t abs32(const void *p) { return (uint32_t)(uintptr_t)p; }

/* modrm and sib of [abs32] */
static void at(unsigned reg, const void *p)
{
	uint32_t a = abs32(p);

	*emit_at++ = (uint8_t)((reg & 7) << 3 | 4);
	*emit_at++ = 0x25;
	memcpy(emit_at, &a, 4);
	emit_at += 4;
}

static void gpr(unsigned r, bool store)
{
	*emit_at++ = 0x48 | (r & 8 ? 4 : 0);
	*emit_at++ = store ? 0x89 : 0x8b;
	at(r, &nat->s.gpr[r]);
}

static void vec(unsigned r, bool store)
{
	if (host_avx512()) {
		const uint8_t p[] = { 0x62, (uint8_t)((r & 8 ? 0 : 0x80) | 0x60 | (r & 16 ? 0 : 0x10) | 1), 0x7c, 0x48 };

		memcpy(emit_at, p, 4);
		emit_at += 4;
	} else {
		*emit_at++ = 0xc5;
		*emit_at++ = (r & 8 ? 0 : 0x80) | 0x7c;
	}
	*emit_at++ = 0x10 + store;
	at(r, nat->s.zmm[r]);
}

static void vectors(bool store)
{
	if (!host_avx())
		return;
	for (unsigned r = 0; r < (host_avx512() ? 32 : 16); r++)
		vec(r, store);
	for (unsigned r = 0; host_avx512() && r < 8; r++) {
		B("\xc4\xe1\xf8");
		*emit_at++ = 0x90 + store;
		at(r, &nat->s.k[r]);
	}
}

static void build(const struct test_case *t)
{
	emit_at = code;
	B("\x53\x55\x41\x54\x41\x55\x41\x56\x41\x57");          /* push callee-saved */
	B("\x48\x89"); at(4, &nat->host_rsp);
	B("\x0f\xae"); at(3, &nat->host_mxcsr);                 /* stmxcsr */
	B("\x48\x0f\xae"); at(1, nat->s.fx);                    /* fxrstor64 */
	vectors(false);
	B("\xff"); at(6, &nat->s.flags);                        /* push flags; popfq */
	B("\x9d");
	for (unsigned r = 0; r < 16; r++)
		gpr(r, false);
	b((const char *)t->bytes, t->len);
	after = emit_at;
	for (unsigned r = 0; r < 16; r++)
		gpr(r, true);
	B("\x48\x8b"); at(4, &nat->host_rsp);
	B("\x9c\x8f"); at(0, &nat->s.flags);                    /* pushfq; pop flags */
	B("\xfc");
	vectors(true);
	B("\x48\x0f\xae"); at(0, nat->s.fx);                    /* fxsave64 */
	B("\xdb\xe2\xdb\xe3\x0f\xae"); at(2, &nat->host_mxcsr); /* fnclex fninit ldmxcsr */
	if (host_avx())
		B("\xc5\xf8\x77");
	B("\x41\x5f\x41\x5e\x41\x5d\x41\x5c\x5d\x5b\xc3");
}

static void on_signal(int sig, siginfo_t *si, void *uctx)
{
	ucontext_t *u = uctx;

	if (!in_native) {
		signal(sig, SIG_DFL);
		return;
	}
	trap = (int)u->uc_mcontext.gregs[REG_TRAPNO];
	u->uc_mcontext.gregs[REG_RIP] = (greg_t)(uintptr_t)after;
	u->uc_mcontext.gregs[REG_EFL] &= ~0x100;
}

static void *low(size_t len, int prot)
{
	void *p = mmap(NULL, len, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

int native_init(void)
{
	static uint8_t stack[65536];
	stack_t ss = { .ss_sp = stack, .ss_size = sizeof stack };
	struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
	const int sigs[] = { SIGSEGV, SIGILL, SIGFPE, SIGBUS, SIGTRAP };
	uint8_t *p = low(SANDBOX + 2 * 65536, PROT_NONE);

	nat = low(sizeof *nat, PROT_READ | PROT_WRITE);
	code = low(8192, PROT_READ | PROT_WRITE | PROT_EXEC);
	if (!nat || !code || !p || mprotect(p + 65536, SANDBOX, PROT_READ | PROT_WRITE))
		return -1;
	sandbox = p + 65536;
	sigaltstack(&ss, NULL);
	for (unsigned n = 0; n < ARRAY_SIZE(sigs); n++)
		sigaction(sigs[n], &sa, NULL);
	return 0;
}

void native_run(const struct test_case *t, const struct state *in, struct state *out)
{
	nat->s = *in;
	memcpy(nat->s.fx + 24, &in->mxcsr, 4);
	for (unsigned r = 0; r < 16; r++)
		memcpy(nat->s.fx + 160 + 16 * r, in->zmm[r], 16);
	memcpy(sandbox, in->mem, SANDBOX);
	build(t);
	trap = -1;
	in_native = 1;
	((void (*)(void))(void *)code)();
	in_native = 0;
	*out = nat->s;
	memcpy(&out->mxcsr, out->fx + 24, 4);
	if (!host_avx())
		for (unsigned r = 0; r < 16; r++)
			memcpy(out->zmm[r], out->fx + 160 + 16 * r, 16);
	memcpy(out->mem, sandbox, SANDBOX);
	out->trap = trap;
}
