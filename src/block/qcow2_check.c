/*
 * qcow2: check and repair. Everything reachable is counted and compared with the stored counts. Repair
 * corrects counts and COPIED flags where they stand (each of these writes is right by itself, in the order
 * counts, then flags); when the refcount structure itself is unusable a new one is built beside it (R5).
 * Entries that point to nonsense are reported, never followed, and not repaired by guessing.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "block/qcow2.h"

struct check {
	struct qcow2 *q;
	struct image_check *c;
	struct qbuild w;
	unsigned fix;
	bool rebuild;
	bool fix_flags;         /* COPIED: on demand, or with leaks when the counts are known to be right */
	uint64_t ref_errors;    /* corruptions that a new refcount structure does away with */
	uint64_t next_host;     /* for fragmentation */
};

static void say(struct check *k, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(struct check *k, const char *fmt, ...)
{
	char line[256];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(line, sizeof line, fmt, ap);
	va_end(ap);
	if (k->c->say)
		k->c->say(k->c->opaque, line);
}

static void count(struct check *k, uint64_t off, uint64_t bytes, const char *what)
{
	if (bytes && qbuild_add(&k->w, off, bytes, 1, NULL)) {
		say(k, "ERROR: %s at 0x%llx is outside of the file", what, (unsigned long long)off);
		k->c->corruptions++;
	}
}

/* QEMU's statistics: an active cluster that is not behind the one before it, in the same L2 table. */
static void count_place(struct check *k, uint64_t off, bool active)
{
	if (!active)
		return;
	k->c->allocated++;
	k->c->fragmented += k->next_host && k->next_host != off;
	k->next_host = off + k->q->cs;
}

static void count_entry(struct check *k, const struct qentry *e, uint64_t guest, bool active)
{
	struct qcow2 *q = k->q;
	uint64_t off = e->host, len = q->cs;
	if (e->compressed) {
		q_compressed_place(q, e->raw, &off, &len);
		if (e->raw & OFLAG_COPIED || q->data != q->leaf) {
			say(k, "ERROR: compressed cluster at guest offset 0x%llx has wrong flags", (unsigned long long)guest);
			k->c->corruptions++;
		}
		k->c->compressed += active;
		k->c->allocated += active;
		k->c->fragmented += active; /* as QEMU counts */
		count(k, off, len, "compressed cluster");
		return;
	}
	if (e->raw & ~(uint64_t)(OFFSET_MASK | OFLAG_COPIED | (q->h.version >= 3 && q->nsub == 1 ? OFLAG_ZERO : 0))) {
		say(k, "ERROR found l2 entry with reserved bits set: %llx", (unsigned long long)e->raw);
		k->c->corruptions++;
	}
	if (e->alloc & e->zero || (e->alloc && !off && q->data == q->leaf)) {
		say(k, "ERROR: wrong subcluster bits at guest offset 0x%llx", (unsigned long long)guest);
		k->c->corruptions++;
	}
	if (q->data != q->leaf) {
		if (e->alloc && off != guest) {
			say(k, "ERROR: guest offset 0x%llx is mapped to 0x%llx of the data file", (unsigned long long)guest, (unsigned long long)off);
			k->c->corruptions++;
		}
		count_place(k, off, active && (off || e->raw & OFLAG_COPIED)); /* the first cluster of a data file is at 0 */
		return;
	}
	if (!off)
		return;
	if (!q_is_aligned(q, off)) {
		say(k, "ERROR offset=%llx: Cluster is not properly aligned; L2 entry corrupted.", (unsigned long long)off);
		k->c->corruptions++;
		return;
	}
	count_place(k, off, active);
	count(k, off, len, "data cluster");
}

/* An L1 table and what it reaches. */
static void walk(struct check *k, const uint64_t *l1, uint32_t n, bool active)
{
	struct qcow2 *q = k->q;
	uint8_t *l2 = malloc(q->cs);
	if (!l2) {
		k->c->errors++;
		return;
	}
	for (uint32_t i = 0; i < n; i++) {
		uint64_t off = l1[i] & OFFSET_MASK;
		if (l1[i] & ~(OFFSET_MASK | OFLAG_COPIED)) {
			say(k, "ERROR: L1 entry %u has reserved bits set: %llx", i, (unsigned long long)l1[i]);
			k->c->corruptions++;
		}
		if (!off)
			continue;
		if (!q_is_aligned(q, off) || off >> q->h.cluster_bits >= k->w.n) {
			say(k, "ERROR l2_offset=%llx: Table is not properly placed; L1 entry corrupted", (unsigned long long)off);
			k->c->corruptions++;
			continue;
		}
		count(k, off, q->cs, "L2 table");
		if (q_pread(q, off, l2, q->cs)) {
			say(k, "ERROR: I/O error in check_refcounts_l2");
			k->c->errors++;
			continue;
		}
		k->next_host = 0;
		for (unsigned e = 0; e < BIT(q->l2_bits); e++) {
			struct qentry en;
			qentry_decode(q, l2 + e * q->entry_size, &en);
			count_entry(k, &en, (((uint64_t)i << q->l2_bits) + e) << q->h.cluster_bits, active);
		}
	}
	free(l2);
}

static void walk_bitmaps(struct check *k)
{
	struct qcow2 *q = k->q;
	struct qext *x = q_find_ext(q, EXT_BITMAPS);
	if (!x || x->len < 24)
		return;
	uint64_t size = be64(x->data + 8), off = be64(x->data + 16), at = 0;
	if (size > 64 << 20 || !q_is_aligned(q, off)) {
		k->c->corruptions++;
		return;
	}
	count(k, off, size, "bitmap directory");
	for (uint32_t i = 0; i < be32(x->data) && at + 24 <= size; i++) {
		uint8_t p[24], t[8];
		if (q_pread(q, off + at, p, sizeof p))
			break;
		uint64_t table = be64(p), n = be32(p + 8);
		at += ALIGN_UP(24ull + be16(p + 18) + be32(p + 20), 8ull);
		if (n * 8 > (uint64_t)L1_BYTES_MAX || !q_is_aligned(q, table)) {
			k->c->corruptions++;
			continue;
		}
		count(k, table, n * 8, "bitmap table");
		for (uint64_t e = 0; e < n && !q_pread(q, table + e * 8, t, 8); e++)
			if (be64(t) & OFFSET_MASK)
				count(k, be64(t) & OFFSET_MASK, q->cs, "bitmap data");
	}
}

static void walk_refs(struct check *k)
{
	struct qcow2 *q = k->q;
	count(k, q->h.reftable_off, (uint64_t)q->h.reftable_clusters * q->cs, "refcount table");
	for (uint32_t i = 0; i < q->reftable_size; i++) {
		uint64_t off = q->reftable[i], c = off >> q->h.cluster_bits;
		if (!off)
			continue;
		if (!q_is_aligned(q, off) || c >= k->w.n) {
			say(k, "ERROR refcount block %u is %s", i, c >= k->w.n ? "outside image" : "not cluster aligned; refcount table entry corrupted");
			k->c->corruptions++;
			k->ref_errors++;
			k->rebuild = true;
			continue;
		}
		count(k, off, q->cs, "refcount block");
		if (k->w.refs[c] != 1) {
			say(k, "ERROR refcount block %u refcount=%u", i, k->w.refs[c]);
			k->c->corruptions++;
			k->ref_errors++;
			k->rebuild = true;
		}
	}
}

static uint64_t snapshot_bytes(const struct qcow2 *q)
{
	uint64_t n = 0;
	for (unsigned i = 0; i < q->nsnaps; i++)
		n += ALIGN_UP(40ull + q->snaps[i].extra_len + strlen(q->snaps[i].s.id) + strlen(q->snaps[i].s.name), 8ull);
	return n;
}

static int walk_all(struct check *k, struct err *err)
{
	struct qcow2 *q = k->q;
	count(k, 0, q->cs, "header");
	count(k, q->h.l1_off, q->h.l1_size * 8ull, "active L1 table");
	walk(k, q->l1, q->h.l1_size, true);
	for (unsigned i = 0; i < q->nsnaps; i++) {
		uint64_t *l1;
		int r = q_read_l1(q, q->snaps[i].l1_off, q->snaps[i].l1_size, &l1, err);
		if (r)
			return r;
		count(k, q->snaps[i].l1_off, q->snaps[i].l1_size * 8ull, "snapshot's L1 table");
		walk(k, l1, q->snaps[i].l1_size, false);
		free(l1);
	}
	count(k, q->h.snapshots_off, snapshot_bytes(q), "snapshot table");
	walk_bitmaps(k);
	walk_refs(k);
	return 0;
}

/* --- stored counts against these --- */

static int compare(struct check *k)
{
	struct qcow2 *q = k->q;
	uint64_t known = k->w.n, end = 0, per = BIT(q->ref_per_block_bits);
	for (uint64_t c = 0; c < MAX(known, (uint64_t)q->reftable_size * per); c++) {
		uint64_t stored, counted = c < known ? k->w.refs[c] : 0;
		if (c >= known && !q->reftable[c / per]) { /* nothing stored here */
			c |= per - 1;
			continue;
		}
		if (c / per < q->reftable_size && (!q_is_aligned(q, q->reftable[c / per]) || q->reftable[c / per] >> q->h.cluster_bits >= known))
			stored = 0;
		else if (q_ref(q, c, &stored)) {
			k->c->errors++;
			return -EIO;
		}
		if (counted || (stored && c < known))
			end = c + 1;
		if (stored == counted)
			continue;
		/* A count for what the file does not reach occupies nothing: no finding, as in QEMU, but gone after a repair. */
		if (!counted && c >= known) {
			if (k->fix & CHECK_FIX_LEAKS && !k->rebuild && stored <= INT32_MAX)
				q_ref_add(q, c << q->h.cluster_bits, 1, -(int)stored);
			continue;
		}
		bool leak = stored > counted, fix = k->fix & (leak ? CHECK_FIX_LEAKS : CHECK_FIX_ERRORS) && !k->rebuild;
		say(k, "%s cluster %llu refcount=%llu reference=%llu", fix ? "Repairing" : leak ? "Leaked" : "ERROR",
		    (unsigned long long)c, (unsigned long long)stored, (unsigned long long)counted);
		if (fix && counted <= q->ref_max && !q_ref_add(q, c << q->h.cluster_bits, 1, (int)((int64_t)counted - (int64_t)stored)))
			*(leak ? &k->c->leaks_fixed : &k->c->corruptions_fixed) += 1;
		else if (leak)
			k->c->leaks++;
		else
			k->c->corruptions++, k->ref_errors++;
		if (!leak && k->fix & CHECK_FIX_ERRORS && c / per >= q->reftable_size)
			k->rebuild = true;
		else if (!leak && !fix && k->fix & CHECK_FIX_ERRORS)
			k->rebuild = true;
		else if (!leak && fix && !q->reftable[c / per])
			k->rebuild = true;
	}
	k->c->end_offset = end << q->h.cluster_bits;
	return 0;
}

/* COPIED of one cluster: what the counts say now. -1: cannot tell. */
static int should_be_copied(struct check *k, uint64_t off)
{
	uint64_t c = off >> k->q->h.cluster_bits, v;
	if (k->rebuild || k->fix & CHECK_FIX_ERRORS)
		return c < k->w.n ? k->w.refs[c] == 1 : -1;
	return q_ref(k->q, c, &v) ? -1 : v == 1;
}

static void check_flag(struct check *k, uint64_t *entry, uint64_t off, const char *what, bool *changed)
{
	int want = should_be_copied(k, off);
	if (want < 0 || want == !!(*entry & OFLAG_COPIED))
		return;
	bool fix = k->fix_flags;
	say(k, "%s OFLAG_COPIED %s: entry=%llx", fix ? "Repairing" : "ERROR", what, (unsigned long long)*entry);
	if (fix) {
		*entry ^= OFLAG_COPIED;
		*changed = true;
		k->c->corruptions_fixed++;
	} else {
		k->c->corruptions++;
	}
}

static void check_flags(struct check *k)
{
	struct qcow2 *q = k->q;
	int r = 0;
	for (uint32_t i = 0; i < q->h.l1_size; i++) {
		uint64_t off = q->l1[i] & OFFSET_MASK;
		bool changed = false;
		if (!off || !q_is_aligned(q, off) || off >> q->h.cluster_bits >= k->w.n)
			continue;
		check_flag(k, &q->l1[i], off, "L2 cluster", &changed);
		if (changed) {
			q->l1_lo = q->l1_hi ? MIN(q->l1_lo, i) : i;
			q->l1_hi = i + 1;
		}
		struct qtable *t = q_table(q, &q->l2, off, false, &r);
		if (!t) {
			k->c->errors++;
			continue;
		}
		for (unsigned e = 0; e < BIT(q->l2_bits) && q->data == q->leaf; e++) {
			uint64_t v = be64(t->data + e * q->entry_size);
			changed = false;
			if (v & OFLAG_COMPRESSED || !(v & OFFSET_MASK) || !q_is_aligned(q, v & OFFSET_MASK))
				continue;
			uint64_t data = v & OFFSET_MASK;
			/* q_ref may read a block; L2 tables have a cache of their own, so `t` stays. */
			check_flag(k, &v, data, "data cluster", &changed);
			if (changed) {
				put64(t->data + e * q->entry_size, v);
				q_table_dirty(&q->l2, t, e * q->entry_size, (e + 1) * q->entry_size);
			}
		}
	}
}

static void uncount(struct check *k, uint64_t off)
{
	uint64_t c = off >> k->q->h.cluster_bits;
	if (c < k->w.n && k->w.refs[c])
		k->w.refs[c]--;
}

/* New counts, made from what was reachable; the old refcount structure's own clusters become free. */
static int rebuild(struct check *k, struct err *err)
{
	struct qcow2 *q = k->q;
	for (uint64_t c = 0; c < k->w.n; c++)
		k->w.taken[c] = k->w.refs[c] != 0;
	/* What lay outside of the file was not counted as a whole. */
	if (!range_bad(q->h.reftable_off >> q->h.cluster_bits, q->h.reftable_clusters, k->w.n))
		for (uint32_t i = 0; i < q->h.reftable_clusters; i++)
			uncount(k, q->h.reftable_off + (uint64_t)i * q->cs);
	for (uint32_t i = 0; i < q->reftable_size; i++)
		if (q->reftable[i] && q_is_aligned(q, q->reftable[i]))
			uncount(k, q->reftable[i]);
	k->w.h = q->h;
	say(k, "Rebuilding refcount structure");
	int r = qbuild_commit(&k->w, err);
	if (!r) {
		k->c->corruptions_fixed += k->ref_errors;
		k->c->corruptions -= k->ref_errors;
		k->c->leaks_fixed += k->c->leaks;
		k->c->leaks = 0;
	}
	return r;
}

static int finish(struct check *k, struct err *err)
{
	struct qcow2 *q = k->q;
	struct qhead h = q->h;
	int r = 0;
	if (!k->fix)
		return 0;
	if (k->rebuild && k->fix & CHECK_FIX_ERRORS && !k->c->errors)
		r = rebuild(k, err);
	if (!r)
		r = q_flush_tables(q);
	if (!r)
		r = q_sync(q);
	h = q->h;
	if (!k->c->corruptions && !k->c->errors)
		h.incompat &= ~(uint64_t)(INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
	if (!r && h.incompat != q->h.incompat) {
		r = q_write_head(q, &h);
		if (!r)
			q->h = h;
	}
	return r ? err_set_errno(err, r, "%s: repairing", q->b->file) : 0;
}

int qcow2_check(struct block *b, unsigned fix, struct image_check *c, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	struct check k = { .q = q, .c = c, .fix = fix };
	struct qrange all;
	int r = q_stop(q, &all, err);
	c->total = size_to_clusters(q, q->h.size);
	if (!r)
		r = qbuild_begin(&k.w, q, true, err);
	if (!r)
		r = walk_all(&k, err);
	if (!r)
		compare(&k);
	/* A snapshot's tables have no flags to check. */
	k.fix_flags = fix & CHECK_FIX_ERRORS || (fix & CHECK_FIX_LEAKS && !c->corruptions && !c->errors && !c->leaks);
	if (!r)
		check_flags(&k);
	if (!r)
		r = finish(&k, err);
	qbuild_end(&k.w);
	q_go(q, &all);
	return r;
}
