/* qcow2: guest offset to file offset ("Cluster mapping", "Extended L2 Entries"), and ranges in use. */
#include <errno.h>
#include <stdlib.h>

#include "block/qcow2.h"

void qentry_decode(const struct qcow2 *q, const uint8_t *p, struct qentry *e)
{
	*e = (struct qentry){ .raw = be64(p) };
	e->compressed = e->raw & OFLAG_COMPRESSED;
	if (e->compressed)
		return;
	e->copied = e->raw & OFLAG_COPIED;
	e->host = e->raw & OFFSET_MASK;
	bool there = e->host || (q->data != q->leaf && e->copied);
	if (q->nsub > 1) {
		uint64_t bits = be64(p + 8);
		e->alloc = (uint32_t)bits;
		e->zero = (uint32_t)(bits >> 32);
		if (!there && !e->alloc)
			e->copied = false;
	} else if (e->raw & OFLAG_ZERO) {
		e->zero = 1;
	} else {
		e->alloc = there;
	}
}

void qentry_encode(const struct qcow2 *q, uint8_t *p, const struct qentry *e)
{
	uint64_t v = e->compressed ? e->raw : e->host | (e->copied ? OFLAG_COPIED : 0);
	if (q->nsub > 1)
		put64(p + 8, e->compressed ? 0 : (uint64_t)e->zero << 32 | e->alloc);
	else if (!e->compressed && e->zero)
		v |= OFLAG_ZERO;
	put64(p, v);
}

void q_compressed_place(const struct qcow2 *q, uint64_t raw, uint64_t *off, uint64_t *len)
{
	unsigned x = 62 - (q->h.cluster_bits - 8);
	*off = raw & (BIT(x) - 1) & (BIT(56) - 1);
	uint64_t sectors = ((raw & (BIT(62) - 1)) >> x) + 1;
	*len = sectors * 512 - (*off & 511);
}

/* L1 index and table offset; *table 0 when there is none. */
static int l2_place(struct qcow2 *q, const uint64_t *l1, uint64_t off, uint64_t *i, uint64_t *table)
{
	*i = off >> (q->h.cluster_bits + q->l2_bits);
	*table = *i < q->h.l1_size ? l1[*i] & OFFSET_MASK : 0;
	if (!q_is_aligned(q, *table))
		return q_corrupt(q, "L2 table offset 0x%llx is not aligned (L1 entry %llu)", (unsigned long long)*table,
				 (unsigned long long)*i);
	return 0;
}

static unsigned l2_index(const struct qcow2 *q, uint64_t off)
{
	return (unsigned)((off >> q->h.cluster_bits) & (BIT(q->l2_bits) - 1));
}

/* Kind of a subcluster; -EIO for what the specification forbids. */
static int sub_kind(struct qcow2 *q, const struct qentry *e, unsigned sub)
{
	bool alloc = e->alloc >> sub & 1, zero = e->zero >> sub & 1;
	if (e->compressed)
		return q->data != q->leaf ? q_corrupt(q, "compressed cluster in an image with a data file") : Q_COMPRESSED;
	if (alloc && zero)
		return q_corrupt(q, "a subcluster is both allocated and zero");
	if (!q_is_aligned(q, e->host))
		return q_corrupt(q, "cluster offset 0x%llx is not aligned", (unsigned long long)e->host);
	if (alloc && !e->host && q->data == q->leaf)
		return q_corrupt(q, "a subcluster is allocated nowhere");
	return alloc ? Q_DATA : zero ? Q_ZERO : Q_HOLE;
}

static bool extends(const struct qcow2 *q, const struct qrun *run, int kind, const struct qentry *e, uint64_t in)
{
	if (kind != (int)run->kind || kind == Q_COMPRESSED)
		return false;
	if (kind == Q_ZERO || kind == Q_HOLE) /* a place kept for later, or by other subclusters, counts, too: map shows it */
		return e->host ? run->host && e->host + in == run->host + run->len : !run->host;
	return kind != Q_DATA || (e->host + in == run->host + run->len && e->copied == run->copied);
}

int q_lookup(struct qcow2 *q, uint64_t off, uint64_t len, struct qrun *run, bool cached_only)
{
	const uint64_t *l1 = q->l1;
	uint64_t i, place, span = (uint64_t)q->cs << q->l2_bits, left = MIN(len, span - (off & (span - 1)));
	int r = l2_place(q, l1, off, &i, &place);
	*run = (struct qrun){ .kind = Q_HOLE };
	if (r)
		return r;
	if (!place) {
		run->len = left;
		return 0;
	}
	if (cached_only && !q_table_peek(&q->l2, place))
		return -EAGAIN;
	struct qtable *t = q_table(q, &q->l2, place, false, &r);
	if (!t)
		return r;
	for (unsigned k = l2_index(q, off); left; k++) {
		struct qentry e;
		qentry_decode(q, t->data + k * q->entry_size, &e);
		for (uint64_t in = off & (q->cs - 1); in < q->cs && left;) {
			int kind = sub_kind(q, &e, (unsigned)(in / q->sub_size));
			if (kind < 0)
				return run->len ? 0 : kind;
			uint64_t n = MIN(left, kind == Q_COMPRESSED ? q->cs - in : q->sub_size - in % q->sub_size);
			if (!run->len)
				*run = (struct qrun){ (enum qkind)kind, 0, kind == Q_DATA || (kind != Q_COMPRESSED && e.host) ? e.host + in : 0, e.raw, e.copied };
			else if (!extends(q, run, kind, &e, in))
				return 0;
			run->len += n;
			in += n;
			off += n;
			left -= n;
		}
	}
	return 0;
}

