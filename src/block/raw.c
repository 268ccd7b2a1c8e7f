/*
 * Raw images: files and block devices.
 *
 * The last sector of a file whose size is no multiple of 512 reads as zeroes past the end, and grows
 * the file when written. With O_DIRECT the kernel wants aligned offsets, lengths and buffers: requests
 * that have them go straight through, others through a bounce buffer, and a write that covers part of
 * a block reads the rest first, alone.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block/driver.h"

enum { BATCH = 256, BOUNCE_MAX = 1 << 20, FAST_MAX = 256 * 1024 };

/* --- plain transfers --- */

/* All of [off, off+len) in system calls of up to BATCH entries. */
static int transfer(struct block *b, bool write, uint64_t off, const struct iovec *iov, int n, uint64_t len, int flags)
{
	struct iovec part[BATCH];
	for (uint64_t done = 0; done < len;) {
		int k = 0;
		uint64_t skip = done, room = 0;
		for (int i = 0; i < n && k < BATCH; i++) {
			if (skip >= iov[i].iov_len) {
				skip -= iov[i].iov_len;
				continue;
			}
			part[k].iov_base = (char *)iov[i].iov_base + skip;
			part[k].iov_len = iov[i].iov_len - skip;
			room += part[k++].iov_len;
			skip = 0;
		}
		if (!k)
			return -EINVAL;
		ssize_t r = write ? pwritev2(b->fd, part, k, (off_t)(off + done), flags) :
				    preadv2(b->fd, part, k, (off_t)(off + done), flags);
		if (r < 0 && errno == EINTR)
			continue;
		if (r < 0)
			return -errno;
		if (!r && write)
			return -EIO;
		if (!r) { /* past the end of the file */
			iov_zero(part, k);
			done += room;
			continue;
		}
		done += (uint64_t)r;
	}
	return 0;
}

/* --- O_DIRECT --- */

static bool is_aligned(const struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	uint64_t bits = off | len;
	for (int i = 0; i < n; i++)
		bits |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
	return !(bits & (b->mem_align - 1));
}

/* One piece of at most BOUNCE_MAX bytes through `buf`, which has room for a block more on both sides. */
static int bounce_piece(struct block *b, bool write, uint64_t off, const struct iovec *iov, int n, uint64_t len,
			uint8_t *buf, int flags)
{
	uint64_t a = b->mem_align, start = ALIGN_DOWN(off, a), end = ALIGN_UP(off + len, a);
	struct iovec whole = { buf, end - start };
	bool partial = start != off || end != off + len;
	int r = 0;
	if (!write || partial)
		r = transfer(b, false, start, &whole, 1, end - start, 0);
	if (r)
		return r;
	iov_copy(iov, n, buf + (off - start), write);
	return write ? transfer(b, true, start, &whole, 1, end - start, flags) : 0;
}

static int bounce(struct block *b, bool write, uint64_t off, const struct iovec *iov, int n, uint64_t len, int flags)
{
	struct iovec *part = calloc((size_t)n, sizeof *part);
	void *buf = NULL;
	int r = posix_memalign(&buf, b->mem_align, MIN(len, (uint64_t)BOUNCE_MAX) + 2 * b->mem_align) || !part ? -ENOMEM : 0;
	for (uint64_t done = 0; !r && done < len;) {
		uint64_t now = MIN(len - done, (uint64_t)BOUNCE_MAX);
		int k = iov_slice(part, iov, n, done, now);
		r = bounce_piece(b, write, off + done, part, k, now, buf, flags);
		done += now;
	}
	free(part);
	free(buf);
	return r;
}

static int direct(struct block *b, bool write, uint64_t off, const struct iovec *iov, int n, uint64_t len, int flags)
{
	bool aligned = is_aligned(b, off, iov, n, len);
	if (!write)
		return aligned ? transfer(b, false, off, iov, n, len, flags) : bounce(b, false, off, iov, n, len, flags);
	bool alone = (off | len) & (b->mem_align - 1);
	if (alone)
		pthread_rwlock_wrlock(&b->rmw);
	else
		pthread_rwlock_rdlock(&b->rmw);
	int r = aligned ? transfer(b, true, off, iov, n, len, flags) : bounce(b, true, off, iov, n, len, flags);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

/* --- the driver --- */

static int raw_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	return b->mem_align ? direct(b, false, off, iov, n, len, 0) : transfer(b, false, off, iov, n, len, 0);
}

