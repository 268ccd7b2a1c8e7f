/*
 * Callers that do everything wrong at once: threads share two VMs' descriptors and run, close, duplicate, pass, poll and
 * fork them, change slots under running vCPUs, and send random requests. Beside them a third VM counts; whatever the others do,
 * it must count right. usage: chaos [operations] [seed]
 */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client.h"

#define THREADS 3
#define FDS 24                  /* numbers FIRST.. are what the threads play with */
#define FIRST 200
#define RAM_SIZE (64 * 4096u)
#define RUN_MAP 12288u

static uint8_t *ram;            /* the only memory that slots may name */
static _Atomic long left;
static _Atomic bool over;

struct rng { uint64_t x; };

static uint32_t rnd(struct rng *r, uint32_t below)
{
	r->x ^= r->x << 13;
	r->x ^= r->x >> 7;
	r->x ^= r->x << 17;
	return (uint32_t)(r->x >> 32) % below;
}

#ifdef __SANITIZE_THREAD__
/* Threads close each other's descriptors here: that is what is tried. */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void) { return "race_top:close\nrace_top:dup2\nrace_top:dup3\n"; }
#endif

static int any(struct rng *r) { return FIRST + (int)rnd(r, FDS); }

/* `fd` becomes one of the numbers the threads play with, in the place of what was there. */
static void keep(struct rng *r, int fd)
{
	if (fd < 0)
		return;
	dup3(fd, any(r), O_CLOEXEC);
	close(fd);
}

/* -- the witness: out 0x10, eax; inc eax; jmp ---------------------------------------------------------- */
static void *witness(void *arg)
{
	static const uint8_t code[] = { 0x66, 0xe7, 0x10, 0x66, 0x40, 0xeb, 0xf9 };
	struct client c;
	uint32_t n = 0, v;

	client_start(&c, code, sizeof code);
	while (!atomic_load(&over) || n < 1000) {
		if (ioctl(c.vcpu, KVM_RUN, 0) < 0) {
			CHECK(errno == EINTR);
			continue;
		}
		CHECK(c.run->exit_reason == KVM_EXIT_IO && c.run->io.port == 0x10);
		memcpy(&v, (uint8_t *)c.run + c.run->io.data_offset, 4);
		CHECK(v == n);
		n++;
	}
	client_stop(&c);
	return NULL;
}

/* -- what the others do ---------------------------------------------------------------------------------- */
static void new_vm(struct rng *r)
{
	int sys = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm = ioctl(sys, KVM_CREATE_VM, 0);

	if (rnd(r, 2) && vm >= 0)
		ioctl(vm, KVM_CREATE_IRQCHIP, 0);
	for (unsigned i = 0; i < 2 && vm >= 0; i++) {
		int vcpu = ioctl(vm, KVM_CREATE_VCPU, i);
		struct kvm_sregs s;

		if (ioctl(vcpu, KVM_GET_SREGS, &s) == 0) {
			s.cs.base = s.cs.selector = 0;
			ioctl(vcpu, KVM_SET_SREGS, &s);
		}
		keep(r, vcpu);
	}
	keep(r, vm);
	keep(r, sys);
}

static void slot(struct rng *r)
{
	struct kvm_userspace_memory_region m = { .slot = rnd(r, 3), .memory_size = rnd(r, 3) * 4096, .guest_phys_addr = rnd(r, 8) * 4096,
		.userspace_addr = (uintptr_t)ram + rnd(r, 32) * 4096, .flags = rnd(r, 3) };

	ioctl(any(r), KVM_SET_USER_MEMORY_REGION, &m);
}

static void registers(struct rng *r)
{
	struct kvm_regs g = { .rip = rnd(r, 0x8000), .rflags = 2 | (rnd(r, 2) << 9), .rsp = rnd(r, 0x8000), .rcx = rnd(r, 100), .rbx = rnd(r, 0x9000) };

	ioctl(any(r), KVM_SET_REGS, &g);
}

