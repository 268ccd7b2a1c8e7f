#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/util.h"
#include "board/internal.h"

struct cpu_state {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_fpu fpu;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs dr;
	struct kvm_lapic_state lapic;
	struct kvm_vcpu_events events;
	bool have_xcrs;
};

struct chips {
	struct kvm_irqchip irqchip[3];  /* master, slave, I/O APIC */
	struct kvm_pit_state2 pit;
	unsigned n;
	struct cpu_state cpu[];
};

/* Line 0 is the PIT: pin 0 of the PIC, but pin 2 of the I/O APIC, as the MADT says. */
static int set_routes(struct machine *m, struct err *err)
{
	struct { struct kvm_irq_routing h; struct kvm_irq_routing_entry e[64]; } t = { 0 };
	unsigned n = 0;
	int r;

	for (unsigned i = 0; i < 24; i++) {
		if (i < 16 && i != 2)
			t.e[n++] = (struct kvm_irq_routing_entry){ .gsi = i, .type = KVM_IRQ_ROUTING_IRQCHIP,
				.u.irqchip = { i < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, i & 7 } };
		if (i != 2)
			t.e[n++] = (struct kvm_irq_routing_entry){ .gsi = i, .type = KVM_IRQ_ROUTING_IRQCHIP,
				.u.irqchip = { KVM_IRQCHIP_IOAPIC, i ? i : 2 } };
	}
	t.h.nr = n;
	r = kvm_vm_ioctl(m->vm, KVM_SET_GSI_ROUTING, &t);
	return r < 0 ? err_set_errno(err, r, "KVM_SET_GSI_ROUTING") : 0;
}

int chips_create(struct machine *m, struct err *err)
{
	struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
	uint64_t ident = KVM_IDENTITY;
	int r;

	/* Only Intel hosts without unrestricted guests need these two. */
	kvm_vm_ioctl(m->vm, KVM_SET_IDENTITY_MAP_ADDR, &ident);
	kvm_vm_ioctl_val(m->vm, KVM_SET_TSS_ADDR, KVM_TSS);
	r = kvm_vm_ioctl(m->vm, KVM_CREATE_IRQCHIP, NULL);
	if (r < 0)
		return err_set_errno(err, r, "KVM_CREATE_IRQCHIP");
	r = kvm_vm_ioctl(m->vm, KVM_CREATE_PIT2, &pit);
	if (r < 0)
		return err_set_errno(err, r, "KVM_CREATE_PIT2");
	return set_routes(m, err);
}

/* What firmware sets up or a reset clears. Models without one of them ignore the write. */
static void set_msrs(struct kvm_vcpu *v, bool reset)
{
	static const struct { uint32_t msr; bool boot; uint64_t val; } list[] = {
		{ 0x200, true, PCI32_BASE },                    /* MTRR 0: PCI hole, uncached, 1 GiB ... */
		{ 0x201, true, 0xfc0000800 },
		{ 0x2ff, true, 0x806 },                         /* ... all else write-back */
		{ 0x174, false, 0 }, { 0x175, false, 0 }, { 0x176, false, 0 },          /* SYSENTER */
		{ 0xc0000081, false, 0 }, { 0xc0000082, false, 0 }, { 0xc0000083, false, 0 },
		{ 0xc0000084, false, 0 }, { 0xc0000102, false, 0 }, { 0xc0000103, false, 0 },
		{ 0x277, false, 0x0007040600070406 },           /* PAT */
		{ 0x11, false, 0 }, { 0x12, false, 0 }, { 0x4b564d00, false, 0 }, { 0x4b564d01, false, 0 },
		{ 0x4b564d02, false, 0 }, { 0x4b564d03, false, 0 }, { 0x4b564d04, false, 0 },
		{ 0x6e0, false, 0 }, { 0x48, false, 0 }, { 0xda0, false, 0 },
	};
	struct { struct kvm_msrs h; struct kvm_msr_entry e[1]; } msr = { .h.nmsrs = 1 };

	for (unsigned i = 0; i < ARRAY_SIZE(list); i++) {
		if (!reset && !list[i].boot)
			continue;
		msr.e[0] = (struct kvm_msr_entry){ .index = list[i].msr, .data = list[i].val };
		kvm_vcpu_ioctl(v, KVM_SET_MSRS, &msr);
	}
}

struct io { unsigned long req; void *arg; const char *name; bool optional; };

