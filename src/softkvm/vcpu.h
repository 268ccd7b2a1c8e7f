/*
 * The API object around an engine CPU: KVM_RUN, sleeping, signals, MP state. Private to softkvm.
 */
#ifndef SOFTKVM_VCPU_H
#define SOFTKVM_VCPU_H

#include <pthread.h>

#include "softkvm/cpu.h"

struct vcpu {
	struct cpu cpu;
	pthread_mutex_t lock;           /* held during every ioctl of the vCPU, KVM_RUN included (as vcpu->mutex in Linux) */
	_Atomic uint32_t mp_state;      /* KVM_MP_STATE_* */
	int wake_fd;                    /* eventfd: KVM_RUN sleeps in ppoll() on it, so a signal ends the sleep */
	_Atomic bool sleeping;
	size_t run_size;
	bool has_sigmask;
	uint64_t sigmask;
	struct kvm_cpuid_entry2 *cpuid;
	struct vcpu_api *api;           /* vcpu*.c's own */
};

#endif
