/* ioctls of a VM. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "softkvm/api/api.h"
#include "softkvm/bus.h"
#include "softkvm/irqchip.h"

#define MAX_ROUTES 4096

static long create_vcpu(struct vm *vm, unsigned long id, struct softkvm_file **created)
{
	struct softkvm_file *f = NULL;
	struct vcpu *v = NULL;
	unsigned n;
	long r = 0;

	if (!created)
		return -EFAULT;
	pthread_mutex_lock(&vm->lock);
	n = atomic_load(&vm->ncpus);
	if (id >= vm->api->max_vcpu_ids || n >= VM_MAX_VCPUS)
		r = -EINVAL;
	for (unsigned i = 0; !r && i < n; i++)
		if (atomic_load(&vm->cpus[i])->id == id)
			r = -EEXIST;
	if (!r)
		r = vcpu_new(vm, id, &v);
	if (!r && !(f = file_new(FILE_VCPU, vm, v))) {
		vcpu_free(v);
		r = -ENOMEM;
	}
	if (!r) {
		atomic_store(&vm->cpus[n], &v->cpu);
		atomic_store(&vm->ncpus, n + 1);
		if (n == 1) {           /* the first is not alone any more, and knows it from here on */
			vm_pause_all(vm, NULL);
			vm_resume_all(vm, NULL);
		}
		*created = f;
	}
	pthread_mutex_unlock(&vm->lock);
	return r;
}

/* -- interrupt controllers -------------------------------------------------------------------- */
static long create_irqchip(struct vm *vm)
{
	long r;

	pthread_mutex_lock(&vm->lock);
	r = vm->irqchip ? -EEXIST : atomic_load(&vm->ncpus) ? -EINVAL : irqchip_create(vm);
	pthread_mutex_unlock(&vm->lock);
	return r;
}

static long create_pit(struct vm *vm, const struct kvm_pit_config *cfg)
{
	long r;

	pthread_mutex_lock(&vm->lock);
	if (vm->pit)
		r = -EEXIST;
	else if (!vm->irqchip || vm->split_irqchip)
		r = -ENOENT;
	else if (!(r = irqchip_create_pit(vm, cfg)))
		vm->pit = true;
	pthread_mutex_unlock(&vm->lock);
	return r;
}

static long irq_line(struct vm *vm, uintptr_t arg, bool status)
{
	struct kvm_irq_level l;
	int r;

	if (copy_from_client(&l, arg, sizeof l))
		return -EFAULT;
	if (!vm->irqchip)
		return -ENXIO;
	r = irqchip_line(vm, l.irq, (int)l.level, 0);
	if (r < 0 && !status)
		return r == -1 ? 0 : r; /* masked or unrouted is no error */
	if (!status)
		return 0;
	l.status = r;
	return copy_to_client(arg, &l, sizeof l);
}

static long chip(struct vm *vm, uintptr_t arg, bool set)
{
	struct kvm_irqchip c;
	long r;

	if (copy_from_client(&c, arg, sizeof c))
		return -EFAULT;
	if (!vm->irqchip || vm->split_irqchip)
		return -ENXIO;
	r = set ? irqchip_set(vm, &c) : irqchip_get(vm, &c);
	return r ? r : set ? 0 : copy_to_client(arg, &c, sizeof c);
}

static long pit2(struct vm *vm, uintptr_t arg, bool set, size_t size)
{
	struct kvm_pit_state2 s = { 0 };
	long r;

	if (!vm->pit)
		return -ENXIO;
	if (set) {
		/* KVM_SET_PIT knows no flags: keep them. */
		if (size < sizeof s)
			irqchip_get_pit2(vm, &s);
		return copy_from_client(&s, arg, size) ? -EFAULT : irqchip_set_pit2(vm, &s);
	}
	r = irqchip_get_pit2(vm, &s);
	return r ? r : copy_to_client(arg, &s, size);
}

static long set_routing(struct vm *vm, uintptr_t arg)
{
	struct kvm_irq_routing h;
	struct kvm_irq_routing_entry *e;
	long r;

	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	if (!vm->irqchip || h.nr > MAX_ROUTES || h.flags)
		return -EINVAL;
	e = calloc(h.nr + 1, sizeof *e);
	if (!e)
		return -ENOMEM;
	r = copy_from_client(e, arg + sizeof h, h.nr * sizeof *e);
	if (!r)
		r = irqchip_set_routing(vm, e, h.nr);
	free(e);
	return r;
}

