/* qcow2: opening, closing, and the driver's table. */
#include "block/qcow2.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "base/keyvals.h"
#include "base/log.h"
#include "block/graph.h"

enum { L2_CACHE = 32 << 20, REF_CACHE = 4 << 20 };

/* --- the file --- */

int q_pread(struct qcow2 *q, uint64_t off, void *buf, uint64_t len)
{
	struct iovec v = { buf, len };
	return q->leaf->drv->read(q->leaf, off, &v, 1, len);
}

int q_pwrite(struct qcow2 *q, uint64_t off, const void *buf, uint64_t len)
{
	struct iovec v = { (void *)(uintptr_t)buf, len };
	return len ? q->leaf->drv->write(q->leaf, off, &v, 1, len, 0) : 0;
}

int q_sync(struct qcow2 *q)
{
	if (q->b->cache == CACHE_UNSAFE)
		return 0;
	int r = q->leaf->drv->flush(q->leaf);
	if (!r)
		q->needs_flush = false;
	return r;
}

bool q_is_aligned(const struct qcow2 *q, uint64_t off)
{
	return !(off & (q->cs - 1));
}

uint64_t q_l1_entries(const struct qcow2 *q, uint64_t size)
{
	unsigned shift = q->h.cluster_bits + q->l2_bits;
	return (size >> shift) + !!(size & (BIT(shift) - 1));
}

int q_corrupt(struct qcow2 *q, const char *fmt, ...)
{
	char what[256];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	if (q->broken)
		return q->broken;
	log_guest("%s: image is corrupt: %s%s", q->b->file, what,
		  q->b->read_only ? "" : "; no more writing to it (check it with 'lodge img check')");
	if (q->b->read_only)
		return -EIO;
	q->broken = -EIO;
	if (q->h.version >= 3) {
		struct qhead h = q->h;
		h.incompat |= INCOMPAT_CORRUPT;
		if (!q_write_head(q, &h))
			q->h = h;
	}
	return -EIO;
}

/* --- opening --- */

int q_load_tables(struct qcow2 *q, struct err *err)
{
	uint64_t bytes = (uint64_t)q->h.reftable_clusters * q->cs;
	uint64_t *t = malloc(MAX(bytes, 8u));
	q_event(q, EVENT_REFTABLE_LOAD);
	int r = t ? q_pread(q, q->h.reftable_off, t, bytes) : -ENOMEM;
	if (r) {
		free(t);
		return err_set_errno(err, r, "%s: cannot read the refcount table", q->b->file);
	}
	free(q->reftable);
	q->reftable = t;
	q->reftable_size = (uint32_t)(bytes / 8);
	for (uint32_t i = 0; i < q->reftable_size; i++)
		t[i] = be64(t + i) & ~0x1ffull;
	free(q->l1);
	q->l1 = NULL;
	q->l1_lo = q->l1_hi = 0;
	r = q_read_l1(q, q->h.l1_off, q->h.l1_size, &q->l1, err);
	if (!r)
		r = q_read_snapshots(q, err);
	int64_t len = q->leaf->drv->file_length(q->leaf);
	q->file_clusters = len < 0 ? UINT64_MAX : size_to_clusters(q, (uint64_t)len);
	q->free_hint = 0;
	q->comp_off = 0;
	if (!r && !q->b->read_only)
		r = q_meta_build(q);
	return r;
}

