/* The PCI transport: capabilities, BAR 4's registers, interrupts. Section numbers: virtio 1.2. */
#include <errno.h>

#include <linux/pci_regs.h>
#include <linux/virtio_config.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>

#include "base/log.h"
#include "base/util.h"
#include "virtio/pci.h"

enum {
	BAR_MSIX = 1, BAR_MODERN = 4,
	AREA = 0x1000, AREA_COMMON = 0, AREA_ISR = 1, AREA_DEVICE = 2, AREA_NOTIFY = 3,
	NOTIFY_MULT = 4, COMMON_LEN = 60, Q_NOTIFY_DATA = 56, Q_RESET = 58,
	F_RING_RESET = 40,
	ISR_QUEUE = 1, ISR_CONFIG = 2,
};

const char *const virtio_on_off_auto[] = { "auto", "on", "off", NULL };

static void irq(struct virtio_dev *v, uint16_t vector, bool config)
{
	struct virtio_pci *p = container_of(v, struct virtio_pci, v);

	if (msix_enabled(&p->pci)) {
		if (vector != VIRTIO_NO_VECTOR)
			msix_notify(&p->pci, vector);
		return;
	}
	v->isr |= config ? ISR_CONFIG : ISR_QUEUE;
	pci_set_intx(&p->pci, 1);
}

static bool dma_allowed(struct virtio_dev *v)
{
	return pci_bus_master(&container_of(v, struct virtio_pci, v)->pci);
}

static struct virtio_queue_state *selected(struct virtio_pci *p)
{
	return p->queue_select < p->v.n_queues ? &p->v.vq[p->queue_select] : NULL;
}

static uint32_t feature_word(uint64_t f, uint32_t select)
{
	return select > 1 ? 0 : f >> (32 * select);
}

/* 4.1.4.3, as a picture of the whole structure; no register has a read side effect. */
static void common_image(struct virtio_pci *p, uint8_t *b)
{
	struct virtio_queue_state *s = selected(p);
	struct virtio_dev *v = &p->v;

	memset(b, 0, COMMON_LEN);
	st_le32(b + VIRTIO_PCI_COMMON_DFSELECT, p->dev_select);
	st_le32(b + VIRTIO_PCI_COMMON_DF, feature_word(v->host_features, p->dev_select));
	st_le32(b + VIRTIO_PCI_COMMON_GFSELECT, p->drv_select);
	st_le32(b + VIRTIO_PCI_COMMON_GF, feature_word(v->features, p->drv_select));
	st_le16(b + VIRTIO_PCI_COMMON_MSIX, v->config_vector);
	st_le16(b + VIRTIO_PCI_COMMON_NUMQ, v->n_queues);
	b[VIRTIO_PCI_COMMON_STATUS] = v->status;
	b[VIRTIO_PCI_COMMON_CFGGENERATION] = v->generation;
	st_le16(b + VIRTIO_PCI_COMMON_Q_SELECT, p->queue_select);
	if (!s)
		return;
	st_le16(b + VIRTIO_PCI_COMMON_Q_SIZE, s->q.size);
	st_le16(b + VIRTIO_PCI_COMMON_Q_MSIX, s->vector);
	st_le16(b + VIRTIO_PCI_COMMON_Q_ENABLE, s->q.enabled);
	st_le16(b + VIRTIO_PCI_COMMON_Q_NOFF, p->queue_select);
	st_le64(b + VIRTIO_PCI_COMMON_Q_DESCLO, s->q.desc_gpa);
	st_le64(b + VIRTIO_PCI_COMMON_Q_AVAILLO, s->q.driver_gpa);
	st_le64(b + VIRTIO_PCI_COMMON_Q_USEDLO, s->q.device_gpa);
	st_le16(b + Q_NOTIFY_DATA, p->queue_select);
}

static uint16_t checked_vector(struct virtio_pci *p, uint16_t vec)
{
	return vec < msix_vectors(&p->pci) ? vec : VIRTIO_NO_VECTOR;
}

static void set_driver_features(struct virtio_pci *p, uint32_t val)
{
	unsigned sh = 32 * p->drv_select;

	if (p->drv_select <= 1)
		virtio_set_features(&p->v, (p->v.features & ~(0xffffffffull << sh)) | (uint64_t)val << sh);
}

