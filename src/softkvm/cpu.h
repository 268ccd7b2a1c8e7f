/*
 * The engine's virtual CPU: architectural state in the form the interpreter (and later the
 * translator) works on. Private to softkvm. Owned by the thread inside KVM_RUN; other threads touch
 * only the fields marked (atomic).
 *
 * Control flow. Instruction handlers (insn.h) run under the loop in exec.c. A handler that faults
 * calls cpu_raise*(), which never returns: it records the event and jumps back to the loop, which
 * restores RIP to the start of the current instruction and delivers the event. Hence the rules:
 *   - no guest-visible effect before the last thing that can fault (or the effect is idempotent:
 *     the instruction is simply executed again);
 *   - an unwind with an event drops the MMIO log (mmio_reset());
 *   - no lock is held and no memory is owned by a stack frame across an access to guest memory.
 *
 * RIP. While a block runs, gpr[R_BLK] is the CS offset of its first byte, cpu->cur the current
 * instruction, cpu->rip already the offset of the instruction after the block's last. A branch, and
 * any handler flagged IF_END, may overwrite cpu->rip. Elsewhere cpu->rip is the next instruction.
 *
 * Flags. OSZAPC live in `aflags` exactly as `lahf; seto %al` leaves AX (AH = SF:ZF:0:AF:0:PF:1:CF,
 * AL = OF); all other RFLAGS bits in `eflags`, where the OSZAPC bits are always 0.
 */
#ifndef SOFTKVM_CPU_H
#define SOFTKVM_CPU_H

#include <linux/kvm.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/util.h"
#include "softkvm/fpu.h"
#include "softkvm/softkvm.h"
#include "softkvm/tlb.h"
#include "x86/x86.h"

enum { R_RAX, R_RCX, R_RDX, R_RBX, R_RSP, R_RBP, R_RSI, R_RDI, R_R8, R_R15 = 15,
       R_ZERO = 16,     /* always 0: an absent base or index */
       R_BLK = 17,      /* CS offset of the running block: base of RIP-relative operands */
       R_COUNT };

struct insn;
struct block;
struct block_cache;
struct vec_cache;
struct jit;
struct vm;
struct lapic;
struct vcpu;

/* Segment register with its hidden part, unpacked. `limit` is in bytes (granularity applied). */
struct seg {
	uint64_t base;
	uint32_t limit;
	uint16_t sel;
	uint8_t type;                   /* 4-bit descriptor type */
	uint8_t s, dpl, present, avl, l, db, g;
	bool unusable;                  /* null selector or never loaded */
};

struct dtable { uint64_t base; uint16_t limit; };

/* What a running vCPU must notice at the next block boundary; set with cpu_request() from any thread. */
enum {
	REQ_EVENT = 1 << 0,     /* an interrupt, NMI, SMI, INIT or SIPI may have become pending: look */
	REQ_TLB = 1 << 1,       /* flush the whole TLB, global pages too */
	REQ_BLOCKS = 1 << 2,    /* drop all decoded blocks */
	REQ_EXIT = 1 << 3,      /* leave KVM_RUN with EINTR (immediate_exit, signal) */
	REQ_PAUSE = 1 << 4,     /* stop-the-world: park in vm_park() until released */
	REQ_CLOCK = 1 << 5,     /* kvmclock or steal-time page wants an update */
	REQ_TIMER = 1 << 6,     /* look at the LAPIC timer now */
	REQ_DEBUG = 1 << 7,     /* guest-debug or DR7 settings changed */
};

/* What ends the interpreter loop, given to cpu_unwind(). */
enum unwind {
	UNWIND_NONE,
	UNWIND_EVENT,           /* cpu->ev holds an exception or software interrupt to deliver */
	UNWIND_EXIT,            /* kvm_run is filled in; RIP stays at the current instruction (it will be executed again) */
	UNWIND_EXIT_NEXT,       /* kvm_run is filled in; the instruction is complete */
	UNWIND_LEAVE,           /* the instruction is complete; look at requests, then go on */
	UNWIND_RETRY,           /* execute the current instruction again (after a flush) */
};

