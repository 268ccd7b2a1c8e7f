/* The chips by their registers, as the data sheets have it and as Linux uses them at boot. */
#include "fake.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>

#include <cmocka.h>

static struct vm *vm;
static struct cpu *c0;

static int setup(void **s) { fake_now = 1000000; vm = fake_vm(4, false); c0 = vm->cpus[0]; return 0; }
static int setup_split(void **s) { fake_now = 1000000; vm = fake_vm(2, true); c0 = vm->cpus[0]; return 0; }
static int teardown(void **s) { fake_vm_free(vm); return 0; }

static void outb(uint16_t port, uint8_t v) { assert_true(bus_pio(c0, port, 1, true, &v)); }
static uint8_t inb(uint16_t port) { uint8_t v = 0x5a; assert_true(bus_pio(c0, port, 1, false, &v)); return v; }
static void mmw(struct cpu *c, uint64_t a, uint32_t v) { assert_true(bus_mmio(c, a, 4, true, &v)); }
static uint32_t mmr(struct cpu *c, uint64_t a) { uint32_t v; assert_true(bus_mmio(c, a, 4, false, &v)); return v; }
static void apw(struct cpu *c, unsigned off, uint32_t v) { mmw(c, 0xfee00000 + off, v); }
static uint32_t apr(struct cpu *c, unsigned off) { return mmr(c, 0xfee00000 + off); }
static void iow(unsigned r, uint32_t v) { mmw(c0, 0xfec00000, r); mmw(c0, 0xfec00010, v); }
static uint32_t ior(unsigned r) { mmw(c0, 0xfec00000, r); return mmr(c0, 0xfec00010); }
static void line(unsigned gsi, int level) { irqchip_line(vm, gsi, level, 0); }

static void pic_init(uint8_t icw4)
{
	outb(0x20, 0x11); outb(0x21, 0x30); outb(0x21, 4); outb(0x21, icw4);
	outb(0xa0, 0x11); outb(0xa1, 0x38); outb(0xa1, 2); outb(0xa1, icw4);
}

static void enable_apics(void)
{
	for (unsigned i = 0; i < vm->ncpus; i++)
		apw(vm->cpus[i], 0xf0, 0x1ff);
}

/* With the I/O APIC in use the 8259As are masked, or LINT0 of the boot CPU would bring their vectors. */
static void pic_off(void) { outb(0x21, 0xff); outb(0xa1, 0xff); }

static int take(struct cpu *c)
{
	int v = irqchip_pending(c);

	if (v >= 0)
		assert_int_equal(irqchip_ack(c), v);
	return v;
}

static void test_pic_edge(void **s)
{
	pic_init(1);
	assert_int_equal(take(c0), -1);
	line(3, 1); line(3, 0);
	line(1, 1);
	assert_int_equal(take(c0), 0x31);
	assert_int_equal(take(c0), -1);         /* 3 is lower than 1 in service */
	outb(0x20, 0x20);
	assert_int_equal(take(c0), 0x33);
	line(0, 1);
	assert_int_equal(take(c0), 0x30);       /* higher nests */
	outb(0x20, 0x0b);
	assert_int_equal(inb(0x20), 0x09);
	outb(0x20, 0x60);
	outb(0x20, 0x63);
	assert_int_equal(inb(0x20), 0);
	line(1, 1);                             /* still high: no new edge */
	assert_int_equal(take(c0), -1);
}

static void test_pic_slave_level(void **s)
{
	pic_init(1);
	outb(0x4d1, 0xff);
	assert_int_equal(inb(0x4d1), 0xde);
	line(11, 1);
	assert_int_equal(take(c0), 0x3b);
	outb(0xa0, 0x20); outb(0x20, 0x20);
	assert_int_equal(take(c0), 0x3b);       /* level is still there */
	outb(0xa0, 0x20); outb(0x20, 0x20);
	assert_true(irqchip_pending(c0) == 0x3b);
	line(11, 0);
	assert_int_equal(irqchip_ack(c0), 0x3f);        /* spurious of the slave: master has 2 in service */
	outb(0x20, 0x0b);
	assert_int_equal(inb(0x20), 4);
	outb(0x20, 0x20);
	assert_int_equal(take(c0), -1);
}

