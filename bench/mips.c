/*
 * How fast is softkvm? Integer programs (guest_work.c) in long mode on one vCPU, through the KVM API: millions of
 * guest instructions a second, and the same work as native code for comparison. `mips [SECONDS-PER-PROGRAM]`
 */
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "bench/guest_work.h"
#include "softkvm/softkvm.h"

#define CODE    0x10000u
#define WORK    0x8000u
#define STACK   0x80000u
#define DATA    0x100000u
#define MEM     (16u << 20)

extern const uint8_t __start_guest_work[], __stop_guest_work[];

struct vm {
	struct softkvm_file *sys, *vm, *vcpu;
	struct kvm_run *run;
	uint8_t *mem;
};

static void need(int ok, const char *what)
{
	if (ok)
		return;
	perror(what);
	exit(1);
}

static double now(clockid_t id)
{
	struct timespec t;

	clock_gettime(id, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void set_cpuid(struct vm *v)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof *c + 256 * sizeof c->entries[0]);

	need(c != NULL, "memory");
	c->nent = 256;
	need(!softkvm_ioctl(v->sys, KVM_GET_SUPPORTED_CPUID, (uintptr_t)c, NULL), "KVM_GET_SUPPORTED_CPUID");
	need(!softkvm_ioctl(v->vcpu, KVM_SET_CPUID2, (uintptr_t)c, NULL), "KVM_SET_CPUID2");
	free(c);
}

/* 64-bit mode, the first GiB mapped one to one with 2 MiB pages. */
static void set_mode(struct vm *v)
{
	struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = { .limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
	uint64_t *t = (uint64_t *)(v->mem + 0x1000);
	struct kvm_sregs s;

	t[0] = 0x2003;
	t[512] = 0x3003;
	for (uint64_t i = 0; i < 512; i++)
		t[1024 + i] = i << 21 | 0x83;
	need(!softkvm_ioctl(v->vcpu, KVM_GET_SREGS, (uintptr_t)&s, NULL), "KVM_GET_SREGS");
	s.cs = code;
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	s.cr0 = 0x80000011;
	s.cr3 = 0x1000;
	s.cr4 = 0x20;
	s.efer = 0x500;
	need(!softkvm_ioctl(v->vcpu, KVM_SET_SREGS, (uintptr_t)&s, NULL), "KVM_SET_SREGS");
}

static void create(struct vm *v)
{
	struct kvm_userspace_memory_region r = { .memory_size = MEM };
	long size;

	v->mem = mmap(NULL, MEM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	need(v->mem != MAP_FAILED, "memory");
	need((v->sys = softkvm_open()) != NULL, "softkvm");
	need(!softkvm_ioctl(v->sys, KVM_CREATE_VM, 0, &v->vm), "KVM_CREATE_VM");
	r.userspace_addr = (uintptr_t)v->mem;
	need(!softkvm_ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, (uintptr_t)&r, NULL), "KVM_SET_USER_MEMORY_REGION");
	need(!softkvm_ioctl(v->vm, KVM_CREATE_VCPU, 0, &v->vcpu), "KVM_CREATE_VCPU");
	size = softkvm_ioctl(v->sys, KVM_GET_VCPU_MMAP_SIZE, 0, NULL);
	v->run = softkvm_mmap(v->vcpu, (size_t)size, 0);
	need(v->run != MAP_FAILED, "vCPU area");
	set_cpuid(v);
	set_mode(v);
	memcpy(v->mem + CODE, __start_guest_work, (size_t)(__stop_guest_work - __start_guest_work));
	memset(v->mem + CODE - 16, 0xf4, 1);    /* hlt: where the programs return to */
}

/* One call of `fn` in the guest. */
static uint64_t call(struct vm *v, work_fn *fn, uint64_t rounds)
{
	struct work *w = (struct work *)(v->mem + WORK);
	struct kvm_regs r = { .rip = CODE + ((uintptr_t)fn - (uintptr_t)__start_guest_work), .rdi = WORK,
			      .rsp = STACK - 8, .rflags = 2 };
	uint64_t back = CODE - 16;

	memcpy(v->mem + STACK - 8, &back, 8);
	w->rounds = rounds;
	w->data = (uint8_t *)(uintptr_t)DATA;
	need(!softkvm_ioctl(v->vcpu, KVM_SET_REGS, (uintptr_t)&r, NULL), "KVM_SET_REGS");
	need(!softkvm_ioctl(v->vcpu, KVM_RUN, 0, NULL), "KVM_RUN");
	if (v->run->exit_reason != KVM_EXIT_HLT) {
		fprintf(stderr, "mips: the guest ended with exit %u\n", v->run->exit_reason);
		exit(1);
	}
	return w->result;
}

static void fill_table(uint32_t *t)
{
	for (unsigned i = 0; i < 72; i++)
		t[i] = i * 2654435761u ^ 0x9e3779b9u;
}

static uint64_t insns(struct vm *v)
{
	struct softkvm_stats s = { 0 };

	softkvm_vcpu_stats(v->vcpu, &s);
	return s.insns;
}

/* CPU seconds a round takes natively. */
static double native(work_fn *fn, struct work *w, uint64_t rounds, uint64_t *result)
{
	double t0 = now(CLOCK_PROCESS_CPUTIME_ID);

	w->rounds = rounds;
	fn(w);
	*result = w->result;
	return (now(CLOCK_PROCESS_CPUTIME_ID) - t0) / (double)rounds;
}

static double measure(struct vm *v, const char *name, work_fn *fn, double secs)
{
	static struct work w;
	static uint8_t data[8 << 20];
	uint64_t rounds = 8, n0, got, want;
	double t, host;

	fill_table(((struct work *)(v->mem + WORK))->table);
	fill_table(w.table);
	w.data = data;
	memset(v->mem + DATA, 0, sizeof data);
	memset(data, 0, sizeof data);
	for (;; rounds *= 2) {
		n0 = insns(v);
		t = now(CLOCK_PROCESS_CPUTIME_ID);
		got = call(v, fn, rounds);
		t = now(CLOCK_PROCESS_CPUTIME_ID) - t;
		n0 = insns(v) - n0;
		if (t >= secs / 2)
			break;
	}
	memset(data, 0, sizeof data);
	host = native(fn, &w, rounds, &want);
	printf("  %-8s %8.1f million instructions a second, %6.1f times native%s\n", name, (double)n0 / t / 1e6,
	       t / (double)rounds / host, got == want ? "" : "  WRONG RESULT");
	return (double)n0 / t / 1e6;
}

int main(int argc, char **argv)
{
	static const struct { const char *name; work_fn *fn; } all[] = {
		{ "sha256", work_sha }, { "sort", work_sort }, { "chase", work_chase }, { "calls", work_calls },
		{ "text", work_text }, { "move", work_move }, { "rep", work_copy },
	};
	double secs = argc > 1 ? atof(argv[1]) : 0.5;
	struct vm v = { 0 };

	create(&v);
	for (unsigned i = 0; i < sizeof all / sizeof all[0]; i++)
		measure(&v, all[i].name, all[i].fn, secs);
	softkvm_close(v.vcpu);
	softkvm_close(v.vm);
	softkvm_close(v.sys);
	return 0;
}
