/* A device's config space, its place on the bus, its capabilities and its INTx line. */
#include <errno.h>
#include <stdio.h>

#include <linux/pci_regs.h>

#include "base/util.h"
#include "pci/internal.h"

void pci_dev_lock(struct pci_device *p)
{
	if (p->lock)
		pthread_mutex_lock(p->lock);
}

void pci_dev_unlock(struct pci_device *p)
{
	if (p->lock)
		pthread_mutex_unlock(p->lock);
}

void pci_device_init(struct pci_device *p, const char *name, const struct pci_ids *ids, pthread_mutex_t *lock)
{
	memset(p, 0, sizeof(*p));
	p->name = name;
	p->lock = lock;
	p->devfn = -1;
	p->intx_slot = -1;
	p->cap_next = 0x40;
	st_le16(p->cfg + PCI_VENDOR_ID, ids->vendor);
	st_le16(p->cfg + PCI_DEVICE_ID, ids->device);
	p->cfg[PCI_REVISION_ID] = ids->revision;
	p->cfg[PCI_CLASS_PROG] = ids->prog_if;
	p->cfg[PCI_CLASS_DEVICE] = ids->subclass;
	p->cfg[PCI_CLASS_DEVICE + 1] = ids->class_code;
	st_le16(p->cfg + PCI_SUBSYSTEM_VENDOR_ID, ids->subvendor);
	st_le16(p->cfg + PCI_SUBSYSTEM_ID, ids->subdevice);
	st_le16(p->wmask + PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER |
		PCI_COMMAND_PARITY | PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE);
	st_le16(p->w1cmask + PCI_STATUS, 0xf900);
	p->wmask[PCI_CACHE_LINE_SIZE] = 0xff;
	p->wmask[PCI_LATENCY_TIMER] = 0xff;
	p->wmask[PCI_INTERRUPT_LINE] = 0xff;
}

/* The shared line's slot in the bus, found by identity so that sharers are counted together. */
static int intx_slot(struct pci_bus *b, int dev, int pin)
{
	struct irq_line l;
	int i;

	if (!b->cfg.route_intx)
		return -1;
	l = b->cfg.route_intx(b->cfg.opaque, dev, pin);
	if (!l.set)
		return -1;
	for (i = 0; i < b->n_intx; i++)
		if (b->intx[i].line.opaque == l.opaque && b->intx[i].line.n == l.n && b->intx[i].line.set == l.set)
			return i;
	if (i == PCI_INTX_LINES)
		return -1;
	b->intx[i] = (struct intx_line){ .line = l };
	b->n_intx = i + 1;
	return i;
}

static int pick_devfn(struct pci_bus *b, struct pci_device *p, int devfn, struct err *err)
{
	if (devfn > 255)
		return err_set(err, -ERANGE, "%s: PCI address %d.%d does not exist", p->name, devfn >> 3, devfn & 7);
	if (devfn >= 0 && b->dev[devfn])
		return err_set(err, -EBUSY, "%s: PCI slot %d function %d is taken by %s", p->name, devfn >> 3,
			       devfn & 7, b->dev[devfn]->name);
	if (devfn >= 0)
		return devfn;
	for (int dev = 0; dev < 32; dev++) {
		bool used = false;

		for (int fn = 0; fn < 8; fn++)
			used |= b->dev[dev * 8 + fn] != NULL;
		if (!used)
			return dev * 8;
	}
	return err_set(err, -ENOSPC, "%s: no free PCI slot", p->name);
}

/*
 * Header type bit 7 of function 0 tells the guest to look at the others (PCI 3.0, 6.2.1). Functions may come in any order, and
 * before the one that says so, as with QEMU.
 */
static int check_functions(struct pci_bus *b, struct pci_device *p, int devfn, struct err *err)
{
	struct pci_device *f0 = b->dev[devfn & ~7];

	if (devfn & 7) {
		if (!f0 || f0->multifunction)
			return 0;
		return err_set(err, -EINVAL, "%s: PCI slot %x has a device without multifunction=on (%s), so function %x.%x would not be seen",
			       p->name, devfn >> 3, f0->name, devfn >> 3, devfn & 7);
	}
	for (int fn = 1; fn < 8 && !p->multifunction; fn++)
		if (b->dev[devfn | fn])
			return err_set(err, -EINVAL, "%s: PCI slot %x has function %x.%x (%s), so function 0 needs multifunction=on", p->name,
				       devfn >> 3, devfn >> 3, fn, b->dev[devfn | fn]->name);
	return 0;
}

int pci_device_add(struct pci_bus *b, struct pci_device *p, int devfn, struct err *err)
{
	int pin = p->cfg[PCI_INTERRUPT_PIN];

	pthread_mutex_lock(&b->lock);
	devfn = pick_devfn(b, p, devfn, err);
	if (devfn >= 0) {
		int r = check_functions(b, p, devfn, err);

		devfn = r ? r : devfn;
	}
	if (devfn >= 0) {
		p->bus = b;
		p->devfn = devfn;
		p->intx_slot = pin ? intx_slot(b, devfn >> 3, pin - 1) : -1;
		b->dev[devfn] = p;
		p->cfg[PCI_HEADER_TYPE] = (p->cfg[PCI_HEADER_TYPE] & 0x7f) | (p->multifunction ? 0x80 : 0);
	}
	pthread_mutex_unlock(&b->lock);
	return devfn < 0 ? devfn : 0;
}

