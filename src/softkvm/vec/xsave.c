/*
 * FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS, LDMXCSR, STMXCSR (SDM vol. 1 ch. 10, 13).
 *
 * Only components in XCR0 exist (IA32_XSS is always 0 here), so the supervisor forms differ from the
 * user forms in privilege and in demanding the compacted format. The modified optimisation is not
 * used. Outside 64-bit mode registers 8..15 are neither saved nor touched.
 */
#include "softkvm/vec/vec.h"

#define XCOMP_COMPACT BIT(63)
#define MXCSR_INIT 0x1f80
#define X87_INIT_FCW 0x37f

enum { XS_WIDE = 1 };   /* aux: REX.W form */

static unsigned nregs(const struct cpu *c)
{
	return c->code_bits == 64 ? 16 : 8;
}

/* -- FXSAVE, FXRSTOR --------------------------------------------------------------------------- */
static uint64_t fx_begin(struct cpu *c, const struct insn *i, enum access acc)
{
	uint64_t lin;

	if (c->cr0 & (CR0_EM | CR0_TS))
		cpu_raise(c, EXC_NM);
	lin = insn_lin(c, i, 512, acc);
	if (lin & 15)
		cpu_gp(c, 0);
	return lin;
}

/* AMD's fast form: at CPL 0 in 64-bit mode the XMM registers stay out of it. */
static bool fx_with_xmm(const struct cpu *c)
{
	return (c->cr4 & CR4_OSFXSR) && !((c->efer & EFER_FFXSR) && c->cpl == 0 && c->code_bits == 64);
}

static void op_fxsave(struct cpu *c, const struct insn *i)
{
	uint64_t lin = fx_begin(c, i, ACC_WRITE);
	uint8_t buf[416];
	unsigned len = 160;

	fx_put_x87(c, buf, i->aux & XS_WIDE);
	st_le32(buf + FX_MXCSR, c->fpu.mxcsr);
	st_le32(buf + FX_MASK, ld_le32(c->fpu.fx + FX_MASK));
	if (fx_with_xmm(c)) {
		for (unsigned r = 0; r < nregs(c); r++)
			memcpy(buf + 160 + 16 * r, c->fpu.zmm[r], 16);
		len += 16 * nregs(c);
	}
	mem_write(c, lin, buf, len);
}

static void op_fxrstor(struct cpu *c, const struct insn *i)
{
	uint64_t lin = fx_begin(c, i, ACC_READ);
	uint8_t buf[512];
	uint32_t mxcsr;

	mem_read(c, lin, buf, 512);
	mxcsr = ld_le32(buf + FX_MXCSR);
	if (c->cr4 & CR4_OSFXSR) {
		if (mxcsr & ~ld_le32(c->fpu.fx + FX_MASK))
			cpu_gp(c, 0);
		c->fpu.mxcsr = mxcsr;
	}
	fx_get_x87(c, buf, i->aux & XS_WIDE);
	if (fx_with_xmm(c))
		for (unsigned r = 0; r < nregs(c); r++)
			memcpy(c->fpu.zmm[r], buf + 160 + 16 * r, 16);
}

/* -- XSAVE family ------------------------------------------------------------------------------ */
static void xs_check(struct cpu *c)
{
	if (!(c->cr4 & CR4_OSXSAVE))
		cpu_ud(c);
	if (c->cr0 & CR0_TS)
		cpu_raise(c, EXC_NM);
}

static uint64_t xs_begin(struct cpu *c, const struct insn *i, enum access acc)
{
	uint64_t lin;

	lin = insn_lin(c, i, 576, acc);
	if (lin & 63)
		cpu_gp(c, 0);
	return lin;
}

static uint64_t xs_rfbm(const struct cpu *c)
{
	return c->xcr0 & ((uint32_t)c->gpr[R_RAX] | c->gpr[R_RDX] << 32);
}

/* A run of bytes to guest memory, in place where the whole run is plain RAM. */
static void xs_put(struct cpu *c, uint64_t lin, const void *p, unsigned len)
{
	void *h = tlb_hit_w(c, lin, len);

	if (likely(h))
		ram_copy(h, p, len);
	else
		mem_write(c, lin, p, len);
}

