/*
 * 8254 interval timer (ports 0x40-0x43) and the bits of port 0x61 that belong to it.
 *
 * Intel 8254 data sheet. A channel is its load time and its count; the counter and the output are computed when
 * looked at. Channel 0's output is GSI 0: each of its rising edges is a pulse there, made by one thread per VM that
 * exists once the channel was armed. With reinjection on (as Linux KVM has it by default) ticks that the guest has
 * not yet acknowledged are counted and delivered one by one after its EOIs.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <time.h>

#include "softkvm/irq/internal.h"

#define PIT_HZ 1193182ULL
#define PERIOD_MIN 200000       /* ns, see lapic_timer.c */
enum { RW_LSB = 1, RW_MSB = 2, RW_WORD0 = 3, RW_WORD1 = 4 };

static uint64_t ns_to_ticks(uint64_t ns)
{
	return (unsigned __int128)ns * PIT_HZ / 1000000000;
}

static uint64_t ticks_to_ns(uint64_t t)
{
	return ((unsigned __int128)t * 1000000000 + PIT_HZ - 1) / PIT_HZ;
}

static uint16_t to_bcd(unsigned v)
{
	v %= 10000;
	return v / 1000 << 12 | v / 100 % 10 << 8 | v / 10 % 10 << 4 | v % 10;
}

static unsigned from_bcd(uint16_t v)
{
	return (v >> 12) * 1000 + (v >> 8 & 15) * 100 + (v >> 4 & 15) * 10 + (v & 15);
}

/* Input clocks since the count was loaded. */
static uint64_t chan_ticks(const struct pit_channel *c)
{
	int64_t ns = c->frozen >= 0 ? c->frozen : (int64_t)mono_ns() - c->s.count_load_time;

	return ns > 0 ? ns_to_ticks(ns) : 0;
}

/* Modes 1 and 5 count from a rising gate on, not from the write of a count. */
static bool triggered_mode(const struct pit_channel *c) { return c->s.mode == 1 || c->s.mode == 5; }

static uint32_t chan_count(const struct pit_channel *c)
{
	if (triggered_mode(c) && c->running)
		return c->running;
	return c->s.count ? c->s.count : c->s.bcd ? 10000 : 0x10000;
}

/* The counting element as the CPU reads it. */
static uint16_t chan_read_count(const struct pit_channel *c)
{
	uint64_t d = chan_ticks(c), n = chan_count(c), wrap = c->s.bcd ? 10000 : 0x10000, v;

	switch (c->s.mode) {
	case 2:
		v = n - d % n;
		break;
	case 3:         /* counts by two, twice per period; even values only */
		v = n - (2 * d) % n;
		if (n & 1)
			v &= ~1ULL;
		break;
	default:        /* goes on below zero */
		v = (n + wrap - d % wrap) % wrap;
		break;
	}
	return c->s.bcd ? to_bcd(v) : v;
}

static bool chan_out(const struct pit_channel *c)
{
	uint64_t d = chan_ticks(c), n = chan_count(c);

	switch (c->s.mode) {
	case 0:
		return d >= n;
	case 1:         /* low from the trigger to the end of the count */
		return c->idle || d >= n;
	case 2:
		return !c->s.gate || d % n != n - 1;
	case 3:
		return !c->s.gate || d % n < (n + 1) / 2;
	default:        /* the strobe: low for the one clock in which the count ends, once per load or trigger */
		return c->idle || d != n;
	}
}

static void chan_gate(struct pit_channel *c, bool gate)
{
	int64_t now = mono_ns();
	bool was = c->s.gate;

	c->s.gate = gate;
	if (gate == was)
		return;
	if (triggered_mode(c)) {        /* a rising gate loads the count register and starts, again too; a falling one does nothing */
		if (gate) {
			c->running = 0;
			c->running = chan_count(c);
			c->s.count_load_time = now;
			c->idle = false;
		}
		return;
	}
	if (!gate) {
		c->frozen = now - c->s.count_load_time;
	} else {
		/* Modes 0 and 4 go on, 2 and 3 start over. */
		c->s.count_load_time = c->s.mode == 0 || c->s.mode == 4 ? now - MAX(c->frozen, 0) : now;
		c->frozen = -1;
	}
}

