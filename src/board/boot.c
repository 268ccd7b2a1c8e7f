#include "board/boot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/util.h"

int boot_file_open(struct boot_file *f, const char *path, struct err *err)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), r = 0;
	struct stat st;
	void *p;

	if (fd < 0)
		return err_set_errno(err, -errno, "%s", path);
	if (fstat(fd, &st))
		r = err_set_errno(err, -errno, "%s", path);
	else if (S_ISDIR(st.st_mode))
		r = err_set(err, -EISDIR, "%s: is a directory", path);
	else if (!S_ISREG(st.st_mode))
		r = err_set(err, -EINVAL, "%s: is not a regular file", path);
	else if (!st.st_size)
		r = err_set(err, -EINVAL, "%s: is empty", path);
	if (!r) {
		p = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
		if (p == MAP_FAILED)
			r = err_set_errno(err, -errno, "%s", path);
		else
			*f = (struct boot_file){ path, p, st.st_size };
	}
	close(fd);
	return r;
}

void boot_file_close(struct boot_file *f)
{
	if (f->data)
		munmap((void *)f->data, f->len);
	f->data = NULL;
}

/* One item of "file args,file args"; ",," stands for a comma. */
static const char *next_module(const char *s, char *out)
{
	while (*s && !(s[0] == ',' && s[1] != ',')) {
		if (s[0] == ',')
			s++;
		*out++ = *s++;
	}
	*out = 0;
	return *s ? s + 1 : s;
}

static int add_module(struct boot *b, const char *path, const char *cmdline, struct err *err)
{
	struct boot_module *m = realloc(b->modules, (b->nmodules + 1) * sizeof(*m));

	if (!m)
		return err_set(err, -ENOMEM, "no memory for module %s", path);
	b->modules = m;
	m += b->nmodules;
	memset(m, 0, sizeof(*m));
	b->nmodules++;
	m->cmdline = strdup(cmdline);
	m->path = strdup(path);
	if (!m->cmdline || !m->path)
		return err_set(err, -ENOMEM, "no memory for module %s", path);
	return boot_file_open(&m->file, m->path, err);
}

static int open_modules(struct boot *b, const char *list, struct err *err)
{
	char *item = malloc(strlen(list) + 1), *path;
	int r = item ? 0 : err_set(err, -ENOMEM, "no memory for -initrd");

	while (!r && *list) {
		list = next_module(list, item);
		path = strndup(item, strcspn(item, " "));
		r = path ? add_module(b, path, item, err) : err_set(err, -ENOMEM, "no memory for -initrd");
		free(path);
	}
	free(item);
	return r;
}

int boot_open(struct boot *b, const char *kernel, const char *initrd, const char *append, struct err *err)
{
	int r;

	b->cmdline = append ? append : "";
	if (!kernel) {
		if (initrd || append)
			return err_set(err, -EINVAL, "%s needs -kernel", initrd ? "-initrd" : "-append");
		return 0;
	}
	r = boot_file_open(&b->kernel, kernel, err);
	if (r)
		return r;
	if (b->kernel.len > 2 && b->kernel.data[0] == 0x1f && b->kernel.data[1] == 0x8b)
		return err_set(err, -ENOEXEC, "%s: compressed; unpack it with zcat first", kernel);
	if (!boot_is_multiboot(&b->kernel) && !boot_is_bzimage(&b->kernel) && !boot_is_elf(&b->kernel))
		return err_set(err, -ENOEXEC, "%s: not a Linux bzImage, an ELF or a multiboot kernel%s", kernel,
			       b->kernel.len < 0x264 ? " (truncated?)" : "");
	if (!initrd || !*initrd)
		return 0;
	return boot_is_multiboot(&b->kernel) ? open_modules(b, initrd, err) : add_module(b, initrd, "", err);
}

void boot_close(struct boot *b)
{
	boot_file_close(&b->kernel);
	for (unsigned i = 0; i < b->nmodules; i++) {
		boot_file_close(&b->modules[i].file);
		free(b->modules[i].cmdline);
		free(b->modules[i].path);
	}
	free(b->modules);
	b->modules = NULL;
	b->nmodules = 0;
}

static int load_format(struct boot *b, struct boot_entry *e, struct err *err)
{
	if (boot_is_multiboot(&b->kernel))
		return boot_load_multiboot(b, e, err);
	if (boot_is_bzimage(&b->kernel))
		return boot_load_bzimage(b, e, err);
	return boot_load_elf(b, e, err);
}

/* Not needed before the next reset: the pages are the page cache's, not ours to hold. */
static void file_drop(const struct boot_file *f)
{
	if (f->data)
		madvise((void *)(uintptr_t)f->data, f->len, MADV_DONTNEED);
}