int raw_sync_flags(const struct block *b, unsigned flags)
{
	if (b->cache == CACHE_UNSAFE)
		return 0;
	bool through = b->cache == CACHE_WRITETHROUGH || b->cache == CACHE_DIRECTSYNC;
	return through || flags & BLOCK_REQ_FUA ? RWF_DSYNC : 0;
}

static int raw_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	int f = raw_sync_flags(b, flags);
	return b->mem_align ? direct(b, true, off, iov, n, len, f) : transfer(b, true, off, iov, n, len, f);
}

int raw_flush_failed(struct block *b, int r)
{
	if (r == -EINVAL || r == -EROFS)
		return 0; /* a special file without a cache */
	/* The kernel reports a lost write once and forgets it; the guest must not believe the next flush. */
	__atomic_store_n(&b->flush_error, r, __ATOMIC_RELAXED);
	log_error("%s: flush failed: %s; written data may be lost", b->file, strerror(-r));
	return r;
}

static int raw_flush(struct block *b)
{
	if (b->cache == CACHE_UNSAFE || b->read_only)
		return 0;
	int r = __atomic_load_n(&b->flush_error, __ATOMIC_RELAXED);
	if (r)
		return r;
	if (!fdatasync(b->fd))
		return 0;
	return raw_flush_failed(b, -errno);
}

/* --- where the file has data --- */

/*
 * SEEK_HOLE looks at everything up to the next hole, page by page on tmpfs: asking for each piece of a long file again takes the square of its length. A run
 * of data is kept until this node makes holes; that somebody else made one since only means that zeroes are read.
 */
static uint64_t known_data(struct block *b, uint64_t off, unsigned *turn)
{
	pthread_mutex_lock(&b->lock);
	uint64_t end = off >= b->data_from && off < b->data_to ? b->data_to : 0;
	*turn = b->data_turn;
	pthread_mutex_unlock(&b->lock);
	return end;
}

static void keep_data(struct block *b, uint64_t from, uint64_t to, unsigned turn)
{
	pthread_mutex_lock(&b->lock);
	if (turn == b->data_turn) {
		b->data_from = from;
		b->data_to = to;
	}
	pthread_mutex_unlock(&b->lock);
}

/* Called before it happens and after, so that nobody looks in between and is believed. */
static void holes_change(struct block *b)
{
	pthread_mutex_lock(&b->lock);
	b->data_from = b->data_to = 0;
	b->data_turn++;
	pthread_mutex_unlock(&b->lock);
}

static int change_holes(struct block *b, int mode, uint64_t off, uint64_t len)
{
	holes_change(b);
	int r = fallocate(b->fd, mode, (off_t)off, (off_t)len) ? -errno : 0;
	holes_change(b);
	return r;
}

static int punch(struct block *b, uint64_t off, uint64_t len)
{
	if (__atomic_load_n(&b->no_discard, __ATOMIC_RELAXED))
		return -EOPNOTSUPP;
	int r = change_holes(b, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, len);
	if (!r || (r != -EOPNOTSUPP && r != -ENODEV && r != -EINVAL && r != -ENOTTY))
		return r;
	__atomic_store_n(&b->no_discard, true, __ATOMIC_RELAXED);
	return -EOPNOTSUPP;
}

static int raw_discard(struct block *b, uint64_t off, uint64_t len)
{
	uint64_t range[2] = { off, len };
	if (!b->discard_unmap)
		return 0; /* it is a hint */
	if (b->is_dev && ioctl(b->fd, BLKDISCARD, range) && errno != EOPNOTSUPP && errno != EINVAL)
		return -errno;
	int r = b->is_dev ? 0 : punch(b, off, len);
	return r == -EOPNOTSUPP ? 0 : r;
}

static int zero_range(struct block *b, uint64_t off, uint64_t len)
{
	if (__atomic_load_n(&b->no_zero_range, __ATOMIC_RELAXED))
		return -EOPNOTSUPP;
	int mode = FALLOC_FL_ZERO_RANGE | (b->is_dev ? FALLOC_FL_KEEP_SIZE : 0);
	int r = change_holes(b, mode, off, len);
	if (!r || (r != -EOPNOTSUPP && r != -ENODEV && r != -EINVAL && r != -ENOTTY))
		return r;
	__atomic_store_n(&b->no_zero_range, true, __ATOMIC_RELAXED);
	return -EOPNOTSUPP;
}

