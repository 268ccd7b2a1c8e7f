/* The KVM API without guest code: what each ioctl accepts, refuses and answers. */
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define UNMAPPED ((void *)0x10)

static void system_handle(void **state)
{
	struct gfile s, vm;

	assert_int_equal(gopen(&s, GUEST_SOFT), 0);
	assert_int_equal(gioctl_val(&s, KVM_GET_API_VERSION, 0), 12);
	assert_int_equal(gioctl_val(&s, KVM_GET_API_VERSION, 1), -EINVAL);
	assert_true(gioctl_val(&s, KVM_GET_VCPU_MMAP_SIZE, 0) >= 3 * 4096);
	assert_int_equal(gioctl_val(&s, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), 1);
	assert_int_equal(gioctl_val(&s, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE), 0);
	assert_int_equal(gioctl_val(&s, KVM_CHECK_EXTENSION, 99999), 0);
	assert_int_equal(gioctl_val(&s, KVM_RUN, 0), -ENOTTY);
	assert_int_equal(gioctl_val(&s, 0xdead, 0), -ENOTTY);
	assert_int_equal(gioctl(&s, KVM_CREATE_VM, (void *)5, &vm), -EINVAL);
	assert_int_equal(gioctl(&s, KVM_CREATE_VM, NULL, &vm), 0);
	assert_int_equal(gioctl_val(&vm, KVM_GET_API_VERSION, 0), -ENOTTY);
	assert_int_equal(gioctl_val(&vm, KVM_RUN, 0), -ENOTTY);
	gclose(&s);
	assert_int_equal(gioctl_val(&vm, KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP), 1);
	gclose(&vm);
}

struct cpuid { struct kvm_cpuid2 h; struct kvm_cpuid_entry2 e[256]; };

static struct kvm_cpuid_entry2 *leaf(struct cpuid *c, uint32_t f, uint32_t i)
{
	for (unsigned n = 0; n < c->h.nent; n++)
		if (c->e[n].function == f && c->e[n].index == i)
			return &c->e[n];
	return NULL;
}

static void supported_cpuid(void **state)
{
	struct cpuid *c = calloc(1, sizeof *c);
	struct gfile s;

	gopen(&s, GUEST_SOFT);
	c->h.nent = 1;
	assert_int_equal(gioctl(&s, KVM_GET_SUPPORTED_CPUID, c, NULL), -E2BIG);
	c->h.nent = 256;
	assert_int_equal(gioctl(&s, KVM_GET_SUPPORTED_CPUID, c, NULL), 0);
	assert_true(c->h.nent > 10 && c->h.nent < 128);
	assert_non_null(leaf(c, 1, 0));
	assert_true(leaf(c, 1, 0)->ecx & 1u << 31);             /* hypervisor */
	assert_true(leaf(c, 1, 0)->ecx & 1u << 21);             /* x2APIC */
	assert_false(leaf(c, 1, 0)->ecx & 1u << 24);            /* the deadline timer comes with the LAPIC: a capability tells */
	assert_true(gioctl(&s, KVM_CHECK_EXTENSION, (void *)KVM_CAP_TSC_DEADLINE_TIMER, NULL) > 0);
	assert_false(leaf(c, 1, 0)->ecx & 1u << 5);             /* VMX */
	assert_false(leaf(c, 0x80000001, 0)->ecx & 1u << 2);    /* SVM */
	assert_memory_equal(&leaf(c, 0x40000000, 0)->ebx, "KVMKVMKVM\0\0\0", 12);
	assert_false(leaf(c, 7, 0)->ebx & (1u << 4 | 1u << 11 | 1u << 14));     /* HLE, RTM, MPX */
	assert_true(leaf(c, 0x80000007, 0)->edx & 1u << 8);
	c->h.nent = 256;
	assert_int_equal(gioctl(&s, KVM_GET_EMULATED_CPUID, c, NULL), 0);
	gclose(&s);
	free(c);
}