static void set_status(struct virtio_pci *p, uint8_t val)
{
	virtio_set_status(&p->v, val);
	if (!p->v.status)
		pci_set_intx(&p->pci, 0);
}

static void device_write(struct virtio_pci *p, unsigned off, uint32_t val, unsigned size)
{
	switch (off | size << 8) {
	case VIRTIO_PCI_COMMON_DFSELECT | 4 << 8:
		p->dev_select = val;
		break;
	case VIRTIO_PCI_COMMON_GFSELECT | 4 << 8:
		p->drv_select = val;
		break;
	case VIRTIO_PCI_COMMON_GF | 4 << 8:
		set_driver_features(p, val);
		break;
	case VIRTIO_PCI_COMMON_MSIX | 2 << 8:
		p->v.config_vector = checked_vector(p, val);
		break;
	case VIRTIO_PCI_COMMON_STATUS | 1 << 8:
		set_status(p, val);
		break;
	case VIRTIO_PCI_COMMON_Q_SELECT | 2 << 8:
		p->queue_select = val;
		break;
	}
}

static void set_half(uint64_t *reg, bool high, uint32_t val)
{
	*reg = high ? (*reg & 0xffffffff) | (uint64_t)val << 32 : (*reg & ~0xffffffffull) | val;
}

static void set_queue_size(struct virtio_pci *p, struct virtq *q, uint16_t val)
{
	if (!val || val > q->max_size)
		log_guest("%s: queue %u: size %u is not possible", p->v.name, q->index, val);
	else
		q->size = val;
}

/* Registers of the selected queue; size and addresses are fixed once it is enabled. */
static void queue_write(struct virtio_pci *p, struct virtio_queue_state *s, unsigned off, uint32_t val, unsigned size)
{
	bool open = !s->q.enabled;

	switch (off | size << 8) {
	case VIRTIO_PCI_COMMON_Q_SIZE | 2 << 8:
		if (open)
			set_queue_size(p, &s->q, val);
		break;
	case VIRTIO_PCI_COMMON_Q_MSIX | 2 << 8:
		s->vector = checked_vector(p, val);
		break;
	case VIRTIO_PCI_COMMON_Q_ENABLE | 2 << 8:
		if (val == 1)
			virtio_queue_start(&p->v, p->queue_select);
		break;
	case VIRTIO_PCI_COMMON_Q_DESCLO | 4 << 8:
	case VIRTIO_PCI_COMMON_Q_DESCHI | 4 << 8:
		if (open)
			set_half(&s->q.desc_gpa, off == VIRTIO_PCI_COMMON_Q_DESCHI, val);
		break;
	case VIRTIO_PCI_COMMON_Q_AVAILLO | 4 << 8:
	case VIRTIO_PCI_COMMON_Q_AVAILHI | 4 << 8:
		if (open)
			set_half(&s->q.driver_gpa, off == VIRTIO_PCI_COMMON_Q_AVAILHI, val);
		break;
	case VIRTIO_PCI_COMMON_Q_USEDLO | 4 << 8:
	case VIRTIO_PCI_COMMON_Q_USEDHI | 4 << 8:
		if (open)
			set_half(&s->q.device_gpa, off == VIRTIO_PCI_COMMON_Q_USEDHI, val);
		break;
	case Q_RESET | 2 << 8:
		if (val == 1)
			virtio_queue_stop(&p->v, p->queue_select);
		break;
	}
}

static void common_write(struct virtio_pci *p, unsigned off, uint64_t val, unsigned size)
{
	struct virtio_queue_state *s = selected(p);

	if (p->v.resetting)
		return;
	if (size == 8) {
		common_write(p, off, (uint32_t)val, 4);
		common_write(p, off + 4, val >> 32, 4);
	} else if (off < VIRTIO_PCI_COMMON_Q_SIZE) {
		device_write(p, off, val, size);
	} else if (s) {
		queue_write(p, s, off, val, size);
	}
}

