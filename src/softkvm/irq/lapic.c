/*
 * Local APIC registers: MMIO page, x2APIC MSRs, IA32_APIC_BASE, reset, KVM_GET/SET_LAPIC (SDM vol. 3 ch. 10).
 */
#include <errno.h>
#include <stdlib.h>

#include "softkvm/irq/internal.h"

#define BASE_DEFAULT 0xfee00000ULL
#define BASE_BSP (1u << 8)
#define BASE_X2APIC (1u << 10)
#define BASE_ENABLE (1u << 11)
#define NR_LVT 6

static uint32_t x2apic_ldr(uint32_t id)
{
	return (id >> 4) << 16 | 1u << (id & 15);
}

void lapic_error(struct lapic *l, uint32_t bits)
{
	uint32_t old = atomic_fetch_or(&l->errors, bits);
	uint32_t e = lapic_reg(l, AR_LVT_ERROR);

	/* Only a first error makes an interrupt. An error entry with an illegal vector must not call itself. */
	if ((old & bits) != bits && (e & 0xff) >= 16)
		lapic_local(l, AR_LVT_ERROR);
}

/* Readable registers (bit n: register n) in xAPIC mode. */
static bool reg_readable(const struct lapic *l, unsigned r)
{
	bool x2 = l->state == LAPIC_X2APIC;

	switch (r) {
	case AR_ID: case AR_VERSION: case AR_TPR: case AR_PPR: case AR_LDR: case AR_SVR: case AR_ESR: case AR_ICR:
	case AR_LVTT: case AR_LVT_THERMAL: case AR_LVT_PERF: case AR_LVT0: case AR_LVT1: case AR_LVT_ERROR:
	case AR_TMICT: case AR_TMCCT: case AR_TDCR:
		return true;
	case AR_APR: case AR_DFR: case AR_ICR2:
		return !x2;
	case AR_LVT_CMCI:
		return l->cmci;
	default:
		return r >= AR_ISR && r < AR_IRR + 8;
	}
}

static uint32_t reg_read(struct lapic *l, unsigned r)
{
	switch (r) {
	case AR_APR:
		return 0;
	case AR_PPR:
		return lapic_ppr(l);
	case AR_TMCCT:
		return lapic_timer_mode(l) == TIMER_DEADLINE ? 0 : lapic_timer_count(l);
	default:
		return lapic_reg(l, r);
	}
}

static uint32_t lvt_mask(const struct lapic *l, unsigned r)
{
	const struct cpu_features *f = l->cpu->feat;

	switch (r) {
	case AR_LVTT:           /* the deadline mode's bit only where CPUID offers it */
		return 0x300ff | (!f || (f->f1_ecx & (1u << 24)) ? 1u << 18 : 0);
	case AR_LVT0:
	case AR_LVT1:
		return 0x1a7ff;
	case AR_LVT_ERROR:
		return 0x100ff;
	default:
		return 0x107ff;
	}
}

static void lvt_write(struct lapic *l, unsigned r, uint32_t v)
{
	v &= lvt_mask(l, r);
	if (!lapic_sw_enabled(l))
		v |= LVT_MASKED;
	if (r == AR_LVTT) {
		lapic_timer_set_lvtt(l, v);
		return;
	}
	lapic_put(l, r, v);
	if (r != AR_LVT0)
		return;
	if (((v >> 8) & 7) == DM_NMI && l->vm->irqchip)
		atomic_store(&l->vm->irqchip->lint_nmi, true);
	cpu_request(l->cpu, REQ_EVENT);         /* the 8259A may be let through now */
}

static void svr_write(struct lapic *l, uint32_t v)
{
	uint32_t mask = 0x3ff;

	if (lapic_reg(l, AR_VERSION) & LVR_DIRECTED_EOI)
		mask |= SVR_DIRECTED_EOI;
	lapic_put(l, AR_SVR, v & mask);
	if (!(v & SVR_ENABLE)) {
		lapic_timer_poll(l->cpu);
		for (unsigned r = AR_LVTT; r <= AR_LVT_ERROR; r++)
			lapic_put(l, r, lapic_reg(l, r) | LVT_MASKED);
		lapic_put(l, AR_LVT_CMCI, lapic_reg(l, AR_LVT_CMCI) | LVT_MASKED);
	}
	cpu_request(l->cpu, REQ_EVENT | REQ_TIMER);
}

