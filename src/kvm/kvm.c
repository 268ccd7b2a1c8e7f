/* Provider choice, VM and vCPU: one documented ioctl per function, with an error message. */
#include "kvm/kvm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "kvm/provider.h"
#include "softkvm/softkvm.h"

/* softkvm's interpreter on a plain loop, instructions a second; /dev/kvm has to beat it. */
#define SOFT_RATE 60000000u

struct kvm {
	struct kvm_file f;
	int run_size;
};

struct kvm_vm {
	struct kvm *k;
	struct kvm_file f;
};

struct kvm_vcpu {
	struct kvm_vm *vm;
	struct kvm_file f;
	struct kvm_run *run;
	struct kvm_coalesced_mmio_ring *ring;
	unsigned id;
};

static int open_provider(struct kvm *k, const struct kvm_provider *p, struct err *err)
{
	memset(&k->f, 0, sizeof k->f);
	k->f.p = p;
	int r = p->open(&k->f, err);
	if (r)
		return r;
	int v = p->ioctl(&k->f, KVM_GET_API_VERSION, 0, NULL);
	if (v == KVM_API_VERSION)
		return 0;
	p->close(&k->f);
	if (v < 0)
		return err_set_errno(err, v, "%s: not a KVM device", p->name);
	return err_set(err, -EPROTO, "%s: API version %d, this program needs %d", p->name, v, KVM_API_VERSION);
}

/* AUTO: /dev/kvm when it is there and faster than softkvm. */
static int open_auto(struct kvm *k, struct err *err)
{
	struct err why = { 0 };
	if (open_provider(k, &kvm_provider_linux, &why)) {
		log_info("accel: soft (%s)", why.msg);
		return open_provider(k, &kvm_provider_soft, err);
	}
	uint64_t rate = kvm_measure_rate(&k->f);
	if (rate > SOFT_RATE) {
		log_info("accel: kvm (%llu million instructions a second)", (unsigned long long)(rate / 1000000));
		return 0;
	}
	struct kvm slow = *k;
	memset(&why, 0, sizeof why);
	if (open_provider(k, &kvm_provider_soft, &why)) {
		*k = slow;
		if (!rate) {
			k->f.p->close(&k->f);
			return err_set(err, -ENODEV, "/dev/kvm cannot run a guest, and %s", why.msg);
		}
		log_info("accel: kvm, slow at %.1f million instructions a second (%s)", (double)rate / 1e6, why.msg);
		return 0;
	}
	slow.f.p->close(&slow.f);
	log_info("accel: soft (/dev/kvm runs %.1f million instructions a second here, softkvm about %u)",
		 (double)rate / 1e6, SOFT_RATE / 1000000);
	return 0;
}

int kvm_open(struct kvm **out, enum kvm_accel accel, struct err *err)
{
	struct kvm *k = calloc(1, sizeof *k);
	if (!k)
		return err_set(err, -ENOMEM, "kvm: out of memory");
	int r = accel == ACCEL_AUTO ? open_auto(k, err) :
		open_provider(k, accel == ACCEL_KVM ? &kvm_provider_linux : &kvm_provider_soft, err);
	if (!r) {
		k->run_size = k->f.p->ioctl(&k->f, KVM_GET_VCPU_MMAP_SIZE, 0, NULL);
		if (k->run_size < (int)sizeof(struct kvm_run)) {
			r = err_set(err, -EPROTO, "%s: vCPU area of %d bytes", k->f.p->name, k->run_size);
			k->f.p->close(&k->f);
		}
	}
	if (r) {
		free(k);
		return r;
	}
	*out = k;
	return 0;
}

void kvm_close(struct kvm *k)
{
	if (!k)
		return;
	k->f.p->close(&k->f);
	free(k);
}

const char *kvm_provider_name(const struct kvm *k)
{
	return k->f.p->name;
}

int kvm_ioctl(struct kvm *k, unsigned long req, void *arg)
{
	return k->f.p->ioctl(&k->f, req, (uintptr_t)arg, NULL);
}

