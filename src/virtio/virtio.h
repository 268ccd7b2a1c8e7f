/* The virtio devices, as the one table of classes in `board` lists them. */
#ifndef VIRTIO_VIRTIO_H
#define VIRTIO_VIRTIO_H

#include "core/device.h"

extern const struct device_class virtio_blk_pci_class, virtio_net_pci_class, virtio_rng_pci_class;
/* The serial device provides "virtio-serial-bus"; the two port classes plug into it (device.parent). */
extern const struct device_class virtio_serial_pci_class, virtconsole_class, virtserialport_class;

/* A host adapter provides "SCSI"; disks and CD drives plug into it. */
extern const struct device_class virtio_scsi_pci_class, scsi_hd_class, scsi_cd_class;

#endif
