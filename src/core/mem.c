/*
 * Guest memory as slots over memfds.
 *
 * The sorted list of ranges is immutable once published, so that a lookup on any thread takes no
 * lock; adding a range publishes a longer copy and keeps the old one until the machine ends (there
 * are as many as ranges, a handful).
 */
#include "core/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "kvm/kvm.h"

enum { PAGE = 4096 };
#define HUGE_SIZE (2ULL << 20)
#ifndef MADV_COLLAPSE           /* Linux 6.1; not yet in glibc 2.36 */
#define MADV_COLLAPSE 25
#endif

struct slot {
	struct mem_range r;
	char *name;
	unsigned id;
	void *area;             /* the whole reservation around r.host */
	size_t area_len;
	uint64_t *dirty;        /* one bit per page while logging, else NULL */
};

struct view {
	struct view *older;
	unsigned n;
	struct slot *slot[];    /* ascending, disjoint */
};

struct guest_mem {
	struct kvm_vm *vm;
	struct view *view;      /* atomic */
	pthread_mutex_t lock;   /* writers */
	uint64_t ram_size;
	bool logging;           /* atomic */
};

int guest_mem_create(struct guest_mem **out, struct kvm_vm *vm, struct err *err)
{
	struct guest_mem *m = calloc(1, sizeof *m);
	if (m)
		m->view = calloc(1, sizeof *m->view);
	if (!m || !m->view) {
		free(m);
		return err_set(err, -ENOMEM, "guest memory: out of memory");
	}
	m->vm = vm;
	pthread_mutex_init(&m->lock, NULL);
	*out = m;
	return 0;
}

static void slot_free(struct slot *s)
{
	if (s->area)
		munmap(s->area, s->area_len);
	if (s->r.fd >= 0)
		close(s->r.fd);
	free(s->dirty);
	free(s->name);
	free(s);
}

void guest_mem_destroy(struct guest_mem *m)
{
	if (!m)
		return;
	struct view *v = m->view;
	for (unsigned i = 0; i < v->n; i++) {
		struct slot *s = v->slot[i];
		if (m->vm)
			kvm_vm_set_slot(m->vm, s->id, s->r.gpa, 0, NULL, 0, NULL);
		slot_free(s);
	}
	while (v) {
		struct view *older = v->older;
		free(v);
		v = older;
	}
	pthread_mutex_destroy(&m->lock);
	free(m);
}

/* The file of memory that other processes may map, or that the host's pool of huge pages gives. */
static int make_file(struct slot *s, bool huge, struct err *err)
{
	int fd = memfd_create(s->name, MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));

	if (fd < 0)
		return err_set_errno(err, -errno, "memory '%s': memfd", s->name);
	s->r.fd = fd;
	if (ftruncate(fd, (off_t)s->r.size))
		return err_set_errno(err, -errno, "memory '%s': cannot reserve %llu MiB", s->name,
				     (unsigned long long)(s->r.size >> 20));
	return 0;
}

/*
 * Map the memory at an address congruent to the guest's modulo 2 MiB, so that KVM can use huge pages, with an
 * inaccessible page or more on either side. Private memory is anonymous: most hosts give that huge pages for the asking, and
 * shared memory none.
 */