/* -- channel 0 and its interrupt --------------------------------------------------------------- */
static void pulse(struct irqchip *ic)
{
	unsigned n = ic->vm->ncpus;

	irqchip_set_gsi(ic, 0, 1, SRC_PIT);
	irqchip_set_gsi(ic, 0, 0, SRC_PIT);
	if (!atomic_load(&ic->lint_nmi))
		return;
	for (unsigned i = 0; i < n; i++) {      /* the NMI watchdog of old: LINT0 in NMI mode hears the timer */
		struct cpu *c = ic->vm->cpus[i];

		if (c && c->lapic && ((lapic_reg(c->lapic, AR_LVT0) >> 8) & 7) == DM_NMI)
			lapic_local(c->lapic, AR_LVT0);
	}
}

void pit_acked(struct pit *p)
{
	p->acked = true;
	if (p->pending && --p->pending)
		p->inject = true;
}

static void pit_inject(struct irqchip *ic, struct pit *p)
{
	if (p->reinject) {
		if (!p->acked)
			return;
		p->acked = false;
	}
	pulse(ic);
}

void pit_poll(struct irqchip *ic, uint64_t now)
{
	struct pit *p = ic->pit;
	uint64_t n = 1;

	if (p->inject) {
		p->inject = false;
		pit_inject(ic, p);
	}
	if (!p->armed || now < p->target)
		return;
	if (p->period) {
		n += (now - p->target) / p->period;
		p->target += n * p->period;
	} else {
		p->armed = false;
	}
	if (p->reinject)
		p->pending = MIN(p->pending + n, 1000000u);
	pit_inject(ic, p);
}

static void *pit_thread(void *arg)
{
	struct irqchip *ic = arg;
	struct pit *p = ic->pit;

	irqchip_lock(ic);
	while (!p->stop) {
		struct timespec ts;

		if (p->armed && mono_ns() < p->target) {
			ts.tv_sec = p->target / 1000000000;
			ts.tv_nsec = p->target % 1000000000;
			pthread_cond_timedwait(&p->cond, &ic->lock, &ts);
		} else if (!p->armed) {
			pthread_cond_wait(&p->cond, &ic->lock);
		}
		pit_poll(ic, mono_ns());
	}
	irqchip_unlock(ic);
	return NULL;
}

static void pit_arm(struct irqchip *ic)
{
	struct pit *p = ic->pit;
	struct pit_channel *c = &p->c[0];
	uint64_t ns = ticks_to_ns(chan_count(c));

	p->pending = 0;
	p->acked = true;
	/* The gates of channels 0 and 1 are tied high: what needs their rising edge never starts. */
	p->armed = !(p->flags & KVM_PIT_FLAGS_HPET_LEGACY) && !triggered_mode(c) && c->s.count;
	p->period = c->s.mode == 2 || c->s.mode == 3 ? MAX(ns, PERIOD_MIN) : 0;
	/* Mode 4's edge is the end of its strobe. */
	p->target = c->s.count_load_time + (p->period ? p->period : c->s.mode == 4 ? ticks_to_ns(chan_count(c) + 1) : ns);
	if (p->armed && !p->thread_up && !p->no_thread)
		p->thread_up = !pthread_create(&p->thread, NULL, pit_thread, ic);
	if (p->thread_up)
		pthread_cond_signal(&p->cond);
}

void pit_stop(struct irqchip *ic)
{
	struct pit *p = ic->pit;

	irqchip_lock(ic);
	p->stop = true;
	pthread_cond_signal(&p->cond);
	irqchip_unlock(ic);
	if (p->thread_up)
		pthread_join(p->thread, NULL);
	p->thread_up = false;
}

