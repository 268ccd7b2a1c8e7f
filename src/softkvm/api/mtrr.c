/* MTRRs and PAT-like memory types (SDM vol. 3 ch. 12.11): stored and checked; memory is always write-back here. */
#include "softkvm/api/api.h"

#define FIX_N 11

static int fix_index(uint32_t msr)
{
	if (msr == MSR_MTRR_FIX64K_00000)
		return 0;
	if (msr == MSR_MTRR_FIX16K_80000 || msr == MSR_MTRR_FIX16K_A0000)
		return 1 + (int)(msr - MSR_MTRR_FIX16K_80000);
	if (msr >= MSR_MTRR_FIX4K_C0000 && msr < MSR_MTRR_FIX4K_C0000 + 8)
		return 3 + (int)(msr - MSR_MTRR_FIX4K_C0000);
	return -1;
}

bool mtrr_is(uint32_t msr)
{
	return msr == MSR_MTRRCAP || msr == MSR_MTRR_DEF_TYPE || fix_index(msr) >= 0 ||
		(msr >= MSR_MTRR_PHYSBASE0 && msr < MSR_MTRR_PHYSBASE0 + 2 * MTRR_VARIABLE);
}

int mtrr_read(struct cpu *c, uint32_t msr, uint64_t *v)
{
	struct vcpu_api *a = c->vcpu->api;
	int f = fix_index(msr);

	if (msr == MSR_MTRRCAP)
		*v = 0x500 | MTRR_VARIABLE;     /* write-combining, fixed ranges */
	else if (msr == MSR_MTRR_DEF_TYPE)
		*v = a->mtrr_def;
	else if (f >= 0)
		*v = a->mtrr_fix[f];
	else if (msr & 1)
		*v = a->mtrr_mask[(msr - MSR_MTRR_PHYSBASE0) / 2];
	else
		*v = a->mtrr_base[(msr - MSR_MTRR_PHYSBASE0) / 2];
	return MSR_OK;
}

static bool type_ok(uint64_t t)
{
	return t < 8 && (0x73 >> t & 1);        /* UC, WC, WT, WP, WB */
}

static bool fix_ok(uint64_t v)
{
	for (int i = 0; i < 8; i++)
		if (!type_ok(v >> (i * 8) & 0xff))
			return false;
	return true;
}

int mtrr_write(struct cpu *c, uint32_t msr, uint64_t v)
{
	struct vcpu_api *a = c->vcpu->api;
	int f = fix_index(msr);
	unsigned bits = c->feat->phys_bits;
	uint64_t rsvd = bits < 64 ? ~0ull << bits : 0;

	if (msr == MSR_MTRRCAP)
		return MSR_FAULT;
	if (msr == MSR_MTRR_DEF_TYPE) {
		if (v & ~0xcffull || !type_ok(v & 0xff))
			return MSR_FAULT;
		a->mtrr_def = v;
	} else if (f >= 0) {
		if (!fix_ok(v))
			return MSR_FAULT;
		a->mtrr_fix[f] = v;
	} else if (msr & 1) {
		if (v & (rsvd | 0x7ff))
			return MSR_FAULT;
		a->mtrr_mask[(msr - MSR_MTRR_PHYSBASE0) / 2] = v;
	} else {
		if (v & (rsvd | 0xf00) || !type_ok(v & 0xff))
			return MSR_FAULT;
		a->mtrr_base[(msr - MSR_MTRR_PHYSBASE0) / 2] = v;
	}
	return MSR_OK;
}
