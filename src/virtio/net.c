/*
 * Network device (virtio 1.2, 5.1): one queue pair and a control queue, no offloads.
 *
 * Receive: the back end calls on the loop's thread; a frame that finds no buffers is refused, and the
 * driver's next kick of the queue asks for it again. Transmit: frames go to the back end from the
 * kick, straight out of guest memory; when it is full the chain goes back and is tried again.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include <linux/if_ether.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_net.h>

#include "base/util.h"
#include "virtio/net_priv.h"
#include "virtio/virtio.h"

#define HDR sizeof(struct virtio_net_hdr_mrg_rxbuf)     /* with VERSION_1 in every frame, 5.1.6.1 */
#define FRAME_MAX (64 * 1024)
#define RX_CHAINS 128           /* buffers one frame may take */

static struct vnet *vnet_of(struct virtio_dev *v)
{
	return container_of(v, struct vnet, vp.v);
}

/* Pop buffers for `need` bytes; all or none. 0: not enough there. */
static unsigned rx_gather(struct vnet *d, size_t need)
{
	bool merge = virtio_has(&d->vp.v, VIRTIO_NET_F_MRG_RXBUF);
	uint64_t have = 0;
	unsigned n = 0;

	while (have < need && n < (merge ? RX_CHAINS : 1)) {
		if (!virtio_pop(&d->vp.v, NET_RX, &d->rx[n]))
			break;
		have += d->rx[n++].in_len;
	}
	if (have >= need)
		return n;
	/* A frame that this driver's buffers can never hold would wait for ever: it is dropped. */
	if (n == (merge ? RX_CHAINS : 1))
		d->n_rx_dropped++;
	else
		d->n_rx_full++;
	bool hopeless = n == (merge ? RX_CHAINS : 1);

	while (n)
		virtq_unpop(virtio_vq(&d->vp.v, NET_RX), &d->rx[--n]);
	return hopeless ? UINT32_MAX : 0;
}

static void rx_fill(struct vnet *d, unsigned n, const uint8_t *frame, size_t len)
{
	struct virtio_net_hdr_mrg_rxbuf h = { .num_buffers = n };
	struct virtq *q = virtio_vq(&d->vp.v, NET_RX);
	size_t done = 0;

	for (unsigned i = 0; i < n; i++) {
		struct virtq_chain *c = &d->rx[i];
		size_t off = 0, part;

		/* The header may lie across descriptors, but 5.1.6.3.1 has it inside the first buffer. */
		if (!i)
			off = iov_from_buf(c->in, c->n_in, 0, &h, HDR);
		part = MIN(c->in_len - off, len - done);
		iov_from_buf(c->in, c->n_in, off, frame + done, part);
		done += part;
		virtq_fill(q, c, off + part);
	}
	virtq_flush(q);
	virtio_notify(&d->vp.v, NET_RX);
	d->n_rx++;
}

static bool rx_frame(struct vnet *d, const uint8_t *frame, size_t len)
{
	struct virtio_dev *v = &d->vp.v;
	unsigned n;

	if (v->paused)
		return false;
	if (!virtio_queue_ready(v, NET_RX) || !d->link_up || len > FRAME_MAX ||
	    !net_filter_pass(&d->f, frame, len, virtio_has(v, VIRTIO_NET_F_CTRL_VLAN))) {
		d->n_rx_dropped++;
		return true;
	}
	n = rx_gather(d, len + HDR);
	if (!n) {
		/* Ask for a kick, then look once more: buffers may have come before we asked. */
		virtq_want_kicks(virtio_vq(v, NET_RX), true);
		n = rx_gather(d, len + HDR);
	}
	if (!n)
		return !virtio_queue_ready(v, NET_RX);
	if (n == UINT32_MAX)
		return true;
	/* A first buffer shorter than the header: 5.1.6.3.1 forbids it. */
	if (d->rx[0].in_len < HDR) {
		virtio_needs_reset(v);
		return true;
	}
	virtq_want_kicks(virtio_vq(v, NET_RX), false);
	rx_fill(d, n, frame, len);
	return true;
}