/* Registers that both modes write alike. False: not writable. */
static bool reg_write(struct lapic *l, unsigned r, uint32_t v)
{
	switch (r) {
	case AR_TPR:
		lapic_put(l, r, v & 0xff);
		lapic_recheck(l);
		return true;
	case AR_EOI:
		lapic_eoi(l);
		return true;
	case AR_SVR:
		svr_write(l, v);
		return true;
	case AR_ESR:            /* a write makes the errors since the last one visible */
		lapic_put(l, r, atomic_exchange(&l->errors, 0));
		return true;
	case AR_LVTT: case AR_LVT_THERMAL: case AR_LVT_PERF: case AR_LVT0: case AR_LVT1: case AR_LVT_ERROR:
		lvt_write(l, r, v);
		return true;
	case AR_LVT_CMCI:
		if (l->cmci)
			lvt_write(l, r, v);
		return l->cmci;
	case AR_TMICT:
		if (lapic_timer_mode(l) == TIMER_DEADLINE)
			return true;
		lapic_put(l, r, v);
		lapic_timer_start(l, v);
		return true;
	case AR_TDCR:
		lapic_timer_set_divide(l, v);
		return true;
	default:
		return false;
	}
}

static bool xapic_write(struct lapic *l, unsigned r, uint32_t v)
{
	switch (r) {
	case AR_ID:
		lapic_put(l, r, v & 0xff000000u);
		return true;
	case AR_LDR:
		lapic_put(l, r, v & 0xff000000u);
		return true;
	case AR_DFR:
		lapic_put(l, r, v | 0x0fffffffu);
		return true;
	case AR_ICR2:
		lapic_put(l, r, v & 0xff000000u);
		return true;
	case AR_ICR:
		lapic_put(l, r, v & ~(1u << 12));       /* delivery status reads idle; the rest as written, reserved or not, as KVM */
		lapic_send_icr(l, v, lapic_reg(l, AR_ICR2) >> 24);
		return true;
	default:
		return reg_write(l, r, v);
	}
}

static void xapic_access(struct lapic *l, unsigned off, unsigned len, bool write, uint8_t *data)
{
	uint8_t raw[4] = { 0 };
	unsigned r = off >> 4, in = off & 15;

	if (write) {
		if (len != 4 || in)
			return;
		if (!xapic_write(l, r, ld_le32(data)) && !reg_readable(l, r))
			lapic_error(l, ESR_ILLEGAL_REG);
		return;
	}
	memset(data, 0, len);
	if (in + len > 4)
		return;
	if (r < AR_COUNT && reg_readable(l, r))
		st_le32(raw, reg_read(l, r));
	else if (r != AR_EOI)
		lapic_error(l, ESR_ILLEGAL_REG);
	memcpy(data, raw + in, len);
}

int lapic_mmio(struct lapic *l, uint64_t gpa, unsigned len, bool write, void *data)
{
	uint64_t off = gpa - l->base;

	if (off >= 4096)
		return 0;
	if (l->state == LAPIC_XAPIC)
		xapic_access(l, off, len, write, data);
	else if (!write)        /* no APIC behind the page, and Linux KVM keeps it from being RAM */
		memset(data, 0xff, len);
	return 1;
}

int lapic_msr_read(struct cpu *c, uint32_t msr, uint64_t *v, bool host)
{
	struct lapic *l = c->lapic;
	unsigned r = msr - MSR_X2APIC_BASE;

	if (!l)
		return -EINVAL;
	if (msr == MSR_TSC_DEADLINE) {
		/* The client's look must not use up the expiry: the IRR it goes to may be saved already. */
		if (!host)
			lapic_timer_poll(c);
		*v = lapic_timer_mode(l) == TIMER_DEADLINE ? l->timer.deadline : 0;
		return 0;
	}
	if (l->state != LAPIC_X2APIC || r >= AR_COUNT || !reg_readable(l, r))
		return -EINVAL;
	*v = reg_read(l, r);
	if (r == AR_ICR)
		*v |= (uint64_t)lapic_reg(l, AR_ICR2) << 32;
	return 0;
}

static int x2apic_icr(struct lapic *l, uint64_t v)
{
	if (v & 0xfff32000u)    /* reserved bits */
		return -EINVAL;
	lapic_put(l, AR_ICR, (uint32_t)v & ~(1u << 12));
	lapic_put(l, AR_ICR2, v >> 32);
	lapic_send_icr(l, v, v >> 32);
	return 0;
}

