/* Between net.c (frames) and net_ctrl.c (control queue and receive filter). */
#ifndef VIRTIO_NET_PRIV_H
#define VIRTIO_NET_PRIV_H

#include "net/net.h"
#include "virtio/pci.h"

#define NET_MACS 64             /* addresses in a filter table */
#define NET_RX 0
#define NET_TX 1
#define NET_CTRL 2

struct net_macs { unsigned n; bool overflow; uint8_t mac[NET_MACS][6]; };

/* Receive filter (5.1.6.5.1 to 5.1.6.5.3). */
struct net_filter {
	bool promisc, allmulti, alluni, nomulti, nouni, nobcast;
	struct net_macs uni, multi;
	uint8_t mac[6];
	uint32_t vlan[4096 / 32];
};

struct vnet {
	struct virtio_pci vp;
	struct net_filter f;
	struct virtq_chain chain, ctrl, *rx;  /* tx | control | 128 for merged receive buffers */
	bool attached, link_up;
	uint64_t n_rx, n_tx, n_rx_dropped, n_tx_dropped, n_rx_full, n_tx_full;
	/* properties */
	struct net_backend *netdev;
	uint8_t mac[6];
	uint32_t rx_size, tx_size;
	uint16_t mtu;
	int32_t bootindex;
	bool mq, mrg_rxbuf, ctrl_vq, status;
};

void net_filter_reset(struct net_filter *f, const uint8_t mac[6]);
bool net_filter_pass(const struct net_filter *f, const uint8_t *frame, size_t len, bool vlan_filter);
/* Serve the control queue. */
void net_ctrl_kick(struct vnet *d);

#endif