static int map_slot(struct slot *s, bool huge, bool private, struct err *err)
{
	uint64_t size = s->r.size;
	int r = huge || !private ? make_file(s, huge, err) : 0;

	if (r)
		return r;
	if (size > SIZE_MAX - 3 * HUGE_SIZE)
		return err_set(err, -ENOMEM, "memory '%s': %llu MiB is more than a process can map", s->name,
			       (unsigned long long)(size >> 20));
	s->area_len = size + 3 * HUGE_SIZE;
	void *area = mmap(NULL, s->area_len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		return err_set_errno(err, -errno, "memory '%s': cannot map %llu MiB", s->name,
				     (unsigned long long)(size >> 20));
	s->area = area;
	uintptr_t host = ALIGN_UP((uintptr_t)area + PAGE, HUGE_SIZE) + (s->r.gpa & (HUGE_SIZE - 1));
	/* Huge pages are reserved now: without that a pool that is too small is a SIGBUS later. */
	void *p = mmap((void *)host, size, PROT_READ | PROT_WRITE,
		       MAP_FIXED | (s->r.fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) | (huge ? 0 : MAP_NORESERVE), s->r.fd, 0);
	if (p == MAP_FAILED)
		return err_set(err, -ENOMEM, "memory '%s': cannot map %llu MiB%s%s", s->name,
			       (unsigned long long)(size >> 20), huge ? " of huge pages" : ": ",
			       huge ? " (see /proc/sys/vm/nr_hugepages)" : strerror(errno));
	s->r.host = p;
	if (!huge)
		madvise(p, size, MADV_HUGEPAGE); /* advice */
	return 0;
}

/* From the start of the file: what comes from huge pages can be mapped at multiples of their size only. */
static int map_foreign(struct slot *s, int fd, uint64_t off, struct err *err)
{
	struct stat st;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || range_bad(off, s->r.size, (uint64_t)st.st_size))
		return err_set(err, -EINVAL, "memory '%s': its file is not %llu bytes long", s->name, (unsigned long long)(off + s->r.size));
	s->r.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	s->r.fd_off = off;
	void *p = s->r.fd < 0 ? MAP_FAILED : mmap(NULL, off + s->r.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, s->r.fd, 0);
	if (p == MAP_FAILED)
		return err_set_errno(err, -errno, "memory '%s': cannot map it", s->name);
	s->area = p;
	s->area_len = off + s->r.size;
	s->r.host = (uint8_t *)p + off;
	return 0;
}

/* Bytes that the host can give without killing somebody, UINT64_MAX if it does not say. */
static uint64_t host_available(void)
{
	uint64_t free = UINT64_MAX, swap = 0;
	FILE *f = fopen("/proc/meminfo", "re");
	char line[128];

	while (f && fgets(line, sizeof line, f)) {
		unsigned long long kib;

		if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
			free = (uint64_t)kib << 10;
		else if (sscanf(line, "SwapFree: %llu kB", &kib) == 1)
			swap = (uint64_t)kib << 10;
	}
	if (f)
		fclose(f);
	return free == UINT64_MAX ? free : free + swap;
}

int guest_mem_check(const struct mem_backing *b, uint64_t size, struct err *err)
{
	uint64_t there = b->prealloc && !b->huge ? host_available() : UINT64_MAX;      /* huge pages are reserved when they are mapped */

	if (size <= there)
		return 0;
	return err_set(err, -ENOMEM, "cannot allocate %llu MiB of memory now: the host has %llu", (unsigned long long)(size >> 20),
		       (unsigned long long)(there >> 20));
}

static int prealloc_slot(struct slot *s, struct err *err)
{
#ifdef MADV_POPULATE_WRITE
	if (!madvise(s->r.host, s->r.size, MADV_POPULATE_WRITE)) {
		madvise(s->r.host, s->r.size, MADV_COLLAPSE); /* into huge pages, memfds too; advice */
		return 0;
	}
	if (errno != EINVAL)
		return err_set_errno(err, -errno, "memory '%s': cannot allocate %llu MiB now", s->name,
				     (unsigned long long)(s->r.size >> 20));
#endif
	/* Before Linux 5.14. posix_fallocate() fails where touching would kill; anonymous memory has nothing like it. */
	if (s->r.fd < 0) {
		for (uint64_t at = 0; at < s->r.size; at += PAGE)
			((volatile uint8_t *)s->r.host)[at] = 0;
		return 0;
	}
	int r = posix_fallocate(s->r.fd, 0, (off_t)s->r.size);
	return r ? err_set_errno(err, -r, "memory '%s': cannot allocate %llu MiB now", s->name,
				 (unsigned long long)(s->r.size >> 20)) : 0;
}

