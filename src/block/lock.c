/*
 * Image locking that QEMU, qemu-img and libguestfs respect, and are respected by: open-file-description
 * locks on single bytes of the image (QEMU's documentation of "file.locking"; observed in /proc/locks).
 * A shared lock on byte 100+p says "I use permission p", one on byte 200+p "I cannot have others use
 * p". p is 0 for reading consistent data and 1 for writing. Every user takes its locks first and
 * then looks for a conflict, so of two that start at once at least one notices. Who only looks at a raw image (info, map, compare) forbids
 * nothing, as in QEMU: that has no metadata that could change in between.
 *
 * A user that was killed may hold its locks a moment longer than its process exists: the kernel ends io_uring requests,
 * and with them the open file, in the background. Until then its writes may still arrive, so the locks are right;
 * whoever comes next waits for a moment before calling the image busy.
 */
#include <errno.h>
#include <fcntl.h>
#include <time.h>

#include "block/driver.h"

enum { USE = 100, FORBID = 200, PERM_READ = 0, PERM_WRITE = 1 };
enum { TRIES = 50, TRY_MS = 20 };

static int take(int fd, int byte)
{
	struct flock f = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };
	return fcntl(fd, F_OFD_SETLK, &f) ? -errno : 0;
}

/* Does somebody else hold the byte? */
static bool held(int fd, int byte)
{
	struct flock f = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };
	return !fcntl(fd, F_OFD_GETLK, &f) && f.l_type != F_UNLCK;
}

static int busy(const char *file, const char *what, struct err *err)
{
	return err_set(err, -EAGAIN, "%s: another program %s this image; stop it, or work on a copy", file, what);
}

static int try_lock(int fd, const char *file, enum lock_mode mode, struct err *err)
{
	int r = take(fd, USE + PERM_READ);
	if (!r && mode == IMAGE_WRITE)
		r = take(fd, USE + PERM_WRITE);
	if (!r && mode != IMAGE_PEEK)
		r = take(fd, FORBID + PERM_WRITE);
	if (r == -EINVAL || r == -ENOLCK || r == -EOPNOTSUPP || r == -ENOSYS)
		return 0; /* this file system has none */
	if (r)
		return r == -EAGAIN || r == -EACCES ? busy(file, "has locked", err) :
			err_set_errno(err, r, "%s: cannot lock", file);
	if (mode != IMAGE_PEEK && held(fd, USE + PERM_WRITE))
		return busy(file, "is writing to", err);
	if (held(fd, FORBID + PERM_READ) || (mode == IMAGE_WRITE && held(fd, FORBID + PERM_WRITE)))
		return busy(file, "is using", err);
	return 0;
}

int lock_image(int fd, const char *file, enum lock_mode mode, struct err *err)
{
	for (unsigned i = 0;; i++) {
		int r = try_lock(fd, file, mode, err);

		if (r != -EAGAIN || i == TRIES)
			return r;
		err_clear(err);
		unlock_image(fd);       /* two that wait are not to wait for each other */
		nanosleep(&(struct timespec){ .tv_nsec = TRY_MS * 1000000L }, NULL);
	}
}

void unlock_image(int fd)
{
	struct flock f = { .l_type = F_UNLCK, .l_whence = SEEK_SET, .l_start = USE, .l_len = 200 };
	fcntl(fd, F_OFD_SETLK, &f);
}
