/* qcow2: what changes an image's shape: size, preallocation, backing name. */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "block/qcow2.h"

/* --- preallocation --- */

/* How many of the `n` clusters at `off` have no place, from the first on. What was zeroed over a backing file may have ended in one that has. */
static int without_place(struct qcow2 *q, uint64_t off, uint64_t n, uint64_t *got)
{
	struct qentry e;
	int r = 0;
	for (*got = 0; *got < n; ++*got) {
		if (!*got || q->b->backing) {
			r = q_entry_get(q, off + *got * q->cs, &e);
			if (r || e.host || e.compressed || e.alloc)
				break;
		}
	}
	return r;
}

/*
 * Entries for `n` clusters at `host`. Subclusters stay as they are, none of them holds data: a backing file, which an image that is being made does not have
 * open, goes on showing through. But the data file that is to stay valid by itself is what all of them show.
 */
static int preallocate_entries(struct qcow2 *q, uint64_t off, uint64_t host, uint64_t n)
{
	bool through = q->nsub > 1 && !(q->h.autoclear & AUTOCLEAR_DATA_RAW);
	struct qentry e = { 0 };
	int r = 0;
	for (uint64_t i = 0; !r && i < n; i++, off += q->cs, host += q->cs) {
		if (through)
			r = q_entry_get(q, off, &e);
		e = (struct qentry){ .host = host, .copied = true, .alloc = through ? 0 : q->nsub > 1 ? ~0u : 1, .zero = through ? e.zero : 0 };
		if (!r)
			r = q_entry_set(q, off, &e);
	}
	return r;
}

/* Clusters for the part of one L2 table at `off`. Lock held. *end: how far it got. */
static int preallocate_some(struct qcow2 *q, uint64_t off, uint64_t to, uint64_t *end, uint64_t *host, uint64_t *got)
{
	uint64_t span = (uint64_t)q->cs << q->l2_bits, n;
	int r = without_place(q, off, size_to_clusters(q, MIN(to, ALIGN_DOWN(off, span) + span) - off), &n);
	*got = 0;
	*end = off + q->cs;
	if (r || !n)
		return r;
	*host = off;
	*got = n;
	if (q->data == q->leaf) {
		r = q_alloc(q, n, false, host, got);
		if (!r && !q->fresh)
			r = q->leaf->drv->zero(q->leaf, *host, *got * q->cs, 0);
	}
	if (!r)
		r = preallocate_entries(q, off, *host, *got);
	*end = off + *got * q->cs;
	return r;
}

int q_preallocate(struct qcow2 *q, uint64_t from, uint64_t to, enum block_prealloc p)
{
	uint64_t last = 0;
	int r = 0;
	if (p == PREALLOC_OFF)
		return 0;
	for (uint64_t off = ALIGN_DOWN(from, (uint64_t)q->cs), end, host = 0, got; !r && off < to; off = end) {
		pthread_mutex_lock(&q->lock);
		r = preallocate_some(q, off, to, &end, &host, &got);
		pthread_mutex_unlock(&q->lock);
		if (!r && got && p >= PREALLOC_FALLOC && q->data->drv->allocate)
			r = q->data->drv->allocate(q->data, host, got * q->cs, p == PREALLOC_FULL);
		last = MAX(last, host + got * q->cs);
	}
	/* The clusters are there for anybody who looks at the file's size. */
	int64_t len = q->data->drv->file_length(q->data);
	if (!r && len >= 0 && (uint64_t)len < last && q->data == q->leaf)
		r = q->data->drv->truncate(q->data, last);
	return r;
}

/* --- size --- */

static int grow_l1(struct qcow2 *q, uint64_t entries)
{
	uint64_t off, got, old = q->h.l1_off, old_bytes = q->h.l1_size * 8ull, bytes = ALIGN_UP(entries * 8, (uint64_t)q->cs);
	struct qhead h = q->h;
	if (entries <= q->h.l1_size)
		return 0;
	uint8_t *be = calloc(1, bytes);
	uint64_t *l1 = calloc(entries, 8);
	int r = be && l1 ? q_flush_tables(q) : -ENOMEM;
	q_event(q, EVENT_L1_GROW_ALLOC_TABLE);
	if (!r)
		r = q_alloc(q, bytes >> q->h.cluster_bits, true, &off, &got);
	for (uint32_t i = 0; !r && i < q->h.l1_size; i++) {
		l1[i] = q->l1[i];
		put64(be + i * 8, l1[i]);
	}
	if (!r) {
		q_event(q, EVENT_L1_GROW_WRITE_TABLE);
		r = q_pwrite(q, off, be, bytes);
		h.l1_off = off;
		h.l1_size = (uint32_t)entries;
		if (!r)
			r = q_flush_tables(q);
		if (!r)
			r = q_sync(q);
		q_event(q, EVENT_L1_GROW_ACTIVATE_TABLE);
		if (!r)
			r = q_write_head(q, &h);
		if (r)
			q_unalloc(q, off, bytes);
	}
	free(be);
	if (r) {
		free(l1);
		return r;
	}
	q->h = h;
	free(q->l1);
	q->l1 = l1;
	q_meta_build(q);
	return old && old_bytes ? q_dead(q, old, old_bytes) : 0;
}