/* Where that is not possible (tmpfs) a hole that is filled again does the same. What lies past the end is extend()'s. */
static int refill(struct block *b, uint64_t off, uint64_t len)
{
	struct stat st;
	if (b->is_dev || !b->discard_unmap || fstat(b->fd, &st) || range_bad(off, len, (uint64_t)st.st_size))
		return -EOPNOTSUPP;
	int r = punch(b, off, len);
	return r ? r : change_holes(b, 0, off, len);
}

/* Or the file can at least be made longer by zeroes that have their place. */
static int extend(struct block *b, uint64_t off, uint64_t len)
{
	struct stat st;
	if (b->is_dev || fstat(b->fd, &st) || off < (uint64_t)st.st_size)
		return -EOPNOTSUPP;
	if (!fallocate(b->fd, 0, (off_t)off, (off_t)len))
		return 0;
	return errno == ENOSPC || errno == EDQUOT || errno == EIO || errno == EFBIG ? -errno : -EOPNOTSUPP;
}

static int raw_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	int r = -EOPNOTSUPP;
	/* A hole past the end of a ragged file would leave it short; zeroes are what it reads as anyway. */
	if (flags & BLOCK_REQ_MAY_UNMAP && b->discard_unmap)
		r = punch(b, off, len);
	if (r == -EOPNOTSUPP)
		r = zero_range(b, off, len);
	if (r == -EOPNOTSUPP)
		r = refill(b, off, len);
	if (r == -EOPNOTSUPP)
		r = extend(b, off, len);
	if (r == -EOPNOTSUPP)
		return flags & BLOCK_REQ_NO_FALLBACK ? -ENOTSUP : zero_by_writing(b, off, len, flags, raw_write);
	if (!r && raw_sync_flags(b, flags))
		r = fdatasync(b->fd) ? -errno : 0;
	return r;
}

/* What needs a bounce buffer, and what is done in several steps, is for workers. */
static bool raw_submit(struct block *b, struct block_req *r)
{
	if (!b->uring || r->iovcnt > IOV_MAX)
		return false;
	/*
	 * Who polls and has nothing else under way waits best in the system call itself: a stable write or a flush would go from the ring to a thread of the
	 * kernel's, and wait for a processor there.
	 */
	if (b->polled && !(r->flags & BLOCK_REQ_MORE) && !uring_busy(b))
		return false;
	if (r->op == BLOCK_FLUSH)
		return b->cache != CACHE_UNSAFE && !b->read_only && !__atomic_load_n(&b->flush_error, __ATOMIC_RELAXED) && uring_submit(b, r);
	if (r->op != BLOCK_READ && r->op != BLOCK_WRITE)
		return false;
	if (b->mem_align && (!is_aligned(b, r->off, r->iov, r->iovcnt, r->len) || (r->op == BLOCK_WRITE && b->mem_align > 512)))
		return false; /* with large blocks a write takes `rmw` */
	return copy_submit(b, r) || uring_submit(b, r);
}

static int nowait_flags(struct block *b)
{
	return b->in_memory ? 0 : RWF_NOWAIT;
}

/* No waiting, no second try. */
static bool try_transfer(struct block *b, bool write, uint64_t off, const struct iovec *iov, int n, uint64_t len, int flags)
{
	ssize_t done = write ? pwritev2(b->fd, iov, n, (off_t)off, flags) : preadv2(b->fd, iov, n, (off_t)off, flags);
	if (done < 0 && (errno == EOPNOTSUPP || errno == EINVAL))
		__atomic_store_n(&b->no_nowait[write], true, __ATOMIC_RELAXED); /* ext4 reads so, but does not write */
	return done >= 0 && (uint64_t)done == len;
}

bool raw_read_cached(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	return try_transfer(b, false, off, iov, n, len, nowait_flags(b));
}

/* One attempt that does not wait. Partial success counts as none: the worker does the same again. */
static bool raw_fast(struct block *b, struct block_req *r)
{
	bool write = r->op == BLOCK_WRITE;
	if (r->op == BLOCK_FLUSH && b->cache == CACHE_UNSAFE) {
		r->ret = 0;
		return true;
	}
	if ((r->op != BLOCK_READ && !write) || b->mem_align || r->len > FAST_MAX || r->iovcnt > IOV_MAX || copy_has_helper(b, r))
		return false;
	if (write && raw_sync_flags(b, r->flags))
		return false;
	int flags = nowait_flags(b);
	if (flags && __atomic_load_n(&b->no_nowait[write], __ATOMIC_RELAXED)) {
		if (!write)
			return false; /* it may have to come from the disk */
		flags = 0;      /* a copy into the page cache */
	}
	if (!try_transfer(b, write, r->off, r->iov, r->iovcnt, r->len, flags))
		return false;
	r->ret = 0;
	return true;
}

