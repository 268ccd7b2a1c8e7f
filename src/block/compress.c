/* driver=compress: everything that is written through it is stored compressed. Clusters are written whole, so part of one is read first. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "block/graph.h"
#include "block/qcow2.h"

/* The part [off, off+len) of one cluster, with what stands around it. */
static int write_cluster(struct block *b, uint8_t *buf, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	uint64_t cs = graph_skip_filters(b->child)->qcow2->cs, start = ALIGN_DOWN(off, cs), whole = MIN(cs, block_length(b->child) - start);
	struct iovec v = { buf, whole };
	bool alone = len < whole;
	if (alone)
		pthread_rwlock_wrlock(&b->rmw);
	else
		pthread_rwlock_rdlock(&b->rmw);
	int r = alone ? pass_read(b, start, &v, 1, whole) : 0;
	iov_copy(iov, n, buf + (off - start), true);
	if (!r)
		r = image_write_compressed(b->child, start, buf, whole);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static int compress_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	uint64_t cs = graph_skip_filters(b->child)->qcow2->cs;
	struct iovec *part = calloc((size_t)n + 1, sizeof *part);
	uint8_t *buf = malloc(cs);
	int r = part && buf ? 0 : -ENOMEM;
	if (!r && range_bad(off, len, block_length(b->child)))
		r = -ENOSPC;
	for (uint64_t done = 0, now; !r && done < len; done += now) {
		now = MIN(len - done, cs - ((off + done) & (cs - 1)));
		int k = iov_slice(part, iov, n, done, now);
		r = write_cluster(b, buf, off + done, part, k, now);
	}
	free(part);
	free(buf);
	bool through = !block_write_cache(b) || flags & BLOCK_REQ_FUA;
	return r || !through || b->cache == CACHE_UNSAFE ? r : pass_flush(b);
}

static const struct block_driver block_compress = {
	PASS_PLACE, .name = "compress", .read = pass_read, .write = compress_write, .zero = pass_zero, .discard = pass_discard, .flush = pass_flush,
	.filter = true, .compressed = true,
};

int compress_open(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	b->drv = &block_compress;
	int r = filter_open_file(b, n, "file", depth, err);
	struct block *image = r ? NULL : graph_skip_filters(b->child);
	if (!r && !image->qcow2)
		r = err_set(err, -ENOTSUP, "compress: Compression is not supported for underlying format: %s", image->drv->name);
	for (struct block *i = b->child; !r && i != image; i = i->child)
		if (!i->drv->compressed)
			r = err_set(err, -ENOTSUP, "compress: Compression is not supported for underlying format: %s", i->drv->name);
	return r;
}
