/* UART, RTC, ACPI power management and system ports against a clock that the test steps. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "dev/acpi_pm.h"
#include "dev/dev.h"
#include "dev/misc.h"
#include "dev/rtc.h"
#include "dev/uart.h"
#include "fix.h"

#define SEC 1000000000ULL

static size_t room;
static char sent[64];
static size_t nsent;

static size_t tx(void *o, const uint8_t *b, size_t n)
{
	n = n < room ? n : room;
	memcpy(sent + nsent, b, n);
	nsent += n;
	room -= n;
	return n;
}

static void uart_timer_fn(void *o) { uart_timer(o); }

static void uart(void **st)
{
	struct fix f;
	struct uart u = { .tx = tx };

	fix_init(&f);
	u.irq = fix_irq(&f, 4);
	uart_init(&u, f.env.clock, uart_timer_fn, &u);
	room = 2;
	nsent = 0;
	uart_write(&u, 1, 2);                           /* THRI on while empty: interrupt at once */
	assert_int_equal(f.level[4], 1);
	assert_int_equal(uart_read(&u, 2) & 15, 2);
	assert_int_equal(f.level[4], 0);                /* reading IIR took it */
	uart_write(&u, 2, 0xc7);
	uart_read(&u, 2);
	for (int i = 0; i < 4; i++)
		uart_write(&u, 0, 'a' + i);
	assert_int_equal(nsent, 2);                     /* back-pressure */
	assert_int_equal(uart_read(&u, 5) & 0x60, 0);
	assert_int_equal(f.level[4], 0);
	room = 10;
	uart_tx_ready(&u);
	assert_memory_equal(sent, "abcd", 4);
	assert_int_equal(uart_read(&u, 5) & 0x60, 0x60);
	assert_int_equal(f.level[4], 1);
	uart_read(&u, 2);
	uart_write(&u, 1, 5);                           /* receive: trigger at 14, or the timeout */
	assert_int_equal(uart_can_receive(&u), 16);
	uart_receive(&u, (const uint8_t *)"xyz", 3);
	assert_int_equal(f.level[4], 0);
	clock_step(f.env.clock, SEC / 10);
	assert_int_equal(uart_read(&u, 2) & 15, 0xc);
	assert_int_equal(uart_read(&u, 0), 'x');
	assert_int_equal(f.level[4], 0);
	uart_receive(&u, (const uint8_t *)"0123456789abcdef", 16);
	assert_int_equal(uart_read(&u, 2) & 15, 6);     /* overrun: line status first */
	assert_int_equal(uart_read(&u, 5) & 2, 2);
	assert_int_equal(uart_read(&u, 2) & 15, 4);
	uart_write(&u, 2, 0xc7);
	uart_write(&u, 4, 0x1a);                        /* loopback with RTS and OUT2 */
	assert_int_equal(uart_read(&u, 6) & 0xf0, 0x90);
	uart_write(&u, 0, 'L');
	assert_int_equal(uart_read(&u, 0), 'L');
	uart_write(&u, 4, 0);
	uart_break(&u);
	assert_int_equal(uart_read(&u, 5) & 0x11, 0x11);
	timer_stop(&u.timer);
	fix_done(&f);
}

static uint8_t cmos(struct fix *f, uint8_t i)
{
	out(f, 0x70, i, 1);
	return in(f, 0x71, 1);
}

static void cmos_set(struct fix *f, uint8_t i, uint8_t v)
{
	out(f, 0x70, i, 1);
	out(f, 0x71, v, 1);
}

static void rtc(void **st)
{
	struct fix f;
	struct rtc *r;

	fix_init(&f);
	assert_int_equal(rtc_create(&r, &f.env, 951782399LL * 1000000000, NULL), 0);    /* 2000-02-28 23:59:59 */
	assert_int_equal(cmos(&f, 0), 0x59);
	assert_int_equal(cmos(&f, 4), 0x23);
	clock_step(f.env.clock, SEC - 100000);
	assert_int_equal(cmos(&f, 10) & 0x80, 0x80);    /* update in progress */
	clock_step(f.env.clock, 100000);
	assert_int_equal(cmos(&f, 10) & 0x80, 0);
	assert_int_equal(cmos(&f, 7), 0x29);            /* leap day */
	assert_int_equal(cmos(&f, 8), 0x02);
	assert_int_equal(cmos(&f, 9), 0x00);
	assert_int_equal(cmos(&f, 0x32), 0x20);
	assert_int_equal(cmos(&f, 12) & 0x10, 0x10);    /* UF without an enable */
	assert_int_equal(cmos(&f, 12), 0);
	cmos_set(&f, 1, 0x05);                          /* alarm 00:00:05 */
	cmos_set(&f, 3, 0xc0);
	cmos_set(&f, 5, 0xff);
	cmos_set(&f, 11, 0x22);
	clock_step(f.env.clock, 4 * SEC);
	assert_int_equal(f.level[8], 0);
	clock_step(f.env.clock, SEC);
	assert_int_equal(f.level[8], 1);
	assert_int_equal(cmos(&f, 12) & 0xa0, 0xa0);
	assert_int_equal(f.level[8], 0);
	cmos_set(&f, 11, 0x42);                         /* periodic, 1024 Hz */
	f.rises[8] = 0;
	for (int i = 0; i < 102; i++) {
		clock_step(f.env.clock, SEC / 1024 + 1);
		cmos(&f, 12);
	}
	assert_in_range(f.rises[8], 100, 103);
	cmos_set(&f, 11, 0x82);                         /* SET: write a date, then run */
	cmos_set(&f, 9, 0x24);
	cmos_set(&f, 0, 0x30);
	clock_step(f.env.clock, 10 * SEC);
	assert_int_equal(cmos(&f, 0), 0x30);
	cmos_set(&f, 11, 0x02);
	clock_step(f.env.clock, 2 * SEC);
	assert_int_equal(cmos(&f, 0), 0x32);
	assert_int_equal(cmos(&f, 9), 0x24);
	cmos_set(&f, 11, 0x06);                         /* binary */
	assert_int_equal(cmos(&f, 0), 32);
	rtc_destroy(r);
	fix_done(&f);
}

