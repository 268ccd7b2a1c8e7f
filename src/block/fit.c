/*
 * A fit makes a file of a disk: it stands between a format or filter that wants a file and a node that is none (qcow2, a part of
 * a file, ...). Reads past the end give zeroes, writes there make the disk larger if it can be, and sizes may be set.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "block/graph.h"

enum { FIT_PARTS = 64 };

/* The part of a vector below `there`, and zeroes in the rest. */
static int read_part(struct block *c, uint64_t off, const struct iovec *iov, int n, uint64_t len, uint64_t there)
{
	struct iovec stack[FIT_PARTS], *v = n <= FIT_PARTS ? stack : calloc((size_t)n, sizeof *v);
	if (!v)
		return -ENOMEM;
	int k = iov_slice(v, iov, n, there, len - there);
	iov_zero(v, k);
	k = iov_slice(v, iov, n, 0, there);
	int r = there ? c->drv->read(c, off, v, k, there) : 0;
	if (v != stack)
		free(v);
	return r;
}

static int fit_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct block *c = b->child;
	pthread_rwlock_rdlock(&b->rmw);
	uint64_t size = block_length(c), there = off < size ? MIN(len, size - off) : 0;
	int r = there == len ? c->drv->read(c, off, iov, n, len) : read_part(c, off, iov, n, len, there);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int set_size(struct block *b, uint64_t size)
{
	struct err err = { 0 };
	int r = image_resize(b->child, ALIGN_UP(size, (uint64_t)512), PREALLOC_OFF, &err);
	if (!r)
		__atomic_store_n(&b->length, block_length(b->child), __ATOMIC_RELAXED);
	return r == -ENOTSUP ? -ENOSPC : r;
}

/* Room for [off, off+len); 0 with the lock held for sharing. */
static int enter(struct block *b, uint64_t off, uint64_t len)
{
	int r = 0;
	if (off > INT64_MAX - 512 || len > INT64_MAX - 512 - off)
		return -EFBIG;
	pthread_rwlock_rdlock(&b->rmw);
	while (!r && off + len > block_length(b->child)) {
		pthread_rwlock_unlock(&b->rmw);
		pthread_rwlock_wrlock(&b->rmw); /* alone: nothing is in flight below */
		if (off + len > block_length(b->child))
			r = set_size(b, off + len);
		pthread_rwlock_unlock(&b->rmw);
		pthread_rwlock_rdlock(&b->rmw);
	}
	if (r)
		pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int fit_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	int r = enter(b, off, len);
	if (r)
		return r;
	r = pass_write(b, off, iov, n, len, flags);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int fit_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	int r = enter(b, off, len);
	if (r)
		return r;
	r = pass_zero(b, off, len, flags);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int fit_discard(struct block *b, uint64_t off, uint64_t len)
{
	pthread_rwlock_rdlock(&b->rmw);
	uint64_t size = block_length(b->child), there = off < size ? MIN(len, size - off) : 0;
	int r = there ? pass_discard(b, off, there) : 0;
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int fit_flush(struct block *b)
{
	pthread_rwlock_rdlock(&b->rmw);
	int r = b->child->read_only ? 0 : pass_flush(b);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int fit_truncate(struct block *b, uint64_t len)
{
	pthread_rwlock_wrlock(&b->rmw);
	int r = ALIGN_UP(len, (uint64_t)512) == block_length(b->child) ? 0 : set_size(b, len);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int64_t fit_length(struct block *b)
{
	return (int64_t)block_length(b->child);
}

/* The whole chain below the disk counts as what it holds. */
static int fit_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	uint64_t size = block_length(b->child);
	if (off >= size) {
		*e = (struct block_extent){ .len = len, .present = true, .zero = true };
		return 0;
	}
	int r = image_map(b->child, NULL, off, MIN(len, size - off), e);
	e->present = true;
	e->has_offset = false;
	return r;
}

static const struct block_driver block_fit = {
	.name = "fit", .read = fit_read, .write = fit_write, .flush = fit_flush, .discard = fit_discard, .zero = fit_zero, .fast = pass_fast,
	.map = fit_map, .resize = pass_resize, .file_length = fit_length, .truncate = fit_truncate, .event = pass_event, .filter = true, .compressed = true,
};

/* Filters are files when what they stand on is one. */
static bool is_file(const struct block *b)
{
	while (b->drv->filter && b->child && b->drv != &block_fit)
		b = b->child;
	return b->drv->file_length;
}

int fit_open(struct block **node, struct err *err)
{
	struct block *c = *node, *b;
	if (is_file(c))
		return 0;
	b = block_new(&(struct block_opts){ .file = c->file, .cache = c->cache, .read_only = c->read_only, .discard_unmap = true }, c->loop, c->workers);
	if (!b)
		return err_set(err, -ENOMEM, "%s: out of memory", c->file);
	b->drv = &block_fit;
	b->child = c;
	b->length = c->length;
	b->size = c->size;
	*node = b;
	return 0;
}