/* `name` stands in the image or came from the user; NULL: o->backing_options say what it is. */
static int open_named_backing(struct qcow2 *q, const struct block_opts *o, const char *name, const char *format, unsigned depth, struct err *err)
{
	struct block_opts bo = { .format = format, .read_only = true, .cache = o->cache, .shared = o->shared, .peek = o->peek, .tls = o->tls,
				 .throttles = o->throttles, .options = name ? NULL : o->backing_options };
	struct stat a, b;
	char *path = !name ? NULL : o->backing ? strdup(name) : block_path_beside(q->b->file, name);
	int r = path || !name ? 0 : -ENOMEM;
	bo.file = path;
	if (!r && name && q->leaf->nbd && !o->backing && *name != '/' && !block_name_is_protocol(name))
		r = err_set(err, -EINVAL, "the image comes over NBD, so its backing file's relative name '%s' means nothing", name);
	if (!r && path && !fstat(q->leaf->fd, &a) && !stat(path, &b) && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
		r = err_set(err, -ELOOP, "%s: is its own backing file", q->b->file);
	if (!r)
		r = block_open_backing(&q->b->backing, &bo, q->b, depth + 1, err);
	if (r)
		err_prefix(err, "%s: Could not open backing file", q->b->file);
	free(path);
	return r;
}

static int open_backing(struct qcow2 *q, const struct block_opts *o, unsigned depth, struct err *err)
{
	const char *name = o->backing ? o->backing : q->backing, *format = o->backing ? o->backing_format : q->backing_format;
	if (o->no_backing)
		return 0;
	if (o->backing_options)
		return open_named_backing(q, o, NULL, NULL, depth, err);
	if (!name || !*name)
		return 0;
	return open_named_backing(q, o, strncmp(name, "file:", 5) ? name : name + 5, format, depth, err);
}

static int open_data_file(struct qcow2 *q, const struct block_opts *o, unsigned depth, struct err *err)
{
	struct block_opts d = { .cache = o->cache, .aio = o->aio, .polled = o->polled, .tls = o->tls, .shared = o->shared, .no_lock = o->no_lock,
				.read_only = o->read_only || o->snapshot, .auto_read_only = o->auto_read_only, .options = o->data_options,
				.throttles = o->throttles, .discard_unmap = true, .protocol = true };
	if (!(q->h.incompat & INCOMPAT_DATA_FILE))
		return o->data_options ? err_set(err, -EINVAL, "%s: 'data-file' can only be set for images with an external data file", q->b->file) : 0;
	if (!o->data_options && (!q->data_file || !*q->data_file))
		return err_set(err, -EINVAL, "%s: 'data-file' is required for this image", q->b->file);
	char *beside = o->data_options ? NULL : block_path_beside(q->b->file, q->data_file);
	d.file = beside;
	struct block *data = NULL;
	int r = beside || o->data_options ? block_open_node(&data, &d, q->b->loop, q->b->workers, depth + 1, err) :
					    err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
	if (!r)
		r = fit_open(&data, err);
	free(beside);
	if (r) {
		block_free(data);
		return err_prefix(err, "%s: Could not open data file", q->b->file);
	}
	q->data = data;
	return 0;
}

static struct qcow2 *new_state(struct block *b)
{
	struct qcow2 *q = calloc(1, sizeof *q);
	if (!q)
		return NULL;
	q->b = b;
	q->leaf = q->data = b->child;
	q->ranges_tail = &q->ranges;
	pthread_mutex_init(&q->lock, NULL);
	pthread_mutex_init(&q->flush_lock, NULL);
	pthread_mutex_init(&q->turn_lock, NULL);
	pthread_cond_init(&q->flush_ended, NULL);
	pthread_mutex_init(&q->range_lock, NULL);
	pthread_mutex_init(&q->comp_lock, NULL);
	pthread_cond_init(&q->range_free, NULL);
	return q;
}

/* What must be settled before anybody uses the image: corrupt, dirty. */
static int settle(struct qcow2 *q, const struct block_opts *o, struct err *err)
{
	struct image_check c = { 0 };
	if (o->as_is)
		return 0;
	if (q->h.incompat & INCOMPAT_CORRUPT && !q->b->read_only)
		return err_set(err, -EACCES, "%s: Image is corrupt; cannot be opened read/write (repair it with 'lodge img check -r all')",
			       q->b->file);
	if (!(q->h.incompat & INCOMPAT_DIRTY) || q->b->read_only)
		return 0;
	log_warn("%s: was not closed properly; repairing refcounts", q->b->file);
	int r = qcow2_check(q->b, CHECK_FIX_LEAKS | CHECK_FIX_ERRORS, &c, err);
	if (!r && (c.corruptions || c.errors))
		r = err_set(err, -EIO, "%s: could not repair the dirty image", q->b->file);
	return r;
}

/* By an id or a name, or, as "snapshot.id=ID,snapshot.name=NAME" (or one of both), by just these. */
static int find_snapshot(struct qcow2 *q, const char *text, struct qsnap **found, struct err *err)
{
	struct keyvals l = { 0 };
	*found = NULL;
	if (strncmp(text, "snapshot.", 9)) {
		*found = q_find_snapshot(q, text);
		return 0;
	}
	int r = keyvals_parse(&l, "snapshot", text, NULL, err);
	const char *id = r ? NULL : keyvals_get(&l, "snapshot.id"), *name = r ? NULL : keyvals_get(&l, "snapshot.name");
	if (!r)
		r = keyvals_end(&l, "snapshot", err);
	for (unsigned i = 0; !r && !*found && i < q->nsnaps; i++)
		if ((!id || !strcmp(id, q->snaps[i].s.id)) && (!name || !strcmp(name, q->snaps[i].s.name)))
			*found = &q->snaps[i];
	keyvals_free(&l);
	return r;
}

static int use_snapshot(struct qcow2 *q, const char *name, struct err *err)
{
	struct qsnap *s;
	uint64_t *l1;
	if (!name)
		return 0;
	if (find_snapshot(q, name, &s, err))
		return -EINVAL;
	if (!s)
		return err_set(err, -ENOENT, "%s: there is no snapshot '%s'", q->b->file, name);
	if (!q->b->read_only)
		return err_set(err, -EINVAL, "%s: internal snapshots are read-only", q->b->file);
	int r = q_read_l1(q, s->l1_off, s->l1_size, &l1, err);
	if (r)
		return r;
	free(q->l1);
	q->l1 = l1;
	/* As in QEMU the size is the disk's of today: what the snapshot knows nothing of is not allocated. */
	uint32_t need = (uint32_t)q_l1_entries(q, q->h.size), have = s->l1_size;
	if (need > have) {
		q->l1 = realloc(l1, need * sizeof *l1);
		if (!q->l1) {
			free(l1);
			return err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
		}
		memset(q->l1 + have, 0, (need - have) * sizeof *l1);
	}
	q->h.l1_size = MAX(need, have);
	return 0;
}

static int use_options(struct qcow2 *q, const struct block_format_opts *f, struct err *err)
{
	uint64_t l2 = f->l2_cache ? f->l2_cache : L2_CACHE, refs = f->ref_cache ? f->ref_cache : REF_CACHE;
	if (f->l2_entry && (f->l2_entry & (f->l2_entry - 1) || f->l2_entry < 512 || f->l2_entry > q->cs))
		return err_set(err, -EINVAL, "%s: L2 cache entry size must be a power of two between 512 and the cluster size (%u)", q->b->file, q->cs);
	if (f->lazy == TRI_ON && q->h.version < 3)
		return err_set(err, -EINVAL, "%s: Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level", q->b->file);
	q->pass_request = f->pass_request ? f->pass_request == TRI_ON : q->b->discard_unmap;
	q->pass_snapshot = f->pass_snapshot != TRI_OFF;
	q->pass_other = f->pass_other == TRI_ON;
	q->l2.interval = q->refs.interval = (unsigned)f->clean_interval;
	/* Below 16 tables an operation could not hold all it needs. */
	if (qcache_init(&q->l2, (unsigned)MIN(MAX(l2 >> q->h.cluster_bits, 16u), UINT32_MAX / 2)) ||
	    qcache_init(&q->refs, (unsigned)MIN(MAX(refs >> q->h.cluster_bits, 16u), UINT32_MAX / 2)))
		return err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
	return 0;
}

int qcow2_open(struct block *b, const struct block_opts *o, unsigned depth, struct err *err)
{
	struct qcow2 *q = new_state(b);
	if (!q)
		return err_set(err, -ENOMEM, "%s: out of memory", b->file);
	b->qcow2 = q;
	b->drv = &block_qcow2;
	/* Writes become stable by our flushes, not one by one. */
	graph_adopt(b->child, b->cache == CACHE_WRITETHROUGH ? CACHE_WRITEBACK : b->cache == CACHE_DIRECTSYNC ? CACHE_NONE : b->cache, b->read_only);
	q->as_is = o->as_is;
	int r = q_read_header(q, err);
	if (r)
		return r;
	b->length = ALIGN_DOWN(q->h.size, (uint64_t)512);
	r = use_options(q, &o->fmt, err);
	if (r)
		return r;
	r = q_load_tables(q, err);
	if (!r)
		r = open_data_file(q, o, depth, err);
	if (!r)
		r = settle(q, o, err);
	if (!r)
		r = use_snapshot(q, o->internal, err);
	return r ? r : open_backing(q, o, depth, err);
}

static void qcow2_close(struct block *b)
{
	struct qcow2 *q = b->qcow2;
	if (!q)
		return;
	block_drain(q->data); /* whoever finished the last request may still be on its way out */
	if (!b->abandoned && !b->read_only && q->l1 && q->l2.hash && q->refs.hash) {
		q_bitmaps_end(q);
		/* The first round frees what is dead, the second writes that. */
		int r = q_flush(q, true);
		if (!r)
			r = q_flush(q, true);
		if (r)
			log_error("%s: closing: %s; run 'lodge img check'", b->file, strerror(-r));
	}
	qcache_free(&q->l2);
	qcache_free(&q->refs);
	q_free_snapshots(q);
	q_free_exts(q);
	if (q->data != q->leaf)
		block_free(q->data);
	free(q->l1);
	free(q->reftable);
	free(q->dead);
	free(q->meta);
	free(q->comp_buf);
	q_free_compressors(q);
	q_bitmaps_free(q);
	free(q->backing);
	free(q->backing_format);
	free(q->data_file);
	pthread_mutex_destroy(&q->lock);
	pthread_mutex_destroy(&q->flush_lock);
	pthread_mutex_destroy(&q->turn_lock);
	pthread_cond_destroy(&q->flush_ended);
	pthread_mutex_destroy(&q->range_lock);
	pthread_mutex_destroy(&q->comp_lock);
	pthread_cond_destroy(&q->range_free);
	free(q);
	b->qcow2 = NULL;
}

/* --- the table --- */

int q_start_writing(struct qcow2 *q)
{
	if (__atomic_load_n(&q->started_writing, __ATOMIC_ACQUIRE))
		return __atomic_load_n(&q->broken, __ATOMIC_RELAXED);
	pthread_mutex_lock(&q->lock);
	int r = q->broken;
	uint64_t keep = q->h.incompat & INCOMPAT_DATA_FILE ? AUTOCLEAR_DATA_RAW : 0;
	if (!r && !q->started_writing && !q_bitmaps_begin(q))
		keep |= AUTOCLEAR_BITMAPS;
	if (!r && !q->started_writing && q->h.autoclear & ~keep) {
		struct qhead h = q->h;
		if (h.autoclear & ~keep & AUTOCLEAR_BITMAPS)
			log_warn("%s: its dirty bitmaps do not follow what is written now; they are marked inconsistent", q->b->file);
		h.autoclear &= keep;
		r = q_write_head(q, &h);
		if (!r)
			q->h = h;
	}
	if (!r)
		__atomic_store_n(&q->started_writing, true, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&q->lock);
	return r;
}

static int after_write(struct block *b, int r, unsigned flags)
{
	bool through = !block_write_cache(b) || flags & BLOCK_REQ_FUA;
	return r || !through || b->cache == CACHE_UNSAFE ? r : q_flush(b->qcow2, true);
}

static int driver_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	int r = b->qcow2->copy_on_read ? cor_fill(b, NULL, off, len) : 0;
	return r ? r : q_read(b->qcow2, off, iov, n, len);
}

