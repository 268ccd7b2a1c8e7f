/*
 * ELF kernels: PVH entry (Xen's x86/HVM direct boot ABI, note XEN_ELFNOTE_PHYS32_ENTRY) in 32-bit
 * protected mode, and a Linux vmlinux without that note through the 64-bit boot protocol.
 */
#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "board/boot.h"

#define NOTE_PHYS32_ENTRY 18
#define PVH_MAGIC 0x336ec578

struct pvh_info {
	uint32_t magic, version, flags, nr_modules;
	uint64_t modlist, cmdline, rsdp, memmap;
	uint32_t memmap_entries, reserved;
};
struct pvh_module { uint64_t paddr, size, cmdline, reserved; };
struct pvh_range { uint64_t addr, size; uint32_t type, reserved; };

bool boot_is_elf(const struct boot_file *k)
{
	return k->len >= sizeof(Elf32_Ehdr) && !memcmp(k->data, ELFMAG, SELFMAG);
}

/* Program header `i`, of either class, as an Elf64_Phdr. */
static void get_phdr(const struct boot_file *k, bool is64, uint64_t phoff, unsigned size, unsigned i, Elf64_Phdr *p)
{
	const uint8_t *at = k->data + phoff + (uint64_t)i * size;
	Elf32_Phdr q;

	if (is64) {
		memcpy(p, at, sizeof(*p));
		return;
	}
	memcpy(&q, at, sizeof(q));
	*p = (Elf64_Phdr){ q.p_type, q.p_flags, q.p_offset, q.p_vaddr, q.p_paddr, q.p_filesz, q.p_memsz, q.p_align };
}

/* Notes: {namesz, descsz, type}, name and descriptor, each padded to 4 bytes. */
static void find_pvh(const uint8_t *p, uint64_t len, struct boot_elf *out)
{
	while (len >= 12) {
		uint64_t ns = ALIGN_UP((uint64_t)ld_le32(p), 4), ds = ALIGN_UP((uint64_t)ld_le32(p + 4), 4);
		uint32_t descsz = ld_le32(p + 4);

		if (ns > len - 12 || ds > len - 12 - ns)
			return;
		if (ld_le32(p + 8) == NOTE_PHYS32_ENTRY && ld_le32(p) == 4 && !memcmp(p + 12, "Xen", 4) && descsz >= 4) {
			out->has_pvh = true;
			out->pvh_entry = descsz >= 8 ? ld_le64(p + 12 + ns) : ld_le32(p + 12 + ns);
		}
		p += 12 + ns + ds;
		len -= 12 + ns + ds;
	}
}

static int load_segment(struct boot *b, const Elf64_Phdr *p, struct boot_elf *out, struct err *err)
{
	const struct boot_file *k = &b->kernel;
	int r;

	if (range_bad(p->p_offset, p->p_filesz, k->len))
		return err_set(err, -ENOEXEC, "%s: truncated: a segment lies outside the file", k->path);
	if (p->p_type == PT_NOTE)
		find_pvh(k->data + p->p_offset, p->p_filesz, out);
	if (p->p_type != PT_LOAD || !p->p_memsz)
		return 0;
	if (p->p_filesz > p->p_memsz || p->p_paddr + p->p_memsz < p->p_paddr)
		return err_set(err, -ENOEXEC, "%s: damaged: bad segment sizes", k->path);
	r = boot_write(b, p->p_paddr, k->data + p->p_offset, p->p_filesz, "a segment", err);
	if (!r && p->p_memsz > p->p_filesz && gm_fill(b->mem, p->p_paddr + p->p_filesz, 0, p->p_memsz - p->p_filesz))
		r = err_set(err, -EFBIG, "%s: a segment does not fit in guest memory", k->path);
	out->low = MIN(out->low, p->p_paddr);
	out->high = MAX(out->high, p->p_paddr + p->p_memsz);
	return r;
}

