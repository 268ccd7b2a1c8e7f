/*
 * A virtual machine: what its vCPUs share. Private to softkvm.
 *
 * Locking. `lock` guards the configuration (slots, vCPU list, routes being replaced). vCPUs read the
 * slot table without it: a change publishes a new table and stops the world (vm_pause_all) so that no
 * vCPU holds a pointer into the old one.
 */
#ifndef SOFTKVM_VM_H
#define SOFTKVM_VM_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/util.h"

#define VM_MAX_VCPUS 1024       /* KVM_CAP_MAX_VCPUS; ids below VM_MAX_VCPU_ID */
#define VM_MAX_VCPU_ID 4096
#define VM_MAX_SLOTS 32764

struct cpu;
struct vcpu;
struct irqchip;
struct bus;

/* -- guest physical memory (phys.c) ----------------------------------------------------------- */
struct slot {
	uint32_t id, flags;             /* KVM_MEM_* */
	uint16_t as_id;
	uint64_t gpa, size;
	uint8_t *host;
	_Atomic uint64_t *dirty;        /* bitmap; NULL when not logged */
	_Atomic uint32_t *ver;          /* per page code version, see mmu.h */
	_Atomic uint64_t *lines;        /* per page: which 64-byte lines something was decoded from (mmu/code.c) */
};

struct slot_table { unsigned n; struct slot *s[]; };    /* sorted by gpa; immutable once published */

#define CODE_EIGHTHS 5          /* of policy.code_bytes are for translations, the rest for the decoded blocks they were made from */

struct vm {
	pthread_mutex_t lock;
	_Atomic int refs;
	struct slot_table *_Atomic slots;
	struct slot **by_id;            /* the same slots by number, under `lock`; by_id_n of them */
	unsigned by_id_n;
	pthread_rwlock_t slots_lock;    /* readers outside engine_run(); all-zero is initialised */
	struct cpu *_Atomic cpus[VM_MAX_VCPUS];
	_Atomic unsigned ncpus;
	struct irqchip *irqchip;        /* NULL: none in the engine (irqchip.h) */
	bool split_irqchip;             /* LAPICs only */
	struct bus *bus;                /* ioeventfds, coalesced zones, in-engine devices (bus.h) */
	struct vm_api *api;             /* vm.c's own */
	bool manual_dirty_clear;        /* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
	bool dirty_initially_set;       /* KVM_DIRTY_LOG_INITIALLY_SET: a slot's log starts all ones */
	bool client_tells_code;         /* SOFTKVM_CAP_CODE_WRITTEN was probed */
	/* The coalesced ring: one page, shown at KVM_COALESCED_MMIO_PAGE_OFFSET of every vCPU's mapping; bus.c fills it. */
	struct kvm_coalesced_mmio_ring *ring;
	struct vm_policy {              /* what KVM_ENABLE_CAP switched on; set before vCPUs run */
		bool exception_payload, triple_fault_event, bus_lock_exit, emulation_exit; /* the last: EXIT_ON_EMULATION_FAILURE */
		bool platform_info_hidden;      /* KVM_CAP_MSR_PLATFORM_INFO, switched off */
		bool x2apic_32bit_ids, x2apic_no_broadcast_quirk;       /* KVM_CAP_X2APIC_API */
		uint32_t disabled_exits;        /* KVM_X86_DISABLE_EXITS_* */
		uint32_t user_msr;              /* KVM_MSR_EXIT_REASON_* */
		uint64_t hypercall_exits;       /* bits 1 << KVM_HC_* */
		bool translate;                 /* SOFTKVM_CAP_TRANSLATE */
		unsigned jit_mode;              /* enum jit_mode */
		uint64_t code_bytes;            /* for all vCPUs: translations and decoded blocks */
		unsigned code_vcpus;            /* so many will share them; 0: not known */
		bool sample;                    /* SOFTKVM_CAP_PROFILE */
		int perf_fd;                    /* perf map, or -1 */
		uint64_t quirks_off;            /* KVM_X86_QUIRK_* */
	} policy;
	uint32_t boot_cpu_id;           /* KVM_SET_BOOT_CPU_ID */
	bool pit;                       /* KVM_CREATE_PIT(2) done */
	struct code_watch *_Atomic watch;       /* code of a client that does not; see mmu/watch.c */
	uint32_t ring_entries;          /* of each vCPU's dirty ring; 0: bitmaps (mmu/ring.c) */
	pthread_mutex_t ring_lock;
	/* stop the world */
	pthread_mutex_t pause_lock;
	pthread_cond_t pause_cond;
	unsigned running;               /* vCPUs inside engine_run() and not parked */
	unsigned pausing;               /* depth of the pause that lasts */
	pthread_t pause_owner;          /* who may nest it */
	pthread_mutex_t split_lock;     /* mem_lock() */
};

