/* qcow2: internal snapshots ("Snapshots"). */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "block/qcow2.h"

enum { FIXED = 40, EXTRA_MAX = 1024 };
#define EXTRA_OURS 24u          /* VM state size, disk size, instruction count */

int q_read_l1(struct qcow2 *q, uint64_t off, uint32_t n, uint64_t **l1, struct err *err)
{
	*l1 = NULL;
	if (n * 8ull > L1_BYTES_MAX || (n && !q_is_aligned(q, off)))
		return err_set(err, -EINVAL, "%s: invalid L1 table (offset 0x%llx, %u entries)", q->b->file, (unsigned long long)off, n);
	uint64_t *t = calloc(MAX(n, 1u), 8);
	int r = t ? q_pread(q, off, t, n * 8ull) : -ENOMEM;
	if (r) {
		free(t);
		return err_set_errno(err, r, "%s: cannot read an L1 table", q->b->file);
	}
	for (uint32_t i = 0; i < n; i++)
		t[i] = be64(&t[i]);
	*l1 = t;
	return 0;
}

static void free_snap(struct qsnap *s)
{
	free(s->s.id);
	free(s->s.name);
	free(s->extra);
}

void q_free_snapshots(struct qcow2 *q)
{
	for (unsigned i = 0; i < q->nsnaps; i++)
		free_snap(&q->snaps[i]);
	free(q->snaps);
	q->snaps = NULL;
	q->nsnaps = 0;
}

static int read_text(struct qcow2 *q, uint64_t *at, unsigned len, char **text)
{
	*text = calloc(1, len + 1);
	int r = *text ? q_pread(q, *at, *text, len) : -ENOMEM;
	*at += len;
	return r;
}

static int read_one(struct qcow2 *q, uint64_t *at, struct qsnap *s)
{
	uint8_t p[FIXED];
	int r = q_pread(q, *at, p, sizeof p);
	*s = (struct qsnap){ .l1_off = be64(p), .l1_size = be32(p + 8), .extra_len = be32(p + 36),
		.s = { .date_sec = be32(p + 16), .date_nsec = be32(p + 20), .vm_clock_ns = be64(p + 24),
		       .vm_state_size = be32(p + 32), .disk_size = q->h.size, .icount = UINT64_MAX } };
	*at += FIXED;
	if (r || s->extra_len > EXTRA_MAX)
		return r ? r : -EINVAL;
	s->extra = calloc(1, s->extra_len + 24);
	r = s->extra ? q_pread(q, *at, s->extra, s->extra_len) : -ENOMEM;
	if (r)
		return r;
	*at += s->extra_len;
	if (s->extra_len >= 8)
		s->s.vm_state_size = be64(s->extra);
	if (s->extra_len >= 16)
		s->s.disk_size = be64(s->extra + 8);
	if (s->extra_len >= 24)
		s->s.icount = be64(s->extra + 16);
	r = read_text(q, at, be16(p + 12), &s->s.id);
	if (!r)
		r = read_text(q, at, be16(p + 14), &s->s.name);
	*at = ALIGN_UP(*at, (uint64_t)8);
	return r;
}

int q_read_snapshots(struct qcow2 *q, struct err *err)
{
	uint64_t at = q->h.snapshots_off;
	int r = 0;
	q_free_snapshots(q);
	if (!q->h.nb_snapshots)
		return 0;
	q->snaps = calloc(q->h.nb_snapshots, sizeof *q->snaps);
	if (!q->snaps)
		return err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
	for (uint32_t i = 0; !r && i < q->h.nb_snapshots; i++) {
		r = read_one(q, &at, &q->snaps[i]);
		q->nsnaps++;
		if (!r && (at - q->h.snapshots_off > SNAPSHOT_TABLE_MAX || q->snaps[i].l1_size * 8ull > L1_BYTES_MAX ||
			   !q_is_aligned(q, q->snaps[i].l1_off) || (q->snaps[i].l1_size && !q->snaps[i].l1_off)))
			r = -EINVAL;
	}
	return r ? err_set_errno(err, r, "%s: Could not read snapshots", q->b->file) : 0;
}

static uint64_t table_bytes(const struct qcow2 *q, uint64_t *each, const struct qsnap *s)
{
	uint64_t n = 0;
	for (unsigned i = 0; i < q->nsnaps; i++) {
		const struct qsnap *e = &q->snaps[i];
		uint64_t one = ALIGN_UP(FIXED + MAX(e->extra_len, EXTRA_OURS) + strlen(e->s.id) + strlen(e->s.name), (uint64_t)8);
		if (e == s && each)
			*each = one;
		n += one;
	}
	return n;
}

