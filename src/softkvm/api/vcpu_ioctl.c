/* ioctls of a vCPU. Each is a few lines: copy in, check as Linux does, do, copy out. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "softkvm/api/api.h"
#include "softkvm/events.h"
#include "softkvm/fpu.h"
#include "softkvm/irqchip.h"
#include "softkvm/mmu.h"

#define MAX_CPUID_ENTRIES 256
#define MAX_MSRS 256

/* -- MSRs, CPUID ------------------------------------------------------------------------------ */
static long do_msrs(struct cpu *c, uintptr_t arg, bool write)
{
	struct kvm_msrs h;
	struct kvm_msr_entry *e;
	uintptr_t at = arg + sizeof h;
	uint32_t i;
	long r;

	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	if (h.nmsrs >= MAX_MSRS)
		return -E2BIG;
	e = calloc(h.nmsrs + 1, sizeof *e);
	if (!e)
		return -ENOMEM;
	r = copy_from_client(e, at, h.nmsrs * sizeof *e);
	for (i = 0; !r && i < h.nmsrs; i++) {
		uint64_t v = e[i].data;

		if (write ? msr_write(c, e[i].index, v, true) : msr_read(c, e[i].index, &v, true))
			break;
		e[i].data = v;
	}
	if (!r && !write)
		r = copy_to_client(at, e, h.nmsrs * sizeof *e);
	free(e);
	return r ? r : (long)i;
}

static bool same_entry(struct cpu *c, struct kvm_cpuid_entry2 a, struct kvm_cpuid_entry2 b)
{
	cpuid_runtime(c, &a);
	cpuid_runtime(c, &b);
	return a.function == b.function && a.index == b.index && a.flags == b.flags && a.eax == b.eax && a.ebx == b.ebx &&
		a.ecx == b.ecx && a.edx == b.edx;
}

static bool same_cpuid(struct cpu *c, const struct kvm_cpuid_entry2 *e, unsigned n)
{
	if (c->feat->n != n)
		return false;
	for (unsigned i = 0; i < n; i++)
		if (!same_entry(c, c->feat->e[i], e[i]))
			return false;
	return true;
}

/* After the first KVM_RUN only the same table may be set again. */
static long install_cpuid(struct vcpu *v, const struct kvm_cpuid_entry2 *e, unsigned n)
{
	if (v->api->ran)
		return same_cpuid(&v->cpu, e, n) ? 0 : -EINVAL;
	return cpuid_set(&v->cpu, e, n);
}

static long set_cpuid2(struct vcpu *v, uintptr_t arg)
{
	struct kvm_cpuid_entry2 *e;
	struct kvm_cpuid2 h;
	long r;

	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	if (h.nent > MAX_CPUID_ENTRIES)
		return -E2BIG;
	e = calloc(h.nent + 1, sizeof *e);
	if (!e)
		return -ENOMEM;
	r = copy_from_client(e, arg + sizeof h, h.nent * sizeof *e);
	if (!r)
		r = install_cpuid(v, e, h.nent);
	free(e);
	return r;
}

static long set_cpuid(struct vcpu *v, uintptr_t arg)
{
	struct kvm_cpuid_entry2 *e;
	struct kvm_cpuid_entry old;
	struct kvm_cpuid h;
	long r = 0;

	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	if (h.nent > MAX_CPUID_ENTRIES)
		return -E2BIG;
	e = calloc(h.nent + 1, sizeof *e);
	if (!e)
		return -ENOMEM;
	for (uint32_t i = 0; !r && i < h.nent; i++) {
		r = copy_from_client(&old, arg + sizeof h + i * sizeof old, sizeof old);
		e[i] = (struct kvm_cpuid_entry2){ .function = old.function, .eax = old.eax, .ebx = old.ebx, .ecx = old.ecx, .edx = old.edx };
	}
	if (!r)
		r = install_cpuid(v, e, h.nent);
	free(e);
	return r;
}

static long get_cpuid2(struct vcpu *v, uintptr_t arg)
{
	const struct cpu_features *f = v->cpu.feat;
	struct kvm_cpuid2 h;
	bool small;

	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	small = h.nent < f->n;
	h.nent = f->n;
	for (unsigned i = 0; !small && i < f->n; i++) {
		struct kvm_cpuid_entry2 e = f->e[i];

		cpuid_runtime(&v->cpu, &e);
		if (copy_to_client(arg + sizeof h + i * sizeof e, &e, sizeof e))
			return -EFAULT;
	}
	if (copy_to_client(arg, &h, sizeof h))
		return -EFAULT;
	return small ? -E2BIG : 0;
}

