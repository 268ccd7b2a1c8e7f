/* The one table of device classes. */
#include <string.h>

#include "base/util.h"
#include "board/machine.h"
#include "dev/dev.h"
#if __has_include("virtio/virtio.h")
#include "virtio/virtio.h"
#endif

static const struct device_class *const classes[] = {
#if __has_include("virtio/virtio.h")
	&virtio_blk_pci_class,
	&virtio_scsi_pci_class,
	&scsi_hd_class,
	&scsi_cd_class,
	&virtio_net_pci_class,
	&virtio_serial_pci_class,
	&virtconsole_class,
	&virtserialport_class,
	&virtio_rng_pci_class,
#endif
	&isa_serial_class,
	&isa_debug_exit_class,
	&isa_debugcon_class,
	&pc_testdev_class,
};

const struct device_class *device_class_at(unsigned i)
{
	return i < ARRAY_SIZE(classes) ? classes[i] : NULL;
}

const struct device_class *device_class_find(const char *name)
{
	for (unsigned i = 0; i < ARRAY_SIZE(classes); i++) {
		if (!strcmp(classes[i]->name, name))
			return classes[i];
		for (const char *const *a = classes[i]->aliases; a && *a; a++)
			if (!strcmp(*a, name))
				return classes[i];
	}
	return NULL;
}