static void test_pic_modes(void **s)
{
	pic_init(3);                            /* AEOI */
	outb(0x20, 0x80);                       /* rotate on it */
	line(4, 1);
	assert_int_equal(take(c0), 0x34);
	outb(0x20, 0x0b);
	assert_int_equal(inb(0x20), 0);
	line(4, 0); line(4, 1); line(5, 1);
	assert_int_equal(take(c0), 0x35);       /* 4 is lowest now */
	pic_init(1);
	line(6, 0); line(6, 1);
	outb(0x20, 0x0c);                       /* poll */
	assert_int_equal(inb(0x20), 0x86);
	line(7, 0); line(7, 1);
	assert_int_equal(take(c0), -1);
	outb(0x21, 0x40); outb(0x20, 0x68);     /* special mask: 6 in service, masked, no longer blocks */
	assert_int_equal(take(c0), 0x37);
	outb(0x20, 0x48);
	outb(0x20, 0xc2);                       /* set priority: 3 is highest */
	outb(0x20, 0x67); outb(0x20, 0x66); outb(0x21, 0);
	line(0, 0); line(3, 0); line(0, 1); line(3, 1);
	assert_int_equal(take(c0), 0x33);
}

static void test_pic_through_lint0(void **s)
{
	enable_apics();
	pic_init(1);
	apw(c0, 0x350, 0x10700);
	line(1, 1);
	assert_int_equal(irqchip_pending(c0), -1);
	c0->requests = 0;
	apw(c0, 0x350, 0x700);
	assert_true(c0->requests & REQ_EVENT);
	assert_int_equal(irqchip_pending(vm->cpus[1]), -1);
	assert_int_equal(take(c0), 0x31);
}

static void test_ioapic(void **s)
{
	enable_apics();
	pic_off();
	assert_int_equal(ior(1), 0x170011);
	iow(0x10 + 2 * 5 + 1, 1u << 24);
	iow(0x10 + 2 * 5, 0x45);
	assert_int_equal(irqchip_line(vm, 5, 1, 0) > 0, 1);
	assert_int_equal(take(vm->cpus[1]), 0x45);
	assert_int_equal(irqchip_line(vm, 5, 1, 0), 0 + 0);     /* no edge: coalesced */
	apw(vm->cpus[1], 0xb0, 0);
	/* level: remote IRR, two sources share the line */
	iow(0x10 + 2 * 18 + 1, 1u << 24);
	iow(0x10 + 2 * 18, 0x8051);
	irqchip_line(vm, 18, 1, 0); irqchip_line(vm, 18, 1, 1);
	assert_int_equal(ior(0x10 + 2 * 18), 0xc051);
	assert_int_equal(take(vm->cpus[1]), 0x51);
	irqchip_line(vm, 18, 0, 0);
	apw(vm->cpus[1], 0xb0, 0);
	assert_int_equal(take(vm->cpus[1]), 0x51);
	irqchip_line(vm, 18, 0, 1);
	iow(0x10 + 2 * 18, 0x8052);             /* rewritten while in service: EOI of the old vector still counts */
	apw(vm->cpus[1], 0xb0, 0);
	assert_int_equal(ior(0x10 + 2 * 18), 0x8052);
	assert_int_equal(take(vm->cpus[1]), -1);
	irqchip_line(vm, 18, 1, 0);
	iow(0x10 + 2 * 18, 0x18052); iow(0x10 + 2 * 18, 0x10052);
	assert_int_equal(ior(0x10 + 2 * 18), 0x10052);          /* edge clears remote IRR */
	assert_int_equal(irqchip_line(vm, 23, 1, 0), -1);       /* masked */
	iow(0x10 + 2 * 7, 0x400);
	line(7, 1);
	assert_int_equal(lapic_take_nmi_smi(c0), LAPIC_NMI);
}

static void test_priorities(void **s)
{
	enable_apics();
	irqchip_msi(vm, 0xfee00000, 0x41);
	irqchip_msi(vm, 0xfee00000, 0x62);
	lapic_set_tpr(c0, 6);
	assert_int_equal(take(c0), -1);
	c0->requests = 0;
	lapic_set_tpr(c0, 5);
	assert_true(c0->requests & REQ_EVENT);
	assert_int_equal(take(c0), 0x62);
	assert_int_equal(apr(c0, 0xa0), 0x60);
	lapic_set_tpr(c0, 0);
	assert_int_equal(take(c0), -1);
	assert_int_equal(apr(c0, 0x130), 4);
	apw(c0, 0xb0, 0);
	assert_int_equal(take(c0), 0x41);
	apw(c0, 0xb0, 0);
	assert_int_equal(irqchip_msi(vm, 0xfee00000, 5), 0);    /* illegal vector */
	apw(c0, 0x280, 0);
	assert_int_equal(apr(c0, 0x280), 0x40);
	apw(c0, 0xf0, 0xff);
	assert_int_equal(irqchip_msi(vm, 0xfee00000, 0x41), 0); /* software disabled */
	assert_int_equal(irqchip_msi(vm, 0xfee77000, 0x41), -EPERM);
}

