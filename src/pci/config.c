/*
 * How a guest reaches config space: mechanism #1 at ports 0xcf8-0xcff (PCI 3.0, 3.2.2.3.2) and the
 * memory window of PCI Express (ECAM, PCIe 3.0, 7.2.2).
 */
#include <errno.h>
#include <stdlib.h>

#include <linux/pci_regs.h>

#include "base/util.h"
#include "pci/internal.h"

static uint32_t all_ones(unsigned len)
{
	return len >= 4 ? UINT32_MAX : (1u << (len * 8)) - 1;
}

static uint32_t config_read(struct pci_bus *b, unsigned devfn, unsigned off, unsigned len)
{
	struct pci_device *p = devfn < 256 ? b->dev[devfn] : NULL;
	uint32_t v = 0;

	if (!p || len > 4 || range_bad(off, len, PCI_CFG_SIZE))
		return all_ones(len);
	pci_dev_lock(p);
	if (p->cfg_reading)
		p->cfg_reading(p, off, len);
	memcpy(&v, p->cfg + off, len);
	pci_dev_unlock(p);
	return v;
}

static void config_write(struct pci_bus *b, unsigned devfn, unsigned off, uint32_t val, unsigned len)
{
	struct pci_device *p = devfn < 256 ? b->dev[devfn] : NULL;

	if (!p || len > 4 || range_bad(off, len, PCI_CFG_SIZE))
		return;
	pci_dev_lock(p);
	for (unsigned i = 0; i < len; i++, val >>= 8) {
		uint8_t *c = &p->cfg[off + i], w = p->wmask[off + i];

		*c = (*c & ~w) | (val & w);
		*c &= ~(val & p->w1cmask[off + i]);
	}
	pci_intx_update(p);
	msix_cfg_written(p, off, len);
	if (p->cfg_written)
		p->cfg_written(p, off, len);
	pci_dev_unlock(p);
	if (ranges_overlap(off, len, PCI_COMMAND, 2) || ranges_overlap(off, len, PCI_BASE_ADDRESS_0, 24))
		pci_bars_update(p);
}

uint32_t pci_config_read(struct pci_bus *b, unsigned devfn, unsigned off, unsigned len)
{
	pthread_mutex_lock(&b->lock);
	uint32_t v = config_read(b, devfn, off, len);
	pthread_mutex_unlock(&b->lock);
	return v;
}

void pci_config_write(struct pci_bus *b, unsigned devfn, unsigned off, uint32_t val, unsigned len)
{
	pthread_mutex_lock(&b->lock);
	config_write(b, devfn, off, val, len);
	pthread_mutex_unlock(&b->lock);
}

/* The address register takes dword accesses only; 0xcf9 as a byte is the reset control register. */
static uint64_t addr_read(void *opaque, uint64_t off, unsigned size)
{
	struct pci_bus *b = opaque;

	if (size == 4 && off == 0)
		return b->addr;
	if (size == 1 && off == 1 && b->cfg.rst_read)
		return b->cfg.rst_read(b->cfg.opaque);
	return all_ones(size);
}

static void addr_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct pci_bus *b = opaque;

	if (size == 4 && off == 0)
		b->addr = val & 0x80fffffc;
	else if (size == 1 && off == 1 && b->cfg.rst_write)
		b->cfg.rst_write(b->cfg.opaque, val);
}

static bool addr_selects(const struct pci_bus *b)
{
	return (b->addr & 0x80000000) && !(b->addr & 0x00ff0000);       /* enabled, bus 0 */
}

static uint64_t data_read(void *opaque, uint64_t off, unsigned size)
{
	struct pci_bus *b = opaque;

	if (!addr_selects(b))
		return all_ones(size);
	return config_read(b, (b->addr >> 8) & 0xff, (b->addr & 0xfc) + off, size);
}

static void data_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct pci_bus *b = opaque;

	if (addr_selects(b))
		config_write(b, (b->addr >> 8) & 0xff, (b->addr & 0xfc) + off, val, size);
}

/* Offset bits: 27:20 bus, 19:12 device and function, 11:0 register. Only bus 0 is populated. */
static uint64_t ecam_read(void *opaque, uint64_t off, unsigned size)
{
	struct pci_bus *b = opaque;

	if (off >> 20 || (off & 0xfff) + size > PCI_CFG_SIZE)
		return all_ones(size);
	return config_read(b, off >> 12, off & 0xfff, size);
}

static void ecam_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct pci_bus *b = opaque;

	if (off >> 20 == 0 && (off & 0xfff) + size <= PCI_CFG_SIZE)
		config_write(b, off >> 12, off & 0xfff, val, size);
}

static const struct io_ops addr_ops = { addr_read, addr_write, 1, 4 };
static const struct io_ops data_ops = { data_read, data_write, 1, 4 };
static const struct io_ops ecam_ops = { ecam_read, ecam_write, 1, 4 };

static void window_init(struct pci_bus *b, struct io_window *w, const char *name, const struct io_ops *ops,
			uint64_t size)
{
	*w = (struct io_window){ .name = name, .ops = ops, .opaque = b, .lock = &b->lock, .size = size, .priority = 2 };
}

int pci_bus_create(struct pci_bus **out, const struct pci_bus_config *c, struct err *err)
{
	struct pci_bus *b = calloc(1, sizeof(*b));
	int r;

	if (!b)
		return err_set(err, -ENOMEM, "no memory for the PCI bus");
	b->cfg = *c;
	pthread_mutex_init(&b->lock, NULL);
	pthread_mutex_init(&b->intx_lock, NULL);
	window_init(b, &b->win_addr, "pci-config-address", &addr_ops, 4);
	window_init(b, &b->win_data, "pci-config-data", &data_ops, 4);
	window_init(b, &b->win_ecam, "pci-ecam", &ecam_ops, 256u << 20);
	r = io_map(c->ports, &b->win_addr, 0xcf8, err);
	if (!r)
		r = io_map(c->ports, &b->win_data, 0xcfc, err);
	if (!r && c->ecam_base)
		r = io_map(c->mmio, &b->win_ecam, c->ecam_base, err);
	if (r) {
		pci_bus_destroy(b);
		return r;
	}
	*out = b;
	return 0;
}

void pci_bus_destroy(struct pci_bus *b)
{
	if (!b)
		return;
	if (b->win_addr.mapped)
		io_unmap(b->cfg.ports, &b->win_addr);
	if (b->win_data.mapped)
		io_unmap(b->cfg.ports, &b->win_data);
	if (b->win_ecam.mapped)
		io_unmap(b->cfg.mmio, &b->win_ecam);
	pthread_mutex_destroy(&b->lock);
	pthread_mutex_destroy(&b->intx_lock);
	free(b);
}
