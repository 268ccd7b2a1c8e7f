/* Ports for test guests and firmware: isa-debug-exit and isa-debugcon, as in QEMU. */
#include <errno.h>
#include <stddef.h>

#include "base/util.h"
#include "chr/chr.h"
#include "dev/dev.h"

struct debug_exit {
	struct device dev;
	uint32_t iobase, iosize;
	struct io_window win;
};

static uint64_t exit_read(void *opaque, uint64_t off, unsigned size)
{
	return 0;
}

static void exit_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct debug_exit *x = opaque;

	x->dev.env->request(x->dev.env->opaque, MACHINE_EXIT, (int)((val << 1 | 1) & 0xff));
}

static const struct io_ops exit_ops = { exit_read, exit_write, 1, 4 };

static int exit_create(struct device *d, struct err *err)
{
	struct debug_exit *x = container_of(d, struct debug_exit, dev);

	if (x->iosize < 1 || x->iosize > 4096 || x->iobase > 0x10000 - x->iosize)
		return err_set(err, -EINVAL, "isa-debug-exit: iobase %#x with iosize %#x is out of range", x->iobase,
			       x->iosize);
	x->win = (struct io_window){ .name = "isa-debug-exit", .ops = &exit_ops, .opaque = x, .size = x->iosize };
	return io_map(d->env->ports, &x->win, x->iobase, err);
}

static void exit_destroy(struct device *d)
{
	io_unmap(d->env->ports, &container_of(d, struct debug_exit, dev)->win);
}

static const struct prop exit_props[] = {
	{ "iobase", PROP_U32, offsetof(struct debug_exit, iobase), 0x501, .help = "I/O port" },
	{ "iosize", PROP_U32, offsetof(struct debug_exit, iosize), 2, .help = "number of ports" },
	{ 0 },
};

const struct device_class isa_debug_exit_class = {
	.name = "isa-debug-exit", .desc = "ends the machine with a status the guest chooses", .bus = "ISA",
	.props = exit_props, .size = sizeof(struct debug_exit), .create = exit_create, .destroy = exit_destroy,
};

struct debugcon {
	struct device dev;
	uint32_t iobase, readback;
	struct chardev *chr;
	pthread_mutex_t lock;
	struct io_window win;
};

static uint64_t con_read(void *opaque, uint64_t off, unsigned size)
{
	return ((struct debugcon *)opaque)->readback;
}

/* Output only, and what the back end can't take is lost: the port has no way to say "wait". */
static void con_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct debugcon *c = opaque;
	uint8_t b = val;

	if (c->chr)
		chr_write(c->chr, &b, 1);
}

static const struct io_ops con_ops = { con_read, con_write, 1, 1 };

static size_t con_can_receive(void *opaque)
{
	return 0;
}

static void con_receive(void *opaque, const uint8_t *buf, size_t len)
{
}

static void con_event(void *opaque, enum chr_event e)
{
}

static int con_create(struct device *d, struct err *err)
{
	struct debugcon *c = container_of(d, struct debugcon, dev);
	struct chr_client cl = { con_can_receive, con_receive, con_event, c };
	int r;

	if (c->iobase > 0xffff)
		return err_set(err, -EINVAL, "isa-debugcon: iobase %#x is out of range", c->iobase);
	pthread_mutex_init(&c->lock, NULL);
	c->win = (struct io_window){ .name = "isa-debugcon", .ops = &con_ops, .opaque = c, .lock = &c->lock,
				     .size = 1 };
	r = io_map(d->env->ports, &c->win, c->iobase, err);
	if (!r && c->chr) {
		r = chr_attach(c->chr, &cl, d->id ? d->id : "isa-debugcon", err);
		if (r)
			io_unmap(d->env->ports, &c->win);
	}
	return r;
}

static void con_destroy(struct device *d)
{
	struct debugcon *c = container_of(d, struct debugcon, dev);

	io_unmap(d->env->ports, &c->win);
	if (c->chr)
		chr_detach(c->chr, c);
	pthread_mutex_destroy(&c->lock);
}

static const struct prop con_props[] = {
	{ "iobase", PROP_U32, offsetof(struct debugcon, iobase), 0xe9, .help = "I/O port" },
	{ "readback", PROP_U32, offsetof(struct debugcon, readback), 0xe9, .help = "what a read returns" },
	{ "chardev", PROP_CHARDEV, offsetof(struct debugcon, chr), .help = "character back end" },
	{ 0 },
};

const struct device_class isa_debugcon_class = {
	.name = "isa-debugcon", .desc = "debug console port", .bus = "ISA", .props = con_props,
	.size = sizeof(struct debugcon), .create = con_create, .destroy = con_destroy,
};
