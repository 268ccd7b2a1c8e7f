/*
 * Legacy devices of a PC.
 *
 * Those that a user may add are device classes; those that belong to the chipset are created by
 * `board` through their own headers (rtc.h, acpi_pm.h, fw_cfg.h, lpc.h, misc.h).
 */
#ifndef DEV_DEV_H
#define DEV_DEV_H

#include "core/device.h"

extern const struct device_class isa_serial_class;      /* 16550A */
extern const struct device_class isa_debug_exit_class;  /* a write ends the process with (value << 1) | 1 */
extern const struct device_class isa_debugcon_class;    /* bytes written to a port go to a character back end */
extern const struct device_class pc_testdev_class;      /* latch, flush port, ISA lines and I/O memory for test guests */

#endif