static unsigned who(int vector)
{
	unsigned m = 0;

	for (unsigned i = 0; i < vm->ncpus; i++) {
		struct cpu *c = vm->cpus[i];
		int v = take(c);
		uint32_t zero = 0;

		if (v == vector)
			m |= 1 << i;
		if (v >= 0 && c->lapic->state == LAPIC_XAPIC)
			apw(c, 0xb0, zero);
		else if (v >= 0)
			lapic_msr_write(c, 0x80b, 0);
	}
	return m;
}

static void test_xapic_ipi(void **s)
{
	enable_apics();
	apw(c0, 0x300, 0x40044); assert_int_equal(who(0x44), 1);
	apw(c0, 0x300, 0x80044); assert_int_equal(who(0x44), 15);
	apw(c0, 0x300, 0xc0044); assert_int_equal(who(0x44), 14);
	apw(c0, 0x310, 2u << 24); apw(c0, 0x300, 0x44); assert_int_equal(who(0x44), 4);
	apw(c0, 0x310, 0xffu << 24); apw(c0, 0x300, 0x44); assert_int_equal(who(0x44), 15);
	for (unsigned i = 0; i < 4; i++)
		apw(vm->cpus[i], 0xd0, 1u << (24 + i));
	apw(c0, 0x310, 5u << 24); apw(c0, 0x300, 0x844); assert_int_equal(who(0x44), 5);
	apw(c0, 0x300, 0x944);                  /* lowest priority: exactly one of 0 and 2 */
	assert_int_equal(__builtin_popcount(who(0x44) & 5), 1);
	for (unsigned i = 0; i < 4; i++) {
		apw(vm->cpus[i], 0xe0, 0x0fffffff);
		apw(vm->cpus[i], 0xd0, (i / 2) << 28 | 1u << (24 + i % 2));
	}
	apw(c0, 0x310, 0x13u << 24); apw(c0, 0x300, 0x844); assert_int_equal(who(0x44), 12);
	apw(c0, 0x300, 0x40003);                /* illegal vector */
	apw(c0, 0x280, 0); assert_int_equal(apr(c0, 0x280), 0x20);
}

static void test_init_sipi(void **s)
{
	uint8_t v = 0;
	struct cpu *c = vm->cpus[1];

	enable_apics();
	apw(c0, 0x310, 1u << 24);
	apw(c0, 0x300, 0xc500);
	apw(c0, 0x300, 0x8500);                 /* de-assert: nothing */
	assert_true(lapic_event_waiting(c));
	assert_int_equal(lapic_take_init_sipi(c, &v), LAPIC_INIT);
	apw(c0, 0x300, 0x69a);
	assert_int_equal(lapic_take_init_sipi(c, &v), LAPIC_SIPI);
	assert_int_equal(v, 0x9a);
	assert_int_equal(lapic_take_init_sipi(c, &v), 0);
	apw(c0, 0x300, 0x400);
	assert_int_equal(lapic_take_nmi_smi(c), LAPIC_NMI);
}