/* An exception or interrupt on its way to the guest. */
struct event {
	bool valid;
	uint8_t vector;
	enum { EV_EXT, EV_NMI, EV_EXC, EV_SOFT /* INT n */, EV_SOFT_EXC /* INT3, INTO */, EV_PRIV_SOFT_EXC /* INT1 */ } type;
	bool has_error;
	uint32_t error;
	uint64_t payload;       /* #PF: CR2; #DB: DR6 bits */
	bool has_payload;
	uint8_t insn_len;       /* software events: length, the pushed RIP is behind it */
};

/*
 * Log of the MMIO accesses of the instruction under way. An MMIO read that nobody in the engine
 * claims leaves KVM_RUN; on re-entry its result is in the log and the instruction is executed again,
 * taking logged results in order. Writes are posted: the instruction completes, then the exits happen.
 */
struct mmio_frag { uint64_t gpa; uint8_t len, write; uint8_t data[8]; };
#define MMIO_FRAGS 352          /* XSAVE of everything there is */
struct mmio_log {
	struct mmio_frag f[MMIO_FRAGS];
	uint16_t n;             /* entries with a result (reads) or posted (writes) */
	uint16_t replay;        /* next entry to be consumed by the running attempt */
	bool waiting;           /* the last exit was a read whose data is to be taken from kvm_run */
	bool of_event;          /* the accesses are those of the delivery of cpu->ev, no instruction's */
	uint16_t next_write;    /* posted writes already handed to user space */
};

/* Who watches a vCPU in tests (jit/lockstep.h): called on its own thread. */
struct cpu_watch {
	void (*page)(struct cpu *c, uint8_t *host_page);        /* may be written from now on */
	void (*once)(struct cpu *c);            /* the current instruction acts on more than vCPU and memory; may unwind */
	bool one;                               /* the next instruction is to be interpreted alone */
};

struct cpu {
	/* Hot. The order matters to cache lines and later to the translator's displacements. */
	uint64_t gpr[R_COUNT];
	uint64_t rip;
	uint16_t aflags;
	uint32_t eflags;
	const struct insn *cur;
	const struct insn *block_end;   /* the loop stops when it reaches this; cpu_leave_after() moves it */
	struct block *blk;              /* the running block (interp/block.h) */
	uint64_t code_stamp;            /* generation and mode under which block links may be followed; 1: none (exec.c) */
	struct tlb *tlb;                /* table for data accesses at the current privilege (tlb[...] below) */
	_Atomic uint32_t requests;      /* (atomic) */
	_Atomic bool code_store;        /* (atomic) a store to a page with code may be under way: mmu/code.c */
	int32_t budget;                 /* instructions until the loop looks at the clock */
	uint64_t look_until;            /* host's TSC: until then nothing needs the loop but what says so (vcpu_poll()); 0: it does */
	int32_t charged;                /* of it, what was taken for slow work rather than for instructions */
	uint8_t cpl;
	uint8_t code_bits;              /* 16, 32, 64: CS.L / CS.D */
	uint8_t stack_bits;             /* 16, 32, 64: SS.B */
	bool flat;                      /* 64-bit code: segmentation is off but for FS and GS bases */
	bool vm86, real;                /* EFLAGS.VM; CR0.PE clear */
	uint8_t shadow;                 /* interrupt shadow: SHADOW_* */
	bool one_insn;                  /* TF, guest debug single step or a shadow: blocks of one instruction */

	struct seg seg[SEG_COUNT];
	struct dtable gdt, idt;
	uint64_t cr0, cr2, cr3, cr4, cr8, xcr0;
	uint64_t efer;
	uint64_t dr[8];                 /* 4 and 5 unused */
	uint64_t pdpte[4];              /* PAE: loaded with CR3 */
	uint32_t pkru;

	struct fpu fpu;

	struct tlb *tlbs[TLB_MODES];    /* see tlb.h */
	struct itlb *itlb;
	/* Change whenever the result of mmu_fetch() may have, [1] at CPL 3, [0] below: linear lookups of blocks die with them. */
	uint32_t fetch_gen[2];
	bool split_held;                /* inside mem_lock(): cpu_unwind() calls mem_unlock() */
	struct block_cache *blocks;
	struct jit *jit;                /* the translator (jit/jit.h); NULL: interpret everything */
	struct cpu_watch *watch;        /* NULL but in tests */
	struct vec_cache *vec;          /* stubs of vector instructions (vec/stub.c), made when first needed */

