/*
 * The interposed functions. Each looks whether its descriptor or path is ours, which for all others costs a table
 * load, and hands the rest to the C library. Functions that a memory allocator may use (mmap) and those that are
 * no more than their system call go to the kernel directly.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include "preload/preload.h"
#include "softkvm/softkvm.h"

#pragma GCC diagnostic ignored "-Wmissing-prototypes"

#define KVMIO 0xae
#define KVM_DEVICE makedev(10, 232)
DECLARE_REAL(open);
DECLARE_REAL(openat);
DECLARE_REAL(fopen);
DECLARE_REAL(close);
DECLARE_REAL(fcntl);
DECLARE_REAL(read);
DECLARE_REAL(write);
DECLARE_REAL(pread);
DECLARE_REAL(pwrite);
DECLARE_REAL(readv);
DECLARE_REAL(writev);
DECLARE_REAL(preadv);
DECLARE_REAL(pwritev);

/* -- opening ---------------------------------------------------------------------------------- */
static mode_t open_mode(int flags, va_list ap)
{
	return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(ap, mode_t) : 0;
}

/*
 * A number that the kernel has just given out means nothing of ours, whatever the table says: the C library closes
 * some descriptors without close(), in fclose() for one.
 */
static int fresh(int fd)
{
	int err = errno;

	if (table_maybe(fd))
		table_set(fd, NULL);
	errno = err;
	return fd;
}

/* The same for files that a path led to: the host's KVM may stand behind a symbolic link. */
static int opened(int fd, int flags)
{
	struct stat st;
	int err = errno;

	fresh(fd);
	if (fd < 0 || flags & (O_PATH | O_DIRECTORY) || RAW(SYS_fstat, fd, &st) || !S_ISCHR(st.st_mode) || st.st_rdev != KVM_DEVICE) {
		errno = err;
		return fd;
	}
	RAW(SYS_close, fd);
	return kvm_open(flags & ~(O_CREAT | O_EXCL));
}

#define OPEN_BODY(dirfd, path, flags, call) do { \
	va_list ap; \
	mode_t mode; \
	va_start(ap, flags); \
	mode = open_mode(flags, ap); \
	va_end(ap); \
	return kvm_path(dirfd, path) && !(flags & O_PATH) ? kvm_open(flags) : opened(call, flags); \
} while (0)

int open(const char *path, int flags, ...)
{
	OPEN_BODY(AT_FDCWD, path, flags, REAL(open)(path, flags, mode));
}

int open64(const char *path, int flags, ...)
{
	OPEN_BODY(AT_FDCWD, path, flags, REAL(open)(path, flags | O_LARGEFILE, mode));
}

int openat(int dirfd, const char *path, int flags, ...)
{
	OPEN_BODY(dirfd, path, flags, REAL(openat)(dirfd, path, flags, mode));
}

int openat64(int dirfd, const char *path, int flags, ...)
{
	OPEN_BODY(dirfd, path, flags, REAL(openat)(dirfd, path, flags | O_LARGEFILE, mode));
}

/* What _FORTIFY_SOURCE turns calls without a mode into. */
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int dirfd, const char *path, int flags) { return openat(dirfd, path, flags); }
int __openat64_2(int dirfd, const char *path, int flags) { return openat64(dirfd, path, flags); }

FILE *fopen(const char *path, const char *mode)
{
	int fd;
	FILE *f;

	if (!kvm_path(AT_FDCWD, path))
		return REAL(fopen)(path, mode);
	fd = kvm_open(strchr(mode, 'e') ? O_CLOEXEC : 0);
	f = fd < 0 ? NULL : fdopen(fd, mode);
	if (!f && fd >= 0)
		close(fd);
	return f;
}

FILE *fopen64(const char *path, const char *mode)
{
	return fopen(path, mode);
}

