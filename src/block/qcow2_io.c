/*
 * qcow2: reading and writing the disk.
 *
 * A write that finds its clusters allocated and unshared goes straight to the file, beside others. Any
 * other takes its range alone: allocate, write data together with what has to be copied around it, then
 * make the L2 entries (R2), then let go of what they pointed to before (R4).
 */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "block/image.h"
#include "block/qcow2.h"

enum { STACK_IOV = 66, DEAD_MAX = 1024, ZERO_PIECE = 1 << 20 };

struct slice { struct iovec stack[STACK_IOV], *v; int n; };

/* Room for a slice of `n` entries and two more around it. */
static int slice_get(struct slice *s, int n)
{
	s->v = n + 2 <= STACK_IOV ? s->stack : calloc((size_t)n + 2, sizeof *s->v);
	return s->v ? 0 : -ENOMEM;
}

static void slice_put(struct slice *s)
{
	if (s->v != s->stack)
		free(s->v);
}

static int lookup(struct qcow2 *q, uint64_t off, uint64_t len, struct qrun *run)
{
	pthread_mutex_lock(&q->lock);
	int r = q_lookup(q, off, len, run, false);
	pthread_mutex_unlock(&q->lock);
	return r;
}

static int read_backing(struct qcow2 *q, uint64_t off, struct iovec *v, int n, uint64_t len)
{
	struct block *back = q->b->backing;
	uint64_t there = back && off < back->length ? MIN(len, back->length - off) : 0;
	struct slice s;
	int r = 0;
	if (there == len)
		return back->drv->read(back, off, v, n, len);
	if (!there) {
		iov_zero(v, n);
		return 0;
	}
	r = slice_get(&s, n);
	if (r)
		return r;
	s.n = iov_slice(s.v, v, n, 0, there);
	r = back->drv->read(back, off, s.v, s.n, there);
	s.n = iov_slice(s.v, v, n, there, len - there);
	iov_zero(s.v, s.n);
	slice_put(&s);
	return r;
}

static int read_run(struct qcow2 *q, const struct qrun *run, uint64_t off, struct iovec *v, int n)
{
	switch (run->kind) {
	case Q_DATA:
		q_event(q, EVENT_READ_AIO);
		return q->data->drv->read(q->data, run->host, v, n, run->len);
	case Q_COMPRESSED:
		q_event(q, EVENT_READ_COMPRESSED);
		return q_inflate(q, run->raw, off & (q->cs - 1), v, n, run->len);
	case Q_HOLE:
		if (q->b->backing)
			q_event(q, EVENT_READ_BACKING_AIO);
		return read_backing(q, off, v, n, run->len);
	case Q_ZERO:
		break;
	}
	iov_zero(v, n);
	return 0;
}

int q_read_locked(struct qcow2 *q, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct slice s;
	int r = slice_get(&s, n);
	if (r)
		return r;
	for (uint64_t done = 0; !r && done < len;) {
		struct qrun run;
		r = lookup(q, off + done, len - done, &run);
		if (r)
			break;
		s.n = iov_slice(s.v, iov, n, done, run.len);
		r = read_run(q, &run, off + done, s.v, s.n);
		done += run.len;
	}
	slice_put(&s);
	return r;
}

int q_read(struct qcow2 *q, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct qrange range;
	qrange_lock(q, &range, off, len, false);
	int r = q_read_locked(q, off, iov, n, len);
	qrange_unlock(q, &range);
	return r;
}

/* --- writing in place --- */

/* No image makes a guest write over the image's own tables. Lock held. */
static int check_target(struct qcow2 *q, uint64_t host, uint64_t len)
{
	if (q->data != q->leaf)
		return 0;
	for (uint64_t at = ALIGN_DOWN(host, (uint64_t)q->cs); at < host + len; at += q->cs)
		if (q_is_meta(q, at))
			return q_corrupt(q, "guest data at 0x%llx, which holds metadata", (unsigned long long)at);
	return 0;
}