int boot_load(struct boot *b, struct boot_entry *e, struct err *err)
{
	int r;

	memset(e, 0, sizeof(*e));
	r = boot_write_bios(b, err);
	r = r ? r : load_format(b, e, err);
	file_drop(&b->kernel);
	for (unsigned i = 0; i < b->nmodules; i++)
		file_drop(&b->modules[i].file);
	return r;
}

int boot_write(struct boot *b, uint64_t gpa, const void *data, uint64_t len, const char *what, struct err *err)
{
	if (!len)
		return 0;
	if (gm_write(b->mem, gpa, data, len))
		return err_set(err, -EFBIG, "%s: %s (%llu bytes at %#llx) does not fit in guest memory", b->kernel.path,
			       what, (unsigned long long)len, (unsigned long long)gpa);
	return 0;
}

int boot_place_initrd(struct boot *b, uint64_t min, uint64_t max, uint64_t *gpa, uint64_t *size, struct err *err)
{
	uint64_t top = MIN(b->low_ram, max == UINT64_MAX ? max : max + 1), len;

	*gpa = *size = 0;
	if (!b->nmodules)
		return 0;
	len = b->modules[0].file.len;
	if (len > top || ALIGN_DOWN(top - len, 4096) < min)
		return err_set(err, -EFBIG, "%s: initrd of %llu bytes does not fit in guest memory beside the kernel",
			       b->modules[0].file.path, (unsigned long long)len);
	*gpa = ALIGN_DOWN(top - len, 4096);
	*size = len;
	return boot_write(b, *gpa, b->modules[0].file.data, len, "initrd", err);
}

int boot_write_cmdline(struct boot *b, size_t max, struct err *err)
{
	size_t len = strlen(b->cmdline);

	max = MIN(max, (size_t)BOOT_CMDLINE_MAX - 1);
	if (len > max)
		return err_set(err, -E2BIG, "kernel command line of %zu bytes: this kernel takes at most %zu", len, max);
	return boot_write(b, BOOT_CMDLINE, b->cmdline, len + 1, "command line", err);
}

/* The first 4 GiB mapped one to one with 2 MiB pages. */
int boot_write_page_tables(struct boot *b, struct err *err)
{
	uint64_t *t = calloc(6, 4096);
	int r;

	if (!t)
		return err_set(err, -ENOMEM, "no memory for boot page tables");
	t[0] = (BOOT_PAGE_TABLE + 0x1000) | 3;
	for (unsigned i = 0; i < 4; i++)
		t[512 + i] = (BOOT_PAGE_TABLE + 0x2000 + i * 0x1000) | 3;
	for (uint64_t i = 0; i < 2048; i++)
		t[1024 + i] = i << 21 | 0x83;
	r = boot_write(b, BOOT_PAGE_TABLE, t, 6 * 4096, "page tables", err);
	free(t);
	return r;
}

static struct kvm_segment segment(uint16_t sel, uint8_t type, bool l)
{
	return (struct kvm_segment){ .base = 0, .limit = 0xffffffff, .selector = sel, .type = type, .present = 1,
				     .s = 1, .db = !l, .l = l, .g = 1 };
}

/* Flat segments at the selectors of Linux's boot protocol: 0x10 code, 0x18 data. */
int boot_set_cpu(struct kvm_vcpu *v, const struct boot_entry *e, struct err *err)
{
	bool lng = e->mode == BOOT_MODE_LONG;
	struct kvm_segment data = segment(0x18, 3, false);
	struct kvm_regs regs = { .rip = e->rip, .rax = e->rax, .rbx = e->rbx, .rsi = e->rsi, .rflags = 2 };
	struct kvm_sregs s;
	int r = kvm_vcpu_ioctl(v, KVM_GET_SREGS, &s);

	if (r < 0)
		return err_set_errno(err, r, "KVM_GET_SREGS");
	s.cs = segment(0x10, 11, lng);
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	s.tr = (struct kvm_segment){ .limit = 0x67, .selector = 0x20, .type = 11, .present = 1 };
	s.ldt = (struct kvm_segment){ .unusable = 1 };
	s.gdt.base = BOOT_GDT;
	s.gdt.limit = 5 * 8 - 1;
	s.idt.base = 0;
	s.idt.limit = 0;
	s.cr0 = 0x11;                                   /* ET, PE */
	s.cr3 = s.cr4 = s.efer = 0;
	if (lng) {
		s.cr0 |= 1u << 31;
		s.cr3 = BOOT_PAGE_TABLE;
		s.cr4 = 1u << 5;                        /* PAE */
		s.efer = 0x500;                         /* LME, LMA */
	}
	r = kvm_vcpu_ioctl(v, KVM_SET_SREGS, &s);
	if (r < 0)
		return err_set_errno(err, r, "KVM_SET_SREGS");
	r = kvm_vcpu_ioctl(v, KVM_SET_REGS, &regs);
	return r < 0 ? err_set_errno(err, r, "KVM_SET_REGS") : 0;
}