/* What the host has of the x86-64 psABI's levels 2 to 4, which distributions build for, is offered whole. */
static void x86_64_levels(void **state)
{
	static const struct { uint32_t leaf, ecx, ebx; } need[] = {
		{ 1, 0x982201, 0 },             /* SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT */
		{ 1, 0x34401000, 0 },           /* FMA, MOVBE, XSAVE, AVX, F16C */
		{ 7, 0, 0x128 },                /* BMI1, AVX2, BMI2 */
		{ 0x80000001, 0x21, 0 },        /* LAHF, LZCNT */
		{ 7, 0, 0xd0030000 },           /* AVX512 F, DQ, CD, BW, VL */
	};
	struct cpuid *c = calloc(1, sizeof *c);
	struct gfile s;

	gopen(&s, GUEST_SOFT);
	c->h.nent = 256;
	assert_int_equal(gioctl(&s, KVM_GET_SUPPORTED_CPUID, c, NULL), 0);
	for (unsigned n = 0; n < sizeof need / sizeof *need; n++) {
		unsigned eax, ebx = 0, ecx = 0, edx;

		if (n == 4 && !__builtin_cpu_supports("avx512f"))       /* or the host's kernel has it off */
			continue;
		__get_cpuid_count(need[n].leaf, 0, &eax, &ebx, &ecx, &edx);
		assert_int_equal(leaf(c, need[n].leaf, 0)->ecx & need[n].ecx, ecx & need[n].ecx);
		assert_int_equal(leaf(c, need[n].leaf, 0)->ebx & need[n].ebx, ebx & need[n].ebx);
	}
	gclose(&s);
	free(c);
}

static void cpuid_set_get(void **state)
{
	struct cpuid *c = calloc(1, sizeof *c), *d = calloc(1, sizeof *d);
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	c->h.nent = d->h.nent = 256;
	assert_int_equal(gioctl(&g.sys, KVM_GET_SUPPORTED_CPUID, c, NULL), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_CPUID2, c, NULL), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_CPUID2, d, NULL), 0);
	assert_int_equal(c->h.nent, d->h.nent);
	for (unsigned i = 0; i < c->h.nent; i++) {
		assert_int_equal(c->e[i].function, d->e[i].function);
		/* These follow CR4, XCR0 and the APIC base, as the guest would see them. */
		if (c->e[i].function != 1 && c->e[i].function != 7 && c->e[i].function != 0xd)
			assert_memory_equal(&c->e[i], &d->e[i], sizeof c->e[i]);
	}
	d->h.nent = 1;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_CPUID2, d, NULL), -E2BIG);
	c->h.nent = 257;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_CPUID2, c, NULL), -E2BIG);
	guest_destroy(&g);
	free(c);
	free(d);
}

static void registers(void **state)
{
	struct kvm_regs r = { .rax = 1, .rbx = 2, .rcx = 3, .rdx = 4, .rsi = 5, .rdi = 6, .rsp = 7, .rbp = 8, .r8 = 9, .r15 = 10,
		.rip = 0x1234, .rflags = 0x246 }, q;
	struct kvm_sregs s, t;
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	guest_get_regs(&g, 0, &q);
	assert_int_equal(q.rip, 0xfff0);
	assert_int_equal(q.rflags, 2);
	guest_set_regs(&g, 0, &r);
	guest_get_regs(&g, 0, &q);
	assert_memory_equal(&r, &q, sizeof r);
	guest_get_sregs(&g, 0, &s);
	assert_int_equal(s.cs.base, 0xffff0000);
	assert_int_equal(s.cs.selector, 0xf000);
	assert_int_equal(s.cr0, 0x60000010);
	guest_long64(&g, 0, 0x10000);
	guest_get_sregs(&g, 0, &s);
	guest_set_sregs(&g, 0, &s);
	guest_get_sregs(&g, 0, &t);
	assert_memory_equal(&s, &t, sizeof s);
	s.cr0 &= ~1ull;         /* paging without protection */
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_SREGS, &s, NULL), -EINVAL);
	s = t;
	s.cr4 |= 1ull << 40;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_SREGS, &s, NULL), -EINVAL);
	guest_destroy(&g);
}

/* A client without leaf 0xd saves and restores XCR0 like any other, and finds the x87 bit in it. */
static void xcr0_without_xsave(void **state)
{
	struct cpuid *c = calloc(1, sizeof *c);
	struct kvm_xcrs x = { 0 };
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_CPUID2, c, NULL), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_XCRS, &x, NULL), 0);
	assert_int_equal(x.nr_xcrs, 1);
	assert_int_equal(x.xcrs[0].value, 1);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_XCRS, &x, NULL), 0);
	x.xcrs[0].value = 3;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_XCRS, &x, NULL), -EINVAL);
	guest_destroy(&g);
	free(c);
}

