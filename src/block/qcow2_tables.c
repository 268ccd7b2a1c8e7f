/*
 * qcow2: changes that cannot be made entry by entry (R5). The new reference counts are worked out in
 * memory, new tables go to clusters that nothing uses, and when all of it is stable one write of the
 * header's first sector makes it the image. Before that write the old image is untouched.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "block/qcow2.h"

#define CLUSTERS_MAX (1ull << 30)       /* 4 GiB of counts */

int q_stop(struct qcow2 *q, struct qrange *all, struct err *err)
{
	qrange_lock(q, all, 0, UINT64_MAX, true);
	int r = q_flush(q, true);
	if (!r)
		r = q_flush(q, true); /* the counts of what the first one buried */
	pthread_mutex_lock(&q->flush_lock);
	pthread_mutex_lock(&q->lock);
	return r ? err_set_errno(err, r, "%s: cannot write", q->b->file) : 0;
}

void q_go(struct qcow2 *q, struct qrange *all)
{
	pthread_mutex_unlock(&q->lock);
	pthread_mutex_unlock(&q->flush_lock);
	qrange_unlock(q, all);
}

static int grow(struct qbuild *w, uint64_t n, struct err *err)
{
	if (n > CLUSTERS_MAX)
		return err_set(err, -EFBIG, "%s: too many clusters (%llu)", w->q->b->file, (unsigned long long)n);
	if (n > w->room) {
		uint64_t room = MIN(n + n / 8 + 4096, CLUSTERS_MAX);
		bool first = !w->room; /* fresh pages take no memory until they are used */
		uint32_t *refs = first ? calloc(room, sizeof *refs) : realloc(w->refs, room * sizeof *refs);
		if (refs)
			w->refs = refs;
		uint8_t *taken = !refs ? NULL : first ? calloc(room, 1) : realloc(w->taken, room);
		if (taken)
			w->taken = taken;
		if (!refs || !taken)
			return err_set(err, -ENOMEM, "%s: out of memory", w->q->b->file);
		if (!first) {
			memset(refs + w->room, 0, (room - w->room) * sizeof *refs);
			memset(taken + w->room, 0, room - w->room);
		}
		w->room = room;
	}
	w->n = MAX(w->n, n);
	return 0;
}

static int load_block(struct qbuild *w, uint32_t i, struct err *err)
{
	struct qcow2 *q = w->q;
	uint64_t per = BIT(q->ref_per_block_bits), base = i * per;
	int r = 0;
	if (!q_is_aligned(q, q->reftable[i]))
		return err_set(err, -EIO, "%s: refcount block %u is not aligned", q->b->file, i);
	struct qtable *t = q_table(q, &q->refs, q->reftable[i], false, &r);
	if (!t)
		return err_set_errno(err, r, "%s: refcount block", q->b->file);
	for (uint64_t k = 0; k < per; k++) {
		uint64_t v = ref_get(q, t->data, k);
		if (!v)
			continue;
		r = grow(w, base + k + 1, err);
		if (r)
			return r;
		if (v >= UINT32_MAX)
			return err_set(err, -EINVAL, "%s: refcount of cluster %llu is too big", q->b->file, (unsigned long long)(base + k));
		w->refs[base + k] = (uint32_t)v;
		w->taken[base + k] = 1;
	}
	return 0;
}

int qbuild_begin(struct qbuild *w, struct qcow2 *q, bool empty, struct err *err)
{
	int64_t len = q->leaf->drv->file_length(q->leaf);
	*w = (struct qbuild){ .q = q, .h = q->h, .old_uncounted = empty, .next = 1 };
	int r = len < 0 ? err_set_errno(err, (int)len, "%s", q->b->file) : 0;
	/* The size of a device, or an export, says nothing about where the image ends: counts do, unless they are what is in doubt. */
	uint64_t n = r ? 0 : !q->leaf->is_dev ? size_to_clusters(q, (uint64_t)len) : empty ? (uint64_t)len >> q->h.cluster_bits : 1;
	if (!r)
		r = grow(w, n + 1, err);
	if (!r)
		w->n = n;
	for (uint32_t i = 0; !r && !empty && i < q->reftable_size; i++)
		if (q->reftable[i])
			r = load_block(w, i, err);
	if (r)
		qbuild_end(w);
	return r;
}

void qbuild_end(struct qbuild *w)
{
	free(w->refs);
	free(w->taken);
	w->refs = NULL;
	w->taken = NULL;
}

