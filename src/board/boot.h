/*
 * Boot protocols: put a kernel into guest memory and say how vCPU 0 starts.
 *
 * Files are mapped when the machine is created and copied again at every reset. Image contents are
 * untrusted: every offset and length is checked, and each kind of damage is one clear error.
 *
 * Low memory as the loaders use it:
 *   0x00000 real-mode vectors and BIOS data area (boot_bios.c)
 *   0x00500 GDT          0x06000 PVH start info    0x07000 boot_params   0x08000 setup_data
 *   0x09000 page tables (6 pages)                  0x20000 command line (64 KiB)
 *   0x9fc00 extended BIOS data area
 *   0xe0000 ACPI tables  0xf0000 SMBIOS            0xfff53 what answers BIOS calls (in the area where a PC's BIOS is)
 */
#ifndef BOARD_BOOT_H
#define BOARD_BOOT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "core/mem.h"
#include "kvm/kvm.h"

#define BOOT_GDT        0x00500
#define BOOT_PVH_INFO   0x06000
#define BOOT_PARAMS     0x07000
#define BOOT_SETUP_DATA 0x08000
#define BOOT_PAGE_TABLE 0x09000
#define BOOT_CMDLINE    0x20000
#define BOOT_CMDLINE_MAX 0x10000
#define BOOT_LOW_END    0x9fc00         /* end of conventional memory */
#define BOOT_ACPI       0xe0000
#define BOOT_SMBIOS     0xf0000
#define BOOT_BIOS_STUB  0xfff53         /* an IRET has always been there */
#define BOOT_KERNEL     0x100000

struct boot_file {
	const char *path;
	const uint8_t *data;
	size_t len;
};
int boot_file_open(struct boot_file *f, const char *path, struct err *err);
void boot_file_close(struct boot_file *f);

enum { E820_TYPE_RAM = 1, E820_TYPE_RESERVED = 2 };
struct boot_range { uint64_t base, size; uint32_t type; };
#define BOOT_RANGES 16

struct boot_module { struct boot_file file; char *cmdline, *path; };

struct boot {
	struct guest_mem *mem;
	uint64_t low_ram, high_ram;             /* bytes from 0 and from 4 GiB */
	struct boot_range map[BOOT_RANGES];
	unsigned nmap;
	uint64_t rsdp;                          /* 0: no ACPI */
	struct boot_file kernel;
	struct boot_module *modules;            /* initrd, or multiboot's modules */
	unsigned nmodules;
	const char *initrd_arg;                 /* as given: modules are split only for multiboot */
	const char *cmdline;                    /* never NULL */
};

enum boot_mode { BOOT_MODE_LONG, BOOT_MODE_PROT32 };
struct boot_entry {
	enum boot_mode mode;
	uint64_t rip, rax, rbx, rsi;
};

/* Map files and recognise the format; nothing touches guest memory. */
int boot_open(struct boot *b, const char *kernel, const char *initrd, const char *append, struct err *err);
void boot_close(struct boot *b);
/* Copy everything into guest memory. */
int boot_load(struct boot *b, struct boot_entry *e, struct err *err);
int boot_set_cpu(struct kvm_vcpu *v, const struct boot_entry *e, struct err *err);

/* The protocols. */
bool boot_is_multiboot(const struct boot_file *k);
bool boot_is_bzimage(const struct boot_file *k);
bool boot_is_elf(const struct boot_file *k);
int boot_load_multiboot(struct boot *b, struct boot_entry *e, struct err *err);
int boot_load_bzimage(struct boot *b, struct boot_entry *e, struct err *err);
int boot_load_elf(struct boot *b, struct boot_entry *e, struct err *err);

/* Shared by them. */
struct boot_elf { uint64_t entry, low, high; uint64_t pvh_entry; bool has_pvh, is64; uint16_t machine; };
/* Copies the segments to their physical addresses. */
int boot_elf_segments(struct boot *b, struct boot_elf *out, struct err *err);
int boot_write(struct boot *b, uint64_t gpa, const void *data, uint64_t len, const char *what, struct err *err);
/* initrd below `max` (inclusive) and above `min`; fills address and size, both 0 without an initrd. */
int boot_place_initrd(struct boot *b, uint64_t min, uint64_t max, uint64_t *gpa, uint64_t *size, struct err *err);
int boot_write_cmdline(struct boot *b, size_t max, struct err *err);
/* For all protocols; nothing on a machine with less than 1 MiB. */
int boot_write_bios(struct boot *b, struct err *err);
int boot_write_page_tables(struct boot *b, struct err *err);
/* Zero page for the 64-bit protocol; `hdr`: setup header bytes from 0x1f1, NULL: none. */
int boot_write_params(struct boot *b, const uint8_t *hdr, size_t hdr_len, uint64_t initrd, uint64_t initrd_size,
		      struct err *err);

#endif