/* -- FPU -------------------------------------------------------------------------------------- */
static size_t xsave_area(void)
{
	return MAX((size_t)xsave_size(xsave_supported()), sizeof(struct kvm_xsave));
}

static long do_xsave(struct cpu *c, uintptr_t arg, bool set, size_t len)
{
	uint8_t *area = aligned_alloc(64, ALIGN_UP(len, (size_t)64));
	long r = -ENOMEM;

	if (!area)
		return r;
	memset(area, 0, len);
	if (set) {
		r = copy_from_client(area, arg, len);
		if (!r)
			r = fpu_from_xsave(c, area, len);
	} else {
		fpu_to_xsave(c, area, len);
		r = copy_to_client(arg, area, len);
	}
	free(area);
	return r;
}

static long set_xcrs(struct cpu *c, const struct kvm_xcrs *x)
{
	if (x->nr_xcrs > KVM_MAX_XCRS || x->flags)
		return -EINVAL;
	for (uint32_t i = 0; i < x->nr_xcrs; i++)
		if (x->xcrs[i].xcr == 0)
			return xcr0_write(c, x->xcrs[i].value) ? 0 : -EINVAL;
	return 0;
}

/* -- events, state ---------------------------------------------------------------------------- */
static long set_mp_state(struct vcpu *v, uint32_t s)
{
	struct cpu *c = &v->cpu;

	if (!c->lapic && s != KVM_MP_STATE_RUNNABLE)
		return -EINVAL;
	switch (s) {
	case KVM_MP_STATE_RUNNABLE: case KVM_MP_STATE_UNINITIALIZED: case KVM_MP_STATE_INIT_RECEIVED: case KVM_MP_STATE_HALTED:
		vcpu_set_running_state(v, s);
		cpu_request(c, REQ_EVENT);
		return 0;
	case KVM_MP_STATE_SIPI_RECEIVED:
		vcpu_set_running_state(v, KVM_MP_STATE_INIT_RECEIVED);
		cpu_request(c, REQ_EVENT);
		return 0;
	default:
		return -EINVAL;
	}
}

static uint32_t get_mp_state(struct vcpu *v)
{
	uint32_t s;

	vcpu_init_sipi(&v->cpu);
	s = atomic_load(&v->mp_state);
	if (s == KVM_MP_STATE_HALTED && !v->cpu.halted)
		s = KVM_MP_STATE_RUNNABLE;
	return v->cpu.halted && s == KVM_MP_STATE_RUNNABLE ? KVM_MP_STATE_HALTED : s;
}

static long set_signal_mask(struct vcpu *v, uintptr_t arg)
{
	struct kvm_signal_mask h;
	uint64_t set;

	if (!arg) {
		v->has_sigmask = false;
		return 0;
	}
	if (copy_from_client(&h, arg, sizeof h))
		return -EFAULT;
	if (h.len != sizeof set)
		return -EINVAL;
	if (copy_from_client(&set, arg + sizeof h, sizeof set))
		return -EFAULT;
	set &= ~(1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1));
	v->sigmask = set;
	v->has_sigmask = true;
	return 0;
}

static long do_interrupt(struct cpu *c, uint32_t vector)
{
	if (vector > 255)
		return -EINVAL;
	if (c->lapic && !c->vm->split_irqchip)
		return -ENXIO;
	return c->lapic ? lapic_queue_ext(c, vector) : event_queue_ext(c, vector);
}

static void translate(struct cpu *c, struct kvm_translation *t)
{
	uint64_t gpa;
	bool w, u;

	t->valid = mmu_translate(c, t->linear_address, &gpa, &w, &u);
	t->physical_address = t->valid ? gpa : ~0ull;
	/* What Linux has always answered. */
	t->writeable = 1;
	t->usermode = 0;
}

/* -- TSC -------------------------------------------------------------------------------------- */
static long device_attr(struct cpu *c, unsigned long req, const struct kvm_device_attr *a)
{
	uint64_t off;

	if (a->group != KVM_VCPU_TSC_CTRL || a->attr != KVM_VCPU_TSC_OFFSET)
		return -ENXIO;
	switch (req) {
	case KVM_HAS_DEVICE_ATTR:
		return 0;
	case KVM_GET_DEVICE_ATTR:
		off = c->msr.tsc_offset;
		return copy_to_client(a->addr, &off, sizeof off);
	default:
		if (copy_from_client(&off, a->addr, sizeof off))
			return -EFAULT;
		tsc_set_offset(c, off);
		return 0;
	}
}