int qbuild_add(struct qbuild *w, uint64_t off, uint64_t bytes, int d, struct err *err)
{
	uint64_t first = off >> w->q->h.cluster_bits, end = bytes ? ((off + bytes - 1) >> w->q->h.cluster_bits) + 1 : first;
	if (end > w->n || end < first)
		return err_set(err, -EINVAL, "%s: 0x%llx is behind the end of the file", w->q->b->file, (unsigned long long)off);
	for (uint64_t c = first; c < end; c++) {
		if (d < 0 && !w->refs[c])
			return err_set(err, -EIO, "%s: cluster %llu is used but not counted; run check -r all", w->q->b->file,
				       (unsigned long long)c);
		if (d > 0 && w->refs[c] == UINT32_MAX)
			return err_set(err, -EINVAL, "%s: too many references", w->q->b->file);
		w->refs[c] += (uint32_t)d;
		if (d > 0)
			w->taken[c] = 1;
	}
	return 0;
}

/* Clusters behind the known end are free. */
int qbuild_alloc(struct qbuild *w, uint64_t n, uint64_t *off, struct err *err)
{
	uint64_t run = 0, c = w->next;
	for (; run < n; c++) {
		bool used = c < w->n && (w->taken[c] || w->refs[c]);
		run = used ? 0 : run + 1;
	}
	int r = grow(w, c, err);
	if (r)
		return r;
	for (uint64_t i = c - n; i < c; i++) {
		w->refs[i] = 1;
		w->taken[i] = 1;
	}
	if (n == 1)
		w->next = c;
	*off = (c - n) << w->q->h.cluster_bits;
	return 0;
}

int qbuild_put(struct qbuild *w, const void *buf, uint64_t bytes, uint64_t *off, struct err *err)
{
	struct qcow2 *q = w->q;
	uint64_t n = size_to_clusters(q, bytes);
	*off = 0;
	if (!n) /* the table of a disk of size 0: nobody would count its cluster */
		return 0;
	int r = qbuild_alloc(w, n, off, err);
	if (r)
		return r;
	uint64_t tail = n * q->cs - bytes;
	uint8_t *zero = tail ? calloc(1, tail) : NULL;
	r = tail && !zero ? -ENOMEM : q_pwrite(q, *off, buf, bytes);
	if (!r && tail)
		r = q_pwrite(q, *off + bytes, zero, tail);
	free(zero);
	return r ? err_set_errno(err, r, "%s: cannot write", q->b->file) : 0;
}

/* An L2 table into `buf`, through the cache when it is there. */
int qbuild_read_l2(struct qcow2 *q, uint64_t off, uint8_t *buf, struct err *err)
{
	if (!q_is_aligned(q, off))
		return err_set(err, -EIO, "%s: L2 table offset 0x%llx is not aligned", q->b->file, (unsigned long long)off);
	struct qtable *t = q_table_peek(&q->l2, off);
	int r = 0;
	if (t)
		memcpy(buf, t->data, q->cs);
	else
		r = q_pread(q, off, buf, q->cs);
	return r ? err_set_errno(err, r, "%s: L2 table", q->b->file) : 0;
}

static int add_l2(struct qbuild *w, const uint8_t *l2, int d, struct err *err)
{
	struct qcow2 *q = w->q;
	int r = 0;
	for (unsigned i = 0; !r && i < BIT(q->l2_bits); i++) {
		uint64_t off, len = q->cs;
		struct qentry e;
		qentry_decode(q, l2 + i * q->entry_size, &e);
		off = e.host;
		if (e.compressed)
			q_compressed_place(q, e.raw, &off, &len);
		else if (q->data != q->leaf)
			continue;
		if (off)
			r = qbuild_add(w, off, len, d, err);
	}
	return r;
}

int qbuild_add_tree(struct qbuild *w, const uint64_t *l1, uint32_t n, int d, bool tables, struct err *err)
{
	struct qcow2 *q = w->q;
	uint8_t *l2 = malloc(q->cs);
	int r = l2 ? 0 : err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
	for (uint32_t i = 0; !r && i < n; i++) {
		uint64_t off = l1[i] & OFFSET_MASK;
		if (!off)
			continue;
		r = qbuild_read_l2(q, off, l2, err);
		if (!r)
			r = add_l2(w, l2, d, err);
		if (!r && tables)
			r = qbuild_add(w, off, q->cs, d, err);
	}
	free(l2);
	return r;
}