static void test_x2apic(void **s)
{
	uint64_t v;

	enable_apics();
	assert_int_equal(lapic_msr_read(c0, 0x802, &v, false), -EINVAL);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(lapic_set_base(vm->cpus[i], 0xfee00c00, false), 0);
	lapic_msr_read(vm->cpus[3], 0x802, &v, false); assert_int_equal(v, 3);
	lapic_msr_read(vm->cpus[3], 0x80d, &v, false); assert_int_equal(v, 8);
	assert_int_equal(lapic_msr_write(c0, 0x830, 0x0000000a00000844ULL), 0);        /* logical cluster 0, CPUs 1 and 3 */
	assert_int_equal(who(0x44), 10);
	lapic_msr_write(c0, 0x830, 0x0000000200000044ULL); assert_int_equal(who(0x44), 4);
	lapic_msr_write(c0, 0x830, 0xffffffff00000044ULL); assert_int_equal(who(0x44), 15);
	lapic_msr_write(c0, 0x83f, 0x55); assert_int_equal(who(0x55), 1);
	assert_int_equal(lapic_msr_write(c0, 0x80b, 1), -EINVAL);
	assert_int_equal(lapic_msr_write(c0, 0x80e, 0), -EINVAL);
	assert_int_equal(lapic_msr_write(c0, 0x830, 1 << 13), -EINVAL);
	assert_int_equal(lapic_set_base(c0, 0xfee00800, false), -EINVAL);
	assert_int_equal(lapic_set_base(c0, 0xfee00400, false), -EINVAL);
	assert_int_equal(irqchip_msi(vm, 0xfeeff000, 0x44), 4); /* 8-bit broadcast */
	assert_int_equal(who(0x44), 15);
	vm->policy.x2apic_32bit_ids = vm->policy.x2apic_no_broadcast_quirk = true;
	assert_int_equal(irqchip_msi(vm, 0xfee03000 | 1ULL << 40, 0x44), -EPERM);       /* id 0x103 */
	struct kvm_lapic_state st;
	assert_int_equal(lapic_get(vm->cpus[3], &st), 0);
	assert_int_equal(ld_le32(st.regs + 0x20), 3);
	assert_int_equal(lapic_set(vm->cpus[3], &st), 0);
	assert_int_equal(lapic_set(vm->cpus[2], &st), -EINVAL);
}

static void test_timer(void **s)
{
	uint64_t v;

	enable_apics();
	apw(c0, 0x3e0, 0xb); apw(c0, 0x320, 0x40);      /* divide by 1 */
	apw(c0, 0x380, 1000000);
	assert_int_equal(lapic_timer_deadline(c0), fake_now + 1000000);
	fake_now += 400000;
	assert_int_equal(apr(c0, 0x390), 600000);
	lapic_timer_poll(c0); assert_int_equal(take(c0), -1);
	fake_now += 600000;
	lapic_timer_poll(c0); assert_int_equal(who(0x40), 1);
	assert_int_equal(apr(c0, 0x390), 0);
	assert_int_equal(lapic_timer_deadline(c0), UINT64_MAX);
	apw(c0, 0x320, 0x20041); apw(c0, 0x3e0, 3); apw(c0, 0x380, 100000);     /* periodic, by 16 */
	fake_now += 1600000 * 3 + 5;
	lapic_timer_poll(c0); assert_int_equal(who(0x41), 1);
	assert_int_equal(lapic_timer_deadline(c0), fake_now + 1600000 - 5);
	apw(c0, 0x320, 0x40042);                        /* TSC deadline: everything stops */
	assert_int_equal(lapic_timer_deadline(c0), UINT64_MAX);
	assert_int_equal(apr(c0, 0x380), 0);
	lapic_msr_write(c0, 0x6e0, (fake_now + 500) * 2);
	assert_int_equal(lapic_timer_deadline(c0), fake_now + 500);
	fake_now += 500;
	lapic_timer_poll(c0); assert_int_equal(who(0x42), 1);
	lapic_msr_read(c0, 0x6e0, &v, false); assert_int_equal(v, 0);
}

/* State is saved between an expiry and the vCPU's next look at it: the interrupt must be in what was saved. */
static void test_timer_state(void **s)
{
	struct kvm_lapic_state st;
	uint64_t v;

	enable_apics();
	apw(c0, 0x3e0, 3); apw(c0, 0x320, 0x40);        /* by 16 */
	apw(c0, 0x380, 1000);
	fake_now += 16000 - 5;
	assert_int_equal(lapic_get(c0, &st), 0);
	assert_int_equal(ld_le32(st.regs + 0x390), 1);  /* not 0: it is not over */
	assert_int_equal(ld_le32(st.regs + 0x220), 0);
	fake_now += 5;
	assert_int_equal(lapic_get(c0, &st), 0);
	assert_int_equal(ld_le32(st.regs + 0x390), 0);
	assert_int_equal(ld_le32(st.regs + 0x220), 1);
	assert_int_equal(take(c0), 0x40);
	lapic_reset(c0, false);
	assert_int_equal(lapic_set(c0, &st), 0);
	assert_int_equal(take(c0), 0x40);

	/* Linux KVM's own way of saying so: nothing in the IRR, a count of 0. */
	memset(st.regs + 0x220, 0, 4);
	lapic_reset(c0, false);
	assert_int_equal(lapic_set(c0, &st), 0);
	lapic_timer_poll(c0); assert_int_equal(take(c0), 0x40);
	fake_now += 16000;
	lapic_timer_poll(c0); assert_int_equal(take(c0), -1);
	st_le32(st.regs + 0x320, 0x20041);              /* periodic: from the start */
	lapic_reset(c0, false);
	assert_int_equal(lapic_set(c0, &st), 0);
	lapic_timer_poll(c0); assert_int_equal(take(c0), -1);
	assert_true(lapic_timer_deadline(c0) <= fake_now + 200000);
	fake_now += 200000;
	lapic_timer_poll(c0); assert_int_equal(take(c0), 0x41);

	/* A deadline that has passed is either still there or in the IRR, whichever of the two is saved first. */
	lapic_reset(c0, false);
	apw(c0, 0xf0, 0x1ff);
	apw(c0, 0x320, 0x40042);
	lapic_msr_write(c0, 0x6e0, (fake_now + 500) * 2);
	fake_now += 500;
	assert_int_equal(lapic_get(c0, &st), 0);
	lapic_msr_read(c0, 0x6e0, &v, true);
	assert_int_equal(v, fake_now * 2);
	lapic_reset(c0, false);
	assert_int_equal(lapic_set(c0, &st), 0);
	lapic_msr_write(c0, 0x6e0, v);
	lapic_timer_poll(c0); assert_int_equal(take(c0), 0x42);
}

