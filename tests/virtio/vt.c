#include "vt.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include <linux/pci_regs.h>


#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x); abort(); } } while (0)

/* Recording back ends: the "handle" is the test machine's own struct. */
int net_attach(struct net_backend *n, const struct net_client *c, const char *owner, struct err *err)
{
	((struct vt *)n)->net_client = *c;
	return 0;
}
bool vt_net_receive(struct vt *t, const void *f, size_t n) { return t->net_client.receive(t->net_client.opaque, f, n); }
void vt_net_can_send(struct vt *t) { t->net_client.can_send(t->net_client.opaque); }
void vt_chr_event(struct vt *t, int e) { t->chr_client.event(t->chr_client.opaque, e); }
size_t vt_chr_input(struct vt *t, const char *s)
{
	size_t n = MIN(strlen(s), t->chr_client.can_receive(t->chr_client.opaque));

	if (n)
		t->chr_client.receive(t->chr_client.opaque, (const uint8_t *)s, n);
	return n;
}

void net_detach(struct net_backend *n) { }
void net_resume(struct net_backend *n) { ((struct vt *)n)->net.resumed++; }
int net_send(struct net_backend *n, const struct iovec *iov, int cnt)
{
	struct vt_net *r = &((struct vt *)n)->net;

	if (r->full)
		return -EAGAIN;
	r->last_len = 0;
	for (int i = 0; i < cnt; i++) {
		size_t k = MIN(iov[i].iov_len, sizeof(r->last) - r->last_len);

		memcpy(r->last + r->last_len, iov[i].iov_base, k);
		r->last_len += k;
	}
	r->sent++;
	return 0;
}
int chr_attach(struct chardev *c, const struct chr_client *cl, const char *owner, struct err *err)
{
	((struct vt *)c)->chr_client = *cl;
	return 0;
}
void chr_detach(struct chardev *c, const void *opaque) { }
void chr_accept_input(struct chardev *c) { ((struct vt *)c)->chr.accepted++; }
size_t chr_write(struct chardev *c, const uint8_t *buf, size_t len)
{
	struct vt_chr *r = &((struct vt *)c)->chr;
	size_t n = MIN(MIN(len, r->room), sizeof(r->out) - r->n_out);

	memcpy(r->out + r->n_out, buf, n);
	r->n_out += n;
	r->room -= n;
	return n;
}

static void msi(void *opaque, uint64_t addr, uint32_t data, uint32_t requester)
{
	struct vt *t = opaque;

	__atomic_add_fetch(&t->msi[data % 64], 1, __ATOMIC_RELAXED);
}

static void intx(void *opaque, int n, int level) { ((struct vt *)opaque)->intx = level; }
static struct irq_line route(void *opaque, int dev, int pin) { return (struct irq_line){ intx, opaque, 1 }; }

void vt_start(struct vt *t)
{
	struct pci_bus_config c = { .mmio32_base = VT_BAR, .mmio32_size = 1 << 26, .route_intx = route, .opaque = t,
				    .msi = { msi, t } };

	memset(t, 0, sizeof(*t));
	CHECK(!guest_mem_create(&t->env.mem, NULL, NULL));
	CHECK(!guest_mem_add_ram(t->env.mem, "ram", 0, VT_RAM / 2, &(struct mem_backing){ 0 }, NULL));
	CHECK(!guest_mem_add_ram(t->env.mem, "ram2", VT_RAM / 2, VT_RAM / 2, &(struct mem_backing){ 0 }, NULL));
	CHECK(!io_space_create(&t->env.mmio, "mmio", 1ull << 52, NULL));
	CHECK(!io_space_create(&t->env.ports, "ports", 1 << 16, NULL));
	c.mmio = t->env.mmio;
	c.ports = t->env.ports;
	t->env.clock = clock_stepped_create();
	CHECK(!pci_bus_create(&t->env.pci, &c, NULL));
	t->env.msi = c.msi;
	t->heap = 0x10000;
}

void vt_stop(struct vt *t)
{
	if (t->dev)
		device_free(t->dev);
	pci_bus_destroy(t->env.pci);
	io_space_destroy(t->env.mmio);
	io_space_destroy(t->env.ports);
	clock_stepped_destroy(t->env.clock);
	guest_mem_destroy(t->env.mem);
}

