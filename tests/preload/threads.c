/* Signals that end KVM_RUN, a vCPU closed while it runs, slots that change under running vCPUs. */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "client.h"

static _Atomic int handled;

static void on_signal(int sig)
{
	atomic_fetch_add(&handled, 1);
}

struct runner {
	struct client *c;
	pthread_t thread;
	_Atomic bool started, done;
	int result, err;
};

static void *run_thread(void *opaque)
{
	struct runner *r = opaque;

	atomic_store(&r->started, true);
	r->result = ioctl(r->c->vcpu, KVM_RUN, 0);
	r->err = errno;
	atomic_store(&r->done, true);
	return NULL;
}

static void start(struct runner *r, struct client *c)
{
	memset(r, 0, sizeof *r);
	r->c = c;
	CHECK(!pthread_create(&r->thread, NULL, run_thread, r));
	while (!atomic_load(&r->started))
		usleep(100);
	usleep(20000);
	CHECK(!atomic_load(&r->done));
}

static void signals(void)
{
	struct sigaction sa = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	struct client c;
	struct runner r;

	sigaction(SIGUSR1, &sa, NULL);
	client_start(&c, code_loop, 2);
	start(&r, &c);
	pthread_kill(r.thread, SIGUSR1);
	pthread_join(r.thread, NULL);
	CHECK(r.result == -1 && r.err == EINTR && c.run->exit_reason == KVM_EXIT_INTR && atomic_load(&handled) == 1);
	/* Asked for beforehand: no guest instruction runs. */
	c.run->immediate_exit = 1;
	FAILS(ioctl(c.vcpu, KVM_RUN, 0), EINTR);
	c.run->immediate_exit = 0;
	client_stop(&c);
}

/* What is ignored, by default or on request, ends neither a running nor a halted vCPU's call. */
static void ignored_signals(const uint8_t *code, size_t len, bool chips)
{
	struct sigaction handle = { .sa_handler = on_signal }, ignore = { .sa_handler = SIG_IGN };
	struct client c;
	struct runner r;

	client_start(&c, code, len);
	if (chips) {
		close(c.vcpu);
		CHECK(munmap(c.run, c.run_size) == 0);
		close(c.vm);
		CHECK((c.vm = ioctl(c.sys, KVM_CREATE_VM, 0)) >= 0);
		client_vcpu(&c, true);
	}
	sigaction(SIGUSR2, &ignore, NULL);
	start(&r, &c);
	for (int i = 0; i < 5; i++) {
		pthread_kill(r.thread, SIGCHLD);
		pthread_kill(r.thread, SIGWINCH);
		pthread_kill(r.thread, SIGUSR2);
		usleep(5000);
		CHECK(!atomic_load(&r.done));
	}
	sigaction(SIGCHLD, &handle, NULL);
	pthread_kill(r.thread, SIGCHLD);
	pthread_join(r.thread, NULL);
	CHECK(r.result == -1 && r.err == EINTR);
	sigaction(SIGCHLD, &(struct sigaction){ .sa_handler = SIG_DFL }, NULL);
	sigaction(SIGUSR2, &(struct sigaction){ .sa_handler = SIG_DFL }, NULL);
	client_stop(&c);
}

/* A signal that only KVM_SET_SIGNAL_MASK lets through ends KVM_RUN and stays pending. */
static void signal_mask(void)
{
	struct kvm_signal_mask *m = calloc(1, sizeof *m + 8);
	sigset_t block, pending;
	struct client c;

	client_start(&c, code_loop, 2);
	sigemptyset(&block);
	sigaddset(&block, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &block, NULL);
	m->len = 8;
	CHECK(ioctl(c.vcpu, KVM_SET_SIGNAL_MASK, m) == 0);
	raise(SIGUSR2);
	FAILS(ioctl(c.vcpu, KVM_RUN, 0), EINTR);
	sigpending(&pending);
	CHECK(sigismember(&pending, SIGUSR2));
	CHECK(sigtimedwait(&block, NULL, &(struct timespec){ 0 }) == SIGUSR2);
	client_stop(&c);
	free(m);
}

static void closed_while_running(void)
{
	struct client c;
	struct runner r;
	int vm, vcpu;

	client_start(&c, code_loop, 2);
	start(&r, &c);
	vm = c.vm;
	vcpu = c.vcpu;
	CHECK(close(vcpu) == 0 && close(vm) == 0);
	FAILS(ioctl(vcpu, KVM_RUN, 0), EBADF);
	pthread_kill(r.thread, SIGUSR1);
	pthread_join(r.thread, NULL);
	CHECK(r.result == -1 && r.err == EINTR);
	munmap(c.run, c.run_size);
	munmap(c.mem, 4096);
	close(c.sys);
}

/* The guest increments a word of a second slot, which comes, goes and moves; an exit for MMIO is as good. */
static void *incrementing(void *opaque)
{
	struct runner *r = opaque;

	while (!atomic_load(&r->done)) {
		if (ioctl(r->c->vcpu, KVM_RUN, 0) < 0) {
			CHECK(errno == EINTR);
			continue;
		}
		CHECK(r->c->run->exit_reason == KVM_EXIT_MMIO);
	}
	return NULL;
}

static void racing_slots(void)
{
	static const uint8_t code[] = { 0xff, 0x06, 0x00, 0x20, 0xeb, 0xfa };   /* 1: incw 0x2000; jmp 1b */
	uint8_t *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct client c;
	struct runner r = { .c = &c };

	client_start(&c, code, sizeof code);
	CHECK(!pthread_create(&r.thread, NULL, incrementing, &r));
	for (int i = 0; i < 300; i++) {
		struct kvm_userspace_memory_region m = { .slot = 1, .memory_size = 4096, .guest_phys_addr = 0x2000,
			.userspace_addr = (uintptr_t)page + (i & 1) * 4096, .flags = i & 2 ? KVM_MEM_LOG_DIRTY_PAGES : 0 };
		uint64_t bits;
		struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = &bits };

		CHECK(ioctl(c.vm, KVM_SET_USER_MEMORY_REGION, &m) == 0);
		if (i & 2)
			CHECK(ioctl(c.vm, KVM_GET_DIRTY_LOG, &log) == 0);
		usleep(50);
		if (i & 4) {
			m.guest_phys_addr = 0x4000;
			CHECK(ioctl(c.vm, KVM_SET_USER_MEMORY_REGION, &m) == 0);
		}
		m.memory_size = 0;
		CHECK(ioctl(c.vm, KVM_SET_USER_MEMORY_REGION, &m) == 0);
		/* After the call returns the page is the client's own. */
		memset(page, 0, 8192);
		CHECK(page[0] == 0 && page[4096] == 0);
	}
	atomic_store(&r.done, true);
	pthread_kill(r.thread, SIGUSR1);
	c.run->immediate_exit = 1;
	pthread_join(r.thread, NULL);
	client_stop(&c);
	munmap(page, 8192);
}

int main(void)
{
	signals();
	ignored_signals(code_loop, 2, false);
	ignored_signals(code_hlt, 1, true);
	signal_mask();
	closed_while_running();
	racing_slots();
	return 0;
}