static void xs_get(struct cpu *c, uint64_t lin, void *p, unsigned len)
{
	const void *h = tlb_hit_r(c, lin, len);

	if (likely(h))
		ram_copy(p, h, len);
	else
		mem_read(c, lin, p, len);
}

/* Bytes of a component that the current mode saves: half of the register files outside 64-bit mode. */
static unsigned comp_bytes(const struct cpu *c, unsigned n, uint32_t size)
{
	if (c->code_bits == 64)
		return size;
	return n == 2 || n == 6 ? size / 2 : n == 7 ? 0 : size;
}

static void save_legacy(struct cpu *c, const struct insn *i, uint64_t lin, uint64_t what, bool mxcsr)
{
	uint8_t buf[416];

	if (what & XCR0_X87) {
		fx_put_x87(c, buf, i->aux & XS_WIDE);
		xs_put(c, lin, buf, 24);
		xs_put(c, lin + FX_ST, buf + FX_ST, 128);
	}
	if (mxcsr) {
		st_le32(buf, c->fpu.mxcsr);
		st_le32(buf + 4, ld_le32(c->fpu.fx + FX_MASK));
		xs_put(c, lin + FX_MXCSR, buf, 8);
	}
	if (what & XCR0_SSE) {
		for (unsigned r = 0; r < nregs(c); r++)
			memcpy(buf + 16 * r, c->fpu.zmm[r], 16);
		xs_put(c, lin + 160, buf, 16 * nregs(c));
	}
}

static void save_extended(struct cpu *c, uint64_t lin, uint64_t what, uint64_t layout, bool compact)
{
	uint32_t at = 576, off, size;
	uint8_t buf[1024];

	for (unsigned n = 2; n < 10; n++) {
		if (!(layout >> n & 1) || !xsave_component(n, &off, &size) || size > sizeof buf)
			continue;
		if (compact) {
			off = at;
			at += size;
		}
		if (!(what >> n & 1) || !comp_bytes(c, n, size))
			continue;
		memset(buf, 0, size);
		fpu_put_component(c, n, buf);
		xs_put(c, lin + off, buf, comp_bytes(c, n, size));
	}
}

static void save_standard(struct cpu *c, const struct insn *i, bool init_opt)
{
	uint64_t lin, rfbm, bv, inuse;
	uint8_t h[8];

	xs_check(c);
	lin = xs_begin(c, i, ACC_WRITE);
	rfbm = xs_rfbm(c);
	inuse = fpu_xinuse(c) & rfbm;
	xs_get(c, lin + 512, h, 8);
	bv = (ld_le64(h) & ~rfbm) | inuse;
	st_le64(h, bv);
	xs_put(c, lin + 512, h, 8);
	save_legacy(c, i, lin, init_opt ? inuse : rfbm, rfbm & (XCR0_SSE | XCR0_AVX));
	save_extended(c, lin, init_opt ? inuse : rfbm, rfbm, false);
}

static void op_xsave(struct cpu *c, const struct insn *i)
{
	save_standard(c, i, false);
}

static void op_xsaveopt(struct cpu *c, const struct insn *i)
{
	save_standard(c, i, true);
}

static void save_compact(struct cpu *c, const struct insn *i)
{
	uint64_t lin = xs_begin(c, i, ACC_WRITE), rfbm = xs_rfbm(c), bv = fpu_xinuse(c) & rfbm;
	uint8_t h[16];

	if ((rfbm & XCR0_SSE) && c->fpu.mxcsr != MXCSR_INIT)
		bv |= XCR0_SSE;
	st_le64(h, bv);
	st_le64(h + 8, rfbm | XCOMP_COMPACT);
	xs_put(c, lin + 512, h, 16);
	save_legacy(c, i, lin, bv, bv & XCR0_SSE);
	save_extended(c, lin, bv, rfbm, true);
}

static void op_xsavec(struct cpu *c, const struct insn *i)
{
	xs_check(c);
	save_compact(c, i);
}

static void op_xsaves(struct cpu *c, const struct insn *i)
{
	if (!(c->cr4 & CR4_OSXSAVE))
		cpu_ud(c);
	if (c->cpl)
		cpu_gp(c, 0);
	xs_check(c);
	save_compact(c, i);
}

