/* Random port accesses and time steps on the chipset's chips and a UART. */
#include <string.h>

#include "../pci/fuzz.h"
#include "base/util.h"
#include "dev/acpi_pm.h"
#include "dev/misc.h"
#include "dev/rtc.h"
#include "dev/uart.h"
#include "fix.h"

static void uart_timer_fn(void *o) { uart_timer(o); }
static size_t tx(void *o, const uint8_t *b, size_t n) { return n & *b; }

static void step(struct fix *f, struct uart *u, const uint8_t *p)
{
	static const uint16_t base[] = { 0x70, 0x71, 0x71, 0x60, 0x64, 0x92, 0x600, 0x620 };
	uint8_t buf[16] = { 0 };

	switch (p[0] & 7) {
	case 0: case 1: case 2:
		out(f, base[p[1] & 7] + (p[1] & 4 ? p[2] & 15 : 0), ld_le32(p + 4), 1u << (p[3] & 1));
		break;
	case 3:
		in(f, base[p[1] & 7] + (p[2] & 15), 1u << (p[3] % 3));
		break;
	case 4:
		uart_write(u, p[1], p[2]);
		uart_read(u, p[3]);
		break;
	case 5:
		uart_receive(u, buf, MIN(uart_can_receive(u), (size_t)(p[1] & 15)));
		uart_tx_ready(u);
		break;
	default:
		/* Up to 16 ms: long steps with a fast periodic timer only take time. */
		clock_step(f->env.clock, ld_le32(p + 4) & 0xffffff);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct fix f;
	struct uart u = { .tx = tx };
	struct rtc *r;
	struct acpi_pm *pm;
	struct pc_ports *pp;

	fix_init(&f);
	u.irq = fix_irq(&f, 4);
	uart_init(&u, f.env.clock, uart_timer_fn, &u);
	if (rtc_create(&r, &f.env, 1700000000LL * 1000000000, NULL) || acpi_pm_create(&pm, &f.env, NULL) ||
	    pc_ports_create(&pp, &f.env, NULL))
		abort();
	FUZZ_EACH(data, len, 8)
		step(&f, &u, data);
	timer_stop(&u.timer);
	rtc_destroy(r);
	acpi_pm_destroy(pm);
	pc_ports_destroy(pp);
	fix_done(&f);
	return 0;
}
