/* The provider in user space: libsoftkvm. */
#include <errno.h>
#include <sys/mman.h>

#include "base/util.h"
#include "kvm/kvm.h"
#include "kvm/provider.h"
#include "softkvm/softkvm.h"

static int soft_open(struct kvm_file *f, struct err *err)
{
	f->soft = softkvm_open();
	return f->soft ? 0 : err_set_errno(err, -errno, "softkvm");
}

static int soft_ioctl(struct kvm_file *f, unsigned long req, uintptr_t arg, struct kvm_file *created)
{
	struct softkvm_file *made = NULL;
	int r = softkvm_ioctl(f->soft, req, arg, &made);
	if (r < 0)
		return -errno;
	if (created) {
		created->p = f->p;
		created->soft = made;
	} else if (made) {
		softkvm_close(made);
	}
	return r;
}

static void *soft_mmap(struct kvm_file *f, size_t len)
{
	void *p = softkvm_mmap(f->soft, len, 0);
	return p == MAP_FAILED ? NULL : p;
}

static void soft_munmap(struct kvm_file *f, void *p, size_t len)
{
	softkvm_munmap(f->soft, p, len);
}

static void soft_close(struct kvm_file *f)
{
	softkvm_close(f->soft);
}

static int soft_code_written(struct kvm_file *vm, uint64_t gpa, uint64_t len)
{
	return softkvm_code_written(vm->soft, gpa, len);
}

static unsigned soft_counters(struct kvm_file *vcpu, struct kvm_counter *out, unsigned max)
{
	struct softkvm_stats s;
	unsigned n;

	if (softkvm_vcpu_stats(vcpu->soft, &s))
		return 0;
	const struct kvm_counter all[] = {
		{ "instructions", s.insns }, { "blocks_decoded", s.blocks_decoded }, { "block_lookups", s.blocks_run },
		{ "tlb_fills", s.tlb_fills }, { "tlb_flushes", s.tlb_flushes }, { "slow_loads", s.slow_loads },
		{ "slow_stores", s.slow_stores }, { "exits", s.exits }, { "interrupts", s.interrupts },
		{ "exceptions", s.exceptions }, { "code_invalidations", s.code_invalidations }, { "halts", s.halts },
	};
	for (n = 0; n < MIN(max, (unsigned)ARRAY_SIZE(all)); n++)
		out[n] = all[n];
	return n;
}

static void soft_prepare(struct kvm_file *vcpu)
{
	softkvm_vcpu_prepare(vcpu->soft);
}

const struct kvm_provider kvm_provider_soft = {
	.name = "soft", .open = soft_open, .ioctl = soft_ioctl, .mmap = soft_mmap, .munmap = soft_munmap,
	.close = soft_close, .code_written = soft_code_written, .counters = soft_counters, .prepare = soft_prepare,
};
