#include "client.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

const uint8_t code_hlt[1] = { 0xf4 }, code_loop[2] = { 0xeb, 0xfe };

void client_rip(struct client *c, uint64_t rip, uint64_t rcx)
{
	struct kvm_regs r = { .rip = rip, .rcx = rcx, .rflags = 2 };

	CHECK(ioctl(c->vcpu, KVM_SET_REGS, &r) == 0);
}

void client_start(struct client *c, const void *code, size_t len)
{
	memset(c, 0, sizeof *c);
	CHECK((c->sys = open("/dev/kvm", O_RDWR | O_CLOEXEC)) >= 0);
	CHECK((c->vm = ioctl(c->sys, KVM_CREATE_VM, 0)) >= 0);
	c->mem = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(c->mem != MAP_FAILED);
	memcpy(c->mem, code, len);
	client_vcpu(c, false);
}

void client_vcpu(struct client *c, bool chips)
{
	struct kvm_userspace_memory_region m = { .memory_size = 4096 };
	struct kvm_sregs s;
	int size;

	CHECK(!chips || ioctl(c->vm, KVM_CREATE_IRQCHIP, 0) == 0);
	m.userspace_addr = (uintptr_t)c->mem;
	CHECK(ioctl(c->vm, KVM_SET_USER_MEMORY_REGION, &m) == 0);
	CHECK((c->vcpu = ioctl(c->vm, KVM_CREATE_VCPU, 0)) >= 0);
	CHECK((size = ioctl(c->sys, KVM_GET_VCPU_MMAP_SIZE, 0)) > 0);
	c->run_size = (size_t)size;
	c->run = mmap(NULL, c->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, c->vcpu, 0);
	CHECK(c->run != MAP_FAILED);
	CHECK(ioctl(c->vcpu, KVM_GET_SREGS, &s) == 0);
	s.cs.base = 0;
	s.cs.selector = 0;
	CHECK(ioctl(c->vcpu, KVM_SET_SREGS, &s) == 0);
	client_rip(c, 0, 0);
}

void client_stop(struct client *c)
{
	munmap(c->run, c->run_size);
	munmap(c->mem, 4096);
	close(c->vcpu);
	close(c->vm);
	close(c->sys);
}
