/*
 * preallocate: stands between a format and its file. A write that passes the end of the file makes the file longer than it needs, by zeroes that the
 * file system allocates in one piece, and the writes that follow find their place there. What stands above sees the file end where it wrote last; closing
 * cuts off the rest. (After a crash the file keeps it: unused space behind the end of an image, which no format minds.)
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/util.h"
#include "block/graph.h"

/*
 * b->rmw: whoever writes shares it, whoever sets the size is alone. What is preallocated begins where no write that began before can reach:
 * behind the end of every one of them, whether it succeeded or not.
 */
struct preallocate {
	uint64_t align, size;           /* prealloc-align, prealloc-size, bytes */
	pthread_mutex_t lock;           /* the rest */
	uint64_t data_end;              /* the end of the file, for what stands above */
	uint64_t zero_start;            /* zeroes from here to file_end, and no write ever went there */
	uint64_t file_end;              /* of the file below, or of a write that is under way */
	bool off;                       /* the file is only read, or its file system cannot allocate */
};

/* Locked. Where the file shall end so that [.., end) and prealloc-size more have room; 0: nowhere. */
static uint64_t new_end(const struct preallocate *p, uint64_t end)
{
	uint64_t most = INT64_MAX - p->align;
	return end > most || p->size > most - end ? 0 : (end + p->size + p->align - 1) / p->align * p->align;
}

/* Before something is written at [off, end). True: it is zeroes, and they are there. */
static bool make_room(struct block *b, uint64_t off, uint64_t end, bool zeroes)
{
	struct preallocate *p = b->state;
	pthread_mutex_lock(&p->lock);
	uint64_t want = !p->off && end > p->file_end ? new_end(p, end) : 0;
	if (want > p->file_end) {
		int r = pass_zero(b, p->file_end, want - p->file_end, BLOCK_REQ_NO_FALLBACK);
		if (!r)
			p->file_end = want;
		p->off = r == -ENOTSUP;
		if (r)
			log_debug("%s: preallocation: error %d", b->file, -r); /* the write itself may still fit */
	}
	bool done = zeroes && off >= p->zero_start && end <= p->file_end;
	p->data_end = MAX(p->data_end, end);
	p->file_end = MAX(p->file_end, end);
	if (!done)
		p->zero_start = MAX(p->zero_start, end);
	pthread_mutex_unlock(&p->lock);
	return done;
}

static int prealloc_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	if (range_bad(off, len, INT64_MAX))
		return -EFBIG;
	pthread_rwlock_rdlock(&b->rmw);
	make_room(b, off, off + len, false);
	int r = pass_write(b, off, iov, n, len, flags);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int prealloc_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	bool plain = !(flags & ~(unsigned)BLOCK_REQ_NO_FALLBACK) && block_write_cache(b);
	if (range_bad(off, len, INT64_MAX))
		return -EFBIG;
	pthread_rwlock_rdlock(&b->rmw);
	int r = make_room(b, off, off + len, plain) ? 0 : pass_zero(b, off, len, flags);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int64_t prealloc_length(struct block *b)
{
	struct preallocate *p = b->state;
	pthread_mutex_lock(&p->lock);
	int64_t end = (int64_t)p->data_end;
	pthread_mutex_unlock(&p->lock);
	return end;
}

/* Alone. */
static int cut(struct block *b)
{
	struct preallocate *p = b->state;
	int r = p->file_end > p->data_end ? pass_truncate(b, p->data_end) : 0;
	if (!r)
		p->file_end = p->data_end;
	return r;
}

static void size_is(struct preallocate *p, uint64_t size)
{
	pthread_mutex_lock(&p->lock);
	p->data_end = p->zero_start = p->file_end = size;
	pthread_mutex_unlock(&p->lock);
}

static int prealloc_truncate(struct block *b, uint64_t len)
{
	pthread_rwlock_wrlock(&b->rmw);
	int r = cut(b);
	if (!r)
		r = pass_truncate(b, len);
	if (!r)
		size_is(b->state, len);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

/* The file below knows how to grow only from where it really ends. */
static int prealloc_resize(struct block *b, uint64_t size, enum block_prealloc mode, struct err *err)
{
	pthread_rwlock_wrlock(&b->rmw);
	int r = cut(b);
	r = r ? err_set_errno(err, r, "%s: cannot resize", b->file) : pass_resize(b, size, mode, err);
	if (!r)
		size_is(b->state, size);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int prealloc_allocate(struct block *b, uint64_t off, uint64_t len, bool write)
{
	if (range_bad(off, len, INT64_MAX))
		return -EFBIG;
	pthread_rwlock_rdlock(&b->rmw);
	make_room(b, off, off + len, false);
	int r = pass_allocate(b, off, len, write);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static void prealloc_close(struct block *b)
{
	struct preallocate *p = b->state;
	int r = p && b->child ? cut(b) : 0;
	if (r)
		log_warn("%s: the preallocated end of the file stays: error %d", b->file, -r);
	if (p)
		pthread_mutex_destroy(&p->lock);
	free(p);
	b->state = NULL;
}

static const struct block_driver block_preallocate = {
	.name = "preallocate", .read = pass_read, .write = prealloc_write, .zero = prealloc_zero, .discard = pass_discard, .flush = pass_flush, .fast = pass_fast,
	.map = pass_map, .resize = prealloc_resize, .file_length = prealloc_length, .truncate = prealloc_truncate, .allocate = prealloc_allocate,
	.event = pass_event, .filter = true, .close = prealloc_close,
};

int preallocate_open(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	struct preallocate *p = calloc(1, sizeof *p);
	if (!p)
		return err_set(err, -ENOMEM, "out of memory");
	*p = (struct preallocate){ .align = 1 << 20, .size = 128 << 20, .lock = PTHREAD_MUTEX_INITIALIZER, .off = true };
	b->state = p;
	b->drv = &block_preallocate;
	int r = filter_size(n, "prealloc-align", &p->align, err);
	if (!r)
		r = filter_size(n, "prealloc-size", &p->size, err);
	if (!r && (p->align % 512 || p->align > INT64_MAX / 2))
		r = err_set(err, -EINVAL, "prealloc-align parameter of preallocate filter is not aligned to 512 (or is too large): %" PRIu64, p->align);
	if (!r)
		r = filter_open_file(b, n, "file", depth, err);
	if (!r)
		r = fit_open(&b->child, err);
	int64_t size = r ? 0 : pass_file_length(b);
	if (size < 0)
		r = err_set_errno(err, (int)size, "%s", b->child->file);
	if (!r && p->align % b->size)
		r = err_set(err, -EINVAL, "prealloc-align parameter of preallocate filter is not aligned to underlying node request alignment (%u)", b->size);
	p->align = MAX(p->align, 1u); /* 0: not rounded */
	if (!r)
		size_is(p, (uint64_t)size);
	p->off = r || b->read_only;
	return r;
}