/* -- ioctl, mmap ------------------------------------------------------------------------------ */
/* A KVM request on a descriptor unknown here: inherited over exec or received. /dev/kvm itself works anywhere. */
static int foreign_ioctl(int fd, unsigned long req, uintptr_t arg)
{
	enum file_type type;
	struct softkvm_file *f;
	struct pfile *p;
	int r;

	if ((req >> 8 & 0xff) != KVMIO || !table_foreign(fd, &type))
		return (int)RAW(SYS_ioctl, fd, req, arg);
	if (type != FILE_KVM)
		return errno = EIO, -1;
	if (table_init() || !(f = softkvm_open()) || table_enter(fd, FILE_KVM, f) || !(p = table_get(fd)))
		return errno = ENOMEM, -1;
	softkvm_strict_copies(1);
	softkvm_host_state_only(1);
	r = kvm_ioctl(fd, p, req, arg);
	table_put(p);
	return r;
}

int ioctl(int fd, unsigned long req, ...)
{
	struct pfile *p;
	uintptr_t arg;
	va_list ap;
	int r, err;

	va_start(ap, req);
	arg = va_arg(ap, uintptr_t);
	va_end(ap);
	/* KVM's requests come often; others are rare on files of ours, and the number may be another file's by now. */
	p = (req >> 8 & 0xff) == KVMIO ? table_get(fd) : table_maybe(fd) ? table_get_checked(fd) : NULL;
	if (!p && (req >> 8 & 0xff) == KVMIO)
		p = table_adopt(fd);
	if (!p)
		return foreign_ioctl(fd, req, arg);
	r = kvm_ioctl(fd, p, req, arg);
	err = errno;
	table_put(p);
	errno = err;
	return r;
}

void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t off)
{
	struct pfile *p = flags & MAP_ANONYMOUS ? NULL : table_maybe(fd) ? table_get_checked(fd) : NULL;
	enum file_type type;
	void *m;
	int err;

	if (!p && !(flags & MAP_ANONYMOUS))
		p = table_adopt(fd);
	if (!p && !(flags & MAP_ANONYMOUS) && table_used() && table_foreign(fd, &type))
		return errno = ENODEV, MAP_FAILED;
	if (!p)
		return (void *)RAW(SYS_mmap, addr, len, prot, flags, fd, off);
	m = kvm_mmap(p, addr, len, prot, flags, off);
	err = errno;
	table_put(p);
	errno = err;
	return m;
}

void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off_t off)
{
	return mmap(addr, len, prot, flags, fd, off);
}

/*
 * Huge pages spare a hardware MMU its nested walks and give nothing to a software one, whose guests would wait for each two
 * MiB to be cleared. Advice on memory is just that.
 */
int madvise(void *addr, size_t len, int advice)
{
	if (advice == MADV_HUGEPAGE && table_used())
		return 0;
	return (int)RAW(SYS_madvise, addr, len, advice);
}

/* -- descriptors ------------------------------------------------------------------------------ */
int close(int fd)
{
	/* Forgotten first: the number may be given to another file as soon as it is closed. */
	if (table_maybe(fd))
		table_set(fd, NULL);
	return REAL(close)(fd);
}

/* Close or mark what lies between softkvm's own descriptors. */
static int range_around_internal(unsigned first, unsigned last, int flags)
{
	int next, r = 0;

	while (first <= last && (next = internal_next(first, last)) >= 0) {
		if ((unsigned)next > first && RAW(SYS_close_range, first, next - 1, flags))
			r = -1;
		first = (unsigned)next + 1;
	}
	if (first <= last && RAW(SYS_close_range, first, last, flags))
		r = -1;
	return r;
}

int close_range(unsigned first, unsigned last, int flags)
{
	if (first > last)
		return errno = EINVAL, -1;
	if (!(flags & ~CLOSE_RANGE_UNSHARE))
		table_clear_range(first, last);
	return range_around_internal(first, last, flags);
}

void closefrom(int lowfd)
{
	close_range(lowfd < 0 ? 0 : (unsigned)lowfd, ~0u, 0);
}