int lapic_msr_write(struct cpu *c, uint32_t msr, uint64_t v)
{
	struct lapic *l = c->lapic;
	unsigned r = msr - MSR_X2APIC_BASE;

	if (!l)
		return -EINVAL;
	if (msr == MSR_TSC_DEADLINE) {
		lapic_timer_set_deadline(l, v);
		return 0;
	}
	if (l->state != LAPIC_X2APIC || r >= AR_COUNT)
		return -EINVAL;
	if (r == AR_ICR)
		return x2apic_icr(l, v);
	if (v >> 32 || ((r == AR_EOI || r == AR_ESR) && v) || (r == AR_TPR && v > 0xff))
		return -EINVAL;
	if (r == AR_SELF_IPI) {
		if (v > 0xff)
			return -EINVAL;
		lapic_send_self(l, v);
		return 0;
	}
	return reg_write(l, r, v) ? 0 : -EINVAL;
}

static void version_put(struct lapic *l)
{
	lapic_put(l, AR_VERSION, 0x14 | (NR_LVT + l->cmci - 1u) << 16 | (l->vm->irqchip && l->vm->irqchip->split ? LVR_DIRECTED_EOI : 0));
}

/* Everything but the id and the mode as after power-up (10.4.7.1). */
static void reset_registers(struct lapic *l)
{
	bool x2 = l->state == LAPIC_X2APIC;

	lapic_timer_stop(l);
	l->timer.deadline = 0;
	lapic_clear_irqs(l);
	l->eoi_exit = -1;
	atomic_store(&l->errors, 0);
	atomic_store(&l->extint, false);
	for (unsigned r = AR_TPR; r < AR_ISR; r++)
		if (r != AR_LDR || !x2)
			lapic_put(l, r, 0);
	for (unsigned r = AR_ESR; r < AR_COUNT; r++)
		lapic_put(l, r, (r >= AR_LVTT && r <= AR_LVT_ERROR) || r == AR_LVT_CMCI ? LVT_MASKED : 0);
	lapic_put(l, AR_DFR, ~0u);
	lapic_put(l, AR_SVR, 0xff);
	/* The boot CPU starts in virtual wire mode, as firmware would leave it and Linux KVM does. */
	if (l->id == l->vm->boot_cpu_id && !(l->vm->policy.quirks_off & KVM_X86_QUIRK_LINT0_REENABLED))
		lapic_put(l, AR_LVT0, DM_EXTINT << 8);
	version_put(l);
}

void lapic_set_cmci(struct cpu *c, bool on)
{
	if (!c->lapic)
		return;
	c->lapic->cmci = on;
	version_put(c->lapic);
}

void lapic_cmci(struct cpu *c)
{
	if (c->lapic && c->lapic->cmci)
		lapic_local(c->lapic, AR_LVT_CMCI);
}

static void set_base(struct lapic *l, uint64_t v)
{
	unsigned state = !(v & BASE_ENABLE) ? LAPIC_OFF : v & BASE_X2APIC ? LAPIC_X2APIC : LAPIC_XAPIC;

	l->cpu->msr.apic_base = v;
	l->base = v & ~0xfffULL;
	if (state == l->state)
		return;
	if (state == LAPIC_X2APIC) {
		lapic_put(l, AR_ID, l->id);
		lapic_put(l, AR_LDR, x2apic_ldr(l->id));
	} else if (l->state == LAPIC_X2APIC || state == LAPIC_XAPIC) {
		lapic_put(l, AR_ID, l->id << 24);
		lapic_put(l, AR_LDR, 0);
	}
	atomic_store(&l->state, state);
	cpu_request(l->cpu, REQ_EVENT | REQ_TIMER);
}

int lapic_set_base(struct cpu *c, uint64_t v, bool host)
{
	struct lapic *l = c->lapic;
	const struct cpu_features *f = c->feat;
	uint64_t bad = 0x2ff | ~((1ULL << (f && f->phys_bits ? MIN(f->phys_bits, 52u) : 52)) - 1);
	unsigned old = l->state;

	if (f && !(f->f1_ecx & (1u << 21)))
		bad |= BASE_X2APIC;
	if ((v & bad) || ((v & BASE_X2APIC) && !(v & BASE_ENABLE)))
		return -EINVAL;
	if (!host) {
		bool x2 = v & BASE_X2APIC, on = v & BASE_ENABLE;

		/* 10.12.5: x2APIC is entered from xAPIC only, and left by switching off. */
		if ((old == LAPIC_X2APIC && on && !x2) || (old == LAPIC_OFF && x2))
			return -EINVAL;
	}
	set_base(l, v);
	if (!host && old == LAPIC_OFF && l->state != LAPIC_OFF)
		reset_registers(l);     /* 10.4.3: as after power-up */
	return 0;
}

