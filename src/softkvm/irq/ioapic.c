/*
 * I/O APIC, 24 pins, version 0x11 (82093AA), as Linux KVM models it.
 *
 * `irr` holds the pins' levels as last driven, plus edges. An edge on a masked pin is lost for delivery; a level
 * that is high when its entry is unmasked, or after EOI, is delivered again. Remote IRR stays over rewrites
 * of a level entry and is cleared when the entry becomes edge triggered (Linux and Xen rely on this to get
 * rid of a stuck one, since version 0x11 has no EOI register).
 */
#include <linux/kvm.h>

#include "softkvm/irq/internal.h"

enum { IO_ID = 0, IO_VERSION = 1, IO_ARB = 2, IO_RTE = 0x10 };
#define RTE_LOGICAL (1ULL << 11)
#define RTE_STATUS (1ULL << 12)
#define RTE_REMOTE_IRR (1ULL << 14)
#define RTE_LEVEL (1ULL << 15)
#define RTE_MASK (1ULL << 16)
#define IOAPIC_BASE 0xfec00000u

void ioapic_reset(struct ioapic *io)
{
	memset(io, 0, sizeof *io);
	io->base = IOAPIC_BASE;
	for (unsigned i = 0; i < KVM_IOAPIC_NUM_PINS; i++)
		io->rte[i] = RTE_MASK;
}

/* Send the pin's message if the entry lets it. As irqchip_line(). */
static int ioapic_service(struct irqchip *ic, unsigned pin)
{
	struct ioapic *io = &ic->ioapic;
	uint64_t e = io->rte[pin];
	bool level = e & RTE_LEVEL, fresh = false;
	struct apic_msg m = {
		.dest = e >> 56, .vector = e & 0xff, .mode = (e >> 8) & 7, .logical = e & RTE_LOGICAL,
		.trig_level = level, .assert = true,
	};
	int r;

	if ((e & RTE_MASK) || (level && (e & RTE_REMOTE_IRR)))
		return -1;
	if (!level)
		io->irr_delivered |= 1u << pin;
	r = apic_send(ic->vm, &m, &fresh);
	/* Modes other than fixed and lowest priority never see an EOI. */
	if (r > 0 && level && m.mode <= DM_LOWEST)
		io->rte[pin] |= RTE_REMOTE_IRR;
	io->sent[pin] = m.vector;
	return r > 0 ? fresh : r;
}

int ioapic_set_line(struct irqchip *ic, unsigned pin, int level, enum irq_source src)
{
	struct ioapic *io = &ic->ioapic;
	uint32_t bit = 1u << pin;
	bool was = io->irr & bit;

	if (level)
		io->sources[pin] |= 1 << src;
	else
		io->sources[pin] &= ~(1 << src);
	if (!io->sources[pin]) {
		io->irr &= ~bit;
		return 1;
	}
	io->irr |= bit;
	if (!(io->rte[pin] & RTE_LEVEL)) {
		if (was)
			return 0;
		io->irr_delivered &= ~bit;
	}
	return ioapic_service(ic, pin);
}

/* A request of loaded state. Who drives the line is not known: whoever lowers it ends the request, a resampled one's EOI too. */
static void ioapic_load_irr(struct irqchip *ic, unsigned pin)
{
	ic->ioapic.irr |= 1u << pin;
	ioapic_service(ic, pin);
}

void ioapic_eoi(struct irqchip *ic, uint8_t vector, bool level, bool suppressed)
{
	struct ioapic *io = &ic->ioapic;

	for (unsigned i = 0; i < KVM_IOAPIC_NUM_PINS; i++) {
		if ((io->rte[i] & RTE_REMOTE_IRR ? io->sent[i] : io->rte[i] & 0xff) != vector)
			continue;
		/* First whoever holds the line up for this EOI: it must be down before the level is looked at. */
		irqchip_acked(ic, KVM_IRQCHIP_IOAPIC, i);
		if (!level || suppressed || !(io->rte[i] & RTE_LEVEL))
			continue;
		io->rte[i] &= ~RTE_REMOTE_IRR;
		if (io->irr & (1u << i))
			ioapic_service(ic, i);
	}
}