/* -- ports ------------------------------------------------------------------------------------- */
static void chan_load(struct irqchip *ic, unsigned n, uint16_t raw)
{
	struct pit_channel *c = &ic->pit->c[n];

	c->s.count = c->s.bcd ? from_bcd(raw) % 10000 : raw;
	if (!c->s.count)
		c->s.count = c->s.bcd ? 10000 : 0x10000;
	if (triggered_mode(c)) {        /* the count under way goes on; the next trigger takes the new one */
		c->running = c->idle ? 0 : c->running;
		return;
	}
	c->s.count_load_time = mono_ns();
	/* With a low gate the modes that count by it wait at the full count. */
	c->frozen = c->s.gate ? -1 : 0;
	if (n == 0)
		pit_arm(ic);
}

static void chan_write(struct irqchip *ic, unsigned n, uint8_t v)
{
	struct kvm_pit_channel_state *s = &ic->pit->c[n].s;

	switch (s->write_state) {
	case RW_MSB:
		chan_load(ic, n, (uint16_t)(v << 8));
		break;
	case RW_WORD0:
		s->write_latch = v;
		s->write_state = RW_WORD1;
		break;
	case RW_WORD1:
		s->write_state = RW_WORD0;
		chan_load(ic, n, s->write_latch | v << 8);
		break;
	default:
		chan_load(ic, n, v);
		break;
	}
}

static void chan_latch_count(struct pit_channel *c)
{
	if (c->s.count_latched)
		return;
	c->s.latched_count = chan_read_count(c);
	c->s.count_latched = c->s.rw_mode;
}

static void chan_latch_status(struct pit_channel *c)
{
	if (c->s.status_latched)
		return;
	c->s.status = chan_out(c) << 7 | (c->s.count == 0) << 6 | c->s.rw_mode << 4 | c->s.mode << 1 | c->s.bcd;
	c->s.status_latched = 1;
}

static uint8_t chan_read(struct pit_channel *c)
{
	struct kvm_pit_channel_state *s = &c->s;
	uint16_t v;

	if (s->status_latched) {
		s->status_latched = 0;
		return s->status;
	}
	if (s->count_latched) {
		v = s->latched_count;
		if (s->count_latched == RW_WORD0) {     /* its high byte comes with the next read */
			s->count_latched = RW_MSB;
			return v;
		}
		v = s->count_latched == RW_MSB ? v >> 8 : v & 0xff;
		s->count_latched = 0;
		return v;
	}
	v = chan_read_count(c);
	switch (s->read_state) {
	case RW_MSB:
		return v >> 8;
	case RW_WORD0:
		s->read_state = RW_WORD1;
		return v;
	case RW_WORD1:
		s->read_state = RW_WORD0;
		return v >> 8;
	default:
		return v;
	}
}

static void chan_set_mode(struct irqchip *ic, unsigned n, uint8_t v)
{
	struct pit_channel *c = &ic->pit->c[n];
	unsigned rw = (v >> 4) & 3, mode = (v >> 1) & 7;

	if (!rw) {
		chan_latch_count(c);
		return;
	}
	c->s.rw_mode = c->s.read_state = c->s.write_state = rw;
	c->s.mode = mode > 5 ? mode - 4 : mode;
	c->s.bcd = v & 1;
	c->s.count_latched = c->s.status_latched = 0;
	c->running = 0;
	c->idle = triggered_mode(c);
	if (c->idle) {
		c->frozen = -1;
		if (n == 0)     /* a tick that was due does not come any more */
			pit_arm(ic);
	}
}

static void control_write(struct irqchip *ic, uint8_t v)
{
	if (v >> 6 != 3) {
		chan_set_mode(ic, v >> 6, v);
		return;
	}
	for (unsigned n = 0; n < 3; n++) {      /* read-back */
		if (!(v & (2 << n)))
			continue;
		if (!(v & 0x20))
			chan_latch_count(&ic->pit->c[n]);
		if (!(v & 0x10))
			chan_latch_status(&ic->pit->c[n]);
	}
}