static long signal_msi(struct vm *vm, const struct kvm_msi *m)
{
	if (!vm->irqchip || m->flags)
		return -EINVAL;
	return irqchip_msi(vm, m->address_lo | (uint64_t)m->address_hi << 32, m->data);
}

static long reinject(struct vm *vm, const struct kvm_reinject_control *c)
{
	return vm->pit ? irqchip_reinject(vm, c->pit_reinject) : -ENXIO;
}

/* -- the rest --------------------------------------------------------------------------------- */
static long set_boot_cpu(struct vm *vm, unsigned long id)
{
	long r = 0;

	pthread_mutex_lock(&vm->lock);
	if (atomic_load(&vm->ncpus))
		r = -EBUSY;
	else
		vm->boot_cpu_id = (uint32_t)id;
	pthread_mutex_unlock(&vm->lock);
	return r;
}

static long set_identity_map(struct vm *vm)
{
	return atomic_load(&vm->ncpus) ? -EINVAL : 0;   /* kept for the caller's sake: nothing of ours lies there */
}

static long set_mmu_pages(struct vm *vm, unsigned long n)
{
	if (n < 64)
		return -EINVAL;
	vm->api->nr_mmu_pages = (uint32_t)n;
	return 0;
}

static long set_tsc_khz(struct vm *vm, unsigned long khz)
{
	long r = 0;

	pthread_mutex_lock(&vm->lock);
	if (khz > (unsigned long)tsc_khz_host() * 250)
		r = -EINVAL;
	else
		vm->api->tsc_khz = khz ? (uint32_t)khz : tsc_khz_host();
	pthread_mutex_unlock(&vm->lock);
	return r;
}

static long set_clock(struct vm *vm, const struct kvm_clock_data *d)
{
	if (d->flags & ~(uint32_t)(KVM_CLOCK_REALTIME | KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC))
		return -EINVAL;
	clock_set(vm, d);
	return 0;
}

union arg {
	struct kvm_userspace_memory_region region;
	struct kvm_dirty_log dirty;
	struct kvm_clear_dirty_log clear;
	struct kvm_pit_config pit;
	struct kvm_msi msi;
	struct kvm_irqfd irqfd;
	struct kvm_ioeventfd ioeventfd;
	struct kvm_coalesced_mmio_zone zone;
	struct kvm_clock_data clock;
	struct kvm_enable_cap cap;
	struct kvm_reinject_control reinject;
	struct kvm_device_attr attr;
	uint64_t u64;
};

/* Requests whose argument is a structure read in whole. */
static size_t arg_size(unsigned long req)
{
	switch (req) {
	case KVM_SET_USER_MEMORY_REGION: return sizeof(struct kvm_userspace_memory_region);
	case KVM_GET_DIRTY_LOG: return sizeof(struct kvm_dirty_log);
	case KVM_CLEAR_DIRTY_LOG: return sizeof(struct kvm_clear_dirty_log);
	case KVM_CREATE_PIT2: return sizeof(struct kvm_pit_config);
	case KVM_SIGNAL_MSI: return sizeof(struct kvm_msi);
	case KVM_IRQFD: return sizeof(struct kvm_irqfd);
	case KVM_IOEVENTFD: return sizeof(struct kvm_ioeventfd);
	case KVM_REGISTER_COALESCED_MMIO:
	case KVM_UNREGISTER_COALESCED_MMIO: return sizeof(struct kvm_coalesced_mmio_zone);
	case KVM_SET_CLOCK: return sizeof(struct kvm_clock_data);
	case KVM_ENABLE_CAP: return sizeof(struct kvm_enable_cap);
	case KVM_REINJECT_CONTROL: return sizeof(struct kvm_reinject_control);
	case KVM_SET_IDENTITY_MAP_ADDR: return sizeof(uint64_t);
	default: return 0;
	}
}