/* As much from `off` as can be written where it is; *done 0: nothing. */
static int write_in_place(struct qcow2 *q, uint64_t off, struct slice *s, const struct iovec *iov, int n, uint64_t skip,
			  uint64_t len, uint64_t *done)
{
	struct qrun run;
	*done = 0;
	pthread_mutex_lock(&q->lock);
	int r = q->broken ? q->broken : q_lookup(q, off, len, &run, false);
	if (!r && run.kind == Q_DATA && run.copied)
		r = check_target(q, run.host, run.len);
	pthread_mutex_unlock(&q->lock);
	if (r || run.kind != Q_DATA || !run.copied)
		return r;
	s->n = iov_slice(s->v, iov, n, skip, run.len);
	*done = run.len;
	q_event(q, EVENT_WRITE_AIO);
	return q->data->drv->write(q->data, run.host, s->v, s->n, run.len, 0);
}

/* --- writing new clusters --- */

/* Clusters in a row that get new places, or one that has a place and lacks content there. */
struct group {
	uint64_t first;         /* guest offset of the first cluster */
	uint64_t n, host;
	bool fresh, known;      /* the place reads as zeroes | was there before */
	struct qentry head, tail; /* entries of the first and last cluster as they were */
	uint64_t start, end;    /* guest range to be filled: the hull of the request, copies and subclusters */
};

static bool has_place(const struct qentry *e)
{
	return !e->compressed && e->host && e->copied;
}

/* Lock held. */
static int group_alloc(struct qcow2 *q, struct group *g, uint64_t off, uint64_t end)
{
	uint64_t table_end = ALIGN_DOWN(off, (uint64_t)q->cs << q->l2_bits) + ((uint64_t)q->cs << q->l2_bits), got;
	*g = (struct group){ .first = ALIGN_DOWN(off, (uint64_t)q->cs) };
	int r = q->broken ? q->broken : q_entry_get(q, off, &g->head);
	g->tail = g->head;
	if (r)
		return r;
	if (has_place(&g->head)) {
		g->known = true;
		g->n = 1;
		g->host = g->head.host;
		return check_target(q, g->host, q->cs);
	}
	for (g->n = 1; g->first + g->n * q->cs < MIN(end, table_end); g->n++) {
		struct qentry e;
		r = q_entry_get(q, g->first + g->n * q->cs, &e);
		if (r || has_place(&e))
			break;
	}
	if (q->data != q->leaf) {
		g->host = g->first;
	} else {
		r = q_entry_reserve(q, off);
		if (!r)
			r = q_alloc(q, g->n, false, &g->host, &got);
		if (r)
			return r;
		g->n = got;
		g->fresh = q->fresh;
	}
	return q_entry_get(q, g->first + (g->n - 1) * q->cs, &g->tail);
}

/* Subclusters whose content has to move with the cluster. */
static void group_hull(const struct qcow2 *q, struct group *g, uint64_t off, uint64_t end)
{
	uint64_t last = g->first + (g->n - 1) * q->cs;
	uint32_t head = g->head.compressed ? ~0u : g->known ? 0 : g->head.alloc;
	uint32_t tail = g->tail.compressed ? ~0u : g->known ? 0 : g->tail.alloc;
	g->start = g->first + (off - g->first) / q->sub_size * q->sub_size;
	g->end = last + (end - last + q->sub_size - 1) / q->sub_size * q->sub_size;
	if (q->nsub > 1 && head)
		g->start = MIN(g->start, g->first + (uint64_t)__builtin_ctz(head) * q->sub_size);
	if (q->nsub > 1 && tail)
		g->end = MAX(g->end, last + (32 - (uint64_t)__builtin_clz(tail)) * q->sub_size);
}

static int reads_as_zero(struct qcow2 *q, uint64_t off, uint64_t len, bool *zero)
{
	*zero = true;
	while (len && *zero) {
		struct qrun run;
		int r = lookup(q, off, len, &run);
		if (r)
			return r;
		*zero = run.kind == Q_ZERO || (run.kind == Q_HOLE && (!q->b->backing || off >= q->b->backing->length));
		off += run.len;
		len -= run.len;
	}
	return 0;
}

/* What the guest sees at [off, off+len) now, to be written beside its data. *len 0: nothing needs to be. */
static int copy_edge(struct qcow2 *q, const struct group *g, uint64_t off, uint64_t *len, uint8_t **buf)
{
	bool zero;
	*buf = NULL;
	if (!*len)
		return 0;
	int r = reads_as_zero(q, off, *len, &zero);
	if (r)
		return r;
	if (zero && g->fresh) {
		*len = 0;
		return 0;
	}
	*buf = zero ? calloc(1, *len) : malloc(*len);
	if (!*buf)
		return -ENOMEM;
	struct iovec v = { *buf, *len };
	q_event(q, EVENT_COW_READ);
	return zero ? 0 : q_read_locked(q, off, &v, 1, *len);
}

