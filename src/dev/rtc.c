#include "dev/rtc.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "base/util.h"
#include "loop/loop.h"

enum { SEC = 0, SEC_AL = 1, MIN_ = 2, MIN_AL = 3, HOUR = 4, HOUR_AL = 5, WDAY = 6, MDAY = 7, MON = 8, YEAR = 9,
       REG_A = 10, REG_B = 11, REG_C = 12, REG_D = 13, CENTURY = 0x32 };
enum { B_SET = 0x80, B_PIE = 0x40, B_AIE = 0x20, B_UIE = 0x10, B_BIN = 0x04, B_24H = 0x02 };
enum { C_IRQF = 0x80, C_PF = 0x40, C_AF = 0x20, C_UF = 0x10 };

#define NS 1000000000LL
#define UIP_NS 244141LL         /* update-in-progress leads the update by 8 periods of 32.768 kHz */
#define DAY 86400

struct rtc {
	struct machine_env *env;
	pthread_mutex_t lock;
	struct io_window win;
	struct timer timer;
	struct irq_line irq;
	uint8_t index;
	uint8_t cmos[128];
	int64_t offset_ns;      /* RTC time minus the clock, while it runs */
	int64_t frozen_ns;      /* RTC time, while it is stopped */
	int64_t synced_ns;      /* flags are up to date to this RTC time */
	uint64_t synced_clk;    /* the same for the periodic divider, in clock time */
	bool stopped, div_reset;
	int level;
};

static int64_t rtc_now(struct rtc *r)
{
	return r->stopped ? r->frozen_ns : (int64_t)clock_now(r->env->clock) + r->offset_ns;
}

static int64_t floor_sec(int64_t ns)
{
	return ns >= 0 ? ns / NS : -((-ns + NS - 1) / NS);
}

static uint8_t enc(const struct rtc *r, unsigned v)
{
	return r->cmos[REG_B] & B_BIN ? v : v / 10 << 4 | v % 10;
}

static unsigned dec(const struct rtc *r, uint8_t v)
{
	return r->cmos[REG_B] & B_BIN ? v : (v >> 4) * 10 + (v & 15);
}

static uint8_t enc_hour(const struct rtc *r, unsigned h)
{
	if (r->cmos[REG_B] & B_24H)
		return enc(r, h);
	return enc(r, h % 12 ? h % 12 : 12) | (h >= 12 ? 0x80 : 0);
}

static unsigned dec_hour(const struct rtc *r, uint8_t v)
{
	if (r->cmos[REG_B] & B_24H)
		return dec(r, v);
	return dec(r, v & 0x7f) % 12 + (v & 0x80 ? 12 : 0);
}

/* Put the current time into the registers. */
static void regs_load(struct rtc *r)
{
	time_t t = floor_sec(rtc_now(r));
	struct tm tm;

	if (!gmtime_r(&t, &tm))
		return;
	r->cmos[SEC] = enc(r, tm.tm_sec);
	r->cmos[MIN_] = enc(r, tm.tm_min);
	r->cmos[HOUR] = enc_hour(r, tm.tm_hour);
	r->cmos[WDAY] = enc(r, tm.tm_wday + 1);
	r->cmos[MDAY] = enc(r, tm.tm_mday);
	r->cmos[MON] = enc(r, tm.tm_mon + 1);
	r->cmos[YEAR] = enc(r, (tm.tm_year + 1900) % 100);
	r->cmos[CENTURY] = enc(r, (tm.tm_year + 1900) / 100 % 100);
}

/* Nanoseconds in 64 bits end in 2262: a century that a PC's clock never shows counts as this one. */
static int64_t regs_time(const struct rtc *r)
{
	unsigned year = dec(r, r->cmos[CENTURY]) * 100 + dec(r, r->cmos[YEAR]);

	if (year < 1900 || year > 2199)
		year = 2000 + year % 100;
	struct tm tm = {
		.tm_sec = dec(r, r->cmos[SEC]), .tm_min = dec(r, r->cmos[MIN_]), .tm_hour = dec_hour(r, r->cmos[HOUR]),
		.tm_mday = dec(r, r->cmos[MDAY]), .tm_mon = (int)dec(r, r->cmos[MON]) - 1,
		.tm_year = (int)year - 1900,
	};

	return (int64_t)timegm(&tm) * NS;
}

/* RTC time := `ns`, running or stopped. What lies between is skipped, not replayed as events. */
static void time_set(struct rtc *r, int64_t ns)
{
	if (r->stopped)
		r->frozen_ns = ns;
	else
		r->offset_ns = ns - (int64_t)clock_now(r->env->clock);
	r->synced_ns = ns;
}

