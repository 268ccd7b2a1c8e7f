/* A provider of the KVM API: files with ioctl, mmap and close. Private to this folder. */
#ifndef KVM_PROVIDER_H
#define KVM_PROVIDER_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct kvm_counter;
struct kvm_hot;
struct kvm_file {
	const struct kvm_provider *p;
	int fd;                 /* /dev/kvm */
	void *soft;             /* struct softkvm_file */
};

struct kvm_provider {
	const char *name;
	int (*open)(struct kvm_file *f, struct err *err);
	/* Result or -errno. A request that makes a file fills `created` (else NULL). */
	int (*ioctl)(struct kvm_file *f, unsigned long req, uintptr_t arg, struct kvm_file *created);
	/* From offset 0; NULL on failure with errno. */
	void *(*mmap)(struct kvm_file *f, size_t len);
	void (*munmap)(struct kvm_file *f, void *p, size_t len);
	void (*close)(struct kvm_file *f);
	int (*code_written)(struct kvm_file *vm, uint64_t gpa, uint64_t len);   /* NULL: not needed */
	void (*prepare)(struct kvm_file *vcpu);         /* NULL: nothing to do */
	unsigned (*counters)(struct kvm_file *vcpu, struct kvm_counter *out, unsigned max);     /* NULL: none */
	unsigned (*hot)(struct kvm_file *vcpu, struct kvm_hot *out, unsigned max, uint64_t *total);     /* NULL: none */
};

extern const struct kvm_provider kvm_provider_linux;
extern const struct kvm_provider kvm_provider_soft;

/* Guest instructions a second of a plain loop on this host's /dev/kvm; 0 when it cannot run one. */
uint64_t kvm_measure_rate(struct kvm_file *sys);

#endif