static void pit_load(unsigned ch, unsigned mode, uint16_t n)
{
	outb(0x43, ch << 6 | 0x30 | mode << 1); outb(0x40 + ch, n); outb(0x40 + ch, n >> 8);
}

static void make_pit(void)
{
	assert_int_equal(irqchip_create_pit(vm, NULL), 0);
	((struct pit *)vm->irqchip->pit)->no_thread = true;
}

static void tick(void) { irqchip_lock(vm->irqchip); pit_poll(vm->irqchip, fake_now); irqchip_unlock(vm->irqchip); }

static void test_pit_calibration(void **s)
{
	make_pit();
	outb(0x61, (inb(0x61) & ~2) | 1);               /* as Linux's pit_calibrate_tsc() */
	pit_load(2, 0, 11932);
	assert_false(inb(0x61) & 0x20);
	fake_now += 9990000; assert_false(inb(0x61) & 0x20);
	fake_now += 20000; assert_true(inb(0x61) & 0x20);
	pit_load(2, 0, 0xffff);                         /* and quick_pit_calibrate(): unlatched reads, low byte first */
	fake_now += 214600 + 2000;
	(void)inb(0x42); assert_int_equal(inb(0x42), 0xfe);
	outb(0x61, 0);                                  /* the gate stops it */
	outb(0x43, 0x80); uint8_t lo = inb(0x42), hi = inb(0x42);
	fake_now += 1000000;
	outb(0x43, 0x80); assert_int_equal(inb(0x42), lo); assert_int_equal(inb(0x42), hi);
	outb(0x43, 0xe8); assert_int_equal(inb(0x42) & 0x3f, 0x30);     /* status of channel 2 */
	outb(0x43, 0x80 | 0x31); outb(0x42, 0x00); outb(0x42, 0x10);     /* BCD 1000 */
	outb(0x61, 1); fake_now += 838 * 10 + 400;
	outb(0x43, 0x80); assert_in_range(inb(0x42), 0x88, 0x91); assert_int_equal(inb(0x42), 0x09);
}

static void clocks(unsigned n) { fake_now += (n * 1000000000ull + 1193181) / 1193182; }
static bool out2(void) { return inb(0x61) & 0x20; }
static unsigned count2(void) { outb(0x43, 0x80); uint8_t lo = inb(0x42); return lo | inb(0x42) << 8; }

