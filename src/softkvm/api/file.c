/* Handles: what Linux keeps as descriptors of /dev/kvm, VMs and vCPUs. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "softkvm/api/api.h"

struct softkvm_file *file_new(enum file_kind kind, struct vm *vm, struct vcpu *vcpu)
{
	struct softkvm_file *f = calloc(1, sizeof *f);

	if (!f)
		return NULL;
	f->kind = kind;
	f->vm = vm;
	f->vcpu = vcpu;
	atomic_store(&f->refs, 1);
	if (vm)
		vm_ref(vm);
	return f;
}

struct softkvm_file *softkvm_open(void)
{
	struct softkvm_file *f = file_new(FILE_SYSTEM, NULL, NULL);

	if (!f)
		errno = ENOMEM;
	return f;
}

struct softkvm_file *softkvm_ref(struct softkvm_file *f)
{
	atomic_fetch_add(&f->refs, 1);
	return f;
}

void softkvm_close(struct softkvm_file *f)
{
	if (!f || atomic_fetch_sub(&f->refs, 1) != 1)
		return;
	if (f->vm)
		vm_unref(f->vm);
	free(f);
}

int softkvm_ioctl(struct softkvm_file *f, unsigned long request, uintptr_t arg, struct softkvm_file **created)
{
	long r = -EBADF;

	/* The handle may be closed by another thread meanwhile, as a descriptor may. */
	softkvm_ref(f);
	switch (f->kind) {
	case FILE_SYSTEM:
		r = system_ioctl(request, arg, created);
		break;
	case FILE_VM:
		r = vm_ioctl(f->vm, request, arg, created);
		break;
	case FILE_STATS:
		r = -ENOTTY;
		break;
	case FILE_VCPU:
		r = vcpu_ioctl(f->vcpu, request, arg, created);
		break;
	}
	softkvm_close(f);
	if (r < 0) {
		errno = (int)-r;
		return -1;
	}
	return (int)r;
}

/* A second view of pages that are already mapped MAP_SHARED. */
static void *map_again(void *from, size_t len, void *at)
{
	return mremap(from, 0, len, MREMAP_MAYMOVE | (at ? MREMAP_FIXED : 0), at);
}

static void *map_ring(struct softkvm_file *f, size_t len, uint64_t offset)
{
	len = ALIGN_UP(len, (size_t)API_PAGE);
	if (!f->vcpu->ring || range_bad(offset, len, ring_bytes(f->vm))) {
		errno = EINVAL;
		return MAP_FAILED;
	}
	return map_again((uint8_t *)ring_memory(f->vcpu->ring) + offset, len, NULL);
}

void *softkvm_mmap(struct softkvm_file *f, size_t len, uint64_t offset)
{
	const uint64_t ring = KVM_DIRTY_LOG_PAGE_OFFSET * (uint64_t)API_PAGE;
	size_t total = RUN_PAGES * API_PAGE;
	uint8_t *p;

	if (f->kind == FILE_VCPU && len && offset >= ring && offset % API_PAGE == 0)
		return map_ring(f, len, offset - ring);

	if (f->kind != FILE_VCPU || !len || offset % API_PAGE || range_bad(offset, len, total)) {
		errno = f->kind == FILE_VCPU ? EINVAL : ENODEV;
		return MAP_FAILED;
	}
	/* Reserve all, then put the vCPU's two pages and the VM's ring in place. */
	p = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return p;
	if (map_again(f->vcpu->cpu.run, 2 * API_PAGE, p) == MAP_FAILED ||
	    map_again(f->vm->ring, API_PAGE, p + 2 * API_PAGE) == MAP_FAILED) {
		munmap(p, total);
		return MAP_FAILED;
	}
	len = ALIGN_UP(len, (size_t)API_PAGE);
	if (offset)
		munmap(p, offset);
	if (offset + len < total)
		munmap(p + offset + len, total - offset - len);
	return p + offset;
}

int softkvm_munmap(struct softkvm_file *f, void *p, size_t len)
{
	(void)f;
	return munmap(p, len);
}

int softkvm_code_written(struct softkvm_file *f, uint64_t gpa, uint64_t len)
{
	if (f->kind != FILE_VM) {
		errno = EINVAL;
		return -1;
	}
	phys_code_written(f->vm, gpa, len);
	return 0;
}

void softkvm_vcpu_prepare(struct softkvm_file *f)
{
	if (f->kind == FILE_VCPU)
		clock_steal_open(f->vcpu->api);
}

int softkvm_vcpu_stats(struct softkvm_file *f, struct softkvm_stats *s)
{
	const uint64_t *from;

	if (f->kind != FILE_VCPU) {
		errno = EINVAL;
		return -1;
	}
	from = (const uint64_t *)&f->vcpu->cpu.stats;
	for (size_t i = 0; i < sizeof *s / 8; i++)
		((uint64_t *)s)[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
	return 0;
}