/* Holes and data as the file system tells them; a device is all data. */
static int raw_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct stat st;
	unsigned turn;
	uint64_t known = known_data(b, off, &turn);
	*e = (struct block_extent){ .len = len, .present = true, .data = true, .has_offset = true, .offset = off, .file = b->file };
	if (known)
		e->len = MIN(len, known - off);
	if (known || b->is_dev || fstat(b->fd, &st))
		return 0;
	if (off >= (uint64_t)st.st_size) { /* the rest of a ragged last sector */
		e->zero = true;
		e->data = false;
		return 0;
	}
	off_t data = lseek(b->fd, (off_t)off, SEEK_DATA);
	if (data < 0 && errno != ENXIO)
		return 0;
	if (data < 0)
		data = st.st_size;
	if ((uint64_t)data > off) {
		e->zero = true;
		e->data = false;
		if (data < st.st_size)
			e->len = MIN(len, (uint64_t)data - off);
		return 0;
	}
	off_t hole = lseek(b->fd, (off_t)off, SEEK_HOLE);
	if (hole > (off_t)off) /* a ragged last sector counts as a whole one */
		keep_data(b, off, hole < st.st_size ? (uint64_t)hole : ALIGN_UP((uint64_t)hole, (uint64_t)512), turn);
	if (hole > (off_t)off) /* a format above may ask past the end */
		e->len = MIN(len, (hole < st.st_size ? (uint64_t)hole : ALIGN_UP((uint64_t)hole, (uint64_t)512)) - off);
	return 0;
}

static int64_t raw_file_length(struct block *b)
{
	struct stat st;
	if (b->is_dev)
		return (int64_t)b->length;
	return fstat(b->fd, &st) ? -errno : st.st_size;
}

static int raw_truncate(struct block *b, uint64_t len)
{
	if (b->is_dev)
		return len <= b->length ? 0 : -ENOSPC;
	holes_change(b);
	int r = ftruncate(b->fd, (off_t)len) ? -errno : 0;
	holes_change(b);
	return r;
}

static int raw_allocate(struct block *b, uint64_t off, uint64_t len, bool write)
{
	if (write)
		return zero_by_writing(b, off, len, 0, raw_write);
	int r = len && !b->is_dev ? posix_fallocate(b->fd, (off_t)off, (off_t)len) : 0;
	return -r;
}

/* Past the page cache each small write into a hole is an allocation of its own. Whatever becomes of this, the write tells. */
void raw_reserve(struct block *b, uint64_t off, uint64_t len)
{
	if (b->drv == &block_raw && b->mem_align && !b->is_dev && fallocate(b->fd, 0, (off_t)off, (off_t)len))
		log_debug("%s: fallocate: %s", b->file, strerror(errno));
}

static int raw_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err)
{
	int64_t old = raw_file_length(b);
	if (old < 0)
		return err_set_errno(err, (int)old, "%s", b->file);
	if (p == PREALLOC_METADATA)
		return err_set(err, -ENOTSUP, "Unsupported preallocation mode: metadata");
	if (b->is_dev)
		return size <= b->length ? 0 : err_set(err, -ENOTSUP, "%s: a device cannot grow", b->file);
	int r = raw_truncate(b, size);
	if (!r && size > (uint64_t)old && p >= PREALLOC_FALLOC)
		r = raw_allocate(b, (uint64_t)old, size - (uint64_t)old, p == PREALLOC_FULL);
	if (r) {
		if (ftruncate(b->fd, old))
			log_warn("%s: cannot go back to the old size", b->file);
		return err_set_errno(err, r, "%s: cannot resize", b->file);
	}
	__atomic_store_n(&b->length, ALIGN_UP(size, (uint64_t)512), __ATOMIC_RELAXED);
	return 0;
}

static void raw_close(struct block *b)
{
	copy_close(b);
	uring_close(b);
	if (b->fd >= 0)
		close(b->fd);
}

const struct block_driver block_raw = {
	.name = "raw", .read = raw_read, .write = raw_write, .flush = raw_flush, .discard = raw_discard,
	.zero = raw_zero, .fast = raw_fast, .submit = raw_submit, .poll = uring_wait, .map = raw_map, .resize = raw_resize, .file_length = raw_file_length,
	.truncate = raw_truncate, .allocate = raw_allocate, .close = raw_close,
};

/* --- opening --- */