static int run_ioctls(struct kvm_vcpu *v, const struct io *io, unsigned n, struct err *err)
{
	for (unsigned i = 0; i < n; i++) {
		int r = kvm_vcpu_ioctl(v, io[i].req, io[i].arg);

		if (r < 0 && !io[i].optional)
			return err_set_errno(err, r, "vCPU %u: %s", kvm_vcpu_id(v), io[i].name);
	}
	return 0;
}

static int cpu_save(struct kvm_vcpu *v, struct cpu_state *c, struct err *err)
{
	struct io get[] = {
		{ KVM_GET_REGS, &c->regs, "KVM_GET_REGS" }, { KVM_GET_SREGS, &c->sregs, "KVM_GET_SREGS" },
		{ KVM_GET_FPU, &c->fpu, "KVM_GET_FPU" }, { KVM_GET_DEBUGREGS, &c->dr, "KVM_GET_DEBUGREGS" },
		{ KVM_GET_LAPIC, &c->lapic, "KVM_GET_LAPIC" },
		{ KVM_GET_VCPU_EVENTS, &c->events, "KVM_GET_VCPU_EVENTS" },
	};

	set_msrs(v, false);
	c->have_xcrs = kvm_vcpu_ioctl(v, KVM_GET_XCRS, &c->xcrs) == 0;
	return run_ioctls(v, get, ARRAY_SIZE(get), err);
}

static int cpu_restore(struct kvm_vcpu *v, struct cpu_state *c, struct err *err)
{
	bool bsp = kvm_vcpu_id(v) == 0;
	struct kvm_mp_state mp = { bsp ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_UNINITIALIZED };
	struct io set[] = {
		{ KVM_SET_SREGS, &c->sregs, "KVM_SET_SREGS" }, { KVM_SET_REGS, &c->regs, "KVM_SET_REGS" },
		{ KVM_SET_FPU, &c->fpu, "KVM_SET_FPU" }, { KVM_SET_DEBUGREGS, &c->dr, "KVM_SET_DEBUGREGS" },
		{ KVM_SET_LAPIC, &c->lapic, "KVM_SET_LAPIC" },
		{ KVM_SET_VCPU_EVENTS, &c->events, "KVM_SET_VCPU_EVENTS" },
		{ KVM_SET_MP_STATE, &mp, "KVM_SET_MP_STATE" },
	};

	if (c->have_xcrs)
		kvm_vcpu_ioctl(v, KVM_SET_XCRS, &c->xcrs);
	set_msrs(v, true);
	c->events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR;
	return run_ioctls(v, set, ARRAY_SIZE(set), err);
}

int chips_save(struct machine *m, struct err *err)
{
	unsigned n = vcpus_count(m->vcpus);
	struct chips *c = calloc(1, sizeof(*c) + n * sizeof(c->cpu[0]));
	int r = 0;

	if (!c)
		return err_set(err, -ENOMEM, "no memory for vCPU state");
	m->chips = c;
	c->n = n;
	for (unsigned i = 0; i < 3 && r >= 0; i++) {
		c->irqchip[i].chip_id = i;
		r = kvm_vm_ioctl(m->vm, KVM_GET_IRQCHIP, &c->irqchip[i]);
	}
	if (r >= 0)
		r = kvm_vm_ioctl(m->vm, KVM_GET_PIT2, &c->pit);
	if (r < 0)
		return err_set_errno(err, r, "reading the interrupt chips' state");
	for (unsigned i = 0; i < n && r >= 0; i++)
		r = cpu_save(vcpus_get(m->vcpus, i), &c->cpu[i], err);
	return r < 0 ? r : 0;
}

struct restore { struct cpu_state *c; struct err *err; int r; };

static void restore_on(struct kvm_vcpu *v, void *opaque)
{
	struct restore *x = opaque;

	x->r = cpu_restore(v, x->c, x->err);
}

int chips_reset(struct machine *m, struct err *err)
{
	struct chips *c = m->chips;
	int r = 0;

	for (unsigned i = 0; i < 3 && r >= 0; i++)
		r = kvm_vm_ioctl(m->vm, KVM_SET_IRQCHIP, &c->irqchip[i]);
	if (r >= 0)
		r = kvm_vm_ioctl(m->vm, KVM_SET_PIT2, &c->pit);
	if (r < 0)
		return err_set_errno(err, r, "resetting the interrupt chips");
	for (unsigned i = 0; i < c->n; i++) {
		struct restore x = { &c->cpu[i], err, 0 };

		vcpus_run_on(m->vcpus, i, restore_on, &x);
		if (x.r)
			return x.r;
	}
	return 0;
}

void chips_free(struct machine *m)
{
	free(m->chips);
	m->chips = NULL;
}