static void ioapic_write_rte(struct irqchip *ic, unsigned pin, bool high, uint32_t v)
{
	struct ioapic *io = &ic->ioapic;
	uint64_t old = io->rte[pin], keep = RTE_REMOTE_IRR | RTE_STATUS, e;

	if (high)
		e = (uint32_t)old | (uint64_t)v << 32;
	else
		e = (old & ~0xffffffffULL) | (v & ~(uint32_t)keep) | (old & keep);
	if (!(e & RTE_LEVEL))
		e &= ~RTE_REMOTE_IRR;
	io->rte[pin] = e;
	irqchip_update_eoi_map(ic);
	if ((old & RTE_MASK) && !(e & RTE_MASK))
		irqchip_unmasked(ic, KVM_IRQCHIP_IOAPIC, pin);
	if ((e & RTE_LEVEL) && !(e & (RTE_MASK | RTE_REMOTE_IRR)) && (io->irr & (1u << pin))) {
		/* A resampled line may be up only because its EOI never came while the pin was masked: ask again. */
		irqchip_acked(ic, KVM_IRQCHIP_IOAPIC, pin);
		if (io->irr & (1u << pin))
			ioapic_service(ic, pin);
	}
}

static void ioapic_write(struct irqchip *ic, uint32_t v)
{
	struct ioapic *io = &ic->ioapic;
	unsigned pin = (io->sel - IO_RTE) >> 1;

	if (io->sel == IO_ID)
		io->id = (v >> 24) & 0xf;
	else if (io->sel >= IO_RTE && pin < KVM_IOAPIC_NUM_PINS)
		ioapic_write_rte(ic, pin, io->sel & 1, v);
}

static uint32_t ioapic_read(const struct ioapic *io)
{
	unsigned pin = (io->sel - IO_RTE) >> 1;

	if (io->sel == IO_VERSION)
		return (KVM_IOAPIC_NUM_PINS - 1) << 16 | 0x11;
	if (io->sel == IO_ID || io->sel == IO_ARB)
		return (io->id & 0xf) << 24;
	if (io->sel < IO_RTE)
		return 0;
	if (pin >= KVM_IOAPIC_NUM_PINS)
		return ~0u;
	return io->sel & 1 ? io->rte[pin] >> 32 : (uint32_t)io->rte[pin];
}

void ioapic_mmio(struct irqchip *ic, uint64_t off, unsigned len, bool write, uint8_t *data)
{
	struct ioapic *io = &ic->ioapic;
	uint8_t raw[8] = { 0 };

	if (write) {
		memcpy(raw, data, MIN(len, sizeof raw));
		if (off & 0xf)
			return;
		if (off == 0)
			io->sel = raw[0];
		else if (off == 0x10)
			ioapic_write(ic, ld_le32(raw));
		return;
	}
	if (!(off & 0xf))
		st_le32(raw, off == 0 ? io->sel : off == 0x10 ? ioapic_read(io) : 0);
	memcpy(data, raw, MIN(len, sizeof raw));
}

void ioapic_get(struct irqchip *ic, struct kvm_ioapic_state *s)
{
	const struct ioapic *io = &ic->ioapic;

	memset(s, 0, sizeof *s);
	s->base_address = io->base;
	s->ioregsel = io->sel;
	s->id = io->id;
	s->irr = io->irr & ~io->irr_delivered;  /* an edge that was sent must not be sent again after loading */
	for (unsigned i = 0; i < KVM_IOAPIC_NUM_PINS; i++)
		s->redirtbl[i].bits = io->rte[i];
}

void ioapic_set(struct irqchip *ic, const struct kvm_ioapic_state *s)
{
	struct ioapic *io = &ic->ioapic;

	__atomic_store_n(&io->base, s->base_address, __ATOMIC_RELAXED);
	io->sel = s->ioregsel & 0xff;
	io->id = s->id & 0xf;
	io->irr = io->irr_delivered = 0;
	for (unsigned i = 0; i < KVM_IOAPIC_NUM_PINS; i++)
		io->sent[i] = io->rte[i] = s->redirtbl[i].bits;
	irqchip_update_eoi_map(ic);
	for (unsigned i = 0; i < KVM_IOAPIC_NUM_PINS; i++)
		if (s->irr & (1u << i))
			ioapic_load_irr(ic, i);
}
