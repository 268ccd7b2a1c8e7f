/*
 * qcow2: reference counts and allocation ("Host cluster management").
 *
 * A cluster is taken from the refcount blocks that exist; when they have no run of the wanted length the
 * file is extended: the run, the blocks that count it and, when needed, a bigger refcount table are
 * placed behind everything else, written, and linked when they are stable.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "block/qcow2.h"

uint64_t ref_get(const struct qcow2 *q, const uint8_t *block, uint64_t i)
{
	switch (q->ref_bits) {
	case 8:  return block[i];
	case 16: return be16(block + 2 * i);
	case 32: return be32(block + 4 * i);
	case 64: return be64(block + 8 * i);
	default: return block[i * q->ref_bits / 8] >> (i * q->ref_bits % 8) & (BIT(q->ref_bits) - 1);
	}
}

void ref_set(const struct qcow2 *q, uint8_t *block, uint64_t i, uint64_t v)
{
	uint8_t *p = block + i * q->ref_bits / 8;
	unsigned shift = i * q->ref_bits % 8;
	switch (q->ref_bits) {
	case 8:  *p = (uint8_t)v; break;
	case 16: put16(p, (uint16_t)v); break;
	case 32: put32(p, (uint32_t)v); break;
	case 64: put64(p, v); break;
	default: *p = (uint8_t)((*p & ~((BIT(q->ref_bits) - 1) << shift)) | v << shift);
	}
}

/* The block that counts `cluster`: NULL with *r == 0 when there is none. */
static struct qtable *block_of(struct qcow2 *q, uint64_t cluster, int *r)
{
	uint64_t i = cluster >> q->ref_per_block_bits;
	*r = 0;
	if (i >= q->reftable_size || !q->reftable[i])
		return NULL;
	if (!q_is_aligned(q, q->reftable[i])) {
		*r = q_corrupt(q, "refcount block %llu is not aligned: 0x%llx", (unsigned long long)i, (unsigned long long)q->reftable[i]);
		return NULL;
	}
	q_event(q, EVENT_REFBLOCK_LOAD);
	return q_table(q, &q->refs, q->reftable[i], false, r);
}

int q_ref(struct qcow2 *q, uint64_t cluster, uint64_t *v)
{
	int r;
	struct qtable *t = block_of(q, cluster, &r);
	*v = t ? ref_get(q, t->data, cluster & (BIT(q->ref_per_block_bits) - 1)) : 0;
	return r;
}

static int add_one(struct qcow2 *q, uint64_t cluster, int d)
{
	int r;
	struct qtable *t = block_of(q, cluster, &r);
	if (r)
		return r;
	uint64_t i = cluster & (BIT(q->ref_per_block_bits) - 1), v = t ? ref_get(q, t->data, i) : 0;
	if (!t || (d < 0 ? v < (uint64_t)-d : v > q->ref_max - (uint64_t)d))
		return d < 0 ? q_corrupt(q, "cluster at 0x%llx is used but its refcount is 0", (unsigned long long)(cluster << q->h.cluster_bits)) :
			       -EINVAL;
	ref_set(q, t->data, i, v + (uint64_t)(int64_t)d);
	unsigned at = (unsigned)(i * q->ref_bits / 8);
	q_table_dirty(&q->refs, t, at, at + MAX(q->ref_bits / 8, 1u));
	if (v + (uint64_t)(int64_t)d == 0 && cluster < q->free_hint)
		q->free_hint = cluster;
	return 0;
}

int q_ref_add(struct qcow2 *q, uint64_t off, uint64_t bytes, int d)
{
	uint64_t first = off >> q->h.cluster_bits, end = (off + bytes - 1) >> q->h.cluster_bits;
	for (uint64_t c = first; c <= end; c++) {
		int r = add_one(q, c, d);
		if (r) {
			while (d > 0 && c-- > first)
				add_one(q, c, -d);
			return r;
		}
	}
	return 0;
}

/* --- extending --- */