static int group_write(struct qcow2 *q, const struct group *g, uint64_t off, uint64_t end, struct slice *s)
{
	uint64_t head = off - g->start, tail = g->end - end, len, rest = tail;
	uint8_t *hbuf = NULL, *tbuf = NULL;
	int r = copy_edge(q, g, g->start, &head, &hbuf);
	if (!r)
		r = copy_edge(q, g, end, &tail, &tbuf);
	struct iovec *v = s->v + 1;
	if (head) {
		*--v = (struct iovec){ hbuf, head };
		s->n++;
	}
	if (tail)
		v[s->n++] = (struct iovec){ tbuf, tail };
	len = head + (end - off) + tail;
	if (rest && !tail && off == g->first) /* as who writes in order begins a cluster: the next writes find their place */
		raw_reserve(q->data, g->host + (end - g->first), rest);
	q_event(q, EVENT_WRITE_AIO);
	if (head || tail)
		q_event(q, EVENT_COW_WRITE);
	if (!r)
		r = q->data->drv->write(q->data, g->host + (off - head - g->first), v, s->n, len, 0);
	free(hbuf);
	free(tbuf);
	return r;
}

static uint32_t sub_mask(const struct qcow2 *q, uint64_t cluster, uint64_t start, uint64_t end)
{
	uint64_t lo = start > cluster ? (start - cluster) / q->sub_size : 0;
	uint64_t hi = MIN(end - cluster, (uint64_t)q->cs) / q->sub_size;
	return (uint32_t)(((hi >= 64 ? 0 : BIT(hi)) - 1) & ~(BIT(lo) - 1));
}

/* Lock held. *done counts the clusters that have their entries. */
static int group_link(struct qcow2 *q, const struct group *g, uint64_t *done)
{
	for (*done = 0; *done < g->n; ++*done) {
		uint64_t cluster = g->first + *done * q->cs;
		struct qentry old, e = { .host = g->host + *done * q->cs, .copied = true };
		int r = q_entry_get(q, cluster, &old);
		uint32_t mask = sub_mask(q, cluster, g->start, g->end);
		e.alloc = old.alloc | mask;
		e.zero = old.compressed ? 0 : old.zero & ~e.alloc;
		if (!r && (old.raw != (OFLAG_COPIED | e.host) || old.alloc != e.alloc || old.zero != e.zero))
			r = q_entry_set(q, cluster, &e);
		if (r)
			return r;
		if (!g->known)
			q_entry_release(q, &old);
	}
	return 0;
}

/* One group from `off`; *done bytes of the request. The range is ours alone. */
static int write_group(struct qcow2 *q, uint64_t off, struct slice *s, const struct iovec *iov, int n, uint64_t skip,
		       uint64_t len, uint64_t *done)
{
	struct group g;
	uint64_t linked = 0;
	pthread_mutex_lock(&q->lock);
	int r = group_alloc(q, &g, off, off + len);
	pthread_mutex_unlock(&q->lock);
	if (r)
		return r;
	*done = MIN(len, g.first + g.n * q->cs - off);
	group_hull(q, &g, off, off + *done);
	s->n = iov_slice(s->v + 1, iov, n, skip, *done);
	r = group_write(q, &g, off, off + *done, s);
	pthread_mutex_lock(&q->lock);
	if (!r)
		r = group_link(q, &g, &linked);
	if (r && !g.known && q->data == q->leaf && linked < g.n && !q->broken)
		q_unalloc(q, g.host + linked * q->cs, (g.n - linked) * q->cs);
	pthread_mutex_unlock(&q->lock);
	return r;
}

/* Enough is dead that it should be free: flush now. Nobody's range is held. */
static int bury_some(struct qcow2 *q)
{
	pthread_mutex_lock(&q->lock);
	bool many = q->ndead > DEAD_MAX;
	pthread_mutex_unlock(&q->lock);
	return many ? q_flush(q, true) : 0;
}