/* COPIED as the counts say; true when something changed. */
static bool set_copied(struct qbuild *w, uint8_t *l2)
{
	struct qcow2 *q = w->q;
	bool changed = false;
	for (unsigned i = 0; i < BIT(q->l2_bits); i++) {
		uint8_t *p = l2 + i * q->entry_size;
		uint64_t v = be64(p), off = v & OFFSET_MASK, c = off >> q->h.cluster_bits, want = v & ~OFLAG_COPIED;
		if (q->data != q->leaf)
			continue;
		if (!(v & OFLAG_COMPRESSED) && off && c < w->n && w->refs[c] == 1)
			want |= OFLAG_COPIED;
		if (want != v) {
			put64(p, want);
			changed = true;
		}
	}
	return changed;
}

int qbuild_active(struct qbuild *w, const uint64_t *l1, uint32_t n, uint32_t size, bool ours, struct err *err)
{
	struct qcow2 *q = w->q;
	uint8_t *l2 = malloc(q->cs);
	uint64_t *new = calloc(MAX(size, 1u), 8);
	int r = l2 && new ? 0 : err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
	for (uint32_t i = 0; !r && i < MIN(n, size); i++) {
		uint64_t off = l1[i] & OFFSET_MASK;
		if (!off)
			continue;
		r = qbuild_read_l2(q, off, l2, err);
		if (r)
			break;
		bool changed = set_copied(w, l2), mine = ours && w->refs[off >> q->h.cluster_bits] == 1;
		if (changed || !mine) {
			if (ours)
				r = qbuild_add(w, off, q->cs, -1, err);
			if (!r)
				r = qbuild_put(w, l2, q->cs, &off, err);
		}
		put64(&new[i], off | OFLAG_COPIED);
	}
	if (!r)
		r = qbuild_put(w, new, size * 8ull, &w->h.l1_off, err);
	w->h.l1_size = size;
	free(l2);
	free(new);
	return r;
}

/* --- the refcount structure --- */

struct newrefs { uint64_t *blocks, nblocks, table_off, table_clusters; };

static bool range_used(const struct qbuild *w, uint64_t i, uint64_t per)
{
	for (uint64_t c = i * per; c < MIN(w->n, (i + 1) * per); c++)
		if (w->refs[c])
			return true;
	return false;
}

/* A block for every range in use, and a table for them; their own clusters may need more. */
static int place_refs(struct qbuild *w, struct newrefs *nr, unsigned per_bits, struct err *err)
{
	uint64_t per = BIT(per_bits);
	for (bool again = true; again;) {
		again = false;
		uint64_t n = (w->n + per - 1) / per;
		if (n > nr->nblocks) {
			uint64_t *b = realloc(nr->blocks, n * sizeof *b);
			if (!b)
				return err_set(err, -ENOMEM, "out of memory");
			memset(b + nr->nblocks, 0, (n - nr->nblocks) * sizeof *b);
			nr->blocks = b;
			nr->nblocks = n;
		}
		for (uint64_t i = 0; i < n; i++) {
			if (nr->blocks[i] || !range_used(w, i, per))
				continue;
			int r = qbuild_alloc(w, 1, &nr->blocks[i], err);
			if (r)
				return r;
			again = true;
		}
		uint64_t need = size_to_clusters(w->q, MAX(nr->nblocks, 1u) * 8);
		if (again || need <= nr->table_clusters)
			continue;
		for (uint64_t c = 0; c < nr->table_clusters; c++)
			w->refs[(nr->table_off >> w->q->h.cluster_bits) + c] = 0;
		int r = qbuild_alloc(w, need, &nr->table_off, err);
		if (r)
			return r;
		nr->table_clusters = need;
		again = true;
	}
	return nr->table_clusters * w->q->cs > REFTABLE_BYTES_MAX ?
		err_set(err, -EFBIG, "%s: refcount table would be too big", w->q->b->file) : 0;
}