int boot_elf_segments(struct boot *b, struct boot_elf *out, struct err *err)
{
	const struct boot_file *k = &b->kernel;
	bool is64 = k->data[EI_CLASS] == ELFCLASS64;
	Elf64_Ehdr h;
	Elf32_Ehdr h32;
	Elf64_Phdr p;
	int r = 0;

	memset(out, 0, sizeof(*out));
	out->low = UINT64_MAX;
	out->is64 = is64;
	if (is64 && k->len >= sizeof(h)) {
		memcpy(&h, k->data, sizeof(h));
	} else if (k->data[EI_CLASS] == ELFCLASS32 && k->len >= sizeof(h32)) {
		memcpy(&h32, k->data, sizeof(h32));
		h = (Elf64_Ehdr){ .e_type = h32.e_type, .e_machine = h32.e_machine, .e_entry = h32.e_entry,
				  .e_phoff = h32.e_phoff, .e_phentsize = h32.e_phentsize, .e_phnum = h32.e_phnum };
	} else {
		return err_set(err, -ENOEXEC, "%s: truncated or unknown ELF header", k->path);
	}
	if (k->data[EI_DATA] != ELFDATA2LSB || (h.e_machine != EM_X86_64 && h.e_machine != EM_386))
		return err_set(err, -ENOEXEC, "%s: not an x86 kernel", k->path);
	if (h.e_phentsize < (is64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr)) ||
	    range_bad(h.e_phoff, (uint64_t)h.e_phnum * h.e_phentsize, k->len))
		return err_set(err, -ENOEXEC, "%s: truncated: program headers lie outside the file", k->path);
	out->entry = h.e_entry;
	out->machine = h.e_machine;
	for (unsigned i = 0; i < h.e_phnum && !r; i++) {
		get_phdr(k, is64, h.e_phoff, h.e_phentsize, i, &p);
		r = load_segment(b, &p, out, err);
	}
	if (!r && out->high == 0)
		r = err_set(err, -ENOEXEC, "%s: has no segments to load", k->path);
	return r;
}

static int write_pvh(struct boot *b, uint64_t initrd, uint64_t initrd_size, struct err *err)
{
	struct {
		struct pvh_info info;
		struct pvh_module mod;
		struct pvh_range map[BOOT_RANGES];
	} d = { 0 };

	d.info = (struct pvh_info){ .magic = PVH_MAGIC, .version = 1, .cmdline = BOOT_CMDLINE, .rsdp = b->rsdp,
				    .memmap_entries = b->nmap };
	d.info.memmap = BOOT_PVH_INFO + ((uint8_t *)d.map - (uint8_t *)&d);
	if (initrd_size) {
		d.info.nr_modules = 1;
		d.info.modlist = BOOT_PVH_INFO + ((uint8_t *)&d.mod - (uint8_t *)&d);
		d.mod = (struct pvh_module){ .paddr = initrd, .size = initrd_size };
	}
	for (unsigned i = 0; i < b->nmap; i++)
		d.map[i] = (struct pvh_range){ b->map[i].base, b->map[i].size, b->map[i].type, 0 };
	return boot_write(b, BOOT_PVH_INFO, &d, sizeof(d), "PVH start info", err);
}

int boot_load_elf(struct boot *b, struct boot_entry *e, struct err *err)
{
	uint64_t initrd, initrd_size;
	struct boot_elf elf;
	int r = boot_elf_segments(b, &elf, err);

	if (r)
		return r;
	if (!elf.has_pvh && !(elf.is64 && elf.machine == EM_X86_64))
		return err_set(err, -ENOEXEC, "%s: an ELF without PVH note or multiboot header", b->kernel.path);
	if (elf.has_pvh && elf.pvh_entry > UINT32_MAX)
		return err_set(err, -ENOEXEC, "%s: PVH entry point is above 4 GiB", b->kernel.path);
	r = boot_write_cmdline(b, BOOT_CMDLINE_MAX - 1, err);
	if (!r)
		r = boot_place_initrd(b, MAX(elf.high, (uint64_t)BOOT_KERNEL), 0x37ffffff, &initrd, &initrd_size, err);
	if (r)
		return r;
	if (elf.has_pvh) {
		*e = (struct boot_entry){ .mode = BOOT_MODE_PROT32, .rip = elf.pvh_entry, .rbx = BOOT_PVH_INFO };
		return write_pvh(b, initrd, initrd_size, err);
	}
	*e = (struct boot_entry){ .mode = BOOT_MODE_LONG, .rip = elf.entry, .rsi = BOOT_PARAMS };
	r = boot_write_page_tables(b, err);
	return r ? r : boot_write_params(b, NULL, 0, initrd, initrd_size, err);
}
