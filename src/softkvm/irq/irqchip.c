/*
 * The chips of a VM together: creation, lines and messages, acknowledge, state for KVM_GET/SET_IRQCHIP.
 */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "softkvm/irq/internal.h"

void irqchip_lock(struct irqchip *ic)
{
	pthread_mutex_lock(&ic->lock);
}

void irqchip_unlock(struct irqchip *ic)
{
	struct pit *p = ic->pit;

	/* A tick that waited for an EOI: only now, when no chip is in the middle of a change. */
	if (p && p->inject)
		pit_poll(ic, 0);
	pthread_mutex_unlock(&ic->lock);
}

static struct irqchip *irqchip_new(struct vm *vm)
{
	struct irqchip *ic = calloc(1, sizeof *ic);

	if (!ic)
		return NULL;
	pthread_mutex_init(&ic->lock, NULL);
	ic->vm = vm;
	ic->epoll = ic->stop_fd = -1;
	pic_reset(&ic->pics);
	ioapic_reset(&ic->ioapic);
	return ic;
}

static int irqchip_make(struct vm *vm, bool split, unsigned nr)
{
	struct irqchip *ic;
	int r;

	if (vm->irqchip)
		return -EEXIST;
	if (vm->ncpus || nr > ROUTE_MAX)
		return -EINVAL;
	ic = irqchip_new(vm);
	if (!ic)
		return -ENOMEM;
	ic->split = split;
	ic->nr_reserved = nr;
	r = split ? route_build(NULL, 0, true, false, &ic->routes) : route_default(&ic->routes);
	if (r) {
		free(ic);
		return r;
	}
	vm->irqchip = ic;
	vm->split_irqchip = split;
	return 0;
}

int irqchip_create(struct vm *vm)
{
	return irqchip_make(vm, false, 0);
}

int irqchip_create_split(struct vm *vm, unsigned nr_routes)
{
	return irqchip_make(vm, true, nr_routes);
}

int irqchip_create_pit(struct vm *vm, const struct kvm_pit_config *cfg)
{
	struct irqchip *ic = vm->irqchip;
	pthread_condattr_t a;
	struct pit *p;

	if (!ic || ic->split)
		return -ENOENT;
	if (ic->pit)
		return -EEXIST;
	p = calloc(1, sizeof *p);
	if (!p)
		return -ENOMEM;
	pthread_condattr_init(&a);
	pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
	pthread_cond_init(&p->cond, &a);
	pthread_condattr_destroy(&a);
	p->dummy_speaker = !cfg || (cfg->flags & KVM_PIT_SPEAKER_DUMMY);
	pit_reset(p);
	irqchip_lock(ic);
	ic->pit = p;
	irqchip_update_eoi_map(ic);
	irqchip_unlock(ic);
	return 0;
}

void irqchip_destroy(struct vm *vm)
{
	struct irqchip *ic = vm->irqchip;

	if (!ic)
		return;
	irqfd_stop(ic);
	if (ic->pit) {
		pit_stop(ic);
		pthread_cond_destroy(&ic->pit->cond);
		free(ic->pit);
	}
	free(ic->routes);
	pthread_mutex_destroy(&ic->lock);
	free(ic);
	vm->irqchip = NULL;
}

/* -- who hears of an EOI ----------------------------------------------------------------------- */
static int pin_gsi(const struct irqchip *ic, unsigned chip, unsigned pin)
{
	return ic->routes->pin_gsi[chip][pin];
}

void irqchip_acked(struct irqchip *ic, unsigned chip, unsigned pin)
{
	int gsi = pin_gsi(ic, chip, pin);

	if (gsi < 0)
		return;
	if (gsi == 0 && ic->pit)
		pit_acked(ic->pit);
	if (ic->nresample)
		irqfd_acked(ic, gsi);
}

void irqchip_unmasked(struct irqchip *ic, unsigned chip, unsigned pin)
{
	if (!ic->pit || pin_gsi(ic, chip, pin) != 0)
		return;
	/* Ticks from the time when nobody listened are not owed, and their EOI will not come. */
	ic->pit->pending = 0;
	ic->pit->acked = true;
}

bool irqchip_wants_ack(const struct irqchip *ic, unsigned chip, unsigned pin)
{
	int gsi = pin_gsi(ic, chip, pin);

	if (gsi < 0)
		return false;
	if (gsi == 0 && ic->pit)
		return true;
	for (unsigned i = 0; ic->nresample && i < ic->nfds; i++)
		if (ic->fds[i].used && ic->fds[i].resample >= 0 && ic->fds[i].gsi == (uint32_t)gsi)
			return true;
	return false;
}

