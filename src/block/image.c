/* What tools do with an image, on top of the drivers' tables. */
#include "block/image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/util.h"
#include "block/graph.h"
#include "block/qcow2.h"

enum { PIECE = 1 << 20 };

/* Requests below 512-byte granularity reach a driver that takes them. */
static bool is_ragged(uint64_t off, uint64_t len)
{
	return (off | len) & 511;
}

/* The sector-aligned hull of a ragged request through a buffer. */
static int ragged(struct block *b, uint64_t off, void *buf, uint64_t len, bool write)
{
	uint64_t start = ALIGN_DOWN(off, (uint64_t)512), end = ALIGN_UP(off + len, (uint64_t)512);
	uint8_t *hull = NULL;
	if (posix_memalign((void **)&hull, 4096, end - start))
		return -ENOMEM;
	struct iovec v = { hull, end - start };
	int r = b->drv->read(b, start, &v, 1, end - start);
	if (!r && !write)
		memcpy(buf, hull + (off - start), len);
	if (!r && write) {
		memcpy(hull + (off - start), buf, len);
		r = b->drv->write(b, start, &v, 1, end - start, 0);
	}
	free(hull);
	return r;
}

static int transfer(struct block *b, uint64_t off, void *buf, uint64_t len, bool write)
{
	if (range_bad(off, len, b->length))
		return -EINVAL;
	if (write && b->read_only)
		return -EPERM;
	int r = 0;
	while (!r && len) {
		uint64_t n = MIN(len, (uint64_t)PIECE * 64);
		struct iovec v = { buf, n };
		if (is_ragged(off, n))
			r = ragged(b, off, buf, n, write);
		else
			r = write ? b->drv->write(b, off, &v, 1, n, 0) : b->drv->read(b, off, &v, 1, n);
		off += n;
		len -= n;
		buf = (char *)buf + n;
	}
	return r;
}

int image_read(struct block *b, uint64_t off, void *buf, uint64_t len)
{
	return transfer(b, off, buf, len, false);
}

int image_write(struct block *b, uint64_t off, const void *buf, uint64_t len)
{
	return transfer(b, off, (void *)(uintptr_t)buf, len, true);
}

static int zero_with(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	static const uint8_t zeroes[512];
	if (range_bad(off, len, b->length))
		return -EINVAL;
	if (b->read_only)
		return -EPERM;
	int r = 0;
	uint64_t head = MIN(len, -off & 511), tail;
	if (head)
		r = image_write(b, off, zeroes, head);
	off += head;
	len -= head;
	tail = len & 511;
	len -= tail;
	if (!r && len)
		r = b->drv->zero(b, off, len, flags);
	if (!r && tail)
		r = image_write(b, off + len, zeroes, tail);
	return r;
}

int image_zero(struct block *b, uint64_t off, uint64_t len, bool may_unmap)
{
	return zero_with(b, off, len, may_unmap ? BLOCK_REQ_MAY_UNMAP : 0);
}

int image_zero_own(struct block *b, uint64_t off, uint64_t len)
{
	return zero_with(b, off, len, BLOCK_REQ_OWN);
}

int image_zero_quick(struct block *b, uint64_t off, uint64_t len, bool may_unmap)
{
	if (range_bad(off, len, b->length))
		return -EINVAL;
	if (b->read_only)
		return -EPERM;
	if ((off | len) & 511)
		return -ENOTSUP;
	return len ? b->drv->zero(b, off, len, BLOCK_REQ_NO_FALLBACK | (may_unmap ? BLOCK_REQ_MAY_UNMAP : 0)) : 0;
}

int image_discard(struct block *b, uint64_t off, uint64_t len)
{
	if (range_bad(off, len, b->length))
		return -EINVAL;
	if (b->read_only)
		return -EPERM;
	uint64_t start = ALIGN_UP(off, (uint64_t)512), end = ALIGN_DOWN(off + len, (uint64_t)512);
	return start < end ? b->drv->discard(b, start, end - start) : 0;
}

int image_flush(struct block *b)
{
	return b->drv->flush(b);
}