static int check_place(struct guest_mem *m, const char *name, uint64_t gpa, uint64_t size, struct err *err)
{
	if (!size || (gpa | size) & (PAGE - 1) || gpa + (size - 1) < gpa)
		return err_set(err, -EINVAL, "memory '%s': [0x%llx, +0x%llx) is empty, wraps or is not page aligned",
			       name, (unsigned long long)gpa, (unsigned long long)size);
	for (unsigned i = 0; i < m->view->n; i++) {
		const struct mem_range *r = &m->view->slot[i]->r;
		if (ranges_overlap(gpa, size, r->gpa, r->size))
			return err_set(err, -EBUSY, "memory '%s' at 0x%llx overlaps '%s' at 0x%llx", name,
				       (unsigned long long)gpa, r->name, (unsigned long long)r->gpa);
	}
	return 0;
}

static int publish(struct guest_mem *m, struct slot *s)
{
	struct view *old = m->view;
	struct view *v = malloc(sizeof *v + (old->n + 1) * sizeof v->slot[0]);
	if (!v)
		return -ENOMEM;
	unsigned i = 0;
	while (i < old->n && old->slot[i]->r.gpa < s->r.gpa) {
		v->slot[i] = old->slot[i];
		i++;
	}
	v->slot[i] = s;
	memcpy(&v->slot[i + 1], &old->slot[i], (old->n - i) * sizeof v->slot[0]);
	v->n = old->n + 1;
	v->older = old;
	__atomic_store_n(&m->view, v, __ATOMIC_RELEASE);
	return 0;
}

static int set_kvm_slot(struct guest_mem *m, struct slot *s, struct err *err)
{
	uint32_t flags = 0;
	if (!m->vm)
		return 0;
	if (s->r.rom && kvm_check_extension(kvm_vm_system(m->vm), KVM_CAP_READONLY_MEM) > 0)
		flags |= KVM_MEM_READONLY;
	return kvm_vm_set_slot(m->vm, s->id, s->r.gpa, s->r.size, s->r.host, flags, err);
}

static int add_locked(struct guest_mem *m, struct slot *s, const struct mem_backing *b, struct err *err)
{
	int r = check_place(m, s->name, s->r.gpa, s->r.size, err);
	if (!r && b && b->huge && (s->r.gpa | s->r.size) & (HUGE_SIZE - 1))
		r = err_set(err, -EINVAL, "memory '%s': size and address must be multiples of 2 MiB for huge pages", s->name);
	if (!r)
		r = s->r.fd >= 0 ? map_foreign(s, s->r.fd, s->r.fd_off, err) : map_slot(s, b && b->huge, b && b->private, err);
	if (!r && b && b->prealloc)
		r = prealloc_slot(s, err);
	if (!r && b && b->no_dump && madvise(s->r.host, s->r.size, MADV_DONTDUMP))
		r = err_set_errno(err, -errno, "memory '%s': cannot keep it out of core dumps", s->name);
	s->id = m->view->n;
	if (!r)
		r = set_kvm_slot(m, s, err);
	if (r)
		return r;
	r = publish(m, s);
	if (r && m->vm)
		kvm_vm_set_slot(m->vm, s->id, s->r.gpa, 0, NULL, 0, NULL);
	return r ? err_set(err, r, "memory '%s': out of memory", s->name) : 0;
}

static int add(struct guest_mem *m, const char *name, uint64_t gpa, uint64_t size, bool rom,
	       const struct mem_backing *b, int fd, uint64_t off, struct err *err)
{
	struct slot *s = calloc(1, sizeof *s);
	if (s)
		s->name = strdup(name);
	if (!s || !s->name) {
		free(s);
		return err_set(err, -ENOMEM, "memory '%s': out of memory", name);
	}
	s->r = (struct mem_range){ .name = s->name, .gpa = gpa, .size = size, .rom = rom, .fd = fd, .fd_off = off };
	pthread_mutex_lock(&m->lock);
	int r = add_locked(m, s, b, err);
	if (!r && !rom)
		m->ram_size += size;
	pthread_mutex_unlock(&m->lock);
	if (r && s->r.fd == fd)
		s->r.fd = -1; /* still the caller's */
	if (r)
		slot_free(s);
	return r;
}