static void pm(void **st)
{
	struct fix f;
	struct acpi_pm *p;

	fix_init(&f);
	assert_int_equal(acpi_pm_create(&p, &f.env, NULL), 0);
	clock_step(f.env.clock, SEC);
	assert_int_equal(in(&f, 0x608, 4), 3579545);
	assert_int_equal(in(&f, 0x604, 2) & 1, 1);
	out(&f, 0x602, 0x100, 2);
	acpi_pm_power_button(p);
	assert_int_equal(f.level[9], 1);
	out(&f, 0x600, 0x100, 2);
	assert_int_equal(f.level[9], 0);
	out(&f, 0x600, 1, 2);
	out(&f, 0x602, 1, 2);
	clock_step(f.env.clock, 3 * SEC);
	assert_int_equal(f.level[9], 1);                /* bit 23 changed */
	out(&f, 0x604, 1 << 10 | 1 << 13, 2);           /* S1: not there */
	assert_int_equal(f.requests, 0);
	out(&f, 0x604, 1 << 13, 2);
	assert_int_equal(f.requests, 1);
	assert_int_equal(f.last, MACHINE_POWEROFF);
	acpi_pm_destroy(p);
	fix_done(&f);
}

static void ports(void **st)
{
	struct fix f;
	struct pc_ports *p;

	fix_init(&f);
	assert_int_equal(pc_ports_create(&p, &f.env, NULL), 0);
	out(&f, 0x64, 0xaa, 1);
	assert_int_equal(in(&f, 0x64, 1) & 5, 5);
	assert_int_equal(in(&f, 0x60, 1), 0x55);
	assert_int_equal(in(&f, 0x64, 1) & 1, 0);
	out(&f, 0x64, 0xfe, 1);
	out(&f, 0x92, 3, 1);
	pc_reset_control_write(p, 6);
	assert_int_equal(f.requests, 3);
	assert_int_equal(f.last, MACHINE_RESET);
	pc_ports_destroy(p);
	fix_done(&f);
}

static void testdev(void **st)
{
	const uint64_t word = 0x1122334455667788;
	struct device *d;
	uint64_t v = 0;
	struct fix f;

	fix_init(&f);
	assert_int_equal(device_alloc(&d, &pc_testdev_class, &f.env, NULL, NULL), 0);
	assert_int_equal(device_create(d, NULL), 0);
	out(&f, 0xe0, 0x44332211, 4);
	out(&f, 0xe1, 0xbbaa, 2);
	assert_int_equal(in(&f, 0xe0, 4), 0x44bbaa11);
	assert_int_equal(in(&f, 0xe9, 2), 0xbbaa);
	out(&f, 0xe8, 0x04030201, 4);
	assert_int_equal(in(&f, 0xe2, 1), 3);
	out(&f, 0xe4, 0x1000, 4);               /* no memory here: nothing to flush */
	out(&f, 0x200e, 1, 1);
	assert_int_equal(f.level[14], 1);
	out(&f, 0x200e, 0, 1);
	assert_int_equal(f.level[14], 0);
	assert_int_equal(f.rises[14], 1);
	assert_true(io_write(f.env.mmio, 0xff00fff8, &word, 8));
	assert_true(io_read(f.env.mmio, 0xff00fffb, &v, 2));
	assert_int_equal(v, 0x4455);
	device_free(d);
	assert_false(io_read(f.env.mmio, 0xff000000, &v, 1));
	assert_int_equal(in(&f, 0xe0, 1), 0xff);
	fix_done(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(uart), cmocka_unit_test(rtc), cmocka_unit_test(pm),
					    cmocka_unit_test(ports), cmocka_unit_test(testdev) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
