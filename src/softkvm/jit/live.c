/*
 * Vector and x87 state in the host's registers. While `vec_ok` of struct jit_low is not 0, the host's vector registers
 * and MXCSR (JV_VECTORS) or x87 registers (JV_X87) hold the guest's: for as long as translated code runs, across blocks
 * and links. Whatever leaves translated code (a handler's call, the way out) puts them into struct fpu first; the
 * next instruction that wants them brings them back by the `live` thunk.
 *
 * A bit is set only when instructions of its class may run without a check: enabled by CR0, CR4 and XCR0, and, for those
 * that can raise floating point exceptions, with all of these masked. So nothing here can trap on the host.
 */
#include "softkvm/jit/internal.h"
#include "softkvm/vec/vec.h"

#define HOST_MXCSR 0x1f80u

/* -- emission ------------------------------------------------------------------------------------ */
static void move_zmm(struct em *e, struct cpu *c, unsigned n, bool store)
{
	e8(e, 0x62);
	e8(e, (n & 8 ? 0 : 0x80) | 0x60 | (n & 16 ? 0 : 0x10) | 1);
	EM(e, 0x7c, 0x48);
	e8(e, 0x10 + store);
	em_abs(e, n, c->fpu.zmm[n]);
}

static void move_ymm(struct em *e, struct cpu *c, unsigned n, bool store)
{
	e8(e, 0xc5);
	e8(e, (n & 8 ? 0 : 0x80) | 0x7c);
	e8(e, 0x10 + store);
	em_abs(e, n, c->fpu.zmm[n]);
}

static void move_xmm(struct em *e, struct cpu *c, unsigned n, bool store)
{
	if (n & 8)
		e8(e, 0x44);
	e8(e, 0x0f);
	e8(e, 0x10 + store);
	em_abs(e, n, c->fpu.zmm[n]);
}

/* kmovq k, [k] or back. */
static void move_k(struct em *e, struct cpu *c, unsigned n, bool store)
{
	EM(e, 0xc4, 0xe1, 0xf8);
	e8(e, 0x90 + store);
	em_abs(e, n, &c->fpu.k[n]);
}

static void move_all_evex(struct em *e, struct cpu *c, bool store)
{
	for (unsigned n = 0; n < 32; n++)
		move_zmm(e, c, n, store);
	for (unsigned n = 0; n < 8; n++)
		move_k(e, c, n, store);
}

static void mxcsr(struct em *e, unsigned op, const void *p)
{
	EM(e, 0x0f, 0xae);
	em_abs(e, op, p);
}

static uint8_t *unless(struct em *e, const void *p, unsigned mask)
{
	e8(e, 0xf6);                                    /* test byte [p], mask ; jz */
	em_abs(e, 0, p);
	e8(e, mask);
	return em_jcc(e, 4);
}

/* Vector registers that are the guest's to struct fpu. Keeps general-purpose registers. */
void live_emit_save(struct em *e, struct jit *j)
{
	uint8_t *none = unless(e, &j->low->vec_ok, JV_VECTORS), *full = NULL, *done = NULL;

	if (host_avx512()) {
		full = unless(e, &j->low->vec_ok, JV_EVEX);
		move_all_evex(e, j->c, true);
		done = em_jmp(e);
		em_here(e, full);
	}
	for (unsigned n = 0; n < 16; n++)
		host_avx() ? move_ymm(e, j->c, n, true) : move_xmm(e, j->c, n, true);
	if (done)
		em_here(e, done);
	if (host_avx())
		EM(e, 0xc5, 0xf8, 0x77);                /* vzeroupper */
	mxcsr(e, 3, &j->c->fpu.mxcsr);                  /* stmxcsr */
	mxcsr(e, 2, &j->low->host_mxcsr);               /* ldmxcsr */
	em_here(e, none);
}

/* The other way, for what jit_live() decided. */
void live_emit_load(struct em *e, struct jit *j)
{
	uint8_t *none = unless(e, &j->low->vec_ok, JV_VECTORS), *done[2] = { NULL, NULL };

	mxcsr(e, 2, &j->c->fpu.mxcsr);
	if (host_avx512()) {
		uint8_t *other = unless(e, &j->low->vec_ok, JV_EVEX);

		move_all_evex(e, j->c, false);
		done[0] = em_jmp(e);
		em_here(e, other);
	}
	if (host_avx()) {
		uint8_t *wide = unless(e, &j->low->narrow, 1);

		for (unsigned n = 0; n < 16; n++)
			move_xmm(e, j->c, n, false);
		done[1] = em_jmp(e);
		em_here(e, wide);
	}
	for (unsigned n = 0; n < 16; n++)
		host_avx() ? move_ymm(e, j->c, n, false) : move_xmm(e, j->c, n, false);
	for (unsigned n = 0; n < 2; n++)
		if (done[n])
			em_here(e, done[n]);
	em_here(e, none);
}

