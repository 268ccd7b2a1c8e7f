/*
 * softkvm: the KVM API in user space. Public interface of libsoftkvm.
 *
 * A `struct softkvm_file` stands for what Linux gives as a descriptor: the system (/dev/kvm), a VM or
 * a vCPU. Requests, structures, results and errno values are those of <linux/kvm.h> and Linux
 * Documentation/virt/kvm/api.rst. Handles are counted: a VM lives as long as one of its vCPUs.
 */
#ifndef SOFTKVM_SOFTKVM_H
#define SOFTKVM_SOFTKVM_H

#include <stddef.h>
#include <stdint.h>

struct softkvm_file;

/* What open("/dev/kvm") would give; NULL with errno set. */
struct softkvm_file *softkvm_open(void);

/*
 * ioctl(2): the result or -1 with errno. A request that makes a new file (KVM_CREATE_VM,
 * KVM_CREATE_VCPU, KVM_GET_STATS_FD, ...) returns 0 and stores it in *created, which must not be NULL then.
 */
int softkvm_ioctl(struct softkvm_file *f, unsigned long request, uintptr_t arg,
		  struct softkvm_file **created);

/* mmap(2) of a vCPU file: struct kvm_run, the coalesced ring, the dirty ring. MAP_FAILED with errno. */
void *softkvm_mmap(struct softkvm_file *f, size_t len, uint64_t offset);
int softkvm_munmap(struct softkvm_file *f, void *p, size_t len);

/* What a read of a file from KVM_GET_STATS_FD finds, from its start: bytes, or -1 with errno. */
long softkvm_read_stats(struct softkvm_file *f, void *buf, size_t len);

/*
 * Non-zero: client pointers in ioctls are checked and give EFAULT, at the price of a system call per copy. A
 * property of the process, for clients that are not trusted to pass good pointers (the preload object, fuzzing).
 */
void softkvm_strict_copies(int on);

/*
 * Non-zero: KVM_GET_SUPPORTED_CPUID leaves out extended state that the host CPU lacks and softkvm could emulate
 * (protection keys). For clients that read the host's own CPUID for its layout, as QEMU does with -cpu host.
 */
void softkvm_host_state_only(int on);

/* One more reference (dup), one fewer (close). */
struct softkvm_file *softkvm_ref(struct softkvm_file *f);
void softkvm_close(struct softkvm_file *f);

/*
 * softkvm's own capability: a client that writes guest memory holding code can say so. Probed by
 * KVM_CHECK_EXTENSION(SOFTKVM_CAP_CODE_WRITTEN) on a VM; then softkvm_code_written() may be called
 * from any thread after the write. It is cheap when the range holds no translated code.
 */
#define SOFTKVM_CAP_CODE_WRITTEN 0x4c4f0001
int softkvm_code_written(struct softkvm_file *vm, uint64_t gpa, uint64_t len);

/*
 * softkvm's own: how vCPUs made from now on execute guest code. KVM_ENABLE_CAP(SOFTKVM_CAP_TRANSLATE) on a VM with
 * args[0] 0: interpret, 1: translate, 2: both in lockstep (tests), SOFTKVM_TRANSLATE_AS_IS: no change; args[1]: bytes of memory for
 * translations with their tables and what they were made from, all vCPUs together (0: 128 MiB; at least SOFTKVM_CODE_MIN for each vCPU, or those beyond are interpreted, at most
 * SOFTKVM_CODE_MAX); args[2]: how many vCPUs there will be (0: as many as the host has processors; when more come, all shares shrink). A vCPU that
 * cannot have memory at addresses which translated code reaches is interpreted. Without the call the variable
 * LODGE_SOFT_MODE (interp, translate, translate-at-once, lockstep) of the environment decides: a knob for tests.
 */
#define SOFTKVM_CAP_TRANSLATE 0x4c4f0002
#define SOFTKVM_TRANSLATE_AS_IS (~0ull)
#define SOFTKVM_CODE_MIN (1ull << 20)
#define SOFTKVM_CODE_MAX (1ull << 30)

/*
 * softkvm's own: looking at vCPUs made from now on. KVM_ENABLE_CAP(SOFTKVM_CAP_PROFILE) on a VM with bits in args[0]. SAMPLE: count where
 * the guest is each time a vCPU has a look around, every few thousand instructions (softkvm_vcpu_hot()). PERF_MAP: write
 * /tmp/perf-PID.map, by which perf(1) names translated code "guest:ADDRESS"; opened here, so call it before a sandbox. -errno
 * as open(2). LODGE_PERF_MAP in the environment asks for the latter, too.
 */
#define SOFTKVM_CAP_PROFILE 0x4c4f0003
enum { SOFTKVM_PROFILE_SAMPLE = 1, SOFTKVM_PROFILE_PERF_MAP = 2 };

struct softkvm_hot {
	uint64_t rip;           /* linear address of what ran next: the head of a loop, mostly */
	uint64_t samples;
	uint8_t cpl;
};
/* The most frequent, first; how many of `max` were stored. *total: all samples. While the vCPU runs it is only roughly right. */
unsigned softkvm_vcpu_hot(struct softkvm_file *vcpu, struct softkvm_hot *out, unsigned max, uint64_t *total);

/*
 * On the thread that will call KVM_RUN, before its system calls are restricted: opens the files that running opens otherwise when
 * it comes to need them. No more than a hint.
 */
void softkvm_vcpu_prepare(struct softkvm_file *vcpu);

/* Counters of one vCPU for `info jit`, the benchmark and tests; relaxed reads. */
struct softkvm_stats {
	uint64_t insns, blocks_decoded, blocks_run, tlb_fills, tlb_flushes, slow_loads, slow_stores,
		 exits, interrupts, exceptions, code_invalidations, blocks_patched, halts;
	/* The translator: regions, their instructions and host bytes; how often all was thrown away; bytes in use now. */
	uint64_t translations, translated_insns, translated_bytes, code_flushes, block_collections, code_used,
		 code_entries,          /* times the loop entered translated code */
		 links,                 /* direct jumps tied to each other */
		 handler_calls,         /* instructions that translated code gave to the interpreter's handlers: its slow paths */
		 left_for_loop, left_by_jump, left_by_budget,   /* why translated code was left, with code_entries */
		 host_faults;           /* traps of the host in translated code, served */
	/* KVM_RUN by what it ended with; their sum is `exits`. */
	uint64_t exit_io, exit_mmio, exit_hlt, exit_signal, exit_irq_window, exit_msr, exit_debug, exit_shutdown, exit_error, exit_other;
};
int softkvm_vcpu_stats(struct softkvm_file *vcpu, struct softkvm_stats *s);

#endif