void lapic_reset(struct cpu *c, bool init)
{
	struct lapic *l = c->lapic;

	if (!l)
		return;
	if (!init)
		set_base(l, BASE_DEFAULT | BASE_ENABLE | (l->id == c->vm->boot_cpu_id ? BASE_BSP : 0));
	reset_registers(l);
	if (!init) {
		lapic_put(l, AR_ID, l->id << 24);
		atomic_store(&l->waiting, 0);
		atomic_store(&l->ext_vector, -1);
	}
}

int lapic_create(struct cpu *c)
{
	struct lapic *l;

	if (!c->vm->irqchip)
		return -ENXIO;
	l = calloc(1, sizeof *l);
	if (!l)
		return -ENOMEM;
	l->cpu = c;
	l->vm = c->vm;
	l->id = c->id;
	c->lapic = l;
	lapic_reset(c, false);
	return 0;
}

void lapic_destroy(struct cpu *c)
{
	free(c->lapic);
	c->lapic = NULL;
}

int lapic_get(struct cpu *c, struct kvm_lapic_state *s)
{
	struct lapic *l = c->lapic;
	uint32_t count;

	if (!l)
		return -EINVAL;
	memset(s, 0, sizeof *s);
	/* The count first: an expiry that is found when it is read goes to the IRR, which must be saved with it. */
	count = reg_read(l, AR_TMCCT);
	for (unsigned r = 0; r < AR_COUNT; r++)
		if (reg_readable(l, r) || r == AR_ICR2 || r == AR_DFR)
			st_le32(s->regs + r * 16, r == AR_TMCCT ? count : reg_read(l, r));
	if (l->state == LAPIC_X2APIC && !c->vm->policy.x2apic_32bit_ids)
		st_le32(s->regs + AR_ID * 16, l->id << 24);
	return 0;
}

static int check_id(struct lapic *l, uint32_t id)
{
	if (l->state != LAPIC_X2APIC)
		return 0;
	if (!l->vm->policy.x2apic_32bit_ids)
		return 0;
	return id == l->id ? 0 : -EINVAL;
}

static void load_registers(struct lapic *l, const struct kvm_lapic_state *s)
{
	uint32_t version = lapic_reg(l, AR_VERSION), sum = 0;
	bool x2 = l->state == LAPIC_X2APIC;

	for (unsigned r = 0; r < AR_COUNT; r++)
		lapic_put(l, r, ld_le32(s->regs + r * 16));
	lapic_put(l, AR_VERSION, version);
	lapic_put(l, AR_TPR, lapic_reg(l, AR_TPR) & 0xff);
	lapic_put(l, AR_TDCR, lapic_reg(l, AR_TDCR) & 0xb);
	if (x2) {
		lapic_put(l, AR_ID, l->id);
		lapic_put(l, AR_LDR, x2apic_ldr(l->id));
	}
	/* Vectors 0-15 do not exist. In the IRR they are kept, as Linux does, and never delivered: their class is 0. */
	lapic_put(l, AR_ISR, lapic_reg(l, AR_ISR) & ~0xffffu);
	for (unsigned i = 0; i < 8; i++)
		sum |= (lapic_reg(l, AR_IRR + i) != 0) << i;
	atomic_store(&l->irr_sum, sum);
}

int lapic_set(struct cpu *c, const struct kvm_lapic_state *s)
{
	struct lapic *l = c->lapic;
	enum timer_mode old;
	int r;

	if (!l)
		return -EINVAL;
	r = check_id(l, ld_le32(s->regs + AR_ID * 16));
	if (r)
		return r;
	old = lapic_timer_mode(l);
	load_registers(l, s);
	if ((old == TIMER_DEADLINE) != (lapic_timer_mode(l) == TIMER_DEADLINE))
		l->timer.deadline = 0;
	lapic_timer_restore(l);
	if (((lapic_reg(l, AR_LVT0) >> 8) & 7) == DM_NMI && c->vm->irqchip)
		atomic_store(&c->vm->irqchip->lint_nmi, true);
	cpu_request(c, REQ_EVENT | REQ_TIMER);
	return 0;
}

uint64_t lapic_get_tpr(const struct cpu *c)
{
	return c->lapic ? (lapic_reg(c->lapic, AR_TPR) >> 4) & 15 : 0;
}

void lapic_set_tpr(struct cpu *c, uint64_t cr8)
{
	if (!c->lapic)
		return;
	lapic_put(c->lapic, AR_TPR, (cr8 & 15) << 4);
	lapic_recheck(c->lapic);
}
