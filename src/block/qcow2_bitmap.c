/*
 * qcow2: persistent dirty bitmaps ("Bitmaps extension").
 *
 * The directory is read when it is first needed. From the first write on, the enabled bitmaps are in memory, marked in use on
 * disk, and follow every write; closing writes them back beside the old ones and switches over (R5). Whoever is killed before
 * leaves them marked, and everybody knows that they are not complete. Disabled ones stay where they are. When the autoclear
 * bit was not set, somebody wrote without knowing of bitmaps: then all of them count as in use.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "block/qcow2.h"

enum { ENTRY = 24, IN_USE = 1, AUTO = 2, EXTRA_COMPATIBLE = 4, BITMAPS_MAX = 65535, DIR_MAX = 64 << 20, NAME_MAX_LEN = 1023, GRAN_MIN = 9, GRAN_MAX = 31 };
#define BITS_BYTES_MAX (512ull << 20)

struct qbitmap {
	char *name;
	uint64_t table_off, dir_at;     /* dir_at: of its entry, in the directory */
	uint32_t table_n, flags, extra_len;
	uint8_t type, gran, *extra;
	uint64_t *bits, nbits;          /* NULL: on disk only */
};

static void free_one(struct qbitmap *m)
{
	free(m->name);
	free(m->extra);
	free(m->bits);
}

void q_bitmaps_free(struct qcow2 *q)
{
	for (unsigned i = 0; i < q->nbitmaps; i++)
		free_one(&q->bitmaps[i]);
	free(q->bitmaps);
	q->bitmaps = NULL;
	q->nbitmaps = 0;
	q->bitmaps_loaded = q->tracking = false;
}

static uint64_t bits_of(const struct qbitmap *m, uint64_t size)
{
	return (size >> m->gran) + !!(size & (BIT(m->gran) - 1));
}

static uint64_t bytes_of(uint64_t nbits)
{
	return (nbits + 7) / 8;
}

/* --- the directory --- */

static int parse_one(struct qcow2 *q, const uint8_t *p, uint64_t left, struct qbitmap *m, uint64_t *used)
{
	uint32_t extra = left >= ENTRY ? be32(p + 20) : 0, name = left >= ENTRY ? be16(p + 18) : 0;
	if (left < ENTRY || extra > left - ENTRY || name > left - ENTRY - extra || !name || name > NAME_MAX_LEN)
		return -EINVAL;
	*m = (struct qbitmap){ .table_off = be64(p), .table_n = be32(p + 8), .flags = be32(p + 12), .type = p[16], .gran = p[17], .extra_len = extra };
	if (!q_is_aligned(q, m->table_off) || m->table_n > (128u << 20) / 8 || m->type != 1 || m->gran < GRAN_MIN || m->gran > GRAN_MAX || m->flags & ~7u)
		return -EINVAL;
	m->name = strndup((const char *)p + ENTRY + extra, name);
	m->extra = malloc(extra + 1);
	if (!m->name || !m->extra)
		return -ENOMEM;
	memcpy(m->extra, p + ENTRY, extra);
	*used = ALIGN_UP((uint64_t)ENTRY + extra + name, (uint64_t)8);
	return 0;
}

/* Lock held. */
static int load_directory(struct qcow2 *q)
{
	struct qext *x = q_find_ext(q, EXT_BITMAPS);
	uint8_t *dir = NULL;
	int r = 0;
	if (q->bitmaps_loaded || !x) {
		q->bitmaps_loaded = true;
		return 0;
	}
	uint32_t n = x->len >= 24 ? be32(x->data) : 0;
	uint64_t size = x->len >= 24 ? be64(x->data + 8) : 0, off = x->len >= 24 ? be64(x->data + 16) : 0, at = 0, used = 0;
	if (!n || n > BITMAPS_MAX || size > DIR_MAX || size < (uint64_t)n * ENTRY || !q_is_aligned(q, off) || !off)
		return -EINVAL;
	dir = malloc(size);
	q->bitmaps = calloc(n, sizeof *q->bitmaps);
	r = dir && q->bitmaps ? q_pread(q, off, dir, size) : -ENOMEM;
	for (uint32_t i = 0; !r && i < n; i++) {
		r = parse_one(q, dir + at, size - at, &q->bitmaps[i], &used);
		q->nbitmaps++;
		q->bitmaps[i].dir_at = at;
		if (!(q->h.autoclear & AUTOCLEAR_BITMAPS))
			q->bitmaps[i].flags |= IN_USE;
		at += used;
	}
	free(dir);
	if (r)
		q_bitmaps_free(q);
	q->bitmaps_loaded = !r;
	return r;
}

