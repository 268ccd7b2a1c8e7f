/* qcow2: `amend`: version, refcount width, what bits of the header say. */
#include <errno.h>
#include <stdlib.h>

#include "block/qcow2.h"

/* --- version 2 has no zero clusters --- */

/* Of the disk as it is: make them holes or data. */
static int expand_zeroes(struct qcow2 *q)
{
	static const uint8_t zeroes[65536];
	for (uint64_t off = 0; off < q->b->length;) {
		struct qrun run;
		struct qentry e = { 0 }, old;
		pthread_mutex_lock(&q->lock);
		int r = q_lookup(q, off, q->b->length - off, &run, false);
		bool hole = !r && run.kind == Q_ZERO && (!q->b->backing || off >= q->b->backing->length) && !(off & (q->cs - 1));
		if (hole) {
			r = q_entry_get(q, off, &old);
			if (!r)
				r = q_entry_set(q, off, &e);
			if (!r)
				r = q_entry_release(q, &old);
			run.len = MIN(run.len, (uint64_t)q->cs);
		}
		pthread_mutex_unlock(&q->lock);
		if (!r && run.kind == Q_ZERO && !hole) {
			run.len = MIN(run.len, (uint64_t)sizeof zeroes);
			struct iovec v = { (void *)(uintptr_t)zeroes, run.len };
			r = q_write(q, off, &v, 1, run.len);
		}
		if (r)
			return r;
		off += run.len;
	}
	return q_flush(q, true);
}

/*
 * Snapshots' tables are shared, by several snapshots perhaps, and never changed in place (R5): what has zero clusters is written anew, and all that led to the old
 * table leads to the new one.
 */
struct expand {
	struct qbuild w;
	uint64_t *moved;                /* by the cluster of a table: where it is now; 0: it stays */
	uint8_t *old, *new;             /* a table each */
};

static int zero_cluster(struct qbuild *w, uint64_t *off, struct err *err)
{
	struct qcow2 *q = w->q;
	int r = qbuild_alloc(w, 1, off, err);
	if (!r && (r = q->leaf->drv->zero(q->leaf, *off, q->cs, 0)))
		err_set_errno(err, r, "%s: cannot write", q->b->file);
	return r;
}

/* x->old without zero clusters to x->new, and that to the file: holes where nothing would show through, else clusters. */
static int write_expanded(struct expand *x, uint64_t guest, uint64_t *off, struct err *err)
{
	struct qcow2 *q = x->w.q;
	int r = 0;
	memcpy(x->new, x->old, q->cs);
	for (unsigned i = 0; !r && i < BIT(q->l2_bits); i++, guest += q->cs) {
		struct qentry e, now = { 0 };
		qentry_decode(q, x->old + i * q->entry_size, &e);
		if (!e.zero)
			continue;
		if (q->b->backing && guest < q->b->backing->length) {
			r = zero_cluster(&x->w, &now.host, err);
			now.alloc = 1;
		}
		qentry_encode(q, x->new + i * q->entry_size, &now);
	}
	return r ? r : qbuild_put(&x->w, x->new, q->cs, off, err);
}

/* The same table once more: one more reference to all that was made for it. */
static int share_expanded(struct expand *x, uint64_t off, struct err *err)
{
	struct qcow2 *q = x->w.q;
	int r = q_pread(q, off, x->new, q->cs);
	if (r)
		return err_set_errno(err, r, "%s: L2 table", q->b->file);
	r = qbuild_add(&x->w, off, q->cs, 1, err);
	for (unsigned i = 0; !r && i < BIT(q->l2_bits); i++) {
		struct qentry old, now;
		qentry_decode(q, x->old + i * q->entry_size, &old);
		qentry_decode(q, x->new + i * q->entry_size, &now);
		if (old.zero && now.host)
			r = qbuild_add(&x->w, now.host, q->cs, 1, err);
	}
	return r;
}

/* One reference less to the old table, and to what its zero clusters held. */
static int drop_old(struct expand *x, uint64_t off, struct err *err)
{
	struct qcow2 *q = x->w.q;
	int r = qbuild_add(&x->w, off, q->cs, -1, err);
	for (unsigned i = 0; !r && i < BIT(q->l2_bits); i++) {
		struct qentry e;
		qentry_decode(q, x->old + i * q->entry_size, &e);
		if (e.zero && e.host)
			r = qbuild_add(&x->w, e.host, q->cs, -1, err);
	}
	return r;
}

