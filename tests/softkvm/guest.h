/*
 * Tiny guests for tests: build a VM, load bytes, run, collect the exits, on softkvm or on /dev/kvm
 * with the same calls. Failures of the set-up abort the test through cmocka's fail_msg().
 *
 *	GUEST_ASM(hello, 64, "mov $0x41, %al; out %al, $0x80; hlt");
 *	struct guest g;
 *	guest_create(&g, &(struct guest_cfg){ .prov = p });
 *	guest_load(&g, 0x10000, hello, hello_end - hello);
 *	guest_long64(&g, 0, 0x10000);
 *	struct guest_log log = { 0 };
 *	guest_run_log(&g, 0, &log);
 */
#ifndef TESTS_SOFTKVM_GUEST_H
#define TESTS_SOFTKVM_GUEST_H

#include <linux/kvm.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "softkvm/softkvm.h"

enum guest_prov { GUEST_SOFT, GUEST_KVM };

/* A KVM descriptor of either provider. */
struct gfile { int fd; struct softkvm_file *f; };

#define GUEST_MAX_VCPUS 8
struct guest {
	enum guest_prov prov;
	struct gfile sys, vm, vcpu[GUEST_MAX_VCPUS];
	unsigned nvcpus;
	struct kvm_run *run[GUEST_MAX_VCPUS];
	size_t run_size;
	uint8_t *mem;           /* guest physical 0 .. mem_size, slot 0 */
	size_t mem_size, guard;
};

struct guest_cfg {
	enum guest_prov prov;
	unsigned nvcpus;        /* 0: one */
	size_t mem_size;        /* 0: 4 MiB */
	size_t guard;           /* bytes of accessible memory of nobody's before and behind `mem`, multiple of 4096 */
	uint64_t code_bytes;    /* softkvm: memory for translations, of all vCPUs; 0: the default */
	bool irqchip, pit;      /* KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2 */
	unsigned split_routes;  /* KVM_CAP_SPLIT_IRQCHIP with so many routes */
	bool no_cpuid;          /* leave CPUID unset (default: KVM_GET_SUPPORTED_CPUID) */
	bool log_dirty;         /* slot 0 with KVM_MEM_LOG_DIRTY_PAGES */
};

/* Another vCPU, number g->nvcpus. */
void guest_add_vcpu(struct guest *g);

/* Assembled guest code: `name` .. `name_end`; bits 16, 32 or 64. Labels: use 1: 1b 1f. */
#define GUEST_ASM(name, bits, text)                                                                \
	extern const uint8_t name[], name##_end[];                                                 \
	__asm__(".pushsection .rodata\n.globl " #name ", " #name "_end\n.code" #bits "\n" #name ":\n"     \
		text "\n" #name "_end:\n.byte 0\n.code64\n.popsection\n")

/* A /dev/kvm that is itself a program: its ring 3 has no gates, its chips do not interrupt the guest. */
bool guest_kvm_is_emulation(void);
/* Is the provider there? Tests of GUEST_KVM call skip() (or exit 77) when not. */
bool guest_have(enum guest_prov p);
/* ioctl: result, or -errno. Files made by the request go to *made (may be NULL). */
long gioctl(struct gfile *f, unsigned long req, const void *arg, struct gfile *made);
static inline long gioctl_val(struct gfile *f, unsigned long req, unsigned long val)
{
	return gioctl(f, req, (const void *)val, NULL);
}
int gopen(struct gfile *f, enum guest_prov p);
void gclose(struct gfile *f);

void guest_create(struct guest *g, const struct guest_cfg *cfg);
void guest_destroy(struct guest *g);
void guest_load(struct guest *g, uint64_t gpa, const void *bytes, size_t len);

/*
 * Modes. Each sets segments, control registers, RIP, RFLAGS = 2 and RSP. Tables are put below 0x8000:
 * GDT at 0x1000 (0x08 code32, 0x10 data, 0x18 code64, 0x20 user code64|3, 0x28 user data|3, 0x30 TSS64,
 * 0x40 user code32|3), TSS at 0x1200 with RSP0/ESP0 = 0x7000, IDT at 0x2000 (64-bit: 16-byte gates for
 * 256 vectors; 32-bit: 8-byte gates), PML4 at 0x3000.. mapping the first 1 GiB 1:1 with 2 MiB pages,
 * writable and user. Stack top 0x8000 (vCPU n: 0x8000 - n * 0x100).
 */
void guest_real16(struct guest *g, unsigned v, uint16_t cs, uint16_t ip);
void guest_prot32(struct guest *g, unsigned v, uint32_t eip);
void guest_long64(struct guest *g, unsigned v, uint64_t rip);
/* IDT gate for `vector` to `handler` (mode of the last guest_prot32/long64 call: 32 or 64). */
void guest_gate(struct guest *g, unsigned bits, unsigned vector, uint64_t handler, unsigned dpl);

void guest_get_regs(struct guest *g, unsigned v, struct kvm_regs *r);
void guest_set_regs(struct guest *g, unsigned v, const struct kvm_regs *r);
void guest_get_sregs(struct guest *g, unsigned v, struct kvm_sregs *s);
void guest_set_sregs(struct guest *g, unsigned v, const struct kvm_sregs *s);
/* 1 on success, 0 when the MSR was refused. */
int guest_get_msr(struct guest *g, unsigned v, uint32_t index, uint64_t *val);
int guest_set_msr(struct guest *g, unsigned v, uint32_t index, uint64_t val);

/* KVM_RUN: the exit reason, or -errno. */
int guest_run(struct guest *g, unsigned v);

/* One exit, as the comparison of providers sees it. */
struct guest_exit {
	uint32_t reason;
	bool out;               /* port or MMIO write */
	uint8_t size;
	uint32_t count;
	uint64_t addr;          /* port or gpa; internal error: suberror */
	uint64_t data;          /* first element written or read */
};
struct guest_log {
	unsigned n;
	struct guest_exit e[512];
	/* Supplies data for IN and MMIO reads; NULL: all ones. */
	uint64_t (*input)(struct guest *g, const struct guest_exit *e, void *opaque);
	void *opaque;
};
#define GUEST_DONE_PORT 0xf4
/* Runs until HLT, SHUTDOWN, an error, DEBUG, an OUT to GUEST_DONE_PORT or a full log; returns the last reason or -errno. */
int guest_run_log(struct guest *g, unsigned v, struct guest_log *log);
/* Bytes written to `port` so far, as a string (for guests that print). */
void guest_log_text(const struct guest_log *log, uint16_t port, char *buf, size_t size);
bool guest_log_equal(const struct guest_log *a, const struct guest_log *b);

/* Runs the same set-up on softkvm and, where present, on /dev/kvm; the logs and final registers must agree. */
typedef void guest_setup_fn(struct guest *g, void *opaque);
void guest_compare(const struct guest_cfg *cfg, guest_setup_fn *setup, void *opaque);

#endif