static bool usable(const struct qbitmap *m)
{
	return !(m->flags & IN_USE) && (!m->extra_len || m->flags & EXTRA_COMPATIBLE);
}

/* Into memory. A table that does not fit the disk's size is damage. */
static int load_bits(struct qcow2 *q, struct qbitmap *m)
{
	uint64_t nbits = bits_of(m, q->b->length), bytes = bytes_of(nbits);
	if (m->bits)
		return 0;
	if (m->table_n != size_to_clusters(q, bytes) || bytes > BITS_BYTES_MAX)
		return -EINVAL;
	uint8_t *table = malloc(m->table_n * 8ull + 8), *bits = calloc(1, ALIGN_UP(bytes, (uint64_t)8) + 8);
	int r = table && bits ? q_pread(q, m->table_off, table, m->table_n * 8ull) : -ENOMEM;
	for (uint32_t i = 0; !r && i < m->table_n; i++) {
		uint64_t e = be64(table + i * 8ull), off = e & OFFSET_MASK, at = (uint64_t)i * q->cs, n = MIN((uint64_t)q->cs, bytes - at);
		if (e & ~(OFFSET_MASK | 1) || (off && e & 1) || !q_is_aligned(q, off))
			r = -EINVAL;
		else if (off)
			r = q_pread(q, off, bits + at, n);
		else if (e & 1)
			memset(bits + at, 0xff, n);
	}
	free(table);
	if (r) {
		free(bits);
		return r;
	}
	m->bits = (uint64_t *)(void *)bits;
	m->nbits = nbits;
	return 0;
}

/* --- following writes --- */

static void mark_range(struct qbitmap *m, uint64_t off, uint64_t len)
{
	uint64_t s = off >> m->gran, end = MIN(((off + len - 1) >> m->gran) + 1, m->nbits);
	while (s < end) {
		uint64_t n = MIN(end - s, 64 - s % 64), mask = (n == 64 ? ~0ull : BIT(n) - 1) << (s % 64);
		if ((__atomic_load_n(&m->bits[s / 64], __ATOMIC_RELAXED) & mask) != mask)
			__atomic_fetch_or(&m->bits[s / 64], mask, __ATOMIC_RELAXED);
		s += n;
	}
}

void q_bitmaps_mark(struct qcow2 *q, uint64_t off, uint64_t len)
{
	if (!__atomic_load_n(&q->tracking, __ATOMIC_ACQUIRE) || !len)
		return;
	for (unsigned i = 0; i < q->nbitmaps; i++)
		if (q->bitmaps[i].bits && q->bitmaps[i].flags & AUTO)
			mark_range(&q->bitmaps[i], off, len);
}

/* On disk, where they stand; each flag is within a sector. Lock held. */
static int announce(struct qcow2 *q)
{
	struct qext *x = q_find_ext(q, EXT_BITMAPS);
	int r = 0;
	for (unsigned i = 0; !r && i < q->nbitmaps; i++) {
		uint8_t flags[4];
		put32(flags, q->bitmaps[i].flags | IN_USE);
		if (q->bitmaps[i].bits)
			r = q_pwrite(q, be64(x->data + 16) + q->bitmaps[i].dir_at + 12, flags, 4);
	}
	return r ? r : q_sync(q);
}