static void dirty_rings_are_reset_whatever_the_argument(void **state)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_DIRTY_LOG_RING, .args = { 4096 } };
	struct gfile s, vm;

	gopen(&s, GUEST_SOFT);
	assert_int_equal(gioctl(&s, KVM_CREATE_VM, NULL, &vm), 0);
	assert_int_equal(gioctl(&vm, KVM_ENABLE_CAP, &cap, NULL), 0);
	assert_int_equal(gioctl(&vm, KVM_RESET_DIRTY_RINGS, (void *)0x1234, NULL), 0);
	gclose(&vm);
	gclose(&s);
}

static void msrs(void **state)
{
	static const uint32_t plain[] = { 0x174, 0x175, 0x176, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000102, 0xc0000103, 0x277 };
	static const uint64_t value[] = { 8, 0x1000, 0x2000, 0x23001000000000, 0xffffffff81000000, 0xffffffff81000000,
		0xffff888000000000, 5, 0x0407050600070106 };
	struct { struct kvm_msrs h; struct kvm_msr_entry e[3]; } m = { .h.nmsrs = 3 };
	struct guest g;
	uint64_t v;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	for (unsigned i = 0; i < sizeof plain / sizeof plain[0]; i++) {
		assert_int_equal(guest_set_msr(&g, 0, plain[i], value[i]), 1);
		assert_int_equal(guest_get_msr(&g, 0, plain[i], &v), 1);
		assert_int_equal(v, value[i]);
	}
	assert_int_equal(guest_set_msr(&g, 0, 0xc0000082, 0x8000000000000000), 0);      /* not canonical */
	assert_int_equal(guest_set_msr(&g, 0, 0x277, 2), 0);                            /* reserved type */
	assert_int_equal(guest_get_msr(&g, 0, 0xdeadbeef, &v), 0);
	assert_int_equal(guest_get_msr(&g, 0, 0xfe, &v), 1);
	assert_int_equal(v & 0xff, 8);
	assert_int_equal(guest_set_msr(&g, 0, 0x200, 0xc0000006), 1);
	assert_int_equal(guest_set_msr(&g, 0, 0x201, 1), 0);
	assert_int_equal(guest_set_msr(&g, 0, 0x2ff, 0xc06), 1);
	assert_int_equal(guest_set_msr(&g, 0, 0x2ff, 0x102), 0);
	/* Stops at the first that fails and says how many were done. */
	m.e[0].index = 0x174;
	m.e[1].index = 0xdeadbeef;
	m.e[2].index = 0x175;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_MSRS, &m, NULL), 1);
	guest_destroy(&g);
}

static void msr_lists(void **state)
{
	struct { struct kvm_msr_list h; uint32_t i[256]; } l = { .h.nmsrs = 0 };
	struct guest g;
	uint64_t v;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .irqchip = true });
	assert_int_equal(gioctl(&g.sys, KVM_GET_MSR_INDEX_LIST, &l, NULL), -E2BIG);
	assert_true(l.h.nmsrs > 10);
	assert_int_equal(gioctl(&g.sys, KVM_GET_MSR_INDEX_LIST, &l, NULL), 0);
	/* Everything listed can be read and written back by the host. */
	for (unsigned i = 0; i < l.h.nmsrs; i++) {
		if (!guest_get_msr(&g, 0, l.i[i], &v))
			fail_msg("MSR %#x is listed but not readable", l.i[i]);
		if (!guest_set_msr(&g, 0, l.i[i], v))
			fail_msg("MSR %#x is listed but not writable", l.i[i]);
	}
	l.h.nmsrs = 256;
	assert_int_equal(gioctl(&g.sys, KVM_GET_MSR_FEATURE_INDEX_LIST, &l, NULL), 0);
	guest_destroy(&g);
}

