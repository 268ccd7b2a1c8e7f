/*
 * Console device (virtio 1.2, 5.3): "virtio-serial-pci" is the bus, "virtconsole" and
 * "virtserialport" are ports on it, each with a character back end.
 *
 * Queues: 0 and 1 carry port 0 to and from the guest, 2 and 3 control messages, then two per port.
 */
#ifndef VIRTIO_SERIAL_H
#define VIRTIO_SERIAL_H

#include "chr/chr.h"
#include "virtio/pci.h"

#define SERIAL_MAX_PORTS 31
#define SERIAL_RX_CTRL 2
#define SERIAL_TX_CTRL 3

/* Control messages waiting for a guest buffer: one bit per kind, so they cannot pile up. */
enum { SAY_ADD = 1, SAY_CONSOLE = 2, SAY_RESIZE = 4, SAY_NAME = 8, SAY_OPEN = 16, SAY_REMOVE = 32 };

struct serial;

struct serial_port {
	struct device dev;              /* first */
	struct serial *bus;
	uint32_t say;
	bool attached, host_open, guest_open;
	/* A chain that the back end has taken only part of. */
	struct virtq_chain tx;
	bool tx_held, writable;
	size_t tx_off;
	struct virtq_chain rx;
	uint64_t n_dropped;
	/* properties */
	struct chardev *chardev;
	char *name;
	uint32_t nr;
	bool is_console;
};

struct serial {
	struct virtio_pci vp;
	struct serial_port *port[SERIAL_MAX_PORTS];
	uint32_t gone;                  /* ports to report as removed */
	struct virtq_chain ctrl_in, ctrl_out;
	/* properties */
	uint32_t max_ports;
	uint16_t cols, rows;
};

static inline unsigned serial_rx_queue(unsigned nr) { return nr ? nr * 2 + 2 : 0; }
static inline unsigned serial_tx_queue(unsigned nr) { return serial_rx_queue(nr) + 1; }

/* port.c; lock held. */
void serial_port_kick_tx(struct serial_port *p);
void serial_port_forget(struct serial_port *p);
/* Lock not held: tell the back end that the guest can take bytes. */
void serial_port_accept(struct serial_port *p);

/* serial.c; lock held. */
void serial_say(struct serial *s, struct serial_port *p, uint32_t what);
int serial_plug(struct serial *s, struct serial_port *p, struct err *err);
void serial_unplug(struct serial *s, struct serial_port *p);
bool serial_multiport(const struct serial *s);

#endif
