/*
 * GSI routing tables: built whole from KVM_SET_GSI_ROUTING's entries, then replaced under the chips' lock.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>

#include "softkvm/irq/internal.h"

static int route_from_kvm(const struct kvm_irq_routing_entry *k, bool split, bool wide, struct route *r)
{
	*r = (struct route){ .gsi = k->gsi, .type = k->type };
	if (k->gsi >= ROUTE_MAX || k->flags)
		return -EINVAL;
	switch (k->type) {
	case KVM_IRQ_ROUTING_IRQCHIP:
		r->chip = k->u.irqchip.irqchip;
		r->pin = k->u.irqchip.pin;
		if (split || r->chip >= KVM_NR_IRQCHIPS)
			return -EINVAL;
		return r->pin < (r->chip == KVM_IRQCHIP_IOAPIC ? KVM_IOAPIC_NUM_PINS : 8) ? 0 : -EINVAL;
	case KVM_IRQ_ROUTING_MSI:
		r->addr = k->u.msi.address_lo | (uint64_t)k->u.msi.address_hi << 32;
		r->data = k->u.msi.data;
		return wide && (k->u.msi.address_hi & 0xff) ? -EINVAL : 0;
	default:
		return -EINVAL;
	}
}

/* One GSI: one MSI, or several pins of different chips. */
static bool route_clash(const struct route *a, const struct route *b)
{
	return a->type != KVM_IRQ_ROUTING_IRQCHIP || b->type != KVM_IRQ_ROUTING_IRQCHIP || a->chip == b->chip;
}

/* Put the entries in order of GSI (stable) and check what belongs together. */
static int route_sort(struct routes *t, const struct route *in, unsigned n)
{
	uint16_t *at = t->first;

	for (unsigned i = 0; i < n; i++)
		at[in[i].gsi + 1]++;
	for (unsigned g = 0; g < ROUTE_MAX; g++)
		at[g + 1] += at[g];
	for (unsigned i = n; i-- > 0; )         /* from the back: at[g + 1] ends as the start of g */
		t->e[--at[in[i].gsi + 1]] = in[i];
	for (unsigned g = 0; g < ROUTE_MAX; g++)
		at[g] = at[g + 1];
	at[ROUTE_MAX] = n;
	for (unsigned i = 0; i < n; i++) {
		struct route *r = &t->e[i];

		for (unsigned j = i; j-- > 0 && t->e[j].gsi == r->gsi; )
			if (route_clash(&t->e[j], r))
				return -EINVAL;
		if (r->type == KVM_IRQ_ROUTING_IRQCHIP)
			t->pin_gsi[r->chip][r->pin] = r->gsi;
	}
	return 0;
}

int route_build(const struct kvm_irq_routing_entry *e, unsigned n, bool split, bool wide, struct routes **out)
{
	struct routes *t;
	struct route *tmp;
	int r = 0;

	if (n > ROUTE_MAX)
		return -EINVAL;
	t = calloc(1, sizeof *t + n * sizeof t->e[0]);
	tmp = calloc(n + 1, sizeof *tmp);
	if (!t || !tmp)
		r = -ENOMEM;
	for (unsigned i = 0; !r && i < n; i++)
		r = route_from_kvm(&e[i], split, wide, &tmp[i]);
	if (!r) {
		t->n = n;
		memset(t->pin_gsi, 0xff, sizeof t->pin_gsi);
		r = route_sort(t, tmp, n);
	}
	free(tmp);
	if (r) {
		free(t);
		return r;
	}
	*out = t;
	return 0;
}

/* GSI 0-15: the 8259A input and the I/O APIC pin of that number; 16-23: the I/O APIC pin. */
int route_default(struct routes **out)
{
	struct kvm_irq_routing_entry e[16 + KVM_IOAPIC_NUM_PINS];
	unsigned n = 0;

	memset(e, 0, sizeof e);
	for (unsigned g = 0; g < KVM_IOAPIC_NUM_PINS; g++) {
		e[n].gsi = g;
		e[n].type = KVM_IRQ_ROUTING_IRQCHIP;
		e[n].u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
		e[n++].u.irqchip.pin = g;
		if (g >= 16)
			continue;
		e[n].gsi = g;
		e[n].type = KVM_IRQ_ROUTING_IRQCHIP;
		e[n].u.irqchip.irqchip = g < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE;
		e[n++].u.irqchip.pin = g & 7;
	}
	return route_build(e, n, false, false, out);
}