static void put_one(uint8_t *p, const struct qsnap *s)
{
	uint32_t extra = MAX(s->extra_len, EXTRA_OURS);
	size_t id = strlen(s->s.id), name = strlen(s->s.name);
	put64(p, s->l1_off);
	put32(p + 8, s->l1_size);
	put16(p + 12, (uint16_t)id);
	put16(p + 14, (uint16_t)name);
	put32(p + 16, s->s.date_sec);
	put32(p + 20, s->s.date_nsec);
	put64(p + 24, s->s.vm_clock_ns);
	put32(p + 32, s->s.vm_state_size > UINT32_MAX ? 0 : (uint32_t)s->s.vm_state_size);
	put32(p + 36, extra);
	if (s->extra_len)
		memcpy(p + FIXED, s->extra, s->extra_len);
	put64(p + FIXED, s->s.vm_state_size);
	put64(p + FIXED + 8, s->s.disk_size);
	if (s->extra_len < 24)
		put64(p + FIXED + 16, s->s.icount);
	memcpy(p + FIXED + extra, s->s.id, id);
	memcpy(p + FIXED + extra + id, s->s.name, name);
}

uint64_t q_snapshot_table_bytes(const struct qcow2 *q)
{
	return table_bytes(q, NULL, NULL);
}

/* The table as q->snaps has it, to new clusters; the old one's are given back. */
int q_put_snapshots(struct qbuild *w, uint64_t old_bytes, struct err *err)
{
	struct qcow2 *q = w->q;
	uint64_t bytes = q_snapshot_table_bytes(q), at = 0, each;
	uint8_t *buf = calloc(1, bytes + 8);
	int r = buf ? 0 : err_set(err, -ENOMEM, "out of memory");
	for (unsigned i = 0; !r && i < q->nsnaps; i++) {
		table_bytes(q, &each, &q->snaps[i]);
		put_one(buf + at, &q->snaps[i]);
		at += each;
	}
	if (!r && old_bytes)
		r = qbuild_add(w, q->h.snapshots_off, old_bytes, -1, err);
	w->h.snapshots_off = 0;
	if (!r && q->nsnaps)
		r = qbuild_put(w, buf, bytes, &w->h.snapshots_off, err);
	w->h.nb_snapshots = q->nsnaps;
	free(buf);
	return r;
}

static struct qsnap *find_by_name(struct qcow2 *q, const char *name)
{
	for (unsigned i = 0; i < q->nsnaps; i++)
		if (!strcmp(q->snaps[i].s.name, name))
			return &q->snaps[i];
	return NULL;
}

struct qsnap *q_find_snapshot(struct qcow2 *q, const char *id_or_name)
{
	for (unsigned i = 0; i < q->nsnaps; i++)
		if (!strcmp(q->snaps[i].s.id, id_or_name))
			return &q->snaps[i];
	return find_by_name(q, id_or_name);
}

static int new_snap(struct qcow2 *q, const char *name, struct err *err)
{
	struct qsnap *v = realloc(q->snaps, (q->nsnaps + 1) * sizeof *v), *s;
	unsigned long id = 1;
	struct timespec now;
	if (!v)
		return err_set(err, -ENOMEM, "out of memory");
	q->snaps = v;
	for (unsigned i = 0; i < q->nsnaps; i++)
		id = MAX(id, strtoul(v[i].s.id, NULL, 10) + 1);
	s = &v[q->nsnaps];
	clock_gettime(CLOCK_REALTIME, &now);
	*s = (struct qsnap){ .l1_off = q->h.l1_off, .l1_size = q->h.l1_size,
		.s = { .name = strdup(name), .disk_size = q->h.size, .date_sec = (uint32_t)now.tv_sec,
		       .date_nsec = (uint32_t)now.tv_nsec } };
	if (asprintf(&s->s.id, "%lu", id) < 0)
		s->s.id = NULL;
	if (!s->s.id || !s->s.name) {
		free_snap(s);
		return err_set(err, -ENOMEM, "out of memory");
	}
	q->nsnaps++;
	return 0;
}

/* Something failed before the switch: what is in memory goes back to what is on disk. */
static void roll_back(struct qcow2 *q)
{
	if (q_load_tables(q, NULL))
		q_corrupt(q, "cannot read the tables again");
}

/* The end of a change, `r` its result so far: committed or rolled back, and the requests that were held go on. */
int q_finish(struct qcow2 *q, struct qbuild *w, struct qrange *all, int r, struct err *err)
{
	if (!r)
		r = qbuild_commit(w, err);
	qbuild_end(w);
	if (r)
		roll_back(q);
	q_go(q, all);
	return r;
}

