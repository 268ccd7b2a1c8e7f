/*
 * The thread of a vCPU has two states. Running: in KVM_RUN or in a handler, no lock held. Parked: under
 * `lock`, looking for functions to run, waiting while paused. `attention` says that somebody wants it
 * parked; it is set under the lock before the kick, and the thread looks at it after every exit.
 */
#include "kvm/vcpus.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"

enum { VCPU_STACK = 1 << 20 };

struct call {
	struct call *next;
	void (*fn)(struct kvm_vcpu *v, void *opaque);
	void *opaque;
	bool done;
};

struct cpu {
	struct vcpus *set;
	struct kvm_vcpu *v;
	pthread_t thread;
	unsigned index;
	bool started, running;          /* running: outside the lock */
	bool halted;                    /* a handler said VCPU_STOP */
	bool io_pending;                /* the next KVM_RUN completes an access: this thread only */
	bool attention;                 /* atomic */
	struct call *calls;
};

struct vcpus {
	struct kvm_vm *vm;
	const struct vcpu_handlers *h;
	void *opaque;
	pthread_mutex_t lock, ring_lock;
	pthread_cond_t wake, parked;    /* for vCPU threads; for those who wait for them */
	bool paused, stopping;
	int (*on_start)(void *opaque);
	void *on_start_opaque;
	unsigned n;
	struct cpu cpu[];
};

static int kick_signal(void)
{
	return SIGRTMIN;
}

static void on_kick(int sig)
{
	(void)sig; /* its only work is to interrupt KVM_RUN */
}

static void install_kick(void)
{
	struct sigaction sa = { .sa_handler = on_kick };
	sigaction(kick_signal(), &sa, NULL);
}

int vcpus_create(struct vcpus **out, struct kvm_vm *vm, unsigned n, const struct vcpu_handlers *h, void *opaque,
		 struct err *err)
{
	struct vcpus *s = calloc(1, sizeof *s + n * sizeof s->cpu[0]);
	if (!s)
		return err_set(err, -ENOMEM, "vCPUs: out of memory");
	s->vm = vm;
	s->h = h;
	s->opaque = opaque;
	s->paused = true;
	pthread_mutex_init(&s->lock, NULL);
	pthread_mutex_init(&s->ring_lock, NULL);
	pthread_cond_init(&s->wake, NULL);
	pthread_cond_init(&s->parked, NULL);
	for (; s->n < n; s->n++) {
		struct cpu *c = &s->cpu[s->n];
		c->set = s;
		c->index = s->n;
		int r = kvm_vcpu_create(&c->v, vm, s->n, err);
		if (r) {
			vcpus_destroy(s);
			return r;
		}
	}
	install_kick();
	*out = s;
	return 0;
}

void vcpus_destroy(struct vcpus *s)
{
	if (!s)
		return;
	vcpus_stop(s);
	for (unsigned i = 0; i < s->n; i++)
		kvm_vcpu_destroy(s->cpu[i].v);
	pthread_mutex_destroy(&s->lock);
	pthread_mutex_destroy(&s->ring_lock);
	pthread_cond_destroy(&s->wake);
	pthread_cond_destroy(&s->parked);
	free(s);
}

unsigned vcpus_count(const struct vcpus *s)
{
	return s->n;
}

struct kvm_vcpu *vcpus_get(struct vcpus *s, unsigned i)
{
	return i < s->n ? s->cpu[i].v : NULL;
}

/* --- exits --- */

static void call_mmio(struct vcpus *s, uint64_t gpa, void *data, unsigned len, bool write)
{
	if (s->h->mmio)
		s->h->mmio(s->opaque, gpa, data, len, write);
	else if (!write)
		memset(data, 0xff, len);
}

static void call_pio(struct vcpus *s, uint16_t port, void *data, unsigned size, bool write)
{
	if (s->h->pio)
		s->h->pio(s->opaque, port, data, size, write);
	else if (!write)
		memset(data, 0xff, size);
}

