/* Between struct state and the standard XSAVE format (SDM vol. 1 13.4), which sigreturn and KVM_SET_XSAVE take. */
#include <cpuid.h>
#include <string.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

#define COMPARED (XCR0_X87 | XCR0_SSE | XCR0_AVX | XCR0_OPMASK | XCR0_ZMM_HI256 | XCR0_HI16_ZMM)

static uint64_t host_xcr0(void)
{
	unsigned a, b, c, d;

	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
		return XCR0_X87 | XCR0_SSE;
	__asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
	return a | (uint64_t)d << 32;
}

uint64_t common_xcr0(void) { return host_xcr0() & xsave_supported() & COMPARED; }

/* One component's part of each register: `each` bytes at `from` of zmm[first..]. */
static void vectors(struct state *s, uint8_t *img, unsigned comp, unsigned first, unsigned from, unsigned each, bool out)
{
	uint32_t off, size;

	if (!(common_xcr0() >> comp & 1) || !xsave_component(comp, &off, &size))
		return;
	for (unsigned r = 0; r < 16; r++) {
		uint8_t *v = s->zmm[first + r] + from, *i = img + off + r * each;

		memcpy(out ? i : v, out ? v : i, each);
	}
}

static void upper(struct state *s, uint8_t *img, uint64_t bv, bool out)
{
	uint32_t off, size;

	if (bv & XCR0_AVX)
		vectors(s, img, 2, 0, 16, 16, out);
	if (bv & XCR0_ZMM_HI256)
		vectors(s, img, 6, 0, 32, 32, out);
	if (bv & XCR0_HI16_ZMM)
		vectors(s, img, 7, 16, 0, 64, out);
	if ((bv & common_xcr0() & XCR0_OPMASK) && xsave_component(5, &off, &size))
		memcpy(out ? img + off : (void *)s->k, out ? (void *)s->k : img + off, 64);
}

void state_to_xsave(const struct state *s, uint8_t *img, uint64_t bv)
{
	memcpy(img, s->fx, 24);
	memcpy(img + 24, &s->mxcsr, 4);
	memcpy(img + 32, s->fx + 32, 128);
	for (unsigned r = 0; r < 16; r++)
		memcpy(img + 160 + 16 * r, s->zmm[r], 16);
	memset(img + 512, 0, 64);
	st_le64(img + 512, bv);
	upper((struct state *)(uintptr_t)s, img, bv, true);
}

void state_from_xsave(struct state *s, const uint8_t *img)
{
	uint64_t bv = ld_le64(img + 512);

	memset(s->zmm, 0, sizeof s->zmm);
	memset(s->k, 0, sizeof s->k);
	memset(s->fx, 0, sizeof s->fx);
	st_le16(s->fx, 0x37f);
	if (bv & XCR0_X87)
		memcpy(s->fx, img, 160);
	memcpy(&s->mxcsr, img + 24, 4);
	for (unsigned r = 0; r < 16 && (bv & XCR0_SSE); r++)
		memcpy(s->zmm[r], img + 160 + 16 * r, 16);
	upper(s, (uint8_t *)(uintptr_t)img, bv, false);
}
