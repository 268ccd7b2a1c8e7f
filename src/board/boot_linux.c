/*
 * Linux/x86 boot protocol (Documentation/x86/boot.rst): the setup code is not run; its header goes into
 * boot_params, the rest of the file to 1 MiB, and the vCPU starts in long mode at offset 0x200 of it, or
 * in protected mode at its start where the kernel is a 32-bit one.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include <asm/bootparam.h>

#include "base/util.h"
#include "board/boot.h"

#define HDR 0x1f1
#define SETUP_TYPE_RNG_SEED 9

bool boot_is_bzimage(const struct boot_file *k)
{
	return k->len >= 0x264 && ld_le32(k->data + 0x202) == 0x53726448 && ld_le16(k->data + 0x1fe) == 0xaa55;
}

/* A seed for the guest's random pool, so that it need not wait for one; type 9 is skipped by kernels before 6.0. */
static int write_seed(struct boot *b, struct err *err)
{
	struct { uint64_t next; uint32_t type, len; uint8_t seed[32]; } d = { 0, SETUP_TYPE_RNG_SEED, 32 };

	if (getrandom(d.seed, sizeof(d.seed), 0) != sizeof(d.seed))
		return err_set_errno(err, -errno, "getrandom");
	return boot_write(b, BOOT_SETUP_DATA, &d, sizeof(d), "setup_data", err);
}

static bool enters_64bit(const struct setup_header *h)
{
	return h->version >= 0x020c && (h->xloadflags & XLF_KERNEL_64);
}

static int write_gdt(struct boot *b, bool long_mode, struct err *err)
{
	uint64_t code = long_mode ? 0x00af9b000000ffff : 0x00cf9b000000ffff;
	uint64_t gdt[5] = { 0, 0, code, 0x00cf93000000ffff, 0x00008b0000000067 };

	return boot_write(b, BOOT_GDT, gdt, sizeof(gdt), "GDT", err);
}

int boot_write_params(struct boot *b, const uint8_t *hdr, size_t hdr_len, uint64_t initrd, uint64_t initrd_size,
		      struct err *err)
{
	struct boot_params *bp = calloc(1, sizeof(*bp));
	int r = bp ? 0 : err_set(err, -ENOMEM, "no memory for boot_params");

	if (r)
		return r;
	if (hdr) {
		memcpy(&bp->hdr, hdr, MIN(hdr_len, sizeof(bp->hdr)));
	} else {
		bp->hdr.boot_flag = 0xaa55;
		bp->hdr.header = 0x53726448;
		bp->hdr.version = 0x020f;
		bp->hdr.kernel_alignment = 0x200000;
		bp->hdr.xloadflags = XLF_KERNEL_64;
	}
	bp->hdr.type_of_loader = 0xff;
	bp->hdr.loadflags |= LOADED_HIGH;
	bp->hdr.vid_mode = 0xffff;
	bp->hdr.cmd_line_ptr = BOOT_CMDLINE;
	bp->hdr.ramdisk_image = initrd;
	bp->hdr.ramdisk_size = initrd_size;
	if (bp->hdr.version >= 0x0209) {
		r = write_seed(b, err);
		bp->hdr.setup_data = BOOT_SETUP_DATA;
	}
	bp->acpi_rsdp_addr = b->rsdp;
	bp->alt_mem_k = MIN((b->low_ram - BOOT_KERNEL) >> 10, 0xffffffffu);
	for (unsigned i = 0; i < b->nmap; i++)
		bp->e820_table[i] = (struct boot_e820_entry){ b->map[i].base, b->map[i].size, b->map[i].type };
	bp->e820_entries = b->nmap;
	if (!r)
		r = write_gdt(b, enters_64bit(&bp->hdr), err);
	if (!r)
		r = boot_write(b, BOOT_PARAMS, bp, sizeof(*bp), "boot_params", err);
	free(bp);
	return r;
}

static int check_header(const struct boot_file *k, const struct setup_header *h, size_t *setup_len, struct err *err)
{
	*setup_len = (1 + (h->setup_sects ? h->setup_sects : 4)) * 512;
	if (h->version < 0x020a)        /* pref_address and init_size */
		return err_set(err, -ENOEXEC, "%s: boot protocol %u.%02u is too old, 2.10 is needed", k->path,
			       h->version >> 8, h->version & 0xff);
	if (!(h->loadflags & LOADED_HIGH))
		return err_set(err, -ENOEXEC, "%s: a zImage; only bzImage kernels boot", k->path);
	if (*setup_len >= k->len || k->len - *setup_len < 0x400 ||
	    (uint64_t)h->syssize * 16 > ALIGN_UP(k->len - *setup_len, 16))
		return err_set(err, -ENOEXEC, "%s: truncated: the header announces %llu bytes, the file has %zu", k->path,
			       (unsigned long long)h->syssize * 16 + *setup_len, k->len);
	return 0;
}

int boot_load_bzimage(struct boot *b, struct boot_entry *e, struct err *err)
{
	const struct boot_file *k = &b->kernel;
	uint64_t initrd, initrd_size, end;
	struct setup_header h;
	size_t setup_len, hdr_len;
	int r;

	memcpy(&h, k->data + HDR, sizeof(h));
	r = check_header(k, &h, &setup_len, err);
	if (r)
		return r;
	hdr_len = 0x202 + k->data[0x201] - HDR;
	end = MAX(h.pref_address, (uint64_t)BOOT_KERNEL) + h.init_size;         /* where it unpacks itself */
	if (end < h.init_size || end > b->low_ram)
		return err_set(err, -ENOMEM, "%s: needs %llu MiB of guest memory, there are %llu", k->path,
			       (unsigned long long)(end >> 20) + 1, (unsigned long long)(b->low_ram >> 20));
	end = MAX(end, (uint64_t)BOOT_KERNEL + (k->len - setup_len));
	r = boot_write(b, BOOT_KERNEL, k->data + setup_len, k->len - setup_len, "kernel", err);
	if (!r)
		r = boot_write_cmdline(b, h.cmdline_size, err);
	if (!r)
		r = boot_place_initrd(b, end, h.initrd_addr_max, &initrd, &initrd_size, err);
	if (!r)
		r = boot_write_page_tables(b, err);
	if (!r)
		r = boot_write_params(b, (const uint8_t *)&h, MIN(hdr_len, sizeof(h)), initrd, initrd_size, err);
	*e = (struct boot_entry){ .mode = BOOT_MODE_PROT32, .rip = BOOT_KERNEL, .rsi = BOOT_PARAMS };
	if (enters_64bit(&h)) {
		e->mode = BOOT_MODE_LONG;
		e->rip += 0x200;
	}
	return r;
}
