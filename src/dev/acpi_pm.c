#include "dev/acpi_pm.h"

#include <errno.h>
#include <stdlib.h>

#include "base/util.h"
#include "loop/loop.h"

#define PM_HZ 3579545ULL

enum { TMR_STS = 1 << 0, GBL_STS = 1 << 5, PWRBTN_STS = 1 << 8, SLPBTN_STS = 1 << 9, RTC_STS = 1 << 10,
       WAK_STS = 1 << 15 };
enum { SCI_EN = 1 << 0, SLP_EN = 1 << 13 };
#define STS_ALL (TMR_STS | GBL_STS | PWRBTN_STS | SLPBTN_STS | RTC_STS | WAK_STS)
#define EN_ALL (TMR_STS | GBL_STS | PWRBTN_STS | SLPBTN_STS | RTC_STS)

struct acpi_pm {
	struct machine_env *env;
	pthread_mutex_t lock;
	struct io_window win;
	struct timer timer;
	struct irq_line sci;
	int level;
	uint16_t sts, en, cnt;
	uint64_t tmr_seen;      /* half-periods of the counter already turned into TMR_STS */
	uint8_t gpe[ACPI_GPE0_LEN];
};

static uint64_t pm_ticks(struct acpi_pm *pm)
{
	return (unsigned __int128)clock_now(pm->env->clock) * PM_HZ / 1000000000ULL;
}

/* TMR_STS is set whenever bit 23 changes. */
static void tmr_sync(struct acpi_pm *pm)
{
	uint64_t half = pm_ticks(pm) >> 23;

	if (half != pm->tmr_seen)
		pm->sts |= TMR_STS;
	pm->tmr_seen = half;
}

static void tmr_arm(struct acpi_pm *pm)
{
	uint64_t next = (pm->tmr_seen + 1) << 23;

	if ((pm->en & TMR_STS) && !(pm->sts & TMR_STS))
		timer_arm(&pm->timer, (uint64_t)((unsigned __int128)next * 1000000000ULL / PM_HZ) + 1);
}

static void update_sci(struct acpi_pm *pm)
{
	int level = (pm->sts & pm->en & EN_ALL) != 0;

	for (unsigned i = 0; i < ACPI_GPE0_LEN / 2; i++)
		level |= (pm->gpe[i] & pm->gpe[ACPI_GPE0_LEN / 2 + i]) != 0;
	if (level != pm->level) {
		pm->level = level;
		irq_set(pm->sci, level);
	}
	tmr_arm(pm);
}

static void timer_fired(void *opaque)
{
	struct acpi_pm *pm = opaque;

	pthread_mutex_lock(&pm->lock);
	tmr_sync(pm);
	update_sci(pm);
	pthread_mutex_unlock(&pm->lock);
}

static uint8_t read_byte(struct acpi_pm *pm, unsigned off, uint32_t tmr)
{
	switch (off) {
	case 0: case 1:
		return pm->sts >> 8 * off;
	case 2: case 3:
		return pm->en >> 8 * (off - 2);
	case 4: case 5:
		return (pm->cnt | SCI_EN) >> 8 * (off - 4);
	case 8: case 9: case 10: case 11:
		return tmr >> 8 * (off - 8);
	}
	if (off >= ACPI_GPE0 && off < ACPI_GPE0 + ACPI_GPE0_LEN)
		return pm->gpe[off - ACPI_GPE0];
	return 0;
}

static uint64_t pm_read(void *opaque, uint64_t off, unsigned size)
{
	struct acpi_pm *pm = opaque;
	uint32_t tmr = pm_ticks(pm) & 0xffffff;
	uint64_t v = 0;

	if (off < 2)
		tmr_sync(pm);
	for (unsigned i = 0; i < size; i++)
		v |= (uint64_t)read_byte(pm, off + i, tmr) << 8 * i;
	return v;
}

