/* Bad callers: unmapped pointers give EFAULT, random requests with random structures an answer, never a crash. */
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client.h"

static uint8_t *ram;            /* the only memory that slots may name */
#define RAM_SIZE (64 * 4096u)

static void unmapped(struct client *c)
{
	static const unsigned long sys[] = { KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID, KVM_GET_MSR_INDEX_LIST,
		KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_GET_MSRS };
	static const unsigned long vm[] = { KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG, KVM_CREATE_PIT2, KVM_IRQ_LINE, KVM_IRQFD,
		KVM_IOEVENTFD, KVM_SET_GSI_ROUTING, KVM_GET_CLOCK, KVM_SET_CLOCK, KVM_ENABLE_CAP, KVM_X86_SET_MSR_FILTER, KVM_SIGNAL_MSI };
	static const unsigned long vcpu[] = { KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_GET_MSRS, KVM_SET_MSRS,
		KVM_SET_CPUID2, KVM_GET_CPUID2, KVM_GET_FPU, KVM_SET_FPU, KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_VCPU_EVENTS,
		KVM_SET_VCPU_EVENTS, KVM_SET_SIGNAL_MASK, KVM_TRANSLATE, KVM_SET_GUEST_DEBUG, KVM_GET_DEBUGREGS, KVM_INTERRUPT };
	void *hole = mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (int k = 0; k < 2; k++) {
		void *p = k ? hole : (void *)8;

		for (unsigned i = 0; i < sizeof sys / sizeof *sys; i++)
			FAILS(ioctl(c->sys, sys[i], p), EFAULT);
		for (unsigned i = 0; i < sizeof vm / sizeof *vm; i++)
			FAILS(ioctl(c->vm, vm[i], p), EFAULT);
		for (unsigned i = 0; i < sizeof vcpu / sizeof *vcpu; i++)
			FAILS(ioctl(c->vcpu, vcpu[i], p), EFAULT);
	}
	munmap(hole, 8192);
}

/* Pointers inside structures. */
static void unmapped_inside(struct client *c)
{
	struct kvm_userspace_memory_region m = { .slot = 1, .memory_size = 4096, .guest_phys_addr = 0x10000,
		.userspace_addr = (uintptr_t)ram, .flags = KVM_MEM_LOG_DIRTY_PAGES };
	struct kvm_dirty_log d = { .slot = 1, .dirty_bitmap = (void *)8 };
	struct kvm_msr_filter f = { .ranges[0] = { .flags = KVM_MSR_FILTER_READ, .nmsrs = 64, .bitmap = (void *)8 } };

	CHECK(ioctl(c->vm, KVM_SET_USER_MEMORY_REGION, &m) == 0);
	FAILS(ioctl(c->vm, KVM_GET_DIRTY_LOG, &d), EFAULT);
	FAILS(ioctl(c->vm, KVM_X86_SET_MSR_FILTER, &f), EFAULT);
	m.memory_size = 0;
	CHECK(ioctl(c->vm, KVM_SET_USER_MEMORY_REGION, &m) == 0);
}

static uint64_t seed = 88172645463325252ull;

static uint64_t rnd(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	return seed ^= seed << 17;
}

/* Requests of the right direction and size find the handlers; the structures are noise with small numbers in it. */
static void fill(uint8_t *b, size_t n)
{
	for (size_t i = 0; i < n; i += 8) {
		uint64_t v = rnd();

		v = v % 5 == 0 ? v >> (v & 63) : v % 5 == 1 ? v & 15 : v % 5 == 2 ? 0 : v % 5 == 3 ? 1ull << (v >> 8 & 63) : v;
		memcpy(b + i, &v, 8);
	}
}

static bool unsafe(unsigned nr, uint8_t *b, unsigned long *arg)
{
	struct kvm_userspace_memory_region *m = (void *)b;

	switch (nr) {
	case 0x46:      /* a slot: only memory that is there */
		m->memory_size = m->memory_size % 64 * 4096;
		m->userspace_addr = (uintptr_t)ram;
		m->guest_phys_addr &= 0xfffff000;
		return false;
	case 0x41:      /* a vCPU: not thousands */
		*arg &= 3;
		return false;
	case 0x01:      /* a VM: the descriptors pile up */
	case 0x76: case 0x79:   /* descriptors of the test itself as irqfd or ioeventfd */
	case 0x8b:      /* a signal mask that lets nothing through, for ever */
		return true;
	}
	return false;
}

static void fuzz(struct client *c, unsigned rounds)
{
	uint8_t *b = mmap(NULL, 32768, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (unsigned i = 0; i < rounds; i++) {
		static const uint16_t sizes[] = { 0, 4, 8, 12, 16, 24, 32, 64, 72, 128, 144, 312, 416, 512, 520, 1024, 4096 };
		unsigned nr = (unsigned)rnd() & 0xff, dir = (unsigned)rnd() & 3;
		unsigned size = sizes[rnd() % (sizeof sizes / sizeof *sizes)];
		int fd = (int[]){ c->sys, c->vm, c->vcpu, c->vcpu }[rnd() & 3], r;
		unsigned long arg = rnd() % 8 ? (uintptr_t)b : rnd() >> (rnd() & 63);

		fill(b, 4096);
		if (unsafe(nr, b, &arg))
			continue;
		c->run->immediate_exit = 1;
		r = ioctl(fd, _IOC(dir, KVMIO, nr, size), arg);
		if (r > 2 && (nr == 0x41 || nr == 0xce))
			close(r);
	}
	munmap(b, 32768);
}

int main(int argc, char **argv)
{
	unsigned rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 20000;
	struct client c;

	signal(SIGALRM, SIG_DFL);
	alarm(300);
	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	client_start(&c, code_hlt, 1);
	unmapped(&c);
	unmapped_inside(&c);
	client_stop(&c);
	for (int i = 0; i < 8; i++) {
		client_start(&c, code_hlt, 1);
		fuzz(&c, rounds / 8);
		client_stop(&c);
	}
	return 0;
}
