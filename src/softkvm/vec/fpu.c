/* The register image: reset, and the structures of KVM_GET/SET_FPU and KVM_GET/SET_XSAVE. */
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>

#include "softkvm/vec/vec.h"

#define X87_INIT_FCW 0x37f
#define MXCSR_INIT 0x1f80

uint32_t mxcsr_mask(void)
{
	_Alignas(16) uint8_t area[512] = { 0 };
	uint32_t m;

	__asm__ volatile("fxsave %0" : "=m"(area));
	m = ld_le32(area + FX_MASK);
	return m ? m : 0xffbf;
}

void fpu_reset(struct fpu *f)
{
	memset(f, 0, sizeof *f);
	st_le16(f->fx + FX_FCW, X87_INIT_FCW);
	st_le32(f->fx + FX_MXCSR, MXCSR_INIT);
	st_le32(f->fx + FX_MASK, mxcsr_mask());
	f->mxcsr = MXCSR_INIT;
	f->xstate_bv = xsave_supported();
}

/* -- components ------------------------------------------------------------------------------- */
/* Facts of the host, asked for once: CPUID is a trap of microseconds under a hypervisor. */
struct components {
	uint64_t supported;
	uint32_t offset[64], size[64];
};
static struct components comps;
static pthread_once_t comps_once = PTHREAD_ONCE_INIT;

static uint64_t host_xcr0(void)
{
	uint32_t a, b, c, d, lo, hi;

	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
		return XCR0_X87 | XCR0_SSE;
	__asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
	return lo | (uint64_t)hi << 32;
}

#define XCR0_AVX512 (XCR0_OPMASK | XCR0_ZMM_HI256 | XCR0_HI16_ZMM)
static void comps_init(void)
{
	uint64_t host = host_xcr0(), x = host & (XCR0_X87 | XCR0_SSE | XCR0_AVX);
	uint32_t a, b, c, d, end = 576;

	if ((host & XCR0_AVX512) == XCR0_AVX512 && (x & XCR0_AVX))
		x |= XCR0_AVX512;
	comps.size[0] = 160;
	comps.offset[1] = 160;
	comps.size[1] = 256;
	for (unsigned n = 2; n < 10; n++) {
		if (!((x | (host & XCR0_PKRU)) >> n & 1) || !__get_cpuid_count(0xd, n, &a, &b, &c, &d) || !a)
			continue;
		comps.offset[n] = b;
		comps.size[n] = a;
		end = MAX(end, a + b);
	}
	/* Protection keys are the soft MMU's own. A host without them: behind everything else. */
	if (!comps.size[9]) {
		comps.offset[9] = ALIGN_UP(end, 64);
		comps.size[9] = 8;
	}
	comps.supported = x | XCR0_PKRU;
}

uint64_t xsave_supported(void)
{
	pthread_once(&comps_once, comps_init);
	return comps.supported;
}

bool xsave_component(unsigned n, uint32_t *offset, uint32_t *size)
{
	if (n > 63 || !(xsave_supported() >> n & 1))
		return false;
	*offset = comps.offset[n];
	*size = comps.size[n];
	return true;
}

uint32_t xsave_size(uint64_t components)
{
	uint32_t end = 576, o, s;

	for (unsigned n = 2; n < 63; n++)
		if ((components >> n & 1) && xsave_component(n, &o, &s) && o + s > end)
			end = o + s;
	return end;
}

/* Components of ours that the compacted format aligns: none does on any CPU there is. */
uint32_t xsave_size_compact(uint64_t components)
{
	uint32_t end = 576, o, s;

	for (unsigned n = 2; n < 63; n++)
		if ((components >> n & 1) && xsave_component(n, &o, &s))
			end += s;
	return end;
}

/* -- x87 part in the two FXSAVE forms --------------------------------------------------------- */
void fx_put_x87(const struct cpu *c, uint8_t area[160], bool wide)
{
	const uint8_t *fx = c->fpu.fx;

	memcpy(area, fx, 24);
	memcpy(area + FX_ST, fx + FX_ST, 128);
	area[5] = 0;
	if (wide)
		return;
	st_le16(area + 12, ld_le16(fx + FX_FCS));
	st_le16(area + 14, 0);
	st_le16(area + 20, ld_le16(fx + FX_FDS));
	st_le16(area + 22, 0);
}

