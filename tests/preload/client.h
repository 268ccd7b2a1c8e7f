/* A KVM client as others write them: the C library, /dev/kvm and nothing of ours. Helpers of the preload tests. */
#ifndef PRELOAD_CLIENT_H
#define PRELOAD_CLIENT_H

#include <errno.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define CHECK(cond) do { if (!(cond)) { \
	fprintf(stderr, "%s:%d: %s (errno %d, %s)\n", __FILE__, __LINE__, #cond, errno, strerror(errno)); exit(1); } } while (0)
#define FAILS(call, err) do { errno = 0; CHECK((call) == -1); CHECK(errno == (err)); } while (0)

struct client {
	int sys, vm, vcpu;
	uint8_t *mem;           /* one page at guest physical 0 */
	struct kvm_run *run;
	size_t run_size;
};

/* A VM with a vCPU in real mode whose code is at 0. */
void client_start(struct client *c, const void *code, size_t len);
/* The same on a VM that is there already; `chips`: with KVM_CREATE_IRQCHIP before. */
void client_vcpu(struct client *c, bool chips);
void client_stop(struct client *c);
void client_rip(struct client *c, uint64_t rip, uint64_t rcx);

extern const uint8_t code_hlt[1], code_loop[2];

#endif