static void port61(struct pit *p, bool write, uint8_t *v)
{
	struct pit_channel *c = &p->c[2];

	if (write) {
		p->speaker_on = *v & 2;
		chan_gate(c, *v & 1);
		return;
	}
	/* Bit 4 is the refresh clock: it only has to change every few microseconds. */
	*v = c->s.gate | p->speaker_on << 1 | (mono_ns() >> 14 & 1) << 4 | chan_out(c) << 5;
}

bool pit_owns(const struct pit *p, uint16_t port, unsigned len)
{
	return (port >= 0x40 && port + len <= 0x44u) || (p->dummy_speaker && port == 0x61 && len == 1);
}

void pit_pio(struct irqchip *ic, uint16_t port, unsigned len, bool write, uint8_t *data)
{
	for (unsigned i = 0; i < len; i++, port++) {
		if (port == 0x61)
			port61(ic->pit, write, data + i);
		else if (port == 0x43 && write)
			control_write(ic, data[i]);
		else if (port == 0x43)
			data[i] = 0;
		else if (write)
			chan_write(ic, port & 3, data[i]);
		else
			data[i] = chan_read(&ic->pit->c[port & 3]);
	}
}

void pit_reset(struct pit *p)
{
	int64_t now = mono_ns();

	for (unsigned n = 0; n < 3; n++) {
		p->c[n] = (struct pit_channel){ .frozen = -1 };
		p->c[n].s.mode = 3;     /* undefined until programmed */
		p->c[n].s.gate = n != 2;
		p->c[n].s.rw_mode = p->c[n].s.read_state = p->c[n].s.write_state = RW_WORD0;
		p->c[n].s.count = 0x10000;
		p->c[n].s.count_load_time = now;
	}
	p->c[2].frozen = 0;
	p->flags = 0;
	p->armed = false;
	p->reinject = p->acked = true;
	p->pending = 0;
	p->inject = false;
}

void pit_get_state(struct pit *p, struct kvm_pit_state2 *s)
{
	memset(s, 0, sizeof *s);
	for (unsigned n = 0; n < 3; n++) {
		s->channels[n] = p->c[n].s;
		if (p->c[n].idle)       /* as one that ended long ago */
			s->channels[n].count_load_time = 0;
		if (p->c[n].frozen >= 0)        /* the structure has no other place for a stopped count */
			s->channels[n].count_load_time = (int64_t)mono_ns() - p->c[n].frozen;
	}
	s->flags = p->flags | (p->speaker_on ? KVM_PIT_FLAGS_SPEAKER_DATA_ON : 0);
}

/* Client values, which may be anything: bring them into the ranges that the code above relies on. */
static void chan_set_state(struct pit_channel *c, const struct kvm_pit_channel_state *s)
{
	int64_t now = mono_ns();

	c->s = *s;
	c->s.bcd = !!s->bcd;
	c->s.gate = !!s->gate;
	c->s.mode = (s->mode & 7) > 5 ? (s->mode & 7) - 4 : s->mode & 7;
	c->s.rw_mode &= 3;
	c->s.count = MIN(s->count, c->s.bcd ? 10000u : 0x10000u);
	if (c->s.count_load_time < 0 || c->s.count_load_time > now)
		c->s.count_load_time = now;
	c->frozen = !c->s.gate && !triggered_mode(c) ? now - c->s.count_load_time : -1;
	/* Whether it was triggered is nowhere in the structure: a count that has been under way for long is over in either case. */
	c->running = 0;
	c->idle = triggered_mode(c) && chan_ticks(c) >= chan_count(c);
}

void pit_set_state(struct irqchip *ic, const struct kvm_pit_state2 *s)
{
	struct pit *p = ic->pit;

	for (unsigned n = 0; n < 3; n++)
		chan_set_state(&p->c[n], &s->channels[n]);
	p->flags = s->flags & KVM_PIT_FLAGS_HPET_LEGACY;
	p->speaker_on = s->flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON;
	p->c[0].s.count_load_time = mono_ns();
	p->c[0].frozen = -1;
	pit_arm(ic);
}
