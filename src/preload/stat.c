/*
 * The stat and access families. /dev/kvm is a character device that everybody may use; a VM, a vCPU and its statistics are
 * anonymous inodes, which are of no type: a memfd's type and size would have callers hold them against a mapping's length.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "preload/preload.h"

#pragma GCC diagnostic ignored "-Wmissing-prototypes"
#ifdef __clang__
#pragma GCC diagnostic ignored "-Wtautological-pointer-compare"
#else
#pragma GCC diagnostic ignored "-Wnonnull-compare"
#endif

DECLARE_REAL(fstat);
DECLARE_REAL(fstatat);
DECLARE_REAL(statx);
DECLARE_REAL(faccessat);

#define KVM_MAJOR 10            /* misc */
#define KVM_MINOR 232
#define ANON_MODE 0600          /* and no type */

static void describe(struct stat *st)
{
	memset(st, 0, sizeof *st);
	st->st_ino = KVM_MINOR;
	st->st_nlink = 1;
	st->st_mode = S_IFCHR | 0666;
	st->st_rdev = makedev(KVM_MAJOR, KVM_MINOR);
	st->st_blksize = 4096;
	clock_gettime(CLOCK_REALTIME, &st->st_mtim);
	st->st_atim = st->st_ctim = st->st_mtim;
}

/* What `fd` is: FILE_TYPES when it is not ours. */
static enum file_type type_of(int fd)
{
	struct pfile *p = table_maybe(fd) ? table_get_checked(fd) : NULL;
	enum file_type type = p ? p->type : FILE_TYPES;

	if (p)
		table_put(p);
	return type;
}

static int describe_fd(enum file_type type, int fd, struct stat *st)
{
	if (type == FILE_KVM)
		return describe(st), 0;
	if (REAL(fstat)(fd, st))
		return -1;
	st->st_mode = ANON_MODE;
	st->st_size = st->st_blocks = 0;
	return 0;
}

int fstat(int fd, struct stat *st)
{
	enum file_type type = type_of(fd);

	return type == FILE_TYPES ? REAL(fstat)(fd, st) : describe_fd(type, fd, st);
}

static enum file_type type_at(int dirfd, const char *path, int flags)
{
	return flags & AT_EMPTY_PATH && (!path || !*path) ? type_of(dirfd) : FILE_TYPES;
}

int fstatat(int dirfd, const char *path, struct stat *st, int flags)
{
	enum file_type type = kvm_path(dirfd, path) ? FILE_KVM : type_at(dirfd, path, flags);

	return type == FILE_TYPES ? REAL(fstatat)(dirfd, path, st, flags) : describe_fd(type, dirfd, st);
}

int stat(const char *path, struct stat *st) { return fstatat(AT_FDCWD, path, st, 0); }
int lstat(const char *path, struct stat *st) { return fstatat(AT_FDCWD, path, st, AT_SYMLINK_NOFOLLOW); }

/* The same structure on x86-64. */
int fstat64(int fd, struct stat64 *st) { return fstat(fd, (struct stat *)st); }
int fstatat64(int dirfd, const char *path, struct stat64 *st, int flags) { return fstatat(dirfd, path, (struct stat *)st, flags); }
int stat64(const char *path, struct stat64 *st) { return stat(path, (struct stat *)st); }
int lstat64(const char *path, struct stat64 *st) { return lstat(path, (struct stat *)st); }

/* What programs built against a C library before 2.33 call; `ver` tells layouts of the structure that x86-64 has one of. */
int __fxstat(int ver, int fd, struct stat *st) { return fstat(fd, st); }
int __xstat(int ver, const char *path, struct stat *st) { return stat(path, st); }
int __lxstat(int ver, const char *path, struct stat *st) { return lstat(path, st); }
int __fxstatat(int ver, int dirfd, const char *path, struct stat *st, int flags) { return fstatat(dirfd, path, st, flags); }
int __fxstat64(int ver, int fd, struct stat64 *st) { return fstat64(fd, st); }
int __xstat64(int ver, const char *path, struct stat64 *st) { return stat64(path, st); }
int __lxstat64(int ver, const char *path, struct stat64 *st) { return lstat64(path, st); }
int __fxstatat64(int ver, int dirfd, const char *path, struct stat64 *st, int flags) { return fstatat64(dirfd, path, st, flags); }

int statx(int dirfd, const char *path, int flags, unsigned mask, struct statx *x)
{
	enum file_type type = kvm_path(dirfd, path) ? FILE_KVM : type_at(dirfd, path, flags);

	if (type == FILE_TYPES)
		return REAL(statx)(dirfd, path, flags, mask, x);
	if (type != FILE_KVM) {
		if (REAL(statx)(dirfd, path, flags, mask, x))
			return -1;
		x->stx_mode = ANON_MODE;
		x->stx_size = x->stx_blocks = 0;
		return 0;
	}
	memset(x, 0, sizeof *x);
	x->stx_mask = STATX_TYPE | STATX_MODE | STATX_NLINK | STATX_UID | STATX_GID | STATX_INO;
	x->stx_blksize = 4096;
	x->stx_nlink = 1;
	x->stx_mode = S_IFCHR | 0666;
	x->stx_ino = KVM_MINOR;
	x->stx_rdev_major = KVM_MAJOR;
	x->stx_rdev_minor = KVM_MINOR;
	return 0;
}

int faccessat(int dirfd, const char *path, int mode, int flags)
{
	if (!kvm_path(dirfd, path))
		return REAL(faccessat)(dirfd, path, mode, flags);
	if (!(mode & X_OK))
		return 0;
	errno = EACCES;
	return -1;
}

int access(const char *path, int mode) { return faccessat(AT_FDCWD, path, mode, 0); }
int euidaccess(const char *path, int mode) { return faccessat(AT_FDCWD, path, mode, AT_EACCESS); }
int eaccess(const char *path, int mode) { return euidaccess(path, mode); }