int image_write_compressed(struct block *b, uint64_t off, const void *buf, uint64_t len)
{
	if (range_bad(off, len, b->length))
		return -EINVAL;
	if (b->read_only)
		return -EPERM;
	while (b->drv->filter && b->drv->compressed && b->child)
		b = b->child;
	return b->qcow2 && b->qcow2->data == b->qcow2->leaf ? qcow2_write_compressed(b, off, buf, len) : -ENOTSUP;
}

static int map_one(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	*e = (struct block_extent){ .len = len, .present = true, .data = true };
	return b->drv->map ? b->drv->map(b, off, len, e) : 0;
}

int image_map(struct block *b, struct block *base, uint64_t off, uint64_t len, struct block_extent *e)
{
	unsigned depth = 0;
	if (!len || range_bad(off, len, b->length))
		return -EINVAL;
	base = graph_skip_filters(base);
	for (;; depth++) {
		b = graph_skip_filters(b);
		int r = map_one(b, off, len, e);
		e->depth = depth;
		if (r || e->present || e->whole)
			return r;
		struct block *next = image_backing(b);
		len = e->len;
		if (!next || graph_skip_filters(next) == base) {
			e->zero = !next;
			return 0;
		}
		if (off >= next->length) { /* a short backing file: zeroes, and the file above decides that */
			e->zero = e->short_backing = true;
			return 0;
		}
		len = MIN(len, next->length - off);
		b = next;
	}
}

static int copy_bytes(int from, uint64_t off, int to, uint64_t to_off, uint64_t len)
{
	while (len) {
		loff_t a = (loff_t)off, b = (loff_t)to_off;
		ssize_t n = copy_file_range(from, &a, to, &b, len, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -ENOTSUP;
		off += (uint64_t)n;
		to_off += (uint64_t)n;
		len -= (uint64_t)n;
	}
	return 0;
}

int image_copy_range(struct block *from, uint64_t off, struct block *to, uint64_t to_off, uint64_t len, bool blank)
{
	int r = to->drv == &block_raw && to->fd >= 0 && !to->mem_align ? 0 : -ENOTSUP;
	for (uint64_t done = 0; !r && done < len;) {
		struct block_extent e;
		struct block *b = from;
		r = image_map(from, NULL, off + done, len - done, &e);
		for (unsigned i = 0; !r && b && i < e.depth; i++)
			b = image_backing(b);
		if (r)
			return r;
		while (b && b->child && !b->drv->filter) /* filters want to see what is read */
			b = b->qcow2 ? b->qcow2->data : b->child;
		if (e.zero)
			r = blank ? 0 : image_zero(to, to_off + done, e.len, true);
		else if (!b || b->drv != &block_raw || !e.has_offset || e.compressed)
			r = -ENOTSUP;
		else
			r = copy_bytes(b->fd, e.offset, to->fd, to_off + done, e.len);
		done += e.len;
	}
	return r;
}

struct block *image_backing(struct block *b)
{
	b = graph_skip_filters(b->overlay ? b->child : b);
	return b->backing;
}

const char *image_format(const struct block *b)
{
	return b->overlay ? b->child->drv->name : b->drv->name;
}

const char *image_driver(const struct block *b)
{
	return b->bare ? b->bare : image_format(b);
}

int64_t image_disk_size(struct block *b)
{
	struct stat st;
	int64_t sum = 0, more;
	for (; b->child; b = b->child) {
		for (unsigned i = 0; i < b->nmore; i++) {
			more = image_disk_size(b->more[i]);
			if (more < 0)
				return more;
			sum += more;
		}
	}
	if (b->drv->file_length && b->fd < 0 && !b->nbd)
		return sum; /* null-co */
	return fstat(b->fd, &st) ? -errno : sum + (int64_t)st.st_blocks * 512;
}

int image_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err)
{
	if (b->read_only)
		return err_set(err, -EPERM, "%s: is read-only", b->file);
	if (!b->drv->resize)
		return err_set(err, -ENOTSUP, "%s: cannot be resized", b->file);
	return b->drv->resize(b, size, p, err);
}

/* --- qcow2 only --- */

static void keep_cluster_size(struct image_info *i)
{
	uint32_t size = i->cluster_size;
	image_info_free(i);
	i->cluster_size = size;
}

