/*
 * What the engine itself takes of port and memory accesses: chips, ioeventfds, coalesced zones.
 *
 * The ioeventfds and zones are few and change rarely; vCPUs search them under a read lock.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "softkvm/bus.h"
#include "softkvm/irq/internal.h"

#define ZONES_MAX 1000
#define IOEVENTFDS_MAX 65536

struct ioeventfd {
	uint64_t addr, match, ident;
	uint32_t len;
	int fd, client_fd;
	bool pio, wildcard;
};

struct bus {
	pthread_rwlock_t lock;
	pthread_mutex_t ring_lock;
	struct ioeventfd *ev;           /* sorted by address */
	unsigned nev, evcap;
	struct kvm_coalesced_mmio_zone zone[ZONES_MAX];
	unsigned nzones;
	_Atomic unsigned used;          /* nev + nzones: nothing to search without */
};

int bus_create(struct vm *vm)
{
	struct bus *b = calloc(1, sizeof *b);

	if (!b)
		return -ENOMEM;
	pthread_rwlock_init(&b->lock, NULL);
	pthread_mutex_init(&b->ring_lock, NULL);
	vm->bus = b;
	return 0;
}

void bus_destroy(struct vm *vm)
{
	struct bus *b = vm->bus;

	if (!b)
		return;
	for (unsigned i = 0; i < b->nev; i++)
		close(b->ev[i].fd);
	free(b->ev);
	pthread_rwlock_destroy(&b->lock);
	pthread_mutex_destroy(&b->ring_lock);
	free(b);
	vm->bus = NULL;
}