static bool has_zeroes(const struct qcow2 *q, const uint8_t *l2)
{
	struct qentry e = { 0 };
	for (unsigned i = 0; !e.zero && i < BIT(q->l2_bits); i++)
		qentry_decode(q, l2 + i * q->entry_size, &e);
	return e.zero;
}

/* One table of a snapshot, that shows the disk from `guest` on; *entry leads to it. */
static int expand_table(struct expand *x, uint64_t *entry, uint64_t guest, struct err *err)
{
	struct qcow2 *q = x->w.q;
	uint64_t off = *entry & OFFSET_MASK, *to = &x->moved[off >> q->h.cluster_bits];
	int r = qbuild_read_l2(q, off, x->old, err);
	if (r || !has_zeroes(q, x->old))
		return r;
	r = *to ? share_expanded(x, *to, err) : write_expanded(x, guest, to, err);
	*entry = *to;
	return r ? r : drop_old(x, off, err);
}

static int expand_snapshot(struct expand *x, struct qsnap *s, uint64_t clusters, struct err *err)
{
	struct qcow2 *q = x->w.q;
	uint64_t *l1, span = (uint64_t)q->cs << q->l2_bits;
	bool changed = false;
	int r = q_read_l1(q, s->l1_off, s->l1_size, &l1, err);
	for (uint32_t i = 0; !r && i < s->l1_size; i++) {
		uint64_t was = l1[i], off = was & OFFSET_MASK;
		if (off && off >> q->h.cluster_bits >= clusters)
			r = err_set(err, -EIO, "%s: a table of snapshot '%s' is behind the end of the file", q->b->file, s->s.name);
		else if (off)
			r = expand_table(x, &l1[i], i * span, err);
		changed |= l1[i] != was;
	}
	if (!r && changed) {
		r = qbuild_add(&x->w, s->l1_off, s->l1_size * 8ull, -1, err);
		for (uint32_t i = 0; i < s->l1_size; i++)
			put64(&l1[i], l1[i]);
		if (!r)
			r = qbuild_put(&x->w, l1, s->l1_size * 8ull, &s->l1_off, err);
	}
	free(l1);
	return r;
}

static int expand_snapshots(struct qcow2 *q, struct err *err)
{
	struct qrange all;
	struct expand x = { .old = malloc(q->cs), .new = malloc(q->cs) };
	uint64_t old = q_snapshot_table_bytes(q), clusters = 0;
	int r = q_stop(q, &all, err);
	if (!r)
		r = qbuild_begin(&x.w, q, false, err);
	if (!r) {
		clusters = x.w.n;
		x.moved = calloc(clusters, sizeof *x.moved);
		r = x.moved && x.old && x.new ? 0 : err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
	}
	for (unsigned i = 0; !r && i < q->nsnaps; i++)
		r = expand_snapshot(&x, &q->snaps[i], clusters, err);
	if (!r)
		r = q_put_snapshots(&x.w, old, err);
	/* What only a zero cluster of a snapshot shared is the disk's own again. */
	if (!r)
		r = qbuild_add(&x.w, q->h.l1_off, q->h.l1_size * 8ull, -1, err);
	if (!r)
		r = qbuild_active(&x.w, q->l1, q->h.l1_size, q->h.l1_size, true, err);
	free(x.moved);
	free(x.old);
	free(x.new);
	return q_finish(q, &x.w, &all, r, err);
}

