/* ioctls of /dev/kvm itself, and what KVM_CHECK_EXTENSION answers. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "softkvm/api/api.h"
#include "softkvm/fpu.h"

#define MAX_CPUID_ENTRIES 256

/* -- capabilities ----------------------------------------------------------------------------- */
static int cap_vcpus(void)
{
	long n = sysconf(_SC_NPROCESSORS_ONLN);

	return n < 1 ? 1 : n > VM_MAX_VCPUS ? VM_MAX_VCPUS : (int)n;
}

int check_extension(struct vm *vm, unsigned long cap)
{
	switch (cap) {
	case KVM_CAP_IRQCHIP: case KVM_CAP_HLT: case KVM_CAP_USER_MEMORY: case KVM_CAP_SET_TSS_ADDR: case KVM_CAP_EXT_CPUID:
	case KVM_CAP_CLOCKSOURCE: case KVM_CAP_PIT: case KVM_CAP_NOP_IO_DELAY: case KVM_CAP_MP_STATE: case KVM_CAP_SYNC_MMU:
	case KVM_CAP_DESTROY_MEMORY_REGION_WORKS: case KVM_CAP_USER_NMI: case KVM_CAP_SET_GUEST_DEBUG: case KVM_CAP_REINJECT_CONTROL:
	case KVM_CAP_IRQ_INJECT_STATUS: case KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: case KVM_CAP_IRQFD:
	case KVM_CAP_IRQFD_RESAMPLE: case KVM_CAP_PIT2: case KVM_CAP_PIT_STATE2: case KVM_CAP_SET_BOOT_CPU_ID: case KVM_CAP_IOEVENTFD:
	case KVM_CAP_IOEVENTFD_NO_LENGTH: case KVM_CAP_IOEVENTFD_ANY_LENGTH: case KVM_CAP_SET_IDENTITY_MAP_ADDR:
	case KVM_CAP_VCPU_EVENTS: case KVM_CAP_INTR_SHADOW: case KVM_CAP_DEBUGREGS: case KVM_CAP_X86_ROBUST_SINGLESTEP:
	case KVM_CAP_XSAVE: case KVM_CAP_XCRS: case KVM_CAP_KVMCLOCK_CTRL: case KVM_CAP_TSC_CONTROL: case KVM_CAP_GET_TSC_KHZ:
	case KVM_CAP_VM_TSC_CONTROL: case KVM_CAP_SIGNAL_MSI: case KVM_CAP_READONLY_MEM: case KVM_CAP_TSC_DEADLINE_TIMER:
	case KVM_CAP_EXT_EMUL_CPUID: case KVM_CAP_CHECK_EXTENSION_VM: case KVM_CAP_ENABLE_CAP_VM: case KVM_CAP_DISABLE_QUIRKS:
	case KVM_CAP_SPLIT_IRQCHIP: case KVM_CAP_IMMEDIATE_EXIT: case KVM_CAP_GET_MSR_FEATURES: case KVM_CAP_MSR_PLATFORM_INFO:
	case KVM_CAP_EXCEPTION_PAYLOAD: case KVM_CAP_COALESCED_PIO: case KVM_CAP_INTERNAL_ERROR_DATA: case KVM_CAP_X86_MSR_FILTER:
	case KVM_CAP_LAST_CPU: case KVM_CAP_ENFORCE_PV_FEATURE_CPUID: case KVM_CAP_SREGS2: case KVM_CAP_EXIT_ON_EMULATION_FAILURE:
	case KVM_CAP_VCPU_ATTRIBUTES: case KVM_CAP_ENABLE_CAP: case KVM_CAP_X86_TRIPLE_FAULT_EVENT:
	case KVM_CAP_BINARY_STATS_FD:
		return 1;
	case KVM_CAP_IRQ_ROUTING:
		return 4096;            /* MAX_ROUTES of KVM_SET_GSI_ROUTING */
	case KVM_CAP_ADJUST_CLOCK:
		return KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
	case KVM_CAP_COALESCED_MMIO:
		return KVM_COALESCED_MMIO_PAGE_OFFSET;
	case KVM_CAP_NR_VCPUS:
		return cap_vcpus();
	case KVM_CAP_MAX_VCPUS:
		return VM_MAX_VCPUS;
	case KVM_CAP_MAX_VCPU_ID:
		return VM_MAX_VCPU_ID;
	case KVM_CAP_NR_MEMSLOTS:
		return VM_MAX_SLOTS;
	case KVM_CAP_MCE:
		return MCE_BANKS;
	case KVM_CAP_X2APIC_API:
		return KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
	case KVM_CAP_X86_DISABLE_EXITS:
		return KVM_X86_DISABLE_EXITS_MWAIT | KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE | KVM_X86_DISABLE_EXITS_CSTATE;
	case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
		return KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
	case KVM_CAP_X86_USER_SPACE_MSR:
		return KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;
	case KVM_CAP_SYNC_REGS:
		return KVM_SYNC_X86_VALID_FIELDS;
	case KVM_CAP_SET_GUEST_DEBUG2:
		return KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_USE_HW_BP |
			KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP | KVM_GUESTDBG_BLOCKIRQ;
	case KVM_CAP_EXIT_HYPERCALL:
		return 1 << 12;         /* KVM_HC_MAP_GPA_RANGE */
	case KVM_CAP_DISABLE_QUIRKS2:
		return 0x7f;
	case KVM_CAP_XSAVE2:
		return (int)MAX((size_t)xsave_size(xsave_supported()), sizeof(struct kvm_xsave));
	case KVM_CAP_DIRTY_LOG_RING: case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
		return ring_cap_bytes();
	case SOFTKVM_CAP_TRANSLATE:
	case SOFTKVM_CAP_PROFILE:
		return 1;
	case SOFTKVM_CAP_CODE_WRITTEN:
		if (vm)
			vm->client_tells_code = true;
		return 1;
	default:
		return 0;
	}
}

