/*
 * Local APIC: taking interrupts in, choosing the next, ending them (SDM vol. 3, 10.5, 10.8).
 */
#include <errno.h>

#include "softkvm/irq/internal.h"

static void bit_set(struct lapic *l, unsigned first, unsigned v)
{
	atomic_fetch_or(&l->r[first + (v >> 5)], 1u << (v & 31));
}

static void bit_clear(struct lapic *l, unsigned first, unsigned v)
{
	atomic_fetch_and(&l->r[first + (v >> 5)], ~(1u << (v & 31)));
}

static bool bit_test(const struct lapic *l, unsigned first, unsigned v)
{
	return atomic_load(&l->r[first + (v >> 5)]) >> (v & 31) & 1;
}

int lapic_highest(const struct lapic *l, unsigned first)
{
	for (int w = 7; w >= 0; w--) {
		uint32_t v = atomic_load_explicit(&l->r[first + w], memory_order_relaxed);

		if (v)
			return w * 32 + 31 - __builtin_clz(v);
	}
	return -1;
}

/* IRR through its summary: one load when nothing is pending. Own thread (clears stale summary bits). */
static int irr_highest(struct lapic *l)
{
	uint32_t sum;

	while ((sum = atomic_load(&l->irr_sum))) {
		unsigned w = 31 - __builtin_clz(sum);
		uint32_t v = atomic_load(&l->r[AR_IRR + w]);

		if (v)
			return w * 32 + 31 - __builtin_clz(v);
		/* A sender sets the word before the summary: after clearing, look at the word once more. */
		atomic_fetch_and(&l->irr_sum, ~(1u << w));
		if (atomic_load(&l->r[AR_IRR + w]))
			atomic_fetch_or(&l->irr_sum, 1u << w);
	}
	return -1;
}

uint32_t lapic_ppr(const struct lapic *l)
{
	int isr = lapic_highest(l, AR_ISR);
	uint32_t tpr = lapic_reg(l, AR_TPR) & 0xff, serving = isr < 0 ? 0 : isr & 0xf0;

	return (tpr & 0xf0) >= serving ? tpr : serving;
}

int lapic_next(struct lapic *l)
{
	int v;

	if (!atomic_load_explicit(&l->irr_sum, memory_order_acquire) || !lapic_sw_enabled(l))
		return -1;
	v = irr_highest(l);
	return v >= 0 && (uint32_t)(v & 0xf0) > (lapic_ppr(l) & 0xf0) ? v : -1;
}

void lapic_recheck(struct lapic *l)
{
	if (lapic_next(l) >= 0)
		cpu_request(l->cpu, REQ_EVENT);
}

void lapic_ack_vector(struct lapic *l, int v)
{
	bit_clear(l, AR_IRR, v);
	bit_set(l, AR_ISR, v);
}

void lapic_eoi(struct lapic *l)
{
	struct irqchip *ic = l->vm->irqchip;
	int v = lapic_highest(l, AR_ISR);
	bool level;

	if (v < 0)
		return;
	level = bit_test(l, AR_TMR, v);
	bit_clear(l, AR_ISR, v);
	if (ic && (atomic_load(&ic->eoi_map[v >> 5]) >> (v & 31) & 1)) {
		if (!ic->split) {
			irqchip_lock(ic);
			ioapic_eoi(ic, v, level, lapic_reg(l, AR_SVR) & SVR_DIRECTED_EOI);
			irqchip_unlock(ic);
		} else if (level) {     /* told even with EOI broadcasts suppressed, as Linux KVM does */
			l->eoi_exit = v;
			cpu_request(l->cpu, REQ_EVENT);
		}
	}
	lapic_recheck(l);
}

void lapic_clear_irqs(struct lapic *l)
{
	for (unsigned i = 0; i < 8; i++) {
		atomic_store(&l->r[AR_ISR + i], 0);
		atomic_store(&l->r[AR_TMR + i], 0);
		atomic_store(&l->r[AR_IRR + i], 0);
	}
	atomic_store(&l->irr_sum, 0);
}

static int lapic_accept_fixed(struct lapic *l, const struct apic_msg *m, bool *fresh)
{
	unsigned w = m->vector >> 5;
	uint32_t bit = 1u << (m->vector & 31);

	if (!lapic_sw_enabled(l))
		return 0;
	if (m->vector < 16) {
		lapic_error(l, ESR_RECV_ILLEGAL);
		return 0;
	}
	if (m->trig_level != bit_test(l, AR_TMR, m->vector)) {
		if (m->trig_level)
			bit_set(l, AR_TMR, m->vector);
		else
			bit_clear(l, AR_TMR, m->vector);
	}
	if (atomic_fetch_or(&l->r[AR_IRR + w], bit) & bit)
		return 1;       /* whoever set it has asked for attention */
	atomic_fetch_or(&l->irr_sum, 1u << w);
	*fresh = true;
	cpu_request(l->cpu, REQ_EVENT);
	return 1;
}