static void map_add(uint32_t map[8], unsigned v)
{
	map[v >> 5] |= 1u << (v & 31);
}

void irqchip_update_eoi_map(struct irqchip *ic)
{
	uint32_t map[8] = { 0 };

	for (unsigned i = 0; !ic->split && i < KVM_IOAPIC_NUM_PINS; i++)
		if ((ic->ioapic.rte[i] & (1u << 15)) || irqchip_wants_ack(ic, KVM_IRQCHIP_IOAPIC, i))
			map_add(map, ic->ioapic.rte[i] & 0xff);
	for (unsigned i = 0; !ic->split && i < KVM_IOAPIC_NUM_PINS; i++)
		if (ic->ioapic.rte[i] & (1u << 14))
			map_add(map, ic->ioapic.sent[i]);
	for (unsigned i = 0; ic->split && i < ic->routes->n; i++) {
		const struct route *r = &ic->routes->e[i];

		if (r->gsi < ic->nr_reserved && r->type == KVM_IRQ_ROUTING_MSI && (r->data & (1u << 15)))
			map_add(map, r->data & 0xff);
	}
	for (unsigned i = 0; i < 8; i++)
		atomic_store(&ic->eoi_map[i], map[i]);
}

/* -- lines and messages ------------------------------------------------------------------------ */
int irqchip_send_msi(struct vm *vm, uint64_t addr, uint32_t data, bool *fresh)
{
	struct apic_msg m = {
		.dest = (addr >> 12) & 0xff, .logical = addr & 4, .redir_hint = addr & 8, .vector = data & 0xff,
		.mode = (data >> 8) & 7, .trig_level = data & (1u << 15), .assert = true,
	};

	if (vm->policy.x2apic_32bit_ids)
		m.dest |= (addr >> 32) & 0xffffff00u;
	return apic_send(vm, &m, fresh);
}

static int route_set(struct irqchip *ic, const struct route *r, int level, enum irq_source src)
{
	bool fresh = false;
	int n;

	if (r->type == KVM_IRQ_ROUTING_MSI) {
		if (!level)
			return -1;
		n = irqchip_send_msi(ic->vm, r->addr, r->data, &fresh);
		return n > 0 && !fresh ? 0 : n;
	}
	if (r->chip == KVM_IRQCHIP_IOAPIC)
		return ioapic_set_line(ic, r->pin, level, src);
	return pic_set_line(ic, r->pin + 8 * r->chip, level, src);
}

int irqchip_set_gsi(struct irqchip *ic, uint32_t gsi, int level, enum irq_source src)
{
	const struct routes *t = ic->routes;
	int ret = -1, r;

	if (gsi >= ROUTE_MAX)
		return -1;
	for (unsigned i = t->first[gsi]; i < t->first[gsi + 1]; i++) {
		r = route_set(ic, &t->e[i], level, src);
		if (r >= 0)
			ret = MAX(ret, 0) + r;
	}
	return ret;
}

int irqchip_line(struct vm *vm, uint32_t gsi, int level, int source)
{
	struct irqchip *ic = vm->irqchip;
	int r;

	if (!ic)
		return -ENXIO;
	irqchip_lock(ic);
	r = irqchip_set_gsi(ic, gsi, level, source & 7);
	irqchip_unlock(ic);
	return r;
}

int irqchip_msi(struct vm *vm, uint64_t addr, uint32_t data)
{
	bool fresh = false;
	int r;

	if (!vm->irqchip)
		return -EINVAL;
	if (vm->policy.x2apic_32bit_ids && ((addr >> 32) & 0xff))
		return -EINVAL;
	r = irqchip_send_msi(vm, addr, data, &fresh);
	return r < 0 ? -EPERM : r;
}

int irqchip_set_routing(struct vm *vm, const struct kvm_irq_routing_entry *e, unsigned n)
{
	struct irqchip *ic = vm->irqchip;
	struct routes *t, *old;
	int r;

	if (!ic)
		return -EINVAL;
	r = route_build(e, n, ic->split, vm->policy.x2apic_32bit_ids, &t);
	if (r)
		return r;
	irqchip_lock(ic);
	old = ic->routes;
	ic->routes = t;
	irqchip_update_eoi_map(ic);
	irqchip_unlock(ic);
	free(old);
	return 0;
}

