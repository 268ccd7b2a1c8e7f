/* raw with offset= and size=: a part of a file or device as a disk (a partition, an image inside another file). */
#include <errno.h>
#include <inttypes.h>

#include "base/util.h"
#include "block/graph.h"

static int window_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	block_event(b->child, EVENT_READ_AIO);
	return b->child->drv->read(b->child, b->base + off, iov, n, len);
}

static int window_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	block_event(b->child, EVENT_WRITE_AIO);
	return b->child->drv->write(b->child, b->base + off, iov, n, len, flags);
}

static int window_flush(struct block *b)
{
	return pass_flush(b);
}

static int window_discard(struct block *b, uint64_t off, uint64_t len)
{
	return b->child->drv->discard ? b->child->drv->discard(b->child, b->base + off, len) : 0;
}

static int window_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	return b->child->drv->zero ? b->child->drv->zero(b->child, b->base + off, len, flags) : -ENOTSUP;
}

static bool window_fast(struct block *b, struct block_req *r)
{
	if (r->op == BLOCK_FLUSH)
		return b->child->drv->fast(b->child, r);
	r->off += b->base;
	bool done = b->child->drv->fast(b->child, r);
	r->off -= b->base;
	return done;
}

static int window_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct block *c = graph_skip_filters(b->child);
	if (c->drv->file_length)
		return c->drv->map(c, b->base + off, len, e);
	int r = image_map(c, NULL, b->base + off, len, e); /* a disk: with all that is below it */
	e->present = e->present && !e->depth;
	e->whole = true;
	return r;
}

static int window_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err)
{
	if (b->fixed)
		return err_set(err, -ENOTSUP, "%s: Cannot resize fixed-size raw disks", b->file);
	if (size > INT64_MAX - b->base)
		return err_set(err, -EFBIG, "%s: Disk size too large for the chosen offset", b->file);
	int r = image_resize(b->child, b->base + size, p, err);
	if (!r)
		__atomic_store_n(&b->length, ALIGN_UP(size, (uint64_t)512), __ATOMIC_RELAXED);
	return r;
}

static const struct block_driver block_window = {
	.name = "raw", .read = window_read, .write = window_write, .flush = window_flush, .discard = window_discard, .zero = window_zero,
	.fast = window_fast, .map = window_map, .resize = window_resize, .event = pass_event,
};

int window_open(struct block *b, const struct block_opts *o, struct err *err)
{
	struct block *c = b->child;
	int64_t real = c->drv->file_length(c);
	uint64_t len = real < 0 ? c->length : (uint64_t)real, at = o->fmt.offset;
	b->drv = &block_window;
	if (at > len)
		return err_set(err, -EINVAL, "%s: Offset (%" PRIu64 ") cannot be greater than size of the containing file (%" PRIu64 ")", b->file, at, len);
	if (o->fmt.has_size && o->fmt.size > len - at)
		return err_set(err, -EINVAL, "%s: The sum of offset (%" PRIu64 ") and size (%" PRIu64 ") has to be smaller or equal to the actual "
			       "size of the containing file (%" PRIu64 ")", b->file, at, o->fmt.size, len);
	b->base = at;
	b->fixed = o->fmt.has_size;
	b->size = c->size;
	b->length = ALIGN_UP(b->fixed ? o->fmt.size : len - at, (uint64_t)512);
	if (b->size > 512 && (at | b->length) % b->size)
		return err_set(err, -EINVAL, "%s: offset and size must be multiples of the device's sectors (%u bytes)", b->file, b->size);
	return 0;
}