/* `new` now means what `old` means. */
static int duplicated(struct pfile *p, int new)
{
	int err = errno;

	if (new >= 0 && (p || table_maybe(new)))
		table_set(new, p);
	if (p)
		table_put(p);
	errno = err;
	return new;
}

static struct pfile *lookup(int fd)
{
	return table_maybe(fd) ? table_get_checked(fd) : NULL;
}

int dup(int fd)
{
	struct pfile *p = lookup(fd);

	return duplicated(p, (int)RAW(SYS_dup, fd));
}

int dup2(int old, int new)
{
	struct pfile *p = lookup(old);

	return duplicated(p, (int)RAW(SYS_dup2, old, new));
}

int dup3(int old, int new, int flags)
{
	struct pfile *p = lookup(old);

	return duplicated(p, (int)RAW(SYS_dup3, old, new, flags));
}

int fcntl(int fd, int cmd, ...)
{
	uintptr_t arg;
	va_list ap;

	va_start(ap, cmd);
	arg = va_arg(ap, uintptr_t);
	va_end(ap);
	if ((cmd == F_DUPFD || cmd == F_DUPFD_CLOEXEC) && table_maybe(fd)) {
		struct pfile *p = lookup(fd);

		return duplicated(p, (int)RAW(SYS_fcntl, fd, cmd, arg));
	}
	return REAL(fcntl)(fd, cmd, arg);
}

int fcntl64(int fd, int cmd, ...)
{
	uintptr_t arg;
	va_list ap;

	va_start(ap, cmd);
	arg = va_arg(ap, uintptr_t);
	va_end(ap);
	return fcntl(fd, cmd, arg);
}

/* -- reading and writing: KVM's files can do neither, but for statistics ---------------------------------- */
/* 0: go on; -1: errno is set. */
static int before_io(int fd, bool write)
{
	struct pfile *p = lookup(fd);
	int r = 0;

	if (!p)
		return 0;
	if (write || p->type != FILE_STATS)
		r = -1;
	else
		kvm_refresh(fd, p);
	write = write && p->type == FILE_STATS;
	table_put(p);
	if (r)
		errno = write ? EBADF : EINVAL;
	return r;
}

#define IO(wr, ret, name, params, args) \
	ret name params { return table_maybe(fd) && before_io(fd, wr) ? -1 : REAL(name) args; }
IO(false, ssize_t, read, (int fd, void *buf, size_t n), (fd, buf, n))
IO(true, ssize_t, write, (int fd, const void *buf, size_t n), (fd, buf, n))
IO(false, ssize_t, pread, (int fd, void *buf, size_t n, off_t off), (fd, buf, n, off))
IO(true, ssize_t, pwrite, (int fd, const void *buf, size_t n, off_t off), (fd, buf, n, off))
IO(false, ssize_t, readv, (int fd, const struct iovec *v, int n), (fd, v, n))
IO(true, ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n))

IO(false, ssize_t, preadv, (int fd, const struct iovec *v, int n, off_t off), (fd, v, n, off))
IO(true, ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t off), (fd, v, n, off))

ssize_t preadv64(int fd, const struct iovec *v, int n, off_t off) { return preadv(fd, v, n, off); }
ssize_t pwritev64(int fd, const struct iovec *v, int n, off_t off) { return pwritev(fd, v, n, off); }
ssize_t pread64(int fd, void *buf, size_t n, off_t off) { return pread(fd, buf, n, off); }
ssize_t pwrite64(int fd, const void *buf, size_t n, off_t off) { return pwrite(fd, buf, n, off); }

/* -- syscall() -------------------------------------------------------------------------------- */
static long call_openat2(int dirfd, const char *path, const struct open_how *how, size_t size)
{
	if (kvm_path(dirfd, path) && how && !(how->flags & O_PATH))
		return kvm_open((int)how->flags);
	return RAW(SYS_openat2, dirfd, path, how, size);
}