/* The first cluster behind everything that is counted or in the file. */
static int end_of_all(struct qcow2 *q, uint64_t *end)
{
	int64_t len = q->leaf->drv->file_length(q->leaf);
	int r = 0;
	if (len < 0)
		return (int)len;
	*end = q->leaf->is_dev ? 0 : size_to_clusters(q, (uint64_t)len);
	for (uint32_t i = q->reftable_size; i-- > 0;) {
		uint64_t base = (uint64_t)i << q->ref_per_block_bits, n = BIT(q->ref_per_block_bits);
		if (!q->reftable[i])
			continue;
		struct qtable *t = block_of(q, base, &r);
		if (!t)
			return r;
		while (n && !ref_get(q, t->data, n - 1))
			n--;
		if (n) {
			*end = MAX(*end, base + n);
			break;
		}
	}
	return 0;
}

struct extension { uint64_t start, n, nblocks, table_clusters, first_block, last_block, end; };

/* A fixpoint: blocks count themselves and the table. */
static void plan(const struct qcow2 *q, struct extension *e)
{
	uint64_t blocks = 0, table = 0;
	for (;;) {
		uint64_t end = e->start + e->n + blocks + table, last = (end - 1) >> q->ref_per_block_bits, need = 0;
		for (uint64_t i = e->start >> q->ref_per_block_bits; i <= last; i++)
			need += i >= q->reftable_size || !q->reftable[i];
		uint64_t entries = q->reftable_size, tneed = 0;
		if (last >= entries)
			tneed = size_to_clusters(q, MAX((last + 1) * 8, (entries + entries / 2) * 8));
		if (need <= blocks && tneed <= table) {
			e->nblocks = blocks;
			e->table_clusters = table;
			e->first_block = e->start >> q->ref_per_block_bits;
			e->last_block = last;
			e->end = end;
			return;
		}
		blocks = MAX(blocks, need);
		table = MAX(table, tneed);
	}
}

/* New blocks, filled in memory through the cache like any other, at the places planned. */
static int make_blocks(struct qcow2 *q, const struct extension *e, uint64_t *table)
{
	uint64_t at = e->start + e->n, per = BIT(q->ref_per_block_bits);
	int r = 0;
	for (uint64_t i = e->first_block; i <= e->last_block; i++) {
		bool fresh = i >= q->reftable_size || !q->reftable[i];
		uint64_t off = fresh ? at++ << q->h.cluster_bits : q->reftable[i];
		struct qtable *t = q_table(q, &q->refs, off, fresh, &r);
		if (!t)
			return r;
		for (uint64_t c = MAX(e->start, i * per); c < MIN(e->end, (i + 1) * per); c++)
			ref_set(q, t->data, c & (per - 1), 1);
		q_table_dirty(&q->refs, t, 0, q->cs);
		table[i] = off;
		if (fresh)
			q_meta_add(q, off, 1);
	}
	return 0;
}

static int write_table_entries(struct qcow2 *q, const uint64_t *table, uint64_t first, uint64_t n, uint64_t off)
{
	uint64_t *be = malloc(n * 8);
	if (!be)
		return -ENOMEM;
	for (uint64_t i = 0; i < n; i++)
		put64(be + i, table[first + i]);
	int r = q_pwrite(q, off + first * 8, be, n * 8);
	free(be);
	q->needs_flush = true;
	return r;
}

static int link_bigger_table(struct qcow2 *q, const struct extension *e, uint64_t *table, uint64_t entries)
{
	struct qhead h = q->h;
	uint64_t old = q->h.reftable_off, old_bytes = (uint64_t)q->h.reftable_clusters * q->cs;
	h.reftable_off = (e->end - e->table_clusters) << q->h.cluster_bits;
	h.reftable_clusters = (uint32_t)e->table_clusters;
	q_event(q, EVENT_REFTABLE_GROW);
	q_event(q, EVENT_REFBLOCK_ALLOC_WRITE_TABLE);
	int r = write_table_entries(q, table, 0, entries, h.reftable_off);
	q_event(q, EVENT_REFBLOCK_ALLOC_SWITCH_TABLE);
	if (!r)
		r = q_sync(q);
	if (!r)
		r = q_write_head(q, &h);
	if (r)
		return r;
	q->h = h;
	free(q->reftable);
	q->reftable = table;
	q->reftable_size = (uint32_t)entries;
	q_meta_build(q);
	return q_ref_add(q, old, old_bytes, -1);
}