static bool alarm_matches(const struct rtc *r, int sod)
{
	const uint8_t *c = r->cmos;

	return ((c[SEC_AL] & 0xc0) == 0xc0 || (int)dec(r, c[SEC_AL]) == sod % 60) &&
	       ((c[MIN_AL] & 0xc0) == 0xc0 || (int)dec(r, c[MIN_AL]) == sod / 60 % 60) &&
	       ((c[HOUR_AL] & 0xc0) == 0xc0 || (int)dec_hour(r, c[HOUR_AL]) == sod / 3600);
}

/* Seconds from `from` (exclusive) to the next alarm within `max` seconds; 0: none. */
static int alarm_after(const struct rtc *r, int64_t from, int64_t max)
{
	for (int i = 1; i <= max && i <= DAY; i++)
		if (alarm_matches(r, (int)(((from + i) % DAY + DAY) % DAY)))
			return i;
	return 0;
}

/* Period of the periodic flag in ns, 0: off. Rates 1 and 2 are 8 and 9 with a 32.768 kHz crystal. */
static uint64_t period_ns(const struct rtc *r)
{
	unsigned rate = r->cmos[REG_A] & 15;

	if (!rate || (r->cmos[REG_A] & 0x60) == 0x60)
		return 0;
	if (rate <= 2)
		rate += 7;
	return (1ULL << (rate - 1)) * (uint64_t)NS / 32768;
}

/* Raise the flags of what happened since the last look. */
static void sync_flags(struct rtc *r)
{
	int64_t now = rtc_now(r), secs = floor_sec(now) - floor_sec(r->synced_ns);
	uint64_t clk = clock_now(r->env->clock), period = period_ns(r);

	if (secs > 0) {
		r->cmos[REG_C] |= C_UF;
		if (alarm_after(r, floor_sec(r->synced_ns), secs))
			r->cmos[REG_C] |= C_AF;
	}
	r->synced_ns = now;
	if (period && clk / period != r->synced_clk / period)
		r->cmos[REG_C] |= C_PF;
	r->synced_clk = clk;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Arm for the earliest enabled event whose flag is still clear; a flag that is up needs no timer. */
static void arm(struct rtc *r)
{
	uint8_t want = r->cmos[REG_B] & ~r->cmos[REG_C] & (C_PF | C_AF | C_UF);
	uint64_t clk = clock_now(r->env->clock), at = UINT64_MAX, period = period_ns(r);
	int64_t now = rtc_now(r), next = (floor_sec(now) + 1) * NS - now;

	if ((want & C_PF) && period)
		at = (clk / period + 1) * period;
	if ((want & C_UF) && !r->stopped)
		at = min_u64(at, clk + next);
	if ((want & C_AF) && !r->stopped) {
		int s = alarm_after(r, floor_sec(now), DAY);

		if (s)
			at = min_u64(at, clk + next + (uint64_t)(s - 1) * NS);
	}
	if (at != UINT64_MAX)
		timer_arm(&r->timer, at);
}

static void update_irq(struct rtc *r)
{
	int level = (r->cmos[REG_B] & r->cmos[REG_C] & (C_PF | C_AF | C_UF)) != 0;

	r->cmos[REG_C] = (r->cmos[REG_C] & ~C_IRQF) | (level ? C_IRQF : 0);
	if (level != r->level) {
		r->level = level;
		irq_set(r->irq, level);
	}
	arm(r);
}

static void timer_fired(void *opaque)
{
	struct rtc *r = opaque;

	pthread_mutex_lock(&r->lock);
	sync_flags(r);
	update_irq(r);
	pthread_mutex_unlock(&r->lock);
}

/* B.SET and a divider in reset both stop the clock; leaving divider reset makes the next update half a second away. */
static void run_update(struct rtc *r)
{
	bool div = (r->cmos[REG_A] & 0x60) == 0x60, stop = div || (r->cmos[REG_B] & B_SET);
	int64_t frac;

	if (stop && !r->stopped) {
		r->frozen_ns = rtc_now(r);
		regs_load(r);
		r->stopped = true;
		r->div_reset = false;
	}
	if (r->stopped && div)
		r->div_reset = true;
	if (!stop && r->stopped) {
		frac = r->div_reset ? NS / 2 : r->frozen_ns - floor_sec(r->frozen_ns) * NS;
		r->stopped = false;
		time_set(r, regs_time(r) + frac);
	}
}

static void write_time(struct rtc *r, unsigned i, uint8_t v)
{
	int64_t now = rtc_now(r), frac = now - floor_sec(now) * NS;

	if (!r->stopped)
		regs_load(r);
	r->cmos[i] = v;
	if (!r->stopped)
		time_set(r, regs_time(r) + frac);
}

static void write_b(struct rtc *r, uint8_t v)
{
	if (!r->stopped)
		regs_load(r);
	if (v & B_SET)
		v &= ~B_UIE;
	r->cmos[REG_B] = v;
	run_update(r);
}

static void cmos_write(struct rtc *r, unsigned i, uint8_t v)
{
	sync_flags(r);
	switch (i) {
	case SEC: case MIN_: case HOUR: case WDAY: case MDAY: case MON: case YEAR: case CENTURY:
		write_time(r, i, v);
		break;
	case REG_A:
		r->cmos[REG_A] = v & 0x7f;
		run_update(r);
		break;
	case REG_B:
		write_b(r, v);
		break;
	case REG_C:
	case REG_D:
		return;
	default:
		r->cmos[i] = v;
	}
	update_irq(r);
}

static bool update_in_progress(struct rtc *r)
{
	int64_t now = rtc_now(r);

	return !r->stopped && (floor_sec(now) + 1) * NS - now <= UIP_NS;
}

static uint8_t cmos_read(struct rtc *r, unsigned i)
{
	uint8_t v;

	if ((i < REG_A || i == CENTURY) && !(i & 1 && i < 6) && !r->stopped)
		regs_load(r);
	v = r->cmos[i];
	if (i == REG_A)
		return v | (update_in_progress(r) ? 0x80 : 0);
	if (i == REG_C) {
		sync_flags(r);
		update_irq(r);
		v = r->cmos[REG_C];
		r->cmos[REG_C] = 0;
		update_irq(r);
	}
	return v;
}

static uint64_t port_read(void *opaque, uint64_t off, unsigned size)
{
	struct rtc *r = opaque;

	return off == 0 ? 0xff : cmos_read(r, r->index);
}

static void port_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct rtc *r = opaque;

	if (off == 0)
		r->index = val & 0x7f;          /* bit 7 gates NMI on the board, which has no source of it */
	else
		cmos_write(r, r->index, val);
}