/* Lock held. `all`: the disabled ones, too, because the size changes. */
static int begin(struct qcow2 *q, bool all)
{
	unsigned n = 0;
	int r = load_directory(q);
	for (unsigned i = 0; !r && i < q->nbitmaps; i++) {
		struct qbitmap *m = &q->bitmaps[i];
		if (all && !usable(m))
			return -ENOTSUP;
		if (!usable(m) || (!all && !(m->flags & AUTO)))
			continue;
		r = load_bits(q, m);
		n++;
	}
	if (!r && n)
		r = announce(q);
	if (!r && n)
		__atomic_store_n(&q->tracking, true, __ATOMIC_RELEASE);
	return r;
}

int q_bitmaps_begin(struct qcow2 *q)
{
	if (!(q->h.autoclear & AUTOCLEAR_BITMAPS) || !q_find_ext(q, EXT_BITMAPS))
		return -ENOENT;
	int r = begin(q, false);
	if (r)
		q_bitmaps_free(q);
	return r;
}

static const char no_bits[] = "a disk without a byte has no dirty bitmaps";      /* and QEMU takes no such table */

int q_bitmaps_before_resize(struct qcow2 *q, uint64_t size, struct err *err)
{
	if (!q_find_ext(q, EXT_BITMAPS) || !(q->h.autoclear & AUTOCLEAR_BITMAPS))
		return 0;
	pthread_mutex_lock(&q->lock);
	int r = begin(q, true);
	pthread_mutex_unlock(&q->lock);
	if (!r && !size && q->nbitmaps)
		return err_set(err, -ENOTSUP, "%s: %s: remove them first", q->b->file, no_bits);
	if (r == -ENOTSUP)
		return err_set(err, r, "%s: Cannot resize qcow2 images with inconsistent bitmaps; remove them first", q->b->file);
	return r ? err_set_errno(err, r, "%s: cannot read the bitmaps", q->b->file) : 0;
}

int q_bitmaps_resized(struct qcow2 *q, uint64_t size)
{
	for (unsigned i = 0; i < q->nbitmaps; i++) {
		struct qbitmap *m = &q->bitmaps[i];
		uint64_t nbits = bits_of(m, size), words = nbits / 64 + 2, old = m->nbits / 64 + 2;
		if (!m->bits)
			continue;
		uint64_t *bits = bytes_of(nbits) > BITS_BYTES_MAX ? NULL : realloc(m->bits, words * 8);
		if (!bits)
			return -ENOMEM;
		if (nbits % 64)
			bits[nbits / 64] &= nbits / 64 < old ? BIT(nbits % 64) - 1 : 0;
		for (uint64_t w = MIN(nbits / 64 + !!(nbits % 64), words); w < words; w++)
			bits[w] = 0;
		for (uint64_t w = m->nbits / 64 + 1; w < words; w++)
			bits[w] = 0;
		m->bits = bits;
		m->nbits = nbits;
	}
	return 0;
}

/* --- writing back --- */

static int uncount(struct qbuild *w, const struct qbitmap *m, struct err *err)
{
	struct qcow2 *q = w->q;
	uint8_t *table = malloc(m->table_n * 8ull + 8);
	int r = table ? q_pread(q, m->table_off, table, m->table_n * 8ull) : -ENOMEM;
	if (r) {
		free(table);
		return err_set_errno(err, r, "%s: bitmap '%s'", q->b->file, m->name);
	}
	for (uint32_t i = 0; !r && i < m->table_n; i++) {
		uint64_t off = be64(table + i * 8ull) & OFFSET_MASK;
		if (off)
			r = qbuild_add(w, off, q->cs, -1, err);
	}
	free(table);
	return r || !m->table_n ? r : qbuild_add(w, m->table_off, m->table_n * 8ull, -1, err);
}

/* -1: neither all zeroes nor all ones. */
static int uniform(const uint8_t *p, uint64_t n)
{
	return (p[0] && p[0] != 0xff) || memcmp(p, p + 1, n - 1) ? -1 : p[0] & 1;
}