/* What the guest will see behind the old end must be zeroes, not leftovers or the backing file. */
static int clean_tail(struct qcow2 *q, uint64_t old, uint64_t size)
{
	uint64_t end = MIN(size, ALIGN_UP(old, (uint64_t)q->cs));
	if (q->b->backing && q->b->backing->length > old)
		end = MAX(end, MIN(size, q->b->backing->length));
	uint64_t len = q->b->length;
	__atomic_store_n(&q->b->length, size, __ATOMIC_RELAXED); /* nobody else looks: requests are checked against it before they get here */
	int r = end > old ? q_zero(q, old, end - old, 0) : 0;
	__atomic_store_n(&q->b->length, len, __ATOMIC_RELAXED);
	return r;
}

/* Growing failed, the disk is full perhaps: entries behind the old end must not keep clusters that the file does not reach. */
static void forget_tail(struct qcow2 *q, uint64_t old, uint64_t size)
{
	uint64_t start = ALIGN_UP(old, (uint64_t)q->cs), len = q->b->length;
	if (q->broken || size <= start)
		return;
	__atomic_store_n(&q->b->length, size, __ATOMIC_RELAXED);
	q_discard(q, start, size - start, true);
	__atomic_store_n(&q->b->length, len, __ATOMIC_RELAXED);
}

static int set_size(struct qcow2 *q, uint64_t size)
{
	struct qhead h = q->h;
	h.size = size;
	int r = q_flush(q, true);
	pthread_mutex_lock(&q->lock);
	if (!r)
		r = q_write_head(q, &h);
	if (!r) {
		q->h = h;
		__atomic_store_n(&q->b->length, ALIGN_DOWN(size, (uint64_t)512), __ATOMIC_RELAXED);
	}
	pthread_mutex_unlock(&q->lock);
	return r;
}

int qcow2_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	uint64_t old = b->length, entries;
	if (size % 512)
		return err_set(err, -EINVAL, "The new size must be a multiple of 512");
	entries = q_l1_entries(q, size);
	if (size > (uint64_t)INT64_MAX - q->cs || entries * 8 > L1_BYTES_MAX)
		return err_set(err, -EFBIG, "%s: Image is too big for its cluster size of %u bytes", b->file, q->cs);
	if (size != old && q->nsnaps && q->h.version < 3)
		return err_set(err, -ENOTSUP, "%s: Can't resize a v2 image which has snapshots", b->file);
	if (q->h.autoclear & AUTOCLEAR_DATA_RAW && p == PREALLOC_OFF)
		p = PREALLOC_METADATA; /* the data file stands for itself only where an entry shows each part of it */
	int r = q_start_writing(q);
	if (!r && size != old && (r = q_bitmaps_before_resize(q, size, err)))
		return r;
	if (!r && size < old)
		r = q_discard(q, size, old - size, true);
	pthread_mutex_lock(&q->lock);
	if (!r)
		r = grow_l1(q, entries);
	pthread_mutex_unlock(&q->lock);
	if (!r && q->data != q->leaf)
		r = q->data->drv->resize(q->data, size, PREALLOC_OFF, err);
	if (!r && size > old)
		r = clean_tail(q, old, size);
	if (!r && size > old) {
		uint64_t head = old & (q->cs - 1);
		/* The cluster of the old end gets a place of its own, which would hide what the backing file shows in it. */
		if (p != PREALLOC_OFF && head && b->backing && q->nsub == 1)
			r = q_copy_up(q, old - head, head);
		if (!r)
			r = q_preallocate(q, old, size, p);
		if (r)
			forget_tail(q, old, size);
	}
	if (!r)
		r = set_size(q, size);
	if (!r)
		r = q_bitmaps_resized(q, size);
	return r ? err_set_errno(err, r, "%s: cannot resize", b->file) : 0;
}

/* --- backing file --- */

int qcow2_set_backing(struct block *b, const char *file, const char *format, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	struct qrange all;
	if (file && strlen(file) > 1023)
		return err_set(err, -EINVAL, "%s: Backing file name too long", b->file);
	if (file && q->h.autoclear & AUTOCLEAR_DATA_RAW)
		return err_set(err, -EINVAL, "%s: an image with data_file_raw has no backing file", b->file);
	int r = q_stop(q, &all, err);
	if (!r) {
		char *old = q->backing, *of = q->backing_format;
		q->backing = file ? strdup(file) : NULL;
		q->backing_format = format ? strdup(format) : NULL;
		r = q_set_string_ext(q, EXT_BACKING_FORMAT, file ? format : NULL);
		if (!r)
			r = q_write_header(q, &q->h, false);
		if (r) {
			free(q->backing);
			free(q->backing_format);
			q->backing = old;
			q->backing_format = of;
			q_set_string_ext(q, EXT_BACKING_FORMAT, of);
			r = err_set_errno(err, r, "%s: cannot change the backing file", b->file);
		} else {
			free(old);
			free(of);
		}
	}
	q_go(q, &all);
	return r;
}

int qcow2_make_empty(struct block *b, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	struct qrange all;
	struct qbuild w = { 0 };
	int r = q_start_writing(q);
	if (r)
		return err_set_errno(err, r, "%s", b->file);
	r = q_stop(q, &all, err);
	q_event(q, EVENT_EMPTY_IMAGE_PREPARE);
	if (!r)
		r = qbuild_begin(&w, q, false, err);
	if (!r)
		r = qbuild_add_tree(&w, q->l1, q->h.l1_size, -1, true, err);
	if (!r)
		r = qbuild_add(&w, q->h.l1_off, q->h.l1_size * 8ull, -1, err);
	if (!r)
		r = qbuild_active(&w, q->l1, 0, q->h.l1_size, false, err);
	if (!r)
		r = qbuild_commit(&w, err);
	qbuild_end(&w);
	if (r && q_load_tables(q, NULL))
		q_corrupt(q, "cannot read the tables again");
	q_go(q, &all);
	return r;
}
