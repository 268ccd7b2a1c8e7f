/* What the interposed calls do on descriptors of ours. */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "preload/preload.h"
#include "softkvm/softkvm.h"

/* -- the path --------------------------------------------------------------------------------- */
/* Is `path`, absolute, /dev/kvm but for doubled slashes and "." components? */
static bool absolute_kvm(const char *path)
{
	const char *want = "/dev/kvm";

	while (*want) {
		if (*path != *want)
			return false;
		if (*path++ == '/')
			while (*path == '/' || (path[0] == '.' && path[1] == '/'))
				path++;
		want++;
	}
	return !*path;
}

bool kvm_path(int dirfd, const char *path)
{
	char link[64] = "/proc/self/cwd", full[128];
	size_t n;
	long r;

	if (!path)
		return false;
	if (path[0] == '/')
		return absolute_kvm(path);
	n = strnlen(path, 32);
	if (n < 3 || n == 32 || strcmp(path + n - 3, "kvm"))
		return false;
	if (dirfd != AT_FDCWD)
		snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
	r = RAW(SYS_readlink, link, full, 64);
	if (r <= 0 || r >= 64)
		return false;
	full[r] = '/';
	memcpy(full + r + 1, path, n + 1);
	return absolute_kvm(full);
}

int kvm_open(int flags)
{
	struct softkvm_file *f;
	int fd, r;

	if ((flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL))
		return errno = EEXIST, -1;
	if (flags & O_DIRECTORY)
		return errno = ENOTDIR, -1;
	r = table_init();
	if (r)
		return errno = -r, -1;
	softkvm_strict_copies(1);
	softkvm_host_state_only(1);
	fd = table_new_fd(FILE_KVM, flags & O_CLOEXEC);
	if (fd < 0)
		return -1;
	f = softkvm_open();
	if (!f || table_enter(fd, FILE_KVM, f)) {
		RAW(SYS_close, fd);
		return errno = ENOMEM, -1;
	}
	return fd;
}

/* -- ioctl ------------------------------------------------------------------------------------ */
static bool creates(enum file_type type, unsigned long req, enum file_type *made)
{
	if (type == FILE_KVM && req == KVM_CREATE_VM)
		*made = FILE_VM;
	else if (type == FILE_VM && req == KVM_CREATE_VCPU)
		*made = FILE_VCPU;
	else if ((type == FILE_VM || type == FILE_VCPU) && req == KVM_GET_STATS_FD)
		*made = FILE_STATS;
	else
		return false;
	return true;
}

/* The descriptor is made first, so that a full table cannot leave a vCPU without one. */
static int ioctl_create(struct pfile *p, unsigned long req, uintptr_t arg, enum file_type made)
{
	struct softkvm_file *f = NULL;
	int fd = table_new_fd(made, true), err;

	if (fd < 0)
		return -1;
	if (softkvm_ioctl(p->file, req, arg, &f) < 0)
		goto fail;
	if (f && !table_enter(fd, made, f))
		return fd;
	errno = ENOMEM;
fail:
	err = errno;
	RAW(SYS_close, fd);
	errno = err;
	return -1;
}

/* The file system layer answers these before a driver sees them. */
static bool generic_request(unsigned long req)
{
	return req == FIOCLEX || req == FIONCLEX || req == FIONBIO || req == FIOASYNC;
}

int kvm_ioctl(int fd, struct pfile *p, unsigned long req, uintptr_t arg)
{
	struct softkvm_file *none = NULL;
	enum file_type made;
	int r;

	req = (uint32_t)req;    /* the kernel's type; some callers pass a negative int */
	if (generic_request(req))
		return (int)RAW(SYS_ioctl, fd, req, arg);
	if (p->type != FILE_KVM && !table_alive(p))
		return errno = p->type == FILE_STATS ? ENOTTY : EIO, -1;
	if (p->type == FILE_STATS)
		return errno = ENOTTY, -1;
	if (creates(p->type, req, &made))
		return ioctl_create(p, req, arg, made);
	r = softkvm_ioctl(p->file, req, arg, &none);
	if (none)
		softkvm_close(none);
	return r;
}

/* -- memory ----------------------------------------------------------------------------------- */
void *kvm_mmap(struct pfile *p, void *addr, size_t len, int prot, int flags, off_t off)
{
	size_t size = (len + 4095) & ~(size_t)4095;
	void *m, *at;

	if (p->type != FILE_VCPU)
		return errno = ENODEV, MAP_FAILED;
	/* The dirty ring is shared with the guest's side: no private copy, no code. */
	if (off >= KVM_DIRTY_LOG_PAGE_OFFSET * 4096 && (!(flags & MAP_SHARED) || prot & PROT_EXEC))
		return errno = EINVAL, MAP_FAILED;
	/* MAP_FIXED_NOREPLACE: is it free? What is mapped here gives way below. */
	if (flags & MAP_FIXED_NOREPLACE && !(flags & MAP_FIXED)) {
		at = (void *)RAW(SYS_mmap, addr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
		if (at == MAP_FAILED)
			return at;
	}
	m = softkvm_mmap(p->file, len, (uint64_t)off);
	if (m == MAP_FAILED)
		return m;
	if (prot != (PROT_READ | PROT_WRITE))
		mprotect(m, size, prot);
	if (!(flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)))
		return m;
	/* Page by page: the pages are mappings of their own. */
	for (size_t i = 0; i < size; i += 4096) {
		at = mremap((char *)m + i, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)addr + i);
		if (at == MAP_FAILED)
			return at;
	}
	return addr;
}

void kvm_refresh(int fd, struct pfile *p)
{
	char buf[16384];
	ssize_t n;

	if (p->type != FILE_STATS || !table_alive(p))
		return;
	n = softkvm_read_stats(p->file, buf, sizeof buf);
	if (n > 0)
		RAW(SYS_pwrite64, fd, buf, n, 0);
}
