/*
 * kvmclock and steal time (Linux Documentation/virt/kvm/x86/msr.rst).
 *
 * One linear map from the host's TSC to kvmclock ns serves the whole VM, so that all vCPUs' pages
 * agree and the TSC-stable flag may be set: the guest then trusts any page on any vCPU.
 */
#include <asm/kvm_para.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "softkvm/api/api.h"

/* struct pvclock_vcpu_time_info and pvclock_wall_clock: ABI between guest and host. */
struct pvclock_time {
	uint32_t version, pad0;
	uint64_t tsc_timestamp, system_time;
	uint32_t mul;
	int8_t shift;
	uint8_t flags, pad[2];
};
struct pvclock_wall { uint32_t version, sec, nsec; };
enum { PVCLOCK_TSC_STABLE = 1, PVCLOCK_GUEST_STOPPED = 2 };

#define STEAL_PERIOD_NS 10000000u

static uint64_t real_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int64_t clock_at(const struct vm_api *a, uint64_t tsc)
{
	int64_t d = (int64_t)(tsc - a->clock_tsc);

	return a->clock_ns + (int64_t)((__int128)d * 1000000 / tsc_khz_host());
}

void clock_vm_init(struct vm *vm)
{
	vm->api->clock_ns = 0;
	vm->api->clock_tsc = __rdtsc();
}

uint64_t clock_get(struct vm *vm, struct kvm_clock_data *d)
{
	struct vm_api *a = vm->api;
	uint64_t tsc, ns;

	pthread_mutex_lock(&a->clock_lock);
	tsc = __rdtsc();
	ns = (uint64_t)clock_at(a, tsc);
	pthread_mutex_unlock(&a->clock_lock);
	if (d)
		*d = (struct kvm_clock_data){ .clock = ns, .realtime = real_ns(), .host_tsc = tsc,
			.flags = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC };
	return ns;
}

void clock_set(struct vm *vm, const struct kvm_clock_data *d)
{
	struct vm_api *a = vm->api;
	uint64_t ns = d->clock;

	if (d->flags & KVM_CLOCK_REALTIME) {
		uint64_t now = real_ns();

		if (now > d->realtime)
			ns += now - d->realtime;
	}
	pthread_mutex_lock(&a->clock_lock);
	a->clock_tsc = __rdtsc();
	a->clock_ns = (int64_t)ns;
	pthread_mutex_unlock(&a->clock_lock);
	vm_request_all(vm, REQ_CLOCK, NULL);
}

/* ns = (tsc << shift or >> -shift) * mul >> 32 */
static void clock_scale(uint32_t khz, uint32_t *mul, int8_t *shift)
{
	uint64_t hz = (uint64_t)khz * 1000;
	int s = 0;

	while (hz > 2000000000u) {
		hz >>= 1;
		s--;
	}
	while (hz <= 1000000000u) {
		hz <<= 1;
		s++;
	}
	/* Recomputed from the unshifted frequency so that no bits are lost. */
	hz = (uint64_t)khz * 1000;
	*mul = (uint32_t)(s < 0 ? ((unsigned __int128)1000000000u << (32 - s)) / hz
				: ((unsigned __int128)1000000000u << 32) / (hz << s));
	*shift = (int8_t)s;
}

static void kvmclock_write(struct cpu *c)
{
	struct vcpu_api *a = c->vcpu->api;
	struct vm_api *va = c->vm->api;
	uint64_t gpa = a->system_time & ~1ull, host;
	struct pvclock_time t = { 0 }, old;

	if (!(a->system_time & KVM_MSR_ENABLED) || phys_read(c->vm, gpa, &old, sizeof old))
		return;
	pthread_mutex_lock(&va->clock_lock);
	host = va->clock_tsc;
	t.system_time = (uint64_t)va->clock_ns;
	pthread_mutex_unlock(&va->clock_lock);
	t.tsc_timestamp = (a->tsc_ratio ? (uint64_t)((unsigned __int128)host * a->tsc_ratio >> 48) : host) + c->msr.tsc_offset;
	clock_scale(a->tsc_khz, &t.mul, &t.shift);
	t.flags = PVCLOCK_TSC_STABLE | (old.flags & PVCLOCK_GUEST_STOPPED);
	if (a->clock_stopped) {
		t.flags |= PVCLOCK_GUEST_STOPPED;
		a->clock_stopped = false;
	}
	/* Odd while the rest changes (the guest retries), even afterwards; stores are not reordered on x86. */
	t.version = (old.version | 1) + (old.version & 1 ? 2 : 0);
	phys_write(c->vm, gpa, &t.version, 4);
	atomic_signal_fence(memory_order_seq_cst);
	phys_write(c->vm, gpa + 8, (uint8_t *)&t + 8, sizeof t - 8);
	atomic_signal_fence(memory_order_seq_cst);
	t.version++;
	phys_write(c->vm, gpa, &t.version, 4);
}

static void wall_clock_write(struct cpu *c, uint64_t gpa)
{
	struct pvclock_wall w;
	uint64_t ns;

	if (!gpa || phys_read(c->vm, gpa, &w, sizeof w))
		return;
	w.version = (w.version | 1) + 0;
	phys_write(c->vm, gpa, &w.version, 4);
	ns = real_ns() - clock_get(c->vm, NULL);
	w.sec = (uint32_t)(ns / 1000000000u);
	w.nsec = (uint32_t)(ns % 1000000000u);
	phys_write(c->vm, gpa + 4, &w.sec, 8);
	atomic_signal_fence(memory_order_seq_cst);
	w.version++;
	phys_write(c->vm, gpa, &w.version, 4);
}