int q_entry_get(struct qcow2 *q, uint64_t off, struct qentry *e)
{
	uint64_t i, place;
	int r = l2_place(q, q->l1, off, &i, &place);
	*e = (struct qentry){ 0 };
	if (r || !place)
		return r;
	struct qtable *t = q_table(q, &q->l2, place, false, &r);
	if (!t)
		return r;
	qentry_decode(q, t->data + l2_index(q, off) * q->entry_size, e);
	for (unsigned s = 0; s < q->nsub; s++) {
		r = sub_kind(q, e, s);
		if (r < 0)
			return r;
	}
	return 0;
}

static void set_l1(struct qcow2 *q, uint64_t i, uint64_t v)
{
	q->l1[i] = v;
	q->l1_lo = q->l1_hi ? MIN(q->l1_lo, (uint32_t)i) : (uint32_t)i;
	q->l1_hi = MAX(q->l1_hi, (uint32_t)i + 1);
}

/* A table of our own for L1 entry `i`: a new one, or a copy of one that a snapshot has, too. */
static struct qtable *own_table(struct qcow2 *q, uint64_t i, uint64_t old, int *r)
{
	uint64_t off, got;
	struct qtable *t;
	*r = q_alloc(q, 1, true, &off, &got);
	if (*r)
		return NULL;
	q_event(q, old ? EVENT_L2_ALLOC_COW_READ : EVENT_L2_ALLOC_WRITE);
	if (old) {
		/* The copy is the cached table under its new place: nobody reads the old one through the cache. */
		t = q_table(q, &q->l2, old, false, r);
		if (t && t->hi) {
			*r = q_flush_tables(q);
			t = *r ? NULL : q_table(q, &q->l2, old, false, r);
		}
		if (t)
			q_table_move(&q->l2, t, off);
	} else {
		t = q_table(q, &q->l2, off, true, r);
	}
	if (!t) {
		q_unalloc(q, off, q->cs);
		return NULL;
	}
	q_table_dirty(&q->l2, t, 0, q->cs);
	q_meta_add(q, off, 1);
	set_l1(q, i, off | OFLAG_COPIED);
	if (old)
		q_dead(q, old, q->cs);
	return t;
}

/* The table of `off`, ours alone, so that it can be changed. NULL with *r set. */
static struct qtable *table_to_change(struct qcow2 *q, uint64_t off, int *r)
{
	uint64_t i, place;
	*r = l2_place(q, q->l1, off, &i, &place);
	if (!*r && i >= q->h.l1_size)
		*r = -EINVAL;
	if (*r)
		return NULL;
	if (place && q->l1[i] & OFLAG_COPIED)
		return q_table(q, &q->l2, place, false, r);
	return own_table(q, i, place, r);
}

int q_entry_reserve(struct qcow2 *q, uint64_t off)
{
	int r;
	return table_to_change(q, off, &r) ? 0 : r;
}

int q_entry_set(struct qcow2 *q, uint64_t off, const struct qentry *e)
{
	int r;
	struct qtable *t = table_to_change(q, off, &r);
	if (!t)
		return r;
	unsigned at = l2_index(q, off) * q->entry_size;
	qentry_encode(q, t->data + at, e);
	q_table_dirty(&q->l2, t, at, at + q->entry_size);
	return 0;
}

int q_entry_release(struct qcow2 *q, const struct qentry *e)
{
	uint64_t off = e->host, len = q->cs;
	if (q->data != q->leaf)
		return 0;
	if (e->compressed) {
		q_compressed_place(q, e->raw, &off, &len);
		pthread_mutex_lock(&q->comp_lock);
		q->comp_entry = 0;
		pthread_mutex_unlock(&q->comp_lock);
	}
	return off ? q_dead(q, off, len) : 0;
}

/* --- ranges in use: in order of arrival, so that nobody starves --- */

static bool conflicts(const struct qcow2 *q, const struct qrange *r)
{
	for (const struct qrange *o = q->ranges; o && o != r; o = o->next)
		if ((o->alone || r->alone) && o->start < r->end && r->start < o->end)
			return true;
	return false;
}

static void enqueue(struct qcow2 *q, struct qrange *r, uint64_t off, uint64_t len, bool alone)
{
	*r = (struct qrange){ ALIGN_DOWN(off, (uint64_t)q->cs), 0, alone, NULL };
	r->end = off + len > UINT64_MAX - q->cs ? UINT64_MAX : ALIGN_UP(off + len, (uint64_t)q->cs);
	*q->ranges_tail = r;
	q->ranges_tail = &r->next;
}

static void dequeue(struct qcow2 *q, struct qrange *r)
{
	struct qrange **p = &q->ranges;
	while (*p != r)
		p = &(*p)->next;
	*p = r->next;
	if (!r->next)
		q->ranges_tail = p;
	if (q->ranges)
		pthread_cond_broadcast(&q->range_free);
}

void qrange_lock(struct qcow2 *q, struct qrange *r, uint64_t off, uint64_t len, bool alone)
{
	pthread_mutex_lock(&q->range_lock);
	enqueue(q, r, off, len, alone);
	while (conflicts(q, r))
		pthread_cond_wait(&q->range_free, &q->range_lock);
	pthread_mutex_unlock(&q->range_lock);
}

bool qrange_trylock(struct qcow2 *q, struct qrange *r, uint64_t off, uint64_t len)
{
	if (pthread_mutex_trylock(&q->range_lock))
		return false;
	enqueue(q, r, off, len, false);
	bool ok = !conflicts(q, r);
	if (!ok)
		dequeue(q, r);
	pthread_mutex_unlock(&q->range_lock);
	return ok;
}

void qrange_unlock(struct qcow2 *q, struct qrange *r)
{
	pthread_mutex_lock(&q->range_lock);
	dequeue(q, r);
	pthread_mutex_unlock(&q->range_lock);
}
