/*
 * Private to api/: handles, the state behind vm->api and vcpu->api, and what the files share.
 *
 * An ioctl handler returns the result or -errno. The client's structures are copied in once, checked,
 * then used; nothing is read twice from client memory.
 */
#ifndef SOFTKVM_API_API_H
#define SOFTKVM_API_API_H

#include <signal.h>

#include "softkvm/cpu.h"
#include "softkvm/sys.h"
#include "softkvm/vcpu.h"
#include "softkvm/vm.h"

#define API_PAGE 4096u
#define RUN_PAGES 3u            /* kvm_run, PIO data, coalesced ring */
#define MTRR_VARIABLE 8
#define MCE_BANKS 32

/* -- handles (file.c) ------------------------------------------------------------------------- */
enum file_kind { FILE_SYSTEM, FILE_VM, FILE_VCPU, FILE_STATS };
struct softkvm_file {
	enum file_kind kind;
	_Atomic int refs;
	struct vm *vm;
	struct vcpu *vcpu;              /* FILE_STATS: NULL for the VM's own */
};
struct softkvm_file *file_new(enum file_kind kind, struct vm *vm, struct vcpu *vcpu);

long system_ioctl(unsigned long req, uintptr_t arg, struct softkvm_file **created);
long vm_ioctl(struct vm *vm, unsigned long req, uintptr_t arg, struct softkvm_file **created);
long vcpu_ioctl(struct vcpu *v, unsigned long req, uintptr_t arg, struct softkvm_file **created);
int check_extension(struct vm *vm, unsigned long cap);  /* vm NULL: on the system handle; system.c */

long stats_open(struct vm *vm, struct vcpu *v, struct softkvm_file **created);  /* KVM_GET_STATS_FD; stats.c */

/* Every access to client memory in an ioctl goes through these (copy.c). 0 or -EFAULT. */
int copy_from_client(void *dst, uintptr_t src, size_t len);
int copy_to_client(uintptr_t dst, const void *src, size_t len);

/* -- VM --------------------------------------------------------------------------------------- */
/* One range of KVM_X86_SET_MSR_FILTER with its bitmap. */
struct msr_filter { bool deny; unsigned n; struct { uint32_t flags, base, n; uint8_t *bits; } r[KVM_MSR_FILTER_MAX_RANGES]; };

struct vm_api {
	_Atomic(struct msr_filter *) filter;    /* replaced with the world stopped */
	/* kvmclock: base_ns at host TSC base_tsc; guarded by clock_lock. */
	pthread_mutex_t clock_lock;
	int64_t clock_ns;
	uint64_t clock_tsc;
	/* TSC of vCPUs that are set to about the same value is the same (KVM's rule): last write. */
	uint64_t tsc_last_write, tsc_last_ns, tsc_last_offset;
	uint32_t tsc_last_khz;
	uint32_t tsc_khz;               /* for new vCPUs */
	uint32_t nr_mmu_pages, max_vcpu_ids;
	bool max_vcpu_ids_set;
};

int vm_new(struct vm **out);
void vm_ref(struct vm *vm);
void vm_unref(struct vm *vm);
long vm_enable_cap(struct vm *vm, const struct kvm_enable_cap *cap);
long vm_set_msr_filter(struct vm *vm, uintptr_t arg);
void msr_filter_free(struct msr_filter *f);

/* -- vCPU ------------------------------------------------------------------------------------- */
struct vcpu_api {
	/* Signals: what the client had blocked before KVM_RUN, and what is blocked during it from its view. */
	sigset_t saved, effective;
	int signal_fd;                  /* readable when a signal of `signal_fd_set` is pending; made for the first sleep */
	uint64_t signal_fd_set;
	uint32_t msr_reason;            /* KVM_MSR_EXIT_REASON_* of the last MSR_EXIT */
	uint64_t polled;                /* host TSC of the last look at signals and steal time */
	bool ran;                       /* KVM_RUN was called: CPUID is fixed */

	/* time (clock.c) */
	uint32_t tsc_khz;
	uint64_t tsc_ratio;             /* 48 fraction bits; 0: the host's frequency */
	uint64_t system_time, wall_clock, steal_time, poll_control, pv_eoi;
	uint64_t stolen_at, next_steal; /* CLOCK_MONOTONIC ns */
	uint64_t run_delay, steal;      /* of the thread `tid` */
	int tid, steal_fd;
	bool clock_stopped, enforce_pv;

