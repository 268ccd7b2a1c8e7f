/*
 * Model-specific registers (SDM vol. 4; AMD APM vol. 2 app. A). What the guest's CPUID does not offer
 * is refused to the guest, as is what nobody knows; the host may read and write everything in the
 * index list. KVM_X86_SET_MSR_FILTER and user-space MSR exits are applied in front.
 */
#include <errno.h>
#include <stdatomic.h>

#include "softkvm/api/api.h"
#include "softkvm/irqchip.h"

#define MSR_AMD_FIRST 0xc0010000u
#define MISC_ENABLE_RO (BIT(7) | BIT(11) | BIT(12))

bool msr_filtered(const struct cpu *c, uint32_t msr, bool write)
{
	const struct msr_filter *f = atomic_load_explicit(&c->vm->api->filter, memory_order_acquire);
	uint32_t want = write ? KVM_MSR_FILTER_WRITE : KVM_MSR_FILTER_READ;

	if (!f || (msr >= 0x800 && msr <= 0x8ff))
		return false;
	for (unsigned i = 0; i < f->n; i++) {
		uint32_t off = msr - f->r[i].base;

		if (msr >= f->r[i].base && off < f->r[i].n && f->r[i].flags & want)
			return !(f->r[i].bits[off / 8] >> off % 8 & 1);
	}
	return f->deny;
}

/* Plain storage, nothing to check and always there. */
static uint64_t *plain(struct cpu *c, uint32_t msr)
{
	struct vcpu_api *a = c->vcpu->api;

	switch (msr) {
	case MSR_SYSENTER_CS: return &c->msr.sysenter_cs;
	case MSR_STAR: return &c->msr.star;
	case MSR_SMBASE: return &c->msr.smbase;
	case MSR_UCODE_REV: return &c->msr.ucode_rev;
	case 0xc0010015: return &a->hwcr;
	case 0xc0010010: return &a->syscfg;
	case 0xc001001f: return &a->nb_cfg;
	case 0xc0011029: return &a->ls_cfg;
	case 0xc0010140: return &a->osvw_len;
	case 0xc0010141: return &a->osvw_status;
	case 0xce: return &a->platform_info;
	case 0x140: return &c->msr.misc_features;
	case 0x34: return &a->smi_count;
	case 0x1fc: return &a->power_ctl;
	default: return NULL;
	}
}

/* Addresses: must be canonical. */
static uint64_t *address(struct cpu *c, uint32_t msr)
{
	switch (msr) {
	case MSR_SYSENTER_ESP: return &c->msr.sysenter_esp;
	case MSR_SYSENTER_EIP: return &c->msr.sysenter_eip;
	case MSR_LSTAR: return &c->msr.lstar;
	case MSR_CSTAR: return &c->msr.cstar;
	case MSR_FS_BASE: return &c->seg[SEG_FS].base;
	case MSR_GS_BASE: return &c->seg[SEG_GS].base;
	case MSR_KERNEL_GS_BASE: return &c->msr.kernel_gs_base;
	default: return NULL;
	}
}

/* Reads of these give 0 and writes go nowhere, as on KVM: kernels touch them without asking CPUID. */
static bool ignored(uint32_t msr)
{
	switch (msr) {
	case 0x17: case 0x2c: case 0xcd: case 0x1b0: case 0x198: case 0x199: case 0x19a: case 0x19b: case 0x1d9:
	case 0x1da: case 0x1db: case 0x1dc: case 0x1dd: case 0x1de: case 0x606: case 0x611: case 0x639: case 0x641: case 0x619:
	case 0x11e: case 0x2a:
	case 0xc0010055: case 0xc0010058: case 0xc0010111 ... 0xc0010113: case 0xc0010114: case 0xc0010117:
	case 0xc001100d: case 0xc0011020 ... 0xc0011028: case 0xc001102a: case 0xc001102c: case 0xc001102d:
		return true;
	default:
		/* K7 event selectors and counters. */
		return msr >= 0xc0010000 && msr <= 0xc0010007;
	}
}

static bool spec_ctrl_offered(const struct cpu *c)
{
	return c->feat->f7_edx & (BIT(26) | BIT(27) | BIT(31)) || c->feat->f80000008_ebx & (BIT(14) | BIT(15) | BIT(24));
}

static bool pred_cmd_offered(const struct cpu *c)
{
	return c->feat->f7_edx & BIT(26) || c->feat->f80000008_ebx & BIT(12);
}