static int put_bits(struct qbuild *w, struct qbitmap *m, struct err *err)
{
	struct qcow2 *q = w->q;
	uint64_t bytes = bytes_of(m->nbits), n = size_to_clusters(q, bytes);
	uint8_t *table = calloc(1, n * 8 + 8);
	int r = table ? 0 : err_set(err, -ENOMEM, "out of memory");
	for (uint64_t i = 0; !r && i < n; i++) {
		uint64_t at = i * q->cs, len = MIN((uint64_t)q->cs, bytes - at), off = 0;
		const uint8_t *p = (const uint8_t *)m->bits + at;
		int same = uniform(p, len);
		if (same < 0 || (same && len < q->cs))
			r = qbuild_put(w, p, len, &off, err);
		put64(table + i * 8, off ? off : same > 0);
	}
	m->table_n = (uint32_t)n;
	m->table_off = 0;
	if (!r && n)
		r = qbuild_put(w, table, n * 8, &m->table_off, err);
	free(table);
	return r;
}

static int put_directory(struct qbuild *w, struct err *err)
{
	struct qcow2 *q = w->q;
	uint64_t size = 0, at = 0, off = 0;
	uint8_t ext[24] = { 0 };
	for (unsigned i = 0; i < q->nbitmaps; i++)
		size += ALIGN_UP(ENTRY + q->bitmaps[i].extra_len + strlen(q->bitmaps[i].name), (uint64_t)8);
	w->h.autoclear &= ~(uint64_t)AUTOCLEAR_BITMAPS;
	w->whole_header = true;
	if (!q->nbitmaps)
		return q_set_ext(q, EXT_BITMAPS, NULL, 0);
	uint8_t *dir = size > DIR_MAX ? NULL : calloc(1, size);
	if (!dir)
		return err_set(err, -ENOMEM, "%s: out of memory for bitmaps", q->b->file);
	for (unsigned i = 0; i < q->nbitmaps; i++) {
		struct qbitmap *m = &q->bitmaps[i];
		uint8_t *p = dir + at;
		size_t name = strlen(m->name);
		m->dir_at = at;
		put64(p, m->table_off);
		put32(p + 8, m->table_n);
		put32(p + 12, m->flags);
		p[16] = m->type;
		p[17] = m->gran;
		put16(p + 18, (uint16_t)name);
		put32(p + 20, m->extra_len);
		memcpy(p + ENTRY, m->extra, m->extra_len);
		memcpy(p + ENTRY + m->extra_len, m->name, name);
		at += ALIGN_UP(ENTRY + m->extra_len + name, (uint64_t)8);
	}
	int r = qbuild_put(w, dir, size, &off, err);
	free(dir);
	put32(ext, q->nbitmaps);
	put64(ext + 8, size);
	put64(ext + 16, off);
	w->h.autoclear |= AUTOCLEAR_BITMAPS;
	return r ? r : q_set_ext(q, EXT_BITMAPS, ext, sizeof ext);
}

/* All that is in memory, and the directory. Everybody is kept out. `gone`: not in the list any more. */
static int store(struct qcow2 *q, const struct qbitmap *gone, struct err *err)
{
	struct qext *x = q_find_ext(q, EXT_BITMAPS);
	uint8_t old[24];
	bool had = x && x->len >= 24;
	struct qbuild w = { 0 };
	if (had)
		memcpy(old, x->data, sizeof old);
	int r = qbuild_begin(&w, q, false, err);
	if (!r && had)
		r = qbuild_add(&w, be64(old + 16), be64(old + 8), -1, err);
	if (!r && gone && gone->table_off)
		r = uncount(&w, gone, err);
	for (unsigned i = 0; !r && i < q->nbitmaps; i++) {
		struct qbitmap *m = &q->bitmaps[i];
		if (m->bits && m->table_off)
			r = uncount(&w, m, err);
		if (!r && m->bits)
			r = put_bits(&w, m, err);
	}
	if (!r)
		r = put_directory(&w, err);
	if (!r)
		r = qbuild_commit(&w, err);
	qbuild_end(&w);
	if (r)
		q_set_ext(q, EXT_BITMAPS, had ? old : NULL, had ? sizeof old : 0);
	return r;
}

