/* Base address registers: sizing, moving, and giving them addresses when no firmware does. */
#include <errno.h>
#include <stdlib.h>

#include <linux/pci_regs.h>

#include "base/log.h"
#include "base/util.h"
#include "pci/internal.h"

static unsigned bar_off(int n)
{
	return PCI_BASE_ADDRESS_0 + 4 * n;
}

static uint32_t bar_flags(const struct pci_bar *bar)
{
	if (bar->io)
		return PCI_BASE_ADDRESS_SPACE_IO;
	return (bar->is64 ? PCI_BASE_ADDRESS_MEM_TYPE_64 : 0) | (bar->prefetch ? PCI_BASE_ADDRESS_MEM_PREFETCH : 0);
}

void pci_bar_init(struct pci_device *p, int n, uint64_t size, bool io, bool is64, bool prefetch,
		  const char *name, const struct io_ops *ops, void *opaque)
{
	struct pci_bar *bar = &p->bar[n];
	uint64_t mask = ~(size - 1) & (io ? ~3ULL : ~15ULL);

	bar->size = size;
	bar->io = io;
	bar->is64 = is64;
	bar->prefetch = prefetch;
	bar->win = (struct io_window){ .name = name, .ops = ops, .opaque = opaque, .lock = p->lock, .size = size };
	st_le32(p->cfg + bar_off(n), bar_flags(bar));
	st_le32(p->wmask + bar_off(n), mask);
	if (is64)
		st_le32(p->wmask + bar_off(n) + 4, mask >> 32);
}

static uint64_t bar_value(const struct pci_device *p, int n)
{
	const struct pci_bar *bar = &p->bar[n];
	uint64_t v = ld_le32(p->cfg + bar_off(n)) & (bar->io ? ~3u : ~15u);

	if (bar->is64)
		v |= (uint64_t)ld_le32(p->cfg + bar_off(n) + 4) << 32;
	return v;
}

/*
 * 0: the BAR does not decode. Address 0 and ranges that touch the top of their space are what a
 * guest leaves there while it sizes the BAR.
 */
static uint64_t bar_target(const struct pci_device *p, int n)
{
	const struct pci_bar *bar = &p->bar[n];
	uint16_t cmd = ld_le16(p->cfg + PCI_COMMAND);
	uint64_t a = bar_value(p, n), top = bar->io ? 0xffff : bar->is64 ? (1ULL << 52) - 1 : 0xffffffff;

	if (!bar->size || !(cmd & (bar->io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY)))
		return 0;
	if (!a || a > top || bar->size - 1 >= top - a)
		return 0;
	return a;
}

uint64_t pci_bar_addr(const struct pci_device *p, int n)
{
	return bar_target(p, n);
}

static struct io_space *bar_space(struct pci_device *p, int n)
{
	return p->bar[n].io ? p->bus->cfg.ports : p->bus->cfg.mmio;
}

/* True when a window went away or moved, so that one it hid may be tried again. */
static bool bar_update(struct pci_device *p, int n)
{
	struct pci_bar *bar = &p->bar[n];
	uint64_t to = bar_target(p, n);
	bool was = bar->win.mapped;
	struct err err = { 0 };

	if (was && to == bar->win.base)
		return false;
	if (was)
		io_unmap(bar_space(p, n), &bar->win);
	if (to && io_map(bar_space(p, n), &bar->win, to, &err))
		log_guest("%s: BAR %d at %#llx: %s", p->name, n, (unsigned long long)to, err.msg);
	return was;
}

static bool bars_update_one(struct pci_device *p)
{
	bool freed = false;

	for (int i = 0; i < 6; i++)
		if (p->bar[i].size)
			freed |= bar_update(p, i);
	return freed;
}

void pci_bars_update(struct pci_device *p)
{
	struct pci_bus *b = p->bus;

	if (!bars_update_one(p))
		return;
	for (unsigned i = 0; i < 256; i++)      /* BARs that overlapped what moved away */
		if (b->dev[i] && b->dev[i] != p)
			bars_update_one(b->dev[i]);
}