int vt_device(struct vt *t, const struct device_class *cls, struct device *parent, struct device **out,
	      const struct backend_lookup *find, const char *const *props)
{
	struct err err = { 0 };
	struct device *d;
	int r = device_alloc(&d, cls, &t->env, "d0", &err);

	CHECK(!r);
	d->parent = parent;
	for (; !r && props && *props; props += 2)
		r = device_set_prop(d, props[0], props[1], find, &err);
	for (const struct prop *p = cls->props; !r && find && p->name; p++)
		if (p->type == PROP_DRIVE || p->type == PROP_NETDEV)
			r = device_set_prop(d, p->name, "x", find, &err);
	if (!r)
		r = device_create(d, &err);
	if (r) {
		device_free(d);
		return r;
	}
	if (out)
		*out = d;
	else
		t->dev = d;
	return 0;
}

static void cfg_wr(struct vt *t, unsigned off, uint32_t v, unsigned len)
{
	pci_config_write(t->env.pci, t->pci->devfn, off, v, len);
}

void vt_map(struct vt *t)
{
	for (unsigned i = 0; i < 256 && !t->pci; i++)
		t->pci = pci_bus_device(t->env.pci, i);
	CHECK(t->pci);
	cfg_wr(t, PCI_BASE_ADDRESS_1, VT_MSIX, 4);
	cfg_wr(t, PCI_BASE_ADDRESS_4, VT_BAR, 4);
	cfg_wr(t, PCI_BASE_ADDRESS_5, 0, 4);
	cfg_wr(t, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
}

uint64_t vt_rd(struct vt *t, unsigned off, unsigned size)
{
	uint64_t v = 0;

	io_read(t->env.mmio, VT_BAR + off, &v, size);
	return v;
}

void vt_wr(struct vt *t, unsigned off, uint64_t val, unsigned size)
{
	io_write(t->env.mmio, VT_BAR + off, &val, size);
}

uint64_t vt_alloc(struct vt *t, size_t len)
{
	uint64_t a = ALIGN_UP(t->heap, 64);

	t->heap = a + len;
	CHECK(t->heap < VT_RAM);
	memset(vt_ptr(t, a), 0, len);
	return a;
}

void *vt_ptr(struct vt *t, uint64_t gpa)
{
	void *p = gm_ptr(t->env.mem, gpa, 1, MEM_WRITE);

	CHECK(p);
	return p;
}

uint8_t vt_status(struct vt *t) { return vt_rd(t, 20, 1); }

bool vt_negotiate(struct vt *t, uint64_t want)
{
	uint64_t offered;

	vt_wr(t, 20, 0, 1);
	CHECK(vt_status(t) == 0);
	vt_wr(t, 20, 3, 1);
	vt_wr(t, 0, 0, 4);
	offered = vt_rd(t, 4, 4);
	vt_wr(t, 0, 1, 4);
	offered |= vt_rd(t, 4, 4) << 32;
	want = (want & offered) | BIT(32);
	vt_wr(t, 8, 0, 4);
	vt_wr(t, 12, (uint32_t)want, 4);
	vt_wr(t, 8, 1, 4);
	vt_wr(t, 12, want >> 32, 4);
	vt_wr(t, 20, 11, 1);
	return vt_status(t) & 8;
}

void vt_driver_ok(struct vt *t) { vt_wr(t, 20, 15, 1); }

/* Vector n sends data n. */
void vt_msix(struct vt *t, unsigned vectors)
{
	unsigned cap = 0;

	for (unsigned c = t->pci->cfg[PCI_CAPABILITY_LIST]; c; c = t->pci->cfg[c + 1])
		if (t->pci->cfg[c] == PCI_CAP_ID_MSIX)
			cap = c;
	CHECK(cap);
	for (unsigned i = 0; i < vectors; i++) {
		uint32_t e[4] = { 0xfee00000, 0, i, 0 };

		for (unsigned j = 0; j < 4; j++)
			io_write(t->env.mmio, VT_MSIX + i * 16 + j * 4, &e[j], 4);
	}
	cfg_wr(t, cap + 2, 0x8000, 2);
}

void vq_setup(struct vq *q, struct vt *t, unsigned index, unsigned size, bool packed, bool event_idx)
{
	*q = (struct vq){ .t = t, .index = index, .size = size, .packed = packed, .event_idx = event_idx,
			  .avail_wrap = true, .used_wrap = true };
	q->desc = vt_alloc(t, size * 16);
	q->driver = vt_alloc(t, 6 + size * 2);
	q->device = vt_alloc(t, 6 + size * 8);
	q->table = vt_alloc(t, size * 16 * 16);
	vt_wr(t, 22, index, 2);
	vt_wr(t, 24, size, 2);
	vt_wr(t, 32, q->desc, 8);
	vt_wr(t, 40, q->driver, 8);
	vt_wr(t, 48, q->device, 8);
	vt_wr(t, 26, index, 2);
	vt_wr(t, 28, 1, 2);
}

static void put_desc(struct vt *t, uint64_t at, uint64_t addr, uint32_t len, uint16_t a, uint16_t b)
{
	uint8_t *p = vt_ptr(t, at);

	st_le64(p, addr);
	st_le32(p + 8, len);
	st_le16(p + 12, a);
	__atomic_store_n((uint16_t *)(p + 14), b, __ATOMIC_RELEASE);
}

void vq_desc(struct vq *q, unsigned i, uint64_t addr, uint32_t len, uint16_t a, uint16_t b)
{
	put_desc(q->t, q->desc + i * 16, addr, len, a, b);
}

void vq_publish(struct vq *q, uint16_t head)
{
	uint8_t *p = vt_ptr(q->t, q->driver);

	st_le16(p + 4 + 2 * (q->avail % q->size), head);
	__atomic_store_n((uint16_t *)(p + 2), ++q->avail, __ATOMIC_RELEASE);
}

static uint16_t add_split(struct vq *q, const struct vseg *s, unsigned n, bool indirect)
{
	uint16_t head = q->next_free;

	for (unsigned i = 0; i < n; i++) {
		uint16_t fl = (s[i].write ? 2 : 0) | (i + 1 < n ? 1 : 0);
		uint16_t at = indirect ? i : (q->next_free + i) % q->size;
		uint16_t next = indirect ? i + 1 : (at + 1) % q->size;

		put_desc(q->t, (indirect ? q->table + head * 256 : q->desc) + at * 16, s[i].gpa, s[i].len, fl, next);
	}
	if (indirect)
		vq_desc(q, head, q->table + head * 256, n * 16, 4, 0);
	q->next_free = (q->next_free + (indirect ? 1 : n)) % q->size;
	vq_publish(q, head);
	return head;
}

static uint16_t add_packed(struct vq *q, const struct vseg *s, unsigned n, bool indirect)
{
	uint16_t id = q->avail, pos = q->avail, ring = indirect ? 1 : n, first = 0;
	bool wrap = q->avail_wrap;

	for (unsigned i = 0; indirect && i < n; i++)
		put_desc(q->t, q->table + id * 256 + i * 16, s[i].gpa, s[i].len, 0, s[i].write ? 2 : 0);
	for (unsigned i = 0; i < ring; i++) {
		uint16_t fl = (wrap ? 1 << 7 : 1 << 15) | (i + 1 < ring ? 1 : 0);

		fl |= indirect ? 4 : s[i].write ? 2 : 0;
		if (!i)
			first = fl;
		vq_desc(q, pos, indirect ? q->table + id * 256 : s[i].gpa, indirect ? n * 16 : s[i].len, id,
			i ? fl : fl ^ (1 << 7 | 1 << 15));
		if (++pos == q->size) {
			pos = 0;
			wrap = !wrap;
		}
	}
	q->skip[id] = ring;
	__atomic_store_n((uint16_t *)((uint8_t *)vt_ptr(q->t, q->desc + id * 16) + 14), first, __ATOMIC_RELEASE);
	q->avail = pos;
	q->avail_wrap = wrap;
	return id;
}

uint16_t vq_add(struct vq *q, const struct vseg *s, unsigned n, bool indirect)
{
	return q->packed ? add_packed(q, s, n, indirect) : add_split(q, s, n, indirect);
}

void vq_kick(struct vq *q) { vt_wr(q->t, 0x3000 + q->index * 4, q->index, 2); }

bool vq_used(struct vq *q, uint16_t *id, uint32_t *len)
{
	if (q->packed) {
		uint8_t *p = vt_ptr(q->t, q->desc + q->used * 16);
		uint16_t fl = __atomic_load_n((uint16_t *)(p + 14), __ATOMIC_ACQUIRE);

		if (!!(fl & 1 << 7) != q->used_wrap || !!(fl & 1 << 15) != q->used_wrap)
			return false;
		*id = ld_le16(p + 12);
		*len = ld_le32(p + 8);
		q->used += q->skip[*id];
		if (q->used >= q->size) {
			q->used -= q->size;
			q->used_wrap = !q->used_wrap;
		}
		return true;
	}
	uint8_t *p = vt_ptr(q->t, q->device);

	if (__atomic_load_n((uint16_t *)(p + 2), __ATOMIC_ACQUIRE) == q->used)
		return false;
	*id = ld_le32(p + 4 + 8 * (q->used % q->size));
	*len = ld_le32(p + 8 + 8 * (q->used % q->size));
	q->used++;
	if (q->event_idx)
		__atomic_store_n((uint16_t *)((uint8_t *)vt_ptr(q->t, q->driver) + 4 + 2 * q->size), q->used,
				 __ATOMIC_RELEASE);
	return true;
}