/* The ring is the VM's, seen through every vCPU; its writes came before whatever this exit is about. */
static void drain_ring(struct cpu *c)
{
	struct vcpus *s = c->set;
	struct kvm_coalesced_mmio_ring *r = kvm_vcpu_coalesced_ring(c->v);
	const uint32_t max = (4096 - sizeof *r) / sizeof r->coalesced_mmio[0];
	if (!r || __atomic_load_n(&r->first, __ATOMIC_RELAXED) == __atomic_load_n(&r->last, __ATOMIC_ACQUIRE))
		return;
	pthread_mutex_lock(&s->ring_lock);
	uint32_t first = r->first % max;
	while (first != __atomic_load_n(&r->last, __ATOMIC_ACQUIRE) % max) {
		struct kvm_coalesced_mmio e = r->coalesced_mmio[first];
		unsigned len = MIN(e.len, 8u);
		if (e.pio)
			call_pio(s, (uint16_t)e.phys_addr, e.data, MIN(len, 4u), true);
		else
			call_mmio(s, e.phys_addr, e.data, len, true);
		first = (first + 1) % max;
		__atomic_store_n(&r->first, first, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&s->ring_lock);
}

static void exit_io(struct cpu *c, struct kvm_run *run)
{
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size)
		call_pio(c->set, run->io.port, data, run->io.size, run->io.direction == KVM_EXIT_IO_OUT);
	c->io_pending = true;
}

static enum vcpu_action exit_error(struct cpu *c, struct kvm_run *run, int error)
{
	const struct vcpu_handlers *h = c->set->h;
	return h->internal_error ? h->internal_error(c->set->opaque, c->index, run, error) : VCPU_STOP;
}

static enum vcpu_action exit_event(struct cpu *c, struct kvm_run *run)
{
	const struct vcpu_handlers *h = c->set->h;
	return h->system_event ? h->system_event(c->set->opaque, c->index, run->system_event.type,
						 run->system_event.flags) : VCPU_STOP;
}

static enum vcpu_action handle_exit(struct cpu *c, struct kvm_run *run)
{
	struct vcpus *s = c->set;
	drain_ring(c);
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		exit_io(c, run);
		return VCPU_CONTINUE;
	case KVM_EXIT_MMIO:
		call_mmio(s, run->mmio.phys_addr, run->mmio.data, MIN(run->mmio.len, 8u), run->mmio.is_write);
		c->io_pending = true;
		return VCPU_CONTINUE;
	case KVM_EXIT_INTR:
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		return VCPU_CONTINUE;
	case KVM_EXIT_SHUTDOWN:
		return s->h->shutdown ? s->h->shutdown(s->opaque, c->index) : VCPU_STOP;
	case KVM_EXIT_SYSTEM_EVENT:
		return exit_event(c, run);
	case KVM_EXIT_DEBUG:
		return s->h->debug ? s->h->debug(s->opaque, c->index, run) : VCPU_STOP;
	case KVM_EXIT_IOAPIC_EOI:
		if (s->h->ioapic_eoi)
			s->h->ioapic_eoi(s->opaque, run->eoi.vector);
		return VCPU_CONTINUE;
	case KVM_EXIT_HLT: /* only without interrupt controllers below the API: nothing will wake it */
		return VCPU_STOP;
	default:
		return exit_error(c, run, 0);
	}
}

static enum vcpu_action run_once(struct cpu *c)
{
	struct kvm_run *run = kvm_vcpu_run_area(c->v);
	int r = kvm_vcpu_run(c->v);
	c->io_pending = false; /* entered: the access that was open is complete */
	if (r == -EINTR || r == -EAGAIN) {
		drain_ring(c);
		return VCPU_CONTINUE;
	}
	if (r < 0)
		return exit_error(c, run, r);
	return handle_exit(c, run);
}

/*
 * Registers are whole only after the entry that follows an I/O exit. With immediate_exit that entry
 * does nothing else; an access in several parts exits once more for each.
 */
static void complete_io(struct cpu *c)
{
	struct kvm_run *run = kvm_vcpu_run_area(c->v);
	while (c->io_pending) {
		__atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		run_once(c);
	}
}

/* --- the thread --- */

