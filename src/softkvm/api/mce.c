/* Machine-check banks and injection (SDM vol. 3 ch. 16): KVM_X86_SETUP_MCE, KVM_X86_SET_MCE and their MSRs. */
#include <errno.h>

#include "softkvm/api/api.h"
#include "softkvm/irqchip.h"

#define MCI_VAL BIT(63)
#define MCI_OVER BIT(62)
#define MCI_UC BIT(61)
#define MCG_MCIP BIT(2)
#define MCI_PCC BIT(57)
#define MCI_S BIT(56)
#define MCI_AR BIT(55)
#define MCG_CTL_P BIT(8)
#define MCG_CMCI_P BIT(10)
#define MSR_MC0_CTL2 0x280u
#define CTL2_CMCI_EN BIT(30)
#define CTL2_VALID (CTL2_CMCI_EN | 0x7fff)

static unsigned banks(const struct cpu *c)
{
	unsigned n = c->vcpu->api->mcg_cap & 0xff;

	return MIN(n, MCE_BANKS);
}

static bool is_ctl2(const struct cpu *c, uint32_t msr)
{
	return msr >= MSR_MC0_CTL2 && msr < MSR_MC0_CTL2 + banks(c);
}

bool mce_is(const struct cpu *c, uint32_t msr)
{
	return is_ctl2(c, msr) || msr == MSR_MCG_CAP || msr == MSR_MCG_STATUS || msr == MSR_MCG_CTL ||
		(msr >= MSR_MC0_CTL && msr < MSR_MC0_CTL + 4 * banks(c));
}

int mce_read(struct cpu *c, uint32_t msr, uint64_t *v, bool host)
{
	struct vcpu_api *a = c->vcpu->api;

	if (is_ctl2(c, msr)) {
		if (!host && !(a->mcg_cap & MCG_CMCI_P))
			return MSR_FAULT;
		*v = a->mc_ctl2[msr - MSR_MC0_CTL2];
		return MSR_OK;
	}
	switch (msr) {
	case MSR_MCG_CAP:
		*v = a->mcg_cap;
		return MSR_OK;
	case MSR_MCG_STATUS:
		*v = c->msr.mcg_status;
		return MSR_OK;
	case MSR_MCG_CTL:
		if (!host && !(a->mcg_cap & MCG_CTL_P))
			return MSR_FAULT;
		*v = c->msr.mcg_ctl;
		return MSR_OK;
	default:
		*v = a->mc[msr - MSR_MC0_CTL];
		return MSR_OK;
	}
}

int mce_write(struct cpu *c, uint32_t msr, uint64_t v, bool host)
{
	struct vcpu_api *a = c->vcpu->api;
	unsigned off = msr - MSR_MC0_CTL;

	if (is_ctl2(c, msr)) {
		if ((!(a->mcg_cap & MCG_CMCI_P) && (v || !host)) || v & ~CTL2_VALID)
			return MSR_FAULT;
		a->mc_ctl2[msr - MSR_MC0_CTL2] = v;
		return MSR_OK;
	}
	switch (msr) {
	case MSR_MCG_CAP:
		return MSR_FAULT;
	case MSR_MCG_STATUS:
		c->msr.mcg_status = v;
		return MSR_OK;
	case MSR_MCG_CTL:
		if (!host && (!(a->mcg_cap & MCG_CTL_P) || (v && v != ~0ull)))
			return MSR_FAULT;
		c->msr.mcg_ctl = v;
		return MSR_OK;
	}
	/* CTL: all or nothing, but Linux clears bit 10 of bank 4 and bit 0 of bank 0 on some CPUs. */
	if (off % 4 == 0 && v && (v | BIT(10) | 1) != ~0ull)
		return MSR_FAULT;
	/* STATUS: software may only clear it (AMD's HWCR.McStatusWrEn lifts that). */
	if (off % 4 == 1 && !host && v && !(a->hwcr & BIT(18)))
		return MSR_FAULT;
	a->mc[off] = v;
	return MSR_OK;
}

long mce_setup(struct cpu *c, uint64_t cap)
{
	struct vcpu_api *a = c->vcpu->api;

	if (!(cap & 0xff) || (cap & 0xff) > MCE_BANKS || cap & ~(uint64_t)(MCE_CAP_SUPPORTED | 0xff | BIT(16) * 0xff))
		return -EINVAL;
	a->mcg_cap = cap;
	if (cap & MCG_CTL_P)
		c->msr.mcg_ctl = ~0ull;
	for (unsigned i = 0; i < banks(c); i++)
		a->mc[i * 4] = ~0ull;
	memset(a->mc_ctl2, 0, sizeof a->mc_ctl2);
	lapic_set_cmci(c, cap & MCG_CMCI_P);
	return 0;
}

/* Uncorrected, but no action is required: told by CMCI, no exception. */
static bool is_ucna(const struct kvm_x86_mce *m)
{
	return !m->mcg_status && !(m->status & (MCI_PCC | MCI_S | MCI_AR));
}

static void set_bank(uint64_t *b, const struct kvm_x86_mce *m, uint64_t flags)
{
	b[1] = m->status | flags;
	b[2] = m->addr;
	b[3] = m->misc;
}

long mce_set(struct cpu *c, const struct kvm_x86_mce *m)
{
	struct vcpu_api *a = c->vcpu->api;
	uint64_t *b;

	if (m->bank >= banks(c) || !(m->status & MCI_VAL))
		return -EINVAL;
	b = &a->mc[m->bank * 4];
	if (is_ucna(m)) {
		set_bank(b, m, 0);
		c->msr.mcg_status = m->mcg_status;
		if (a->mcg_cap & MCG_CMCI_P && a->mc_ctl2[m->bank] & CTL2_CMCI_EN)
			lapic_cmci(c);
		return 0;
	}
	if (m->status & MCI_UC && a->mcg_cap & MCG_CTL_P && c->msr.mcg_ctl != ~0ull)
		return 0;
	if (m->status & MCI_UC && b[0] != ~0ull)
		return 0;
	if (m->status & MCI_UC) {
		if (c->msr.mcg_status & MCG_MCIP || !(c->cr4 & CR4_MCE)) {
			c->triple_fault = true;
			cpu_request(c, REQ_EVENT);
			return 0;
		}
		set_bank(b, m, b[1] & MCI_VAL ? MCI_OVER : 0);
		c->msr.mcg_status = m->mcg_status;
		c->ev = (struct event){ .valid = true, .vector = EXC_MC, .type = EV_EXC };
		cpu_request(c, REQ_EVENT);
	} else if (!(b[1] & MCI_VAL) || !(b[1] & MCI_UC)) {
		set_bank(b, m, b[1] & MCI_VAL ? MCI_OVER : 0);
	} else {
		b[1] |= MCI_OVER;
	}
	return 0;
}
