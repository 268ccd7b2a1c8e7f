/*
 * ACPI fixed hardware (ACPI 6.4, 4.8): PM1a event and control, PM timer, GPE0; offsets as in an ICH9.
 *
 * There is no SMM: the machine is in ACPI mode from the start and SCI_EN is always set.
 */
#ifndef DEV_ACPI_PM_H
#define DEV_ACPI_PM_H

#include "core/device.h"

#define ACPI_PM_BASE    0x600
#define ACPI_PM_SIZE    0x80
#define ACPI_PM1_EVT    0x00    /* 4 bytes: status, enable */
#define ACPI_PM1_CNT    0x04    /* 2 bytes */
#define ACPI_PM_TMR     0x08    /* 4 bytes, 24 bits count at 3.579545 MHz */
#define ACPI_GPE0       0x20    /* 16 bytes: 8 status, 8 enable */
#define ACPI_GPE0_LEN   16
#define ACPI_SLP_TYP_S5 0       /* what the guest writes to SLP_TYP for S5 */
#define ACPI_SCI_GSI    9

struct acpi_pm;

int acpi_pm_create(struct acpi_pm **out, struct machine_env *env, struct err *err);
void acpi_pm_destroy(struct acpi_pm *pm);
void acpi_pm_reset(struct acpi_pm *pm);
/* The user pressed the power button. Any thread. */
void acpi_pm_power_button(struct acpi_pm *pm);
/* Raise general purpose event n (0..63). Any thread. */
void acpi_pm_gpe(struct acpi_pm *pm, unsigned n);

#endif