static void run_calls(struct cpu *c)
{
	struct vcpus *s = c->set;
	while (c->calls) {
		struct call *k = c->calls;
		c->calls = k->next;
		pthread_mutex_unlock(&s->lock);
		k->fn(c->v, k->opaque);
		pthread_mutex_lock(&s->lock);
		k->done = true;
		pthread_cond_broadcast(&s->parked);
	}
}

/* Parked until there is guest code to run; false: the thread ends. */
static bool park(struct cpu *c)
{
	struct vcpus *s = c->set;
	struct kvm_run *run = kvm_vcpu_run_area(c->v);
	complete_io(c);
	pthread_mutex_lock(&s->lock);
	c->running = false;
	pthread_cond_broadcast(&s->parked);
	for (;;) {
		run_calls(c);
		if (s->stopping || (!s->paused && !c->halted))
			break;
		pthread_cond_wait(&s->wake, &s->lock);
	}
	__atomic_store_n(&c->attention, false, __ATOMIC_SEQ_CST);
	__atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	c->running = !s->stopping;
	bool go = c->running;
	pthread_mutex_unlock(&s->lock);
	return go;
}

void vcpus_on_start(struct vcpus *s, int (*fn)(void *opaque), void *opaque)
{
	s->on_start = fn;
	s->on_start_opaque = opaque;
}

/* The first thing on a vCPU's thread; false: it must not run. */
static bool enter(struct cpu *c)
{
	struct vcpus *s = c->set;
	kvm_vcpu_prepare(c->v);
	int r = s->on_start ? s->on_start(s->on_start_opaque) : 0;
	if (!r)
		return true;
	log_error("vcpu%u: the thread cannot be sandboxed: %s", c->index, strerror(-r));
	if (s->h->internal_error)
		s->h->internal_error(s->opaque, c->index, kvm_vcpu_run_area(c->v), r);
	pthread_mutex_lock(&s->lock);
	c->running = false;
	c->halted = true;
	pthread_cond_broadcast(&s->parked);
	pthread_mutex_unlock(&s->lock);
	return false;
}

static void *cpu_thread(void *arg)
{
	struct cpu *c = arg;
	char name[16];
	snprintf(name, sizeof name, "vcpu%u", c->index);
	pthread_setname_np(pthread_self(), name);
	if (!enter(c))
		return NULL;
	while (park(c)) {
		while (!__atomic_load_n(&c->attention, __ATOMIC_SEQ_CST)) {
			if (run_once(c) == VCPU_STOP) {
				complete_io(c);
				pthread_mutex_lock(&c->set->lock);
				c->halted = true;
				pthread_mutex_unlock(&c->set->lock);
				break;
			}
		}
	}
	return NULL;
}

/* vCPU threads take the kick and what their own faults raise; the rest is the main thread's. */
static void thread_mask(sigset_t *set)
{
	static const int keep[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT };
	sigfillset(set);
	sigdelset(set, kick_signal());
	for (size_t i = 0; i < ARRAY_SIZE(keep); i++)
		sigdelset(set, keep[i]);
}

int vcpus_start(struct vcpus *s, struct err *err)
{
	pthread_attr_t a;
	sigset_t mask, old;
	int r = 0;
	pthread_attr_init(&a);
	pthread_attr_setstacksize(&a, VCPU_STACK);
	thread_mask(&mask);
	pthread_sigmask(SIG_SETMASK, &mask, &old);
	pthread_mutex_lock(&s->lock); /* a thread parks first, so it waits until its struct is filled */
	for (unsigned i = 0; !r && i < s->n; i++) {
		struct cpu *c = &s->cpu[i];
		if (c->started)
			continue;
		c->running = true; /* until it parks */
		r = pthread_create(&c->thread, &a, cpu_thread, c);
		c->started = !r;
		c->running = !r;
	}
	pthread_mutex_unlock(&s->lock);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&a);
	if (r)
		vcpus_stop(s);
	return r ? err_set_errno(err, -r, "cannot start vCPU threads") : 0;
}

/* The lock is held. */
static void kick_locked(struct cpu *c)
{
	__atomic_store_n(&c->attention, true, __ATOMIC_SEQ_CST);
	if (!c->started || !c->running)
		return;
	__atomic_store_n(&kvm_vcpu_run_area(c->v)->immediate_exit, 1, __ATOMIC_SEQ_CST);
	pthread_kill(c->thread, kick_signal());
}