	struct event ev;                /* being delivered, or injected and waiting */
	struct mmio_log mmio;
	/*
	 * Port I/O, RDMSR or WRMSR that left KVM_RUN: RIP is still at the instruction, pio_complete() finishes it
	 * on the next entry, unless user space moved RIP (linear address in lin_rip), as Linux does.
	 */
	struct {
		bool active, in, string;
		enum { PIO_IO, PIO_RDMSR, PIO_WRMSR, PIO_HYPERCALL } kind;
		uint8_t size;           /* of an element, bytes */
		uint32_t count;
		uint16_t port;
		uint32_t done;
		uint16_t insn_flags;
		uint64_t lin_rip, next_rip;
	} pio;

	bool halted;                    /* HLT executed, or MWAIT */
	bool nmi_pending, nmi_masked, smi_pending, smm;
	bool nmi_window_iret;           /* NMIs unmask after the IRET under way */
	bool trap_db;                   /* single-step #DB due after this instruction; payload in trap_dr6 */
	uint64_t trap_dr6;
	bool rep_begun;                 /* the repeated string instruction at rep_rip has done some of its iterations, not all */
	uint64_t rep_rip;
	struct { bool tf, rf; uint8_t shadow; } step;   /* state at the start of an instruction in one_insn mode (events.h) */
	bool irq_blocked;               /* something pends that IF, a shadow or NMI masking holds back: look when that changes */
	bool ext_pending;               /* a vector from KVM_INTERRUPT waits */
	uint8_t ext_vector;
	bool ev_pending;                /* cpu->ev is "pending" rather than "injected" in kvm_vcpu_events' terms */
	bool task_switched;             /* by the event under way: RIP is the new task's */
	bool triple_fault;              /* shut down: every entry exits again until user space resets the state */
	/* MONITOR's line, where MWAIT may wait (KVM_X86_DISABLE_EXITS_MWAIT), and what was in it then. */
	struct {
		uint64_t gpa, until;    /* until: when the wait ends at the latest, mono_ns() */
		uint64_t copy[8];
		uint32_t sleep;         /* ns, the next look at the line */
		bool armed, waiting, any_irq /* ECX bit 0: interrupts that IF holds back end it too */;
	} monitor;

	struct {                        /* MSRs with plain storage; the rest is in msr.c */
		uint64_t star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip,
			 tsc_aux, pat, misc_enable, apic_base, tsc_adjust, tsc_offset, xss, spec_ctrl, mcg_status,
			 mcg_ctl, feature_control, debugctl, smbase, arch_capabilities, ucode_rev,
			 misc_features;         /* MSR 0x140; bit 0: CPUID faults at CPL > 0 */
	} msr;

	struct kvm_run *run;
	struct vm *vm;
	struct vcpu *vcpu;              /* the API object around this (vcpu.h) */
	struct lapic *lapic;            /* NULL without an in-engine LAPIC */
	unsigned id;
	bool tsc_scaled;                /* the guest's TSC has another rate than the host's */
	const struct cpu_features *feat;/* from KVM_SET_CPUID2: what decodes and what is #UD (cpuid.h) */

	/* Guest debugging (KVM_SET_GUEST_DEBUG). */
	struct { bool enabled, step, sw_bp, hw_bp, block_irq; uint64_t dr[4], dr7; } dbg;
	bool data_bp, code_bp;          /* some data / code breakpoint is active: slow paths look */

	struct softkvm_stats stats;
	struct profile *profile;        /* profile.h; NULL: nobody asked */
	bool in_unwind_scope;           /* cpu_raise() has somewhere to go */
	bool client_fault;              /* the exit under way is EFAULT: memory of a slot is not mapped (fault.h) */
	jmp_buf unwind;
};

enum { SHADOW_STI = 1, SHADOW_MOV_SS = 2 };

/* Work worth `n` instructions: so the loop looks at the clock, requests and signals in time (docs/engine.md: 100 us). */
static inline void cpu_charge(struct cpu *c, int32_t n)
{
	c->budget -= n;
	c->charged += n;
}

/* RIP is in the middle of a repeated string instruction: events push RF, and RF stays until its end (SDM vol. 3 17.3.1.1). */
static inline bool cpu_mid_rep(const struct cpu *c) { return c->rep_begun && c->rep_rip == c->rip; }

