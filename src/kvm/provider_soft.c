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
		{ "exceptions", s.exceptions }, { "code_invalidations", s.code_invalidations }, { "blocks_patched", s.blocks_patched }, { "halts", s.halts },
		{ "translations", s.translations }, { "translated_instructions", s.translated_insns }, { "translated_bytes", s.translated_bytes },
		{ "code_bytes_used", s.code_used }, { "code_flushes", s.code_flushes }, { "block_collections", s.block_collections }, { "links", s.links },
		{ "code_entries", s.code_entries }, { "handler_calls", s.handler_calls }, { "left_for_loop", s.left_for_loop },
		{ "left_by_jump", s.left_by_jump }, { "left_by_budget", s.left_by_budget }, { "host_faults", s.host_faults },
		{ "exits_io", s.exit_io }, { "exits_mmio", s.exit_mmio }, { "exits_hlt", s.exit_hlt }, { "exits_signal", s.exit_signal },
		{ "exits_irq_window", s.exit_irq_window }, { "exits_msr", s.exit_msr }, { "exits_debug", s.exit_debug },
		{ "exits_shutdown", s.exit_shutdown }, { "exits_error", s.exit_error }, { "exits_other", s.exit_other },
	};
	for (n = 0; n < MIN(max, (unsigned)ARRAY_SIZE(all)); n++)
		out[n] = all[n];
	return n;
}

static unsigned soft_hot(struct kvm_file *vcpu, struct kvm_hot *out, unsigned max, uint64_t *total)
{
	struct softkvm_hot h[64];
	unsigned n = softkvm_vcpu_hot(vcpu->soft, h, MIN(max, (unsigned)ARRAY_SIZE(h)), total);

	for (unsigned k = 0; k < n; k++)
		out[k] = (struct kvm_hot){ h[k].rip, h[k].samples, h[k].cpl };
	return n;
}

static void soft_prepare(struct kvm_file *vcpu)
{
	softkvm_vcpu_prepare(vcpu->soft);
}

const struct kvm_provider kvm_provider_soft = {
	.name = "soft", .open = soft_open, .ioctl = soft_ioctl, .mmap = soft_mmap, .munmap = soft_munmap,
	.close = soft_close, .code_written = soft_code_written, .counters = soft_counters, .hot = soft_hot, .prepare = soft_prepare,
};
