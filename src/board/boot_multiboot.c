/*
 * Multiboot 1 (Multiboot Specification 0.6.96): kernel by its header's addresses or as an ELF, modules,
 * memory map, command lines. Machine state at entry as section 3.2 has it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "board/boot.h"

#define MAGIC 0x1badb002u
#define ENTRY_MAGIC 0x2badb002u

enum { F_PAGE_ALIGN = 1, F_MEMORY = 2, F_VIDEO = 4, F_ADDRS = 1 << 16 };
enum { I_MEM = 1, I_CMDLINE = 4, I_MODS = 8, I_MMAP = 64, I_LOADER = 512 };

struct mb_header { uint32_t magic, flags, checksum, header_addr, load_addr, load_end, bss_end, entry; };
struct mb_info {
	uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4], mmap_length,
		mmap_addr, drives_length, drives_addr, config_table, loader_name, apm_table, vbe[4];
};
struct mb_module { uint32_t start, end, string, reserved; };
struct mb_range { uint32_t size; uint64_t base, len; uint32_t type; } __attribute__((packed));

/* The header lies, 4-byte aligned, in the first 8192 bytes. Offset, or -1. */
static long find_header(const struct boot_file *k)
{
	for (size_t i = 0; i + 12 <= MIN(k->len, (size_t)8192); i += 4)
		if (ld_le32(k->data + i) == MAGIC &&
		    ld_le32(k->data + i) + ld_le32(k->data + i + 4) + ld_le32(k->data + i + 8) == 0)
			return (long)i;
	return -1;
}

bool boot_is_multiboot(const struct boot_file *k)
{
	return find_header(k) >= 0;
}

static int load_by_header(struct boot *b, const struct mb_header *h, size_t hdr_off, struct boot_elf *out,
			  struct err *err)
{
	const struct boot_file *k = &b->kernel;
	uint64_t skip = hdr_off - (uint64_t)(h->header_addr - h->load_addr), len, end;
	int r;

	if (h->header_addr < h->load_addr || h->header_addr - h->load_addr > hdr_off)
		return err_set(err, -ENOEXEC, "%s: damaged multiboot header: addresses", k->path);
	len = h->load_end ? (uint64_t)h->load_end - h->load_addr : k->len - skip;
	if ((h->load_end && h->load_end < h->load_addr) || range_bad(skip, len, k->len))
		return err_set(err, -ENOEXEC, "%s: truncated: the multiboot header announces more bytes than there are",
			       k->path);
	end = h->load_addr + len;
	r = boot_write(b, h->load_addr, k->data + skip, len, "kernel", err);
	if (!r && h->bss_end > end) {
		if (gm_fill(b->mem, end, 0, h->bss_end - end))
			r = err_set(err, -EFBIG, "%s: bss does not fit in guest memory", k->path);
		end = h->bss_end;
	}
	*out = (struct boot_elf){ .entry = h->entry, .low = h->load_addr, .high = end };
	return r;
}

/* Bump allocation in guest memory above the kernel. */
struct place { struct boot *b; uint64_t at; const char *what; /* the file this is for */ };

static int put(struct place *p, const void *data, size_t len, unsigned align, uint32_t *gpa, struct err *err)
{
	uint64_t a = ALIGN_UP(p->at, (uint64_t)align);

	if (a + len > p->b->low_ram || a + len > UINT32_MAX)
		return err_set(err, -EFBIG, "%s: %zu bytes for it or about it do not fit in guest memory", p->what, len);
	*gpa = (uint32_t)a;
	p->at = a + len;
	return boot_write(p->b, a, data, len, "boot information", err);
}

