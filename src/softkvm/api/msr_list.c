/* What KVM_GET_MSR_INDEX_LIST and KVM_GET_MSR_FEATURE_INDEX_LIST name, and the values of feature MSRs. */
#include <asm/kvm_para.h>
#include <errno.h>

#include "softkvm/api/api.h"

const uint32_t msr_list[] = {
	MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_STAR, MSR_CSTAR, MSR_KERNEL_GS_BASE, MSR_SFMASK, MSR_LSTAR,
	MSR_TSC, MSR_PAT, MSR_FEATURE_CONTROL, MSR_TSC_AUX, MSR_SPEC_CTRL, 0x122, MSR_XSS,
};
const unsigned msr_list_n = ARRAY_SIZE(msr_list);

const uint32_t msr_list_emulated[] = {
	MSR_KVM_SYSTEM_TIME, MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME_NEW, MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_STEAL_TIME,
	MSR_KVM_POLL_CONTROL, MSR_TSC_ADJUST, MSR_TSC_DEADLINE, MSR_ARCH_CAPABILITIES, MSR_MISC_ENABLE, MSR_MCG_STATUS,
	MSR_MCG_CTL, MSR_SMBASE, 0x34, 0xce, 0x140,
};
const unsigned msr_list_emulated_n = ARRAY_SIZE(msr_list_emulated);

const uint32_t msr_list_features[] = { MSR_UCODE_REV, MSR_ARCH_CAPABILITIES, 0xc0011029, 0x345 };
const unsigned msr_list_features_n = ARRAY_SIZE(msr_list_features);

/*
 * IA32_ARCH_CAPABILITIES: an interpreter does not speculate across the guest's borders, so none of the
 * flaws that hardware admits to is there; IBRS_ALL keeps guests from retpolines.
 */
#define ARCH_CAP (BIT(0) | BIT(1) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(8) | BIT(13) | BIT(14) | BIT(15) | \
		  BIT(20) | BIT(24) | BIT(26) | BIT(27) | BIT(62))

int msr_feature_read(uint32_t msr, uint64_t *v)
{
	switch (msr) {
	case MSR_UCODE_REV:
		*v = cpuid_host_features()->amd ? 0x01000065 : 0x100000000ull;      /* Linux's, by vendor: it is in the other half */
		return 0;
	case MSR_ARCH_CAPABILITIES:
		*v = ARCH_CAP;
		return 0;
	case 0xc0011029:
		*v = BIT(1);            /* LFENCE is serialising */
		return 0;
	case 0x345:                     /* PERF_CAPABILITIES: no counters */
		*v = 0;
		return 0;
	default:
		return -EINVAL;
	}
}