uint64_t kvm_speed(struct kvm *k)
{
	return kvm_measure_rate(&k->f);
}

int kvm_check_extension(struct kvm *k, long cap)
{
	int r = k->f.p->ioctl(&k->f, KVM_CHECK_EXTENSION, (uintptr_t)cap, NULL);
	return r < 0 ? 0 : r;
}

int kvm_vm_create(struct kvm_vm **out, struct kvm *k, struct err *err)
{
	struct kvm_vm *vm = calloc(1, sizeof *vm);
	int r;
	if (!vm)
		return err_set(err, -ENOMEM, "kvm: out of memory");
	vm->k = k;
	do
		r = k->f.p->ioctl(&k->f, KVM_CREATE_VM, 0, &vm->f);
	while (r == -EINTR);
	if (r < 0) {
		free(vm);
		return err_set_errno(err, r, "%s: cannot create a virtual machine", k->f.p->name);
	}
	/* Asking is the promise to call kvm_vm_code_written() for every write; without it softkvm checks code by itself. */
	if (vm->f.p->code_written)
		vm->f.p->ioctl(&vm->f, KVM_CHECK_EXTENSION, SOFTKVM_CAP_CODE_WRITTEN, NULL);
	*out = vm;
	return 0;
}

static int soft_cap(struct kvm_vm *vm, uint32_t cap, uint64_t a0, uint64_t a1, uint64_t a2)
{
	struct kvm_enable_cap c = { .cap = cap, .args = { a0, a1, a2 } };

	return vm->f.p->ioctl(&vm->f, KVM_ENABLE_CAP, (uintptr_t)&c, NULL);
}

int kvm_vm_soft(struct kvm_vm *vm, const struct kvm_soft_config *cfg, unsigned vcpus, struct err *err)
{
	uint64_t mode = cfg->mode == SOFT_DEFAULT ? SOFTKVM_TRANSLATE_AS_IS : cfg->mode - SOFT_INTERP, bytes = cfg->code_bytes;
	int r;

	if (!vm->f.p->code_written)
		return 0;
	if (bytes && bytes < vcpus * SOFTKVM_CODE_MIN)
		return err_set(err, -EINVAL, "code-memory: %u CPUs need at least %uM", vcpus, vcpus);
	if (!bytes && vcpus > 128)
		bytes = vcpus * SOFTKVM_CODE_MIN;
	r = soft_cap(vm, SOFTKVM_CAP_TRANSLATE, mode, bytes, vcpus);
	if (r < 0)
		return err_set_errno(err, r, "softkvm: cannot set the mode");
	if (!cfg->perf_map && !cfg->sample)
		return 0;
	r = soft_cap(vm, SOFTKVM_CAP_PROFILE, (cfg->sample ? SOFTKVM_PROFILE_SAMPLE : 0u) | (cfg->perf_map ? SOFTKVM_PROFILE_PERF_MAP : 0u), 0, 0);
	return r < 0 ? err_set_errno(err, r, "cannot create /tmp/perf-%d.map", (int)getpid()) : 0;
}

void kvm_vm_destroy(struct kvm_vm *vm)
{
	if (!vm)
		return;
	vm->f.p->close(&vm->f);
	free(vm);
}

int kvm_vm_ioctl(struct kvm_vm *vm, unsigned long req, void *arg)
{
	return vm->f.p->ioctl(&vm->f, req, (uintptr_t)arg, NULL);
}

int kvm_vm_ioctl_val(struct kvm_vm *vm, unsigned long req, unsigned long val)
{
	return vm->f.p->ioctl(&vm->f, req, val, NULL);
}

struct kvm *kvm_vm_system(struct kvm_vm *vm)
{
	return vm->k;
}

int kvm_vm_set_slot(struct kvm_vm *vm, unsigned slot, uint64_t gpa, uint64_t size, void *host, uint32_t flags,
		    struct err *err)
{
	struct kvm_userspace_memory_region mr = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = size,
		.userspace_addr = (uintptr_t)host,
	};
	int r = kvm_vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &mr);
	return r < 0 ? err_set_errno(err, r, "%s: memory slot %u at 0x%llx, %llu KiB", vm->k->f.p->name, slot,
				     (unsigned long long)gpa, (unsigned long long)(size >> 10)) : 0;
}