static int put_modules(struct place *p, struct mb_info *info, struct err *err)
{
	unsigned n = p->b->nmodules;
	struct mb_module *m = calloc(n ? n : 1, sizeof(*m));
	int r = m ? 0 : err_set(err, -ENOMEM, "no memory for modules");

	for (unsigned i = 0; i < n && !r; i++) {
		struct boot_module *s = &p->b->modules[i];

		p->what = s->file.path;
		r = put(p, s->file.data, s->file.len, 4096, &m[i].start, err);
		m[i].end = m[i].start + s->file.len;
		if (!r)
			r = put(p, s->cmdline, strlen(s->cmdline) + 1, 1, &m[i].string, err);
	}
	p->what = p->b->kernel.path;
	if (!r && n)
		r = put(p, m, n * sizeof(*m), 4, &info->mods_addr, err);
	info->mods_count = n;
	free(m);
	return r;
}

static int put_map(struct place *p, struct mb_info *info, struct err *err)
{
	struct mb_range r[BOOT_RANGES];

	for (unsigned i = 0; i < p->b->nmap; i++)
		r[i] = (struct mb_range){ sizeof(r[i]) - 4, p->b->map[i].base, p->b->map[i].size, p->b->map[i].type };
	info->mmap_length = p->b->nmap * sizeof(r[0]);
	return put(p, r, info->mmap_length, 4, &info->mmap_addr, err);
}

/* The command line starts with the kernel's name, as multiboot kernels expect. */
static int put_cmdline(struct place *p, struct mb_info *info, struct err *err)
{
	size_t len = strlen(p->b->kernel.path) + strlen(p->b->cmdline) + 2;
	char *s = malloc(len);
	int r;

	if (!s)
		return err_set(err, -ENOMEM, "no memory for the command line");
	strcpy(s, p->b->kernel.path);
	strcat(s, " ");
	strcat(s, p->b->cmdline);
	r = put(p, s, len, 1, &info->cmdline, err);
	free(s);
	return r;
}

int boot_load_multiboot(struct boot *b, struct boot_entry *e, struct err *err)
{
	struct mb_info info = { .flags = I_MEM | I_CMDLINE | I_MODS | I_MMAP | I_LOADER };
	struct mb_header h = { 0 };
	long off = find_header(&b->kernel);
	struct boot_elf img;
	struct place p = { b, 0, b->kernel.path };
	uint32_t gpa = 0;
	int r;

	memcpy(&h, b->kernel.data + off, MIN(sizeof(h), b->kernel.len - off));
	if (h.flags & 0xfff8)
		return err_set(err, -ENOEXEC, "%s: wants multiboot features %#x that are unknown", b->kernel.path,
			       h.flags & 0xffff);
	if ((h.flags & F_ADDRS) && b->kernel.len - off < sizeof(h))
		return err_set(err, -ENOEXEC, "%s: truncated multiboot header", b->kernel.path);
	if (h.flags & F_ADDRS)
		r = load_by_header(b, &h, off, &img, err);
	else if (boot_is_elf(&b->kernel))
		r = boot_elf_segments(b, &img, err);
	else
		r = err_set(err, -ENOEXEC, "%s: multiboot header without addresses, and not an ELF", b->kernel.path);
	if (r)
		return r;
	if (img.entry > UINT32_MAX)
		return err_set(err, -ENOEXEC, "%s: entry point above 4 GiB", b->kernel.path);
	p.at = ALIGN_UP(MAX(img.high, (uint64_t)BOOT_KERNEL), 4096);
	info.mem_lower = BOOT_LOW_END >> 10;
	info.mem_upper = b->low_ram > BOOT_KERNEL ? (b->low_ram - BOOT_KERNEL) >> 10 : 0;
	r = put_modules(&p, &info, err);
	if (!r)
		r = put_cmdline(&p, &info, err);
	if (!r)
		r = put(&p, "lodge", 6, 1, &info.loader_name, err);
	if (!r)
		r = put_map(&p, &info, err);
	if (!r)
		r = put(&p, &info, sizeof(info), 8, &gpa, err);
	*e = (struct boot_entry){ .mode = BOOT_MODE_PROT32, .rip = img.entry, .rax = ENTRY_MAGIC, .rbx = gpa };
	return r;
}
