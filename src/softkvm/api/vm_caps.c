/* KVM_ENABLE_CAP and KVM_X86_SET_MSR_FILTER of a VM. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "softkvm/api/api.h"
#include "softkvm/jit/jit.h"
#include "softkvm/irqchip.h"

#define USER_MSR_REASONS (KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)
#define MAX_ROUTES 4096
#define DISABLE_EXITS (KVM_X86_DISABLE_EXITS_MWAIT | KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE | KVM_X86_DISABLE_EXITS_CSTATE)
#define QUIRKS (KVM_X86_QUIRK_LINT0_REENABLED | KVM_X86_QUIRK_CD_NW_CLEARED | KVM_X86_QUIRK_LAPIC_MMIO_HOLE | \
		KVM_X86_QUIRK_OUT_7E_INC_RIP | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT | KVM_X86_QUIRK_FIX_HYPERCALL_INSN | \
		KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)

static long split_irqchip(struct vm *vm, uint64_t routes)
{
	if (routes > MAX_ROUTES)
		return -EINVAL;
	if (vm->irqchip)
		return -EEXIST;
	if (atomic_load(&vm->ncpus))
		return -EINVAL;
	return irqchip_create_split(vm, (unsigned)routes);
}

static long enable_x2apic(struct vm *vm, uint64_t flags)
{
	if (flags & ~(uint64_t)(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK))
		return -EINVAL;
	if (flags & KVM_X2APIC_API_USE_32BIT_IDS)
		vm->policy.x2apic_32bit_ids = true;
	if (flags & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)
		vm->policy.x2apic_no_broadcast_quirk = true;
	return 0;
}

static long translate_enable(struct vm_policy *p, const __u64 *args)
{
	if ((args[0] > 2 && args[0] != SOFTKVM_TRANSLATE_AS_IS) || args[1] > SOFTKVM_CODE_MAX || (args[1] && args[1] < SOFTKVM_CODE_MIN) ||
	    args[2] > VM_MAX_VCPUS)
		return -EINVAL;
	if (args[0] != SOFTKVM_TRANSLATE_AS_IS) {
		p->translate = args[0];
		p->jit_mode = args[0] == 2 ? JIT_LOCKSTEP : JIT_NORMAL;
	}
	if (args[1])
		p->code_bytes = args[1];
	p->code_vcpus = (unsigned)args[2];
	return 0;
}

static long enable_locked(struct vm *vm, const struct kvm_enable_cap *cap)
{
	struct vm_policy *p = &vm->policy;
	uint64_t a = cap->args[0];

	switch (cap->cap) {
	case KVM_CAP_SPLIT_IRQCHIP:
		return split_irqchip(vm, a);
	case KVM_CAP_X2APIC_API:
		return enable_x2apic(vm, a);
	case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
		/* Bit 1, KVM_DIRTY_LOG_INITIALLY_SET, needs bit 0. */
		if (a & ~(uint64_t)(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET) || a == KVM_DIRTY_LOG_INITIALLY_SET)
			return -EINVAL;
		vm->manual_dirty_clear = a & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
		vm->dirty_initially_set = a & KVM_DIRTY_LOG_INITIALLY_SET;
		return 0;
	case KVM_CAP_EXCEPTION_PAYLOAD:
		p->exception_payload = a;
		return 0;
	case KVM_CAP_X86_TRIPLE_FAULT_EVENT:
		p->triple_fault_event = a;
		return 0;
	case KVM_CAP_MSR_PLATFORM_INFO:
		p->platform_info_hidden = !a;
		return 0;
	case KVM_CAP_X86_DISABLE_EXITS:
		if (a & ~(uint64_t)DISABLE_EXITS)
			return -EINVAL;
		p->disabled_exits |= (uint32_t)a;
		return 0;
	case KVM_CAP_X86_USER_SPACE_MSR:
		if (a & ~(uint64_t)USER_MSR_REASONS)
			return -EINVAL;
		p->user_msr = (uint32_t)a;
		return 0;
	case KVM_CAP_EXIT_HYPERCALL:
		if (a & ~BIT(12))       /* KVM_HC_MAP_GPA_RANGE */
			return -EINVAL;
		p->hypercall_exits = a;
		return 0;
	case KVM_CAP_EXIT_ON_EMULATION_FAILURE:
		if (a & ~1ull)
			return -EINVAL;
		p->emulation_exit = a;
		return 0;
	case KVM_CAP_DISABLE_QUIRKS2:
		if (a & ~(uint64_t)QUIRKS)
			return -EINVAL;
		/* fall through */
	case KVM_CAP_DISABLE_QUIRKS:
		p->quirks_off = a;
		return 0;
	case KVM_CAP_DIRTY_LOG_RING:
	case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
		return ring_enable(vm, a);
	case SOFTKVM_CAP_TRANSLATE:
		return translate_enable(p, cap->args);
	case SOFTKVM_CAP_PROFILE:
		return profile_start(vm, a);
	case KVM_CAP_MAX_VCPU_ID:
		if (!a || a > VM_MAX_VCPU_ID || vm->api->max_vcpu_ids_set)
			return -EINVAL;
		vm->api->max_vcpu_ids = (uint32_t)a;
		vm->api->max_vcpu_ids_set = true;
		return 0;
	default:
		return -EINVAL;
	}
}