/* -- CPUID and MSR tables --------------------------------------------------------------------- */
static long get_cpuid(uintptr_t arg, bool emulated)
{
	struct kvm_cpuid_entry2 *e;
	struct kvm_cpuid2 h;
	long r;
	int n;

	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	if (h.nent < 1)
		return -E2BIG;
	e = calloc(MAX_CPUID_ENTRIES, sizeof *e);
	if (!e)
		return -ENOMEM;
	n = cpuid_supported(e, MIN(h.nent, (unsigned)MAX_CPUID_ENTRIES), emulated);
	r = n < 0 ? n : copy_to_client(arg + sizeof h, e, (size_t)n * sizeof *e);
	free(e);
	if (r)
		return r;
	h.nent = (uint32_t)n;
	return copy_to_client(arg, &h, sizeof h);
}

static long get_list(uintptr_t arg, const uint32_t *a, unsigned na, const uint32_t *b, unsigned nb)
{
	struct kvm_msr_list h;
	uint32_t room;

	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	room = h.nmsrs;
	h.nmsrs = na + nb;
	if (copy_to_client(arg, &h, sizeof h))
		return -EFAULT;
	if (room < na + nb)
		return -E2BIG;
	if (copy_to_client(arg + sizeof h, a, na * sizeof *a) || copy_to_client(arg + sizeof h + na * sizeof *a, b, nb * sizeof *b))
		return -EFAULT;
	return 0;
}

static long get_feature_msrs(uintptr_t arg)
{
	struct kvm_msrs h;
	struct kvm_msr_entry e;
	uint32_t i;

	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	if (h.nmsrs >= 256)
		return -E2BIG;
	for (i = 0; i < h.nmsrs; i++) {
		uintptr_t at = arg + sizeof h + i * sizeof e;
		uint64_t data;

		if (copy_from_client(&e, at, sizeof e))
			return -EFAULT;
		if (msr_feature_read(e.index, &data))
			break;
		e.data = data;
		if (copy_to_client(at, &e, sizeof e))
			return -EFAULT;
	}
	return (long)i;
}

/* -- dispatch --------------------------------------------------------------------------------- */
static long create_vm(unsigned long type, struct softkvm_file **created)
{
	struct vm *vm;
	int r;

	if (type)
		return -EINVAL;
	if (!created)
		return -EFAULT;
	r = vm_new(&vm);
	if (r)
		return r;
	vm_ref(vm);
	*created = file_new(FILE_VM, vm, NULL);
	vm_unref(vm);
	return *created ? 0 : -ENOMEM;
}

static long mce_cap(uintptr_t arg)
{
	uint64_t cap = MCE_CAP_SUPPORTED;

	return copy_to_client(arg, &cap, sizeof cap);
}

long system_ioctl(unsigned long req, uintptr_t arg, struct softkvm_file **created)
{
	switch (req) {
	case KVM_GET_API_VERSION: return arg ? -EINVAL : KVM_API_VERSION;
	case KVM_CREATE_VM: return create_vm(arg, created);
	case KVM_CHECK_EXTENSION: return check_extension(NULL, arg);
	case KVM_GET_VCPU_MMAP_SIZE: return arg ? -EINVAL : (long)(RUN_PAGES * API_PAGE);
	case KVM_GET_SUPPORTED_CPUID: return get_cpuid(arg, false);
	case KVM_GET_EMULATED_CPUID: return get_cpuid(arg, true);
	case KVM_GET_MSR_INDEX_LIST: return get_list(arg, msr_list, msr_list_n, msr_list_emulated, msr_list_emulated_n);
	case KVM_GET_MSR_FEATURE_INDEX_LIST: return get_list(arg, msr_list_features, msr_list_features_n, NULL, 0);
	case KVM_GET_MSRS: return get_feature_msrs(arg);
	case KVM_X86_GET_MCE_CAP_SUPPORTED: return mce_cap(arg);
	default: return -ENOTTY;
	}
}
