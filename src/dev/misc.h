/*
 * Small fixed ports of a PC: fast A20 and reset (0x92), reset control (0xcf9), POST code (0x80), and
 * a keyboard controller (0x60, 0x64) with nothing plugged in, for its self-test, A20 and reset
 * commands. The FADT says that there is no 8042, so systems with ACPI leave it alone.
 */
#ifndef DEV_MISC_H
#define DEV_MISC_H

#include "core/device.h"

struct pc_ports;

int pc_ports_create(struct pc_ports **out, struct machine_env *env, struct err *err);
void pc_ports_destroy(struct pc_ports *p);
void pc_ports_reset(struct pc_ports *p);
/* Port 0xcf9 belongs to the PCI address window, which passes byte accesses on. `opaque`: struct pc_ports. */
uint8_t pc_reset_control_read(void *opaque);
void pc_reset_control_write(void *opaque, uint8_t val);

#endif