static bool tsc_aux_offered(const struct cpu *c)
{
	return c->feat->f80000001_edx & BIT(27) || c->feat->f7_ecx & BIT(22);
}

static int unknown(struct cpu *c)
{
	c->vcpu->api->msr_reason = KVM_MSR_EXIT_REASON_UNKNOWN;
	return MSR_FAULT;
}

static int read_gated(struct cpu *c, uint32_t msr, uint64_t *v, bool host)
{
	switch (msr) {
	case MSR_SPEC_CTRL:
		*v = c->msr.spec_ctrl;
		return host || spec_ctrl_offered(c) ? MSR_OK : MSR_FAULT;
	case MSR_PRED_CMD:
		return MSR_FAULT;
	case MSR_ARCH_CAPABILITIES:
		*v = c->msr.arch_capabilities;
		return host || c->feat->f7_edx & BIT(29) ? MSR_OK : MSR_FAULT;
	case MSR_TSC_ADJUST:
		*v = c->msr.tsc_adjust;
		return MSR_OK;
	case MSR_TSC_AUX:
		*v = c->msr.tsc_aux;
		return host || tsc_aux_offered(c) ? MSR_OK : MSR_FAULT;
	case MSR_XSS:
		*v = c->msr.xss;
		return host || c->feat->fd_1_eax & BIT(3) ? MSR_OK : MSR_FAULT;
	case MSR_FEATURE_CONTROL:
		*v = c->msr.feature_control;
		return host ? MSR_OK : MSR_FAULT;
	case 0x122:
		*v = c->vcpu->api->tsx_ctrl;
		return host || c->msr.arch_capabilities & BIT(7) ? MSR_OK : MSR_FAULT;
	default:
		return unknown(c);
	}
}

static int read_any(struct cpu *c, uint32_t msr, uint64_t *v, bool host)
{
	uint64_t *p;

	if (msr == 0xce && !host && c->vm->policy.platform_info_hidden)
		return MSR_FAULT;
	if ((p = address(c, msr)) || (p = plain(c, msr))) {
		*v = *p;
		return MSR_OK;
	}
	if (mtrr_is(msr))
		return mtrr_read(c, msr, v);
	if (mce_is(c, msr))
		return mce_read(c, msr, v, host);
	if (kvmclock_msr_is(msr))
		return kvmclock_msr_read(c, msr, v);
	/* Without a LAPIC here the deadline reads 0 and writes go nowhere, as on Linux: QEMU saves it always. */
	if (msr == MSR_TSC_DEADLINE && !c->lapic) {
		*v = 0;
		return MSR_OK;
	}
	if ((msr >= 0x800 && msr <= 0x8ff) || msr == MSR_TSC_DEADLINE) {
		if (!c->lapic || lapic_msr_read(c, msr, v, host))
			return MSR_FAULT;
		return MSR_OK;
	}
	switch (msr) {
	case MSR_TSC: *v = tsc_read(c); return MSR_OK;
	case MSR_APIC_BASE: *v = c->msr.apic_base; return MSR_OK;
	case MSR_EFER: *v = c->efer; return MSR_OK;
	case MSR_SFMASK: *v = c->msr.sfmask; return MSR_OK;
	case MSR_PAT: *v = c->msr.pat; return MSR_OK;
	case MSR_MISC_ENABLE: *v = c->msr.misc_enable; return MSR_OK;
	case MSR_DEBUGCTL: *v = c->msr.debugctl; return MSR_OK;
	case 0: case 1: *v = 0; return MSR_OK;                  /* P5 machine check */
	case 0x198: *v = 1000ull | 4ull << 40; return MSR_OK;   /* PERF_STATUS: what KVM invents */
	case 0xcd: *v = 3; return MSR_OK;                       /* FSB_FREQ */
	case 0x2c: *v = 1 << 24; return MSR_OK;                 /* EBC_FREQUENCY_ID */
	case 0x11e: *v = 0xbe702111; return MSR_OK;             /* BBL_CR_CTL3 */
	case 0xc0010112: *v = 0; return MSR_OK;                 /* SMM_ADDR (TSEG): none */
	}
	if (ignored(msr)) {
		*v = 0;
		return MSR_OK;
	}
	return read_gated(c, msr, v, host);
}

static bool pat_ok(uint64_t v)
{
	for (int i = 0; i < 8; i++, v >>= 8)
		if ((v & 0xff) > 7 || (v & 0xff) == 2 || (v & 0xff) == 3)
			return false;
	return true;
}