static bool net_receive(void *opaque, const void *frame, size_t len)
{
	struct vnet *d = opaque;
	bool taken;

	pthread_mutex_lock(&d->vp.v.lock);
	taken = rx_frame(d, frame, len);
	pthread_mutex_unlock(&d->vp.v.lock);
	return taken;
}

static void net_link(void *opaque, bool up)
{
	struct vnet *d = opaque;
	struct virtio_dev *v = &d->vp.v;
	uint8_t *st = v->config + offsetof(struct virtio_net_config, status);

	pthread_mutex_lock(&v->lock);
	d->link_up = up;
	*st = up ? *st | VIRTIO_NET_S_LINK_UP : *st & ~VIRTIO_NET_S_LINK_UP;
	virtio_config_changed(v);
	pthread_mutex_unlock(&v->lock);
}

/* One frame; the lock is dropped around the back end. False: the back end is full. */
static bool tx_frame(struct vnet *d)
{
	struct virtio_dev *v = &d->vp.v;
	struct virtq_chain *c = &d->chain;
	struct iovec *iov = c->out;
	unsigned n = c->n_out;
	int r = -EINVAL;

	if (c->out_len >= HDR + ETH_HLEN && c->out_len <= HDR + FRAME_MAX && d->link_up) {
		iov_trim_front(&iov, &n, HDR);
		pthread_mutex_unlock(&v->lock);
		r = net_send(d->netdev, iov, n);
		pthread_mutex_lock(&v->lock);
	}
	if (r == -EAGAIN)
		return false;
	*(r ? &d->n_tx_dropped : &d->n_tx) += 1;
	return true;
}

static void tx_kick(struct vnet *d)
{
	struct virtio_dev *v = &d->vp.v;
	struct virtq *q = virtio_vq(v, NET_TX);
	unsigned n = 0;

	virtq_want_kicks(q, false);
	for (;;) {
		if (n == VIRTIO_BUDGET) {
			virtio_defer(v, NET_TX);
			break;
		}
		if (!virtio_pop(v, NET_TX, &d->chain)) {
			virtq_want_kicks(q, true);
			if (virtq_empty(q) || !virtio_queue_ready(v, NET_TX))
				break;
			virtq_want_kicks(q, false);
			n++;            /* an empty round counts: the guest may add one at a time for ever */
			continue;
		}
		if (!tx_frame(d)) {
			virtq_unpop(q, &d->chain);
			d->n_tx_full++;
			break;                  /* net_can_send() comes */
		}
		virtq_fill(q, &d->chain, 0);
		n++;
		if (!(n % 16)) {
			virtq_flush(q);
			virtio_notify(v, NET_TX);
		}
	}
	if (q->filled) {
		virtq_flush(q);
		virtio_notify(v, NET_TX);
	}
}

static void net_can_send(void *opaque)
{
	struct vnet *d = opaque;

	pthread_mutex_lock(&d->vp.v.lock);
	virtio_serve(&d->vp.v, NET_TX);
	pthread_mutex_unlock(&d->vp.v.lock);
}

static void net_kick(struct virtio_dev *v, unsigned qi)
{
	struct vnet *d = vnet_of(v);

	if (qi == NET_TX) {
		tx_kick(d);
	} else if (qi == NET_RX) {
		virtq_want_kicks(virtio_vq(v, NET_RX), false);
		pthread_mutex_unlock(&v->lock);
		net_resume(d->netdev);
		pthread_mutex_lock(&v->lock);
	} else {
		net_ctrl_kick(d);
	}
}

static void net_reset(struct virtio_dev *v)
{
	struct vnet *d = vnet_of(v);

	net_filter_reset(&d->f, d->mac);
	memcpy(v->config, d->mac, 6);
	v->config[offsetof(struct virtio_net_config, status)] &= ~VIRTIO_NET_S_ANNOUNCE;
}

