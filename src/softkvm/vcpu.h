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
	struct vcpu_api *api;           /* api/'s own */
	struct dirty_ring *ring;
	bool running;                   /* counted in vm->running (guarded by vm->pause_lock) */
};

/*
 * Called by the loop whenever cpu->budget ran out, and on REQ_EXIT: true when KVM_RUN must end with EINTR
 * (immediate_exit, or a signal: KVM_RUN keeps signals blocked while guest code runs and looks for pending ones
 * here, so that their handlers run "after" the ioctl as on Linux). Refills cpu->budget, and says in cpu->look_until how
 * long translated code may do so itself.
 */
bool vcpu_poll(struct cpu *c);
/* On REQ_EVENT, before event_boundary(): takes INIT and SIPI that wait. True: the vCPU is not runnable now, return RUN_WAIT_SIPI. */
bool vcpu_init_sipi(struct cpu *c);
/* The running RDMSR or WRMSR was answered MSR_EXIT: fill in KVM_EXIT_X86_RDMSR/WRMSR and leave;
 * pio_complete() finishes the instruction. */
_Noreturn void vcpu_msr_exit(struct cpu *c, uint32_t msr, bool write, uint64_t data);
uint32_t vcpu_msr_reason(const struct cpu *c);  /* why: KVM_MSR_EXIT_REASON_* */

#endif
