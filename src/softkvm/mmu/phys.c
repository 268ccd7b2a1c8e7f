/*
 * Guest physical memory: the slot table, dirty logs and code versions.
 *
 * The table is immutable once published. It is replaced with the world stopped and `slots_lock` held
 * for writing, so a running vCPU needs no lock and everybody else takes the lock for reading.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "softkvm/api/api.h"
#include "softkvm/cpu.h"
#include "softkvm/fault.h"
#include "softkvm/mmu/phys.h"
#include "softkvm/vm.h"

#define MAX_SLOT_PAGES ((1ull << 31) - 1)

struct slot *phys_slot(struct vm *vm, uint64_t gpa)
{
	const struct slot_table *t = atomic_load_explicit(&vm->slots, memory_order_acquire);
	unsigned lo = 0, hi = t ? t->n : 0;

	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;
		struct slot *s = t->s[mid];

		if (gpa < s->gpa)
			hi = mid;
		else if (gpa - s->gpa >= s->size)
			lo = mid + 1;
		else
			return s;
	}
	return NULL;
}

uint8_t *phys_ptr(struct vm *vm, uint64_t gpa, uint64_t *left, bool *ro, struct slot **slot)
{
	struct slot *s = phys_slot(vm, gpa);

	if (!s)
		return NULL;
	if (left)
		*left = s->size - (gpa - s->gpa);
	if (ro)
		*ro = s->flags & KVM_MEM_READONLY;
	if (slot)
		*slot = s;
	return s->host + (gpa - s->gpa);
}

void phys_mark_dirty(struct vm *vm, struct cpu *c, struct slot *s, uint64_t gpa)
{
	if (!s->dirty)
		return;
	uint64_t page = (gpa - s->gpa) >> 12, bit = 1ull << (page & 63);
	if (atomic_load_explicit(&s->dirty[page / 64], memory_order_relaxed) & bit)
		return;
	if (!(atomic_fetch_or(&s->dirty[page / 64], bit) & bit) && vm->ring_entries)
		ring_push(vm, c, s, page);
}

void page_code_written(_Atomic uint32_t *ver)
{
	uint32_t v = atomic_load_explicit(ver, memory_order_relaxed);

	while ((v & VER_CODE) && !atomic_compare_exchange_weak(ver, &v, ver_next(v)))
		;
}

void phys_code_written(struct vm *vm, uint64_t gpa, uint64_t len)
{
	atomic_thread_fence(memory_order_seq_cst);      /* the bytes are there: mmu_code_lines() */
	while (len) {
		struct slot *s = phys_slot(vm, gpa);
		uint64_t n = 4096 - (gpa & 4095), at = s ? (gpa - s->gpa) >> 12 : 0;

		if (s && (atomic_load(&s->lines[at]) & page_lines(gpa & 4095, (unsigned)MIN(n, len))))
			page_code_written(&s->ver[at]);
		if (n >= len)
			break;
		gpa += n;
		len -= n;
	}
}

/* Copy between `buf` and RAM; all of the range is checked before the first byte moves. */
static int phys_copy(struct vm *vm, uint64_t gpa, void *buf, unsigned len, bool write)
{
	for (int pass = 0; pass < 2; pass++) {
		uint8_t *b = buf;
		uint64_t a = gpa;
		unsigned todo = len;

		while (todo) {
			uint64_t left = 0;
			bool ro;
			struct slot *s;
			uint8_t *p = phys_ptr(vm, a, &left, &ro, &s);
			unsigned n = (unsigned)MIN(MIN(left, 4096 - (a & 4095)), (uint64_t)todo);

			if (!p || (write && ro))
				return -EFAULT;
			if (pass && write) {
				if (fault_copy(p, b, n))
					return -EFAULT;
				phys_mark_dirty(vm, NULL, s, a);
				page_code_written(&s->ver[(a - s->gpa) >> 12]);
			} else if (pass) {
				if (fault_copy(b, p, n))
					return -EFAULT;
			}
			a += n;
			b += n;
			todo -= n;
		}
	}
	return 0;
}

int phys_read(struct vm *vm, uint64_t gpa, void *buf, unsigned len)
{
	pthread_rwlock_rdlock(&vm->slots_lock);
	int r = phys_copy(vm, gpa, buf, len, false);
	pthread_rwlock_unlock(&vm->slots_lock);
	return r;
}

int phys_write(struct vm *vm, uint64_t gpa, const void *buf, unsigned len)
{
	pthread_rwlock_rdlock(&vm->slots_lock);
	int r = phys_copy(vm, gpa, (void *)(uintptr_t)buf, len, true);
	pthread_rwlock_unlock(&vm->slots_lock);
	return r;
}

