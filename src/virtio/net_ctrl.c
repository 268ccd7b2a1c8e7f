/* Control queue and receive filter of the network device (virtio 1.2, 5.1.6.5). */
#include <linux/virtio_net.h>

#include "base/util.h"
#include "virtio/net_priv.h"

void net_filter_reset(struct net_filter *f, const uint8_t mac[6])
{
	memset(f, 0, sizeof(*f));
	f->promisc = true;
	memcpy(f->mac, mac, 6);
	memset(f->vlan, 0xff, sizeof(f->vlan));
}

static bool mac_in(const struct net_macs *t, const uint8_t *mac)
{
	if (t->overflow)
		return true;
	for (unsigned i = 0; i < t->n; i++)
		if (!memcmp(t->mac[i], mac, 6))
			return true;
	return false;
}

static bool vlan_pass(const struct net_filter *f, const uint8_t *frame, size_t len)
{
	unsigned id;

	if (len < 16 || frame[12] != 0x81 || frame[13] != 0)
		return true;
	id = (frame[14] << 8 | frame[15]) & 0xfff;
	return f->vlan[id / 32] >> (id % 32) & 1;
}

bool net_filter_pass(const struct net_filter *f, const uint8_t *frame, size_t len, bool vlan_filter)
{
	static const uint8_t bcast[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };

	if (len < 14)
		return false;
	if (f->promisc)
		return true;
	if (vlan_filter && !vlan_pass(f, frame, len))
		return false;
	if (!memcmp(frame, bcast, 6))
		return !f->nobcast;
	if (frame[0] & 1)
		return !f->nomulti && (f->allmulti || mac_in(&f->multi, frame));
	return !f->nouni && (f->alluni || !memcmp(frame, f->mac, 6) || mac_in(&f->uni, frame));
}

/* Everything behind the two command bytes. */
struct cmd { const struct virtq_chain *c; size_t off, len; };

static bool take(struct cmd *m, void *buf, size_t n)
{
	if (m->len < n || iov_to_buf(m->c->out, m->c->n_out, m->off, buf, n) != n)
		return false;
	m->off += n;
	m->len -= n;
	return true;
}

static bool rx_mode(struct net_filter *f, uint8_t cmd, struct cmd *m)
{
	bool *flag[] = { &f->promisc, &f->allmulti, &f->alluni, &f->nomulti, &f->nouni, &f->nobcast };
	uint8_t on;

	if (cmd >= ARRAY_SIZE(flag) || !take(m, &on, 1) || m->len)
		return false;
	*flag[cmd] = on != 0;
	return true;
}

static bool mac_table(struct net_macs *t, struct cmd *m)
{
	uint32_t n;

	if (!take(m, &n, 4) || n > m->len / 6)
		return false;
	memset(t, 0, sizeof(*t));
	t->overflow = n > NET_MACS;
	t->n = t->overflow ? 0 : n;
	for (unsigned i = 0; i < t->n; i++)
		if (!take(m, t->mac[i], 6))
			return false;
	if (t->overflow) {
		m->off += 6ul * n;
		m->len -= 6ul * n;
	}
	return true;
}

static bool mac_cmd(struct vnet *d, uint8_t cmd, struct cmd *m)
{
	struct net_macs uni, multi;
	uint8_t mac[6];

	if (cmd == VIRTIO_NET_CTRL_MAC_ADDR_SET) {
		if (!take(m, mac, 6) || m->len)
			return false;
		memcpy(d->f.mac, mac, 6);
		memcpy(d->vp.v.config, mac, 6);
		return true;
	}
	if (cmd != VIRTIO_NET_CTRL_MAC_TABLE_SET || !mac_table(&uni, m) || !mac_table(&multi, m) || m->len)
		return false;
	d->f.uni = uni;
	d->f.multi = multi;
	return true;
}

static bool vlan_cmd(struct net_filter *f, uint8_t cmd, struct cmd *m)
{
	uint16_t id;

	if (!take(m, &id, 2) || m->len || id >= 4096 || cmd > VIRTIO_NET_CTRL_VLAN_DEL)
		return false;
	if (cmd == VIRTIO_NET_CTRL_VLAN_ADD)
		f->vlan[id / 32] |= 1u << (id % 32);
	else
		f->vlan[id / 32] &= ~(1u << (id % 32));
	return true;
}

static bool command(struct vnet *d, const struct virtq_chain *c)
{
	struct cmd m = { c, 0, c->out_len };
	struct virtio_net_ctrl_hdr h;

	if (!take(&m, &h, sizeof(h)))
		return false;
	switch (h.class) {
	case VIRTIO_NET_CTRL_RX:
		return rx_mode(&d->f, h.cmd, &m);
	case VIRTIO_NET_CTRL_MAC:
		return mac_cmd(d, h.cmd, &m);
	case VIRTIO_NET_CTRL_VLAN:
		return virtio_has(&d->vp.v, VIRTIO_NET_F_CTRL_VLAN) && vlan_cmd(&d->f, h.cmd, &m);
	case VIRTIO_NET_CTRL_ANNOUNCE:
		if (h.cmd != VIRTIO_NET_CTRL_ANNOUNCE_ACK)
			return false;
		d->vp.v.config[offsetof(struct virtio_net_config, status)] &= ~VIRTIO_NET_S_ANNOUNCE;
		return true;
	}
	return false;
}

void net_ctrl_kick(struct vnet *d)
{
	struct virtio_dev *v = &d->vp.v;
	unsigned n = 0;

	while (n < VIRTIO_BUDGET && virtio_pop(v, NET_CTRL, &d->ctrl)) {
		uint8_t ack = command(d, &d->ctrl) ? VIRTIO_NET_OK : VIRTIO_NET_ERR;

		n++;
		if (!d->ctrl.n_in) {
			virtio_needs_reset(v);
			break;
		}
		iov_from_buf(d->ctrl.in, d->ctrl.n_in, 0, &ack, 1);
		virtq_push(virtio_vq(v, NET_CTRL), &d->ctrl, 1);
	}
	if (n)
		virtio_notify(v, NET_CTRL);
	if (n == VIRTIO_BUDGET)
		virtio_defer(v, NET_CTRL);
}