void kvm_vm_code_written(struct kvm_vm *vm, uint64_t gpa, uint64_t len)
{
	if (vm->f.p->code_written)
		vm->f.p->code_written(&vm->f, gpa, len);
}

int kvm_vm_irq_line(struct kvm_vm *vm, unsigned gsi, int level)
{
	struct kvm_irq_level l = { .irq = gsi, .level = (uint32_t)!!level };
	return kvm_vm_ioctl(vm, KVM_IRQ_LINE, &l);
}

int kvm_vm_signal_msi(struct kvm_vm *vm, uint64_t addr, uint32_t data)
{
	struct kvm_msi msi = { .address_lo = (uint32_t)addr, .address_hi = (uint32_t)(addr >> 32), .data = data };
	return kvm_vm_ioctl(vm, KVM_SIGNAL_MSI, &msi);
}

static void find_ring(struct kvm_vcpu *v)
{
	int page = kvm_check_extension(v->vm->k, KVM_CAP_COALESCED_MMIO);
	if (page > 0 && (page + 1) * 4096 <= v->vm->k->run_size)
		v->ring = (void *)((char *)v->run + page * 4096);
}

int kvm_vcpu_create(struct kvm_vcpu **out, struct kvm_vm *vm, unsigned id, struct err *err)
{
	struct kvm_vcpu *v = calloc(1, sizeof *v);
	if (!v)
		return err_set(err, -ENOMEM, "kvm: out of memory");
	v->vm = vm;
	v->id = id;
	int r = vm->f.p->ioctl(&vm->f, KVM_CREATE_VCPU, id, &v->f);
	if (r < 0) {
		free(v);
		return err_set_errno(err, r, "%s: cannot create vCPU %u", vm->k->f.p->name, id);
	}
	v->run = v->f.p->mmap(&v->f, (size_t)vm->k->run_size);
	if (!v->run) {
		r = err_set_errno(err, -errno, "%s: cannot map vCPU %u", vm->k->f.p->name, id);
		v->f.p->close(&v->f);
		free(v);
		return r;
	}
	find_ring(v);
	*out = v;
	return 0;
}

void kvm_vcpu_destroy(struct kvm_vcpu *v)
{
	if (!v)
		return;
	v->f.p->munmap(&v->f, v->run, (size_t)v->vm->k->run_size);
	v->f.p->close(&v->f);
	free(v);
}

int kvm_vcpu_ioctl(struct kvm_vcpu *v, unsigned long req, void *arg)
{
	return v->f.p->ioctl(&v->f, req, (uintptr_t)arg, NULL);
}

struct kvm_run *kvm_vcpu_run_area(struct kvm_vcpu *v)
{
	return v->run;
}

struct kvm_coalesced_mmio_ring *kvm_vcpu_coalesced_ring(struct kvm_vcpu *v)
{
	return v->ring;
}

unsigned kvm_vcpu_id(const struct kvm_vcpu *v)
{
	return v->id;
}

unsigned kvm_vcpu_counters(struct kvm_vcpu *v, struct kvm_counter *out, unsigned max)
{
	return v->f.p->counters ? v->f.p->counters(&v->f, out, max) : 0;
}

unsigned kvm_vcpu_hot(struct kvm_vcpu *v, struct kvm_hot *out, unsigned max, uint64_t *total)
{
	*total = 0;
	return v->f.p->hot ? v->f.p->hot(&v->f, out, max, total) : 0;
}

void kvm_vcpu_prepare(struct kvm_vcpu *v)
{
	if (v->f.p->prepare)
		v->f.p->prepare(&v->f);
}

int kvm_vcpu_run(struct kvm_vcpu *v)
{
	return v->f.p->ioctl(&v->f, KVM_RUN, 0, NULL);
}