void q_bitmaps_end(struct qcow2 *q)
{
	struct err err = { 0 };
	struct qrange all;
	if (!q->tracking || q->broken)
		return;
	int r = q_stop(q, &all, &err);
	if (!r && (r = q_bitmaps_resized(q, q->h.size)))
		err_set_errno(&err, r, "%s", q->b->file);
	if (!r)
		r = store(q, NULL, &err);
	q_go(q, &all);
	if (r)
		log_error("%s: the dirty bitmaps stay marked as inconsistent: %s", q->b->file, err.msg);
}

/* --- tools --- */

static struct qbitmap *find(struct qcow2 *q, const char *name)
{
	for (unsigned i = 0; i < q->nbitmaps; i++)
		if (!strcmp(q->bitmaps[i].name, name))
			return &q->bitmaps[i];
	return NULL;
}

static int find_usable(struct qcow2 *q, const char *name, struct qbitmap **m, struct err *err)
{
	*m = find(q, name);
	if (!*m)
		return err_set(err, -ENOENT, "Dirty bitmap '%s' not found", name);
	if ((*m)->flags & IN_USE)
		return err_set(err, -EINVAL, "Bitmap '%s' is inconsistent and cannot be used; try removing it", name);
	if (!usable(*m))
		return err_set(err, -ENOTSUP, "Bitmap '%s' has extra data that is not understood", name);
	return 0;
}

static int add(struct qcow2 *q, const char *name, uint64_t granularity, struct err *err)
{
	if (q->h.version < 3)
		return err_set(err, -ENOTSUP, "Cannot store dirty bitmaps in qcow2 v2 files");
	if (!q->b->length)
		return err_set(err, -ENOTSUP, "%s: %s", q->b->file, no_bits);
	if (!*name || strlen(name) > NAME_MAX_LEN)
		return err_set(err, -EINVAL, "Bitmap name must have 1 to %d bytes", NAME_MAX_LEN);
	if (find(q, name))
		return err_set(err, -EEXIST, "Bitmap already exists: %s", name);
	granularity = granularity ? granularity : MIN(MAX(q->cs, 4096u), 65536u);
	if (granularity & (granularity - 1) || granularity < BIT(GRAN_MIN) || granularity > BIT(GRAN_MAX))
		return err_set(err, -EINVAL, "Granularity must be a power of two from %u to %llu", 1u << GRAN_MIN, (unsigned long long)BIT(GRAN_MAX));
	struct qbitmap *v = q->nbitmaps < BITMAPS_MAX ? realloc(q->bitmaps, (q->nbitmaps + 1) * sizeof *v) : NULL;
	if (!v)
		return err_set(err, -ENOMEM, "too many bitmaps");
	q->bitmaps = v;
	v = &v[q->nbitmaps];
	*v = (struct qbitmap){ .name = strdup(name), .extra = malloc(1), .type = 1, .gran = (uint8_t)__builtin_ctzll(granularity), .flags = AUTO };
	v->nbits = bits_of(v, q->b->length);
	v->bits = bytes_of(v->nbits) > BITS_BYTES_MAX ? NULL : calloc(v->nbits / 64 + 2, 8);
	if (!v->name || !v->extra || !v->bits) {
		free_one(v);
		return err_set(err, -ENOMEM, "no memory for the bitmap; choose a coarser granularity");
	}
	q->nbitmaps++;
	return 0;
}

/* Granularities may differ: a set bit covers all bits it overlaps. */
static int merge(struct qcow2 *q, struct qbitmap *to, struct qcow2 *sq, const char *source, struct err *err)
{
	struct qbitmap *from;
	int r = sq == q ? 0 : load_directory(sq);
	if (r)
		return err_set_errno(err, r, "%s: bitmaps", sq->b->file);
	r = find_usable(sq, source, &from, err);
	if (!r)
		r = load_bits(sq, from) ? err_set(err, -EIO, "%s: bitmap '%s' cannot be read", sq->b->file, source) : 0;
	if (!r && sq->b->length != q->b->length)
		r = err_set(err, -EINVAL, "Bitmaps are of different sizes (destination size is %llu) and can't be merged", (unsigned long long)q->b->length);
	for (uint64_t i = 0; !r && i < from->nbits; i++) {
		if (!from->bits[i / 64]) {
			i |= 63;
			continue;
		}
		if (from->bits[i / 64] >> (i % 64) & 1)
			mark_range(to, i << from->gran, BIT(from->gran));
	}
	return r;
}