static int driver_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	return after_write(b, q_write(b->qcow2, off, iov, n, len), flags);
}

static int driver_flush(struct block *b)
{
	return b->cache == CACHE_UNSAFE || b->read_only ? 0 : q_flush(b->qcow2, true);
}

static int driver_discard(struct block *b, uint64_t off, uint64_t len)
{
	return b->discard_unmap ? q_discard(b->qcow2, off, len, false) : 0;
}

static int driver_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	return after_write(b, q_zero(b->qcow2, off, len, b->discard_unmap ? flags : flags & ~(unsigned)BLOCK_REQ_MAY_UNMAP), flags);
}

/*
 * Are clusters counted that the file system never gave blocks to (preallocation=metadata)? Then data clusters may be holes of
 * the file, and asking the file about each is worth it; else it would only make mapping slow. QEMU's rule and thresholds, so
 * that both call the same ranges zeroes. Lock held; looked at once.
 */
static bool is_sparsely_filled(struct qcow2 *q)
{
	struct stat st;
	if (q->sparse_known)
		return q->sparse_filled;
	q->sparse_known = true;
	if (q->leaf->fd < 0 || q->leaf->is_dev || fstat(q->leaf->fd, &st))
		return false;
	uint64_t clusters = size_to_clusters(q, (uint64_t)st.st_size), real = (uint64_t)st.st_blocks * 512 / q->cs, used = 0, v;
	uint64_t enough = MAX(real * 10 / 9, real + 2);
	for (uint64_t i = 0; i < clusters && used < enough && clusters - i >= enough - used; i++) {
		if (q_ref(q, i, &v))
			return false;
		used += !!v;
	}
	q->sparse_filled = used >= enough;
	return q->sparse_filled;
}