static const struct virtio_ops net_ops = { .kick = net_kick, .reset = net_reset };

static uint64_t net_features(const struct vnet *d)
{
	uint64_t f = BIT(VIRTIO_NET_F_MAC) | BIT(VIRTIO_NET_F_SPEED_DUPLEX);

	if (d->mrg_rxbuf)
		f |= BIT(VIRTIO_NET_F_MRG_RXBUF);
	if (d->status)
		f |= BIT(VIRTIO_NET_F_STATUS);
	if (d->mtu)
		f |= BIT(VIRTIO_NET_F_MTU);
	if (d->ctrl_vq)
		f |= BIT(VIRTIO_NET_F_CTRL_VQ) | BIT(VIRTIO_NET_F_CTRL_RX) | BIT(VIRTIO_NET_F_CTRL_VLAN) |
		     BIT(VIRTIO_NET_F_CTRL_RX_EXTRA) | BIT(VIRTIO_NET_F_CTRL_MAC_ADDR) |
		     (d->status ? BIT(VIRTIO_NET_F_GUEST_ANNOUNCE) : 0);
	return f;
}

static void fill_config(struct vnet *d)
{
	struct virtio_net_config c = { .status = VIRTIO_NET_S_LINK_UP, .max_virtqueue_pairs = 1, .mtu = d->mtu,
				       .speed = 0xffffffff, .duplex = 0xff };

	memcpy(c.mac, d->mac, 6);
	memcpy(d->vp.v.config, &c, MIN(sizeof(c), (size_t)VIRTIO_CONFIG_MAX));
}

/* Without mac=: QEMU's prefix, and the PCI slot or the order would decide; an address per device. */
static void default_mac(struct vnet *d)
{
	static const uint8_t none[6], base[6] = { 0x52, 0x54, 0x00, 0x12, 0x34, 0x56 };

	if (memcmp(d->mac, none, 6))
		return;
	memcpy(d->mac, base, 6);
	for (unsigned slot = 0; slot < 32; slot++) {
		struct pci_device *p = pci_bus_device(d->vp.dev.env->pci, slot * 8);

		if (p && p->cfg[0x0b] == 0x02)          /* class: network */
			d->mac[5]++;
	}
}

static int net_check(struct vnet *d, struct err *err)
{
	const char *n = d->vp.dev.cls->name;

	if (!d->netdev)
		return err_set(err, -EINVAL, "%s: netdev property not set", n);
	if (d->mq)
		return err_set(err, -ENOTSUP, "%s: mq=on is not supported", n);
	if ((d->rx_size & (d->rx_size - 1)) || (d->tx_size & (d->tx_size - 1)))
		return err_set(err, -EINVAL, "%s: queue sizes must be powers of two", n);
	if (d->mac[0] & 1)
		return err_set(err, -EINVAL, "%s: mac is a multicast address", n);
	if (d->mtu && d->mtu < 68)
		return err_set(err, -EINVAL, "%s: host_mtu must be at least 68", n);
	return 0;
}

static void net_free(struct vnet *d)
{
	if (d->attached)
		net_detach(d->netdev);
	d->attached = false;
	for (unsigned i = 0; d->rx && i < RX_CHAINS; i++)
		virtq_chain_free(&d->rx[i]);
	free(d->rx);
	d->rx = NULL;
	virtq_chain_free(&d->chain);
	virtq_chain_free(&d->ctrl);
	virtio_pci_destroy(&d->vp);
}