static int write_pieces(struct qcow2 *q, uint64_t off, const struct iovec *iov, int n, uint64_t len, bool alone, uint64_t *done)
{
	struct slice s;
	int r = slice_get(&s, n);
	while (!r && *done < len) {
		uint64_t now = 0;
		r = write_in_place(q, off + *done, &s, iov, n, *done, len - *done, &now);
		if (!r && !now && !alone)
			break;
		if (!r && !now)
			r = write_group(q, off + *done, &s, iov, n, *done, len - *done, &now);
		*done += r ? 0 : now;
	}
	slice_put(&s);
	return r;
}

int q_write(struct qcow2 *q, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct qrange range;
	uint64_t done = 0;
	int r = q_start_writing(q);
	if (r)
		return r;
	q_bitmaps_mark(q, off, len);
	qrange_lock(q, &range, off, len, false);
	r = write_pieces(q, off, iov, n, len, false, &done);
	qrange_unlock(q, &range);
	if (!r && done < len) {
		qrange_lock(q, &range, off + done, len - done, true);
		r = write_pieces(q, off, iov, n, len, true, &done);
		qrange_unlock(q, &range);
	}
	return r ? r : bury_some(q);
}

/* --- zeroes and discard --- */

static int write_zeroes(struct qcow2 *q, uint64_t off, uint64_t len)
{
	static uint8_t zeroes[ZERO_PIECE] __attribute__((aligned(4096)));
	int r = 0;
	for (uint64_t n; !r && len; off += n, len -= n) {
		n = MIN(len, (uint64_t)ZERO_PIECE);
		struct iovec v = { zeroes, n };
		r = q_write(q, off, &v, 1, n);
	}
	return r;
}

/* What the files below say counts, too. */
static int is_zero_in_chain(struct qcow2 *q, uint64_t off, uint64_t len, bool *zero)
{
	int r = 0;
	*zero = true;
	for (struct block_extent e; !r && *zero && len; off += e.len, len -= e.len) {
		r = image_map(q->b, NULL, off, len, &e);
		*zero = !r && e.zero;
	}
	return r;
}

enum clear { CLEAR_ZERO, CLEAR_ZERO_OWN, CLEAR_ZERO_UNMAP, CLEAR_DISCARD, CLEAR_HOLE };

/* A hole at `off` needs no entry to be what is asked for. */
static bool hole_will_do(const struct qcow2 *q, uint64_t off, enum clear how)
{
	return how == CLEAR_HOLE || (how != CLEAR_ZERO_OWN && (!q->b->backing || off >= q->b->backing->length));
}


/* One whole cluster's entry. Lock held. */
static int clear_entry(struct qcow2 *q, uint64_t off, enum clear how)
{
	struct qentry old, e = { 0 };
	int r = q_entry_get(q, off, &old);
	uint32_t all = q->nsub > 1 ? ~0u : 1;
	if (r)
		return r;
	bool hole = !old.raw && !old.alloc && !old.zero;
	if (hole && hole_will_do(q, off, how))
		return 0;
	if (how != CLEAR_HOLE && q->h.version >= 3)
		e.zero = all;
	if (how <= CLEAR_ZERO_OWN && has_place(&old)) { /* what was allocated stays so */
		e.host = old.host;
		e.copied = true;
	}
	if (old.zero == all && !old.alloc && old.host == e.host && !old.compressed && e.zero)
		return 0;
	r = q_entry_set(q, off, &e);
	q->by_request = how > CLEAR_ZERO_OWN;
	if (!r && !e.host)
		r = q_entry_release(q, &old);
	q->by_request = false;
	return r;
}

/* Some subclusters of one cluster; its place stays. -ENOTSUP: it has none, being compressed. Lock held. */
static int clear_subclusters(struct qcow2 *q, uint64_t off, uint64_t end, enum clear how)
{
	struct qentry e;
	int r = q_entry_get(q, off, &e);
	uint32_t mask = sub_mask(q, ALIGN_DOWN(off, (uint64_t)q->cs), off, end);
	if (r || e.compressed)
		return r ? r : -ENOTSUP;
	bool hole = !((e.alloc | e.zero) & mask);
	if ((hole && hole_will_do(q, off, how)) || (e.zero & mask) == mask)
		return 0;
	e.zero |= mask;
	e.alloc &= ~mask;
	return q_entry_set(q, off, &e);
}