static uint64_t bytes(const uint8_t *b, unsigned len, uint64_t off, unsigned size)
{
	uint64_t v = 0;

	if (off < len)
		memcpy(&v, b + off, MIN(size, len - (unsigned)off));
	return v;
}

static uint64_t isr_read(struct virtio_pci *p)
{
	uint8_t isr = p->v.isr;

	p->v.isr = 0;
	pci_set_intx(&p->pci, 0);
	return isr;
}

static uint64_t bar_read(void *opaque, uint64_t off, unsigned size)
{
	struct virtio_pci *p = opaque;
	uint8_t image[COMMON_LEN];

	switch (off / AREA) {
	case AREA_COMMON:
		common_image(p, image);
		return bytes(image, sizeof(image), off, size);
	case AREA_ISR:
		return off % AREA ? 0 : isr_read(p);
	case AREA_DEVICE:
		return bytes(p->v.config, p->v.config_len, off % AREA, size);
	}
	return 0;
}

static void bar_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct virtio_pci *p = opaque;
	uint8_t b[8];

	switch (off / AREA) {
	case AREA_COMMON:
		common_write(p, off, val, size);
		break;
	case AREA_DEVICE:
		st_le64(b, val);
		if (p->v.ops->config_write && !p->v.resetting && !range_bad(off % AREA, size, p->v.config_len))
			p->v.ops->config_write(&p->v, off % AREA, b, size);
		break;
	case AREA_NOTIFY:
		virtio_serve(&p->v, off % AREA / NOTIFY_MULT);
		break;
	}
}

static const struct io_ops bar_ops = { bar_read, bar_write, 0, 0 };

/* 4.1.4.9: a window to BAR 4 through config space, for firmware that has not mapped the BAR. */
static bool window(struct virtio_pci *p, unsigned off, unsigned len, uint32_t *at, uint32_t *size)
{
	const uint8_t *c = p->pci.cfg + p->pci_cfg_cap;

	if (!ranges_overlap(off, len, p->pci_cfg_cap + 16, 4))
		return false;
	*at = ld_le32(c + 8);
	*size = ld_le32(c + 12);
	return c[4] == BAR_MODERN && (*size == 1 || *size == 2 || *size == 4) && *at % *size == 0 &&
	       !range_bad(*at, *size, 4 * AREA);
}

static void cfg_reading(struct pci_device *pci, unsigned off, unsigned len)
{
	struct virtio_pci *p = pci->opaque;
	uint32_t at, size;

	if (window(p, off, len, &at, &size))
		st_le32(pci->cfg + p->pci_cfg_cap + 16, bar_read(p, at, size));
}

static void cfg_written(struct pci_device *pci, unsigned off, unsigned len)
{
	struct virtio_pci *p = pci->opaque;
	uint32_t at, size;

	if (window(p, off, len, &at, &size))
		bar_write(p, at, ld_le32(pci->cfg + p->pci_cfg_cap + 16) & (0xffffffffu >> (32 - 8 * size)), size);
	if (ranges_overlap(off, len, PCI_COMMAND, 2) && pci_bus_master(pci))
		virtio_serve_all(&p->v);
}

static unsigned add_cap(struct virtio_pci *p, uint8_t type, unsigned area, uint32_t len, unsigned cap_len)
{
	unsigned off = pci_add_cap(&p->pci, PCI_CAP_ID_VNDR, cap_len);
	uint8_t *c = p->pci.cfg + off;

	c[2] = cap_len;
	c[3] = type;
	c[4] = type == VIRTIO_PCI_CAP_PCI_CFG ? 0 : BAR_MODERN;
	st_le32(c + 8, area * AREA);
	st_le32(c + 12, len);
	return off;
}

static void add_caps(struct virtio_pci *p)
{
	unsigned off;

	add_cap(p, VIRTIO_PCI_CAP_COMMON_CFG, AREA_COMMON, COMMON_LEN, 16);
	add_cap(p, VIRTIO_PCI_CAP_ISR_CFG, AREA_ISR, 1, 16);
	if (p->v.config_len)
		add_cap(p, VIRTIO_PCI_CAP_DEVICE_CFG, AREA_DEVICE, AREA, 16);
	off = add_cap(p, VIRTIO_PCI_CAP_NOTIFY_CFG, AREA_NOTIFY, AREA, 20);
	st_le32(p->pci.cfg + off + 16, NOTIFY_MULT);
	off = p->pci_cfg_cap = add_cap(p, VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 20);
	p->pci.wmask[off + 4] = 0xff;
	memset(p->pci.wmask + off + 8, 0xff, 12);
}