	/* MSRs with storage of their own (msr.c) */
	uint64_t mtrr_base[MTRR_VARIABLE], mtrr_mask[MTRR_VARIABLE], mtrr_fix[11], mtrr_def;
	uint64_t mcg_cap, mcg_ext_ctl, mc[MCE_BANKS * 4], mc_ctl2[MCE_BANKS];
	uint64_t hwcr, syscfg, osvw_len, osvw_status, platform_info, nb_cfg, ls_cfg, smi_count, tsx_ctrl, power_ctl;
};

int vcpu_new(struct vm *vm, unsigned long id, struct vcpu **out);
void vcpu_free(struct vcpu *v);
long vcpu_run(struct vcpu *v);          /* KVM_RUN */
/* Requests that a sleeping vCPU must wake up for; the others are served when it runs again. */
#define REQ_WAKE (REQ_EVENT | REQ_EXIT | REQ_TIMER | REQ_CLOCK)
void vcpu_set_running_state(struct vcpu *v, uint32_t mp_state);

/* Register structures (regs.c). */
void regs_get(struct cpu *c, struct kvm_regs *r);
void regs_set(struct cpu *c, const struct kvm_regs *r);
void sregs_get(struct cpu *c, struct kvm_sregs *s);
int sregs_set(struct cpu *c, const struct kvm_sregs *s);
void sregs2_get(struct cpu *c, struct kvm_sregs2 *s);
int sregs2_set(struct cpu *c, const struct kvm_sregs2 *s);
bool cr4_valid(const struct cpu *c, uint64_t v);
long debug_set(struct cpu *c, const struct kvm_guest_debug *d);
void debugregs_get(struct cpu *c, struct kvm_debugregs *d);
long debugregs_set(struct cpu *c, const struct kvm_debugregs *d);

/* MSRs (msr.c, msr_list.c). */
extern const uint32_t msr_list[], msr_list_emulated[], msr_list_features[];
extern const unsigned msr_list_n, msr_list_emulated_n, msr_list_features_n;
int msr_feature_read(uint32_t msr, uint64_t *v);        /* KVM_GET_MSRS on the system handle; 0 or -EINVAL */
void msr_reset(struct cpu *c, bool init);
bool msr_filtered(const struct cpu *c, uint32_t msr, bool write);
int mtrr_read(struct cpu *c, uint32_t msr, uint64_t *v);
int mtrr_write(struct cpu *c, uint32_t msr, uint64_t v);
bool mtrr_is(uint32_t msr);
int mce_read(struct cpu *c, uint32_t msr, uint64_t *v, bool host);
int mce_write(struct cpu *c, uint32_t msr, uint64_t v, bool host);
bool mce_is(const struct cpu *c, uint32_t msr);
#define MCE_CAP_SUPPORTED (BIT(8) | BIT(10) | BIT(24) | MCE_BANKS)      /* MCG_CTL_P, MCG_CMCI_P, MCG_SER_P */
long mce_setup(struct cpu *c, uint64_t cap);
long mce_set(struct cpu *c, const struct kvm_x86_mce *m);

/* Time (clock.c). */
void clock_vm_init(struct vm *vm);
uint64_t clock_get(struct vm *vm, struct kvm_clock_data *d);    /* kvmclock now, ns */
void clock_set(struct vm *vm, const struct kvm_clock_data *d);
void clock_steal_open(struct vcpu_api *a);     /* for the calling thread */
int tsc_set_khz(struct cpu *c, uint32_t khz);
void tsc_synchronize(struct cpu *c, uint64_t value);            /* a host write of the TSC */
void tsc_write_guest(struct cpu *c, uint64_t value);
void tsc_set_offset(struct cpu *c, uint64_t offset);
int kvmclock_msr_read(struct cpu *c, uint32_t msr, uint64_t *v);
int kvmclock_msr_write(struct cpu *c, uint32_t msr, uint64_t v, bool host);
bool kvmclock_msr_is(uint32_t msr);

/* CPUID (cpuid.c). */
void cpuid_none(struct cpu *c);
void cpuid_free(struct cpu *c);
/* Bits of an entry that follow the vCPU's state (OSXSAVE, OSPKE, APIC, XSAVE sizes, MWAIT), as CPUID would show it. */
void cpuid_runtime(struct cpu *c, struct kvm_cpuid_entry2 *e);
const struct cpu_features *cpuid_host_features(void);  /* of the whole supported table */

/* -- profile.c ------------------------------------------------------------------------------------ */
long profile_start(struct vm *vm, uint64_t bits);       /* SOFTKVM_CAP_PROFILE */
int profile_vcpu(struct cpu *c);

#endif