static int write_misc_enable(struct cpu *c, uint64_t v, bool host)
{
	uint64_t old = c->msr.misc_enable;

	/* The PMU bits say what is not there; only the host may change them. */
	if (!host)
		v = (v & ~MISC_ENABLE_RO) | (old & MISC_ENABLE_RO);
	c->msr.misc_enable = v;
	return MSR_OK;
}

static int write_tsc_adjust(struct cpu *c, uint64_t v, bool host)
{
	if (!host) {
		if (!(c->feat->f7_ebx & BIT(1)))
			return MSR_FAULT;
		tsc_set_offset(c, c->msr.tsc_offset + (v - c->msr.tsc_adjust));
	}
	c->msr.tsc_adjust = v;
	return MSR_OK;
}

static int write_gated(struct cpu *c, uint32_t msr, uint64_t v, bool host)
{
	switch (msr) {
	case MSR_SPEC_CTRL:
		/* IBRS, STIBP, SSBD, and the BHI controls; AMD adds PSFD. */
		if ((!host && !spec_ctrl_offered(c)) || v & ~0x5ffull)
			return MSR_FAULT;
		c->msr.spec_ctrl = v;
		return MSR_OK;
	case MSR_PRED_CMD:
		return (host || pred_cmd_offered(c)) && !(v & ~0x81ull) ? MSR_OK : MSR_FAULT;
	case 0x10b:                                     /* FLUSH_CMD */
		return c->feat->f7_edx & BIT(28) && !(v & ~1ull) ? MSR_OK : MSR_FAULT;
	case MSR_ARCH_CAPABILITIES:
		if (!host)
			return MSR_FAULT;
		c->msr.arch_capabilities = v;
		return MSR_OK;
	case MSR_TSC_ADJUST:
		return write_tsc_adjust(c, v, host);
	case MSR_TSC_AUX:
		if ((!host && !tsc_aux_offered(c)) || v >> 32)
			return MSR_FAULT;
		c->msr.tsc_aux = v;
		return MSR_OK;
	case MSR_XSS:
		if ((!host && !(c->feat->fd_1_eax & BIT(3))) || v)
			return MSR_FAULT;
		return MSR_OK;
	case MSR_FEATURE_CONTROL:
		if (!host || v & ~0x100001ull)
			return MSR_FAULT;
		c->msr.feature_control = v;
		return MSR_OK;
	case 0x122:
		if (!host && !(c->msr.arch_capabilities & BIT(7)))
			return MSR_FAULT;
		c->vcpu->api->tsx_ctrl = v;
		return MSR_OK;
	default:
		return unknown(c);
	}
}

/* The plain ones that are not quite: read-only to the guest, or with reserved bits. */
static int write_plain(struct cpu *c, uint32_t msr, uint64_t *p, uint64_t v, bool host)
{
	switch (msr) {
	case MSR_UCODE_REV:
		if (!host)
			return MSR_OK;          /* the update trigger of AMD and a scratch write on Intel */
		break;
	case MSR_SMBASE: case 0xce: case 0x34: case 0xc0010140: case 0xc0010141:
		if (!host)
			return msr >= MSR_AMD_FIRST ? MSR_OK : MSR_FAULT;
		break;
	case 0x140:
		if (v & ~1ull)
			return MSR_FAULT;
		break;
	case 0xc0010015:                        /* HWCR: the bits KVM lets pass silently, McStatusWrEn, TscFreqSel */
		v &= ~(uint64_t)0x148;
		if (v & ~(BIT(18) | BIT(24)))
			return MSR_FAULT;
		break;
	case 0xc001001f:
		if (v & ~BIT(46))
			return MSR_FAULT;
		break;
	case MSR_SYSENTER_CS:
		v = (uint32_t)v;
		break;
	}
	*p = v;
	return MSR_OK;
}

static int write_address(struct cpu *c, uint32_t msr, uint64_t *p, uint64_t v)
{
	if ((msr == MSR_SYSENTER_ESP || msr == MSR_SYSENTER_EIP) && c->feat->amd)
		v = (uint32_t)v | (v >> 32 ? v : 0);
	if (!cpuid_canonical(c, v))
		return MSR_FAULT;
	*p = v;
	if (msr == MSR_FS_BASE || msr == MSR_GS_BASE)
		cpu_update_mode(c);
	return MSR_OK;
}