/* Can all that the image has be said in version 2? */
static int fits_version2(struct qcow2 *q, struct err *err)
{
	static const struct { uint64_t bit; const char *what; } features[] = {
		{ INCOMPAT_DATA_FILE, "an external data file" }, { INCOMPAT_COMPRESSION, "a compression type" }, { INCOMPAT_EXT_L2, "extended L2 entries" },
		{ INCOMPAT_CORRUPT, "a mark as corrupt (see check -r)" },
	};
	for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
		if (q->h.incompat & features[i].bit)
			return err_set(err, -ENOTSUP, "%s: the image has %s, which compat=0.10 does not have", q->b->file, features[i].what);
	}
	if (q->h.incompat)
		return err_set(err, -ENOTSUP, "%s: uses features that compat=0.10 does not have", q->b->file);
	if (q->h.refcount_order != 4)
		return err_set(err, -ENOTSUP, "%s: compat=0.10 requires refcounts of 16 bits (add refcount_bits=16)", q->b->file);
	if (q_find_ext(q, EXT_BITMAPS))
		return err_set(err, -ENOTSUP, "%s: the image has dirty bitmaps, which compat=0.10 does not have; remove them first (bitmap --remove)", q->b->file);
	for (unsigned i = 0; i < q->nsnaps; i++) {
		const struct qsnap *s = &q->snaps[i];
		if (s->s.disk_size != q->h.size || s->s.vm_state_size > UINT32_MAX)
			return err_set(err, -ENOTSUP, "%s: snapshot '%s' is of another size, which compat=0.10 cannot say; delete it first", q->b->file, s->s.name);
	}
	return 0;
}

static int to_version(struct qcow2 *q, unsigned version, struct err *err)
{
	struct qhead h = q->h;
	int r = 0;
	if (version == h.version)
		return 0;
	if (version == 2) {
		r = fits_version2(q, err);
		if (r)
			return r;
		r = q_start_writing(q);
		if (!r)
			r = expand_zeroes(q);
		if (!r && q->nsnaps && (r = expand_snapshots(q, err)))
			return r;
		h = q->h;
		h.compat = h.autoclear = 0;
	}
	h.version = version;
	if (version == 3) {
		h.header_len = 112;
		h.refcount_order = 4;
	}
	if (!r)
		r = q_flush(q, true);
	if (!r) {
		pthread_mutex_lock(&q->lock);
		unsigned old = q->h.version;
		q->h.version = version;
		r = q_write_header(q, &h, false);
		if (r)
			q->h.version = old;
		pthread_mutex_unlock(&q->lock);
	}
	return r ? err_set_errno(err, r, "%s: cannot change the version", q->b->file) : 0;
}

static int to_refcount_bits(struct qcow2 *q, unsigned bits, struct err *err)
{
	struct qbuild w = { 0 };
	struct qrange all;
	unsigned order = bits ? (unsigned)__builtin_ctz(bits) : 99;
	if (bits != 1u << (order & 31) || order > 6)
		return err_set(err, -EINVAL, "Refcount width must be a power of two and may not exceed 64 bits");
	if (order == q->h.refcount_order)
		return 0;
	if (q->h.version < 3)
		return err_set(err, -EINVAL, "Refcount widths other than 16 bits require compatibility level 1.1 or above");
	int r = q_stop(q, &all, err);
	if (!r)
		r = qbuild_begin(&w, q, false, err);
	w.h.refcount_order = order;
	if (!r)
		r = qbuild_commit(&w, err);
	qbuild_end(&w);
	q_go(q, &all);
	return r;
}

int qcow2_amend(struct block *b, const struct image_amend *a, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	int r = 0;
	if (a->set_version && a->version < 3 && a->set_lazy && a->lazy)
		return err_set(err, -EINVAL, "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)");
	if (a->set_version && a->version == 3)
		r = to_version(q, 3, err);
	if (!r && a->set_refcount_bits)
		r = to_refcount_bits(q, a->refcount_bits, err);
	if (!r && (a->set_lazy || a->set_data_raw)) {
		struct qhead h = q->h;
		if (a->set_lazy && a->lazy && h.version < 3)
			return err_set(err, -EINVAL, "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)");
		if (a->set_data_raw && a->data_raw && !(h.autoclear & AUTOCLEAR_DATA_RAW))
			return err_set(err, -EINVAL, "data-file-raw cannot be set on existing images");
		if (a->set_lazy)
			h.compat = a->lazy ? h.compat | COMPAT_LAZY : h.compat & ~(uint64_t)COMPAT_LAZY;
		if (a->set_data_raw && !a->data_raw)
			h.autoclear &= ~(uint64_t)AUTOCLEAR_DATA_RAW;
		r = q_write_head(q, &h);
		if (!r)
			q->h = h;
		else
			err_set_errno(err, r, "%s: header", b->file);
	}
	if (!r && a->set_version && a->version == 2)
		r = to_version(q, 2, err);
	return r;
}