/* -- flags ------------------------------------------------------------------------------------ */
static inline uint64_t cpu_get_rflags(const struct cpu *c)
{
	return c->eflags | FL_1 | ((c->aflags >> 8) & 0xd5) | ((uint64_t)(c->aflags & 1) << 11);
}

static inline uint16_t aflags_from(uint64_t fl)
{
	return (uint16_t)(((fl & 0xd5) | 2) << 8 | ((fl >> 11) & 1));
}

/* Sets all bits as given (the caller masked them); updates one_insn and the alignment/SMAP mode. events.c */
void cpu_set_rflags(struct cpu *c, uint64_t fl);

/* -- RIP -------------------------------------------------------------------------------------- */
uint64_t cpu_cur_rip(const struct cpu *c);      /* CS offset of the current instruction; exec.c */
uint64_t cpu_next_rip(const struct cpu *c);     /* and of the one behind it */

/* -- leaving a handler ------------------------------------------------------------------------ */
_Noreturn void cpu_unwind(struct cpu *c, enum unwind why);
_Noreturn void cpu_raise(struct cpu *c, unsigned vector);                       /* no error code */
_Noreturn void cpu_raise_err(struct cpu *c, unsigned vector, uint32_t error);
_Noreturn void cpu_raise_pf(struct cpu *c, uint64_t addr, uint32_t error);
static inline _Noreturn void cpu_ud(struct cpu *c) { cpu_raise(c, EXC_UD); }
static inline _Noreturn void cpu_gp(struct cpu *c, uint32_t error) { cpu_raise_err(c, EXC_GP, error); }
/*
 * The instruction cannot be emulated. With KVM_CAP_EXIT_ON_EMULATION_FAILURE KVM_EXIT_INTERNAL_ERROR, suberror EMULATION, with
 * its bytes where they could be read. Without it, as on Linux: #UD at CPL > 0; at CPL 0 that exit, and #UD is left queued.
 */
_Noreturn void cpu_emulation_failed(struct cpu *c);
/* That exit, whoever runs: it is the engine that cannot go on. */
_Noreturn void cpu_engine_failed(struct cpu *c);
/* The loop stops after the current instruction, which goes on normally. */
void cpu_leave_after(struct cpu *c);

/* Any thread: set request bits and wake or kick the vCPU if it sleeps. vcpu.c */
void cpu_request(struct cpu *c, uint32_t req);

/* -- mode ------------------------------------------------------------------------------------- */
/* Recompute code_bits, stack_bits, flat, real, vm86, cpl, tlb after CR0/CR4/EFER/RFLAGS/CS/SS changed. segment.c */
void cpu_update_mode(struct cpu *c);
static inline bool cpu_long(const struct cpu *c) { return c->efer & EFER_LMA; }
static inline bool cpu_paging(const struct cpu *c) { return c->cr0 & CR0_PG; }
static inline bool cpu_canonical(const struct cpu *c, uint64_t a)
{
	unsigned sh = c->cr4 & CR4_LA57 ? 7 : 16;
	return (uint64_t)((int64_t)(a << sh) >> sh) == a;
}

/* Architectural reset (KVM's power-on values); `init`: INIT rather than RESET. vcpu.c */
void cpu_reset(struct cpu *c, bool init);

/* -- the loop (exec.c) ------------------------------------------------------------------------ */
enum run_result { RUN_EXIT /* kvm_run is filled in */, RUN_EINTR, RUN_HALTED, RUN_WAIT_SIPI };
/* Runs until something must be told. Called by vcpu.c with the vCPU's thread settled and I/O completed. */
enum run_result engine_run(struct cpu *c);
/* The decoded-block cache of a vCPU; engine_run() makes it when it is missing. 0 or -ENOMEM. */
int engine_cpu_init(struct cpu *c);
void engine_cpu_free(struct cpu *c);
/*
 * rest.c. A halted vCPU, by its thread: when (mono_ns()) engine_rest() is due if it does not go on before, UINT64_MAX: it is not.
 * engine_rest() forgets decoded blocks and translations, and gives their memory back.
 */
uint64_t engine_rest_due(struct cpu *c, uint64_t now);
void engine_rest(struct cpu *c);

#endif