/* The gate of channel 2 is bit 0 of port 0x61. Each step is a line of the data sheet's timing diagrams. */
static void test_pit_modes(void **s)
{
	struct kvm_pit_state2 st;

	make_pit();
	outb(0x61, 0);
	pit_load(2, 1, 100);                            /* mode 1: high until the trigger, low for the count */
	assert_true(out2()); clocks(500); assert_true(out2());
	outb(0x61, 1); assert_false(out2());
	clocks(50); assert_false(out2()); assert_in_range(count2(), 49, 50);
	outb(0x61, 0); assert_false(out2());            /* a falling gate changes nothing */
	outb(0x42, 30); outb(0x42, 0);                  /* nor does a new count, this time */
	clocks(48); assert_false(out2()); clocks(3); assert_true(out2());
	outb(0x61, 1); assert_false(out2());
	clocks(28); assert_false(out2());
	outb(0x61, 0); outb(0x61, 1);                   /* retriggered before its end */
	clocks(28); assert_false(out2()); clocks(3); assert_true(out2());
	assert_int_equal(irqchip_get_pit2(vm, &st), 0);
	assert_int_equal(irqchip_set_pit2(vm, &st), 0);
	assert_true(out2());

	pit_load(2, 4, 100);                            /* mode 4: counts from the write on, one low clock, once */
	assert_true(out2()); clocks(99); assert_true(out2());
	clocks(1); assert_false(out2()); clocks(1); assert_true(out2());
	clocks(65436 + 99); assert_true(out2());
	pit_load(2, 4, 100);                            /* a low gate stops it, a high one lets it go on */
	clocks(40); outb(0x61, 0); clocks(1000); assert_in_range(count2(), 59, 60); assert_true(out2());
	outb(0x61, 1); clocks(59); assert_true(out2()); clocks(1); assert_false(out2()); clocks(2); assert_true(out2());

	outb(0x61, 0);
	pit_load(2, 5, 100);                            /* mode 5: the same from a rising gate on */
	clocks(100); assert_true(out2()); clocks(300);
	outb(0x61, 1); clocks(60);
	outb(0x61, 0); outb(0x61, 1);                   /* again */
	clocks(40); assert_true(out2()); clocks(60); assert_false(out2()); clocks(1); assert_true(out2());

	enable_apics();                                 /* channel 0 has no gate to trigger it; mode 4 interrupts once */
	pic_init(1);
	pit_load(0, 2, 1000); pit_load(0, 5, 1000);
	clocks(5000); tick(); assert_int_equal(take(c0), -1);
	pit_load(0, 1, 1000);
	clocks(5000); tick(); assert_int_equal(take(c0), -1);
	pit_load(0, 4, 1000);
	clocks(999); tick(); assert_int_equal(take(c0), -1);
	clocks(3); tick(); assert_int_equal(take(c0), 0x30);
	outb(0x20, 0x20);
	clocks(70000); tick(); assert_int_equal(take(c0), -1);
}

static void test_pit_tick(void **s)
{
	struct kvm_pit_state2 st;

	make_pit();
	enable_apics();
	pic_init(1);
	pit_load(0, 2, 11932);
	fake_now += 10000500; tick();
	assert_int_equal(take(c0), 0x30);
	fake_now += 30010000; tick();                   /* three ticks while the first is in service */
	assert_int_equal(take(c0), -1);
	for (int i = 0; i < 3; i++) {
		outb(0x20, 0x20);
		assert_int_equal(take(c0), 0x30);
	}
	outb(0x20, 0x20);
	assert_int_equal(take(c0), -1);
	assert_int_equal(irqchip_get_pit2(vm, &st), 0);
	assert_int_equal(st.channels[0].count, 11932);
	assert_int_equal(irqchip_set_pit2(vm, &st), 0);
	/* check_timer(): the I/O APIC's pin, edge, after masking the PIC; EOI at the LAPIC goes on to the next tick */
	outb(0x21, 0xff);
	iow(0x10, 0x30);
	for (int i = 0; i < 5; i++) {
		fake_now += 10000500; tick();
		assert_int_equal(take(c0), 0x30);
		apw(c0, 0xb0, 0);
	}
	assert_int_equal(irqchip_reinject(vm, false), 0);
}

static void test_routing(void **s)
{
	struct kvm_irq_routing_entry e[3] = {
		{ .gsi = 0, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = { KVM_IRQCHIP_IOAPIC, 2 } },
		{ .gsi = 100, .type = KVM_IRQ_ROUTING_MSI, .u.msi = { 0xfee01000, 0, 0x77 } },
		{ .gsi = 0, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = { KVM_IRQCHIP_PIC_MASTER, 0 } },
	};

	enable_apics();
	pic_off();
	assert_int_equal(irqchip_set_routing(vm, e, 3), 0);
	assert_true(irqchip_line(vm, 100, 1, 0) > 0);
	assert_int_equal(who(0x77), 2);
	iow(0x14, 0x33);
	line(0, 1);
	assert_int_equal(who(0x33), 1);
	assert_int_equal(irqchip_line(vm, 5, 1, 0), -1);
	e[2].gsi = 100;
	assert_int_equal(irqchip_set_routing(vm, e, 3), -EINVAL);
	e[2].gsi = 4096;
	assert_int_equal(irqchip_set_routing(vm, e, 3), -EINVAL);
	e[0].u.irqchip.pin = 24;
	assert_int_equal(irqchip_set_routing(vm, e, 1), -EINVAL);
}