static void time_(void **state)
{
	struct kvm_clock_data a, b;
	struct guest g;
	uint64_t t0, t1;
	long khz;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .nvcpus = 2 });
	khz = gioctl_val(&g.vcpu[0], KVM_GET_TSC_KHZ, 0);
	assert_true(khz > 100000);
	assert_int_equal(gioctl(&g.vm, KVM_GET_CLOCK, &a, NULL), 0);
	guest_get_msr(&g, 0, 0x10, &t0);
	usleep(20000);
	assert_int_equal(gioctl(&g.vm, KVM_GET_CLOCK, &b, NULL), 0);
	guest_get_msr(&g, 1, 0x10, &t1);
	assert_in_range(b.clock - a.clock, 20000000, 2000000000);
	/* Two vCPUs share one TSC, and it agrees with the clock. */
	assert_in_range(t1 - t0, 20ull * khz, 2000ull * khz);
	assert_in_range((t1 - t0) * 1000000 / khz * 100 / (b.clock - a.clock), 95, 105);
	b.clock = 5000000000ull;
	b.flags = 0;
	assert_int_equal(gioctl(&g.vm, KVM_SET_CLOCK, &b, NULL), 0);
	assert_int_equal(gioctl(&g.vm, KVM_GET_CLOCK, &a, NULL), 0);
	assert_in_range(a.clock, 5000000000ull, 6000000000ull);
	/* Half the frequency. */
	assert_int_equal(gioctl_val(&g.vcpu[0], KVM_SET_TSC_KHZ, khz / 2), 0);
	guest_get_msr(&g, 0, 0x10, &t0);
	assert_int_equal(gioctl(&g.vm, KVM_GET_CLOCK, &a, NULL), 0);
	usleep(20000);
	guest_get_msr(&g, 0, 0x10, &t1);
	assert_int_equal(gioctl(&g.vm, KVM_GET_CLOCK, &b, NULL), 0);
	assert_in_range((t1 - t0) * 2000000 / khz * 100 / (b.clock - a.clock), 95, 105);
	guest_destroy(&g);
}

static void tsc_offset(void **state)
{
	struct kvm_device_attr at = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET };
	struct guest g;
	uint64_t off, t0, t1;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	assert_int_equal(gioctl(&g.vcpu[0], KVM_HAS_DEVICE_ATTR, &at, NULL), 0);
	at.addr = (uintptr_t)&off;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_DEVICE_ATTR, &at, NULL), 0);
	guest_get_msr(&g, 0, 0x10, &t0);
	off += 1ull << 40;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_DEVICE_ATTR, &at, NULL), 0);
	guest_get_msr(&g, 0, 0x10, &t1);
	assert_in_range(t1 - t0, 1ull << 40, (1ull << 40) + 10000000000ull);
	at.group = 7;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_HAS_DEVICE_ATTR, &at, NULL), -ENXIO);
	guest_destroy(&g);
}

static void memory_slots(void **state)
{
	struct kvm_userspace_memory_region r = { .slot = 1, .guest_phys_addr = 0x10000000, .memory_size = 0x2000 };
	struct guest g;
	void *p = mmap(NULL, 0x2000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	r.userspace_addr = (uintptr_t)p;
	assert_int_equal(gioctl(&g.vm, KVM_SET_USER_MEMORY_REGION, &r, NULL), 0);
	r.slot = 2;             /* overlaps */
	assert_int_equal(gioctl(&g.vm, KVM_SET_USER_MEMORY_REGION, &r, NULL), -EEXIST);
	r.guest_phys_addr = 0x10002001;
	assert_int_equal(gioctl(&g.vm, KVM_SET_USER_MEMORY_REGION, &r, NULL), -EINVAL);
	r.slot = 1;
	r.memory_size = 0;
	r.guest_phys_addr = 0x10000000;
	assert_int_equal(gioctl(&g.vm, KVM_SET_USER_MEMORY_REGION, &r, NULL), 0);
	guest_destroy(&g);
	munmap(p, 0x2000);
}

static void irqchip_rules(void **state)
{
	struct kvm_mp_state mp;
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	assert_int_equal(gioctl_val(&g.vm, KVM_CREATE_IRQCHIP, 0), -EINVAL);    /* vCPUs are there */
	assert_int_equal(gioctl_val(&g.vm, KVM_SET_BOOT_CPU_ID, 0), -EBUSY);
	assert_int_equal(gioctl(&g.vm, KVM_CREATE_PIT2, &(struct kvm_pit_config){ 0 }, NULL), -ENOENT);
	assert_int_equal(gioctl(&g.vm, KVM_IRQ_LINE, &(struct kvm_irq_level){ .irq = 1 }, NULL), -ENXIO);
	mp.mp_state = KVM_MP_STATE_HALTED;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_MP_STATE, &mp, NULL), -EINVAL);
	guest_destroy(&g);
	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .irqchip = true, .pit = true, .nvcpus = 2 });
	assert_int_equal(gioctl_val(&g.vm, KVM_CREATE_IRQCHIP, 0), -EEXIST);
	assert_int_equal(gioctl(&g.vm, KVM_CREATE_PIT2, &(struct kvm_pit_config){ 0 }, NULL), -EEXIST);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_MP_STATE, &mp, NULL), 0);
	assert_int_equal(mp.mp_state, KVM_MP_STATE_RUNNABLE);
	assert_int_equal(gioctl(&g.vcpu[1], KVM_GET_MP_STATE, &mp, NULL), 0);
	assert_int_equal(mp.mp_state, KVM_MP_STATE_UNINITIALIZED);
	mp.mp_state = 77;
	assert_int_equal(gioctl(&g.vcpu[1], KVM_SET_MP_STATE, &mp, NULL), -EINVAL);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_INTERRUPT, &(struct kvm_interrupt){ 32 }, NULL), -ENXIO);
	guest_destroy(&g);
}

