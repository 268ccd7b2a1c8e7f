/* The console device's bus side: control messages, queues to ports. */
#include <errno.h>

#include <linux/virtio_console.h>
#include <linux/virtio_ids.h>

#include "base/util.h"
#include "virtio/serial.h"
#include "virtio/virtio.h"

static struct serial *serial_of(struct virtio_dev *v)
{
	return container_of(v, struct serial, vp.v);
}

bool serial_multiport(const struct serial *s)
{
	return virtio_has(&s->vp.v, VIRTIO_CONSOLE_F_MULTIPORT);
}

/* One message to the guest; false when it has given no buffer. */
static bool ctrl_send(struct serial *s, uint32_t id, uint16_t event, uint16_t value, const void *more, size_t len)
{
	struct virtio_console_control m = { id, event, value };
	struct virtio_dev *v = &s->vp.v;
	struct virtq_chain *c = &s->ctrl_in;
	size_t n;

	if (!virtio_pop(v, SERIAL_RX_CTRL, c))
		return false;
	n = iov_from_buf(c->in, c->n_in, 0, &m, sizeof(m));
	n += iov_from_buf(c->in, c->n_in, n, more, len);
	virtq_push(virtio_vq(v, SERIAL_RX_CTRL), c, n);
	virtio_notify(v, SERIAL_RX_CTRL);
	return true;
}

static bool say_one(struct serial *s, struct serial_port *p, uint32_t what)
{
	uint16_t size[2] = { s->cols, s->rows };

	switch (what) {
	case SAY_ADD:
		return ctrl_send(s, p->nr, VIRTIO_CONSOLE_PORT_ADD, 1, NULL, 0);
	case SAY_CONSOLE:
		return ctrl_send(s, p->nr, VIRTIO_CONSOLE_CONSOLE_PORT, 1, NULL, 0);
	case SAY_RESIZE:
		return ctrl_send(s, p->nr, VIRTIO_CONSOLE_RESIZE, 0, size, sizeof(size));
	case SAY_NAME:
		return ctrl_send(s, p->nr, VIRTIO_CONSOLE_PORT_NAME, 1, p->name, strlen(p->name) + 1);
	case SAY_OPEN:
		return ctrl_send(s, p->nr, VIRTIO_CONSOLE_PORT_OPEN, p->host_open, NULL, 0);
	}
	return true;
}

/* Lowest bit first: a port is added before it is named or opened. */
static void ctrl_flush(struct serial *s)
{
	for (unsigned nr = 0; nr < s->max_ports; nr++) {
		struct serial_port *p = s->port[nr];

		if (s->gone >> nr & 1) {
			if (!ctrl_send(s, nr, VIRTIO_CONSOLE_PORT_REMOVE, 1, NULL, 0))
				return;
			s->gone &= ~(1u << nr);
		}
		while (p && p->say) {
			uint32_t bit = p->say & -p->say;

			if (!say_one(s, p, bit))
				return;
			p->say &= ~bit;
		}
	}
}

void serial_say(struct serial *s, struct serial_port *p, uint32_t what)
{
	if (!serial_multiport(s))
		return;
	p->say |= what;
	ctrl_flush(s);
}

static void port_ready(struct serial *s, struct serial_port *p)
{
	uint32_t say = p->host_open ? SAY_OPEN : 0;

	if (p->is_console)
		say |= SAY_CONSOLE | SAY_OPEN | (s->cols && s->rows ? SAY_RESIZE : 0);
	if (p->name && *p->name)
		say |= SAY_NAME;
	serial_say(s, p, say);
}