static int wait_vector(struct cpu *c)
{
	for (int i = 0; i < 2000; i++) {
		int v = take(c);

		if (v >= 0)
			return v;
		usleep(1000);
	}
	return -1;
}

static void test_irqfd(void **s)
{
	int fd = eventfd(0, EFD_CLOEXEC), re = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct kvm_irqfd a = { .fd = fd, .gsi = 20, .flags = KVM_IRQFD_FLAG_RESAMPLE, .resamplefd = re };
	uint64_t n;

	enable_apics();
	pic_off();
	iow(0x10 + 40, 0x8066);
	assert_int_equal(irqchip_irqfd(vm, &a), 0);
	assert_int_equal(irqchip_irqfd(vm, &a), -EBUSY);
	eventfd_signal(fd);
	assert_int_equal(wait_vector(c0), 0x66);
	assert_true(read(re, &n, 8) < 0);
	apw(c0, 0xb0, 0);
	assert_int_equal(read(re, &n, 8), 8);           /* EOI lowered the line and asks the device */
	assert_int_equal(take(c0), -1);
	a.flags = KVM_IRQFD_FLAG_DEASSIGN;
	assert_int_equal(irqchip_irqfd(vm, &a), 0);
	eventfd_signal(fd);
	usleep(5000);
	assert_int_equal(take(c0), -1);
	a.flags = 0;                                    /* already signalled when assigned */
	iow(0x10 + 40, 0x66);
	assert_int_equal(irqchip_irqfd(vm, &a), 0);
	assert_int_equal(wait_vector(c0), 0x66);
	a.fd = -1;
	assert_int_equal(irqchip_irqfd(vm, &a), -EBADF);
	a.fd = 0;
	close(fd); close(re);
}

static uint64_t count(int fd) { uint64_t n = 0; return read(fd, &n, 8) == 8 ? n : 0; }

static void test_ioeventfd(void **s)
{
	int fd = eventfd(0, EFD_NONBLOCK);
	struct kvm_ioeventfd e = { .addr = 0x1000, .len = 2, .fd = fd, .datamatch = 7, .flags = KVM_IOEVENTFD_FLAG_DATAMATCH };
	uint32_t v = 7;

	assert_int_equal(bus_ioeventfd(vm, &e), 0);
	assert_int_equal(bus_ioeventfd(vm, &e), -EEXIST);
	assert_true(bus_mmio(c0, 0x1000, 2, true, &v)); assert_int_equal(count(fd), 1);
	assert_false(bus_mmio(c0, 0x1000, 4, true, &v));
	assert_false(bus_mmio(c0, 0x1000, 2, false, &v));
	assert_false(bus_pio(c0, 0x1000, 2, true, &v));
	v = 8; assert_false(bus_mmio(c0, 0x1000, 2, true, &v));
	e.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN; e.datamatch = 9;
	assert_int_equal(bus_ioeventfd(vm, &e), -ENOENT);
	e.datamatch = 7; assert_int_equal(bus_ioeventfd(vm, &e), 0);
	e = (struct kvm_ioeventfd){ .addr = 0xc000, .fd = fd, .flags = KVM_IOEVENTFD_FLAG_PIO };
	assert_int_equal(bus_ioeventfd(vm, &e), 0);
	assert_true(bus_pio(c0, 0xc000, 1, true, &v)); assert_true(bus_pio(c0, 0xc000, 4, true, &v));
	assert_int_equal(count(fd), 2);
	e.len = 3; assert_int_equal(bus_ioeventfd(vm, &e), -EINVAL);
	close(fd);
}

static void test_coalesced(void **s)
{
	struct kvm_coalesced_mmio_zone z = { .addr = 0xb8000, .size = 0x100 };
	struct kvm_coalesced_mmio *e = (void *)((char *)vm->ring + sizeof *vm->ring);
	uint64_t v = 0x1122334455667788;
	unsigned n = 0;

	assert_int_equal(bus_register_coalesced(vm, &z), 0);
	assert_true(bus_mmio(c0, 0xb8010, 8, true, &v));
	assert_int_equal(e[0].phys_addr, 0xb8010); assert_int_equal(e[0].len, 8);
	assert_memory_equal(e[0].data, &v, 8);
	assert_false(bus_mmio(c0, 0xb80fd, 4, true, &v));
	assert_false(bus_mmio(c0, 0xb8010, 4, false, &v));
	while (bus_mmio(c0, 0xb8000, 1, true, &v))
		assert_true(++n < 1000);
	assert_int_equal(vm->ring->last, (4096 - 8) / 24 - 1);
	vm->ring->last = 0xffffffff;
	assert_false(bus_mmio(c0, 0xb8000, 1, true, &v));
	vm->ring->first = vm->ring->last = 0;
	assert_int_equal(bus_unregister_coalesced(vm, &z), 0);
	assert_false(bus_mmio(c0, 0xb8000, 1, true, &v));
}

