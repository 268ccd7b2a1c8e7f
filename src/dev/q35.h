/*
 * The PCI functions of the q35 chipset that a guest looks for: host bridge (MCH) at 00:00.0 and
 * ICH9 LPC bridge at 00:1f.0 (Intel 3 Series and ICH9 data sheets). Memory layout and ECAM are the
 * board's and fixed; the registers that would move them read back what is in force.
 */
#ifndef DEV_Q35_H
#define DEV_Q35_H

#include "core/device.h"
#include "pci/pci.h"

struct q35;

/* `ecam_base` 0: none. */
int q35_create(struct q35 **out, struct machine_env *env, uint64_t ecam_base, struct err *err);
void q35_destroy(struct q35 *q);
void q35_reset(struct q35 *q);

/*
 * PCI interrupt of device `dev`, pin 0..3: PIRQ A-H as 0..7. Such a line drives GSI 16 + PIRQ and,
 * where the guest routed it (registers 0x60-0x63 and 0x68-0x6b), an ISA interrupt.
 */
int q35_pirq(int dev, int pin);
/* A PIRQ changed level: returns through set() of isa_irq lines. Any thread. */
void q35_set_pirq(struct q35 *q, int pirq, int level);
/* What firmware does: route PIRQs to ISA interrupts 10 and 11 and fill in the interrupt line registers. */
void q35_route_legacy(struct q35 *q, struct pci_bus *bus);

#endif
