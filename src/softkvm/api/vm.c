/* VM objects: creation, life, vCPUs. A VM lives as long as any handle of it or of one of its vCPUs. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "softkvm/api/api.h"
#include "softkvm/jit/jit.h"
#include "softkvm/bus.h"
#include "softkvm/irqchip.h"

static void locks_init(struct vm *vm)
{
	pthread_mutex_init(&vm->lock, NULL);
	pthread_mutex_init(&vm->pause_lock, NULL);
	pthread_mutex_init(&vm->split_lock, NULL);
	pthread_cond_init(&vm->pause_cond, NULL);
	pthread_mutex_init(&vm->ring_lock, NULL);
	pthread_rwlock_init(&vm->slots_lock, NULL);
}

static void locks_destroy(struct vm *vm)
{
	pthread_mutex_destroy(&vm->lock);
	pthread_mutex_destroy(&vm->pause_lock);
	pthread_mutex_destroy(&vm->split_lock);
	pthread_cond_destroy(&vm->pause_cond);
	pthread_mutex_destroy(&vm->ring_lock);
	pthread_rwlock_destroy(&vm->slots_lock);
}

static void vm_free(struct vm *vm)
{
	unsigned n = atomic_load(&vm->ncpus);

	/* Threads that raise interrupts first, then those who receive them. */
	if (vm->irqchip)
		irqchip_destroy(vm);
	for (unsigned i = 0; i < n; i++)
		vcpu_free(atomic_load(&vm->cpus[i])->vcpu);
	if (vm->bus)
		bus_destroy(vm);
	phys_free(vm);
	if (vm->policy.perf_fd >= 0)
		close(vm->policy.perf_fd);
	if (vm->ring)
		munmap(vm->ring, API_PAGE);
	if (vm->api) {
		msr_filter_free(atomic_load(&vm->api->filter));
		pthread_mutex_destroy(&vm->api->clock_lock);
	}
	free(vm->api);
	locks_destroy(vm);
	free(vm);
}

static void mode_default(struct vm_policy *p)
{
	const char *mode = getenv("LODGE_SOFT_MODE");

	p->translate = !mode || strcmp(mode, "interp");
	if (mode && !strcmp(mode, "translate-at-once"))
		p->jit_mode = JIT_AT_ONCE;
	else if (mode && !strcmp(mode, "lockstep"))
		p->jit_mode = JIT_LOCKSTEP;
}

int vm_new(struct vm **out)
{
	struct vm *vm = calloc(1, sizeof *vm);
	int r = -ENOMEM;

	if (!vm)
		return r;
	locks_init(vm);
	mode_default(&vm->policy);
	vm->policy.code_bytes = 128u << 20;
	vm->policy.perf_fd = -1;
	if (getenv("LODGE_PERF_MAP") && (r = (int)profile_start(vm, SOFTKVM_PROFILE_PERF_MAP)))
		log_warn("softkvm: no perf map: %s", strerror(-r));
	r = -ENOMEM;
	vm->api = calloc(1, sizeof *vm->api);
	if (!vm->api)
		goto fail;
	pthread_mutex_init(&vm->api->clock_lock, NULL);
	vm->api->tsc_khz = tsc_khz_host();
	vm->api->max_vcpu_ids = VM_MAX_VCPU_ID;
	clock_vm_init(vm);
	vm->ring = mmap(NULL, API_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (vm->ring == MAP_FAILED) {
		vm->ring = NULL;
		goto fail;
	}
	r = bus_create(vm);
	if (r)
		goto fail;
	*out = vm;
	return 0;
fail:
	vm_free(vm);
	return r;
}

void vm_ref(struct vm *vm)
{
	atomic_fetch_add(&vm->refs, 1);
}

void vm_unref(struct vm *vm)
{
	if (atomic_fetch_sub(&vm->refs, 1) == 1)
		vm_free(vm);
}
