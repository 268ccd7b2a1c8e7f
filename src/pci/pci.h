/*
 * PCI: config space, BARs, capabilities, MSI-X, one root bus with ECAM (bridges later).
 *
 * A PCI device embeds `struct pci_device`; its config space is emulated here, the device only sees
 * its BAR windows and the hooks. All guest values are masked by per-byte write masks.
 */
#ifndef PCI_PCI_H
#define PCI_PCI_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "core/device.h"
#include "core/io.h"
#include "core/irq.h"

#define PCI_CFG_SIZE 4096

struct pci_bus;
struct pci_device;

struct pci_ids { uint16_t vendor, device, subvendor, subdevice; uint8_t class_code, subclass, prog_if, revision; };

struct pci_bar {
	struct io_window win;           /* ops and opaque set by the device */
	uint64_t size;
	bool io, is64, prefetch;
};

struct msix_state;

struct pci_device {
	struct pci_bus *bus;
	int devfn;
	const char *name;
	pthread_mutex_t *lock;          /* the device's; config hooks run with it held */
	uint8_t cfg[PCI_CFG_SIZE], wmask[PCI_CFG_SIZE], w1cmask[PCI_CFG_SIZE];
	struct pci_bar bar[6];
	struct msix_state *msix;
	int intx_level;                 /* what the device asked for */
	int intx_driven;                /* what reaches the line: intx_level unless disabled */
	int intx_slot;                  /* bus's shared line, -1: no INTx */
	bool multifunction;             /* set before pci_device_add(): functions 1 to 7 of the slot may be there */
	unsigned cap_next;              /* where the next capability goes */
	/* After a config write took effect; may be NULL. */
	void (*cfg_written)(struct pci_device *p, unsigned off, unsigned len);
	/* A config read is about to happen; may be NULL (virtio's pci-cfg window). */
	void (*cfg_reading)(struct pci_device *p, unsigned off, unsigned len);
	void *opaque;
};

struct pci_bus_config {
	struct io_space *ports, *mmio;
	struct msi_sink msi;
	uint64_t ecam_base;                     /* 0: none */
	uint64_t mmio32_base, mmio32_size, mmio64_base, mmio64_size;
	/* INTx pin 0..3 of a device number to a line of the interrupt controller. Devices that share a line
	 * (equal opaque and n) are combined here: it is high while one of them asserts it. */
	struct irq_line (*route_intx)(void *opaque, int dev, int pin);
	/* Byte accesses to port 0xcf9, which lies inside the address register's dword; may be NULL. */
	uint8_t (*rst_read)(void *opaque);
	void (*rst_write)(void *opaque, uint8_t val);
	void *opaque;
};
int pci_bus_create(struct pci_bus **out, const struct pci_bus_config *c, struct err *err);
void pci_bus_destroy(struct pci_bus *b);
void pci_bus_reset(struct pci_bus *b);
/* Give every BAR of every device an address and enable decoding (no firmware does it on direct boot). */
int pci_bus_assign(struct pci_bus *b, struct err *err);

void pci_device_init(struct pci_device *p, const char *name, const struct pci_ids *ids, pthread_mutex_t *lock);
/*
 * devfn -1: first free slot. -EBUSY names the device that sits there. -EINVAL: function 0 of the slot is not multifunction, so
 * that a guest would not look for another.
 */
int pci_device_add(struct pci_bus *b, struct pci_device *p, int devfn, struct err *err);
void pci_device_remove(struct pci_device *p);
void pci_device_reset(struct pci_device *p);

/* Before pci_device_add(). `size` is a power of two. */
void pci_bar_init(struct pci_device *p, int n, uint64_t size, bool io, bool is64, bool prefetch,
		  const char *name, const struct io_ops *ops, void *opaque);
/* Append a capability of `len` bytes (header included); returns its offset. */
unsigned pci_add_cap(struct pci_device *p, uint8_t id, unsigned len);
/*
 * PCI Express capability (PCIe 3.0, 7.8), 60 bytes; `type` is the device/port type: 9 for an endpoint
 * integrated in the root complex. Makes the extended config space visible to the guest.
 */
unsigned pci_add_express_cap(struct pci_device *p, unsigned type);
void pci_set_intx_pin(struct pci_device *p, int pin);           /* 0..3; devices without it use MSI-X only */

/* Legacy interrupt: honours the disable bit. */
void pci_set_intx(struct pci_device *p, int level);

/* MSI-X table and PBA in `bar` at the given offsets; creates or shares that BAR. */
int msix_init(struct pci_device *p, unsigned vectors, int bar, uint32_t table_off, uint32_t pba_off, struct err *err);
void msix_free(struct pci_device *p);
bool msix_enabled(const struct pci_device *p);
/* Send or, when masked, mark pending. Out of range vectors are dropped. Any thread; the device's lock held. */
void msix_notify(struct pci_device *p, unsigned vector);
unsigned msix_vectors(const struct pci_device *p);
/* A BAR set up before msix_init() keeps its ops for the offsets that table and PBA do not cover. */

/* Config space as the guest sees it; what the 0xcf8 mechanism and ECAM use. Takes bus and device lock. */
uint32_t pci_config_read(struct pci_bus *b, unsigned devfn, unsigned off, unsigned len);
void pci_config_write(struct pci_bus *b, unsigned devfn, unsigned off, uint32_t val, unsigned len);
/* NULL: nothing there. */
struct pci_device *pci_bus_device(struct pci_bus *b, unsigned devfn);
/* Where BAR n decodes now, 0 when it does not. */
uint64_t pci_bar_addr(const struct pci_device *p, int n);

/* Open Firmware's path of the device ("/pci@i0cf8/scsi@3"); `name` is what it does there ("scsi", "ethernet"). */
void pci_fw_path(const struct pci_device *p, const char *name, char *buf, size_t len);

bool pci_bus_master(const struct pci_device *p);

#endif
