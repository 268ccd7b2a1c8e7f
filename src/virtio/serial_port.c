/*
 * One port: a byte stream each way, with back-pressure. A chain that the back end took in part is
 * held until it is writable again; the guest's free receive buffers decide what the back end offers.
 * The device's lock is dropped around every call of the back end.
 */
#include <errno.h>

#include "base/util.h"
#include "virtio/serial.h"
#include "virtio/virtio.h"

static struct virtio_dev *vdev(struct serial_port *p)
{
	return &p->bus->vp.v;
}

/* True when all of it went out; the lock is dropped around each write. */
static bool write_chain(struct serial_port *p)
{
	struct virtio_dev *v = vdev(p);
	struct virtq_chain *c = &p->tx;
	size_t skip = p->tx_off;

	for (unsigned i = 0; i < c->n_out; i++) {
		const struct iovec *iov = &c->out[i];
		size_t n;

		if (skip >= iov->iov_len) {
			skip -= iov->iov_len;
			continue;
		}
		p->writable = false;
		pthread_mutex_unlock(&v->lock);
		n = chr_write(p->chardev, (uint8_t *)iov->iov_base + skip, iov->iov_len - skip);
		pthread_mutex_lock(&v->lock);
		p->tx_off += n;
		if (skip + n < iov->iov_len)
			return false;
		skip = 0;
	}
	return true;
}

void serial_port_kick_tx(struct serial_port *p)
{
	struct virtio_dev *v = vdev(p);
	unsigned qi = serial_tx_queue(p->nr), n = 0;

	while (n < VIRTIO_BUDGET / 4 && (p->tx_held || virtio_pop(v, qi, &p->tx))) {
		p->tx_held = true;
		n++;
		if (!p->attached) {
			p->n_dropped++;
		} else if (!write_chain(p)) {
			/* Room may have come between the short write and now. */
			if (p->writable)
				continue;
			return;
		}
		p->tx_held = false;
		p->tx_off = 0;
		virtq_push(virtio_vq(v, qi), &p->tx, 0);
		virtio_notify(v, qi);
	}
	if (n == VIRTIO_BUDGET / 4)
		virtio_defer(v, qi);
}

void serial_port_forget(struct serial_port *p)
{
	p->tx_held = false;
	p->tx_off = 0;
}

void serial_port_accept(struct serial_port *p)
{
	struct virtio_dev *v = vdev(p);

	if (!p->attached)
		return;
	pthread_mutex_unlock(&v->lock);
	chr_accept_input(p->chardev);
	pthread_mutex_lock(&v->lock);
}

static bool takes_input(struct serial_port *p)
{
	return virtio_queue_ready(vdev(p), serial_rx_queue(p->nr)) && (!serial_multiport(p->bus) || p->guest_open);
}

static size_t port_can_receive(void *opaque)
{
	struct serial_port *p = opaque;
	struct virtio_dev *v = vdev(p);
	struct virtq *q = virtio_vq(v, serial_rx_queue(p->nr));
	size_t room = 0;

	pthread_mutex_lock(&v->lock);
	if (takes_input(p) && virtio_pop(v, q->index, &p->rx)) {
		room = p->rx.in_len;
		virtq_unpop(q, &p->rx);
	}
	pthread_mutex_unlock(&v->lock);
	return room;
}

/* The buffer may have gone with a reset since can_receive(): bytes are lost then, as on a pulled cable. */
static void port_receive(void *opaque, const uint8_t *buf, size_t len)
{
	struct serial_port *p = opaque;
	struct virtio_dev *v = vdev(p);
	unsigned qi = serial_rx_queue(p->nr);

	pthread_mutex_lock(&v->lock);
	while (len && takes_input(p) && virtio_pop(v, qi, &p->rx)) {
		size_t n = iov_from_buf(p->rx.in, p->rx.n_in, 0, buf, len);

		virtq_push(virtio_vq(v, qi), &p->rx, n);
		virtio_notify(v, qi);
		buf += n;
		len -= n;
	}
	p->n_dropped += len;
	pthread_mutex_unlock(&v->lock);
}

static void port_event(void *opaque, enum chr_event e)
{
	struct serial_port *p = opaque;
	struct virtio_dev *v = vdev(p);

	pthread_mutex_lock(&v->lock);
	if (e == CHR_OPENED || e == CHR_CLOSED) {
		p->host_open = e == CHR_OPENED;
		if (virtio_driver_ok(v))
			serial_say(p->bus, p, SAY_OPEN);
	} else if (e == CHR_WRITABLE) {
		p->writable = true;
		virtio_serve(v, serial_tx_queue(p->nr));
	}
	pthread_mutex_unlock(&v->lock);
}

static int port_create(struct device *dev, struct err *err)
{
	struct serial_port *p = container_of(dev, struct serial_port, dev);
	struct chr_client cl = { port_can_receive, port_receive, port_event, p };
	struct serial *s;
	int r;

	if (!dev->parent || dev->parent->cls != &virtio_serial_pci_class)
		return err_set(err, -ENODEV, "%s: needs a virtio-serial-pci device before it", dev->cls->name);
	s = container_of(dev->parent, struct serial, vp.dev);
	p->is_console = dev->cls == &virtconsole_class;
	pthread_mutex_lock(&s->vp.v.lock);
	r = serial_plug(s, p, err);
	pthread_mutex_unlock(&s->vp.v.lock);
	if (r || !p->chardev)
		return r;
	r = chr_attach(p->chardev, &cl, dev->id ? dev->id : dev->cls->name, err);
	pthread_mutex_lock(&s->vp.v.lock);
	p->attached = !r;
	if (r)
		serial_unplug(s, p);
	pthread_mutex_unlock(&s->vp.v.lock);
	return r;
}

static void port_destroy(struct device *dev)
{
	struct serial_port *p = container_of(dev, struct serial_port, dev);
	struct serial *s = p->bus;

	if (p->attached)
		chr_detach(p->chardev, p);
	if (s) {
		struct virtio_dev *v = &s->vp.v;

		pthread_mutex_lock(&v->lock);
		p->attached = false;
		while (v->n_serving)
			pthread_cond_wait(&v->idle, &v->lock);
		serial_unplug(s, p);
		pthread_mutex_unlock(&v->lock);
	}
	virtq_chain_free(&p->tx);
	virtq_chain_free(&p->rx);
}

#define PORT_PROPS \
	{ "chardev", PROP_CHARDEV, offsetof(struct serial_port, chardev), .help = "id of a -chardev" }, \
	{ "name", PROP_STR, offsetof(struct serial_port, name), .help = "name the guest sees" }, \
	{ "nr", PROP_U32, offsetof(struct serial_port, nr), UINT32_MAX, .help = "port number" }, \
	{ NULL }

static const struct prop port_props[] = { PORT_PROPS };

const struct device_class virtconsole_class = {
	.name = "virtconsole", .desc = "virtio console port", .bus = "virtio-serial-bus", .props = port_props,
	.size = sizeof(struct serial_port), .create = port_create, .destroy = port_destroy,
};

const struct device_class virtserialport_class = {
	.name = "virtserialport", .desc = "virtio serial port", .bus = "virtio-serial-bus", .props = port_props,
	.size = sizeof(struct serial_port), .create = port_create, .destroy = port_destroy,
};