/* 5.3.6.2: what the guest says. Lock dropped when a back end is told. */
static void ctrl_message(struct serial *s, const struct virtio_console_control *m)
{
	struct serial_port *p = m->id < s->max_ports ? s->port[m->id] : NULL;

	switch (m->event) {
	case VIRTIO_CONSOLE_DEVICE_READY:
		for (unsigned nr = 0; m->value == 1 && nr < s->max_ports; nr++)
			if (s->port[nr])
				serial_say(s, s->port[nr], SAY_ADD);
		break;
	case VIRTIO_CONSOLE_PORT_READY:
		if (p && m->value == 1)
			port_ready(s, p);
		break;
	case VIRTIO_CONSOLE_PORT_OPEN:
		if (!p)
			break;
		p->guest_open = m->value == 1;
		serial_port_accept(p);
		break;
	}
}

static void ctrl_kick(struct serial *s)
{
	struct virtio_dev *v = &s->vp.v;
	struct virtio_console_control m;
	unsigned n = 0;

	while (n < VIRTIO_BUDGET && virtio_pop(v, SERIAL_TX_CTRL, &s->ctrl_out)) {
		bool ok = iov_to_buf(s->ctrl_out.out, s->ctrl_out.n_out, 0, &m, sizeof(m)) == sizeof(m);

		virtq_push(virtio_vq(v, SERIAL_TX_CTRL), &s->ctrl_out, 0);
		n++;
		if (ok)
			ctrl_message(s, &m);
	}
	if (n)
		virtio_notify(v, SERIAL_TX_CTRL);
	if (n == VIRTIO_BUDGET)
		virtio_defer(v, SERIAL_TX_CTRL);
}

/* Output of a port that is not there. */
static void discard_output(struct serial *s, unsigned qi)
{
	struct virtio_dev *v = &s->vp.v;
	unsigned n = 0;

	while (n < VIRTIO_BUDGET && virtio_pop(v, qi, &s->ctrl_in)) {
		virtq_push(virtio_vq(v, qi), &s->ctrl_in, 0);
		n++;
	}
	if (n)
		virtio_notify(v, qi);
	if (n == VIRTIO_BUDGET)
		virtio_defer(v, qi);
}

static void serial_kick(struct virtio_dev *v, unsigned qi)
{
	struct serial *s = serial_of(v);
	unsigned nr = qi < 2 ? 0 : qi / 2 - 1;

	if (qi == SERIAL_RX_CTRL)
		ctrl_flush(s);
	else if (qi == SERIAL_TX_CTRL)
		ctrl_kick(s);
	else if (nr < s->max_ports && s->port[nr] && (qi & 1))
		serial_port_kick_tx(s->port[nr]);
	else if (nr < s->max_ports && s->port[nr])
		serial_port_accept(s->port[nr]);
	else if (qi & 1)
		discard_output(s, qi);
}

static void serial_forget(struct virtio_dev *v, unsigned qi)
{
	struct serial *s = serial_of(v);

	for (unsigned nr = 0; nr < s->max_ports; nr++)
		if (s->port[nr] && (qi == VIRTIO_MAX_QUEUES || qi == serial_tx_queue(nr)))
			serial_port_forget(s->port[nr]);
}

static void serial_reset(struct virtio_dev *v)
{
	struct serial *s = serial_of(v);

	s->gone = 0;
	for (unsigned nr = 0; nr < s->max_ports; nr++) {
		if (!s->port[nr])
			continue;
		s->port[nr]->say = 0;
		s->port[nr]->guest_open = false;
	}
}

static const struct virtio_ops serial_ops = { .kick = serial_kick, .forget = serial_forget, .reset = serial_reset };

/* Port 0 is the console's by custom: plain serial ports start at 1. */
static int pick_nr(struct serial *s, struct serial_port *p, struct err *err)
{
	const char *n = p->dev.cls->name;

	if (p->nr == UINT32_MAX)
		for (p->nr = p->is_console ? 0 : 1; p->nr < s->max_ports && s->port[p->nr]; p->nr++)
			;
	if (p->nr >= s->max_ports)
		return err_set(err, -ENOSPC, "%s: no port %u on %s, which has %u", n, p->nr,
			       s->vp.dev.id ? s->vp.dev.id : s->vp.dev.cls->name, s->max_ports);
	if (!p->nr && !p->is_console)
		return err_set(err, -EINVAL, "%s: nr=0 is kept for virtconsole", n);
	if (s->port[p->nr])
		return err_set(err, -EBUSY, "%s: nr=%u is taken by %s", n, p->nr,
			       s->port[p->nr]->dev.id ? s->port[p->nr]->dev.id : s->port[p->nr]->dev.cls->name);
	return 0;
}

