/*
 * LAPIC timer (SDM vol. 3, 10.5.4): one-shot, periodic, TSC deadline. The bus clock is 1 GHz, as in Linux KVM:
 * one count is `divide` nanoseconds. No thread: the vCPU's own looks at the clock, and sleeps until the deadline.
 *
 * While the entry is masked the timer counts on but asks for no wake-up; an expiry in that time is noticed, and
 * dropped, when the entry is next looked at.
 */
#include "softkvm/irq/internal.h"

#define PERIOD_MIN 200000       /* ns: a guest cannot make the host's CPU busy with its timer alone */

enum timer_mode lapic_timer_mode(const struct lapic *l)
{
	return (lapic_reg(l, AR_LVTT) >> 17) & 3;
}

static unsigned timer_divide(uint32_t tdcr)
{
	return 1u << ((((tdcr & 3) | ((tdcr >> 1) & 4)) + 1) & 7);
}

void lapic_timer_stop(struct lapic *l)
{
	l->timer.armed = false;
	l->timer.target = 0;
	l->timer.period = 0;
}

static void timer_set_period(struct lapic *l)
{
	uint64_t ns = (uint64_t)lapic_reg(l, AR_TMICT) * timer_divide(lapic_reg(l, AR_TDCR));

	l->timer.period = lapic_timer_mode(l) == TIMER_PERIODIC ? MAX(ns, PERIOD_MIN) : 0;
}

static void timer_arm(struct lapic *l, uint32_t count)
{
	timer_set_period(l);
	l->timer.target = mono_ns() + (uint64_t)count * timer_divide(lapic_reg(l, AR_TDCR));
	l->timer.armed = true;
	cpu_request(l->cpu, REQ_TIMER);
}

void lapic_timer_start(struct lapic *l, uint32_t count)
{
	lapic_timer_stop(l);
	if (count && lapic_timer_mode(l) < TIMER_DEADLINE)
		timer_arm(l, count);
}

/*
 * A count of 0 in loaded state may mean that the expiry was not yet in the IRR when Linux KVM saved it: it is made up for, as Linux
 * does. An interrupt too many does no harm, one too few leaves a tickless guest without a clock.
 */
void lapic_timer_restore(struct lapic *l)
{
	uint32_t initial = lapic_reg(l, AR_TMICT), count = MIN(lapic_reg(l, AR_TMCCT), initial);

	lapic_timer_stop(l);
	lapic_put(l, AR_TMCCT, 0);
	if (!initial || lapic_timer_mode(l) >= TIMER_DEADLINE)
		return;
	timer_arm(l, !count && lapic_timer_mode(l) == TIMER_PERIODIC ? initial : count);
}

/* Rounded up: 0 is for a timer that has expired, and state with it would be loaded so. */
uint32_t lapic_timer_count(struct lapic *l)
{
	uint64_t now = mono_ns(), divide = timer_divide(lapic_reg(l, AR_TDCR));

	if (l->timer.armed && now >= l->timer.target)
		lapic_timer_poll(l->cpu);
	if (!l->timer.armed || now >= l->timer.target)
		return 0;
	return (l->timer.target - now + divide - 1) / divide;
}

void lapic_timer_set_divide(struct lapic *l, uint32_t tdcr)
{
	uint32_t left = lapic_timer_count(l);

	lapic_put(l, AR_TDCR, tdcr & 0xb);
	if (l->timer.armed)
		lapic_timer_start(l, MAX(left, 1u));
}

void lapic_timer_set_lvtt(struct lapic *l, uint32_t lvtt)
{
	enum timer_mode old = lapic_timer_mode(l), new = (lvtt >> 17) & 3;

	lapic_timer_poll(l->cpu);       /* under the old entry */
	lapic_put(l, AR_LVTT, lvtt);
	if ((old == TIMER_DEADLINE) != (new == TIMER_DEADLINE)) {
		lapic_timer_stop(l);
		lapic_put(l, AR_TMICT, 0);
		l->timer.deadline = 0;
	} else if (old != new && l->timer.armed) {
		timer_set_period(l);
	}
	cpu_request(l->cpu, REQ_TIMER);
}

void lapic_timer_set_deadline(struct lapic *l, uint64_t tsc)
{
	if (lapic_timer_mode(l) != TIMER_DEADLINE)
		return;
	l->timer.deadline = tsc;
	cpu_request(l->cpu, REQ_TIMER);
}

uint64_t lapic_timer_deadline(const struct cpu *c)
{
	const struct lapic *l = c->lapic;

	if (!l || (lapic_reg(l, AR_LVTT) & LVT_MASKED) || l->state == LAPIC_OFF)
		return UINT64_MAX;
	if (lapic_timer_mode(l) == TIMER_DEADLINE)
		return l->timer.deadline ? tsc_to_mono(c, l->timer.deadline) : UINT64_MAX;
	return l->timer.armed ? l->timer.target : UINT64_MAX;
}

static void timer_poll_deadline(struct lapic *l)
{
	struct cpu *c = l->cpu;

	/* Either clock will do: a sleep that ended on time must not find the TSC a rounding short. */
	if (!l->timer.deadline ||
	    (tsc_read(c) < l->timer.deadline && mono_ns() < tsc_to_mono(c, l->timer.deadline)))
		return;
	l->timer.deadline = 0;
	lapic_local(l, AR_LVTT);
}

void lapic_timer_poll(struct cpu *c)
{
	struct lapic *l = c->lapic;
	uint64_t now;

	if (!l)
		return;
	if (lapic_timer_mode(l) == TIMER_DEADLINE) {
		timer_poll_deadline(l);
		return;
	}
	if (!l->timer.armed || (now = mono_ns()) < l->timer.target)
		return;
	if (l->timer.period)    /* stay in phase; expiries that were missed count once */
		l->timer.target += l->timer.period * ((now - l->timer.target) / l->timer.period + 1);
	else
		l->timer.armed = false;
	lapic_local(l, AR_LVTT);
}