static void vcpu_ids(void **state)
{
	struct guest g;
	struct gfile v;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	assert_int_equal(gioctl(&g.vm, KVM_CREATE_VCPU, (void *)0, &v), -EEXIST);
	assert_int_equal(gioctl(&g.vm, KVM_CREATE_VCPU, (void *)4096, &v), -EINVAL);
	assert_int_equal(gioctl(&g.vm, KVM_CREATE_VCPU, (void *)300, &v), 0);
	gclose(&v);
	assert_int_equal(gioctl(&g.vm, KVM_CREATE_VCPU, (void *)300, &v), -EEXIST);
	guest_destroy(&g);
}

static void caps(void **state)
{
	struct kvm_enable_cap c = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { 7 } };
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &c, NULL), 0);
	c.args[0] = 8;
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &c, NULL), -EINVAL);
	c.flags = 1;
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &c, NULL), -EINVAL);
	c = (struct kvm_enable_cap){ .cap = KVM_CAP_NESTED_STATE };
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &c, NULL), -EINVAL);
	c = (struct kvm_enable_cap){ .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { 24 } };
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &c, NULL), -EINVAL);     /* after a vCPU */
	guest_destroy(&g);
}

static void bad_pointers(void **state)
{
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	softkvm_strict_copies(1);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_REGS, UNMAPPED, NULL), -EFAULT);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_REGS, UNMAPPED, NULL), -EFAULT);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_MSRS, UNMAPPED, NULL), -EFAULT);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_CPUID2, UNMAPPED, NULL), -EFAULT);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_XSAVE, UNMAPPED, NULL), -EFAULT);
	assert_int_equal(gioctl(&g.vm, KVM_SET_USER_MEMORY_REGION, UNMAPPED, NULL), -EFAULT);
	assert_int_equal(gioctl(&g.sys, KVM_GET_SUPPORTED_CPUID, UNMAPPED, NULL), -EFAULT);
	softkvm_strict_copies(0);
	guest_destroy(&g);
}

static void mappings(void **state)
{
	struct guest g;
	struct kvm_run *again;
	char *ring;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	again = softkvm_mmap(g.vcpu[0].f, g.run_size, 0);
	assert_ptr_not_equal(again, MAP_FAILED);
	again->kvm_valid_regs = 0x55;
	assert_int_equal(g.run[0]->kvm_valid_regs, 0x55);
	ring = softkvm_mmap(g.vcpu[0].f, 4096, 2 * 4096);
	assert_ptr_not_equal(ring, MAP_FAILED);
	ring[100] = 77;
	assert_int_equal(((char *)again)[2 * 4096 + 100], 77);
	assert_ptr_equal(softkvm_mmap(g.vcpu[0].f, 4096, 64 * 4096), MAP_FAILED);
	assert_ptr_equal(softkvm_mmap(g.vm.f, 4096, 0), MAP_FAILED);
	/* Unknown register classes are refused before anything runs. */
	assert_int_equal(guest_run(&g, 0), -EINVAL);
	softkvm_munmap(g.vcpu[0].f, ring, 4096);
	softkvm_munmap(g.vcpu[0].f, again, g.run_size);
	guest_destroy(&g);
}

static void immediate_exit(void **state)
{
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .irqchip = true, .nvcpus = 2 });
	g.run[0]->immediate_exit = g.run[1]->immediate_exit = 1;
	assert_int_equal(guest_run(&g, 0), -EINTR);
	assert_int_equal(guest_run(&g, 1), -EINTR);     /* before SIPI */
	guest_destroy(&g);
}

/* -- signals end the wait of a vCPU that has not been started --------------------------------- */
static _Atomic int handled;
static _Atomic bool ended;
static void on_signal(int s) { atomic_fetch_add(&handled, 1); }

/* Until KVM_RUN has ended: a signal that comes before it is entered, on a busy host, ends nothing. */
static void *kick(void *opaque)
{
	do {
		usleep(30000);
		pthread_kill(*(pthread_t *)opaque, SIGUSR1);
	} while (!atomic_load(&ended));
	return NULL;
}