static const struct io_ops rtc_ops = { port_read, port_write, 1, 1 };

int rtc_create(struct rtc **out, struct machine_env *env, int64_t epoch_ns, struct err *err)
{
	struct rtc *r = calloc(1, sizeof(*r));
	int e;

	if (!r)
		return err_set(err, -ENOMEM, "no memory for the RTC");
	r->env = env;
	pthread_mutex_init(&r->lock, NULL);
	timer_init(&r->timer, env->clock, timer_fired, r);
	r->irq = env->isa_irq(env->opaque, 8);
	r->cmos[REG_A] = 0x26;
	r->cmos[REG_B] = B_24H;
	r->cmos[REG_D] = 0x80;
	r->offset_ns = epoch_ns;
	r->synced_ns = rtc_now(r);
	r->synced_clk = clock_now(env->clock);
	r->win = (struct io_window){ .name = "rtc", .ops = &rtc_ops, .opaque = r, .lock = &r->lock, .size = 2 };
	e = io_map(env->ports, &r->win, 0x70, err);
	if (e) {
		pthread_mutex_destroy(&r->lock);
		free(r);
		return e;
	}
	*out = r;
	return 0;
}

void rtc_destroy(struct rtc *r)
{
	if (!r)
		return;
	io_unmap(r->env->ports, &r->win);
	timer_stop(&r->timer);
	pthread_mutex_destroy(&r->lock);
	free(r);
}

/* Reset clears the interrupt enables and flags; time and RAM are battery backed. */
void rtc_reset(struct rtc *r)
{
	pthread_mutex_lock(&r->lock);
	r->index = 0;
	r->cmos[REG_B] &= ~(B_PIE | B_AIE | B_UIE);
	r->cmos[REG_C] = 0;
	update_irq(r);
	pthread_mutex_unlock(&r->lock);
}

void rtc_set_cmos(struct rtc *r, unsigned i, uint8_t val)
{
	pthread_mutex_lock(&r->lock);
	if (i > REG_D && i < sizeof(r->cmos) && i != CENTURY)
		r->cmos[i] = val;
	pthread_mutex_unlock(&r->lock);
}

static void set_le(struct rtc *r, unsigned i, uint64_t val, unsigned n)
{
	for (; n--; i++, val >>= 8)
		rtc_set_cmos(r, i, val);
}

void rtc_set_memory(struct rtc *r, uint64_t low, uint64_t high)
{
	uint64_t ext_kib = low > (1 << 20) ? (low >> 10) - 1024 : 0;
	uint64_t above16 = low > (16 << 20) ? (low - (16 << 20)) >> 16 : 0;

	set_le(r, 0x15, 640, 2);
	set_le(r, 0x17, MIN(ext_kib, 0xffffu), 2);
	set_le(r, 0x30, MIN(ext_kib, 0xffffu), 2);
	set_le(r, 0x34, MIN(above16, 0xffffu), 2);
	set_le(r, 0x5b, high >> 16, 3);
}
