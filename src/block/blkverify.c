/*
 * blkverify: each write goes to a raw file and to the disk under test, each read asks both, and where they differ the disk under
 * test, or its format, is wrong: the read fails, and the log says where. (QEMU's ends the program there.)
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "block/graph.h"

static struct block *test_of(struct block *b)
{
	return b->more[0];
}

static int mismatch(struct block *b, const char *what, uint64_t off, uint64_t len, uint64_t at)
{
	log_error("blkverify: %s offset=%llu bytes=%llu contents mismatch at offset %llu (%s)", what, (unsigned long long)off, (unsigned long long)len,
		  (unsigned long long)at, b->file);
	return -EIO;
}

/* Both must end alike. */
static int same_end(struct block *b, const char *what, uint64_t off, uint64_t len, int raw, int test)
{
	if (raw == test)
		return raw;
	log_error("blkverify: %s offset=%llu bytes=%llu return value mismatch %d != %d (%s)", what, (unsigned long long)off, (unsigned long long)len, test, raw, b->file);
	return test ? test : raw;
}

static int compare(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	uint8_t *buf = malloc(len), *p = buf;
	struct iovec v = { buf, len };
	int r = buf ? 0 : -ENOMEM;
	if (!r)
		r = same_end(b, "read", off, len, b->child->drv->read(b->child, off, &v, 1, len), test_of(b)->drv->read(test_of(b), off, iov, n, len));
	for (int i = 0; !r && i < n; p += iov[i++].iov_len) {
		const uint8_t *q = iov[i].iov_base;
		for (size_t k = 0; !r && memcmp(p, q, iov[i].iov_len) && k < iov[i].iov_len; k++)
			if (p[k] != q[k])
				r = mismatch(b, "read", off, len, off + (uint64_t)(p - buf) + k);
	}
	free(buf);
	return r;
}

/* Not beside a write: the two are not written at one moment. */
static int verify_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	pthread_rwlock_rdlock(&b->rmw);
	int r = compare(b, off, iov, n, len);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

/* And not beside another write: who is last must be so in both. */
static int verify_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	pthread_rwlock_wrlock(&b->rmw);
	int r = same_end(b, "write", off, len, pass_write(b, off, iov, n, len, flags), test_of(b)->drv->write(test_of(b), off, iov, n, len, flags));
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int verify_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	return flags & BLOCK_REQ_NO_FALLBACK ? -ENOTSUP : zero_by_writing(b, off, len, flags, verify_write);
}

/* A hint that the two need not take alike. */
static int verify_discard(struct block *b, uint64_t off, uint64_t len)
{
	return 0;
}

/* The raw file is of no worth after a crash. */
static int verify_flush(struct block *b)
{
	return b->read_only ? 0 : test_of(b)->drv->flush(test_of(b));
}

static int64_t verify_length(struct block *b)
{
	return (int64_t)b->length;
}

static int verify_truncate(struct block *b, uint64_t len)
{
	return len <= b->length ? 0 : -ENOSPC;
}

static const struct block_driver block_blkverify = {
	.name = "blkverify", .read = verify_read, .write = verify_write, .zero = verify_zero, .discard = verify_discard, .flush = verify_flush,
	.fast = pass_fast, .map = pass_map, .file_length = verify_length, .truncate = verify_truncate, .filter = true,
};

int blkverify_open(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	const char *image = keyvals_get(&n->all, "x-image");
	struct block *test = NULL;
	b->drv = &block_blkverify;
	int r = filter_open_child(&b->child, b, n, &(struct filter_child){ .key = "raw" }, depth, err);
	if (!r)
		r = fit_open(&b->child, err);
	if (!r)
		r = filter_open_child(&test, b, n, &(struct filter_child){ .key = "test", .disk = true, .name = image }, depth, err);
	if (!r && filter_add_child(b, test))
		r = err_set(err, -ENOMEM, "out of memory");
	if (r)
		return r;
	b->length = test->length;
	b->size = MAX(test->size, b->child->size);
	b->read_only = n->o.read_only || n->o.snapshot || test->read_only || b->child->read_only;
	return 0;
}