/* -- what a vCPU takes ------------------------------------------------------------------------- */
static bool pic_wants(struct cpu *c, struct irqchip *ic)
{
	return atomic_load_explicit(&ic->pics.output, memory_order_acquire) && lapic_accepts_pic(c);
}

static int ext_pending(struct cpu *c)
{
	int v = c->lapic ? atomic_load_explicit(&c->lapic->ext_vector, memory_order_relaxed) : -1;

	return v >= 0 && lapic_accepts_pic(c) ? v : -1;
}

int irqchip_pending(struct cpu *c)
{
	struct irqchip *ic = c->vm->irqchip;
	int v;

	if (!ic)
		return -1;
	if (unlikely(pic_wants(c, ic))) {
		irqchip_lock(ic);
		v = pic_peek(&ic->pics);
		irqchip_unlock(ic);
		return v;
	}
	if (unlikely((v = ext_pending(c)) >= 0))
		return v;
	return c->lapic ? lapic_next(c->lapic) : -1;
}

int irqchip_ack(struct cpu *c)
{
	struct irqchip *ic = c->vm->irqchip;
	int v;

	if (!ic)
		return -1;
	if (pic_wants(c, ic)) {
		irqchip_lock(ic);
		v = pic_ack(ic);
		irqchip_unlock(ic);
		if (c->lapic)
			atomic_store(&c->lapic->extint, false);
		return v;
	}
	v = ext_pending(c);
	if (v >= 0) {
		atomic_store(&c->lapic->ext_vector, -1);
		return v;
	}
	v = c->lapic ? lapic_next(c->lapic) : -1;
	if (v >= 0)
		lapic_ack_vector(c->lapic, v);
	return v;
}

/* -- state ------------------------------------------------------------------------------------- */
int irqchip_get(struct vm *vm, struct kvm_irqchip *chip)
{
	struct irqchip *ic = vm->irqchip;

	if (!ic || ic->split)
		return -ENXIO;
	if (chip->chip_id >= KVM_NR_IRQCHIPS)
		return -EINVAL;
	irqchip_lock(ic);
	memset(&chip->chip, 0, sizeof chip->chip);
	if (chip->chip_id == KVM_IRQCHIP_IOAPIC)
		ioapic_get(ic, &chip->chip.ioapic);
	else
		chip->chip.pic = ic->pics.c[chip->chip_id].s;
	irqchip_unlock(ic);
	return 0;
}

int irqchip_set(struct vm *vm, const struct kvm_irqchip *chip)
{
	struct irqchip *ic = vm->irqchip;
	struct pic *p;

	if (!ic || ic->split)
		return -ENXIO;
	if (chip->chip_id >= KVM_NR_IRQCHIPS)
		return -EINVAL;
	irqchip_lock(ic);
	if (chip->chip_id == KVM_IRQCHIP_IOAPIC) {
		ioapic_set(ic, &chip->chip.ioapic);
	} else {
		p = &ic->pics.c[chip->chip_id];
		p->s = chip->chip.pic;
		p->s.priority_add &= 7;
		p->s.init_state &= 3;
		p->s.elcr_mask = p->slave ? 0xde : 0xf8;
		pic_update(ic);
	}
	irqchip_unlock(ic);
	return 0;
}

int irqchip_get_pit2(struct vm *vm, struct kvm_pit_state2 *s)
{
	struct irqchip *ic = vm->irqchip;

	if (!ic || !ic->pit)
		return -ENXIO;
	irqchip_lock(ic);
	pit_get_state(ic->pit, s);
	irqchip_unlock(ic);
	return 0;
}

int irqchip_set_pit2(struct vm *vm, const struct kvm_pit_state2 *s)
{
	struct irqchip *ic = vm->irqchip;

	if (!ic || !ic->pit)
		return -ENXIO;
	irqchip_lock(ic);
	pit_set_state(ic, s);
	irqchip_unlock(ic);
	return 0;
}

int irqchip_reinject(struct vm *vm, bool on)
{
	struct irqchip *ic = vm->irqchip;

	if (!ic || !ic->pit)
		return -ENXIO;
	irqchip_lock(ic);
	ic->pit->reinject = on;
	ic->pit->pending = 0;
	ic->pit->acked = true;
	irqchip_unlock(ic);
	return 0;
}