static void test_split(void **s)
{
	struct kvm_irq_routing_entry e = { .gsi = 4, .type = KVM_IRQ_ROUTING_MSI, .u.msi = { 0xfee00000, 0, 0x8061 } };

	enable_apics();
	assert_int_equal(irqchip_set_routing(vm, &e, 1), 0);
	assert_true(irqchip_line(vm, 4, 1, 0) > 0);
	assert_int_equal(take(c0), 0x61);
	assert_int_equal(lapic_take_eoi_exit(c0), -1);
	apw(c0, 0xb0, 0);
	assert_int_equal(lapic_take_eoi_exit(c0), 0x61);
	assert_int_equal(lapic_take_eoi_exit(c0), -1);
	assert_int_equal(lapic_queue_ext(c0, 0x22), 0);
	assert_int_equal(lapic_queue_ext(c0, 0x22), -EEXIST);
	assert_int_equal(take(c0), 0x22);
	apw(c0, 0x350, 0x10700);
	assert_int_equal(lapic_queue_ext(c0, 0x22), 0);
	assert_int_equal(take(c0), -1);
	apw(c0, 0x350, 0x700);
	assert_int_equal(take(c0), 0x22);
}

static void test_state(void **s)
{
	struct kvm_irqchip chip = { .chip_id = KVM_IRQCHIP_IOAPIC };

	enable_apics();
	pic_off();
	iow(0x10 + 2 * 9, 0x8049);
	line(9, 1);
	assert_int_equal(irqchip_get(vm, &chip), 0);
	assert_int_equal(chip.chip.ioapic.redirtbl[9].bits, 0xc049);
	assert_int_equal(irqchip_set(vm, &chip), 0);
	assert_int_equal(take(c0), 0x49);
	chip.chip_id = 3;
	assert_int_equal(irqchip_get(vm, &chip), -EINVAL);
	struct kvm_lapic_state st;
	assert_int_equal(lapic_get(c0, &st), 0);
	assert_int_equal(ld_le32(st.regs + 0x120), 1u << 9);
	lapic_reset(c0, false);
	assert_int_equal(lapic_set(c0, &st), 0);
	apw(c0, 0xb0, 0);
	assert_int_equal(take(c0), 0x49);
}

/* A line that was up when state was saved falls with whoever drives it after loading: here a resampled irqfd at its EOI. */
static void test_state_line(void **s)
{
	struct kvm_irqchip chip = { .chip_id = KVM_IRQCHIP_IOAPIC };

	enable_apics();
	pic_off();
	iow(0x10 + 2 * 9, 0x8049);
	irqchip_line(vm, 9, 1, SRC_RESAMPLE);
	assert_int_equal(irqchip_get(vm, &chip), 0);
	teardown(s);
	setup(s);
	enable_apics();
	pic_off();
	chip.chip.ioapic.redirtbl[9].fields.remote_irr = 0;
	assert_int_equal(irqchip_set(vm, &chip), 0);
	assert_int_equal(take(c0), 0x49);
	irqchip_line(vm, 9, 0, SRC_RESAMPLE);
	apw(c0, 0xb0, 0);
	assert_int_equal(take(c0), -1);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
int main(void)
{
	const struct CMUnitTest t[] = {
		T(test_pic_edge), T(test_pic_slave_level), T(test_pic_modes), T(test_pic_through_lint0), T(test_ioapic),
		T(test_priorities), T(test_xapic_ipi), T(test_init_sipi), T(test_x2apic), T(test_timer), T(test_timer_state),
		T(test_pit_calibration), T(test_pit_tick), T(test_pit_modes), T(test_routing), T(test_irqfd), T(test_ioeventfd),
		T(test_coalesced), T(test_state), T(test_state_line), cmocka_unit_test_setup_teardown(test_split, setup_split, teardown),
	};
	return cmocka_run_group_tests(t, NULL, NULL);
}
