/*
 * MSI-X (PCI 3.0, 6.8.2): a table of {address, data, mask} in a BAR, a pending bit for each vector,
 * and a capability with enable and function mask. A masked vector's message waits as its pending
 * bit and goes out when both masks are clear.
 */
#include <errno.h>
#include <stdlib.h>

#include <linux/pci_regs.h>

#include "base/util.h"
#include "pci/internal.h"

#define ENTRY 16u

struct msix_state {
	unsigned vectors;
	unsigned cap;
	uint32_t table_off, pba_off;
	uint32_t pba_len;
	uint8_t *table;
	uint8_t *pba;
	const struct io_ops *inner;     /* what the BAR held before */
	void *inner_opaque;
};

static uint16_t msix_ctl(const struct pci_device *p)
{
	return ld_le16(p->cfg + p->msix->cap + PCI_MSIX_FLAGS);
}

bool msix_enabled(const struct pci_device *p)
{
	return p->msix && (msix_ctl(p) & PCI_MSIX_FLAGS_ENABLE);
}

unsigned msix_vectors(const struct pci_device *p)
{
	return p->msix ? p->msix->vectors : 0;
}

static bool vector_masked(const struct pci_device *p, unsigned v)
{
	return (msix_ctl(p) & PCI_MSIX_FLAGS_MASKALL) || (p->msix->table[v * ENTRY + 12] & 1);
}

static void vector_send(struct pci_device *p, unsigned v)
{
	const uint8_t *e = p->msix->table + v * ENTRY;
	struct msi_sink *s = &p->bus->cfg.msi;

	/* A message is a memory write: without bus mastering it goes nowhere. */
	if (s->send && pci_bus_master(p))
		s->send(s->opaque, ld_le64(e), ld_le32(e + 8), p->devfn);
}

void msix_notify(struct pci_device *p, unsigned v)
{
	struct msix_state *m = p->msix;

	if (!m || !p->bus || v >= m->vectors || !msix_enabled(p))
		return;
	if (vector_masked(p, v))
		m->pba[v / 8] |= 1u << (v % 8);
	else
		vector_send(p, v);
}

static void deliver_pending(struct pci_device *p, unsigned v)
{
	struct msix_state *m = p->msix;

	if (!(m->pba[v / 8] & (1u << (v % 8))) || !msix_enabled(p) || vector_masked(p, v) || !p->bus)
		return;
	m->pba[v / 8] &= ~(1u << (v % 8));
	vector_send(p, v);
}

void msix_cfg_written(struct pci_device *p, unsigned off, unsigned len)
{
	struct msix_state *m = p->msix;

	if (!m || !ranges_overlap(off, len, m->cap + PCI_MSIX_FLAGS, 2))
		return;
	for (unsigned v = 0; v < m->vectors; v++)
		deliver_pending(p, v);
}

static void table_reset(struct msix_state *m)
{
	memset(m->table, 0, m->vectors * ENTRY);
	memset(m->pba, 0, m->pba_len);
	for (unsigned v = 0; v < m->vectors; v++)
		m->table[v * ENTRY + 12] = 1;           /* masked after reset */
}

void msix_reset(struct pci_device *p)
{
	if (!p->msix)
		return;
	st_le16(p->cfg + p->msix->cap + PCI_MSIX_FLAGS, p->msix->vectors - 1);
	table_reset(p->msix);
}

static uint64_t inner_read(struct msix_state *m, uint64_t off, unsigned size)
{
	unsigned max = m->inner && m->inner->max_size ? m->inner->max_size : 8;

	if (!m->inner || !m->inner->read || size < m->inner->min_size)
		return UINT64_MAX >> (64 - size * 8);
	if (size > max)
		return inner_read(m, off, size / 2) | inner_read(m, off + size / 2, size / 2) << (size * 4);
	return m->inner->read(m->inner_opaque, off, size);
}

static void inner_write(struct msix_state *m, uint64_t off, uint64_t val, unsigned size)
{
	unsigned max = m->inner && m->inner->max_size ? m->inner->max_size : 8;

	if (!m->inner || !m->inner->write || size < m->inner->min_size)
		return;
	if (size > max) {
		inner_write(m, off, val & (UINT64_MAX >> (64 - size * 4)), size / 2);
		inner_write(m, off + size / 2, val >> (size * 4), size / 2);
	} else {
		m->inner->write(m->inner_opaque, off, val, size);
	}
}

/* Which of the two areas holds all of [off, off+size); accesses across an edge belong to neither. */
static bool in_area(uint64_t off, unsigned size, uint32_t start, uint32_t len)
{
	return off >= start && !range_bad(off - start, size, len);
}