/* Of data at e->offset: does the file hold it, or is it a hole there? */
static void map_below(struct qcow2 *q, struct block_extent *e)
{
	struct block_extent below;
	int64_t end = q->data->drv->file_length(q->data);
	if (end >= 0 && e->offset >= (uint64_t)end) {
		e->zero = true;
	} else if (q->data->drv->map && !q->data->drv->map(q->data, e->offset, e->len, &below)) {
		e->len = MIN(e->len, below.len);
		e->zero = below.zero;
	}
}

static int driver_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct qcow2 *q = b->qcow2;
	struct qrun run, more;
	pthread_mutex_lock(&q->lock);
	int r = q_lookup(q, off, len, &run, false);
	while (!r && run.len < len && !q_lookup(q, off + run.len, len - run.len, &more, false) && more.kind == run.kind &&
	       (run.host ? more.host == run.host + run.len : !more.host && run.kind != Q_DATA && run.kind != Q_COMPRESSED))
		run.len += more.len; /* what goes on in the next table, or differs in what does not show */
	bool ask = !r && run.kind == Q_DATA && is_sparsely_filled(q);
	pthread_mutex_unlock(&q->lock);
	if (r)
		return r;
	*e = (struct block_extent){ .len = run.len, .present = run.kind != Q_HOLE, .zero = run.kind == Q_ZERO,
				    .data = run.kind == Q_DATA || run.kind == Q_COMPRESSED, .compressed = run.kind == Q_COMPRESSED };
	if (run.kind == Q_DATA || ((run.kind == Q_ZERO || run.kind == Q_HOLE) && run.host)) {
		e->has_offset = true;
		e->offset = run.host;
		e->file = q->data->file;
	}
	if (ask)
		map_below(q, e);
	return 0;
}

const struct block_driver block_qcow2 = {
	.name = "qcow2", .read = driver_read, .write = driver_write, .flush = driver_flush, .discard = driver_discard,
	.zero = driver_zero, .fast = q_fast, .submit = q_submit, .poll = q_poll, .map = driver_map, .resize = qcow2_resize, .close = qcow2_close,
};