static void kicked_run(struct guest *g)
{
	pthread_t self = pthread_self(), t;

	atomic_store(&ended, false);
	pthread_create(&t, NULL, kick, &self);
	assert_int_equal(guest_run(g, 1), -EINTR);
	atomic_store(&ended, true);
	pthread_join(t, NULL);
}

static void signal_ends_wait(void **state)
{
	struct { struct kvm_signal_mask h; uint64_t set; } *m = calloc(1, sizeof *m);
	struct sigaction sa = { .sa_handler = on_signal };
	struct timespec zero = { 0 };
	sigset_t usr1;
	struct guest g;
	int before;

	sigaction(SIGUSR1, &sa, NULL);
	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .irqchip = true, .nvcpus = 2 });
	atomic_store(&handled, 0);
	kicked_run(&g);
	assert_int_equal(g.run[1]->exit_reason, KVM_EXIT_INTR);
	before = atomic_load(&handled);
	assert_true(before >= 1);
	/* Blocked outside, let through inside: EINTR, and it is still pending afterwards, unhandled. */
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	m->h.len = 4;
	assert_int_equal(gioctl(&g.vcpu[1], KVM_SET_SIGNAL_MASK, m, NULL), -EINVAL);
	m->h.len = 8;
	memset(m->h.sigset, 0, 8);
	assert_int_equal(gioctl(&g.vcpu[1], KVM_SET_SIGNAL_MASK, m, NULL), 0);
	kicked_run(&g);
	assert_int_equal(guest_run(&g, 1), -EINTR);     /* pending at entry */
	assert_int_equal(atomic_load(&handled), before);
	assert_int_equal(sigtimedwait(&usr1, NULL, &zero), SIGUSR1);
	pthread_sigmask(SIG_UNBLOCK, &usr1, NULL);
	guest_destroy(&g);
	free(m);
}

static void two_vms(void **state)
{
	struct guest a, b;
	uint64_t v;

	guest_create(&a, &(struct guest_cfg){ .prov = GUEST_SOFT });
	guest_create(&b, &(struct guest_cfg){ .prov = GUEST_SOFT });
	guest_set_msr(&a, 0, 0x174, 1);
	guest_set_msr(&b, 0, 0x174, 2);
	guest_get_msr(&a, 0, 0x174, &v);
	assert_int_equal(v, 1);
	guest_destroy(&a);
	guest_get_msr(&b, 0, 0x174, &v);
	assert_int_equal(v, 2);
	guest_destroy(&b);
}

static void vcpu_outlives_vm_handle(void **state)
{
	struct guest g;
	struct kvm_regs r;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	gclose(&g.vm);
	gclose(&g.sys);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rip, 0xfff0);
	guest_destroy(&g);
}

static void mce(void **state)
{
	struct kvm_x86_mce m = { .status = 1ull << 63, .bank = 3, .addr = 0x1234 };
	struct guest g;
	uint64_t cap = 0;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	assert_int_equal(gioctl(&g.sys, KVM_X86_GET_MCE_CAP_SUPPORTED, &cap, NULL), 0);
	cap = (cap & ~0xffull) | 10;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_X86_SETUP_MCE, &cap, NULL), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_X86_SET_MCE, &m, NULL), 0);
	assert_int_equal(guest_get_msr(&g, 0, 0x400 + 3 * 4 + 2, &cap), 1);
	assert_int_equal(cap, 0x1234);
	m.bank = 10;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_X86_SET_MCE, &m, NULL), -EINVAL);
	cap = 0xff;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_X86_SETUP_MCE, &cap, NULL), -EINVAL);
	guest_destroy(&g);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(system_handle), cmocka_unit_test(supported_cpuid), cmocka_unit_test(x86_64_levels), cmocka_unit_test(cpuid_set_get), cmocka_unit_test(xcr0_without_xsave),
		cmocka_unit_test(dirty_rings_are_reset_whatever_the_argument),
		cmocka_unit_test(registers), cmocka_unit_test(msrs), cmocka_unit_test(msr_lists), cmocka_unit_test(time_),
		cmocka_unit_test(tsc_offset), cmocka_unit_test(memory_slots), cmocka_unit_test(irqchip_rules),
		cmocka_unit_test(vcpu_ids), cmocka_unit_test(caps), cmocka_unit_test(bad_pointers), cmocka_unit_test(mappings),
		cmocka_unit_test(immediate_exit), cmocka_unit_test(signal_ends_wait), cmocka_unit_test(two_vms),
		cmocka_unit_test(vcpu_outlives_vm_handle), cmocka_unit_test(mce),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