/* Table and PBA take aligned dwords and qwords only (6.8.2). */
static uint64_t msix_read(void *opaque, uint64_t off, unsigned size)
{
	struct pci_device *p = opaque;
	struct msix_state *m = p->msix;
	bool ok = (size == 4 || size == 8) && off % size == 0;
	uint64_t v = 0;

	if (in_area(off, size, m->table_off, m->vectors * ENTRY)) {
		if (ok)
			memcpy(&v, m->table + (off - m->table_off), size);
	} else if (in_area(off, size, m->pba_off, m->pba_len)) {
		if (ok)
			memcpy(&v, m->pba + (off - m->pba_off), size);
	} else {
		v = inner_read(m, off, size);
	}
	return v;
}

static void msix_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct pci_device *p = opaque;
	struct msix_state *m = p->msix;

	if (in_area(off, size, m->pba_off, m->pba_len))
		return;
	if (!in_area(off, size, m->table_off, m->vectors * ENTRY)) {
		inner_write(m, off, val, size);
		return;
	}
	if ((size != 4 && size != 8) || off % size)
		return;
	off -= m->table_off;
	unsigned v = off / ENTRY;
	uint8_t *e = m->table + v * ENTRY;

	memcpy(m->table + off, &val, size);
	e[0] &= ~3;                                     /* dword aligned address */
	st_le32(e + 12, ld_le32(e + 12) & 1);
	deliver_pending(p, v);
}

static const struct io_ops msix_ops = { msix_read, msix_write, 0, 0 };

static uint64_t pow2_up(uint64_t v)
{
	uint64_t p = 4096;

	while (p < v)
		p <<= 1;
	return p;
}

static int msix_check(struct pci_device *p, unsigned vectors, int bar, uint32_t table_off, uint32_t pba_off,
		      struct err *err)
{
	uint64_t tlen = (uint64_t)vectors * ENTRY, plen = (vectors + 63) / 64 * 8;

	if (!vectors || vectors > 2048)
		return err_set(err, -EINVAL, "%s: MSI-X takes 1 to 2048 vectors, not %u", p->name, vectors);
	if (bar < 0 || bar > 5 || table_off % 8 || pba_off % 8 || ranges_overlap(table_off, tlen, pba_off, plen))
		return err_set(err, -EINVAL, "%s: bad MSI-X layout", p->name);
	if (p->bar[bar].size && (p->bar[bar].io || table_off + tlen > p->bar[bar].size ||
				 pba_off + plen > p->bar[bar].size))
		return err_set(err, -EINVAL, "%s: MSI-X table does not fit in BAR %d", p->name, bar);
	return 0;
}

int msix_init(struct pci_device *p, unsigned vectors, int bar, uint32_t table_off, uint32_t pba_off,
	      struct err *err)
{
	int r = msix_check(p, vectors, bar, table_off, pba_off, err);
	struct msix_state *m;

	if (r)
		return r;
	m = calloc(1, sizeof(*m));
	if (!m)
		return err_set(err, -ENOMEM, "%s: no memory for MSI-X", p->name);
	*m = (struct msix_state){ .vectors = vectors, .table_off = table_off, .pba_off = pba_off,
				  .pba_len = (vectors + 63) / 64 * 8 };
	m->table = calloc(vectors, ENTRY);
	m->pba = calloc(1, m->pba_len);
	m->cap = pci_add_cap(p, PCI_CAP_ID_MSIX, PCI_CAP_MSIX_SIZEOF);
	p->msix = m;
	if (!m->table || !m->pba || !m->cap) {
		msix_free(p);
		return err_set(err, -ENOMEM, "%s: no room for MSI-X", p->name);
	}
	table_reset(m);
	st_le16(p->cfg + m->cap + PCI_MSIX_FLAGS, vectors - 1);
	p->wmask[m->cap + PCI_MSIX_FLAGS + 1] = 0xc0;
	st_le32(p->cfg + m->cap + PCI_MSIX_TABLE, table_off | bar);
	st_le32(p->cfg + m->cap + PCI_MSIX_PBA, pba_off | bar);
	if (p->bar[bar].size) {
		m->inner = p->bar[bar].win.ops;
		m->inner_opaque = p->bar[bar].win.opaque;
		p->bar[bar].win.ops = &msix_ops;
		p->bar[bar].win.opaque = p;
	} else {
		pci_bar_init(p, bar, pow2_up(MAX(table_off + vectors * ENTRY, pba_off + m->pba_len)), false, false,
			     false, "msix", &msix_ops, p);
	}
	return 0;
}

void msix_free(struct pci_device *p)
{
	struct msix_state *m = p->msix;

	if (!m)
		return;
	free(m->table);
	free(m->pba);
	free(m);
	p->msix = NULL;
}
