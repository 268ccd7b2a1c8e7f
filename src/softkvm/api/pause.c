/*
 * Stopping the world. A pause is owned by one thread (which may nest it) and lasts until every vCPU
 * has left the set of running ones or parked. A vCPU that asks for a pause counts as parked while it
 * waits, so two that ask at once do not wait for each other. Running vCPUs look at REQ_PAUSE at block
 * boundaries, microseconds apart, so the wait spins a little first.
 */
#include <sched.h>
#include <stdatomic.h>

#include "softkvm/api/api.h"

#define PAUSE_SPINS 2000

static bool counted(const struct cpu *c)
{
	return c && c->vcpu && c->vcpu->running;
}

static void set_running(struct cpu *c, bool on)
{
	struct vm *vm = c->vm;
	unsigned n = __atomic_load_n(&vm->running, __ATOMIC_RELAXED);

	c->vcpu->running = on;
	__atomic_store_n(&vm->running, on ? n + 1 : n - 1, __ATOMIC_RELEASE);
	if (!on && n == 1 && vm->pausing)
		pthread_cond_broadcast(&vm->pause_cond);
}

static bool mine(struct vm *vm)
{
	return vm->pausing && pthread_equal(vm->pause_owner, pthread_self());
}

void vm_pause_all(struct vm *vm, struct cpu *self)
{
	pthread_mutex_lock(&vm->pause_lock);
	if (mine(vm)) {
		vm->pausing++;
		pthread_mutex_unlock(&vm->pause_lock);
		return;
	}
	if (counted(self))
		set_running(self, false);
	else
		self = NULL;
	while (vm->pausing)
		pthread_cond_wait(&vm->pause_cond, &vm->pause_lock);
	vm->pausing = 1;
	vm->pause_owner = pthread_self();
	if (vm->running)
		vm_request_all(vm, REQ_PAUSE, self);
	for (int spin = 0; vm->running && spin < PAUSE_SPINS; spin++) {
		pthread_mutex_unlock(&vm->pause_lock);
		for (int i = 0; i < 20 && __atomic_load_n(&vm->running, __ATOMIC_ACQUIRE); i++)
			__builtin_ia32_pause();
		pthread_mutex_lock(&vm->pause_lock);
		if (spin > 20)
			break;
	}
	while (vm->running)
		pthread_cond_wait(&vm->pause_cond, &vm->pause_lock);
	/* The pauser goes on executing: it is running again, but nobody else can start a pause now. */
	if (self)
		set_running(self, true);
	pthread_mutex_unlock(&vm->pause_lock);
}

void vm_resume_all(struct vm *vm, struct cpu *self)
{
	(void)self;
	pthread_mutex_lock(&vm->pause_lock);
	if (vm->pausing && --vm->pausing == 0)
		pthread_cond_broadcast(&vm->pause_cond);
	pthread_mutex_unlock(&vm->pause_lock);
}

void vm_enter_running(struct cpu *c)
{
	struct vm *vm = c->vm;

	pthread_mutex_lock(&vm->pause_lock);
	while (vm->pausing && !mine(vm))
		pthread_cond_wait(&vm->pause_cond, &vm->pause_lock);
	set_running(c, true);
	pthread_mutex_unlock(&vm->pause_lock);
}

void vm_leave_running(struct cpu *c)
{
	pthread_mutex_lock(&c->vm->pause_lock);
	if (c->vcpu->running)
		set_running(c, false);
	pthread_mutex_unlock(&c->vm->pause_lock);
}

void vm_park(struct cpu *c)
{
	/* Cleared before the lock is taken: a pause that starts later sets it again. */
	atomic_fetch_and(&c->requests, ~(uint32_t)REQ_PAUSE);
	vm_leave_running(c);
	vm_enter_running(c);
}

void vm_request_all(struct vm *vm, uint32_t req, struct cpu *except)
{
	unsigned n = atomic_load(&vm->ncpus);

	for (unsigned i = 0; i < n; i++) {
		struct cpu *c = atomic_load(&vm->cpus[i]);

		if (c && c != except)
			cpu_request(c, req);
	}
}
