/*
 * qcow2: compressed clusters: raw deflate (RFC 1951), or a zstd frame.
 *
 * libdeflate does deflate, twice as fast as zlib. It refers back up to 32 KiB, which the specification allows; QEMU's
 * writer stays within 4 KiB. QEMU's reader gives zlib a window of 4 KiB, too, but the whole cluster as output buffer in
 * one call, and zlib then looks back in that buffer: any distance works (tests/block/interchange_test.py). zlib remains
 * for clusters that hold more than they should, where only the beginning counts.
 */
#include <errno.h>
#include <libdeflate.h>
#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>

#include "base/log.h"
#include "block/qcow2.h"

/* --- (de)compressors: big, so kept; as many as threads ever worked at once --- */

/*
 * The lowest level that nowhere leaves more than QEMU's zlib (its default level, within 4 KiB) does by more than 2 %: 0.78 to 1.01 times as much over text,
 * headers, programs, libraries, logs and source archives, at about twice the speed of a thread (docs/block.md). The levels below do not look whether a longer match
 * begins a byte later, which costs up to 8 % on logs and 2 % on small clusters.
 */
enum { DEFLATE_LEVEL = 5 };

static struct libdeflate_compressor *compressor_get(struct qcow2 *q)
{
	struct libdeflate_compressor *c = NULL;
	pthread_mutex_lock(&q->comp_lock);
	if (q->ncompressors)
		c = q->compressors[--q->ncompressors];
	pthread_mutex_unlock(&q->comp_lock);
	return c ? c : libdeflate_alloc_compressor(DEFLATE_LEVEL);
}

static void compressor_put(struct qcow2 *q, struct libdeflate_compressor *c)
{
	pthread_mutex_lock(&q->comp_lock);
	if (q->ncompressors < ARRAY_SIZE(q->compressors)) {
		q->compressors[q->ncompressors++] = c;
		c = NULL;
	}
	pthread_mutex_unlock(&q->comp_lock);
	libdeflate_free_compressor(c);
}

static struct libdeflate_decompressor *decompressor_get(struct qcow2 *q)
{
	struct libdeflate_decompressor *d = __atomic_exchange_n(&q->decompressor, NULL, __ATOMIC_ACQUIRE);
	return d ? d : libdeflate_alloc_decompressor();
}

static void decompressor_put(struct qcow2 *q, struct libdeflate_decompressor *d)
{
	libdeflate_free_decompressor(__atomic_exchange_n(&q->decompressor, d, __ATOMIC_ACQ_REL));
}

void q_free_compressors(struct qcow2 *q)
{
	while (q->ncompressors)
		libdeflate_free_compressor(q->compressors[--q->ncompressors]);
	libdeflate_free_decompressor(q->decompressor);
}

static int inflate_fast(struct qcow2 *q, uint8_t *out, size_t out_len, const uint8_t *in, size_t in_len)
{
	struct libdeflate_decompressor *d = decompressor_get(q);
	if (!d)
		return -ENOMEM;
	/* What follows in the last sector is somebody else's: the input may be longer than the stream. */
	size_t used;
	enum libdeflate_result r = libdeflate_deflate_decompress_ex(d, in, in_len, out, out_len, &used, NULL);
	decompressor_put(q, d);
	return r == LIBDEFLATE_SUCCESS ? 0 : -EIO;
}

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
	if (!r && q->h.compression)
		r = inflate_zstd(out, q->cs, in, len);
	else if (!r && inflate_fast(q, out, q->cs, in, len))
		r = inflate_zlib(out, q->cs, in, len);
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
static int64_t deflate_cluster(struct qcow2 *q, uint8_t *out, const uint8_t *in)
{
	if (q->h.compression) {
		size_t z = ZSTD_compress(out, q->cs - 1, in, q->cs, ZSTD_CLEVEL_DEFAULT);
		return ZSTD_isError(z) ? 0 : (int64_t)z;
	}
	struct libdeflate_compressor *c = compressor_get(q);
	if (!c)
		return -ENOMEM;
	size_t len = libdeflate_deflate_compress(c, in, q->cs, out, q->cs - 1);
	compressor_put(q, c);
	return (int64_t)len;
}

static int store(struct qcow2 *q, uint64_t off, const uint8_t *data, unsigned len)
{
	unsigned x = 62 - (q->h.cluster_bits - 8);
	uint64_t at = 0;
	struct qentry old;
	pthread_mutex_lock(&q->lock);
	int r = q_entry_reserve(q, off); /* first: an L2 table amid the bytes would leave the rest of a cluster unused */
	if (!r)
		r = q_alloc_bytes(q, len, &at);
	q->file_clusters = MAX(q->file_clusters, size_to_clusters(q, at + len));
	pthread_mutex_unlock(&q->lock);
	if (r)
		return r;
	q_event(q, EVENT_WRITE_COMPRESSED);
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
	if (!r)
		q_bitmaps_mark(q, off, len);
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