static int change(struct qcow2 *q, enum image_bitmap_op op, const char *name, const struct image_bitmap_arg *a, struct qbitmap *gone, struct err *err)
{
	struct qbitmap *m = NULL;
	int r;
	if (op == BITMAP_ADD)
		return add(q, name, a->granularity, err);
	if (op == BITMAP_REMOVE) {
		m = find(q, name);
		if (!m)
			return err_set(err, -ENOENT, "Dirty bitmap '%s' not found", name);
		*gone = *m;
		*m = q->bitmaps[--q->nbitmaps];
		return 0;
	}
	r = find_usable(q, name, &m, err);
	if (!r && load_bits(q, m))
		r = err_set(err, -EIO, "%s: bitmap '%s' cannot be read", q->b->file, name);
	if (r)
		return r;
	switch (op) {
	case BITMAP_CLEAR:
		memset(m->bits, 0, (m->nbits / 64 + 1) * 8);
		return 0;
	case BITMAP_ENABLE:
	case BITMAP_DISABLE:
		m->flags = op == BITMAP_ENABLE ? m->flags | AUTO : m->flags & ~(uint32_t)AUTO;
		return 0;
	default:
		return merge(q, m, a->source->qcow2, a->source_name, err);
	}
}

int qcow2_bitmap(struct block *b, enum image_bitmap_op op, const char *name, const struct image_bitmap_arg *a, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	struct qbitmap gone = { 0 };
	struct qrange all;
	int r = q_stop(q, &all, err);
	if (!r && q->tracking)
		r = err_set(err, -EBUSY, "%s: the bitmaps are in use", b->file);
	if (!r && load_directory(q))
		r = err_set(err, -EIO, "%s: the bitmap directory cannot be read", b->file);
	if (!r)
		r = change(q, op, name, a, &gone, err);
	if (!r)
		r = store(q, &gone, err);
	free_one(&gone);
	if (!q->tracking)
		q_bitmaps_free(q); /* from disk again, next time */
	q_go(q, &all);
	return r;
}

int qcow2_bitmap_read(struct block *b, const char *name, struct image_bits *out, struct err *err)
{
	struct qcow2 *q = b->qcow2;
	struct qbitmap *m = NULL;
	pthread_mutex_lock(&q->lock);
	int r = load_directory(q) ? err_set(err, -EIO, "%s: the bitmap directory cannot be read", b->file) : find_usable(q, name, &m, err);
	if (!r && load_bits(q, m))
		r = err_set(err, -EIO, "%s: bitmap '%s' cannot be read", b->file, name);
	if (!r) {
		size_t size = (m->nbits / 64 + 1) * 8;
		*out = (struct image_bits){ .nbits = m->nbits, .gran_bits = m->gran, .live = m->flags & AUTO && !b->read_only ? b : NULL, .bits = malloc(size) };
		if (out->bits)
			memcpy(out->bits, m->bits, size);
		else
			r = err_set(err, -ENOMEM, "out of memory");
	}
	if (!q->tracking)
		q_bitmaps_free(q); /* from disk again, next time */
	pthread_mutex_unlock(&q->lock);
	return r;
}

int qcow2_bitmap_extent(struct block *b, const char *name, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct qcow2 *q = b->qcow2;
	int r = -EAGAIN;
	pthread_mutex_lock(&q->lock);
	if (q->tracking) {
		const struct qbitmap *m = find(q, name);
		struct image_bits bits = { .bits = m ? m->bits : NULL, .nbits = m ? m->nbits : 0, .gran_bits = m ? m->gran : 0 };
		r = bits.bits ? 0 : -EIO;
		if (!r)
			image_bits_extent(&bits, off, len, e);
	}
	pthread_mutex_unlock(&q->lock);
	return r;
}
