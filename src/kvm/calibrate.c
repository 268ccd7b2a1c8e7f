/*
 * How fast is /dev/kvm here? A loop in real mode in a VM of its own with one page of memory, first
 * short, then longer when that was quick: about a millisecond where KVM is emulated at 2 million
 * instructions a second, less on hardware.
 */
#include <linux/kvm.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "kvm/provider.h"

static uint64_t now_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static int call(struct kvm_file *f, unsigned long req, void *arg)
{
	return f->p->ioctl(f, req, (uintptr_t)arg, NULL);
}

/* Run `loops` rounds of two instructions; nanoseconds, 0 on failure. */
static uint64_t time_loop(struct kvm_file *vcpu, struct kvm_run *run, uint32_t loops)
{
	struct kvm_regs regs = { .rip = 0, .rcx = loops, .rflags = 2 };
	if (call(vcpu, KVM_SET_REGS, &regs))
		return 0;
	uint64_t start = now_ns();
	if (call(vcpu, KVM_RUN, NULL) || run->exit_reason != KVM_EXIT_HLT)
		return 0;
	uint64_t t = now_ns() - start;
	return t ? t : 1;
}

static uint64_t measure_vcpu(struct kvm_file *vcpu, struct kvm_run *run)
{
	struct kvm_sregs sregs;
	if (call(vcpu, KVM_GET_SREGS, &sregs))
		return 0;
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	if (call(vcpu, KVM_SET_SREGS, &sregs) || !time_loop(vcpu, run, 1)) /* the first entry faults everything in */
		return 0;
	uint32_t loops = 500;
	uint64_t t = time_loop(vcpu, run, loops);
	if (t && t < 100000) {
		loops = 100000;
		t = time_loop(vcpu, run, loops);
	}
	return t ? loops * 2ULL * 1000000000u / t : 0;
}

uint64_t kvm_measure_rate(struct kvm_file *sys)
{
	static const uint8_t code[] = { 0x66, 0x49, 0x75, 0xfc, 0xf4 }; /* 1: dec %ecx; jnz 1b; hlt */
	struct kvm_file vm = { 0 }, vcpu = { 0 };
	uint64_t rate = 0;
	int size = sys->p->ioctl(sys, KVM_GET_VCPU_MMAP_SIZE, 0, NULL);
	void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (size <= 0 || page == MAP_FAILED)
		goto out_page;
	memcpy(page, code, sizeof code);
	if (sys->p->ioctl(sys, KVM_CREATE_VM, 0, &vm))
		goto out_page;
	struct kvm_userspace_memory_region mr = { .memory_size = 4096, .userspace_addr = (uintptr_t)page };
	if (call(&vm, KVM_SET_USER_MEMORY_REGION, &mr) || vm.p->ioctl(&vm, KVM_CREATE_VCPU, 0, &vcpu))
		goto out_vm;
	struct kvm_run *run = vcpu.p->mmap(&vcpu, (size_t)size);
	if (run) {
		rate = measure_vcpu(&vcpu, run);
		vcpu.p->munmap(&vcpu, run, (size_t)size);
	}
	vcpu.p->close(&vcpu);
out_vm:
	vm.p->close(&vm);
out_page:
	if (page != MAP_FAILED)
		munmap(page, 4096);
	return rate;
}