static int net_create(struct device *dev, struct err *err)
{
	struct vnet *d = container_of(dev, struct vnet, vp.dev);
	struct net_client cl = { net_receive, net_link, d, net_can_send };
	int r = net_check(d, err);

	if (r)
		return r;
	r = virtio_pci_init(&d->vp, &(struct virtio_pci_config){ &net_ops, VIRTIO_ID_NET, 0x02, 0x00,
			d->ctrl_vq ? 3 : 2, MAX(d->rx_size, d->tx_size), d->ctrl_vq ? 4 : 3, net_features(d),
			sizeof(struct virtio_net_config) }, err);
	if (r)
		return r;
	d->vp.v.vq[NET_RX].q.max_size = d->vp.v.vq[NET_RX].q.size = d->rx_size;
	d->vp.v.vq[NET_TX].q.max_size = d->vp.v.vq[NET_TX].q.size = d->tx_size;
	if (d->ctrl_vq)
		d->vp.v.vq[NET_CTRL].q.max_size = d->vp.v.vq[NET_CTRL].q.size = 64;
	default_mac(d);
	net_filter_reset(&d->f, d->mac);
	fill_config(d);
	d->link_up = true;
	d->rx = calloc(RX_CHAINS, sizeof(*d->rx));
	r = d->rx ? 0 : err_set(err, -ENOMEM, "%s: no memory", dev->cls->name);
	if (!r)
		r = virtio_pci_plug(&d->vp, err);
	if (!r) {
		r = net_attach(d->netdev, &cl, dev->id ? dev->id : dev->cls->name, err);
		d->attached = !r;
		if (r)
			virtio_pci_unplug(&d->vp);
	}
	if (r)
		net_free(d);
	return r;
}

static void net_destroy(struct device *dev)
{
	struct vnet *d = container_of(dev, struct vnet, vp.dev);

	virtio_pci_unplug(&d->vp);
	net_free(d);
}

static void net_pause(struct device *dev, bool paused)
{
	struct vnet *d = container_of(dev, struct vnet, vp.dev);

	virtio_pci_dev_pause(dev, paused);
	if (!paused)
		net_resume(d->netdev);
}

static int32_t net_boot(struct device *dev, char *path, size_t len)
{
	struct vnet *d = container_of(dev, struct vnet, vp.dev);
	char bus[64];

	pci_fw_path(&d->vp.pci, "ethernet", bus, sizeof(bus));
	snprintf(path, len, "%s/ethernet-phy@0", bus);
	return d->bootindex;
}

static const struct prop net_props[] = {
	VIRTIO_PCI_PROPS(struct vnet),
	BOOTINDEX_PROP(struct vnet, bootindex),
	{ "netdev", PROP_NETDEV, offsetof(struct vnet, netdev), .help = "id of a -netdev" },
	{ "mac", PROP_MAC, offsetof(struct vnet, mac), .help = "hardware address" },
	{ "host_mtu", PROP_U16, offsetof(struct vnet, mtu), 0, .help = "MTU told to the guest, 0: none" },
	{ "mtu", PROP_U16, offsetof(struct vnet, mtu), 0, .help = "as host_mtu" },
	{ "rx_queue_size", PROP_U32, offsetof(struct vnet, rx_size), 256, .min = 64, .max = 1024, .help = "descriptors" },
	{ "tx_queue_size", PROP_U32, offsetof(struct vnet, tx_size), 256, .min = 64, .max = 1024, .help = "descriptors" },
	{ "mq", PROP_BOOL, offsetof(struct vnet, mq), 0, .help = "off" },
	{ "mrg_rxbuf", PROP_BOOL, offsetof(struct vnet, mrg_rxbuf), 1, .help = "offer merged receive buffers" },
	{ "ctrl_vq", PROP_BOOL, offsetof(struct vnet, ctrl_vq), 1, .help = "offer the control queue" },
	{ "status", PROP_BOOL, offsetof(struct vnet, status), 1, .help = "offer link status" },
	{ NULL }
};

const struct device_class virtio_net_pci_class = {
	.name = "virtio-net-pci", .aliases = (const char *const[]){ "virtio-net", NULL },
	.desc = "virtio network card", .bus = "PCI", .props = net_props, .size = sizeof(struct vnet),
	.create = net_create, .destroy = net_destroy, .reset = virtio_pci_dev_reset, .pause = net_pause,
	.boot = net_boot,
};