/* -- ioeventfd --------------------------------------------------------------------------------- */
/* First entry at or above `addr`. */
static unsigned ev_lower(const struct bus *b, uint64_t addr)
{
	unsigned lo = 0, hi = b->nev;

	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;

		if (b->ev[mid].addr < addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

static uint64_t access_value(const void *data, unsigned len)
{
	uint64_t v = 0;

	memcpy(&v, data, MIN(len, 8u));
	return v;
}

static bool ev_hit(struct bus *b, bool pio, uint64_t addr, unsigned len, const void *data)
{
	for (unsigned i = ev_lower(b, addr); i < b->nev && b->ev[i].addr == addr; i++) {
		const struct ioeventfd *e = &b->ev[i];

		if (e->pio != pio || (e->len && e->len != len))
			continue;
		if (e->len && !e->wildcard && access_value(data, len) != e->match)
			continue;
		eventfd_signal(e->fd);
		return true;
	}
	return false;
}

static bool ev_clash(const struct bus *b, const struct ioeventfd *n)
{
	for (unsigned i = ev_lower(b, n->addr); i < b->nev && b->ev[i].addr == n->addr; i++) {
		const struct ioeventfd *e = &b->ev[i];

		if (e->pio == n->pio && (!e->len || !n->len ||
		    (e->len == n->len && (e->wildcard || n->wildcard || e->match == n->match))))
			return true;
	}
	return false;
}

static int ev_add(struct bus *b, struct ioeventfd *n)
{
	unsigned at = ev_lower(b, n->addr), cap = b->evcap ? b->evcap * 2 : 16;
	struct ioeventfd *p;

	if (ev_clash(b, n))
		return -EEXIST;
	if (b->nev >= IOEVENTFDS_MAX)
		return -ENOSPC;
	if (b->nev == b->evcap) {
		p = realloc(b->ev, cap * sizeof *p);
		if (!p)
			return -ENOMEM;
		b->ev = p;
		b->evcap = cap;
	}
	n->fd = fcntl(n->client_fd, F_DUPFD_CLOEXEC, 0);
	if (n->fd < 0)
		return -errno;
	memmove(b->ev + at + 1, b->ev + at, (b->nev - at) * sizeof *b->ev);
	b->ev[at] = *n;
	b->nev++;
	return 0;
}

static int ev_remove(struct bus *b, const struct ioeventfd *n)
{
	for (unsigned i = ev_lower(b, n->addr); i < b->nev && b->ev[i].addr == n->addr; i++) {
		struct ioeventfd *e = &b->ev[i];

		if (e->pio != n->pio || e->len != n->len || e->wildcard != n->wildcard ||
		    (!e->wildcard && e->match != n->match))
			continue;
		if (e->ident && n->ident ? e->ident != n->ident : e->client_fd != n->client_fd)
			continue;
		close(e->fd);
		memmove(e, e + 1, (b->nev - i - 1) * sizeof *e);
		b->nev--;
		return 0;
	}
	return -ENOENT;
}

static int ev_from_kvm(const struct kvm_ioeventfd *k, struct ioeventfd *n)
{
	int err;

	if (k->len > 8 || (k->len & (k->len - 1)) || k->addr + k->len < k->addr ||
	    (k->flags & ~(KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN)) ||
	    (!k->len && (k->flags & KVM_IOEVENTFD_FLAG_DATAMATCH)))
		return -EINVAL;
	*n = (struct ioeventfd){
		.addr = k->addr, .len = k->len, .client_fd = k->fd, .pio = k->flags & KVM_IOEVENTFD_FLAG_PIO,
		.wildcard = !(k->flags & KVM_IOEVENTFD_FLAG_DATAMATCH), .match = k->datamatch,
	};
	return eventfd_identify(k->fd, &n->ident, &err) ? 0 : err;
}

int bus_ioeventfd(struct vm *vm, const struct kvm_ioeventfd *k)
{
	struct bus *b = vm->bus;
	struct ioeventfd n;
	int r = ev_from_kvm(k, &n);

	if (r)
		return r;
	pthread_rwlock_wrlock(&b->lock);
	r = k->flags & KVM_IOEVENTFD_FLAG_DEASSIGN ? ev_remove(b, &n) : ev_add(b, &n);
	atomic_store(&b->used, b->nev + b->nzones);
	pthread_rwlock_unlock(&b->lock);
	return r;
}

/* -- coalesced zones --------------------------------------------------------------------------- */
static bool zone_has(const struct kvm_coalesced_mmio_zone *z, bool pio, uint64_t addr, uint64_t len)
{
	return !!z->pio == pio && addr >= z->addr && !range_bad(addr - z->addr, len, z->size);
}

int bus_register_coalesced(struct vm *vm, const struct kvm_coalesced_mmio_zone *z)
{
	struct bus *b = vm->bus;
	int r = -ENOSPC;

	if (z->pio > 1)
		return -EINVAL;
	pthread_rwlock_wrlock(&b->lock);
	if (b->nzones < ZONES_MAX) {
		b->zone[b->nzones++] = *z;
		r = 0;
	}
	atomic_store(&b->used, b->nev + b->nzones);
	pthread_rwlock_unlock(&b->lock);
	return r;
}

int bus_unregister_coalesced(struct vm *vm, const struct kvm_coalesced_mmio_zone *z)
{
	struct bus *b = vm->bus;

	if (z->pio > 1)
		return -EINVAL;
	pthread_rwlock_wrlock(&b->lock);
	for (unsigned i = 0; i < b->nzones; )
		if (zone_has(&b->zone[i], z->pio, z->addr, z->size))
			b->zone[i] = b->zone[--b->nzones];
		else
			i++;
	atomic_store(&b->used, b->nev + b->nzones);
	pthread_rwlock_unlock(&b->lock);
	return 0;
}

/* Append to the ring that the client reads. It can write the indices: they are checked every time. */
static bool ring_put(struct cpu *c, bool pio, uint64_t addr, unsigned len, const void *data)
{
	const unsigned max = (4096 - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio);
	struct kvm_coalesced_mmio_ring *ring = c->vm->ring;
	struct kvm_coalesced_mmio *e;
	uint32_t first, last;
	bool ok;

	if (!ring)
		return false;
	pthread_mutex_lock(&c->vm->bus->ring_lock);
	first = __atomic_load_n(&ring->first, __ATOMIC_ACQUIRE);
	last = __atomic_load_n(&ring->last, __ATOMIC_RELAXED);
	ok = first < max && last < max && (last + 1) % max != first;
	if (ok) {
		e = (struct kvm_coalesced_mmio *)((char *)ring + sizeof *ring) + last;
		e->phys_addr = addr;
		e->len = len;
		e->pio = pio;
		memcpy(e->data, data, MIN(len, 8u));
		__atomic_store_n(&ring->last, (last + 1) % max, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&c->vm->bus->ring_lock);
	return ok;
}

static bool bus_write(struct cpu *c, bool pio, uint64_t addr, unsigned len, const void *data)
{
	struct bus *b = c->vm->bus;
	bool hit, zone = false;

	if (!b || !atomic_load_explicit(&b->used, memory_order_acquire))
		return false;
	pthread_rwlock_rdlock(&b->lock);
	hit = ev_hit(b, pio, addr, len, data);
	for (unsigned i = 0; !hit && !zone && i < b->nzones; i++)
		zone = zone_has(&b->zone[i], pio, addr, len);
	pthread_rwlock_unlock(&b->lock);
	return hit || (zone && ring_put(c, pio, addr, len, data));
}

/* -- dispatch ---------------------------------------------------------------------------------- */
bool bus_mmio(struct cpu *c, uint64_t gpa, unsigned len, bool write, void *data)
{
	struct irqchip *ic = c->vm->irqchip;

	if (!len || len > 8)
		return false;
	if (c->lapic && lapic_mmio(c->lapic, gpa, len, write, data))
		return true;
	/* The I/O APIC's page cannot move: its base is only ever set by KVM_SET_IRQCHIP. */
	if (ic && !ic->split) {
		uint64_t off = gpa - __atomic_load_n(&ic->ioapic.base, __ATOMIC_RELAXED);

		if (off < 0x100) {
			irqchip_lock(ic);
			ioapic_mmio(ic, off, len, write, data);
			irqchip_unlock(ic);
			return true;
		}
	}
	return write && bus_write(c, false, gpa, len, data);
}

bool bus_pio(struct cpu *c, uint16_t port, unsigned len, bool write, void *data)
{
	struct irqchip *ic = c->vm->irqchip;
	bool pic, pit;

	if (ic && !ic->split && len) {
		pic = pic_owns(port, len);
		pit = !pic && ic->pit && pit_owns(ic->pit, port, len);
		if (pic || pit) {
			irqchip_lock(ic);
			if (pic)
				pic_pio(ic, port, len, write, data);
			else
				pit_pio(ic, port, len, write, data);
			irqchip_unlock(ic);
			return true;
		}
	}
	return write && len && len <= 8 && bus_write(c, true, port, len, data);
}
