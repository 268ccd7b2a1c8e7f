/*
 * qcow2: the caches of L2 tables and refcount blocks, and the order in which they reach the disk.
 *
 * Both caches hold whole clusters, found by file offset, least recently used out first. A dirty table
 * is written only as part of q_flush_tables(), which does all of them in the order R1-R4 need, so
 * eviction of a dirty table flushes everything: the tables of many requests share the cost.
 */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "base/log.h"
#include "block/qcow2.h"

enum { MAX_HASH = 65536 };

int qcache_init(struct qcache *c, unsigned max)
{
	c->max = max;
	c->nhash = 16;
	while (c->nhash < max && c->nhash < MAX_HASH)
		c->nhash *= 2;
	c->hash = calloc(c->nhash, sizeof *c->hash);
	c->lru.lru_next = c->lru.lru_prev = &c->lru;
	return c->hash ? 0 : -ENOMEM;
}

static unsigned slot(const struct qcache *c, uint64_t off)
{
	return (unsigned)((off >> 9) * 0x9e3779b97f4a7c15ull >> 40) & (c->nhash - 1);
}

static void unlink_lru(struct qtable *t)
{
	t->lru_prev->lru_next = t->lru_next;
	t->lru_next->lru_prev = t->lru_prev;
}

static void link_lru(struct qcache *c, struct qtable *t)
{
	t->lru_next = c->lru.lru_next;
	t->lru_prev = &c->lru;
	t->lru_next->lru_prev = t;
	c->lru.lru_next = t;
}

static void unlink_hash(struct qcache *c, struct qtable *t)
{
	struct qtable **p = &c->hash[slot(c, t->off)];
	while (*p != t)
		p = &(*p)->hash_next;
	*p = t->hash_next;
}

static void link_hash(struct qcache *c, struct qtable *t)
{
	struct qtable **p = &c->hash[slot(c, t->off)];
	t->hash_next = *p;
	*p = t;
}

static void drop(struct qcache *c, struct qtable *t)
{
	if (t->hi)
		c->ndirty--;
	unlink_lru(t);
	unlink_hash(c, t);
	free(t->data);
	free(t);
	c->n--;
}

void qcache_drop(struct qcache *c)
{
	while (c->hash && c->lru.lru_next != &c->lru)
		drop(c, c->lru.lru_next);
}

void qcache_free(struct qcache *c)
{
	qcache_drop(c);
	free(c->hash);
	c->hash = NULL;
}

struct qtable *q_table_peek(struct qcache *c, uint64_t off)
{
	for (struct qtable *t = c->hash[slot(c, off)]; t; t = t->hash_next)
		if (t->off == off)
			return t;
	return NULL;
}

/* Room for one more: drop the oldest clean table, after a flush when all old ones are dirty. */
static int make_room(struct qcow2 *q, struct qcache *c)
{
	if (c->n < c->max)
		return 0;
	for (int pass = 0; pass < 2; pass++) {
		unsigned tries = 0;
		for (struct qtable *t = c->lru.lru_prev; t != &c->lru && tries < 64; t = t->lru_prev, tries++) {
			if (!t->hi) {
				drop(c, t);
				return 0;
			}
		}
		int r = pass ? -EIO : q_flush_tables(q);
		if (r)
			return r;
	}
	return -EIO;
}

static uint64_t seconds(const struct qcache *c)
{
	struct timespec t = { 0 };
	if (c->interval)
		clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
	return (uint64_t)t.tv_sec;
}

/* cache-clean-interval: the oldest are at the end. */
static void drop_unused(struct qcache *c, uint64_t now)
{
	struct qtable *t = c->lru.lru_prev, *before;
	for (; t != &c->lru && now - t->used >= c->interval; t = before) {
		before = t->lru_prev;
		if (!t->hi)
			drop(c, t);
	}
}

