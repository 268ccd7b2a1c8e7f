/*
 * 8259A interrupt controller pair with the PC's edge/level control registers (ports 0x4d0, 0x4d1).
 *
 * Intel 8259A data sheet; the slave's INT is the master's input 2. As in Linux KVM a request latched in edge
 * mode stays until acknowledged, single and LTIM mode bits of ICW1 are without effect (the PC sets neither).
 */
#include <linux/kvm.h>

#include "softkvm/irq/internal.h"

static const uint8_t elcr_mask[2] = { 0xf8, 0xde };

void pic_reset(struct pics *p)
{
	memset(p->c, 0, sizeof p->c);
	memset(p->sources, 0, sizeof p->sources);
	for (unsigned i = 0; i < 2; i++) {
		p->c[i].slave = i;
		p->c[i].s.elcr_mask = elcr_mask[i];
	}
	p->output = false;
}

/* Position in the current order of priority (0 highest, 8 none) of the best bit of `mask`. */
static unsigned pic_priority(const struct pic *p, uint8_t mask)
{
	unsigned i = 0;

	if (!mask)
		return 8;
	while (!(mask & (1 << ((i + p->s.priority_add) & 7))))
		i++;
	return i;
}

/* The request that would be acknowledged now, or -1. */
static int pic_best(const struct pic *p)
{
	uint8_t isr = p->s.isr;
	unsigned want = pic_priority(p, p->s.irr & ~p->s.imr);

	if (want == 8)
		return -1;
	if (p->s.special_mask)          /* masked levels in service do not hold back others */
		isr &= ~p->s.imr;
	if (p->s.special_fully_nested_mode && !p->slave)
		isr &= ~(1 << 2);       /* let a higher request of the slave through */
	if (want >= pic_priority(p, isr))
		return -1;
	return (want + p->s.priority_add) & 7;
}

/* One line of one chip. 1 new request, 0 was there already. */
static int pic_chip_line(struct pic *p, unsigned n, int level)
{
	uint8_t bit = 1 << n;
	bool was = p->s.irr & bit, edge = !(p->s.elcr & bit);

	if (!level) {
		p->s.last_irr &= ~bit;
		if (!edge)
			p->s.irr &= ~bit;
		return 1;
	}
	if (edge && (p->s.last_irr & bit))
		return 1;
	p->s.irr |= bit;
	p->s.last_irr |= bit;
	return !was;
}

static void pic_kick(struct irqchip *ic)
{
	unsigned n = ic->vm->ncpus;

	for (unsigned i = 0; i < n; i++) {
		struct cpu *c = ic->vm->cpus[i];

		if (c && c->lapic && lapic_accepts_pic(c))
			cpu_request(c, REQ_EVENT);
	}
}

void pic_update(struct irqchip *ic)
{
	struct pics *p = &ic->pics;
	bool out;

	/* The slave's INT is a line like another: in edge mode a new request must make a new edge. */
	if (pic_best(&p->c[1]) >= 0) {
		pic_chip_line(&p->c[0], 2, 1);
		pic_chip_line(&p->c[0], 2, 0);
	}
	out = pic_best(&p->c[0]) >= 0;
	atomic_store(&p->output, out);
	if (out)
		pic_kick(ic);
}

int pic_set_line(struct irqchip *ic, unsigned line, int level, enum irq_source src)
{
	struct pic *p = &ic->pics.c[line >> 3];
	unsigned n = line & 7;
	int fresh;

	if (level)
		ic->pics.sources[line] |= 1 << src;
	else
		ic->pics.sources[line] &= ~(1 << src);
	fresh = pic_chip_line(p, n, ic->pics.sources[line] != 0);
	pic_update(ic);
	return p->s.imr & (1 << n) ? -1 : fresh;
}

static void pic_clear_isr(struct irqchip *ic, struct pic *p, unsigned n)
{
	p->s.isr &= ~(1 << n);
	irqchip_acked(ic, p->slave, n);
}

/* What the CPU's INTA does to one chip. */
static void pic_inta(struct irqchip *ic, struct pic *p, unsigned n)
{
	p->s.isr |= 1 << n;
	if (!(p->s.elcr & (1 << n)))
		p->s.irr &= ~(1 << n);
	if (p->s.auto_eoi) {
		if (p->s.rotate_on_auto_eoi)
			p->s.priority_add = (n + 1) & 7;
		pic_clear_isr(ic, p, n);
	}
}

int pic_peek(const struct pics *p)
{
	int n = pic_best(&p->c[0]), n2;

	if (n != 2)
		return (p->c[0].s.irq_base + (n < 0 ? 7 : n)) & 0xff;
	n2 = pic_best(&p->c[1]);
	return (p->c[1].s.irq_base + (n2 < 0 ? 7 : n2)) & 0xff;
}

int pic_ack(struct irqchip *ic)
{
	struct pic *m = &ic->pics.c[0], *s = &ic->pics.c[1];
	int n = pic_best(m), n2, vector;

	if (n < 0) {
		vector = m->s.irq_base + 7;     /* spurious: no bit of ISR is set */
	} else if (n == 2) {
		pic_inta(ic, m, 2);
		n2 = pic_best(s);
		if (n2 >= 0)
			pic_inta(ic, s, n2);
		vector = s->s.irq_base + (n2 < 0 ? 7 : n2);
	} else {
		pic_inta(ic, m, n);
		vector = m->s.irq_base + n;
	}
	pic_update(ic);
	return vector & 0xff;
}