/* -- changing the table ------------------------------------------------------------------------ */

/*
 * Lazily populated, so that a big slot costs only what is touched; small ones from the heap, as the kernel allows a
 * process fewer mappings than a VM has slots.
 */
#define HEAP_BYTES 65536u

static void *alloc_pages(uint64_t bytes)
{
	if (bytes <= HEAP_BYTES)
		return calloc(1, bytes);
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static void free_pages(void *p, uint64_t bytes)
{
	if (bytes <= HEAP_BYTES)
		free(p);
	else if (p)
		munmap(p, bytes);
}

static uint64_t dirty_bytes(uint64_t size) { return ALIGN_UP(size >> 12, 64) / 8; }
static uint64_t line_bytes(uint64_t size) { return (size >> 12) * sizeof(uint64_t); }
static uint64_t ver_bytes(uint64_t size) { return (size >> 12) * sizeof(uint32_t); }

/* A new log; with KVM_DIRTY_LOG_INITIALLY_SET every page counts as written at first. */
static _Atomic uint64_t *dirty_new(uint64_t size, bool set)
{
	_Atomic uint64_t *d = alloc_pages(dirty_bytes(size));
	uint64_t pages = size >> 12;

	for (uint64_t i = 0; d && set && i * 64 < pages; i++)
		d[i] = pages - i * 64 < 64 ? (1ull << (pages - i * 64)) - 1 : ~0ull;
	return d;
}

static void slot_free(struct slot *s)
{
	if (!s)
		return;
	free_pages((void *)s->dirty, dirty_bytes(s->size));
	free_pages((void *)s->ver, ver_bytes(s->size));
	free_pages((void *)s->lines, line_bytes(s->size));
	free(s);
}

/* A new slot from `r`; NULL when out of memory. */
static struct slot *slot_new(const struct kvm_userspace_memory_region *r, bool set)
{
	struct slot *s = calloc(1, sizeof *s);

	if (!s)
		return NULL;
	s->id = r->slot & 0xffff;
	s->as_id = (uint16_t)(r->slot >> 16);
	s->flags = r->flags;
	s->gpa = r->guest_phys_addr;
	s->size = r->memory_size;
	s->host = (uint8_t *)(uintptr_t)r->userspace_addr;
	s->ver = alloc_pages(ver_bytes(s->size));
	s->lines = alloc_pages(line_bytes(s->size));
	if (s->ver && s->lines && (s->flags & KVM_MEM_LOG_DIRTY_PAGES))
		s->dirty = dirty_new(s->size, set);
	if (!s->ver || !s->lines || ((s->flags & KVM_MEM_LOG_DIRTY_PAGES) && !s->dirty)) {
		slot_free(s);
		return NULL;
	}
	return s;
}

/* Slots by number, under vm->lock: a VM may have 32764, and each change looks for one. */
static struct slot *slot_by_id(const struct vm *vm, uint32_t id)
{
	return id < vm->by_id_n ? vm->by_id[id] : NULL;
}

struct slot *phys_slot_by_id(struct vm *vm, uint32_t id)
{
	return id >> 16 ? NULL : slot_by_id(vm, id);
}

/* Room for the number; all of it at once past the first few. */
static int by_id_reserve(struct vm *vm, uint32_t id)
{
	unsigned n = id < 64 ? 64 : VM_MAX_SLOTS;
	struct slot **a;

	if (id < vm->by_id_n)
		return 0;
	a = realloc(vm->by_id, n * sizeof(struct slot *));
	if (!a)
		return -ENOMEM;
	memset(a + vm->by_id_n, 0, (n - vm->by_id_n) * sizeof(struct slot *));
	vm->by_id = a;
	vm->by_id_n = n;
	return 0;
}

/* Index of the first slot at or above `gpa`. */
static unsigned table_find(const struct slot_table *t, uint64_t gpa)
{
	unsigned lo = 0, hi = t ? t->n : 0;

	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;

		if (t->s[mid]->gpa < gpa)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

/* Table with `old` left out and `new` put in its place by address; either may be NULL. */
static struct slot_table *table_with(const struct slot_table *t, const struct slot *old, struct slot *new)
{
	unsigned n = t ? t->n : 0, at = old ? table_find(t, old->gpa) : n;
	struct slot_table *out = malloc(sizeof *out + (n + 1) * sizeof(struct slot *));

	if (!out)
		return NULL;
	if (n)
		memcpy(out->s, t->s, at * sizeof(struct slot *));
	if (at < n)
		memcpy(out->s + at, t->s + at + 1, (n - at - 1) * sizeof(struct slot *));
	out->n = n - (at < n);
	if (!new)
		return out;
	at = table_find(out, new->gpa);
	memmove(out->s + at + 1, out->s + at, (out->n - at) * sizeof(struct slot *));
	out->s[at] = new;
	out->n++;
	return out;
}

/* Slots do not overlap each other, so those that reach the range stand together. */
static bool table_overlaps(const struct slot_table *t, const struct slot *skip, uint64_t gpa, uint64_t size)
{
	unsigned i = table_find(t, gpa);

	/* The one before the first at or above the start may reach into it; those further down end where it begins. */
	for (i -= i > 0; t && i < t->n && t->s[i]->gpa < gpa + size; i++)
		if (t->s[i] != skip && ranges_overlap(gpa, size, t->s[i]->gpa, t->s[i]->size))
			return true;
	return false;
}

/* Publish `t` with the world stopped; vCPUs drop what they cached from the old one. */
static void table_publish(struct vm *vm, struct slot_table *t)
{
	vm_pause_all(vm, NULL);
	pthread_rwlock_wrlock(&vm->slots_lock);
	struct slot_table *old = atomic_exchange(&vm->slots, t);
	watch_forget(vm);
	vm_request_all(vm, REQ_TLB | REQ_BLOCKS, NULL);
	pthread_rwlock_unlock(&vm->slots_lock);
	vm_resume_all(vm, NULL);
	free(old);
}

/* The region's own rules, as Linux checks them. */
static int region_check(const struct kvm_userspace_memory_region *r)
{
	if (r->flags & ~(uint32_t)(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY))
		return -EINVAL;
	if ((r->memory_size | r->guest_phys_addr | r->userspace_addr) & 4095)
		return -EINVAL;
	if ((r->slot & 0xffff) >= VM_MAX_SLOTS || r->slot >> 16)
		return -EINVAL;
	if (r->guest_phys_addr + r->memory_size < r->guest_phys_addr || r->memory_size >> 12 > MAX_SLOT_PAGES)
		return -EINVAL;
	if (r->userspace_addr >> 47 || r->userspace_addr + r->memory_size > 1ull << 47)
		return -EINVAL;
	return 0;
}

/* Dirty logging switched on or off; the slot itself stays. */
static int region_set_flags(struct vm *vm, struct slot *s, uint32_t flags)
{
	_Atomic uint64_t *bitmap = NULL, *old = s->dirty;

	if (flags & KVM_MEM_LOG_DIRTY_PAGES) {
		bitmap = dirty_new(s->size, vm->dirty_initially_set && !vm->ring_entries);
		if (!bitmap)
			return -ENOMEM;
	}
	vm_pause_all(vm, NULL);
	pthread_rwlock_wrlock(&vm->slots_lock);
	s->dirty = bitmap;
	s->flags = flags;
	vm_request_all(vm, REQ_TLB, NULL);
	pthread_rwlock_unlock(&vm->slots_lock);
	vm_resume_all(vm, NULL);
	free_pages((void *)old, dirty_bytes(s->size));
	return 0;
}

/* Replace `old` (may be NULL) by what `r` describes (size 0: nothing). */
static int region_replace(struct vm *vm, struct slot *old, const struct kvm_userspace_memory_region *r)
{
	struct slot_table *t = atomic_load(&vm->slots);
	struct slot *new = NULL;

	if (r->memory_size) {
		if (table_overlaps(t, old, r->guest_phys_addr, r->memory_size))
			return -EEXIST;
		new = by_id_reserve(vm, r->slot & 0xffff) ? NULL : slot_new(r, vm->dirty_initially_set && !vm->ring_entries);
		if (!new)
			return -ENOMEM;
	}
	struct slot_table *next = table_with(t, old, new);
	if (!next) {
		slot_free(new);
		return -ENOMEM;
	}
	vm->by_id[r->slot & 0xffff] = new;
	table_publish(vm, next);
	slot_free(old);
	return 0;
}

static int set_region_locked(struct vm *vm, const struct kvm_userspace_memory_region *r)
{
	struct slot *old = slot_by_id(vm, r->slot & 0xffff);

	if (!r->memory_size)
		return old ? region_replace(vm, old, r) : -EINVAL;
	if (!old)
		return region_replace(vm, NULL, r);
	if (r->userspace_addr != (uintptr_t)old->host || r->memory_size != old->size ||
	    ((r->flags ^ old->flags) & KVM_MEM_READONLY))
		return -EINVAL;
	if (r->guest_phys_addr != old->gpa)
		return region_replace(vm, old, r);
	return r->flags == old->flags ? 0 : region_set_flags(vm, old, r->flags);
}

int phys_set_region(struct vm *vm, const struct kvm_userspace_memory_region *r)
{
	int ret = region_check(r);

	if (ret)
		return ret;
	pthread_mutex_lock(&vm->lock);
	ret = set_region_locked(vm, r);
	pthread_mutex_unlock(&vm->lock);
	return ret;
}

void phys_free(struct vm *vm)
{
	struct slot_table *t = atomic_exchange(&vm->slots, NULL);

	for (unsigned i = 0; t && i < t->n; i++)
		slot_free(t->s[i]);
	free(t);
	watch_free(vm);
	free(vm->by_id);
	vm->by_id = NULL;
	vm->by_id_n = 0;
}

/* -- dirty log ---------------------------------------------------------------------------------- */

static struct slot *logged_slot(struct vm *vm, uint32_t slot, int *err)
{
	if (vm->ring_entries) {         /* the ring instead */
		*err = -ENXIO;
		return NULL;
	}
	*err = slot >> 16 || (slot & 0xffff) >= VM_MAX_SLOTS ? -EINVAL : -ENOENT;
	struct slot *s = *err == -EINVAL ? NULL : slot_by_id(vm, slot);
	return s && s->dirty ? s : NULL;
}

/* Take the bitmap; clear it too when asked, and let no vCPU keep a write entry from before. */
static void dirty_take(struct vm *vm, struct slot *s, uint64_t *out, bool clear)
{
	uint64_t words = dirty_bytes(s->size) / 8, any = 0;

	if (clear)
		vm_pause_all(vm, NULL);
	for (uint64_t i = 0; i < words; i++) {
		out[i] = clear && atomic_load_explicit(&s->dirty[i], memory_order_relaxed) ?
			atomic_exchange(&s->dirty[i], 0) : atomic_load_explicit(&s->dirty[i], memory_order_relaxed);
		any |= out[i];
	}
	if (clear) {
		if (any)
			vm_request_all(vm, REQ_TLB, NULL);
		vm_resume_all(vm, NULL);
	}
}

/* Through a buffer of ours: a bad pointer must not fault while the world is stopped. */
static int dirty_give(struct vm *vm, struct slot *s, void *to)
{
	uint64_t bytes = dirty_bytes(s->size);
	uint64_t *buf = alloc_pages(bytes);
	int ret;

	if (!buf)
		return -ENOMEM;
	dirty_take(vm, s, buf, !vm->manual_dirty_clear);
	ret = copy_to_client((uintptr_t)to, buf, bytes);
	free_pages(buf, bytes);
	return ret;
}

int phys_get_dirty(struct vm *vm, const struct kvm_dirty_log *d)
{
	int ret;

	pthread_mutex_lock(&vm->lock);
	struct slot *s = logged_slot(vm, d->slot, &ret);
	if (s)
		ret = dirty_give(vm, s, d->dirty_bitmap);
	pthread_mutex_unlock(&vm->lock);
	return ret;
}

static void dirty_clear(struct vm *vm, struct slot *s, const struct kvm_clear_dirty_log *d, const uint64_t *in)
{
	vm_pause_all(vm, NULL);
	for (uint64_t i = 0; i * 64 < d->num_pages; i++) {
		uint64_t left = d->num_pages - i * 64, mask = left < 64 ? (1ull << left) - 1 : ~0ull;
		atomic_fetch_and(&s->dirty[d->first_page / 64 + i], ~(in[i] & mask));
	}
	vm_request_all(vm, REQ_TLB, NULL);
	vm_resume_all(vm, NULL);
}

static int dirty_clear_from(struct vm *vm, struct slot *s, const struct kvm_clear_dirty_log *d)
{
	uint64_t bytes = (d->num_pages + 63ull) / 64 * 8;
	uint64_t *buf;
	int ret;

	if (!bytes)
		return 0;
	buf = alloc_pages(bytes);
	if (!buf)
		return -ENOMEM;
	ret = copy_from_client(buf, (uintptr_t)d->dirty_bitmap, bytes);
	if (!ret)
		dirty_clear(vm, s, d, buf);
	free_pages(buf, bytes);
	return ret;
}

int phys_clear_dirty(struct vm *vm, const struct kvm_clear_dirty_log *d)
{
	int ret;

	pthread_mutex_lock(&vm->lock);
	struct slot *s = logged_slot(vm, d->slot, &ret);
	uint64_t pages = s ? s->size >> 12 : 0;
	if (s && ((d->first_page & 63) || d->first_page > pages || d->num_pages > pages - d->first_page ||
		  ((d->num_pages & 63) && d->first_page + d->num_pages != pages)))
		s = NULL, ret = -EINVAL;
	if (s)
		ret = dirty_clear_from(vm, s, d);
	pthread_mutex_unlock(&vm->lock);
	return ret;
}