int guest_mem_add_ram(struct guest_mem *m, const char *name, uint64_t gpa, uint64_t size,
		      const struct mem_backing *b, struct err *err)
{
	return add(m, name, gpa, size, false, b, -1, 0, err);
}

int guest_mem_add_rom(struct guest_mem *m, const char *name, uint64_t gpa, uint64_t size, struct err *err)
{
	return add(m, name, gpa, size, true, NULL, -1, 0, err);
}

int guest_mem_add_fd(struct guest_mem *m, const char *name, uint64_t gpa, uint64_t size, int fd, uint64_t off, struct err *err)
{
	if (fd < 0 || size > SIZE_MAX - off)
		return err_set(err, -EINVAL, "memory '%s': no file, or it wraps around", name);
	return add(m, name, gpa, size, false, NULL, fd, off, err);
}

static struct slot *find_slot(struct guest_mem *m, uint64_t gpa)
{
	struct view *v = __atomic_load_n(&m->view, __ATOMIC_ACQUIRE);
	unsigned lo = 0, hi = v->n;
	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;
		struct slot *s = v->slot[mid];
		if (gpa < s->r.gpa)
			hi = mid;
		else if (gpa - s->r.gpa >= s->r.size)
			lo = mid + 1;
		else
			return s;
	}
	return NULL;
}

enum access { ACC_READ, ACC_WRITE, ACC_ROM };

/* The piece of [gpa, gpa+len) that lies in one slot; 0 when the first byte is not accessible. */
static size_t piece(struct guest_mem *m, uint64_t gpa, size_t len, enum access acc, struct slot **s)
{
	*s = find_slot(m, gpa);
	if (!*s || (acc == ACC_WRITE && (*s)->r.rom))
		return 0;
	uint64_t left = (*s)->r.size - (gpa - (*s)->r.gpa);
	return len < left ? len : (size_t)left;
}

/* True when every byte is accessible. The common case, one slot, costs one lookup. */
static bool check_range(struct guest_mem *m, uint64_t gpa, size_t len, enum access acc)
{
	if (len && gpa + (len - 1) < gpa)
		return false;
	while (len) {
		struct slot *s;
		size_t n = piece(m, gpa, len, acc, &s);
		if (!n)
			return false;
		gpa += n;
		len -= n;
	}
	return true;
}

static void mark_dirty(struct slot *s, uint64_t gpa, size_t len)
{
	uint64_t *bits = __atomic_load_n(&s->dirty, __ATOMIC_ACQUIRE);
	if (!bits || !len)
		return;
	uint64_t last = (gpa - s->r.gpa + len - 1) / PAGE;
	for (uint64_t p = (gpa - s->r.gpa) / PAGE; p <= last; p++)
		__atomic_fetch_or(&bits[p / 64], BIT(p % 64), __ATOMIC_RELAXED);
}

static void written(struct guest_mem *m, struct slot *s, uint64_t gpa, size_t len)
{
	if (__atomic_load_n(&m->logging, __ATOMIC_RELAXED))
		mark_dirty(s, gpa, len);
	if (m->vm)
		kvm_vm_code_written(m->vm, gpa, len);
}

static uint8_t *host_of(struct slot *s, uint64_t gpa)
{
	return (uint8_t *)s->r.host + (gpa - s->r.gpa);
}

int gm_read(struct guest_mem *m, uint64_t gpa, void *buf, size_t len)
{
	if (!check_range(m, gpa, len, ACC_READ))
		return -EFAULT;
	for (uint8_t *p = buf; len;) {
		struct slot *s;
		size_t n = piece(m, gpa, len, ACC_READ, &s);
		memcpy(p, host_of(s, gpa), n);
		p += n;
		gpa += n;
		len -= n;
	}
	return 0;
}