static long do_struct(struct vm *vm, unsigned long req, const union arg *a)
{
	switch (req) {
	case KVM_SET_USER_MEMORY_REGION: return phys_set_region(vm, &a->region);
	case KVM_GET_DIRTY_LOG: return phys_get_dirty(vm, &a->dirty);
	case KVM_CLEAR_DIRTY_LOG: return phys_clear_dirty(vm, &a->clear);
	case KVM_CREATE_PIT2: return create_pit(vm, &a->pit);
	case KVM_SIGNAL_MSI: return signal_msi(vm, &a->msi);
	case KVM_IRQFD: return vm->irqchip ? irqchip_irqfd(vm, &a->irqfd) : -EINVAL;
	case KVM_IOEVENTFD: return bus_ioeventfd(vm, &a->ioeventfd);
	case KVM_REGISTER_COALESCED_MMIO: return bus_register_coalesced(vm, &a->zone);
	case KVM_UNREGISTER_COALESCED_MMIO: return bus_unregister_coalesced(vm, &a->zone);
	case KVM_SET_CLOCK: return set_clock(vm, &a->clock);
	case KVM_ENABLE_CAP: return vm_enable_cap(vm, &a->cap);
	case KVM_REINJECT_CONTROL: return reinject(vm, &a->reinject);
	default: return set_identity_map(vm);
	}
}

static long get_clock(struct vm *vm, uintptr_t arg)
{
	struct kvm_clock_data d;

	clock_get(vm, &d);
	return copy_to_client(arg, &d, sizeof d);
}

static long do_plain(struct vm *vm, unsigned long req, uintptr_t arg, struct softkvm_file **created)
{
	switch (req) {
	case KVM_CHECK_EXTENSION: return check_extension(vm, arg);
	case KVM_CREATE_VCPU: return create_vcpu(vm, arg, created);
	case KVM_GET_STATS_FD: return stats_open(vm, NULL, created);
	case KVM_SET_TSS_ADDR: return arg > (uint32_t)-3 * 4096ull ? -EINVAL : 0;
	case KVM_SET_NR_MMU_PAGES: return set_mmu_pages(vm, arg);
	case KVM_GET_NR_MMU_PAGES: return vm->api->nr_mmu_pages;
	case KVM_CREATE_IRQCHIP: return create_irqchip(vm);
	case KVM_CREATE_PIT: return create_pit(vm, &(struct kvm_pit_config){ .flags = KVM_PIT_SPEAKER_DUMMY });
	case KVM_IRQ_LINE: return irq_line(vm, arg, false);
	case KVM_IRQ_LINE_STATUS: return irq_line(vm, arg, true);
	case KVM_GET_IRQCHIP: return chip(vm, arg, false);
	case KVM_SET_IRQCHIP: return chip(vm, arg, true);
	case KVM_GET_PIT: return pit2(vm, arg, false, sizeof(struct kvm_pit_state));
	case KVM_SET_PIT: return pit2(vm, arg, true, sizeof(struct kvm_pit_state));
	case KVM_GET_PIT2: return pit2(vm, arg, false, sizeof(struct kvm_pit_state2));
	case KVM_SET_PIT2: return pit2(vm, arg, true, sizeof(struct kvm_pit_state2));
	case KVM_SET_GSI_ROUTING: return set_routing(vm, arg);
	case KVM_SET_BOOT_CPU_ID: return set_boot_cpu(vm, arg);
	case KVM_GET_CLOCK: return get_clock(vm, arg);
	case KVM_SET_TSC_KHZ: return set_tsc_khz(vm, arg);
	case KVM_GET_TSC_KHZ: return vm->api->tsc_khz;
	case KVM_RESET_DIRTY_RINGS: return ring_reset_all(vm);     /* the argument is not looked at; QEMU passes none */
	case KVM_X86_SET_MSR_FILTER: return vm_set_msr_filter(vm, arg);
	default: return -ENOTTY;
	}
}

long vm_ioctl(struct vm *vm, unsigned long req, uintptr_t arg, struct softkvm_file **created)
{
	size_t size = arg_size(req);
	union arg a;

	if (!size)
		return do_plain(vm, req, arg, created);
	memset(&a, 0, sizeof a);
	if (copy_from_client(&a, arg, size))
		return -EFAULT;
	return do_struct(vm, req, &a);
}