static int write_any(struct cpu *c, uint32_t msr, uint64_t v, bool host)
{
	uint64_t *p;

	if ((p = address(c, msr)))
		return write_address(c, msr, p, v);
	if ((p = plain(c, msr)))
		return write_plain(c, msr, p, v, host);
	if (mtrr_is(msr))
		return mtrr_write(c, msr, v);
	if (mce_is(c, msr))
		return mce_write(c, msr, v, host);
	if (kvmclock_msr_is(msr))
		return kvmclock_msr_write(c, msr, v, host);
	if (msr == MSR_TSC_DEADLINE && !c->lapic)
		return MSR_OK;
	if ((msr >= 0x800 && msr <= 0x8ff) || msr == MSR_TSC_DEADLINE)
		return c->lapic && !lapic_msr_write(c, msr, v) ? MSR_OK : MSR_FAULT;
	switch (msr) {
	case MSR_TSC:
		if (host)
			tsc_synchronize(c, v);
		else
			tsc_write_guest(c, v);
		return MSR_OK;
	case MSR_APIC_BASE:
		if (!c->lapic && host) {
			c->msr.apic_base = v;
			return MSR_OK;
		}
		return c->lapic && !lapic_set_base(c, v, host) ? MSR_OK : MSR_FAULT;
	case MSR_EFER:
		return efer_write(c, v, host) ? MSR_OK : MSR_FAULT;
	case MSR_SFMASK:
		c->msr.sfmask = (uint32_t)v;
		return MSR_OK;
	case MSR_PAT:
		if (!pat_ok(v))
			return MSR_FAULT;
		c->msr.pat = v;
		return MSR_OK;
	case MSR_MISC_ENABLE:
		return write_misc_enable(c, v, host);
	case MSR_DEBUGCTL:
		/* LBR and BTF are not there: KVM lets them pass as no-ops, all else faults. */
		if (v & ~3ull)
			return MSR_FAULT;
		c->msr.debugctl = 0;
		return MSR_OK;
	case 0: case 1:
		return MSR_OK;
	}
	if (ignored(msr))
		return MSR_OK;
	return write_gated(c, msr, v, host);
}

/* Who decides first: filter, then the register, then whether user space wants to hear of a failure. */
static int outcome(struct cpu *c, int r)
{
	return r == MSR_FAULT && c->vm->policy.user_msr & c->vcpu->api->msr_reason ? MSR_EXIT : r;
}

int msr_read(struct cpu *c, uint32_t msr, uint64_t *v, bool host)
{
	if (host)
		return read_any(c, msr, v, true);
	if (msr_filtered(c, msr, false)) {
		c->vcpu->api->msr_reason = KVM_MSR_EXIT_REASON_FILTER;
		return outcome(c, MSR_FAULT);
	}
	c->vcpu->api->msr_reason = KVM_MSR_EXIT_REASON_INVAL;
	return outcome(c, read_any(c, msr, v, false));
}

int msr_write(struct cpu *c, uint32_t msr, uint64_t v, bool host)
{
	if (host)
		return write_any(c, msr, v, true);
	if (msr_filtered(c, msr, true)) {
		c->vcpu->api->msr_reason = KVM_MSR_EXIT_REASON_FILTER;
		return outcome(c, MSR_FAULT);
	}
	c->vcpu->api->msr_reason = KVM_MSR_EXIT_REASON_INVAL;
	return outcome(c, write_any(c, msr, v, false));
}

void msr_reset(struct cpu *c, bool init)
{
	struct vcpu_api *a = c->vcpu->api;

	c->msr.debugctl = 0;
	if (init)
		return;
	c->msr.star = c->msr.lstar = c->msr.cstar = c->msr.sfmask = c->msr.kernel_gs_base = 0;
	c->msr.sysenter_cs = c->msr.sysenter_esp = c->msr.sysenter_eip = 0;
	c->msr.tsc_aux = c->msr.xss = c->msr.spec_ctrl = c->msr.mcg_status = 0;
	c->msr.pat = 0x0007040600070406;
	c->msr.misc_enable = BIT(0) | BIT(11) | BIT(12);
	c->msr.smbase = 0x30000;
	msr_feature_read(MSR_ARCH_CAPABILITIES, &c->msr.arch_capabilities);
	msr_feature_read(MSR_UCODE_REV, &c->msr.ucode_rev);
	a->platform_info = BIT(31);     /* CPUID faulting is there */
	a->hwcr = BIT(24);              /* TscFreqSel: the TSC counts at the P0 frequency; Linux warns without it */
	c->msr.misc_features = 0;
	a->mtrr_def = 0;
}