static int put(struct guest_mem *m, uint64_t gpa, const void *buf, int fill, size_t len, enum access acc)
{
	if (!check_range(m, gpa, len, acc))
		return -EFAULT;
	for (const uint8_t *p = buf; len;) {
		struct slot *s;
		size_t n = piece(m, gpa, len, acc, &s);
		if (p) {
			memcpy(host_of(s, gpa), p, n);
			p += n;
		} else {
			memset(host_of(s, gpa), fill, n);
		}
		written(m, s, gpa, n);
		gpa += n;
		len -= n;
	}
	return 0;
}

int gm_write(struct guest_mem *m, uint64_t gpa, const void *buf, size_t len)
{
	return put(m, gpa, buf, 0, len, ACC_WRITE);
}

int gm_write_rom(struct guest_mem *m, uint64_t gpa, const void *buf, size_t len)
{
	return put(m, gpa, buf, 0, len, ACC_ROM);
}

int gm_fill(struct guest_mem *m, uint64_t gpa, int byte, size_t len)
{
	return put(m, gpa, NULL, byte, len, ACC_WRITE);
}

void *gm_ptr(struct guest_mem *m, uint64_t gpa, size_t len, enum mem_dir dir)
{
	struct slot *s;
	size_t want = len ? len : 1;
	return piece(m, gpa, want, dir == MEM_WRITE ? ACC_WRITE : ACC_READ, &s) == want ? host_of(s, gpa) : NULL;
}

void gm_written(struct guest_mem *m, uint64_t gpa, size_t len)
{
	while (len) {
		struct slot *s;
		size_t n = piece(m, gpa, len, ACC_ROM, &s);
		if (!n)
			return;
		written(m, s, gpa, n);
		gpa += n;
		len -= n;
	}
}

int gm_read_u16(struct guest_mem *m, uint64_t gpa, uint16_t *v)
{
	const uint16_t *p = gpa & 1 ? NULL : gm_ptr(m, gpa, 2, MEM_READ);
	if (!p)
		return -EFAULT;
	*v = __atomic_load_n(p, __ATOMIC_ACQUIRE);
	return 0;
}

int gm_write_u16(struct guest_mem *m, uint64_t gpa, uint16_t v)
{
	uint16_t *p = gpa & 1 ? NULL : gm_ptr(m, gpa, 2, MEM_WRITE);
	if (!p)
		return -EFAULT;
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
	gm_written(m, gpa, 2);
	return 0;
}

uint64_t guest_mem_ram_size(const struct guest_mem *m)
{
	return m->ram_size;
}

bool guest_mem_range(const struct guest_mem *m, unsigned i, struct mem_range *r)
{
	const struct view *v = __atomic_load_n(&m->view, __ATOMIC_ACQUIRE);
	if (i >= v->n)
		return false;
	*r = v->slot[i]->r;
	return true;
}

int guest_mem_dirty_log(struct guest_mem *m, bool on)
{
	int r = 0;
	pthread_mutex_lock(&m->lock);
	for (unsigned i = 0; on && !r && i < m->view->n; i++) {
		struct slot *s = m->view->slot[i];
		/* Kept once made: another thread may be setting bits in it. */
		uint64_t *bits = s->dirty ? s->dirty : calloc((s->r.size / PAGE + 63) / 64, 8);
		if (bits)
			__atomic_store_n(&s->dirty, bits, __ATOMIC_RELEASE);
		else
			r = -ENOMEM;
	}
	if (!r)
		__atomic_store_n(&m->logging, on, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&m->lock);
	return r;
}

bool guest_mem_dirty_take(struct guest_mem *m, uint64_t gpa)
{
	struct slot *s = find_slot(m, gpa);
	uint64_t *bits = s ? __atomic_load_n(&s->dirty, __ATOMIC_ACQUIRE) : NULL;
	if (!bits)
		return false;
	uint64_t p = (gpa - s->r.gpa) / PAGE;
	return __atomic_fetch_and(&bits[p / 64], ~BIT(p % 64), __ATOMIC_RELAXED) & BIT(p % 64);
}