/* One table's entries. Lock held. */
static int clear_entries(struct qcow2 *q, uint64_t off, uint64_t stop, enum clear how)
{
	bool no_table = !(q->l1[off / ((uint64_t)q->cs << q->l2_bits)] & OFFSET_MASK);
	int r = q->broken;
	if (no_table && hole_will_do(q, off, how))
		return r;
	for (uint64_t next; !r && off < stop; off = next) {
		next = MIN(stop, ALIGN_DOWN(off, (uint64_t)q->cs) + q->cs);
		r = next - off < q->cs ? clear_subclusters(q, off, next, how) : clear_entry(q, off, how);
	}
	return r;
}

/*
 * All of a (sub)cluster is zero, but perhaps only since nothing below has data there now: it gets an entry of its own, as in QEMU. Without a backing file
 * it stays what it is.
 */
static int keep_zero(struct qcow2 *q, uint64_t off, bool *zero)
{
	uint64_t start = ALIGN_DOWN(off, (uint64_t)q->sub_size), end = start + q->sub_size;
	struct qrange range;
	qrange_lock(q, &range, start, end - start, true);
	int r = is_zero_in_chain(q, start, MIN(end, q->b->length) - start, zero);
	if (!r && *zero && q->b->backing) {
		pthread_mutex_lock(&q->lock);
		r = clear_entries(q, start, end, CLEAR_ZERO);
		pthread_mutex_unlock(&q->lock);
	}
	qrange_unlock(q, &range);
	return r;
}

static int zero_part(struct qcow2 *q, uint64_t off, uint64_t len, unsigned flags)
{
	struct qrange range;
	bool zero = false;
	int r = 0;
	if (!len)
		return 0;
	if (!(flags & BLOCK_REQ_OWN)) {
		qrange_lock(q, &range, off, len, false);
		r = reads_as_zero(q, off, len, &zero);
		qrange_unlock(q, &range);
	}
	if (!r && !zero && !(flags & BLOCK_REQ_OWN) && q->h.version >= 3)
		r = keep_zero(q, off, &zero);
	return r || zero ? r : flags & BLOCK_REQ_NO_FALLBACK ? -ENOTSUP : write_zeroes(q, off, len);
}

/* Piece by piece of at most a (sub)cluster: where one is zero already nothing gets allocated for the sake of its neighbour. */
static int zero_parts(struct qcow2 *q, uint64_t off, uint64_t len, unsigned flags)
{
	int r = 0;
	for (uint64_t n; !r && len; off += n, len -= n) {
		n = MIN(len, q->sub_size - (off & (q->sub_size - 1)));
		r = zero_part(q, off, n, flags);
	}
	return r;
}

/*
 * What an external data file has in a range that is about to read as zeroes. One that is to stay valid by itself gets zeroes, too;
 * another loses what nobody reads any more. Should the entries be lost in a crash this is still what the guest asked for.
 */
static int clear_data_file(struct qcow2 *q, uint64_t off, uint64_t end, enum clear how)
{
	bool unmap = how > CLEAR_ZERO_OWN && q->pass_request;
	end = MIN(end, q->b->length);
	if (q->data == q->leaf || how == CLEAR_HOLE || off >= end)
		return 0;
	if (q->h.autoclear & AUTOCLEAR_DATA_RAW)
		return q->data->drv->zero(q->data, off, end - off, unmap ? BLOCK_REQ_MAY_UNMAP : 0);
	if (unmap)
		q->data->drv->discard(q->data, off, end - off); /* a hint */
	return 0;
}

/* From and to the borders of clusters, or of subclusters of one. */
static int clear_clusters(struct qcow2 *q, uint64_t off, uint64_t end, enum clear how)
{
	struct qrange range;
	int r = 0;
	while (!r && off < end) { /* a table at a time, so that others get their turn and the dead are buried */
		uint64_t span = (uint64_t)q->cs << q->l2_bits, stop = MIN(end, ALIGN_DOWN(off, span) + span);
		qrange_lock(q, &range, off, stop - off, true);
		r = clear_data_file(q, off, stop, how);
		pthread_mutex_lock(&q->lock);
		if (!r)
			r = clear_entries(q, off, stop, how);
		pthread_mutex_unlock(&q->lock);
		qrange_unlock(q, &range);
		off = stop;
		if (!r)
			r = bury_some(q);
	}
	return r;
}

