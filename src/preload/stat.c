/* /dev/kvm as the stat and access families see it: a character device that everybody may use. */
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

static bool is_system(int fd)
{
	struct pfile *p = table_maybe(fd) ? table_get_checked(fd) : NULL;
	bool yes = p && p->type == FILE_KVM;

	if (p)
		table_put(p);
	return yes;
}

int fstat(int fd, struct stat *st)
{
	return is_system(fd) ? describe(st), 0 : REAL(fstat)(fd, st);
}

int fstatat(int dirfd, const char *path, struct stat *st, int flags)
{
	if (kvm_path(dirfd, path) || (!*path && flags & AT_EMPTY_PATH && is_system(dirfd)))
		return describe(st), 0;
	return REAL(fstatat)(dirfd, path, st, flags);
}

int stat(const char *path, struct stat *st) { return fstatat(AT_FDCWD, path, st, 0); }
int lstat(const char *path, struct stat *st) { return fstatat(AT_FDCWD, path, st, AT_SYMLINK_NOFOLLOW); }

/* The same structure on x86-64. */
int fstat64(int fd, struct stat64 *st) { return fstat(fd, (struct stat *)st); }
int fstatat64(int dirfd, const char *path, struct stat64 *st, int flags) { return fstatat(dirfd, path, (struct stat *)st, flags); }
int stat64(const char *path, struct stat64 *st) { return stat(path, (struct stat *)st); }
int lstat64(const char *path, struct stat64 *st) { return lstat(path, (struct stat *)st); }

int statx(int dirfd, const char *path, int flags, unsigned mask, struct statx *x)
{
	if (!kvm_path(dirfd, path) && !(!*path && flags & AT_EMPTY_PATH && is_system(dirfd)))
		return REAL(statx)(dirfd, path, flags, mask, x);
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