struct qtable *q_table(struct qcow2 *q, struct qcache *c, uint64_t off, bool fresh, int *r)
{
	struct qtable *t = q_table_peek(c, off);
	uint64_t now = seconds(c);
	if (t) {
		t->used = now;
		unlink_lru(t);
		link_lru(c, t);
		if (fresh)
			memset(t->data, 0, q->cs);
		return t;
	}
	if (c->interval)
		drop_unused(c, now);
	*r = make_room(q, c);
	if (*r)
		return NULL;
	t = calloc(1, sizeof *t);
	if (t && posix_memalign((void **)&t->data, MIN(MAX(q->cs, 512u), 4096u), q->cs))
		t->data = NULL;
	if (!t || !t->data) {
		free(t);
		*r = -ENOMEM;
		return NULL;
	}
	if (fresh)
		memset(t->data, 0, q->cs);
	else if (c == &q->l2)
		q_event(q, EVENT_L2_LOAD);
	if (!fresh)
		*r = q_pread(q, off, t->data, q->cs);
	if (*r) {
		free(t->data);
		free(t);
		return NULL;
	}
	t->off = off;
	t->used = now;
	link_hash(c, t);
	link_lru(c, t);
	c->n++;
	return t;
}

void q_table_dirty(struct qcache *c, struct qtable *t, unsigned lo, unsigned hi)
{
	lo = ALIGN_DOWN(lo, 512u);
	hi = ALIGN_UP(hi, 512u);
	if (!t->hi)
		c->ndirty++;
	t->lo = t->hi ? MIN(t->lo, lo) : lo;
	t->hi = MAX(t->hi, hi);
}

void q_table_move(struct qcache *c, struct qtable *t, uint64_t off)
{
	unlink_hash(c, t);
	t->off = off;
	link_hash(c, t);
}

void q_table_forget(struct qcache *c, uint64_t off)
{
	struct qtable *t = q_table_peek(c, off);
	if (t)
		drop(c, t);
}

int q_write_tables(struct qcow2 *q, struct qcache *c)
{
	int first = 0;
	if (!c->ndirty)
		return 0;
	q->needs_flush = true;
	for (struct qtable *t = c->lru.lru_next; t != &c->lru; t = t->lru_next) {
		if (!t->hi)
			continue;
		q_event(q, c == &q->l2 ? EVENT_L2_UPDATE : EVENT_REFBLOCK_UPDATE_PART);
		int r = q_pwrite(q, t->off + t->lo, t->data + t->lo, t->hi - t->lo);
		if (r) {
			first = first ? first : r;
			continue;
		}
		t->lo = t->hi = 0;
		c->ndirty--;
	}
	return first;
}

static int write_l1(struct qcow2 *q)
{
	uint32_t lo = ALIGN_DOWN(q->l1_lo, 64u), hi = MIN(ALIGN_UP(q->l1_hi, 64u), q->h.l1_size);
	if (!q->l1_hi)
		return 0;
	uint64_t *be = malloc((hi - lo) * 8ull);
	if (!be)
		return -ENOMEM;
	for (uint32_t i = lo; i < hi; i++)
		put64(be + (i - lo), q->l1[i]);
	q_event(q, EVENT_L1_UPDATE);
	int r = q_pwrite(q, q->h.l1_off + lo * 8ull, be, (hi - lo) * 8ull);
	free(be);
	if (!r) {
		q->l1_lo = q->l1_hi = 0;
		q->needs_flush = true;
	}
	return r;
}

/*
 * The data of every entry in a dirty L2 table was written to the file before the entry was made, so the
 * first sync covers R1 and R2, the second R3. What ends up written but not synced here is synced by
 * whoever needs it stable.
 */
int q_flush_tables(struct qcow2 *q)
{
	if (q->broken)
		return q->broken;
	int r = q_write_tables(q, &q->refs);
	if (!r && (q->l2.ndirty || q->l1_hi)) {
		/* An external data file holds what the entries show. */
		if (q->data != q->leaf && q->b->cache != CACHE_UNSAFE)
			r = q->data->drv->flush(q->data);
		if (!r)
			r = q_sync(q);
	}
	if (!r)
		r = q_write_tables(q, &q->l2);
	if (!r && q->l1_hi) {
		r = q_sync(q);
		if (!r)
			r = write_l1(q);
	}
	return r;
}

/*
 * After the last sync every reference removed before it is gone for good: what was dead by then can be
 * used again. `lock` is not held on entry.
 */
static int flush_alone(struct qcow2 *q, bool sync)
{
	q_event(q, EVENT_FLUSH_TO_OS);
	pthread_mutex_lock(&q->lock);
	int r = q_flush_tables(q);
	unsigned ndead = q->ndead;
	pthread_mutex_unlock(&q->lock);
	if (!r && sync && q->data != q->leaf)
		r = q->data->drv->flush(q->data);
	if (!r && sync) {
		q_event(q, EVENT_FLUSH_TO_DISK);
		r = q_sync(q);
	}
	if (!r && ndead) {
		pthread_mutex_lock(&q->lock);
		q_bury(q, ndead);
		pthread_mutex_unlock(&q->lock);
	}
	return r;
}