/* Whole subclusters of one cluster, which may have to be written. */
static int zero_some(struct qcow2 *q, uint64_t off, uint64_t end, enum clear how, unsigned flags)
{
	int r = off < end ? clear_clusters(q, off, end, how) : 0;
	return r == -ENOTSUP ? zero_parts(q, off, MIN(end, q->b->length) - off, flags) : r;
}

int q_zero(struct qcow2 *q, uint64_t off, uint64_t len, unsigned flags)
{
	uint64_t unit = q->sub_size, stop = off + len, start = ALIGN_UP(off, unit), end = ALIGN_DOWN(stop, unit);
	enum clear how = flags & BLOCK_REQ_OWN ? CLEAR_ZERO_OWN : flags & BLOCK_REQ_MAY_UNMAP ? CLEAR_ZERO_UNMAP : CLEAR_ZERO;
	int r = q_start_writing(q);
	if (r)
		return r;
	q_bitmaps_mark(q, off, len);
	if (stop == q->b->length) /* nothing of the guest's is behind it */
		end = ALIGN_UP(stop, (uint64_t)q->cs);
	/* Version 2 cannot say zero. */
	if (start >= MIN(end, stop) || (q->h.version < 3 && (q->b->backing || how != CLEAR_ZERO_UNMAP)))
		return zero_parts(q, off, len, flags);
	uint64_t first = MIN(ALIGN_UP(start, (uint64_t)q->cs), end), last = MAX(ALIGN_DOWN(end, (uint64_t)q->cs), first);
	r = zero_parts(q, off, start - off, flags);
	if (!r)
		r = zero_some(q, start, first, how, flags);
	if (!r)
		r = clear_clusters(q, first, last, how);
	if (!r)
		r = zero_some(q, last, end, how, flags);
	return r || end >= stop ? r : zero_parts(q, end, stop - end, flags);
}

int q_discard(struct qcow2 *q, uint64_t off, uint64_t len, bool make_holes)
{
	uint64_t start = ALIGN_UP(off, (uint64_t)q->cs), end = ALIGN_DOWN(off + len, (uint64_t)q->cs);
	if (off + len >= q->b->length)
		end = ALIGN_UP(off + len, (uint64_t)q->cs);
	if (!make_holes && q->h.version < 3 && q->b->backing)
		return 0; /* would show what the backing file has */
	int r = q_start_writing(q);
	if (!r)
		q_bitmaps_mark(q, off, len);
	return r || start >= end ? r : clear_clusters(q, start, end, make_holes ? CLEAR_HOLE : CLEAR_DISCARD);
}

/* --- copy on read --- */

/* A run that is a hole here, read into `buf`. Zeroes become an entry where one can say so. The range is ours alone. */
static int copy_run(struct qcow2 *q, uint64_t off, uint64_t len, uint8_t *buf)
{
	struct iovec v = { buf, len };
	uint64_t done = 0, end = off + len;
	int r = read_backing(q, off, &v, 1, len);
	bool whole = q_is_aligned(q, off) && (q_is_aligned(q, end) || end == q->b->length);
	if (r || !iov_is_zero(&v, 1) || !whole || q->data != q->leaf || q->h.version < 3)
		return r ? r : write_pieces(q, off, &v, 1, len, true, &done);
	pthread_mutex_lock(&q->lock);
	r = q->broken;
	for (; !r && off < end; off += q->cs) {
		struct qentry e = { .zero = q->nsub > 1 ? ~0u : 1 };
		r = q_entry_set(q, off, &e);
	}
	pthread_mutex_unlock(&q->lock);
	return r;
}

/*
 * Alone in its clusters from the look at the entry to the new entry, so a write of the guest's comes before, and there is nothing to
 * copy, or after, and stands on top of the copy. Dirty bitmaps do not hear of it: the content is what it was.
 */
int q_copy_up(struct qcow2 *q, uint64_t off, uint64_t len)
{
	uint64_t end = MIN(ALIGN_UP(off + len, (uint64_t)q->cs), q->b->length);
	uint64_t piece = MAX((uint64_t)q->cs, (uint64_t)ZERO_PIECE);
	int r = q_start_writing(q);
	uint8_t *buf = r ? NULL : malloc(piece);
	if (!r && !buf)
		r = -ENOMEM;
	for (uint64_t at = ALIGN_DOWN(off, (uint64_t)q->cs); !r && at < end;) {
		uint64_t stop = MIN(end, at + piece);
		struct qrange range;
		struct qrun run;
		qrange_lock(q, &range, at, stop - at, true);
		for (; !r && at < stop; at += r ? 0 : run.len) {
			r = lookup(q, at, stop - at, &run);
			if (!r && run.kind == Q_HOLE)
				r = copy_run(q, at, run.len, buf);
		}
		qrange_unlock(q, &range);
	}
	free(buf);
	return r ? r : bury_some(q);
}