void pci_bars_unmap(struct pci_device *p)
{
	for (int i = 0; i < 6; i++)
		if (p->bar[i].win.mapped)
			io_unmap(bar_space(p, i), &p->bar[i].win);
}

void pci_bars_reset(struct pci_device *p)
{
	for (int i = 0; i < 6; i++) {
		if (!p->bar[i].size)
			continue;
		st_le32(p->cfg + bar_off(i), bar_flags(&p->bar[i]));
		if (p->bar[i].is64)
			st_le32(p->cfg + bar_off(i) + 4, 0);
	}
}

/* Address allocation: each window is filled upwards, big BARs first so that alignment wastes little. */
struct assign {
	uint64_t io, io_end, lo, lo_end, hi, hi_end;
};

struct want {
	struct pci_device *p;
	int n;
};

static int want_cmp(const void *a, const void *b)
{
	const struct want *x = a, *y = b;
	uint64_t sx = x->p->bar[x->n].size, sy = y->p->bar[y->n].size;

	if (sx != sy)
		return sx < sy ? 1 : -1;
	return x->p->devfn != y->p->devfn ? x->p->devfn - y->p->devfn : x->n - y->n;
}

static uint64_t take(uint64_t *at, uint64_t end, uint64_t size)
{
	uint64_t a = ALIGN_UP(*at, size);

	if (a < *at || a >= end || size > end - a)
		return 0;
	*at = a + size;
	return a;
}

static int assign_one(struct assign *as, struct pci_device *p, int n, struct err *err)
{
	struct pci_bar *bar = &p->bar[n];
	uint64_t a = 0, size = bar->io ? bar->size : MAX(bar->size, 4096u);

	if (bar->io)
		a = take(&as->io, as->io_end, size);
	else if (bar->is64 && size >= 64u << 20)
		a = take(&as->hi, as->hi_end, size);
	if (!a && !bar->io)
		a = take(&as->lo, as->lo_end, size);
	if (!a && !bar->io && bar->is64)
		a = take(&as->hi, as->hi_end, size);
	if (!a)
		return err_set(err, -ENOSPC, "%s: no room for BAR %d of %llu bytes", p->name, n,
			       (unsigned long long)bar->size);
	st_le32(p->cfg + bar_off(n), (uint32_t)a | bar_flags(bar));
	if (bar->is64)
		st_le32(p->cfg + bar_off(n) + 4, a >> 32);
	return 0;
}

static void assign_enable(struct pci_device *p)
{
	uint16_t cmd = ld_le16(p->cfg + PCI_COMMAND);

	for (int i = 0; i < 6; i++)
		if (p->bar[i].size)
			cmd |= p->bar[i].io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY;
	st_le16(p->cfg + PCI_COMMAND, cmd);
	pci_bars_update(p);
}

int pci_bus_assign(struct pci_bus *b, struct err *err)
{
	const struct pci_bus_config *c = &b->cfg;
	struct assign as = { 0xc000, 0x10000, c->mmio32_base, c->mmio32_base + c->mmio32_size,
			     c->mmio64_base, c->mmio64_base + c->mmio64_size };
	struct want *w = calloc(256 * 6, sizeof(*w));
	unsigned nw = 0;
	int r = 0;

	if (!w)
		return err_set(err, -ENOMEM, "no memory to place PCI BARs");
	pthread_mutex_lock(&b->lock);
	for (unsigned i = 0; i < 256; i++)
		for (int n = 0; b->dev[i] && n < 6; n++)
			if (b->dev[i]->bar[n].size)
				w[nw++] = (struct want){ b->dev[i], n };
	qsort(w, nw, sizeof(*w), want_cmp);
	for (unsigned i = 0; i < nw && !r; i++)
		r = assign_one(&as, w[i].p, w[i].n, err);
	for (unsigned i = 0; i < 256 && !r; i++)
		if (b->dev[i])
			assign_enable(b->dev[i]);
	pthread_mutex_unlock(&b->lock);
	free(w);
	return r;
}