static int check_props(struct virtio_pci *p, struct err *err)
{
	const char *name = p->dev.cls->name;

	if (p->disable_modern)
		return err_set(err, -ENOTSUP, "%s: disable-modern=on: only modern virtio is offered", name);
	if (p->disable_legacy == 2)
		return err_set(err, -ENOTSUP, "%s: disable-legacy=off: legacy virtio is not offered; leave it out", name);
	if (p->romfile && *p->romfile)
		return err_set(err, -ENOTSUP, "%s: romfile=%s: option ROMs are not supported; leave it out or empty", name, p->romfile);
	return 0;
}

static uint64_t ring_features(const struct virtio_pci *p)
{
	return (p->indirect ? BIT(VIRTIO_RING_F_INDIRECT_DESC) : 0) | (p->event_idx ? BIT(VIRTIO_RING_F_EVENT_IDX) : 0) |
	       (p->packed ? BIT(VIRTIO_F_RING_PACKED) : 0) | (p->queue_reset ? BIT(F_RING_RESET) : 0);
}

int virtio_pci_init(struct virtio_pci *p, const struct virtio_pci_config *c, struct err *err)
{
	struct pci_ids ids = { 0x1af4, 0x1040 + c->type, 0x1af4, 0x1100, c->class_code, c->subclass, 0, 1 };
	struct virtio_dev_config dc = { c->ops, p->dev.cls->name, c->n_queues, c->queue_size,
					c->features | ring_features(p), c->config_len };
	unsigned vectors = p->vectors == UINT32_MAX ? c->vectors : p->vectors;
	int r = check_props(p, err);

	r = r ? r : virtio_dev_init(&p->v, p->dev.env, &dc, err);
	if (r)
		return r;
	p->v.irq = irq;
	p->v.dma_allowed = dma_allowed;
	pci_device_init(&p->pci, p->dev.cls->name, &ids, &p->v.lock);
	p->pci.multifunction = p->multifunction;
	p->pci.opaque = p;
	p->pci.cfg_reading = cfg_reading;
	p->pci.cfg_written = cfg_written;
	pci_set_intx_pin(&p->pci, 0);
	add_caps(p);
	pci_bar_init(&p->pci, BAR_MODERN, 4 * AREA, false, true, true, p->v.name, &bar_ops, p);
	if (vectors)
		r = msix_init(&p->pci, vectors, BAR_MSIX, 0, MAX(2048u, ALIGN_UP(vectors * 16, 2048u)), err);
	if (r)
		virtio_pci_destroy(p);
	return r;
}

int virtio_pci_plug(struct virtio_pci *p, struct err *err)
{
	int r = pci_device_add(p->dev.env->pci, &p->pci, p->addr, err);

	p->added = !r;
	return r;
}

void virtio_pci_unplug(struct virtio_pci *p)
{
	if (p->added)
		pci_device_remove(&p->pci);
	p->added = false;
	virtio_dev_reset(&p->v);
	virtio_dev_stop_deferred(&p->v);
}

void virtio_pci_destroy(struct virtio_pci *p)
{
	msix_free(&p->pci);
	virtio_dev_destroy(&p->v);
}

void virtio_pci_dev_reset(struct device *d)
{
	struct virtio_pci *p = container_of(d, struct virtio_pci, dev);

	virtio_dev_reset(&p->v);
	pthread_mutex_lock(&p->v.lock);
	p->dev_select = p->drv_select = p->queue_select = 0;
	pci_set_intx(&p->pci, 0);
	pthread_mutex_unlock(&p->v.lock);
}

void virtio_pci_dev_pause(struct device *d, bool paused)
{
	virtio_dev_pause(&container_of(d, struct virtio_pci, dev)->v, paused);
}