static bool is_self(const struct cpu *c)
{
	return c->started && pthread_equal(c->thread, pthread_self());
}

void vcpus_stop(struct vcpus *s)
{
	pthread_mutex_lock(&s->lock);
	s->stopping = true;
	for (unsigned i = 0; i < s->n; i++)
		kick_locked(&s->cpu[i]);
	pthread_cond_broadcast(&s->wake);
	pthread_mutex_unlock(&s->lock);
	for (unsigned i = 0; i < s->n; i++) {
		if (s->cpu[i].started)
			pthread_join(s->cpu[i].thread, NULL);
	}
	pthread_mutex_lock(&s->lock);
	for (unsigned i = 0; i < s->n; i++)
		s->cpu[i].started = false;
	s->stopping = false;
	pthread_mutex_unlock(&s->lock);
}

void vcpus_request_pause(struct vcpus *s)
{
	pthread_mutex_lock(&s->lock);
	s->paused = true;
	for (unsigned i = 0; i < s->n; i++)
		kick_locked(&s->cpu[i]);
	pthread_mutex_unlock(&s->lock);
}

/* The cpu struct of the calling thread, or NULL. */
static struct cpu *self(struct vcpus *s)
{
	for (unsigned i = 0; i < s->n; i++) {
		if (is_self(&s->cpu[i]))
			return &s->cpu[i];
	}
	return NULL;
}

/*
 * Wait on `parked`. A vCPU thread that waits counts as parked itself and serves what others ask of
 * it, or two that wait for each other would wait for ever.
 */
static void wait_parked(struct vcpus *s, struct cpu *me)
{
	if (me) {
		bool was = me->running;
		me->running = false;
		pthread_cond_broadcast(&s->parked);
		run_calls(me);
		pthread_cond_wait(&s->parked, &s->lock);
		me->running = was;
		return;
	}
	pthread_cond_wait(&s->parked, &s->lock);
}

static bool all_parked(struct vcpus *s, struct cpu *me)
{
	for (unsigned i = 0; i < s->n; i++) {
		if (&s->cpu[i] != me && s->cpu[i].started && s->cpu[i].running)
			return false;
	}
	return true;
}

void vcpus_pause(struct vcpus *s)
{
	vcpus_request_pause(s);
	pthread_mutex_lock(&s->lock);
	struct cpu *me = self(s);
	while (!all_parked(s, me))
		wait_parked(s, me);
	pthread_mutex_unlock(&s->lock);
}

void vcpus_resume(struct vcpus *s)
{
	pthread_mutex_lock(&s->lock);
	s->paused = false;
	for (unsigned i = 0; i < s->n; i++)
		s->cpu[i].halted = false;
	pthread_cond_broadcast(&s->wake);
	pthread_mutex_unlock(&s->lock);
}

bool vcpus_paused(struct vcpus *s)
{
	pthread_mutex_lock(&s->lock);
	bool p = s->paused;
	pthread_mutex_unlock(&s->lock);
	return p;
}

void vcpus_kick(struct vcpus *s, unsigned i)
{
	pthread_mutex_lock(&s->lock);
	if (i < s->n)
		kick_locked(&s->cpu[i]);
	pthread_mutex_unlock(&s->lock);
}

void vcpus_run_on(struct vcpus *s, unsigned i, void (*fn)(struct kvm_vcpu *v, void *opaque), void *opaque)
{
	struct cpu *c = &s->cpu[i];
	pthread_mutex_lock(&s->lock);
	if (!c->started || is_self(c)) {
		pthread_mutex_unlock(&s->lock);
		fn(c->v, opaque);
		return;
	}
	struct call k = { .fn = fn, .opaque = opaque };
	struct call **p = &c->calls;
	while (*p)
		p = &(*p)->next;
	*p = &k;
	kick_locked(c);
	pthread_cond_broadcast(&s->wake);
	pthread_cond_broadcast(&s->parked); /* it may be in wait_parked() */
	struct cpu *me = self(s);
	while (!k.done)
		wait_parked(s, me);
	pthread_mutex_unlock(&s->lock);
}