/* -- XRSTOR ------------------------------------------------------------------------------------ */
struct restore {
	uint64_t bv, comp, rfbm;
	bool compact;
	uint32_t need;          /* bytes of the area to look at */
	uint8_t area[4096];
};

static void header_check(struct cpu *c, const struct restore *r, const uint8_t h[64], bool supervisor)
{
	uint64_t rest = 0;

	for (unsigned n = 16; n < 64; n += 8)
		if (n == 16 || r->compact)
			rest |= ld_le64(h + n);
	if (rest)
		cpu_gp(c, 0);
	if (!r->compact) {
		if (supervisor || r->comp || (r->bv & ~c->xcr0))
			cpu_gp(c, 0);
		return;
	}
	if ((r->comp & ~XCOMP_COMPACT & ~c->xcr0) || (r->bv & ~r->comp) || (r->bv >> 63))
		cpu_gp(c, 0);
}

/* Where component n lies; false: the area has none. */
static bool restore_at(const struct restore *r, unsigned n, uint32_t *off, uint32_t *size)
{
	uint32_t at = 576;

	if (!xsave_component(n, off, size))
		return false;
	if (!r->compact)
		return true;
	for (unsigned m = 2; m < n; m++) {
		uint32_t o, s;

		if ((r->comp >> m & 1) && xsave_component(m, &o, &s))
			at += s;
	}
	*off = at;
	return r->comp >> n & 1;
}

static void restore_read(struct cpu *c, struct restore *r, uint64_t lin)
{
	uint32_t off, size;

	xs_get(c, lin, r->area, 416);
	for (unsigned n = 2; n < 10; n++)
		if ((r->rfbm & r->bv) >> n & 1 && restore_at(r, n, &off, &size) && !range_bad(off, size, sizeof r->area) &&
		    comp_bytes(c, n, size))
			xs_get(c, lin + off, r->area + off, comp_bytes(c, n, size));
}

static void restore_legacy(struct cpu *c, const struct insn *i, const struct restore *r)
{
	if (r->rfbm & XCR0_X87) {
		uint8_t init[160] = { X87_INIT_FCW & 0xff, X87_INIT_FCW >> 8 };

		fx_get_x87(c, r->bv & XCR0_X87 ? r->area : init, i->aux & XS_WIDE);
	}
	if (!(r->rfbm & XCR0_SSE))
		return;
	for (unsigned n = 0; n < nregs(c); n++) {
		if (r->bv & XCR0_SSE)
			memcpy(c->fpu.zmm[n], r->area + 160 + 16 * n, 16);
		else
			memset(c->fpu.zmm[n], 0, 16);
	}
}

static void restore_extended(struct cpu *c, const struct restore *r)
{
	uint32_t off, size, old_pkru = c->pkru;
	uint8_t buf[1024];

	for (unsigned n = 2; n < 10; n++) {
		if (!(r->rfbm >> n & 1) || !xsave_component(n, &off, &size) || size > sizeof buf)
			continue;
		fpu_put_component(c, n, buf);           /* what this mode does not reach stays */
		memset(buf, 0, comp_bytes(c, n, size));
		if (r->bv >> n & 1 && restore_at(r, n, &off, &size) && !range_bad(off, size, sizeof r->area))
			memcpy(buf, r->area + off, comp_bytes(c, n, size));
		fpu_get_component(c, n, buf);
	}
	if (c->pkru != old_pkru && (c->cr4 & CR4_PKE))
		mmu_flush_all(c);
}

static void restore(struct cpu *c, const struct insn *i, bool supervisor)
{
	struct restore r;
	uint64_t lin = xs_begin(c, i, ACC_READ);
	uint32_t mxcsr;
	uint8_t h[64];

	xs_get(c, lin + 512, h, 64);
	r.bv = ld_le64(h);
	r.comp = ld_le64(h + 8);
	r.compact = r.comp >> 63;
	r.rfbm = xs_rfbm(c);
	header_check(c, &r, h, supervisor);
	restore_read(c, &r, lin);

	mxcsr = ld_le32(r.area + FX_MXCSR);
	if (r.compact && (r.rfbm & XCR0_SSE) && !(r.bv & XCR0_SSE))
		mxcsr = MXCSR_INIT;
	if (r.rfbm & (r.compact ? XCR0_SSE : XCR0_SSE | XCR0_AVX)) {
		if (mxcsr & ~ld_le32(c->fpu.fx + FX_MASK))
			cpu_gp(c, 0);
		c->fpu.mxcsr = mxcsr;
	}
	restore_legacy(c, i, &r);
	restore_extended(c, &r);
}

