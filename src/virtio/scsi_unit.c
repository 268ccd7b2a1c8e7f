/* Logical units as devices: scsi-hd and scsi-cd. */
#include <errno.h>
#include <stdio.h>

#include <linux/virtio_scsi.h>

#include "base/util.h"
#include "virtio/pci.h"
#include "virtio/scsi.h"
#include "virtio/virtio.h"

static bool pow2_between(uint64_t v, uint64_t lo, uint64_t hi)
{
	return v >= lo && v <= hi && !(v & (v - 1));
}

static int unit_check(struct scsi_unit *u, struct err *err)
{
	const char *n = u->dev.cls->name;
	unsigned needs = u->drive ? block_size(u->drive) : 512;

	u->cd = u->dev.cls == &scsi_cd_class;
	if (!u->drive && !u->cd)
		return err_set(err, -EINVAL, "%s: drive property not set", n);
	u->block_size = (uint32_t)(u->cd ? 2048 : u->lbs ? MIN(u->lbs, (uint64_t)1 << 20) : needs);
	if (!pow2_between(u->block_size, 512, 32768) || (u->pbs && !pow2_between(u->pbs, 512, 1 << 21)))
		return err_set(err, -EINVAL, "%s: block sizes must be powers of two, at least 512", n);
	if (u->block_size < needs)
		return err_set(err, -EINVAL, "%s: blocks of %u bytes, but %s needs %u", n, u->block_size, block_name(u->drive), needs);
	u->wce = u->drive && (u->write_cache ? u->write_cache == 1 : block_write_cache(u->drive));
	return 0;
}

/* Any thread. */
static void unit_resized(void *opaque)
{
	struct scsi_unit *u = opaque;
	struct virtio_dev *v = scsi_vdev(u->hba);

	pthread_mutex_lock(&v->lock);
	u->unit_attention = u->cd ? SENSE_UA_MEDIUM_CHANGED : SENSE_UA_CAPACITY;
	if (virtio_has(v, VIRTIO_SCSI_F_CHANGE))
		scsi_event(u->hba, u, VIRTIO_SCSI_T_PARAM_CHANGE, u->cd ? 0x28 : 0x2a | 0x09 << 8);
	pthread_mutex_unlock(&v->lock);
}

static int unit_create(struct device *d, struct err *err)
{
	struct scsi_unit *u = container_of(d, struct scsi_unit, dev);
	int r = unit_check(u, err);

	if (r)
		return r;
	u->hba = scsi_hba_of(d->parent);
	if (u->drive)
		r = block_attach(u->drive, d->id ? d->id : d->cls->name, err);
	if (r)
		return r;
	u->attached = u->drive;
	if (u->drive)
		block_listen(u->drive, &(struct block_listener){ unit_resized, u });
	r = scsi_plug(u->hba, u, err);
	if (r && u->drive) {
		block_listen(u->drive, NULL);
		block_detach(u->drive);
	}
	return r;
}

static void unit_destroy(struct device *d)
{
	struct scsi_unit *u = container_of(d, struct scsi_unit, dev);

	if (u->drive)
		block_listen(u->drive, NULL);
	scsi_unplug(u->hba, u);
	if (u->drive)
		block_detach(u->drive);
}

/* The power comes back: the tray is shut. */
static void unit_reset(struct device *d)
{
	struct scsi_unit *u = container_of(d, struct scsi_unit, dev);

	pthread_mutex_lock(&scsi_vdev(u->hba)->lock);
	u->tray_open = u->locked = u->stopped = u->media_event = false;
	u->unit_attention = 0;
	pthread_mutex_unlock(&scsi_vdev(u->hba)->lock);
}

static int32_t unit_boot(struct device *d, char *path, size_t len)
{
	struct scsi_unit *u = container_of(d, struct scsi_unit, dev);
	char bus[64];

	pci_fw_path(scsi_pci(u->hba), "scsi", bus, sizeof(bus));
	snprintf(path, len, "%s/channel@0/disk@%x,%x", bus, u->target, u->lun);
	return u->bootindex;
}

#define UNIT_PROPS(may_be_empty) \
	{ "drive", PROP_DRIVE, offsetof(struct scsi_unit, drive), may_be_empty, .help = "id of a -drive or -blockdev" }, \
	{ "scsi-id", PROP_U32, offsetof(struct scsi_unit, target), UINT32_MAX, .help = "target; the next free one" }, \
	{ "lun", PROP_U32, offsetof(struct scsi_unit, lun), 0, .max = SCSI_MAX_LUN, .help = "logical unit of the target" }, \
	{ "channel", PROP_U32, offsetof(struct scsi_unit, channel), 0, .help = "0" }, \
	{ "serial", PROP_STR, offsetof(struct scsi_unit, serial), .help = "serial number, 36 characters" }, \
	{ "device_id", PROP_STR, offsetof(struct scsi_unit, device_id), .help = "name in the identification page; the serial number" }, \
	{ "vendor", PROP_STR, offsetof(struct scsi_unit, vendor), .help = "8 characters" }, \
	{ "product", PROP_STR, offsetof(struct scsi_unit, product), .help = "16 characters" }, \
	{ "ver", PROP_STR, offsetof(struct scsi_unit, ver), .help = "4 characters" }, \
	{ "wwn", PROP_U64, offsetof(struct scsi_unit, wwn), 0, .help = "world wide name" }, \
	BOOTINDEX_PROP(struct scsi_unit, bootindex), \
	{ "write-cache", PROP_ENUM, offsetof(struct scsi_unit, write_cache), .dflt_str = "auto", .values = virtio_on_off_auto, \
	  .help = "offer a volatile write cache" }, \
	IO_ERROR_PROPS(struct scsi_unit)

static const struct prop hd_props[] = {
	UNIT_PROPS(0),
	{ "logical_block_size", PROP_SIZE, offsetof(struct scsi_unit, lbs), 0, .help = "0: the image's" },
	{ "physical_block_size", PROP_SIZE, offsetof(struct scsi_unit, pbs), 0, .help = "0: as logical" },
	{ "rotation_rate", PROP_U32, offsetof(struct scsi_unit, rotation_rate), 0, .max = 65534, .help = "1: a solid state disk, 0: not told" },
	{ "removable", PROP_BOOL, offsetof(struct scsi_unit, removable), 0, .help = "a removable medium" },
	{ "dpofua", PROP_BOOL, offsetof(struct scsi_unit, dpofua), 1, .help = "offer writes past the cache" },
	{ NULL }
};
static const struct prop cd_props[] = { UNIT_PROPS(1), { NULL } };

const struct device_class scsi_hd_class = {
	.name = "scsi-hd", .desc = "SCSI disk", .bus = "SCSI", .props = hd_props, .size = sizeof(struct scsi_unit),
	.create = unit_create, .destroy = unit_destroy, .reset = unit_reset, .boot = unit_boot,
};
const struct device_class scsi_cd_class = {
	.name = "scsi-cd", .desc = "SCSI CD drive, empty without drive=", .bus = "SCSI", .props = cd_props, .size = sizeof(struct scsi_unit),
	.create = unit_create, .destroy = unit_destroy, .reset = unit_reset, .boot = unit_boot,
};