/*
 * Of several that wait for a flush to end one does the next for all: it begins after all of them came. Who is served goes, whatever begins next; when it
 * fails it has failed for all of them, since the kernel may tell of what it lost only once.
 */
int q_flush(struct qcow2 *q, bool sync)
{
	pthread_mutex_lock(&q->turn_lock);
	uint64_t wanted = q->flushes + 1;
	while (q->flushing && MAX(q->flushed, q->unflushed) < wanted)
		pthread_cond_wait(&q->flush_ended, &q->turn_lock);
	bool served = MAX(q->flushed, q->unflushed) >= wanted;
	uint64_t mine = served ? 0 : ++q->flushes;
	int r = served && q->flushed < wanted ? q->flush_error : 0;
	q->flushing |= !served;
	pthread_mutex_unlock(&q->turn_lock);
	if (served)
		return r;
	pthread_mutex_lock(&q->flush_lock);
	r = flush_alone(q, sync);
	pthread_mutex_unlock(&q->flush_lock);
	pthread_mutex_lock(&q->turn_lock);
	q->flushing = false;
	if (r) {
		q->unflushed = mine;
		q->flush_error = r;
	} else if (sync) {
		q->flushed = mine;
	}
	pthread_cond_broadcast(&q->flush_ended);
	pthread_mutex_unlock(&q->turn_lock);
	return r;
}

/* --- clusters that hold metadata: guest data never goes there, whatever an image says --- */

static bool meta_insert(uint64_t *set, unsigned size, uint64_t key)
{
	unsigned i = (unsigned)(key * 0x9e3779b97f4a7c15ull >> 32) & (size - 1);
	while (set[i]) {
		if (set[i] == key)
			return false;
		i = (i + 1) & (size - 1);
	}
	set[i] = key;
	return true;
}

static void meta_grow(struct qcow2 *q)
{
	unsigned size = q->meta_size ? q->meta_size * 2 : 256;
	uint64_t *set = calloc(size, sizeof *set);
	if (!set)
		return; /* a guard less; the set stays as it was */
	for (unsigned i = 0; i < q->meta_size; i++)
		if (q->meta[i])
			meta_insert(set, size, q->meta[i]);
	free(q->meta);
	q->meta = set;
	q->meta_size = size;
}

void q_meta_add(struct qcow2 *q, uint64_t off, uint64_t bytes)
{
	uint64_t first = off >> q->h.cluster_bits, n = size_to_clusters(q, bytes);
	for (uint64_t i = first; i < first + n; i++) {
		if (2 * (q->nmeta + 1) > q->meta_size)
			meta_grow(q);
		if (q->nmeta + 1 < q->meta_size && meta_insert(q->meta, q->meta_size, i + 1))
			q->nmeta++;
	}
}

/* False positives are possible after a table moved; the set is made anew then (q_meta_build). */
bool q_is_meta(const struct qcow2 *q, uint64_t off)
{
	uint64_t key = (off >> q->h.cluster_bits) + 1;
	unsigned i = (unsigned)(key * 0x9e3779b97f4a7c15ull >> 32) & (q->meta_size - 1);
	if (!q->meta_size)
		return false;
	for (; q->meta[i]; i = (i + 1) & (q->meta_size - 1))
		if (q->meta[i] == key)
			return true;
	return false;
}

int q_meta_build(struct qcow2 *q)
{
	free(q->meta);
	q->meta = NULL;
	q->nmeta = q->meta_size = 0;
	q_meta_add(q, 0, q->cs);
	q_meta_add(q, q->h.l1_off, q->h.l1_size * 8ull);
	q_meta_add(q, q->h.reftable_off, (uint64_t)q->h.reftable_clusters * q->cs);
	for (uint32_t i = 0; i < q->h.l1_size; i++)
		if (q->l1[i] & OFFSET_MASK)
			q_meta_add(q, q->l1[i] & OFFSET_MASK, 1);
	for (uint32_t i = 0; i < q->reftable_size; i++)
		if (q->reftable[i])
			q_meta_add(q, q->reftable[i], 1);
	for (unsigned i = 0; i < q->nsnaps; i++)
		q_meta_add(q, q->snaps[i].l1_off, q->snaps[i].l1_size * 8ull);
	return q->meta ? 0 : -ENOMEM;
}
