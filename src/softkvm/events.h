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
 * settled (cpu->rip is what must be pushed; software events: already behind the instruction).
 */
bool event_deliver(struct cpu *c);

/*
 * At an instruction boundary with requests, shadows or a pending trap: decide what comes next in the
 * architecture's order of priority (trap_db, NMI, maskable interrupt via irqchip_intr()/user-space
 * KVM_INTERRUPT, interrupt window exit) and deliver it. False: kvm_run is filled in, leave.
 */
bool event_boundary(struct cpu *c);

/*
 * The loop's part: event_boundary() at entry to KVM_RUN and at block boundaries with requests (REQ_EVENT), trap_db,
 * one_insn, a halted vCPU or a valid cpu->ev. It takes shadow and RF off before an instruction and puts them back if
 * that one is to be executed again; records the single-step trap of one that completed when TF was set at its start
 * (cpu->step.tf, which a handler may overwrite: SYSCALL); and looks again (REQ_EVENT) after a shadow. It also checks
 * instruction breakpoints. After event_boundary() returned true it looks at cpu->halted and the MP state.
 */
/* Recompute one_insn (TF, code breakpoints, guest debugging). */
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