/* `n` clusters in a row behind everything. */
static int extend(struct qcow2 *q, uint64_t n, uint64_t *off)
{
	struct extension e = { .n = n };
	int r = end_of_all(q, &e.start);
	q_event(q, EVENT_REFBLOCK_ALLOC);
	if (r)
		return r;
	e.start = MAX(e.start, 1u);
	plan(q, &e);
	if (e.end >= BIT(56 - q->h.cluster_bits) || e.table_clusters * q->cs > REFTABLE_BYTES_MAX)
		return -EFBIG;
	uint64_t entries = e.table_clusters ? e.table_clusters * q->cs / 8 : q->reftable_size;
	uint64_t *table = calloc(entries, sizeof *table);
	if (!table)
		return -ENOMEM;
	memcpy(table, q->reftable, q->reftable_size * sizeof *table);
	r = make_blocks(q, &e, table);
	/* On failure the counts that went to old blocks stay: clusters lost, nothing else. */
	if (!r && e.nblocks) {
		q_event(q, e.table_clusters ? EVENT_REFBLOCK_ALLOC_WRITE_BLOCKS : EVENT_REFBLOCK_ALLOC_WRITE);
		r = q_write_tables(q, &q->refs);
		if (!r)
			r = q_sync(q);
	}
	if (!r && e.table_clusters)
		r = link_bigger_table(q, &e, table, entries);
	else if (!r && e.nblocks) {
		q_event(q, EVENT_REFBLOCK_ALLOC_HOOKUP);
		r = write_table_entries(q, table, e.first_block, e.last_block - e.first_block + 1, q->h.reftable_off);
		if (!r)
			memcpy(q->reftable, table, entries * sizeof *table);
	}
	if (table != q->reftable)
		free(table);
	if (r) { /* blocks nobody points to must not be found in the cache as if they were */
		for (uint64_t c = e.start + n; c < e.end; c++)
			q_table_forget(&q->refs, c << q->h.cluster_bits);
		return r;
	}
	*off = e.start << q->h.cluster_bits;
	return 0;
}

/* --- allocating --- */

/* The first run of free clusters from `from` (the hint) on, up to `n` long; 0 clusters when the blocks have none. */
static int find_free(struct qcow2 *q, uint64_t from, uint64_t n, bool all, uint64_t *start, uint64_t *got)
{
	uint64_t per = BIT(q->ref_per_block_bits), end = (uint64_t)q->reftable_size * per, run = 0;
	bool first = true;
	int r = 0;
	*got = 0;
	for (uint64_t c = from; c < end;) {
		struct qtable *t = block_of(q, c, &r);
		if (r)
			return r;
		if (!t) { /* nothing counted here: extend() will make a block when its time comes */
			run = 0;
			c = (c / per + 1) * per;
			continue;
		}
		for (uint64_t stop = (c / per + 1) * per; c < stop; c++) {
			bool free = c && !ref_get(q, t->data, c & (per - 1));
			if (free && first) {
				q->free_hint = c;
				first = false;
			}
			run = free ? run + 1 : 0;
			if (run == n || (run && !all && c + 1 < stop && ref_get(q, t->data, (c + 1) & (per - 1)))) {
				*start = c + 1 - run;
				*got = run;
				return 0;
			}
		}
		if (run && !all) {
			*start = c - run;
			*got = run;
			return 0;
		}
	}
	return 0;
}