int image_info(struct block *b, struct image_info *i)
{
	*i = (struct image_info){ 0 };
	if (b->drv->filter && b->child) { /* that much of what it shows */
		if (!image_info(graph_skip_filters(b), i))
			keep_cluster_size(i);
		return -ENOTSUP;
	}
	if (b->foreign)
		foreign_info(b, i);
	return b->qcow2 ? qcow2_info(b, i) : b->foreign ? 0 : -ENOTSUP;
}

void image_info_free(struct image_info *i)
{
	free(i->snapshots);
	free(i->bitmaps);
	*i = (struct image_info){ 0 };
}

static int need_qcow2(struct block *b, bool write, const char *what, struct err *err)
{
	if (!b->qcow2)
		return err_set(err, -ENOTSUP, "%s: %s images have no %s", b->file, b->drv->name, what);
	if (write && b->read_only)
		return err_set(err, -EPERM, "%s: is read-only", b->file);
	return 0;
}

int image_snapshot_create(struct block *b, const char *name, struct err *err)
{
	int r = need_qcow2(b, true, "snapshots", err);
	return r ? r : qcow2_snapshot_create(b, name, err);
}

int image_snapshot_apply(struct block *b, const char *id_or_name, struct err *err)
{
	int r = need_qcow2(b, true, "snapshots", err);
	return r ? r : qcow2_snapshot_apply(b, id_or_name, err);
}

int image_snapshot_delete(struct block *b, const char *name, struct err *err)
{
	int r = need_qcow2(b, true, "snapshots", err);
	return r ? r : qcow2_snapshot_delete(b, name, err);
}

int image_set_backing(struct block *b, const char *file, const char *format, struct err *err)
{
	int r = need_qcow2(b, true, "backing file", err);
	return r ? r : qcow2_set_backing(b, file, format, err);
}

int image_check(struct block *b, unsigned fix, struct image_check *c, struct err *err)
{
	if (b->foreign)
		return foreign_check(b, c, err);
	int r = need_qcow2(b, fix, "metadata to check", err);
	return r ? r : qcow2_check(b, fix, c, err);
}

int image_bitmap_change(struct block *b, enum image_bitmap_op op, const char *name, const struct image_bitmap_arg *a, struct err *err)
{
	static const struct image_bitmap_arg none;
	int r = need_qcow2(b, true, "persistent bitmaps", err);
	if (!r && a && a->source && !a->source->qcow2)
		r = need_qcow2(a->source, false, "persistent bitmaps", err);
	return r ? r : qcow2_bitmap(b, op, name, a ? a : &none, err);
}

int image_amend(struct block *b, const struct image_amend *a, struct err *err)
{
	int r = need_qcow2(b, true, "options to amend", err);
	return r ? r : qcow2_amend(b, a, err);
}

int image_make_empty(struct block *b, struct err *err)
{
	int r = need_qcow2(b, true, "backing file", err);
	return r ? r : qcow2_make_empty(b, err);
}

int image_bitmap_read(struct block *b, const char *name, struct image_bits *out, struct err *err)
{
	for (struct block *n = b; n; n = image_backing(n)) {
		struct err e = { 0 };
		int r = n->qcow2 ? qcow2_bitmap_read(n, name, out, &e) : -ENOENT;
		if (r != -ENOENT)
			return r ? err_set(err, r, "%s", e.msg) : 0;
	}
	return err_set(err, -ENOENT, "Bitmap '%s' is not found", name);
}

void image_bits_extent(const struct image_bits *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	uint64_t i = off >> b->gran_bits, last = (off + len - 1) >> b->gran_bits;
	bool set = i < b->nbits && __atomic_load_n(&b->bits[i / 64], __ATOMIC_RELAXED) >> (i % 64) & 1;
	while (++i <= last && (i < b->nbits && __atomic_load_n(&b->bits[i / 64], __ATOMIC_RELAXED) >> (i % 64) & 1) == set)
		;
	*e = (struct block_extent){ .len = MIN(len, (i << b->gran_bits) - off), .data = set };
}

int image_bitmap_extent(struct block *live, const char *name, uint64_t off, uint64_t len, struct block_extent *e)
{
	return qcow2_bitmap_extent(live, name, off, len, e);
}