int serial_plug(struct serial *s, struct serial_port *p, struct err *err)
{
	int r = pick_nr(s, p, err);

	if (r)
		return r;
	p->bus = s;
	s->port[p->nr] = p;
	s->gone &= ~(1u << p->nr);
	if (virtio_driver_ok(&s->vp.v))
		serial_say(s, p, SAY_ADD);
	return 0;
}

void serial_unplug(struct serial *s, struct serial_port *p)
{
	serial_port_forget(p);
	s->port[p->nr] = NULL;
	p->bus = NULL;
	if (!serial_multiport(s))
		return;
	s->gone |= 1u << p->nr;
	ctrl_flush(s);
}

static int serial_create(struct device *dev, struct err *err)
{
	struct serial *s = container_of(dev, struct serial, vp.dev);
	struct virtio_console_config c = { s->cols, s->rows, s->max_ports, 0 };
	unsigned n = (s->max_ports + 1) * 2;
	int r;

	if (!s->max_ports || s->max_ports > SERIAL_MAX_PORTS)
		return err_set(err, -EINVAL, "%s: max_ports must be 1 to %d", dev->cls->name, SERIAL_MAX_PORTS);
	r = virtio_pci_init(&s->vp, &(struct virtio_pci_config){ &serial_ops, VIRTIO_ID_CONSOLE, 0x07, 0x80, n, 128,
			s->max_ports > 1 ? 4 : 2, BIT(VIRTIO_CONSOLE_F_MULTIPORT) |
			(s->cols && s->rows ? BIT(VIRTIO_CONSOLE_F_SIZE) : 0), sizeof(c) }, err);
	if (r)
		return r;
	memcpy(s->vp.v.config, &c, sizeof(c));
	r = virtio_pci_plug(&s->vp, err);
	if (r)
		virtio_pci_destroy(&s->vp);
	return r;
}

static void serial_destroy(struct device *dev)
{
	struct serial *s = container_of(dev, struct serial, vp.dev);

	virtio_pci_unplug(&s->vp);
	pthread_mutex_lock(&s->vp.v.lock);
	for (unsigned nr = 0; nr < s->max_ports; nr++)
		if (s->port[nr])
			s->port[nr]->bus = NULL;
	pthread_mutex_unlock(&s->vp.v.lock);
	virtq_chain_free(&s->ctrl_in);
	virtq_chain_free(&s->ctrl_out);
	virtio_pci_destroy(&s->vp);
}

static const struct prop serial_props[] = {
	VIRTIO_PCI_PROPS(struct serial),
	{ "max_ports", PROP_U32, offsetof(struct serial, max_ports), SERIAL_MAX_PORTS, .min = 1, .max = SERIAL_MAX_PORTS,
	  .help = "ports" },
	{ "cols", PROP_U16, offsetof(struct serial, cols), 0, .help = "console width told to the guest, 0: unknown" },
	{ "rows", PROP_U16, offsetof(struct serial, rows), 0, .help = "console height" },
	{ NULL }
};

const struct device_class virtio_serial_pci_class = {
	.name = "virtio-serial-pci", .aliases = (const char *const[]){ "virtio-serial", NULL },
	.desc = "virtio console and serial ports", .bus = "PCI", .provides = "virtio-serial-bus",
	.props = serial_props, .size = sizeof(struct serial),
	.create = serial_create, .destroy = serial_destroy, .reset = virtio_pci_dev_reset, .pause = virtio_pci_dev_pause,
};