long vm_enable_cap(struct vm *vm, const struct kvm_enable_cap *cap)
{
	long r;

	if (cap->flags)
		return -EINVAL;
	pthread_mutex_lock(&vm->lock);
	r = enable_locked(vm, cap);
	pthread_mutex_unlock(&vm->lock);
	return r;
}

/* -- MSR filter ------------------------------------------------------------------------------- */
void msr_filter_free(struct msr_filter *f)
{
	if (!f)
		return;
	for (unsigned i = 0; i < f->n; i++)
		free(f->r[i].bits);
	free(f);
}

static long add_range(struct msr_filter *f, const struct kvm_msr_filter_range *r)
{
	size_t bytes = ((size_t)r->nmsrs + 7) / 8;

	if (!r->nmsrs)
		return 0;
	if (r->flags & ~(uint32_t)(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE) || !r->flags || bytes > KVM_MSR_FILTER_MAX_BITMAP_SIZE)
		return -EINVAL;
	f->r[f->n].bits = malloc(bytes);
	if (!f->r[f->n].bits)
		return -ENOMEM;
	f->r[f->n].flags = r->flags;
	f->r[f->n].base = r->base;
	f->r[f->n].n = r->nmsrs;
	return copy_from_client(f->r[f->n++].bits, (uintptr_t)r->bitmap, bytes);
}

long vm_set_msr_filter(struct vm *vm, uintptr_t arg)
{
	struct kvm_msr_filter in;
	struct msr_filter *f, *old;
	long r = 0;
	bool empty = true;

	if (copy_from_client(&in, arg, sizeof in))
		return -EFAULT;
	if (in.flags & ~(uint32_t)KVM_MSR_FILTER_DEFAULT_DENY)
		return -EINVAL;
	for (unsigned i = 0; i < ARRAY_SIZE(in.ranges); i++)
		empty &= !in.ranges[i].nmsrs;
	if (empty && in.flags & KVM_MSR_FILTER_DEFAULT_DENY)
		return -EINVAL;
	f = calloc(1, sizeof *f);
	if (!f)
		return -ENOMEM;
	f->deny = in.flags & KVM_MSR_FILTER_DEFAULT_DENY;
	for (unsigned i = 0; !r && i < ARRAY_SIZE(in.ranges); i++)
		r = add_range(f, &in.ranges[i]);
	if (r) {
		msr_filter_free(f);
		return r;
	}
	pthread_mutex_lock(&vm->lock);
	vm_pause_all(vm, NULL);
	old = atomic_exchange(&vm->api->filter, f);
	vm_resume_all(vm, NULL);
	pthread_mutex_unlock(&vm->lock);
	msr_filter_free(old);
	return 0;
}