/* Calls whose first argument is a descriptor of ours. */
static long call_on_ours(long nr, long a, long b, long c, long d, long e, long f)
{
	switch (nr) {
	case SYS_ioctl: return ioctl((int)a, (unsigned long)b, c);
	case SYS_close: return close((int)a);
	case SYS_dup: return dup((int)a);
	case SYS_dup2: return dup2((int)a, (int)b);
	case SYS_dup3: return dup3((int)a, (int)b, (int)c);
	case SYS_fcntl: return fcntl((int)a, (int)b, c);
	case SYS_read: return read((int)a, (void *)b, (size_t)c);
	case SYS_write: return write((int)a, (const void *)b, (size_t)c);
	case SYS_pread64: return pread((int)a, (void *)b, (size_t)c, d);
	case SYS_pwrite64: return pwrite((int)a, (const void *)b, (size_t)c, d);
	case SYS_readv: return readv((int)a, (const struct iovec *)b, (int)c);
	case SYS_writev: return writev((int)a, (const struct iovec *)b, (int)c);
	case SYS_fstat: return fstat((int)a, (struct stat *)b);
	default: return raw_call(nr, a, b, c, d, e, f);
	}
}

/* Calls that ask about a path. False: it is none of those, or not /dev/kvm's. */
static bool call_on_path(long nr, long a, long b, long c, long d, long e, long *r)
{
	bool at = nr == SYS_newfstatat || nr == SYS_statx || nr == SYS_faccessat || nr == SYS_faccessat2;
	int dirfd = at ? (int)a : AT_FDCWD, flags = nr == SYS_newfstatat ? (int)d : nr == SYS_statx ? (int)c : 0;
	const char *path = (const char *)(at ? b : a);

	if (!at && nr != SYS_stat && nr != SYS_lstat && nr != SYS_access)
		return false;
	if (!kvm_path(dirfd, path) && !(flags & AT_EMPTY_PATH && table_maybe(dirfd)))
		return false;
	switch (nr) {
	case SYS_stat: case SYS_lstat: *r = stat(path, (struct stat *)b); break;
	case SYS_access: *r = access(path, (int)b); break;
	case SYS_newfstatat: *r = fstatat(dirfd, path, (struct stat *)c, flags); break;
	case SYS_statx: *r = statx(dirfd, path, flags, (unsigned)d, (struct statx *)e); break;
	default: *r = faccessat(dirfd, path, (int)c, nr == SYS_faccessat2 ? (int)d : 0); break;
	}
	return true;
}

long syscall(long nr, ...)
{
	long a, b, c, d, e, f, r;
	va_list ap;

	va_start(ap, nr);
	a = va_arg(ap, long);
	b = va_arg(ap, long);
	c = va_arg(ap, long);
	d = va_arg(ap, long);
	e = va_arg(ap, long);
	f = va_arg(ap, long);
	va_end(ap);
	switch (nr) {
	case SYS_open:
		return kvm_path(AT_FDCWD, (const char *)a) && !(b & O_PATH) ? kvm_open((int)b) : raw_call(nr, a, b, c, d, e, f);
	case SYS_openat:
		return kvm_path((int)a, (const char *)b) && !(c & O_PATH) ? kvm_open((int)c) : raw_call(nr, a, b, c, d, e, f);
	case SYS_openat2: return call_openat2((int)a, (const char *)b, (const struct open_how *)c, (size_t)d);
	case SYS_mmap: return (long)mmap((void *)a, (size_t)b, (int)c, (int)d, (int)e, f);
	case SYS_close_range: return close_range((unsigned)a, (unsigned)b, (int)c);
	case SYS_ioctl: return ioctl((int)a, (unsigned long)b, c);
	case SYS_dup2: case SYS_dup3:
		if (table_maybe((int)b))
			return call_on_ours(nr, a, b, c, d, e, f);
		break;
	}
	if (call_on_path(nr, a, b, c, d, e, &r))
		return r;
	return table_maybe((int)a) ? call_on_ours(nr, a, b, c, d, e, f) : raw_call(nr, a, b, c, d, e, f);
}
