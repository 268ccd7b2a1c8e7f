/*
 * Finding the LAPICs that an interrupt message addresses (SDM vol. 3, 10.6.2, 10.12.10), and IPIs.
 */
#include "softkvm/irq/internal.h"

#define XAPIC_ALL 0xffu
#define X2APIC_ALL 0xffffffffu

static bool match_logical(const struct lapic *l, uint32_t dest)
{
	uint32_t ldr = lapic_reg(l, AR_LDR);

	if (l->state == LAPIC_X2APIC)
		return (ldr >> 16) == (dest >> 16) && (ldr & dest & 0xffff);
	ldr >>= 24;
	if (dest > 0xff)
		return false;
	if (lapic_reg(l, AR_DFR) >> 28 == 0xf)
		return ldr & dest;
	return (ldr >> 4) == (dest >> 4) && (ldr & dest & 0xf);
}

static bool match_dest(const struct lapic *l, const struct apic_msg *m)
{
	bool x2 = l->state == LAPIC_X2APIC;
	uint32_t dest = m->dest;

	/* A device that can only say 8 bits means everybody by 0xff, unless the client has 32-bit ids throughout. */
	if (x2 && !m->source && dest == XAPIC_ALL && !l->vm->policy.x2apic_no_broadcast_quirk)
		dest = X2APIC_ALL;
	if (dest == (x2 ? X2APIC_ALL : XAPIC_ALL))
		return true;
	if (m->logical)
		return match_logical(l, dest);
	if (dest == l->id)
		return true;
	return !x2 && dest == lapic_reg(l, AR_ID) >> 24;
}

static bool match(const struct lapic *l, const struct apic_msg *m)
{
	if (m->shorthand == SH_SELF)
		return l == m->source;
	if (l->state == LAPIC_OFF || (m->shorthand == SH_OTHERS && l == m->source))
		return false;
	return m->shorthand != SH_NONE || match_dest(l, m);
}

static struct lapic *vm_lapic(struct vm *vm, unsigned i)
{
	struct cpu *c = vm->cpus[i];

	return c ? c->lapic : NULL;
}

/* The usual case without a search: a physical destination whose vCPU sits at that index. */
static struct lapic *unicast(struct vm *vm, const struct apic_msg *m)
{
	struct lapic *l;

	if (m->shorthand == SH_SELF)
		return m->source;
	if (m->shorthand != SH_NONE || m->logical || m->dest >= XAPIC_ALL || m->dest >= vm->ncpus)
		return NULL;
	l = vm_lapic(vm, m->dest);
	/* Only where no other could match too: x2APIC ids are unique, xAPIC ids can be rewritten. */
	return l && l->state == LAPIC_X2APIC && l->id == m->dest ? l : NULL;
}

/* Lowest priority: one of the matching, enabled LAPICs, picked by vector so that a device keeps its CPU. */
static struct lapic *lowest(struct vm *vm, const struct apic_msg *m, bool *any)
{
	unsigned n = vm->ncpus, have = 0, pick;
	struct lapic *l;

	for (unsigned i = 0; i < n; i++) {
		l = vm_lapic(vm, i);
		if (l && match(l, m)) {
			*any = true;
			have += lapic_sw_enabled(l);
		}
	}
	if (!have)
		return NULL;
	pick = m->vector % have;
	for (unsigned i = 0; i < n; i++) {
		l = vm_lapic(vm, i);
		if (l && match(l, m) && lapic_sw_enabled(l) && !pick--)
			return l;
	}
	return NULL;
}

int apic_send(struct vm *vm, const struct apic_msg *m, bool *fresh)
{
	unsigned n = vm->ncpus;
	struct lapic *l = unicast(vm, m);
	bool any = false;
	int r = -1;

	if (l)
		return lapic_accept(l, m, fresh);
	if (m->mode == DM_LOWEST || (m->redir_hint && m->mode == DM_FIXED)) {
		l = lowest(vm, m, &any);
		return l ? lapic_accept(l, m, fresh) : any ? 0 : -1;
	}
	for (unsigned i = 0; i < n; i++) {
		l = vm_lapic(vm, i);
		if (l && match(l, m))
			r = MAX(r, 0) + lapic_accept(l, m, fresh);
	}
	return r;
}

void lapic_send_icr(struct lapic *l, uint32_t icr, uint32_t dest)
{
	struct apic_msg m = {
		.dest = dest, .vector = icr & 0xff, .mode = (icr >> 8) & 7, .logical = icr & (1u << 11),
		.assert = icr & (1u << 14), .trig_level = icr & (1u << 15), .shorthand = (icr >> 18) & 3, .source = l,
	};
	bool fresh = false;

	if (m.mode <= DM_LOWEST) {
		m.trig_level = false;   /* IPIs are edge triggered; level is for INIT de-assert only */
		if (m.vector < 16) {
			lapic_error(l, ESR_SEND_ILLEGAL);
			return;
		}
	}
	apic_send(l->vm, &m, &fresh);
}

void lapic_send_self(struct lapic *l, uint8_t vector)
{
	lapic_send_icr(l, vector | SH_SELF << 18, 0);
}