static long vcpu_enable_cap(struct vcpu *v, const struct kvm_enable_cap *cap)
{
	if (cap->flags)
		return -EINVAL;
	if (cap->cap == KVM_CAP_ENFORCE_PV_FEATURE_CPUID) {
		v->api->enforce_pv = cap->args[0];
		return 0;
	}
	return -EINVAL;
}

/* -- dispatch --------------------------------------------------------------------------------- */
/* The argument structure on the stack: read in by requests that have one, written back where the request says so. */
union arg {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_sregs2 sregs2;
	struct kvm_fpu fpu;
	struct kvm_debugregs debugregs;
	struct kvm_xcrs xcrs;
	struct kvm_lapic_state lapic;
	struct kvm_mp_state mp;
	struct kvm_vcpu_events events;
	struct kvm_interrupt irq;
	struct kvm_guest_debug debug;
	struct kvm_translation tr;
	struct kvm_tpr_access_ctl tpr;
	struct kvm_vapic_addr vapic;
	struct kvm_x86_mce mce;
	struct kvm_device_attr attr;
	struct kvm_enable_cap cap;
	uint64_t u64;
};

enum { IN = 1, OUT = 2 };

/* Size and direction of the requests that take a plain structure; 0: no such request here. */
static unsigned arg_shape(unsigned long req, size_t *size)
{
	switch (req) {
#define SHAPE(r, field, dir) case r: *size = sizeof ((union arg *)0)->field; return dir
	SHAPE(KVM_GET_REGS, regs, OUT);
	SHAPE(KVM_SET_REGS, regs, IN);
	SHAPE(KVM_GET_SREGS, sregs, OUT);
	SHAPE(KVM_SET_SREGS, sregs, IN);
	SHAPE(KVM_GET_SREGS2, sregs2, OUT);
	SHAPE(KVM_SET_SREGS2, sregs2, IN);
	SHAPE(KVM_GET_FPU, fpu, OUT);
	SHAPE(KVM_SET_FPU, fpu, IN);
	SHAPE(KVM_GET_DEBUGREGS, debugregs, OUT);
	SHAPE(KVM_SET_DEBUGREGS, debugregs, IN);
	SHAPE(KVM_GET_XCRS, xcrs, OUT);
	SHAPE(KVM_SET_XCRS, xcrs, IN);
	SHAPE(KVM_GET_LAPIC, lapic, OUT);
	SHAPE(KVM_SET_LAPIC, lapic, IN);
	SHAPE(KVM_GET_MP_STATE, mp, OUT);
	SHAPE(KVM_SET_MP_STATE, mp, IN);
	SHAPE(KVM_GET_VCPU_EVENTS, events, OUT);
	SHAPE(KVM_SET_VCPU_EVENTS, events, IN);
	SHAPE(KVM_INTERRUPT, irq, IN);
	SHAPE(KVM_SET_GUEST_DEBUG, debug, IN);
	SHAPE(KVM_TRANSLATE, tr, IN | OUT);
	SHAPE(KVM_TPR_ACCESS_REPORTING, tpr, IN | OUT);
	SHAPE(KVM_SET_VAPIC_ADDR, vapic, IN);
	SHAPE(KVM_X86_SETUP_MCE, u64, IN);
	SHAPE(KVM_X86_SET_MCE, mce, IN);
	SHAPE(KVM_SET_DEVICE_ATTR, attr, IN);
	SHAPE(KVM_GET_DEVICE_ATTR, attr, IN);
	SHAPE(KVM_HAS_DEVICE_ATTR, attr, IN);
	SHAPE(KVM_ENABLE_CAP, cap, IN);
#undef SHAPE
	default: return 0;
	}
}

static long get_lapic(struct cpu *c, struct kvm_lapic_state *s)
{
	return c->lapic ? lapic_get(c, s) : -EINVAL;
}