void fx_get_x87(struct cpu *c, const uint8_t area[160], bool wide)
{
	uint8_t *fx = c->fpu.fx;

	memcpy(fx, area, 24);
	memcpy(fx + FX_ST, area + FX_ST, 128);
	/* Bit 6 of FCW always reads 1, bits 7 and 13..15 read 0; FOP has 11 bits. */
	st_le16(fx + FX_FCW, (ld_le16(area + FX_FCW) & 0x1f3f) | 0x40);
	st_le16(fx + FX_FOP, ld_le16(area + FX_FOP) & 0x7ff);
	fx[5] = 0;
	st_le32(fx + FX_FCS, 0);
	for (unsigned i = 0; i < 8; i++)
		memset(fx + FX_ST + 16 * i + 10, 0, 6);
	if (!wide) {
		st_le16(fx + FX_FCS, ld_le16(area + 12));
		st_le16(fx + FX_FDS, ld_le16(area + 20));
		st_le32(fx + FX_FIP + 4, 0);
		st_le32(fx + FX_FDP + 4, 0);
	}
	x87_normalise(&c->fpu);
}

static bool all_zero(const void *p, size_t len)
{
	const uint8_t *b = p;
	uint64_t acc = 0;

	for (size_t i = 0; i < len; i += 8)
		acc |= ld_le64(b + i);
	return acc == 0;
}

static bool x87_in_use(const struct fpu *f)
{
	static const uint8_t init[24] = { X87_INIT_FCW & 0xff, X87_INIT_FCW >> 8 };

	return memcmp(f->fx, init, 24) || ld_le32(f->fx + FX_FCS) || !all_zero(f->fx + FX_ST, 128);
}

/* XINUSE, exactly: computed when somebody asks, so that no instruction need keep track. */
uint64_t fpu_xinuse(const struct cpu *c)
{
	const struct fpu *f = &c->fpu;
	uint64_t x = 0, any[8] = { 0 };

	for (unsigned i = 0; i < 16; i++)
		for (unsigned j = 0; j < 8; j++)
			any[j] |= ld_le64(f->zmm[i] + 8 * j);
	if (x87_in_use(f))
		x |= XCR0_X87;
	if (any[0] | any[1])
		x |= XCR0_SSE;
	if (any[2] | any[3])
		x |= XCR0_AVX;
	if (any[4] | any[5] | any[6] | any[7])
		x |= XCR0_ZMM_HI256;
	if ((c->xcr0 & XCR0_OPMASK) && !all_zero(f->k, sizeof f->k))
		x |= XCR0_OPMASK;
	if ((c->xcr0 & XCR0_HI16_ZMM) && !all_zero(f->zmm[16], 1024))
		x |= XCR0_HI16_ZMM;
	if (c->pkru)
		x |= XCR0_PKRU;
	return x;
}

/* -- KVM_GET/SET_XSAVE ------------------------------------------------------------------------ */
void fpu_put_component(const struct cpu *c, unsigned n, uint8_t *p)
{
	const struct fpu *f = &c->fpu;

	switch (n) {
	case 2:
		for (unsigned i = 0; i < 16; i++)
			memcpy(p + 16 * i, f->zmm[i] + 16, 16);
		break;
	case 5:
		memcpy(p, f->k, 64);
		break;
	case 6:
		for (unsigned i = 0; i < 16; i++)
			memcpy(p + 32 * i, f->zmm[i] + 32, 32);
		break;
	case 7:
		memcpy(p, f->zmm[16], 1024);
		break;
	case 9:
		st_le32(p, c->pkru);
		break;
	}
}

void fpu_get_component(struct cpu *c, unsigned n, const uint8_t *p)
{
	struct fpu *f = &c->fpu;

	switch (n) {
	case 2:
		for (unsigned i = 0; i < 16; i++)
			memcpy(f->zmm[i] + 16, p + 16 * i, 16);
		break;
	case 5:
		memcpy(f->k, p, 64);
		break;
	case 6:
		for (unsigned i = 0; i < 16; i++)
			memcpy(f->zmm[i] + 32, p + 32 * i, 32);
		break;
	case 7:
		memcpy(f->zmm[16], p, 1024);
		break;
	case 9:
		c->pkru = ld_le32(p);
		break;
	}
}