static void sleep_request(struct acpi_pm *pm)
{
	/* S5 is the only sleep state that the tables announce. */
	if (((pm->cnt >> 10) & 7) == ACPI_SLP_TYP_S5)
		pm->env->request(pm->env->opaque, MACHINE_POWEROFF, 0);
	pm->cnt &= ~SLP_EN;
}

static void write_byte(struct acpi_pm *pm, unsigned off, uint8_t v)
{
	switch (off) {
	case 0: case 1:
		pm->sts &= ~(v << 8 * off);
		return;
	case 2:
		pm->en = (pm->en & 0xff00) | (v & (EN_ALL & 0xff));
		return;
	case 3:
		pm->en = (pm->en & 0x00ff) | (v << 8 & EN_ALL);
		return;
	case 4:
		pm->cnt = (pm->cnt & 0xff00) | (v & 0x02);      /* BM_RLD; SCI_EN is fixed, GBL_RLS goes nowhere */
		return;
	case 5:
		pm->cnt = (pm->cnt & 0x00ff) | (v << 8 & 0x3c00);
		if (pm->cnt & SLP_EN)
			sleep_request(pm);
		return;
	}
	if (off >= ACPI_GPE0 + ACPI_GPE0_LEN / 2 && off < ACPI_GPE0 + ACPI_GPE0_LEN)
		pm->gpe[off - ACPI_GPE0] = v;
	else if (off >= ACPI_GPE0 && off < ACPI_GPE0 + ACPI_GPE0_LEN / 2)
		pm->gpe[off - ACPI_GPE0] &= ~v;
}

static void pm_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct acpi_pm *pm = opaque;

	tmr_sync(pm);
	for (unsigned i = 0; i < size; i++)
		write_byte(pm, off + i, val >> 8 * i);
	update_sci(pm);
}

static const struct io_ops pm_ops = { pm_read, pm_write, 1, 4 };

void acpi_pm_power_button(struct acpi_pm *pm)
{
	pthread_mutex_lock(&pm->lock);
	pm->sts |= PWRBTN_STS;
	update_sci(pm);
	pthread_mutex_unlock(&pm->lock);
}

void acpi_pm_gpe(struct acpi_pm *pm, unsigned n)
{
	pthread_mutex_lock(&pm->lock);
	if (n < ACPI_GPE0_LEN / 2 * 8)
		pm->gpe[n / 8] |= 1u << (n % 8);
	update_sci(pm);
	pthread_mutex_unlock(&pm->lock);
}

void acpi_pm_reset(struct acpi_pm *pm)
{
	pthread_mutex_lock(&pm->lock);
	pm->sts = pm->en = pm->cnt = 0;
	pm->tmr_seen = pm_ticks(pm) >> 23;
	memset(pm->gpe, 0, sizeof(pm->gpe));
	update_sci(pm);
	pthread_mutex_unlock(&pm->lock);
}

int acpi_pm_create(struct acpi_pm **out, struct machine_env *env, struct err *err)
{
	struct acpi_pm *pm = calloc(1, sizeof(*pm));
	int r;

	if (!pm)
		return err_set(err, -ENOMEM, "no memory for ACPI power management");
	pm->env = env;
	pthread_mutex_init(&pm->lock, NULL);
	timer_init(&pm->timer, env->clock, timer_fired, pm);
	pm->sci = env->isa_irq(env->opaque, ACPI_SCI_GSI);
	pm->tmr_seen = pm_ticks(pm) >> 23;
	pm->win = (struct io_window){ .name = "acpi-pm", .ops = &pm_ops, .opaque = pm, .lock = &pm->lock,
				      .size = ACPI_PM_SIZE };
	r = io_map(env->ports, &pm->win, ACPI_PM_BASE, err);
	if (r) {
		pthread_mutex_destroy(&pm->lock);
		free(pm);
		return r;
	}
	*out = pm;
	return 0;
}

void acpi_pm_destroy(struct acpi_pm *pm)
{
	if (!pm)
		return;
	io_unmap(pm->env->ports, &pm->win);
	timer_stop(&pm->timer);
	pthread_mutex_destroy(&pm->lock);
	free(pm);
}