/* The file that counts how long this thread waited for a CPU; opened once for each thread that runs the vCPU. */
void clock_steal_open(struct vcpu_api *a)
{
	int tid = (int)syscall(SYS_gettid);
	char name[64];

	if (a->tid == tid)
		return;
	if (a->steal_fd >= 0)
		close(a->steal_fd);
	snprintf(name, sizeof name, "/proc/self/task/%d/schedstat", tid);
	a->steal_fd = open(name, O_RDONLY | O_CLOEXEC);
	a->tid = tid;
	a->run_delay = UINT64_MAX;      /* another thread: start over */
}

/* ns this thread was runnable but did not run, from /proc; false where the host keeps no such count. */
static bool run_delay(struct vcpu_api *a, uint64_t *out)
{
	char buf[96];
	unsigned long long run, delay;
	ssize_t n;

	clock_steal_open(a);
	if (a->steal_fd < 0 || (n = pread(a->steal_fd, buf, sizeof buf - 1, 0)) <= 0)
		return false;
	buf[n] = 0;
	if (sscanf(buf, "%llu %llu", &run, &delay) != 2)
		return false;
	*out = delay;
	return true;
}

static void steal_write(struct cpu *c)
{
	struct vcpu_api *a = c->vcpu->api;
	uint64_t gpa = a->steal_time & KVM_STEAL_VALID_BITS, delay;
	struct kvm_steal_time st;

	if (!(a->steal_time & KVM_MSR_ENABLED) || phys_read(c->vm, gpa, &st, sizeof st))
		return;
	a->stolen_at = mono_ns();
	a->next_steal = a->stolen_at + STEAL_PERIOD_NS;
	if (!run_delay(a, &delay))
		return;
	if (a->run_delay == UINT64_MAX)
		a->run_delay = delay;
	st.steal += delay - a->run_delay;
	a->run_delay = delay;
	st.version = (st.version | 1) + (st.version & 1 ? 2 : 0);
	phys_write(c->vm, gpa + 8, &st.version, 4);
	atomic_signal_fence(memory_order_seq_cst);
	phys_write(c->vm, gpa, &st.steal, 8);
	st.preempted = 0;
	phys_write(c->vm, gpa + 16, &st.preempted, 1);
	atomic_signal_fence(memory_order_seq_cst);
	st.version++;
	phys_write(c->vm, gpa + 8, &st.version, 4);
}

void clock_update(struct cpu *c)
{
	kvmclock_write(c);
	steal_write(c);
}

/* -- their MSRs ------------------------------------------------------------------------------- */
static bool offered(const struct cpu *c, unsigned feature)
{
	return c->feat->kvm_features & (1u << feature);
}

bool kvmclock_msr_is(uint32_t msr)
{
	return msr == MSR_KVM_WALL_CLOCK || msr == MSR_KVM_SYSTEM_TIME || (msr >= MSR_KVM_WALL_CLOCK_NEW && msr <= 0x4b564dff);
}

/* Storage of a paravirtual MSR and the feature bit that offers it; NULL: there is none. */
static uint64_t *kvmclock_slot(struct cpu *c, uint32_t msr, unsigned *feature)
{
	struct vcpu_api *a = c->vcpu->api;

	switch (msr) {
	case MSR_KVM_WALL_CLOCK: *feature = KVM_FEATURE_CLOCKSOURCE; return &a->wall_clock;
	case MSR_KVM_WALL_CLOCK_NEW: *feature = KVM_FEATURE_CLOCKSOURCE2; return &a->wall_clock;
	case MSR_KVM_SYSTEM_TIME: *feature = KVM_FEATURE_CLOCKSOURCE; return &a->system_time;
	case MSR_KVM_SYSTEM_TIME_NEW: *feature = KVM_FEATURE_CLOCKSOURCE2; return &a->system_time;
	case MSR_KVM_STEAL_TIME: *feature = KVM_FEATURE_STEAL_TIME; return &a->steal_time;
	case MSR_KVM_POLL_CONTROL: *feature = KVM_FEATURE_POLL_CONTROL; return &a->poll_control;
	default: return NULL;
	}
}

/* Without KVM_CAP_ENFORCE_PV_FEATURE_CPUID Linux lets a guest use what CPUID does not offer; so do we. */
static bool refused(const struct cpu *c, unsigned feature)
{
	return c->vcpu->api->enforce_pv && !offered(c, feature);
}

int kvmclock_msr_read(struct cpu *c, uint32_t msr, uint64_t *v)
{
	unsigned feature;
	uint64_t *p = kvmclock_slot(c, msr, &feature);

	if (!p || refused(c, feature))
		return MSR_FAULT;
	*v = *p;
	return MSR_OK;
}

int kvmclock_msr_write(struct cpu *c, uint32_t msr, uint64_t v, bool host)
{
	struct vcpu_api *a = c->vcpu->api;
	unsigned feature;
	uint64_t *p = kvmclock_slot(c, msr, &feature);

	if (!p || refused(c, feature))
		return MSR_FAULT;
	if (p == &a->steal_time && (v & KVM_STEAL_RESERVED_MASK))
		return MSR_FAULT;
	if (p == &a->poll_control && v & ~1ull)
		return MSR_FAULT;
	*p = v;
	if (p == &a->wall_clock && !host)
		wall_clock_write(c, v);
	if (p == &a->steal_time) {
		a->run_delay = UINT64_MAX;
		if (!host)
			steal_write(c);
	}
	if (p == &a->system_time && !host)
		kvmclock_write(c);
	cpu_request(c, REQ_CLOCK);
	return MSR_OK;
}
