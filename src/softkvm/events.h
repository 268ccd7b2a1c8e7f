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

/* A software interrupt of the current instruction: records it in cpu->ev and unwinds. */
_Noreturn void event_soft_int(struct cpu *c, uint8_t vector, int type);

/* True when an interrupt could be taken now (IF, shadow, nothing being injected). */
bool event_can_interrupt(const struct cpu *c);

/* KVM_GET/SET_VCPU_EVENTS. */
void events_get(struct cpu *c, struct kvm_vcpu_events *e);
int events_set(struct cpu *c, const struct kvm_vcpu_events *e);
/* An external vector set by KVM_INTERRUPT (user-space irqchip) is in here until delivered: -1 none. */
int event_queue_ext(struct cpu *c, unsigned vector);

#endif