int qcow2_snapshot_create(struct block *b, const char *name, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	struct qrange all;
	struct qbuild w = { 0 };
	if (q->data != q->leaf)
		return err_set(err, -ENOTSUP, "%s: an image with an external data file has no internal snapshots", b->file);
	if (q->nsnaps >= SNAPSHOTS_MAX || strlen(name) > UINT16_MAX)
		return err_set(err, -EFBIG, "%s: too many snapshots", b->file);
	int r = q_stop(q, &all, err);
	uint64_t old = q_snapshot_table_bytes(q);
	if (!r)
		r = qbuild_begin(&w, q, false, err);
	if (!r)
		r = new_snap(q, name, err);
	/* The snapshot takes the tables as they are; the disk goes on with copies of them. */
	if (!r)
		r = qbuild_add_tree(&w, q->l1, q->h.l1_size, 1, false, err);
	if (!r)
		r = qbuild_active(&w, q->l1, q->h.l1_size, q->h.l1_size, false, err);
	if (!r)
		r = q_put_snapshots(&w, old, err);
	return q_finish(q, &w, &all, r, err);
}

static int begin_with(struct qcow2 *q, struct qbuild *w, struct qsnap *s, const char *name, struct err *err)
{
	if (!s)
		return err_set(err, -ENOENT, "%s: there is no snapshot '%s'", q->b->file, name);
	return qbuild_begin(w, q, false, err);
}

static int free_l1(struct qbuild *w, const uint64_t *l1, uint64_t off, uint32_t n, struct err *err)
{
	int r = qbuild_add_tree(w, l1, n, -1, true, err);
	return r ? r : qbuild_add(w, off, n * 8ull, -1, err);
}

static int apply(struct qbuild *w, const struct qsnap *s, struct err *err)
{
	struct qcow2 *q = w->q;
	uint64_t *l1;
	int r = q_read_l1(q, s->l1_off, s->l1_size, &l1, err);
	if (!r)
		r = qbuild_add_tree(w, l1, s->l1_size, 1, false, err);
	if (!r)
		r = free_l1(w, q->l1, q->h.l1_off, q->h.l1_size, err);
	if (!r && q_l1_entries(q, s->s.disk_size) * 8 > L1_BYTES_MAX)
		r = err_set(err, -EINVAL, "%s: the snapshot's disk size is invalid", q->b->file);
	w->h.size = s->s.disk_size;
	if (!r)
		r = qbuild_active(w, l1, s->l1_size, MAX(s->l1_size, (uint32_t)q_l1_entries(q, s->s.disk_size)), false, err);
	free(l1);
	return r;
}

int qcow2_snapshot_apply(struct block *b, const char *id_or_name, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	struct qrange all;
	struct qbuild w = { 0 };
	struct qsnap *s = q_find_snapshot(q, id_or_name);
	uint64_t size = s ? s->s.disk_size : q->h.size;
	int r = q_start_writing(q);
	if (r)
		return err_set_errno(err, r, "%s", b->file);
	if (size != q->h.size && (r = q_bitmaps_before_resize(q, size, err)))
		return r;
	r = q_stop(q, &all, err);
	if (!r)
		r = begin_with(q, &w, s = q_find_snapshot(q, id_or_name), id_or_name, err);
	/* The bitmaps go along, as long as the larger of both sizes: what is too much goes when they are written (q_bitmaps_end). */
	if (!r && size > q->h.size && q_bitmaps_resized(q, size))
		r = err_set(err, -ENOMEM, "%s: the bitmaps are too large", b->file);
	if (!r)
		q_bitmaps_mark(q, 0, MAX(size, q->b->length)); /* all of it may have changed */
	if (!r)
		r = apply(&w, s, err);
	return q_finish(q, &w, &all, r, err);
}

static int delete(struct qbuild *w, struct qsnap *s, struct err *err)
{
	struct qcow2 *q = w->q;
	uint64_t *l1, old = q_snapshot_table_bytes(q);
	int r = q_read_l1(q, s->l1_off, s->l1_size, &l1, err);
	if (!r)
		r = free_l1(w, l1, s->l1_off, s->l1_size, err);
	free(l1);
	if (r)
		return r;
	free_snap(s);
	memmove(s, s + 1, (size_t)(q->snaps + --q->nsnaps - s) * sizeof *s);
	r = q_put_snapshots(w, old, err);
	/* What only the snapshot shared is the disk's own again. */
	if (!r)
		r = qbuild_add(w, q->h.l1_off, q->h.l1_size * 8ull, -1, err);
	return r ? r : qbuild_active(w, q->l1, q->h.l1_size, q->h.l1_size, true, err);
}

/* By name only, as in QEMU: what is deleted must not depend on other snapshots' numbers. */
int qcow2_snapshot_delete(struct block *b, const char *name, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	struct qrange all;
	struct qbuild w = { 0 };
	struct qsnap *s = NULL;
	int r = q_stop(q, &all, err);
	if (!r)
		r = begin_with(q, &w, s = find_by_name(q, name), name, err);
	if (!r)
		r = delete(&w, s, err);
	return q_finish(q, &w, &all, r, err);
}
