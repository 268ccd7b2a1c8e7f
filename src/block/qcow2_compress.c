/* qcow2: compressed clusters: raw deflate with a 4 KiB window, or a zstd frame. */
#include <errno.h>
#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>

#include "base/log.h"
#include "block/qcow2.h"

static int inflate_zlib(uint8_t *out, size_t out_len, const uint8_t *in, size_t in_len)
{
	z_stream z = { .next_in = (uint8_t *)(uintptr_t)in, .avail_in = (uInt)in_len, .next_out = out, .avail_out = (uInt)out_len };
	if (inflateInit2(&z, -15) != Z_OK)
		return -ENOMEM;
	int r = inflate(&z, Z_FINISH);
	inflateEnd(&z);
	/* Bytes after the cluster's end are somebody else's. */
	return (r == Z_STREAM_END || r == Z_BUF_ERROR || r == Z_OK) && !z.avail_out ? 0 : -EIO;
}

static int inflate_zstd(uint8_t *out, size_t out_len, const uint8_t *in, size_t in_len)
{
	ZSTD_DCtx *d = ZSTD_createDCtx();
	ZSTD_inBuffer ib = { in, in_len, 0 };
	ZSTD_outBuffer ob = { out, out_len, 0 };
	int r = d ? 0 : -ENOMEM;
	while (!r && ob.pos < out_len) {
		size_t before_in = ib.pos, before_out = ob.pos, z = ZSTD_decompressStream(d, &ob, &ib);
		if (ZSTD_isError(z) || (ib.pos == before_in && ob.pos == before_out))
			r = -EIO;
	}
	ZSTD_freeDCtx(d);
	return r;
}

static int inflate_cluster(struct qcow2 *q, uint64_t raw, uint8_t *out)
{
	uint64_t off, len;
	q_compressed_place(q, raw, &off, &len);
	if (len > 2ull * q->cs + 512)
		return -EIO;
	uint8_t *in = malloc(len);
	if (!in)
		return -ENOMEM;
	int r = q_pread(q, off, in, len);
	if (!r)
		r = q->h.compression ? inflate_zstd(out, q->cs, in, len) : inflate_zlib(out, q->cs, in, len);
	free(in);
	if (r == -EIO)
		log_guest("%s: compressed cluster at 0x%llx cannot be decompressed", q->b->file, (unsigned long long)off);
	return r;
}

static void copy_out(const struct iovec *iov, int n, const uint8_t *from)
{
	for (int i = 0; i < n; i++) {
		memcpy(iov[i].iov_base, from, iov[i].iov_len);
		from += iov[i].iov_len;
	}
}

int q_inflate(struct qcow2 *q, uint64_t raw, uint64_t in_cluster, const struct iovec *iov, int n, uint64_t len)
{
	/* Whole clusters in one piece need no copy and no lock. */
	if (len == q->cs && n == 1)
		return inflate_cluster(q, raw, iov[0].iov_base);
	pthread_mutex_lock(&q->comp_lock);
	int r = 0;
	if (!q->comp_buf)
		q->comp_buf = malloc(q->cs);
	if (!q->comp_buf)
		r = -ENOMEM;
	if (!r && q->comp_entry != raw) {
		q->comp_entry = 0;
		r = inflate_cluster(q, raw, q->comp_buf);
		q->comp_entry = r ? 0 : raw;
	}
	if (!r)
		copy_out(iov, n, q->comp_buf + in_cluster);
	pthread_mutex_unlock(&q->comp_lock);
	return r;
}

/* --- writing --- */

/* Compressed size, 0: no gain, -errno. */
static int64_t deflate_cluster(const struct qcow2 *q, uint8_t *out, const uint8_t *in)
{
	if (q->h.compression) {
		size_t z = ZSTD_compress(out, q->cs - 1, in, q->cs, ZSTD_CLEVEL_DEFAULT);
		return ZSTD_isError(z) ? 0 : (int64_t)z;
	}
	z_stream z = { .next_in = (uint8_t *)(uintptr_t)in, .avail_in = q->cs, .next_out = out, .avail_out = q->cs - 1 };
	if (deflateInit2(&z, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) != Z_OK)
		return -ENOMEM;
	int r = deflate(&z, Z_FINISH);
	int64_t len = r == Z_STREAM_END ? (int64_t)(q->cs - 1 - z.avail_out) : 0;
	deflateEnd(&z);
	return len;
}

static int store(struct qcow2 *q, uint64_t off, const uint8_t *data, unsigned len)
{
	unsigned x = 62 - (q->h.cluster_bits - 8);
	uint64_t at = 0;
	struct qentry old;
	pthread_mutex_lock(&q->lock);
	int r = q_alloc_bytes(q, len, &at);
	q->file_clusters = MAX(q->file_clusters, size_to_clusters(q, at + len));
	pthread_mutex_unlock(&q->lock);
	if (r)
		return r;
	r = at >> MIN(x, 56u) ? -EFBIG : q_pwrite(q, at, data, len);
	pthread_mutex_lock(&q->lock);
	if (!r)
		r = q_entry_get(q, off, &old);
	if (!r) {
		uint64_t sectors = ((at + len - 1) >> 9) - (at >> 9);
		struct qentry e = { .raw = OFLAG_COMPRESSED | at | sectors << x, .compressed = true };
		r = q_entry_set(q, off, &e);
	}
	if (!r)
		r = q_entry_release(q, &old);
	else if (!q->broken)
		q_unalloc(q, at, len);
	pthread_mutex_unlock(&q->lock);
	return r;
}

int qcow2_write_compressed(struct block *b, uint64_t off, const void *buf, uint64_t len)
{
	struct qcow2 *q = b->qcow2;
	bool last = off + len == b->length;
	struct qrange range;
	int64_t z = 0;
	if (q->data != q->leaf || off & (q->cs - 1) || len > q->cs || (len < q->cs && !last))
		return -EINVAL;
	uint8_t *in = len < q->cs ? calloc(1, q->cs) : NULL, *out = malloc(q->cs);
	int r = !out || (len < q->cs && !in) ? -ENOMEM : q_start_writing(q);
	if (!r && in)
		memcpy(in, buf, len);
	if (!r)
		z = deflate_cluster(q, out, in ? in : buf);
	if (!r && z < 0)
		r = (int)z;
	if (!r && z) {
		qrange_lock(q, &range, off, len, true);
		r = store(q, off, out, (unsigned)z);
		qrange_unlock(q, &range);
	}
	if (!r && !z)
		r = image_write(b, off, buf, len);
	free(in);
	free(out);
	return r;
}