static long do_state(struct vcpu *v, unsigned long req, union arg *a)
{
	struct cpu *c = &v->cpu;

	switch (req) {
	case KVM_GET_REGS: regs_get(c, &a->regs); return 0;
	case KVM_SET_REGS: regs_set(c, &a->regs); return 0;
	case KVM_GET_SREGS: sregs_get(c, &a->sregs); return 0;
	case KVM_SET_SREGS: return sregs_set(c, &a->sregs);
	case KVM_GET_SREGS2: sregs2_get(c, &a->sregs2); return 0;
	case KVM_SET_SREGS2: return sregs2_set(c, &a->sregs2);
	case KVM_GET_FPU: fpu_to_kvm(&c->fpu, &a->fpu); return 0;
	case KVM_SET_FPU: fpu_from_kvm(&c->fpu, &a->fpu); return 0;
	case KVM_GET_DEBUGREGS: debugregs_get(c, &a->debugregs); return 0;
	case KVM_SET_DEBUGREGS: return debugregs_set(c, &a->debugregs);
	case KVM_GET_XCRS:
		a->xcrs = (struct kvm_xcrs){ .nr_xcrs = 1, .xcrs[0].value = c->xcr0 };
		return 0;
	case KVM_SET_XCRS: return set_xcrs(c, &a->xcrs);
	case KVM_GET_LAPIC: return get_lapic(c, &a->lapic);
	case KVM_SET_LAPIC: return c->lapic ? lapic_set(c, &a->lapic) : -EINVAL;
	case KVM_GET_MP_STATE: a->mp.mp_state = get_mp_state(v); return 0;
	case KVM_SET_MP_STATE: return set_mp_state(v, a->mp.mp_state);
	case KVM_GET_VCPU_EVENTS: memset(&a->events, 0, sizeof a->events); events_get(c, &a->events); return 0;
	case KVM_SET_VCPU_EVENTS: return events_set(c, &a->events);
	case KVM_INTERRUPT: return do_interrupt(c, a->irq.irq);
	case KVM_SET_GUEST_DEBUG: return debug_set(c, &a->debug);
	case KVM_TRANSLATE: translate(c, &a->tr); return 0;
	case KVM_TPR_ACCESS_REPORTING: return 0;        /* accepted; accesses are never slow enough to be reported */
	case KVM_SET_VAPIC_ADDR: return c->lapic ? 0 : -EINVAL;
	case KVM_X86_SETUP_MCE: return mce_setup(c, a->u64);
	case KVM_X86_SET_MCE: return mce_set(c, &a->mce);
	case KVM_ENABLE_CAP: return vcpu_enable_cap(v, &a->cap);
	default: return device_attr(c, req, &a->attr);
	}
}

static long do_plain(struct vcpu *v, unsigned long req, uintptr_t arg)
{
	struct cpu *c = &v->cpu;

	switch (req) {
	case KVM_RUN: return arg ? -EINVAL : vcpu_run(v);
	case KVM_GET_MSRS: return do_msrs(c, arg, false);
	case KVM_SET_MSRS: return do_msrs(c, arg, true);
	case KVM_SET_CPUID: return set_cpuid(v, arg);
	case KVM_SET_CPUID2: return set_cpuid2(v, arg);
	case KVM_GET_CPUID2: return get_cpuid2(v, arg);
	case KVM_GET_XSAVE: return do_xsave(c, arg, false, sizeof(struct kvm_xsave));
	case KVM_GET_XSAVE2: return do_xsave(c, arg, false, xsave_area());
	case KVM_SET_XSAVE: return do_xsave(c, arg, true, xsave_area());
	case KVM_SET_SIGNAL_MASK: return set_signal_mask(v, arg);
	case KVM_SET_TSC_KHZ: return tsc_set_khz(c, (uint32_t)arg);
	case KVM_GET_TSC_KHZ: return v->api->tsc_khz;
	case KVM_NMI:
		c->nmi_pending = true;
		cpu_request(c, REQ_EVENT);
		return 0;
	case KVM_KVMCLOCK_CTRL:
		if (!(v->api->system_time & 1))
			return -EINVAL;
		v->api->clock_stopped = true;
		cpu_request(c, REQ_CLOCK);
		return 0;
	default: return -ENOTTY;
	}
}

static long vcpu_ioctl_locked(struct vcpu *v, unsigned long req, uintptr_t arg)
{
	union arg a;
	size_t size = 0;
	unsigned shape = arg_shape(req, &size);
	long r;

	if (!shape)
		return do_plain(v, req, arg);
	if (shape & IN && copy_from_client(&a, arg, size))
		return -EFAULT;
	r = do_state(v, req, &a);
	if (r >= 0 && shape & OUT && copy_to_client(arg, &a, size))
		return -EFAULT;
	return r;
}

long vcpu_ioctl(struct vcpu *v, unsigned long req, uintptr_t arg, struct softkvm_file **created)
{
	long r;

	if (_IOC_TYPE(req) != KVMIO)
		return -EINVAL;
	if (req == KVM_GET_STATS_FD)
		return stats_open(v->cpu.vm, v, created);
	pthread_mutex_lock(&v->lock);
	r = vcpu_ioctl_locked(v, req, arg);
	pthread_mutex_unlock(&v->lock);
	return r;
}