/* Host pointer and bytes left in the slot, or NULL. *ro: KVM_MEM_READONLY. `slot` may be NULL. */
uint8_t *phys_ptr(struct vm *vm, uint64_t gpa, uint64_t *left, bool *ro, struct slot **slot);
/* All or nothing over RAM; marks dirty, keeps code versions. 0 or -EFAULT. For kvmclock, steal time, page tables. */
int phys_read(struct vm *vm, uint64_t gpa, void *buf, unsigned len);
int phys_write(struct vm *vm, uint64_t gpa, const void *buf, unsigned len);
void phys_mark_dirty(struct vm *vm, struct cpu *c, struct slot *s, uint64_t gpa);      /* c: the vCPU that writes, NULL: none */
/* A store hit pages that may hold code: change their versions (client DMA, phys_write, slow stores). */
void phys_code_written(struct vm *vm, uint64_t gpa, uint64_t len);

/* KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG with the argument already copied in;
 * bitmaps are written to client memory. 0 or -errno as Linux gives it. */
int phys_set_region(struct vm *vm, const struct kvm_userspace_memory_region *r);
int phys_get_dirty(struct vm *vm, const struct kvm_dirty_log *d);
int phys_clear_dirty(struct vm *vm, const struct kvm_clear_dirty_log *d);
void phys_free(struct vm *vm);

/*
 * Clients that know nothing of softkvm_code_written() (mmu/watch.c). watch_decoded(): `bytes` were decoded at
 * `off` of the page while its version was `value`. watch_all(): such a client may have written anything by now; what it changed
 * cannot be entered any more.
 */
struct code_page;
void watch_decoded(struct vm *vm, const struct code_page *page, uint32_t value, unsigned off, const uint8_t *bytes, unsigned len);
void watch_all(struct vm *vm);

/* -- dirty rings (mmu/ring.c) ------------------------------------------------------------------------- */
struct dirty_ring;
int ring_cap_bytes(void);                               /* KVM_CAP_DIRTY_LOG_RING */
int ring_enable(struct vm *vm, uint64_t bytes);         /* before the first vCPU */
size_t ring_bytes(const struct vm *vm);
int ring_new(struct vm *vm, struct dirty_ring **out);   /* NULL when the VM has none */
void ring_free(struct vm *vm, struct dirty_ring *r);
void *ring_memory(const struct dirty_ring *r);
bool ring_full(const struct dirty_ring *r);             /* the vCPU must leave with KVM_EXIT_DIRTY_RING_FULL */
long ring_reset_all(struct vm *vm);                     /* KVM_RESET_DIRTY_RINGS: pages given back, or -errno */

/* -- stop the world (api/pause.c) -------------------------------------------------------------------- */
/* After return no vCPU executes guest code (the caller may be one itself: it does not wait for itself). */
void vm_pause_all(struct vm *vm, struct cpu *self);
void vm_resume_all(struct vm *vm, struct cpu *self);
/* Called by engine_run's caller/loop: enter or leave the set of running vCPUs; park while a pause lasts. */
void vm_enter_running(struct cpu *c);
void vm_leave_running(struct cpu *c);
void vm_park(struct cpu *c);                            /* on REQ_PAUSE */
/* Set request bits on every vCPU (but `except`), without waiting. */
void vm_request_all(struct vm *vm, uint32_t req, struct cpu *except);

#endif