int q_alloc(struct qcow2 *q, uint64_t n, bool all, uint64_t *off, uint64_t *got)
{
	uint64_t start = 0;
	int r = q->broken;
	q_event(q, EVENT_CLUSTER_ALLOC);
	if (!r)
		r = find_free(q, q->free_hint, n, all, &start, got);
	if (r)
		return r;
	if (*got) {
		*off = start << q->h.cluster_bits;
		for (uint64_t c = start; c < start + *got; c++)
			if (q_is_meta(q, c << q->h.cluster_bits))
				return q_corrupt(q, "cluster at 0x%llx holds metadata but counts as free", (unsigned long long)(c << q->h.cluster_bits));
		r = q_ref_add(q, *off, *got << q->h.cluster_bits, 1);
	} else {
		r = extend(q, n, off);
		*got = n;
	}
	if (!r && *off >> q->h.cluster_bits == q->free_hint)
		q->free_hint += *got;
	if (!r) {
		uint64_t c = *off >> q->h.cluster_bits;
		q->fresh = c >= q->file_clusters && !q->leaf->is_dev;
		q->file_clusters = MAX(q->file_clusters, c + *got);
	}
	if (!r && (*off + (*got << q->h.cluster_bits)) & ~(OFFSET_MASK | 0x1ff))
		r = -EFBIG;
	return r;
}

int q_alloc_bytes(struct qcow2 *q, unsigned len, uint64_t *off)
{
	uint64_t got, at = q->comp_off, room = at ? q->cs - (at & (q->cs - 1)) : 0, fresh = 0, refs = 0;
	int r = 0;
	q_event(q, EVENT_CLUSTER_ALLOC_BYTES);
	if (room < len) {
		r = q_alloc(q, 1, true, &fresh, &got);
		if (r)
			return r;
		if (!room || fresh != ALIGN_DOWN(at, (uint64_t)q->cs) + q->cs)
			at = fresh;
	}
	/* The old cluster gets a user more; the new one is counted already. */
	if (at != fresh) {
		r = q_ref(q, at >> q->h.cluster_bits, &refs);
		if (!r && refs >= q->ref_max) { /* narrow counts: a cluster each */
			if (!fresh)
				r = q_alloc(q, 1, true, &fresh, &got);
			at = fresh;
		} else if (!r) {
			r = q_ref_add(q, at, 1, 1);
		}
	}
	if (r) {
		if (fresh)
			q_unalloc(q, fresh, q->cs);
		return r;
	}
	*off = at;
	at += len;
	q->comp_off = at & (q->cs - 1) ? at : 0;
	return 0;
}

void q_unalloc(struct qcow2 *q, uint64_t off, uint64_t bytes)
{
	q_event(q, EVENT_CLUSTER_FREE);
	if (q_ref_add(q, off, bytes, -1))
		log_warn("%s: %llu bytes at 0x%llx stay allocated", q->b->file, (unsigned long long)bytes, (unsigned long long)off);
}

int q_dead(struct qcow2 *q, uint64_t off, uint64_t bytes)
{
	uint64_t first = off >> q->h.cluster_bits, n = ((off + bytes - 1) >> q->h.cluster_bits) - first + 1;
	if (q->ndead && q->dead[q->ndead - 1].off + q->dead[q->ndead - 1].n == first && q->dead[q->ndead - 1].request == q->by_request) {
		q->dead[q->ndead - 1].n += n;
		return 0;
	}
	if (q->ndead == q->dead_max) {
		unsigned max = q->dead_max ? q->dead_max * 2 : 64;
		struct qfree *d = realloc(q->dead, max * sizeof *d);
		if (!d)
			return -ENOMEM; /* leaked; a check finds it */
		q->dead = d;
		q->dead_max = max;
	}
	q->dead[q->ndead++] = (struct qfree){ first, n, q->by_request };
	return 0;
}

/* The first `n` entries of the list. Where nobody is left the file gets holes, if the options say so. */
void q_bury(struct qcow2 *q, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		for (uint64_t c = q->dead[i].off; c < q->dead[i].off + q->dead[i].n && !q->broken; c++) {
			uint64_t left = 0, off = c << q->h.cluster_bits;
			q_event(q, EVENT_CLUSTER_FREE);
			if (q_ref_add(q, off, 1, -1) || q_ref(q, c, &left) || left)
				continue;
			if (q->comp_off && q->comp_off >> q->h.cluster_bits == c)
				q->comp_off = 0;
			if (q->dead[i].request ? q->pass_request : q->pass_other)
				q->leaf->drv->discard(q->leaf, off, q->cs);
		}
	}
	q->ndead -= n;
	memmove(q->dead, q->dead + n, q->ndead * sizeof *q->dead);
}