/* -- x87 ----------------------------------------------------------------------------------------- */
/* Host state by XSAVE's component 0 alone: MXCSR and vector registers are not touched. Pointers stay what they were. */
static void x87_load(struct cpu *c, struct jit_low *l)
{
	memset(l->xs, 0, sizeof l->xs);
	memcpy(l->xs, c->fpu.fx, 6);
	memcpy(l->xs + FX_ST, c->fpu.fx + FX_ST, 128);
	l->xs[512] = 1;
	__asm__ volatile("xrstor64 %0" : : "m"(l->xs), "a"(1), "d"(0) : "memory");
}

static void x87_save(struct cpu *c, struct jit_low *l)
{
	l->xs[512] = 0;
	__asm__ volatile("xsave64 %0\n\tfninit" : "+m"(l->xs) : "a"(1), "d"(0) : "memory");
	if (!(l->xs[512] & 1)) {        /* initial: nothing was written */
		memset(l->xs, 0, FX_ST + 128);
		st_le16(l->xs + FX_FCW, 0x37f);
	}
	memcpy(c->fpu.fx, l->xs, 6);
	memcpy(c->fpu.fx + FX_ST, l->xs + FX_ST, 128);
}

/* -- decisions ----------------------------------------------------------------------------------- */
static unsigned vector_bits(const struct cpu *c)
{
	unsigned r = 0;

	if ((c->cr0 & (CR0_EM | CR0_TS)) || (c->fpu.mxcsr & ~c->jit->mxcsr_mask))
		return 0;
	if (c->cr4 & CR4_OSFXSR)
		r |= JV_SSE;
	if ((c->cr4 & CR4_OSXSAVE) && (c->xcr0 & 6) == 6 && host_avx()) {
		r |= JV_VEX;
		if ((c->xcr0 & 0xe6) == 0xe6 && host_avx512())
			r |= JV_EVEX;
	}
	if ((c->fpu.mxcsr & HOST_MXCSR) == HOST_MXCSR)
		r |= r << JV_FP_SHIFT;
	return r;
}

static unsigned x87_bit(const struct cpu *c)
{
	uint16_t cw = ld_le16(c->fpu.fx + FX_FCW), sw = ld_le16(c->fpu.fx + FX_FSW);

	return (c->cr0 & (CR0_EM | CR0_TS)) || (cw & 0x3f) != 0x3f || (sw & (FSW_ES | FSW_B)) || !host_avx() ? 0 : JV_X87;
}

static bool uppers_zero(const struct fpu *f)
{
	uint64_t any = 0;

	for (unsigned n = 0; n < 16; n++)
		any |= ld_le64(f->zmm[n] + 16) | ld_le64(f->zmm[n] + 24);
	return !any;
}

/* Nothing is the host's any more; vector registers have been put away by the thunk. */
void live_settle(struct cpu *c)
{
	struct jit_low *l = c->jit->low;

	if (l->vec_ok & JV_X87)
		x87_save(c, l);
	l->vec_ok = 0;
}

/*
 * Called with everything in struct fpu: brings back what `want` needs and `had`, as far as the guest may use it now.
 * The bits that hold; vector registers are loaded by the thunk behind the call.
 */
unsigned live_begin(struct cpu *c, unsigned want)
{
	struct jit_low *l = c->jit->low;
	unsigned bits = 0;

	if (want & JV_X87)
		bits |= x87_bit(c);
	if (want & JV_VECTORS)
		bits |= vector_bits(c);
	if (bits & JV_X87)
		x87_load(c, l);
	/* Where the upper halves are zero, Intel's SSE code runs faster with the CPU knowing it. */
	l->narrow = (bits & JV_VECTORS) && host_is_intel() && uppers_zero(&c->fpu);
	l->vec_ok = (uint8_t)bits;
	return bits;
}

/* The `live` thunk's: an instruction needs `want`. */
void jit_live(struct cpu *c, unsigned want)
{
	unsigned had = c->jit->low->vec_ok;

	live_settle(c);
	live_begin(c, want | had);
}