void pci_device_remove(struct pci_device *p)
{
	struct pci_bus *b = p->bus;

	if (!b)
		return;
	pthread_mutex_lock(&b->lock);
	pci_dev_lock(p);
	pci_set_intx(p, 0);
	pci_dev_unlock(p);
	pci_bars_unmap(p);
	b->dev[p->devfn] = NULL;
	pthread_mutex_unlock(&b->lock);
	p->bus = NULL;
}

struct pci_device *pci_bus_device(struct pci_bus *b, unsigned devfn)
{
	return devfn < 256 ? b->dev[devfn] : NULL;
}

static void device_reset(struct pci_device *p)
{
	pci_dev_lock(p);
	p->intx_level = 0;
	st_le16(p->cfg + PCI_COMMAND, ld_le16(p->cfg + PCI_COMMAND) & ~ld_le16(p->wmask + PCI_COMMAND));
	pci_intx_update(p);
	p->cfg[PCI_CACHE_LINE_SIZE] = 0;
	p->cfg[PCI_LATENCY_TIMER] = 0;
	p->cfg[PCI_INTERRUPT_LINE] = 0;
	pci_bars_reset(p);
	msix_reset(p);
	pci_dev_unlock(p);
	pci_bars_update(p);
}

void pci_device_reset(struct pci_device *p)
{
	struct pci_bus *b = p->bus;

	if (!b)
		return;
	pthread_mutex_lock(&b->lock);
	device_reset(p);
	pthread_mutex_unlock(&b->lock);
}

void pci_bus_reset(struct pci_bus *b)
{
	pthread_mutex_lock(&b->lock);
	b->addr = 0;
	for (unsigned i = 0; i < 256; i++)
		if (b->dev[i])
			device_reset(b->dev[i]);
	pthread_mutex_unlock(&b->lock);
}

/* Capabilities are laid out upwards from 0x40, dword aligned, newest first in the list. */
unsigned pci_add_cap(struct pci_device *p, uint8_t id, unsigned len)
{
	unsigned off = p->cap_next;

	if (range_bad(off, len, 256))
		return 0;
	p->cap_next = ALIGN_UP(off + len, 4u);
	p->cfg[off] = id;
	p->cfg[off + 1] = p->cfg[PCI_CAPABILITY_LIST];
	p->cfg[PCI_CAPABILITY_LIST] = off;
	p->cfg[PCI_STATUS] |= PCI_STATUS_CAP_LIST;
	return off;
}

unsigned pci_add_express_cap(struct pci_device *p, unsigned type)
{
	unsigned off = pci_add_cap(p, PCI_CAP_ID_EXP, 0x3c);

	if (!off)
		return 0;
	st_le16(p->cfg + off + PCI_EXP_FLAGS, 2 | (type & 0xf) << 4);
	st_le32(p->cfg + off + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_RBER);
	st_le16(p->wmask + off + PCI_EXP_DEVCTL, 0x78ff & ~PCI_EXP_DEVCTL_EXT_TAG);
	st_le16(p->w1cmask + off + PCI_EXP_DEVSTA, 0x000f);
	return off;
}

void pci_set_intx_pin(struct pci_device *p, int pin)
{
	p->cfg[PCI_INTERRUPT_PIN] = pin + 1;
}

void pci_intx_update(struct pci_device *p)
{
	bool off = ld_le16(p->cfg + PCI_COMMAND) & PCI_COMMAND_INTX_DISABLE;
	int level = p->intx_level && !off;
	struct pci_bus *b = p->bus;

	p->cfg[PCI_STATUS] = (p->cfg[PCI_STATUS] & ~PCI_STATUS_INTERRUPT) |
			     (p->intx_level ? PCI_STATUS_INTERRUPT : 0);
	if (!b || p->intx_slot < 0 || level == p->intx_driven)
		return;
	p->intx_driven = level;
	pthread_mutex_lock(&b->intx_lock);
	struct intx_line *l = &b->intx[p->intx_slot];

	l->asserted += level ? 1 : -1;
	if (l->asserted == (level ? 1 : 0))
		irq_set(l->line, level);
	pthread_mutex_unlock(&b->intx_lock);
}

void pci_set_intx(struct pci_device *p, int level)
{
	p->intx_level = !!level;
	pci_intx_update(p);
}

void pci_fw_path(const struct pci_device *p, const char *name, char *buf, size_t len)
{
	int n = snprintf(buf, len, "/pci@i0cf8/%s@%x", name, p->devfn >> 3);

	if (p->devfn & 7 && n > 0 && (size_t)n < len)
		snprintf(buf + n, len - n, ",%x", p->devfn & 7);
}

bool pci_bus_master(const struct pci_device *p)
{
	return p->cfg[PCI_COMMAND] & PCI_COMMAND_MASTER;
}
