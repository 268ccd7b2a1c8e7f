/*
 * In-engine interrupt controllers: 8259A pair, I/O APIC, local APICs, 8254, routing, MSI, irqfd.
 *
 * Chip registers follow the Intel data sheets and SDM vol. 3 ch. 10; KVM_GET/SET structures those of
 * Linux. One mutex per VM guards PIC, I/O APIC and PIT; a LAPIC has atomic IRR/ISR/TMR words that any
 * thread may set. Functions are callable from any thread unless they take the calling vCPU.
 */
#ifndef SOFTKVM_IRQCHIP_H
#define SOFTKVM_IRQCHIP_H

#include "softkvm/cpu.h"
#include "softkvm/vm.h"

/* -- VM part ---------------------------------------------------------------------------------- */
int irqchip_create(struct vm *vm);              /* KVM_CREATE_IRQCHIP: PICs, IOAPIC, default routing; LAPICs for later vCPUs */
int irqchip_create_split(struct vm *vm, unsigned nr_routes);    /* KVM_CAP_SPLIT_IRQCHIP */
int irqchip_create_pit(struct vm *vm, const struct kvm_pit_config *cfg);        /* KVM_CREATE_PIT(2) */
void irqchip_destroy(struct vm *vm);            /* stops its threads */

int irqchip_line(struct vm *vm, uint32_t gsi, int level, int source);   /* KVM_IRQ_LINE; status for KVM_IRQ_LINE_STATUS */
int irqchip_msi(struct vm *vm, uint64_t addr, uint32_t data);           /* >0 delivered, 0 blocked, -errno */
int irqchip_set_routing(struct vm *vm, const struct kvm_irq_routing_entry *e, unsigned n);
int irqchip_irqfd(struct vm *vm, const struct kvm_irqfd *fd);
int irqchip_get(struct vm *vm, struct kvm_irqchip *chip);               /* KVM_GET_IRQCHIP / SET */
int irqchip_set(struct vm *vm, const struct kvm_irqchip *chip);
int irqchip_get_pit2(struct vm *vm, struct kvm_pit_state2 *s);
int irqchip_set_pit2(struct vm *vm, const struct kvm_pit_state2 *s);
int irqchip_reinject(struct vm *vm, bool on);          /* KVM_REINJECT_CONTROL; -ENXIO without a PIT */

/* -- vCPU part -------------------------------------------------------------------------------- */
int lapic_create(struct cpu *c);                /* sets c->lapic */
void lapic_destroy(struct cpu *c);
/* RESET (also at creation): apic_base becomes 0xfee00000 | enabled | BSP for vm->boot_cpu_id. INIT: apic_base and the id stay. */
void lapic_reset(struct cpu *c, bool init);
/* Corrected machine checks: whether there is an LVT entry for them, and one that is to be signalled. */
void lapic_set_cmci(struct cpu *c, bool on);
void lapic_cmci(struct cpu *c);
int lapic_get(struct cpu *c, struct kvm_lapic_state *s);
int lapic_set(struct cpu *c, const struct kvm_lapic_state *s);
int lapic_set_base(struct cpu *c, uint64_t apic_base, bool host);       /* IA32_APIC_BASE; -EINVAL: #GP */
int lapic_msr_read(struct cpu *c, uint32_t msr, uint64_t *v, bool host);        /* x2APIC registers, TSC deadline; -EINVAL: #GP */
int lapic_msr_write(struct cpu *c, uint32_t msr, uint64_t v);
uint64_t lapic_get_tpr(const struct cpu *c);    /* as CR8 */
void lapic_set_tpr(struct cpu *c, uint64_t cr8);
/* Highest vector to be delivered now (LAPIC, or PIC through LINT0 / directly), -1 none. Does not acknowledge. */
int irqchip_pending(struct cpu *c);
/* Acknowledge and return that vector (PIC INTA cycle or IRR->ISR). */
int irqchip_ack(struct cpu *c);
/* Earliest time (CLOCK_MONOTONIC ns) at which this vCPU's LAPIC timer fires; UINT64_MAX: never. */
uint64_t lapic_timer_deadline(const struct cpu *c);
/* Fire it if it is due; own thread, at block boundaries and before sleeping. */
void lapic_timer_poll(struct cpu *c);
/* INIT and SIPI that wait: returns and clears (bits below), SIPI's vector in *sipi_vector. */
enum { LAPIC_INIT = 1, LAPIC_SIPI = 2 };
unsigned lapic_take_init_sipi(struct cpu *c, uint8_t *sipi_vector);
/* NMI and SMI that came through the LAPIC (IPI, MSI, LVT): returns and clears. Own thread, on every REQ_EVENT. */
enum { LAPIC_NMI = 4, LAPIC_SMI = 8 };
unsigned lapic_take_nmi_smi(struct cpu *c);
/* Any of the four above is waiting: a halted or sleeping vCPU has something to do. */
bool lapic_event_waiting(const struct cpu *c);
/* Split irqchip: vector of a level interrupt just EOIed, to be told by KVM_EXIT_IOAPIC_EOI; -1 none. Own thread, on
 * REQ_EVENT before anything is delivered. */
int lapic_take_eoi_exit(struct cpu *c);
/* Would an external (8259A) interrupt be accepted by this LAPIC? Part of ready_for_interrupt_injection with a split irqchip. */
bool lapic_accepts_pic(const struct cpu *c);
/* KVM_INTERRUPT with a split irqchip: irqchip_pending() returns the vector once LINT0 lets it through. -EEXIST: one waits;
 * -ENXIO: the 8259A is in the engine. */
int lapic_queue_ext(struct cpu *c, unsigned vector);

#endif