/* --- at once --- */

bool q_fast(struct block *b, struct block_req *r)
{
	struct qcow2 *q = b->qcow2;
	struct qrange range;
	struct qrun run = { 0 };
	bool ok = false, write = r->op == BLOCK_WRITE;
	if ((r->op != BLOCK_READ && !write) || (write && (r->flags & BLOCK_REQ_FUA || !block_write_cache(b))))
		return false;
	if (!qrange_trylock(q, &range, r->off, r->len))
		return false;
	if (!pthread_mutex_trylock(&q->lock)) {
		ok = !q->broken && q->started_writing >= write && !q_lookup(q, r->off, r->len, &run, true) && run.len == r->len;
		if (ok && write)
			ok = run.kind == Q_DATA && run.copied && !check_target(q, run.host, run.len);
		if (ok && write)
			q_bitmaps_mark(q, r->off, r->len);
		pthread_mutex_unlock(&q->lock);
	}
	struct block *to = q->data;
	struct block_req part = *r;
	part.off = run.host;
	if (ok && run.kind == Q_HOLE && q->copy_on_read)
		ok = false;
	if (ok && run.kind == Q_HOLE && b->backing && r->off < b->backing->length) {
		to = b->backing;
		part.off = r->off;
		ok = r->len <= to->length - r->off;
	} else if (ok && run.kind != Q_DATA) {
		ok = run.kind != Q_COMPRESSED;
		to = NULL;
	}
	if (ok && to)
		ok = to->drv->fast && to->drv->fast(to, &part);
	else if (ok)
		iov_zero(r->iov, r->iovcnt);
	r->ret = ok && to ? part.ret : 0;
	qrange_unlock(q, &range);
	return ok;
}

/* --- without waiting: one run of data where it stands --- */

struct q_op { struct block_req part, *whole; struct qcow2 *q; struct qrange range; };

static void part_done(struct block_req *part)
{
	struct q_op *op = container_of(part, struct q_op, part);
	struct block_req *whole = op->whole;
	whole->ret = part->ret;
	qrange_unlock(op->q, &op->range);
	free(op);
	block_finish(whole);
}

/* The range is held until the leaf is done with it, as q_read() and write_in_place() do. */
bool q_submit(struct block *b, struct block_req *r)
{
	struct qcow2 *q = b->qcow2;
	struct qrun run;
	bool write = r->op == BLOCK_WRITE, ok;
	if ((!q->data->uring && !q->data->polled) || (r->op != BLOCK_READ && !write) || (write && (r->flags & BLOCK_REQ_FUA || !block_write_cache(b))))
		return false;
	struct q_op *op = malloc(sizeof *op);
	if (!op)
		return false;
	op->q = q;
	op->whole = r;
	if (!qrange_trylock(q, &op->range, r->off, r->len)) {
		free(op);
		return false;
	}
	ok = !pthread_mutex_trylock(&q->lock);
	if (ok) {
		ok = !q->broken && q->started_writing >= write && !q_lookup(q, r->off, r->len, &run, true) && run.len == r->len &&
		     run.kind == Q_DATA && (!write || (run.copied && !check_target(q, run.host, run.len)));
		pthread_mutex_unlock(&q->lock);
	}
	if (ok && write)
		q_bitmaps_mark(q, r->off, r->len);
	if (ok) {
		op->part = (struct block_req){ .op = r->op, .off = run.host, .len = r->len, .iov = r->iov, .iovcnt = r->iovcnt,
					       .flags = r->flags & BLOCK_REQ_MORE, .lane = r->lane, .done = part_done };
		ok = block_submit_below(q->data, &op->part);
	}
	if (!ok) {
		qrange_unlock(q, &op->range);
		free(op);
	}
	return ok;
}

bool q_poll(struct block *b)
{
	return block_poll(b->qcow2->data);
}
