/* isa-serial: a 16550A at a COM port's address, talking to a character back end. */
#include <errno.h>
#include <stddef.h>

#include "base/util.h"
#include "chr/chr.h"
#include "dev/dev.h"
#include "dev/uart.h"

struct isa_serial {
	struct device dev;
	uint32_t index, iobase, irq;
	struct chardev *chr;

	pthread_mutex_t lock;
	struct uart uart;
	struct io_window win;
};

static uint64_t serial_read(void *opaque, uint64_t off, unsigned size)
{
	return uart_read(&((struct isa_serial *)opaque)->uart, off);
}

static void serial_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	uart_write(&((struct isa_serial *)opaque)->uart, off, val);
}

static const struct io_ops serial_ops = { serial_read, serial_write, 1, 1 };

static size_t serial_tx(void *opaque, const uint8_t *buf, size_t len)
{
	struct isa_serial *s = opaque;

	return s->chr ? chr_write(s->chr, buf, len) : len;
}

static void serial_rx_room(void *opaque)
{
	struct isa_serial *s = opaque;

	if (s->chr)
		chr_accept_input(s->chr);
}

static size_t serial_can_receive(void *opaque)
{
	struct isa_serial *s = opaque;

	pthread_mutex_lock(&s->lock);
	size_t n = uart_can_receive(&s->uart);
	pthread_mutex_unlock(&s->lock);
	return n;
}

static void serial_receive(void *opaque, const uint8_t *buf, size_t len)
{
	struct isa_serial *s = opaque;

	pthread_mutex_lock(&s->lock);
	uart_receive(&s->uart, buf, len);
	pthread_mutex_unlock(&s->lock);
}

static void serial_event(void *opaque, enum chr_event e)
{
	struct isa_serial *s = opaque;

	pthread_mutex_lock(&s->lock);
	if (e == CHR_BREAK)
		uart_break(&s->uart);
	else if (e == CHR_WRITABLE || e == CHR_OPENED)
		uart_tx_ready(&s->uart);
	pthread_mutex_unlock(&s->lock);
}

static void serial_timer(void *opaque)
{
	struct isa_serial *s = opaque;

	pthread_mutex_lock(&s->lock);
	uart_timer(&s->uart);
	pthread_mutex_unlock(&s->lock);
}

static int serial_create(struct device *d, struct err *err)
{
	struct isa_serial *s = container_of(d, struct isa_serial, dev);
	static const uint16_t base[] = { 0x3f8, 0x2f8, 0x3e8, 0x2e8 };
	static const uint8_t irq[] = { 4, 3, 4, 3 };
	int r;

	if (s->index == UINT32_MAX)
		s->index = 0;
	if (s->index > 3)
		return err_set(err, -EINVAL, "isa-serial: index %u is not one of 0 to 3", s->index);
	if (s->iobase == UINT32_MAX)
		s->iobase = base[s->index];
	if (s->irq == UINT32_MAX)
		s->irq = irq[s->index];
	if (s->iobase > 0xfff8 || s->irq > 15)
		return err_set(err, -EINVAL, "isa-serial: iobase %#x or irq %u is out of range", s->iobase, s->irq);
	pthread_mutex_init(&s->lock, NULL);
	s->uart.irq = d->env->isa_irq(d->env->opaque, s->irq);
	s->uart.tx = serial_tx;
	s->uart.rx_room = serial_rx_room;
	s->uart.opaque = s;
	uart_init(&s->uart, d->env->clock, serial_timer, s);
	s->win = (struct io_window){ .name = "isa-serial", .ops = &serial_ops, .opaque = s, .lock = &s->lock,
				     .size = 8 };
	r = io_map(d->env->ports, &s->win, s->iobase, err);
	if (r)
		return r;
	if (s->chr) {
		struct chr_client cl = { serial_can_receive, serial_receive, serial_event, s };

		r = chr_attach(s->chr, &cl, d->id ? d->id : "isa-serial", err);
		if (r)
			io_unmap(d->env->ports, &s->win);
	}
	return r;
}

static void serial_destroy(struct device *d)
{
	struct isa_serial *s = container_of(d, struct isa_serial, dev);

	io_unmap(d->env->ports, &s->win);
	if (s->chr)
		chr_detach(s->chr, s);
	timer_stop(&s->uart.timer);
	pthread_mutex_destroy(&s->lock);
}

static void serial_reset(struct device *d)
{
	struct isa_serial *s = container_of(d, struct isa_serial, dev);

	pthread_mutex_lock(&s->lock);
	uart_reset(&s->uart);
	serial_rx_room(s);
	pthread_mutex_unlock(&s->lock);
}

static const struct prop serial_props[] = {
	{ "index", PROP_U32, offsetof(struct isa_serial, index), UINT32_MAX, .help = "COM port: 0 to 3" },
	{ "iobase", PROP_U32, offsetof(struct isa_serial, iobase), UINT32_MAX, .help = "I/O port" },
	{ "irq", PROP_U32, offsetof(struct isa_serial, irq), UINT32_MAX, .help = "ISA interrupt" },
	{ "chardev", PROP_CHARDEV, offsetof(struct isa_serial, chr), .help = "character back end" },
	{ 0 },
};

const struct device_class isa_serial_class = {
	.name = "isa-serial", .desc = "16550A serial port", .bus = "ISA", .props = serial_props,
	.size = sizeof(struct isa_serial), .create = serial_create, .destroy = serial_destroy,
	.reset = serial_reset,
};
