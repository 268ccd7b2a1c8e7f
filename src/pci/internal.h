/* Between the files of this folder. */
#ifndef PCI_INTERNAL_H
#define PCI_INTERNAL_H

#include "pci/pci.h"

#define PCI_INTX_LINES 128

struct intx_line {
	struct irq_line line;
	int asserted;           /* devices driving it */
};

/*
 * Locks, outermost first: bus->lock (config accesses and mappings), a device's lock, intx_lock.
 * Windows are mapped and unmapped with the bus lock only: io_unmap() waits for handlers, and those
 * may be waiting for the device's lock.
 */
struct pci_bus {
	struct pci_bus_config cfg;
	pthread_mutex_t lock;
	pthread_mutex_t intx_lock;
	struct pci_device *dev[256];
	struct intx_line intx[PCI_INTX_LINES];
	int n_intx;
	uint32_t addr;                          /* 0xcf8 */
	struct io_window win_addr, win_data, win_ecam;
};

/* Bus lock held, device lock not held: make the windows follow the command register and BARs. */
void pci_bars_update(struct pci_device *p);
void pci_bars_unmap(struct pci_device *p);
void pci_bars_reset(struct pci_device *p);      /* both locks held */
void pci_intx_update(struct pci_device *p);
void pci_dev_lock(struct pci_device *p);
void pci_dev_unlock(struct pci_device *p);

/* Device lock held. */
void msix_cfg_written(struct pci_device *p, unsigned off, unsigned len);
void msix_reset(struct pci_device *p);

#endif
