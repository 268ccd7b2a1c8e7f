/*
 * CPUID, MSRs and time of a vCPU: shared by the instructions (sys_*.c) and the ioctls (vcpu_*.c).
 */
#ifndef SOFTKVM_SYS_H
#define SOFTKVM_SYS_H

#include "softkvm/cpu.h"

/* -- CPUID (cpuid.c) -------------------------------------------------------------------------- */
/* The guest's CPUID table, and what follows from it. Replaced as a whole by KVM_SET_CPUID2. */
struct cpu_features {
	unsigned n;
	struct kvm_cpuid_entry2 *e;
	/* Register words by leaf, as CPUID gives them, for quick tests. */
	uint32_t f1_ecx, f1_edx, f7_ebx, f7_ecx, f7_edx, f7_1_eax, fd_1_eax, f80000001_ecx, f80000001_edx, f80000007_edx, f80000008_ebx;
	unsigned phys_bits, lin_bits;
	uint64_t xcr0_mask;
	uint32_t kvm_features;          /* leaf 0x40000001 EAX */
	bool amd;                       /* vendor string: SYSCALL/SYSENTER and a few others differ */
};
/*
 * Is this canonical for a register that holds an address: MSRs, the bases of GDT, IDT, LDT, TSS, FS and GS, INVPCID's operand? They have
 * the width of the processor, which may be more than what CR4.LA57 lets be used (SDM vol. 1 3.3.7.1).
 */
static inline bool cpuid_canonical(const struct cpu *c, uint64_t a)
{
	unsigned sh = c->feat && c->feat->lin_bits > 48 ? 7 : 16;

	return (uint64_t)((int64_t)(a << sh) >> sh) == a;
}

int cpuid_supported(struct kvm_cpuid_entry2 *e, unsigned max, bool emulated);   /* number, or -E2BIG */
int cpuid_set(struct cpu *c, const struct kvm_cpuid_entry2 *e, unsigned n);
/* What CPUID returns for this leaf now (OSXSAVE, APIC id, XSAVE sizes and so on filled in). */
void cpuid_query(struct cpu *c, uint32_t leaf, uint32_t sub, uint32_t out[4]);
/* Does the guest's CPUID offer what this Zydis ISA set needs? Used by decode.c; unknown sets: true. */
bool cpuid_has_isa(const struct cpu *c, int zydis_isa_set);

/* -- MSRs (msr.c) ----------------------------------------------------------------------------- */
enum { MSR_OK = 0, MSR_FAULT = -1, MSR_EXIT = -2 /* leave to user space: vcpu_msr_exit() */ };
int msr_read(struct cpu *c, uint32_t msr, uint64_t *v, bool host);
int msr_write(struct cpu *c, uint32_t msr, uint64_t v, bool host);

/* -- control registers with all checks; false: #GP(0) (sys_cr.c) ------------------------------- */
bool cr0_write(struct cpu *c, uint64_t v);
bool cr3_write(struct cpu *c, uint64_t v);
bool cr4_write(struct cpu *c, uint64_t v);
bool cr8_write(struct cpu *c, uint64_t v);
bool efer_write(struct cpu *c, uint64_t v, bool host);
bool xcr0_write(struct cpu *c, uint64_t v);

/* -- time (clock.c) --------------------------------------------------------------------------- */
uint64_t tsc_read(const struct cpu *c);                 /* the guest's TSC now: host TSC scaled + offset */
uint64_t tsc_to_mono(const struct cpu *c, uint64_t tsc); /* CLOCK_MONOTONIC ns at which the guest's TSC has this value */
uint32_t tsc_khz_host(void);
uint64_t mono_ns(void);
void clock_update(struct cpu *c);                       /* REQ_CLOCK: write kvmclock and steal-time pages */

/* -- port I/O (sys_io.c) ---------------------------------------------------------------------- */
/* On entry to KVM_RUN when cpu->pio.active: take the result of KVM_EXIT_IO, X86_RDMSR, X86_WRMSR or HYPERCALL from
 * kvm_run and finish the instruction. A fault met there is left in cpu->ev. */
void pio_complete(struct cpu *c);

/* -- segments (segment.c) --------------------------------------------------------------------- */
void seg_load(struct cpu *c, unsigned seg, uint16_t sel);       /* MOV/POP/LxS: all checks of the mode; raises */
void seg_set_real(struct cpu *c, unsigned seg, uint16_t sel);   /* real and virtual-8086 semantics */
void seg_from_kvm(struct seg *s, const struct kvm_segment *k);
void seg_to_kvm(struct kvm_segment *k, const struct seg *s);
void task_switch(struct cpu *c, uint16_t sel, int reason, bool has_error, uint32_t error);
enum { TASK_CALL, TASK_IRET, TASK_JMP, TASK_GATE };

/* MWAIT waits (cpu->monitor.waiting): nothing has happened yet that ends it. Between instructions, own thread. */
bool mwait_goes_on(struct cpu *c);
#define MWAIT_SLEEP_MAX 4000000u        /* ns between looks at the line: well under 2 % of a CPU */

#endif