static int write_refs(struct qbuild *w, struct newrefs *nr, const struct qcow2 *shape, struct err *err)
{
	struct qcow2 *q = w->q;
	uint64_t per = BIT(shape->ref_per_block_bits), bytes = nr->table_clusters * q->cs;
	uint8_t *block = malloc(q->cs), *table = calloc(1, bytes);
	int r = block && table ? 0 : -ENOMEM;
	for (uint64_t i = 0; !r && i < nr->nblocks; i++) {
		if (!nr->blocks[i])
			continue;
		memset(block, 0, q->cs);
		for (uint64_t c = i * per; c < MIN(w->n, (i + 1) * per); c++) {
			if (w->refs[c] > shape->ref_max)
				r = -ERANGE;
			else if (w->refs[c])
				ref_set(shape, block, c - i * per, w->refs[c]);
		}
		if (!r)
			r = q_pwrite(q, nr->blocks[i], block, q->cs);
		put64(table + i * 8, nr->blocks[i]);
	}
	if (!r)
		r = q_pwrite(q, nr->table_off, table, bytes);
	free(block);
	free(table);
	if (r == -ERANGE)
		return err_set(err, -EINVAL, "%s: a cluster would have more references than %u refcount bits can count", q->b->file,
			       shape->ref_bits);
	return r ? err_set_errno(err, r, "%s: cannot write refcounts", q->b->file) : 0;
}

static int uncount_old(struct qbuild *w, struct err *err)
{
	struct qcow2 *q = w->q;
	int r = w->old_uncounted ? 0 : qbuild_add(w, q->h.reftable_off, (uint64_t)q->h.reftable_clusters * q->cs, -1, err);
	for (uint32_t i = 0; !r && !w->old_uncounted && i < q->reftable_size; i++)
		if (q->reftable[i])
			r = qbuild_add(w, q->reftable[i], q->cs, -1, err);
	/* Repair knows what is used, not what the old structure used: that must survive until the switch, too. */
	for (uint32_t i = 0; w->old_uncounted && i < q->reftable_size; i++)
		if (q->reftable[i] >> q->h.cluster_bits < w->n)
			w->taken[q->reftable[i] >> q->h.cluster_bits] = 1;
	for (uint32_t i = 0; w->old_uncounted && i < q->h.reftable_clusters; i++)
		if ((q->h.reftable_off >> q->h.cluster_bits) + i < w->n)
			w->taken[(q->h.reftable_off >> q->h.cluster_bits) + i] = 1;
	return r;
}

/* The header is stable: nothing leads to what lost its last reference. */
static void punch_freed(struct qbuild *w)
{
	struct qcow2 *q = w->q;
	for (uint64_t c = 0, end; q->pass_snapshot && !w->old_uncounted && c < w->n; c = end + 1) {
		for (; c < w->n && !(w->taken[c] && !w->refs[c]); c++)
			;
		for (end = c; end < w->n && w->taken[end] && !w->refs[end]; end++)
			;
		if (end > c && q->leaf->drv->discard)
			q->leaf->drv->discard(q->leaf, c << q->h.cluster_bits, (end - c) << q->h.cluster_bits);
	}
}

int qbuild_commit(struct qbuild *w, struct err *err)
{
	struct qcow2 *q = w->q, shape = { .ref_bits = 1u << w->h.refcount_order };
	struct newrefs nr = { 0 };
	shape.ref_per_block_bits = w->h.cluster_bits + 3 - w->h.refcount_order;
	shape.ref_max = shape.ref_bits == 64 ? INT64_MAX : BIT(shape.ref_bits) - 1;
	int r = uncount_old(w, err);
	if (!r)
		r = place_refs(w, &nr, shape.ref_per_block_bits, err);
	if (!r)
		r = write_refs(w, &nr, &shape, err);
	free(nr.blocks);
	if (r)
		return r;
	w->h.reftable_off = nr.table_off;
	w->h.reftable_clusters = (uint32_t)nr.table_clusters;
	r = q_sync(q);
	if (!r)
		r = w->whole_header ? q_write_header(q, &w->h, false) : q_write_head(q, &w->h);
	if (r)
		return err_set_errno(err, r, "%s: cannot write", q->b->file);
	if (w->whole_header)
		w->h = q->h;
	punch_freed(w);
	qcache_drop(&q->l2);
	qcache_drop(&q->refs);
	q->h = w->h;
	q->ref_bits = shape.ref_bits;
	q->ref_per_block_bits = shape.ref_per_block_bits;
	q->ref_max = shape.ref_max;
	pthread_mutex_lock(&q->comp_lock);
	q->comp_entry = 0;
	pthread_mutex_unlock(&q->comp_lock);
	__atomic_store_n(&q->b->length, ALIGN_DOWN(q->h.size, (uint64_t)512), __ATOMIC_RELAXED);
	return q_load_tables(q, err);
}