static int open_error(const char *file, int r, bool write, struct err *err)
{
	if (r == -ENOENT)
		return err_set(err, r, "%s: no such file; create it with 'truncate -s 10G %s'", file, file);
	if (r == -EACCES || r == -EPERM)
		return err_set(err, r, "%s: permission denied%s", file, write ? "; use readonly=on to only read it" : "");
	if (r == -EROFS)
		return err_set(err, r, "%s: read-only file system; use readonly=on or snapshot=on", file);
	if (r == -EINVAL)
		return err_set(err, r, "%s: this file system cannot bypass the page cache; use cache=writeback", file);
	return err_set_errno(err, r, "%s", file);
}

static int file_size(struct block *b, struct err *err)
{
	struct stat st;
	uint64_t size = 0;
	if (fstat(b->fd, &st))
		return err_set_errno(err, -errno, "%s", b->file);
	if (S_ISBLK(st.st_mode)) {
		int sector = 512;
		b->is_dev = true;
		if (ioctl(b->fd, BLKGETSIZE64, &size))
			return err_set_errno(err, -errno, "%s: size of the device", b->file);
		if (!ioctl(b->fd, BLKSSZGET, &sector) && sector == 4096)
			b->size = 4096;
	} else if (S_ISREG(st.st_mode)) {
		size = (uint64_t)st.st_size;
	} else {
		return err_set(err, S_ISDIR(st.st_mode) ? -EISDIR : -EINVAL, "%s: is %s, not a disk image", b->file,
			       S_ISDIR(st.st_mode) ? "a directory" : "no regular file or block device");
	}
	if (size > INT64_MAX - 4096)
		return err_set(err, -EFBIG, "%s: too big", b->file);
	b->ragged = size % 512;
	b->length = ALIGN_UP(size, (uint64_t)512);
	if (b->size > 512)
		b->length = ALIGN_DOWN(b->length, (uint64_t)b->size);
	return 0;
}

/* The smallest alignment that O_DIRECT takes here. */
static int find_alignment(struct block *b, struct err *err)
{
	void *buf;
	if (posix_memalign(&buf, 4096, 4096))
		return err_set(err, -ENOMEM, "%s: out of memory", b->file);
	b->mem_align = 0;
	for (unsigned a = 512; a <= 4096 && !b->mem_align; a *= 2) {
		/* At `a` into the buffer and the file: both must be acceptable. */
		ssize_t n = pread(b->fd, a < 4096 ? (char *)buf + a : buf, a, a < 4096 ? a : 0);
		if (n >= 0)
			b->mem_align = a;
	}
	free(buf);
	return b->mem_align ? 0 : open_error(b->file, -EINVAL, true, err);
}

int raw_open(struct block *b, const struct block_opts *o, struct err *err)
{
	bool write = !o->read_only && !o->snapshot;
	bool bypass = !o->snapshot && (o->cache == CACHE_NONE || o->cache == CACHE_DIRECTSYNC);
	struct statfs fs;
	b->drv = &block_raw;
	b->fd = open(b->file, (write ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | (bypass ? O_DIRECT : 0));
	if (b->fd < 0 && write && o->auto_read_only && (errno == EACCES || errno == EPERM || errno == EROFS)) {
		write = false;
		b->read_only = true;
		b->fd = open(b->file, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | (bypass ? O_DIRECT : 0));
	}
	if (b->fd < 0)
		return open_error(b->file, -errno, write, err);
	int r = file_size(b, err);
	if (!r && bypass)
		r = find_alignment(b, err);
	b->peeks = o->peek && !write && !o->shared && !o->no_lock;
	if (!r && !o->shared && !o->no_lock)
		r = lock_image(b->fd, b->file, write ? IMAGE_WRITE : b->peeks ? IMAGE_PEEK : IMAGE_READ, err);
	if (!r && (b->loop || b->polled) && o->aio != AIO_THREADS) {
		int u = uring_open(b);
		if (u && o->aio == AIO_IO_URING)
			log_warn("%s: aio=io_uring: the kernel refuses (%s); using threads", b->file, strerror(-u));
	}
	if (!r && !b->loop && !b->polled && o->aio > AIO_THREADS)
		log_warn("%s: aio=%s has no effect in this program, which waits for each request in a thread", b->file,
			 o->aio == AIO_NATIVE ? "native" : "io_uring");
	b->in_memory = !fstatfs(b->fd, &fs) && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
	if (!r && b->loop && b->uring && (!b->mem_align || b->in_memory))
		copy_open(b);
	return r;
}