static void op_xrstor(struct cpu *c, const struct insn *i)
{
	xs_check(c);
	restore(c, i, false);
}

static void op_xrstors(struct cpu *c, const struct insn *i)
{
	if (!(c->cr4 & CR4_OSXSAVE))
		cpu_ud(c);
	if (c->cpl)
		cpu_gp(c, 0);
	xs_check(c);
	restore(c, i, true);
}

/* -- MXCSR ------------------------------------------------------------------------------------- */
static void do_ldmxcsr(struct cpu *c, const struct insn *i)
{
	uint32_t v = mem_ld32(c, insn_lin(c, i, 4, ACC_READ));

	if (v & ~ld_le32(c->fpu.fx + FX_MASK))
		cpu_gp(c, 0);
	c->fpu.mxcsr = v;
}

static void op_ldmxcsr(struct cpu *c, const struct insn *i)
{
	vec_check_sse(c);
	do_ldmxcsr(c, i);
}

static void op_stmxcsr(struct cpu *c, const struct insn *i)
{
	vec_check_sse(c);
	mem_st32(c, insn_lin(c, i, 4, ACC_WRITE), c->fpu.mxcsr);
}

static void op_vldmxcsr(struct cpu *c, const struct insn *i)
{
	vec_check_vex(c);
	do_ldmxcsr(c, i);
}

static void op_vstmxcsr(struct cpu *c, const struct insn *i)
{
	vec_check_vex(c);
	mem_st32(c, insn_lin(c, i, 4, ACC_WRITE), c->fpu.mxcsr);
}

static insn_fn *xsave_handler(ZydisMnemonic m, bool *wide)
{
	*wide = false;
	switch (m) {
	case ZYDIS_MNEMONIC_LDMXCSR: return op_ldmxcsr;
	case ZYDIS_MNEMONIC_STMXCSR: return op_stmxcsr;
	case ZYDIS_MNEMONIC_VLDMXCSR: return op_vldmxcsr;
	case ZYDIS_MNEMONIC_VSTMXCSR: return op_vstmxcsr;
	case ZYDIS_MNEMONIC_FXSAVE: return op_fxsave;
	case ZYDIS_MNEMONIC_FXRSTOR: return op_fxrstor;
	case ZYDIS_MNEMONIC_XSAVE: return op_xsave;
	case ZYDIS_MNEMONIC_XSAVEOPT: return op_xsaveopt;
	case ZYDIS_MNEMONIC_XSAVEC: return op_xsavec;
	case ZYDIS_MNEMONIC_XSAVES: return op_xsaves;
	case ZYDIS_MNEMONIC_XRSTOR: return op_xrstor;
	case ZYDIS_MNEMONIC_XRSTORS: return op_xrstors;
	default: break;
	}
	*wide = true;
	switch (m) {
	case ZYDIS_MNEMONIC_FXSAVE64: return op_fxsave;
	case ZYDIS_MNEMONIC_FXRSTOR64: return op_fxrstor;
	case ZYDIS_MNEMONIC_XSAVE64: return op_xsave;
	case ZYDIS_MNEMONIC_XSAVEOPT64: return op_xsaveopt;
	case ZYDIS_MNEMONIC_XSAVEC64: return op_xsavec;
	case ZYDIS_MNEMONIC_XSAVES64: return op_xsaves;
	case ZYDIS_MNEMONIC_XRSTOR64: return op_xrstor;
	case ZYDIS_MNEMONIC_XRSTORS64: return op_xrstors;
	default: return NULL;
	}
}

bool xsave_decode(struct insn *i, const struct decoded *d)
{
	bool wide;
	insn_fn *fn = xsave_handler(d->z.mnemonic, &wide);

	if (!fn || d->op[0].type != ZYDIS_OPERAND_TYPE_MEMORY)
		return false;
	insn_set_mem(i, d, &d->op[0]);
	i->fn = fn;
	i->aux = wide ? XS_WIDE : 0;
	return true;
}
