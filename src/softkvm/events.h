/*
 * Events: exceptions, interrupts, software interrupts, NMI, SMI, single-step and their delivery
 * through the IVT or IDT in every mode (SDM vol. 3 ch. 6, 7), double and triple faults.
 */
#ifndef SOFTKVM_EVENTS_H
#define SOFTKVM_EVENTS_H

#include "softkvm/cpu.h"

/*
 * Deliver cpu->ev. Faults met on the way are turned into the right second event (contributory table,
 * #DF), a triple fault into RUN_EXIT with KVM_EXIT_SHUTDOWN: then returns false. Called with RIP
 * settled (cpu->rip is what must be pushed; software events: already behind the instruction). False too when
 * an access to MMIO must be handed to user space: cpu->ev stays valid if the delivery starts over after it.
 */
bool event_deliver(struct cpu *c);

/*
 * At an instruction boundary with requests, shadows or a pending trap: decide what comes next in the
 * architecture's order of priority (trap_db, NMI, maskable interrupt via irqchip_intr()/user-space
 * KVM_INTERRUPT, interrupt window exit) and deliver it. False: kvm_run is filled in, leave.
 */
bool event_boundary(struct cpu *c);

/*
 * The loop's part. Before every instruction in one_insn mode, at entry to KVM_RUN, and at block boundaries with
 * requests (REQ_EVENT, REQ_TIMER, REQ_DEBUG), trap_db, or a valid cpu->ev: event_boundary(). When one_insn was set at
 * an instruction's start the loop fills in cpu->step and calls event_insn_done() after it completed (not after a fault
 * or software interrupt; after UNWIND_LEAVE and UNWIND_EXIT_NEXT too): it ages shadow and RF, records the single-step
 * trap if cpu->step.tf still says so (SYSCALL and SYSRET overwrite it), and recomputes one_insn. Instruction breakpoints are the
 * loop's. After event_boundary() returned true the loop looks at cpu->halted and the MP state.
 */
void event_insn_done(struct cpu *c);
/* Split irqchip: a level interrupt was EOIed and user space is not told yet. True: kvm_run is filled in, leave. */
bool event_eoi_exit(struct cpu *c);

/* Recompute one_insn (TF, RF, shadows, code breakpoints, guest debugging). */
void event_update_one_insn(struct cpu *c);
/* DR0-3, DR7, CR4.DE or cpu->dbg changed: recompute code_bp and data_bp, flush what they make stale. */
void debug_update(struct cpu *c);
/* Own thread: what held interrupts back changed (IF, TPR, NMI mask): look at the next boundary. */
void event_unblocked(struct cpu *c);

/* A software interrupt of the current instruction: records it in cpu->ev and unwinds. */
_Noreturn void event_soft_int(struct cpu *c, uint8_t vector, int type);

/* True when an interrupt could be taken now (IF, shadow, nothing being injected). */
bool event_can_interrupt(const struct cpu *c);

/* KVM_GET/SET_VCPU_EVENTS. */
void events_get(struct cpu *c, struct kvm_vcpu_events *e);
int events_set(struct cpu *c, const struct kvm_vcpu_events *e);
/* An external vector set by KVM_INTERRUPT (user-space irqchip) is in here until delivered: -1 none. */
/* -EEXIST: one waits already. */
int event_queue_ext(struct cpu *c, unsigned vector);

#endif
