/*
 * The client side of the KVM API: provider choice, VM, vCPUs, memory slots, interrupt routes.
 *
 * Everything above talks to this and does not know which provider is below. The functions are thin:
 * one documented ioctl each, with an error message.
 */
#ifndef KVM_KVM_H
#define KVM_KVM_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct kvm;         /* the system handle */
struct kvm_vm;
struct kvm_vcpu;

enum kvm_accel { ACCEL_AUTO, ACCEL_KVM, ACCEL_SOFT };
/* How softkvm executes guest code; see kvm_vm_soft(). */
enum kvm_soft_mode { SOFT_DEFAULT, SOFT_INTERP, SOFT_TRANSLATE, SOFT_LOCKSTEP };

/* AUTO: whichever is faster here (a calibration of a millisecond or two, logged). */
int kvm_open(struct kvm **out, enum kvm_accel accel, struct err *err);
void kvm_close(struct kvm *k);
const char *kvm_provider_name(const struct kvm *k);     /* "kvm" or "soft" */
int kvm_check_extension(struct kvm *k, long cap);       /* 0: absent */
int kvm_ioctl(struct kvm *k, unsigned long req, void *arg);
/* Guest instructions a second of a plain loop, measured now in about a millisecond; 0 when no guest can run. */
uint64_t kvm_speed(struct kvm *k);

struct kvm_soft_config {
	enum kvm_soft_mode mode;
	uint64_t code_bytes;    /* for translations of all vCPUs; 0: 128 MiB, or 1 MiB for each vCPU where that is more */
	bool perf_map;          /* write /tmp/perf-PID.map */
	bool sample;            /* for kvm_vcpu_hot() */
};
/* Before vCPUs are made: how softkvm executes guest code on `vcpus` of them. Linux KVM knows nothing of it and is left alone. */
int kvm_vm_soft(struct kvm_vm *vm, const struct kvm_soft_config *cfg, unsigned vcpus, struct err *err);
int kvm_vm_create(struct kvm_vm **out, struct kvm *k, struct err *err);
void kvm_vm_destroy(struct kvm_vm *vm);
int kvm_vm_ioctl(struct kvm_vm *vm, unsigned long req, void *arg);      /* 0 or more, or -errno */
int kvm_vm_ioctl_val(struct kvm_vm *vm, unsigned long req, unsigned long val);
struct kvm *kvm_vm_system(struct kvm_vm *vm);
/* Slot with KVM_SET_USER_MEMORY_REGION; size 0 deletes. */
int kvm_vm_set_slot(struct kvm_vm *vm, unsigned slot, uint64_t gpa, uint64_t size, void *host,
		    uint32_t flags, struct err *err);
/* Host wrote [gpa, gpa+len) of guest memory: softkvm drops code it had decoded there; no-op on Linux KVM. */
void kvm_vm_code_written(struct kvm_vm *vm, uint64_t gpa, uint64_t len);
int kvm_vm_irq_line(struct kvm_vm *vm, unsigned gsi, int level);
int kvm_vm_signal_msi(struct kvm_vm *vm, uint64_t addr, uint32_t data);

int kvm_vcpu_create(struct kvm_vcpu **out, struct kvm_vm *vm, unsigned id, struct err *err);
void kvm_vcpu_destroy(struct kvm_vcpu *v);
int kvm_vcpu_ioctl(struct kvm_vcpu *v, unsigned long req, void *arg);
struct kvm_run *kvm_vcpu_run_area(struct kvm_vcpu *v);
struct kvm_coalesced_mmio_ring *kvm_vcpu_coalesced_ring(struct kvm_vcpu *v);    /* NULL: none */
unsigned kvm_vcpu_id(const struct kvm_vcpu *v);
/* What the provider counts on a vCPU, by name; how many of them were stored. 0: it counts nothing (Linux KVM). */
struct kvm_counter { const char *name; uint64_t value; };
unsigned kvm_vcpu_counters(struct kvm_vcpu *v, struct kvm_counter *out, unsigned max);
/* Where a vCPU was most often when it looked around, first the most frequent; *total: samples. 0: not sampled. */
struct kvm_hot { uint64_t addr, samples; unsigned cpl; };
unsigned kvm_vcpu_hot(struct kvm_vcpu *v, struct kvm_hot *out, unsigned max, uint64_t *total);
/* On the thread that will run it, before its rights are cut: the provider opens what running takes. */
void kvm_vcpu_prepare(struct kvm_vcpu *v);
/* KVM_RUN: 0, or -EINTR, -EAGAIN, ... */
int kvm_vcpu_run(struct kvm_vcpu *v);

#endif
