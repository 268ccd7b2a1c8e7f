/*
 * Between the files of this folder: the machine itself and its memory map.
 *
 *   0x00000000  RAM; to 2 GiB when the machine has 0xb0000000 bytes or more, else all of it
 *   0x000a0000  to 1 MiB: RAM too, but announced as reserved; tables lie in 0xe0000-0xfffff
 *   0xb0000000  ECAM, 256 MiB
 *   0xc0000000  32-bit PCI window, to the I/O APIC
 *   0xfec00000  I/O APIC     0xfee00000  local APICs     0xfeffc000  reserved for KVM on Intel
 *   4 GiB       the rest of RAM, then the 64-bit PCI window (32 GiB, aligned)
 */
#ifndef BOARD_INTERNAL_H
#define BOARD_INTERNAL_H

#include <pthread.h>

#include "board/boot.h"
#include "board/machine.h"
#include "kvm/vcpus.h"
#include "loop/loop.h"
#include "pci/pci.h"

#define ECAM_BASE       0xb0000000ULL
#define ECAM_SIZE       0x10000000ULL
#define PCI32_BASE      0xc0000000ULL
#define PCI32_SIZE      (IOAPIC_BASE - PCI32_BASE)
#define IOAPIC_BASE     0xfec00000ULL
#define LAPIC_BASE      0xfee00000ULL
#define KVM_IDENTITY    0xfeffc000ULL
#define KVM_TSS         0xfeffd000ULL
#define HIGH_BASE       0x100000000ULL
#define PCI64_SIZE      (32ULL << 30)
#define LOW_SPLIT       0xb0000000ULL
#define LOW_MAX         0x80000000ULL

struct topology { unsigned sockets, cores, threads; };

struct machine {
	struct machine_config cfg;
	bool pci;                       /* false: microvm */
	struct topology topo;
	char *cpu_model;
	bool cpu_check, cpu_enforce;    /* -cpu ...,check=,enforce=: say, refuse what the provider lacks */
	struct machine_env env;
	struct kvm *kvm;
	struct kvm_vm *vm;
	struct vcpus *vcpus;
	bool vcpus_started;
	struct pci_bus *bus;
	struct q35 *q35;
	struct acpi_pm *pm;
	struct rtc *rtc;
	struct fw_cfg *fw_cfg;
	struct pc_ports *ports;
	struct device *devices, **devices_tail;
	struct boot boot;
	uint64_t low_ram, high_ram, pci64_base;
	uint8_t *acpi_low;              /* image of 0xe0000-0xfffff: ACPI and SMBIOS */
	struct chips *chips;            /* interrupt chips' state at power-on */
	pthread_mutex_t req_lock;
	bool req_pending, req_posted;
	enum machine_request req;
	int req_status;
	bool ended, stopped;            /* stopped: by MACHINE_STOP */
};

/* chips.c: the interrupt controllers below the KVM API, and vCPUs' state at reset. */
int chips_create(struct machine *m, struct err *err);           /* before vCPUs */
int chips_save(struct machine *m, struct err *err);             /* after vCPUs have CPUID */
int chips_reset(struct machine *m, struct err *err);
void chips_free(struct machine *m);

/* cpuid.c */
int cpuid_topology(const struct machine_config *cfg, struct topology *t, struct err *err);
int machine_set_cpuid(struct machine *m, struct err *err);

/* acpi.c: builds tables into m->acpi_low at BOOT_ACPI; returns the RSDP's address through m->boot.rsdp. */
int acpi_build(struct machine *m, struct err *err);
int smbios_build(struct machine *m, struct err *err);
#define TABLES_SIZE 0x20000u    /* 0xe0000 to 1 MiB */

#endif
