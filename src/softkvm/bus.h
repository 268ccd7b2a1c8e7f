/*
 * What in the engine takes port and MMIO accesses before they become exits: LAPIC and I/O APIC
 * pages, PIC and PIT ports, ioeventfds (with datamatch, wildcard length), coalesced zones.
 */
#ifndef SOFTKVM_BUS_H
#define SOFTKVM_BUS_H

#include "softkvm/cpu.h"
#include "softkvm/vm.h"

int bus_create(struct vm *vm);
void bus_destroy(struct vm *vm);
/* True: taken, no exit. `c` is the vCPU that accesses. Lengths 1..8. */
bool bus_mmio(struct cpu *c, uint64_t gpa, unsigned len, bool write, void *data);
bool bus_pio(struct cpu *c, uint16_t port, unsigned len, bool write, void *data);
int bus_ioeventfd(struct vm *vm, const struct kvm_ioeventfd *e);        /* KVM_IOEVENTFD */
int bus_register_coalesced(struct vm *vm, const struct kvm_coalesced_mmio_zone *z);
int bus_unregister_coalesced(struct vm *vm, const struct kvm_coalesced_mmio_zone *z);

#endif