static void lapic_wait(struct lapic *l, uint32_t clear, uint32_t set)
{
	uint32_t old = atomic_load(&l->waiting);

	while (!atomic_compare_exchange_weak(&l->waiting, &old, (old & ~clear) | set))
		;
	cpu_request(l->cpu, REQ_EVENT);
}

int lapic_accept(struct lapic *l, const struct apic_msg *m, bool *fresh)
{
	switch (m->mode) {
	case DM_FIXED:
	case DM_LOWEST:
		return lapic_accept_fixed(l, m, fresh);
	case DM_NMI:
		lapic_wait(l, 0, LAPIC_NMI);
		break;
	case DM_SMI:
		lapic_wait(l, 0, LAPIC_SMI);
		break;
	case DM_INIT:
		if (m->trig_level && !m->assert)
			break;          /* INIT level de-assert: for bus arbitration ids of old */
		lapic_wait(l, LAPIC_SIPI | 0xff00, LAPIC_INIT);
		break;
	case DM_SIPI:
		lapic_wait(l, 0xff00, LAPIC_SIPI | (uint32_t)m->vector << 8);
		break;
	case DM_EXTINT:
		atomic_store(&l->extint, true);
		cpu_request(l->cpu, REQ_EVENT);
		break;
	default:
		return 0;
	}
	*fresh = true;
	return 1;
}

bool lapic_local(struct lapic *l, unsigned lvt)
{
	uint32_t e = lapic_reg(l, lvt);
	struct apic_msg m = { .vector = e & 0xff, .mode = (e >> 8) & 7, .assert = true };
	bool fresh = false;

	if (l->state == LAPIC_OFF || (e & LVT_MASKED))
		return false;
	if (lvt == AR_LVTT || lvt == AR_LVT_ERROR)
		m.mode = DM_FIXED;      /* these have no delivery mode field */
	else
		m.trig_level = (lvt == AR_LVT0 || lvt == AR_LVT1) && (e & (1u << 15)) && m.mode == DM_FIXED;
	if (m.mode == DM_EXTINT || m.mode == DM_SIPI || m.mode == DM_LOWEST)
		return false;
	return lapic_accept(l, &m, &fresh) > 0;
}

bool lapic_accepts_pic(const struct cpu *c)
{
	const struct lapic *l = c->lapic;
	uint32_t lvt0;

	if (!l || l->state == LAPIC_OFF)
		return true;
	lvt0 = lapic_reg(l, AR_LVT0);
	return (!(lvt0 & LVT_MASKED) && ((lvt0 >> 8) & 7) == DM_EXTINT) || atomic_load(&l->extint);
}

int lapic_queue_ext(struct cpu *c, unsigned vector)
{
	int none = -1;

	if (!c->lapic || (c->vm->irqchip && !c->vm->irqchip->split))
		return -ENXIO;
	if (!atomic_compare_exchange_strong(&c->lapic->ext_vector, &none, (int)(vector & 0xff)))
		return -EEXIST;
	cpu_request(c, REQ_EVENT);
	return 0;
}

unsigned lapic_take_init_sipi(struct cpu *c, uint8_t *sipi_vector)
{
	uint32_t w, mine = LAPIC_INIT | LAPIC_SIPI | 0xff00;

	if (!c->lapic || !(atomic_load(&c->lapic->waiting) & mine))
		return 0;
	w = atomic_fetch_and(&c->lapic->waiting, ~mine);
	*sipi_vector = w >> 8;
	return w & (LAPIC_INIT | LAPIC_SIPI);
}

unsigned lapic_take_nmi_smi(struct cpu *c)
{
	uint32_t mine = LAPIC_NMI | LAPIC_SMI;

	if (!c->lapic || !(atomic_load(&c->lapic->waiting) & mine))
		return 0;
	return atomic_fetch_and(&c->lapic->waiting, ~mine) & mine;
}

bool lapic_event_waiting(const struct cpu *c)
{
	return c->lapic && (atomic_load(&c->lapic->waiting) & 15);
}

int lapic_take_eoi_exit(struct cpu *c)
{
	int v = c->lapic ? c->lapic->eoi_exit : -1;

	if (v >= 0)
		c->lapic->eoi_exit = -1;
	return v;
}
