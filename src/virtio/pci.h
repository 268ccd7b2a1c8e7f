/*
 * virtio over PCI (virtio 1.2, 4.1), modern only: what every virtio-*-pci device struct starts with.
 *
 * BAR 4 holds, a page each: common configuration, ISR, device configuration, notifications.
 * BAR 1 holds the MSI-X table.
 */
#ifndef VIRTIO_PCI_H
#define VIRTIO_PCI_H

#include "pci/pci.h"
#include "virtio/vdev.h"

struct virtio_pci {
	struct device dev;              /* first */
	struct virtio_dev v;
	struct pci_device pci;
	unsigned pci_cfg_cap;
	uint32_t dev_select, drv_select;
	uint16_t queue_select;
	bool added;
	/* properties */
	int32_t addr;
	uint32_t vectors, rombar;
	char *romfile;
	int disable_legacy;
	bool disable_modern, packed, event_idx, indirect, multifunction, queue_reset;
};

extern const char *const virtio_on_off_auto[];

/* For devices that firmware can boot from; `field` is an int32_t. */
#define BOOTINDEX_PROP(type, field) \
	{ "bootindex", PROP_BOOTINDEX, offsetof(type, field), .help = "place in the boot order that firmware reads (fw_cfg file bootorder)" }

#define VIRTIO_PCI_PROPS(type) \
	{ "addr", PROP_PCI_ADDR, offsetof(type, vp.addr), (uint64_t)-1, .help = "slot[.function]" }, \
	{ "vectors", PROP_U32, offsetof(type, vp.vectors), UINT32_MAX, .help = "MSI-X vectors, 0 for none" }, \
	{ "disable-legacy", PROP_ENUM, offsetof(type, vp.disable_legacy), .dflt_str = "auto", \
	  .values = virtio_on_off_auto, .help = "legacy is not offered: on or auto" }, \
	{ "disable-modern", PROP_BOOL, offsetof(type, vp.disable_modern), 0, .help = "off" }, \
	{ "packed", PROP_BOOL, offsetof(type, vp.packed), 0, .help = "offer packed rings" }, \
	{ "event_idx", PROP_BOOL, offsetof(type, vp.event_idx), 1, .help = "offer event index" }, \
	{ "indirect_desc", PROP_BOOL, offsetof(type, vp.indirect), 1, .help = "offer indirect descriptors" }, \
	{ "queue_reset", PROP_BOOL, offsetof(type, vp.queue_reset), 1, .help = "offer reset of single queues" }, \
	{ "multifunction", PROP_BOOL, offsetof(type, vp.multifunction), 0, .help = "other functions may stand in this slot" }, \
	{ "romfile", PROP_STR, offsetof(type, vp.romfile), .help = "empty: there are no option ROMs" }, \
	{ "rombar", PROP_U32, offsetof(type, vp.rombar), 1, .max = 1, .help = "whether romfile shows up as a BAR" }

struct virtio_pci_config {
	const struct virtio_ops *ops;
	uint16_t type;                  /* virtio device type */
	uint8_t class_code, subclass;
	unsigned n_queues, queue_size, vectors;
	uint64_t features;
	unsigned config_len;
};
/* Sets up the device and its config space; not yet on the bus. */
int virtio_pci_init(struct virtio_pci *p, const struct virtio_pci_config *c, struct err *err);
/* Put it on the bus, when the device is ready for its guest. */
int virtio_pci_plug(struct virtio_pci *p, struct err *err);
/* Off the bus, reset; then the device detaches its back end and calls virtio_pci_destroy(). */
void virtio_pci_unplug(struct virtio_pci *p);
void virtio_pci_destroy(struct virtio_pci *p);

void virtio_pci_dev_reset(struct device *d);
void virtio_pci_dev_pause(struct device *d, bool paused);

#endif
