/* QEMU's null-co and null-aio: a disk of any size that keeps nothing and reads as zeroes, for measuring what is above it. */
#include <errno.h>
#include <time.h>

#include "base/util.h"
#include "block/driver.h"

static int null_wait(struct block *b)
{
	struct timespec t = { (time_t)(b->latency / 1000000000), (long)(b->latency % 1000000000) };
	while (b->latency && nanosleep(&t, &t) && errno == EINTR)
		;
	return 0;
}

/* QEMU leaves the buffer as it is without read-zeroes=on; what was in it before is nobody's business. */
static int null_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	iov_zero(iov, n);
	return null_wait(b);
}

static int null_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	return null_wait(b);
}

static int null_discard(struct block *b, uint64_t off, uint64_t len)
{
	return null_wait(b);
}

static int null_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	return null_wait(b);
}

static bool null_fast(struct block *b, struct block_req *r)
{
	if (b->latency)
		return false;
	if (r->op == BLOCK_READ)
		iov_zero(r->iov, r->iovcnt);
	r->ret = 0;
	return true;
}

/* No data anywhere, and zeroes for who asked for them: as QEMU says it. */
static int null_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	*e = (struct block_extent){ .len = len, .present = b->null_zeroes, .zero = b->null_zeroes, .has_offset = true, .offset = off, .file = b->file };
	return 0;
}

static int null_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err)
{
	return err_set(err, -ENOTSUP, "%s: Image format driver does not support resize", b->file);
}

static int64_t null_length(struct block *b)
{
	return (int64_t)b->length;
}

static int null_truncate(struct block *b, uint64_t len)
{
	return len <= b->length ? 0 : -ENOSPC;
}

static const struct block_driver block_null = {
	.name = "raw", .read = null_read, .write = null_write, .flush = null_wait, .discard = null_discard, .zero = null_zero, .fast = null_fast,
	.map = null_map, .resize = null_resize, .file_length = null_length, .truncate = null_truncate,
};

int null_open(struct block *b, const struct block_opts *o, struct err *err)
{
	b->drv = &block_null;
	b->length = ALIGN_UP(o->null.size, (uint64_t)512);
	b->latency = o->null.latency;
	b->null_zeroes = o->null.zeroes;
	return 0;
}
