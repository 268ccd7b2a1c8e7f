/*
 * vCPU threads: one per vCPU, each in its KVM_RUN loop.
 *
 * Exits go to a table of functions from above, called on the vCPU's thread with no lock held. Threads
 * start paused. A thread that is asked for something (pause, a function to run, the end) is kicked out
 * of KVM_RUN by `immediate_exit` and a signal (SIGRTMIN), finishes the I/O it was in the middle of, so
 * that its registers are whole, and obeys. Everything but vcpus_destroy() may be called from any
 * thread, a vCPU's own included.
 */
#ifndef KVM_VCPUS_H
#define KVM_VCPUS_H

#include "kvm/kvm.h"

struct vcpus;

enum vcpu_action { VCPU_CONTINUE, VCPU_STOP /* this vCPU waits until vcpus_resume() */ };

struct vcpu_handlers {
	/* One element of `size` 1, 2 or 4 bytes; string instructions come element by element. */
	void (*pio)(void *opaque, uint16_t port, void *data, unsigned size, bool write);
	/* 1 to 8 bytes. */
	void (*mmio)(void *opaque, uint64_t gpa, void *data, unsigned len, bool write);
	/* Triple fault. NULL here and below: VCPU_STOP. */
	enum vcpu_action (*shutdown)(void *opaque, unsigned cpu);
	/* KVM_SYSTEM_EVENT_*. */
	enum vcpu_action (*system_event)(void *opaque, unsigned cpu, uint32_t type, uint64_t data);
	/* KVM_EXIT_INTERNAL_ERROR, FAIL_ENTRY, an unknown exit, or KVM_RUN failed with `error` (-errno, else 0). */
	enum vcpu_action (*internal_error)(void *opaque, unsigned cpu, struct kvm_run *run, int error);
	enum vcpu_action (*debug)(void *opaque, unsigned cpu, struct kvm_run *run);
	/* Split irqchip: the guest acknowledged `vector`; may be NULL. */
	void (*ioapic_eoi)(void *opaque, uint8_t vector);
};

/* Create `n` vCPUs with ids 0..n-1, without threads: the caller sets CPUID and registers. */
int vcpus_create(struct vcpus **out, struct kvm_vm *vm, unsigned n, const struct vcpu_handlers *h, void *opaque,
		 struct err *err);
void vcpus_destroy(struct vcpus *s);            /* stops the threads; not from a vCPU's thread */
unsigned vcpus_count(const struct vcpus *s);
struct kvm_vcpu *vcpus_get(struct vcpus *s, unsigned i);

/*
 * Before vcpus_start(): `fn` runs on each vCPU's thread before all else there (a sandbox), after the provider did what needs
 * more rights than running a guest. When it fails (-errno) the vCPU reports an internal error instead of running.
 */
void vcpus_on_start(struct vcpus *s, int (*fn)(void *opaque), void *opaque);
int vcpus_start(struct vcpus *s, struct err *err);      /* threads, paused; vcpus_resume() runs them */
/* End the threads and wait for them; a handler that is running finishes first. Not from a vCPU's thread. */
void vcpus_stop(struct vcpus *s);

/* After return no other vCPU runs guest code or a handler. On a vCPU's own thread, that one follows when its handler returns. */
void vcpus_pause(struct vcpus *s);
/* As vcpus_pause() without waiting: for a handler that asks the main thread for a reset. */
void vcpus_request_pause(struct vcpus *s);
void vcpus_resume(struct vcpus *s);
bool vcpus_paused(struct vcpus *s);

/* Make vCPU `i` leave and re-enter KVM_RUN. */
void vcpus_kick(struct vcpus *s, unsigned i);
/* Run `fn` on the thread of vCPU `i`, between two KVM_RUNs, and wait. Before vcpus_start(): in the caller. */
void vcpus_run_on(struct vcpus *s, unsigned i, void (*fn)(struct kvm_vcpu *v, void *opaque), void *opaque);

#endif