/* A vCPU runs whatever is in memory until somebody sends the signal. */
static void run(struct rng *r)
{
	int fd = any(r);
	struct kvm_run *m = mmap(NULL, RUN_MAP, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (m != MAP_FAILED)
		m->immediate_exit = (uint8_t)!rnd(r, 4);
	for (int i = 0; i < 20 && ioctl(fd, KVM_RUN, 0) == 0; i++)
		;
	if (m != MAP_FAILED)
		munmap(m, RUN_MAP);
}

/* Structures are random; those that name the test's own memory or signals are left to the others. */
static void request(struct rng *r)
{
	static const uint16_t sizes[] = { 0, 4, 8, 12, 16, 24, 32, 64, 72, 128, 144, 312, 416, 512, 520, 1024, 4096 };
	unsigned nr = rnd(r, 256), size = sizes[rnd(r, sizeof sizes / sizeof *sizes)];
	_Alignas(8) uint8_t b[8192];

	if (nr == 0x46 || nr == 0x01 || nr == 0x41 || nr == 0x76 || nr == 0x79 || nr == 0x8b || nr == 0x80)
		return;
	for (unsigned i = 0; i < sizeof b; i += 4) {
		uint32_t v = rnd(r, 3) ? rnd(r, 16) : rnd(r, ~0u);

		memcpy(b + i, &v, 4);
	}
	int made = ioctl(any(r), _IOC(rnd(r, 4), KVMIO, nr, size), rnd(r, 8) ? (uintptr_t)b : rnd(r, 4096));

	if (made > 2 && nr == 0xce)     /* KVM_GET_STATS_FD */
		keep(r, made);
}

static void pass(struct rng *r)
{
	union { struct cmsghdr h; char b[CMSG_SPACE(sizeof(int))]; } c = { .h = { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	char byte = 0;
	struct iovec v = { &byte, 1 };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c };
	int pair[2], fd = any(r);

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return;
	memcpy(CMSG_DATA(&c.h), &fd, sizeof fd);
	if (sendmsg(pair[0], &m, 0) == 1 && recvmsg(pair[1], &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) == 1 && CMSG_FIRSTHDR(&m)) {
		memcpy(&fd, CMSG_DATA(&c.h), sizeof fd);
		ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_NR_VCPUS);
		keep(r, fd);
	}
	close(pair[0]);
	close(pair[1]);
}

static void wait_for(struct rng *r)
{
	struct pollfd p[2] = { { any(r), POLLIN | POLLOUT, 0 }, { any(r), POLLIN, 0 } };
	struct epoll_event e = { .events = EPOLLIN };
	int ep = epoll_create1(EPOLL_CLOEXEC);
	char byte;

	poll(p, 2, 0);
	epoll_ctl(ep, EPOLL_CTL_ADD, any(r), &e);
	epoll_wait(ep, &e, 1, 0);
	close(ep);
	CHECK(read(any(r), &byte, 0) <= 0);
}

#ifdef __SANITIZE_ADDRESS__
enum { CHILD_WORKS = 0 };       /* gcc 12's AddressSanitizer forks with its allocator's locks as other threads hold them */
#else
enum { CHILD_WORKS = 1 };
#endif

/* The child finds its VMs dead, makes one of its own or runs another program. */
static void child(struct rng *r)
{
	pid_t p = fork();
	int status;

	if (!p) {
		alarm(60);
		if (!CHILD_WORKS)
			execl("/bin/true", "true", NULL);
		for (int i = 0; i < 20; i++)
			ioctl(any(r), KVM_GET_API_VERSION, 0);
		ioctl(any(r), KVM_RUN, 0);
		if (rnd(r, 2))
			close_range(FIRST, FIRST + FDS, 0);
		if (rnd(r, 2))
			execl("/bin/true", "true", NULL);
		_exit(ioctl(open("/dev/kvm", O_RDWR), KVM_GET_API_VERSION, 0) == 12 ? 0 : 1);
	}
	while (p > 0 && waitpid(p, &status, 0) < 0 && errno == EINTR)
		;
	CHECK(p > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void one(struct rng *r)
{
	switch (rnd(r, 40)) {
	case 0 ... 1: new_vm(r); break;
	case 2 ... 9: slot(r); break;
	case 10 ... 15: registers(r); break;
	case 16 ... 21: run(r); break;
	case 22 ... 29: request(r); break;
	case 30: close(any(r)); break;
	case 31: dup2(any(r), any(r)); break;
	case 32: keep(r, dup(any(r))); break;
	case 33: pass(r); break;
	case 34: wait_for(r); break;
	case 35: if (!rnd(r, 8)) child(r); break;
	case 36: if (!rnd(r, 8)) close_range(FIRST + rnd(r, FDS), FIRST + FDS, 0); break;
	case 37: ram[rnd(r, RAM_SIZE)] = (uint8_t)rnd(r, 256); break;
	case 38: keep(r, (int)syscall(SYS_fcntl, any(r), F_DUPFD_CLOEXEC, FIRST)); break;
	default: keep(r, ioctl(any(r), KVM_CREATE_VCPU, rnd(r, 4))); break;
	}
}

static void *chaos(void *arg)
{
	struct rng r = { 88172645463325252ull ^ (uintptr_t)arg * 0x9e3779b97f4a7c15ull };

	while (atomic_fetch_sub(&left, 1) > 0)
		one(&r);
	return NULL;
}

static void on_signal(int sig) { }

int main(int argc, char **argv)
{
	uintptr_t seed = argc > 2 ? strtoul(argv[2], NULL, 0) : 1;
	struct sigaction sa = { .sa_handler = on_signal };
	pthread_t w, t[THREADS];
	void *result;

	atomic_store(&left, argc > 1 ? atol(argv[1]) : 6000);
	alarm(280);
	sigaction(SIGUSR1, &sa, NULL);
	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(ram != MAP_FAILED);
	CHECK(!pthread_create(&w, NULL, witness, NULL));
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&t[i], NULL, chaos, (void *)(seed * 16 + i)));
	/* Their vCPUs may spin: a signal now and then ends that. */
	for (unsigned i = 0; i < THREADS; i++)
		while (pthread_tryjoin_np(t[i], &result)) {
			for (unsigned k = i; k < THREADS; k++)
				pthread_kill(t[k], SIGUSR1);
			usleep(2000);
		}
	atomic_store(&over, true);
	pthread_join(w, NULL);
	close_range(FIRST, FIRST + FDS, 0);     /* LeakSanitizer counts what is left */
	return 0;
}