static void pic_icw1(struct irqchip *ic, struct pic *p, uint8_t v)
{
	uint8_t dropped = p->s.irr & ~p->s.elcr;

	p->s.init4 = v & 1;
	p->s.last_irr = 0;
	p->s.irr &= p->s.elcr;
	p->s.imr = 0;
	p->s.isr = 0;
	p->s.priority_add = 0;
	p->s.special_mask = 0;
	p->s.read_reg_select = 0;
	p->s.poll = 0;
	if (!p->s.init4) {
		p->s.special_fully_nested_mode = 0;
		p->s.auto_eoi = 0;
	}
	p->s.init_state = 1;
	/* Requests that vanish here will never be EOIed: whoever waits for that must go on. */
	for (unsigned n = 0; n < 8; n++)
		if (dropped & (1 << n))
			irqchip_acked(ic, p->slave, n);
	pic_update(ic);
}

static void pic_ocw2(struct irqchip *ic, struct pic *p, uint8_t v)
{
	unsigned cmd = v >> 5, n = v & 7, prio;

	switch (cmd) {
	case 0:         /* rotate in AEOI mode: clear, set */
	case 4:
		p->s.rotate_on_auto_eoi = cmd >> 2;
		break;
	case 1:         /* non-specific EOI, also with rotation */
	case 5:
		prio = pic_priority(p, p->s.special_mask ? p->s.isr & ~p->s.imr : p->s.isr);
		if (prio == 8)
			break;
		n = (prio + p->s.priority_add) & 7;
		if (cmd == 5)
			p->s.priority_add = (n + 1) & 7;
		pic_clear_isr(ic, p, n);
		break;
	case 3:         /* specific EOI, also with rotation */
	case 7:
		if (cmd == 7)
			p->s.priority_add = (n + 1) & 7;
		pic_clear_isr(ic, p, n);
		break;
	case 6:         /* set priority */
		p->s.priority_add = (n + 1) & 7;
		break;
	}
	pic_update(ic);
}

static void pic_ocw3(struct pic *p, uint8_t v)
{
	if (v & 4)
		p->s.poll = 1;
	if (v & 2)
		p->s.read_reg_select = v & 1;
	if (v & 0x40)
		p->s.special_mask = (v >> 5) & 1;
}

static void pic_write_data(struct irqchip *ic, struct pic *p, uint8_t v)
{
	uint8_t opened;

	switch (p->s.init_state) {
	case 0:
		opened = p->s.imr & ~v;
		p->s.imr = v;
		for (unsigned n = 0; n < 8; n++)
			if (opened & (1 << n))
				irqchip_unmasked(ic, p->slave, n);
		pic_update(ic);
		break;
	case 1:
		p->s.irq_base = v & 0xf8;
		p->s.init_state = 2;
		break;
	case 2:         /* ICW3: the cascade is wired */
		p->s.init_state = p->s.init4 ? 3 : 0;
		break;
	default:
		p->s.special_fully_nested_mode = (v >> 4) & 1;
		p->s.auto_eoi = (v >> 1) & 1;
		p->s.init_state = 0;
		break;
	}
}

static void pic_write(struct irqchip *ic, struct pic *p, unsigned a0, uint8_t v)
{
	if (a0)
		pic_write_data(ic, p, v);
	else if (v & 0x10)
		pic_icw1(ic, p, v);
	else if (v & 8)
		pic_ocw3(p, v);
	else
		pic_ocw2(ic, p, v);
	if (!a0)
		pic_update(ic);
}

static uint8_t pic_read(struct irqchip *ic, struct pic *p, unsigned a0)
{
	int n;

	if (p->s.poll) {        /* the read after a poll command is an INTA */
		p->s.poll = 0;
		n = pic_best(p);
		if (n < 0)
			return 0;
		pic_inta(ic, p, n);
		pic_update(ic);
		return 0x80 | n;
	}
	if (a0)
		return p->s.imr;
	return p->s.read_reg_select ? p->s.isr : p->s.irr;
}

bool pic_owns(uint16_t port, unsigned len)
{
	static const uint16_t first[] = { 0x20, 0xa0, 0x4d0 };

	for (unsigned i = 0; i < ARRAY_SIZE(first); i++)
		if (port >= first[i] && port + len <= first[i] + 2u)
			return true;
	return false;
}

bool pic_pio(struct irqchip *ic, uint16_t port, unsigned len, bool write, uint8_t *data)
{
	if (!pic_owns(port, len))
		return false;
	for (unsigned i = 0; i < len; i++, port++) {
		bool elcr = port >= 0x4d0;
		struct pic *p = &ic->pics.c[elcr ? port & 1 : port >> 7];

		if (elcr && write)
			p->s.elcr = data[i] & p->s.elcr_mask;
		else if (elcr)
			data[i] = p->s.elcr;
		else if (write)
			pic_write(ic, p, port & 1, data[i]);
		else
			data[i] = pic_read(ic, p, port & 1);
	}
	return true;
}