void fpu_to_xsave(const struct cpu *c, void *area, size_t len)
{
	uint8_t *p = area;
	uint64_t bv = xsave_supported();
	uint32_t o, s;

	memset(p, 0, len);
	if (len < 576)
		return;
	fx_put_x87(c, p, true);
	st_le32(p + FX_MXCSR, c->fpu.mxcsr);
	st_le32(p + FX_MASK, ld_le32(c->fpu.fx + FX_MASK));
	for (unsigned i = 0; i < 16; i++)
		memcpy(p + 160 + 16 * i, c->fpu.zmm[i], 16);
	for (unsigned n = 2; n < 10; n++) {
		if (!(bv >> n & 1))
			continue;
		if (xsave_component(n, &o, &s) && !range_bad(o, s, len))
			fpu_put_component(c, n, p + o);
		else
			bv &= ~BIT(n);
	}
	st_le64(p + 512, bv);
}

static const uint8_t zeroes[1024];

int fpu_from_xsave(struct cpu *c, const void *area, size_t len)
{
	const uint8_t *p = area;
	uint64_t bv, sup = xsave_supported();
	uint32_t o, s, mxcsr;

	if (len < 576)
		return -EINVAL;
	bv = ld_le64(p + 512);
	mxcsr = ld_le32(p + FX_MXCSR);
	if ((bv & ~sup) || !all_zero(p + 520, 56) || (mxcsr & ~mxcsr_mask()))
		return -EINVAL;
	for (unsigned n = 2; n < 10; n++)
		if ((bv >> n & 1) && (!xsave_component(n, &o, &s) || range_bad(o, s, len)))
			return -EINVAL;
	if (bv & XCR0_X87) {
		fx_get_x87(c, p, true);
	} else {
		uint8_t init[160] = { X87_INIT_FCW & 0xff, X87_INIT_FCW >> 8 };

		fx_get_x87(c, init, true);
	}
	for (unsigned i = 0; i < 16; i++)
		memcpy(c->fpu.zmm[i], bv & XCR0_SSE ? p + 160 + 16 * i : zeroes, 16);
	c->fpu.mxcsr = bv & (XCR0_SSE | XCR0_AVX) ? mxcsr : MXCSR_INIT;
	for (unsigned n = 2; n < 10; n++)
		if ((sup >> n & 1) && xsave_component(n, &o, &s))
			fpu_get_component(c, n, bv >> n & 1 ? p + o : zeroes);
	return 0;
}

/* -- KVM_GET/SET_FPU -------------------------------------------------------------------------- */
void fpu_to_kvm(const struct fpu *f, struct kvm_fpu *out)
{
	memset(out, 0, sizeof *out);
	memcpy(out->fpr, f->fx + FX_ST, 128);
	out->fcw = ld_le16(f->fx + FX_FCW);
	out->fsw = ld_le16(f->fx + FX_FSW);
	out->ftwx = f->fx[FX_FTW];
	out->last_opcode = ld_le16(f->fx + FX_FOP);
	out->last_ip = ld_le64(f->fx + FX_FIP);
	out->last_dp = ld_le64(f->fx + FX_FDP);
	for (unsigned i = 0; i < 16; i++)
		memcpy(out->xmm[i], f->zmm[i], 16);
	out->mxcsr = f->mxcsr;
}

void fpu_from_kvm(struct fpu *f, const struct kvm_fpu *in)
{
	memcpy(f->fx + FX_ST, in->fpr, 128);
	for (unsigned i = 0; i < 8; i++)
		memset(f->fx + FX_ST + 16 * i + 10, 0, 6);
	st_le16(f->fx + FX_FCW, (in->fcw & 0x1f3f) | 0x40);
	st_le16(f->fx + FX_FSW, in->fsw);
	f->fx[FX_FTW] = in->ftwx;
	st_le16(f->fx + FX_FOP, in->last_opcode & 0x7ff);
	st_le64(f->fx + FX_FIP, in->last_ip);
	st_le64(f->fx + FX_FDP, in->last_dp);
	for (unsigned i = 0; i < 16; i++)
		memcpy(f->zmm[i], in->xmm[i], 16);
	f->mxcsr = in->mxcsr & mxcsr_mask();
	x87_normalise(f);
}
